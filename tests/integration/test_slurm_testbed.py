"""The test bed itself: a real Slurm whose jobs get GPUs, and of which nothing is left."""

from __future__ import annotations

from pathlib import Path

from program import wait_for
from testbed.slurm import SlurmBed, slurm_bed


def test_a_job_gets_its_gpus_and_its_end_is_told(slurm: SlurmBed, tmp_path: Path) -> None:
    script = f"echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES > {tmp_path}/out; exit 3"
    job = slurm.submit(script, "--partition=high", "--gres=gpu:2")
    wait_for(lambda: "ExitCode=3:0" in slurm.run("scontrol", "show", "job", job), "the job's end")
    node, gpus = (tmp_path / "out").read_text().split()
    assert node in slurm.nodes
    assert gpus == "0,1"


def test_two_beds_run_side_by_side_and_leave_nothing(slurm: SlurmBed) -> None:
    with slurm_bed(nodes=1, gpus=0) as other:
        job = other.submit("sleep 600")
        wait_for(lambda: other.jobs() == [f"{job} RUNNING sbatch"], "the job's start")
        assert other.jobs()[0] not in slurm.jobs()
    assert not other.folder.exists()
    assert other.leftovers() == []

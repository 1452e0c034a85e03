"""A real vLLM over two nodes of a real Slurm, on the CPU; minutes, so only with --slow."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import free_port, is_listening, wait_for
from testbed.slurm import SlurmBed, missing_programs, slurm_bed

import agent_infra
from agent_infra import LocalCommands, ModelConfig, PartitionConfig, SlurmCluster

TESTBED = Path(__file__).parents[1] / "testbed"
pytestmark = pytest.mark.slow


@pytest.fixture
def bed() -> Iterator[SlurmBed]:
    if missing := missing_programs():
        pytest.skip(f"a real Slurm needs {', '.join(missing)} (tests/run.sh installs what is missing)")
    with slurm_bed(nodes=2, gpus=1) as made:
        yield made


@pytest.fixture
def cluster(bed: SlurmBed) -> SlurmCluster:
    python = os.environ.get("AGENT_INFRA_VLLM_PYTHON")
    if not python:
        pytest.skip(f"run {TESTBED}/install_vllm_cpu.sh VENV, then export AGENT_INFRA_VLLM_PYTHON=VENV/bin/python")
    slurm = agent_infra.SlurmConfig(
        partitions=(PartitionConfig("low", gpus_per_node=1),),
        work_dir=str(bed.folder / "work"),
        setup=(f"export AGENT_INFRA_PYTHON={python}",),
    )
    config = agent_infra.ClusterConfig(type="slurm", name="c", tunnel="none", poll_interval=1.0, slurm=slurm)
    paths = agent_infra.deployment_paths("c", os.environ)
    return SlurmCluster(config, paths, LocalCommands(bed.environment), bed.environment, print)


def model(folder: Path) -> ModelConfig:
    subprocess.run([os.environ["AGENT_INFRA_VLLM_PYTHON"], TESTBED / "tiny_llama.py", folder], check=True, timeout=300)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    arguments = ("--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "4", "--num-gpu-blocks-override", "256")
    port = free_port()
    return ModelConfig(
        "tiny", str(folder), tensor_parallel_size=2, base_port=port, engine_args=arguments, env=environment
    )


def test_a_vllm_of_two_ranks_answers_and_its_headless_rank_is_gone_after_stop(
    bed: SlurmBed, cluster: SlurmCluster, tmp_path: Path
) -> None:
    cluster.start_replicas(cluster.prepare(model(tmp_path / "tiny")), 1)
    log = Path(cluster.host.run_dir) / "logs" / "tiny-1.log"

    def is_ready() -> bool:
        [record] = cluster.replicas()
        assert record.state != "failed", (record, log.read_text()[-5000:])
        return record.state == "ready"

    wait_for(is_ready, "two ranks", 400)
    assert " ".join(bed.run("squeue", "-h", "-o", "%D %N").split()).startswith("2 ")
    [record] = cluster.replicas()
    request = urllib.request.Request(
        f"http://{record.host}:{record.port}/v1/chat/completions",
        data=json.dumps({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {cluster.replica_key()}"},
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    rank_log = log.with_name("tiny-1.rank1.log").read_text()
    assert "headless" in rank_log.lower()
    cluster.stop(["tiny-1"])
    assert cluster.wait_stopped(["tiny-1"], time.monotonic() + 90) == []
    assert bed.jobs() == []
    assert not is_listening(record.port or 0)
    wait_for(lambda: not processes_naming(str(tmp_path / "tiny")), "the end of both ranks")


def processes_naming(word: str) -> list[str]:
    """Command lines, of living processes, that hold ``word``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command and agent_infra.process_stamp(int(entry.name)):
            found.append(command)
    return found

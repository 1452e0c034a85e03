"""A replica over two nodes of a real Slurm whose other node fails. The engine is a stand-in: only its end matters."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import wait_for
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed, slurm_cluster

from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.protocol import ReplicaFailure
from agent_infra_core.settings import ClusterConfig, ModelConfig, PartitionConfig, SlurmConfig

ENGINE = """\
import os, sys, time
if "--headless" in sys.argv and os.environ.get("RANK_SAYS"):
    sys.exit(os.environ["RANK_SAYS"])
time.sleep(600)
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    require_slurm()
    with slurm_bed(nodes=2, gpus=1) as made:
        yield made


@pytest.fixture
def cluster(bed: SlurmBed, tmp_path: Path) -> SlurmCluster:
    package = tmp_path / "engine" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(ENGINE)
    slurm = SlurmConfig(
        partitions=(PartitionConfig("low", gpus_per_node=1),),
        work_dir=str(bed.folder / "work"),
        setup=(f"export AGENT_INFRA_PYTHON={sys.executable} PYTHONPATH={tmp_path}/engine",),
    )
    config = ClusterConfig(type="slurm", name="r", tunnel="none", poll_interval=0.3, slurm=slurm)
    return slurm_cluster(config, deployment_paths("r", os.environ), bed.environment)


def start(cluster: SlurmCluster, **env: str) -> None:
    model = ModelConfig("m", "org/m", tensor_parallel_size=2, base_port=free_port(), env=env)
    cluster.start_replicas(cluster.prepare(model), 1)


def failure_of(cluster: SlurmCluster) -> ReplicaFailure:
    """Why the replica failed, once its job is over."""
    found = wait_for(lambda: [each for each in cluster.replicas() if each.state == "failed"], "its failure")[0]
    assert cluster.wait_stopped(["m-1"], time.monotonic() + PATIENCE_S) == []
    assert found.failure is not None
    return found.failure


def test_a_rank_that_cannot_start_its_engine_fails_the_replica_with_its_own_words(
    bed: SlurmBed, cluster: SlurmCluster
) -> None:
    words = "ImportError: libgomp.so.1: cannot open shared object file: No such file or directory"
    start(cluster, RANK_SAYS=words)
    failure = failure_of(cluster)
    assert failure.kind == "bad_argument"
    assert failure.line == f"on {bed.nodes[1]}: {words}"
    assert "a library is missing on the node" in failure.hint


def test_a_step_that_was_ended_fails_the_replica_with_slurms_word_and_no_restart(
    bed: SlurmBed, cluster: SlurmCluster
) -> None:
    start(cluster)
    [record] = cluster.replicas()
    wait_for(lambda: f"{record.job_id}.0 " in bed.run("squeue", "-hs", "-o", "%i "), "the step of the other node")
    wait_for(lambda: cluster.replicas()[0].state == "loading", "the head")
    bed.run("scancel", f"{record.job_id}.0")
    failure = failure_of(cluster)
    assert failure.kind == "node_failure"
    assert failure.line.startswith("the step on its other nodes ended with exit code ")
    assert "srun: " in failure.line
    assert ".rank1.log" in failure.hint
    assert " restart 1 of " not in (Path(cluster.host.run_dir) / "logs" / "m-1.log").read_text()

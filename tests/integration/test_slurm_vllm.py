"""A real vLLM over two nodes of a real Slurm, on the CPU; minutes, so only with --slow."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import is_listening, wait_for
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed, slurm_cluster
from testbed.vllm import tiny_model, tiny_weights, vllm_python

from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import process_stamp
from agent_infra_core.settings import ClusterConfig, PartitionConfig, SlurmConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def bed() -> Iterator[SlurmBed]:
    require_slurm()
    with slurm_bed(nodes=2, gpus=1) as made:
        yield made


@pytest.fixture
def cluster(bed: SlurmBed) -> SlurmCluster:
    slurm = SlurmConfig(
        partitions=(PartitionConfig("low", gpus_per_node=1),),
        work_dir=str(bed.folder / "work"),
        setup=(f"export AGENT_INFRA_PYTHON={vllm_python()}",),
    )
    config = ClusterConfig(type="slurm", name="c", tunnel="none", poll_interval=1.0, slurm=slurm)
    paths = deployment_paths("c", os.environ)
    return slurm_cluster(config, paths, bed.environment)


def test_a_vllm_of_two_ranks_answers_and_its_headless_rank_is_gone_after_stop(
    bed: SlurmBed, cluster: SlurmCluster, tmp_path: Path
) -> None:
    model = tiny_model(tiny_weights(tmp_path / "tiny"), tensor_parallel_size=2, base_port=free_port())
    cluster.start_replicas(cluster.prepare(model), 1)
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
    assert cluster.wait_stopped(["tiny-1"], time.monotonic() + PATIENCE_S) == []
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
        if word in command and process_stamp(int(entry.name)):
            found.append(command)
    return found

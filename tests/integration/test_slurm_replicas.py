"""Replicas in jobs of a real Slurm: several in one job, preempted, drained, and what others on the node get of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from node_testbed import STDLIB_ENGINE
from patience import PATIENCE_S
from program import is_listening, wait_for
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed, slurm_cluster
from weights import packaged_gguf

from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import HttpConnection
from agent_infra_core.node.guard import server_identity
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, ModelConfig, PartitionConfig, SlurmConfig
from agent_infra_core.ssh.tunnels import verifies_identity

Make = Callable[..., SlurmCluster]


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    """One node of two GPUs; jobs in low give way to those in high."""
    require_slurm()
    with slurm_bed(nodes=1, gpus=2, cpus=4) as made:
        yield made


@pytest.fixture
def make(bed: SlurmBed) -> Iterator[Make]:
    made: list[SlurmCluster] = []

    def cluster(tunnel: str = "none", **partition: Any) -> SlurmCluster:
        slurm = SlurmConfig(
            partitions=(PartitionConfig("low", gpus_per_node=2, **partition),),
            work_dir=str(bed.folder / "work"),
            setup=(f"export AGENT_INFRA_PYTHON={sys.executable}",),
        )
        config = ClusterConfig(type="slurm", name="c", tunnel=tunnel, poll_interval=0.2, slurm=slurm)
        paths = deployment_paths("c", os.environ)
        made.append(slurm_cluster(config, paths, bed.environment))
        return made[-1]

    yield cluster
    for one in made:
        names = [record.replica for record in one.replicas()]
        one.stop(names, now=True)
        assert one.wait_stopped(names, time.monotonic() + PATIENCE_S) == []
    bed.run("scancel", "--user=root")
    wait_for(lambda: not bed.run("squeue", "-h"), "an empty queue")


def embedded() -> ModelConfig:
    options = ("--threads", "1", "--max-num-seqs", "1")
    return ModelConfig("s", str(packaged_gguf()), engine="llama_cpp", engine_args=options, base_port=free_port())


def server(**changes: Any) -> ModelConfig:
    argv = (sys.executable, str(STDLIB_ENGINE), "{port}")
    return ModelConfig("w", "x", engine="command", command=argv, base_port=free_port(), **changes)


def start(cluster: SlurmCluster, model: ModelConfig, count: int) -> list[ReplicaRecord]:
    return cluster.start_replicas(cluster.prepare(model), count)


def ready(cluster: SlurmCluster, count: int, seconds: float = 60.0) -> list[ReplicaRecord]:
    """The records once ``count`` replicas are ready."""

    def all_ready() -> bool:
        records = cluster.replicas()
        assert not [record for record in records if record.state == "failed"], records
        return sum(record.state == "ready" for record in records) >= count

    wait_for(all_ready, f"{count} ready replicas", seconds)
    return [record for record in cluster.replicas() if record.state == "ready"]


def ask(record: ReplicaRecord, path: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://{record.host}:{record.port}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_job_of_an_exclusive_partition_holds_several_replicas_that_share_out_its_gpus(
    bed: SlurmBed, make: Make
) -> None:
    cluster = make(tunnel="node", exclusive=True)
    started = start(cluster, server(), 2)
    assert [record.replica for record in started] == ["w-1", "w-2"]
    assert len(bed.jobs()) == 1
    records = ready(cluster, 2)
    assert {record.host for record in records} == {"127.0.0.1"}  # it may ask for no key: its node's loopback alone
    answers = [json.loads(ask(record, "/v1/chat/completions", {}, cluster.replica_key())[1]) for record in records]
    assert [(answer["gpus"], answer["is_key_right"]) for answer in answers] == [("0", True), ("1", True)]
    assert len({record.port for record in records}) == 2
    only_the_second_of_them_ends(bed, cluster)


def only_the_second_of_them_ends(bed: SlurmBed, cluster: SlurmCluster) -> None:
    cluster.stop(["w-2"])
    assert cluster.wait_stopped(["w-2"], time.monotonic() + PATIENCE_S) == []
    assert [(record.replica, record.state) for record in cluster.replicas()] == [("w-1", "ready")]
    assert len(bed.jobs()) == 1
    cluster.stop(["w-1"])
    assert cluster.wait_stopped(["w-1"], time.monotonic() + PATIENCE_S) == []
    assert bed.jobs() == []


def test_a_server_that_asks_for_no_key_is_reached_through_a_gate_that_does(make: Make) -> None:
    cluster = make()
    start(cluster, server(), 1)
    [record] = ready(cluster, 1)
    key = cluster.replica_key()
    assert record.is_gated
    assert ask(record, "/v1/chat/completions", {})[0] == 401
    assert ask(record, "/health") == (200, b'{"status": "ok"}')
    assert json.loads(ask(record, "/v1/chat/completions", {}, key)[1])["is_key_right"]
    identity = server_identity(record.replica, record.node, record.port or 0)
    with contextlib.closing(HttpConnection(record.host, record.port or 0)) as gate:
        assert verifies_identity(gate, key, identity)
        assert not verifies_identity(gate, "another-key", identity)


def test_a_preempted_replica_comes_back_as_a_new_one(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    start(cluster, embedded(), 1)
    [first] = ready(cluster, 1)
    urgent = bed.submit("sleep 3", "--partition=high", "--exclusive")
    wait_for(lambda: cluster.replicas()[0].state == "pending", "the requeue")
    waiting = cluster.replicas()[0]
    assert (waiting.job_id, waiting.port) == (first.job_id, None)
    wait_for(lambda: not is_listening(first.port or 0), "the end of the first engine")
    wait_for(lambda: f"{urgent} " not in " ".join(bed.jobs()), "the urgent job's end")
    [second] = ready(cluster, 1)
    assert (second.replica, second.job_id) == (first.replica, first.job_id)
    assert (second.process, second.restarts) != (first.process, first.restarts)
    assert second.started_at > first.started_at
    log = cluster.logs.read("s-1", 0, 1 << 20)[0].decode()
    assert log.count("agent-infra: starting") == 2  # the requeue did not empty it


def test_told_by_slurm_a_replica_lets_its_turn_end(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    start(cluster, embedded(), 1)
    [record] = ready(cluster, 1)
    body = {"model": "s", "max_tokens": 40, "messages": [{"role": "user", "content": "Tell a long story"}]}
    request = urllib.request.Request(
        f"http://{record.host}:{record.port}/v1/chat/completions",
        data=json.dumps({**body, "stream": True, "ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {cluster.replica_key()}"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        answer.read(10)
        bed.run("scancel", "--batch", "--signal=USR1", str(record.job_id))
        assert answer.read().rstrip().endswith(b"[DONE]")
    wait_for(lambda: cluster.replicas()[0].state == "stopped", "the orderly end")
    wait_for(lambda: "JobState=COMPLETED" in bed.run("scontrol", "show", "job", str(record.job_id)), "the job's end")


PATHS = (
    *("/", "/v1/models", "/models", "/metrics", "/slots", "/props", "/v1/chat/completions", "/v1/completions"),
    *("/completion", "/completions", "/chat/completions", "/infill", "/v1/embeddings", "/embedding", "/embeddings"),
    *("/tokenize", "/detokenize", "/apply-template", "/rerank", "/v1/rerank", "/v1/messages", "/v1/responses"),
    *("/lora-adapters", "/invocations", "/load", "/v1/messages/count_tokens", "/api/chat", "/api/show", "/api/tags"),
    *("/tools", "/cors-proxy", "/index.html", "/bundle.js", "/v1/audio/transcriptions", "/models/load", "/exit"),
)


def test_without_the_key_the_embedded_engine_gives_nobody_on_the_node_anything(make: Make) -> None:
    cluster = make()
    start(cluster, embedded(), 1)
    [record] = ready(cluster, 1)
    open_paths = {}
    for path in PATHS:
        for body in (None, {"model": "s", "prompt": "a", "messages": [], "content": "a", "input": "a"}):
            for key in ("", "wrong-key-of-anybody"):
                status, content = ask(record, path, body, key)
                if status not in (401, 404, 405, 501):
                    open_paths[path, body is not None] = status, content[:80]
    assert open_paths == {}
    assert ask(record, "/health")[0] == 200
    assert ask(record, "/v1/models", None, cluster.replica_key())[0] == 200

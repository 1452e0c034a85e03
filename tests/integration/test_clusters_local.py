"""LocalCluster with real processes: a stand-in for `serve` where no engine is needed, the real one where it is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import MODULE, wait_for
from testbed.ports import free_port
from weights import packaged_gguf

import agent_infra
from agent_infra import Deployment
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.local import LocalCluster
from agent_infra_core.fleet.state import DeploymentPaths, deployment_paths, is_alive
from agent_infra_core.host import is_listening, process_stamp
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, Config, ModelConfig

STAND_IN = Path(__file__).parents[1] / "testbed" / "stand_in_serve.py"
MODEL = ModelConfig("m", "anything", engine="command", command=("server", "{port}"))
GPU_MODEL = ModelConfig("g", "org/model", tensor_parallel_size=2)
Make = Callable[..., LocalCluster]


def paths_of(deployment: str) -> DeploymentPaths:
    return deployment_paths(deployment, os.environ)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes clusters in this test's state directory; whatever still runs in them afterwards is ended."""
    made: list[LocalCluster] = []

    def cluster(deployment: str = "d", program: Path = STAND_IN, **environment: str) -> LocalCluster:
        command = [sys.executable, str(program)] + (["serve"] if program == MODULE else [])
        made.append(LocalCluster(paths_of(deployment), command, {**os.environ, **environment}, print))
        return made[-1]

    yield cluster
    for one in made:
        ids = [record.replica for record in one.replicas() if record.node == os.uname().nodename]
        one.stop(ids, now=True)
        assert one.wait_stopped(ids, time.monotonic() + PATIENCE_S) == []


def state_of(cluster: LocalCluster, replica: str) -> str:
    return {record.replica: record.state for record in cluster.replicas()}.get(replica, "unlisted")


def wait_for_state(cluster: LocalCluster, replica: str, state: str) -> ReplicaRecord:
    wait_for(lambda: state_of(cluster, replica) == state)
    return next(record for record in cluster.replicas() if record.replica == replica)


def kill(record: ReplicaRecord) -> None:
    os.kill(record.pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(record))


def write_record(deployment: str, record: ReplicaRecord) -> None:
    paths_of(deployment).record(record.replica).write_text(json.dumps(dataclasses.asdict(record)))


def test_a_replica_is_listed_from_the_moment_that_it_is_started(make: Make) -> None:
    cluster = make()
    started = cluster.start(MODEL)
    assert (started.replica, started.model) == ("m-1", "m")
    assert [record.replica for record in cluster.replicas()] == ["m-1"]
    assert wait_for_state(cluster, "m-1", "ready").pid == started.pid


def test_a_replica_is_deaf_to_the_terminal_that_started_it(make: Make) -> None:
    started = make().start(MODEL)
    assert os.getsid(started.pid) == started.pid
    assert os.readlink(f"/proc/{started.pid}/fd/0") == "/dev/null"


def test_a_stopped_replica_leaves_its_log_and_nothing_else(make: Make) -> None:
    cluster = make()
    started = cluster.start(MODEL)
    wait_for_state(cluster, "m-1", "ready")
    cluster.stop(["m-1"])
    assert cluster.wait_stopped(["m-1"], time.monotonic() + PATIENCE_S) == []
    assert not is_alive(started)
    assert cluster.replicas() == []
    run = paths_of("d").run
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["m-1.log"]


def test_stopping_twice_and_stopping_what_is_not_there_is_no_error(make: Make) -> None:
    cluster = make()
    cluster.start(MODEL)
    for _ in range(2):
        cluster.stop(["m-1", "m-7"])
        assert cluster.wait_stopped(["m-1", "m-7"], time.monotonic() + PATIENCE_S) == []


def test_a_replica_that_does_not_end_is_told_at_the_deadline_and_ended_by_now(make: Make) -> None:
    cluster = make(AGENT_INFRA_TEST_STUBBORN="1")
    cluster.start(MODEL)
    wait_for_state(cluster, "m-1", "ready")
    cluster.stop(["m-1"])
    assert cluster.wait_stopped(["m-1"], time.monotonic() + 0.2) == ["m-1"]
    cluster.stop(["m-1"], now=True)
    assert cluster.wait_stopped(["m-1"], time.monotonic() + PATIENCE_S) == []


def test_another_process_finds_and_stops_the_replicas(make: Make) -> None:
    started = make().start(MODEL)
    program = (
        "import os, sys, time\n"
        "from agent_infra_core.fleet.local import LocalCluster\n"
        "from agent_infra_core.fleet.state import deployment_paths\n"
        "cluster = LocalCluster(deployment_paths('d', os.environ), [], os.environ, print)\n"
        "ids = [record.replica for record in cluster.replicas()]\n"
        "cluster.stop(ids)\n"
        "sys.exit(ids != ['m-1'] or cluster.wait_stopped(ids, time.monotonic() + 20) != [])\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=PATIENCE_S, cwd=Path(agent_infra.__file__).parent
    )
    assert not is_alive(started)


def test_a_killed_replica_is_failed_and_the_next_start_cleans_it_away(make: Make) -> None:
    first = make()
    first.start(MODEL)
    kill(wait_for_state(first, "m-1", "ready"))
    lost = first.replicas()[0]
    assert lost.state == "failed"
    assert lost.failure is not None
    assert lost.failure.kind == "unknown"
    assert "killed" in (lost.message or "")
    assert make().start(MODEL).replica == "m-1"  # another process: the failure is old news


def test_a_replica_that_dies_at_once_is_failed_with_its_last_line(make: Make) -> None:
    cluster = make(AGENT_INFRA_TEST_DIES="1")
    cluster.start(MODEL)
    lost = wait_for_state(cluster, "m-1", "failed")
    assert lost.failure is not None
    assert lost.failure.line == "the engine's last words"


def test_a_failure_is_kept_while_the_process_that_started_it_starts_others(make: Make) -> None:
    cluster = make(AGENT_INFRA_TEST_DIES="1")
    cluster.start(MODEL)
    wait_for_state(cluster, "m-1", "failed")
    assert cluster.start(MODEL).replica == "m-2"
    assert state_of(cluster, "m-1") == "failed"


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's process."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_process_that_merely_has_the_number_is_never_signalled(make: Make, innocent: subprocess.Popen[bytes]) -> None:
    cluster = make()
    stamp = process_stamp(innocent.pid) or ""
    earlier = stamp.rpartition(":")[0] + ":1"
    write_record("d", ReplicaRecord("m-1", "m", "ready", "command", os.uname().nodename, innocent.pid, earlier))
    assert state_of(cluster, "m-1") == "failed"
    cluster.stop(["m-1"], now=True)
    assert cluster.wait_stopped(["m-1"], time.monotonic() + PATIENCE_S) == []
    assert cluster.replicas() == []
    assert innocent.poll() is None


def test_after_a_restart_of_the_machine_a_replica_is_failed_and_cleaned(
    make: Make, innocent: subprocess.Popen[bytes]
) -> None:
    stamp = process_stamp(innocent.pid) or ""
    before = "00000000-0000-0000-0000-000000000000:" + stamp.rpartition(":")[2]
    write_record("d", ReplicaRecord("m-1", "m", "ready", "command", os.uname().nodename, innocent.pid, before))
    cluster = make()
    lost = cluster.replicas()[0]
    assert lost.failure is not None
    assert (lost.state, lost.failure.kind) == ("failed", "node_failure")
    assert cluster.start(MODEL).replica == "m-1"
    assert innocent.poll() is None


def test_a_replica_on_another_machine_is_listed_but_neither_stopped_nor_cleaned(make: Make) -> None:
    write_record("d", ReplicaRecord("m-1", "m", "ready", "command", "elsewhere", 1, "other-boot:1"))
    cluster = make()
    assert cluster.replicas()[0].state == "ready"
    with pytest.raises(RefusedError, match=r"runs on elsewhere.*stop it there"):
        cluster.stop(["m-1"])
    assert cluster.start(MODEL).replica == "m-2"


def test_a_record_that_is_garbage_is_listed_as_failed_and_cleaned(make: Make) -> None:
    cluster = make()
    paths_of("d").record("m-1").write_bytes(b"\xff\x00{")
    assert state_of(cluster, "m-1") == "failed"
    assert cluster.start(MODEL).replica == "m-1"


def test_two_deployments_never_touch_each_other(make: Make) -> None:
    one, other = make("one"), make("other")
    mine, theirs = one.start(MODEL), other.start(MODEL)
    assert mine.replica == theirs.replica == "m-1"
    assert one.replica_key() != other.replica_key()
    wait_for_state(one, "m-1", "ready")
    one.stop(["m-1"])
    assert one.wait_stopped(["m-1"], time.monotonic() + PATIENCE_S) == []
    assert is_alive(theirs)
    assert wait_for_state(other, "m-1", "ready").pid == theirs.pid


def test_concurrent_starts_get_ids_of_their_own(make: Make) -> None:
    clusters = [make() for _ in range(4)]
    started: list[str] = []
    threads = [threading.Thread(target=lambda c=c: started.append(c.start(MODEL).replica)) for c in clusters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
    assert sorted(started) == ["m-1", "m-2", "m-3", "m-4"]


@pytest.fixture
def four_gpus(tmp_path: Path) -> str:
    """A PATH whose nvidia-smi tells of four GPUs."""
    listing = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i}aaa)\\n" for i in range(4))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_gpus_are_handed_out_once_across_deployments_and_come_back(make: Make, four_gpus: str) -> None:
    one, other = make("one", PATH=four_gpus), make("other", PATH=four_gpus)
    assert one.start(GPU_MODEL).gpu_ids == ("0", "1")
    assert other.start(GPU_MODEL).gpu_ids == ("2", "3")
    with pytest.raises(RefusedError, match=r"2 GPU.*0 of 4 free; 0 is held by one/g-1.*3 is held by other/g-1"):
        one.start(GPU_MODEL)
    assert [record.replica for record in one.replicas()] == ["g-1"]
    kill(one.replicas()[0])
    assert other.start(GPU_MODEL).gpu_ids == ("0", "1")


def test_replicas_that_will_not_find_gpus_are_refused_before_the_first_starts(
    make: Make, four_gpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_infra_core.fleet.local.find_engine", lambda *_: "vllm")  # vllm is not installed here
    one, other = make("one", PATH=four_gpus), make("other", PATH=four_gpus)
    one.start(GPU_MODEL)
    two_replicas = dataclasses.replace(GPU_MODEL, replicas=2)
    with pytest.raises(RefusedError, match=r"4 GPU.*2 of 4 free; 0 is held by one/g-1"):
        other.prepare(two_replicas)
    assert one.prepare(two_replicas) == two_replicas  # one of the two is its own and runs already


def test_gpus_are_chosen_within_those_that_the_environment_leaves(make: Make, four_gpus: str) -> None:
    assert make(PATH=four_gpus, CUDA_VISIBLE_DEVICES="3,1").start(GPU_MODEL).gpu_ids == ("3", "1")


def test_a_model_that_names_its_gpus_itself_is_given_none(make: Make, four_gpus: str) -> None:
    model = dataclasses.replace(GPU_MODEL, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert make(PATH=four_gpus).start(model).gpu_ids == ()


def test_without_gpus_on_the_machine_the_variable_is_left_alone(make: Make, tmp_path: Path) -> None:
    assert make(PATH=str(tmp_path)).start(GPU_MODEL).gpu_ids == ()


def test_an_engine_that_is_not_installed_is_refused_before_anything_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RefusedError, match=r"vllm is not installed.*pip install vllm"):
        make().prepare(GPU_MODEL)


def embedded() -> ModelConfig:
    options = ("--threads", "1", "--max-num-seqs", "1")
    return ModelConfig("s", str(packaged_gguf()), engine="llama_cpp", engine_args=options, base_port=free_port())


@pytest.mark.parametrize("now", [False, True])
def test_the_embedded_engine_is_gone_when_its_replica_is_stopped(make: Make, now: bool) -> None:
    cluster = make(program=MODULE)
    cluster.start(cluster.prepare(embedded()))
    ready = wait_for_state(cluster, "s-1", "ready")
    assert ready.port is not None
    assert is_listening(ready.host, ready.port)
    cluster.stop(["s-1"], now=now)
    assert cluster.wait_stopped(["s-1"], time.monotonic() + PATIENCE_S) == []
    assert not is_listening(ready.host, ready.port)
    assert not is_alive(ready)
    assert cluster.replicas() == []


def test_a_start_that_fails_on_the_way_leaves_nothing_that_it_started(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make()
    ordinary = LocalCluster.start

    def start(self: LocalCluster, model: ModelConfig) -> ReplicaRecord:
        if model.name == "second":
            raise RefusedError("no process is to be had")
        return ordinary(self, model)

    monkeypatch.setattr(LocalCluster, "start", start)
    second = dataclasses.replace(MODEL, name="second")
    config = Config(models=(MODEL, second), cluster=ClusterConfig(name="d"))
    deployment = Deployment(config, print, os.environ)
    monkeypatch.setattr(deployment, "cluster", cluster)
    monkeypatch.setattr(LocalCluster, "prepare", lambda _, model: model)
    with pytest.raises(RefusedError, match="no process"):
        deployment.start(deployment.select_models())
    wait_for(lambda: all(not is_alive(record) for record in cluster.replicas()))

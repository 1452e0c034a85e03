"""The real `serve`, over the embedded engine and over a server of the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_testbed import KEY, PYTHONS, STDLIB_ENGINE, Served, children, engine_pids
from patience import PATIENCE_S
from program import wait_for
from testbed.ports import free_port
from weights import packaged_gguf

import agent_infra_core.node.replica as replica_module
from agent_infra_core.errors import RefusedError
from agent_infra_core.host import HttpConnection, http_get, process_stamp
from agent_infra_core.node.guard import answer_challenge, server_identity
from agent_infra_core.node.process import reserve_port
from agent_infra_core.protocol import ReplicaFailure, ReplicaRecord
from agent_infra_core.settings import ModelConfig
from agent_infra_core.ssh.tunnels import verifies_identity

Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts `serve` in a directory of its own; at the end none of its processes may be left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started: list[Served] = []

    def start(model: ModelConfig, **options: Any) -> Served:
        started.append(Served(tmp_path / f"run{len(started)}", model, **options))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def gguf() -> str:
    """The packaged model's weights."""
    return str(packaged_gguf())


def command_model(port: int, *, python: str = sys.executable, **env: str) -> ModelConfig:
    """A model served by the standard library's server; its base_port is free now."""
    command = (python, str(STDLIB_ENGINE), "{port}")
    return ModelConfig("chat", "none", engine="command", command=command, base_port=port, env=env)


def llama_model(gguf: str, port: int, **keys: Any) -> ModelConfig:
    return ModelConfig("smollm2", gguf, engine="llama_cpp", base_port=port, **keys)


@pytest.fixture
def port() -> int:
    """A port from which on some are free."""
    return free_port()


def chat(tokens: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Count from one upwards, with a sentence on each number."}]
    return {"model": "smollm2", "messages": messages, "max_tokens": tokens, "temperature": 0, **options}


def is_gone(pid: int) -> bool:
    return process_stamp(pid) is None


def test_the_embedded_engine_answers_a_chat_and_tells_its_load(serve: Serve, gguf: str, port: int) -> None:
    served = serve(llama_model(gguf, port, engine_args=("--max-num-seqs", "2")))
    record = served.wait_for_state("ready")
    assert (record.engine, record.slots, record.process) == ("llama_cpp", 2, process_stamp(served.process.pid))
    answer = served.request("/v1/chat/completions", chat(8))
    assert answer["choices"][0]["message"]["content"]
    load = wait_for(lambda: told if (told := served.load())["running"] == 0 and told["generation_tokens"] else None)
    assert load is not None
    assert (load["state"], load["slots"], load["running"], load["waiting"]) == ("ready", 2, 0, 0)
    assert load["generation_tokens"] == answer["usage"]["completion_tokens"] == 8
    assert load["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_on_a_node_that_only_has_ipv6_engine_and_telemetry_listen_there(serve: Serve, gguf: str, port: int) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("needs IPv6")
    served = serve(llama_model(gguf, port), environment={"AGENT_INFRA_ADDRESS": "::1"}, bind_host="0.0.0.0")
    record = served.wait_for_state("ready")
    assert (record.host, record.address) == ("::1", "::1")
    assert record.port is not None
    assert record.telemetry_port is not None
    assert http_get("::1", record.port, "/health", timeout_s=PATIENCE_S)[0] == 200
    with contextlib.closing(HttpConnection("::1", record.telemetry_port, PATIENCE_S)) as telemetry:
        name = server_identity(record.replica, record.node, record.telemetry_port)
        assert verifies_identity(telemetry, KEY, name, record.port)


def test_a_full_embedded_engine_still_answers_its_health_probe(serve: Serve, gguf: str, port: int) -> None:
    """Each waiting turn holds a thread of llama.cpp's HTTP server; its own default would leave none."""
    served = serve(llama_model(gguf, port, engine_args=("--max-num-seqs", "2")))
    record = served.wait_for_state("ready")
    assert record.port is not None
    connections = [http.client.HTTPConnection("127.0.0.1", record.port, timeout=PATIENCE_S) for _ in range(40)]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", json.dumps(chat(1500, ignore_eos=True)), headers)
    wait_for(lambda: served.load()["waiting"] == 38)
    assert http_get("127.0.0.1", record.port, "/health", timeout_s=20.0)[0] == 200
    for connection in connections:
        connection.close()


def test_load_needs_the_key_and_the_challenge_does_not(serve: Serve, port: int) -> None:
    served = serve(command_model(port))
    record = served.wait_for_state("ready")
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        served.load(key="wrong")
    refused.value.close()
    nonce = "0123456789abcdef"
    answer = served.request(f"/agent-infra/challenge?nonce={nonce}", port=record.telemetry_port, key="")
    identity = f"{record.replica}@{record.node}:{record.telemetry_port}"
    assert answer == {"answer": answer_challenge(KEY, f"{nonce}:{identity}")}


def test_proxies_of_the_environment_are_not_asked_for_health(serve: Serve, port: int) -> None:
    nowhere = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": ""}
    serve(command_model(port), environment=nowhere).wait_for_state("ready")


def test_the_key_reaches_the_engine_and_stands_in_no_log_and_no_command_line(serve: Serve, port: int) -> None:
    served = serve(command_model(port))
    served.wait_for_state("ready")
    assert served.request("/v1/chat/completions", {})["is_key_right"]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in engine_pids(served.directory)]
    assert not any(KEY.encode() in command for command in commands)
    assert KEY not in served.log


def test_a_busy_port_moves_on_and_two_replicas_never_share_one(serve: Serve, port: int) -> None:
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", port))
        busy.listen()
        replicas = [serve(command_model(port), replica=f"replica-{index}") for index in range(3)]
        ports = {replica.wait_for_state("ready").port for replica in replicas}
    assert len(ports) == 3
    assert port not in ports


def test_a_killed_engine_is_started_again_and_the_record_tells_it(serve: Serve, gguf: str, port: int) -> None:
    served = serve(llama_model(gguf, port), restart_backoff=0.05)
    served.wait_for_state("ready")
    (engine,) = engine_pids(served.directory)
    os.kill(engine, signal.SIGKILL)
    restarting = served.wait_for_record(lambda record: record.failure is not None)
    assert restarting.failure is not None
    assert (restarting.failure.kind, restarting.failure.line) == ("unknown", "ended by signal 9")
    record = served.wait_for_record(lambda record: record.restarts == 1 and record.state == "ready")
    assert record.failure is None
    assert served.request("/v1/chat/completions", chat(4))["choices"]


def failed(served: Served) -> tuple[ReplicaRecord, ReplicaFailure]:
    """The last record of a `serve` that gives up, and the failure in it."""
    assert served.process.wait(PATIENCE_S) == 1
    record = served.record
    assert record is not None
    assert record.failure is not None
    return record, record.failure


def test_an_engine_that_always_crashes_fails_after_three_restarts(serve: Serve, port: int) -> None:
    served = serve(command_model(port, FAIL_WITH="CUDA out of memory"), restart_backoff=0.001)
    record, failure = failed(served)
    assert (record.state, record.restarts, record.port) == ("failed", 3, None)
    assert (failure.kind, failure.line) == ("out_of_memory", "CUDA out of memory")


def test_what_a_restart_cannot_mend_fails_at_once(serve: Serve, tmp_path: Path, port: int) -> None:
    text = tmp_path / "weights.gguf"
    text.write_text("not weights")
    served = serve(llama_model(str(text), port))
    record, failure = failed(served)
    assert (failure.kind, record.restarts) == ("model_not_found", 0)
    assert failure.line.endswith(f"{text} is not a GGUF file")


def test_a_program_that_does_not_exist_is_a_bad_argument(serve: Serve, port: int) -> None:
    model = ModelConfig("chat", "none", engine="command", command=("/no/such/server", "{port}"), base_port=port)
    _, failure = failed(serve(model))
    assert failure.kind == "bad_argument"
    assert "/no/such/server cannot be started" in failure.line


def test_a_log_that_reads_like_a_failure_fails_no_engine_that_answers(serve: Serve, port: int) -> None:
    served = serve(command_model(port))
    served.wait_for_state("ready")
    with open(served.directory / "logs" / "replica-0.log", "a") as log:
        log.write("CUDA out of memory\n")
    assert served.request("/v1/chat/completions", {})
    record = served.record
    assert record is not None
    assert (record.state, record.failure) == ("ready", None)


def test_an_engine_that_is_not_ready_in_time_fails_as_timed_out(serve: Serve, port: int) -> None:
    served = serve(command_model(port, LOADING_S="600"), load_timeout=0.3)
    record, failure = failed(served)
    assert (failure.kind, record.restarts) == ("timed_out", 0)


def test_a_hung_engine_is_killed_and_started_again(serve: Serve, port: int) -> None:
    served = serve(command_model(port), hang_timeout=0.5, restart_backoff=0.05)
    served.wait_for_state("ready")
    (engine,) = engine_pids(served.directory)
    served.request("/behave/hang", {})
    served.wait_for_record(lambda record: record.restarts > 0 and record.state == "ready")
    wait_for(lambda: is_gone(engine))


def test_a_port_lost_to_another_server_is_left_for_the_next(serve: Serve, port: int) -> None:
    """The engine says that its address is in use; `serve` does not try the same port again."""
    failing = f"import sys\nif sys.argv[1] == '{port}': sys.exit('OSError: [Errno 98] Address already in use')\n"
    failing += f"exec(open({str(STDLIB_ENGINE)!r}).read())"
    model = ModelConfig("c", "n", engine="command", command=(sys.executable, "-c", failing, "{port}"), base_port=port)
    record = serve(model, restart_backoff=0.001).wait_for_state("ready")
    assert record.port is not None
    assert record.port > port


def test_a_shared_file_system_that_fails_for_a_moment_ends_no_engine(serve: Serve, port: int, tmp_path: Path) -> None:
    library, flag = tmp_path / "stale_files.so", tmp_path / "stale"
    source = Path(__file__).parents[1] / "testbed" / "stale_files.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=PATIENCE_S)
    run = tmp_path / "run0"
    environment = {"LD_PRELOAD": str(library), "STALE_BELOW": str(run), "STALE_WHILE": str(flag)}
    served = serve(command_model(port), environment=environment, hang_timeout=4.0)
    first = served.wait_for_state("ready")
    pid = served.request("/v1/chat/completions", {})["pid"]
    flag.touch()
    time.sleep(2.0)  # it looks at its record once a second
    flag.unlink()
    assert served.request("/v1/chat/completions", {})["pid"] == pid
    assert served.record == first
    assert served.stop() == 0


def test_when_serve_is_killed_its_engine_and_its_watcher_die(serve: Serve, port: int) -> None:
    served = serve(command_model(port, WITH_HELPER="1"))
    served.wait_for_state("ready")
    processes = wait_for(
        lambda: [pid for pid in engine_pids(served.directory) if len(engine_pids(served.directory)) > 1]
    )
    watchers = [pid for pid in children(served.process.pid) if pid not in processes]
    assert len(watchers) == 1
    served.process.kill()
    served.process.wait(PATIENCE_S)
    for pid in [*processes, *watchers]:
        wait_for(lambda pid=pid: is_gone(pid), "its end")  # type: ignore[misc]


def test_when_serve_is_killed_while_it_starts_nothing_is_left(serve: Serve, port: int) -> None:
    for replica in range(8):
        served = serve(command_model(port, LOADING_S="600"), replica=f"replica-{replica}")
        path = served.directory / "replicas" / f"replica-{replica}.json"
        wait_for(path.exists)
        os.kill(served.process.pid, signal.SIGKILL)
        served.close()


def test_stopping_lets_a_running_stream_finish(serve: Serve, gguf: str, port: int) -> None:
    served = serve(llama_model(gguf, port))
    record = served.wait_for_state("ready")
    connection = http.client.HTTPConnection("127.0.0.1", record.port, timeout=PATIENCE_S)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        body = json.dumps(chat(120, stream=True, ignore_eos=True))
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        first = answer.readline()
        (engine,) = engine_pids(served.directory)
        os.kill(engine, signal.SIGSTOP)  # so that the turn is still open when its replica is to end
        served.process.send_signal(signal.SIGTERM)
        served.wait_for_state("draining")
        os.kill(engine, signal.SIGCONT)
        text = (first + answer.read()).decode()
    assert text.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in text
    assert served.process.wait(PATIENCE_S) == 0
    assert served.record is not None
    assert served.record.state == "stopped"


def test_a_second_signal_ends_at_once(serve: Serve, gguf: str, port: int) -> None:
    served = serve(llama_model(gguf, port), stop_grace=600.0)
    record = served.wait_for_state("ready")
    body = chat(2000, ignore_eos=True)
    cut: list[BaseException] = []

    def talk() -> None:
        try:
            served.request("/v1/chat/completions", body, port=record.port, timeout=120)
        except (OSError, http.client.HTTPException) as error:
            cut.append(error)

    turn = threading.Thread(target=talk)
    turn.start()
    wait_for(lambda: served.load()["running"] == 1)
    served.process.send_signal(signal.SIGUSR1)
    served.wait_for_state("draining")
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: served.load()["running"] == 1)
    assert served.stop(deadline_s=30) == 0
    turn.join(PATIENCE_S)
    assert cut


def test_stopping_ends_what_the_engine_leaves_in_its_group(serve: Serve, port: int) -> None:
    served = serve(command_model(port, WITH_HELPER="1"))
    served.wait_for_state("ready")
    assert served.stop() == 0
    wait_for(lambda: not engine_pids(served.directory), "the end of the engines")


def test_stopping_while_it_loads_stops_at_once(serve: Serve, port: int) -> None:
    served = serve(command_model(port, LOADING_S="600"), stop_grace=600.0)
    served.wait_for_state("loading")
    assert served.stop(deadline_s=30) == 0
    assert served.record is not None
    assert served.record.state == "stopped"


@pytest.mark.parametrize("python", PYTHONS)
def test_serve_needs_the_standard_library_alone(serve: Serve, port: int, python: str) -> None:
    served = serve(command_model(port, python=python), python=(python, "-I", "-S"))
    served.wait_for_state("ready")
    assert served.request("/v1/chat/completions", {})["argv"] == [str(port)]
    assert served.load()["gpus"] == []
    assert served.stop() == 0


def test_no_key_and_no_specification_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="start the replica again"):
        replica_module.serve(str(tmp_path), "replica-0")


def test_a_reserved_port_is_not_given_out_again_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = reserve_port(port)
    second = reserve_port(port)
    assert first is not None
    assert second is not None
    assert first.port < second.port
    first.close()
    third = reserve_port(port)
    assert third is not None
    assert third.port == first.port
    second.close()
    third.close()
    (directory,) = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.fixture(scope="session")
def nvml_stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a libnvidia-ml.so.1 for the real bindings."""
    pytest.importorskip("pynvml")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parents[1] / "testbed" / "nvml_stub.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True, timeout=PATIENCE_S
    )
    return str(folder)


def sampled(serve: Serve, port: int, environment: dict[str, str], **spec: Any) -> list[dict[str, Any]]:
    """The GPUs that /load shows with an environment."""
    served = serve(command_model(port), environment=environment, **spec)
    served.wait_for_state("ready")
    gpus: list[dict[str, Any]] = served.load()["gpus"]
    return gpus


def test_gpus_are_sampled_through_the_real_bindings(serve: Serve, port: int, nvml_stub: str) -> None:
    gpus = sampled(serve, port, {"LD_LIBRARY_PATH": nvml_stub})
    assert [gpu["name"] for gpu in gpus] == ["Stub H100 0", "Stub H100 1"]
    assert gpus[1] == {
        "name": "Stub H100 1",
        "utilization": 42.0,
        "memory_used": 2 << 30,
        "memory_total": 80 << 30,
        "power_w": 350.5,
        "temperature_c": 55,
    }


@pytest.mark.parametrize(
    ("environment", "gpu_ids", "names"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, (), ["Stub H100 1"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ("GPU-stub-1",), ["Stub H100 1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, (), []),
        ({"CUDA_VISIBLE_DEVICES": "7"}, (), []),
        ({"CUDA_VISIBLE_DEVICES": "MIG-stub-0", "NVML_STUB": "mig"}, (), ["Stub H100 MIG 0"]),
        ({"NVML_STUB": "broken"}, (), []),
    ],
)
def test_only_the_gpus_of_a_replica_are_shown(
    serve: Serve, port: int, nvml_stub: str, environment: dict[str, str], gpu_ids: tuple[str, ...], names: list[str]
) -> None:
    gpus = sampled(serve, port, {"LD_LIBRARY_PATH": nvml_stub, **environment}, gpu_ids=gpu_ids)
    assert [gpu["name"] for gpu in gpus] == names


def test_a_gpu_cut_by_mig_tells_memory_and_no_utilisation(serve: Serve, port: int, nvml_stub: str) -> None:
    gpus = sampled(serve, port, {"LD_LIBRARY_PATH": nvml_stub, "NVML_STUB": "mig"})
    assert [gpu["name"] for gpu in gpus] == ["Stub H100 0", "Stub H100 MIG 0", "Stub H100 MIG 1"]
    assert gpus[2]["memory_total"] == 10 << 30
    assert gpus[2]["utilization"] is None


def test_the_gpus_handed_out_are_the_engines_own(serve: Serve, port: int) -> None:
    served = serve(command_model(port), gpu_ids=("3", "1"))
    record = served.wait_for_state("ready")
    assert record.gpu_ids == ("3", "1")
    assert served.request("/v1/chat/completions", {})["gpus"] == "3,1"

"""`serve` over a real vLLM on CPU; minutes, so only with --slow."""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_testbed import KEY, Served, engine_pids
from patience import PATIENCE_S
from program import wait_for
from testbed.vllm import tiny_model, tiny_weights, vllm_python

from agent_infra_core.host import process_stamp
from agent_infra_core.settings import ModelConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_weights(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def served(weights: str, tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, tiny_model(weights, base_port=5980), python=(vllm_python(),))
    yield served
    served.close()


def session_of(pid: int) -> list[int]:
    """The living processes of the session that ``pid`` leads: vLLM's children hide their environment."""
    listed = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [other for other in listed if process_stamp(other) and _session(other) == pid]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def open_chat(port: int | None, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    messages = [{"role": "user", "content": "Tell me everything."}]
    document = {"model": "tiny", "messages": messages, "temperature": 0, "ignore_eos": True, **body}
    connection.request("POST", "/v1/chat/completions", json.dumps(document), headers)
    return connection, connection.getresponse()


def test_vllm_serves_guarded_tells_its_load_and_finishes_its_turns_before_it_ends(served: Served) -> None:
    record = served.wait_for_state("ready", 300)
    assert record.slots == 4
    for path in ("/invocations", "/metrics", "/tokenize", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            served.request(path, key="wrong")
        refused.value.close()
    first = served.request("/v1/models")
    assert first["data"][0]["id"] == "tiny"
    load = served.load()
    assert (load["running"], load["is_sleeping"]) == (0, False)
    assert load["kv_capacity_tokens"] > 0
    leader = min(engine_pids(served.directory))
    assert len(session_of(leader)) > 1
    connection, answer = open_chat(record.port, {"stream": True, "max_tokens": 1500})
    text = answer.readline()
    served.process.send_signal(signal.SIGTERM)
    served.wait_for_state("draining")
    text += answer.read()
    connection.close()
    assert b'"finish_reason":"length"' in text
    assert b'"usage":{' in text  # without being asked for
    assert served.process.wait(PATIENCE_S) == 0
    wait_for(lambda: not session_of(leader), "the end of vLLM")


def test_when_serve_is_killed_no_process_of_vllm_is_left(served: Served) -> None:
    served.wait_for_state("ready", 300)
    leader = min(engine_pids(served.directory))
    assert len(session_of(leader)) > 1
    served.process.kill()
    wait_for(lambda: not session_of(leader), "the end of vLLM")


def test_an_option_that_vllm_does_not_know_is_a_bad_argument(weights: str, tmp_path: Path) -> None:
    model = ModelConfig("tiny", weights, base_port=5980, engine_args=("--no-such-option",))
    served = Served(tmp_path, model, python=(vllm_python(),))
    assert served.process.wait(200) == 1
    record = served.record
    assert record is not None
    assert record.failure is not None
    assert (record.failure.kind, record.restarts) == ("bad_argument", 0)
    assert "--no-such-option" in record.failure.line

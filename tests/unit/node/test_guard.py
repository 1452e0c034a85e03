"""Node: the guard before vLLM, the records on disk, and which GPUs a replica may use."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
from typing import Any

import pytest

from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.node.gpus import sampled_gpus
from agent_infra_core.node.guard import EngineGuard, answer_challenge
from agent_infra_core.protocol import (
    GpuSample,
    ReplicaFailure,
    ReplicaRecord,
    record_from_json,
    spec_from_json,
)
from agent_infra_core.settings import ModelConfig

KEY = "the-replica-key"
NONCE = "00112233445566778899aabbccddeeff"


async def inner_app(scope: dict[str, Any], _: Any, send: Any) -> None:
    """What stands behind the guard."""
    await send({"type": "reached", "path": scope.get("path")})


def ask(path: str, headers: dict[str, str] | None = None, **scope: Any) -> list[dict[str, Any]]:
    """The messages that a guarded app sends for one request."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    full = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": listed, **scope}
    asyncio.run(EngineGuard(inner_app)(full, receive, send))
    return sent


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def test_the_health_path_is_open() -> None:
    assert ask("/health") == [{"type": "reached", "path": "/health"}]


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/metrics", "/tokenize", "/health/", "//health", "/"])
def test_every_other_path_needs_the_key(path: str) -> None:
    start, body = ask(path)
    assert start["status"] == 401
    error = json.loads(body["body"])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert ask(path, {"Authorization": f"Bearer {KEY}"}) == [{"type": "reached", "path": path}]


@pytest.mark.parametrize("sent", ["", "Bearer ", "Bearer wrong", KEY, f"Basic {KEY}", "Bearer \xff", f"Bearer {KEY}x"])
def test_a_wrong_key_is_refused(sent: str) -> None:
    assert ask("/v1/models", {"Authorization": sent})[0]["status"] == 401


def test_without_a_key_in_its_environment_the_guard_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert ask("/v1/models", {"Authorization": "Bearer "})[0]["status"] == 401
    assert ask("/agent-infra/challenge", query_string=f"nonce={NONCE}".encode())[0]["status"] == 401


def test_a_challenge_is_answered_with_the_keyed_hash_and_without_being_sent_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGENT_INFRA_IDENTITY", "m-1@n1:5900")
    start, body = ask("/agent-infra/challenge", query_string=f"nonce={NONCE}".encode())
    expected = hmac.new(KEY.encode(), f"{NONCE}:m-1@n1:5900".encode(), hashlib.sha256).hexdigest()
    assert start["status"] == 200
    assert json.loads(body["body"]) == {"answer": expected}
    assert answer_challenge(KEY, f"{NONCE}:m-1@n1:5900") == expected


@pytest.mark.parametrize("query", [b"", b"nonce=", b"nonce=zz", b"nonce=0011", b"nonce=" + b"a" * 129, b"\xff"])
def test_a_malformed_challenge_is_a_bad_request(query: bytes) -> None:
    assert ask("/agent-infra/challenge", query_string=query)[0]["status"] == 400


def test_a_websocket_without_the_key_is_closed() -> None:
    assert ask("/v1/realtime", type="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_lifespan_passes_the_guard() -> None:
    assert ask("", type="lifespan") == [{"type": "reached", "path": ""}]


def test_a_record_survives_its_json() -> None:
    record = ReplicaRecord(
        replica="r",
        model="m",
        state="failed",
        engine="vllm",
        node="n",
        pid=1,
        process="p",
        failure=ReplicaFailure("offline", "line", "hint"),
        gpus=(GpuSample("H100", None, 1, 2, 3.0, None),),
        gpu_ids=("0", "1"),
    )
    assert record_from_json(json.dumps(dataclasses.asdict(record))) == record


def test_a_record_of_a_newer_version_is_read_without_what_it_adds() -> None:
    values = {"replica": "r", "model": "m", "state": "ready", "engine": "vllm", "node": "n", "pid": 1, "process": "p"}
    assert record_from_json(json.dumps({**values, "novelty": 1})).state == "ready"


@pytest.mark.parametrize("text", ["", "[]", "null", '{"replica": "r"}', "{"])
def test_what_is_no_record_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        record_from_json(text)


def test_a_specification_survives_its_json() -> None:
    model = ModelConfig("m", "p", engine_args=("--x", "1"), command=("a", "{port}"), env={"A": "b"}, max_model_len=5)
    spec = serve_spec("r", model, "/run", "/key", gpu_ids=("GPU-1",), stop_grace=3.0)
    assert spec_from_json(json.dumps(dataclasses.asdict(spec))) == spec


@pytest.mark.parametrize(
    ("engine", "gpu_ids", "environment", "expected"),
    [
        ("vllm", ("2",), {"CUDA_VISIBLE_DEVICES": "0,1"}, ("2",)),
        ("vllm", (), {"CUDA_VISIBLE_DEVICES": "0, GPU-x"}, ("0", "GPU-x")),
        ("vllm", (), {"CUDA_VISIBLE_DEVICES": ""}, ()),
        ("vllm", (), {}, None),
        ("llama_cpp", (), {}, ()),
    ],
)
def test_only_the_gpus_that_were_handed_out_are_sampled(
    engine: str, gpu_ids: tuple[str, ...], environment: dict[str, str], expected: tuple[str, ...] | None
) -> None:
    spec = serve_spec("r", ModelConfig("m", "p", engine=engine), "/run", "/key", gpu_ids=gpu_ids)
    assert sampled_gpus(spec, environment) == expected

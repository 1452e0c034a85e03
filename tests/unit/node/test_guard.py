"""Node: the guard before vLLM, the records on disk, and which GPUs a replica may use."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from typing import Any

import pytest

from agent_infra_core.node.guard import EngineGuard, answer_challenge

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

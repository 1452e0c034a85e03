"""Requires the key on every path of an engine, and answers the challenge that proves who listens on a port."""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from agent_infra_core.host import is_only_ours

CHALLENGE_PATH = "/agent-infra/challenge"


def answer_challenge(key: str, nonce: str) -> str:
    """Return the HMAC-SHA256 of ``nonce`` with ``key``, in hexadecimal, which proves knowledge of the key."""
    return hmac.new(key.encode(), nonce.encode(), "sha256").hexdigest()


def server_identity(replica: str, node: str, port: int) -> str:
    """Return the identity in a challenge's answer; unique to a server, so that no other can answer in its place."""
    return f"{replica}@{node}:{port}"


def challenge_reply(key: str, identity: str, query: str) -> tuple[int, bytes]:
    """Return status and JSON body for ``GET /agent-infra/challenge?nonce=HEX``: the answer to ``HEX:identity``.

    With ``&port=N`` the answer (to ``HEX:identity:N``) also confirms that only this user or root listens on port N.
    """
    match = re.fullmatch(r"nonce=([0-9a-fA-F]{16,128})(?:&port=(\d{1,5}))?", query)
    if match is None:
        return 400, error_body("nonce must be 16 to 128 hexadecimal digits", "invalid_request_error", None)
    nonce = f"{match[1]}:{identity}"
    if match[2]:
        if not is_only_ours(int(match[2])):
            return 409, error_body("another user listens there", "invalid_request_error", "foreign_server")
        nonce += f":{match[2]}"
    return 200, json.dumps({"answer": answer_challenge(key, nonce)}).encode()


def error_body(message: str, kind: str, code: str | None) -> bytes:
    """Return the body of an error in the format of OpenAI's API."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def carries_key(authorization: str, key: str) -> bool:
    """Whether an Authorization header has ``key`` as its bearer token, in constant time; False if ``key`` is empty."""
    scheme, _, token = authorization.partition(" ")
    matches = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
    return bool(key) and scheme.lower() == "bearer" and matches


KEY_NEEDED = error_body("the replica's key is needed", "authentication_error", "invalid_api_key")


class EngineGuard:
    """ASGI middleware for vLLM: requires the key on every path but /health, and answers the keyed challenge.

    vLLM itself protects only /v1; anybody on the node could run inference through /invocations and other paths.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._identity = os.environ.get("AGENT_INFRA_IDENTITY", "")

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health")
        if is_open or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, body = 401, KEY_NEEDED
            if scope["path"] == CHALLENGE_PATH and scope["method"] == "GET" and self._key:
                status, body = challenge_reply(self._key, self._identity, scope["query_string"].decode("latin-1"))
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_allowed(self, scope: Mapping[str, Any]) -> bool:
        if scope["type"] == "http" and scope["path"] == CHALLENGE_PATH:
            return False
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(sent) == 1 and carries_key(sent[0].decode("latin-1"), self._key)

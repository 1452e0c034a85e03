"""Checks a client's key; programs of the same user on this machine need none."""

from __future__ import annotations

import dataclasses
import hmac
import re
import secrets
from collections.abc import Mapping

from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.heads import RequestHead
from agent_infra_core.protocol import Backend
from agent_infra_core.relay.connection import ClientConnection, descriptor_trouble
from agent_infra_core.settings import ProxyConfig


def is_same_endpoint(one: Backend, other: Backend) -> bool:
    """Whether two rows lead to the same server, whose connections and health then carry over."""
    same = dataclasses.replace(one, state=other.state, slots=other.slots, node=other.node, ends_at=other.ends_at)
    return same == other


_LOCAL_HOST = re.compile(rb"(?:[^.:\[\]]+|127(?:\.\d+){3}|\[::1\])(?::\d+)?|[^:]+\.localhost(?::\d+)?", re.IGNORECASE)
_EXPOSED = b"x-request-id, x-agent-infra-backend, x-agent-infra-queue-ms, retry-after"
MAX_KNOWN_HOSTS = 100


class AccessControl:
    """Lets this user's own programs pass, and everybody who has the key.

    A browser runs as the user, too, and does what web pages say. So without a key a request must not come from a page
    of another site: browsers name it in Origin and Sec-Fetch-Site, or name this proxy by a domain of theirs in Host
    (DNS rebinding).
    """

    def __init__(self) -> None:
        self.configure(ProxyConfig())

    def configure(self, settings: ProxyConfig) -> None:
        """Follow these settings. Without a key in them, nobody has it."""
        self._key = (settings.api_key or secrets.token_hex(16)).encode()
        self._requires_key = settings.require_key
        self._origins = frozenset(origin.rstrip("/").encode() for origin in settings.cors_origins)
        self._host = settings.host.encode()
        self._known_hosts: set[bytes | None] = {None}  # that were found to be this machine's

    def authorize(self, client: ClientConnection, request: RequestHead, authorization: bytes) -> None:
        """Let the client pass if it is this user (or root) on this machine, or sends the key; else RequestError 401, or
        403 for what a web page does in the user's name."""
        try:
            client.find_owner()
        except OSError as trouble:
            message = f"who calls cannot be told: {descriptor_trouble(trouble)}"
            raise RequestError(503, message, retry_after_s=1) from None
        reason = self._foreign_reason(request.fields) if client.is_trusted else None
        if (not client.is_trusted or reason or self._requires_key) and not self._has_key(request, authorization):
            if reason:
                raise RequestError(403, f"{reason}; send the key, or see proxy.cors_origins", code="foreign_site")
            message = "a key is needed: send the proxy's key as Authorization: Bearer"
            raise RequestError(401, message, code="invalid_api_key")
        # A request that passed by another header says nothing about the next one.
        client.authorization = authorization if b"x-api-key" not in request.fields else None
        client.is_known = True

    def _has_key(self, request: RequestHead, authorization: bytes) -> bool:
        scheme, _, sent = authorization.partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else request.fields.get(b"x-api-key", b"").strip()
        return hmac.compare_digest(sent, self._key)

    def _foreign_reason(self, fields: Mapping[bytes, bytes]) -> str | None:
        """Why a request may be a web page's that isn't allowed to call the API; None if it is not."""
        host, origin = fields.get(b"host"), fields.get(b"origin")
        if host not in self._known_hosts:
            name = host.rpartition(b":")[0] if host and re.search(rb":\d+\Z", host) else host
            if name != self._host and not _LOCAL_HOST.fullmatch(host or b""):
                return "the Host header names neither this machine nor proxy.host"
            if len(self._known_hosts) < MAX_KNOWN_HOSTS:
                self._known_hosts.add(host)
        if origin is not None and origin not in self._origins and origin != b"http://%b" % (host or b""):
            return "a web page of another site calls without the key"
        if origin is None and fields.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            return "a web page of another site calls without the key"
        return None

    def cors_fields(self, request: RequestHead) -> bytes:
        """Header lines that let an allowed page read the answer; none for all others."""
        origin = request.fields.get(b"origin")
        if origin is None or origin not in self._origins:
            return b""
        lines = b"access-control-allow-origin: %b\r\nvary: origin\r\naccess-control-expose-headers: %b\r\n"
        return lines % (origin, _EXPOSED)

    def preflight(self, request: RequestHead) -> bytes | None:
        """The answer to a browser that asks whether an allowed page may send a request; None if this is no question."""
        wanted = request.fields.get(b"access-control-request-method")
        allowed = self.cors_fields(request)
        if request.method != b"OPTIONS" or wanted is None or not allowed:
            return None
        names = request.fields.get(b"access-control-request-headers", b"authorization")
        private = b"access-control-allow-private-network: true\r\n"
        lines = b"access-control-allow-methods: GET, POST\r\naccess-control-allow-headers: %b\r\n" % names
        return b"HTTP/1.1 204 No Content\r\n%b%b%baccess-control-max-age: 600\r\n\r\n" % (allowed, lines, private)

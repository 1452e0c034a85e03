"""A key-checking forwarder before an engine that doesn't ask for a key itself, so that it needs no SSH to its node."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

from agent_infra_core.host import listener_owners
from agent_infra_core.node.forwarder import CHUNK_BYTES, Forwarder, answer, cut, pass_on
from agent_infra_core.node.guard import CHALLENGE_PATH, KEY_NEEDED, carries_key, challenge_reply, error_body

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 15.0  # for the head of a connection's first request
HEALTH_S = 5.0  # for the engine's answer to a health probe
CONNECT_S = 5.0  # to reach the engine
MOST_STRANGERS = 256  # connections that haven't shown the key; one more closes the oldest
_HEALTH_REQUEST = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"


class Gate:
    """Listens at an address for the engine on a loopback port; owns the port and its connections.

    A connection's first request must carry the key. After that the connection is relayed unchanged. Without the key
    only two requests are answered: GET /health, with the engine's answer, and the keyed challenge.
    """

    def __init__(self, host: str, port: int, engine_port: int, key: str, identity: str) -> None:
        """Listen; ``port`` 0: at any free port. Raises OSError if the port is taken."""
        self._engine_port, self._key, self._identity = engine_port, key, identity
        self._lock = threading.Lock()  # guards the next
        self._strangers: dict[socket.socket, None] = {}  # connections that haven't shown the key, the oldest first
        self._forwarder = Forwarder(host, port)
        self.port = self._forwarder.port
        self._forwarder.start(self._serve)

    def close(self) -> None:
        """Stop listening and cut what still passes."""
        self._forwarder.close()

    def _serve(self, client: socket.socket) -> None:
        """Serve a connection, in its own thread."""
        with self._counted(client):
            head = self._admit(client)
        if head:
            client.settimeout(None)
            self._forward(client, head)

    def _admit(self, client: socket.socket) -> bytes:
        """Return what a client with the key has sent so far; answer any other, and return nothing."""
        try:
            head, rest = receive_head(client)
            method, target, keys = read_head(head)
        except ValueError as error:
            answer(client, 400, error_body(f"the request's head isn't valid: {error}", "invalid_request_error", None))
            return b""
        path, _, query = target.partition("?")
        if len(keys) == 1 and carries_key(keys[0], self._key):
            return head + rest
        if (method, target) == ("GET", "/health"):
            self._forward(client, _HEALTH_REQUEST, HEALTH_S)
        elif method == "GET" and path == CHALLENGE_PATH:
            answer(client, *challenge_reply(self._key, self._identity, query))
        else:
            answer(client, 401, KEY_NEEDED)
        return b""

    def _forward(self, client: socket.socket, head: bytes, timeout_s: float | None = None) -> None:
        """Pass ``head`` and what follows to the engine, and its answers back, until one of them leaves.

        With ``timeout_s``, nothing follows, and the engine has that long between two of its chunks.
        """
        try:
            engine = socket.create_connection(("127.0.0.1", self._engine_port), timeout=CONNECT_S)
        except OSError:
            answer(client, 502, error_body("the engine does not answer", "api_error", None))
            return
        with self._forwarder.held(engine), engine:
            owners = listener_owners(self._engine_port)  # after connecting; a server that is gone by now isn't trusted
            if not owners or not owners <= {0, os.getuid()}:
                answer(client, 502, error_body("another user listens on the engine's port", "api_error", None))
                return
            engine.settimeout(timeout_s)
            engine.sendall(head)
            pass_on(client, engine, timeout_s)

    @contextlib.contextmanager
    def _counted(self, client: socket.socket) -> Iterator[None]:
        """Count a connection as a stranger's while the block runs. The oldest makes room: the relay is never slow."""
        with self._lock:
            self._strangers[client] = None
            oldest = next(iter(self._strangers)) if len(self._strangers) > MOST_STRANGERS else None
            if oldest is not None:
                del self._strangers[oldest]
                cut(oldest)
        try:
            yield
        finally:
            with self._lock:
                self._strangers.pop(client, None)


def receive_head(client: socket.socket) -> tuple[bytes, bytes]:
    """The head of a connection's first request, and what came after it. Raises ValueError if it is too long, OSError if
    it doesn't come whole in time."""
    deadline, data = time.monotonic() + HEAD_S, b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > MAX_HEAD_BYTES:
            raise ValueError(f"it is longer than {MAX_HEAD_BYTES} bytes")
        client.settimeout(max(0.01, deadline - time.monotonic()))
        chunk = client.recv(CHUNK_BYTES)
        if not chunk:
            raise ConnectionError("the client left")
        data += chunk
    return data[: end + 4], data[end + 4 :]


def read_head(head: bytes) -> tuple[str, str, list[str]]:
    """Method, target and Authorization fields of a request's head. Raises ValueError if it isn't one."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise ValueError("no request line of HTTP/1")
    keys = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or "\n" in line or "\r" in line:
            raise ValueError("a line isn't a field")
        if name.lower() == "authorization":
            keys.append(value.strip())
    return words[0], words[1], keys

"""A key-checking forwarder before an engine that doesn't ask for a key itself, so that it needs no SSH to its node."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from agent_infra_core.host import allow_many_descriptors, listener_owners
from agent_infra_core.node.guard import CHALLENGE_PATH, KEY_NEEDED, carries_key, challenge_reply, error_body

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 15.0  # for the head of a connection's first request
HEALTH_S = 5.0  # for the engine's answer to a health probe
CONNECT_S = 5.0  # to reach the engine
CHUNK_BYTES = 64 << 10
CLOSE_S = 5.0
LINGER_S = 1.0  # for what a refused client still sends
MOST_STRANGERS = 256  # connections that haven't shown the key; one more closes the oldest
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}  # s, s, probes
_HEALTH_REQUEST = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"


class Gate:
    """Listens at an address for the engine on a loopback port; owns the sockets, and a thread for each connection.

    A connection's first request must carry the key. After that the connection is relayed unchanged. Without the key
    only two requests are answered: GET /health, with the engine's answer, and the keyed challenge.
    """

    def __init__(self, host: str, port: int, engine_port: int, key: str, identity: str) -> None:
        """Listen; ``port`` 0: at any free port. Raises OSError if the port is taken."""
        import socketserver

        allow_many_descriptors()  # each connection takes two
        self._engine_port, self._key, self._identity = engine_port, key, identity
        self._lock = threading.Lock()  # guards what follows, from which the connections' threads remove themselves
        self._open: set[socket.socket] = set()
        self._strangers: dict[socket.socket, None] = {}  # connections that haven't shown the key, the oldest first
        handler = type(
            "GateHandler", (socketserver.BaseRequestHandler,), {"handle": lambda it: self._serve(it.request)}
        )
        options: dict[str, Any] = {"allow_reuse_address": True, "daemon_threads": True, "request_queue_size": 1024}
        options["address_family"] = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = type("GateServer", (socketserver.ThreadingTCPServer,), options)((host, port), handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut what still passes."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(CLOSE_S)
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)  # wakes its thread

    def _serve(self, client: socket.socket) -> None:
        """Serve a connection, in its own thread."""
        with self._held(client), contextlib.suppress(OSError):  # one side closed the connection
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # its machine may go down in a long turn
            for option, value in KEEPALIVE.items():
                client.setsockopt(socket.IPPROTO_TCP, option, value)
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
            _answer(client, 400, error_body(f"the request's head isn't valid: {error}", "invalid_request_error", None))
            return b""
        path, _, query = target.partition("?")
        if len(keys) == 1 and carries_key(keys[0], self._key):
            return head + rest
        if (method, target) == ("GET", "/health"):
            self._forward(client, _HEALTH_REQUEST, HEALTH_S)
        elif method == "GET" and path == CHALLENGE_PATH:
            _answer(client, *challenge_reply(self._key, self._identity, query))
        else:
            _answer(client, 401, KEY_NEEDED)
        return b""

    def _forward(self, client: socket.socket, head: bytes, timeout_s: float | None = None) -> None:
        """Pass ``head`` and what follows to the engine, and its answers back, until one of them leaves.

        With ``timeout_s``, nothing follows, and the engine has that long between two of its chunks.
        """
        try:
            engine = socket.create_connection(("127.0.0.1", self._engine_port), timeout=CONNECT_S)
        except OSError:
            _answer(client, 502, error_body("the engine does not answer", "api_error", None))
            return
        with self._held(engine), engine:
            owners = listener_owners(self._engine_port)  # after connecting; a server that is gone by now isn't trusted
            if not owners or not owners <= {0, os.getuid()}:
                _answer(client, 502, error_body("another user listens on the engine's port", "api_error", None))
                return
            engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            engine.settimeout(timeout_s)
            engine.sendall(head)
            others = {engine: client} if timeout_s else {engine: client, client: engine}
            waiting = select.poll()
            for each in others:
                waiting.register(each, select.POLLIN)
            by_number = {each.fileno(): each for each in others}
            while ready := waiting.poll(timeout_s and timeout_s * 1000):
                for number, _ in ready:
                    data = by_number[number].recv(CHUNK_BYTES)
                    if not data:  # if it was the client, the engine aborts its turn
                        return
                    others[by_number[number]].sendall(data)

    @contextlib.contextmanager
    def _held(self, each: socket.socket) -> Iterator[None]:
        """Let close() find a socket while the block runs."""
        with self._lock:
            self._open.add(each)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(each)

    @contextlib.contextmanager
    def _counted(self, client: socket.socket) -> Iterator[None]:
        """Count a connection as a stranger's while the block runs. The oldest makes room: the relay is never slow."""
        with self._lock:
            self._strangers[client] = None
            oldest = next(iter(self._strangers)) if len(self._strangers) > MOST_STRANGERS else None
            if oldest is not None:
                del self._strangers[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread
        try:
            yield
        finally:
            with self._lock:
                self._strangers.pop(client, None)


def _answer(client: socket.socket, status: int, body: bytes) -> None:
    """Answer, and read on for a moment: closing a socket that has unread bytes would take the answer back."""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    client.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + LINGER_S
    while (left_s := deadline - time.monotonic()) > 0:
        client.settimeout(left_s)
        if not client.recv(CHUNK_BYTES):
            return


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

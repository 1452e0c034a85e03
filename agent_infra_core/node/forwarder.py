"""A listening port with a thread for each connection, and the bytes that pass between two of them."""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from agent_infra_core.host import allow_many_descriptors

CHUNK_BYTES = 64 << 10
CLOSE_S = 5.0
LINGER_S = 1.0  # for what a refused client still sends
if sys.platform == "darwin":
    TCP_KEEPIDLE = socket.TCP_KEEPALIVE
else:
    TCP_KEEPIDLE = socket.TCP_KEEPIDLE
KEEPALIVE = {TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}  # s, s, probes


class Forwarder:
    """Listens at an address, and has each connection served in a thread of its own. Owns the threads and sockets."""

    def __init__(self, host: str, port: int) -> None:
        """Listen; ``port`` 0: at any free port. Connections wait for start(). Raises OSError if the port is taken."""
        import socketserver

        allow_many_descriptors()  # each connection takes two
        self._serve: Callable[[socket.socket], None] = lambda _: None
        self._lock = threading.Lock()  # guards the next, from which the connections' threads remove themselves
        self._open: set[socket.socket] = set()
        handler = type(
            "ForwardedHandler", (socketserver.BaseRequestHandler,), {"handle": lambda it: self._handle(it.request)}
        )
        options: dict[str, Any] = {"allow_reuse_address": True, "daemon_threads": True, "request_queue_size": 1024}
        options["address_family"] = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = type("ForwardingServer", (socketserver.ThreadingTCPServer,), options)((host, port), handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="forwarder", daemon=True)

    def start(self, serve: Callable[[socket.socket], None]) -> None:
        """Serve connections: ``serve`` returns when one may be closed. OSError ends it, too: one side has left."""
        self._serve = serve
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut what still passes."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(CLOSE_S)
        self._server.server_close()
        with self._lock:
            for each in self._open:
                cut(each)

    def _handle(self, client: socket.socket) -> None:
        with self.held(client), contextlib.suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # its machine may go down in a long turn
            for option, value in KEEPALIVE.items():
                client.setsockopt(socket.IPPROTO_TCP, option, value)
            self._serve(client)

    @contextlib.contextmanager
    def held(self, each: socket.socket) -> Iterator[None]:
        """Have close() cut a socket while the block runs."""
        with self._lock:
            self._open.add(each)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(each)


def cut(each: socket.socket) -> None:
    """End a connection, which wakes the thread that serves it."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def pass_on(client: socket.socket, server: socket.socket, timeout_s: float | None = None) -> None:
    """Pass bytes both ways until one side leaves.

    With ``timeout_s``, only the server's: it has that long between two of its chunks.
    """
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    others = {server: client} if timeout_s else {server: client, client: server}
    waiting = select.poll()
    for each in others:
        waiting.register(each, select.POLLIN)
    by_number = {each.fileno(): each for each in others}
    while ready := waiting.poll(timeout_s and timeout_s * 1000):
        for number, _ in ready:
            data = by_number[number].recv(CHUNK_BYTES)
            if not data:  # if it was the client, the server aborts its turn
                return
            others[by_number[number]].sendall(data)


def answer(client: socket.socket, status: int, body: bytes) -> None:
    """Answer, and read on for a moment: closing a socket that has unread bytes would take the answer back."""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    client.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + LINGER_S
    while (left_s := deadline - time.monotonic()) > 0:
        client.settimeout(left_s)
        if not client.recv(CHUNK_BYTES):
            return

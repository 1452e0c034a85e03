"""A fake inference engine that costs almost nothing: one process, one epoll loop, answers made in advance.

``python benchmarks/bench_engine.py PORT`` serves ``POST /v1/...`` on 127.0.0.1 with keep-alive, as JSON with ``usage``
or as a paced stream of SSE events (one event of about 200 bytes in one HTTP chunk, then ``finish_reason``, ``usage``
and ``[DONE]``), and ``GET /health``, ``/v1/models``.  ``GET /faults`` tells which turns are running and which were
aborted (the client's side closed before the end), and when: seconds of CLOCK_MONOTONIC, which all processes share.

How a turn behaves stands in the request's ``user`` field, which every router passes on: ``"ID DELAY CHUNKS INTERVAL"``:
milliseconds before the answer, number of stream events, milliseconds between them.  Without it: 0, 64 and 20.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import heapq
import json
import random
import re
import select
import signal
import socket
import time
from collections.abc import Callable

MODEL = "bench"
DIRECTIVE = re.compile(rb'"user"\s*:\s*"([^" ]+) (\d+) (\d+) (\d+)"')
STREAMED = re.compile(rb'"stream"\s*:\s*true')
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
DIRECTIVE_WITHIN_BYTES = 16384  # larger bodies carry none: looking for it would cost as much as the answer
RECEIVE_BYTES = 1 << 18


def _event(choices: list[object], usage: object = None) -> bytes:
    document = {"id": "chatcmpl-7f3c9a52d1e04b6f", "object": "chat.completion.chunk", "created": 1790000000}
    document |= {"model": MODEL, "choices": choices} | ({"usage": usage} if usage else {})
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> list[object]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]


USAGE = {
    "prompt_tokens": 220,
    "total_tokens": 284,
    "completion_tokens": 64,
    "prompt_tokens_details": {"cached_tokens": 96},
}
ANSWER_TEXT = "The quick brown fox jumps over the lazy dog and reports what it saw on the other side. " * 2
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n" + _chunk(_event(_choice({"role": "assistant", "content": ""})))
)
STREAM_EVENT = _chunk(_event(_choice({"content": " at 0000000000.000000"})))
AT = STREAM_EVENT.index(b"0000000000.000000")  # where an event says when it was sent (CLOCK_MONOTONIC, s)
STREAM_END = b"".join(
    [
        _chunk(_event(_choice({"content": ""}, "stop"))),
        _chunk(_event([], USAGE)),
        _chunk(b"data: [DONE]\n\n"),
        b"0\r\n\r\n",
    ]
)


def _json_answer(document: object, status: bytes = b"200 OK") -> bytes:
    body = json.dumps(document, separators=(",", ":")).encode()
    head = b"HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


ANSWER = _json_answer(
    {
        "id": "chatcmpl-7f3c9a52d1e04b6f",
        "object": "chat.completion",
        "created": 1790000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER_TEXT, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
)
MODELS = _json_answer({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]})
NOT_FOUND = _json_answer({"error": {"message": "no such path", "type": "NotFoundError", "code": 404}}, b"404 Not Found")


class Connection:
    """One connection from the proxy: bytes read ahead, and the turn that runs on it (None between turns)."""

    __slots__ = ("backlog", "buffer", "chunks_left", "generation", "interval_s", "sock", "streaming", "turn")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.backlog = b""  # what the socket did not take
        self.turn: str | None = None
        self.generation = 0  # counts turns, so that a timer of an earlier one is recognised
        self.streaming = False
        self.chunks_left = 0
        self.interval_s = 0.0


class Engine:
    """Serves all connections in one thread; owns the timers (a heap of due time, tie-break, connection, generation)."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.listener.setblocking(False)
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.connections: dict[int, Connection] = {}
        self.timers: list[tuple[float, int, Connection, int]] = []
        self.timer_number = 0
        self.completed = 0
        self.turn_number = 0
        self.active: dict[str, float] = {}
        self.aborted: dict[str, float] = {}

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else 1.0
            for descriptor, events in self.epoll.poll(timeout, 512):
                connection = self.connections.get(descriptor)
                if connection is None:
                    self._accept()
                elif events & select.EPOLLOUT:
                    self._drain(connection)
                else:
                    self._readable(connection)
            self._fire(time.monotonic())

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections[sock.fileno()] = Connection(sock)
                self.epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP)

    def _fire(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            due, _, connection, generation = heapq.heappop(self.timers)
            if connection.turn is not None and connection.generation == generation:
                self._step(connection, due)

    def _later(self, due: float, connection: Connection) -> None:
        self.timer_number += 1
        heapq.heappush(self.timers, (due, self.timer_number, connection, connection.generation))

    def _readable(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        connection.buffer = connection.buffer + data if connection.buffer else data
        while connection.turn is None and connection.buffer and self._take_request(connection):
            pass

    def _take_request(self, connection: Connection) -> bool:
        """Start the request at the head of the buffer; False while it is not complete."""
        buffer = connection.buffer
        head_end = buffer.find(b"\r\n\r\n") + 4
        if head_end < 4:
            return False
        length = LENGTH.search(buffer, 0, head_end)
        if length is not None:
            end = head_end + int(length[1])
        elif b"chunked" in buffer[:head_end].lower():
            end = buffer.find(b"\r\n0\r\n\r\n", head_end - 2) + 7
            if end < 7:
                return False
        else:
            end = head_end
        if len(buffer) < end:
            return False
        connection.buffer = buffer[end:]
        if buffer.startswith(b"POST "):
            self._start(connection, buffer[head_end:end])
        else:
            self._send(connection, self._page(buffer.split(b" ", 2)[1]))
        return True

    def _page(self, path: bytes) -> bytes:
        pages: dict[bytes, Callable[[], bytes]] = {
            b"/health": lambda: _json_answer({}),
            b"/v1/models": lambda: MODELS,
            b"/faults": lambda: _json_answer(
                {"active": list(self.active), "aborted": self.aborted, "completed": self.completed}
            ),
        }
        return pages.get(path, lambda: NOT_FOUND)()

    def _start(self, connection: Connection, body: bytes) -> None:
        directive = DIRECTIVE.search(body) if len(body) < DIRECTIVE_WITHIN_BYTES else None
        connection.streaming = STREAMED.search(body, 0, DIRECTIVE_WITHIN_BYTES) is not None
        self.turn_number += 1
        connection.generation += 1
        if directive is None:
            delay, chunks, interval = 0, 64, 20
            connection.turn = f"turn-{self.turn_number}"
        else:
            connection.turn = directive[1].decode()
            delay, chunks, interval = int(directive[2]), int(directive[3]), int(directive[4])
        self.active[connection.turn] = now = time.monotonic()
        connection.chunks_left, connection.interval_s = chunks, interval / 1000
        if connection.streaming:
            self._send(connection, STREAM_HEAD)
            # A random phase: streams of real engines on several replicas do not step together.
            self._later(now + delay / 1000 + random.random() * connection.interval_s, connection)
        elif delay:
            self._later(now + delay / 1000, connection)
        else:
            self._step(connection, now)

    def _step(self, connection: Connection, due: float) -> None:
        """Send what is due on the turn: the whole answer, the next event, or the end of the stream."""
        if connection.streaming and connection.chunks_left:
            connection.chunks_left -= 1
            self._send(connection, STREAM_EVENT[:AT] + b"%017.6f" % time.monotonic() + STREAM_EVENT[AT + 17 :])
            self._later(due + connection.interval_s, connection)
            return
        if connection.turn is not None:
            self.active.pop(connection.turn, None)
        connection.turn = None
        self.completed += 1
        self._send(connection, STREAM_END if connection.streaming else ANSWER)

    def _send(self, connection: Connection, data: bytes) -> None:
        if connection.backlog:
            connection.backlog += data
            return
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return
        if sent < len(data):
            connection.backlog = data[sent:]
            self.epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLOUT)

    def _drain(self, connection: Connection) -> None:
        backlog, connection.backlog = connection.backlog, b""
        self.epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLRDHUP)
        self._send(connection, backlog)

    def _close(self, connection: Connection) -> None:
        if connection.turn is not None:
            self.active.pop(connection.turn, None)
            self.aborted[connection.turn] = time.monotonic()
            connection.turn = None
        self.connections.pop(connection.sock.fileno(), None)
        connection.sock.close()


def main() -> None:
    """Serve on the port of the command line until the parent ends this process or dies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which ends its engines itself
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    Engine(options.port).run()


if __name__ == "__main__":
    main()

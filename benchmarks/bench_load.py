"""The load generator: one epoll loop over raw sockets and requests made in advance, so that it costs little itself."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import bench_engine

RECEIVE_BYTES = 1 << 18
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
LAST_CHUNK = b"0\r\n\r\n"
EVENT = b"data: "
SENT_AT = re.compile(rb'" at (\d+\.\d+)"')  # in an event: when the engine sent it
CLIENT_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:5800\r\nAccept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 2.8.1\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 2.8.1\r\n"
    "X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
    "X-Stainless-Runtime-Version: 3.12.1\r\nAuthorization: Bearer unused\r\nX-Stainless-Async: false\r\n"
    "x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
)
OBSERVATION = """$ make -j4 2>&1 | tail -5
ld: build/session.o: in function `session_close':
session.c:212: undefined reference to "lru_evict"
collect2: error: ld returned 1 exit status
make: *** [Makefile:61: build/server] Error 1
"""


def chat_request(
    size_bytes: int, *, session: str | None = None, stream: bool = False, directive: str | None = None, salt: str = ""
) -> bytes:
    """A chat turn as the openai client sends it, with a body of ``size_bytes`` (700 and more): a conversation in
    messages of a few hundred bytes, as agents have them, with the line ends and quotes that JSON must escape."""
    messages = [{"role": "system", "content": f"You are a careful software agent. {salt}"}]
    document: dict[str, object] = {"messages": messages, "model": bench_engine.MODEL, "max_tokens": 64}
    document |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    document |= {"user": directive} if directive is not None else {}
    missing = size_bytes - len(json.dumps(document))
    while missing > 700:
        role = "assistant" if len(messages) % 2 == 0 else "user"
        message = {"role": role, "content": f"Step {len(messages)}. {OBSERVATION}"}
        messages.append(message)
        missing -= len(json.dumps(message)) + 2
    messages.append({"role": "user", "content": "x" * max(0, missing - 35)})
    body = json.dumps(document).encode()
    session_header = f"X-Session-ID: {session}\r\n" if session is not None else ""
    return f"{CLIENT_HEAD}{session_header}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(port: int) -> socket.socket:
    """A connection to the proxy, not blocking once it stands."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


class Connection:
    """One client connection; ``buffer`` holds the answer that is being received, ``missing`` its length once known."""

    __slots__ = (
        "backlog",
        "before",
        "buffer",
        "events",
        "is_busy",
        "last",
        "outcome",
        "sent_at",
        "sock",
        "tail",
        "total_bytes",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.backlog = b""  # of the request: what the socket did not take
        self.total_bytes = 0  # of the answer, known once its head is here; -1: chunked
        self.sent_at = 0.0
        self.is_busy = False
        # Of a stream:
        self.events = 0
        self.tail = b""
        self.before = b""  # the receive before the last one
        self.last = b""
        self.outcome: str | None = None  # None while it runs

    def send(self, data: bytes) -> bool:
        """Send, or keep for later what does not fit; True when everything went."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self.backlog = data[sent:] if sent < len(data) else b""
        return not self.backlog

    def answer_is_complete(self, data: bytes) -> bool:
        """Take bytes of a plain answer; whether they complete it."""
        self.buffer = buffer = self.buffer + data if self.buffer else data
        if not self.total_bytes:
            head_end = buffer.find(b"\r\n\r\n") + 4
            if head_end < 4:
                return False
            length = LENGTH.search(buffer, 0, head_end)
            self.total_bytes = head_end + int(length[1]) if length else -1
        return buffer.endswith(LAST_CHUNK) if self.total_bytes < 0 else len(buffer) >= self.total_bytes


@dataclass
class RequestsResult:
    """What became of a number of plain requests."""

    sent: int = 0
    succeeded: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    wall_s: float = 0.0


class RequestLoad:
    """Sends ``count`` requests at ``rate`` a second (0: as fast as answers come) over keep-alive connections.

    A request waits for a free connection, never for a slow one's answer; its latency runs from when it was sent.
    ``actions`` are things to do once, seconds after the start, by the same thread.
    """

    def __init__(
        self,
        port: int,
        request: Callable[[int], bytes],
        count: int,
        rate: float,
        connections: int = 32,
        actions: Sequence[tuple[float, Callable[[], object]]] = (),
    ) -> None:
        self.port, self.request, self.count, self.rate = port, request, count, rate
        self.actions = deque(sorted(actions, key=lambda action: action[0]))
        self.result = RequestsResult()
        self.epoll = select.epoll()
        self.by_descriptor: dict[int, Connection] = {}
        self.idle: deque[Connection] = deque()
        for _ in range(connections):
            self._open()

    def run(self, give_up_after_s: float = 60.0) -> RequestsResult:
        """Send everything and wait for every answer; what is not there ``give_up_after_s`` late is an error."""
        start = time.monotonic()
        give_up_at = start + give_up_after_s + (self.count / self.rate if self.rate else 0)
        result = self.result
        while result.succeeded + result.errors.total() < self.count and (now := time.monotonic()) < give_up_at:
            while self.actions and now - start >= self.actions[0][0]:
                self.actions.popleft()[1]()
            due = min(self.count, int((now - start) * self.rate) + 1) if self.rate else self.count
            while result.sent < due and self.idle:
                self._send_next()
            timeout = 0.05
            if self.rate and result.sent < self.count and self.idle:
                timeout = max(0.0, min(timeout, start + result.sent / self.rate - time.monotonic()))
            for descriptor, events in self.epoll.poll(timeout, 256):
                self._on_event(self.by_descriptor[descriptor], events)
        result.wall_s = time.monotonic() - start
        missing = self.count - result.succeeded - result.errors.total()
        if missing:
            result.errors["no answer"] += missing
        for connection in self.by_descriptor.values():
            connection.sock.close()
        self.epoll.close()
        return result

    def _open(self) -> None:
        connection = Connection(connect(self.port))
        self.by_descriptor[connection.sock.fileno()] = connection
        self.epoll.register(connection.sock, select.EPOLLIN)
        self.idle.append(connection)

    def _send_next(self) -> None:
        connection = self.idle.popleft()
        data = self.request(self.result.sent)
        self.result.sent += 1
        connection.buffer, connection.total_bytes, connection.is_busy = b"", 0, True
        connection.sent_at = time.monotonic()
        try:
            if not connection.send(data):
                self.epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)
        except OSError as error:
            self._failed(connection, type(error).__name__)

    def _on_event(self, connection: Connection, events: int) -> None:
        try:
            if events & select.EPOLLOUT and connection.send(connection.backlog):
                self.epoll.modify(connection.sock, select.EPOLLIN)
            if not events & ~select.EPOLLOUT:
                return
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(connection, type(error).__name__)
            return
        if not data:
            self._failed(connection, "closed without an answer" if not connection.buffer else "cut answer")
        elif connection.answer_is_complete(data):
            self._answered(connection)

    def _answered(self, connection: Connection) -> None:
        head = connection.buffer[:1024].lower()
        if head.startswith(b"http/1.1 200"):
            self.result.succeeded += 1
            self.result.latencies_ms.append((time.monotonic() - connection.sent_at) * 1000)
        else:
            self.result.errors["status " + head[9:12].decode(errors="replace")] += 1
        connection.is_busy = False
        if b"\r\nconnection: close" in head:
            self._replace(connection)
        else:
            self.idle.append(connection)

    def _failed(self, connection: Connection, why: str) -> None:
        if connection.is_busy:
            self.result.errors[why] += 1
        else:
            self.idle.remove(connection)
        self._replace(connection)

    def _replace(self, connection: Connection) -> None:
        del self.by_descriptor[connection.sock.fileno()]
        connection.sock.close()
        self._open()


class StreamLoad:
    """Holds many streams open and counts their events; every stream has a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.epoll = select.epoll()
        self.by_descriptor: dict[int, Connection] = {}
        self.streams: list[Connection] = []
        self.events = 0
        self.delays_ms: list[float] = []  # from an event's sending to its arrival here

    def open(self, requests: Sequence[bytes]) -> None:
        """Start one stream for each request; ``streams`` keeps their order."""
        for request in requests:
            connection = Connection(connect(self.port))
            if not connection.send(request):
                raise BlockingIOError("a stream's request must fit into a fresh socket")
            self.by_descriptor[connection.sock.fileno()] = connection
            self.streams.append(connection)
            self.epoll.register(connection.sock, select.EPOLLIN)
            self.pump(0)

    def pump(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Receive for so long, or until the condition holds."""
        deadline = time.monotonic() + seconds
        while True:
            remaining = deadline - time.monotonic()
            for descriptor, _ in self.epoll.poll(max(0.0, remaining), 512):
                self._receive(self.by_descriptor[descriptor])
            if remaining <= 0 or until():
                return

    def wait_for_first_events(self, count: int = 2, seconds: float = 30.0) -> bool:
        """Whether every stream brought ``count`` events within that time."""
        self.pump(seconds, lambda: min(stream.events for stream in self.streams) >= count)
        return min(stream.events for stream in self.streams) >= count

    def abandon(self, connection: Connection) -> float:
        """Close one stream as a client does that goes away; the moment (CLOCK_MONOTONIC)."""
        self.by_descriptor.pop(connection.sock.fileno(), None)
        connection.outcome = connection.outcome or "abandoned"
        at = time.monotonic()
        connection.sock.close()
        return at

    def close(self) -> None:
        for connection in self.streams:
            connection.sock.close()
        self.epoll.close()

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._over(connection)
            return
        # A proxy may cut the stream anywhere: an event's first bytes can lie in the receive before.
        count = (connection.tail + data).count(EVENT)
        connection.tail = data[-(len(EVENT) - 1) :]
        connection.events += count
        self.events += count
        if (sent := SENT_AT.search(data)) is not None:
            self.delays_ms.append((time.monotonic() - float(sent[1])) * 1000)
        connection.before, connection.last = connection.last, data
        if data.endswith(LAST_CHUNK):
            self._over(connection)

    def _over(self, connection: Connection) -> None:
        text = connection.before + connection.last
        if b'"error"' in text:
            connection.outcome = "error event"
        elif text.endswith(LAST_CHUNK):
            connection.outcome = "complete"
        else:
            connection.outcome = "cut"
        del self.by_descriptor[connection.sock.fileno()]
        self.epoll.unregister(connection.sock)

"""The controller's side of the relay, for tests: starts the real process as the controller does, and speaks to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from patience import PATIENCE_S
from program import wait_for

from agent_infra_core.host import unix_address
from agent_infra_core.protocol import (
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_GAUGES,
    FRAME_HELLO,
    FRAME_REQUEST,
    FRAME_STATS,
    FRAME_TABLE,
    Backend,
    FrameReader,
    SessionEnded,
    TurnAnswering,
    TurnEvent,
    TurnFinished,
    TurnSent,
    TurnStarted,
    decode_events,
    encode_frame,
)
from agent_infra_core.settings import HeadersConfig, ProxyConfig

ROOT = Path(__file__).resolve().parent.parent
KEY = "test-key-of-the-proxy"


_KINDS: dict[type, str] = {
    TurnStarted: "started",
    TurnSent: "sent",
    TurnAnswering: "answering",
    TurnFinished: "finished",
    SessionEnded: "session_ended",
}


class Controller:
    """A connection to the relay's control socket; a thread collects what the relay says."""

    def __init__(self, path: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.gauges: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self._told: set[str] = set()  # turns
        self._has_sent_table = False
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            with unix_address(path) as address:
                self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        data, descriptors, _, _ = socket.recv_fds(self.sock, 65536, 4)
        self.listener = socket.socket(fileno=descriptors[0])
        self._reader = FrameReader()
        frames = self._reader.feed(data)
        assert frames[0][0] == FRAME_HELLO
        self.hello: dict[str, Any] = json.loads(frames[0][1])
        self.is_closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(frames[1:],), daemon=True)
        self._thread.start()

    def _read(self, frames: list[tuple[bytes, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                for kind, payload in frames:
                    if kind == FRAME_EVENTS:
                        for event in decode_events(payload):
                            self._note(event)
                    else:
                        {FRAME_GAUGES: self.gauges, FRAME_REQUEST: self.requests}[kind].append(json.loads(payload))
                data = self.sock.recv(1 << 20)
                if not data:
                    break
                frames = self._reader.feed(data)
        self.is_closed.set()

    def _note(self, event: TurnEvent) -> None:
        """Keep an event as a mapping with its kind; a finish of a turn that nothing was told of as its start, too."""
        if isinstance(event, TurnStarted):
            self._told.add(event.turn)
        elif isinstance(event, TurnFinished) and event.started is not None and event.turn not in self._told:
            self._note(event.started)
        self.events.append({"kind": _KINDS[type(event)], **dataclasses.asdict(event)})

    def send_table(
        self,
        backends: Iterable[Backend],
        *,
        models: list[str] | None = None,
        loading: Iterable[str] = (),
        proxy: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        rows = list(backends)
        table = {
            "settings": {
                "proxy": dataclasses.asdict(dataclasses.replace(ProxyConfig(api_key=KEY), **(proxy or {}))),
                "headers": dataclasses.asdict(HeadersConfig()),
                "log_format": "text",
                "drain_seconds": 5.0,
                **settings,
            },
            "models": models if models is not None else sorted({row.model for row in rows}),
            "loading": list(loading),
            "backends": [dataclasses.asdict(row) for row in rows],
        }
        self.sock.sendall(encode_frame(FRAME_TABLE, json.dumps(table).encode()))
        if self._has_sent_table:  # before the first, requests wait for it
            self.wait_for_a_round()
        self._has_sent_table = True

    def wait_for_a_round(self) -> None:
        """Wait until the relay's event loop has gone round: it reads sockets that get bytes at once in any order.

        The second answer is of a later round than what was sent before the first request.
        """
        with Client(self.listener.getsockname()[1], host=self.listener.getsockname()[0]) as client:
            for _ in range(2):
                client.get("/health")

    def send_stats(self, document: bytes) -> None:
        self.sock.sendall(encode_frame(FRAME_STATS, document))

    def answer(self, request: Mapping[str, Any], body: str = "") -> None:
        """Answer what somebody asked for over HTTP."""
        answer = {"id": request["id"], "status": 200, "type": "text/plain", "body": body}
        self.sock.sendall(encode_frame(FRAME_ANSWER, json.dumps(answer).encode()))

    def finished(self, count: int = 1) -> list[dict[str, Any]]:
        """The TurnFinished events, once there are at least ``count``."""

        def found() -> list[dict[str, Any]]:
            ends = [event for event in list(self.events) if event["kind"] == "finished"]
            return ends if len(ends) >= count else []

        return wait_for(found, f"the end of {count} turns")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self.sock.close()
        self.listener.close()


# Gives names other values in every module that the relay loads, where they are constants of it or hide builtins.
OVERRIDE = """
import sys, agent_infra, agent_infra_core.relay.server
def override(values):
    for name, module in sys.modules.items():
        if name.partition(".")[0] in ("agent_infra", "agent_infra_core"):
            vars(module).update(values)
override"""


class RelayProcess:
    """A relay as a child process: ``with RelayProcess(tmp_path) as relay: relay.controller.send_table(...)``.

    ``overrides`` replace constants of the program in the child, so that deadlines of minutes can be tested in seconds.
    ``prelude``: Python that the child runs first, with the tests' folder on its path.
    ``may_have_bugs``: they break something, and a traceback in its log is no failure.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        prelude: str = "",
        may_have_bugs: bool = False,
        **overrides: Any,
    ) -> None:
        self.prelude, self.may_have_bugs = prelude, may_have_bugs
        self.path = str(directory / "relay.sock")
        self.log_path = directory / "relay.log"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family, backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self.overrides = overrides
        self._controllers: list[Controller] = []
        self.process = self.start()
        self.controller = self.connect()

    def start(self) -> subprocess.Popen[bytes]:
        code = f"{self.prelude}\n{OVERRIDE}({self.overrides!r})\n"
        code += "sys.exit(agent_infra.run_relay(sys.argv[1], int(sys.argv[2])))"
        descriptor = self.listener.fileno()
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "error", "-c", code, self.path, str(descriptor)],
                pass_fds=[descriptor],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            )

    def connect(self) -> Controller:
        """A new controller's connection; the former one's is closed by the relay."""

        def attempt() -> Controller | None:
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Controller(self.path)
            return None

        controller = wait_for(attempt, "the relay's control socket")
        if controller is None:
            raise AssertionError
        self._controllers.append(controller)
        return controller

    def log(self) -> str:
        return self.log_path.read_text()

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for controller in self._controllers:
            controller.close()
        self.listener.close()
        assert self.may_have_bugs or "Traceback" not in self.log(), self.log()


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """The sockets that are made meanwhile are another user's; only root can do that."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def backend(number: int, port: int, **fields: Any) -> Backend:
    return Backend(
        **{"id": f"r{number}", "model": "m", "host": "127.0.0.1", "port": port, "key": "replica-key", **fields}
    )


def request(stream: bool = False, **fields: Any) -> bytes:
    """A chat request as bytes."""
    document = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": stream, **fields}
    body = json.dumps(document).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclasses.dataclass
class Answer:
    """An HTTP answer, its body out of its framing; ``is_complete``: its framing said that it had ended."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_complete: bool = True

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The data of its SSE events."""
        return [e.partition("data: ")[2] for e in self.body.decode().split("\n\n") if "data: " in e]


class Client:
    """A raw HTTP/1.1 client on one connection, that trusts nothing and normalises nothing.

    ``is_narrow``: its socket takes a few kilobytes at once.
    """

    def __init__(
        self, port: int, timeout: float = PATIENCE_S, host: str = "127.0.0.1", is_narrow: bool = False
    ) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(timeout)
        if is_narrow:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # works before connecting only
        try:
            self.sock.connect((host, port))
        except OSError:
            self.sock.close()
            raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()

    def post(self, path: str, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: test",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.sock.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        return self.read()

    def chat(self, headers: Mapping[str, str] | None = None, stream: bool = False, **fields: Any) -> Answer:
        document = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": stream, **fields}
        return self.post("/v1/chat/completions", document, headers)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        lines = [f"GET {path} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        self.sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
        return self.read()

    def raw(self, data: bytes) -> Answer:
        self.sock.sendall(data)
        return self.read()

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self.buffer += data
        return bool(data)

    def is_closed(self) -> bool:
        """Whether the relay closes the connection, with nothing more to say."""
        return not self.buffer and not self._more()

    def read(self) -> Answer:
        """The next answer; status 0 when the connection ends without one."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                return Answer(0, {}, self.buffer, False)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split(" ")[1])
        if status == 100:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body, complete = self._read_chunks()
        elif "content-length" in headers:
            length = int(headers["content-length"])
            while len(self.buffer) < length and self._more():
                pass
            body, self.buffer = self.buffer[:length], self.buffer[length:]
            complete = len(body) == length
        else:
            while self._more():
                pass
            body, self.buffer, complete = self.buffer, b"", True
        return Answer(status, headers, body, complete)

    def _read_chunks(self) -> tuple[bytes, bool]:
        body = b""
        while True:
            while b"\r\n" not in self.buffer:
                if not self._more():
                    return body, False
            line, _, self.buffer = self.buffer.partition(b"\r\n")
            size = int(line, 16)
            while len(self.buffer) < size + 2:
                if not self._more():
                    return body, False
            assert self.buffer[size : size + 2] == b"\r\n"
            body, self.buffer = body + self.buffer[:size], self.buffer[size + 2 :]
            if not size:
                return body, True

"""The gate before an engine that asks for no key: who is let through, what passes, and what becomes of connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from patience import PATIENCE_S
from program import wait_for
from relay_harness import another_user

from agent_infra_core.node.gate import MAX_HEAD_BYTES, MOST_STRANGERS, Gate, read_head
from agent_infra_core.node.guard import answer_challenge

KEY = "the-replica-key"
IDENTITY = "m-1@n1:5900"
NONCE = "00112233445566778899aabbccddeeff"
WITH_KEY = f"Authorization: Bearer {KEY}"


class Engine:
    """A server on loopback that keeps what it is sent and answers each request with ``answers``, one chunk each."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.seen, self.gone = answers, [b""], threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.may_go_on = threading.Semaphore(1)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                self.seen.append(self.seen.pop() + data)
                if data.endswith((b"\r\n\r\n", b"end")):
                    for answer in self.answers:
                        self.may_go_on.acquire(timeout=PATIENCE_S)
                        connection.sendall(answer)
            self.gone.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread's accept()
        self._socket.close()


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(OK)
    for _ in range(100):
        made.may_go_on.release()
    yield made
    made.close()


@pytest.fixture
def port(engine: Engine) -> Iterator[int]:
    with contextlib.closing(Gate("127.0.0.1", 0, engine.port, KEY, IDENTITY)) as gate:
        yield gate.port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def ask(port: int, *lines: str, body: bytes = b"") -> bytes:
    """The answer, up to the end of the connection or of the engine's OK."""
    with connect(port) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        told = b""
        while not told.endswith(b"hi") and (data := client.recv(65536)):
            told += data
        return told


def test_what_carries_the_key_passes_as_it_is(port: int, engine: Engine) -> None:
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "aUTHORIZATION:  bearer " + KEY, "Content-Length: 7")
    assert ask(port, *head, body=b"{\0} end").startswith(OK)  # the engine may answer before the body is there
    sent = "\r\n".join([*head, "", ""]).encode() + b"{\0} end"
    wait_for(lambda: engine.seen[0] == sent, "all that was sent")


def test_a_connection_that_has_shown_the_key_goes_on(port: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    for _ in range(3):
        client.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        assert client.getresponse().read() == b"hi"
    client.close()


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Authorization: Bearer wrong",),
        (f"Authorization: Basic {KEY}",),
        (f"X-Authorization: Bearer {KEY}",),
        (WITH_KEY, WITH_KEY),
        (WITH_KEY, "Authorization: Bearer wrong"),
    ],
    ids=lambda lines: str(len(lines)) + (lines[0][:18] if lines else ""),
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/health/", "/invocations"])
def test_without_the_key_nothing_reaches_the_engine(
    port: int, engine: Engine, path: str, lines: tuple[str, ...]
) -> None:
    answer = ask(port, f"POST {path} HTTP/1.1", "Host: x", *lines)
    assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert engine.seen == [b""]


def test_health_is_asked_on_behalf_of_everybody_and_nothing_of_theirs_is_passed(port: int, engine: Engine) -> None:
    assert ask(port, "GET /health HTTP/1.1", "X-Evil: 1", body=b"POST /v1/models HTTP/1.1\r\n\r\n") == OK
    assert engine.seen[0].startswith(b"GET /health HTTP/1.1\r\n")
    assert b"Evil" not in engine.seen[0]
    assert b"POST" not in engine.seen[0]


def test_the_challenge_is_answered_without_the_key(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/agent-infra/challenge?nonce={NONCE}", timeout=9) as answer:
        assert json.load(answer) == {"answer": answer_challenge(KEY, f"{NONCE}:{IDENTITY}")}
    assert ask(port, "GET /agent-infra/challenge?nonce=x HTTP/1.1").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "head", ["nonsense", "GET / HTTP/2", f"GET / HTTP/1.1\r\n {WITH_KEY}", f"GET / HTTP/1.1\r\nA: 1\n{WITH_KEY}"]
)
def test_what_is_no_request_is_refused(port: int, engine: Engine, head: str) -> None:
    assert ask(port, head).startswith(b"HTTP/1.1 400 ")
    assert engine.seen == [b""]


def test_a_head_that_never_ends_is_refused(port: int) -> None:
    assert ask(port, "GET / HTTP/1.1", "A: " + "a" * (4 * MAX_HEAD_BYTES)).startswith(b"HTTP/1.1 400 ")


def test_each_chunk_passes_when_it_comes() -> None:
    engine = Engine(b"one", b"two")
    with contextlib.closing(Gate("127.0.0.1", 0, engine.port, KEY, IDENTITY)) as gate, connect(gate.port) as client:
        client.sendall(f"GET / HTTP/1.1\r\n{WITH_KEY}\r\n\r\n".encode())
        assert client.recv(100) == b"one"
        engine.may_go_on.release()
        assert client.recv(100) == b"two"
        client.close()
        assert engine.gone.wait(PATIENCE_S)  # the engine learns that its client is gone
    engine.close()


def test_without_an_engine_the_gate_says_so_and_lives_on(port: int, engine: Engine) -> None:
    engine.close()
    for _ in range(2):
        wait_for(lambda: ask(port, "GET / HTTP/1.1", WITH_KEY).startswith(b"HTTP/1.1 502 "), "the word of the gate")
        assert ask(port, "GET /health HTTP/1.1").startswith(b"HTTP/1.1 502 ")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("request_line", ["POST /v1/chat/completions HTTP/1.1", "GET /health HTTP/1.1"])
def test_another_users_server_on_the_engines_port_gets_nothing(request_line: str) -> None:
    with another_user():
        engine = Engine(OK)
    with contextlib.closing(Gate("127.0.0.1", 0, engine.port, KEY, IDENTITY)) as gate:
        answer = ask(gate.port, request_line, WITH_KEY)
    engine.close()
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"another user listens on the engine's port" in answer
    assert engine.seen == [b""]


def test_a_node_that_only_has_ipv6_has_a_gate_too(engine: Engine) -> None:
    with contextlib.closing(Gate("::", 0, engine.port, KEY, IDENTITY)) as gate:
        for host in ("::1", "127.0.0.1"):
            with socket.create_connection((host, gate.port), timeout=PATIENCE_S) as client:
                client.sendall(f"GET / HTTP/1.1\r\n{WITH_KEY}\r\n\r\n".encode())
                assert client.recv(100) == OK


def test_connections_without_a_key_are_bounded_and_the_oldest_makes_room(port: int) -> None:
    with contextlib.ExitStack() as stack:
        oldest = stack.enter_context(connect(port))
        oldest.sendall(b"GET / HTTP/1.1\r\n")
        others = [stack.enter_context(connect(port)) for _ in range(MOST_STRANGERS)]
        assert oldest.recv(100) == b""  # closed
        others[-1].sendall(f"GET / HTTP/1.1\r\n{WITH_KEY}\r\n\r\n".encode())
        assert others[-1].recv(100) == OK


def test_a_closed_gate_cuts_what_passes_and_frees_its_port(engine: Engine) -> None:
    gate = Gate("127.0.0.1", 0, engine.port, KEY, IDENTITY)
    with connect(gate.port) as client:
        client.sendall(f"GET / HTTP/1.1\r\n{WITH_KEY}\r\n\r\n".encode())
        assert client.recv(100)
        gate.close()
        with contextlib.suppress(ConnectionError):
            assert client.recv(100) == b""
    assert engine.gone.wait(PATIENCE_S)
    Gate("127.0.0.1", gate.port, engine.port, KEY, IDENTITY).close()


def test_a_taken_port_is_an_error(engine: Engine) -> None:
    with pytest.raises(OSError, match="in use"):
        Gate("127.0.0.1", engine.port, 1, KEY, IDENTITY)


def test_a_head_is_read_in_any_case_of_its_names() -> None:
    assert read_head(b"GET /x?y HTTP/1.1\r\nAUTHORIZATION: a\r\nauthorization:b\r\n\r\n") == ("GET", "/x?y", ["a", "b"])

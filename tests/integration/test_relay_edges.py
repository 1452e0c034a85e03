"""Web pages, answers that only look whole, and the relay's end: what others try, and what they get."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import wait_for
from relay_harness import KEY, Client, RelayProcess, backend, request

PAGE = "https://chat.example.org"


@pytest.fixture
def relay(tmp_path: Path, engine: FakeEngine) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        relay.controller.send_table([backend(1, engine.port)], proxy={"cors_origins": [PAGE]})
        yield relay


def asks(relay: RelayProcess, method: str, path: str, body: str = "", **headers: str) -> Any:
    """The answer to a request whose headers are these alone."""
    fields = {"host": f"127.0.0.1:{relay.port}", "content-length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    with Client(relay.port) as client:
        return client.raw("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", body]).encode())


CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
CALLS = [("GET", "/stats", ""), ("POST", "/admin/backends/r1/drain", ""), ("POST", "/v1/chat/completions", CHAT)]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebind.attacker.example:5800"},
        {"host": "127.0.0.1.attacker.example"},
        {"origin": "https://attacker.example", "content_type": "text/plain"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_a_page_of_another_site_does_nothing_without_the_key(
    relay: RelayProcess, engine: FakeEngine, method: str, path: str, body: str, headers: dict[str, str]
) -> None:
    refused = asks(relay, method, path, body, **headers)
    assert (refused.status, refused.json()["error"]["type"]) == (403, "permission_error")
    assert "access-control-allow-origin" not in refused.headers
    assert engine.call()["requests"] == 0
    assert relay.controller.requests == []
    assert asks(relay, method, path, body, **headers, authorization=f"Bearer {KEY}").status in (200, 503)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST", "[::1]:{}", "[::1]", "web.localhost", "myhost:{}"]
)
@pytest.mark.parametrize("headers", [{}, {"sec_fetch_site": "none"}, {"sec_fetch_site": "same-origin"}])
def test_the_users_own_programs_pass(relay: RelayProcess, host: str, headers: dict[str, str]) -> None:
    assert (
        asks(relay, "POST", "/v1/chat/completions", CHAT, **{"host": host.format(relay.port), **headers}).status == 200
    )


def test_health_is_open_to_pages_too(relay: RelayProcess) -> None:
    assert asks(relay, "GET", "/health", origin="https://attacker.example").status == 200


def test_an_allowed_page_calls_and_reads_plain_and_streamed_answers_and_refusals(
    relay: RelayProcess, engine: FakeEngine
) -> None:
    question = asks(
        relay,
        "OPTIONS",
        "/v1/chat/completions",
        origin=PAGE,
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type",
    )
    assert question.status == 204
    assert question.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in question.headers["access-control-allow-methods"]
    stream = CHAT[:-1] + ', "stream": true}'
    answers = [
        question,
        asks(relay, "POST", "/v1/chat/completions", CHAT, origin=PAGE, sec_fetch_site="cross-site"),
        asks(relay, "POST", "/v1/chat/completions", stream, origin=PAGE),
        asks(relay, "POST", "/v1/chat/completions", '{"model": "other"}', origin=PAGE),
        asks(relay, "POST", "/v1/chat/completions", "none", origin=PAGE),
        asks(relay, "GET", "/v1/models", origin=PAGE),
    ]
    assert [answer.status for answer in answers] == [204, 200, 200, 404, 400, 200]
    for answer in answers:
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (PAGE, "origin")
    assert all("access-control-request" not in head.lower() for head in engine.call()["heads"])


def test_another_page_gets_no_answer_to_its_question(relay: RelayProcess) -> None:
    question = asks(relay, "OPTIONS", "/v1/models", origin="https://x.example", access_control_request_method="GET")
    assert question.status == 403


def test_everyone_needs_the_key_where_the_user_says_so(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path) as relay:
        relay.controller.send_table([backend(1, engine.port)], proxy={"require_key": True})
        assert asks(relay, "POST", "/v1/chat/completions", CHAT).status == 401
        assert asks(relay, "POST", "/v1/chat/completions", CHAT, authorization=f"Bearer {KEY}").status == 200
        assert asks(relay, "GET", "/health").status == 200


def test_every_refusal_has_an_id_that_the_log_names(relay: RelayProcess) -> None:
    refusals = [
        asks(relay, "GET", "/stats", origin="null"),
        asks(relay, "POST", "/v1/chat/completions", "none"),
        asks(relay, "POST", "/v1/chat/completions", '{"model": "o\u001b[2J"}'),
    ]
    for refusal in refusals:
        assert refusal.status >= 400
        assert refusal.headers["x-request-id"] in relay.log()
    assert "\x1b" not in relay.log()


# What counts as an answer.


class ScriptedEngine:
    """A server that gives every POST the same bytes, then closes the connection unless told otherwise."""

    def __init__(self, answer: bytes, closes: bool = True) -> None:
        self.answer, self.closes = answer, closes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                if data.startswith(b"GET"):
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                sock.sendall(self.answer)
                if self.closes:
                    return

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def relay_before(tmp_path: Path, answer: bytes, closes: bool = True, **proxy: Any) -> Iterator[RelayProcess]:
    engine = ScriptedEngine(answer, closes)
    try:
        with RelayProcess(tmp_path) as relay:
            relay.controller.send_table([backend(1, engine.port)], proxy=proxy)
            yield relay
    finally:
        engine.close()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
ERROR = b'data: {"error":{"message":"the engine core died","code":500}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("events", [ERROR, ERROR + DONE, DELTA + ERROR, DELTA + ERROR + DONE])
def test_an_error_in_a_stream_reaches_the_client_and_counts_as_one(tmp_path: Path, events: bytes) -> None:
    with relay_before(tmp_path, STREAM + events) as relay, Client(relay.port) as client:
        assert client.chat(stream=True).body == events
        (turn,) = relay.controller.finished()
        assert (turn["outcome"], turn["error"], turn["status"]) == ("error", "the engine core died", 200)
        assert wait_for(lambda: [each for each in relay.controller.gauges if each["counters"]["errors"] == 1], "it")


def test_ten_streams_without_done_eject_nobody(tmp_path: Path) -> None:
    with relay_before(tmp_path, STREAM + DELTA + STOP) as relay:
        for _ in range(10):
            with Client(relay.port) as client:
                assert client.chat(stream=True).body == DELTA + STOP
        turns = relay.controller.finished(10)
        assert {(turn["outcome"], turn["finish_reason"], turn["backend"]) for turn in turns} == {
            ("completed", "stop", "r1")
        }


def test_a_stream_without_a_finish_reason_is_cut(tmp_path: Path) -> None:
    with relay_before(tmp_path, STREAM + DELTA) as relay, Client(relay.port) as client:
        assert json.loads(client.chat(stream=True).events()[-1])["error"]["code"] == "replica_lost"
        assert relay.controller.finished()[0]["outcome"] == "cut"


WHOLE = b'{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}],"usage":{}}'


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_plain_answer_that_ends_with_its_connection_is_whole_or_an_error(tmp_path: Path, cut: int) -> None:
    body = WHOLE[: len(WHOLE) - cut]
    with relay_before(tmp_path, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + body) as relay:
        with Client(relay.port) as client:
            answer = client.chat()
        assert answer.status in ((502, 503) if cut else (200,))  # it counts as a dead replica's: another one is tried
        assert cut or answer.body == WHOLE


# The end.


def test_a_second_signal_tells_the_clients_of_plain_turns_and_streams(relay: RelayProcess, engine: FakeEngine) -> None:
    engine.call({"hang": True})
    with Client(relay.port) as plain, Client(relay.port) as streaming:
        plain.sock.sendall(request())
        engine.wait_for("running", 1)
        engine.call({"held_after": 1})
        streaming.sock.sendall(request(stream=True))
        assert b"data: " in streaming.sock.recv(65536)
        for _ in range(2):
            os.kill(relay.process.pid, signal.SIGTERM)
            wait_for(lambda: "stopping" in relay.log(), "the signal")
        refused = plain.read()
        assert (refused.status, refused.json()["error"]["message"]) == (503, "the proxy was stopped")
        rest = b""
        while data := streaming.sock.recv(65536):
            rest += data
        assert b'"error": {"message": "the proxy was stopped"' in rest
        assert rest.endswith(b"0\r\n\r\n")
        relay.process.wait(PATIENCE_S)


# Greedy clients, and engines that refuse.


def begin(relay: RelayProcess, stack: contextlib.ExitStack, **options: Any) -> Client:
    """A client that has asked, and whose answer is still to come."""
    client = stack.enter_context(Client(relay.port))
    name = options.pop("name", "someone")
    client.sock.sendall(request(**options).replace(b"Host: t\r\n", b"Host: t\r\nX-Client-ID: %b\r\n" % name.encode()))
    return client


def waiting(relay: RelayProcess) -> int:
    with Client(relay.port) as client:
        return int(client.get("/queue/status").json()["pending"])


def test_a_full_queue_has_room_for_a_client_that_waits_with_less(tmp_path: Path, engine: FakeEngine) -> None:
    engine.call({"held": True})
    with RelayProcess(tmp_path) as relay, contextlib.ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port, slots=1)], proxy={"max_queue": 4})
        greedy = []
        for count in range(5):
            greedy.append(begin(relay, stack, name="greedy"))
            wait_for(lambda count=count: waiting(relay) == count, "it to wait")  # type: ignore[misc]
        with Client(relay.port) as another:
            assert another.chat({"X-Client-ID": "greedy"}).status == 429
        modest = begin(relay, stack, name="modest")
        refused = greedy.pop().read()
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        engine.call({})
        engine.call({"release": True})
        assert [client.read().status for client in [*greedy, modest]] == [200] * 5


def test_the_body_of_a_stream_that_runs_is_held_no_longer(tmp_path: Path, engine: FakeEngine) -> None:
    engine.call({"held_after": 1})
    with RelayProcess(tmp_path) as relay, contextlib.ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port, slots=50)], proxy={"max_buffered_mb": 1})
        for _ in range(10):
            client = begin(relay, stack, stream=True, padding="x" * 300_000)
            assert client.sock.recv(12) == b"HTTP/1.1 200"
            assert b"data: " in client.sock.recv(65536)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("after", ["60", "99999", "999999999999999999999"])
def test_a_client_learns_at_once_that_an_engine_wants_to_be_left_alone(tmp_path: Path, status: int, after: str) -> None:
    body = b'{"error":{"message":"too many"}}'
    fields = f"Retry-After: {after}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"HTTP/1.1 {status} No\r\n{fields}\r\n\r\n"
    with relay_before(tmp_path, head.encode() + body, closes=False) as relay, Client(relay.port) as client:
        first, second = client.chat(), client.chat()
        if len(after) < 9:
            assert (first.status, first.headers["retry-after"], first.body) == (status, after, body)
            assert (second.status, int(second.headers["retry-after"]) > 50) == (429, True)
        turns = relay.controller.finished(2)
        assert {turn["outcome"] for turn in turns} == {"rejected"}


def test_a_short_refusal_is_waited_for_and_not_for_a_minute(tmp_path: Path) -> None:
    head = b"HTTP/1.1 429 No\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"
    with relay_before(tmp_path, head, closes=False, queue_timeout=PATIENCE_S) as relay, Client(relay.port) as client:
        assert client.chat().status == 429
        assert relay.controller.finished()[0]["queue_ms"] < 10_000


def test_a_connection_without_a_request_is_closed_soon_and_one_with_is_kept(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path, STRANGER_S=0.3) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as known, Client(relay.port) as stranger:
            assert known.chat().status == 200
            assert stranger.is_closed()
            assert known.chat().status == 200


def test_strangers_make_room_when_descriptors_run_out(tmp_path: Path, engine: FakeEngine) -> None:
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
    with RelayProcess(tmp_path, prelude=prelude) as relay, contextlib.ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port)])
        for _ in range(200):
            stack.enter_context(Client(relay.port))
        wait_for(lambda: "no connection can be accepted" in relay.log(), "the lack of descriptors")
        with Client(relay.port) as client:
            assert client.chat().status == 200


# What clients expect.


def test_models_are_listed_as_their_engines_report_them(tmp_path: Path) -> None:
    """The shortest context counts; an adapter is a model of its own, and its turns go to its base."""
    with FakeEngine() as one, FakeEngine() as two, RelayProcess(tmp_path) as relay:
        row = {"id": "m", "object": "model", "created": 1700, "root": "org/m"}
        adapter = {"id": "org/sql", "parent": "m", "root": "/sql", "created": 1800}
        one.call({"models": [{**row, "max_model_len": 32768}, adapter]})
        two.call({"models": [{**row, "max_model_len": 16384}, adapter]})
        relay.controller.send_table([backend(1, one.port), backend(2, two.port)], proxy={"health_check_interval": 0.1})
        with Client(relay.port) as client:
            wait_for(lambda: client.get("/v1/models/m").json().get("max_model_len") == 16384, "what the engines say")
            listed = client.get("/v1/models").json()["data"]
            assert [(each["id"], each.get("parent")) for each in listed] == [("m", None), ("org/sql", "m")]
            assert (listed[0]["created"], listed[0]["root"]) == (1700, "org/m")
            for path in ("/v1/models/org/sql", "/v1/models/org%2Fsql", "/v1//models/org/sql/"):
                assert client.get(path).json() == listed[1]
            assert client.post("/v1/chat/completions", {"model": "org/sql", "messages": []}).status == 200
            assert '"model": "org/sql"' in one.call()["body"] + two.call()["body"]
            unknown = client.get("/v1/models/nope")
            assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1//chat/completions", "//v1/chat/completions", "/v1/chat/completions/"])
def test_slashes_too_many_mean_nothing(relay: RelayProcess, path: str) -> None:
    assert asks(relay, "POST", path, CHAT).status == 200
    assert asks(relay, "GET", path.replace("chat/completions", "models")).json()["data"]


def test_a_base_url_without_v1_gets_a_hint(relay: RelayProcess) -> None:
    missing = asks(relay, "POST", "/chat/completions", CHAT)
    assert missing.status == 404
    assert "the base URL ends in /v1" in missing.json()["error"]["message"]


@pytest.mark.parametrize(("coding", "status"), [("gzip", 200), ("identity", 200), ("zstd", 415), ("br", 415)])
def test_compressed_bodies_are_decoded_or_refused_by_name(
    relay: RelayProcess, engine: FakeEngine, coding: str, status: int
) -> None:
    body = gzip.compress(CHAT.encode()) if coding == "gzip" else CHAT.encode()
    with Client(relay.port) as client:
        answer = client.post("/v1/chat/completions", body, {"Content-Encoding": coding})
        assert answer.status == status
        assert status == 200 or coding in answer.json()["error"]["message"]
        assert client.chat().status == 200
    assert engine.call()["body"].startswith("{")
    assert all("content-encoding" not in head.lower() for head in engine.call()["heads"])


@pytest.mark.parametrize(
    ("status", "said", "returned"),
    [
        (501, "This server does not support embeddings", 400),
        (500, "image input is not supported", 400),
        (500, "CUDA error: operation not supported", 500),
    ],
)
def test_what_an_engine_cannot_do_is_no_error_that_sdks_try_again(
    tmp_path: Path, status: int, said: str, returned: int
) -> None:
    body = json.dumps({"error": {"message": said, "code": status}}).encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with relay_before(tmp_path, head.encode() + body, closes=False) as relay, Client(relay.port) as client:
        answer = client.chat()
        assert (answer.status, answer.body) == (returned, body)
        (turn,) = relay.controller.finished()
        assert (turn["outcome"], turn["status"], turn["error"]) == ("error", returned, said)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_answers_have_the_same_headers_and_refusals_the_same_words_plain_or_streamed(
    relay: RelayProcess, engine: FakeEngine, path: str
) -> None:
    """Each API's client library builds its exceptions from the status and the shape of the body."""
    relay.controller.send_table([backend(1, engine.port)], models=["m", "down"])
    framing = {"content-type", "content-length", "transfer-encoding"}
    requests: list[tuple[dict[str, Any], int]] = [
        ({"model": "m"}, 200),
        ({"model": "other"}, 404),
        ({"model": 7}, 400),
        ({"model": "down"}, 503),
        ({"model": "m", "fake": {"cut": "before"}}, 502),
        ({"model": "m", "fake": {"status": 422}}, 422),  # the engine's own words
    ]
    with Client(relay.port) as client:
        for document, status in requests:
            plain, streamed = (client.post(path, {**document, "stream": stream}) for stream in (False, True))
            assert plain.status == streamed.status == status
            assert plain.headers.keys() - framing == streamed.headers.keys() - framing
            assert "x-request-id" in plain.headers
            if status != 200:
                assert plain.body == streamed.body
                error = plain.json()
                assert error["error"]["message"]
                assert status == 422 or (error.get("type") == "error") == (path == "/v1/messages")


def test_an_old_client_that_asks_keeps_its_connection(relay: RelayProcess) -> None:
    head = b"POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(CHAT)
    with Client(relay.port) as client:
        for data in (head + CHAT.encode(), head.replace(b"chat/", b"none/") + CHAT.encode(), head + b"x" * len(CHAT)):
            assert client.raw(data).headers["connection"] == "keep-alive"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_own", [True, False])
def test_nothing_is_sent_to_another_users_server_on_a_replicas_port(tmp_path: Path, is_own: bool) -> None:
    """As after a crash of ours. Where it was never ours (verb `proxy`), it may be anybody's."""
    script = (
        "import os, socket; os.setuid(65534); l = socket.create_server(('127.0.0.1', 0))\n"
        "print(l.getsockname()[1], flush=True)\n"
        "while True:\n"
        "    s, _ = l.accept(); d = s.recv(99999)\n"
        "    if not d.startswith(b'GET /health'): print(d, flush=True)\n"
        "    s.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\n{}'); s.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            row = backend(1, int(other.stdout.readline()), is_own=is_own, telemetry_port=None)
            with RelayProcess(tmp_path) as relay, Client(relay.port) as client:
                relay.controller.send_table([row])
                answer = client.chat()
                assert answer.status == (503 if is_own else 200)
                assert not is_own or "another user's server listens on its port" in answer.json()["error"]["message"]
        finally:
            other.kill()
        assert ("replica-key" in other.stdout.read()) is not is_own


def test_a_server_of_ours_is_proven_and_used(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path) as relay, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port, is_own=True)])
        assert [client.chat().status for _ in range(3)] == [200] * 3

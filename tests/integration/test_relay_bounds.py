"""What could go on for ever in the relay and must not: retries, interim answers, a lack of descriptors, bugs."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import wait_for
from relay_harness import Answer, Client, RelayProcess, backend, request


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


def error_of(answer: Answer) -> str:
    return str(answer.json()["error"]["message"])


# Clients that are slow to take their answer.


@contextlib.contextmanager
def narrow_relay(tmp_path: Path, **proxy: Any) -> Iterator[tuple[RelayProcess, FakeEngine]]:
    """A relay whose sockets to its clients take a few kilobytes, and an engine behind it."""
    with RelayProcess(tmp_path) as relay, FakeEngine() as engine:
        relay.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # accepted ones have the same
        relay.controller.send_table([backend(1, engine.port)], proxy=proxy, drain_seconds=0.3)
        yield relay, engine


def slow_client(relay: RelayProcess) -> Client:
    """One that takes little at once, and whose head the relay knows: callbacks serve it."""
    client = Client(relay.port, is_narrow=True)
    for _ in range(2):
        assert client.raw(request()).status == 200
    return client


@pytest.mark.parametrize("fake", [{"size": 50_000}, {"say": "x" * 5_000}], ids=["whole", "stream"])
def test_a_connection_is_watched_again_after_an_answer_that_its_client_took_slowly(
    tmp_path: Path, fake: dict[str, Any]
) -> None:
    with narrow_relay(tmp_path, request_timeout=5.0) as (relay, engine), slow_client(relay) as slow:
        slow.sock.sendall(request(stream="say" in fake, fake=fake))
        engine.wait_for("requests", 3)
        engine.wait_for("running", 0)
        assert slow.read().is_complete
        with Client(relay.port) as other:
            assert other.chat().status == 200


def test_a_stop_in_the_middle_of_a_whole_answer_ends_it_there(tmp_path: Path) -> None:
    def read(client: Client) -> bytes:
        received = b""
        while data := client.sock.recv(600):  # all the time, so that whatever the relay says can go out
            received += data
            time.sleep(0.01)
        return received

    with narrow_relay(tmp_path) as (relay, engine), ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        clients = [stack.enter_context(slow_client(relay)) for _ in range(8)]
        before = engine.call()["requests"]
        for client in clients:
            client.sock.sendall(request(fake={"size": 60_000}))
        engine.wait_for("requests", before + len(clients))
        engine.wait_for("running", 0)
        relay.process.send_signal(signal.SIGTERM)
        answers = list(pool.map(read, clients))
        assert relay.process.wait(PATIENCE_S) == 0
    assert {answer[:13] for answer in answers} == {b"HTTP/1.1 200 "}
    assert [answer.count(b"HTTP/1.1") for answer in answers] == [1] * len(clients)


# Retries.


def test_when_the_retries_are_spent_a_turn_is_told_so_and_more_come_with_more_requests(tmp_path: Path) -> None:
    """One retry is there, and half of one comes with each request."""
    with RelayProcess(tmp_path, RETRY_FLOOR=1.0, RETRY_SHARE=0.5) as relay, ExitStack() as stack:
        engines = [stack.enter_context(FakeEngine()) for _ in range(4)]
        rows = [backend(number, engine.port) for number, engine in enumerate(engines)]
        proxy = {"strategy": "round_robin", "health_check_interval": 3600.0, "max_retries": 100}
        relay.controller.send_table(rows, proxy=proxy)
        for engine in engines:
            engine.wait_for("probes", 1)
        for engine in engines[:3]:
            engine.kill()
        with Client(relay.port) as client:
            refused = client.chat()
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "retry budget" in error_of(refused)
            assert client.chat().headers["x-agent-infra-backend"] == "r3"
        assert [turn["retries"] for turn in relay.controller.finished(2)] == [1, 1]


def test_without_a_retry_left_a_turn_that_lost_its_replica_is_not_sent_again(tmp_path: Path) -> None:
    with RelayProcess(tmp_path, RETRY_FLOOR=0.0) as relay, FakeEngine() as one, FakeEngine() as other:
        relay.controller.send_table([backend(1, one.port), backend(2, other.port)])
        with Client(relay.port) as client:
            answer = client.chat(fake={"die": "before"})
            assert (answer.status, answer.json()["error"]["code"]) == (502, "replica_lost")
            assert "retry budget" in error_of(answer)
            assert client.chat().status == 200
        assert [turn["retries"] for turn in relay.controller.finished(2)] == [0, 0]


def test_a_replica_that_is_always_busy_and_says_come_at_once_is_not_asked_without_end(relay: RelayProcess) -> None:
    with FakeEngine(status=503, retry_after=0) as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)], proxy={"queue_timeout": 1.2})
        answer = client.chat()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "no slot came free" in error_of(answer)
        assert engine.call()["requests"] <= 4


def test_a_client_that_leaves_between_two_tries_ends_them(relay: RelayProcess) -> None:
    with FakeEngine(status=503, retry_after=4) as busy, Client(relay.port) as operator:
        relay.controller.send_table([backend(1, busy.port)])
        with Client(relay.port) as client:
            client.sock.sendall(request())
            wait_for(lambda: operator.get("/queue/status").json()["pending"] == 1, "the turn in the queue again")
        [turn] = relay.controller.finished()
        assert (turn["outcome"], turn["status"]) == ("aborted", 0)
        assert operator.get("/queue/status").json()["pending"] == 0
        busy.call({})
        assert operator.chat().status == 200
        assert busy.call()["requests"] == 2


def test_a_client_that_leaves_while_its_replica_is_called_ends_the_call(relay: RelayProcess) -> None:
    """A listener whose queue is full answers no call: it would last until connect_timeout, and then go elsewhere."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, FakeEngine() as other, ExitStack() as stack:
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        rows = [backend(1, listener.getsockname()[1]), backend(2, other.port)]
        relay.controller.send_table(rows, proxy={"strategy": "round_robin", "connect_timeout": 3600.0})
        with Client(relay.port) as client, Client(relay.port) as operator:
            client.sock.sendall(request())
            wait_for(lambda: operator.get("/queue/status").json()["in_flight"] == 1, "the turn on its way")
        [turn] = relay.controller.finished()
        assert (turn["outcome"], turn["backend"], turn["retries"]) == ("aborted", "r1", 0)
        assert other.call()["requests"] == 0


# Interim answers.


WELL = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"


@contextlib.contextmanager
def bare_server(answer: Callable[[socket.socket], None], health: bytes = WELL) -> Iterator[int]:
    """The port of a server that calls ``answer`` for each POST, on its connection, and says ``health`` to a probe."""

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                if data.startswith(b"POST"):
                    answer(sock)
                else:
                    sock.sendall(health)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


FINAL = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def test_thousands_of_interim_answers_at_once_are_passed_over(relay: RelayProcess) -> None:
    with bare_server(lambda sock: sock.sendall(INTERIM * 5000 + FINAL)) as port, Client(relay.port) as client:
        relay.controller.send_table([backend(1, port)])
        for _ in range(3):
            answer = client.chat()
            assert (answer.status, answer.body) == (200, b"{}")


def test_interim_answers_without_end_are_an_answer_that_does_not_come(relay: RelayProcess, engine: FakeEngine) -> None:
    def hint_for_ever(sock: socket.socket) -> None:
        while True:
            sock.sendall(INTERIM * 1000)

    with bare_server(hint_for_ever) as port, Client(relay.port) as client, Client(relay.port) as other:
        rows = [backend(1, port, model="hinting"), backend(2, engine.port)]
        relay.controller.send_table(rows, proxy={"request_timeout": 4.0})
        client.sock.sendall(request(model="hinting"))
        wait_for(lambda: other.get("/queue/status").json()["in_flight"] == 1)
        relay.controller.send_table(rows)
        with Client(relay.port) as third:
            assert third.chat().status == 200
        assert client.read().status == 504


# Counts how often event-loop callbacks want to resume a client's greenlet, for its log.
COUNT_WAKES = """
import atexit, sys
import agent_infra_core.relay.connection as connection
count, wake = [0], connection.ClientConnection.wake
def counted(client):
    count[0] += 1
    wake(client)
connection.ClientConnection.wake = counted
atexit.register(lambda: print(f"wakes={count[0]}", file=sys.stderr))
"""


def test_interim_answers_without_end_do_not_keep_the_relay_busy(tmp_path: Path) -> None:
    def hint_for_ever(sock: socket.socket) -> None:
        while True:
            sock.sendall(INTERIM * 1000)

    with RelayProcess(tmp_path, prelude=COUNT_WAKES, INTERIM_PAUSE_S=0.2) as relay, bare_server(hint_for_ever) as port:
        relay.controller.send_table([backend(1, port)], proxy={"request_timeout": 2.0})
        with Client(relay.port) as client:
            assert client.chat().status == 504
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(PATIENCE_S) == 0
    # Ten looks at the replica; whatever else the two seconds had.
    assert int(relay.log().rpartition("wakes=")[2].split()[0]) < 200


def test_a_client_that_leaves_between_two_looks_at_interim_answers_aborts_its_turn(tmp_path: Path) -> None:
    hung_up = threading.Event()

    def hint_once(sock: socket.socket) -> None:
        sock.sendall(INTERIM)
        if not sock.recv(1):
            hung_up.set()

    with RelayProcess(tmp_path, INTERIM_PAUSE_S=1.0) as relay, bare_server(hint_once) as port:
        relay.controller.send_table([backend(1, port)])
        with Client(relay.port) as client:
            client.sock.sendall(request())
            wait_for(lambda: relay.controller.events, "the turn, with the replica")
            time.sleep(0.2)  # the relay has seen the hint, and looks again in a second
        assert hung_up.wait(PATIENCE_S)


def test_an_interim_answer_to_a_health_probe_is_not_yet_the_answer(relay: RelayProcess) -> None:
    unwell = INTERIM + INTERIM + b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    with bare_server(socket.socket.close, health=unwell) as port:
        relay.controller.send_table([backend(1, port)], proxy={"health_check_interval": 0.2})
        wait_for(lambda: "GET /health says 503" in relay.log(), "the probe's end")


# Descriptors.


def limit_descriptors(relay: RelayProcess, count: int) -> None:
    """Let the relay open no descriptor from the number ``count`` on; those that it has stay open."""
    pid, kind = relay.process.pid, resource.RLIMIT_NOFILE
    resource.prlimit(pid, kind, (count, resource.prlimit(pid, kind)[1]))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_short_of_descriptors_the_relay_serves_whom_it_has_and_accepts_the_others_later(
    relay: RelayProcess, engine: FakeEngine
) -> None:
    relay.controller.send_table([backend(1, engine.port)], proxy={"health_check_interval": 0.1})
    with Client(relay.port) as first, ExitStack() as stack:
        assert first.chat().status == 200
        limit_descriptors(relay, 80)
        clients = [stack.enter_context(Client(relay.port, timeout=PATIENCE_S)) for _ in range(120)]
        for client in clients:
            client.sock.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        wait_for(lambda: "no connection can be accepted" in relay.log(), "the lack of descriptors")
        spent, since = cpu_seconds(relay.process.pid), time.monotonic()
        # Those it has need connections to the replica, all of them at once.
        with ThreadPoolExecutor(8) as pool:
            assert [clients[number].read().status for number in range(8)] == [200] * 8
            answers = pool.map(lambda client: client.chat(fake={"delay": 0.5}).status, clients[:8])
            assert list(answers) == [200] * 8
        wait_for(lambda: time.monotonic() > since + 1.5, "what a busy loop would spend")
        assert cpu_seconds(relay.process.pid) - spent < 0.5 * (time.monotonic() - since)
        assert relay.log().count("no connection can be accepted") == 1
        for client in clients[:-20]:
            client.sock.close()
        assert [client.read().status for client in clients[-20:]] == [200] * 20
        assert first.chat().status == 200
    replica = relay.controller.gauges[-1]["backends"]["r1"]
    assert (replica["healthy"], replica["errors"]) == (True, 0)


def test_without_any_descriptor_left_a_turn_is_refused_and_no_replica_blamed(
    relay: RelayProcess, engine: FakeEngine
) -> None:
    relay.controller.send_table([backend(1, engine.port)], proxy={"health_check_interval": 0.1})
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        one, other, new = (stack.enter_context(Client(relay.port)) for _ in range(3))
        assert new.get("/health").status == 200  # it is accepted; for the next question, its owner is to be known
        assert (one.chat().status, other.get("/health").status) == (200, 200)
        assert other.chat().status == 200
        limit_descriptors(relay, 1)
        held = pool.submit(one.chat, fake={"held": True})
        engine.wait_for("requests", 3)
        refused = other.chat()
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "ulimit -n" in error_of(refused)
        refused = new.get("/v1/models")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "ulimit -n" in error_of(refused)
        count = len(relay.controller.gauges)
        wait_for(lambda: len(relay.controller.gauges) > count + 1, "gauges, and probes, without a descriptor")
        engine.call({"release": True})
        assert held.result().status == 200
        limit_descriptors(relay, 1000)
        assert [other.chat().status, new.get("/v1/models").status] == [200, 200]
        assert relay.controller.gauges[-1]["backends"]["r1"]["healthy"]
    assert "is out" not in relay.log()


# Bugs.


BUG = """
from agent_infra_core.http.events import EventStream
feed = EventStream.feed

def feed_with_a_bug(stream, data):
    return feed(stream, None if stream.events else data)

EventStream.feed = feed_with_a_bug
"""


def test_a_bug_ends_the_turn_that_met_it_and_is_counted_and_logged(tmp_path: Path, engine: FakeEngine) -> None:
    """The bug: a stream's second piece is more than the relay can take."""
    with RelayProcess(tmp_path, may_have_bugs=True, prelude=BUG) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as client, Client(relay.port) as other, ThreadPoolExecutor() as pool:
            other_turn = pool.submit(other.chat, fake={"held": True})
            engine.wait_for("running", 1)
            answer = client.chat(stream=True, fake={"gap": 0.05, "tokens": 1000})
            assert answer.is_complete
            assert json.loads(answer.events()[-1])["error"]["message"] == "the proxy failed on this answer"
            engine.call({"release": True})
            assert other_turn.result().status == 200
            assert client.chat().status == 200
        engine.wait_for("aborted", 1)
        assert sorted(turn["outcome"] for turn in relay.controller.finished(3)) == ["completed", "completed", "cut"]

        def settled() -> list[dict[str, Any]]:
            last = relay.controller.gauges[-1:]
            return [g for g in last if g["counters"]["errors"] == 1 and not g["backends"]["r1"]["in_flight"]]

        wait_for(settled, "the error in the counters, and nothing in flight")
        assert "an answer failed: " in relay.log()


def test_a_bug_while_a_slow_client_is_sent_its_answer_ends_that_turn(tmp_path: Path, engine: FakeEngine) -> None:
    """The bug: what is called for what a client did not take at once is no function."""
    with RelayProcess(tmp_path, may_have_bugs=True, memoryview=None) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as slow, Client(relay.port) as other:
            slow.sock.sendall(request(fake={"size": 30_000_000, "framing": "chunked"}))
            [turn] = relay.controller.finished()
            assert turn["outcome"] != "completed"
            assert other.chat().status == 200
            assert not slow.read().is_complete
        assert "an answer failed: TypeError" in relay.log()

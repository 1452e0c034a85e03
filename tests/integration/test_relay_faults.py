"""What the relay does when things break: replicas that die, hang or refuse, clients that misbehave, signals."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from relay_harness import Answer, Client, RelayProcess, backend, wait_until


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path, HEAD_S=0.4, BODY_S=0.4, LINGER_S=0.2) as relay:
        yield relay


def serve(relay: RelayProcess, *engines: FakeEngine, slots: int = 0, **proxy: Any) -> None:
    rows = [backend(number, engine.port, slots=slots) for number, engine in enumerate(engines, 1)]
    relay.controller.send_table(rows, models=["m"], proxy=proxy)


def chat(relay: RelayProcess, *, stream: bool = False, session: str = "", **fake: Any) -> Answer:
    with Client(relay.port, timeout=20) as client:
        return client.chat({"X-Session-ID": session} if session else {}, stream=stream, fake=fake)


def error_of(answer: Answer) -> str:
    return str(answer.json()["error"]["message"])


# Requests that are refused.


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding\t: chunked\r\n",
        b"X: 1\nContent-Length: 4\r\n",
    ],
)
def test_doubtful_framing_is_answered_400_and_closed(relay: RelayProcess, engine: FakeEngine, lines: bytes) -> None:
    serve(relay, engine)
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: t\r\n\r\n"
    with Client(relay.port) as client:
        answer = client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n" + lines + b"\r\n" + smuggled)
        assert answer.status == 400
        assert answer.headers["connection"] == "close"
        assert client.is_closed()
    assert engine.call()["requests"] == 0


def test_a_bad_chunk_is_answered_400_and_closed(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Client(relay.port) as client:
        assert client.raw(head + b"2\r\n{}X\r\n0\r\n\r\n").status == 400
        assert client.is_closed()


def test_a_head_beyond_the_limit_is_431(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as client:
        assert client.raw(b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X: y\r\n" * 20_000).status == 431


def test_a_slow_head_and_a_slow_body_are_408(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    for data in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n{"):
        with Client(relay.port) as client:
            assert client.raw(data).status == 408
            assert client.is_closed()


@pytest.mark.parametrize("framing", ["Content-Length: 3000000", "Transfer-Encoding: chunked"])
def test_a_body_beyond_the_limit_is_413(relay: RelayProcess, engine: FakeEngine, framing: str) -> None:
    serve(relay, engine, max_body_mb=1.0)
    with Client(relay.port) as client:
        client.sock.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: t\r\n{framing}\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(30):
                client.sock.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
        assert client.read().status == 413
    assert chat(relay).status == 200


def test_bodies_together_beyond_the_limit_are_429_and_their_room_comes_back(
    relay: RelayProcess, engine: FakeEngine
) -> None:
    serve(relay, engine, max_buffered_mb=1.0)
    with Client(relay.port) as first, Client(relay.port) as second, ThreadPoolExecutor() as pool:
        held = pool.submit(first.chat, padding="x" * 900_000, fake={"delay": 0.6})
        engine.wait_for("running", 1)
        answer = second.chat(padding="x" * 900_000)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert held.result().status == 200
    with Client(relay.port) as third:
        assert third.chat(padding="x" * 900_000).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model": 3}', 400),
        ("/v1/chat/completions", b'{"model": "other"}', 404),
        ("/other/v1/chat/completions", b"{}", 404),
        ("/m/v1/chat/completions", b'{"model": "other"}', 400),
        ("/v1/chat/completions", b"{}", 200),
    ],
)
def test_a_request_for_no_model_is_told_so_on_a_connection_that_stays(
    relay: RelayProcess, engine: FakeEngine, path: str, body: bytes, status: int
) -> None:
    serve(relay, engine)
    with Client(relay.port) as client:
        answer = client.post(path, body)
        assert answer.status == status
        assert status == 200 or answer.json()["error"]["type"]
        assert client.chat().status == 200


def test_an_error_on_the_messages_path_has_anthropics_shape(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as client:
        assert client.post("/v1/messages", {"model": "other"}).json()["type"] == "error"


def test_noise_never_desynchronises_or_ends_the_relay(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    chance = random.Random(7)
    good = b'POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 13\r\n\r\n{"model":"m"}'
    chunked = (
        b'POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"model":"m"}\r\n0\r\n\r\n'
    )
    for _ in range(300):
        data = bytearray(chance.choice((good, chunked)))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice(b"\r\n\0: ;,0aA\xff" + bytes([chance.randrange(256)]))
        with Client(relay.port, timeout=3) as client:
            client.sock.sendall(bytes(data))
            client.sock.shutdown(socket.SHUT_WR)
            while (answer := client.read()).status:
                assert answer.status in (200, 400, 404, 405, 408, 413, 414, 431, 501)
    assert chat(relay).status == 200


def test_every_split_of_a_request_is_the_same_request(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    request = (
        b'POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"model":"m"}\r\n0\r\n\r\n'
    )
    with Client(relay.port) as client:
        for cut in range(1, len(request)):
            client.sock.sendall(request[:cut])
            client.sock.sendall(request[cut:] + request)
            assert [client.read().status, client.read().status] == [200, 200]


# Waiting for a slot.


def test_a_turn_waits_for_a_slot_and_the_wait_is_told(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(chat, relay, delay=0.5)
        engine.wait_for("running", 1)
        second = pool.submit(chat, relay)
        with Client(relay.port) as client:
            status = wait_until(lambda: (s := client.get("/queue/status").json())["pending"] and s)
        assert status["in_flight"] == 1
        assert status["waiting"][0]["model"] == "m"
        assert int(first.result().headers["x-agent-infra-queue-ms"]) < 100
        assert int(second.result().headers["x-agent-infra-queue-ms"]) > 100


def test_a_full_queue_is_429_and_a_late_slot_503(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1, max_queue=1, queue_timeout=0.5)
    with ThreadPoolExecutor() as pool:
        pool.submit(chat, relay, delay=2.0)
        engine.wait_for("running", 1)
        late = pool.submit(chat, relay)
        with Client(relay.port) as client:
            wait_until(lambda: client.get("/queue/status").json()["pending"])
        full = chat(relay)
        assert (full.status, full.headers["retry-after"]) == (429, "1")
        assert (late.result().status, late.result().headers["retry-after"]) == (503, "1")
    assert [turn["outcome"] for turn in relay.controller.finished(3)].count("rejected") == 2


def test_the_session_that_had_least_is_served_first(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1)
    chat(relay, session="greedy", delay=1.0)
    with ThreadPoolExecutor() as pool:
        pool.submit(chat, relay, delay=0.6)
        engine.wait_for("running", 1)
        with Client(relay.port) as client:
            waiting = []
            for number, session in enumerate(("greedy", "modest"), 1):
                waiting.append(pool.submit(chat, relay, session=session))
                wait_until(lambda n=number: client.get("/queue/status").json()["pending"] == n)  # type: ignore[misc]
        greedy, modest = (int(turn.result().headers["x-agent-infra-queue-ms"]) for turn in waiting)
    ended = [turn["turn"] for turn in relay.controller.finished(4)]
    started = {e["turn"]: e["session"] for e in relay.controller.events if e["kind"] == "started"}
    assert [started[turn] for turn in ended][-2:] == ["modest", "greedy"], (greedy, modest)


def test_a_client_that_leaves_the_queue_takes_no_slot(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(chat, relay, delay=0.5)
        engine.wait_for("running", 1)
        with Client(relay.port) as client, Client(relay.port) as watcher:
            client.sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n{}")
            wait_until(lambda: watcher.get("/queue/status").json()["pending"])
            client.sock.close()
            wait_until(lambda: not watcher.get("/queue/status").json()["pending"])
        first.result()
    assert chat(relay).status == 200
    assert engine.call()["requests"] == 2


def test_turns_wait_for_a_model_that_is_loading_without_a_timeout(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([], models=["m"], loading=["m"], proxy={"queue_timeout": 0.2})
    with ThreadPoolExecutor() as pool, Client(relay.port) as client:
        turn = pool.submit(chat, relay)
        wait_until(lambda: client.get("/queue/status").json()["oldest_ms"] > 600)
        assert client.get("/health").json()["status"] == "starting"
        serve(relay, engine)
        assert turn.result().status == 200


def test_no_replica_at_all_is_503_within_a_second(relay: RelayProcess) -> None:
    relay.controller.send_table([], models=["m"])
    started = time.monotonic()
    answer = chat(relay)
    assert answer.status == 503
    assert "no replica" in error_of(answer)
    assert time.monotonic() - started < 1.0


def test_all_replicas_down_is_503_within_a_second(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other:
        serve(relay, one, other)
        assert chat(relay).status == 200
        one.kill()
        other.kill()
        started = time.monotonic()
        assert chat(relay).status == 503
        assert chat(relay).json()["error"]["type"] == "service_unavailable_error"
        assert time.monotonic() - started < 1.0


# Replicas that fail.


def test_a_replica_that_dies_in_mid_stream_is_told_by_an_error_event(relay: RelayProcess) -> None:
    with FakeEngine() as engine:
        serve(relay, engine)
        answer = chat(relay, stream=True, tokens=10, die=4, gap=0.02)
    assert answer.is_complete
    assert "error" in json.loads(answer.events()[-1])
    assert "[DONE]" not in answer.events()
    [turn] = relay.controller.finished()
    assert (turn["outcome"], turn["status"]) == ("cut", 200)


@pytest.mark.parametrize("how", ["before", "middle"])
def test_a_replica_that_dies_before_its_answer_is_whole_is_replaced_by_another(relay: RelayProcess, how: str) -> None:
    with FakeEngine(die=how) as dying, FakeEngine() as living:
        serve(relay, dying, living, strategy="round_robin")
        assert [chat(relay).status for _ in range(4)] == [200] * 4
    assert sum(turn["retries"] for turn in relay.controller.finished(4)) == 1


def test_a_replica_that_dies_before_its_first_event_is_replaced_by_another(relay: RelayProcess) -> None:
    with FakeEngine(die=0) as dying, FakeEngine() as living:
        serve(relay, dying, living, strategy="round_robin")
        answers = [chat(relay, stream=True) for _ in range(2)]
    assert [answer.events()[-1] for answer in answers] == ["[DONE]"] * 2


def test_a_prompt_that_kills_engines_reaches_two_at_most(relay: RelayProcess) -> None:
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(FakeEngine()) for _ in range(4)]
        serve(relay, *engines)
        for _ in range(8):
            assert chat(relay).status == 200  # so that idle connections exist, whose end might look like a mere race
        answer = chat(relay, die="before")
        assert answer.status == 502
        assert "not sent again" in error_of(answer)
        assert sum(engine.process.poll() is not None for engine in engines) == 2


def test_a_live_replica_that_breaks_off_is_not_sent_the_request_again(relay: RelayProcess) -> None:
    with FakeEngine(cut="before") as one, FakeEngine(cut="before") as other:
        serve(relay, one, other)
        assert chat(relay).status == 502
        assert one.call()["requests"] + other.call()["requests"] == 1


def test_a_live_replicas_error_passes_through(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    for status in (500, 400, 422):
        answer = chat(relay, status=status)
        assert (answer.status, error_of(answer)) == (status, "as asked")
    gauges = wait_until(lambda: [g for g in relay.controller.gauges if g["counters"]["requests"] == 3])[-1]
    assert gauges["backends"]["r1"]["errors"] == 1
    assert gauges["backends"]["r1"]["healthy"]


def test_an_error_of_a_replica_that_died_of_it_is_retried_elsewhere(relay: RelayProcess) -> None:
    with FakeEngine(status=500, health=503) as sick, FakeEngine() as well:
        serve(relay, sick, well, strategy="round_robin", health_check_interval=3600.0)
        assert [chat(relay).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("status", [429, 503])
def test_a_replica_that_is_too_busy_is_passed_over(relay: RelayProcess, status: int) -> None:
    with FakeEngine(status=status) as busy, FakeEngine() as free:
        serve(relay, busy, free, strategy="round_robin")
        assert [chat(relay).status for _ in range(6)] == [200] * 6
        assert busy.call()["requests"] <= 2


def test_a_turn_that_all_replicas_are_too_busy_for_waits_in_the_queue(relay: RelayProcess) -> None:
    with FakeEngine(status=503, retry_after=1) as busy, ThreadPoolExecutor() as pool:
        serve(relay, busy)
        turn = pool.submit(chat, relay)
        busy.wait_for("requests", 1)
        busy.call({})
        assert turn.result().status == 200
        assert int(turn.result().headers["x-agent-infra-queue-ms"]) > 800


def test_an_engine_that_was_shut_down_is_a_dead_one(relay: RelayProcess) -> None:
    with FakeEngine(finish_reason="abort") as ending, FakeEngine() as living:
        serve(relay, ending, living, strategy="round_robin")
        assert [chat(relay).json()["choices"][0]["finish_reason"] for _ in range(2)] == ["stop"] * 2


def test_a_stream_that_an_engines_shutdown_ends_is_told(relay: RelayProcess) -> None:
    with FakeEngine(finish_reason="abort") as ending:
        serve(relay, ending)
        answer = chat(relay, stream=True, gap=0.05)
    assert answer.is_complete
    assert "shut down" in json.loads(answer.events()[-1])["error"]["message"]


def test_a_silent_replica_is_504_and_others_are_unaffected(relay: RelayProcess) -> None:
    with FakeEngine(hang=True) as hung, FakeEngine() as well, ThreadPoolExecutor() as pool:
        serve(relay, hung, well, strategy="least_connections", request_timeout=1.0)
        turns = [pool.submit(chat, relay) for _ in range(8)]
        statuses = sorted(turn.result().status for turn in turns)
        assert 504 in statuses
        assert 200 in statuses
        hung.wait_for("running", 0)


def test_a_stream_may_run_longer_than_the_timeout_as_long_as_it_moves(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, request_timeout=0.5)
    assert chat(relay, stream=True, tokens=8, gap=0.15).events()[-1] == "[DONE]"
    stalled = chat(relay, stream=True, tokens=8, gap=2.0)
    assert "silent" in stalled.events()[-1]


def test_an_idle_connection_that_the_replica_closed_is_no_error(relay: RelayProcess) -> None:
    with FakeEngine(close="silently") as engine, ThreadPoolExecutor(8) as pool:
        serve(relay, engine)
        assert [answer.status for answer in pool.map(lambda _: chat(relay), range(200))] == [200] * 200
    gauges = wait_until(lambda: [g for g in relay.controller.gauges if g["counters"]["requests"] == 200])[-1]
    assert gauges["backends"]["r1"]["errors"] == 0


def test_a_replica_that_fails_is_ejected_and_comes_back_when_it_answers(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other:
        serve(relay, one, other, strategy="round_robin")
        port = one.port
        one.kill()
        assert [chat(relay).status for _ in range(6)] == [200] * 6
        wait_until(lambda: [g for g in relay.controller.gauges if not g["backends"].get("r1", {}).get("healthy", True)])
        with FakeEngine(port=port):
            wait_until(lambda: chat(relay).headers["x-agent-infra-backend"] == "r1", 10.0)


def test_no_client_sees_the_death_of_a_replica_under_load(relay: RelayProcess) -> None:
    statuses: list[int] = []

    def agent() -> None:
        with Client(relay.port) as client:
            statuses.extend(client.chat(fake={"delay": 0.002}).status for _ in range(250))

    with FakeEngine() as one, FakeEngine() as two, FakeEngine() as three:
        serve(relay, one, two, three)
        agents = [threading.Thread(target=agent) for _ in range(8)]
        for thread in agents:
            thread.start()
        wait_until(lambda: len(statuses) > 0 or two.call()["requests"] > 100)
        two.kill()
        for thread in agents:
            thread.join(60)
    assert statuses == [200] * 2000
    turns = relay.controller.finished(2000)
    assert {turn["outcome"] for turn in turns} == {"completed"}
    assert len({turn["turn"] for turn in turns}) == 2000


def test_a_client_that_does_not_read_slows_only_its_own_replica_stream(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as slow:
        body = b'{"model":"m","stream":true,"fake":{"tokens":60000}}'
        slow.sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        engine.wait_for("running", 1)
        assert chat(relay).status == 200
        answer = slow.read()
        assert answer.is_complete
        assert len(answer.events()) == 60_002


# The end.


def test_sigterm_lets_turns_end_and_takes_no_more(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as idle, ThreadPoolExecutor() as pool:
        idle.chat()
        stream = pool.submit(chat, relay, stream=True, tokens=5, gap=0.2)
        engine.wait_for("running", 1)
        relay.process.send_signal(signal.SIGTERM)
        assert idle.is_closed()
        assert stream.result().events()[-1] == "[DONE]"
        assert relay.process.wait(5) == 0
    assert len(relay.controller.finished(2)) == 2


def test_turns_that_outlast_the_deadline_are_told(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)], drain_seconds=0.3)
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(chat, relay, stream=True, tokens=50, gap=0.2)
        engine.wait_for("running", 1)
        relay.process.send_signal(signal.SIGTERM)
        assert "stopped" in stream.result().events()[-1]
        assert relay.process.wait(5) == 0


def test_a_second_signal_ends_it_at_once(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with ThreadPoolExecutor() as pool:
        pool.submit(chat, relay, delay=3.0)
        engine.wait_for("running", 1)
        relay.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in relay.log())
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(2) == 1


def test_the_log_can_be_json_and_holds_no_key(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)], log_format="json")
    with Client(relay.port) as client:
        client.chat({"Authorization": "Bearer very-secret"})
    relay.process.send_signal(signal.SIGTERM)
    relay.process.wait(5)
    lines = [json.loads(line) for line in relay.log().splitlines()]
    assert {"at", "level", "role", "message"} <= set(lines[-1])
    assert "secret" not in relay.log()
    assert "replica-key" not in relay.log()

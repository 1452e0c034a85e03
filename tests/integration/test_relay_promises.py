"""What the relay promises a request on its way: limits, the queue, the replica that takes over, the log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S, compares_clocks
from program import wait_for
from relay_harness import Answer, Client, RelayProcess, backend, request
from testbed.ports import free_port

from agent_infra_core.protocol import Histogram


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


def serve(relay: RelayProcess, *engines: FakeEngine, slots: int = 0, **proxy: Any) -> None:
    rows = [backend(number, engine.port, slots=slots) for number, engine in enumerate(engines, 1)]
    relay.controller.send_table(rows, models=["m"], proxy=proxy)


def chat(relay: RelayProcess, *, stream: bool = False, session: str = "", **fake: Any) -> Answer:
    with Client(relay.port) as client:
        return client.chat({"X-Session-ID": session} if session else {}, stream=stream, fake=fake)


@contextlib.contextmanager
def occupied(relay: RelayProcess, engine: FakeEngine) -> Iterator[None]:
    """A turn has the engine's slot meanwhile."""
    with Client(relay.port) as client:
        # Not until one is running: an answer that was just received may still count as that.
        before = engine.call()["requests"]
        client.sock.sendall(request(fake={"hang": True}))
        engine.wait_for("requests", before + 1)
        yield


def told(relay: RelayProcess, path: str) -> Any:
    """What the relay says of itself."""
    with Client(relay.port) as client:
        return client.get(path).json()


def error_of(answer: Answer) -> str:
    return str(answer.json()["error"]["message"])


# Requests that are refused.


def test_a_head_beyond_the_limit_is_431(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as client:
        assert client.raw(b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X: y\r\n" * 20_000).status == 431


def test_a_slow_head_and_a_slow_body_are_408(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path, HEAD_S=0.4, BODY_S=0.4, LINGER_S=0.2) as relay:
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
    relay.controller.send_table([backend(1, engine.port, slots=1)], proxy={"max_buffered_mb": 1.0})
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        first, second, third = (stack.enter_context(Client(relay.port)) for _ in range(3))
        served = pool.submit(first.chat, fake={"held": True})
        engine.wait_for("running", 1)
        held = pool.submit(second.chat, padding="x" * 900_000)
        wait_for(lambda: third.get("/queue/status").json()["pending"] == 1, "it to wait")
        answer = third.chat(padding="x" * 900_000)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        engine.call({"release": True})
        assert [served.result().status, held.result().status] == [200, 200]
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


def test_a_turn_waits_for_a_slot_and_the_wait_is_told(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1)
    first = chat(relay)
    with ThreadPoolExecutor() as pool:
        with occupied(relay, engine), Client(relay.port) as client:
            second = pool.submit(chat, relay)
            status = wait_for(lambda: (s := client.get("/queue/status").json())["oldest_ms"] > 100 and s)
        assert status["in_flight"] == 1
        assert status["waiting"][0]["model"] == "m"
        waited = [int(answer.headers["x-agent-infra-queue-ms"]) for answer in (first, second.result())]
    assert waited[1] > 100
    assert waited[0] < waited[1]


def test_a_full_queue_is_429_and_a_late_slot_503(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, slots=1, max_queue=1)
    with ThreadPoolExecutor() as pool:
        with occupied(relay, engine), Client(relay.port) as client:
            first = pool.submit(chat, relay)
            wait_for(lambda: client.get("/queue/status").json()["pending"])
            full = client.chat()
            assert (full.status, full.headers["retry-after"]) == (429, "1")
            serve(relay, engine, slots=1, max_queue=2, queue_timeout=0.5)  # for those who come from here on
            late = chat(relay)
            assert (late.status, late.headers["retry-after"]) == (503, "1")
        assert first.result().status == 200
    assert [turn["outcome"] for turn in relay.controller.finished(4)].count("rejected") == 2


def test_the_session_that_had_least_is_served_first(tmp_path: Path, engine: FakeEngine) -> None:
    """However long the second of them is in coming: here, a second of waiting makes up for little."""
    with RelayProcess(tmp_path, AGING=0.01) as relay:
        serve(relay, engine, slots=1)
        chat(relay, session="greedy", delay=1.0)
        with ThreadPoolExecutor() as pool:
            turns = []
            with occupied(relay, engine), Client(relay.port) as client:
                for number, session in enumerate(("greedy", "modest"), 1):
                    turns.append(pool.submit(chat, relay, session=session))
                    wait_for(lambda n=number: client.get("/queue/status").json()["pending"] == n)  # type: ignore[misc]
            assert [turn.result().status for turn in turns] == [200, 200]
        ended = [turn["turn"] for turn in relay.controller.finished(4)]
        started = {e["turn"]: e["session"] for e in relay.controller.events if e["kind"] == "started"}
    assert [started[turn] for turn in ended][-2:] == ["modest", "greedy"]


def test_turns_wait_for_a_model_that_is_loading_without_a_timeout(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([], models=["m"], loading=["m"], proxy={"queue_timeout": 0.2})
    with ThreadPoolExecutor() as pool, Client(relay.port) as client:
        turn = pool.submit(chat, relay)
        wait_for(lambda: client.get("/queue/status").json()["oldest_ms"] > 600)
        assert client.get("/health").json()["status"] == "starting"
        serve(relay, engine)
        assert turn.result().status == 200


def test_all_replicas_down_is_503_at_once(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other:
        serve(relay, one, other)
        assert chat(relay).status == 200
        one.kill()
        other.kill()
        assert chat(relay).status == 503
        assert chat(relay).json()["error"]["type"] == "service_unavailable_error"


# Replicas that fail.


@pytest.mark.parametrize("how", ["before", "middle"])
def test_a_replica_that_dies_before_its_answer_is_whole_is_replaced_by_another(relay: RelayProcess, how: str) -> None:
    with FakeEngine(die=how) as dying, FakeEngine() as living:
        serve(relay, dying, living, strategy="round_robin")
        for engine in (dying, living):
            engine.wait_for("probes", 1)
        assert [chat(relay).status for _ in range(4)] == [200] * 4
    turns = relay.controller.finished(4)
    assert sum(turn["retries"] for turn in turns) == 1
    assert [0 < turn["retry_ms"] <= turn["queue_ms"] for turn in turns] == [turn["retries"] == 1 for turn in turns]


def test_a_replica_that_dies_before_its_first_event_is_replaced_by_another(relay: RelayProcess) -> None:
    with FakeEngine(die=0) as dying, FakeEngine() as living:
        serve(relay, dying, living, strategy="round_robin")
        answers = [chat(relay, stream=True) for _ in range(2)]
    assert [answer.events()[-1] for answer in answers] == ["[DONE]"] * 2


def test_a_live_replica_that_breaks_off_is_not_sent_the_request_again(relay: RelayProcess) -> None:
    with FakeEngine(cut="before") as one, FakeEngine(cut="before") as other:
        serve(relay, one, other)
        assert chat(relay).status == 502
        assert one.call()["requests"] + other.call()["requests"] == 1


def test_an_error_of_a_replica_that_died_of_it_is_retried_elsewhere(relay: RelayProcess) -> None:
    with FakeEngine(status=500, health=503) as sick, FakeEngine() as well:
        serve(relay, sick, well, strategy="round_robin", health_check_interval=3600.0)
        assert [chat(relay).status for _ in range(2)] == [200, 200]


def test_a_stream_may_run_longer_than_the_timeout_as_long_as_it_moves(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine, request_timeout=3.0)
    assert chat(relay, stream=True, tokens=8, gap=0.5).events()[-1] == "[DONE]"
    stalled = chat(relay, stream=True, tokens=8, gap=3600)
    assert "silent" in stalled.events()[-1]


@pytest.mark.parametrize("streams", [1, 40])  # with 40 the relay pauses between its looks at them
@compares_clocks
def test_the_gaps_of_a_stream_are_those_between_its_parts(tmp_path: Path, engine: FakeEngine, streams: int) -> None:
    with RelayProcess(tmp_path) as relay, ThreadPoolExecutor(streams) as pool:
        serve(relay, engine)
        list(pool.map(lambda _: chat(relay, stream=True, tokens=70, gap=0.02), range(streams)))
        turns = relay.controller.finished(streams)
    for turn in turns:
        gaps = Histogram()
        gaps.add_buckets(turn["gaps"])
        assert 40 < gaps.count < 72  # parts that came late came together
        assert gaps.sum_ms == pytest.approx(turn["inference_ms"] - turn["ttft_ms"], rel=0.1)


def test_an_idle_connection_that_the_replica_closed_is_no_error(relay: RelayProcess) -> None:
    with FakeEngine(close="silently") as engine, ThreadPoolExecutor(8) as pool:
        serve(relay, engine)
        assert [answer.status for answer in pool.map(lambda _: chat(relay), range(200))] == [200] * 200
    gauges = wait_for(lambda: [g for g in relay.controller.gauges if g["counters"]["requests"] == 200])[-1]
    assert gauges["backends"]["r1"]["errors"] == 0


def test_an_idle_connection_that_breaks_off_late_is_a_replica_that_did(tmp_path: Path, engine: FakeEngine) -> None:
    """A close that crossed with the request is known within a round trip: none is left for it here."""
    with RelayProcess(tmp_path, RACE_S=0.0) as relay:
        serve(relay, engine)
        assert chat(relay).status == 200
        assert "broke off without an answer" in error_of(chat(relay, cut="before"))
    assert engine.call()["requests"] == 2


def test_a_request_that_replicas_die_of_is_sent_once_more_for_a_close_that_crossed_with_it(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other:
        serve(relay, one, other, strategy="round_robin", health_check_interval=3600.0)
        for engine in (one, other):
            engine.wait_for("probes", 1)
        assert [chat(relay).status for _ in range(4)] == [200] * 4
        for engine in (one, other):
            engine.call({"cut": "before", "health": 503})
        assert chat(relay).status == 502
        assert sorted(engine.call()["requests"] for engine in (one, other)) == [3, 4]


def test_a_replica_that_leaves_the_table_keeps_no_connection(relay: RelayProcess, engine: FakeEngine) -> None:
    with Client(relay.port) as client:
        serve(relay, engine)
        client.sock.sendall(request(fake={"held": True}))
        engine.wait_for("running", 1)
        relay.controller.send_table([], models=["m"])
        wait_for(lambda: told(relay, "/health")["models"] == {"m": {"ready": 0}})
        engine.call({"release": True})
        assert client.read().status == 200
    wait_for(lambda: not connections_to(relay, engine.port), "the end of the last connection")


def connections_to(relay: RelayProcess, port: int) -> int:
    """How many sockets of the relay are connected to ``port``."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{relay.process.pid}/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and f"socket:[{row[9]}]" in sockets for row in rows)


def test_a_replica_that_streams_is_alive_whatever_its_health_page_says(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path, PROBE_S=0.5) as relay, Client(relay.port) as client:
        serve(relay, engine, health_check_interval=3.0)
        engine.wait_for("probes", 1)
        client.sock.sendall(request(stream=True, fake={"tokens": 70, "gap": 0.1}))
        engine.call({"health_s": 3600.0})
        assert client.read().events()[-1] == "[DONE]"
        assert {gauges["backends"]["r1"]["healthy"] for gauges in relay.controller.gauges[1:]} == {True}
        wait_for(lambda: not relay.controller.gauges[-1]["backends"]["r1"]["healthy"], "its ejection")


def test_a_turn_that_may_not_go_to_the_free_replica_holds_up_nobody(tmp_path: Path) -> None:
    with RelayProcess(tmp_path, FIRST_EJECTION_S=0.1, SWEEP_S=3600.0) as relay, ExitStack() as stack:
        one, other = (stack.enter_context(FakeEngine()) for _ in range(2))
        serve(relay, one, other, slots=1, strategy="round_robin")
        with Client(relay.port) as holds, Client(relay.port) as waits:
            served = [chat(relay).headers["x-agent-infra-backend"] for _ in range(2)]
            first, second = (one, other) if served[0] == "r1" else (other, one)
            holds.sock.sendall(request(fake={"held": True}))
            first.wait_for("running", 1)
            waits.sock.sendall(request(fake={"cut": "middle"}))
            second.wait_for("requests", 2)
            wait_for(lambda: told(relay, "/queue/status")["pending"] == 1, "the turn that waits for the other replica")
            wait_for(lambda: chat(relay).status == 200, "the replica's readmission")
            assert [chat(relay).status for _ in range(5)] == [200] * 5
            assert told(relay, "/queue/status")["pending"] == 1
            first.call({"release": True})
            assert [holds.read().status, waits.read().status] == [200, 502]


def test_a_replica_that_fails_is_ejected_and_comes_back_when_it_answers(relay: RelayProcess) -> None:
    port = free_port()
    with FakeEngine(port=port) as one, FakeEngine() as other:
        serve(relay, one, other, strategy="round_robin")
        one.kill()
        assert [chat(relay).status for _ in range(6)] == [200] * 6
        wait_for(lambda: [g for g in relay.controller.gauges if not g["backends"].get("r1", {}).get("healthy", True)])
        with FakeEngine(port=port):
            wait_for(lambda: chat(relay).headers["x-agent-infra-backend"] == "r1", "readmission")


def test_the_log_can_be_json_and_holds_no_key(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)], log_format="json")
    with Client(relay.port) as client:
        client.chat({"Authorization": "Bearer very-secret"})
    relay.process.send_signal(signal.SIGTERM)
    relay.process.wait(PATIENCE_S)
    lines = [json.loads(line) for line in relay.log().splitlines()]
    assert {"at", "level", "role", "message"} <= set(lines[-1])
    assert "secret" not in relay.log()
    assert "replica-key" not in relay.log()


def test_without_a_controller_waiting_for_a_replica_that_loads_has_its_bound(relay: RelayProcess) -> None:
    relay.controller.send_table([], models=["m"], loading=["m"], proxy={"queue_timeout": 0.5})
    with Client(relay.port) as client:
        assert client.get("/health").json()["models"] == {"m": {"ready": 0}}
    relay.controller.close()
    answer = chat(relay)
    assert answer.status == 503
    assert "no slot came free within 0.5 s" in error_of(answer)


def test_sessions_that_end_while_there_is_no_controller_end_after_their_turns(
    tmp_path: Path, engine: FakeEngine
) -> None:
    with RelayProcess(tmp_path, BATCHED_TURNS=2) as relay, Client(relay.port) as client:
        serve(relay, engine)
        assert client.chat().status == 200
        relay.controller.close()
        names = [f"s{number}" for number in range(20)]
        for name in names:
            assert client.chat({"X-Session-ID": name, "X-Session-End": "true"}).status == 200
        events = relay.connect().events
        wait_for(lambda: sum(event["kind"] == "session_ended" for event in list(events)) == len(names))
    order = [(event["kind"], event["session"]) for event in events if event.get("session")]
    assert {order.index(("started", name)) < order.index(("session_ended", name)) for name in names} == {True}


def test_a_server_without_a_health_page_is_alive(relay: RelayProcess, engine: FakeEngine) -> None:
    engine.call({"health": 404})
    relay.controller.send_table(
        [backend(1, engine.port)], models=["m"], proxy={"health_check_interval": 0.05, "max_retries": 0}
    )
    wait_for(
        lambda: len([g for g in relay.controller.gauges if "r1" in g["backends"]]) >= 2
    )  # a second, and many probes
    assert relay.controller.gauges[-1]["backends"]["r1"]["healthy"]
    assert chat(relay).status == 200


def test_an_sdks_retry_does_not_repeat_its_timings(relay: RelayProcess, engine: FakeEngine) -> None:
    serve(relay, engine)
    with Client(relay.port) as client:
        client.chat({"X-Timing-Pre-Ms": "5", "X-Stainless-Retry-Count": "0"})
        client.chat({"X-Timing-Pre-Ms": "5", "X-Stainless-Retry-Count": "1"})
    relay.controller.finished(2)
    started = [event for event in relay.controller.events if event["kind"] == "started"]
    assert [event["pre_ms"] for event in started] == [5.0, None]

"""Replicas die, hang, refuse, and clients leave: what a client sees is an answer, or an error that it can tell."""

from __future__ import annotations

import contextlib
import json
import operator
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import is_listening, wait_for
from relay_harness import KEY, Answer, Client, RelayProcess, backend, request
from testbed.ports import free_port

from agent_infra_core.host import unix_address

CLIENTS = 8


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path, FIRST_EJECTION_S=0.1) as relay:
        yield relay


def openai_client(relay: RelayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{relay.port}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S)


def read_until(client: Client, word: bytes) -> None:
    """Take in the answer up to ``word``; ``client.read()`` goes on from there."""
    while word not in client.buffer:
        data = client.sock.recv(65536)
        assert data
        client.buffer += data


# Replicas killed under load.


def survive(relay: RelayProcess, answers: int, kills: int) -> None:
    """Eight clients ask without a pause until there were so many answers and killed replicas; all must be answered."""
    engines = [FakeEngine(free_port(), delay=0.005) for _ in range(3)]
    relay.controller.send_table([backend(number, engine.port, slots=64) for number, engine in enumerate(engines)])
    is_over = threading.Event()
    failures: list[Answer] = []
    answered = [0] * CLIENTS

    def ask(number: int) -> int:
        with Client(relay.port) as client:
            while not is_over.is_set():
                answer = client.chat()
                answered[number] += 1
                if answer.status != 200 or answer.json()["object"] != "chat.completion":
                    failures.append(answer)
                    break
        return answered[number]

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            counts = [pool.submit(ask, number) for number in range(CLIENTS)]
            try:
                deadline = time.monotonic() + 300.0
                done = 0
                while (done < kills or relay_requests(relay) < answers) and not failures:
                    assert time.monotonic() < deadline
                    number = done % len(engines)
                    engines[number].kill()
                    then = list(answered)  # what it had is answered before it is back, or another one dies
                    wait_for(lambda then=then: failures or all(map(operator.gt, answered, then)), "answers for all")  # type: ignore[misc]
                    engines[number] = FakeEngine(engines[number].port, delay=0.005)
                    wait_for(lambda n=number: engines[n].call()["requests"] > 5 or failures, "readmission")  # type: ignore[misc]
                    done += 1
            finally:
                is_over.set()
            total = sum(count.result(PATIENCE_S) for count in counts)
    finally:
        for engine in engines:
            engine.kill()
    assert failures == []
    assert total >= answers
    turns = relay.controller.finished(total)
    assert {(turn["outcome"], turn["status"]) for turn in turns} == {("completed", 200)}
    assert sum(turn["retries"] for turn in turns) > 0


def relay_requests(relay: RelayProcess) -> int:
    count: int = relay.controller.gauges[-1]["counters"]["requests"] if relay.controller.gauges else 0
    return count


def test_no_client_sees_that_replicas_are_killed(relay: RelayProcess) -> None:
    survive(relay, answers=1_500, kills=4)


@pytest.mark.slow
def test_no_client_of_ten_thousand_sees_that_replicas_are_killed(relay: RelayProcess) -> None:
    survive(relay, answers=10_000, kills=25)


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_every_stream_of_a_killed_replica_ends_with_an_error_event(relay: RelayProcess, framing: str) -> None:
    with FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port)])
        clients = [Client(relay.port) for _ in range(20)]
        try:
            for client in clients:
                client.sock.sendall(request(stream=True, fake={"gap": 3600, "framing": framing}))
            for client in clients:
                read_until(client, b"word0")
            engine.kill()
            for client in clients:
                answer = client.read()
                assert answer.is_complete
                assert json.loads(answer.events()[-1])["error"]["code"] == "replica_lost"
                assert "[DONE]" not in answer.events()
        finally:
            for client in clients:
                client.sock.close()
    assert {turn["outcome"] for turn in relay.controller.finished(20)} == {"cut"}


def test_an_http_1_0_stream_of_a_killed_replica_ends_with_an_error_event(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        client.sock.sendall(request(stream=True, fake={"gap": 3600}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        read_until(client, b"word0")
        engine.kill()
        assert json.loads(client.read().events()[-1])["error"]["code"] == "replica_lost"


def test_the_openai_client_raises_when_its_streams_replica_is_killed(relay: RelayProcess) -> None:
    with FakeEngine() as engine, openai_client(relay) as client:
        relay.controller.send_table([backend(1, engine.port)])
        streams = [
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                extra_body={"fake": {"gap": 3600}},
            )
            for _ in range(5)
        ]
        for stream in streams:
            assert next(stream).choices[0].delta.content == "word0 "
        engine.kill()
        for stream in streams:
            with pytest.raises(openai.APIError):
                list(stream)


def test_a_long_answer_that_breaks_off_is_never_complete(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        answer = client.chat(fake={"size": 20_000_000, "cut": "middle"})
        assert not answer.is_complete


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
def test_all_requests_of_clients_that_left_are_aborted_at_once(relay: RelayProcess, stream: bool) -> None:
    with FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port)])
        clients = [Client(relay.port) for _ in range(40)]
        for client in clients:
            client.sock.sendall(request(stream, fake={"gap" if stream else "delay": 3600}))
        engine.wait_for("running", 40)
        for client in clients:
            client.sock.close()
        engine.wait_for("aborted", 40)
    assert {turn["outcome"] for turn in relay.controller.finished(40)} == {"aborted"}


@pytest.mark.parametrize("ahead", [b"\r\n", request(), request()[:30]])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_ahead(relay: RelayProcess, ahead: bytes) -> None:
    with FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as client:
            client.sock.sendall(request(fake={"delay": 3600}))
            engine.wait_for("running", 1)
            client.sock.sendall(ahead)
        engine.wait_for("aborted", 1)


def test_many_requests_sent_ahead_are_all_answered(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client, Client(relay.port) as operator:
        relay.controller.send_table([backend(1, engine.port)])
        client.sock.sendall(request(fake={"held": True}))
        engine.wait_for("running", 1)
        client.sock.sendall(request(padding="x" * 20_000) * 20)
        assert operator.get("/health").status == 200
        engine.call({"release": True})
        assert [client.read().status for _ in range(21)] == [200] * 21


def test_a_client_that_leaves_the_queue_reaches_no_replica(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as busy:
        relay.controller.send_table([backend(1, engine.port, slots=1)])
        busy.sock.sendall(request(fake={"delay": 3600}))
        engine.wait_for("running", 1)
        with Client(relay.port) as waiting:
            waiting.sock.sendall(request())
            with Client(relay.port) as other:
                wait_for(lambda: other.get("/queue/status").json()["pending"] == 1)
        [turn] = relay.controller.finished()
        assert (turn["outcome"], turn["backend"]) == ("aborted", None)
        assert engine.call()["requests"] == 1


# No replica, hung replicas, replicas that refuse.


@pytest.mark.parametrize("had_connections", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_without_any_replica_the_refusal_comes_soon_and_in_openais_shape(
    relay: RelayProcess, stream: bool, had_connections: bool
) -> None:
    engines = [FakeEngine() for _ in range(3)]
    relay.controller.send_table([backend(number, engine.port) for number, engine in enumerate(engines)])
    with Client(relay.port) as client:
        for _ in range(6 if had_connections else 0):
            assert client.chat().status == 200
        for engine in engines:
            engine.kill()
        answer = client.chat(stream=stream)
    assert answer.status == 503
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert int(answer.headers["retry-after"]) >= 1
    with openai_client(relay) as sdk, pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="m", messages=[])


def test_a_hung_replica_times_out_and_slows_nobody_else(relay: RelayProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung, FakeEngine() as engine:
        rows = [backend(1, hung.getsockname()[1], model="hung"), backend(2, engine.port)]
        relay.controller.send_table(rows)
        with ExitStack() as stack, Client(relay.port) as client:
            for number in range(8):
                waiting = stack.enter_context(Client(relay.port))
                waiting.sock.sendall(request(bool(number % 2), model="hung"))
            wait_for(lambda: client.get("/queue/status").json()["in_flight"] == 8, "eight turns that hang")
            assert [client.chat().status for _ in range(50)] == [200] * 50
            assert client.get("/queue/status").json()["in_flight"] == 8
        relay.controller.send_table(rows, proxy={"request_timeout": 0.5})  # nobody else is served from here on
        for stream in (False, True):
            with Client(relay.port) as other:
                answer = other.chat(model="hung", stream=stream)
            assert (answer.status, answer.json()["error"]["type"]) == (504, "timeout_error")


def test_a_stream_that_falls_silent_ends_with_an_error_event(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)], proxy={"request_timeout": 0.5})

        def ask() -> list[Answer]:
            answer = client.chat(stream=True, fake={"gap": 3600})
            return [answer] if answer.status == 200 else []  # one that takes so long to begin is 504, and rightly

        [answer] = wait_for(ask, "a stream that begins in time")
        assert answer.is_complete
        assert "silent" in json.loads(answer.events()[-1])["error"]["message"]
        wait_for(lambda: (seen := engine.call())["aborted"] == seen["requests"])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("had_connections", [True, False])
def test_a_prompt_that_kills_its_engine_kills_two_at_most(
    relay: RelayProcess, had_connections: bool, stream: bool
) -> None:
    engines = [FakeEngine() for _ in range(4)]
    try:
        relay.controller.send_table(
            [backend(number, engine.port) for number, engine in enumerate(engines)], proxy={"strategy": "round_robin"}
        )
        with Client(relay.port) as client:
            for _ in range(8 if had_connections else 0):
                assert client.chat().status == 200
            answer = client.chat(stream=stream, fake={"die": "before"})
            assert answer.status == 502
            assert answer.json()["error"]["code"] == "replica_lost"
            assert "not sent again" in answer.json()["error"]["message"]
            assert [client.chat().status for _ in range(20)] == [200] * 20
        wait_for(lambda: sum(engine.process.poll() is not None for engine in engines) >= 2)
        assert sum(engine.process.poll() is not None for engine in engines) == 2
    finally:
        for engine in engines:
            engine.kill()


def test_a_turn_whose_only_replica_moved_is_answered_at_its_new_address(relay: RelayProcess) -> None:
    with FakeEngine() as former, FakeEngine() as successor, Client(relay.port) as client:
        relay.controller.send_table([backend(1, former.port)])
        client.sock.sendall(request(fake={"held": True}))
        former.wait_for("requests", 1)
        relay.controller.send_table([backend(1, successor.port)])
        former.kill()
        successor.wait_for("requests", 1)
        successor.call({"release": True})
        assert client.read().status == 200


@pytest.mark.parametrize("status", [429, 503])
def test_a_replica_that_is_busy_sends_its_turn_elsewhere_and_is_left_alone(relay: RelayProcess, status: int) -> None:
    with FakeEngine(status=status, retry_after=30) as busy, FakeEngine() as free, Client(relay.port) as client:
        rows = [backend(1, busy.port), backend(2, free.port)]
        relay.controller.send_table(rows, proxy={"strategy": "round_robin"})
        answers = [client.chat() for _ in range(10)]
        assert {(a.status, a.headers["x-agent-infra-backend"]) for a in answers} == {(200, "r2")}
        assert busy.call()["requests"] == 1
    gauges = relay.controller.gauges
    wait_for(
        lambda: gauges and gauges[-1]["counters"]["requests"] == 10 and gauges[-1]["backends"]["r1"]["errors"] == 0
    )


def test_a_turn_waits_for_the_only_replica_that_is_busy(relay: RelayProcess) -> None:
    with FakeEngine(status=503) as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        client.sock.sendall(request())
        wait_for(lambda: engine.call()["requests"] >= 1)
        engine.call({})
        assert client.read().status == 200


def test_a_live_replicas_error_is_passed_on_and_not_retried(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other, Client(relay.port) as client:
        relay.controller.send_table([backend(1, one.port), backend(2, other.port)])
        for status in (400, 404, 422, 500):
            answer = client.chat(fake={"status": status})
            assert (answer.status, answer.json()["error"]["message"]) == (status, "as asked")
        assert one.call()["requests"] + other.call()["requests"] == 4


def test_an_answer_that_its_engine_aborted_comes_from_another_one(relay: RelayProcess) -> None:
    with FakeEngine(finish_reason="abort") as ending, FakeEngine() as other, Client(relay.port) as client:
        rows = [backend(1, ending.port), backend(2, other.port)]
        relay.controller.send_table(rows, proxy={"strategy": "round_robin"})
        answers = [client.chat() for _ in range(4)]
        assert {a.status for a in answers} == {200}
        assert {a.json()["choices"][0]["finish_reason"] for a in answers} == {"stop"}
        assert ending.call()["requests"] >= 1


def test_a_stream_that_its_engine_aborted_ends_with_an_error_event(relay: RelayProcess) -> None:
    with FakeEngine(finish_reason="abort") as ending, Client(relay.port) as client:
        relay.controller.send_table([backend(1, ending.port)])
        client.sock.sendall(request(stream=True, fake={"held_after": 0}))
        read_until(client, b"word0")
        ending.call({"release": True, "finish_reason": "abort"})
        answer = client.read()
        assert answer.is_complete
        assert "shut down" in json.loads(answer.events()[-1])["error"]["message"]
        assert "[DONE]" not in answer.events()


# The queue.


def test_turns_without_a_session_do_not_overtake_those_with_one(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as busy, Client(relay.port) as operator:
        relay.controller.send_table([backend(1, engine.port, slots=1)])
        busy.sock.sendall(request(fake={"delay": 3600}))
        engine.wait_for("running", 1)
        waiting = [Client(relay.port) for _ in range(3)]
        for number, client in enumerate(waiting):
            fields = b"Host: t\r\nX-Number: %d\r\n" % number + (b"X-Session-ID: s\r\n" if number == 0 else b"")
            client.sock.sendall(request().replace(b"Host: t\r\n", fields))
            wait_for(lambda n=number: operator.get("/queue/status").json()["pending"] == n + 1)  # type: ignore[misc]
        busy.sock.close()
        for client in waiting:
            assert client.read().status == 200
            client.sock.close()
        heads = engine.call()["heads"][1:]
        assert [re.findall(r"(?i)x-number: (\d)", head) for head in heads] == [["0"], ["1"], ["2"]]


# A replica that says more than it was asked for.


def test_bytes_behind_an_answer_are_nobody_elses_answer(relay: RelayProcess) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    connections = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            data = sock.recv(65536)
            if data.startswith(b"POST"):
                connections.append(sock)
                sock.sendall(answer + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
            else:
                sock.sendall(answer)
                sock.close()

    with socket.create_server(("127.0.0.1", 0)) as listener, Client(relay.port, timeout=PATIENCE_S) as client:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        relay.controller.send_table([backend(1, listener.getsockname()[1])])
        for number in range(3):
            assert client.chat().body == b"{}"
            assert len(connections) == number + 1
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)
        for sock in connections:
            sock.close()


@pytest.mark.parametrize("size", [10, 9_000_000], ids=["kept", "passed on as it comes"])
def test_a_reset_is_no_end_of_an_answer_that_lasts_until_its_connection_closes(relay: RelayProcess, size: int) -> None:
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        answer = client.chat(fake={"framing": "close", "cut": "reset", "size": 2 * size})
        assert answer.status != 200 or not answer.is_complete
    [turn] = relay.controller.finished()
    assert turn["outcome"] != "completed"


def test_an_answer_of_events_that_has_none_is_over_at_once(relay: RelayProcess) -> None:
    def serve(listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock:
                    head = sock.recv(65536)
                    kind = b"application/json" if head.startswith(b"GET") else b"text/event-stream"
                    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: 0\r\n\r\n" % kind)

    with socket.create_server(("127.0.0.1", 0)) as listener, Client(relay.port) as client:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        relay.controller.send_table([backend(1, listener.getsockname()[1])])
        answer = client.chat(stream=True)
        assert (answer.status, answer.body, answer.is_complete) == (200, b"", True)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def test_an_error_of_a_replica_that_died_of_it_counts_once(relay: RelayProcess) -> None:
    with FakeEngine(status=500) as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)], proxy={"health_check_interval": 3600.0})
        engine.wait_for("probes", 1)  # it is well when it gets the turn, and the next look finds it dead
        engine.call({"status": 500, "health": 503})
        assert client.chat().status == 503
        told = wait_for(lambda: [g for g in relay.controller.gauges if g["counters"]["requests"] == 1])[-1]
    assert told["backends"]["r1"]["errors"] == 1


def test_an_odd_digest_of_load_is_the_last_ones(relay: RelayProcess) -> None:
    with FakeEngine(load={"running": 1, "kv_usage": 10**400, "kv_capacity_tokens": "many"}) as engine:
        relay.controller.send_table(
            [backend(1, engine.port, telemetry_port=engine.port)], proxy={"load_poll_interval": 0.1}
        )
        time.sleep(1.0)
        with Client(relay.port) as client:
            assert [client.chat().status for _ in range(3)] == [200] * 3
    told = wait_for(lambda: [g for g in relay.controller.gauges if g["counters"]["requests"] == 3])[-1]
    assert told["backends"]["r1"]["in_flight"] == 0


def test_the_load_of_a_replica_without_work_is_read_less_often_until_it_gets_a_turn(relay: RelayProcess) -> None:
    with FakeEngine() as idle, FakeEngine(load={"running": 1}) as busy, Client(relay.port) as client:
        rows = [backend(1, idle.port, telemetry_port=idle.port), backend(2, busy.port, telemetry_port=busy.port)]
        relay.controller.send_table(rows, proxy={"load_poll_interval": 0.2, "strategy": "round_robin"})
        busy.wait_for("loads", 25)
        at_rest = idle.call()["loads"]
        assert at_rest <= 15  # 10, and as many again as it takes to look
        while busy.call()["loads"] < 50:
            assert client.chat().status == 200
        assert idle.call()["loads"] - at_rest > 15


def test_a_turn_that_no_replica_is_left_for_is_told_at_once(relay: RelayProcess) -> None:
    with FakeEngine() as dying, FakeEngine() as busy, ExitStack() as stack:
        rows = [backend(1, dying.port, slots=1), backend(2, busy.port, slots=1)]
        relay.controller.send_table(rows, proxy={"strategy": "round_robin", "queue_timeout": 3600.0})
        holder, waiter, asker = (stack.enter_context(Client(relay.port)) for _ in range(3))
        first = holder.chat().headers["x-agent-infra-backend"]
        if first == "r1":  # the next one goes to the other
            holder.sock.sendall(request(fake={"held": True}))
        else:
            assert holder.chat().status == 200
            holder.sock.sendall(request(fake={"held": True}))
        busy.wait_for("running", 1)
        waiter.sock.sendall(request(fake={"cut": "middle"}))
        wait_for(lambda: asker.get("/queue/status").json()["pending"] == 1)
        relay.controller.send_table([rows[0]], models=["m"])
        answer = waiter.read()
        assert answer.status == 503
        assert "no replica of m is there to answer" in answer.json()["error"]["message"]


# The end.


def stop(relay: RelayProcess) -> int:
    relay.process.send_signal(signal.SIGTERM)
    return relay.process.wait(PATIENCE_S)


def test_a_stopped_relay_finishes_what_it_has(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as whole, Client(relay.port) as stream, Client(relay.port) as idle:
        relay.controller.send_table([backend(1, engine.port)], drain_seconds=PATIENCE_S)
        assert idle.chat().status == 200
        whole.sock.sendall(request(fake={"held": True}))
        stream.sock.sendall(request(stream=True, fake={"gap": 0.2}))
        engine.wait_for("requests", 3)
        relay.process.send_signal(signal.SIGTERM)
        assert idle.is_closed()
        engine.call({"release": True})
        assert whole.read().status == 200
        assert stream.read().events()[-1] == "[DONE]"
        assert relay.process.wait(PATIENCE_S) == 0
    assert {turn["outcome"] for turn in relay.controller.finished(3)} == {"completed"}


def test_a_stop_cuts_no_turn_that_has_begun(relay: RelayProcess) -> None:
    """Clients whose connections are idle for moments only, so that many a request comes as they are being closed."""

    def ask(number: int) -> None:
        with Client(relay.port) as client, contextlib.suppress(OSError):
            while client.chat(fake={"delay": 0.02}).status == 200:
                time.sleep(0.001 * (number % 5))

    with FakeEngine() as engine, ThreadPoolExecutor(20) as pool:
        relay.controller.send_table([backend(1, engine.port)])
        asking = [pool.submit(ask, number) for number in range(20)]
        wait_for(lambda: relay_requests(relay) > 200)
        assert stop(relay) == 0
        for each in asking:
            each.result(PATIENCE_S)
    assert {turn["outcome"] for turn in relay.controller.finished(200)} == {"completed"}


def test_what_does_not_end_in_time_is_told_so(relay: RelayProcess) -> None:
    with (
        FakeEngine() as engine,
        Client(relay.port) as whole,
        Client(relay.port) as stream,
        Client(relay.port) as queued,
    ):
        relay.controller.send_table(
            [backend(1, engine.port)], models=["m", "later"], loading=["later"], drain_seconds=0.3
        )
        whole.sock.sendall(request(fake={"delay": 3600}))
        stream.sock.sendall(request(stream=True, fake={"gap": 3600}))
        engine.wait_for("running", 2)
        read_until(stream, b"word0")
        queued.sock.sendall(request(model="later"))
        with Client(relay.port) as other:
            wait_for(lambda: other.get("/queue/status").json()["pending"] == 1)
        assert stop(relay) == 0
        for client in (whole, queued):
            assert client.read().json()["error"]["message"] == "the proxy was stopped"
        answer = stream.read()
        assert answer.is_complete
        assert "stopped" in json.loads(answer.events()[-1])["error"]["message"]
        engine.wait_for("aborted", 2)


def test_a_controller_that_comes_while_the_relay_ends_ends_no_turn(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client, socket.socket(socket.AF_UNIX) as control:
        relay.controller.send_table([backend(1, engine.port)], drain_seconds=PATIENCE_S)
        client.sock.sendall(request(fake={"held": True}))
        engine.wait_for("running", 1)
        relay.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not is_listening(relay.port))
        control.settimeout(PATIENCE_S)
        with unix_address(relay.path) as address:
            control.connect(address)
        assert control.recv(1) == b""
        engine.call({"release": True})
        assert client.read().status == 200
    assert relay.process.wait(PATIENCE_S) == 0


def test_a_controller_that_takes_nothing_does_not_keep_the_relay_from_its_end(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client, socket.socket(socket.AF_UNIX) as control:
        relay.controller.send_table([backend(1, engine.port)])
        assert client.chat().status == 200
        with unix_address(relay.path) as address:
            control.connect(address)
        assert relay.controller.is_closed.wait(PATIENCE_S)
        for _ in range(1_000):  # more than the socket holds
            assert client.chat().status == 200
        assert stop(relay) == 0


def test_a_second_signal_ends_at_once(relay: RelayProcess) -> None:
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)], drain_seconds=3600.0)
        client.sock.sendall(request(fake={"delay": 3600}))
        engine.wait_for("running", 1)
        relay.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in relay.log())
        assert stop(relay) == 1
        engine.wait_for("aborted", 1)


# An engine that is back before its turns' end is noticed.


class Predecessor:
    """A server for a port that another engine takes over; ``turns`` are the connections of the turns that it holds."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.turns: list[socket.socket] = []

    def answer_probes(self) -> None:
        """Answer what the relay asks first: the health probe, and the list of models."""
        for _ in range(2):
            sock, _ = self.listener.accept()
            with sock:
                assert sock.recv(65536).startswith(b"GET")
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def take_turn(self) -> socket.socket:
        sock, _ = self.listener.accept()
        assert sock.recv(65536).startswith(b"POST")
        self.turns.append(sock)
        return sock


def ready(client: Client) -> int:
    count: int = client.get("/health").json()["models"]["m"]["ready"]
    return count


def test_a_turn_died_with_its_engine_though_the_successor_answers_when_that_is_noticed(relay: RelayProcess) -> None:
    former = Predecessor()
    with FakeEngine() as other, ExitStack() as stack:
        first, second, third = (stack.enter_context(Client(relay.port)) for _ in range(3))
        relay.controller.send_table([backend(1, former.port)])
        former.answer_probes()
        for client in (first, second):
            client.sock.sendall(request())
            former.take_turn()
        relay.controller.send_table([backend(1, former.port), backend(2, other.port)])
        wait_for(lambda: ready(third) == 2, "the other replica")
        former.listener.close()
        former.turns[0].close()
        assert first.read().headers["x-agent-infra-backend"] == "r2"  # nobody listened when the port was probed
        with FakeEngine(former.port):
            wait_for(lambda: "r1 answers again" in relay.log(), "the successor")
            former.turns[1].close()
            answer = second.read()
    assert (answer.status, answer.headers["x-agent-infra-backend"]) == (200, "r2")


def test_a_connection_that_a_dying_server_never_accepts_is_given_up_at_once(tmp_path: Path) -> None:
    """A killed process's connections end before its listening socket, whose queue takes one more."""
    former = Predecessor()
    with RelayProcess(tmp_path, RACE_S=3600.0) as relay, FakeEngine() as other, ExitStack() as stack:
        client, another = (stack.enter_context(Client(relay.port)) for _ in range(2))
        rows = [backend(1, former.port, is_own=True), backend(2, other.port)]
        relay.controller.send_table(rows[:1])
        former.answer_probes()
        client.sock.sendall(request())
        connection = former.take_turn()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert client.read().status == 200
        client.sock.sendall(request())
        assert connection.recv(65536).startswith(b"POST")
        relay.controller.send_table(rows)
        wait_for(lambda: ready(another) == 2, "the other replica")
        connection.close()
        assert select.select([former.listener], [], [], PATIENCE_S)[0]  # the relay tries another connection
        former.listener.close()
        with FakeEngine(former.port):
            answer = client.read()
    assert (answer.status, answer.headers["x-agent-infra-backend"]) == (200, "r2")

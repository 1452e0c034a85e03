"""The relay as the controller starts it: a real process, between real clients and real (fake) engines."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import wait_for
from relay_harness import Client, RelayProcess, backend
from testbed.ports import free_port


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


@pytest.fixture
def client(relay: RelayProcess, engine: FakeEngine) -> Iterator[Client]:
    relay.controller.send_table([backend(1, engine.port)])
    with Client(relay.port) as client:
        yield client


# What is relayed.


def test_an_answer_is_passed_on_with_the_replica_named(client: Client) -> None:
    answer = client.chat()
    assert answer.status == 200
    assert answer.json()["choices"][0]["message"]["content"] == "word0 word1 word2"
    assert answer.headers["x-agent-infra-backend"] == "r1"
    assert answer.headers["x-request-id"]
    assert answer.headers["x-agent-infra-queue-ms"].isdecimal()


def test_a_stream_arrives_event_by_event_and_whole(client: Client) -> None:
    answer = client.chat(stream=True)
    assert answer.is_complete
    assert len(answer.events()) == 5
    assert answer.events()[-1] == "[DONE]"


def test_a_streams_first_event_does_not_wait_for_the_second(client: Client) -> None:
    body = b'{"model":"m","stream":true,"messages":[],"fake":{"gap":3600}}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body)
    client.sock.sendall(head + body)
    received = b""
    while b"word0" not in received:
        received += client.sock.recv(65536)


@pytest.mark.parametrize("split", [1, 7, 64])
@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_a_stream_is_the_same_however_its_bytes_are_split(client: Client, split: int, framing: str) -> None:
    answer = client.chat(stream=True, fake={"split": split, "framing": framing})
    assert answer.is_complete
    assert [("word" in event) for event in answer.events()] == [True, True, True, False, False]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_answer_is_the_same_in_every_framing(client: Client, framing: str) -> None:
    answer = client.chat(fake={"framing": framing, "size": 100_000})
    assert len(answer.json()["choices"][0]["message"]["content"]) == 100_000


def test_a_long_answer_that_is_no_stream_is_passed_on_whole(client: Client) -> None:
    answer = client.chat(fake={"size": 20_000_000})
    assert len(answer.json()["choices"][0]["message"]["content"]) == 20_000_000


def test_a_body_of_twenty_megabytes_reaches_the_replica(client: Client, engine: FakeEngine) -> None:
    assert client.chat(padding="y" * 20_000_000).status == 200
    assert "content-length: 200000" in engine.call()["heads"][-1]


def test_a_chunked_request_reaches_the_replica_with_its_length(client: Client, engine: FakeEngine) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = client.raw(head + b'a;x=y\r\n{"model":"\r\n3\r\nm"}\r\n0\r\nTrailer: 1\r\n\r\n')
    assert answer.status == 200
    assert engine.call()["body"] == '{"model":"m"}'


def test_requests_may_be_pipelined(client: Client) -> None:
    body = b'{"model":"m"}'
    request = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    client.sock.sendall(request * 20)
    assert [client.read().status for _ in range(20)] == [200] * 20


def test_the_app_and_inference_share_a_connection(client: Client) -> None:
    for _ in range(3):
        assert client.get("/v1/models").json()["data"][0]["id"] == "m"
        assert client.chat().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_closes_when_its_client_asks_for_it_however_often_that_head_came(
    relay: RelayProcess, client: Client, stream: bool
) -> None:
    for _ in range(4):  # from the second on, a callback begins the turn
        with Client(relay.port) as another:
            assert another.chat().status == 200  # with it the connection is let pass
            assert another.chat({"Connection": "close"}, stream=stream).is_complete
            assert another.is_closed()


@pytest.mark.parametrize("linger", [0, 0.2])
def test_an_http_1_0_client_gets_its_stream_without_chunks_and_its_end(client: Client, linger: float) -> None:
    """The replica's last chunk, which is nothing to this client, may come by itself; the connection stays open."""
    body = b'{"model":"m","stream":true,"fake":{"linger":%g}}' % linger
    client.sock.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = client.read()
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.events()[-1] == "[DONE]"


def test_a_client_that_expects_100_continue_gets_it(client: Client) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 13\r\nExpect: 100-continue\r\n\r\n"
    assert client.raw(head).status == 100
    assert client.raw(b'{"model":"m"}').status == 200


def test_a_usage_event_that_the_client_did_not_ask_for_is_taken_out_and_counted(
    client: Client, relay: RelayProcess
) -> None:
    answer = client.chat(stream=True, fake={"usage": True})
    assert "usage" not in answer.body.decode()
    assert answer.events()[-1] == "[DONE]"
    [turn] = relay.controller.finished()
    assert (turn["prompt_tokens"], turn["completion_tokens"], turn["cached_tokens"]) == (7, 3, 5)


def test_a_usage_event_that_the_client_asked_for_stays(client: Client) -> None:
    answer = client.chat(stream=True, stream_options={"include_usage": True})
    assert '"completion_tokens":3' in answer.events()[-2]


def test_the_models_name_may_stand_in_the_path(client: Client) -> None:
    assert client.post("/m/v1/chat/completions", {}).status == 200
    assert client.post("/nope/v1/chat/completions", {}).status == 404


# Who gets what: headers and keys.


def test_the_replica_gets_its_own_key_and_no_hop_by_hop_header(client: Client, engine: FakeEngine) -> None:
    secret = {"Authorization": "Bearer client-secret", "X-Api-Key": "client-secret", "Cookie": "client-secret"}
    client.chat({**secret, "Connection": "keep-alive, X-Private", "X-Private": "1", "TE": "trailers", "X-Mine": "yes"})
    head = engine.call()["heads"][-1].lower()
    assert "authorization: bearer replica-key" in head
    assert "client-secret" not in head
    assert "x-mine: yes" in head
    assert "x-private" not in head
    assert "\nte:" not in head


# What the controller hears.


def test_every_event_is_one_of_tracking(client: Client, relay: RelayProcess) -> None:
    client.chat({"X-Session-ID": "s", "X-Task-ID": "t", "X-Timing-Pre-Ms": "12.5", "X-Session-End": "true"})

    def told() -> list[dict[str, Any]]:
        """Without what a turn is told of on its way, where a batch went out meanwhile."""
        events = [event for event in list(relay.controller.events) if event["kind"] not in ("sent", "answering")]
        return events if len(events) >= 3 else []

    started, finished, ended = wait_for(told)
    assert [each["kind"] for each in (started, finished, ended)] == ["started", "finished", "session_ended"]
    assert [started[name] for name in ("session", "task", "pre_ms", "prompt")] == ["s", "t", 12.5, "hello"]
    assert [finished[name] for name in ("outcome", "status", "answer")] == ["completed", 200, "word0 word1 word2"]
    assert [finished[name] for name in ("finish_reason", "estimated", "completion_tokens")] == ["stop", False, 3]
    assert ended["session"] == "s"


def test_tokens_of_a_stream_without_usage_are_estimated(client: Client, relay: RelayProcess) -> None:
    client.chat(stream=True, fake={"tokens": 10})
    [turn] = relay.controller.finished()
    assert (turn["estimated"], turn["completion_tokens"], turn["finish_reason"]) == (True, 10, "stop")
    assert turn["answer"].startswith("word0 word1 ")


def test_gauges_come_and_count(client: Client, relay: RelayProcess) -> None:
    client.chat()

    def counted() -> dict[str, Any] | None:
        told = [each for each in relay.controller.gauges if each["counters"]["requests"]]
        return next((each for each in told if not each["backends"]["r1"]["in_flight"]), None)

    gauges = wait_for(counted)
    assert gauges is not None
    assert gauges["backends"]["r1"]["requests"] == 1
    assert 0 < gauges["rss_bytes"] < 60 << 20


# The app.


def test_the_documents_are_served(client: Client, relay: RelayProcess) -> None:
    assert client.get("/health").json() == {"status": "ok", "models": {"m": {"ready": 1}}}
    assert "/v1/chat/completions" in client.get("/").json()["inference"]
    assert client.get("/queue/status").json()["pending"] == 0
    assert client.get("/nowhere").status == 404
    assert client.get("/nowhere").json()["error"]["message"]


def test_stats_are_the_controllers_bytes_with_their_age(client: Client, relay: RelayProcess) -> None:
    assert client.get("/stats").status == 503
    relay.controller.send_stats(b'{"snapshot_age_ms":0,"schema_version":1}')
    wait_for(lambda: client.get("/stats").status == 200)
    time.sleep(0.05)
    stats = client.get("/stats").json()
    assert stats["schema_version"] == 1
    assert stats["snapshot_age_ms"] >= 50


def test_stats_that_nobody_has_read_lately_are_asked_for(tmp_path: Path) -> None:
    with RelayProcess(tmp_path, QUESTION_S=PATIENCE_S, STATS_FRESH_S=0.3) as relay, ThreadPoolExecutor() as pool:
        relay.controller.send_table([], models=["m"])
        with Client(relay.port) as client:
            for number in range(2):
                answer = pool.submit(client.get, "/stats")
                asked = wait_for(lambda n=number: relay.controller.requests[n:])  # type: ignore[misc]
                assert asked[0]["op"] == "stats"
                assert not answer.done()
                relay.controller.send_stats(b'{"snapshot_age_ms":0,"number":%d}' % number)
                relay.controller.answer(asked[0])
                assert answer.result().json()["number"] == number
                time.sleep(0.3)
            relay.controller.close()
            wait_for(lambda: "the controller is gone" in relay.log(), "the relay's notice of that")
            wait_for(
                lambda: client.get("/stats").json()["snapshot_age_ms"] >= 300, "an old one: there is nobody to ask"
            )
            assert client.get("/stats").json()["number"] == 1


def test_without_a_controller_stats_say_what_to_do_as_all_that_it_is_asked_for(
    client: Client, relay: RelayProcess
) -> None:
    assert client.chat().status == 200
    relay.controller.close()
    wait_for(lambda: "the controller is gone" in relay.log(), "the relay's notice of that")
    paths = ("/metrics", "/stats/sessions/s", "/stats", "/sessions", "/history?points=5")
    said = {client.get(path).json()["error"]["message"] for path in paths}
    assert said == {f"no controller has answered within {seconds} s; `connect` starts one" for seconds in (2, 10)}


def test_how_often_stats_are_read_is_told(client: Client, relay: RelayProcess) -> None:
    relay.controller.send_stats(b'{"snapshot_age_ms":0}')
    assert [client.get("/stats").status for _ in range(3)] == [200] * 3
    wait_for(lambda: relay.controller.gauges and relay.controller.gauges[-1]["stats_read"] == 3)


def test_ending_a_session_is_told(client: Client, relay: RelayProcess) -> None:
    assert client.post("/sessions/agent%2F7/end", {}).status == 200
    wait_for(lambda: [e for e in relay.controller.events if e.get("session") == "agent/7"])


def test_a_websocket_is_refused(client: Client) -> None:
    assert client.get("/v1/realtime", {"Connection": "Upgrade", "Upgrade": "websocket"}).status == 501


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/m/v1/completions", "POST"),
        ("DELETE", "/v1/messages", "POST"),
        ("POST", "/stats", "GET, HEAD, OPTIONS"),
        ("GET", "/sessions/a/end", "OPTIONS, POST"),
    ],
)
def test_a_path_that_takes_another_method_says_which(client: Client, method: str, path: str, allowed: str) -> None:
    answer = client.raw(f"{method} {path} HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n".encode())
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    error = answer.json()["error"]
    fix = "POST" if "POST" in allowed else "GET"
    assert error["message"] == f"Method Not Allowed: {method} {path}; {fix} it"
    assert error["type"] == "invalid_request_error"
    assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)  # Anthropic's shape


# The control channel.


def test_nobody_is_served_before_the_first_table_and_nobody_refused(relay: RelayProcess, engine: FakeEngine) -> None:
    with Client(relay.port, timeout=0.3) as early:
        early.sock.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        with pytest.raises(TimeoutError):
            early.read()
        relay.controller.send_table([backend(1, engine.port)])
        early.sock.settimeout(PATIENCE_S)
        assert early.read().status == 200


def test_the_relay_serves_on_without_a_controller_and_the_next_one_hears_all(
    client: Client, relay: RelayProcess
) -> None:
    relay.controller.close()
    assert client.chat().status == 200
    successor = relay.connect()
    assert len(successor.finished(1)) == 1
    assert successor.listener.getsockname()[1] == relay.port


def test_a_replica_that_is_missing_without_a_controller_is_told_with_what_to_do(relay: RelayProcess) -> None:
    """As behind SSH, where the tunnels end with the controller that was killed."""
    with FakeEngine() as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        assert client.chat().status == 200
        relay.controller.close()
        wait_for(lambda: "the controller is gone" in relay.log(), "the relay's notice of that")
    with Client(relay.port) as client:
        for _ in range(3):  # when it is met, and when it is known
            answer = client.chat()
            assert answer.status == 503
            assert "`connect` takes over" in answer.body.decode()


def test_the_newest_controller_wins(relay: RelayProcess) -> None:
    relay.connect()
    assert relay.controller.is_closed.wait(PATIENCE_S)


def test_a_killed_relays_successor_refuses_no_connection(
    client: Client, relay: RelayProcess, engine: FakeEngine
) -> None:
    relay.process.kill()
    relay.process.wait(PATIENCE_S)
    with Client(relay.port) as waiting:
        relay.process = relay.start()
        relay.connect().send_table([backend(1, engine.port)])
        assert waiting.chat().status == 200


def test_the_control_socket_is_the_users_alone(relay: RelayProcess) -> None:
    assert stat.S_IMODE(os.stat(relay.path).st_mode) == 0o600


def test_a_control_socket_of_a_long_path_works(tmp_path: Path, engine: FakeEngine) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with RelayProcess(directory) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as client:
            assert client.chat().status == 200


def test_a_table_that_is_not_understood_changes_nothing(client: Client, relay: RelayProcess) -> None:
    relay.controller.send_table([], nonsense=1, proxy=None, drain_seconds="soon")
    assert client.chat().status == 200
    assert "not understood" in relay.log()


# Several replicas.


def test_turns_of_one_client_go_round(relay: RelayProcess) -> None:
    with FakeEngine() as one, FakeEngine() as other, Client(relay.port) as client:
        relay.controller.send_table([backend(1, one.port), backend(2, other.port)], proxy={"strategy": "round_robin"})
        served = [client.chat().headers["x-agent-infra-backend"] for _ in range(6)]
    assert served in (["r1", "r2"] * 3, ["r2", "r1"] * 3)


def test_a_turn_goes_elsewhere_when_its_replica_cannot_be_reached(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, free_port()), backend(2, engine.port)])
    with Client(relay.port) as client:
        assert [client.chat().status for _ in range(10)] == [200] * 10


def test_a_reported_load_steers_turns_away(relay: RelayProcess) -> None:
    with FakeEngine(load={"state": "ready", "running": 7, "waiting": 2}) as busy, FakeEngine() as free:
        rows = [backend(1, busy.port, telemetry_port=busy.port, slots=8), backend(2, free.port, slots=8)]
        relay.controller.send_table(rows)
        wait_for(lambda: [g for g in relay.controller.gauges if g["backends"].get("r1", {}).get("load")])
        with Client(relay.port) as client:
            assert {client.chat().headers["x-agent-infra-backend"] for _ in range(6)} == {"r2"}


def test_a_sleeping_replica_gets_no_work(relay: RelayProcess) -> None:
    with FakeEngine(load={"state": "ready", "is_sleeping": True}) as asleep:
        relay.controller.send_table([backend(1, asleep.port, telemetry_port=asleep.port)])
        with Client(relay.port) as client:
            wait_for(lambda: client.chat().status == 503)


def wait_refusal(client: Client, ending: str) -> None:
    """Until a turn is refused with such words."""
    said = "no replica of m is there to answer: " + ending
    wait_for(lambda: (answer := client.chat()).status == 503 and answer.json()["error"]["message"] == said, said)


def test_a_refusal_says_why_no_replica_answers_and_what_to_do(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([], models=["m"])
    with Client(relay.port) as client:
        wait_refusal(client, "none runs (`start` starts one)")
        relay.controller.send_table([backend(1, engine.port), backend(2, free_port())])
        wait_for(lambda: "replica r2 is out" in relay.log(), "the end of r2")
        client.post("/admin/backends/r1/drain", {})
        away = "r1 is draining (POST /admin/backends/r1/undrain)"
        wait_refusal(client, f"{away}, r2 is down (health probe: Connection refused)")
        relay.controller.send_table([backend(number, engine.port, state="draining") for number in range(1, 65)])
        wait_refusal(client, ", ".join(away.replace("r1", f"r{number}") for number in (1, 2, 3)) + ", 61 more")


@pytest.mark.parametrize(
    ("load", "reason"),
    [({"is_sleeping": True}, "r1 is asleep"), ({"state": "draining"}, "r1 is draining")],
    ids=["asleep", "draining by itself"],
)
def test_a_refusal_says_what_a_replica_said_of_itself(relay: RelayProcess, load: dict[str, Any], reason: str) -> None:
    with FakeEngine(load=load) as engine, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port, telemetry_port=engine.port)])
        wait_refusal(client, reason)


def test_a_drained_replica_finishes_its_turns_and_gets_no_more(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)])
    with Client(relay.port) as busy, Client(relay.port) as operator, ThreadPoolExecutor() as pool:
        turn = pool.submit(busy.chat, fake={"held": True})
        engine.wait_for("running", 1)
        assert operator.post("/admin/backends/r1/drain", {}).json()["in_flight"] == 1
        assert operator.chat().status == 503
        engine.call({"release": True})
        assert turn.result().status == 200
        wait_for(lambda: relay.controller.requests == [{"op": "drain", "backend": "r1"}])
        operator.post("/admin/backends/r1/undrain", {})
        assert operator.chat().status == 200


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_turn_at_the_replica(
    relay: RelayProcess, engine: FakeEngine, stream: bool
) -> None:
    relay.controller.send_table([backend(1, engine.port)])
    with Client(relay.port) as client:
        body = b'{"model":"m","stream":%b,"fake":{"%b":3600}}' % (
            b"true" if stream else b"false",
            b"gap" if stream else b"delay",
        )
        client.sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        engine.wait_for("running", 1)
    engine.wait_for("aborted", 1)
    [turn] = relay.controller.finished()
    assert turn["outcome"] == "aborted"


def test_a_client_that_leaves_at_the_last_event_has_its_answer(relay: RelayProcess, engine: FakeEngine) -> None:
    """The OpenAI SDK closes a stream at [DONE]; the replica ends the body a moment later."""
    relay.controller.send_table([backend(1, engine.port)])
    with Client(relay.port) as client:
        body = b'{"model":"m","stream":true,"fake":{"linger":3600}}'
        client.sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        received = b""
        while b"data: [DONE]" not in received:
            piece = client.sock.recv(65536)
            assert piece
            received += piece
    engine.wait_for("aborted", 1)
    [turn] = relay.controller.finished()
    assert (turn["outcome"], turn["status"], turn["finish_reason"]) == ("completed", 200, "stop")

"""Sessions through the relay: they stay on a replica, with and without headers; clients share the slots."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from program import Program, wait_for
from relay_harness import Client, RelayProcess, backend
from testbed.ports import free_port

Messages = list[dict[str, Any]]


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeEngine()) for _ in range(4)]


def serve(relay: RelayProcess, engines: list[FakeEngine], proxy: Mapping[str, Any] | None = None, **row: Any) -> None:
    rows = [backend(number, engine.port, **row) for number, engine in enumerate(engines, 1)]
    relay.controller.send_table(rows, proxy=proxy)


def respond(client: Client, document: Mapping[str, Any], is_stream: bool) -> tuple[dict[str, Any], str]:
    """An answer of /v1/responses, and the replica that gave it."""
    answer = client.post("/v1/responses", {"model": "m", "stream": is_stream, **document})
    assert answer.status == 200
    body: dict[str, Any] = json.loads(answer.events()[-1])["response"] if is_stream else answer.json()
    return body, answer.headers["x-agent-infra-backend"]


def converse(client: Client, first: str, turns: int, path: str = "/v1/chat/completions") -> list[str]:
    """The replicas that answered a conversation's turns, each of which repeats all that was said before."""
    messages: Messages = [{"role": "user", "content": first}]
    served = []
    for turn in range(turns):
        answer = client.post(path, {"model": "m", "max_tokens": 5, "messages": messages})
        assert answer.status == 200
        served.append(answer.headers["x-agent-infra-backend"])
        document = answer.json()
        said = document["content"] if "content" in document else document["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"tool result {turn}"}]
    return served


@pytest.mark.parametrize("header", ["X-Session-ID", "X-Claude-Code-Session-Id", "session_id", "x-session-affinity"])
def test_a_session_that_a_header_names_stays_on_one_replica(
    relay: RelayProcess, engines: list[FakeEngine], header: str
) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:
        served = {client.chat({header: "a"}).headers["x-agent-infra-backend"] for _ in range(12)}
    assert len(served) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_session_without_a_header_stays_on_one_replica(
    relay: RelayProcess, engines: list[FakeEngine], path: str
) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:
        assert len(set(converse(client, "hello", 10, path))) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_responses_conversation_without_a_header_stays_on_one_replica(
    relay: RelayProcess, engines: list[FakeEngine], is_stream: bool
) -> None:
    """Its input starts as a text and goes on as a list; answers with reasoning and calls are several items each."""
    serve(relay, engines)
    with Client(relay.port) as client:
        for number in range(3):
            given: Any = f"task {number}"
            items: Messages = [{"role": "user", "content": given}]
            homes = set()
            for turn in range(6):
                fake = {"say": f"Turn {turn} of {number}.", "calls": [f"call_{number}_{turn}"]}
                body, home = respond(client, {"input": given, "fake": fake}, is_stream)
                homes.add(home)
                items += body["output"]
                items.append({"type": "function_call_output", "call_id": f"call_{number}_{turn}", "output": "done"})
                given = items
            assert len(homes) == 1
    sessions = Counter(event["started"]["session"] for event in relay.controller.finished(18))
    assert set(sessions) == {None}
    assert len({event["started"]["follows"] for event in relay.controller.finished(18)} - {""}) == 15


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("proxy", [{}, {"strategy": "round_robin"}], ids=["default", "round-robin"])
def test_a_turn_that_continues_a_response_by_its_id_goes_to_the_replica_that_holds_it(
    relay: RelayProcess, engines: list[FakeEngine], proxy: Mapping[str, Any], is_stream: bool
) -> None:
    """Whatever the strategy; and it belongs to the same session. Where the replica is gone, the engine says so."""
    serve(relay, engines, proxy)
    with Client(relay.port) as client:
        body, home = respond(client, {"input": "hello"}, is_stream)
        for _ in range(5):
            body, served = respond(client, {"input": "go on", "previous_response_id": body["id"]}, is_stream)
            assert served == home
            assert "error" not in body
        sessions = {event["started"]["session"] for event in relay.controller.finished(6)[1:]}
        assert len(sessions) == 1
        assert sessions.pop().startswith("auto-")
        engines[int(home[1:]) - 1].kill()
        answer = client.post("/v1/responses", {"model": "m", "input": "go on", "previous_response_id": body["id"]})
        assert "not found" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("is_named", [True, False])
def test_sub_agents_join_the_replica_that_has_their_parents_context(
    relay: RelayProcess, engines: list[FakeEngine], path: str, is_named: bool
) -> None:
    """The parent goes on meanwhile, and other sessions have none of its context."""
    serve(relay, engines)
    given: Messages = [{"role": "user", "content": "the task " * 20_000}]

    def ask(session: str, messages: Messages) -> str:
        headers = {"X-Session-ID": session} if is_named else {}
        said = "input" if path == "/v1/responses" else "messages"
        answer = client.post(path, {"model": "m", "max_tokens": 5, said: messages}, headers)
        assert answer.status == 200
        return answer.headers["x-agent-infra-backend"]

    with Client(relay.port) as client:
        home = ask("parent", given)
        given += [{"role": "assistant", "content": "I delegate."}, {"role": "user", "content": "Do."}]
        assert ask("parent", given) == home
        subtasks = [[*given[:-1], {"role": "user", "content": f"subtask {number}"}] for number in range(4)]
        assert {ask(f"sub-agent {number}", subtask) for number, subtask in enumerate(subtasks)} == {home}
        others = {ask(f"other {n}", [{"role": "user", "content": f"{n} another task " * 10_000}]) for n in range(6)}
    assert len(others - {home}) == 3


def test_sessions_are_spread_though_each_comes_when_all_replicas_are_idle(
    relay: RelayProcess, engines: list[FakeEngine]
) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:
        homes = Counter(converse(client, f"task {number}: " + "x" * 400, 2)[0] for number in range(16))
    assert sorted(homes.values()) == [4, 4, 4, 4]


def test_a_client_librarys_retry_is_the_same_turn(relay: RelayProcess, engines: list[FakeEngine]) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:
        for number, status in enumerate([500] * 8 + [200] * 8):  # 200: its client gave up just before
            messages = [{"role": "user", "content": f"task {number}"}]
            first = client.chat(messages=messages, fake={"status": status})
            again = client.chat({"x-stainless-retry-count": "1"}, messages=messages)
            assert first.headers["x-agent-infra-backend"] == again.headers["x-agent-infra-backend"]
    assert [turn["started"]["is_retry"] for turn in relay.controller.finished(32)] == [False, True] * 16


def test_identical_conversations_at_once_are_sessions_with_all_their_turns(
    relay: RelayProcess, engines: list[FakeEngine]
) -> None:
    serve(relay, engines)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(relay.port)) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            served = list(pool.map(lambda client: converse(client, "the same words", 4), clients))
    assert sorted(Counter(replica for replicas in served for replica in replicas).values()) == [4] * 4


def test_without_affinity_turns_are_spread(relay: RelayProcess, engines: list[FakeEngine]) -> None:
    serve(relay, engines, {"session_affinity": "off"})
    with Client(relay.port) as client:
        assert len({client.chat({"X-Session-ID": "a"}).headers["x-agent-infra-backend"] for _ in range(8)}) == 4


def test_a_session_leaves_a_draining_replica_once_and_stays_where_it_went(
    relay: RelayProcess, engines: list[FakeEngine]
) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:

        def turn() -> str:
            return client.chat({"X-Session-ID": "a"}).headers["x-agent-infra-backend"]

        home = turn()
        rows = [backend(number, engine.port) for number, engine in enumerate(engines, 1)]
        drained = [backend(int(home[1:]), engines[int(home[1:]) - 1].port, state="draining")]
        relay.controller.send_table([row for row in rows if row.id != home] + drained)
        second = wait_for(lambda: {turn()} - {home}, "another replica").pop()
        relay.controller.send_table(rows)
        assert {turn() for _ in range(8)} == {second}


def test_a_killed_replicas_session_is_answered_elsewhere_and_stays_there(
    relay: RelayProcess, engines: list[FakeEngine]
) -> None:
    serve(relay, engines)
    with Client(relay.port) as client:
        home = client.chat({"X-Session-ID": "a"}).headers["x-agent-infra-backend"]
        engines[int(home[1:]) - 1].kill()
        answers = [client.chat({"X-Session-ID": "a"}) for _ in range(8)]
    assert [answer.status for answer in answers] == [200] * 8
    assert len({answer.headers["x-agent-infra-backend"] for answer in answers} - {home}) == 1


def test_a_replica_that_fails_at_once_doesnt_attract_every_turn(relay: RelayProcess) -> None:
    with FakeEngine(status=500) as broken, FakeEngine(delay=0.02) as sound:
        relay.controller.send_table([backend(1, broken.port), backend(2, sound.port)])
        with Client(relay.port) as client:
            statuses = Counter(client.chat({"X-Session-ID": f"s{number}"}).status for number in range(40))
    assert statuses[500] <= 12  # until it is ejected, and a trial now and then
    assert statuses[200] >= 28


def test_the_only_replica_is_not_ejected_for_its_errors(relay: RelayProcess) -> None:
    with FakeEngine(status=500) as engine:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port) as client:
            assert [client.chat().status for _ in range(10)] == [500] * 10


def test_a_turn_comes_back_to_a_replica_that_it_could_not_reach(relay: RelayProcess) -> None:
    port = free_port()
    relay.controller.send_table([backend(1, port)], loading=["m"])
    with ThreadPoolExecutor(1) as pool, Client(relay.port) as client:
        answer = pool.submit(client.chat)
        time.sleep(0.3)  # it was tried, and refused the connection
        with FakeEngine(port=port):
            assert answer.result().status == 200


@pytest.mark.parametrize("has_new_sessions", [True, False], ids=["500 sessions", "one session"])
def test_a_polite_clients_turn_goes_before_a_greedy_ones_queue(relay: RelayProcess, has_new_sessions: bool) -> None:
    """Whether 500 requests of the greedy client have a new session each, or all the same one."""
    with FakeEngine(delay=0.1) as engine, ExitStack() as stack:
        serve(relay, [engine], {"max_queue": 1000}, slots=2)
        greedy = [stack.enter_context(Client(relay.port)) for _ in range(500)]
        document = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
        for number, client in enumerate(greedy):
            head = f"Host: t\r\nX-Client-ID: greedy\r\nX-Session-ID: g{number if has_new_sessions else 0}"
            length = f"Content-Length: {len(document)}"
            client.sock.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{length}\r\n\r\n{document}".encode())
        gauges = relay.controller.gauges
        wait_for(lambda: gauges[-1:] and gauges[-1]["queue"]["pending"] > 300, "a long queue")
        polite = stack.enter_context(Client(relay.port))
        for _ in range(3):
            assert polite.chat({"X-Client-ID": "polite", "X-Session-ID": "p"}).status == 200
        engine.call({})
        assert [client.read().status for client in greedy] == [200] * 500
        turns = relay.controller.finished(503)
    waits = {"polite": list[tuple[float, float]](), "greedy": list[tuple[float, float]]()}  # arrival and sending
    for turn in turns:
        arrived = turn["started"]["at"]
        waits[turn["started"]["client"]].append((arrived, arrived + turn["queue_ms"] / 1000))
    assert len(waits["polite"]) == 3
    for arrived, sent in waits["polite"]:  # nobody else got a slot meanwhile; a millisecond for two clocks' readings
        assert [other for _, other in waits["greedy"] if arrived + 0.001 < other < sent - 0.001] == []


def test_a_turn_that_is_held_for_a_kv_cache_says_so_and_goes_on_when_there_is_room(relay: RelayProcess) -> None:
    with FakeEngine(load={"state": "ready", "kv_capacity_tokens": 10_000}) as engine:
        serve(relay, [engine], telemetry_port=engine.port)
        wait_for(
            lambda: (seen := relay.controller.gauges[-1:]) and seen[0]["backends"].get("r1", {}).get("load"), "load"
        )

        def send(session: str) -> int:
            with Client(relay.port) as client:
                words = [{"role": "user", "content": session + "x" * 16_000}]  # some 4,000 tokens
                return client.chat({"X-Session-ID": session}, messages=words, fake={"held": True}).status

        with ThreadPoolExecutor(3) as pool, Client(relay.port) as client:
            turns = [pool.submit(send, session) for session in ("a", "b", "c")]
            queue = wait_for(lambda: (seen := client.get("/queue/status").json())["held"] and seen, "a held turn")
            assert (queue["pending"], queue["held"], queue["in_flight"]) == (1, 1, 2)
            assert queue["waiting"][0]["held"] is True
            assert "tokens aren't cached" in queue["waiting"][0]["why"]
            engine.call({"release": True})
            assert [turn.result() for turn in turns] == [200, 200, 200]
            assert client.get("/queue/status").json()["held"] == 0


def test_an_engine_that_schedules_by_priority_gets_the_order_of_our_queue(tmp_path: Path) -> None:
    """Near 0, which its other requests have; the session that had a second of service comes as much later. Here, the
    moments that a turn waits for this machine count for little."""
    with FakeEngine() as engine, RelayProcess(tmp_path, AGING=0.05) as relay:
        serve(relay, [engine], takes_priority=True)

        def priority(session: str, **fields: Any) -> Any:
            client.chat({"X-Session-ID": session}, **fields)
            sent = json.loads(engine.call()["body"])
            assert sent["messages"] == [{"role": "user", "content": "hello"}]
            return sent["priority"]

        with Client(relay.port) as client:
            client.chat({"X-Session-ID": "busy"}, fake={"delay": 1.0})
            assert priority("busy") > 400
            assert abs(priority("new")) < 400
            assert priority("new", priority=7) == 7  # the client's own
            answer = client.post("/v1/messages", {"model": "m", "messages": [{"role": "user", "content": "hello"}]})
            assert answer.status == 200
            assert "priority" not in json.loads(engine.call()["body"])
        serve(relay, [engine])
        with Client(relay.port) as client:
            client.chat()
            assert "priority" not in json.loads(engine.call()["body"])


@pytest.mark.parametrize("has_header", [True, False])
def test_the_prefix_of_a_session_is_cached_on_the_replica_that_gets_its_next_turn(
    app: Program, has_header: bool
) -> None:
    """Two real engines; each conversation alternates with others, and every answer says what was cached."""
    app.configure(replicas=2)
    assert app.run("start").returncode == 0
    assert app.run("connect", "--background").returncode == 0
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "both replicas")
    words = " ".join(f"item {number}" for number in range(60))
    talks: list[Messages] = [[{"role": "user", "content": f"List {number}: {words}"}] for number in range(3)]
    prompts, homes = [0] * len(talks), [set[str]() for _ in talks]
    with Client(app.port) as client:
        for turn in range(4):
            for number, messages in enumerate(talks):
                headers = {"X-Session-ID": f"talk-{number}"} if has_header else None
                fields = {"model": "smollm2", "max_tokens": 4, "temperature": 0, "messages": messages}
                answer = client.post("/v1/chat/completions", fields, headers)
                document, usage = answer.json(), answer.json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] >= 0.8 * prompts[number], (turn, number)
                prompts[number] = usage["prompt_tokens"]
                homes[number].add(answer.headers["x-agent-infra-backend"])
                messages.append({"role": "assistant", "content": document["choices"][0]["message"]["content"]})
                messages.append({"role": "user", "content": f"Go on with step {turn}."})
    assert [len(served) for served in homes] == [1, 1, 1]

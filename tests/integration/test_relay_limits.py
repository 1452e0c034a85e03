"""What a client sees at each limit of docs/operations.md that no other test reaches, and that it costs nobody else."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from program import wait_for
from relay_harness import KEY, Client, RelayProcess, another_user, backend, request

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
FEW_DESCRIPTORS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
HOURS = 3600.0


@pytest.fixture
def relay(tmp_path: Path, engine: FakeEngine) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        yield relay


def test_a_body_of_anything_but_inference_has_a_limit_of_its_own(relay: RelayProcess) -> None:
    with Client(relay.port) as client:
        assert client.post("/runs", b" " * (65 << 10)).status == 413


def test_a_long_body_of_millions_of_values_is_413(relay: RelayProcess, engine: FakeEngine) -> None:
    with Client(relay.port) as client:
        refused = client.post("/v1/completions", b'{"model":"m","prompt":[%b0]}' % (b"1234," * 4_000_001))
        assert (refused.status, "4,000,000 values" in refused.json()["error"]["message"]) == (413, True)
        assert client.chat().status == 200
    assert engine.call()["requests"] == 1


def test_a_connection_that_asks_nothing_more_is_closed(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path, IDLE_CLIENT_S=0.3) as relay, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        assert client.chat().status == 200
        assert client.is_closed()


def test_a_replicas_head_without_end_is_502(relay: RelayProcess) -> None:
    with Client(relay.port) as client:
        refused = client.chat(fake={"head": 100_000})
        assert (refused.status, "head is too long" in refused.json()["error"]["message"]) == (502, True)


def test_names_are_cut_and_stay_apart(relay: RelayProcess) -> None:
    with Client(relay.port) as client:
        for end in "ab":
            client.chat({"X-Session-ID": "s" * 5000 + end, "X-Task-ID": "t" * 256})
    turns = [event["started"] for event in relay.controller.finished(2)]
    assert [(len(turn["session"]), turn["task"]) for turn in turns] == [(256, "t" * 256)] * 2
    assert turns[0]["session"] != turns[1]["session"]
    with Client(relay.port) as client:  # by its whole name, or by the one that is shown
        ended = [client.post(f"/sessions/{name}/end", b"").json() for name in ("s" * 5000 + "b", turns[1]["session"])]
    assert ended == [{"session": turns[1]["session"], "noted": True}] * 2


def test_a_body_too_long_to_follow_belongs_to_the_session_that_its_header_names(relay: RelayProcess) -> None:
    messages = [{"role": "user", "content": "x" * (1 << 20)}]
    with Client(relay.port) as client:
        assert client.chat({"X-Session-ID": "s"}, messages=messages).status == 200
        assert client.chat(messages=messages).status == 200
    named, nameless = [event["started"] for event in relay.controller.finished(2)]
    assert (named["session"], named["prints"]) == ("s", b"")
    assert (nameless["session"], nameless["prints"], nameless["follows"]) == (None, b"", None)


def test_a_flood_of_refusals_is_counted_in_the_log(relay: RelayProcess) -> None:
    with Client(relay.port) as client:

        def refuse() -> int:
            assert client.post("/v1/chat/completions", b"none").status == 400
            return 1

        count = sum(refuse() for _ in range(100))
        while "more like that" not in relay.log():
            count += refuse()
    lines = relay.log().count("refused ")
    assert lines < count
    more = [int(number) for number in re.findall(r"and (\d+) more like that", relay.log())]
    assert sum(more) <= count - lines


# Bodies: what is kept for a retry only makes room.


def test_turns_in_flight_hold_no_body_that_another_turn_needs(tmp_path: Path, engine: FakeEngine) -> None:
    with RelayProcess(tmp_path) as relay, ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port, slots=50)], proxy={"max_buffered_mb": 1})
        engine.call({"held": True})
        clients = [stack.enter_context(Client(relay.port)) for _ in range(10)]
        for count, client in enumerate(clients, 1):
            client.sock.sendall(request(padding="x" * 300_000))
            engine.wait_for("running", count)
        engine.call({"release": True})
        assert [client.read().status for client in clients] == [200] * 10


def test_a_turn_whose_body_made_room_is_not_sent_again_and_the_others_are(tmp_path: Path) -> None:
    with FakeEngine() as one, FakeEngine() as other, RelayProcess(tmp_path) as relay, ExitStack() as stack:
        relay.controller.send_table([backend(1, one.port)], proxy={"max_buffered_mb": 1})
        one.call({"held": True})
        clients = [stack.enter_context(Client(relay.port)) for _ in range(4)]
        for count, client in enumerate(clients, 1):
            client.sock.sendall(request(padding="x" * 300_000))
            one.wait_for("running", count)
        relay.controller.send_table([backend(1, one.port), backend(2, other.port)])
        with Client(relay.port) as asking:
            wait_for(lambda: asking.get("/health").json()["models"]["m"]["ready"] == 2, "the other one")
        one.kill()
        answers = [client.read() for client in clients]
    assert [answer.status for answer in answers].count(200) == 2
    refused = [answer for answer in answers if answer.status != 200]
    assert {answer.status for answer in refused} == {502}
    assert all("max_buffered_mb" in answer.json()["error"]["message"] for answer in refused)


# Descriptors: who holds most of them costs nobody anything.


@needs_root
@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp"], ids=["nothing", "half a head"])
def test_another_user_without_the_key_keeps_nobody_out(tmp_path: Path, engine: FakeEngine, sent: bytes) -> None:
    patience: dict[str, Any] = {"STRANGER_S": HOURS, "HEAD_S": HOURS}
    with RelayProcess(tmp_path, prelude=FEW_DESCRIPTORS, **patience) as relay, ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port)])
        with another_user():
            for _ in range(200):
                stack.enter_context(Client(relay.port)).sock.sendall(sent)
        wait_for(lambda: "no connection can be accepted" in relay.log(), "the lack of descriptors")
        with Client(relay.port) as client:
            assert client.chat().status == 200


@needs_root
def test_idle_connections_of_another_user_with_the_key_keep_nobody_out(tmp_path: Path, engine: FakeEngine) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    with RelayProcess(tmp_path, prelude=FEW_DESCRIPTORS) as relay, ExitStack() as stack:
        relay.controller.send_table([backend(1, engine.port)])
        mine = stack.enter_context(Client(relay.port))
        assert mine.chat().status == 200
        with another_user():
            others = [stack.enter_context(Client(relay.port)) for _ in range(80)]
        assert [each.chat(key).status for each in others] == [200] * 80
        more = [stack.enter_context(Client(relay.port)) for _ in range(30)]
        assert [each.chat().status for each in more] == [200] * 30
        assert mine.chat().status == 200  # which was idle longest


@needs_root
def test_another_users_turns_leave_room_for_mine_and_are_refused_beyond_their_share(
    tmp_path: Path, engine: FakeEngine
) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    statuses, lock = list[int](), threading.Lock()
    with RelayProcess(tmp_path, prelude=FEW_DESCRIPTORS) as relay, ExitStack() as stack, ThreadPoolExecutor(70) as pool:
        relay.controller.send_table([backend(1, engine.port)])
        with another_user():
            others = [stack.enter_context(Client(relay.port)) for _ in range(70)]

        def ask(client: Client) -> None:
            status = client.chat(key, fake={"held": True}).status
            with lock:
                statuses.append(status)

        asked = [pool.submit(ask, client) for client in others]
        wait_for(lambda: 503 in statuses, "the first refusal")
        with Client(relay.port) as client:
            assert client.chat().status == 200
        engine.call({"release": True})
        for each in asked:
            each.result()
    assert set(statuses) == {200, 503}
    assert statuses.count(200) > 30

"""Long bodies that come in pieces, behind a head that the relay knows.

A head is known, and its key let pass, from a connection's second request on; so each test here makes one before.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from relay_harness import Client, RelayProcess, backend

LONGER = 300_000
LONG = 100_000


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


def chat(size: int, path: str = "/v1/chat/completions", model: str = "m", word: str = "x") -> bytes:
    """A request with a body of ``size`` bytes."""
    empty = json.dumps({"model": model, "messages": [{"role": "user", "content": ""}]})
    body = empty.replace('""', f'"{word * (size - len(empty))}"').encode()
    assert len(body) == size
    return b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), size, body)


def body_at(request: bytes) -> int:
    return request.index(b"\r\n\r\n") + 4


def introduce(client: Client, path: str = "/v1/chat/completions") -> None:
    """Make the relay know the head of the requests that follow."""
    for _ in range(2):
        assert client.raw(chat(200, path)).status == 200


def send_apart(client: Client, pieces: list[bytes]) -> None:
    for piece in pieces:
        client.sock.sendall(piece)
        time.sleep(0.01)  # each piece is to come by itself; one that does not is read as well


@pytest.mark.parametrize("size", [LONG, LONGER])
def test_a_body_in_pieces_arrives_as_it_was_sent(relay: RelayProcess, engine: FakeEngine, size: int) -> None:
    relay.controller.send_table([backend(1, engine.port)])
    chance = random.Random(size)
    with Client(relay.port) as client:
        introduce(client)
        for number in range(20):
            sent = chat(size, word=f"{number:x}"[-1])
            head = body_at(sent)
            first = (head, head + 1, len(sent) - 1, head - 2)[number] if number < 4 else chance.randrange(1, len(sent))
            cuts = [0, *sorted({first, *(chance.randrange(first, len(sent)) for _ in range(number % 5))}), len(sent)]
            send_apart(client, [sent[start:end] for start, end in itertools.pairwise(cuts)])
            assert client.read().status == 200
            assert engine.call()["body"].encode() == sent[head:][:LONG]
    assert len(relay.controller.finished(22)) == 22


def test_the_next_request_may_come_with_the_end_of_a_body(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)])
    with Client(relay.port) as client:
        introduce(client)
        for size in (200, LONG):
            first, second = chat(LONG, word="1"), chat(size, word="2")
            send_apart(client, [first[:5_000], first[5_000:] + second[:150], second[150:]])
            assert [client.read().status, client.read().status] == [200, 200]
            assert engine.call()["body"].encode() == second[body_at(second) :]


def test_a_body_in_pieces_that_is_refused_leaves_the_connection_in_order(
    relay: RelayProcess, engine: FakeEngine
) -> None:
    relay.controller.send_table([backend(1, engine.port), backend(2, engine.port, model="n")])
    with Client(relay.port) as client:
        introduce(client)
        for sent, status in (
            (chat(LONG).replace(b'{"model"', b'["model"'), 400),
            (chat(LONG, model="elsewhere"), 404),
            (chat(LONG), 200),
        ):
            send_apart(client, [sent[:5_000], sent[5_000:60_000], sent[60_000:]])
            assert client.read().status == status


@pytest.mark.parametrize(("path", "shape"), [("/v1/chat/completions", "message"), ("/v1/messages", "type")])
def test_the_rest_of_a_body_that_does_not_come_is_408(
    tmp_path: Path, engine: FakeEngine, path: str, shape: str
) -> None:
    with RelayProcess(tmp_path, BODY_S=0.5, LINGER_S=0.1) as relay, Client(relay.port) as client:
        relay.controller.send_table([backend(1, engine.port)])
        introduce(client, path)
        answer = client.raw(chat(LONG, path)[:9_000])
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert "the rest of the body did not come in time" in answer.json()["error"]["message"]
        assert (answer.json().get("type") == "error") == (shape == "type")
        assert client.is_closed()


def test_bodies_that_arrive_count_and_their_room_comes_back(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)], proxy={"max_buffered_mb": 0.25})
    sent = chat(LONG)
    with Client(relay.port) as one, Client(relay.port) as two, Client(relay.port) as three:
        for client in (one, two, three):
            introduce(client)
        one.sock.sendall(sent[:5_000])
        two.sock.sendall(sent[:5_000])
        relay.controller.wait_for_a_round()
        answer = three.raw(sent)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        one.sock.close()  # it leaves in the middle
        relay.controller.wait_for_a_round()
        two.sock.sendall(sent[5_000:])
        assert two.read().status == 200
        for _ in range(5):
            send_apart(two, [sent[:5_000], sent[5_000:]])
            assert two.read().status == 200
    with Client(relay.port) as client:
        assert client.raw(chat(200_000)).status == 200
    assert engine.call()["aborted"] == 0


def test_a_body_that_arrives_is_waited_for_when_the_relay_ends(relay: RelayProcess, engine: FakeEngine) -> None:
    relay.controller.send_table([backend(1, engine.port)], drain_seconds=PATIENCE_S)
    sent = chat(LONG)
    with Client(relay.port) as client, Client(relay.port) as idle:
        introduce(client)
        introduce(idle)
        client.sock.sendall(sent[:5_000])
        relay.controller.wait_for_a_round()
        relay.process.send_signal(signal.SIGTERM)
        assert idle.is_closed()
        client.sock.sendall(sent[5_000:])
        assert client.read().status == 200
        assert client.is_closed()
    assert relay.process.wait(PATIENCE_S) == 0

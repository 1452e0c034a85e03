"""Shares of what is limited: bytes of bodies, connections, and what waits for a controller."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from agent_infra_core.protocol import Backend
from agent_infra_core.relay import control, server
from agent_infra_core.relay.connection import HeldBodies
from agent_infra_core.relay.control import ControlChannel, Questions
from agent_infra_core.relay.replicas import LiveReplica
from agent_infra_core.relay.server import Acceptor


class Sent:
    """A connection whose body was sent and is kept for a retry."""

    has_sent_body = True

    def __init__(self, bodies: HeldBodies, identity: str, held_bytes: int) -> None:
        self.bodies, self.identity, self.held_bytes = bodies, identity, held_bytes
        bodies.add(identity, held_bytes)

    def spend_body(self) -> None:
        self.bodies.add(self.identity, -self.held_bytes)
        self.held_bytes = 0


def held_bodies() -> HeldBodies:
    bodies = HeldBodies()
    bodies.limit = 1000
    return bodies


def test_a_client_beyond_its_own_share_costs_nobody_a_retry() -> None:
    bodies = held_bodies()
    bodies.add("greedy", 740)  # still to be sent
    sent: Any = [Sent(bodies, name, 50) for name in ("greedy", "other", "third")]
    assert not bodies.make_room("greedy", 100, 0, sent)
    assert [each.held_bytes for each in sent] == [50, 50, 50]
    assert bodies.make_room("greedy", 10, 0, sent)  # its own is enough
    assert [each.held_bytes for each in sent] == [0, 50, 50]


def test_of_others_as_many_bodies_are_forgotten_as_are_in_the_way() -> None:
    bodies = held_bodies()
    sent: Any = [Sent(bodies, name, 400) for name in ("other", "third")]
    assert bodies.make_room("new", 500, 0, sent)
    assert sorted(each.held_bytes for each in sent) == [0, 400]


def test_one_body_alone_may_be_larger_than_its_clients_share_in_pieces_too() -> None:
    bodies, begun = held_bodies(), 0
    while begun < 1000:
        assert bodies.has_room("one", 100, begun)
        bodies.add("one", 100)
        begun += 100
    assert not bodies.has_room("one", 100, begun)
    assert not HeldBodies.has_room(bodies, "two", 1)


def connection(owner: str, sharer: str | None = None) -> Any:
    return SimpleNamespace(owner=owner, sharer=sharer, identity=sharer or owner, is_among_last=True)


def test_the_last_connections_are_refused_by_client_not_by_user(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = [connection("this user", "greedy") for _ in range(90)]
    innocent = connection("this user", "innocent")
    relay: Any = SimpleNamespace(connections=[*greedy, innocent])
    acceptor = Acceptor(relay)
    lowest: Callable[[Any], int] = lambda _: 10**9  # noqa: E731 - none is left
    monkeypatch.setattr(server.Acceptor, "_lowest_free", lowest)
    assert acceptor.has_most(greedy[0])
    assert not acceptor.has_most(innocent)
    monkeypatch.setattr(server.Acceptor, "_lowest_free", lambda _: 3)  # some have left
    assert not acceptor.has_most(greedy[0])
    assert not greedy[0].is_among_last


def test_events_without_a_controller_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_BUFFERED_BYTES", 1000)
    channel: Any = ControlChannel.__new__(ControlChannel)
    channel._finished, channel._finished_bytes, channel.events_dropped = deque(), 0, 0
    for number in range(30):
        channel.add_finished(b"%100d" % number)
    assert [int(event) for event in channel._finished] == list(range(20, 30))
    assert (channel._finished_bytes, channel.events_dropped) == (1000, 20)


class Stalled:
    """A channel that can be asked, and a reactor whose greenlets run when the test lets them."""

    is_connected = True

    def __init__(self) -> None:
        self.spawned: list[Callable[[], None]] = []
        self.sent: list[dict[str, Any]] = []
        self.during_wait: Callable[[], None] = lambda: None

    def spawn(self, task: Callable[[], None]) -> None:
        self.spawned.append(task)

    def new_result(self) -> Any:
        return SimpleNamespace(wait=lambda _: self.during_wait())

    def flush(self) -> None:
        pass

    def send(self, _kind: bytes, payload: bytes) -> None:
        self.sent.append(json.loads(payload))


def test_questions_that_nobody_waits_for_are_not_asked_and_take_no_greenlets() -> None:
    stalled: Any = Stalled()
    questions = Questions(stalled, stalled)
    assert [questions.ask("stats", 1.0) for _ in range(100)] == [None] * 100
    [task] = stalled.spawned
    stalled.during_wait = task  # the controller reads again
    assert questions.ask("runs", 1.0) is None
    assert [question["op"] for question in stalled.sent] == ["runs"]
    assert questions.ask("stats", 1.0) is None
    assert len(stalled.spawned) == 2


def test_two_relays_questions_have_different_numbers() -> None:
    numbers = set()
    for _ in range(2):
        stalled: Any = Stalled()
        stalled.during_wait = lambda stalled=stalled: stalled.spawned.pop()()
        Questions(stalled, stalled).ask("stats", 1.0)
        numbers.add(stalled.sent[0]["id"])
    assert len(numbers) == 2
    assert all(number < 2**53 for number in numbers)


def test_a_death_that_is_noticed_late_says_nothing_about_the_successor() -> None:
    replica = LiveReplica(Backend("r", "m", "10.0.0.1", 1, None))
    sent = time.monotonic()
    replica.note_failure("it died", True, sent)
    assert replica.health == "down"
    replica.set_health("trial", None)  # its successor answers
    replica.note_failure("it died", True, sent)
    replica.note_failure("lost", False, sent)
    assert (replica.health, replica.errors) == ("trial", 3)
    replica.note_failure("it died", True, time.monotonic())
    assert replica.health == "down"

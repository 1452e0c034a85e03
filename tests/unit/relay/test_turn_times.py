"""What a turn of the relay records of its waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from agent_infra_core.relay.book import Turn


def make_turn() -> Turn:
    plan: Any = SimpleNamespace(path=b"/v1/chat/completions", labels=SimpleNamespace(session="s"))
    turn = Turn("t", "m", plan, 0)
    turn.arrived = 100.0
    return turn


REPLICA: Any = SimpleNamespace(id="m-1")


def test_a_hold_is_part_of_the_queue_and_ends_with_the_wait() -> None:
    turn = make_turn()
    for now, is_held in ((101.0, True), (102.0, True), (104.0, False), (105.0, True), (106.0, False), (107.0, False)):
        turn.note_held(is_held, now)
    turn.send_to(REPLICA, 108.0)
    assert (turn.queue_ms, turn.held_ms, turn.retry_ms) == (8000.0, 4000.0, 0.0)


def test_a_retry_is_from_the_first_to_the_last_sending_with_all_waits_between() -> None:
    turn = make_turn()
    turn.send_to(REPLICA, 101.0)
    turn.note_held(True, 102.0)
    turn.note_held(False, 103.0)
    turn.send_to(REPLICA, 104.0)
    turn.send_to(REPLICA, 106.0)
    assert (turn.queue_ms, turn.held_ms, turn.retry_ms) == (6000.0, 0.0, 5000.0)

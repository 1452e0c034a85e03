"""The queue's order: fair between clients, then between sessions; cached prefixes first within bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_infra_core.routing.queue_order import (
    MOST_SKIPPED,
    MOST_SKIPS,
    AttainedService,
    FairQueue,
    Waiting,
    queue_key,
)


class Queue:
    """A fair queue of named turns, the key of each its position."""

    def __init__(self, turns: Iterable[tuple[str, str]] = ()) -> None:
        self.queue: FairQueue[str] = FairQueue()
        self.count = 0
        for client, turn in turns:
            self.add(client, turn)

    def add(self, client: str, turn: str, key: float | None = None) -> None:
        self.count += 1
        self.queue.add(Waiting(turn, client, self.count if key is None else key, self.count))

    def give(self, warm: Sequence[str] = (), refused: Sequence[str] = ()) -> str | None:
        found = self.queue.give(lambda turn: turn not in refused, lambda turn: turn in warm)
        if found is None:
            return None
        self.queue.start(found.client)
        return found.turn


def test_a_polite_clients_turn_takes_the_next_free_slot_whatever_a_greedy_one_sends() -> None:
    queue = Queue(("greedy", f"g{number}") for number in range(500))
    for _ in range(8):
        queue.give()
    queue.add("polite", "p", key=1e9)
    assert queue.give() == "p"


def test_clients_share_the_slots_evenly() -> None:
    queue = Queue(
        [("greedy", f"g{number}") for number in range(50)] + [("other", f"o{number}") for number in range(50)]
    )
    given = [queue.give() or "" for _ in range(20)]
    assert sum(turn.startswith("g") for turn in given) == 10


def test_of_one_client_the_turn_with_the_lowest_key_goes_first() -> None:
    queue = Queue()
    for turn, key in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        queue.add("one", turn, key)
    assert [queue.give(), queue.give(), queue.give(), queue.give()] == ["a", "b", "c", None]


def test_a_turn_with_a_cached_prefix_skips_others_a_bounded_number_of_times() -> None:
    queue = Queue([("one", "cold"), *(("one", f"warm{number}") for number in range(10))])
    warm = [f"warm{number}" for number in range(10)]
    assert [queue.give(warm) for _ in range(MOST_SKIPPED + 1)] == [*warm[:MOST_SKIPPED], "cold"]


def test_a_turn_far_behind_skips_nobody() -> None:
    queue = Queue(("one", f"t{number}") for number in range(40))
    assert queue.give([f"t{MOST_SKIPS + 1}"]) == "t0"


def test_a_turn_that_refuses_the_slot_blocks_nobody() -> None:
    queue = Queue([("one", "held"), ("one", "other"), ("two", "third")])
    assert [queue.give(refused=["held"]) for _ in range(3)] == ["other", "third", None]
    assert [waiting.turn for waiting in queue.queue] == ["held"]


def test_a_turn_that_gives_up_leaves_the_queue() -> None:
    queue = Queue([("one", "a"), ("one", "b")])
    [a, b] = list(queue.queue)
    assert queue.queue.remove(a)
    assert not queue.queue.remove(a)
    assert queue.give() == "b"
    assert b not in list(queue.queue)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100), st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(0, 60), max_size=60),
)
def test_every_turn_is_served_once(turns: Sequence[tuple[str, float, bool]], ends: Sequence[int]) -> None:
    queue = Queue()
    for number, (client, key, _) in enumerate(turns):
        queue.add(client, f"{client}{number}", key)
    warm = [f"{client}{number}" for number, (client, _, is_warm) in enumerate(turns) if is_warm]
    served: list[str] = []
    for step in range(len(turns)):
        turn = queue.give(warm)
        assert turn is not None
        served.append(turn)
        if step in ends:
            queue.queue.end(turn[0])
    assert sorted(served) == sorted(f"{client}{number}" for number, (client, _, _) in enumerate(turns))
    assert queue.give() is None


def test_a_session_that_had_more_service_waits_behind_one_that_had_less() -> None:
    assert queue_key(10.0, 100.0, 60.0) > queue_key(0.0, 100.0, 60.0)


def test_waiting_outweighs_any_service_within_half_the_queue_timeout() -> None:
    assert queue_key(1e9, 100.0, 60.0) <= queue_key(0.0, 130.0, 60.0)


def test_attained_service_halves_in_a_minute_and_can_be_given_back() -> None:
    service = AttainedService()
    assert service.charge("s", 8.0, 0.0) == 0.0
    assert service.charge("s", -1.0, 60.0) == pytest.approx(4.0)
    assert service.charge("s", 0.0, 60.0) == pytest.approx(3.0)


def test_attained_service_is_kept_for_a_bounded_number_of_sessions() -> None:
    service = AttainedService(limit=2)
    for session in "abc":
        service.charge(session, 5.0, 0.0)
    assert service.charge("a", 0.0, 0.0) == 0.0
    assert service.charge("c", 0.0, 0.0) == 5.0

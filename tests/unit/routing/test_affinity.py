"""Session affinity: where a turn goes, what is reserved for it, what answers teach, when a turn is held."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_infra_core.routing.affinity import (
    IDLE_S,
    LONGEST_HOLD_S,
    LOOKED_AT,
    Placement,
    SessionRouter,
    SessionTurn,
)
from agent_infra_core.routing.beliefs import ReplicaBelief, SessionPlace
from agent_infra_core.routing.policies import View
from agent_infra_core.routing.rates import DEFAULT_PREFILL_S, ServiceRates


class Fleet:
    """Replicas and a router; ``turn`` serves one turn of a session at once, as an engine with a perfect cache would."""

    def __init__(self, replicas: int = 4, seed: int = 0, kv_tokens: float = 0.0) -> None:
        self.router = SessionRouter(random.Random(seed))
        self.views = [View(f"r{number}", number, kv_tokens=kv_tokens) for number in range(replicas)]
        self.now = 0.0

    def send(self, turn: SessionTurn, arrived: float | None = None) -> tuple[View, Placement]:
        arrived = self.now if arrived is None else arrived
        view = self.router.choose(self.views, turn, self.now, self.now - arrived)
        assert view is not None
        placement = self.router.place(view, turn, self.now, arrived)
        view.in_flight += 1
        return view, placement

    def answer(self, view: View, placement: Placement, prompt: int, cached: int | None, output: int = 100) -> None:
        self.now += 0.1
        view.in_flight -= 1
        self.router.finish(placement, self.now, prompt, cached, output)

    def turn(
        self, session: str, prompt: int, cached: int | None = None, fork_of: tuple[str | None, int] = (None, 0)
    ) -> str:
        """``fork_of``: the session whose context the prompt begins with, and how much of it."""
        view, placement = self.send(SessionTurn(session, prompt, *fork_of))
        self.answer(view, placement, prompt, placement.expected if cached is None else cached)
        return view.id


def test_one_session_on_idle_replicas_stays_on_one() -> None:
    fleet = Fleet(4)
    assert len({fleet.turn("a", 1000 * count) for count in range(1, 30)}) == 1


def test_agents_that_think_are_spread_though_nothing_is_in_flight() -> None:
    fleet = Fleet(4)
    homes = Counter(fleet.turn(f"s{number}", 5000) for number in range(40))
    assert sorted(homes.values()) == [10, 10, 10, 10]


@pytest.mark.parametrize("replicas", [4, 3 * LOOKED_AT])
def test_ties_favour_no_replica(replicas: int) -> None:
    firsts = Counter(Fleet(replicas, seed).turn("a", 1000) for seed in range(100 * replicas))
    assert len(firsts) == replicas
    assert max(firsts.values()) < 160


def test_sessions_with_one_long_system_prompt_dont_all_land_on_the_warm_replica() -> None:
    fleet = Fleet(4)
    homes = Counter(
        fleet.send(SessionTurn(f"s{number}", 13_000, prefix="system", prefix_tokens=12_000))[0].id
        for number in range(40)
    )
    assert max(homes.values()) <= 12


def test_a_fork_joins_the_replica_of_its_parent() -> None:
    fleet = Fleet(4)
    for number in range(8):
        fleet.turn(f"other{number}", 20_000)
    home = fleet.turn("parent", 60_000)
    assert fleet.turn("fork", 61_000, fork_of=("parent", 60_000)) == home


def test_a_fork_of_an_early_prompt_has_only_that_in_common_with_its_parent() -> None:
    fleet = Fleet(1)
    fleet.turn("parent", 20_000)
    fleet.turn("parent", 90_000)
    _, placement = fleet.send(SessionTurn("fork", 50_000, "parent", 20_000))
    assert (placement.expected, placement.place.shared) == (20_000, 20_000)


def test_no_more_of_a_forks_prompt_counts_as_cached_than_it_has() -> None:
    """The sizes of both prompts are guesses, and the second may be the lower one."""
    fleet = Fleet(1)
    fleet.turn("parent", 20_000)
    view, placement = fleet.send(SessionTurn("fork", 15_000, "parent", 20_000))
    assert (placement.expected, placement.place.shared) == (15_000, 15_000)
    assert view.belief.ready_at == fleet.now


def crowd(fleet: Fleet, home: int, sessions: int) -> None:
    """Sessions that live on one replica, each with a context of 20,000 tokens, and think now."""
    fleet.router.return_s = IDLE_S
    for number in range(sessions):
        turn = SessionTurn(f"crowd{home}-{number}", 20_000)
        placement = fleet.router.place(fleet.views[home], turn, fleet.now, fleet.now)
        fleet.views[home].in_flight += 1
        fleet.now += fleet.router.rates.seconds(20_000, 100, 0)
        fleet.answer(fleet.views[home], placement, 20_000, placement.expected)


def test_a_fork_stays_with_its_parent_where_more_sessions_live_but_nothing_runs() -> None:
    fleet = Fleet(2)
    home = int(fleet.turn("parent", 60_000)[1:])
    crowd(fleet, home, 12)
    assert fleet.turn("fork", 61_000, fork_of=("parent", 60_000)) == f"r{home}"


def test_a_new_session_goes_where_fewer_turns_run_though_somewhat_more_sessions_live_there() -> None:
    fleet = Fleet(2)
    crowd(fleet, 0, 12)
    crowd(fleet, 1, 2)
    for number in range(8):
        fleet.router.place(fleet.views[1], SessionTurn(f"busy{number}", 100), fleet.now, fleet.now)
        fleet.views[1].in_flight += 1
    assert fleet.turn("new", 5000) == "r0"


def test_a_move_for_a_prefix_that_is_gone_costs_nothing_more() -> None:
    fleet = Fleet(2)
    home = int(fleet.turn("a", 20_000)[1:])
    crowd(fleet, home, 3)
    assert fleet.turn("a", 21_000) == f"r{home}"
    fleet.views[home].belief.drop("a")
    assert fleet.turn("a", 22_000) != f"r{home}"


@pytest.mark.parametrize("state", [{"accepts_work": False}, {"busy_until": 1e9}], ids=lambda state: next(iter(state)))
def test_a_session_leaves_a_replica_that_takes_no_work_once_and_stays_away(state: dict[str, float]) -> None:
    fleet = Fleet(4)
    home = fleet.turn("a", 5000)
    view = next(view for view in fleet.views if view.id == home)
    for name, value in state.items():
        setattr(view, name, value)
    second = fleet.turn("a", 6000)
    assert second != home
    view.accepts_work, view.busy_until = True, 0.0
    assert [fleet.turn("a", 7000), fleet.turn("a", 8000)] == [second, second]


def test_an_excluded_replica_is_not_chosen() -> None:
    fleet = Fleet(2)
    home = fleet.turn("a", 5000)
    view = fleet.router.choose(fleet.views, SessionTurn("a", 6000), fleet.now, excluded=frozenset({home}))
    assert view is not None
    assert view.id != home
    everyone = frozenset(view.id for view in fleet.views)
    assert fleet.router.choose(fleet.views, SessionTurn("a", 6000), fleet.now, excluded=everyone) is None


def test_a_session_moves_when_its_replica_would_answer_much_later() -> None:
    fleet = Fleet(2)
    home = fleet.turn("a", 2000)
    view = next(view for view in fleet.views if view.id == home)
    for number in range(20):  # others prefill long prompts there
        turn = SessionTurn(f"other{number}", 50_000)
        fleet.router.place(view, turn, fleet.now, fleet.now)
        view.in_flight += 1
    assert fleet.send(SessionTurn("a", 2500))[0].id != home


def test_an_answer_without_cached_tokens_shows_that_older_prefixes_are_gone_too() -> None:
    fleet = Fleet(1)
    fleet.turn("older", 8000)
    fleet.turn("evicted", 8000)
    fleet.turn("younger", 8000)
    fleet.turn("evicted", 9000, cached=0)
    cached = {name: place.cached for name in ("older", "younger") if (place := fleet.router.find(name)) is not None}
    assert cached == {"older": 0, "younger": 8100}


def test_a_miss_while_the_cache_has_room_shows_a_restart() -> None:
    fleet = Fleet(1, kv_tokens=1e6)
    for session in ("a", "b", "c"):
        fleet.turn(session, 8000)
    fleet.turn("a", 9000, cached=0)
    assert [place.cached for name in "abc" if (place := fleet.router.find(name)) is not None] == [9100, 0, 0]


def test_a_session_without_a_cached_prefix_goes_where_the_least_load_is() -> None:
    fleet = Fleet(2)
    fleet.turn("a", 8000)
    home = fleet.turn("b", 8000)
    view = next(view for view in fleet.views if view.id == home)
    for number in range(12):
        fleet.router.place(view, SessionTurn(f"other{number}", 30_000), fleet.now, fleet.now)
        view.in_flight += 1
    view.belief.clear()
    assert fleet.send(SessionTurn("b", 9000))[0].id != home


def test_nothing_is_held_while_all_contexts_fit() -> None:
    fleet = Fleet(2, kv_tokens=100_000)
    for count in range(1, 10):
        for number in range(10):
            turn = SessionTurn(f"s{number}", 1000 * count)
            view, placement = fleet.send(turn)
            assert not turn.is_held
            fleet.answer(view, placement, 1000 * count, placement.expected)


def test_a_turn_that_would_evict_a_session_that_returns_soon_is_held_for_a_bounded_time() -> None:
    fleet = Fleet(1, kv_tokens=100_000)
    for count in range(1, 6):
        for number in range(3):
            fleet.turn(f"s{number}", 6000 * count)
    turn = SessionTurn("late", 20_000)
    assert fleet.router.choose(fleet.views, turn, fleet.now, 0.0) is None
    assert turn.is_held
    assert fleet.router.choose(fleet.views, turn, fleet.now, LONGEST_HOLD_S) is fleet.views[0]
    assert not turn.is_held


def test_nothing_is_held_for_sessions_that_never_return() -> None:
    fleet, held = Fleet(1, kv_tokens=100_000), []
    for number in range(300):
        turn = SessionTurn(f"s{number}", 6000)
        held.append(fleet.router.choose(fleet.views, turn, fleet.now) is None)
        view, placement = fleet.send(turn, fleet.now - LONGEST_HOLD_S)
        fleet.answer(view, placement, 6000, 0)
    assert any(held[:100])  # until it is known
    assert not any(held[100:])


def test_a_prompt_larger_than_the_cache_is_never_held() -> None:
    fleet = Fleet(2, kv_tokens=100_000)
    turn = SessionTurn("image", 500_000)
    assert fleet.router.choose(fleet.views, turn, fleet.now, 0.0) is not None
    assert not turn.is_held


def test_shared_prefixes_that_nobody_uses_any_more_make_room() -> None:
    fleet = Fleet(1, kv_tokens=100_000)
    for number in range(100):
        view, placement = fleet.send(SessionTurn(f"s{number}", 3100, prefix=number, prefix_tokens=3000))
        fleet.answer(view, placement, 3100, 0)
        fleet.router.end(f"s{number}")
    belief = fleet.views[0].belief
    assert 99 in belief.warm
    assert 0 not in belief.warm
    assert sum(belief.warm.values()) <= 25_000


def test_a_held_turn_goes_on_when_the_others_stay_away() -> None:
    fleet = Fleet(1, kv_tokens=100_000)
    for count in range(1, 6):
        for number in range(3):
            fleet.turn(f"s{number}", 6000 * count)
    assert fleet.router.choose(fleet.views, SessionTurn("late", 20_000), fleet.now) is None
    assert fleet.router.choose(fleet.views, SessionTurn("late", 20_000), fleet.now + 2 * fleet.router.return_s)


def test_a_slow_replica_gets_fewer_sessions() -> None:
    fleet = Fleet(2)
    for count in range(300):
        view = fleet.views[count % 2]
        placement = fleet.router.place(view, SessionTurn(f"m{count}", 500), fleet.now, fleet.now)
        fleet.now += 1.0
        fleet.router.finish(placement, fleet.now + (4.0 if view.number else 1.0), 500, 0, 100)
        fleet.router.end(f"m{count}")
    homes = Counter(fleet.send(SessionTurn(f"s{number}", 5000))[0].number for number in range(30))
    assert homes[0] >= 2 * homes[1]


def test_silent_sessions_are_load_no_more() -> None:
    fleet = Fleet(2)
    for number in range(10):
        fleet.turn(f"s{number}", 5000)
    fleet.now += IDLE_S + 1
    fleet.turn("new", 3000)
    assert sum(view.belief.live_tokens for view in fleet.views) == 3100


ACTIONS = st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 40_000), st.sampled_from([0, 0.5, 1]))


@given(st.lists(ACTIONS, max_size=60), st.sampled_from([0.0, 60_000.0]))
def test_reservations_never_leak_or_go_negative(
    actions: Sequence[tuple[int, int, int, float]], kv_tokens: float
) -> None:
    fleet = Fleet(3, kv_tokens=kv_tokens)
    open_turns: list[tuple[View, Placement, int]] = []
    for number, action, tokens, share in actions:
        session = f"s{number}"
        if action <= 2:
            parent = f"s{(number + 1) % 10}" if action == 1 else None
            prefix = "system" if action == 2 else None
            turn = SessionTurn(session, tokens, parent, tokens // 2, prefix, 500 if prefix else 0)
            view = fleet.router.choose(fleet.views, turn, fleet.now, LONGEST_HOLD_S) or fleet.views[0]
            open_turns.append((view, fleet.router.place(view, turn, fleet.now, fleet.now), tokens))
            view.in_flight += 1
        elif action <= 4 and open_turns:
            view, placement, prompt = open_turns.pop(number % len(open_turns))
            fleet.answer(view, placement, prompt, int(share * placement.expected))
        elif action == 5:
            fleet.router.end(session)
        else:
            fleet.views[number % 3].belief.clear()
            fleet.now += IDLE_S * share
        for view in fleet.views:
            belief = view.belief
            assert belief.live_tokens >= 0
            assert belief.used_tokens == sum(p.context - p.shared for p in belief.cached.values()) + sum(
                belief.warm.values()
            )
    for view, placement, prompt in open_turns:
        fleet.answer(view, placement, prompt, None)
    for number in range(10):
        fleet.router.end(f"s{number}")
    assert [(view.belief.live_tokens, view.belief.running_tokens) for view in fleet.views] == [(0, 0)] * 3


def test_an_answer_goes_where_shorter_contexts_run_not_where_fewer_turns_do() -> None:
    """Each token of it reads them all. The turns that run are prefilled, and sessions have no further ones."""
    fleet = Fleet(2)
    for session, number, prompt in (("long", 0, 200_000), ("a", 1, 2000), ("b", 1, 2000), ("c", 1, 2000)):
        view = fleet.views[number]
        fleet.router.place(view, SessionTurn(session, prompt), fleet.now, fleet.now)
        view.in_flight += 1
        view.belief.ready_at = fleet.now
    fleet.router._further_turns = 0.0
    assert fleet.send(SessionTurn("next", 50))[0] is fleet.views[1]


def test_the_rates_of_planted_turns_are_found() -> None:
    rates, rng = ServiceRates(), random.Random(1)
    for _ in range(600):
        uncached, output, contexts = rng.randrange(20_000), rng.randrange(20, 400), rng.randrange(200_000)
        seconds = (3e-5 * uncached + (0.02 + 1e-7 * contexts) * output) * rng.uniform(0.9, 1.1)
        rates.add(uncached, output, contexts, seconds)
    assert rates.prefill_s == pytest.approx(3e-5, rel=0.15)
    assert rates.step_s == pytest.approx(0.02, rel=0.1)
    assert rates.context_s == pytest.approx(1e-7, rel=0.3)


def test_a_prefix_keeps_its_worth_where_turns_hardly_tell_what_it_saves() -> None:
    """Here those that prefill more are faster, by chance. A session would leave its prefix for nothing."""
    rates, rng = ServiceRates(), random.Random(1)
    for _ in range(600):
        uncached = rng.randrange(20_000)
        rates.add(uncached, 20, rng.randrange(20_000), 1.0 - 0.3 * uncached / 20_000)
    assert rates.prefill_s * 20_000 >= 19 * rates.step_s


def test_the_rates_start_at_the_documented_defaults_and_survive_equal_turns() -> None:
    rates = ServiceRates()
    assert rates.prefill_s == DEFAULT_PREFILL_S
    for _ in range(100):
        rates.add(0, 100, 0, 3.0)
    assert rates.step_s == pytest.approx(0.03, rel=0.2)
    assert rates.prefill_s > 0.0


def test_a_turn_waits_for_a_slot_at_its_prefix_for_as_long_as_computing_it_elsewhere_takes() -> None:
    fleet = Fleet(2)
    home = fleet.turn("a", 60_000)
    view = next(view for view in fleet.views if view.id == home)
    view.capacity = view.in_flight = 4
    turn = SessionTurn("a", 60_500)
    assert fleet.router.choose(fleet.views, turn, fleet.now) is None
    elsewhere_s = fleet.router.rates.prefill_s * 60_500
    found = fleet.router.choose(fleet.views, turn, fleet.now, waited_s=elsewhere_s)
    assert found is not None
    assert found is not view


def test_the_work_of_others_counts_as_load() -> None:
    fleet = Fleet(2)
    fleet.views[0].foreign_work = 9
    assert {fleet.turn(f"s{number}", 30) for number in range(6)} == {"r1"}


def test_a_replica_that_ends_before_the_session_does_gets_it_only_if_there_is_no_other() -> None:
    fleet = Fleet(2)
    fleet.views[0].ends_at = 5.0
    assert {fleet.turn(f"s{number}", 5000) for number in range(6)} == {"r1"}
    fleet.views[1].accepts_work = False
    assert fleet.turn("s9", 5000) == "r0"


def test_a_session_moves_between_turns_before_its_replica_ends() -> None:
    fleet = Fleet(2)
    home = fleet.turn("a", 5000)
    next(view for view in fleet.views if view.id == home).ends_at = fleet.now + 0.5
    assert fleet.turn("a", 6000) != home


def test_a_turn_that_dies_with_its_replica_leaves_nothing_cached_there() -> None:
    fleet = Fleet(1)
    fleet.turn("a", 5000)
    view, placement = fleet.send(SessionTurn("a", 6000))
    view.belief.clear()
    fleet.now += 1.0
    fleet.router.finish(placement, fleet.now, None, None, None)
    place = fleet.router.find("a")
    assert place is not None
    assert (place.cached, view.belief.used_tokens, place.in_flight, place.used_at) == (0, 0, 0, fleet.now)


def test_a_turn_that_is_sent_again_is_one_turn_and_no_pause() -> None:
    once, twice = Fleet(1), Fleet(1)
    for fleet in (once, twice):
        fleet.turn("a", 5000)
        fleet.now += 20.0
        arrived = fleet.now
        for _ in range(2 if fleet is twice else 1):
            view, placement = fleet.send(SessionTurn("a", 6000), arrived)
            fleet.now += 5.0
            view.in_flight -= 1
            fleet.router.finish(placement, fleet.now, None, None, None)
    assert once.router.horizon == twice.router.horizon
    assert once.router.return_s == twice.router.return_s


def test_an_eviction_looks_at_what_it_evicts_and_not_at_everything_that_is_cached() -> None:
    """It happens with nearly every turn once a cache is full."""

    class Watched(OrderedDict[str, SessionPlace]):
        seen = 0

        def items(self) -> Any:
            for item in super().items():
                self.seen += 1
                yield item

    belief = ReplicaBelief(room_tokens=100_000.0)
    belief.cached = watched = Watched()
    for number in range(2000):
        belief.keep(f"s{number}", SessionPlace(belief), 100, 0)
    assert len(watched) == belief.used_tokens / 100 == 1000
    assert watched.seen <= 2 * 1000

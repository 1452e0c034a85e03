"""Routing: who gets the turn, who waits, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_infra_core.relay.replicas import ejection_s
from agent_infra_core.routing.strategies import ANYWHERE, STRATEGIES, RouteRank, RouteRequest, choose_backend
from agent_infra_core.settings import STRATEGY_NAMES


@dataclass
class View:
    id: str
    accepts_work: bool = True
    busy_until: float = 0.0
    capacity: int = 0
    in_flight: int = 0
    foreign_work: int = 0
    kv_usage: float = 0.0
    gpu_utilization: float = 0.0
    latency_ms: float | None = None
    last_chosen: int = 0
    rank: RouteRank | None = None


def chosen(strategy: str, *views: View, now: float = 0.0, request: RouteRequest = ANYWHERE) -> str | None:
    view = choose_backend(views, request, strategy, now)
    return view.id if view else None


def test_every_strategy_that_the_configuration_knows_has_its_formula() -> None:
    assert set(STRATEGIES) == set(STRATEGY_NAMES)
    assert all(rank.__doc__ for rank in STRATEGIES.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_go_to_the_least_recently_chosen(strategy: str) -> None:
    assert chosen(strategy, View("a", last_chosen=9), View("b", last_chosen=3), View("c", last_chosen=5)) == "b"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "other", [View("x", accepts_work=False), View("x", busy_until=6.0), View("x", capacity=2, in_flight=2)]
)
def test_one_that_is_away_busy_or_full_is_never_chosen(strategy: str, other: View) -> None:
    assert chosen(strategy, other, now=5.0) is None
    assert chosen(strategy, other, View("y", in_flight=50, latency_ms=1e6), now=5.0) == "y"


def test_a_dead_replica_is_never_chosen_twice() -> None:
    request = RouteRequest(frozenset({"a"}))
    assert chosen("round_robin", View("a"), View("b", last_chosen=7), request=request) == "b"
    assert chosen("round_robin", View("a"), request=request) is None


def test_least_latency_tries_what_it_has_not_measured() -> None:
    assert chosen("least_latency", View("a", latency_ms=0.1), View("b")) == "b"
    assert chosen("least_latency", View("a", latency_ms=5.0), View("b", latency_ms=4.0)) == "b"


def test_least_load_counts_others_work_by_capacity() -> None:
    small, large = View("small", capacity=4, in_flight=2), View("large", capacity=32, in_flight=4, foreign_work=8)
    assert chosen("least_load", small, large) == "large"


def test_least_load_leaves_a_full_kv_cache_alone() -> None:
    assert chosen("least_load", View("full", capacity=8, kv_usage=1.0), View("busy", capacity=8, in_flight=6)) == "busy"
    assert chosen("least_load", View("some", capacity=8, kv_usage=0.8), View("busy", capacity=8, in_flight=1)) == "some"


def test_least_load_breaks_ties_by_gpu_utilisation() -> None:
    assert chosen("least_load", View("hot", gpu_utilization=90.0), View("cool", last_chosen=4)) == "cool"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=8))
def test_whatever_is_chosen_may_take_a_turn(rows: list[tuple[int, int, bool]]) -> None:
    views = [View(str(i), accepts_work=up, in_flight=n, capacity=c) for i, (n, c, up) in enumerate(rows)]
    for strategy in STRATEGIES:
        view = choose_backend(views, ANYWHERE, strategy, 0.0)
        may = [v for v in views if v.accepts_work and (not v.capacity or v.in_flight < v.capacity)]
        assert (view in may) if may else view is None


def test_a_replica_that_fails_for_ever_is_left_alone_for_a_bounded_time() -> None:
    assert [ejection_s(count, 30.0) for count in (1, 2, 3, 100, 5_000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_least_latency_sends_one_turn_at_a_time_to_what_it_has_not_measured() -> None:
    assert chosen("least_latency", View("a", latency_ms=0.1), View("b", in_flight=1)) == "a"
    assert chosen("least_latency", View("a", in_flight=2), View("b", in_flight=1)) == "b"


def test_an_exclusion_where_nothing_was_sent_expires() -> None:
    request = RouteRequest(until=(("a", 5.0),))
    assert chosen("least_load", View("a"), now=4.0, request=request) is None
    assert chosen("least_load", View("a"), now=5.0, request=request) == "a"

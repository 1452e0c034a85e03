"""Routing: who gets the turn, who waits, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_infra_core.relay.replicas import ejection_s
from agent_infra_core.routing.policies import View
from agent_infra_core.routing.strategies import ANYWHERE, STRATEGIES, RouteRequest, choose_backend
from agent_infra_core.settings import STRATEGY_NAMES


def view(name: str, **fields: Any) -> View:
    return View(name, 0, **fields)


def chosen(strategy: str, *views: View, now: float = 0.0, request: RouteRequest = ANYWHERE) -> str | None:
    found = choose_backend(views, request, strategy, now)
    return found.id if found else None


def test_every_strategy_that_the_configuration_knows_has_its_formula() -> None:
    assert set(STRATEGIES) == set(STRATEGY_NAMES)
    assert all(rank.__doc__ for rank in STRATEGIES.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_go_to_the_least_recently_chosen(strategy: str) -> None:
    assert chosen(strategy, view("a", last_chosen=9), view("b", last_chosen=3), view("c", last_chosen=5)) == "b"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "other", [view("x", accepts_work=False), view("x", busy_until=6.0), view("x", capacity=2, in_flight=2)]
)
def test_one_that_is_away_busy_or_full_is_never_chosen(strategy: str, other: View) -> None:
    assert chosen(strategy, other, now=5.0) is None
    assert chosen(strategy, other, view("y", in_flight=50, latency_ms=1e6), now=5.0) == "y"


def test_a_dead_replica_is_never_chosen_twice() -> None:
    request = RouteRequest(frozenset({"a"}))
    assert chosen("round_robin", view("a"), view("b", last_chosen=7), request=request) == "b"
    assert chosen("round_robin", view("a"), request=request) is None


def test_least_latency_tries_what_it_has_not_measured() -> None:
    assert chosen("least_latency", view("a", latency_ms=0.1), view("b")) == "b"
    assert chosen("least_latency", view("a", latency_ms=5.0), view("b", latency_ms=4.0)) == "b"


def test_least_load_counts_others_work_by_capacity() -> None:
    small, large = view("small", capacity=4, in_flight=2), view("large", capacity=32, in_flight=4, foreign_work=8)
    assert chosen("least_load", small, large) == "large"


def test_least_load_leaves_a_full_kv_cache_alone() -> None:
    assert chosen("least_load", view("full", capacity=8, kv_usage=1.0), view("busy", capacity=8, in_flight=6)) == "busy"
    assert chosen("least_load", view("some", capacity=8, kv_usage=0.8), view("busy", capacity=8, in_flight=1)) == "some"


def test_least_load_breaks_ties_by_gpu_utilisation() -> None:
    assert chosen("least_load", view("hot", gpu_utilization=90.0), view("cool", last_chosen=4)) == "cool"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=8))
def test_whatever_is_chosen_may_take_a_turn(rows: list[tuple[int, int, bool]]) -> None:
    views = [view(str(i), accepts_work=up, in_flight=n, capacity=c) for i, (n, c, up) in enumerate(rows)]
    for strategy in STRATEGIES:
        found = choose_backend(views, ANYWHERE, strategy, 0.0)
        may = [v for v in views if v.accepts_work and (not v.capacity or v.in_flight < v.capacity)]
        assert (found in may) if may else found is None


def test_a_replica_that_fails_for_ever_is_left_alone_for_a_bounded_time() -> None:
    assert [ejection_s(count, 30.0) for count in (1, 2, 3, 100, 5_000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_least_latency_sends_one_turn_at_a_time_to_what_it_has_not_measured() -> None:
    assert chosen("least_latency", view("a", latency_ms=0.1), view("b", in_flight=1)) == "a"
    assert chosen("least_latency", view("a", in_flight=2), view("b", in_flight=1)) == "b"


def test_an_exclusion_where_nothing_was_sent_expires() -> None:
    request = RouteRequest(until=(("a", 5.0),))
    assert chosen("least_load", view("a"), now=4.0, request=request) is None
    assert chosen("least_load", view("a"), now=5.0, request=request) == "a"

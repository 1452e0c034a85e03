"""The analysis of runs that aren't linear: simulated families of runs, seen through the program's own tracker."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, SETTLE_S, Family, Habits, Watched, thinking

from agent_infra_core.insight.analysis import CapacityAnalysis
from agent_infra_core.insight.capacity import RESAMPLES, Basis, CapacityModel, Estimate, Outlook, UnequalFleet
from agent_infra_core.insight.fit import _cure_model
from agent_infra_core.insight.measure import FleetSample, observed_turns, operating_change
from agent_infra_core.insight.verdict import find_flags, judge

FAMILY = {family.name: family for family in FAMILIES}


def watch(family: Family, seconds: float) -> list[dict[str, Any]]:
    """The documents of a run, each with the time when it was made."""
    watched = Watched(replace(family, seconds=seconds), seed=3)
    return [{**entry, "at": watched.world.now} for entry in watched.documents()]


@functools.cache
def entry_of(name: str, seconds: float = 150.0) -> dict[str, Any]:
    """The last document of a family's run."""
    return watch(FAMILY[name], seconds)[-1]


def flags(entry: dict[str, Any]) -> dict[str, str]:
    return {flag["name"]: flag["sentence"] for flag in entry["flags"]}


def change(entry: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [what["change"] for what in entry["what_ifs"] if what["name"] == name]
    estimate: dict[str, Any] = found
    return estimate


@pytest.mark.parametrize(("name", "seconds"), [("fan_out", 150.0), ("short", 150.0), ("tests", 240.0)])
def test_turns_without_a_think_time_are_not_charged_one(name: str, seconds: float) -> None:
    """Parallel turns and first turns have none; long think times that aren't over yet are no abandoned sessions."""
    entry = entry_of(name, seconds)
    assert entry["littles_law"]["holds"] is True
    assert entry["verdict"]["name"] in ("AGENT-BOUND", "BALANCED")


def silent_agents(long_share: float, seconds: float) -> tuple[Any, Any]:
    """Ascending silences and which of them are over, of agents that abandon a session after 15 turns or so."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(150):
        now = rng.uniform(0, 5)
        while now < seconds:
            thinks_s = rng.exponential(120.0 if rng.random() < long_share else 5.0)
            is_over = rng.random() > 1 / 15 and now + thinks_s < seconds
            found.append((thinks_s if is_over else seconds - now, float(is_over)))
            now += thinks_s + 4.0
    durations, over = np.array(sorted(found)).T
    return durations, over


@pytest.mark.parametrize(("long_share", "seconds", "mean_s"), [(0.1, 600.0, 16.5), (0.0, 120.0, 5.0)])
def test_long_tool_calls_are_told_from_sessions_that_were_abandoned(
    long_share: float, seconds: float, mean_s: float
) -> None:
    durations, over = silent_agents(long_share, seconds)
    means, left, _, has_long = _cure_model(durations, over, np.ones((1, len(durations))))
    assert means[0] == pytest.approx(mean_s, rel=0.25)
    assert left == pytest.approx(1 / 15, rel=0.25)
    assert has_long == (long_share > 0)


def test_nothing_is_said_while_silent_sessions_may_be_thinking_or_gone() -> None:
    entry = entry_of("tests_silent")
    assert entry["verdict"]["name"] == "NO DATA"
    assert "X-Session-End" in entry["verdict"]["reason"]
    assert entry["fit"]["think_s"]["low"] is not None  # the range is told all the same


def test_a_replica_with_few_slots_takes_no_more_turns_than_they_do() -> None:
    fleet = slow_fleet(1.0)
    fleet = replace(fleet, model=replace(fleet.model, slots=4.0))
    full = 4 / (2 * (1.875 + 0.269 * 4))  # turns per second of the slow replica
    assert fleet.throughput(1000) == pytest.approx(4 * full, rel=1e-3)


@pytest.mark.parametrize(("routing", "gain"), [("round_robin", 0.071), ("affinity", 0.114)])
def test_more_agents_beside_a_slow_replica_bring_what_the_routing_makes_of_it(routing: str, gain: float) -> None:
    """The gains are simulated (benchmarks/families.py). A model of the mean replica says 0.087 and 0.095."""
    agents = 120 if routing == "round_robin" else 152
    family = replace(FAMILY["slow_robin"], routing=routing, agents=agents)
    assert change(watch(family, 240.0)[-1], "+25 % agents")["value"] == pytest.approx(gain, abs=0.014)


def slow_fleet(moves: float) -> UnequalFleet:
    """Four replicas, of which the last takes twice as long; turns and agents are shared evenly."""
    even = np.full((4, 1), 0.25)
    return UnequalFleet(CapacityModel(4, 1.875, 0.269, 10.0), np.array([[1.0], [1.0], [1.0], [2.0]]), even, even, moves)


def test_one_more_replica_beside_a_slow_one_is_a_fast_one() -> None:
    """Sessions that stay make each replica a closed system of its own; turns in turn, each serves as many."""
    alone = CapacityModel(1, 1.875, 0.269, 10.0)
    stays, moves = (slow_fleet(moves).with_replica().throughput(152) for moves in (0.0, 1.0))
    slow = CapacityModel(1, 3.75, 0.538, 10.0)
    assert stays == pytest.approx(4 * alone.throughput(152 / 5) + slow.throughput(152 / 5))
    each = moves / 5
    answers = [1.875 / (1 - 0.269 * each)] * 4 + [3.75 / (1 - 0.538 * each)]
    assert moves * (10.0 + sum(answers) / 5) == pytest.approx(152, rel=1e-3)


@pytest.mark.parametrize("moves", [0.0, 0.5, 1.0])
def test_replicas_of_one_speed_are_a_fleet_of_the_plain_model(moves: float) -> None:
    fleet = slow_fleet(moves).healed(3)
    for agents in (20, 152, 400):
        assert fleet.throughput(agents) == pytest.approx(
            CapacityModel(4, 1.875, 0.269, 10.0).throughput(agents), rel=1e-3
        )


def test_agents_that_send_several_turns_at_once_are_still_counted_once() -> None:
    agents = entry_of("fan_out")["operating"]["agents"]["value"]
    assert agents == pytest.approx(FAMILY["fan_out"].agents, rel=0.1)


@pytest.mark.parametrize("routing", ["least_load", "round_robin", "affinity"])
def test_a_slow_replica_is_named_with_its_factor_however_turns_are_routed(routing: str) -> None:
    entry = watch(replace(FAMILY["slow_load"], routing=routing), 150.0)[-1]
    sentence = flags(entry)["SLOW"]
    assert sentence.startswith(("replica-3 takes 1.9", "replica-3 takes 2.0", "replica-3 takes 2.1"))
    assert "A replica as fast as the others → +" in sentence
    assert entry["verdict"]["name"] in ("GPU-BOUND", "BALANCED")


def test_replicas_of_equal_speed_are_not_told_apart() -> None:
    assert "SLOW" not in flags(entry_of("plain"))


def test_full_slots_with_a_queue_need_no_fit() -> None:
    entry = entry_of("slots")
    assert entry["verdict"]["name"] == "GPU-BOUND"
    assert "all 8 slots of each replica are taken" in entry["verdict"]["sentence"]
    assert entry["suggestion"]["bound_by"] == "slots"
    assert change(entry, "+25 % agents")["value"] == 0
    assert change(entry, "+1 replica")["value"] == pytest.approx(0.5, abs=0.05)


def test_nothing_is_predicted_where_clients_leave_before_their_answers() -> None:
    entry = entry_of("timeouts")
    assert entry["verdict"]["name"] == "NO DATA"
    assert "had no answer" in entry["verdict"]["reason"]


def test_a_few_lost_turns_are_no_reason_to_refuse() -> None:
    assert entry_of("timeouts_rare")["verdict"]["name"] != "NO DATA"


def test_full_slots_are_a_verdict_by_turn_45() -> None:
    """They are measured: no think time needs to be over, and no neighbour of a turn to have ended."""
    watched = Watched(replace(FAMILY["slots"], seconds=30.0), seed=3)
    first = next(entry for entry in watched.documents() if entry["verdict"]["name"] != "NO DATA")
    assert watched.turns <= 45
    assert first["verdict"]["name"] == "GPU-BOUND"
    assert "all 8 slots of each replica are taken" in first["verdict"]["sentence"]


def test_a_slow_replica_whose_slots_are_full_is_worth_what_the_others_do_more() -> None:
    """With every slot taken, four replicas of which one takes twice as long do 3.5 times what one does."""
    entry = watch(replace(FAMILY["slots"], agents=176, replicas=4, slow=2.0), 150.0)[-1]
    assert "SLOW" in flags(entry)
    assert entry["verdict"]["name"] == "GPU-BOUND"
    assert change(entry, "+1 replica")["low"] < 1 / 3.5 < change(entry, "+1 replica")["high"]
    assert "A replica as fast as the others → +1" in flags(entry)["SLOW"]  # 14 %


@pytest.mark.parametrize("seed", range(3))
def test_shared_tools_are_found_in_the_first_minute(seed: int) -> None:
    """Early on, only short think times are over: they are left out, so that the rest can be trusted sooner."""
    watched = Watched(replace(FAMILY["tools"], seconds=64.0), seed)
    assert "TOOLS" in flags(list(watched.documents())[-1])


def test_a_number_of_agents_that_was_there_before_is_no_change() -> None:
    """Batches of 60 agents with a pause of 32 s between two, looked at in the second pause."""
    agents = [60.0] * 75 + [1.0] * 32 + [60.0] * 60 + [1.0] * 31
    samples = [FleetSample(float(at), "m", None, {}, number) for at, number in enumerate(agents)]
    turns = observed_turns([], {})
    assert operating_change(turns, samples) == 0.0
    assert operating_change(turns, samples[:106]) == pytest.approx(75, abs=1)  # the first time, it is one


def test_a_verdict_allows_for_the_error_of_the_number_of_agents() -> None:
    """Shares that lead by little where N is known lead in few draws where N goes up and down."""
    model, draws = (CapacityModel(4, 2.0, 0.2 + zero, 5.0) for zero in (0.0, np.zeros(RESAMPLES)))
    here: Any = SimpleNamespace(full=0.0)
    found = []
    for error in (0.0, 0.3):
        agents = 80 * (1 + error * np.random.default_rng(1).standard_normal(RESAMPLES))
        basis, fit = Basis(1000, 300.0), None
        outlook = Outlook(model, draws, fit, None, here, 80.0, agents, basis, None, None, None, 1.0, (model, draws))
        found.append(judge(outlook, [{"name": "", "change": Estimate(None, None, None, "", basis)}] * 4, None)["name"])
    assert found == ["AGENT-BOUND", "BALANCED"]


def test_agents_that_queue_for_tools_are_promised_nothing_for_more_of_them() -> None:
    entry = entry_of("tools", 240.0)
    assert "queue for the tools" in flags(entry)["TOOLS"]
    for name in ("+25 % agents", "half the observation time"):
        assert change(entry, name)["value"] is None
        assert "share tools" in change(entry, name)["reason"]
    assert entry["suggestion"]["agents"]["value"] is None


def test_contexts_that_grow_do_not_start_the_fit_over() -> None:
    basis = entry_of("growth", 200.0)["fit"]["base_latency_s"]["basis"]
    assert basis["window_s"] > 150


@pytest.mark.parametrize("name", ["think", "doubled", "killed", "slowed"])
def test_a_change_in_mid_run_is_judged_right_within_a_minute_and_stays_so(name: str) -> None:
    family = replace(FAMILY[name], change_s=120.0)
    after = [
        entry
        for entry in watch(family, family.change_s + SETTLE_S + 60.0)
        if entry["at"] >= family.change_s + SETTLE_S + 10.0
    ]
    assert {entry["verdict"]["name"] for entry in after} == {"AGENT-BOUND" if name == "killed" else "GPU-BOUND"}
    assert not any("TOOLS" in flags(entry) for entry in after)  # a new think time isn't one that the crowd makes


def test_a_verdict_that_is_found_once_is_not_shown_at_once() -> None:
    names = [entry["verdict"]["name"] for entry in watch(FAMILY["light"], 300.0)]
    assert sum(now != before for before, now in itertools.pairwise(names)) <= 1


# --- The price of a suggestion. ---------------------------------------------------------------------------------------


def test_a_suggestion_that_costs_throughput_says_so() -> None:
    suggestion = entry_of("heavy")["suggestion"]
    price = suggestion["then"]
    assert price["change"]["value"] < -0.05
    assert f"−{-100 * price['change']['value']:.0f} % turns/h" in suggestion["sentence"]
    assert price["wait_s"]["value"] < suggestion["now"]["wait_s"]["value"]
    assert f"instead of {suggestion['now']['wait_s']['value']:.3g} s" in suggestion["sentence"]


def test_the_other_loads_worth_knowing_have_a_price_too() -> None:
    options = {option["name"]: option for option in entry_of("heavy")["suggestion"]["options"]}
    assert list(options) == ["utilisation", "knee", "efficient"]
    for name in ("utilisation", "knee"):
        for figure in ("agents", "wait_s", "turns_per_hour"):
            assert options["efficient"][figure]["value"] < options[name][figure]["value"]


def test_a_latency_goal_decides_how_many_agents_are_suggested() -> None:
    family = Family("goal", 150, workload=thinking(10.0), habits=Habits())
    found = {}
    for goal_s in (4.0, 8.0):
        watched = Watched(replace(family, seconds=200.0), seed=1)
        watched.analysis = CapacityAnalysis(watched.analysis._clock, watched.analysis._dice, goal_s)
        found[goal_s] = list(watched.documents())[-1]["suggestion"]
        assert found[goal_s]["bound_by"] == "latency_goal"
        assert f"95 % of the answers would take at most {goal_s:g} s" in found[goal_s]["sentence"]
    assert found[4.0]["agents"]["value"] < found[8.0]["agents"]["value"]


def test_gpu_time_lost_to_cache_misses_is_what_the_missing_tokens_cost() -> None:
    family = replace(FAMILY["copies"], seconds=300.0)
    watched = Watched(family, seed=1)
    entry = list(watched.documents())[-1]
    records = [record for record in watched.tracker._log.latest(100_000) if record.expected_cached_tokens is not None]
    since = watched.analysis._clock() - 300.0
    missed = sum(
        max(0, (record.expected_cached_tokens or 0) - (record.cached_tokens or 0))
        for record in records
        if record.finished_at > since
    )
    assert family.physics is not None
    true = missed * family.physics.prefill_token_s / (family.replicas * 300.0)
    assert true > 0.02
    assert entry["cost"]["cache_miss_share"]["value"] == pytest.approx(true, rel=0.15)


def test_each_of_several_slow_replicas_is_named() -> None:
    lately = {"r0": (1.0, 0.5, 2.0), "r1": (2.0, 0.3, 4.0), "r2": (3.0, 0.2, 6.0)}
    unknown = Estimate(None, None, None, "fraction", Basis(0, 0.0))
    outlook: Any = SimpleNamespace(
        fit=SimpleNamespace(lately=lately),
        here=SimpleNamespace(since=0.0),
        what_if=lambda name, *_, **__: {"name": name, "change": unknown},
        few=None,
        kv=None,
        crowding=None,
        agents=8.0,
    )
    sentence = find_flags(outlook, ())["SLOW"]
    assert "r1 takes 2.0 times" in sentence
    assert "r2 takes 3.0 times" in sentence

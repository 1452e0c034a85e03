"""The simulated fleet that routing policies are compared on: it serves every script, and caches as engines do."""

from __future__ import annotations

import dataclasses
import math

import pytest
from routing import WORKLOADS, build_fleet, run
from routing_baselines import BASELINES

from agent_infra_core.routing.simulator import Fleet, Physics, PrefixCache, Replica, Script, Session, Step, Turn

SMALL = dataclasses.replace(WORKLOADS["fanout"], agents=6, sessions=9, steps=(8, 0.3), forks_per_session=1.0)


@pytest.mark.parametrize("name", BASELINES)
def test_every_policy_serves_every_step_of_every_script_once(name: str) -> None:
    fleet = build_fleet(SMALL, 0)
    fleet.run(BASELINES[name](fleet, 0))
    scripts = [*fleet.scripts, *(fork for script in fleet.scripts for step in script.steps for fork in step.forks)]
    assert len(fleet.turns) == sum(len(script.steps) for script in scripts)
    assert len(fleet.ended) == len(fleet.scripts)
    assert all(turn.made == turn.output and turn.arrived <= turn.admitted <= turn.first for turn in fleet.turns)


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(SMALL, BASELINES["LMetric"], 3) == run(SMALL, BASELINES["LMetric"], 3)


def test_a_cache_drops_the_least_recently_used_segment_from_its_end() -> None:
    cache = PrefixCache(100)
    for key in (1, 2):
        cache.add(((key, 50),))
    cache.add(((1, 50),))
    cache.add(((3, 20),))
    assert [cache.find(((key, 50),)) for key in (1, 2, 3)] == [50, 30, 20]


def test_a_prefix_counts_only_up_to_the_first_gap() -> None:
    cache = PrefixCache(1000)
    cache.add(((1, 30), (2, 40)))
    assert cache.find(((1, 30), (2, 60), (3, 5))) == 70
    assert cache.find(((9, 30), (2, 40))) == 0


def test_pinned_segments_are_never_evicted() -> None:
    cache = PrefixCache(100)
    assert cache.pin(((1, 60),))
    assert not cache.pin(((2, 50),))
    cache.unpin(((1, 60),))
    assert cache.pin(((2, 50),))
    assert cache.find(((1, 60),)) == 50


def test_a_turn_alone_takes_its_prefill_and_a_step_per_token() -> None:
    physics = Physics(sequence_s=0.0, context_token_s=1e-12, attention_s=0.0)
    replica = Replica(physics)
    script = Script((), (Step(1000, 11, 0.0),))
    turn = Turn(Session(1, script, ((1, 1000),)), ((1, 1000),), 1000, 11, 0.0)
    replica.submit(turn, 0.0)
    now = 0.0
    while not math.isinf(replica.due):
        now = replica.due
        replica.advance(now)
    assert now == pytest.approx(11 * physics.step_s + 1000 * physics.prefill_token_s, rel=1e-6)


def test_a_flush_costs_a_session_its_cached_prefix_once() -> None:
    script = Script((), tuple(Step(1000, 2, 10.0) for _ in range(4)))
    fleet = Fleet(Physics(), [script], [1.0], agents=1, ramp_s=0.0, flush=(0, 15.0))
    fleet.run(BASELINES["round robin"](fleet, 0))
    assert [turn.cached > 0 for turn in fleet.turns] == [False, True, False, True]


def test_only_whole_blocks_of_a_cached_prefix_are_found() -> None:
    replica, chain = Replica(Physics(block_tokens=128)), ((1, 300),)
    replica.cache.add(chain)
    turn = Turn(Session(0, Script((), ()), chain), ((1, 400),), 400, 1, 0.0)
    replica.submit(turn, 0.0)
    assert turn.cached == 256

"""When a model is woken, and how many replicas follow what its agents ask for: the decisions, by a clock of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_infra import parse_config
from agent_infra_core.control.scaling import (
    DOWN_AFTER_S,
    LEAVE_S,
    RETRY_S,
    UP_AFTER_S,
    Autoscaler,
    Decision,
    Demand,
    DemandState,
    Fleet,
    decide,
    observe,
)
from agent_infra_core.errors import ConfigError, RefusedError
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig

SCALED = ModelConfig("m", "org/m", replicas=2, min_replicas=1, max_replicas=4)
IDLES = ModelConfig("m", "org/m", replicas=2, idle_shutdown_minutes=10)
TO_ZERO = ModelConfig("m", "org/m", min_replicas=0, max_replicas=2)
QUEUE = Demand(waiting=5, in_flight=8, slots=4)
CALM = Demand(in_flight=0, slots=4)


class Model:
    """A model over time: ``then`` passes seconds in steps of 5 with one fleet and demand, until a change is decided."""

    def __init__(self, config: ModelConfig, wanted: int = 2) -> None:
        self.config, self.wanted, self.now, self.state = config, wanted, 1000.0, DemandState()

    def then(self, seconds: float, fleet: Fleet, demand: Demand) -> int:
        """The last target."""
        end, target = self.now + seconds, fleet.serving
        while self.now <= end:
            self.state = observe(self.state, self.config, fleet, demand, self.now)
            target = decide(self.config, self.wanted, fleet, demand, self.state, self.now).target
            if target != fleet.serving:
                return target
            self.now += 5.0
        return target


def test_a_queue_adds_replicas_once_it_has_lasted_and_no_more_than_the_most() -> None:
    model, two = Model(SCALED), Fleet(2, 2)
    assert model.then(UP_AFTER_S - 5, two, QUEUE) == 2
    assert model.then(5, two, QUEUE) == 3
    assert Model(SCALED).then(UP_AFTER_S, two, dataclasses.replace(QUEUE, waiting=9)) == 4  # two replicas' slots
    assert Model(SCALED).then(UP_AFTER_S, two, dataclasses.replace(QUEUE, waiting=99)) == 4
    assert Model(SCALED).then(10 * UP_AFTER_S, Fleet(4, 4), QUEUE) == 4


def test_a_queue_that_comes_and_goes_adds_nothing() -> None:
    model, two = Model(SCALED), Fleet(2, 2)
    for _ in range(20):
        assert model.then(UP_AFTER_S - 10, two, QUEUE) == 2
        assert model.then(5, two, dataclasses.replace(QUEUE, waiting=0)) == 2


def test_while_a_replica_is_on_its_way_no_other_one_is_added() -> None:
    assert Model(SCALED).then(100 * UP_AFTER_S, Fleet(3, 2), QUEUE) == 3


@pytest.mark.parametrize(
    ("verdict", "target"), [("GPU-BOUND", 3), ("AGENT-BOUND", 2), ("LATENCY-BOUND", 2), ("BALANCED", 2), (None, 2)]
)
def test_only_the_verdict_that_gpus_limit_the_run_adds_a_replica_without_a_queue(
    verdict: str | None, target: int
) -> None:
    demand = Demand(in_flight=7, slots=4, verdict=verdict)
    assert Model(SCALED).then(2 * UP_AFTER_S, Fleet(2, 2), demand) == target


def test_calm_that_lasts_removes_one_replica_at_a_time_and_keeps_the_fewest() -> None:
    model = Model(SCALED)
    assert model.then(DOWN_AFTER_S - 5, Fleet(3, 3), CALM) == 3
    assert model.then(5, Fleet(3, 3), CALM) == 2
    assert Model(SCALED).then(100 * DOWN_AFTER_S, Fleet(1, 1), CALM) == 1


def test_a_short_rush_starts_the_calm_over() -> None:
    model, three = Model(SCALED), Fleet(3, 3)
    for _ in range(5):
        assert model.then(DOWN_AFTER_S - 20, three, CALM) == 3
        assert model.then(5, three, QUEUE) == 3


@pytest.mark.parametrize(
    ("in_flight", "verdict", "target"),
    [(4, "AGENT-BOUND", 2), (5, "AGENT-BOUND", 3), (4, "BALANCED", 3), (4, None, 3), (1, "GPU-BOUND", 4)],
)
def test_replicas_with_turns_are_removed_only_if_the_others_have_room_and_the_verdict_agrees(
    in_flight: int, verdict: str | None, target: int
) -> None:
    demand = Demand(in_flight=in_flight, slots=4, verdict=verdict)
    assert Model(SCALED).then(DOWN_AFTER_S, Fleet(3, 3), demand) == target


def test_it_does_not_swing_between_two_numbers() -> None:
    """A demand that two replicas serve without a queue, and one does not."""
    model, count, changes = Model(SCALED), 1, list[int]()
    while model.now < 1000.0 + 20 * DOWN_AFTER_S:
        demand = Demand(waiting=4 if count == 1 else 0, in_flight=4 if count == 1 else 6, slots=4, verdict="BALANCED")
        target = model.then(60, Fleet(count, count), demand)
        if target != count:
            model.state, count = DemandState(), target
            changes.append(count)
    assert changes == [2]


def test_a_model_that_was_shut_down_for_idleness_is_woken_by_a_turn_and_not_before() -> None:
    model, idle = Model(IDLES), Fleet(idle=2)
    assert model.then(3600, idle, Demand()) == 0
    assert model.state.is_asleep
    assert model.then(0, idle, Demand(waiting=3)) == 1


def test_idle_replicas_come_back_for_a_queue_too() -> None:
    assert Model(IDLES).then(UP_AFTER_S, Fleet(1, 1, idle=1), QUEUE) == 2
    assert Model(IDLES).then(10 * UP_AFTER_S, Fleet(1, 1), QUEUE) == 1  # the other one was stopped by hand
    assert Model(IDLES).then(10 * UP_AFTER_S, Fleet(2, 2), QUEUE) == 2


def test_what_is_leaving_keeps_its_gpus_so_the_wake_waits_for_its_end() -> None:
    model = Model(IDLES)
    assert model.then(10, Fleet(idle=1, is_leaving=True), Demand(waiting=1)) == 0
    assert model.state.is_asleep  # meanwhile turns wait instead of being refused
    assert model.then(0, Fleet(idle=1), Demand(waiting=1)) == 1


def test_a_model_with_a_minimum_of_none_goes_to_sleep_and_is_woken() -> None:
    model = Model(TO_ZERO)
    assert model.then(DOWN_AFTER_S, Fleet(1, 1), CALM) == 0
    assert model.then(600, Fleet(), Demand()) == 0
    assert model.then(0, Fleet(), Demand(waiting=1)) == 1


def test_a_model_that_failed_is_not_woken_again_and_again() -> None:
    model = Model(IDLES)
    assert model.then(100, Fleet(has_failed=True), Demand(waiting=3)) == 0
    assert not model.state.is_asleep  # so its turns are refused, with the reason


def test_the_budget_of_gpu_hours_stops_wakes_and_growth_and_nothing_else() -> None:
    scaled = dataclasses.replace(SCALED, max_gpu_hours=10.0)
    assert Model(scaled).then(10 * UP_AFTER_S, Fleet(2, 2), dataclasses.replace(QUEUE, gpu_hours=10.0)) == 2
    assert Model(scaled).then(DOWN_AFTER_S, Fleet(2, 2), dataclasses.replace(CALM, gpu_hours=10.0)) == 1
    asleep = Model(dataclasses.replace(IDLES, max_gpu_hours=10.0))
    assert asleep.then(60, Fleet(idle=1), Demand(waiting=1, gpu_hours=10.0)) == 0
    assert not asleep.state.is_asleep
    assert asleep.then(60, Fleet(idle=1), Demand(waiting=1, gpu_hours=9.9)) == 1


def test_a_model_without_bounds_and_without_idleness_is_left_alone() -> None:
    assert Model(ModelConfig("m", "org/m", replicas=2)).then(3600, Fleet(1, 1), QUEUE) == 1


@pytest.mark.parametrize(
    ("keys", "is_valid"),
    [
        ("min_replicas: 0, max_replicas: 3", True),
        ("min_replicas: 3", False),
        ("max_replicas: 1", False),
        ("max_replicas: 2, max_gpu_hours: 0.5", True),
        ("min_replicas: -1", False),
        ("max_gpu_hours: 0", False),
        ("min_replicas: 1, max_replicas: 3, idle_shutdown_minutes: 10", False),
        ("min_replicas: 0, max_replicas: 3, idle_shutdown_minutes: 10", True),
    ],
)
def test_the_number_to_begin_with_lies_between_the_bounds(keys: str, is_valid: bool) -> None:
    text = f"models: [{{name: m, model_path: org/m, replicas: 2, {keys}}}]"
    if is_valid:
        assert parse_config(text, {}).models[0].replicas == 2
    else:
        with pytest.raises(ConfigError, match=r"models\[0\]\."):
            parse_config(text, {})


# --- The steps, with a cluster that only keeps records. --------------------------------------------------------------


class Cluster:
    problem = None

    def __init__(self) -> None:
        self.records: dict[str, ReplicaRecord] = {}
        self.refuses = False
        self.stopped: list[str] = []

    def prepare(self, model: ModelConfig) -> ModelConfig:
        if self.refuses:
            raise RefusedError("no GPU is free")
        return model

    def start_replicas(self, _model: ModelConfig, count: int) -> list[ReplicaRecord]:
        self.records = {name: each for name, each in self.records.items() if each.state != "stopped"}
        return [self.put(f"m-{len(self.records) + number + 1}", "loading") for number in range(count)]

    def put(self, replica: str, state: str, **fields: Any) -> ReplicaRecord:
        self.records[replica] = ReplicaRecord(replica, "m", state, "vllm", "n", 1, "p", slots=4, **fields)
        return self.records[replica]

    def stop(self, replicas: Iterable[str]) -> None:
        self.stopped += replicas

    def wait_stopped(self, replicas: Iterable[str], _deadline: float) -> list[str]:
        for replica in replicas:
            self.records.pop(replica, None)
        return []


class Traffic:
    def __init__(self) -> None:
        self.asleep: frozenset[str] = frozenset()
        self.now_demanded, self.draining = Demand(), dict[str, int | None]()

    def demand(self) -> Mapping[str, Demand]:
        return {"m": self.now_demanded}

    def turns(self) -> Mapping[str, int]:
        return {"m-1": 3, "m-2": 1}

    def drain(self, replica: str) -> int | None:
        return self.draining.setdefault(replica, None)


class Deployment:
    def __init__(self, folder: Path, model: ModelConfig, report: Callable[[str], None]) -> None:
        self.paths, self.report, self._model = DeploymentPaths(folder), report, model
        self.counts = {"m": model.replicas}

    def select_models(self, *_: Any, **__: Any) -> list[ModelConfig]:
        return [self._model]

    def wanted(self) -> dict[str, int]:
        return self.counts

    def want(self, counts: Mapping[str, int]) -> None:
        self.counts = {**self.counts, **counts}


class Story:
    """An Autoscaler with a clock of its own."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.now, self.lines = 1000.0, list[str]()
        self.cluster, self.traffic = Cluster(), Traffic()
        self.deployment = Deployment(folder, model, self.lines.append)
        self.restart()

    def restart(self) -> None:
        """Another controller takes over; it has not asked for any drain yet."""
        cluster: Any = self.cluster
        self.traffic.draining.clear()
        self.autoscaler = Autoscaler(self.deployment, cluster, self.traffic, lambda: self.now)

    def follow(self, seconds: float = 0.0) -> None:
        end = self.now + seconds
        while True:
            self.autoscaler.follow(list(self.cluster.records.values()))
            if self.now >= end:
                return
            self.now += 5.0


def test_a_wake_starts_one_replica_and_says_so(tmp_path: Path) -> None:
    story = Story(tmp_path, IDLES)
    story.cluster.put("m-1", "stopped", is_idle=True)
    story.follow(60)
    assert story.traffic.asleep == {"m"}
    assert story.cluster.records["m-1"].state == "stopped"
    story.traffic.now_demanded = Demand(waiting=2)
    story.follow()
    assert [each.state for each in story.cluster.records.values()] == ["loading"]
    assert story.lines == ["m: 2 turns wait, and it sleeps; 0 → 1 replicas"]
    assert story.traffic.asleep == {"m"}  # the table that goes out now doesn't show the new replica
    story.follow(60)
    assert len(story.cluster.records) == 1
    assert story.traffic.asleep == frozenset()
    assert story.deployment.counts == {"m": 2}  # what the operator asked for


def test_a_wake_that_cannot_start_anything_is_tried_again_later_and_turns_are_refused_until_then(
    tmp_path: Path,
) -> None:
    story = Story(tmp_path, IDLES)
    story.cluster.put("m-1", "stopped", is_idle=True)
    story.cluster.refuses, story.traffic.now_demanded = True, Demand(waiting=1)
    story.follow(RETRY_S - 5)
    assert story.lines[-1] == "m: no replica can be started: no GPU is free; it is tried again in 60 s"
    assert len(story.lines) == 2
    assert story.traffic.asleep == frozenset()
    story.cluster.refuses = False
    story.follow(10)
    assert [each.state for each in story.cluster.records.values()] == ["loading"]


def test_a_replica_too_many_is_drained_before_it_ends(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    for name in ("m-1", "m-2"):
        story.cluster.put(name, "ready")
    story.follow(DOWN_AFTER_S + 5)
    assert list(story.traffic.draining) == ["m-2"]  # it has fewer turns
    assert story.cluster.stopped == []
    assert story.deployment.counts == {"m": 1}
    story.traffic.draining["m-2"] = 0
    story.follow()
    assert story.cluster.stopped == ["m-2"]
    story.cluster.put("m-2", "stopped")
    story.follow()
    assert list(story.cluster.records) == ["m-1"]


def test_nothing_is_added_while_what_was_added_has_failed(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    story.cluster.put("m-1", "ready")
    story.traffic.now_demanded = QUEUE
    story.follow(UP_AFTER_S)
    assert list(story.cluster.records) == ["m-1", "m-2"]
    story.cluster.put("m-2", "failed")
    story.follow(10 * UP_AFTER_S)
    assert list(story.cluster.records) == ["m-1", "m-2"]
    assert [line for line in story.lines if "m-2" in line] == [
        "m: m-2 was added and failed: see its log, and `stop` it; until then no replica is added"
    ]
    del story.cluster.records["m-2"]
    story.follow(2 * UP_AFTER_S)
    assert list(story.cluster.records) == ["m-1", "m-2"]


def test_one_of_the_first_replicas_that_failed_does_not_stop_growth(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    story.cluster.put("m-1", "ready")
    story.cluster.put("m-2", "failed")
    story.traffic.now_demanded = QUEUE
    story.follow(UP_AFTER_S)
    assert list(story.cluster.records) == ["m-1", "m-2", "m-3"]


def test_an_error_that_comes_back_is_logged_again(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    usual = story.traffic.demand

    def broken() -> Mapping[str, Demand]:
        raise OSError("disk")

    for demand in (broken, broken, usual, broken):
        story.traffic.demand = demand  # type: ignore[method-assign]
        story.follow()
    assert len([line for line in story.lines if "disk" in line]) == 2


def test_a_turn_that_never_ends_does_not_keep_a_replica_for_ever(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    for name in ("m-1", "m-2"):
        story.cluster.put(name, "ready")
    story.follow(DOWN_AFTER_S + 5)
    story.traffic.draining["m-2"] = 1
    story.follow(LEAVE_S + 5)
    assert "m-2" in story.cluster.stopped


def test_the_next_controller_goes_on_removing_a_replica_and_removes_no_other(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    for name in ("m-1", "m-2", "m-3"):
        story.cluster.put(name, "ready")
    story.follow(DOWN_AFTER_S)
    assert list(story.traffic.draining) == []
    story.follow(5)
    [leaving] = story.traffic.draining
    story.restart()
    story.traffic.now_demanded = QUEUE  # two replicas serve: that is fewer than are wanted now
    story.follow(UP_AFTER_S)
    assert list(story.traffic.draining) == [leaving]
    assert story.deployment.counts == {"m": 3}
    story.traffic.draining[leaving] = 0
    story.follow()
    assert story.cluster.stopped == [leaving]


def test_a_later_replica_of_the_same_name_is_not_removed(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    for name in ("m-1", "m-2"):
        story.cluster.put(name, "ready", job_id="7")
    story.follow(DOWN_AFTER_S + 5)
    assert list(story.traffic.draining) == ["m-2"]
    story.restart()
    story.cluster.put("m-2", "ready", job_id="8")
    story.follow(LEAVE_S + 5)
    assert (list(story.traffic.draining), story.cluster.stopped) == ([], [])


def test_a_budget_that_is_spent_is_told_once(tmp_path: Path) -> None:
    story = Story(tmp_path, dataclasses.replace(SCALED, max_gpu_hours=1.0))
    story.cluster.put("m-1", "ready")
    story.traffic.now_demanded = dataclasses.replace(QUEUE, gpu_hours=1.0)
    story.follow(600)
    assert story.lines == ["m has used its 1 GPU-hours: no replica is added"]


def test_nothing_is_decided_while_the_scheduler_does_not_answer(tmp_path: Path) -> None:
    story = Story(tmp_path, SCALED)
    story.cluster.put("m-1", "ready")
    story.cluster.problem = "Slurm does not answer"  # type: ignore[assignment]
    story.traffic.now_demanded = QUEUE
    story.follow(600)
    assert list(story.cluster.records) == ["m-1"]


def test_a_decision_without_a_reason_changes_nothing() -> None:
    assert decide(SCALED, 2, Fleet(2, 2), Demand(), DemandState(), 0.0) == Decision(2)

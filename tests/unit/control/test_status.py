"""What the operator's verbs decide: which replicas go, what is missing, when an engine is idle, what `stop` goes by."""

from __future__ import annotations

from typing import Any

import pytest

from agent_infra_core.control.status import (
    LOAD_DEADLINE_S,
    QUEUE_PATIENCE_S,
    StartWatch,
    choose_to_stop,
    describe_accounting,
    describe_model,
    describe_succession,
    list_problems,
    summarize,
    unreached,
)
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import check_engine_args
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig


def replica(name: str, state: str = "ready", **fields: Any) -> ReplicaRecord:
    return ReplicaRecord(name, name.rpartition("-")[0], state, "vllm", "node", 1, "stamp", **fields)


def names(records: list[ReplicaRecord]) -> list[str]:
    return [record.replica for record in records]


def settles(*looks: tuple[float, str]) -> list[bool]:
    """What StartWatch says of looks: each a time in s and the states of m-1, m-2, …"""
    watch = StartWatch()
    return [
        watch.is_over([replica(f"m-{n}", state) for n, state in enumerate(states.split(), 1)], now)
        for now, states in looks
    ]


def test_time_in_the_queue_has_no_limit_and_is_no_time_of_loading() -> None:
    late = 30 * 86400.0
    assert settles((0, "pending"), (late, "pending"), (late + 1, "loading"), (late + LOAD_DEADLINE_S, "loading")) == (
        [False] * 4
    )
    assert settles((0, "loading"), (LOAD_DEADLINE_S, "loading")) == [False, True]
    assert settles((0, "loading"), (9, "pending"), (late, "loading"), (late + 9, "ready")) == [False] * 3 + [True]


def test_some_that_are_ready_are_enough_but_those_that_load_beside_them_are_waited_for() -> None:
    after = QUEUE_PATIENCE_S + 1
    assert settles((0, "ready pending"), (1, "ready pending"), (after, "ready pending")) == [False, False, True]
    assert settles((0, "ready loading"), (after, "ready loading"), (90, "ready ready")) == [False, False, True]
    # Later than that, one that leaves the queue isn't waited for: of 200 replicas, some always do.
    looks = ((0, "ready loading pending"), (after, "ready loading pending"), (90, "ready ready loading"))
    assert settles(*looks) == [False, False, True]


def test_what_has_failed_or_ended_is_not_waited_for() -> None:
    assert settles((0, "failed stopped")) == [True]
    assert settles((0, "failed pending")) == [False]


def test_what_serves_nobody_yet_is_taken_away_first() -> None:
    records = [replica("m-1"), replica("m-2", "loading"), replica("m-3", "pending"), replica("m-4", "starting")]
    assert names(choose_to_stop(records, {}, 3)) == ["m-3", "m-4", "m-2"]


def test_of_the_ready_ones_the_least_loaded_goes_first_and_of_equals_the_latest() -> None:
    records = [replica(f"m-{number}", started_at=float(number)) for number in (1, 2, 3, 4)]
    rows = {
        "m-1": {"inflight": 2, "sessions": 0},
        "m-2": {"inflight": 0, "sessions": 5},
        "m-3": {"inflight": 0, "sessions": 1},
        "m-4": {"inflight": 0, "sessions": 1},
    }
    assert names(choose_to_stop(records, rows, 4)) == ["m-4", "m-3", "m-2", "m-1"]
    assert choose_to_stop(records, rows, 0) == []


def test_one_that_drains_already_goes_before_an_idle_one() -> None:
    rows = {"m-1": {"inflight": 3, "state": "draining"}, "m-2": {"inflight": 0, "state": "ready"}}
    assert names(choose_to_stop([replica("m-1"), replica("m-2")], rows, 1)) == ["m-1"]


def test_a_model_is_summed_up_with_those_that_ended_by_themselves() -> None:
    records = [replica("m-1"), replica("m-2", "stopped", is_idle=True), replica("m-3", "failed"), replica("m-4")]
    row = summarize("m", 4, records)
    assert row == {"name": "m", "wanted": 4, "running": 2, "ready": 2, "idle": 1, "in_flight": None, "sessions": None}
    assert describe_model(row) == "m  2 of 4 ready, 1 stopped (idle)"


def test_what_the_proxy_knows_of_a_model_is_summed_over_its_replicas() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "m", "inflight": 2, "sessions": 3},
        {"model": "m", "inflight": None, "sessions": 1},
    ]
    row = summarize("m", 1, [replica("m-1")], [*rows, {"model": "other", "inflight": 9, "sessions": 9}])
    assert describe_model(row) == "m  1 of 1 ready, 2 turns in flight, 4 sessions"


def test_a_replica_that_no_turn_reaches_is_not_ready_and_has_the_reason() -> None:
    records = [replica("m-1"), replica("m-2"), replica("m-3"), replica("m-4", "loading")]
    plain = {"model": "m", "inflight": 0, "sessions": 0, "healthy": True, "reason": None, "tunnel": None}
    rows = [
        {**plain, "id": "m-1", "state": "loading", "healthy": None, "tunnel": {"reason": "forwarding is prohibited"}},
        {**plain, "id": "m-2", "state": "ready", "healthy": False, "reason": "no answer for 5 s"},
        {**plain, "id": "m-3", "state": "ready"},
        {**plain, "id": "m-4", "state": "loading"},
    ]
    assert unreached(records, rows) == {"m-1": "forwarding is prohibited", "m-2": "no answer for 5 s"}
    assert summarize("m", 4, records, rows)["ready"] == 1
    assert summarize("m", 4, records)["ready"] == 3


def test_gpu_hours_are_told_where_a_gpu_was_held() -> None:
    hours = {"pending": 0.0, "loading": 0.25, "ready_busy": 1.5, "ready_idle": 0.25}
    told = describe_accounting({"since": 0.0, "gpu_hours": hours})
    assert told is not None
    assert told.startswith("GPU-hours  2.00 since 19")
    assert told.endswith(": 0.00 pending, 0.25 loading, 1.50 ready busy, 0.25 ready idle")
    assert describe_accounting({"since": 0.0, "gpu_hours": dict.fromkeys(hours, 0.0)}) is None
    assert describe_accounting(None) is None


def test_idle_shutdown_is_refused_where_nobody_can_tell() -> None:
    model = ModelConfig("m", "p", engine="command", command=("x", "{port}"), idle_shutdown_minutes=5)
    with pytest.raises(RefusedError, match="idle_shutdown_minutes: engine: command reports no load"):
        check_engine_args(model)


def test_a_replica_that_is_on_its_way_is_amiss_only_where_it_is_missed() -> None:
    records = [replica("m-1"), replica("m-2", "loading")]
    assert list_problems([summarize("m", 1, records)], records) == []
    assert list_problems([summarize("m", 2, records)], records) == ["m-2 is LOADING"]
    assert list_problems([summarize("m", 3, records)], records)[1:] == [
        "2 of 3 replicas of m are running; `start` starts the missing ones"
    ]


def test_one_that_failed_is_always_amiss_and_one_that_was_idle_never() -> None:
    records = [replica("m-1"), replica("m-2", "failed"), replica("m-3", "stopped", is_idle=True)]
    assert list_problems([summarize("m", 2, records)], records) == ["m-2 is FAILED"]


def test_a_handover_is_told_with_its_gap() -> None:
    row = {"successor": "m-2", "note": "", "is_after": False}
    assert describe_succession("m-1", row) == "m-2 takes over from m-1"
    assert "there will be a gap" in describe_succession("m-1", {**row, "is_after": True})
    assert "there will be a gap" in describe_succession("m-1", {**row, "successor": "", "note": "cannot be submitted"})

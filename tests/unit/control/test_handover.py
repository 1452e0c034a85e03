"""When a replica is replaced before its walltime ends: the decisions, without a cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agent_infra_core.control.handover import HANDOVER_RETRY_S, Succession, handover_lead_s, plan_handover
from agent_infra_core.fleet.place import HANDOVER_RESERVE_S
from agent_infra_core.protocol import ReplicaRecord

NOW = 1_000_000.0
HOUR = 3600.0


def replica(name: str, state: str = "ready", left_s: float | None = 4 * HOUR, **fields: Any) -> ReplicaRecord:
    """One that was loaded in 100 s, an hour ago, after it had waited for 200 s."""
    told = {"job_id": f"job-{name}", "started_at": NOW - HOUR, "time_left_s": left_s, "queue_wait_s": 200.0, **fields}
    if state == "ready":
        told.setdefault("ready_at", told["started_at"] + 100.0)
    return ReplicaRecord(name, name.rpartition("-")[0], state, "vllm", "node", 1, "stamp", **told)


def plan(*records: ReplicaRecord, **successions: Succession) -> list[tuple[str, str]]:
    """(action, replica) of each step; keys of ``successions`` are m1 for m-1."""
    named = {name.replace("m", "m-"): succession for name, succession in successions.items()}
    return [(step.action, step.replica) for step in plan_handover(records, named, NOW)]


def test_the_lead_is_what_a_replica_was_seen_to_need_with_a_margin_and_time_to_drain() -> None:
    assert handover_lead_s(replica("m-1"), [replica("m-1")], NOW) == 1.5 * (200 + 100) + HANDOVER_RESERVE_S
    slower = replica("m-2", queue_wait_s=1000.0)
    assert handover_lead_s(replica("m-1"), [replica("m-1"), slower], NOW) == 1.5 * (1000 + 100) + HANDOVER_RESERVE_S
    other = replica("other-1", queue_wait_s=9000.0)
    assert handover_lead_s(replica("m-1"), [replica("m-1"), other], NOW) == 1.5 * (200 + 100) + HANDOVER_RESERVE_S


def test_a_queue_longer_than_the_walltime_does_not_replace_every_replica_at_once() -> None:
    fresh = replica("m-1", left_s=8 * HOUR, started_at=NOW, queue_wait_s=30 * HOUR)
    assert handover_lead_s(fresh, [fresh], NOW) == 6 * HOUR
    assert plan(fresh) == []


@pytest.mark.parametrize(("left_s", "steps"), [(631.0, []), (629.0, [("submit", "m-1")]), (None, [])])
def test_a_successor_is_submitted_when_the_time_left_falls_below_the_lead(
    left_s: float | None, steps: list[tuple[str, str]]
) -> None:
    assert plan(replica("m-1", left_s=left_s)) == steps


def test_only_what_serves_is_replaced() -> None:
    assert plan(*(replica("m-1", state, 10.0) for state in ("pending", "loading", "draining", "failed"))) == []


def test_one_that_has_its_successor_under_way_is_left_alone() -> None:
    for state in ("pending", "starting", "loading"):
        assert plan(replica("m-1", left_s=10.0), replica("m-2", state), m1=Succession("job-m-1", "m-2")) == []


def test_the_old_one_drains_once_the_new_one_is_ready() -> None:
    assert plan(replica("m-1", left_s=10.0), replica("m-2"), m1=Succession("job-m-1", "m-2")) == [("drain", "m-1")]


def test_a_replica_that_ended_is_forgotten_and_a_later_job_of_its_name_is_another() -> None:
    succession = Succession("job-m-1", "m-2")
    assert plan(replica("m-2"), m1=succession) == [("forget", "m-1")]
    assert plan(replica("m-1", "failed"), replica("m-2"), m1=succession) == [("forget", "m-1")]
    later = replica("m-1", left_s=10.0, job_id="job-later")
    assert plan(later, replica("m-2"), m1=succession) == [("forget", "m-1"), ("submit", "m-1")]


@pytest.mark.parametrize(
    "reason", ["QOSMaxJobsPerUserLimit", "AssocMaxJobsLimit", "QOSMaxGRESPerUser", "AssocGrpGRES", "Licenses"]
)
def test_a_limit_that_counts_both_postpones_the_successor_once(reason: str) -> None:
    waiting = replica("m-2", "pending", pending_reason=reason)
    assert plan(replica("m-1"), waiting, m1=Succession("job-m-1", "m-2")) == [("postpone", "m-1")]
    assert plan(replica("m-1"), waiting, m1=Succession("job-m-1", "m-2", is_after=True)) == []


@pytest.mark.parametrize("reason", ["Resources", "Priority", "Dependency", None])
def test_an_ordinary_wait_in_the_queue_does_not(reason: str | None) -> None:
    waiting = replica("m-2", "pending", pending_reason=reason)
    assert plan(replica("m-1"), waiting, m1=Succession("job-m-1", "m-2")) == []


def test_a_successor_that_fails_is_replaced_a_bounded_number_of_times_and_not_at_once() -> None:
    for lost in ([replica("m-2", "failed")], []):
        for attempts, pause_s in ((1, HANDOVER_RETRY_S), (2, 2 * HANDOVER_RETRY_S)):
            waiting = Succession("job-m-1", "m-2", attempts=attempts, at=NOW - pause_s + 1)
            assert plan(replica("m-1"), *lost, m1=waiting) == []
            over = dataclasses.replace(waiting, at=NOW - pause_s)
            assert plan(replica("m-1"), *lost, m1=over) == [("submit", "m-1")]
        last = Succession("job-m-1", "m-2", attempts=3, at=NOW - 1)
        assert plan(replica("m-1"), *lost, m1=last) == [("give up", "m-1")]


def test_one_that_could_not_be_submitted_is_tried_again_later() -> None:
    refused = Succession("job-m-1", "", True, note="cannot be submitted yet: over the limit", at=NOW - 1)
    assert plan(replica("m-1"), m1=refused) == []
    [step] = plan_handover([replica("m-1")], {"m-1": dataclasses.replace(refused, at=NOW - HOUR)}, NOW)
    assert step.reason == "the successor of m-1 cannot be submitted yet: over the limit; another is submitted"

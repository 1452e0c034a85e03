"""GPU time of a run: how much was held, and what of it was wasted."""

from __future__ import annotations

from typing import Any

import pytest

from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.runs import Announcement, RunBook
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.insight.waste import TurnTime, gpu_time

PREFILL_S = 0.001  # of a token


def turn(number: int, missed: int = 0, **fields: Any) -> TurnRecord:
    """A turn of 4 s on its replica with 500 to 1,000 new tokens, of whose context ``missed`` tokens weren't cached."""
    fresh = 500 + 50 * (number % 11)
    record = TurnRecord(f"t{number}", 10.0 * number, "completed", 200, session="s", task=f"task-{number % 4}")
    record.started_at, record.inference_ms, record.model = record.finished_at - 4.0, 4000.0, "m"
    record.prompt_tokens, record.expected_cached_tokens = 6000, 6000 - fresh
    record.cached_tokens = record.expected_cached_tokens - missed
    record.ttft_ms = 1000 * (0.05 + PREFILL_S * (fresh + missed))
    record.cache_miss = "evicted from a" if missed else None
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def held(busy: float = 0.0, idle: float = 0.0, loading: float = 0.0, gpus: int = 2) -> dict[ReplicaUse, float]:
    states = {"ready_busy": busy, "ready_idle": idle, "loading": loading, "pending": 1000.0}
    return {ReplicaUse("r", "m", "H100", gpus, state): seconds for state, seconds in states.items()}


def spent(*turns: TurnRecord) -> TurnTime:
    time = TurnTime()
    for record in turns:
        time.add(record)
    return time


def test_waste_is_what_was_prefilled_again_failed_or_idle() -> None:
    turns = [turn(number, missed=1000 if number < 10 else 0) for number in range(35)]
    failed = [turn(35 + number, outcome=outcome) for number, outcome in enumerate(["aborted", "cut", "error"])]
    retried = [turn(38 + number, retry_ms=8000.0, retries=1) for number in range(2)]
    found = gpu_time(spent(*turns, *failed, *retried), held(busy=150.0, idle=30.0, loading=20.0), tasks=4)
    assert (found["unit"], found["held"], found["held_per_task"]) == ("GPU-s", 400.0, 100.0)
    assert found["idle"] == 60.0
    assert found["prefilled_again"] == pytest.approx(2 * 10 * 1000 * PREFILL_S, rel=0.05)
    assert found["failed"] == pytest.approx(300 * (3 * 4 + 2 * 8) / (40 * 4 + 2 * 8), abs=0.01)
    assert found["wasted"] == pytest.approx(found["idle"] + found["prefilled_again"] + found["failed"], abs=0.02)
    assert found["wasted_per_task"] == pytest.approx(found["wasted"] / 4, abs=0.01)


def test_without_gpus_the_time_of_replicas_counts() -> None:
    found = gpu_time(spent(turn(1)), held(busy=30.0, idle=10.0, gpus=0), tasks=1)
    assert (found["unit"], found["held"], found["wasted"], found["failed"]) == ("replica-s", 40.0, 10.0, 0.0)


def test_what_is_not_known_is_null() -> None:
    few = gpu_time(spent(turn(1)), held(busy=30.0), tasks=0)
    assert (few["prefilled_again"], few["held_per_task"]) == (None, None)  # a turn doesn't tell how long a token takes
    nothing = gpu_time(TurnTime(), {}, tasks=3)
    assert {name for name, value in nothing.items() if value is not None} == {"unit"}


def test_waste_is_never_more_than_was_held() -> None:
    turns = [turn(number, missed=5000) for number in range(40)]
    found = gpu_time(spent(*turns), held(busy=10.0, idle=1.0), tasks=4)
    assert found["wasted"] == found["held"] == 22.0


def test_a_run_holds_the_replicas_of_its_model_from_its_first_turn_to_its_last() -> None:
    book, other = RunBook(), ReplicaUse("o", "other", "H100", 8, "ready_idle")

    def document(now: float) -> dict[str, Any]:
        """Since 0 s, a replica of two GPUs was idle in each second, and a larger one of another model, too."""
        [row] = book.document(now, lambda _: None, {}, lambda: None, {**held(idle=now), other: now})
        return row["gpu_time"]  # type: ignore[no-any-return]

    book.announce(Announcement("night", 1, 0.0))
    book.hold({}, 0.0)
    assert document(100.0)["held"] is None
    book.add(turn(13, task="t"))  # from 126 to 130 s
    assert document(136.0)["held"] == pytest.approx(2 * 10)
    assert document(150.0)["held_per_task"] == pytest.approx(2 * 24)
    book.add(turn(15, task="t"))  # from 146 to 150 s
    book.end_session("s", 150.0)
    assert document(160.0)["held"] == document(500.0)["held"] == pytest.approx(2 * 24)


def test_a_run_of_an_earlier_controller_keeps_the_time_that_it_held() -> None:
    book = RunBook()
    asked: list[tuple[float, float]] = []

    def held_between(since: float, until: float) -> dict[ReplicaUse, float]:
        asked.append((since, until))
        return held(busy=until - since)

    book.restore([Announcement("night", 2, 0.0)], [turn(1, task="t")], [], 36.0, held_between)
    book.hold(held(busy=1000.0), 46.0)  # ten seconds without a controller don't count
    [row] = book.document(56.0, lambda _: None, {}, lambda: None, held(busy=1010.0))
    assert asked == [(6.0, 36.0)]
    assert row["gpu_time"]["held"] == pytest.approx(2 * (30 + 10))

"""`replay`: what other policies would have made of a recorded run. The runs are recorded from the simulated fleet."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from routing import WORKLOADS, build_fleet

from agent_infra_core.errors import RefusedError
from agent_infra_core.insight.history import HistoryBatch, HistoryFile
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.routing.policies import Ours, RoundRobin
from agent_infra_core.routing.replay import (
    AFFINITY,
    RecordedTurn,
    Replay,
    _prefilled,
    ratio_interval,
    read_recording,
    replay,
)
from agent_infra_core.routing.simulator import Fleet, Policy

BUSY = dataclasses.replace(WORKLOADS["swe"], agents=40, sessions=60, steps=(12, 0.3), tool_s=(1.0, 1.0), replicas=2)


@functools.cache
def recorded(policy: Callable[[Fleet, int], Policy]) -> tuple[TurnRecord, ...]:
    """The turns of a run as the history keeps them."""
    fleet = build_fleet(BUSY, 3)
    fleet.run(policy(fleet, 3))
    return tuple(
        TurnRecord(
            turn=f"t{number}", finished_at=turn.finished, outcome="completed", status=200, model="m",
            session=str(turn.session.id), backend=f"r{turn.replica}", started_at=turn.arrived, queue_ms=0.0,
            inference_ms=1000 * (turn.finished - turn.arrived), prompt_tokens=turn.prompt,
            completion_tokens=turn.output, cached_tokens=turn.cached,
        )
        for number, turn in enumerate(fleet.turns)
    )  # fmt: skip


@contextmanager
def history(path: Path, *turns: TurnRecord) -> Iterator[HistoryFile]:
    file = HistoryFile(path / "history.db")
    try:
        batch = HistoryBatch()
        batch.turns.extend(turns)
        file.write(batch)
        yield file
    finally:
        file.close()


def row(text: str, policy: str) -> list[float]:
    """Figures of a policy's row: mean turn (s), ratio, its interval, share of cached tokens (%)."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {policy} |"))
    return [float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", line.removeprefix(f"| {policy} |"))]


def test_a_run_by_round_robin_would_have_been_faster_with_affinity(tmp_path: Path) -> None:
    with history(tmp_path, *recorded(RoundRobin)) as file:
        text = replay(file.query, None, 0.0)
        took_s, _, _, high, hits = row(text, AFFINITY)
        truth = build_fleet(BUSY, 3)
        truth.run(Ours(truth, 3))
        assert took_s == pytest.approx(sum(t.finished - t.arrived for t in truth.turns) / len(truth.turns), rel=0.1)
        assert hits == pytest.approx(
            100 * sum(t.cached for t in truth.turns) / sum(t.prompt for t in truth.turns), abs=3
        )
        assert high < 1.0
        assert f"**{AFFINITY} would have been faster" in text


def test_a_run_with_affinity_would_not_have_been_faster_otherwise(tmp_path: Path) -> None:
    with history(tmp_path, *recorded(Ours)) as file:
        text = replay(file.query, "m", 0.0)
        assert row(text, "round_robin")[1] > 1.1
        assert row(text, AFFINITY)[1] == pytest.approx(1.0, abs=0.05)
        assert "**No other policy would clearly have been faster.**" in text
        assert "What this can't know" in text


def test_the_simulation_takes_as_long_as_the_recorded_run_and_hits_as_much(tmp_path: Path) -> None:
    with history(tmp_path, *recorded(RoundRobin)) as file:
        recording = read_recording(file.query, "m", 0.0)
    simulated = Replay(recording, None)
    assert simulated.recorded.mean_s == pytest.approx(recording.mean_s, rel=0.02)
    assert simulated.error() < 0.15
    turns = recording.turns
    assert simulated.recorded.hit_rate == pytest.approx(
        sum(turn.cached or 0 for turn in turns) / sum(turn.prompt for turn in turns), abs=0.03
    )


def test_what_others_have_prefilled_while_a_turn_ran_is_work_that_delayed_it() -> None:
    rows = [("r0", 0.0, 10.0, 900), ("r0", 5.0, 6.0, 950), ("r1", 5.0, 6.0, 300), ("r0", 10.0, 11.0, None)]
    turns = [RecordedTurn("s", backend, sent, sent, ended, 1000, 10, cached) for backend, sent, ended, cached in rows]
    assert _prefilled(turns) == [100 + 50, 50, 700, 1000]


def test_a_context_that_was_compacted_is_computed_again() -> None:
    turns = [
        TurnRecord(
            turn=f"t{session}-{number}", finished_at=2.0 * number + session + 1, outcome="completed", status=200,
            model="m", session=f"s{session}", backend=f"r{session % 2}", started_at=2.0 * number + session,
            inference_ms=1000.0, prompt_tokens=500 + 1000 * (number % 5), completion_tokens=20, cached_tokens=0,
        )
        for session in range(12)
        for number in range(10)
    ]  # fmt: skip

    def query(sql: str, *_: object) -> list[tuple[object, ...]]:
        names = ["session", "backend", "started_at", "queue_ms", "inference_ms", "prompt_tokens"]
        names += ["completion_tokens", "cached_tokens"]
        return [tuple(getattr(turn, name) for name in names) for turn in turns] if "backend" in sql else [("m",)]

    fleet = Replay(read_recording(query, "m", 0.0), None)
    hits = [500 + 1000 * number + 20 for number in range(4)] * 2
    prompts = [500 + 1000 * (number % 5) for number in range(10)]
    assert fleet.recorded.hit_rate == pytest.approx(sum(hits) / sum(prompts))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no turns of any model"),
        (recorded(Ours)[:50], "a replay needs"),
        ([dataclasses.replace(turn, backend="r1") for turn in recorded(Ours)], "one replica"),
        (
            [dataclasses.replace(turn, backend="r1" if turn.finished_at < 100 else "r2") for turn in recorded(Ours)],
            "a part of the time",
        ),
    ],
    ids=["none", "few", "one replica", "replaced replicas"],
)
def test_what_cannot_be_replayed_is_refused_with_the_reason(
    tmp_path: Path, turns: list[TurnRecord], message: str
) -> None:
    with history(tmp_path, *turns) as file, pytest.raises(RefusedError, match=message):
        replay(file.query, None, 0.0)


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_more_sessions() -> None:
    ours, theirs = [1.0, 2.0, 3.0, 1.5], [2.0, 2.0, 5.0, 2.0]
    ratio, low, high = ratio_interval(ours, theirs)
    assert low < ratio < high
    _, low_of_many, high_of_many = ratio_interval(ours * 50, theirs * 50)
    assert high_of_many - low_of_many < 0.5 * (high - low)

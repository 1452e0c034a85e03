"""Announced runs: progress, the end with its interval, stragglers, walltime."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from agent_infra_core.insight.capacity import CapacityModel
from agent_infra_core.insight.runs import Announcement, RunBook, announcement, task_lengths
from agent_infra_core.insight.turns import TurnRecord

GAP_S = 10.0


class Played:
    """Tasks that take a turn every ten seconds, on so many agents, given to a book of runs up to a moment."""

    def __init__(self, lengths: list[int], agents: int) -> None:
        free = [0.0] * agents
        self.turns: list[tuple[float, str]] = []
        self.ends: list[tuple[float, str]] = []
        for number, length in enumerate(lengths):
            agent = free.index(min(free))
            begun = free[agent]
            self.turns += [(begun + (turn + 1) * GAP_S, f"task-{number}") for turn in range(length)]
            free[agent] = begun + length * GAP_S
            self.ends.append((free[agent], f"task-{number}"))
        self.end_s = max(free)

    def until(self, now: float, tasks: int) -> RunBook:
        book = RunBook()
        book.announce(Announcement("night", tasks, 0.0))
        for number, (at, task) in enumerate(sorted(self.turns)):
            if at <= now:
                record = TurnRecord(f"t{number}", at, "completed", 200, session=task, task=task, model="m")
                record.started_at, record.inference_ms = at - GAP_S, 2000.0
                book.add(record)
        for at, task in self.ends:
            if at <= now:
                book.end_session(task, at)
        return book

    def row(self, now: float, tasks: int, model: CapacityModel | None = None, **ends_at: list[float]) -> dict[str, Any]:
        book = self.until(now, tasks)
        [row] = book.document(now, lambda _: model, ends_at, lambda: np.random.default_rng(1), {})
        return row


def test_progress_is_counted_in_tasks() -> None:
    row = Played([15] * 200, 20).row(625.0, 200)
    assert (row["name"], row["model"], row["tasks"], row["done"], row["running"]) == ("night", "m", 200, 80, 20)


def test_the_end_of_a_run_of_equal_tasks_is_foretold() -> None:
    played = Played([15] * 200, 20)
    remaining = played.row(625.0, 200)["remaining_s"]
    assert remaining["value"] == pytest.approx(played.end_s - 625.0, rel=0.1)
    assert remaining["low"] <= remaining["value"] <= remaining["high"]


def test_intervals_hold_where_tasks_differ() -> None:
    held = []
    for seed in range(20):
        dice = random.Random(seed)
        played = Played([dice.randint(5, 25) for _ in range(200)], 20)
        for share in (0.4, 0.6, 0.8):
            now = share * played.end_s
            remaining = played.row(now, 200)["remaining_s"]
            held.append(remaining["low"] <= played.end_s - now <= remaining["high"])
    assert sum(held) >= 0.85 * len(held)


@pytest.mark.parametrize("alpha", [1.5, 2.5])
def test_a_task_far_beyond_all_others_is_not_about_to_end_where_tails_are_heavy(alpha: float) -> None:
    """What is left of a Pareto task that has had t turns has the median t·(2^(1/α) − 1), and grows with t."""
    dice, rng = random.Random(3), np.random.default_rng(3)
    turns = np.array([6 * dice.paretovariate(alpha) for _ in range(300)])
    found = task_lengths(turns, np.full(len(turns), True), rng).rest(np.array([100.0, 1000.0]), rng)
    for so_far, rest in zip((100, 1000), np.median(found, axis=0), strict=True):
        assert 0.5 < rest / (so_far * (2 ** (1 / alpha) - 1)) < 2.0


def test_a_task_without_memory_has_as_much_left_as_any_other() -> None:
    rng = np.random.default_rng(3)
    turns = rng.exponential(14.0, size=300)
    found = task_lengths(turns, np.full(len(turns), True), rng).rest(np.array([0.0, 40.0]), rng)
    assert 0.6 < np.median(found[:, 1]) / np.median(found[:, 0]) < 1.7


def test_short_tasks_that_end_first_do_not_make_the_rest_look_short() -> None:
    played = Played([5, 40] * 100, 20)
    remaining = played.row(0.35 * played.end_s, 200)["remaining_s"]
    assert remaining["value"] == pytest.approx(0.65 * played.end_s, rel=0.15)


def test_too_few_tasks_tell_nothing() -> None:
    row = Played([15] * 200, 4).row(160.0, 200)
    assert row["remaining_s"]["value"] is None
    assert row["remaining_s"]["reason"] == "4 of 5 tasks are over: too few to tell how long one takes"


def test_a_run_whose_tasks_are_over_has_ended() -> None:
    played = Played([15] * 20, 20)
    assert played.row(played.end_s + 1, 20)["remaining_s"]["value"] == 0.0


def test_stragglers_are_the_tasks_with_more_turns_than_nearly_all_that_are_over() -> None:
    played = Played([10] * 60 + [90] + [10] * 39, 20)
    [straggler] = played.row(800.0, 100)["stragglers"]
    assert straggler["task"] == "task-60"
    assert straggler["turns"] > straggler["usual_turns"] == 10


def test_a_walltime_is_met_or_not_with_a_probability() -> None:
    played = Played([15] * 200, 20)
    left_s = played.end_s - 625.0
    assert played.row(625.0, 200, m=[625.0 + 1.5 * left_s])["ends_before_walltime"] > 0.95
    assert played.row(625.0, 200, m=[625.0 + 1.5 * left_s, 625.0 + 0.5 * left_s])["ends_before_walltime"] < 0.05
    assert played.row(625.0, 200)["ends_before_walltime"] is None


def test_more_replicas_and_fewer_agents_move_the_end_by_what_the_model_says() -> None:
    model = CapacityModel(replicas=1, base_s=1.0, per_request_s=0.4, think_s=1.0)  # 20 agents saturate one replica
    row = Played([15] * 200, 20).row(625.0, 200, model)
    now = row["remaining_s"]["value"]
    more, fewer = (what["remaining_s"]["value"] for what in row["what_ifs"])
    gain = float(CapacityModel(2, 1.0, 0.4, 1.0).throughput(20) / model.throughput(20))
    assert now / more == pytest.approx(gain, rel=0.1)
    assert fewer == pytest.approx(now * float(model.throughput(20) / model.throughput(15)), rel=0.1)


def test_turns_without_an_answer_are_waste() -> None:
    book = RunBook()
    book.announce(Announcement("night", 10, 0.0))
    for number in range(10):
        outcome = "aborted" if number < 2 else "completed"
        book.add(
            TurnRecord(f"t{number}", 5.0, outcome, 200, session="s", task="t", started_at=1.0, inference_ms=1000.0)
        )
    [row] = book.document(6.0, lambda _: None, {}, lambda: None, {})
    assert row["aborted_share"] == 0.2


def test_a_task_belongs_to_the_run_whose_name_its_id_begins_with() -> None:
    book = RunBook()
    book.announce(Announcement("swe", 10, 0.0))
    book.announce(Announcement("web", 10, 0.0))
    for task in ("swe-1", "swe-2", "web-1", "other"):
        book.add(TurnRecord(task, 5.0, "completed", 200, session=task, task=task, started_at=1.0))
    latest, first = book.document(6.0, lambda _: None, {}, lambda: None, {})
    assert (latest["name"], latest["running"]) == ("web", 2)
    assert (first["name"], first["running"]) == ("swe", 2)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("night=200", Announcement("night", 200, 5.0)),
        (" night = 200 ", Announcement("night", 200, 5.0)),
        ("a=b=3", Announcement("a=b", 3, 5.0)),
        ("200", Announcement("me", 200, 5.0)),
        *((wrong, None) for wrong in ("", "night", "night=", "night=0", "night=-1", "night=1.5", "night=²", "9" * 30)),
    ],
)
def test_a_header_announces_a_run(header: str, found: Announcement | None) -> None:
    assert announcement(header, "me", 5.0) == found


def test_a_run_that_each_turn_announces_is_announced_once() -> None:
    book = RunBook()
    assert book.announce(Announcement("night", 10, 5.0))
    assert not book.announce(Announcement("night", 10, 6.0))
    assert book.announce(Announcement("night", 10, 4.0))  # the turns of a batch don't come in the order they began in
    assert book.announce(Announcement("night", 12, 7.0))
    book.add(TurnRecord("t", 6.0, "completed", 200, session="s", started_at=4.0))
    [row] = book.document(8.0, lambda _: None, {}, lambda: None, {})
    assert (row["tasks"], row["announced_at"], row["running"]) == (12, 4.0, 1)


def test_without_a_run_no_turn_is_kept_for_one() -> None:
    book = RunBook()
    for number in range(3):
        book.add(TurnRecord(str(number), 1.0, "completed", 200, task="t"))
    assert len(book._inbox) == 0


def test_tasks_that_began_before_the_run_are_not_of_it() -> None:
    book = RunBook()
    book.announce(Announcement("night", 10, 3.0))
    book.add(TurnRecord("t", 5.0, "completed", 200, session="s", task="t", started_at=1.0))
    [row] = book.document(6.0, lambda _: None, {}, lambda: None, {})
    assert row["running"] == row["done"] == 0


def test_a_task_that_falls_silent_is_over_and_one_that_comes_back_is_not() -> None:
    played = Played([15] * 20, 20)
    played.ends.clear()
    assert played.row(played.end_s + 30, 20)["running"] == 20
    assert played.row(played.end_s + 61, 20)["done"] == 20

"""Figures over time, sessions and turns from the history, and the summaries that make them cheap."""

from __future__ import annotations

import json
import sqlite3
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stats_schema import check_stats

from agent_infra_core.control.reader import _answer_session
from agent_infra_core.insight import summaries
from agent_infra_core.insight.export import read_history
from agent_infra_core.insight.gauges import GaugeLog
from agent_infra_core.insight.history import _HISTORY_MARK, _MIGRATIONS, HistoryBatch, HistoryFile
from agent_infra_core.insight.runs import Announcement
from agent_infra_core.insight.series import (
    SESSION_COLUMNS,
    SESSION_FIELDS,
    SeriesQuery,
    SessionsQuery,
    find_sessions,
    read_series,
    turn_row,
)
from agent_infra_core.insight.summaries import FINE_GAUGES_S, FINE_S
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import TurnFinished, TurnStarted

START = 1_795_305_600.0  # divisible by 3600
HOUR = 3600.0


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HistoryFile]:
    opened = HistoryFile(tmp_path / "history.db")
    yield opened
    opened.close()


def turn(name: str, at: float, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "session": "s",
        "model": "m",
        "stream": True,
        "backend": "m-1",
        "started_at": at - 3,
        "queue_ms": 10.0,
        "ttft_ms": 200.0,
        "inference_ms": 1190.0,
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "cached_tokens": 750,
        "finish_reason": "stop",
        "held_ms": 0.0,
        "retry_ms": 0.0,
        **fields,
    }
    return TurnRecord(name, at, values.pop("outcome", "completed"), values.pop("status", 200), **values)


def write(file: HistoryFile, *turns: TurnRecord, **rest: Any) -> None:
    file.write(HistoryBatch(deque(turns), **rest))


def gauge(at: float, model: str = "", **figures: Any) -> tuple[Any, ...]:
    values = {"seconds": 5.0, "in_flight": 2.0, "queue": 1.0, "kv": 0.5, "gpu": None, "preemptions": 0, **figures}
    seconds, *rest = values.values()
    return (at, model, seconds, *rest)


def ran(since: float, until: float, **figures: Any) -> list[tuple[Any, ...]]:
    """Gauges of a controller that ran from ``since`` until ``until``."""
    return [gauge(since + 5 * number, **figures) for number in range(1, int((until - since) / 5) + 1)]


# --- Over time --------------------------------------------------------------------------------------------------------


def test_a_constant_rate_is_flat_and_one_turn_is_one_step(file: HistoryFile) -> None:
    turns = [turn(f"t{number}", START + number) for number in range(0, 600, 3)]
    write(file, *turns, turn("alone", START + 1800), gauges=ran(START, START + HOUR))
    document = read_series(file, SeriesQuery(START, START + HOUR, 500), START + HOUR + 60)
    check_stats(document, "history_document")
    assert document["step_s"] == 10
    rates = document["series"]["turns_per_minute"]
    assert set(rates[:59]) <= {18.0, 24.0}  # 3 or 4 turns in 10 s
    document = read_series(file, SeriesQuery(START, START + HOUR, 61), START + HOUR + 60)
    assert document["series"]["turns_per_minute"][:10] == [20.0] * 10
    assert document["series"]["turns_per_minute"][30:32] == [1.0, 0.0]


def test_a_step_has_the_same_figures_from_turns_and_from_summaries(
    file: HistoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = ("completed", "completed", "error", "cut", "rejected", "aborted", "completed")
    turns = [
        turn(
            f"t{n}",
            START + 7.3 * n,
            outcome=outcomes[n % 7],
            ttft_ms=20.0 + n,
            finish_reason=("stop", "length", None)[n % 3],
            cached_tokens=None if n % 5 == 0 else 700,
            stream=n % 4 != 0,
        )
        for n in range(300)
    ]
    write(file, *turns, gauges=ran(START, START + HOUR))
    summed = read_series(file, SeriesQuery(START, START + HOUR, 61), START + HOUR + 60)
    monkeypatch.setattr("agent_infra_core.insight.series.STEP_S", 100_000)
    raw = read_series(file, SeriesQuery(START, START + HOUR, 61), START + HOUR + 60)
    assert summed == raw
    series = raw["series"]
    assert sum(series["errors_per_minute"]) == sum(turn.outcome in ("error", "cut") for turn in turns)
    assert sum(series["finish_reasons.none"]) == sum(
        turn.outcome == "completed" and turn.finish_reason is None for turn in turns
    )
    assert {key for key in series if key.startswith("finish")} == {
        f"finish_reasons.{reason}" for reason in ("stop", "length", "none")
    }
    assert [value for value in series["hit_rate"] if value is not None] == pytest.approx([0.7] * 37)


def test_percentiles_are_of_the_step_and_tokens_are_timed_one_by_one(file: HistoryFile) -> None:
    slow = [turn(f"s{n}", START + 60 + n, ttft_ms=1000.0, inference_ms=2980.0) for n in range(10)]
    write(file, *(turn(f"t{n}", START + n) for n in range(10)), *slow, gauges=ran(START, START + 300))
    series = read_series(file, SeriesQuery(START, START + 240, 5), START + 300)["series"]
    assert series["ttft_ms_p50"] == [pytest.approx(200, rel=0.05), pytest.approx(1000, rel=0.05), None, None]
    assert series["itl_ms_p50"] == [pytest.approx(10, rel=0.05), pytest.approx(20, rel=0.05), None, None]
    assert series["latency_ms_p95"] == [pytest.approx(1200, rel=0.05), pytest.approx(2990, rel=0.05), None, None]
    assert series["turns_per_minute"] == [10.0, 10.0, 0.0, 0.0]


def test_where_no_controller_ran_every_series_has_a_gap(file: HistoryFile) -> None:
    figures = {"preemptions": 2, "in_flight": 4.0}
    gauges = [*ran(START, START + 120, **figures), *ran(START + 240, START + 300, **figures)]
    write(file, turn("t1", START + 30), turn("t2", START + 270), gauges=gauges)
    series = read_series(file, SeriesQuery(START, START + 300, 6), START + 310)["series"]
    assert series["turns_per_minute"] == [1.0, 0.0, None, None, 1.0]
    assert series["in_flight"] == [4.0, 4.0, None, None, 4.0]
    assert series["preemptions"] == [22, 24, None, None, 24]
    assert series["finish_reasons.stop"] == [1, 0, None, None, 1]
    assert all(values[2:4] == [None, None] for name, values in series.items() if name != "at")


def test_a_rate_is_of_the_time_that_a_controller_ran(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + 31 + n) for n in range(10)), gauges=ran(START + 30, START + 120))
    series = read_series(file, SeriesQuery(START, START + 120, 3), START + 130)["series"]
    assert series["turns_per_minute"] == [20.0, 0.0]


def test_turns_of_a_moment_are_no_thousand_a_minute(file: HistoryFile) -> None:
    write(file, turn("t", START + 59.9), gauges=[gauge(START + 60, seconds=0.2), *ran(START + 60, START + 120)])
    series = read_series(file, SeriesQuery(START, START + 120, 3), START + 130)["series"]
    assert series["turns_per_minute"] == [4.0, 0.0]


def test_the_last_step_is_left_out_until_half_of_it_is_over(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + n) for n in range(143)), gauges=ran(START, START + 140))
    short = read_series(file, SeriesQuery(START, START + 143, 4), START + 143)
    assert short["series"]["turns_per_minute"] == [60.0, 60.0]
    write(file, *(turn(f"t{n}", START + n) for n in range(143, 163)), gauges=ran(START + 140, START + 160))
    longer = read_series(file, SeriesQuery(START, START + 163, 4), START + 163)
    assert longer["series"]["turns_per_minute"] == [60.0, 60.0, pytest.approx(60, rel=0.02)]
    assert longer["to"] == START + 162.5
    past = read_series(file, SeriesQuery(START, START + 90, 3), START + 1000)
    assert (past["to"], past["series"]["turns_per_minute"]) == (START + 120, [60.0, 60.0])  # steps are whole


def test_gauges_fill_steps_shorter_than_their_own(file: HistoryFile) -> None:
    write(file, gauges=[gauge(START + 5, in_flight=1.0), gauge(START + 10, in_flight=3.0)])
    series = read_series(file, SeriesQuery(START, START + 10, 11), START + 60)["series"]
    assert series["in_flight"] == [1.0] * 5 + [3.0] * 5
    assert series["gpu_utilization"] == [None] * 10


def test_a_model_has_its_own_figures(file: HistoryFile) -> None:
    gauges = ran(START, START + 60) + [gauge(START + 5 * n, "b", in_flight=7.0) for n in range(1, 13)]
    write(
        file, turn("t1", START + 1), turn("t2", START + 2, model="b"), turn("t3", START + 3, model="b"), gauges=gauges
    )
    of_b = read_series(file, SeriesQuery(START, START + 60, 2, "b"), START + 70)["series"]
    assert (of_b["turns_per_minute"], of_b["in_flight"]) == ([2.0], [7.0])
    unknown = read_series(file, SeriesQuery(START, START + 60, 2, "c"), START + 70)["series"]
    assert (unknown["turns_per_minute"], unknown["in_flight"]) == ([0.0], [None])


@pytest.mark.parametrize(("span_s", "points", "step_s"), [(60, 300, 1), (3600, 2000, 2), (86400, 2000, 60)])
def test_there_are_never_more_points_than_asked_for(file: HistoryFile, span_s: float, points: int, step_s: int) -> None:
    write(file, turn("t", START), gauges=ran(START, START + 5))
    document = read_series(file, SeriesQuery(START, START + span_s, points), START + 2 * span_s)
    assert document["step_s"] == step_s
    assert len(document["series"]["at"]) <= points
    lengths = {len(values) for values in document["series"].values()}
    assert lengths == {len(document["series"]["at"])}


def test_a_range_with_very_many_turns_is_read_from_the_summaries(
    file: HistoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_infra_core.insight.series.MAX_READ_TURNS", 50)
    write(file, *(turn(f"t{n}", START + n) for n in range(100)), gauges=ran(START, START + 120))
    document = read_series(file, SeriesQuery(START, START + 120, 2000), START + 130)
    assert (document["step_s"], document["series"]["turns_per_minute"]) == (60, [60.0, 40.0])


@pytest.mark.parametrize("points", [1, 2, 300])
def test_an_empty_history_is_an_empty_answer(file: HistoryFile, points: int) -> None:
    document = read_series(file, SeriesQuery(0, START, points), START)
    check_stats(document, "history_document")
    assert set(document["series"]["turns_per_minute"]) == {None}


def test_a_history_before_the_gauges_shows_the_steps_with_turns(file: HistoryFile) -> None:
    write(file, turn("t1", START + 10), turn("t2", START + 130))
    series = read_series(file, SeriesQuery(START, START + 180, 4), START + 200)["series"]
    assert series["turns_per_minute"] == [1.0, None, 1.0]
    assert series["in_flight"] == [None, None, None]


def test_runs_are_marked_and_those_of_a_former_controller_ended_with_its_last_turn(file: HistoryFile) -> None:
    begun = {"night": START + 100, "first": START + 50, "followed": START + 200}
    runs = {name: Announcement(name, 5, at) for name, at in begun.items()}
    write(file, turn("t", START + 500), runs=runs, run_ends={"first": START + 90})
    query = SeriesQuery(START, START + 600, 10)
    runs = read_series(file, query, START + 600)["runs"]
    assert runs == [
        {"name": "first", "from": START + 50, "to": START + 90},
        {"name": "night", "from": START + 100, "to": None},
        {"name": "followed", "from": START + 200, "to": None},
    ]
    file.end_runs({"followed"})
    assert [run["to"] for run in read_series(file, query, START + 600)["runs"]] == [START + 90, START + 500, None]


def test_old_steps_and_gauges_are_merged_and_sums_stay(file: HistoryFile) -> None:
    turns = [turn(f"t{n}", START + 60 * n, ttft_ms=100.0 + n) for n in range(120)]
    write(file, *turns, gauges=ran(START, START + 600, preemptions=1))
    query, now = SeriesQuery(START, START + 2 * HOUR, 3), START + 2 * HOUR + 60
    before = read_series(file, query, now)
    file.tidy(START + FINE_S + FINE_GAUGES_S + 3 * HOUR)
    after = read_series(file, query, now)
    assert before["step_s"] == after["step_s"] == 3600
    assert after["series"] == before["series"]
    assert file.query("SELECT count(*), sum(turns) FROM steps") == [(2, 120)]
    assert file.query("SELECT count(*), sum(preemptions) FROM gauges") == [(3, 120)]
    file.tidy(START + FINE_S + FINE_GAUGES_S + 3 * HOUR)  # again changes nothing
    assert read_series(file, query, now)["series"] == before["series"]


def test_a_short_time_of_long_ago_is_read_in_the_steps_that_are_left_of_it(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + 60 * n) for n in range(1440)), gauges=ran(START, START + 24 * HOUR))
    now = START + FINE_S + 30 * HOUR
    file.tidy(now)
    document = read_series(file, SeriesQuery(START, START + 24 * HOUR, 2000), now)
    assert (document["step_s"], document["series"]["turns_per_minute"]) == (3600, [1.0] * 24)
    short = read_series(file, SeriesQuery(START, START + HOUR, 300), now)  # from the turns themselves
    assert (short["step_s"], sum(short["series"]["turns_per_minute"])) == (15, 60 * 4.0)


# --- Summaries --------------------------------------------------------------------------------------------------------


def test_an_older_file_is_summarised_piece_by_piece_and_each_turn_once(
    file: HistoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, *(turn(f"t{n}", START + n, session=f"s{n % 3}") for n in range(100)))
    wanted = file.query("SELECT * FROM steps"), file.query("SELECT * FROM sessions")
    for statement in ("DELETE FROM steps", "DELETE FROM sessions", "DELETE FROM about WHERE name = 'summarised'"):
        file.query(statement)
    monkeypatch.setattr(summaries, "CHUNK_TURNS", 7)
    rounds = 0
    while file.catch_up():
        rounds += 1
    assert rounds == 15
    found = file.query("SELECT * FROM steps"), file.query("SELECT * FROM sessions")
    assert json.dumps(found[1]) == json.dumps(wanted[1])
    assert found[0][0][:12] == wanted[0][0][:12]


def test_a_file_of_the_schema_before_is_read_with_all_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path, isolation_level=None)
    for step in _MIGRATIONS[:-1]:
        for statement in step.split(";"):
            old.execute(statement)
    old.execute(f"PRAGMA application_id = {_HISTORY_MARK}")
    old.execute(f"PRAGMA user_version = {len(_MIGRATIONS) - 1}")
    rows = [
        (f"t{number}", START + number, "completed", 200, f"s{number % 2}", "m", START + number - 1, 0, 0, "q", "a")
        for number in range(20)
    ]
    columns = (
        "turn, finished_at, outcome, status, session, model, started_at, retries, tokens_estimated, prompt, answer"
    )
    old.executemany(f"INSERT INTO turns ({columns}) VALUES ({', '.join('?' * 11)})", rows)
    old.close()
    with read_history(path) as file:
        assert file is not None
        assert [(row["id"], row["turns"]) for row in find_sessions(file, [], SessionsQuery(sort="id"))["sessions"]] == [
            ("s1", 10),
            ("s0", 10),
        ]
        assert next(file.turns()).held_ms is None
        assert read_series(file, SeriesQuery(START, START + 60, 2), START + 90)["series"]["turns_per_minute"] == [20.0]


def test_a_turn_that_is_written_twice_is_summarised_once(file: HistoryFile) -> None:
    for _ in range(2):
        write(file, turn("t", START))
    assert file.query("SELECT turns FROM sessions") == [(1,)]
    assert file.query("SELECT turns FROM steps") == [(1,)]


def test_finish_reasons_are_bounded(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START, finish_reason=f"r{n}" * 50) for n in range(100)))
    [[reasons]] = file.query("SELECT reasons FROM steps")
    told = json.loads(reasons)
    assert (len(told), sum(told.values()), told["other"]) == (11, 100, 90)


# --- Sessions ---------------------------------------------------------------------------------------------------------


def live(name: str, state: str = "idle", **figures: Any) -> tuple[Any, ...]:
    values = dict.fromkeys(SESSION_COLUMNS, None) | {"id": name, "model": "m", "last_at": START + 1000, "turns": 1}
    values |= dict.fromkeys(("completed", "errors", "aborted", "rejected"), 0) | figures
    return (state, *values.values())


def ids(document: dict[str, Any]) -> list[str]:
    return [row["id"] for row in document["sessions"]]


def test_sessions_that_ended_and_that_live_are_found_together(file: HistoryFile) -> None:
    write(
        file,
        turn("t1", START + 3, session="web-1", task="Shop", think_ms=500.0),
        turn("t2", START + 9, session="web-1", task="Shop", outcome="cut", think_ms=1500.0, backend="m-2"),
        turn("t3", START + 20, session="code-1", client="a%_b agent.py", cached_tokens=None),
    )
    known = [live("web-2", "decoding"), live("code-1", "waiting", turns=1, completed=1)]
    document = find_sessions(file, known, SessionsQuery())
    check_stats(document, "sessions_document")
    assert [(row["id"], row["state"]) for row in document["sessions"]] == [
        ("code-1", "waiting"),
        ("web-2", "decoding"),
        ("web-1", "ended"),
    ]
    web = document["sessions"][2]
    assert (web["turns"], web["completed"], web["errors"], web["replica"]) == (2, 1, 1, "m-2")
    assert (web["started_at"], web["last_at"], web["think_s"], web["tokens_in"]) == (START, START + 9, 2.0, 2000)
    for query, found in (
        (SessionsQuery(query="WEB"), ["web-2", "web-1"]),
        (SessionsQuery(query="shop"), ["web-1"]),
        (SessionsQuery(query="%_"), []),  # no pattern
        (SessionsQuery(state="live"), ["code-1", "web-2"]),
        (SessionsQuery(state="ended"), ["web-1"]),
        (SessionsQuery(outcome="error"), ["web-1"]),
        (SessionsQuery(sort="think_s"), ["web-1", "code-1", "web-2"]),  # unknown ones last, by id
        (SessionsQuery(sort="turns", descending=False), ["code-1", "web-2", "web-1"]),
        (SessionsQuery(limit=1, offset=1), ["web-2"]),
        (SessionsQuery(model="other"), []),
    ):
        assert ids(find_sessions(file, known, query)) == found, query
    assert find_sessions(file, known, SessionsQuery(limit=1, offset=1))["total"] == 3


def test_the_file_knows_the_turns_that_a_new_controller_has_forgotten(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + n) for n in range(5)))
    [row] = find_sessions(file, [live("s", "idle", turns=2)], SessionsQuery())["sessions"]
    assert (row["state"], row["turns"]) == ("idle", 5)
    [row] = find_sessions(file, [live("s", "idle", turns=6)], SessionsQuery())["sessions"]
    assert row["turns"] == 6


def test_a_search_knows_the_cases_of_all_letters(file: HistoryFile) -> None:
    write(file, turn("t1", START, session="s1", task="BÜCHER"), turn("t2", START, session="s2"))
    assert ids(find_sessions(file, [live("s3", "idle", task="Ärger")], SessionsQuery(query="bücher"))) == ["s1"]
    assert ids(find_sessions(file, [live("s3", "idle", task="Ärger")], SessionsQuery(query="ÄRGER"))) == ["s3"]


@pytest.mark.parametrize("sort", sorted(SESSION_FIELDS))
def test_pages_of_sessions_have_each_session_once(file: HistoryFile, sort: str) -> None:
    write(file, *(turn(f"t{n}", START + n % 3, session=f"s{n:02}") for n in range(20)))
    pages = [ids(find_sessions(file, [], SessionsQuery(sort=sort, limit=6, offset=at))) for at in range(0, 24, 6)]
    assert sorted(name for page in pages for name in page) == [f"s{n:02}" for n in range(20)]


def test_a_session_whose_turns_were_removed_is_forgotten(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + n, session=f"s{n}") for n in range(10)))
    file.query("DELETE FROM turns WHERE id <= 4")
    file.tidy(START + 100)
    assert find_sessions(file, [], SessionsQuery())["total"] == 6


# --- The turns of a session -------------------------------------------------------------------------------------------


def session_document(file: HistoryFile | None, known: Any = (None, ()), **parameters: Any) -> dict[str, Any] | None:
    status, body = _answer_session(file, {"session": "s", **parameters}, known, START)
    return json.loads(body) if status == 200 else None


def test_an_ended_sessions_turns_come_from_the_history(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + n, prompt=f"q{n}", answer=f"a{n}") for n in range(1, 251)))
    document = session_document(file)
    assert document is not None
    check_stats(document, "session_document")
    assert (document["session"]["state"], document["session"]["turns"], document["turns_total"]) == ("ended", 250, 250)
    assert [row["number"] for row in document["turns"]] == list(range(250, 50, -1))
    document = session_document(file, before=8, limit=1)
    assert document is not None
    assert [(row["number"], row["prompt"], row["answer"]) for row in document["turns"]] == [(7, "q7", "a7")]
    assert session_document(file, session="unknown") is None


def test_the_texts_of_an_answer_are_bounded(file: HistoryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.series.MAX_TEXT_BYTES", 10)
    write(file, *(turn(f"t{n}", START + n, prompt="éé", answer="a") for n in range(1, 4)))
    document = session_document(file)
    assert document is not None
    assert [(row["number"], row["prompt"], row["answer"]) for row in document["turns"]] == [
        (3, "éé", "a"), (2, "éé", "a"), (1, None, None),
    ]  # fmt: skip


def test_a_session_that_was_resumed_has_the_figures_of_all_its_turns(file: HistoryFile) -> None:
    write(file, *(turn(f"t{n}", START + n) for n in range(1, 6)))
    tracker = Tracker(lambda: START + 10)
    tracker.observe(TurnStarted("t6", START + 9, "m", "/v1/chat/completions", "s"))
    tracker.observe(TurnFinished("t6", START + 10, "completed", 200))
    document = session_document(file, tracker.session("s"))
    assert document is not None
    assert (document["session"]["state"], document["session"]["turns"], document["turns_total"]) == ("idle", 6, 6)


def test_turns_that_are_not_written_yet_come_from_the_controller(file: HistoryFile) -> None:
    write(file, turn("t1", START + 1), turn("t2", START + 2))
    document = session_document(file, (None, [turn("t2", START + 2), turn("t3", START + 3)]))
    assert document is not None
    assert [(row["number"], row["turn"]) for row in document["turns"]] == [(3, "t3"), (2, "t2"), (1, "t1")]


def test_the_phases_of_a_turn_add_up_to_its_time() -> None:
    row = turn_row(
        turn(
            *("t", START + 5),
            queue_ms=1000.0,
            held_ms=300.0,
            retry_ms=200.0,
            ttft_ms=400.0,
            inference_ms=2000.0,
            cached_tokens=100,
            expected_cached_tokens=775,
            cache_miss="evicted from m-1",
            unaccounted_ms=70.0,
        ),
        number=4,
    )
    assert (row["queued_ms"], row["held_ms"], row["retry_ms"]) == (500.0, 300.0, 200.0)
    assert (row["replayed_prefill_ms"], row["prefill_ms"], row["decode_ms"]) == (300.0, 100.0, 1600.0)  # 675 of 900
    assert (row["number"], row["idle_ms"], row["miss_reason"]) == (4, 70.0, "evicted from m-1")
    assert (row["replica"], row["tokens_in"], row["tokens_out"]) == ("m-1", 1000, 100)


def test_where_nothing_was_streamed_prefill_and_decode_are_unknown() -> None:
    row = turn_row(turn("t", START, stream=False, held_ms=None, retry_ms=None), 1)
    assert (row["prefill_ms"], row["decode_ms"], row["replayed_prefill_ms"]) == (None, None, None)
    assert (row["queued_ms"], row["inference_ms"]) == (10.0, 1190.0)


# --- Gauges -----------------------------------------------------------------------------------------------------------


def replica(name: str, model: str = "m", **figures: Any) -> dict[str, Any]:
    values = {"inflight": 2, "kv": 0.5, "gpu": 80.0, "preemptions": 10, **figures}
    return {
        "id": name,
        "model": model,
        "inflight": values["inflight"],
        "engine": {"kv_usage": values["kv"], "preemptions": values["preemptions"]},
        "gpu": None if values["gpu"] is None else {"utilization": values["gpu"]},
    }


def test_gauges_are_means_over_five_seconds_by_model_and_in_all() -> None:
    log = GaugeLog(START)
    for second in range(11):
        sampled = [replica("m-1", inflight=second, preemptions=10 + second), replica("b-1", "b", gpu=None, kv=None)]
        log.sample(START + second, sampled, {"m": 3})
    rows: Any = {(at, model): figures for at, model, *figures in log.take()}
    assert sorted(rows) == [(START + at, model) for at in (5, 10) for model in ("", "b", "m")]
    assert rows[START + 5, "m"] == [5.0, 2.5, 3.0, 0.5, pytest.approx(0.8), 5]  # samples of seconds 0 to 5
    assert rows[START + 5, "b"] == [5.0, 2.0, 0.0, None, None, 0]
    assert rows[START + 10, ""] == [5.0, 10.0, 3.0, 0.5, pytest.approx(0.8), 5]
    assert log.take() == []


def test_an_engine_that_was_restarted_counts_preemptions_from_zero() -> None:
    log = GaugeLog(START)
    for second, count in enumerate((100, 104, 3, 3, 3, 3)):
        log.sample(START + second, [replica("m-1", preemptions=count)], {})
    assert [row[-1] for row in log.take() if row[1] == "m"] == [7]


def test_a_pause_is_no_time_that_a_controller_ran() -> None:
    log = GaugeLog(START)
    for second in (0, 1, 2, 60, 61, 62, 63, 64, 65):
        log.sample(START + second, [replica("m-1")], {})
    assert [(row[0], row[2]) for row in log.take() if not row[1]] == [(START + 65, 5.0)]

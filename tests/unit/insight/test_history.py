"""The history file and its writer: what is kept, what outlives what, and what happens where it cannot be written."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import closed_loop
import numpy as np
import pytest
from clock import Clock
from patience import PATIENCE_S
from program import wait_for

import agent_infra
from agent_infra import main, moment
from agent_infra_core.control.bookkeeping import Bookkeeper
from agent_infra_core.fleet.state import DeploymentPaths, deployment_paths
from agent_infra_core.insight.export import export_turns
from agent_infra_core.insight.gpu_hours import NEW_REPLICA_S, ReplicaTime, ReplicaUse, replica_use
from agent_infra_core.insight.history import (
    _HISTORY_MARK,
    _MIGRATIONS,
    TURN_COLUMNS,
    VERDICT_COLUMNS,
    History,
    HistoryBatch,
    HistoryFile,
    HistoryRefusedError,
    history_path,
    is_local,
    share_of_day,
    verdict_row,
)
from agent_infra_core.insight.rates import HISTORY_POINTS, Timeline
from agent_infra_core.insight.report import Report
from agent_infra_core.insight.runs import Announcement
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import GpuSample, ReplicaRecord, SessionEnded, TurnFinished, TurnStarted
from agent_infra_core.settings import DEFAULT_CONFIG

NOW = 1_800_000_000.0
USE = ReplicaUse("m-1", "m", "H100", 2, "ready_busy")


def record(number: int, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "session": f"s{number % 3}",
        "model": "m",
        "stream": True,
        "queue_ms": 1.5,
        "prompt_tokens": 100,
        "prompt": "say",
        "answer": "said",
        **fields,
    }
    return TurnRecord(f"t-{number:x}", NOW + number, "completed", 200, **values)


def batch(*records: TurnRecord, **fields: Any) -> HistoryBatch:
    return HistoryBatch(deque(records), **fields)


def make_first_version(path: Path) -> None:
    """A file as the first version of the schema had it, with 41 requests counted."""
    old = sqlite3.connect(path, isolation_level=None)
    for statement in _MIGRATIONS[0].split(";"):
        old.execute(statement)
    old.execute("INSERT INTO totals VALUES ('requests', 41)")
    old.execute(f"PRAGMA application_id = {_HISTORY_MARK}")
    old.execute("PRAGMA user_version = 1")
    old.close()


@contextlib.contextmanager
def history_file(path: Path, **options: Any) -> Iterator[HistoryFile]:
    file = HistoryFile(path, **options)
    try:
        yield file
    finally:
        file.close()


class Writer:
    """A History that writes fast, with what it says in the log."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.history = History(path, self.log, lambda: NOW, interval_s=0.02, **options)

    def log(self, message: str, level: str) -> None:
        self.said.append(f"{level}: {message}")

    def __enter__(self) -> Writer:
        self.history.open(lambda _: None)
        return self

    def __exit__(self, *_: object) -> None:
        self.history.close()

    def add(self, *records: TurnRecord, **fields: Any) -> None:
        self.history.add(batch(*records, **fields))

    def wait_state(self, state: str, turns: int | None = None) -> None:
        def reached() -> bool:
            document = self.history.document()
            return document["state"] == state and turns in (None, document["turns"])

        wait_for(reached, f"{state} with {turns} turns; it is {self.history.document()}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


# --- The file ---------------------------------------------------------------------------------------------------------


def test_a_turn_is_read_as_it_was_written(path: Path) -> None:
    whole = TurnRecord(
        turn="t-1",
        finished_at=NOW,
        outcome="cut",
        status=200,
        session="sitzung 😀",
        task="a,b",
        client="c",
        model="m",
        path="/v1/x",
        stream=False,
        backend="m-1",
        started_at=NOW - 2.25,
        retries=2,
        think_ms=1.0,
        pre_ms=2.0,
        queue_ms=3.0,
        ttft_ms=4.0,
        inference_ms=5.0,
        post_ms=6.0,
        unaccounted_ms=7.0,
        prompt_tokens=8,
        completion_tokens=9,
        cached_tokens=10,
        expected_cached_tokens=11,
        cache_miss="moved",
        tokens_estimated=True,
        finish_reason="stop",
        error="e",
        prompt="line\nline\0",
        answer='"=1+1"',
    )
    bare = TurnRecord("t-2", NOW, "rejected", 429)
    with history_file(path) as file:
        file.write(batch(whole, bare))
    with history_file(path, read_only=True) as file:
        assert list(file.turns()) == [whole, bare]


def test_every_field_of_a_record_has_its_column(path: Path) -> None:
    with history_file(path) as file:
        columns = [row[1] for row in file.query("PRAGMA table_info(turns)")]
    assert sorted(columns) == sorted(["id", *(item.name for item in dataclasses.fields(TurnRecord))])


def test_only_the_user_can_read_it(path: Path) -> None:
    with history_file(path) as file:
        file.write(batch(record(1)))
        files = list(path.parent.iterdir())
        assert [stat.S_IMODE(each.stat().st_mode) for each in files] == [0o600] * len(files)


def test_a_turn_that_is_written_twice_counts_once(path: Path) -> None:
    with history_file(path) as file:
        assert file.write(batch(record(1), record(2))) == 2
        assert file.write(batch(record(2, answer="again"), record(3))) == 1
        assert [turn.answer for turn in file.turns()] == ["said"] * 3


def test_a_late_post_time_finds_its_turn(path: Path) -> None:
    with history_file(path) as file:
        file.write(batch(record(1)))
        file.write(batch(record(2), posts={"t-1": 250.0, "t-2": 1.0, "t-unknown": 3.0}))
        assert [turn.post_ms for turn in file.turns()] == [250.0, 1.0]


def test_totals_and_replica_time_are_summed(path: Path) -> None:
    with history_file(path) as file:
        for _ in range(2):
            file.write(batch(totals={"requests": 3, "errors": 0}, replica_time={(USE, 300): 1.5, (USE, 600): 2.0}))
        assert file.totals() == {"requests": 6}
        assert file.replica_seconds() == {USE: 7.0}
        assert file.replica_seconds(since=620.0) == {USE: 4.0}  # the step of 600 s holds it
        assert file.replica_seconds(until=500.0) == {USE: 3.0}


def test_points_are_kept_while_they_are_shown(path: Path) -> None:
    points = [{"at": NOW + number, "in_flight": number} for number in range(1000)]
    with history_file(path) as file:
        for first in range(0, 1000, 100):
            file.write(HistoryBatch(points=points[first : first + 100]))
        assert file.points() == points[-HISTORY_POINTS:]
        file.tidy(NOW)
        assert file.query("SELECT count(*) FROM points") == [(HISTORY_POINTS,)]


def test_the_page_goes_on_with_the_points_of_before() -> None:
    tracker = Tracker(lambda: NOW)
    tracker.sample({})
    (point,) = tracker.snapshot([], [], "least_load")["throughput"]["history"]
    later = Tracker(lambda: NOW + 10)
    later.timeline.restore([{**point, "of a newer version": 1}])
    later.sample({})
    points = later.snapshot([], [], "least_load")["throughput"]["history"]
    assert [tuple(each) for each in points] == [Timeline.NAMES] * 2
    assert points[0] == point


def test_turns_are_found_by_session_time_and_number(path: Path) -> None:
    with history_file(path) as file:
        file.write(batch(*map(record, range(3000))))  # more than one chunk
        assert [turn.session for turn in file.turns(session="s1")] == ["s1"] * 1000
        assert next(file.turns(since=NOW + 10)).turn == "t-a"
        assert [turn.turn for turn in file.latest_turns(2, 0.0)] == [record(2998).turn, record(2999).turn]


def test_a_file_that_is_too_large_loses_its_oldest_turns(path: Path) -> None:
    with history_file(path) as file:
        file.write(batch(*(record(number, answer="x" * 5000) for number in range(100))))
        assert file.trim(1 << 30, 10) == 0
        assert file.trim(200_000, 10) == 10
        assert next(file.turns()).turn == record(10).turn
        while file.trim(200_000, 10):
            pass
        kept = file.count_turns()
        for number in range(100, 200):  # what was freed is used again
            file.write(batch(record(number, answer="x" * 5000)))
            file.trim(200_000, 10)
        assert 0 < kept <= 20
        assert 0 < file.count_turns() <= 20
        assert file.query("PRAGMA page_count")[0][0] * 4096 < 700_000


def test_replica_time_of_days_gone_by_is_kept_by_the_day(path: Path) -> None:
    day = int(NOW // 86400) * 86400
    times = {(USE, day - 20 * 86400 + step): 300.0 for step in range(0, 86400, 300)}
    with history_file(path) as file:
        file.write(batch(replica_time={**times, (USE, day): 7.0, (USE, day + 300): 8.0}))
        for _ in range(2):  # the second time there is nothing to do
            file.tidy(day + 400.0)
            assert file.query("SELECT at, seconds FROM replica_time ORDER BY at") == [
                (day - 20 * 86400, 86400.0),
                (day, 7.0),
                (day + 300, 8.0),
            ]


def test_of_a_day_that_was_summed_up_a_span_has_its_part(path: Path) -> None:
    day = int(NOW // 86400) * 86400 - 20 * 86400
    times = {(USE, day + step): 300.0 for step in range(0, 2 * 86400, 300)}
    with history_file(path) as file:
        file.write(batch(replica_time=times))
        file.query("UPDATE about SET value = 0 WHERE name = 'since'")
        spans = [day + hours * 3600 for hours in (0, 0.05, 15, 24, 30)]
        before = [file.replica_seconds(since) for since in spans]
        file.tidy(day + 20 * 86400)
        after = [file.replica_seconds(since) for since in spans]
    assert [sums[USE] / 3600 for sums in after] == pytest.approx([48.0, 47.95, 33.0, 24.0, 18.0])
    assert [sums[USE] for sums in after] == pytest.approx([sums[USE] for sums in before], abs=300)


def test_a_file_that_was_begun_during_a_day_has_its_time_after_that() -> None:
    noon = 20 * 86400 + 43200.0
    assert share_of_day(noon, begun=0.0) == 0.5
    assert share_of_day(noon + 21600, begun=noon) == 0.5
    assert share_of_day(noon, begun=noon + 3600) == 1.0


def test_an_older_versions_file_is_brought_up_to_date(path: Path) -> None:
    make_first_version(path)
    with history_file(path) as file:
        file.write(batch(record(1), totals={"requests": 1}, replica_time={(USE, 0): 1.0}))
        assert file.totals() == {"requests": 42}
        assert file.query("PRAGMA user_version") == [(len(_MIGRATIONS),)]
        assert file.since() == pytest.approx(time.time(), abs=60)


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with history_file(path) as file:
        file.write(batch(record(1)))
    steps = (*_MIGRATIONS, "CREATE TABLE more (x); CREATE TABLE turns (y)")
    monkeypatch.setattr("agent_infra_core.insight.history._MIGRATIONS", steps)
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        HistoryFile(path)
    monkeypatch.undo()
    with history_file(path) as file:
        assert file.count_turns() == 1
        assert not file.query("SELECT name FROM sqlite_master WHERE name = 'more'")


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["PRAGMA user_version = 99"], "newer version"),
        (["PRAGMA application_id = 7"], "not a history of ours"),
    ],
)
def test_a_file_that_is_not_ours_to_touch_is_left_as_it_is(path: Path, statements: list[str], reason: str) -> None:
    with history_file(path) as file:
        file.write(batch(record(1)))
    other = sqlite3.connect(path)
    for statement in statements:
        other.execute(statement)
    other.close()
    before = path.read_bytes()
    with pytest.raises(HistoryRefusedError, match=reason):
        HistoryFile(path)
    with Writer(path) as writer:
        writer.add(record(2))
        writer.wait_state("failing")
    assert reason in writer.said[0]
    assert "another path" in writer.said[0]
    assert path.read_bytes() == before


def test_somebody_elses_database_is_refused(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE notes (text)")
    other.close()
    with pytest.raises(HistoryRefusedError, match="not a history of ours"):
        HistoryFile(path)


MOUNTS = r"""
21 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 21 0:40 / /home rw - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/scratch\040disk rw - tmpfs tmpfs rw
32 21 0:50 / /lustre rw master:3 - lustre mds:/fs rw
33 21 0:51 / /remote rw - fuse.sshfs me@there: rw
34 21 0:52 / /twice rw - nfs server:/a rw
35 34 0:53 / /twice rw - xfs /dev/sdb rw
""".strip()


@pytest.mark.parametrize(
    ("place", "local"),
    [
        ("/var/lib/history.db", True),
        ("/home/me/history.db", False),
        ("/home/me/scratch disk/history.db", True),
        ("/lustre/history.db", False),
        ("/remote/deep/er/history.db", False),
        ("/twice/history.db", True),
        ("/homely/history.db", True),
    ],
)
def test_a_network_file_system_is_known_by_its_mount(place: str, local: bool) -> None:
    assert is_local(Path(place), MOUNTS) == local


def test_what_cannot_be_told_is_taken_for_a_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_local(Path("/somewhere"), "")
    with history_file(path) as file:
        assert file.query("PRAGMA journal_mode") == [("wal",)]
        file.write(batch(record(1)))
    monkeypatch.setattr("agent_infra_core.insight.history.is_local", lambda *_: False)
    with history_file(path) as file:  # one that was brought here from a local disk
        assert file.query("PRAGMA journal_mode") == [("truncate",)]
        file.write(batch(record(2)))
        assert file.count_turns() == 2


def test_the_setting_names_a_file_or_turns_it_off(path: Path) -> None:
    assert history_path(None, path) == path
    assert history_path("off", path) is None
    assert history_path("~/h.db", path) == Path.home() / "h.db"


def test_a_session_that_was_over_stays_so_and_one_that_was_taken_up_again_lives(tmp_path: Path) -> None:
    paths, config = DeploymentPaths(tmp_path), DEFAULT_CONFIG
    now = time.time() - 5
    said: list[str] = []
    for number in range(2):
        tracker = Tracker(time.time)
        books = Bookkeeper(config, paths, tracker, lambda message, _: said.append(message), lambda *_: None)
        books.open()
        if number == 0:
            for session in ("over", "resumed", "over in a turn"):
                for at in (now, now + 2) if session == "resumed" else (now,):
                    started = TurnStarted(f"{session}{at}", at, "m", "/v1/x", session)
                    finished_at = now + 3 if session == "over in a turn" else at
                    finish = TurnFinished(started.turn, finished_at, "completed", 200, started=started)
                    tracker.observe(finish)
                books.observe(SessionEnded(session, now + 1))
        else:
            snapshot = tracker.snapshot([], [], "least_load")
            states = {row["id"]: row["state"] for client in snapshot["clients"] for row in client["sessions"]}
            assert states == {"over": "ended", "resumed": "idle", "over in a turn": "ended"}
            assert snapshot["totals"]["requests"] == 4
        books.close()
    assert said == []


def test_runs_go_on_under_the_next_controller(tmp_path: Path) -> None:
    now = time.time() - 60
    found = []
    for number in range(2):
        tracker = Tracker(time.time)
        paths = DeploymentPaths(tmp_path)
        books = Bookkeeper(DEFAULT_CONFIG, paths, tracker, lambda message, _: pytest.fail(message), lambda *_: None)
        books.open()
        for task in range(4 * number, 4 * number + 4):
            started = TurnStarted(f"t{task}", now + task, "m", "/v1/x", f"s{task}", run="night=9")
            books.observe(TurnFinished(started.turn, now + task + 1, "completed", 200, started=started))
            if task % 2:
                books.observe(SessionEnded(f"s{task}", now + task + 1))
        books.take()
        book = books._analyst._runs
        [run] = book.document(now + 10, lambda _: None, {}, lambda: np.random.default_rng(1), {})
        found.append((run["name"], run["tasks"], run["announced_at"], run["done"], run["running"]))
        books.close()
    assert found == [("night", 9, now, 2, 2), ("night", 9, now, 4, 4)]


def test_the_last_verdict_outlives_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was when turns stopped: the next controller, whose fleet has had no turns for an hour, has no other."""
    loop = closed_loop.ClosedLoop(closed_loop.planted_fleet(4, 1.875, 0.269), 200, closed_loop.Workload(), 1)
    loop.run_turns(2000)
    paths, clock = DeploymentPaths(tmp_path), Clock(closed_loop.START + loop.now)
    with history_file(paths.history) as file:
        file.write(batch(*loop.records))
    loop.records.clear()
    monkeypatch.setattr(time, "time", clock)
    entries, last_sample = [], loop.samples[-1]
    for _ in range(2):
        tracker = Tracker(time.time)
        books = Bookkeeper(DEFAULT_CONFIG, paths, tracker, lambda message, _: pytest.fail(message), lambda *_: None)
        books.open()
        books._analyst.stop()  # it is done here, at once
        closed_loop.show(books._analyst._analysis, loop)
        books._analyst._compute()
        entries += books.analysis
        books.analyse([], is_watched=False)
        books.close()
        clock.now += 3600.0
        loop.samples.append(dataclasses.replace(last_sample, at=clock.now))
    before, after = entries
    assert (before["verdict"]["name"], after["verdict"]["name"]) == ("GPU-BOUND", "NO DATA")
    assert before["last_verdict"]["sentence"] == before["verdict"]["sentence"]
    assert after["last_verdict"] == before["last_verdict"]


def test_a_run_that_lacks_its_first_turns_is_not_continued(path: Path) -> None:
    with history_file(path) as file:
        runs = {name: Announcement(name, 5, at) for name, at in (("early", 0.0), ("late", 1e12))}
        file.write(batch(*(record(number) for number in range(10)), runs=runs))
        assert [run.name for run in file.runs(100)] == ["early", "late"]
        assert [run.name for run in file.runs(5)] == ["late"]


# --- The writer -------------------------------------------------------------------------------------------------------


def test_it_writes_by_itself_and_its_end_writes_the_rest(path: Path) -> None:
    with Writer(path) as writer:
        writer.add(record(1), totals={"requests": 1})
        writer.wait_state("on", turns=1)
        writer.add(record(2), record(3), totals={"requests": 2})
    assert not writer.said
    with history_file(path) as file:
        assert (file.count_turns(), file.totals()) == (3, {"requests": 3})


def test_what_was_written_is_given_to_the_next_one(path: Path) -> None:
    with Writer(path) as writer:
        writer.add(record(1), record(2))
    found: list[TurnRecord] = []
    following = History(path, writer.log, lambda: NOW)
    following.open(lambda file: found.extend(file.latest_turns(10, 0.0)))
    assert found == [record(1), record(2)]
    assert following.document() == {"path": str(path), "state": "on", "reason": None, "turns": 2}
    following.close()


def test_a_locked_file_holds_nobody_up_and_is_written_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BUSY_S", 0.05)
    with Writer(path) as writer:
        writer.add(record(1))
        writer.wait_state("on", turns=1)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        writer.add(record(2), totals={"requests": 1})
        writer.wait_state("failing")
        assert "locked" in writer.history.document()["reason"]
        writer.add(record(3), totals={"requests": 1})
        holder.execute("ROLLBACK")
        holder.close()
        writer.wait_state("on", turns=3)
    assert [line.partition(": ")[0] for line in writer.said] == ["warning", "info"]
    with history_file(path) as file:
        assert file.totals() == {"requests": 2}


def test_while_it_cannot_be_opened_at_all_nothing_is_lost(tmp_path: Path) -> None:
    blocked = tmp_path / "folder"
    blocked.write_text("a file where a folder should be")
    with Writer(blocked / "history.db") as writer:
        writer.add(record(1))
        writer.wait_state("failing")
        blocked.unlink()
        writer.wait_state("on", turns=1)
    assert writer.said[0].startswith("warning: history: starting without earlier data: ")


def test_a_backlog_is_bounded_and_what_is_lost_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BUSY_S", 0.05)
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BACKLOG_BYTES", 50 * 1007)
    with Writer(path) as writer:
        writer.add(record(0))
        writer.wait_state("on", turns=1)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        for number in range(1, 81):
            writer.add(record(number), totals={"requests": 1})
        writer.wait_state("failing")
        holder.execute("ROLLBACK")
        holder.close()
        writer.wait_state("on", turns=51)
    assert writer.said[-1] == f"info: the history {path} is being written again; 30 turns were lost"
    with history_file(path) as file:
        assert [turn.turn for turn in file.turns()][1:] == [record(number).turn for number in range(31, 81)]
        assert file.totals() == {"requests": 80}  # totals stay true


def test_what_waits_beside_turns_is_bounded_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BUSY_S", 0.05)
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BACKLOG_ROWS", 50)
    with Writer(path) as writer:
        writer.add(*map(record, range(80)))
        writer.wait_state("on", turns=80)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        for number in range(80):
            late = {"posts": {record(number).turn: 5.0}, "ended": {f"s-{number}": NOW}}
            writer.add(**late, replica_time={(USE, 300 * number): 1.0})
        writer.wait_state("failing")
        holder.execute("ROLLBACK")
        holder.close()
        writer.wait_state("on")
    lost = "30 action times, 30 ends of sessions, 30 spans of replica time"
    assert writer.said[-1] == f"info: the history {path} is being written again; {lost} were lost"
    with history_file(path) as file:
        assert [turn.turn for turn in file.turns() if turn.post_ms] == [record(number).turn for number in range(30, 80)]
        assert list(file.ended_sessions()) == [f"s-{number}" for number in range(30, 80)]


@pytest.mark.parametrize(
    "unwritable", [{"prompt_tokens": 2**63}, {"prompt": "half a pair: \ud83d"}, {"retries": None}], ids=str
)
def test_a_turn_that_cannot_be_kept_keeps_no_other_out(path: Path, unwritable: dict[str, Any]) -> None:
    with Writer(path) as writer:
        turns = [record(1), record(2, **unwritable), record(3)]
        posts = {"t-1": 250.0, "t-\ud83d": 250.0, "t-3": 350.0}
        writer.add(*turns, posts=posts, totals={"requests": 3, "tokens": 2**63, "errors": 1})
        writer.wait_state("on", turns=2)
        writer.add(record(4))
        writer.wait_state("on", turns=3)
    [said] = writer.said
    assert said.startswith("warning: history: 3 rows cannot be stored and are left out: ")
    with history_file(path) as file:
        assert [(turn.turn, turn.post_ms) for turn in file.turns()] == [("t-1", 250.0), ("t-3", 350.0), ("t-4", None)]
        assert file.totals() == {"requests": 3, "errors": 1}  # each once


@pytest.mark.parametrize("damage", ["no database at all", "a torn page"])
def test_a_damaged_file_is_put_aside_and_a_new_one_begun(path: Path, damage: str) -> None:
    with history_file(path) as file:
        file.write(batch(*(record(number, answer="x" * 3000) for number in range(50))))
    content = bytearray(path.read_bytes())
    if damage == "a torn page":
        content[4096:] = b"\xff" * (len(content) - 4096)
    else:
        content[:100] = b"!" * 100
    path.write_bytes(content)
    with Writer(path) as writer:
        writer.add(record(100))
        writer.wait_state("on", turns=1)
    aside = [each for each in path.parent.iterdir() if "damaged" in each.name]
    assert [each.read_bytes() for each in aside] == [bytes(content)]
    assert str(aside[0]) in writer.said[0]
    with history_file(path) as file:
        assert [turn.turn for turn in file.turns()] == [record(100).turn]


@pytest.mark.parametrize("removed", ["history.db*", "history.db", None], ids=["all of it", "no journal", "its folder"])
def test_a_file_that_is_removed_is_begun_anew(tmp_path: Path, removed: str | None) -> None:
    path = tmp_path / "folder" / "history.db"
    with Writer(path) as writer:
        writer.add(record(1), totals={"requests": 1})
        writer.wait_state("on", turns=1)
        for each in path.parent.glob(removed or "*"):
            each.unlink()
        if removed is None:
            path.parent.rmdir()
        writer.add(record(2), record(3), totals={"requests": 2})
        writer.wait_state("on", turns=2)
    assert writer.said == [
        f"warning: history: {path}: it was removed or replaced; it is reopened",
        f"info: the history {path} is being written again",
    ]
    assert [each.name for each in path.parent.iterdir()] == ["history.db"]
    with history_file(path) as file:
        assert [turn.turn for turn in file.turns()] == ["t-2", "t-3"]
        assert file.totals() == {"requests": 2}


def test_a_file_that_another_takes_the_place_of_is_left_whole_and_the_other_goes_on(path: Path, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved.db", tmp_path / "other.db"
    with history_file(other) as file:
        file.write(batch(*(record(number) for number in range(100, 150))))
    with Writer(path) as writer:
        writer.add(*(record(number) for number in range(50)))
        writer.wait_state("on", turns=50)
        path.rename(moved)  # without its log, in which all of it still is
        other.rename(path)
        writer.add(record(150))
        writer.wait_state("on", turns=51)
    for each, numbers in ((moved, range(50)), (path, range(100, 151))):
        with history_file(each) as file:
            assert [turn.turn for turn in file.turns()] == [record(number).turn for number in numbers]
            assert file.query("PRAGMA integrity_check") == [("ok",)]


def test_the_journals_that_came_with_another_file_are_its_own(path: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    with Writer(path) as writer:
        writer.add(record(1))
        writer.wait_state("on", turns=1)
        with history_file(others / path.name) as file:
            file.write(batch(record(2), record(3)))
            assert (others / f"{path.name}-wal").stat().st_size > 0
            for each in others.iterdir():  # as a copy of a file in use is
                (copy := tmp_path / "copy").write_bytes(each.read_bytes())
                copy.rename(path.with_name(each.name))
        writer.add(record(4))
        writer.wait_state("on", turns=3)
    with history_file(path) as file:
        assert [turn.turn for turn in file.turns()] == ["t-2", "t-3", "t-4"]


def write_with_a_limit(path: Path, limit: int) -> None:
    """The body of a process whose files may not grow beyond ``limit`` bytes until it lifts that."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Writer(path) as writer:
        writer.add(record(0))
        writer.wait_state("on", turns=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for number in range(1, 400):
            writer.add(record(number, answer="x" * 2000), totals={"requests": 1})
        writer.wait_state("failing")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.wait_state("on", turns=400)
    assert writer.said[0].startswith("warning: history: ")


def run_apart(program: str, *, check: bool) -> None:
    """Run ``program``, which may import this file, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=check, timeout=PATIENCE_S)


def test_a_file_that_may_not_grow_is_served_without_and_caught_up_later(path: Path) -> None:
    program = f"import test_history, pathlib; test_history.write_with_a_limit(pathlib.Path({str(path)!r}), 200_000)"
    run_apart(program, check=True)
    with history_file(path) as file:
        assert (file.count_turns(), file.totals()) == (400, {"requests": 399})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("only root may mount a small disk; the test above has a limit of the process instead")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this root may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_served_without_and_caught_up_later(small_disk: Path) -> None:
    path = small_disk / "history.db"
    ballast = small_disk / "ballast"
    with Writer(path) as writer:
        writer.add(record(0))
        writer.wait_state("on", turns=1)
        with contextlib.suppress(OSError):
            ballast.write_bytes(b"x" * (512 << 10))
        writer.add(*(record(number, answer="x" * 2000) for number in range(1, 50)))
        writer.wait_state("failing")
        assert "full" in writer.history.document()["reason"] or "I/O" in writer.history.document()["reason"]
        ballast.unlink()
        writer.wait_state("on", turns=50)


def test_an_end_that_cannot_write_says_what_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BUSY_S", 2.0)
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_CLOSE_S", 6.5)  # two attempts, and 2.5 s of rest
    with history_file(path):
        pass
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with Writer(path) as writer:
        writer.add(record(1), record(2))
    holder.close()
    assert "lacks 2 turns" in writer.said[-1]


def test_an_end_outlasts_another_programs_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_BUSY_S", 0.05)
    monkeypatch.setattr("agent_infra_core.insight.history.HISTORY_CLOSE_S", PATIENCE_S)
    with history_file(path):
        pass
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    with Writer(path) as writer:
        writer.add(record(1), totals={"requests": 1})
        history, tries = writer.history, 0
        fail = history._fail

        def let_go_later(error: Exception, consequence: str = "") -> None:
            nonlocal tries
            tries += history._stop.is_set()
            if tries == 3:
                holder.close()
            fail(error, consequence)

        monkeypatch.setattr(history, "_fail", let_go_later)
    assert tries == 3
    assert writer.said[-1] == f"info: the history {path} is being written again"
    with history_file(path) as file:
        assert (file.count_turns(), file.totals()) == (1, {"requests": 1})


def test_an_end_does_not_try_a_file_again_that_is_not_to_be_touched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with history_file(path) as file:
        file.query("PRAGMA user_version = 99")
    with Writer(path) as writer:
        writer.add(record(1))
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
    assert "lacks 1 turns" in writer.said[-1]
    assert not pauses


def test_what_a_killed_process_wrote_last_is_there(path: Path) -> None:
    program = (
        "import pathlib, os, signal, test_history as t\n"
        f"writer = t.Writer(pathlib.Path({str(path)!r})).__enter__()\n"
        "writer.add(*map(t.record, range(100)), totals={'requests': 100})\n"
        "writer.wait_state('on', turns=100)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run_apart(program, check=False)
    with history_file(path, read_only=True) as file:
        assert (file.count_turns(), file.totals()) == (100, {"requests": 100})


# --- Replica time -----------------------------------------------------------------------------------------------------

GPU = GpuSample("NVIDIA H100", 1.0, 2, 3, 4.0, 5.0)


@pytest.mark.parametrize(
    ("state", "in_flight", "phase"),
    [
        ("pending", None, "pending"),
        ("starting", None, "loading"),
        ("loading", 3, "loading"),
        ("ready", 3, "ready_busy"),
        ("ready", 0, "ready_idle"),
        ("ready", None, "ready_idle"),
        ("draining", 1, "ready_busy"),
        ("failed", None, None),
        ("stopped", 1, None),
    ],
)
def test_a_replica_is_in_one_of_four_states_while_it_holds_anything(
    state: str, in_flight: int | None, phase: str | None
) -> None:
    replica = ReplicaRecord("m-1", "m", state, "vllm", "node", 1, "", gpus=(GPU, GPU), gpu_ids=("0", "1"))
    use = replica_use(replica, in_flight)
    assert (use.state if use else None) == phase
    assert use is None or (use.gpus, use.gpu_type) == (2, "NVIDIA H100")


def test_a_replica_on_the_cpu_holds_no_gpu() -> None:
    use = replica_use(ReplicaRecord("m-1", "m", "ready", "llama_cpp", "node", 1, ""), 1)
    assert use == ReplicaUse("m-1", "m", "", 0, "ready_busy")


def test_a_job_that_waits_or_spans_nodes_counts_the_gpus_that_it_asked_for() -> None:
    waiting = replica_use(ReplicaRecord("m-1", "m", "pending", "vllm", "", 0, ""), None, asked_gpus=8)
    spanning = replica_use(ReplicaRecord("m-1", "m", "ready", "vllm", "node", 1, "", gpus=(GPU,) * 4), 1, asked_gpus=8)
    assert waiting == ReplicaUse("m-1", "m", "", 8, "pending")
    assert spanning == ReplicaUse("m-1", "m", "NVIDIA H100", 8, "ready_busy")


def test_replica_time_goes_on_where_an_earlier_controller_was() -> None:
    clock = Clock(NOW)
    earlier = ReplicaTime(clock, clock)
    idle = USE._replace(state="ready_idle")
    cpu = ReplicaUse("c-1", "c", "", 0, "ready_busy")
    earlier.sample([USE, cpu], {})
    for use in (USE, USE, idle):
        clock.now += 1800
        earlier.sample([use, cpu], {})
    taken = earlier.take()
    assert sum(taken.values()) == 2 * 3 * 1800
    assert not earlier.take()
    sums: dict[ReplicaUse, float] = {}
    for (use, _), seconds in taken.items():
        sums[use] = sums.get(use, 0.0) + seconds
    clock.now += 7200  # nobody was there to see
    later = ReplicaTime(clock, clock)
    later.restore(sums, NOW)
    later.sample([USE], {})
    clock.now += 3600
    later.sample([USE], {})
    document = later.document()
    assert document["since"] == NOW
    assert document["gpu_hours"] == {"pending": 0, "loading": 0, "ready_busy": 2 * 2.0, "ready_idle": 2 * 0.5}
    assert document["replica_hours"] == {"pending": 0, "loading": 0, "ready_busy": 2.0 + 1.5, "ready_idle": 0.5}
    assert [(row["model"], row["gpu_hours"]["ready_busy"]) for row in document["by_model"]] == [("m", 4.0), ("c", 0.0)]
    assert [(row["replica"], row["replica_hours"]["ready_busy"]) for row in document["by_replica"]] == [("m-1", 2.0)]


def test_a_replica_that_started_while_nobody_looked_gets_no_time_before_its_start() -> None:
    clock = Clock(NOW)
    time_held = ReplicaTime(clock, clock)
    time_held.sample([USE], {"m-1": NOW - 100})
    clock.now += 600
    uses = [USE._replace(replica=name) for name in ("m-1", "m-2", "m-3", "m-4")]
    time_held.sample(uses, {"m-1": NOW - 100, "m-2": clock.now - 1, "m-3": 0.0, "m-4": clock.now + 30})
    assert [time_held.seconds()[use] for use in uses] == [600, 1, NEW_REPLICA_S, 0]
    clock.now += 600
    time_held.sample(uses[1:], {})
    assert [time_held.seconds()[use] for use in uses] == [600, 601, NEW_REPLICA_S + 600, 600]


def test_a_verdict_is_kept_with_its_figures(path: Path) -> None:
    entry = json.loads((Path(agent_infra.__file__).parent / "tests/golden/analysis.json").read_text())[0]
    with history_file(path) as file:
        file.write(HistoryBatch(verdicts=[verdict_row(entry, NOW)]))
        rows = file.query(f"SELECT {', '.join(VERDICT_COLUMNS)} FROM verdicts")
    assert rows == [
        (
            *(NOW, "qwen", "NVIDIA H100 80GB HBM3", "GPU-BOUND", 0.97, entry["verdict"]["sentence"]),
            *("KV-BOUND", 260.0, 43790.0, 147.0),
        )
    ]


def test_the_curve_of_the_last_turns_is_kept_and_an_idle_fleets_entry_does_not_replace_it(tmp_path: Path) -> None:
    entry = json.loads((Path(agent_infra.__file__).parent / "tests/golden/analysis.json").read_text())[0]
    busy, last, idle, without = (json.loads(json.dumps(entry)) for _ in range(4))
    busy["last_verdict"]["at"] = 1.0
    last["last_verdict"]["at"] = 2.0
    idle.update(replicas=0, last_verdict=last["last_verdict"])
    without.update(replicas=0, curve=[], last_verdict={**entry["last_verdict"], "at": 3.0})
    paths = DeploymentPaths(tmp_path)
    books = Bookkeeper(DEFAULT_CONFIG, paths, Tracker(time.time), lambda *_: None, lambda *_: None)
    books.open()
    for each in (busy, last, idle, without):
        books._analyst.document = [each]
        books.analyse([], is_watched=False)
    books.close()
    with contextlib.closing(HistoryFile(paths.history, read_only=True)) as file:
        assert file.analyses() == [{**last, "last_verdict": without["last_verdict"]}]
        assert file.analyses(entry["computed_at"] + 1) == []


# --- Export and report ------------------------------------------------------------------------------------------------


def fill(path: Path) -> None:
    """A run of 40 minutes: three sessions of two tasks, a busy and an idle replica, one verdict that changed."""
    with history_file(path) as file:
        for number in range(240):
            fields: dict[str, Any] = {"task": f"task{number % 2}", "inference_ms": 1000.0 + number, "ttft_ms": 50.0}
            fields |= {"completion_tokens": 20, "cached_tokens": 60, "expected_cached_tokens": 75, "backend": "m-1"}
            turn = record(number * 10, **fields)
            if number == 7:
                turn.outcome = "aborted"
            elif number == 8:
                turn.cached_tokens, turn.cache_miss, turn.retries = 10, "moved from m-2 to m-1", 1
            file.write(batch(turn, posts={turn.turn: 250.0}))
        idle, old = USE._replace(state="ready_idle"), USE._replace(state="loading")
        at = int(NOW // 300) * 300
        file.write(batch(replica_time={(USE, at): 1800.0, (idle, at): 540.0, (old, at): 60.0}))
        for minute in range(40):
            verdict = "GPU-BOUND" if minute >= 25 else "AGENT-BOUND"
            row = (NOW + 60 * minute, "m", "H100", verdict, 0.9, f"It is {verdict}.", "", 4.0, 360.0, 6.0)
            file.write(HistoryBatch(verdicts=[row]))


def test_what_is_exported_is_every_turn_a_line(path: Path) -> None:
    fill(path)
    with history_file(path, read_only=True) as file:
        lines, table = io.StringIO(), io.StringIO()
        export_turns(file.turns(), "jsonl", lines)
        export_turns(file.turns(), "csv", table)
        first = next(file.turns())
    rows = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert len(rows) == 240
    assert rows[0] == first.row()
    cells = list(csv.DictReader(io.StringIO(table.getvalue())))
    assert len(cells) == 240
    assert list(cells[0]) == list(rows[0])
    assert cells[0]["stream"] == "true"
    assert cells[0]["cache_miss"] == ""
    assert float(cells[3]["post_ms"]) == 250.0


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-2", "@SUM(A1)", "\t1", "\n=1", "\n1", "  =1", "\xa0=1", "\ufeff=1", "＝1", "＋1", "＠A"]
)
def test_a_spreadsheet_takes_no_answer_for_a_formula(text: str) -> None:
    out = io.StringIO()
    export_turns([record(1, answer=text, queue_ms=0.5)], "csv", out)
    row = next(csv.DictReader(io.StringIO(out.getvalue(), newline="")))
    assert row["answer"] == "'" + text
    assert row["queue_ms"] == "0.5"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_no_prompt_controls_the_terminal_that_an_export_is_shown_in(form: str) -> None:
    out = io.StringIO()
    export_turns([record(1, prompt="\x1b[2J\x9b2J\x7f", answer="a\r\nb\u00e9")], form, out)
    text = out.getvalue()
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    if form == "jsonl":
        assert json.loads(text)["prompt"] == "\x1b[2J\x9b2J\x7f"
    else:
        row = next(csv.DictReader(io.StringIO(text, newline="")))
        assert (row["prompt"], row["answer"]) == ("\\x1b[2J\\x9b2J\\x7f", "a\r\nb\u00e9")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", NOW - 90),
        ("1.5h", NOW - 5400),
        ("2w", NOW - 14 * 86400),
        ("2027-01-15T08:00:00+00:00", 1_800_000_000.0),
        ("2027-01-15T08:00:00Z", 1_800_000_000.0),
        ("2027-01-15", time.mktime((2027, 1, 15, 0, 0, 0, 0, 0, -1))),
    ],
)
def test_a_time_is_an_age_or_a_date(text: str, seconds: float) -> None:
    assert moment(text, NOW) == seconds


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_export_finds_the_deployments_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(deployment_paths("default", os.environ).history)
    assert len(run(capsys, "export").splitlines()) == 241
    rows = run(capsys, "export", "--format", "jsonl", "--session", "s1").splitlines()
    assert len(rows) == 80
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW + 2300))
    out = tmp_path / "out.csv"
    assert run(capsys, "export", "--since", since, "--output", str(out)) == ""
    assert len(out.read_text().splitlines()) == 11
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_standard_output_gets_what_a_file_would_whatever_the_terminal_can_show(path: Path, tmp_path: Path) -> None:
    with Writer(path) as writer:
        writer.add(record(1, answer="日本語 ×"))
    command = [sys.executable, agent_infra.__file__, "export", "--format", "jsonl", "--history", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    said = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=PATIENCE_S).stdout
    subprocess.run([*command, "--output", str(tmp_path / "out")], env=environment, check=True, timeout=PATIENCE_S)
    assert said == (tmp_path / "out").read_bytes()
    assert "日本語 ×" in said.decode()


def test_where_nothing_is_kept_yet_export_and_report_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "export") == ",".join(TURN_COLUMNS) + "\r\n"
    assert run(capsys, "report") == "# Deployment default\n\nNo turns yet.\n"
    with history_file(deployment_paths("default", os.environ).history):
        pass
    assert run(capsys, "report") == "# Deployment default\n\nNo turns yet.\n"
    assert "No turns since" in run(capsys, "report", "--since", "2h")


@pytest.mark.parametrize(
    ("words", "config", "refusal"),
    [
        (["--history", "/nowhere/h.db"], "", "there is no such file"),
        ([], "proxy: {history: 'off'}", "turns are not kept; name an older file with --history"),
        (["--since", "yesterday"], "", "write 30m, 2h, 3d (ago), or 2026-11-22"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_fix(
    words: list[str], config: str, refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(f"models: [{{name: m, model_path: p}}]\n{config}\n")
    try:
        code: Any = main(["export", "--config", str(written), *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert refusal in capsys.readouterr().err


def test_a_damaged_history_is_told_by_its_readers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"!" * 5000)
    assert main(["report", "--history", str(path)]) == 2
    assert "file is not a database; the controller renames it" in capsys.readouterr().err
    assert path.read_bytes() == b"!" * 5000


def test_an_older_history_is_brought_up_to_date_to_be_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_first_version(path)
    assert "No turns yet." in run(capsys, "report", "--history", str(path))


def test_export_reads_while_a_controller_writes(path: Path) -> None:
    with Writer(path) as writer:
        writer.add(*map(record, range(5000)))
        writer.wait_state("on", turns=5000)
        with history_file(path, read_only=True) as file:
            turns = file.turns()
            seen = [next(turns) for _ in range(1500)]
            writer.add(record(5000))
            writer.wait_state("on", turns=5001)
            seen += turns
    assert len(seen) == 5001


def test_a_reader_that_leaves_is_no_error(path: Path) -> None:
    with history_file(path) as file:
        file.write(batch(*(record(number, answer="x" * 200) for number in range(3000))))
    command = [sys.executable, agent_infra.__file__, "export", "--history", str(path)]
    export = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert export.stdout is not None
    assert export.stderr is not None
    with export.stdout, export.stderr:
        assert export.stdout.readline().startswith("turn,")
        export.stdout.close()
        assert export.stderr.read() == ""
    assert export.wait(20) == 0


def test_a_report_sums_a_run_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(path)
    text = run(capsys, "report", "--history", str(path))
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    assert rows["turns"] == ["240"]
    assert rows["… aborted"] == ["1"]
    assert (rows["sessions"], rows["tasks"]) == (["3"], ["2"])
    assert rows["completed turns per hour"] == ["360"]  # 239 in 2390 s
    assert rows["… found in the cache"] == ["59.8%"]
    assert rows["inference: the whole answer"] == ["240", "1.12", "1.12", "1.22", "1.23", "1.24"]
    assert rows["post: acting"] == ["240", *["0.25"] * 5]
    assert rows["m: GPUs (H100)"] == ["0", "0.0333", "1", "0.3"]
    assert rows["m: replicas"] == ["0", "0.0167", "0.5", "0.15"]
    assert rows["GPU-seconds per task"] == ["2,400"]
    assert rows["GPU-seconds per completed turn"] == ["20.1"]
    assert rows["retried: sent to more than one replica"] == ["1", "100", "0.4%"]
    assert rows["aborted, cut or failed"] == ["1", "120", "0.5%"]
    assert rows["prefilled again: expected in the cache but missing"] == ["1", "65", "0.3%"]
    assert rows["moved"] == ["1"]
    # Of 4,800 GPU-s 3,600 were busy, 1.007 of 268.7 s of them for a turn that was aborted.
    assert rows["m: GPU-s"] == ["4,800", "0", "13.5", "1,080", "1,093", "2,400", "547"]
    verdicts = [line.partition(" ")[2] for line in text.splitlines() if "BOUND" in line]
    assert [verdict.split("**")[1] for verdict in verdicts] == ["AGENT-BOUND", "GPU-BOUND"]
    assert "m (H100)" in verdicts[0]
    assert "90 % sure. It is AGENT-BOUND." in verdicts[0]


@pytest.mark.parametrize("since", [0.0, NOW + 75 * 60])
def test_a_report_of_what_was_kept_counts_no_replica_time_of_what_was_not(path: Path, since: float) -> None:
    """Two hours of a turn a minute, of which the second hour's were kept, or a quarter of them are asked for."""
    with history_file(path) as file:
        file.write(batch(*(record(minute * 60, answer="x" * 5000) for minute in range(120))))
        file.write(batch(replica_time={(USE, int(NOW) + 60 * minute): 60.0 for minute in range(120)}))
        assert file.trim(1, 60) == 60
        text = Report(file, "a run", since).text()
    kept = [turn for turn in range(60, 120) if NOW + 60 * turn >= since]
    assert ("turns before that were removed" in text) == (since == 0)
    [cost] = re.findall(r"GPU-seconds per completed turn \| (\d+)", text)
    assert int(cost) == pytest.approx(2 * 60, rel=5 / len(kept))  # a step of replica time more, at most
    [hours] = re.findall(r"m: replicas \| 0 \| 0 \| ([\d.]+)", text)
    assert float(hours) == pytest.approx(len(kept) / 60, abs=0.1)


def test_a_report_goes_over_any_span(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with history_file(path) as file:
        for span in (0, 3, 100, 10_000, 400_000, 40_000_000):
            file.write(batch(TurnRecord(f"t{span}", NOW + span, "completed", 200)))
            text = run(capsys, "report", "--history", str(path))
            throughput = text.partition("## Throughput")[2].partition("##")[0].splitlines()
            assert 1 <= len([line for line in throughput if line.startswith("| 20")]) <= 100
            assert "nan" not in text
            assert "None" not in text

"""Summaries of the turns in the history, by session and by time, so that no query reads millions of turns.

The history's file adds each turn once: its position is kept in the same transaction. Functions take its connection.
"""

from __future__ import annotations

import collections
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.protocol import bucket_of

STEP_S = 60  # of the summaries by time …
COARSE_STEP_S = 3600  # … and of those older than FINE_S
FINE_S = 8 * 86400
GAUGE_STEP_S = 5  # of the gauges …
COARSE_GAUGE_STEP_S = 300  # … and of those older than FINE_GAUGES_S
FINE_GAUGES_S = 2 * 86400
CHUNK_TURNS = 5_000  # added at once
MAX_REASONS = 10  # finish reasons of one step; the rest is "other"

# What a step's figures are made of: name → expression over a row of the table turns.
COUNTS: Mapping[str, str] = {
    "turns": "1",
    "completed": "outcome = 'completed'",
    "errors": "outcome IN ('error', 'cut')",
    "rejected": "outcome = 'rejected'",
    "aborted": "outcome = 'aborted'",
    "tokens_in": "coalesce(prompt_tokens, 0)",
    "tokens_out": "coalesce(completion_tokens, 0)",
    "cacheable_tokens": "CASE WHEN cached_tokens IS NULL THEN 0 ELSE coalesce(prompt_tokens, 0) END",
    "cached_tokens": "coalesce(cached_tokens, 0)",
}
_ANSWERED_STREAM = "stream AND outcome IN ('completed', 'cut', 'aborted')"
DURATIONS: Mapping[str, str] = {  # ms
    "ttft": f"CASE WHEN {_ANSWERED_STREAM} THEN ttft_ms END",
    "itl": f"CASE WHEN {_ANSWERED_STREAM} AND completion_tokens > 1 "
    "THEN (inference_ms - ttft_ms) / (completion_tokens - 1) END",
    "latency": "CASE WHEN outcome = 'completed' THEN queue_ms + inference_ms END",
    "queued": "queue_ms",
}
GAUGES = ("in_flight", "queue", "kv_usage", "gpu_utilization")  # columns of the table gauges
REASON = "CASE WHEN outcome = 'completed' THEN coalesce(finish_reason, 'none') END"

# Tables and indices that this file and insight/series.py work with; a migration of the history creates them.
SCHEMA = f"""
    ALTER TABLE turns ADD COLUMN held_ms REAL;
    ALTER TABLE turns ADD COLUMN retry_ms REAL;
    CREATE INDEX turns_by_end ON turns (finished_at);
    CREATE INDEX turns_by_session ON turns (session);
    CREATE TABLE sessions (id TEXT PRIMARY KEY, model TEXT, client TEXT, task TEXT, replica TEXT, started_at REAL,
        last_at REAL, turns INTEGER, completed INTEGER, errors INTEGER, aborted INTEGER, rejected INTEGER,
        tokens_in INTEGER, tokens_out INTEGER, cached_tokens INTEGER, queue_ms REAL, inference_ms REAL, think_ms REAL);
    CREATE TABLE steps (width INTEGER, at INTEGER, model TEXT, {" INTEGER, ".join(COUNTS)} INTEGER,
        reasons TEXT, {" BLOB, ".join(DURATIONS)} BLOB, PRIMARY KEY (at, model, width)) WITHOUT ROWID;
    CREATE TABLE gauges (at REAL, model TEXT, seconds REAL, in_flight REAL, queue REAL, kv_usage REAL,
        gpu_utilization REAL, preemptions INTEGER, PRIMARY KEY (at, model)) WITHOUT ROWID;
    CREATE TABLE runs (name TEXT PRIMARY KEY, tasks INTEGER NOT NULL, at REAL NOT NULL, ended REAL) WITHOUT ROWID
"""

_SUMS = ("turns", "completed", "errors", "aborted", "rejected")
_KNOWN_SUMS = ("tokens_in", "tokens_out", "cached_tokens", "queue_ms", "inference_ms", "think_ms")
_ADD_SESSIONS = f"""
    WITH groups AS (SELECT session, min(id) AS first, max(id) AS last, count(*) AS turns,
            {", ".join(f"sum({COUNTS[name]}) AS {name}" for name in _SUMS[1:])}, sum(prompt_tokens) AS tokens_in,
            sum(completion_tokens) AS tokens_out, {", ".join(f"sum({name}) AS {name}" for name in _KNOWN_SUMS[2:])}
        FROM turns NOT INDEXED WHERE id > ? AND id <= ? AND session IS NOT NULL GROUP BY session)
    INSERT INTO sessions (id, model, client, task, replica, started_at, last_at, {", ".join((*_SUMS, *_KNOWN_SUMS))})
    SELECT groups.session, b.model, coalesce(b.client, a.client), coalesce(b.task, a.task),
        coalesce(b.backend, a.backend), coalesce(a.started_at, a.finished_at), b.finished_at,
        {", ".join(f"groups.{name}" for name in (*_SUMS, *_KNOWN_SUMS))}
    FROM groups JOIN turns a ON a.id = groups.first JOIN turns b ON b.id = groups.last WHERE true
    ON CONFLICT (id) DO UPDATE SET last_at = max(last_at, excluded.last_at),
        started_at = min(started_at, excluded.started_at),
        {", ".join(f"{name} = coalesce(excluded.{name}, {name})" for name in ("model", "client", "task", "replica"))},
        {", ".join(f"{name} = {name} + excluded.{name}" for name in _SUMS)},
        {", ".join(f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in _KNOWN_SUMS)}
"""
_STEP_COLUMNS = (*COUNTS, "reasons", *DURATIONS)
_READ_STEP = f"SELECT {', '.join(_STEP_COLUMNS)} FROM steps WHERE width = ? AND at = ? AND model = ?"
_PUT_STEP = f"INSERT OR REPLACE INTO steps VALUES ({', '.join('?' * (3 + len(_STEP_COLUMNS)))})"


def encode_buckets(counts: Mapping[int, int]) -> bytes | None:
    """Buckets of a histogram of durations as pairs of 32-bit integers, bucket and count; None without any."""
    pairs = [number for item in counts.items() for number in item]
    return struct.pack(f"<{len(pairs)}i", *pairs) if pairs else None


class _Step:
    """The figures of one step of one model."""

    def __init__(self) -> None:
        self._counts = [0] * len(COUNTS)
        self._reasons: collections.Counter[str] = collections.Counter()
        self._durations: list[collections.Counter[int]] = [collections.Counter() for _ in DURATIONS]

    def add_turns(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add turns: rows of the finish reason and the values of COUNTS and DURATIONS."""
        reasons, *columns = zip(*rows, strict=True)  # by column, so that the work is done in C
        self._counts = [ours + sum(its) for ours, its in zip(self._counts, columns, strict=False)]
        self._reasons.update(reason[:40] for reason in reasons if reason is not None)
        for buckets, durations_ms in zip(self._durations, columns[len(COUNTS) :], strict=True):
            buckets.update(map(bucket_of, [ms for ms in durations_ms if ms is not None]))

    def merge(self, row: Sequence[Any]) -> None:
        """Add a row of the table steps, from _STEP_COLUMNS."""
        self._counts = [ours + its for ours, its in zip(self._counts, row[: len(COUNTS)], strict=True)]
        self._reasons.update(json.loads(row[len(COUNTS)]))
        for buckets, blob in zip(self._durations, row[len(COUNTS) + 1 :], strict=True):
            numbers = struct.unpack(f"<{len(blob) // 4}i", blob) if blob else ()
            for bucket, count in zip(numbers[::2], numbers[1::2], strict=True):
                buckets[bucket] += count

    def row(self) -> list[Any]:
        """The values of _STEP_COLUMNS."""
        reasons = dict(self._reasons.most_common(MAX_REASONS))
        if rest := self._reasons.total() - sum(reasons.values()):
            reasons["other"] = reasons.get("other", 0) + rest
        return [*self._counts, json.dumps(reasons), *map(encode_buckets, self._durations)]


def is_behind(connection: Any) -> bool:
    """Whether turns wait to be summarised."""
    [[newest]] = connection.execute("SELECT coalesce(max(id), 0) FROM turns").fetchall()
    return bool(newest > _position(connection))


def _position(connection: Any) -> int:
    """Id of the last turn that was summarised."""
    row = connection.execute("SELECT value FROM about WHERE name = 'summarised'").fetchone()
    return int(row[0]) if row else 0


def summarise(connection: Any) -> None:
    """Add the next CHUNK_TURNS turns to the summaries. Call it inside a transaction."""
    after = _position(connection)
    query = (
        f"SELECT id, CAST(finished_at / {STEP_S} AS INTEGER) * {STEP_S}, coalesce(model, ''), {REASON}, "
        f"{', '.join([*COUNTS.values(), *DURATIONS.values()])} FROM turns WHERE id > ? ORDER BY id LIMIT {CHUNK_TURNS}"
    )
    rows = connection.execute(query, (after,)).fetchall()
    if not rows:
        return
    by_step: dict[tuple[int, int, str], list[Any]] = {}
    for row in rows:
        by_step.setdefault((STEP_S, row[1], row[2]), []).append(row[3:])
    steps = {key: _Step() for key in by_step}
    for key, step in steps.items():
        step.add_turns(by_step[key])
    _add_steps(connection, steps)
    connection.execute(_ADD_SESSIONS, (after, rows[-1][0]))
    connection.execute("INSERT OR REPLACE INTO about VALUES ('summarised', ?)", (rows[-1][0],))


def _add_steps(connection: Any, steps: Mapping[tuple[int, int, str], _Step]) -> None:
    for key, step in steps.items():
        for row in connection.execute(_READ_STEP, key).fetchall():
            step.merge(row)
        connection.execute(_PUT_STEP, (*key, *step.row()))


def tidy(connection: Any, now: float) -> None:
    """Merge old steps and gauges into coarser ones, and forget sessions without turns. Call it inside a transaction."""
    before = int((now - FINE_S) // COARSE_STEP_S) * COARSE_STEP_S
    old = "FROM steps WHERE width = ? AND at < ?"
    steps: dict[tuple[int, int, str], _Step] = {}
    for at, model, *figures in connection.execute(
        f"SELECT at, model, {', '.join(_STEP_COLUMNS)} {old}", (STEP_S, before)
    ):
        steps.setdefault((COARSE_STEP_S, at - at % COARSE_STEP_S, model), _Step()).merge(figures)
    _add_steps(connection, steps)
    connection.execute(f"DELETE {old}", (STEP_S, before))
    connection.execute(
        "DELETE FROM sessions WHERE last_at < (SELECT min(finished_at) FROM turns) "
        "AND id NOT IN (SELECT session FROM turns WHERE session IS NOT NULL)"
    )
    _merge_gauges(connection, int((now - FINE_GAUGES_S) // COARSE_GAUGE_STEP_S) * COARSE_GAUGE_STEP_S)


def _merge_gauges(connection: Any, before: float) -> None:
    """Merge the gauges before ``before`` into means over COARSE_GAUGE_STEP_S, each at the middle of its time."""
    means = ", ".join(
        f"sum({name} * seconds) / sum(CASE WHEN {name} IS NULL THEN NULL ELSE seconds END)" for name in GAUGES
    )
    slot = f"CAST(at / {COARSE_GAUGE_STEP_S} AS INTEGER)"
    merged = connection.execute(
        f"SELECT max(at), model, sum(seconds), {means}, sum(preemptions) FROM gauges WHERE at < ? "
        f"GROUP BY {slot}, model HAVING count(*) > 1",
        (before,),
    ).fetchall()
    for at, model, *_ in merged:
        first = at // COARSE_GAUGE_STEP_S * COARSE_GAUGE_STEP_S
        connection.execute("DELETE FROM gauges WHERE at >= ? AND at <= ? AND model = ?", (first, at, model))
    put_gauges(connection, merged)


def put_gauges(connection: Any, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows ``(at, model, seconds, *GAUGES, preemptions)``.

    Each covers the ``seconds`` before ``at``. The model ``""`` is all of them together.
    """
    connection.executemany("INSERT OR REPLACE INTO gauges VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

"""Answers from the history: figures over time, sessions, and the turns of one. Everything large is summed in SQL."""

from __future__ import annotations

import collections
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.sessions import Session
from agent_infra_core.insight.summaries import (
    COARSE_GAUGE_STEP_S,
    COARSE_STEP_S,
    COUNTS,
    DURATIONS,
    FINE_S,
    GAUGES,
    REASON,
    STEP_S,
)
from agent_infra_core.insight.turns import TurnRecord, rounded
from agent_infra_core.protocol import HIGHEST_BUCKET, LOWEST_BUCKET, bucket_middle, bucket_of

# The steps of a time axis; longer ones are whole weeks. Those below STEP_S are computed from turns.
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 604800)
MAX_READ_TURNS = 50_000  # read one by one, at most; of more, the summaries are read
WRITTEN_S = 3.0  # turns that finished longer ago than this are in the file …
MEAN_WRITTEN_S = 0.5  # … and on average those that finished longer ago than this
LEAST_COVERED_S = 15.0  # rates are of at least as much time, so that two turns in a moment are no thousand a minute
MAX_TEXT_BYTES = 8 * 2**20  # of prompts and answers in one answer
LIVE_S = 15.0  # a controller that ran so recently still runs: it is the one that asks
LISTED_REASONS = 10
EMPTY_RANGE_S = 3600.0  # shown of a history without anything
MOSTLY = 0.9  # a step of which a controller ran for this share counts as whole: samples aren't on the second


@dataclass(frozen=True)
class SeriesQuery:
    """A question for figures over time, in s since the epoch; ``since`` 0: since the first turn."""

    since: float
    until: float
    points: int = 300
    model: str | None = None


def read_series(file: HistoryFile, query: SeriesQuery, now: float) -> dict[str, Any]:
    """The body of GET /history."""
    since = query.since or _oldest(file, now)
    axis = _Axis.of(file, since, query, now)
    counts, reasons, buckets = axis.read(file, query.model)
    covered, gauges = _read_gauges(file, axis, query.model)
    for number in counts:  # steps with turns count as covered: a file of before the gauges has only those
        covered[number] = axis.seconds(number) if covered[number] is None else covered[number]
    series = {
        "at": axis.starts(),
        **_rates(counts, covered),
        **_percentiles(buckets, covered),
        **gauges,
        **_finish_reasons(reasons, covered),
    }
    runs = file.query(
        "SELECT name, at, ended FROM runs WHERE at < ? AND coalesce(ended, ?) >= ? ORDER BY at LIMIT 100",
        *(query.until, now, axis.first),
    )
    return {
        "from": axis.first,
        "to": axis.until,
        "step_s": axis.step_s,
        "now": now,
        "model": query.model,
        "series": series,
        "runs": [{"name": name, "from": began, "to": ended} for name, began, ended in runs],
    }


def _oldest(file: HistoryFile, now: float) -> float:
    """When the history begins."""
    [[at]] = file.query(
        "SELECT min(at) FROM (SELECT min(at) AS at FROM steps UNION ALL SELECT min(at - seconds) FROM gauges)"
    )
    return now - EMPTY_RANGE_S if at is None else float(at)


@dataclass(frozen=True)
class _Axis:
    """Aligned steps: ``count`` of ``step_s`` from ``first`` on; the last one may end early, at ``until``."""

    first: int
    step_s: int
    count: int
    until: float
    is_summed: bool  # read the summaries
    is_live: bool  # it ends now

    @classmethod
    def of(cls, file: HistoryFile, since: float, query: SeriesQuery, now: float) -> _Axis:
        until, longest = max(since, min(query.until, now)), STEPS_S[-1]
        step = next((step for step in STEPS_S if (until - since) / step + 1 <= query.points), None)
        if step is None:
            step = -int(-(until - since) // (longest * max(1, query.points - 1))) * longest
        if step < STEP_S:
            of_range = "SELECT 1 FROM turns WHERE finished_at >= ? AND finished_at < ? LIMIT 1 OFFSET ?"
            is_many = bool(file.query(of_range, since, until, MAX_READ_TURNS))
            step = STEP_S if is_many else step
        if since < now - FINE_S and STEP_S <= step < COARSE_STEP_S:  # rows that old may have been merged
            merged = "SELECT 1 FROM steps WHERE width = ? AND at > ? AND at < ? LIMIT 1"
            is_merged = bool(file.query(merged, COARSE_STEP_S, since - COARSE_STEP_S, until))
            step = COARSE_STEP_S if is_merged else step
        first, is_summed = int(since // step) * step, step >= STEP_S
        written = now - (MEAN_WRITTEN_S if is_summed else WRITTEN_S)
        end = first + max(1, -int(-(until - first) // step)) * step
        until = min(float(end), max(written, first + 1.0))
        count = -int(-(until - first) // step)
        if count > 1 and until - (first + (count - 1) * step) < step / 2:
            count, until = count - 1, float(first + (count - 1) * step)
        return cls(first, step, count, until, is_summed, until > now - LIVE_S)

    def starts(self) -> list[int]:
        return list(range(self.first, self.first + self.count * self.step_s, self.step_s))

    def seconds(self, number: int) -> float:
        """Length of a step so far."""
        return min(float(self.step_s), self.until - (self.first + number * self.step_s))

    def read(self, file: HistoryFile, model: str | None) -> tuple[dict[int, Any], list[tuple[int, str, int]], Any]:
        """``(step → counts in the order of COUNTS, (step, finish reason, turns), buckets by duration)``."""
        source, at = ("steps", "at") if self.is_summed else ("turns", "finished_at")
        number = f"CAST(({at} - {self.first}) / {self.step_s} AS INTEGER)"
        where = f"FROM {source} WHERE {at} >= ? AND {at} < ?" + (" AND model = ?" if model is not None else "")
        values = [self.first, self.until, *([] if model is None else [model])]
        sums = ", ".join(f"sum({name if self.is_summed else how})" for name, how in COUNTS.items())
        counts = {row[0]: row[1:] for row in file.query(f"SELECT {number}, {sums} {where} GROUP BY 1", *values)}
        if self.is_summed:
            each = where.replace("FROM steps", "FROM steps, json_each(reasons)")
            reasons = file.query(f"SELECT {number}, key, sum(json_each.value) {each} GROUP BY 1, 2", *values)
        else:
            reasons = file.query(f"SELECT {number}, {REASON}, count(*) {where} GROUP BY 1, 2", *values)
        columns = ", ".join(DURATIONS if self.is_summed else DURATIONS.values())
        rows = file.query(f"SELECT {number}, {columns} {where}", *values)
        merge = _merged_blobs if self.is_summed else _sorted_into_buckets
        return counts, reasons, merge(rows, self.count)


_BUCKETS = HIGHEST_BUCKET - LOWEST_BUCKET + 1


def _merged_blobs(rows: Sequence[Sequence[Any]], count: int) -> dict[str, Any]:
    """Histograms of the durations, an array of steps × buckets each, from rows of the summaries."""
    import numpy as np

    merged = {}
    for column, name in enumerate(DURATIONS, start=1):
        told = [(row[0], row[column]) for row in rows if row[column] is not None]
        pairs = np.frombuffer(b"".join(blob for _, blob in told), dtype="<i4").reshape(-1, 2)
        steps = np.repeat([step for step, _ in told], [len(blob) // 8 for _, blob in told]).astype(np.int64)
        merged[name] = np.zeros((count, _BUCKETS), dtype=np.int64)
        np.add.at(merged[name], (steps, pairs[:, 0] - LOWEST_BUCKET), pairs[:, 1])
    return merged


def _sorted_into_buckets(rows: Sequence[Sequence[Any]], count: int) -> dict[str, Any]:
    """The same, from rows of turns."""
    import numpy as np

    merged = {}
    for column, name in enumerate(DURATIONS, start=1):
        merged[name] = np.zeros((count, _BUCKETS), dtype=np.int64)
        told = [(row[0], bucket_of(row[column]) - LOWEST_BUCKET) for row in rows if row[column] is not None]
        if told:
            np.add.at(merged[name], tuple(np.array(told).T), 1)
    return merged


def _percentiles(buckets: Mapping[str, Any], seconds: Sequence[float | None]) -> dict[str, list[float | None]]:
    import numpy as np

    middles = [bucket_middle(bucket) for bucket in range(LOWEST_BUCKET, HIGHEST_BUCKET + 1)]
    found = {}
    for name, percent in (("ttft", 50), ("ttft", 95), ("itl", 50), ("latency", 50), ("latency", 95), ("queued", 95)):
        sums = np.cumsum(buckets[name], axis=1)
        places = (sums >= sums[:, -1:] * percent / 100).argmax(axis=1)
        found[f"{name}_ms_p{percent}"] = [
            rounded(middles[place]) if total and second is not None else None
            for place, total, second in zip(places.tolist(), sums[:, -1].tolist(), seconds, strict=True)
        ]
    return found


_PER_MINUTE = {
    "turns_per_minute": "completed",
    "errors_per_minute": "errors",
    "rejected_per_minute": "rejected",
    "aborted_per_minute": "aborted",
}


def _rates(counts: Mapping[int, Any], seconds: Sequence[float | None]) -> dict[str, list[float | None]]:
    """Rates and the hit rate."""
    none = [0] * len(COUNTS)
    table = [dict(zip(COUNTS, counts.get(number, none), strict=True)) for number in range(len(seconds))]

    def rate(name: str, per_s: float) -> list[float | None]:
        return [
            None if covered is None else round(row[name] * per_s / covered, 3)
            for row, covered in zip(table, seconds, strict=True)
        ]

    return {
        **{series: rate(name, 60.0) for series, name in _PER_MINUTE.items()},
        "tokens_per_second": rate("tokens_out", 1.0),
        "hit_rate": [
            round(row["cached_tokens"] / row["cacheable_tokens"], 4) if row["cacheable_tokens"] else None
            for row in table
        ],
    }


def _read_gauges(file: HistoryFile, axis: _Axis, model: str | None) -> tuple[list[float | None], dict[str, list[Any]]]:
    """By step: for how long a controller ran (s; None: not at all), and means of the GAUGES with ``preemptions``."""
    import numpy as np

    edges = np.minimum(axis.first + axis.step_s * np.arange(axis.count + 1), axis.until)
    query = (
        f"SELECT at, seconds, preemptions, {', '.join(GAUGES)} FROM gauges WHERE at > ? AND at < ? AND model = ? "
        "ORDER BY at"
    )
    ends = (axis.first, axis.until + COARSE_GAUGE_STEP_S)  # a row covers the time before it

    def read(of_model: str) -> Any:
        rows = np.array(file.query(query, *ends, of_model), dtype=float).reshape(-1, 3 + len(GAUGES))
        if axis.is_live and len(rows) and rows[-1, 0] > axis.until - LIVE_S:  # it holds until the next one
            rows[-1, :2] += max(0.0, axis.until - rows[-1, 0])
        return rows

    rows = read(model or "")
    ran = read("") if model else rows
    [[begun, oldest]] = file.query("SELECT (SELECT min(at - seconds) FROM gauges), (SELECT min(at) FROM steps)")
    covered, whole = _integral(ran[:, 0], ran[:, 1], np.ones(len(ran)), edges), np.diff(edges)
    seconds = [
        (all_of_it if some >= MOSTLY * all_of_it else max(some, min(all_of_it, LEAST_COVERED_S))) if some else None
        for some, all_of_it in zip(covered.tolist(), whole.tolist(), strict=True)
    ]
    if begun is not None and oldest is not None and oldest < begun - STEP_S and axis.first <= begun < axis.until:
        at_first = int((begun - axis.first) // axis.step_s)  # an older version, without gauges, ran before them
        seconds[at_first] = whole.tolist()[at_first]
    found: dict[str, list[Any]] = {}
    for name, values in zip(GAUGES, rows[:, 3:].T, strict=True):
        known = ~np.isnan(values)
        at, span, values = rows[known, 0], rows[known, 1], values[known]
        weights = _integral(at, span, np.ones(len(at)), edges).tolist()
        sums = _integral(at, span, values, edges).tolist()
        found[name] = [
            round(total / weight, 4) if weight else None for total, weight in zip(sums, weights, strict=True)
        ]
    counted = np.histogram(rows[:, 0], edges, weights=np.nan_to_num(rows[:, 2]))[0].tolist()
    found["preemptions"] = [
        None if second is None else int(count) for count, second in zip(counted, seconds, strict=True)
    ]
    return seconds, found


def _integral(ends: Any, spans: Any, values: Any, edges: Any) -> Any:
    """Integrals between ``edges`` of a figure that has ``values`` during the ``spans`` (s) before ``ends``, else 0."""
    import numpy as np

    if not len(ends):
        return np.zeros(len(edges) - 1)
    begins = np.maximum(ends - spans, np.concatenate([[-np.inf], ends[:-1]]))
    sums = np.cumsum((ends - begins) * values)
    moments = np.stack([begins, ends], axis=1).ravel()
    reached = np.stack([np.concatenate([[0.0], sums[:-1]]), sums], axis=1).ravel()
    return np.diff(np.interp(edges, moments, reached))


def _finish_reasons(told: Iterable[tuple[int, str | None, int]], seconds: Sequence[float | None]) -> dict[str, Any]:
    """Turns by finish reason and step: the most frequent reasons, and ``other``."""
    totals: collections.Counter[str] = collections.Counter()
    rows = [(number, reason, turns) for number, reason, turns in told if reason is not None]
    for _, reason, turns in rows:
        totals[reason] += turns
    listed = {reason for reason, _ in totals.most_common(LISTED_REASONS)}
    found: dict[str, list[int | None]] = {}
    for number, reason, turns in rows:
        name = f"finish_reasons.{reason if reason in listed else 'other'}"
        if name not in found:
            found[name] = [None if second is None else 0 for second in seconds]
        found[name][number] = (found[name][number] or 0) + turns
    return found


# Fields by which sessions are sorted: name → expression over the rows of _SESSIONS.
SESSION_FIELDS: Mapping[str, str] = {
    **{name: name for name in ("id", "state", "model", "client", "task", "started_at", "last_at")},
    **{name: name for name in ("turns", "errors", "completed", "aborted", "rejected")},
    **{name: name for name in ("tokens_in", "tokens_out", "cached_tokens")},
    "queued_s": "queue_ms / 1000",
    "inference_s": "inference_ms / 1000",
    "think_s": "think_ms / 1000",
    "replica": "replica",
}
SESSION_COLUMNS = (
    *("id", "model", "client", "task", "replica", "started_at", "last_at"),
    *("turns", "completed", "errors", "aborted", "rejected"),
    *("tokens_in", "tokens_out", "cached_tokens", "queue_ms", "inference_ms", "think_ms"),
)
_OUTCOMES = {"completed": "completed", "error": "errors", "aborted": "aborted", "rejected": "rejected"}


@dataclass(frozen=True)
class SessionsQuery:
    """A question for sessions; see GET /sessions in docs/proxy-api.md."""

    query: str = ""
    state: str = "all"
    model: str | None = None
    outcome: str | None = None
    sort: str = "last_at"
    descending: bool = True
    limit: int = 100
    offset: int = 0
    since: float = 0.0  # s since the epoch; only sessions that were active then or later


def find_sessions(file: HistoryFile, live: Sequence[Sequence[Any]], query: SessionsQuery) -> dict[str, Any]:
    """The body of GET /sessions. ``live`` are the sessions that haven't ended: their state, then SESSION_COLUMNS.

    The file's figures are taken where it knows of more turns: a controller remembers only the latest.
    """
    marks = ", ".join("?" * (1 + len(SESSION_COLUMNS)))
    file.query(f"CREATE TEMP TABLE IF NOT EXISTS live (state, {', '.join(SESSION_COLUMNS)}, PRIMARY KEY (id))")
    file.query("DELETE FROM live")
    file.fill(f"INSERT OR REPLACE INTO live VALUES ({marks})", live)
    figures = ", ".join(
        f"CASE WHEN kept.turns > live.turns THEN kept.{name} ELSE live.{name} END AS {name}"
        for name in SESSION_COLUMNS[1:]
    )
    every = (
        f"SELECT live.id, state, {figures} FROM live LEFT JOIN sessions kept ON kept.id = live.id UNION ALL "
        f"SELECT id, 'ended', {', '.join(SESSION_COLUMNS[1:])} FROM sessions WHERE id NOT IN (SELECT id FROM live)"
    )
    where, values = _session_filter(query)
    rows, sort = f"FROM ({every}) WHERE {where}", SESSION_FIELDS[query.sort]
    order = f"{sort} IS NULL, {sort} {'DESC' if query.descending else 'ASC'}, id"
    fields = ", ".join(SESSION_FIELDS.values())
    found = file.query(f"SELECT {fields} {rows} ORDER BY {order} LIMIT ? OFFSET ?", *values, query.limit, query.offset)
    [[total]] = file.query(f"SELECT count(*) {rows}", *values)
    return {"total": total, "sessions": [dict(zip(SESSION_FIELDS, row, strict=True)) for row in found]}


def _session_filter(query: SessionsQuery) -> tuple[str, list[Any]]:
    """An SQL condition and its values."""
    terms: list[str] = ["last_at >= ?"]
    values: list[Any] = [query.since]
    if query.state != "all":
        terms.append("state = 'ended'" if query.state == "ended" else "state != 'ended'")
    if query.model is not None:
        terms.append("model = ?")
        values.append(query.model)
    if query.outcome is not None:
        terms.append(f"{_OUTCOMES[query.outcome]} > 0")
    if query.query:
        names = ("id", "task", "client", "model")
        terms.append(f"({' OR '.join(f'instr(lower_text({name}), ?)' for name in names)})")
        values += [query.query.lower()] * len(names)
    return " AND ".join(terms), values


class SessionTurns:
    """The turns of one session, added oldest first: its figures, and up to ``limit`` turns before number ``before``."""

    def __init__(self, limit: int, before: int | None) -> None:
        self._kept: deque[tuple[TurnRecord, int]] = deque(maxlen=limit)
        self._before = before
        self._known: set[str] = set()
        self.count = 0  # so far
        self.session: Session | None = None

    def add(self, turns: Iterable[TurnRecord]) -> None:
        """Add turns; those that are known already are passed over."""
        for record in turns:
            if record.turn in self._known:
                continue
            self._known.add(record.turn)
            self.count += 1
            if self.session is None:
                name = record.session or ""
                self.session = Session(name, record.task, record.client, record.model or "", record.finished_at)
            self.session.restore(record, record.finished_at)
            if self._before is None or self.count < self._before:
                self._kept.append((record, self.count))

    def latest_first(self) -> list[dict[str, Any]]:
        """The rows; of all texts together, those beyond MAX_TEXT_BYTES are None."""
        rows, left = [], MAX_TEXT_BYTES
        for record, number in reversed(self._kept):
            left -= sum(len(text.encode(errors="replace")) for text in (record.prompt, record.answer) if text)
            row = turn_row(record, number)
            rows.append(row if left >= 0 else {**row, "prompt": None, "answer": None})
        return rows


def turn_row(record: TurnRecord, number: int) -> dict[str, Any]:
    """A turn of GET /stats/sessions/{id}: its row in /stats, and its phases on a time axis, in ms."""
    queued = held = retry = None
    if record.queue_ms is not None:
        held, retry = record.held_ms or 0.0, record.retry_ms or 0.0
        queued = max(0.0, record.queue_ms - held - retry)
    prefill = decode = replayed = None
    if record.stream and record.ttft_ms is not None and record.inference_ms is not None:
        replayed = record.ttft_ms * _replayed_share(record)
        prefill, decode = record.ttft_ms - replayed, max(0.0, record.inference_ms - record.ttft_ms)
    durations = {
        "idle_ms": record.unaccounted_ms,
        "queued_ms": queued,
        "held_ms": held,
        "retry_ms": retry,
        "replayed_prefill_ms": replayed,
        "prefill_ms": prefill,
        "decode_ms": decode,
    }
    return {
        **record.row(),
        "number": number,
        "replica": record.backend,
        "tokens_in": record.prompt_tokens,
        "tokens_out": record.completion_tokens,
        "miss_reason": record.cache_miss,
        **{name: rounded(ms) for name, ms in durations.items()},
    }


def _replayed_share(record: TurnRecord) -> float:
    """Share of a turn's prefill spent on tokens that should have been cached; 0 unless that is a miss."""
    if record.cache_miss is None or not record.prompt_tokens:
        return 0.0
    cached = record.cached_tokens or 0
    return min(1.0, max(0, (record.expected_cached_tokens or 0) - cached) / max(1, record.prompt_tokens - cached))

"""Tracks turns, sessions and replicas, and makes the /stats document. The clock is an argument; no I/O."""

from __future__ import annotations

import collections
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent_infra_core.insight.alerts import Watchdog
from agent_infra_core.insight.rates import (
    RATE_S,
    RECENT_S,
    Pipeline,
    RecentHistogram,
    RecentOutcomes,
    Throughput,
    Timeline,
)
from agent_infra_core.insight.replicas import BackendTable, RelayReport, finite
from agent_infra_core.insight.sessions import (
    LISTED_SESSIONS,
    Session,
    SessionTable,
    split_client,
    split_think_time,
)
from agent_infra_core.insight.turns import (
    KEPT_TURNS,
    OpenTurn,
    TurnLedger,
    TurnLog,
    TurnRecord,
    finished_record,
    rounded,
)
from agent_infra_core.protocol import (
    Backend,
    Conversations,
    SessionEnded,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    is_count,
)

# Memory limits. Memory doesn't grow with the number of turns, nor with the number of sessions above these limits.
MAX_LIVE_SESSIONS = 20_000  # above this, the longest silent session is dropped
SESSION_IDLE_S = 1800.0  # a session silent for this long is over
RECENT_TURNS = 100  # in /stats
SCHEMA_VERSION = 2  # of /stats, described in docs/stats.schema.json


def encode_stats(document: Mapping[str, Any]) -> bytes:
    """Encode the /stats document as compact JSON. Uses C code, since the controller does this every second."""
    try:
        return _encode_json(document)
    except (ValueError, TypeError, OverflowError):  # a lone surrogate, a key that isn't a string, and so on
        return json.dumps(finite(document), separators=(",", ":")).encode()


def _encode_json(value: Any) -> bytes:
    import msgspec

    encoded: bytes = msgspec.json.encode(value)
    return encoded


TOTAL_OF_OUTCOME = {
    "completed": "completed",
    "error": "errors",
    "cut": "errors",
    "aborted": "aborted",
    "rejected": "rejected",
}
_TOTALS = (
    *("requests", "completed", "errors", "aborted", "rejected", "retries"),
    *("tokens_in", "tokens_out", "cached_tokens"),
)
_SUMMED = {  # total → field that it sums
    "retries": operator.attrgetter("retries"),
    "tokens_in": operator.attrgetter("prompt_tokens"),
    "tokens_out": operator.attrgetter("completion_tokens"),
    "cached_tokens": operator.attrgetter("cached_tokens"),
}


def _client_rows(live: Sequence[Session], ended: Sequence[Session], phases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Session rows grouped by client, in the order of the sessions."""
    rows: dict[str | None, dict[str, Any]] = {}
    states = [phases.get(session.id, "idle") for session in live] + ["ended"] * len(ended)
    for session, state in zip((*live, *ended), states, strict=True):
        name, command = split_client(session.client)
        row = rows.setdefault(session.client, {"id": name, "command": command, "sessions": []})
        row["sessions"].append(session_row(session, state))
    return list(rows.values())


# Fields of a session's row in /stats that are as they are in Session.
_SESSION_FIELDS = (
    *("id", "task", "model", "backend", "turns", "errors", "last_seen", "context_tokens", "prompt_tokens"),
    *("cached_tokens", "cache_misses", "last_miss", "moves", "tokens_in", "tokens_out"),
)
_SESSION_DURATIONS = ("pre_ms", "wait_ms", "inference_ms", "post_ms", "unaccounted_ms")


# Those that SESSION_COLUMNS of insight/series.py name.
_SUMMARY_FIELDS = (
    *("id", "model", "client", "task", "backend", "started_at", "last_seen"),
    *("turns", "completed", "errors", "aborted", "rejected"),
    *("tokens_in", "tokens_out", "cached_sum", "wait_ms", "inference_ms", "think_ms"),
)


def session_row(session: Session, state: str) -> dict[str, Any]:
    """``state`` is idle, waiting, prefill, decoding or ended."""
    return {
        **{name: getattr(session, name) for name in _SESSION_FIELDS},
        **{name: rounded(getattr(session, name)) for name in _SESSION_DURATIONS},
        "state": state,
        "idle_since": session.last_end if state in ("idle", "ended") else None,
        "alerts": list(session.alerts),
    }


def _model_rows(backends: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, with its replicas, slots and turns in flight."""
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in backends:
        models.setdefault(row["model"], []).append(row)
    return [
        {
            "name": name,
            "replicas": len(rows),
            "ready": sum(1 for row in rows if row["state"] == "ready" and row["healthy"] is not False),
            "slots": _sum_known(row["slots"] for row in rows),
            "inflight": _sum_known(row["inflight"] for row in rows),
        }
        for name, rows in models.items()
    ]


def _sum_known(values: Iterable[int | None]) -> int | None:
    """The sum of the known values; None if there are none."""
    known = [value for value in values if is_count(value)]
    return sum(known) if known else None


class TurnFigures:
    """Measurements of turns: totals, recent outcomes, pipeline, waits and backends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.totals = dict.fromkeys(_TOTALS, 0)
        self.outcomes = RecentOutcomes(clock)
        self.pipeline = Pipeline(clock)
        self.wait = RecentHistogram(clock, RATE_S)  # queue + inference of completed turns: how long an agent waits
        self.backends = BackendTable(clock)

    def add(self, begun: Sequence[OpenTurn], done: Sequence[TurnFinished]) -> None:
        """Count turns that started and turns that finished."""
        self.pipeline.add(
            pre=[turn.pre_ms for turn in begun],
            post=[turn.started.post_ms for turn in begun],
            unaccounted=[turn.unaccounted_ms for turn in begun],
            queue=[event.queue_ms for event in done],
            ttft=[event.ttft_ms for event in done],
            inference=[event.inference_ms for event in done],
        )
        totals = self.totals
        totals["requests"] += len(done)
        by_backend: dict[str, list[TurnFinished]] = {}
        waits = []
        for event in done:
            outcome = TOTAL_OF_OUTCOME.get(event.outcome, "errors")
            totals[outcome] += 1
            self.outcomes.add(outcome, event.at)
            if event.backend is not None:
                by_backend.setdefault(event.backend, []).append(event)
            if event.outcome == "completed" and event.inference_ms is not None:
                waits.append(event.queue_ms + event.inference_ms)
        for total, read in _SUMMED.items():
            totals[total] += sum(filter(None, map(read, done)))
        self.wait.add(*waits)
        for backend, events in by_backend.items():
            self.backends.figures(backend).finish(events)

    def recent_outcomes(self) -> dict[str, float]:
        """``recent_outcomes`` of /stats."""
        recent = self.outcomes.read()
        return {"window_s": RECENT_S, **{name: recent[name] for name in dict.fromkeys(TOTAL_OF_OUTCOME.values())}}


class Tracker:
    """The controller's state of turns and sessions: takes turn events and gauges, makes the /stats document.

    For one thread at a time. ``clock`` returns seconds since the epoch, like the relay's clock.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_sessions: int = MAX_LIVE_SESSIONS,
        session_idle_s: float = SESSION_IDLE_S,
    ) -> None:
        self._clock = clock
        self._started_at = clock()
        self._sessions = SessionTable(max_sessions, session_idle_s)
        self._turns = TurnLedger()
        self._conversations = Conversations()
        self._log = TurnLog()
        self.timeline = Timeline()
        self._figures = TurnFigures(clock)
        self._throughput = Throughput(self._figures.totals)
        self._watchdog = Watchdog()
        self._relay = RelayReport()

    def observe(self, *events: TurnEvent) -> None:
        """Process relay events, in order. Duplicates, and events after their turn's finish, are ignored.

        One call with many events costs half as much as many calls.
        """
        now = self._clock()
        begun: list[OpenTurn] = []
        done: list[TurnFinished] = []
        try:
            for event in events:
                at = min(event.at, now)
                if isinstance(event, TurnFinished):
                    self._take_finish(event, at, begun, done)
                elif isinstance(event, TurnStarted):
                    self._take_start(event, at, begun)
                elif isinstance(event, SessionEnded):
                    self._sessions.end(event.session)
                elif (turn := self._turns.open.get(event.turn)) is not None:
                    turn.advance(event)
                    if turn.session is not None:
                        self._sessions.touch(turn.session, at)
        finally:
            self._figures.add(begun, done)

    def sample(self, gauges: Mapping[str, Any]) -> None:
        """Process the relay's gauges (FRAME_GAUGES), once a second. Missing and invalid values count as unknown.

        ``{"at", "backends": {id: {"healthy", "reason", "in_flight", "requests", "errors", "load": digest | None}},
        "queue": {"pending", "in_flight", "oldest_ms", "waiting": [...]}, "counters": {...}, "rss_bytes",
        "connections", "waiting": {model: turns in the queue}, "stats_read": number of reads of /stats and /runs}``.
        """
        now = self._clock()
        self._relay.read(gauges)
        is_due = self.timeline.is_due(now)
        self._figures.backends.sample(self._relay.backends, is_due)
        self._turns.forget_lost(now)
        self._sessions.expire(now)
        self._watchdog.look(self._sessions, now, self._relay.kv_capacity())
        self._throughput.read(now)
        if is_due:
            active, wait = self._sessions.count_active(now), self._figures.wait.read()
            self.timeline.note(now, self._throughput.rates(now), self._relay.queue({}), active, wait)

    def relay_restarted(self) -> None:
        """Handle a relay that died and was replaced: its open turns are cut, its counters restart at zero."""
        now = self._clock()
        cut = []
        for name, turn in self._turns.open.items():
            waited_ms = max(0.0, now - turn.started.at) * 1000 if turn.queue_ms is None else turn.queue_ms
            error = "the relay ended during this turn"
            cut.append(TurnFinished(name, now, "cut", 0, turn.backend, waited_ms, turn.ttft_ms, error=error))
        self.observe(*cut)
        self._relay.restart()
        self._figures.backends.relay_restarted()

    @property
    def totals(self) -> Mapping[str, int]:
        """The current ``totals`` of /stats."""
        return self._figures.totals

    def silences(self) -> Iterator[tuple[str, str | None, int, float]]:
        """``(model, replica, turns open, seconds since the last answer)`` of every live session."""
        return self._sessions.silences(self._clock())

    def take_records(self) -> tuple[list[TurnRecord], dict[str, float]]:
        """The turns finished since the last call, and turn → post_ms learned since then for turns returned earlier."""
        return self._log.take()

    def restore(self, records: Iterable[TurnRecord], totals: Mapping[str, Any], ended: Iterable[str] = ()) -> None:
        """Continue where an earlier tracker stopped. Call it before any event.

        ``records`` are its latest turns, oldest first; sessions are rebuilt from them. ``totals`` are its totals by
        name; values that aren't counts are ignored. ``ended`` are sessions that have ended; it is read after
        ``records``.
        """
        self._figures.totals.update({name: totals[name] for name in self._figures.totals if is_count(totals.get(name))})
        answers: dict[str, str] = {}  # session → key of its last answer; it has already continued the earlier ones
        for record in records:
            is_first, _ = self._turns.close(record.turn)
            if not is_first:
                continue
            self._log.keep(record)
            self._figures.outcomes.add(TOTAL_OF_OUTCOME.get(record.outcome, "errors"), record.finished_at)
            at = min(record.finished_at, self._clock())
            session = self._sessions.open(record.session, record, at)
            if session is not None:
                if record.key is not None:
                    answers.pop(session.id, None)
                    answers[session.id] = record.key
                session.restore(record, at)
                self._sessions.touch(session, at)
        for name, key in answers.items():
            self._conversations.answered(key, name)
        self._sessions.settle(self._clock(), ended)

    def replicas(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend]) -> list[dict[str, Any]]:
        """The current ``backends`` of /stats, without the measurements of their turns.

        ``records`` are the replicas' records as `serve` writes them (ReplicaRecord, as JSON). ``table`` is the relay's
        replica table, which may have backends without a record. Measurements of all other backends are dropped.
        """
        return self._figures.backends.replicas(records, table, self._relay.backends)

    def snapshot(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], strategy: str) -> dict[str, Any]:
        """The current /stats document, which docs/stats.schema.json describes. Its times are s since the epoch.

        ``records`` and ``table`` are as for ``replicas``. The controller adds analysis, accounting, runs and history.
        """
        now = self._clock()
        sessions = collections.Counter(session.backend for session in self._sessions)
        rows = self.replicas(records, table)
        for row in rows:
            row |= {**self._figures.backends.measured(row["id"]), "sessions": sessions[row["id"]]}
        listed = self._sessions.latest(LISTED_SESSIONS)
        return {
            "snapshot_age_ms": 0,  # must stay the first key: the relay overwrites the age in the encoded bytes
            "schema_version": SCHEMA_VERSION,
            "now": now,
            "uptime_seconds": round(max(0.0, now - self._started_at), 3),
            "strategy": strategy,
            "totals": dict(self._figures.totals),
            "throughput": {**self._throughput.rates(now), "history": list(self.timeline.points)},
            "models": _model_rows(rows),
            "backends": rows,
            "queue": self._relay.queue(self._turns.open),
            "sessions": self._sessions.counts(now),
            "clients": _client_rows(listed, self._sessions.latest_ended(), self._turns.phases()),
            "recent_outcomes": self._figures.recent_outcomes(),
            "recent_turns": [record.row() for record in self._log.latest(RECENT_TURNS)],
            "pipeline": self._figures.pipeline.document(),
            "watchdog": self._watchdog.rows,
            "analysis": [],
            "accounting": None,
            "runs": [],
            "history": None,
            "relay": self._relay.document(),
        }

    def session(self, name: str) -> tuple[dict[str, Any] | None, list[TurnRecord]]:
        """A session's row in /stats, None if it is unknown, and its turns that are kept, oldest first."""
        session, is_over = self._sessions.find(name)
        state = "ended" if is_over else self._turns.phases().get(name, "idle")
        turns = self._log.latest(KEPT_TURNS, name)
        return session_row(session, state) if session is not None else None, turns[::-1]

    def session_rows(self) -> list[tuple[Any, ...]]:
        """State and SESSION_COLUMNS of each session that is alive or ended lately."""
        phases, read = self._turns.phases(), operator.attrgetter(*_SUMMARY_FIELDS)
        live = [(phases.get(session.id, "idle"), *read(session)) for session in self._sessions]
        return live + [("ended", *read(session)) for session in self._sessions.latest_ended()]

    def waiting(self) -> Mapping[str, int]:
        """Model → turns that wait for a replica."""
        turns = self._turns.open.values()
        return collections.Counter(turn.started.model for turn in turns if turn.phase == "waiting")

    def _take_start(self, event: TurnStarted, at: float, begun: list[OpenTurn]) -> None:
        if self._turns.knows(event.turn):
            return
        turn = self._begin(event, at)
        if turn.session is not None:
            self._sessions.touch(turn.session, at)
        self._turns.add(turn)
        begun.append(turn)

    def _take_finish(self, event: TurnFinished, at: float, begun: list[OpenTurn], done: list[TurnFinished]) -> None:
        turn: OpenTurn | None
        if event.started is not None and not self._turns.knows(event.turn):
            turn = self._begin(event.started, min(event.started.at, at))
            begun.append(turn)
            self._turns.note(event.turn)
        else:
            is_first, turn = self._turns.close(event.turn)
            if not is_first:
                return
        done.append(event)
        record = finished_record(event, turn)
        if turn is not None and turn.session is not None:
            turn.session.finish(record, at, turn.started.prints)
            self._sessions.touch(turn.session, at)
            started, session = turn.started, turn.session.id
            if started.follows is not None:
                self._conversations.finish(event.turn, started.follows, event.key, session)
            if started.prints:
                answered_at = event.at if event.outcome == "completed" else None
                self._conversations.tried(session, started.session, started.prints, event.key, answered_at)
        self._log.add(record)

    def _begin(self, event: TurnStarted, at: float) -> OpenTurn:
        """Open a turn, with the known times before it."""
        known, retried = self._conversations, None
        if event.is_retry and event.prints:
            retried = known.retried(event.session, event.prints, event.follows, event.at)
        name = retried or known.session_of(event.turn, event.session, event.follows)
        session = self._sessions.open(name, event, at)
        if session is None:
            pre_ms, unaccounted_ms = split_think_time(None, event.pre_ms, event.post_ms)
            return OpenTurn(event, None, None, None, pre_ms, unaccounted_ms)
        gap_ms = session.think_time_ms(at) if retried is None else None
        pre_ms, unaccounted_ms = split_think_time(gap_ms, event.pre_ms, event.post_ms)
        session.think(gap_ms, pre_ms, self._log.learn_post(session.last_turn, event.post_ms), unaccounted_ms)
        return OpenTurn(event, session, session.held(event, at), gap_ms, pre_ms, unaccounted_ms)

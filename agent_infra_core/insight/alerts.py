"""The watchdog: finds sessions that are silent, repeating, thrashing or oversized. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent_infra_core.insight.sessions import Session, split_client

WATCH_INTERVAL_S = 5.0  # between checks
LISTED_ALERTS = 50
LEAST_THINKS = 5  # a session with fewer think times is never reported as silent
SILENT_S = 60.0  # shorter silences are never reported
SILENT_FACTOR = 5.0  # times the session's longest think time; a longer silence is reported
REPEATED_TURNS = 4  # identical turns in a row that are reported
RUNAWAY_TOKENS = 8_000  # smaller contexts are never reported as runaway
RUNAWAY_FACTOR = 4.0  # times the median context of the model's sessions; a larger context is reported
LEAST_CONTEXTS = 8  # sessions of a model needed for a median
THRASHING_MOVES = 4  # changes of replica within the last 8 turns that are reported


class Watchdog:
    """Lists sessions that need attention, with the reason. Checks all sessions every WATCH_INTERVAL_S."""

    def __init__(self) -> None:
        self._due = 0.0
        self.rows: list[dict[str, Any]] = []  # the latest LISTED_ALERTS, newest first

    def look(self, sessions: Iterable[Session], now: float, kv_capacity: Mapping[str, float]) -> None:
        """Check the sessions if a check is due. ``kv_capacity`` maps a replica to its cache size in tokens."""
        if self._due - WATCH_INTERVAL_S <= now < self._due:
            return
        self._due = now + WATCH_INTERVAL_S
        contexts: dict[str, list[int]] = {}
        for session in sessions:
            contexts.setdefault(session.held_model or session.model, []).append(session.context_tokens or 0)
        usual = {
            model: sorted(tokens)[len(tokens) // 2]
            for model, tokens in contexts.items()
            if len(tokens) >= LEAST_CONTEXTS
        }
        rows = []
        for session in sessions:
            found = alerts_of(session, now, usual.get(session.held_model), kv_capacity.get(session.held_by or ""))
            if not found and not session.alerts:
                continue
            session.alerts = {kind: session.alerts.get(kind, since) for kind, since, _ in found}
            rows += [self._row(session, kind, sentence) for kind, _, sentence in found]
        self.rows = sorted(rows, key=lambda row: -row["since"])[:LISTED_ALERTS]

    @staticmethod
    def _row(session: Session, kind: str, sentence: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "session": session.id,
            "client": split_client(session.client)[0],
            "model": session.model,
            "since": session.alerts[kind],
            "sentence": sentence,
        }


def alerts_of(
    session: Session, now: float, usual_context: float | None, kv_capacity: float | None
) -> list[tuple[str, float, str]]:
    """Problems of a session, as a list of ``(kind, since, sentence)``.

    ``usual_context`` is the median context of its model's sessions, ``kv_capacity`` the size of its replica's cache,
    both in tokens.
    """
    found = []
    context, silent_s = session.context_tokens or 0, now - (session.last_end or now)
    if not session.open_turns and session.thinks >= LEAST_THINKS:
        longest_s = session.longest_think_ms / 1000
        if silent_s > max(SILENT_S, SILENT_FACTOR * longest_s):
            sentence = (
                f"Silent for {silent_s:.0f} s, and it thought for {longest_s:.0f} s at most before: is its agent dead?"
            )
            found.append(("silent", now - silent_s, sentence))
    if session.repeats >= REPEATED_TURNS:
        sentence = f"Its last {session.repeats} turns were identical: its agent may be in a loop."
        found.append(("repeating", now, sentence))
    if kv_capacity and context > max(RUNAWAY_TOKENS, kv_capacity / 2):
        sentence = (
            f"Its context of {context:,} tokens takes more than half of its replica's cache ({kv_capacity:,.0f})."
        )
        found.append(("runaway_context", now, sentence))
    elif usual_context and context > max(RUNAWAY_TOKENS, RUNAWAY_FACTOR * usual_context):
        times = context / usual_context
        sentence = f"Its context of {context:,} tokens is {times:.0f} times the median of its model's sessions."
        found.append(("runaway_context", now, sentence))
    if (moves := session.recent_moves.bit_count()) >= THRASHING_MOVES:
        sentence = f"It changed its replica in {moves} of its last 8 turns; each time its context is recomputed."
        found.append(("thrashing", now, sentence))
    return found

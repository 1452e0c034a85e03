"""Throughput, and the time turns spend in each stage of the pipeline. Pure."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agent_infra_core.insight.turns import rounded
from agent_infra_core.protocol import Histogram

HISTORY_POINTS = 300
HISTORY_STEP_S = 2.0
RECENT_S = 300.0  # window of recent percentiles, shares and active sessions
RATE_S = 60.0  # window of rates
LEAST_RATE_S = 5.0  # no rates are reported for less time


class RecentHistogram:
    """A histogram of the last ``window_s`` seconds, to within a tenth of that: it drops the oldest of ten slices."""

    _SLICES = 10

    def __init__(self, clock: Callable[[], float], window_s: float = RECENT_S) -> None:
        self._clock = clock
        self._slice_s = window_s / self._SLICES
        self._number = 0  # of the current slice
        self._from = self._until = 0.0  # its start and end
        self._slice = Histogram()
        self._older: list[tuple[int, Histogram]] = []  # (slice number, its durations)

    def slice(self) -> Histogram:
        """The histogram for durations that end now."""
        now = self._clock()
        if not self._from <= now < self._until:
            number = int(now // self._slice_s)
            # Drop slices from the future too: the clock was set back.
            ended = [*self._older, (self._number, self._slice)]
            self._older = [entry for entry in ended if number - self._SLICES < entry[0] < number]
            self._number, self._slice = number, Histogram()
            self._from, self._until = number * self._slice_s, (number + 1) * self._slice_s
        return self._slice

    def add(self, *durations_ms: float) -> None:
        """Count durations that end now."""
        if durations_ms:
            self.slice().add(*durations_ms)

    def read(self) -> Histogram:
        """All durations within the window."""
        merged = Histogram()
        merged.merge(self.slice())
        for _, durations in self._older:
            merged.merge(durations)
        return merged


class RecentOutcomes:
    """Turns by outcome of the last RECENT_S seconds, to within a tenth of that."""

    _SLICES = 10

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slice_s = RECENT_S / self._SLICES
        self._slices: dict[int, collections.Counter[str]] = {}  # slice number → its turns

    def add(self, outcome: str, at: float) -> None:
        """Count a turn that finished at ``at``; one that finished too long ago is ignored."""
        self._forget()
        number = int(min(at, self._clock()) // self._slice_s)
        if number > self._clock() // self._slice_s - self._SLICES:
            self._slices.setdefault(number, collections.Counter())[outcome] += 1

    def _forget(self) -> None:
        """Drop the slices that are over, and those from the future: the clock was set back."""
        now = int(self._clock() // self._slice_s)
        if any(not now - self._SLICES < number <= now for number in self._slices):
            self._slices = {n: turns for n, turns in self._slices.items() if now - self._SLICES < n <= now}

    def read(self) -> collections.Counter[str]:
        """All turns within the window."""
        self._forget()
        return sum(self._slices.values(), collections.Counter())


def percentiles(durations: Histogram, *percents: int) -> dict[str, float | None]:
    """``{"p50": ms, …}``; values are None if nothing was counted."""
    return {f"p{percent}": rounded(durations.percentile(percent / 100)) for percent in percents}


class Pipeline:
    """Where recent turns spent their time. Shares are of the total of all parts in SHARED; inference includes ttft."""

    PARTS = ("pre", "queue", "ttft", "inference", "post", "unaccounted")
    SHARED = ("pre", "queue", "inference", "post", "unaccounted")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._parts = {part: RecentHistogram(clock) for part in self.PARTS}

    def add(self, **durations_ms: Iterable[float | None]) -> None:
        """Add durations by part; None (unknown) is ignored."""
        for part, durations in durations_ms.items():
            self._parts[part].add(*[ms for ms in durations if ms is not None])

    def document(self) -> dict[str, dict[str, float | None]]:
        """``{part: {mean_ms, p50_ms, p95_ms, share}}``; share is 0 to 1, or None for ttft and without traffic."""
        recent = {part: durations.read() for part, durations in self._parts.items()}
        total_ms = sum(recent[part].sum_ms for part in self.SHARED)
        document: dict[str, dict[str, float | None]] = {}
        for part, durations in recent.items():
            shared = part in self.SHARED and total_ms > 0
            document[part] = {
                "mean_ms": rounded(durations.mean_ms),
                "p50_ms": rounded(durations.percentile(0.5)),
                "p95_ms": rounded(durations.percentile(0.95)),
                "share": round(durations.sum_ms / total_ms, 4) if shared else None,
            }
        return document


class Throughput:
    """Rates over the last RATE_S seconds, from about one reading per second of ``totals``, which only grow."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._totals = totals
        self._readings: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=300)

    def read(self, now: float) -> None:
        """Record the current totals."""
        if self._readings and now < self._readings[-1][0]:
            self._readings.clear()  # the clock was set back
        self._readings.append((now, self._totals["completed"], self._totals["tokens_out"]))

    def rates(self, now: float) -> dict[str, float | None]:
        """``{turns_per_minute, tokens_per_second}`` of completed turns and answer tokens; None before LEAST_RATE_S."""
        while self._readings and self._readings[0][0] < now - RATE_S - 0.5:  # readings are about a second apart
            self._readings.popleft()
        at, completed_then, tokens_then = self._readings[0] if self._readings else (now, 0, 0)
        if now - at < LEAST_RATE_S:
            return {"turns_per_minute": None, "tokens_per_second": None}
        return {
            "turns_per_minute": round((self._totals["completed"] - completed_then) * 60 / (now - at), 2),
            "tokens_per_second": round((self._totals["tokens_out"] - tokens_then) / (now - at), 2),
        }


class Timeline:
    """``throughput.history`` of /stats: one point every HISTORY_STEP_S, up to HISTORY_POINTS."""

    NAMES = ("at", "turns_per_minute", "tokens_per_second", "in_flight", "pending", "active_sessions", "latency_ms")

    def __init__(self) -> None:
        self.points: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_POINTS)

    def is_due(self, now: float) -> bool:
        return not self.points or now // HISTORY_STEP_S != self.points[-1]["at"] // HISTORY_STEP_S

    def note(
        self, at: float, rates: Mapping[str, Any], queue: Mapping[str, Any], active_sessions: int, wait: Histogram
    ) -> None:
        """Add a point."""
        self.points.append(
            {
                "at": at,
                **rates,
                "in_flight": queue["in_flight"],
                "pending": queue["pending"],
                "active_sessions": active_sessions,
                "latency_ms": percentiles(wait, 50, 95),
            }
        )

    def after(self, at: float) -> list[dict[str, Any]]:
        """The points later than ``at``."""
        return [point for point in self.points if point["at"] > at]

    def restore(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Continue from earlier points, oldest first. Unknown fields are dropped."""
        self.points.extend({name: point.get(name) for name in self.NAMES} for point in points)

"""Gauges over time: samples of the replicas every second, as means over GAUGE_STEP_S for the history. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from agent_infra_core.insight.replicas import as_mapping
from agent_infra_core.insight.summaries import GAUGE_STEP_S, GAUGES
from agent_infra_core.insight.turns import is_finite_number
from agent_infra_core.protocol import is_count

LONGEST_STEP_S = 3.0 * GAUGE_STEP_S  # a longer time between two rows was a pause, in which nobody looked


class _Means:
    """Samples of one model since the last row."""

    def __init__(self) -> None:
        self._sums: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._counts: collections.Counter[str] = collections.Counter()
        self.preemptions = 0

    def add(self, name: str, value: Any) -> None:
        """Add a sample; unknown ones don't count."""
        if is_finite_number(value):
            self._sums[name] += value
            self._counts[name] += 1

    def mean(self, name: str) -> float | None:
        return self._sums[name] / self._counts[name] if self._counts[name] else None


class GaugeLog:
    """Makes rows of the table ``gauges`` from the rows of Tracker.replicas, one per model and one for all."""

    def __init__(self, now: float) -> None:
        """``now``, like all times here, is in s since the epoch."""
        self._means: dict[str, _Means] = {}
        self._preemptions: dict[str, int] = {}  # replica → its engine's counter
        self._begun = now
        self._rows: list[tuple[Any, ...]] = []

    def sample(self, now: float, replicas: Iterable[Mapping[str, Any]], queues: Mapping[str, int]) -> None:
        """Add a sample; call it once a second. ``queues``: model → turns that wait."""
        if not 0 <= now - self._begun < LONGEST_STEP_S:
            self._begun, self._means = now, {}  # nobody looked, or the clock was set
        in_flight: collections.Counter[str] = collections.Counter()
        preemptions = {}
        for row in replicas:
            engine, gpu, models = as_mapping(row["engine"]), as_mapping(row["gpu"]), ("", row["model"])
            in_flight.update(dict.fromkeys(models, row["inflight"] if is_count(row["inflight"]) else 0))
            grown = 0
            if is_count(count := engine.get("preemptions")):
                since, preemptions[row["id"]] = self._preemptions.get(row["id"], count), count
                grown = count - since if count >= since else count  # a restarted engine counts from zero
            utilization = gpu.get("utilization")
            for model in models:
                means = self._means.setdefault(model, _Means())
                means.add("kv_usage", engine.get("kv_usage"))
                means.add("gpu_utilization", utilization / 100 if is_finite_number(utilization) else None)
                means.preemptions += grown
        self._preemptions = preemptions
        for model, waiting in {**dict.fromkeys(in_flight, 0), **queues, "": sum(queues.values())}.items():
            means = self._means.setdefault(model, _Means())
            means.add("in_flight", in_flight[model])
            means.add("queue", waiting)
        if now // GAUGE_STEP_S != self._begun // GAUGE_STEP_S:
            self._close(now)

    def _close(self, now: float) -> None:
        for model, means in self._means.items():
            figures = (means.mean(name) for name in GAUGES)
            self._rows.append((now, model, now - self._begun, *figures, means.preemptions))
        self._begun, self._means = now, {}

    def take(self) -> list[tuple[Any, ...]]:
        """The rows since the last call, as put_gauges() takes them."""
        rows, self._rows = self._rows, []
        return rows

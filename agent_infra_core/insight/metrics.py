"""The text of GET /metrics, for Prometheus."""

from __future__ import annotations

import collections
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agent_infra_core import __version__
from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.history import ratio
from agent_infra_core.insight.replicas import as_mapping
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import Histogram

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_METRIC_SERIES = 2000  # of turns by model, backend and outcome; above this, the longest unused is dropped

# Upper bounds of the histogram buckets, in octaves of a millisecond: 1 ms to 17 minutes, like those of Histogram.
METRIC_OCTAVES = range(21)
METRIC_PARTS = {
    "pre": "Time an agent observed before a turn.",
    "queue": "Time a turn waited for a slot.",
    "ttft": "Time from sending a turn to a replica to its first token.",
    "inference": "Time from sending a turn to a replica to its last byte.",
    "unaccounted": "Think time that the agent did not report.",
    "post": "Time an agent acted on an answer.",
}
_MODEL_DURATIONS = {part: operator.attrgetter(f"{part}_ms") for part in METRIC_PARTS if part != "post"}

# Sums over turns, by model: name → help text and getter.
_SUMS: Mapping[str, tuple[str, Callable[[TurnRecord], int]]] = {
    "retries": ("Times that a turn was sent to another replica.", lambda turn: turn.retries),
    "prompt_tokens": ("Input tokens.", lambda turn: turn.prompt_tokens or 0),
    "cached_tokens": ("Input tokens found in a prefix cache.", lambda turn: turn.cached_tokens or 0),
    "prefilled_again_tokens": (
        "Input tokens that should have been in a prefix cache but were not, of turns with a miss.",
        lambda turn: (turn.expected_cached_tokens or 0) - (turn.cached_tokens or 0) if turn.cache_miss else 0,
    ),
    "completion_tokens": ("Output tokens.", lambda turn: turn.completion_tokens or 0),
}


class TurnMetrics:
    """Counters and histograms of turns since this process started, by model; none per session."""

    def __init__(self) -> None:
        self._turns: OrderedDict[tuple[str, str, str], int] = OrderedDict()
        self._sums: collections.Counter[tuple[str, str]] = collections.Counter()  # (name, model) → sum
        # (part, model) → durations; post covers all models
        self._durations: collections.defaultdict[tuple[str, str], Histogram] = collections.defaultdict(Histogram)

    def add(self, *records: TurnRecord) -> None:
        """Count finished turns. One call with many is much cheaper than many calls."""
        by_model: dict[str, list[TurnRecord]] = {}
        series: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for record in records:
            model = record.model or ""
            series[model, record.backend or "", record.outcome] += 1
            by_model.setdefault(model, []).append(record)
            if record.post_ms is not None:
                self.add_post(record.post_ms)
        for key, count in series.items():
            self._turns[key] = self._turns.get(key, 0) + count
            self._turns.move_to_end(key)
            if len(self._turns) > MAX_METRIC_SERIES:
                self._turns.popitem(last=False)
        for model, turns in by_model.items():
            self._add_figures(model, turns)

    def _add_figures(self, model: str, turns: Sequence[TurnRecord]) -> None:
        for name, (_, read) in _SUMS.items():
            if value := sum(map(read, turns)):
                self._sums[name, model] += value
        for part, read_ms in _MODEL_DURATIONS.items():
            if durations := [ms for ms in map(read_ms, turns) if ms is not None]:
                self._durations[part, model].add(*durations)

    def add_post(self, ms: float) -> None:
        """Count the time an agent acted on an answer, in ms."""
        self._durations["post", ""].add(ms)

    def collect(self) -> Iterator[Any]:
        """Metric families for prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        turns = CounterMetricFamily("agent_infra_turns", "Finished turns.", labels=("model", "backend", "outcome"))
        for key, count in self._turns.items():
            turns.add_metric(key, count)
        yield turns
        for name, (text, _) in _SUMS.items():
            counter = CounterMetricFamily(f"agent_infra_{name}", text, labels=("model",))
            for (each, model), value in self._sums.items():
                if each == name:
                    counter.add_metric((model,), value)
            yield counter
        for part, text in METRIC_PARTS.items():
            by = () if part == "post" else ("model",)
            family = HistogramMetricFamily(f"agent_infra_{part}_seconds", text, labels=by)
            for (each, model), durations in self._durations.items():
                if each == part:
                    family.add_metric((model,)[: len(by)], _cumulative(durations), durations.sum_ms / 1000)
            yield family


def _cumulative(durations: Histogram) -> list[tuple[str, float]]:
    """A histogram's cumulative buckets: ``(upper bound in seconds, count below it)``."""
    bounds = [(str(2.0**octave / 1000), float(durations.count_below(octave))) for octave in METRIC_OCTAVES]
    return [*bounds, ("+Inf", float(durations.count))]


# Gauges of a backend's row in /stats: name → help text and getter. None values are left out.
_BACKEND_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "up": ("Whether it is ready and healthy.", lambda row: row["state"] == "ready" and row["healthy"] is not False),
    "in_flight": ("Turns in flight on it.", lambda row: row["inflight"]),
    "slots": ("Turns that it can process at once.", lambda row: row["slots"]),
    "kv_cache_usage_ratio": ("Used share of its KV cache.", lambda row: row["engine"]["kv_usage"]),
    "gpu_memory_used_bytes": ("Used memory of its GPUs.", lambda row: as_mapping(row["gpu"]).get("memory_used")),
    "gpu_memory_bytes": ("Memory of its GPUs.", lambda row: as_mapping(row["gpu"]).get("memory_total")),
    "gpu_utilization_ratio": ("Use of its GPUs.", lambda row: ratio(as_mapping(row["gpu"]).get("utilization"), 100)),
}
_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "start_time_seconds": ("When the controller started.", lambda stats: stats["now"] - stats["uptime_seconds"]),
    "queue_turns": ("Turns that wait for a slot.", lambda stats: stats["queue"]["pending"]),
    "held_turns": ("Of these: turns that wait for room in a KV cache.", lambda stats: stats["queue"]["held"]),
    "in_flight_turns": ("Turns with a replica.", lambda stats: stats["queue"]["in_flight"]),
    "live_sessions": ("Sessions that are not over.", lambda stats: stats["sessions"]["live"]),
    "active_sessions": ("Sessions that were active lately.", lambda stats: stats["sessions"]["active"]),
    "relay_resident_memory_bytes": ("Resident memory of the relay.", lambda stats: stats["relay"]["rss_bytes"]),
    "relay_connections": ("Open connections of clients.", lambda stats: stats["relay"]["connections"]),
    "history_up": ("Whether turns are being kept.", lambda stats: stats["history"]["state"] == "on"),
    "history_turns": ("Turns in the history.", lambda stats: stats["history"]["turns"]),
}

# The same for an entry of the analysis.
_ANALYSIS_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "suggested_agents": ("Agents to run in parallel.", lambda entry: entry["suggestion"]["agents"]["value"]),
    "utilisation_ratio": ("Use of the replicas, as fitted.", lambda entry: entry["operating"]["utilisation"]["value"]),
}


class StatsMetrics:
    """The state in a /stats document, and replica time, as metric families for prometheus_client."""

    def __init__(self, stats: Mapping[str, Any], replica_seconds: Mapping[ReplicaUse, float]) -> None:
        self._stats, self._replica_seconds = stats, replica_seconds

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily("agent_infra_info", "Version of the program.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        backends = [((row["model"], row["id"]), row) for row in self._stats["backends"]]
        analysis = [((entry["model"], entry["gpu"] or ""), entry) for entry in self._stats["analysis"] or ()]
        for prefix, labels, rows, gauges in (
            ("", (), [((), self._stats)], _GAUGES),
            ("backend_", ("model", "backend"), backends, _BACKEND_GAUGES),
            ("", ("model", "gpu"), analysis, _ANALYSIS_GAUGES),
        ):
            for name, (text, read) in gauges.items():
                gauge = GaugeMetricFamily(f"agent_infra_{prefix}{name}", text, labels=labels)
                for values, row in rows:
                    if (figure := read(row)) is not None:
                        gauge.add_metric(values, figure)
                yield gauge
        relay = self._stats["relay"]
        yield CounterMetricFamily("agent_infra_relay_restarts", "Relays that were replaced.", relay["restarts"])
        yield CounterMetricFamily("agent_infra_events_dropped", "Turns not counted.", relay["events_dropped"])
        for what in ("replica", "gpu"):
            family = CounterMetricFamily(
                f"agent_infra_{what}_seconds", f"Time of {what}s by state.", labels=("model", "gpu", "state")
            )
            sums: dict[tuple[str, str, str], float] = {}
            for use, seconds in self._replica_seconds.items():
                key = use.model, use.gpu_type, use.state
                sums[key] = sums.get(key, 0.0) + seconds * (use.gpus if what == "gpu" else 1)
            for key, seconds in sums.items():
                family.add_metric(key, seconds)
            yield family


def metrics_text(*sources: TurnMetrics | StatsMetrics) -> bytes:
    """The body of GET /metrics, in Prometheus's text format (METRICS_TYPE)."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    for source in sources:
        registry.register(source)
    return generate_latest(registry)

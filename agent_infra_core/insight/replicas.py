"""Figures of each replica: load, errors, latencies. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.insight.rates import RecentHistogram, percentiles
from agent_infra_core.insight.turns import OpenTurn, is_finite_number
from agent_infra_core.protocol import Backend, TurnFinished, is_count

BACKEND_HISTORY_POINTS = 60  # per backend: turns in flight, at the same times as the points of Timeline
LISTED_WAITING = 50


class RelayCounters:
    """Counters that each relay starts at zero, summed over all relays. Sums never decrease."""

    def __init__(self, *names: str) -> None:
        self.sums = dict.fromkeys(names, 0)
        self._last = dict.fromkeys(names, 0)

    def read(self, readings: Mapping[str, Any]) -> None:
        """Add the relay's current counts. A count below the last reading means that a new relay has started."""
        for name, last in self._last.items():
            count = readings.get(name)
            if is_count(count):
                self.sums[name] += count - last if count >= last else count
                self._last[name] = count

    def restart(self) -> None:
        """The next reading comes from a new relay."""
        self._last = dict.fromkeys(self._last, 0)


class RelayReport:
    """The relay's report about itself, once a second. Missing and invalid values count as unknown."""

    def __init__(self) -> None:
        self.gauges: Mapping[str, Any] = {}
        self._counters = RelayCounters("requests", "errors", "retries", "aborted", "rejected", "events_dropped")
        self._restarts = 0

    def read(self, gauges: Mapping[str, Any]) -> None:
        """Read the gauges passed to Tracker.sample()."""
        self.gauges = as_mapping(finite(gauges))
        self._counters.read(as_mapping(self.gauges.get("counters")))

    def restart(self) -> None:
        """The next gauges come from a new relay."""
        self._counters.restart()
        self._restarts += 1
        self.gauges = {}

    @property
    def backends(self) -> Mapping[str, Mapping[str, Any]]:
        """Gauges by backend."""
        return {name: as_mapping(gauge) for name, gauge in as_mapping(self.gauges.get("backends")).items()}

    def kv_capacity(self) -> dict[str, float]:
        """Backend → size of its cache in tokens, if known."""
        told = {name: as_mapping(gauge.get("load")) for name, gauge in self.backends.items()}
        return {
            name: tokens for name, load in told.items() if is_finite_number(tokens := load.get("kv_capacity_tokens"))
        }

    def queue(self, turns: Mapping[str, OpenTurn]) -> dict[str, Any]:
        """``queue`` of /stats. ``turns`` supplies the sessions of turns whose client named none."""
        queue = as_mapping(self.gauges.get("queue"))
        waiting = queue.get("waiting")
        rows = [row for row in waiting[:LISTED_WAITING] if isinstance(row, dict)] if isinstance(waiting, list) else []
        for row in rows:
            turn = turns.get(str(row.get("turn")))
            row["session"] = turn.session.id if turn is not None and turn.session is not None else row.get("session")
        return {**{name: queue.get(name) for name in ("pending", "held", "in_flight", "oldest_ms")}, "waiting": rows}

    def document(self) -> dict[str, Any]:
        """``relay`` of /stats."""
        return {
            **self._counters.sums,
            "restarts": self._restarts,
            "sampled_at": self.gauges.get("at"),
            "rss_bytes": self.gauges.get("rss_bytes"),
            "connections": self.gauges.get("connections"),
        }


class BackendFigures:
    """Measurements of one backend: turns sent to it, summed over relays, and its recent latencies."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = RelayCounters("requests", "errors")
        self.latency = RecentHistogram(clock)  # from sending to the last byte, completed turns only
        self.ttft = RecentHistogram(clock)
        self.gap = RecentHistogram(clock)  # between chunks of a stream
        self.in_flight: deque[int | None] = deque(maxlen=BACKEND_HISTORY_POINTS)

    def finish(self, events: Sequence[TurnFinished]) -> None:
        """Add turns that finished on this backend."""
        latencies = [event.inference_ms for event in events if event.outcome == "completed"]
        self.latency.add(*[ms for ms in latencies if ms is not None])
        self.ttft.add(*[event.ttft_ms for event in events if event.ttft_ms is not None])
        for event in events:
            if event.gaps:
                self.gap.slice().add_buckets(event.gaps)


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def finite(value: Any) -> Any:
    """A JSON value with NaN and infinities replaced by None. Python's parser accepts them, but they aren't JSON."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Fields of a replica's load digest (GET /load of `serve`) that appear under ``engine`` in /stats.
_ENGINE_FIGURES = (
    *("state", "running", "waiting", "kv_usage", "kv_capacity_tokens", "prefix_queries", "prefix_hits"),
    *("preemptions", "prompt_tokens", "generation_tokens", "at"),
)


def _replica_row(record: Mapping[str, Any], backend: Backend | None, gauge: Mapping[str, Any]) -> dict[str, Any]:
    """The row of one backend, from its record, the replica table and the relay's gauge; any may be missing."""
    load = as_mapping(gauge.get("load"))
    failure = record.get("failure")
    is_draining = backend is not None and backend.state == "draining"
    told = (as_mapping(failure).get("line"), gauge.get("reason"), record.get("message"), record.get("progress"))
    return {
        "id": record["replica"] if record else backend.id if backend else None,
        "model": record["model"] if record else backend.model if backend else None,
        "node": record.get("node") or (backend.node if backend else None) or None,
        "partition": record.get("partition"),
        "port": record.get("port") or (backend.port if backend else None),
        "state": "draining" if is_draining else record.get("state", "ready"),
        "healthy": gauge.get("healthy"),
        "reason": next((reason for reason in told if reason), None),
        "failure": failure,
        "progress": record.get("progress"),
        "restarts": record.get("restarts"),
        "started_at": record.get("started_at") or None,
        "ready_at": record.get("ready_at"),
        "ends_at": record.get("ends_at"),
        "inflight": gauge.get("in_flight"),
        "slots": record.get("slots") or (backend.slots if backend else None) or None,
        "gpu": _gpu_summary(load.get("gpus") or record.get("gpus")),
        "engine": {"name": record.get("engine"), **{name: load.get(name) for name in _ENGINE_FIGURES}},
        "tunnel": record.get("tunnel"),
    }


def _gpu_summary(gpus: Any) -> dict[str, Any] | None:
    """A replica's GPUs combined: mean utilisation, total memory (bytes) and power, top temperature; None if none."""
    samples = [as_mapping(gpu) for gpu in gpus] if isinstance(gpus, (list, tuple)) else []
    if not samples:
        return None

    def combine(name: str, how: Callable[[list[float]], float]) -> float | None:
        known = [sample[name] for sample in samples if is_finite_number(sample.get(name))]
        return how(known) if known else None

    return {
        "count": len(samples),
        "name": samples[0].get("name"),
        "utilization": combine("utilization", lambda known: round(sum(known) / len(known), 1)),
        "memory_used": combine("memory_used", sum),
        "memory_total": combine("memory_total", sum),
        "power_w": combine("power_w", sum),
        "temperature_c": combine("temperature_c", max),
    }


class BackendTable:
    """Figures of all backends that appeared since the last call of ``replicas``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._figures: dict[str, BackendFigures] = {}

    def figures(self, backend: str) -> BackendFigures:
        """The figures of one backend; empty if it is new."""
        if backend not in self._figures:
            self._figures[backend] = BackendFigures(self._clock)
        return self._figures[backend]

    def sample(self, gauges: Mapping[str, Any], is_due: bool) -> None:
        """Read the relay's gauges. With ``is_due``, also add a point to each backend's history."""
        for backend, gauge in gauges.items():
            figures = self.figures(backend)
            figures.counters.read(gauge)
            if is_due:
                figures.in_flight.append(gauge.get("in_flight"))

    def relay_restarted(self) -> None:
        for figures in self._figures.values():
            figures.counters.restart()

    def replicas(
        self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], gauges: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """One row per backend that has a record or is in the table. Figures of all others are dropped."""
        known = {record["replica"]: finite(record) for record in records}
        routed = {backend.id: backend for backend in table}
        self._figures = {name: self.figures(name) for name in {**known, **routed}}
        return [
            _replica_row(known.get(name, {}), routed.get(name), as_mapping(gauges.get(name))) for name in self._figures
        ]

    def measured(self, backend: str) -> dict[str, Any]:
        """The measurements of one backend, as in /stats."""
        figures = self.figures(backend)
        return {
            **figures.counters.sums,
            "latency_ms": percentiles(figures.latency.read(), 50, 95, 99),
            "ttft_ms": percentiles(figures.ttft.read(), 50, 95, 99),
            "gap_ms": percentiles(figures.gap.read(), 50, 95, 99),
            "inflight_history": list(figures.in_flight),
        }

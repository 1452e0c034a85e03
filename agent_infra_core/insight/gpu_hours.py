"""GPU-hours and replica-hours by state. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from agent_infra_core.protocol import ReplicaRecord, is_count

LISTED_REPLICAS = 200
REPLICA_TIME_BIN_S = 300  # bin size of replica time; the history merges bins older than a week into days
NEW_REPLICA_S = 5.0  # credited to a replica that is new in a sample and has no known start time
OCCUPYING_STATES = ("pending", "loading", "ready_busy", "ready_idle")


class ReplicaUse(NamedTuple):
    """The GPUs of a replica, and its state, one of OCCUPYING_STATES."""

    replica: str
    model: str
    gpu_type: str  # "" without a GPU or if its type is unknown
    gpus: int
    state: str


def replica_use(record: ReplicaRecord, in_flight: Any, asked_gpus: int = 0) -> ReplicaUse | None:
    """The current use of a replica; None if it has ended. If ``in_flight`` is unknown, the replica counts as idle.

    ``asked_gpus`` is the number of GPUs its job requested. The record lists GPUs only once the replica runs, and only
    those of one node.
    """
    phase = {"pending": "pending", "starting": "loading", "loading": "loading"}.get(record.state)
    if phase is None and record.state not in ("ready", "draining"):
        return None
    phase = phase or ("ready_busy" if is_count(in_flight) and in_flight > 0 else "ready_idle")
    gpu_type = record.gpus[0].name if record.gpus else ""
    gpus = max(len(record.gpus), len(record.gpu_ids), asked_gpus)
    return ReplicaUse(record.replica, record.model, gpu_type, gpus, phase)


class ReplicaTime:
    """Time that replicas spent in each state: in total, and by time step since the last take().

    Only sampled time counts; time without a running controller is missing.
    """

    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self._steady_clock = clock, steady_clock
        self.since = clock()
        self._sums: dict[ReplicaUse, float] = {}
        self._untaken: dict[tuple[ReplicaUse, int], float] = {}
        self._sampled_at = steady_clock()
        self._present: frozenset[str] = frozenset()  # replicas of the last sample

    def sample(self, uses: Collection[ReplicaUse], started: Mapping[str, float]) -> None:
        """Count the time since the last sample, or since a replica ``started`` (0 if unknown), for these uses."""
        now, steady_now = self._clock(), self._steady_clock()
        passed, self._sampled_at = steady_now - self._sampled_at, steady_now
        step = int(now // REPLICA_TIME_BIN_S) * REPLICA_TIME_BIN_S
        known, self._present = self._present, frozenset(use.replica for use in uses)
        for use in uses:
            seconds = passed  # large after a gap in the gauges
            if use.replica not in known:
                at = started.get(use.replica)
                seconds = min(passed, max(0.0, now - at) if at else NEW_REPLICA_S)
            self._sums[use] = self._sums.get(use, 0.0) + seconds
            self._untaken[use, step] = self._untaken.get((use, step), 0.0) + seconds

    def take(self) -> dict[tuple[ReplicaUse, int], float]:
        """Seconds by use and time step since the last call."""
        taken, self._untaken = self._untaken, {}
        return taken

    def restore(self, sums: Mapping[ReplicaUse, float], since: float) -> None:
        """Continue from the sums of an earlier controller."""
        self._sums.update(sums)
        self.since = since

    def document(self) -> dict[str, Any]:
        """``accounting`` of /stats: GPU-hours and replica-hours by state, in total, by model and by replica."""
        return {
            "since": self.since,
            **_hours_row(self._sums),
            "by_model": [{"model": name, **_hours_row(sums)} for name, sums in grouped(self._sums, "model").items()],
            "by_replica": [
                {"replica": name, "model": next(iter(sums)).model, **_hours_row(sums)}
                for name, sums in grouped(self._sums, "replica").items()
                if name in self._present
            ][:LISTED_REPLICAS],
        }

    def by_model(self) -> dict[str, dict[ReplicaUse, float]]:
        """Total seconds by model and use."""
        return grouped(self._sums, "model")

    def seconds(self) -> Mapping[ReplicaUse, float]:
        """Total seconds by use."""
        return self._sums


def _hours_row(sums: Mapping[ReplicaUse, float]) -> dict[str, Any]:
    return {"gpu_hours": hours_by_state(sums, of_gpus=True), "replica_hours": hours_by_state(sums, of_gpus=False)}


def grouped(sums: Mapping[ReplicaUse, float], by: str) -> dict[str, dict[ReplicaUse, float]]:
    groups: dict[str, dict[ReplicaUse, float]] = {}
    for use, seconds in sums.items():
        groups.setdefault(getattr(use, by), {})[use] = seconds
    return groups


def hours_by_state(sums: Mapping[ReplicaUse, float], of_gpus: bool) -> dict[str, float]:
    """Hours by state: GPU-hours if ``of_gpus``, otherwise replica-hours, including replicas without a GPU."""
    hours = dict.fromkeys(OCCUPYING_STATES, 0.0)
    for use, seconds in sums.items():
        hours[use.state] += seconds * (use.gpus if of_gpus else 1) / 3600
    return {state: round(value, 4) for state, value in hours.items()}

"""How long replicas were held and used: GPU-hours by state. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from agent_infra_core.protocol import is_count

LISTED_REPLICAS = 200


REPLICA_TIME_STEP_S = 300  # by which replica time is summed; of days gone by for a week, by the day


NEW_REPLICA_S = 5.0  # that a replica gets which the last sample had not, and which does not say when it started


REPLICA_STATES_HELD = ("pending", "loading", "ready_busy", "ready_idle")


class ReplicaView(Protocol):
    """What accounting asks of a replica: its record."""

    @property
    def replica(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def gpus(self) -> Sequence[Any]: ...  # each with a name
    @property
    def gpu_ids(self) -> Sequence[str]: ...


class ReplicaUse(NamedTuple):
    """What a replica holds, and in which of REPLICA_STATES_HELD."""

    replica: str
    model: str
    gpu_type: str  # "" where there is no GPU, or none that tells
    gpus: int
    state: str


def replica_use(record: ReplicaView, in_flight: Any, asked_gpus: int = 0) -> ReplicaUse | None:
    """What a replica holds now; None for one that has ended. Without a word on its turns it is idle.

    ``asked_gpus`` are those that its job asked for, which a record tells only once it runs, and of one node alone.
    """
    phase = {"pending": "pending", "starting": "loading", "loading": "loading"}.get(record.state)
    if phase is None and record.state not in ("ready", "draining"):
        return None
    phase = phase or ("ready_busy" if is_count(in_flight) and in_flight > 0 else "ready_idle")
    gpu_type = str(record.gpus[0].name) if record.gpus else ""
    gpus = max(len(record.gpus), len(record.gpu_ids), asked_gpus)
    return ReplicaUse(record.replica, record.model, gpu_type, gpus, phase)


class ReplicaTime:
    """How long each replica was in which state: all of it, and what was not taken yet, in steps of time.

    Only the time that is sampled counts: a deployment without a controller is not seen.
    """

    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self._steady_clock = clock, steady_clock
        self.since = clock()
        self._sums: dict[ReplicaUse, float] = {}
        self._untaken: dict[tuple[ReplicaUse, int], float] = {}
        self._sampled_at = steady_clock()
        self._present: frozenset[str] = frozenset()  # replicas of the last sample

    def sample(self, uses: Collection[ReplicaUse], started: Mapping[str, float]) -> None:
        """The replicas were like this since the last sample, or since they ``started``; 0 where that is not known."""
        now, steady_now = self._clock(), self._steady_clock()
        passed, self._sampled_at = steady_now - self._sampled_at, steady_now
        step = int(now // REPLICA_TIME_STEP_S) * REPLICA_TIME_STEP_S
        known, self._present = self._present, frozenset(use.replica for use in uses)
        for use in uses:
            seconds = passed  # many, where no gauges came for a while
            if use.replica not in known:
                at = started.get(use.replica)
                seconds = min(passed, max(0.0, now - at) if at else NEW_REPLICA_S)
            self._sums[use] = self._sums.get(use, 0.0) + seconds
            self._untaken[use, step] = self._untaken.get((use, step), 0.0) + seconds

    def take(self) -> dict[tuple[ReplicaUse, int], float]:
        """Seconds by use and step of time, since the last call."""
        taken, self._untaken = self._untaken, {}
        return taken

    def restore(self, sums: Mapping[ReplicaUse, float], since: float) -> None:
        """Go on where an earlier controller was."""
        self._sums.update(sums)
        self.since = since

    def document(self) -> dict[str, Any]:
        """``accounting`` of /stats: hours by state, of GPUs and of replicas, in all, by model and by replica."""
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

    def seconds(self) -> Mapping[ReplicaUse, float]:
        """All of it."""
        return self._sums


def _hours_row(sums: Mapping[ReplicaUse, float]) -> dict[str, Any]:
    return {"gpu_hours": hours_by_state(sums, of_gpus=True), "replica_hours": hours_by_state(sums, of_gpus=False)}


def grouped(sums: Mapping[ReplicaUse, float], by: str) -> dict[str, dict[ReplicaUse, float]]:
    groups: dict[str, dict[ReplicaUse, float]] = {}
    for use, seconds in sums.items():
        groups.setdefault(getattr(use, by), {})[use] = seconds
    return groups


def hours_by_state(sums: Mapping[ReplicaUse, float], of_gpus: bool) -> dict[str, float]:
    """Hours by state: of GPUs, or of replicas whether they have one or not."""
    hours = dict.fromkeys(REPLICA_STATES_HELD, 0.0)
    for use, seconds in sums.items():
        hours[use.state] += seconds * (use.gpus if of_gpus else 1) / 3600
    return {state: round(value, 4) for state, value in hours.items()}

"""Polls the cluster for replicas, and builds the relay's replica table."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.engines import ENGINES
from agent_infra_core.protocol import Backend, ReplicaRecord

DISCOVERY_INTERVAL_S = 0.5
STOP_S = 10.0  # time each thread of the controller has to end


class Discovery:
    """Polls the replicas every ``interval_s`` in its own thread, because a poll may block.

    ``warn`` is called when polls start to fail, and when the reason changes.
    """

    def __init__(
        self, look: Callable[[], Sequence[ReplicaRecord]], interval_s: float, warn: Callable[[str], None]
    ) -> None:
        self._look, self._interval_s, self._warn = look, interval_s, warn
        self._stop = threading.Event()
        self._is_due = threading.Event()  # a look is due before the interval is over; also set by stop()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self.records: Sequence[ReplicaRecord] = ()  # replaced as a whole, so readers need no lock
        self.error: str | None = None

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread. If its poll is still running after STOP_S, abandon it; nobody uses its result."""
        self._stop.set()
        self._is_due.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
            if self._thread.is_alive():
                self._warn(
                    "a poll of the replicas is still running; it was abandoned, with any handover it was working on"
                )

    def hurry(self) -> None:
        """Poll soon, rather than after the interval. Thread-safe."""
        self._is_due.set()

    def look(self) -> None:
        """Poll once. On failure, set ``error`` and keep the last records."""
        try:
            self.records, self.error = self._look(), None
        except Exception as error:  # noqa: BLE001  a look that fails must not end discovery
            problem = str(error) if isinstance(error, AgentInfraError) else f"{type(error).__name__}: {error}"
            if problem != self.error:
                self._warn(f"the replicas cannot be polled, so their last known state is used: {problem}")
            self.error = problem

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._is_due.wait(self._interval_s):
                self._is_due.clear()
            if not self._stop.is_set():
                self.look()


def replica_table(
    models: Sequence[str],
    records: Iterable[ReplicaRecord],
    key: str | None,
    drained: Collection[str] = (),
    expected: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The payload of FRAME_TABLE without the settings: the models, their backends, and which models are loading.

    ``drained`` are replicas drained by an operator, ``expected`` are models whose replicas are about to be started.
    """
    backends, loading = [], set(expected)
    for record in records:
        if record.state in ("pending", "starting", "loading"):
            loading.add(record.model)
        if record.state not in ("ready", "draining") or record.port is None:
            continue
        state = "draining" if record.replica in drained else record.state
        backend = Backend(
            id=record.replica,
            model=record.model,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            key=key,
            state=state,
            slots=record.slots,
            node=record.node,
            ends_at=record.ends_at,
            is_own=record.pid > 0,
            takes_priority=record.takes_priority,
            lacks=ENGINES[record.engine].lacks if record.engine in ENGINES else (),
        )
        backends.append(dataclasses.asdict(backend))
    return {"models": list(models), "loading": sorted(loading), "backends": backends}

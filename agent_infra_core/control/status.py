"""What `status` shows: replicas, reasons and the running proxy; and which replicas `scale` ends first."""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.cluster import Cluster
from agent_infra_core.host import http_get
from agent_infra_core.protocol import ReplicaRecord, ServeSpec
from agent_infra_core.settings import ModelConfig


def describe_replica(record: ReplicaRecord) -> str:
    """A replica's state as text: ``LOADING 5/9``, ``READY 127.0.0.1:5901``, ``FAILED out_of_memory: …``."""
    words = record.state.upper()
    if record.state == "pending":
        start = time.strftime("est. %a %H:%M", time.localtime(record.starts_at)) if record.starts_at else ""
        told = ", ".join(part for part in (record.pending_reason, start) if part)
        return words + (f" ({told})" if told else "")
    if record.state == "ready":
        words += f" {record.host}:{record.port}"
    elif record.state == "starting" and record.job_id:
        words = f"RUNNING {record.node}"
    elif record.progress:
        words += f" {record.progress}"
    if record.failure is not None and record.state == "failed":
        words += f" {record.failure.kind}: {record.failure.line}"
    elif record.failure is not None:
        words += f" (before: {record.failure.line})"
    elif record.message:
        words += f" ({record.message})"
    if record.restarts:
        words += f" [{record.restarts} restart{'s' if record.restarts > 1 else ''}]"
    return words


def describe_model(row: Mapping[str, Any]) -> str:
    """Describe a model's row of the status in a line."""
    words = [f"{row['ready']} of {row['wanted']} ready"]
    words += [f"{row['idle']} stopped (idle)"] if row["idle"] else []
    if row["sessions"] is not None:
        told = ((row["in_flight"], "turn"), (row["sessions"], "session"))
        turns, sessions = (f"{number} {word}" + "s" * (number != 1) for number, word in told)
        words += [f"{turns} in flight, {sessions}"]
    return f"{row['name']}  {', '.join(words)}"


def describe_succession(replica: str, row: Mapping[str, Any]) -> str:
    """Describe in a line how a replica whose walltime is about to end is replaced."""
    if not row["successor"]:
        return f"the successor of {replica} {row['note']}; there will be a gap"
    gap = ": there will be a gap while it loads" if row["is_after"] else ""
    return f"{row['successor']} {row['note'] or 'takes over'} from {replica}{gap}"


def describe_accounting(accounting: Mapping[str, Any] | None) -> str | None:
    """Describe the GPU-hours in a line; None if no GPU was used."""
    hours: Mapping[str, float] = (accounting or {}).get("gpu_hours", {})
    total = sum(hours.values())
    if accounting is None or total <= 0:
        return None
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(accounting["since"]))
    parts = ", ".join(f"{value:.2f} {state.replace('_', ' ')}" for state, value in hours.items())
    return f"GPU-hours  {total:.2f} since {since}: {parts}"


SERVING_STATES = ("pending", "starting", "loading", "ready")  # states that count towards a model's wanted replicas
LIVE_STATES = (*SERVING_STATES, "draining")
STATS_OLD_S = 10.0  # an older /stats document is out of date: its controller is gone or hangs


@dataclass(frozen=True)
class ProxyClient:
    """A client of the deployment's running proxy, over HTTP with the clients' key."""

    host: str
    port: int
    key: str

    def get(self, path: str) -> dict[str, Any]:
        """The JSON document at ``path``; empty if there is none within 5 seconds."""
        status, body = http_get(self.host, self.port, path, self.key, timeout_s=5.0)
        with contextlib.suppress(ValueError):
            document = json.loads(body) if status == 200 else {}
            return document if isinstance(document, dict) else {}
        return {}

    def stats(self) -> dict[str, Any]:
        """The /stats document; empty if there is none or it is out of date."""
        document = self.get("/stats")
        return document if document.get("snapshot_age_ms", 0) <= 1000 * STATS_OLD_S else {}

    def backends(self) -> dict[str, dict[str, Any]]:
        """Replica → its row of /stats."""
        return {row["id"]: row for row in self.stats().get("backends", ())}

    def drain(self, replica: str, operation: str = "drain") -> int | None:
        """Drain (or ``undrain``) a replica. Returns its number of turns in flight; None if the proxy doesn't answer."""
        path = f"/admin/backends/{replica}/{operation}"
        status, body = http_get(self.host, self.port, path, self.key, method="POST", timeout_s=5.0)
        if status != 200:
            return 0 if status == 404 else None  # 404: the proxy routes nothing there
        return int(json.loads(body)["in_flight"])

    def announce_run(self, name: str, tasks: int) -> None:
        """Announce a run of ``tasks`` tasks. Raises AgentInfraError when the proxy doesn't take it."""
        body = json.dumps({"name": name, "tasks": tasks}).encode()
        status, _ = http_get(self.host, self.port, "/runs", self.key, method="POST", timeout_s=5.0, body=body)
        if status != 200:
            raise AgentInfraError(f"the proxy did not take the run {name} (status {status}); its log says more")


def choose_to_stop(
    records: Iterable[ReplicaRecord], rows: Mapping[str, Mapping[str, Any]], count: int
) -> list[ReplicaRecord]:
    """The ``count`` replicas to remove: first those not yet serving, then those with the fewest turns and sessions.

    ``rows`` maps replicas to the proxy's rows. A draining replica goes first; among equals, the latest started.
    """

    def cost(record: ReplicaRecord) -> tuple[int, bool, int, int, float]:
        row = rows.get(record.replica, {})
        is_kept = row.get("state") != "draining"
        load = (row.get("inflight") or 0, row.get("sessions") or 0)
        return (SERVING_STATES.index(record.state), is_kept, *load, -record.started_at)

    return sorted(records, key=cost)[:count]


def count_missing(model: ModelConfig, serving: Iterable[ReplicaRecord], report: Callable[[str], None]) -> int:
    """Number of replicas of a model to start. Reports how many are already running."""
    present = sum(record.model == model.name for record in serving)
    if present:
        report(f"{model.name}: {present} of {model.replicas} replicas are already running")
    return max(0, model.replicas - present)


def unreached(records: Iterable[ReplicaRecord], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Ready replica → why no turn reaches it, for those that the proxy, whose backends ``rows`` are, can't use."""
    ready = {record.replica for record in records if record.state == "ready"}
    return {
        row["id"]: (row.get("tunnel") or {}).get("reason") or row.get("reason") or "the proxy gets no answer from it"
        for row in rows
        if row.get("id") in ready and (row.get("healthy") is False or row["state"] not in ("ready", "draining"))
    }


def summarize(
    model: str,
    wanted: int,
    records: Iterable[ReplicaRecord],
    rows: Collection[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A model's row in `status`: ``{name, wanted, running, ready, idle, in_flight, sessions}``.

    ``ready`` leaves out replicas that no turn reaches. ``idle`` replicas shut down because they were idle, as
    configured. ``rows`` are the backends of /stats; without them, turns in flight and sessions are None (unknown).
    """
    records = list(records)
    states = collections.Counter(
        "idle" if record.is_idle and record.state == "stopped" else record.state
        for record in records
        if record.model == model
    )
    served = [row for row in rows if row["model"] == model]
    lost = unreached(records, rows)
    counts = {
        name: sum(row[key] or 0 for row in served) for name, key in (("in_flight", "inflight"), ("sessions",) * 2)
    }
    return {
        "name": model,
        "wanted": wanted,
        "running": sum(states[state] for state in LIVE_STATES),
        "ready": states["ready"] - sum(row["model"] == model and row.get("id") in lost for row in rows),
        "idle": states["idle"],
        **(counts if served else dict.fromkeys(counts)),
    }


def explain_state(record: ReplicaRecord) -> str:
    """What describe_replica() leaves out: the fix for a failure, or why a job is waiting."""
    if record.failure is not None:
        return f"; {record.failure.hint}"
    return f": {record.message}" if record.state == "pending" and record.message else ""


def list_problems(models: Sequence[Mapping[str, Any]], records: Sequence[ReplicaRecord]) -> list[str]:
    """Why replicas aren't as wanted. ``models`` are rows of summarize()."""
    short = {row["name"] for row in models if row["ready"] + row["idle"] < row["wanted"]}
    reasons = [
        f"{record.replica} is {describe_replica(record)}" + explain_state(record)
        for record in records
        if record.state == "failed" or (record.state != "ready" and not record.is_idle and record.model in short)
    ]
    present = collections.Counter(record.model for record in records)
    reasons += [
        f"{row['running']} of {row['wanted']} replicas of {row['name']} are running; `start` starts the missing ones"
        for row in models
        if present[row["name"]] < row["wanted"]
    ]
    return reasons


QUEUE_PATIENCE_S = 15.0  # how long replicas that wait in the queue are waited for once one is ready
LOAD_DEADLINE_S = ServeSpec.load_timeout  # time for a replica to become ready after it left the queue


class StartWatch:
    """Tells when starting replicas have settled: some are ready and none is loading, or none is left to wait for.

    Time in the queue has no limit while none is ready. Once one is, the others are waited for while they load, and
    QUEUE_PATIENCE_S while they wait in the queue: those that start later join later.
    """

    def __init__(self) -> None:
        self._ready_at: float | None = None
        self._left_queue: dict[str, float] = {}  # loading replica → since when
        self._awaited: set[str] = set()

    def is_over(self, records: Iterable[ReplicaRecord], now: float) -> bool:
        """Whether they have settled. Call it with each new look; ``now`` is monotonic s."""
        states = {record.replica: record.state for record in records}
        if self._ready_at is None and "ready" in states.values():
            self._ready_at = now
        since = self._left_queue
        self._left_queue = {r: since.get(r, now) for r, state in states.items() if state in ("starting", "loading")}
        loading = {replica for replica, at in self._left_queue.items() if now - at < LOAD_DEADLINE_S}
        if self._ready_at is None or now - self._ready_at < QUEUE_PATIENCE_S:
            self._awaited = loading | {replica for replica, state in states.items() if state == "pending"}
        else:
            self._awaited &= loading
        return not self._awaited


def explain_lost(records: Sequence[ReplicaRecord], cluster: Cluster, is_each_needed: bool) -> str:
    """Why replicas that were started can't serve; empty if each model has one that serves or waits in the queue.

    With ``is_each_needed``, one that failed is enough.
    """
    if not records:
        return "no replica is left: another command has ended them"
    serving = {record.model for record in records if record.state in ("ready", "pending")}
    lost = [
        record
        for record in records
        if record.state in ("starting", "loading", "failed", "stopped")
        and not record.is_idle
        and (is_each_needed or record.model not in serving)
    ]
    return "; ".join(explain_failure(record, cluster) for record in lost)


def explain_failure(record: ReplicaRecord, cluster: Cluster) -> str:
    """Why a replica isn't ready, with the fix and the path of its log."""
    failure = record.failure
    if record.state in ("starting", "loading"):
        return f"{record.replica} is not ready after {LOAD_DEADLINE_S:g} s: {describe_replica(record)}"
    reason = f"{failure.kind}: {failure.line}; {failure.hint}" if failure else record.message or "it stopped"
    return f"{record.replica} failed: {reason} (log: {cluster.logs.where(record.replica)})"

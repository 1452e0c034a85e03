"""Handover: replaces a replica before the walltime of its job ends. The plan is pure; Handover executes it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_infra_core.control.link import DRAIN_S
from agent_infra_core.control.status import SERVING_STATES, describe_replica
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.place import HANDOVER_RESERVE_S
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.host import write_atomically
from agent_infra_core.protocol import HANDOVER_FORMAT, ReplicaRecord, rebuild
from agent_infra_core.settings import ModelConfig

HANDOVER_MARGIN = 1.5  # times the longest start-up time seen
HANDOVER_LIFE_SHARE = 0.75  # maximum share of the walltime, or long queues would replace every replica at once
HANDOVER_ATTEMPTS = 3  # failed successors before giving up
HANDOVER_RETRY_S = 60.0  # minimum time between the first two attempts; doubles each time

# Pending reasons that keep a successor waiting until its predecessor ends, because both count against one limit.
_LIMIT_REASON = re.compile(r"(QOS|Assoc)(Max|Grp)\w*|Max\w*Per(User|Account)\w*|Licenses")


@dataclass(frozen=True)
class Succession:
    """The replacement of a replica; handover.json maps replicas to these."""

    job: str | None  # the replica's; the same name with another job is another replica
    successor: str
    is_after: bool = False  # the successor starts after the replica has ended, since a limit forbids both
    attempts: int = 1
    note: str = ""  # shown by `status`
    at: float = 0.0  # when the successor was submitted, or submission failed (s since the epoch)


@dataclass(frozen=True)
class HandoverStep:
    """The next step of one replica's handover."""

    action: str  # submit | give up | postpone (a limit forbids both) | drain (and stop once idle) | forget
    replica: str
    reason: str  # for the log


def handover_lead_s(record: ReplicaRecord, records: Iterable[ReplicaRecord], now: float) -> float:
    """How long before the end of a replica's walltime its successor must be submitted, in seconds.

    Based on the longest queue wait and the longest loading time of its model's replicas.
    """
    peers = [peer for peer in records if peer.model == record.model]
    wait_s = max((peer.queue_wait_s or 0.0 for peer in peers), default=0.0)
    load_s = max((peer.ready_at - peer.started_at for peer in peers if peer.ready_at), default=0.0)
    walltime_s = (record.time_left_s or 0.0) + max(0.0, now - record.started_at)
    return min(HANDOVER_MARGIN * (wait_s + load_s) + HANDOVER_RESERVE_S, HANDOVER_LIFE_SHARE * walltime_s)


def plan_handover(
    records: Sequence[ReplicaRecord], successions: Mapping[str, Succession], now: float
) -> list[HandoverStep]:
    """The next step for every replica whose walltime is about to end or that is already being replaced.

    ``now`` is s since the epoch. A step may be returned again until it has taken effect.
    """
    known = {record.replica: record for record in records}
    steps = [_succession_step(known, replica, succession, now) for replica, succession in successions.items()]
    for record in records:
        is_followed = record.replica in successions and successions[record.replica].job == record.job_id
        if record.state == "ready" and record.time_left_s is not None and not is_followed:
            lead_s = handover_lead_s(record, records, now)
            if record.time_left_s < lead_s:
                reason = f"{record.replica} has {record.time_left_s:.0f} s left, a successor needs up to {lead_s:.0f} s"
                steps.append(HandoverStep("submit", record.replica, reason))
    return [step for step in steps if step]


def _succession_step(
    known: Mapping[str, ReplicaRecord], replica: str, succession: Succession, now: float
) -> HandoverStep | None:
    """The next step for a replica that has a successor; None to wait."""
    old, new = known.get(replica), known.get(succession.successor)
    if old is None or old.job_id != succession.job or old.state in ("stopped", "failed"):
        return HandoverStep("forget", replica, f"{replica} has ended, {succession.successor} takes its place")
    if new is None or new.state in ("stopped", "failed"):
        why = f"{succession.successor}, to replace {replica}, is {describe_replica(new) if new else 'gone'}"
        if not succession.successor:
            why = f"the successor of {replica} {succession.note}"
        if succession.attempts >= HANDOVER_ATTEMPTS:
            return HandoverStep("give up", replica, f"{why}; it was the last of {HANDOVER_ATTEMPTS} attempts")
        if now < succession.at + HANDOVER_RETRY_S * 2 ** (succession.attempts - 1):
            return None  # the cause, such as a bad node or a limit, may take a while to go away
        return HandoverStep("submit", replica, f"{why}; another is submitted")
    if new.state == "ready":
        return HandoverStep("drain", replica, f"{new.replica} is ready and takes over from {replica}")
    if new.state == "pending" and not succession.is_after and _LIMIT_REASON.fullmatch(new.pending_reason or ""):
        reason = f"{new.pending_reason} does not allow {new.replica} beside {replica}: it starts after {replica}"
        return HandoverStep("postpone", replica, reason)
    return None


def read_successions(paths: DeploymentPaths) -> dict[str, Succession]:
    """Replica → its Succession, as saved by a controller; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        told = json.loads(paths.handover.read_text(encoding="utf-8"))
        return {name: rebuild(Succession, each) for name, each in told.items() if name != "format"}
    return {}


class ReplacedDeployment(Protocol):
    """The parts of a deployment that Handover uses."""

    @property
    def paths(self) -> DeploymentPaths: ...
    @property
    def report(self) -> Callable[[str], None]: ...
    def select_models(self, name: str | None = None, replicas: int | None = None) -> list[ModelConfig]: ...
    def wanted(self) -> dict[str, int]: ...


class Handover:
    """Replaces replicas before the walltime of their jobs ends. handover.json lists handovers in progress.

    Steps run right after each poll of the replicas, so they never act on old data.
    """

    def __init__(
        self, deployment: ReplacedDeployment, cluster: SlurmCluster, drain: Callable[[str], int | None]
    ) -> None:
        """``drain`` sends a replica no new turns, and returns how many it still has (None: not known yet)."""
        self._deployment, self._cluster, self._drain = deployment, cluster, drain
        self._log = deployment.report
        self._successions = read_successions(deployment.paths)
        self._lock = threading.Lock()
        self._told: dict[str, tuple[str, Succession | None]] = {}  # replica → the step logged last, and its state
        self._problem: str | None = None  # the error logged last

    def follow(self, records: Sequence[ReplicaRecord]) -> None:
        """Take the next steps, if any. Does nothing while Slurm doesn't respond."""
        if not self._cluster.problem and self._lock.acquire(blocking=False):
            try:
                self._follow({record.replica: record for record in records})
                self._problem = None
            except Exception as error:  # noqa: BLE001  whatever fails here must not keep the replicas from being seen
                if self._problem != repr(error):
                    self._log(f"handover: {error!r}; it is retried at each poll")
                self._problem = repr(error)
            finally:
                self._lock.release()

    def _follow(self, known: Mapping[str, ReplicaRecord]) -> None:
        steps = plan_handover(list(known.values()), self._successions, time.time())
        for step in steps:
            told = (step.action, self._successions.get(step.replica))
            if self._told.get(step.replica) != told:
                self._told[step.replica] = told
                self._log(f"handover: {step.reason}")
        for job in dict.fromkeys(known[step.replica].job_id for step in steps if step.action == "submit"):
            together = [known[s.replica] for s in steps if s.action == "submit" and known[s.replica].job_id == job]
            self._submit(together)
        for step in steps:
            if step.action == "postpone":
                self._postpone(known[step.replica])
            elif step.action == "drain":
                if self._drain(step.replica) == 0:
                    self._cluster.stop([step.replica])
            elif step.action == "forget":
                self._forget(step.replica, known)

    def _submit(self, olds: Sequence[ReplicaRecord], after: str | None = None) -> None:
        """Submit successors for replicas that share a job. If that fails, retry later or after they have ended."""
        [model] = self._deployment.select_models(olds[0].model)
        former = [self._successions.get(old.replica) for old in olds]
        attempts = [
            each.attempts + 1 if each and each.job == old.job_id else 1 for each, old in zip(former, olds, strict=True)
        ]
        names = ["" for _ in olds]
        note = "starts once it has ended, and takes over" if after else ""
        try:
            prepared = self._cluster.prepare(dataclasses.replace(model, replicas=len(olds)))
            names = [record.replica for record in self._cluster.start_replicas(prepared, len(olds), after=after)]
        except (AgentInfraError, OSError) as error:  # counts as an attempt: the job may have been submitted
            note = f"cannot be submitted yet: {error}"
            self._log(f"handover: the successor of {olds[0].replica} {note}")
        for old, name, count in zip(olds, names, attempts, strict=True):
            self._note(old.replica, Succession(old.job_id, name, bool(after) or not name, count, note, time.time()))

    def _postpone(self, old: ReplicaRecord) -> None:
        successor = self._successions[old.replica].successor
        self._cluster.stop([successor], now=True)
        self._cluster.wait_stopped([successor], time.monotonic() + DRAIN_S)
        self._submit([old], after=old.job_id)

    def _forget(self, replica: str, known: Mapping[str, ReplicaRecord]) -> None:
        """Clean up a replica that has ended. If no successor was submitted, start one now if it is still wanted."""
        succession = self._successions[replica]
        old = known.get(replica)
        if old is not None and old.job_id == succession.job:
            self._cluster.wait_stopped([replica], time.monotonic())
        self._note(replica, None)
        self._told.pop(replica, None)
        if not succession.successor and old is not None:
            serving = [each for each in known.values() if each.model == old.model and each.state in SERVING_STATES]
            if len(serving) < self._deployment.wanted()[old.model]:
                [model] = self._deployment.select_models(old.model)
                self._cluster.start(self._cluster.prepare(model))

    def _note(self, replica: str, succession: Succession | None) -> None:
        if succession is None:
            self._successions.pop(replica, None)
        else:
            self._successions[replica] = succession
        successions = {name: dataclasses.asdict(each) for name, each in self._successions.items()}
        document = {"format": HANDOVER_FORMAT, **successions}
        with contextlib.suppress(OSError):  # on a full disk: the next controller may submit an extra successor
            write_atomically(self._deployment.paths.handover, json.dumps(document))

"""Wake and scale: how many replicas of a model should run. The decision is pure; Autoscaler executes it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_infra_core.control.handover import ReplacedDeployment, read_successions
from agent_infra_core.control.status import SERVING_STATES, choose_to_stop
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.cluster import Cluster
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.host import write_atomically
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig

UP_AFTER_S = 30.0  # of a queue, or of a verdict that more GPUs would help
DOWN_AFTER_S = 600.0  # of calm: loading a model takes minutes, so a replica is kept through short pauses
CALM_SHARE = 0.5  # of the slots that would be left, in use at most
REPLICAS_DO_NOT_HELP = ("AGENT-BOUND", "LATENCY-BOUND")  # verdicts
RETRY_S = 60.0  # after replicas couldn't be started; doubles each time
RETRY_MOST_S = 3600.0
LEAVE_S = 300.0  # for the turns of a replica that is removed


@dataclass(frozen=True)
class Demand:
    """What a model's agents ask for, and what its replicas have cost."""

    waiting: int = 0  # turns in the queue
    in_flight: int = 0  # turns that replicas are working on
    slots: int = 0  # turns that one replica can run at once; 0 = unknown
    verdict: str | None = None  # what limits the run; None: not known
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """A model's replicas."""

    serving: int = 0  # in one of SERVING_STATES, and not on its way out
    ready: int = 0
    idle: int = 0  # shut down for idleness, or about to be
    is_leaving: bool = False  # some are draining
    has_failed: bool = False


@dataclass(frozen=True)
class DemandState:
    """What a decision remembers of a model. Times are monotonic s."""

    is_asleep: bool = False  # its turns wait for a replica to be woken
    pressed_since: float = math.inf
    calm_since: float = math.inf
    retry_at: float = 0.0  # not before: starting replicas has failed
    failures: int = 0


@dataclass(frozen=True)
class Decision:
    """How many replicas should serve, and why; ``reason`` is empty if that is as many as do."""

    target: int
    reason: str = ""


def bounds(model: ModelConfig, wanted: int) -> tuple[int, int]:
    """The fewest and the most replicas. For a model that isn't scaled, those that idleness took may come back."""
    low = model.min_replicas if model.min_replicas is not None else model.replicas
    high = model.max_replicas if model.max_replicas is not None else model.replicas
    return (low, high) if is_scaled(model) else (0, wanted)


def is_scaled(model: ModelConfig) -> bool:
    return model.min_replicas is not None or model.max_replicas is not None


def may_wake(model: ModelConfig) -> bool:
    """Whether a turn may bring the model back."""
    return model.idle_shutdown_minutes is not None or model.min_replicas == 0


def observe(state: DemandState, model: ModelConfig, fleet: Fleet, demand: Demand, now: float) -> DemandState:
    """The state at this moment. Pressure and calm count from when they began, while nothing changes."""
    may_sleep = fleet.idle > 0 or ((model.min_replicas == 0 or state.is_asleep) and not fleet.has_failed)
    is_settled = fleet.serving == fleet.ready > 0
    is_pressed = demand.waiting > 0 or demand.verdict == "GPU-BOUND"
    would_be_left = demand.slots * (fleet.serving - 1)
    is_light = demand.verdict in REPLICAS_DO_NOT_HELP and demand.in_flight <= CALM_SHARE * would_be_left
    is_calm = not is_pressed and (is_light or demand.in_flight == 0)
    return dataclasses.replace(
        state,
        is_asleep=fleet.serving == 0 and may_sleep and now >= state.retry_at and not is_spent(model, demand),
        pressed_since=min(state.pressed_since, now) if is_settled and is_pressed else math.inf,
        calm_since=min(state.calm_since, now) if is_settled and is_calm else math.inf,
        failures=0 if fleet.ready else state.failures,
    )


def is_spent(model: ModelConfig, demand: Demand) -> bool:
    """Whether the model's budget of GPU-hours is used up."""
    return model.max_gpu_hours is not None and demand.gpu_hours >= model.max_gpu_hours


def decide(model: ModelConfig, wanted: int, fleet: Fleet, demand: Demand, state: DemandState, now: float) -> Decision:
    """How many replicas of a model should serve now, by the state that observe() returned."""
    low, high = bounds(model, wanted)
    if state.is_asleep:
        is_called = demand.waiting > 0 and not fleet.is_leaving  # what is leaving still has its GPUs
        return Decision(max(1, low), f"{demand.waiting} turns wait, and it sleeps") if is_called else Decision(0)
    if now < state.retry_at:
        return Decision(fleet.serving)
    can_grow = fleet.serving < high and (is_scaled(model) or fleet.idle > 0)
    if can_grow and now - state.pressed_since >= UP_AFTER_S and not is_spent(model, demand):
        more = max(1, demand.waiting // demand.slots if demand.slots else 1)
        why = f"{demand.waiting} turns wait" if demand.waiting else "the verdict is GPU-BOUND"
        return Decision(min(high, fleet.serving + more), f"{why} for {UP_AFTER_S:g} s")
    if is_scaled(model) and fleet.serving > low and now - state.calm_since >= DOWN_AFTER_S:
        return Decision(fleet.serving - 1, f"one replica less would do, for {DOWN_AFTER_S / 60:g} min")
    return Decision(fleet.serving)


@dataclass(frozen=True)
class Leaving:
    """A replica that is being removed."""

    identity: str  # see identify()
    until: float  # when its turns are cut, monotonic s


def identify(record: ReplicaRecord) -> str:
    """What tells a replica from a later one of the same name."""
    return record.job_id or record.process


def read_leaving(paths: DeploymentPaths, until: float) -> dict[str, Leaving]:
    """The replicas that an earlier controller was removing, as it saved them; empty if there are none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        saved = json.loads(paths.leaving.read_text(encoding="utf-8"))
        return {name: Leaving(identity, until) for name, identity in saved.items()}
    return {}


class ScaledDeployment(ReplacedDeployment, Protocol):
    """The parts of a deployment that Autoscaler uses."""

    def want(self, counts: Mapping[str, int]) -> None: ...


class ScaledTraffic(Protocol):
    """The controller, as Autoscaler uses it."""

    asleep: frozenset[str]  # models whose turns wait to be woken; set by Autoscaler

    def demand(self) -> Mapping[str, Demand]: ...
    def turns(self) -> Mapping[str, int]: ...  # replica → its turns in flight
    def drain(self, replica: str) -> int | None: ...


class Autoscaler:
    """Wakes models that were shut down for idleness, and keeps those with bounds at the number that demand asks for.

    leaving.json lists the replicas that it is removing, for the next controller.
    Its steps run right after each poll of the replicas, so they never act on old data.
    """

    def __init__(
        self,
        deployment: ScaledDeployment,
        cluster: Cluster,
        traffic: ScaledTraffic,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployment, self._cluster, self._traffic, self._clock = deployment, cluster, traffic, clock
        self._log = deployment.report
        self._states: dict[str, DemandState] = {}
        self._leaving = read_leaving(deployment.paths, clock() + LEAVE_S)
        self._started: dict[str, set[str]] = {}  # model → replicas that were added
        self._logged: dict[str, str] = {}  # topic → what was logged last
        self._lock = threading.Lock()

    def follow(self, records: Sequence[ReplicaRecord]) -> None:
        """Take the next steps, if any. Does nothing while the scheduler doesn't respond."""
        if self._cluster.problem or not self._lock.acquire(blocking=False):
            return
        try:
            self._retire(records)
            models = [model for model in self._deployment.select_models() if is_scaled(model) or may_wake(model)]
            if models:
                # A replica and its successor count as one; until then nothing is decided.
                replaced = read_successions(self._deployment.paths).keys()
                demand, wanted = self._traffic.demand(), self._deployment.wanted()
                for model in models:
                    mine = [each for each in records if each.model == model.name and each.replica not in self._leaving]
                    if not any(each.replica in replaced and each.state in SERVING_STATES for each in mine):
                        self._follow(model, wanted[model.name], mine, demand.get(model.name, Demand()))
            self._traffic.asleep = frozenset(name for name, state in self._states.items() if state.is_asleep)
            self._logged.pop("", None)
        except Exception as error:  # noqa: BLE001  whatever fails here must not keep the replicas from being seen
            self._log_change("", f"scaling: {error!r}; it is retried at each poll")
        finally:
            self._lock.release()

    def _follow(self, model: ModelConfig, wanted: int, mine: Sequence[ReplicaRecord], demand: Demand) -> None:
        """Take a model's next step; ``mine`` are its replicas but those that are being removed."""
        serving = [record for record in mine if record.state in SERVING_STATES]
        fleet = Fleet(
            serving=len(serving),
            ready=sum(record.state == "ready" for record in serving),
            idle=sum(record.state in ("draining", "stopped") and record.is_idle for record in mine),
            is_leaving=any(record.state == "draining" for record in mine),
            has_failed=any(record.state == "failed" for record in mine),
        )
        now = self._clock()
        state = observe(self._states.get(model.name, DemandState()), model, fleet, demand, now)
        self._states[model.name] = state
        decision = decide(model, wanted, fleet, demand, state, now)
        if is_spent(model, demand):
            self._log_change(
                model.name, f"{model.name} has used its {model.max_gpu_hours:g} GPU-hours: no replica is added"
            )
        failed = [r.replica for r in mine if r.state == "failed" and r.replica in self._started.get(model.name, ())]
        if not failed:
            self._logged.pop(f"{model.name} failed", None)
        if decision.target > fleet.serving and failed:  # the next one would fail, too
            why = "was added and failed: see its log, and `stop` it; until then no replica is added"
            self._log_change(f"{model.name} failed", f"{model.name}: {', '.join(failed)} {why}")
        elif decision.target > fleet.serving:
            self._grow(model, decision, fleet, now)
        elif decision.target < fleet.serving:
            self._shrink(model, decision, serving, now)

    def _grow(self, model: ModelConfig, decision: Decision, fleet: Fleet, now: float) -> None:
        self._log(f"{model.name}: {decision.reason}; {fleet.serving} → {decision.target} replicas")
        state = self._states[model.name]
        pause_s = min(RETRY_MOST_S, RETRY_S * 2**state.failures)
        failed = dataclasses.replace(state, retry_at=now + pause_s, failures=state.failures + 1)
        try:
            prepared = self._cluster.prepare(dataclasses.replace(model, replicas=decision.target))
            added = self._cluster.start_replicas(prepared, decision.target - fleet.serving)
        except (AgentInfraError, OSError) as error:
            self._states[model.name] = dataclasses.replace(failed, is_asleep=False)
            self._log(f"{model.name}: no replica can be started: {error}; it is tried again in {pause_s:g} s")
            return
        # Asleep until it is seen to start: this look's records don't show it yet.
        self._states[model.name] = DemandState(is_asleep=state.is_asleep, failures=state.failures)
        if is_scaled(model):
            self._started.setdefault(model.name, set()).update(record.replica for record in added)
            self._deployment.want({model.name: decision.target})

    def _shrink(self, model: ModelConfig, decision: Decision, serving: Sequence[ReplicaRecord], now: float) -> None:
        self._log(f"{model.name}: {decision.reason}; {len(serving)} → {decision.target} replicas")
        rows = {replica: {"inflight": count} for replica, count in self._traffic.turns().items()}
        for record in choose_to_stop(serving, rows, len(serving) - decision.target):
            self._leaving[record.replica] = Leaving(identify(record), now + LEAVE_S)
        self._save_leaving()
        self._states[model.name] = DemandState()
        self._deployment.want({model.name: decision.target})

    def _retire(self, records: Sequence[ReplicaRecord]) -> None:
        """End the replicas that are being removed and have no turn left, and clean up those that have ended."""
        known = {record.replica: record for record in records}
        for replica, leaving in list(self._leaving.items()):
            record = known.get(replica)
            if record is None or record.state in ("stopped", "failed"):
                self._cluster.wait_stopped([replica], time.monotonic())
            elif identify(record) == leaving.identity:
                if self._traffic.drain(replica) == 0 or self._clock() >= leaving.until:
                    self._cluster.stop([replica])
                continue
            del self._leaving[replica]
            self._save_leaving()

    def _save_leaving(self) -> None:
        identities = {replica: leaving.identity for replica, leaving in self._leaving.items()}
        with contextlib.suppress(OSError):  # on a full disk: the next controller takes them for replicas that stay
            write_atomically(self._deployment.paths.leaving, json.dumps(identities))

    def _log_change(self, topic: str, line: str) -> None:
        """Log a line of a topic, unless it is the last one that was logged."""
        if self._logged.get(topic) != line:
            self._logged[topic] = line
            self._log(line)

"""Orchestration: what the command line and the library do with a deployment: start, connect, status, stop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_infra_core.clusters import (
    Cluster,
    DeploymentPaths,
    LocalCluster,
    LocalCommands,
    SlurmCluster,
    SlurmExamination,
    _words_of,
    count_gres,
    deployment_paths,
    end_process,
    find_engine,
    gpu_pool,
    has_packaged_model,
    list_gpus,
    model_cache,
    read_or_make_key,
    resolve_model_path,
)
from agent_infra_core.configuration import (
    CLUSTER_TYPES,
    PACKAGED_MODEL,
    ClusterConfig,
    Config,
    ModelConfig,
    config_from_json,
    load_config,
    reached_host,
)
from agent_infra_core.controller import (
    DRAIN_S,
    HANDOVER_RESERVE_S,
    RELAY_END_S,
    Controller,
    Succession,
    describe_replica,
    listen_on,
    plan_handover,
    read_relay_record,
)
from agent_infra_core.engines import ENGINES, check_engine_args
from agent_infra_core.errors import PROGRAM_PACKAGES, AgentInfraError, ConfigError, RefusedError, require_packages
from agent_infra_core.node import (
    HUB_FAILURES,
    HUB_UNREACHABLE,
    ReplicaRecord,
    _known_fields,
    http_get,
    hub_cache,
    is_free,
    is_hub_id,
    is_in_hub_cache,
    process_stamp,
    write_atomically,
)
from agent_infra_core.tunnels import LoginHost, TunnelSet

LIBRARY_HOLDER = "ConnectionManager"  # in the lock: not a process of ours, so not one to be ended
SERVING_STATES = ("pending", "starting", "loading", "ready")  # what counts towards a model's wanted replicas
LIVE_STATES = (*SERVING_STATES, "draining")
ENDING_S = 10.0  # for replicas to be gone that were ended at once
SCALE_DRAIN_S = 300.0  # that a replica's turns have to end when `scale` takes it away
STARTING_POLL_S = 5.0  # at most, between looks at replicas that somebody waits for
STATS_OLD_S = 10.0  # a /stats document that is older says nothing of now: its controller is gone, or hangs
LOAD_DEADLINE_S = 3600.0  # for a replica to be ready; `serve` has the same patience with its engine


class DeploymentLock:
    """The right to be a deployment's controller: an flock that the kernel gives back when its holder dies."""

    def __init__(self, paths: DeploymentPaths) -> None:
        self._path = paths.lock
        self._file: int | None = None

    def acquire(self, verb: str) -> None:
        """Take the lock; RefusedError, naming who has it, when another controller runs."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            holder = lock_holder(self._path) or {"verb": "another command", "pid": "?"}
            raise RefusedError(
                f"the deployment {self._path.parent.name} is already run by `{holder['verb']}` (pid {holder['pid']}); "
                "end that with `agent_infra.py stop`, or give this one another cluster.name"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "verb": verb}).encode(), 0)
        self._file = descriptor

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def lock_holder(path: Path) -> dict[str, Any] | None:
    """``{pid, verb}`` of the process that holds a deployment's lock; None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(ValueError):
            holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
            return holder
        return {"pid": 0, "verb": "another command"}
    finally:
        os.close(descriptor)
    return None


def read_successions(paths: DeploymentPaths) -> dict[str, Succession]:
    """Replica → what replaces it, as a controller noted it."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        told = json.loads(paths.handover.read_text(encoding="utf-8"))
        return {name: Succession(**_known_fields(Succession, each)) for name, each in told.items()}
    return {}


def kept_config(paths: DeploymentPaths) -> Config | None:
    """The configuration that the deployment was started with; None when nothing, or nothing readable, was kept."""
    with contextlib.suppress(OSError, ConfigError):
        return config_from_json(paths.config.read_text(encoding="utf-8"))
    return None


@dataclass(frozen=True)
class ProxyClient:
    """The deployment's running proxy, asked over its own HTTP interface with the clients' key."""

    host: str
    port: int
    key: str

    def get(self, path: str) -> dict[str, Any]:
        """The JSON document at ``path``; empty when there is none within a few seconds."""
        status, body = http_get(self.host, self.port, path, self.key, timeout_s=5.0)
        with contextlib.suppress(ValueError):
            document = json.loads(body) if status == 200 else {}
            return document if isinstance(document, dict) else {}
        return {}

    def stats(self) -> dict[str, Any]:
        """The /stats document; empty when there is none, or none that is new enough to go by."""
        document = self.get("/stats")
        return document if document.get("snapshot_age_ms", 0) <= 1000 * STATS_OLD_S else {}

    def backends(self) -> dict[str, dict[str, Any]]:
        """Replica → its row of /stats."""
        return {row["id"]: row for row in self.stats().get("backends", ())}

    def drain(self, replica: str, operation: str = "drain") -> int | None:
        """Let a replica have no new turns (or again: ``undrain``); how many it has now, None when nobody answered."""
        path = f"/admin/backends/{replica}/{operation}"
        status, body = http_get(self.host, self.port, path, self.key, method="POST", timeout_s=5.0)
        if status != 200:
            return 0 if status == 404 else None  # 404: the proxy routes nothing there
        return int(json.loads(body)["in_flight"])


def cheapest_to_end(
    records: Iterable[ReplicaRecord], rows: Mapping[str, Mapping[str, Any]], count: int
) -> list[ReplicaRecord]:
    """Which ``count`` replicas to take away: such as serve nobody yet, then those with the fewest turns and sessions.

    ``rows`` are the proxy's, by replica; one that drains already goes first, and of equals the latest started.
    """

    def cost(record: ReplicaRecord) -> tuple[int, bool, int, int, float]:
        row = rows.get(record.replica, {})
        is_kept = row.get("state") != "draining"
        load = (row.get("inflight") or 0, row.get("sessions") or 0)
        return (SERVING_STATES.index(record.state), is_kept, *load, -record.started_at)

    return sorted(records, key=cost)[:count]


def count_missing(model: ModelConfig, serving: Iterable[ReplicaRecord], report: Callable[[str], None]) -> int:
    """How many replicas of a model are to be started; ``report`` is told how many of it serve already."""
    present = sum(record.model == model.name for record in serving)
    if present:
        report(f"{model.name}: {present} of {model.replicas} replicas run already")
    return max(0, model.replicas - present)


def summarize(
    model: str, wanted: int, records: Iterable[ReplicaRecord], rows: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A model's row in `status`: ``{name, wanted, running, ready, idle, in_flight, sessions}``.

    ``idle`` replicas ended by themselves, as configured.  ``rows`` are /stats's backends; without them turns in flight
    and sessions are not known (None).
    """
    states = collections.Counter(
        "idle" if record.is_idle and record.state == "stopped" else record.state
        for record in records
        if record.model == model
    )
    served = [row for row in rows if row["model"] == model]
    counts = {
        name: sum(row[key] or 0 for row in served) for name, key in (("in_flight", "inflight"), ("sessions",) * 2)
    }
    return {
        "name": model,
        "wanted": wanted,
        "running": sum(states[state] for state in LIVE_STATES),
        "ready": states["ready"],
        "idle": states["idle"],
        **(counts if served else dict.fromkeys(counts)),
    }


def explain_state(record: ReplicaRecord) -> str:
    """What describe_replica() leaves out: what to do about a failure, what a job waits for."""
    if record.failure is not None:
        return f"; {record.failure.hint}"
    return f": {record.message}" if record.state == "pending" and record.message else ""


def what_is_amiss(models: Sequence[Mapping[str, Any]], records: Sequence[ReplicaRecord]) -> list[str]:
    """Why replicas are not as they were wanted; ``models`` are rows of summarize()."""
    short = {row["name"] for row in models if row["ready"] + row["idle"] < row["wanted"]}
    reasons = [
        f"{record.replica} is {describe_replica(record)}" + explain_state(record)
        for record in records
        if record.state == "failed" or (record.state != "ready" and not record.is_idle and record.model in short)
    ]
    present = collections.Counter(record.model for record in records)
    reasons += [
        f"{row['running']} of {row['wanted']} replicas of {row['name']} run; `start` starts what is missing"
        for row in models
        if present[row["name"]] < row["wanted"]
    ]
    return reasons


def make_cluster(
    config: ClusterConfig,
    paths: DeploymentPaths,
    login: LoginHost | None,
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> Cluster:
    """The cluster that a configuration names; ``login`` is the host that it is used from, None where that is here."""
    if config.type == "local":
        return LocalCluster(paths, serve_command(), environment, report)
    return SlurmCluster(config, paths, login or LocalCommands(environment), environment, report)


def end_controller(paths: DeploymentPaths, now: bool) -> list[str]:
    """End the process that holds the deployment's lock, by its own orderly way; by force when that fails."""
    holder = lock_holder(paths.lock)
    if holder is None:
        return []
    if holder["verb"] == LIBRARY_HOLDER:
        raise AgentInfraError(
            f"the deployment is run by a program that imported agent_infra (pid {holder['pid']}); "
            "let that program call stop(), or end it, then stop again"
        )
    stamp = process_stamp(holder["pid"]) if holder["pid"] else None
    if stamp is None:
        raise AgentInfraError(f"{paths.lock} is locked by a process on another machine; stop it there")
    os.kill(holder["pid"], signal.SIGTERM)
    deadline = time.monotonic() + (10.0 if now else 2 * DRAIN_S + 10.0)
    while process_stamp(holder["pid"]) == stamp and time.monotonic() < deadline:
        time.sleep(0.05)
        if now:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)
    end_process(holder["pid"], stamp, 0.0)
    return [f"`{holder['verb']}` (pid {holder['pid']})"]


@contextlib.contextmanager
def ending_what_is_new(cluster: Cluster, models: Collection[str]) -> Iterator[None]:
    """Where the block fails, the replicas of ``models`` that did not run before it are ended."""
    before = {record.replica for record in cluster.replicas() if record.state in LIVE_STATES}
    try:
        yield
    except BaseException:
        with contextlib.suppress(AgentInfraError, OSError):  # the first error is the one to tell
            new = [r.replica for r in cluster.replicas() if r.model in models and r.replica not in before]
            cluster.stop(new, now=True)
            cluster.wait_stopped(new, time.monotonic() + ENDING_S)
        raise


class Deployment:
    """A deployment from the operator's side: start its replicas, connect a proxy to them, show it, stop it."""

    def __init__(
        self,
        config: Config,
        report: Callable[[str], None],
        environment: Mapping[str, str],
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``report`` takes lines for the operator, ``ask`` asks for a secret (None: nobody is there to be asked).

        Raises RefusedError when the state directory cannot be written.
        """
        self.config, self.report, self.environment = config, report, environment
        self.paths = deployment_paths(config.cluster.name, environment)
        self.login: LoginHost | None = None
        if config.cluster.ssh is not None:
            self.login = LoginHost(config.cluster, environment, str(self.paths.root), ask)
        self.cluster = make_cluster(config.cluster, self.paths, self.login, environment, report)
        self._lock = DeploymentLock(self.paths)
        self.controller: Controller | None = None
        self._handover: Handover | None = None

    def select_models(self, name: str | None = None, replicas: int | None = None) -> list[ModelConfig]:
        """The models to start: all of them, or the one called ``name``; RefusedError when there is none."""
        models = [model for model in self.config.models if name in (None, model.name)]
        if not models:
            known = ", ".join(model.name for model in self.config.models)
            raise RefusedError(f"no model is called {name}; the configuration has {known}")
        return [dataclasses.replace(model, replicas=replicas or model.replicas) for model in models]

    def start(self, models: Sequence[ModelConfig]) -> list[ReplicaRecord]:
        """Start what is missing of every model's replicas: all, or none that stays; all is checked before."""
        prepared = [self.cluster.prepare(model) for model in models]
        running, started = self.serving(), list[ReplicaRecord]()
        self.want({model.name: model.replicas for model in models})
        with ending_what_is_new(self.cluster, {model.name for model in models}):
            for model in prepared:
                if missing := count_missing(model, running, self.report):
                    started += self.cluster.start_replicas(model, missing)
        return started

    def serving(self) -> list[ReplicaRecord]:
        """The replicas that count towards the wanted number: of one that is being replaced and its successor, one."""
        records, successions = self.cluster.replicas(), read_successions(self.paths)
        serving = {record.replica: record for record in records if record.state in SERVING_STATES}
        doubles = {s.successor for old, s in successions.items() if old in serving and serving[old].job_id == s.job}
        return [record for name, record in serving.items() if name not in doubles]

    def wanted(self) -> dict[str, int]:
        """Model → how many replicas shall run: what `start` or `scale` said last, else what the configuration says."""
        told: Any = None
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.paths.wanted.read_text(encoding="utf-8"))
        counts = told if isinstance(told, dict) else {}
        return {model.name: counts.get(model.name, model.replicas) for model in self.config.models}

    def want(self, counts: Mapping[str, int]) -> None:
        """Note how many replicas of these models shall run, and the configuration that says what they are."""
        write_atomically(self.paths.wanted, json.dumps({**self.wanted(), **counts}))
        self.keep_config()

    def keep_config(self) -> None:
        """Note the configuration for `stop`, which must work whatever becomes of its file."""
        write_atomically(self.paths.config, json.dumps(dataclasses.asdict(self.config)))

    def proxy(self) -> ProxyClient | None:
        """The deployment's proxy, if one runs."""
        relay = read_relay_record(self.paths)
        if relay is None:
            return None
        return ProxyClient(reached_host(relay["host"]), relay["port"], client_key(self.config, self.paths))

    def wait_ready(
        self,
        show: Callable[[Sequence[ReplicaRecord]], None],
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
    ) -> None:
        """Show the replicas until each is ready or has failed; AgentInfraError when none of a model's is ready.

        ``only`` these replicas, and then none of them may fail.
        """
        deadline = time.monotonic() + LOAD_DEADLINE_S
        while not should_stop():
            records = [record for record in self.cluster.replicas() if only is None or record.replica in only]
            show(records)
            if all(record.state not in ("pending", "starting", "loading") for record in records):
                break
            if time.monotonic() > deadline:
                raise AgentInfraError(f"not ready after {LOAD_DEADLINE_S:g} s; see `agent_infra.py logs`")
            time.sleep(min(self.cluster.poll_s, STARTING_POLL_S))
        else:
            return
        ready = {record.model for record in records if record.state == "ready"} if only is None else set()
        failed = [record for record in records if record.failure is not None and record.model not in ready]
        if failed:
            raise AgentInfraError("; ".join(explain_failure(record, self.cluster) for record in failed))

    def claim(self, verb: str) -> None:
        """Become the deployment's controller, unless it is this one; RefusedError when another is."""
        if not self._lock.is_held:
            self._lock.acquire(verb)
        if self.login is not None:
            self.login.lead()

    def connect(self, log_format: str = "text", expected: Sequence[ModelConfig] = ()) -> Controller:
        """Start the controller and its relay; needs claim(). RefusedError when the port is taken.

        Turns for ``expected`` models, which the caller is about to start, wait for them.
        """
        keys = (client_key(self.config, self.paths), self.cluster.replica_key())
        with contextlib.suppress(OSError):  # on a full disk it serves all the same
            self.keep_config()
        tunnels = None
        if self.config.cluster.type != "local":
            tunnels = TunnelSet(self.config.cluster, self.login, keys[1])
        controller = Controller(
            self.config,
            self.paths,
            self._look,
            keys=keys,
            log_format=log_format,
            pause_s=self.cluster.poll_s,
            tunnels=tunnels,
        )
        controller.expected = frozenset(model.name for model in expected)
        if isinstance(self.cluster, SlurmCluster) and self.config.cluster.slurm.handover:
            self._handover = Handover(self, self.cluster)
        self.controller = controller
        controller.start()
        return controller

    def _look(self) -> list[ReplicaRecord]:
        """The replicas; those whose walltime nears its end are replaced on the way, once the controller runs."""
        records = self.cluster.replicas()
        if self._handover is not None and self.controller is not None and self.controller.is_running:
            self._handover.follow(records)
        return records

    def disconnect(self, grace_s: float) -> None:
        """Stop the controller and its relay, if this process runs them; turns in flight have ``grace_s`` to end."""
        if self.controller is not None:
            self.controller.stop(grace_s)
            self.controller = None
        self._lock.release()

    def status(self) -> dict[str, Any]:
        """``{deployment, models, replicas, proxy: {pid, host, port, controller} | None, …}``.

        ``models`` are rows of summarize(), ``replicas`` ReplicaRecords, ``accounting`` is /stats's (None without a
        proxy), ``handover`` maps a replica to its Succession, ``degraded`` are the reasons why this is not what was
        wanted.
        """
        records = [r for r in self.cluster.replicas() if r.state != "stopped" or r.is_idle]
        wanted = self.wanted()
        relay, holder, proxy = read_relay_record(self.paths), lock_holder(self.paths.lock), self.proxy()
        stats = proxy.stats() if proxy else {}
        models = [summarize(name, wanted[name], records, stats.get("backends", ())) for name in wanted]
        successions = read_successions(self.paths)
        degraded = what_is_amiss(models, records)
        if self.cluster.problem:
            degraded.append(self.cluster.problem)
        if relay is None:
            degraded.append("no proxy runs; `connect` starts one")
        elif holder is None:
            degraded.append("the proxy runs without its controller; `connect` takes it over")
        return {
            "deployment": self.config.cluster.name,
            "models": models,
            "replicas": [dataclasses.asdict(record) for record in records],
            "proxy": relay and {**relay, "controller": holder},
            "accounting": stats.get("accounting"),
            "handover": {replica: dataclasses.asdict(each) for replica, each in successions.items()},
            "degraded": degraded,
        }

    def stop(self, now: bool = False) -> list[str]:
        """End whatever of the deployment runs: its controller and relay, then its replicas. Names what was ended.

        Turns in flight have DRAIN_S to end, none with ``now``.  Safe to call again; touches no other deployment.
        Raises AgentInfraError when something still runs at the end.
        """
        records = [r for r in self.cluster.replicas() if r.state in LIVE_STATES]
        ended = [] if self._lock.is_held else end_controller(self.paths, now)
        if self.controller is not None:
            ended.append("proxy")
        self.disconnect(0.0 if now else DRAIN_S)
        relay = read_relay_record(self.paths)
        if relay is not None:
            end_process(relay["pid"], relay["process"], 0.0 if now else DRAIN_S + RELAY_END_S)
            ended.append(f"proxy (pid {relay['pid']})")
        for leftover in (self.paths.relay_record, self.paths.relay_socket):
            leftover.unlink(missing_ok=True)
        names = [record.replica for record in self.cluster.replicas()]
        self.cluster.stop(names, now)
        left = self.cluster.wait_stopped(names, time.monotonic() + DRAIN_S + 10.0)
        if left and not now:
            self.cluster.stop(left, now=True)
            left = self.cluster.wait_stopped(left, time.monotonic() + ENDING_S)
        if left:
            raise AgentInfraError(f"{', '.join(left)} did not end; see `agent_infra.py logs`")
        for leftover in (self.paths.wanted, self.paths.config, self.paths.handover):
            leftover.unlink(missing_ok=True)
        return ended + [record.replica + (f" (job {record.job_id})" if record.job_id else "") for record in records]


class Scaling:
    """Changes how many replicas of a model run: starts what is missing, drains what is too many, and ends it."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._cluster = deployment.cluster

    def scale(self, name: str, replicas: int) -> tuple[list[ReplicaRecord], list[ReplicaRecord]]:
        """Make ``replicas`` the wanted number of a model: start what is missing, choose what is to go (see retire()).

        Returns the replicas that were started and those that are too many.
        """
        [model] = self._deployment.select_models(name)
        running = [record for record in self._deployment.serving() if record.model == name]
        proxy = self._deployment.proxy()
        rows = proxy.backends() if proxy else {}
        surplus = cheapest_to_end(running, rows, max(0, len(running) - replicas))
        for record in running:
            if proxy and record not in surplus and rows.get(record.replica, {}).get("state") == "draining":
                proxy.drain(record.replica, "undrain")  # an earlier `scale` was to take it away
        if len(running) < replicas:
            return self._deployment.start([dataclasses.replace(model, replicas=replicas)]), []
        self._deployment.want({name: replicas})
        leaving = {record.replica for record in surplus}
        heirs = {each.successor for old, each in read_successions(self._deployment.paths).items() if old in leaving}
        return [], surplus + [record for record in self._cluster.replicas() if record.replica in heirs]

    def retire(self, records: Iterable[ReplicaRecord], grace_s: float, should_stop: Callable[[], bool]) -> list[str]:
        """Drain replicas: no new turns; each ends when its last turn has ended, or when ``grace_s`` are over.

        Returns the replicas that ended; those left when ``should_stop`` says so stay drained.
        """
        waiting, ended = [record.replica for record in records], list[str]()
        deadline = time.monotonic() + grace_s
        turns: Mapping[str, int | None] = {}
        while waiting and not should_stop():
            proxy, is_late, before = self._deployment.proxy(), time.monotonic() >= deadline, turns
            turns = {replica: proxy.drain(replica) if proxy else 0 for replica in waiting}
            for replica, count in turns.items():
                if count and (is_late or count != before.get(replica)):
                    self._deployment.report(f"{replica}: {count} turns {'are cut' if is_late else 'still in flight'}")
            idle = [replica for replica in waiting if is_late or turns[replica] == 0]
            self._cluster.stop(idle, now=grace_s == 0)
            ended += idle
            waiting = [replica for replica in waiting if replica not in idle]
            time.sleep(0.25 if waiting else 0.0)
        left = self._cluster.wait_stopped(ended, time.monotonic() + DRAIN_S + 10.0)
        if left:
            raise AgentInfraError(f"{', '.join(left)} did not end; see `agent_infra.py logs`")
        return ended


# --- Handover: the steps of plan_handover(), taken. ------------------------------------------------------------------
class Handover:
    """Replaces replicas before the walltime of their jobs ends; handover.json says what is under way.

    Its steps are taken where the replicas are looked at, after each look, so that they never act on an older one.
    """

    def __init__(self, deployment: Deployment, cluster: SlurmCluster) -> None:
        self._deployment, self._cluster = deployment, cluster
        self._log = deployment.report
        self._successions = read_successions(deployment.paths)
        self._lock = threading.Lock()
        self._told: dict[str, tuple[str, Succession | None]] = {}  # replica → the step that the log told of, on what
        self._problem: str | None = None  # the error that the log told of

    def follow(self, records: Sequence[ReplicaRecord]) -> None:
        """Take the next steps, if need be; nothing while Slurm does not answer."""
        if not self._cluster.problem and self._lock.acquire(blocking=False):
            try:
                self._follow({record.replica: record for record in records})
                self._problem = None
            except Exception as error:  # noqa: BLE001  whatever fails here must not keep the replicas from being seen
                if self._problem != repr(error):
                    self._log(f"handover: {error!r}; it is tried again at each look")
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
                self._drain(step.replica)
            elif step.action == "forget":
                self._forget(step.replica, known)

    def _submit(self, olds: Sequence[ReplicaRecord], after: str | None = None) -> None:
        """Submit successors of replicas that one job holds; where that fails, later, or once they have ended."""
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
        except (AgentInfraError, OSError) as error:  # an attempt all the same: the job may be there
            note = f"cannot be submitted yet: {error}"
            self._log(f"handover: the successor of {olds[0].replica} {note}")
        for old, name, count in zip(olds, names, attempts, strict=True):
            self._note(old.replica, Succession(old.job_id, name, bool(after) or not name, count, note, time.time()))

    def _postpone(self, old: ReplicaRecord) -> None:
        successor = self._successions[old.replica].successor
        self._cluster.stop([successor], now=True)
        self._cluster.wait_stopped([successor], time.monotonic() + DRAIN_S)
        self._submit([old], after=old.job_id)

    def _drain(self, replica: str) -> None:
        """No new turns for it; once it has none any more, it ends."""
        proxy = self._deployment.proxy()
        if proxy is not None and proxy.drain(replica) == 0:
            self._cluster.stop([replica])

    def _forget(self, replica: str, known: Mapping[str, ReplicaRecord]) -> None:
        """The replica has ended. Where nothing was submitted to replace it, that is possible now."""
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
        document = {name: dataclasses.asdict(each) for name, each in self._successions.items()}
        with contextlib.suppress(OSError):  # on a full disk the next controller may submit one too many
            write_atomically(self._deployment.paths.handover, json.dumps(document))


def explain_failure(record: ReplicaRecord, cluster: Cluster) -> str:
    """What became of a replica, the line that says why, and what to do."""
    failure = record.failure
    reason = f"{failure.kind}: {failure.line}; {failure.hint}" if failure else record.message or "it stopped"
    return f"{record.replica} failed: {reason} (log: {cluster.logs.where(record.replica)})"


# --- Doctor: what can be known before anything is started. A newcomer adds a check by adding a row to CHECKS. --------
@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: how what was looked at is, and what to do about it."""

    level: str  # ok | warning (it may work all the same) | error (it will not)
    text: str
    fix: str | None = None
    check: str = ""  # the name of the row of CHECKS


@dataclass(frozen=True)
class Check:
    """One row of CHECKS."""

    name: str
    run: Callable[[Deployment], Iterable[Finding]]  # AgentInfraError and OSError are findings too
    clusters: tuple[str, ...] = CLUSTER_TYPES  # where it applies
    decides: bool = False  # after an error here nothing further can be looked at
    needs_job: bool = False  # only with `doctor --job`


def examine(deployment: Deployment, with_job: bool = False) -> Iterator[Finding]:
    """Run every check that applies, in order."""
    for check in CHECKS:
        if deployment.config.cluster.type not in check.clusters or (check.needs_job and not with_job):
            continue
        levels = set()
        try:
            for finding in check.run(deployment):
                levels.add(finding.level)
                yield dataclasses.replace(finding, check=check.name)
        except (AgentInfraError, OSError) as error:
            levels.add("error")
            yield Finding("error", str(error), check=check.name)
        if check.decides and "error" in levels:
            return


def _check_configuration(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        check_engine_args(model)
        yield Finding("ok", f"model {model.name}: {model.replicas} × {model.model_path} on {model.engine}")


MIN_DESCRIPTORS = 4096  # each turn in flight holds two: the client's and the replica's
MIN_FREE_BYTES = 1 << 30


def _check_packages(_: Deployment) -> Iterator[Finding]:
    require_packages(PROGRAM_PACKAGES)
    yield Finding("ok", f"Python {sys.version.split()[0]} has all that the program needs")


def _check_descriptors(_: Deployment) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        yield Finding("ok", "as many as you like")
    elif limit < MIN_DESCRIPTORS:
        fix = f"raise it (ulimit -Hn {MIN_DESCRIPTORS}, limits.conf) for more than some {limit // 2} turns at once"
        yield Finding("warning", f"at most {limit}", fix)
    else:
        yield Finding("ok", f"at most {limit}, for half as many turns at once")


def _check_disk(deployment: Deployment) -> Iterator[Finding]:
    import shutil

    for what, path in (("state", deployment.paths.root), ("weights", model_cache(deployment.environment))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{what} in {path}: {free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK):
            fix = "make it writable, or set XDG_STATE_HOME and XDG_CACHE_HOME"
            yield Finding("error", f"{what}: {there} cannot be written", fix)
        elif free < MIN_FREE_BYTES:
            yield Finding("warning", text, "free some space there")
        else:
            yield Finding("ok", text)


def _check_proxy_port(deployment: Deployment) -> Iterator[Finding]:
    host, port = deployment.config.proxy.host, deployment.config.proxy.port
    relay = read_relay_record(deployment.paths)
    if relay is not None and (relay["host"], relay["port"]) == (host, port):
        yield Finding("ok", f"{host}:{port} is served by this deployment's proxy (pid {relay['pid']})")
    else:
        listen_on(host, port).close()
        yield Finding("ok", f"{host}:{port} is free" if port else f"any free one of {host}")


def _check_engines(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        found = find_engine(model, deployment.environment)
        yield Finding("ok", f"model {model.name}: engine {model.engine} is there: {found}")


def _check_gpus(deployment: Deployment) -> Iterator[Finding]:
    wanting = [model for model in deployment.config.models if ENGINES[model.engine].uses_gpus]
    pool = gpu_pool(list_gpus(deployment.environment), deployment.environment.get("CUDA_VISIBLE_DEVICES"))
    wanted = sum(model.replicas * model.tensor_parallel_size * model.pipeline_parallel_size for model in wanting)
    if not wanting:
        yield Finding("ok", "none is needed")
    elif not pool:
        fix = "look what `nvidia-smi -L` says; on the CPU vLLM needs its CPU build"
        yield Finding("warning", f"{wanted} wanted, none is seen here", fix)
    elif wanted > len(pool):
        yield Finding("error", f"{wanted} wanted, {len(pool)} here", "lower replicas or tensor_parallel_size")
    else:
        yield Finding("ok", f"{wanted} of {len(pool)} wanted")


def _check_engine_ports(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        span = range(model.base_port, min(model.base_port + 1000, 65536))
        first = next((port for port in span if is_free(port)), None)
        if first is None:
            yield Finding("error", f"model {model.name}: none is free from {model.base_port} on", "set base_port")
        else:
            moved = "" if first == model.base_port else f" ({model.base_port} is busy)"
            yield Finding("ok", f"model {model.name}: from {first} on{moved}")


def _check_weights(deployment: Deployment) -> Iterator[Finding]:
    cache = model_cache(deployment.environment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            words = "is fetched" if has_packaged_model(cache) else "will be fetched through pip at the first start"
            yield Finding("ok", f"model {model.name}: {model.model_path} {words}")
            continue
        path = resolve_model_path(model, lambda: cache)
        if os.path.exists(path):
            yield Finding("ok", f"model {model.name}: {path}")
        elif is_hub_id(path):  # else it is a word of the model's own command, which alone knows what it means
            environment = {**deployment.environment, **model.env}
            if is_in_hub_cache(path, environment):
                yield Finding("ok", f"model {model.name}: {path} is in {hub_cache(environment)}")
            else:
                yield probe_hub(path, environment)


def probe_hub(repository: str, environment: Mapping[str, str]) -> Finding:
    """Whether the hub would give a model that is not fetched yet, with the token that this environment has."""
    import requests

    endpoint, token = environment.get("HF_ENDPOINT") or "https://huggingface.co", environment.get("HF_TOKEN")
    url, where = f"{endpoint.rstrip('/')}/{repository}/resolve/main/config.json", f"{repository} is not fetched yet"
    try:
        answer = requests.head(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=10)
    except requests.RequestException as error:
        fix = f"{HUB_UNREACHABLE}; or `pull` where there is a network, into the same HF_HOME"
        return Finding("warning", f"{where} ({error})", fix)
    if answer.status_code in (401, 403):
        is_gated = answer.headers.get("X-Error-Code") == "GatedRepo"
        return Finding("error", where, HUB_FAILURES["GatedRepoError" if is_gated else "RepositoryNotFoundError"])
    if answer.status_code >= 400:
        return Finding("warning", f"{where}; the hub says {answer.status_code}", "look whether model_path is right")
    return Finding("ok", f"{where}; the hub has it, `pull` fetches it ahead")


def _slurm(deployment: Deployment) -> SlurmCluster:
    """The deployment's cluster, of which the caller knows that it is one of Slurm."""
    assert isinstance(deployment.cluster, SlurmCluster)  # noqa: S101 (for the type checker)
    return deployment.cluster


def _check_host(deployment: Deployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.shell(
        "uname -n; for name in sbatch squeue scontrol scancel; do command -v $name; done"
    )
    name, *found = done.output.decode("utf-8", "replace").split()
    where = f"{name}" if deployment.config.cluster.ssh is None else f"{name}, over SSH"
    if len(found) == 4:
        yield Finding("ok", where)
    else:
        fix = "set cluster.ssh to the cluster's login host, or put them on PATH (not only of login shells)"
        yield Finding("error", f"{where}: Slurm's commands are not there", fix)


def _check_slurm(deployment: Deployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.shell("sbatch --version; scontrol ping")
    lines = done.output.decode("utf-8", "replace").splitlines()
    said = [" ".join(line.split()) for line in lines if line.strip()]
    if any(" UP" in line for line in said):
        yield Finding("ok", "; ".join(said))
        return
    words = "; ".join([*said, _words_of(done)] if done.errors else said)
    fix = "wait, or tell the administrators"
    if "configuration" in words:  # neither a slurm.conf nor a server that would give one
        fix = "set cluster.ssh to the cluster's login host, or SLURM_CONF to its slurm.conf"
    yield Finding("error", words or "scontrol ping says nothing", fix)


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Name → fields of every partition that `scontrol --oneliner show partition` printed."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def _check_partitions(deployment: Deployment) -> Iterator[Finding]:
    host = _slurm(deployment).host
    nodes = host.nodes()  # RefusedError names a partition that does not exist
    rows = parse_partitions(host.shell("LC_ALL=C scontrol --oneliner show partition").output.decode("utf-8", "replace"))
    needs_gpus = any(ENGINES[model.engine].uses_gpus for model in deployment.config.models)
    for partition in deployment.config.cluster.slurm.partitions:
        key = f"{partition.gres} on {partition.name}"
        members = [node for node in nodes if partition.name in node.partitions]
        most = max((count_gres(node.gres, partition.gres) for node in members), default=0)
        idle = sum(node.free(partition.gres) for node in members)
        state = rows.get(partition.name, {}).get("State", "UP")
        if state != "UP":
            yield Finding("warning", f"{partition.name} is {state}: jobs wait there", "prefer another one (priority)")
        elif needs_gpus and most < partition.gpus_per_node:
            kinds = ", ".join(sorted({name for node in members for name in node.gres})) or "no GRES"
            fix = f"correct gres or gpus_per_node; its nodes have {kinds}"
            yield Finding("error", f"{key}: no node has {partition.gpus_per_node}, the most is {most}", fix)
        else:
            gpus = f", {idle} × {partition.gres} idle" if needs_gpus else ""
            yield Finding("ok", f"{partition.name}: {len(members)} nodes{gpus}")


def _check_walltime(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    text = cluster.host.shell("LC_ALL=C scontrol --oneliner show partition").output.decode("utf-8", "replace")
    rows = parse_partitions(text)
    loads = [r.ready_at - r.started_at for r in cluster.replicas() if r.ready_at is not None]
    load_s = max(loads, default=EXPECTED_LOAD_S)
    for partition in deployment.config.cluster.slurm.partitions:
        row = rows.get(partition.name, {})
        limits = (partition.time_limit, row.get("DefaultTime"), row.get("MaxTime"))
        spans = [slurm_limit_s(limit) for limit in limits if limit and limit not in ("NONE", "n/a")]
        wanted_s, most_s = (spans[0], spans[-1]) if spans else (math.inf, math.inf)
        words = f"{partition.name}: {describe_span(wanted_s)}"
        if wanted_s > most_s:
            fix = f"lower time_limit to {row['MaxTime']}, or jobs wait for ever (PartitionTimeLimit)"
            yield Finding("error", f"{words}, the partition allows {describe_span(most_s)}", fix)
        elif wanted_s < 3 * (load_s + HANDOVER_RESERVE_S):
            measured = "took" if loads else "may take"
            fix = "raise time_limit: most of the time would go into loading and handing over"
            yield Finding("warning", f"{words}, of which loading {measured} {describe_span(load_s)}", fix)
        else:
            yield Finding("ok", words)


EXPECTED_LOAD_S = 300.0  # of a model that was never loaded here


def slurm_limit_s(text: str) -> float:
    """A time limit as sbatch takes it or scontrol prints it, in s: minutes, h:m:s, d-h and so on; inf for none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return math.inf
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:  # d-h[:m[:s]]
        hours, minutes, seconds = first or 0, second or 0, third or 0
    elif third is not None:  # h:m:s
        hours, minutes, seconds = first or 0, second or 0, third
    else:  # m[:s]
        hours, minutes, seconds = 0, first or 0, second or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def describe_span(seconds: float) -> str:
    """A span of time in words for people: ``2 h``, ``90 min``, ``45 s``, ``no limit``."""
    if seconds == math.inf:
        return "no limit"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.0f} s"


def _check_accounts(deployment: Deployment) -> Iterator[Finding]:
    slurm = deployment.config.cluster.slurm
    script = "LC_ALL=C; export LC_ALL; scontrol show config | grep '^AccountingStorageType'; "
    script += 'sacctmgr -nP show assoc user="$(id -un)" format=account,partition,qos 2> /dev/null'
    first, _, rest = _slurm(deployment).host.shell(script).output.decode("utf-8", "replace").partition("\n")
    asked = {name for name in (slurm.default_qos, *(each.qos for each in slurm.partitions)) if name}
    account = slurm.sbatch.get("account")
    if "none" in first.lower() or not rest.strip():
        level = "warning" if asked or account else "ok"
        fix = "look whether they are right: nobody else will" if asked or account else None
        yield Finding(level, "Slurm keeps no accounts that can be asked: any QoS and account is taken", fix)
        return
    rows = [line.split("|") for line in rest.splitlines() if line.count("|") == 2]
    known = {qos for _, _, names in rows for qos in names.split(",") if qos}
    for name in sorted(asked - known):
        yield Finding("error", f"QoS {name} is not yours", f"yours are {', '.join(sorted(known)) or 'none'}")
    if account and account not in {row[0] for row in rows}:
        yield Finding(
            "error", f"account {account} is not yours", f"yours: {', '.join(sorted({row[0] for row in rows}))}"
        )
    yield Finding("ok", f"accounts {', '.join(sorted({row[0] for row in rows}))}; QoS {', '.join(sorted(known))}")


def _check_work_dir(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    cluster.replica_key()  # makes the directories, and copies this file there
    done = cluster.host.shell('df -Pk "$1" | tail -n 1; stat -f -c %T "$1"', cluster.host.work_dir)
    line, _, kind = done.output.decode("utf-8", "replace").strip().partition("\n")
    free = int(line.split()[3]) * 1024 if len(line.split()) > 3 and line.split()[3].isdecimal() else None
    where = f"{cluster.host.work_dir} ({kind or 'unknown file system'})"
    if kind in ("tmpfs", "ramfs", "overlayfs"):
        fix = "set cluster.slurm.work_dir to the file system that login and compute nodes share"
        yield Finding("warning", f"{where} is most likely this host's alone; `doctor --job` tells", fix)
    elif free is not None and free < MIN_FREE_BYTES:
        yield Finding("warning", f"{where}: {free / 1e9:.2f} GB free", "free some space there")
    else:
        yield Finding("ok", where + (f": {free / 1e9:.1f} GB free" if free is not None else ""))


def _check_cluster_weights(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            yield Finding("ok", f"model {model.name}: {PACKAGED_MODEL} is copied to work_dir at the first start")
            continue
        path = cluster.host.find_model(model)
        if model.engine == "vllm" and is_hub_id(path):
            found = probe_hub(path, {**deployment.environment, **model.env})
            fix = found.fix or "`pull` fetches it to where nodes read it, `doctor --job` tells whether they do"
            yield Finding(found.level, f"model {model.name}: {path}, asked from here: {found.text}", fix)
        else:
            yield Finding("ok", f"model {model.name}: {path}")


def _check_submission(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        said = SlurmExamination(_slurm(deployment), deployment.config.cluster).try_out(model)
        yield Finding("ok", f"model {model.name}: {said}")


def _check_job(deployment: Deployment) -> Iterator[Finding]:
    """What only a node can see, by a small job for each kind of model."""
    examination = SlurmExamination(_slurm(deployment), deployment.config.cluster)
    for model in deployment.config.models:
        if model.model_path == PACKAGED_MODEL:
            model = dataclasses.replace(model, model_path=deployment.cluster.pull(model))
        seen, why = examination.probe(model, PROBE_JOB_S)
        where = f"model {model.name}"
        if seen is None:
            yield Finding("error", f"{where}: {why}", "see what the job says; `status` explains why jobs wait")
            continue
        where += f" on {seen['node']}"
        yield Finding("ok", f"{where}: work_dir is shared, Python {seen['python']}")
        yield from judge_probe(model, where, seen)


PROBE_JOB_S = 300.0  # that a job of `doctor --job` may wait and run


def judge_probe(model: ModelConfig, where: str, seen: Mapping[str, Any]) -> Iterator[Finding]:
    """What a node's own look at itself (see probe_node()) means for a model."""
    package = ENGINES[model.engine].package
    if package and not seen["package"]:
        fix = "activate the environment that has it under cluster.slurm.setup, or set container"
        yield Finding("error", f"{where}: {package} is not installed for its Python", fix)
    elif package:
        yield Finding("ok", f"{where}: {package} {seen['package']}")
    wanted = model.tensor_parallel_size * model.pipeline_parallel_size if ENGINES[model.engine].uses_gpus else 0
    if len(seen["gpus"]) < min(1, wanted):
        yield Finding("warning", f"{where}: no GPU is seen", "look at gres; on the CPU vLLM needs its CPU build")
    elif wanted:
        yield Finding("ok", f"{where}: {', '.join(seen['gpus'])}")
    if seen["model"] == "missing":
        yield Finding("error", f"{where}: {model.model_path} is not there", "put it where the nodes can read it")
    elif seen["model"] == "remote" and not seen["hub"]:
        fix = "`pull` fetches it ahead; let HF_HOME (in the model's env) be where nodes read it too"
        yield Finding("error", f"{where}: {model.model_path} is not in the node's cache, and it has no network", fix)
    else:
        words = {"local": "is there", "cached": "is in its cache", "remote": "can be fetched from there"}[seen["model"]]
        yield Finding("ok", f"{where}: {model.model_path} {words}")


CHECKS: tuple[Check, ...] = (
    Check("configuration", _check_configuration),
    Check("packages", _check_packages),
    Check("open files", _check_descriptors),
    Check("disk", _check_disk),
    Check("proxy port", _check_proxy_port),
    Check("engines", _check_engines, ("local",)),
    Check("weights", _check_weights, ("local",)),
    Check("GPUs", _check_gpus, ("local",)),
    Check("engine ports", _check_engine_ports, ("local",)),
    Check("login host", _check_host, ("slurm",), decides=True),
    Check("Slurm", _check_slurm, ("slurm",), decides=True),
    Check("partitions", _check_partitions, ("slurm",)),
    Check("accounts", _check_accounts, ("slurm",)),
    Check("walltime", _check_walltime, ("slurm",)),
    Check("work_dir", _check_work_dir, ("slurm",)),
    Check("weights", _check_cluster_weights, ("slurm",)),
    Check("submission", _check_submission, ("slurm",)),
    Check("node", _check_job, ("slurm",), needs_job=True),
)


def serve_command() -> list[str]:
    """The words that start `serve` on this machine, with this Python and this file."""
    return [sys.executable, os.path.abspath(__file__), "serve"]


def client_key(config: Config, paths: DeploymentPaths) -> str:
    """The key that clients must send: the configuration's, else one made once and kept in the state directory."""
    return config.proxy.api_key or read_or_make_key(paths.client_key)


class ConnectionManager:
    """A deployment from Python, for asyncio: ``start``, ``connect``, ``status``, ``stop``, or ``async with`` for all.

    Whatever blocks runs in a thread, so the event loop never waits.  One task uses a manager at a time.
    """

    def __init__(self, config: Config | str | os.PathLike[str] | None = None) -> None:
        """``config``: a Config, the path of a YAML file, or None for ./config.yaml or the embedded default."""
        self.config = config if isinstance(config, Config) else load_config(config)
        self._deployment: Deployment | None = None
        self._messages: list[str] = []

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as ``base_url``, once connected."""
        controller = self._deployment.controller if self._deployment else None
        if controller is None:
            raise AgentInfraError("not connected; await connect() first")
        return f"{controller.url}/v1"

    @property
    def api_key(self) -> str:
        """What an OpenAI client takes as ``api_key``."""
        return client_key(self.config, self._open().paths)

    def _open(self) -> Deployment:
        if self._deployment is None:
            self._deployment = Deployment(self.config, self._messages.append, os.environ)
        return self._deployment

    async def start(self, model: str | None = None, replicas: int | None = None) -> None:
        """Start the replicas that are missing and wait until they are ready; AgentInfraError says why one is not."""
        import asyncio

        deployment = self._open()
        models = deployment.select_models(model, replicas)
        stopping = threading.Event()
        try:
            await asyncio.to_thread(deployment.start, models)
            await asyncio.to_thread(deployment.wait_ready, lambda _: None, stopping.is_set)
        finally:
            stopping.set()

    async def connect(self) -> str:
        """Start controller and proxy in the background of this process; returns ``base_url``."""
        import asyncio

        deployment = self._open()
        if deployment.controller is None:
            deployment.claim(LIBRARY_HOLDER)
            try:
                await asyncio.to_thread(deployment.connect)
            except BaseException:
                deployment.disconnect(0.0)
                raise
        return self.base_url

    async def status(self) -> dict[str, Any]:
        """See Deployment.status."""
        import asyncio

        return await asyncio.to_thread(self._open().status)

    async def stop(self, now: bool = False) -> list[str]:
        """End proxy and replicas; names what was ended. Safe to call again."""
        import asyncio

        deployment = self._open()
        ended = await asyncio.to_thread(deployment.stop, now)
        if deployment.login is not None:  # what is asked of it later makes another connection
            await asyncio.to_thread(deployment.login.close)
        return ended

    async def __aenter__(self) -> ConnectionManager:
        import asyncio

        stopping = threading.Event()
        entering = asyncio.ensure_future(asyncio.to_thread(self._enter, stopping.is_set))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            stopping.set()  # and nothing goes on behind the back of who cancelled
            [error] = await asyncio.gather(entering, return_exceptions=True)
            if error is None:  # too late: it is left as it was entered
                await self.stop(now=True)
            raise
        return self

    def _enter(self, should_stop: Callable[[], bool]) -> None:
        """Start and connect; where that fails, what it started is ended, and what ran before runs on."""
        deployment = self._open()
        models = deployment.select_models()
        deployment.claim(LIBRARY_HOLDER)  # ahead of all else: whom it is refused has nothing here to end
        try:
            with ending_what_is_new(deployment.cluster, {model.name for model in models}):
                deployment.start(models)
                deployment.wait_ready(lambda _: None, should_stop)
                if should_stop():
                    raise AgentInfraError("cancelled before the replicas were ready")
                if deployment.controller is None:
                    deployment.connect()
        except BaseException:
            deployment.disconnect(0.0)
            if deployment.login is not None:
                deployment.login.close()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

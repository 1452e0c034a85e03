"""What the command line and the library do with a deployment: start, connect, status, scale, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent_infra_core.bundle import build_node
from agent_infra_core.configuration import load_config
from agent_infra_core.control.controller import Controller
from agent_infra_core.control.handover import Handover, read_successions
from agent_infra_core.control.link import DRAIN_S, RELAY_END_S
from agent_infra_core.control.lock import LIBRARY_HOLDER, DeploymentLock, end_controller, lock_holder
from agent_infra_core.control.status import (
    LIVE_STATES,
    SERVING_STATES,
    ProxyClient,
    cheapest_to_end,
    count_missing,
    explain_failure,
    summarize,
    what_is_amiss,
)
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.cluster import Cluster
from agent_infra_core.fleet.engines import GUARDED_ENGINES
from agent_infra_core.fleet.local import LocalCluster
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import DeploymentPaths, client_key, deployment_paths, read_relay_record
from agent_infra_core.host import LocalCommands, end_process, self_command, write_atomically
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, Config, ModelConfig, reached_host
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.tunnels import TunnelSet
from agent_infra_core.templates import render_job

ENDING_S = 10.0  # for replicas to be gone that were ended at once
SCALE_DRAIN_S = 300.0  # that a replica's turns have to end when `scale` takes it away
STARTING_POLL_S = 5.0  # at most, between looks at replicas that somebody waits for
LOAD_DEADLINE_S = 3600.0  # for a replica to be ready; `serve` has the same patience with its engine


def make_cluster(
    config: ClusterConfig,
    paths: DeploymentPaths,
    login: LoginHost | None,
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> Cluster:
    """The cluster that a configuration names; ``login`` is the host that it is used from, None where that is here."""
    if config.type == "local":
        return LocalCluster(paths, self_command("serve"), environment, report)
    runner = login or LocalCommands(environment)
    return SlurmCluster(config, paths, runner, environment, report, render_job=render_job, archive=build_node)


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
            tunnels = TunnelSet(self.config.cluster, self.login, keys[1], GUARDED_ENGINES)
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

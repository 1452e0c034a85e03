"""The `serve` role: starts one engine, restarts it when it crashes or hangs, and keeps its record up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import is_missing, process_stamp, program_home, self_command, write_atomically
from agent_infra_core.node.failures import PERMANENT_FAILURES, classify_failure, describe_exit
from agent_infra_core.node.gate import Gate
from agent_infra_core.node.gpus import GpuSampler, sampled_gpus
from agent_infra_core.node.guard import server_identity
from agent_infra_core.node.health import EngineClient, IdleWatch
from agent_infra_core.node.hub import is_hub_id, is_in_hub_cache
from agent_infra_core.node.process import EngineProcess, StopSignals, Watcher, log_tail, open_log, reserve_port
from agent_infra_core.node.staging import StagingError, StagingStopped, stage_weights
from agent_infra_core.node.telemetry import LoadSampler, Telemetry
from agent_infra_core.protocol import ReplicaFailure, ReplicaRecord, ServeSpec, replace_placeholders, spec_from_json

LOAD_POLL_S = 0.1  # interval between checks of a loading engine
HEALTH_POLL_S = 5.0  # interval between checks of a ready engine
DRAIN_SETTLE_S = 0.5  # a draining engine is idle after this long without turns: some may still be on their way
IDLE_SETTLE_S = 5.0  # the same if it shuts itself down: the relay learns of it only when it next polls the load
END_MARGIN_S = 3.0  # part of stop_grace reserved for the engine's shutdown
MAX_RESTARTS = 3
IMPORT_S = 180.0  # time for an engine's package to be imported, from a slow file system
PROBE_HELD_S = 120.0  # how long the job of a probe waits for `doctor`
RESTARTS_RESET_AFTER_S = 600.0  # after this long healthy, earlier restarts no longer count


@dataclass(frozen=True)
class Launch:
    """One start of an engine."""

    argv: list[str]
    environment: dict[str, str]  # includes the key, which must never be in argv
    port: int
    identity: str  # with which the engine answers the keyed challenge
    master: tuple[str, int]  # address and port where the nodes of a replica meet


def engine_environment(spec: ServeSpec) -> dict[str, str]:
    """Return an engine's environment, without the variables that each start adds."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **spec.env}
    if spec.gpu_ids:
        # NVML numbers GPUs in bus order; by default CUDA starts with the fastest.
        environment.update(CUDA_VISIBLE_DEVICES=",".join(spec.gpu_ids), CUDA_DEVICE_ORDER="PCI_BUS_ID")
    return environment


def engine_host(spec: ServeSpec) -> str:
    """Return the address that the engine listens on."""
    return "127.0.0.1" if spec.is_gated else spec.bind_host


def make_launch(
    spec: ServeSpec,
    key: str,
    port: int,
    master: tuple[str, int] | None = None,
    node_rank: int = 0,
    engine_port: int | None = None,
    weights: str | None = None,
) -> Launch:
    """Prepare a run of the engine. With ``master`` None and several nodes, choose the port where they meet.

    ``port`` is the one that others connect to; the engine listens on ``engine_port``, if that is another one.
    ``weights`` is where the model's copy on this node is, if it was staged.
    """
    if master is None:
        master = ("", 0)
        if spec.nodes > 1:
            with socket.create_server(("", 0)) as probe:
                master = (advertised_host("0.0.0.0"), probe.getsockname()[1])  # noqa: S104 (where others find this node)
    environment, engine = engine_environment(spec), spec.engine
    identity = server_identity(spec.replica, node_name(spec), port)
    environment[engine.key_variable] = key
    if engine.probe.is_guarded:  # the engine imports the guard from here
        paths = (str(program_home()), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["AGENT_INFRA_IDENTITY"] = identity
    python, program, _ = self_command("serve")
    values = {"python": python, "program": program, "host": engine_host(spec), "port": engine_port or port}
    values |= {"model_path": weights} if weights else {}
    values |= {"master_host": master[0], "master_port": master[1], "node_rank": node_rank}
    argv = replace_placeholders(engine.rank_argv if node_rank else engine.argv, values)
    return Launch(argv, environment, port, identity, master)


def node_name(spec: ServeSpec) -> str:
    """Return this node's name; in a job, the one from Slurm."""
    return (spec.is_job and os.environ.get("SLURMD_NODENAME")) or socket.gethostname()


def advertised_host(bind_host: str) -> str:
    """Return the address at which others reach a server on ``bind_host``; job scripts set the node's, from Slurm."""
    is_wildcard = bind_host in ("", "0.0.0.0", "::")  # noqa: S104 (a comparison)
    return (os.environ.get("AGENT_INFRA_ADDRESS") or socket.gethostname()) if is_wildcard else bind_host


def bound_host(bind_host: str) -> str:
    """Return the address to listen on: on a node that only has IPv6, :: (which takes IPv4 too) for 0.0.0.0."""
    if bind_host != "0.0.0.0":  # noqa: S104 (a comparison)
        return bind_host
    try:
        found = {info[0] for info in socket.getaddrinfo(advertised_host(bind_host), None, type=socket.SOCK_STREAM)}
    except OSError:
        return bind_host
    return "::" if found == {socket.AF_INET6} else bind_host


class Replica:
    """Keeps one engine running until a signal, and its record up to date. Only ``digest`` is safe in other threads."""

    def __init__(self, spec: ServeSpec, key: str, watcher: Watcher, signals: StopSignals) -> None:
        self._spec, self._key, self._watcher, self._signals = spec, key, watcher, signals
        self._engine = spec.engine.probe
        self._directory = Path(spec.run_directory)
        self._log = self._directory / "logs" / f"{spec.replica}.log"
        self._gpus = GpuSampler(sampled_gpus(spec, {**os.environ, **spec.env}))
        self._load_sampler = LoadSampler(self._gpus)
        self._weights: str | None = None  # the copy on this node, once it was staged
        self._led = ""  # what the ranks were told of the latest run
        self._is_written = False  # whether the file matches the record
        self._record = ReplicaRecord(
            replica=spec.replica,
            model=spec.model,
            state="starting",
            engine=spec.engine.name,
            node=node_name(spec),
            pid=os.getpid(),
            process=process_stamp(os.getpid()) or "",
            host=advertised_host(spec.bind_host),
            job_id=os.environ.get("SLURM_JOB_ID") if spec.is_job else spec.job_id,
            started_at=time.time(),
            address=os.environ.get("AGENT_INFRA_ADDRESS") or None,
            slots=spec.engine.slots,
            takes_priority=spec.engine.takes_priority,
            gpus=self._gpus.sample(),
            gpu_ids=spec.gpu_ids,
            is_gated=spec.is_gated,
        )

    def run(self) -> int:
        """Run the replica to its end. Returns the exit code of `serve`."""
        telemetry = Telemetry(
            self._spec.bind_host, self._key, f"{self._record.replica}@{self._record.node}", self.digest
        )
        try:
            self._update(telemetry_port=telemetry.port)
            failure = self._stage()
            if failure is None and not self._signals.is_asked:
                failure = self._run_engines()
        except RefusedError as error:
            failure = ReplicaFailure("unknown", str(error), "fix it, and start the replica again")
        finally:
            telemetry.close()
            self._gpus.close()
        if failure is None:
            message = f"no turn for {self._spec.idle_shutdown_minutes:g} min" if self._record.is_idle else None
            self._update(state="stopped", message=message, failure=None, port=None, telemetry_port=None)
            return 0
        self._note(f"failed ({failure.kind}): {failure.line}; {failure.hint}")
        self._update(state="failed", message=None, failure=failure, port=None, telemetry_port=None)
        return 1

    def digest(self) -> Mapping[str, Any]:
        """Return the body of ``GET /load``. Thread-safe."""
        return {"state": self._record.state, "slots": self._record.slots, **self._load_sampler.sample()}

    def _stage(self) -> ReplicaFailure | None:
        """Copy the weights to this node if the model has ``stage``. Returns the failure, also that of another node's
        rank; None also after a signal."""
        spec, signals = self._spec, self._signals
        if spec.stage is None:
            return None
        self._update(state="loading")

        def report(copied: int, total: int) -> None:
            self._update(progress=f"{copied / 1e9:.1f}/{total / 1e9:.1f} GB staged")
            if self._rank_failure() is not None:
                raise StagingStopped

        try:
            self._weights = stage_weights(
                spec.model_path, spec.stage, engine_environment(spec), report, lambda: signals.is_asked
            )
        except StagingStopped:
            return self._rank_failure()
        except StagingError as error:
            return staging_failure(error)
        self._note(f"the weights are in {self._weights}")
        self._update(state="starting", progress=None)
        return None

    def _run_engines(self) -> ReplicaFailure | None:
        """Run the engine, and restart it while that may help. Returns the last failure; None if stopped by a signal."""
        restarts, base_port = 0, self._spec.base_port
        while True:
            reservation = reserve_port(base_port)
            if reservation is None:
                line = f"none of the thousand ports from {base_port} on is free"
                return ReplicaFailure("port_in_use", line, "set base_port to another range")
            with contextlib.closing(reservation):
                run = self._run_gated if self._spec.is_gated else self._run_engine
                failure = run(reservation.port)
            if failure is None:
                return None
            was_ready = self._record.state == "ready"
            if was_ready and time.time() - (self._record.ready_at or 0) > RESTARTS_RESET_AFTER_S:
                restarts = 0
            is_hopeless = (failure.kind in PERMANENT_FAILURES and not was_ready) or self._step_failure() is not None
            if restarts == MAX_RESTARTS or is_hopeless:
                return failure
            if failure.kind == "port_in_use":
                base_port = reservation.port + 1
            pause = self._spec.restart_backoff * 5**restarts
            restarts += 1
            self._announce_restart(failure, f"restart {restarts} of {MAX_RESTARTS} in {pause:g} s")
            if self._pause(pause):
                return None

    def _announce_restart(self, failure: ReplicaFailure, plan: str) -> None:
        message = f"{failure.line}; {plan}"
        self._note(message)
        restarts = self._record.restarts + 1
        self._update(state="starting", message=message, failure=failure, restarts=restarts, port=None, progress=None)

    def _run_gated(self, port: int) -> ReplicaFailure | None:
        """Run the engine once on a loopback port, behind a Gate at ``port``. Returns as _run_engine() does."""
        inner = reserve_port(port + 1)
        if inner is None:
            line = f"none of the thousand ports from {port + 1} on is free"
            return ReplicaFailure("port_in_use", line, "set base_port to another range")
        with contextlib.closing(inner):
            identity = server_identity(self._spec.replica, node_name(self._spec), port)
            try:
                gate = Gate(self._spec.bind_host, port, inner.port, self._key, identity)
            except OSError as error:
                return ReplicaFailure("port_in_use", f"port {port}: {error.strerror}", "the next start moves on")
            with contextlib.closing(gate):
                return self._run_engine(port, inner.port)

    def _run_engine(self, port: int, engine_port: int | None = None) -> ReplicaFailure | None:
        """Run the engine once, from start to end. Returns its failure; None if it was stopped.

        ``port`` and ``engine_port`` are as for make_launch().
        """
        spec = self._spec
        launch = make_launch(spec, self._key, port, engine_port=engine_port, weights=self._weights)
        self._lead(launch)
        self._note("starting: " + shlex.join(launch.argv))
        try:
            process = EngineProcess(launch.argv, launch.environment, self._log, self._watcher)
        except OSError as error:
            hint = "give the program's full path in command, or install it on this node"
            return ReplicaFailure("bad_argument", f"{launch.argv[0]} cannot be started: {error.strerror}", hint)
        client = self._load_sampler.client = EngineClient(
            self._engine, engine_host(spec), engine_port or port, self._key, launch.identity
        )
        try:
            self._update(state="loading", port=port)
            failure = self._load(process, client)
            if failure is None and not self._signals.is_asked:
                failure = self._stand_by(process, client)
            if failure is None:
                self._end(process, client)
            return failure
        finally:
            self._load_sampler.client = None
            self._lead(None)
            process.kill()

    def _lead(self, launch: Launch | None) -> None:
        """Announce a run of the engine to the ranks on the replica's other nodes; None: its end, which ends theirs."""
        path = self._directory / "ranks" / f"{self._spec.replica}.json"
        if self._spec.nodes > 1 and launch is not None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._led = json.dumps({"master": launch.master, "port": launch.port, "at": time.time()})
            write_atomically(path, self._led)
        elif self._spec.nodes > 1:
            path.unlink(missing_ok=True)

    def _rank_failure(self) -> ReplicaFailure | None:
        """Return why a rank on one of the replica's other nodes can't start or has ended; None if nobody says so."""
        if self._spec.nodes == 1:
            return None
        try:
            told = json.loads(refusal_path(self._directory, self._spec.replica).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._step_failure()
        is_meant = told["job"] == job_run() and told.get("run") in (None, self._led)
        return ReplicaFailure(**told["failure"]) if is_meant else self._step_failure()

    def _step_failure(self) -> ReplicaFailure | None:
        """Return why the step that held all ranks is over, by the job's script; None if it isn't."""
        path = self._directory / "ranks" / f"{self._spec.replica}.over"
        try:
            *job, code = path.read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return None
        if self._spec.nodes == 1 or job != job_run():
            return None
        said = [line for line in log_tail(self._log).splitlines() if line.startswith("srun: ")]
        line = f"the step on its other nodes ended with exit code {code}: {said[-1] if said else 'srun said nothing'}"
        hint = "its log ends with .rank1.log, .rank2.log, …; if that doesn't tell, `sacct` may; start it again"
        return ReplicaFailure("node_failure", line, hint)

    def _load(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Wait until the engine is ready. Returns its failure; None if it is ready or a signal asked to stop."""
        deadline = time.monotonic() + self._spec.load_timeout
        while not self._signals.is_asked:
            # First: when a rank has ended, the head ends for want of it.
            if (failure := self._rank_failure()) is not None:
                return failure
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._read_progress(process)
            if client.answers() and client.is_ours():
                gpus = self._gpus.sample()
                self._update(state="ready", ready_at=time.time(), progress=None, message=None, failure=None, gpus=gpus)
                return None
            if time.monotonic() > deadline:
                return classify_failure(process.log_tail(), None)
            self._signals.wait(LOAD_POLL_S)
        return None

    def _read_progress(self, process: EngineProcess) -> None:
        if self._engine.progress and (steps := re.findall(self._engine.progress, process.log_tail())):
            self._update(progress="/".join(steps[-1]))

    def _stand_by(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Monitor a ready engine. Returns its failure; None after a signal to stop, or if it was idle for too long."""
        answered_at, idle = time.monotonic(), IdleWatch(self._spec.idle_shutdown_minutes, time.monotonic)
        while not self._signals.is_asked:
            if (failure := self._rank_failure()) is not None:
                return failure
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._update()
            if idle.is_over(client.load):
                self._note(f"no turn for {idle.limit_s / 60:g} min: shutting down (idle_shutdown_minutes)")
                self._update(is_idle=True)
                return None
            if client.answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > self._spec.hang_timeout:
                line = f"alive, but no answer to GET {self._engine.health_path} for {self._spec.hang_timeout:g} s"
                return ReplicaFailure("timed_out", line, "it hung and was killed; its log may say where")
            self._signals.wait(min(HEALTH_POLL_S, self._spec.hang_timeout / 4, idle.limit_s / 4))
        return None

    def _end(self, process: EngineProcess, client: EngineClient) -> None:
        """Let the engine finish its turns within stop_grace, then end it; a second signal ends it at once."""
        deadline = time.monotonic() + self._spec.stop_grace
        was_ready = self._record.state == "ready"
        self._update(state="draining", message=None)
        margin_s = min(END_MARGIN_S, self._spec.stop_grace / 2)
        settle_s, idle_since = IDLE_SETTLE_S if self._record.is_idle else DRAIN_SETTLE_S, math.inf
        while was_ready and self._engine.metrics and self._may_wait(process) and time.monotonic() < deadline - margin_s:
            load = client.load()
            if load is None or load.running or load.waiting:
                idle_since = math.inf
                if load and self._record.is_idle and not self._signals.is_asked:
                    deadline = time.monotonic() + self._spec.stop_grace  # a turn that still arrived gets its full time
            elif time.monotonic() - (idle_since := min(idle_since, time.monotonic())) > settle_s:
                break
            self._signals.wait(LOAD_POLL_S)
        process.terminate()
        while time.monotonic() < deadline and self._may_wait(process):
            self._signals.wait(LOAD_POLL_S)

    def _may_wait(self, process: EngineProcess) -> bool:
        return process.exit_code() is None and not self._signals.is_urgent

    def _pause(self, seconds: float) -> bool:
        """Wait. Returns True if a signal asked to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._signals.is_asked and (left := deadline - time.monotonic()) > 0:
            self._signals.wait(left)
        return self._signals.is_asked

    def _update(self, **changes: Any) -> None:
        """Update the record and write it if it changed. If the disk is full, the next call tries again."""
        record = dataclasses.replace(self._record, **changes)
        path = self._directory / "replicas" / f"{record.replica}.json"
        if record != self._record or not self._is_written or is_missing(path):
            self._record, self._is_written = record, False
            with contextlib.suppress(OSError):
                write_atomically(path, json.dumps(dataclasses.asdict(record)))
                self._is_written = True

    def _note(self, line: str) -> None:
        """Write a line to the replica's log; ignores write errors."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(open_log(self._log), "a", encoding="utf-8") as file:
            file.write(f"{stamp} agent-infra: {line}\n")


def staging_failure(error: StagingError) -> ReplicaFailure:
    line, _, hint = str(error).partition("; ")
    return ReplicaFailure(error.kind, line, hint)


def refusal_path(run_directory: Path, replica: str) -> Path:
    """Return the file in which a rank says why it can't start or has ended.

    JSON {job: job_run(), run: the head's file for it or null, failure: ReplicaFailure}.
    """
    return run_directory / "ranks" / f"{replica}.refused"


def job_run() -> list[str]:
    """Return what all nodes of a job know it by; it is another one after a requeue."""
    return [os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")]


def read_spec(run_directory: str, replica: str) -> tuple[ServeSpec, str]:
    """Return a replica's specification and key. Raises RefusedError if either cannot be read."""
    path = Path(run_directory) / "specs" / f"{replica}.json"
    try:
        spec = spec_from_json(path.read_text(encoding="utf-8"))
        key = Path(spec.key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be served: {error}; start the replica again") from error
    if not key:
        raise RefusedError(f"{spec.key_file}: contains no key; delete it and start the deployment again")
    return spec, key


def probe_node(spec: ServeSpec) -> dict[str, Any]:
    """Return what a replica would find on this node: ``{node, python, package, import_error, gpus, model, hub}``.

    ``package`` is the version of the engine's package (None: not installed), ``import_error`` why Python can't import
    it, ``model`` one of local, cached, remote and missing, ``hub`` whether the Hugging Face hub is reachable.
    """
    import importlib.metadata
    import urllib.error
    import urllib.request

    environment, package = engine_environment(spec), spec.engine.package
    version, hub = None, True
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(package) if package else None
    try:
        endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
        urllib.request.urlopen(endpoint, timeout=5.0).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError as error:
        error.close()  # any answer counts
    except (OSError, ValueError):
        hub = False
    sampler = GpuSampler(sampled_gpus(spec, environment))
    names = [gpu.name for gpu in sampler.sample()] or [
        f"device {name}" for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
    ]
    sampler.close()
    path = spec.model_path
    if os.path.exists(path) or spec.engine.name == "command":
        model = "local"
    elif is_hub_id(path):
        model = "cached" if is_in_hub_cache(path, environment) else "remote"
    else:
        model = "missing"
    python = ".".join(str(part) for part in sys.version_info[:3])
    problem = import_problem(package, environment) if package and version else None
    seen = {"node": node_name(spec), "python": python, "package": version, "import_error": problem, "gpus": names}
    return {**seen, "model": model, "hub": hub}


def import_problem(package: str, environment: Mapping[str, str]) -> str | None:
    """Import an engine's package as the engine would. Returns the end of what Python printed if that fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {package}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=IMPORT_S,
        )
    except subprocess.TimeoutExpired:
        return f"importing it took more than {IMPORT_S:g} s"
    said = done.stderr.decode("utf-8", "replace").strip()
    return said[-2000:] or describe_exit(done.returncode) if done.returncode else None


def answer_probe(spec: ServeSpec, key: str, run_directory: Path) -> None:
    """Report what a replica would find here, and answer challenges on a port, so that a tunnel to it can be tested.

    Ends when `doctor` removes the specification, or after PROBE_HELD_S.
    """
    name = f"{spec.replica}@{node_name(spec)}"
    with contextlib.closing(Telemetry(spec.bind_host, key, name, dict)) as telemetry:
        reached = {"replica": spec.replica, "host": advertised_host(spec.bind_host), "port": telemetry.port}
        reached["address"] = os.environ.get("AGENT_INFRA_ADDRESS") or None
        report = json.dumps({**probe_node(spec), **reached})
        write_atomically(run_directory / "replicas" / f".{spec.replica}.probe", report)
        deadline = time.monotonic() + PROBE_HELD_S
        while (run_directory / "specs" / f"{spec.replica}.json").exists() and time.monotonic() < deadline:
            time.sleep(0.2)


def serve(run_directory: str, replica: str) -> int:
    """Run one replica from specs/<replica>.json until SIGTERM. Returns 0 if it was stopped, 1 if it failed.

    Writes replicas/<replica>.json and logs/<replica>.log. Raises RefusedError if it cannot be started at all.
    """
    spec, key = read_spec(run_directory, replica)
    spec = dataclasses.replace(spec, bind_host=bound_host(spec.bind_host))
    if spec.is_probe:
        answer_probe(spec, key, Path(run_directory))
        return 0
    with contextlib.closing(Watcher()) as watcher, contextlib.closing(StopSignals()) as signals:
        return Replica(spec, key, watcher, signals).run()

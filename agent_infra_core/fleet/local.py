"""Replicas as processes on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.cluster import LOG_BYTES, LogFolder, Logs, surplus_logs
from agent_infra_core.fleet.engines import ENGINES, check_engine_args, plain_command, serve_spec
from agent_infra_core.fleet.state import (
    DeploymentPaths,
    failed_record,
    free_replica_id,
    is_alive,
    is_elsewhere,
    is_gone,
    read_or_make_key,
    read_record,
    replica_order,
    start_lock,
)
from agent_infra_core.fleet.weights import fetch_packaged_model, model_cache, pull_here, resolve_model_path
from agent_infra_core.host import create_atomically, is_listening, last_line, process_stamp, write_atomically
from agent_infra_core.node.gpus import allocate_gpus, gpu_pool, list_gpus
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig


class LocalCluster:
    """Replicas on this machine: each is a `serve` process in its own session, identified by its record.

    The records are authoritative. This object only remembers the processes it has to reap.
    """

    poll_s = 0.1
    problem: str | None = None

    def __init__(
        self,
        paths: DeploymentPaths,
        serve_command: Sequence[str],  # arguments before --run-dir
        environment: Mapping[str, str],
        report: Callable[[str], None],
    ) -> None:
        self._paths = paths
        self._serve_command = list(serve_command)
        self._environment = environment
        self._report = report
        self.logs: Logs = LogFolder(paths.run / "logs")
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def started(self) -> Collection[str]:
        return self._children.keys()

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        find_engine(model, self._environment)
        # GPUs that this model's replicas already have count towards the number needed.
        allocate_gpus(model.replicas * self._gpus_wanted(model), self._gpus, self._gpus_held(besides=model.name))
        cache = model_cache(self._environment)
        fetch = functools.partial(fetch_packaged_model, cache, self._environment, self._report)
        return dataclasses.replace(model, model_path=resolve_model_path(model, fetch))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        try:
            # One lock for all deployments of this user: two that start at once must not get the same GPU.
            with start_lock(self._paths):
                self._clean()
                return self._start(model)
        except OSError as error:
            raise RefusedError(f"a replica of {model.name} cannot be started in {self._paths.run}: {error}") from error

    def replicas(self) -> list[ReplicaRecord]:
        self._reap()
        return [self._judge(record) for record in self._records()]

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        records = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        for record in records:
            if is_elsewhere(record):
                raise RefusedError(
                    f"replica {record.replica} runs on {record.node}, this is {os.uname().nodename}: stop it there; "
                    f"if that machine is gone for good, delete {self._paths.record(record.replica)}"
                )
        self._remove([record for record in records if is_gone(record)])
        for record in records:
            if is_alive(record):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL if now else signal.SIGTERM)

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        waiting = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        while True:
            self._reap()
            ended = [record for record in waiting if self._has_ended(record)]
            self._remove(ended)
            waiting = [record for record in waiting if record not in ended]
            if not waiting or time.monotonic() > deadline:
                return [record.replica for record in waiting]
            time.sleep(0.05)

    def _has_ended(self, record: ReplicaRecord) -> bool:
        """Whether `serve` and its engine are gone. The engine of a killed `serve` ends a moment later."""
        if not is_gone(record):
            return False
        latest = read_record(self._paths.record(record.replica))
        same = latest is not None and latest.process == record.process
        return not (same and latest and latest.port and is_listening(latest.host, latest.port))

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        return [self.start(model) for _ in range(count)]

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        return [f"{count} × {shlex.join(plain_command(model))}"] if count > 0 else []

    def replica_key(self) -> str:
        return read_or_make_key(self._paths.replica_key)

    def pull(self, model: ModelConfig) -> str:
        return pull_here(model, self._environment, self._report)

    def _start(self, model: ModelConfig) -> ReplicaRecord:
        replica = free_replica_id(model.name, [record.replica for record in self._records()])
        gpus = allocate_gpus(self._gpus_wanted(model), self._gpus, self._gpus_held())
        self.replica_key()
        spec = serve_spec(replica, model, str(self._paths.run), str(self._paths.replica_key), gpu_ids=gpus)
        write_atomically(self._paths.spec(replica), json.dumps(dataclasses.asdict(spec)))
        process = self._spawn(replica)
        self._children[replica] = process
        record = ReplicaRecord(
            replica=replica,
            model=model.name,
            state="starting",
            engine=model.engine,
            node=os.uname().nodename,
            pid=process.pid,
            process=process_stamp(process.pid) or "",
            started_at=time.time(),
            gpu_ids=gpus,
        )
        # `serve` may already have written its own record, which is newer.
        create_atomically(self._paths.record(replica), json.dumps(dataclasses.asdict(record)))
        return record

    def _records(self) -> list[ReplicaRecord]:
        """Every record as stored, in order of model and number."""
        records = [read_record(path) for path in (self._paths.run / "replicas").glob("*.json")]
        return sorted((record for record in records if record), key=replica_order)

    def _judge(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record, marked as failed if its `serve` is gone without reporting its end."""
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        if is_elsewhere(record):
            return dataclasses.replace(record, message=f"on {record.node}; not visible from {os.uname().nodename}")
        # `serve` may have written a final record after this one was read.
        record = read_record(self._paths.record(record.replica)) or dataclasses.replace(record, state="stopped")
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        return failed_record(record, last_line(self._paths.log(record.replica)))

    @functools.cached_property
    def _gpus(self) -> tuple[str, ...]:
        """The GPUs that can be allocated; empty on a machine without GPUs."""
        return gpu_pool(list_gpus(self._environment), self._environment.get("CUDA_VISIBLE_DEVICES"))

    def _gpus_wanted(self, model: ModelConfig) -> int:
        """Number of GPUs allocated to one replica; if 0, CUDA_VISIBLE_DEVICES isn't changed."""
        chosen = "CUDA_VISIBLE_DEVICES" in model.env
        if chosen or not ENGINES[model.engine].uses_gpus or not self._gpus:
            return 0
        return model.tensor_parallel_size * model.pipeline_parallel_size

    def _gpus_held(self, besides: str | None = None) -> dict[str, str]:
        """GPUs this user's replicas have on this machine, as GPU → deployment/replica, except our model ``besides``."""
        held: dict[str, str] = {}
        for path in self._paths.root.parent.glob("*/run/replicas/*.json"):
            record, deployment = read_record(path), path.parts[-4]
            if record and is_alive(record) and (deployment, record.model) != (self._paths.root.name, besides):
                held.update(dict.fromkeys(record.gpu_ids, f"{deployment}/{record.replica}"))
        return held

    def _spawn(self, replica: str) -> subprocess.Popen[bytes]:
        """Start `serve` in its own session, so neither Ctrl-C nor a closed terminal ends it."""
        log = self._paths.log(replica)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.old"))
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {replica} starts\n".encode())
            return subprocess.Popen(
                [*self._serve_command, "--run-dir", str(self._paths.run), "--replica", replica],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def _reap(self) -> None:
        for process in list(self._children.values()):  # another thread may be starting one
            process.poll()

    def _clean(self) -> None:
        """Remove what earlier processes left: replicas that are gone, unused specs, the oldest logs.

        Keeps failed replicas that this object started, since the failure may not have been reported yet. The caller
        holds the lock.
        """
        records = self._records()
        for record in records:
            told = record.state == "stopped" or record.replica not in self._children
            if told and is_gone(record):
                self._forget(record.replica)
        here = {record.replica for record in self._records()}
        for spec in (self._paths.run / "specs").glob("*.json"):
            if spec.stem not in here:
                spec.unlink()
        for log in surplus_logs((self._paths.run / "logs").glob("*.log*"), here):
            log.unlink()

    def _remove(self, records: Sequence[ReplicaRecord]) -> None:
        """Remove replicas that are gone, unless one with the same name was started meanwhile."""
        if records:
            with start_lock(self._paths):
                for record in records:
                    latest = read_record(self._paths.record(record.replica))
                    if latest is None or is_gone(latest):
                        self._forget(record.replica)

    def _forget(self, replica: str) -> None:
        """Remove the files of a replica that is gone, except its log."""
        for leftover in (self._paths.run / "replicas").glob(f".{replica}.json.*"):  # killed while writing
            leftover.unlink(missing_ok=True)
        self._paths.spec(replica).unlink(missing_ok=True)
        self._paths.record(replica).unlink(missing_ok=True)
        if child := self._children.pop(replica, None):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)  # its threads may live a moment longer; until they end it can't be reaped


def find_engine(model: ModelConfig, environment: Mapping[str, str]) -> str:
    """The program that runs a model's engine: this Python, which `serve` uses too, or that of the model's command.

    Raises RefusedError if the engine isn't installed.
    """
    import importlib.util
    import shutil

    package = ENGINES[model.engine].package
    if package is not None:
        if importlib.util.find_spec(package) is None:
            reason = f"engine {model.engine} is not installed for {sys.executable}; pip install {package}"
            raise RefusedError(f"model {model.name}: {reason}")
        return sys.executable
    program = plain_command(model)[0]
    found = shutil.which(program, path={**environment, **model.env}.get("PATH"))
    if found is None:
        raise RefusedError(f"model {model.name}: command: {program} was not found; install it, or give its path")
    return found

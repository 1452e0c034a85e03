"""The proxy in a Slurm job of its own (cluster.slurm.proxy: job): submits it, waits for it, finds it, ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.control.link import DRAIN_S
from agent_infra_core.control.lock import DeploymentLock, local_proxy
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.cluster import Cluster
from agent_infra_core.fleet.directives import proxy_directives
from agent_infra_core.fleet.explain import known_ending, reconcile_record
from agent_infra_core.fleet.parse import ENDED_JOB_STATES, JobEnd, SlurmJob, Submission
from agent_infra_core.fleet.place import PROXY
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.slurm_host import SchedulerError
from agent_infra_core.fleet.state import DeploymentPaths, client_key, config_text, read_process_record, start_lock
from agent_infra_core.host import (
    HostUnreachableError,
    http_get,
    last_line,
    process_stamp,
    self_command,
    write_atomically,
)
from agent_infra_core.node.failures import describe_exit
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, Config, connect_address, proxy_url, proxy_view

PROXY_ROLE = "proxy-job"  # what the job runs
PROGRAM = "agent_infra.pyz"  # this program, where the job can't read it from this machine's disk
SERVE_DEADLINE_S = 300.0  # time a running job has until it serves: Python's packages may come from a slow file system
END_S = 10.0  # time a job has to disappear once it was killed
HISTORY_S = 600.0  # time for the history to arrive
POLL_S = 5.0  # longest interval between looks at the job


def job_host(host: str) -> str:
    """The address that the proxy listens on in a job: other machines must reach it, so never loopback alone."""
    from agent_infra_core.node.replica import bound_host

    return bound_host("0.0.0.0" if connect_address(host) in ("127.0.0.1", "::1", "localhost") else host)  # noqa: S104


class ServedProxy:
    """The proxy of this job as others find it: its record, and a server that proves whose it is. Owns both."""

    def __init__(self, run_dir: str, environment: Mapping[str, str], key: str, place: tuple[str, int]) -> None:
        """``place``: the host and port that it listens on; ``key``: the replicas'.

        OSError if the disk is full: nobody could find it.
        """
        from agent_infra_core.node.replica import advertised_host
        from agent_infra_core.node.telemetry import Telemetry

        (host, port), node = place, environment.get("SLURMD_NODENAME", "")
        self._proof = Telemetry(host, key, f"{PROXY}@{node}", dict)
        self._path, now = Path(run_dir) / "replicas" / f"{PROXY}.json", time.time()
        self._record = ReplicaRecord(
            replica=PROXY,
            model=PROXY,
            state="ready",
            engine="",
            node=node,
            pid=os.getpid(),
            process=process_stamp(os.getpid()) or "",
            host=advertised_host(host),
            port=port,
            telemetry_port=self._proof.port,
            job_id=environment.get("SLURM_JOB_ID", ""),
            started_at=now,
            ready_at=now,
            address=environment.get("AGENT_INFRA_ADDRESS"),
        )
        self._write("ready")

    def _write(self, state: str) -> None:
        write_atomically(self._path, json.dumps(dataclasses.asdict(dataclasses.replace(self._record, state=state))))

    def drain(self) -> None:
        """Have nobody else find it, while the turns in flight end."""
        with contextlib.suppress(OSError):
            self._write("draining")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write("stopped")
        self._proof.close()


def serve_in_job(cluster: Cluster, environment: Mapping[str, str], place: tuple[str, int]) -> ServedProxy | None:
    """Have others find the proxy of this job, as ServedProxy does."""
    key = cluster.replica_key()
    return ServedProxy(cluster.host.run_dir, environment, key, place) if isinstance(cluster, SlurmCluster) else None


class ProxyJob:
    """The job that runs a deployment's proxy, as seen from outside of it. Slurm says which jobs there are."""

    def __init__(
        self,
        cluster: SlurmCluster,
        config: ClusterConfig,
        paths: DeploymentPaths,
        render: Callable[[Mapping[str, Any]], str],
        archive: Callable[[], bytes],
    ) -> None:
        """``render`` makes the job's script from its template's values, ``archive`` this program as one file."""
        self._cluster, self._config, self._paths = cluster, config, paths
        self._render, self._archive = render, archive
        self.is_far = config.ssh is not None  # this machine's files are not the job's
        self.is_urgent = False  # cut the turns in flight, even while stop() lets them end

    def submit(self, config: Config, *options: str) -> bool:
        """Submit the job, unless one waits or runs already. ``options`` are those of its role. Returns whether it did.

        RefusedError if a process runs the proxy, or Slurm refuses; SchedulerError.
        """
        with start_lock(self._paths):
            if _living(self._cluster.find_proxies()):
                return False
            lock = DeploymentLock(self._paths.lock)
            lock.acquire("connect")
            lock.release()
            host = self._cluster.host
            host.install()
            if self.is_far:
                program = self._archive()
                path = host.program_path(PROGRAM, program)
                if not host.has(path, hashlib.sha256(program).hexdigest()):
                    host.write(path, program)
                # sshd connects as its user, so whoever reaches the tunnel's end would need no key.
                proxy = dataclasses.replace(config.proxy, require_key=True)
                self.share(
                    self._paths.config,
                    config_text(dataclasses.replace(config, cluster=proxy_view(config.cluster), proxy=proxy)),
                )
                self.share(self._paths.client_key, client_key(config, self._paths))
            host.submit_proxy(self.script(*options))
            return True

    def share(self, path: Path, text: str) -> None:
        """Give the job a file of this machine's state directory, if it can't read that."""
        if self.is_far and self._config.slurm.proxy == "job":
            self._cluster.host.install()
            self._cluster.host.write(f"{self._state}/{path.name}", text.encode())

    def fetch_state(self) -> None:
        """Bring what a job with its own state directory has noted there: the wanted replicas, and handovers.

        HostUnreachableError.
        """
        if not self.is_far or not _living(self._cluster.proxies or ()):
            return
        paths = (self._paths.wanted, self._paths.handover)
        script = 'cd "$1" && shift && for name; do printf "@%s@" "$name"; cat "$name" 2> /dev/null; done; exit 0'
        done = self._cluster.host.shell(script, self._state, *(path.name for path in paths))
        for path in paths if done.status == 0 else ():
            found = re.search(rf"@{path.name}@([^@]*)", done.output.decode("utf-8", "replace"))
            if found and found[1]:
                write_atomically(path, found[1])
            elif path == self._paths.handover:
                path.unlink(missing_ok=True)

    @property
    def _state(self) -> str:
        """The job's state directory; call SlurmHost.install() or locate() first."""
        root = self._cluster.host.root
        return f"{root}/agent-infra/{self._config.name}" if self.is_far else str(self._paths.root)

    def script(self, *options: str) -> str:
        """The job's script; call SlurmHost.install() first."""
        host, slurm = self._cluster.host, self._config.slurm
        log = f"{host.run_dir}/logs/{PROXY}.log" if self.is_far else str(self._paths.log(PROXY))
        python, program, role = self_command(PROXY_ROLE)
        if self.is_far:
            python, program = "python3", host.program_path(PROGRAM, self._archive())
        values = {
            "directives": proxy_directives(self._config.name, slurm, host.run_dir, log),
            "replicas": (PROXY,),  # whose record is removed
            "run_dir": host.run_dir,
            "setup": slurm.proxy_job.setup,
            "state": self._state,
            "state_home": self._state.removesuffix(f"/agent-infra/{self._config.name}"),
            "is_far": self.is_far,
            "python": python,
            "program": program,
            "words": [role, "--name", self._config.name, *options],
        }
        return self._render(values)

    def look(self) -> tuple[SlurmJob | None, ReplicaRecord | None]:
        """The job, if there is one, and the proxy's record while it is to be reached.

        HostUnreachableError; SchedulerError if Slurm doesn't respond.
        """
        job = _newest(self._cluster.find_proxies())
        return job, self._record(job, ("ready", "draining"))

    @staticmethod
    def is_over(job: SlurmJob | None) -> bool:
        return job is None or job.state in ENDED_JOB_STATES

    def wait(
        self, show: Callable[[Sequence[ReplicaRecord]], None], should_stop: Callable[[], bool]
    ) -> Mapping[str, Any] | None:
        """Show the job until the proxy in it serves. Returns ``{job, node, host, port, pid}``; None after
        ``should_stop``.

        AgentInfraError, with the reason, if the job ends or doesn't serve in time. The queue has no time limit.
        """
        running_since, problem = float("inf"), ""
        while not should_stop():
            try:
                job, _ = self.look()
            except (HostUnreachableError, SchedulerError) as error:  # says nothing about the job
                job, problem = None, str(error)
            else:
                if self.is_over(job):
                    raise AgentInfraError(f"{self.explain(job)} (`logs proxy` has its log)")
                problem = ""
            show([_as_replica(job, problem)])
            if (record := self._record(job)) is not None:
                return _found(record)
            running_since = min(running_since, time.monotonic()) if job and job.state == "RUNNING" else float("inf")
            if time.monotonic() - running_since > SERVE_DEADLINE_S:
                raise AgentInfraError(
                    f"the proxy's job {job.id if job else ''} has run for {SERVE_DEADLINE_S:g} s and doesn't serve; "
                    "`logs proxy` may say why, `stop` ends it"
                )
            time.sleep(min(POLL_S, self._cluster.poll_s))
        return None

    def find(self) -> tuple[Mapping[str, Any] | None, str | None]:
        """``{job, node, host, port, pid}`` of the proxy that serves, or None and why there is none.

        As of the cluster's last look. ``host`` and ``port`` are those to use on this machine. The reason is None, too,
        while Slurm doesn't respond. If the proxy isn't to run in a job, this is local_proxy().
        """
        if self._config.slurm.proxy != "job":
            return local_proxy(self._paths)
        if self._cluster.proxies is None:
            self._cluster.replicas()
        if self._cluster.proxies is None:
            return None, None
        job, told = _newest(self._cluster.proxies), self._cluster.proxy_record
        if job is None or (self.is_over(job) and (told is None or told.job_id != job.id)):  # ended by `stop`
            return None, "no proxy is running; `connect` starts one"
        if self.is_over(job):
            return None, f"no proxy is running: {self.explain(job)}; `connect` starts another"
        if (record := self._record(job)) is None:
            reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
            return None, f"the proxy does not serve: its job {job.id} is {job.state}{reason}"
        link = read_process_record(self._paths.link_record)
        if link is None and self.is_far:
            way = "no tunnel leads there from this machine; `connect` opens one"
            return None, f"the proxy serves in job {job.id} on {job.node}, but {way}"
        return _found(record) | ({"host": link["host"], "port": link["port"]} if link else {}), None

    def stop(self, now: bool) -> list[str]:
        """End the job that the cluster's last look saw. Returns what it ended.

        Turns in flight have DRAIN_S to finish, or no time with ``now``.
        AgentInfraError if it is still there at the end, SchedulerError if Slurm doesn't respond.
        """
        ended, asked = dict[str, None](), set[str]()
        late = time.monotonic() + (END_S if now else 2 * DRAIN_S + END_S)
        seen = self._cluster.proxies
        jobs = _living(self._cluster.find_proxies() if seen is None else seen)
        while jobs:
            ended |= dict.fromkeys(f"proxy (job {job.id})" for job in jobs)
            if time.monotonic() > late + END_S:
                raise AgentInfraError(f"{', '.join(ended)} did not end; `squeue` and the administrators may know why")
            # A second TERM cuts the turns in flight.
            is_hurried = now or self.is_urgent or time.monotonic() > late
            wanted = [job.id for job in jobs if is_hurried or job.id not in asked]
            if wanted:
                self._cluster.host.cancel(wanted, time.monotonic() > late, "TERM")
            asked.update(job.id for job in jobs if job.state == "RUNNING")
            time.sleep(min(1.0, self._cluster.poll_s))
            jobs = _living(self._cluster.find_proxies())
        self._forget()
        return list(ended)

    def _forget(self) -> None:
        """Remove the record of a proxy that is gone, and what the job got of this machine's state but the key."""
        host = self._cluster.host
        if self._cluster.proxy_record is not None:
            paths = self._paths
            mine = (paths.config, paths.wanted, paths.handover, paths.drained, paths.leaving)
            files = [f"{self._state}/{path.name}" for path in mine] if self.is_far else []
            host.shell('rm -f "$@"', f"{host.run_dir}/replicas/{PROXY}.json", *files)

    def fetch_history(self) -> None:
        """Copy the history of a proxy that has ended to this machine, if it kept one where this machine can't read it.

        HostUnreachableError; OSError if the disk is full.
        """
        if not self.is_far:
            return
        script = 'cd "$1" 2> /dev/null && [ -s history.db ] && gzip -c history.db'
        done = self._cluster.host.shell(script, self._state, timeout_s=HISTORY_S)
        if done.status == 0:
            new = self._paths.far_history.with_suffix(".new")
            new.touch(0o600)
            with gzip.open(io.BytesIO(done.output)) as packed, new.open("wb") as file:
                shutil.copyfileobj(packed, file)  # a week's history has hundreds of megabytes
            new.replace(self._paths.far_history)

    def describe(self, found: Mapping[str, Any]) -> list[str]:
        """Lines on where the proxy runs, until when, and whether it answers from here; for the operator."""
        job, told = _newest(self._cluster.proxies or ()), self._cluster.proxy_record
        left = job.time_left_s if job else None
        end = time.strftime(", until %a %H:%M", time.localtime(time.time() + left)) if left is not None else ""
        lines = [f"it runs in job {found['job']} on {found['node']}{end}; `stop` ends it and the replicas"]
        if told is not None and told.port and (told.host, told.port) != (found["host"], found["port"]):
            lines.append(f"inside the cluster it is {proxy_url(told.host, told.port)}")
        if not http_get(found["host"], found["port"], "/health", timeout_s=5.0)[0]:
            lines.append("degraded: it doesn't answer from this machine: is a firewall between them?")
        return lines

    def _record(self, job: SlurmJob | None, states: Collection[str] = ("ready",)) -> ReplicaRecord | None:
        """What the job wrote in this run of it, while it is in one of these states."""
        told = self._cluster.proxy_record
        if job is None or told is None or job.state != "RUNNING" or told.port is None:
            return None
        return told if told.state in states and (told.job_id, told.node) == (job.id, job.node) else None

    def explain(self, job: SlurmJob | None) -> str:
        """Why the job ended, with the class and Slurm's own word."""
        if job is None:
            return explain_end("", None, "")
        end, _, log = self._cluster.host.explain(job.id, PROXY, job.partition)
        said = log.strip().rpartition("\n")[2] if self.is_far else last_line(self._paths.log(PROXY))
        return explain_end(job.id, end, said)


_HINTS: Mapping[str, str] = {  # job state → what to do
    "TIMEOUT": "raise cluster.slurm.proxy_job.time_limit",
    "OUT_OF_MEMORY": "raise cluster.slurm.proxy_job.memory",
    "CANCELLED": "somebody ran scancel, perhaps an administrator",
}
_NO_LOG = -53  # exit code of a job whose log can't be opened


def explain_end(job: str, end: JobEnd | None, said: str) -> str:
    """Why the proxy's job ended: class, Slurm's word, what to do. ``said`` is the last line of its log."""
    what = f"the proxy's job {job}".rstrip()
    if end is None:
        return f"{what} is no longer known to Slurm; `sacct` may know more"
    if known := known_ending(end):
        hint = _HINTS.get(end.state, "")
        return f"{what} ended: {known[0]}: {known[1]}{f'; {hint}' if hint else ''}"
    if end.state == "COMPLETED":
        return f"{what} ended in order, before its walltime or by a signal"
    if end.exit_code == _NO_LOG:
        said = "error: its node doesn't see the state directory (XDG_STATE_HOME) or, with cluster.ssh, work_dir"
        said += "; it must be on a shared file system"
    if not said.startswith("error: "):
        said = f"it {describe_exit(end.exit_code)}" + (f"; its log ends with: {said}" if said else "")
    return f"{what} failed: {said.removeprefix('error: ')}"


def _found(record: ReplicaRecord) -> dict[str, Any]:
    """The proxy in the form of find()."""
    return {
        "job": record.job_id,
        "node": record.node,
        "host": record.host,
        "port": record.port,
        "pid": record.pid,
    }


def _living(jobs: Iterable[SlurmJob]) -> list[SlurmJob]:
    return [job for job in jobs if job.state not in ENDED_JOB_STATES]


def _newest(jobs: Sequence[SlurmJob]) -> SlurmJob | None:
    """The job that runs or waits; else the last one that ended."""
    return max(_living(jobs) or jobs, key=lambda job: int(job.id), default=None)


def _as_replica(job: SlurmJob | None, problem: str) -> ReplicaRecord:
    """The job in the form in which replicas are shown while they start."""
    now = time.time()
    if job is not None:
        told = Submission(job.id, job.partition, "", "proxy", now)
        shown = reconcile_record("proxy", told, job, None, (now, now))
        if shown is not None:
            return shown
    return ReplicaRecord(PROXY, PROXY, "pending", "", "", 0, "", pending_reason=problem)

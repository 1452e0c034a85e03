"""The proxy in a Slurm job of its own (cluster.slurm.proxy: job): submits it, waits for it, finds it, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.control.link import DRAIN_S
from agent_infra_core.control.lock import DeploymentLock, local_proxy
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.directives import proxy_directives
from agent_infra_core.fleet.explain import known_ending, reconcile_record
from agent_infra_core.fleet.parse import ENDED_JOB_STATES, JobEnd, SlurmJob, Submission
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.slurm_host import SchedulerError
from agent_infra_core.fleet.state import DeploymentPaths, start_lock
from agent_infra_core.host import HostUnreachableError, http_get, last_line, self_command, write_atomically
from agent_infra_core.node.failures import describe_exit
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, connect_address

PROXY_ROLE = "proxy-job"  # what the job runs
SERVE_DEADLINE_S = 300.0  # time a running job has until it serves: Python's packages may come from a slow file system
END_S = 10.0  # time a job has to disappear once it was killed
POLL_S = 5.0  # longest interval between looks at the job


def job_host(host: str) -> str:
    """The address that the proxy listens on in a job: other machines must reach it, so never loopback alone."""
    from agent_infra_core.node.replica import bound_host

    return bound_host("0.0.0.0" if connect_address(host) in ("127.0.0.1", "::1", "localhost") else host)  # noqa: S104


def record_proxy(paths: DeploymentPaths, environment: Mapping[str, str], place: tuple[str, int] | None) -> None:
    """Write where the proxy of this job is reached, by the host and port that it listens on; None: nowhere any more.

    OSError if the disk is full: nobody could find it.
    """
    from agent_infra_core.node.replica import advertised_host

    record: dict[str, Any] = {"job": environment.get("SLURM_JOB_ID", "")}
    if place is not None:
        node = environment.get("SLURMD_NODENAME", "")
        record |= {"node": node, "host": advertised_host(place[0]), "port": place[1], "pid": os.getpid()}
    write_atomically(paths.proxy_job, json.dumps(record))


class ProxyJob:
    """The job that runs a deployment's proxy, as seen from outside of it. Slurm says which jobs there are."""

    def __init__(
        self,
        cluster: SlurmCluster,
        config: ClusterConfig,
        paths: DeploymentPaths,
        render: Callable[[Mapping[str, Any]], str],
    ) -> None:
        """``render`` makes the job's script from the values of its template."""
        self._cluster, self._config, self._paths, self._render = cluster, config, paths, render

    def refuse(self, verb: str) -> None:
        """RefusedError if the proxy is to run in the job: ``verb`` would run it in this process."""
        if self._config.slurm.proxy == "job":
            raise RefusedError(
                f"cluster.slurm.proxy: job: `{verb}` would run the proxy on this machine; use `start`, `connect` and "
                "`stop`, or set proxy: here"
            )

    def submit(self, save_config: Callable[[], None], *options: str) -> None:
        """Submit the job, unless one waits or runs already. ``options`` are those of its role.

        RefusedError if a process runs the proxy, or Slurm refuses; SchedulerError; OSError of ``save_config``, by which
        the job gets its configuration.
        """
        with start_lock(self._paths):
            if _living(self._cluster.find_proxies()):
                return
            lock = DeploymentLock(self._paths)
            lock.acquire("connect")
            lock.release()
            self._cluster.host.install()
            save_config()
            self._cluster.host.submit_proxy(self.script(*options))

    def script(self, *options: str) -> str:
        """The job's script; call SlurmHost.install() first."""
        host, name = self._cluster.host, self._config.name
        directives = proxy_directives(name, self._config.slurm, host.run_dir, str(self._paths.log("proxy")))
        values = {
            "directives": directives,
            "run_dir": host.run_dir,
            "state_home": str(self._paths.root.parents[1]),
            "record": str(self._paths.proxy_job),
            "command": [*self_command(PROXY_ROLE), "--name", name, *options],
        }
        return self._render(values)

    def wait(
        self, show: Callable[[Sequence[ReplicaRecord]], None], should_stop: Callable[[], bool]
    ) -> Mapping[str, Any] | None:
        """Show the job until the proxy in it serves. Returns what find() would; None after ``should_stop``.

        AgentInfraError, with the reason, if the job ends or doesn't serve in time. The queue has no time limit.
        """
        running_since, problem = float("inf"), ""
        while not should_stop():
            try:
                job = _newest(self._cluster.find_proxies())
            except (HostUnreachableError, SchedulerError) as error:  # says nothing about the job
                job, problem = None, str(error)
            else:
                if job is None or job.state in ENDED_JOB_STATES:
                    raise AgentInfraError(f"{self._explain(job)} (log: {self._paths.log('proxy')})")
                problem = ""
            show([_as_replica(job, problem)])
            if job is not None and (record := self._record(job)) is not None:
                return record
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

        As of the cluster's last look. The reason is None, too, while Slurm doesn't respond. If the proxy isn't to run
        in a job, this is local_proxy().
        """
        if self._config.slurm.proxy != "job":
            return local_proxy(self._paths)
        if self._cluster.proxies is None:
            self._cluster.replicas()
        if self._cluster.proxies is None:
            return None, None
        job = _newest(self._cluster.proxies)
        if job is None or (job.state in ENDED_JOB_STATES and self._told().get("job") != job.id):  # ended by `stop`
            return None, "no proxy is running; `connect` starts one"
        if job.state in ENDED_JOB_STATES:
            return None, f"no proxy is running: {self._explain(job)}; `connect` starts another"
        if (record := self._record(job)) is not None:
            return record, None
        reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
        return None, f"the proxy does not serve: its job {job.id} is {job.state}{reason}"

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
            wanted = [job.id for job in jobs if now or job.id not in asked or time.monotonic() > late]
            if wanted:
                self._cluster.host.cancel(wanted, time.monotonic() > late, "TERM")
            asked.update(job.id for job in jobs if job.state == "RUNNING")
            time.sleep(min(1.0, self._cluster.poll_s))
            jobs = _living(self._cluster.find_proxies())
        self._paths.proxy_job.unlink(missing_ok=True)
        return list(ended)

    def describe(self, found: Mapping[str, Any]) -> list[str]:
        """Lines on where the proxy runs, until when, and whether it answers from here; for the operator."""
        job = _newest(self._cluster.proxies or ())
        left = job.time_left_s if job else None
        end = time.strftime(", until %a %H:%M", time.localtime(time.time() + left)) if left is not None else ""
        lines = [f"it runs in job {found['job']} on {found['node']}{end}; `stop` ends it and the replicas"]
        if not http_get(found["host"], found["port"], "/health", timeout_s=5.0)[0]:
            lines.append("degraded: it doesn't answer from this machine: is a firewall between them?")
        return lines

    def _told(self) -> Mapping[str, Any]:
        """What the job wrote; empty if there is nothing."""
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self._paths.proxy_job.read_text(encoding="utf-8"))
            return told if isinstance(told, dict) else {}
        return {}

    def _record(self, job: SlurmJob) -> Mapping[str, Any] | None:
        """What the job wrote in this run of it, once it serves."""
        told = self._told()
        is_current = job.state == "RUNNING" and (told.get("job"), told.get("node")) == (job.id, job.node)
        return told if is_current else None

    def _explain(self, job: SlurmJob | None) -> str:
        """Why the job ended, with the class and Slurm's own word."""
        if job is None:
            return "the proxy's job is no longer known to Slurm; `sacct` may know more"
        end, _, _ = self._cluster.host.explain(job.id, "proxy", job.partition)
        return explain_end(job.id, end, last_line(self._paths.log("proxy")))


_HINTS: Mapping[str, str] = {  # job state → what to do
    "TIMEOUT": "raise cluster.slurm.proxy_job.time_limit",
    "OUT_OF_MEMORY": "raise cluster.slurm.proxy_job.memory",
    "CANCELLED": "somebody ran scancel, perhaps an administrator",
}
_NO_LOG = -53  # exit code of a job whose log can't be opened


def explain_end(job: str, end: JobEnd | None, said: str) -> str:
    """Why the proxy's job ended: class, Slurm's word, what to do. ``said`` is the last line of its log."""
    if end is None:
        return f"the proxy's job {job} is no longer known to Slurm; `sacct` may know more"
    if known := known_ending(end):
        hint = _HINTS.get(end.state, "")
        return f"the proxy's job {job} ended: {known[0]}: {known[1]}{f'; {hint}' if hint else ''}"
    if end.state == "COMPLETED":
        return f"the proxy's job {job} ended in order, before its walltime or by a signal"
    if end.exit_code == _NO_LOG:
        said = "error: its node doesn't see the state directory (XDG_STATE_HOME), which must be on a shared file system"
    if not said.startswith("error: "):
        said = f"it {describe_exit(end.exit_code)}" + (f"; its log ends with: {said}" if said else "")
    return f"the proxy's job {job} failed: {said.removeprefix('error: ')}"


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
    return ReplicaRecord("proxy", "proxy", "pending", "", "", 0, "", pending_reason=problem)

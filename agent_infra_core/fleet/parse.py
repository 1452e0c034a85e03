"""Parses the output of Slurm's commands. Pure."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from agent_infra_core.node.health import parse_number
from agent_infra_core.settings import shorten


@dataclass(frozen=True)
class SlurmJob:
    """A job as reported by squeue. Times are s since the epoch, by the cluster's clock."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETED, …
    reason: str  # why it is waiting or ended; "None" without a reason
    submitted_at: float | None  # the last time, if it was requeued
    starts_at: float | None  # actual or expected start
    time_left_s: float | None
    partition: str
    node: str  # where its script runs; empty until it starts
    work_dir: str
    name: str


WAITING_JOB_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ENDED_JOB_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
_SQUEUE_FIELDS = ("%A", "%T", "%r", "%V", "%S", "%L", "%P", "%B", "%Z", "%j")  # in the order of SlurmJob


def squeue_format(nonce: str) -> str:
    """squeue's output format: marks before each job and after each field, which no job name can forge."""
    return f"@{nonce}job@" + "".join(f"{item}@{nonce}@" for item in _SQUEUE_FIELDS)


def parse_squeue(text: str, nonce: str) -> list[SlurmJob]:
    """The jobs that squeue printed in that format. Names may contain anything, even newlines. ValueError if cut off."""
    jobs = []
    for entry in text.split(f"@{nonce}job@")[1:]:
        fields = entry.split(f"@{nonce}@")
        if len(fields) != len(_SQUEUE_FIELDS) + 1:
            raise ValueError(f"squeue printed {shorten(entry)}")
        number, state, reason, submitted, start, left, partition, node, *rest = (item.strip() for item in fields[:-1])
        node = "" if node in ("n/a", "N/A", "(null)", "None assigned") else node
        times = (_slurm_time(submitted), _slurm_time(start), _slurm_span(left))
        jobs.append(SlurmJob(number, state, reason, *times, partition, node, *rest))
    return jobs


def _slurm_time(text: str) -> float | None:
    """``2026-11-22T14:32:00`` (UTC) in s since the epoch; None for N/A and the like."""
    import calendar

    with contextlib.suppress(ValueError):
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    return None


def _slurm_span(text: str) -> float | None:
    """``1-02:03:04``, ``2:03:04`` or ``3:04`` in s; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


UNNAMED_RESERVATION = "?"  # of a reserved node; Slurm 22.05 doesn't say which
UNKNOWN_MEMORY_MB = 1 << 40  # of a node whose memory isn't shown: more than any job asks for


@dataclass(frozen=True)
class SlurmNode:
    """A node as reported by `scontrol --details show node`."""

    name: str
    partitions: tuple[str, ...]
    is_usable: bool  # not down, drained or planned for another job
    is_idle: bool  # no job is running there
    free_cpus: int
    gres: Mapping[str, int]  # name:type (or name) → number
    used: Mapping[str, int]
    free_memory_mb: int = UNKNOWN_MEMORY_MB
    reservation: str = ""  # that it belongs to now; empty: none
    cpus: int = 0  # in all
    memory_mb: int = 0  # in all; 0: not shown

    def free(self, gres: str) -> int:
        """Number of ``gres`` (a name counts all types) that no job has."""
        return max(0, count_gres(self.gres, gres) - count_gres(self.used, gres))

    def takes_jobs_of(self, reservation: str) -> bool:
        """Whether it can run jobs that ask for this reservation (empty: for none)."""
        is_for_them = self.reservation in (reservation, UNNAMED_RESERVATION) if reservation else not self.reservation
        return self.is_usable and self.free_cpus > 0 and is_for_them


def count_gres(counts: Mapping[str, int], wanted: str) -> int:
    return sum(count for name, count in counts.items() if name == wanted or name.startswith(f"{wanted}:"))


def parse_gres(text: str) -> dict[str, int]:
    """Parse ``gpu:h100:4(S:0),gpu:a100:2(IDX:0-1)`` into {gpu:h100: 4, gpu:a100: 2}; ``gpu`` alone counts as one.

    A GPU of which somebody has shards counts as used. Slurm 22.05 prints those GPUs (``shard:h100:2(IDX:0-1)``), later
    releases the shares of each (``shard:h100:3(2/4,0/4,1/4)``).
    """
    counts: dict[str, int] = {}
    for kind, number, shares in re.findall(r"shard((?::[^:,(]+)?):(\d+)\((IDX:[^)]*|\d+/\d+(?:,\d+/\d+)*)\)", text):
        used = int(number) if "IDX" in shares else sum(not share.startswith("0/") for share in shares.split(","))
        counts["gpu" + kind.replace(":(null)", "")] = used
    text = text.replace(":(null)", "")  # of entries without a type
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"([\w.-]+(?::[A-Za-z_][\w.-]*|:[\w.-]*[A-Za-z_][\w.-]*)?)(?::(\d+)([KkMm]?))?", entry)
        if match and match[1] not in ("null", "none"):
            count = int(match[2] or 1) * {"": 1, "k": 1024, "m": 1 << 20}[(match[3] or "").lower()]
            counts[match[1]] = counts.get(match[1], 0) + count
    return counts


_NODE_UNUSABLE = re.compile(
    r"DOWN|DRAIN|FAIL|MAINT|PLANNED|REBOOT|POWER|UNKNOWN|FUTURE|ERROR|BLOCKED|INVAL|NO_RESPOND|NOT_RESP|\*"
)


def parse_nodes(text: str) -> list[SlurmNode]:
    """The nodes that `scontrol --oneliner --details show node` printed."""
    nodes = []
    for line in text.splitlines():
        values: dict[str, str] = {}
        for name, value in re.findall(r"(?:^| )([A-Za-z]\w*)=(\S*)", line):
            values.setdefault(name, value)  # Reason and Comment, which may contain anything, come last
        if "NodeName" not in values:
            continue
        state = values.get("State", "")
        cpus = int(values.get("CPUEfctv") or values.get("CPUTot") or 0)
        used_cpus = int(values.get("CPUAlloc") or 0)
        nodes.append(
            SlurmNode(
                name=values["NodeName"],
                partitions=tuple(values.get("Partitions", "").split(",")),
                is_usable=state.startswith(("IDLE", "MIXED", "RESERVED")) and not _NODE_UNUSABLE.search(state),
                is_idle=state.startswith(("IDLE", "RESERVED")) and used_cpus == 0,
                free_cpus=max(0, cpus - used_cpus),
                gres=parse_gres(values.get("Gres", "")),
                used=parse_gres(values.get("GresUsed", "")),
                free_memory_mb=int(values.get("RealMemory") or UNKNOWN_MEMORY_MB) - int(values.get("AllocMem") or 0),
                reservation=values.get("ReservationName", UNNAMED_RESERVATION) if "RES" in state else "",
                cpus=cpus,
                memory_mb=int(values.get("RealMemory") or 0),
            )
        )
    return nodes


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, from `scontrol show job` or sacct."""

    state: str
    exit_code: int  # of its script; negative: the signal that ended it
    reason: str = ""  # Slurm's word, or who cancelled it
    is_partition_gone: bool = False


PARTITION_GONE = "@partition is gone@"  # printed after the job if its partition no longer exists


def parse_job_end(text: str) -> JobEnd | None:
    """Parse `scontrol --oneliner show job` or `sacct -Pno State,ExitCode,Reason`; None if the job hasn't ended."""
    state = re.search(r"\bJobState=(\w+)", text)
    code = re.search(r"\bExitCode=(\d+):(\d+)", text)
    reason = re.search(r"\bReason=(\S+)", text)
    if state is not None and code is not None:
        word, ended, told = state[1], (code[1], code[2]), reason[1] if reason else ""
    else:
        row = re.search(r"(?m)^([A-Z_]+) ?([^|\n]*)\|(\d+):(\d+)(?:\|([^|\n]*))?", text)
        if row is None:
            return None
        word, ended, told = row[1], (row[3], row[4]), row[5] if row[5] not in (None, "", "None") else row[2]
    if word not in ENDED_JOB_STATES:
        return None
    exit_code = -int(ended[1]) if int(ended[1]) else int(ended[0])
    return JobEnd(word, exit_code, told, PARTITION_GONE in text)


UNCONFIRMED_JOB = "0"  # in a Submission: sbatch was called, and hasn't told the job's number


def parse_job_number(text: str) -> str:
    """The number that `sbatch --parsable` printed, among whatever a site's wrapper says. UNCONFIRMED_JOB if none."""
    return next(reversed(re.findall(r"(?m)^(\d+)(?:;\S*)?$", text)), UNCONFIRMED_JOB)


@dataclass(frozen=True)
class Submission:
    """A note written when a replica's job is submitted: jobs/<replica> in the run directory."""

    job_id: str
    partition: str
    engine: str
    model: str
    at: float


def parse_submission(text: str) -> Submission | None:
    """Parse such a note; None if ``text`` isn't one."""
    words = text.split()
    if len(words) != 5 or not words[0].isdecimal() or parse_number(words[4]) is None:
        return None
    return Submission(words[0], words[1], words[2], words[3], float(words[4]))


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Name → fields of every partition that `scontrol --oneliner show partition` printed."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def slurm_limit_s(text: str) -> float:
    """A time limit of sbatch or scontrol in seconds. Takes minutes, h:m:s, d-h and so on; anything else is inf."""
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
    """A span of time as text: ``2 h``, ``90 min``, ``45 s``, ``no limit``."""
    if seconds == math.inf:
        return "no limit"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.0f} s"

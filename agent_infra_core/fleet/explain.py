"""Explains why a job is pending and why a job ended. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from agent_infra_core.fleet.parse import (
    ENDED_JOB_STATES,
    UNCONFIRMED_JOB,
    WAITING_JOB_STATES,
    JobEnd,
    SlurmJob,
    Submission,
)
from agent_infra_core.node.failures import classify_failure, describe_exit
from agent_infra_core.protocol import ReplicaFailure, ReplicaRecord

# Slurm's pending reason → explanation. The first match is used; without a match, the reason is shown as it is.
PENDING_REASONS = (
    (r"Resources", "it is next, and waits for nodes to become free"),
    (r"Priority", "jobs with higher priority are ahead of it"),
    (r"BeginTime", "its begin time, which a requeue also sets, has not come yet"),
    (r"Dependency.*", "it waits for another job to end"),
    (r"JobHeldUser", "you hold it: `scontrol release` lets it go"),
    (r"JobHeldAdmin|JobHoldMaxRequeue|.*requeued held.*|.*Hold.*", "it is held: ask the administrators to release it"),
    (
        r"PartitionNodeLimit|PartitionTimeLimit|PartitionConfig",
        "it asks for more than the partition allows: lower time_limit or nodes",
    ),
    (r"PartitionDown|PartitionInactive", "the partition accepts no jobs at the moment"),
    (
        r"ReqNodeNotAvail.*[Rr]eserv.*|Reservation.*",
        "the nodes are reserved, perhaps for maintenance (`scontrol show res`)",
    ),
    (r"ReqNodeNotAvail.*", "the nodes that could run it are down, drained or reserved (`sinfo -R` says why)"),
    (r"Nodes required for job are DOWN.*", "the nodes that could run it are down, drained or reserved (`sinfo -R`)"),
    (
        r"QOSMin\w*",
        "it asks for less than its QoS demands (`sacctmgr show qos`): another qos, or whole nodes (exclusive)",
    ),
    (
        r"InvalidQOS|InvalidAccount|QOSNotAllowed|AccountNotAllowed",
        "its QoS or account does not exist or is not yours: correct qos or cluster.slurm.account",
    ),
    (
        r"QOSMaxGRESPerUser|QOSMaxGRES.*|.*MaxTRES.*|.*GrpTRES.*|.*GrpGRES.*",
        "you or your group already use all the GPUs that the QoS or account allows",
    ),
    (
        r"QOS.*Limit|QOSMax.*|QOSGrp.*|QOSUsageThreshold|Assoc.*|Max.*Per.*|AccountingPolicy|JobArrayTaskLimit",
        "a limit of your QoS or account is reached (`sacctmgr show qos`)",
    ),
    (r"Licenses", "it waits for a licence"),
    (
        r"launch failed requeued held|BadConstraints|Constraints|MaxMemPerLimit",
        "no node can ever run it: correct gres, cluster.slurm.constraint or memory_per_gpu",
    ),
    (r"SchedDefer|FedJobLock|Cleaning", "Slurm is still cleaning up its previous run, or has deferred it"),
    (r"BurstBuffer\w*", "it waits for its burst buffer"),
    (r"PowerNotAvail|PowerReserved|FrontEndDown", "a power limit, or a front-end node that is down, delays it"),
    (r"SystemFailure|JobLaunchFailure", "Slurm failed to start it; tell the administrators if it stays that way"),
    (r"NodeDown|Prolog", "the node chosen for it failed; Slurm is looking for another"),
    (r"None", "Slurm has not looked at it yet"),
)


def explain_pending(reason: str) -> str:
    """Explain why a job is waiting; returns ``reason`` itself if it is unknown."""
    words = next((words for pattern, words in PENDING_REASONS if re.fullmatch(pattern, reason)), "")
    return words or reason


# How a job ended → failure kind, what happened, what to do. States that don't reveal the cause are left out.
JOB_ENDINGS: Mapping[str, tuple[str, str, str]] = {
    "TIMEOUT": ("timed_out", "its job reached its walltime", "start it again; raise time_limit of the partition"),
    "DEADLINE": ("timed_out", "its job reached its deadline", "start it again"),
    "NODE_FAIL": ("node_failure", "its node failed", "start it again; Slurm avoids that node"),
    "BOOT_FAIL": ("node_failure", "its node did not boot", "start it again; tell the administrators if it repeats"),
    "OUT_OF_MEMORY": (
        "out_of_memory",
        "its job used more memory than it requested",
        "raise cluster.slurm.memory_per_gpu, or mem under sbatch (weights go through memory while they load)",
    ),
    "PREEMPTED": (
        "node_failure",
        "a job with higher priority took its place",
        "start it again; use a partition or QoS that is not preempted",
    ),
    "CANCELLED": (
        "unknown",
        "its job was cancelled",
        "somebody ran scancel, perhaps an administrator (`sacct` says who); start it again",
    ),
    "REVOKED": ("unknown", "its job was revoked", "another cluster of the federation took it"),
}
_PARTITION_GONE = (
    "bad_argument",
    "its partition was removed",
    "correct cluster.slurm.partitions (`sinfo` lists them), and start it again",
)
JOB_EXIT_CODES: Mapping[int, tuple[str, str, str]] = {
    -53: (
        "bad_argument",
        "its node could not open the job's log",
        "cluster.slurm.work_dir must be on a file system that the compute nodes share, and writable there",
    ),
    78: ("bad_argument", "", "activate a Python of at least 3.10 under cluster.slurm.setup"),
    126: ("bad_argument", "", "a program of the job's script cannot be executed; see cluster.slurm.setup"),
    127: ("bad_argument", "", "a program of the job's script is missing; see cluster.slurm.setup and container"),
}


def known_ending(end: JobEnd) -> tuple[str, str, str] | None:
    """The failure kind, what happened with Slurm's own word, and what to do; None if the state doesn't reveal it."""
    is_removed = end.is_partition_gone and end.state in ("NODE_FAIL", "CANCELLED")
    known = _PARTITION_GONE if is_removed else JOB_ENDINGS.get(end.state)
    word = f"{end.state}{f', {end.reason}' if end.reason not in ('', 'None') else ''}"
    return (known[0], f"{known[1]} (Slurm: {word})", known[2]) if known else None


def diagnose_job(end: JobEnd | None, job_id: str, log: str) -> ReplicaFailure:
    """Why a replica's job ended, if the replica itself didn't report it. ``log`` is the end of its log."""
    if job_id == UNCONFIRMED_JOB:
        return ReplicaFailure("unknown", "sbatch did not answer, and its job is not in the queue", "start it again")
    if end is None:
        hint = "start it again; `sacct` may know more"
        return ReplicaFailure("unknown", f"job {job_id} is no longer known to Slurm, so the reason is unknown", hint)
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("--- ")]
    told = [line for line in lines if " agent-infra: " not in line or line.startswith("agent-infra: ")]
    known = known_ending(end) or JOB_EXIT_CODES.get(end.exit_code)
    if known is not None and end.state != "CANCELLED":
        kind, what, hint = known
        ours = [line for line in told if line.startswith("agent-infra: ")]  # printed by the job's script
        return ReplicaFailure(kind, what or [describe_exit(end.exit_code), *told, *ours][-1][:400], hint)
    failure = classify_failure("\n".join(told), end.exit_code)
    if failure.kind == "unknown" and known is not None:
        return ReplicaFailure(*known)
    return failure


CONFIRM_S = 120.0  # time for a job to appear in the queue if sbatch didn't print its number
CLOCK_SLACK_S = 5.0  # how far a node's clock may be behind that of Slurm's controller


def reconcile_record(
    replica: str, told: Submission, job: SlurmJob | None, record: ReplicaRecord | None, clock: tuple[float, float]
) -> ReplicaRecord | None:
    """A replica's record, corrected by the state of its job; None if the job ended without a final report.

    ``record`` is the replica's own report, perhaps from before a requeue. ``clock`` is the current time on this machine
    and on the cluster.
    """
    now, cluster_now = clock
    is_over = record is not None and record.state in ("stopped", "failed")
    if job is None and told.job_id == UNCONFIRMED_JOB and cluster_now < told.at + CONFIRM_S:
        return dataclasses.replace(
            reported_record(replica, told, None), message="sbatch has not printed its number yet"
        )
    if job is None or job.state in ENDED_JOB_STATES:
        return dataclasses.replace(record, partition=told.partition) if record is not None and is_over else None
    started = min(job.starts_at or cluster_now, cluster_now)
    queued = dataclasses.replace(
        reported_record(replica, told, None),
        node=job.node,
        partition=job.partition,
        queue_wait_s=max(0.0, started - job.submitted_at) if job.submitted_at is not None else None,
    )
    if job.state in WAITING_JOB_STATES or (job.state == "CONFIGURING" and record is None):
        reason = None if job.reason in ("None", "") else job.reason
        message = explain_pending(reason) if reason else None
        return dataclasses.replace(queued, node="", message=message, pending_reason=reason, starts_at=job.starts_at)
    # A requeued job may be running again before its script has removed the previous run's final report.
    is_older = job.state == "RUNNING" and record is not None and record.started_at < started - CLOCK_SLACK_S
    is_of_before = is_older if is_over else record is not None and job.node not in ("", record.node)
    if record is None or is_of_before or record.job_id != job.id:
        return dataclasses.replace(queued, state="starting", time_left_s=job.time_left_s)
    return dataclasses.replace(
        record,
        state="draining" if job.state == "COMPLETING" and not is_over else record.state,
        partition=job.partition,
        queue_wait_s=queued.queue_wait_s,
        time_left_s=job.time_left_s,
        ends_at=now + job.time_left_s if job.time_left_s is not None else None,
    )


def reported_record(replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
    """A replica's record without the state of its job: its own report, or else that a job was submitted for it."""
    pending = ReplicaRecord(replica, told.model, "pending", told.engine, "", 0, "", started_at=told.at)
    return dataclasses.replace(record or pending, job_id=told.job_id, partition=told.partition)

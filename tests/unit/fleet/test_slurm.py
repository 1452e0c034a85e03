"""Slurm, the parts without Slurm: what its commands print, where replicas go, what became of a job."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE_S

import agent_infra
from agent_infra import render_job, shell_words
from agent_infra_core import __version__
from agent_infra_core.control.status import describe_replica
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.containers import fetch_command
from agent_infra_core.fleet.directives import job_directives
from agent_infra_core.fleet.explain import diagnose_job, explain_pending, reconcile_record
from agent_infra_core.fleet.parse import (
    JobEnd,
    SlurmJob,
    SlurmNode,
    Submission,
    parse_gres,
    parse_job_end,
    parse_job_number,
    parse_nodes,
    parse_squeue,
    squeue_format,
)
from agent_infra_core.fleet.place import (
    JobRequest,
    bind_options,
    idle_gpus,
    job_name,
    job_replicas,
    place_replicas,
    replica_shape,
)
from agent_infra_core.fleet.slurm import QueueView, view_queue
from agent_infra_core.fleet.slurm_host import QueueAnswer
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ContainerConfig, ModelConfig, PartitionConfig, SlurmConfig

GOLDEN = Path(__file__).parents[2] / "golden"
VLLM = ModelConfig("m", "org/m")
GPU = PartitionConfig("gpu")
NOW = 1_800_000_000.0


# --- What squeue prints. ---------------------------------------------------------------------------------------------


def printed(nonce: str, *jobs: tuple[str, ...]) -> str:
    """As squeue fills in the format."""
    text = ""
    for job in jobs:
        line = squeue_format(nonce)
        for name, value in zip(("%A", "%T", "%r", "%V", "%S", "%L", "%P", "%B", "%Z", "%j"), job, strict=True):
            line = line.replace(f"{name}@", f"{value}@", 1)
        text += line + "\n"
    return text


def test_a_job_is_read_with_its_times() -> None:
    times = ("2026-11-22T14:30:00", "2026-11-22T14:32:00", "1-02:03:04")
    [job] = parse_squeue(printed("n", ("7", "RUNNING", "None", *times, "gpu", "n1", "/w", "name")), "n")
    assert (job.id, job.state, job.partition, job.node, job.work_dir, job.name) == (
        *("7", "RUNNING", "gpu", "n1", "/w", "name"),
    )
    assert job.starts_at == 1795357920.0
    assert (job.starts_at - (job.submitted_at or 0), job.time_left_s) == (120.0, 93784.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5:00", 300.0), ("2:00:00", 7200.0), ("UNLIMITED", None), ("INVALID", None), ("", None)]
)
def test_the_time_left_is_read_in_every_form(text: str, seconds: float | None) -> None:
    row = ("7", "PENDING", "Resources", "N/A", "N/A", text, "a,b", "n/a", "/w", "x")
    [job] = parse_squeue(printed("n", row), "n")
    assert (job.time_left_s, job.starts_at, job.node) == (seconds, None, "")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=4))
def test_no_name_of_a_job_can_pass_for_another_job(names: list[str]) -> None:
    rows = [(str(i), "RUNNING", "None", "N/A", "N/A", "5:00", "p", "n", "/w", name) for i, name in enumerate(names)]
    jobs = parse_squeue(printed("0f3a77", *rows), "0f3a77")
    assert [(job.id, job.name) for job in jobs] == [(str(i), name.strip()) for i, name in enumerate(names)]


def test_names_with_pipes_newlines_and_the_format_itself_are_names() -> None:
    ugly = f"a|b\n{squeue_format('other')}\n9|RUNNING"
    [job] = parse_squeue(printed("n", ("7", "RUNNING", "None", "N/A", "N/A", "1:00", "p", "n", "/w", ugly)), "n")
    assert job.name == ugly


def test_a_listing_that_was_cut_off_is_an_error_and_not_fewer_jobs() -> None:
    text = printed("n", ("7", "RUNNING", "None", "N/A", "N/A", "1:00", "p", "n", "/w", "x"))
    with pytest.raises(ValueError, match="squeue printed"):
        parse_squeue(text[:-20], "n")


def test_a_jobs_name_carries_deployment_model_and_replicas_and_no_other_is_taken_for_it() -> None:
    request = JobRequest("d", VLLM, ("m-1", "m-12"), GPU, "/w", "/w/d/run", "/p")
    assert job_name(request) == "agent-infra:d:m:1+12"
    assert job_replicas("agent-infra:d:m:1+12", "d") == ("m", ["m-1", "m-12"])
    for name in ("agent-infra:dd:m:1", "agent-infra:d", "other:d:m:1", "sbatch"):
        assert job_replicas(name, "d") is None


# --- What scontrol prints of nodes. ----------------------------------------------------------------------------------

NODE = (
    "NodeName=n1 Arch=x86_64 CoresPerSocket=8  CPUAlloc=2 CPUEfctv=8 CPUTot=8 Gres=gpu:h100:4(S:0),gpu:a100:2 "
    "NodeAddr=n1 GresUsed=gpu:h100:3(IDX:0-2),gpu:a100:0(IDX:N/A) Version=22.05.8 OS=Linux 6.1 #1 SMP State=MIXED "
    "ThreadsPerCore=1 Partitions=low,gpu CfgTRES=cpu=8,mem=16000M AllocTRES= "
    "Reason=State=DOWN Gres=gpu:99 [root@2026]"
)


def node(**changes: str) -> SlurmNode:
    text = NODE
    for name, value in changes.items():
        old = next(word for word in text.split() if word.startswith(f"{name}="))
        text = text.replace(old, f"{name}={value}", 1)
    [parsed] = parse_nodes(text)
    return parsed


def test_idle_gpus_are_those_of_the_wanted_type_that_no_job_has() -> None:
    mixed = node()
    assert (mixed.free("gpu"), mixed.free("gpu:h100"), mixed.free("gpu:a100"), mixed.free("gpu:v100")) == (3, 1, 2, 0)
    assert mixed.partitions == ("low", "gpu")
    assert node(GresUsed="gpu:h100:0(IDX:N/A)").free("gpu:h100") == 4


@pytest.mark.parametrize(
    "state",
    [
        *("IDLE+DRAIN", "DRAINED", "DOWN*", "IDLE*", "MIXED+DRAIN", "IDLE+RESERVED", "RESERVED", "MAINT", "UNKNOWN"),
        *("IDLE+MAINTENANCE", "MIXED+PLANNED", "IDLE+POWERED_DOWN", "IDLE+CLOUD+POWERING_UP", "IDLE+NOT_RESPONDING"),
        "ALLOCATED",
    ],
)
def test_nodes_that_take_no_job_have_no_idle_gpus(state: str) -> None:
    assert idle_gpus(node(State=state), GPU, SlurmConfig()) == 0


def test_gpus_of_a_node_whose_processors_are_all_taken_are_not_idle() -> None:
    assert idle_gpus(node(CPUAlloc="8"), GPU, SlurmConfig()) == 0
    assert idle_gpus(node(), GPU, SlurmConfig()) == 3


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("gpu:h100:4(S:0)", {"gpu:h100": 4}),
        ("gpu:4", {"gpu": 4}),
        ("gpu:h100:4(S:0-1),gpu:a100:2(S:1),shard:h100:16(S:0)", {"gpu:h100": 4, "gpu:a100": 2, "shard:h100": 16}),
        ("gpu:1g.10gb:7(S:0)", {"gpu:1g.10gb": 7}),
        ("gpu:nvidia_a100_80gb_pcie:2(IDX:0,3)", {"gpu:nvidia_a100_80gb_pcie": 2}),
        ("gpu", {"gpu": 1}),
        ("gpu:(null):3(IDX:0-2)", {"gpu": 3}),
        ("gpu:(null):0(IDX:N/A)", {"gpu": 0}),
        ("gpu:h100:0(IDX:N/A),shard:h100:3(2/4,0/4,1/4)", {"gpu:h100": 2, "shard:h100": 3}),
        ("gpu:h100:1(IDX:1),shard:h100:1(IDX:0)", {"gpu:h100": 2, "shard:h100": 1}),  # seen with 22.05
        ("(null)", {}),
        ("", {}),
    ],
)
def test_generic_resources_are_read_typed_and_untyped(text: str, counts: dict[str, int]) -> None:
    assert parse_gres(text) == counts


# --- Where replicas go. ----------------------------------------------------------------------------------------------


def idle(name: str, partitions: str, gpus: int = 4, cpus: int = 32) -> SlurmNode:
    return SlurmNode(name, tuple(partitions.split(",")), True, True, cpus, {"gpu:h100": gpus}, {})


def placed(count: int, model: ModelConfig, partitions: list[PartitionConfig], *nodes: SlurmNode) -> list[Any]:
    return [(each.name, held) for each, held in place_replicas(count, model, SlurmConfig(tuple(partitions)), nodes)]


HIGH, LOW = PartitionConfig("high", priority=10), PartitionConfig("low", priority=1)
TWO = dataclasses.replace(VLLM, tensor_parallel_size=2)
SIXTEEN = dataclasses.replace(VLLM, tensor_parallel_size=8, pipeline_parallel_size=2)


def test_idle_gpus_are_filled_by_priority_and_the_rest_waits_where_it_is_preferred() -> None:
    nodes = (idle("a", "high", 2), idle("b", "low", 3))
    assert placed(7, VLLM, [LOW, HIGH], *nodes) == [("high", 1)] * 2 + [("low", 1)] * 3 + [("high", 1)] * 2


def test_a_node_of_two_partitions_is_filled_once() -> None:
    assert placed(3, TWO, [LOW, HIGH], idle("a", "low,high")) == [("high", 1)] * 3
    assert placed(3, TWO, [LOW, HIGH], idle("a", "low,high"), idle("b", "low", 2)) == [
        *(("high", 1), ("high", 1), ("low", 1)),
    ]


def test_gpus_scattered_over_nodes_make_no_room_for_a_replica_that_needs_two() -> None:
    assert placed(1, TWO, [LOW, HIGH], idle("a", "high", 1), idle("b", "high", 1), idle("c", "low", 2)) == [("low", 1)]


def test_with_nothing_idle_everything_waits_in_the_preferred_partition() -> None:
    assert placed(2, VLLM, [LOW, HIGH]) == [("high", 1)] * 2


def test_an_exclusive_partition_gives_whole_nodes_and_a_job_holds_what_fits() -> None:
    whole = PartitionConfig("whole", exclusive=True, priority=5)
    assert placed(5, TWO, [whole], idle("a", "whole")) == [("whole", 2), ("whole", 2), ("whole", 1)]
    busy = dataclasses.replace(idle("a", "whole"), is_idle=False)
    assert placed(2, TWO, [whole, LOW], busy, idle("b", "low")) == [("low", 1)] * 2


def test_a_replica_larger_than_a_node_takes_several_that_have_the_room() -> None:
    nodes = [idle(name, "gpu", 8) for name in "abc"]
    eight = PartitionConfig("gpu", gpus_per_node=8)
    shape = replica_shape(SIXTEEN, eight, SlurmConfig())
    assert (shape.nodes, shape.gpus) == (2, 8)
    assert placed(2, SIXTEEN, [eight, LOW], *nodes) == [("gpu", 1)] * 2


def test_what_fits_no_partition_is_refused_with_what_would() -> None:
    with pytest.raises(RefusedError, match=r"its 7 GPUs do not fit partition gpu: 2 nodes .* as a multiple of 2"):
        placed(1, dataclasses.replace(VLLM, tensor_parallel_size=7), [GPU])
    command = ModelConfig("c", "x", engine="command", command=("s", "{port}"), tensor_parallel_size=8)
    with pytest.raises(RefusedError, match="engine command cannot span nodes"):
        placed(1, command, [GPU])


def test_an_engine_without_gpus_goes_where_processors_are_idle() -> None:
    model = ModelConfig("c", "x", engine="llama_cpp", engine_args=("--threads", "2"))
    assert placed(3, model, [LOW, HIGH], idle("a", "high", 0, cpus=4), idle("b", "low", 0, cpus=9)) == [
        *(("high", 1), ("high", 1), ("low", 1)),
    ]


def test_a_reservation_has_its_own_nodes_and_no_other() -> None:
    reserved = node(State="IDLE+RESERVED", Version="23.11 ReservationName=grp", CPUAlloc="0")
    mine = PartitionConfig("gpu", sbatch={"reservation": "grp"})
    assert idle_gpus(reserved, mine, SlurmConfig()) == 3
    assert idle_gpus(reserved, GPU, SlurmConfig(sbatch={"reservation": "grp"})) == 3
    assert idle_gpus(reserved, GPU, SlurmConfig()) == 0
    assert idle_gpus(reserved, GPU, SlurmConfig(sbatch={"reservation": "other"})) == 0
    assert idle_gpus(node(), mine, SlurmConfig()) == 0
    maintained = node(State="IDLE+MAINT+RESERVED", Version="23.11 ReservationName=grp")
    assert idle_gpus(maintained, mine, SlurmConfig()) == 0


def test_without_gres_the_gpus_of_a_node_without_jobs_are_idle() -> None:
    bare = dataclasses.replace(idle("c1", "gh,old"), gres={})
    whole = PartitionConfig("gh", exclusive=True, gpus_per_node=1, sbatch={"gres": None})
    assert placed(2, VLLM, [whole, PartitionConfig("other")], bare, dataclasses.replace(bare, name="c2")) == (
        [("gh", 1), ("gh", 1)]
    )
    none = SlurmConfig((PartitionConfig("old", gpus_per_node=2),), gpu_flag="none")
    assert idle_gpus(bare, none.partitions[0], none) == 2
    assert idle_gpus(dataclasses.replace(bare, is_idle=False), none.partitions[0], none) == 0


def test_processors_and_memory_count_too() -> None:
    slurm = SlurmConfig((HIGH, LOW), cpus_per_gpu=8, memory_per_gpu="64G")
    shape = replica_shape(dataclasses.replace(VLLM, tensor_parallel_size=2), HIGH, slurm)
    assert (shape.cpus, shape.memory_mb) == (16, 131072)
    few_cpus = idle("a", "high", cpus=17)
    little_memory = dataclasses.replace(idle("b", "low"), free_memory_mb=3 * 65536)
    held = place_replicas(6, VLLM, slurm, (few_cpus, little_memory))
    assert [each.name for each, _ in held] == ["high", "high", "low", "low", "low", "high"]


def test_where_slurm_shows_no_nodes_everything_is_left_to_sbatch() -> None:
    assert placed(2, VLLM, [LOW, HIGH]) == [("high", 1), ("high", 1)]


@pytest.mark.parametrize(
    ("flag", "gres", "option"),
    [
        ("gres", "gpu:h100", ("gres", "gpu:h100:2")),
        ("gpus-per-node", "gpu:h100", ("gpus-per-node", "h100:2")),
        ("gpus-per-node", "gpu", ("gpus-per-node", "2")),
        ("none", "gpu", None),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants_it(flag: str, gres: str, option: tuple[str, str] | None) -> None:
    slurm = SlurmConfig(account="abc", constraint="a100&ib", gpu_flag=flag)
    request = dataclasses.replace(REQUEST, partition=PartitionConfig("gpu", gres=gres), gpus=2, memory_mb=1024)
    options = job_directives(request, slurm)
    assert [each for each in options if each[0] in ("gres", "gpus-per-node")] == ([option] if option else [])
    assert {("account", "abc"), ("constraint", "a100&ib"), ("mem", "1024M")} <= set(options)


def test_engines_that_do_not_ask_for_the_key_everywhere_stand_behind_a_gate() -> None:
    command = ModelConfig("c", "x", engine="command", command=("s", "{port}"))
    for model, is_gated in ((VLLM, False), (command, True), (dataclasses.replace(VLLM, engine="sglang"), True)):
        for mode in ("auto", "login", "none"):
            assert bind_options(model, mode) == {"bind_host": "0.0.0.0", "is_gated": is_gated}
        assert bind_options(model, "node") == {"bind_host": "127.0.0.1", "is_gated": False}


# --- What became of a replica. ---------------------------------------------------------------------------------------

TOLD = Submission("7", "gpu", "vllm", "m", NOW - 100)
JOB = SlurmJob("7", "RUNNING", "None", NOW - 90, NOW - 60, 3600.0, "gpu", "n1", "/w", "agent-infra:d:m:1")
READY = ReplicaRecord("m-1", "m", "ready", "vllm", "n1", 5, "boot:1", port=5900, job_id="7")


def judged(job: SlurmJob | None, record: ReplicaRecord | None) -> ReplicaRecord | None:
    return reconcile_record("m-1", TOLD, job, record, (NOW, NOW))


def seen(job: SlurmJob | None, record: ReplicaRecord | None) -> ReplicaRecord:
    found = judged(job, record)
    assert found is not None
    return found


def test_a_job_that_waits_says_why_in_words_and_when_it_may_start() -> None:
    waiting = dataclasses.replace(JOB, state="PENDING", reason="QOSMaxGRESPerUser", node="", starts_at=NOW + 600)
    record = seen(waiting, None)
    assert (record.state, record.pending_reason, record.starts_at) == ("pending", "QOSMaxGRESPerUser", NOW + 600)
    assert "all the GPUs that the QoS or account allows" in (record.message or "")
    assert (record.partition, record.job_id, record.queue_wait_s) == ("gpu", "7", 90.0)
    assert describe_replica(record).startswith("PENDING (QOSMaxGRESPerUser, est. ")


def test_a_live_line_tells_how_a_replica_came_up_and_begins_anew_with_a_requeue() -> None:
    shown: list[str] = []

    class Screen:
        def update(self, text: Any) -> None:
            shown.append(str(text))

    board = agent_infra.ReplicaBoard()
    board._live = Screen()
    waiting = dataclasses.replace(JOB, state="PENDING", reason="Resources", node="")
    loading = dataclasses.replace(READY, state="loading", progress="5/9")
    for record in (seen(waiting, None), seen(JOB, None), seen(JOB, loading), seen(JOB, READY), seen(waiting, READY)):
        board.show([record])
    pending = shown[0].split(None, 1)[1]
    assert pending.startswith("PENDING (Resources, est. ")
    assert shown[3].split(None, 1)[1] == f"{pending} → RUNNING n1 → LOADING 5/9 → READY 127.0.0.1:5900"
    assert shown[4].split(None, 1)[1] == pending


def test_every_pending_reason_of_slurm_has_words_of_its_own() -> None:
    for reason in (
        *("Resources", "Priority", "Dependency", "JobHeldUser", "JobHeldAdmin", "PartitionNodeLimit", "BeginTime"),
        *("PartitionDown", "ReqNodeNotAvail, UnavailableNodes:n[1-2]", "QOSMaxGRESPerUser", "AssocGrpGRES", "Licenses"),
        *("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",),
        *("QOSMaxJobsPerUserLimit", "AssocMaxJobsLimit", "QOSGrpCpuLimit", "launch failed requeued held", "None"),
        *("QOSNotAllowed", "AccountNotAllowed", "QOSMinGRES", "QOSUsageThreshold", "JobArrayTaskLimit", "SchedDefer"),
        *("MaxMemPerLimit", "Constraints", "PartitionConfig", "Cleaning", "BurstBufferStageIn", "ReservationDeleted"),
        *("SystemFailure", "JobLaunchFailure", "PowerNotAvail", "FrontEndDown", "FedJobLock", "BeginTime"),
        *("ReqNodeNotAvail, Reserved for maintenance", "MaxGRESPerAccount", "InvalidQOS", "QOSMaxCpuPerUserLimit"),
    ):
        assert explain_pending(reason) != reason
    assert explain_pending("SomethingNew") == "SomethingNew"


def test_a_job_whose_number_never_came_is_found_by_its_name() -> None:
    def view(note: str, *jobs: SlurmJob, clock: float = NOW) -> QueueView:
        answer = QueueAnswer(list(jobs), {"m-1": f"{note} gpu vllm m {NOW:.0f}"}, {}, clock, None)
        return view_queue(answer, "d")

    named = dataclasses.replace(JOB, id="8", name="agent-infra:d:m:1")
    assert view("0", named).told["m-1"].job_id == "8"
    assert view("7", named, dataclasses.replace(named, id="7")).told["m-1"].job_id == "7"
    assert [held for _, held in view("7", named, dataclasses.replace(named, id="7")).jobs] == [{"m-1"}, {"m-1"}]
    told = view("0", dataclasses.replace(named, state="CANCELLED")).told["m-1"]
    assert told.job_id == "0"
    waiting = reconcile_record("m-1", told, None, None, (NOW, NOW + 60))
    assert waiting is not None
    assert (waiting.state, waiting.message) == ("pending", "sbatch has not printed its number yet")
    assert reconcile_record("m-1", told, None, None, (NOW, NOW + 600)) is None
    assert diagnose_job(None, "0", "").line == "sbatch did not answer, and its job is not in the queue"


def test_of_what_a_sites_sbatch_says_only_the_number_counts() -> None:
    assert parse_job_number("--- queue 12 ---\n42 more\n4711;cluster\n") == "4711"
    assert parse_job_number("Welcome to host 3\n") == "0"


def test_a_job_that_runs_without_a_report_is_starting_and_with_one_is_what_it_says() -> None:
    assert (seen(JOB, None).state, seen(JOB, None).node) == ("starting", "n1")
    record = seen(JOB, READY)
    assert (record.state, record.port, record.partition, record.ends_at) == ("ready", 5900, "gpu", NOW + 3600)
    assert record.queue_wait_s == 30.0


def test_a_report_from_before_a_requeue_is_not_believed() -> None:
    requeued = dataclasses.replace(JOB, state="PENDING", reason="BeginTime", node="")
    assert seen(requeued, READY).state == "pending"
    assert seen(requeued, READY).port is None
    elsewhere = dataclasses.replace(JOB, node="n2")
    assert (seen(elsewhere, READY).state, seen(elsewhere, READY).node) == ("starting", "n2")
    assert seen(JOB, dataclasses.replace(READY, job_id="6")).state == "starting"
    stopped = dataclasses.replace(READY, state="stopped", started_at=NOW - 120)
    assert seen(JOB, stopped).state == "starting", "it runs again, and its script has not removed that report yet"
    assert seen(JOB, dataclasses.replace(stopped, started_at=NOW - 59)).state == "stopped"


def test_the_last_word_of_a_replica_outlives_its_job_and_silence_is_to_be_explained() -> None:
    assert seen(None, dataclasses.replace(READY, state="stopped")).state == "stopped"
    assert judged(None, READY) is None
    assert judged(dataclasses.replace(JOB, state="NODE_FAIL"), READY) is None
    assert seen(dataclasses.replace(JOB, state="COMPLETING"), READY).state == "draining"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 X=1", JobEnd("FAILED", 3, "NonZeroExitCode")),
        ("JobId=7 JobState=FAILED Reason=RaisedSignal:53(Real-time_signal_19) ExitCode=0:53", -53),
        ("JobId=7 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15", JobEnd("TIMEOUT", -15, "TimeLimit")),
        ("OUT_OF_MEMORY|0:125|None\n", JobEnd("OUT_OF_MEMORY", -125)),
        ("CANCELLED by 1000|0:0|None\n", JobEnd("CANCELLED", 0, "by 1000")),
        ("JobId=7 JobState=RUNNING Reason=None ExitCode=0:0", None),
        ("RUNNING|0:0|None\n", None),
        ("", None),
    ],
)
def test_the_end_of_a_job_is_read_from_scontrol_and_from_sacct(text: str, end: JobEnd | int | None) -> None:
    found = parse_job_end(text)
    assert found == end or (found is not None and found.exit_code == end)


@pytest.mark.parametrize(
    ("end", "log", "kind", "line"),
    [
        (JobEnd("TIMEOUT", -15), "", "timed_out", "reached its walltime"),
        (JobEnd("NODE_FAIL", 0), "", "node_failure", "its node failed"),
        (JobEnd("PREEMPTED", -15), "", "node_failure", "higher priority"),
        (
            JobEnd("NODE_FAIL", 0, "NodeDown", True),
            "",
            "bad_argument",
            "its partition was removed (Slurm: NODE_FAIL, No",
        ),
        (JobEnd("CANCELLED", 0, "by 1000"), "", "unknown", "its job was cancelled (Slurm: CANCELLED, by 1000)"),
        (JobEnd("OUT_OF_MEMORY", -125), "Killed", "out_of_memory", "used more memory than it requested"),
        (JobEnd("FAILED", -53), "", "bad_argument", "could not open the job's log"),
        (JobEnd("FAILED", 78), "agent-infra: python3 is not Python 3.10", "bad_argument", "is not Python 3.10"),
        (JobEnd("FAILED", 127), "serve.sh: line 9: apptainer: command not found", "bad_argument", "apptainer: command"),
        (JobEnd("FAILED", 1), "torch.OutOfMemoryError: CUDA out of memory", "out_of_memory", "CUDA out of memory"),
        (JobEnd("FAILED", 1), "OSError: [Errno 122] Disk quota exceeded", "quota", "quota"),
        (JobEnd("CANCELLED", 0), "all was well", "unknown", "its job was cancelled"),
        (JobEnd("FAILED", -9), "", "unknown", "ended by signal 9"),
        (None, "", "unknown", "job 7 is no longer known to Slurm"),
    ],
)
def test_why_a_job_ended_is_told_from_evidence(end: JobEnd | None, log: str, kind: str, line: str) -> None:
    failure = diagnose_job(end, "7", f"2026-11-22 10:00:00 agent-infra: starting: x\n{log}\n")
    assert failure.kind == kind
    assert line in failure.line
    assert failure.hint


# --- The script of a job. --------------------------------------------------------------------------------------------

SLURM = SlurmConfig(
    partitions=(GPU,),
    default_qos="normal",
    setup=("module load cuda", 'export HF_HOME="$HOME/it\'s"'),
    sbatch={"account": "abc", "cpus-per-task": 8, "requeue": None, "mem": None, "comment-free": True},
)
REQUEST = JobRequest("d", VLLM, ("m-1",), GPU, "/h/w", "/h/w/d/run", "/h/w/programs/0f/agent_infra.py", gpus=1)


@pytest.mark.parametrize(
    ("name", "request_", "slurm"),
    [
        ("vllm", REQUEST, SLURM),
        ("vllm_multinode", dataclasses.replace(REQUEST, model=SIXTEEN, nodes=2, gpus=8), SlurmConfig()),
        (
            "exclusive",
            dataclasses.replace(REQUEST, replicas=("m-1", "m-2"), partition=dataclasses.replace(GPU, exclusive=True)),
            SlurmConfig(),
        ),
        (
            "engine",
            dataclasses.replace(REQUEST, model=ModelConfig("m", "/x.gguf", engine="llama_cpp"), gpus=0, cpus=2),
            SlurmConfig(),
        ),
        (
            "sglang",
            dataclasses.replace(REQUEST, model=dataclasses.replace(VLLM, engine="sglang"), cpus=8, memory_mb=65536),
            SlurmConfig(setup=("source ~/venvs/sglang/bin/activate",)),
        ),
        (
            "apptainer",
            dataclasses.replace(REQUEST, model=ModelConfig("m", "/scratch/it's/m")),
            SlurmConfig(container=ContainerConfig("apptainer", "/images/v$llm.sif")),
        ),
        (
            "pyxis",
            dataclasses.replace(REQUEST, model=SIXTEEN, nodes=2, gpus=8),
            SlurmConfig(container=ContainerConfig("pyxis", "vllm/vllm-openai")),
        ),
        (
            "podman",
            dataclasses.replace(
                REQUEST, model=ModelConfig("m", "org/m", env={"HF_HOME": "/scratch/it's", "HF_TOKEN": "t"})
            ),
            SlurmConfig(container=ContainerConfig("podman", "vllm", mounts=("/data", "/a:/b:ro"), env={"X": "secret"})),
        ),
    ],
)
def test_the_script_is_the_golden_one_and_the_shell_can_read_it(
    name: str, request_: JobRequest, slurm: SlurmConfig, pytestconfig: pytest.Config
) -> None:
    script = render_job(request_, slurm)
    golden = GOLDEN / f"{name}.sbatch"
    assert script.replace(__version__, "VERSION") == golden.read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("stage", "line", "mount"),
    [
        ("/local/it's", """mkdir -p '/local/it'"'"'s'""", """-v '/local/it'"'"'s:/local/it'"'"'s'"""),
        ("/local/$USER/x", None, "-v /local:/local"),
        ("$SCRATCH/x", None, '-e SCRATCH -v /w:/w ${HF_HOME:+-v "$HF_HOME:$HF_HOME"}'),
        ("${SCRATCH}", None, '${SCRATCH:+-v "$SCRATCH:$SCRATCH"}'),
        ("$TMPDIR/x", None, '${TMPDIR:+-v "$TMPDIR:$TMPDIR"} vllm'),
    ],
)
def test_a_container_gets_the_folder_for_staging(stage: str, line: str | None, mount: str) -> None:
    request = dataclasses.replace(REQUEST, model=ModelConfig("m", "org/m", stage=stage), work_dir="/w")
    script = render_job(request, SlurmConfig(container=ContainerConfig("podman", "vllm")))
    assert mount in script
    assert [each for each in script.splitlines() if each.startswith("mkdir") and "HF_HOME" not in each] == (
        [line] if line else []
    )
    assert script.count('"$TMPDIR:$TMPDIR"') == 1


def test_every_node_of_a_replica_gets_the_folder_that_its_container_mounts() -> None:
    request = dataclasses.replace(REQUEST, model=dataclasses.replace(SIXTEEN, stage="/local"), nodes=2, gpus=8)
    script = render_job(request, SlurmConfig(container=ContainerConfig("apptainer", "v.sif")))
    assert "\nsrun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none mkdir -p /local\n" in script
    assert script.index("mkdir -p /local") < script.index(" rank --replica ")


@pytest.mark.parametrize(
    ("container", "command"),
    [
        (None, 'exec "${AGENT_INFRA_PYTHON:-python3}" /h/w/p.pyz fetch org/m'),
        (ContainerConfig("apptainer", "v.sif"), "exec apptainer exec --bind /h/w "),
        (
            ContainerConfig("pyxis", "v"),
            "exec srun --nodes=1 --ntasks=1 --partition=fast --account=abc --container-image=v",
        ),
        (ContainerConfig("podman", "v"), " -e HF_TOKEN "),
    ],
)
def test_models_are_pulled_with_the_python_of_the_container(container: ContainerConfig | None, command: str) -> None:
    partitions = (PartitionConfig("slow"), PartitionConfig("fast", priority=2))
    slurm = SlurmConfig(partitions, account="abc", container=container)
    text = fetch_command(slurm, ModelConfig("m", "org/m", env={"HF_TOKEN": "hush"}), "/h/w", "/h/w/p.pyz")
    assert command in text
    assert text.endswith("/h/w/p.pyz fetch org/m")
    assert "hush" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=PATIENCE_S)


def test_a_partitions_options_win_and_null_takes_one_away() -> None:
    partition = dataclasses.replace(GPU, qos="fast", sbatch={"account": "other", "signal": None})
    options = dict(job_directives(dataclasses.replace(REQUEST, partition=partition), SLURM))
    assert (options["account"], options["qos"], options["cpus-per-task"]) == ("other", "fast", 8)
    assert not {"signal", "requeue", "mem", "exclusive"} & set(options)


def own(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.j2").write_text(text)
    return render_job(REQUEST, SlurmConfig(template=str(tmp_path / "mine.j2")))


def test_a_template_of_ones_own_quotes_by_itself_and_may_extend_ours(tmp_path: Path) -> None:
    mine = (
        '{% extends "vllm.sbatch.j2" %}{% block environment %}{{ super() | shell }}echo {{ "a b; $x" }}{% endblock %}'
    )
    script = own(tmp_path, mine)
    assert "\necho 'a b; $x'" in script
    assert "export OMP_NUM_THREADS" in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\n{{ modle.name }}", "mine.j2: 'modle' is undefined"),
        ("#!/bin/sh\n{{ model.nam }}", "has no attribute 'nam'"),
        ("#!/bin/sh\n{% if %}", "mine.j2, line 2"),
        ("#!/bin/sh\n{{ container }}", "null cannot be a word for the shell"),
        ("#!/bin/sh\n{% include 'gone.j2' %}", "gone.j2 is not in"),
        ("srun x", "its first line must be #!"),
    ],
)
def test_a_mistake_in_a_template_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        own(tmp_path, text)
    assert message in str(caught.value)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_whatever_stands_in_a_template_reaches_the_program_as_it_is(text: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"printf %s {shell_words(text)}"], capture_output=True, check=True, timeout=PATIENCE_S
    )
    assert done.stdout == text.encode()

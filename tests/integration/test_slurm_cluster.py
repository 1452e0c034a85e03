"""Replicas as jobs of a real Slurm on this host: two nodes, two partitions, the embedded engine inside the jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from patience import PATIENCE_S
from program import Program, wait_for
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed, slurm_cluster
from weights import packaged_gguf

from agent_infra import render_job
from agent_infra_core.control.status import describe_replica
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.place import JobRequest, idle_gpus
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.slurm_host import SchedulerError
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, ContainerConfig, ModelConfig, PartitionConfig, SlurmConfig

Make = Callable[..., SlurmCluster]


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    """Two nodes of two processors and two GPUs; partition first has one of them, second the other, all has both."""
    require_slurm()
    partitions = (
        "PartitionName=first Nodes={0} Default=YES MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=1",
        "PartitionName=second Nodes={1} MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=1",
        "PartitionName=urgent Nodes=ALL MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=10 PreemptMode=OFF",
    )
    with slurm_bed(gpus=2, cpus=2, partitions=partitions) as made:
        yield made
        assert made.jobs() == []


@pytest.fixture
def run(bed: SlurmBed, tmp_path: Path) -> Iterator[Program]:
    """The command line in front of that Slurm; whatever jobs are left afterwards are taken away."""
    made = Program(tmp_path)
    made.environment = {
        **bed.environment,
        **made.environment,
        "PATH": bed.environment["PATH"],
        "SECRET_TOKEN": "s3cret",
    }
    yield made
    for each in made.running:
        each.close()
    bed.run("scancel", "--user=root")
    wait_for(lambda: not bed.run("squeue", "-h"), "an empty queue")


def configure(run: Program, bed: SlurmBed, replicas: int = 1, name: str = "d", **model: Any) -> None:
    """Write the configuration: the embedded engine in two partitions, unless ``model`` says otherwise."""
    embedded = {
        "name": "smollm2",
        "model_path": str(packaged_gguf()),
        "engine": "llama_cpp",
        "replicas": replicas,
        "engine_args": ["--threads", "1", "--max-num-seqs", "2"],
        "base_port": free_port(),
    }
    slurm = {
        "work_dir": str(bed.folder / "work"),
        "partitions": [{"name": "first", "priority": 2, "gpus_per_node": 2}, {"name": "second", "gpus_per_node": 2}],
        "setup": [f"export AGENT_INFRA_PYTHON={sys.executable}"],
    }
    document = {
        "proxy": {"port": run.port},
        "cluster": {"type": "slurm", "name": name, "tunnel": "none", "poll_interval": 0.3, "slurm": slurm},
        "models": [{**embedded, **model}],
    }
    run.config.write_text(json.dumps(document))


def test_start_connect_talk_stop(bed: SlurmBed, run: Program) -> None:
    configure(run, bed, replicas=3)
    before = bed.submit("sleep 600", "--partition=second", "--cpus-per-task=1")  # somebody else's
    wait_for(lambda: f"{before} RUNNING sbatch" in bed.jobs(), "the foreign job")
    started = run.run("start")
    assert started.returncode == 0, started.stderr
    for replica in ("smollm2-1", "smollm2-2", "smollm2-3"):  # which states are seen before the last is Slurm's haste
        told = re.findall(rf"^{replica}  ([A-Z]+)", started.stdout, re.MULTILINE)
        assert told[-1:] == ["READY"], started.stdout
    assert re.search(r"^smollm2-\d  (PENDING|RUNNING|STARTING|LOADING)", started.stdout, re.MULTILINE)
    rows = run.status()["replicas"]
    assert {(row["replica"], row["partition"], row["node"]) for row in rows} == {
        ("smollm2-1", "first", bed.nodes[0]),
        ("smollm2-2", "first", bed.nodes[0]),
        ("smollm2-3", "second", bed.nodes[1]),
    }
    assert all(row["ends_at"] > time.time() and row["job_id"] for row in rows)
    no_key_is_seen(bed, run)
    connected = run.spawn("connect")
    connected.wait_line("export OPENAI_BASE_URL")
    wait_for(lambda: run.get("/health")["models"]["smollm2"]["ready"] == 3, "all three in the proxy")
    client = OpenAI(base_url=f"http://127.0.0.1:{run.port}/v1", api_key="unused")
    served = set()
    for turn in range(6):
        answer = client.chat.completions.with_raw_response.create(
            model="smollm2", max_tokens=4, messages=[{"role": "user", "content": f"Say {turn}"}]
        )
        served.add(answer.headers["x-agent-infra-backend"])
    assert served == {"smollm2-1", "smollm2-2", "smollm2-3"}
    client.close()
    assert "agent-infra: starting" in run.run("logs", "smollm2-3").stdout
    stopped = run.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    for number in (1, 2, 3):
        assert f"smollm2-{number} (job " in stopped.stdout
    assert bed.jobs() == [f"{before} RUNNING sbatch"]
    assert "nothing of the deployment d ran" in run.run("stop").stdout
    wait_for(lambda: not run.processes(), "no process left")


def no_key_is_seen(bed: SlurmBed, run: Program) -> None:
    """Neither the key nor the operator's environment: not in ps, squeue, scripts, logs or the jobs' environment."""
    key = (bed.folder / "work" / "d" / "replica_key").read_text().strip()
    assert len(key) > 20
    told = bed.run("scontrol", "show", "job", "--details") + bed.run("squeue", "--json")
    for job in (line.split()[0] for line in bed.jobs() if "agent-infra" in line):
        told += bed.run("scontrol", "write", "batch_script", job, "-")
    told += "".join(log.read_text() for log in (bed.folder / "work" / "d" / "run" / "logs").iterdir())
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            told += entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
    assert key not in told
    [record] = [row for row in run.status()["replicas"] if row["replica"] == "smollm2-1"]
    assert b"SECRET_TOKEN" not in Path(f"/proc/{record['pid']}/environ").read_bytes()
    for path in (bed.folder / "work" / "d").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


# --- The cluster by itself: what it does to jobs, without engines. ---------------------------------------------------


@pytest.fixture
def make(bed: SlurmBed) -> Iterator[Make]:
    """Makes clusters of deployments on that Slurm. ``line`` stands for the engine: a shell line that ends the setup."""
    made: list[SlurmCluster] = []

    def cluster(
        line: str = "exec sleep 600",
        deployment: str = "c",
        has_second: bool = True,
        environment: Mapping[str, str] = bed.environment,
        **partition: Any,
    ) -> SlurmCluster:
        first = PartitionConfig(**{"name": "first", "gpus_per_node": 2, "priority": 2, **partition})
        second = PartitionConfig("second", gpus_per_node=2)
        slurm = SlurmConfig(
            partitions=(first, second) if has_second else (first,),
            work_dir=str(bed.folder / "work"),
            setup=(f"export AGENT_INFRA_PYTHON={sys.executable}", line),
        )
        config = ClusterConfig(type="slurm", name=deployment, tunnel="none", poll_interval=0.2, slurm=slurm)
        paths = deployment_paths(deployment, os.environ)
        made.append(slurm_cluster(config, paths, environment))
        return made[-1]

    yield cluster
    bed.run("scancel", "--user=root")
    wait_for(lambda: not bed.run("squeue", "-h"), "an empty queue")
    for one in made:
        if one.host.key:
            one.host.forget([record.replica for record in one.replicas()])


GPU_MODEL = ModelConfig("g", "org/m")


def start(cluster: SlurmCluster, count: int = 1, model: ModelConfig = GPU_MODEL) -> list[ReplicaRecord]:
    return cluster.start_replicas(cluster.prepare(model), count)


def record_of(cluster: SlurmCluster, replica: str) -> ReplicaRecord:
    return next(record for record in cluster.replicas() if record.replica == replica)


def wait_state(cluster: SlurmCluster, replica: str, *states: str) -> ReplicaRecord:
    wait_for(lambda: record_of(cluster, replica).state in states, f"{replica} {states}: {record_of(cluster, replica)}")
    return record_of(cluster, replica)


def test_idle_gpus_are_counted_as_slurm_gives_them(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    bed.submit("sleep 600", "--partition=first", "--gres=gpu:h100:1", "--cpus-per-task=1")
    wait_for(lambda: len([line for line in bed.jobs() if "RUNNING" in line]) == 1, "the foreign job")
    typed = PartitionConfig("urgent", gres="gpu:h100")
    free = {node.name: idle_gpus(node, typed, SlurmConfig()) for node in cluster.host.nodes()}
    assert free == {bed.nodes[0]: 1, bed.nodes[1]: 2}
    bed.drain(bed.nodes[1], "Gres=gpu:9 test")
    try:
        free = {node.name: idle_gpus(node, PartitionConfig("urgent"), SlurmConfig()) for node in cluster.host.nodes()}
        assert free == {bed.nodes[0]: 1, bed.nodes[1]: 0}
        held = [(record.replica, record.partition) for record in start(cluster, 3)]
        assert held == [("g-1", "first"), ("g-2", "first"), ("g-3", "first")]
    finally:
        bed.undrain(bed.nodes[1])


def test_replicas_fill_by_priority_and_the_rest_waits_and_says_why(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    assert [record.partition for record in start(cluster, 5)] == ["first", "first", "second", "second", "first"]
    for number in range(1, 5):
        wait_state(cluster, f"g-{number}", "starting")
    wait_for(lambda: record_of(cluster, "g-5").pending_reason in ("Resources", "Priority"), "the reason")
    waiting = record_of(cluster, "g-5")
    assert "wait" in (waiting.message or "")
    wait_for(lambda: record_of(cluster, "g-5").starts_at, "Slurm's estimate")
    assert "est. " in describe_replica(record_of(cluster, "g-5"))
    assert bed.run("squeue", "-h", "-o", "%b %C").split("\n")[0].startswith("gres:gpu:1")


def test_what_slurm_refuses_is_told_with_what_to_do(bed: SlurmBed, make: Make) -> None:
    with pytest.raises(RefusedError, match=r"there is no partition nowhere; there are: first, second, urgent"):
        start(make(name="nowhere"))
    with pytest.raises(RefusedError, match=r"Slurm refused: .*configuration.*; correct gres and gpus_per_node"):
        start(make(gres="gpu:v100", has_second=False))
    with pytest.raises(RefusedError, match=r"Slurm refused: .*correct cluster.slurm.constraint"):
        start(make(sbatch={"constraint": "warp"}))
    assert bed.jobs() == []
    assert make().replicas() == []


def test_stop_ends_this_deployments_jobs_and_no_other(bed: SlurmBed, make: Make) -> None:
    one, other = make(deployment="one"), make(deployment="other")
    foreign = bed.submit("sleep 600", "--partition=urgent", "--job-name=agent-infra:one:g:1")
    mine, theirs = start(one, 3), start(other, 1)
    wait_state(one, "g-1", "starting")
    names = [record.replica for record in one.replicas()]
    assert names == [record.replica for record in mine] == ["g-1", "g-2", "g-3"]
    one.stop(names)
    assert one.wait_stopped(names, time.monotonic() + PATIENCE_S) == []
    assert one.replicas() == []
    left = {line.split()[0] for line in bed.jobs()}
    assert left == {foreign, str(theirs[0].job_id)}
    one.stop(names)
    assert one.wait_stopped(names, time.monotonic() + PATIENCE_S) == []
    assert [path.name for path in Path(one.host.run_dir).rglob("g-*") if path.suffix != ".log"] == []


def test_a_job_that_ignores_the_drain_is_ended_by_now(make: Make, tmp_path: Path) -> None:
    is_deaf = tmp_path / "deaf"
    cluster = make(f"trap '' USR1 TERM; touch {is_deaf}; while :; do sleep 1; done")
    start(cluster)
    wait_for(is_deaf.exists, "the job that ignores signals")
    cluster.stop(["g-1"])
    assert cluster.wait_stopped(["g-1"], time.monotonic() + 1) == ["g-1"]
    cluster.stop(["g-1"], now=True)
    assert cluster.wait_stopped(["g-1"], time.monotonic() + PATIENCE_S) == []


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("echo 'torch.OutOfMemoryError: CUDA out of memory'; exit 1", "out_of_memory", "CUDA out of memory"),
        ("kill -9 $$", "unknown", "ended by signal 9"),
        ("export AGENT_INFRA_PYTHON=/bin/false", "bad_argument", "/bin/false is not Python 3.10 or newer"),
        ("exec no-such-launcher", "bad_argument", "no-such-launcher: not found|no-such-launcher: command not found"),
    ],
)
def test_a_job_that_ends_without_a_word_says_why(make: Make, line: str, kind: str, words: str) -> None:
    cluster = make(line)
    start(cluster)
    failed = wait_state(cluster, "g-1", "failed")
    assert failed.failure is not None
    assert (failed.failure.kind, bool(re.search(words, failed.failure.line))) == (kind, True), failed
    assert cluster.replicas() == [failed]  # the question was asked once


def test_a_job_whose_log_cannot_be_opened_is_told_apart(bed: SlurmBed, make: Make) -> None:
    cluster = make(has_second=False)
    cluster.replica_key()
    logs = Path(cluster.host.run_dir) / "logs"
    bed.drain(bed.nodes[0])
    try:
        start(cluster)
        logs.rename(logs.with_name("away"))
    finally:
        bed.undrain(bed.nodes[0])
    try:
        failure = wait_state(cluster, "g-1", "failed").failure
    finally:
        logs.with_name("away").rename(logs)
        bed.undrain(bed.nodes[0])  # Slurm takes the node for broken
    assert failure is not None
    assert "could not open the job's log" in failure.line
    assert "file system that the compute nodes share" in failure.hint


def test_a_cancelled_job_and_one_at_its_walltime_say_so(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    [record] = start(cluster)
    wait_state(cluster, "g-1", "starting")
    bed.run("scancel", str(record.job_id))
    failed = wait_state(cluster, "g-1", "failed")
    assert failed.failure is not None
    assert failed.failure.line == "its job was cancelled (Slurm: CANCELLED)"


def test_every_script_of_ours_is_one_that_slurm_takes(bed: SlurmBed, make: Make) -> None:
    cluster = make()
    scripts = cluster.plan(GPU_MODEL, 3) + cluster.plan(dataclasses.replace(GPU_MODEL, tensor_parallel_size=2), 1)
    scripts += make(exclusive=True, time_limit="0:30:00", sbatch={"comment": "a 'b' \"c\""}).plan(GPU_MODEL, 2)
    for script in scripts:
        bed.run("sbatch", "--test-only", stdin=script)
        bed.run("bash", "-n", stdin=script)
    assert bed.jobs() == []
    many = PartitionConfig("urgent", gpus_per_node=2)
    request = JobRequest("c", GPU_MODEL, ("g-1",), many, "/tmp", "/tmp", "/p", nodes=2, gpus=2)
    for container in (None, ContainerConfig("apptainer", "/i.sif")):
        slurm = SlurmConfig(container=container)
        bed.run("sbatch", "--test-only", stdin=render_job(request, slurm))


# The last here: restarted, this Slurm sometimes counts GPUs of ended jobs as used.
def test_while_slurm_does_not_answer_no_replica_is_gone(bed: SlurmBed, make: Make) -> None:
    hasty_conf = bed.folder / "hasty.conf"
    hasty_conf.write_text((bed.folder / "slurm.conf").read_text() + "MessageTimeout=2\n")
    cluster, hasty = make(), make(environment={**bed.environment, "SLURM_CONF": str(hasty_conf)})
    start(cluster, 2)
    wait_state(cluster, "g-1", "starting")
    wait_state(cluster, "g-2", "starting")
    bed.stop_controller()
    try:
        records = hasty.replicas()
        assert [record.replica for record in records] == ["g-1", "g-2"]
        assert not [record for record in records if record.state in ("failed", "stopped")]
        assert "Slurm does not answer" in (hasty.problem or "")
        with pytest.raises(SchedulerError, match="nothing can be stopped"):
            hasty.stop(["g-1"])
        with pytest.raises(SchedulerError, match="nothing was submitted"):
            start(hasty)
    finally:
        bed.start_controller()
    assert wait_state(cluster, "g-2", "starting").job_id == records[1].job_id
    wait_for(lambda: hasty.replicas() and hasty.problem is None, "Slurm's answer")

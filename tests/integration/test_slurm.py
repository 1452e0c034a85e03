"""Replicas as jobs of a real Slurm on this host: two nodes, two partitions, the embedded engine inside the jobs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from program import Program, free_port, wait_for
from testbed.slurm import SlurmBed, missing_programs, slurm_bed
from weights import packaged_gguf

from agent_infra import SlurmCluster

Make = Callable[..., SlurmCluster]


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    """Two nodes of two processors and two GPUs; partition first has one of them, second the other, all has both."""
    if missing := missing_programs():
        pytest.skip(f"a real Slurm needs {', '.join(missing)} (tests/run.sh installs what is missing)")
    partitions = (
        "PartitionName=first Nodes={0} Default=YES MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=1",
        "PartitionName=second Nodes={1} MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=1",
        "PartitionName=urgent Nodes=ALL MaxTime=1:00:00 DefaultTime=00:10:00 PriorityTier=10 PreemptMode=OFF",
    )
    with slurm_bed(gpus=2, cpus=2, partitions=partitions, settings="MinJobAge=10") as made:
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


def serving(run: Program, count: int) -> bool:
    states = [row["state"] for row in run.get("/stats")["backends"]]
    return states.count("up") + states.count("ready") >= count


def test_start_connect_talk_stop(bed: SlurmBed, run: Program) -> None:
    configure(run, bed, replicas=3)
    before = bed.submit("sleep 600", "--partition=second", "--cpus-per-task=1")  # somebody else's
    wait_for(lambda: f"{before} RUNNING sbatch" in bed.jobs(), "the foreign job")
    started = run.run("start")
    assert started.returncode == 0, started.stderr
    for state in ("PENDING", "READY"):
        assert sum(f"  {state}" in line for line in started.stdout.splitlines()) >= 3, started.stdout
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
    assert run.processes() == []


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

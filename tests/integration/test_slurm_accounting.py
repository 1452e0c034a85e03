"""A site that keeps accounts: a mandatory account, and a QoS that never runs what is longer than its MaxWall."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from program import Program, program, wait_for
from testbed.accounting import AccountedBed, accounted_bed, missing_accounting
from testbed.ports import free_port
from weights import packaged_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bed() -> Iterator[AccountedBed]:
    if missing := missing_accounting():
        pytest.skip(f"accounting needs {', '.join(missing)} (Debian's slurmdbd and mariadb-server)")
    partitions = ("PartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00 DefaultTime=00:10:00",)
    told = ("add qos short set MaxWall=00:05:00", "modify user root set qos+=short")
    with accounted_bed(*told, nodes=1, gpus=2, cpus=4, partitions=partitions) as made:
        yield made


@pytest.fixture
def app(bed: AccountedBed, tmp_path: Path) -> Iterator[Program]:
    with program(tmp_path) as made:
        made.environment |= {"SLURM_CONF": bed.environment["SLURM_CONF"], "PATH": bed.environment["PATH"]}
        yield made
        made.run("stop", "--now")


def configure(app: Program, bed: AccountedBed, partition: dict[str, Any] | None = None, **slurm: Any) -> None:
    model = {"name": "m", "model_path": str(packaged_gguf()), "engine": "llama_cpp", "base_port": free_port()}
    keys = {"work_dir": str(bed.folder / "work"), "setup": [f"export AGENT_INFRA_PYTHON={sys.executable}"], **slurm}
    keys["partitions"] = [{"name": "main", "gpus_per_node": 2, **(partition or {})}]
    cluster = {"type": "slurm", "name": "acc", "tunnel": "none", "poll_interval": 0.5, "slurm": keys}
    app.config.write_text(json.dumps({"proxy": {"port": app.port}, "cluster": cluster, "models": [model]}))


def errors(app: Program) -> list[str]:
    """What `doctor` finds wrong."""
    return [each["text"] for each in json.loads(app.run("doctor", "--json").stdout) if each["level"] == "error"]


def test_doctor_says_that_a_job_longer_than_its_qos_allows_will_never_run(app: Program, bed: AccountedBed) -> None:
    configure(app, bed, {"qos": "short", "time_limit": "30"})
    assert "main: 30 min, QoS short allows 5 min (MaxWall)" in errors(app)
    assert app.run("start", "--detach").returncode == 0
    row = wait_for(lambda: [r for r in app.status()["replicas"] if "MaxWall" in (r["pending_reason"] or "")], "a wait")
    assert row[0]["state"] == "pending"
    assert app.run("stop").returncode == 0
    configure(app, bed, {"qos": "short", "time_limit": "4"})
    assert not [line for line in errors(app) if "MaxWall" in line]
    configure(app, bed, {"time_limit": "30"})
    assert not errors(app)


def test_a_partitions_own_qos_counts_before_the_jobs(app: Program, bed: AccountedBed) -> None:
    bed.run("scontrol", "update", "partition=main", "qos=short")
    try:
        configure(app, bed, {"qos": "normal", "time_limit": "30"})
        assert "main: 30 min, QoS short allows 5 min (MaxWall)" in errors(app)
    finally:
        bed.run("scontrol", "update", "partition=main", "qos=")


def test_jobs_run_in_the_account_of_the_configuration_and_in_no_foreign_one(app: Program, bed: AccountedBed) -> None:
    configure(app, bed, account="nope")
    assert "account nope is not yours" in errors(app)
    refused = app.run("start")
    assert refused.returncode != 0
    assert "account" in refused.stderr.lower()
    configure(app, bed, account="proj")
    assert not errors(app)
    started = app.run("start")
    assert started.returncode == 0, started.stdout + started.stderr
    job = app.status()["replicas"][0]["job_id"]
    assert "Account=proj" in bed.run("scontrol", "--oneliner", "show", "job", job)
    assert app.run("stop").returncode == 0

"""A stand-in for Slurm's host, for tests of the job that runs the proxy, and how such a job is configured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from agent_infra import make_cluster, parse_config, render_proxy_job
from agent_infra_core.control.proxy_job import ProxyJob
from agent_infra_core.fleet.parse import SlurmJob
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import CommandResult
from agent_infra_core.settings import ClusterConfig, PartitionConfig, SlurmConfig

RUN = "/w/d/run"
JOB = SlurmJob("7", "RUNNING", "None", None, None, 3600.0, "cpu", "n1", RUN, "agent-infra:d:proxy")
PENDING = dataclasses.replace(JOB, state="PENDING", reason="Priority", node="")
SLURM = SlurmConfig((PartitionConfig("gpu"),), account="abc", work_dir="/w", proxy="job")
CONFIG = dataclasses.replace(
    parse_config("models: [{name: m, model_path: o/m}]", {}),
    cluster=ClusterConfig(type="slurm", name="d", poll_interval=0.1, slurm=SLURM),
)


class StandIn:
    """Slurm's host: answers with its ``jobs``, and keeps what was submitted, cancelled and written."""

    def __init__(self, folder: Path) -> None:
        (folder / "replicas").mkdir()
        self.folder = folder  # the run directory
        self.written: dict[str, bytes] = {}
        self.noted = ""  # in the state directory of a job behind a login host
        self.jobs: list[SlurmJob] = []
        self.said = CommandResult(0, b"8\n", b"")  # of sbatch
        self.accepts: SlurmJob | None = PENDING  # what sbatch adds to the queue
        self.end = ""  # of scontrol show job
        self.is_silent = False
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", **_: float) -> CommandResult:
        script, words = argv[2], argv[4:]
        if "squeue --noheader --all" in script:
            return self._queue(words[1])
        if "exec sbatch" in script:
            self.submitted.append(stdin.decode())
            self.jobs += [self.accepts] if self.accepts else []
            return self.said
        if "for name; do" in script:
            return CommandResult(0, self.noted.encode(), b"")
        if "cat > " in script:
            self.written[words[0]] = stdin
        if "sha256sum -c" in script:
            return CommandResult(int(words[0] not in self.written), b"", b"")
        if 'rm -f "$@"' in script:
            (self.folder / "replicas" / Path(words[0]).name).unlink(missing_ok=True)
        if "scancel" in script:
            self.cancelled.append(script[script.index("scancel") :])
            self.jobs = []
        if "scontrol --oneliner show job" in script:
            return CommandResult(0, f"{self.end}\n@log@\n".encode(), b"")
        if "replica_key" in script:  # the installation
            return CommandResult(0, f"/w\n{'k' * 40}\n{'0' * 64}\n".encode(), b"")
        return CommandResult(0, b"/w\n", b"")

    def _queue(self, nonce: str) -> CommandResult:
        rows = ""
        for job in self.jobs:
            told = (job.id, job.state, job.reason, "N/A", "N/A", "1:00:00", job.partition, job.node or "n/a")
            rows += f"@{nonce}job@" + "".join(f"{item}@{nonce}@" for item in (*told, job.work_dir, job.name)) + "\n"
        tail = f"@{nonce}status@{int(self.is_silent)} 1800000000@{nonce}files@\n"
        tail += "".join(f"replicas/{path.name}:{path.read_text()}\n" for path in self.folder.glob("replicas/*.json"))
        return CommandResult(0, ((rows if not self.is_silent else "") + tail).encode(), b"squeue: error: down")

    def close(self) -> None:
        pass


def make_job(host: StandIn, config: ClusterConfig) -> ProxyJob:
    paths = deployment_paths("d", os.environ)
    cluster = make_cluster(config, paths, host, os.environ, print)  # type: ignore[arg-type]
    assert isinstance(cluster, SlurmCluster)
    return ProxyJob(cluster, config, paths, render_proxy_job, lambda: b"the program")

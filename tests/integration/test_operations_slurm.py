"""The operator's verbs on a real Slurm: scale, replicas replaced before their walltime ends, requeued jobs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from program import Program, wait_for
from testbed.hub import COMMIT, TOKEN
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed
from weights import packaged_gguf

from agent_infra import Deployment, load_config
from agent_infra_core.control import scaling


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    """Two nodes; a job may ask for the cluster's only `slot`, a licence, as for a job limit of one."""
    require_slurm()
    partitions = ("PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 DefaultTime=00:30:00",)
    with slurm_bed(gpus=2, cpus=4, partitions=partitions, settings="Licenses=slot:1\nMinJobAge=10") as made:
        yield made


@pytest.fixture
def app(bed: SlurmBed, tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    made.environment |= {"SLURM_CONF": bed.environment["SLURM_CONF"], "PATH": bed.environment["PATH"]}
    yield made
    made.run("stop", "--now")
    for each in made.running:
        each.close()
    bed.run("scancel", "--user=root")
    wait_for(lambda: not bed.run("squeue", "-h"), "an empty queue")
    wait_for(lambda: not made.processes(), "no process left")


def configure(app: Program, bed: SlurmBed, replicas: int = 1, sbatch: dict[str, Any] | None = None) -> None:
    """The embedded engine in jobs; Slurm's own signal comes only seconds before the walltime's end."""
    slurm = {
        "work_dir": str(bed.folder / "work"),
        "partitions": [{"name": "main", "gpus_per_node": 2, "time_limit": "30"}],
        "setup": [f"export AGENT_INFRA_PYTHON={sys.executable}"],
        "sbatch": {"signal": "B:USR1@5", **(sbatch or {})},
    }
    model = {"name": "smollm2", "model_path": str(packaged_gguf()), "engine": "llama_cpp", "replicas": replicas}
    model |= {"engine_args": ["--threads", "1", "--max-num-seqs", "4"], "base_port": free_port()}
    cluster = {"type": "slurm", "name": app.folder.name, "tunnel": "none", "poll_interval": 0.5, "slurm": slurm}
    app.config.write_text(json.dumps({"proxy": {"port": app.port}, "cluster": cluster, "models": [model]}))


def connect(app: Program, replicas: int) -> None:
    started = app.run("start")
    assert started.returncode == 0, started.stderr
    connected = app.run("connect", "--background")
    assert connected.returncode == 0, connected.stderr
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == replicas, "the replicas in the proxy")


def replicas(app: Program) -> dict[str, dict[str, Any]]:
    return {row["replica"]: row for row in app.status()["replicas"]}


def successor(app: Program, replica: str) -> str | None:
    handover: dict[str, dict[str, Any]] = app.status()["handover"]
    return handover.get(replica, {}).get("successor")


def shorten(bed: SlurmBed, job: str) -> None:
    """Bring the end of a job's walltime near, but leave it a minute: Slurm counts in minutes."""
    hours, minutes, seconds = (int(part) for part in elapsed(bed, job))
    limit = (hours * 3600 + minutes * 60 + seconds + 60) // 60 + 1
    bed.run("scontrol", "update", f"jobid={job}", f"TimeLimit={limit}")


def elapsed(bed: SlurmBed, job: str) -> list[str]:
    """Hours, minutes and seconds that a job has run."""
    told = bed.run("squeue", "-h", "-j", job, "-o", "%M").strip()
    return ["0", "0", "0", *told.split(":")][-3:]


class Agents:
    """Eight agents that talk; what became of each turn, and by which replica."""

    def __init__(self, app: Program) -> None:
        self.outcomes: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(app, number)) for number in range(8)]

    def __enter__(self) -> Agents:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.outcomes["ok"] > 10, "agents at work")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def _talk(self, app: Program, number: int) -> None:
        while not self._stop.wait(0.3):
            try:
                answer, headers = app.chat(f"Agent {number} says hello", max_tokens=4)
                self.outcomes["ok" if answer["choices"][0]["message"]["content"] else "empty"] += 1
                self.served[headers["x-agent-infra-backend"]] += 1
            except OSError as error:  # of urllib, whatever the proxy answers
                self.outcomes[repr(error)] += 1

    def go_on(self, turns: int = 10) -> None:
        """Until so many more turns were answered."""
        before = self.outcomes["ok"]
        wait_for(lambda: self.outcomes["ok"] > before + turns, "turns answered")


def findings(app: Program, *words: str) -> dict[str, list[dict[str, Any]]]:
    """What `doctor --json` says, by check."""
    done = app.run("doctor", "--json", *words)
    said: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        said.setdefault(finding["check"], []).append(finding)
    return said


def reconfigure(app: Program, **changes: Any) -> None:
    """Change keys of cluster.slurm."""
    document = json.loads(app.config.read_text())
    document["cluster"]["slurm"] |= changes
    app.config.write_text(json.dumps(document))


def test_doctor_looks_at_the_cluster_and_by_a_job_at_a_node(app: Program, bed: SlurmBed) -> None:
    configure(app, bed)
    said = findings(app, "--job")
    assert [each["text"] for rows in said.values() for each in rows if each["level"] == "error"] == []
    assert "slurm" in said["Slurm"][0]["text"]
    assert "main: 2 nodes" in said["partitions"][0]["text"]
    assert "main: 30 min" in said["walltime"][0]["text"]
    assert "to start at" in said["submission"][0]["text"]
    node = said["node"]
    assert any(name in node[0]["text"] for name in bed.nodes)
    assert "work_dir is shared, Python 3." in node[0]["text"]
    assert "xllamacpp 20" in node[1]["text"]
    assert app.run("status").stdout.count("doctor") == 0
    assert not list((bed.folder / "work" / app.folder.name / "run").rglob("*doctor*"))


def test_doctor_says_what_is_wrong_on_a_cluster(app: Program, bed: SlurmBed) -> None:
    configure(app, bed)
    reconfigure(app, partitions=[{"name": "nowhere"}])
    said = findings(app)
    assert "there is no partition nowhere; there are: main" in said["partitions"][0]["text"]
    assert "Slurm refused: " in said["submission"][0]["text"]
    reconfigure(
        app, partitions=[{"name": "main", "time_limit": "2:00:00"}], setup=["export AGENT_INFRA_PYTHON=/no/python"]
    )
    said = findings(app, "--job")
    assert "the partition allows 60 min" in said["walltime"][0]["text"]
    assert said["node"][0]["level"] == "error"
    bed.stop_controller()
    try:
        said = findings(app)
        assert said["Slurm"][0]["level"] == "error"
        assert "submission" not in said  # nothing can be known of it now
    finally:
        bed.start_controller()


def test_pull_fetches_with_the_engines_python_on_the_clusters_host(app: Program, bed: SlurmBed, hub: str) -> None:
    configure(app, bed)
    document = json.loads(app.config.read_text())
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(app.folder / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    document["models"] = [{"name": "m", "model_path": "org/gated", "env": env}]
    app.config.write_text(json.dumps(document))
    done = app.run("pull")
    assert done.returncode == 0, done.stderr
    snapshot = app.folder / "hf" / "hub" / "models--org--gated" / "snapshots" / COMMIT
    assert str(snapshot) in done.stdout
    assert (snapshot / "model.safetensors").stat().st_size > 1000
    document["models"][0]["env"].pop("HF_TOKEN")
    app.config.write_text(json.dumps(document))
    refused = app.run("pull")
    assert refused.returncode == 2
    assert "it is gated: ask for access on its page" in refused.stderr


@pytest.mark.slow  # test_slurm_ssh.py scales jobs in the normal tier, from afar
def test_scale_submits_jobs_and_cancels_them_once_their_turns_have_ended(app: Program, bed: SlurmBed) -> None:
    configure(app, bed)
    connect(app, 1)
    foreign = bed.submit("sleep 600")
    with Agents(app) as agents:
        up = app.run("scale", "smollm2", "3")
        assert up.returncode == 0, up.stderr
        wait_for(lambda: len(agents.served) == 3, "turns on all three")
        down = app.run("scale", "smollm2", "1")
        assert down.returncode == 0, down.stderr
        agents.go_on()
    assert set(agents.outcomes) == {"ok"}, agents.outcomes
    assert sum("agent-infra" in job for job in bed.jobs()) == 1
    assert app.run("status").returncode == 0
    bed.run("scancel", foreign)


def test_a_replica_is_replaced_before_its_walltime_ends_and_no_agent_notices(app: Program, bed: SlurmBed) -> None:
    configure(app, bed, replicas=2)
    connect(app, 2)
    with Agents(app) as agents:
        ending = replicas(app)["smollm2-1"]
        shorten(bed, ending["job_id"])
        wait_for(lambda: successor(app, "smollm2-1") == "smollm2-3", "the successor", 120)
        wait_for(lambda: "smollm2-1" not in replicas(app), "the old one drained and gone")
        wait_for(lambda: ending["job_id"] not in [job.split()[0] for job in bed.jobs()], "its job is gone")
        agents.go_on()
    assert set(agents.outcomes) == {"ok"}, agents.outcomes
    assert agents.served["smollm2-3"] > 0
    assert sorted(replicas(app)) == ["smollm2-2", "smollm2-3"]
    status = app.run("status")
    assert status.returncode == 0, status.stdout
    log = app.run("logs", "proxy").stdout
    assert "handover: smollm2-3 is ready and takes over from smollm2-1" in log


def test_a_limit_of_one_job_makes_a_gap_that_is_announced_and_survived(app: Program, bed: SlurmBed) -> None:
    configure(app, bed, sbatch={"licenses": "slot:1"})
    connect(app, 1)
    with Agents(app) as agents:
        first = replicas(app)["smollm2-1"]
        shorten(bed, first["job_id"])
        wait_for(lambda: any(each["is_after"] for each in app.status()["handover"].values()), "the postponement", 90)
        told = app.run("status").stdout
        assert "there will be a gap while it loads" in told
        bed.run("scancel", "--batch", "--signal=USR1", first["job_id"])  # what Slurm does at the end of the walltime
        wait_for(lambda: first["job_id"] not in [row["job_id"] for row in replicas(app).values()], "the gap", 90)
        agents.go_on()
    assert set(agents.outcomes) == {"ok"}, agents.outcomes
    assert "Licenses does not allow smollm2-2 beside smollm2-1" in app.run("logs", "proxy").stdout
    assert app.run("status").returncode == 0


def test_a_requeued_job_comes_back_as_a_replica_and_turns_go_on(app: Program, bed: SlurmBed) -> None:
    configure(app, bed, replicas=2)
    connect(app, 2)
    before = replicas(app)["smollm2-1"]
    with Agents(app) as agents:
        bed.run("scontrol", "requeue", before["job_id"])
        agents.go_on()
        again = wait_for(lambda: ready_again(app, before["pid"]), "it is back", 90)
        assert again["job_id"] == before["job_id"]
        agents.go_on()
    assert set(agents.outcomes) == {"ok"}, agents.outcomes


def ready_again(app: Program, former_pid: int) -> Any:
    row = replicas(app).get("smollm2-1", {"state": "stopped"})
    return row if row["state"] == "ready" and row["pid"] != former_pid else None


def test_replicas_are_added_and_removed_as_jobs_and_one_that_waits_counts(
    app: Program, bed: SlurmBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, whose clock of the decision can be quickened; Slurm, replicas, relay and turns are real."""
    monkeypatch.setattr(scaling, "UP_AFTER_S", 1.0)
    monkeypatch.setattr(scaling, "DOWN_AFTER_S", 3.0)
    configure(app, bed)
    change_model(app, min_replicas=1, max_replicas=3, engine_args=["--threads", "1", "--max-num-seqs", "1"])
    lines: list[str] = []
    deployment = Deployment(load_config(app.config), lines.append, app.environment)
    over = threading.Event()

    def talk() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # of a turn that waited for too long on a busy machine
                app.chat(max_tokens=20)

    def states() -> list[str]:
        return sorted(job.split()[1] for job in bed.jobs() if "agent-infra" in job)

    agents = [threading.Thread(target=talk) for _ in range(2)]  # of which one waits
    try:
        deployment.start(deployment.select_models())
        deployment.claim("test")
        deployment.connect()
        wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 1, "the first replica")
        foreign = bed.submit("sleep 600", "--ntasks=7")  # all other processors
        wait_for(lambda: f"{foreign} RUNNING sbatch" in bed.jobs(), "somebody else's job")
        for agent in agents:
            agent.start()
        wait_for(lambda: states() == ["PENDING", "RUNNING"], "a job that waits")
        answered = app.get("/stats")["totals"]["requests"]
        wait_for(lambda: app.get("/stats")["totals"]["requests"] > answered + 5, "turns, while others wait")
        assert states() == ["PENDING", "RUNNING"]  # no third is asked for before the second has come
        assert deployment.wanted() == {"smollm2": 2}
        bed.run("scancel", foreign)
        wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] >= 2, "the second replica")
        over.set()
        for agent in agents:
            agent.join(PATIENCE_S)
        wait_for(lambda: states() == ["RUNNING"], "the end of all but one")
        assert deployment.wanted() == {"smollm2": 1}
        steps = [line.partition("; ")[2] for line in lines if "→" in line]
        assert (steps[0], steps[-1]) == ("1 → 2 replicas", "2 → 1 replicas")
    finally:
        over.set()
        deployment.stop(now=True)
    wait_for(lambda: not states(), "no job of ours")


def test_a_turn_wakes_a_model_whose_jobs_ended_for_idleness(app: Program, bed: SlurmBed) -> None:
    configure(app, bed)
    change_model(app, idle_shutdown_minutes=0.05)
    assert app.run("start", "--detach").returncode == 0
    assert app.run("connect", "--background").returncode == 0
    wait_for(lambda: [row["state"] for row in app.status()["replicas"] if row["is_idle"]] == ["stopped"], "its end")
    wait_for(lambda: not bed.jobs(), "its job is over")
    assert app.chat()[0]["choices"]  # waits while its job is submitted, starts and loads
    assert "it sleeps; 0 → 1 replicas" in app.run("logs", "proxy").stdout
    assert app.run("stop").returncode == 0
    assert bed.jobs() == []


def change_model(app: Program, **changes: Any) -> None:
    """Change keys of the one model."""
    document = json.loads(app.config.read_text())
    document["models"][0] |= changes
    app.config.write_text(json.dumps(document))

"""What real clusters do to a deployment: full disks, schedulers that hang, wrappers around sbatch, other users."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from program import Program, is_listening, processes_with, wait_for
from testbed.ports import free_port
from testbed.slurm import SlurmBed, require_slurm, slurm_bed, slurm_cluster
from testbed.sshd import SSHD, SshServer
from weights import packaged_gguf

from agent_infra_core.fleet.place import idle_gpus
from agent_infra_core.fleet.slurm_host import EXPLAIN_SCRIPT
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.settings import ClusterConfig, ModelConfig, PartitionConfig, SlurmConfig

SBATCH = shutil.which("sbatch") or ""
TALKS = r"""#!/bin/sh
printf '%s\n' '' '----- Example-3 batch system (2 notices) -----' '--> project 4711: 12 of 100 SUs used' '42 more'
exec "$REAL_SBATCH" "$@"
"""
LOSES_THE_ANSWER = """#!/bin/sh
"$REAL_SBATCH" "$@" > /dev/null
echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
exit 1
"""
TAKES_ITS_TIME = """#!/bin/sh
sleep 4
exec "$REAL_SBATCH" "$@"
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    """Two nodes of two processors and two GPUs in one partition."""
    require_slurm()
    times = "Nodes=ALL MaxTime=1:00:00 DefaultTime=00:10:00"
    partitions = (f"PartitionName=main Default=YES {times}", f"PartitionName=doomed {times}")
    with slurm_bed(gpus=2, cpus=2, partitions=partitions, settings="MinJobAge=20\nMessageTimeout=5") as made:
        yield made


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A work_dir on a file system of its own, of 4 MB."""
    folder = tmp_path / "work"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", folder], check=True, timeout=PATIENCE_S)
    yield folder
    while subprocess.run(["umount", "--lazy", folder], timeout=PATIENCE_S, capture_output=True).returncode == 0:
        pass


@pytest.fixture
def app(bed: SlurmBed, tmp_path: Path) -> Iterator[Program]:
    made = program_of(bed, tmp_path)
    yield made
    for each in made.running:
        each.close()
    bed.run("scancel", "--user=root")
    wait_for(lambda: not bed.run("squeue", "-h"), "an empty queue")
    made.run("stop", "--now")
    wait_for(lambda: not made.processes(), "no process left")


def program_of(bed: SlurmBed, folder: Path) -> Program:
    """The command line in front of that Slurm, in a state directory of its own."""
    folder.mkdir(exist_ok=True)
    made = Program(folder)
    made.environment |= {"SLURM_CONF": bed.environment["SLURM_CONF"], "PATH": bed.environment["PATH"]}
    return made


def configure(app: Program, work_dir: Path, replicas: int = 1, name: str = "", **slurm: Any) -> None:
    """The embedded engine in jobs; each test has a deployment of its own."""
    name = name or app.folder.name
    slurm = {
        "work_dir": str(work_dir),
        "partitions": [{"name": "main", "gpus_per_node": 2}],
        "setup": [f"export AGENT_INFRA_PYTHON={sys.executable}"],
        **slurm,
    }
    model = {"name": "m", "model_path": str(packaged_gguf()), "engine": "llama_cpp", "replicas": replicas}
    model |= {"engine_args": ["--threads", "1", "--max-num-seqs", "2"], "base_port": free_port()}
    cluster = {"type": "slurm", "name": name, "tunnel": "none", "poll_interval": 0.3, "slurm": slurm}
    app.config.write_text(json.dumps({"proxy": {"port": app.port}, "cluster": cluster, "models": [model]}))


def stand_before_sbatch(app: Program, folder: Path, script: str) -> None:
    """Put a site's wrapper before the real sbatch."""
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text(script)
    (folder / "sbatch").chmod(0o755)
    app.environment |= {"PATH": f"{folder}:{app.environment['PATH']}", "REAL_SBATCH": SBATCH}


def jobs(app: Program, bed: SlurmBed) -> list[list[str]]:
    """[id, state] of the deployment's jobs in the queue, ended ones too."""
    rows = [row.split(" ", 2) for row in bed.run("squeue", "-h", "--states=all", "-o", "%A %T %j").splitlines()]
    return [row[:2] for row in rows if row[2].startswith(f"agent-infra:{app.folder.name}:")]


def live(app: Program, bed: SlurmBed) -> list[str]:
    return [job for job, state in jobs(app, bed) if state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")]


def state_of(app: Program) -> Path:
    return app.state / "agent-infra" / app.folder.name


def start(app: Program, *words: str) -> subprocess.CompletedProcess[str]:
    done = app.run("start", *words)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done


# --- What works is never taken away. ---------------------------------------------------------------------------------


def test_up_serves_what_is_ready_and_tells_what_still_waits_in_the_queue(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    bed.submit("sleep 600", "--exclusive", "--nodelist", bed.nodes[1])
    wait_for(lambda: any("RUNNING" in line for line in bed.jobs()), "the foreign job")
    configure(app, tmp_path / "work", replicas=3)
    up = app.spawn("up")
    up.wait_line(r"^m-3 joins later: PENDING \(\w+")
    up.wait_line("export OPENAI_BASE_URL")
    assert app.chat(model="m")[0]["choices"]
    wait_for(lambda: app.get("/health")["models"]["m"]["ready"] == 2, "the two that run, in the proxy")
    bed.run("scancel", "--name=sbatch")
    wait_for(lambda: app.get("/health")["models"]["m"]["ready"] == 3, "the third joins")
    assert up.end() == 0


def test_start_ends_with_1_when_everything_that_it_started_has_ended(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    configure(app, tmp_path / "work", setup=["exec sleep 600"])
    starting = app.spawn("start")
    starting.wait_line("RUNNING")
    bed.run("scancel", *live(app, bed))
    assert starting.process.wait(PATIENCE_S) == 1
    starting.wait_line("unknown: its job was cancelled .Slurm: CANCELLED.; somebody ran scancel, perhaps an admin")


@pytest.mark.parametrize("trouble", ["full", "read-only", "gone"])
def test_a_work_dir_that_is_in_trouble_keeps_no_gpu(app: Program, bed: SlurmBed, work: Path, trouble: str) -> None:
    configure(app, work, replicas=2)
    start(app)
    if trouble == "full":
        (work / "filler").write_bytes(bytes(1 << 16))
        with pytest.raises(OSError, match="No space"), open(work / "filler", "ab") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
    elif trouble == "read-only":
        subprocess.run(["mount", "--bind", work, work], check=True, timeout=PATIENCE_S)  # open files stay writable
        subprocess.run(["mount", "-o", "remount,bind,ro", work], check=True, timeout=PATIENCE_S)
    else:
        subprocess.run(["umount", "--lazy", work], check=True, timeout=PATIENCE_S)
        work.rmdir()
    rows = {row["replica"]: row for row in app.status()["replicas"]}
    assert sorted(rows) == ["m-1", "m-2"]
    assert all(row["job_id"] in live(app, bed) for row in rows.values())
    stopped = app.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert re.search(r"m-1 \(job \d+\), m-2 \(job \d+\)", stopped.stdout)
    assert live(app, bed) == []


def test_stop_ends_nothing_while_slurm_cannot_and_says_so(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    configure(app, tmp_path / "work")
    start(app)
    assert app.run("connect", "--background").returncode == 0
    wait_for(lambda: app.get("/health")["models"]["m"]["ready"] == 1, "the replica in the proxy")
    bed.stop_controller()
    try:
        refused = app.run("stop")
        assert refused.returncode == 1
        assert "Slurm does not answer" in refused.stderr
        assert "nothing can be stopped" in refused.stderr
        assert app.chat(model="m")[0]["choices"]
        scaled = app.run("scale", "m", "3")
        assert scaled.returncode == 1
        assert "nothing was changed" in scaled.stderr
    finally:
        bed.start_controller()
    assert json.loads((state_of(app) / "wanted.json").read_text()) == {"m": 1}
    assert app.run("stop").returncode == 0
    assert live(app, bed) == []
    assert not is_listening(app.port)


def test_a_refused_start_leaves_the_wanted_numbers_and_the_saved_configuration(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    configure(app, tmp_path / "work")
    start(app)
    state = state_of(app)
    before = [(state / name).read_text() for name in ("wanted.json", "config.json")]
    configure(app, tmp_path / "work", replicas=3, sbatch={"constraint": "warp"})
    refused = app.run("start")
    assert refused.returncode == 2
    assert "Slurm refused" in refused.stderr
    assert [(state / name).read_text() for name in ("wanted.json", "config.json")] == before
    assert len(live(app, bed)) == 1
    assert app.run("start", "--replicas", "2").returncode == 2
    assert [(state / name).read_text() for name in ("wanted.json", "config.json")] == before


# --- Jobs are found by their names. ----------------------------------------------------------------------------------


def test_a_wrapper_of_sbatch_may_say_what_it_likes(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    configure(app, tmp_path / "work", replicas=2)
    stand_before_sbatch(app, tmp_path / "bin", TALKS)
    start(app)
    notes = [
        path.read_text().split()[0] for path in sorted((tmp_path / "work" / app.folder.name / "run" / "jobs").iterdir())
    ]
    assert notes == live(app, bed)
    assert app.run("stop").returncode == 0
    assert live(app, bed) == []


def test_a_job_whose_sbatch_timed_out_is_found_and_never_submitted_twice(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    configure(app, tmp_path / "work", replicas=2)
    real_path = app.environment["PATH"]
    stand_before_sbatch(app, tmp_path / "bin", LOSES_THE_ANSWER)
    start(app)
    app.environment["PATH"] = real_path
    assert "2 of 2 replicas are already running" in start(app).stdout
    assert [state for _, state in jobs(app, bed)] == ["RUNNING", "RUNNING"]
    assert app.run("stop").returncode == 0
    assert live(app, bed) == []
    assert "FAILED" not in [state for _, state in jobs(app, bed)]


def test_two_machines_that_start_one_deployment_at_once_make_one_of_it(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    other = program_of(bed, tmp_path / "other")
    configure(app, tmp_path / "work")
    other.config.write_text(app.config.read_text())
    stand_before_sbatch(app, tmp_path / "bin", TAKES_ITS_TIME)
    stand_before_sbatch(other, tmp_path / "bin", TAKES_ITS_TIME)
    first = app.spawn("start")
    wait_for(lambda: list((tmp_path / "work").glob("*/run/jobs/m-1")), "the first one's note")
    second = other.run("start")
    if second.returncode:  # else it came late enough to see the first one's replica
        assert "another machine is starting replicas of this deployment" in second.stderr
    assert first.process.wait(PATIENCE_S) == 0, first.lines
    assert [state for _, state in jobs(app, bed)] == ["RUNNING"]
    for each in (other, app):
        assert each.run("stop").returncode == 0
    assert live(app, bed) == []


def test_what_start_was_typed_in_does_not_get_into_its_jobs(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    configure(app, tmp_path / "work", sbatch={"mem": "200"})
    words = app.command("start", "--detach")
    app.environment["SBATCH_TIMELIMIT"] = "3"
    done = subprocess.run(
        ["salloc", "--quiet", "--ntasks=1", "--mem=50", "--time=7", *words],
        env=app.environment, cwd=app.folder, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [job] = live(app, bed)
    told = bed.run("scontrol", "--oneliner", "show", "job", job)
    assert "TimeLimit=00:10:00" in told
    assert "MinMemoryNode=200M" in told
    wait_for(lambda: app.status()["models"][0]["ready"] == 1, "the replica")


# --- Login shells. ---------------------------------------------------------------------------------------------------


def test_the_story_behind_a_tcsh_that_talks_and_a_slurm_that_needs_a_prologue(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    if SSHD is None or shutil.which("tcsh") is None:
        pytest.skip("needs sshd and tcsh")
    command = tmp_path / "shell"
    command.write_text('#!/bin/sh\necho Welcome to front end 3\ntcsh -c "$SSH_ORIGINAL_COMMAND"\nexit $?\n')
    command.chmod(0o755)
    prologue = ["echo loading slurm", f"export SLURM_CONF={bed.folder}/slurm.conf"]
    with SshServer(tmp_path / "sshd", options={"ForceCommand": str(command)}) as server:
        configure(app, tmp_path / "work", prologue=prologue)
        document = json.loads(app.config.read_text())
        document["cluster"] |= {"ssh": dataclasses.asdict(server.ssh()), "tunnel": "login", "poll_interval": 600}
        app.config.write_text(json.dumps(document))
        app.environment.pop("SLURM_CONF")
        found = json.loads(app.run("doctor", "--json").stdout)
        assert [row for row in found if row["level"] == "error"] == []
        start(app)
        connected = app.run("connect", "--background")
        assert connected.returncode == 0, connected.stderr
        wait_for(lambda: app.get("/health")["models"]["m"]["ready"] == 1, "the replica in the proxy")
        assert app.chat(model="m")[0]["choices"]
        assert "agent-infra: starting" in app.run("logs", "m-1").stdout
        before = server.log.read_text().count("Starting session")
        following = app.spawn("logs", "--follow", "--lines", "1")
        following.wait_line("^m-1: ")
        [log] = (tmp_path / "work").glob("*/run/logs/m-1.log")
        for number in range(20):
            with log.open("a") as file:
                file.write(f"line {number}\n")
            following.wait_line(f"^m-1: line {number}$")
        following.end()
        assert server.log.read_text().count("Starting session") - before <= 3  # one of them is the tail
        wait_for(lambda: not [pid for pid in processes_with("") if "tail -n 1 -F m-1.log" in pid[1]], "the tail's end")
        stopped = app.run("stop")
        assert stopped.returncode == 0, stopped.stderr
    assert live(app, bed) == []


def test_a_login_host_that_is_away_for_a_moment_ends_no_start(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    if SSHD is None:
        pytest.skip("needs sshd")
    with SshServer(tmp_path / "sshd", options={"SetEnv": f"SLURM_CONF={bed.folder}/slurm.conf"}) as server:
        go_on = tmp_path / "go-on"
        wait = f"while [ ! -e {go_on} ]; do sleep 0.2; done"
        configure(app, tmp_path / "work", setup=[f"export AGENT_INFRA_PYTHON={sys.executable}", wait])
        document = json.loads(app.config.read_text())
        document["cluster"] |= {"ssh": dataclasses.asdict(server.ssh()), "tunnel": "login"}
        app.config.write_text(json.dumps(document))
        starting = app.spawn("start")
        starting.wait_line("^m-1  RUNNING")
        assert server.process is not None
        sessions = [pid for pid in server.sessions() if Path(f"/proc/{pid}/comm").read_text().startswith("sshd")]
        for pid in (server.process.pid, *sessions):  # not what runs in them: it may hold locks of the user's
            os.kill(pid, signal.SIGKILL)
        server.process.wait(PATIENCE_S)
        starting.wait_line("the replicas start without it$")
        server.start()
        go_on.touch()
        starting.wait_line("^m-1  READY")
        assert starting.process.wait(PATIENCE_S) == 0
        assert app.run("stop").returncode == 0


def test_a_login_host_that_forbids_forwarding_makes_no_replica_ready(
    app: Program, bed: SlurmBed, tmp_path: Path
) -> None:
    if SSHD is None:
        pytest.skip("needs sshd")
    options = {"AllowTcpForwarding": "no", "SetEnv": f"SLURM_CONF={bed.folder}/slurm.conf"}
    with SshServer(tmp_path / "sshd", options=options) as server:
        configure(app, tmp_path / "work")
        document = json.loads(app.config.read_text())
        document["cluster"] |= {"ssh": dataclasses.asdict(server.ssh()), "tunnel": "login"}
        app.config.write_text(json.dumps(document))
        start(app)
        assert app.run("connect", "--background").returncode == 0
        wait_for(lambda: "no turn reaches it" in app.run("status").stdout, "the reason")
        told = app.run("status")
        assert told.returncode == 3
        assert "m  0 of 1 ready" in told.stdout
        assert re.search("m-1 is ready, but no turn reaches it: .*(forward|prohibited)", told.stdout), told.stdout
        assert app.run("stop").returncode == 0


# --- Other users. ----------------------------------------------------------------------------------------------------


def as_another_user(*argv: str) -> None:
    subprocess.run(
        ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *argv], check=True, timeout=PATIENCE_S
    )


def test_a_program_that_another_user_planted_is_never_run(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    group = Path(tempfile.mkdtemp())
    group.chmod(0o3777)
    configure(app, group)
    assert app.run("start", "--dry-run").returncode == 0  # finds the name of the program's folder
    [program] = group.glob("programs/*/node.pyz")
    folder = program.parent
    shutil.rmtree(group / "programs")
    as_another_user(
        "sh", "-c", f"mkdir -p {folder} && echo 'import os' > {folder}/node.pyz && chmod -R 0755 {group}/programs"
    )
    refused = app.run("start")
    assert refused.returncode == 2
    assert re.search(rf"others can change d\S+ \d+ 54321 .*{group}/programs; name a directory of yours", refused.stderr)
    assert jobs(app, bed) == []
    assert app.run("stop").returncode == 0
    shutil.rmtree(group)


@pytest.mark.parametrize(("mode", "owner"), [(0o775, 0), (0o777, 0), (0o1777, 54321)])
def test_a_work_dir_in_which_others_can_replace_folders_is_refused(
    app: Program, tmp_path: Path, mode: int, owner: int
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work").chmod(mode)
    shutil.chown(tmp_path / "work", owner)
    configure(app, tmp_path / "work")
    refused = app.run("start")
    assert refused.returncode == 2
    assert "others can change d" in refused.stderr


def test_files_that_jobs_run_are_known_by_their_content(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    configure(app, tmp_path / "work")
    assert app.run("start", "--dry-run").returncode == 0
    [program] = (tmp_path / "work").glob("programs/*/node.pyz")
    before = program.read_bytes()
    program.write_bytes(before[:-1] + b"x")
    document = json.loads(app.config.read_text())
    document["models"][0]["model_path"] = "smollm2-135m-instruct"
    app.config.write_text(json.dumps(document))
    weights = tmp_path / "work" / "models" / packaged_gguf().name
    with open(weights, "wb") as file:
        file.truncate(packaged_gguf().stat().st_size)
    assert app.run("pull").returncode == 0
    assert program.read_bytes() == before
    assert weights.read_bytes() == packaged_gguf().read_bytes()


# --- GPUs as they are. -----------------------------------------------------------------------------------------------


def test_gpus_without_a_type_and_ones_of_a_reservation_are_counted_as_slurm_gives_them(tmp_path: Path) -> None:
    require_slurm()
    times = "Nodes=ALL MaxTime=1:00:00 DefaultTime=00:10:00"
    partitions = (f"PartitionName=main Default=YES {times}", f"PartitionName=hidden Hidden=YES {times}")
    with slurm_bed(nodes=3, gpus=2, gpu_type="", cpus=4, partitions=partitions) as untyped:
        untyped.submit("sleep 600", "--gres=gpu:1", "--nodelist", untyped.nodes[0], "--cpus-per-task=1")
        untyped.run(
            *("scontrol", "create", "reservation", "ReservationName=grp", "StartTime=now", "Duration=60"),
            *("Users=root", f"Nodes={untyped.nodes[2]}"),
        )
        wait_for(lambda: "RUNNING" in "".join(untyped.jobs()), "the foreign job")
        slurm = SlurmConfig(
            partitions=(PartitionConfig("main", gpus_per_node=2), PartitionConfig("hidden", gpus_per_node=2)),
            work_dir=str(tmp_path / "work"),
            cpus_per_gpu=2,
            memory_per_gpu="100",
            setup=(f"export AGENT_INFRA_PYTHON={sys.executable}", "exec sleep 600"),
        )
        config = ClusterConfig(type="slurm", name="u", tunnel="none", poll_interval=0.2, slurm=slurm)
        cluster = slurm_cluster(config, deployment_paths("u", os.environ), untyped.environment)
        nodes = wait_for(lambda: [n for n in cluster.host.nodes() if n.reservation] and cluster.host.nodes(), "grp")
        reserved = dataclasses.replace(slurm, sbatch={"reservation": "grp"})
        main = slurm.partitions[0]
        assert [idle_gpus(node, main, slurm) for node in nodes] == [1, 2, 0]
        assert [idle_gpus(node, main, reserved) for node in nodes] == [0, 0, 2]
        started = cluster.start_replicas(cluster.prepare(ModelConfig("g", "org/m")), 4)
        assert [record.partition for record in started] == ["main", "main", "main", "main"]
        wait_for(lambda: sum(record.state == "starting" for record in cluster.replicas()) == 3, "three that fit")
        told = untyped.run("scontrol", "--oneliner", "show", "job", str(started[0].job_id))
        assert "CPUs/Task=2" in told
        assert "MinMemoryNode=100M" in told
        # Those who may not look behind the curtain are still told which partitions there are.
        for name, is_gone in (("main", False), ("hidden", False), ("nowhere", True)):
            words = ["setpriv", "--reuid=nobody", "--clear-groups", "sh", "-c", EXPLAIN_SCRIPT, "sh"]
            assert ("is gone" in untyped.run(*words, "/", "1", "log", name, "is gone")) == is_gone, name


# --- Why jobs ended. -------------------------------------------------------------------------------------------------


# The last here: it changes the cluster.
def test_a_partition_that_was_removed_is_told_with_slurms_own_word(app: Program, bed: SlurmBed, tmp_path: Path) -> None:
    partitions = [{"name": "doomed", "gpus_per_node": 2}]
    configure(app, tmp_path / "work", setup=["exec sleep 600"], partitions=partitions)
    start(app, "--detach")
    wait_for(lambda: "RUNNING" in [state for _, state in jobs(app, bed)], "the job")
    conf = bed.folder / "slurm.conf"
    conf.write_text("".join(line for line in conf.read_text().splitlines(True) if "=doomed " not in line))
    bed.run("scontrol", "reconfigure")
    [row] = wait_for(
        lambda: [row for row in app.status()["replicas"] if row["state"] == "failed"], "the end of its job"
    )
    assert row["failure"]["kind"] == "bad_argument"
    assert row["failure"]["line"].startswith("its partition was removed (Slurm: ")
    assert "`sinfo` lists them" in row["failure"]["hint"]

"""What a researcher types in the first week: `launch` without a configuration, `run` around an evaluation, `init`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import Program, is_listening, wait_for
from testbed.slurm import SlurmBed
from weights import packaged_gguf

from agent_infra import Deployment, load_config
from agent_infra_core.control import scaling

EVALUATION = """\
import json, os, sys, time, urllib.request
url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
body = {"model": "smollm2", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "X-Task-ID": "eval-1"}
request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
print(json.load(urllib.request.urlopen(request))["usage"]["completion_tokens"])
request = urllib.request.Request(url.removesuffix("/v1") + "/runs", headers=headers)
while not (runs := json.load(urllib.request.urlopen(request))["runs"]):
    time.sleep(0.1)
print(json.dumps(runs))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(autouse=True, scope="module")
def weights() -> None:
    packaged_gguf()


def test_run_serves_a_command_and_stops_everything_with_its_status(app: Program) -> None:
    app.configure(proxy={"require_key": True})
    script = app.folder / "eval.py"
    script.write_text(EVALUATION)
    done = app.run("run", "--tasks", "3", "--name", "eval", "--", sys.executable, str(script), "7")
    assert done.returncode == 7, done.stderr
    tokens, runs = done.stdout.splitlines()  # nothing but what the command printed
    assert int(tokens) > 0
    assert [(row["name"], row["tasks"]) for row in json.loads(runs)] == [("eval", 3)]
    assert "stopped proxy, smollm2-1" in done.stderr
    assert "# Run eval" in done.stderr
    assert re.search(r"(?m)^\| turns \| 1 \|$", done.stderr)
    wait_for(lambda: not app.processes(), "no process left")


STUBBORN = """\
import signal, sys, time
with open(sys.argv[1], "w", buffering=1) as file:
    signal.signal(signal.SIGINT, lambda *_: file.write("!"))
    file.write("!")
    while True:
        file.flush()
        time.sleep(0.01)
"""


def test_run_stops_everything_however_it_is_told_to_end(app: Program) -> None:
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 137)):
        seen = app.folder / f"seen-{status}"
        running = app.spawn("run", "--", sys.executable, "-c", STUBBORN, str(seen))
        wait_for(lambda seen=seen: seen.exists() and seen.read_text() == "!", "the command")  # type: ignore[misc]
        for count in (2, 3) if number == signal.SIGINT else ():  # Ctrl-C, twice; the third one kills it
            os.kill(running.process.pid, number)
            wait_for(lambda seen=seen, count=count: len(seen.read_text()) == count, "the signal")  # type: ignore[misc]
        assert running.end(number) == status, running.lines
        wait_for(lambda: not app.processes(), "no process left")
        assert not is_listening(app.port)


def test_a_command_that_does_not_exist_starts_nothing(app: Program) -> None:
    done = app.run("run", "--", "no-such-program")
    assert done.returncode == 2
    assert "no-such-program was not found" in done.stderr
    assert not (app.state / "agent-infra").exists()


def test_launch_serves_a_model_without_a_configuration(app: Program) -> None:
    listed = app.run("launch")
    assert "qwen3-8b" in listed.stdout
    printed = app.run("launch", "smollm2", "--local", "--dry-run")
    assert printed.returncode == 0, printed.stderr
    kept = app.folder / "kept.yaml"
    kept.write_text(printed.stdout)
    assert load_config(kept).models[0].engine == "llama_cpp"
    running = app.spawn("launch", "smollm2", "--local", "--port", str(app.port))
    running.wait_line("^Ctrl-C stops everything")
    assert app.chat()[0]["choices"]
    assert running.end() == 0
    assert [line for line in running.lines if line.startswith("stopped ")] == ["stopped proxy, smollm2-1"]


def test_a_turn_wakes_a_model_that_idleness_has_shut_down(app: Program) -> None:
    ports = {"base_port": app.port + 1, "idle_shutdown_minutes": 0.05}
    app.configure(models=[{"name": "smollm2", "model_path": "smollm2-135m-instruct", "engine": "llama_cpp", **ports}])
    assert app.run("start", "--detach").returncode == 0
    assert app.run("connect", "--background").returncode == 0
    # Before its end it may still take a turn.
    wait_for(lambda: [row["state"] for row in app.status()["replicas"] if row["is_idle"]] == ["stopped"], "its end")
    assert app.chat()[0]["choices"]  # waits while it loads
    assert "it sleeps; 0 → 1 replicas" in app.run("logs", "proxy").stdout
    assert app.run("stop").returncode == 0


def test_replicas_follow_the_queue_up_to_the_most(app: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whose clock of the decision can be quickened; the replicas, the relay and the turns are real."""
    monkeypatch.setattr(scaling, "UP_AFTER_S", 1.0)
    monkeypatch.setattr(scaling, "DOWN_AFTER_S", 3.0)
    bounds = {"min_replicas": 1, "max_replicas": 2, "base_port": app.port + 1}
    engine = {"name": "smollm2", "model_path": "smollm2-135m-instruct", "engine": "llama_cpp", **bounds}
    app.configure(models=[{**engine, "engine_args": ["--max-num-seqs", "1", "--threads", "1"]}])
    lines: list[str] = []
    deployment = Deployment(load_config(app.config), lines.append, app.environment)
    try:
        deployment.start(deployment.select_models())
        deployment.claim("test")
        deployment.connect()
        wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 1, "the first replica")
        agents = [threading.Thread(target=app.chat, kwargs={"max_tokens": 60}) for _ in range(12)]
        for agent in agents:
            agent.start()
        wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "the second replica")
        for agent in agents:
            agent.join(PATIENCE_S)
        wait_for(lambda: len(deployment.cluster.replicas()) == 1, "the end of one")
        assert deployment.wanted() == {"smollm2": 1}
        assert [line.partition("; ")[2] for line in lines if "→" in line] == ["1 → 2 replicas", "2 → 1 replicas"]
    finally:
        deployment.stop(now=True)


def test_replicas_of_a_node_share_one_copy_of_the_weights_on_its_own_disk(app: Program) -> None:
    stage = app.folder / "local"
    staged = {"engine": "llama_cpp", "model_path": str(packaged_gguf()), "base_port": app.port + 1, "replicas": 2}
    app.configure(models=[{"name": "smollm2", **staged, "stage": str(stage)}])
    started = app.run("start")
    assert started.returncode == 0, started.stdout + started.stderr
    [copy] = stage.rglob("*.gguf")
    for replica in ("smollm2-1", "smollm2-2"):
        assert f"--model-path {copy} " in app.run("logs", replica).stdout
    assert app.run("stop").returncode == 0


def test_a_node_whose_disk_is_too_small_for_the_weights_says_so(app: Program) -> None:
    disk = app.folder / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True, timeout=PATIENCE_S)
    try:
        staged = {"engine": "llama_cpp", "model_path": str(packaged_gguf()), "base_port": app.port + 1}
        app.configure(models=[{"name": "smollm2", **staged, "stage": str(disk)}])
        started = app.run("start")
        assert started.returncode == 1
        assert "quota: stage: the weights need 0.1 GB" in started.stdout + started.stderr
        assert "free some space there" in started.stdout + started.stderr
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True, timeout=PATIENCE_S)


def test_init_asks_slurm_and_writes_a_configuration_that_slurm_accepts(slurm: SlurmBed, tmp_path: Path) -> None:
    app = Program(tmp_path)
    app.config.unlink()
    app.environment |= {"SLURM_CONF": slurm.environment["SLURM_CONF"], "PATH": slurm.environment["PATH"]}
    written = app.run("init", "--model", "qwen3-32b", "--replicas", "2")
    assert written.returncode == 0, written.stderr
    config = load_config(tmp_path / "config.yaml")
    slurm_keys = config.cluster.slurm
    assert [(each.name, each.gres, each.gpus_per_node, each.time_limit) for each in slurm_keys.partitions] == [
        ("low", "gpu:h100", 4, "1-00:00:00"),
        ("high", "gpu:h100", 4, "02:00:00"),
    ]
    assert (slurm_keys.cpus_per_gpu, slurm_keys.memory_per_gpu) == (2, "3600M")
    assert config.models[0].tensor_parallel_size == 2
    again = app.run("init")
    assert again.returncode == 2
    assert "config.yaml exists" in again.stderr
    script = app.run("start", "--dry-run").stdout
    accepted = subprocess.run(
        ["sbatch", "--test-only"], env=app.environment, input=script.split("\n\n#!")[0], text=True, capture_output=True
    )
    assert accepted.returncode == 0, (accepted.stderr, script)
    launched = app.run("launch", "smollm2", "--dry-run")
    assert "type: slurm" in launched.stdout
    assert launched.returncode == 0


def test_init_writes_nothing_when_slurm_does_not_answer(tmp_path: Path) -> None:
    app = Program(tmp_path)
    app.config.unlink()
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=127.0.0.1\nSlurmctldPort=1\nMessageTimeout=2\n")
    app.environment |= {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = subprocess.run(
        app.command("init"), env=app.environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode in (1, 2), done.stderr
    assert not (tmp_path / "config.yaml").exists()

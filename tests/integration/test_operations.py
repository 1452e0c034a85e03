"""The operator's verbs around a run: connect in the background, scale, idle replicas, stop without a configuration."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from program import MODULE, Program, Running, parent_of, wait_for
from relay_harness import Client, request
from testbed.ports import free_port
from weights import packaged_gguf

from agent_infra_core.host import process_stamp

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"


@pytest.fixture(autouse=True, scope="module")
def weights() -> None:
    packaged_gguf()


def connect(app: Program, replicas: int = 1) -> None:
    """Start the replicas and the proxy, both in the background."""
    started = app.run("start", "--replicas", str(replicas))
    assert started.returncode == 0, started.stderr
    connected = app.run("connect", "--background")
    assert connected.returncode == 0, connected.stderr
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == replicas, "the replicas in the proxy")


def idle_model(app: Program, minutes: float) -> dict[str, Any]:
    ports = {"base_port": app.port + 1, "idle_shutdown_minutes": minutes}
    return {"name": "smollm2", "model_path": "smollm2-135m-instruct", "engine": "llama_cpp", **ports}


def scripted_model(app: Program) -> dict[str, Any]:
    """A model whose turns last as long as they are told to."""
    command = [sys.executable, str(FAKE_ENGINE), "--port", "{port}"]
    ports = {"base_port": app.port + 1}
    return {"name": "smollm2", "model_path": "none", "engine": "command", "command": command, **ports}


class LongTurn:
    """A turn on whichever replica gets it, that lasts until ``end_turns``."""

    def __init__(self, app: Program) -> None:
        self.backend = ""
        self.finish_reason = ""
        self._thread = threading.Thread(target=self._take, args=(app,))
        self._thread.start()

    def _take(self, app: Program) -> None:
        answer, headers = app.chat("Think", fake={"until": str(app.folder / "over")})
        self.backend = headers["x-agent-infra-backend"]
        self.finish_reason = answer["choices"][0]["finish_reason"]

    def wait(self) -> None:
        self._thread.join(timeout=PATIENCE_S)
        assert not self._thread.is_alive()


def end_turns(app: Program) -> None:
    (app.folder / "over").touch()


def busy(app: Program) -> list[str]:
    """The replicas that have a turn now."""
    return [row["id"] for row in app.get("/stats")["backends"] if row["inflight"]]


def test_connect_in_the_background_serves_without_its_terminal_and_stop_finds_it(app: Program) -> None:
    assert app.run("start").returncode == 0
    connected = app.run("connect", "--background")
    assert connected.returncode == 0, connected.stderr
    assert f"export OPENAI_BASE_URL=http://127.0.0.1:{app.port}/v1" in connected.stdout
    assert "runs in the background" in connected.stdout
    assert app.chat()[0]["choices"]
    controller = app.find("connect")
    assert os.getsid(controller) == controller  # no terminal can hang it up
    wait_for(
        lambda: [r for r in app.get("/stats")["backends"] if r["requests"] and not r["inflight"]], "the turn's end"
    )
    status = app.run("status")
    assert status.returncode == 0
    assert "smollm2  1 of 1 ready, 0 turns in flight" in status.stdout
    stopped = app.run("stop")
    assert f"`connect` (pid {controller})" in stopped.stdout
    wait_for(lambda: not app.processes(), "no process left")


def test_a_background_controller_that_cannot_serve_says_why_in_the_terminal(app: Program) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", app.port))
        other.listen()
        done = app.run("connect", "--background")
    assert done.returncode == 2
    assert f"error: the proxy cannot listen on 127.0.0.1:{app.port}" in done.stderr
    assert app.processes() == []


def test_a_background_controller_that_dies_at_its_start_is_an_error(app: Program) -> None:
    app.config.unlink()
    os.mkfifo(app.config)  # its start lasts for as long as nobody writes
    connecting = app.spawn("connect", "--background")
    child = wait_for(
        lambda: [pid for pid, _ in app.processes() if parent_of(pid) == connecting.process.pid], "the child"
    )[0]
    os.kill(child, signal.SIGKILL)
    assert connecting.process.wait(timeout=PATIENCE_S) == 1
    connecting.wait_line("error: the proxy ended by signal 9 before it was ready")


def test_connect_after_a_killed_background_controller_touches_no_replica(app: Program) -> None:
    connect(app)
    serve, relay = app.find("serve"), app.find("relay")
    os.kill(app.find("connect"), signal.SIGKILL)
    assert app.chat()[0]["choices"]
    assert app.run("connect", "--background").returncode == 0
    assert (app.find("serve"), app.find("relay")) == (serve, relay)
    assert app.run("status").returncode == 0
    assert app.run("stop").returncode == 0


def test_scale_up_starts_replicas_and_down_ends_the_least_loaded_after_its_turns(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    connect(app)
    up = app.run("scale", "smollm2", "2")
    assert up.returncode == 0, up.stderr
    assert "smollm2-2  READY" in up.stdout
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "both in the proxy")
    turn = LongTurn(app)
    (loaded,) = wait_for(lambda: busy(app), "the turn in /stats")
    down = app.run("scale", "smollm2", "1")
    idle = {"smollm2-1": "smollm2-2", "smollm2-2": "smollm2-1"}[loaded]
    assert f"ended {idle}" in down.stdout
    end_turns(app)
    turn.wait()
    assert (turn.backend, turn.finish_reason) == (loaded, "stop")
    status = app.run("status")
    assert status.returncode == 0, status.stdout  # what was wanted: one of the configuration's one
    assert [row["replica"] for row in app.status()["replicas"]] == [loaded]
    assert app.run("stop").returncode == 0


def test_a_replica_that_is_scaled_away_finishes_its_turn_and_its_name_serves_again(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    connect(app, 2)
    turns = [LongTurn(app), LongTurn(app)]
    wait_for(lambda: len(busy(app)) == 2, "a turn on each")
    down = app.spawn("scale", "smollm2", "1")
    down.wait_line("1 turns still in flight")
    end_turns(app)
    assert down.process.wait(PATIENCE_S) == 0
    for turn in turns:
        turn.wait()
    assert {turn.finish_reason for turn in turns} == {"stop"}
    (model,) = app.status()["models"]
    assert (model["wanted"], model["running"], model["ready"]) == (1, 1, 1)
    assert app.run("scale", "smollm2", "2").returncode == 0
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "the name is not drained for ever")
    assert app.run("scale", "smollm2", "0").returncode == 0
    assert app.status()["replicas"] == []
    assert app.run("status").returncode == 0
    again = app.run("start")  # back to the configuration's number
    assert again.returncode == 0
    assert app.status()["models"][0]["wanted"] == 1
    assert app.run("stop").returncode == 0


def test_scale_without_a_proxy_says_what_that_means(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    assert app.run("start").returncode == 0
    up = app.run("scale", "smollm2", "2")
    assert up.returncode == 0
    assert "no proxy is running" in up.stdout
    assert len(app.status()["replicas"]) == 2
    unknown = app.run("scale", "other", "1")
    assert unknown.returncode == 2
    assert "no model is called other; the configuration has smollm2" in unknown.stderr
    assert app.run("stop").returncode == 0


def test_a_dry_run_says_what_runs_already_as_the_run_itself_does(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    assert (
        "degraded: 0 of 1 replicas of smollm2 are running; `start` starts the missing ones" in app.run("status").stdout
    )
    assert app.run("start").returncode == 0
    told = "smollm2: 1 of 1 replicas are already running\n"
    assert app.run("start", "--dry-run").stdout == told
    assert app.run("start").stdout.startswith(told)
    assert app.run("stop").returncode == 0


def test_a_dashboard_without_a_proxy_says_so_and_serves_where_the_proxy_will_be(app: Program) -> None:
    page = app.spawn("dashboard", "--port", str(free_port()))
    page.wait_line("^no proxy is running; `connect` starts one")
    page.wait_line(f"^of +http://127.0.0.1:{app.port};")
    app.configure(proxy={"port": 0})
    refused = app.run("dashboard")
    assert refused.returncode == 2
    assert "proxy.port 0 means any port; run `connect` first" in refused.stderr


def test_an_idle_replica_ends_by_itself_though_nobody_is_connected_and_start_brings_it_back(app: Program) -> None:
    app.configure(models=[idle_model(app, 0.05)])
    assert app.run("start", "--detach").returncode == 0
    ended = wait_for(lambda: [r for r in app.status()["replicas"] if r["state"] == "stopped"], "its end", 90)
    assert (ended[0]["is_idle"], ended[0]["message"]) == (True, "no turn for 0.05 min")
    assert app.run("connect", "--background").returncode == 0
    status = app.run("status")
    assert status.returncode == 0, status.stdout
    assert "0 of 1 ready, 1 stopped (idle)" in status.stdout
    assert app.get("/health")["models"]["smollm2"]["ready"] == 0
    app.configure(models=[idle_model(app, 60)])
    assert app.run("start").returncode == 0
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 1, "it is back")
    assert app.chat()[0]["choices"]
    assert app.run("stop").returncode == 0


def test_stop_now_tells_plain_turns_and_streams_before_their_engine_ends(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    connect(app)
    with Client(app.port) as plain, Client(app.port) as streaming, Client(app.port) as asking:
        plain.sock.sendall(request(model="smollm2", fake={"hang": True}))
        streaming.sock.sendall(request(model="smollm2", stream=True, fake={"held_after": 1}))
        while b"data: " not in streaming.buffer:
            streaming.buffer += streaming.sock.recv(65536)
        wait_for(lambda: asking.get("/queue/status").json()["in_flight"] == 2, "both turns")
        stopped = app.run("stop", "--now")
        assert stopped.returncode == 0, stopped.stderr
        refused, cut = plain.read(), streaming.read()
    # Not 502 or "the replica died": the proxy has told them before its engine was ended.
    assert (refused.status, refused.json()["error"]["message"]) == (503, "the proxy was stopped")
    assert json.loads(cut.events()[-1])["error"]["message"] == "the proxy was stopped"
    assert cut.is_complete
    wait_for(lambda: not app.processes(), "no process left")


def test_stop_needs_no_configuration_that_can_be_read(app: Program) -> None:
    connect(app)
    app.config.write_text("models: [")
    refused = app.run("stop")
    assert refused.returncode == 2
    assert "`stop --name DEPLOYMENT` needs no configuration; deployments: default" in refused.stderr
    stopped = app.run("stop", "--name", "default")
    assert stopped.returncode == 0, stopped.stderr
    assert "smollm2-1" in stopped.stdout
    wait_for(lambda: not app.processes(), "no process left")
    unknown = app.run("stop", "--name", "../other")
    assert unknown.returncode == 2
    assert "no deployment is called ../other; there are: default" in unknown.stderr


def test_stop_uses_the_configuration_that_the_deployment_was_started_with(app: Program) -> None:
    app.configure(models=[scripted_model(app)], name="mine")
    assert app.run("start").returncode == 0
    app.configure(models=[{**scripted_model(app), "name": "another"}], name="mine")
    stopped = app.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped smollm2-1\n"), stopped.stderr
    wait_for(lambda: not app.processes(), "no process left")


def test_stop_ends_what_runs_where_its_configuration_has_errors_since(app: Program) -> None:
    app.configure(models=[scripted_model(app)], name="mine")
    assert app.run("start").returncode == 0
    told = json.loads(app.config.read_text())
    broken = {**told, "models": [{**told["models"][0], "replicas": "many", "env": {"TOKEN": "${NOT_SET_HERE}"}}]}
    app.config.write_text(json.dumps({**broken, "cluster": {"nmae": "mine"}}))
    refused = app.run("stop")  # or a deployment that is not meant might end
    assert (refused.returncode, "deployments: mine" in refused.stderr) == (2, True)
    app.config.write_text(json.dumps(broken))
    assert app.run("status").returncode == 2
    stopped = app.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped smollm2-1\n"), stopped.stderr
    wait_for(lambda: not app.processes(), "no process left")


def test_an_up_that_the_scheduler_does_not_answer_leaves_no_relay(app: Program, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    squeue = commands / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    app.environment["PATH"] = f"{commands}:{app.environment['PATH']}"
    slurm = {"work_dir": str(tmp_path / "work"), "partitions": [{"name": "all"}]}
    cluster = {"type": "slurm", "name": "silent", "slurm": slurm}
    models = [{"name": "m", "model_path": "none", "engine": "command", "command": ["true", "{port}"]}]
    app.config.write_text(json.dumps({"proxy": {"port": app.port}, "cluster": cluster, "models": models}))
    up = app.run("up")
    assert (up.returncode, "Unable to contact slurm controller" in up.stderr) == (1, True), up.stdout + up.stderr
    assert app.processes() == []


# --- A program that imports agent_infra, and enters a deployment.


ENTERING = """
import asyncio, sys
from agent_infra import AgentInfraError, ConnectionManager

async def main():
    async with ConnectionManager(sys.argv[1]):
        print("entered")

try:
    asyncio.run(main())
except AgentInfraError as error:
    print(type(error).__name__, error)
"""
CANCELLED = """
import asyncio, sys
from agent_infra import ConnectionManager

async def main():
    onlooker = ConnectionManager(sys.argv[1])
    entering = asyncio.ensure_future(ConnectionManager(sys.argv[1]).__aenter__())
    while not [each for each in (await onlooker.status())["replicas"] if each["state"] == "loading"]:
        await asyncio.sleep(0.05)
    entering.cancel()
    await asyncio.wait([entering])
    print(entering.cancelled(), [each["replica"] for each in (await onlooker.status())["replicas"]])

asyncio.run(main())
"""


def imported(app: Program, code: str) -> str:
    """What such a program prints."""
    command = [sys.executable, "-W", "error", "-c", code, str(app.config)]
    environment = {**app.environment, "PYTHONPATH": str(MODULE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def post(url: str, document: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=PATIENCE_S)


def broken_model(app: Program) -> dict[str, Any]:
    """One that is not found to be broken before it is loaded."""
    weights = app.folder / "broken.gguf"
    weights.write_bytes(b"GGUF" + b"\0" * 1000)
    return {"name": "broken", "engine": "llama_cpp", "model_path": str(weights), "base_port": app.port + 50}


def test_a_manager_that_is_refused_a_deployment_ends_nothing_of_it(app: Program) -> None:
    app.configure(models=[scripted_model(app)])
    up = app.spawn("up")
    up.wait_line("Ctrl-C stops everything")
    turn = {"model": "smollm2", "stream": True, "messages": [], "fake": {"held_after": 0}}
    with post(f"http://127.0.0.1:{app.port}/v1/chat/completions", turn) as stream:
        assert b"word0" in stream.readline()
        assert imported(app, ENTERING).startswith("RefusedError the deployment default is already run by `up`")
        engine = app.status()["replicas"][0]["port"]
        post(f"http://127.0.0.1:{engine}/fake", {"release": True}).close()
        assert stream.read().endswith(b"data: [DONE]\n\n")
    assert up.end() == 0


def test_what_ran_before_survives_a_manager_that_fails(app: Program) -> None:
    app.configure(models=[scripted_model(app), broken_model(app)])
    assert app.run("start", "--model", "smollm2").returncode == 0
    before = app.status()["replicas"]
    for _ in range(2):
        assert imported(app, ENTERING).startswith("AgentInfraError broken-1 failed")
        assert app.status()["replicas"] == before
    os.kill(before[0]["pid"], signal.SIGKILL)  # and now its name is taken anew, by one that is not from before
    wait_for(lambda: app.status()["replicas"][0]["state"] == "failed", "its end")
    assert imported(app, ENTERING).startswith("AgentInfraError broken-1 failed")
    wait_for(lambda: not app.processes(), "no process left")


def test_who_is_cancelled_while_entering_leaves_nothing_behind(app: Program) -> None:
    loading = scripted_model(app)
    loading["command"] += ["--behaviour", '{"health": 503}']
    app.configure(models=[loading])
    assert imported(app, CANCELLED) == "True []\n"
    wait_for(lambda: not app.processes(), "no process left")


@pytest.mark.skipif(os.getuid() != 0, reason="a machine of its own needs root")
def test_a_proxy_on_another_machine_of_the_same_home_is_named_and_its_pid_signalled_nowhere(app: Program) -> None:
    words = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c"]
    command = [*words, 'hostname login2; "$@" & wait', "sh", *app.command("connect")]
    options: dict[str, Any] = {"env": app.environment, "cwd": app.folder, "text": True, "stdout": subprocess.PIPE}
    other = Running(subprocess.Popen(command, stderr=subprocess.STDOUT, **options))
    app.running.append(other)
    other.wait_line("export OPENAI_BASE_URL")
    holder = json.loads((app.state / "agent-infra" / "default" / "controller.lock").read_text())
    assert process_stamp(holder["pid"]) not in (None, holder["process"])  # here, another process has its number
    told = f"`connect` (pid {holder['pid']} on login2)"
    assert f"the proxy runs elsewhere, by {told}" in app.run("status").stdout
    stopped = app.run("stop")
    assert stopped.returncode == 1
    assert f"is run by {told}, this is {os.uname().nodename}: run `stop` there" in stopped.stderr
    refused = app.run("connect", "--background")
    assert refused.returncode == 2
    assert f"already run by {told}" in refused.stderr
    assert other.process.poll() is None
    assert app.get("/health")["status"]

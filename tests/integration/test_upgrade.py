"""A deployment that 0.1.0 started, in the hands of today's program: it goes on, and can be ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from former import FORMER, place_former_state, unpack_former
from freeze import shape
from program import Program, program, wait_for

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"
KEPT = FORMER / "state" / "agent-infra" / "former"


def scripted_model(app: Program, name: str = "smollm2") -> dict[str, Any]:
    command = [sys.executable, str(FAKE_ENGINE), "--port", "{port}"]
    return {"name": name, "model_path": "none", "engine": "command", "command": command, "base_port": app.port + 1}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Program]:
    """Today's program, and a replica that runs in a deployment that 0.1.0 started."""
    with program(tmp_path) as made:
        made.configure(models=[scripted_model(made)], proxy={"strategy": "round_robin"})
        (tmp_path / "former").mkdir()
        unpack_former(tmp_path / "former")
        started = by_former(made, "start")
        assert started.returncode == 0, started.stderr
        yield made


def by_former(app: Program, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of 0.1.0, to its end."""
    today, app.module = app.module, app.folder / "former" / "agent_infra.py"
    try:
        return app.run(*words)
    finally:
        app.module = today


def is_former(app: Program, pid: int) -> bool:
    """Whether a process runs 0.1.0: as a file that its command line names, or as a module in its directory."""
    former = str(app.folder / "former")
    return former in dict(app.processes())[pid] or os.readlink(f"/proc/{pid}/cwd") == former


def await_replicas(app: Program, count: int = 1) -> None:
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == count, "the replicas in the proxy")


def connect_former(app: Program) -> None:
    """The proxy of 0.1.0 in the background, with a turn behind it."""
    connected = by_former(app, "connect", "--background")
    assert connected.returncode == 0, connected.stderr
    await_replicas(app)
    app.chat("Before")


def connect(app: Program, replicas: int = 1) -> None:
    """Today's proxy in the background."""
    connected = app.run("connect", "--background")
    assert connected.returncode == 0, connected.stderr
    await_replicas(app, replicas)


def ask(app: Program, words: str) -> str:
    """Take a turn; the replica that answered."""
    answer, headers = app.chat(words)
    assert answer["choices"][0]["message"]["content"]
    return headers["x-agent-infra-backend"]


def stop(app: Program, *names: str) -> None:
    """`stop` says that it ended these, and nothing is left."""
    stopped = app.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert all(name in stopped.stdout for name in names), stopped.stdout
    wait_for(lambda: not app.processes(), "no process left")


def kept_prompts(app: Program) -> list[str]:
    """What `export` lists."""
    exported = app.run("export", "--format", "jsonl")
    assert exported.returncode == 0, exported.stderr
    return [json.loads(line)["prompt"] for line in exported.stdout.splitlines()]


def test_a_replica_of_0_1_0_is_shown_as_ready_serves_and_can_be_stopped(app: Program) -> None:
    assert is_former(app, app.find("serve"))
    assert [(row["replica"], row["state"]) for row in app.status()["replicas"]] == [("smollm2-1", "ready")]
    connect(app)
    assert ask(app, "Go on") == "smollm2-1"
    assert app.run("status").returncode == 0
    stop(app, "connect", "smollm2-1")


def test_today_s_connect_goes_on_where_that_of_0_1_0_was_ended(app: Program) -> None:
    connect_former(app)
    os.kill(app.find("connect"), signal.SIGTERM)
    wait_for(lambda: not [each for each in app.processes() if re.search(" (connect|relay) ", each[1])], "its end")
    assert "no proxy is running" in app.run("status").stdout
    connect(app)
    assert ask(app, "After") == "smollm2-1"
    stop(app, "connect", "smollm2-1")
    assert kept_prompts(app) == ["Before", "After"]


def test_today_s_connect_takes_over_from_one_of_0_1_0_that_was_killed(app: Program) -> None:
    connect_former(app)
    relay = app.find("relay")
    assert is_former(app, relay)
    wait_for(lambda: kept_prompts(app) == ["Before"], "the turn in the history")
    controller = app.find("connect")
    os.kill(controller, signal.SIGKILL)
    # What the relay tells one that is dying is lost.
    wait_for(lambda: controller not in dict(app.processes()), "the controller's end")
    assert ask(app, "Between") == "smollm2-1"  # its relay serves on
    assert app.run("scale", "smollm2", "2").returncode == 0
    connect(app, 2)
    assert {ask(app, "After") for _ in range(8)} == {"smollm2-1", "smollm2-2"}
    stop(app, "connect", "smollm2-1", "smollm2-2")
    assert kept_prompts(app) == ["Before", "Between", *["After"] * 8]


def test_beside_connect_of_0_1_0_today_s_is_refused_and_today_s_replicas_serve(app: Program) -> None:
    connect_former(app)
    controller, relay = app.find("connect"), app.find("relay")
    refused = app.run("connect", "--background")
    assert refused.returncode == 2
    assert (
        f"already run by `connect` (pid {controller} on this or another machine); "
        "end that with `agent_infra.py stop --name default`" in refused.stderr
    )
    scaled = app.run("scale", "smollm2", "2")
    assert scaled.returncode == 0, scaled.stderr
    await_replicas(app, 2)
    assert {ask(app, "Go on") for _ in range(8)} == {"smollm2-1", "smollm2-2"}
    assert app.run("scale", "smollm2", "1").returncode == 0
    [left] = app.status()["replicas"]
    assert (app.find("connect"), app.find("relay")) == (controller, relay)
    stop(app, f"`connect` (pid {controller})", left["replica"])
    assert kept_prompts(app) == ["Before", *["Go on"] * 8]


def test_0_1_0_can_end_what_today_s_program_runs(app: Program) -> None:
    connect(app)
    status = by_former(app, "status")
    assert (status.returncode, "smollm2  1 of 1 ready" in status.stdout) == (0, True), status.stdout
    stopped = by_former(app, "stop")
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: not app.processes(), "no process left")


def test_stop_finds_what_0_1_0_started_by_the_configuration_that_it_kept(app: Program) -> None:
    app.config.write_text(json.dumps({**json.loads(app.config.read_text()), "proxy": {"port": "many"}}))
    assert app.run("status").returncode == 2
    stop(app, "smollm2-1")


# --- On disk. --------------------------------------------------------------------------------------------------------


def run_kept(app: Program) -> None:
    """Start and connect, by today's program, the deployment that is kept from 0.1.0."""
    assert app.run("start").returncode == 0
    assert app.run("connect", "--background").returncode == 0
    wait_for(lambda: app.get("/health")["models"]["m"]["ready"], "the replica in the proxy")


def test_what_a_deployment_of_0_1_0_left_behind_is_told_listed_and_cleared_away(tmp_path: Path) -> None:
    with program(tmp_path) as app:
        place_former_state(tmp_path)
        app.configure(models=[scripted_model(app, "m")], name="former")
        status = app.run("status")
        assert status.returncode == 3
        assert "m  0 of 1 ready" in status.stdout
        assert "no proxy is running; `connect` starts one" in status.stdout
        again = [f"Look at it again ({number})" for number in range(3)]
        steps = [f"Step {number}" for number in range(3)]
        assert sorted(kept_prompts(app)) == sorted([*again, *steps, "Who are you?"])
        report = app.run("report")
        assert report.returncode == 0, report.stderr
        assert report.stdout.startswith("# Deployment former\n")
        stopped = app.run("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert app.status()["replicas"] == []


def test_a_deployment_of_0_1_0_is_gone_on_with_and_writes_what_it_wrote(tmp_path: Path) -> None:
    with program(tmp_path) as app:
        place_former_state(tmp_path)
        app.configure(models=[scripted_model(app, "m")], name="former")
        run_kept(app)
        app.chat("Today", model="m")
        for kept in KEPT.rglob("*.json"):
            if kept.parent.name == "specs":  # those are read by the program that wrote them alone
                continue
            written = app.state / "agent-infra" / "former" / kept.relative_to(KEPT)
            former, today = (shape(json.loads(path.read_text())) for path in (kept, written))
            assert {path for path in former if "[" not in path} <= set(today), written
        stop(app, "connect", "m-1")
        assert kept_prompts(app)[-1] == "Today"
        left = {path.name for path in (app.state / "agent-infra" / "former").iterdir()}
        assert {"api_key", "replica_key", "history.db", "run"} <= left
        assert not left & {"relay.json", "relay.sock", "config.json", "wanted.json"}

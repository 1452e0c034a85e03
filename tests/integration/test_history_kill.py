"""What outlives a kill -9 of controller and relay, and of each alone: every turn but those of the last batch."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S, compares_clocks
from program import Program, is_listening, once_told, program, wait_for
from prometheus_client.parser import text_string_to_metric_families
from relay_harness import Client, request

AGENTS = 8
TURNS = 125  # of each agent


class Agent:
    """A session of TURNS turns: it notes each that was answered, and tries again otherwise."""

    def __init__(self, app: Program, name: str) -> None:
        self.url = f"http://127.0.0.1:{app.port}/v1/chat/completions"
        self.name = name
        self.answered: dict[str, tuple[float, float]] = {}  # turn → when it was begun, and when answered
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "go on"}], "fake": {"delay": 0.02}}
        headers = {"Content-Type": "application/json", "X-Session-ID": self.name, "X-Timing-Post-Ms": "5"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + 120
        while len(self.answered) < TURNS and time.monotonic() < deadline:
            began = time.time()
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                    answer.read()
                    self.answered[answer.headers["x-request-id"]] = began, time.time()
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)


def kept(app: Program) -> list[dict[str, Any]]:
    """Every turn in the history, by the export of a user."""
    history = app.state / "agent-infra" / f"proxy-{app.port}" / "history.db"
    command = [sys.executable, str(app.module), "export", "--format", "jsonl", "--history", str(history)]
    done = subprocess.run(command, env=app.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE_S)


@pytest.mark.parametrize("killed", ["controller and relay", "controller", "relay"])
@compares_clocks
def test_a_kill_in_the_middle_of_a_thousand_turns_costs_the_last_batch_at_most(
    tmp_path: Path, engine: FakeEngine, killed: str
) -> None:
    with program(tmp_path) as app:
        assert_a_kill_costs_the_last_batch_at_most(app, engine, killed)


def assert_a_kill_costs_the_last_batch_at_most(app: Program, engine: FakeEngine, killed: str) -> None:
    proxy = app.bring_up_proxy(engine.port)
    agents = [Agent(app, f"agent-{number}") for number in range(AGENTS)]
    wait_for(lambda: sum(len(agent.answered) for agent in agents) > AGENTS * TURNS // 3, "a third of the turns")
    relay = app.find("relay")
    killed_at = time.time()
    if "controller" in killed:
        end(proxy.process)
    if "relay" in killed:
        os.kill(relay, signal.SIGKILL)
    gone_at = time.time()
    if "controller" in killed:
        proxy = app.bring_up_proxy(engine.port)
    for agent in agents:
        agent.thread.join(120)
    answered = {turn: moments for agent in agents for turn, moments in agent.answered.items()}
    assert len(answered) == AGENTS * TURNS

    last = app.chat()[1]["x-request-id"]  # of which the controller is told behind all others

    def stats_with_it() -> dict[str, Any]:
        found: dict[str, Any] = app.get("/stats")
        return found if any(row["turn"] == last for row in found["recent_turns"]) else {}

    stats = wait_for(stats_with_it, "the last turn in /stats")
    sessions = {row["id"]: row for client in stats["clients"] for row in client["sessions"]}
    assert proxy.end() == 0
    rows = kept(app)
    known = {row["turn"] for row in rows}
    assert len(known) == len(rows)
    # What is lost was answered within the last batch of events and of the history, about a second, before the kill.
    lost = [moments for turn, moments in answered.items() if turn not in known]
    assert [(began, at) for began, at in lost if at < killed_at - 2.5 or began > gone_at] == []
    assert len(lost) < len(answered) / 2
    assert not lost or "controller" in killed or len(lost) <= AGENTS * 10
    assert stats["totals"]["requests"] == len(rows)
    assert stats["totals"]["completed"] == sum(row["outcome"] == "completed" for row in rows)
    assert stats["totals"]["tokens_out"] == sum(row["completion_tokens"] or 0 for row in rows)
    for agent in agents:
        mine = [row for row in rows if row["session"] == agent.name]
        assert sessions[agent.name]["turns"] == len(mine)
        assert sum(row["post_ms"] == 5 for row in mine) >= len(mine) - 5
    with sqlite3.connect(app.state / "agent-infra" / f"proxy-{app.port}" / "history.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


def test_a_turn_that_ends_while_there_is_no_controller_is_still_its_sessions(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        client.sock.sendall(request(fake={"held": True}).replace(b"Host: t", b"Host: t\r\nX-Session-ID: s"))
        wait_for(lambda: app.get("/stats")["clients"], "the turn, known to the controller")
        end(proxy.process)
        engine.call({"release": True})
        assert client.read().status == 200
        app.bring_up_proxy(engine.port, model="m")
        [turn] = wait_for(lambda: app.get("/stats")["recent_turns"], "the turn's end")
    assert (turn["session"], turn["model"], turn["outcome"]) == ("s", "m", "completed")
    assert turn["started_at"] is not None
    assert [session["turns"] for client in app.get("/stats")["clients"] for session in client["sessions"]] == [1]


def test_a_turn_that_a_second_signal_ends_is_in_the_history(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        client.sock.sendall(request(fake={"hang": True}))
        wait_for(lambda: app.get("/stats")["clients"], "the turn, known to the controller")
        proxy.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not is_listening(app.port), "the first signal's effect")
        proxy.end(signal.SIGTERM)
    assert [turn["outcome"] for turn in kept(app)] == ["rejected"]  # 503


def test_a_history_that_fails_does_not_touch_the_service(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    app.chat()
    history = app.state / "agent-infra" / f"proxy-{app.port}" / "history.db"
    wait_for(lambda: app.get("/stats")["history"]["turns"] == 1, "the turn in the history")
    with contextlib.closing(sqlite3.connect(history, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        app.chat()
        failing = wait_for(
            lambda: (
                (found := app.get("/stats"))["history"]["state"] == "failing"
                and found["totals"]["requests"] == 2
                and found
            ),
            "the failure in /stats",
        )
        assert "locked" in failing["history"]["reason"]
        assert app.chat()[0]["choices"]
        holder.execute("ROLLBACK")
    wait_for(lambda: app.get("/stats")["history"] == {**failing["history"], "state": "on", "reason": None, "turns": 3},
             "the history on again")  # fmt: skip
    assert proxy.end() == 0


def test_without_a_history_nothing_is_written(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, "--history", "off")
    app.chat()
    wait_for(lambda: app.get("/stats")["totals"]["requests"] == 1, "the turn in /stats")
    assert app.get("/stats")["history"]["state"] == "off"
    assert proxy.end() == 0
    assert not list(app.state.rglob("*.db*"))


def scrape(app: Program) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{app.port}/metrics", timeout=PATIENCE_S) as answer:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_prometheus_can_scrape_the_proxy_over_a_relays_end(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    turns = ("agent_infra_turns_total", "completed", "smollm2", "smollm2-1")
    for _ in range(3):
        app.chat()
    wait_for(lambda: once_told(lambda: scrape(app)).get(turns) == 3, "three turns in /metrics")
    os.kill(app.find("relay"), signal.SIGKILL)
    app.chat()
    wait_for(lambda: once_told(lambda: scrape(app)).get(turns) == 4, "four turns in /metrics")
    assert once_told(lambda: scrape(app))["agent_infra_inference_seconds_count", "smollm2"] == 4
    wait_for(lambda: once_told(lambda: scrape(app))["agent_infra_relay_restarts_total",] == 1, "its restart")
    end(proxy.process)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        scrape(app)
    assert refusal.value.code == 503
    assert "no controller" in json.load(refusal.value)["error"]["message"]

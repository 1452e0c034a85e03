"""One part after the other is killed with -9 behind the page, and what the page says of it is true each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from browser_site import status, wait_text
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import Program, Running, program, wait_for
from testbed.ports import free_port

# An agent: one turn of the session that it is named after, which its engine holds back for ever.
AGENT = """
import json, sys, urllib.request
body = {"model": "smollm2", "messages": [{"role": "user", "content": "go"}], "fake": {"held": True}}
headers = {"Content-Type": "application/json", "X-Session-ID": sys.argv[2]}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], json.dumps(body).encode(), headers))
"""


@dataclass
class Deployment:
    """A proxy in front of two engines, and the page: each part a process that can be killed."""

    app: Program
    engines: list[FakeEngine]
    proxy: Running
    page_url: str
    browser: Any

    def bring_up_proxy(self) -> None:
        backends = [word for engine in self.engines for word in ("--backend", f"smollm2=127.0.0.1:{engine.port}")]
        words = ("--config", str(self.app.config), "--port", str(self.app.port), *backends)
        self.proxy = self.app.spawn("proxy", *words)
        self.proxy.wait_line("^proxy  http")
        wait_for(lambda: self.app.get("/health")["models"]["smollm2"]["ready"] == 2, "both replicas in the proxy")
        self.app.get("/stats")

    def begin_turn(self, session: str) -> subprocess.Popen[bytes]:
        """A new agent whose turn is with an engine, as the controller knows."""
        command = [sys.executable, "-c", AGENT, f"http://127.0.0.1:{self.app.port}/v1/chat/completions", session]
        agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(lambda: self.state_of(session) == "prefill", "the turn at an engine, known to the controller")
        return agent

    def state_of(self, session: str) -> str | None:
        clients = self.app.get("/stats")["clients"]
        states = (row["state"] for client in clients for row in client["sessions"] if row["id"] == session)
        return next(states, None)

    def open(self, **parameters: str) -> Any:
        tab = self.browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(1000 * PATIENCE_S)
        tab.goto(self.page_url + "".join(f"&{name}={value}" for name, value in parameters.items()))
        tab.wait_for_selector(".st-key-phases ul")
        return tab


@pytest.fixture(scope="module")
def deployment(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("kills")
    with program(folder, proxy={"health_check_interval": 1}) as app:
        engines = [FakeEngine(), FakeEngine()]
        try:
            port = next(port for port in iter(free_port, 0) if port != 10080)  # which Chromium refuses
            page = app.spawn("dashboard", "--proxy", f"http://127.0.0.1:{app.port}", "--port", str(port))
            url = page.wait_line(r"page +(http://\S+)")[1]
            made = Deployment(app, engines, page, url, chromium)
            made.bring_up_proxy()
            page.wait_line("Uvicorn server started")
            yield made
        finally:
            for engine in engines:
                engine.kill()


@pytest.fixture(scope="module")
def dead_agent(deployment: Deployment) -> str:
    """The session of an agent that was killed in the middle of its first turn, long enough ago by the last test."""
    agent = deployment.begin_turn("dead-agent")
    agent.kill()
    agent.wait(PATIENCE_S)
    return "dead-agent"


@pytest.fixture(autouse=True)
def no_viewer_is_left(deployment: Deployment, dead_agent: str) -> Iterator[None]:
    yield
    for context in deployment.browser.contexts:
        context.close()


def test_a_killed_agents_turn_is_one_whose_client_left_and_no_error(deployment: Deployment) -> None:
    tab = deployment.open(session="dead-agent")
    wait_text(tab, "1 turn", ".stMainBlockContainer")
    tab.wait_for_selector(".row")
    assert "aborted" in tab.locator(".row").inner_text()
    assert "ERRORS" not in status(tab)


def test_a_killed_replica_gets_no_turns_until_it_is_back(deployment: Deployment) -> None:
    tab = deployment.open(tab="Replicas")
    wait_text(tab, "2 of 2 replicas ready.")
    second = deployment.engines[1]
    second.kill()
    wait_text(tab, "UNHEALTHY", ".st-key-status")
    wait_text(tab, "1 of 2 replicas gets no turns: smollm2-2 (", ".st-key-status")
    wait_text(tab, "1 of 2 replicas ready.")
    assert deployment.app.chat()[1]["x-agent-infra-backend"] == "smollm2-1"
    deployment.engines[1] = FakeEngine(second.port)
    wait_text(tab, "2 of 2 replicas ready.")
    tab.wait_for_function("!document.querySelector('.st-key-status').innerText.includes('UNHEALTHY')")


def test_a_killed_relay_is_replaced_and_its_turn_is_said_to_have_failed(deployment: Deployment) -> None:
    tab = deployment.open(tab="Replicas")
    wait_text(tab, "2 of 2 replicas ready.")
    agent, relay = deployment.begin_turn("cut-agent"), deployment.app.find("relay")
    os.kill(relay, signal.SIGKILL)
    assert agent.wait(PATIENCE_S) != 0
    wait_text(tab, "ERRORS", ".st-key-status")
    wait_text(tab, "turns failed in the last 5\u00a0min: the relay ended during this turn.", ".st-key-status")
    wait_text(tab, "2 of 2 replicas ready.")
    tab.wait_for_function("!document.querySelector('.st-key-status').innerText.includes('NO CONNECTION')")
    assert deployment.app.find("relay") != relay
    assert deployment.app.chat()[0]["choices"]


def test_a_killed_controller_is_gone_while_turns_are_served(deployment: Deployment) -> None:
    tab = deployment.open(tab="Replicas")
    wait_text(tab, "2 of 2 replicas ready.")
    relay = deployment.app.find("relay")
    deployment.proxy.process.kill()
    wait_text(tab, "CONTROLLER GONE", ".st-key-status")
    wait_text(tab, "Turns are still served.", ".st-key-status")
    assert "replicas gets" not in status(tab)
    assert deployment.app.chat()[0]["choices"]
    deployment.bring_up_proxy()
    tab.wait_for_function("!document.querySelector('.st-key-status').innerText.includes('CONTROLLER GONE')")
    wait_text(tab, "2 of 2 replicas ready.")
    assert deployment.app.find("relay") == relay


def test_a_killed_agent_does_not_think(deployment: Deployment, dead_agent: str) -> None:
    """It was killed when these tests began: it never said that its session is over."""
    tab = deployment.open(session=dead_agent)
    wait_text(tab, "silent · seen ")
    sessions = deployment.app.get("/stats")["sessions"]
    assert sessions["live"] > sessions["alive"]

"""docs/grafana.json against a real Prometheus that scrapes a real proxy with traffic."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from grafana import expressions
from patience import PATIENCE_S
from program import Program, wait_for
from relay_harness import Client
from testbed.ports import free_port

CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
scrape_configs:
  - job_name: agent-infra
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
# What a proxy in front of one server without GPUs and without 30 turns has no samples of.
EMPTY = ("kv_cache_usage_ratio", "gpu_utilization_ratio", "suggested_agents", "gpu_seconds")


@pytest.fixture
def prometheus(tmp_path: Path, app: Program) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the proxy."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("there is no Prometheus: apt-get install prometheus")
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(port=app.port))
    command = [binary, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    command.append(f"--storage.tsdb.path={tmp_path / 'tsdb'}")
    with (tmp_path / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=PATIENCE_S)


def query(url: str, expression: str) -> list[Any]:
    """The result of an instant query; HTTPError if Prometheus can't read it."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
        document = json.load(answer)
    assert document["status"] == "success", document
    found: list[Any] = document["data"]["result"]
    return found


@pytest.mark.slow
def test_every_panel_of_the_dashboard_shows_what_a_proxy_did(app: Program, engine: FakeEngine, prometheus: str) -> None:
    app.bring_up_proxy(engine.port, model="m")

    def answers() -> bool:
        try:
            return query(prometheus, "agent_infra_active_sessions") != []
        except OSError:
            return False

    wait_for(answers, "a first scrape")
    with Client(app.port) as client:

        def work() -> bool:
            """Turns, until the rates of all of them have been scraped."""
            for number in range(4):
                headers = {"X-Session-ID": f"s{number}", "X-Timing-Pre-Ms": "20", "X-Timing-Post-Ms": "10"}
                assert client.chat(headers, stream=True, fake={"usage": True}).status == 200
            told = query(prometheus, "sum(rate(agent_infra_post_seconds_count[1m]))")
            return bool(told) and float(told[0]["value"][1]) > 0

        wait_for(work, "rates of turns")
        silent = [text for text in expressions() if not query(prometheus, text)]
    assert [text for text in silent if not any(name in text for name in EMPTY)] == []
    [completed] = query(prometheus, 'sum(agent_infra_turns_total{outcome="completed"})')
    assert float(completed["value"][1]) > 0

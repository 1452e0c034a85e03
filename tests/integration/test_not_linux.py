"""The operator's side where there is no /proc, as on macOS; on Linux, with /proc hidden. It never ran on macOS."""

from __future__ import annotations

import json
import os
import signal
import urllib.error

import pytest
from openai import OpenAI
from patience import PATIENCE_S
from program import Program, is_listening, wait_for
from testbed.not_linux import not_linux
from weights import packaged_gguf

from agent_infra_core.host import http_get

KEY = "a-key-of-its-own"
pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may hide /proc")


def relay_memory(app: Program) -> int:
    status, body = http_get("127.0.0.1", app.port, "/stats", KEY)
    return int(json.loads(body)["relay"]["rss_bytes"] or 0) if status == 200 else 0


def test_serve_answer_scale_find_a_stale_lock_and_stop(app: Program) -> None:
    packaged_gguf()
    app.prefix = not_linux(app.folder, app.environment)
    app.configure(name="its-socket-has-a-path-too-long-for-the-kernel".ljust(63, "-"), proxy={"api_key": KEY})
    assert app.run("start").returncode == 0
    connected = app.run("connect", "--background")
    assert connected.returncode == 0, connected.stderr
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 1, "the replica in the proxy")
    with pytest.raises(urllib.error.HTTPError, match="401"):  # nobody says that it is this user who calls
        app.chat()
    talker = OpenAI(base_url=f"http://127.0.0.1:{app.port}/v1", api_key=KEY, timeout=PATIENCE_S)
    answer = talker.chat.completions.create(
        model="smollm2", max_tokens=8, messages=[{"role": "user", "content": "Count."}]
    )
    assert answer.choices[0].message.content
    memory = wait_for(lambda: relay_memory(app), "the relay's memory in /stats")
    assert memory > 1 << 20
    scaled = app.run("scale", "smollm2", "2")
    assert scaled.returncode == 0, scaled.stderr
    wait_for(lambda: app.get("/health")["models"]["smollm2"]["ready"] == 2, "the second replica in the proxy")
    relay = app.find("relay")
    os.kill(relay, signal.SIGKILL)  # a zombie of the controller's, until another one runs
    wait_for(lambda: relay not in dict(app.processes()) and relay_memory(app), "the next relay")
    os.kill(app.find("connect"), signal.SIGKILL)
    told = app.run("status")
    assert "the proxy is running without its controller; `connect` takes it over" in told.stdout + told.stderr
    again = app.run("connect", "--background")
    assert again.returncode == 0, again.stderr
    stopped = app.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: not app.processes(), "no process left")
    assert not is_listening(app.port)

"""`proxy`: the proxy alone, in front of servers that run already; and how controller and relay hold together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import Program, is_listening, program, wait_for
from relay_harness import Answer, Client
from stats_schema import check_stats


def is_replaced(app: Program, relay: int) -> bool:
    """Whether another relay than this one answers."""
    app.get("/health")
    return relay not in dict(app.processes())


@contextlib.contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """The file ``path`` can't be written, as on a full disk, whoever one is."""
    path.unlink()
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()


def test_the_proxy_alone_relays_and_leaves_nothing(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, "--strategy", "round_robin")
    answer, headers = app.chat()
    assert answer["choices"][0]["message"]["content"]
    assert headers["x-agent-infra-backend"] == "smollm2-1"
    wait_for(lambda: app.get("/stats")["totals"]["requests"] == 1, "the turn in /stats")
    assert app.get("/stats")["strategy"] == "round_robin"
    check_stats(app.get("/stats"))
    assert proxy.end() == 0
    wait_for(lambda: not app.processes(), "no process left")
    assert not is_listening(app.port)


def test_the_servers_key_comes_from_the_environment_and_is_on_no_command_line(app: Program, engine: FakeEngine) -> None:
    app.environment["AGENT_INFRA_BACKEND_KEY"] = "the-servers-secret"
    proxy = app.bring_up_proxy(engine.port)
    app.chat()
    assert "authorization: bearer the-servers-secret" in engine.call()["heads"][-1].lower()
    assert all("secret" not in command for _, command in app.processes())
    assert proxy.end() == 0


def test_the_proxy_alone_takes_settings_from_a_file_and_options_go_first(app: Program, engine: FakeEngine) -> None:
    config = app.folder / "other.yaml"
    config.write_text("proxy: {strategy: least_latency, capture_text: 7}\nheaders: {session: host}\ncluster: {no: 1}\n")
    proxy = app.bring_up_proxy(engine.port, "--config", str(config), "--capture-text", "3")
    app.chat()
    turn = wait_for(lambda: app.get("/stats")["recent_turns"], "the turn in /stats")[0]
    assert turn["session"] == f"127.0.0.1:{app.port}"
    assert (app.get("/stats")["strategy"], len(turn["prompt"])) == ("least_latency", 3)
    proxy.wait_line(f"^export OPENAI_BASE_URL=http://127.0.0.1:{app.port}/v1$")
    assert proxy.end() == 0


def test_a_proxy_says_which_backend_is_down_and_how_to_end_it(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, "--backend", "smollm2=127.0.0.1:1")
    proxy.wait_line("^degraded: nothing listens at smollm2=127.0.0.1:1; ")
    again = app.run("proxy", "--port", str(app.port), "--backend", f"m=127.0.0.1:{engine.port}")
    assert again.returncode == 2
    assert f"`agent_infra.py stop --name proxy-{app.port}`, or give this one another --port" in again.stderr
    assert app.run("stop", "--name", f"proxy-{app.port}").returncode == 0
    assert proxy.process.wait(timeout=PATIENCE_S) == 0


def test_a_question_that_cannot_be_answered_ends_no_controller(app: Program, engine: FakeEngine) -> None:
    (app.folder / "prometheus_client.py").write_text("raise ImportError('it is not installed')")
    app.environment["PYTHONPATH"] = str(app.folder)
    proxy = app.bring_up_proxy(engine.port)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        app.get("/metrics")
    app.chat()
    wait_for(lambda: app.get("/stats")["totals"]["requests"] == 1, "the turn in /stats")
    assert proxy.end() == 0


def test_a_state_path_longer_than_a_socket_address_is_no_obstacle(tmp_path: Path, engine: FakeEngine) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    with program(deep) as app:
        proxy = app.bring_up_proxy(engine.port)
        assert app.chat()[0]["choices"]
        assert proxy.end() == 0


def test_a_relay_that_hangs_is_replaced(app: Program, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = app.bring_up_proxy(engine.port)
    relay = app.find("relay")
    os.kill(relay, signal.SIGSTOP)
    wait_for(lambda: relay not in [pid for pid, _ in app.processes()], "the hung relay gone")
    assert app.chat()[0]["choices"]
    assert proxy.end() == 0


def test_a_drained_backend_stays_drained_over_a_relays_end(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    url = f"http://127.0.0.1:{app.port}"
    subprocess.run(
        ["curl", "-sf", "-X", "POST", f"{url}/admin/backends/smollm2-1/drain"], check=True, timeout=PATIENCE_S
    )
    wait_for(lambda: app.get("/stats")["backends"][0]["state"] == "draining", "the drain in /stats")
    os.kill(app.find("relay"), signal.SIGKILL)
    assert wait_for(lambda: app.get("/health"), "a relay")["models"]["smollm2"]["ready"] == 0
    subprocess.run(
        ["curl", "-sf", "-X", "POST", f"{url}/admin/backends/smollm2-1/undrain"], check=True, timeout=PATIENCE_S
    )
    assert app.chat()[0]["choices"]
    assert proxy.end() == 0


@pytest.mark.parametrize("killed", [["proxy"], ["proxy", "relay"]])
def test_a_drained_backend_stays_drained_over_a_controllers_end(
    app: Program, engine: FakeEngine, killed: list[str]
) -> None:
    app.bring_up_proxy(engine.port)
    kept = app.state / "agent-infra" / f"proxy-{app.port}" / "drained.json"
    drain = ["curl", "-sf", "-X", "POST", f"http://127.0.0.1:{app.port}/admin/backends/smollm2-1/drain"]
    subprocess.run(drain, check=True, timeout=PATIENCE_S)
    wait_for(kept.exists, "the drain on the disk")
    for role in killed:
        os.kill(app.find(role), signal.SIGKILL)
    wait_for(lambda: len(app.processes()) == 2 - len(killed), "their end")
    proxy = app.spawn("proxy", "--port", str(app.port), "--backend", f"smollm2=127.0.0.1:{engine.port}")
    proxy.wait_line("^proxy  http")
    assert wait_for(lambda: app.get("/stats")["backends"], "the backend in /stats")[0]["state"] == "draining"
    assert app.get("/health")["models"]["smollm2"]["ready"] == 0
    assert proxy.end() == 0
    proxy = app.bring_up_proxy(engine.port)  # an orderly end leaves no drain behind
    assert proxy.end() == 0


def test_a_relay_that_a_full_disk_left_unrecorded_is_recorded_later(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    folder = app.state / "agent-infra" / f"proxy-{app.port}"
    with unwritable(folder / "relay.json"):
        killed = app.find("relay")
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: is_replaced(app, killed), "a relay")
    wait_for((folder / "relay.json").exists, "the record")
    assert json.loads((folder / "relay.json").read_text())["pid"] == app.find("relay")
    assert proxy.end() == 0


@pytest.mark.parametrize("verb", ["proxy", "stop"])
def test_a_relay_without_record_or_controller_is_no_orphan(app: Program, engine: FakeEngine, verb: str) -> None:
    app.bring_up_proxy(engine.port)
    with unwritable(app.state / "agent-infra" / f"proxy-{app.port}" / "relay.json"):
        killed = app.find("relay")
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: is_replaced(app, killed), "a relay")
        os.kill(app.find("proxy"), signal.SIGKILL)
        wait_for(lambda: len(app.processes()) == 1, "the controller's end")
        relay = app.find("relay")
    if verb == "proxy":
        proxy = app.bring_up_proxy(engine.port)
        assert app.find("relay") == relay
        assert proxy.end() == 0
    else:
        assert f"stopped proxy (pid {relay})" in app.run("stop", "--name", f"proxy-{app.port}").stdout
    wait_for(lambda: not app.processes(), "no process left")
    assert not is_listening(app.port)


def test_a_start_that_fails_leaves_another_ones_relay_its_files(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    folder = app.state / "agent-infra" / f"proxy-{app.port}"
    os.rename(folder / "controller.lock", folder / "other.lock")  # as on a file system that knows no locks
    os.kill(app.find("relay"), signal.SIGSTOP)
    (folder / "relay.json").unlink()
    refused = app.run("proxy", "--port", str(app.port), "--backend", f"m=127.0.0.1:{engine.port}")
    assert refused.returncode != 0
    assert (folder / "relay.sock").exists()
    os.kill(app.find("relay"), signal.SIGCONT)
    assert proxy.end() == 0


def test_the_log_is_json_lines_when_asked_for(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, "--log-format", "json")
    log = app.state / "agent-infra" / f"proxy-{app.port}" / "run" / "logs" / "proxy.log"
    assert proxy.end() == 0
    lines = log.read_text().splitlines()
    assert lines
    assert all(json.loads(line) for line in lines)


def test_a_second_signal_ends_turns_in_flight_at_once(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port)
    engine.call({"hang": True})
    body = '{"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}'
    agent = subprocess.Popen(
        ["curl", "-s", f"http://127.0.0.1:{app.port}/v1/chat/completions", "-d", body], stdout=subprocess.DEVNULL
    )
    engine.wait_for("running", 1)
    proxy.process.send_signal(signal.SIGINT)
    wait_for(lambda: not is_listening(app.port), "the proxy accepts no more")
    assert proxy.process.poll() is None  # the turn has its time
    proxy.process.send_signal(signal.SIGINT)
    assert proxy.process.wait(timeout=PATIENCE_S) == 0
    agent.wait(timeout=PATIENCE_S)
    wait_for(lambda: not app.processes(), "no process left")


def test_what_is_read_right_after_an_answer_counts_it(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:

        def ask(path: str) -> Answer:
            """The controller's answer; while it is late, the relay says 503."""
            return wait_for(lambda: [said for said in [client.get(path)] if said.status != 503], path)[0]

        for count in range(1, 21):
            assert client.chat({"X-Session-ID": "s"}, stream=count % 2 == 0).status == 200
            stats = ask("/stats").json()
            assert (stats["totals"]["requests"], stats["recent_turns"][0]["outcome"]) == (count, "completed")
            assert len(ask("/stats/sessions/s").json()["turns"]) == count
            counted = [line for line in ask("/metrics").body.decode().splitlines() if "turns_total{" in line]
            assert sum(float(line.rpartition(" ")[2]) for line in counted) == count

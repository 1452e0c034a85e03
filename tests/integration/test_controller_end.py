"""A controller ends, and its relay with it, whatever its threads are at; what is lost by that is told."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import once_told, wait_for
from relay_harness import Client

from agent_infra_core.control.controller import Controller
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import process_stamp
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, Config, ModelConfig, ProxyConfig
from agent_infra_core.ssh.tunnels import TunnelSet


class Hindrance:
    """Something that takes long, from some time on."""

    def __init__(self) -> None:
        self.begins, self.is_met, self.is_over = threading.Event(), threading.Event(), threading.Event()

    def meet(self) -> None:
        if self.begins.is_set():
            self.is_met.set()
            assert self.is_over.wait(PATIENCE_S)


class SlowTunnels(TunnelSet):
    def __init__(self, hindrance: Hindrance) -> None:
        super().__init__(ClusterConfig(), None, "key", ())
        self._hindrance = hindrance

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        self._hindrance.meet()
        return super().follow(records)


class ForgetfulTunnels(SlowTunnels):
    """None is needed; once the hindrance is over, there are no replicas: the relay has to be told so."""

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        self._hindrance.meet()
        return [] if self._hindrance.is_over.is_set() else list(records)


def wait_ready(controller: Controller) -> None:
    """Wait until the relay has the replica: it reads a table and a client's request in any order."""
    with Client(controller.relay.port) as client:
        wait_for(lambda: client.get("/health").json()["models"]["m"]["ready"] == 1, "the replica, in the relay")


def test_a_controller_drains_a_replica_and_counts_the_turns_that_it_still_has(
    tmp_path: Path, engine: FakeEngine
) -> None:
    record = ReplicaRecord("m-1", "m", "ready", "command", "here", 1, "p", port=engine.port)
    config = Config(models=(ModelConfig("m", "m", engine="command"),), proxy=ProxyConfig(port=0))
    paths = deployment_paths("default", {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)})
    controller = Controller(config, paths, lambda: [record], keys=("key", None))
    controller.start()
    try:
        wait_ready(controller)
        with (
            ThreadPoolExecutor(1) as pool,
            Client(controller.relay.port) as slow,
            Client(controller.relay.port) as late,
        ):
            turn = pool.submit(slow.chat, fake={"held": True})
            engine.wait_for("running", 1)
            wait_for(lambda: controller.drain("m-1") == 1, "the count of its turns")
            assert late.chat().status == 503
            engine.call({"release": True})
            assert turn.result(PATIENCE_S).status == 200
        wait_for(lambda: controller.drain("m-1") == 0, "none is left")
        assert controller.drain("m-2") is None  # asked for the first time
    finally:
        controller.stop(1.0)


def test_what_a_relay_said_before_its_end_is_heard_whoever_notices_that_first(
    tmp_path: Path, engine: FakeEngine
) -> None:
    """Here it is noticed by telling it something."""
    hindrance = Hindrance()
    record = ReplicaRecord("m-1", "m", "ready", "command", "here", 1, "p", port=engine.port)
    config = Config(models=(ModelConfig("m", "m", engine="command"),), proxy=ProxyConfig(port=0))
    paths = deployment_paths("default", {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)})
    tunnels = ForgetfulTunnels(hindrance)
    controller = Controller(config, paths, lambda: [record], keys=("key", None), tunnels=tunnels)
    controller.start()
    try:
        wait_ready(controller)
        hindrance.begins.set()
        assert hindrance.is_met.wait(PATIENCE_S)
        with Client(controller.relay.port) as client:
            assert client.chat().status == 200
        for _ in range(2):  # two reports later, it has told of this turn
            heard = unread_bytes(controller)
            wait_for(lambda heard=heard: unread_bytes(controller) > heard, "what the relay reports")  # type: ignore[misc]
        os.kill(controller.relay.pid, signal.SIGKILL)
        hindrance.is_over.set()
        totals = once_told(lambda: stats_of(controller)["totals"])
        assert (totals["completed"], totals["errors"]) == (1, 0)
    finally:
        hindrance.is_over.set()
        controller.stop(0)


def unread_bytes(controller: Controller) -> int:
    """How much the relay has sent that its controller hasn't read."""
    control = controller.relay._control
    assert control is not None
    return int.from_bytes(fcntl.ioctl(control, termios.FIONREAD, bytes(4)), sys.byteorder)


def stats_of(controller: Controller) -> Any:
    with urllib.request.urlopen(f"{controller.url}/stats", timeout=PATIENCE_S) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        ("controller", "is still busy and was abandoned; turns and replica time that it has not passed on are missing"),
        ("discovery", "a poll of the replicas is still running; it was abandoned"),
    ],
)
def test_a_thread_that_does_not_end_keeps_nothing_else_from_its_end(
    slow: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bookkeeping", "controller", "discovery"):
        monkeypatch.setattr(f"agent_infra_core.control.{module}.STOP_S", 0.5)
    hindrance, none = Hindrance(), Hindrance()

    def look() -> list[ReplicaRecord]:
        (hindrance if slow == "discovery" else none).meet()
        return []

    config = Config(models=(ModelConfig("m", "m", engine="command"),), proxy=ProxyConfig(port=0))
    paths = deployment_paths("default", {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)})
    tunnels = SlowTunnels(hindrance if slow == "controller" else none)
    controller = Controller(config, paths, look, keys=("key", None), tunnels=tunnels)
    controller.start()
    try:
        stamp = process_stamp(controller.relay.pid)
        pid = controller.relay.pid
        hindrance.begins.set()
        assert hindrance.is_met.wait(PATIENCE_S)
        controller.stop(0)
        assert stamp is not None
        assert process_stamp(pid) != stamp  # its relay has ended
        assert said in paths.log("proxy").read_text()
    finally:
        hindrance.is_over.set()
        controller.stop(0)
    wait_for(lambda: slow not in [thread.name for thread in threading.enumerate()], "the thread ends later, in order")
    assert controller.failure is None

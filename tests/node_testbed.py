"""Starts the real `serve` in a run directory of its own, and waits for what its record says."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patience import PATIENCE_S
from program import MODULE, wait_for

from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.host import process_stamp
from agent_infra_core.protocol import ReplicaRecord, record_from_json
from agent_infra_core.settings import ModelConfig

KEY = "replica-key-of-the-tests"
# A server that any Python runs: OpenAI's chat path, /health, and what its environment and argv say.
STDLIB_ENGINE = Path(__file__).parent / "testbed" / "stdlib_engine.py"
# The oldest and the newest Python that is supported, where pyenv has them here; else the one at hand.
PYENV = [Path("/root/.pyenv/versions") / version / "bin" / "python" for version in ("3.10.13", "3.13.0")]
PYTHONS = [str(python) for python in PYENV if python.exists()] or [sys.executable]


def engine_pids(directory: Path) -> list[int]:
    """Processes, zombies apart, whose environment carries the mark of this directory's engines."""
    mark = f"AGENT_INFRA_TEST_MARK={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and process_stamp(int(entry.name)):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environment:
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that still run."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if process_stamp(int(child))]


class Served:
    """One `serve` process in its own session; owns it."""

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        *,
        python: tuple[str, ...] = (sys.executable,),
        program: Path = MODULE,
        environment: Mapping[str, str] | None = None,
        replica: str = "replica-0",
        **spec: Any,
    ) -> None:
        self.directory, self.replica = directory, replica
        for name in ("specs", "replicas", "logs"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        key_file = directory / "replica_key"
        key_file.write_text(KEY)
        model = dataclasses.replace(model, env={**model.env, "AGENT_INFRA_TEST_MARK": str(directory)})
        written = serve_spec(replica, model, str(directory), str(key_file), **spec)
        (directory / "specs" / f"{replica}.json").write_text(json.dumps(dataclasses.asdict(written)))
        with open(directory / "serve.out", "ab") as output:
            self.process = subprocess.Popen(
                [*python, str(program), "serve", "--run-dir", str(directory), "--replica", replica],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def record(self) -> ReplicaRecord | None:
        path = self.directory / "replicas" / f"{self.replica}.json"
        return record_from_json(path.read_text()) if path.exists() else None

    @property
    def log(self) -> str:
        path = self.directory / "logs" / f"{self.replica}.log"
        own = (self.directory / "serve.out").read_text()
        return (path.read_text() if path.exists() else "") + own

    def wait_for_record(self, is_it: Callable[[ReplicaRecord], bool], deadline_s: float = 60.0) -> ReplicaRecord:
        """The record, once it is as asked; fails at once, with the log, when `serve` ended before."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            ended = self.process.poll()
            record = self.record
            if record is not None and is_it(record):
                return record
            assert ended is None, f"serve ended with {ended}; {record}\n{self.log[-4000:]}"
            time.sleep(0.02)
        raise AssertionError(f"the record never became as asked: {self.record}\n{self.log[-4000:]}")

    def wait_for_state(self, state: str, deadline_s: float = 60.0) -> ReplicaRecord:
        return self.wait_for_record(lambda record: record.state == state, deadline_s)

    def stop(self, number: int = signal.SIGTERM, deadline_s: float = 40.0) -> int:
        """End it by a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(deadline_s)

    def close(self) -> None:
        """End it whatever it does, and check that no process of its engine is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        wait_for(lambda: not engine_pids(self.directory), "the end of the engines")

    def request(self, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The parsed JSON answer of the engine (of /load where ``port`` says so) to a request with the key."""
        record = self.record
        assert record is not None
        port = options.get("port", record.port)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Authorization": f"Bearer {options.get('key', KEY)}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=options.get("timeout", 30)) as answer:
            return json.load(answer)

    def load(self, key: str = KEY) -> dict[str, Any]:
        """The body of GET /load."""
        record = self.record
        assert record is not None
        loaded: dict[str, Any] = self.request("/load", port=record.telemetry_port, key=key)
        return loaded

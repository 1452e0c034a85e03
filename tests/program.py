"""Runs the program as a user does, in a state directory of its own, and finds whatever it leaves behind."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from patience import PATIENCE_S
from testbed.ports import free_port

import agent_infra

MODULE = Path(agent_infra.__file__)
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str = "it", seconds: float = PATIENCE_S) -> T:
    """The first true value of ``condition``; fails with ``what`` when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def once_told(ask: Callable[[], T]) -> T:
    """What ``ask`` finds, once the controller has answered: the relay waits 2 s for it, and then says 503."""

    def attempt() -> list[T] | None:
        try:
            return [ask()]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 503:
                raise
            return None

    found = wait_for(attempt, "an answer of the controller")
    assert found is not None
    return found[0]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_with(marker: str) -> list[tuple[int, str]]:
    """(pid, command line) of every living process, but this one, whose environment holds ``marker``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if marker.encode() in environment and state not in "ZX":
                found.append((int(entry.name), command))
    return found


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Running:
    """A command in the background whose lines can be waited for; owns the process and the thread that reads it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_line(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """The first line from here on that ``pattern`` matches."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"no line {pattern!r}; said: {self.lines}"
            self.lines.append(line)
            found = re.search(pattern, line)
            if found:
                return found

    def end(self, number: int = signal.SIGINT, seconds: float = PATIENCE_S) -> int:
        """Send a signal, wait for the exit code, keep what was said until then."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=seconds)
        self.close()
        while not self._queue.empty():
            self.lines.append(self._queue.get() or "")
        return code

    def close(self) -> None:
        """Make sure that the process is gone, and close its pipe."""
        self.process.kill()
        self.process.wait(timeout=PATIENCE_S)
        self._reader.join(timeout=PATIENCE_S)
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()


class Program:
    """The command line over one configuration file, in one state directory."""

    def __init__(self, folder: Path, *, module: Path = MODULE, **config: Any) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.port = free_port()
        self.environment = {**os.environ, "XDG_STATE_HOME": str(self.state), "PYTHONUNBUFFERED": "1"}
        self.config = folder / "config.yaml"
        self.module = module
        self.prefix: tuple[str, ...] = ()  # words before every command, to run it elsewhere
        self.running: list[Running] = []
        self.configure(**config)

    def configure(
        self,
        *,
        replicas: int = 1,
        name: str = "default",
        proxy: dict[str, Any] | None = None,
        models: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write the configuration: the embedded model unless ``models`` says otherwise (JSON is YAML)."""
        embedded = {
            "name": "smollm2",
            "model_path": "smollm2-135m-instruct",
            "engine": "llama_cpp",
            "replicas": replicas,
            "base_port": self.port + 1,
        }
        document = {
            "proxy": {"port": self.port, **(proxy or {})},
            "cluster": {"name": name},
            "models": models or [embedded],
        }
        self.config.write_text(json.dumps(document))

    def command(self, *words: str) -> list[str]:
        without = ("bundle", "init", "launch", "proxy", "--help", "--version")
        options = [] if words[0] in without else ["--config", str(self.config)]
        return [*self.prefix, sys.executable, str(self.module), words[0], *options, *words[1:]]

    def run(self, *words: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A command, to its end."""
        return subprocess.run(
            self.command(*words), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds
        )

    def spawn(self, *words: str) -> Running:
        """A command in the background."""
        process = subprocess.Popen(
            self.command(*words),
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(Running(process))
        return self.running[-1]

    def bring_up_proxy(self, port: int, *words: str, model: str = "smollm2") -> Running:
        """`proxy` in front of the server at ``port``, with that server known and the first snapshot there."""
        running = self.spawn("proxy", "--port", str(self.port), "--backend", f"{model}=127.0.0.1:{port}", *words)
        running.wait_line("^proxy  http")
        wait_for(lambda: self.get("/health")["models"][model]["ready"] == 1, "the backend in the proxy")
        self.get("/stats")
        return running

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def get(self, path: str) -> Any:
        """A JSON document of the proxy; what the controller has to be asked, once it answers."""
        return once_told(lambda: self._get(path)) if path.startswith(("/stats", "/runs")) else self._get(path)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def chat(self, content: str = "Say hi", **fields: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """A non-streaming chat turn: the answer and its headers (lower case)."""
        body = {"model": "smollm2", "max_tokens": 8, "messages": [{"role": "user", "content": content}], **fields}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer), {name.lower(): value for name, value in answer.headers.items()}

    def processes(self) -> list[tuple[int, str]]:
        """Every process of this program that lives."""
        return processes_with(str(self.state))

    def find(self, role: str) -> int:
        """The pid of the one process that plays ``role`` (serve, relay, llama-cpp, connect, up), its fork left out."""
        playing = [pid for pid, command in self.processes() if re.search(rf"agent_infra(\.py)? {role} ", command)]
        found = [pid for pid in playing if (parent := parent_of(pid)) and parent not in playing]
        assert len(found) == 1, (role, self.processes())
        return found[0]


@contextmanager
def program(folder: Path, **config: Any) -> Iterator[Program]:
    """A Program whose processes are all ended afterwards, whatever the test did."""
    made = Program(folder, **config)
    try:
        yield made
    finally:

        def kill() -> bool:
            found = made.processes()
            for pid, _ in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        wait_for(kill, "the end of all")  # not at once: a controller may start another relay before it is killed
        for each in made.running:
            each.close()

"""Parts of the endurance runs, fuzz.py and soak.py: the proxy with its engines, and agents that check each answer."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_engine  # noqa: E402
from bench_process import BenchmarkError, Child, arguments_of, free_port, process_tree, resident_mb, wait_until  # noqa: E402

from agent_infra_core.host import is_listening  # noqa: E402

MODEL = "m"
ANSWER_S = 60.0  # that an agent waits for a byte of its answer
END_S = 60.0  # for the controller to end
MOST_SHOWN = 40  # problems
PAUSE_S = 0.1  # of an agent after a turn that failed
SESSION_TURNS = 25  # of an agent's session; then it begins another one


class ScriptedEngine:
    """One engine of the tests, a process that says what each request asks it to; owns the process."""

    def __init__(self, folder: Path, cores: set[int]) -> None:
        self.port = free_port()
        self._folder, self._cores = folder, cores
        self._child: Child | None = None
        self.start()

    def start(self) -> None:
        """Start it, or start it again on its port."""
        self.stop()
        log = self._folder / f"engine-{self.port}.log"
        command = [sys.executable, fake_engine.__file__, "--port", str(self.port)]
        self._child = Child(command, self._cores, log)
        wait_until(lambda: is_listening("127.0.0.1", self.port), "the engine's start")

    def behave(self, **behaviour: Any) -> None:
        """Set what it does from now on."""
        ask(self.port, "POST", "/fake", json.dumps(behaviour))

    def requests(self) -> int:
        """How many turns it got since its start."""
        count: int = json.loads(ask(self.port, "GET", "/fake"))["requests"]
        return count

    def signal(self, number: int) -> None:
        """Send a signal to its process."""
        if self._child is not None:
            os.kill(self._child.pid, number)

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()


class RunningProxy:
    """``agent_infra.py proxy``, with its state in a folder; owns its processes."""

    def __init__(self, folder: Path, cores: set[int], backends: Mapping[str, Sequence[int]], descriptors: int) -> None:
        """``backends``: model → ports of its engines. ``descriptors``: how many files each process may open."""
        self.port, self.folder = free_port(), folder
        self.state = folder / "state"
        self._cores = cores
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"]
        self._command = [*limit, sys.executable, str(ROOT / "agent_infra.py"), "proxy", "--port", str(self.port)]
        for model, ports in backends.items():
            self._command += [f"--backend={model}=127.0.0.1:{port}" for port in ports]
        self._child: Child | None = None

    @property
    def history(self) -> Path:
        return self.state / "agent-infra" / f"proxy-{self.port}" / "history.db"

    @property
    def log(self) -> Path:
        return self.folder / "proxy.log"

    @property
    def relay_log(self) -> Path:
        return self.history.parent / "run" / "logs" / "proxy.log"

    def start(self) -> None:
        """Start a controller, which starts a relay or takes over the one that it finds."""
        environment = {"XDG_STATE_HOME": str(self.state), "PYTHONPATH": str(ROOT)}
        self._child = Child(self._command, self._cores, self.log, environment, self.folder)
        wait_until(self.is_ready, f"the proxy's start (see {self.log})", 60)

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError, http.client.HTTPException):
            return bool(json.loads(ask(self.port, "GET", "/health"))["models"][MODEL]["ready"])
        return False

    @property
    def controller(self) -> int:
        return self._child.pid if self._child is not None else 0

    def relay(self) -> int:
        """The relay's pid; 0 while there is none."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            arguments = arguments_of(int(entry))
            if "relay" in arguments and any(word.startswith(str(self.state)) for word in arguments):
                return int(entry)
        return 0

    def kill_relay(self) -> None:
        self._kill(self.relay())

    def kill_controller(self) -> None:
        self._kill(self.controller)
        self.end()

    def end(self) -> None:
        """Wait for the controller's end."""
        child = self._child
        if child is not None:
            wait_until(lambda: not child.is_running, "the controller's end", END_S)

    def ask_to_end(self) -> None:
        os.kill(self.controller, signal.SIGTERM)

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pid:
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End everything, at once where it doesn't end in order."""
        if self._child is not None:
            self._child.stop()
        self.kill_relay()

    def usage(self) -> dict[str, float]:
        """RSS of relay and controller in MB (10^6 bytes), and the relay's open files."""
        relay = self.relay()
        controllers = [pid for pid in process_tree(self.controller) if pid != relay]
        files = 0
        with contextlib.suppress(OSError):
            files = len(os.listdir(f"/proc/{relay}/fd"))
        return {"relay_mb": resident_mb([relay]), "controller_mb": resident_mb(controllers), "files": files}


def ask(port: int, method: str, path: str, body: str | None = None) -> bytes:
    """The body of an answer. Raises OSError or http.client.HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        return connection.getresponse().read()
    finally:
        connection.close()


@dataclass(frozen=True)
class Asked:
    """One turn as its client saw it.

    ``outcome``: ``completed`` · ``wrong`` (whole, but not what was asked for) · ``cut`` (a stream that ended with an
    error event) · ``refused`` (a status of 400 or above) · ``broken`` (the connection ended first).
    """

    session: str
    turn: str | None  # x-request-id; None if no head came
    began: float  # s since the epoch, like the next
    ended: float
    outcome: str
    status: int  # 0: no head came
    said: str  # what the engine was asked to say
    detail: str = ""


class Agent:
    """A well-behaved client: turn after turn, plain and streamed in turns, each with an answer of its own. It keeps its
    connection. Owns a thread."""

    def __init__(self, port: int, name: str, seed: int, over: threading.Event) -> None:
        """``over`` is set to end all agents."""
        self.name, self.log = name, list[Asked]()
        self._port, self._chance, self._over = port, random.Random(seed), over
        self._connection = self._connect()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(2 * ANSWER_S)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.name} still waits for an answer")

    def counts(self) -> Counter[str]:
        return Counter(each.outcome for each in list(self.log))

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)

    def _run(self) -> None:
        while not self._over.is_set():
            asked = self._ask(is_stream=len(self.log) % 2 == 1)
            self.log.append(asked)
            if asked.outcome != "completed":
                time.sleep(PAUSE_S)
        self._connection.close()

    def _ask(self, is_stream: bool) -> Asked:
        session = f"{self.name}.{len(self.log) // SESSION_TURNS}"
        said = f"{session} {len(self.log)} " + "".join(self._chance.choices("abc é😀", k=40))
        timing = {"delay": self._chance.uniform(0.0, 0.2), "gap": 0.01} if is_stream else {"delay": 0.2}
        messages = [{"role": "user", "content": f"say {said}"}]
        document = {"model": MODEL, "stream": is_stream, "messages": messages, "fake": {"say": said, **timing}}
        headers = {"Content-Type": "application/json", "X-Session-ID": session, "X-Client-ID": self.name}
        began, turn, status = time.time(), None, 0
        try:
            self._connection.request("POST", "/v1/chat/completions", json.dumps(document), headers)
            answer = self._connection.getresponse()
            turn, status = answer.headers["x-request-id"], answer.status
            body = answer.read()
            outcome, detail = judge(status, body, said, is_stream)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens another one
            outcome, detail = "broken", repr(error)
        return Asked(session, turn, began, time.time(), outcome, status, said, detail)


def judge(status: int, body: bytes, said: str, is_stream: bool) -> tuple[str, str]:
    """Return the outcome of a whole answer, and what stands in it if that isn't what was asked for."""
    try:
        if status >= 400:
            return "refused", f"{status} {json.loads(body)['error']['message']}"
        if not is_stream:
            text = json.loads(body)["choices"][0]["message"]["content"]
            return ("completed", "") if text == said else ("wrong", text)
        events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
        documents = [json.loads(event) for event in events if event != "[DONE]"]
        if any("error" in each for each in documents):
            return "cut", next(each["error"]["message"] for each in documents if "error" in each)
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in documents)
        is_whole = text == said and events[-1] == "[DONE]"
        return ("completed", "") if is_whole else ("wrong", text)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return "wrong", f"{status} {error!r} {body[:300]!r}"


def totals(agents: Sequence[Agent]) -> Counter[str]:
    """How many turns of all agents had each outcome."""
    return sum((agent.counts() for agent in agents), Counter[str]())


def tracebacks(log: Path) -> list[str]:
    """The first traceback in a log, as a problem; none if there is none."""
    text = log.read_text(errors="replace")
    return [f"a traceback in {log}: {text[text.index('Traceback') :][:2000]}"] if "Traceback" in text else []


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(about: str | None, seconds: float, run: Callable[[float, int, Path], list[str]], all_right: str) -> None:
    """Run the benchmark of the command line: ``run(seconds, seed, folder)`` returns what went wrong."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=20_261_129, help="of all that is random (%(default)s)")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="agent-infra-") as folder:
        try:
            problems = run(options.seconds, options.seed, Path(folder))
        except BenchmarkError as error:
            sys.exit(f"{parser.prog}: {error}")
    shown = problems[:MOST_SHOWN] + ([f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else [])
    print("\n".join(["", *(shown or [all_right])]))
    sys.exit(1 if problems else 0)

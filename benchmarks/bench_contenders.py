"""The proxies that are compared: how each is installed, configured and started, one worker each, all on one core.

The peers get settings that favour them: nginx keeps request bodies in memory and upstream connections open, logs
nothing and may send a POST again; vllm-router runs its cheapest policy (round_robin) and logs warnings only.
Agent Infra is started as its users start it, with everything that it tracks, and so is another version of it, "before":
each from its own path and with its own modules first, whatever is installed.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_engine
from bench_process import (
    BenchmarkError,
    Child,
    arguments_of,
    cpu_seconds,
    free_port,
    process_tree,
    resident_mb,
    wait_until,
    working_folder,
)

PROGRAM = Path(__file__).resolve().parent.parent / "agent_infra.py"
OURS, BEFORE = "agent-infra", "before"
DEFAULT_VENV = Path.home() / ".cache" / "agent-infra" / "benchmarks" / "vllm-router"

NGINX_CONFIGURATION = """
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  upstream replicas {{
    {servers}
    keepalive 2048;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
      proxy_next_upstream error timeout non_idempotent;
    }}
  }}
}}
"""


# The program with nothing noted of a turn: no excerpt, no prints, no figures of an answer, no gaps, no events. What is
# left is what relaying costs; for this benchmark alone. It starts its relay by itself, so that that is like it.
UNTRACKED_PROGRAM = """
import sys
import time

sys.path.insert(0, {folder!r})
from agent_infra_core import host

host.self_command = lambda role: [sys.executable, __file__, role]
import agent_infra
from agent_infra_core.http.events import AnswerDigest, EventStream
from agent_infra_core.protocol import Histogram
from agent_infra_core.relay.bodies import Codec
from agent_infra_core.relay.book import TurnBook
from agent_infra_core.relay.control import ControlChannel

def forget(book, turn):
    if book.turns.pop(turn.id, None) is not None:
        turn.over = time.monotonic()
        turn.ended = turn.ended or turn.over
        book._relay.admission.charge(turn)  # what a session has had is asked by the queue, tracked or not
        book._relay.admission.sessions.finish(turn, None)  # routing learns from it, tracked or not

def relay_only(stream, *arguments, make=EventStream.__init__, **options):
    make(stream, *arguments, **{{**options, "wanted_text": 0, "traces": False}})

Codec.prompt_excerpt = lambda codec, fields, limit: ""
Codec.trace = Codec.trace_response = lambda codec, fields, *options: (b"", None)
TurnBook.finish = forget
Codec.digest = lambda codec, body, wanted_text, traces=False: None
EventStream.__init__ = relay_only
EventStream.digest = lambda stream: AnswerDigest()
ControlChannel.has_news = False
Histogram.add = lambda histogram, *durations_ms: None
sys.exit(agent_infra.main())
"""


@dataclass(frozen=True)
class Place:
    """Where a contender runs: its folder for configuration and logs, its port, its cores, its replicas' ports."""

    folder: Path
    port: int
    cores: set[int]
    replica_ports: Sequence[int]
    venv: Path
    program: Path


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _vllm_router(venv: Path) -> Path:
    return venv / "bin" / "vllm-router"


def is_installed(name: str, venv: Path) -> bool:
    """Whether a contender can be started as things are; our own always can."""
    if name == "nginx":
        return _nginx() is not None
    return name != "vllm-router" or _vllm_router(venv).exists()


def start_nginx(place: Place) -> Child:
    """Debian's nginx-light or nginx with a configuration of our own."""
    binary = _nginx()
    if binary is None:
        raise BenchmarkError("nginx is not installed: apt-get install nginx-light, or leave it out with --contenders")
    configuration = place.folder / "nginx.conf"
    configuration.write_text(
        NGINX_CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",  # its default user could not write into the folder
            folder=place.folder,
            port=place.port,
            servers="\n    ".join(f"server 127.0.0.1:{port};" for port in place.replica_ports),
        )
    )
    log = place.folder / "output.log"
    return Child([binary, "-p", str(place.folder), "-c", str(configuration), "-g", "daemon off;"], place.cores, log)


def start_vllm_router(place: Place) -> Child:
    """The Rust router of the vLLM project, PyPI package ``vllm-router``, from an environment of its own."""
    binary = _vllm_router(place.venv)
    if not binary.exists():
        print(f"installing vllm-router into {place.venv}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(place.venv)], check=True)
        subprocess.run([str(place.venv / "bin" / "pip"), "install", "--quiet", "vllm-router"], check=True)
    command = [str(binary), "--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin"]
    command += ["--log-level", "warning", "--worker-startup-check-interval", "1", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(f"http://127.0.0.1:{port}" for port in place.replica_ports)]
    return Child(command, place.cores, place.folder / "output.log", {"TOKIO_WORKER_THREADS": "1"})


def start_agent_infra(place: Place) -> Child:
    """This program, as ``agent_infra.py proxy``: controller and relay, tracking on."""
    return _start_program(place, place.program)


def start_untracked(place: Place) -> Child:
    """The same without tracking, to see what that costs."""
    program = place.folder / "agent_infra.py"
    program.write_text(UNTRACKED_PROGRAM.format(folder=str(place.program.parent)))
    return _start_program(place, program)


def _start_program(place: Place, program: Path) -> Child:
    command = [sys.executable, str(program), "proxy", "--port", str(place.port)]
    for port in place.replica_ports:
        command += ["--backend", f"{bench_engine.MODEL}=127.0.0.1:{port}"]
    environment = {"XDG_STATE_HOME": str(place.folder / "state"), "PYTHONPATH": str(place.program.parent)}
    return Child(command, place.cores, place.folder / "output.log", environment, place.folder)


STARTERS: dict[str, Callable[[Place], Child]] = {
    "nginx": start_nginx,
    "vllm-router": start_vllm_router,
    OURS: start_agent_infra,
    BEFORE: start_agent_infra,
    "untracked": start_untracked,
}


@dataclass(frozen=True)
class Usage:
    """What a contender has used so far; ``part`` is the relay alone where the contender has one, else the whole."""

    cpu_s: float
    part_cpu_s: float
    rss_mb: float
    part_rss_mb: float


class Contender:
    """One running proxy; owns its process tree."""

    def __init__(self, name: str, place: Place) -> None:
        place.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.port = place.port
        self._program = place.program
        self._child = STARTERS[name](place)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_ready(self) -> None:
        """Return when a turn is answered; BenchmarkError with the end of its log when that does not come."""
        try:
            wait_until(lambda: not self._child.is_running or self._answers(), f"{self.name}: the first answer", 60)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{self._log_end()}") from error
        if not self._child.is_running:
            raise BenchmarkError(f"{self.name} ended by itself\n{self._log_end()}")
        if self.name in (OURS, BEFORE):
            self._check_relay()

    def usage(self) -> Usage:
        tree = process_tree(self.pid)
        part = _relays(tree) or tree
        return Usage(cpu_seconds(tree), cpu_seconds(part), resident_mb(tree), resident_mb(part))

    def stop(self) -> None:
        self._child.stop()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            body = json.dumps({"model": bench_engine.MODEL, "messages": [{"role": "user", "content": "ready?"}]})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _check_relay(self) -> None:
        """Its relay must be the same version's: no other's that happens to be installed or in the working folder."""
        home = self._program.parent
        relays = _relays(process_tree(self.pid))
        if not relays:
            raise BenchmarkError(f"{self.name}: no process of {self._program} is called relay")
        for pid in relays:
            if home not in (working_folder(pid), *(Path(word).parent for word in arguments_of(pid))):
                raise BenchmarkError(f"{self.name}: its relay does not run from {home}: {arguments_of(pid)}")

    def _log_end(self) -> str:
        return "\n".join(self._child.log.read_text(errors="replace").splitlines()[-15:])


def _relays(tree: Sequence[int]) -> list[int]:
    return [pid for pid in tree if "relay" in arguments_of(pid)]

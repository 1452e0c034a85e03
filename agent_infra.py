#!/usr/bin/env python3
"""Agent Infra: GPU serving for multi-turn LLM agents.

``agent_infra.py up`` starts the replicas of a model, balances them behind one OpenAI-compatible streaming proxy and
follows every session and turn."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from agent_infra_core import __version__, client
from agent_infra_core.client import SessionContext, attach
from agent_infra_core.configuration import deployment_of, kept_config, load_config
from agent_infra_core.control.controller import Controller
from agent_infra_core.control.deployment import SCALE_DRAIN_S, ConnectionManager, Deployment, Scaling
from agent_infra_core.control.link import DRAIN_S
from agent_infra_core.control.lock import DeploymentLock, lock_holder
from agent_infra_core.control.status import count_missing, describe_replica
from agent_infra_core.errors import (
    PROGRAM_PACKAGES,
    AgentInfraError,
    ConfigError,
    NotInstalledError,
    RefusedError,
    require_packages,
)
from agent_infra_core.fleet.cluster import LogFolder
from agent_infra_core.fleet.doctor import examine
from agent_infra_core.fleet.engines import check_engine_args
from agent_infra_core.fleet.state import (
    client_key,
    deployment_names,
    deployment_paths,
    read_or_make_key,
    read_relay_record,
)
from agent_infra_core.host import is_listening
from agent_infra_core.insight.export import export_turns, read_history
from agent_infra_core.insight.history import HistoryFile, history_path
from agent_infra_core.insight.report import Report
from agent_infra_core.node.failures import describe_exit
from agent_infra_core.node.roles import ROLES as NODE_ROLES
from agent_infra_core.node.roles import add_roles
from agent_infra_core.protocol import ReplicaRecord, record_from_json
from agent_infra_core.relay.app import run_relay
from agent_infra_core.relay.server import calm_collector
from agent_infra_core.settings import (
    DEFAULT_CONFIG,
    NAME_PATTERN,
    STRATEGY_NAMES,
    ClusterConfig,
    Config,
    ModelConfig,
    ProxyConfig,
    proxy_url,
)
from agent_infra_core.ssh.forward import run_tunnel

if TYPE_CHECKING:
    import argparse

__all__ = ["AgentInfraError", "Config", "ConnectionManager", "SessionContext", "attach", "load_config"]

# `from agent_infra.client import SessionContext` works the way `os` makes `os.path` importable.
sys.modules[f"{__name__}.client"] = client


class ReplicaBoard:
    """Shows replicas as they come up: one live line each on a terminal, else one line per change."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._trails: dict[str, dict[str, str]] = {}  # replica → state → what it was last shown as in that state
        self._live: Any = None

    def __enter__(self) -> ReplicaBoard:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=8)
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*details)

    def show(self, records: Sequence[ReplicaRecord]) -> None:
        """Bring the board up to date."""
        lines = {record.replica: describe_replica(record) for record in records}
        if self._live is not None:
            from rich.text import Text

            trails = [f"{record.replica:<24} {self._trail(record, lines[record.replica])}" for record in records]
            self._live.update(Text("\n".join(trails)))
        else:
            for name, line in lines.items():
                if self._shown.get(name) != line:
                    print(f"{name}  {line}", flush=True)
        self._shown = lines

    def _trail(self, record: ReplicaRecord, line: str) -> str:
        """``PENDING (Resources, est. 14:32) → RUNNING gpu07 → LOADING 5/9 → READY 10.0.0.7:5901``."""
        trail = self._trails.setdefault(record.replica, {})
        if record.state == "pending":
            trail.clear()  # it was requeued
        trail.pop(record.state, None)
        trail[record.state] = line
        return " → ".join(trail.values())


class OperatorSignals:
    """SIGINT, SIGTERM and SIGHUP as a flag to wait for; a second one ends turns in flight at once."""

    def __init__(self) -> None:
        self.count = 0
        self.on_second: Callable[[], None] = lambda: None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, _number: int, _frame: object) -> None:
        self.count += 1
        if self.count > 1:
            self.on_second()

    def came(self) -> bool:
        return self.count > 0


def _say(line: str) -> None:
    print(line, flush=True)


def _deployment(arguments: argparse.Namespace) -> Deployment:
    """The deployment that a command line means."""
    config = load_config(arguments.config)
    if getattr(arguments, "port", None) is not None:
        config = dataclasses.replace(config, proxy=dataclasses.replace(config.proxy, port=arguments.port))
    return _opened(config)


def _opened(config: Config) -> Deployment:
    """A deployment whose connection to the cluster's host is closed when this process ends, however its command did."""
    deployment = Deployment(config, _say, os.environ, _asker())
    if deployment.login is not None:
        atexit.register(deployment.login.close)
    return deployment


def _asker() -> Callable[[str], str] | None:
    """Asks the operator for a secret; None where nobody sits at a terminal."""
    import getpass

    return getpass.getpass if sys.stdin.isatty() else None


def _run_start(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    models = deployment.select_models(arguments.model, arguments.replicas)
    if arguments.dry_run:
        for model in models:
            check_engine_args(model)
            for text in deployment.cluster.plan(model, count_missing(model, deployment.serving(), _say)):
                _say(text)
        return 0
    signals = OperatorSignals()
    started = deployment.start(models)
    if arguments.detach:
        _say(f"started {', '.join(record.replica for record in started) or 'nothing'}; `status` shows how they do")
        return 0
    with ReplicaBoard() as board:
        deployment.wait_ready(board.show, signals.came)
    if signals.came():
        _say("left the replicas loading; `status` shows them, `stop` ends them")
        return 130
    _say("next: agent_infra.py connect")
    return 0


def _greet(controller: Controller, deployment: Deployment) -> None:
    """What the operator needs in order to point an agent at the proxy."""
    _say(f"proxy  {controller.url}  ({deployment.config.proxy.strategy})")
    _say(f"stats  {controller.url}/stats")
    for line in controller.tunnels.describe() if controller.tunnels is not None else ():
        _say(line)
    _say(f"export OPENAI_BASE_URL={controller.url}/v1")
    if deployment.config.proxy.api_key is None:
        _say(f'export OPENAI_API_KEY="$(cat {shlex.quote(str(deployment.paths.client_key))})"')
    else:
        _say("export OPENAI_API_KEY=...  # proxy.api_key of the configuration")


def _attend(controller: Controller, signals: OperatorSignals) -> None:
    """Wait until a signal comes, or the controller fails (then AgentInfraError)."""
    calm_collector()
    while not signals.came():
        if not controller.is_running:
            raise AgentInfraError(f"the controller failed: {controller.failure!r}; the proxy's log says more")
        time.sleep(0.2)


def run_detached(work: Callable[[Callable[[Path], None]], int]) -> int:
    """Run ``work`` in a child process that keeps this terminal until it calls what it is given, with the path of a log.

    Until then prompts, messages and errors appear here; from then on it lives on without the terminal, and the log
    takes what it says.  Returns 0 at that moment, the child's exit code when it ends before.  Call it before any
    thread is started.
    """
    ready, child_end = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(ready)
        return work(functools.partial(_leave_terminal, child_end))
    os.close(child_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child too; it decides
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    with open(ready, "rb") as pipe:
        if pipe.read(1):
            return 0
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        raise AgentInfraError(f"it was {describe_exit(code)} before it served; the proxy's log may say more")
    return code


def _leave_terminal(report: int, log: Path) -> None:
    """Detach this process for good and say so through the pipe ``report``."""
    os.setsid()
    sys.stdout.flush()
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(output)
    with contextlib.suppress(BrokenPipeError):  # whoever waited is gone; the proxy serves
        os.write(report, b"1")
    os.close(report)


def _run_connect(arguments: argparse.Namespace) -> int:
    if arguments.background:
        return run_detached(functools.partial(_connect, arguments))
    return _connect(arguments)


def _connect(arguments: argparse.Namespace, detach: Callable[[Path], None] | None = None) -> int:
    """Run controller and proxy until a signal comes; ``detach`` leaves the terminal once they serve."""
    deployment = _deployment(arguments)
    signals = OperatorSignals()
    deployment.claim("connect")
    try:
        controller = deployment.connect(arguments.log_format)
        signals.on_second = controller.relay.terminate
        controller.refresh()
        _greet(controller, deployment)
        for reason in deployment.status()["degraded"]:
            _say(f"degraded: {reason}")
        if detach is not None:
            log = deployment.paths.log("proxy")
            _say(f"runs in the background: `stop` ends it and the replicas, `kill {os.getpid()}` it alone; log: {log}")
            detach(log)
        _attend(controller, signals)
        _say("finishing the turns in flight (again to end at once); the replicas stay, `stop` ends them")
    finally:
        deployment.disconnect(DRAIN_S)
    return 0


PAGE_PORT = 8501  # the first one tried
PAGE_STOP_S = 5.0


def page_script() -> Path:
    """The page's program; RefusedError when it or what it runs on is not there."""
    import importlib.util

    script = Path(__file__).resolve().with_name("streamlit_dashboard.py")
    if not script.exists():
        raise RefusedError(f"the page is not there: put streamlit_dashboard.py beside {__file__}")
    missing = [name for name in ("streamlit", "altair", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(f"the page needs {', '.join(missing)}: pip install 'streamlit>=1.65,<2' 'altair>=6,<7'")
    return script


def page_port(wanted: int | None) -> int:
    """``wanted``, or the first free port from PAGE_PORT on; RefusedError when it is taken."""
    if wanted == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    tried = range(PAGE_PORT, PAGE_PORT + 100) if wanted is None else (wanted,)
    for port in tried:
        if not is_listening("127.0.0.1", port):
            return port
    raise RefusedError(f"port {tried[0]} is taken; name another one for the page with --port")


def page_environment(deployment: Deployment, token: str | None) -> dict[str, str]:
    """What the page is told that must not stand on a command line: its own key, and the proxy's."""
    told = {"AGENT_INFRA_PAGE_KEY": read_or_make_key(deployment.paths.page_key)}
    return told if token is None else {**told, "AGENT_INFRA_TOKEN": token}


def _import_ahead() -> None:
    """Load what the page's program loads, so that its first viewer, for whom Streamlit starts it, need not wait."""
    import importlib

    for name in ("requests", "pandas", "altair"):
        with contextlib.suppress(ImportError):  # whoever needs it says so
            importlib.import_module(name)


def serve_page(script: Path, port: int, proxy: str, token_file: str | None) -> int:
    """Streamlit with the page in this process, until a signal ends it."""
    from streamlit.web import cli

    _import_ahead()
    options = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "logger.hideWelcomeMessage": "true",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    told = ["--proxy", proxy] + (["--token-file", os.path.abspath(token_file)] if token_file else [])
    bases = [base for base in (script.parent, script.parent / "agent_infra_data") if (base / ".streamlit").is_dir()]
    if bases:
        os.chdir(bases[0])  # where Streamlit looks for its settings, the page's colours among them
    cli.main(["run", str(script), *flags, "--", *told], prog_name="streamlit", standalone_mode=False)
    return 0


class PageProcess:
    """The page beside a proxy, a child that ends with this process, however that ends; owns child and lifeline."""

    def __init__(self, deployment: Deployment, proxy: str) -> None:
        port, key = page_port(None), client_key(deployment.config, deployment.paths)
        told = page_environment(deployment, key)
        self.url = f"http://127.0.0.1:{port}/?key={told['AGENT_INFRA_PAGE_KEY']}"
        command = [sys.executable, os.path.abspath(__file__), "page", "--proxy", proxy, "--port", str(port)]
        log = os.open(deployment.paths.log("page"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **told},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=PAGE_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=PAGE_STOP_S)
        if self._process.stdin is not None:
            self._process.stdin.close()


def _end_with_input() -> None:
    """Wait until the standard input ends, which is when the parent does; then end this process."""
    with contextlib.suppress(OSError):  # nor can be read any more
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _run_page(arguments: argparse.Namespace) -> int:
    """The role behind `up --dashboard`."""
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()
    return serve_page(page_script(), arguments.port, arguments.proxy, None)


def _expected_proxy(deployment: Deployment) -> str:
    """The address of the deployment's proxy, or where it will be; RefusedError where nobody knows."""
    relay, settings = read_relay_record(deployment.paths), deployment.config.proxy
    if relay is not None:
        return proxy_url(relay["host"], relay["port"])
    if settings.port == 0:
        raise RefusedError("no proxy runs, and with proxy.port 0 nobody knows where it will; `connect` starts one")
    _say("no proxy runs; `connect` starts one, and the page will find it")
    return proxy_url(settings.host, settings.port)


def _run_dashboard(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    script, port = page_script(), page_port(arguments.page_port)
    proxy, token = arguments.proxy, None
    if proxy is not None and not re.match(r"https?://[^/@?#]+", proxy):
        raise RefusedError(f"--proxy {proxy}: a URL such as http://127.0.0.1:5800 is needed")
    if proxy is None:
        proxy = _expected_proxy(deployment)
        token = client_key(deployment.config, deployment.paths)
    told = page_environment(deployment, token)
    os.environ.update(told)
    _say(f"page   http://127.0.0.1:{port}/?key={told['AGENT_INFRA_PAGE_KEY']}")
    _say(f"of     {proxy}; Ctrl-C ends the page, nothing else")
    return serve_page(script, port, proxy, arguments.token_file)


def _run_up(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    models = deployment.select_models(arguments.model, arguments.replicas)
    page: PageProcess | None = None
    if arguments.dashboard:
        page_script()
    signals = OperatorSignals()
    deployment.claim("up")
    try:
        controller = deployment.connect(arguments.log_format, models)
        signals.on_second = controller.relay.terminate
        deployment.start(models)
    except BaseException:
        # What ran before runs on, but no relay without its controller. A scheduler that is silent is no refusal.
        deployment.disconnect(0.0)
        raise
    try:
        controller.refresh()
        controller.expected = frozenset()
        with ReplicaBoard() as board:
            deployment.wait_ready(board.show, signals.came)
        if not signals.came():
            controller.refresh()
            _greet(controller, deployment)
            if arguments.dashboard:
                page = PageProcess(deployment, controller.url)
                _say(f"page   {page.url}")
            _say("Ctrl-C stops it all")
            _attend(controller, signals)
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone; what runs must end all the same
            _say("stopping")
        if page is not None:
            page.close()
        ended = deployment.stop(now=signals.count != 1)
        with contextlib.suppress(OSError):
            _say(f"stopped {', '.join(ended)}" if ended else "nothing ran")
    return 0


def _run_proxy(arguments: argparse.Namespace) -> int:
    records = [parse_backend(text, number) for number, text in enumerate(arguments.backend, start=1)]
    names = dict.fromkeys(record.model for record in records)
    config = Config(
        models=tuple(ModelConfig(name=name, model_path=name, engine="command") for name in names),
        proxy=ProxyConfig(
            host=arguments.host,
            port=arguments.port,
            strategy=arguments.strategy,
            capture_text=arguments.capture_text,
            history=arguments.history,
        ),
        cluster=ClusterConfig(name=f"proxy-{arguments.port}"),
    )
    paths = deployment_paths(config.cluster.name, os.environ)
    lock, signals = DeploymentLock(paths), OperatorSignals()
    lock.acquire("proxy")
    keys = (client_key(config, paths), os.environ.get("AGENT_INFRA_BACKEND_KEY"))
    controller = Controller(config, paths, lambda: records, keys=keys, log_format=arguments.log_format)
    try:
        controller.start()
        signals.on_second = controller.relay.terminate
        _say(f"proxy  {controller.url}  ({arguments.strategy})  backends: {', '.join(arguments.backend)}")
        _say(f'export OPENAI_API_KEY="$(cat {shlex.quote(str(paths.client_key))})"')
        _attend(controller, signals)
    finally:
        controller.stop()
        lock.release()
    return 0


def parse_backend(text: str, number: int) -> ReplicaRecord:
    """``MODEL=HOST:PORT`` as a replica that is ready; RefusedError when it is not of that form."""
    match = re.fullmatch(rf"({NAME_PATTERN})=(\[[^\]]+\]|[^:]+):(\d{{1,5}})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise RefusedError(f"--backend {text}: MODEL=HOST:PORT is needed, such as my_model=127.0.0.1:8000")
    try:
        address = socket.getaddrinfo(match[2].strip("[]"), int(match[3]), type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise RefusedError(f"--backend {text}: {match[2]} is not known here: {error.strerror}") from error
    return ReplicaRecord(
        replica=f"{match[1]}-{number}",
        model=match[1],
        state="ready",
        engine="command",
        node=match[2],
        pid=0,
        process="",
        host=str(address[0]),
        port=int(match[3]),
    )


def _run_scale(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    signals = OperatorSignals()
    if deployment.proxy() is None:
        _say("no proxy runs: a replica that is taken away ends the turns that it may have; `connect` picks up new ones")
    elif lock_holder(deployment.paths.lock) is None:
        _say("the proxy runs without its controller: it gets no new replicas until `connect` takes it over")
    scaling = Scaling(deployment)
    started, surplus = scaling.scale(arguments.name, arguments.count)
    ended = scaling.retire(surplus, 0.0 if arguments.now else SCALE_DRAIN_S, signals.came)
    if started and not arguments.detach:
        with ReplicaBoard() as board:
            deployment.wait_ready(board.show, signals.came, [record.replica for record in started])
    for verb, names in (("started", [record.replica for record in started]), ("ended", ended)):
        if names:
            _say(f"{verb} {', '.join(names)}")
    if signals.came():
        _say(f"interrupted: what drains goes on draining, what loads goes on loading; `{shlex.join(sys.argv)}` resumes")
        return 130
    _say(f"{arguments.name}: {arguments.count} replicas wanted")
    return 0


def _run_status(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    while True:
        status = deployment.status()
        if arguments.json:
            _say(json.dumps(status, indent=None if arguments.watch else 2))
        else:
            _show_status(status, clear=arguments.watch and sys.stdout.isatty())
        if not arguments.watch:
            return 3 if status["degraded"] else 0
        time.sleep(1.0)


def describe_model(row: Mapping[str, Any]) -> str:
    """A model's row of the status in words."""
    words = [f"{row['ready']} of {row['wanted']} ready"]
    words += [f"{row['idle']} ended for want of turns"] if row["idle"] else []
    if row["sessions"] is not None:
        told = ((row["in_flight"], "turn"), (row["sessions"], "session"))
        turns, sessions = (f"{number} {word}" + "s" * (number != 1) for number, word in told)
        words += [f"{turns} in flight, {sessions}"]
    return f"{row['name']}  {', '.join(words)}"


def describe_succession(replica: str, row: Mapping[str, Any]) -> str:
    """What becomes of a replica whose walltime nears its end, in words."""
    if not row["successor"]:
        return f"the successor of {replica} {row['note']}; there will be a gap"
    gap = ": there will be a gap while it loads" if row["is_after"] else ""
    return f"{row['successor']} {row['note'] or 'takes over'} from {replica}{gap}"


def describe_accounting(accounting: Mapping[str, Any] | None) -> str | None:
    """GPU-hours in words; None where no GPU was held."""
    hours: Mapping[str, float] = (accounting or {}).get("gpu_hours", {})
    total = sum(hours.values())
    if accounting is None or total <= 0:
        return None
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(accounting["since"]))
    parts = ", ".join(f"{value:.2f} {state.replace('_', ' ')}" for state, value in hours.items())
    return f"GPU-hours  {total:.2f} since {since}: {parts}"


def _show_status(status: Mapping[str, Any], clear: bool) -> None:
    """The status for people: a table of the replicas, the proxy, and what is not as it should be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if clear:
        console.clear()
    if status["replicas"]:
        table = Table("replica", "model", "node", "state", "process", box=None, header_style="bold", pad_edge=False)
        for row in status["replicas"]:
            record = record_from_json(json.dumps(row))
            colour = {"ready": "green", "failed": "red"}.get(record.state, "yellow")
            state = Text(describe_replica(record), style=colour)
            process = f"job {record.job_id} in {record.partition}" if record.job_id else str(record.pid)
            table.add_row(record.replica, record.model, record.node, state, process)
        console.print(table)
    for replica, each in status["handover"].items():
        console.print(Text(f"handover  {describe_succession(replica, each)}"))
    for model in status["models"]:
        console.print(Text(describe_model(model)))
    hours, proxy = describe_accounting(status["accounting"]), status["proxy"]
    if hours is not None:
        console.print(Text(hours))
    if proxy is not None:
        console.print(Text(f"proxy  {proxy_url(proxy['host'], proxy['port'])}  (pid {proxy['pid']})"))
    for reason in status["degraded"]:
        console.print(Text(f"degraded: {reason}", style="yellow"))


def _run_logs(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    known = deployment.cluster.logs.names()
    if deployment.paths.log("proxy").exists() and "proxy" not in known:
        known.append("proxy")
    names = [arguments.name] if arguments.name else known
    missing = [name for name in names if name not in known]
    if not known:
        raise RefusedError("there is no log: nothing was started yet; `start` or `up` does")
    if missing:
        raise RefusedError(f"no log of {missing[0]}; there are: {', '.join(known)}")

    def read(name: str, start: int, limit: int) -> tuple[bytes, int]:
        here = LogFolder(deployment.paths.run / "logs")  # the proxy's, wherever the replicas are
        return (here if name == "proxy" else deployment.cluster.logs).read(name, start, limit)

    follow_logs(names, read, arguments.lines, arguments.follow, _say)
    return 0


def follow_logs(
    names: Sequence[str],
    read: Callable[[str, int, int], tuple[bytes, int]],
    lines: int,
    follow: bool,
    say: Callable[[str], None],
) -> None:
    """The last ``lines`` of each log, named where there are several, then (``follow``) whatever is added, for ever."""
    prefix = {name: f"{name}: " if len(names) > 1 else "" for name in names}
    offsets: dict[str, int] = {}
    while True:
        for name in names:
            first = name not in offsets
            content, end = read(name, offsets.get(name, -(1 << 20)), 1 << 20)
            *complete, rest = content.split(b"\n")
            offsets[name] = end - (len(rest) if follow else 0)
            shown = complete + ([rest] if rest and not follow else [])
            for line in shown[-lines:] if first and lines else shown if not first else []:
                say(prefix[name] + line.decode(errors="replace"))
        if not follow:
            return
        time.sleep(0.2)


def _run_pull(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    for model in deployment.select_models(arguments.model):
        _say(f"{model.name}: {model.model_path} is in {deployment.cluster.pull(model)}")
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    findings = []
    for finding in examine(_deployment(arguments), arguments.job):
        findings.append(finding)
        if not arguments.json:
            fix = f"; {finding.fix}" if finding.fix else ""
            _say(f"{finding.level:<8} {finding.check}: {finding.text}{fix}")
    counts = collections.Counter(finding.level for finding in findings)
    if arguments.json:
        _say(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _say(f"{counts['ok']} ok, {counts['warning']} to look at, {counts['error']} to mend")
    return 1 if counts["error"] else 0


def _config_to_stop(path: str | None) -> Config:
    """The configuration at ``path``; where that has errors, what the deployment was started with."""
    try:
        return load_config(path)
    except ConfigError as error:
        names, name = deployment_names(os.environ), deployment_of(path)
        kept = kept_config(deployment_paths(name, os.environ)) if name in names else None
        if kept is None:
            known = ", ".join(names) or "none"
            raise ConfigError(
                f"{error}\n`stop --name DEPLOYMENT` needs no configuration; deployments: {known}"
            ) from None
        return kept


def _deployment_to_stop(arguments: argparse.Namespace) -> Deployment:
    """The deployment that `stop` means, as it was started: its configuration may have been changed or broken since."""
    if arguments.name is None:
        config = _config_to_stop(arguments.config)
    elif arguments.name in deployment_names(os.environ):
        config = dataclasses.replace(DEFAULT_CONFIG, cluster=ClusterConfig(name=arguments.name))
    else:
        known = ", ".join(deployment_names(os.environ)) or "none"
        raise RefusedError(f"no deployment is called {arguments.name}; there are: {known}")
    kept = kept_config(deployment_paths(config.cluster.name, os.environ))
    return _opened(kept or config)


def _run_export(arguments: argparse.Namespace) -> int:
    with _history_of(arguments) as file, _output(arguments.output) as out:
        export_turns(file.turns(arguments.session, arguments.since) if file else (), arguments.format, out)
    return 0


def _run_report(arguments: argparse.Namespace) -> int:
    with _history_of(arguments) as file, _output(arguments.output) as out:
        title = arguments.history or f"Deployment {load_config(arguments.config).cluster.name}"
        out.write(Report(file, title, arguments.since).text() if file else f"# {title}\n\nNo turns yet.\n")
    return 0


def _history_of(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[HistoryFile | None]:
    """The history that a command line means; RefusedError when none is kept, or the file that it names is not there."""
    if arguments.history is not None:
        if not os.path.exists(arguments.history):
            raise RefusedError(f"--history {arguments.history}: there is no such file")
        return read_history(Path(arguments.history))
    config = load_config(arguments.config)
    path = history_path(config.proxy.history, deployment_paths(config.cluster.name, os.environ).history)
    if path is None:
        raise RefusedError('proxy.history is "off": no turn is kept; name an older file with --history')
    return read_history(path)


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    """Where a command writes: a file of this user alone, since prompts are in it, or standard output."""
    if path is not None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            yield file
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as the file: what is kept is not changed for a terminal's sake
        yield sys.stdout
        sys.stdout.flush()  # here, where a reader that has gone is no error


def _run_stop(arguments: argparse.Namespace) -> int:
    deployment = _deployment_to_stop(arguments)
    ended = deployment.stop(arguments.now)
    _say(f"stopped {', '.join(ended)}" if ended else f"nothing of the deployment {deployment.config.cluster.name} ran")
    return 0


def _run_relay(arguments: argparse.Namespace) -> int:
    return run_relay(arguments.socket, arguments.listener_fd)


def _run_tunnel(_: argparse.Namespace) -> int:
    return run_tunnel()


def build_parser() -> argparse.ArgumentParser:
    """The command line. Options stand after the verb."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="agent_infra.py", description="GPU serving for multi-turn LLM agents: start, connect, stop."
    )
    parser.add_argument("--version", action="version", version=f"agent-infra {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, *shared: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        for option in shared:
            _SHARED_OPTIONS[option](added)
        return added

    _add_running_verbs(verb)
    _add_looking_verbs(verb)
    added = verb("proxy", _run_proxy, "run the proxy alone, in front of servers that run already", "log")
    _add_proxy_options(added)
    return parser


def _add_running_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The verbs that start and end something."""
    added = verb("up", _run_up, "start replicas and proxy; Ctrl-C stops it all", "config", "model", "port", "log")
    added.add_argument("--dashboard", action="store_true", help="serve the page too")
    added = verb("start", _run_start, "start the replicas that are missing", "config", "model")
    added.add_argument("--detach", action="store_true", help="do not wait until they are ready")
    added.add_argument("--dry-run", action="store_true", help="print what would be started, start nothing")
    added = verb("connect", _run_connect, "run the proxy in front of the replicas", "config", "port", "log")
    added.add_argument("--background", action="store_true", help="go on without this terminal once the proxy serves")
    added = verb("scale", _run_scale, "change how many replicas of a model run", "config")
    added.add_argument("name", metavar="MODEL", help="the model's name")
    added.add_argument("count", metavar="N", type=_count, help="how many replicas shall run")
    added.add_argument("--detach", action="store_true", help="do not wait until new ones are ready")
    added.add_argument("--now", action="store_true", help="do not let the turns of those that go finish")
    added = verb("stop", _run_stop, "end the proxy and the replicas of the deployment", "config")
    added.add_argument("--name", metavar="DEPLOYMENT", help="this one, whatever the configuration says")
    added.add_argument("--now", action="store_true", help="do not let the turns in flight finish")


def _add_looking_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The verbs that leave alone what runs."""
    added = verb("pull", _run_pull, "fetch the models to where the replicas read them", "config")
    added.add_argument("--model", metavar="NAME", help="only this model of the configuration")
    added = verb("doctor", _run_doctor, "check what can be checked before anything is started", "config")
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument("--job", action="store_true", help="look at a node too, by a small Slurm job for each model")
    added = verb("status", _run_status, "show replicas and proxy; exit code 3 when something is missing", "config")
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    added = verb("logs", _run_logs, "print the logs of a replica or of the proxy", "config")
    added.add_argument("name", nargs="?", metavar="REPLICA|proxy", help="whose log (default: all)")
    added.add_argument("-f", "--follow", action="store_true", help="go on as lines are added")
    added.add_argument("-n", "--lines", type=_count, default=100, help="how many of the last lines (default 100)")
    added = verb("dashboard", _run_dashboard, "serve the page that shows what the proxy does", "config")
    added.add_argument("--proxy", metavar="URL", help="another proxy than the deployment's")
    added.add_argument("--port", dest="page_port", type=_port, metavar="P", help=f"default: from {PAGE_PORT} on")
    added.add_argument("--token-file", metavar="FILE", help="holds the key of that proxy; or AGENT_INFRA_TOKEN does")
    _add_history_verbs(verb)


def _add_proxy_options(parser: argparse.ArgumentParser) -> None:
    defaults = ProxyConfig()
    parser.add_argument(
        "--backend", action="append", required=True, metavar="MODEL=HOST:PORT", help="a server; once for each"
    )
    parser.add_argument("--host", default=defaults.host, help=f"address to listen on (default {defaults.host})")
    parser.add_argument("--port", type=_port, default=defaults.port, help=f"default {defaults.port}; 0 = any free one")
    parser.add_argument("--strategy", choices=STRATEGY_NAMES, default=defaults.strategy, help="how turns are spread")
    parser.add_argument(
        "--capture-text", type=_count, default=defaults.capture_text, help="characters of prompt and answer kept a turn"
    )
    parser.add_argument("--history", metavar="FILE", help='where turns are kept; "off": nowhere')


ROLES = (*NODE_ROLES, "page", "relay", "tunnel")


def build_role_parser() -> argparse.ArgumentParser:
    """The command lines that the program uses on itself, a parser of their own: people are told of none of them."""
    import argparse

    parser = argparse.ArgumentParser(prog="agent_infra.py")
    verbs = parser.add_subparsers(required=True)
    add_roles(verbs)
    page_parser = verbs.add_parser("page")
    page_parser.add_argument("--proxy", required=True)
    page_parser.add_argument("--port", type=_port, required=True)
    page_parser.set_defaults(run=_run_page)
    relay_parser = verbs.add_parser("relay")
    relay_parser.add_argument("--socket", required=True)
    relay_parser.add_argument("--listener-fd", type=int, required=True)
    relay_parser.set_defaults(run=_run_relay)
    verbs.add_parser("tunnel").set_defaults(run=_run_tunnel)
    return parser


def parse_command_line(words: Sequence[str]) -> argparse.Namespace:
    """What a command line says; SystemExit, with a usage message, where it says nothing that there is."""
    first = words[0] if words else ""
    if first in ROLES:
        return build_role_parser().parse_args(words)
    parser = build_parser()
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        parser.error(f"{first}: options stand after the verb, such as `agent_infra.py status --config FILE`")
    return parser.parse_args(words)


def _count(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def moment(text: str, now: float) -> float:
    """Seconds since the epoch of ``2h`` (ago; s, m, h, d, w), or of a date or time of this place; else ValueError."""
    import datetime

    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if ago is not None:
        return now - float(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[ago[2]]
    return datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", text)).timestamp()


def _moment(text: str) -> float:
    """argparse type: see moment."""
    try:
        return moment(text, time.time())
    except ValueError:
        import argparse

        words = f"{text!r} is no time: write 30m, 2h, 3d (ago), or 2026-11-22 or 2026-11-22T16:30"
        raise argparse.ArgumentTypeError(words) from None


def _port(text: str) -> int:
    """argparse type: a TCP port, or 0 for any free one."""
    if _count(text) > 65535:
        import argparse

        raise argparse.ArgumentTypeError(f"{text} is not a port (0 to 65535)")
    return int(text)


def _add_history_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    added = verb("export", _run_export, "print every finished turn, a line each", "config", "history")
    added.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default csv")
    added.add_argument("--session", metavar="ID", help="only this session's")
    verb("report", _run_report, "sum a run up, in Markdown", "config", "history")


def _add_history_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", type=_moment, default=0.0, metavar="TIME", help="such as 2h (ago) or 2026-11-22T16:30"
    )
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.add_argument("--history", metavar="FILE", help="instead of the deployment's own")


def _add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="default: ./config.yaml, else the embedded default")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="only this model of the configuration")
    parser.add_argument("--replicas", type=_at_least_one, metavar="N", help="instead of the configuration's")


def _at_least_one(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if _count(text) < 1:
        import argparse

        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _add_port_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, metavar="P", help="instead of proxy.port; 0 = any free one")


def _add_log_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="of the proxy's log")


_SHARED_OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "config": _add_config_option,
    "model": _add_model_options,
    "port": _add_port_option,
    "log": _add_log_option,
    "history": _add_history_options,
}


def _explain_missing(error: ModuleNotFoundError) -> NotInstalledError:
    """What to do about a package that is not there, and all others that are not; raises ``error`` where it is none."""
    name = (error.name or "").partition(".")[0]
    if not name or name in sys.stdlib_module_names:
        raise error
    try:
        require_packages(PROGRAM_PACKAGES if name in PROGRAM_PACKAGES else (name,))
    except NotInstalledError as explained:
        return explained
    raise error  # it is there, and a part of it is not


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 ok, 1 failed, 2 refused, 3 degraded, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: one that cannot show a × is no failure
    arguments = parse_command_line(sys.argv[1:] if argv is None else argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except AgentInfraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {_explain_missing(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fix = "; free some space there" if error.errno == errno.ENOSPC else ""
        print(f"error: {where}{error.strerror or error}{fix}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

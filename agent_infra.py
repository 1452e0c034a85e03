#!/usr/bin/env python3
"""Agent Infra: GPU serving for multi-turn LLM agents.

``agent_infra.py up`` starts the replicas of a model, balances requests across them behind one OpenAI-compatible
streaming proxy and tracks every session and turn.  This file holds the parts that a user sees; agent_infra_core/ holds
the rest.  Functions import what only they need, so each role loads as little as possible.
"""

from __future__ import annotations

import argparse
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
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import unquote_to_bytes

if __name__ == "__main__" and os.path.dirname(os.path.realpath(__file__)) not in sys.path:
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I and -P don't add it
_IS_PROGRAM = __name__ == "__main__" or os.path.basename(sys.argv[0]) == "agent-infra"
if _IS_PROGRAM and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): Ctrl-C during the imports prints no traceback
try:
    from agent_infra_core import __version__, client
    from agent_infra_core.client import ClientError as ClientError
    from agent_infra_core.client import SessionContext, attach
    from agent_infra_core.control.foreground import OperatorSignals, run_detached
    from agent_infra_core.errors import (
        PROGRAM_PACKAGES,
        AgentInfraError,
        ConfigError,
        NotInstalledError,
        RefusedError,
        require_packages,
    )
    from agent_infra_core.fleet.state import (
        DeploymentPaths,
        client_key,
        config_text,
        default_history,
        deployment_names,
        deployment_paths,
        read_or_make_key,
        read_relay_record,
    )
    from agent_infra_core.host import (
        HostUnreachableError,
        LocalCommands,
        absolute_path,
        allow_many_descriptors,
        command_name,
        create_atomically,
        freeze_imported_objects,
        is_listening,
        printable_text,
        release_free_memory,
        resource,
        restore_on_error,
        self_command,
        write_atomically,
    )
    from agent_infra_core.protocol import MAX_RUN_TASKS, STATS_PREFIX, ReplicaRecord, rebuild
    from agent_infra_core.settings import (
        DEFAULT_CONFIG,
        NAME_PATTERN,
        RESERVED_DIRECTIVES,
        SCALAR_KINDS,
        STRATEGY_NAMES,
        ClusterConfig,
        Config,
        ModelConfig,
        OtelConfig,
        ProxyConfig,
        Rule,
        SlurmConfig,
        connect_address,
        proxy_url,
        proxy_view,
        shorten,
    )
except ImportError as error:
    if __name__ != "__main__" or not (error.name or "").startswith("agent_infra_core"):
        raise
    raise SystemExit(
        f"error: {__file__} is missing its folder agent_infra_core/, or that is another version's ({error}); copy "
        "both, or run `python agent_infra.py bundle` there and copy the one file that it writes, agent_infra.pyz"
    ) from error

if TYPE_CHECKING:
    from agent_infra_core.control.controller import Controller
    from agent_infra_core.control.handover import Handover
    from agent_infra_core.control.proxy_job import ProxyJob, ServedProxy
    from agent_infra_core.control.proxy_link import ProxyLink
    from agent_infra_core.control.scaling import Autoscaler
    from agent_infra_core.control.status import ProxyClient
    from agent_infra_core.fleet.cluster import Cluster, Logs
    from agent_infra_core.fleet.place import JobRequest
    from agent_infra_core.host import CommandRunner
    from agent_infra_core.http.heads import RequestHead
    from agent_infra_core.insight.history import HistoryFile
    from agent_infra_core.insight.spans import Span
    from agent_infra_core.relay.server import Relay
    from agent_infra_core.ssh.forwards import ForwardServer
    from agent_infra_core.ssh.login_host import LoginHost

__all__ = ["AgentInfraError", "Config", "ConnectionManager", "SessionContext", "attach", "load_config"]

# Makes `from agent_infra.client import SessionContext` work, as `os` does for `os.path`.
sys.modules[f"{__name__}.client"] = client


# =====================================================================================================================
# Configuration: YAML → marshmallow → the frozen dataclasses of settings.py.
# =====================================================================================================================


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read and validate a YAML configuration.

    ``path`` defaults to ``./config.yaml`` if it exists, else to the embedded default (the packaged model on this
    machine).  ``${NAME}`` in a string is replaced by that environment variable, except in shell lines (``setup`` and
    ``prologue``); ``$${NAME}`` stands for ``${NAME}``.

    Raises ConfigError when the file cannot be read or is invalid; the message names every invalid key.
    """
    if path is None:
        if not Path("config.yaml").exists():
            return DEFAULT_CONFIG
        path = "config.yaml"
    return _read_config(path, lambda document: document)


def load_proxy_config(path: str | os.PathLike[str]) -> Config:
    """Read what a proxy alone needs of a configuration: ``proxy``, ``headers``, ``analysis``, ``otel``. Raises
    ConfigError."""
    wanted = ("version", "proxy", "headers", "analysis", "otel")
    alone = {"models": [{"name": "alone", "model_path": "smollm2-135m-instruct"}]}
    return _read_config(path, lambda document: alone | {key: document[key] for key in wanted if key in document})


def _read_config(path: str | os.PathLike[str], select: Callable[[dict[str, Any]], dict[str, Any]]) -> Config:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}; name a YAML file such as configs/example.yaml") from error
    try:
        return parse_config(text, os.environ, select)
    except ConfigError as error:
        text = f"{path}:{'' if str(error).startswith(chr(10)) else ' '}{error}"
        raise ConfigError(text, error.deployment) from None


def parse_config(
    text: str,
    environment: Mapping[str, str],
    select: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document,
) -> Config:
    """Parse and validate a YAML text, or what ``select`` makes of its document, with ``${NAME}`` taken from
    ``environment``. Raises ConfigError."""
    document = _read_yaml(text)
    if not isinstance(document, dict):
        raise ConfigError("a mapping of keys is needed, such as `models: [...]`; see configs/example.yaml")
    problems: list[str] = []
    return _validated(_expand_environment(select(document), environment, "", problems), problems)


def config_from_json(text: str) -> Config:
    """Parse what Deployment.save_config() of any version wrote. Raises ConfigError when it isn't a configuration."""
    try:
        document = json.loads(text)
        if isinstance(document, dict):
            document.pop("format", None)
        return _validated(document, [])
    except ValueError as error:
        raise ConfigError(f"not a configuration: {error}") from error


def _validated(document: Any, problems: list[str]) -> Config:
    """Build the configuration from a document. Raises ConfigError for its errors and for ``problems`` found before."""
    import marshmallow

    deployment = None
    try:
        config: Config = _schema_of(Config)().load(document)
        deployment = config.cluster.name
        if not problems and not (problems := list(_contradictions(config))):
            return config
    except marshmallow.ValidationError as error:
        problems += _describe_errors(error.messages, "")
        if error.messages_dict.keys() <= {"version", "proxy", "models", "headers", "analysis", "otel"}:
            valid: Any = error.valid_data
            deployment = valid.get("cluster", DEFAULT_CONFIG.cluster).name
    raise ConfigError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems), deployment)


def _read_yaml(text: str) -> Any:
    """Parse ``text``. Raises ConfigError, also for a duplicate key in a mapping, which PyYAML accepts."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        _refuse_duplicates(node)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from error


def _refuse_duplicates(node: Any) -> None:
    """Raise ConfigError for the first duplicate key in any YAML mapping under ``node``."""
    children = node.value if isinstance(node.value, list) else []
    if node.id == "mapping":
        seen: set[str] = set()
        for key, _ in children:
            if key.value in seen:
                raise ConfigError(f"{key.value}: appears twice (again at line {key.start_mark.line + 1}); delete one")
            seen.add(key.value if isinstance(key.value, str) else "")
        children = [child for _, child in children]
    for child in children:
        _refuse_duplicates(child)


# Keys whose values a shell on the cluster expands.
_SHELL_LINES = r"cluster\.slurm\.(setup|prologue|proxy_job\.setup)\b"


def _expand_environment(value: Any, environment: Mapping[str, str], path: str, problems: list[str]) -> Any:
    """Return ``value`` with ``${NAME}`` replaced in all strings but shell lines, and ``$${NAME}`` by ``${NAME}``.

    Adds unset variables to ``problems``.
    """
    if isinstance(value, dict):
        return {key: _expand_environment(item, environment, _join(path, key), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_environment(item, environment, _join(path, i), problems) for i, item in enumerate(value)]
    if not isinstance(value, str) or re.match(_SHELL_LINES, path):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        if match[2] not in environment:
            problems.append(f"{path}: the environment variable {match[2]} is not set; export it or write the value")
        return environment.get(match[2], match[0])

    return re.sub(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, value)


def _join(path: str, key: object) -> str:
    """``models`` + 0 → ``models[0]``; ``models[0]`` + ``name`` → ``models[0].name``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


_UNKNOWN_KEY = "unknown key"


@functools.cache
def _schema_of(kind: type) -> Any:
    """Return the marshmallow schema class of a section: a field for each key, from its annotation, default and rule."""
    import marshmallow

    types_of, hints = {item.name: str(item.type) for item in dataclasses.fields(kind)}, typing.get_type_hints(kind)

    class Section(marshmallow.Schema):
        error_messages = {"unknown": _UNKNOWN_KEY, "type": "a mapping of keys is needed"}  # noqa: RUF012 (marshmallow's)

        @marshmallow.post_load
        def build(self, values: dict[str, Any], **_: Any) -> Any:
            return kind(**{name: _as_declared(types_of[name], value) for name, value in values.items()})

        def handle_error(self, error: marshmallow.ValidationError, *_: Any, **__: Any) -> None:
            for key, messages in error.messages_dict.items():
                if messages == [_UNKNOWN_KEY]:
                    messages[0] += _nearest_key(key, types_of)

    keys = {item.name: _field_of(item, hints[item.name]) for item in dataclasses.fields(kind)}
    return Section.from_dict(keys, name=kind.__name__)


def _field_of(item: dataclasses.Field[Any], hint: Any) -> Any:
    """Return the marshmallow field of a key: a nested schema for a section, a check of type and rule for a scalar."""
    from marshmallow import fields

    annotation = str(item.type).removesuffix(" | None")
    section: Any = next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)
    options: dict[str, Any] = {
        "required": item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING,
        "allow_none": annotation != str(item.type),
        "error_messages": {
            "required": "is required",
            "null": "may not be null; leave it out for its default",
            "invalid": "a list is needed, with one entry each",
        },
    }
    if section is None:
        check = functools.partial(_check_scalar, annotation, item.metadata.get("rule", Rule()))
        return fields.Raw(validate=check, **options)
    nested = functools.partial(fields.Nested, _schema_of(section))
    return fields.List(nested(), **options) if annotation.startswith("tuple") else nested(**options)


def _check_scalar(annotation: str, rule: Rule, value: Any) -> None:
    """Raise marshmallow's ValidationError when ``value`` has the wrong type or breaks its rule."""
    import marshmallow

    words, is_kind = SCALAR_KINDS[annotation]
    if is_kind(value) and rule.accepts(value):
        return
    described = rule.describe()
    bounded = rule.choices is None and not rule.allowed and described
    allowed = f"{words} {described}" if bounded else described or words
    raise marshmallow.ValidationError(f"found {shorten(value)}; allowed: {allowed}")


def _as_declared(annotation: str, value: Any) -> Any:
    """Convert a valid value to its declared type: YAML has lists for tuples, and whole numbers for floats."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if annotation.startswith("float") and value is not None else value


def _describe_errors(messages: Any, path: str) -> Iterator[str]:
    """Yield marshmallow's nested messages as lines ``path: message``."""
    if isinstance(messages, list):
        yield from (f"{path}: {message}" for message in messages)
        return
    for key, below in messages.items():
        yield from _describe_errors(below, path if key == "_schema" else _join(path, key))


def _nearest_key(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean strategy?`` if a known key is similar, else the list of known keys."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(known))}"


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a line ``path: message`` for each conflict between keys that are valid on their own."""
    if not config.models:
        yield "models: at least one model is needed"
    if config.cluster.type == "local":
        for item in dataclasses.fields(ClusterConfig):
            if item.name not in ("type", "name") and getattr(config.cluster, item.name) != item.default:
                yield f"cluster.{item.name}: applies only to type: slurm; delete it, or set cluster.type"
    else:
        yield from _slurm_contradictions(config.cluster.slurm)
    for index, model in enumerate(config.models):
        path = f"models[{index}]"
        if model.name in [earlier.name for earlier in config.models[:index]]:
            yield f"{path}.name: {model.name} is used twice; every model needs its own name"
        if model.engine == "command" and not model.command:
            yield f"{path}.command: is required with engine: command; an argv such as [my-server, --port, '{{port}}']"
        if model.engine != "command" and model.command:
            yield f"{path}.command: belongs to engine: command, not to {model.engine}; delete it or change engine"
        if model.min_replicas and model.idle_shutdown_minutes is not None:
            yield f"{path}.idle_shutdown_minutes: stops what min_replicas keeps; set min_replicas: 0, or delete one"
        if model.stage is not None and any(word.split("=")[0] == "--revision" for word in model.engine_args):
            yield f"{path}.stage: copies the main revision, not that of --revision in engine_args; delete one of them"
        low, most = model.min_replicas or 0, model.max_replicas or model.replicas
        if not low <= model.replicas <= most:
            yield f"{path}.replicas: found {model.replicas}; allowed: min_replicas to max_replicas ({low} to {most})"
        if model.command and not any("{port}" in word for word in model.command):
            yield f"{path}.command: {{port}} must be part of it, so that the server listens where it is expected"


def _slurm_contradictions(slurm: SlurmConfig) -> Iterator[str]:
    """Yield the conflicts in cluster.slurm, as _contradictions() does."""
    if not slurm.partitions:
        yield "cluster.slurm.partitions: at least one is needed, such as [{name: gpu}]; `sinfo` lists them"
    for index, partition in enumerate(slurm.partitions):
        if partition.name in [earlier.name for earlier in slurm.partitions[:index]]:
            yield f"cluster.slurm.partitions[{index}].name: {partition.name} is used twice"
    scopes = {"cluster.slurm.sbatch": slurm.sbatch, "cluster.slurm.proxy_job.sbatch": slurm.proxy_job.sbatch}
    scopes |= {f"cluster.slurm.partitions[{i}].sbatch": each.sbatch for i, each in enumerate(slurm.partitions)}
    for path, directives in scopes.items():
        for name in directives:
            if name in RESERVED_DIRECTIVES:
                yield f"{path}.{name}: is set by this program (see the keys of cluster.slurm and of its partitions)"
            if name == "clusters":
                yield f"{path}.{name}: set cluster.ssh to that cluster's own login host; its jobs would be lost here"


def saved_config(paths: DeploymentPaths) -> Config | None:
    """Return the configuration that the deployment was started with; None if it is missing or unreadable."""
    with contextlib.suppress(OSError, ConfigError):
        return config_from_json(paths.config.read_text(encoding="utf-8"))
    return None


# =====================================================================================================================
# Job scripts: renders a JobRequest into the script for sbatch, with Jinja2. Runs nothing.
# =====================================================================================================================


class ShellText(str):
    """Text that goes into a job script unchanged; it must already be quoted for the shell."""

    __slots__ = ()


def shell_words(value: Any) -> str:
    """Quote a value, or each item of a list, for the shell. Raises TypeError for a mapping, a boolean or None."""
    if isinstance(value, ShellText):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(shell_words(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{shorten(value)} cannot be a word for the shell")
    return shlex.quote(str(value))


def job_launchers(request: JobRequest, slurm: SlurmConfig) -> tuple[ShellText, ShellText]:
    """Return the shell command before `serve`, and the one before `rank` (which srun starts)."""
    from agent_infra_core.fleet.containers import container_launchers, inside_of

    if slurm.container is None:
        bare = ShellText(f'"$python" {shlex.quote(request.program)}')
        return bare, bare
    inside = inside_of(slurm, request.model, request.work_dir, has_gpus=request.gpus > 0)
    launcher, of_ranks = container_launchers(inside, request.program)
    return ShellText(launcher), ShellText(of_ranks)


def job_template(request: JobRequest) -> str:
    """Return the name of the template in slurm_templates/ for a job."""
    if request.model.engine != "vllm":
        return "engine.sbatch.j2"
    return "vllm_multinode.sbatch.j2" if request.nodes > 1 else "vllm.sbatch.j2"


def render_job(request: JobRequest, slurm: SlurmConfig) -> str:
    """Render a job's script from a packaged template or from cluster.slurm.template. Raises RefusedError."""
    from agent_infra_core.fleet.directives import job_directives

    own = absolute_path(slurm.template, "cluster.slurm.template") if slurm.template else None
    launcher, rank_launcher = job_launchers(request, slurm)
    values = {item.name: getattr(request, item.name) for item in dataclasses.fields(request)}
    values |= {"partition": request.partition.name, "directives": job_directives(request, slurm)}
    values |= {"setup": slurm.setup, "container": slurm.container}
    values |= {"launcher": launcher, "rank_launcher": rank_launcher}
    return _render_template(own.name if own else job_template(request), own, values)


def render_proxy_job(values: Mapping[str, Any]) -> str:
    """Render the script of the job that runs the proxy. Raises RefusedError."""
    return _render_template("proxy.sbatch.j2", None, {"replicas": (), **values})


def _render_template(name: str, own: Path | None, values: Mapping[str, Any]) -> str:
    """Render the template ``name``, of the packaged ones or those beside ``own``. Raises RefusedError."""
    import jinja2

    folder = resource("slurm_templates")
    loaders = [jinja2.FileSystemLoader(path) for path in ([own.parent] if own else []) + [folder]]
    environment = jinja2.Environment(  # noqa: S701  no HTML: every value is quoted for the shell by shell_words
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        finalize=shell_words,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shell"] = ShellText
    try:
        script = environment.get_template(name).render(**values, version=__version__)
    except jinja2.TemplateNotFound as error:
        where = " or ".join(str(path) for loader in loaders for path in loader.searchpath)
        raise RefusedError(f"the job template {error.name} is not in {where}") from error
    except (jinja2.TemplateError, TypeError) as error:
        line = getattr(error, "lineno", None)
        raise RefusedError(f"the job template {name}{f', line {line}' if line else ''}: {error}") from error
    if not script.startswith("#!"):
        raise RefusedError(f"the job template {name}: its first line must be #!, such as #!/bin/bash -l")
    return script


# =====================================================================================================================
# SSH forwarding: the `tunnel` role, a process that keeps one SSH connection open and forwards ports over it.
# =====================================================================================================================


FORWARD_BACKLOG = 1024  # connections waiting to be accepted on a tunnel's port: all agents may connect at once


def run_tunnel() -> int:
    """Run the `tunnel` role: log in as stdin's first line says, until stdin ends. Returns the exit code."""
    from agent_infra_core.ssh.child import exit_when_stdin_closes, report_to_parent, run_openssh_master

    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to the parent too, which ends this process
        signal.signal(number, signal.SIG_IGN)
    pipe = open(0, "rb", closefd=False)  # noqa: SIM115 (as long as the process)
    line = pipe.readline()
    if not line:
        return 0
    spec = json.loads(line)
    try:
        if spec["driver"] == "openssh":
            threading.Thread(target=exit_when_stdin_closes, args=(pipe,), name="lifeline", daemon=True).start()
            document = {"error": run_openssh_master(spec)}
        else:
            document = {"error": _run_sshtunnel(spec, pipe)}
    except HostUnreachableError as error:
        document = {"error": str(error), "kind": getattr(error, "kind", "host")}
    except Exception as error:  # noqa: BLE001  whatever it is, the parent is told rather than left to guess
        document = {"error": f"{type(error).__name__}: {error}", "kind": "host"}
    with contextlib.suppress(OSError):
        report_to_parent(document)
    # Exit immediately: a hung library thread must not keep this process alive.
    os._exit(1)


def _run_sshtunnel(spec: Mapping[str, Any], pipe: BinaryIO) -> str:
    """Log in, and forward the ports that the following lines of ``pipe`` ask for. Returns why the connection ended."""
    from agent_infra_core.ssh.forwards import Forwards

    allow_many_descriptors()  # each stream takes three
    forwards = Forwards(spec, _forward_server)
    threading.Thread(target=forwards.read_requests, args=(pipe,), name="requests", daemon=True).start()
    return forwards.run()


def _forward_server(transport: Any, local: int, remote: tuple[str, int]) -> ForwardServer:
    """Return sshtunnel's server for one forwarded port: 127.0.0.1:``local``, which the parent reserved, to ``remote``.

    sshtunnel never checks known_hosts, so it gets a connection that we opened and checked. Its forwarder is also wrong
    for us: it holds one host's ports for good, listens on all addresses, queues 5 connections, wakes up 10 times a
    second for each port, and delays small answers by 40 ms.
    """
    import logging

    from agent_infra_core.ssh.child import bind_reserved_port
    from agent_infra_core.ssh.forwards import Traffic
    from agent_infra_core.ssh.routes import load_paramiko

    load_paramiko()
    import sshtunnel

    log = logging.getLogger("agent_infra.tunnel")
    log.handlers = [logging.NullHandler()]

    class Handler(sshtunnel._ForwardHandler):  # type: ignore[misc]
        """Opens a channel for one connection."""

        ssh_transport, remote_address, logger, traffic = transport, remote, log, Traffic()

        def _redirect(self, chan: Any) -> None:
            self.traffic.relay(self.request, chan)

    class Server(sshtunnel._ThreadingForwardServer):  # type: ignore[misc]
        """Accepts without waiting; a thread per connection does the rest."""

        request_queue_size, daemon_threads, traffic = FORWARD_BACKLOG, True, Handler.traffic
        server_bind = bind_reserved_port

    server = Server(("127.0.0.1", local), Handler, logger=log)
    server.socket.setblocking(False)
    server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit this
    return cast("ForwardServer", server)


# =====================================================================================================================
# The proxy: the Flask app for everything but inference, and the relay's entry, which applies gevent's patches.
# =====================================================================================================================


QUESTION_S = 2.0  # time the controller has to answer
STATS_FRESH_S = 1.5  # an older /stats document is requested again; while clients read /stats, one comes every second


class RelayApp:
    """The Flask app for everything but inference. The relay calls it with requests that it has already read."""

    def __init__(self, relay: Relay) -> None:
        import flask
        from werkzeug.exceptions import HTTPException
        from werkzeug.routing import BaseConverter

        from agent_infra_core.http.errors import RequestError

        class Anything(BaseConverter):
            """A client's session id: any text, slashes included."""

            regex, part_isolating = ".+", False

        self._relay, self._flask = relay, flask
        self._wsgi = app = flask.Flask("agent_infra")
        app.url_map.merge_slashes = False
        app.url_map.converters["anything"] = Anything
        for rule, methods, view in (
            ("/", "GET", self._index),
            ("/health", "GET", self._health),
            ("/stats", "GET", self._stats),
            ("/stats/sessions/<anything:session>", "GET", self._session),
            ("/sessions", "GET", self._sessions),
            ("/history", "GET", self._history),
            ("/runs", "GET", self._runs),
            ("/runs", "POST", self._announce_run),
            ("/metrics", "GET", self._metrics),
            ("/queue/status", "GET", self._queue_status),
            ("/v1/models", "GET", self._models),
            ("/v1/models/<path:model>", "GET", self._model),
            ("/<path:model>/v1/models", "GET", self._models),
            ("/sessions/<anything:session>/end", "POST", self._end_session),
            ("/admin/backends/<path:backend>/<any(drain, undrain):operation>", "POST", self._drain),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[methods])
        app.register_error_handler(HTTPException, self._on_http_error)
        app.register_error_handler(RequestError, lambda error: self._error(error.status, str(error)))

    def answer(self, request: RequestHead, path: bytes, query: bytes, body: bytes) -> bytes:
        """Return the whole HTTP answer, ready to send."""
        environ = {
            "REQUEST_METHOD": request.method.decode("ascii"),
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query.decode("latin-1"),
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": request.fields.get(b"content-type", b"").decode("latin-1"),
            "SERVER_NAME": "agent-infra",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        started: list[Any] = []

        def start_response(status: str, fields: list[tuple[str, str]], _error: Any = None) -> None:
            started[:] = status, fields

        parts: Any = self._wsgi(environ, start_response)  # type: ignore[arg-type]  # nobody here writes piecemeal
        content = b"".join(parts)
        if hasattr(parts, "close"):
            parts.close()
        status, fields = started
        kept = [(name, value) for name, value in fields if name.lower() not in ("content-length", "connection")]
        length = {name.lower(): value for name, value in fields}.get("content-length", len(content))  # HEAD: as GET
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in kept), f"content-length: {length}"]
        if not request.keeps_alive or not request.version:
            lines.append(f"connection: {'keep-alive' if request.keeps_alive else 'close'}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if request.method == b"HEAD" else content)

    def _index(self) -> Any:
        from agent_infra_core.http.heads import INFERENCE_PATHS

        paths = sorted(path.decode() for path in INFERENCE_PATHS)
        rules = sorted(
            f"{method} {rule.rule}"
            for rule in self._wsgi.url_map.iter_rules()
            for method in (rule.methods or set()) & {"GET", "POST"}
            if rule.endpoint != "static"
        )
        return {
            "name": "agent-infra",
            "version": __version__,
            "models": self._relay.models,
            "inference": paths,
            "also": rules,
        }

    def _health(self) -> Any:
        relay = self._relay
        ready = {name: sum(r.accepts_work for r in relay.pools.get(name, ())) for name in relay.models}
        if not any(ready.values()) and relay.loading:
            status = "starting"
        elif all(ready.values()) and all(replica.health != "down" for replica in relay.replicas.values()):
            status = "ok"
        else:
            status = "degraded"
        return {"status": status, "models": {name: {"ready": count} for name, count in ready.items()}}

    def _stats(self) -> Any:
        relay = self._relay
        relay.stats_read += 1
        turns = relay.book.finished
        is_fresh = relay.stats is not None and time.monotonic() - relay.stats[1] <= STATS_FRESH_S
        # The document arrives before the answer, and has every turn that is over by now.
        if not is_fresh or relay.stats_turns != turns:
            answer = relay.control.questions.ask("stats", QUESTION_S)
            if answer is not None:
                relay.stats_turns = turns
        if relay.stats is None:
            return self._unanswered(QUESTION_S)
        document, at = relay.stats
        age = b'{"snapshot_age_ms":%d,' % ((time.monotonic() - at) * 1000)
        return self._flask.Response(age + document.removeprefix(STATS_PREFIX), mimetype="application/json")

    def _metrics(self) -> Any:
        return self._ask("metrics")

    def _runs(self) -> Any:
        self._relay.stats_read += 1  # keeps the analysis fresh, like a read of /stats
        return self._ask("runs")

    def _announce_run(self) -> Any:
        body = self._flask.request.get_json(force=True, silent=True)
        name, tasks = (body.get("name"), body.get("tasks")) if isinstance(body, dict) else (None, None)
        if not (isinstance(name, str) and 0 < len(name) <= 256 and type(tasks) is int and 0 < tasks <= MAX_RUN_TASKS):
            return self._error(400, f'send {{"name": "…", "tasks": N}}, with N from 1 to {MAX_RUN_TASKS}')
        return self._ask("run", name=name, tasks=tasks)

    def _session(self, session: str) -> Any:
        return self._ask_history("session", session=self._label(session))

    def _label(self, session: str) -> str:
        """Return the name by which a session is known whose header had this value."""
        from agent_infra_core.relay.requests import label_text

        return label_text(session.encode()) or ""

    def _sessions(self) -> Any:
        return self._ask_history("sessions")

    def _history(self) -> Any:
        return self._ask_history("history")

    def _ask_history(self, op: str, **details: Any) -> Any:
        """Ask the controller what its history says, with the parameters that the client gave."""
        from agent_infra_core.http.queries import PARAMETERS, read_query
        from agent_infra_core.protocol import HISTORY_QUESTION_S

        given = read_query(self._flask.request.args, PARAMETERS[op])
        return self._ask(op, HISTORY_QUESTION_S, **given, **details)

    def _ask(self, op: str, patience_s: float = QUESTION_S, **details: Any) -> Any:
        """Ask the controller and return its answer."""
        answer = self._relay.control.questions.ask(op, patience_s, **details)
        if answer is None:
            return self._unanswered(patience_s)
        return self._flask.Response(answer["body"], answer["status"], content_type=answer["type"])

    def _unanswered(self, patience_s: float) -> Any:
        return self._error(503, f"no controller has answered within {patience_s:g} s; `connect` starts one")

    def _queue_status(self) -> Any:
        return self._relay.book.queue_status()

    def _models(self, model: str | None = None) -> Any:
        names = [name for name in [*self._relay.models, *self._relay.adapters()] if model in (None, name)]
        if model is not None and not names:
            return self._no_model(model)
        return {"object": "list", "data": [self._model_row(name) for name in names]}

    def _model(self, model: str) -> Any:
        is_served = model in self._relay.models or model in self._relay.adapters()
        return self._model_row(model) if is_served else self._no_model(model)

    def _no_model(self, model: str) -> Any:
        served = ", ".join(self._relay.models) or "none"
        message = f"the model {model[:100]!r} does not exist; served here: {served}"
        return self._error(404, message, "model_not_found")

    def _model_row(self, name: str) -> dict[str, Any]:
        """A model or adapter as the engines report it; of several context lengths, the shortest."""
        told = [r.model_rows[name] for r in self._relay.replicas.values() if name in r.model_rows]
        lengths = [row["max_model_len"] for row in told if isinstance(row.get("max_model_len"), int)]
        first = {key: told[0][key] for key in ("created", "root", "parent") if told and told[0].get(key)}
        row = {"id": name, "object": "model", "created": 0, "owned_by": "agent-infra", **first}
        return {**row, "max_model_len": min(lengths)} if lengths else row

    def _end_session(self, session: str) -> Any:
        session = self._label(session)
        self._relay.book.end_session(session)
        return {"session": session, "noted": True}  # only the controller knows whether the session exists

    def _drain(self, backend: str, operation: str) -> Any:
        replica = self._relay.replicas.get(backend)
        if replica is None:
            return self._error(
                404, f"there is no backend {backend[:100]!r}; known: {', '.join(self._relay.replicas) or 'none'}"
            )
        replica.override = "draining" if operation == "drain" else "ready"
        replica.update(replica.backend)
        self._relay.control.add_request({"op": operation, "backend": backend})
        return {"backend": backend, "op": operation, "in_flight": replica.in_flight}

    def _error(self, status: int, message: str, code: str | None = None, is_anthropic: bool = False) -> Any:
        from agent_infra_core.http.errors import error_document

        document = error_document(status, message, code, is_anthropic)
        return self._flask.Response(document, status, mimetype="application/json")

    def _on_http_error(self, error: Any) -> Any:
        from agent_infra_core.http.errors import http_phrase
        from agent_infra_core.http.heads import split_inference_path

        method, path = self._flask.request.method, self._flask.request.path
        allowed = set(getattr(error, "valid_methods", None) or ())
        if method != "POST" and split_inference_path(path.encode("utf-8", "replace")):  # not a Flask route
            allowed = {"POST"}
        fix = f"{'POST' if 'POST' in allowed else 'GET'} it" if allowed else "GET / lists the paths"
        status = 405 if allowed else error.code or 500
        if not allowed and split_inference_path(f"/v1{path}".encode("utf-8", "replace")):
            fix = "the base URL ends in /v1"
        words = f"{http_phrase(status)}: {method} {path[:100]}; {fix}"
        answer = self._error(status, words, is_anthropic="/v1/messages" in path)
        if allowed:
            answer.headers["Allow"] = ", ".join(sorted(allowed))
        return answer


def run_relay(socket_path: str, listener_fd: int) -> int:
    """Run the relay on an inherited listening socket; controllers connect at ``socket_path``. Returns the exit code."""
    from gevent import monkey

    monkey.patch_all()  # before the imports below, which must see the patched library
    from agent_infra_core.relay.server import Relay

    allow_many_descriptors()
    relay = Relay(socket_path, listener_fd, RelayApp)
    freeze_imported_objects()
    release_free_memory()
    return relay.run()


# =====================================================================================================================
# Deployment: start, connect, status, scale and stop, for the command line and (with asyncio) for programs.
# =====================================================================================================================


class OtlpSender:
    """Sends spans to an OpenTelemetry receiver, by OTLP over HTTP."""

    def __init__(self, config: OtelConfig) -> None:
        import logging

        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # TurnExporter tells what fails, once
        headers = dict(config.headers) or None
        self._exporter = OTLPSpanExporter(config.endpoint, headers=headers, timeout=OTLP_TIMEOUT_S)
        self._resource = Resource.create({"service.name": "agent-infra", "service.version": __version__})

    def send(self, spans: Sequence[Span]) -> bool:
        """Send spans; blocks for OTLP_TIMEOUT_S at most. Returns whether the receiver took them."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        return self._exporter.export([self._readable(span) for span in spans]) is SpanExportResult.SUCCESS

    def _readable(self, span: Span) -> Any:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan

        status = trace.StatusCode.UNSET if span.error is None else trace.StatusCode.ERROR
        return ReadableSpan(
            span.name,
            trace.SpanContext(span.trace_id, span.span_id, False, trace.TraceFlags(trace.TraceFlags.SAMPLED)),
            resource=self._resource,
            attributes=span.attributes,
            kind=trace.SpanKind.CLIENT,
            status=trace.Status(status, span.error),
            start_time=span.start_ns,
            end_time=span.end_ns,
        )

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


OTLP_TIMEOUT_S = 5.0


def span_sender(config: OtelConfig) -> OtlpSender | None:
    """Return a sender of spans to ``otel.endpoint``; None without one. Raises RefusedError if a package is missing."""
    if config.endpoint is None:
        return None
    try:
        return OtlpSender(config)
    except ImportError as error:
        packages = "'opentelemetry-sdk>=1.37,<2' 'opentelemetry-exporter-otlp-proto-http>=1.37,<2'"
        raise RefusedError(f"otel.endpoint needs OpenTelemetry: pip install {packages}") from error


ENDING_S = 10.0  # time for replicas to disappear after a stop without grace
STARTING_POLL_S = 5.0  # longest interval between checks while a command waits for replicas


def make_cluster(
    config: ClusterConfig,
    paths: DeploymentPaths,
    login: LoginHost | None,
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> Cluster:
    """Return the configured cluster; commands run on ``login``, or on this machine if None."""
    from agent_infra_core.bundle import build_node
    from agent_infra_core.fleet.local import LocalCluster
    from agent_infra_core.fleet.slurm import SlurmCluster

    if config.type == "local":
        return LocalCluster(paths, self_command("serve"), environment, report)
    runner = login or LocalCommands(environment)
    config = dataclasses.replace(config, tunnel=proxy_view(config).tunnel)  # by which the proxy reaches engines
    return SlurmCluster(config, paths, runner, environment, report, render_job=render_job, archive=build_node)


@contextlib.contextmanager
def end_new_replicas_on_error(cluster: Cluster) -> Iterator[None]:
    """If the block raises, end the replicas that this process started in it, and no others."""
    before = set(cluster.started)
    try:
        yield
    except BaseException:
        with contextlib.suppress(AgentInfraError, OSError):  # report the first error, not these
            new = set(cluster.started) - before
            cluster.stop(new, now=True)
            cluster.wait_stopped(new, time.monotonic() + ENDING_S)
        raise


class Deployment:
    """A deployment as the operator sees it: starts replicas, connects a proxy to them, reports status, stops all."""

    def __init__(
        self,
        config: Config,
        report: Callable[[str], None],
        environment: Mapping[str, str],
        ask: Callable[[str], str] | None = None,
        in_job: bool = False,
    ) -> None:
        """``report`` takes lines for the operator; ``ask`` prompts for a secret (None: nobody can be asked).

        ``in_job``: this process is the one that cluster.slurm.proxy: job is about.

        Raises RefusedError when the state directory cannot be written.
        """
        from agent_infra_core.bundle import build_program
        from agent_infra_core.control.lock import DeploymentLock
        from agent_infra_core.control.proxy_job import ProxyJob
        from agent_infra_core.fleet.slurm import SlurmCluster
        from agent_infra_core.ssh.login_host import LoginHost

        self.config, self.report, self.environment = config, report, environment
        self.paths = deployment_paths(config.cluster.name, environment)
        self.login: LoginHost | None = None
        if config.cluster.ssh is not None:
            self.login = LoginHost(config.cluster, environment, str(self.paths.root), ask)
        self.cluster = make_cluster(config.cluster, self.paths, self.login, environment, report)
        self.in_job, self.proxy_job = in_job, None
        if isinstance(self.cluster, SlurmCluster) and not in_job:  # it may exist, whatever the configuration says now
            build = functools.partial(build_program, resource)
            self.proxy_job = ProxyJob(self.cluster, config.cluster, self.paths, render_proxy_job, build)
        # The job that is to run the proxy, rather than this process.
        self.planned_job = self.proxy_job if config.cluster.slurm.proxy == "job" else None
        self._lock = DeploymentLock(self.paths.link_lock if self.planned_job else self.paths.lock)
        self.controller: Controller | None = None
        self.link: ProxyLink | None = None  # instead of it
        self._served: ServedProxy | None = None  # in a job
        self._handover: Handover | None = None
        self._autoscaler: Autoscaler | None = None

    def select_models(self, name: str | None = None, replicas: int | None = None) -> list[ModelConfig]:
        """Return all models, or only the one called ``name``. Raises RefusedError when there is no such model."""
        models = [model for model in self.config.models if name in (None, model.name)]
        if not models:
            known = ", ".join(model.name for model in self.config.models)
            raise RefusedError(f"no model is called {name}; the configuration has {known}")
        return [dataclasses.replace(model, replicas=replicas or model.replicas) for model in models]

    def start(self, models: Sequence[ModelConfig]) -> list[ReplicaRecord]:
        """Start every model's missing replicas, after checking all models. If one fails, end those just started."""
        from agent_infra_core.control.status import count_missing

        prepared = [self.cluster.prepare(model) for model in models]
        running, started = self.serving(), list[ReplicaRecord]()
        with restore_on_error(self.paths.wanted, self.paths.config), end_new_replicas_on_error(self.cluster):
            self.want({model.name: model.replicas for model in models})
            for model in prepared:
                if missing := count_missing(model, running, self.report):
                    started += self.cluster.start_replicas(model, missing)
        return started

    def serving(self) -> list[ReplicaRecord]:
        """Return the replicas that count towards the wanted number; a replica and its successor count as one."""
        from agent_infra_core.control.handover import read_successions
        from agent_infra_core.control.status import SERVING_STATES

        self._fetch_state()
        records, successions = self.cluster.replicas(), read_successions(self.paths)
        serving = {record.replica: record for record in records if record.state in SERVING_STATES}
        doubles = {s.successor for old, s in successions.items() if old in serving and serving[old].job_id == s.job}
        return [record for name, record in serving.items() if name not in doubles]

    def _fetch_state(self) -> None:
        """Bring what a proxy behind a login host has noted to this machine."""
        if self.planned_job is not None:
            self.planned_job.fetch_state()

    def wanted(self) -> dict[str, int]:
        """Return the wanted number of replicas per model: from the last `start` or `scale`, else the configuration."""
        told: Any = None
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.paths.wanted.read_text(encoding="utf-8"))
        counts = told if isinstance(told, dict) else {}
        return {model.name: counts.get(model.name, model.replicas) for model in self.config.models}

    def want(self, counts: Mapping[str, int]) -> None:
        """Save how many replicas of these models are wanted, and the configuration."""
        text = json.dumps({**self.wanted(), **counts})
        write_atomically(self.paths.wanted, text)
        self.save_config()
        if self.planned_job is not None:
            self.planned_job.share(self.paths.wanted, text)

    def save_config(self) -> None:
        """Save the configuration for `stop`, which must work even if the file is changed or deleted."""
        write_atomically(self.paths.config, config_text(self.config))

    def find_proxy(self) -> tuple[Mapping[str, Any] | None, str | None]:
        """Return ``{pid, host, port, …}`` of the running proxy, or None; and what is wrong with it."""
        from agent_infra_core.control.lock import local_proxy

        return self.proxy_job.find() if self.proxy_job is not None else local_proxy(self.paths)

    def proxy(self, found: Mapping[str, Any] | None = None) -> ProxyClient | None:
        """Return a client for the deployment's proxy, perhaps ``found`` already; None if no proxy runs."""
        from agent_infra_core.control.status import ProxyClient

        found = self.find_proxy()[0] if found is None else found
        if found is None:
            return None
        return ProxyClient(connect_address(found["host"]), found["port"], client_key(self.config, self.paths))

    @property
    def front(self) -> Controller | ProxyLink | None:
        """What connect() returned, until disconnect()."""
        return self.controller or self.link

    def wait_ready(
        self,
        show: Callable[[Sequence[ReplicaRecord]], None],
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
    ) -> Sequence[ReplicaRecord]:
        """Show the replicas until they have settled (see StartWatch). Returns them.

        Raises AgentInfraError if all of a model's replicas have failed or ended.  With ``only``, wait for these
        replicas alone; then any failure raises.
        """
        from agent_infra_core.control.status import StartWatch, explain_lost

        watch, problem = StartWatch(), ""
        while not should_stop():
            try:
                records = [record for record in self.cluster.replicas() if only is None or record.replica in only]
            except HostUnreachableError as error:  # says nothing about the replicas
                if problem != str(error):
                    self.report(f"{error}; the replicas start without it")
                problem = str(error)
            else:
                problem = ""
                show(records)
                if watch.is_over(records, time.monotonic()):
                    lost = explain_lost(records, self.cluster, is_each_needed=only is not None)
                    if lost:
                        raise AgentInfraError(lost)
                    return records
            time.sleep(min(self.cluster.poll_s, STARTING_POLL_S))
        return ()

    def claim(self, verb: str) -> None:
        """Make this process the deployment's controller, or the one that leads to it. RefusedError if another is."""
        if not self._lock.is_held:
            self._lock.acquire(verb)
        if self.login is not None:
            self.login.lead()

    def connect(self, log_format: str = "text", expected: Sequence[ModelConfig] = ()) -> Controller | ProxyLink:
        """Start the proxy; call claim() first, and settle() on what it returns. Raises RefusedError if the port is
        taken.

        Turns for ``expected`` models, which the caller is about to start, wait until they are ready.
        """
        from agent_infra_core.control.controller import Controller
        from agent_infra_core.control.handover import Handover
        from agent_infra_core.control.proxy_link import ProxyLink
        from agent_infra_core.control.scaling import Autoscaler
        from agent_infra_core.fleet.engines import GUARDED_ENGINES
        from agent_infra_core.fleet.slurm import SlurmCluster
        from agent_infra_core.ssh.tunnels import TunnelSet

        keys = (client_key(self.config, self.paths), self.cluster.replica_key())
        with contextlib.suppress(OSError):  # a full disk doesn't stop the proxy
            self.save_config()
        if self.planned_job is not None:
            options = ("--log-format", log_format)
            self.link = ProxyLink(self.planned_job, self.config, self.login, keys[1], self.paths, options, self.report)
            return self.link
        tunnels = None
        if self.config.cluster.type != "local":
            tunnels = TunnelSet(self.config.cluster, self.login, keys[1], GUARDED_ENGINES)
        controller = Controller(
            self.config,
            self.paths,
            self._look,
            keys=keys,
            log_format=log_format,
            pause_s=self.cluster.poll_s,
            tunnels=tunnels,
            spans=span_sender(self.config.otel),
        )
        controller.expected = frozenset(model.name for model in expected)
        if isinstance(self.cluster, SlurmCluster) and self.config.cluster.slurm.handover:
            self._handover = Handover(self, self.cluster, controller.drain)
        self.controller, self._autoscaler = controller, Autoscaler(self, self.cluster, controller)
        controller.start()
        return controller

    def _look(self) -> list[ReplicaRecord]:
        """Return the replicas. While the controller runs, also scale, and replace those whose walltime ends soon."""
        records = self.cluster.replicas()
        if self.controller is not None and self.controller.is_running:
            for follower in (self._handover, self._autoscaler):
                if follower is not None:
                    follower.follow(records)
        return records

    def announce(self, port: int) -> None:
        """In a job, have others find its proxy."""
        from agent_infra_core.control.proxy_job import serve_in_job

        if self.in_job:
            self._served = serve_in_job(self.cluster, self.environment, (self.config.proxy.host, port))

    def disconnect(self, grace_s: float) -> None:
        """Stop what connect() started; the turns in flight of a proxy in this process have ``grace_s`` to finish."""
        if self._served is not None:
            self._served.drain()
        for front in (self.controller, self.link):
            if front is not None:
                front.stop(grace_s)
        if self._served is not None:
            self._served.close()
        self.controller = self.link = self._served = None
        self._lock.release()

    def undo_connect(self) -> None:
        """Stop what connect() started, and end the proxy's job if this process submitted it."""
        is_new = self.link is not None and self.link.is_new
        self.disconnect(0.0)
        if self.planned_job is not None and is_new:
            with contextlib.suppress(AgentInfraError, OSError):  # the caller reports the first error, not these
                self.planned_job.stop(now=True)

    def status(self) -> dict[str, Any]:
        """Return ``{deployment, models, replicas, proxy: {pid, host, port, controller, …} | None, …}``.

        ``models`` holds rows of summarize(), ``replicas`` ReplicaRecords, ``accounting`` the part of /stats (None
        without a proxy); ``handover`` maps a replica to its Succession; ``degraded`` lists what differs from the
        wanted state.
        """
        from agent_infra_core.control.handover import read_successions
        from agent_infra_core.control.lock import lock_holder
        from agent_infra_core.control.status import list_problems, summarize, unreached

        records = [r for r in self.cluster.replicas() if r.state != "stopped" or r.is_idle]
        self._fetch_state()
        wanted = self.wanted()
        found, trouble = self.find_proxy()
        proxy = self.proxy(found) if found else None
        stats = proxy.stats() if proxy else {}
        rows = stats.get("backends", ())
        models = [summarize(name, wanted[name], records, rows) for name in wanted]
        successions = read_successions(self.paths)
        degraded = list_problems(models, records)
        degraded += [
            f"{name} is ready, but no turn reaches it: {why}" for name, why in unreached(records, rows).items()
        ]
        if proxy is not None and self.planned_job is not None and not stats:
            trouble = "the proxy doesn't answer this machine: `connect` says how it is reached"
        degraded += [problem for problem in (self.cluster.problem, trouble) if problem]
        return {
            "deployment": self.config.cluster.name,
            "models": models,
            "replicas": [dataclasses.asdict(record) for record in records],
            "proxy": found and {**found, "controller": lock_holder(self.paths.lock)},
            "accounting": stats.get("accounting"),
            "handover": {replica: dataclasses.asdict(each) for replica, each in successions.items()},
            "degraded": degraded,
        }

    def stop(self, now: bool = False) -> list[str]:
        """End the deployment's controller and relay, then its replicas. Returns the names of what it ended.

        Turns in flight have DRAIN_S to finish, or no time with ``now``.  Safe to call again; never touches other
        deployments.  Raises AgentInfraError when the cluster doesn't answer: then nothing was ended, except a proxy
        of this process; or when something still runs at the end.
        """
        from agent_infra_core.control.link import DRAIN_S, end_relay
        from agent_infra_core.control.lock import end_holder
        from agent_infra_core.control.status import LIVE_STATES
        from agent_infra_core.fleet.state import unrecorded_relay

        own, records = self.controller is not None, self.cluster.replicas()
        if self.cluster.problem and not own:
            self.cluster.stop((), now)  # raises if it couldn't end any
        live = {record.replica: record for record in records if record.state in LIVE_STATES}
        ended = self.proxy_job.stop(now) if self.proxy_job is not None and not own else []
        ended += ["proxy"] if own else []
        self.disconnect(0.0 if now else DRAIN_S)
        for lock in (self.paths.lock, self.paths.link_lock):
            ended += end_holder(lock, now)
        relay = read_relay_record(self.paths) or unrecorded_relay(self.paths)
        if relay is not None:
            end_relay(relay["pid"], relay["process"], 0.0 if now else DRAIN_S)
            ended.append(f"proxy (pid {relay['pid']})")
        for leftover in (self.paths.relay_record, self.paths.relay_socket):
            leftover.unlink(missing_ok=True)
        try:
            live |= {record.replica: record for record in self._end_replicas(now)}
        except AgentInfraError as error:
            raise type(error)(f"{error}; ended: {', '.join(ended) or 'nothing'}") from error
        if self.planned_job is not None and any(name.startswith("proxy (job") for name in ended):
            try:
                self.planned_job.fetch_history()
            except (AgentInfraError, OSError) as error:
                self.report(f"the history stays on the cluster: {error}")
        paths = self.paths
        for leftover in (paths.wanted, paths.config, paths.handover, paths.drained, paths.leaving):
            leftover.unlink(missing_ok=True)
        return ended + [name + (f" (job {record.job_id})" if record.job_id else "") for name, record in live.items()]

    def _end_replicas(self, now: bool) -> list[ReplicaRecord]:
        """End all replicas. Returns those that were alive. Raises AgentInfraError when some still run at the end."""
        from agent_infra_core.control.link import DRAIN_S
        from agent_infra_core.control.status import LIVE_STATES

        records = self.cluster.replicas()
        names = [record.replica for record in records]
        self.cluster.stop(names, now)
        left = self.cluster.wait_stopped(names, time.monotonic() + DRAIN_S + 10.0)
        if left and not now:
            self.cluster.stop(left, now=True)
            left = self.cluster.wait_stopped(left, time.monotonic() + ENDING_S)
        if left:
            raise AgentInfraError(f"{', '.join(left)} did not end; see `logs`")
        return [record for record in records if record.state in LIVE_STATES]


class Scaling:
    """Changes how many replicas of a model run: starts missing ones, or drains and ends surplus ones."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._cluster = deployment.cluster

    def scale(self, name: str, replicas: int) -> tuple[list[ReplicaRecord], list[ReplicaRecord]]:
        """Set the wanted number of a model's replicas: start missing ones, or choose those to end (see retire()).

        Returns the replicas that it started and the surplus ones.
        """
        from agent_infra_core.control.handover import read_successions
        from agent_infra_core.control.status import choose_to_stop

        [model] = self._deployment.select_models(name)
        running = [record for record in self._deployment.serving() if record.model == name]
        if self._cluster.problem:
            raise AgentInfraError(f"{self._cluster.problem}; nothing was changed, try again")
        proxy = self._deployment.proxy()
        rows = proxy.backends() if proxy else {}
        surplus = choose_to_stop(running, rows, max(0, len(running) - replicas))
        for record in running:
            if proxy and record not in surplus and rows.get(record.replica, {}).get("state") == "draining":
                proxy.drain(record.replica, "undrain")  # an earlier `scale` wanted to remove it
        if len(running) < replicas:
            return self._deployment.start([dataclasses.replace(model, replicas=replicas)]), []
        self._deployment.want({name: replicas})
        leaving = {record.replica for record in surplus}
        heirs = {each.successor for old, each in read_successions(self._deployment.paths).items() if old in leaving}
        return [], surplus + [record for record in self._cluster.replicas() if record.replica in heirs]

    def retire(self, records: Iterable[ReplicaRecord], grace_s: float, should_stop: Callable[[], bool]) -> list[str]:
        """Drain replicas: they get no new turns, and each ends after its last turn or after ``grace_s``.

        Returns the replicas that ended. Those that still run when ``should_stop`` returns true stay drained.
        """
        from agent_infra_core.control.link import DRAIN_S

        waiting, ended = [record.replica for record in records], list[str]()
        deadline = time.monotonic() + grace_s
        turns: Mapping[str, int | None] = {}
        while waiting and not should_stop():
            proxy, is_late, before = self._deployment.proxy(), time.monotonic() >= deadline, turns
            turns = {replica: proxy.drain(replica) if proxy else 0 for replica in waiting}
            for replica, count in turns.items():
                if count and (is_late or count != before.get(replica)):
                    self._deployment.report(f"{replica}: {count} turns {'are cut' if is_late else 'still in flight'}")
            idle = [replica for replica in waiting if is_late or turns[replica] == 0]
            self._cluster.stop(idle, now=grace_s == 0)
            ended += idle
            waiting = [replica for replica in waiting if replica not in idle]
            time.sleep(0.25 if waiting else 0.0)
        left = self._cluster.wait_stopped(ended, time.monotonic() + DRAIN_S + 10.0)
        if left:
            raise AgentInfraError(f"{', '.join(left)} did not end; see `logs`")
        return ended


class ConnectionManager:
    """Runs a deployment from asyncio: ``start``, ``connect``, ``status`` and ``stop``, or ``async with`` for all.

    Blocking work runs in a thread, so it never blocks the event loop.  Use a manager from one task at a time.
    """

    def __init__(self, config: Config | str | os.PathLike[str] | None = None) -> None:
        """``config``: a Config, the path of a YAML file, or None for ./config.yaml or the embedded default."""
        self.config = config if isinstance(config, Config) else load_config(config)
        self._deployment: Deployment | None = None
        self._messages: list[str] = []

    @property
    def base_url(self) -> str:
        """``base_url`` for an OpenAI client. Raises AgentInfraError before connect()."""
        front = self._deployment.front if self._deployment else None
        if front is None:
            raise AgentInfraError("not connected; await connect() first")
        return f"{front.url}/v1"

    @property
    def api_key(self) -> str:
        """``api_key`` for an OpenAI client."""
        return client_key(self.config, self._open().paths)

    def _open(self) -> Deployment:
        if self._deployment is None:
            self._deployment = Deployment(self.config, self._messages.append, os.environ)
        return self._deployment

    async def start(self, model: str | None = None, replicas: int | None = None) -> None:
        """Start the missing replicas and wait until they are ready. Raises AgentInfraError with the reason if not."""
        import asyncio

        deployment = self._open()
        models = deployment.select_models(model, replicas)
        stopping = threading.Event()
        try:
            await asyncio.to_thread(deployment.start, models)
            await asyncio.to_thread(deployment.wait_ready, lambda _: None, stopping.is_set)
        finally:
            stopping.set()

    async def connect(self) -> str:
        """Start controller and proxy in the background of this process. Returns ``base_url``."""
        import asyncio

        from agent_infra_core.control.lock import LIBRARY_HOLDER_VERB

        deployment, stopping = self._open(), threading.Event()
        if deployment.front is None:
            deployment.claim(LIBRARY_HOLDER_VERB)
            try:
                await asyncio.to_thread(lambda: deployment.connect().settle(lambda _: None, stopping.is_set))
            except BaseException:
                stopping.set()
                deployment.undo_connect()
                raise
        return self.base_url

    async def status(self) -> dict[str, Any]:
        """See Deployment.status."""
        import asyncio

        return await asyncio.to_thread(self._open().status)

    async def stop(self, now: bool = False) -> list[str]:
        """End the proxy and replicas. Returns the names of what it ended. Safe to call again."""
        import asyncio

        deployment = self._open()
        ended = await asyncio.to_thread(deployment.stop, now)
        if deployment.login is not None:  # a later call connects again
            await asyncio.to_thread(deployment.login.close)
        return ended

    async def __aenter__(self) -> ConnectionManager:
        import asyncio

        stopping = threading.Event()
        entering = asyncio.ensure_future(asyncio.to_thread(self._enter, stopping.is_set))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            stopping.set()  # and wait: no work may go on after the cancellation
            [error] = await asyncio.gather(entering, return_exceptions=True)
            if error is None:  # it had already finished: undo it
                await self.stop(now=True)
            raise
        return self

    def _enter(self, should_stop: Callable[[], bool]) -> None:
        """Start and connect. If that fails, end what it started; replicas that ran before keep running."""
        from agent_infra_core.control.lock import LIBRARY_HOLDER_VERB

        deployment = self._open()
        models = deployment.select_models()
        deployment.claim(LIBRARY_HOLDER_VERB)  # first: if this is refused, nothing needs to be stopped
        try:
            with end_new_replicas_on_error(deployment.cluster):
                deployment.start(models)
                deployment.wait_ready(lambda _: None, should_stop)
                if not should_stop() and deployment.front is None:
                    deployment.connect().settle(lambda _: None, should_stop)
                if should_stop():
                    raise AgentInfraError("cancelled before the replicas and the proxy were ready")
        except BaseException:
            deployment.undo_connect()
            if deployment.login is not None:
                deployment.login.close()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


# =====================================================================================================================
# Command line. The core does the work of each verb.
# =====================================================================================================================


class ReplicaBoard:
    """Shows replicas while they start: one live line each on a terminal, else one line per change."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._trails: dict[str, dict[str, str]] = {}  # replica → state → the last line shown for it
        self._live: Any = None

    def __enter__(self) -> ReplicaBoard:
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*details)

    def show(self, records: Sequence[ReplicaRecord]) -> None:
        """Update the board."""
        from agent_infra_core.control.status import describe_replica

        lines = {record.replica: describe_replica(record) for record in records}
        if self._live is None and sys.stdout.isatty():  # only now: one that shows nothing would leave an empty line
            from rich.live import Live

            self._live = Live(refresh_per_second=8)
            self._live.__enter__()
        if self._live is not None:
            from rich.text import Text

            trails = [f"{record.replica:<24} {self._trail(record, lines[record.replica])}" for record in records]
            self._live.update(Text(printable_text("\n".join(trails))))
        else:
            for name, line in lines.items():
                if self._shown.get(name) != line:
                    _say(f"{name}  {line}")
        self._shown = lines

    def _trail(self, record: ReplicaRecord, line: str) -> str:
        """Return ``PENDING (Resources, est. 14:32) → RUNNING gpu07 → LOADING 5/9 → READY 10.0.0.7:5901``."""
        trail = self._trails.setdefault(record.replica, {})
        if record.state == "pending":
            trail.clear()  # it was requeued
        trail.pop(record.state, None)
        trail[record.state] = line
        return " → ".join(trail.values())


def _say(line: str, *, error: bool = False) -> None:
    print(printable_text(line), file=sys.stderr if error else sys.stdout, flush=True)


def _say_log_line(prefix: str, line: bytes) -> None:
    """Print a line of a log; of a progress bar, its last state."""
    _say(prefix + line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))


def _deployment(arguments: argparse.Namespace) -> Deployment:
    """Return the deployment that the command line names."""
    return _open_deployment(load_config(arguments.config), getattr(arguments, "port", None))


def _open_deployment(config: Config, port: int | None = None) -> Deployment:
    """Open a deployment; its connection to the login host is closed when this process exits, even after an error."""
    import getpass

    if port is not None:
        config = dataclasses.replace(config, proxy=dataclasses.replace(config.proxy, port=port))
    deployment = Deployment(config, _say, os.environ, getpass.getpass if sys.stdin.isatty() else None)
    if deployment.login is not None:
        atexit.register(deployment.login.close)
    return deployment


def _run_start(arguments: argparse.Namespace) -> int:
    from agent_infra_core.control.status import count_missing
    from agent_infra_core.fleet.engines import check_engine_args

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
        _say(f"started {', '.join(record.replica for record in started) or 'nothing'}; `status` shows their progress")
        return 0
    with ReplicaBoard() as board:
        records = deployment.wait_ready(board.show, signals.came)
    if signals.came():
        _say("the replicas keep loading; `status` shows them, `stop` ends them")
        return 130
    _tell_queued(records)
    given = f" --config {shlex.quote(arguments.config)}" if arguments.config else ""
    _say(f"next: {command_name()} connect{given}")
    return 0


def _tell_queued(records: Sequence[ReplicaRecord]) -> None:
    """Say which replicas aren't ready yet."""
    from agent_infra_core.control.status import SERVING_STATES, describe_replica

    for record in records:
        if record.state in SERVING_STATES and record.state != "ready":
            _say(f"{record.replica} joins later: {describe_replica(record)}")


def _greet(url: str, deployment: Deployment, routes: Iterable[str]) -> None:
    """Print what the operator needs to connect an agent to the proxy; ``routes`` are lines on how all is reached."""
    _say(f"proxy  {url}  ({deployment.config.proxy.strategy})")
    _say(f"stats  {url}/stats")
    for line in routes:
        _say(line)
    _say_environment(url, deployment.config, deployment.paths)


def _say_environment(url: str, config: Config, paths: DeploymentPaths) -> None:
    """Print the variables by which OpenAI's client finds the proxy."""
    _say(f"export OPENAI_BASE_URL={url}/v1")
    if config.proxy.api_key is None:
        _say(f'export OPENAI_API_KEY="$(cat {shlex.quote(str(paths.client_key))})"')
    else:
        _say("export OPENAI_API_KEY=...  # proxy.api_key of the configuration")


def _attend(proxy: Controller | ProxyLink, signals: OperatorSignals) -> None:
    """Wait for a signal. Raises AgentInfraError if the proxy fails."""
    freeze_imported_objects()
    while not signals.came():
        proxy.check()
        time.sleep(0.2)


def _run_connect(arguments: argparse.Namespace) -> int:
    if arguments.background:
        return run_detached(functools.partial(_connect, arguments))
    return _connect(arguments)


def _connect(arguments: argparse.Namespace, detach: Callable[[Path], None] | None = None) -> int:
    """Run controller and proxy until a signal arrives, or submit their job; call ``detach`` once they serve."""
    deployment = _deployment(arguments)
    if deployment.planned_job is not None and deployment.login is None:
        return _connect_job(deployment, deployment.planned_job, arguments)
    if arguments.dashboard:
        page_script()
    return _serve(deployment, arguments, detach)


_STILL_QUEUED = "the proxy's job stays in the queue; `connect` waits for it again, `stop` ends it"


def _connect_job(deployment: Deployment, job: ProxyJob, arguments: argparse.Namespace) -> int:
    """Run the proxy in a job of its own, and print its URL, at which this machine reaches it, once it serves."""
    if arguments.dashboard:
        raise RefusedError("--dashboard: the proxy runs in a job; run `connect`, then `dashboard`")
    signals = OperatorSignals()
    deployment.save_config()
    job.submit(deployment.config, "--log-format", arguments.log_format)
    with ReplicaBoard() as board:
        found = job.wait(board.show, signals.came)
    if found is None:
        _say(_STILL_QUEUED)
        return 130
    _greet(proxy_url(found["host"], found["port"]), deployment, job.describe(found))
    return 0


def _run_proxy_job(arguments: argparse.Namespace) -> int:
    """Run the `proxy-job` role: `connect` in a job, with the configuration that the operator's `connect` saved."""
    from agent_infra_core.control.proxy_job import job_host

    paths = deployment_paths(arguments.name, os.environ)
    config = saved_config(paths)
    if config is None:
        raise RefusedError(f"{paths.config} is missing: the deployment was stopped; run `connect` again")
    proxy = dataclasses.replace(config.proxy, host=job_host(config.proxy.host))
    return _serve(Deployment(dataclasses.replace(config, proxy=proxy), _say, os.environ, in_job=True), arguments)


def _serve(deployment: Deployment, arguments: argparse.Namespace, detach: Callable[[Path], None] | None = None) -> int:
    """Run controller and proxy until a signal arrives; call ``detach`` once they serve."""
    from agent_infra_core.control.link import DRAIN_S

    signals = OperatorSignals()
    deployment.claim("connect")
    try:
        proxy = deployment.connect(arguments.log_format)
        signals.on_second = proxy.end_turns
        with ReplicaBoard() as board:
            if not proxy.settle(board.show, signals.came):
                _say(_STILL_QUEUED)
                return 130
        deployment.announce(proxy.port)  # only now: before the first look at the replicas, a turn would find none
        _greet(proxy.url, deployment, proxy.routes())
        try:
            for reason in deployment.status()["degraded"]:
                _say(f"degraded: {reason}")
        except HostUnreachableError as error:  # the proxy serves what it knows
            _say(f"degraded: {error}")
        with _page(arguments.dashboard, deployment, proxy.url):
            if detach is not None:
                log, pid = deployment.paths.log("proxy" if deployment.planned_job is None else "link"), os.getpid()
                _say(f"runs in the background: `stop` ends it and the replicas, `kill {pid}` it alone; log: {log}")
                detach(log)
            _attend(proxy, signals)
        turns = "finishing the turns in flight (Ctrl-C again ends them now)"
        left = (turns, "the replicas keep") if deployment.link is None else ("disconnecting", "proxy and replicas keep")
        _say(f"{left[0]}; {left[1]} running, `stop` ends them")
    finally:
        deployment.disconnect(DRAIN_S)
    return 0


PAGE_PORT = 8501  # the first one tried
PAGE_STOP_S = 5.0


def page_script() -> Path:
    """Return the path of the page's script. Raises RefusedError when it or a package it needs is missing."""
    import importlib.util

    script = Path(__file__).resolve().with_name("streamlit_dashboard.py")
    if not script.exists():
        raise RefusedError(f"the page is missing: put streamlit_dashboard.py beside {__file__}")
    missing = [name for name in ("streamlit", "altair", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(f"the page needs {', '.join(missing)}: pip install 'streamlit>=1.65,<2' 'altair>=6,<7'")
    return script


def page_port(wanted: int | None) -> int:
    """Return ``wanted`` (0: any free port), or the first free port from PAGE_PORT on. RefusedError if it is taken."""
    if wanted == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    tried = range(PAGE_PORT, PAGE_PORT + 100) if wanted is None else (wanted,)
    for port in tried:
        if not is_listening("127.0.0.1", port):
            return port
    raise RefusedError(f"port {tried[0]} is taken; choose another one with --port")


def page_environment(deployment: Deployment, token: str | None) -> dict[str, str]:
    """Return the variables with the page's key and the proxy's key, which must not appear on a command line."""
    told = {"AGENT_INFRA_PAGE_KEY": read_or_make_key(deployment.paths.page_key)}
    return told if token is None else {**told, "AGENT_INFRA_TOKEN": token}


def _import_ahead() -> None:
    """Import the page's packages now: Streamlit runs the page only for its first viewer, who would have to wait."""
    import importlib

    for name in ("requests", "pandas", "altair"):
        with contextlib.suppress(ImportError):  # the page reports it
            importlib.import_module(name)


def serve_page(script: Path, port: int, proxy: str, token_file: str | None) -> int:
    """Run Streamlit with the page in this process until a signal ends it."""
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
        os.chdir(bases[0])  # Streamlit reads its settings there, such as the page's colours
    cli.main(["run", str(script), *flags, "--", *told], prog_name="streamlit", standalone_mode=False)
    return 0


class PageProcess:
    """Runs the page in a child process, which ends when this process does, even if killed. Owns the child's stdin."""

    def __init__(self, deployment: Deployment, proxy: str) -> None:
        port, key = page_port(None), client_key(deployment.config, deployment.paths)
        told = page_environment(deployment, key)
        self.url = f"http://127.0.0.1:{port}/?key={told['AGENT_INFRA_PAGE_KEY']}"
        command = [*self_command("page"), "--proxy", proxy, "--port", str(port)]
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
        """End the page."""
        self._process.terminate()
        try:
            self._process.wait(timeout=PAGE_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=PAGE_STOP_S)
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextlib.contextmanager
def _page(is_wanted: bool, deployment: Deployment, proxy: str) -> Iterator[None]:
    """Serve the page for the length of the block, if it is wanted."""
    if not is_wanted:
        yield
        return
    page = PageProcess(deployment, proxy)
    try:
        _say(f"page   {page.url}")
        yield
    finally:
        page.close()


def _end_with_input() -> None:
    """Wait for the end of standard input, which means that the parent is gone; then end this process."""
    with contextlib.suppress(OSError):  # an unreadable one counts as ended
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _run_page(arguments: argparse.Namespace) -> int:
    """Run the `page` role, which `--dashboard` starts."""
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()
    return serve_page(page_script(), arguments.port, arguments.proxy, None)


def _expected_proxy(deployment: Deployment) -> str:
    """Return the URL of the deployment's proxy, running or not. Raises RefusedError if it cannot be known."""
    (found, trouble), settings = deployment.find_proxy(), deployment.config.proxy
    if found is not None:
        return proxy_url(found["host"], found["port"])
    if settings.port == 0:
        raise RefusedError("no proxy is running, and proxy.port 0 means any port; run `connect` first")
    if deployment.planned_job is not None:
        raise RefusedError(trouble or f"{deployment.cluster.problem}; try again")
    _say("no proxy is running; `connect` starts one, and the page will find it")
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


def _wait_for_some(deployment: Deployment, signals: OperatorSignals) -> Sequence[ReplicaRecord]:
    """Wait until the replicas have settled. Raises AgentInfraError if none is ready; reports models that failed."""
    try:
        with ReplicaBoard() as board:
            return deployment.wait_ready(board.show, signals.came)
    except AgentInfraError as error:
        records = deployment.cluster.replicas()
        if all(record.state != "ready" for record in records):
            raise
        _say(f"degraded: {error}")
        return records


@contextlib.contextmanager
def _serving(
    deployment: Deployment,
    models: Sequence[ModelConfig],
    signals: OperatorSignals,
    verb: str,
    log_format: str,
    has_page: bool = False,
) -> Iterator[Controller | ProxyLink]:
    """Run replicas and proxy for the length of the block, which begins once some are ready, or after a signal.

    The page is there before: it also shows replicas that aren't ready yet.
    """
    deployment.claim(verb)
    try:
        proxy = deployment.connect(log_format, models)
        signals.on_second = proxy.end_turns
        with end_new_replicas_on_error(deployment.cluster):
            deployment.start(models)
            proxy.begin()
    except BaseException:
        # Replicas that ran before keep running, but a relay must not stay without its controller. Not only for
        # RefusedError: the scheduler may have failed to answer.
        deployment.undo_connect()
        raise
    is_over = False
    try:
        with _page(has_page, deployment, proxy.url):
            records = _wait_for_some(deployment, signals)
            with ReplicaBoard() as board:
                if not signals.came() and proxy.settle(board.show, signals.came):
                    _tell_queued(records)
            yield proxy
        is_over = True
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone; stop everything anyway
            _say("stopping")
        ended = deployment.stop(now=signals.count > 1 or not is_over)
        with contextlib.suppress(OSError):
            _say(f"stopped {', '.join(ended)}" if ended else "nothing ran")


def _run_up(arguments: argparse.Namespace) -> int:
    if arguments.dashboard:
        page_script()
    deployment = _deployment(arguments)
    return _up(deployment, deployment.select_models(arguments.model, arguments.replicas), arguments)


def _up(deployment: Deployment, models: Sequence[ModelConfig], arguments: argparse.Namespace) -> int:
    """Serve until a signal arrives."""
    signals, verb, has_page = OperatorSignals(), arguments.verb, arguments.dashboard
    with _serving(deployment, models, signals, verb, arguments.log_format, has_page) as proxy:
        if not signals.came():
            _greet(proxy.url, deployment, proxy.routes())
            _say("Ctrl-C stops everything")
            _attend(proxy, signals)
    return 0


def _run_run(arguments: argparse.Namespace) -> int:
    """Run a command against the deployment. Standard output is the command's alone."""
    from agent_infra_core.control.foreground import find_command, run_command
    from agent_infra_core.insight.report import report_text

    argv, since = find_command(arguments.command, os.environ), time.time()
    name = arguments.name or time.strftime("run-%Y%m%d-%H%M%S")
    with contextlib.redirect_stdout(sys.stderr):
        deployment, signals = _deployment(arguments), OperatorSignals()
        models = deployment.select_models(arguments.model, arguments.replicas)
        with _serving(deployment, models, signals, "run", arguments.log_format) as served:
            if arguments.tasks and not signals.came():
                proxy = deployment.proxy()
                if proxy is None:
                    path = deployment.paths.relay_record
                    raise AgentInfraError(f"--tasks: {path} could not be written; free some space there, and run again")
                proxy.announce_run(name, arguments.tasks)
            if signals.came():
                code = 128 + signals.last  # as a shell has it, although the command never ran
            else:
                key = client_key(deployment.config, deployment.paths)
                variables = {"OPENAI_BASE_URL": f"{served.url}/v1", "OPENAI_API_KEY": key}
                code = run_command(argv, {**os.environ, **variables}, signals, served.check)
        path = default_history(deployment.config, deployment.paths)
        _say(report_text(deployment.config.proxy.history, path, f"Run {name}", since))
    return code


def _draft(arguments: argparse.Namespace, model: str | None, is_local: bool = False) -> str:
    """Return a configuration for a model of the catalogue on the site that the options name. Raises RefusedError."""
    from agent_infra_core.fleet.draft import draft_for, parse_login

    cluster = ClusterConfig(type="slurm", ssh=parse_login(arguments.ssh))

    def runner() -> CommandRunner:
        deployment = _open_deployment(dataclasses.replace(DEFAULT_CONFIG, cluster=cluster))
        return deployment.login or LocalCommands(os.environ)

    text = draft_for(model, arguments.replicas or 1, cluster, None if is_local else runner)
    parse_config(text, {})
    return text


def _run_launch(arguments: argparse.Namespace) -> int:
    from agent_infra_core.fleet.catalogue import catalogue_text

    if arguments.name is None:
        _say(catalogue_text())
        return 0
    text = _draft(arguments, arguments.name, arguments.local)
    _say(text)
    if arguments.dry_run:
        return 0
    deployment = _open_deployment(parse_config(text, {}), arguments.port)
    return _up(deployment, deployment.select_models(), arguments)


def _run_init(arguments: argparse.Namespace) -> int:
    exists = RefusedError(f"{arguments.output} exists; remove it, or name another file with --output")
    if os.path.lexists(arguments.output):
        raise exists
    text = _draft(arguments, arguments.model)
    if not create_atomically(Path(arguments.output), text):  # it appeared meanwhile
        raise exists
    _say(f"wrote {arguments.output}; read its comments, then run `{command_name()} doctor`")
    return 0


def _run_proxy(arguments: argparse.Namespace) -> int:
    from agent_infra_core.control.controller import Controller
    from agent_infra_core.control.lock import DeploymentLock

    records = [parse_backend(text, number) for number, text in enumerate(arguments.backend, start=1)]
    config = _proxy_config(arguments, dict.fromkeys(record.model for record in records))
    paths = deployment_paths(config.cluster.name, os.environ)
    spans = span_sender(config.otel)
    lock, signals = DeploymentLock(paths.lock), OperatorSignals()
    lock.acquire("proxy")
    keys = (client_key(config, paths), os.environ.get("AGENT_INFRA_BACKEND_KEY"))
    controller = Controller(config, paths, lambda: records, keys=keys, log_format=arguments.log_format, spans=spans)
    try:
        controller.start()
        signals.on_second = controller.relay.terminate
        _say(f"proxy  {controller.url}  ({config.proxy.strategy})  backends: {', '.join(arguments.backend)}")
        for text, record in zip(arguments.backend, records, strict=True):
            if not is_listening(record.host, record.port or 0):
                _say(f"degraded: nothing listens at {text}; its turns go elsewhere until something does")
        _say_environment(controller.url, config, paths)
        _attend(controller, signals)
    finally:
        controller.stop()
        paths.drained.unlink(missing_ok=True)
        lock.release()
    return 0


def _proxy_config(arguments: argparse.Namespace, models: Iterable[str]) -> Config:
    """The configuration of a proxy alone, from its options and its file."""
    base = load_proxy_config(arguments.config) if arguments.config else DEFAULT_CONFIG
    options = {name: getattr(arguments, name) for name in ("host", "port", "strategy", "capture_text", "history")}
    proxy = dataclasses.replace(base.proxy, **{key: value for key, value in options.items() if value is not None})
    return dataclasses.replace(
        base,
        models=tuple(ModelConfig(name=name, model_path=name, engine="command") for name in models),
        proxy=proxy,
        cluster=ClusterConfig(name=f"proxy-{proxy.port}"),
    )


def parse_backend(text: str, number: int) -> ReplicaRecord:
    """Parse ``MODEL=HOST:PORT`` into the record of a ready replica. Raises RefusedError when it is invalid."""
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
    from agent_infra_core.control.lock import lock_holder
    from agent_infra_core.control.scaling import LEAVE_S

    deployment = _deployment(arguments)
    signals = OperatorSignals()
    if deployment.proxy() is None:
        _say("no proxy is running: a removed replica cuts off its turns; `connect` picks up new replicas")
    elif deployment.planned_job is None and lock_holder(deployment.paths.lock) is None:
        _say("the proxy is running without its controller: it gets no new replicas until `connect` takes it over")
    scaling = Scaling(deployment)
    started, surplus = scaling.scale(arguments.name, arguments.count)
    ended = scaling.retire(surplus, 0.0 if arguments.now else LEAVE_S, signals.came)
    if started and not arguments.detach:
        with ReplicaBoard() as board:
            deployment.wait_ready(board.show, signals.came, [record.replica for record in started])
    for verb, names in (("started", [record.replica for record in started]), ("ended", ended)):
        if names:
            _say(f"{verb} {', '.join(names)}")
    if signals.came():
        _say(f"interrupted: replicas keep draining and loading; `{shlex.join(sys.argv)}` resumes")
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
        time.sleep(max(1.0, deployment.cluster.poll_s))


def _show_status(status: Mapping[str, Any], clear: bool) -> None:
    """Print the status: a table of the replicas, the models, the proxy, and what is degraded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agent_infra_core.control.status import (
        describe_accounting,
        describe_model,
        describe_replica,
        describe_succession,
    )

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if clear:
        console.clear()
    if status["replicas"]:
        table = Table("replica", "model", "node", "state", "process", box=None, header_style="bold", pad_edge=False)
        for row in status["replicas"]:
            record = rebuild(ReplicaRecord, row)
            colour = {"ready": "green", "failed": "red"}.get(record.state, "yellow")
            state = Text(printable_text(describe_replica(record)), style=colour)
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
        where = f"job {proxy['job']} on {proxy['node']}" if "job" in proxy else f"pid {proxy['pid']}"
        console.print(Text(f"proxy  {proxy_url(proxy['host'], proxy['port'])}  ({where})"))
    for reason in status["degraded"]:
        console.print(Text(printable_text(f"degraded: {reason}"), style="yellow"))


def _run_logs(arguments: argparse.Namespace) -> int:
    from agent_infra_core.fleet.cluster import LogFolder, tail_logs

    deployment = _deployment(arguments)
    known = deployment.cluster.logs.names()
    is_here = deployment.login is None or deployment.planned_job is None  # the proxy's log
    if is_here and deployment.paths.log("proxy").exists() and "proxy" not in known:
        known.append("proxy")
    names = [arguments.name] if arguments.name else known
    missing = [name for name in names if name not in known]
    if not known:
        raise RefusedError("there are no logs yet; run `start` or `up` first")
    if missing:
        raise RefusedError(f"no log of {missing[0]}; there are: {', '.join(known)}")

    here = LogFolder(deployment.paths.run / "logs")
    mine = [name for name in names if name == "proxy" and is_here]
    theirs = [name for name in names if name not in mine]
    prefix = {name: f"{name}: " if len(names) > 1 else "" for name in names}

    def say(logs: Logs, from_names: Sequence[str]) -> None:
        show = logs.follow if arguments.follow else functools.partial(tail_logs, logs)
        for name, line in show(from_names, arguments.lines):
            _say_log_line(prefix[name], line)

    if arguments.follow and theirs:
        threading.Thread(target=say, args=(here, mine), daemon=True).start()
    if theirs:
        say(deployment.cluster.logs, theirs)
    say(here, mine)
    return 0


def _run_pull(arguments: argparse.Namespace) -> int:
    deployment = _deployment(arguments)
    for model in deployment.select_models(arguments.model):
        _say(f"{model.name}: {model.model_path} is in {deployment.cluster.pull(model)}")
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from agent_infra_core.fleet.doctor import examine

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
        _say(f"ok: {counts['ok']}, warnings: {counts['warning']}, errors: {counts['error']}")
    return 1 if counts["error"] else 0


def _deployment_to_stop(arguments: argparse.Namespace) -> Deployment:
    """Return the deployment to stop, with the configuration it was started with: the file may have changed since."""
    names, config = deployment_names(os.environ), DEFAULT_CONFIG
    known = ", ".join(names) or "none"
    problem: AgentInfraError | None = None
    if arguments.name is not None:
        name = arguments.name
        config = dataclasses.replace(DEFAULT_CONFIG, cluster=ClusterConfig(name=name))
        if name not in names:
            raise RefusedError(f"no deployment is called {name}; there are: {known}")
    else:
        try:
            config = load_config(arguments.config)
            name = config.cluster.name
        except ConfigError as error:
            name = error.deployment
            hint = f"`stop --name DEPLOYMENT` needs no configuration; deployments: {known}"
            problem = ConfigError(f"{error}\n{hint}")
    kept = saved_config(deployment_paths(name, os.environ)) if name in names else None
    if kept is None and problem is not None:
        raise problem
    return _open_deployment(kept or config)


def _run_export(arguments: argparse.Namespace) -> int:
    from agent_infra_core.insight.export import export_turns

    with _history_of(arguments) as file, _output(arguments.output) as out:
        export_turns(file.turns(arguments.session, arguments.since) if file else (), arguments.format, out)
    return 0


def _run_report(arguments: argparse.Namespace) -> int:
    from agent_infra_core.insight.html_report import HtmlReport
    from agent_infra_core.insight.report import Report

    library = _chart_library() if arguments.html is not None else ""
    with _history_of(arguments) as file:
        title = arguments.history or f"Deployment {load_config(arguments.config).cluster.name}"
        if file is None and arguments.html is not None:
            raise RefusedError("no turns were kept yet: there is nothing to write a page of")
        report = Report(file, title, arguments.since) if file else None
        if arguments.html is None or arguments.output is not None:
            with _output(arguments.output) as out:
                out.write(printable_text(report.text()) if report else f"# {title}\n\nNo turns yet.\n")
        if file and report and arguments.html is not None:
            page = HtmlReport(file, report, arguments.since, time.time()).page(library)
            with _output(arguments.html) as out:
                out.write(page)
            _say(f"wrote {arguments.html}: one page that needs no network")
    return 0


def _run_replay(arguments: argparse.Namespace) -> int:
    from agent_infra_core.routing.replay import replay

    with _history_of(arguments) as file, _output(arguments.output) as out:
        text = replay(file.query, arguments.model, arguments.since, arguments.kv_tokens) if file else "No turns yet.\n"
        out.write(printable_text(text))
    return 0


def _chart_library() -> str:
    """Return the script that draws charts, with all that it needs. Raises RefusedError if its package is missing."""
    try:
        import vl_convert
    except ImportError as error:
        raise RefusedError("--html needs vl-convert-python: pip install 'vl-convert-python>=1.8,<2'") from error
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _history_of(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[HistoryFile | None]:
    """Open the history that the command line names. Raises RefusedError when it is off or the file doesn't exist."""
    from agent_infra_core.insight.export import read_history
    from agent_infra_core.insight.history import history_path

    if arguments.history is not None:
        if not os.path.exists(arguments.history):
            raise RefusedError(f"--history {arguments.history}: there is no such file")
        return read_history(Path(arguments.history))
    config = load_config(arguments.config)
    default = default_history(config, deployment_paths(config.cluster.name, os.environ))
    path = history_path(config.proxy.history, default)
    if path is None:
        raise RefusedError('proxy.history is "off": turns are not kept; name an older file with --history')
    return read_history(path)


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    """Open a command's output: a file with mode 0600, since it holds prompts, or standard output."""
    if path is not None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            yield file
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # like the file: the text must not depend on the terminal
        yield sys.stdout
        sys.stdout.flush()  # now, while main() still handles a closed pipe


def _run_stop(arguments: argparse.Namespace) -> int:
    deployment = _deployment_to_stop(arguments)
    ended = deployment.stop(arguments.now)
    _say(f"stopped {', '.join(ended)}" if ended else f"nothing of the deployment {deployment.config.cluster.name} ran")
    return 0


def _run_bundle(arguments: argparse.Namespace) -> int:
    from agent_infra_core.bundle import write_program

    target = write_program(resource, Path(arguments.output))
    _say(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB); run it with a Python that has the packages installed")
    return 0


def build_parser(with_roles: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the command line. Options come after the verb. People never see the internal roles."""
    parser = argparse.ArgumentParser(
        prog=command_name(), description="GPU serving for multi-turn LLM agents: start, connect, stop."
    )
    parser.add_argument("-V", "--version", action="version", version=f"agent-infra {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, *shared: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        for group in shared:
            for flag, details in _SHARED_OPTIONS[group].items():
                added.add_argument(flag, **details)
        return added

    _add_running_verbs(verb)
    _add_read_only_verbs(verb)
    added = verb("proxy", _run_proxy, "run only the proxy, in front of servers that are already running", "log")
    _add_proxy_options(added)
    added = verb("completion", _run_completion, "print a script that completes commands and options in a shell")
    added.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads it")
    if with_roles:
        _add_roles(verbs)
    return parser


def verb_parsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def completion_script(shell: str, command: str) -> str:
    """Return a script for ``shell`` that completes the verbs and options of ``command``."""
    verbs = verb_parsers(build_parser())
    options = {
        name: [(action.option_strings[-1], action.nargs != 0) for action in verb._actions if action.option_strings]
        for name, verb in verbs.items()
    }
    if shell == "fish":
        lines = [f"complete -c {command} -f"]
        for name, verb in verbs.items():
            text = shlex.quote(str(verb.description))
            lines.append(f"complete -c {command} -n __fish_use_subcommand -a {name} -d {text}")
            for word, value in options[name]:
                argument = " -r -F" if value else ""
                lines.append(f"complete -c {command} -n '__fish_seen_subcommand_from {name}' -l {word[2:]}{argument}")
        return "\n".join(lines)
    cases = (f'    {name}) words="{" ".join(word for word, _ in found)}" ;;' for name, found in options.items())
    lines = ["autoload -Uz compinit bashcompinit && compinit && bashcompinit"] if shell == "zsh" else []
    lines += ["_agent_infra() {", f'  local words="{" ".join(verbs)}"']
    lines += ['  [ "$COMP_CWORD" -gt 1 ] && case "${COMP_WORDS[1]}" in', *cases, '    *) words="" ;;', "  esac"]
    lines += ['  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))', "}"]
    return "\n".join([*lines, f"complete -o bashdefault -o default -F _agent_infra {command}"])


def _run_completion(arguments: argparse.Namespace) -> int:
    _say(completion_script(arguments.shell, command_name()))
    return 0


def _add_running_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs that start or stop something."""
    added = verb("up", _run_up, "start replicas and proxy; Ctrl-C stops everything", "config", "model", "port", "log")
    added.add_argument("--dashboard", action="store_true", help="also serve the page")
    added = verb("launch", _run_launch, "serve a model of the catalogue without a configuration", "port", "log", "site")
    added.add_argument("name", nargs="?", metavar="MODEL", help="its name or Hugging Face id; without it, list them")
    added.add_argument("--local", action="store_true", help="on this machine, even if it has Slurm")
    added.add_argument("--dry-run", action="store_true", help="only print the configuration")
    added.set_defaults(dashboard=False)
    added = verb("run", _run_run, "serve while a command runs, then stop everything", "config", "model", "port", "log")
    added.add_argument("--tasks", type=_at_least_one, metavar="N", help="announce the run with this many tasks")
    added.add_argument("--name", metavar="RUN", help="its name (default: run- and the time)")
    added.add_argument("command", nargs="*", metavar="-- COMMAND", help="what to run, with the proxy's URL and key")
    added = verb("start", _run_start, "start the missing replicas", "config", "model")
    added.add_argument("--detach", action="store_true", help="don't wait until they are ready")
    added.add_argument("--dry-run", action="store_true", help="only print what would be started")
    added = verb("connect", _run_connect, "run the proxy in front of the replicas", "config", "port", "log")
    added.add_argument("--background", action="store_true", help="detach from this terminal once the proxy is ready")
    added.add_argument("--dashboard", action="store_true", help="also serve the page")
    added = verb("scale", _run_scale, "change how many replicas of a model run", "config")
    added.add_argument("name", metavar="MODEL", help="the model's name")
    added.add_argument("count", metavar="N", type=_count, help="the number of replicas to run")
    added.add_argument("--detach", action="store_true", help="don't wait until new ones are ready")
    added.add_argument("--now", action="store_true", help="cut off the turns of removed replicas")
    added = verb("stop", _run_stop, "stop the deployment's proxy and replicas", "config")
    added.add_argument("--name", metavar="DEPLOYMENT", help="stop this deployment; needs no configuration")
    added.add_argument("--now", action="store_true", help="cut off the turns in flight")


def _add_read_only_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs that don't change what runs."""
    added = verb("init", _run_init, "ask Slurm and write a configuration", "site")
    added.add_argument("--model", metavar="NAME", help="a model of the catalogue; `launch` lists them")
    added.add_argument("--output", metavar="FILE", default="config.yaml", help="default %(default)s; never overwritten")
    added = verb("pull", _run_pull, "download the models to where the replicas read them", "config")
    added.add_argument("--model", metavar="NAME", help="only this model of the configuration")
    added = verb("doctor", _run_doctor, "check what can be checked before starting anything", "config")
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument("--job", action="store_true", help="also check a node, with a small Slurm job per model")
    added = verb("status", _run_status, "show replicas and proxy; exit code 3 when something is missing", "config")
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument("--watch", action="store_true", help="repeat until Ctrl-C")
    added = verb("logs", _run_logs, "print the logs of a replica or of the proxy", "config")
    added.add_argument("name", nargs="?", metavar="REPLICA|proxy", help="whose log (default: all)")
    added.add_argument("-f", "--follow", action="store_true", help="follow the log as it grows")
    added.add_argument("-n", "--lines", type=_count, default=100, help="how many lines from the end (default 100)")
    added = verb("dashboard", _run_dashboard, "serve the page that shows what the proxy does", "config")
    added.add_argument("--proxy", metavar="URL", help="a proxy other than the deployment's")
    added.add_argument("--port", dest="page_port", type=_port, metavar="P", help=f"default: from {PAGE_PORT} up")
    added.add_argument("--token-file", metavar="FILE", help="file with that proxy's key; or set AGENT_INFRA_TOKEN")
    _add_history_verbs(verb)
    added = verb("bundle", _run_bundle, "write the program as one file that can be copied")
    added.add_argument("--output", metavar="FILE", default="agent_infra.pyz", help="default %(default)s")


def _add_proxy_options(parser: argparse.ArgumentParser) -> None:
    defaults = ProxyConfig()
    parser.add_argument(
        "--backend", action="append", required=True, metavar="MODEL=HOST:PORT", help="a server; repeat for each"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="read its sections proxy, headers, analysis and otel; options override it"
    )
    parser.add_argument("--host", help=f"address to listen on (default {defaults.host})")
    parser.add_argument("--port", type=_port, help=f"default {defaults.port}; 0 = any free one")
    parser.add_argument("--strategy", choices=STRATEGY_NAMES, help="how to spread turns")
    parser.add_argument("--capture-text", type=_count, help="characters of prompt and answer to keep")
    parser.add_argument("--history", metavar="FILE", help='file for finished turns; "off" keeps none')


ROLES = ("serve", "fetch", "rank", "llama-cpp", "page", "relay", "tunnel", "proxy-job")


def _add_roles(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the internal roles, which only the program itself uses."""
    from agent_infra_core.node.roles import add_roles

    add_roles(verbs)
    page = verbs.add_parser("page")
    page.add_argument("--proxy", required=True)
    page.add_argument("--port", type=_port, required=True)
    page.set_defaults(run=_run_page)
    relay = verbs.add_parser("relay")
    relay.add_argument("--socket", required=True)
    relay.add_argument("--listener-fd", type=int, required=True)
    relay.set_defaults(run=lambda arguments: run_relay(arguments.socket, arguments.listener_fd))
    verbs.add_parser("tunnel").set_defaults(run=lambda _: run_tunnel())
    job = verbs.add_parser("proxy-job")
    job.add_argument("--name", required=True)
    job.add_argument("--log-format", default="text")
    job.set_defaults(run=_run_proxy_job, dashboard=False)


def parse_command_line(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises SystemExit, after a usage message, when it is invalid."""
    first = words[0] if words else ""
    parser = build_parser(with_roles=first in ROLES)
    if first.startswith("-") and first not in ("-h", "--help", "-V", "--version"):
        parser.error(f"{first}: options come after the verb, such as `{command_name()} status --config FILE`")
    if first and not first.startswith("-") and first not in (verbs := verb_parsers(parser)):
        parser.error(f"{first}: no such command{_nearest_key(first, verbs)}")
    return parser.parse_args(words)


def _count(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def moment(text: str, now: float) -> float:
    """Parse ``2h`` (ago; s, m, h, d or w), or a local date or time, into seconds since the epoch; or ValueError."""
    import datetime

    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if ago is not None:
        return now - float(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[ago[2]]
    return datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", text)).timestamp()


def _moment(text: str) -> float:
    """argparse type: see moment()."""
    try:
        return moment(text, time.time())
    except ValueError:
        words = f"{text!r} is not a time: write 30m, 2h, 3d (ago), or 2026-11-22 or 2026-11-22T16:30"
        raise argparse.ArgumentTypeError(words) from None


def _port(text: str) -> int:
    """argparse type: a TCP port, or 0 for any free one."""
    if _count(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (0 to 65535)")
    return int(text)


def _add_history_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    added = verb("export", _run_export, "print every finished turn, one per line", "config", "history")
    added.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default csv")
    added.add_argument("--session", metavar="ID", help="only this session's")
    added = verb("report", _run_report, "summarise a run in Markdown", "config", "history")
    added.add_argument("--html", metavar="FILE", help="write a page with charts instead, which opens without a network")
    added = verb("replay", _run_replay, "would another routing policy have been faster?", "config", "history")
    added.add_argument("--model", metavar="NAME", help="default: the one with the most turns")
    added.add_argument("--kv-tokens", type=_at_least_one, metavar="N", help="capacity of a replica's KV cache")


def _at_least_one(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if _count(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


# Options that several verbs take, by group.
_SHARED_OPTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "config": {"--config": {"metavar": "FILE", "help": "default: ./config.yaml, else the embedded default"}},
    "model": {
        "--model": {"metavar": "NAME", "help": "only this model of the configuration"},
        "--replicas": {"type": _at_least_one, "metavar": "N", "help": "instead of the configuration's"},
    },
    "site": {
        "--ssh": {"metavar": "[USER@]HOST[:PORT]", "help": "the cluster's login host"},
        "--replicas": {"type": _at_least_one, "metavar": "N", "help": "default 1"},
    },
    "port": {"--port": {"type": _port, "metavar": "P", "help": "instead of proxy.port; 0 = any free one"}},
    "log": {"--log-format": {"choices": ("text", "json"), "default": "text", "help": "of the proxy's log"}},
    "history": {
        "--since": {"type": _moment, "default": 0.0, "metavar": "TIME", "help": "such as 2h (ago) or 2026-11-22T16:30"},
        "--output": {"metavar": "FILE", "help": "default: standard output"},
        "--history": {"metavar": "FILE", "help": "instead of the deployment's own"},
    },
}


def _explain_missing(error: ModuleNotFoundError) -> NotInstalledError:
    """Return an error that lists all missing packages; re-raises ``error`` if it isn't about a missing package."""
    name = (error.name or "").partition(".")[0]
    if not name or name in sys.stdlib_module_names:
        raise error
    try:
        require_packages(PROGRAM_PACKAGES if name in PROGRAM_PACKAGES else (name,))
    except NotInstalledError as explained:
        return explained
    raise error  # the package is installed, but a part of it is missing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0 ok, 1 failed, 2 refused, 3 degraded, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: a terminal that can't show × must not fail
    arguments = parse_command_line(sys.argv[1:] if argv is None else argv)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code: int = arguments.run(arguments)
        return code
    except AgentInfraError as error:
        _say(f"error: {error}", error=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        _say(f"error: {_explain_missing(error)}", error=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails at exit
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fix = "; free some space there" if error.errno == errno.ENOSPC else ""
        _say(f"error: {where}{error.strerror or error}{fix}", error=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())

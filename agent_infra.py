#!/usr/bin/env python3
"""Agent Infra: GPU serving for multi-turn LLM agents.

``agent_infra.py up`` starts the replicas of a model, balances them behind one OpenAI-compatible streaming proxy and
follows every session and turn.  This one file plays every role of the program (operator, controller, relay, node,
library); each role loads only what it needs, inside the function that uses it, so that importing the module costs the
standard library and nothing else, and the node role runs wherever a bare Python 3.10 does.

Reading order: every section refers only to sections above it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import struct
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


# =====================================================================================================================
# Configuration: YAML → marshmallow → frozen dataclasses. Knows every key, its default and what it may be.
# The dataclasses are plain: the node role builds them from JSON without any third-party package.
# =====================================================================================================================

STRATEGY_NAMES = ("least_load", "round_robin", "least_connections", "least_latency")
ENGINE_NAMES = ("vllm", "llama_cpp", "command")
CLUSTER_TYPES = ("local",)
PACKAGED_MODEL = "smollm2-135m-instruct"

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
HEADER_PATTERN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}"


@dataclass(frozen=True)
class Rule:
    """What a value may be: bounds (inclusive but for ``above``), a choice, or a full-match pattern and its description."""

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
    api_key: str | None = _key(None, pattern=r"[\x21-\x7e]{8,}", allowed="at least 8 printable characters, no spaces")
    capture_text: int = _key(200, low=0, high=100_000)  # characters of prompt and answer kept per turn


@dataclass(frozen=True)
class ClusterConfig:
    """Where replicas run; ``name`` is the deployment: it names state, keys and replicas."""

    type: str = _key("local", choices=CLUSTER_TYPES)
    name: str = _key("default", pattern=NAME_PATTERN, allowed="letters, digits, '.', '_' and '-', at most 63")


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
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return parse_config(text, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """The configuration that a YAML text says, with ``${NAME}`` taken from ``environment``; raises ConfigError."""
    document = _read_yaml(text)
    if not isinstance(document, dict):
        raise ConfigError("a mapping of keys is needed, such as `models: [...]`; see configs/example.yaml")
    import marshmallow

    problems: list[str] = []
    expanded = _expand_environment(document, environment, "", problems)
    try:
        loaded = _schema_of(Config)().load(expanded)
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
    kind.__name__: kind for kind in (ProxyConfig, ClusterConfig, ModelConfig, HeadersConfig)
}
_SCALARS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string (in quotes, if it looks like a number)", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    "tuple[str, ...]": ("a list of strings", lambda value: isinstance(value, list) and _are_strings(value)),
    "Mapping[str, str]": (
        "a mapping of names to strings",
        lambda value: isinstance(value, dict) and _are_strings([*value, *value.values()]),
    ),
}


def _are_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


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
    annotation, _, optional = str(item.type).partition(" | ")
    messages = {"required": "is required", "null": "may not be null; leave it out for its default"}
    options: dict[str, Any] = {
        "required": item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING,
        "error_messages": messages,
    }
    if annotation in _SECTIONS:
        return fields.Nested(_schema_of(_SECTIONS[annotation]), **options)
    if annotation == "tuple[ModelConfig, ...]":
        messages["invalid"] = "a list is needed, with one entry a model"
        return fields.List(fields.Nested(_schema_of(ModelConfig)), **options)
    check = functools.partial(_check_scalar, annotation, item.metadata.get("rule", Rule()))
    return fields.Raw(validate=check, allow_none=optional == "None", **options)


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
        inner = ModelConfig if "ModelConfig" in annotation or isinstance(key, int) else _SECTIONS.get(annotation)
        yield from _describe_errors(below, _join(path, key), inner if isinstance(below, dict) else kind)


def _nearest_key(path: str, kind: type | None) -> str:
    """``; did you mean strategy?`` for a key that nearly is one of ``kind``, else the list of its keys."""
    names = [item.name for item in dataclasses.fields(kind or Config)]
    near = difflib.get_close_matches(path.rpartition(".")[2], names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(names))}"


def _build(kind: type, loaded: Mapping[str, Any]) -> Any:
    """The frozen dataclass that validated keys say; lists become tuples, whole numbers become floats where due."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name not in loaded:
            continue
        value, annotation = loaded[item.name], str(item.type)
        if annotation in _SECTIONS:
            value = _build(_SECTIONS[annotation], value)
        elif annotation == "tuple[ModelConfig, ...]":
            value = tuple(_build(ModelConfig, entry) for entry in value)
        elif isinstance(value, list):
            value = tuple(value)
        elif annotation == "float":
            value = float(value)
        values[item.name] = value
    return kind(**values)


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong with keys that are each valid: lines ``path: message``."""
    if not config.models:
        yield "models: at least one model is needed"
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


# =====================================================================================================================
# Engines (pure): a model's configuration → command line, environment, readiness, names of its metrics. No I/O.
# =====================================================================================================================


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


# =====================================================================================================================
# Wire (pure): HTTP heads, body framing, SSE, and the frames between controller and relay. Bytes in, plain values out.
# =====================================================================================================================

# Frames on the Unix socket between controller and relay: one byte of kind, four bytes of length, the payload (JSON).
FRAME_TABLE = b"T"  # controller → relay: {"settings": {...} | absent, "models": [name], "backends": [Backend], "pins"}
FRAME_STATS = b"S"  # controller → relay: the finished bytes of GET /stats
FRAME_HELLO = b"H"  # relay → controller, first of all: {"pid", "port", "started_at"}; carries the listening socket
FRAME_EVENTS = b"E"  # relay → controller: a list of turn events (see Tracking), oldest first
FRAME_GAUGES = b"G"  # relay → controller, once a second: see Gauges in Tracking
FRAME_REQUEST = b"R"  # relay → controller: what an operator asked for over HTTP, {"op": "drain"|"undrain", "backend"}
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


# =====================================================================================================================
# Tracking: turns, sessions, histograms, and the /stats document. The clock is an argument; no I/O.
# =====================================================================================================================


BUCKETS_PER_OCTAVE = 8  # a bucket is 9 % wide, so a percentile read from a histogram is off by 4.5 % at most


def histogram_bucket(value: float) -> int:
    """The histogram bucket of a duration in milliseconds: logarithmic, 0.01 ms and less in the lowest."""
    return math.floor(BUCKETS_PER_OCTAVE * math.log2(value)) if value > 0.01 else -54


@dataclass(frozen=True)
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
    kind: str = "started"


@dataclass(frozen=True)
class TurnSent:
    """The turn left the queue for a replica (again, when it was retried)."""

    turn: str
    at: float
    backend: str
    queue_ms: float
    kind: str = "sent"


@dataclass(frozen=True)
class TurnAnswering:
    """The first token (or, not streaming, the first byte) of the answer arrived."""

    turn: str
    at: float
    ttft_ms: float  # from being sent to the replica that answers
    kind: str = "answering"


@dataclass(frozen=True)
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
    kind: str = "finished"


@dataclass(frozen=True)
class SessionEnded:
    """The agent said that a session is over."""

    session: str
    at: float
    kind: str = "session_ended"


# =====================================================================================================================
# Node: the `serve` role, inside the job, with the engine's Python and the standard library only.
# =====================================================================================================================


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
class ReplicaFailure:
    """Why a replica failed: its class, the line that decides it, and what to do."""

    kind: str
    line: str
    hint: str


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
    stop_grace: float = 25.0  # s that the engine has to finish its turns after SIGTERM; below Slurm's KillWait


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
    def client_key(self) -> Path:
        return self.root / "api_key"

    @property
    def replica_key(self) -> Path:
        return self.root / "replica_key"

    @property
    def run(self) -> Path:
        """The run directory: specs/, replicas/, logs/. With Slurm it lies on the cluster's shared file system."""
        return self.root / "run"

    def log(self, name: str) -> Path:
        return self.run / "logs" / f"{name}.log"


def state_home(environment: Mapping[str, str]) -> Path:
    """Where all deployments keep their state (XDG base directory specification)."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "~"), ".local", "state")
    return Path(base).expanduser() / "agent-infra"


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


# =====================================================================================================================
# Relay: the data plane, one gevent process that relays and nothing else. Patched first of all, in its own entry.
# =====================================================================================================================


# =====================================================================================================================
# Controller: the control plane, plain Python: discovery, the relay's life, sessions, the /stats snapshot.
# =====================================================================================================================


# =====================================================================================================================
# Orchestration: what the command line and the library do with a deployment: start, connect, status, stop.
# =====================================================================================================================


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
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(proxy.host, proxy.host)  # noqa: S104 (the wildcard, named)
        base_url = f"http://{f'[{host}]' if ':' in host else host}:{proxy.port}/v1" if proxy.port else None
        return cls(session_id, task_id, client_id, loaded.headers, base_url=base_url, api_key=proxy.api_key)

    def get_headers(self) -> dict[str, str]:
        """The headers of the next request; the timings among them are spent by this call."""
        return self._identity | self._take_timings()

    def set_timing(self, pre_ms: float | None = None, post_ms: float | None = None) -> None:
        """Say the next request's timings, in place of what the blocks measured; None leaves one as it is."""
        for name, value in ((self._headers.timing_pre, pre_ms), (self._headers.timing_post, post_ms)):
            if value is None:
                continue
            if not 0 <= value < math.inf:
                raise ClientError(f"{name}: found {value}; allowed: milliseconds, 0 or more")
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

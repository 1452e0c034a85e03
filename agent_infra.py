#!/usr/bin/env python3
"""Agent Infra: GPU serving for multi-turn LLM agents.

``agent_infra.py up`` starts the replicas of a model, balances them behind one OpenAI-compatible streaming proxy and
follows every session and turn.  This one file plays every role of the program (operator, controller, relay, node,
library); each role loads only what it needs, inside the function that uses it, so that importing the module costs the
standard library and nothing else, and the node role runs wherever a bare Python 3.10 does.

Reading order: every section refers only to sections above it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

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


TurnEvent = TurnStarted | TurnSent | TurnAnswering | TurnFinished | SessionEnded
TURN_OUTCOMES = ("completed", "error", "cut", "aborted", "rejected")

# Bounds of what is kept. Nothing here grows with the number of turns, nor beyond these with that of sessions.
MAX_LIVE_SESSIONS = 20_000  # beyond: the one that was silent for longest is forgotten
SESSION_IDLE_S = 1800.0  # a session silent for this long is over
MAX_OPEN_TURNS = 50_000  # beyond, and after MAX_TURN_S: the oldest is forgotten (its finish still counts in totals)
MAX_TURN_S = 6 * 3600.0
FINISHED_TURNS_REMEMBERED = 10_000  # ids by which a second finish, or a start after it, is known for what it is
RECENT_TURNS = 100
HISTORY_POINTS = 300
HISTORY_STEP_S = 2.0
LISTED_SESSIONS = 200  # in /stats: those heard of last
LISTED_WAITING = 50
RECENT_S = 300.0  # what "recent" means for percentiles, shares and active sessions
RATE_S = 60.0  # what rates are taken over
LEAST_RATE_S = 5.0  # below this much time a rate is not told
SCHEMA_VERSION = 1  # of /stats
MAX_FIGURE = 1e12  # of a time, a duration or a count off the wire; so no sum ever becomes infinite
MAX_TEXT = 512  # characters kept of an id or a message off the wire (excerpts have their own bound, in the relay)


MAX_DURATION_MS = 2.0**30  # 12 days; whatever took longer is counted in the highest bucket
HIGHEST_BUCKET = histogram_bucket(MAX_DURATION_MS)
_BUCKETS = {str(bucket): bucket for bucket in range(histogram_bucket(0.0), HIGHEST_BUCKET + 1)}  # as JSON names them


def _is_figure(value: Any) -> TypeGuard[float]:
    """A finite number that a time, a duration or a count can be; NaN fails the comparison."""
    return type(value) in (int, float) and 0 <= value <= MAX_FIGURE


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_FIGURE


_EVENT_KINDS: Mapping[str, type[TurnEvent]] = {
    event.kind: event for event in (TurnStarted, TurnSent, TurnAnswering, TurnFinished, SessionEnded)
}
_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "Mapping[str, int]": (dict,),
}
_EVENT_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    kind: {item.name: _JSON_TYPES[str(item.type).removesuffix(" | None")] for item in dataclasses.fields(event)}
    for kind, event in _EVENT_KINDS.items()
}
_REQUIRED_FIELDS: Mapping[str, frozenset[str]] = {
    kind: frozenset(
        item.name
        for item in dataclasses.fields(event)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )
    for kind, event in _EVENT_KINDS.items()
}


def event_from_json(data: object) -> TurnEvent | None:
    """The turn event that a decoded JSON object says; None when it says none.

    Never raises: an unknown kind, or a required field that is missing or cannot be, gives None; an unknown field is
    left out, an optional one that cannot be gets its default, an unknown outcome counts as an error.
    """
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(kind, str) or kind not in _EVENT_KINDS:
        return None
    fields = _EVENT_FIELDS[kind]
    values: dict[str, Any] = {}
    # One flat loop, without a call a field: this runs for every field of every event of every turn.
    for name, value in data.items():
        value_type = type(value)
        if value_type not in fields.get(name, ()):
            continue
        if value_type is str:
            values[name] = value if len(value) <= MAX_TEXT or name in ("prompt", "answer") else value[:MAX_TEXT]
        elif value_type is dict:
            if all(bucket in _BUCKETS and _is_count(count) for bucket, count in value.items()):
                values[name] = value
        elif 0 <= value <= MAX_FIGURE:
            values[name] = value
    if not _REQUIRED_FIELDS[kind] <= values.keys():
        return None
    if kind == TurnFinished.kind and values["outcome"] not in TURN_OUTCOMES:
        values["outcome"] = "error"
    return _EVENT_KINDS[kind](**values)


class Histogram:
    """Durations in milliseconds in logarithmic buckets (``histogram_bucket``), 295 of them at most."""

    __slots__ = ("_buckets", "count", "sum_ms")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.sum_ms = 0.0

    def add(self, ms: float, count: int = 1) -> None:
        """Count a finite duration ``count`` times."""
        bucket = histogram_bucket(ms) if ms < MAX_DURATION_MS else HIGHEST_BUCKET
        self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self.count += count
        self.sum_ms += ms * count

    def add_buckets(self, counts: Mapping[str, int]) -> None:
        """Count what another process has put into buckets; each duration is taken for the middle of its bucket."""
        for name, count in counts.items():
            bucket = _BUCKETS[name]
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self.count += count
            self.sum_ms += _bucket_middle(bucket) * count

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` has counted."""
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self.count += other.count
        self.sum_ms += other.sum_ms

    @property
    def mean_ms(self) -> float | None:
        return self.sum_ms / self.count if self.count else None

    def percentile(self, q: float) -> float | None:
        """The duration in ms that a share ``q`` (0 to 1) does not exceed: its bucket's middle; None when empty."""
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= q * self.count:
                return _bucket_middle(bucket)
        return None


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
        self._slice = Histogram()
        self._older: list[tuple[int, Histogram]] = []  # (slice number, its durations)

    def slice(self) -> Histogram:
        """What to add a duration to that ends now."""
        number = int(self._clock() // self._slice_s)
        if number != self._number:
            # Slices of the future go too: the clock was set back.
            ended = [*self._older, (self._number, self._slice)]
            self._older = [entry for entry in ended if number - self._SLICES < entry[0] < number]
            self._number, self._slice = number, Histogram()
        return self._slice

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
    context_tokens: int | None = None  # prompt and answer of the last turn that told
    cached_tokens: int | None = None  # of the same turn
    tokens_in: int = 0
    tokens_out: int = 0

    def think_time_ms(self, arrival: float) -> float | None:
        """From the previous answer's end to ``arrival``; None for a first turn, or while another one is open."""
        if self.last_end is None or self.open_turns:
            return None
        return max(0.0, arrival - self.last_end) * 1000

    def finish(self, event: TurnFinished, at: float) -> None:
        """Add what a finished turn says."""
        self.turns += 1
        self.errors += event.outcome in ("error", "cut")
        self.last_turn, self.last_end = event.turn, max(at, self.last_end or at)
        self.backend = event.backend or self.backend
        self.wait_ms = _plus(self.wait_ms, event.queue_ms)
        self.inference_ms = _plus(self.inference_ms, event.inference_ms)
        self.tokens_in += event.prompt_tokens or 0
        self.tokens_out += event.completion_tokens or 0
        if event.prompt_tokens is not None:
            self.context_tokens = event.prompt_tokens + (event.completion_tokens or 0)
            self.cached_tokens = event.cached_tokens


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
    """The live sessions, the one heard of last at the end; at most ``max_live``, none idle for ``idle_s`` or more."""

    def __init__(self, max_live: int, idle_s: float) -> None:
        self._max_live = max_live
        self._idle_s = idle_s
        self._live: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self.ended = 0  # by the agent or by idleness
        self.evicted = 0  # for want of room

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._live.values())

    def open(self, event: TurnStarted, at: float) -> Session | None:
        """The session that a new turn belongs to, made where it is new; None for a turn that names none.

        Such a turn is a session of its own, and over with its answer: it is counted everywhere but here.
        """
        if not event.session:
            return None
        session = self._live.get(event.session)
        if session is None:
            session = Session(event.session, event.task, event.client, event.model, at)
            self._live[session.id] = session
            if len(self._live) > self._max_live:
                self._live.popitem(last=False)
                self.evicted += 1
        session.task, session.client = event.task or session.task, event.client or session.client
        session.model = event.model
        return session

    def touch(self, session: Session, at: float) -> None:
        """``session`` was heard of."""
        session.last_seen = max(at, session.last_seen)
        if self._live.get(session.id) is session:  # else it has ended since, and its last turn is still running
            self._live.move_to_end(session.id)

    def end(self, name: str) -> None:
        """The agent says that this session is over."""
        if self._live.pop(name, None) is not None:
            self.ended += 1

    def expire(self, now: float) -> None:
        """End the sessions that are idle for too long."""
        silent = itertools.takewhile(lambda session: session.last_seen <= now - self._idle_s, self._live.values())
        for session in [session for session in silent if not session.open_turns]:
            self.end(session.id)

    def latest(self, limit: int) -> list[Session]:
        """The sessions heard of last, latest first."""
        return list(itertools.islice(reversed(self._live.values()), limit))

    def count_active(self, now: float) -> int:
        """How many sessions have a turn in flight or were heard of in the last RECENT_S seconds."""
        return sum(1 for session in self if session.open_turns or session.last_seen > now - RECENT_S)


@dataclass(slots=True)
class OpenTurn:
    """What is known of a turn before it has finished."""

    started: TurnStarted
    session: Session | None
    pre_ms: float | None
    unaccounted_ms: float | None
    phase: str = "waiting"  # waiting | prefill | decoding
    backend: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    post_ms: float | None = None  # comes with the session's next turn


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
        self._finished[turn] = None
        if len(self._finished) > FINISHED_TURNS_REMEMBERED:
            self._finished.popitem(last=False)
        return True, self._take(turn)

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


class Pipeline:
    """Where the time of recent turns went. Shares are of the time of all of SHARED together; *ttft* is in inference."""

    PARTS = ("pre", "queue", "ttft", "inference", "post", "unaccounted")
    SHARED = ("pre", "queue", "inference", "post", "unaccounted")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._parts = {part: RecentHistogram(clock) for part in self.PARTS}

    def add(self, **durations_ms: float | None) -> None:
        """Add durations by part; None is "not known" and leaves no trace."""
        for part, ms in durations_ms.items():
            if ms is not None:
                self._parts[part].slice().add(ms)

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
    """Rates over the last RATE_S seconds from readings of ever-growing totals, taken about once a second."""

    def __init__(self) -> None:
        self._readings: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=300)

    def read(self, now: float, completed: int, tokens_out: int) -> None:
        """Note the totals of this moment."""
        if self._readings and now < self._readings[-1][0]:
            self._readings.clear()  # the clock was set back
        self._readings.append((now, completed, tokens_out))

    def rates(self, now: float, completed: int, tokens_out: int) -> dict[str, float | None]:
        """``{turns_per_minute, tokens_per_second}`` (completed turns, tokens of answers); None before LEAST_RATE_S."""
        while self._readings and self._readings[0][0] < now - RATE_S - 0.5:  # a reading comes each second, or so
            self._readings.popleft()
        at, completed_then, tokens_then = self._readings[0] if self._readings else (now, 0, 0)
        if now - at < LEAST_RATE_S:
            return {"turns_per_minute": None, "tokens_per_second": None}
        return {
            "turns_per_minute": round((completed - completed_then) * 60 / (now - at), 2),
            "tokens_per_second": round((tokens_out - tokens_then) / (now - at), 2),
        }


class RelayCounters:
    """Counters that start at zero with each relay, summed over all relays; a sum never falls."""

    def __init__(self, *names: str) -> None:
        self.sums = dict.fromkeys(names, 0)
        self._last = dict.fromkeys(names, 0)

    def read(self, readings: Mapping[str, Any]) -> None:
        """Take the relay's present counts. One below the last reading comes from a relay that started since."""
        for name, last in self._last.items():
            count = readings.get(name)
            if _is_count(count):
                self.sums[name] += count - last if count >= last else count
                self._last[name] = count

    def restart(self) -> None:
        """The next reading comes from a new relay."""
        self._last = dict.fromkeys(self._last, 0)


class BackendFigures:
    """What was measured of one backend: turns sent to it, summed over relays, and its recent latencies."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = RelayCounters("requests", "errors")
        self.latency = RecentHistogram(clock)  # sent → last byte, of completed turns
        self.ttft = RecentHistogram(clock)
        self.gap = RecentHistogram(clock)  # between chunks of a stream

    def finish(self, event: TurnFinished) -> None:
        """Add a turn that this backend ended."""
        if event.outcome == "completed" and event.inference_ms is not None:
            self.latency.slice().add(event.inference_ms)
        if event.ttft_ms is not None:
            self.ttft.slice().add(event.ttft_ms)
        if event.gaps:
            self.gap.slice().add_buckets(event.gaps)


_TOTAL_OF_OUTCOME = {
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


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> Any:
    """A JSON value with None in the place of NaN and the infinities, which Python reads but JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _turn_row(event: TurnFinished, turn: OpenTurn | None) -> dict[str, Any]:
    """A finished turn as it stands in recent_turns."""
    started = turn.started if turn else None
    return {
        "turn": event.turn,
        "session": started.session if started else None,
        "task": started.task if started else None,
        "client": started.client if started else None,
        "model": started.model if started else None,
        "path": started.path if started else None,
        "stream": started.stream if started else None,
        "backend": event.backend,
        "started_at": started.at if started else None,
        "finished_at": event.at,
        "outcome": event.outcome,
        "status": event.status,
        "retries": event.retries,
        "pre_ms": _rounded(turn.pre_ms) if turn else None,
        "queue_ms": _rounded(event.queue_ms),
        "ttft_ms": _rounded(event.ttft_ms),
        "inference_ms": _rounded(event.inference_ms),
        "post_ms": _rounded(turn.post_ms) if turn else None,
        "unaccounted_ms": _rounded(turn.unaccounted_ms) if turn else None,
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "cached_tokens": event.cached_tokens,
        "tokens_estimated": event.estimated,
        "finish_reason": event.finish_reason,
        "error": event.error,
        "prompt": started.prompt if started else "",
        "answer": event.answer,
    }


def _client_rows(sessions: Iterable[Session], phases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Sessions by client, in their order. What a client calls itself is ``id`` or ``id command…``."""
    rows: dict[str | None, dict[str, Any]] = {}
    for session in sessions:
        name, _, command = (session.client or "").strip().partition(" ")
        row = rows.setdefault(session.client, {"id": name or None, "command": command.strip() or None, "sessions": []})
        row["sessions"].append(_session_row(session, phases.get(session.id, "idle")))
    return list(rows.values())


def _session_row(session: Session, state: str) -> dict[str, Any]:
    return {
        "id": session.id,
        "task": session.task,
        "model": session.model,
        "backend": session.backend,
        "state": state,  # idle | waiting | prefill | decoding
        "turns": session.turns,
        "errors": session.errors,
        "last_seen": session.last_seen,
        "idle_since": session.last_end if state == "idle" else None,
        "pre_ms": _rounded(session.pre_ms),
        "wait_ms": _rounded(session.wait_ms),
        "inference_ms": _rounded(session.inference_ms),
        "post_ms": _rounded(session.post_ms),
        "unaccounted_ms": _rounded(session.unaccounted_ms),
        "context_tokens": session.context_tokens,
        "cached_tokens": session.cached_tokens,
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
        "tunnel": None,
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
    known = [value for value in values if _is_count(value)]
    return sum(known) if known else None


class BackendTable:
    """The figures of every backend that was heard of since the last ``rows``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._figures: dict[str, BackendFigures] = {}

    def figures(self, backend: str) -> BackendFigures:
        """The figures of one backend, empty ones where it is new."""
        if backend not in self._figures:
            self._figures[backend] = BackendFigures(self._clock)
        return self._figures[backend]

    def relay_restarted(self) -> None:
        for figures in self._figures.values():
            figures.counters.restart()

    def rows(
        self,
        records: Iterable[Mapping[str, Any]],
        table: Iterable[Backend],
        gauges: Mapping[str, Any],
        sessions: Mapping[str | None, int],
    ) -> list[dict[str, Any]]:
        """A row for each backend that has a record or is routed to; the figures of all others are forgotten."""
        known = {record["replica"]: _finite(record) for record in records}
        routed = {backend.id: backend for backend in table}
        self._figures = {name: self.figures(name) for name in {**known, **routed}}
        return [
            {
                **_replica_row(known.get(name, {}), routed.get(name), _as_mapping(gauges.get(name))),
                **figures.counters.sums,
                "latency_ms": _percentiles(figures.latency.read(), 50, 95, 99),
                "ttft_ms": _percentiles(figures.ttft.read(), 50, 95, 99),
                "gap_ms": _percentiles(figures.gap.read(), 50, 95, 99),
                "sessions": sessions.get(name, 0),
            }
            for name, figures in self._figures.items()
        ]


class StatsDocument(TypedDict):
    """The body of GET /stats. Times are s since the epoch; None (null) is "not known"; no figure is ever NaN."""

    snapshot_age_ms: int  # stays the first key: the relay writes the age over it, in the finished bytes
    schema_version: int
    now: float
    uptime_seconds: float  # of the controller; totals count from its start
    strategy: str
    totals: dict[str, int]  # requests = completed + errors + aborted + rejected
    throughput: dict[str, Any]  # rates over the last minute; history[]: one point each HISTORY_STEP_S
    models: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    queue: dict[str, Any]
    sessions: dict[str, int]  # counts: live, active, listed, ended, evicted
    clients: list[dict[str, Any]]  # the listed sessions by client; their *_ms and tokens_* are sums over their turns
    recent_turns: list[dict[str, Any]]  # finished, latest first
    pipeline: dict[str, dict[str, float | None]]
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
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._recent: collections.OrderedDict[str, tuple[TurnFinished, OpenTurn | None]] = collections.OrderedDict()
        self._pipeline = Pipeline(clock)
        self._wait = RecentHistogram(clock, RATE_S)  # queue and inference of completed turns: what an agent waits
        self._throughput = Throughput()
        self._history: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_POINTS)
        self._backends = BackendTable(clock)
        self._relay = RelayCounters("requests", "errors", "retries", "aborted", "rejected", "events_dropped")
        self._relay_restarts = 0
        self._gauges: Mapping[str, Any] = {}

    def observe(self, event: TurnEvent) -> None:
        """Take an event of the relay. One that comes twice, or after its turn's finish, changes nothing."""
        at = min(event.at, self._clock())
        if isinstance(event, SessionEnded):
            self._sessions.end(event.session)
        elif isinstance(event, TurnStarted):
            self._start(event, at)
        elif isinstance(event, TurnFinished):
            self._finish(event, at)
        elif (turn := self._turns.open.get(event.turn)) is not None:
            if isinstance(event, TurnSent):
                turn.phase, turn.backend, turn.queue_ms, turn.ttft_ms = "prefill", event.backend, event.queue_ms, None
            else:
                turn.phase, turn.ttft_ms = "decoding", event.ttft_ms
            if turn.session is not None:
                turn.session.backend = turn.backend or turn.session.backend
                self._sessions.touch(turn.session, at)

    def sample(self, gauges: Mapping[str, Any]) -> None:
        """Take the relay's gauges (FRAME_GAUGES), once a second; what is missing or cannot be is not known.

        ``{"at", "backends": {id: {"healthy", "reason", "in_flight", "requests", "errors", "load": digest | None}},
        "queue": {"pending", "in_flight", "oldest_ms", "waiting": [...]}, "counters": {...}, "rss_bytes",
        "connections"}``.
        """
        now = self._clock()
        self._gauges = _as_mapping(_finite(gauges))
        self._relay.read(_as_mapping(self._gauges.get("counters")))
        for backend, gauge in _as_mapping(self._gauges.get("backends")).items():
            self._backends.figures(backend).counters.read(_as_mapping(gauge))
        self._turns.forget_lost(now)
        self._sessions.expire(now)
        self._throughput.read(now, self._totals["completed"], self._totals["tokens_out"])
        if not self._history or now // HISTORY_STEP_S != self._history[-1]["at"] // HISTORY_STEP_S:
            self._history.append(self._history_point(now))

    def relay_restarted(self) -> None:
        """The relay died and another takes its place: its open turns are over, its counters start at zero."""
        now = self._clock()
        for name, turn in list(self._turns.open.items()):
            waited_ms = max(0.0, now - turn.started.at) * 1000 if turn.queue_ms is None else turn.queue_ms
            error = "the relay ended during this turn"
            self._finish(TurnFinished(name, now, "cut", 0, turn.backend, waited_ms, turn.ttft_ms, error=error), now)
        self._relay.restart()
        self._backends.relay_restarted()
        self._relay_restarts += 1
        self._gauges = {}

    def pins(self) -> dict[str, str]:
        """Session → the backend that has its KV cache, for the table of a relay that starts."""
        return {session.id: session.backend for session in self._sessions if session.backend is not None}

    def snapshot(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], strategy: str) -> StatsDocument:
        """The /stats document of this moment.

        ``records`` are the replicas' records as `serve` writes them (ReplicaRecord, as JSON); ``table`` is what the
        relay routes by, so also backends without a record. What was measured of any other backend is forgotten.
        """
        now = self._clock()
        sessions = collections.Counter(session.backend for session in self._sessions)
        rows = self._backends.rows(records, table, _as_mapping(self._gauges.get("backends")), sessions)
        listed = self._sessions.latest(LISTED_SESSIONS)
        rates = self._throughput.rates(now, self._totals["completed"], self._totals["tokens_out"])
        return StatsDocument(
            snapshot_age_ms=0,
            schema_version=SCHEMA_VERSION,
            now=now,
            uptime_seconds=round(max(0.0, now - self._started_at), 3),
            strategy=strategy,
            totals=dict(self._totals),
            throughput={**rates, "history": list(self._history)},
            models=_model_rows(rows),
            backends=rows,
            queue=self._queue(),
            sessions={
                "live": len(self._sessions),
                "active": self._sessions.count_active(now),
                "listed": len(listed),
                "ended": self._sessions.ended,
                "evicted": self._sessions.evicted,
            },
            clients=_client_rows(listed, self._turns.phases()),
            recent_turns=[_turn_row(event, turn) for event, turn in reversed(self._recent.values())],
            pipeline=self._pipeline.document(),
            relay={
                **self._relay.sums,
                "restarts": self._relay_restarts,
                "sampled_at": self._gauges.get("at"),
                "rss_bytes": self._gauges.get("rss_bytes"),
                "connections": self._gauges.get("connections"),
            },
        )

    def _start(self, event: TurnStarted, at: float) -> None:
        if self._turns.knows(event.turn):
            return
        session = self._sessions.open(event, at)
        gap_ms = session.think_time_ms(at) if session else None
        pre_ms, unaccounted_ms = split_think_time(gap_ms, event.pre_ms, event.post_ms)
        self._pipeline.add(pre=pre_ms, post=event.post_ms, unaccounted=unaccounted_ms)
        if session is not None:
            session.pre_ms = _plus(session.pre_ms, pre_ms)
            session.post_ms = _plus(session.post_ms, event.post_ms)
            session.unaccounted_ms = _plus(session.unaccounted_ms, unaccounted_ms)
            self._sessions.touch(session, at)
            _, previous = self._recent.get(session.last_turn, (None, None))
            if previous is not None and event.post_ms is not None:
                previous.post_ms = event.post_ms
        self._turns.add(OpenTurn(event, session, pre_ms, unaccounted_ms))

    def _finish(self, event: TurnFinished, at: float) -> None:
        is_first, turn = self._turns.close(event.turn)
        if not is_first:
            return
        self._totals["requests"] += 1
        self._totals[_TOTAL_OF_OUTCOME[event.outcome]] += 1
        self._totals["retries"] += event.retries
        self._totals["tokens_in"] += event.prompt_tokens or 0
        self._totals["tokens_out"] += event.completion_tokens or 0
        self._totals["cached_tokens"] += event.cached_tokens or 0
        self._pipeline.add(queue=event.queue_ms, ttft=event.ttft_ms, inference=event.inference_ms)
        if event.outcome == "completed" and event.inference_ms is not None:
            self._wait.slice().add(event.queue_ms + event.inference_ms)
        if event.backend is not None:
            self._backends.figures(event.backend).finish(event)
        if turn is not None and turn.session is not None:
            turn.session.finish(event, at)
            self._sessions.touch(turn.session, at)
        self._recent[event.turn] = event, turn
        if len(self._recent) > RECENT_TURNS:
            self._recent.popitem(last=False)

    def _queue(self) -> dict[str, Any]:
        queue = _as_mapping(self._gauges.get("queue"))
        waiting = queue.get("waiting")
        return {
            **{name: queue.get(name) for name in ("pending", "in_flight", "oldest_ms")},
            "waiting": waiting[:LISTED_WAITING] if isinstance(waiting, list) else [],
        }

    def _history_point(self, now: float) -> dict[str, Any]:
        queue = _as_mapping(self._gauges.get("queue"))
        return {
            "at": now,
            **self._throughput.rates(now, self._totals["completed"], self._totals["tokens_out"]),
            "in_flight": queue.get("in_flight"),
            "pending": queue.get("pending"),
            "active_sessions": self._sessions.count_active(now),
            "latency_ms": _percentiles(self._wait.read(), 50, 95),
        }


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


# =====================================================================================================================
# Command line
# =====================================================================================================================

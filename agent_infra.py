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
import errno
import functools
import heapq
import hmac
import io
import json
import math
import os
import re
import resource
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

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


@dataclass(frozen=True)
class RouteRequest:
    """What routing knows about a turn: replicas that it must not be sent to (again)."""

    excluded: frozenset[str] = frozenset()


ANYWHERE = RouteRequest()


def _rank_round_robin(view: BackendView) -> tuple[float, float, int]:
    """The least recently chosen."""
    return 0.0, 0.0, view.last_chosen


def _rank_least_connections(view: BackendView) -> tuple[float, float, int]:
    """Fewest turns in flight from this relay."""
    return view.in_flight, 0.0, view.last_chosen


def _rank_least_latency(view: BackendView) -> tuple[float, float, int]:
    """Lowest decayed mean latency; one that has no sample yet goes first."""
    return -1.0 if view.latency_ms is None else view.latency_ms, 0.0, view.last_chosen


def _rank_least_load(view: BackendView) -> tuple[float, float, int]:
    """(own in flight + others' work) / capacity + 10 · max(0, KV usage − 0.9); then the lowest GPU utilisation.

    Own turns are counted as they come and go, so the figure does not age between two reports of the replica; only what
    others run there is as old as the last report.  A full KV cache weighs as much as a whole capacity of turns.
    """
    work = (view.in_flight + view.foreign_work) / (view.capacity or 1)
    return work + 10 * max(0.0, view.kv_usage - 0.9), view.gpu_utilization, view.last_chosen


# A strategy is a rank: the lowest wins, its last item breaks ties in favour of the least recently chosen.
STRATEGIES: Mapping[str, Callable[[BackendView], tuple[float, float, int]]] = {
    "least_load": _rank_least_load,
    "round_robin": _rank_round_robin,
    "least_connections": _rank_least_connections,
    "least_latency": _rank_least_latency,
}

ViewT = TypeVar("ViewT", bound=BackendView)


def choose_backend(views: Iterable[ViewT], request: RouteRequest, strategy: str, now: float) -> ViewT | None:
    """The replica that takes the turn now, or None when none of them may or has a free slot."""
    free = [
        view
        for view in views
        if view.accepts_work
        and view.busy_until <= now
        and (not view.capacity or view.in_flight < view.capacity)
        and view.id not in request.excluded
    ]
    if len(free) < 2:
        return free[0] if free else None
    return min(free, key=STRATEGIES[strategy])


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


MAX_HEAD_BYTES = 64 << 10
MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_CHUNK_LINE_BYTES = 4 << 10
MAX_TRAILER_LINES = 64
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

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?\r\n")
_FIELD = re.compile(rb"\r\n([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r]*)")
_CONTROL_BYTES = bytes(byte for byte in (*range(0x20), 0x7F) if byte not in b"\t\r\n")


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


@dataclass
class RequestHead:
    """The head of one request. Names are in lower case; ``fields`` has the last of several values of one name."""

    method: bytes
    target: bytes
    version: int  # 1 = HTTP/1.1, 0 = HTTP/1.0
    pairs: list[tuple[bytes, bytes]]
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: it comes in chunks
    keeps_alive: bool

    def text(self, name: bytes, limit: int = 256) -> str | None:
        """The field ``name`` as text, None where it is missing or empty."""
        value = self.fields.get(name)
        return value.decode("utf-8", "replace").strip()[:limit] or None if value else None


def parse_request_head(head: bytes) -> RequestHead:
    """The request head in ``head``, its empty line included; WireError unless it can be read in one way only."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise WireError("the request line is not HTTP/1.1")
    if line.end() > MAX_REQUEST_LINE_BYTES:
        raise WireError("the request line is too long", 414)
    lines = head.count(b"\r\n")
    found = _FIELD.findall(head)
    if (
        len(found) != lines - 2  # a line that is no field: folded, nameless, or with a space before its colon
        or head.count(b"\n") != lines
        or head.count(b"\r") != lines
        or len(head.translate(None, _CONTROL_BYTES)) != len(head)
    ):
        raise WireError("a header line is malformed")
    pairs = [(name.lower(), value) for name, value in found]
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        if any(name in fields and names.count(name) > 1 for name in _ONLY_ONCE):
            raise WireError("a header that may stand once stands twice")
    version = line[3] == b"1"
    if version and b"host" not in fields:
        raise WireError("the Host header is missing")
    connection = fields[b"connection"].lower() if b"connection" in fields else b""
    return RequestHead(
        line[1],
        line[2],
        int(version),
        pairs,
        fields,
        _body_length(fields, version),
        version and b"close" not in connection,
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
    dropped = _NOT_FORWARDED
    if b"connection" in request.fields:
        dropped = dropped | {name.strip() for name in request.fields[b"connection"].lower().split(b",")}
    lines = [b"%b %b HTTP/1.1" % (request.method, target), b"host: " + host]
    lines += [name + b": " + value for name, value in request.pairs if name not in dropped]
    if key:
        lines.append(b"authorization: Bearer " + key.encode("latin-1"))
    lines.append(b"content-length: %d\r\n\r\n" % length)
    return b"\r\n".join(lines)


@dataclass
class AnswerHead:
    """The head of a replica's answer."""

    status: int
    line: bytes  # the status line, as HTTP/1.1
    pairs: list[tuple[bytes, bytes]]
    fields: dict[bytes, bytes]
    is_reusable: bool  # the connection may carry another request once this answer is over

    @property
    def is_event_stream(self) -> bool:
        return self.fields.get(b"content-type", b"").lower().startswith(b"text/event-stream")

    def decoder(self) -> BodyDecoder:
        """What reads the body; WireError when the head contradicts itself."""
        if self.status in (204, 304):
            return BodyDecoder(0)
        if b"chunked" in self.fields.get(b"transfer-encoding", b"").lower():
            return BodyDecoder(None)
        length = self.fields.get(b"content-length")
        if length is None:
            return BodyDecoder(BodyDecoder.UNTIL_CLOSE)
        if not length.strip().isdigit():
            raise WireError("the replica's Content-Length is not a number")
        return BodyDecoder(int(length))


def parse_answer_head(head: bytes) -> AnswerHead:
    """The answer head in ``head``, its empty line included; WireError when it is none."""
    line = _STATUS_LINE.match(head)
    if line is None:
        raise WireError("the replica does not speak HTTP/1.1")
    pairs = [(name.lower(), value) for name, value in _FIELD.findall(head)]
    fields = dict(pairs)
    reusable = line[1] == b"1" and b"close" not in fields.get(b"connection", b"").lower()
    return AnswerHead(int(line[2]), b"HTTP/1.1" + head[8 : line.end() - 2], pairs, fields, reusable)


def returned_head(answer: AnswerHead, extra: bytes, length: int | None, chunked: bool, closes: bool) -> bytes:
    """The answer head that goes to the client: ``extra`` is whole header lines, ``length`` None where unknown."""
    lines = [answer.line]
    lines += [name + b": " + value for name, value in answer.pairs if name not in _NOT_RETURNED]
    if length is not None:
        lines.append(b"content-length: %d" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked")
    if closes:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n" + extra + b"\r\n"


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


def holds_whole_chunks(data: bytes) -> bool:
    """Whether ``data``, which starts between two chunks, is nothing but complete chunks, none of them the last."""
    at = 0
    try:
        while at < len(data):
            line = data.index(b"\r\n", at)
            size = int(data[at:line], 16)
            if size <= 0:
                return False
            at = line + size + 4
    except ValueError:
        return False
    return at == len(data)


@dataclass
class AnswerDigest:
    """What tracking keeps of an answer."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""

    def add(self, document: Any) -> None:
        """Take over what ``document`` says: a JSON answer, or one event of a stream, of any of the API's shapes."""
        if not isinstance(document, dict):
            return
        for nested in ("response", "message"):  # events of /v1/responses and of /v1/messages
            if isinstance(document.get(nested), dict):
                self.add(document[nested])
        delta = document.get("delta")
        reason = document.get("stop_reason") or (isinstance(delta, dict) and delta.get("stop_reason"))
        for choice in document.get("choices") or ():
            reason = reason or (isinstance(choice, dict) and choice.get("finish_reason"))
        self.finish_reason = reason if isinstance(reason, str) else self.finish_reason
        if error := document.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            self.error = str(message or error)[:500]
        usage = document.get("usage")
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        cached = usage.get(
            "cache_read_input_tokens", details.get("cached_tokens") if isinstance(details, dict) else None
        )
        self.prompt_tokens = _first_count(usage.get("prompt_tokens"), usage.get("input_tokens"), self.prompt_tokens)
        output = usage.get("completion_tokens"), usage.get("output_tokens")
        self.completion_tokens = _first_count(*output, self.completion_tokens)
        self.cached_tokens = _first_count(cached, self.cached_tokens)


def _first_count(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


_EVENT = re.compile(rb".*?\r?\n\r?\n|.+", re.DOTALL)
_EVENT_TEXT = re.compile(rb'"(?:content|text|delta)":\s?"((?:[^"\\]|\\.)*)"')
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")


def event_document(event: bytes) -> Any:
    """The JSON document in an SSE event's data lines; None where there is none."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines)) if lines else None
    except ValueError:
        return None


class EventStream:
    """What a replica's SSE answer becomes on its way to the client, however the bytes are split.

    Only whole events leave it, so that an error event can follow at any time.  Whole chunks of whole events pass
    verbatim; the rest is taken out of its framing and put into new chunks.  A usage event that the client did not ask
    for is taken out.  ``fault`` is set when the answer, however orderly its end, is not complete.
    """

    __slots__ = (
        "_captured", "_cuts_usage", "_held", "_is_clean", "_needs_done", "_passes_verbatim", "_tail", "_texts",
        "_to_chunks", "_wanted_text", "decoder", "events", "fault", "has_excess", "is_over",
    )  # fmt: skip

    def __init__(
        self, decoder: BodyDecoder, *, to_chunks: bool, cuts_usage: bool, needs_done: bool, wanted_text: int
    ) -> None:
        self.decoder = decoder
        self.events = 0  # seen so far, counted roughly: by their data lines
        self.fault: str | None = None
        self.is_over = self.has_excess = False
        self._to_chunks, self._cuts_usage, self._needs_done = to_chunks, cuts_usage, needs_done
        self._passes_verbatim = decoder.is_chunked and to_chunks
        self._is_clean = True  # nothing held, and between two chunks
        self._held = b""
        self._tail: deque[bytes] = deque(maxlen=4)  # the last pieces, in chunks: usage and finish reason are there
        self._texts: list[bytes] = []  # the answer's first words, still as JSON strings
        self._captured, self._wanted_text = 0, wanted_text

    def feed(self, data: bytes) -> bytes:
        """The bytes to send for these that came; WireError when the replica's framing is broken."""
        if (
            self._is_clean
            and self._passes_verbatim
            and data.endswith(b"\n\n\r\n")
            and not (self._cuts_usage and b'"usage":' in data)
            and b"abort" not in data
            and holds_whole_chunks(data)
        ):
            self._note(data)
            return data
        return self._feed_events(data)

    def close(self) -> bytes:
        """The connection closed: the end of an answer that lasts until then, a fault of any other."""
        if self.decoder.is_until_close and not self.is_over:
            return self._end(self._held)
        self.fault = self.fault or "the replica died"
        return b""

    def failure(self, event: bytes) -> bytes:
        """The bytes that end the stream with an error event, behind all that was sent."""
        return encode_chunk(event) + LAST_CHUNK if self._to_chunks else event

    def digest(self) -> AnswerDigest:
        """What the last events and the first words say."""
        digest = AnswerDigest()
        pieces: list[bytes] = []
        BodyDecoder(None).feed(b"".join(self._tail), 0, pieces)
        for event in _EVENT.findall(b"".join(pieces)):
            digest.add(event_document(event))
        if self._texts:
            with contextlib.suppress(ValueError):
                digest.text = json.loads(b'"' + b"".join(self._texts) + b'"')[: self._wanted_text]
        return digest

    def _note(self, chunks: bytes) -> None:
        self._tail.append(chunks)
        self.events += chunks.count(b"data:")
        if self._captured < self._wanted_text:
            for text in _EVENT_TEXT.findall(chunks):
                self._texts.append(text)
                self._captured += len(text)

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
        self._is_clean = not self._held and self.decoder.is_between_chunks
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
        self._note(encode_chunk(events))
        if b"abort" in events or (self._cuts_usage and b'"usage":' in events):
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


RECEIVE_BYTES = 64 << 10
APP_BODY_BYTES = 64 << 10
BUFFERED_ANSWER_BYTES = 8 << 20  # an answer that is no stream and longer than this is passed on as it comes
DIGESTED_ANSWER_BYTES = 4 << 20  # usage of a longer one is not read
IDLE_CLIENT_S = 300.0  # between two requests of one connection
HEAD_S = 15.0  # from a head's first byte to its last
BODY_S = 30.0  # without a byte of the body
LINGER_S = 2.0  # that a refused client gets to read why
SWEEP_S = 0.1  # how late a deadline may be noticed
PROBE_S = 5.0
EJECT_AFTER = 3  # transport errors in a row
FIRST_EJECTION_S = 0.5  # doubled with each ejection in a row, up to the health check interval
BUSY_S = 0.5  # that a replica gets no work after 429 or 503 without Retry-After
RETRY_SHARE = 0.1  # of requests; the budget's bounds are RETRY_FLOOR and ten times that
RETRY_FLOOR = 100.0
EVENT_BATCH = 500
EVENT_BATCH_S = 0.1
MAX_BUFFERED_EVENTS = 50_000


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
        from gevent.monkey import get_original

        self.hub = gevent.get_hub()
        self.loop = self.hub.loop
        self.current: Callable[[], Any] = gevent.getcurrent
        self.spawn: Callable[..., Any] = gevent.spawn
        self.sleep: Callable[[float], None] = gevent.sleep
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


@dataclass
class Turn:
    """One request of a client on its way through the relay; what tracking says of it is read from here."""

    id: str
    arrived: float  # monotonic, like all times here
    arrived_at: float  # s since the epoch
    model: str
    path: bytes
    session: str | None = None
    is_stream: bool = False
    cuts_usage: bool = True
    wanted_text: int = 0
    tokens: int = 0  # of the prompt, roughly
    replica: Replica | None = None  # that holds a slot for it
    route: RouteRequest = ANYWHERE
    charged_s: float = 0.0  # service that its session was charged in advance
    sent: float = 0.0
    queue_ms: float = 0.0
    first: float = 0.0  # byte (of a stream: event) of the answer
    deaths: int = 0  # replicas that died with it
    retries: int = 0
    status: int = 0
    outcome: str = "aborted"
    backend: str | None = None
    error: str | None = None
    digest: AnswerDigest | None = None
    events: int = 0
    gaps: dict[int, int] = field(default_factory=dict)
    ended: float = 0.0

    @property
    def is_anthropic(self) -> bool:
        return self.path.startswith(b"/v1/messages")


class Upstream:
    """A connection to a replica, watched for as long as it lives; idle, it goes when the replica closes it."""

    __slots__ = ("exchange", "is_reused", "replica", "sock", "watcher")

    def __init__(self, replica: Replica, sock: Any, reactor: Reactor) -> None:
        self.replica, self.sock = replica, sock
        self.exchange: Exchange | None = None
        self.is_reused = False
        self.watcher = reactor.watch_reads(sock, self.on_readable)

    def on_readable(self) -> None:
        if self.exchange is not None:
            self.exchange.on_readable()
        else:
            self.replica.forget(self)  # closed by the replica, or it sends what nobody asked for

    def close(self) -> None:
        self.watcher.stop()
        self.watcher.close()
        self.sock.close()


class Replica:
    """One backend as the relay sees it: its row, its connections, its load and its health. A routing view."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.id = backend.id
        self.host = f"{backend.host}:{backend.port}".encode("ascii")
        self.in_flight = self.requests = self.errors = 0
        self.last_chosen = 0
        self.latency_ms: float | None = None
        self.busy_until = 0.0
        self.foreign_work = 0
        self.gpu_utilization = self.kv_usage = 0.0
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
        self.capacity = backend.slots
        self.update(backend)

    def update(self, backend: Backend) -> None:
        """Take over a new row of the same replica, or a change of its state."""
        self.backend = backend
        if self.override == backend.state:
            self.override = None
        state = self.override or backend.state
        is_away = isinstance(self.load, dict) and self.load.get("state") in (
            "sleeping",
            "draining",
            "stopped",
            "failed",
        )
        self.accepts_work = state == "ready" and self.health != "down" and not is_away
        self.capacity = 1 if self.health == "trial" else backend.slots

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
        """Take over a /load digest."""
        self.load = load if isinstance(load, dict) else None
        digest: dict[str, Any] = self.load or {}
        work = int(digest.get("running") or 0) + int(digest.get("waiting") or 0)
        self.foreign_work = max(0, work - self.in_flight)
        self.kv_usage = float(digest.get("kv_usage") or 0.0)
        gpus = [gpu.get("utilization") or 0.0 for gpu in digest.get("gpus") or () if isinstance(gpu, dict)]
        self.gpu_utilization = sum(gpus) / len(gpus) if gpus else 0.0
        self.update(self.backend)

    def reserve(self, tokens: int) -> None:
        """Promise room for a prompt at once: the replica's own report comes too late for the next choice."""
        self.in_flight += 1
        self.requests += 1
        if self.load and self.load.get("kv_capacity_tokens"):
            self.kv_usage += tokens / float(self.load["kv_capacity_tokens"])

    def take_idle(self) -> Upstream | None:
        if not self.idle:
            return None
        upstream, _ = self.idle.popitem()
        upstream.is_reused = True
        return upstream

    def forget(self, upstream: Upstream) -> None:
        """Drop an idle connection."""
        self.idle.pop(upstream, None)
        upstream.close()

    def close(self) -> None:
        """It left the table: no more probes, no idle connections; turns that it has go on."""
        for greenlet in self.greenlets:
            greenlet.kill(block=False)
        while self.idle:
            self.forget(next(iter(self.idle)))


class Exchange:
    """One attempt: a request sent to one replica, its answer moved to the client by event-loop callbacks.

    ``result`` says how it ended: ``answered`` (whole, in ``body``, nothing sent to the client yet) · ``streamed`` (the
    client has it all) · ``cut`` (broke off, the client was told by an error event) · ``torn`` (broke off, only closing
    can tell the client) · ``lost`` (the replica went before the client got anything) · ``timeout`` (it was silent
    likewise) · ``gone`` (the client left).
    """

    __slots__ = (
        "_backlog", "_client", "_decoder", "_head_bytes", "_is_sent", "_pending_head", "_pieces", "_relay", "_replica",
        "_size", "_timeout_s", "_to_chunks", "_turn", "_upstream", "_write_watcher", "body", "error", "events", "head",
        "is_raw", "received", "result",
    )  # fmt: skip

    def __init__(self, relay: Relay, client: ClientConnection, turn: Turn, replica: Replica) -> None:
        self._relay, self._client, self._turn, self._replica = relay, client, turn, replica
        self._timeout_s = relay.settings.proxy.request_timeout
        self._to_chunks = client.version == 1
        self._upstream: Any = None
        self._backlog: Any = None  # what the client's socket did not take yet
        self._write_watcher: Any = None
        self.result: str | None = None
        self.error = ""
        self.received = False  # any byte of an answer
        self._is_sent = False
        self._head_bytes = self._pending_head = self.body = b""
        self.head: Any = None  # AnswerHead, once it came
        self._decoder: Any = None
        self.events: Any = None  # EventStream, where the answer is one
        self.is_raw = False
        self._pieces: list[bytes] = []
        self._size = 0

    def run(self, head: bytes, body: bytes | bytearray) -> str:
        """Send and relay; TransportError when the replica could not be reached and got nothing of the request."""
        upstream = self._replica.take_idle()
        if upstream is None:
            return self._converse(self._connect(), head, body)
        result = self._converse(upstream, head, body)
        if result != "lost" or self.received:
            return result
        # The replica closed the idle connection under us, or died of this very request: a new connection tells.
        try:
            upstream = self._connect()
        except TransportError as error:
            self.error = str(error)
            return "lost"
        return self._converse(upstream, head, body)

    def _connect(self) -> Upstream:
        sock = self._client.connect(self._replica.backend.host, self._replica.backend.port)
        return Upstream(self._replica, sock, self._relay.reactor)

    def _converse(self, upstream: Upstream, head: bytes, body: bytes | bytearray) -> str:
        client = self._client
        self._upstream, upstream.exchange = upstream, self
        self.result = None
        client.deadline = time.monotonic() + self._timeout_s
        client.exchange = self
        try:
            self._send_request(head, body)
            while self.result is None:
                if client.gone:
                    self.result = "gone"
                elif time.monotonic() >= client.deadline:
                    self._time_out()
                else:
                    client.park()
        finally:
            upstream.exchange = client.exchange = None
            self._stop_writing()
            if self.result in ("answered", "streamed") and self._is_reusable():
                self._replica.idle[upstream] = None
            else:
                upstream.close()
        return self.result or "gone"

    def _send_request(self, head: bytes, body: bytes | bytearray) -> None:
        sock, client = self._upstream.sock, self._client
        total = len(head) + len(body)
        try:
            sent = sock.sendmsg((head, body))
            while sent < total and self.result is None:
                client.wait_writable(sock)
                if client.gone or time.monotonic() >= client.deadline:
                    return
                rest = memoryview(head)[sent:] if sent < len(head) else memoryview(body)[sent - len(head) :]
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(rest)
                    client.deadline = time.monotonic() + self._timeout_s
        except OSError:
            return  # what the replica said before it hung up, or that it hung up, is for on_readable
        self._is_sent = sent == total

    def _is_reusable(self) -> bool:
        has_excess = self.events.has_excess if self.events is not None else False
        return self._is_sent and self.head.is_reusable and not has_excess and not self._decoder.is_until_close

    # Callbacks of the event loop: they never block.

    def on_readable(self) -> None:
        """The replica's socket has bytes, or its end."""
        try:
            data = self._upstream.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            if not data:
                self._on_closed()
            elif self.events is not None:
                self._relay_events(data)
            elif self.head is not None:
                self._take_body(data, 0)
            else:
                self._take_head(data)
        except WireError as error:
            self.fail(str(error))

    def _take_head(self, data: bytes) -> None:
        self.received = True
        self._head_bytes = data = self._head_bytes + data if self._head_bytes else data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > MAX_HEAD_BYTES:
                raise WireError("the replica's head is too long")
            return None
        head = parse_answer_head(data[:end])
        if head.status < 200:  # an interim answer: the real one follows
            self._head_bytes = b""
            return self._take_head(data[end:]) if len(data) > end else None
        self.head, self._decoder = head, head.decoder()
        if head.is_event_stream and head.status < 400:
            self._start_stream(head)
            if len(data) > end:
                self._relay_events(data[end:])
            return None
        if head.fields.get(b"content-type", b"").startswith(b"audio/"):
            self._start_raw(head)
        return self._take_body(data, end)

    def _start_stream(self, head: AnswerHead) -> None:
        turn = self._turn
        self.events = EventStream(
            self._decoder,
            to_chunks=self._to_chunks,
            cuts_usage=turn.cuts_usage,
            needs_done=turn.path in (b"/v1/chat/completions", b"/v1/completions"),
            wanted_text=turn.wanted_text,
        )
        self._pending_head = returned_head(
            head, self._relay.answer_fields(turn), None, self._to_chunks, not self._to_chunks
        )

    def _start_raw(self, head: AnswerHead) -> None:
        """Pass on as it comes what is neither a stream of events nor short enough to be kept for a retry."""
        self.is_raw = True
        length = head.fields.get(b"content-length")
        self._to_chunks = self._to_chunks and length is None
        fields = self._relay.answer_fields(self._turn)
        closes = not self._to_chunks and length is None
        self._pending_head = returned_head(head, fields, int(length) if length else None, self._to_chunks, closes)

    def _relay_events(self, data: bytes) -> None:
        events, turn = self.events, self._turn
        now = time.monotonic()
        before = turn.ended
        out = events.feed(data)
        self._client.deadline = now + self._timeout_s
        if events.events:
            if turn.first:
                bucket = histogram_bucket((now - before) * 1000.0)
                turn.gaps[bucket] = turn.gaps.get(bucket, 0) + 1
            else:
                turn.first = now
                self._relay.note_answering(turn)
            turn.ended = now
        if events.fault is not None:
            self.fail(events.fault, out)
        elif out:
            self._send(out, "streamed" if events.is_over else None)

    def _take_body(self, data: bytes, start: int) -> None:
        if not self._turn.first:
            self._turn.first = time.monotonic()
            self._relay.note_answering(self._turn)
        self._decoder.feed(data, start, self._pieces)
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
        self._client.deadline = time.monotonic() + self._timeout_s
        if out or self._decoder.is_over:
            self._send(out, "streamed" if self._decoder.is_over else None)

    def _finish_body(self) -> None:
        self.body = b"".join(self._pieces)
        self.end("answered")

    def _on_closed(self) -> None:
        if self._decoder is not None and self._decoder.is_until_close:
            if self.events is not None:
                out = self.events.close()
                if self.events.fault is not None:
                    return self.fail(self.events.fault, out)
                return self._send(out, "streamed")
            self._decoder.is_over = True
            return self._send_raw() if self.is_raw else self._finish_body()
        return self.fail("the replica died")

    def _send(self, out: bytes, result: str | None) -> None:
        """Send to the client; ``result`` ends the exchange once all of it is sent. A slow client pauses the replica."""
        if self._pending_head:
            out, self._pending_head = self._pending_head + out, b""
        try:
            sent = self._client.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._client.gone = True
            return self.end("gone")
        if sent == len(out):
            return self.end(result) if result else None
        self._backlog = memoryview(out)[sent:]
        self._upstream.watcher.stop()
        self._write_watcher = self._relay.reactor.loop.io(self._client.sock.fileno(), 2)
        self._write_watcher.start(self._on_writable, result)
        return None

    def _on_writable(self, result: str | None) -> None:
        try:
            sent = self._client.sock.send(self._backlog)
        except BlockingIOError:
            return None
        except OSError:
            self._client.gone = True
            return self.end("gone")
        self._client.deadline = time.monotonic() + self._timeout_s
        self._backlog = self._backlog[sent:]
        if self._backlog:
            return None
        self._stop_writing()
        if result:
            return self.end(result)
        self._upstream.watcher.start(self._upstream.on_readable)
        return None

    def _stop_writing(self) -> None:
        self._backlog = None
        if self._write_watcher is not None:
            self._write_watcher.stop()
            self._write_watcher.close()
            self._write_watcher = None

    def _time_out(self) -> None:
        if self._backlog is not None:  # it is the client that does not take its answer
            self._client.gone = True
            self.result = "gone"
            return
        self.fail(f"the replica was silent for {self._timeout_s:g} s", result="timeout")

    def fail(self, error: str, out: bytes = b"", result: str = "lost") -> None:
        """The answer broke off; ``out`` is what had come of it. Once the client has a part, it is told."""
        self.error = error
        has_begun = (self.events is not None or self.is_raw) and not self._pending_head
        if not has_begun:
            self.end(result)
        elif self.events is None or self._backlog is not None:
            self.end("torn")
        else:
            self._send(out + self.events.failure(error_event(error, self._turn.is_anthropic)), "cut")

    def end(self, result: str) -> None:
        self.result = result
        self._client.wake()


class ClientConnection:
    """One client's socket: reads requests, one after the other, and owns the greenlet that serves them."""

    def __init__(self, relay: Relay, sock: Any, peer: tuple[Any, ...]) -> None:
        self.relay, self.sock, self.peer = relay, sock, peer
        self.version = 1
        self.buffer = b""
        self.gone = False
        self.deadline = math.inf  # the sweep wakes the greenlet then
        self.exchange: Exchange | None = None
        self.is_trusted: bool | None = None  # whether the socket's owner needs no key; asked once
        self._parked: Any = None
        self._is_reading = False
        self._is_watching = True
        self._held_bytes = 0
        self._has_unread_body = False
        self._is_anthropic = False
        self._keeps_alive = True
        self._turn: Turn | None = None
        self._watcher = relay.reactor.watch_reads(sock, self._on_readable)

    # Waiting: see Reactor.

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
        sock = self.relay.reactor.new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
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
        if self._is_reading:
            return self.wake()
        try:
            if self.sock.recv(1, socket.MSG_PEEK):
                self._watcher.stop()  # the next request, ahead of its time: it stays in the socket
                self._is_watching = False
                return None
        except BlockingIOError:
            return None
        except OSError:
            pass
        self._watcher.stop()
        self.gone = True
        return self.wake()

    def _receive(self, seconds: float, what: str, into: memoryview | None = None) -> Any:
        """Bytes from the client (their number, with ``into``): none at its end; WireError 408 when they are late."""
        if not self._is_watching:
            self._watcher.start(self._on_readable)
            self._is_watching = True
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

    # Serving.

    def serve(self) -> None:
        """Serve requests until one of the sides has had enough; the connection's greenlet runs this."""
        try:
            while self._serve_one() and not self.relay.is_stopping:
                pass
        except (ClientGone, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, never the relay
            self.relay.log(
                "error", f"a connection failed: {type(error).__name__}: {error}", trace=traceback.format_exc()
            )
        finally:
            self.relay.connections.discard(self)
            self._watcher.stop()
            self._watcher.close()
            self.sock.close()

    @property
    def is_idle(self) -> bool:
        return self._is_reading and not self.buffer and not self._has_unread_body

    def cut(self, reason: str) -> None:
        """End what the connection is doing, telling the client why where it can still be told; event loop only."""
        if self.exchange is not None:
            self.exchange.fail(reason, result="timeout")
        else:
            self.leave()

    def leave(self) -> None:
        """End an idle connection; only for event-loop callbacks."""
        self.gone = True
        self.wake()

    def _serve_one(self) -> bool:
        """Serve one request; whether another one may follow."""
        self._turn, self._is_anthropic, self._has_unread_body = None, False, False
        try:
            request = self._read_head()
            if request is None:
                return False
            self.version, self._keeps_alive = request.version, request.keeps_alive
            self._has_unread_body = request.length != 0
            return self._answer(request) and request.keeps_alive
        except RequestError as refusal:
            return self._refuse(refusal)
        finally:
            self.relay.buffered_bytes -= self._held_bytes
            self._held_bytes = 0

    def _answer(self, request: RequestHead) -> bool:
        path, _, query = request.target.partition(b"?")
        route = split_inference_path(path) if request.method == b"POST" else None
        self._is_anthropic = b"/v1/messages" in path
        if path != b"/health":
            self.relay.authorize(self, request)
        if b"websocket" in request.fields.get(b"upgrade", b"").lower():
            raise RequestError(501, "WebSocket is not supported; the same models answer over HTTP", closes=True)
        if route is None:
            body = self._read_body(request, APP_BODY_BYTES)
            self.send_all(self.relay.app.answer(request, path, query, bytes(body)))
            return True
        body = self._read_body(request, int(self.relay.settings.proxy.max_body_mb * (1 << 20)))
        model, path = route
        turn = self._turn = self.relay.begin(request, model, path, body)
        try:
            target = path + b"?" + query if query else path
            return Delivery(self.relay, self, turn, request, target, body).run()
        except RequestError as refusal:
            turn.status, turn.error = refusal.status, str(refusal)
            turn.outcome = "rejected" if refusal.status in (429, 503) else "error"
            raise
        finally:
            self.relay.finish(turn, request)

    def _refuse(self, refusal: RequestError) -> bool:
        if self._turn is None:
            self.relay.counters["rejected"] += 1
        extra = self.relay.answer_fields(self._turn) if self._turn is not None else b""
        if refusal.retry_after_s:
            extra += b"retry-after: %d\r\n" % refusal.retry_after_s
        if refusal.status == 401:
            extra += b"www-authenticate: Bearer\r\n"
        closes = refusal.closes or self._has_unread_body or not self._keeps_alive
        body = error_document(refusal.status, str(refusal), refusal.code, self._is_anthropic)
        self.send_all(plain_answer(refusal.status, body, extra=extra, closes=closes))
        if closes:
            self._linger()
        return not closes

    def _linger(self) -> None:
        """Take what the client still sends, for a while: closing on unread bytes would reset the connection, and the
        answer with it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(WireError, ClientGone):
            while (left := end - time.monotonic()) > 0 and self._receive(left, "the end"):
                pass

    def _read_head(self) -> RequestHead | None:
        """The next request's head, its bytes taken off the buffer; None when the client is through."""
        started = time.monotonic()
        while True:
            if self.buffer:
                while self.buffer.startswith(
                    b"\r\n"
                ):  # an empty line before a request is to be ignored (RFC 9112, 2.2)
                    self.buffer = self.buffer[2:]
                end = self.buffer.find(b"\r\n\r\n") + 4
                if 4 <= end <= MAX_HEAD_BYTES:
                    head, self.buffer = self.buffer[:end], self.buffer[end:]
                    return parse_request_head(head)
                if len(self.buffer) > MAX_HEAD_BYTES:
                    raise WireError("the head is too long", 431)
                if self.buffer.count(b"\n") != self.buffer.count(b"\r\n"):
                    raise WireError("a line ends in a bare line feed")
                left = started + HEAD_S - time.monotonic()
            else:
                left = IDLE_CLIENT_S
            try:
                data = self._receive(left, "the rest of the head")
            except WireError:
                if not self.buffer:
                    return None
                raise
            if not data:
                return None
            if not self.buffer:
                started = time.monotonic()
            self.buffer += data

    def _read_body(self, request: RequestHead, limit: int) -> bytes | bytearray:
        """The request's body, out of its framing, taken off the buffer; RequestError 413 or 429 beyond the limits."""
        length = request.length
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

    def _read_chunks(self, limit: int) -> bytes:
        decoder, pieces = BodyDecoder(None), list[bytes]()
        while True:
            counted = len(pieces)
            end = decoder.feed(self.buffer, 0, pieces)
            self.buffer = self.buffer[end:]
            self._hold(sum(map(len, pieces[counted:])), limit)
            if decoder.is_over:
                return b"".join(pieces)
            self.buffer = self._receive(BODY_S, "the rest of the body")
            if not self.buffer:
                raise ClientGone

    def _hold(self, size: int, limit: int) -> None:
        """Count ``size`` more bytes of this body against both limits."""
        if self._held_bytes + size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", closes=True)
        if self.relay.buffered_bytes + size > self.relay.settings.proxy.max_buffered_mb * (1 << 20):
            raise RequestError(429, "too many bytes of requests are held already", retry_after_s=1, closes=True)
        self._held_bytes += size
        self.relay.buffered_bytes += size


class Delivery:
    """Takes one turn to an answer: through the queue, to a replica, and to another where the rules allow it."""

    def __init__(
        self,
        relay: Relay,
        client: ClientConnection,
        turn: Turn,
        request: RequestHead,
        target: bytes,
        body: bytes | bytearray,
    ) -> None:
        self._relay, self._client, self._turn = relay, client, turn
        self._request, self._target, self._body = request, target, body
        self._unreachable = 0

    def run(self) -> bool:
        """Deliver; whether the client's connection may carry another request. Raises RequestError or ClientGone."""
        while True:
            replica = self._relay.admission.acquire(self._turn, self._client)
            try:
                verdict = self._attempt(replica)
            finally:
                self._relay.admission.release(self._turn)
            if verdict is not None:
                return verdict

    def _attempt(self, replica: Replica) -> bool | None:
        """One replica's turn at it: None to go on with another, else as ``run``."""
        turn, relay = self._turn, self._relay
        relay.note_sent(turn, replica)
        head = forwarded_head(self._request, self._target, replica.host, replica.backend.key, len(self._body))
        exchange = Exchange(relay, self._client, turn, replica)
        try:
            result = exchange.run(head, self._body)
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
        if result == "gone":
            turn.status = turn.status if turn.first else 0
            raise ClientGone
        if result == "streamed":
            now = turn.ended = time.monotonic()
            replica.note_success((now - turn.sent) * 1000.0, now)
            turn.outcome = "completed"
            return not (
                self._client.version == 0 or (exchange.is_raw and b"content-length" not in self._fields(exchange))
            )
        replica.note_failure(exchange.error, is_dead=False)
        if result == "timeout":
            raise RequestError(
                504, f"{exchange.error}; it may be overloaded, or the answer too long for request_timeout"
            )
        turn.outcome, turn.error = "cut", exchange.error
        return result == "cut" and self._client.version == 1

    def _fields(self, exchange: Exchange) -> Mapping[bytes, bytes]:
        return exchange.head.fields if exchange.head is not None else {}

    def _take_answer(self, replica: Replica, exchange: Exchange) -> bool | None:
        """A whole answer, of which the client has nothing yet: pass it on, unless it says to go elsewhere."""
        turn, head = self._turn, exchange.head
        if head.status in (429, 503):
            after = head.fields.get(b"retry-after", b"").strip()
            replica.busy_until = time.monotonic() + (min(float(after), 60.0) if after.isdigit() else BUSY_S)
            return self._start_over()
        if len(exchange.body) <= DIGESTED_ANSWER_BYTES:
            turn.digest = self._relay.codec.digest(exchange.body, turn.wanted_text)
        now = turn.ended = time.monotonic()
        if turn.digest is not None and turn.digest.finish_reason == "abort":
            return self._after_death(replica, "the engine was shut down", is_proven=True)
        if head.status >= 500:
            replica.errors += 1
            if turn.deaths == 0 and not self._relay.watch.is_alive(replica):
                return self._after_death(replica, f"it answered {head.status} and died", is_proven=True)
        else:
            replica.note_success((now - turn.sent) * 1000.0, now)
        turn.status, turn.outcome = head.status, "completed" if head.status < 400 else "error"
        if head.status >= 400 and turn.digest is not None:
            turn.error = turn.digest.error
        keeps_alive = self._request.keeps_alive
        extra = self._relay.answer_fields(turn)
        self._client.send_all(returned_head(head, extra, len(exchange.body), False, not keeps_alive) + exchange.body)
        return keeps_alive

    def _try_elsewhere(self, replica: Replica, error: str) -> bool | None:
        """It got nothing of the request: any other replica may, within the budget."""
        replica.note_failure(error, is_dead=True)
        self._unreachable += 1
        self._exclude(replica)
        if self._unreachable > self._relay.settings.proxy.max_retries or not self._relay.take_retry():
            raise RequestError(503, f"no replica of {self._turn.model} could be reached: {error}", retry_after_s=1)
        self._turn.retries += 1
        return self._start_over()

    def _after_death(self, replica: Replica, error: str, is_proven: bool) -> bool | None:
        """It had the request and gave no answer: send it once more, and only if that replica is dead.

        A prompt that kills engines must not kill them all.
        """
        is_dead = is_proven or not self._relay.watch.is_alive(replica)
        replica.note_failure(error, is_dead=is_dead)
        self._turn.deaths += 1
        self._exclude(replica)
        if not is_dead:
            raise RequestError(502, f"replica {replica.id} broke off without an answer: {error}", code="replica_lost")
        if self._turn.deaths > 1 or not self._relay.take_retry():
            message = f"replica {replica.id} died with this request, as one did before; it is not sent again"
            raise RequestError(
                502, message if self._turn.deaths > 1 else f"replica {replica.id}: {error}", code="replica_lost"
            )
        self._turn.retries += 1
        return self._start_over()

    def _exclude(self, replica: Replica) -> None:
        self._turn.route = RouteRequest(self._turn.route.excluded | {replica.id})

    def _start_over(self) -> bool | None:
        turn = self._turn
        turn.first = turn.ended = 0.0
        turn.digest = None
        return None


class Admission:
    """Gives replicas' slots to turns. Owns the queue of every model and what sessions were served lately."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._queues: dict[str, list[tuple[float, int, Turn, ClientConnection]]] = {}  # heaps
        self._attained = AttainedService()
        self._mean_service_s = 1.0
        self._choices = 0
        self.pending = 0

    def acquire(self, turn: Turn, client: ClientConnection) -> Replica:
        """A replica with a slot for ``turn``, after waiting where that may help; raises RequestError, ClientGone."""
        key = turn.arrived
        if turn.session is not None and not turn.charged_s:
            turn.charged_s = self._mean_service_s
            key = queue_key(
                self._attained.charge(turn.session, turn.charged_s, turn.arrived),
                turn.arrived,
                self._relay.settings.proxy.queue_timeout,
            )
        if not self._queues.get(turn.model):  # else it would overtake those who wait
            replica = self._choose(turn)
            if replica is not None:
                return replica
        return self._wait(turn, client, key)

    def release(self, turn: Turn) -> None:
        """The turn's slot is free again."""
        replica, turn.replica = turn.replica, None
        if replica is not None:
            replica.in_flight -= 1
            if self._queues.get(turn.model):
                self.dispatch(turn.model)

    def settle(self, turn: Turn) -> None:
        """Correct what the session was charged in advance by what its turn really took."""
        took = max(0.0, turn.ended - turn.sent) if turn.sent and turn.ended else 0.0
        if took:
            self._mean_service_s += 0.05 * (took - self._mean_service_s)
        if turn.session is not None and turn.charged_s:
            self._attained.charge(turn.session, took - turn.charged_s, time.monotonic())

    def outlook(self, model: str, route: RouteRequest = ANYWHERE) -> str:
        """What waiting may bring: ``slot`` (all are busy), ``loading`` (one is on its way), or ``nothing``."""
        pool = self._relay.pools.get(model, ())
        if any(replica.accepts_work and replica.id not in route.excluded for replica in pool):
            return "slot"
        return "loading" if model in self._relay.loading else "nothing"

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
            if self._choose(entry[2]) is None:  # the free ones are those that it was at already
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
                if self.outlook(model) == "nothing":
                    for entry in queue:
                        self._relay.reactor.loop.run_callback(entry[3].wake)

    def waiting(self) -> list[Turn]:
        """All that wait, the longest first."""
        return sorted((entry[2] for queue in self._queues.values() for entry in queue), key=lambda turn: turn.arrived)

    def _choose(self, turn: Turn) -> Replica | None:
        relay = self._relay
        replica = choose_backend(relay.pools.get(turn.model, ()), turn.route, relay.strategy, time.monotonic())
        if replica is not None:
            self._choices += 1
            replica.last_chosen = self._choices
            replica.reserve(turn.tokens)
            turn.replica = replica
        return replica

    def _wait(self, turn: Turn, client: ClientConnection, key: float) -> Replica:
        settings = self._relay.settings.proxy
        if self.outlook(turn.model, turn.route) != "nothing" and self.pending >= settings.max_queue and not turn.sent:
            raise RequestError(429, f"{self.pending} requests wait already; try again later", retry_after_s=1)
        self._choices += 1
        entry = (key, self._choices, turn, client)
        queue = self._queues.setdefault(turn.model, [])
        heapq.heappush(queue, entry)
        self.pending += 1
        try:
            return self._wait_for_slot(turn, client, settings.queue_timeout)
        except BaseException:
            self.release(turn)  # a slot may have come in the very moment of giving up
            raise
        finally:
            if entry in queue:
                queue.remove(entry)
                heapq.heapify(queue)
                self.pending -= 1

    def _wait_for_slot(self, turn: Turn, client: ClientConnection, timeout_s: float) -> Replica:
        since = turn.arrived
        try:
            while turn.replica is None:
                if client.gone:
                    raise ClientGone
                outlook, now = self.outlook(turn.model, turn.route), time.monotonic()
                if outlook == "nothing":
                    raise RequestError(503, f"no replica of {turn.model} is there to answer", retry_after_s=1)
                if outlook == "loading":
                    since = now
                if now >= since + timeout_s:
                    raise RequestError(503, f"no slot came free within {timeout_s:g} s", retry_after_s=1)
                client.deadline = since + timeout_s
                client.park()
            return turn.replica
        finally:
            client.deadline = math.inf


class Codec:
    """The JSON that is read or written for every request, by msgspec: typed, so that what is not needed is skipped."""

    def __init__(self) -> None:
        import msgspec

        self._error: type[Exception] = msgspec.MsgspecError
        self.encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode
        self.convert: Callable[..., Any] = msgspec.convert
        routed = [(name, Any, None) for name in ("model", "stream", "stream_options")]
        words = [("messages", list[msgspec.Raw], ()), ("prompt", Any, None), ("input", Any, None)]
        answered = [(name, Any, None) for name in ("usage", "choices", "stop_reason", "error", "content", "output")]
        self._request = msgspec.json.Decoder(msgspec.defstruct("RoutedBody", routed)).decode
        self._worded_request = msgspec.json.Decoder(msgspec.defstruct("WordedBody", routed + words)).decode  # type: ignore[operator]
        self._answer = msgspec.json.Decoder(msgspec.defstruct("AnswerBody", answered)).decode

    def request(self, body: bytes | bytearray, wants_text: bool) -> Any:
        """A request's fields that routing needs (``model``, ``stream``, ``stream_options``), and with ``wants_text``
        those that its words stand in; None when the body is no JSON object."""
        for decode in (self._worded_request, self._request) if wants_text else (self._request,):
            with contextlib.suppress(self._error):
                return decode(body)
        return None

    def last_words(self, fields: Any, limit: int) -> str:
        """The start of the last user message, or of the prompt."""
        for message in reversed(getattr(fields, "messages", ())):
            if b'"user"' in bytes(message):
                document = self.decode(message)
                return plain_text(document.get("content") if isinstance(document, dict) else None)[:limit]
        return plain_text(getattr(fields, "prompt", None) or getattr(fields, "input", None))[:limit]

    def digest(self, body: bytes, wanted_text: int) -> AnswerDigest | None:
        """What tracking keeps of a whole answer; None where it is no JSON object."""
        try:
            answer: Any = self._answer(body)
        except self._error:
            return None
        digest = AnswerDigest()
        names = ("usage", "choices", "stop_reason", "error")
        digest.add({name: getattr(answer, name) for name in names})
        if wanted_text:
            words: Any = answer.content or answer.output
            if isinstance(answer.choices, list) and answer.choices and isinstance(answer.choices[0], dict):
                choice = answer.choices[0]
                words = (choice.get("message") or {}).get("content") or choice.get("text")
            digest.text = plain_text(words)[:wanted_text]
        return digest


def plain_text(content: Any) -> str:
    """The words of a message's content: a string, or the text of its parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return plain_text(content.get("text") or content.get("content"))
    if isinstance(content, list) and not (content and isinstance(content[0], int)):
        return " ".join(filter(None, (plain_text(part) for part in content[:20])))
    return ""


class ControlChannel:
    """The Unix socket to the controller: the newest one to connect is served, events wait for it when there is none."""

    def __init__(self, relay: Relay, path: str, listener: Any) -> None:
        self._relay, self._listener = relay, listener
        self._events: deque[Any] = deque()
        self._controller: Any = None
        self.events_dropped = 0
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
        started_at = time.time()
        while True:
            controller, _ = self._server.accept()
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
            self._controller = controller
            self._relay.reactor.spawn(self._read, controller)

    def _read(self, controller: Any) -> None:
        reader = FrameReader()
        try:
            while data := controller.recv(1 << 20):
                for kind, payload in reader.feed(data):
                    self._relay.take_frame(kind, payload)
        except (OSError, ValueError) as error:
            self._relay.log("warning", f"the controller's connection broke: {error}")
        finally:
            if self._controller is controller:
                self._controller = None
                self._relay.log("info", "the controller is gone; the last table stays in force")
            controller.close()

    def add(self, event: Any) -> None:
        """Queue a turn event for the next batch."""
        self._events.append(event)
        if len(self._events) > MAX_BUFFERED_EVENTS:
            self._events.popleft()
            self.events_dropped += 1

    def add_request(self, request: Mapping[str, str]) -> None:
        """Tell the controller what an operator asked for; it is lost when there is none."""
        payload = json.dumps(request).encode()
        self._relay.reactor.spawn(self.send, FRAME_REQUEST, payload)

    def flush(self) -> None:
        """Send all events that wait; those of a batch that did not go out wait on."""
        while self._events and self._controller is not None:
            batch = [self._events.popleft() for _ in range(min(EVENT_BATCH, len(self._events)))]
            if not self.send(FRAME_EVENTS, self._relay.codec.encode(batch)):
                self._events.extendleft(reversed(batch))
                return

    def send(self, kind: bytes, payload: bytes) -> bool:
        """Send one frame; whether a controller took it. Blocks this greenlet (alone) while the controller is slow."""
        controller = self._controller
        if controller is None:
            return False
        try:
            controller.sendall(encode_frame(kind, payload))
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class RelaySettings:
    """What the controller's first table says once."""

    proxy: ProxyConfig
    headers: HeadersConfig
    log_format: str = "text"
    drain_seconds: float = 10.0


class Relay:
    """The data plane's process: its clients, replicas, counters, and what the controller said last."""

    def __init__(self, socket_path: str, listener_fd: int) -> None:
        from gevent.event import Event

        self.reactor = Reactor()
        self.codec = Codec()
        self.listener = self.reactor.new_socket(fileno=listener_fd)
        self.listener.setblocking(False)
        self.control = ControlChannel(self, socket_path, self.listener)
        self.admission = Admission(self)
        self.app = RelayApp(self)
        self.settings = RelaySettings(ProxyConfig(api_key=secrets.token_hex(16)), HeadersConfig())
        self.strategy = self.settings.proxy.strategy
        self.models: list[str] = []
        self.loading: frozenset[str] = frozenset()
        self.replicas: dict[str, Replica] = {}
        self.pools: dict[str, list[Replica]] = {}
        self.connections: set[ClientConnection] = set()
        self.counters = dict.fromkeys(("requests", "errors", "retries", "aborted", "rejected"), 0)
        self.stats: tuple[bytes, float] | None = None  # the finished document, and when it came
        self.turns: dict[str, Turn] = {}  # between begin and finish
        self.buffered_bytes = 0
        self.is_stopping = False
        self._retry_tokens = RETRY_FLOOR
        self._key = b""
        self._stopped = Event()
        self._turn_prefix = secrets.token_hex(6)
        self._turn_count = 0
        self._accept_watcher: Any = None
        self._new_event = Event
        self._watchers: list[Any] = []
        self._exit_code = 0
        self.watch = ReplicaWatch(self)

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
            self._key = (self.settings.proxy.api_key or secrets.token_hex(16)).encode()
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
        if table.get("settings") and self._accept_watcher is None and not self.is_stopping:
            self._accept_watcher = self.reactor.watch_reads(self.listener, self._accept)

    def _add_replica(self, row: Backend) -> Replica:
        replica = Replica(row)
        replica.look_at_once = self._new_event()
        tasks = [self.watch.health]
        if row.telemetry_port is not None:
            tasks.append(self.watch.load)
        replica.greenlets = [self.reactor.spawn(task, replica) for task in tasks]
        return replica

    # Turns.

    def begin(self, request: RequestHead, model: str | None, path: bytes, body: bytes | bytearray) -> Turn:
        """A turn for a request that was read; RequestError when nobody serves its model. From here ``finish`` is due."""
        wanted_text = self.settings.proxy.capture_text
        is_json = b"multipart" not in request.fields.get(b"content-type", b"")
        fields: Any = self.codec.request(body, wanted_text > 0) if is_json else None
        if is_json and fields is None:
            raise RequestError(400, "the body is not a JSON object")
        model = self._model_of(model, fields.model if is_json else _form_model(body))
        names = self.settings.headers
        self._turn_count += 1
        options = fields.stream_options if is_json else None
        turn = Turn(
            id=f"{self._turn_prefix}-{self._turn_count:x}",
            arrived=time.monotonic(),
            arrived_at=time.time(),
            model=model,
            path=path,
            session=request.text(names.session.lower().encode()) or request.text(b"x-session-affinity"),
            is_stream=is_json and fields.stream is True,
            cuts_usage=not (isinstance(options, dict) and options.get("include_usage")),
            wanted_text=wanted_text,
            tokens=len(body) // 4,
        )
        self.turns[turn.id] = turn
        self.counters["requests"] += 1
        self._retry_tokens = min(self._retry_tokens + RETRY_SHARE, 10 * RETRY_FLOOR)
        self.control.add(
            TurnStarted(
                turn.id,
                turn.arrived_at,
                model,
                path.decode("ascii"),
                turn.session,
                request.text(names.task.lower().encode()),
                request.text(names.client.lower().encode()),
                turn.is_stream,
                _milliseconds(request.fields.get(names.timing_pre.lower().encode())),
                _milliseconds(request.fields.get(names.timing_post.lower().encode())),
                self.codec.last_words(fields, wanted_text) if wanted_text and is_json else "",
            )
        )
        return turn

    def note_sent(self, turn: Turn, replica: Replica) -> None:
        turn.sent = time.monotonic()
        turn.queue_ms = (turn.sent - turn.arrived) * 1000.0
        turn.backend = replica.id
        self.control.add(TurnSent(turn.id, self._at(turn, turn.sent), replica.id, turn.queue_ms))

    def note_answering(self, turn: Turn) -> None:
        self.control.add(TurnAnswering(turn.id, self._at(turn, turn.first), (turn.first - turn.sent) * 1000.0))

    def finish(self, turn: Turn, request: RequestHead) -> None:
        """The turn is over, whatever became of it: its slot, its counters, its last event."""
        now = time.monotonic()
        turn.ended = turn.ended or now
        self.turns.pop(turn.id, None)
        self.admission.settle(turn)
        counters = self.counters
        counters["retries"] += turn.retries
        if turn.outcome != "completed":
            counters[{"aborted": "aborted", "rejected": "rejected"}.get(turn.outcome, "errors")] += 1
        digest = turn.digest or AnswerDigest()
        is_estimated = digest.completion_tokens is None and turn.events > 0
        estimate = max(0, turn.events - 2)  # the last two events carry the finish reason and [DONE]
        has_first = turn.first > 0.0
        self.control.add(
            TurnFinished(
                turn=turn.id,
                at=self._at(turn, now),
                outcome=turn.outcome,
                status=turn.status,
                backend=turn.backend,
                queue_ms=turn.queue_ms if turn.sent else (now - turn.arrived) * 1000.0,
                ttft_ms=(turn.first - turn.sent) * 1000.0 if has_first else None,
                inference_ms=(turn.ended - turn.sent) * 1000.0 if has_first else None,
                retries=turn.retries,
                prompt_tokens=digest.prompt_tokens,
                completion_tokens=estimate if is_estimated else digest.completion_tokens,
                cached_tokens=digest.cached_tokens,
                estimated=is_estimated,
                finish_reason=digest.finish_reason,
                error=turn.error or digest.error,
                gaps={str(bucket): count for bucket, count in turn.gaps.items()},
                answer=digest.text,
            )
        )
        if turn.session is not None and request.fields.get(b"x-session-end", b"").lower() == b"true":
            self.end_session(turn.session)

    def end_session(self, session: str) -> None:
        self.control.add(SessionEnded(session, time.time()))

    def answer_fields(self, turn: Turn) -> bytes:
        """The header lines that every answer to a turn carries."""
        backend = (
            b"" if turn.backend is None else b"x-agent-infra-backend: %b\r\n" % turn.backend.encode("ascii", "replace")
        )
        return b"x-request-id: %b\r\n%bx-agent-infra-queue-ms: %d\r\n" % (turn.id.encode(), backend, turn.queue_ms)

    def take_retry(self) -> bool:
        """Whether the retry budget, a share of the requests, has one left; it is taken."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def authorize(self, client: ClientConnection, request: RequestHead) -> None:
        """RequestError 401 unless the client is this user (or root) on this machine, or sends the key."""
        if client.is_trusted is None:
            client.is_trusted = socket_owner(client.sock, client.peer) in (0, os.getuid())
        if client.is_trusted:
            return
        scheme, _, sent = request.fields.get(b"authorization", b"").partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else request.fields.get(b"x-api-key", b"").strip()
        if not hmac.compare_digest(sent, self._key):
            raise RequestError(
                401, "a key is needed: send the proxy's key as Authorization: Bearer", code="invalid_api_key"
            )

    def _at(self, turn: Turn, moment: float) -> float:
        """A monotonic moment of a turn as seconds since the epoch, steady even when the clock is set."""
        return turn.arrived_at + (moment - turn.arrived)

    def _model_of(self, prefix: str | None, named: Any) -> str:
        if named is not None and not isinstance(named, str):
            raise RequestError(400, "model must be a string")
        if prefix is not None and named is not None and prefix != named:
            raise RequestError(400, f"the path names the model {prefix!r}, the body {named!r}")
        model = prefix if prefix is not None else named
        if model is None and len(self.models) == 1:
            model = self.models[0]
        if model is None:
            raise RequestError(400, f"name a model; served here: {', '.join(self.models) or 'none'}")
        if model not in self.models:
            message = f"the model {model[:100]!r} does not exist; served here: {', '.join(self.models) or 'none'}"
            raise RequestError(404, message, code="model_not_found")
        return model

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
        tasks = (self.control.run, self._flush_events, self._send_gauges)
        greenlets = [self.reactor.spawn(task) for task in tasks]
        for greenlet in greenlets:
            greenlet.link_exception(self._on_task_failed)
        self._stopped.wait()
        self.control.flush()
        return self._exit_code

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, peer = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors: the listener stays readable, so look away until the next sweep.
                self.log("error", f"no connection can be accepted: {error}")
                self._accept_watcher.stop()
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = ClientConnection(self, sock, peer)
            self.connections.add(client)
            self.reactor.spawn(client.serve)

    def _sweep(self) -> None:
        now = time.monotonic()
        for client in [client for client in self.connections if client.deadline <= now]:
            client.wake()
        self.admission.sweep()
        if self._accept_watcher is not None and not self._accept_watcher.active and not self.is_stopping:
            self._accept_watcher.start(self._accept)

    def _flush_events(self) -> None:
        while True:
            self.reactor.sleep(EVENT_BATCH_S)
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
            "queue": self.queue_status(),
            "counters": {**self.counters, "events_dropped": self.control.events_dropped},
            "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "connections": len(self.connections),
        }

    def queue_status(self) -> dict[str, Any]:
        """What GET /queue/status says: how many wait, how many are with a replica, and the 50 that wait longest."""
        now, waiting = time.monotonic(), self.admission.waiting()
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
        self.log("info", f"stopping: {len(self.turns)} turns to finish")
        if self._accept_watcher is not None:
            self._accept_watcher.stop()
        self.listener.close()
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.connections and time.monotonic() < deadline:
            for client in [client for client in self.connections if client.is_idle]:
                self.reactor.loop.run_callback(client.leave)
            self.reactor.sleep(0.05)
        for client in list(self.connections):
            self.reactor.loop.run_callback(client.cut, "the proxy was stopped")
        self.reactor.sleep(0.2 if self.connections else 0.0)
        self._stopped.set()

    def _on_task_failed(self, greenlet: Any) -> None:
        self.log("error", f"a task of the relay failed: {greenlet.exception!r}; the relay ends, to be started again")
        self._exit_code = 1
        self._stopped.set()

    def log(self, level: str, message: str, **details: Any) -> None:
        """One line to standard error: text, or JSON. Nothing from a client's head goes here: it may hold a key."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.settings.log_format == "json":
            line = json.dumps({"at": at, "level": level, "role": "relay", "message": message, **details})
        else:
            line = f"{at} {level} relay: {message}" + "".join(f"\n{detail}" for detail in details.values())
        print(line, file=sys.stderr, flush=True)


def _is_same_endpoint(one: Backend, other: Backend) -> bool:
    """Whether two rows lead to one server: then connections and health carry over."""
    return dataclasses.replace(one, state=other.state, slots=other.slots, node=other.node) == other


def _form_model(body: bytes | bytearray) -> str | None:
    """The field ``model`` of a multipart form."""
    match = re.search(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', body)
    return match[1].decode("utf-8", "replace") if match else None


def _milliseconds(value: bytes | None) -> float | None:
    """A duration that a client sent; None where it is missing or none."""
    try:
        number = float(value) if value else -1.0
    except ValueError:
        return None
    return number if 0.0 <= number < math.inf else None


def socket_owner(sock: Any, peer: tuple[Any, ...]) -> int | None:
    """The user id that owns the other end of a loopback connection; None when it is elsewhere or cannot be told.

    Asks the kernel (sock_diag); where that is not to be had, /proc/net/tcp.
    """
    host = peer[0].removeprefix("::ffff:")
    if not (host.startswith("127.") or host == "::1"):
        return None
    local = sock.getsockname()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    source, target = (socket.inet_pton(family, end[0].removeprefix("::ffff:")) for end in (peer, local))
    try:
        return _ask_sock_diag(family, source, peer[1], target, local[1])
    except OSError:
        return _search_proc_net(family, source, peer[1], local[1])


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


def _search_proc_net(family: int, source: bytes, source_port: int, target_port: int) -> int | None:
    """The same from the kernel's table of all sockets."""
    words = struct.unpack(f">{len(source) // 4}I", source)
    wanted = "".join(f"{word:08X}" for word in struct.unpack(f"={len(words)}I", source)) + f":{source_port:04X}"
    try:
        table = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp").read_text().splitlines()
    except OSError:
        return None
    for columns in map(str.split, table[1:]):
        if columns[1] == wanted and columns[2].endswith(f":{target_port:04X}") and columns[9] != "0":
            return int(columns[7])
    return None


class ReplicaWatch:
    """Asks replicas how they are: health on the engine's port, load on its telemetry port."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def health(self, replica: Replica) -> None:
        """Probe for ever: each interval, and after an ejection sooner, backing off; a greenlet runs this."""
        interval = self._relay.settings.proxy.health_check_interval
        pause = 0.0
        while True:
            replica.look_at_once.wait(pause)
            if replica.look_at_once.is_set():  # just ejected: give it the time that its ejections call for
                replica.look_at_once.clear()
                self._relay.log("warning", f"replica {replica.id} is out: {replica.reason}")
                pause = min(FIRST_EJECTION_S * 2 ** (replica.ejections - 1), interval)
                continue
            problem, is_proven = self._probe(replica)
            interval = self._relay.settings.proxy.health_check_interval
            if problem is None:
                self._readmit(replica)
                pause = interval
            else:
                self._note_problem(replica, problem, is_proven)
                pause = min(1.0, interval)

    def _readmit(self, replica: Replica) -> None:
        replica.probe_failures = 0
        replica.dead_until = 0.0
        if replica.health == "down":
            replica.set_health("trial", f"on trial after: {replica.reason}")
            self._relay.log("info", f"replica {replica.id} answers again and is tried")
            self._relay.admission.dispatch(replica.backend.model)

    def _note_problem(self, replica: Replica, problem: str, is_proven: bool) -> None:
        """A probe failed. Silence alone is no death while answers come: an engine may be too busy to say it is well."""
        replica.probe_failures += 1
        is_moving = time.monotonic() - replica.last_byte < self._relay.settings.proxy.health_check_interval
        if replica.health != "down" and (is_proven or (replica.probe_failures >= 2 and not is_moving)):
            replica.set_health("down", problem)
            self._relay.log("warning", f"replica {replica.id} is out: {problem}")

    def load(self, replica: Replica) -> None:
        """Poll its load for ever; a greenlet runs this. A poll that fails leaves the last figures for a while."""
        missed = 0
        while True:
            backend = replica.backend
            try:
                status, body = self._get(backend.host, backend.telemetry_port or 0, b"/load", backend.key)
                replica.take_load(self._relay.codec.decode(body) if status == 200 else None)
                missed = 0
            except (OSError, ValueError, TypeError, WireError):
                missed += 1
                if missed == 5:
                    replica.take_load(None)
            self._relay.reactor.sleep(self._relay.settings.proxy.load_poll_interval)

    def is_alive(self, replica: Replica) -> bool:
        """Whether it answers its health probe now; a death just found is believed for a moment."""
        now = time.monotonic()
        if now < replica.dead_until:
            return False
        problem, _ = self._probe(replica)
        if problem is not None:
            replica.dead_until = time.monotonic() + 0.5
        return problem is None

    def _probe(self, replica: Replica) -> tuple[str | None, bool]:
        """What is wrong with it (None: nothing), and whether that is proof of death rather than silence."""
        try:
            status, _ = self._get(replica.backend.host, replica.backend.port, b"/health", None)
        except TimeoutError:
            return f"no answer to GET /health within {PROBE_S:g} s", False
        except (OSError, WireError) as error:
            return f"health probe: {getattr(error, 'strerror', None) or error}", True
        return (None, False) if status == 200 else (f"GET /health says {status}", True)

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
                end = received.find(b"\r\n\r\n") + 4
                if end >= 4:
                    answer = parse_answer_head(received[:end])
                    status, decoder = answer.status, answer.decoder()
                    decoder.feed(received, end, pieces)
            return status, b"".join(pieces)


class RelayApp:
    """The Flask app: all that is not inference. Called with requests that the relay has read already."""

    def __init__(self, relay: Relay) -> None:
        import flask
        from werkzeug.exceptions import HTTPException

        self._relay, self._flask = relay, flask
        self._wsgi = app = flask.Flask("agent_infra")
        for rule, methods, view in (
            ("/", "GET", self._index),
            ("/health", "GET", self._health),
            ("/stats", "GET", self._stats),
            ("/queue/status", "GET", self._queue_status),
            ("/v1/models", "GET", self._models),
            ("/<path:model>/v1/models", "GET", self._models),
            ("/sessions/<path:session>/end", "POST", self._end_session),
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
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in kept), f"content-length: {len(content)}"]
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
        if self._relay.stats is None:
            return self._error(503, "no snapshot has come from the controller yet")
        document, at = self._relay.stats
        age = b'{"snapshot_age_ms":%d,' % ((time.monotonic() - at) * 1000)
        return self._flask.Response(age + document.removeprefix(STATS_PREFIX), mimetype="application/json")

    def _queue_status(self) -> Any:
        return self._relay.queue_status()

    def _models(self, model: str | None = None) -> Any:
        names = [name for name in self._relay.models if model in (None, name)]
        if model is not None and not names:
            return self._error(404, f"the model {model[:100]!r} does not exist")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "agent-infra"} for name in names]
        return {"object": "list", "data": rows}

    def _end_session(self, session: str) -> Any:
        self._relay.end_session(session[:256])
        return {"session": session[:256], "ended": True}

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

    def _error(self, status: int, message: str) -> Any:
        return self._flask.Response(error_document(status, message, None, False), status, mimetype="application/json")

    def _on_http_error(self, error: Any) -> Any:
        path = self._flask.request.path[:100]
        return self._error(
            error.code or 500, f"{error.name}: {self._flask.request.method} {path}; GET / lists what there is"
        )


def run_relay(socket_path: str, listener_fd: int) -> int:
    """The relay's entry: serve on the inherited listening socket, controllers at ``socket_path``; its exit code."""
    from gevent import monkey

    monkey.patch_all()  # first of all, before any third-party import: they must see the patched library
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return Relay(socket_path, listener_fd).run()


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

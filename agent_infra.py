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
import hashlib
import hmac
import json
import math
import os
import re
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
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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
    takes_usage_flags: bool = False  # then every answer carries usage, asked for or not
    is_guarded: bool = False  # EngineGuard stands before it: the key on every path, and the keyed challenge


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
    return [*argv, *model.engine_args]


def _vllm_environment(launch: Launch) -> dict[str, str]:
    folders = [os.path.dirname(launch.module), launch.python_path]
    return {"VLLM_API_KEY": launch.key, "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


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
    if model.engine_args:
        raise RefusedError(f"model {model.name}: engine_args: engine: command takes none; write them into command")


def _key_environment(launch: Launch) -> dict[str, str]:
    return {"AGENT_INFRA_API_KEY": launch.key}


# A newcomer adds an engine by adding a row, and its name to ENGINE_NAMES.
ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
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
        takes_usage_flags=True,
        is_guarded=True,
    ),
    "llama_cpp": Engine(
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
            value = _finite(line.rpartition(" ")[2])
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


def _finite(text: str) -> float | None:
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
        r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)",
        "the engine does not know this option: correct engine_args (or command); its --help lists them",
        exit_code=2,
    ),
    FailureSign(
        "bad_argument",
        r"greater than the derived max_model_len|must be divisible by tensor parallel|No module named"
        r"|validation errors? for \w*Config",
        "correct this key of the model's configuration; a module that is missing must be installed where `serve` runs",
    ),
    FailureSign("node_failure", "", "the engine was built for another processor; install one built for it", -4),
    FailureSign(
        "node_failure", "", "the node's shared memory or disk failed; look at /dev/shm and the kernel's log", -7
    ),
)

# Starting again as it is cannot mend these, unless the replica had been ready before.
HOPELESS_FAILURES = ("model_not_found", "gated_model", "quota", "bad_argument")


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


LOAD_POLL_S = 0.1  # between looks at an engine that loads
HEALTH_POLL_S = 5.0  # between looks at one that is ready
PROBE_TIMEOUT_S = 2.0
DRAIN_SETTLE_S = 0.5  # an engine counts as idle after this long, for turns still on their way when draining was told
END_MARGIN_S = 3.0  # of stop_grace, kept for the engine's own end
MAX_RESTARTS = 3
FORGIVEN_AFTER_S = 600.0  # healthy, and earlier restarts no longer count
DIGEST_MAX_AGE_S = 0.5
LOG_TAIL_BYTES = 65536
METRICS_PATH = "/metrics"
CHALLENGE_PATH = "/agent-infra/challenge"


def answer_challenge(key: str, nonce: str) -> str:
    """What only a holder of ``key`` answers to ``nonce``: their HMAC-SHA256 in hexadecimal digits."""
    return hmac.new(key.encode(), nonce.encode(), hashlib.sha256).hexdigest()


def _challenge_reply(key: str, query: str) -> tuple[int, bytes]:
    """Status and JSON body of ``GET /agent-infra/challenge?nonce=HEX``."""
    match = re.fullmatch(r"nonce=([0-9a-fA-F]{16,128})", query)
    if match is None:
        return 400, _error_body("nonce must be 16 to 128 hexadecimal digits", "invalid_request_error", None)
    return 200, json.dumps({"answer": answer_challenge(key, match[1])}).encode()


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

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health")
        if is_open or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, body = 401, _KEY_NEEDED
            if scope["path"] == CHALLENGE_PATH and scope["method"] == "GET" and self._key:
                status, body = _challenge_reply(self._key, scope["query_string"].decode("latin-1"))
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
    load_timeout: float = 3600.0  # s that the engine has to get ready
    hang_timeout: float = 120.0  # s without an answer to its health probe after which a ready engine is killed
    restart_backoff: float = 1.0  # s before the first restart; five times as long before each further one


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


def http_get(host: str, port: int, path: str, key: str | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, with a deadline and whatever http_proxy says; status 0 when nothing answers."""
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(4 << 20)
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

    def answers(self) -> bool:
        """Whether its health probe says that it serves."""
        return self.engine.is_healthy(self._get(self.engine.health_path)[0])

    def is_ours(self) -> bool:
        """Whether the server on the port knows the key, where its kind can show that it does."""
        if not self.engine.is_guarded:
            return True
        nonce = os.urandom(16).hex()
        status, body = self._get(f"{CHALLENGE_PATH}?nonce={nonce}")
        return status == 200 and answer_challenge(self.key, nonce).encode() in body

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


def visible_gpus(spec: ServeSpec, environment: Mapping[str, str]) -> tuple[str, ...] | None:
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

    directory = _lock_directory()
    for port in range(first, min(first + 1000, 65536)):
        lock = os.open(directory / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        if _is_free(port):
            return PortReservation(port, lock)
        os.close(lock)
    return None


def _lock_directory() -> Path:
    """The 0700 directory of this user's port locks; RefusedError where somebody else made it."""
    import tempfile

    directory = Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RefusedError(f"{directory} is not a directory of yours alone (0700); remove it, or set TMPDIR")
    return directory


def _is_free(port: int) -> bool:
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

    def __init__(self, host: str, key: str, digest: Callable[[], Mapping[str, Any]]) -> None:
        import http.server
        import socketserver

        self._key, self._digest = key, digest
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
            status, body = _challenge_reply(self._key, query)
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


class Replica:
    """Keeps one engine running until told to stop, and its record true. The main thread owns all but ``digest``."""

    def __init__(self, spec: ServeSpec, key: str, watcher: Watcher, signals: StopSignals) -> None:
        self._spec, self._key, self._watcher, self._signals = spec, key, watcher, signals
        self._engine = ENGINES[spec.model.engine]
        self._directory = Path(spec.run_directory)
        self._log = self._directory / "logs" / f"{spec.replica}.log"
        self._client: EngineClient | None = None  # of the engine that runs
        self._sampler = GpuSampler(visible_gpus(spec, {**os.environ, **spec.model.env}))
        self._digest_lock = threading.Lock()  # one thread at a time asks the engine and NVML
        self._digest: dict[str, Any] = {}
        self._digest_at = -math.inf  # monotonic s
        self._record = ReplicaRecord(
            replica=spec.replica,
            model=spec.model.name,
            state="starting",
            engine=spec.model.engine,
            node=socket.gethostname(),
            pid=os.getpid(),
            process=process_stamp(os.getpid()) or "",
            host=spec.bind_host,
            job_id=spec.job_id,
            started_at=time.time(),
            slots=self._engine.slots(spec.model),
            gpus=self._sampler.sample(),
            gpu_ids=spec.gpu_ids,
        )

    def run(self) -> int:
        """The whole life of the replica; the exit code of `serve`."""
        telemetry = Telemetry(self._spec.bind_host, self._key, self.digest)
        try:
            self._update(telemetry_port=telemetry.port)
            failure = self._run_engines()
        except RefusedError as error:
            failure = ReplicaFailure("unknown", str(error), "mend it, and start the replica again")
        finally:
            telemetry.close()
            self._sampler.close()
        if failure is None:
            self._update(state="stopped", message=None, failure=None, port=None, telemetry_port=None)
            return 0
        self._note(f"failed ({failure.kind}): {failure.line}; {failure.hint}")
        self._update(state="failed", message=None, failure=failure, port=None, telemetry_port=None)
        return 1

    def digest(self) -> Mapping[str, Any]:
        """The body of ``GET /load``, at most half a second old while the engine answers; called by any thread."""
        if self._digest_lock.acquire(timeout=PROBE_TIMEOUT_S):
            try:
                if time.monotonic() - self._digest_at > DIGEST_MAX_AGE_S:
                    load = (self._client.load() if self._client else None) or EngineLoad()
                    gpus = [dataclasses.asdict(gpu) for gpu in self._sampler.sample()]
                    self._digest = {**dataclasses.asdict(load), "gpus": gpus, "at": time.time()}
                    self._digest_at = time.monotonic()
            finally:
                self._digest_lock.release()
        return {"state": self._record.state, "slots": self._record.slots, **self._digest}

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
        environment = self._base_environment()
        launch = Launch(
            host=spec.bind_host,
            port=port,
            key=self._key,
            python=sys.executable,
            module=os.path.abspath(__file__),
            python_path=environment.get("PYTHONPATH", ""),
            stop_grace=spec.stop_grace,
        )
        environment.update(self._engine.environment(launch))
        argv = self._engine.argv(spec.model, launch)
        self._note("starting: " + shlex.join(argv))
        try:
            process = EngineProcess(argv, environment, self._log, self._watcher)
        except OSError as error:
            hint = "give the program's full path in command, or install it on this node"
            return ReplicaFailure("bad_argument", f"{argv[0]} cannot be started: {error.strerror}", hint)
        client = self._client = EngineClient(self._engine, spec.bind_host, port, self._key)
        try:
            self._update(state="loading", port=port)
            failure = self._load(process, client)
            if failure is None and not self._signals.is_asked:
                failure = self._stand_by(process, client)
            if failure is None:
                self._end(process, client)
            return failure
        finally:
            self._client = None
            process.kill()

    def _base_environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self._spec.model.env}
        if self._spec.gpu_ids:
            # NVML counts in the order of the bus; CUDA by itself puts the fastest first.
            environment.update(CUDA_VISIBLE_DEVICES=",".join(self._spec.gpu_ids), CUDA_DEVICE_ORDER="PCI_BUS_ID")
        return environment

    def _load(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Wait until the engine is ready; None then, and when told to stop."""
        deadline = time.monotonic() + self._spec.load_timeout
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._read_progress(process)
            if client.answers() and client.is_ours():
                gpus = self._sampler.sample()
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
        """Watch a ready engine until it fails; None when told to stop."""
        answered_at = time.monotonic()
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            if client.answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > self._spec.hang_timeout:
                line = f"alive, but no answer to GET {self._engine.health_path} for {self._spec.hang_timeout:g} s"
                return ReplicaFailure("timed_out", line, "it hangs, and was killed; its log may tell where")
            self._signals.wait(min(HEALTH_POLL_S, self._spec.hang_timeout / 4))
        return None

    def _end(self, process: EngineProcess, client: EngineClient) -> None:
        """Let the engine finish its turns, then end it; all within stop_grace, at once when told again."""
        deadline = time.monotonic() + self._spec.stop_grace
        was_ready = self._record.state == "ready"
        self._update(state="draining", message=None)
        drained_by = deadline - min(END_MARGIN_S, self._spec.stop_grace / 2)
        idle_since: float | None = None
        while was_ready and self._engine.metrics and time.monotonic() < drained_by and self._may_wait(process):
            load = client.load()
            if load is None or load.running or load.waiting:
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > DRAIN_SETTLE_S:
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
        record = dataclasses.replace(self._record, **changes)
        path = self._directory / "replicas" / f"{record.replica}.json"
        if record != self._record or not path.exists():
            self._record = record
            write_atomically(path, json.dumps(dataclasses.asdict(record)))

    def _note(self, line: str) -> None:
        """A line of our own in the replica's log."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(_open_log(self._log), "a", encoding="utf-8") as file:
            file.write(f"{stamp} agent-infra: {line}\n")


def serve(run_directory: str, replica: str) -> int:
    """Run one replica as specs/<replica>.json says, until SIGTERM; returns 0 when stopped, 1 when it failed.

    Writes replicas/<replica>.json and logs/<replica>.log. RefusedError when it cannot be started at all.
    """
    path = Path(run_directory) / "specs" / f"{replica}.json"
    try:
        spec = spec_from_json(path.read_text(encoding="utf-8"))
        key = Path(spec.key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be served: {error}; start the replica again") from error
    if not key:
        raise RefusedError(f"{spec.key_file}: holds no key; delete it and start the deployment again")
    check_engine_args(spec.model)
    with contextlib.closing(Watcher()) as watcher:
        return Replica(spec, key, watcher, StopSignals()).run()


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
    if not _is_free(port):
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

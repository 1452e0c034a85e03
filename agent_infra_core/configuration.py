"""Configuration: YAML → marshmallow → frozen dataclasses. Knows every key, its default and what it may be. The
dataclasses are plain: the node role builds them from JSON without any third-party package."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_infra_core.errors import ConfigError

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

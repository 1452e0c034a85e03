"""Settings: frozen dataclasses with every configuration key, its default and its allowed values."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STRATEGY_NAMES = ("least_load", "round_robin", "least_connections", "least_latency")
AUTO_OR_OFF = ("auto", "off")
# Claude Code; Codex, twice; opencode
SESSION_HEADERS = ("X-Claude-Code-Session-Id", "session-id", "session_id", "x-session-affinity")
ENGINE_NAMES = ("vllm", "sglang", "llama_cpp", "command")
CLUSTER_TYPES = ("local", "slurm")
CONTAINER_RUNTIMES = ("apptainer", "pyxis", "podman", "podman-hpc")
GPU_FLAGS = ("gres", "gpus-per-node", "none")  # the sbatch option that asks for GPUs
PROXY_PLACES = ("here", "job")  # where `connect` runs the proxy
TUNNEL_MODES = ("auto", "login", "node", "exec", "none")
TUNNEL_DRIVERS = ("auto", "sshtunnel", "openssh")
PACKAGED_MODEL = "smollm2-135m-instruct"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
KEY_PATTERN = r"[\x21-\x7e]{8,}"
HEADER_PATTERN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}"


@dataclass(frozen=True)
class Rule:
    """Allowed values of a key: bounds (``above`` is exclusive), choices, or a full-match pattern with a description."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    pattern: str | None = None
    allowed: str = ""

    def describe(self) -> str:
        """Describe the allowed values for a message."""
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
        """Whether ``value``, which has the right type, is allowed; always true for None, which only the type limits."""
        if value is None:
            return True
        if self.choices is not None:
            return value in self.choices
        if self.pattern is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            return all(isinstance(each, str) and re.fullmatch(self.pattern, each) for each in values)
        too_low = (self.low is not None and value < self.low) or (self.above is not None and value <= self.above)
        return not too_low and not (self.high is not None and value > self.high)


def _key(default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """Return a dataclass field with a rule for its value; each instance gets its own copy of a list or mapping."""
    metadata = {"rule": Rule(**rule)} if rule else {}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ProxyConfig:
    """The proxy that agents send requests to."""

    host: str = _key("127.0.0.1", pattern=r"\S+", allowed="an address to listen on, such as 127.0.0.1 or 0.0.0.0")
    port: int = _key(5800, low=0, high=65535)  # 0 = any free port
    require_key: bool = False  # also from programs of the same user
    # Web pages that may call the API.
    cors_origins: tuple[str, ...] = _key(
        (), pattern=r"https?://[^\s/,*]+", allowed="origins, such as https://chat.example.org or http://localhost:3000"
    )
    strategy: str = _key("least_load", choices=STRATEGY_NAMES)
    session_affinity: str = _key("auto", choices=AUTO_OR_OFF)  # auto = with least_load
    kv_admission: str = _key("auto", choices=AUTO_OR_OFF)
    session_headers: tuple[str, ...] = SESSION_HEADERS  # read after headers.session
    health_check_interval: float = _key(30.0, above=0)  # s
    load_poll_interval: float = _key(1.0, above=0)  # s
    request_timeout: float = _key(300.0, above=0)  # s without data from the replica
    connect_timeout: float = _key(5.0, above=0)  # s
    max_retries: int = _key(3, low=0, high=100)
    max_queue: int = _key(1000, low=0)  # requests waiting for a slot
    queue_timeout: float = _key(60.0, above=0)  # s
    max_body_mb: float = _key(64.0, above=0)
    max_buffered_mb: float = _key(512.0, above=0)
    api_key: str | None = _key(None, pattern=KEY_PATTERN, allowed="at least 8 printable characters, no spaces")
    capture_text: int = _key(200, low=0, high=100_000)  # characters of prompt and answer to keep
    history: str | None = _key(None, pattern=r"\S(.*\S)?", allowed='"off" (in quotes), or the path of a file')


@dataclass(frozen=True)
class SshConfig:
    """How to reach the cluster's login host; None takes a value from ssh_config, else ssh's default."""

    # No leading dash: ssh would take the host for an option.
    host: str = _key(pattern=r"[A-Za-z0-9_.:][\w.:-]*", allowed="a host's name or address, or an alias of ssh_config")
    user: str | None = _key(None, pattern=r"[\w.@+][\w.@+-]*", allowed="a user's name there")
    port: int | None = _key(None, low=1, high=65535)
    identity_file: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of a private key")
    config_file: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of an ssh_config")
    known_hosts_file: str | None = _key(None, pattern=r"\S+", allowed="the path of a known_hosts file, without blanks")


# sbatch options that this program sets itself, or that would make it lose control of its jobs.
RESERVED_DIRECTIVES = (
    *("array", "chdir", "comment", "error", "export", "hold", "input", "job-name", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "time", "test-only", "wait", "wrap"),
)


_TIME_PATTERN = r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}"
_TIME_WORDS = 'a time as sbatch takes it, in quotes (YAML reads 8:00:00 as a number): "8:00:00", "2-00:00:00"'
_SIZE_PATTERN = r"[1-9]\d*[KMGT]?"
_SIZE_WORDS = 'a size as sbatch takes it, such as "64G" (without a unit: MB)'


@dataclass(frozen=True)
class PartitionConfig:
    """A partition for replicas; of several with free nodes, the one with the highest priority is used."""

    name: str = _key(pattern=r"[\w.@+-]{1,64}", allowed="the name of a partition, as `sinfo` shows it")
    qos: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a QoS")
    gpus_per_node: int = _key(4, low=1, high=1024)
    priority: int = 1
    gres: str = _key("gpu", pattern=r"[\w.-]+(:[\w.-]+)?", allowed="a GRES as name or name:type, such as gpu:h100")
    time_limit: str | None = _key(None, pattern=_TIME_PATTERN, allowed=_TIME_WORDS)
    exclusive: bool = False  # whole nodes: one job holds as many replicas as fit
    sbatch: Mapping[str, str | int | bool | None] = _key({})  # true: option without a value; None: no such option


@dataclass(frozen=True)
class ContainerConfig:
    """The container that engines run in."""

    runtime: str = _key(choices=CONTAINER_RUNTIMES)
    image: str = _key(pattern=r"\S+", allowed="a path or URL of an image, without blanks")
    mounts: tuple[str, ...] = _key(
        (),
        pattern=r"/[^\s,:]*(:/[^\s,:]*(:[\w,]+)?)?",
        allowed="absolute folders: /data, /data:/inside or /data:/inside:ro",
    )
    env: Mapping[str, str] = _key({})  # of engines; a model's own wins


@dataclass(frozen=True)
class ProxyJobConfig:
    """What the job of the proxy asks for, with cluster.slurm.proxy: job."""

    partition: str | None = _key(
        None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a partition, as `sinfo` shows it"
    )
    qos: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a QoS")
    cpus: int = _key(2, low=1)
    memory: str | None = _key("4G", pattern=_SIZE_PATTERN, allowed=_SIZE_WORDS)  # None: the partition's default
    time_limit: str | None = _key(None, pattern=_TIME_PATTERN, allowed=_TIME_WORDS)
    setup: tuple[str, ...] = ()  # shell lines before the proxy
    sbatch: Mapping[str, str | int | bool | None] = _key({})  # true: option without a value; None: no such option


@dataclass(frozen=True)
class SlurmConfig:
    """How replicas run as Slurm jobs."""

    partitions: tuple[PartitionConfig, ...] = ()
    default_qos: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of a QoS")
    account: str | None = _key(None, pattern=r"[\w.@+-]{1,64}", allowed="the name of an account")
    constraint: str | None = _key(None, pattern=r"[^\s\"']+", allowed="features of nodes, as sbatch takes them")
    cpus_per_gpu: int | None = _key(None, low=1)  # None: the site's default
    memory_per_gpu: str | None = _key(None, pattern=_SIZE_PATTERN, allowed=_SIZE_WORDS)
    gpu_flag: str = _key("gres", choices=GPU_FLAGS)
    work_dir: str = _key(
        "~/.agent-infra",
        pattern=r"(~|~?/[^\s%'\"\\$`]*)",
        allowed="an absolute path or one below ~/, without blanks, quotes and %",
    )
    prologue: tuple[str, ...] = ()  # shell lines on the login side, before Slurm's commands
    setup: tuple[str, ...] = ()  # shell lines before the engine
    container: ContainerConfig | None = None
    template: str | None = _key(None, pattern=r"\S(.*\S)?", allowed="the path of a template")
    sbatch: Mapping[str, str | int | bool | None] = _key({})  # true: option without a value; None: no such option
    handover: bool = True  # replace a replica before its walltime ends
    proxy: str = _key("here", choices=PROXY_PLACES)
    proxy_job: ProxyJobConfig = ProxyJobConfig()


@dataclass(frozen=True)
class ClusterConfig:
    """Where replicas run; ``name`` identifies the deployment, with its state and keys."""

    type: str = _key("local", choices=CLUSTER_TYPES)
    name: str = _key("default", pattern=NAME_PATTERN, allowed="letters, digits, '.', '_' and '-', at most 63")
    ssh: SshConfig | None = None  # None: commands run on this machine
    tunnel: str = _key("auto", choices=TUNNEL_MODES)
    tunnel_driver: str = _key("auto", choices=TUNNEL_DRIVERS)
    poll_interval: float = _key(30.0, low=0.1)  # s between queries to the scheduler
    slurm: SlurmConfig = SlurmConfig()


def proxy_view(config: ClusterConfig) -> ClusterConfig:
    """Return the cluster as its proxy sees it: one in a job needs no login host to reach the replicas."""
    if config.ssh is None or config.slurm.proxy != "job":
        return config
    return dataclasses.replace(config, ssh=None, tunnel=ClusterConfig.tunnel, tunnel_driver=ClusterConfig.tunnel_driver)


@dataclass(frozen=True)
class ModelConfig:
    """One model: its name for clients, its weights, its engine and the number of replicas."""

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
    idle_shutdown_minutes: float | None = _key(None, above=0)  # minutes without a turn until a replica shuts down
    min_replicas: int | None = _key(None, low=0, high=1000)  # None: ``replicas``, and so for max_replicas
    max_replicas: int | None = _key(None, low=1, high=1000)
    max_gpu_hours: float | None = _key(None, above=0)  # after which no replica is added or woken
    stage: str | None = _key(  # folder on the node's own disk that weights are copied to
        None,
        pattern=r"(/|\$\{?\w+\}?)[^\s,:'\"\\`]*",
        allowed="an absolute path on the nodes, or one that begins with a variable of the job, such as $${TMPDIR}",
    )


@dataclass(frozen=True)
class HeadersConfig:
    """Names of the headers with which an agent sends a request's session, task and timings."""

    session: str = _key("X-Session-ID", pattern=HEADER_PATTERN, allowed="a header name")
    task: str = _key("X-Task-ID", pattern=HEADER_PATTERN, allowed="a header name")
    client: str = _key("X-Client-ID", pattern=HEADER_PATTERN, allowed="a header name")
    timing_pre: str = _key("X-Timing-Pre-Ms", pattern=HEADER_PATTERN, allowed="a header name")
    timing_post: str = _key("X-Timing-Post-Ms", pattern=HEADER_PATTERN, allowed="a header name")


@dataclass(frozen=True)
class AnalysisConfig:
    """What the analysis of a run should aim at."""

    latency_goal_s: float | None = _key(None, above=0)  # 95 % of the answers should take no longer


@dataclass(frozen=True)
class OtelConfig:
    """Where finished turns are sent as OpenTelemetry spans."""

    endpoint: str | None = _key(
        None, pattern=r"https?://[^\s/@]+(/\S*)?", allowed="a URL, such as http://127.0.0.1:4318/v1/traces"
    )
    headers: Mapping[str, str] = _key({})
    text: bool = False  # with the excerpts of prompts and answers


@dataclass(frozen=True)
class Config:
    """The whole configuration, validated. ``models`` isn't empty, and names are unique."""

    models: tuple[ModelConfig, ...]
    version: str = _key("1.0", choices=("1.0",))
    proxy: ProxyConfig = ProxyConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    otel: OtelConfig = OtelConfig()
    cluster: ClusterConfig = ClusterConfig()
    headers: HeadersConfig = HeadersConfig()


# What `up` runs without a ./config.yaml. Same as configs/local.yaml (a test checks it).
DEFAULT_CONFIG = Config(
    models=(ModelConfig(name="smollm2", model_path=PACKAGED_MODEL, engine="llama_cpp"),),
)


def base_directory(environment: Mapping[str, str], variable: str, under_home: str) -> str:
    """Return a base directory as XDG defines it: the variable's value, else ``under_home`` in the home directory."""
    return environment.get(variable) or os.path.join(environment.get("HOME") or "~", under_home)


def connect_address(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on ``host``."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (the wildcard, named)


def proxy_url(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a proxy that listens on ``host``."""
    reached = connect_address(host)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


SCALAR_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
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
    """Whether ``option: value`` can be a line of a job script."""
    name, value = item
    is_value = value is None or value is True or (isinstance(value, int) and not isinstance(value, bool))
    is_line = isinstance(value, str) and value.isprintable()
    return bool(isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9-]*", name) and (is_value or is_line))


def shorten(value: Any) -> str:
    """Return ``value`` as JSON, cut to at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

"""Engines (pure): a model's configuration → command line, environment, readiness, names of its metrics. No I/O."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent_infra_core.configuration import ModelConfig
from agent_infra_core.errors import RefusedError


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

"""The engines, one row each: command line, checks, readiness probe and metric names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import self_command
from agent_infra_core.protocol import LACKS, STOP_GRACE_S, EngineProbe, EngineSpec, ServeSpec, replace_placeholders
from agent_infra_core.settings import ModelConfig


@dataclass(frozen=True)
class Engine:
    """One row of ENGINES: everything the rest of the program needs to know about an engine."""

    argv: Callable[[ModelConfig, JobShape], list[str]]  # with the placeholders listed in EngineSpec
    check: Callable[[ModelConfig], None]  # raises RefusedError
    slots: Callable[[ModelConfig], int]  # turns that can run at once; 0 = unknown
    probe: EngineProbe
    takes_priority: Callable[[ModelConfig], bool] = lambda _: False  # see EngineSpec
    key_variable: str = "AGENT_INFRA_API_KEY"
    uses_gpus: bool = True
    may_face_network: bool = False  # requires the key on every path except health; others stand behind a Gate
    spans_nodes: bool = False
    package: str | None = None  # required in its Python
    lacks: tuple[str, ...] = ()  # of LACKS; the relay refuses it clearly, or mends it


@dataclass(frozen=True)
class JobShape:
    """What a command line depends on, besides the model."""

    stop_grace: float = STOP_GRACE_S  # s between SIGTERM and SIGKILL
    nodes: int = 1  # spanned by the replica
    is_rank: bool = False  # the headless part on a further node


def _values(words: Sequence[str], *names: str) -> list[str]:
    """The values of all ``--name V``, ``--name=V`` or ``--na_me V`` in ``words``."""
    found = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            found.append(value if equals else next(iter(words[index + 1 :]), ""))
    return found


def _option(words: Sequence[str], *names: str) -> int | None:
    """The last integer that ``words`` give for an option; None if there is none."""
    numbers = [int(value) for value in _values(words, *names) if value.isdecimal()]
    return numbers[-1] if numbers else None


# Options that `serve` sets itself, or that would put a secret on a command line.
_VLLM_OWN_OPTIONS = ("--host", "--port", "--uds", "--api-key", "--served-model-name", "--root-path", "--ssl-certfile")

# vLLM's default (0.32) on GPUs below 70 GB and on A100. Elsewhere it uses 1024 or 128 and doesn't report which. The
# slots must be known, so the option is always set.
_DEFAULT_SLOTS = 256
_VLLM_STOP_MARGIN_S = 5.0  # time its processes need to exit after the last turn


def _vllm_argv(model: ModelConfig, shape: JobShape) -> list[str]:
    shutdown_s = max(1, int(shape.stop_grace - _VLLM_STOP_MARGIN_S))
    argv = ["{python}", "-m", "vllm.entrypoints.cli.main", "serve", model.model_path]
    argv += ["--host", "{host}", "--port", "{port}", "--served-model-name", model.name]
    argv += ["--gpu-memory-utilization", f"{model.gpu_memory_utilization:g}"]
    argv += ["--tensor-parallel-size", str(model.tensor_parallel_size)]
    argv += ["--pipeline-parallel-size", str(model.pipeline_parallel_size)]
    argv += ["--max-model-len", str(model.max_model_len)] if model.max_model_len else []
    argv += ["--trust-remote-code"] if model.trust_remote_code else []
    # With the default of 0, SIGTERM ends streams cleanly in mid-answer, so truncated answers look complete.
    argv += ["--shutdown-timeout", str(shutdown_s)]
    argv += ["--enable-prompt-tokens-details", "--enable-force-include-usage"]
    argv += ["--middleware", "agent_infra_core.node.guard.EngineGuard", "--max-num-seqs", str(_DEFAULT_SLOTS)]
    if shape.nodes > 1:
        argv += ["--nnodes", str(shape.nodes), "--node-rank", "{node_rank}"]
        argv += ["--master-addr", "{master_host}", "--master-port", "{master_port}"]
        argv += ["--headless"] if shape.is_rank else []
    return [*argv, *model.engine_args]


def _vllm_slots(model: ModelConfig) -> int:
    engines = _option(model.engine_args, "--data-parallel-size", "-dp") or 1
    return engines * (_option(model.engine_args, "--max-num-seqs") or _DEFAULT_SLOTS)


def _vllm_takes_priority(model: ModelConfig) -> bool:
    return _values(model.engine_args, "--scheduling-policy")[-1:] == ["priority"]


# SGLang's loader shows the same bar as vLLM's.
_SHARD_PROGRESS = r"Loading \S+ checkpoint shards:[^\r\n]*?\b(\d+)/(\d+)"
_SGLANG_OWN_OPTIONS = ("--host", "--port", "--api-key", "--admin-api-key", "--served-model-name", "--fastapi-root-path")


def _sglang_argv(model: ModelConfig, _: JobShape) -> list[str]:
    """As documented at https://docs.sglang.io/docs/advanced_features/server_arguments; never run here.

    Its key could only be given on the command line, so it stands behind a Gate instead.
    """
    argv = ["{python}", "-m", "sglang.launch_server", "--model-path", model.model_path]
    argv += ["--host", "{host}", "--port", "{port}", "--served-model-name", model.name]
    argv += ["--mem-fraction-static", f"{model.gpu_memory_utilization:g}"]
    argv += ["--tensor-parallel-size", str(model.tensor_parallel_size)]
    argv += ["--pipeline-parallel-size", str(model.pipeline_parallel_size)]
    argv += ["--context-length", str(model.max_model_len)] if model.max_model_len else []
    argv += ["--trust-remote-code"] if model.trust_remote_code else []
    argv += ["--enable-metrics", "--enable-cache-report", "--max-running-requests", str(_DEFAULT_SLOTS)]
    return [*argv, *model.engine_args]


def _refuse_options(model: ModelConfig, own: Collection[str]) -> None:
    """Raise RefusedError for the first argument that is one of this program's ``own``."""
    for word in model.engine_args:
        name = word.partition("=")[0].replace("_", "-")
        if name in own:
            raise RefusedError(
                f"model {model.name}: engine_args: {name} is set by this program; delete it "
                "(name and base_port are keys of the model, the key is generated for you)"
            )


@dataclass(frozen=True)
class LlamaCppOptions:
    """Options of the embedded engine; ``threads`` 0 = half of the available processors."""

    slots: int = 4
    threads: int = 0
    context_tokens: int = 2048  # per slot


def llama_cpp_options(model: ModelConfig) -> LlamaCppOptions:
    """Options of the embedded engine from a model's engine_args and max_model_len. RefusedError if they are invalid."""
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


def _llama_cpp_argv(model: ModelConfig, _: JobShape) -> list[str]:
    options = llama_cpp_options(model)
    argv = ["{python}", "{program}", "llama-cpp", "--model-path", model.model_path, "--name", model.name]
    argv += ["--host", "{host}", "--port", "{port}", "--slots", str(options.slots)]
    return [*argv, "--threads", str(options.threads), "--context-tokens", str(options.context_tokens)]


def _check_llama_cpp(model: ModelConfig) -> None:
    llama_cpp_options(model)


def _command_argv(model: ModelConfig, _: JobShape) -> list[str]:
    return replace_placeholders(model.command or (), {"model_path": model.model_path, "name": model.name})


def _check_command(model: ModelConfig) -> None:
    if model.idle_shutdown_minutes is not None:
        raise RefusedError(f"model {model.name}: idle_shutdown_minutes: engine: command reports no load; delete it")
    if model.engine_args:
        raise RefusedError(f"model {model.name}: engine_args: engine: command takes none; put them in command")


# To add an engine, add a row, and its name to ENGINE_NAMES.
ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        package="vllm",
        argv=_vllm_argv,
        key_variable="VLLM_API_KEY",
        check=functools.partial(_refuse_options, own=_VLLM_OWN_OPTIONS),
        slots=_vllm_slots,
        takes_priority=_vllm_takes_priority,
        probe=EngineProbe(
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
            progress=_SHARD_PROGRESS,
            is_guarded=True,
        ),
        may_face_network=True,
        spans_nodes=True,
    ),
    "sglang": Engine(
        package="sglang",
        argv=_sglang_argv,
        check=functools.partial(_refuse_options, own=_SGLANG_OWN_OPTIONS),
        slots=lambda model: _option(model.engine_args, "--max-running-requests") or _DEFAULT_SLOTS,
        probe=EngineProbe(
            metrics={
                "running": ("sglang:num_running_reqs",),
                "waiting": ("sglang:num_queue_reqs",),
                "kv_usage": ("sglang:token_usage",),
                "kv_capacity_tokens": ("sglang:max_total_num_tokens",),
                "prefix_queries": ("sglang:prompt_tokens_total",),
                "prefix_hits": ("sglang:cached_tokens_total",),
                "preemptions": ("sglang:num_retracted_requests_total",),
                "prompt_tokens": ("sglang:prompt_tokens_total",),
                "generation_tokens": ("sglang:generation_tokens_total",),
            },
            progress=_SHARD_PROGRESS,
        ),
    ),
    "llama_cpp": Engine(
        package="xllamacpp",
        argv=_llama_cpp_argv,
        check=_check_llama_cpp,
        slots=lambda model: llama_cpp_options(model).slots,
        probe=EngineProbe(
            metrics={
                "running": ("llamacpp:requests_processing",),
                "waiting": ("llamacpp:requests_deferred",),
                # prompt_tokens_total counts only processed tokens.
                "prefix_queries": ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
                "prefix_hits": ("llamacpp:prompt_tokens_cached_total",),
                "prompt_tokens": ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
                "generation_tokens": ("llamacpp:tokens_predicted_total",),
            },
        ),
        uses_gpus=False,
        may_face_network=True,  # llama.cpp requires the key: see test_slurm_replicas.py
        lacks=LACKS,
    ),
    "command": Engine(
        argv=_command_argv,
        check=_check_command,
        slots=lambda _: 0,
        # A server without /health answers 404 once it is serving; while loading it answers 503 or not at all.
        probe=EngineProbe(healthy_below=500),
    ),
}

# Engines that can prove they know the key before it is sent to them.
GUARDED_ENGINES = frozenset(name for name, engine in ENGINES.items() if engine.probe.is_guarded)


def render_engine(model: ModelConfig, stop_grace: float = STOP_GRACE_S, nodes: int = 1) -> EngineSpec:
    """How `serve` starts and probes the engine of a model."""
    engine = ENGINES[model.engine]
    shape = JobShape(stop_grace, nodes)
    ranks = engine.argv(model, dataclasses.replace(shape, is_rank=True)) if nodes > 1 else ()
    return EngineSpec(
        name=model.engine,
        argv=tuple(engine.argv(model, shape)),
        rank_argv=tuple(ranks),
        key_variable=engine.key_variable,
        slots=engine.slots(model),
        takes_priority=engine.takes_priority(model),
        uses_gpus=engine.uses_gpus,
        package=engine.package,
        probe=engine.probe,
    )


def serve_spec(replica: str, model: ModelConfig, run_directory: str, key_file: str, **rest: Any) -> ServeSpec:
    """The specification of a replica for `serve`; ``rest`` are further fields of ServeSpec."""
    rendered = dataclasses.replace(model, model_path="{model_path}") if model.stage else model  # known on the node
    engine = render_engine(rendered, rest.get("stop_grace", STOP_GRACE_S), rest.get("nodes", 1))
    is_given_gpus = engine.uses_gpus and "CUDA_VISIBLE_DEVICES" not in model.env
    return ServeSpec(
        replica=replica,
        model=model.name,
        model_path=model.model_path,
        engine=engine,
        run_directory=run_directory,
        key_file=key_file,
        base_port=model.base_port,
        env=model.env,
        idle_shutdown_minutes=model.idle_shutdown_minutes,
        stage=model.stage,
        gpus=model.tensor_parallel_size * model.pipeline_parallel_size if is_given_gpus else 0,
        **rest,
    )


def check_engine_args(model: ModelConfig) -> None:
    """Check a model's options before anything starts. Raises RefusedError if its engine can't take them."""
    ENGINES[model.engine].check(model)


def plain_command(model: ModelConfig) -> list[str]:
    """The command line that starts a model's engine on this machine, with the first port tried."""
    python, program, _ = self_command("serve")
    here = {"python": python, "program": program, "host": "127.0.0.1", "port": model.base_port}
    return replace_placeholders(ENGINES[model.engine].argv(model, JobShape()), here)

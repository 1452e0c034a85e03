"""Records and specifications, as JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.protocol import (
    GpuSample,
    ReplicaFailure,
    ReplicaRecord,
    record_from_json,
    spec_from_json,
)
from agent_infra_core.settings import ModelConfig


def test_a_record_survives_its_json() -> None:
    record = ReplicaRecord(
        replica="r",
        model="m",
        state="failed",
        engine="vllm",
        node="n",
        pid=1,
        process="p",
        failure=ReplicaFailure("offline", "line", "hint"),
        gpus=(GpuSample("H100", None, 1, 2, 3.0, None),),
        gpu_ids=("0", "1"),
    )
    assert record_from_json(json.dumps(dataclasses.asdict(record))) == record


def test_a_record_of_a_newer_version_is_read_without_what_it_adds() -> None:
    values = {"replica": "r", "model": "m", "state": "ready", "engine": "vllm", "node": "n", "pid": 1, "process": "p"}
    assert record_from_json(json.dumps({**values, "novelty": 1})).state == "ready"


@pytest.mark.parametrize("text", ["", "[]", "null", '{"replica": "r"}', "{"])
def test_what_is_no_record_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        record_from_json(text)


def test_a_specification_survives_its_json() -> None:
    model = ModelConfig("m", "p", engine_args=("--x", "1"), command=("a", "{port}"), env={"A": "b"}, max_model_len=5)
    spec = serve_spec("r", model, "/run", "/key", gpu_ids=("GPU-1",), stop_grace=3.0)
    assert spec_from_json(json.dumps(dataclasses.asdict(spec))) == spec

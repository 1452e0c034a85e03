"""Weights: what a fetch printed."""

from __future__ import annotations

import pytest

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.weights import fetched_path
from agent_infra_core.settings import ModelConfig


@pytest.mark.parametrize("output", [b"", b"Traceback", b"[]", b'{"other": 1}'])
def test_a_fetch_that_ended_without_a_word_is_an_error(output: bytes) -> None:
    with pytest.raises(RefusedError, match="model m: fetching org/x ended with exit status 137 and no message"):
        fetched_path(ModelConfig("m", "org/x"), output, 137)


def test_what_a_fetch_printed_before_does_not_hide_its_outcome() -> None:
    assert fetched_path(ModelConfig("m", "org/x"), b'warning: ...\n{"path": "/cache"}\n', 0) == "/cache"

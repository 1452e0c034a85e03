"""Session affinity in front of two real vLLM engines on CPU; minutes, so only with --slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from routing_vllm import Sizes, compare
from testbed.vllm import KV_TOKENS, tiny_weights

from agent_infra_core.routing.policies import Ours
from agent_infra_core.routing.replay import Replay

pytestmark = pytest.mark.slow


def test_two_replicas_hit_as_much_as_one_and_share_the_sessions(tmp_path: Path) -> None:
    """Times aren't asserted: benchmarks/routing_vllm.py measures them, and its model is large enough for them."""
    weights = tiny_weights(tmp_path / "weights", 64, 2, 8192)
    seen = compare(tmp_path, weights, Sizes(sessions=8, turns=6))
    assert seen.of_ceiling >= 0.95
    assert seen.affinity.skew <= 1.3
    assert seen.round_robin.hit_rate < 0.9 * seen.affinity.hit_rate
    simulated = Replay(seen.round_robin.recording(), KV_TOKENS)
    assert simulated.recorded.hit_rate == pytest.approx(seen.round_robin.hit_rate, abs=0.1)
    assert simulated.run(Ours).hit_rate == pytest.approx(seen.affinity.hit_rate, abs=0.1)

"""The text of GET /metrics: what Prometheus makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import agent_infra
from agent_infra_core import __version__
from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.metrics import StatsMetrics, TurnMetrics, metrics_text
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord

STATS = json.loads((Path(agent_infra.__file__).parent / "tests/golden/stats.json").read_text())
USES = {ReplicaUse("m-1", "m", "H100", 2, "ready_busy"): 50.0, ReplicaUse("m-2", "m", "H100", 2, "ready_busy"): 10.0}


def record(number: int = 1, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {"outcome": "completed", "model": "m", "backend": "m-1", "queue_ms": 0.5, **fields}
    return TurnRecord(turn=f"t{number}", finished_at=1.0, status=200, **values)


def samples(turns: TurnMetrics, stats: Any = STATS) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) → value, as Prometheus's own parser reads it."""
    text = metrics_text(turns, StatsMetrics(stats, USES)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("agent_infra_")
        assert family.documentation
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels)]
            key = (sample.name, *labels)
            found[key] = sample.value
    return found


def test_turns_are_counted_by_backend_model_and_outcome() -> None:
    turns = TurnMetrics()
    for outcome in ("completed", "completed", "cut"):
        turns.add(record(outcome=outcome, retries=1, prompt_tokens=100))
    turns.add(record(outcome="rejected", backend=None))
    found = samples(turns)
    assert found["agent_infra_turns_total", "m-1", "m", "completed"] == 2
    assert found["agent_infra_turns_total", "m-1", "m", "cut"] == 1
    assert found["agent_infra_turns_total", "", "m", "rejected"] == 1
    assert found["agent_infra_prompt_tokens_total", "m"] == 300
    assert found["agent_infra_retries_total", "m"] == 3


def test_only_a_turn_with_a_miss_was_prefilled_again() -> None:
    turns = TurnMetrics()
    turns.add(record(expected_cached_tokens=95, cached_tokens=80))  # all of its whole blocks
    turns.add(record(expected_cached_tokens=800))  # its engine does not tell
    turns.add(record(expected_cached_tokens=800, cached_tokens=500, cache_miss="evicted from m-1"))
    assert samples(turns)["agent_infra_prefilled_again_tokens_total", "m"] == 300


def test_a_histogram_is_cumulative_with_its_sum_and_count() -> None:
    turns = TurnMetrics()
    durations_ms = [0.0, 0.9, 1.5, 3.0, 3.9, 2500.0, 1e9]
    for ms in durations_ms:
        turns.add(record(inference_ms=ms))
    turns.add_post(1500.0)
    found = samples(turns)
    buckets = {float(key[1]): n for key, n in found.items() if key[0] == "agent_infra_inference_seconds_bucket"}
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert counts == sorted(counts)
    assert [buckets[bound] for bound in (0.001, 0.002, 0.004, 2.048, 4.096, float("inf"))] == [2, 3, 5, 5, 6, 7]
    assert found["agent_infra_inference_seconds_count", "m"] == 7
    assert found["agent_infra_inference_seconds_sum", "m"] == pytest.approx(sum(durations_ms) / 1000)
    assert found["agent_infra_post_seconds_count",] == 1


def test_the_state_of_stats_is_there_as_gauges() -> None:
    found = samples(TurnMetrics())
    first = STATS["backends"][0]
    assert found["agent_infra_info", __version__] == 1
    assert found["agent_infra_backend_up", first["id"], "qwen"] == 1
    assert found["agent_infra_backend_up", "qwen-4", "qwen"] == 0
    assert found["agent_infra_backend_gpu_memory_bytes", first["id"], "qwen"] == first["gpu"]["memory_total"]
    assert found["agent_infra_backend_gpu_utilization_ratio", first["id"], "qwen"] == first["gpu"]["utilization"] / 100
    assert found["agent_infra_queue_turns",] == STATS["queue"]["pending"]
    assert found["agent_infra_history_up",] == 1
    assert found["agent_infra_replica_seconds_total", "H100", "m", "ready_busy"] == 60
    assert found["agent_infra_gpu_seconds_total", "H100", "m", "ready_busy"] == 120


def test_what_is_not_known_is_left_out() -> None:
    tracker = Tracker(lambda: 1_800_000_000.0)
    history = {"path": None, "state": "off", "reason": None, "turns": None}
    found = samples(TurnMetrics(), {**tracker.snapshot([], [], "least_load"), "history": history})
    assert ("agent_infra_queue_turns",) not in found
    assert ("agent_infra_history_turns",) not in found
    assert found["agent_infra_history_up",] == 0


def test_no_label_grows_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.metrics.MAX_METRIC_SERIES", 10)
    turns = TurnMetrics()
    for number in range(30):
        turns.add(record(number, backend=f"m-{number}", session=f"secret-session-{number}"))
    text = metrics_text(turns).decode()
    assert text.count("agent_infra_turns_total{") == 10
    assert "secret-session" not in text


def test_names_have_their_units() -> None:
    text = metrics_text(TurnMetrics(), StatsMetrics(STATS, USES)).decode()
    kinds = dict(line.split(" ")[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    assert [name for name, kind in kinds.items() if (kind == "counter") != name.endswith("_total")] == []
    assert [name for name, kind in kinds.items() if kind == "histogram" and not name.endswith("_seconds")] == []
    assert [name for name in kinds if "_ms" in name or "percent" in name or "hours" in name] == []

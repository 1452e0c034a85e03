"""The /stats document, its schema and its sample say the same. Run as a program, this writes the sample anew."""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from clock import Clock
from stats_schema import SCHEMA, check_stats

from agent_infra_core.insight.series import turn_row
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import (
    Backend,
    GpuSample,
    ReplicaFailure,
    ReplicaRecord,
    SessionEnded,
    TurnAnswering,
    TurnFinished,
    TurnSent,
    TurnStarted,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
START = 1_795_360_000.0
TASKS = ["django-11099", "flask-4992", "sympy-20590", "astropy-6938"]


class Run:
    """Half an hour of twelve agents on three replicas, from a seed."""

    def __init__(self) -> None:
        self.clock, self.random = Clock(START), random.Random(7)
        self.tracker = Tracker(self.clock)
        self.turns = 0
        self.context: dict[str, int] = {}

    def take_turn(self, agent: int) -> Iterator[float]:
        """One turn of an agent; yields the seconds until it has something more to say."""
        at = self.random.lognormvariate
        self.turns += 1
        turn, session = f"5f3a91c0b7de-{self.turns:x}", f"auto-{agent:02x}" if agent > 9 else f"run-{agent}"
        told: dict[str, Any] = {"pre_ms": at(7.3, 0.5), "post_ms": at(6.5, 0.5)} if agent < 8 else {}
        backend = f"qwen-{1 + (agent + (self.turns if agent == 3 else 0)) % 3}"
        client = f"me@login1:{4100 + agent // 4} python swe_agent.py" if agent < 10 else None
        started = TurnStarted(
            turn, self.clock.now, "qwen", "/v1/chat/completions", session, TASKS[agent % 4], client, agent % 2 == 0,
            prompt=f"Observation {self.turns}: the tests still fail.", **told,
        )  # fmt: skip
        self.tracker.observe(started)
        queue_s, ttft_s, rest_s = (self.random.expovariate(1 / mean) for mean in (0.05, 0.4, 4.0))
        yield queue_s
        self.tracker.observe(TurnSent(turn, self.clock.now, backend, 1000 * queue_s))
        yield ttft_s
        self.tracker.observe(TurnAnswering(turn, self.clock.now, 1000 * ttft_s))
        yield rest_s
        held = self.context.get(session, 3000)
        prompt, answer = held + (1200 if agent == 5 else 60), self.random.randrange(80, 400)
        self.context[session] = prompt + answer
        outcome = self.random.choices(["completed", "cut", "aborted"], [96, 2, 2])[0]
        cached = 1536 if agent == 3 else held // 16 * 16
        self.tracker.observe(
            TurnFinished(
                turn, self.clock.now, outcome, 200, backend, 1000 * queue_s, 1000 * ttft_s, 1000 * (ttft_s + rest_s),
                0, prompt, answer, cached, finish_reason="tool_calls" if outcome == "completed" else None,
                error="the replica died" if outcome == "cut" else None, gaps={"32": 40, "35": 9},
                answer="I will run the tests once more.",
            )
        )  # fmt: skip
        yield at(7.8, 0.4) / 1000

    def gauges(self) -> dict[str, Any]:
        gpu = dataclasses.asdict(GpuSample("NVIDIA H100 80GB HBM3", 83.0, 68 << 30, 80 << 30, 512.0, 61.0))
        load = {"state": "ready", "running": 2, "waiting": 0, "kv_usage": 0.41, "kv_capacity_tokens": 430_000}
        load |= {"prefix_queries": 900_000, "prefix_hits": 700_000, "preemptions": 0, "prompt_tokens": 910_000}
        load |= {"generation_tokens": 60_000, "at": self.clock.now - 0.5, "gpus": [gpu]}
        backends = {
            f"qwen-{number}": {
                "healthy": number != 3, "reason": "connection refused" if number == 3 else None,
                "in_flight": 2, "requests": self.turns // 3, "errors": 1, "load": load,
            }
            for number in (1, 2, 3)
        }  # fmt: skip
        waiting: list[dict[str, Any]] = [
            {"turn": "5f3a91c0b7de-9", "session": "run-1", "model": "qwen", "waited_ms": 412, "held": True, "why": "…"}
        ]
        return {
            "at": self.clock.now,
            "backends": backends,
            "queue": {"pending": 1, "held": 1, "in_flight": 6, "oldest_ms": 412, "waiting": waiting},
            "counters": {"requests": self.turns, "errors": 2, "retries": 1, "aborted": 3, "rejected": 1},
            "rss_bytes": 52_428_800,
            "connections": 12,
        }

    def document(self) -> Any:
        due = [(START + agent, agent, self.take_turn(agent)) for agent in range(12)]
        for second in range(1800):
            while due[0][0] <= START + second:
                at, agent, life = heapq.heappop(due)
                self.clock.now = max(at, self.clock.now)
                wait = next(life, None)
                if wait is not None:
                    heapq.heappush(due, (at + wait, agent, life))
                elif agent != 7 or second < 1400:  # else it dies, thinking
                    heapq.heappush(due, (at, agent, self.take_turn(agent)))
            self.clock.now = max(START + second, self.clock.now)
            self.tracker.sample(self.gauges())
        self.tracker.observe(SessionEnded("run-9", self.clock.now))
        return self.tracker.snapshot(*self.replicas(), "least_load")

    def replicas(self) -> tuple[list[dict[str, Any]], list[Backend]]:
        records = [
            ReplicaRecord(
                f"qwen-{number}", "qwen", "ready", "vllm", f"gpu0{number}", 4000 + number, "boot:1", port=5900 + number,
                slots=256, started_at=START - 300, ready_at=START - 120, ends_at=START + 86_000,
                gpus=(GpuSample("NVIDIA H100 80GB HBM3", 80.0, 68 << 30, 80 << 30, 500.0, 60.0),),
            )
            for number in (1, 2, 3)
        ]  # fmt: skip
        failure = ReplicaFailure("out_of_memory", "CUDA out of memory", "lower gpu_memory_utilization")
        records.append(ReplicaRecord("qwen-4", "qwen", "failed", "vllm", "gpu04", 9, "boot:1", failure=failure))
        records.append(ReplicaRecord("qwen-5", "qwen", "loading", "vllm", "gpu05", 9, "boot:1", progress="5/9"))
        table = [Backend(f"qwen-{number}", "qwen", "127.0.0.1", 5900 + number) for number in (1, 2, 3)]
        return [dataclasses.asdict(record) for record in records], table


def sample() -> Any:
    """A whole document, with what the controller's other parts put in."""
    document = json.loads(json.dumps(Run().document()))
    tunnel = {"state": "up", "reconnects": 1, "reason": None, "driver": "sshtunnel", "mode": "login"}
    for backend in document["backends"][:3]:
        backend |= {"tunnel": tunnel, "partition": "gpu"}
    spent = {"pending": 0.1, "loading": 0.15, "ready_busy": 1.2, "ready_idle": 0.3}
    hours = {"gpu_hours": spent, "replica_hours": spent}
    replicas = [{"replica": "qwen-1", "model": "qwen", **hours}]
    accounting = {"since": START, **hours, "by_model": [{"model": "qwen", **hours}], "by_replica": replicas}
    history = {"path": "/home/me/.local/state/agent-infra/default/history.db", "state": "on", "reason": None}
    analysis = json.loads((GOLDEN / "analysis.json").read_text())
    document["throughput"]["history"] = document["throughput"]["history"][-60:]
    document["recent_turns"] = document["recent_turns"][:40]
    left = {"value": 1260.0, "low": 1100.0, "high": 1480.0, "reason": None}
    straggler = {"task": "task-7", "turns": 61, "usual_turns": 28.0, "running_s": 940.5}
    run = {
        "name": "night",
        "model": "qwen",
        "announced_at": START,
        "ended_at": None,
        "tasks": 200,
        "done": 81,
        "running": 20,
        "aborted_share": 0.0041,
        "gpu_time": {
            "unit": "GPU-s",
            "held": 5940.0,
            "wasted": 1213.2,
            "held_per_task": 58.81,
            "wasted_per_task": 12.01,
            "prefilled_again": 108.0,
            "failed": 25.2,
            "idle": 1080.0,
        },
        "remaining_s": left,
        "walltime_at": START + 86_000,
        "ends_before_walltime": 1.0,
        "stragglers": [straggler],
        "what_ifs": [{"name": name, "remaining_s": left} for name in ("+1 replica", "−25 % agents")],
    }
    return {
        **document,
        "accounting": accounting,
        "history": {**history, "turns": 2874},
        "analysis": analysis,
        "runs": [run],
    }


def as_text(value: Any, indent: str = "") -> str:
    """JSON with what fits into a line in one, so that a person can read it and a diff says what changed."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= 150 or not isinstance(value, (dict, list)):
        return line
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    deeper = indent + " "
    parts = [deeper + (f"{json.dumps(key)}: " if key else "") + as_text(item, deeper) for key, item in items]
    brackets = "{}" if isinstance(value, dict) else "[]"
    return f"{brackets[0]}\n{f',{chr(10)}'.join(parts)}\n{indent}{brackets[1]}"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_field_is_described() -> None:
    def nameless(schema: Any, name: str) -> Iterator[str]:
        for key, field in schema.get("properties", {}).items():
            told = {**SCHEMA["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {}), **field}
            if "description" not in told and "properties" not in told:
                yield f"{name}.{key}"
            yield from nameless(told, f"{name}.{key}")
            yield from nameless(told.get("items", {}), f"{name}.{key}[]")

    assert list(nameless(SCHEMA, "")) == []


def test_a_document_without_traffic_fits_the_schema() -> None:
    tracker = Tracker(Clock(START))
    check_stats(tracker.snapshot([], [], "least_load"))
    tracker.sample({})
    check_stats(tracker.snapshot([], [Backend("b", "m", "127.0.0.1", 1)], "least_load"))


def test_the_sample_fits_the_schema_and_is_what_the_tracker_says() -> None:
    document = sample()
    check_stats(document)
    remedy = "PYTHONPATH=.:tests python tests/unit/insight/test_stats_schema.py"
    assert as_text(document) + "\n" == (GOLDEN / "stats.json").read_text(), remedy


def test_the_sample_shows_every_part_of_the_page() -> None:
    document = sample()
    assert all(document[name] for name in SCHEMA["required"] if name != "snapshot_age_ms")
    assert {row["kind"] for row in document["watchdog"]} == {"silent", "runaway_context", "thrashing"}
    states = {session["state"] for client in document["clients"] for session in client["sessions"]}
    assert states >= {"idle", "prefill", "decoding", "ended"}


def test_a_record_is_a_row_and_its_fields_are_the_schemas() -> None:
    assert {field.name for field in dataclasses.fields(TurnRecord)} == set(SCHEMA["$defs"]["turn"]["properties"])
    of_session = turn_row(TurnRecord("t", START, "completed", 200), 1)
    assert set(of_session) == {
        part for name in ("turn", "session_turn") for part in SCHEMA["$defs"][name]["properties"]
    }


if __name__ == "__main__":
    (GOLDEN / "stats.json").write_text(as_text(sample()) + "\n")

"""Finished turns as spans: what they say, that a real receiver decodes them, and that nobody waits for one."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import pytest
from otlp_receiver import attributes, otlp_receiver
from program import wait_for

import agent_infra
from agent_infra_core.control import exporter
from agent_infra_core.control.exporter import TurnExporter, span_maker
from agent_infra_core.errors import RefusedError
from agent_infra_core.insight.spans import Span
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.settings import OtelConfig

pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
START = 1_795_305_600.0
TURN = TurnRecord(
    turn="5f0c-1",
    finished_at=START + 3,
    outcome="completed",
    status=200,
    session="web-1",
    task="shop",
    client="a1",
    model="qwen",
    path="/v1/chat/completions",
    stream=True,
    backend="qwen-1",
    started_at=START,
    ttft_ms=250.0,
    queue_ms=12.5,
    prompt_tokens=1000,
    completion_tokens=50,
    cached_tokens=900,
    finish_reason="stop",
    prompt="Which one?",
    answer="The blue one.",
)


class Sender:
    """Takes spans, or not; ``hold`` keeps it busy."""

    def __init__(self) -> None:
        self.batches: list[list[Span]] = []
        self.takes, self.free = True, threading.Event()
        self.free.set()

    def send(self, spans: Sequence[Span]) -> bool:
        self.free.wait()
        self.batches.append(list(spans))
        return self.takes

    def close(self) -> None:
        self.free.set()


def turns(count: int) -> list[TurnRecord]:
    return [TurnRecord(f"t{number}", START, "completed", 200) for number in range(count)]


@pytest.fixture
def said() -> list[str]:
    return []


def made_exporter(sender: object, said: list[str], has_text: bool = False) -> TurnExporter:
    make = span_maker("default", {"qwen": "vllm"}, has_text)
    made = TurnExporter(sender, make, lambda message, _: said.append(message))  # type: ignore[arg-type]
    made.start()
    return made


def test_a_receiver_decodes_a_trace_of_a_session_with_a_span_of_each_turn(said: list[str]) -> None:
    failed = TurnRecord(
        "5f0c-2", START + 9, "cut", 502, session="web-1", model="qwen", error="it died", started_at=START + 5
    )
    other = TurnRecord("5f0c-3", START + 9, "completed", 200, session="web-2", model="qwen", path="/v1/embeddings")
    with otlp_receiver() as receiver:
        sender = agent_infra.span_sender(OtelConfig(endpoint=receiver.endpoint, headers={"authorization": "Basic x"}))
        made = made_exporter(sender, said, has_text=True)
        made.add([TURN, failed, other])
        wait_for(lambda: len(receiver.spans) == 3, "three spans")
        made.close()
    first, second, third = receiver.spans
    assert first.trace_id == second.trace_id != third.trace_id
    assert (len(first.trace_id), len(first.span_id), len({first.span_id, second.span_id})) == (16, 8, 2)
    assert (first.name, third.name, first.kind) == ("chat qwen", "embeddings qwen", 3)
    assert (first.start_time_unix_nano, first.end_time_unix_nano) == (int(START * 1e9), int((START + 3) * 1e9))
    told = attributes(first)
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.conversation.id": "web-1",
        "gen_ai.request.model": "qwen",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.output_tokens": 50,
        "gen_ai.usage.cache_read.input_tokens": 900,
        "agent_infra.replica": "qwen-1",
        "agent_infra.queue_ms": 12.5,
    }.items() <= told.items()
    assert json.loads(told["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "Which one?"}]}
    ]
    assert (told["input.value"], told["output.value"], told["output.mime_type"]) == (
        *("Which one?", "The blue one."),
        "text/plain",
    )
    assert (second.status.code, second.status.message) == (2, "it died")
    assert attributes(second)["error.type"] == "cut"
    assert receiver.resources[0]["service.name"] == "agent-infra"
    assert (receiver.requests[0]["path"], receiver.requests[0]["authorization"]) == ("/v1/traces", "Basic x")
    assert said == []


def test_prompts_and_answers_stay_here_unless_asked_for() -> None:
    told = span_maker("default", {}, False)(TURN).attributes
    assert not {name for name in told if "messages" in name}
    assert not {name for name in told if name.startswith(("input.", "output."))}
    assert "Which one?" not in str(told)


def test_an_embedding_has_its_text_and_no_messages() -> None:
    told = span_maker("default", {}, True)(replace(TURN, path="/v1/embeddings", answer="")).attributes
    assert told["input.value"] == "Which one?"
    assert not {name for name in told if "messages" in name or name.startswith("output.")}


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        ("error", 400, "400"),
        ("rejected", 429, "429"),
        ("error", 0, "error"),
        ("cut", 200, "cut"),
        ("aborted", 0, "aborted"),
    ],
)
def test_an_error_has_the_type_that_tells_it_from_others(outcome: str, status: int, error: str) -> None:
    made = span_maker("default", {}, True)(replace(TURN, outcome=outcome, status=status, finish_reason=None))
    assert (made.attributes["error.type"], made.error) == (error, outcome)
    assert json.loads(made.attributes["gen_ai.output.messages"])[0]["finish_reason"] == "error"


def test_langfuse_gets_the_first_token_and_counts_cached_tokens_once() -> None:
    told = span_maker("default", {}, False)(TURN).attributes
    assert json.loads(told["langfuse.observation.usage_details"]) == {
        "input": 100,
        "input_cached_tokens": 900,
        "output": 50,
        "total": 1050,
    }
    first_at = datetime.fromisoformat(told["langfuse.observation.completion_start_time"])
    assert first_at.timestamp() == pytest.approx(START + 0.2625, abs=0.001)
    unknown = span_maker("default", {}, False)(TurnRecord("t", START, "error", 500)).attributes
    assert not {name for name in unknown if name.startswith("langfuse.")}


def test_attributes_follow_the_semantic_conventions() -> None:
    conventions = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}
    told = span_maker("default", {}, True)(TURN).attributes
    assert {name for name in told if name.startswith("gen_ai.")} - known == set()


def test_what_a_receiver_refuses_is_counted_and_told_once(said: list[str]) -> None:
    with otlp_receiver() as receiver:
        receiver.status = 400
        made = made_exporter(agent_infra.span_sender(OtelConfig(endpoint=receiver.endpoint)), said)
        made.add(turns(1))
        wait_for(lambda: made.lost == 1, "the first batch")
        made.add(turns(2))
        wait_for(lambda: made.lost == 3, "the second batch")
        receiver.status = 200
        made.add(turns(4))
        wait_for(lambda: len(receiver.spans) == 4, "the third batch")
        made.close()
    assert [line.partition(";")[0] for line in said] == [
        "turns were dropped: the receiver of otel.endpoint refused them",
        "the receiver of otel.endpoint takes turns again",
        "3 turns were not exported as spans",
    ]


def test_a_receiver_that_hangs_keeps_nobody_and_no_more_than_a_bound(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "WAITING_TURNS", 100)
    monkeypatch.setattr(exporter, "EXPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(exporter, "EXPORT_CLOSE_S", 0.1)
    sender = Sender()
    sender.free.clear()
    made = made_exporter(sender, said)
    for _ in range(10):
        made.add(turns(50))
    assert made.lost >= 500 - 100 - 100
    made.close()
    assert "turns were not exported as spans" in said[-1]


def test_the_rest_is_sent_at_the_end(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "EXPORT_INTERVAL_S", 60.0)
    monkeypatch.setattr(exporter, "EXPORTED_TURNS", 10)
    sender = Sender()
    made = made_exporter(sender, said)
    made.add(turns(25))
    made.close()
    assert ([len(batch) for batch in sender.batches], said) == ([10, 10, 5], [])


def test_without_the_packages_the_message_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(RefusedError, match="pip install 'opentelemetry-sdk"):
        agent_infra.span_sender(OtelConfig(endpoint="http://127.0.0.1:4318/v1/traces"))
    assert agent_infra.span_sender(OtelConfig()) is None

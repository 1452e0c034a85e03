"""Turns as OpenTelemetry spans, by the semantic conventions for generative AI: a trace per session. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.turns import TurnRecord, in_seconds

OPERATIONS = {  # end of a path → gen_ai.operation.name
    "chat/completions": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "messages": "chat",
    "embeddings": "embeddings",
}


@dataclass(frozen=True)
class Span:
    """One finished turn. Ids are hashes of names, so a turn that is exported twice is the same span."""

    trace_id: int  # 128 bits, of its session
    span_id: int  # 64 bits
    name: str
    start_ns: int  # since the epoch
    end_ns: int
    attributes: Mapping[str, Any]
    error: str | None  # None: it was completed


def turn_span(record: TurnRecord, deployment: str, provider: str, has_text: bool) -> Span:
    """The span of a turn. ``provider`` is the engine; ``has_text``: with the excerpts of prompt and answer."""
    operation = next((name for path, name in OPERATIONS.items() if (record.path or "").endswith(path)), "other")
    known = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider,
        "gen_ai.conversation.id": record.session,
        "session.id": record.session,
        "gen_ai.agent.id": record.client,
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.id": record.turn,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": in_seconds(record.ttft_ms) if record.stream else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "http.response.status_code": record.status or None,
        "error.type": None if record.outcome == "completed" else record.outcome,
        "agent_infra.deployment": deployment,
        "agent_infra.outcome": record.outcome,
        "agent_infra.replica": record.backend,
        "agent_infra.task": record.task,
        "agent_infra.retries": record.retries,
        "agent_infra.cache_miss": record.cache_miss,
        "agent_infra.expected_cached_tokens": record.expected_cached_tokens,
        **{f"agent_infra.{name}": getattr(record, name) for name in ("think_ms", "queue_ms", "held_ms", "retry_ms")},
        **(_messages(record) if has_text else {}),
    }
    started_at = record.finished_at if record.started_at is None else record.started_at
    return Span(
        trace_id=_hash(16, deployment, record.session or record.turn),
        span_id=_hash(8, deployment, record.turn),
        name=f"{operation} {record.model}" if record.model else operation,
        start_ns=int(started_at * 1e9),
        end_ns=int(max(started_at, record.finished_at) * 1e9),
        attributes={name: value for name, value in known.items() if value is not None},
        error=None if record.outcome == "completed" else record.error or record.outcome,
    )


def _messages(record: TurnRecord) -> dict[str, str | None]:
    def text(role: str, content: str, **more: str) -> str:
        return json.dumps([{"role": role, "parts": [{"type": "text", "content": content}], **more}], ensure_ascii=False)

    return {
        "gen_ai.input.messages": text("user", record.prompt) if record.prompt else None,
        "gen_ai.output.messages": (
            text("assistant", record.answer, finish_reason=record.finish_reason or "") if record.answer else None
        ),
    }


def _hash(size: int, *names: str) -> int:
    """A number of ``size`` bytes, never 0."""
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "replace"), digest_size=size).digest()
    return int.from_bytes(digest, "big") or 1

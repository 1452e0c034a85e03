"""Turns as OpenTelemetry spans, by the semantic conventions for generative AI: a trace per session. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
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
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": in_seconds(record.ttft_ms) if record.stream else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "http.response.status_code": record.status or None,
        "error.type": _error_type(record),
        "agent_infra.deployment": deployment,
        "agent_infra.turn": record.turn,
        "agent_infra.outcome": record.outcome,
        "agent_infra.replica": record.backend,
        "agent_infra.task": record.task,
        "agent_infra.retries": record.retries,
        "agent_infra.cache_miss": record.cache_miss,
        "agent_infra.tokens_estimated": record.tokens_estimated or None,
        "agent_infra.expected_cached_tokens": record.expected_cached_tokens,
        **{f"agent_infra.{name}": getattr(record, name) for name in ("think_ms", "queue_ms", "held_ms", "retry_ms")},
        **_for_langfuse(record),
        **(_texts(record, operation) if has_text else {}),
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


def _error_type(record: TurnRecord) -> str | None:
    """The status of an error answer, otherwise what became of the turn."""
    if record.outcome in ("error", "rejected") and record.status >= 400:
        return str(record.status)
    return None if record.outcome == "completed" else record.outcome


def _for_langfuse(record: TurnRecord) -> Mapping[str, str | None]:
    """What Langfuse doesn't read from the conventions: when the first token came, and that cached tokens are input
    tokens, which it would add to them.
    """
    usage = first_at = None
    if record.prompt_tokens is not None and record.completion_tokens is not None:
        cached = min(record.cached_tokens or 0, record.prompt_tokens)
        tokens = {"input": record.prompt_tokens - cached, "input_cached_tokens": cached}
        tokens |= {"output": record.completion_tokens, "total": record.prompt_tokens + record.completion_tokens}
        usage = json.dumps(tokens)
    if record.stream and record.started_at is not None and record.ttft_ms is not None:
        at = record.started_at + ((record.queue_ms or 0.0) + record.ttft_ms) / 1000
        first_at = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds")
    return {
        "langfuse.observation.usage_details": usage,
        "langfuse.observation.completion_start_time": first_at,
    }


def _texts(record: TurnRecord, operation: str) -> Mapping[str, str | None]:
    """Prompt and answer, as messages and as OpenInference's plain values: Phoenix lists and searches only these."""

    def message(role: str, content: str, **more: str) -> str:
        return json.dumps([{"role": role, "parts": [{"type": "text", "content": content}], **more}], ensure_ascii=False)

    texts = {"input": record.prompt, "output": record.answer}
    told = {f"{name}.value": text for name, text in texts.items() if text}
    told |= {f"{name}.mime_type": "text/plain" for name, text in texts.items() if text}
    if operation == "embeddings":  # they have no messages
        return told
    reason = record.finish_reason or ("unknown" if record.outcome == "completed" else "error")
    return {
        **told,
        "gen_ai.input.messages": message("user", record.prompt) if record.prompt else None,
        "gen_ai.output.messages": message("assistant", record.answer, finish_reason=reason) if record.answer else None,
    }


def _hash(size: int, *names: str) -> int:
    """A number of ``size`` bytes, never 0."""
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "replace"), digest_size=size).digest()
    return int.from_bytes(digest, "big") or 1

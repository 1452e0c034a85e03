"""Answers, whole or as server-sent events: extracts text and usage, and detects incomplete ones. Pure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent_infra_core.http.bodies import CHUNK_SIZE, LAST_CHUNK, BodyDecoder, encode_chunk
from agent_infra_core.protocol import is_count

MAX_TRACED_BYTES = 1 << 20  # longer bodies and answers aren't assigned to a conversation
CAPTURED_PIECES = 32  # pieces of a stream that are searched for text together: one by one costs three times as much
MAX_HELD_EVENT_BYTES = 1 << 20  # a longer SSE event is forwarded in pieces, without being examined


def holds_whole_events(data: bytes) -> bool:
    """Whether ``data``, which starts between two chunks, holds only complete chunks (not the last one) that each end
    with an event. Then the framing can't split any text that is searched for in ``data``."""
    at = 0
    while at < len(data):
        line = CHUNK_SIZE.match(data, at)
        if line is None:
            return False
        at = line.end() + int(line[1], 16) + 2
        if data[at - 4 : at] != b"\n\n\r\n":
            return False
    return at == len(data)


def sendable_text(text: str) -> str:
    """Return ``text`` without lone surrogates, which JSON may contain (``"\\ud83d"``) and UTF-8 may not."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class AnswerDigest:
    """The parts of an answer that tracking keeps."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""
    print: bytes | None = None  # message_fingerprint() of the whole answer, if requested

    def add(self, document: Any) -> None:
        """Add the values in ``document``: a JSON answer or one stream event, in any of the APIs' formats."""
        if isinstance(document, dict):
            for part in (document.get("response"), document.get("message"), document):
                if isinstance(part, dict):  # response and message: /v1/responses and /v1/messages
                    self._take(part)
            if document.get("type") == "message_start":
                self.completion_tokens = None  # this event has only the initial count

    def _take(self, document: Mapping[str, Any]) -> None:
        delta = document.get("delta")
        reason = document.get("stop_reason") or (isinstance(delta, dict) and delta.get("stop_reason"))
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            reason = reason or (isinstance(choice, dict) and choice.get("finish_reason"))
        self.finish_reason = sendable_text(reason) if isinstance(reason, str) else self.finish_reason
        if error := document.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            self.error = sendable_text(str(message or error)[:500])
        usage = document.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _token_count(usage, "prompt_tokens", "input_tokens", self.prompt_tokens)
            self.completion_tokens = _token_count(usage, "completion_tokens", "output_tokens", self.completion_tokens)
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
            cached = details if isinstance(details, dict) else usage
            self.cached_tokens = _token_count(cached, "cached_tokens", "cache_read_input_tokens", self.cached_tokens)


NO_DIGEST: Final = AnswerDigest()  # for an answer that nobody read; never add to it


def _token_count(usage: Mapping[str, Any], name: str, other_name: str, former: int | None) -> int | None:
    """Return the count in ``usage`` under either name, else ``former``."""
    for value in (usage.get(name), usage.get(other_name)):
        if is_count(value):
            return value
    return former


def message_text_and_calls(content: Any, calls: Any = None) -> tuple[str, list[str]]:
    """Return the text of an assistant message and the ids of its tool calls, from OpenAI's or Anthropic's format."""
    if isinstance(content, str) and not calls:
        return content, []
    parts = content if isinstance(content, list) else [{"text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    words = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    called = [part for part in parts if part.get("type") == "tool_use"]
    called += [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return words, [call["id"] for call in called if isinstance(call.get("id"), str)]


_TWO_SUMS = struct.Struct("<II")


def message_fingerprint(words: str, call_ids: Sequence[str]) -> bytes:
    """Return an 8-byte fingerprint of an assistant message's text and tool call ids; clients may change the rest."""
    called = zlib.crc32("\0".join(call_ids).encode("utf-8", "replace")) if call_ids else 0
    return _TWO_SUMS.pack(zlib.crc32(words.strip().encode("utf-8", "replace")), called)


def conversation_key(messages: bytes, answer: bytes) -> str:
    """Return the id of a conversation up to and including an answer: a digest of its messages' fingerprints."""
    return hashlib.blake2b(messages + answer, digest_size=8).hexdigest()


_EVENT = re.compile(rb".*?\r?\n\r?\n|.+", re.DOTALL)
_EVENT_TEXT = re.compile(rb'"(?:content|text|delta)":\s?"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_USAGE = re.compile(rb'"usage":(?!\s*null)')  # some engines send null with every event
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_LAST_EVENT = re.compile(rb"(?:^|\n)(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.completed))")


def event_document(event: bytes) -> Any:
    """Return the JSON document in an SSE event's data lines; None without a valid one."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines)) if lines else None
    except (ValueError, RecursionError):
        return None


def event_call_ids(event: Any) -> list[str]:
    """Return the ids of the tool calls that a stream's event starts."""
    document = event if isinstance(event, dict) else {}
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    return message_text_and_calls([document.get("content_block")], calls)[1]


class EventStream:
    """Converts a replica's SSE answer for the client, from bytes split anywhere.

    It passes on only whole events, so an error event can follow at any time.  Complete chunks of whole events pass
    unchanged; other bytes are decoded and put into new chunks.  A usage event that the client didn't ask for is
    removed.  ``fault`` is set if the answer is incomplete, even if the stream ended normally.
    """

    __slots__ = (
        "_call_ids", "_captured", "_captures", "_cuts_usage", "_held", "_is_clean", "_needs_done", "_passes_verbatim",
        "_pieces", "_tail", "_texts", "_to_chunks", "_traces", "_wanted_text", "decoder", "events", "fault",
        "has_excess", "is_over",
    )  # fmt: skip

    def __init__(
        self,
        decoder: BodyDecoder,
        *,
        to_chunks: bool,
        cuts_usage: bool,
        needs_done: bool,
        wanted_text: int,
        traces: bool = False,
    ) -> None:
        """``traces``: whether the digest needs ``print``."""
        self.decoder = decoder
        self.events = 0  # rough number so far: counts data lines
        self.fault: str | None = None
        self.is_over = self.has_excess = False
        self._to_chunks, self._cuts_usage, self._needs_done = to_chunks, cuts_usage, needs_done
        self._passes_verbatim = decoder.is_chunked and to_chunks
        self._is_clean = self._passes_verbatim  # nothing held back, and between two chunks that may pass unchanged
        self._held = b""
        # The last chunks, which hold usage and finish reason.
        self._tail: deque[bytes] = deque(maxlen=4)
        self._texts: list[bytes] = []  # the start of the answer's text (all of it with traces), JSON-escaped
        self._call_ids: list[str] = []
        self._wanted_text, self._traces = wanted_text, traces
        self._captures = MAX_TRACED_BYTES if traces else 12 * wanted_text  # bytes; a character takes at most 12 in JSON
        self._captured = 0  # bytes
        self._pieces: list[bytes] = []  # not searched for text yet

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send for the received ``data``. Raises WireError if the replica's framing is broken."""
        if (
            not self._is_clean
            or not data.endswith(b"\n\n\r\n")
            or data.find(b"abort") >= 0  # faster than `in`, which first tries to read it as a number
            or (self._cuts_usage and _USAGE.search(data))
            or not holds_whole_events(data)
        ):
            return self._feed_events(data)
        self._tail.append(data)
        self.events += data.count(b"data:")
        if self._captured < self._captures:
            self._capture(data)
        return data

    def close(self) -> bytes:
        """Handle the closed connection: the end of an answer without length or chunks, otherwise a fault."""
        if self.decoder.is_until_close and not self.is_over:
            return self._end(self._held)
        self.fault = self.fault or "the replica died"
        return b""

    @property
    def has_last_event(self) -> bool:
        """Whether the answer's final event arrived: many clients disconnect then, before the replica ends the body."""
        return _LAST_EVENT.search(b"".join(self._tail)) is not None

    def failure(self, event: bytes) -> bytes:
        """Return the bytes that end the stream with an error event after all bytes sent so far."""
        return encode_chunk(event) + LAST_CHUNK if self._to_chunks else event

    def digest(self) -> AnswerDigest:
        """Return the digest, from the last events and the captured text."""
        digest = AnswerDigest()
        pieces: list[bytes] = []
        BodyDecoder(None).feed(b"".join(self._tail), 0, pieces)
        for event in _EVENT.findall(b"".join(pieces)):
            with contextlib.suppress(RecursionError):
                digest.add(event_document(event))
        self._search()
        with contextlib.suppress(ValueError):
            text = json.loads(b'"' + b"".join(self._texts) + b'"')
            digest.text = sendable_text(text[: self._wanted_text])
            if self._traces and self._captured < MAX_TRACED_BYTES:
                digest.print = message_fingerprint(text, self._call_ids)
        return digest

    def _capture(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if len(self._pieces) >= CAPTURED_PIECES:
            self._search()

    def _search(self) -> None:
        """Extract the text from the waiting pieces."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        texts = _EVENT_TEXT.findall(data)
        self._texts += texts
        self._captured += sum(map(len, texts))
        if self._traces and b'"tool_' in data:
            for event in _EVENT.findall(data):
                if b'"tool_use"' in event or (b'"tool_calls"' in event and event.count(b'"id"') > 1):
                    self._call_ids += event_call_ids(event_document(event))

    def _feed_events(self, data: bytes) -> bytes:
        pieces: list[bytes] = []
        self.has_excess = self.decoder.feed(data, 0, pieces) < len(data)
        payload = self._held + b"".join(pieces)
        if self.decoder.is_over:
            return self._end(payload)
        end = max(payload.rfind(b"\n\n") + 2, payload.rfind(b"\n\r\n") + 3)
        end = end if end > 2 else 0
        if len(payload) - end > MAX_HELD_EVENT_BYTES:
            end = len(payload)
        events, self._held = payload[:end], payload[end:]
        self._is_clean = self._passes_verbatim and not self._held and self.decoder.is_between_chunks
        return self._encode(events)

    def _end(self, events: bytes) -> bytes:
        self._held, self.is_over = b"", True
        sent = self._encode(events)
        if self._needs_done and not self.fault and not _DONE.search(b"".join(self._tail)):
            self.fault = "the replica ended the stream before the answer was complete"
        return sent + LAST_CHUNK if self._to_chunks and not self.fault else sent

    def _encode(self, events: bytes) -> bytes:
        if not events:
            return b""
        self._tail.append(encode_chunk(events))
        self.events += events.count(b"\ndata:") + events.startswith(b"data:")
        if self._captured < self._captures:
            self._capture(events)
        if b"abort" in events or (self._cuts_usage and _USAGE.search(events)):
            events = b"".join(self._kept(events))
        return encode_chunk(events) if self._to_chunks else events

    def _kept(self, events: bytes) -> Iterator[bytes]:
        """Yield the events for the client; sets ``fault`` and stops at the one of an engine that was shut down."""
        for event in _EVENT.findall(events):
            document = event_document(event) if b"abort" in event or b'"usage":' in event else None
            if isinstance(document, dict):
                choices = document.get("choices")
                if isinstance(choices, list) and any(is_aborted(choice) for choice in choices):
                    self.fault = "the engine was shut down"
                    return
                if self._cuts_usage and choices == [] and isinstance(document.get("usage"), dict):
                    continue
            yield event


def is_aborted(choice: Any) -> bool:
    """Whether the engine's shutdown ended a choice, even if the answer looks complete."""
    return isinstance(choice, dict) and choice.get("finish_reason") == "abort"

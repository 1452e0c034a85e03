"""Answers, whole or as server-sent events: extracts text and usage, and detects incomplete ones. Pure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent_infra_core.http.bodies import CHUNK_SIZE, LAST_CHUNK, BodyDecoder, encode_chunk
from agent_infra_core.protocol import MAX_FIGURE, is_count

MAX_TRACED_BYTES = 1 << 20  # longer bodies and answers aren't assigned to a conversation
PIECES_AT_ONCE = 32  # pieces of a stream that are read together: one by one costs three times as much
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
    finish_reason: str | None = None  # in the API's own words; of choice 0
    error: str | None = None
    text: str = ""
    print: bytes | None = None  # message_fingerprint() of the whole answer, if requested
    response: str | None = None  # id of an answer of /v1/responses, which a later request may continue
    _usage: dict[str, int] | None = None  # the last valid count of each field

    def add(self, document: Any) -> None:
        """Add the values in ``document``: a JSON answer or one stream event, in any of the APIs' formats."""
        if isinstance(document, dict):
            for part in (document.get("response"), document.get("message"), document):
                if isinstance(part, dict):  # response and message: /v1/responses and /v1/messages
                    self._add_part(part, is_initial=document.get("type") == "message_start")

    def _add_part(self, document: Mapping[str, Any], is_initial: bool) -> None:
        if document.get("object") == "response" and isinstance(document.get("id"), str):
            self.response = document["id"]
        reason = _finish_reason(document)
        self.finish_reason = sendable_text(reason) if isinstance(reason, str) else self.finish_reason
        error = document.get("error")
        if not error and "error" in (document.get("type"), document.get("object")):  # the message stands beside it
            error = document.get("message")
        if error:
            message = error.get("message") if isinstance(error, dict) else error
            self.error = sendable_text(str(message or error)[:500])
        usage = document.get("usage")
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
            if isinstance(details, dict):
                usage = {**usage, "cached_tokens": details.get("cached_tokens")}
            if is_initial:  # the answer's count has only just begun
                usage = {**usage, "output_tokens": None}
            self._add_usage(usage)

    def _add_usage(self, usage: Mapping[str, Any]) -> None:
        """Add the counts in ``usage``. On /v1/messages the prompt is the sum of what was and wasn't cached."""
        known = self._usage = self._usage or {}
        known.update({name: usage[name] for name in _USAGE_FIELDS if is_count(usage.get(name))})
        prompt = known.get("prompt_tokens")
        if prompt is None and "input_tokens" in known:
            cached = known.get("cache_read_input_tokens", 0) + known.get("cache_creation_input_tokens", 0)
            prompt = min(known["input_tokens"] + cached, int(MAX_FIGURE))
        self.prompt_tokens = prompt
        self.completion_tokens = known.get("completion_tokens", known.get("output_tokens"))
        self.cached_tokens = known.get("cached_tokens", known.get("cache_read_input_tokens"))


NO_DIGEST: Final = AnswerDigest()  # for an answer that nobody read; never add to it
_USAGE_FIELDS = (
    *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "cached_tokens"),
    *("cache_read_input_tokens", "cache_creation_input_tokens"),
)


def _finish_reason(document: Mapping[str, Any]) -> Any:
    """Return why an answer ended, as its API reports it; None while it hasn't."""
    delta = document.get("delta")
    reason = document.get("stop_reason") or (delta.get("stop_reason") if isinstance(delta, dict) else None)
    if document.get("status") in ("completed", "incomplete"):  # /v1/responses
        details = document.get("incomplete_details")
        reason = (details.get("reason") if isinstance(details, dict) else None) or document["status"]
    return reason or first_choice(document).get("finish_reason")


def first_choice(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return choice 0 of a completion or of its event; empty if there is none."""
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (None, 0):
            return choice
    return {}


def message_text_and_calls(content: Any, calls: Any = None) -> tuple[str, list[str]]:
    """Return the text of an assistant message and the ids of its tool calls, from OpenAI's or Anthropic's format."""
    if isinstance(content, str) and not calls:
        return content, []
    parts = content if isinstance(content, list) else [{"text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    words = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    called = [part for part in parts if part.get("type") == "tool_use"]
    called += [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return words, [call["id"] for call in called if isinstance(call.get("id"), str) and call["id"]]


def answer_text_and_calls(document: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the text and the tool call ids of a whole answer, of choice 0; without its reasoning."""
    output = document.get("output")
    if isinstance(output, list):  # /v1/responses
        items = [item for item in output if isinstance(item, dict)]
        said = [item.get("content") for item in items if item.get("type", "message") == "message"]
        texts = [message_text_and_calls(content)[0] for content in said]
        return "".join(texts), [str(item["call_id"]) for item in items if item.get("call_id")]
    choice = first_choice(document)
    message = choice.get("message")
    if isinstance(message, dict):
        return message_text_and_calls(message.get("content"), message.get("tool_calls"))
    return message_text_and_calls(choice.get("text") or document.get("content"))


def is_answer_item(item: Any) -> bool:
    """Whether an item of the input of /v1/responses was the model's output: a message, its reasoning, or a call."""
    kind = item.get("type") if isinstance(item, dict) else None
    is_call = isinstance(kind, str) and (kind.endswith("_call") or kind == "reasoning")
    return is_call or (isinstance(item, dict) and item.get("role") == "assistant")


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
_DATA = re.compile(rb"(?:^|\n)data:[ \t]*[^\s]")
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_ERROR_LINES = re.compile(rb"(?:^|\n)event: ?error\r?\n(?:data:)?(.*)", re.DOTALL)
_EVENT_END = re.compile(rb"\n\r?\n")
# An event without any of these adds nothing but text of choice 0. A pattern is searched for only where its words stand,
# and each by itself: one pattern for all takes a hundred times longer.
_NOTABLE: Sequence[tuple[bytes, re.Pattern[bytes] | None]] = (
    *((words, re.compile(rb"%b\s*[^n\s]" % words)) for words in (b'"usage":', b'"tool_calls":', b'_reason":')),
    (b'"index":', re.compile(rb'"index":\s*[1-9]')),
    *((words, None) for words in (b"error", b"[DONE]", b'"tool_use"', b'"message_st', b'"response":')),
)

# The type of the event that ends a stream, on paths whose events have types; so does an error.
_LAST_EVENTS: Mapping[bytes, frozenset[str]] = {
    b"/v1/messages": frozenset({"message_stop"}),
    b"/v1/responses": frozenset({"response.completed", "response.incomplete", "response.failed"}),
}
_COMPLETION_PATHS = frozenset({b"/v1/chat/completions", b"/v1/completions"})  # end with [DONE], or a finish reason


def event_document(event: bytes) -> Any:
    """Return the JSON document in an SSE event's data lines; None without a valid one."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines)) if lines else None
    except (ValueError, RecursionError):
        return None


def event_text(document: Any) -> str:
    """Return the text that a stream's event adds to the answer, to choice 0 where it has several."""
    if not isinstance(document, dict):
        return ""
    delta = document.get("delta")
    if isinstance(delta, str):
        return delta if document.get("type") == "response.output_text.delta" else ""
    said = delta or document.get("content_block")  # /v1/messages
    if isinstance(said, dict):
        return message_text_and_calls(said.get("text"))[0]
    choice = first_choice(document)
    said = choice.get("delta") or choice.get("message")
    return message_text_and_calls(said.get("content") if isinstance(said, dict) else choice.get("text"))[0]


def event_calls(document: Mapping[str, Any]) -> dict[Any, str]:
    """Return the ids of the tool calls in a stream's event, by their index in the answer.

    Only a call's first event has its id: some engines repeat it in each, some send an empty one.
    """
    delta = first_choice(document).get("delta")
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    block, item = document.get("content_block"), document.get("item")
    if isinstance(item, dict) and item.get("call_id"):  # /v1/responses
        calls = [{"index": document.get("output_index"), "id": item["call_id"]}]
    if isinstance(block, dict) and block.get("type") == "tool_use":
        calls = [{"index": document.get("index"), "id": block.get("id")}]
    found: dict[Any, str] = {}
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict) and isinstance(call.get("id"), str) and call["id"]:
            index = call.get("index")
            found[index if isinstance(index, int) else call["id"]] = call["id"]
    return found


class ResponseIndices:
    """Adds the indices that client libraries need to the events of a /v1/responses stream, where they are missing."""

    def __init__(self) -> None:
        self._events = 0
        self._items: dict[Any, int] = {}  # id → its place in the output

    def complete(self, event: bytes) -> bytes:
        """Return an event with its indices; as it is if it isn't JSON."""
        document = event_document(event)
        if not isinstance(document, dict) or not isinstance(document.get("type"), str):
            return event
        document.setdefault("sequence_number", self._events)
        self._events += 1
        item = document.get("item")
        name = item.get("id") if isinstance(item, dict) else document.get("item_id")
        if name is not None:
            document.setdefault("output_index", self._items.setdefault(name, len(self._items)))
            if document["type"].startswith(("response.content_part.", "response.output_text.")):
                document.setdefault("content_index", 0)
        response = document.get("response")
        if isinstance(response, dict):
            response.setdefault("output", [])
        return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), json.dumps(document).encode())


class EventStream:
    """Converts a replica's SSE answer for the client, from bytes split anywhere.

    It passes on only whole events, so an error event can follow at any time.  Complete chunks of whole events pass
    unchanged; other bytes are decoded and put into new chunks.  A usage event that the client didn't ask for is
    removed.  ``fault`` is set if the answer is incomplete, even if the stream ended normally.

    What the events say is read later, many at once: ``digest``, ``error`` and ``is_answered`` read what is left.
    """

    __slots__ = (
        "_calls", "_captured", "_captures", "_choices", "_cuts_usage", "_digest", "_finished", "_held", "_indices",
        "_is_clean", "_is_ended", "_is_typed", "_passes_verbatim", "_path", "_pieces", "_read_events", "_texts",
        "_to_chunks", "_traces", "_wanted_text", "decoder", "events", "fault", "has_excess", "is_over",
    )  # fmt: skip

    def __init__(
        self,
        decoder: BodyDecoder,
        *,
        to_chunks: bool,
        cuts_usage: bool,
        path: bytes,
        wanted_text: int,
        traces: bool = False,
        adds_indices: bool = False,
    ) -> None:
        """``path`` is the request's; it says what a complete answer is. ``traces``: the digest needs ``print``.
        ``adds_indices``: the engine's events of /v1/responses lack theirs."""
        self.decoder = decoder
        self.events = 0  # rough number so far: counts data lines
        self.fault: str | None = None
        self.is_over = self.has_excess = False
        self._to_chunks, self._cuts_usage, self._path = to_chunks, cuts_usage, path
        self._indices = ResponseIndices() if adds_indices and path == b"/v1/responses" else None
        self._passes_verbatim = decoder.is_chunked and to_chunks and self._indices is None
        self._is_clean = self._passes_verbatim  # nothing held back, and between two chunks that may pass unchanged
        self._held = b""
        self._pieces: list[bytes] = []  # not read yet
        self._read_events = 0  # number of those that are
        self._digest = AnswerDigest()
        self._is_typed = path in _LAST_EVENTS
        self._is_ended = False  # the API's last event came
        self._choices, self._finished = {0}, set[int]()  # indices of the choices seen, of those with a finish reason
        self._texts: list[bytes] = []  # the start of the answer's text (all of it with traces), JSON-escaped
        self._calls: dict[Any, str] = {}  # ids of its tool calls
        self._wanted_text, self._traces = wanted_text, traces
        self._captures = MAX_TRACED_BYTES if traces else 12 * wanted_text  # bytes; a character takes at most 12 in JSON
        self._captured = 0  # bytes

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
        self.events += data.count(b"\ndata:") if self.events else self._count(data)
        self._pieces.append(data)
        if len(self._pieces) >= PIECES_AT_ONCE:
            self._read()
        return data

    def _count(self, data: bytes) -> int:
        """Return the number of events in ``data``. Until there is one, a bare ``data:`` isn't."""
        return data.count(b"\ndata:") + data.startswith(b"data:") if self.events else len(_DATA.findall(data))

    def close(self) -> bytes:
        """Handle the closed connection: the end of an answer without length or chunks, or of a complete one,
        otherwise a fault."""
        if not self.is_over and (self.decoder.is_until_close or self.is_answered):
            return self._end(self._held if self.decoder.is_until_close else b"")
        self.fault = self.fault or "the replica died"
        return b""

    @property
    def is_answered(self) -> bool:
        """Whether the API's last event arrived: many clients disconnect then, before the replica ends the body."""
        self._read()
        return self._is_ended or self._digest.error is not None

    @property
    def error(self) -> str | None:
        """The error that the replica reported in the stream."""
        self._read()
        return self._digest.error

    def failure(self, event: bytes) -> bytes:
        """Return the bytes that end the stream with an error event after all bytes sent so far."""
        return encode_chunk(event) + LAST_CHUNK if self._to_chunks else event

    def digest(self) -> AnswerDigest:
        """Return what the events so far say."""
        self._read()
        digest = self._digest
        with contextlib.suppress(ValueError):
            text = json.loads(b'"' + b"".join(self._texts) + b'"')
            digest.text = sendable_text(text[: self._wanted_text])
            if self._traces and self._captured < MAX_TRACED_BYTES:
                digest.print = message_fingerprint(text, [*self._calls.values()])
        return digest

    def _read(self) -> None:
        """Read what the waiting pieces say."""
        if not self._pieces:
            return
        data = b"".join(self._pieces)
        self._pieces.clear()
        count, self._read_events = self.events - self._read_events, self.events
        wants_text = self._captured < self._captures
        # Most events go on with choice 0 and say nothing else. Counting shows that at a fifth of the cost of searching.
        is_plain = data.count(b'"finish_reason":null') == count == data.count(b'"index":0') and b"tool_" not in data
        if (self._is_typed and wants_text) or (not is_plain and is_notable(data)):
            for event in _EVENT_END.split(data):
                if self._is_typed or is_notable(event):
                    self._read_event(event)
                elif wants_text:
                    self._keep_texts(_EVENT_TEXT.findall(event))
        elif wants_text:
            self._keep_texts(_EVENT_TEXT.findall(data))

    def _keep_texts(self, texts: list[bytes]) -> None:
        self._texts += texts
        self._captured += sum(map(len, texts))

    def _read_event(self, event: bytes) -> None:
        document = event_document(event)
        if not isinstance(document, dict):
            self._is_ended |= _DONE.search(event) is not None
            if (said := _ERROR_LINES.search(event)) is not None:
                self._digest.add({"error": said[1].decode("utf-8", "replace").strip() or "error"})
            return
        self._digest.add(document)
        self._is_ended |= document.get("type") in _LAST_EVENTS.get(self._path, ())
        text = event_text(document)
        if self._is_ended and not self._texts and isinstance(response := document.get("response"), dict):
            text = answer_text_and_calls(response)[0]  # some servers send no deltas
        if text and self._captured < self._captures:
            self._keep_texts([json.dumps(text).encode()[1:-1]])
        if self._is_ended and not self._calls and isinstance(response := document.get("response"), dict):
            self._calls.update((call, call) for call in answer_text_and_calls(response)[1])
        if self._traces:
            for index, call_id in event_calls(document).items():
                self._calls.setdefault(index, call_id)
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(index := choice.get("index", 0), int):
                self._choices.add(index)
                if choice.get("finish_reason"):
                    self._finished.add(index)

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
        if not self.fault and not self._is_complete():
            self.fault = "the replica ended the stream before the answer was complete"
        return sent + LAST_CHUNK if self._to_chunks and not self.fault else sent

    def _is_complete(self) -> bool:
        """Whether the events so far, and then the body's proper end, make a whole answer or an error.

        Many servers that speak OpenAI's API end a stream with a finish reason and no ``[DONE]``.
        """
        if self.is_answered or not (self._is_typed or self._path in _COMPLETION_PATHS):
            return True
        return not self._is_typed and self._choices <= self._finished

    def _encode(self, events: bytes) -> bytes:
        if not events:
            return b""
        self.events += self._count(events)
        self._pieces.append(events)
        if len(self._pieces) >= PIECES_AT_ONCE:
            self._read()
        if b"abort" in events or (self._cuts_usage and _USAGE.search(events)):
            events = b"".join(self._kept(events))
        if self._indices is not None:
            events = b"".join(map(self._indices.complete, _EVENT.findall(events)))
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


def is_notable(data: bytes) -> bool:
    """Whether events may say more than some text of choice 0."""
    return any(words in data and (not pattern or pattern.search(data)) for words, pattern in _NOTABLE)


def is_aborted(choice: Any) -> bool:
    """Whether the engine's shutdown ended a choice, even if the answer looks complete."""
    return isinstance(choice, dict) and choice.get("finish_reason") == "abort"

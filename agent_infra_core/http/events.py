"""Answers, whole or as server-sent events: their text, their usage, and whether they are complete. Pure."""

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

from agent_infra_core.http.bodies import CHUNK_SIZE, LAST_CHUNK, BodyDecoder, chunk_opening, encode_chunk
from agent_infra_core.protocol import is_count

MAX_TRACED_BYTES = 1 << 20  # a body or an answer longer than this does not say what conversation it belongs to
MAX_LESSONS = 100  # how often a stream is looked at for what its events have in common,
EVENTS_A_LESSON = 100  # and from then on, once in so many events
CAPTURED_PIECES = 32  # pieces of a stream that are searched for words at once: one by one costs thrice that
MAX_HELD_EVENT_BYTES = 1 << 20  # an SSE event longer than this is passed on in pieces, unseen


def holds_whole_events(data: bytes) -> bool:
    """Whether ``data``, which starts between two chunks, is nothing but complete chunks, not the last one, each of
    them ending with an event: then no word that is looked for in ``data`` can be hidden by the framing."""
    if data.startswith(chunk_opening(len(data))):  # one chunk, as nearly always
        return data.endswith(b"\n\n\r\n")
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
    """``text`` without halves of characters, which JSON may hold (``"\\ud83d"``) and UTF-8 may not."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class AnswerDigest:
    """What tracking keeps of an answer."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""
    print: bytes | None = None  # message_print() of the whole answer, where it was wanted

    def add(self, document: Any) -> None:
        """Take over what ``document`` says: a JSON answer, or one event of a stream, of any of the API's shapes."""
        if isinstance(document, dict):
            for part in (document.get("response"), document.get("message"), document):
                if isinstance(part, dict):  # the former two: in events of /v1/responses and of /v1/messages
                    self._take(part)
            if document.get("type") == "message_start":
                self.completion_tokens = None  # it says with how many the answer begins

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


NO_DIGEST: Final = AnswerDigest()  # of an answer that nobody read; nothing is ever added to it


def _token_count(usage: Mapping[str, Any], name: str, other_name: str, former: int | None) -> int | None:
    """The count that ``usage`` has by one of two names, else ``former``."""
    for value in (usage.get(name), usage.get(other_name)):
        if is_count(value):
            return value
    return former


def spoken(content: Any, calls: Any = None) -> tuple[str, list[str]]:
    """The words of an assistant's message and the ids of its tool calls, in OpenAI's and in Anthropic's shape."""
    if isinstance(content, str) and not calls:
        return content, []
    parts = content if isinstance(content, list) else [{"text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    words = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    called = [part for part in parts if part.get("type") == "tool_use"]
    called += [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return words, [call["id"] for call in called if isinstance(call.get("id"), str)]


_TWO_SUMS = struct.Struct("<II")


def message_print(words: str, call_ids: Sequence[str]) -> bytes:
    """Eight bytes by which an assistant's message is known again, whatever else its client sends back with it."""
    called = zlib.crc32("\0".join(call_ids).encode("utf-8", "replace")) if call_ids else 0
    return _TWO_SUMS.pack(zlib.crc32(words.strip().encode("utf-8", "replace")), called)


def conversation_key(messages: bytes, answer: bytes) -> str:
    """What a conversation up to and with an answer is known by: a digest of its messages' prints."""
    return hashlib.blake2b(messages + answer, digest_size=8).hexdigest()


_EVENT = re.compile(rb".*?\r?\n\r?\n|.+", re.DOTALL)
_EVENT_TEXT = re.compile(rb'"(?:content|text|delta)":\s?"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)

# The one JSON string that differs from event to event of a stream: words of the answer, or others, which are not kept.
_EVENT_WORDS = re.compile(
    rb'"(?:(content|text|delta)|arguments|partial_json|reasoning|reasoning_content|thinking)":\s?'
    rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
)
_NOT_PLAIN = re.compile(rb'["\\\r\n]')  # where there is none, there is no need to ask for a string
_IN_STRING = re.compile(rb'[^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*')  # what a JSON string may hold, in one line
_USAGE = re.compile(rb'"usage":(?!\s*null)')  # some engines say in every event that there is none
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_LAST_EVENT = re.compile(rb"(?:^|\n)(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.completed))")


def event_document(event: bytes) -> Any:
    """The JSON document in an SSE event's data lines; None where there is none."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines)) if lines else None
    except (ValueError, RecursionError):
        return None


def event_call_ids(event: Any) -> list[str]:
    """The ids of the tool calls that begin with an event of a stream."""
    document = event if isinstance(event, dict) else {}
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    return spoken([document.get("content_block")], calls)[1]


class EventStream:
    """What a replica's SSE answer becomes on its way to the client, however the bytes are split.

    Only whole events leave it, so that an error event can follow at any time.  Whole chunks of whole events pass
    verbatim; the rest is taken out of its framing and put into new chunks.  A usage event that the client did not ask
    for is taken out.  ``fault`` is set when the answer, however orderly its end, is not complete.

    Nearly all events repeat the one before but for a few words in one JSON string.  Those are known by comparing what
    is before and behind the words; such an event means what the one before meant, so nothing is searched for in it.
    """

    __slots__ = (
        "_before", "_behind", "_call_ids", "_captured", "_captures", "_cuts_usage", "_held", "_is_clean", "_is_text",
        "_lessons", "_needs_done", "_passes_verbatim", "_pieces", "_tail", "_texts", "_to_chunks", "_traces",
        "_wanted_text", "decoder", "events", "fault", "has_excess", "is_over",
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
        """``traces``: the digest's ``print`` is wanted."""
        self.decoder = decoder
        self.events = 0  # seen so far, counted roughly: by their data lines
        self.fault: str | None = None
        self.is_over = self.has_excess = False
        self._to_chunks, self._cuts_usage, self._needs_done = to_chunks, cuts_usage, needs_done
        self._passes_verbatim = decoder.is_chunked and to_chunks
        self._is_clean = self._passes_verbatim  # nothing held, and between two chunks that may pass as they are
        self._held = b""
        # The last pieces that say something else than those before, in chunks: usage and finish reason are there.
        self._tail: deque[bytes] = deque(maxlen=4)
        self._texts: list[bytes] = []  # the answer's first words (traced: all of them), still as JSON strings
        self._call_ids: list[str] = []
        self._wanted_text, self._traces = wanted_text, traces
        self._captures = MAX_TRACED_BYTES if traces else 12 * wanted_text  # bytes; as JSON, no character takes more
        self._captured = 0  # bytes
        self._pieces: list[bytes] = []  # not searched for words yet
        # The event before: what was before its words (behind the chunk's size) and behind them, and whether they are
        # the answer's. No event begins with a line's end.
        self._before, self._behind, self._is_text = b"\r", b"", False
        self._lessons = MAX_LESSONS  # that may still be taken: some engines repeat nothing

    def feed(self, data: bytes) -> bytes:
        """The bytes to send for these that came; WireError when the replica's framing is broken."""
        if not self._is_clean:
            return self._feed_events(data)
        before, behind = self._before, self._behind
        start = chunk_opening(len(data)) + before
        begin, end = len(start), len(data) - len(behind)
        if not (begin <= end and data.startswith(start) and data.endswith(behind)):
            return self._feed_unlike(data)
        if _NOT_PLAIN.search(data, begin, end) and not _IN_STRING.fullmatch(data, begin, end):
            return self._feed_unlike(data)
        self.events += 1
        if self._is_text and self._captured < self._captures:
            if self._pieces:
                self._search()  # what came before these words
            self._texts.append(data[begin:end])
            self._captured += end - begin
        return data

    def _feed_unlike(self, data: bytes) -> bytes:
        """``feed`` for what does not repeat the event before, between two chunks that may pass as they are."""
        if (
            not data.endswith(b"\n\n\r\n")
            or data.find(b"abort") >= 0  # cheaper than `in`, which takes it for a number first
            or (self._cuts_usage and _USAGE.search(data))
            or not holds_whole_events(data)
        ):
            return self._feed_events(data)
        self._tail.append(data)
        count = data.count(b"data:")
        self.events += count
        if self._captured < self._captures:
            self._capture(data)
        if count == 1 and (self._lessons or self.events % EVENTS_A_LESSON == 0):
            self._learn(data)
        return data

    def _learn(self, data: bytes) -> None:
        """Know the next event by this one, where there is one string in it that may differ."""
        self._lessons = max(0, self._lessons - 1)
        opening, found = chunk_opening(len(data)), list(_EVENT_WORDS.finditer(data))
        if len(found) == 1 and data.startswith(opening):
            self._is_text = found[0][1] is not None
            self._before, self._behind = data[len(opening) : found[0].start(2)], data[found[0].end(2) :]

    def close(self) -> bytes:
        """The connection closed: the end of an answer that lasts until then, a fault of any other."""
        if self.decoder.is_until_close and not self.is_over:
            return self._end(self._held)
        self.fault = self.fault or "the replica died"
        return b""

    @property
    def has_last_event(self) -> bool:
        """Whether the event that ends an answer came: many clients leave at it, before the replica ends the body."""
        return _LAST_EVENT.search(b"".join(self._tail)) is not None

    def failure(self, event: bytes) -> bytes:
        """The bytes that end the stream with an error event, behind all that was sent."""
        return encode_chunk(event) + LAST_CHUNK if self._to_chunks else event

    def digest(self) -> AnswerDigest:
        """What the last events and the first words say."""
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
                digest.print = message_print(text, self._call_ids)
        return digest

    def _capture(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if len(self._pieces) >= CAPTURED_PIECES:
            self._search()

    def _search(self) -> None:
        """Take the words out of the pieces that wait."""
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
        """The events that the client gets; those of an engine that was shut down end with ``fault``."""
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
    """Whether a choice was ended by its engine's shutdown, however complete the answer looks."""
    return isinstance(choice, dict) and choice.get("finish_reason") == "abort"

"""Reads the fields of a body that routing and tracking need; remembers each conversation's last long body."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.events import (
    AnswerDigest,
    answer_text_and_calls,
    conversation_key,
    is_answer_item,
    message_fingerprint,
    message_text_and_calls,
    sendable_text,
)
from agent_infra_core.protocol import MAX_FIGURE, TurnFinished, TurnStarted

if TYPE_CHECKING:
    from agent_infra_core.relay.book import Turn

ROUTED_FIELDS = (
    *("model", "stream", "stream_options", "priority", "previous_response_id"),
    *("n", "max_tokens", "max_completion_tokens"),
)
# The fields that are read besides messages; the last two stay undecoded.
KNOWN_FIELDS = (*ROUTED_FIELDS, "prompt", "input", "tools", "system")
_CACHE_MARK = re.compile(rb',\s*"cache_control":\s*\{[^{}]*\}|"cache_control":\s*\{[^{}]*\}\s*,?\s*')
_OPENING = re.compile(rb"\s*\{(?=\s*[^\s}])")  # of an object that isn't empty
# A megabyte of JSON is read in 2 ms if it is text, in 150 ms if it is millions of empty lists.
LIGHT_BODY_BYTES, MAX_READ_VALUES = 64 << 10, 50_000  # with more, a body's words aren't read
HEAVY_BODY_BYTES, MAX_SKIPPED_VALUES = 16 << 20, 4_000_000
ANSWER_FIELDS = (
    *("usage", "choices", "stop_reason", "error", "content", "output"),
    *("status", "incomplete_details", "type", "object", "message", "id"),
)
_MESSAGES = b'{"messages":[0'  # replaces a known beginning; the 0 stands for its messages


@dataclass(slots=True)
class KnownBody:
    """The beginning of a long body, up to its last message, and what was read there.

    A conversation's next request repeats it and continues, so only the new part must be read. This is exact: the
    beginning is compared byte for byte, and was read in full before.
    """

    start: memoryview
    fields: dict[str, Any]  # those of KNOWN_FIELDS that stand before the messages
    head: bytes  # checksum of the tools and the system prompt among them
    prints: bytes
    follows: str | None
    words: str  # of its last user message


def _is_heavy(body: bytes | bytearray) -> bool:
    """Whether reading a body's words would keep others waiting."""
    return len(body) > LIGHT_BODY_BYTES and body.count(b",") > MAX_READ_VALUES


class ContinuedBody:
    """The fields of a body that continues a known one; ``messages`` are the new ones."""

    __slots__ = ("before", "head", "messages", *KNOWN_FIELDS)
    messages: list[Any]
    tools: Any
    system: Any

    def __init__(self, before: KnownBody, rest: Any, unset: Any) -> None:
        first, *self.messages = rest.messages
        if bytes(first) != b"0":
            raise ValueError("there are two lists of messages")
        self.before = before
        for name in KNOWN_FIELDS:
            value = getattr(rest, name)
            setattr(self, name, before.fields[name] if value is unset else value)
        has_head = rest.tools is unset and rest.system is unset
        self.head = before.head if has_head else _head(self.tools, self.system)


class KnownBodies:
    """The last long body of each conversation, bounded in bytes; the least recently used goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bodies: OrderedDict[Any, KnownBody] = OrderedDict()
        self.bytes = 0

    def find(self, conversation: Any) -> KnownBody | None:
        return self._bodies.get(conversation)

    def keep(self, conversation: Any, known: KnownBody | None) -> None:
        """Keep ``known`` instead of the former body; None keeps nothing."""
        former = self._bodies.pop(conversation, None)
        self.bytes += self._size(known) - self._size(former)
        if known is not None:
            self._bodies[conversation] = known
        while self.bytes > self._limit:
            self.bytes -= self._size(self._bodies.popitem(last=False)[1])

    def _size(self, known: KnownBody | None) -> int:
        return len(known.start.obj) if known is not None else 0  # type: ignore[arg-type]  # a body, as a whole


class Codec:
    """Reads and writes the JSON of every request with msgspec, which skips what the types don't name."""

    def __init__(self) -> None:
        import msgspec

        self.encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        # Events to encode, created in C. Empty fields are encoded too: a missing field costs the controller's decoder
        # an exception.
        self.turn_started, self.turn_finished = (
            msgspec.defstruct(kind.__name__, [_encoded_field(item) for item in dataclasses.fields(kind)])
            for kind in (TurnStarted, TurnFinished)
        )
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode
        self.convert: Callable[..., Any] = msgspec.convert
        routed = [(name, Any, None) for name in ROUTED_FIELDS]
        words: list[Any] = [("messages", list[msgspec.Raw], ()), ("prompt", Any, None), ("input", Any, None)]
        words += [(name, msgspec.Raw, msgspec.Raw(b"")) for name in ("tools", "system", "instructions")]
        call = msgspec.defstruct("Call", [("id", str, "")])
        said = [("content", str | None, None), ("tool_calls", list[call] | None, None)]  # type: ignore[valid-type]
        message = msgspec.defstruct("Message", said)
        spoken_fields = [(name, Any, None) for name in ("role", "content", "tool_calls")]
        self._message = msgspec.json.Decoder(msgspec.defstruct("AnyMessage", spoken_fields)).decode
        choice = msgspec.defstruct(
            "Choice",
            [("finish_reason", str | None, None), ("message", message | None, None), ("text", str | None, None)],
        )
        count: Any = Annotated[int, msgspec.Meta(ge=0, le=int(MAX_FIGURE))] | None  # is_count(), in C
        details = msgspec.defstruct("Details", [("cached_tokens", count, None)])
        counts = [("prompt_tokens", count, None), ("completion_tokens", count, None)]
        usage = msgspec.defstruct("Usage", [*counts, ("prompt_tokens_details", details | None, None)])
        plain = [("choices", list[choice]), ("usage", usage)]  # type: ignore[valid-type]
        self._plain_answer = msgspec.json.Decoder(msgspec.defstruct("PlainAnswer", plain)).decode
        answered = [(name, Any, None) for name in ANSWER_FIELDS]
        self._request = msgspec.json.Decoder(msgspec.defstruct("RoutedBody", routed)).decode
        rest: list[Any] = [("messages", list[msgspec.Raw]), *((name, Any, msgspec.UNSET) for name in KNOWN_FIELDS[:-2])]
        rest += [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in KNOWN_FIELDS[-2:]]
        self._rest_of_request = msgspec.json.Decoder(msgspec.defstruct("RestOfBody", rest)).decode
        self._unset, self._raw = msgspec.UNSET, msgspec.Raw
        self._worded_request = msgspec.json.Decoder(msgspec.defstruct("WordedBody", routed + words)).decode
        self._answer = msgspec.json.Decoder(msgspec.defstruct("AnswerBody", answered)).decode

    def joined(self, packs: Iterable[bytes]) -> Any:
        """Return encoded items as an encoded list."""
        return self._raw(b"[" + b",".join(packs) + b"]")

    def request(self, body: bytes | bytearray, known: KnownBody | None = None) -> Any:
        """Return the fields that routing needs (ROUTED_FIELDS), and those with text if they
        have the usual types; None if the body isn't a JSON object. If the body continues ``known``, ``messages`` are
        the new ones."""
        if known is not None and body.startswith(known.start):
            rest = _MESSAGES + body[len(known.start) :]
            try:
                if not _is_heavy(rest):
                    return ContinuedBody(known, self._rest_of_request(rest), self._unset)
            except (ValueError, RecursionError):
                pass  # read in full below
        try:
            return self._request_alone(body) if _is_heavy(body) else self._worded_request(body)
        except (ValueError, RecursionError):  # bad UTF-8 is a plain ValueError
            return self._request_alone(body)

    def _request_alone(self, body: bytes | bytearray) -> Any:
        """The fields that routing needs; the rest is skipped, which takes a tenth of the time. RequestError where even
        that would keep others waiting."""
        if len(body) > HEAVY_BODY_BYTES and body.count(b",") > MAX_SKIPPED_VALUES:
            message = f"a body of more than {HEAVY_BODY_BYTES >> 20} MB may hold {MAX_SKIPPED_VALUES:,} values"
            raise RequestError(413, message)
        try:
            return self._request(body)
        except (ValueError, RecursionError):
            return None

    def known_body(self, fields: Any, body: bytes | bytearray, turn: Turn) -> KnownBody | None:
        """Return what to keep of a body for its conversation's next one; None if that isn't certain.

        It ends with the last message, which is searched for. The place is certain if everything before it, once closed,
        is a whole request.
        """
        before: KnownBody | None = getattr(fields, "before", None)
        if not fields.messages:
            return before
        last, began = bytes(fields.messages[-1]), len(before.start) if before is not None else 0
        end = body.rfind(last, began) + len(last)
        opening, extra = (_MESSAGES, 1) if before is not None else (b"", 0)
        try:
            closed: Any = self._worded_request(opening + body[began:end] + b"]}")
        except (ValueError, RecursionError):
            return None
        if len(closed.messages) != len(fields.messages) + extra:
            return None
        if before is not None:
            values, head = before.fields, before.head
        else:
            values = {name: getattr(closed, name) for name in KNOWN_FIELDS}
            values |= {name: bytes(values[name]) for name in KNOWN_FIELDS[-2:]}  # not views of it
            stands_before = closed.tools == fields.tools and closed.system == fields.system
            head = turn.prints[:4] if stands_before else _head(closed.tools, closed.system)
        return KnownBody(memoryview(body)[:end], values, head, turn.prints, turn.follows, turn.prompt)

    def trace(self, fields: Any, is_named: bool, has_marks: bool = True) -> tuple[bytes, str | None]:
        """Return ``prints`` and ``follows`` of TurnStarted. A session that its client names needs no ``follows``.

        ``has_marks``: the body may have marks that clients move (see ``_said``).
        """
        messages = getattr(fields, "messages", ())
        before: KnownBody | None = getattr(fields, "before", None)
        if before is None and not messages:
            return b"", None
        head = fields.head if before is not None else _head(fields.tools, fields.system, has_marks)
        said = map(_said, messages) if has_marks else messages
        prints = array("I", map(zlib.crc32, said)).tobytes()
        prints = head + (before.prints[4:] if before is not None else b"") + prints
        if is_named:
            return prints, None
        first = len(prints) // 4 - 1 - len(messages)  # number of the first of ``messages``
        for index in range(len(messages) - 1, -1, -1):
            raw = bytes(messages[index])
            if b'"assistant"' in raw:
                try:
                    message: Any = self._message(raw)
                except (ValueError, RecursionError):
                    continue
                if message.role == "assistant":
                    answer = message_fingerprint(*message_text_and_calls(message.content, message.tool_calls))
                    return prints, conversation_key(prints[4 : 4 + 4 * (first + index)], answer)
        return prints, before.follows if before is not None else ""

    def trace_response(self, fields: Any, is_named: bool) -> tuple[bytes, str | None]:
        """The same as ``trace`` for a request of /v1/responses, whose input is a text or a list of items.

        An answer is all items of the model's output that stand together. Items are compared by what they say: a text
        is the same as a message of the user with that text.
        """
        given = getattr(fields, "input", None)
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list) or not items:
            return b"", None
        head = zlib.crc32(fields.instructions, zlib.crc32(fields.tools))
        try:
            prints = array("I", (head, *map(self._item_print, items))).tobytes()
        except (ValueError, RecursionError):
            return b"", None
        if is_named:
            return prints, None
        end = next((number for number in range(len(items), 0, -1) if is_answer_item(items[number - 1])), 0)
        start = end
        while start and is_answer_item(items[start - 1]):
            start -= 1
        answer = message_fingerprint(*answer_text_and_calls({"output": items[start:end]}))
        return prints, conversation_key(prints[4 : 4 + 4 * start], answer) if end else ""

    def _item_print(self, item: Any) -> int:
        if isinstance(item, str):
            item = {"role": "user", "content": item}
        if isinstance(item, dict) and "role" in item:
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            item = (item["role"], "".join(texts) if len(texts) == len(parts) else content)
        return zlib.crc32(self.encode(item))

    def shared_prefix(self, fields: Any, prints: bytes) -> tuple[bytes, int]:
        """What identifies the tools and system prompt of a conversation's first request, and their size in bytes."""
        if not prints or getattr(fields, "before", None) is not None:
            return b"", 0
        messages, size = fields.messages, len(fields.system) + len(fields.tools) + len(fields.instructions)
        first = bytes(messages[0]) if len(messages) > 1 else b""
        is_system = first.find(b'"system"') >= 0 or first.find(b'"developer"') >= 0
        return (prints[:8], size + len(first)) if is_system else (prints[:4], size)

    def prompt_excerpt(self, fields: Any, limit: int) -> str:
        """Return the start of the last user message or of the prompt."""
        for message in reversed(getattr(fields, "messages", ())):
            if bytes(message).find(b'"user"') >= 0:  # cheaper than `in`
                try:
                    said: Any = self._message(message)
                    return plain_text(said.content or self.decode(message))[:limit]
                except (ValueError, RecursionError):  # decoded here for the first time
                    continue
        if (before := getattr(fields, "before", None)) is not None:
            return str(before.words)
        return plain_text(getattr(fields, "prompt", None) or getattr(fields, "input", None))[:limit]

    def digest(self, body: bytes, wanted_text: int, traces: bool = False) -> AnswerDigest | None:
        """Return what tracking keeps of a whole answer (``traces``: its print too); None if it isn't a JSON object."""
        try:
            return self._plain_digest(self._plain_answer(body), wanted_text, traces)
        except (ValueError, IndexError, RecursionError):
            pass
        try:
            answer: Any = self._answer(body)
        except (ValueError, RecursionError):
            return None
        digest = AnswerDigest()
        document = {name: getattr(answer, name) for name in ANSWER_FIELDS}
        with contextlib.suppress(RecursionError):
            digest.add(document)
            if wanted_text or traces:
                words, calls = answer_text_and_calls(document)
                digest.text = sendable_text(words[:wanted_text])
                digest.print = message_fingerprint(words, calls) if traces else None
        return digest

    def _plain_digest(self, answer: Any, wanted_text: int, traces: bool) -> AnswerDigest:
        """Return the digest of a completion of the common shape, which nearly all answers have."""
        choice, usage, details = answer.choices[0], answer.usage, answer.usage.prompt_tokens_details
        words = (choice.message.content if choice.message is not None else choice.text) or ""
        calls = choice.message.tool_calls if traces and choice.message is not None else None
        return AnswerDigest(
            usage.prompt_tokens,
            usage.completion_tokens,
            details.cached_tokens if details is not None else None,
            sendable_text(choice.finish_reason) if choice.finish_reason is not None else None,
            None,
            sendable_text(words[:wanted_text]),
            message_fingerprint(words, [call.id for call in calls if call.id] if calls else ()) if traces else None,
        )


def _encoded_field(item: dataclasses.Field[Any]) -> Any:
    """Return a dataclass's field in the form that msgspec.defstruct takes."""
    import msgspec

    if item.default_factory is not dataclasses.MISSING:
        return item.name, Any, msgspec.field(default_factory=item.default_factory)
    return (item.name, Any) if item.default is dataclasses.MISSING else (item.name, Any, item.default)


def plain_text(content: Any, depth: int = 8) -> str:
    """Return the text of a message or its content: a string, or the text of its parts, down to ``depth``."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and depth:
        return plain_text(content.get("text") or content.get("content"), depth - 1)
    if isinstance(content, list) and depth and not (content and isinstance(content[0], int)):
        return " ".join(filter(None, (plain_text(part, depth - 1) for part in content[:20])))
    return ""


def _head(tools: Any, system: Any, has_marks: bool = True) -> bytes:
    """The checksum of a request's tools and system prompt, with which its prints begin."""
    if has_marks:
        tools, system = _said(tools), _said(system)
    return array("I", [zlib.crc32(system, zlib.crc32(tools))]).tobytes()


def _said(part: Any) -> Any:
    """A part of a request without the marks that clients move: they don't change what was said."""
    raw = bytes(part)
    return _CACHE_MARK.sub(b"", raw) if raw.find(b'"cache_control"') >= 0 else raw


def with_priority(body: bytes | bytearray, priority: int) -> tuple[bytes, memoryview] | None:
    """Return a JSON object with a field ``priority`` in two parts, of which the second isn't a copy; None if it is
    empty."""
    opening = _OPENING.match(body)
    return (b'{"priority":%d,' % priority, memoryview(body)[opening.end() :]) if opening is not None else None


def refuse_unsupported(fields: Any, lacks: Collection[str]) -> None:
    """Raise RequestError 400 for a request that an engine with these LACKS can't answer."""
    if "choices" in lacks and isinstance(fields.n, int) and fields.n > 1:
        message = "n must be 1: this engine reports the usage of one choice only; send the request once for each choice"
        raise RequestError(400, message)
    counts = (fields.max_tokens, fields.max_completion_tokens)
    if "empty_answers" in lacks and any(type(count) is int and count == 0 for count in counts):
        raise RequestError(400, "max_tokens must be at least 1")


def form_model(body: bytes | bytearray) -> str | None:
    """Return the field ``model`` of a multipart form."""
    match = re.search(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', body)
    return match[1].decode("utf-8", "replace") if match else None

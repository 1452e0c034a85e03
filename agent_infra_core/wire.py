"""Wire (pure): HTTP heads, body framing, SSE, and the frames between controller and relay. Bytes in, plain values
out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard
from urllib.parse import unquote_to_bytes

from agent_infra_core.errors import AgentInfraError

# Frames on the Unix socket between controller and relay: one byte of kind, four bytes of length, the payload (JSON).
# FRAME_TABLE: {"settings": {"proxy": ProxyConfig with its api_key, "headers": HeadersConfig, "log_format": "text" or
# "json", "drain_seconds"} (in a controller's first table, later only when it changed), "models": [what clients may ask
# for], "loading": [those of them that have replicas on their way: turns wait for these], "backends": [Backend]}.
FRAME_TABLE = b"T"  # controller → relay
FRAME_STATS = b"S"  # controller → relay: the finished bytes of GET /stats, which begin with STATS_PREFIX
STATS_PREFIX = b'{"snapshot_age_ms":0,'  # the relay puts the document's age there
FRAME_HELLO = b"H"  # relay → controller, first of all: {"pid", "port", "started_at"}; carries the listening socket
FRAME_EVENTS = b"E"  # relay → controller: EventBatch in Tracking
FRAME_GAUGES = b"G"  # relay → controller, once a second: see Gauges in Tracking
FRAME_REQUEST = b"R"  # relay → controller: what somebody asked for over HTTP: {"op": "drain"|"undrain", "backend"}, or

# {"op": "metrics", "id"}, {"op": "session", "id", "session"} and {"op": "stats", "id"}, to which comes a FRAME_ANSWER;
# to the last, when there is something new, a FRAME_STATS before
FRAME_ANSWER = b"A"  # controller → relay: {"id", "status", "type", "body"}: an HTTP answer
_FRAME_HEAD = struct.Struct(">cI")
MAX_FRAME_BYTES = 256 << 20


class FrameReader:
    """Cuts a byte stream into frames; owns the bytes of the frame that is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The ``(kind, payload)`` of every frame that ``data`` completes; ValueError on a length beyond the maximum."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _FRAME_HEAD.size:
            kind, length = _FRAME_HEAD.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = _FRAME_HEAD.size + length
            if len(self._buffer) < end:
                break
            frames.append((kind, bytes(self._buffer[_FRAME_HEAD.size : end])))
            del self._buffer[:end]
        return frames


def encode_frame(kind: bytes, payload: bytes) -> bytes:
    """One frame, ready to send."""
    return _FRAME_HEAD.pack(kind, len(payload)) + payload


MAX_HEAD_BYTES = 64 << 10
MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_FIGURE = 1e12  # of a duration or a count off the wire; so no sum ever becomes infinite
MAX_KNOWN_LINES = 4000
MAX_KNOWN_LINE_BYTES = 256
MAX_KNOWN_HEADS = 2000
MAX_KNOWN_HEAD_BYTES = 2000
MAX_CHUNK_LINE_BYTES = 4 << 10
MAX_TRAILER_LINES = 64
MAX_TRACED_BYTES = 1 << 20  # a body or an answer longer than this does not say what conversation it belongs to
MAX_LESSONS = 100  # how often a stream is looked at for what its events have in common,
EVENTS_A_LESSON = 100  # and from then on, once in so many events
CAPTURED_PIECES = 32  # pieces of a stream that are searched for words at once: one by one costs thrice that
MAX_HELD_EVENT_BYTES = 1 << 20  # an SSE event longer than this is passed on in pieces, unseen

# The paths that are forwarded, with or without /{model} before them.
INFERENCE_PATHS = frozenset(
    b"/v1/chat/completions /v1/completions /v1/embeddings /v1/responses /v1/messages /v1/messages/count_tokens "
    b"/v1/rerank /v1/score /v1/audio/speech /v1/audio/transcriptions /v1/audio/translations "
    b"/tokenize /detokenize".split()
)
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade content-length".split()
)

# Accept-Encoding goes because a compressed stream could not be watched; the keys because they are the client's.
_NOT_FORWARDED = _HOP_BY_HOP | frozenset(b"host expect accept-encoding authorization x-api-key api-key cookie".split())
_NOT_RETURNED = _HOP_BY_HOP | frozenset(b"server x-request-id set-cookie".split())
_ONLY_ONCE = frozenset(b"content-length transfer-encoding host expect authorization".split())
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_ABSOLUTE_TARGET = re.compile(rb"(?i:http)://[^/?#@]+(?=[/?]|\Z)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")

# No control character but the tab: so no CR or LF gets into a line, and none out of it.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH_LINES = b"\r\nContent-Length: ", b"\r\ncontent-length: "
_LENGTH_FIGURES = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d+)(?=\r\n)")
_SECRET_LINES = b"\r\nAuthorization: ", b"\r\nauthorization: "
_SECRET_FIELDS = frozenset(b"authorization proxy-authorization x-api-key api-key cookie set-cookie".split())


class RequestError(AgentInfraError):
    """A request that is answered by an error of ours: ``status``, the message, and what the client may do."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after_s: int = 0, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s, self.closes = status, code, retry_after_s, closes


class WireError(RequestError):
    """Bytes that break HTTP/1.1 or a limit of ours: what follows them cannot be trusted, so the connection closes."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(status, message, closes=True)


class HeaderLines:
    """Reads header lines, and remembers those that come again and again, so that each is examined once.

    Bounded in number and length; lines that carry a secret are never kept.
    """

    __slots__ = ("_dropped", "_known")

    def __init__(self, dropped: frozenset[bytes]) -> None:
        """``dropped`` are the names (lower case) of headers that are not passed on."""
        self._dropped = dropped
        self._known: dict[bytes, tuple[bytes, bytes, bytes]] = {}

    def read(self, line: bytes) -> tuple[bytes, bytes, bytes]:
        """Name in lower case, value, and the line as it is passed on (empty: it is not); WireError for no header."""
        entry = self._known.get(line)
        if entry is not None:
            return entry
        match = _FIELD.fullmatch(line)
        if match is None:
            raise WireError("a header line is malformed")
        name, value = match[1].lower(), match[2]
        entry = name, value, b"" if name in self._dropped else b"%b: %b\r\n" % (name, value)
        if len(line) <= MAX_KNOWN_LINE_BYTES and name not in _SECRET_FIELDS:
            if len(self._known) >= MAX_KNOWN_LINES:
                self._known.clear()
            self._known[line] = entry
        return entry

    def read_all(self, lines: Sequence[bytes]) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes, bytes]]]:
        """The lines' fields (the last of several of one name; of Connection, all in one list) and their readings."""
        read = self._known.get
        rows = [read(line) or self.read(line) for line in lines]
        fields = {name: value for name, value, _ in rows}
        if len(fields) != len(rows) and b"connection" in fields:
            fields[b"connection"] = b",".join(value for name, value, _ in rows if name == b"connection")
        return fields, rows


class HeadMemory:
    """Heads that came before, but for the figures of Content-Length and the value of Authorization, and what was made
    of them: clients and replicas repeat theirs, and finding one costs a tenth of reading it.

    What is cut out are values of whole lines in their usual spelling, and a head is kept only when it has each of
    these lines once.  So two heads that are alike without the values have them in the same place, and mean the same.
    Bounded in number and length; no secret is kept.
    """

    __slots__ = ("_has_secrets", "_known", "_lines")

    def __init__(self, has_secrets: bool) -> None:
        """``has_secrets``: whether Authorization is cut out; else a head that has it is not kept."""
        self._has_secrets = has_secrets
        self._known: dict[bytes, Any] = {}
        self._lines = [(_LENGTH_LINES[0], 0), (_SECRET_LINES[0], 0)]  # how and about where they stood: likely so again

    def find(self, data: bytes, end: int) -> tuple[Any, int, bytes] | None:
        """What is kept of the head ``data[:end]``, its Content-Length (-1: none), its Authorization; None: unknown."""
        key, figures, secret = self._cut(data, end)
        kept = self._known.get(key)
        if kept is None:
            return None
        if figures is None:
            return kept, -1, secret
        return (kept, int(figures), secret) if figures.isdigit() and len(figures) <= 18 else None

    def keep(self, head: bytes, fields: Mapping[bytes, bytes], value: Any) -> None:
        """Keep ``value`` for a head that was read in full and is sound; ``fields`` are all that it has."""
        key, figures, secret = self._cut(head, len(head))
        names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")]
        is_cut = figures == fields.get(b"content-length")
        is_cut = is_cut and (not self._has_secrets or secret == fields.get(b"authorization", b""))
        is_clear = names.count(b"content-length") < 2 and names.count(b"authorization") < 2
        secrets_left = _SECRET_FIELDS.intersection(fields) - ({b"authorization"} if self._has_secrets else set())
        if is_cut and is_clear and not secrets_left and len(key) <= MAX_KNOWN_HEAD_BYTES:
            if len(self._known) >= MAX_KNOWN_HEADS:
                self._known.clear()
            self._known[key] = value

    def clear(self) -> None:
        self._known.clear()

    def _cut(self, data: bytes, end: int) -> tuple[bytes, bytes | None, bytes]:
        """The head without the values, and these: of Content-Length (None: no such line), of Authorization."""
        (length_line, length_near), (secret_line, secret_near) = self._lines
        at = data.find(length_line, length_near, end) + 18
        if at < 18:
            at = self._search(0, _LENGTH_LINES, data, end)
        secret = data.find(secret_line, secret_near, end) + 17 if self._has_secrets else -1
        if secret < 17 and self._has_secrets:
            secret = self._search(1, _SECRET_LINES, data, end)
        stop = data.find(b"\r\n", at)
        if secret < 17:
            return (data[:end], None, b"") if at < 18 else (data[:at] + data[stop:end], data[at:stop], b"")
        secret_end = data.find(b"\r\n", secret)
        if at < 18:
            key = data[:secret] + data[secret_end:end]
            return key, None, data[secret:secret_end]
        if secret < at:
            key = data[:secret] + data[secret_end:at] + data[stop:end]
        else:
            key = data[:at] + data[stop:secret] + data[secret_end:end]
        return key, data[at:stop], data[secret:secret_end]

    def _search(self, number: int, lines: Sequence[bytes], data: bytes, end: int) -> int:
        """Where the value of one of ``lines`` begins, wherever it is; less than its length where there is none."""
        for line in lines:
            at = data.find(line, 0, end)
            if at >= 0:
                self._lines[number] = line, max(0, at - 64)
                return at + len(line)
        return -1


class RepeatedHead:
    """The head that one side repeats, in front of a HeadMemory: that another one differs in the figures of its
    Content-Length alone is told at a third of what finding it in the memory costs.

    Exact: a head is what the memory found before, byte for byte, but for figures in the place of figures.
    """

    __slots__ = ("_at", "_before", "_behind", "_kept", "_memory", "_secret")

    def __init__(self, memory: HeadMemory) -> None:
        self._memory = memory
        self.forget()

    def forget(self) -> None:
        """Know nothing: what the memory keeps of the head may have changed."""
        self._kept: Any = None  # of the last head
        self._before, self._behind, self._secret, self._at = b"\n", b"", b"", 0  # no head begins like this

    def find(self, data: bytes) -> tuple[Any, int, bytes, int] | None:
        """As HeadMemory.find, of the head that ``data`` begins with, and where it ends; None: unknown or not whole."""
        if data.startswith(self._before):
            at, behind = self._at, self._behind
            stop = data.find(b"\r\n", at, at + 20)
            figures = data[at:stop]
            if figures.isdigit() and data.startswith(behind, stop):
                return self._kept, int(figures), self._secret, stop + len(behind)
        end = data.find(b"\r\n\r\n") + 4
        known = self._memory.find(data, end) if end >= 4 else None
        if known is None:
            return None
        kept, length, secret = known
        if kept is not self._kept:  # the first of its kind: where heads take turns, none is looked at closely
            self._kept, self._before = kept, b"\n"
        elif length >= 0:
            self._learn(data[:end], secret)
        return kept, length, secret, end

    def _learn(self, head: bytes, secret: bytes) -> None:
        match = _LENGTH_FIGURES.search(head)
        if match is not None:  # the one line of this name: see HeadMemory.keep
            self._at, stop = match.span(1)
            self._before, self._behind, self._secret = head[: self._at], head[stop:], secret


@dataclass
class RequestHead:
    """The head of one request. ``fields`` has names in lower case, and the last of several values of one name."""

    method: bytes
    target: bytes
    version: int  # 1 = HTTP/1.1, 0 = HTTP/1.0
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: it comes in chunks
    keeps_alive: bool
    forwarded: bytes  # the header lines that go on to a replica


def parse_request_head(head: bytes, known: HeaderLines) -> RequestHead:
    """The request head in ``head``, its empty line included; WireError unless it can be read in one way only."""
    first, *lines = head[:-4].split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise WireError("the request line is not HTTP/1.1")
    if len(first) > MAX_REQUEST_LINE_BYTES:
        raise WireError("the request line is too long", 414)
    fields, rows = known.read_all(lines)
    if len(fields) != len(rows):
        names = [name for name, _, _ in rows]
        if any(name in fields and names.count(name) > 1 for name in _ONLY_ONCE):
            raise WireError("a header that may stand once stands twice")
    version = line[3] == b"1"
    if version and b"host" not in fields:
        raise WireError("the Host header is missing")
    connection = fields.get(b"connection", b"").lower()
    dropped = {name.strip() for name in connection.split(b",")} if connection else ()
    return RequestHead(
        line[1],
        line[2],
        int(version),
        fields,
        _body_length(fields, version),
        version and b"close" not in connection,
        b"".join([passed for name, _, passed in rows if name not in dropped]),
    )


def _body_length(fields: Mapping[bytes, bytes], is_http_1_1: bool) -> int | None:
    """Bytes of a request's body, None for chunks; WireError when the head leaves any doubt about it."""
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise WireError("both Content-Length and Transfer-Encoding")
        if coding.strip().lower() != b"chunked" or not is_http_1_1:
            raise WireError("the only transfer coding understood is chunked, with HTTP/1.1")
        return None
    if length is None:
        return 0
    length = length.rstrip(b" \t")
    if not length.isdigit() or len(length) > 18:
        raise WireError("Content-Length is not a number")
    return int(length)


def origin_form(target: bytes) -> bytes:
    """``target`` without the scheme and the host that an absolute one begins with: every server has to take such a one
    (RFC 9112, 3.2.2), and whatever host a client calls this one by is it."""
    found = _ABSOLUTE_TARGET.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def split_inference_path(path: bytes) -> tuple[str | None, bytes] | None:
    """``/model/v1/completions`` → (model, ``/v1/completions``); model None without a prefix; None: not forwarded."""
    if path in INFERENCE_PATHS:
        return None, path
    for known in INFERENCE_PATHS:
        if path.endswith(known) and len(path) > len(known) + 1:
            return unquote_to_bytes(path[1 : -len(known)]).decode("utf-8", "replace"), known
    return None


def forwarded_head(request: RequestHead, target: bytes, host: bytes, key: str | None, length: int) -> bytes:
    """The request head that goes to a replica: its own key, no hop-by-hop header, nothing of the client's alone."""
    authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
    lines = request.method, target, host, request.forwarded, authorization, length
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%bcontent-length: %d\r\n\r\n" % lines


@dataclass
class AnswerHead:
    """The head of a replica's answer; ``fields`` as in RequestHead."""

    status: int
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: it comes in chunks; BodyDecoder.UNTIL_CLOSE
    is_reusable: bool  # the connection may carry another request once this answer is over
    is_event_stream: bool
    returned: bytes  # the status line and the header lines that go on to the client


def parse_answer_head(head: bytes, known: HeaderLines) -> AnswerHead:
    """The answer head in ``head``, its empty line included; WireError when it is none."""
    first, *lines = head[:-4].split(b"\r\n")
    line = _STATUS_LINE.fullmatch(first)
    if line is None:
        raise WireError("the replica does not speak HTTP/1.1")
    fields, rows = known.read_all(lines)
    status, length = int(line[2]), fields.get(b"content-length", b"").strip()
    body: int | None = BodyDecoder.UNTIL_CLOSE
    if status in (204, 304):
        body = 0
    elif b"chunked" in fields.get(b"transfer-encoding", b"").lower():
        body = None
    elif length:
        if not length.isdigit() or len(length) > 18:
            raise WireError("the replica's Content-Length is not a number")
        body = int(length)
    return AnswerHead(
        status,
        fields,
        body,
        line[1] == b"1" and b"close" not in fields.get(b"connection", b"").lower(),
        fields.get(b"content-type", b"").lower().startswith(b"text/event-stream"),
        b"HTTP/1.1%b\r\n%b" % (first[8:], b"".join([passed for _, _, passed in rows])),
    )


def returned_head(answer: AnswerHead, extra: bytes, length: int | None, chunked: bool, closes: bool) -> bytes:
    """The answer head that goes to the client: ``extra`` is whole header lines, ``length`` None where unknown."""
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    if length is not None:
        framing = b"content-length: %d\r\n" % length
    return b"%b%b%b%b\r\n" % (answer.returned, framing, b"connection: close\r\n" if closes else b"", extra)


class BodyDecoder:
    """Follows the framing of one body exactly: ``length`` bytes, chunks (None), or until the connection closes.

    ``is_over`` once the body's last byte (of chunks: of the trailers' empty line) was fed.
    """

    UNTIL_CLOSE = -1
    __slots__ = ("_expects", "_left", "_line", "_trailers", "is_chunked", "is_over", "is_until_close")

    def __init__(self, length: int | None) -> None:
        self.is_chunked = length is None
        self.is_until_close = length == self.UNTIL_CLOSE
        self.is_over = length == 0
        self._left = length or 0
        self._expects = "size"  # of chunks: size | data | data end | trailer
        self._line = b""
        self._trailers = 0

    @property
    def is_between_chunks(self) -> bool:
        return self._expects == "size" and not self._line

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        """Append the body's bytes in ``data[start:]`` to ``pieces``; return where the body ends there, or len(data).

        Raises WireError on framing that could be read in two ways.
        """
        if self.is_over:
            return start
        if not self.is_chunked:
            end = len(data) if self.is_until_close else min(len(data), start + self._left)
            self._left -= end - start
            self.is_over = not self.is_until_close and self._left == 0
            pieces.append(data[start:end] if start or end < len(data) else data)
            return end
        at = start
        while at < len(data) and not self.is_over:
            if self._expects == "data":
                end = min(len(data), at + self._left)
                pieces.append(data[at:end])
                self._left -= end - at
                at = end
                if not self._left:
                    self._expects = "data end"
                continue
            end = data.find(b"\n", at) + 1
            self._line += data[at : end or len(data)]
            if len(self._line) > MAX_CHUNK_LINE_BYTES:
                raise WireError("a line of the chunked body is too long")
            if not end:
                self._refuse_bare_return(self._line[:-1])
                return len(data)
            at = end
            line, self._line = self._line, b""
            self._take_line(line)
        return at

    def _take_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n":
            raise WireError("a line of the chunked body ends in a bare line feed")
        line = line[:-2]
        self._refuse_bare_return(line)
        if self._expects == "data end":
            if line:
                raise WireError("a chunk is longer than its size")
            self._expects = "size"
        elif self._expects == "size":
            size = line.partition(b";")[0].rstrip(b" \t") if b";" in line else line
            if not 0 < len(size) <= 15 or size.strip(b"0123456789abcdefABCDEF"):
                raise WireError("a chunk size is not a hexadecimal number")
            self._left = int(size, 16)
            self._expects = "data" if self._left else "trailer"
        else:
            self.is_over = not line
            self._trailers += 1
            if self._trailers > MAX_TRAILER_LINES:
                raise WireError("too many trailers")

    def _refuse_bare_return(self, line: bytes) -> None:
        if b"\r" in line:
            raise WireError("a bare carriage return in the chunked body")


def encode_chunk(payload: bytes) -> bytes:
    """``payload`` as one HTTP chunk; empty for an empty one, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK = b"0\r\n\r\n"
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})\r\n")


@functools.lru_cache(4096)
def chunk_opening(length: int) -> bytes:
    """How one chunk begins that takes ``length`` bytes with its framing, in the usual spelling; where there is none,
    what is longer than all of it. The same few lengths come again and again."""
    for digits in range(1, 16):
        opening = b"%x\r\n" % max(0, length - digits - 4)
        if len(opening) == digits + 2 and length > digits + 4:
            return opening
    return b"\r" * (length + 1)


def holds_whole_events(data: bytes) -> bool:
    """Whether ``data``, which starts between two chunks, is nothing but complete chunks, not the last one, each of
    them ending with an event: then no word that is looked for in ``data`` can be hidden by the framing."""
    if data.startswith(chunk_opening(len(data))):  # one chunk, as nearly always
        return data.endswith(b"\n\n\r\n")
    at = 0
    while at < len(data):
        line = _CHUNK_SIZE.match(data, at)
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


def is_count(value: Any) -> TypeGuard[int]:
    """Whether this is a number of things: engines are believed no more than that."""
    return type(value) is int and 0 <= value <= MAX_FIGURE


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


_ERROR_TYPES: Mapping[int, tuple[str, str]] = {  # status → error type in OpenAI's words, in Anthropic's
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}


def error_document(status: int, message: str, code: str | None, is_anthropic: bool) -> bytes:
    """The JSON body of an error, in the shape that the path's client library turns into its own exceptions."""
    openai_type, anthropic_type = _ERROR_TYPES.get(status, ("api_error", "api_error"))
    if is_anthropic:
        return json.dumps({"type": "error", "error": {"type": anthropic_type, "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": openai_type, "param": None, "code": code}}).encode()


def error_event(message: str, is_anthropic: bool) -> bytes:
    """The SSE event that tells a client library that the stream broke off."""
    return (b"event: error\n" if is_anthropic else b"") + (
        b"data: %b\n\n" % error_document(502, message, "replica_lost", is_anthropic)
    )


def plain_answer(
    status: int, body: bytes, *, extra: bytes = b"", closes: bool = False, content_type: bytes = b"application/json"
) -> bytes:
    """A whole answer of ours; ``extra`` is whole header lines."""
    phrase = http_phrase(status).encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        status, phrase, content_type, len(body), extra, b"connection: close\r\n" if closes else b"", body
    )  # fmt: skip


def http_phrase(status: int) -> str:
    """The reason phrase of a status."""
    from http import HTTPStatus

    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"

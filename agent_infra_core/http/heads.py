"""HTTP heads of requests and answers: parsed strictly, cached, rewritten for the other side. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from agent_infra_core.http.bodies import BodyDecoder
from agent_infra_core.http.errors import WireError

MAX_HEAD_BYTES = 64 << 10
MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_KNOWN_LINES = 4000
MAX_KNOWN_LINE_BYTES = 256
MAX_KNOWN_HEADS = 2000
MAX_KNOWN_HEAD_BYTES = 2000

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
NOT_FORWARDED = _HOP_BY_HOP | frozenset(b"host expect accept-encoding authorization x-api-key api-key cookie".split())
NOT_RETURNED = _HOP_BY_HOP | frozenset(b"server x-request-id set-cookie".split())
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

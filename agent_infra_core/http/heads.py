"""HTTP heads of requests and answers: parses them strictly, caches and rewrites them. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from agent_infra_core.http.bodies import BodyDecoder
from agent_infra_core.http.errors import WireError, http_phrase

MAX_HEAD_BYTES = 64 << 10
MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_KNOWN_LINES = 4000
MAX_KNOWN_LINE_BYTES = 256
MAX_KNOWN_HEADS = 2000
MAX_KNOWN_HEAD_BYTES = 2000

# The paths that are forwarded, with or without a /{model} prefix.
INFERENCE_PATHS = frozenset(
    b"/v1/chat/completions /v1/completions /v1/embeddings /v1/responses /v1/messages /v1/messages/count_tokens "
    b"/v1/rerank /v1/score /v1/audio/speech /v1/audio/transcriptions /v1/audio/translations "
    b"/tokenize /detokenize".split()
)
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade content-length".split()
)

# No Accept-Encoding, because a compressed stream can't be read; no keys, because they are for this proxy only.
# No Content-Encoding, because bodies are decoded here.
NOT_FORWARDED = _HOP_BY_HOP | frozenset(
    b"host expect accept-encoding content-encoding authorization x-api-key api-key cookie".split()
)
NOT_RETURNED = _HOP_BY_HOP | frozenset(b"server x-request-id set-cookie".split())
_OWN_NAMES = b"x-agent-infra-", b"access-control-"  # how these begin that only the proxy sets; never passed on
_ONLY_ONCE = frozenset(b"content-length transfer-encoding host expect authorization".split())
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_ABSOLUTE_TARGET = re.compile(rb"(?i:http)://[^/?#@]+(?=[/?]|\Z)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n]*))?")
_INTERIM_LINE = re.compile(rb"HTTP/1\.[01] 1[0-9]{2}[ \r]")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

# No control characters except tab, so that no CR or LF is accepted or passed on.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH_LINES = b"\r\nContent-Length: ", b"\r\ncontent-length: "
_SECRET_LINES = b"\r\nAuthorization: ", b"\r\nauthorization: "
_SECRET_FIELDS = frozenset(b"authorization proxy-authorization x-api-key api-key cookie set-cookie".split())


class HeaderLines:
    """Parses header lines, with a cache for repeated ones.

    The cache is limited in number and length of lines and never holds a line with a secret.
    """

    __slots__ = ("_dropped", "_known")

    def __init__(self, dropped: frozenset[bytes]) -> None:
        """``dropped``: names (lower case) of headers that aren't passed on."""
        self._dropped = dropped
        self._known: dict[bytes, tuple[bytes, bytes, bytes]] = {}

    def read(self, line: bytes) -> tuple[bytes, bytes, bytes]:
        """Return lower-case name, value, and the line to pass on (empty: none). Raises WireError if it is malformed."""
        entry = self._known.get(line)
        if entry is not None:
            return entry
        match = _FIELD.fullmatch(line)
        if match is None:
            raise WireError("a header line is malformed")
        name, value = match[1].lower(), match[2]
        is_dropped = name in self._dropped or name.startswith(_OWN_NAMES)
        entry = name, value, b"" if is_dropped else b"%b: %b\r\n" % (name, value)
        if len(line) <= MAX_KNOWN_LINE_BYTES and name not in _SECRET_FIELDS:
            if len(self._known) >= MAX_KNOWN_LINES:
                self._known.clear()
            self._known[line] = entry
        return entry

    def read_all(self, lines: Sequence[bytes]) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes, bytes]]]:
        """Return the fields and each line's read(). The last value of a name wins; those of Connection are joined."""
        read = self._known.get
        rows = [read(line) or self.read(line) for line in lines]
        fields = {name: value for name, value, _ in rows}
        if len(fields) != len(rows) and b"connection" in fields:
            fields[b"connection"] = b",".join(value for name, value, _ in rows if name == b"connection")
        return fields, rows


class HeadMemory:
    """Caches parsed heads by their bytes without the values of Content-Length and Authorization. Clients and replicas
    repeat their heads, and a lookup costs a tenth of parsing.

    Only the values of complete lines in their usual spelling are cut out, and a head is kept only if it has each of
    these lines once.  So heads that are equal without these values have them in the same place and mean the same.
    The cache is limited in number and length of heads and never holds a secret.
    """

    __slots__ = ("_has_secrets", "_known", "_lines")

    def __init__(self, has_secrets: bool) -> None:
        """``has_secrets``: whether to cut Authorization out; otherwise a head that has one isn't kept."""
        self._has_secrets = has_secrets
        self._known: dict[bytes, Any] = {}
        self._lines = [(_LENGTH_LINES[0], 0), (_SECRET_LINES[0], 0)]  # last spelling and rough position; tried first

    def find(self, data: bytes, end: int) -> tuple[Any, int, bytes] | None:
        """Look up the head ``data[:end]``. Returns its value, Content-Length (-1: none) and Authorization; or None."""
        key, figures, secret = self._cut(data, end)
        kept = self._known.get(key)
        if kept is None:
            return None
        if figures is None:
            return kept, -1, secret
        return (kept, int(figures), secret) if figures.isdigit() and len(figures) <= 18 else None

    def keep(self, head: bytes, fields: Mapping[bytes, bytes], value: Any) -> None:
        """Store ``value`` for a head that was parsed successfully; ``fields`` are all its fields."""
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
        """Return the head without the two values, then Content-Length's (None: no such line) and Authorization's."""
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
        """Search the whole head for one of ``lines``. Returns where its value starts; -1 if there is none."""
        for line in lines:
            at = data.find(line, 0, end)
            if at >= 0:
                self._lines[number] = line, max(0, at - 64)
                return at + len(line)
        return -1


@dataclass
class RequestHead:
    """The head of a request. ``fields`` has lower-case names; the last value of a repeated name wins."""

    method: bytes
    target: bytes
    version: int  # 1 = HTTP/1.1, 0 = HTTP/1.0
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: chunked
    keeps_alive: bool
    forwarded: bytes  # header lines for the replica

    @property
    def keep_alive_line(self) -> bytes:
        """The header line by which an HTTP/1.0 client learns that its connection stays open; empty for others."""
        return b"connection: keep-alive\r\n" if self.keeps_alive and not self.version else b""


def parse_request_head(head: bytes, known: HeaderLines) -> RequestHead:
    """Parse a request's head, including its final empty line. Raises WireError if it is invalid or ambiguous."""
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
            raise WireError("a header that may appear once appears twice")
    version = line[3] == b"1"
    if version and b"host" not in fields:
        raise WireError("the Host header is missing")
    connection = connection_options(fields)
    return RequestHead(
        line[1],
        line[2],
        int(version),
        fields,
        _body_length(fields, version),
        b"close" not in connection and (version or b"keep-alive" in connection),
        b"".join([passed for name, _, passed in rows if name not in connection]),
    )


def connection_options(fields: Mapping[bytes, bytes]) -> Collection[bytes]:
    """Return the options in Connection: ``close``, ``keep-alive``, and names of further headers that end here."""
    options = fields.get(b"connection")
    return {option.strip(b" \t") for option in options.lower().split(b",")} if options else ()


def _body_length(fields: Mapping[bytes, bytes], is_http_1_1: bool) -> int | None:
    """Return the length of a request's body in bytes, None for chunks. Raises WireError if it is ambiguous."""
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
    """Return ``target`` without the scheme and host of an absolute URL, which servers must accept (RFC 9112, 3.2.2).

    Any host is accepted: clients may know this one by any name."""
    found = _ABSOLUTE_TARGET.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def single_slashes(path: bytes) -> bytes:
    """Return ``path`` without empty parts: clients join a base URL that ends in ``/`` with a path that begins so."""
    return re.sub(rb"/{2,}", b"/", path).rstrip(b"/") or b"/" if b"//" in path or path.endswith(b"/") else path


def split_inference_path(path: bytes) -> tuple[str | None, bytes] | None:
    """Split ``/model/v1/completions`` into (model, ``/v1/completions``); model None: no prefix; None: not forwarded."""
    path = single_slashes(path)
    if path in INFERENCE_PATHS:
        return None, path
    for known in INFERENCE_PATHS:
        if path.endswith(known) and len(path) > len(known) + 1:
            return unquote_to_bytes(path[1 : -len(known)]).decode("utf-8", "replace"), known
    return None


def forwarded_head(request: RequestHead, target: bytes, host: bytes, key: str | None, length: int) -> bytes:
    """Return the request head for a replica: with the replica's key, without hop-by-hop and client-only headers."""
    authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
    lines = request.method, target, host, request.forwarded, authorization, length
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%bcontent-length: %d\r\n\r\n" % lines


@dataclass
class AnswerHead:
    """The head of a replica's answer; for ``fields`` see RequestHead."""

    status: int
    fields: dict[bytes, bytes]
    length: int | None  # of the body; None: chunked; or BodyDecoder.UNTIL_CLOSE
    is_reusable: bool  # the connection may be used for another request after this answer
    is_event_stream: bool
    returned: bytes  # status line and header lines for the client


def as_client_error(answer: AnswerHead) -> AnswerHead:
    """Return the head with status 400 in place of its own."""
    lines = answer.returned.partition(b"\r\n")[2]
    return dataclasses.replace(answer, status=400, returned=b"HTTP/1.1 400 Bad Request\r\n" + lines)


def parse_answer_head(head: bytes, known: HeaderLines) -> AnswerHead:
    """Parse an answer's head, including its final empty line. Raises WireError if it is invalid."""
    first, *lines = head[:-4].split(b"\r\n")
    line = _STATUS_LINE.fullmatch(first)
    if line is None:
        raise WireError("the replica does not speak HTTP/1.1")
    fields, rows = known.read_all(lines)
    if len(fields) != len(rows):
        framing = [(name, value) for name, value, _ in rows if name in (b"content-length", b"transfer-encoding")]
        if len(dict(framing)) != len(set(framing)):
            raise WireError("the replica's answer has two lengths")
    status, connection = int(line[2]), connection_options(fields)
    phrase = line[3] if line[3] and not _CONTROL.search(line[3]) else http_phrase(status).encode()
    return AnswerHead(
        status,
        fields,
        _answer_length(status, fields),
        line[1] == b"1"
        and b"close" not in connection
        and not fields.keys() >= {b"content-length", b"transfer-encoding"},
        fields.get(b"content-type", b"").lower().startswith(b"text/event-stream"),
        b"HTTP/1.1 %d %b\r\n%b"
        % (status, phrase, b"".join([passed for name, _, passed in rows if name not in connection])),
    )


def _answer_length(status: int, fields: Mapping[bytes, bytes]) -> int | None:
    """Return the length of an answer's body, as in AnswerHead. Raises WireError if it can't be known."""
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"").strip()
    if status in (204, 304):
        return 0
    if coding is not None:
        if coding.strip().lower() != b"chunked":
            raise WireError("the replica's transfer coding is not chunked")
        return None
    if not length:
        return BodyDecoder.UNTIL_CLOSE
    if not length.isdigit() or len(length) > 18:
        raise WireError("the replica's Content-Length is not a number")
    return int(length)


def after_interim_answers(data: bytes) -> bytes:
    """Return what follows the complete interim answers (1xx) at the start of ``data``."""
    at = 0
    while _INTERIM_LINE.match(data, at) and (end := data.find(b"\r\n\r\n", at) + 4) >= 4:
        at = end
    return data[at:] if at else data


def returned_head(answer: AnswerHead, extra: bytes, length: int | None, chunked: bool, closes: bool) -> bytes:
    """Return the answer head for the client; ``extra`` is complete header lines, ``length`` None if unknown."""
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    if length is not None:
        framing = b"content-length: %d\r\n" % length
    return b"%b%b%b%b\r\n" % (answer.returned, framing, b"connection: close\r\n" if closes else b"", extra)

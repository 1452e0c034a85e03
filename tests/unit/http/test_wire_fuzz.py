"""However bytes are split or spoilt, Wire reads them in one way, or refuses them in the documented one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_infra_core.http.bodies import (
    LAST_CHUNK,
    MAX_CHUNK_LINE_BYTES,
    MAX_TRAILER_LINES,
    BodyDecoder,
    encode_chunk,
)
from agent_infra_core.http.errors import WireError
from agent_infra_core.http.events import EventStream, event_document, holds_whole_events
from agent_infra_core.http.heads import (
    INFERENCE_PATHS,
    MAX_KNOWN_HEAD_BYTES,
    MAX_KNOWN_HEADS,
    MAX_REQUEST_LINE_BYTES,
    NOT_FORWARDED,
    HeaderLines,
    RequestHead,
    forwarded_head,
    parse_answer_head,
    parse_request_head,
    returned_head,
    split_inference_path,
)
from agent_infra_core.protocol import FrameReader, encode_frame
from agent_infra_core.relay.bodies import Codec
from agent_infra_core.relay.requests import HeadReader, LabelReader
from agent_infra_core.settings import HeadersConfig

bounded = settings(max_examples=100, deadline=None, derandomize=True, print_blob=True)

payloads = st.binary(max_size=40)
cuts = st.lists(st.integers(min_value=0, max_value=400), max_size=8)
tokens = st.from_regex(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", fullmatch=True)
values = st.from_regex(rb"[\x21-\x7e\x80-\xff]([\t\x20-\x7e\x80-\xff]{0,20}[\x21-\x7e\x80-\xff])?", fullmatch=True)

LINES = HeaderLines(NOT_FORWARDED)
CHAT = b"/v1/chat/completions"


def split(data: bytes, at: list[int]) -> Iterator[bytes]:
    """``data`` in pieces, cut at these places."""
    ends = sorted({place for place in at if 0 < place < len(data)})
    yield from (data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True) if start < end)


def every_split(data: bytes) -> Iterator[list[int]]:
    """Whole, in two pieces at every byte, and byte by byte."""
    yield []
    yield from ([place] for place in range(1, len(data)))
    yield list(range(len(data)))


# Body framing.


def decode(framed: bytes, at: list[int], length: int | None = None) -> tuple[bytes, int, bool]:
    """(payload, where the body ended, whether it ended) of a body that comes in these pieces."""
    decoder, pieces = BodyDecoder(length), list[bytes]()
    ended = 0
    for piece in split(framed, at):
        ended += decoder.feed(piece, 0, pieces)
        if decoder.is_over:
            break
    return b"".join(pieces), ended, decoder.is_over


@st.composite
def chunked_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """(payload, its framing): sizes in any case and with leading zeros, extensions, trailers."""
    payload, framed = b"", b""
    for piece in draw(st.lists(payloads.filter(bool), max_size=5)):
        size = draw(st.sampled_from([b"%x", b"%X", b"000%x"])) % len(piece)
        framed += size + draw(st.sampled_from([b"", b";a=b", b" ;a", b'; q="x y"'])) + b"\r\n" + piece + b"\r\n"
        payload += piece
    trailers = draw(st.lists(st.sampled_from([b"X: y\r\n", b"Content-Length: 5\r\n"]), max_size=2))
    return payload, framed + draw(st.sampled_from([b"0", b"000"])) + b"\r\n" + b"".join(trailers) + b"\r\n"


@bounded
@given(chunked_bodies(), payloads, cuts)
def test_a_chunked_body_has_one_end_and_one_payload_in_any_splitting(
    body: tuple[bytes, bytes], behind: bytes, at: list[int]
) -> None:
    payload, framed = body
    assert decode(framed + behind, at) == (payload, len(framed), True)


def test_a_chunked_body_is_the_same_split_at_every_byte() -> None:
    framed = b"3;x=y\r\nabc\r\n0B\r\n\r\n0\r\n\r\nGET \r\n0\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n"
    for at in every_split(framed + b"GET /"):
        assert decode(framed + b"GET /", at) == (b"abc\r\n0\r\n\r\nGET ", len(framed), True)


@bounded
@given(payloads, payloads, cuts)
def test_a_body_of_known_length_ends_there_in_any_splitting(body: bytes, behind: bytes, at: list[int]) -> None:
    if body:
        assert decode(body + behind, at, len(body)) == (body, len(body), True)
    assert decode(body + behind, at, BodyDecoder.UNTIL_CLOSE) == (body + behind, len(body + behind), False)


@bounded
@given(
    chunked_bodies(), st.integers(min_value=0), st.sampled_from([b"\r", b"\n", b"\0", b"+", b" ", b"0x", b"-", b"g"])
)
def test_a_spoilt_body_reads_in_one_way_or_is_refused_whatever_the_splitting(
    body: tuple[bytes, bytes], place: int, spoiler: bytes
) -> None:
    place %= len(body[1])
    spoilt = body[1][:place] + spoiler + body[1][place:]

    def outcome(at: list[int]) -> Any:
        try:
            return decode(spoilt, at)
        except WireError as error:
            return error.status, error.closes

    assert outcome([]) == outcome(list(range(len(spoilt))))
    assert outcome([])[0] == 400 or isinstance(outcome([])[0], bytes)


@pytest.mark.parametrize(
    "framed",
    [
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5_0\r\nhello\r\n0\r\n\r\n",
        b"\xb2\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b";a\r\nhello\r\n0\r\n\r\n",
        b"fffffffffffffffff5\r\nhello\r\n0\r\n\r\n",
        b"10000000000000005\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"5\rhello\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"5;a\nb\r\nhello\r\n0\r\n\r\n",
        b"5\r\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"5\r\nhello\r\n0\r\nX: a\rb\r\n\r\n",
        b"5;" + b"a" * MAX_CHUNK_LINE_BYTES + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * (MAX_TRAILER_LINES + 1) + b"\r\n",
    ],
)
def test_ambiguous_chunks_are_refused_in_every_splitting(framed: bytes) -> None:
    for at in ([], list(range(len(framed)))):
        with pytest.raises(WireError):
            decode(framed, at)


@bounded
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3), st.integers(0), st.binary(max_size=2))
def test_chunks_pass_verbatim_only_if_the_decoder_reads_them_alike(
    pieces: list[bytes], place: int, spoiler: bytes
) -> None:
    data = b"".join(encode_chunk(piece + b"\n\n") for piece in pieces)
    assert holds_whole_events(data)
    place %= len(data)
    for spoilt in (data[:place] + spoiler + data[place:], data[:place] + spoiler + data[place + len(spoiler) :]):
        if spoilt and holds_whole_events(spoilt):
            assert decode(spoilt + LAST_CHUNK, [])[1:] == (len(spoilt + LAST_CHUNK), True)


@pytest.mark.parametrize("size", [b"+3", b"0x3", b" 3", b"3 ", b"0_3", b"-0"])
def test_no_lax_chunk_size_passes_verbatim(size: bytes) -> None:
    assert not holds_whole_events(size + b"\r\na\n\n\r\n")


def test_no_chunk_without_its_line_end_passes_verbatim() -> None:
    assert not holds_whole_events(b"3\r\na\n\nXX")
    assert not holds_whole_events(b"3\r\na\n\n\r\n4\r\nb\n\n\r\n")


# Events of a stream, read many at once.

EVENT_KINDS = (
    b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n',
    b'data: {"id":"a","choices":[{"index":1,"delta":{"content":"%b"},"finish_reason":null}]}\n\n',
    b'data: {"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"%b"}]}\n\n',
    b'data: {"id":"a","choices":[{"index":0,"delta":{"reasoning":"%b"}}]}\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[{"id":"c1","function":{"name":"f","arguments":"%b"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"%b"}}]}}]}\n\n',
    b'data: {"choices":[{"text":"a","delta":"%b"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2},"text":"%b"}\n\n',
    b'event: x\ndata: {"type":"text_delta","text":"%b"}\n\n',
    b": %b\n\n",
)
WORDS = rb'|a| words|abort|\n|\"|\\|\|\\\|"|","usage":{"a":"|null]}|{"content":"|"},"finish_reason":"abort'
said = st.sampled_from([*WORDS.split(b"|"), b"\n", b"\n\n", b"\r", b"\r\n", b"\xff", "\u00e4\u4e2d".encode()])
spoken_events = st.lists(st.tuples(st.sampled_from(EVENT_KINDS), said), max_size=12)
spellings = st.sampled_from([b"%x\r\n%b\r\n", b"%x\r\n%b\r\n", b"%X\r\n%b\r\n", b"0%x\r\n%b\r\n"])


@settings(bounded, max_examples=400)
@given(spoken_events, spellings, st.booleans(), st.booleans(), st.sampled_from([CHAT, b"/v1/messages", b""]))
def test_what_events_say_does_not_depend_on_how_many_are_read_at_once(
    events: list[tuple[bytes, bytes]], spelling: bytes, cuts_usage: bool, traces: bool, path: bytes
) -> None:
    chunks = [spelling % (len(event), event) for event in (kind % words for kind, words in events)]
    told = []
    for pauses in (False, True):
        stream = EventStream(
            BodyDecoder(None), to_chunks=True, cuts_usage=cuts_usage, path=path, wanted_text=20, traces=traces
        )
        out = b""
        for chunk in [*chunks, LAST_CHUNK]:
            if not stream.is_over and stream.fault is None:
                out += stream.feed(chunk)
                if pauses:
                    stream.digest()
        # What is no JSON says nothing in particular.
        digest = stream.digest() if all(event_document(chunk) for chunk in chunks) else None
        told.append((out, stream.fault, stream.is_over, stream.events, digest))
    assert told[0] == told[1]


@bounded
@given(st.lists(st.tuples(st.sampled_from([b"T", b"E"]), payloads), max_size=5), cuts)
def test_control_frames_are_the_same_in_any_splitting(frames: list[tuple[bytes, bytes]], at: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(encode_frame(*frame) for frame in frames)
    assert [frame for piece in split(data, at) for frame in reader.feed(piece)] == frames


# Heads.

HEAD = (
    b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    b"X-Session-ID: s 1\r\nContent-Length: 12\r\nConnection: keep-alive\r\n\r\n"
)


def refusal(head: bytes) -> RequestHead | None:
    """None when the head is refused as it should be, else what was read."""
    try:
        return parse_request_head(head, LINES)
    except WireError:
        return None


@bounded
@given(st.lists(st.tuples(tokens, values), max_size=6))
def test_good_fields_are_read_and_forwarded_as_they_are(fields: list[tuple[bytes, bytes]]) -> None:
    plain = [(b"X-" + name, value) for name, value in fields]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in plain)
    request = parse_request_head(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n" + lines + b"\r\n", LINES)
    assert request.fields == {b"host": b"t", **{name.lower(): value for name, value in plain}}
    head = forwarded_head(request, b"/v1/completions", b"h:1", "key", 3)
    kept = {name.lower(): value for name, value in plain if name.lower() != b"x-api-key"}
    own = {b"host": b"h:1", b"authorization": b"Bearer key", b"content-length": b"3"}
    assert parse_request_head(head, LINES).fields == {**own, **kept}


@bounded
@given(st.integers(0), st.integers(0, 3), st.binary(max_size=4))
def test_a_spoilt_head_is_read_in_one_way_or_refused(place: int, removed: int, inserted: bytes) -> None:
    place %= len(HEAD) - 4
    spoilt = HEAD[:place] + inserted + HEAD[place + removed :]
    end = spoilt.find(b"\r\n\r\n") + 4
    request = refusal(spoilt[:end])
    if request is not None:
        assert spoilt[:end].count(b"\n") >= len(request.fields) + 2
        forwarded = forwarded_head(request, b"/v1/completions", b"h:1", None, 0)
        assert forwarded.count(b"\r\n\r\n") == 1
        assert forwarded.lower().count(b"\r\ncontent-length:") == 1
        assert b"\r\ntransfer-encoding" not in forwarded.lower()


@bounded
@given(st.binary(max_size=80))
def test_noise_is_no_request(noise: bytes) -> None:
    request = refusal(noise + b"\r\n\r\n")
    assert request is None or noise.startswith(request.method)


@bounded
@given(st.binary(max_size=60))
def test_any_path_is_known_or_not(path: bytes) -> None:
    route = split_inference_path(path)
    assert route is None or route[1] in INFERENCE_PATHS
    for known in INFERENCE_PATHS:
        assert split_inference_path(b"/model" + known) == ("model", known)


def test_a_request_line_beyond_the_limit_is_414() -> None:
    with pytest.raises(WireError) as caught:
        parse_request_head(b"GET /%b HTTP/1.1\r\nHost: t\r\n\r\n" % (b"a" * MAX_REQUEST_LINE_BYTES), LINES)
    assert caught.value.status == 414


@bounded
@given(st.binary(max_size=60), st.integers(0), st.binary(max_size=3))
def test_an_answer_head_is_read_or_refused(noise: bytes, place: int, inserted: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\n"
    place %= len(head) - 4
    for spoilt in (head[:place] + inserted + head[place:], noise + b"\r\n\r\n"):
        try:
            answer = parse_answer_head(spoilt, LINES)
        except WireError:
            continue
        assert returned_head(answer, b"", 5, False, False).count(b"\r\n\r\n") == 1


ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: %d\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-Content-Length: %d\r\nContent-Length: 5\r\n\r\n",
]
REQUESTS = [
    b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: %d\r\nHost: t\r\nConnection: close\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\nContent-Length: 5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n",
    b"GET /%d HTTP/1.1\r\nHost: t\r\n\r\n",
]


@pytest.mark.parametrize(("heads", "parse"), [(ANSWERS, parse_answer_head), (REQUESTS, parse_request_head)])
def test_a_head_is_read_alike_whatever_was_read_before_it(heads: list[bytes], parse: Any) -> None:
    def outcome(head: bytes, known: HeaderLines) -> str:
        try:
            return repr(parse(head, known))
        except WireError:
            return "refused"

    known = HeaderLines(frozenset())
    every = [head % number for head in heads for number in (0, 7, 123)]
    for head in [*every, *reversed(every)]:
        assert outcome(head, known) == outcome(head, HeaderLines(frozenset()))


HEAD_LINES = [
    *(b"Content-Length: %b" % value for value in (b"5", b"77", b"", b" 5", b"5 ", b"+5", b"5_0", b"9" * 19)),
    *(b"content-length: 6", b"CONTENT-LENGTH: 7", b"Content-Length:8", b"X-Content-Length: 9"),
    *(b"Authorization: Bearer %b" % value for value in (b"a", b"secret", b"Content-Length: 3", b"")),
    *(b"authorization: b", b"Proxy-Authorization: c", b"X-Api-Key: secret", b"Cookie: secret"),
    *(b"Host: t", b"Host: u", b"X-Session-ID: s", b"X-Timing-Pre-Ms: 5", b"Transfer-Encoding: chunked"),
    *(b"Connection: close", b"Expect: 100-continue", b"Content-Type: multipart/form-data", b"A:\x01"),
]
FIRST_LINES = [b"POST /v1/completions HTTP/1.1", b"POST /m/v1/completions HTTP/1.1", b"GET /stats HTTP/1.1"]
FIRST_LINES += [b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 100 Continue", b"HTTP/1.0 200 OK"]
some_heads = st.lists(
    st.tuples(st.sampled_from(FIRST_LINES), st.lists(st.sampled_from(HEAD_LINES), max_size=6)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=400)
@given(some_heads)
def test_a_head_that_is_known_means_what_reading_it_in_full_would_say(heads: list[tuple[bytes, list[bytes]]]) -> None:
    labels = LabelReader(HeadersConfig())

    def reading(reader: HeadReader, head: bytes) -> str:
        try:
            if head.startswith(b"HTTP"):
                answer, length = reader.answer(head + b"body", len(head))
                return repr((answer.status, answer.is_reusable, answer.returned, length))
            plan, length, authorization = reader.plan(head, len(head), b"Bearer a", labels)
            request = plan.request
            what = request.method, request.target, request.version, request.keeps_alive, request.forwarded
            return repr((*what, plan.path, plan.model, plan.labels, plan.is_form, length, authorization))
        except WireError as error:
            return f"refused: {error}"

    reader = HeadReader()
    for first, lines in [*heads, *heads]:
        head = b"\r\n".join([first, *lines, b"", b""])
        # Of a plan that is kept, Authorization is to be the one that was let pass, or it is read again.
        assert reading(reader, head) == reading(HeadReader(), head)
    kept = reader.known_requests._known | reader.known_answers._known
    assert b"secret" not in repr(kept).encode()


def test_a_head_that_comes_again_is_found_with_another_length() -> None:
    reader, labels = HeadReader(), LabelReader(HeadersConfig())
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer a\r\nContent-Length: %d\r\n\r\n"

    def plan(head: bytes, valid: bytes | None) -> Any:
        return reader.plan(head, len(head), valid, labels)

    first = plan(head % 5, None)
    again = plan(head % 12345, b"Bearer a")
    assert again[0] is first[0]
    assert again[1:] == (12345, b"Bearer a")
    assert plan(head % 5, b"Bearer b")[0] is not first[0]


def test_an_answer_in_chunks_that_tells_a_length_too_is_read_in_one_way_whenever_it_comes() -> None:
    reader = HeadReader()
    for figure in (0, 5, 0, 5):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % figure
        assert reader.answer(head, len(head))[1] is None


def test_known_heads_are_bounded() -> None:
    reader, labels = HeadReader(), LabelReader(HeadersConfig())
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nX: %b\r\nContent-Length: 5\r\n\r\n"
    values = [*(str(number).encode() for number in range(3 * MAX_KNOWN_HEADS)), b"long" * MAX_KNOWN_HEAD_BYTES]
    for whole in (head % value for value in values):
        reader.plan(whole, len(whole), None, labels)
    known = reader.known_requests._known
    assert len(known) <= MAX_KNOWN_HEADS
    assert max(map(len, known)) <= MAX_KNOWN_HEAD_BYTES


def test_lines_with_secrets_are_not_remembered_and_their_number_is_bounded() -> None:
    known = HeaderLines(frozenset())
    for number in range(10_000):
        known.read(b"x-timing-pre-ms: %d" % number)
    known.read(b"Authorization: Bearer secret")
    known.read(b"x-api-key: secret")
    known.read(b"x-long: " + b"a" * 10_000)
    assert len(known._known) <= 4000
    assert all(b"secret" not in line and len(line) < 300 for line in known._known)


# Streams of events.

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


def event(document: Any, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + end


def choice(content: str, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}], **fields}


USAGE_EVENT = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
contents = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["abort", '"usage":', '\\"usage\\":', "\n\n", "[DONE]", "data: [DONE]\n\n"]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """(the events, the usage events among them)."""
    end = draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    events = [event(choice(text), end) for text in draw(st.lists(contents, max_size=5))]
    if draw(st.booleans()):
        events.insert(0, b": a comment" + end)
    events.append(event(choice("", "stop", usage=draw(st.sampled_from([None, USAGE]))), end))
    usage = event({"choices": [], "usage": USAGE}, end)
    return [*events, usage, b"data: [DONE]" + end], [usage]


def frame(events: list[bytes], framing: str, size: int) -> bytes:
    """The events in chunks: one each (``size`` 0), or cut in pieces of ``size`` with no regard to events."""
    body = b"".join(events)
    if framing != "chunked":
        return body
    pieces = events if not size else [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(map(encode_chunk, pieces)) + LAST_CHUNK


def event_stream(framing: str, length: int, to_chunks: bool, cuts_usage: bool, path: bytes = CHAT) -> EventStream:
    decoder = BodyDecoder({"chunked": None, "close": BodyDecoder.UNTIL_CLOSE, "length": length}[framing])
    return EventStream(decoder, to_chunks=to_chunks, cuts_usage=cuts_usage, path=path, wanted_text=50)


def relayed(stream: EventStream, data: bytes, at: list[int]) -> bytes:
    """What the client gets, out of the framing that it gets it in."""
    out = b"".join(stream.feed(piece) for piece in split(data, at))
    if stream.decoder.is_until_close:
        out += stream.close()
    return out


@bounded
@given(
    streams(), st.sampled_from(["chunked", "close", "length"]), st.integers(0, 9), st.booleans(), st.booleans(), cuts
)
def test_a_stream_is_relayed_whole_in_any_splitting_but_for_usage_nobody_asked_for(
    events: tuple[list[bytes], list[bytes]], framing: str, size: int, to_chunks: bool, cuts_usage: bool, at: list[int]
) -> None:
    sent, usage = events
    data = frame(sent, framing, size)
    for places in ([], at, list(range(len(data)))):
        stream = event_stream(framing, len(data), to_chunks, cuts_usage)
        out = relayed(stream, data, places)
        if to_chunks:
            payload, end, is_over = decode(out, [])
            assert (end, is_over) == (len(out), True)
        else:
            payload = out
        assert payload == b"".join(each for each in sent if not (cuts_usage and each in usage))
        assert (stream.is_over, stream.fault, stream.has_excess) == (True, None, False)
        digest = stream.digest()
        assert (digest.prompt_tokens, digest.cached_tokens, digest.finish_reason) == (7, 5, "stop")


@pytest.mark.parametrize("cuts_usage", [True, False])
@pytest.mark.parametrize("to_chunks", [True, False])
@pytest.mark.parametrize("size", [0, 7])
def test_a_stream_is_the_same_split_at_every_byte(size: int, to_chunks: bool, cuts_usage: bool) -> None:
    events = [event(choice("hé\n"), b"\r\n\r\n"), event(choice("", "stop")), USAGE_EVENT, DONE]
    data = frame(events, "chunked", size)
    wanted = b"".join(each for each in events if not (cuts_usage and each == USAGE_EVENT))
    for at in every_split(data):
        out = relayed(event_stream("chunked", 0, to_chunks, cuts_usage), data, at)
        assert (decode(out, [])[0] if to_chunks else out) == wanted


@bounded
@given(streams(), st.sampled_from(["chunked", "close"]), st.integers(0, 9), st.integers(0), cuts)
def test_a_stream_that_breaks_off_is_faulty_and_leaves_whole_events_only(
    events: tuple[list[bytes], list[bytes]], framing: str, size: int, broken: int, at: list[int]
) -> None:
    """Framing decides where the end is proper: there a finish reason is enough, and without it only [DONE] is."""
    data = frame(events[0][:-1], framing, size).removesuffix(LAST_CHUNK)
    whole = data[: data.index(b'"stop"')] if framing == "close" else data
    data = data[: broken % len(whole)]
    stream = event_stream(framing, 0, True, False)
    out = b"".join(stream.feed(piece) for piece in split(data, at)) + stream.close()
    assert stream.fault
    out += stream.failure(b"data: the end\n\n")
    payload, end, is_over = decode(out, [])
    assert (end, is_over) == (len(out), True)
    if framing == "chunked":
        assert b"\n\ndata: the end" in payload.replace(b"\r", b"") or payload == b"data: the end\n\n"


@pytest.mark.parametrize("size", [0, 5])
def test_an_answer_that_its_engine_gave_up_is_a_fault_in_every_splitting(size: int) -> None:
    data = frame([event(choice("a")), event(choice("abort", "abort")), DONE], "chunked", size)
    for at in every_split(data):
        stream, out = event_stream("chunked", 0, True, True), b""
        for piece in split(data, at):
            out += stream.feed(piece)
            if stream.fault:
                break
        assert stream.fault == "the engine was shut down"
        payload, _, is_over = decode(out + stream.failure(b"data: the end\n\n"), [])
        assert is_over
        assert payload == event(choice("a")) + b"data: the end\n\n"


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
def test_a_stream_without_its_last_event_is_a_fault(framing: str) -> None:
    data = frame([event(choice("a")), event(choice("b"))], framing, 0)
    for at in every_split(data):
        stream = event_stream(framing, len(data), True, True)
        relayed(stream, data, at)
        assert stream.fault
    stream = event_stream(framing, len(data), True, True, path=b"")
    relayed(stream, data, [])
    assert stream.fault is None


@bounded
@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([b"abort", b'"usage":', b"\n\n", b"data: "]), max_size=8), cuts
)
def test_events_that_are_none_pass_byte_for_byte(pieces: list[bytes], at: list[int]) -> None:
    body = b"".join(pieces)
    data = b"".join(map(encode_chunk, pieces)) + LAST_CHUNK
    for places in ([], at):
        stream = event_stream("chunked", 0, True, True, path=b"")
        assert decode(relayed(stream, data, places), [])[0] == body
        stream.digest()


# What tracking reads of answers: whatever they hold, it can be told to the controller.

ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "usage", "error", "message", "content", "text", "delta", "response", "finish_reason"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@bounded
@given(st.dictionaries(st.sampled_from(["choices", "usage", "error", "message", "content", "output"]), ODD_VALUES))
def test_an_answer_of_any_shape_can_be_digested_and_told(document: dict[str, Any]) -> None:
    codec = Codec()
    digest = codec.digest(json.dumps(document).encode(), 50)
    codec.encode([digest])
    stream = event_stream("chunked", 0, True, True, path=b"")
    stream.feed(encode_chunk(event_ascii(document)) + LAST_CHUNK)
    codec.encode([stream.digest()])


def event_ascii(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def test_half_a_character_at_the_end_of_an_excerpt_can_be_told() -> None:
    stream = event_stream("chunked", 0, True, True, path=b"")
    stream.feed(encode_chunk(b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n') + LAST_CHUNK)
    assert msgspec.json.encode(stream.digest())


@pytest.mark.parametrize("opening", [b"[", b'{"error":', b'{"response":', b'{"content":', b'[{"text":'])
@pytest.mark.parametrize("depth", [200, 480, 700, 900, 990, 5000, 100_000])
def test_no_nesting_is_too_deep_for_the_relay(opening: bytes, depth: int) -> None:
    closing = opening.translate(bytes.maketrans(b"[{", b"]}"), b'":abcdefghijklmnopqrstuvwxyz')[::-1]
    nested = opening * depth + b"1" + closing * depth
    codec = Codec()
    for name in (b"prompt", b"input"):
        fields = codec.request(b'{"%b":%b}' % (name, nested))
        codec.prompt_excerpt(fields, 50)
    for role in (b"user", b"assistant"):
        fields = codec.request(b'{"messages":[{"role":"%b","content":%b}]}' % (role, nested))
        codec.prompt_excerpt(fields, 50)
        codec.trace(fields, is_named=False)
    for name in (b"error", b"content", b"choices", b"usage"):
        codec.digest(b'{"%b":%b}' % (name, nested), 50, traces=True)
    stream = event_stream("chunked", 0, True, True, path=b"")
    stream.feed(encode_chunk(b'data: {"abort":1,"response":' + nested + b"}\n\n") + LAST_CHUNK)
    stream.digest()


@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", rb"\ud800", rb"\ud83d"])
def test_words_that_are_no_text_can_be_told(bad: bytes) -> None:
    codec = Codec()
    message = b'{"messages":[{"role":"%b","content":"%%b"}]}'
    for body in (b'{"prompt":"%b"}', message % b"user", message % b"assistant", b'{"model":"%b"}'):
        fields = codec.request(body % bad)
        codec.encode(codec.prompt_excerpt(fields, 50))
        codec.encode(codec.trace(fields, is_named=False))
    assert codec.encode(codec.digest(b'{"choices":[{"message":{"content":"%b"}}]}' % bad, 50, traces=True))


@pytest.mark.parametrize("wrong", ["-5", "1e3", "1000000000000000000000000000000", "true", '"7"'])
def test_a_token_count_that_cannot_be_is_not_known(wrong: str) -> None:
    usage = b'{"prompt_tokens":%b,"completion_tokens":2}' % wrong.encode()
    document = b'{"choices":[{"finish_reason":"stop","message":{"content":"x"}}],"usage":%b}' % usage
    stream = EventStream(BodyDecoder(None), to_chunks=True, cuts_usage=False, path=b"", wanted_text=10)
    stream.feed(encode_chunk(b"data: " + document + b"\n\n"))
    for digest in (Codec().digest(document, 10), stream.digest()):
        assert digest is not None
        assert (digest.prompt_tokens, digest.completion_tokens, digest.text) == (None, 2, "x")

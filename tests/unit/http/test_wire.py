"""The wire: one reading of every byte or none; the same bytes out however they came in."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent_infra_core.http.heads as heads_module
from agent_infra_core.http.bodies import BodyDecoder, decode_content, encode_chunk
from agent_infra_core.http.errors import RequestError, WireError, error_document, error_event
from agent_infra_core.http.events import EventStream
from agent_infra_core.http.heads import AnswerHead, HeaderLines, RequestHead, forwarded_head, split_inference_path
from agent_infra_core.protocol import FrameReader, encode_frame

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\n"


def parse_request_head(head: bytes) -> RequestHead:
    return heads_module.parse_request_head(
        head, HeaderLines(frozenset((b"host", b"connection", b"content-length", b"upgrade")))
    )


def parse_answer_head(head: bytes) -> AnswerHead:
    return heads_module.parse_answer_head(head, HeaderLines(frozenset()))


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data``, cut at those places."""
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(places) if a < b]


# Heads.

# Cases of the HTTP desync literature: James Kettle's "HTTP Desync Attacks" and "HTTP/1.1 must die"; RFC 9112, 11.
DESYNC = {
    "both lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    "both, the other way round": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n",
    "two equal lengths": b"Content-Length: 4\r\nContent-Length: 4\r\n",
    "list of lengths": b"Content-Length: 4, 4\r\n",
    "signed length": b"Content-Length: +4\r\n",
    "negative length": b"Content-Length: -1\r\n",
    "hexadecimal length": b"Content-Length: 0x4\r\n",
    "length with an underscore": b"Content-Length: 1_0\r\n",
    "empty length": b"Content-Length:\r\n",
    "length in other digits": "Content-Length: ٤\r\n".encode(),
    "huge length": b"Content-Length: 99999999999999999999\r\n",
    "space before the colon": b"Content-Length : 4\r\n",
    "tab before the colon": b"Transfer-Encoding\t: chunked\r\n",
    "folded line": b"Transfer-Encoding:\r\n chunked\r\n",
    "leading space": b" Transfer-Encoding: chunked\r\n",
    "vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "null byte": b"Transfer-Encoding: chunked\x00\r\n",
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    "coding twice": b"Transfer-Encoding: chunked, chunked\r\n",
    "other coding": b"Transfer-Encoding: gzip, chunked\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "quoted coding": b'Transfer-Encoding: "chunked"\r\n',
    "bare line feed": b"X: 1\nTransfer-Encoding: chunked\r\n",
    "bare carriage return": b"X: 1\rTransfer-Encoding: chunked\r\n",
    "line without a colon": b"Transfer-Encoding\r\n",
    "nameless": b": chunked\r\n",
    "name of other letters": "Content-Lengthé: 4\r\n".encode(),
    "two hosts": b"Host: u\r\n",
    "two expectations": b"Expect: 100-continue\r\nExpect: x\r\n",
}


@pytest.mark.parametrize("lines", DESYNC.values(), ids=DESYNC.keys())
def test_a_head_that_can_be_read_in_two_ways_is_refused(lines: bytes) -> None:
    with pytest.raises(WireError) as refused:
        parse_request_head(HEAD + lines + b"\r\n")
    assert refused.value.status == 400
    assert refused.value.closes


@pytest.mark.parametrize(
    "line",
    [
        b"POST /v1 HTTP/1.1 \r\n",
        b"POST  /v1 HTTP/1.1\r\n",
        b"POST /v1 HTTP/2.0\r\n",
        b"POST /v1 http/1.1\r\n",
        b"POST /v1\r\n",
        b"POST /a b HTTP/1.1\r\n",
        b"PO(ST /v1 HTTP/1.1\r\n",
        b"POST /\xff HTTP/1.1\r\n",
        b" POST /v1 HTTP/1.1\r\n",
        b"POST\t/v1\tHTTP/1.1\r\n",
    ],
)
def test_a_request_line_that_is_none_is_refused(line: bytes) -> None:
    with pytest.raises(WireError):
        parse_request_head(line + b"Host: t\r\n\r\n")


def test_http_1_1_needs_a_host_and_1_0_does_not() -> None:
    with pytest.raises(WireError):
        parse_request_head(b"POST /v1 HTTP/1.1\r\n\r\n")
    assert not parse_request_head(b"POST /v1 HTTP/1.0\r\n\r\n").keeps_alive


def test_a_long_request_line_is_414() -> None:
    with pytest.raises(WireError) as refused:
        parse_request_head(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: t\r\n\r\n")
    assert refused.value.status == 414


@given(st.binary(max_size=200))
def test_no_head_escapes_as_another_error(noise: bytes) -> None:
    for head in (noise, HEAD + noise + b"\r\n\r\n", b"POST " + noise + b" HTTP/1.1\r\nHost: t\r\n\r\n"):
        try:
            request = parse_request_head(head)
        except WireError:
            continue
        line, *lines = request.forwarded.split(b"\r\n")
        assert all(re.fullmatch(rb"[^\x00-\x08\x0a-\x1f\x7f]*", line) for line in (line, *lines))


def test_lines_seen_before_are_read_as_if_they_were_the_first() -> None:
    known = HeaderLines(frozenset())
    for length, value in ((4, b"a"), (5, b"a"), (5, b"b"), (4, b"a")):
        head = HEAD + b"X-Session-ID: %b\r\nContent-Length: %d\r\n\r\n" % (value, length)
        request = heads_module.parse_request_head(head, known)
        assert (request.length, request.fields[b"x-session-id"]) == (length, value)


def test_a_refused_line_is_not_remembered() -> None:
    known = HeaderLines(frozenset())
    for _ in range(2):
        with pytest.raises(WireError):
            heads_module.parse_request_head(HEAD + b"X : 1\r\n\r\n", known)


def test_the_values_of_connection_are_words_not_parts_of_words() -> None:
    for value, keeps_alive in ((b"x-close", True), (b"Close", False), (b"keep-alive ,\tclose", False), (b"", True)):
        assert parse_request_head(HEAD + b"Connection: %b\r\n\r\n" % value).keeps_alive is keeps_alive
        assert parse_answer_head(b"HTTP/1.1 200 OK\r\nConnection: %b\r\n\r\n" % value).is_reusable is keeps_alive


def test_no_header_can_be_smuggled_to_the_replica() -> None:
    request = parse_request_head(
        HEAD + b"Connection: close, X-Secret\r\nX-Secret: 1\r\nUpgrade: h2c\r\nX-Fine: 2\r\nContent-Length: 9\r\n\r\n"
    )
    head = forwarded_head(request, b"/v1/completions", b"127.0.0.1:1", "key", 2)
    assert head == (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:1\r\nx-fine: 2\r\nauthorization: Bearer key\r\n"
        b"content-length: 2\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("path", "route"),
    [
        (b"/v1/chat/completions", (None, b"/v1/chat/completions")),
        (b"/m/v1/messages/count_tokens", ("m", b"/v1/messages/count_tokens")),
        (b"/org%2Fm/tokenize", ("org/m", b"/tokenize")),
        (b"/org/m/v1/score", ("org/m", b"/v1/score")),
        (b"/v1/fine_tuning/jobs", None),
        (b"//v1//completions", (None, b"/v1/completions")),
        (b"/v1/completions/", (None, b"/v1/completions")),
        (b"/m//v1/completions//", ("m", b"/v1/completions")),
        (b"/m%2F/v1/completions", ("m/", b"/v1/completions")),
        (b"/v1", None),
        (b"//", None),
        (b"/invocations", None),
    ],
)
def test_only_listed_paths_are_forwarded(path: bytes, route: tuple[str | None, bytes] | None) -> None:
    assert split_inference_path(path) == route


# Bodies.

chunks = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(chunks, cuts, st.sampled_from([b"", b";a=b", b" ;x"]), st.sampled_from([b"", b"T: 1\r\n"]))
def test_a_chunked_body_is_read_the_same_however_it_is_split(
    parts: list[bytes], places: list[int], extension: bytes, trailer: bytes
) -> None:
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n" + trailer + b"\r\n"
    decoder, body = BodyDecoder(None), list[bytes]()
    for piece in pieces_of(data, places):
        assert not decoder.is_over
        assert decoder.feed(piece, 0, body) == len(piece)
    assert decoder.is_over
    assert b"".join(body) == b"".join(parts)
    assert BodyDecoder(None).feed(data + b"POST", 0, []) == len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"g\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b" 1\r\n",
        b"1_0\r\n",
        b"\r\n",
        b";a\r\n",
        b"1\na",
        b"1\r\r\n",
        b"1;\r a\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n",
        b"1\r\naX\r\n",
        b"fffffffffffffffff\r\n",
        b"0\r\n\n",
        b"0\r\nA: b\n\r\n",
        b"1" * 5000,
        b"0\r\n" + b"T: 1\r\n" * 100,
    ],
)
def test_doubtful_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        BodyDecoder(None).feed(data, 0, [])


@given(st.binary(max_size=100), cuts)
def test_no_chunked_body_escapes_as_another_error(data: bytes, places: list[int]) -> None:
    decoder = BodyDecoder(None)
    try:
        for piece in pieces_of(data, places):
            decoder.feed(piece, 0, [])
    except WireError:
        pass


# Streams.


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


TEXT = [event(choices=[{"delta": {"content": f"w{i} é"}, "finish_reason": None}]) for i in range(3)]
LAST = event(choices=[{"delta": {}, "finish_reason": "stop"}])
USAGE = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def stream(**options: object) -> EventStream:
    settings = {
        "to_chunks": True,
        "cuts_usage": True,
        "path": b"/v1/chat/completions",
        "wanted_text": 200,
        "length": None,
        **options,
    }
    return EventStream(BodyDecoder(settings.pop("length")), **settings)  # type: ignore[arg-type]


def relayed(source: EventStream, pieces: list[bytes]) -> tuple[bytes, bool]:
    """What a client reads of the stream, and whether its framing came to an end."""
    out = b"".join(source.feed(piece) for piece in pieces)
    body: list[bytes] = []
    decoder = BodyDecoder(None)
    assert decoder.feed(out, 0, body) == len(out)
    return b"".join(body), decoder.is_over


@given(cuts, st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_a_stream_is_relayed_the_same_at_every_split(places: list[int], sizes: list[int]) -> None:
    events = [b": ping\n\n", *TEXT, LAST, USAGE, DONE]
    data, index = b"", 0
    for size in sizes:  # events in chunks of several, as engines do under load
        data += encode_chunk(b"".join(events[index : index + size]))
        index += size
    data += encode_chunk(b"".join(events[index:])) + b"0\r\n\r\n"
    source = stream()
    body, is_over = relayed(source, pieces_of(data, places))
    assert body == b"".join([b": ping\n\n", *TEXT, LAST, DONE])
    assert is_over
    assert source.fault is None
    digest = source.digest()
    assert (digest.prompt_tokens, digest.completion_tokens, digest.finish_reason) == (4, 3, "stop")
    assert digest.text == "w0 éw1 éw2 é"


def test_a_stream_is_relayed_the_same_at_every_single_byte() -> None:
    data = b"".join(map(encode_chunk, [*TEXT, LAST, USAGE, DONE])) + b"0\r\n\r\n"
    for cut in range(len(data)):
        source = stream()
        assert relayed(source, [data[:cut], data[cut:]])[0] == b"".join([*TEXT, LAST, DONE])
        assert source.fault is None


@given(cuts, st.integers(0, 400))
def test_only_whole_events_leave_so_that_an_error_can_follow(places: list[int], end: int) -> None:
    data = b"".join(map(encode_chunk, [*TEXT, LAST, USAGE, DONE]))
    source = stream()
    out = b"".join(source.feed(piece) for piece in pieces_of(data[: end % len(data)], places))
    out += source.close() + source.failure(error_event("gone", False))
    body: list[bytes] = []
    decoder = BodyDecoder(None)
    decoder.feed(out, 0, body)
    assert decoder.is_over
    assert source.fault
    found = b"".join(body).split(b"\n\n")
    assert found[-1] == b""
    assert json.loads(found[-2].removeprefix(b"data: "))["error"]["message"] == "gone"
    assert all(json.loads(e.removeprefix(b"data: ")) for e in found[:-2] if e != b"data: [DONE]")


def test_a_whole_chunk_passes_as_the_very_same_bytes() -> None:
    chunk = encode_chunk(TEXT[0])
    assert stream().feed(chunk) is chunk


def test_an_engine_that_was_shut_down_leaves_a_fault_however_orderly_its_end() -> None:
    aborted = event(choices=[{"delta": {"content": "half"}, "finish_reason": "abort"}])
    source = stream()
    body, is_over = relayed(source, [b"".join(map(encode_chunk, [TEXT[0], aborted, DONE])) + b"0\r\n\r\n"])
    assert source.fault == "the engine was shut down"
    assert body == TEXT[0]
    assert not is_over


def test_the_word_abort_in_an_answer_is_no_shutdown() -> None:
    words = event(choices=[{"delta": {"content": '"finish_reason":"abort"'}, "finish_reason": None}])
    source = stream()
    body, _ = relayed(source, [encode_chunk(words)])
    assert body == words
    assert source.fault is None


def test_a_stream_that_ends_without_done_is_a_fault_where_done_is_due() -> None:
    data = encode_chunk(TEXT[0]) + b"0\r\n\r\n"
    for needed in (True, False):
        source = stream(path=b"/v1/completions" if needed else b"")
        assert relayed(source, [data])[1] is not needed
        assert (source.fault is not None) is needed


def test_a_stream_until_close_ends_well_only_with_done() -> None:
    for events, is_fault in (([*TEXT, DONE], False), (TEXT, True)):
        source = stream(length=BodyDecoder.UNTIL_CLOSE)
        out = source.feed(b"".join(events)) + source.close()
        assert (source.fault is not None) is is_fault
        assert out.endswith(b"0\r\n\r\n") is not is_fault


def test_usage_in_every_event_is_left_alone() -> None:
    running = event(choices=[{"delta": {"content": "x"}}], usage={"completion_tokens": 1})
    assert relayed(stream(), [encode_chunk(running)])[0] == running


def test_events_that_say_there_is_no_usage_pass_as_they_are_and_the_one_that_has_it_is_cut() -> None:
    running = [encode_chunk(event(choices=[{"delta": {"content": f"w{i}"}}], usage=None)) for i in range(3)]
    both = encode_chunk(event(choices=[{"delta": {"content": "x"}}], usage=None) + USAGE)
    source = stream()
    assert [source.feed(chunk) is chunk for chunk in running] == [True] * 3
    assert source.feed(both) == encode_chunk(event(choices=[{"delta": {"content": "x"}}], usage=None))
    assert source.digest().completion_tokens == 3


def test_a_messages_stream_that_breaks_off_has_the_tokens_of_its_beginning_for_no_sum() -> None:
    began = event(type="message_start", message={"usage": {"input_tokens": 25, "output_tokens": 1}})
    words = [event(type="content_block_delta", delta={"type": "text_delta", "text": f"w{i}"}) for i in range(9)]
    ended = event(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9})
    for events, completion_tokens in (([began, *words], None), ([began, *words, ended], 9)):
        source = stream(path=b"")
        for each in events:
            source.feed(encode_chunk(each))
        digest = source.digest()
        assert (digest.prompt_tokens, digest.completion_tokens) == (25, completion_tokens)


def test_tokens_are_read_in_every_apis_shape() -> None:
    for events, expected in (
        (
            [
                event(
                    type="message_delta",
                    delta={"stop_reason": "end_turn"},
                    usage={"input_tokens": 5, "output_tokens": 2},
                )
            ],
        )
        * 1
        + ((5, 2, "end_turn"),),
        (
            [event(type="response.completed", response={"usage": {"input_tokens": 5, "output_tokens": 2}})],
            (5, 2, None),
        ),
    ):
        source = stream(path=b"")
        relayed(source, [b"".join(map(encode_chunk, events)) + b"0\r\n\r\n"])
        digest = source.digest()
        assert (digest.prompt_tokens, digest.completion_tokens, digest.finish_reason) == expected


@given(st.binary(max_size=300), cuts)
def test_no_stream_escapes_as_another_error(data: bytes, places: list[int]) -> None:
    source = stream()
    try:
        for piece in pieces_of(encode_chunk(data) + data, places):
            source.feed(piece)
    except WireError:
        pass
    source.digest()


def test_errors_have_the_shape_of_their_api() -> None:
    assert json.loads(error_document(404, "no", "model_not_found", False))["error"]["code"] == "model_not_found"
    assert json.loads(error_document(429, "no", None, True)) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "no"},
    }
    assert error_event("x", True).startswith(b"event: error\ndata: {")


# Compressed bodies.


def decoded(body: bytes, coding: bytes, limit: int = 1 << 30) -> bytes:
    return b"".join(decode_content(body, coding, limit))


def test_a_compressed_body_is_decoded() -> None:
    text = b'{"model":"m"}' * 300_000
    assert decoded(gzip.compress(text), b"gzip") == text
    assert decoded(gzip.compress(text), b"x-gzip") == text
    assert decoded(zlib.compress(text), b"deflate") == text


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (b"anything", b"br", 415),
        (b"anything", b"zstd", 415),
        (b"anything", b"gzip, br", 415),
        (b"anything", b"gzip", 400),
        (gzip.compress(b"a" * 1000)[:-9], b"gzip", 400),
        (b"", b"gzip", 400),
        (gzip.compress(b"a" * (1 << 24)), b"gzip", 413),
    ],
    # Named: gzip writes the time into its header, and each of xdist's processes must collect the same names.
    ids=["br", "zstd", "gzip and br", "not gzip", "cut", "empty", "too long"],
)
def test_a_body_that_cannot_be_decoded_within_the_limit_is_refused(body: bytes, coding: bytes, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        decoded(body, coding, 1 << 20)
    assert caught.value.status == status
    assert status != 415 or coding.decode() in str(caught.value)


@pytest.mark.parametrize(
    ("version", "connection", "keeps_alive", "line"),
    [
        (1, b"", True, b""),
        (0, b"", False, b""),
        (0, b"Connection: Keep-Alive\r\n", True, b"connection: keep-alive\r\n"),
        (0, b"Connection: keep-alive, close\r\n", False, b""),
    ],
)
def test_http_1_0_keeps_a_connection_where_it_asks_to(
    version: int, connection: bytes, keeps_alive: bool, line: bytes
) -> None:
    head = parse_request_head(b"GET / HTTP/1.%d\r\nHost: t\r\n%b\r\n" % (version, connection))
    assert (head.keeps_alive, head.keep_alive_line) == (keeps_alive, line)


# Answers and frames.


def test_an_answers_framing_is_read() -> None:
    assert parse_answer_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n").length == 5
    assert parse_answer_head(b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n").length is None
    assert parse_answer_head(b"HTTP/1.0 200 OK\r\n\r\n").length == BodyDecoder.UNTIL_CLOSE
    assert parse_answer_head(b"HTTP/1.1 204 No\r\n\r\n").length == 0


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: x\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked-not\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"X: a\x1b[2J\r\n",
    ],
)
def test_an_answer_that_can_be_read_in_two_ways_is_refused(lines: bytes) -> None:
    with pytest.raises(WireError):
        parse_answer_head(b"HTTP/1.1 200 OK\r\n%b\r\n" % lines)


def test_interim_answers_are_passed_over() -> None:
    hint, final = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"
    for rest in (final, b"", b"HTTP/1.1 1", hint[:-2], b"HTTP/1.1 1000 No\r\n\r\n"):
        assert heads_module.after_interim_answers(hint * 3 + rest) == rest


def test_an_answer_that_is_no_http_is_refused() -> None:
    with pytest.raises(WireError):
        parse_answer_head(b"SSH-2.0\r\n\r\n")


def test_what_an_answer_may_not_say_to_the_client_is_left_out() -> None:
    head = heads_module.parse_answer_head(
        b"HTTP/1.1 200 \x1b]0;boo\x07\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nX-Fine: 2\r\n"
        b"X-Agent-Infra-Backend: other\r\nAccess-Control-Allow-Origin: *\r\nSet-Cookie: a\r\n\r\n",
        HeaderLines(heads_module.NOT_RETURNED),
    )
    assert head.returned == b"HTTP/1.1 200 OK\r\nx-fine: 2\r\n"
    assert parse_answer_head(b"HTTP/1.1 299 Fine\r\n\r\n").returned == b"HTTP/1.1 299 Fine\r\n"


def test_an_answer_with_chunks_and_a_length_is_the_last_on_its_connection() -> None:
    head = parse_answer_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (head.length, head.is_reusable) == (None, False)


@given(st.lists(st.tuples(st.sampled_from([b"T", b"E"]), st.binary(max_size=50)), max_size=5), cuts)
def test_frames_are_read_however_they_are_split(frames: list[tuple[bytes, bytes]], places: list[int]) -> None:
    data = b"".join(encode_frame(kind, payload) for kind, payload in frames)
    reader = FrameReader()
    assert [frame for piece in pieces_of(data, places) for frame in reader.feed(piece)] == frames

"""Requests that two servers might read differently: refused, closed, and no byte of them a request to a replica."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from relay_harness import Client, RelayProcess, backend

PATH = b"/v1/completions"
BODY = b'{"model":"m"}'
GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 13\r\n\r\n" + BODY
SMUGGLED = b"POST /v1/completions?smuggled HTTP/1.1\r\nHost: t\r\nContent-Length: 13\r\n\r\n" + BODY
CHUNKED_BODY = b"d\r\n" + BODY + b"\r\n0\r\n\r\n"


class Pair(NamedTuple):
    """A relay and the engine behind it."""

    relay: RelayProcess
    engine: FakeEngine

    def requests(self) -> int:
        seen: int = self.engine.call()["requests"]
        return seen


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("relay")
    with RelayProcess(directory) as relay, FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port)], proxy={"max_body_mb": 1.0})
        yield Pair(relay, engine)


@pytest.fixture(scope="module")
def hasty(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The same engine behind a relay that soon gives up."""
    with RelayProcess(tmp_path_factory.mktemp("hasty"), HEAD_S=0.7, BODY_S=0.7, LINGER_S=0.3) as relay:
        relay.controller.send_table([backend(1, pair.engine.port)])
        yield Pair(relay, pair.engine)


def post(fields: bytes, body: bytes = BODY, line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    """A request whose header lines are exactly ``fields``."""
    return line + b"\r\n" + fields + b"\r\n" + body


def chunks(body: bytes) -> bytes:
    return post(b"Host: t\r\nTransfer-Encoding: chunked\r\n", body)


def length(value: bytes, body: bytes = BODY) -> bytes:
    return post(b"Host: t\r\nContent-Length: " + value + b"\r\n", body)


def coding(line: bytes) -> bytes:
    """A chunked request whose Transfer-Encoding is told in this way, and an honest Content-Length not at all."""
    return post(b"Host: t\r\n" + line + b"\r\n", CHUNKED_BODY)


REFUSED = {
    "an absolute target without a Host header": GOOD.replace(PATH, b"http://t" + PATH).replace(b"Host: t\r\n", b""),
    # Content-Length against Transfer-Encoding.
    "CL.TE": post(b"Host: t\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\nG"),
    "TE.CL": post(b"Host: t\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n", CHUNKED_BODY),
    "CL.TE, TE in another case": post(b"Host: t\r\nContent-Length: 6\r\ntRANSFER-eNCODING: CHUNKED\r\n", b"0\r\n\r\nG"),
    "CL.0 with TE": post(b"Host: t\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n", CHUNKED_BODY),
    "TE and CL in HTTP/1.0": post(b"Transfer-Encoding: chunked\r\n", CHUNKED_BODY, b"POST /v1/completions HTTP/1.0"),
    # Transfer-Encoding that one server sees and another does not.
    "TE xchunked": coding(b"Transfer-Encoding: xchunked"),
    "TE chunkedx": coding(b"Transfer-Encoding: chunkedx"),
    "TE quoted": coding(b'Transfer-Encoding: "chunked"'),
    "TE empty": coding(b"Transfer-Encoding:"),
    "TE identity": coding(b"Transfer-Encoding: identity"),
    "TE cow": coding(b"Transfer-Encoding: cow"),
    "TE list, chunked last": coding(b"Transfer-Encoding: gzip, chunked"),
    "TE list, chunked first": coding(b"Transfer-Encoding: chunked, identity"),
    "TE chunked twice in one": coding(b"Transfer-Encoding: chunked, chunked"),
    "TE comma": coding(b"Transfer-Encoding: chunked,"),
    "TE parameter": coding(b"Transfer-Encoding: chunked;q=1"),
    "TE twice": coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    "TE twice, other second": coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x"),
    "TE twice, other first": coding(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
    "TE space before the colon": coding(b"Transfer-Encoding : chunked"),
    "TE tab before the colon": coding(b"Transfer-Encoding\t: chunked"),
    "TE folded": coding(b"Transfer-Encoding:\r\n chunked"),
    "TE folded with a tab": coding(b"Transfer-Encoding:\r\n\tchunked"),
    "TE behind a space": coding(b" Transfer-Encoding: chunked"),
    "TE behind a bare CR": coding(b"X: y\rTransfer-Encoding: chunked"),
    "TE behind a bare LF": coding(b"X: y\nTransfer-Encoding: chunked"),
    "TE with a vertical tab": coding(b"Transfer-Encoding: \x0bchunked"),
    "TE with a form feed": coding(b"Transfer-Encoding: chunked\x0c"),
    "TE with a NUL": coding(b"Transfer-Encoding: chunked\0"),
    "TE with a no-break space": coding(b"Transfer-Encoding: \xa0chunked"),
    "TE with a DEL": coding(b"Transfer-Encoding: chunked\x7f"),
    "TE name with a NUL": coding(b"Transfer-Encoding\0: chunked"),
    # Content-Length.
    "CL twice, different": length(b"13\r\nContent-Length: 0"),
    "CL twice, the same": length(b"13\r\nContent-Length: 13"),
    "CL list, the same": length(b"13, 13"),
    "CL list, different": length(b"13, 0"),
    "CL plus": length(b"+13"),
    "CL minus": length(b"-13"),
    "CL minus nought": length(b"-0"),
    "CL hexadecimal": length(b"0xd"),
    "CL hexadecimal digits": length(b"d"),
    "CL decimal point": length(b"13.0"),
    "CL exponent": length(b"1e1"),
    "CL underscore": length(b"1_3"),
    "CL inner space": length(b"1 3"),
    "CL empty": length(b""),
    "CL quoted": length(b'"13"'),
    "CL Arabic digits": length("١٣".encode()),
    "CL superscript": length(b"\xb9\xb3"),
    "CL huge": length(b"9" * 40),
    "CL wraps at 64 bits": length(b"18446744073709551629"),
    "CL with a NUL": length(b"13\0"),
    "CL space before the colon": post(b"Host: t\r\nContent-Length : 13\r\n"),
    "CL folded": length(b"\r\n 13"),
    # Header lines.
    "obs-fold": post(b"Host: t\r\nX: a\r\n b\r\nContent-Length: 13\r\n"),
    "first line folded": post(b" X: y\r\nHost: t\r\nContent-Length: 13\r\n"),
    "bare LF lines": GOOD.replace(b"\r\n", b"\n"),
    "bare LF at the head's end": post(b"Host: t\r\nContent-Length: 13\r\n\n"),
    "bare LF in a value": post(b"Host: t\r\nX: a\nContent-Length: 13\r\n"),
    "bare CR in a value": post(b"Host: t\r\nX: a\rb\r\nContent-Length: 13\r\n"),
    "bare CR lines": GOOD.replace(b"\r\n", b"\r") + b"\r\n\r\n",
    "CR CR LF": post(b"Host: t\r\r\nContent-Length: 13\r\n"),
    "NUL in a value": post(b"Host: t\r\nX: a\0b\r\nContent-Length: 13\r\n"),
    "NUL in a name": post(b"Host: t\r\nX\0: a\r\nContent-Length: 13\r\n"),
    "no colon": post(b"Host: t\r\nnonsense\r\nContent-Length: 13\r\n"),
    "empty name": post(b"Host: t\r\n: a\r\nContent-Length: 13\r\n"),
    "space in a name": post(b"Host: t\r\nX Y: a\r\nContent-Length: 13\r\n"),
    "brackets in a name": post(b"Host: t\r\nX[]: a\r\nContent-Length: 13\r\n"),
    "UTF-8 in a name": post("Host: t\r\nÜ: a\r\nContent-Length: 13\r\n".encode()),
    "escape in a value": post(b"Host: t\r\nX: \x1b[2J\r\nContent-Length: 13\r\n"),
    # Host.
    "no Host": post(b"Content-Length: 13\r\n"),
    "two Hosts": post(b"Host: t\r\nHost: u\r\nContent-Length: 13\r\n"),
    "two equal Hosts": post(b"Host: t\r\nhost: t\r\nContent-Length: 13\r\n"),
    "Host with a space before the colon": post(b"Host : t\r\nContent-Length: 13\r\n"),
    # The request line.
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": GOOD.replace(b"HTTP/1.1", b"HTTP/1.2"),
    "HTTP/2.0": GOOD.replace(b"HTTP/1.1", b"HTTP/2.0"),
    "HTTP/1.10": GOOD.replace(b"HTTP/1.1", b"HTTP/1.10"),
    "http in small letters": GOOD.replace(b"HTTP/1.1", b"http/1.1"),
    "HTTP/0.9": b"POST /v1/completions\r\n\r\n",
    "no version, a space": b"POST /v1/completions \r\nHost: t\r\n\r\n",
    "two spaces": GOOD.replace(b"POST ", b"POST  "),
    "a tab": GOOD.replace(b"POST ", b"POST\t"),
    "space in the target": GOOD.replace(PATH, b"/v1/completions x"),
    "space at the line's end": GOOD.replace(b"HTTP/1.1", b"HTTP/1.1 "),
    "space before the method": b" " + GOOD,
    "NUL in the target": GOOD.replace(PATH, b"/v1/completions\0"),
    "bytes beyond ASCII in the target": GOOD.replace(PATH, b"/v1/completions?\xff"),
    "bare CR in the target": GOOD.replace(PATH, b"/v1/completions?a\rb"),
    "brackets in the method": GOOD.replace(b"POST", b"PO[]ST"),
    "an endless method": GOOD.replace(b"POST", b"POST" * 20),
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 40 + b"\r\n\r\n",
    # Chunks.
    "chunk size with 0x": chunks(b"0xd\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with a plus": chunks(b"+d\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with a minus": chunks(b"-d\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size behind a space": chunks(b" d\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size before a space": chunks(b"d \r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with an underscore": chunks(b"0_d\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size empty": chunks(b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size no number": chunks(b"x\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size wraps at 64 bits": chunks(b"1000000000000000d\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size ends in LF": chunks(b"d\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size ends in CR": chunks(b"d\r" + BODY + b"\r\n0\r\n\r\n"),
    "chunk extension with a bare CR": chunks(b"d;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk extension with a bare LF": chunks(b"d;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk extension endless": chunks(b"d;" + b"a" * 5000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk longer than its size": chunks(b"c\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk shorter than its size": chunks(b"e\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk without its line end": chunks(b"d\r\n" + BODY + b"0\r\n\r\n"),
    "chunk ends in LF": chunks(b"d\r\n" + BODY + b"\n0\r\n\r\n"),
    "last chunk ends in LF": chunks(b"d\r\n" + BODY + b"\r\n0\n\n"),
    "trailers end in LF": chunks(b"d\r\n" + BODY + b"\r\n0\r\nX: y\n\n"),
    "trailer with a bare CR": chunks(b"d\r\n" + BODY + b"\r\n0\r\nX: a\rb\r\n\r\n"),
    "too many trailers": chunks(b"d\r\n" + BODY + b"\r\n0\r\n" + b"X: y\r\n" * 100 + b"\r\n"),
}
OTHERWISE_REFUSED = {
    "head too long": (431, post(b"Host: t\r\nX: " + b"a" * 70_000 + b"\r\nContent-Length: 13\r\n")),
    "too many header lines": (431, post(b"Host: t\r\n" + b"X: y\r\n" * 12_000 + b"Content-Length: 13\r\n")),
    "target too long": (414, GOOD.replace(PATH, b"/" + b"a" * 9000)),
    "body too long": (413, length(b"1048577", b"x" * 1000)),
    "body absurdly long": (413, length(b"9" * 18, b"x" * 1000)),
    "chunks too long together": (413, chunks((b"2000\r\n" + b"x" * 8192 + b"\r\n") * 160 + b"0\r\n\r\n")),
    "one chunk of absurd size": (413, chunks(b"fffffffffffffff\r\n" + b"x" * 1_100_000)),
    "WebSocket": (
        501,
        post(b"Host: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", b"", b"GET /v1/realtime HTTP/1.1"),
    ),
    "WebSocket over POST": (
        501,
        post(b"Host: t\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nContent-Length: 13\r\n"),
    ),
}
CASES = [pytest.param(400, request, id=name) for name, request in REFUSED.items()]
CASES += [pytest.param(status, request, id=name) for name, (status, request) in OTHERWISE_REFUSED.items()]


@pytest.mark.parametrize(("status", "request_bytes"), CASES)
def test_a_doubtful_request_is_refused_closed_and_never_reaches_a_replica(
    pair: Pair, status: int, request_bytes: bytes
) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        answer = client.raw(request_bytes + SMUGGLED)
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.json()["error"]["message"]
        assert client.is_closed()
    with Client(pair.relay.port) as client:
        assert client.raw(GOOD).status == 200
    assert pair.requests() == before + 1
    assert "smuggled" not in "".join(pair.engine.call()["heads"])


READ_AS_ONE = {
    "TE in capitals": coding(b"TRANSFER-ENCODING: CHUNKED"),
    "TE without a space": coding(b"Transfer-Encoding:chunked"),
    "TE behind a tab": coding(b"Transfer-Encoding:\tchunked"),
    "TE before blanks": coding(b"Transfer-Encoding: chunked \t"),
    "CL between blanks": length(b"  13 \t"),
    "CL with leading zeros": length(b"00013"),
    "a header like a framing one": post(
        b"Host: t\r\nX-Content-Length: 5\r\nContent_Length: 5\r\nContent-Length: 13\r\n"
    ),
    "chunk size in capitals": chunks(b"D\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with leading zeros": chunks(b"000d\r\n" + BODY + b"\r\n000\r\n\r\n"),
    "chunk extensions": chunks(b'd;a=b;c="d"\r\n' + BODY + b"\r\n0;e\r\n\r\n"),
    "trailers that look like framing": chunks(
        b"d\r\n" + BODY + b"\r\n0\r\nContent-Length: 100\r\nTransfer-Encoding: x\r\nHost: evil\r\n\r\n"
    ),
    "a request line among the trailers": chunks(
        b"d\r\n" + BODY + b"\r\n0\r\nPOST /v1/completions?smuggled HTTP/1.1\r\nHost: t\r\n\r\n"
    ),
    "empty lines before it": b"\r\n\r\n" + GOOD,
    "an upgrade to HTTP/2": post(
        b"Host: t\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\nContent-Length: 13\r\n"
    ),
    "framing headers named in Connection": post(
        b"Host: t\r\nConnection: Content-Length, Host, Authorization\r\nContent-Length: 13\r\n"
    ),
    "two Connection headers": post(
        b"Host: t\r\nConnection: X-A\r\nConnection: X-B\r\nX-A: private\r\nContent-Length: 13\r\n"
    ),
    "an absolute target": GOOD.replace(PATH, b"http://evil:80" + PATH),
    "an absolute target, IPv6, with a query": GOOD.replace(PATH, b"HTTP://[::1]:80" + PATH + b"?a=http://b/c"),
    "an absolute target with the model in the path": GOOD.replace(PATH, b"http://evil/m" + PATH),
    "an encoded line break in the query": GOOD.replace(PATH, PATH + b"?a=%0d%0aX:%20y%00"),
}


@pytest.mark.parametrize("request_bytes", [pytest.param(value, id=name) for name, value in READ_AS_ONE.items()])
def test_a_request_that_reads_in_one_way_reaches_the_replica_once_in_that_way(pair: Pair, request_bytes: bytes) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        assert client.raw(request_bytes + GOOD).status == 200
        seen = pair.engine.call()
        assert client.read().status == 200
    assert pair.requests() == before + 2
    assert seen["body"] == BODY.decode()
    for head in pair.engine.call()["heads"][-2:]:
        assert head.lower().count("content-length: 13") == 1
        assert head.startswith(f"POST {PATH.decode()}")
        assert "authorization: Bearer replica-key" in head
        for absent in ("smuggled", "transfer-encoding", "upgrade", "h2c", "evil", "private", "\0"):
            assert absent not in head.lower()


ANSWERED_HERE = {
    "an absolute target of the app": (200, b"GET http://evil/v1/models HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target that is a host alone": (200, b"GET HTTP://evil:80 HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target with a query alone": (200, b"GET http://evil?a=b HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target without a host": (404, b"GET http:///health HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target with a user": (404, b"GET http://me:pw@evil/health HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target of another scheme": (404, b"GET https://evil/health HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an absolute target of no model": (400, GOOD.replace(PATH, b"http://evil/other/v1/completions")),
    "CONNECT": (404, b"CONNECT evil:443 HTTP/1.1\r\nHost: t\r\n\r\n"),
    "OPTIONS *": (404, b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n"),
    "TRACE": (405, b"TRACE /v1/completions HTTP/1.1\r\nHost: t\r\n\r\n"),
    "GET with a body": (
        200,
        b"GET /v1/models HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    ),
    "GET with chunks": (
        200,
        b"GET /v1/models HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(SMUGGLED), SMUGGLED),
    ),
    "GET of an inference path with a body": (405, GOOD.replace(b"POST", b"GET")),
    "a method of its own": (405, GOOD.replace(b"POST", b"P!ST")),
    "small letters in the method": (404, GOOD.replace(b"POST", b"post")),
    "an encoded NUL in the path": (404, GOOD.replace(PATH, b"/v1/completions%00")),
    "an encoded slash": (404, GOOD.replace(PATH, b"/v1%2fcompletions")),
    "a line break in the path": (404, b"GET /a%0d%0aX-Injected:%20y HTTP/1.1\r\nHost: t\r\n\r\n"),
    "a fragment": (404, GOOD.replace(PATH, PATH + b"#a")),
    "dots": (404, GOOD.replace(PATH, b"/../v1/completions/.")),
    "no model but a line break": (
        404,
        GOOD.replace(PATH, b"/x%0d%0aX:y/v1/completions").replace(BODY, b'{"user":"me"}'),
    ),
    "a body that is no JSON": (400, GOOD.replace(BODY, b"not an object")),
    "a body that is a list": (400, GOOD.replace(BODY, b'["model","m"]')),
    "a body nested too deep": (400, length(b"20014", b'{"model":"m","x":' + b"[" * 9998 + b"]" * 9998 + b"}")),
    "an empty body": (400, GOOD.replace(b": 13", b": 0").replace(BODY, b"")),
    "no body at all": (400, b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n\r\n"),
}


@pytest.mark.parametrize(
    ("status", "request_bytes"), [pytest.param(*value, id=name) for name, value in ANSWERED_HERE.items()]
)
def test_what_no_replica_should_see_is_answered_here_and_the_connection_stays_in_step(
    pair: Pair, status: int, request_bytes: bytes
) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        answer = client.raw(request_bytes)
        assert answer.status in (status, 405) if status == 404 else answer.status == status
        assert "x-injected" not in answer.headers
        assert client.raw(GOOD).status == 200
    assert pair.requests() == before + 1


def test_a_slash_too_many_in_the_path_injects_no_header(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        answer = client.raw(b"GET //stats%0d%0aX-Injected:%20y//z HTTP/1.1\r\nHost: t\r\n\r\n")
        assert answer.status in (308, 404)
        assert "x-injected" not in answer.headers


# Pipelines.


def test_pipelined_requests_of_every_kind_are_answered_in_order(pair: Pair) -> None:
    health = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
    streamed = chunks(b'1c\r\n{"model":"m","stream":true}\n\r\n0\r\n\r\n')
    with Client(pair.relay.port) as client:
        client.sock.sendall((GOOD + health + streamed + chunks(CHUNKED_BODY)) * 5)
        for _ in range(5):
            assert "choices" in client.read().json()
            assert "models" in client.read().json()
            assert client.read().events()[-1] == "[DONE]"
            assert "choices" in client.read().json()


def test_pipelined_requests_are_the_same_sent_byte_by_byte(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        for byte in chunks(CHUNKED_BODY) + GOOD:
            client.sock.sendall(bytes([byte]))
        assert [client.read().status for _ in range(2)] == [200, 200]


def test_what_follows_a_refused_request_in_a_pipeline_is_not_read(pair: Pair) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        client.sock.sendall(GOOD + GOOD + REFUSED["CL.TE"] + SMUGGLED * 3)
        assert [client.read().status for _ in range(3)] == [200, 200, 400]
        assert client.is_closed()
    assert pair.requests() == before + 2


def test_a_request_behind_the_last_one_is_not_answered(pair: Pair) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        client.sock.sendall(GOOD.replace(b"Host: t", b"Host: t\r\nConnection: close") + SMUGGLED)
        assert client.read().status == 200
        assert client.is_closed()
    assert pair.requests() == before + 1


def test_a_request_behind_the_last_one_is_not_answered_while_that_is_on_its_way(pair: Pair) -> None:
    """The last one is served by callbacks, as one is whose head is known."""
    body = b'{"model":"m","fake":{"held":0}}'
    last = post(b"Host: t\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body), body)
    before = pair.requests()
    with Client(pair.relay.port) as client:
        assert client.raw(last).status == 200
    with Client(pair.relay.port) as client:
        assert client.raw(GOOD).status == 200
        client.sock.sendall(last.replace(b'"held":0', b'"held":1'))
        pair.engine.wait_for("requests", before + 3)
        client.sock.sendall(SMUGGLED)
        pair.engine.call({"release": True})
        assert client.read().status == 200
        assert client.is_closed()
    pair.engine.call({})
    with Client(pair.relay.port) as client:
        assert client.raw(GOOD).status == 200
    assert pair.requests() == before + 4


def test_an_answer_to_head_has_no_body_and_says_how_long_it_would_be(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        length = len(client.get("/v1/models").body)
        for path, expected in (b"/v1/models", b"200 OK"), (b"/v1/chat/completions", b"40"):
            client.sock.sendall(b"HEAD %b HTTP/1.1\r\nHost: t\r\n\r\n" % path)
            while not client.buffer.endswith(b"\r\n\r\n"):
                client.buffer += client.sock.recv(65536)
            head, client.buffer = client.buffer, b""
            assert head.startswith(b"HTTP/1.1 " + expected)
            assert (b"content-length: %d\r\n" % length in head.lower()) is (path == b"/v1/models")
            assert client.get("/v1/models").status == 200


# HTTP/1.0, Expect.


def test_an_http_1_0_connection_is_closed_unless_the_client_asks_to_keep_it(pair: Pair) -> None:
    request = b"POST /v1/completions HTTP/1.0\r\n%bContent-Length: 13\r\n\r\n" + BODY
    with Client(pair.relay.port) as client:
        for _ in range(2):
            answer = client.raw(request % b"Connection: keep-alive\r\n")
            assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
        assert client.raw(request % b"").status == 200
        assert client.is_closed()


def test_an_http_1_0_client_gets_no_interim_answer(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        client.sock.sendall(b"POST /v1/completions HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n")
        assert client.raw(BODY).status == 200


def test_a_client_that_sends_its_body_anyway_gets_no_interim_answer_and_stays_in_step(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        request = GOOD.replace(b"Host: t", b"Host: t\r\nExpect: 100-continue")
        client.sock.sendall(request + request)
        assert [client.read().status for _ in range(2)] == [200, 200]


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(pair: Pair) -> None:
    with Client(pair.relay.port) as client:
        answer = client.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n"
        )
        assert answer.status == 413
        assert client.is_closed()


# Slow clients.


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(b"P", id="one byte"),
        pytest.param(GOOD[:60], id="half a head"),
        pytest.param(GOOD[:-5], id="half a body"),
        pytest.param(chunks(b"d\r\n" + BODY[:5]), id="half a chunk"),
        pytest.param(chunks(b"d\r\n" + BODY + b"\r\n0\r\n"), id="no end of the trailers"),
        pytest.param(chunks(b"fffffffffffffff\r\n" + BODY), id="a chunk without end"),
    ],
)
def test_a_request_that_never_ends_is_given_up(hasty: Pair, part: bytes) -> None:
    before = hasty.requests()
    with Client(hasty.relay.port) as client:
        assert client.raw(part).status == 408
        assert client.is_closed()
    assert hasty.requests() == before


def test_a_head_that_drips_is_given_up_in_time(hasty: Pair) -> None:
    with Client(hasty.relay.port) as client:
        client.sock.settimeout(0.05)
        deadline = time.monotonic() + PATIENCE_S
        received = b""
        client.sock.sendall(b"GET / HTTP/1.1\r\n")
        while not received:
            assert time.monotonic() < deadline
            client.sock.sendall(b"X")
            try:
                received = client.sock.recv(65536)
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "part", [GOOD[:60], GOOD[:-5], chunks(b"d\r\n" + BODY[:5]), chunks(b"d\r\n" + BODY + b"\r\n0\r\n")]
)
def test_a_client_that_leaves_in_the_middle_of_its_request_reaches_no_replica(pair: Pair, part: bytes) -> None:
    before = pair.requests()
    with Client(pair.relay.port) as client:
        client.sock.sendall(part)
        client.sock.shutdown(1)
        assert client.is_closed()
    assert pair.requests() == before


def test_a_client_that_reads_nothing_stops_nobody_else(pair: Pair) -> None:
    body = b'{"model":"m","stream":true,"fake":{"tokens":200000}}'
    with Client(pair.relay.port) as deaf, Client(pair.relay.port) as other:
        deaf.sock.sendall(length(b"%d" % len(body), body))
        for _ in range(20):
            assert other.raw(GOOD).status == 200


def test_a_body_of_tiny_chunks_takes_no_more_memory_than_its_bytes(pair: Pair) -> None:
    def peak_kib() -> int:
        status = Path(f"/proc/{pair.relay.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    with Client(pair.relay.port, timeout=PATIENCE_S) as client:
        before = peak_kib()
        client.sock.sendall(chunks(b"")[:-2] + b"\r\n")
        client.sock.sendall(b'd\r\n{"model":"m",\r\n5\r\n"x":"\r\n' + b"2\r\nab\r\n" * 400_000)
        client.sock.sendall(b'2\r\n"}\r\n0\r\n\r\n')
        assert client.read().status == 200
    assert peak_kib() - before < 16 << 10

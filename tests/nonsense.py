"""Requests that are nearly right: valid ones with a few bytes changed, for tests and for ``benchmarks/fuzz.py``."""

from __future__ import annotations

import contextlib
import random

from patience import PATIENCE_S
from relay_harness import Client

BODY = b'{"model":"m","messages":[{"role":"user","content":"h\xc3\xa9 \\u00e9"}],"stream":false}'
STREAM = BODY.replace(b"false", b"true")
EXPECTED = {100, 200, 308, 400, 401, 403, 404, 405, 408, 413, 414, 415, 429, 431, 501, 502, 503, 504}  # statuses


def post(body: bytes, path: bytes = b"/v1/chat/completions", fields: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: t\r\n%bContent-Length: %d\r\n\r\n%b" % (path, fields, len(body), body)


VALID = [
    post(BODY),
    post(STREAM),
    post(STREAM.replace(b"}]", b'}],"stream_options":{"include_usage":true}')),
    post(
        BODY,
        b"/m/v1/completions?x=y",
        b"X-Session-ID: s\r\nX-Task-ID: t\r\nX-Timing-Pre-Ms: 1.5\r\nX-Session-End: true\r\n",
    ),
    post(BODY, b"/v1/messages", b"Expect: 100-continue\r\nConnection: keep-alive, X-A\r\nX-A: b\r\n"),
    b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'8;a=b\r\n{"model"\r\n5\r\n:"m"}\r\n0\r\nX: y\r\n\r\n',
    b"POST /v1/completions HTTP/1.0\r\nContent-Length: 13\r\n\r\n" + b'{"model":"m"}',
    b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n",
    b"GET //queue/status?%ff=%00 HTTP/1.1\r\nHost: t\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\n\r\n",
    post(b"{}", b"/sessions/a%2Fb%ff/end"),
]
PIECES = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", b"%00", b"%0d%0a", b"\xff", b"\\ud83d", b'"',
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: 99999999999\r\n", b"f" * 16,
    b"Host: u\r\n", b"HTTP/1.0", b"-1", b"null", b"1e400", b'"stream":1,', b"x" * 9000, b"[" * 3000,
]  # fmt: skip


def mutate(request: bytes, chance: random.Random) -> bytes:
    """``request`` with a few bytes changed, doubled, cut out or put in."""
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3, 5])):
        start = chance.randrange(len(request) + 1)
        end = min(len(request), start + chance.choice([0, 1, 1, 2, 8, 40]))
        change = chance.choice(["put in", "put in", "cut out", "double", "noise", "flip"])
        middle = request[start:end]
        if change == "put in":
            middle += chance.choice(PIECES)
        elif change == "cut out":
            middle = b""
        elif change == "double":
            middle *= 2
        elif change == "noise":
            middle = chance.randbytes(len(middle))
        else:
            middle = bytes(byte ^ (1 << chance.randrange(8)) for byte in middle)
        request = request[:start] + middle + request[end:]
    return request


def assail(port: int, chance: random.Random, timeout: float = PATIENCE_S) -> set[int]:
    """Send a few such requests on one connection. Returns the statuses that came back. Raises TimeoutError if the
    connection stays open and silent for that long."""
    found = set[int]()
    data = b"".join(mutate(chance.choice(VALID), chance) for _ in range(chance.choice([1, 1, 1, 2, 4])))
    with Client(port, timeout) as client, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        cut = chance.randrange(len(data) + 1) if chance.random() < 0.3 else 0
        client.sock.sendall(data[:cut])
        client.sock.sendall(data[cut:])
        if chance.random() < 0.2:
            return found  # leave at once
        if chance.random() < 0.5:
            with contextlib.suppress(OSError):  # not connected: the relay has closed, and what came late reset it
                client.sock.shutdown(1)
        while answer := client.read():
            if not answer.status:
                break
            found.add(answer.status)
    return found

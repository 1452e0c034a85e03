"""HTTP bodies: finds their end, decodes and encodes chunks. Pure."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from agent_infra_core.http.errors import RequestError, WireError

MAX_CHUNK_LINE_BYTES = 4 << 10
MAX_TRAILER_LINES = 64
MAX_PIECE_BYTES = 1 << 20  # of a compressed body, decoded at once


class BodyDecoder:
    """Decodes one body, strictly: ``length`` bytes, chunks (None), or everything until the connection closes.

    ``is_over`` is true after the body's last byte; for chunks, after the empty line that ends the trailers.
    """

    UNTIL_CLOSE = -1
    __slots__ = ("_expects", "_left", "_line", "_trailers", "is_chunked", "is_over", "is_until_close")

    def __init__(self, length: int | None) -> None:
        self.is_chunked = length is None
        self.is_until_close = length == self.UNTIL_CLOSE
        self.is_over = length == 0
        self._left = length or 0
        self._expects = "size"  # for chunks: size | data | data end | trailer
        self._line = b""
        self._trailers = 0

    @property
    def is_between_chunks(self) -> bool:
        return self._expects == "size" and not self._line

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        """Append the body's bytes in ``data[start:]`` to ``pieces``. Returns the body's end in ``data``, or len(data).

        Raises WireError for ambiguous framing.
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
    """Encode ``payload`` as one HTTP chunk; empty if ``payload`` is, because an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK = b"0\r\n\r\n"
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})\r\n")


def decode_content(body: bytes | bytearray, coding: bytes, limit: int) -> Iterator[bytes]:
    """Yield the pieces of a body whose Content-Encoding is ``coding``, at most MAX_PIECE_BYTES each.

    Raises RequestError: 415 for a coding that isn't understood, 413 beyond ``limit`` bytes, 400 for broken data.
    """
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        name = coding.decode("latin-1")[:40]
        raise RequestError(415, f"Content-Encoding {name} is not supported; send the body uncompressed, or as gzip")
    decoder, size, rest = zlib.decompressobj(zlib.MAX_WBITS | 32), 0, bytes(body)
    while not decoder.eof:
        try:
            piece = decoder.decompress(rest, MAX_PIECE_BYTES)
        except zlib.error as error:
            raise RequestError(400, f"the body is not what its Content-Encoding says: {error}") from None
        rest, size = decoder.unconsumed_tail, size + len(piece)
        if size > limit:
            raise RequestError(413, f"the body, once decoded, is larger than {limit} bytes")
        if not piece and not rest and not decoder.eof:
            raise RequestError(400, "the body ends before its Content-Encoding does")
        yield piece

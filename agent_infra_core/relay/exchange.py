"""One request at one replica: moves the answer to the client, and ends a stream that breaks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.bodies import LAST_CHUNK, BodyDecoder, encode_chunk
from agent_infra_core.http.errors import WireError, error_event
from agent_infra_core.http.events import EventStream
from agent_infra_core.http.heads import MAX_HEAD_BYTES, AnswerHead, RepeatedHead, returned_head
from agent_infra_core.protocol import Histogram
from agent_infra_core.relay.replicas import RECEIVE_BYTES, LiveReplica
from agent_infra_core.relay.turn import TransportError, Turn
from agent_infra_core.relay.upstream import Upstream

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection
    from agent_infra_core.relay.server import Relay

BUFFERED_ANSWER_BYTES = 8 << 20  # an answer that is no stream and longer than this is passed on as it comes
RACE_S = 1.0  # in which a replica's close, that crossed with a request, is known: a round trip, and more
GAPS_AT_ONCE = 64  # of a stream, that wait to be counted


class Exchange:
    """One attempt: a request sent to one replica, its answer moved to the client by callbacks, which never block.

    ``result`` says how it ended: ``answered`` (whole, in ``body``, nothing sent to the client yet) · ``streamed`` (the
    client has it all) · ``cut`` (broke off, the client was told by an error event) · ``torn`` (broke off, only closing
    can tell the client) · ``lost`` (the replica went before the client got anything) · ``timeout`` (it was silent
    likewise) · ``failed`` (a bug of ours, likewise) · ``stopped`` (the proxy ends, likewise) · ``gone`` (the client
    left).
    """

    upstream: Any = None  # Upstream, once one is had
    is_sent = False  # the whole request; else it is the first ``_sent`` bytes
    _sent = 0
    result: str | None = None
    listener: Any = None  # what the replica's bytes wake
    backlog: Any = None  # what the client's socket did not take yet
    pending_head = b""  # goes out with the first bytes of the body
    _write_watcher: Any = None
    _came: Any = ()  # when a stream's parts came, since the last one that was counted
    error = ""
    received = False  # any byte of an answer
    _has_excess = False  # bytes behind the answer's end
    _head_bytes = body = b""
    head: Any = None  # AnswerHead, once it came; it serves for many, so the body's length stands beside it
    _length: int | None
    _decoder: Any = None
    events: Any = None  # EventStream, where the answer is one
    _receive: Any  # of a stream: the replica's socket's recv, and
    _pass_on: Any  # the client's send; looking them up costs as much as calling them
    is_raw = False
    _size = 0
    _pieces: list[bytes]
    _to_chunks = True  # as an HTTP/1.1 client takes it; what an older one gets ends with the connection
    ends_by_closing = False
    express: Callable[[Any, bytes], bool] | None = None  # takes a whole answer that comes at once, where it can

    def __init__(
        self,
        relay: Relay,
        client: ClientConnection,
        turn: Turn,
        replica: LiveReplica,
        message: tuple[bytes, bytes | bytearray],
    ) -> None:
        """``message`` is the request as it is sent: head and body."""
        self._relay, self.client, self._turn = relay, client, turn
        self.replica, self._message = replica, message
        self.timeout_s = relay.settings.proxy.request_timeout
        if client.version != 1:
            self._to_chunks, self.ends_by_closing = False, True

    def _begin(self, now: float) -> bool:
        """Send on an idle connection; False where there is none."""
        if not self.replica.idle:
            return False
        self._open(self.replica.idle.popitem()[0], now)
        return True

    def run(self) -> str:
        """Send and relay; TransportError when the replica could not be reached and got nothing of the request.

        For the client's own greenlet, also of an exchange that a callback has begun.
        """
        turn = self._turn
        # A request that was sent before goes out on a new connection, on which no replica's close can cross with it.
        if self.upstream is None and (turn.deaths or not self._begin(time.monotonic())):
            self._open(self._connect(), time.monotonic())
            return self._follow()
        result = self._follow()
        is_no_race = self.received or (self.is_sent and time.monotonic() > turn.sent + RACE_S)
        if result != "lost" or is_no_race:
            return result
        # The replica closed the idle connection under us, or died of this very request: a new connection tells.
        try:
            upstream = self._connect()
        except TransportError as error:
            self.error = str(error)
            return "lost"
        self._open(upstream, time.monotonic())
        return self._follow()

    def _connect(self) -> Upstream:
        sock = self.client.connect(self.replica.backend.host, self.replica.backend.port)
        return Upstream(self.replica, sock, RepeatedHead(self._relay.heads.known_answers), self._relay.reactor)

    def _open(self, upstream: Upstream, now: float) -> None:
        self.take_over(upstream, upstream.send(*self._message), now)

    def take_over(self, upstream: Upstream, sent: int, now: float) -> None:
        """Go on with a connection on which the first ``sent`` bytes of the request went."""
        head, body = self._message
        self._sent, self.is_sent = sent, sent == len(head) + len(body)
        self.upstream = upstream
        upstream.watcher.callback = self.listener = self.on_readable
        self.result = None
        self.client.deadline = now + self.timeout_s
        self.client.exchange = self

    def _follow(self) -> str:
        """Park until the exchange is over."""
        client, upstream = self.client, self.upstream
        if upstream is None:
            raise TransportError("nothing was sent")
        try:
            if not self.is_sent:
                self.is_sent = upstream.send_rest(self._message, self._sent, self)
            while self.result is None:
                if client.gone:
                    self.result = "gone"
                elif self.is_late():
                    self._time_out()
                else:
                    client.park()
        finally:
            self.close()
        return self.result or "gone"

    def close(self) -> None:
        """Give the connection back, or close it where it cannot serve again."""
        self.client.exchange = self.listener = self.express = None  # circles, that would keep the body
        if self._write_watcher is not None:
            self.stop_writing()
        if self._came:
            self._count_gaps()
        upstream = self.upstream
        if upstream is not None and self.result in ("answered", "streamed") and self._is_reusable():
            upstream.rest()
        elif upstream is not None:
            upstream.close()

    def _is_reusable(self) -> bool:
        has_excess = self.events.has_excess if self.events is not None else self._has_excess
        if not self.is_sent or self.head is None or not self.head.is_reusable or has_excess:
            return False
        return self._decoder is None or not self._decoder.is_until_close

    def _time_out(self) -> None:
        if self.backlog is not None:  # it is the client that does not take its answer
            self.client.gone = True
            self.result = "gone"
            return
        self.fail(f"the replica was silent for {self.timeout_s:g} s", result="timeout")

    # The replica's answer.

    def on_readable(self) -> None:
        """The replica's socket has bytes, or its end."""
        is_reset = False
        try:
            data = self.upstream.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, is_reset = b"", True
        try:
            if self.express is not None and not self.received and data and self.express(self, data):
                return
            if not data:
                self._on_closed(is_reset)
            elif self.head is not None:
                self._take_body(data, 0)
            else:
                self._take_head(data)
        except WireError as error:
            self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        self._relay.log_bug("an answer", error)
        try:
            self.fail("the proxy failed on this answer", result="failed")
        except Exception:  # noqa: BLE001 - the same bug once more: then the client is told by closing
            self.end("torn")

    def _take_head(self, data: bytes) -> None:
        self.received = True
        data = self._head_bytes + data if self._head_bytes else data
        while (end := data.find(b"\r\n\r\n") + 4) >= 4:
            head, length = self._relay.heads.answer(data, end)
            if head.status >= 200:
                return self._start(head, length, data, end)
            data = data[end:]  # an interim answer: the real one follows
        if len(data) > MAX_HEAD_BYTES:
            raise WireError("the replica's head is too long")
        self._head_bytes = data
        return None

    def _start(self, head: AnswerHead, length: int | None, data: bytes, end: int) -> None:
        self.head, self._length, self._decoder = head, length, BodyDecoder(length)
        self._pieces = []
        if head.is_event_stream and head.status < 400 and length != 0:
            self._start_stream(head)
            self.upstream.watcher.callback = self.listener = self.on_events
            if len(data) > end:
                self.on_events(data[end:])
            return None
        if head.fields.get(b"content-type", b"").startswith(b"audio/"):
            self._start_raw(head)
        return self._take_body(data, end)

    def _start_stream(self, head: AnswerHead) -> None:
        turn = self._turn
        turn.gaps = Histogram(GAPS_AT_ONCE)
        self._receive, self._pass_on = self.upstream.sock.recv, self.client.sock.send
        self.events = EventStream(
            self._decoder,
            to_chunks=self._to_chunks,
            cuts_usage=turn.cuts_usage,
            needs_done=turn.path in (b"/v1/chat/completions", b"/v1/completions"),
            wanted_text=turn.wanted_text,
            traces=turn.follows is not None,
        )
        self.pending_head = returned_head(
            head, self._relay.book.answer_fields(turn), None, self._to_chunks, not self._to_chunks
        )

    def _start_raw(self, head: AnswerHead) -> None:
        """Pass on as it comes what is neither a stream of events nor short enough to be kept for a retry."""
        self.is_raw = True
        length = self._length if self._length != BodyDecoder.UNTIL_CLOSE else None
        self._to_chunks = self._to_chunks and length is None
        self.ends_by_closing = not self._to_chunks and length is None
        fields = self._relay.book.answer_fields(self._turn)
        self.pending_head = returned_head(head, fields, length, self._to_chunks, self.ends_by_closing)

    def on_events(self, data: bytes | None = None) -> None:
        """``on_readable`` once events flow, or ``data`` that came with the head: the hottest lines of the relay."""
        try:
            if data is None:
                try:
                    data = self._receive(RECEIVE_BYTES)
                except BlockingIOError:
                    return None
                except OSError:
                    return self._on_closed(is_reset=True)
                if not data:
                    return self._on_closed()
            events, came, pacing = self.events, self._came, self._relay.pacing
            out = events.feed(data)
            now = pacing.parts_came or pacing.note_parts()
            if came:
                came.append(now)
                if len(came) > GAPS_AT_ONCE:
                    self._count_gaps()
            else:
                self._note_start(now)
            if events.fault is not None:
                return self.fail(events.fault, out)
            if self.pending_head or events.is_over:
                # The end may come with nothing left to send: to HTTP/1.0, which gets no last chunk.
                return self.send(out, "streamed" if events.is_over else None) if out or events.is_over else None
            try:
                sent = self._pass_on(out)
            except OSError:
                sent = 0  # said again, and understood, below
            return self.send(out[sent:], None) if sent < len(out) else None
        except WireError as error:
            return self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - as in on_readable
            return self._break_off(error)

    def _note_start(self, now: float) -> None:
        self.client.deadline = now + self.timeout_s
        if self.events.events:
            self._turn.first = now
            self._came = [now]

    def _count_gaps(self) -> None:
        """Count the gaps between the parts that came; the next one begins with the last of them."""
        gaps = [(later - earlier) * 1000.0 for earlier, later in itertools.pairwise(self._came)]
        self._turn.gaps.add(*gaps)
        self._turn.ended = self._came[-1]
        del self._came[:-1]

    def _take_body(self, data: bytes, start: int) -> None:
        if not self._turn.first:
            self._turn.first = time.monotonic()
        self._has_excess = self._decoder.feed(data, start, self._pieces) < len(data)
        self._size += len(data) - start
        if not self.is_raw:
            if self._decoder.is_over:
                self._finish_body()
            elif self._size > BUFFERED_ANSWER_BYTES:
                self._start_raw(self.head)
        if self.is_raw:
            self._send_raw()

    def _send_raw(self) -> None:
        payload = b"".join(self._pieces)
        self._pieces.clear()
        out = encode_chunk(payload) if self._to_chunks else payload
        if self._decoder.is_over and self._to_chunks:
            out += LAST_CHUNK
        self.client.deadline = time.monotonic() + self.timeout_s
        if out or self._decoder.is_over:
            self.send(out, "streamed" if self._decoder.is_over else None)

    def _finish_body(self) -> None:
        self.body = b"".join(self._pieces)
        self.end("answered")

    def _on_closed(self, is_reset: bool = False) -> None:
        """The replica's end: of an answer that lasts until then, unless the connection was reset."""
        if self._decoder is not None and self._decoder.is_until_close and not is_reset:
            if self.events is not None:
                out = self.events.close()
                if self.events.fault is not None:
                    return self.fail(self.events.fault, out)
                return self.send(out, "streamed")
            self._decoder.is_over = True
            return self._send_raw() if self.is_raw else self._finish_body()
        return self.fail("the replica died")

    def fail(self, error: str, out: bytes = b"", result: str = "lost") -> None:
        """The answer broke off; ``out`` is what had come of it. Once the client has a part, it is told."""
        self.error = error
        if self.backlog is not None:  # a part of something whole is sent
            self.end("torn")
        elif self.pending_head or not (self.events is not None or self.is_raw):
            self.end(result)
        elif self.events is None:
            self.end("torn")
        else:
            self.send(out + self.events.failure(error_event(error, self._turn.is_anthropic)), "cut")

    # The client's end: it is sent to without blocking, and the replica is paused while it is slow.

    @property
    def last_part(self) -> float:
        """When the last part of a stream came; 0: none has."""
        return self._came[-1] if self._came else 0.0

    def is_late(self) -> bool:
        """Whether nothing has moved for too long. Parts of a stream put the deadline off only when it is asked for."""
        if self._came:
            self.client.deadline = max(self.client.deadline, self.last_part + self.timeout_s)
        return time.monotonic() >= self.client.deadline

    def send(self, out: bytes, result: str | None) -> None:
        """Send to the client; ``result`` ends the exchange once all of it is sent. A slow client pauses the replica."""
        if self.pending_head:
            out, self.pending_head = self.pending_head + out, b""
        try:
            sent = self.client.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.client.gone = True
            return self.end("gone")
        if sent == len(out):
            return self.end(result) if result else None
        self.backlog = memoryview(out)[sent:]
        self.upstream.watcher.stop()
        self._write_watcher = self.client.relay.reactor.loop.io(self.client.sock.fileno(), 2)
        self._write_watcher.start(self._on_writable, result)
        return None

    def _on_writable(self, result: str | None) -> None:
        try:
            self._send_backlog(result)
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self.client.relay.log_bug("an answer", error)
            self.end("torn")

    def _send_backlog(self, result: str | None) -> None:
        try:
            sent = self.client.sock.send(self.backlog)
        except BlockingIOError:
            return None
        except OSError:
            self.client.gone = True
            return self.end("gone")
        self.client.deadline = time.monotonic() + self.timeout_s
        self.backlog = self.backlog[sent:]
        if self.backlog:
            return None
        self.stop_writing()
        self.upstream.watcher.start(self.listener)  # also behind the last bytes: an idle connection is watched, too
        return self.end(result) if result else None

    def stop_writing(self) -> None:
        self.backlog = None
        if self._write_watcher is not None:
            self._write_watcher.stop()
            self._write_watcher.close()
            self._write_watcher = None

    def end(self, result: str) -> None:
        self.result = result
        self.client.wake()

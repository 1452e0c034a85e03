"""A client's connection: reads its requests, waits for it, and sends it bytes."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.bodies import BodyDecoder
from agent_infra_core.http.errors import RequestError, WireError, encode_answer, error_document
from agent_infra_core.http.heads import MAX_HEAD_BYTES, RepeatedHead, RequestHead
from agent_infra_core.relay.delivery import Delivery, ExpressDelivery
from agent_infra_core.relay.exchange import Exchange
from agent_infra_core.relay.replicas import RECEIVE_BYTES
from agent_infra_core.relay.turn import ClientGone, RequestPlan, TransportError

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay

GATHERED_BODY_BYTES = 1 << 20  # up to here callbacks gather a body that comes in pieces
APP_BODY_BYTES = 64 << 10
IDLE_CLIENT_S = 300.0  # between two requests of one connection
HEAD_S = 15.0  # from a head's first byte to its last
BODY_S = 30.0  # without a byte of the body
LINGER_S = 2.0  # that a refused client gets to read why


class ArrivingBody:
    """A request of which the head is known and a part of the body came; callbacks gather the rest."""

    __slots__ = ("_body_at", "_first", "_missing", "_rest", "plan")

    def __init__(self, plan: RequestPlan, data: bytes, body_at: int, length: int) -> None:
        """``data`` is what came, the head included; its body of ``length`` bytes begins at ``body_at``."""
        self.plan = plan
        self._first, self._body_at, self._rest = data, body_at, bytearray()
        self._missing = body_at + length - len(data)

    def add(self, data: bytes) -> int:
        """How many bytes are missing now; less than none where the next request came, too."""
        self._rest += data
        self._missing -= len(data)
        return self._missing

    def body(self) -> bytes:
        """The whole body, once nothing is missing."""
        return b"".join((memoryview(self._first)[self._body_at :], self._rest))

    def received(self) -> bytes:
        """All that came, from the head on."""
        return self._first + self._rest


class ClientConnection:
    """One client: reads its requests, one after the other, and owns the greenlet that serves them.

    Every wait of that greenlet has a deadline (see Reactor); the bytes of bodies are held against the limits.

    A request that comes whole, while the greenlet waits for one, and whose head is known, is sent on by the callback
    that read it, and its answer passed back by another: no greenlet is woken for what need not wait.  Whatever else
    happens to such a turn wakes the greenlet, which takes it over where it stands.
    """

    def __init__(self, relay: Relay, sock: Any, peer: tuple[Any, ...]) -> None:
        self.relay, self.sock, self.peer = relay, sock, peer
        self.buffer = b""  # read, and not yet taken by a request
        self.gone = False
        self.deadline = math.inf  # the sweep wakes the greenlet then
        self._parked: Any = None
        self._is_reading = False
        self._is_watching = True
        self._watcher = relay.reactor.watch_reads(sock, self._on_readable)
        relay.pacing.has_turns = True
        self.authorization: bytes | None = None  # with which the last request that was read in full was let pass
        self._held_bytes = 0
        self._has_unread_body = False
        self.version = 1
        self.exchange: Exchange | None = None
        self.is_trusted: bool | None = None  # whether the socket's owner needs no key; asked once
        self.delivery: Delivery | None = None
        self.head = RepeatedHead(relay.heads.known_requests)
        self._awaits_request = False
        self._arriving: ArrivingBody | None = None
        self._is_anthropic = self._is_head = False
        self._keeps_alive = True

    def serve(self) -> None:
        """Serve requests until one of the sides has had enough; the connection's greenlet runs this."""
        try:
            while self._serve_one() and not self.relay.is_stopping:
                pass
        except (ClientGone, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, never the relay
            self.relay.log_bug("a connection", error)
        finally:
            self.relay.connections.discard(self)
            self.close()

    @property
    def is_idle(self) -> bool:
        return self._awaits_request and not self.buffer and self.delivery is None and self._arriving is None

    def cut(self, reason: str) -> None:
        """End what the connection is doing, telling the client why where it can still be told; event loop only."""
        if self.exchange is not None:
            self.exchange.fail(reason, result="stopped")
        elif self.delivery is not None:
            self.wake()  # in the queue it is told so
        else:
            self.leave()

    def leave(self) -> None:
        """End the connection; only for event-loop callbacks."""
        self.gone = True
        self.wake()

    def leave_idle(self) -> None:
        """End the connection unless a request has come; only for event-loop callbacks."""
        if self.is_idle:
            self.leave()

    def _serve_one(self) -> bool:
        """Serve one request; whether another one may follow."""
        self._is_anthropic = self._has_unread_body = self._is_head = False
        try:
            if not self.buffer and not self._await_request():
                return False
            if self.delivery is not None:  # a callback has begun it
                self._is_anthropic = self.delivery.turn.is_anthropic
                return self._deliver(self.delivery) and self._keeps_alive
            found = self._read_head()
            if found is None:
                return True
            plan, length, authorization = found
            self.version, self._keeps_alive = plan.request.version, plan.request.keeps_alive
            self._has_unread_body, self._is_head = length != 0, plan.request.method == b"HEAD"
            return self._answer(plan, length, authorization) and plan.request.keeps_alive
        except RequestError as refusal:
            return self._refuse(refusal)
        finally:
            self.delivery = None
            self._release()

    def _await_request(self) -> bool:
        """Park until there are bytes of a request, or a turn to take over; False when the client has had enough."""
        self._resume_watching()
        self.deadline = time.monotonic() + IDLE_CLIENT_S
        self._awaits_request = True
        try:
            while not self.buffer and self.delivery is None:
                is_late = time.monotonic() >= self.deadline
                if is_late and self._arriving is not None and not self.gone:
                    self._is_anthropic = b"/v1/messages" in self._arriving.plan.path
                    self._has_unread_body = True
                    raise WireError("the rest of the body did not come in time", 408)
                if is_late or self.gone:
                    return False
                self.park()
        finally:
            self._awaits_request, self._arriving = False, None
        return True

    def _take(self, data: bytes) -> None:
        if not self._awaits_request or self.delivery is not None or self.buffer:
            self._keep(data)
            return
        arriving = self._arriving
        try:
            if self._express(data) if arriving is None else self._gather(arriving, data):
                return
        except Exception as error:  # noqa: BLE001 - it is read again, in the common way
            self.relay.log_bug("a request", error)
        if self.delivery is None:
            self.buffer += data if arriving is None else arriving.received()
        self.wake()

    def _express(self, data: bytes) -> bool:
        """Begin the one request in ``data`` without waking the greenlet; False: nothing was done."""
        known = self.head.find(data)
        if known is None:
            return False
        plan, length, authorization, end = known
        missing = end + length - len(data)
        if missing < 0 or authorization != self.authorization or not self.relay.has_room(length):
            return False
        if not missing:
            return self._begin(plan, data[end:])
        if length > GATHERED_BODY_BYTES or b"expect" in plan.request.fields:
            return False
        self._arriving = ArrivingBody(plan, data, end, length)
        self._hold(length, length)
        self.deadline = time.monotonic() + BODY_S
        return True

    def _gather(self, arriving: ArrivingBody, data: bytes) -> bool:
        """Take more of a body, and begin its turn when it is whole; False: the greenlet is to read it again."""
        missing = arriving.add(data)
        if missing > 0:
            self.deadline = time.monotonic() + BODY_S
            return True
        self._arriving = None
        self._release()
        return not missing and self._begin(arriving.plan, arriving.body())

    def _begin(self, plan: RequestPlan, body: bytes) -> bool:
        try:
            delivery = ExpressDelivery.send(self.relay, self, plan, body)
        except RequestError:
            return False  # nothing has begun; the greenlet finds the same, and says it
        self.version, self._keeps_alive = 1, plan.request.keeps_alive
        self._held_bytes = len(body)
        self.relay.buffered_bytes += len(body)
        if delivery.exchange is None or not delivery.exchange.is_sent:
            self.wake()
        return True

    def end_express(self, now: float) -> None:
        """The turn that a callback had begun is over, its answer sent."""
        self.delivery = self.exchange = None
        self._release()
        self.deadline = now + IDLE_CLIENT_S
        if not self._keeps_alive:
            self.buffer = b""  # what comes behind the last request is none
            self.leave()
        elif self.buffer:
            self.wake()

    def _answer(self, plan: RequestPlan, length: int | None, authorization: bytes) -> bool:
        request = plan.request
        self._is_anthropic = b"/v1/messages" in plan.path
        if plan.path != b"/health":
            self.relay.door.authorize(self, request, authorization)
            # What let it pass by another field is none to let the next one pass.
            self.authorization = authorization if b"x-api-key" not in request.fields else None
        if b"websocket" in request.fields.get(b"upgrade", b"").lower():
            raise RequestError(501, "WebSocket is not supported; the same models answer over HTTP", closes=True)
        if not plan.is_inference:
            body = self._read_body(request, length, APP_BODY_BYTES)
            self.send_all(self.relay.app.answer(request, plan.path, plan.query, bytes(body)))
            return True
        body = self._read_body(request, length, self.relay.settings.max_body_bytes)
        now = time.monotonic()
        fields, model = self.relay.book.read(plan, body, self.peer)
        turn = self.relay.book.open(plan, fields, model, len(body), now)
        self.delivery = Delivery(self.relay, self, turn, plan, body)
        return self._deliver(self.delivery)

    def _deliver(self, delivery: Delivery) -> bool:
        turn = delivery.turn
        delivery.read_words()
        try:
            return delivery.run()
        except RequestError as refusal:
            turn.status, turn.error = refusal.status, str(refusal)
            turn.outcome = "rejected" if refusal.status in (429, 503) else "error"
            raise
        finally:
            self.relay.book.finish(turn, time.monotonic())

    def _refuse(self, refusal: RequestError) -> bool:
        if self.delivery is None:
            self.relay.book.counters["rejected"] += 1
        extra = self.relay.book.answer_fields(self.delivery.turn) if self.delivery is not None else b""
        if refusal.retry_after_s:
            extra += b"retry-after: %d\r\n" % refusal.retry_after_s
        if refusal.status == 401:
            extra += b"www-authenticate: Bearer\r\n"
        closes = refusal.closes or self._has_unread_body or not self._keeps_alive
        body = error_document(refusal.status, str(refusal), refusal.code, self._is_anthropic)
        answer = encode_answer(refusal.status, body, extra=extra, closes=closes)
        self.send_all(answer[: -len(body)] if self._is_head else answer)
        if closes:
            self.linger()
        return not closes

    # Its socket, and the parking of its one greenlet.

    def park(self) -> None:
        """Wait for a wake; only for the connection's own greenlet."""
        self._parked = self.relay.reactor.current()
        try:
            self.relay.reactor.hub.switch()
        finally:
            self._parked = None

    def wake(self) -> None:
        """Resume the greenlet if it is parked; only for event-loop callbacks."""
        parked = self._parked
        if parked is not None:
            self._parked = None
            parked.switch()

    def wait_writable(self, sock: Any) -> None:
        """Park until ``sock`` takes bytes, or for any other reason to look again."""
        watcher = self.relay.reactor.loop.io(sock.fileno(), 2)
        watcher.start(self.wake)
        try:
            self.park()
        finally:
            watcher.stop()
            watcher.close()

    def connect(self, host: str, port: int) -> Any:
        """A connected socket; TransportError. Not gevent's own way, which asks a resolver about every address."""
        try:
            sock = self.relay.reactor.new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as trouble:
            message = f"no connection to a replica: {descriptor_trouble(trouble)}"
            raise RequestError(503, message, retry_after_s=1) from None
        try:
            sock.setblocking(False)
            error = sock.connect_ex((host, port))
            self.deadline = time.monotonic() + self.relay.settings.proxy.connect_timeout
            while error in (errno.EINPROGRESS, errno.EALREADY):
                self.wait_writable(sock)
                if self.gone:
                    raise ClientGone
                error = sock.connect_ex((host, port))
                if error == errno.EALREADY and time.monotonic() >= self.deadline:
                    error = errno.ETIMEDOUT
            if error not in (0, errno.EISCONN):
                raise TransportError(os.strerror(error))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def _on_readable(self) -> None:
        self.relay.pacing.has_turns = True
        if self._is_reading:
            return self.wake()
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if data:
            return self._take(data)
        self._watcher.stop()
        self.gone = True
        return self.wake()

    def _keep(self, data: bytes) -> None:
        """Bytes that nobody waits for: the next request, ahead of its time, or an empty line behind this one."""
        self.buffer += data
        if len(self.buffer) > MAX_HEAD_BYTES:  # the rest stays in the socket; else the client's end is to be noticed
            self._watcher.stop()
            self._is_watching = False

    def _resume_watching(self) -> None:
        if not self._is_watching:
            self._watcher.start(self._on_readable)
            self._is_watching = True

    def _receive(self, seconds: float, what: str, into: memoryview | None = None) -> Any:
        """Bytes from the client (their number, with ``into``): none at its end; WireError 408 when they are late."""
        self._resume_watching()
        self.deadline = time.monotonic() + seconds
        self._is_reading = True
        try:
            while not self.gone:
                try:
                    return self.sock.recv(RECEIVE_BYTES) if into is None else self.sock.recv_into(into)
                except BlockingIOError:
                    pass
                self.park()
                if time.monotonic() >= self.deadline:
                    raise WireError(f"{what} did not come in time", 408)
            raise ClientGone
        finally:
            self._is_reading = False
            self.deadline = math.inf

    def send_all(self, data: bytes) -> None:
        """Send to the client; ClientGone when it leaves, or takes nothing for the request timeout."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone from None
        rest = memoryview(data)[sent:]
        timeout_s = self.relay.settings.proxy.request_timeout
        self.deadline = time.monotonic() + timeout_s
        while rest:
            self.wait_writable(self.sock)
            if self.gone or time.monotonic() >= self.deadline:
                raise ClientGone
            try:
                rest = rest[self.sock.send(rest) :]
                self.deadline = time.monotonic() + timeout_s
            except BlockingIOError:
                continue
            except OSError:
                raise ClientGone from None

    def linger(self) -> None:
        """Take what the client still sends, for a while: closing on unread bytes would reset the connection, and the
        answer with it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(WireError, ClientGone):
            while (left := end - time.monotonic()) > 0 and self._receive(left, "the end"):
                pass

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self.sock.close()

    # Requests, out of what the client sends.

    def _read_head(self) -> tuple[RequestPlan, int | None, bytes] | None:
        """The next request's plan, its body's length (None: chunks) and its Authorization, its head taken off the
        buffer; None when there was nothing but empty lines, which are to be ignored (RFC 9112, 2.2)."""
        started = time.monotonic()
        while True:
            empty = 0
            while self.buffer.startswith(b"\r\n", empty):
                empty += 2
            self.buffer = self.buffer[empty:]
            if not self.buffer:
                return None
            end = self.buffer.find(b"\r\n\r\n") + 4
            if 4 <= end <= MAX_HEAD_BYTES:
                head, self.buffer = self.buffer[:end], self.buffer[end:]
                return self.relay.heads.plan(head, self.authorization, self.relay.settings.labels.read)
            if len(self.buffer) > MAX_HEAD_BYTES:
                raise WireError("the head is too long", 431)
            if self.buffer.count(b"\n") != self.buffer.count(b"\r\n"):
                raise WireError("a line ends in a bare line feed")
            data = self._receive(started + HEAD_S - time.monotonic(), "the rest of the head")
            if not data:
                raise ClientGone
            self.buffer += data

    def _read_body(self, request: RequestHead, length: int | None, limit: int) -> bytes | bytearray:
        """The request's body, out of its framing, taken off the buffer; RequestError 413 or 429 beyond the limits."""
        if length == 0:
            return b""
        if length is not None:
            self._hold(length, limit)
        if request.version and request.fields.get(b"expect", b"").lower() == b"100-continue" and not self.buffer:
            self.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: bytes | bytearray
        if length is None:
            body = self._read_chunks(limit)
        elif len(self.buffer) >= length:
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        else:
            body = bytearray(length)
            got = len(self.buffer)
            body[:got], self.buffer = self.buffer, b""
            view = memoryview(body)
            while got < length:
                count = self._receive(BODY_S, "the rest of the body", view[got:])
                if not count:
                    raise ClientGone
                got += count
        self._has_unread_body = False
        return body

    def _read_chunks(self, limit: int) -> bytearray:
        decoder, body = BodyDecoder(None), bytearray()
        while True:
            pieces: list[bytes] = []  # joined at once: a piece of one byte takes forty
            end = decoder.feed(self.buffer, 0, pieces)
            self.buffer = self.buffer[end:]
            received = b"".join(pieces)
            self._hold(len(received), limit)
            body += received
            if decoder.is_over:
                return body
            self.buffer = self._receive(BODY_S, "the rest of the body")
            if not self.buffer:
                raise ClientGone

    def _hold(self, size: int, limit: int) -> None:
        """Count ``size`` more bytes of this body against both limits."""
        if self._held_bytes + size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", closes=True)
        if self.relay.buffered_bytes + size > self.relay.settings.max_buffered_bytes:
            raise RequestError(429, "too many bytes of requests are held already", retry_after_s=1, closes=True)
        self._held_bytes += size
        self.relay.buffered_bytes += size

    def _release(self) -> None:
        self.relay.buffered_bytes -= self._held_bytes
        self._held_bytes = 0


def descriptor_trouble(error: OSError) -> str:
    """What a socket that could not be made is due to, and what helps."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{error.strerror}; the proxy may open {limit} files (ulimit -n): raise that where it is started"

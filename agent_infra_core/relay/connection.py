"""A client's connection: its greenlet, its bytes in and out, requests read from them, refusals."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.bodies import BodyDecoder, decode_content
from agent_infra_core.http.errors import RequestError, WireError, encode_answer, error_document
from agent_infra_core.http.heads import MAX_HEAD_BYTES
from agent_infra_core.relay.owners import socket_owner
from agent_infra_core.relay.reactor import WRITABLE, ClientGone
from agent_infra_core.relay.replicas import RECEIVE_BYTES
from agent_infra_core.relay.requests import RequestPlan
from agent_infra_core.relay.turn import serve_turn
from agent_infra_core.relay.upstream import TransportError, new_stream_socket

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay

IDLE_CLIENT_S = 300.0  # between two requests of one connection
STRANGER_S = 15.0  # for the first request of a connection
HEAD_S = 15.0  # from a head's first byte to its last
BODY_S = 30.0  # without a byte of the body
CHUNKED_BYTES_AT_ONCE = 8 << 10  # between two looks at other clients: chunks of one byte take 2 ms
CLIENT_SHARE = 0.75  # of the bytes of all bodies, and of the connections where they are short, for one client
LINGER_S = 2.0  # for a refused client to read why


class ClientConnection:
    """One client. Its one greenlet serves one request after the other and parks where it has to wait.

    A wait ends by a wake-up: bytes, room for bytes, a free slot, the client's end, or the relay's sweep once the
    deadline has passed. The client's socket stays watched, so that a client that leaves ends any wait.
    """

    def __init__(self, relay: Relay, sock: Any, peer: tuple[Any, ...]) -> None:
        self.relay, self.sock, self.peer = relay, sock, peer
        self.unread = b""  # received, not yet part of a request
        self.gone = False
        self.is_idle = False  # waits for the first byte of a request
        self.deadline = math.inf  # monotonic; the sweep wakes the greenlet then
        self.is_known = False  # sent a request that was let pass
        self.is_trusted: bool | None = None  # whether the socket's owner needs no key; asked once, like the next
        self.owner = str(peer[0])  # of the other end: this user, another one on this machine, or a host
        self.is_among_last = False  # accepted when descriptors were short: these are for those who have few connections
        self.sharer: str | None = None  # the ``identity`` of its last request that was let pass
        self.authorization: bytes | None = None  # of the last request that was let pass
        self.plan: RequestPlan | None = None  # of the request in progress
        self.has_unread_body = False
        self._greenlet: Any = None
        self._is_parked = self._is_receiving = False
        self.body: bytes | bytearray = b""  # of the request in progress, for as long as it may be sent again
        self.has_sent_body = False  # to a replica: it is kept for a retry only
        self.has_spent_body = False  # its room was needed: it can't be sent again
        self.held_bytes = 0  # of the body, counted against the limits
        self._watcher = relay.reactor.watch_reads(sock, self._on_readable)

    def serve(self) -> None:
        """Serve requests until one side has had enough; the connection's greenlet runs this."""
        self._greenlet = self.relay.reactor.current()
        try:
            while serve_turn(self) and not self.relay.is_stopping:
                if self.unread:  # the next request is here: nobody waits for this client's last one
                    self.relay.reactor.sleep(0.0)
        except (ClientGone, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, never the relay
            self.relay.log_bug("a connection", error)
        finally:
            self.relay.connections.discard(self)
            self._watcher.stop()
            self._watcher.close()
            self.sock.close()

    def find_owner(self) -> None:
        """Ask the kernel, once, who owns the other end. Raises OSError without a free descriptor."""
        if self.is_trusted is None:
            uid = socket_owner(self.sock, self.peer)
            self.is_trusted = uid in (0, os.getuid())
            self.owner = "this user" if self.is_trusted else self.owner if uid is None else f"uid {uid}"

    @property
    def is_stranger(self) -> bool:
        """Whether no request of it was let pass, and it still owes one or a part of its head."""
        return not self.is_known and self._is_receiving

    @property
    def has_unread_bytes(self) -> bool:
        """Whether bytes came that its greenlet hasn't seen yet, or the client's end."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def leave_idle(self, and_strangers: bool = False) -> None:
        """End the connection unless a request has come (of a stranger: a whole head); only for event-loop callbacks."""
        if self.is_idle or (and_strangers and self.is_stranger):
            self.gone = True
            self.wake()

    # Waiting.

    def park(self) -> None:
        """Wait for a wake-up; only for the connection's own greenlet. Raises ClientGone."""
        if not self.gone:  # it may have left while the greenlet slept or asked a replica: that woke nobody
            self._is_parked = True
            try:
                self.relay.reactor.park()
            finally:
                self._is_parked = False
        if self.gone:
            raise ClientGone

    def wake(self) -> None:
        """Resume the greenlet if it is parked; only for event-loop callbacks."""
        if self._is_parked:
            self._is_parked = False
            self._greenlet.switch()

    def extend_deadline(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def must_stop(self) -> bool:
        """Whether the greenlet must give up what it waits for."""
        return self.is_late or self.relay.is_over

    def wait_writable(self, sock: Any) -> None:
        """Park until ``sock`` takes bytes, or for any other reason to look again. Raises ClientGone."""
        watcher = self.relay.reactor.loop.io(sock.fileno(), WRITABLE)
        watcher.start(self.wake)
        try:
            self.park()
        finally:
            watcher.stop()
            watcher.close()

    def connect(self, host: str, port: int) -> Any:
        """Return a connected socket. Raises TransportError, RequestError, ClientGone. gevent's own way would ask a
        resolver about every address."""
        try:
            sock = new_stream_socket(self.relay.reactor.new_socket, host)
        except OSError as trouble:
            message = f"no connection to a replica: {descriptor_trouble(trouble)}"
            raise RequestError(503, message, retry_after_s=1) from None
        try:
            error = sock.connect_ex((host, port))
            self.extend_deadline(self.relay.settings.proxy.connect_timeout)
            while error in (errno.EINPROGRESS, errno.EALREADY):
                self.wait_writable(sock)
                error = sock.connect_ex((host, port))
                if error == errno.EALREADY and self.is_late:
                    error = errno.ETIMEDOUT
            if error not in (0, errno.EISCONN):
                raise TransportError(os.strerror(error))
        except BaseException:
            sock.close()
            raise
        return sock

    # Bytes in and out.

    def _on_readable(self) -> None:
        if self._is_receiving:
            return self.wake()
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self.unread += data  # the next request, sent ahead
        if data and len(self.unread) <= MAX_HEAD_BYTES:
            return None
        self._watcher.stop()  # the rest stays in the socket
        self.gone = not data
        return self.wake() if self.gone else None

    def receive(self, seconds: float, late: str, into: memoryview | None = None) -> Any:
        """Return bytes from the client (their number, with ``into``); none at its end. Raises ClientGone, or WireError
        408 with the message ``late`` (if empty: ClientGone) after ``seconds``."""
        if not self._watcher.active:  # it was stopped because the client sent ahead
            self._watcher.start(self._on_readable)
        self.extend_deadline(seconds)
        self._is_receiving = True
        try:
            while True:
                self.park()  # first, because usually nothing has come yet
                try:
                    return self.sock.recv(RECEIVE_BYTES) if into is None else self.sock.recv_into(into)
                except BlockingIOError:
                    pass
                if self.relay.is_over or (self.is_late and not late):
                    raise ClientGone
                if self.is_late:
                    raise WireError(late, 408)
        finally:
            self._is_receiving = False
            self.deadline = math.inf

    def send_all(self, data: bytes | memoryview) -> None:
        """Send to the client. Raises ClientGone if it leaves, or takes nothing for the request timeout."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone from None
        if sent == len(data):
            return
        rest, timeout_s = memoryview(data)[sent:], self.relay.settings.proxy.request_timeout
        self.extend_deadline(timeout_s)
        while rest:
            self.wait_writable(self.sock)
            if self.must_stop:
                raise ClientGone
            try:
                rest = rest[self.sock.send(rest) :]
                self.extend_deadline(timeout_s)
            except BlockingIOError:
                continue
            except OSError:
                raise ClientGone from None

    def linger(self) -> None:
        """Receive what the client still sends, for a while: closing on unread bytes would reset the connection and
        lose the answer."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(ClientGone):
            while (left := end - time.monotonic()) > 0 and self.receive(left, ""):
                pass

    # Requests.

    def read_head(self) -> tuple[RequestPlan, int | None, bytes]:
        """Take the next request's head off the unread bytes. Returns what HeadReader.plan does."""
        self.plan, self.has_unread_body, started = None, False, 0.0
        self.has_sent_body = self.has_spent_body = False
        while True:
            if not self.unread:
                self.unread = self._receive_first()
            if self.unread.startswith(b"\r\n"):  # an empty line, which must be ignored (RFC 9112, 2.2)
                self.unread = self.unread[2:]
                continue
            end = self.unread.find(b"\r\n\r\n") + 4
            if 4 <= end <= MAX_HEAD_BYTES:
                found = self.relay.heads.plan(self.unread, end, self.authorization, self.relay.settings.labels)
                self.unread = self.unread[end:]
                self.plan, self.has_unread_body = found[0], found[1] != 0
                return found
            started = started or time.monotonic()
            if len(self.unread) > MAX_HEAD_BYTES:
                raise WireError("the head is too long", 431)
            if self.unread.count(b"\n") != self.unread.count(b"\r\n"):
                raise WireError("a line ends in a bare line feed")
            data = self.receive(started + HEAD_S - time.monotonic(), "the rest of the head did not come in time")
            if not data:
                raise ClientGone
            self.unread += data

    def _receive_first(self) -> bytes:
        self.is_idle = True
        try:
            data: bytes = self.receive(IDLE_CLIENT_S if self.is_known else STRANGER_S, "")
        finally:
            self.is_idle = False
        if not data:
            raise ClientGone
        return data

    def read_body(self, plan: RequestPlan, length: int | None, limit: int) -> None:
        """Take the request's ``body`` off the unread bytes and out of its framing. Raises RequestError 413 or 429
        beyond the limits, WireError, ClientGone."""
        if length == 0:
            return
        if length is not None:
            self._hold(length, limit)
        request = plan.request
        expect = request.fields.get(b"expect")
        if expect and request.version and expect.lower() == b"100-continue" and not self.unread:
            self.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.body = self._read_chunks(limit) if length is None else self._read_sized(length)
        self.has_unread_body = False
        coding = request.fields.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"identity", b""):
            self._decode_body(coding, limit)

    def _decode_body(self, coding: bytes, limit: int) -> None:
        decoded = bytearray()
        for piece in decode_content(self.body, coding, limit):
            self._hold(len(piece), limit)
            decoded += piece
            self.relay.reactor.sleep(0.0)
        self.body = decoded

    def _read_sized(self, length: int) -> bytes | bytearray:
        got = len(self.unread)
        if got >= length:
            body, self.unread = self.unread[:length], self.unread[length:]
            return body
        whole = bytearray(length)
        whole[:got], self.unread = self.unread, b""
        view = memoryview(whole)
        while got < length:
            got += self._receive_body(view[got:])
        return whole

    def _read_chunks(self, limit: int) -> bytearray:
        decoder, body = BodyDecoder(None), bytearray()
        while True:
            pieces: list[bytes] = []  # joined at once: a one-byte piece takes forty bytes
            end = decoder.feed(self.unread[:CHUNKED_BYTES_AT_ONCE], 0, pieces)
            self.unread = self.unread[end:]
            received = b"".join(pieces)
            self._hold(len(received), limit)
            body += received
            if decoder.is_over:
                return body
            if self.unread:
                self.relay.reactor.sleep(0.0)
            else:
                self.unread = self._receive_body()

    def _receive_body(self, into: memoryview | None = None) -> Any:
        received = self.receive(BODY_S, "the rest of the body did not come in time", into)
        if not received:
            raise ClientGone
        return received

    def _hold(self, size: int, limit: int) -> None:
        """Count ``size`` more bytes of this body against both limits."""
        if self.held_bytes + size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", closes=True)
        bodies, client = self.relay.bodies, self.identity
        has_room = bodies.has_room(client, size, self.held_bytes)
        if not has_room and not bodies.make_room(client, size, self.held_bytes, self.relay.connections):
            raise RequestError(429, "too many bytes of requests are held already", retry_after_s=1, closes=True)
        self.held_bytes += size
        bodies.add(client, size)

    def release_body(self) -> None:
        """Forget the body; safe to call again."""
        if self.held_bytes:
            self.relay.bodies.add(self.identity, -self.held_bytes)
        self.body, self.held_bytes = b"", 0

    def spend_body(self) -> None:
        """Forget the body of a turn that has been sent, so that another one finds room."""
        self.has_spent_body = True
        self.release_body()

    @property
    def identity(self) -> str:
        """Whom the shares of limits and slots are for: the client that a request names, else the connection's owner."""
        named = self.plan.labels.client if self.plan is not None else None
        return named.partition(" ")[0] if named else self.owner

    def refuse(self, refusal: RequestError, extra: bytes) -> bool:
        """Answer with an error; ``extra`` is complete header lines. Returns whether another request may follow."""
        plan = self.plan
        if refusal.retry_after_s:
            extra += b"retry-after: %d\r\n" % refusal.retry_after_s
        if refusal.status == 401:
            extra += b"www-authenticate: Bearer\r\n"
        closes = refusal.closes or self.has_unread_body or (plan is not None and not plan.request.keeps_alive)
        is_anthropic = plan is not None and plan.is_anthropic
        body = error_document(refusal.status, str(refusal), refusal.code, is_anthropic)
        if plan is not None and not closes:
            extra += plan.request.keep_alive_line
        answer = encode_answer(refusal.status, body, extra=extra, closes=closes)
        self.send_all(answer[: -len(body)] if plan is not None and plan.request.method == b"HEAD" else answer)
        if closes:
            self.linger()
        return not closes


class HeldBodies:
    """The bodies that may still be sent: their bytes, in all and by client. Limited, and so is each client's share."""

    def __init__(self) -> None:
        self.limit = 0  # bytes
        self.held = 0  # bytes
        self._by_client: Counter[str] = Counter()

    def has_room(self, client: str, size: int, begun: int = 0) -> bool:
        """Whether ``client`` may hold ``size`` more bytes of a body of which it holds ``begun``. One body alone may be
        larger than its client's share."""
        return self._would_fit(self.held + size, self._by_client[client] + size, begun + size)

    def _would_fit(self, held: int, mine: int, body: int) -> bool:
        return held <= self.limit and (mine <= body or mine <= CLIENT_SHARE * self.limit)

    def add(self, client: str, size: int) -> None:
        """Count bytes of a body, or that they are no longer held (a negative ``size``)."""
        self.held += size
        self._by_client[client] += size
        if not self._by_client[client]:
            del self._by_client[client]

    def make_room(self, client: str, size: int, begun: int, connections: Iterable[ClientConnection]) -> bool:
        """Forget bodies that were sent and are kept for a retry only, the client's own first: no turn is refused so
        that another one may be sent twice. Returns whether there is room now; if not, none was forgotten."""
        spare = [each for each in connections if each.has_sent_body and each.held_bytes]
        held = self.held - sum(each.held_bytes for each in spare) + size
        mine = self._by_client[client] - sum(each.held_bytes for each in spare if each.identity == client) + size
        if not self._would_fit(held, mine, begun + size):
            return False
        for each in sorted(spare, key=lambda each: each.identity != client):
            if self.has_room(client, size, begun):
                break
            each.spend_body()
        return True


def descriptor_trouble(error: OSError) -> str:
    """Explain why a socket could not be made, and what helps."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{error.strerror}; the proxy may open {limit} files (ulimit -n): raise that where it is started"

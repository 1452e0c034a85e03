"""A turn's life, top to bottom: read, authorise, identify, admit, choose, send, relay, record."""

from __future__ import annotations

import dataclasses
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.bodies import LAST_CHUNK, BodyDecoder, encode_chunk
from agent_infra_core.http.errors import RequestError, WireError, error_event
from agent_infra_core.http.events import EventStream
from agent_infra_core.http.heads import MAX_HEAD_BYTES, after_interim_answers, as_client_error, returned_head
from agent_infra_core.protocol import Histogram
from agent_infra_core.relay.admission import PATIENCE_WITH_BUSY_S
from agent_infra_core.relay.bodies import with_priority
from agent_infra_core.relay.book import RETRY_SHARE, Turn
from agent_infra_core.relay.reactor import ClientGone
from agent_infra_core.relay.replicas import RECEIVE_BYTES, LiveReplica
from agent_infra_core.relay.requests import RequestPlan
from agent_infra_core.relay.upstream import TransportError, Upstream

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection

APP_BODY_BYTES = 64 << 10
BUFFERED_ANSWER_BYTES = 8 << 20  # a plain answer longer than this is passed on as it comes
DIGESTED_ANSWER_BYTES = 4 << 20  # the usage of a longer one isn't read
INTERIM_PAUSE_S = 0.02  # between two looks at interim answers
RACE_S = 1.0  # a replica's close that crossed with a request shows within this time: more than a round trip
PRIORITY_PATHS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses")  # vLLM's other requests have none
GENERATING_PATHS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages")
UNREACHABLE_S = 1.0  # that a turn avoids a replica that it couldn't reach
BUSY_S, MAX_BUSY_S = 0.5, 60.0  # that a replica gets no work after 429 or 503
MOST_CONNECTIONS = "you have most of the connections that this proxy may open (ulimit -n where it is started)"
BODY_IS_GONE = "it is not sent elsewhere: the room of its body was needed for others (proxy.max_buffered_mb)"
UNSUPPORTED = b"input is not supported"  # what llama.cpp says with 500 of images and audio
NO_RETRY_LEFT = f"it is not sent elsewhere: the retry budget, {RETRY_SHARE:.0%} of all requests, is spent"


class BrokenAnswer(Exception):  # noqa: N818 - a replica's failure, which decides what becomes of the turn
    """An attempt ended without a whole answer.

    ``kind``: ``lost`` (the connection or its framing broke) · ``died`` (likewise, and nobody accepts another one) ·
    ``timeout`` (silence) · ``stopped`` (the proxy ends) · ``failed`` (a bug of ours). ``unsent`` is what came of a
    stream and still goes to the client.
    """

    def __init__(self, message: str, kind: str = "lost", unsent: bytes = b"") -> None:
        super().__init__(message)
        self.kind, self.unsent = kind, unsent


def serve_turn(client: ClientConnection) -> bool:
    """Serve a client's next request, from its first byte to its record: the only path that a request takes.

    Runs in the connection's greenlet, and waits only where something must be waited for. Returns whether the
    connection may carry another request.
    """
    relay, turn = client.relay, None
    try:
        plan, length, authorization = client.read_head()
        authorize(client, plan, authorization)
        if not plan.is_inference:
            return answer_otherwise(client, plan, length)
        client.read_body(plan, length, relay.settings.max_body_bytes)
        turn = relay.book.open(plan, client.body, client.peer)  # identify
        delivery, may_follow = Delivery(client, turn, plan), None
        while may_follow is None:
            replica = relay.admission.acquire(turn, client)  # admit and choose
            try:
                may_follow = delivery.attempt(replica)  # send and relay
            finally:
                relay.admission.release(turn)
        return may_follow and plan.request.keeps_alive
    except RequestError as refusal:
        if turn is None:
            return client.refuse(refusal, relay.book.refused(refusal, client.plan))
        turn.status, turn.error = refusal.status, str(refusal)
        turn.outcome = "rejected" if refusal.status in (429, 503) else "error"
        relay.book.finish(turn)  # before the client is told, so that it counts by then
        return client.refuse(refusal, turn.answer_fields())
    finally:
        if turn is not None:
            relay.book.finish(turn)
        client.release_body()


def authorize(client: ClientConnection, plan: RequestPlan, authorization: bytes) -> None:
    """Raise RequestError unless the client may ask for this. /health and a browser's question are open to all."""
    request, access = plan.request, client.relay.access
    if plan.path != b"/health" and access.preflight(request) is None:
        access.authorize(client, request, authorization)
        client.sharer = client.identity
        if client.is_among_last and client.relay.acceptor.has_most(client):
            raise RequestError(503, MOST_CONNECTIONS, retry_after_s=1, closes=True)
    if b"upgrade" in request.fields and b"websocket" in request.fields[b"upgrade"].lower():
        raise RequestError(501, "WebSocket is not supported; the same models answer over HTTP", closes=True)


def answer_otherwise(client: ClientConnection, plan: RequestPlan, length: int | None) -> bool:
    """Answer what isn't inference. Returns whether the connection may carry another request."""
    request, relay = plan.request, client.relay
    client.read_body(plan, length, APP_BODY_BYTES)
    answer = relay.access.preflight(request) or relay.app.answer(request, plan.path, plan.query, bytes(client.body))
    if (cors := relay.access.cors_fields(request)) and request.method != b"OPTIONS":
        status_line, _, rest = answer.partition(b"\r\n")
        answer = b"%b\r\n%b%b" % (status_line, cors, rest)
    client.send_all(answer)
    return request.keeps_alive


class Delivery:
    """Takes one turn to its answer: sends it to a replica, and decides what follows if that replica fails."""

    __slots__ = ("_client", "_plan", "_relay", "_turn", "_unreachable")

    def __init__(self, client: ClientConnection, turn: Turn, plan: RequestPlan) -> None:
        self._relay, self._client, self._turn = client.relay, client, turn
        self._plan = plan
        self._unreachable = 0

    def attempt(self, replica: LiveReplica) -> bool | None:
        """Try one replica. Returns None if the turn may go to another one, else whether the client's connection may
        carry another request. Raises RequestError or ClientGone."""
        turn = self._turn
        turn.send_to(replica, time.monotonic())
        exchange = Exchange(self._client, turn, replica, *self._request_for(replica))
        try:
            exchange.run()
        except TransportError as error:
            self._try_elsewhere(replica, str(error))
            return None
        except BrokenAnswer as broken:
            return self._on_broken_answer(replica, exchange, broken)
        except ClientGone:
            if not exchange.has_whole_stream:
                turn.status = exchange.status if turn.first else 0
                raise
            exchange.ends_by_closing = True  # many clients leave at the last event, before the body's end
        if not exchange.is_passed_on:
            return self._on_answer(replica, exchange)
        turn.status, turn.outcome = exchange.status, "completed"
        turn.ended = time.monotonic()
        replica.note_success((turn.ended - turn.sent) * 1000.0, turn.ended)
        return not exchange.ends_by_closing

    def _request_for(self, replica: LiveReplica) -> tuple[bytes, int]:
        """Return the bytes to send before the body, and how many of the body they replace: none, or its opening where
        the engine schedules by priority and the client set none."""
        turn, body = self._turn, self._client.body
        if replica.backend.takes_priority and turn.path in PRIORITY_PATHS and not turn.has_priority:
            parts = with_priority(body, self._relay.admission.priority(turn))
            if parts is not None:
                head = replica.head(self._plan, len(parts[0]) + len(parts[1]))
                return head + parts[0], len(body) - len(parts[1])
        return replica.head(self._plan, len(body)), 0

    def _on_answer(self, replica: LiveReplica, exchange: Exchange) -> bool | None:
        """Pass on a whole plain answer, unless it says to go elsewhere."""
        turn, head, body = self._turn, exchange.head, exchange.body
        if head.status == 501 or (head.status == 500 and UNSUPPORTED in body):
            head = as_client_error(head)  # SDKs would send it again after a 5xx, and nothing would change
        if head.status in (429, 503):
            after = head.fields.get(b"retry-after", b"").strip()
            pause = min(max(float(after), BUSY_S), MAX_BUSY_S) if after.isdigit() and len(after) < 9 else BUSY_S
            now = time.monotonic()
            replica.busy_until = now + pause
            turn.refused_since = turn.refused_since or now
            is_served = self._relay.admission.is_served_by(turn, turn.refused_since + PATIENCE_WITH_BUSY_S)
            if is_served and not self._client.has_spent_body and self._relay.book.spend_retry():
                self._start_over()
                return None
            # Else the client learns at once what the replica said: its own retry is better than a silent minute.
        turn.answer = body if len(body) <= DIGESTED_ANSWER_BYTES else b""
        if head.status >= 400 or body.find(b'"abort"') >= 0:  # find(): `in` first tries to read a number
            self._relay.book.read_answer(turn)
        turn.ended = time.monotonic()
        if turn.digest is not None and turn.digest.finish_reason == "abort":
            self._after_death(replica, "the engine was shut down", is_proven=True)
            return None
        if head.status >= 500 and head.status != 503:
            if turn.deaths == 0 and not self._relay.watch.has_survived(replica, turn.sent):
                self._after_death(replica, f"it answered {head.status} and died", is_proven=True)
                return None
            pool = self._relay.pools.get(turn.model, ())
            replica.note_refusal(head.status, not any(other.accepts_work for other in pool if other is not replica))
        elif head.status not in (429, 503):
            is_measured = head.status < 400 and turn.path in GENERATING_PATHS
            replica.note_success((turn.ended - turn.sent) * 1000.0 if is_measured else None, turn.ended)
        turn.status = head.status
        keeps_alive = self._plan.request.keeps_alive
        fields = turn.answer_fields() + self._plan.request.keep_alive_line
        head_bytes = returned_head(head, fields, len(body), False, not keeps_alive)
        self._relay.admission.release(turn)  # the replica is done, however slowly the client reads
        self._client.send_all(head_bytes + body)
        turn.outcome = "completed" if head.status < 400 else "rejected" if head.status in (429, 503) else "error"
        if head.status >= 400 and turn.digest is not None:
            turn.error = turn.digest.error
        return keeps_alive

    def _on_broken_answer(self, replica: LiveReplica, exchange: Exchange, broken: BrokenAnswer) -> bool | None:
        """The answer broke off."""
        turn, message = self._turn, str(broken)
        turn.status = exchange.status
        if broken.kind in ("lost", "died") and not exchange.is_passed_on:
            self._after_death(replica, message, is_proven=broken.kind == "died" or turn.first > 0.0)
            return None
        if broken.kind in ("lost", "timeout") and not self._relay.is_stopping:  # a stop may be what broke it
            replica.note_failure(message, is_dead=False, sent=turn.sent)
        if exchange.is_passed_on:
            turn.outcome, turn.error = "cut", message
            return exchange.end_broken(broken)
        if broken.kind == "timeout":
            message += "; it may be overloaded, or the answer too long for request_timeout"
        status = {"failed": 500, "stopped": 503}.get(broken.kind, 504)
        raise RequestError(status, message, closes=broken.kind == "stopped")

    def _try_elsewhere(self, replica: LiveReplica, error: str) -> None:
        """The replica got nothing of the request: any other one may get it, within the budget."""
        replica.note_failure(error, is_dead=True, sent=self._turn.sent)
        self._unreachable += 1
        route = self._turn.route  # it may be back in a moment, and it got nothing
        until = (*route.until, (replica.id, time.monotonic() + UNREACHABLE_S))
        self._turn.route = dataclasses.replace(route, until=until)
        if self._unreachable > self._relay.settings.proxy.max_retries:
            message = f"no replica of {self._turn.model} could be reached: {error}{self._relay.control.remedy}"
            raise RequestError(503, message, retry_after_s=1)
        if not self._relay.book.spend_retry():
            raise RequestError(503, f"replica {replica.id}: {error}; {NO_RETRY_LEFT}", retry_after_s=1)
        self._turn.retries += 1
        self._start_over()

    def _after_death(self, replica: LiveReplica, error: str, is_proven: bool) -> None:
        """The replica had the request and gave no answer: send it once more, and only if that replica is dead.

        A prompt that kills engines must not kill them all.
        """
        is_dead = is_proven or not self._relay.watch.has_survived(replica, self._turn.sent)
        replica.note_failure(error, is_dead, self._turn.sent)
        self._turn.deaths += 1
        self._exclude(replica)
        if not is_dead:
            raise RequestError(502, f"replica {replica.id} broke off without an answer: {error}", code="replica_lost")
        if self._turn.deaths > 1:
            message = f"replica {replica.id} died with this request, as one did before; it is not sent again"
            raise RequestError(502, message, code="replica_lost")
        if (is_gone := self._client.has_spent_body) or not self._relay.book.spend_retry():
            why = BODY_IS_GONE if is_gone else NO_RETRY_LEFT
            raise RequestError(502, f"replica {replica.id}: {error}; {why}", code="replica_lost")
        self._turn.retries += 1
        self._start_over()

    def _exclude(self, replica: LiveReplica) -> None:
        """Exclude a replica, and its node too if another one serves: the node may be at fault.

        One that left the table isn't excluded: its name may be its successor's by now.
        """
        excluded, pool = self._turn.route.excluded, self._relay.pools.get(self._turn.model, ())
        excluded |= frozenset() if replica.is_gone else {replica.id}
        mates = {other.id for other in pool if other.backend.node == replica.backend.node}
        if any(other.accepts_work and other.id not in excluded | mates for other in pool):
            excluded |= mates
        self._turn.route = dataclasses.replace(self._turn.route, excluded=excluded)

    def _start_over(self) -> None:
        self._client.has_sent_body = False
        self._relay.admission.sessions.give_up(self._turn, time.monotonic())
        self._turn.first = self._turn.ended = 0.0
        self._turn.digest, self._turn.answer, self._turn.stream = None, b"", None


class Exchange:
    """One attempt: sends the request to one replica and moves its answer, in the client's greenlet.

    A stream goes to the client as it comes; a plain answer is collected in ``body``, so that it can be asked for again
    if its replica dies. Either way every byte of an answer passes ``_receive``, and ``_send`` if it is passed on.
    """

    head: Any = None  # AnswerHead, shared by equal heads; so the body's length is kept beside it
    events: EventStream | None = None  # of a stream
    body = b""  # of a plain answer that is whole
    is_passed_on = False  # the client has the answer's head
    ends_by_closing = False  # the client's connection ends with the answer
    _is_sent = _is_received = _is_whole = _is_reset = False
    _has_excess = False  # bytes behind the answer's end
    _length: int | None = 0
    _decoder: Any = None

    def __init__(
        self, client: ClientConnection, turn: Turn, replica: LiveReplica, request_head: bytes, replaced: int
    ) -> None:
        """``request_head`` is sent before the body, of which it replaces so many bytes. The client holds the body for
        as long as it may be sent again, and nobody else does: its room may be needed."""
        self._relay, self._client, self._turn, self._replica = client.relay, client, turn, replica
        self._request_head, self._replaced = request_head, replaced
        self._timeout_s = client.relay.settings.proxy.request_timeout
        self._upstream: Any = None
        # For HTTP/1.1 clients; the answer to an older one ends with the connection.
        self._to_chunks = client.plan is None or client.plan.request.version == 1

    @property
    def status(self) -> int:
        """Of the answer; 0 before it came."""
        return self.head.status if self.head is not None else 0

    @property
    def has_whole_stream(self) -> bool:
        """Whether a stream's last event came."""
        return self.events is not None and self.events.is_answered

    def run(self) -> None:
        """Send and relay. Raises TransportError if the replica could not be reached and got nothing of the request,
        BrokenAnswer, ClientGone, or RequestError without a descriptor for a new connection."""
        try:
            data = self._ask()
            if self.head.is_event_stream and self.head.status < 400 and self._length != 0:
                self._relay_events(data)
            else:
                self._relay_body(data)
            self._is_whole = True
        except WireError as error:
            raise BrokenAnswer(str(error)) from None
        except (BrokenAnswer, ClientGone, TransportError, RequestError):
            raise
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self._relay.log_bug("an answer", error)
            raise BrokenAnswer("the proxy failed on this answer", "failed") from None
        finally:
            self._give_back()

    # Send.

    def _ask(self) -> bytes:
        """Send the request. Returns the first bytes of the answer's body; its head is read."""
        # A request that was sent before goes out on a new connection, on which no close by the replica can cross it.
        if self._replica.idle and not self._turn.deaths:
            try:
                return self._ask_on(self._replica.idle.popitem()[0])
            except BrokenAnswer as broken:
                is_race = not (self._is_sent and time.monotonic() > self._turn.sent + RACE_S)
                if broken.kind != "lost" or self._is_received or not is_race or self._client.has_spent_body:
                    raise
            self._client.has_sent_body = False
            # The replica closed the idle connection under us, or died of this very request: a new connection shows.
            self._upstream.close()
            try:
                self._upstream = None
                return self._ask_on(Upstream.connect(self._replica, self._client))
            except TransportError as error:
                raise BrokenAnswer(str(error), "died") from None
        return self._ask_on(Upstream.connect(self._replica, self._client))

    def _ask_on(self, upstream: Upstream) -> bytes:
        self._upstream = upstream
        self._client.extend_deadline(self._timeout_s)
        body = memoryview(self._client.body)[self._replaced :] if self._replaced else self._client.body
        self._is_sent = upstream.send(self._request_head, body, self._client)
        del body
        self._client.has_sent_body = self._is_sent
        data = b""
        while True:
            more = self._receive()
            if not more:
                raise BrokenAnswer("the replica died")
            self._is_received = True
            came = data + more if data else more
            data = after_interim_answers(came)
            if 4 <= (end := data.find(b"\r\n\r\n") + 4) <= MAX_HEAD_BYTES:
                self.head, self._length = self._relay.heads.answer(data, end)
                return data[end:]
            if len(data) < len(came):  # some engines hint for ever: let others work meanwhile
                upstream.watcher.stop()  # otherwise its bytes would wake the loop all the time
                self._relay.reactor.sleep(INTERIM_PAUSE_S)
                upstream.watcher.start(self._client.wake)
            if len(data) > MAX_HEAD_BYTES:
                raise WireError("the replica's head is too long")

    # Relay.

    def _receive(self) -> bytes:
        """Return bytes from the replica; none at its end. Raises ClientGone, BrokenAnswer (silence, proxy's end)."""
        client = self._client
        while True:
            client.park()
            if client.is_late:  # even while bytes come: the deadline is for the whole plain answer
                raise BrokenAnswer(f"the replica was silent for {self._timeout_s:g} s", "timeout")
            if self._relay.is_over:
                raise BrokenAnswer("the proxy was stopped", "stopped")
            try:
                data: bytes = self._upstream.sock.recv(RECEIVE_BYTES)
                return data
            except BlockingIOError:
                continue
            except OSError:
                self._is_reset = True
                return b""

    def _send(self, data: bytes) -> None:
        """Send a part of an answer to the client. While the client is slow, nothing is read from the replica."""
        try:
            sent = self._client.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone from None
        if sent < len(data):
            self._upstream.watcher.stop()
            self._client.send_all(memoryview(data)[sent:])
            self._upstream.watcher.start(self._client.wake)

    def _relay_events(self, data: bytes) -> None:
        """Pass on a stream of events, one receive and one send per chunk, as it comes."""
        client, turn, replica, timeout_s = self._client, self._turn, self._replica, self._timeout_s
        head, last = self._start_stream(), 0.0
        events: Any = self.events
        while True:
            out = events.feed(data) if data else b""
            now = time.monotonic()
            client.deadline = now + timeout_s
            replica.last_byte = now
            if last:
                turn.gaps.add((now - last) * 1000.0)
                last = now
            elif events.events:
                turn.first = last = now
            if events.fault is not None:
                raise BrokenAnswer(events.fault, unsent=out)
            if head and (out or events.is_over):
                out, head, self.is_passed_on = head + out, b"", True
                client.release_body()  # it won't be sent again
            if out:
                self._send(out)
            if events.is_over:
                break
            data = self._receive()
            if not data:
                self._end_events(head)
                break

    def _start_stream(self) -> bytes:
        """Return the head for the client, which goes out with the first bytes of the body."""
        turn = self._turn
        self.ends_by_closing = not self._to_chunks
        self._decoder = BodyDecoder(self._length)
        turn.gaps = Histogram()
        self.events = EventStream(
            self._decoder,
            to_chunks=self._to_chunks,
            cuts_usage=turn.cuts_usage,
            path=turn.path,
            wanted_text=turn.wanted_text,
            traces=turn.follows is not None,
            adds_indices="response_indices" in self._replica.backend.lacks,
        )
        turn.stream = self.events
        return returned_head(self.head, turn.answer_fields(), None, self._to_chunks, not self._to_chunks)

    def _end_events(self, head: bytes) -> None:
        """The replica closed the connection: the end of an answer that lasts until then, unless it was reset."""
        events: Any = self.events
        if (self._is_reset or not self._decoder.is_until_close) and not events.is_answered:
            raise BrokenAnswer("the replica died")
        out = events.close()
        if events.fault is not None:
            raise BrokenAnswer(events.fault, unsent=out)
        self.is_passed_on = True
        self._send(head + out)

    def _relay_body(self, data: bytes) -> None:
        """Collect a plain answer. Audio, and what is too long to keep for a retry, is passed on as it comes."""
        turn, decoder = self._turn, BodyDecoder(self._length)
        self._decoder = decoder
        turn.first = time.monotonic()
        pieces: list[bytes] = []
        size, is_raw = 0, self.head.fields.get(b"content-type", b"").startswith(b"audio/")
        while True:
            if data:
                self._has_excess = decoder.feed(data, 0, pieces) < len(data)
                size += len(data)
            if is_raw or (size > BUFFERED_ANSWER_BYTES and not decoder.is_over):
                is_raw = True
                self._pass_on(b"".join(pieces), decoder.is_over)
                pieces.clear()
            if decoder.is_over:
                self.body = b"".join(pieces)
                return
            data = self._receive()
            if data:
                continue
            if self._is_reset or not decoder.is_until_close:
                raise BrokenAnswer("the replica died")
            if self._is_cut_json(pieces):
                raise BrokenAnswer("the replica ended its answer in the middle")
            decoder.is_over = True

    def _is_cut_json(self, pieces: list[bytes]) -> bool:
        """Whether a plain answer that lasts until its connection ends isn't the whole document."""
        if self.is_passed_on or b"json" not in self.head.fields.get(b"content-type", b""):
            return False
        try:
            self._relay.codec.decode(b"".join(pieces))
        except (ValueError, RecursionError):
            return True
        return False

    def _pass_on(self, payload: bytes, is_last: bool) -> None:
        """Send a part of a plain answer to the client, after its head if that is still to come."""
        head = b""
        if not self.is_passed_on:
            self.is_passed_on = True
            length = self._length if self._length != BodyDecoder.UNTIL_CLOSE else None
            self.ends_by_closing = not self._to_chunks
            self._to_chunks = self._to_chunks and length is None
            closes = self.ends_by_closing and length is None
            head = returned_head(self.head, self._turn.answer_fields(), length, self._to_chunks, closes)
        out = head + (encode_chunk(payload) if self._to_chunks else payload)
        if is_last and self._to_chunks:
            out += LAST_CHUNK
        self._client.extend_deadline(self._timeout_s)
        if out:
            self._send(out)

    def end_broken(self, broken: BrokenAnswer) -> bool:
        """Tell a client that has part of an answer that the rest won't come: by an error event in a stream, else by
        closing. Returns whether its connection may carry another request."""
        client = self._client
        if self.events is not None:
            client.send_all(broken.unsent + self.events.failure(error_event(str(broken), self._turn.is_anthropic)))
            return self._to_chunks
        if self.ends_by_closing:  # only a reset shows that the answer isn't complete
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _give_back(self) -> None:
        """Return the connection to the replica's pool, or close it if it can't serve again."""
        upstream, decoder = self._upstream, self._decoder
        if upstream is None:
            return
        has_excess = self.events.has_excess if self.events is not None else self._has_excess
        is_over = self._is_whole and decoder.is_over and not decoder.is_until_close
        if is_over and self._is_sent and self.head.is_reusable and not has_excess:
            upstream.rest()
        else:
            upstream.close()

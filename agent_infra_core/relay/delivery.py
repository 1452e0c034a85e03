"""A turn's way to a replica: chooses one, sends, retries, refuses."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.heads import returned_head
from agent_infra_core.relay.exchange import Exchange
from agent_infra_core.relay.replicas import LiveReplica
from agent_infra_core.relay.turn import ClientGone, RequestPlan, TransportError, Turn
from agent_infra_core.relay.upstream import Upstream
from agent_infra_core.routing.strategies import RouteRequest

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection
    from agent_infra_core.relay.server import Relay

LONG_BODY_BYTES = 16 << 10  # from here on it pays to remember what was read
DIGESTED_ANSWER_BYTES = 4 << 20  # usage of a longer one is not read
BUSY_S = 0.5  # that a replica gets no work after 429 or 503, at least
RETRY_SHARE = 0.1  # of requests; the budget's bounds are RETRY_FLOOR and ten times that
NO_RETRY_LEFT = f"it is not sent elsewhere: the retry budget, {RETRY_SHARE:.0%} of all requests, is spent"


class Delivery:
    """Takes one turn to an answer: through the queue, to a replica, and to another where the rules allow it."""

    __slots__ = ("_body", "_client", "_plan", "_relay", "_unreachable", "exchange", "turn")

    def __init__(
        self, relay: Relay, client: ClientConnection, turn: Turn, plan: RequestPlan, body: bytes | bytearray
    ) -> None:
        self._relay, self._client, self.turn = relay, client, turn
        self._plan, self._body = plan, body
        self._unreachable = 0
        self.exchange: Exchange | None = None

    def read_words(self) -> None:
        """Look at what the request says, once."""
        self._relay.book.read_words(self.turn, self._body, self._client.peer)

    def run(self) -> bool:
        """Deliver; whether the client's connection may carry another request. Raises RequestError or ClientGone."""
        admission, turn = self._relay.admission, self.turn
        while True:
            replica = turn.replica or admission.acquire(turn, self._client)
            try:
                verdict = self._attempt(replica)
            finally:
                admission.release(turn)
            if verdict is not None:
                return verdict

    def _prepare(self, replica: LiveReplica, head: bytes, now: float) -> Exchange:
        turn = self.turn
        turn.sent, turn.queue_ms, turn.backend = now, (now - turn.arrived) * 1000.0, replica.id
        self.exchange = exchange = Exchange(self._relay, self._client, turn, replica, (head, self._body))
        return exchange

    def _attempt(self, replica: LiveReplica) -> bool | None:
        """One replica's turn at it: None to go on with another, else as ``run``."""
        turn = self.turn
        exchange = self.exchange
        if exchange is None:
            exchange = self._prepare(replica, replica.head(self._plan, len(self._body)), time.monotonic())
        exchange.express = None
        try:
            result = exchange.run()
        except TransportError as error:
            return self._try_elsewhere(replica, str(error))
        if result == "answered":
            return self._take_answer(replica, exchange)
        if result == "lost":
            return self._after_death(replica, exchange.error, is_proven=turn.first > 0.0)
        if exchange.events is not None:
            turn.digest = exchange.events.digest()
            turn.events = exchange.events.events
        turn.status = exchange.head.status if exchange.head is not None else 0
        has_left = result == "gone"
        if has_left and (exchange.events is None or not exchange.events.has_last_event):
            turn.status = turn.status if turn.first else 0
            raise ClientGone
        if has_left or result == "streamed":
            now = turn.ended = time.monotonic()
            replica.note_success((now - turn.sent) * 1000.0, now)
            turn.outcome = "completed"
            return not has_left and not exchange.ends_by_closing
        return self._break_off(replica, exchange, result)

    def _break_off(self, replica: LiveReplica, exchange: Exchange, result: str) -> bool:
        """The turn ends without its answer."""
        if result == "failed":
            raise RequestError(500, exchange.error)
        if result == "stopped":
            raise RequestError(504, exchange.error, closes=True)
        if not self._relay.is_stopping:  # then it may be no fault of the replica's
            replica.note_failure(exchange.error, is_dead=False)
        if result == "timeout":
            raise RequestError(
                504, f"{exchange.error}; it may be overloaded, or the answer too long for request_timeout"
            )
        self.turn.outcome, self.turn.error = "cut", exchange.error
        if result == "torn" and exchange.ends_by_closing:  # only a reset tells that this is not the answer's end
            self._client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return result == "cut" and self._client.version == 1

    def _take_answer(self, replica: LiveReplica, exchange: Exchange) -> bool | None:
        """A whole answer, of which the client has nothing yet: pass it on, unless it says to go elsewhere."""
        turn, head = self.turn, exchange.head
        if head.status in (429, 503):
            after = head.fields.get(b"retry-after", b"").strip()
            pause = min(max(float(after), BUSY_S), 60.0) if after.isdigit() else BUSY_S
            replica.busy_until = time.monotonic() + pause
            return self._start_over()
        if len(exchange.body) <= DIGESTED_ANSWER_BYTES:
            turn.digest = self._relay.codec.digest(exchange.body, turn.wanted_text, turn.follows is not None)
        now = turn.ended = time.monotonic()
        if turn.digest is not None and turn.digest.finish_reason == "abort":
            return self._after_death(replica, "the engine was shut down", is_proven=True)
        if head.status >= 500:
            if turn.deaths == 0 and not self._relay.watch.is_alive(replica):
                return self._after_death(replica, f"it answered {head.status} and died", is_proven=True)
            replica.errors += 1
        else:
            replica.note_success((now - turn.sent) * 1000.0, now)
        turn.status, turn.outcome = head.status, "completed" if head.status < 400 else "error"
        if head.status >= 400 and turn.digest is not None:
            turn.error = turn.digest.error
        keeps_alive = self._plan.request.keeps_alive
        extra = self._relay.book.answer_fields(turn)
        self._client.send_all(returned_head(head, extra, len(exchange.body), False, not keeps_alive) + exchange.body)
        return keeps_alive

    def _try_elsewhere(self, replica: LiveReplica, error: str) -> bool | None:
        """It got nothing of the request: any other replica may, within the budget."""
        replica.note_failure(error, is_dead=True)
        self._unreachable += 1
        self._exclude(replica)
        if self._unreachable > self._relay.settings.proxy.max_retries:
            remedy = self._relay.control.remedy
            raise RequestError(
                503, f"no replica of {self.turn.model} could be reached: {error}{remedy}", retry_after_s=1
            )
        if not self._relay.book.take_retry():
            raise RequestError(503, f"replica {replica.id}: {error}; {NO_RETRY_LEFT}", retry_after_s=1)
        self.turn.retries += 1
        return self._start_over()

    def _after_death(self, replica: LiveReplica, error: str, is_proven: bool) -> bool | None:
        """It had the request and gave no answer: send it once more, and only if that replica is dead.

        A prompt that kills engines must not kill them all.
        """
        is_dead = is_proven or not self._relay.watch.is_alive(replica)
        replica.note_failure(error, is_dead=is_dead)
        self.turn.deaths += 1
        self._exclude(replica, with_node=True)
        if not is_dead:
            raise RequestError(502, f"replica {replica.id} broke off without an answer: {error}", code="replica_lost")
        if self.turn.deaths > 1:
            message = f"replica {replica.id} died with this request, as one did before; it is not sent again"
            raise RequestError(502, message, code="replica_lost")
        if not self._relay.book.take_retry():
            raise RequestError(502, f"replica {replica.id}: {error}; {NO_RETRY_LEFT}", code="replica_lost")
        self.turn.retries += 1
        return self._start_over()

    def _exclude(self, replica: LiveReplica, with_node: bool = False) -> None:
        """Go elsewhere; ``with_node``: to another node, if one serves, for what has killed this replica may be its."""
        excluded, pool = self.turn.route.excluded | {replica.id}, self._relay.pools.get(self.turn.model, ())
        mates = {other.id for other in pool if other.backend.node == replica.backend.node}
        if with_node and any(other.accepts_work and other.id not in excluded | mates for other in pool):
            excluded |= mates
        self.turn.route = RouteRequest(excluded)

    def _start_over(self) -> bool | None:
        turn = self.turn
        turn.first = turn.ended = 0.0
        turn.digest = None
        self.exchange = None
        return None


class ExpressDelivery(Delivery):
    """A delivery that event-loop callbacks begin, and end where nothing has to be waited for but the answer."""

    __slots__ = ()

    @classmethod
    def send(cls, relay: Relay, client: ClientConnection, plan: RequestPlan, body: bytes) -> ExpressDelivery:
        """Send a request to a replica that has room for it, on a connection that stands, and note its turn only then,
        while the replica is at work.  Where something has to be waited for, ``run`` goes on from there.  RequestError
        when the request is refused; then nothing has begun."""
        now = time.monotonic()
        fields, model = relay.book.read(plan, body, client.peer)
        replica = relay.admission.take(model, len(body) // 4, now)
        upstream, head, sent = None, b"", 0
        try:
            if replica is not None and replica.idle:
                head = replica.head(plan, len(body))
                upstream = replica.idle.popitem()[0]
                sent = upstream.send(head, body)
            turn = relay.book.open(plan, fields, model, len(body), now)
        except BaseException:
            if replica is not None:
                replica.release()
            if upstream is not None:
                upstream.close()
            raise
        turn.replica = replica
        client.delivery = delivery = cls(relay, client, turn, plan, body)
        if replica is not None and upstream is not None:
            delivery._take_over(replica, upstream, head, sent, now)
        return delivery

    def _take_over(self, replica: LiveReplica, upstream: Upstream, head: bytes, sent: int, now: float) -> None:
        exchange = self._prepare(replica, head, now)
        exchange.take_over(upstream, sent, now)
        if exchange.is_sent:
            exchange.express = self._pass_on
            if len(self._body) >= LONG_BODY_BYTES:  # the words of a short one are read with those of others, later
                self.read_words()

    def _pass_on(self, exchange: Exchange, data: bytes) -> bool:
        """Pass on a whole plain answer that came at once, as nearly all do, in the callback that received it; False:
        it is another kind of answer, and nothing was done."""
        upstream: Any = exchange.upstream
        head: Any
        head, length, _, end = upstream.head.find(data) or (None, -1, b"", 0)
        # find(), for `in` takes what it looks for for a number first, and pays for the exception.
        if length != len(data) - end or head.status != 200 or head.is_event_stream or data.find(b'"abort"') >= 0:
            self.read_words()  # whatever takes the answer may go by them
            return False
        now, turn, client = time.monotonic(), self.turn, self._client
        turn.first = turn.ended = now
        turn.status = 200
        exchange.head, exchange.received = head, True
        extra = self._relay.book.answer_fields(turn)
        turn.answer = data[end:]
        out = returned_head(head, extra, length, False, not self._plan.request.keeps_alive) + turn.answer
        try:
            sent = client.sock.send(out)
        except OSError:
            sent = 0  # said again, and understood, below
        if sent < len(out):
            exchange.express = None
            self._relay.book.read_answer(turn)
            exchange.send(out[sent:], "streamed")
            return True
        try:
            exchange.result = "streamed"
            exchange.close()
            if turn.replica is not None:
                turn.replica.note_success((now - turn.sent) * 1000.0, now)
            turn.outcome = "completed"
            if len(turn.answer) >= LONG_BODY_BYTES:  # a short one is read later, like a short request
                self._relay.book.read_answer(turn)
        finally:
            self._relay.admission.release(turn)
            self._relay.book.finish(turn, now)
            client.end_express(now)
        return True

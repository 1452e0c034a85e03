"""Reports turns to the controller: the book of open turns, the batches of events, the control socket."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent_infra_core.host import unix_address
from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.events import MAX_TRACED_BYTES, NO_DIGEST, AnswerDigest, conversation_key
from agent_infra_core.protocol import (
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_HELLO,
    FRAME_REQUEST,
    RELAY_PROTOCOL,
    EventBatch,
    FrameReader,
    SessionEnded,
    TurnAnswering,
    TurnSent,
    encode_frame,
)
from agent_infra_core.relay.bodies import KnownBodies, form_model
from agent_infra_core.relay.delivery import LONG_BODY_BYTES, RETRY_SHARE
from agent_infra_core.relay.turn import Reactor, RequestPlan, Turn

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay

KNOWN_BODIES_BYTES = 32 << 20
SHORTAGE_S = 60.0  # how often a lack of descriptors is logged
RETRY_FLOOR = 100.0
PACKED_TURNS = 16  # finished turns that are encoded at once: a fifth of a millisecond's work
BATCHED_PACKS = 32  # of these in one frame
QUESTION_S = 2.0
MAX_BUFFERED_EVENTS = 50_000
MAX_BUFFERED_PACKS = MAX_BUFFERED_EVENTS // PACKED_TURNS


class ControlChannel:
    """The Unix socket to the controller: the newest one to connect is served, events wait for it when there is none."""

    def __init__(self, relay: Relay, path: str, listener: Any) -> None:
        self._relay, self._listener = relay, listener
        self._finished: list[Turn] = []  # not packed yet
        self._packed: deque[tuple[bytes, int]] = deque()  # finished turns as they are sent, and how many
        self._ended: deque[SessionEnded] = deque(maxlen=MAX_BUFFERED_EVENTS)
        self._unsent = b""  # a batch, encoded
        self._controller: Any = None
        self._write_lock = relay.reactor.new_lock()  # one frame after the other: three greenlets send
        self.events_dropped = 0
        self.questions = Questions(self, relay.reactor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with unix_address(path) as address:
                self._server.bind(address)
        finally:
            os.umask(before)
        self._server.listen(8)

    def run(self) -> None:
        """Accept controllers, for ever; a greenlet runs this."""
        started_at, told = time.time(), -math.inf
        while True:
            try:
                controller, _ = self._server.accept()
            except OSError as error:  # out of descriptors
                if time.monotonic() > told + SHORTAGE_S:
                    told = time.monotonic()
                    self._relay.log("error", f"no controller can be accepted for now: {error}")
                self._relay.reactor.sleep(1.0)
                continue
            if self._relay.is_stopping:  # it has no listening socket left to hand on
                controller.close()
                continue
            former, self._controller = self._controller, None
            if former is not None:
                with contextlib.suppress(OSError):
                    former.shutdown(socket.SHUT_RDWR)
            hello = {
                "protocol": RELAY_PROTOCOL,
                "pid": os.getpid(),
                "port": self._listener.getsockname()[1],
                "started_at": started_at,
            }
            try:
                frame = encode_frame(FRAME_HELLO, json.dumps(hello).encode())
                socket.send_fds(controller, [frame], [self._listener.fileno()])
            except OSError:
                controller.close()
                continue
            self._relay.book.forget_told()  # another controller knows nothing of the turns in flight
            self._controller = controller
            self._relay.reactor.spawn(self._read, controller)

    def _read(self, controller: Any) -> None:
        reader = FrameReader()
        try:
            while data := controller.recv(1 << 20):
                for kind, payload in reader.feed(data):
                    if kind == FRAME_ANSWER:
                        self.questions.take(payload)
                    else:
                        self._relay.take_frame(kind, payload)
        except (OSError, ValueError) as error:
            self._relay.log("warning", f"the controller's connection broke: {error}")
        finally:
            if self._controller is controller:
                self._controller = None
                self._relay.log("info", "the controller is gone; the last table stays in force")
            controller.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a controller."""
        return self._controller is not None

    @property
    def remedy(self) -> str:
        """The end of a message that a replica is missing: what to do about it; empty while the controller does it."""
        gone = "; the proxy's controller is gone, and with it the tunnels that it held: `connect` takes over"
        return "" if self.is_connected else gone

    @property
    def has_news(self) -> bool:
        """Whether a batch may have something to say."""
        return bool(self._finished or self._packed or self._relay.book.turns or self._ended or self._unsent)

    def add_finished(self, turn: Turn) -> None:
        """Queue the end of a turn for the next batch."""
        self._finished.append(turn)
        if len(self._finished) >= PACKED_TURNS:
            self._pack()

    def _pack(self) -> None:
        """Encode the finished turns: many one after the other, while code and data are warm, yet few enough that no
        other connection waits for long; then nothing but the bytes is kept."""
        turns, self._finished = self._finished, []
        try:
            packed = self._relay.codec.encode([self._relay.book.finished_event(turn) for turn in turns])[1:-1]
        except Exception as error:  # noqa: BLE001 - a bug costs these figures, never the connection that brought them
            self._relay.log_bug("a turn's end", error)
            self.events_dropped += len(turns)
            return
        if turns:
            self._packed.append((packed, len(turns)))
        if len(self._packed) > MAX_BUFFERED_PACKS:
            self.events_dropped += self._packed.popleft()[1]

    def add_ended_session(self, event: SessionEnded) -> None:
        """Queue the end of a session for the next batch."""
        self._ended.append(event)

    def add_request(self, request: Mapping[str, str]) -> None:
        """Tell the controller what an operator asked for; it is lost when there is none."""
        payload = json.dumps(request).encode()
        self._relay.reactor.spawn(self.send, FRAME_REQUEST, payload)

    def flush(self) -> None:
        """Send what happened since the last batch; one that did not go out is sent before anything else."""
        while self._controller is not None:
            if not self._unsent:
                self._pack()
                packs = [self._packed.popleft()[0] for _ in range(min(BATCHED_PACKS, len(self._packed)))]
                # A turn that starts may go on from one that is still to be told as finished: that one goes first.
                # So do all turns of a session that ended.
                batch = self._relay.book.news() if not self._packed else EventBatch()
                ended = [self._ended.popleft() for _ in range(0 if self._packed else len(self._ended))]
                if not (packs or ended or batch.started or batch.sent or batch.answering):
                    return
                batch.finished, batch.session_ended = self._relay.codec.joined(packs), ended
                self._unsent = self._relay.codec.encode(batch)
            if not self.send(FRAME_EVENTS, self._unsent):
                return
            self._unsent = b""

    def send(self, kind: bytes, payload: bytes) -> bool:
        """Send one frame; whether a controller took it. Blocks this greenlet (alone) while the controller is slow."""
        with self._write_lock:
            controller = self._controller
            if controller is None:
                return False
            try:
                controller.sendall(encode_frame(kind, payload))
            except OSError:
                return False
        return True


class Questions:
    """What clients ask that only the controller knows: each question waits for its answer, QUESTION_S at most."""

    def __init__(self, channel: ControlChannel, reactor: Reactor) -> None:
        self._channel, self._reactor = channel, reactor
        self._waiting: dict[int, Any] = {}
        self._count = 0

    def ask(self, op: str, **details: Any) -> dict[str, Any] | None:
        """A FRAME_ANSWER; None without a controller, or when it says nothing in time. Blocks this greenlet."""
        self._count += 1
        number, result = self._count, self._reactor.new_result()
        self._waiting[number] = result
        try:
            question = json.dumps({"op": op, "id": number, **details}).encode()
            # Sent by a greenlet of its own: a controller that takes nothing must not hold this one beyond its time.
            self._reactor.spawn(self._channel.send, FRAME_REQUEST, question)
            answer: dict[str, Any] | None = result.wait(QUESTION_S) if self._channel.is_connected else None
            return answer
        finally:
            del self._waiting[number]

    def take(self, payload: bytes) -> None:
        """A FRAME_ANSWER has come; one that nobody waits for any more is left out."""
        answer = json.loads(payload)
        if (result := self._waiting.get(answer["id"])) is not None:
            result.set(answer)


class TurnBook:
    """Every turn from its beginning to its end, exactly once each: counters, events, the retry budget."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.count = 0  # turns that have begun
        self.counters = dict.fromkeys(("errors", "retries", "aborted", "rejected"), 0)
        self.turns: dict[str, Turn] = {}  # between begin and finish
        self._retry_tokens = RETRY_FLOOR
        self._bodies = KnownBodies(KNOWN_BODIES_BYTES)
        self._prefix = secrets.token_hex(6)

    def read(self, plan: RequestPlan, body: bytes | bytearray, peer: tuple[Any, ...]) -> tuple[Any, str]:
        """What a request's body says (of a form: None) and the model that it is for; RequestError when it is none that
        is served."""
        fields: Any = None
        if not plan.is_form:
            known = self._bodies.find(plan.labels.session or peer) if len(body) >= LONG_BODY_BYTES else None
            fields = self._relay.codec.request(body, known)
            if fields is None:
                raise RequestError(400, "the body is not a JSON object")
        return fields, self._model_of(plan.model, form_model(body) if fields is None else fields.model)

    def open(self, plan: RequestPlan, fields: Any, model: str, size: int, now: float) -> Turn:
        """A turn for a request whose body, of ``size`` bytes, was read; ``finish`` is then due."""
        self.count = count = self.count + 1
        name = f"{self._prefix}-{count}"
        self.turns[name] = turn = Turn(name, now, model, plan, self._relay.settings.proxy.capture_text)
        turn.tokens = size // 4
        if fields is not None:
            turn.words, turn.is_stream = fields, fields.stream is True
            if (options := fields.stream_options) is not None:
                turn.cuts_usage = not (isinstance(options, dict) and options.get("include_usage"))
        if self._retry_tokens < 10 * RETRY_FLOOR:
            self._retry_tokens += RETRY_SHARE
        return turn

    def read_words(self, turn: Turn, body: bytes | bytearray, peer: tuple[Any, ...]) -> None:
        """Look at what the body says: apart from ``begin``, because a replica can be at work meanwhile."""
        fields = turn.words
        if fields is None:
            return
        self._read_fields(turn, is_traced=len(body) <= MAX_TRACED_BYTES)
        if turn.prints and len(body) >= LONG_BODY_BYTES:
            conversation = turn.session or peer
            goes_on = getattr(fields, "before", None) is not None or self._bodies.find(conversation) is None
            # Where it does not, agents may share a connection: the next body is kept, not each in vain.
            self._bodies.keep(conversation, self._relay.codec.known_body(fields, body, turn) if goes_on else None)

    def _read_fields(self, turn: Turn, is_traced: bool = True) -> None:
        fields, turn.words = turn.words, None
        codec = self._relay.codec
        if turn.wanted_text:
            turn.prompt = codec.last_words(fields, turn.wanted_text)
        if is_traced:
            turn.prints, turn.follows = codec.trace(fields, turn.session is not None)

    def read_answer(self, turn: Turn) -> None:
        """Look at a whole answer that was passed on, and at the words of its request, once."""
        if turn.words is not None:
            self._read_fields(turn)
        if turn.answer:
            turn.digest = self._relay.codec.digest(turn.answer, turn.wanted_text, turn.follows is not None)
            turn.answer = b""

    def finish(self, turn: Turn, now: float) -> None:
        """The turn is over, whatever became of it: its slot, its counters, its last event. Once is enough."""
        if self.turns.pop(turn.id, None) is None:
            return
        turn.over = now
        turn.ended = turn.ended or now
        self._relay.pacing.has_turns = True
        self._relay.admission.settle(turn)
        counters = self.counters
        if turn.retries:
            counters["retries"] += turn.retries
        if turn.outcome != "completed":
            counters[{"aborted": "aborted", "rejected": "rejected"}.get(turn.outcome, "errors")] += 1
        self._relay.control.add_finished(turn)
        if turn.labels.ends_session and turn.session is not None:
            self.end_session(turn.session)

    def finished_event(self, turn: Turn) -> Any:
        """What the controller is told of a turn that is over. Made for many at once, which costs half of one by one."""
        self.read_answer(turn)
        digest = turn.digest or NO_DIGEST
        is_estimated = digest.completion_tokens is None and turn.events > 0
        estimate = max(0, turn.events - 2)  # the last two events carry the finish reason and [DONE]
        has_first = turn.first > 0.0
        # fmt: off
        return self._relay.codec.turn_finished(  # by position: in the order of TurnFinished
            turn.id, self._at(turn, turn.over), turn.outcome, turn.status, turn.backend,
            turn.queue_ms if turn.sent else (turn.over - turn.arrived) * 1000.0,
            (turn.first - turn.sent) * 1000.0 if has_first else None,
            (turn.ended - turn.sent) * 1000.0 if has_first else None,
            turn.retries, digest.prompt_tokens, estimate if is_estimated else digest.completion_tokens,
            digest.cached_tokens, is_estimated, digest.finish_reason, turn.error or digest.error,
            turn.gaps.by_name(), digest.text,
            self._key(turn, digest) if turn.follows is not None and turn.outcome == "completed" else None,
            self._started(turn),
        )
        # fmt: on

    def _key(self, turn: Turn, digest: AnswerDigest) -> str | None:
        return conversation_key(turn.prints[4:], digest.print) if digest.print is not None else None

    def end_session(self, session: str) -> None:
        self._relay.control.add_ended_session(SessionEnded(session, time.time()))

    def news(self) -> EventBatch:
        """What the controller was not told yet of the turns in flight; they count as told from here on."""
        started: list[Any] = []
        sent: list[TurnSent] = []
        answering: list[TurnAnswering] = []
        for turn in self.turns.values():
            if not turn.is_told:
                turn.is_told = True
                started.append(self._started(turn))
            if turn.sent != turn.told_sent and turn.backend is not None:
                turn.told_sent = turn.sent
                sent.append(TurnSent(turn.id, self._at(turn, turn.sent), turn.backend, turn.queue_ms))
            if turn.first and turn.first != turn.told_first:
                turn.told_first = turn.first
                answering.append(TurnAnswering(turn.id, self._at(turn, turn.first), (turn.first - turn.sent) * 1000.0))
        return EventBatch(started, sent, answering)

    def forget_told(self) -> None:
        """Nobody was told anything of the turns in flight."""
        for turn in self.turns.values():
            turn.is_told, turn.told_sent, turn.told_first = False, 0.0, 0.0

    def _started(self, turn: Turn) -> Any:
        if turn.words is not None:
            self._read_fields(turn)
        labels = turn.labels
        return self._relay.codec.turn_started(
            turn.id,
            turn.arrived_at,
            turn.model,
            turn.path.decode("ascii"),
            turn.session,
            labels.task,
            labels.client,
            turn.is_stream,
            labels.pre_ms,
            labels.post_ms,
            turn.prompt,
            turn.prints,
            turn.follows,
        )

    def answer_fields(self, turn: Turn) -> bytes:
        """The header lines that every answer to a turn carries."""
        backend = b""
        if turn.replica is not None:
            backend = turn.replica.answer_line
        elif turn.backend is not None:
            backend = b"x-agent-infra-backend: %b\r\n" % turn.backend.encode("ascii", "replace")
        return b"x-request-id: %b\r\n%bx-agent-infra-queue-ms: %d\r\n" % (turn.id.encode(), backend, turn.queue_ms)

    def take_retry(self) -> bool:
        """Whether the retry budget, a share of the requests, has one left; it is taken."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def _at(self, turn: Turn, moment: float) -> float:
        """A monotonic moment of a turn as seconds since the epoch, steady even when the clock is set."""
        return turn.arrived_at + (moment - turn.arrived)

    def _model_of(self, prefix: str | None, named: Any) -> str:
        if prefix is None and isinstance(named, str) and named in self._relay.models:
            return named
        if named is not None and not isinstance(named, str):
            raise RequestError(400, "model must be a string")
        if prefix is not None and named is not None and prefix != named:
            raise RequestError(400, f"the path names the model {prefix!r}, the body {named!r}")
        model = prefix if prefix is not None else named
        if model is None and len(self._relay.models) == 1:
            model = self._relay.models[0]
        if model is None:
            raise RequestError(400, f"name a model; served here: {', '.join(self._relay.models) or 'none'}")
        if model not in self._relay.models:
            message = (
                f"the model {model[:100]!r} does not exist; served here: {', '.join(self._relay.models) or 'none'}"
            )
            raise RequestError(404, message, code="model_not_found")
        return model

    def queue_status(self) -> dict[str, Any]:
        """What GET /queue/status says: how many wait, how many are with a replica, and the 50 that wait longest."""
        now, waiting = time.monotonic(), self._relay.admission.waiting()
        rows = [
            {
                "turn": turn.id,
                "session": turn.session,
                "model": turn.model,
                "waited_ms": round((now - turn.arrived) * 1000),
            }
            for turn in waiting[:50]
        ]
        return {
            "pending": len(waiting),
            "in_flight": len(self.turns) - len(waiting),
            "oldest_ms": rows[0]["waited_ms"] if rows else 0,
            "waiting": rows,
        }

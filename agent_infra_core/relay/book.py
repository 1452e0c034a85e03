"""The book of turns: what is known of each, counters, the retry budget, and the events for the controller."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.events import MAX_TRACED_BYTES, NO_DIGEST, AnswerDigest, EventStream, conversation_key
from agent_infra_core.protocol import NO_GAPS, EventBatch, Histogram, SessionEnded, TurnAnswering, TurnSent
from agent_infra_core.relay.bodies import KnownBodies, form_model, refuse_unsupported
from agent_infra_core.relay.requests import RequestPlan
from agent_infra_core.routing.affinity import Placement, SessionTurn
from agent_infra_core.routing.strategies import ANYWHERE, RouteRequest

if TYPE_CHECKING:
    from agent_infra_core.relay.replicas import LiveReplica
    from agent_infra_core.relay.server import Relay

KNOWN_BODIES_BYTES = 32 << 20
LONG_BODY_BYTES = 16 << 10  # remembering what was read of a shorter one isn't worth it
RESPONSES_PATH = b"/v1/responses"
RETRY_SHARE = 0.1  # of requests; the budget holds RETRY_FLOOR to ten times that
RETRY_FLOOR = 100.0


class Turn:
    """One request of a client on its way through the relay, and what tracking records of it.

    All times but ``arrived_at`` are monotonic.
    """

    __slots__ = (
        "__dict__", "answer", "arrived", "arrived_at", "backend", "cuts_usage", "digest", "ended", "first", "follows",
        "id", "is_stream", "labels", "model", "outcome", "over", "path", "placement", "prints", "prompt", "queue_ms",
        "replica", "routed", "sent", "session", "sharer", "status", "stream", "tokens", "wanted_text",
    )  # fmt: skip

    # Defaults that most turns keep: one that is set costs the turn a dictionary.
    route: RouteRequest = ANYWHERE
    wake: Callable[[], None]  # of its client, while it waits
    charged_s = 0.0  # service that its session was charged in advance, when it had to wait
    charged_from_s = 0.0  # service that its session had attained before that
    has_priority = False  # set by its client
    retries = 0
    deaths = 0  # replicas that died with it
    error: str | None = None
    gaps: Histogram = NO_GAPS
    is_reported = False  # reported to the controller; likewise the times below
    reported_sent = 0.0
    reported_first = 0.0
    refused_since = 0.0  # when a replica first answered 429 or 503
    gives_way = False  # its place in the queue goes to a client that waits with fewer turns
    cors = b""  # header lines for a web page that may read the answer
    key: str | None = None  # what its conversation is known by from now on; see TurnFinished
    held_since = 0.0  # since when it waits for room in a KV cache; 0: it doesn't
    held_ms = 0.0
    retry_ms = 0.0

    def __init__(self, name: str, model: str, plan: RequestPlan, wanted_text: int) -> None:
        self.id = name
        self.arrived = time.monotonic()
        self.arrived_at = time.time()  # s since the epoch
        self.model = model
        self.path = plan.path
        self.labels = labels = plan.labels
        self.session = labels.session
        self.wanted_text = wanted_text
        self.is_stream = False
        self.cuts_usage = True
        self.tokens = 0  # of the prompt, roughly
        self.sharer = ""  # see ClientConnection.identity
        self.routed: SessionTurn | None = None  # None: it belongs to no session
        self.placement: Placement | None = None  # while a replica is at work on it for its session
        self.replica: LiveReplica | None = None  # holds a slot for it
        self.backend: str | None = None
        self.sent = 0.0
        self.queue_ms = 0.0
        self.first = 0.0  # byte (of a stream: event) of the answer
        self.ended = 0.0
        self.over = 0.0  # when nothing was left to do for it
        self.status = 0
        self.outcome = "aborted"
        self.stream: EventStream | None = None  # a streamed answer
        self.answer = b""  # a plain answer, until it is read
        self.digest: AnswerDigest | None = None
        self.prompt = ""  # excerpt
        self.prints = b""  # see TurnStarted, like the next
        self.follows: str | None = None

    @property
    def is_anthropic(self) -> bool:
        return self.path.startswith(b"/v1/messages")

    def send_to(self, replica: LiveReplica, now: float) -> None:
        """Note that the request goes to ``replica``."""
        if self.sent:
            self.retry_ms += (now - self.sent) * 1000.0
        self.sent, self.backend = now, replica.id
        self.queue_ms = (now - self.arrived) * 1000.0

    def note_held(self, is_held: bool, now: float) -> None:
        """Note whether it waits for room in a KV cache. Later waits, before a retry, are part of ``retry_ms``."""
        if self.held_since and not self.sent:
            self.held_ms += (now - self.held_since) * 1000.0
        self.held_since = now if is_held else 0.0

    def answer_fields(self) -> bytes:
        """Return the header lines that every answer to the turn carries."""
        backend = b"x-agent-infra-backend: %b\r\n" % self.backend.encode("ascii", "replace") if self.backend else b""
        lines = b"x-request-id: %b\r\n%bx-agent-infra-queue-ms: %d\r\n%b"
        return lines % (self.id.encode(), backend, self.queue_ms, self.cors)


class TurnBook:
    """Owns every turn from its beginning to its end: counts each exactly once, and reports it to the controller."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.count = 0  # turns that have begun
        self.finished = 0  # turns that are over
        self.counters = dict.fromkeys(("errors", "retries", "aborted", "rejected"), 0)
        self.turns: dict[str, Turn] = {}  # between begin and finish
        self._retry_tokens = RETRY_FLOOR
        self._bodies = KnownBodies(KNOWN_BODIES_BYTES)
        self._prefix = secrets.token_hex(6)

    def open(self, plan: RequestPlan, body: bytes | bytearray, peer: tuple[Any, ...]) -> Turn:
        """Return a turn for a request, with all that its body says; ``finish`` is then due. Raises RequestError."""
        fields: Any = None
        if not plan.is_form:
            may_continue = len(body) >= LONG_BODY_BYTES and plan.path != RESPONSES_PATH
            known = self._bodies.find(plan.labels.session or peer) if may_continue else None
            fields = self._relay.codec.request(body, known)
            if fields is None:
                raise RequestError(400, "the body is not a JSON object")
        model = self._model_of(plan.model, form_model(body) if fields is None else fields.model)
        if (pool := self._relay.pools.get(model)) and (lacks := pool[0].backend.lacks) and fields is not None:
            refuse_unsupported(fields, lacks)
        name = f"{self._prefix}-{self.count + 1}"
        turn = Turn(name, model, plan, self._relay.settings.proxy.capture_text)
        turn.tokens = len(body) // 4
        if b"origin" in plan.request.fields:
            turn.cors = self._relay.access.cors_fields(plan.request)
        if self._retry_tokens < 10 * RETRY_FLOOR:
            self._retry_tokens += RETRY_SHARE
        if fields is not None:
            self._read_fields(turn, fields, body, peer)
        self.count += 1
        self.turns[name] = turn
        return turn

    def _read_fields(self, turn: Turn, fields: Any, body: bytes | bytearray, peer: tuple[Any, ...]) -> None:
        turn.is_stream = fields.stream is True
        if fields.priority is not None:
            turn.has_priority = True
        if (options := fields.stream_options) is not None:
            turn.cuts_usage = not (isinstance(options, dict) and options.get("include_usage"))
        codec = self._relay.codec
        if turn.wanted_text:
            turn.prompt = codec.prompt_excerpt(fields, turn.wanted_text)
        sessions = self._relay.admission.sessions
        if turn.path == RESPONSES_PATH and isinstance(fields.previous_response_id, str):
            sessions.find_holder(turn, fields.previous_response_id)
        elif len(body) <= MAX_TRACED_BYTES:
            is_named = turn.session is not None
            if turn.path == RESPONSES_PATH:
                turn.prints, turn.follows = codec.trace_response(fields, is_named)
            else:
                known = len(fields.before.start) if getattr(fields, "before", None) is not None else 0
                has_marks = body.find(b'"cache_control"', known) >= 0
                turn.prints, turn.follows = codec.trace(fields, is_named, has_marks)
        sessions.identify(turn, *codec.shared_prefix(fields, turn.prints))
        if turn.prints and len(body) >= LONG_BODY_BYTES and turn.path != RESPONSES_PATH:
            conversation = turn.session or peer
            goes_on = getattr(fields, "before", None) is not None or self._bodies.find(conversation) is None
            # Otherwise several agents may share a connection: keep only every other body.
            self._bodies.keep(conversation, codec.known_body(fields, body, turn) if goes_on else None)

    def refused(self, refusal: RequestError, plan: RequestPlan | None) -> bytes:
        """Count a request that is refused before it is a turn. Returns the header lines of its answer."""
        self.counters["rejected"] += 1
        name = f"{self._prefix}-r{self.counters['rejected']}"
        self._relay.refusals.note(f"refused {name}: {refusal.status} {refusal}")
        cors = self._relay.access.cors_fields(plan.request) if plan is not None else b""
        return b"x-request-id: %b\r\n%b" % (name.encode(), cors)

    def read_answer(self, turn: Turn) -> None:
        """Read what tracking needs of the answer that was passed on, once."""
        if turn.stream is not None and turn.digest is None:
            turn.digest = turn.stream.digest()
        if turn.answer:
            turn.digest = self._relay.codec.digest(turn.answer, turn.wanted_text, turn.follows is not None)
            turn.answer = b""

    def finish(self, turn: Turn) -> None:
        """Record the end of a turn, whatever its outcome: counters and the last event. Safe to call again."""
        if self.turns.pop(turn.id, None) is None:
            return
        turn.over = time.monotonic()
        turn.ended = turn.ended or turn.over
        self.finished += 1
        self._read_outcome(turn)
        counters = self.counters
        if turn.retries:
            counters["retries"] += turn.retries
        if turn.outcome != "completed":
            if turn.status >= 429 or turn.outcome == "cut":
                words = f"{turn.outcome} {turn.id} at {turn.backend}: {turn.status} {turn.error or ''}"
                self._relay.refusals.note(words)
            counters[{"aborted": "aborted", "rejected": "rejected"}.get(turn.outcome, "errors")] += 1
        try:
            self._relay.control.add_finished(self._relay.codec.encode(self._finished_event(turn)))
        except Exception as error:  # noqa: BLE001 - a bug costs these figures, never the connection that brought them
            self._relay.log_bug("a turn's end", error)
            self._relay.control.events_dropped += 1
        if turn.labels.ends_session and turn.session is not None:
            self.end_session(turn.session)

    def _read_outcome(self, turn: Turn) -> None:
        """Read the answer: an error in it makes the turn a failed one. Routing learns from the rest."""
        admission = self._relay.admission
        admission.charge(turn)
        try:
            self.read_answer(turn)
            if turn.outcome == "completed" and turn.digest is not None and turn.digest.error:
                turn.outcome, turn.error = "error", turn.digest.error
            printed = turn.digest.print if turn.digest is not None else None
            if printed is not None and turn.prints and turn.follows is not None and turn.outcome == "completed":
                turn.key = conversation_key(turn.prints[4:], printed)
            admission.sessions.finish(turn, turn.key)
        except Exception as error:  # noqa: BLE001 - a bug costs these figures, never the connection that brought them
            self._relay.log_bug("an answer's figures", error)

    def _finished_event(self, turn: Turn) -> Any:
        digest, events = turn.digest or NO_DIGEST, turn.stream.events if turn.stream is not None else 0
        is_estimated = digest.completion_tokens is None and events > 0
        estimate = max(0, events - 2)  # the last two events carry the finish reason and [DONE]
        has_first = turn.first > 0.0
        # fmt: off
        return self._relay.codec.turn_finished(  # by position: in the order of TurnFinished
            turn.id, self._at(turn, turn.over), turn.outcome, turn.status, turn.backend,
            turn.queue_ms if turn.sent else (turn.over - turn.arrived) * 1000.0,
            (turn.first - turn.sent) * 1000.0 if has_first else None,
            (turn.ended - turn.sent) * 1000.0 if has_first else None,
            turn.retries, digest.prompt_tokens, estimate if is_estimated else digest.completion_tokens,
            digest.cached_tokens, is_estimated, digest.finish_reason, turn.error or digest.error,
            turn.gaps.by_name(), digest.text, turn.key, self._started(turn), turn.held_ms, turn.retry_ms,
        )
        # fmt: on

    def end_session(self, session: str) -> None:
        """A session is over, its agent says."""
        self._relay.admission.sessions.end(session)
        self._relay.control.add_ended_session(SessionEnded(session, time.time()))

    def news(self) -> EventBatch:
        """Return what is new about the turns in flight, and mark it as reported."""
        started: list[Any] = []
        sent: list[TurnSent] = []
        answering: list[TurnAnswering] = []
        for turn in self.turns.values():
            if not turn.is_reported:
                turn.is_reported = True
                started.append(self._started(turn))
            if turn.sent != turn.reported_sent and turn.backend is not None:
                turn.reported_sent = turn.sent
                sent.append(TurnSent(turn.id, self._at(turn, turn.sent), turn.backend, turn.queue_ms))
            if turn.first and turn.first != turn.reported_first:
                turn.reported_first = turn.first
                answering.append(TurnAnswering(turn.id, self._at(turn, turn.first), (turn.first - turn.sent) * 1000.0))
        return EventBatch(started, sent, answering)

    def forget_reported(self) -> None:
        """Mark nothing as reported, because a new controller came."""
        for turn in self.turns.values():
            turn.is_reported, turn.reported_sent, turn.reported_first = False, 0.0, 0.0

    def _started(self, turn: Turn) -> Any:
        labels = turn.labels
        # fmt: off
        return self._relay.codec.turn_started(  # by position: in the order of TurnStarted
            turn.id, turn.arrived_at, turn.model, turn.path.decode("ascii"), turn.session, labels.task, labels.client,
            turn.is_stream, labels.pre_ms, labels.post_ms, turn.prompt, turn.prints, turn.follows, labels.run,
            labels.is_retry,
        )
        # fmt: on

    def spend_retry(self) -> bool:
        """Take one retry from the budget, a share of the requests. Returns False if it is spent."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def _at(self, turn: Turn, moment: float) -> float:
        """Return a monotonic moment of a turn in seconds since the epoch, steady even if the clock is set."""
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
            if (base := self._relay.adapters().get(model)) is not None:
                return base
            message = (
                f"the model {model[:100]!r} does not exist; served here: {', '.join(self._relay.models) or 'none'}"
            )
            raise RequestError(404, message, code="model_not_found")
        return model

    def queue_status(self) -> dict[str, Any]:
        """Return GET /queue/status: how many turns wait, how many are with a replica, and the 50 that wait longest."""
        now, waiting, sessions = time.monotonic(), self._relay.admission.waiting(), self._relay.admission.sessions
        rows: list[dict[str, Any]] = []
        for turn in waiting[:50]:
            waited_ms = round((now - turn.arrived) * 1000)
            rows.append({"turn": turn.id, "session": turn.session, "model": turn.model, "waited_ms": waited_ms})
            if (why := sessions.why_held(turn, now)) is not None:
                rows[-1] |= {"held": True, "why": why}
        return {
            "pending": len(waiting),
            "held": sum(sessions.is_held(turn, now) for turn in waiting),
            "in_flight": len(self.turns) - len(waiting),
            "oldest_ms": rows[0]["waited_ms"] if rows else 0,
            "waiting": rows,
        }

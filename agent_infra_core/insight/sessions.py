"""The table of sessions: which session a turn belongs to, the context it left on a replica, when it ends. Pure."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from agent_infra_core.insight.rates import RECENT_S
from agent_infra_core.insight.turns import CachedContext, TurnRecord, add_known, generates
from agent_infra_core.protocol import TurnStarted

LISTED_SESSIONS = 200  # in /stats: the most recently active
LISTED_ENDED = 50  # and this many ended sessions
# A session is alive while a turn is open, and then while its silence is no longer than so many times its mean think
# time, and than so many seconds. The page tells "thinking" from "silent" by the same two.
THINKING_FACTOR, THINKING_LEAST_S = 4.0, 30.0
OVERLAP_TOLERANCE_S = 0.01  # turns that overlap by more than this were open together; less is clock noise
KEPT_PRINTS = 257  # of a session's last request: one for the part before the messages, 256 for the first messages


@dataclass(slots=True)
class Session:
    """A session; takes about 1 KB, however many turns it has. Sums are over its turns."""

    id: str
    task: str | None
    client: str | None
    model: str
    last_seen: float  # s since the epoch
    backend: str | None = None
    started_at: float | None = None  # s since the epoch; arrival of its first turn
    turns: int = 0  # finished, with any outcome
    errors: int = 0  # outcome error or cut; likewise the next three
    completed: int = 0
    aborted: int = 0
    rejected: int = 0
    open_turns: int = 0
    last_turn: str = ""  # the one that finished last
    last_end: float | None = None  # when that was, in s since the epoch
    pre_ms: float | None = None
    wait_ms: float | None = None
    inference_ms: float | None = None
    post_ms: float | None = None
    unaccounted_ms: float | None = None
    thinks: int = 0  # number of known think times
    think_ms: float | None = None  # their sum
    longest_think_ms: float = 0.0  # decays, so that an early one doesn't count forever
    context_tokens: int | None = None  # prompt and answer of the last generation that reported tokens
    prompt_tokens: int | None = None  # of the same turn, like the next four
    cached_tokens: int | None = None
    held_by: str | None = None  # replica that should have the context in its cache
    held_model: str = ""  # turns of another model can't use the context
    prints: bytes = b""  # of that turn's request, at most KEPT_PRINTS
    cache_misses: int = 0
    last_miss: str | None = None
    last_backend: str | None = None  # of the last generation
    last_model: str = ""  # of the same turn
    moves: int = 0  # changes of replica between consecutive turns of the same model
    recent_moves: int = 0  # bit mask: which of the last 8 turns were moves
    tokens_in: int | None = None  # None until a turn reports them
    tokens_out: int | None = None
    cached_sum: int | None = None  # cached tokens of all turns
    signature: int = 0  # of the last turn; identical turns have the same signature
    repeats: int = 1  # consecutive turns with this signature
    alerts: dict[str, float] = field(default_factory=dict)  # kind → since, s since the epoch

    def is_open(self, arrival: float) -> bool:
        """Whether a turn was open at ``arrival``, including one that ended later but has been reported already."""
        return bool(self.open_turns) or (self.last_end is not None and arrival < self.last_end - OVERLAP_TOLERANCE_S)

    def is_alive(self, now: float) -> bool:
        """Whether a turn is open, or the silence since its last sign of life is one of an agent that thinks."""
        usual_s = (self.think_ms or 0.0) / 1000 / max(1, self.turns - 1)
        return bool(self.open_turns) or now - self.last_seen <= max(THINKING_LEAST_S, THINKING_FACTOR * usual_s)

    def think_time_ms(self, arrival: float) -> float | None:
        """Time from the previous answer's end to ``arrival``; None for a first turn or while another turn is open."""
        if self.last_end is None or self.is_open(arrival):
            return None
        return max(0.0, arrival - self.last_end) * 1000

    def held(self, started: TurnStarted, arrival: float) -> CachedContext | None:
        """The context that should be cached for a starting turn; None if unknown or while another turn is open."""
        if self.context_tokens is None or self.prompt_tokens is None or self.is_open(arrival):
            return None
        if started.model != self.held_model or not generates(started.path):
            return None
        computed = self.context_tokens - (self.context_tokens > self.prompt_tokens)
        return CachedContext(self.held_by, self.prompt_tokens, computed, self.prints)

    def think(
        self, think_ms: float | None, pre_ms: float | None, post_ms: float | None, unaccounted_ms: float | None
    ) -> None:
        """Add the known times around an answer."""
        if think_ms is not None:
            self.thinks += 1
            self.think_ms = (self.think_ms or 0.0) + think_ms
            self.longest_think_ms = max(0.95 * self.longest_think_ms, think_ms)
        self.pre_ms = add_known(self.pre_ms, pre_ms)
        self.post_ms = add_known(self.post_ms, post_ms)
        self.unaccounted_ms = add_known(self.unaccounted_ms, unaccounted_ms)

    def restore(self, record: TurnRecord, at: float) -> None:
        """Add a finished turn of an earlier controller, with its think time."""
        self.think(record.think_ms, record.pre_ms, record.post_ms, record.unaccounted_ms)
        self.finish(record, at)

    def finish(self, record: TurnRecord, at: float, prints: bytes = b"") -> None:
        """Add a finished turn, except for its think time. ``prints`` are those of its request."""
        self.turns += 1
        self.errors += record.outcome in ("error", "cut")
        self.completed += record.outcome == "completed"
        self.aborted += record.outcome == "aborted"
        self.rejected += record.outcome == "rejected"
        begun = at if record.started_at is None else record.started_at
        self.started_at = begun if self.started_at is None else min(begun, self.started_at)
        self.last_turn, self.last_end = record.turn, max(at, self.last_end or at)
        self._note_repeat(record, prints)
        self.backend = record.backend or self.backend
        self.wait_ms = add_known(self.wait_ms, record.queue_ms)
        self.inference_ms = add_known(self.inference_ms, record.inference_ms)
        self.tokens_in = add_known(self.tokens_in, record.prompt_tokens)
        self.tokens_out = add_known(self.tokens_out, record.completion_tokens)
        self.cached_sum = add_known(self.cached_sum, record.cached_tokens)
        if record.cache_miss is not None:
            self.cache_misses += 1
            self.last_miss = record.cache_miss
        if generates(record.path):
            self._note_context(record, prints)

    def _note_context(self, record: TurnRecord, prints: bytes) -> None:
        """Record where a turn was generated and the context it left there."""
        model = record.model or ""
        if record.backend is not None:
            is_move = model == self.last_model and self.last_backend not in (None, record.backend)
            self.moves += is_move
            self.recent_moves = (self.recent_moves << 1 | is_move) & 0xFF
            self.last_backend, self.last_model = record.backend, model
        if record.prompt_tokens is not None:
            self.context_tokens = record.prompt_tokens + (record.completion_tokens or 0)
            self.prompt_tokens, self.cached_tokens = record.prompt_tokens, record.cached_tokens
            self.held_by, self.held_model, self.prints = record.backend, model, prints[: 4 * KEPT_PRINTS]

    def _note_repeat(self, record: TurnRecord, prints: bytes) -> None:
        grown = record.prompt_tokens - (self.context_tokens or 0) if record.prompt_tokens is not None else None
        said = record.prompt or prints[-4:]
        signature = hash((record.outcome, said, record.answer, record.completion_tokens, grown)) if said else 0
        self.repeats = self.repeats + 1 if signature and signature == self.signature else 1
        self.signature = signature


def split_client(client: str | None) -> tuple[str | None, str | None]:
    """Split a client's name into ``(id, command)``: ``id`` or ``id command…``, as made by describe_client()."""
    name, _, command = (client or "").strip().partition(" ")
    return name or None, command.strip() or None


def split_think_time(
    gap_ms: float | None, pre_ms: float | None, post_ms: float | None
) -> tuple[float | None, float | None]:
    """``(pre, unaccounted)`` of a turn, in ms, from the think time before it and the client's reported times.

    If the client reported nothing, the whole gap is pre, and nothing is unaccounted for.
    """
    if pre_ms is None and post_ms is None:
        return gap_ms, None
    if gap_ms is None:
        return pre_ms, None
    return pre_ms, max(0.0, gap_ms - (pre_ms or 0.0) - (post_ms or 0.0))


class SessionTable:
    """The live sessions, most recently active last: at most ``max_live``, none idle for ``idle_s`` or longer.

    Also keeps the LISTED_ENDED latest ended sessions for display.
    """

    def __init__(self, max_live: int, idle_s: float) -> None:
        self._max_live = max_live
        self._idle_s = idle_s
        self._live: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self._over: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self.ended = 0  # by the agent or because they were idle
        self.evicted = 0  # because the table was full

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._live.values())

    def open(self, name: str | None, turn: TurnStarted | TurnRecord, at: float) -> Session | None:
        """The session ``name`` of a turn, created if it is new; None for a turn without a session.

        A turn without a session is a session of its own that ends with its answer. It is counted everywhere but here.
        """
        if not name:
            return None
        session = self._live.get(name)
        if session is None:
            session = self._over.pop(name, None) or Session(name, turn.task, turn.client, turn.model or "", at)
            self._live[session.id] = session
            if len(self._live) > self._max_live:
                self._live.popitem(last=False)
                self.evicted += 1
        session.task, session.client = turn.task or session.task, turn.client or session.client
        session.model = turn.model or session.model
        return session

    def touch(self, session: Session, at: float) -> None:
        """Mark ``session`` as active at ``at``."""
        session.last_seen = max(at, session.last_seen)
        if self._live.get(session.id) is session:  # otherwise it has ended, but its last turn is still running
            self._live.move_to_end(session.id)

    def end(self, name: str) -> None:
        """End a session. If the agent resumes it soon, it continues where it was."""
        session = self._live.pop(name, None)
        if session is not None:
            self.ended += 1
            self._over[name] = session
            if len(self._over) > LISTED_ENDED:
                self._over.popitem(last=False)

    def expire(self, now: float) -> None:
        """End the sessions that have been idle too long."""
        silent = itertools.takewhile(lambda session: session.last_seen <= now - self._idle_s, self._live.values())
        for session in [session for session in silent if not session.open_turns]:
            self.end(session.id)

    def settle(self, now: float, ended: Iterable[str]) -> None:
        """Finish a restore: end the sessions in ``ended`` and reset the counters."""
        self.expire(now)
        for name in ended:
            self.end(name)
        self.ended = self.evicted = 0

    def latest(self, limit: int) -> list[Session]:
        """The most recently active live sessions, latest first."""
        return list(itertools.islice(reversed(self._live.values()), limit))

    def find(self, name: str) -> tuple[Session | None, bool]:
        """The session ``name``, and whether it has ended."""
        return (self._live.get(name) or self._over.get(name)), name not in self._live

    def latest_ended(self) -> list[Session]:
        """The sessions that ended last, latest first."""
        return list(reversed(self._over.values()))

    def silences(self, now: float) -> Iterator[tuple[str, str | None, int, float]]:
        """See Tracker.silences."""
        for session in self:
            last = session.last_end if session.last_end is not None else session.last_seen
            yield session.model, session.backend, session.open_turns, max(0.0, now - last)

    def counts(self, now: float) -> dict[str, int]:
        """``sessions`` of /stats."""
        return {
            "live": len(self),
            "alive": sum(session.is_alive(now) for session in self),
            "active": self.count_active(now),
            "listed": min(len(self), LISTED_SESSIONS),
            "ended": self.ended,
            "evicted": self.evicted,
        }

    def count_active(self, now: float) -> int:
        """Number of sessions with a turn in flight or activity in the last RECENT_S seconds."""
        return sum(1 for session in self if session.open_turns or session.last_seen > now - RECENT_S)

"""The table of sessions: whose a turn is, what context it left on a replica, when a session ends. Pure."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from agent_infra_core.insight.rates import RECENT_S
from agent_infra_core.insight.turns import HeldContext, TurnRecord, add_known, generates
from agent_infra_core.protocol import TurnStarted

LISTED_SESSIONS = 200  # in /stats: those heard of last
LISTED_ENDED = 50  # beside those, of the sessions that are over
BESIDE_S = 0.01  # a turn that arrives longer before another's end was open beside it; less is the clocks' noise
MAX_CONVERSATIONS = 50_000  # answers by which a session that its client does not name is found
KEPT_PRINTS = 257  # of a session's last request: of what stands before the messages, and of the first 256


@dataclass(slots=True)
class Session:
    """What is known of a live session; about 1 KB, whatever the number of its turns. Sums are over its turns."""

    id: str
    task: str | None
    client: str | None
    model: str
    last_seen: float  # s since the epoch
    backend: str | None = None
    turns: int = 0  # finished, whatever became of them
    errors: int = 0
    open_turns: int = 0
    last_turn: str = ""  # the one that finished last
    last_end: float | None = None  # s since the epoch: when that was
    pre_ms: float | None = None
    wait_ms: float | None = None
    inference_ms: float | None = None
    post_ms: float | None = None
    unaccounted_ms: float | None = None
    thinks: int = 0  # think times known
    longest_think_ms: float = 0.0  # fading: an early one does not count for ever
    context_tokens: int | None = None  # prompt and answer of the last turn that generated and told
    prompt_tokens: int | None = None  # of the same turn, like the next four
    cached_tokens: int | None = None
    held_by: str | None = None  # the replica that should have its context in the cache
    held_model: str = ""  # which another model's turn cannot use
    prints: bytes = b""  # of the request of that turn, KEPT_PRINTS at most
    cache_misses: int = 0
    last_miss: str | None = None
    last_backend: str | None = None  # that finished a turn which generated
    last_model: str = ""  # of the same turn
    moves: int = 0  # changes of the replica, from one turn to the next of the same model
    recent_moves: int = 0  # whether each of the last 8 turns was one, in bits
    tokens_in: int = 0
    tokens_out: int = 0
    signature: int = 0  # of the last turn; likewise turns have likewise signatures
    repeats: int = 1  # turns in a row with this signature
    alerts: dict[str, float] = field(default_factory=dict)  # kind → since, s since the epoch

    def is_open(self, arrival: float) -> bool:
        """Whether a turn was open at ``arrival``; true also for one that ended after it but was reported first."""
        return bool(self.open_turns) or (self.last_end is not None and arrival < self.last_end - BESIDE_S)

    def think_time_ms(self, arrival: float) -> float | None:
        """From the previous answer's end to ``arrival``; None for a first turn, or while another one is open."""
        if self.last_end is None or self.is_open(arrival):
            return None
        return max(0.0, arrival - self.last_end) * 1000

    def held(self, started: TurnStarted, arrival: float) -> HeldContext | None:
        """What should be cached for a turn that starts; None when it is not known, or changes at this moment."""
        if self.context_tokens is None or self.prompt_tokens is None or self.is_open(arrival):
            return None
        if started.model != self.held_model or not generates(started.path):
            return None
        computed = self.context_tokens - (self.context_tokens > self.prompt_tokens)
        return HeldContext(self.held_by, self.prompt_tokens, computed, self.prints)

    def think(
        self, think_ms: float | None, pre_ms: float | None, post_ms: float | None, unaccounted_ms: float | None
    ) -> None:
        """Add what is known of the time around an answer."""
        if think_ms is not None:
            self.thinks += 1
            self.longest_think_ms = max(0.95 * self.longest_think_ms, think_ms)
        self.pre_ms = add_known(self.pre_ms, pre_ms)
        self.post_ms = add_known(self.post_ms, post_ms)
        self.unaccounted_ms = add_known(self.unaccounted_ms, unaccounted_ms)

    def finish(self, record: TurnRecord, at: float, prints: bytes = b"") -> None:
        """Add what a finished turn says, but for its think time; ``prints`` are those of its request."""
        self.turns += 1
        self.errors += record.outcome in ("error", "cut")
        self.last_turn, self.last_end = record.turn, max(at, self.last_end or at)
        self._note_repeat(record, prints)
        self.backend = record.backend or self.backend
        self.wait_ms = add_known(self.wait_ms, record.queue_ms)
        self.inference_ms = add_known(self.inference_ms, record.inference_ms)
        self.tokens_in += record.prompt_tokens or 0
        self.tokens_out += record.completion_tokens or 0
        if record.cache_miss is not None:
            self.cache_misses += 1
            self.last_miss = record.cache_miss
        if generates(record.path):
            self._note_context(record, prints)

    def _note_context(self, record: TurnRecord, prints: bytes) -> None:
        """Where a turn generated, and what it left there."""
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
    """``(id, command)`` of what a client calls itself: ``id`` or ``id command…``, as describe_client() says it."""
    name, _, command = (client or "").strip().partition(" ")
    return name or None, command.strip() or None


def split_think_time(
    gap_ms: float | None, pre_ms: float | None, post_ms: float | None
) -> tuple[float | None, float | None]:
    """``(pre, unaccounted)`` of a turn, in ms, from the think time before it and what its client reported of that.

    A gap of which the client reported nothing is pre as a whole, and nothing of it is unaccounted for.
    """
    if pre_ms is None and post_ms is None:
        return gap_ms, None
    if gap_ms is None:
        return pre_ms, None
    return pre_ms, max(0.0, gap_ms - (pre_ms or 0.0) - (post_ms or 0.0))


class SessionTable:
    """The live sessions, the one heard of last at the end; at most ``max_live``, none idle for ``idle_s`` or more.

    Of those that are over, the LISTED_ENDED latest are kept for people to look at.
    """

    def __init__(self, max_live: int, idle_s: float) -> None:
        self._max_live = max_live
        self._idle_s = idle_s
        self._live: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self._over: collections.OrderedDict[str, Session] = collections.OrderedDict()
        self.ended = 0  # by the agent or by idleness
        self.evicted = 0  # for want of room

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._live.values())

    def open(self, name: str | None, turn: TurnStarted | TurnRecord, at: float) -> Session | None:
        """The session ``name``, that a turn belongs to, made where it is new; None for a turn of no session.

        Such a turn is a session of its own, and over with its answer: it is counted everywhere but here.
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
        """``session`` was heard of."""
        session.last_seen = max(at, session.last_seen)
        if self._live.get(session.id) is session:  # else it has ended since, and its last turn is still running
            self._live.move_to_end(session.id)

    def end(self, name: str) -> None:
        """This session is over; it goes on where it was if the agent takes it up again soon."""
        session = self._live.pop(name, None)
        if session is not None:
            self.ended += 1
            self._over[name] = session
            if len(self._over) > LISTED_ENDED:
                self._over.popitem(last=False)

    def expire(self, now: float) -> None:
        """End the sessions that are idle for too long."""
        silent = itertools.takewhile(lambda session: session.last_seen <= now - self._idle_s, self._live.values())
        for session in [session for session in silent if not session.open_turns]:
            self.end(session.id)

    def settle(self, now: float, ended: Iterable[str]) -> None:
        """Finish a restore: these sessions had ``ended``; the counters begin at 0."""
        self.expire(now)
        for name in ended:
            self.end(name)
        self.ended = self.evicted = 0

    def latest(self, limit: int) -> list[Session]:
        """The live sessions heard of last, latest first."""
        return list(itertools.islice(reversed(self._live.values()), limit))

    def find(self, name: str) -> tuple[Session | None, bool]:
        """The session ``name``, and whether it is over."""
        return (self._live.get(name) or self._over.get(name)), name not in self._live

    def latest_ended(self) -> list[Session]:
        """The sessions that ended last, latest first."""
        return list(reversed(self._over.values()))

    def silences(self, now: float) -> Iterator[tuple[str, str | None, int, float]]:
        """Tracker.silences."""
        for session in self:
            last = session.last_end if session.last_end is not None else session.last_seen
            yield session.model, session.backend, session.open_turns, max(0.0, now - last)

    def counts(self, now: float) -> dict[str, int]:
        """``sessions`` of /stats."""
        return {
            "live": len(self),
            "active": self.count_active(now),
            "listed": min(len(self), LISTED_SESSIONS),
            "ended": self.ended,
            "evicted": self.evicted,
        }

    def count_active(self, now: float) -> int:
        """How many sessions have a turn in flight or were heard of in the last RECENT_S seconds."""
        return sum(1 for session in self if session.open_turns or session.last_seen > now - RECENT_S)


class Conversations:
    """Finds the session of a turn whose client names none: the one that gave the answer which the turn goes on from.

    Exact matches only. An answer that a turn goes on from is nobody else's while that turn is open, nor once it is
    completed; so several turns from one answer at a time are sessions of their own, and so is a turn from an answer
    that several sessions gave. Bounded: MAX_CONVERSATIONS answers, the longest unused is forgotten.
    """

    def __init__(self) -> None:
        self._sessions: collections.OrderedDict[str, str | None] = collections.OrderedDict()  # None: several gave it

    def session_of(self, turn: TurnStarted) -> str | None:
        """The session of a turn that starts, a new one where none is found; None where there is nothing to go by."""
        if turn.session or turn.follows is None:
            return turn.session
        if (found := self._sessions.get(turn.follows)) is None:
            return f"auto-{turn.turn}"
        del self._sessions[turn.follows]
        return found

    def answered(self, key: str, session: str) -> None:
        """A session gave, or gave again, the answer that ``key`` stands for."""
        self._sessions[key] = session if self._sessions.get(key, session) == session else None
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_CONVERSATIONS:
            self._sessions.popitem(last=False)

    def finish(self, started: TurnStarted, key: str | None, session: str) -> None:
        """A turn that was followed is over; one without an answer leaves the one before for another try."""
        if key is not None:
            self.answered(key, session)
        elif started.follows and session != f"auto-{started.turn}":
            self.answered(started.follows, session)

"""Turns from the first event to the finished record, and why tokens weren't cached. Pure."""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from agent_infra_core.protocol import MAX_FIGURE, TurnAnswering, TurnFinished, TurnSent, TurnStarted

if TYPE_CHECKING:
    from agent_infra_core.insight.sessions import Session

Number = TypeVar("Number", int, float)

MAX_OPEN_TURNS = 50_000  # above this, and after MAX_TURN_S, the oldest is dropped (its finish still counts in totals)
MAX_TURN_S = 6 * 3600.0
FINISHED_TURNS_REMEMBERED = 10_000  # ids kept to recognise a second finish, or a start after the finish
KEPT_TURNS = 5_000  # records of finished turns, about 1 KB each, for the details of a session
MAX_UNTAKEN_TURNS = 20_000  # records that wait for take_records(); above this, the oldest is dropped
MISS_TOKENS = 64  # fewer missing tokens aren't a miss: engines cache whole blocks, and templates add text
MISS_SHARE = 0.1  # the same, as a share of the expected tokens


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number valid as a time, duration or count. NaN fails the comparison."""
    return type(value) in (int, float) and 0 <= value <= MAX_FIGURE


def rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 2)


def in_seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def add_known(total: Number | None, value: Number | None) -> Number | None:
    """``total + value``, where None means unknown; None if both are unknown."""
    if total is None or value is None:
        return value if total is None else total
    return total + value


@dataclass(slots=True)
class TurnRecord:
    """The record of one finished turn. Times are s since the epoch; None means unknown.

    ``post_ms`` arrives with the session's next request. Fields from the turn's start are None if the start was lost.
    """

    turn: str
    finished_at: float
    outcome: str  # completed | error | cut | aborted | rejected, see TurnFinished
    status: int
    session: str | None = None
    task: str | None = None
    client: str | None = None
    model: str | None = None
    path: str | None = None
    stream: bool | None = None
    backend: str | None = None
    started_at: float | None = None
    retries: int = 0
    think_ms: float | None = None  # previous answer's end → arrival
    pre_ms: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    inference_ms: float | None = None
    post_ms: float | None = None
    unaccounted_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    expected_cached_tokens: int | None = None
    cache_miss: str | None = None  # why fewer tokens were cached than expected, as text
    tokens_estimated: bool = False
    finish_reason: str | None = None
    error: str | None = None
    prompt: str = ""
    answer: str = ""
    key: str | None = None  # conversation_key up to and including this answer
    held_ms: float | None = None  # of queue_ms: waiting for room in a KV cache
    retry_ms: float | None = None  # of queue_ms: from the first to the last time that it was sent

    def row(self) -> dict[str, Any]:
        """The row in /stats: all fields, durations rounded."""
        row = {name: getattr(self, name) for name in self.__slots__}
        for name in _DURATIONS:
            row[name] = rounded(row[name])
        return row


_DURATIONS = tuple(name for name in TurnRecord.__slots__ if name.endswith("_ms"))


@dataclass(slots=True)
class CachedContext:
    """The context a replica should have in its cache for a session's next turn."""

    backend: str | None
    prompt_tokens: int  # of the last prompt
    tokens: int  # of the last prompt and answer, minus the last token, which was sampled but not computed
    prints: bytes  # of the last request, at most KEPT_PRINTS


def generates(path: str | None) -> bool:
    """Whether turns on this path continue a context; embeddings, rerank, tokenize and so on don't."""
    return (path or "completions").endswith(("completions", "responses", "messages"))


def changed_message(before: bytes, now: bytes) -> str | None:
    """Describe the first message that differs between two requests, given the prints of both; None if none does."""
    length = min(len(before), len(now))
    if before[:length] == now[:length]:
        return None
    number = next(at for at in range(0, length, 4) if before[at : at + 4] != now[at : at + 4]) // 4
    return f"message {number} of {len(now) // 4 - 1}" if number else "the tools or the system prompt"


def explain_miss(record: TurnRecord, held: CachedContext, prints: bytes) -> str | None:
    """Why fewer tokens of a turn were cached than expected, as text; None if not notably fewer were.

    ``prints`` are those of the turn's request.
    """
    expected, cached = record.expected_cached_tokens, record.cached_tokens
    if expected is None or cached is None or expected - cached <= max(MISS_TOKENS, MISS_SHARE * expected):
        return None
    if changed := changed_message(held.prints, prints):
        return f"your client changed {changed}"
    if record.backend != held.backend:
        return f"moved from {held.backend} to {record.backend}"
    if cached >= held.prompt_tokens - MISS_TOKENS:
        return "the last answer came back changed, by your client or by the chat template"
    return f"evicted from {held.backend}"


@dataclass(slots=True)
class OpenTurn:
    """A turn that hasn't finished."""

    started: TurnStarted
    session: Session | None
    held: CachedContext | None
    think_ms: float | None
    pre_ms: float | None
    unaccounted_ms: float | None
    phase: str = "waiting"  # waiting | prefill | decoding
    backend: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None

    def advance(self, event: TurnSent | TurnAnswering) -> None:
        """Apply an event: the turn was sent to a replica, or its answer has started."""
        if isinstance(event, TurnSent):
            self.phase, self.backend, self.queue_ms, self.ttft_ms = "prefill", event.backend, event.queue_ms, None
        else:
            self.phase, self.ttft_ms = "decoding", event.ttft_ms
        if self.session is not None:
            self.session.backend = self.backend or self.session.backend


class TurnLedger:
    """Open and recently finished turns. Ensures that each turn is counted once, in whatever order events arrive."""

    def __init__(self) -> None:
        self.open: collections.OrderedDict[str, OpenTurn] = collections.OrderedDict()
        self._finished: collections.OrderedDict[str, None] = collections.OrderedDict()

    def knows(self, turn: str) -> bool:
        """Whether this turn is open or has finished; if so, ignore its start."""
        return turn in self.open or turn in self._finished

    def add(self, turn: OpenTurn) -> None:
        self.open[turn.started.turn] = turn
        if turn.session is not None:
            turn.session.open_turns += 1

    def close(self, turn: str) -> tuple[bool, OpenTurn | None]:
        """Finish a turn. Returns whether this is its first finish, and the open turn (None if its start never came)."""
        if turn in self._finished:
            return False, None
        self.note(turn)
        return True, self._take(turn)

    def note(self, turn: str) -> None:
        """Remember that a turn has finished."""
        self._finished[turn] = None
        if len(self._finished) > FINISHED_TURNS_REMEMBERED:
            self._finished.popitem(last=False)

    def forget_lost(self, now: float) -> None:
        """Drop turns whose finish seems lost. A finish that arrives later is counted, but for no session."""
        while self.open:
            oldest = next(iter(self.open.values())).started
            if len(self.open) <= MAX_OPEN_TURNS and oldest.at > now - MAX_TURN_S:
                break
            self._take(oldest.turn)

    def phases(self) -> dict[str, str]:
        """Session → phase of its most advanced open turn."""
        order = ("waiting", "prefill", "decoding")
        found: dict[str, str] = {}
        for turn in self.open.values():
            name = turn.session.id if turn.session else ""
            found[name] = max(found.get(name, "waiting"), turn.phase, key=order.index)
        return found

    def _take(self, name: str) -> OpenTurn | None:
        turn = self.open.pop(name, None)
        if turn is not None and turn.session is not None:
            turn.session.open_turns -= 1
        return turn


_UNKNOWN_START = TurnStarted("", 0.0, "", "")


def finished_record(event: TurnFinished, turn: OpenTurn | None) -> TurnRecord:
    """The record of a finished turn."""
    held = session = None
    think_ms = pre_ms = unaccounted_ms = None
    if turn is None:
        started = _UNKNOWN_START
    else:
        started, session, held = turn.started, turn.session, turn.held
        think_ms, pre_ms, unaccounted_ms = turn.think_ms, turn.pre_ms, turn.unaccounted_ms
    # Positional arguments cost half as much. They are in the order of the fields.
    # fmt: off
    record = TurnRecord(
        event.turn, event.at, event.outcome, event.status, session.id if session is not None else None,
        started.task, started.client, started.model or None, started.path or None,
        started.stream if turn is not None else None, event.backend, started.at if turn is not None else None,
        event.retries, think_ms, pre_ms, event.queue_ms, event.ttft_ms, event.inference_ms, None, unaccounted_ms,
        event.prompt_tokens, event.completion_tokens, event.cached_tokens, None, None, event.estimated,
        event.finish_reason, event.error, started.prompt, event.answer, event.key, event.held_ms, event.retry_ms,
    )
    # fmt: on
    if held is not None and record.prompt_tokens is not None:
        # An engine always computes the last token of a prompt, to get the token after it.
        record.expected_cached_tokens = max(0, min(held.tokens, record.prompt_tokens - 1))
        record.cache_miss = explain_miss(record, held, started.prints)
    return record


class TurnLog:
    """Records of the latest finished turns: kept for display, and handed out once by take()."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._untaken: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._posts: dict[str, float] = {}

    def add(self, record: TurnRecord) -> None:
        """Add the record of a finished turn."""
        self.keep(record)
        self._untaken[record.turn] = record
        if len(self._untaken) > MAX_UNTAKEN_TURNS:
            self._untaken.popitem(last=False)

    def keep(self, record: TurnRecord) -> None:
        """Keep a record for display only."""
        self._kept[record.turn] = record
        if len(self._kept) > KEPT_TURNS:
            self._kept.popitem(last=False)

    def learn_post(self, turn: str, post_ms: float | None) -> float | None:
        """Record how long the agent acted on a turn's answer, in ms. Returns None if that is known already.

        It is known already when the relay announces an open turn again, to a new controller.
        """
        if not turn or post_ms is None:
            return post_ms
        records = [record for record in (self._kept.get(turn), self._untaken.get(turn)) if record is not None]
        if turn in self._posts or any(record.post_ms is not None for record in records):
            return None
        for record in records:
            record.post_ms = post_ms
        if turn not in self._untaken and len(self._posts) < MAX_UNTAKEN_TURNS:
            self._posts[turn] = post_ms
        return post_ms

    def take(self) -> tuple[list[TurnRecord], dict[str, float]]:
        """See Tracker.take_records."""
        taken = list(self._untaken.values()), self._posts
        self._untaken.clear()
        self._posts = {}
        return taken

    def latest(self, limit: int, session: str | None = None) -> list[TurnRecord]:
        """The latest finished turns, of one session or of all, latest first."""
        records = (record for record in reversed(self._kept.values()) if session in (None, record.session))
        return list(itertools.islice(records, limit))

"""Tracking: turns, sessions, histograms, and the /stats document. The clock is an argument; no I/O."""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import json
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict, TypeGuard

from agent_infra_core.routing import Backend
from agent_infra_core.wire import MAX_FIGURE, is_count

BUCKETS_PER_OCTAVE = 8  # a bucket is 9 % wide, so a percentile read from a histogram is off by 4.5 % at most


def histogram_bucket(value: float) -> int:
    """The histogram bucket of a duration in milliseconds: logarithmic, 0.01 ms and less in the lowest."""
    return math.floor(BUCKETS_PER_OCTAVE * math.log2(value)) if value > 0.01 else -54


@dataclass(slots=True)
class TurnStarted:
    """A request was read and admitted to the queue. Times are seconds since the epoch, durations milliseconds."""

    turn: str
    at: float
    model: str
    path: str
    session: str | None = None  # None: the client named none, the turn is a session of its own
    task: str | None = None
    client: str | None = None
    stream: bool = False
    pre_ms: float | None = None  # observing before this turn, as the client timed it
    post_ms: float | None = None  # acting on the answer before this one: belongs to the session's previous turn
    prompt: str = ""  # excerpt, proxy.capture_text characters at most
    prints: bytes = (
        b""  # four bytes for what stands before the messages (tools), and for each message; alike when alike
    )
    follows: str | None = None  # the conversation_key it goes on from; "": none yet; None: it cannot be followed so


@dataclass(slots=True)
class TurnSent:
    """The turn left the queue for a replica (again, when it was retried)."""

    turn: str
    at: float
    backend: str
    queue_ms: float


@dataclass(slots=True)
class TurnAnswering:
    """The first token (or, not streaming, the first byte) of the answer arrived."""

    turn: str
    at: float
    ttft_ms: float  # from being sent to the replica that answers


@dataclass(slots=True)
class TurnFinished:
    """The turn is over, whatever became of it. Every TurnStarted has exactly one."""

    turn: str
    at: float
    outcome: str  # completed | error (an error answer) | cut (died mid-answer) | aborted (client left) | rejected
    status: int  # HTTP status that the client saw; 0 = it saw none
    backend: str | None = None
    queue_ms: float = 0.0
    ttft_ms: float | None = None
    inference_ms: float | None = None  # sent to the replica that answered → last byte
    retries: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    estimated: bool = False  # tokens were counted from stream events, for want of usage
    finish_reason: str | None = None
    error: str | None = None  # in words
    gaps: Mapping[str, int] = field(default_factory=dict)  # inter-chunk gaps: histogram bucket key → count
    answer: str = ""  # excerpt
    key: str | None = None  # conversation_key up to and with this answer
    started: TurnStarted | None = None  # its beginning, for who never heard of it: most are over within one batch


@dataclass(frozen=True)
class SessionEnded:
    """The agent said that a session is over."""

    session: str
    at: float


TurnEvent = TurnStarted | TurnSent | TurnAnswering | TurnFinished | SessionEnded

# Bounds of what is kept. Nothing here grows with the number of turns, nor beyond these with that of sessions.
MAX_LIVE_SESSIONS = 20_000  # beyond: the one that was silent for longest is forgotten
SESSION_IDLE_S = 1800.0  # a session silent for this long is over
MAX_OPEN_TURNS = 50_000  # beyond, and after MAX_TURN_S: the oldest is forgotten (its finish still counts in totals)
MAX_TURN_S = 6 * 3600.0
FINISHED_TURNS_REMEMBERED = 10_000  # ids by which a second finish, or a start after it, is known for what it is
RECENT_TURNS = 100  # in /stats
LISTED_TURNS = 200  # of one session
KEPT_TURNS = 5_000  # records of finished turns, about 1 KB each, for a look at one session
MAX_UNTAKEN_TURNS = 20_000  # records that wait for take_records(); beyond: the oldest is dropped
HISTORY_POINTS = 300
HISTORY_STEP_S = 2.0
BACKEND_HISTORY_POINTS = 60  # of each backend: its turns in flight, at the same steps
LISTED_SESSIONS = 200  # in /stats: those heard of last
LISTED_ENDED = 50  # beside those, of the sessions that are over
LISTED_WAITING = 50
LISTED_REPLICAS = 200
RECENT_S = 300.0  # what "recent" means for percentiles, shares and active sessions
RATE_S = 60.0  # what rates are taken over
BESIDE_S = 0.01  # a turn that arrives longer before another's end was open beside it; less is the clocks' noise
LEAST_RATE_S = 5.0  # below this much time a rate is not told
MAX_CONVERSATIONS = 50_000  # answers by which a session that its client does not name is found
KEPT_PRINTS = 257  # of a session's last request: of what stands before the messages, and of the first 256
MISS_TOKENS = 64  # fewer tokens missing from the cache are none: engines keep whole blocks, and templates add words
MISS_SHARE = 0.1  # likewise, of what was expected
WATCH_INTERVAL_S = 5.0  # between two looks of the watchdog
LISTED_ALERTS = 50
LEAST_THINKS = 5  # think times of a session before its silence can be unusual
SILENT_S = 60.0  # silence that is never unusual
SILENT_FACTOR = 5.0  # silence is unusual beyond this many times the session's longest think time
REPEATED_TURNS = 4  # identical turns in a row
RUNAWAY_TOKENS = 8_000  # a context that never is one that ran away
RUNAWAY_FACTOR = 4.0  # a context that did is this many times the median of its model's sessions
LEAST_CONTEXTS = 8  # sessions of a model that make a median
THRASHING_MOVES = 4  # changes of the replica within the last 8 turns
SCHEMA_VERSION = 2  # of /stats, as docs/stats.schema.json has it
MAX_DURATION_MS = 2.0**30  # 12 days; whatever took longer is counted in the highest bucket
HIGHEST_BUCKET = histogram_bucket(MAX_DURATION_MS)
LOWEST_BUCKET = histogram_bucket(0.0)
_BUCKETS = {str(bucket): bucket for bucket in range(LOWEST_BUCKET, HIGHEST_BUCKET + 1)}  # as JSON names them

# Where all buckets but the lowest begin: so a duration's bucket is found in C.
_BUCKET_STARTS = [2.0 ** (bucket / BUCKETS_PER_OCTAVE) for bucket in range(LOWEST_BUCKET + 1, HIGHEST_BUCKET + 1)]


def _is_figure(value: Any) -> TypeGuard[float]:
    """A finite number that a time, a duration or a count can be; NaN fails the comparison."""
    return type(value) in (int, float) and 0 <= value <= MAX_FIGURE


@dataclass
class EventBatch:
    """The payload of FRAME_EVENTS: what happened since the last one, by kind, each list in order."""

    started: Sequence[TurnStarted] = ()
    sent: Sequence[TurnSent] = ()
    answering: Sequence[TurnAnswering] = ()
    finished: Sequence[TurnFinished] = ()
    session_ended: Sequence[SessionEnded] = ()

    def in_order(self) -> list[TurnEvent]:
        """All events as they happened; those of one moment in the order of a turn's life."""
        events: tuple[TurnEvent, ...] = (
            *self.started,
            *self.sent,
            *self.answering,
            *self.finished,
            *self.session_ended,
        )
        return sorted(events, key=operator.attrgetter("at"))


def decode_events(payload: bytes) -> list[TurnEvent]:
    """The events of a FRAME_EVENTS, in order. ValueError when it is none; keys that are not known are left out."""
    batch: EventBatch = _event_decoder().decode(payload)
    return batch.in_order()


@functools.cache
def _event_decoder() -> Any:
    """Decodes straight into the dataclasses, in C: the controller does this for every turn."""
    import msgspec

    return msgspec.json.Decoder(EventBatch)


def encode_stats(document: Mapping[str, Any]) -> bytes:
    """The /stats document as it is sent: without blanks, by C code, since the controller does this every second."""
    try:
        return _encode_json(document)
    except (ValueError, TypeError, OverflowError):  # half a character, a key that is no string, and the like
        return json.dumps(_finite(document), separators=(",", ":")).encode()


def _encode_json(value: Any) -> bytes:
    import msgspec

    encoded: bytes = msgspec.json.encode(value)
    return encoded


class Histogram:
    """Durations in milliseconds in logarithmic buckets (``histogram_bucket``), 295 of them at most."""

    __slots__ = ("_at_once", "_buckets", "_new", "_sorted", "_sorted_ms")

    def __init__(self, at_once: int = 1000) -> None:
        """``at_once``: how many wait to be put into buckets, which costs a third of one by one."""
        self._at_once = at_once
        self._buckets: dict[int, int] = {}
        self._new: list[float] = []  # not in buckets yet
        self._sorted, self._sorted_ms = 0, 0.0  # how many are in buckets, and their sum

    @property
    def count(self) -> int:
        return self._sorted + len(self._new)

    @property
    def sum_ms(self) -> float:
        return self._sorted_ms + sum(self._new)

    def add(self, *durations_ms: float) -> None:
        """Count finite durations."""
        self._new += durations_ms
        if len(self._new) >= self._at_once:
            self._sort()

    def _sort(self) -> dict[int, int]:
        """Put the new durations into their buckets; all buckets with their counts."""
        buckets = self._buckets
        places = collections.Counter(map(functools.partial(bisect.bisect, _BUCKET_STARTS), self._new))
        for place, count in places.items():
            bucket = LOWEST_BUCKET + place
            buckets[bucket] = buckets.get(bucket, 0) + count
        self._sorted, self._sorted_ms = self.count, self.sum_ms
        self._new.clear()
        return buckets

    def add_buckets(self, counts: Mapping[str, int]) -> None:
        """Count what another process has put into buckets; each duration is taken for the middle of its bucket."""
        for name, count in counts.items():
            bucket = _BUCKETS[name]
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self._sorted += count
            self._sorted_ms += _bucket_middle(bucket) * count

    def by_name(self) -> dict[str, int]:
        """All counts, as ``add_buckets`` takes them."""
        return {str(bucket): count for bucket, count in self._sort().items()} if self.count else {}

    def count_below(self, octave: int) -> int:
        """How many are shorter than 2^octave ms; exactly, since buckets are parts of octaves."""
        return sum(count for bucket, count in self._sort().items() if bucket < octave * BUCKETS_PER_OCTAVE)

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` has counted."""
        for bucket, count in other._sort().items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self._sorted += other.count
        self._sorted_ms += other.sum_ms

    @property
    def mean_ms(self) -> float | None:
        return self.sum_ms / self.count if self.count else None

    def percentile(self, q: float) -> float | None:
        """The duration in ms that a share ``q`` (0 to 1) does not exceed: its bucket's middle; None when empty."""
        seen, buckets = 0, self._sort()
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= q * self.count:
                return _bucket_middle(bucket)
        return None


NO_GAPS: Final = Histogram()  # of a turn that is no stream; nothing is ever added to it


def _bucket_middle(bucket: int) -> float:
    """The geometric middle of a histogram bucket, in ms."""
    return float(2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))


class RecentHistogram:
    """A histogram of the last ``window_s`` seconds, to within a tenth of that: ten slices, the oldest is dropped."""

    _SLICES = 10

    def __init__(self, clock: Callable[[], float], window_s: float = RECENT_S) -> None:
        self._clock = clock
        self._slice_s = window_s / self._SLICES
        self._number = 0  # of the slice that is being filled
        self._from = self._until = 0.0  # its time
        self._slice = Histogram()
        self._older: list[tuple[int, Histogram]] = []  # (slice number, its durations)

    def slice(self) -> Histogram:
        """What to add a duration to that ends now."""
        now = self._clock()
        if not self._from <= now < self._until:
            number = int(now // self._slice_s)
            # Slices of the future go too: the clock was set back.
            ended = [*self._older, (self._number, self._slice)]
            self._older = [entry for entry in ended if number - self._SLICES < entry[0] < number]
            self._number, self._slice = number, Histogram()
            self._from, self._until = number * self._slice_s, (number + 1) * self._slice_s
        return self._slice

    def add(self, *durations_ms: float) -> None:
        """Count durations that end now."""
        if durations_ms:
            self.slice().add(*durations_ms)

    def read(self) -> Histogram:
        """Everything that was added lately."""
        merged = Histogram()
        merged.merge(self.slice())
        for _, durations in self._older:
            merged.merge(durations)
        return merged


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 2)


def _percentiles(durations: Histogram, *percents: int) -> dict[str, float | None]:
    """``{"p50": ms, …}``; None where nothing was counted."""
    return {f"p{percent}": _rounded(durations.percentile(percent / 100)) for percent in percents}


def _plus(total: float | None, value: float | None) -> float | None:
    """A sum in which None is "not known": None until something is."""
    return total if value is None else (total or 0.0) + value


@dataclass(slots=True)
class TurnRecord:
    """One finished turn, all that is kept of it. Times are s since the epoch; None is "not known".

    ``post_ms`` comes with the session's next request. What comes from the turn's start is None where that was lost.
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
    cache_miss: str | None = None  # why fewer were cached than expected, in words
    tokens_estimated: bool = False
    finish_reason: str | None = None
    error: str | None = None
    prompt: str = ""
    answer: str = ""
    key: str | None = None  # conversation_key up to and with this answer

    def row(self) -> dict[str, Any]:
        """As it stands in /stats: a field each, durations rounded."""
        row = {name: getattr(self, name) for name in self.__slots__}
        for name in _DURATIONS:
            row[name] = _rounded(row[name])
        return row


_DURATIONS = tuple(name for name in TurnRecord.__slots__ if name.endswith("_ms"))


@dataclass(slots=True)
class HeldContext:
    """What a replica should have in its cache for a session's next turn."""

    backend: str | None
    prompt_tokens: int  # of the last prompt
    tokens: int  # of the last prompt and its answer, but for the answer's last: it was sampled, never computed
    prints: bytes  # of the last request, KEPT_PRINTS at most


def generates(path: str | None) -> bool:
    """Whether a turn on this path goes on with a context; embeddings, rerank, tokenize and so on have none."""
    return (path or "completions").endswith(("completions", "responses", "messages"))


def changed_message(before: bytes, now: bytes) -> str | None:
    """The first message of the request before that is another one now, in words; from the prints of both."""
    length = min(len(before), len(now))
    if before[:length] == now[:length]:
        return None
    number = next(at for at in range(0, length, 4) if before[at : at + 4] != now[at : at + 4]) // 4
    return f"message {number} of {len(now) // 4 - 1}" if number else "the tools or the system prompt"


def explain_miss(record: TurnRecord, held: HeldContext, prints: bytes) -> str | None:
    """Why fewer tokens of a turn were cached than expected, in words; None when not notably fewer were.

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
        """Whether a turn was open at ``arrival``: one that is over by now was, where its end is told first."""
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
        self.pre_ms = _plus(self.pre_ms, pre_ms)
        self.post_ms = _plus(self.post_ms, post_ms)
        self.unaccounted_ms = _plus(self.unaccounted_ms, unaccounted_ms)

    def finish(self, record: TurnRecord, at: float, prints: bytes = b"") -> None:
        """Add what a finished turn says, but for its think time; ``prints`` are those of its request."""
        self.turns += 1
        self.errors += record.outcome in ("error", "cut")
        self.last_turn, self.last_end = record.turn, max(at, self.last_end or at)
        self._note_repeat(record, prints)
        self.backend = record.backend or self.backend
        self.wait_ms = _plus(self.wait_ms, record.queue_ms)
        self.inference_ms = _plus(self.inference_ms, record.inference_ms)
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
        """What was before is restored, and these had ``ended``: nothing of that has happened since the start."""
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


@dataclass(slots=True)
class OpenTurn:
    """What is known of a turn before it has finished."""

    started: TurnStarted
    session: Session | None
    held: HeldContext | None
    think_ms: float | None
    pre_ms: float | None
    unaccounted_ms: float | None
    phase: str = "waiting"  # waiting | prefill | decoding
    backend: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None

    def advance(self, event: TurnSent | TurnAnswering) -> None:
        """It was sent to a replica, or is being answered."""
        if isinstance(event, TurnSent):
            self.phase, self.backend, self.queue_ms, self.ttft_ms = "prefill", event.backend, event.queue_ms, None
        else:
            self.phase, self.ttft_ms = "decoding", event.ttft_ms
        if self.session is not None:
            self.session.backend = self.backend or self.session.backend


class TurnLedger:
    """Which turns are open, and which finished lately: so that each is counted once, in whatever order events come."""

    def __init__(self) -> None:
        self.open: collections.OrderedDict[str, OpenTurn] = collections.OrderedDict()
        self._finished: collections.OrderedDict[str, None] = collections.OrderedDict()

    def knows(self, turn: str) -> bool:
        """Whether this turn is open or finished already: then its start is none."""
        return turn in self.open or turn in self._finished

    def add(self, turn: OpenTurn) -> None:
        self.open[turn.started.turn] = turn
        if turn.session is not None:
            turn.session.open_turns += 1

    def close(self, turn: str) -> tuple[bool, OpenTurn | None]:
        """Whether this is the turn's first finish, and the open turn (None where its start never came)."""
        if turn in self._finished:
            return False, None
        self.note(turn)
        return True, self._take(turn)

    def note(self, turn: str) -> None:
        """A turn that was not known has finished."""
        self._finished[turn] = None
        if len(self._finished) > FINISHED_TURNS_REMEMBERED:
            self._finished.popitem(last=False)

    def forget_lost(self, now: float) -> None:
        """Forget turns whose finish seems lost. One that comes after all is counted, but for no session."""
        while self.open:
            oldest = next(iter(self.open.values())).started
            if len(self.open) <= MAX_OPEN_TURNS and oldest.at > now - MAX_TURN_S:
                break
            self._take(oldest.turn)

    def phases(self) -> dict[str, str]:
        """Session → how far its furthest open turn is."""
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


class Watchdog:
    """Which sessions someone should look at, and why. Looks at all of them every WATCH_INTERVAL_S."""

    def __init__(self) -> None:
        self._due = 0.0
        self.rows: list[dict[str, Any]] = []  # the LISTED_ALERTS latest, latest first

    def look(self, sessions: Iterable[Session], now: float, kv_capacity: Mapping[str, float]) -> None:
        """Look if it is time to. ``kv_capacity`` is replica → tokens that its cache holds."""
        if self._due - WATCH_INTERVAL_S <= now < self._due:
            return
        self._due = now + WATCH_INTERVAL_S
        contexts: dict[str, list[int]] = {}
        for session in sessions:
            contexts.setdefault(session.held_model or session.model, []).append(session.context_tokens or 0)
        usual = {
            model: sorted(tokens)[len(tokens) // 2]
            for model, tokens in contexts.items()
            if len(tokens) >= LEAST_CONTEXTS
        }
        rows = []
        for session in sessions:
            if is_inconspicuous(session, now) and not session.alerts:
                continue
            found = alerts_of(session, now, usual.get(session.held_model), kv_capacity.get(session.held_by or ""))
            session.alerts = {kind: session.alerts.get(kind, since) for kind, since, _ in found}
            rows += [self._row(session, kind, sentence) for kind, _, sentence in found]
        self.rows = sorted(rows, key=lambda row: -row["since"])[:LISTED_ALERTS]

    @staticmethod
    def _row(session: Session, kind: str, sentence: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "session": session.id,
            "client": split_client(session.client)[0],
            "model": session.model,
            "since": session.alerts[kind],
            "sentence": sentence,
        }


def is_inconspicuous(session: Session, now: float) -> bool:
    """Whether nothing can be wrong with a session; most are so, and this costs little."""
    return (
        (session.last_end is None or now - session.last_end <= SILENT_S)
        and session.repeats < REPEATED_TURNS
        and (session.context_tokens or 0) <= RUNAWAY_TOKENS
        and session.recent_moves.bit_count() < THRASHING_MOVES
    )


def alerts_of(
    session: Session, now: float, usual_context: float | None, kv_capacity: float | None
) -> list[tuple[str, float, str]]:
    """What is wrong with a session: ``(kind, since, sentence)`` each.

    ``usual_context`` is the median of its model's sessions, ``kv_capacity`` what its replica's cache holds, in tokens.
    """
    found = []
    context, silent_s = session.context_tokens or 0, now - (session.last_end or now)
    if not session.open_turns and session.thinks >= LEAST_THINKS:
        longest_s = session.longest_think_ms / 1000
        if silent_s > max(SILENT_S, SILENT_FACTOR * longest_s):
            sentence = (
                f"Silent for {silent_s:.0f} s, and it thought for {longest_s:.0f} s at most before: is its agent dead?"
            )
            found.append(("silent", now - silent_s, sentence))
    if session.repeats >= REPEATED_TURNS:
        sentence = f"Its last {session.repeats} turns were identical: its agent may be in a loop."
        found.append(("repeating", now, sentence))
    if kv_capacity and context > max(RUNAWAY_TOKENS, kv_capacity / 2):
        sentence = (
            f"Its context of {context:,} tokens takes more than half of its replica's cache ({kv_capacity:,.0f})."
        )
        found.append(("runaway_context", now, sentence))
    elif usual_context and context > max(RUNAWAY_TOKENS, RUNAWAY_FACTOR * usual_context):
        times = context / usual_context
        sentence = f"Its context of {context:,} tokens is {times:.0f} times that of its model's usual session."
        found.append(("runaway_context", now, sentence))
    if (moves := session.recent_moves.bit_count()) >= THRASHING_MOVES:
        sentence = f"It changed its replica in {moves} of its last 8 turns; each time its context is computed anew."
        found.append(("thrashing", now, sentence))
    return found


class Pipeline:
    """Where the time of recent turns went. Shares are of the time of all of SHARED together; *ttft* is in inference."""

    PARTS = ("pre", "queue", "ttft", "inference", "post", "unaccounted")
    SHARED = ("pre", "queue", "inference", "post", "unaccounted")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._parts = {part: RecentHistogram(clock) for part in self.PARTS}

    def add(self, **durations_ms: Iterable[float | None]) -> None:
        """Add durations by part; None is "not known" and leaves no trace."""
        for part, durations in durations_ms.items():
            self._parts[part].add(*[ms for ms in durations if ms is not None])

    def document(self) -> dict[str, dict[str, float | None]]:
        """``{part: {mean_ms, p50_ms, p95_ms, share}}``; share is 0 to 1, and None for ttft and without traffic."""
        recent = {part: durations.read() for part, durations in self._parts.items()}
        total_ms = sum(recent[part].sum_ms for part in self.SHARED)
        document: dict[str, dict[str, float | None]] = {}
        for part, durations in recent.items():
            shared = part in self.SHARED and total_ms > 0
            document[part] = {
                "mean_ms": _rounded(durations.mean_ms),
                "p50_ms": _rounded(durations.percentile(0.5)),
                "p95_ms": _rounded(durations.percentile(0.95)),
                "share": round(durations.sum_ms / total_ms, 4) if shared else None,
            }
        return document


class Throughput:
    """Rates over the last RATE_S seconds from readings of ever-growing ``totals``, taken about once a second."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._totals = totals
        self._readings: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=300)

    def read(self, now: float) -> None:
        """Note the totals of this moment."""
        if self._readings and now < self._readings[-1][0]:
            self._readings.clear()  # the clock was set back
        self._readings.append((now, self._totals["completed"], self._totals["tokens_out"]))

    def rates(self, now: float) -> dict[str, float | None]:
        """``{turns_per_minute, tokens_per_second}`` (completed turns, tokens of answers); None before LEAST_RATE_S."""
        while self._readings and self._readings[0][0] < now - RATE_S - 0.5:  # a reading comes each second, or so
            self._readings.popleft()
        at, completed_then, tokens_then = self._readings[0] if self._readings else (now, 0, 0)
        if now - at < LEAST_RATE_S:
            return {"turns_per_minute": None, "tokens_per_second": None}
        return {
            "turns_per_minute": round((self._totals["completed"] - completed_then) * 60 / (now - at), 2),
            "tokens_per_second": round((self._totals["tokens_out"] - tokens_then) / (now - at), 2),
        }


class Timeline:
    """``throughput.history`` of /stats: a point each HISTORY_STEP_S, the latest HISTORY_POINTS."""

    NAMES = ("at", "turns_per_minute", "tokens_per_second", "in_flight", "pending", "active_sessions", "latency_ms")

    def __init__(self) -> None:
        self.points: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_POINTS)

    def is_due(self, now: float) -> bool:
        return not self.points or now // HISTORY_STEP_S != self.points[-1]["at"] // HISTORY_STEP_S

    def note(
        self, at: float, rates: Mapping[str, Any], queue: Mapping[str, Any], active_sessions: int, wait: Histogram
    ) -> None:
        """Add a point."""
        self.points.append(
            {
                "at": at,
                **rates,
                "in_flight": queue["in_flight"],
                "pending": queue["pending"],
                "active_sessions": active_sessions,
                "latency_ms": _percentiles(wait, 50, 95),
            }
        )

    def after(self, at: float) -> list[dict[str, Any]]:
        """The points that were noted after ``at``."""
        return [point for point in self.points if point["at"] > at]

    def restore(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Go on from points, oldest first; what another version has in them is left out."""
        self.points.extend({name: point.get(name) for name in self.NAMES} for point in points)


class RelayCounters:
    """Counters that start at zero with each relay, summed over all relays; a sum never falls."""

    def __init__(self, *names: str) -> None:
        self.sums = dict.fromkeys(names, 0)
        self._last = dict.fromkeys(names, 0)

    def read(self, readings: Mapping[str, Any]) -> None:
        """Take the relay's present counts. One below the last reading comes from a relay that started since."""
        for name, last in self._last.items():
            count = readings.get(name)
            if is_count(count):
                self.sums[name] += count - last if count >= last else count
                self._last[name] = count

    def restart(self) -> None:
        """The next reading comes from a new relay."""
        self._last = dict.fromkeys(self._last, 0)


class RelayReport:
    """What the relay says of itself once a second; what is missing there or cannot be is not known."""

    def __init__(self) -> None:
        self.gauges: Mapping[str, Any] = {}
        self._counters = RelayCounters("requests", "errors", "retries", "aborted", "rejected", "events_dropped")
        self._restarts = 0

    def read(self, gauges: Mapping[str, Any]) -> None:
        """Take what Tracker.sample() gets."""
        self.gauges = _as_mapping(_finite(gauges))
        self._counters.read(_as_mapping(self.gauges.get("counters")))

    def restart(self) -> None:
        """The next gauges come from a new relay."""
        self._counters.restart()
        self._restarts += 1
        self.gauges = {}

    @property
    def backends(self) -> Mapping[str, Mapping[str, Any]]:
        """The gauge of each backend."""
        return {name: _as_mapping(gauge) for name, gauge in _as_mapping(self.gauges.get("backends")).items()}

    def kv_capacity(self) -> dict[str, float]:
        """Backend → tokens that its cache holds, where that is known."""
        told = {name: _as_mapping(gauge.get("load")) for name, gauge in self.backends.items()}
        return {name: tokens for name, load in told.items() if _is_figure(tokens := load.get("kv_capacity_tokens"))}

    def queue(self, turns: Mapping[str, OpenTurn]) -> dict[str, Any]:
        """``queue`` of /stats; ``turns`` know the sessions that their clients did not name."""
        queue = _as_mapping(self.gauges.get("queue"))
        waiting = queue.get("waiting")
        rows = [row for row in waiting[:LISTED_WAITING] if isinstance(row, dict)] if isinstance(waiting, list) else []
        for row in rows:
            turn = turns.get(str(row.get("turn")))
            row["session"] = turn.session.id if turn is not None and turn.session is not None else row.get("session")
        return {**{name: queue.get(name) for name in ("pending", "in_flight", "oldest_ms")}, "waiting": rows}

    def document(self) -> dict[str, Any]:
        """``relay`` of /stats."""
        return {
            **self._counters.sums,
            "restarts": self._restarts,
            "sampled_at": self.gauges.get("at"),
            "rss_bytes": self.gauges.get("rss_bytes"),
            "connections": self.gauges.get("connections"),
        }


class BackendFigures:
    """What was measured of one backend: turns sent to it, summed over relays, and its recent latencies."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = RelayCounters("requests", "errors")
        self.latency = RecentHistogram(clock)  # sent → last byte, of completed turns
        self.ttft = RecentHistogram(clock)
        self.gap = RecentHistogram(clock)  # between chunks of a stream
        self.in_flight: deque[int | None] = deque(maxlen=BACKEND_HISTORY_POINTS)

    def finish(self, events: Sequence[TurnFinished]) -> None:
        """Add turns that this backend ended."""
        latencies = [event.inference_ms for event in events if event.outcome == "completed"]
        self.latency.add(*[ms for ms in latencies if ms is not None])
        self.ttft.add(*[event.ttft_ms for event in events if event.ttft_ms is not None])
        for event in events:
            if event.gaps:
                self.gap.slice().add_buckets(event.gaps)


TOTAL_OF_OUTCOME = {
    "completed": "completed",
    "error": "errors",
    "cut": "errors",
    "aborted": "aborted",
    "rejected": "rejected",
}
_TOTALS = (
    *("requests", "completed", "errors", "aborted", "rejected", "retries"),
    *("tokens_in", "tokens_out", "cached_tokens"),
)
_SUMMED = {  # total → what it is the sum of
    "retries": operator.attrgetter("retries"),
    "tokens_in": operator.attrgetter("prompt_tokens"),
    "tokens_out": operator.attrgetter("completion_tokens"),
    "cached_tokens": operator.attrgetter("cached_tokens"),
}


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> Any:
    """A JSON value with None in the place of NaN and the infinities, which Python reads but JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_UNKNOWN_START = TurnStarted("", 0.0, "", "")


def _record_of(event: TurnFinished, turn: OpenTurn | None) -> TurnRecord:
    """What is kept of a turn that finished."""
    held = session = None
    think_ms = pre_ms = unaccounted_ms = None
    if turn is None:
        started = _UNKNOWN_START
    else:
        started, session, held = turn.started, turn.session, turn.held
        think_ms, pre_ms, unaccounted_ms = turn.think_ms, turn.pre_ms, turn.unaccounted_ms
    # By position, which costs half as much: in the order of the fields.
    # fmt: off
    record = TurnRecord(
        event.turn, event.at, event.outcome, event.status, session.id if session is not None else None,
        started.task, started.client, started.model or None, started.path or None,
        started.stream if turn is not None else None, event.backend, started.at if turn is not None else None,
        event.retries, think_ms, pre_ms, event.queue_ms, event.ttft_ms, event.inference_ms, None, unaccounted_ms,
        event.prompt_tokens, event.completion_tokens, event.cached_tokens, None, None, event.estimated,
        event.finish_reason, event.error, started.prompt, event.answer, event.key,
    )
    # fmt: on
    if held is not None and record.prompt_tokens is not None:
        # An engine computes the last token of every prompt, for what comes after it.
        record.expected_cached_tokens = max(0, min(held.tokens, record.prompt_tokens - 1))
        record.cache_miss = explain_miss(record, held, started.prints)
    return record


class TurnLog:
    """The records of the turns that finished last: to look at, and for those who keep them, to whom each goes once."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._untaken: collections.OrderedDict[str, TurnRecord] = collections.OrderedDict()
        self._posts: dict[str, float] = {}

    def add(self, record: TurnRecord) -> None:
        """A turn finished."""
        self.keep(record)
        self._untaken[record.turn] = record
        if len(self._untaken) > MAX_UNTAKEN_TURNS:
            self._untaken.popitem(last=False)

    def keep(self, record: TurnRecord) -> None:
        """Have a record to look at, and for nothing else."""
        self._kept[record.turn] = record
        if len(self._kept) > KEPT_TURNS:
            self._kept.popitem(last=False)

    def learn_post(self, turn: str, post_ms: float | None) -> float | None:
        """Note how long the agent acted on a turn's answer; None where that is known already.

        It is with a start that the relay tells a new controller again, for a turn that was open all the time.
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
        """The turns that finished last, of one session or of all, latest first."""
        records = (record for record in reversed(self._kept.values()) if session in (None, record.session))
        return list(itertools.islice(records, limit))


def _client_rows(live: Sequence[Session], ended: Sequence[Session], phases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Sessions by client, in their order."""
    rows: dict[str | None, dict[str, Any]] = {}
    states = [phases.get(session.id, "idle") for session in live] + ["ended"] * len(ended)
    for session, state in zip((*live, *ended), states, strict=True):
        name, command = split_client(session.client)
        row = rows.setdefault(session.client, {"id": name, "command": command, "sessions": []})
        row["sessions"].append(_session_row(session, state))
    return list(rows.values())


def _session_row(session: Session, state: str) -> dict[str, Any]:
    return {
        "id": session.id,
        "task": session.task,
        "model": session.model,
        "backend": session.backend,
        "state": state,  # idle | waiting | prefill | decoding | ended
        "turns": session.turns,
        "errors": session.errors,
        "last_seen": session.last_seen,
        "idle_since": session.last_end if state in ("idle", "ended") else None,
        "pre_ms": _rounded(session.pre_ms),
        "wait_ms": _rounded(session.wait_ms),
        "inference_ms": _rounded(session.inference_ms),
        "post_ms": _rounded(session.post_ms),
        "unaccounted_ms": _rounded(session.unaccounted_ms),
        "context_tokens": session.context_tokens,
        "prompt_tokens": session.prompt_tokens,
        "cached_tokens": session.cached_tokens,
        "cache_misses": session.cache_misses,
        "last_miss": session.last_miss,
        "moves": session.moves,
        "alerts": list(session.alerts),
        "tokens_in": session.tokens_in,
        "tokens_out": session.tokens_out,
    }


# Of a replica's load digest (GET /load of `serve`): what the document tells of the engine.
_ENGINE_FIGURES = (
    *("state", "running", "waiting", "kv_usage", "kv_capacity_tokens", "prefix_queries", "prefix_hits"),
    *("preemptions", "prompt_tokens", "generation_tokens", "at"),
)


def _replica_row(record: Mapping[str, Any], backend: Backend | None, gauge: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one backend from its record, the replica table and the relay's gauge; any may be missing."""
    load = _as_mapping(gauge.get("load"))
    failure = record.get("failure")
    is_draining = backend is not None and backend.state == "draining"
    told = (_as_mapping(failure).get("line"), gauge.get("reason"), record.get("message"), record.get("progress"))
    return {
        "id": record["replica"] if record else backend.id if backend else None,
        "model": record["model"] if record else backend.model if backend else None,
        "node": record.get("node") or (backend.node if backend else None) or None,
        "partition": record.get("partition"),
        "port": record.get("port") or (backend.port if backend else None),
        "state": "draining" if is_draining else record.get("state", "ready"),
        "healthy": gauge.get("healthy"),
        "reason": next((reason for reason in told if reason), None),
        "failure": failure,
        "progress": record.get("progress"),
        "restarts": record.get("restarts"),
        "started_at": record.get("started_at") or None,
        "ready_at": record.get("ready_at"),
        "ends_at": record.get("ends_at"),
        "inflight": gauge.get("in_flight"),
        "slots": record.get("slots") or (backend.slots if backend else None) or None,
        "gpu": _gpu_summary(load.get("gpus") or record.get("gpus")),
        "engine": {"name": record.get("engine"), **{name: load.get(name) for name in _ENGINE_FIGURES}},
        "tunnel": record.get("tunnel"),
    }


def _gpu_summary(gpus: Any) -> dict[str, Any] | None:
    """A replica's GPUs as one: mean utilisation, summed memory (bytes) and power, the hottest; None without GPUs."""
    samples = [_as_mapping(gpu) for gpu in gpus] if isinstance(gpus, (list, tuple)) else []
    if not samples:
        return None

    def combine(name: str, how: Callable[[list[float]], float]) -> float | None:
        known = [sample[name] for sample in samples if _is_figure(sample.get(name))]
        return how(known) if known else None

    return {
        "count": len(samples),
        "name": samples[0].get("name"),
        "utilization": combine("utilization", lambda known: round(sum(known) / len(known), 1)),
        "memory_used": combine("memory_used", sum),
        "memory_total": combine("memory_total", sum),
        "power_w": combine("power_w", sum),
        "temperature_c": combine("temperature_c", max),
    }


def _model_rows(backends: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models and what serves them."""
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in backends:
        models.setdefault(row["model"], []).append(row)
    return [
        {
            "name": name,
            "replicas": len(rows),
            "ready": sum(1 for row in rows if row["state"] == "ready" and row["healthy"] is not False),
            "slots": _sum_known(row["slots"] for row in rows),
            "inflight": _sum_known(row["inflight"] for row in rows),
        }
        for name, rows in models.items()
    ]


def _sum_known(values: Iterable[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    known = [value for value in values if is_count(value)]
    return sum(known) if known else None


class BackendTable:
    """The figures of every backend that was heard of since the last ``replicas``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._figures: dict[str, BackendFigures] = {}

    def figures(self, backend: str) -> BackendFigures:
        """The figures of one backend, empty ones where it is new."""
        if backend not in self._figures:
            self._figures[backend] = BackendFigures(self._clock)
        return self._figures[backend]

    def sample(self, gauges: Mapping[str, Any], is_due: bool) -> None:
        """Take the relay's gauges; ``is_due`` notes a point of their course too."""
        for backend, gauge in gauges.items():
            figures = self.figures(backend)
            figures.counters.read(gauge)
            if is_due:
                figures.in_flight.append(gauge.get("in_flight"))

    def relay_restarted(self) -> None:
        for figures in self._figures.values():
            figures.counters.restart()

    def replicas(
        self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], gauges: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """What each backend is that has a record or is routed to; the figures of all others are forgotten."""
        known = {record["replica"]: _finite(record) for record in records}
        routed = {backend.id: backend for backend in table}
        self._figures = {name: self.figures(name) for name in {**known, **routed}}
        return [
            _replica_row(known.get(name, {}), routed.get(name), _as_mapping(gauges.get(name))) for name in self._figures
        ]

    def measured(self, backend: str) -> dict[str, Any]:
        """The figures of one backend."""
        figures = self.figures(backend)
        return {
            **figures.counters.sums,
            "latency_ms": _percentiles(figures.latency.read(), 50, 95, 99),
            "ttft_ms": _percentiles(figures.ttft.read(), 50, 95, 99),
            "gap_ms": _percentiles(figures.gap.read(), 50, 95, 99),
            "inflight_history": list(figures.in_flight),
        }


class TurnFigures:
    """What is measured of turns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.totals = dict.fromkeys(_TOTALS, 0)
        self.pipeline = Pipeline(clock)
        self.wait = RecentHistogram(clock, RATE_S)  # queue and inference of completed turns: what an agent waits
        self.backends = BackendTable(clock)

    def add(self, begun: Sequence[OpenTurn], done: Sequence[TurnFinished]) -> None:
        """Count turns that begin, and turns that are over."""
        self.pipeline.add(
            pre=[turn.pre_ms for turn in begun],
            post=[turn.started.post_ms for turn in begun],
            unaccounted=[turn.unaccounted_ms for turn in begun],
            queue=[event.queue_ms for event in done],
            ttft=[event.ttft_ms for event in done],
            inference=[event.inference_ms for event in done],
        )
        totals = self.totals
        totals["requests"] += len(done)
        by_backend: dict[str, list[TurnFinished]] = {}
        waits = []
        for event in done:
            totals[TOTAL_OF_OUTCOME.get(event.outcome, "errors")] += 1
            if event.backend is not None:
                by_backend.setdefault(event.backend, []).append(event)
            if event.outcome == "completed" and event.inference_ms is not None:
                waits.append(event.queue_ms + event.inference_ms)
        for total, read in _SUMMED.items():
            totals[total] += sum(filter(None, map(read, done)))
        self.wait.add(*waits)
        for backend, events in by_backend.items():
            self.backends.figures(backend).finish(events)


class StatsDocument(TypedDict):
    """The body of GET /stats; docs/stats.schema.json says what every field means.

    Times are s since the epoch; None (null) is "not known"; no figure is ever NaN.
    """

    snapshot_age_ms: int  # stays the first key: the relay writes the age over it, in the finished bytes
    schema_version: int
    now: float
    uptime_seconds: float  # of the controller
    strategy: str
    totals: dict[str, int]  # of all time that is remembered; requests = completed + errors + aborted + rejected
    throughput: dict[str, Any]  # rates over the last minute; history[]: one point each HISTORY_STEP_S
    models: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    queue: dict[str, Any]
    sessions: dict[str, int]  # counts: live, active, listed, ended, evicted
    clients: list[dict[str, Any]]  # the listed sessions by client; their *_ms and tokens_* are sums over their turns
    recent_turns: list[dict[str, Any]]  # finished, latest first
    pipeline: dict[str, dict[str, float | None]]
    watchdog: list[dict[str, Any]]  # sessions that someone should look at, and why
    analysis: list[dict[str, Any]]  # what holds each model back; like the next two, the controller puts it in
    accounting: dict[str, Any] | None  # GPU-hours
    history: dict[str, Any] | None  # what becomes of the turns on disk
    relay: dict[str, Any]  # counts over all relays, at the socket; events_dropped: turns that totals lack


class Tracker:
    """What the controller knows of turns and sessions: turn events and gauges in, the /stats document out.

    One thread at a time. ``clock`` is seconds since the epoch, the same as the relay's.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_sessions: int = MAX_LIVE_SESSIONS,
        session_idle_s: float = SESSION_IDLE_S,
    ) -> None:
        self._clock = clock
        self._started_at = clock()
        self._sessions = SessionTable(max_sessions, session_idle_s)
        self._turns = TurnLedger()
        self._conversations = Conversations()
        self._log = TurnLog()
        self.timeline = Timeline()
        self._figures = TurnFigures(clock)
        self._throughput = Throughput(self._figures.totals)
        self._watchdog = Watchdog()
        self._relay = RelayReport()

    def observe(self, *events: TurnEvent) -> None:
        """Take events of the relay, in order. One that comes twice, or after its turn's finish, changes nothing.

        Many at once cost half of one by one.
        """
        now = self._clock()
        begun: list[OpenTurn] = []
        done: list[TurnFinished] = []
        try:
            for event in events:
                at = min(event.at, now)
                if isinstance(event, TurnFinished):
                    self._take_finish(event, at, begun, done)
                elif isinstance(event, TurnStarted):
                    self._take_start(event, at, begun)
                elif isinstance(event, SessionEnded):
                    self._sessions.end(event.session)
                elif (turn := self._turns.open.get(event.turn)) is not None:
                    turn.advance(event)
                    if turn.session is not None:
                        self._sessions.touch(turn.session, at)
        finally:
            self._figures.add(begun, done)

    def sample(self, gauges: Mapping[str, Any]) -> None:
        """Take the relay's gauges (FRAME_GAUGES), once a second; what is missing or cannot be is not known.

        ``{"at", "backends": {id: {"healthy", "reason", "in_flight", "requests", "errors", "load": digest | None}},
        "queue": {"pending", "in_flight", "oldest_ms", "waiting": [...]}, "counters": {...}, "rss_bytes",
        "connections", "stats_read": how often /stats was}``.
        """
        now = self._clock()
        self._relay.read(gauges)
        is_due = self.timeline.is_due(now)
        self._figures.backends.sample(self._relay.backends, is_due)
        self._turns.forget_lost(now)
        self._sessions.expire(now)
        self._watchdog.look(self._sessions, now, self._relay.kv_capacity())
        self._throughput.read(now)
        if is_due:
            active, wait = self._sessions.count_active(now), self._figures.wait.read()
            self.timeline.note(now, self._throughput.rates(now), self._relay.queue({}), active, wait)

    def relay_restarted(self) -> None:
        """The relay died and another takes its place: its open turns are over, its counters start at zero."""
        now = self._clock()
        cut = []
        for name, turn in self._turns.open.items():
            waited_ms = max(0.0, now - turn.started.at) * 1000 if turn.queue_ms is None else turn.queue_ms
            error = "the relay ended during this turn"
            cut.append(TurnFinished(name, now, "cut", 0, turn.backend, waited_ms, turn.ttft_ms, error=error))
        self.observe(*cut)
        self._relay.restart()
        self._figures.backends.relay_restarted()

    @property
    def totals(self) -> Mapping[str, int]:
        """``totals`` of /stats, as they are now."""
        return self._figures.totals

    def silences(self) -> Iterator[tuple[str, str | None, int, float]]:
        """``(model, replica, turns open, seconds since the last answer)`` of every live session."""
        return self._sessions.silences(self._clock())

    def take_records(self) -> tuple[list[TurnRecord], dict[str, float]]:
        """The turns that finished since the last call, and turn → post_ms, learnt since, of those given out before."""
        return self._log.take()

    def restore(self, records: Iterable[TurnRecord], totals: Mapping[str, Any], ended: Iterable[str] = ()) -> None:
        """Go on where an earlier tracker was; before any event.

        ``records`` are its latest turns, oldest first: what they say of their sessions is what is known of these.
        ``totals`` are its totals by name; what is no count is left out. ``ended`` are sessions, read after ``records``.
        """
        self._figures.totals.update({name: totals[name] for name in self._figures.totals if is_count(totals.get(name))})
        answers: dict[str, str] = {}  # session → the key of its last answer: from those before it has gone on
        for record in records:
            is_first, _ = self._turns.close(record.turn)
            if not is_first:
                continue
            self._log.keep(record)
            at = min(record.finished_at, self._clock())
            session = self._sessions.open(record.session, record, at)
            if session is not None:
                if record.key is not None:
                    answers.pop(session.id, None)
                    answers[session.id] = record.key
                session.think(record.think_ms, record.pre_ms, record.post_ms, record.unaccounted_ms)
                session.finish(record, at)
                self._sessions.touch(session, at)
        for name, key in answers.items():
            self._conversations.answered(key, name)
        self._sessions.settle(self._clock(), ended)

    def replicas(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend]) -> list[dict[str, Any]]:
        """``backends`` of /stats as they are now, but for what was measured of their turns.

        ``records`` are the replicas' records as `serve` writes them (ReplicaRecord, as JSON); ``table`` is what the
        relay routes by, so also backends without a record. What was measured of any other backend is forgotten.
        """
        return self._figures.backends.replicas(records, table, self._relay.backends)

    def snapshot(self, records: Iterable[Mapping[str, Any]], table: Iterable[Backend], strategy: str) -> StatsDocument:
        """The /stats document of this moment; ``records`` and ``table`` as ``replicas`` takes them."""
        now = self._clock()
        sessions = collections.Counter(session.backend for session in self._sessions)
        rows = self.replicas(records, table)
        for row in rows:
            row |= {**self._figures.backends.measured(row["id"]), "sessions": sessions[row["id"]]}
        listed = self._sessions.latest(LISTED_SESSIONS)
        return StatsDocument(
            snapshot_age_ms=0,
            schema_version=SCHEMA_VERSION,
            now=now,
            uptime_seconds=round(max(0.0, now - self._started_at), 3),
            strategy=strategy,
            totals=dict(self._figures.totals),
            throughput={**self._throughput.rates(now), "history": list(self.timeline.points)},
            models=_model_rows(rows),
            backends=rows,
            queue=self._relay.queue(self._turns.open),
            sessions=self._sessions.counts(now),
            clients=_client_rows(listed, self._sessions.latest_ended(), self._turns.phases()),
            recent_turns=[record.row() for record in self._log.latest(RECENT_TURNS)],
            pipeline=self._figures.pipeline.document(),
            watchdog=self._watchdog.rows,
            analysis=[],
            accounting=None,
            history=None,
            relay=self._relay.document(),
        )

    def session(self, name: str) -> dict[str, Any] | None:
        """The body of GET /stats/sessions/{id}; None for a session that is not known (any more)."""
        session, is_over = self._sessions.find(name)
        if session is None:
            return None
        state = "ended" if is_over else self._turns.phases().get(name, "idle")
        return {
            "schema_version": SCHEMA_VERSION,
            "now": self._clock(),
            "session": _session_row(session, state),
            "turns": [record.row() for record in self._log.latest(LISTED_TURNS, name)],
        }

    def _take_start(self, event: TurnStarted, at: float, begun: list[OpenTurn]) -> None:
        if self._turns.knows(event.turn):
            return
        turn = self._begin(event, at)
        if turn.session is not None:
            self._sessions.touch(turn.session, at)
        self._turns.add(turn)
        begun.append(turn)

    def _take_finish(self, event: TurnFinished, at: float, begun: list[OpenTurn], done: list[TurnFinished]) -> None:
        turn: OpenTurn | None
        if event.started is not None and not self._turns.knows(event.turn):
            turn = self._begin(event.started, min(event.started.at, at))
            begun.append(turn)
            self._turns.note(event.turn)
        else:
            is_first, turn = self._turns.close(event.turn)
            if not is_first:
                return
        done.append(event)
        record = _record_of(event, turn)
        if turn is not None and turn.session is not None:
            turn.session.finish(record, at, turn.started.prints)
            self._sessions.touch(turn.session, at)
            if turn.started.follows is not None:
                self._conversations.finish(turn.started, event.key, turn.session.id)
        self._log.add(record)

    def _begin(self, event: TurnStarted, at: float) -> OpenTurn:
        """A turn that starts, with what is known of the time before it."""
        session = self._sessions.open(self._conversations.session_of(event), event, at)
        if session is None:
            pre_ms, unaccounted_ms = split_think_time(None, event.pre_ms, event.post_ms)
            return OpenTurn(event, None, None, None, pre_ms, unaccounted_ms)
        gap_ms = session.think_time_ms(at)
        pre_ms, unaccounted_ms = split_think_time(gap_ms, event.pre_ms, event.post_ms)
        session.think(gap_ms, pre_ms, self._log.learn_post(session.last_turn, event.post_ms), unaccounted_ms)
        return OpenTurn(event, session, session.held(event, at), gap_ms, pre_ms, unaccounted_ms)

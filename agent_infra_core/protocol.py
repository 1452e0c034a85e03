"""The data that a deployment's processes exchange: frames, turn events, replica records and specifications."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import struct
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from agent_infra_core.settings import shorten

_Dataclass = typing.TypeVar("_Dataclass")


@dataclass(frozen=True)
class ReplicaFailure:
    """Why a replica failed: the class of failure, the log line that shows it, and how to fix it."""

    kind: str
    line: str
    hint: str


@dataclass(frozen=True)
class EngineLoad:
    """An engine's current load, as it reports it; None for values that it doesn't report."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # 0 to 1
    kv_capacity_tokens: int | None = None
    prefix_queries: int | None = None  # tokens looked up in the prefix cache, since the engine's start
    prefix_hits: int | None = None  # tokens found in it, since the engine's start
    preemptions: int | None = None
    prompt_tokens: int | None = None  # including those found in the cache
    generation_tokens: int | None = None
    is_sleeping: bool | None = None  # a sleeping engine answers its health probe, but every turn hangs


@dataclass(frozen=True)
class Backend:
    """One row of the replica table that the controller hands to the relay."""

    id: str
    model: str  # the "model" of requests, for clients and engine alike
    host: str  # a numeric address: the relay never resolves names
    port: int
    telemetry_port: int | None = None  # of `serve`'s GET /load; None: the replica reports no load (verb `proxy`)
    key: str | None = None  # the replica's own key, sent with every request to it
    state: str = "ready"  # ready | draining; the table holds no replicas in other states
    slots: int = 0  # turns that it runs at once; 0 = unknown: never full, so nothing queues
    node: str = ""
    ends_at: float | None = None  # end of its walltime, s since the epoch
    is_own: bool = False  # `serve` or a tunnel of this user's listens there, so nobody else's server may
    takes_priority: bool = False  # it schedules by the field ``priority`` of requests, the lowest first
    lacks: tuple[str, ...] = ()  # of LACKS: what its engine can't do as clients expect


# What an engine may lack. ``choices``: it counts the tokens of one choice only. ``empty_answers``: it generates a token
# for max_tokens 0. ``response_indices``: its events of /v1/responses miss those that client libraries need.
LACKS = ("choices", "empty_answers", "response_indices")
MAX_RUN_TASKS = 100_000  # of an announced run

# Frames on the Unix socket between controller and relay: one byte of kind, four bytes of length, the payload (JSON).
# FRAME_TABLE: {"settings": {"proxy": ProxyConfig with its api_key, "headers": HeadersConfig, "log_format": "text" or
# "json", "drain_seconds"} (in a controller's first table, then only when they change), "models": [names that clients
# may use], "loading": [models with replicas that are starting: turns wait for them], "wakes": [models that come back
# when a turn asks for them], "backends": [Backend]}.
FRAME_TABLE = b"T"  # controller → relay
FRAME_STATS = b"S"  # controller → relay: the body of GET /stats, which starts with STATS_PREFIX
STATS_PREFIX = b'{"snapshot_age_ms":0,'  # the relay replaces the age
FRAME_HELLO = b"H"  # relay → controller, first: {"protocol", "pid", "port", "started_at"}, with the listening socket
FRAME_EVENTS = b"E"  # relay → controller: EventBatch
FRAME_GAUGES = b"G"  # relay → controller, once a second: see Relay.gauges()
FRAME_REQUEST = b"R"  # relay → controller: a client's HTTP request: {"op": "drain"|"undrain", "backend"}, or

# {"op": "metrics", "id"}, {"op": "runs", "id"}, {"op": "run", "id", "name", "tasks"}, {"op": "stats", "id"}, or, with
# the parameters of http/queries.py, {"op": "history", "id"}, {"op": "sessions", "id"} or {"op": "session", "id",
# "session"}. The controller answers these with a FRAME_ANSWER; for "stats" it first sends a FRAME_STATS if there is
# news.
FRAME_ANSWER = b"A"  # controller → relay: {"id", "status", "type", "body"}: an HTTP answer
_FRAME_HEAD = struct.Struct(">cI")
MAX_FRAME_BYTES = 256 << 20


class FrameReader:
    """Splits a byte stream into frames; owns the bytes of the incomplete last frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return ``(kind, payload)`` of every frame that ``data`` completes. ValueError if a frame is too long."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _FRAME_HEAD.size:
            kind, length = _FRAME_HEAD.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = _FRAME_HEAD.size + length
            if len(self._buffer) < end:
                break
            frames.append((kind, bytes(self._buffer[_FRAME_HEAD.size : end])))
            del self._buffer[:end]
        return frames


def encode_frame(kind: bytes, payload: bytes) -> bytes:
    """Return one frame, ready to send."""
    return _FRAME_HEAD.pack(kind, len(payload)) + payload


MAX_FIGURE = 1e12  # upper limit for durations and counts from the wire, so sums stay finite


def is_count(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is an integer from 0 to MAX_FIGURE; engines may report anything else."""
    return type(value) is int and 0 <= value <= MAX_FIGURE


@dataclass(slots=True)
class TurnStarted:
    """A request was read and admitted to the queue. Times are seconds since the epoch, durations milliseconds."""

    turn: str
    at: float
    model: str
    path: str
    session: str | None = None  # None: the client sent none, so the turn is its own session
    task: str | None = None
    client: str | None = None
    stream: bool = False
    pre_ms: float | None = None  # time spent observing before this turn, measured by the client
    post_ms: float | None = None  # time spent acting on the previous answer: belongs to the previous turn
    prompt: str = ""  # excerpt of at most proxy.capture_text characters
    prints: bytes = b""  # a four-byte checksum of everything before the messages (tools), then one of each message
    follows: str | None = None  # conversation_key that it continues; "": a new conversation; None: cannot be known
    run: str | None = None  # the value of X-Run-Tasks, which announces a run
    is_retry: bool = False  # a client library sends the same body again


@dataclass(slots=True)
class TurnSent:
    """The turn left the queue for a replica; sent again for each retry."""

    turn: str
    at: float
    backend: str
    queue_ms: float


@dataclass(slots=True)
class TurnAnswering:
    """The answer's first token arrived, or its first byte if it isn't a stream."""

    turn: str
    at: float
    ttft_ms: float  # since it was sent to the replica that answers


@dataclass(slots=True)
class TurnFinished:
    """The turn ended, with any outcome. Every TurnStarted has exactly one."""

    turn: str
    at: float
    outcome: str  # completed | error (an error answer) | cut (died mid-answer) | aborted (client left) | rejected
    status: int  # HTTP status that the client received; 0 = none
    backend: str | None = None
    queue_ms: float = 0.0
    ttft_ms: float | None = None
    inference_ms: float | None = None  # from being sent to the replica that answered to the last byte
    retries: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    estimated: bool = False  # tokens were counted from stream events, because there was no usage
    finish_reason: str | None = None
    error: str | None = None  # message
    gaps: Mapping[str, int] = field(default_factory=dict)  # inter-chunk gaps: histogram bucket key → count
    answer: str = ""  # excerpt
    key: str | None = None  # conversation_key up to and including this answer
    started: TurnStarted | None = None  # its start, for readers without it: most turns end within one batch
    held_ms: float | None = None  # part of queue_ms: waiting for room in a KV cache, before it was sent at all
    retry_ms: float | None = None  # part of queue_ms: from the first to the last time that it was sent


@dataclass(frozen=True)
class SessionEnded:
    """The agent reported that a session is over."""

    session: str
    at: float


TurnEvent = TurnStarted | TurnSent | TurnAnswering | TurnFinished | SessionEnded
MAX_CONVERSATIONS = 50_000  # answers kept to find the session of turns whose client names none
MAX_GIVERS = 256  # of these, sessions that gave the same one
MAX_TRIES = 10_000  # bodies kept for the client libraries that send them again
RETRY_S = 10.0  # since an answer that its client didn't wait for; client libraries pause for up to 8 s


class Conversations:
    """Finds the session of a turn whose client names none: the session whose answer the turn continues.

    Exact matches only. While a turn that continues an answer is open, and once it is completed, no other turn can
    match that answer. So turns that continue one answer at the same time are sessions of their own. An answer given in
    several sessions is continued by as many turns, by those sessions' age: their conversations are the same so far.
    Keeps MAX_CONVERSATIONS answers; the longest unused is dropped. Also knows the last turns' bodies, by their prints:
    when a client library sends one again, it is the same turn.
    The relay, which routes by it, and the controller, which keeps it for longer than a relay lives, both have one.
    """

    def __init__(self) -> None:
        self._sessions: collections.OrderedDict[str, list[str]] = collections.OrderedDict()  # answer → who gave it
        self._continued: collections.OrderedDict[str, str] = collections.OrderedDict()  # answers that were matched
        # Body → session that sent it (empty: several), key of the answer, until when a retry means this turn.
        self._tries: collections.OrderedDict[int, tuple[str, str | None, float]] = collections.OrderedDict()

    def session_of(self, turn: str, session: str | None, follows: str | None) -> str | None:
        """Return the session of a starting turn, a new one if there is no match; None if it continues nothing."""
        if session or follows is None:
            return session
        givers = self._sessions.get(follows)
        return self._continue(follows, givers[0]) if givers else f"auto-{turn}"

    def _continue(self, follows: str, session: str) -> str:
        """Record that a turn continues the answer that ``session`` gave; returns the session."""
        givers = self._sessions[follows]
        givers.remove(session)
        if not givers:
            del self._sessions[follows]
        self._continued[follows] = session
        if len(self._continued) > MAX_CONVERSATIONS:
            self._continued.popitem(last=False)
        return session

    def answered(self, key: str, session: str) -> None:
        """Record that ``session`` gave the answer with this ``key``, perhaps again."""
        givers = self._sessions.setdefault(key, [])
        if session not in givers:
            givers.append(session)
        del givers[:-MAX_GIVERS]
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_CONVERSATIONS:
            self._sessions.popitem(last=False)

    def finish(self, turn: str, follows: str | None, key: str | None, session: str) -> None:
        """Record the end of a turn. If it has no answer, the answer it continued can be matched again."""
        if key is not None:
            self.answered(key, session)
        elif follows and session != f"auto-{turn}":
            self.answered(follows, session)

    def tried(self, session: str, named: str | None, prints: bytes, key: str | None, answered_at: float | None) -> None:
        """Record the end of a turn for its client's retry. ``answered_at`` is None if it got no answer; ``named`` is
        the session that its client named."""
        body = hash((named, prints))
        before, key_before, until = self._tries.pop(body, ("", None, 0.0))
        if answered_at is None:
            self._tries[body] = session, None, math.inf
        elif until == math.inf:  # the one without an answer is more likely to be sent again
            self._tries[body] = before, key_before, until
        else:
            is_open = answered_at <= until and key_before not in self._continued
            self._tries[body] = "" if is_open and before != session else session, key, answered_at + RETRY_S
        if len(self._tries) > MAX_TRIES:
            self._tries.popitem(last=False)

    def retried(self, named: str | None, prints: bytes, follows: str | None, at: float) -> str | None:
        """Return the session of the turn that a client library sends again at ``at``; None if that isn't certain.

        It is a turn that got no answer, or one whose answer is new and wasn't continued: its client had given up.
        """
        session, key, until = self._tries.pop(hash((named, prints)), ("", None, 0.0))
        if not session or at > until or key in self._continued:
            return None
        if follows and session in self._sessions.get(follows, ()):
            self._continue(follows, session)
        return session


# Buckets of a histogram of durations. Number n starts at 2^(n / BUCKETS_PER_OCTAVE) ms.
BUCKETS_PER_OCTAVE = 8  # a bucket is 9 % wide, so percentiles are off by at most 4.5 %
LOWEST_BUCKET = -54  # holds 0.01 ms and less
HIGHEST_BUCKET = 30 * BUCKETS_PER_OCTAVE  # holds 12 days and more

# Lower bounds of all buckets but the lowest. bisect() on them finds a duration's bucket in C.
_BUCKET_STARTS = [2.0 ** (bucket / BUCKETS_PER_OCTAVE) for bucket in range(LOWEST_BUCKET + 1, HIGHEST_BUCKET + 1)]


def bucket_of(ms: float) -> int:
    """Return the number of the histogram bucket that holds a duration."""
    return LOWEST_BUCKET + bisect.bisect(_BUCKET_STARTS, ms)


@dataclass
class EventBatch:
    """The payload of FRAME_EVENTS: the events since the last one, by kind; each list is in order."""

    started: Sequence[TurnStarted] = ()
    sent: Sequence[TurnSent] = ()
    answering: Sequence[TurnAnswering] = ()
    finished: Sequence[TurnFinished] = ()
    session_ended: Sequence[SessionEnded] = ()

    def in_order(self) -> list[TurnEvent]:
        """Return all events by time; simultaneous ones in the order of a turn's life."""
        by_kind: Iterable[Sequence[TurnEvent]] = vars(self).values()
        return sorted(itertools.chain.from_iterable(by_kind), key=operator.attrgetter("at"))


def decode_events(payload: bytes) -> list[TurnEvent]:
    """Decode the events of a FRAME_EVENTS, in order; ignores unknown keys. Raises ValueError when it is invalid."""
    batch: EventBatch = _event_decoder().decode(payload)
    return batch.in_order()


@functools.cache
def _event_decoder() -> Any:
    """Return a decoder that builds the dataclasses in C: the controller decodes every turn."""
    import msgspec

    return msgspec.json.Decoder(EventBatch)


class Histogram:
    """Durations in milliseconds, counted in at most 295 logarithmic buckets."""

    __slots__ = ("_at_once", "_buckets", "_new", "_sorted", "_sorted_ms")

    def __init__(self, at_once: int = 1000) -> None:
        """``at_once``: how many durations are sorted into buckets together, at a third of the cost of one by one."""
        self._at_once = at_once
        self._buckets: dict[int, int] = {}
        self._new: list[float] = []  # not sorted into buckets yet
        self._sorted, self._sorted_ms = 0, 0.0  # count and sum of those in buckets

    @property
    def count(self) -> int:
        return self._sorted + len(self._new)

    @property
    def sum_ms(self) -> float:
        return self._sorted_ms + sum(self._new)

    def add(self, *durations_ms: float) -> None:
        """Add finite durations."""
        self._new += durations_ms
        if len(self._new) >= self._at_once:
            self._sort()

    def _sort(self) -> dict[int, int]:
        """Sort the new durations into buckets. Returns the count of every bucket."""
        buckets = self._buckets
        places = collections.Counter(map(functools.partial(bisect.bisect, _BUCKET_STARTS), self._new))
        for place, count in places.items():
            bucket = LOWEST_BUCKET + place
            buckets[bucket] = buckets.get(bucket, 0) + count
        self._sorted, self._sorted_ms = self.count, self.sum_ms
        self._new.clear()
        return buckets

    def add_buckets(self, counts: Mapping[str, int]) -> None:
        """Add another process's bucket counts; each duration counts as the middle of its bucket."""
        for name, count in counts.items():
            bucket = int(name)
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self._sorted += count
            self._sorted_ms += bucket_middle(bucket) * count

    def by_name(self) -> dict[str, int]:
        """Return all counts, in the form that ``add_buckets`` takes."""
        return {str(bucket): count for bucket, count in self._sort().items()} if self.count else {}

    def count_below(self, octave: int) -> int:
        """Return how many are shorter than 2^octave ms; exact, because every octave starts a new bucket."""
        return sum(count for bucket, count in self._sort().items() if bucket < octave * BUCKETS_PER_OCTAVE)

    def merge(self, other: Histogram) -> None:
        """Add all durations of ``other``."""
        for bucket, count in other._sort().items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self._sorted += other.count
        self._sorted_ms += other.sum_ms

    @property
    def mean_ms(self) -> float | None:
        return self.sum_ms / self.count if self.count else None

    def percentile(self, q: float) -> float | None:
        """Return the ``q`` quantile (0 to 1) in ms, as the middle of its bucket; None when empty."""
        seen, buckets = 0, self._sort()
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= q * self.count:
                return bucket_middle(bucket)
        return None


NO_GAPS: Final = Histogram()  # for a turn that isn't a stream; never add to it


def bucket_middle(bucket: int) -> float:
    """Return the geometric middle of a histogram bucket, in ms."""
    return float(2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))


# Format numbers of data that outlives a process. 0.1.0 wrote none. New fields may be added, but never reused.
RELAY_PROTOCOL = 1  # frames between controller and relay
SUPPORTED_PROTOCOLS = (0, RELAY_PROTOCOL)  # that a controller understands; 0 is 0.1.0, with the same frames
RECORD_FORMAT = 1  # a replica's record
SPEC_FORMAT = 1  # ServeSpec, the input of `serve`
CONFIG_FORMAT = 1  # the saved configuration
HANDOVER_FORMAT = 1  # the saved successions of replicas

REPLICA_STATES = ("pending", "starting", "loading", "ready", "draining", "stopped", "failed")


@dataclass(frozen=True)
class GpuSample:
    """One GPU as NVML reports it; None for values that the device doesn't report, such as utilisation under MIG."""

    name: str
    utilization: float | None  # 0 to 100
    memory_used: int | None  # bytes
    memory_total: int | None  # bytes
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class ReplicaRecord:
    """A replica's state. `serve` writes it to replicas/<id>.json, atomically, whenever it changes."""

    replica: str
    model: str
    state: str  # one of REPLICA_STATES
    engine: str
    node: str  # host name
    pid: int  # of `serve`
    process: str  # process_stamp(): boot id and start time, so that a reused pid isn't mistaken for it
    host: str = "127.0.0.1"  # address the engine listens on
    port: int | None = None
    telemetry_port: int | None = None
    job_id: str | None = None
    progress: str | None = None  # such as "5/9", while weights load
    message: str | None = None
    failure: ReplicaFailure | None = None
    restarts: int = 0  # restarts of the engine by `serve`
    started_at: float = 0.0  # s since the epoch
    ready_at: float | None = None
    ends_at: float | None = None  # end of the walltime, s since the epoch
    slots: int = 0
    takes_priority: bool = False  # see EngineSpec
    gpus: tuple[GpuSample, ...] = ()
    gpu_ids: tuple[str, ...] = ()  # assigned to it (CUDA_VISIBLE_DEVICES)
    is_idle: bool = False  # it shut itself down after idle_shutdown_minutes without a turn
    address: str | None = None  # the node's, as Slurm knows it
    is_gated: bool = False  # a Gate listens on its port: it asks for the key, and answers the keyed challenge
    # Job fields, from the last query to the scheduler:
    time_left_s: float | None = None  # rest of the walltime
    queue_wait_s: float | None = None  # from submission to start, or until now
    pending_reason: str | None = None  # the scheduler's reason, such as QOSMaxJobsPerUserLimit
    partition: str | None = None  # to which its job was submitted
    starts_at: float | None = None  # s since the epoch; when Slurm expects a pending job to start
    format: int = RECORD_FORMAT


HISTORY_QUESTION_S = 10.0  # time the controller has for questions that it reads from the disk
STOP_GRACE_S = 25.0  # time for an engine's turns to finish after SIGTERM; less than Slurm's KillWait, 30 s


@dataclass(frozen=True)
class EngineProbe:
    """How to query a kind of engine for its health, load and progress."""

    health_path: str = "/health"
    healthy_below: int = 201  # it is healthy if the probe's status is at least 200 and below this
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # EngineLoad field → metrics, summed
    cache_info_metric: str | None = None  # its labels contain the size of the KV cache
    sleep_metric: str | None = None
    progress: str | None = None  # pattern of log lines while weights load; groups: done, total
    is_guarded: bool = False  # it runs EngineGuard: every path needs the key, and it answers challenges


@dataclass(frozen=True)
class EngineSpec:
    """How `serve` starts a model's engine. The operator's machine renders it from a row of the table of engines.

    `serve` replaces ``{python}``, ``{program}`` (agent_infra.py or node.pyz), ``{host}`` and ``{port}`` in ``argv``
    and ``rank_argv``, and ``{model_path}`` if weights are staged; for an engine on several nodes also
    ``{master_host}``, ``{master_port}`` and ``{node_rank}``.
    """

    name: str  # the row's name
    argv: tuple[str, ...]
    rank_argv: tuple[str, ...] = ()  # of its headless part on each additional node
    key_variable: str = "AGENT_INFRA_API_KEY"  # environment variable for the key
    slots: int = 0  # turns that run at once; 0 = unknown
    takes_priority: bool = False  # it schedules by the field ``priority`` of requests, the lowest first
    uses_gpus: bool = True
    package: str | None = None  # required in its Python
    probe: EngineProbe = EngineProbe()


@dataclass(frozen=True)
class ServeSpec:
    """The input of `serve`: JSON in <run directory>/specs/<replica>.json (0600)."""

    replica: str
    model: str  # the model's name
    model_path: str
    engine: EngineSpec
    run_directory: str
    key_file: str  # 0600; holds the key that every request to this replica must carry
    base_port: int = 5900  # first port tried
    env: Mapping[str, str] = field(default_factory=dict)  # for the engine, on top of this process's environment
    idle_shutdown_minutes: float | None = None  # minutes without a turn until the replica shuts itself down
    gpus: int = 0  # GPUs per replica, if several share one job; 0: leave CUDA_VISIBLE_DEVICES unchanged
    bind_host: str = "127.0.0.1"
    gpu_ids: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES; empty: leave it unchanged
    job_id: str | None = None
    stop_grace: float = STOP_GRACE_S  # s for the engine to finish its turns after SIGTERM; less than Slurm's KillWait
    load_timeout: float = 3600.0  # s for the engine to become ready
    hang_timeout: float = 120.0  # s without an answer to its health probe until a ready engine is killed
    restart_backoff: float = 1.0  # s before the first restart; five times longer before each following one
    stage: str | None = None  # folder of the node's own disk that weights are copied to; may contain variables
    nodes: int = 1  # that the replica spans; `rank` runs on all but the first
    is_job: bool = False  # it runs in a Slurm job, whose environment has the job id and the node's name
    is_gated: bool = False  # the engine listens on loopback, and `serve` forwards to it what carries the key (see Gate)
    is_probe: bool = False  # `serve` starts no engine; it answers `doctor` (see answer_probe())
    format: int = SPEC_FORMAT


def replace_placeholders(words: Iterable[str], values: Mapping[str, object]) -> list[str]:
    """Return ``words`` with each ``{name}`` in ``values`` replaced, in one pass; other braces stay."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return [re.sub(pattern, lambda match: str(values[match[0][1:-1]]), word) for word in words]


def record_from_json(text: str) -> ReplicaRecord:
    """Parse a record that `serve` wrote; ignores keys of newer versions. Raises ValueError when it is invalid."""
    document = json.loads(text)
    return rebuild(ReplicaRecord, {"format": 0, **document} if isinstance(document, dict) else document)


def spec_from_json(text: str) -> ServeSpec:
    """Parse a ServeSpec from ``json.dumps(dataclasses.asdict(spec))``. Raises ValueError when it is invalid."""
    document = json.loads(text)
    if isinstance(document, dict) and document.get("format") != SPEC_FORMAT:
        raise ValueError("another version of agent_infra wrote this specification")
    return rebuild(ServeSpec, document)


@functools.cache  # replicas are polled often
def _types_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def rebuild(kind: type[_Dataclass], document: Any) -> _Dataclass:
    """Rebuild a dataclass from its ``asdict``, perhaps after JSON; ignores unknown keys. Raises ValueError."""
    if not isinstance(document, dict):
        raise ValueError(f"found {shorten(document)} in place of a {kind.__name__}")
    types = _types_of(typing.cast(typing.Hashable, kind))
    values = {name: _as_type(types[name], document[name], name) for name in types.keys() & document.keys()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _as_type(wanted: Any, value: Any, name: str) -> Any:
    """Return ``value``, which came through JSON, as the type of the field ``name``."""
    if type(value) is wanted and wanted is not float:
        return value
    inner = typing.get_args(wanted)
    if type(None) in inner:
        return None if value is None else _as_type(inner[0], value, name)
    if dataclasses.is_dataclass(wanted):
        return rebuild(typing.cast(type, wanted), value)
    origin = typing.get_origin(wanted)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_as_type(inner[0], item, name) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _as_type(inner[1], item, name) for key, item in value.items()}
    if wanted is float and type(value) in (int, float) and -math.inf < value < math.inf:
        return value
    raise ValueError(f"{name}: found {shorten(value)}")


def decode_record(replica: str, text: str) -> ReplicaRecord:
    """Parse a record; an unreadable one becomes a failed replica with the reason. Never raises.

    Ignores unknown keys.  ``replica`` (from the file's name) takes precedence over the name in the text.
    """
    try:
        record = record_from_json(text)
        if record.state not in REPLICA_STATES:
            raise ValueError(f"state: {shorten(record.state)} is unknown to this version")
    except (ValueError, RecursionError) as error:
        reason = f"its record cannot be read: {error}"
        hint = "stop it and start it again; was it started by another version of agent_infra?"
        document: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(text)
        known = document if isinstance(document, dict) else {}
        pid, process = known.get("pid"), known.get("process")
        return ReplicaRecord(
            replica=replica,
            model=replica.rpartition("-")[0],
            state="failed",
            engine="",
            node="",
            # With these two, a replica can still be stopped.
            pid=pid if isinstance(pid, int) else 0,
            process=process if isinstance(process, str) else "",
            message=reason,
            failure=ReplicaFailure("unknown", reason, hint),
        )
    return dataclasses.replace(record, replica=replica)

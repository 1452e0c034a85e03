"""What the processes of a deployment tell each other: frames, turn events, records, specifications, formats."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import json
import math
import operator
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from agent_infra_core.settings import SCALAR_KINDS, shorten


@dataclass(frozen=True)
class ReplicaFailure:
    """Why a replica failed: its class, the line that decides it, and what to do."""

    kind: str
    line: str
    hint: str


@dataclass(frozen=True)
class EngineLoad:
    """What an engine says about itself now; None where it does not tell."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # 0 to 1
    kv_capacity_tokens: int | None = None
    prefix_queries: int | None = None  # tokens looked up in the prefix cache, since the engine's start
    prefix_hits: int | None = None  # tokens found there
    preemptions: int | None = None
    prompt_tokens: int | None = None  # with those found in the cache
    generation_tokens: int | None = None
    is_sleeping: bool | None = None  # asleep, it answers its health probe and hangs every turn


@dataclass(frozen=True)
class Backend:
    """One row of the replica table that the controller hands to the relay."""

    id: str
    model: str  # what clients put in "model", and what the engine is told to call it
    host: str  # a numeric address: the relay never asks a resolver
    port: int
    telemetry_port: int | None = None  # GET /load of `serve`; None: the replica reports no load (proxy alone)
    key: str | None = None  # the replica's own key, put into every request to it
    state: str = "ready"  # ready | draining; other states are not in the table
    slots: int = 0  # turns that it runs at once; 0 = unknown, then nothing queues for it
    node: str = ""


# Frames on the Unix socket between controller and relay: one byte of kind, four bytes of length, the payload (JSON).
# FRAME_TABLE: {"settings": {"proxy": ProxyConfig with its api_key, "headers": HeadersConfig, "log_format": "text" or
# "json", "drain_seconds"} (in a controller's first table, later only when it changed), "models": [what clients may ask
# for], "loading": [those of them that have replicas on their way: turns wait for these], "backends": [Backend]}.
FRAME_TABLE = b"T"  # controller → relay
FRAME_STATS = b"S"  # controller → relay: the finished bytes of GET /stats, which begin with STATS_PREFIX
STATS_PREFIX = b'{"snapshot_age_ms":0,'  # the relay puts the document's age there
FRAME_HELLO = b"H"  # relay → controller, first: {"protocol", "pid", "port", "started_at"}, and the listening socket
FRAME_EVENTS = b"E"  # relay → controller: EventBatch
FRAME_GAUGES = b"G"  # relay → controller, once a second: see Relay.gauges()
FRAME_REQUEST = b"R"  # relay → controller: what somebody asked for over HTTP: {"op": "drain"|"undrain", "backend"}, or

# {"op": "metrics", "id"}, {"op": "session", "id", "session"} and {"op": "stats", "id"}, to which comes a FRAME_ANSWER;
# to the last, when there is something new, a FRAME_STATS before
FRAME_ANSWER = b"A"  # controller → relay: {"id", "status", "type", "body"}: an HTTP answer
_FRAME_HEAD = struct.Struct(">cI")
MAX_FRAME_BYTES = 256 << 20


class FrameReader:
    """Cuts a byte stream into frames; owns the bytes of the frame that is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The ``(kind, payload)`` of every frame that ``data`` completes; ValueError on a length beyond the maximum."""
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
    """One frame, ready to send."""
    return _FRAME_HEAD.pack(kind, len(payload)) + payload


MAX_FIGURE = 1e12  # of a duration or a count off the wire; so no sum ever becomes infinite


def is_count(value: Any) -> TypeGuard[int]:
    """Whether this is a number of things: engines are believed no more than that."""
    return type(value) is int and 0 <= value <= MAX_FIGURE


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
MAX_DURATION_MS = 2.0**30  # 12 days; whatever took longer is counted in the highest bucket
HIGHEST_BUCKET = histogram_bucket(MAX_DURATION_MS)
LOWEST_BUCKET = histogram_bucket(0.0)
_BUCKETS = {str(bucket): bucket for bucket in range(LOWEST_BUCKET, HIGHEST_BUCKET + 1)}  # as JSON names them

# Where all buckets but the lowest begin: so a duration's bucket is found in C.
_BUCKET_STARTS = [2.0 ** (bucket / BUCKETS_PER_OCTAVE) for bucket in range(LOWEST_BUCKET + 1, HIGHEST_BUCKET + 1)]


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


# Formats of what outlives a process. 0.1.0 wrote no number. Fields are added, never reused.
RELAY_PROTOCOL = 1  # frames between controller and relay
SPOKEN_PROTOCOLS = (0, RELAY_PROTOCOL)  # that a controller understands: 0.1.0's frames are the same
RECORD_FORMAT = 1  # a replica's record
SPEC_FORMAT = 1  # what `serve` is told
CONFIG_FORMAT = 1  # the saved configuration
HANDOVER_FORMAT = 1  # which replica succeeds which

REPLICA_STATES = ("pending", "starting", "loading", "ready", "draining", "stopped", "failed")


@dataclass(frozen=True)
class GpuSample:
    """One GPU as NVML sees it; None where the device does not tell (utilisation under MIG, for one)."""

    name: str
    utilization: float | None  # 0 to 100
    memory_used: int | None  # bytes
    memory_total: int | None  # bytes
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class ReplicaRecord:
    """What `serve` writes to replicas/<id>.json, atomically, whenever it changes."""

    replica: str
    model: str
    state: str  # one of REPLICA_STATES
    engine: str
    node: str  # host name
    pid: int  # of `serve`
    process: str  # stamp that tells this process from a later one with its number: boot id and start time
    host: str = "127.0.0.1"  # address the engine listens on
    port: int | None = None
    telemetry_port: int | None = None
    job_id: str | None = None
    progress: str | None = None  # "5/9" while weights load
    message: str | None = None
    failure: ReplicaFailure | None = None
    restarts: int = 0  # of the engine, by `serve`
    started_at: float = 0.0  # s since the epoch
    ready_at: float | None = None
    ends_at: float | None = None  # walltime
    slots: int = 0
    gpus: tuple[GpuSample, ...] = ()
    gpu_ids: tuple[str, ...] = ()  # handed out to it (CUDA_VISIBLE_DEVICES)
    is_idle: bool = False  # it ended by itself, after idle_shutdown_minutes without a turn
    # Of its job, as the scheduler said at the last look:
    time_left_s: float | None = None  # of the walltime
    queue_wait_s: float | None = None  # between submission and start, or until now
    pending_reason: str | None = None  # the scheduler's own word, such as QOSMaxJobsPerUserLimit
    partition: str | None = None  # that its job was submitted to
    starts_at: float | None = None  # s since the epoch; when Slurm expects a job that waits to start
    format: int = RECORD_FORMAT


STOP_GRACE_S = 25.0  # that an engine has for its turns after SIGTERM; below Slurm's KillWait of 30 s


@dataclass(frozen=True)
class EngineProbe:
    """How a kind of engine is asked about itself."""

    health_path: str = "/health"
    healthy_below: int = 201  # it serves when its health probe answers with 200, or more up to here
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # EngineLoad field → names, summed
    cache_info_metric: str | None = None  # its labels tell the size of the KV cache
    sleep_metric: str | None = None
    progress: str | None = None  # pattern of a log line while weights load; groups: done, total
    is_guarded: bool = False  # EngineGuard stands before it: the key on every path, and the keyed challenge


@dataclass(frozen=True)
class EngineSpec:
    """How `serve` starts a model's engine, as the operator rendered it from its row of the engines' table.

    In ``argv`` and ``rank_argv`` `serve` replaces ``{python}``, ``{program}`` (agent_infra.py or node.pyz), ``{host}``
    and ``{port}``, and for an engine on several nodes ``{master_host}``, ``{master_port}`` and ``{node_rank}``.
    """

    name: str  # of the row
    argv: tuple[str, ...]
    rank_argv: tuple[str, ...] = ()  # of its headless part on each further node
    key_variable: str = "AGENT_INFRA_API_KEY"  # of its environment
    slots: int = 0  # turns that run at once; 0 = unknown
    uses_gpus: bool = True
    package: str | None = None  # that its Python must have
    probe: EngineProbe = EngineProbe()


@dataclass(frozen=True)
class ServeSpec:
    """What `serve` is told, as JSON in <run directory>/specs/<replica>.json (0600)."""

    replica: str
    model: str  # its name
    model_path: str
    engine: EngineSpec
    run_directory: str
    key_file: str  # 0600: the key that every request to this replica must carry
    base_port: int = 5900  # first port tried
    env: Mapping[str, str] = field(default_factory=dict)  # of the engine, besides this process's own
    idle_shutdown_minutes: float | None = None  # without a turn; then the replica ends by itself
    gpus: int = 0  # that each of several replicas in one job gets; 0: CUDA_VISIBLE_DEVICES is left as it is
    bind_host: str = "127.0.0.1"
    gpu_ids: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES; empty: left as it is
    job_id: str | None = None
    stop_grace: float = STOP_GRACE_S  # s that the engine has to finish its turns after SIGTERM; below Slurm's KillWait
    load_timeout: float = 3600.0  # s that the engine has to get ready
    hang_timeout: float = 120.0  # s without an answer to its health probe after which a ready engine is killed
    restart_backoff: float = 1.0  # s before the first restart; five times as long before each further one
    nodes: int = 1  # that the replica spans: on the others, `rank` follows this one
    is_job: bool = False  # in a job of Slurm, whose environment tells its number and the node's name
    is_probe: bool = False  # `serve` only says what it sees here (see probe_node()), and ends
    format: int = SPEC_FORMAT


def fill_in(words: Iterable[str], values: Mapping[str, object]) -> list[str]:
    """``words`` with each ``{name}`` of ``values`` replaced, in one pass; other braces stay."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return [re.sub(pattern, lambda match: str(values[match[0][1:-1]]), word) for word in words]


def record_from_json(text: str) -> ReplicaRecord:
    """The record that `serve` wrote; keys of a newer version are left out. ValueError when it is none."""
    try:
        values = {"format": 0, **known_fields(ReplicaRecord, json.loads(text))}
        values["gpus"] = tuple(GpuSample(**known_fields(GpuSample, gpu)) for gpu in values.get("gpus", ()))
        values["gpu_ids"] = tuple(values.get("gpu_ids", ()))
        if values.get("failure"):
            values["failure"] = ReplicaFailure(**known_fields(ReplicaFailure, values["failure"]))
        return ReplicaRecord(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a replica record: {error}") from error


def spec_from_json(text: str) -> ServeSpec:
    """The ServeSpec that ``json.dumps(dataclasses.asdict(spec))`` wrote; ValueError when it is none."""
    try:
        values = known_fields(ServeSpec, json.loads(text))
        if values.get("format") != SPEC_FORMAT:
            raise ValueError("another version of agent_infra wrote this specification")
        engine = known_fields(EngineSpec, values["engine"])
        probe = known_fields(EngineProbe, engine["probe"])
        probe["metrics"] = {name: tuple(names) for name, names in probe["metrics"].items()}
        engine |= {
            "probe": EngineProbe(**probe),
            "argv": tuple(engine["argv"]),
            "rank_argv": tuple(engine["rank_argv"]),
        }
        return ServeSpec(**{**values, "engine": EngineSpec(**engine), "gpu_ids": tuple(values["gpu_ids"])})
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not a replica's specification: {error}") from error


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.name in values}


def decode_record(replica: str, text: str) -> ReplicaRecord:
    """The record that ``text`` says; one that cannot be read comes out as failed, with the reason. Never raises.

    Keys that this version does not know are left out.  ``replica`` (the file's name) wins over what the text says.
    """
    try:
        record = record_from_json(text)
        _check_types(record)
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
            # With these two, if they are there, a replica with an odd record can still be stopped.
            pid=pid if isinstance(pid, int) else 0,
            process=process if isinstance(process, str) else "",
            message=reason,
            failure=ReplicaFailure("unknown", reason, hint),
        )
    return dataclasses.replace(record, replica=replica)


def _check_types(record: Any) -> None:
    """Raise ValueError where a field of a record, or of a part of it, is not of its annotated type."""
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        annotation, _, optional = str(item.type).partition(" | ")
        if dataclasses.is_dataclass(value):
            _check_types(value)
        elif annotation == "tuple[GpuSample, ...]":
            for gpu in value:
                _check_types(gpu)
        elif value is not None or not optional:
            _, is_kind = SCALAR_KINDS.get(annotation, ("", lambda _: False))
            if not is_kind(list(value) if isinstance(value, tuple) else value):
                raise ValueError(f"{item.name}: found {shorten(value)}")

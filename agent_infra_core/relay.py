"""Relay: the data plane, one gevent process that relays and nothing else. Patched first of all, in its own entry."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import heapq
import hmac
import io
import itertools
import json
import math
import os
import re
import resource
import secrets
import signal
import socket
import struct
import sys
import time
import traceback
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from agent_infra_core import __version__
from agent_infra_core.configuration import HeadersConfig, ProxyConfig
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.routing import (
    ANYWHERE,
    AttainedService,
    Backend,
    RouteRank,
    RouteRequest,
    choose_backend,
    queue_key,
)
from agent_infra_core.tracking import (
    NO_GAPS,
    EventBatch,
    Histogram,
    SessionEnded,
    TurnAnswering,
    TurnFinished,
    TurnSent,
    TurnStarted,
)
from agent_infra_core.wire import (
    _NOT_FORWARDED,
    _NOT_RETURNED,
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_GAUGES,
    FRAME_HELLO,
    FRAME_REQUEST,
    FRAME_STATS,
    FRAME_TABLE,
    INFERENCE_PATHS,
    LAST_CHUNK,
    MAX_FIGURE,
    MAX_HEAD_BYTES,
    MAX_TRACED_BYTES,
    NO_DIGEST,
    STATS_PREFIX,
    AnswerDigest,
    AnswerHead,
    BodyDecoder,
    EventStream,
    FrameReader,
    HeaderLines,
    HeadMemory,
    RepeatedHead,
    RequestError,
    RequestHead,
    WireError,
    conversation_key,
    encode_chunk,
    encode_frame,
    error_document,
    error_event,
    forwarded_head,
    http_phrase,
    message_print,
    origin_form,
    parse_answer_head,
    parse_request_head,
    plain_answer,
    returned_head,
    sendable_text,
    split_inference_path,
    spoken,
)


@contextlib.contextmanager
def unix_address(path: str) -> Iterator[str]:
    """What to bind or connect a Unix socket to for ``path``: itself, or a short name for it while the block runs.

    The kernel takes about 100 bytes; a longer path is reached through its directory's descriptor.
    """
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


NO_DESCRIPTOR = errno.EMFILE, errno.ENFILE
RECEIVE_BYTES = 64 << 10
JOINED_BODY_BYTES = 16 << 10

# An engine's step takes 7 ms and more. So many clients could not be served faster without a pause: each turn of one
# waits for two at most.
PAUSE_S, PACED_FROM_CLIENTS = 0.002, 32
STREAMS_PAUSE_S = 0.010  # in its place after a wake in which nothing but parts of streams went by
GATHERED_BODY_BYTES = 1 << 20  # up to here callbacks gather a body that comes in pieces
LONG_BODY_BYTES = 16 << 10  # from here on it pays to remember what was read
KNOWN_BODIES_BYTES = 32 << 20
APP_BODY_BYTES = 64 << 10
BUFFERED_ANSWER_BYTES = 8 << 20  # an answer that is no stream and longer than this is passed on as it comes
DIGESTED_ANSWER_BYTES = 4 << 20  # usage of a longer one is not read
IDLE_CLIENT_S = 300.0  # between two requests of one connection
HEAD_S = 15.0  # from a head's first byte to its last
BODY_S = 30.0  # without a byte of the body
LINGER_S = 2.0  # that a refused client gets to read why
SWEEP_S = 0.1  # how late a deadline may be noticed, and how often the controller is told what happened
SHORTAGE_S = 60.0  # how often a lack of descriptors is logged
PROBE_S = 5.0
EJECT_AFTER = 3  # transport errors in a row
FIRST_EJECTION_S = 0.5  # doubled with each ejection in a row, up to the health check interval
BUSY_S = 0.5  # that a replica gets no work after 429 or 503, at least
RETRY_SHARE = 0.1  # of requests; the budget's bounds are RETRY_FLOOR and ten times that
RETRY_FLOOR = 100.0
PROXY_STOPPED = "the proxy was stopped"
NO_RETRY_LEFT = f"it is not sent elsewhere: the retry budget, {RETRY_SHARE:.0%} of all requests, is spent"
AWAY_STATES = ("draining", "stopped", "failed")  # that a replica's own digest tells: it takes no turn
RACE_S = 1.0  # in which a replica's close, that crossed with a request, is known: a round trip, and more
GAPS_AT_ONCE = 64  # of a stream, that wait to be counted
PACKED_TURNS = 16  # finished turns that are encoded at once: a fifth of a millisecond's work
BATCHED_PACKS = 32  # of these in one frame
QUESTION_S = 2.0
LAST_FLUSH_S = 2.0  # for the last events, at the relay's end: its controller may take none
NAMED_ABSENT = 3  # replicas that a refusal names
STATS_FRESH_S = 1.5  # a /stats document that is older is asked for; while somebody reads them, one comes every second
MAX_BUFFERED_EVENTS = 50_000
MAX_BUFFERED_PACKS = MAX_BUFFERED_EVENTS // PACKED_TURNS


class ClientGone(Exception):  # noqa: N818 - it is no error: the client left, and its turn with it
    """The client closed its connection."""


class TransportError(AgentInfraError):
    """A replica could not be reached; nothing was sent to it."""


class Reactor:
    """gevent's event loop, as much of it as the relay uses, imported after the patch.

    A greenlet waits by parking; event-loop callbacks (and only they) wake it.  A wake is a hint: whoever parks looks
    again at what it waits for.
    """

    def __init__(self) -> None:
        import gevent
        import gevent.event
        import gevent.lock
        from gevent.monkey import get_original

        self.hub = gevent.get_hub()
        self.loop = self.hub.loop
        self.current: Callable[[], Any] = gevent.getcurrent
        self.spawn: Callable[..., Any] = gevent.spawn
        self.sleep: Callable[[float], None] = gevent.sleep
        self.new_lock: Callable[[], Any] = gevent.lock.RLock
        self.new_result: Callable[[], Any] = gevent.event.AsyncResult
        self.new_socket: Any = get_original("socket", "socket")  # plain, non-blocking: watched by the loop directly

    def watch_reads(self, sock: Any, callback: Callable[[], None]) -> Any:
        """A started watcher that calls ``callback`` whenever ``sock`` can be read."""
        watcher = self.loop.io(sock.fileno(), 1)
        watcher.start(callback)
        return watcher

    def every(self, seconds: float, callback: Callable[[], None]) -> Any:
        timer = self.loop.timer(seconds, seconds)
        timer.start(callback)
        return timer

    def before_waiting(self, callback: Callable[[], None]) -> Any:
        """A started watcher that calls ``callback`` each time before the loop waits, after all that is due."""
        watcher = self.loop.prepare(priority=self.loop.MINPRI)
        watcher.start(callback)
        return watcher


class WakePacing:
    """Lets bytes gather while many clients are connected, as a network card moderates its interrupts: a wake that
    finds several chunks is cheaper for each.

    What comes ``PAUSE_S`` after the wake before, or later, is passed on at once; the rest waits until then. Where that
    wake found parts of streams alone, it is ``STREAMS_PAUSE_S``: then nobody waits for the next but readers.
    """

    def __init__(self, clients: Collection[ClientConnection]) -> None:
        from gevent.monkey import get_original

        self._clients, self._woken = clients, 0.0
        self._sleep: Callable[[float], None] = get_original("time", "sleep")
        # What went by since the loop last waited: a client's bytes or an answer's end, which more follows; parts of
        # streams, and when the first was seen (0: none was). All that a wait found had come by then.
        self.has_turns, self.parts_came = False, 0.0

    def note_parts(self) -> float:
        """The first part of a stream since the loop last waited; when it came, as all the others do."""
        self.parts_came = time.monotonic()
        return self.parts_came

    def pause(self) -> None:
        if len(self._clients) >= PACED_FROM_CLIENTS:
            now = time.monotonic()
            pause_s = STREAMS_PAUSE_S if self.parts_came and not self.has_turns else PAUSE_S
            rest = self._woken + pause_s - now
            if rest > 0.0:
                self._sleep(rest)
                now += rest
            self._woken = now
        self.has_turns, self.parts_came = False, 0.0


@dataclass(frozen=True)
class Labels:
    """What a request's headers say about its turn."""

    session: str | None
    task: str | None
    client: str | None
    pre_ms: float | None
    post_ms: float | None
    ends_session: bool


@dataclass(frozen=True)
class RequestPlan:
    """What follows from a request's head alone: where it goes, whose turn it is."""

    request: RequestHead
    path: bytes  # without query; of an inference path, without /{model}
    query: bytes
    is_inference: bool
    model: str | None  # that the path names
    labels: Labels
    is_form: bool  # the body is no JSON

    @functools.cached_property
    def target(self) -> bytes:
        return self.path + b"?" + self.query if self.query else self.path


class Turn:
    """One request of a client on its way through the relay; what tracking says of it is read from here.

    All times but ``arrived_at`` are monotonic.
    """

    __slots__ = (
        "__dict__", "answer", "arrived", "arrived_at", "backend", "cuts_usage", "digest", "ended", "first", "follows",
        "id", "is_stream", "labels", "model", "outcome", "over", "path", "prints", "prompt", "queue_ms", "replica",
        "sent", "session", "status", "tokens", "wanted_text", "words",
    )  # fmt: skip

    # What most turns leave as it is.
    route: RouteRequest = ANYWHERE
    charged_s = 0.0  # service that its session was charged in advance, when it had to wait
    retries = 0
    deaths = 0  # replicas that died with it
    error: str | None = None
    events = 0
    gaps: Histogram = NO_GAPS
    is_told = False  # the controller knows of it; likewise the moments below
    told_sent = 0.0
    told_first = 0.0

    def __init__(self, name: str, arrived: float, model: str, plan: RequestPlan, wanted_text: int) -> None:
        self.id = name
        self.arrived = arrived
        self.arrived_at = time.time() - (time.monotonic() - arrived)  # s since the epoch
        self.model = model
        self.path = plan.path
        self.labels = labels = plan.labels
        self.session = labels.session
        self.wanted_text = wanted_text
        self.is_stream = False
        self.cuts_usage = True
        self.tokens = 0  # of the prompt, roughly
        self.replica: LiveReplica | None = None  # that holds a slot for it
        self.backend: str | None = None
        self.sent = 0.0
        self.queue_ms = 0.0
        self.first = 0.0  # byte (of a stream: event) of the answer
        self.ended = 0.0
        self.over = 0.0  # when nothing more was to be done for it
        self.status = 0
        self.outcome = "aborted"
        self.words: Any = None  # the body's fields, while nobody has looked at their words
        self.answer = b""  # a whole answer, while nobody has looked at it
        self.digest: AnswerDigest | None = None
        self.prompt = ""  # excerpt
        self.prints = b""  # see TurnStarted, like the next
        self.follows: str | None = None

    @property
    def is_anthropic(self) -> bool:
        return self.path.startswith(b"/v1/messages")


class HeadReader:
    """Reads heads; those that come again and again are read in full once."""

    def __init__(self) -> None:
        self._request_lines, self._answer_lines = HeaderLines(_NOT_FORWARDED), HeaderLines(_NOT_RETURNED)
        self.known_requests, self.known_answers = HeadMemory(has_secrets=True), HeadMemory(has_secrets=False)

    def plan(
        self, head: bytes, let_pass: bytes | None, labels_of: Callable[[Mapping[bytes, bytes]], Labels]
    ) -> tuple[RequestPlan, int | None, bytes]:
        """What a request head asks for, the length of its body, its Authorization; ``let_pass`` is one known to be
        sound. Raises WireError."""
        known = self.known_requests.find(head, len(head))
        if known is not None and known[2] == let_pass:
            return known
        request = parse_request_head(head, self._request_lines)
        path, _, query = origin_form(request.target).partition(b"?")
        route = split_inference_path(path) if request.method == b"POST" else None
        model, path = route or (None, path)
        labels = labels_of(request.fields)
        is_form = b"multipart" in request.fields.get(b"content-type", b"")
        plan = RequestPlan(request, path, query, route is not None, model, labels, is_form)
        fields = dict(request.fields)
        authorization = request.fields.pop(b"authorization", b"")  # no plan that is kept holds a secret
        # Kept is what an express may carry, and what is likely to come again.
        is_plain = request.length and request.version and not fields.keys() & {b"expect", b"upgrade"}
        if route is not None and is_plain and labels.pre_ms is None and labels.post_ms is None:
            self.known_requests.keep(head, fields, plan)
        return plan, request.length, authorization

    def answer(self, data: bytes, end: int) -> tuple[AnswerHead, int | None]:
        """The answer head ``data[:end]`` and the length of its body, as in AnswerHead; WireError."""
        known = self.known_answers.find(data, end)
        if known is not None:
            return known[0], known[0].length if known[1] < 0 else known[1]
        head = parse_answer_head(data[:end], self._answer_lines)
        told = head.fields.get(b"content-length")
        # One in chunks has no length, whatever else it says: the next such head would be believed its figure.
        means_it = told is None or (head.length is not None and told == b"%d" % head.length)
        has_body = head.status >= 200 and head.status not in (204, 304)
        if has_body and means_it:
            self.known_answers.keep(data[:end], head.fields, head)
        return head, head.length


class Upstream:
    """A connection to a replica, watched for as long as it lives; idle, it goes when the replica closes it."""

    __slots__ = ("head", "replica", "sock", "watcher")

    def __init__(self, replica: LiveReplica, sock: Any, head: RepeatedHead, reactor: Reactor) -> None:
        self.replica, self.sock, self.head = replica, sock, head
        self.watcher = reactor.watch_reads(sock, self._on_idle)

    def rest(self) -> None:
        """Wait among the replica's idle connections for the next exchange."""
        if self.replica.is_gone:
            return self.close()
        self.watcher.callback = self._on_idle
        self.replica.idle[self] = None
        return None

    def send(self, head: bytes, body: bytes | bytearray) -> int:
        """Send a request, as much of it as the socket takes at once; the number of bytes."""
        try:
            # Below some size a copy is cheaper than what it takes to send two buffers at once.
            if len(body) < JOINED_BODY_BYTES:
                return int(self.sock.send(head + body))
            return int(self.sock.sendmsg((head, body)))
        except OSError:
            return 0  # said again, and understood, when the rest is sent

    def _on_idle(self) -> None:
        self.replica.forget(self)  # closed by the replica, or it sends what nobody asked for

    def send_rest(self, message: Sequence[bytes | bytearray], sent: int, exchange: Exchange) -> bool:
        """Send what is left of a request; False when it does not go: what the replica said, or that it hung up, is
        then read. For the client's own greenlet."""
        client = exchange.client
        rest = memoryview(b"".join(message))[sent:]
        try:
            while rest and exchange.result is None:
                client.wait_writable(self.sock)
                if client.gone or exchange.is_late():
                    return False
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.sock.send(rest) :]
                    client.deadline = time.monotonic() + client.relay.settings.proxy.request_timeout
        except OSError:
            return False
        return not rest

    def close(self) -> None:
        self.watcher.stop()
        self.watcher.close()
        self.sock.close()


class LiveReplica:
    """One backend as the relay sees it: its row, its connections, its load and its health. A routing view."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.id = backend.id
        self.host = f"{backend.host}:{backend.port}".encode("ascii")
        self.answer_line = b"x-agent-infra-backend: %b\r\n" % backend.id.encode("ascii", "replace")
        self.in_flight = self.requests = self.errors = 0
        self.last_chosen = 0
        self.latency_ms: float | None = None
        self.busy_until = 0.0
        self.foreign_work = 0
        self.gpu_utilization = self.kv_usage = self.kv_tokens = 0.0
        self.load: Any = None
        self.override: str | None = None  # what an operator asked for, until the table says the same
        self.health = "up"  # up | trial (one turn at a time, after an ejection) | down
        self.reason: str | None = None
        self.failures = 0  # transport errors in a row
        self.ejections = 0  # in a row
        self.probe_failures = 0  # in a row
        self.last_byte = 0.0
        self.dead_until = 0.0  # a probe found nobody there; believed until then
        self.idle: dict[Upstream, None] = {}  # the most recently used last
        self.greenlets: list[Any] = []  # of its health and load, killed with it
        self.look_at_once: Any = None  # event: probe now
        self.accepts_work = True
        self.is_gone = False  # from the table
        self.capacity = backend.slots
        self.rank: RouteRank | None = None  # so after every change of what it is made of, here as below
        self.update(backend)

    def update(self, backend: Backend) -> None:
        """Take over a new row of the same replica, or a change of its state."""
        self.backend = backend
        if self.override == backend.state:
            self.override = None
        state = self.override or backend.state
        load: Mapping[str, Any] = self.load if isinstance(self.load, dict) else {}
        # Asleep, an engine answers its health probe and hangs every turn.
        is_away = bool(load.get("is_sleeping")) or load.get("state") in AWAY_STATES
        self.accepts_work = state == "ready" and self.health != "down" and not is_away
        self.capacity = 1 if self.health == "trial" else backend.slots
        self.rank = None

    def set_health(self, health: str, reason: str | None) -> None:
        self.health, self.reason = health, reason
        self.update(self.backend)

    def note_success(self, latency_ms: float, now: float) -> None:
        """A turn got its whole answer from it."""
        self.failures = 0
        self.last_byte = now
        self.latency_ms = (
            latency_ms if self.latency_ms is None else self.latency_ms + 0.2 * (latency_ms - self.latency_ms)
        )
        self.rank = None
        if self.health == "trial":
            self.ejections = 0
            self.set_health("up", None)

    def note_failure(self, reason: str, is_dead: bool) -> None:
        """A transport error; the last of several, or a proof of death, ejects it until a probe succeeds."""
        self.errors += 1
        self.failures += 1
        if self.health != "down" and (is_dead or self.failures >= EJECT_AFTER or self.health == "trial"):
            self.ejections += 1
            self.set_health("down", reason)
            if self.look_at_once is not None:
                self.look_at_once.set()

    def take_load(self, load: Any) -> None:
        """Take over a /load digest; one with a figure that is none changes nothing, and raises what that does."""
        digest: dict[str, Any] = load if isinstance(load, dict) else {}
        work = int(digest.get("running") or 0) + int(digest.get("waiting") or 0)
        kv_usage, kv_tokens = (float(digest.get(name) or 0.0) for name in ("kv_usage", "kv_capacity_tokens"))
        gpus = [float(gpu.get("utilization") or 0.0) for gpu in digest.get("gpus") or () if isinstance(gpu, dict)]
        self.load = digest or None
        self.foreign_work = max(0, work - self.in_flight)
        self.kv_usage, self.kv_tokens = kv_usage, kv_tokens
        self.gpu_utilization = sum(gpus) / len(gpus) if gpus else 0.0
        self.update(self.backend)

    def reserve(self, choice: int, tokens: int) -> None:
        """It is chosen. Promise room for a prompt at once: its own report comes too late for the next choice."""
        self.rank, self.last_chosen = None, choice
        self.in_flight += 1
        self.requests += 1
        if self.kv_tokens:
            self.kv_usage += tokens / self.kv_tokens

    def head(self, plan: RequestPlan, length: int) -> bytes:
        """The head of a request as it is sent to it, with a body of ``length`` bytes."""
        return forwarded_head(plan.request, plan.target, self.host, self.backend.key, length)

    def release(self) -> None:
        """A turn that it was chosen for is over."""
        self.rank = None
        self.in_flight -= 1

    def forget(self, upstream: Upstream) -> None:
        """Drop an idle connection."""
        self.idle.pop(upstream, None)
        upstream.close()

    def close(self) -> None:
        """It left the table: no more probes, no idle connections; turns that it has go on."""
        self.is_gone = True
        for greenlet in self.greenlets:
            greenlet.kill(block=False)
        while self.idle:
            self.forget(next(iter(self.idle)))


class Outlet:
    """The client's end of an exchange: sends without blocking, and pauses the replica while the client is slow."""

    _write_watcher: Any = None
    backlog: Any = None  # what the client's socket did not take yet
    pending_head = b""  # goes out with the first bytes of the body
    result: str | None = None
    listener: Any = None  # what the replica's bytes wake
    client: ClientConnection
    upstream: Any
    timeout_s: float
    _came: Any = ()  # when a stream's parts came, since the last one that was counted

    @property
    def last_part(self) -> float:
        """When the last part of a stream came; 0: none has."""
        return self._came[-1] if self._came else 0.0

    def is_late(self) -> bool:
        """Whether nothing has moved for too long. Parts of a stream put the deadline off only when it is asked for."""
        if self._came:
            self.client.deadline = max(self.client.deadline, self.last_part + self.timeout_s)
        return time.monotonic() >= self.client.deadline

    def send(self, out: bytes, result: str | None) -> None:
        """Send to the client; ``result`` ends the exchange once all of it is sent. A slow client pauses the replica."""
        if self.pending_head:
            out, self.pending_head = self.pending_head + out, b""
        try:
            sent = self.client.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.client.gone = True
            return self.end("gone")
        if sent == len(out):
            return self.end(result) if result else None
        self.backlog = memoryview(out)[sent:]
        self.upstream.watcher.stop()
        self._write_watcher = self.client.relay.reactor.loop.io(self.client.sock.fileno(), 2)
        self._write_watcher.start(self._on_writable, result)
        return None

    def _on_writable(self, result: str | None) -> None:
        try:
            self._send_backlog(result)
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self.client.relay.log_bug("an answer", error)
            self.end("torn")

    def _send_backlog(self, result: str | None) -> None:
        try:
            sent = self.client.sock.send(self.backlog)
        except BlockingIOError:
            return None
        except OSError:
            self.client.gone = True
            return self.end("gone")
        self.client.deadline = time.monotonic() + self.timeout_s
        self.backlog = self.backlog[sent:]
        if self.backlog:
            return None
        self.stop_writing()
        self.upstream.watcher.start(self.listener)  # also behind the last bytes: an idle connection is watched, too
        return self.end(result) if result else None

    def stop_writing(self) -> None:
        self.backlog = None
        if self._write_watcher is not None:
            self._write_watcher.stop()
            self._write_watcher.close()
            self._write_watcher = None

    def end(self, result: str) -> None:
        self.result = result
        self.client.wake()


class AnswerFlow(Outlet):
    """A replica's answer on its way to the client, moved by event-loop callbacks, which never block."""

    error = ""
    received = False  # any byte of an answer
    _has_excess = False  # bytes behind the answer's end
    _head_bytes = body = b""
    head: Any = None  # AnswerHead, once it came; it serves for many, so the body's length stands beside it
    _length: int | None
    _decoder: Any = None
    events: Any = None  # EventStream, where the answer is one
    _receive: Any  # of a stream: the replica's socket's recv, and
    _pass_on: Any  # the client's send; looking them up costs as much as calling them
    is_raw = False
    _size = 0
    _pieces: list[bytes]
    _relay: Relay
    _turn: Turn
    _to_chunks = True  # as an HTTP/1.1 client takes it; what an older one gets ends with the connection
    ends_by_closing = False
    express: Callable[[Any, bytes], bool] | None = None  # takes a whole answer that comes at once, where it can

    def on_readable(self) -> None:
        """The replica's socket has bytes, or its end."""
        is_reset = False
        try:
            data = self.upstream.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, is_reset = b"", True
        try:
            if self.express is not None and not self.received and data and self.express(self, data):
                return
            if not data:
                self._on_closed(is_reset)
            elif self.head is not None:
                self._take_body(data, 0)
            else:
                self._take_head(data)
        except WireError as error:
            self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - a bug ends this turn, at once, and never the relay
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        self._relay.log_bug("an answer", error)
        try:
            self.fail("the proxy failed on this answer", result="failed")
        except Exception:  # noqa: BLE001 - the same bug once more: then the client is told by closing
            self.end("torn")

    def _take_head(self, data: bytes) -> None:
        self.received = True
        data = self._head_bytes + data if self._head_bytes else data
        while (end := data.find(b"\r\n\r\n") + 4) >= 4:
            head, length = self._relay.heads.answer(data, end)
            if head.status >= 200:
                return self._start(head, length, data, end)
            data = data[end:]  # an interim answer: the real one follows
        if len(data) > MAX_HEAD_BYTES:
            raise WireError("the replica's head is too long")
        self._head_bytes = data
        return None

    def _start(self, head: AnswerHead, length: int | None, data: bytes, end: int) -> None:
        self.head, self._length, self._decoder = head, length, BodyDecoder(length)
        self._pieces = []
        if head.is_event_stream and head.status < 400 and length != 0:
            self._start_stream(head)
            self.upstream.watcher.callback = self.listener = self.on_events
            if len(data) > end:
                self.on_events(data[end:])
            return None
        if head.fields.get(b"content-type", b"").startswith(b"audio/"):
            self._start_raw(head)
        return self._take_body(data, end)

    def _start_stream(self, head: AnswerHead) -> None:
        turn = self._turn
        turn.gaps = Histogram(GAPS_AT_ONCE)
        self._receive, self._pass_on = self.upstream.sock.recv, self.client.sock.send
        self.events = EventStream(
            self._decoder,
            to_chunks=self._to_chunks,
            cuts_usage=turn.cuts_usage,
            needs_done=turn.path in (b"/v1/chat/completions", b"/v1/completions"),
            wanted_text=turn.wanted_text,
            traces=turn.follows is not None,
        )
        self.pending_head = returned_head(
            head, self._relay.book.answer_fields(turn), None, self._to_chunks, not self._to_chunks
        )

    def _start_raw(self, head: AnswerHead) -> None:
        """Pass on as it comes what is neither a stream of events nor short enough to be kept for a retry."""
        self.is_raw = True
        length = self._length if self._length != BodyDecoder.UNTIL_CLOSE else None
        self._to_chunks = self._to_chunks and length is None
        self.ends_by_closing = not self._to_chunks and length is None
        fields = self._relay.book.answer_fields(self._turn)
        self.pending_head = returned_head(head, fields, length, self._to_chunks, self.ends_by_closing)

    def on_events(self, data: bytes | None = None) -> None:
        """``on_readable`` once events flow, or ``data`` that came with the head: the hottest lines of the relay."""
        try:
            if data is None:
                try:
                    data = self._receive(RECEIVE_BYTES)
                except BlockingIOError:
                    return None
                except OSError:
                    return self._on_closed(is_reset=True)
                if not data:
                    return self._on_closed()
            events, came, pacing = self.events, self._came, self._relay.pacing
            out = events.feed(data)
            now = pacing.parts_came or pacing.note_parts()
            if came:
                came.append(now)
                if len(came) > GAPS_AT_ONCE:
                    self._count_gaps()
            else:
                self._note_start(now)
            if events.fault is not None:
                return self.fail(events.fault, out)
            if self.pending_head or events.is_over:
                # The end may come with nothing left to send: to HTTP/1.0, which gets no last chunk.
                return self.send(out, "streamed" if events.is_over else None) if out or events.is_over else None
            try:
                sent = self._pass_on(out)
            except OSError:
                sent = 0  # said again, and understood, below
            return self.send(out[sent:], None) if sent < len(out) else None
        except WireError as error:
            return self.fail(str(error))
        except Exception as error:  # noqa: BLE001 - as in on_readable
            return self._break_off(error)

    def _note_start(self, now: float) -> None:
        self.client.deadline = now + self.timeout_s
        if self.events.events:
            self._turn.first = now
            self._came = [now]

    def _count_gaps(self) -> None:
        """Count the gaps between the parts that came; the next one begins with the last of them."""
        gaps = [(later - earlier) * 1000.0 for earlier, later in itertools.pairwise(self._came)]
        self._turn.gaps.add(*gaps)
        self._turn.ended = self._came[-1]
        del self._came[:-1]

    def _take_body(self, data: bytes, start: int) -> None:
        if not self._turn.first:
            self._turn.first = time.monotonic()
        self._has_excess = self._decoder.feed(data, start, self._pieces) < len(data)
        self._size += len(data) - start
        if not self.is_raw:
            if self._decoder.is_over:
                self._finish_body()
            elif self._size > BUFFERED_ANSWER_BYTES:
                self._start_raw(self.head)
        if self.is_raw:
            self._send_raw()

    def _send_raw(self) -> None:
        payload = b"".join(self._pieces)
        self._pieces.clear()
        out = encode_chunk(payload) if self._to_chunks else payload
        if self._decoder.is_over and self._to_chunks:
            out += LAST_CHUNK
        self.client.deadline = time.monotonic() + self.timeout_s
        if out or self._decoder.is_over:
            self.send(out, "streamed" if self._decoder.is_over else None)

    def _finish_body(self) -> None:
        self.body = b"".join(self._pieces)
        self.end("answered")

    def _on_closed(self, is_reset: bool = False) -> None:
        """The replica's end: of an answer that lasts until then, unless the connection was reset."""
        if self._decoder is not None and self._decoder.is_until_close and not is_reset:
            if self.events is not None:
                out = self.events.close()
                if self.events.fault is not None:
                    return self.fail(self.events.fault, out)
                return self.send(out, "streamed")
            self._decoder.is_over = True
            return self._send_raw() if self.is_raw else self._finish_body()
        return self.fail("the replica died")

    def fail(self, error: str, out: bytes = b"", result: str = "lost") -> None:
        """The answer broke off; ``out`` is what had come of it. Once the client has a part, it is told."""
        self.error = error
        if self.backlog is not None:  # a part of something whole is sent
            self.end("torn")
        elif self.pending_head or not (self.events is not None or self.is_raw):
            self.end(result)
        elif self.events is None:
            self.end("torn")
        else:
            self.send(out + self.events.failure(error_event(error, self._turn.is_anthropic)), "cut")


class Exchange(AnswerFlow):
    """One attempt: a request sent to one replica, its answer moved to the client by event-loop callbacks.

    ``result`` says how it ended: ``answered`` (whole, in ``body``, nothing sent to the client yet) · ``streamed`` (the
    client has it all) · ``cut`` (broke off, the client was told by an error event) · ``torn`` (broke off, only closing
    can tell the client) · ``lost`` (the replica went before the client got anything) · ``timeout`` (it was silent
    likewise) · ``failed`` (a bug of ours, likewise) · ``stopped`` (the proxy ends, likewise) · ``gone`` (the client
    left).
    """

    upstream: Upstream | None = None
    is_sent = False  # the whole request; else it is the first ``_sent`` bytes
    _sent = 0

    def __init__(
        self,
        relay: Relay,
        client: ClientConnection,
        turn: Turn,
        replica: LiveReplica,
        message: tuple[bytes, bytes | bytearray],
    ) -> None:
        """``message`` is the request as it is sent: head and body."""
        self._relay, self.client, self._turn = relay, client, turn
        self.replica, self._message = replica, message
        self.timeout_s = relay.settings.proxy.request_timeout
        if client.version != 1:
            self._to_chunks, self.ends_by_closing = False, True

    def _begin(self, now: float) -> bool:
        """Send on an idle connection; False where there is none."""
        if not self.replica.idle:
            return False
        self._open(self.replica.idle.popitem()[0], now)
        return True

    def run(self) -> str:
        """Send and relay; TransportError when the replica could not be reached and got nothing of the request.

        For the client's own greenlet, also of an exchange that a callback has begun.
        """
        turn = self._turn
        # A request that was sent before goes out on a new connection, on which no replica's close can cross with it.
        if self.upstream is None and (turn.deaths or not self._begin(time.monotonic())):
            self._open(self._connect(), time.monotonic())
            return self._follow()
        result = self._follow()
        is_no_race = self.received or (self.is_sent and time.monotonic() > turn.sent + RACE_S)
        if result != "lost" or is_no_race:
            return result
        # The replica closed the idle connection under us, or died of this very request: a new connection tells.
        try:
            upstream = self._connect()
        except TransportError as error:
            self.error = str(error)
            return "lost"
        self._open(upstream, time.monotonic())
        return self._follow()

    def _connect(self) -> Upstream:
        sock = self.client.connect(self.replica.backend.host, self.replica.backend.port)
        return Upstream(self.replica, sock, RepeatedHead(self._relay.heads.known_answers), self._relay.reactor)

    def _open(self, upstream: Upstream, now: float) -> None:
        self.take_over(upstream, upstream.send(*self._message), now)

    def take_over(self, upstream: Upstream, sent: int, now: float) -> None:
        """Go on with a connection on which the first ``sent`` bytes of the request went."""
        head, body = self._message
        self._sent, self.is_sent = sent, sent == len(head) + len(body)
        self.upstream = upstream
        upstream.watcher.callback = self.listener = self.on_readable
        self.result = None
        self.client.deadline = now + self.timeout_s
        self.client.exchange = self

    def _follow(self) -> str:
        """Park until the exchange is over."""
        client, upstream = self.client, self.upstream
        if upstream is None:
            raise TransportError("nothing was sent")
        try:
            if not self.is_sent:
                self.is_sent = upstream.send_rest(self._message, self._sent, self)
            while self.result is None:
                if client.gone:
                    self.result = "gone"
                elif self.is_late():
                    self._time_out()
                else:
                    client.park()
        finally:
            self.close()
        return self.result or "gone"

    def close(self) -> None:
        """Give the connection back, or close it where it cannot serve again."""
        self.client.exchange = self.listener = self.express = None  # circles, that would keep the body
        if self._write_watcher is not None:
            self.stop_writing()
        if self._came:
            self._count_gaps()
        upstream = self.upstream
        if upstream is not None and self.result in ("answered", "streamed") and self._is_reusable():
            upstream.rest()
        elif upstream is not None:
            upstream.close()

    def _is_reusable(self) -> bool:
        has_excess = self.events.has_excess if self.events is not None else self._has_excess
        if not self.is_sent or self.head is None or not self.head.is_reusable or has_excess:
            return False
        return self._decoder is None or not self._decoder.is_until_close

    def _time_out(self) -> None:
        if self.backlog is not None:  # it is the client that does not take its answer
            self.client.gone = True
            self.result = "gone"
            return
        self.fail(f"the replica was silent for {self.timeout_s:g} s", result="timeout")


class ClientSocket:
    """A client's socket and the parking of its one greenlet (see Reactor): every wait here has a deadline."""

    def __init__(self, relay: Relay, sock: Any) -> None:
        self.relay, self.sock = relay, sock
        self.buffer = b""  # read, and not yet taken by a request
        self.gone = False
        self.deadline = math.inf  # the sweep wakes the greenlet then
        self._parked: Any = None
        self._is_reading = False
        self._is_watching = True
        self._watcher = relay.reactor.watch_reads(sock, self._on_readable)
        relay.pacing.has_turns = True

    def park(self) -> None:
        """Wait for a wake; only for the connection's own greenlet."""
        self._parked = self.relay.reactor.current()
        try:
            self.relay.reactor.hub.switch()
        finally:
            self._parked = None

    def wake(self) -> None:
        """Resume the greenlet if it is parked; only for event-loop callbacks."""
        parked = self._parked
        if parked is not None:
            self._parked = None
            parked.switch()

    def wait_writable(self, sock: Any) -> None:
        """Park until ``sock`` takes bytes, or for any other reason to look again."""
        watcher = self.relay.reactor.loop.io(sock.fileno(), 2)
        watcher.start(self.wake)
        try:
            self.park()
        finally:
            watcher.stop()
            watcher.close()

    def connect(self, host: str, port: int) -> Any:
        """A connected socket; TransportError. Not gevent's own way, which asks a resolver about every address."""
        try:
            sock = self.relay.reactor.new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as trouble:
            message = f"no connection to a replica: {descriptor_trouble(trouble)}"
            raise RequestError(503, message, retry_after_s=1) from None
        try:
            sock.setblocking(False)
            error = sock.connect_ex((host, port))
            self.deadline = time.monotonic() + self.relay.settings.proxy.connect_timeout
            while error in (errno.EINPROGRESS, errno.EALREADY):
                self.wait_writable(sock)
                if self.gone:
                    raise ClientGone
                error = sock.connect_ex((host, port))
                if error == errno.EALREADY and time.monotonic() >= self.deadline:
                    error = errno.ETIMEDOUT
            if error not in (0, errno.EISCONN):
                raise TransportError(os.strerror(error))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def _on_readable(self) -> None:
        self.relay.pacing.has_turns = True
        if self._is_reading:
            return self.wake()
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if data:
            return self._take(data)
        self._watcher.stop()
        self.gone = True
        return self.wake()

    def _take(self, data: bytes) -> None:
        """Bytes that nobody waits for: the next request, ahead of its time, or an empty line behind this one."""
        self.buffer += data
        if len(self.buffer) > MAX_HEAD_BYTES:  # the rest stays in the socket; else the client's end is to be noticed
            self._watcher.stop()
            self._is_watching = False

    def _resume_watching(self) -> None:
        if not self._is_watching:
            self._watcher.start(self._on_readable)
            self._is_watching = True

    def _receive(self, seconds: float, what: str, into: memoryview | None = None) -> Any:
        """Bytes from the client (their number, with ``into``): none at its end; WireError 408 when they are late."""
        self._resume_watching()
        self.deadline = time.monotonic() + seconds
        self._is_reading = True
        try:
            while not self.gone:
                try:
                    return self.sock.recv(RECEIVE_BYTES) if into is None else self.sock.recv_into(into)
                except BlockingIOError:
                    pass
                self.park()
                if time.monotonic() >= self.deadline:
                    raise WireError(f"{what} did not come in time", 408)
            raise ClientGone
        finally:
            self._is_reading = False
            self.deadline = math.inf

    def send_all(self, data: bytes) -> None:
        """Send to the client; ClientGone when it leaves, or takes nothing for the request timeout."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone from None
        rest = memoryview(data)[sent:]
        timeout_s = self.relay.settings.proxy.request_timeout
        self.deadline = time.monotonic() + timeout_s
        while rest:
            self.wait_writable(self.sock)
            if self.gone or time.monotonic() >= self.deadline:
                raise ClientGone
            try:
                rest = rest[self.sock.send(rest) :]
                self.deadline = time.monotonic() + timeout_s
            except BlockingIOError:
                continue
            except OSError:
                raise ClientGone from None

    def linger(self) -> None:
        """Take what the client still sends, for a while: closing on unread bytes would reset the connection, and the
        answer with it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER_S
        with contextlib.suppress(WireError, ClientGone):
            while (left := end - time.monotonic()) > 0 and self._receive(left, "the end"):
                pass

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self.sock.close()


class ArrivingBody:
    """A request of which the head is known and a part of the body came; callbacks gather the rest."""

    __slots__ = ("_body_at", "_first", "_missing", "_rest", "plan")

    def __init__(self, plan: RequestPlan, data: bytes, body_at: int, length: int) -> None:
        """``data`` is what came, the head included; its body of ``length`` bytes begins at ``body_at``."""
        self.plan = plan
        self._first, self._body_at, self._rest = data, body_at, bytearray()
        self._missing = body_at + length - len(data)

    def add(self, data: bytes) -> int:
        """How many bytes are missing now; less than none where the next request came, too."""
        self._rest += data
        self._missing -= len(data)
        return self._missing

    def body(self) -> bytes:
        """The whole body, once nothing is missing."""
        return b"".join((memoryview(self._first)[self._body_at :], self._rest))

    def received(self) -> bytes:
        """All that came, from the head on."""
        return self._first + self._rest


class RequestReader(ClientSocket):
    """Takes a client's requests out of what it sends; holds the bodies' bytes against the limits."""

    def __init__(self, relay: Relay, sock: Any) -> None:
        super().__init__(relay, sock)
        self.authorization: bytes | None = None  # with which the last request that was read in full was let pass
        self._held_bytes = 0
        self._has_unread_body = False

    def _read_head(self) -> tuple[RequestPlan, int | None, bytes] | None:
        """The next request's plan, its body's length (None: chunks) and its Authorization, its head taken off the
        buffer; None when there was nothing but empty lines, which are to be ignored (RFC 9112, 2.2)."""
        started = time.monotonic()
        while True:
            empty = 0
            while self.buffer.startswith(b"\r\n", empty):
                empty += 2
            self.buffer = self.buffer[empty:]
            if not self.buffer:
                return None
            end = self.buffer.find(b"\r\n\r\n") + 4
            if 4 <= end <= MAX_HEAD_BYTES:
                head, self.buffer = self.buffer[:end], self.buffer[end:]
                return self.relay.heads.plan(head, self.authorization, self.relay.settings.labels.read)
            if len(self.buffer) > MAX_HEAD_BYTES:
                raise WireError("the head is too long", 431)
            if self.buffer.count(b"\n") != self.buffer.count(b"\r\n"):
                raise WireError("a line ends in a bare line feed")
            data = self._receive(started + HEAD_S - time.monotonic(), "the rest of the head")
            if not data:
                raise ClientGone
            self.buffer += data

    def _read_body(self, request: RequestHead, length: int | None, limit: int) -> bytes | bytearray:
        """The request's body, out of its framing, taken off the buffer; RequestError 413 or 429 beyond the limits."""
        if length == 0:
            return b""
        if length is not None:
            self._hold(length, limit)
        if request.version and request.fields.get(b"expect", b"").lower() == b"100-continue" and not self.buffer:
            self.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: bytes | bytearray
        if length is None:
            body = self._read_chunks(limit)
        elif len(self.buffer) >= length:
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        else:
            body = bytearray(length)
            got = len(self.buffer)
            body[:got], self.buffer = self.buffer, b""
            view = memoryview(body)
            while got < length:
                count = self._receive(BODY_S, "the rest of the body", view[got:])
                if not count:
                    raise ClientGone
                got += count
        self._has_unread_body = False
        return body

    def _read_chunks(self, limit: int) -> bytearray:
        decoder, body = BodyDecoder(None), bytearray()
        while True:
            pieces: list[bytes] = []  # joined at once: a piece of one byte takes forty
            end = decoder.feed(self.buffer, 0, pieces)
            self.buffer = self.buffer[end:]
            received = b"".join(pieces)
            self._hold(len(received), limit)
            body += received
            if decoder.is_over:
                return body
            self.buffer = self._receive(BODY_S, "the rest of the body")
            if not self.buffer:
                raise ClientGone

    def _hold(self, size: int, limit: int) -> None:
        """Count ``size`` more bytes of this body against both limits."""
        if self._held_bytes + size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", closes=True)
        if self.relay.buffered_bytes + size > self.relay.settings.max_buffered_bytes:
            raise RequestError(429, "too many bytes of requests are held already", retry_after_s=1, closes=True)
        self._held_bytes += size
        self.relay.buffered_bytes += size

    def _release(self) -> None:
        self.relay.buffered_bytes -= self._held_bytes
        self._held_bytes = 0


class ClientConnection(RequestReader):
    """One client: reads its requests, one after the other, and owns the greenlet that serves them.

    A request that comes whole, while the greenlet waits for one, and whose head is known, is sent on by the callback
    that read it, and its answer passed back by another: no greenlet is woken for what need not wait.  Whatever else
    happens to such a turn wakes the greenlet, which takes it over where it stands.
    """

    def __init__(self, relay: Relay, sock: Any, peer: tuple[Any, ...]) -> None:
        super().__init__(relay, sock)
        self.peer = peer
        self.version = 1
        self.exchange: Exchange | None = None
        self.is_trusted: bool | None = None  # whether the socket's owner needs no key; asked once
        self.delivery: Delivery | None = None
        self.head = RepeatedHead(relay.heads.known_requests)
        self._awaits_request = False
        self._arriving: ArrivingBody | None = None
        self._is_anthropic = self._is_head = False
        self._keeps_alive = True

    def serve(self) -> None:
        """Serve requests until one of the sides has had enough; the connection's greenlet runs this."""
        try:
            while self._serve_one() and not self.relay.is_stopping:
                pass
        except (ClientGone, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, never the relay
            self.relay.log_bug("a connection", error)
        finally:
            self.relay.connections.discard(self)
            self.close()

    @property
    def is_idle(self) -> bool:
        return self._awaits_request and not self.buffer and self.delivery is None and self._arriving is None

    def cut(self, reason: str) -> None:
        """End what the connection is doing, telling the client why where it can still be told; event loop only."""
        if self.exchange is not None:
            self.exchange.fail(reason, result="stopped")
        elif self.delivery is not None:
            self.wake()  # in the queue it is told so
        else:
            self.leave()

    def leave(self) -> None:
        """End the connection; only for event-loop callbacks."""
        self.gone = True
        self.wake()

    def leave_idle(self) -> None:
        """End the connection unless a request has come; only for event-loop callbacks."""
        if self.is_idle:
            self.leave()

    def _serve_one(self) -> bool:
        """Serve one request; whether another one may follow."""
        self._is_anthropic = self._has_unread_body = self._is_head = False
        try:
            if not self.buffer and not self._await_request():
                return False
            if self.delivery is not None:  # a callback has begun it
                self._is_anthropic = self.delivery.turn.is_anthropic
                return self._deliver(self.delivery) and self._keeps_alive
            found = self._read_head()
            if found is None:
                return True
            plan, length, authorization = found
            self.version, self._keeps_alive = plan.request.version, plan.request.keeps_alive
            self._has_unread_body, self._is_head = length != 0, plan.request.method == b"HEAD"
            return self._answer(plan, length, authorization) and plan.request.keeps_alive
        except RequestError as refusal:
            return self._refuse(refusal)
        finally:
            self.delivery = None
            self._release()

    def _await_request(self) -> bool:
        """Park until there are bytes of a request, or a turn to take over; False when the client has had enough."""
        self._resume_watching()
        self.deadline = time.monotonic() + IDLE_CLIENT_S
        self._awaits_request = True
        try:
            while not self.buffer and self.delivery is None:
                is_late = time.monotonic() >= self.deadline
                if is_late and self._arriving is not None and not self.gone:
                    self._is_anthropic = b"/v1/messages" in self._arriving.plan.path
                    self._has_unread_body = True
                    raise WireError("the rest of the body did not come in time", 408)
                if is_late or self.gone:
                    return False
                self.park()
        finally:
            self._awaits_request, self._arriving = False, None
        return True

    def _take(self, data: bytes) -> None:
        if not self._awaits_request or self.delivery is not None or self.buffer:
            super()._take(data)
            return
        arriving = self._arriving
        try:
            if self._express(data) if arriving is None else self._gather(arriving, data):
                return
        except Exception as error:  # noqa: BLE001 - it is read again, in the common way
            self.relay.log_bug("a request", error)
        if self.delivery is None:
            self.buffer += data if arriving is None else arriving.received()
        self.wake()

    def _express(self, data: bytes) -> bool:
        """Begin the one request in ``data`` without waking the greenlet; False: nothing was done."""
        known = self.head.find(data)
        if known is None:
            return False
        plan, length, authorization, end = known
        missing = end + length - len(data)
        if missing < 0 or authorization != self.authorization or not self.relay.has_room(length):
            return False
        if not missing:
            return self._begin(plan, data[end:])
        if length > GATHERED_BODY_BYTES or b"expect" in plan.request.fields:
            return False
        self._arriving = ArrivingBody(plan, data, end, length)
        self._hold(length, length)
        self.deadline = time.monotonic() + BODY_S
        return True

    def _gather(self, arriving: ArrivingBody, data: bytes) -> bool:
        """Take more of a body, and begin its turn when it is whole; False: the greenlet is to read it again."""
        missing = arriving.add(data)
        if missing > 0:
            self.deadline = time.monotonic() + BODY_S
            return True
        self._arriving = None
        self._release()
        return not missing and self._begin(arriving.plan, arriving.body())

    def _begin(self, plan: RequestPlan, body: bytes) -> bool:
        try:
            delivery = ExpressDelivery.send(self.relay, self, plan, body)
        except RequestError:
            return False  # nothing has begun; the greenlet finds the same, and says it
        self.version, self._keeps_alive = 1, plan.request.keeps_alive
        self._held_bytes = len(body)
        self.relay.buffered_bytes += len(body)
        if delivery.exchange is None or not delivery.exchange.is_sent:
            self.wake()
        return True

    def end_express(self, now: float) -> None:
        """The turn that a callback had begun is over, its answer sent."""
        self.delivery = self.exchange = None
        self._release()
        self.deadline = now + IDLE_CLIENT_S
        if not self._keeps_alive:
            self.buffer = b""  # what comes behind the last request is none
            self.leave()
        elif self.buffer:
            self.wake()

    def _answer(self, plan: RequestPlan, length: int | None, authorization: bytes) -> bool:
        request = plan.request
        self._is_anthropic = b"/v1/messages" in plan.path
        if plan.path != b"/health":
            self.relay.door.authorize(self, request, authorization)
            # What let it pass by another field is none to let the next one pass.
            self.authorization = authorization if b"x-api-key" not in request.fields else None
        if b"websocket" in request.fields.get(b"upgrade", b"").lower():
            raise RequestError(501, "WebSocket is not supported; the same models answer over HTTP", closes=True)
        if not plan.is_inference:
            body = self._read_body(request, length, APP_BODY_BYTES)
            self.send_all(self.relay.app.answer(request, plan.path, plan.query, bytes(body)))
            return True
        body = self._read_body(request, length, self.relay.settings.max_body_bytes)
        now = time.monotonic()
        fields, model = self.relay.book.read(plan, body, self.peer)
        turn = self.relay.book.open(plan, fields, model, len(body), now)
        self.delivery = Delivery(self.relay, self, turn, plan, body)
        return self._deliver(self.delivery)

    def _deliver(self, delivery: Delivery) -> bool:
        turn = delivery.turn
        delivery.read_words()
        try:
            return delivery.run()
        except RequestError as refusal:
            turn.status, turn.error = refusal.status, str(refusal)
            turn.outcome = "rejected" if refusal.status in (429, 503) else "error"
            raise
        finally:
            self.relay.book.finish(turn, time.monotonic())

    def _refuse(self, refusal: RequestError) -> bool:
        if self.delivery is None:
            self.relay.book.counters["rejected"] += 1
        extra = self.relay.book.answer_fields(self.delivery.turn) if self.delivery is not None else b""
        if refusal.retry_after_s:
            extra += b"retry-after: %d\r\n" % refusal.retry_after_s
        if refusal.status == 401:
            extra += b"www-authenticate: Bearer\r\n"
        closes = refusal.closes or self._has_unread_body or not self._keeps_alive
        body = error_document(refusal.status, str(refusal), refusal.code, self._is_anthropic)
        answer = plain_answer(refusal.status, body, extra=extra, closes=closes)
        self.send_all(answer[: -len(body)] if self._is_head else answer)
        if closes:
            self.linger()
        return not closes


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


def why_away(replica: LiveReplica) -> str:
    """Why a replica gets no turn, in words that follow its name."""
    load: Mapping[str, Any] = replica.load or {}
    if replica.health == "down":
        return f"is down ({replica.reason})"
    if load.get("is_sleeping"):
        return "is asleep"
    if load.get("state") in AWAY_STATES:  # by itself
        return f"is {load['state']}"
    if (replica.override or replica.backend.state) == "draining":
        return f"is draining (POST /admin/backends/{replica.id}/undrain)"
    return "was tried"


def explain_absence(replicas: Sequence[LiveReplica]) -> str:
    """Why none of a model's replicas can answer, and what to do; a few are named."""
    words = [f"{replica.id} {why_away(replica)}" for replica in replicas[:NAMED_ABSENT]]
    if len(replicas) > NAMED_ABSENT:
        words.append(f"{len(replicas) - NAMED_ABSENT} more")
    return ", ".join(words) or "none runs (`start` starts one)"


class Admission:
    """Gives replicas' slots to turns. Owns the queue of every model and what sessions were served lately."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._queues: dict[str, list[tuple[float, int, Turn, ClientConnection]]] = {}  # heaps
        self._attained = AttainedService()
        self._unsettled: list[Turn] = []  # over, their sessions not charged yet
        self._mean_service_s = 1.0
        self._choices = 0
        self.pending = 0

    def take(self, model: str, tokens: int, now: float, route: RouteRequest = ANYWHERE) -> LiveReplica | None:
        """A replica with a slot, now, for a prompt of about so many tokens; None while others wait: it would overtake
        them. ``release`` is then due."""
        return None if self._queues.get(model) else self._choose(model, tokens, now, route)

    def acquire(self, turn: Turn, client: ClientConnection) -> LiveReplica:
        """A replica with a slot for ``turn``, after waiting where that may help; raises RequestError, ClientGone."""
        replica = turn.replica = self.take(turn.model, turn.tokens, time.monotonic(), turn.route)
        if replica is not None:
            return replica
        self._settle_all()
        attained_s = 0.0
        if turn.session is not None and not turn.charged_s:
            turn.charged_s = self._mean_service_s
            attained_s = self._attained.charge(turn.session, turn.charged_s, turn.arrived)
        key = queue_key(attained_s, turn.arrived, self._relay.settings.proxy.queue_timeout)
        return self._wait(turn, client, key)

    def release(self, turn: Turn) -> None:
        """The turn's slot is free again."""
        replica, turn.replica = turn.replica, None
        if replica is not None:
            replica.release()
            if self._queues.get(turn.model):
                self.dispatch(turn.model)

    def settle(self, turn: Turn) -> None:
        """Have the session of a turn that is over charged for what it really took, before anybody has to wait."""
        self._unsettled.append(turn)
        if len(self._unsettled) >= PACKED_TURNS:
            self._settle_all()

    def _settle_all(self) -> None:
        """Correct what sessions were charged in advance; many at once cost half of one by one."""
        for turn in self._unsettled:
            took = max(0.0, turn.ended - turn.sent) if turn.sent and turn.ended else 0.0
            if took:
                self._mean_service_s += 0.05 * (took - self._mean_service_s)
            if turn.session is not None and took != turn.charged_s:
                self._attained.charge(turn.session, took - turn.charged_s, turn.over)
        self._unsettled.clear()

    def outlook(self, model: str, route: RouteRequest = ANYWHERE) -> str:
        """What waiting may bring: ``slot`` (all are busy), ``loading`` (one is on its way), or ``nothing``.

        What is on its way is known from the controller; while there is none, waiting has its bound.
        """
        pool = self._relay.pools.get(model, ())
        if any(replica.accepts_work and replica.id not in route.excluded for replica in pool):
            return "slot"
        if model not in self._relay.loading:
            return "nothing"
        return "loading" if self._relay.control.is_connected else "slot"

    def dispatch(self, model: str) -> None:
        """Give free slots to those who wait, in their order."""
        queue, passed_over = self._queues.get(model, []), []
        while queue:
            if (
                choose_backend(self._relay.pools.get(model, ()), ANYWHERE, self._relay.strategy, time.monotonic())
                is None
            ):
                break
            entry = heapq.heappop(queue)
            turn = entry[2]
            turn.replica = self._choose(model, turn.tokens, time.monotonic(), turn.route)
            if turn.replica is None:  # the free ones are those that it was at already
                passed_over.append(entry)
            else:
                self.pending -= 1
                self._relay.reactor.loop.run_callback(entry[3].wake)
        for entry in passed_over:
            heapq.heappush(queue, entry)

    def sweep(self) -> None:
        """Look at all queues again: a busy replica's time may be over, or the last one may be gone."""
        for model, queue in self._queues.items():
            if queue:
                self.dispatch(model)
                for entry in queue:
                    if self.outlook(model, entry[2].route) == "nothing":
                        self._relay.reactor.loop.run_callback(entry[3].wake)

    def waiting(self) -> list[Turn]:
        """All that wait, the longest first."""
        return sorted((entry[2] for queue in self._queues.values() for entry in queue), key=lambda turn: turn.arrived)

    def _choose(self, model: str, tokens: int, now: float, route: RouteRequest) -> LiveReplica | None:
        relay = self._relay
        replica = choose_backend(relay.pools.get(model, ()), route, relay.strategy, now)
        if replica is not None:
            self._choices += 1
            replica.reserve(self._choices, tokens)
        return replica

    def _wait(self, turn: Turn, client: ClientConnection, key: float) -> LiveReplica:
        settings = self._relay.settings.proxy
        if self.outlook(turn.model, turn.route) != "nothing" and self.pending >= settings.max_queue and not turn.sent:
            raise RequestError(429, f"{self.pending} requests wait already; try again later", retry_after_s=1)
        self._choices += 1
        entry = (key, self._choices, turn, client)
        queue = self._queues.setdefault(turn.model, [])
        heapq.heappush(queue, entry)
        self.pending += 1
        try:
            self.dispatch(turn.model)  # those ahead may wait for replicas that this one need not wait for
            return self._wait_for_slot(turn, client, settings.queue_timeout)
        except BaseException:
            self.release(turn)  # a slot may have come in the very moment of giving up
            raise
        finally:
            if entry in queue:
                queue.remove(entry)
                heapq.heapify(queue)
                self.pending -= 1

    def _wait_for_slot(self, turn: Turn, client: ClientConnection, timeout_s: float) -> LiveReplica:
        since, was_loading = turn.arrived, False
        try:
            while turn.replica is None:
                if client.gone:
                    raise ClientGone
                if self._relay.is_over:
                    raise RequestError(503, PROXY_STOPPED, closes=True)
                outlook, now = self.outlook(turn.model, turn.route), time.monotonic()
                if outlook == "nothing":
                    why = explain_absence(self._relay.pools.get(turn.model, ())) + self._relay.control.remedy
                    raise RequestError(503, f"no replica of {turn.model} is there to answer: {why}", retry_after_s=1)
                if outlook == "loading" or was_loading:
                    since, was_loading = now, outlook == "loading"
                if now >= since + timeout_s:
                    raise RequestError(503, f"no slot came free within {timeout_s:g} s", retry_after_s=1)
                client.deadline = since + timeout_s
                client.park()
            return turn.replica
        finally:
            turn.queue_ms = (time.monotonic() - turn.arrived) * 1000.0
            client.deadline = math.inf


# What is read of a request's body beside its messages; the last two as they stand there.
KNOWN_FIELDS = ("model", "stream", "stream_options", "prompt", "input", "tools", "system")
_MESSAGES = b'{"messages":[0'  # in place of a beginning that is known: the 0 stands for its messages


@dataclass(slots=True)
class KnownBody:
    """What a long body began with, up to and with its last message, and what was found there.

    A conversation's next request repeats it and goes on; so only what is new has to be read. Exact: the beginning is
    compared byte for byte, and it was read in full before.
    """

    start: memoryview
    fields: dict[str, Any]  # those of KNOWN_FIELDS that stand before the messages
    prints: bytes
    follows: str | None
    words: str  # of its last user message


class ContinuedBody:
    """The fields of a body that goes on from a known one; ``messages`` are those behind it."""

    __slots__ = ("before", "messages", *KNOWN_FIELDS)
    messages: list[Any]

    def __init__(self, before: KnownBody, rest: Any, unset: Any) -> None:
        first, *self.messages = rest.messages
        if bytes(first) != b"0":
            raise ValueError("there are two lists of messages")
        self.before = before
        for name in KNOWN_FIELDS:
            value = getattr(rest, name)
            setattr(self, name, before.fields[name] if value is unset else value)


class KnownBodies:
    """The last long body of each conversation; bounded in bytes, the longest unused goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bodies: OrderedDict[Any, KnownBody] = OrderedDict()
        self.bytes = 0

    def find(self, conversation: Any) -> KnownBody | None:
        return self._bodies.get(conversation)

    def keep(self, conversation: Any, known: KnownBody | None) -> None:
        """Take ``known`` in place of what was kept; None: nothing."""
        former = self._bodies.pop(conversation, None)
        self.bytes += self._size(known) - self._size(former)
        if known is not None:
            self._bodies[conversation] = known
        while self.bytes > self._limit:
            self.bytes -= self._size(self._bodies.popitem(last=False)[1])

    def _size(self, known: KnownBody | None) -> int:
        return len(known.start.obj) if known is not None else 0  # type: ignore[arg-type]  # a body, as a whole


class Codec:
    """The JSON that is read or written for every request, by msgspec: typed, so that what is not needed is skipped."""

    def __init__(self) -> None:
        import msgspec

        self.encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        # Events as they are encoded: made in C. What says nothing is said, too: a field that the controller's decoder
        # misses costs it an exception.
        self.turn_started, self.turn_finished = (
            msgspec.defstruct(kind.__name__, [_encoded_field(item) for item in dataclasses.fields(kind)])
            for kind in (TurnStarted, TurnFinished)
        )
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode
        self.convert: Callable[..., Any] = msgspec.convert
        routed = [(name, Any, None) for name in ("model", "stream", "stream_options")]
        words: list[Any] = [("messages", list[msgspec.Raw], ()), ("prompt", Any, None), ("input", Any, None)]
        words += [(name, msgspec.Raw, msgspec.Raw(b"")) for name in ("tools", "system")]
        call = msgspec.defstruct("Call", [("id", str, "")])
        said = [("content", str | None, None), ("tool_calls", list[call] | None, None)]  # type: ignore[valid-type]
        message = msgspec.defstruct("Message", said)
        spoken_fields = [(name, Any, None) for name in ("role", "content", "tool_calls")]
        self._message = msgspec.json.Decoder(msgspec.defstruct("AnyMessage", spoken_fields)).decode
        choice = msgspec.defstruct(
            "Choice",
            [("finish_reason", str | None, None), ("message", message | None, None), ("text", str | None, None)],
        )
        count: Any = Annotated[int, msgspec.Meta(ge=0, le=int(MAX_FIGURE))] | None  # is_count(), in C
        details = msgspec.defstruct("Details", [("cached_tokens", count, None)])
        counts = [("prompt_tokens", count, None), ("completion_tokens", count, None)]
        usage = msgspec.defstruct("Usage", [*counts, ("prompt_tokens_details", details | None, None)])
        plain = [("choices", list[choice]), ("usage", usage)]  # type: ignore[valid-type]
        self._plain_answer = msgspec.json.Decoder(msgspec.defstruct("PlainAnswer", plain)).decode
        answered = [(name, Any, None) for name in ("usage", "choices", "stop_reason", "error", "content", "output")]
        self._request = msgspec.json.Decoder(msgspec.defstruct("RoutedBody", routed)).decode
        rest: list[Any] = [("messages", list[msgspec.Raw]), *((name, Any, msgspec.UNSET) for name in KNOWN_FIELDS[:-2])]
        rest += [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in KNOWN_FIELDS[-2:]]
        self._rest_of_request = msgspec.json.Decoder(msgspec.defstruct("RestOfBody", rest)).decode
        self._unset, self._raw = msgspec.UNSET, msgspec.Raw
        self._worded_request = msgspec.json.Decoder(msgspec.defstruct("WordedBody", routed + words)).decode
        self._answer = msgspec.json.Decoder(msgspec.defstruct("AnswerBody", answered)).decode

    def joined(self, packs: Iterable[bytes]) -> Any:
        """A list of what was encoded already, as it is encoded: each of ``packs`` is items with commas between."""
        return self._raw(b"[" + b",".join(packs) + b"]")

    def request(self, body: bytes | bytearray, known: KnownBody | None = None) -> Any:
        """A request's fields that routing needs (``model``, ``stream``, ``stream_options``), and those that its words
        stand in where they have the usual types; None when the body is no JSON object. Where it goes on from
        ``known``, ``messages`` are those that are new."""
        if known is not None and body.startswith(known.start):
            try:
                return ContinuedBody(known, self._rest_of_request(_MESSAGES + body[len(known.start) :]), self._unset)
            except (ValueError, RecursionError):
                pass  # the common way tells what it is
        try:
            return self._worded_request(body)
        except (ValueError, RecursionError):  # bad UTF-8 is no error of msgspec's own
            pass
        try:
            return self._request(body)
        except (ValueError, RecursionError):
            return None

    def known_body(self, fields: Any, body: bytes | bytearray, turn: Turn) -> KnownBody | None:
        """What to keep of a body that was read, for the next one of its conversation; None where that is not sure.

        It ends with the last message, which is looked for. That this is the very place is sure when what is before it
        makes a whole request once it is closed.
        """
        before: KnownBody | None = getattr(fields, "before", None)
        if not fields.messages:
            return before
        last, began = bytes(fields.messages[-1]), len(before.start) if before is not None else 0
        end = body.rfind(last, began) + len(last)
        opening, extra = (_MESSAGES, 1) if before is not None else (b"", 0)
        try:
            closed: Any = self._worded_request(opening + body[began:end] + b"]}")
        except (ValueError, RecursionError):
            return None
        if len(closed.messages) != len(fields.messages) + extra:
            return None
        if before is not None:
            values = before.fields
        else:
            values = {name: getattr(closed, name) for name in KNOWN_FIELDS}
            values |= {name: bytes(values[name]) for name in KNOWN_FIELDS[-2:]}  # else they would hold what was read
        return KnownBody(memoryview(body)[:end], values, turn.prints, turn.follows, turn.prompt)

    def trace(self, fields: Any, is_named: bool) -> tuple[bytes, str | None]:
        """``prints`` and ``follows`` of TurnStarted; a session that its client names is followed by nothing else."""
        messages = getattr(fields, "messages", ())
        before: KnownBody | None = getattr(fields, "before", None)
        if before is None and not messages:
            return b"", None
        head = zlib.crc32(fields.system, zlib.crc32(fields.tools))
        prints = array("I", (head, *map(zlib.crc32, messages))).tobytes()
        if before is not None:
            prints = prints[:4] + before.prints[4:] + prints[4:]
        if is_named:
            return prints, None
        first = len(prints) // 4 - 1 - len(messages)  # number of the first of ``messages``
        for index in range(len(messages) - 1, -1, -1):
            raw = bytes(messages[index])
            if b'"assistant"' in raw:
                try:
                    message: Any = self._message(raw)
                except (ValueError, RecursionError):
                    continue
                if message.role == "assistant":
                    answer = message_print(*spoken(message.content, message.tool_calls))
                    return prints, conversation_key(prints[4 : 4 + 4 * (first + index)], answer)
        return prints, before.follows if before is not None else ""

    def last_words(self, fields: Any, limit: int) -> str:
        """The start of the last user message, or of the prompt."""
        for message in reversed(getattr(fields, "messages", ())):
            if bytes(message).find(b'"user"') >= 0:  # cheaper than `in`
                try:
                    said: Any = self._message(message)
                    return plain_text(said.content or self.decode(message))[:limit]
                except (ValueError, RecursionError):  # skipped so far, now read for the first time
                    continue
        if (before := getattr(fields, "before", None)) is not None:
            return str(before.words)
        return plain_text(getattr(fields, "prompt", None) or getattr(fields, "input", None))[:limit]

    def digest(self, body: bytes, wanted_text: int, traces: bool = False) -> AnswerDigest | None:
        """What tracking keeps of a whole answer, with ``traces`` also its print; None where it is no JSON object."""
        try:
            return self._plain_digest(self._plain_answer(body), wanted_text, traces)
        except (ValueError, IndexError, RecursionError):
            pass
        try:
            answer: Any = self._answer(body)
        except (ValueError, RecursionError):
            return None
        digest = AnswerDigest()
        names = ("usage", "choices", "stop_reason", "error")
        with contextlib.suppress(RecursionError):
            digest.add({name: getattr(answer, name) for name in names})
        if wanted_text or traces:
            words: Any = answer.content or answer.output
            said, calls = words, None
            if isinstance(answer.choices, list) and answer.choices and isinstance(answer.choices[0], dict):
                words = answer.choices[0].get("message") or answer.choices[0].get("text")
                said, calls = (
                    (words.get("content"), words.get("tool_calls")) if isinstance(words, dict) else (None, None)
                )
            digest.text = plain_text(words)[:wanted_text]
            digest.print = message_print(*spoken(said, calls)) if traces else None
        return digest

    def _plain_digest(self, answer: Any, wanted_text: int, traces: bool) -> AnswerDigest:
        """The digest of a completion of the common shape, which nearly all answers have."""
        choice, usage, details = answer.choices[0], answer.usage, answer.usage.prompt_tokens_details
        words = (choice.message.content if choice.message is not None else choice.text) or ""
        calls = choice.message.tool_calls if traces and choice.message is not None else None
        return AnswerDigest(
            usage.prompt_tokens,
            usage.completion_tokens,
            details.cached_tokens if details is not None else None,
            sendable_text(choice.finish_reason) if choice.finish_reason is not None else None,
            None,
            sendable_text(words[:wanted_text]),
            message_print(words, [call.id for call in calls] if calls else ()) if traces else None,
        )


def _encoded_field(item: dataclasses.Field[Any]) -> Any:
    """A dataclass's field as msgspec.defstruct takes it."""
    import msgspec

    if item.default_factory is not dataclasses.MISSING:
        return item.name, Any, msgspec.field(default_factory=item.default_factory)
    return (item.name, Any) if item.default is dataclasses.MISSING else (item.name, Any, item.default)


def plain_text(content: Any, depth: int = 8) -> str:
    """The words of a message or its content: a string, or the text of its parts, down to some depth."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and depth:
        return plain_text(content.get("text") or content.get("content"), depth - 1)
    if isinstance(content, list) and depth and not (content and isinstance(content[0], int)):
        return " ".join(filter(None, (plain_text(part, depth - 1) for part in content[:20])))
    return ""


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
            hello = {"pid": os.getpid(), "port": self._listener.getsockname()[1], "started_at": started_at}
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


class LabelReader:
    """Reads labels by the configured names of headers."""

    def __init__(self, names: HeadersConfig) -> None:
        texts = names.session, names.task, names.client
        self._session, self._task, self._client = (name.lower().encode() for name in texts)
        self._pre, self._post = (name.lower().encode() for name in (names.timing_pre, names.timing_post))

    def read(self, fields: Mapping[bytes, bytes]) -> Labels:
        """The labels of a request. An SDK's retry repeats the timings of the first try, which count once."""
        get = fields.get
        is_retry = get(b"x-stainless-retry-count", b"0") != b"0"
        return Labels(
            _text(get(self._session)) or _text(get(b"x-session-affinity")),
            _text(get(self._task)),
            _text(get(self._client)),
            None if is_retry else _milliseconds(get(self._pre)),
            None if is_retry else _milliseconds(get(self._post)),
            get(b"x-session-end", b"").lower() == b"true",
        )


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
        return fields, self._model_of(plan.model, _form_model(body) if fields is None else fields.model)

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


@dataclass
class RelaySettings:
    """What the controller's first table says once."""

    proxy: ProxyConfig
    headers: HeadersConfig
    log_format: str = "text"
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        self.max_body_bytes = int(self.proxy.max_body_mb * (1 << 20))
        self.max_buffered_bytes = int(self.proxy.max_buffered_mb * (1 << 20))
        self.labels = LabelReader(self.headers)


class Relay:
    """The data plane's process: its clients, replicas, counters, and what the controller said last."""

    def __init__(self, socket_path: str, listener_fd: int) -> None:
        from gevent.event import Event

        self.reactor = Reactor()
        self.codec = Codec()
        self.heads, self.door = HeadReader(), Doorkeeper()
        self.listener = self.reactor.new_socket(fileno=listener_fd)
        self.listener.setblocking(False)
        self.control = ControlChannel(self, socket_path, self.listener)
        self.admission = Admission(self)
        self.book = TurnBook(self)
        self.app = RelayApp(self)
        self.settings = RelaySettings(ProxyConfig(api_key=secrets.token_hex(16)), HeadersConfig())
        self.strategy = self.settings.proxy.strategy
        self.models: list[str] = []
        self.loading: frozenset[str] = frozenset()
        self.replicas: dict[str, LiveReplica] = {}
        self.pools: dict[str, list[LiveReplica]] = {}
        self.connections: set[ClientConnection] = set()
        self.pacing = WakePacing(self.connections)
        self.stats: tuple[bytes, float] | None = None  # the finished document, and when it came
        self.stats_read = 0  # how often
        self.buffered_bytes = 0
        self.is_stopping = self.is_over = False  # over: the time to end is, too
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)  # kept: it is read when there is no descriptor, too
        self._stopped, self._has_news = Event(), Event()
        self._new_event = Event
        self._watchers: list[Any] = []
        self._exit_code = 0
        self.watch = ReplicaWatch(self)
        self._reception = Reception(self)

    # The controller's word.

    def take_frame(self, kind: bytes, payload: bytes) -> None:
        """Act on a frame; one that cannot be read changes nothing."""
        if kind == FRAME_STATS:
            self.stats = payload, time.monotonic()
        elif kind == FRAME_TABLE:
            try:
                self._take_table(self.codec.decode(payload))
            except (KeyError, TypeError, ValueError) as error:
                self.log("error", f"the controller's table was not understood: {type(error).__name__}: {error}")

    def _take_table(self, table: Mapping[str, Any]) -> None:
        rows = [self.codec.convert(row, Backend) for row in table["backends"]]
        if table.get("settings"):
            self.settings = self.codec.convert(table["settings"], RelaySettings)
            self.strategy = self.settings.proxy.strategy
            self.door.set_key(self.settings.proxy.api_key)
            self.heads.known_requests.clear()  # labels are read by names that may be others now
            for client in self.connections:
                client.authorization = None
                client.head.forget()
        self.models = list(table["models"])
        self.loading = frozenset(table.get("loading") or ())
        former, self.replicas = self.replicas, {}
        for row in rows:
            replica = former.get(row.id)
            if replica is None or not _is_same_endpoint(replica.backend, row):
                replica = self._add_replica(row)
            else:
                former.pop(row.id)
                replica.update(row)
            self.replicas[row.id] = replica
        for replica in former.values():
            replica.close()
        self.pools = {}
        for replica in self.replicas.values():
            self.pools.setdefault(replica.backend.model, []).append(replica)
        self.admission.sweep()
        if table.get("settings"):
            self._reception.open()

    def _add_replica(self, row: Backend) -> LiveReplica:
        replica = LiveReplica(row)
        replica.look_at_once = self._new_event()
        tasks = [self.watch.health]
        if row.telemetry_port is not None:
            tasks.append(self.watch.load)
        replica.greenlets = [self.reactor.spawn(task, replica) for task in tasks]
        for greenlet in replica.greenlets:
            greenlet.link_exception(self._on_task_failed)
        return replica

    def has_room(self, length: int) -> bool:
        """Whether a body of so many bytes is within both limits."""
        settings = self.settings
        return length <= settings.max_body_bytes and self.buffered_bytes + length <= settings.max_buffered_bytes

    # The process.

    def run(self) -> int:
        """Serve until a signal ends it; the exit code."""
        for number, action in ((signal.SIGTERM, self._on_signal), (signal.SIGINT, None)):
            if action is None:
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C is the controller's; it reaches the whole process group
                continue
            watcher = self.reactor.loop.signal(number)
            watcher.start(action)
            self._watchers.append(watcher)
        self._watchers.append(self.reactor.every(SWEEP_S, self._sweep))
        self._watchers.append(self.reactor.before_waiting(self.pacing.pause))
        tasks = (self.control.run, self._flush_events, self._send_gauges)
        greenlets = [self.reactor.spawn(task) for task in tasks]
        for greenlet in greenlets:
            greenlet.link_exception(self._on_task_failed)
        self._stopped.wait()
        self.reactor.spawn(self.control.flush).join(LAST_FLUSH_S)
        return self._exit_code

    def _sweep(self) -> None:
        now = time.monotonic()
        for client in [client for client in self.connections if client.deadline <= now]:
            client.wake()
        self.admission.sweep()
        if self.control.has_news:
            self._has_news.set()
        self._reception.sweep()

    def _flush_events(self) -> None:
        while True:
            self._has_news.wait()
            self._has_news.clear()
            self.control.flush()

    def _send_gauges(self) -> None:
        while True:
            self.control.send(FRAME_GAUGES, self.codec.encode(self.gauges()))
            self.reactor.sleep(1.0)

    def gauges(self) -> dict[str, Any]:
        """What FRAME_GAUGES carries."""
        backends = {
            replica.id: {
                "healthy": replica.health != "down",
                "reason": replica.reason,
                "in_flight": replica.in_flight,
                "requests": replica.requests,
                "errors": replica.errors,
                "load": replica.load,
            }
            for replica in self.replicas.values()
        }
        return {
            "at": time.time(),
            "backends": backends,
            "queue": self.book.queue_status(),
            "counters": {
                "requests": self.book.count,
                **self.book.counters,
                "events_dropped": self.control.events_dropped,
            },
            "rss_bytes": int(os.pread(self._statm, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "connections": len(self.connections),
            "stats_read": self.stats_read,
        }

    def _on_signal(self) -> None:
        if self.is_stopping:
            self.log("warning", "second signal: ended at once")
            self._exit_code = 1
            self._stopped.set()
            return
        self.is_stopping = True
        self.reactor.spawn(self._stop).link_exception(self._on_task_failed)

    def _stop(self) -> None:
        """Accept nothing more, let the turns end that are on their way, up to the deadline; then go."""
        self.log("info", f"stopping: {len(self.book.turns)} turns to finish")
        self._reception.close()
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.connections and time.monotonic() < deadline:
            for client in [client for client in self.connections if client.is_idle]:
                self.reactor.loop.run_callback(client.leave_idle)
            self.reactor.sleep(0.05)
        self.is_over = True
        for client in list(self.connections):
            self.reactor.loop.run_callback(client.cut, PROXY_STOPPED)
        self.reactor.sleep(0.2 if self.connections else 0.0)
        self._stopped.set()

    def _on_task_failed(self, greenlet: Any) -> None:
        self.log("error", f"a task of the relay failed: {greenlet.exception!r}; the relay ends, to be started again")
        self._exit_code = 1
        self._stopped.set()

    def log_bug(self, what: str, error: Exception) -> None:
        self.log("error", f"{what} failed: {type(error).__name__}: {error}", trace=traceback.format_exc())

    def log(self, level: str, message: str, **details: Any) -> None:
        """One line to standard error: text, or JSON. Nothing from a client's head goes here: it may hold a key."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.settings.log_format == "json":
            line = json.dumps({"at": at, "level": level, "role": "relay", "message": message, **details})
        else:
            line = f"{at} {level} relay: {message}" + "".join(f"\n{detail}" for detail in details.values())
        print(line, file=sys.stderr, flush=True)


class Reception:
    """Accepts clients while there are descriptors, for them and for what they ask; the others wait in the queue of the
    listening socket."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._watcher: Any = None
        self._shortage_told = -math.inf

    def open(self) -> None:
        """Accept from now on."""
        if self._watcher is None and not self._relay.is_stopping:
            self._watcher = self._relay.reactor.watch_reads(self._relay.listener, self._accept)

    def close(self) -> None:
        """Accept nobody any more."""
        if self._watcher is not None:
            self._watcher.stop()
        self._relay.listener.close()

    def sweep(self) -> None:
        """Go on accepting when there are descriptors again."""
        if self._watcher is None or self._watcher.active or self._relay.is_stopping:
            return
        with contextlib.suppress(OSError):
            lowest = os.dup(self._relay.listener.fileno())
            os.close(lowest)
            if lowest < self._limit():
                self._watcher.start(self._accept)

    def _accept(self) -> None:
        relay = self._relay
        for _ in range(64):
            try:
                descriptor, peer = relay.listener._accept()  # accept() would make one of gevent's patched sockets
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(error)
                return
            sock = relay.reactor.new_socket(relay.listener.family, socket.SOCK_STREAM, 0, fileno=descriptor)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = ClientConnection(relay, sock, peer)
            relay.connections.add(client)
            relay.reactor.spawn(client.serve)
            if descriptor >= self._limit():
                self._pause(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return

    def _limit(self) -> int:
        """Clients get no descriptor from here on: who is accepted while none is left for replicas is not served."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4

    def _pause(self, error: OSError) -> None:
        """Look away until the next sweep: a listener with clients waiting stays readable."""
        self._watcher.stop()
        now = time.monotonic()
        if now >= self._shortage_told + SHORTAGE_S:
            self._shortage_told = now
            self._relay.log("error", f"no connection can be accepted for now: {descriptor_trouble(error)}")


def descriptor_trouble(error: OSError) -> str:
    """What a socket that could not be made is due to, and what helps."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{error.strerror}; the proxy may open {limit} files (ulimit -n): raise that where it is started"


def _is_same_endpoint(one: Backend, other: Backend) -> bool:
    """Whether two rows lead to one server: then connections and health carry over."""
    return dataclasses.replace(one, state=other.state, slots=other.slots, node=other.node) == other


def _form_model(body: bytes | bytearray) -> str | None:
    """The field ``model`` of a multipart form."""
    match = re.search(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', body)
    return match[1].decode("utf-8", "replace") if match else None


def _text(value: bytes | None) -> str | None:
    """A header's value as text, bounded; None where it is missing or empty."""
    return value.decode("utf-8", "replace").strip()[:256] or None if value else None


def _milliseconds(value: bytes | None) -> float | None:
    """A duration that a client sent; None where it is missing or none."""
    try:
        number = float(value) if value else -1.0
    except ValueError:
        return None
    return number if 0.0 <= number <= MAX_FIGURE else None


def socket_owner(sock: Any, peer: tuple[Any, ...]) -> int | None:
    """The user id that owns the other end of a loopback connection; None when it is elsewhere or cannot be told.

    Asks the kernel (sock_diag); where that is not to be had, /proc/net/tcp. OSError without a free descriptor.
    """
    host = peer[0].removeprefix("::ffff:")
    if not (host.startswith("127.") or host == "::1"):
        return None
    local = sock.getsockname()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    source, target = (socket.inet_pton(family, end[0].removeprefix("::ffff:")) for end in (peer, local))
    try:
        return _ask_sock_diag(family, source, peer[1], target, local[1])
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return _search_proc_net(_proc_net_address(source, peer[1]), _proc_net_address(target, local[1]), family)


def _ask_sock_diag(family: int, source: bytes, source_port: int, target: bytes, target_port: int) -> int | None:
    """uid of the socket that is bound to ``source`` and connected to ``target`` (linux/inet_diag.h)."""
    by_family, request_flag, no_cookie = 20, 1, b"\xff" * 8
    body = struct.pack(">BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    body += struct.pack(">HH16s16sI", source_port, target_port, source, target, 0) + no_cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as netlink:  # 4: NETLINK_SOCK_DIAG
        netlink.settimeout(1.0)
        netlink.send(struct.pack("=IHHII", 16 + len(body), by_family, request_flag, 1, 0) + body)
        answer = netlink.recv(4096)
    if len(answer) < 88 or struct.unpack_from("=H", answer, 4)[0] != by_family:
        raise OSError("sock_diag did not answer")
    uid, inode = struct.unpack_from("=II", answer, 16 + 64)
    return uid if inode else None  # an orphaned socket counts as root's: it has no inode, and no owner to trust


def _proc_net_address(address: bytes, port: int) -> str:
    """As /proc/net/tcp writes it: words of four bytes in the machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(address) // 4}I", address)) + f":{port:04X}"


def _search_proc_net(source: str, target: str, family: int) -> int | None:
    """The same from the kernel's table of all sockets."""
    try:
        table = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp").read_text().splitlines()
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return None
    for columns in map(str.split, table[1:]):
        if columns[1:3] == [source, target] and columns[9] != "0":
            return int(columns[7])
    return None


class Doorkeeper:
    """Lets this user's own processes pass, and everybody who has the key."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(16).encode()

    def set_key(self, key: str | None) -> None:
        """Ask for ``key`` from now on; None: for one that nobody has."""
        self._key = (key or secrets.token_hex(16)).encode()

    def authorize(self, client: ClientConnection, request: RequestHead, authorization: bytes) -> None:
        """RequestError 401 unless the client is this user (or root) on this machine, or sends the key."""
        if client.is_trusted is None:
            try:
                client.is_trusted = socket_owner(client.sock, client.peer) in (0, os.getuid())
            except OSError as trouble:
                message = f"who calls cannot be told: {descriptor_trouble(trouble)}"
                raise RequestError(503, message, retry_after_s=1) from None
        if client.is_trusted:
            return
        scheme, _, sent = authorization.partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else request.fields.get(b"x-api-key", b"").strip()
        if not hmac.compare_digest(sent, self._key):
            raise RequestError(
                401, "a key is needed: send the proxy's key as Authorization: Bearer", code="invalid_api_key"
            )


def ejection_s(ejections: int, most_s: float) -> float:
    """For how long a replica is left alone after so many ejections in a row."""
    return min(FIRST_EJECTION_S * 2.0 ** min(ejections - 1, 16), most_s)


class ReplicaWatch:
    """Asks replicas how they are: health on the engine's port, load on its telemetry port."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def health(self, replica: LiveReplica) -> None:
        """Probe for ever: each interval, and after an ejection sooner, backing off; a greenlet runs this."""
        interval = self._relay.settings.proxy.health_check_interval
        pause = 0.0
        while True:
            replica.look_at_once.wait(pause)
            if replica.look_at_once.is_set():  # just ejected: give it the time that its ejections call for
                replica.look_at_once.clear()
                self._relay.log("warning", f"replica {replica.id} is out: {replica.reason}")
                pause = ejection_s(replica.ejections, interval)
                continue
            interval = self._relay.settings.proxy.health_check_interval
            try:
                problem, is_proven = self._probe(replica)
            except OSError:
                pause = min(1.0, interval)
                continue
            if problem is None:
                self._readmit(replica)
                pause = interval
            else:
                self._note_problem(replica, problem, is_proven)
                pause = min(1.0, interval)

    def _readmit(self, replica: LiveReplica) -> None:
        replica.probe_failures = 0
        replica.dead_until = 0.0
        if replica.health == "down":
            replica.set_health("trial", f"on trial after: {replica.reason}")
            self._relay.log("info", f"replica {replica.id} answers again and is tried")
            self._relay.admission.dispatch(replica.backend.model)

    def _note_problem(self, replica: LiveReplica, problem: str, is_proven: bool) -> None:
        """A probe failed. Silence alone is no death while answers come: an engine may be too busy to say it is well."""
        replica.probe_failures += 1
        flows = [client.exchange for client in self._relay.connections if client.exchange is not None]
        last_byte = max([replica.last_byte, *(flow.last_part for flow in flows if flow.replica is replica)])
        is_moving = time.monotonic() - last_byte < self._relay.settings.proxy.health_check_interval
        if replica.health != "down" and (is_proven or (replica.probe_failures >= 2 and not is_moving)):
            replica.set_health("down", problem)
            self._relay.log("warning", f"replica {replica.id} is out: {problem}")

    def load(self, replica: LiveReplica) -> None:
        """Poll its load for ever; a greenlet runs this. A poll that fails leaves the last figures for a while."""
        missed = 0
        while True:
            backend = replica.backend
            try:
                status, body = self._get(backend.host, backend.telemetry_port or 0, b"/load", backend.key)
                replica.take_load(self._relay.codec.decode(body) if status == 200 else None)
                missed = 0
            except (OSError, ValueError, TypeError, ArithmeticError, RecursionError, WireError) as error:
                missed += getattr(error, "errno", None) not in NO_DESCRIPTOR
                if missed == 5:
                    replica.take_load(None)
            self._relay.reactor.sleep(self._relay.settings.proxy.load_poll_interval)

    def is_alive(self, replica: LiveReplica) -> bool:
        """Whether it answers its health probe now, or cannot be asked; a death just found is believed for a moment."""
        now = time.monotonic()
        if now < replica.dead_until:
            return False
        try:
            problem, _ = self._probe(replica)
        except OSError:
            return True
        if problem is not None:
            replica.dead_until = time.monotonic() + 0.5
        return problem is None

    def _probe(self, replica: LiveReplica) -> tuple[str | None, bool]:
        """What is wrong with it (None: nothing), and whether that is proof of death rather than silence.

        OSError without a free descriptor: that says nothing of the replica.
        """
        try:
            status, _ = self._get(replica.backend.host, replica.backend.port, b"/health", None)
        except TimeoutError:
            return f"no answer to GET /health within {PROBE_S:g} s", False
        except (OSError, WireError) as error:
            if getattr(error, "errno", None) in NO_DESCRIPTOR:
                raise
            return f"health probe: {getattr(error, 'strerror', None) or error}", True
        # A server without /health answers 404, and serves; an engine that died behind its server answers 5xx.
        return (None, False) if 200 <= status < 500 else (f"GET /health says {status}", True)

    def _get(self, host: str, port: int, path: bytes, key: str | None) -> tuple[int, bytes]:
        """Status and body of one GET, on a connection of its own; OSError or WireError."""
        authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
        deadline = time.monotonic() + PROBE_S
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(PROBE_S)
            sock.connect((host, port))
            head = b"GET %b HTTP/1.1\r\nhost: %b:%d\r\n%bconnection: close\r\n\r\n"
            sock.sendall(head % (path, host.encode(), port, authorization))
            received, status, decoder, pieces = b"", 0, None, list[bytes]()
            while decoder is None or not decoder.is_over:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(RECEIVE_BYTES)
                if not data:
                    if decoder is None or not decoder.is_until_close:
                        raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
                    break
                if decoder is not None:
                    decoder.feed(data, 0, pieces)
                    continue
                received += data
                while decoder is None and (end := received.find(b"\r\n\r\n") + 4) >= 4:
                    answer, length = self._relay.heads.answer(received, end)
                    if answer.status >= 200:
                        status, decoder = answer.status, BodyDecoder(length)
                        decoder.feed(received, end, pieces)
                    received = received[end:]  # behind an interim answer, the real one follows
            return status, b"".join(pieces)


class RelayApp:
    """The Flask app: all that is not inference. Called with requests that the relay has read already."""

    def __init__(self, relay: Relay) -> None:
        import flask
        from werkzeug.exceptions import HTTPException
        from werkzeug.routing import BaseConverter

        class Anything(BaseConverter):
            """What a client calls its session: whatever it likes, with slashes too."""

            regex, part_isolating = ".+", False

        self._relay, self._flask = relay, flask
        self._wsgi = app = flask.Flask("agent_infra")
        app.url_map.merge_slashes = False
        app.url_map.converters["anything"] = Anything
        for rule, methods, view in (
            ("/", "GET", self._index),
            ("/health", "GET", self._health),
            ("/stats", "GET", self._stats),
            ("/stats/sessions/<anything:session>", "GET", self._session),
            ("/metrics", "GET", self._metrics),
            ("/queue/status", "GET", self._queue_status),
            ("/v1/models", "GET", self._models),
            ("/<path:model>/v1/models", "GET", self._models),
            ("/sessions/<anything:session>/end", "POST", self._end_session),
            ("/admin/backends/<path:backend>/<any(drain, undrain):operation>", "POST", self._drain),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[methods])
        app.register_error_handler(HTTPException, self._on_http_error)

    def answer(self, request: RequestHead, path: bytes, query: bytes, body: bytes) -> bytes:
        """The whole answer, ready to send."""
        environ = {
            "REQUEST_METHOD": request.method.decode("ascii"),
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query.decode("latin-1"),
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": request.fields.get(b"content-type", b"").decode("latin-1"),
            "SERVER_NAME": "agent-infra",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        started: list[Any] = []

        def start_response(status: str, fields: list[tuple[str, str]], _error: Any = None) -> None:
            started[:] = status, fields

        parts: Any = self._wsgi(environ, start_response)  # type: ignore[arg-type]  # nobody here writes piecemeal
        content = b"".join(parts)
        if hasattr(parts, "close"):
            parts.close()
        status, fields = started
        kept = [(name, value) for name, value in fields if name.lower() not in ("content-length", "connection")]
        length = {name.lower(): value for name, value in fields}.get("content-length", len(content))  # HEAD: as of GET
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in kept), f"content-length: {length}"]
        if not request.keeps_alive:
            lines.append("connection: close")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if request.method == b"HEAD" else content)

    def _index(self) -> Any:
        paths = sorted(path.decode() for path in INFERENCE_PATHS)
        rules = sorted(
            f"{method} {rule.rule}"
            for rule in self._wsgi.url_map.iter_rules()
            for method in (rule.methods or set()) & {"GET", "POST"}
            if rule.endpoint != "static"
        )
        return {
            "name": "agent-infra",
            "version": __version__,
            "models": self._relay.models,
            "inference": paths,
            "also": rules,
        }

    def _health(self) -> Any:
        relay = self._relay
        ready = {name: sum(r.accepts_work for r in relay.pools.get(name, ())) for name in relay.models}
        if not any(ready.values()) and relay.loading:
            status = "starting"
        elif all(ready.values()) and all(replica.health != "down" for replica in relay.replicas.values()):
            status = "ok"
        else:
            status = "degraded"
        return {"status": status, "models": {name: {"ready": count} for name, count in ready.items()}}

    def _stats(self) -> Any:
        relay = self._relay
        relay.stats_read += 1
        if relay.stats is None or time.monotonic() - relay.stats[1] > STATS_FRESH_S:
            relay.control.questions.ask("stats")  # the document comes ahead of the answer
        if relay.stats is None:
            return self._unanswered()
        document, at = relay.stats
        age = b'{"snapshot_age_ms":%d,' % ((time.monotonic() - at) * 1000)
        return self._flask.Response(age + document.removeprefix(STATS_PREFIX), mimetype="application/json")

    def _metrics(self) -> Any:
        return self._ask("metrics")

    def _session(self, session: str) -> Any:
        return self._ask("session", session=session[:256])

    def _ask(self, op: str, **details: Any) -> Any:
        """What the controller answers."""
        answer = self._relay.control.questions.ask(op, **details)
        if answer is None:
            return self._unanswered()
        return self._flask.Response(answer["body"], answer["status"], content_type=answer["type"])

    def _unanswered(self) -> Any:
        return self._error(503, f"no controller has answered within {QUESTION_S:g} s; `connect` starts one")

    def _queue_status(self) -> Any:
        return self._relay.book.queue_status()

    def _models(self, model: str | None = None) -> Any:
        names = [name for name in self._relay.models if model in (None, name)]
        if model is not None and not names:
            return self._error(404, f"the model {model[:100]!r} does not exist")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "agent-infra"} for name in names]
        return {"object": "list", "data": rows}

    def _end_session(self, session: str) -> Any:
        self._relay.book.end_session(session[:256])
        return {"session": session[:256], "noted": True}  # whether it lives is known to the controller alone

    def _drain(self, backend: str, operation: str) -> Any:
        replica = self._relay.replicas.get(backend)
        if replica is None:
            return self._error(
                404, f"there is no backend {backend[:100]!r}; known: {', '.join(self._relay.replicas) or 'none'}"
            )
        replica.override = "draining" if operation == "drain" else "ready"
        replica.update(replica.backend)
        self._relay.control.add_request({"op": operation, "backend": backend})
        return {"backend": backend, "op": operation, "in_flight": replica.in_flight}

    def _error(self, status: int, message: str, is_anthropic: bool = False) -> Any:
        document = error_document(status, message, None, is_anthropic)
        return self._flask.Response(document, status, mimetype="application/json")

    def _on_http_error(self, error: Any) -> Any:
        method, path = self._flask.request.method, self._flask.request.path
        allowed = set(getattr(error, "valid_methods", None) or ())
        if method != "POST" and split_inference_path(path.encode("utf-8", "replace")):  # those are none of Flask's
            allowed = {"POST"}
        fix = f"{'POST' if 'POST' in allowed else 'GET'} it" if allowed else "GET / lists what there is"
        status = 405 if allowed else error.code or 500
        answer = self._error(status, f"{http_phrase(status)}: {method} {path[:100]}; {fix}", "/v1/messages" in path)
        if allowed:
            answer.headers["Allow"] = ", ".join(sorted(allowed))
        return answer


def calm_collector() -> None:
    """For a process that has started: what was imported is for ever, and need not be walked again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def release_free_memory() -> None:
    """Give back what starting up has freed: compiling this file alone leaves 16 MB. Only glibc knows how."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def run_relay(socket_path: str, listener_fd: int) -> int:
    """The relay's entry: serve on the inherited listening socket, controllers at ``socket_path``; its exit code."""
    from gevent import monkey

    monkey.patch_all()  # first of all, before any third-party import: they must see the patched library
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    relay = Relay(socket_path, listener_fd)
    calm_collector()
    release_free_memory()
    return relay.run()

"""The state of a turn in flight, what its request asked for, and the event loop that it runs in."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.http.events import AnswerDigest
from agent_infra_core.http.heads import RequestHead
from agent_infra_core.protocol import MAX_FIGURE, NO_GAPS, Histogram
from agent_infra_core.routing.strategies import ANYWHERE, RouteRequest
from agent_infra_core.settings import HeadersConfig, ProxyConfig

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection
    from agent_infra_core.relay.replicas import LiveReplica


# An engine's step takes 7 ms and more. So many clients could not be served faster without a pause: each turn of one
# waits for two at most.
PAUSE_S, PACED_FROM_CLIENTS = 0.002, 32
STREAMS_PAUSE_S = 0.010  # in its place after a wake in which nothing but parts of streams went by


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

"""The relay process: accepts clients, takes the replica table, sends gauges, shuts down in order."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import secrets
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent_infra_core.host import ResidentMemory, printable_text
from agent_infra_core.http.heads import RequestHead
from agent_infra_core.protocol import FRAME_GAUGES, FRAME_STATS, FRAME_TABLE, Backend
from agent_infra_core.relay.access import AccessControl, is_same_endpoint
from agent_infra_core.relay.admission import Admission
from agent_infra_core.relay.bodies import Codec
from agent_infra_core.relay.book import TurnBook
from agent_infra_core.relay.connection import (
    CLIENT_SHARE,
    STRANGER_S,
    ClientConnection,
    HeldBodies,
    descriptor_trouble,
)
from agent_infra_core.relay.control import SHORTAGE_S, ControlChannel
from agent_infra_core.relay.reactor import Reactor
from agent_infra_core.relay.replicas import LiveReplica, ReplicaWatch
from agent_infra_core.relay.requests import HeadReader, LabelReader
from agent_infra_core.settings import HeadersConfig, ProxyConfig

SWEEP_S = 0.1  # how late a deadline is noticed at most, and how often events go to the controller
LAST_WORD_S = 0.5  # for the clients to be told that their turns are cut
# Shares of the descriptors. A client is no use without one left for its replica, so not all are for clients; the last
# ones of theirs are for those who don't have most of the connections.
CONNECTIONS, LAST_CONNECTIONS = 0.75, 0.8125
STRANGER_GRACE_S = 0.5  # that a new connection has for its first bytes when descriptors run out
REFUSALS_LOGGED_A_SECOND = 5
LAST_FLUSH_S = 2.0  # for the last events when the relay ends; the controller may not take them


class HttpApp(Protocol):
    """Answers requests other than inference."""

    def answer(self, request: RequestHead, path: bytes, query: bytes, body: bytes) -> bytes:
        """Return the whole answer, ready to send."""


@dataclass
class RelaySettings:
    """The settings in the controller's first table."""

    proxy: ProxyConfig
    headers: HeadersConfig
    log_format: str = "text"
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        self.max_body_bytes = int(self.proxy.max_body_mb * (1 << 20))
        self.max_buffered_bytes = int(self.proxy.max_buffered_mb * (1 << 20))
        self.labels = LabelReader(self.headers, self.proxy.session_headers)


class Relay:
    """The data plane's process. Owns clients, replicas, counters and the last table."""

    def __init__(self, socket_path: str, listener_fd: int, make_app: Callable[[Relay], HttpApp]) -> None:
        """``make_app`` returns what answers requests other than inference."""
        self.reactor = Reactor()
        self.codec = Codec()
        self.heads, self.access = HeadReader(), AccessControl()
        self.listener = self.reactor.new_socket(fileno=listener_fd)
        self.listener.setblocking(False)
        self.control = ControlChannel(self, socket_path, self.listener)
        self.admission = Admission(self)
        self.refusals = RefusalLog(self.log)
        self.book = TurnBook(self)
        self.app = make_app(self)
        self.settings = RelaySettings(ProxyConfig(api_key=secrets.token_hex(16)), HeadersConfig())
        self.strategy = self.settings.proxy.strategy
        self.keeps_sessions = False  # session_affinity, with the strategy that it goes with
        self.models: list[str] = []
        self.loading: frozenset[str] = frozenset()
        self.wakes: frozenset[str] = frozenset()  # models that the controller brings back when a turn asks for them
        self.replicas: dict[str, LiveReplica] = {}
        self.pools: dict[str, list[LiveReplica]] = {}
        self.connections: set[ClientConnection] = set()
        self.stats: tuple[bytes, float] | None = None  # the finished document, and when it came
        self.stats_turns = 0  # how many finished turns that document is known to have
        self.stats_read = 0  # how often /stats and /runs were read
        self.bodies = HeldBodies()
        self.is_stopping = self.is_over = False  # over: the time to finish turns has passed
        self._memory = ResidentMemory()
        self._stopped, self._has_news = self.reactor.new_event(), self.reactor.new_event()
        self._watchers: list[Any] = []
        self._exit_code = 0
        self._ends_at = 0.0  # monotonic; when stopping
        self.watch = ReplicaWatch(self)
        self.acceptor = Acceptor(self)

    # Frames from the controller.

    def handle_frame(self, kind: bytes, payload: bytes) -> None:
        """Handle a frame. An unreadable one changes nothing."""
        if kind == FRAME_STATS:
            self.stats = payload, time.monotonic()
        elif kind == FRAME_TABLE:
            try:
                self._apply_table(self.codec.decode(payload))
            except (KeyError, TypeError, ValueError) as error:
                self.log("error", f"the controller's table was not understood: {type(error).__name__}: {error}")

    def _apply_table(self, table: Mapping[str, Any]) -> None:
        rows = [self.codec.convert(row, Backend) for row in table["backends"]]
        if table.get("settings"):
            self.settings = self.codec.convert(table["settings"], RelaySettings)
            self.strategy = self.settings.proxy.strategy
            affinity = self.settings.proxy.session_affinity
            self.keeps_sessions = affinity == "auto" and self.strategy == "least_load"
            self.admission.sessions.configure(self.settings.proxy.kv_admission == "auto")
            self.access.configure(self.settings.proxy)
            self.bodies.limit = self.settings.max_buffered_bytes
            self.heads.known_requests.clear()  # the names of the label headers may have changed
            for client in self.connections:
                client.authorization = None
        self.models = list(table["models"])
        self.loading = frozenset(table.get("loading") or ())
        self.wakes = frozenset(table.get("wakes") or ())
        former, self.replicas = self.replicas, {}
        for row in rows:
            replica = former.get(row.id)
            if replica is None or not is_same_endpoint(replica.backend, row):
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
            self.acceptor.open()

    def _add_replica(self, row: Backend) -> LiveReplica:
        replica = LiveReplica(row)
        replica.probe_now, replica.has_work = self.reactor.new_event(), self.reactor.new_event()
        tasks = [self.watch.health]
        if row.telemetry_port is not None:
            tasks.append(self.watch.load)
        replica.greenlets = [self.reactor.spawn(task, replica) for task in tasks]
        for greenlet in replica.greenlets:
            greenlet.link_exception(self._on_task_failed)
        return replica

    def adapters(self) -> dict[str, str]:
        """The LoRA adapters that engines report, and the model that each belongs to."""
        return {
            name: replica.backend.model
            for replica in self.replicas.values()
            for name in replica.model_rows
            if name not in self.models
        }

    # The process.

    def run(self) -> int:
        """Serve until a signal ends it. Returns the exit code."""
        for number, action in ((signal.SIGTERM, self._on_signal), (signal.SIGINT, None)):
            if action is None:
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C is the controller's; it reaches the whole process group
                continue
            watcher = self.reactor.loop.signal(number)
            watcher.start(action)
            self._watchers.append(watcher)
        self._watchers.append(self.reactor.every(SWEEP_S, self._sweep))
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
        self.acceptor.sweep()

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
        """Return the content of FRAME_GAUGES."""
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
            "rss_bytes": self._memory.read(),
            "connections": len(self.connections),
            "waiting": Counter(turn.model for turn in self.admission.waiting()),
            "stats_read": self.stats_read,
        }

    def _on_signal(self) -> None:
        if self.is_stopping:
            if not self.is_over:
                self.log("warning", "second signal: the turns in flight are cut")
            self._ends_at, self._exit_code = 0.0, 1
            return
        self.is_stopping, self._ends_at = True, time.monotonic() + self.settings.drain_seconds
        self.reactor.spawn(self._stop).link_exception(self._on_task_failed)

    def _stop(self) -> None:
        """Accept nobody, let turns in flight finish until the deadline, then end."""
        self.log("info", f"stopping: {len(self.book.turns)} turns to finish")
        self.acceptor.close()
        while self.connections and time.monotonic() < self._ends_at:
            for client in [client for client in self.connections if client.is_idle]:
                self.reactor.loop.run_callback(client.leave_idle)
            self.reactor.sleep(0.05)
        self.is_over = True
        for client in list(self.connections):
            self.reactor.loop.run_callback(client.wake)
        end = time.monotonic() + LAST_WORD_S
        while self.connections and time.monotonic() < end:
            self.reactor.sleep(0.02)
        self._stopped.set()

    def _on_task_failed(self, greenlet: Any) -> None:
        self.log("error", f"a task of the relay failed: {greenlet.exception!r}; the relay ends, to be started again")
        self._exit_code = 1
        self._stopped.set()

    def log_bug(self, what: str, error: Exception) -> None:
        self.log("error", f"{what} failed: {type(error).__name__}: {error}", trace=traceback.format_exc())

    def log(self, level: str, message: str, **details: Any) -> None:
        """Print a line to standard error, as text or JSON. Never log a client's head: it may hold a key."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.settings.log_format == "json":
            line = json.dumps({"at": at, "level": level, "role": "relay", "message": message, **details})
        else:
            line = f"{at} {level} relay: {message}" + "".join(f"\n{detail}" for detail in details.values())
        with contextlib.suppress(OSError):  # a full disk
            print(line, file=sys.stderr, flush=True)


class RefusalLog:
    """A line in the log for each request that was refused or failed; a flood of them is counted instead."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self._log = log
        self._second, self._count = 0, 0

    def note(self, words: str) -> None:
        """Log a refusal, in printable words."""
        second = int(time.monotonic())
        if second != self._second:
            if self._count > REFUSALS_LOGGED_A_SECOND:
                self._log("warning", f"and {self._count - REFUSALS_LOGGED_A_SECOND} more like that")
            self._second, self._count = second, 0
        self._count += 1
        if self._count <= REFUSALS_LOGGED_A_SECOND:
            self._log("warning", printable_text(words[:500]))


class Acceptor:
    """Accepts clients while descriptors are left for them and their replicas. The others wait in the listening socket's
    queue."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._watcher: Any = None
        self._shortage_logged = -math.inf

    def open(self) -> None:
        """Start accepting."""
        if self._watcher is None and not self._relay.is_stopping:
            self._watcher = self._relay.reactor.watch_reads(self._relay.listener, self._accept)

    def close(self) -> None:
        """Stop accepting."""
        if self._watcher is not None:
            self._watcher.stop()
        self._relay.listener.close()

    def sweep(self) -> None:
        """Accept again once descriptors are free."""
        if self._watcher is None or self._watcher.active or self._relay.is_stopping:
            return
        if self._lowest_free() < self._limit(LAST_CONNECTIONS):
            self._watcher.start(self._accept)
        else:
            self._make_room()

    def _accept(self) -> None:
        relay = self._relay
        for _ in range(64):
            try:
                descriptor, peer = relay.listener._accept()  # accept() would create one of gevent's patched sockets
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
            has_room = descriptor < self._limit(CONNECTIONS) or self._make_room()
            if descriptor >= self._limit(LAST_CONNECTIONS):
                self._pause(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return
            client.is_among_last = not has_room

    def _make_room(self) -> bool:
        """Close the older half of the connections that have held a descriptor for a while and sent no request; else of
        the idle ones of the owner that has most connections. Returns whether there were any."""
        relay, latest = self._relay, time.monotonic() + STRANGER_S - STRANGER_GRACE_S
        unwanted = [each for each in relay.connections if each.is_stranger and each.deadline <= latest]
        if not unwanted:
            most = max(Counter(each.owner for each in relay.connections).items(), key=lambda item: item[1])[0]
            unwanted = [each for each in relay.connections if each.is_idle and each.is_known and each.owner == most]
        unwanted = [each for each in unwanted if not each.has_unread_bytes]
        unwanted.sort(key=lambda each: each.deadline)
        for client in unwanted[: len(unwanted) // 2 + 1]:
            relay.reactor.loop.run_callback(client.leave_idle, True)
        return bool(unwanted)

    def has_most(self, client: ClientConnection) -> bool:
        """Whether descriptors are short still, and a client that asks has so many of the connections that the last ones
        are for others."""
        if self._lowest_free() < self._limit(CONNECTIONS):
            client.is_among_last = False
            return False
        sharers = Counter(each.sharer or each.owner for each in self._relay.connections)
        return sharers[client.identity] > CLIENT_SHARE * sharers.total()

    def _lowest_free(self) -> int:
        """Return the descriptor that the next connection would get."""
        try:
            lowest = os.dup(self._relay.listener.fileno())
            os.close(lowest)
        except OSError:  # none is free
            return self._limit(1.0)
        return lowest

    def _limit(self, share: float) -> int:
        """Return the first descriptor beyond a share of those that this process may have."""
        return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * share)

    def _pause(self, error: OSError) -> None:
        """Stop watching until the next sweep, because a listener with waiting clients stays readable."""
        self._watcher.stop()
        now = time.monotonic()
        if now >= self._shortage_logged + SHORTAGE_S:
            self._shortage_logged = now
            self._relay.log("error", f"no connection can be accepted for now: {descriptor_trouble(error)}")

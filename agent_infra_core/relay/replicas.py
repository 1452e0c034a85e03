"""The relay's replicas: load, slots, ejection after failures, health probes."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.bodies import BodyDecoder
from agent_infra_core.http.errors import WireError
from agent_infra_core.http.heads import forwarded_head
from agent_infra_core.protocol import Backend
from agent_infra_core.relay.owners import NO_DESCRIPTOR, kernel_answers, prove_own_server
from agent_infra_core.relay.requests import RequestPlan
from agent_infra_core.routing.beliefs import ReplicaBelief

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay
    from agent_infra_core.relay.upstream import Upstream

RECEIVE_BYTES = 64 << 10
PROBE_S = 5.0
EJECT_AFTER = 3  # transport errors in a row
EJECT_AFTER_REFUSALS = 5  # answers of status 500 and above in a row
FIRST_EJECTION_S = 0.5  # doubled with each ejection in a row, up to the health check interval
AWAY_STATES = ("draining", "stopped", "failed")  # in a replica's own digest: it takes no turn
LOOPBACK = ("127.0.0.1", "::1")
MAX_MODEL_ROWS = 1000  # of a replica's list of models
NAMED_ABSENT = 3  # number of replicas that a refusal names
REST_POLLS = 1.5  # load poll intervals by which a replica without work is polled later


class LiveReplica:
    """A backend as the relay sees it: its row, connections, load and health. Routing's view of a replica."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.id = backend.id
        self.host = f"{backend.host}:{backend.port}".encode("ascii")
        self.belief = ReplicaBelief()
        self.in_flight = self.requests = self.errors = 0
        self.last_chosen = 0
        self.latency_ms: float | None = None
        self.busy_until = 0.0
        self.foreign_work = 0
        self.gpu_utilization = self.kv_usage = self.kv_tokens = 0.0
        self.load: Any = None
        self.override: str | None = None  # state that an operator asked for, until the table agrees
        self.health = "up"  # up | trial (one turn at a time, after an ejection) | down
        self.reason: str | None = None
        self.failures = 0  # transport errors in a row
        self.refusals = 0  # answers of status 500 and above in a row
        self.ejections = 0  # in a row
        self.probe_failures = 0  # in a row
        self.last_byte = 0.0  # of an answer
        self.dead_until = 0.0  # a probe found it dead; believed until this time
        self.died_at = 0.0  # when it was last found dead: turns that were sent before died with it
        self.ejected_dead_at = 0.0  # when its death had its consequences: turns that were sent before add nothing
        self.idle: dict[Upstream, None] = {}  # the most recently used last
        self.greenlets: list[Any] = []  # of its health and load, killed with it
        self.probe_now: Any = None  # event: probe now
        self.has_work: Any = None  # event: it got a turn since its load was read
        self.accepts_work = True
        self.is_gone = False  # the table no longer has it
        # Its port may be taken over by another user while it is down: nothing is sent before the kernel has said whose
        # server accepted the connection.
        self.needs_proof = backend.is_own and backend.host in LOOPBACK and kernel_answers()
        self.model_rows: dict[str, dict[str, Any]] = {}  # of its own GET /v1/models: its model's, and its adapters'
        self.capacity = backend.slots
        self.update(backend)

    def update(self, backend: Backend) -> None:
        """Apply a new row of the same replica, or a change of its state."""
        self.backend = backend
        self.ends_at = math.inf if backend.ends_at is None else time.monotonic() + backend.ends_at - time.time()
        if self.override == backend.state:
            self.override = None
        state = self.override or backend.state
        load: Mapping[str, Any] = self.load if isinstance(self.load, dict) else {}
        # A sleeping engine answers its health probe and hangs every turn.
        is_away = bool(load.get("is_sleeping")) or load.get("state") in AWAY_STATES
        if load.get("is_sleeping"):
            self.belief.clear()  # its cache doesn't outlive its sleep
        self.accepts_work = state == "ready" and self.health != "down" and not is_away
        self.capacity = 1 if self.health == "trial" else backend.slots

    @property
    def is_leaving(self) -> bool:
        """Whether it is ending by itself, and the controller hasn't noticed yet."""
        load: Mapping[str, Any] = self.load if isinstance(self.load, dict) else {}
        return self.backend.state == "ready" and load.get("state") == "draining"

    @property
    def has_room(self) -> bool:
        """Whether it takes work and has a free slot."""
        return self.accepts_work and not 0 < self.capacity <= self.in_flight

    def set_health(self, health: str, reason: str | None) -> None:
        self.health, self.reason = health, reason
        self.update(self.backend)

    def note_success(self, latency_ms: float | None, now: float) -> None:
        """A turn got its whole answer from it; ``latency_ms`` is None if nothing was generated."""
        self.failures = self.refusals = 0
        self.last_byte = now
        if latency_ms is not None:
            former = self.latency_ms
            self.latency_ms = latency_ms if former is None else former + 0.2 * (latency_ms - former)
        if self.health == "trial":
            self.ejections = 0
            self.set_health("up", None)

    def note_failure(self, reason: str, is_dead: bool, sent: float) -> None:
        """Note a transport error of a turn that was sent at ``sent``. Several in a row, or a proof of death, eject the
        replica until a probe succeeds. A death that is noticed late says nothing about the successor."""
        self.errors += 1
        if sent < self.ejected_dead_at:
            return
        self.failures += 1
        if is_dead:
            self.died_at = self.ejected_dead_at = time.monotonic()
            self.belief.clear()
        if is_dead or self.failures >= EJECT_AFTER or self.health == "trial":
            self._eject(reason)

    def note_refusal(self, status: int, is_alone: bool) -> None:
        """An answer of status 500 or above from a live engine; several in a row eject it, unless it is the last one.

        Such a replica is never full, so it would attract every turn.
        """
        self.errors += 1
        self.refusals += 1
        if not is_alone and (self.refusals >= EJECT_AFTER_REFUSALS or self.health == "trial"):
            self._eject(f"answered {status}, the last of {self.refusals} errors in a row")

    def _eject(self, reason: str) -> None:
        if self.health != "down":
            self.ejections += 1
            self.set_health("down", reason)
            if self.probe_now is not None:
                self.probe_now.set()

    def apply_load(self, load: Any) -> None:
        """Apply a /load digest. An invalid figure raises ValueError or TypeError and changes nothing."""
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
        """Count a turn that chose it, and its prompt at once: the next report comes too late for the next choice."""
        self.last_chosen = choice
        if not self.in_flight and self.has_work is not None:
            self.has_work.set()
        self.in_flight += 1
        self.requests += 1
        if self.kv_tokens:
            self.kv_usage += tokens / self.kv_tokens

    def head(self, plan: RequestPlan, length: int) -> bytes:
        """Return the head to send to it for a request with a body of ``length`` bytes."""
        return forwarded_head(plan.request, plan.target, self.host, self.backend.key, length)

    def release(self) -> None:
        """Note that a turn there is over."""
        self.in_flight -= 1

    def forget(self, upstream: Upstream) -> None:
        """Drop an idle connection."""
        self.idle.pop(upstream, None)
        upstream.close()

    def close(self) -> None:
        """Stop probes and close idle connections, because it left the table. Its turns go on."""
        self.is_gone = True
        self.died_at = time.monotonic()  # a turn that breaks off from now on does so because its engine ended
        for greenlet in self.greenlets:
            greenlet.kill(block=False)
        while self.idle:
            self.forget(next(iter(self.idle)))


def why_away(replica: LiveReplica) -> str:
    """Return why a replica gets no turns, to follow its name in a sentence."""
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
    """Explain why none of a model's replicas can answer, and what to do; names a few."""
    words = [f"{replica.id} {why_away(replica)}" for replica in replicas[:NAMED_ABSENT]]
    if len(replicas) > NAMED_ABSENT:
        words.append(f"{len(replicas) - NAMED_ABSENT} more")
    return ", ".join(words) or "none runs (`start` starts one)"


def ejection_s(ejections: int, most_s: float) -> float:
    """Return how long a replica stays out after this many ejections in a row."""
    return min(FIRST_EJECTION_S * 2.0 ** min(ejections - 1, 16), most_s)


class ReplicaWatch:
    """Polls the replicas: health on the engine's port, load on its telemetry port."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def health(self, replica: LiveReplica) -> None:
        """Probe at each interval, and sooner after an ejection, with backoff; a greenlet runs this."""
        interval = self._relay.settings.proxy.health_check_interval
        pause = 0.0
        while True:
            replica.probe_now.wait(pause)
            if replica.probe_now.is_set():  # just ejected: back off
                replica.probe_now.clear()
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
                self._read_models(replica)
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

    def _read_models(self, replica: LiveReplica) -> None:
        """Read what a replica reports of its model and of the adapters that it serves; else keep what it reported."""
        backend = replica.backend
        try:
            status, body = self._get(replica, backend.port, b"/v1/models", backend.key)
            rows = self._relay.codec.decode(body)["data"] if status == 200 else []
            known = {row["id"]: row for row in rows[:MAX_MODEL_ROWS] if isinstance(row["id"], str)}
        except (OSError, ValueError, TypeError, KeyError, RecursionError, WireError):
            return
        bases = [row for row in known.values() if not row.get("parent")]
        own = known.get(backend.model) or (bases[0] if bases else None)
        replica.model_rows = {name: row for name, row in known.items() if row.get("parent")}
        if own is not None:
            replica.model_rows[backend.model] = own

    def _note_problem(self, replica: LiveReplica, problem: str, is_proven: bool) -> None:
        """Note a failed probe. Silence isn't death while answers flow: an engine may be too busy to answer a probe."""
        replica.probe_failures += 1
        is_moving = time.monotonic() - replica.last_byte < self._relay.settings.proxy.health_check_interval
        if replica.health != "down" and (is_proven or (replica.probe_failures >= 2 and not is_moving)):
            replica.set_health("down", problem)
            self._relay.log("warning", f"replica {replica.id} is out: {problem}")

    def load(self, replica: LiveReplica) -> None:
        """Poll its load; a greenlet runs this. After a failed poll, the last figures stay for a while."""
        missed = 0
        # One connection for all polls: through a tunnel, opening one costs several times as much as the poll.
        with contextlib.closing(ProbeConnection(self._relay)) as telemetry:
            while True:
                backend = replica.backend
                try:
                    status, body = telemetry.get(replica, backend.telemetry_port or 0, b"/load", backend.key)
                    replica.apply_load(self._relay.codec.decode(body) if status == 200 else None)
                    missed = 0
                except (OSError, ValueError, TypeError, ArithmeticError, RecursionError, WireError) as error:
                    missed += getattr(error, "errno", None) not in NO_DESCRIPTOR
                    if missed == 5:
                        replica.apply_load(None)
                interval = self._relay.settings.proxy.load_poll_interval
                self._relay.reactor.sleep(interval)
                # Most of what a large fleet costs while nothing happens is these polls.
                if not (missed or replica.in_flight or replica.foreign_work):
                    replica.has_work.wait(REST_POLLS * interval)
                replica.has_work.clear()

    def has_survived(self, replica: LiveReplica, since: float) -> bool:
        """Whether it answers a health probe now, or can't be asked, and wasn't found dead after ``since`` (monotonic).

        Its successor may answer the probe. A death just found is believed for a moment.
        """
        if since < replica.died_at or time.monotonic() < replica.dead_until:
            return False
        try:
            problem, _ = self._probe(replica)
        except OSError:
            return True
        if problem is not None:
            replica.died_at = time.monotonic()
            replica.dead_until = replica.died_at + 0.5
        return since >= replica.died_at  # another turn may have found it dead meanwhile

    def _probe(self, replica: LiveReplica) -> tuple[str | None, bool]:
        """Return what is wrong with it (None: nothing), and whether that proves its death or is mere silence.

        Raises OSError without a free descriptor, which says nothing about the replica.
        """
        try:
            status, _ = self._get(replica, replica.backend.port, b"/health", None)
        except TimeoutError:
            return f"no answer to GET /health within {PROBE_S:g} s", False
        except (OSError, WireError) as error:
            if getattr(error, "errno", None) in NO_DESCRIPTOR:
                raise
            return f"health probe: {getattr(error, 'strerror', None) or error}", True
        # A server without /health answers 404 and still serves; a server whose engine died answers 5xx.
        return (None, False) if 200 <= status < 500 else (f"GET /health says {status}", True)

    def _get(self, replica: LiveReplica, port: int, path: bytes, key: str | None) -> tuple[int, bytes]:
        """Return status and body of a GET on a new connection. Raises OSError or WireError."""
        with contextlib.closing(ProbeConnection(self._relay)) as connection:
            return connection.get(replica, port, path, key)


class ProbeConnection:
    """A connection for GETs to a port of a replica, kept while the replica allows it; owns the socket."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._sock: Any = None
        self._address: tuple[str, int] | None = None

    def get(self, replica: LiveReplica, port: int, path: bytes, key: str | None) -> tuple[int, bytes]:
        """Return status and body. Reconnects if the kept connection was closed. Raises OSError or WireError."""
        if self._address != (replica.backend.host, port):
            self.close()
        is_kept = self._sock is not None
        try:
            return self._exchange(replica, port, path, key)
        except OSError as error:
            if not is_kept or isinstance(error, TimeoutError):
                raise
        return self._exchange(replica, port, path, key)

    def _exchange(self, replica: LiveReplica, port: int, path: bytes, key: str | None) -> tuple[int, bytes]:
        host = replica.backend.host
        authorization = b"authorization: Bearer %b\r\n" % key.encode("latin-1") if key else b""
        deadline = time.monotonic() + PROBE_S
        is_reusable = False
        try:
            sock = self._sock or self._connect(replica, port, deadline, needs_proof=key is not None)
            sock.settimeout(PROBE_S)
            sock.sendall(b"GET %b HTTP/1.1\r\nhost: %b:%d\r\n%b\r\n" % (path, host.encode(), port, authorization))
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
                    received = received[end:]  # the real answer follows an interim one
            is_reusable = answer.is_reusable and decoder.is_over
            return status, b"".join(pieces)
        finally:
            if not is_reusable:
                self.close()

    def _connect(self, replica: LiveReplica, port: int, deadline: float, needs_proof: bool) -> Any:
        host = replica.backend.host
        self._sock = sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._address = host, port
        sock.settimeout(PROBE_S)
        sock.connect((host, port))
        if needs_proof and replica.needs_proof:
            prove_own_server(sock, host, port, self._relay.reactor.sleep, lambda: time.monotonic() >= deadline)
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

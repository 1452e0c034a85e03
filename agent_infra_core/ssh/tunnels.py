"""The tunnels of a deployment, one per replica: opens, verifies and monitors them, and replaces silent ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.host import HostUnreachableError, HttpConnection
from agent_infra_core.node.guard import CHALLENGE_PATH, answer_challenge
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig
from agent_infra_core.ssh.links import Link, Links, TunnelTarget, is_loopback
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.routes import SSH_PATIENCE_S, ForwardingForbiddenError, LoginError

TUNNEL_PROBE_S = 2.5  # interval between probes of a tunnel
TUNNEL_RETRY_S = 0.2  # the same, after one that got no answer
SUSPECT_AFTER_S = 5.0  # silence until a tunnel is suspect
REPLACED_AFTER_S = 15.0  # silence until a tunnel is replaced
TUNNEL_BACKOFF_S = (0.2, 30.0)  # before the first retry, and the maximum; doubles each time
LOGINS_AT_ONCE = 4  # plus as many that failed repeatedly; above ten, sshd starts to refuse some (MaxStartups)
RECONNECT_WAIT_S = 60.0  # how long turns wait for a tunnel that is being replaced, before its replica counts as gone
TUNNELS_CLOSE_S = 10.0  # time for all tunnels together to close


@dataclass(frozen=True)
class TunnelState:
    """A tunnel's state: ``up`` | ``connecting`` | ``suspect`` (silent for a while) | ``down`` (will be retried)."""

    state: str
    reconnects: int
    reason: str | None
    driver: str  # sshtunnel | openssh | direct
    mode: str


def tunnel_mode(
    wanted: str, has_login: bool, record: ReplicaRecord, here: str, closed: Collection[str] = ()
) -> tuple[str, str]:
    """Return how requests reach a replica (login | node | exec | none) and why; ``here`` is this machine's name.

    ``closed`` are modes that turned out to be forbidden, which `auto` avoids.
    """
    if wanted != "auto":
        return wanted, "cluster.tunnel says so"
    is_hidden = is_loopback(record.host)
    if not has_login:
        if is_hidden and record.node != here:
            return "node", "the engine listens only on its node's loopback"
        return "none", "they run on this machine" if record.node == here else "the nodes are reached from here"
    if not is_hidden and "login" not in closed:
        return "login", "the login host reaches the nodes"
    if "node" not in closed:
        reason = "the engine listens only on its node's loopback"
        return "node", reason if is_hidden else "the login host forbids forwarding to the engines' ports"
    return "exec", "the login host forbids forwarding; each connection is a command there"


def verifies_identity(server: HttpConnection, key: str, identity: str, engine_port: int | None = None) -> bool | None:
    """Whether a server proves that it is ``identity`` and knows ``key``, which isn't sent; None if it doesn't answer.

    With ``engine_port``, the server is `serve`, which also confirms that no other user listens on that port there.
    """
    nonce = os.urandom(16).hex()
    suffix = "" if engine_port is None else f"&port={engine_port}"
    status, body = server.request(f"{CHALLENGE_PATH}?nonce={nonce}{suffix}")
    if status == 0:
        return None
    message = f"{nonce}:{identity}" + ("" if engine_port is None else f":{engine_port}")
    return status == 200 and answer_challenge(key, message).encode() in body


class Tunnel:
    """Opens, monitors and replaces the link to one replica, after verifying the server behind it. Owns its thread."""

    def __init__(
        self,
        target: TunnelTarget,
        driver: str,
        open_link: Callable[[TunnelTarget, Callable[[], bool]], Link],
        key: str,
        starts: tuple[threading.Semaphore, threading.Semaphore],
        note_failure: Callable[[TunnelTarget, HostUnreachableError], None],
    ) -> None:
        """``open_link`` takes the target and a function that returns whether to give up.  ``starts`` limits parallel
        logins: the second is for tunnels that failed repeatedly, so that dead nodes only delay each other.
        ``note_failure`` learns why the link couldn't be opened.

        ``driver`` is the expected one, until a link reports its own.
        """
        self.target, self._open, self._key, self._starts = target, open_link, key, starts
        self._note_failure = note_failure
        self._stop, self._wake = threading.Event(), threading.Event()  # _wake: something may have happened
        self._backoff_s = 0.0
        self.state = TunnelState("connecting", 0, None, driver, target.mode)  # replaced, never changed in place
        self.ends: tuple[str, tuple[int, ...]] | None = None  # local host and ports; None while it is closed
        self.lost_at = time.monotonic()  # when ``ends`` became None; monotonic s
        self.shown: tuple[Any, ReplicaRecord] | None = None  # TunnelSet's: its last answer, and what that came from
        self._thread = threading.Thread(target=self._run, name=f"tunnel {target.replica}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make the thread close everything. Returns at once."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _say(self, state: str, reason: str | None = None, reconnects: int = 0) -> None:
        self.state = dataclasses.replace(
            self.state, state=state, reason=reason, reconnects=self.state.reconnects + reconnects
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            reason = None
            try:
                reason = self._live()
            except HostUnreachableError as error:
                reason = str(error)
                self._note_failure(self.target, error)
            except Exception as error:  # noqa: BLE001  whatever it is: a tunnel is tried again, and says why it is not there
                reason = f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                return
            self._say("down", reason, reconnects=1)
            least, most = TUNNEL_BACKOFF_S
            self._backoff_s = min(most, max(least, 2 * self._backoff_s))
            # Jitter: many tunnels that broke at once must not all log in at the same moment.
            self._stop.wait(self._backoff_s * (1 + secrets.randbelow(1000) / 1000))
            self._say("connecting", reason)

    def _live(self) -> str:
        """Open the tunnel and monitor it until it ends. Returns why it ended."""
        with self._starts[self._backoff_s > TUNNEL_BACKOFF_S[0]]:
            link = self._open(self.target, self._stop.is_set)
        is_silent = False
        link.watch(self._wake.set)
        self.state = dataclasses.replace(self.state, driver=link.driver)
        try:
            self._prove(link)
            if not self._stop.is_set():
                self.ends = (link.host, link.ports)
                self._say("up")
            why = self._watch(link)
            is_silent = why is None
            return why or f"silent for {REPLACED_AFTER_S:g} s"
        finally:
            if self.ends is not None:
                self.ends, self.lost_at = None, time.monotonic()
            link.close(is_silent)

    def _prove(self, link: Link) -> None:
        """Wait until the servers at the other end prove that they know the key. Raises HostUnreachableError."""
        deadline = time.monotonic() + SSH_PATIENCE_S
        while not self._stop.is_set():
            answers = list(self._ask(link))
            if all(answers):
                return
            if False in answers:
                raise LoginError(
                    f"another program's server answers on {self.target.node}:{self.target.port}; it gets neither key "
                    "nor request. If nothing else explains it, tell the administrators"
                )
            if complaint := link.complaint():
                raise ForwardingForbiddenError(complaint)
            broken = link.broke()
            if broken or time.monotonic() > deadline:
                raise HostUnreachableError(broken or f"nothing answers on {self.target.node}:{self.target.port}")
            self._stop.wait(0.2)

    def _ask(self, link: Link) -> Iterator[bool | None]:
        """Challenge `serve` and, if it can answer, the engine. For a new link; later probes ask `serve` alone."""
        if len(link.ports) < 2 and not self.target.is_guarded:
            yield False  # no server can prove that it knows the key, so don't use it
        if len(link.ports) > 1:
            vouched = None if self.target.is_guarded else self.target.port
            yield self._challenge(link, 1, vouched)
        if self.target.is_guarded:
            yield self._challenge(link, 0, None)

    def _challenge(self, link: Link, index: int, vouched: int | None) -> bool | None:
        with contextlib.closing(HttpConnection(link.host, link.ports[index])) as server:
            return verifies_identity(server, self._key, self.target.identities[index], vouched)

    def _watch(self, link: Link) -> str | None:
        """Probe until the tunnel breaks. Returns why; None if it was silent for too long."""
        due = started = heard = time.monotonic()
        with contextlib.closing(HttpConnection(link.host, link.ports[-1])) as serve:
            while not self._stop.is_set():
                self._wake.clear()
                if broken := link.broke():
                    return broken
                if (now := time.monotonic()) < due:
                    self._wake.wait(due - now)
                    continue
                # `serve` answers even if its engine is busy, hangs or restarts, so this tests only the tunnel. On one
                # connection: opening a channel costs more than the question.
                answer = verifies_identity(serve, self._key, self.target.identities[-1], self.target.port)
                if answer is False:
                    return "another program's server answers there"
                now = time.monotonic()
                due = now + (TUNNEL_RETRY_S if answer is None else TUNNEL_PROBE_S)
                if answer is not None:
                    heard = now
                    if self.state.state != "up":
                        self._say("up")
                    if now - started > REPLACED_AFTER_S:
                        self._backoff_s = 0.0
                elif now - heard > REPLACED_AFTER_S:
                    return link.broke()
                elif now - heard > SUSPECT_AFTER_S:
                    self._say("suspect", f"silent for {now - heard:.0f} s")
        return "closed"


class TunnelSet:
    """The tunnels of a deployment's replicas; owns them. Thread-safe."""

    def __init__(self, cluster: ClusterConfig, login: LoginHost | None, key: str, guarded: Collection[str]) -> None:
        """``login``: the host that runs commands, None for this machine; ``key``: the replicas' key.

        ``guarded``: names of the engines that can prove that they know the key.
        """
        self._cluster, self._login, self._key, self._guarded = cluster, login, key, guarded
        self._lock = threading.Lock()
        self._starts = threading.Semaphore(LOGINS_AT_ONCE), threading.Semaphore(LOGINS_AT_ONCE)
        self._tunnels: dict[str, Tunnel] = {}
        self._reasons: dict[str, str] = {}  # mode → why it is used
        self.links = Links(login)
        self._closed_modes: set[str] = set()  # that `auto` avoids, because the login host forbids them
        self._proven_modes: set[str] = set()  # in which a tunnel was up: a later failure is that of one node
        self._followed: Sequence[ReplicaRecord] | None = None  # the latest records, and their targets
        self._wanted: Mapping[str, TunnelTarget] = {}
        self._is_closed = False

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        """Return the records with local ports; a replica whose tunnel isn't up is "loading" for up to RECONNECT_WAIT_S.

        Opens and closes tunnels as records appear, change and disappear. Doesn't wait for them.
        """
        if records is not self._followed:  # this is called several times a second
            self._followed = records
            self._wanted = {target.replica: target for record in records if (target := self._target(record))}
        wanted = self._wanted
        driver = self._login.driver if self._login is not None else "sshtunnel"
        self.links.release_ports()
        with self._lock:
            self._proven_modes.update(each.target.mode for each in self._tunnels.values() if each.ends is not None)
            for replica in [name for name, tunnel in self._tunnels.items() if tunnel.target != wanted.get(name)]:
                self._tunnels.pop(replica).stop()
            for replica, target in wanted.items() if not self._is_closed else ():
                if replica not in self._tunnels:
                    kind = "direct" if target.mode == "none" else driver
                    self._tunnels[replica] = Tunnel(
                        target, kind, self.links.open, self._key, self._starts, self._close_mode
                    )
            return [self._through(record) for record in records]

    def states(self) -> dict[str, TunnelState]:
        """Return the state of each replica's tunnel; omits replicas that need none."""
        with self._lock:
            return {replica: tunnel.state for replica, tunnel in self._tunnels.items() if tunnel.target.mode != "none"}

    def awaited(self) -> frozenset[str]:
        """Return models with a suspect tunnel, which may recover soon: their turns wait instead of being refused."""
        with self._lock:
            return frozenset(t.target.model for t in self._tunnels.values() if t.state.state == "suspect")

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the states in the form of /stats."""
        return {replica: dataclasses.asdict(state) for replica, state in self.states().items()}

    def describe(self) -> list[str]:
        """Return lines for the operator: the modes in use and why, and the driver."""
        with self._lock:
            lines = [f"tunnel {mode}: {reason}" for mode, reason in sorted(self._reasons.items())]
        if self._login is not None and self._login.reason and self._reasons.keys() - {"none"}:
            lines.append(f"driver {self._login.driver}: {self._login.reason}")
        return lines

    def close(self) -> None:
        """Close all tunnels; one that is still logging in closes after that, or when this process ends."""
        with self._lock:
            self._is_closed = True
            tunnels, self._tunnels = list(self._tunnels.values()), {}
        for tunnel in tunnels:
            tunnel.stop()
        deadline = time.monotonic() + TUNNELS_CLOSE_S
        for tunnel in tunnels:
            tunnel.join(max(0.0, deadline - time.monotonic()))
        self.links.close()

    def _close_mode(self, target: TunnelTarget, error: HostUnreachableError) -> None:
        """Where forwarding is forbidden, have `auto` use the next mode. Called by the tunnels' threads."""
        if self._cluster.tunnel != "auto" or self._login is None:
            return
        is_last_resort = target.mode == "node" and "login" in self._closed_modes
        has_next = target.mode == "login" or self._login.driver == "sshtunnel"
        with self._lock:
            is_closed = isinstance(error, ForwardingForbiddenError) or is_last_resort
            if has_next and is_closed and target.mode not in self._proven_modes:
                self._closed_modes.add(target.mode)
                self._reasons.pop(target.mode, None)
                self._followed = None

    def _target(self, record: ReplicaRecord) -> TunnelTarget | None:
        """Return the tunnel target of a replica that serves; None if it doesn't."""
        if record.state not in ("ready", "draining") or record.port is None:
            return None
        has_login, here = self._login is not None, os.uname().nodename
        mode, why = tunnel_mode(self._cluster.tunnel, has_login, record, here, self._closed_modes)
        self._reasons[mode] = why
        return TunnelTarget(
            replica=record.replica,
            model=record.model,
            process=record.process,
            restarts=record.restarts,
            node=record.node,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            is_guarded=record.is_gated or record.engine in self._guarded,
            mode=mode,
            address=record.address,
        )

    def _through(self, record: ReplicaRecord) -> ReplicaRecord:
        tunnel = self._tunnels.get(record.replica)
        if tunnel is None:
            return record
        ends, state = tunnel.ends, tunnel.state
        is_ready = ends is None and record.state == "ready"
        is_coming = is_ready and time.monotonic() - tunnel.lost_at < RECONNECT_WAIT_S
        seen = record, ends, state, is_coming
        if tunnel.shown is None or tunnel.shown[0] != seen:
            tunnel.shown = seen, _through(record, ends, state, is_coming)
        return tunnel.shown[1]


def _through(
    record: ReplicaRecord, ends: tuple[str, tuple[int, ...]] | None, state: TunnelState, is_coming: bool
) -> ReplicaRecord:
    """The record as the relay sees it through a tunnel, which stands if it has ``ends``. ``is_coming``: turns wait."""
    message = f"tunnel {state.state}" + (f": {state.reason}" if state.reason else "")
    if ends is not None:
        host, ports = ends
        record = dataclasses.replace(
            record, host=host, port=ports[0], telemetry_port=ports[1] if len(ports) > 1 else None
        )
        # Send it no new turns: a turn lost to one silent replica must not be lost to another.
        if state.state == "suspect" and record.state == "ready":
            record = dataclasses.replace(record, state="draining", message=message)
        return record
    # For a while, turns wait for it as for a replica that loads; after that they get an error.
    return dataclasses.replace(
        record, port=None, telemetry_port=None, message=message, state="loading" if is_coming else record.state
    )

"""The tunnels of a deployment, one per replica: opens, verifies and monitors them, and replaces silent ones."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.host import HostUnreachableError, http_get
from agent_infra_core.node.guard import CHALLENGE_PATH, answer_challenge, server_identity
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, SshConfig
from agent_infra_core.ssh.child import TunnelChild, reserve_local_port
from agent_infra_core.ssh.host_keys import node_keys
from agent_infra_core.ssh.login import SshCommands
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.openssh import OpenSshCommands, OpenSshMaster
from agent_infra_core.ssh.routes import SSH_PATIENCE_S, HostKeyError, Keyring, LoginError, SshRoute, ssh_route

TUNNEL_PROBE_S = 1.0  # interval between probes of a tunnel
SUSPECT_AFTER_S = 5.0  # silence until a tunnel is suspect
REPLACED_AFTER_S = 15.0  # silence until a tunnel is replaced
TUNNEL_BACKOFF_S = (0.2, 30.0)  # before the first retry, and the maximum; doubles each time
LOGINS_AT_ONCE = 4  # plus as many that failed repeatedly; above ten, sshd starts to refuse some (MaxStartups)
RECONNECT_WAIT_S = 60.0  # how long turns wait for a tunnel that is being replaced, before its replica counts as gone
PORT_HELD_S = 10.0  # how long the ports of a closed tunnel stay reserved: the relay may still connect to them
TUNNELS_CLOSE_S = 10.0  # time for all tunnels together to close


@dataclass(frozen=True)
class TunnelTarget:
    """The destination of a tunnel; if any field changes, the tunnel is replaced."""

    replica: str
    model: str
    process: str  # process_stamp() of its `serve`
    restarts: int  # of its engine
    node: str
    host: str  # address that the engine listens on, as the node sees it
    port: int
    telemetry_port: int | None
    is_guarded: bool  # whether the server on ``port`` itself answers the keyed challenge
    mode: str  # login | node | none

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Host and port of the engine and of `serve`, as seen from the last SSH hop."""
        host = "127.0.0.1" if self.mode == "node" else self.node if self.host in _WILDCARDS else self.host
        return [(host, port) for port in (self.port, self.telemetry_port) if port is not None]

    @property
    def identities(self) -> list[str]:
        """The identities with which the servers at ``ends`` answer the keyed challenge."""
        return [server_identity(self.replica, self.node, port) for _, port in self.ends]


@dataclass(frozen=True)
class TunnelState:
    """A tunnel's state: ``up`` | ``connecting`` | ``suspect`` (silent for a while) | ``down`` (will be retried)."""

    state: str
    reconnects: int
    reason: str | None
    driver: str  # sshtunnel | openssh | direct
    mode: str


_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 (a comparison)


def tunnel_mode(wanted: str, has_login: bool, record: ReplicaRecord, here: str) -> tuple[str, str]:
    """Return how requests reach a replica (login | node | none) and why; ``here`` is this machine's name."""
    if wanted != "auto":
        return wanted, "cluster.tunnel says so"
    is_hidden = record.host.startswith("127.") or record.host in ("localhost", "::1")
    if not has_login and record.node == here:
        return "none", "they run on this machine"
    if is_hidden:
        return "node", "the engine listens only on its node's loopback"
    if has_login:
        return "login", "the login host reaches the nodes"
    return "none", "the nodes are reached from here"


def verifies_identity(host: str, port: int, key: str, identity: str, engine_port: int | None = None) -> bool | None:
    """Whether a server proves that it is ``identity`` and knows ``key``, which isn't sent; None if it doesn't answer.

    With ``engine_port``, the server is `serve`, which also confirms that no other user listens on that port there.
    """
    nonce = os.urandom(16).hex()
    suffix = "" if engine_port is None else f"&port={engine_port}"
    status, body = http_get(host, port, f"{CHALLENGE_PATH}?nonce={nonce}{suffix}")
    if status == 0:
        return None
    message = f"{nonce}:{identity}" + ("" if engine_port is None else f":{engine_port}")
    return status == 200 and answer_challenge(key, message).encode() in body


class Link:
    """An open connection to a replica's ports; owned by one Tunnel."""

    driver: str  # sshtunnel | openssh | direct
    host = "127.0.0.1"
    ports: tuple[int, ...] = ()  # of the engine and, if it has one, of `serve`

    def broke(self) -> str | None:
        """Return why the connection is closed; None while it is open."""
        return None

    def complaint(self) -> str | None:
        """Return why nothing answers at the other end; None if unknown."""
        return None

    def close(self, is_silent: bool = False) -> None:
        """Close it, with every connection that goes through it; ``is_silent``: it was closed for being silent."""


class DirectLink(Link):
    """No tunnel: the replica's own address."""

    driver = "direct"

    def __init__(self, target: TunnelTarget) -> None:
        """Resolve the node's name, because the relay doesn't. Raises HostUnreachableError if it is unknown here."""
        host, port = target.ends[0]
        try:
            self.host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise HostUnreachableError(
                f"{host} is not known here ({error.strerror}); set cluster.ssh, or cluster.tunnel"
            ) from error
        self.ports = tuple(port for _, port in target.ends)


class ChildLink(Link):
    """Ports forwarded by the replica's own `tunnel` process (sshtunnel)."""

    driver = "sshtunnel"

    def __init__(self, child: TunnelChild, ports: tuple[int, ...], leave: Callable[[], None]) -> None:
        """``leave`` is called once the ports are closed."""
        self._child, self.ports, self._leave = child, ports, leave

    def broke(self) -> str | None:
        return None if self._child.is_alive else self._child.last_words() or "the tunnel process ended"

    def close(self, is_silent: bool = False) -> None:  # noqa: ARG002 (all of it ends anyway)
        self._child.close()
        self._leave()


class MasterLink(Link):
    """Ports that OpenSSH forwards over its connection to a host, which other replicas may share."""

    driver = "openssh"

    def __init__(self, master: OpenSshMaster, targets: Sequence[tuple[str, int]], is_nodes: bool) -> None:
        """``is_nodes``: the connection goes to the replica's own node, so it is silent whenever the replica is."""
        self._master, self._targets, self._is_nodes = master, targets, is_nodes
        try:
            for target in targets:
                self.ports += (master.forward(target),)
        except BaseException:
            self.close()
            raise

    def broke(self) -> str | None:
        return None if self._master.is_alive else "the SSH connection was lost"

    def complaint(self) -> str | None:
        return self._master.complaint()

    def close(self, is_silent: bool = False) -> None:
        if is_silent and self._is_nodes:
            self._master.close()
        if self._master.is_alive:
            for port, target in zip(self.ports, self._targets, strict=False):
                self._master.cancel(port, target)


class Tunnel:
    """Opens, monitors and replaces the link to one replica, after verifying the server behind it. Owns its thread."""

    def __init__(
        self,
        target: TunnelTarget,
        driver: str,
        open_link: Callable[[TunnelTarget, Callable[[], bool]], Link],
        key: str,
        starts: tuple[threading.Semaphore, threading.Semaphore],
    ) -> None:
        """``open_link`` takes the target and a function that returns whether to give up.  ``starts`` limits parallel
        logins: the second is for tunnels that failed repeatedly, so that dead nodes only delay each other.

        ``driver`` is the expected one, until a link reports its own.
        """
        self.target, self._open, self._key, self._starts = target, open_link, key, starts
        self._stop = threading.Event()
        self._backoff_s = 0.0
        self.state = TunnelState("connecting", 0, None, driver, target.mode)  # replaced, never changed in place
        self.ends: tuple[str, tuple[int, ...]] | None = None  # local host and ports; None while it is closed
        self.lost_at = time.monotonic()  # when ``ends`` became None; monotonic s
        self._thread = threading.Thread(target=self._run, name=f"tunnel {target.replica}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make the thread close everything. Returns at once."""
        self._stop.set()

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
            broken = link.broke() or link.complaint()
            if broken or time.monotonic() > deadline:
                raise HostUnreachableError(broken or f"nothing answers on {self.target.node}:{self.target.port}")
            self._stop.wait(0.2)

    def _ask(self, link: Link) -> Iterator[bool | None]:
        """Challenge `serve` and, if it can answer, the engine. For a new link; later probes ask `serve` alone."""
        if len(link.ports) < 2 and not self.target.is_guarded:
            yield False  # no server can prove that it knows the key, so don't use it
        if len(link.ports) > 1:
            vouched = None if self.target.is_guarded else self.target.port
            yield verifies_identity(link.host, link.ports[1], self._key, self.target.identities[1], vouched)
        if self.target.is_guarded:
            yield verifies_identity(link.host, link.ports[0], self._key, self.target.identities[0])

    def _watch(self, link: Link) -> str | None:
        """Probe until the tunnel breaks. Returns why; None if it was silent for too long."""
        probed = started = heard = time.monotonic()
        while not self._stop.wait(0.2):
            now = time.monotonic()
            if broken := link.broke():
                return broken
            if now - probed < TUNNEL_PROBE_S:
                continue
            probed = now
            # `serve` answers even if its engine is busy, hangs or restarts, so this tests only the tunnel.
            answer = verifies_identity(
                link.host, link.ports[-1], self._key, self.target.identities[-1], self.target.port
            )
            if answer is False:
                return "another program's server answers there"
            if answer is not None:
                heard = time.monotonic()
                if self.state.state != "up":
                    self._say("up")
                if now - started > REPLACED_AFTER_S:
                    self._backoff_s = 0.0
            elif now - heard > REPLACED_AFTER_S:
                return None
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
        self._node_keys: dict[str, tuple[tuple[str, str], ...]] = {}
        self._left: deque[tuple[float, list[socket.socket]]] = deque()  # (release time, reserved ports)
        self._is_closed = False

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        """Return the records with local ports; a replica whose tunnel isn't up is "loading" for up to RECONNECT_WAIT_S.

        Opens and closes tunnels as records appear, change and disappear. Doesn't wait for them.
        """
        wanted = {target.replica: target for record in records if (target := self._target(record))}
        driver = self._login.driver if self._login is not None else "sshtunnel"
        with self._lock:
            while self._left and self._left[0][0] < time.monotonic():
                self._close_oldest()
            for replica in [name for name, tunnel in self._tunnels.items() if tunnel.target != wanted.get(name)]:
                self._tunnels.pop(replica).stop()
            for replica, target in wanted.items() if not self._is_closed else ():
                if replica not in self._tunnels:
                    kind = "direct" if target.mode == "none" else driver
                    self._tunnels[replica] = Tunnel(target, kind, self.open_link, self._key, self._starts)
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
        with self._lock:
            while self._left:
                self._close_oldest()

    def _leave(self, held: list[socket.socket]) -> None:
        """Reserve the ports of a closed tunnel a little longer, until the relay knows that it is closed."""
        with self._lock:
            self._left.append((time.monotonic() + PORT_HELD_S, held))
            if self._is_closed:
                self._close_oldest()

    def _close_oldest(self) -> None:
        for held in self._left.popleft()[1]:
            held.close()

    def _target(self, record: ReplicaRecord) -> TunnelTarget | None:
        """Return the tunnel target of a replica that serves; None if it doesn't."""
        if record.state not in ("ready", "draining") or record.port is None:
            return None
        mode, why = tunnel_mode(self._cluster.tunnel, self._login is not None, record, os.uname().nodename)
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
        )

    def _through(self, record: ReplicaRecord) -> ReplicaRecord:
        tunnel = self._tunnels.get(record.replica)
        if tunnel is None:
            return record
        ends, state = tunnel.ends, tunnel.state
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
        is_coming = record.state == "ready" and time.monotonic() - tunnel.lost_at < RECONNECT_WAIT_S
        return dataclasses.replace(
            record, port=None, telemetry_port=None, message=message, state="loading" if is_coming else record.state
        )

    def open_link(self, target: TunnelTarget, should_stop: Callable[[], bool]) -> Link:
        """Open a link to a replica. Raises HostUnreachableError. Runs in the tunnels' threads."""
        if target.mode == "none":
            return DirectLink(target)
        deadline = time.monotonic() + 2 * SSH_PATIENCE_S
        commands = self._login.commands() if self._login is not None else None
        if isinstance(commands, OpenSshCommands):
            commands.login.ensure(deadline, should_stop)
            master = commands.login
            if target.mode == "node":
                master = commands.node(target.node)
                try:
                    master.ensure(deadline, should_stop)
                except HostKeyError:  # perhaps the node was reinstalled: fetch its new keys for the next attempt
                    with contextlib.suppress(HostUnreachableError, OSError):
                        commands.fetch_host_keys(target.node)
                    raise
            return MasterLink(master, target.ends, is_nodes=target.mode == "node")
        hops, keyring = self._hops(target, commands)
        with contextlib.ExitStack() as undone:
            held = [undone.enter_context(reserve_local_port()) for _ in target.ends]
            spec = {
                "driver": "sshtunnel",
                "hops": [dataclasses.asdict(hop) for hop in hops],
                "keyring": dataclasses.asdict(keyring),
                "local": [each.getsockname()[1] for each in held],
                "remote": target.ends,
            }
            child = TunnelChild(spec)
            undone.callback(child.close)
            try:
                link = ChildLink(child, child.wait_ready(deadline, should_stop), functools.partial(self._leave, held))
            except HostKeyError:  # perhaps the node was reinstalled: the next attempt fetches its keys
                with self._lock:
                    self._node_keys.pop(target.node, None)
                raise
            undone.pop_all()
            return link

    def _hops(self, target: TunnelTarget, login: SshCommands | None) -> tuple[list[SshRoute], Keyring]:
        """Return the SSH hops of a tunnel with paramiko, with their expected host keys."""
        if login is None:
            if target.mode == "login":
                raise LoginError("cluster.tunnel: login needs cluster.ssh, the host to go through")
            return [ssh_route(SshConfig(host=target.node), target.node)], Keyring()
        if self._login is None or target.mode == "login":
            return [login.route], login.keyring
        route = ssh_route(self._login.ssh, target.node)
        with self._lock:
            keys = self._node_keys.get(target.node)
        if keys is None:
            keys = node_keys(route, login)
            with self._lock:
                self._node_keys[target.node] = keys
        return [login.route, dataclasses.replace(route, host_keys=keys)], login.keyring

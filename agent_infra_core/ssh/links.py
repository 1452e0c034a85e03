"""Links to replicas: direct, forwarded by a `tunnel` process that all replicas behind a host share, or by OpenSSH."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agent_infra_core.host import HostUnreachableError
from agent_infra_core.node.guard import server_identity
from agent_infra_core.settings import SshConfig
from agent_infra_core.ssh.child import TunnelChild, reserve_local_port
from agent_infra_core.ssh.host_keys import node_keys
from agent_infra_core.ssh.login import SshCommands
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.openssh import OpenSshCommands, OpenSshMaster
from agent_infra_core.ssh.routes import (
    SSH_PATIENCE_S,
    HostKeyError,
    Keyring,
    LoginError,
    SshRoute,
    node_route,
    ssh_route,
)

PORT_HELD_S = 10.0  # how long the ports of a closed tunnel stay reserved: the relay may still connect to them
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 (a comparison)


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
    mode: str  # login | node | exec | none
    address: str | None = None  # the node's, as Slurm knows it; None: its name

    @property
    def is_hidden(self) -> bool:
        """Whether the engine listens only on its node's loopback."""
        return is_loopback(self.host)

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Host and port of the engine and of `serve`, as seen from the last SSH hop."""
        host = "127.0.0.1" if self.mode == "node" else self.node if self.host in _WILDCARDS else self.host
        return [(host, port) for port in (self.port, self.telemetry_port) if port is not None]

    @property
    def identities(self) -> list[str]:
        """The identities with which the servers at ``ends`` answer the keyed challenge."""
        return [server_identity(self.replica, self.node, port) for _, port in self.ends]


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")


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

    def watch(self, wake: Callable[[], None]) -> None:
        """Have ``wake``, which must not block, called when broke() may have changed, until close()."""

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
    """Ports forwarded by the `tunnel` process of a host (sshtunnel), which other replicas share."""

    driver = "sshtunnel"

    def __init__(self, child: TunnelChild, number: int, ports: tuple[int, ...], leave: Callable[[], None]) -> None:
        """``number`` is the child's of this forward; ``leave`` is called once the ports are being closed."""
        self._child, self._number, self.ports, self._leave = child, number, ports, leave
        self._wake: Callable[[], None] | None = None

    def broke(self) -> str | None:
        return self._child.problem(self._number)

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._child.watch(wake)

    def close(self, is_silent: bool = False) -> None:
        if self._wake is not None:
            self._child.unwatch(self._wake)
        self._child.cancel(self._number, is_silent)
        self._leave()


class MasterLink(Link):
    """Ports that OpenSSH forwards over its connection to a host, which other replicas may share."""

    driver = "openssh"

    def __init__(self, master: OpenSshMaster, targets: Sequence[tuple[str, int]], is_nodes: bool) -> None:
        """``is_nodes``: the connection goes to the replica's own node, so it is silent whenever the replica is."""
        self._master, self._targets, self._is_nodes = master, targets, is_nodes
        self._wake: Callable[[], None] | None = None
        try:
            for target in targets:
                self.ports += (master.forward(target),)
        except BaseException:
            self.close()
            raise

    def broke(self) -> str | None:
        return None if self._master.is_usable else "the SSH connection was lost"

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._master.watch(wake)

    def complaint(self) -> str | None:
        return self._master.complaint()

    def close(self, is_silent: bool = False) -> None:
        if self._wake is not None:
            self._master.unwatch(self._wake)
        if is_silent and self._is_nodes:
            self._master.close()
        if self._master.is_usable:
            for port, target in zip(self.ports, self._targets, strict=False):
                self._master.cancel(port, target)


@dataclass
class _SharedProcess:
    """The `tunnel` process of one host; ``lock`` is held by whoever logs in or leaves."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    child: TunnelChild | None = None
    users: int = 0  # of ``child``


class Links:
    """Opens links to replicas. Owns the `tunnel` processes, and the ports of links that were closed. Thread-safe."""

    def __init__(self, login: LoginHost | None) -> None:
        """``login``: the host that runs commands, None for this machine."""
        self._login = login
        self._lock = threading.Lock()  # guards what follows
        self._processes: dict[str, _SharedProcess] = {}  # alias of the first host that is logged in to
        self._node_keys: dict[str, tuple[tuple[str, str], ...]] = {}
        self._left: deque[tuple[float, list[socket.socket]]] = deque()  # (release time, reserved ports)
        self._is_closed = False

    def open(self, target: TunnelTarget, should_stop: Callable[[], bool]) -> Link:
        """Open a link to a replica. Raises HostUnreachableError. May take a while; call it in a thread."""
        if target.mode == "none":
            return DirectLink(target)
        deadline = time.monotonic() + 2 * SSH_PATIENCE_S
        commands = self._login.commands() if self._login is not None else None
        if isinstance(commands, OpenSshCommands):
            return self._open_openssh(target, commands, deadline, should_stop)
        return self._open_forward(target, commands, deadline, should_stop)

    def _open_openssh(
        self, target: TunnelTarget, commands: OpenSshCommands, deadline: float, should_stop: Callable[[], bool]
    ) -> Link:
        if target.mode == "exec":
            raise LoginError("cluster.tunnel: exec needs tunnel_driver: sshtunnel")
        commands.login.ensure(deadline, should_stop)
        master = commands.login
        if target.mode == "node":
            master = commands.node(target.node, target.address)
            try:
                master.ensure(deadline, should_stop)
            except HostKeyError:  # perhaps the node was reinstalled: fetch its new keys for the next attempt
                with contextlib.suppress(HostUnreachableError, OSError):
                    commands.fetch_host_keys(target.node, target.address)
                raise
        return MasterLink(master, target.ends, is_nodes=target.mode == "node")

    def _open_forward(
        self, target: TunnelTarget, login: SshCommands | None, deadline: float, should_stop: Callable[[], bool]
    ) -> Link:
        """Open a link with paramiko, in the process of its login host."""
        hop, via, keyring = self._hops(target, login)
        shared, child = self._acquire(hop, keyring, deadline, should_stop)
        with contextlib.ExitStack() as undone:
            undone.callback(self._release_process, shared, child)
            held = [undone.enter_context(reserve_local_port()) for _ in target.ends]
            ports = tuple(each.getsockname()[1] for each in held)
            asked = {
                "via": dataclasses.asdict(via) if via else None,
                "is_exec": target.mode == "exec",
                "node": target.node if target.is_hidden else None,
                "local": ports,
                "remote": target.ends,
            }
            try:
                number = child.forward(asked, deadline, should_stop)
            except HostKeyError:  # perhaps the node was reinstalled: the next attempt fetches its keys
                with self._lock:
                    self._node_keys.pop(target.node, None)
                raise
            undone.pop_all()
        return ChildLink(child, number, ports, functools.partial(self._leave, shared, child, held))

    def _hops(self, target: TunnelTarget, login: SshCommands | None) -> tuple[SshRoute, SshRoute | None, Keyring]:
        """Return the first host to log in to, the node to log in to from there, and the keys of the first login."""
        if login is None:
            if target.mode != "node":
                raise LoginError(f"cluster.tunnel: {target.mode} needs cluster.ssh, the host to go through")
            route = ssh_route(SshConfig(host=target.node), target.node)
            return node_route(route, target.node, target.address), None, Keyring()
        if self._login is None or target.mode != "node":
            return login.route, None, login.keyring
        route = node_route(ssh_route(self._login.ssh, target.node), target.node, target.address)
        with self._lock:
            keys = self._node_keys.get(target.node)
        if keys is None:
            keys = node_keys(route, login)
            with self._lock:
                self._node_keys[target.node] = keys
        return login.route, dataclasses.replace(route, host_keys=keys), login.keyring

    def _acquire(
        self, hop: SshRoute, keyring: Keyring, deadline: float, should_stop: Callable[[], bool]
    ) -> tuple[_SharedProcess, TunnelChild]:
        """Return the process that is logged in to a host; starts it if there is none. Raises HostUnreachableError."""
        with self._lock:
            shared = self._processes.setdefault(hop.alias, _SharedProcess())
        with _held(shared.lock, deadline, should_stop):
            if shared.child is None or not shared.child.is_alive:
                child = TunnelChild(
                    {"driver": "sshtunnel", "hop": dataclasses.asdict(hop), "keyring": dataclasses.asdict(keyring)}
                )
                try:
                    child.wait_ready(deadline, should_stop)
                except BaseException:
                    child.close()
                    raise
                shared.child, shared.users = child, 0
            shared.users += 1
            return shared, shared.child

    @staticmethod
    def _release_process(shared: _SharedProcess, child: TunnelChild) -> None:
        """Note that a forward of ``child`` is closed; the last one ends it."""
        with shared.lock:
            if shared.child is child:
                shared.users -= 1
                if shared.users == 0:
                    shared.child = None
                    child.close()
            elif not child.is_alive:
                child.close()  # it was replaced; close() may be called again

    def _leave(self, shared: _SharedProcess, child: TunnelChild, held: list[socket.socket]) -> None:
        """Reserve the ports of a closed link a little longer, until the relay knows that it is closed."""
        self._release_process(shared, child)
        with self._lock:
            self._left.append((time.monotonic() + PORT_HELD_S, held))
            if self._is_closed:
                self._release(everything=True)

    def release_ports(self) -> None:
        """Release the ports of links that were closed a while ago."""
        with self._lock:
            self._release(everything=False)

    def _release(self, everything: bool) -> None:
        while self._left and (everything or self._left[0][0] < time.monotonic()):
            for held in self._left.popleft()[1]:
                held.close()

    def close(self) -> None:
        """Release the ports of all links that are closed, now and later."""
        with self._lock:
            self._is_closed = True
            self._release(everything=True)


@contextlib.contextmanager
def _held(lock: threading.Lock, deadline: float, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock that somebody else may hold while logging in. Raises HostUnreachableError at the deadline."""
    while not lock.acquire(timeout=0.1):
        if should_stop() or time.monotonic() > deadline:
            raise HostUnreachableError("another tunnel still logs in to the same host")
    try:
        yield
    finally:
        lock.release()

"""The forwarded ports of one host, in a `tunnel` process with paramiko: logs in once, opens and closes on request."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import queue
import select
import selectors
import shlex
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from agent_infra_core.host import HostUnreachableError
from agent_infra_core.protocol import rebuild
from agent_infra_core.ssh.child import forwarding_forbidden, report_to_parent
from agent_infra_core.ssh.login import close_connection, log_in
from agent_infra_core.ssh.routes import (
    SSH_KEEPALIVE_S,
    SSH_PATIENCE_S,
    ForwardingForbiddenError,
    Keyring,
    SshRoute,
    load_paramiko,
)

LOST_AFTER_S = 15.0 + SSH_KEEPALIVE_S  # without an answer; the last one may be one interval old
SILENT_AFTER_S = 2.0 * SSH_KEEPALIVE_S  # the same, if something behind the connection is silent, too
MOST_LOGINS = 16  # for connections by commands; sshd allows 10 sessions each by default
CHECK_S = 0.2  # interval between looks at the connections
COPY_BYTES = 1 << 16


class Traffic:
    """The connections through one forwarded port, so that they can be cut. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, Any]] = set()
        self._is_cut = False

    def relay(self, sock: socket.socket, channel: Any) -> None:
        """Copy both ways until either end closes. sshtunnel's own loop uses select(), which ends at 1,024 files."""
        with self._lock:
            if self._is_cut:
                return
            self._pairs.add((sock, channel))
        try:
            sock.setblocking(True)
            local, remote = sock.fileno(), channel.fileno()
            ready = select.poll()
            ready.register(local, select.POLLIN)
            ready.register(remote, select.POLLIN)
            while channel.active:
                readable = {number for number, _ in ready.poll(60_000)}
                if local in readable:
                    if not (data := sock.recv(COPY_BYTES)):
                        return
                    channel.sendall(data)
                if remote in readable:
                    has_errors = channel.recv_stderr_ready()  # what a login shell prints there isn't the server's
                    if has_errors:
                        channel.recv_stderr(COPY_BYTES)
                    if channel.recv_ready():
                        sock.sendall(channel.recv(COPY_BYTES))
                    elif not has_errors:
                        return  # the descriptor is readable for the end alone
        finally:
            with self._lock:
                self._pairs.discard((sock, channel))

    def cut(self) -> None:
        """End every connection; their threads close both sides."""
        with self._lock:
            self._is_cut, pairs = True, list(self._pairs)
        for sock, channel in pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(Exception):  # paramiko's, of a connection that is broken
                channel.close()


class ForwardServer(Protocol):
    """A listening port: socketserver's, with the connections through it."""

    traffic: Traffic

    def fileno(self) -> int: ...
    def handle_request(self) -> None: ...
    def server_close(self) -> None: ...


# Takes a paramiko.Transport (or ExecChannels), the reserved local port and the remote end.
Listen = Callable[[Any, int, tuple[str, int]], ForwardServer]


class Connection:
    """An authenticated SSH connection; a thread of its own asks the host for signs of life."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.users = 0  # forwards that use it or are being opened; guarded by Forwards
        self._heard_at = time.monotonic()
        threading.Thread(target=self._keep_alive, name="keepalive", daemon=True).start()

    def _keep_alive(self) -> None:
        while self.transport.is_active():
            time.sleep(SSH_KEEPALIVE_S)
            self.transport.global_request("keepalive@openssh.com", wait=True)  # returns when it is answered, or closed
            self._heard_at = time.monotonic()

    def problem(self, patience_s: float = LOST_AFTER_S) -> str | None:
        """Return why it can't be used any more; None while it can."""
        if not self.transport.is_active():
            return "the SSH connection was lost"
        silent_s = time.monotonic() - self._heard_at
        return f"the SSH connection was silent for {silent_s:.0f} s" if silent_s > patience_s else None


# Run on the login host for each connection, where it forbids forwarding. Each is one line that every login shell can
# read; the mark comes after what that shell prints. $0 is the host, $1 the port, $2 the program below or the node.
_CONNECT = (
    "sh -c 'printf %s @MARK@; exec 2> /dev/null; "
    'for word in nc ncat; do command -v $word > /dev/null && exec $word "$0" "$1"; done; '
    'exec python3 -c "import base64, sys; exec(base64.b64decode(sys.argv.pop(1)))" "$2" "$0" "$1"\''
)
_CONNECT_ON_NODE = """sh -c 'printf %s @MARK@; exec ssh -o BatchMode=yes -W "$0:$1" "$2" 2> /dev/null'"""
# For the host's Python, 3.6 or later.
_COPY_BOTH_WAYS = b"""\
import os, socket, sys, threading
server = socket.create_connection(sys.argv[1:])
def send():
    for data in iter(lambda: os.read(0, 65536), b""):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
for data in iter(lambda: server.recv(65536), b""):
    os.write(1, data)
"""


class Sessions:
    """Sessions of a host that allows few per connection (MaxSessions): logs in again when they are used up.

    Thread-safe; owns the connections.
    """

    def __init__(self, log_in: Callable[[], Any]) -> None:
        self._log_in = log_in
        self._login_lock = threading.Lock()  # one login at a time; held before _lock
        self._lock = threading.Lock()  # guards _transports; never held while the host is asked
        self._transports: list[Any] = []

    def open(self) -> Any:
        """Return a new session's channel. Raises HostUnreachableError."""
        tried = self._active()
        if (channel := _new_session(tried)) is not None:
            return channel
        with self._login_lock:
            # Another thread may have logged in meanwhile.
            if (channel := _new_session([each for each in self._active() if each not in tried])) is not None:
                return channel
            if len(self._active()) >= MOST_LOGINS:
                raise HostUnreachableError(f"no session is left on {MOST_LOGINS} connections (MaxSessions)")
            transport = self._log_in()
            with self._lock:
                self._transports.append(transport)
        try:
            return transport.open_session(timeout=SSH_PATIENCE_S)
        except (load_paramiko().SSHException, EOFError, OSError) as error:
            raise HostUnreachableError(f"the host opens no session after the login: {error}") from error

    def _active(self) -> list[Any]:
        """Forget the connections that are lost, and return the others."""
        with self._lock:
            self._transports = [each for each in self._transports if each.is_active()]
            return list(self._transports)


def _new_session(transports: Sequence[Any]) -> Any | None:
    """Open a channel on the latest connection that has a session left; None if none has."""
    for transport in reversed(transports):
        with contextlib.suppress(load_paramiko().SSHException, EOFError, OSError):
            return transport.open_session(timeout=SSH_PATIENCE_S)
    return None


class ExecChannels:
    """Opens channels as a paramiko.Transport does, but by a command on the host that connects its input and output."""

    def __init__(self, sessions: Sessions, node: str | None) -> None:
        """``node``: the node on whose loopback the ports are; None if the host reaches them itself."""
        self._sessions, self._node = sessions, node

    def open_channel(self, kind: str, dest_addr: tuple[str, int], src_addr: Any, timeout: float) -> Any:  # noqa: ARG002
        """Connect to a port. Raises HostUnreachableError; a port that refuses closes the channel."""
        mark = os.urandom(8).hex().encode()
        script, last = _CONNECT, base64.b64encode(_COPY_BOTH_WAYS).decode()
        if self._node is not None:
            script, last = _CONNECT_ON_NODE, self._node
        words = [dest_addr[0], str(dest_addr[1]), last]
        channel, seen = self._sessions.open(), b""
        try:
            channel.settimeout(timeout)
            channel.exec_command(" ".join([script.replace("MARK", mark.decode()), *map(shlex.quote, words)]))
            while not seen.endswith(b"@%b@" % mark):
                if not (byte := channel.recv(1)):
                    raise HostUnreachableError(f"its shell ran no command: {seen.decode('utf-8', 'replace').strip()}")
                seen += byte
            channel.settimeout(None)
        except (load_paramiko().SSHException, EOFError, OSError) as error:
            channel.close()
            raise HostUnreachableError(f"{dest_addr[0]}:{dest_addr[1]} is out of reach: {error}") from error
        except HostUnreachableError:
            channel.close()
            raise
        return channel


class Forwards:
    """The forwards of a `tunnel` process. Owns its SSH connections, listening ports and threads."""

    def __init__(self, spec: Mapping[str, Any], listen: Listen) -> None:
        self._hop, self._listen = rebuild(SshRoute, spec["hop"]), listen
        self._keyring = Keyring(**spec["keyring"])
        self._login: Connection | None = None  # lasts as long as the process
        self._sessions = Sessions(lambda: log_in(self._hop, self._keyring, None))
        self._requests: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._lock = threading.Lock()  # guards what follows
        self._open: dict[int, tuple[Connection, list[ForwardServer]]] = {}
        self._opening: set[int] = set()  # being opened, and not closed by the parent meanwhile
        self._nodes: dict[str, Connection] = {}
        self._logins: dict[str, threading.Lock] = {}  # node → held while somebody logs in there
        self._selector = selectors.DefaultSelector()  # the kernel's: ports come and go while a thread waits for them

    def read_requests(self, pipe: Any) -> None:
        """Queue what the parent asks for; exits at once when the parent ends, whatever other threads are doing."""
        try:
            for line in pipe:
                self._requests.put(json.loads(line))
        finally:
            os._exit(0)

    def run(self) -> str:
        """Log in, then do what the parent asks for. Returns why the connection ended. Raises HostUnreachableError."""
        self._login = login = Connection(log_in(self._hop, self._keyring, None))
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        report_to_parent({})
        while (problem := login.problem()) is None:
            with contextlib.suppress(queue.Empty):
                request = self._requests.get(timeout=CHECK_S)
                work: Callable[[Mapping[str, Any]], None] = self._close_forward
                if "open" in request:
                    work = functools.partial(self._open_forward, login)
                    with self._lock:
                        self._opening.add(request["open"])
                # In a thread of its own: a host that is silent must not hold up the forwards of others.
                threading.Thread(target=work, args=(request,), daemon=True).start()
            self._drop_lost()
        return problem

    def _accept(self) -> None:
        """Accept connections on all ports; their threads do the rest."""
        while True:
            for key, _ in self._selector.select():
                server: Any = key.fileobj
                with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
                    server.handle_request()

    def _open_forward(self, login: Connection, request: Mapping[str, Any]) -> None:
        """Open one forward, and report it."""
        number = request["open"]
        connection, servers, report = login, list[ForwardServer](), {"forward": number}
        try:
            if request["via"] is not None:
                connection = self._log_in_to_node(login, rebuild(SshRoute, request["via"]))
            remote = [(host, port) for host, port in request["remote"]]
            way: Any = connection.transport
            if request["is_exec"]:
                way = ExecChannels(self._sessions, request["node"])
                way.open_channel("exec", remote[0], None, SSH_PATIENCE_S).close()  # checks that commands run
            else:
                open_through(way, *remote[0]).close()  # checks that forwarding is allowed
            for local, end in zip(request["local"], remote, strict=True):
                servers.append(self._listen(way, local, end))
        except HostUnreachableError as error:
            report |= {"error": str(error), "kind": getattr(error, "kind", "host")}
        except Exception as error:  # noqa: BLE001  whatever it is, the parent is told rather than left to guess
            report |= {"error": f"{type(error).__name__}: {error}", "kind": "host"}
        with self._lock:
            is_wanted = "error" not in report and number in self._opening
            self._opening.discard(number)
            if is_wanted:
                self._open[number] = connection, servers
                for server in servers:
                    self._selector.register(server, selectors.EVENT_READ)
        if not is_wanted:
            self._end(connection, servers)
        report_to_parent(report)

    def _log_in_to_node(self, login: Connection, route: SshRoute) -> Connection:
        """Return a node's connection, which goes through the login host; all forwards to that node share it."""
        with self._lock:
            logging_in = self._logins.setdefault(route.alias, threading.Lock())
        with logging_in:
            with self._lock:
                known = self._nodes.get(route.alias)
                if known is not None and known.problem() is None:
                    known.users += 1
                    return known
            through = open_through(login.transport, route.host, route.port)
            node = Connection(log_in(route, self._keyring, None, through))
            with self._lock:
                node.users += 1
                self._nodes[route.alias] = node
            return node

    def _close_forward(self, request: Mapping[str, Any]) -> None:
        """Close one forward. One that was silent ends its connection, if nothing else is heard from there."""
        number = request["close"]
        with self._lock:
            self._opening.discard(number)
            found = self._open.pop(number, None)
        if found is not None:
            if request["is_silent"] and found[0].problem(SILENT_AFTER_S) is not None:
                close_connection(found[0].transport)
            self._end(*found)

    def _end(self, connection: Connection, servers: list[ForwardServer]) -> None:
        """Close the ports and connections of a forward, and its node's connection if no other forward uses it."""
        for server in servers:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(server)
            server.server_close()
            server.traffic.cut()
        if connection is self._login:
            return
        with self._lock:
            connection.users -= 1
            is_unused = connection.users == 0
            if is_unused:
                self._nodes = {alias: each for alias, each in self._nodes.items() if each is not connection}
        if is_unused:
            close_connection(connection.transport)

    def _drop_lost(self) -> None:
        """Close the forwards whose connection is lost, and tell the parent."""
        with self._lock:
            problems = {number: connection.problem() for number, (connection, _) in self._open.items()}
            lost = {number: (problem, self._open.pop(number)) for number, problem in problems.items() if problem}
        for number, (problem, found) in lost.items():
            threading.Thread(target=self._end, args=found, daemon=True).start()
            report_to_parent({"forward": number, "error": problem, "kind": "host"})


def open_through(transport: Any, host: str, port: int) -> Any:
    """Open a channel to a port behind a connection. Raises ForwardingForbiddenError or HostUnreachableError."""
    paramiko = load_paramiko()
    try:
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=SSH_PATIENCE_S)
    except paramiko.ChannelException as error:
        if error.code == 1:
            raise ForwardingForbiddenError(forwarding_forbidden(f"{host}:{port}")) from error
        raise HostUnreachableError(f"{host}:{port} cannot be reached through SSH: {error.text}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostUnreachableError(f"{host}:{port} cannot be reached through SSH: {error}") from error

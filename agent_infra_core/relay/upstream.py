"""Pooled connections to the replicas."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.relay.owners import prove_own_server
from agent_infra_core.relay.reactor import ClientGone

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection
    from agent_infra_core.relay.replicas import LiveReplica

JOINED_BODY_BYTES = 16 << 10  # copying a shorter body costs less than sending two buffers


class TransportError(AgentInfraError):
    """A replica could not be reached; nothing was sent to it."""


class Upstream:
    """A connection to a replica, watched for as long as it lives. While idle, it closes when the replica closes it."""

    __slots__ = ("_is_answered_early", "replica", "sock", "watcher")

    def __init__(self, replica: LiveReplica, sock: Any, client: ClientConnection) -> None:
        self.replica, self.sock = replica, sock
        self._is_answered_early = False
        self.watcher = client.relay.reactor.watch_reads(sock, client.wake)

    @classmethod
    def connect(cls, replica: LiveReplica, client: ClientConnection) -> Upstream:
        """Connect on behalf of ``client``, whose greenlet waits. Raises TransportError, ClientGone, RequestError."""
        host, port = replica.backend.host, replica.backend.port
        sock = client.connect(host, port)
        try:
            if replica.needs_proof:
                _prove(sock, host, port, client)
        except BaseException:
            sock.close()
            raise
        return cls(replica, sock, client)

    def send(self, head: bytes, body: bytes | bytearray | memoryview, client: ClientConnection) -> bool:
        """Send a request and have the replica's bytes wake ``client``. Returns False if not all of it was sent: the
        replica answered early or hung up, which the next receive shows; or the client is gone or out of time."""
        self.watcher.callback = client.wake
        try:
            if len(body) < JOINED_BODY_BYTES:
                sent = int(self.sock.send(head + body))
            else:
                sent = int(self.sock.sendmsg((head, body)))
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent == len(head) + len(body):
            return True
        return self._send_rest(memoryview(head + body)[sent:], client)

    def _send_rest(self, rest: memoryview, client: ClientConnection) -> bool:
        self._is_answered_early = False
        self.watcher.callback = lambda: self._on_early_answer(client)
        try:
            while rest and not self._is_answered_early and not client.must_stop:
                client.wait_writable(self.sock)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.sock.send(rest) :]
                    client.extend_deadline(client.relay.settings.proxy.request_timeout)
        except OSError:
            return False
        finally:
            self.watcher.start(client.wake)
        return not rest

    def _on_early_answer(self, client: ClientConnection) -> None:
        self._is_answered_early = True
        self.watcher.stop()
        client.wake()

    def rest(self) -> None:
        """Become one of the replica's idle connections."""
        if self.replica.is_gone:
            return self.close()
        self.watcher.callback = self._on_idle
        self.replica.idle[self] = None
        return None

    def _on_idle(self) -> None:
        self.replica.forget(self)  # closed by the replica, or it sends what nobody asked for

    def close(self) -> None:
        self.watcher.stop()
        self.watcher.close()
        self.sock.close()


def _prove(sock: Any, host: str, port: int, client: ClientConnection) -> None:
    """Raise TransportError unless a server of this user's accepts the connection; ClientGone."""
    client.extend_deadline(client.relay.settings.proxy.connect_timeout)
    try:
        sleep = client.relay.reactor.sleep
        prove_own_server(sock, host, port, sleep, lambda: client.gone or client.must_stop)
    except OSError as error:
        if client.gone:
            raise ClientGone from None
        raise TransportError(error.strerror or str(error)) from None


def new_stream_socket(make: Any, host: str) -> Any:
    """Return a socket from ``make`` for an address of ``host``'s family, without delayed sends. Raises OSError."""
    sock = make(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock

"""The `tunnel` role: forwarding by sshtunnel."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent_infra_core.host import HostUnreachableError
from agent_infra_core.ssh.child import _bind_held, _end_with_parent, _hold_openssh, _tell, forwarding_forbidden
from agent_infra_core.ssh.login import log_in
from agent_infra_core.ssh.routes import (
    SSH_PATIENCE_S,
    HostKeyError,
    InteractiveLoginError,
    Keyring,
    LoginError,
    _paramiko,
    route_from_json,
)

FORWARD_BACKLOG = 1024  # connections that wait in a tunnel's port: all agents may come at once


def run_tunnel() -> int:
    """The `tunnel` role: hold what the first line of stdin says until stdin ends; the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal's are for the parent, which ends this in its own time
        signal.signal(number, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    if not line:
        return 0
    spec = json.loads(line)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    try:
        hold = _hold_openssh if spec["driver"] == "openssh" else _hold_sshtunnel
        document = {"error": hold(spec)}
    except HostUnreachableError as error:
        kinds = {InteractiveLoginError: "interactive", HostKeyError: "host_key", LoginError: "login"}
        kind = next((word for known, word in kinds.items() if isinstance(error, known)), "host")
        document = {"error": str(error), "kind": kind}
    except Exception as error:  # noqa: BLE001  whatever it is, the parent is told rather than left to guess
        document = {"error": f"{type(error).__name__}: {error}", "kind": "host"}
    with contextlib.suppress(OSError):
        _tell(document)
    # At once: threads of a library that hangs must not keep this process.
    os._exit(1)


def _hold_sshtunnel(spec: Mapping[str, Any]) -> str:
    """Log in hop by hop, forward, and watch the connection; why it ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a stream takes three descriptors
    keyring = Keyring(**spec["keyring"])
    transport = None
    for hop in spec["hops"]:
        route = route_from_json(hop)
        through = _open_through(transport, route.host, route.port) if transport is not None else None
        transport = log_in(route, keyring, None, through)
    remote = [(host, port) for host, port in spec["remote"]]
    _open_through(transport, *remote[0]).close()  # that it may be forwarded to; sshtunnel does not ask
    forwarder = _forward(transport, spec["local"], remote)
    _tell({"ports": forwarder.local_bind_ports})
    while transport is not None and transport.is_active():
        time.sleep(0.2)
    return "the SSH connection was lost"


def _open_through(transport: Any, host: str, port: int) -> Any:
    """A channel of an authenticated connection to a port that its host reaches; LoginError, HostUnreachableError."""
    paramiko = _paramiko()
    try:
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=SSH_PATIENCE_S)
    except paramiko.ChannelException as error:
        if error.code == 1:
            raise LoginError(forwarding_forbidden(f"{host}:{port}")) from error
        raise HostUnreachableError(f"{host}:{port} cannot be reached through SSH: {error.text}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostUnreachableError(f"no way through SSH to {host}:{port}: {error}") from error


def _forward(transport: Any, local: Sequence[int], remote: Sequence[tuple[str, int]]) -> Any:
    """An sshtunnel forwarder over an authenticated connection, from ``local`` ports, which are held, to ``remote``.

    sshtunnel never looks at known_hosts, so the connection is made and checked here and put into it. Its own listens
    on all addresses by default, queues 5 connections, and lets small answers wait 40 ms.
    """
    import logging

    paramiko = _paramiko()
    import sshtunnel

    logger = logging.getLogger("agent_infra.tunnel")
    logger.addHandler(logging.NullHandler())
    sshtunnel._ThreadingForwardServer.request_queue_size = FORWARD_BACKLOG
    sshtunnel._ThreadingForwardServer.server_bind = _bind_held
    forwarder = sshtunnel.SSHTunnelForwarder(
        ("127.0.0.1", 22),  # neither it nor the password is used: the connection is there
        ssh_config_file=None,
        ssh_username="-",
        ssh_password="-",  # noqa: S106 (see above)
        allow_agent=False,
        host_pkey_directories=[],
        local_bind_addresses=[("127.0.0.1", port) for port in local],
        remote_bind_addresses=list(remote),
        logger=logger,
    )
    forwarder.daemon_forward_servers = forwarder.daemon_transport = True
    forwarder._transport = transport
    try:
        forwarder.start()
    except (sshtunnel.BaseSSHTunnelForwarderError, paramiko.SSHException, OSError) as error:
        raise HostUnreachableError(f"no tunnel can be opened: {error}") from error
    for server in forwarder._server_list:  # what it accepts inherits this
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return forwarder

"""Which user owns the other end of a connection on this machine, by the kernel's word."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from agent_infra_core.host import IS_LINUX

NO_DESCRIPTOR = errno.EMFILE, errno.ENFILE
PROOF_POLL_S = 0.01
CONNECTED_STATES = (1, 4, 5)  # of Linux: established, or closed for sending by the client (FIN_WAIT1, FIN_WAIT2)


def socket_owner(sock: Any, peer: tuple[Any, ...]) -> int | None:
    """The user id that owns the other end of a loopback connection, by the kernel's word (sock_diag).

    None when the other end is elsewhere, or the kernel doesn't answer. OSError without a free descriptor.
    """
    host = peer[0].removeprefix("::ffff:")
    if not (host.startswith("127.") or host == "::1"):
        return None
    local = sock.getsockname()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    source, target = (socket.inet_pton(family, end[0].removeprefix("::ffff:")) for end in (peer, local))
    try:
        return _ask_sock_diag(family, (source, peer[1]), (target, local[1]))
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return None


def _ask_sock_diag(family: int, source: tuple[bytes, int], target: tuple[bytes, int]) -> int | None:
    """uid of the socket that connects ``source`` to ``target``, each an address and a port (linux/inet_diag.h).

    The kernel may answer with another socket: with a listener on the source's port where it doesn't find the socket,
    as it doesn't when that is bound to a device. So state, addresses and ports of its answer are compared.
    """
    if not IS_LINUX:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    by_family, request_flag, no_cookie = 20, 1, b"\xff" * 8
    body = struct.pack(">BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    body += struct.pack(">HH16s16sI", source[1], target[1], source[0], target[0], 0) + no_cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as netlink:  # 4: NETLINK_SOCK_DIAG
        netlink.settimeout(1.0)
        netlink.send(struct.pack("=IHHII", 16 + len(body), by_family, request_flag, 1, 0) + body)
        answer = netlink.recv(4096)
    if len(answer) < 88 or struct.unpack_from("=H", answer, 4)[0] != by_family:
        return None
    found_family, state, source_port, target_port, *addresses = struct.unpack_from(">BBxxHH16s16s", answer, 16)
    found = tuple(
        zip((_plain_address(found_family, raw) for raw in addresses), (source_port, target_port), strict=True)
    )
    uid, inode = struct.unpack_from("=II", answer, 16 + 64)
    # An orphaned socket counts as root's: it has no inode, and no owner to trust.
    return uid if inode and state in CONNECTED_STATES and found == (source, target) else None


def _plain_address(family: int, raw: bytes) -> bytes:
    """An address of sock_diag's 16 bytes; of an IPv4 address mapped into IPv6, the IPv4 address."""
    if family == socket.AF_INET:
        return raw[:4]
    return raw[12:] if raw.startswith(b"\0" * 10 + b"\xff\xff") else raw


def kernel_answers() -> bool:
    """Whether the kernel says who owns a socket; some sandboxes have no netlink."""
    loopback = socket.AF_INET, (b"\x7f\0\0\1", 1), (b"\x7f\0\0\1", 1)
    try:
        _ask_sock_diag(*loopback)
    except OSError:
        return False
    return True


def prove_own_server(
    sock: Any, host: str, port: int, sleep: Callable[[float], None], is_late: Callable[[], bool]
) -> None:
    """Wait until the server at an address of this machine has accepted ``sock``. Raises OSError if it is another
    user's, or if none accepts in time; at once if the server ends first."""
    while (owner := socket_owner(sock, (host, port))) is None:
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        if is_late():
            raise TimeoutError(errno.ETIMEDOUT, "nobody accepted the connection")
        sleep(PROOF_POLL_S)
    if owner not in (0, os.getuid()):
        raise PermissionError(errno.EACCES, "another user's server listens on its port")

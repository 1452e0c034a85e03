"""Checks a client's key; programs of the same user on this machine need none."""

from __future__ import annotations

import dataclasses
import hmac
import os
import secrets
import socket
import struct
from typing import Any

from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.heads import RequestHead
from agent_infra_core.protocol import Backend
from agent_infra_core.relay.connection import ClientConnection, descriptor_trouble
from agent_infra_core.relay.replicas import NO_DESCRIPTOR


def is_same_endpoint(one: Backend, other: Backend) -> bool:
    """Whether two rows lead to one server: then connections and health carry over."""
    same = dataclasses.replace(one, state=other.state, slots=other.slots, node=other.node, ends_at=other.ends_at)
    return same == other


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


class Doorkeeper:
    """Lets this user's own processes pass, and everybody who has the key."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(16).encode()

    def set_key(self, key: str | None) -> None:
        """Ask for ``key`` from now on; None: for one that nobody has."""
        self._key = (key or secrets.token_hex(16)).encode()

    def authorize(self, client: ClientConnection, request: RequestHead, authorization: bytes) -> None:
        """Let the client pass if it is this user (or root) on this machine, or sends the key; else RequestError 401."""
        if client.is_trusted is None:
            try:
                client.is_trusted = socket_owner(client.sock, client.peer) in (0, os.getuid())
            except OSError as trouble:
                message = f"who calls cannot be told: {descriptor_trouble(trouble)}"
                raise RequestError(503, message, retry_after_s=1) from None
        if not client.is_trusted:
            self._check_key(request, authorization)
        # A request that passed by another header says nothing about the next one.
        client.authorization = authorization if b"x-api-key" not in request.fields else None

    def _check_key(self, request: RequestHead, authorization: bytes) -> None:
        scheme, _, sent = authorization.partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else request.fields.get(b"x-api-key", b"").strip()
        if not hmac.compare_digest(sent, self._key):
            raise RequestError(
                401, "a key is needed: send the proxy's key as Authorization: Bearer", code="invalid_api_key"
            )

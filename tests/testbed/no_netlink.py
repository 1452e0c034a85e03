"""Imported, refuses this process netlink sockets by a seccomp filter, as containers and sandboxes do."""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct

SYS_SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2

PROGRAM = (  # code, jump if true, jump if false, operand (linux/filter.h); of struct seccomp_data: 0 number, 16 args[0]
    (LOAD, 0, 0, 0),
    (JUMP_EQUAL, 0, 3, SYS_SOCKET),
    (LOAD, 0, 0, 16),
    (JUMP_EQUAL, 0, 1, int(socket.AF_NETLINK)),
    (RETURN, 0, 0, REFUSE),
    (RETURN, 0, 0, ALLOW),
)


def refuse_netlink() -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in PROGRAM))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(PROGRAM), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, FILTER, program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4).close()
    except PermissionError:
        return
    raise RuntimeError("netlink is still to be had")


refuse_netlink()

"""Connections by commands on the login host, with the programs that it has; nodes whose names it doesn't know."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from agent_infra_core.host import HostUnreachableError
from agent_infra_core.settings import SshConfig
from agent_infra_core.ssh.forwards import _COPY_BOTH_WAYS, ExecChannels
from agent_infra_core.ssh.routes import make_route, node_route


class ShellChannel:
    """A session of a host: its command runs here, in a real shell that finds programs in one folder alone."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._ours, self._theirs = socket.socketpair()

    def settimeout(self, _: float | None) -> None:
        self._ours.settimeout(PATIENCE_S)

    def exec_command(self, line: str) -> None:
        end, found = self._theirs.fileno(), {"PATH": str(self._programs)}
        argv = ["/bin/sh", "-c", line]
        self.process = subprocess.Popen(argv, stdin=end, stdout=end, stderr=subprocess.DEVNULL, env=found)
        self._theirs.close()

    def recv(self, count: int) -> bytes:
        return self._ours.recv(count)

    def sendall(self, data: bytes) -> None:
        self._ours.sendall(data)

    def close(self) -> None:
        self._ours.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends one connection's bytes back."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(100):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]


def install(programs: Path, name: str, words: str = "") -> None:
    """A program that notes how it was called, and connects as nc does; or passes on ``words`` and its own."""
    copier = programs / "copier.py"
    copier.write_bytes(_COPY_BOTH_WAYS)
    run = words or f'{shlex.quote(sys.executable)} {shlex.quote(str(copier))} "$@"'
    program = programs / name
    program.write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(programs / "calls"))}\nexec {run}\n')
    program.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "sh").symlink_to("/bin/sh")
    return tmp_path


def open_channel(programs: Path, port: int, node: str | None = None) -> ShellChannel:
    channel = ShellChannel(programs)
    sessions: Any = type("Sessions", (), {"open": lambda _: channel})()
    ExecChannels(sessions, node).open_channel("direct-tcpip", ("127.0.0.1", port), None, PATIENCE_S)
    return channel


@pytest.mark.parametrize(("there", "taken"), [(("nc", "ncat"), "nc"), (("ncat",), "ncat"), ((), "python3")])
def test_a_connection_takes_what_the_login_host_has(
    there: tuple[str, ...], taken: str, programs: Path, echo: int
) -> None:
    for name in there:
        install(programs, name)
    install(programs, "python3", f'{shlex.quote(sys.executable)} "$@"')
    channel = open_channel(programs, echo)
    try:
        for data in (b"one", b"two"):
            channel.sendall(data)
            assert channel.recv(100) == data
    finally:
        channel.close()
    [call] = (programs / "calls").read_text().splitlines()
    assert call.split()[0] == taken
    assert call.endswith(f"127.0.0.1 {echo}")


def test_a_loopback_behind_the_login_host_is_reached_by_its_ssh(programs: Path, echo: int) -> None:
    copier = shlex.quote(str(programs / "copier.py"))
    install(programs, "ssh", f"{shlex.quote(sys.executable)} {copier} 127.0.0.1 {echo}")
    channel = open_channel(programs, echo, node="gpu07")
    try:
        channel.sendall(b"hello")
        assert channel.recv(100) == b"hello"
    finally:
        channel.close()
    assert (programs / "calls").read_text() == f"ssh -o BatchMode=yes -W 127.0.0.1:{echo} gpu07\n"


def test_a_host_that_has_none_of_them_ends_the_connection(programs: Path) -> None:
    channel = open_channel(programs, 1)
    assert channel.recv(100) == b""
    channel.close()


def test_a_shell_that_runs_no_command_is_named() -> None:
    class Refusing(ShellChannel):
        def exec_command(self, line: str) -> None:  # noqa: ARG002
            self._theirs.sendall(b"This account is currently not available.\n")
            self._theirs.close()

        def close(self) -> None:
            self._ours.close()

    channel = Refusing(Path(os.devnull))
    sessions: Any = type("Sessions", (), {"open": lambda _: channel})()
    with pytest.raises(HostUnreachableError, match=r"its shell ran no command: This account is currently not"):
        ExecChannels(sessions, None).open_channel("direct-tcpip", ("127.0.0.1", 1), None, PATIENCE_S)


@pytest.mark.parametrize(
    ("options", "address", "reached"),
    [
        ({}, "10.0.0.7", "10.0.0.7"),  # gpu07 may mean nothing on the login host
        ({}, None, "gpu07"),
        ({"hostname": "gpu07.example.org"}, "10.0.0.7", "gpu07.example.org"),
    ],
)
def test_a_node_is_reached_at_the_address_that_slurm_knows(
    options: dict[str, str], address: str | None, reached: str
) -> None:
    route = node_route(make_route(SshConfig("login"), "gpu07", options), "gpu07", address)
    assert route.host == reached
    assert route.key_name == options.get("hostname", "gpu07")  # its key is known by its name

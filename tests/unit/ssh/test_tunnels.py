"""The tunnels without a host: known_hosts, modes, what OpenSSH's words mean, a host that falls silent."""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import hmac
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import PATIENCE_S

from agent_infra_core.host import HostUnreachableError
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, SshConfig
from agent_infra_core.ssh.child import TunnelChild, explain_openssh
from agent_infra_core.ssh.forwards import _COPY_BOTH_WAYS, Sessions, Traffic
from agent_infra_core.ssh.host_keys import known_host_keys
from agent_infra_core.ssh.links import TunnelTarget
from agent_infra_core.ssh.login import SshCommands
from agent_infra_core.ssh.openssh import reason_for_openssh
from agent_infra_core.ssh.routes import LoginError, SshRoute, load_paramiko, ssh_route
from agent_infra_core.ssh.tunnels import TunnelSet, TunnelState, tunnel_mode

ROUTE = SshRoute("login", "10.0.0.1", 22, "me", "10.0.0.1", ("~/.ssh/known_hosts",))
RECORD = ReplicaRecord("m-1", "m", "ready", "vllm", "gpu07", 1, "stamp", host="0.0.0.0", port=5900)


def hashed(name: str) -> str:
    salt = b"12345678901234567890"
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return "|1|" + base64.b64encode(salt).decode() + "|" + base64.b64encode(digest).decode()


@pytest.mark.parametrize(
    ("field", "name", "is_meant"),
    [
        ("login.example.org", "login.example.org", True),
        ("LOGIN.example.org", "login.example.org", True),
        ("login,10.0.0.1", "10.0.0.1", True),
        ("[login]:2222", "[login]:2222", True),
        ("[login]:2222", "login", False),
        ("login", "[login]:2222", False),
        ("*.example.org", "login.example.org", True),
        ("*.example.org,!bad.example.org", "bad.example.org", False),
        ("login?", "login1", True),
        ("login[12]", "login1", False),  # brackets are no pattern here
        (hashed("login"), "login", True),
        (hashed("login"), "other", False),
        ("|1|broken", "login", False),
        ("|1|not base64|either", "login", False),
    ],
)
def test_a_known_hosts_line_means_the_names_that_ssh_takes_it_for(field: str, name: str, is_meant: bool) -> None:
    text = f"# a comment\n\n{field} ssh-ed25519 AAAA comment\n"
    assert list(known_host_keys(text, name)) == ([("", "ssh-ed25519", "AAAA")] if is_meant else [])


def test_markers_of_known_hosts_are_kept() -> None:
    text = "@revoked login ssh-rsa AAAA\n@cert-authority * ssh-ed25519 BBBB\nlogin ssh-ed25519"
    assert list(known_host_keys(text, "login")) == [
        ("@revoked", "ssh-rsa", "AAAA"),
        ("@cert-authority", "ssh-ed25519", "BBBB"),
    ]


@pytest.mark.parametrize(
    ("wanted", "has_login", "host", "node", "mode"),
    [
        ("auto", True, "0.0.0.0", "gpu07", "login"),
        ("auto", True, "10.0.0.7", "gpu07", "login"),
        ("auto", True, "127.0.0.1", "gpu07", "node"),
        ("auto", True, "127.0.0.1", "here", "node"),  # a name says little: the login host is another machine
        ("auto", False, "127.0.0.1", "here", "none"),
        ("auto", False, "127.0.0.1", "gpu07", "node"),
        ("auto", False, "0.0.0.0", "gpu07", "none"),
        ("none", True, "127.0.0.1", "gpu07", "none"),
        ("node", True, "0.0.0.0", "gpu07", "node"),
    ],
)
def test_auto_reaches_a_replica_where_it_listens(wanted: str, has_login: bool, host: str, node: str, mode: str) -> None:
    record = dataclasses.replace(RECORD, host=host, node=node)
    chosen, reason = tunnel_mode(wanted, has_login, record, "here")
    assert chosen == mode
    assert reason


@pytest.mark.parametrize(
    ("host", "closed", "mode"),
    [
        ("10.0.0.7", (), "login"),
        ("10.0.0.7", ("login",), "node"),
        ("10.0.0.7", ("login", "node"), "exec"),
        ("127.0.0.1", (), "node"),
        ("127.0.0.1", ("node",), "exec"),
    ],
)
def test_auto_passes_over_modes_that_the_login_host_forbids(host: str, closed: tuple[str, ...], mode: str) -> None:
    record = dataclasses.replace(RECORD, host=host)
    assert tunnel_mode("auto", True, record, "here", closed)[0] == mode
    assert tunnel_mode("login", True, record, "here", closed)[0] == "login"


@pytest.mark.parametrize(
    ("said", "kind", "meaning"),
    [
        ("ssh: connect to host l port 22: Connection refused\r\n", HostUnreachableError, "refuses connections"),
        ("ssh: connect to host l port 22: Connection timed out\r\n", HostUnreachableError, "does not answer"),
        (
            "ssh: Could not resolve hostname l: Name or service not known\r\n",
            HostUnreachableError,
            "l is not known here",
        ),
        ("me@l: Permission denied (publickey,keyboard-interactive).\r\n", LoginError, "ssh-add"),
        ("Received disconnect from 1.2.3.4: Too many authentication failures\r\n", LoginError, "identity_file"),
        ("Timeout, server 10.0.0.1 not responding.\r\n", HostUnreachableError, "not responding"),
        ("", HostUnreachableError, "the connection was lost"),
    ],
)
def test_what_openssh_says_is_told_with_what_to_do(said: str, kind: type[Exception], meaning: str) -> None:
    error = explain_openssh(said, ROUTE, lambda _: ())
    assert type(error) is kind
    assert meaning in str(error)


def test_an_unknown_host_key_of_openssh_comes_with_the_line_to_add() -> None:
    said = "No ED25519 host key is known for 10.0.0.1 and you have requested strict checking.\r\n"
    error = explain_openssh(said, ROUTE, lambda _: [("ssh-ed25519", "AAAA")])
    assert "echo '10.0.0.1 ssh-ed25519 AAAA' >> " in str(error)
    assert "let it add the key" in str(explain_openssh(said, ROUTE, lambda _: ()))


def config(folder: Path, text: str) -> SshConfig:
    (folder / "config").write_text(text)
    return SshConfig(host="cluster", config_file=str(folder / "config"), known_hosts_file=str(folder / "known"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Host cluster\n  User me\n", None),
        ("Host other\n  ProxyJump gate\n", None),
        ("Host cluster\n  ProxyJump none\n", None),
        ("Host cluster\n  ProxyJump gate\n", "proxyjump for cluster"),
        ("Host *\n  ControlMaster auto\n", "controlmaster for cluster"),
        ("Host *\n  CertificateFile ~/c\n", "certificatefile for cluster"),
        ("include other\n", "Include"),
        ("Match host x\n", "Match"),
    ],
)
def test_openssh_is_taken_where_ssh_config_needs_it(text: str, reason: str | None, tmp_path: Path) -> None:
    found = reason_for_openssh(config(tmp_path, text))
    assert found is None if reason is None else reason in (found or "")


def test_the_configuration_wins_over_ssh_config_and_that_over_defaults(tmp_path: Path) -> None:
    text = "Host cluster\n  HostName login.example.org\n  Port 2200\n  User me\n  IdentityFile ~/k1\n"
    ssh = config(tmp_path, text)
    route = ssh_route(ssh, "cluster")
    assert (route.host, route.port, route.user) == ("login.example.org", 2200, "me")
    assert route.key_name == "[login.example.org]:2200"
    assert route.known_hosts == (str(tmp_path / "known"),)
    assert not route.identities_only
    chosen = dataclasses.replace(ssh, user="you", port=22, identity_file="~/k2")
    route = ssh_route(chosen, "cluster")
    assert (route.port, route.user, route.key_name) == (22, "you", "login.example.org")
    assert (route.identity_files, route.identities_only) == (("~/k2",), True)
    node = ssh_route(chosen, "gpu07")  # the port is the login host's alone
    assert (node.host, node.port, node.user) == ("gpu07", 22, "you")


@pytest.mark.parametrize("silent", ["before it takes a command", "while it is sent to", "and cannot be told good-bye"])
def test_a_host_that_falls_silent_holds_nobody_up(silent: str) -> None:
    """No thread may fail by it either: pytest would tell."""
    paramiko = load_paramiko()
    is_over = threading.Event()

    class Silent(paramiko.ServerInterface):  # type: ignore[misc, name-defined]
        def check_auth_none(self, _user: str) -> int:
            return int(paramiko.AUTH_SUCCESSFUL)

        def check_channel_request(self, _kind: str, _number: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

        def check_channel_exec_request(self, channel: Any, _command: bytes) -> bool:
            if silent == "while it is sent to":
                channel.in_buffer.feed = lambda *_: is_over.wait(30.0)
                return True
            if silent == "and cannot be told good-bye":
                here.shutdown(socket.SHUT_WR)
            return is_over.wait(30.0)

    here, there = socket.socketpair()
    server, client = paramiko.Transport(there), paramiko.Transport(here)
    try:
        server.add_server_key(paramiko.ECDSAKey.generate())
        server.start_server(event=threading.Event(), server=Silent())
        client.start_client(timeout=PATIENCE_S)
        client.auth_none("somebody")
        commands = SshCommands(SshRoute("login", "login", 22, "somebody", "login", ()), None)
        commands._transport = client
        with pytest.raises(HostUnreachableError, match="the connection to login broke"):
            commands.run(["true"], stdin=b"x" * 1_000_000, timeout_s=0.5)
        assert not client.is_active()  # the next command makes a new one
    finally:
        is_over.set()
        client.close()
        server.close()


def test_a_tunnel_process_tells_its_parent_of_any_error() -> None:
    child = TunnelChild({"driver": "sshtunnel", "keyring": {}})
    try:
        with pytest.raises(HostUnreachableError, match="KeyError"):
            child.wait_ready(time.monotonic() + PATIENCE_S)
    finally:
        child.close()


@contextlib.contextmanager
def session() -> Iterator[tuple[Any, Any]]:
    """Both ends of a session's channel of SSH."""
    paramiko = load_paramiko()

    class Open(paramiko.ServerInterface):  # type: ignore[misc, name-defined]
        def check_auth_none(self, _user: str) -> int:
            return int(paramiko.AUTH_SUCCESSFUL)

        def check_channel_request(self, _kind: str, _number: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

    near, far = socket.socketpair()
    server, client = paramiko.Transport(far), paramiko.Transport(near)
    try:
        server.add_server_key(paramiko.ECDSAKey.generate())
        server.start_server(event=threading.Event(), server=Open())
        client.start_client(timeout=PATIENCE_S)
        client.auth_none("somebody")
        channel = client.open_session(timeout=PATIENCE_S)
        yield channel, server.accept(PATIENCE_S)
    finally:
        client.close()
        server.close()


def test_what_a_command_prints_on_stderr_does_not_end_its_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    with session() as (near, far), ours, theirs:
        thread = threading.Thread(target=Traffic().relay, args=(theirs, near))
        far.sendall_stderr(b"no locale")
        thread.start()
        for data in (b"one", b"two"):
            far.sendall(data)
            assert ours.recv(100) == data
            far.sendall_stderr(b"more noise")
        ours.sendall(b"question")
        assert far.recv(100) == b"question"
        far.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_the_login_hosts_python_may_be_an_old_one() -> None:
    ast.parse(_COPY_BOTH_WAYS.decode(), feature_version=(3, 6))


class Login:
    """An SSH connection with few sessions."""

    def __init__(self, sessions: int) -> None:
        self.left = sessions

    def is_active(self) -> bool:
        return True

    def open_session(self, timeout: float) -> str:  # noqa: ARG002
        if not self.left:
            raise load_paramiko().SSHException("no session is left")
        self.left -= 1
        return "channel"


def test_sessions_are_reused_while_another_thread_logs_in() -> None:
    logins, may_end, has_begun = [Login(1)], threading.Event(), threading.Event()

    def log_in() -> Login:
        if len(logins) > 1:
            has_begun.set()
            assert may_end.wait(PATIENCE_S)
        return logins[-1]

    sessions = Sessions(log_in)
    assert sessions.open() == "channel"
    logins.append(Login(1))
    thread = threading.Thread(target=sessions.open)
    thread.start()
    assert has_begun.wait(PATIENCE_S)
    logins[0].left = 1  # a session has ended
    assert sessions.open() == "channel"
    may_end.set()
    thread.join(PATIENCE_S)


def test_a_host_without_sessions_is_out_of_reach() -> None:
    with pytest.raises(HostUnreachableError, match="opens no session after the login: no session is left"):
        Sessions(lambda: Login(0)).open()


@pytest.mark.parametrize(("was_up", "mode"), [(False, "exec"), (True, "node")])
def test_a_dead_node_closes_no_mode_that_has_worked(was_up: bool, mode: str) -> None:
    login: Any = SimpleNamespace(driver="sshtunnel", reason="", ssh=None)
    tunnels = TunnelSet(ClusterConfig(type="slurm", tunnel="auto"), login, "key", ["vllm"])
    tunnels._closed_modes.add("login")
    target = tunnels._target(RECORD)
    assert isinstance(target, TunnelTarget)
    state = TunnelState("up", 0, None, "sshtunnel", "node")
    up: Any = SimpleNamespace(
        target=target, ends=("127.0.0.1", (1, 2)) if was_up else None, state=state, shown=None, lost_at=0.0
    )
    tunnels._tunnels[RECORD.replica] = up
    tunnels.follow([RECORD])
    tunnels._close_mode(target, HostUnreachableError("gpu08 is dead"))
    after = tunnels._target(RECORD)
    assert after is not None
    assert after.mode == mode

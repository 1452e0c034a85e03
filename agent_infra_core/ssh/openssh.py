"""The driver `openssh`: one master connection per host, for commands and forwarded ports."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.host import (
    CommandResult,
    CommandRunner,
    HostUnreachableError,
    LocalCommands,
    private_temp_directory,
    write_atomically,
)
from agent_infra_core.settings import SshConfig
from agent_infra_core.ssh.child import TunnelChild, explain_openssh, forwarding_forbidden
from agent_infra_core.ssh.host_keys import node_keys, read_host_keys
from agent_infra_core.ssh.routes import (
    SSH_KEEPALIVE_S,
    SSH_PATIENCE_S,
    LoginError,
    SshRoute,
    make_route,
    node_route,
    public_half,
    read_ssh_config,
    ssh_options,
)
from agent_infra_core.ssh.shell import LINE, framed_input, unframed, unframed_chunks

# ssh_config keys that only OpenSSH supports, with the values that don't need it.
_OPENSSH_ONLY = {
    "proxyjump": ("none",),
    "controlmaster": ("no",),
    "controlpath": ("none",),
    "pkcs11provider": ("none",),
    "certificatefile": ("none",),
    "gssapiauthentication": ("no",),
    "identityagent": ("SSH_AUTH_SOCK",),
    "securitykeyprovider": ("internal",),
}


def reason_for_openssh(ssh: SshConfig) -> str | None:
    """Return why only OpenSSH can log in to this host (from ssh_config and known_hosts); None if paramiko can too."""
    path, text = read_ssh_config(ssh)
    word = re.search(r"(?im)^\s*(include|match)\b", text)
    if word:
        return f"{path} says {word[1].capitalize()}"
    options = ssh_options(text, ssh.host)
    asked = next((key for key, plain in _OPENSSH_ONLY.items() if options.get(key, plain[0]) not in plain), None)
    if asked:
        return f"{path} says {asked} for {ssh.host}"
    route = make_route(ssh, ssh.host, options)
    for name in route.identity_files:
        if any(kind.startswith("sk-") for kind in public_half(Path(os.path.expanduser(name)))[:1]):
            return f"{name} is a security key"
    if any(marker == "@cert-authority" for marker, _, _ in read_host_keys(route)):
        return f"known_hosts has a certificate authority for {ssh.host}"
    return None


def openssh_options(ssh: SshConfig, alias: str, known_hosts: Sequence[str] = ()) -> list[str]:
    """Return the ssh options to reach ``alias``: those of the configuration, which override ssh_config."""
    words = ["-F", os.path.expanduser(ssh.config_file)] if ssh.config_file else []
    if alias == ssh.host and ssh.port:
        words += ["-p", str(ssh.port)]
    if ssh.user:
        words += ["-l", ssh.user]
    if ssh.identity_file:
        words += ["-i", os.path.expanduser(ssh.identity_file), "-o", "IdentitiesOnly=yes"]
    files = [ssh.known_hosts_file] if ssh.known_hosts_file else []
    files += known_hosts
    if files:
        words += ["-o", "UserKnownHostsFile=" + " ".join(f'"{name}"' for name in files)]
    return words


_MASTER_OPTIONS = (
    "StrictHostKeyChecking=yes",
    "ControlPersist=no",
    f"ServerAliveInterval={SSH_KEEPALIVE_S}",
    "ServerAliveCountMax=3",
    "ExitOnForwardFailure=yes",
    f"ConnectTimeout={SSH_PATIENCE_S:g}",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "RequestTTY=no",
    "PermitLocalCommand=no",
    "ForwardAgent=no",
    "ForwardX11=no",
    "UpdateHostKeys=no",
)


class OpenSshMaster:
    """OpenSSH's master connection to one host (ControlMaster), which runs in a `tunnel` child; owns the child."""

    def __init__(
        self, words: Sequence[str], route: SshRoute, control: Path, runner: LocalCommands, has_terminal: bool = False
    ) -> None:
        """``words`` are ssh options to reach the host; with ``has_terminal`` ssh may prompt the operator once."""
        self.route, self._words, self._control, self._runner = route, list(words), control, runner
        self._has_terminal = has_terminal
        self.is_shared = False  # other processes of the deployment may use this process's master
        self._lock = threading.Lock()
        self._child: TunnelChild | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the connection that this process opened still exists."""
        child = self._child
        return child is not None and child.is_alive

    @property
    def is_usable(self) -> bool:
        """Whether the connection exists: this process's, or the one of another that it uses."""
        child = self._child
        return child.is_alive if child is not None else self._answers(self._control)

    def ensure(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Connect, unless this process or another of the deployment has. Raises HostUnreachableError, LoginError."""
        with self._lock:
            if self.is_alive or (not self.is_shared and self._answers(self._control)):
                return
            if self._child is not None:
                self._end(self._child)
            asks = self._has_terminal
            self._has_terminal = False  # nobody expects a prompt later
            options = [word for option in _MASTER_OPTIONS for word in ("-o", option)]
            options += ["-o", f"BatchMode={'no' if asks else 'yes'}"]
            argv = ["ssh", "-N", "-M", "-S", str(self._own_socket), *options, *self._words, "--", self.route.alias]
            spec: dict[str, Any] = {"driver": "openssh", "argv": argv, "socket": str(self._own_socket)}
            spec["route"] = dataclasses.asdict(self.route)
            child = TunnelChild(spec, asks)
            try:
                child.wait_ready(deadline + (120.0 if asks else 0.0), should_stop)
            except BaseException:
                self._end(child)
                raise
            self._child = child

    @property
    def _own_socket(self) -> Path:
        return self._control if self.is_shared else self._control.with_name(f"{self._control.name}-{os.getpid()}")

    def _answers(self, control: Path) -> bool:
        return control.exists() and self._runner.run(self._client(control, "-O", "check")).status == 0

    def client(self, *words: str) -> list[str]:
        """Return the argv of an ssh that uses this connection, and fails rather than open its own."""
        return self._client(self._own_socket if self.is_alive else self._control, *words)

    def _client(self, control: Path, *words: str) -> list[str]:
        options = ["-S", str(control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
        return ["ssh", *options, *self._words, *words, "--", self.route.alias]

    def forward(self, target: tuple[str, int]) -> int:
        """Forward a free local port to ``target``, as seen from the host. Raises HostUnreachableError."""
        said = ""
        for _ in range(3):  # another process may take the port before ssh does
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port: int = probe.getsockname()[1]
            done = self._runner.run(self.client("-O", "forward", "-L", self._forwarding(port, target)))
            if done.status == 0:
                return port
            said = done.errors.decode("utf-8", "replace").strip()
        raise HostUnreachableError(f"{self.route.alias}: no port can be forwarded: {said}")

    def cancel(self, port: int, target: tuple[str, int]) -> None:
        """Stop forwarding a port."""
        with contextlib.suppress(HostUnreachableError):
            self._runner.run(self.client("-O", "cancel", "-L", self._forwarding(port, target)), timeout_s=5.0)

    def complaint(self) -> str | None:
        """Return the message if the host forbids forwarding, according to ssh's log; None if it doesn't."""
        with contextlib.suppress(OSError):
            if "administratively prohibited" in self._own_socket.with_suffix(".log").read_text(errors="replace"):
                return forwarding_forbidden("the requested address")
        return None

    @staticmethod
    def _forwarding(port: int, target: tuple[str, int]) -> str:
        return f"127.0.0.1:{port}:[{target[0]}]:{target[1]}"

    def watch(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when the connection may have ended."""
        if (child := self._child) is not None:
            child.watch(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        if (child := self._child) is not None:
            child.unwatch(wake)

    def close(self) -> None:
        with self._lock:
            if self._child is not None:
                self._end(self._child)
                self._child = None

    def _end(self, child: TunnelChild) -> None:
        child.close()
        for leftover in (self._own_socket, self._own_socket.with_suffix(".log")):
            leftover.unlink(missing_ok=True)


class OpenSshCommands:
    """Runs commands on the login host with OpenSSH. Owns its master and those of the nodes. A CommandRunner."""

    def __init__(
        self, ssh: SshConfig, environment: Mapping[str, str], control_name: str, has_terminal: bool = False
    ) -> None:
        """``control_name`` is unique to the deployment and part of its sockets' names."""
        self._ssh, self._control_name = ssh, control_name
        self._here = LocalCommands(environment)
        self._lock = threading.Lock()
        self._nodes: dict[str, OpenSshMaster] = {}
        self._is_closed = False
        route = openssh_route(ssh, ssh.host, self._here)
        self.login = OpenSshMaster(
            openssh_options(ssh, ssh.host), route, self._control(ssh.host), self._here, has_terminal
        )  # fmt: skip

    def _control(self, alias: str) -> Path:
        """Return the path of a master's socket. The limit is 108 bytes, of which ssh needs 17 for itself."""
        digest = hashlib.sha256(f"{self._control_name}\n{self._ssh}\n{alias}".encode()).hexdigest()[:12]
        path = private_temp_directory() / f"ssh-{digest}"
        if len(os.fsencode(path)) > 75:
            raise LoginError(f"{path} is too long for a socket; set TMPDIR to a shorter directory")
        return path

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline, nonce = time.monotonic() + timeout_s, os.urandom(8).hex()
        self.login.ensure(min(deadline, time.monotonic() + 2 * SSH_PATIENCE_S))
        left = max(1.0, deadline - time.monotonic())
        try:
            sent = framed_input(argv, stdin, nonce)
            done = self._here.run([*self.login.client(), LINE], stdin=sent, timeout_s=left)
        except HostUnreachableError as error:
            raise HostUnreachableError(
                f"`{argv[0]}` on {self._ssh.host} gave no answer within {timeout_s:g} s; is the network or host slow?"
            ) from error
        if done.status == 255 and self._here.run(self.login.client("-O", "check")).status != 0:
            raise explain_openssh(done.errors.decode("utf-8", "replace"), self.login.route, lambda _: ())
        return unframed(done, nonce, self._ssh.host)

    def stream(self, argv: Sequence[str]) -> Generator[bytes, None, None]:
        self.login.ensure(time.monotonic() + 2 * SSH_PATIENCE_S)
        nonce = os.urandom(8).hex()
        with contextlib.closing(
            self._here.stream([*self.login.client(), LINE], framed_input(argv, b"", nonce))
        ) as chunks:
            yield from unframed_chunks(chunks, nonce)

    def node(self, node: str, address: str | None = None) -> OpenSshMaster:
        """Return the master of a compute node, which goes through the login host; fetches unknown node keys.

        ``address`` is the node's, as Slurm knows it; it is used unless ssh_config has one.
        """
        with self._lock:
            master = self._nodes.get(node)
        if master is None:  # without the lock: a node that doesn't answer must not block the others
            route = self._node_route(node, address)
            self._fetch_keys(node, route)
            files = [*(() if self._ssh.known_hosts_file else route.known_hosts), str(self._known_hosts(node))]
            jump = shlex.join(self.login.client("-W", f"[{route.host}]:{route.port}"))
            words = ["-o", f"ProxyCommand={jump.replace('%', '%%')}", *openssh_options(self._ssh, node, files)]
            route = dataclasses.replace(route, proxy_command=jump)
            master = OpenSshMaster(words, route, self._control(node), self._here)
            master.is_shared = True
        with self._lock:
            if self._is_closed:
                self._known_hosts(node).unlink(missing_ok=True)
                raise HostUnreachableError(f"{node}: the connections are being closed")
            return self._nodes.setdefault(node, master)

    def _node_route(self, node: str, address: str | None) -> SshRoute:
        return node_route(openssh_route(self._ssh, node, self._here), node, address)

    def fetch_host_keys(self, node: str, address: str | None) -> None:
        """Fetch a node's keys, unless known_hosts has them. Raises HostUnreachableError or LoginError."""
        self._fetch_keys(node, self._node_route(node, address))

    def _fetch_keys(self, node: str, route: SshRoute) -> None:
        lines = [f"{route.key_name} {kind} {key}\n" for kind, key in node_keys(route, self)]
        write_atomically(self._known_hosts(node), "".join(lines))

    def _known_hosts(self, node: str) -> Path:
        return self._control(node).with_suffix(".known_hosts")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for master in (*self._nodes.values(), self.login):
                master.close()
            for node in self._nodes:
                self._known_hosts(node).unlink(missing_ok=True)
            self._nodes.clear()


def openssh_route(ssh: SshConfig, alias: str, runner: CommandRunner) -> SshRoute:
    """Return how OpenSSH reaches a host, from ``ssh -G``. Raises LoginError if its configuration is invalid."""
    done = runner.run(["ssh", "-G", *openssh_options(ssh, alias), "--", alias], timeout_s=30.0)
    if done.status:
        hint = "; install openssh-client" if done.status == 127 else ""
        raise LoginError(f"ssh cannot be used: {done.errors.decode('utf-8', 'replace').strip()}{hint}")
    options: dict[str, Any] = dict(
        line.partition(" ")[::2] for line in done.output.decode("utf-8", "replace").splitlines()
    )
    options["identityfile"] = [str(options.get("identityfile", ""))]
    options["proxycommand"] = options.pop("proxyjump", None) or options.get("proxycommand", "none")
    return make_route(ssh, alias, options)

"""The driver `openssh`: one master connection per host, for commands and ports."""

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.host import (
    CommandResult,
    CommandRunner,
    HostUnreachableError,
    LocalCommands,
    private_directory,
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
    read_ssh_config,
    ssh_options,
)

# What only OpenSSH does, as keys of ssh_config with the values that do not ask for it.
_OPENSSH_ONLY = {
    "proxyjump": ("none",),
    "controlmaster": ("no",),
    "controlpath": ("none",),
    "pkcs11provider": ("none",),
    "certificatefile": ("none",),
    "gssapiauthentication": ("no",),
}


def why_openssh(ssh: SshConfig) -> str | None:
    """What of ssh_config only OpenSSH can do for this login host, in words; None where nothing."""
    path, text = read_ssh_config(ssh)
    word = re.search(r"(?im)^\s*(include|match)\b", text)
    if word:
        return f"{path} says {word[1].capitalize()}"
    options = ssh_options(text, ssh.host)
    asked = next((key for key, plain in _OPENSSH_ONLY.items() if options.get(key, plain[0]) not in plain), None)
    if asked:
        return f"{path} says {asked} for {ssh.host}"
    route = make_route(ssh, ssh.host, options)
    if any(marker == "@cert-authority" for marker, _, _ in read_host_keys(route)):
        return f"known_hosts has a certificate authority for {ssh.host}"
    return None


def openssh_words(ssh: SshConfig, alias: str, known_hosts: Sequence[str] = ()) -> list[str]:
    """The options by which every ssh of ours reaches ``alias``: the configuration's, over those of ssh_config."""
    words = ["-F", str(Path(ssh.config_file).expanduser())] if ssh.config_file else []
    if alias == ssh.host and ssh.port:
        words += ["-p", str(ssh.port)]
    if ssh.user:
        words += ["-l", ssh.user]
    if ssh.identity_file:
        words += ["-i", str(Path(ssh.identity_file).expanduser()), "-o", "IdentitiesOnly=yes"]
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
    """OpenSSH's connection to one host (ControlMaster), held by a `tunnel` child; owns the child."""

    def __init__(
        self, words: Sequence[str], route: SshRoute, control: Path, runner: LocalCommands, has_terminal: bool = False
    ) -> None:
        """``words`` are the options that lead to the host; ``has_terminal``: ssh may ask the operator, at first."""
        self.route, self._words, self._control, self._runner = route, list(words), control, runner
        self._has_terminal = has_terminal
        self.is_shared = False  # this process's master is the one that others of the deployment may use
        self._lock = threading.Lock()
        self._child: TunnelChild | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the child, which this process started, holds the connection."""
        child = self._child
        return child is not None and child.is_alive

    def ensure(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Have a connection: this process's own, or another's of the deployment. HostUnreachableError, LoginError."""
        with self._lock:
            if self.is_alive or (not self.is_shared and self._answers(self._control)):
                return
            if self._child is not None:
                self._end(self._child)
            asks = self._has_terminal
            self._has_terminal = False  # later, nobody waits for a question
            options = [word for option in _MASTER_OPTIONS for word in ("-o", option)]
            options += ["-o", f"BatchMode={'no' if asks else 'yes'}"]
            argv = ["ssh", "-N", "-M", "-S", str(self._own_socket), *options, *self._words, "--", self.route.alias]
            spec: dict[str, Any] = {"driver": "openssh", "argv": argv, "socket": str(self._own_socket)}
            spec["route"] = dataclasses.asdict(self.route)
            child = TunnelChild(spec, None, asks)
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
        """The argv of an ssh that goes over this connection, or fails: it never makes one of its own."""
        return self._client(self._own_socket if self.is_alive else self._control, *words)

    def _client(self, control: Path, *words: str) -> list[str]:
        options = ["-S", str(control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
        return ["ssh", *options, *self._words, *words, "--", self.route.alias]

    def forward(self, target: tuple[str, int]) -> int:
        """A local port that leads to ``target`` from that host; HostUnreachableError."""
        said = ""
        for _ in range(3):  # somebody may take the port between our look and ssh's
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port: int = probe.getsockname()[1]
            done = self._runner.run(self.client("-O", "forward", "-L", self._forwarding(port, target)))
            if done.status == 0:
                return port
            said = done.errors.decode("utf-8", "replace").strip()
        raise HostUnreachableError(f"{self.route.alias}: no port can be forwarded: {said}")

    def cancel(self, port: int, target: tuple[str, int]) -> None:
        """Take a forwarded port back."""
        with contextlib.suppress(HostUnreachableError):
            self._runner.run(self.client("-O", "cancel", "-L", self._forwarding(port, target)), timeout_s=5.0)

    def complaint(self) -> str | None:
        """What OpenSSH says of connections that it could not forward; None when nothing that decides."""
        with contextlib.suppress(OSError):
            if "administratively prohibited" in self._own_socket.with_suffix(".log").read_text(errors="replace"):
                return forwarding_forbidden("what it was asked for")
        return None

    @staticmethod
    def _forwarding(port: int, target: tuple[str, int]) -> str:
        return f"127.0.0.1:{port}:[{target[0]}]:{target[1]}"

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
    """Commands on the login host by OpenSSH, over one master; owns that and those of the nodes. A CommandRunner."""

    def __init__(
        self, ssh: SshConfig, environment: Mapping[str, str], control_name: str, has_terminal: bool = False
    ) -> None:
        """``control_name`` tells this deployment's sockets from others'."""
        self._ssh, self._control_name = ssh, control_name
        self._here = LocalCommands(environment)
        self._lock = threading.Lock()
        self._nodes: dict[str, OpenSshMaster] = {}
        self._is_closed = False
        route = openssh_route(ssh, ssh.host, self._here)
        self.login = OpenSshMaster(
            openssh_words(ssh, ssh.host), route, self._control(ssh.host), self._here, has_terminal
        )  # fmt: skip

    def _control(self, alias: str) -> Path:
        """Where a master's socket lies: its path must be short (108 bytes, of which ssh itself takes 17)."""
        digest = hashlib.sha256(f"{self._control_name}\n{self._ssh}\n{alias}".encode()).hexdigest()[:12]
        path = private_directory() / f"ssh-{digest}"
        if len(os.fsencode(path)) > 75:
            raise LoginError(f"{path} is too long for a socket; set TMPDIR to a shorter directory")
        return path

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        self.login.ensure(min(deadline, time.monotonic() + 2 * SSH_PATIENCE_S))
        left = max(1.0, deadline - time.monotonic())
        try:
            done = self._here.run([*self.login.client(), shlex.join(argv)], stdin=stdin, timeout_s=left)
        except HostUnreachableError as error:
            raise HostUnreachableError(
                f"`{argv[0]}` on {self._ssh.host} gave no answer within {timeout_s:g} s; is the network or host slow?"
            ) from error
        if done.status == 255 and self._here.run(self.login.client("-O", "check")).status != 0:
            raise explain_openssh(done.errors.decode("utf-8", "replace"), self.login.route, lambda _: ())
        return done

    def node(self, node: str) -> OpenSshMaster:
        """The master of a compute node, reached through the login host's; its key is fetched there if need be."""
        with self._lock:
            master = self._nodes.get(node)
        if master is None:  # made without the lock: a node that does not answer holds up none of the others
            route = openssh_route(self._ssh, node, self._here)
            self.learn_keys(node, route)
            files = [*(() if self._ssh.known_hosts_file else route.known_hosts), str(self._known_hosts(node))]
            jump = shlex.join(self.login.client("-W", f"[{route.host}]:{route.port}"))
            words = ["-o", f"ProxyCommand={jump.replace('%', '%%')}", *openssh_words(self._ssh, node, files)]
            route = dataclasses.replace(route, proxy_command=jump)
            master = OpenSshMaster(words, route, self._control(node), self._here)
            master.is_shared = True
        with self._lock:
            if self._is_closed:
                self._known_hosts(node).unlink(missing_ok=True)
                raise HostUnreachableError(f"{node}: the connections are being closed")
            return self._nodes.setdefault(node, master)

    def learn_keys(self, node: str, route: SshRoute | None = None) -> None:
        """Fetch the keys of a node, where known_hosts has none; HostUnreachableError, LoginError."""
        route = route or openssh_route(self._ssh, node, self._here)
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
    """How OpenSSH reaches a host, by its own account (``ssh -G``); LoginError where its configuration is wrong."""
    done = runner.run(["ssh", "-G", *openssh_words(ssh, alias), "--", alias], timeout_s=30.0)
    if done.status:
        hint = "; install openssh-client" if done.status == 127 else ""
        raise LoginError(f"ssh cannot be used: {done.errors.decode('utf-8', 'replace').strip()}{hint}")
    options: dict[str, Any] = dict(
        line.partition(" ")[::2] for line in done.output.decode("utf-8", "replace").splitlines()
    )
    options["identityfile"] = [str(options.get("identityfile", ""))]
    options["proxycommand"] = options.pop("proxyjump", None) or options.get("proxycommand", "none")
    return make_route(ssh, alias, options)

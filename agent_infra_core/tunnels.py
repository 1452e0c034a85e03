"""Tunnels: commands and ports of a cluster that is not here, over SSH. Knows hosts, keys and ports; of requests
nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import os
import re
import resource
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent_infra_core.clusters import CommandResult, CommandRunner, HostUnreachableError, LocalCommands
from agent_infra_core.configuration import ClusterConfig, SshConfig
from agent_infra_core.engines import ENGINES
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.node import (
    CHALLENGE_PATH,
    ReplicaRecord,
    _open_log,
    answer_challenge,
    http_get,
    private_directory,
    server_identity,
    write_atomically,
)

SSH_PATIENCE_S = 15.0  # to reach a host, to log in, to open a channel
SSH_KEEPALIVE_S = 5  # three without an answer end an OpenSSH connection
TUNNEL_PROBE_S = 1.0  # between two looks at a tunnel
SUSPECT_AFTER_S = 5.0  # of silence
REPLACED_AFTER_S = 15.0  # of silence
TUNNEL_BACKOFF_S = (0.2, 30.0)  # before the first new attempt, and at most; doubled each time
LOGINS_AT_ONCE = 4  # and so many more that failed repeatedly; sshd refuses some of more than ten (MaxStartups)
FORGIVING_S = 60.0  # that turns wait for a tunnel which is being replaced, before its replica counts as away
PORT_HELD_S = 10.0  # that a port of a tunnel which has ended is kept from others: the relay may still speak to it
TUNNELS_CLOSE_S = 10.0  # that all tunnels together have to close
FORWARD_BACKLOG = 1024  # connections that wait in a tunnel's port: all agents may come at once


class LoginError(HostUnreachableError, RefusedError):
    """SSH does not let us in, and will not until the operator did what the message says."""


class HostKeyError(LoginError):
    """A host shows a key that is not the known one, or none is known."""


class InteractiveLoginError(LoginError):
    """The login asks for what cannot be kept for the next one: a password or a one-time code."""


@dataclass(frozen=True)
class SshRoute:
    """How one host is reached, as the configuration and ssh_config say together."""

    alias: str  # as it was asked for
    host: str
    port: int
    user: str
    key_name: str  # by which known_hosts has it: host, [host]:port, or what HostKeyAlias says
    known_hosts: tuple[str, ...]  # files; those that are missing are left out when they are read
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False  # no other key of the agent is offered
    proxy_command: str | None = None
    host_keys: tuple[tuple[str, str], ...] = ()  # (type, base64) that count besides those of the files


@dataclass
class Keyring:
    """What one login has found out, so that the next need not ask; goes over a pipe, never by argv or environment."""

    passphrases: dict[str, str] = field(default_factory=dict)  # key file → what the operator typed
    accepted: str | None = None  # the key that opened last: a file, or an agent's key in base64


# --- Host keys: which ones a known_hosts file promises, and what to do when a host shows another. --------------------
def known_host_keys(text: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(marker, type, base64) of the lines of a known_hosts file that speak of ``name``; the marker is mostly empty."""
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not words[0].startswith("#") and _names_host(words[0], name):
            yield marker, words[1], words[2]


def _names_host(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line means ``name``: plain, hashed, with wildcards, with exceptions."""
    import base64
    import fnmatch

    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):  # not base64: a broken line, which names nobody
            salt, digest = (base64.b64decode(part) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)
        return False
    # In known_hosts only * and ? are special; brackets stand around a name with a port.
    found = False
    for pattern in patterns.split(","):
        glob = re.sub(r"[\[\]]", lambda bracket: f"[{bracket[0]}]", pattern.removeprefix("!"))
        if fnmatch.fnmatchcase(name.lower(), glob.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def read_host_keys(route: SshRoute) -> list[tuple[str, str, str]]:
    """(marker, type, base64) of all that is known of the host of ``route``."""
    found = [("", kind, key) for kind, key in route.host_keys]
    for name in route.known_hosts:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LoginError(f"{name} cannot be read: {error.strerror}; make it readable") from error
        found += known_host_keys(text, route.key_name)
    return found


def key_fingerprint(key: str) -> str:
    """``SHA256:…`` of a base64 key, as ssh and administrators write it."""
    import base64

    digest = hashlib.sha256(base64.b64decode(key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _unknown_host(route: SshRoute, kind: str, key: str) -> str:
    """What to do about a host that known_hosts does not know."""
    file = Path(route.known_hosts[0]).expanduser()
    return (
        f"host key of {route.key_name} is not known: it shows {kind} {key_fingerprint(key)}. Compare that with what "
        "the administrators publish (there: ssh-keygen -lf /etc/ssh/ssh_host_*.pub); if it is the same, add it:\n"
        f"  echo '{route.key_name} {kind} {key}' >> {shlex.quote(str(file))}"
    )


def _changed_host(route: SshRoute, shown: str) -> str:
    """What to do about a host whose key is not the one that known_hosts has."""
    forget = " && ".join(
        f"ssh-keygen -R {shlex.quote(route.key_name)} -f {shlex.quote(str(path))}"
        for name in route.known_hosts
        if (path := Path(name).expanduser()).exists()
        and any(known_host_keys(path.read_text(encoding="utf-8", errors="replace"), route.key_name))
    )
    return (
        f"host key of {route.key_name} has changed: it shows {shown}, known_hosts has another. Somebody may be "
        "listening in: ask the cluster's administrators. Only if they confirm the new key, forget the old one:\n"
        f"  {forget or 'ssh-keygen -R ' + shlex.quote(route.key_name)}"
    )


# --- Routes: the configuration and ssh_config. -----------------------------------------------------------------------
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")

# What only OpenSSH does, as keys of ssh_config with the values that do not ask for it.
_OPENSSH_ONLY = {
    "proxyjump": ("none",),
    "controlmaster": ("no",),
    "controlpath": ("none",),
    "pkcs11provider": ("none",),
    "certificatefile": ("none",),
    "gssapiauthentication": ("no",),
}


def read_ssh_config(ssh: SshConfig) -> tuple[str, str]:
    """Path and text of the ssh_config that counts; the text is empty where the default one is not there."""
    path = Path(ssh.config_file or "~/.ssh/config").expanduser()
    try:
        return str(path), path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if ssh.config_file is None and isinstance(error, FileNotFoundError):
            return str(path), ""
        raise LoginError(f"cluster.ssh.config_file: {path} cannot be read: {error.strerror}") from error


def why_openssh(ssh: SshConfig) -> str | None:
    """What of ssh_config only OpenSSH can do for this login host, in words; None where nothing."""
    path, text = read_ssh_config(ssh)
    word = re.search(r"(?im)^\s*(include|match)\b", text)
    if word:
        return f"{path} says {word[1].capitalize()}"
    options = _ssh_options(text, ssh.host)
    asked = next((key for key, plain in _OPENSSH_ONLY.items() if options.get(key, plain[0]) not in plain), None)
    if asked:
        return f"{path} says {asked} for {ssh.host}"
    route = _route_of(ssh, ssh.host, options)
    if any(marker == "@cert-authority" for marker, _, _ in read_host_keys(route)):
        return f"known_hosts has a certificate authority for {ssh.host}"
    return None


def _ssh_options(text: str, alias: str) -> Mapping[str, Any]:
    """What an ssh_config says of a host: keys in lower case."""
    paramiko = _paramiko()
    try:
        options: Mapping[str, Any] = paramiko.SSHConfig.from_text(text).lookup(alias)
        return options
    except (paramiko.SSHException, ValueError) as error:
        raise LoginError(f"ssh_config cannot be read for {alias}: {error}; tunnel_driver: openssh reads all") from error


def ssh_route(ssh: SshConfig, alias: str) -> SshRoute:
    """How ``alias``, the login host or a node behind it, is reached without OpenSSH; LoginError."""
    return _route_of(ssh, alias, _ssh_options(read_ssh_config(ssh)[1], alias))


def _route_of(ssh: SshConfig, alias: str, options: Mapping[str, Any]) -> SshRoute:
    """The route that a configuration and the options of an ssh_config (one string or list each) say."""
    import getpass

    host = str(options.get("hostname", alias))
    port = int((ssh.port if alias == ssh.host else None) or options.get("port", 22))
    files = options.get("identityfile") or _DEFAULT_KEYS
    known = str(options.get("userknownhostsfile", " ".join(_KNOWN_HOSTS[:2]))).split()
    known += str(options.get("globalknownhostsfile", " ".join(_KNOWN_HOSTS[2:]))).split()
    proxy = options.get("proxycommand", "none")
    if options.get("proxyjump", "none") != "none":
        raise LoginError(f"ssh_config says ProxyJump for {alias}; set cluster.tunnel_driver to auto or openssh")
    return SshRoute(
        alias=alias,
        host=host,
        port=port,
        user=ssh.user or options.get("user") or getpass.getuser(),
        key_name=str(options.get("hostkeyalias") or (host if port == 22 else f"[{host}]:{port}")),
        known_hosts=(ssh.known_hosts_file,) if ssh.known_hosts_file else tuple(known),
        identity_files=(ssh.identity_file,) if ssh.identity_file else tuple(files),
        identities_only=bool(ssh.identity_file) or options.get("identitiesonly") == "yes",
        proxy_command=None if proxy == "none" else proxy,
    )


# --- paramiko: one login, checked on both sides. ---------------------------------------------------------------------
def _paramiko() -> Any:
    """paramiko, without its import's warnings about old ciphers, and without its own lines on stderr."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paramiko
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return paramiko


def log_in(route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, through: Any = None) -> Any:
    """An authenticated paramiko.Transport to the host of ``route``, whose key was checked first.

    ``through`` is a paramiko channel that leads there; ``ask`` asks the operator for a passphrase. Raises
    HostUnreachableError, and LoginError where trying again cannot help.
    """
    paramiko = _paramiko()
    sock = _dial(route) if through is None else through
    transport = None
    try:
        transport = paramiko.Transport(sock)
        transport.daemon = True
        _shake_hands(transport, route)
        _authenticate(transport, route, keyring, ask)
        transport.set_keepalive(SSH_KEEPALIVE_S)
        return transport
    except BaseException:
        close_connection(transport, sock)
        raise


def close_connection(transport: Any, sock: Any = None) -> None:
    """Close a transport, or the ``sock`` that was to carry it; its ProxyCommand, which paramiko forgets, ends too.

    Never fails: paramiko says good-bye to the other end, which a connection that is broken cannot be told.
    """
    if transport is not None:
        sock = transport.sock
        with contextlib.suppress(Exception):
            transport.close()
        if transport.is_alive():
            transport.join(5.0)
    with contextlib.suppress(Exception):
        sock.close()
    process = getattr(sock, "process", None)
    if isinstance(process, subprocess.Popen):
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):  # a child of its own has its pipes
            process.communicate(timeout=5.0)


@contextlib.contextmanager
def _broken_after(transport: Any, seconds: float) -> Iterator[None]:
    """Close a connection that is still at the block by then: paramiko waits for a host that fell silent for ever."""
    alarm = threading.Timer(max(0.1, seconds), close_connection, (transport,))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _dial(route: SshRoute) -> Any:
    """A connection to the SSH port of a host, straight or by its ProxyCommand; HostUnreachableError."""
    where = f"{route.host}:{route.port}"
    if route.proxy_command:
        try:
            proxy = _paramiko().ProxyCommand(route.proxy_command)
        except (OSError, ValueError) as error:
            raise LoginError(f"ProxyCommand {route.proxy_command!r} of {route.alias} cannot be run: {error}") from error
        # Its own signals a number, which may be another process's by then, or nobody's: an error in paramiko's thread.
        proxy.close = proxy.process.kill
        return proxy
    try:
        sock = socket.create_connection((route.host, route.port), timeout=SSH_PATIENCE_S)
    except socket.gaierror as error:
        fix = "check cluster.ssh.host, or HostName in ssh_config; is a VPN needed?"
        raise HostUnreachableError(f"{route.host} is not known here ({error.strerror}); {fix}") from error
    except ConnectionRefusedError as error:
        raise HostUnreachableError(f"{where} refuses connections; check host and port; does its sshd run?") from error
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise HostUnreachableError(
            f"{where} cannot be reached: {reason}; is a VPN or a firewall in the way?"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an acknowledgement
    return sock


def _shake_hands(transport: Any, route: SshRoute) -> None:
    """Agree on keys with the host and make sure that it is the one that known_hosts knows."""
    paramiko = _paramiko()
    known = read_host_keys(route)
    trusted = [(kind, key) for marker, kind, key in known if not marker]
    revoked = [key for marker, _, key in known if marker == "@revoked"]
    if trusted:
        # Of several keys the host shows the one that is asked for: ask for those that can be checked.
        kinds = {kind for kind, _ in trusted}
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
        security = transport.get_security_options()
        security.key_types = [kind for kind in security.key_types if kind in kinds] or security.key_types
    try:
        transport.start_client(timeout=SSH_PATIENCE_S)
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise HostKeyError(
            _changed_host(route, "none of the kinds that are known") if trusted else str(error)
        ) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        by = f" by {route.proxy_command!r}" if route.proxy_command else ""
        raise HostUnreachableError(
            f"{route.alias} ({route.host}:{route.port}) speaks no SSH{by}: {str(error) or 'it hung up'}; "
            "is it the right port, or does it refuse so many connections?"
        ) from error
    shown = transport.get_remote_server_key()
    kind, key = shown.get_name(), shown.get_base64()
    if key in revoked:
        raise LoginError(f"host key {key_fingerprint(key)} of {route.key_name} is revoked; ask the administrators")
    if (kind, key) not in trusted:
        raise HostKeyError(
            _changed_host(route, f"{kind} {key_fingerprint(key)}") if trusted else _unknown_host(route, kind, key)
        )


def _authenticate(transport: Any, route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None) -> None:
    """Offer keys until one opens: first the one that did before, then the agent's, then those in files."""
    paramiko = _paramiko()
    tried: list[str] = []
    for name, key in _offered_keys(route, keyring, ask, tried):
        try:
            further = transport.auth_publickey(route.user, key)
        except paramiko.BadAuthenticationType as error:
            further = error.allowed_types
            if "publickey" not in further:
                raise InteractiveLoginError(_interactive(route, further)) from error
            continue
        except (paramiko.SSHException, EOFError, OSError) as error:
            if transport.is_active():
                continue
            raise LoginError(
                _denied(route, tried) + "; it hung up: perhaps too many keys, name one in identity_file"
            ) from error
        if not transport.is_authenticated():
            raise InteractiveLoginError(_interactive(route, further))
        keyring.accepted = name
        return
    try:
        transport.auth_none(route.user)
    except paramiko.BadAuthenticationType as error:
        if {"password", "keyboard-interactive"} & set(error.allowed_types):
            raise InteractiveLoginError(
                _denied(route, tried) + "; " + _interactive(route, error.allowed_types)
            ) from error
        raise LoginError(_denied(route, tried)) from error
    except (paramiko.SSHException, EOFError) as error:
        raise LoginError(_denied(route, tried)) from error


def _interactive(route: SshRoute, kinds: Iterable[str]) -> str:
    return (
        f"{route.alias} asks {route.user} for more than a key ({', '.join(kinds)}): a password or a one-time code; "
        "set cluster.tunnel_driver to openssh, which asks once and keeps the connection"
    )


def _denied(route: SshRoute, tried: Sequence[str]) -> str:
    where = f"{route.user}@{route.alias}"
    if not tried:
        files = ", ".join(route.identity_files)
        return f"no SSH key for {where}: none in the agent, none in {files}; make one (ssh-keygen) or set identity_file"
    return (
        f"permission denied for {where}; tried {', '.join(tried)}. Is the user right, and the public key in "
        "~/.ssh/authorized_keys there? Set cluster.ssh.user or identity_file"
    )


def _offered_keys(
    route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, tried: list[str]
) -> Iterator[tuple[str, Any]]:
    """(name, key) of all that may be offered, in order; ``tried`` takes their names for people."""
    files = [Path(name).expanduser() for name in route.identity_files]
    wanted = {words[1] for file in files for words in [_public_half(file)] if len(words) > 1}
    with contextlib.ExitStack() as held_open:  # the agent signs as long as its keys are being tried
        agent: list[Any] = []
        with contextlib.suppress(_paramiko().SSHException, OSError):
            link = _paramiko().Agent()
            held_open.callback(link.close)
            agent = [key for key in link.get_keys() if not route.identities_only or key.get_base64() in wanted]
        offers: list[tuple[str, Any]] = [(key.get_base64(), key) for key in agent]
        held = {name for name, _ in offers}
        offers += [(str(file), None) for file in files if file.exists() and not held & set(_public_half(file))]
        for name, key in sorted(offers, key=lambda offer: offer[0] != keyring.accepted):
            tried.append(name if key is None else f"the agent's {key.get_name()} {key_fingerprint(name)}")
            yield name, key or _load_key(name, keyring, ask)
    named = [file for file in files if not file.exists()]
    if route.identities_only and named and not tried:
        raise LoginError(f"key file {named[0]} is not there; check identity_file")


def _public_half(file: Path) -> list[str]:
    """The words of the .pub file beside a private key; none where there is none."""
    try:
        return file.with_name(file.name + ".pub").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _load_key(name: str, keyring: Keyring, ask: Callable[[str], str] | None) -> Any:
    """The private key in a file, with its passphrase if need be; LoginError."""
    paramiko = _paramiko()
    phrase = keyring.passphrases.get(name)
    for attempt in range(4):
        try:
            key = paramiko.PKey.from_path(name, phrase.encode() if phrase else None)
            if phrase:
                keyring.passphrases[name] = phrase
            return key
        except TypeError as error:  # it has a passphrase, and none was given
            if ask is None:
                raise LoginError(
                    f"key {name} needs a passphrase, and nobody can be asked; `ssh-add {shlex.quote(name)}` first"
                ) from error
        except (ValueError, OSError, paramiko.SSHException) as error:
            if phrase is None or ask is None or attempt == 3:
                fix = "wrong passphrase" if phrase else "is it a private key, and readable? Set identity_file"
                raise LoginError(f"key {name} cannot be used: {fix}") from error
        phrase = ask(f"{'wrong; ' if phrase else ''}passphrase for {name}: ")
    raise LoginError(f"key {name}: wrong passphrase")


# --- Commands over SSH. ----------------------------------------------------------------------------------------------
class SshCommands:
    """Commands on the login host by paramiko: one connection kept, a channel a command. A CommandRunner."""

    def __init__(self, route: SshRoute, ask: Callable[[str], str] | None) -> None:
        self.route, self.keyring = route, Keyring()
        self._ask = ask
        self._lock = threading.Lock()
        self._transport: Any = None

    def connect(self) -> Any:
        """The connection, made anew where it broke; HostUnreachableError, LoginError."""
        with self._lock:
            if self._transport is not None and not self._transport.is_active():
                close_connection(self._transport)
                self._transport = None
            if self._transport is None:
                self._transport = log_in(self.route, self.keyring, self._ask)
                self._ask = None  # later, nobody waits for a question
            return self._transport

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        channel = self._open_channel(deadline)
        transport = channel.get_transport()
        broken = (_paramiko().SSHException, EOFError, OSError)
        try:
            with _broken_after(transport, min(SSH_PATIENCE_S, deadline - time.monotonic())):
                channel.exec_command(shlex.join(argv))
            with _broken_after(transport, deadline - time.monotonic() + 1.0):
                result = _converse(channel, stdin, deadline)
            if result is None:
                self._drop(transport)  # silent without being closed, it would hold up the next command too
        except broken as error:
            self._drop(transport)
            raise HostUnreachableError(f"the connection to {self.route.alias} broke: {error}; try again") from error
        finally:
            with contextlib.suppress(*broken):
                channel.close()
        if result is None:
            raise HostUnreachableError(
                f"`{argv[0]}` on {self.route.alias} gave no answer within {timeout_s:g} s; is the network or host slow?"
            )
        return result

    def _open_channel(self, deadline: float) -> Any:
        """A session; a connection that turns out to be dead is made anew once."""
        paramiko = _paramiko()
        for attempt in (1, 2):
            transport = self.connect()
            try:
                return transport.open_session(timeout=max(0.1, min(SSH_PATIENCE_S, deadline - time.monotonic())))
            except (paramiko.SSHException, EOFError, OSError) as error:
                self._drop(transport)
                if attempt == 2 or isinstance(error, paramiko.ChannelException) or time.monotonic() > deadline:
                    raise HostUnreachableError(f"{self.route.alias} opens no session: {error}; try again") from error
        raise AssertionError

    def _drop(self, transport: Any) -> None:
        """Close a connection that broke, unless another command did already, and the one that is kept is newer."""
        with self._lock:
            if self._transport is transport and transport is not None:
                close_connection(transport)
                self._transport = None

    def close(self) -> None:
        with self._lock:
            if self._transport is not None:
                close_connection(self._transport)
                self._transport = None


def _converse(channel: Any, stdin: bytes, deadline: float) -> CommandResult | None:
    """Feed a command and read it to its end; None at the deadline, OSError when the connection broke before."""
    output, errors, left = bytearray(), bytearray(), memoryview(stdin)
    channel.setblocking(False)
    ready = select.poll()
    ready.register(channel.fileno(), select.POLLIN)
    if not left:
        channel.shutdown_write()
    while time.monotonic() < deadline:
        moved = False
        if left and channel.send_ready() and not channel.closed:
            try:
                left = left[channel.send(left[:32768]) :]
            except OSError:  # it reads no more, which is its own affair
                left = left[:0]
            moved = True
            if not left:
                channel.shutdown_write()
        while channel.recv_ready():
            output += channel.recv(1 << 16)
            moved = True
        while channel.recv_stderr_ready():
            errors += channel.recv_stderr(1 << 16)
            moved = True
        if moved:
            continue
        if channel.closed or (channel.eof_received and channel.exit_status_ready()):
            if not channel.get_transport() or not channel.get_transport().is_active():
                raise OSError("it was closed from there")
            return CommandResult(channel.recv_exit_status(), bytes(output), bytes(errors))
        if channel.eof_received:  # its end stays readable, so there is nothing to wait at
            time.sleep(0.01)
        else:
            ready.poll(20 if left else 200)
    return None


# --- The `tunnel` role: a child process that holds one SSH connection with its ports. --------------------------------
# Down its stdin comes one line of JSON, what it is to be: {"driver": "sshtunnel", "hops": [SshRoute], "keyring":
# Keyring, "local": [port], "remote": [[host, port]]} or {"driver": "openssh", "argv": [word], "socket": path}. Then
# stdin only stays open: its end, however the parent ended, is the child's. Up its stdout come {"ports": [local port]}
# once it stands, or {"error": text, "kind": "login" | "interactive" | "host_key" | "host"}.
class TunnelChild:
    """A `tunnel` process; owns it and its pipes. One thread at a time uses it."""

    def __init__(self, spec: Mapping[str, Any], log: Path | None, has_terminal: bool = False) -> None:
        """Start it. With ``has_terminal`` ssh may ask the operator, and a Ctrl-C at that reaches it."""
        folder, name = os.path.split(os.path.abspath(__file__))
        with open(log or os.devnull, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", name.removesuffix(".py"), "tunnel"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                start_new_session=not has_terminal,
            )
        assert self._process.stdin is not None  # noqa: S101 (for the type checker)
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait_ready will tell
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, ...]:
        """Its local ports, once it stands; HostUnreachableError and its kinds say why it does not."""
        line = self._read_line(deadline, should_stop)
        document = json.loads(line) if line else {}
        if "ports" in document:
            return tuple(document["ports"])
        kinds = {"login": LoginError, "interactive": InteractiveLoginError, "host_key": HostKeyError}
        problem = document.get("error") or ("it ended without a word" if line is None else "it was too slow")
        raise kinds.get(document.get("kind", ""), HostUnreachableError)(problem)

    def last_words(self) -> str:
        """Why a child that stood has ended; empty where it did not say."""
        line = self._read_line(time.monotonic() + 1.0, lambda: False)
        return str(json.loads(line).get("error", "")) if line else ""

    def _read_line(self, deadline: float, should_stop: Callable[[], bool]) -> bytes | None:
        """One line; None at the end of its output, empty at the deadline."""
        output = self._process.stdout
        assert output is not None  # noqa: S101 (for the type checker)
        ready = select.poll()
        ready.register(output, select.POLLIN)
        while time.monotonic() < deadline and not should_stop():
            if ready.poll(100):
                return output.readline() or None
        return b""

    def close(self) -> None:
        """End it; what it holds ends with it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.terminate()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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


def _end_with_parent() -> None:
    """Wait for the end of stdin, and be gone: whatever the other threads are at, and however the parent ended."""
    try:
        os.read(0, 1)
    finally:
        os._exit(0)


def _tell(document: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")


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


def route_from_json(document: Mapping[str, Any]) -> SshRoute:
    """The SshRoute that ``dataclasses.asdict`` made, after JSON made lists of its tuples."""
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in document.items()}
    values["host_keys"] = tuple((kind, key) for kind, key in values["host_keys"])
    return SshRoute(**values)


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


def forwarding_forbidden(target: str) -> str:
    """What to say where an sshd does not forward."""
    return (
        f"SSH is forbidden to forward to {target} there (AllowTcpForwarding or PermitOpen in sshd_config); ask the "
        "administrators, or run agent_infra on the login host itself, without cluster.ssh"
    )


def hold_port() -> socket.socket:
    """A socket on a free port of 127.0.0.1: as long as it is open, processes of this user alone can listen there.

    It refuses connections while none does: with SO_REUSEPORT Linux lets a port be shared by the sockets of one user.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _bind_held(server: Any) -> None:
    """In place of a socketserver's ``server_bind``, to listen on a port that another process holds."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.socket.bind(server.server_address)
    server.server_address = server.socket.getsockname()


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


def _hold_openssh(spec: Mapping[str, Any]) -> str:
    """Run an ssh that is a ControlMaster until it ends, which is always an error: HostUnreachableError, LoginError."""
    control, route = Path(spec["socket"]), route_from_json(spec["route"])
    log = control.with_suffix(".log")  # what ssh says meanwhile, for the parent to read
    for leftover in (control, log):  # of a master that was killed
        leftover.unlink(missing_ok=True)
    with open(_open_log(log), "ab") as errors:
        process = subprocess.Popen(
            spec["argv"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, preexec_fn=_die_along
        )
        is_told = False
        while process.poll() is None:
            if not is_told and control.exists():
                _tell({"ports": []})
                is_told = True
            if os.fstat(errors.fileno()).st_size > 1 << 20:  # a line for each connection that was refused
                errors.truncate(0)
            time.sleep(0.2 if is_told else 0.02)
    said = log.read_text(encoding="utf-8", errors="replace")
    runner = LocalCommands(os.environ)
    raise explain_openssh(said, route, lambda asked: () if asked.proxy_command else scan_host_keys(asked, runner))


def _die_along() -> None:
    """Ask the kernel to end this process when the thread that started it is gone (PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


# --- OpenSSH: one master a host, over which commands and ports go. ---------------------------------------------------

# What ssh says on stderr when it gives up: a pattern, what that means and what to do, the error that it is.
_OPENSSH_SAYINGS: tuple[tuple[str, str, type[HostUnreachableError]], ...] = (
    (r"REVOKED HOST KEY|host key .*revoked", "its host key is revoked; ask the cluster's administrators", LoginError),
    (
        r"Permission denied \((\S+)\)",
        "permission denied ({0}): is the user right, and the public key in ~/.ssh/authorized_keys there? A key with a "
        "passphrase has to be in the agent (ssh-add) where nobody can be asked",
        LoginError,
    ),
    (r"Too many authentication failures", "the agent offered too many keys; name one in identity_file", LoginError),
    (r"Connection refused", "it refuses connections; check host and port; does its sshd run?", HostUnreachableError),
    (
        r"Could not resolve hostname ([^\s:]+)",
        "{0} is not known here; check cluster.ssh.host, or HostName in ssh_config; is a VPN needed?",
        HostUnreachableError,
    ),
    (
        r"timed out|No route to host|Network is unreachable",
        "it does not answer; is a VPN or a firewall in the way?",
        HostUnreachableError,
    ),
    (r"administratively prohibited|forwarding failed.*prohibited", "forwarding is forbidden there", LoginError),
)


def explain_openssh(
    said: str, route: SshRoute, scan: Callable[[SshRoute], Sequence[tuple[str, str]]]
) -> HostUnreachableError:
    """What an ssh that gave up said on stderr, as an error that carries the fix; ``scan`` asks a host for its keys."""
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        shown = re.search(r"SHA256:\S+", said)
        return HostKeyError(_changed_host(route, shown[0].rstrip(".") if shown else "a new one"))
    if re.search(r"No \S+ host key is known|Host key verification failed", said):
        keys = scan(route)
        if keys:
            return HostKeyError(_unknown_host(route, *keys[0]))
        return HostKeyError(
            f"host key of {route.key_name} is not known; compare what `ssh {route.alias}` shows with what the "
            f"cluster's administrators publish, and let it add the key to {route.known_hosts[0]}"
        )
    for pattern, meaning, kind in _OPENSSH_SAYINGS:
        if found := re.search(pattern, said):
            return kind(f"{route.user}@{route.alias}: {meaning.format(*found.groups())}")
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "the connection was lost")
    return HostUnreachableError(f"{route.user}@{route.alias}: {line}")


def scan_host_keys(route: SshRoute, runner: CommandRunner) -> list[tuple[str, str]]:
    """(type, base64) of the keys that a host shows to ``runner``'s host; none where it does not answer."""
    done = runner.run(["ssh-keyscan", "-T", "5", "-p", str(route.port), "--", route.host], timeout_s=30.0)
    lines = (line.split() for line in done.output.decode("ascii", "replace").splitlines())
    found = [(words[1], words[2]) for words in lines if len(words) == 3 and not words[0].startswith("#")]
    return sorted(found, key=lambda entry: "ed25519" not in entry[0])


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
    return _route_of(ssh, alias, options)


def node_keys(route: SshRoute, login: CommandRunner) -> tuple[tuple[str, str], ...]:
    """The keys of a compute node unknown to known_hosts, as the login host sees them, whose own key was checked."""
    if read_host_keys(route):
        return ()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", route.host):
        raise LoginError(f"{route.host!r} is no name of a node")
    keys = scan_host_keys(route, login)
    if not keys:
        raise HostUnreachableError(
            f"no SSH answers on node {route.host}:{route.port}, as the login host sees it. If compute nodes run no "
            "sshd here, set cluster.tunnel to login"
        )
    return tuple(keys)


class LoginHost:
    """The host from which the cluster is used: picks the driver, logs in once, for commands and tunnels alike.

    A CommandRunner. Nothing is connected before the first command.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        environment: Mapping[str, str],
        control_name: str,
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``ask`` asks the operator (None: nobody is there); ``control_name`` tells the deployment from others."""
        if cluster.ssh is None:
            raise AgentInfraError("cluster.ssh is not set; commands run here")
        self.ssh, self._wanted, self._environment = cluster.ssh, cluster.tunnel_driver, environment
        self._control_name, self._ask = control_name, ask
        self._lock = threading.Lock()
        self._commands: SshCommands | OpenSshCommands | None = None
        self._is_controller = False
        self.reason = ""  # why this driver, once one was chosen

    @property
    def driver(self) -> str:
        """``sshtunnel`` or ``openssh``; what is likely, until the first command or tunnel has connected."""
        is_openssh = isinstance(self._commands, OpenSshCommands) or self._wanted == "openssh"
        return "openssh" if is_openssh else "sshtunnel"

    def lead(self) -> None:
        """This process is the controller: the deployment's others may use its connection, it uses none of theirs."""
        self._is_controller = True
        if isinstance(self._commands, OpenSshCommands):
            self._commands.login.is_shared = True

    def commands(self) -> SshCommands | OpenSshCommands:
        """The runner, chosen and connected at its first use."""
        with self._lock:
            if self._commands is None:
                self._commands = self._choose()
            return self._commands

    def _choose(self) -> SshCommands | OpenSshCommands:
        if self._wanted == "openssh":
            return self._openssh("cluster.tunnel_driver says so")
        why = why_openssh(self.ssh) if self._wanted == "auto" else None
        if why is not None:
            return self._openssh(why)
        commands = SshCommands(ssh_route(self.ssh, self.ssh.host), self._ask)
        try:
            commands.connect()
        except InteractiveLoginError:
            if self._wanted != "auto":
                raise
            return self._openssh("the login asks for more than a key")
        except HostUnreachableError as error:
            if isinstance(error, LoginError):
                raise
        self.reason = "cluster.tunnel_driver says so" if self._wanted != "auto" else "ssh_config asks for nothing more"
        return commands

    def _openssh(self, reason: str) -> OpenSshCommands:
        self.reason = reason
        commands = OpenSshCommands(self.ssh, self._environment, self._control_name, self._ask is not None)
        commands.login.is_shared = self._is_controller
        return commands

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self.commands().run(argv, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._commands is not None:
                self._commands.close()
                self._commands = None


# --- The tunnels of a deployment: one a replica, opened, proven, watched and replaced. -------------------------------
@dataclass(frozen=True)
class TunnelTarget:
    """What a tunnel leads to; another one is another tunnel."""

    replica: str
    model: str
    process: str  # stamp of its `serve`
    restarts: int  # of its engine
    node: str
    host: str  # address that the engine listens on, as the node sees it
    port: int
    telemetry_port: int | None
    is_guarded: bool  # whether the engine itself answers the keyed challenge
    mode: str  # login | node | none

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Host and port of the engine and of `serve`, as seen from where the last SSH connection ends."""
        host = "127.0.0.1" if self.mode == "node" else self.node if self.host in _WILDCARDS else self.host
        return [(host, port) for port in (self.port, self.telemetry_port) if port is not None]

    @property
    def identities(self) -> list[str]:
        """For whom the servers at the ends answer the keyed challenge."""
        return [server_identity(self.replica, self.node, port) for _, port in self.ends]


@dataclass(frozen=True)
class TunnelState:
    """How a tunnel does: ``up`` | ``connecting`` | ``suspect`` (silent for a while) | ``down`` (tried again later)."""

    state: str
    reconnects: int
    reason: str | None
    driver: str  # sshtunnel | openssh | direct
    mode: str


_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 (a comparison)


def tunnel_mode(wanted: str, has_login: bool, record: ReplicaRecord, here: str) -> tuple[str, str]:
    """How requests reach a replica, login | node | none, and why; ``here`` is this machine's name."""
    if wanted != "auto":
        return wanted, "cluster.tunnel says so"
    is_hidden = record.host.startswith("127.") or record.host in ("localhost", "::1")
    if not has_login and record.node == here:
        return "none", "they run on this machine"
    if is_hidden:
        return "node", "the engine listens on its node's loopback alone"
    if has_login:
        return "login", "the login host reaches the nodes"
    return "none", "the nodes are reached from here"


def proves_key(host: str, port: int, key: str, identity: str, engine_port: int | None = None) -> bool | None:
    """Whether the server there shows that it is ``identity`` and knows ``key``, untold; None when it does not answer.

    With ``engine_port`` it is `serve`, which also vouches that no other user listens on that port of its node.
    """
    nonce = os.urandom(16).hex()
    suffix = "" if engine_port is None else f"&port={engine_port}"
    status, body = http_get(host, port, f"{CHALLENGE_PATH}?nonce={nonce}{suffix}")
    if status == 0:
        return None
    message = f"{nonce}:{identity}" + ("" if engine_port is None else f":{engine_port}")
    return status == 200 and answer_challenge(key, message).encode() in body


class Link(Protocol):
    """An open way to a replica's ports; owned by one Tunnel."""

    driver: str  # sshtunnel | openssh | direct
    host: str
    ports: tuple[int, ...]  # of the engine and, where there is one, of `serve`

    def broke(self) -> str | None:
        """Why the way is closed; None while it is open."""

    def complaint(self) -> str | None:
        """What is known about why nothing answers at its other end."""

    def close(self, is_silent: bool = False) -> None:
        """Close it, and with it every connection that goes through it; ``is_silent``: nothing came back for long."""


class DirectLink:
    """No tunnel: the replica's own address."""

    driver = "direct"

    def __init__(self, target: TunnelTarget) -> None:
        """HostUnreachableError where the node's name is not known here; the relay asks no resolver."""
        host, port = target.ends[0]
        try:
            self.host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise HostUnreachableError(
                f"{host} is not known here ({error.strerror}); set cluster.ssh, or cluster.tunnel"
            ) from error
        self.ports = tuple(port for _, port in target.ends)

    def broke(self) -> str | None:
        return None

    def complaint(self) -> str | None:
        return None

    def close(self, is_silent: bool = False) -> None:
        pass


class ChildLink:
    """Ports that a `tunnel` process of the replica's own forwards (sshtunnel)."""

    driver = "sshtunnel"
    host = "127.0.0.1"

    def __init__(self, child: TunnelChild, ports: tuple[int, ...], leave: Callable[[], None]) -> None:
        """``leave`` is called once the ports are closed."""
        self._child, self.ports, self._leave = child, ports, leave

    def broke(self) -> str | None:
        return None if self._child.is_alive else self._child.last_words() or "the tunnel process ended"

    def complaint(self) -> str | None:
        return None

    def close(self, is_silent: bool = False) -> None:  # noqa: ARG002 (all of it ends anyway)
        self._child.close()
        self._leave()


class MasterLink:
    """Ports that OpenSSH forwards over the connection to a host, which other replicas may share."""

    driver = "openssh"
    host = "127.0.0.1"

    def __init__(self, master: OpenSshMaster, targets: Sequence[tuple[str, int]], is_nodes: bool) -> None:
        """``is_nodes``: the connection leads to the replica's own node, so that its silence is the connection's."""
        self._master, self._targets, self._is_nodes = master, targets, is_nodes
        self.ports: tuple[int, ...] = ()
        try:
            for target in targets:
                self.ports += (master.forward(target),)
        except BaseException:
            self.close()
            raise

    def broke(self) -> str | None:
        return None if self._master.is_alive else "the SSH connection was lost"

    def complaint(self) -> str | None:
        return self._master.complaint()

    def close(self, is_silent: bool = False) -> None:
        if is_silent and self._is_nodes:
            self._master.close()
        if self._master.is_alive:
            for port, target in zip(self.ports, self._targets, strict=False):
                self._master.cancel(port, target)


class Tunnel:
    """The way to one replica: opens it, proves whose server is at its end, watches and replaces it. Owns its thread."""

    def __init__(
        self,
        target: TunnelTarget,
        driver: str,
        open_link: Callable[[TunnelTarget, Callable[[], bool]], Link],
        key: str,
        starts: tuple[threading.Semaphore, threading.Semaphore],
    ) -> None:
        """``open_link`` takes the target and whether to give up.  ``starts`` bounds how many log in at once, and how
        many of those that failed repeatedly, so that nodes which are dead wait for each other alone.

        ``driver`` is what is likely, until a link says its own.
        """
        self.target, self._open, self._key, self._starts = target, open_link, key, starts
        self._stop = threading.Event()
        self._backoff_s = 0.0
        self.state = TunnelState("connecting", 0, None, driver, target.mode)  # replaced as a whole
        self.ends: tuple[str, tuple[int, ...]] | None = None  # host and ports of this side, while it stands
        self.lost_at = time.monotonic()  # since when there are no ends
        self._thread = threading.Thread(target=self._run, name=f"tunnel {target.replica}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have the thread close everything; returns at once."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _say(self, state: str, reason: str | None = None, reconnects: int = 0) -> None:
        self.state = dataclasses.replace(
            self.state, state=state, reason=reason, reconnects=self.state.reconnects + reconnects
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            reason = None
            try:
                reason = self._live()
            except HostUnreachableError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001  whatever it is: a tunnel is tried again, and says why it is not there
                reason = f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                return
            self._say("down", reason, reconnects=1)
            least, most = TUNNEL_BACKOFF_S
            self._backoff_s = min(most, max(least, 2 * self._backoff_s))
            # Spread: many tunnels that one cause has broken must not all log in at the same moment.
            self._stop.wait(self._backoff_s * (1 + secrets.randbelow(1000) / 1000))
            self._say("connecting", reason)

    def _live(self) -> str:
        """One life of the tunnel, from its opening to its end; why it ended."""
        with self._starts[self._backoff_s > TUNNEL_BACKOFF_S[0]]:
            link = self._open(self.target, self._stop.is_set)
        is_silent = False
        self.state = dataclasses.replace(self.state, driver=link.driver)
        try:
            self._prove(link)
            if not self._stop.is_set():
                self.ends = (link.host, link.ports)
                self._say("up")
            why = self._watch(link)
            is_silent = why is None
            return why or f"silent for {REPLACED_AFTER_S:g} s"
        finally:
            if self.ends is not None:
                self.ends, self.lost_at = None, time.monotonic()
            link.close(is_silent)

    def _prove(self, link: Link) -> None:
        """Return once the servers at the other end have shown that they know the key; HostUnreachableError."""
        deadline = time.monotonic() + SSH_PATIENCE_S
        while not self._stop.is_set():
            answers = list(self._ask(link))
            if all(answers):
                return
            if False in answers:
                raise LoginError(
                    f"another program's server answers on {self.target.node}:{self.target.port}; it gets neither key "
                    "nor request. If nothing else explains it, tell the administrators"
                )
            broken = link.broke() or link.complaint()
            if broken or time.monotonic() > deadline:
                raise HostUnreachableError(broken or f"nothing answers on {self.target.node}:{self.target.port}")
            self._stop.wait(0.2)

    def _ask(self, link: Link) -> Iterator[bool | None]:
        """The challenges of `serve` and, where it can answer, of the engine: at its start, and then `serve` alone."""
        if len(link.ports) < 2 and not self.target.is_guarded:
            yield False  # there is nobody to ask, and what proves nothing gets nothing
        if len(link.ports) > 1:
            vouched = None if self.target.is_guarded else self.target.port
            yield proves_key(link.host, link.ports[1], self._key, self.target.identities[1], vouched)
        if self.target.is_guarded:
            yield proves_key(link.host, link.ports[0], self._key, self.target.identities[0])

    def _watch(self, link: Link) -> str | None:
        """Probe until the tunnel breaks; why, and None when it was silent for too long."""
        probed = started = heard = time.monotonic()
        while not self._stop.wait(0.2):
            now = time.monotonic()
            if broken := link.broke():
                return broken
            if now - probed < TUNNEL_PROBE_S:
                continue
            probed = now
            # `serve` answers while its engine is busy, hangs or starts anew, so it tells of the way alone.
            answer = proves_key(link.host, link.ports[-1], self._key, self.target.identities[-1], self.target.port)
            if answer is False:
                return "another program's server answers there"
            if answer is not None:
                heard = time.monotonic()
                if self.state.state != "up":
                    self._say("up")
                if now - started > REPLACED_AFTER_S:
                    self._backoff_s = 0.0
            elif now - heard > REPLACED_AFTER_S:
                return None
            elif now - heard > SUSPECT_AFTER_S:
                self._say("suspect", f"silent for {now - heard:.0f} s")
        return "closed"


class TunnelSet:
    """The tunnels of a deployment's replicas, for as long as they run; owns them. Safe to use from several threads."""

    def __init__(self, cluster: ClusterConfig, login: LoginHost | None, key: str) -> None:
        """``login``: the host that commands run on, None where that is here; ``key``: the replicas'."""
        self._cluster, self._login, self._key = cluster, login, key
        self._lock = threading.Lock()
        self._starts = threading.Semaphore(LOGINS_AT_ONCE), threading.Semaphore(LOGINS_AT_ONCE)
        self._tunnels: dict[str, Tunnel] = {}
        self._reasons: dict[str, str] = {}  # mode → why
        self._node_keys: dict[str, tuple[tuple[str, str], ...]] = {}
        self._left: deque[tuple[float, list[socket.socket]]] = deque()  # ports that were left: held until then
        self._is_closed = False

    def follow(self, records: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
        """The same records with this side's ports; a replica whose tunnel does not stand is loading for a while.

        Opens and closes tunnels as records come, change and go; waits for none.
        """
        wanted = {target.replica: target for record in records if (target := self._target(record))}
        driver = self._login.driver if self._login is not None else "sshtunnel"
        with self._lock:
            while self._left and self._left[0][0] < time.monotonic():
                self._close_oldest()
            for replica in [name for name, tunnel in self._tunnels.items() if tunnel.target != wanted.get(name)]:
                self._tunnels.pop(replica).stop()
            for replica, target in wanted.items() if not self._is_closed else ():
                if replica not in self._tunnels:
                    kind = "direct" if target.mode == "none" else driver
                    self._tunnels[replica] = Tunnel(target, kind, self.open_link, self._key, self._starts)
            return [self._through(record) for record in records]

    def states(self) -> dict[str, TunnelState]:
        """How each replica's tunnel does; those that are reached without one are left out."""
        with self._lock:
            return {replica: tunnel.state for replica, tunnel in self._tunnels.items() if tunnel.target.mode != "none"}

    def awaited(self) -> frozenset[str]:
        """Models of which a replica may speak again in a moment: their turns wait for it rather than be refused."""
        with self._lock:
            return frozenset(t.target.model for t in self._tunnels.values() if t.state.state == "suspect")

    def rows(self) -> dict[str, dict[str, Any]]:
        """The states as /stats shows them."""
        return {replica: dataclasses.asdict(state) for replica, state in self.states().items()}

    def describe(self) -> list[str]:
        """Lines for the operator: what modes are in use and why, and with which driver."""
        with self._lock:
            lines = [f"tunnel {mode}: {reason}" for mode, reason in sorted(self._reasons.items())]
        if self._login is not None and self._login.reason and self._reasons.keys() - {"none"}:
            lines.append(f"driver {self._login.driver}: {self._login.reason}")
        return lines

    def close(self) -> None:
        """Close all tunnels; one that is at a login does so when that ends, or this process does."""
        with self._lock:
            self._is_closed = True
            tunnels, self._tunnels = list(self._tunnels.values()), {}
        for tunnel in tunnels:
            tunnel.stop()
        deadline = time.monotonic() + TUNNELS_CLOSE_S
        for tunnel in tunnels:
            tunnel.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            while self._left:
                self._close_oldest()

    def _leave(self, held: list[socket.socket]) -> None:
        """Keep the ports of a tunnel that ended from other users until the relay has heard of it."""
        with self._lock:
            self._left.append((time.monotonic() + PORT_HELD_S, held))
            if self._is_closed:
                self._close_oldest()

    def _close_oldest(self) -> None:
        for held in self._left.popleft()[1]:
            held.close()

    def _target(self, record: ReplicaRecord) -> TunnelTarget | None:
        """Where a replica that serves is to be reached; None for one that does not."""
        if record.state not in ("ready", "draining") or record.port is None:
            return None
        mode, why = tunnel_mode(self._cluster.tunnel, self._login is not None, record, os.uname().nodename)
        self._reasons[mode] = why
        engine = ENGINES.get(record.engine)
        return TunnelTarget(
            replica=record.replica,
            model=record.model,
            process=record.process,
            restarts=record.restarts,
            node=record.node,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            is_guarded=engine is not None and engine.is_guarded,
            mode=mode,
        )

    def _through(self, record: ReplicaRecord) -> ReplicaRecord:
        tunnel = self._tunnels.get(record.replica)
        if tunnel is None:
            return record
        ends, state = tunnel.ends, tunnel.state
        message = f"tunnel {state.state}" + (f": {state.reason}" if state.reason else "")
        if ends is not None:
            host, ports = ends
            record = dataclasses.replace(
                record, host=host, port=ports[0], telemetry_port=ports[1] if len(ports) > 1 else None
            )
            # No new turns: one that another silent replica has lost already must not be sent into this silence.
            if state.state == "suspect" and record.state == "ready":
                record = dataclasses.replace(record, state="draining", message=message)
            return record
        # For a while turns may wait for it, as they do for a replica that loads; then they are told.
        is_coming = record.state == "ready" and time.monotonic() - tunnel.lost_at < FORGIVING_S
        return dataclasses.replace(
            record, port=None, telemetry_port=None, message=message, state="loading" if is_coming else record.state
        )

    def open_link(self, target: TunnelTarget, should_stop: Callable[[], bool]) -> Link:
        """Open the way to a replica; HostUnreachableError. Called by the tunnels' threads."""
        if target.mode == "none":
            return DirectLink(target)
        deadline = time.monotonic() + 2 * SSH_PATIENCE_S
        commands = self._login.commands() if self._login is not None else None
        if isinstance(commands, OpenSshCommands):
            commands.login.ensure(deadline, should_stop)
            master = commands.login
            if target.mode == "node":
                master = commands.node(target.node)
                try:
                    master.ensure(deadline, should_stop)
                except HostKeyError:  # installed anew, perhaps: the next attempt knows its new keys
                    with contextlib.suppress(HostUnreachableError, OSError):
                        commands.learn_keys(target.node)
                    raise
            return MasterLink(master, target.ends, is_nodes=target.mode == "node")
        hops, keyring = self._hops(target, commands)
        with contextlib.ExitStack() as undone:
            held = [undone.enter_context(hold_port()) for _ in target.ends]
            spec = {
                "driver": "sshtunnel",
                "hops": [dataclasses.asdict(hop) for hop in hops],
                "keyring": dataclasses.asdict(keyring),
                "local": [each.getsockname()[1] for each in held],
                "remote": target.ends,
            }
            child = TunnelChild(spec, None)
            undone.callback(child.close)
            try:
                link = ChildLink(child, child.wait_ready(deadline, should_stop), functools.partial(self._leave, held))
            except HostKeyError:  # installed anew, perhaps: the next attempt asks for its keys
                with self._lock:
                    self._node_keys.pop(target.node, None)
                raise
            undone.pop_all()
            return link

    def _hops(self, target: TunnelTarget, login: SshCommands | None) -> tuple[list[SshRoute], Keyring]:
        """The hosts that a tunnel goes through by paramiko, with the keys that they must show."""
        if login is None:
            if target.mode == "login":
                raise LoginError("cluster.tunnel: login needs cluster.ssh, the host to go through")
            return [ssh_route(SshConfig(host=target.node), target.node)], Keyring()
        if self._login is None or target.mode == "login":
            return [login.route], login.keyring
        route = ssh_route(self._login.ssh, target.node)
        with self._lock:
            keys = self._node_keys.get(target.node)
        if keys is None:
            keys = node_keys(route, login)
            with self._lock:
                self._node_keys[target.node] = keys
        return [login.route, dataclasses.replace(route, host_keys=keys)], login.keyring

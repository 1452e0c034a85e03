"""Logs in to a host with paramiko, checks its key, and runs commands over the connection."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.host import CommandResult, HostUnreachableError
from agent_infra_core.ssh.host_keys import explain_changed_host, explain_unknown_host, key_fingerprint, read_host_keys
from agent_infra_core.ssh.routes import (
    SSH_KEEPALIVE_S,
    SSH_PATIENCE_S,
    HostKeyError,
    InteractiveLoginError,
    Keyring,
    LoginError,
    SshRoute,
    load_paramiko,
    public_half,
)
from agent_infra_core.ssh.shell import LINE, framed_input, unframed, unframed_chunks


def log_in(route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, through: Any = None) -> Any:
    """Check the key of the host of ``route``, log in, and return the authenticated paramiko.Transport.

    ``through`` is a paramiko channel to the host; ``ask`` prompts the operator for a passphrase. Raises
    HostUnreachableError, or LoginError when a retry cannot help.
    """
    paramiko = load_paramiko()
    sock = _connect_socket(route) if through is None else through
    transport = None
    try:
        transport = paramiko.Transport(sock)
        transport.daemon = True
        security = transport.get_security_options()
        security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)  # two thirds of the CPU
        _verify_host(transport, route)
        _authenticate(transport, route, keyring, ask)
        transport.set_keepalive(SSH_KEEPALIVE_S)
        return transport
    except BaseException:
        close_connection(transport, sock)
        raise


def close_connection(transport: Any, sock: Any = None) -> None:
    """Close a transport, or the ``sock`` that it was to use, and end its ProxyCommand, which paramiko doesn't.

    Never raises, even if the connection is broken and paramiko cannot send its goodbye.
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
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):  # its own child may have the pipes
            process.communicate(timeout=5.0)


@contextlib.contextmanager
def _close_after(transport: Any, seconds: float) -> Iterator[None]:
    """Close the connection if the block takes longer: paramiko would wait for ever for a host that fell silent."""
    alarm = threading.Timer(max(0.1, seconds), close_connection, (transport,))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _connect_socket(route: SshRoute) -> Any:
    """Connect to a host's SSH port, directly or through its ProxyCommand. Raises HostUnreachableError."""
    where = f"{route.host}:{route.port}"
    if route.proxy_command:
        try:
            proxy = load_paramiko().ProxyCommand(route.proxy_command)
        except (OSError, ValueError) as error:
            raise LoginError(f"ProxyCommand {route.proxy_command!r} of {route.alias} cannot be run: {error}") from error
        # paramiko's own close() signals a pid that may be reused, or gone: then paramiko's thread fails.
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
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise each answer waits 40 ms for an ACK
    return sock


def _verify_host(transport: Any, route: SshRoute) -> None:
    """Do SSH's key exchange and check the host's key against known_hosts."""
    paramiko = load_paramiko()
    known = read_host_keys(route)
    trusted = [(kind, key) for marker, kind, key in known if not marker]
    revoked = [key for marker, _, key in known if marker == "@revoked"]
    if trusted:
        # A host with several keys presents the type that the client asks for, so ask for the known types.
        kinds = {kind for kind, _ in trusted}
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
        security = transport.get_security_options()
        security.key_types = [kind for kind in security.key_types if kind in kinds] or security.key_types
    try:
        transport.start_client(timeout=SSH_PATIENCE_S)
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise HostKeyError(explain_changed_host(route, "none of the known types") if trusted else str(error)) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        by = f" by {route.proxy_command!r}" if route.proxy_command else ""
        raise HostUnreachableError(
            f"{route.alias} ({route.host}:{route.port}) does not speak SSH{by}: {str(error) or 'it hung up'}; "
            "is it the right port, or does it refuse that many connections?"
        ) from error
    shown = transport.get_remote_server_key()
    kind, key = shown.get_name(), shown.get_base64()
    if key in revoked:
        raise LoginError(f"host key {key_fingerprint(key)} of {route.key_name} is revoked; ask the administrators")
    if (kind, key) not in trusted:
        raise HostKeyError(
            explain_changed_host(route, f"{kind} {key_fingerprint(key)}")
            if trusted
            else explain_unknown_host(route, kind, key)
        )


def _authenticate(transport: Any, route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None) -> None:
    """Offer keys until one is accepted: first the one accepted before, then the agent's, then those in files."""
    paramiko = load_paramiko()
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
                _denied(route, tried) + "; it hung up, perhaps after too many keys: set identity_file"
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
        f"permission denied for {where}; tried {', '.join(tried)}. Check the user, and that the public key is in "
        "~/.ssh/authorized_keys there, or set cluster.ssh.user or identity_file"
    )


def _offered_keys(
    route: SshRoute, keyring: Keyring, ask: Callable[[str], str] | None, tried: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield (name, key) of the keys to offer; appends a readable name of each to ``tried``.

    In this order: the key accepted before, the agent's keys that identity_file or IdentityFile names, the agent's other
    keys, key files, and files that need a passphrase. Raises LoginError if a file can't be used and no other key was
    accepted.
    """
    files = [Path(os.path.expanduser(name)) for name in route.identity_files]
    wanted = {words[1] for file in files for words in [public_half(file)] if len(words) > 1}
    unusable: dict[str, LoginError] = {}
    with contextlib.ExitStack() as held_open:  # the agent must stay connected while its keys are tried
        agent: list[Any] = []
        with contextlib.suppress(load_paramiko().SSHException, OSError):
            link = load_paramiko().Agent()
            held_open.callback(link.close)
            agent = [key for key in link.get_keys() if not route.identities_only or key.get_base64() in wanted]
        offers: list[tuple[str, Any]] = [(key.get_base64(), key) for key in agent]
        held = {name for name, _ in offers}
        private = [file for file in files if file.suffix != ".pub"]  # a .pub names a key that only the agent has
        offers += [(str(file), None) for file in private if file.exists() and not held & set(public_half(file))]
        for name, key in sorted(offers, key=lambda offer: (offer[0] != keyring.accepted, offer[0] not in wanted)):
            try:
                key = key or _load_key(name, keyring, None)
            except LoginError as error:
                unusable[name] = error
                continue
            tried.append(name if name not in held else f"the agent's {key.get_name()} {key_fingerprint(name)}")
            yield name, key
    for name, problem in unusable.items():
        if ask is None or not isinstance(problem.__cause__, TypeError):  # TypeError: it needs a passphrase
            raise problem
        tried.append(name)
        yield name, _load_key(name, keyring, ask)
    named = [file for file in files if not file.exists()]
    if route.identities_only and named and not tried:
        raise LoginError(f"key file {named[0]} does not exist; check identity_file")


def _load_key(name: str, keyring: Keyring, ask: Callable[[str], str] | None) -> Any:
    """Load a private key file, and ask for its passphrase if it has one. Raises LoginError."""
    paramiko = load_paramiko()
    phrase = keyring.passphrases.get(name)
    for attempt in range(4):
        try:
            key = paramiko.PKey.from_path(name, phrase.encode() if phrase else None)
            if phrase:
                keyring.passphrases[name] = phrase
            return key
        except TypeError as error:  # it needs a passphrase
            if ask is None:
                raise LoginError(
                    f"key {name} needs a passphrase, and nobody can be prompted; `ssh-add {shlex.quote(name)}` first"
                ) from error
        except (ValueError, OSError, paramiko.SSHException) as error:
            if phrase is None or ask is None or attempt == 3:
                fix = "wrong passphrase" if phrase else "is it a private key, and readable? Set identity_file"
                raise LoginError(f"key {name} cannot be used: {fix}") from error
        phrase = ask(f"{'wrong; ' if phrase else ''}passphrase for {name}: ")
    raise LoginError(f"key {name}: wrong passphrase")


class SshCommands:
    """Runs commands on the login host with paramiko: one connection, one channel per command. A CommandRunner."""

    def __init__(self, route: SshRoute, ask: Callable[[str], str] | None) -> None:
        self.route, self.keyring = route, Keyring()
        self._ask = ask
        self._lock = threading.Lock()
        self._transport: Any = None

    def connect(self) -> Any:
        """Return the connection; reconnects if it is broken. Raises HostUnreachableError or LoginError."""
        with self._lock:
            if self._transport is not None and not self._transport.is_active():
                close_connection(self._transport)
                self._transport = None
            if self._transport is None:
                self._transport = log_in(self.route, self.keyring, self._ask)
                self._ask = None  # nobody expects a prompt later
            return self._transport

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        deadline, nonce = time.monotonic() + timeout_s, os.urandom(8).hex()
        channel = self._open_channel(deadline)
        transport = channel.get_transport()
        broken = (load_paramiko().SSHException, EOFError, OSError)
        try:
            with _close_after(transport, min(SSH_PATIENCE_S, deadline - time.monotonic())):
                channel.exec_command(LINE)
            with _close_after(transport, deadline - time.monotonic() + 1.0):
                result = _exchange_bytes(channel, framed_input(argv, stdin, nonce), deadline)
            if result is None:
                self._drop(transport)  # it is silent but open, and would block the next command too
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
        return unframed(result, nonce, self.route.alias)

    def stream(self, argv: Sequence[str]) -> Generator[bytes, None, None]:
        nonce = os.urandom(8).hex()
        with contextlib.closing(self._open_channel(time.monotonic() + SSH_PATIENCE_S)) as channel:
            try:
                with _close_after(channel.get_transport(), SSH_PATIENCE_S):
                    channel.exec_command(LINE)
                    channel.sendall(framed_input(argv, b"", nonce))
            except (load_paramiko().SSHException, EOFError, OSError) as error:
                raise HostUnreachableError(f"the connection to {self.route.alias} broke: {error}; try again") from error
            yield from unframed_chunks(iter(lambda: channel.recv(1 << 16), b""), nonce)

    def _open_channel(self, deadline: float) -> Any:
        """Open a session; reconnects once if the connection turns out to be dead.

        Where the host allows few sessions (MaxSessions), wait for another command to end.
        """
        paramiko = load_paramiko()
        give_up_at, is_again = min(deadline, time.monotonic() + 2 * SSH_PATIENCE_S), False
        while True:
            transport, late = self.connect(), min(deadline, time.monotonic() + SSH_PATIENCE_S)
            try:
                return transport.open_session(timeout=max(0.1, late - time.monotonic()))
            except (paramiko.SSHException, EOFError, OSError) as error:
                # Threads take each other's ChannelException from paramiko, so any error may mean a refusal.
                is_refusal = isinstance(error, paramiko.ChannelException) or time.monotonic() < late
                is_dead = not (transport.is_active() and is_refusal)
                if is_dead:
                    self._drop(transport)
                if time.monotonic() > give_up_at or (is_dead and is_again):
                    raise HostUnreachableError(f"{self.route.alias} opened no session: {error}; try again") from error
                is_again = is_again or is_dead
            time.sleep(0.1)

    def _drop(self, transport: Any) -> None:
        """Close a broken connection, unless another command has already closed or replaced it."""
        with self._lock:
            if self._transport is transport and transport is not None:
                close_connection(transport)
                self._transport = None

    def close(self) -> None:
        with self._lock:
            if self._transport is not None:
                close_connection(self._transport)
                self._transport = None


def _exchange_bytes(channel: Any, stdin: bytes, deadline: float) -> CommandResult | None:
    """Send stdin to a command and read all its output. None at the deadline; OSError if the connection breaks."""
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
            except OSError:  # the command stopped reading, which isn't an error
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
                raise OSError("it was closed by the other side")
            return CommandResult(channel.recv_exit_status(), bytes(output), bytes(errors))
        if channel.eof_received:  # at EOF the channel is always readable, so poll() wouldn't wait
            time.sleep(0.01)
        else:
            ready.poll(20 if left else 200)
    return None

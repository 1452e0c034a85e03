"""The child process that holds one SSH connection with its ports, from both sides."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.host import HostUnreachableError, LocalCommands, self_command
from agent_infra_core.node.process import open_log
from agent_infra_core.ssh.host_keys import explain_changed_host, explain_unknown_host, scan_host_keys
from agent_infra_core.ssh.routes import HostKeyError, InteractiveLoginError, LoginError, SshRoute, route_from_json


# Down its stdin comes one line of JSON, what it is to be: {"driver": "sshtunnel", "hops": [SshRoute], "keyring":
# Keyring, "local": [port], "remote": [[host, port]]} or {"driver": "openssh", "argv": [word], "socket": path}. Then
# stdin only stays open: its end, however the parent ended, is the child's. Up its stdout come {"ports": [local port]}
# once it stands, or {"error": text, "kind": "login" | "interactive" | "host_key" | "host"}.
class TunnelChild:
    """A `tunnel` process; owns it and its pipes. One thread at a time uses it."""

    def __init__(self, spec: Mapping[str, Any], log: Path | None, has_terminal: bool = False) -> None:
        """Start it. With ``has_terminal`` ssh may ask the operator, and a Ctrl-C at that reaches it."""
        with open(log or os.devnull, "ab") as errors:
            self._process = subprocess.Popen(
                self_command("tunnel"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
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


def end_with_parent() -> None:
    """Wait for the end of stdin, and be gone: whatever the other threads are at, and however the parent ended."""
    try:
        os.read(0, 1)
    finally:
        os._exit(0)


def tell_parent(document: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")


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


def bind_held(server: Any) -> None:
    """In place of a socketserver's ``server_bind``, to listen on a port that another process holds."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.socket.bind(server.server_address)
    server.server_address = server.socket.getsockname()


def hold_openssh(spec: Mapping[str, Any]) -> str:
    """Run an ssh that is a ControlMaster until it ends, which is always an error: HostUnreachableError, LoginError."""
    control, route = Path(spec["socket"]), route_from_json(spec["route"])
    log = control.with_suffix(".log")  # what ssh says meanwhile, for the parent to read
    for leftover in (control, log):  # of a master that was killed
        leftover.unlink(missing_ok=True)
    with open(open_log(log), "ab") as errors:
        process = subprocess.Popen(
            spec["argv"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, preexec_fn=_die_along
        )
        is_told = False
        while process.poll() is None:
            if not is_told and control.exists():
                tell_parent({"ports": []})
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
        return HostKeyError(explain_changed_host(route, shown[0].rstrip(".") if shown else "a new one"))
    if re.search(r"No \S+ host key is known|Host key verification failed", said):
        keys = scan(route)
        if keys:
            return HostKeyError(explain_unknown_host(route, *keys[0]))
        return HostKeyError(
            f"host key of {route.key_name} is not known; compare what `ssh {route.alias}` shows with what the "
            f"cluster's administrators publish, and let it add the key to {route.known_hosts[0]}"
        )
    for pattern, meaning, kind in _OPENSSH_SAYINGS:
        if found := re.search(pattern, said):
            return kind(f"{route.user}@{route.alias}: {meaning.format(*found.groups())}")
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "the connection was lost")
    return HostUnreachableError(f"{route.user}@{route.alias}: {line}")

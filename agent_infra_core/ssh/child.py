"""Both sides of the child process that keeps one SSH connection and its forwarded ports open."""

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
from agent_infra_core.protocol import rebuild
from agent_infra_core.ssh.host_keys import explain_changed_host, explain_unknown_host, scan_host_keys
from agent_infra_core.ssh.routes import HostKeyError, InteractiveLoginError, LoginError, SshRoute


# Stdin gets one line of JSON: {"driver": "sshtunnel", "hops": [SshRoute], "keyring": Keyring, "local": [port],
# "remote": [[host, port]]} or {"driver": "openssh", "argv": [word], "socket": path, "route": SshRoute}. Then stdin
# stays open; it closes when the parent ends, even if killed, and then the child ends too. Stdout gets
# {"ports": [local port]} once connected, and {"error": text, "kind": "login" | "interactive" | "host_key" | "host"}.
class TunnelChild:
    """A `tunnel` process; owns it and its pipes. Not thread-safe."""

    def __init__(self, spec: Mapping[str, Any], has_terminal: bool = False) -> None:
        """Start the process. With ``has_terminal`` ssh may prompt the operator, and Ctrl-C reaches it."""
        self._process = subprocess.Popen(
            self_command("tunnel"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=not has_terminal,
        )
        assert self._process.stdin is not None  # noqa: S101 (for the type checker)
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait_ready() reports why
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, ...]:
        """Wait for the connection and return the local ports. Raises HostUnreachableError or a subclass if it fails."""
        line = self._read_line(deadline, should_stop)
        document = json.loads(line) if line else {}
        if "ports" in document:
            return tuple(document["ports"])
        kinds = {kind.kind: kind for kind in (LoginError, InteractiveLoginError, HostKeyError)}
        problem = document.get("error") or ("it ended without a message" if line is None else "it was too slow")
        raise kinds.get(document.get("kind", ""), HostUnreachableError)(problem)

    def last_words(self) -> str:
        """Return why a connected child ended; empty if it didn't report a reason."""
        line = self._read_line(time.monotonic() + 1.0, lambda: False)
        return str(json.loads(line).get("error", "")) if line else ""

    def _read_line(self, deadline: float, should_stop: Callable[[], bool]) -> bytes | None:
        """Read one line of output; None at its end, empty at the deadline."""
        output = self._process.stdout
        assert output is not None  # noqa: S101 (for the type checker)
        ready = select.poll()
        ready.register(output, select.POLLIN)
        while time.monotonic() < deadline and not should_stop():
            if ready.poll(100):
                return output.readline() or None
        return b""

    def close(self) -> None:
        """End the process, and with it the connection."""
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


def exit_when_stdin_closes() -> None:
    """Wait for the end of stdin, then exit at once, whatever other threads are doing."""
    try:
        os.read(0, 1)
    finally:
        os._exit(0)


def report_to_parent(document: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")


def forwarding_forbidden(target: str) -> str:
    """Return the message for an sshd that forbids forwarding to ``target``."""
    return (
        f"the host forbids forwarding to {target} (AllowTcpForwarding or PermitOpen in sshd_config); ask the "
        "administrators, or run agent_infra on the login host itself, without cluster.ssh"
    )


def reserve_local_port() -> socket.socket:
    """Reserve a free port of 127.0.0.1: while the returned socket is open, only this user's processes can listen on it.

    With SO_REUSEPORT, Linux lets sockets of one user share a port. This one doesn't listen, so until another process
    does, connections are refused.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def bind_reserved_port(server: Any) -> None:
    """Replace a socketserver's ``server_bind``, to listen on a port that another process reserves."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.socket.bind(server.server_address)
    server.server_address = server.socket.getsockname()


def run_openssh_master(spec: Mapping[str, Any]) -> str:
    """Run ssh as a ControlMaster until it ends, which is always an error: HostUnreachableError or LoginError."""
    control, route = Path(spec["socket"]), rebuild(SshRoute, spec["route"])
    log = control.with_suffix(".log")  # ssh's messages, which the parent reads
    for leftover in (control, log):  # from a master that was killed
        leftover.unlink(missing_ok=True)
    with open(open_log(log), "ab") as errors:
        process = subprocess.Popen(
            spec["argv"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, preexec_fn=_die_with_parent_thread
        )
        is_told = False
        while process.poll() is None:
            if not is_told and control.exists():
                report_to_parent({"ports": []})
                is_told = True
            if os.fstat(errors.fileno()).st_size > 1 << 20:  # ssh logs a line per refused connection
                errors.truncate(0)
            time.sleep(0.2 if is_told else 0.02)
    said = log.read_text(encoding="utf-8", errors="replace")
    runner = LocalCommands(os.environ)
    raise explain_openssh(said, route, lambda asked: () if asked.proxy_command else scan_host_keys(asked, runner))


def _die_with_parent_thread() -> None:
    """Ask the kernel to end this process when the thread that started it ends (PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


# Messages on ssh's stderr when it gives up: pattern, meaning with the fix, error class.
_OPENSSH_ERRORS: tuple[tuple[str, str, type[HostUnreachableError]], ...] = (
    (r"REVOKED HOST KEY|host key .*revoked", "its host key is revoked; ask the cluster's administrators", LoginError),
    (
        r"Permission denied \((\S+)\)",
        "permission denied ({0}): check the user, and that the public key is in ~/.ssh/authorized_keys there. A key "
        "with a passphrase must be in the agent (ssh-add) when nobody can be prompted",
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
    """Turn the stderr of an ssh that gave up into an error that includes the fix; ``scan`` fetches a host's keys."""
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
    for pattern, meaning, kind in _OPENSSH_ERRORS:
        if found := re.search(pattern, said):
            return kind(f"{route.user}@{route.alias}: {meaning.format(*found.groups())}")
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "the connection was lost")
    return HostUnreachableError(f"{route.user}@{route.alias}: {line}")

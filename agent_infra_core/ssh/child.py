"""Both sides of a `tunnel` process, which keeps one SSH connection and its forwarded ports open."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from agent_infra_core.host import (
    HostUnreachableError,
    LocalCommands,
    die_with_parent_thread,
    end_children,
    self_command,
)
from agent_infra_core.node.process import open_log
from agent_infra_core.protocol import rebuild
from agent_infra_core.ssh.host_keys import explain_changed_host, explain_unknown_host, scan_host_keys
from agent_infra_core.ssh.routes import (
    ForwardingForbiddenError,
    HostKeyError,
    InteractiveLoginError,
    LoginError,
    SshRoute,
)


# Stdin gets lines of JSON. The first says where to log in: {"driver": "sshtunnel", "hop": SshRoute, "keyring": Keyring}
# or {"driver": "openssh", "argv": [word], "socket": path, "route": SshRoute}. With sshtunnel, further lines ask for
# forwards: {"open": number, "via": SshRoute | null, "is_exec": bool, "node": name | null, "local": [port],
# "remote": [[host, port]]} and {"close": number, "is_silent": bool}. Stdin closes when the parent ends, even if killed,
# and then the child ends too. Stdout gets {} once connected, {"forward": number} for each forward that is open,
# {"forward": number, "error": text, "kind": …} when one can't be opened or is lost, and {"error": text, "kind": "login"
# | "interactive" | "host_key" | "forbidden" | "host"} at the end.
class TunnelChild:
    """A `tunnel` process; owns it, its pipes and the thread that reads what it reports. Thread-safe."""

    def __init__(self, spec: Mapping[str, Any], has_terminal: bool = False) -> None:
        """Start the process. With ``has_terminal`` ssh may prompt the operator, and Ctrl-C reaches it."""
        self._process = subprocess.Popen(
            self_command("tunnel"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=not has_terminal,
        )
        self._changed = threading.Condition()  # guards what follows
        self._said: Mapping[str, Any] | None = None  # the latest report of the connection
        self._forwards: dict[int, Mapping[str, Any] | None] = {}  # number → its latest report
        self._last = 0
        self._is_over = False  # it reports nothing more
        self._wakes: list[Callable[[], None]] = []
        self._reader = threading.Thread(target=self._read, name="tunnel reports", daemon=True)
        self._reader.start()
        self._tell(spec)

    def _tell(self, document: Mapping[str, Any]) -> None:
        """Send a line. If the process has ended, wait_ready() or problem() reports why."""
        pipe = self._process.stdin
        assert pipe is not None  # noqa: S101 (for the type checker)
        with self._changed, contextlib.suppress(BrokenPipeError, ValueError):
            pipe.write(json.dumps(document).encode() + b"\n")
            pipe.flush()

    def _read(self) -> None:
        """Note what the process reports, until it ends; a thread runs this."""
        assert self._process.stdout is not None  # noqa: S101 (for the type checker)
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                document = json.loads(line)
                number = document.get("forward")
                with self._changed:
                    if number is None:
                        self._said = document
                    elif number in self._forwards:
                        self._forwards[number] = document
                    self._notify()
        with self._changed:
            self._is_over = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakes:
            wake()

    def watch(self, wake: Callable[[], None]) -> None:
        """Have ``wake``, which must not block, called whenever problem() may have changed."""
        with self._changed:
            self._wakes.append(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._wakes.remove(wake)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for the connection. Raises HostUnreachableError or a subclass if it fails."""
        self._await(lambda: self._said, deadline, should_stop)

    def forward(self, request: Mapping[str, Any], deadline: float, should_stop: Callable[[], bool]) -> int:
        """Open a forward and return its number; ``request`` has all fields but "open".

        Raises HostUnreachableError or a subclass.
        """
        with self._changed:
            self._last += 1
            number = self._last
            self._forwards[number] = None
        self._tell({**request, "open": number})
        try:
            self._await(lambda: self._forwards[number], deadline, should_stop)
        except BaseException:
            self.cancel(number)
            raise
        return number

    def cancel(self, number: int, is_silent: bool = False) -> None:
        """Close a forward and every connection through it. ``is_silent``: nothing was heard through it for a while."""
        self._tell({"close": number, "is_silent": is_silent})
        with self._changed:
            self._forwards.pop(number, None)

    def problem(self, number: int | None = None) -> str | None:
        """Return why the connection, or one of its forwards, is closed; None while it is open."""
        if not self.is_alive:
            self._reader.join(1.0)  # its last words
            return str((self._said or {}).get("error") or "the tunnel process ended")
        with self._changed:
            report = self._forwards.get(number) if number is not None else self._said
        problem = (report or {}).get("error")
        return None if problem is None else str(problem)

    def _await(
        self, find: Callable[[], Mapping[str, Any] | None], deadline: float, should_stop: Callable[[], bool]
    ) -> None:
        """Wait for a report. Raises the error that it carries, or HostUnreachableError if none comes."""
        with self._changed:
            while (report := find()) is None and not self._is_over and not should_stop():
                if time.monotonic() > deadline:
                    break
                self._changed.wait(0.1)
            if report is None:
                end = self._said if self._is_over and self._said else {}
                report = {"error": "it ended without a message" if self._is_over else "it was too slow", **end}
        if problem := report.get("error"):
            kinds = (LoginError, InteractiveLoginError, HostKeyError, ForwardingForbiddenError)
            raise {kind.kind: kind for kind in kinds}.get(report.get("kind", ""), HostUnreachableError)(problem)

    def close(self) -> None:
        """End the process, and with it the connection."""
        with self._changed:
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(3.0)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


def exit_when_stdin_closes(pipe: BinaryIO) -> None:
    """Wait for the end of stdin, then exit at once, whatever other threads are doing."""
    try:
        pipe.read(1)
    finally:
        end_children()
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
            spec["argv"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, preexec_fn=die_with_parent_thread
        )
        is_told = False
        while process.poll() is None:
            if not is_told and control.exists():
                report_to_parent({})
                is_told = True
            if os.fstat(errors.fileno()).st_size > 1 << 20:  # ssh logs a line per refused connection
                errors.truncate(0)
            time.sleep(0.2 if is_told else 0.02)
    said = log.read_text(encoding="utf-8", errors="replace")
    runner = LocalCommands(os.environ)
    raise explain_openssh(said, route, lambda asked: () if asked.proxy_command else scan_host_keys(asked, runner))


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
    (
        r"administratively prohibited|forwarding failed.*prohibited",
        "forwarding is forbidden there",
        ForwardingForbiddenError,
    ),
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

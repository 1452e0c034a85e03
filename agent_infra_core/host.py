"""This machine: atomic and private files, locks, processes, ports, commands, and where the program runs from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent_infra_core.errors import AgentInfraError, RefusedError

PROBE_TIMEOUT_S = 2.0
_PROGRAM_HOME = Path(os.path.abspath(__file__)).parents[1]  # now: __file__ is relative in an archive that was named so


def program_home() -> Path:
    """What the program runs from: the folder of agent_infra.py, or the archive node.pyz."""
    return _PROGRAM_HOME


def self_command(role: str) -> list[str]:
    """The words that start this program in another role, with this Python, wherever it runs from."""
    home = program_home()
    return [sys.executable, str(home if home.is_file() else home / "agent_infra.py"), role]


def resource(name: str) -> Path:
    """A file or folder that comes with the program: beside agent_infra.py, or in an installed wheel's data."""
    for folder in (program_home(), program_home() / "agent_infra_data"):
        if (folder / name).exists():
            return folder / name
    raise RefusedError(f"{name} is not in {program_home()}; copy it there, or install the program again")


def allow_many_descriptors() -> None:
    """Raise this process's limit of open files as far as it goes without privileges."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def calm_collector() -> None:
    """For a process that has started: what was imported is for ever, and need not be walked again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def release_free_memory() -> None:
    """Give back what starting up has freed: compiling alone leaves 16 MB. Only glibc knows how."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def listener_owners(port: int) -> set[int]:
    """The users that listen on a TCP port of this machine."""
    owners = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    owners.add(int(fields[7]))
    return owners


def process_stamp(pid: int) -> str | None:
    """What tells process ``pid`` from a later one with its number (boot id and start time); None when it is gone.

    A zombie is gone: it holds no port and no file, and whoever should reap it may be slow.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def http_get(
    host: str, port: int, path: str, key: str | None = None, *, method: str = "GET", timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[int, bytes]:
    """Status and body of a request without one, whatever http_proxy says; status 0 when nothing answers in time."""
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(64 << 20)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def private_directory() -> Path:
    """A 0700 directory of this user with a short path, for locks and sockets; RefusedError where it is another's."""
    import tempfile

    directory = Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RefusedError(f"{directory} is not a directory of yours alone (0700); remove it, or set TMPDIR")
    return directory


def is_free(port: int) -> bool:
    """Whether nothing listens on ``port`` at any address of this machine."""
    with socket.socket() as probe:
        # As servers do: connections of an engine that just ended (TIME_WAIT) do not keep its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the flock of ``path``; the kernel frees it with its holder, however that ends.

    Raises RefusedError when another process still holds it after ``timeout_s``, OSError when it cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"another agent_infra process has held {path} for {timeout_s:g} s; let it finish, or end it"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def create_atomically(path: Path, text: str) -> bool:
    """Create ``path`` (0600) with ``text``, whole or not at all; False, and nothing changed, where it exists."""
    temporary = path.with_name(f".{path.name}.new.{os.getpid()}.{threading.get_ident()}")
    write_atomically(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def end_process(pid: int, stamp: str, grace_s: float) -> None:
    """SIGTERM, ``grace_s`` to end, then SIGKILL; only the very process that ``stamp`` tells, never its number's heir.

    Returns when it is gone, or after 10 s more (a process in uninterruptible sleep cannot be ended).
    """
    steps = ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)) if grace_s > 0 else ((signal.SIGKILL, 10.0),)
    for number, patience_s in steps:
        if process_stamp(pid) != stamp:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while process_stamp(pid) == stamp and time.monotonic() < deadline:
            time.sleep(0.02)


@dataclass(frozen=True)
class CommandResult:
    """How a command on the cluster's host ended."""

    status: int  # exit code; negative: ended by that signal
    output: bytes
    errors: bytes


class HostUnreachableError(AgentInfraError):
    """The cluster's host, not the command, failed; says nothing about the jobs. The message carries the fix."""


class CommandRunner(Protocol):
    """Runs commands on the host from which the cluster is used; safe to use from several threads."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run ``argv`` to its end, whatever its exit code; HostUnreachableError when the host cannot be asked."""

    def close(self) -> None:
        """Give back what the runner holds."""


class LocalCommands:
    """Commands run on this machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        try:
            # A group of its own: at the deadline what a shell has started ends too, else it would hold the pipes open.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            return CommandResult(127, b"", f"{error.filename}: not found".encode())  # as a shell says it
        except OSError as error:
            raise HostUnreachableError(f"`{argv[0]}` cannot be started here: {error.strerror}") from error
        with process:
            try:
                output, errors = process.communicate(stdin, timeout_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise HostUnreachableError(
                    f"`{argv[0]}` gave no answer within {timeout_s:g} s; is the file system or the scheduler hung?"
                ) from error
        return CommandResult(process.returncode, output, errors)

    def close(self) -> None:
        pass


def is_listening(host: str, port: int) -> bool:
    """Whether anything accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


@contextlib.contextmanager
def unix_address(path: str) -> Iterator[str]:
    """What to bind or connect a Unix socket to for ``path``: itself, or a short name for it while the block runs.

    The kernel takes about 100 bytes; a longer path is reached through its directory's descriptor.
    """
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def listen_on(host: str, port: int) -> socket.socket:
    """A listening TCP socket; RefusedError, with the fix, when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        fix = "set proxy.host to an address of this machine"
        if error.errno == errno.EADDRINUSE:
            fix = "end the program that listens there, or set proxy.port (or --port) to a free one"
        elif error.errno == errno.EACCES:
            fix = "set proxy.port to one above 1023"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise RefusedError(f"the proxy cannot listen on {host}:{port}: {reason}; {fix}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; neither a full disk nor half a surrogate pair stops the service."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(line + "\n")

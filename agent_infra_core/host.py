"""This machine: atomic and private files, locks, processes, ports, commands, and the program's own location."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from agent_infra_core.errors import AgentInfraError, RefusedError

_T = TypeVar("_T")

PROBE_TIMEOUT_S = 2.0
IS_LINUX = sys.platform == "linux"  # elsewhere psutil tells what /proc tells here; a node's program has no psutil
_MOST_OPEN_FILES = 10240  # that macOS lets a process ask for where its hard limit is none (OPEN_MAX)
_PROGRAM_HOME = Path(os.path.abspath(__file__)).parents[1]  # at import: in an archive, __file__ may be relative


def program_home() -> Path:
    """Return where the program runs from: the folder of agent_infra.py, or the archive node.pyz."""
    return _PROGRAM_HOME


def self_command(role: str) -> list[str]:
    """Return the argv that starts this program in another role, with this Python."""
    home = program_home()
    return [sys.executable, str(home if home.is_file() else home / "agent_infra.py"), role]


def command_name() -> str:
    """Return how the user runs this program: by its installed name, or by its file."""
    return "agent-infra" if os.path.basename(sys.argv[0]) == "agent-infra" else "agent_infra.py"


def resource(name: str) -> Path:
    """Return a file or folder of the program: beside agent_infra.py, or in an installed wheel's data."""
    for folder in (program_home(), program_home() / "agent_infra_data"):
        if (folder / name).exists():
            return folder / name
    raise RefusedError(f"{name} is not in {program_home()}; copy it there, or install the program again")


def absolute_path(name: str, setting: str = "") -> Path:
    """Return the path that a user wrote, with its ``~``, as an absolute one. RefusedError if ``~`` has no meaning.

    ``setting`` is the key that holds the path, for the message.
    """
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError as error:  # neither HOME nor a passwd entry, or ~ of a user that does not exist
        what = f"{setting} {name}".lstrip()
        raise RefusedError(f"{what}: no home directory is known for it; write the path out, or set HOME") from error


def allow_many_descriptors() -> None:
    """Raise this process's limit of open files to the hard limit."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if IS_LINUX or hard != resource.RLIM_INFINITY else _MOST_OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def freeze_imported_objects() -> None:
    """Make garbage collection cheaper once a process has started: never scan its imported modules again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def in_portions(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Yield the items in portions of ``size``, and between them let others run that wait for this core.

    For work that comes in bursts of milliseconds: where the controller shares a core with the relay, every turn that
    arrives meanwhile would wait for the end of the burst.
    """
    for first in range(0, len(items), size):
        yield items[first : first + size]
        os.sched_yield()


def release_free_memory() -> None:
    """Return memory that start-up has freed to the system; compiling alone leaves 16 MB. Works with glibc only."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def listener_owners(port: int) -> set[int]:
    """Return the uids of the users that listen on a TCP port of this machine."""
    owners = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    owners.add(int(fields[7]))
    return owners


def is_only_ours(port: int) -> bool:
    """Whether no user but this one and root listens on a TCP port of this machine; true if nobody does."""
    return listener_owners(port) <= {0, os.getuid()}


@functools.cache  # asked with every stamp
def boot_id() -> str:
    """Return the name of this machine's present boot. No other machine and no other boot has it."""
    if IS_LINUX:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, check=True, timeout=10.0)
    return said.stdout.decode().strip()


def process_stamp(pid: int) -> str | None:
    """Return boot id and start time of process ``pid``, which a later process with this pid doesn't share.

    None if it is gone. A zombie counts as gone: it has no open port or file, and its parent may be slow to reap it.
    """
    if not IS_LINUX:
        return _stamp_by_psutil(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{boot_id()}:{fields[19]}"
    except (OSError, ValueError):
        return None


def _stamp_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    # Its hash is of pid and start time as the kernel keeps it; create_time() follows whoever sets the clock.
    return None if is_zombie else f"{boot_id()}:{hash(process)}"


def usable_cores() -> int:
    """Return how many logical processors this process may use."""
    if IS_LINUX:
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ResidentMemory:
    """Reads this process's resident memory, even when no descriptor is free."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if IS_LINUX else -1

    def read(self) -> int:
        """Return it, in bytes."""
        if self._statm >= 0:
            return int(os.pread(self._statm, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        import psutil

        return int(psutil.Process().memory_info().rss)


def peer_process(sock: socket.socket) -> int:
    """Return the pid of the process at the other end of a connected Unix socket. OSError if the kernel won't tell."""
    if IS_LINUX:
        return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    return sock.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID of macOS (sys/un.h)


def die_with_parent_thread() -> None:
    """Ask the kernel to end this process when the thread that started it ends. Linux only: see end_children()."""
    if IS_LINUX:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_children() -> None:
    """End the processes that this one started, before it exits: where the kernel can't do it."""
    if not IS_LINUX:
        import psutil

        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.terminate()


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace the content of ``path`` with ``text``; readers see the old or the new content, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_missing(path: Path) -> bool:
    """Whether ``path`` certainly doesn't exist. A shared file system that fails for a moment says nothing."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


@contextlib.contextmanager
def restore_on_error(*paths: Path) -> Iterator[None]:
    """If the block raises, give these small files the content that they had before it, or remove them again."""
    before = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in paths}
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error, not these
            for path, text in before.items():
                path.unlink(missing_ok=True) if text is None else write_atomically(path, text)
        raise


class HttpConnection:
    """Requests over one kept connection, which is reopened when it was closed. Ignores http_proxy."""

    def __init__(self, host: str, port: int, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        import http.client

        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self._errors = (OSError, http.client.HTTPException)

    def request(
        self, path: str, key: str | None = None, method: str = "GET", body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Send a request. Returns status and body; status 0 if no answer in time."""
        while True:
            is_kept = self._connection.sock is not None
            try:
                self._connection.request(method, path, body, headers={"Authorization": f"Bearer {key}"} if key else {})
                response = self._connection.getresponse()
                return response.status, response.read(64 << 20)
            except self._errors as error:
                self._connection.close()
                if not is_kept or isinstance(error, TimeoutError):  # otherwise it may have been closed while idle
                    return 0, b""

    def close(self) -> None:
        self._connection.close()


def http_get(
    host: str,
    port: int,
    path: str,
    key: str | None = None,
    *,
    method: str = "GET",
    timeout_s: float = PROBE_TIMEOUT_S,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    """Send a request, ignoring http_proxy. Returns status and body; status 0 if no answer in time."""
    with contextlib.closing(HttpConnection(host, port, timeout_s)) as connection:
        return connection.request(path, key, method, body)


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def printable_text(text: str) -> str:
    """Return ``text`` without colours and with its control characters escaped, except for tabs and line ends.

    Prompts, answers and logs may contain any; a terminal obeys them.
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", _COLOURS.sub("", text))


def private_temp_directory() -> Path:
    """Return a 0700 directory of this user with a short path, for locks and sockets.

    Another user may have created the one with the usual name; then it is one with a random suffix.
    """
    import tempfile

    usual = Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    for directory in (usual, *sorted(usual.parent.glob(f"{usual.name}-*"))):
        with contextlib.suppress(FileNotFoundError):
            found = directory.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return directory
    return Path(tempfile.mkdtemp(prefix=f"{usual.name}-"))


def is_port_free(port: int) -> bool:
    """Whether nothing listens on ``port`` on any address of this machine."""
    with socket.socket() as probe:
        # As servers do: connections in TIME_WAIT of an engine that just ended don't block its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an flock on ``path``; the kernel releases it when the process ends, even if killed.

    Raises RefusedError if another process still holds it after ``timeout_s``, OSError if it cannot be created.
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
    """Create ``path`` (0600) with ``text``, completely or not at all. Returns False if it already exists."""
    temporary = path.with_name(f".{path.name}.new.{os.getpid()}.{threading.get_ident()}")
    write_atomically(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def end_process(pid: int, stamp: str, grace_s: float) -> None:
    """Send SIGTERM, wait ``grace_s``, then send SIGKILL; does nothing if ``pid`` no longer has this ``stamp``.

    Returns when the process is gone, or 10 s after SIGKILL (one in uninterruptible sleep cannot be killed).
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
    """The result of a command on the cluster's host."""

    status: int  # exit code; negative: the signal that ended it
    output: bytes
    errors: bytes


class HostUnreachableError(AgentInfraError):
    """The cluster's host failed, not the command; the jobs may still run. The message includes the fix."""


class CommandRunner(Protocol):
    """Runs commands on the cluster's host. Thread-safe."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run ``argv`` to its end, with any exit code. Raises HostUnreachableError if the host doesn't answer."""

    def stream(self, argv: Sequence[str]) -> Generator[bytes, None, None]:
        """Run ``argv`` and yield what it prints, as it comes; its standard input stays open until the generator closes.

        Raises HostUnreachableError if the host can't be reached.
        """

    def close(self) -> None:
        """Release the runner's resources."""


class LocalCommands:
    """Runs commands on this machine. A CommandRunner."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        try:
            process = self._start(argv, subprocess.PIPE)
        except FileNotFoundError as error:
            return CommandResult(127, b"", f"{error.filename}: not found".encode())  # as a shell reports it
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

    def _start(self, argv: Sequence[str], errors: int) -> subprocess.Popen[bytes]:
        """Start a command in its own process group: a shell's children would keep the pipes open after its end."""
        pipe, environment = subprocess.PIPE, self._environment
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=errors, env=environment, start_new_session=True)

    def stream(self, argv: Sequence[str], first: bytes = b"") -> Generator[bytes, None, None]:
        """``first`` is what to send to the command's standard input."""
        with self._start(argv, subprocess.DEVNULL) as process:
            try:
                if process.stdin and process.stdout:
                    with contextlib.suppress(BrokenPipeError):  # it has ended; its output says why
                        os.write(process.stdin.fileno(), first)
                    while chunk := os.read(process.stdout.fileno(), 1 << 16):
                        yield chunk
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        pass


def is_listening(host: str, port: int) -> bool:
    """Whether anything accepts connections on this address."""
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def last_line(log: Path) -> str:
    """Return the last line of a log that isn't blank; empty if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


@contextlib.contextmanager
def unix_address(path: str) -> Iterator[str]:
    """Yield the address to bind or connect a Unix socket to: ``path``, or a short name that works inside the block.

    The kernel limits addresses to about 100 bytes; the short name goes through a descriptor of the directory, or
    through a link to it where descriptors have no names.
    """
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    if not IS_LINUX:
        link = private_temp_directory() / f"{os.getpid()}.{threading.get_ident()}"
        link.symlink_to(os.path.dirname(path))
        try:
            yield str(link / os.path.basename(path))
        finally:
            link.unlink()
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def listen_on(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket for the proxy. Raises RefusedError, with the fix, if the address is unusable."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        fix = "set proxy.host to an address of this machine"
        if error.errno == errno.EADDRINUSE:
            fix = "end the program that listens there, or set proxy.port (or --port) to a free one"
        elif error.errno == errno.EACCES:
            fix = "set proxy.port to a port above 1023"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise RefusedError(f"the proxy cannot listen on {host}:{port}: {reason}; {fix}") from error


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; ignores write errors such as a full disk, and escapes lone surrogates."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(line + "\n")

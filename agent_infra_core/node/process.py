"""The engine's process group, which never outlives `serve`; signals to `serve`; free ports for engines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from agent_infra_core.host import is_free, private_directory

LOG_TAIL_BYTES = 65536


class PortReservation:
    """A port that no other `serve` of this user on this node takes, for as long as this object is not closed.

    The bind check alone leaves a gap until the engine listens; a lock file per port closes it between replicas.
    """

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock = lock

    def close(self) -> None:
        os.close(self._lock)


def reserve_port(first: int) -> PortReservation | None:
    """The first free port from ``first`` on, reserved; None when a thousand of them are taken.

    RefusedError when the directory of the reservations cannot be trusted.
    """

    directory = private_directory()
    for port in range(first, min(first + 1000, 65536)):
        lock = os.open(directory / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        if is_free(port):
            return PortReservation(port, lock)
        os.close(lock)
    return None


class Watcher:
    """A forked process that kills the engine's process group when `serve` is gone, even by kill -9.

    It reads a pipe whose only writer is `serve`: the number of a process group (0 = none), a line each; its end is
    the end of `serve`. To be made before any thread is.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write_end)
            _watch(read_end)
        os.close(read_end)

    def announce(self) -> None:
        """Name the calling process as the engine; runs in the engine's process before it becomes the engine."""
        self._say(os.getpid())

    def forget(self) -> None:
        """No engine runs any more: its number may soon be another's."""
        self._say(0)

    def _say(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watcher; the replica serves without it
            os.write(self._write_end, b"%d\n" % group)

    def close(self) -> None:
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _watch(read_end: int) -> NoReturn:
    """The watcher's whole life."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        group, rest = 0, b""
        while chunk := os.read(read_end, 4096):
            *lines, rest = (rest + chunk).split(b"\n")
            group = int(lines[-1]) if lines else group
        if group:
            os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


class StopSignals:
    """What `serve` was told by signals; owns the pipe into which Python writes the number of each that arrives.

    Counted in the pipe, two signals at the same moment count as two. Only the main thread uses it.
    """

    def __init__(self) -> None:
        self._asked = 0  # to drain and stop, by any signal
        self._terminations = 0
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    @property
    def is_asked(self) -> bool:
        """Told to drain and stop."""
        self._count()
        return self._asked > 0

    @property
    def is_urgent(self) -> bool:
        """Told to end a second time: at once."""
        self._count()
        return self._terminations > 1

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or as soon as a signal arrives."""
        if select.select([self._read_end], [], [], timeout)[0]:
            self._count()

    def _count(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._read_end, 4096):
                self._asked += number != signal.SIGCHLD
                self._terminations += number in (signal.SIGTERM, signal.SIGINT)


def open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


class EngineProcess:
    """One run of an engine: its process group and the part of the log that this run wrote."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, watcher: Watcher) -> None:
        """Start it; OSError when its program cannot be started."""
        self._log, self._watcher = log, watcher
        with open(open_log(log), "ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Announced by the engine itself: `serve` may be killed before it could say the number.
                preexec_fn=watcher.announce,
            )

    def exit_code(self) -> int | None:
        """Negative: ended by that signal; None: it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the engine's first process to end; it ends the others in its own order."""
        self._process.terminate()

    def kill(self) -> None:
        """End the whole process group, also what the engine's end left behind; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in the kernel's hands may take longer
            self._process.wait(10)
        self._watcher.forget()

    def log_tail(self) -> str:
        """The end of what this run wrote."""
        with open(self._log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")

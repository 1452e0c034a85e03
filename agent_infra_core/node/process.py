"""Processes of `serve`: the engine's process group, which never outlives it, its signals, and free ports."""

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

from agent_infra_core.host import is_port_free, private_temp_directory

LOG_TAIL_BYTES = 65536


class PortReservation:
    """A port that no other `serve` of this user on this node takes, until close().

    Checking that a port is free leaves a gap until the engine listens; a lock file per port covers it.
    """

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock = lock

    def close(self) -> None:
        os.close(self._lock)


def reserve_port(first: int) -> PortReservation | None:
    """Reserve the first free port from ``first`` on; None if the first thousand are taken.

    Raises RefusedError if the directory of the lock files isn't safe.
    """

    directory = private_temp_directory()
    for port in range(first, min(first + 1000, 65536)):
        lock = os.open(directory / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        if is_port_free(port):
            return PortReservation(port, lock)
        os.close(lock)
    return None


class Watcher:
    """A forked process that kills the engine's process group when `serve` ends, even by kill -9.

    It reads process group ids (0 = none), one per line, from a pipe that only `serve` writes to; the pipe's end means
    that `serve` has ended. Create it before starting any thread.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write_end)
            _watch(read_end)
        os.close(read_end)

    def announce(self) -> None:
        """Register the calling process as the engine; runs in the engine's process before exec."""
        self._say(os.getpid())

    def forget(self) -> None:
        """Unregister the engine, which has ended: its pid may soon be reused."""
        self._say(0)

    def _say(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watcher; the replica goes on without it
            os.write(self._write_end, b"%d\n" % group)

    def close(self) -> None:
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _watch(read_end: int) -> NoReturn:
    """Run the watcher process."""
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
    """Counts the signals to `serve`; owns the pipe to which Python writes the number of each signal that arrives.

    Through the pipe, two signals at the same moment count as two. Use it from the main thread only.
    """

    def __init__(self) -> None:
        self._asked = 0  # requests to drain and stop: any signal
        self._terminations = 0
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def close(self) -> None:
        """Ignore further signals: `stop` repeats them, and the default is to end this process by the signal.

        Then its job would count as failed, though everything has ended in order.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    @property
    def is_asked(self) -> bool:
        """Whether a signal asked to drain and stop."""
        self._count()
        return self._asked > 0

    @property
    def is_urgent(self) -> bool:
        """Whether a second SIGTERM or SIGINT asked to end at once."""
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


def log_tail(path: Path, start: int = 0) -> str:
    """Return the last LOG_TAIL_BYTES of a log, none before the byte ``start``; empty while they can't be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - LOG_TAIL_BYTES))
        return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")
    return ""


class EngineProcess:
    """One run of an engine: its process group and its part of the log."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, watcher: Watcher) -> None:
        """Start the engine. Raises OSError if its program cannot be started."""
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
                # The engine registers itself: `serve` may be killed before it could register it.
                preexec_fn=watcher.announce,
            )

    def exit_code(self) -> int | None:
        """Return the exit code; negative: ended by that signal; None: still running."""
        return self._process.poll()

    def terminate(self) -> None:
        """Send SIGTERM to the engine's first process, which ends the others."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the whole process group, including processes that the engine left behind. Safe to call again."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in uninterruptible sleep may take longer
            self._process.wait(10)
        self._watcher.forget()

    def log_tail(self) -> str:
        """Return the last LOG_TAIL_BYTES that this run wrote; empty while they can't be read."""
        return log_tail(self._log, self._log_start)

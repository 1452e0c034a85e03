"""Processes of a benchmark: started and ended by pid, pinned to a core, and what a process tree costs (Linux /proc)."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says what is missing and what to do."""


def program_at(path: str) -> Path:
    """The ``agent_infra.py`` of a checkout, or the file itself; for a command line's arguments."""
    program = Path(path).resolve()
    program = program / "agent_infra.py" if program.is_dir() else program
    if not program.is_file():
        raise argparse.ArgumentTypeError(f"there is no {program}; name a checkout or its agent_infra.py")
    return program


def proxy_and_load_cores() -> tuple[set[int], set[int]]:
    """The core for the proxy under test and the cores for all else; the same one where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:]) or {cores[0]}


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Return when ``condition`` holds; BenchmarkError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.02)


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (field 3 of proc(5)); None when the process is gone."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or None


def process_tree(root: int) -> list[int]:
    """``root`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = _stat_fields(int(entry)) if entry.isdigit() else None
        if fields is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, ()))
    return tree


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that these processes, their ended threads and their reaped children have used.

    /proc/<pid>/stat counts in ticks of 10 ms; where the kernel tells nanoseconds (schedstat) these are taken, unless
    threads that have ended make them fall short.
    """
    total = 0.0
    for pid in pids:
        fields = _stat_fields(pid)
        if fields is None:
            continue
        ticked = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
        try:
            tasks = Path(f"/proc/{pid}/task").iterdir()
            exact = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except (OSError, IndexError):
            exact = 0.0
        reaped_children = (int(fields[13]) + int(fields[14])) / TICKS_PER_SECOND
        total += (exact if ticked - exact < 0.05 else ticked) + reaped_children
    return total


def resident_mb(pids: Iterable[int]) -> float:
    """Resident memory of these processes, 10^6 bytes; pages that they share count once for each."""
    pages = [_read(f"/proc/{pid}/statm").split()[1:2] for pid in pids]
    return sum(int(fields[0]) for fields in pages if fields) * PAGE_BYTES / 1e6


def arguments_of(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone."""
    return _read(f"/proc/{pid}/cmdline").split("\0")


def working_folder(pid: int) -> Path | None:
    """Where a process works; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def core_idle_seconds(cores: Iterable[int]) -> float:
    """How long these cores have been idle since boot, in core-seconds."""
    lines = dict(line.split(" ", 1) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
    return sum(sum(map(int, lines[f"cpu{core}"].split()[3:5])) for core in cores) / TICKS_PER_SECOND


class Child:
    """A process that this benchmark started, in a session of its own so that Ctrl-C does not reach it; owns its end."""

    def __init__(
        self,
        command: Sequence[str],
        cores: set[int],
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # inherited: set here because a preexec function is not safe beside threads
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **(environment or {})},
                    cwd=folder,
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, before)
        self.pid = self._process.pid
        self.log = log

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as when a node dies."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever of the tree is left after five seconds."""
        started = {pid: _started_at(pid) for pid in process_tree(self.pid)}
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        for pid, stamp in started.items():
            if pid != self.pid and stamp is not None and _started_at(pid) == stamp:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _started_at(pid: int) -> str | None:
    """The start time that tells this process from a later one with its number; None when it is gone or a zombie."""
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]

"""This terminal: its signals, a command that runs in it while a deployment serves it, and how a process leaves it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.node.failures import describe_exit

COMMAND_END_S = 10.0  # for the command to end after SIGTERM or SIGHUP; then it is killed


def find_command(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line, once its program is found. RefusedError otherwise: before a replica waits in a queue for it."""
    if not argv:
        raise RefusedError("name the command to run after --, such as `run -- python eval.py`")
    if shutil.which(argv[0], path=environment.get("PATH")) is None:
        raise RefusedError(f"{argv[0]} was not found, or isn't executable; give its path, or correct the command")
    return list(argv)


class ForegroundCommand:
    """A child process with this terminal, in this process group. Owns the process: close() ends it."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it. RefusedError if it can't be started."""
        self._signals, self._killed_at = 0, float("inf")
        try:
            self._process = subprocess.Popen(argv, env=environment)
        except OSError as error:
            raise RefusedError(f"{argv[0]} cannot be started: {error.strerror}") from error

    def pass_on(self, number: int) -> None:
        """Pass a signal that this process got on to the command; the third one kills it. Called by signal handlers."""
        self._signals += 1
        if self._signals > 2:
            number = signal.SIGKILL
        elif number in (signal.SIGTERM, signal.SIGHUP):
            self._killed_at = time.monotonic() + COMMAND_END_S  # whoever sent it won't wait for long
        elif _is_in_foreground():
            return  # the terminal sent Ctrl-C to the command, too
        self._send(number)

    @property
    def is_signalled(self) -> bool:
        """Whether pass_on() was called."""
        return self._signals > 0

    def wait(self, check: Callable[[], None]) -> int:
        """Wait until it ends. Returns its status as a shell has it: 128 + N if signal N ended it.

        ``check`` is called several times a second; whatever it raises is raised here.
        """
        while (code := self._process.poll()) is None:
            check()
            if time.monotonic() > self._killed_at:
                self._send(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
        return 128 - code if code < 0 else code

    def close(self) -> None:
        """End it, if it still runs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._send(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(COMMAND_END_S)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class OperatorSignals:
    """Counts SIGINT, SIGTERM and SIGHUP; the second one calls ``on_second``, which ends turns in flight at once.

    ``on_each`` is called with the number of each signal; ``last`` is that of the last one.
    """

    def __init__(self) -> None:
        self.count = self.last = 0
        self.on_second: Callable[[], None] = lambda: None
        self.on_each: Callable[[int], None] = lambda _: None
        self._listen()

    def _listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: object) -> None:
        self.count, self.last = self.count + 1, number
        self.on_each(number)
        if self.count > 1:
            self.on_second()

    def came(self) -> bool:
        return self.count > 0


def run_command(
    argv: Sequence[str], environment: Mapping[str, str], signals: OperatorSignals, check: Callable[[], None]
) -> int:
    """Run a command in the foreground, which gets this process's signals. Returns its status as a shell has it.

    RefusedError if it can't be started. ``check`` as in ForegroundCommand.wait(); the command ends if it raises.
    """
    command = ForegroundCommand(argv, environment)
    on_second = signals.on_second
    signals.on_each, signals.on_second = command.pass_on, lambda: None  # the second one doesn't cut its turns
    try:
        if signals.last and not command.is_signalled:  # it came while the command was being started
            command.pass_on(signals.last)
        return command.wait(check)
    finally:
        signals.on_each, signals.on_second = lambda _: None, on_second
        command.close()


def run_detached(work: Callable[[Callable[[Path], None]], int]) -> int:
    """Run ``work(detach)`` in a child process that keeps the terminal until it calls ``detach(log)``.

    Until then, prompts, messages and errors appear on the terminal.  After that the child runs without the terminal
    and writes to the file ``log``.  Returns 0 when the child detaches, or its exit code if it ends first.  Call it
    before starting any thread.
    """
    ready, child_end = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(ready)
        return work(functools.partial(_leave_terminal, child_end))
    os.close(child_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child too, which decides
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    with open(ready, "rb") as pipe:
        if pipe.read(1):
            return 0
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        raise AgentInfraError(f"the proxy {describe_exit(code)} before it was ready; its log may say more")
    return code


def _leave_terminal(report: int, log: Path) -> None:
    """Detach this process from the terminal for good and report it through the pipe ``report``."""
    os.setsid()
    sys.stdout.flush()
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(output)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; the proxy runs anyway
        os.write(report, b"1")
    os.close(report)


def _is_in_foreground() -> bool:
    """Whether this process group is the one that its terminal sends Ctrl-C to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)

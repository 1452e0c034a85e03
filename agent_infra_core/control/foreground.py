"""This terminal: its signals, and a command that runs in it while a deployment serves it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from agent_infra_core.errors import RefusedError

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

"""The command that `run` runs: its status, the signals that it gets, and that it never outlives its parent's end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import PATIENCE_S
from program import wait_for

from agent_infra import main
from agent_infra_core.control import foreground
from agent_infra_core.control.foreground import ForegroundCommand, OperatorSignals, find_command, run_command
from agent_infra_core.errors import AgentInfraError, RefusedError

IGNORES = (
    "import signal, sys, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; open(sys.argv[1], 'w'); "
    "time.sleep(600)"
)
ENVIRONMENT = dict(os.environ)
Begin = Callable[[Callable[[], None]], Path]


class Signals(OperatorSignals):
    """Those of no process: the tests' own keeps its handlers."""

    def _listen(self) -> None:
        pass


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def until(condition: Callable[[], object]) -> Callable[[], None]:
    """A check that fails instead of waiting for ever."""
    deadline = time.monotonic() + PATIENCE_S

    def check() -> None:
        condition()
        assert time.monotonic() < deadline

    return check


def test_a_commands_status_is_what_a_shell_has() -> None:
    for program, status in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", 143), ("", 0)):
        assert run_command(python(program), ENVIRONMENT, Signals(), lambda: None) == status


def test_a_command_gets_the_environment_that_it_is_given() -> None:
    program = "import os; raise SystemExit(int(os.environ['NUMBER']))"
    assert run_command(python(program), {**ENVIRONMENT, "NUMBER": "5"}, Signals(), lambda: None) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on(number: int) -> None:
    command = ForegroundCommand(python("import time; time.sleep(600)"), ENVIRONMENT)
    sent: list[int] = []

    def send_once() -> None:
        if not sent:
            sent.append(number)
            command.pass_on(number)

    code = command.wait(until(send_once))
    assert code in (128 + number, 1)  # Python turns SIGINT into KeyboardInterrupt, perhaps while it starts


def stubborn(folder: Path) -> ForegroundCommand:
    """A command that ignores SIGINT and SIGTERM, once it does."""
    command = ForegroundCommand([*python(IGNORES), str(folder / "ignores")], ENVIRONMENT)
    wait_for((folder / "ignores").exists, "the command")
    return command


def test_the_third_signal_kills_a_command_that_ignores_them(tmp_path: Path) -> None:
    command = stubborn(tmp_path)
    assert command.wait(until(lambda: command.pass_on(signal.SIGINT))) == 128 + signal.SIGKILL


def test_a_command_that_ignores_sigterm_is_killed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreground, "COMMAND_END_S", 0.1)
    command = stubborn(tmp_path)
    command.pass_on(signal.SIGTERM)
    assert command.wait(until(lambda: None)) == 128 + signal.SIGKILL


def test_ctrl_c_of_the_terminal_is_not_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(foreground, "_is_in_foreground", lambda: True)
    monkeypatch.setattr(ForegroundCommand, "_send", lambda _, number: sent.append(number))
    command = ForegroundCommand(python(""), ENVIRONMENT)
    try:
        command.pass_on(signal.SIGINT)
        command.pass_on(signal.SIGINT)
        assert sent == []
        command.pass_on(signal.SIGINT)  # the third one kills it, wherever it comes from
        assert sent == [signal.SIGKILL]
    finally:
        command.close()


def test_what_a_check_raises_ends_the_command() -> None:
    signals, pids = Signals(), list[int]()

    def fail() -> None:
        pids.append(signals.on_each.__self__._process.pid)  # type: ignore[attr-defined]
        raise AgentInfraError("the controller failed")

    with pytest.raises(AgentInfraError, match="the controller failed"):
        run_command(python("import time; time.sleep(600)"), ENVIRONMENT, signals, fail)
    wait_for(lambda: not os.path.exists(f"/proc/{pids[0]}"), "the end of the command")


def test_the_second_signal_cuts_no_turns_while_the_command_runs() -> None:
    signals, cut = Signals(), list[str]()
    signals.on_second = lambda: cut.append("cut")
    seen: list[object] = []

    def check() -> None:
        signals.on_second()
        seen.append(1)

    run_command(python("import time; time.sleep(0.3)"), ENVIRONMENT, signals, check)
    assert seen
    assert cut == []
    signals.on_second()
    assert cut == ["cut"]


@pytest.mark.parametrize("words", [[], ["no-such-program"], ["/etc/passwd"]])
def test_a_command_that_cannot_be_run_is_refused_before_anything_starts(words: list[str]) -> None:
    with pytest.raises(RefusedError, match=r"name the command|was not found"):
        find_command(words, ENVIRONMENT)


def test_a_signal_while_the_command_starts_is_passed_on() -> None:
    signals = Signals()
    signals.last = signal.SIGTERM
    assert run_command(python("import time; time.sleep(600)"), ENVIRONMENT, signals, until(lambda: None)) == 143


@pytest.fixture
def serve_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Begin]:
    """Make `run` serve nothing, as with a disk so full that the relay's record couldn't be written."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text("models: [{name: m, model_path: org/m}]")
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def begin(meanwhile: Callable[[], None]) -> Path:
        @contextlib.contextmanager
        def serving(*_: object) -> Iterator[object]:
            meanwhile()
            yield SimpleNamespace(url="http://127.0.0.1:1", check=lambda: None)

        monkeypatch.setattr("agent_infra._serving", serving)
        return config

    yield begin
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_run_runs_its_command_without_the_relays_record(serve_nothing: Begin, tmp_path: Path) -> None:
    config = serve_nothing(lambda: None)
    program = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OPENAI_BASE_URL']); sys.exit(7)"
    words = ["--", sys.executable, "-c", program, str(tmp_path / "ran")]
    assert main(["run", "--config", str(config), *words]) == 7
    assert (tmp_path / "ran").read_text() == "http://127.0.0.1:1/v1"


def test_run_cannot_announce_its_tasks_without_the_relays_record(
    serve_nothing: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    config = serve_nothing(lambda: None)
    assert main(["run", "--config", str(config), "--tasks", "3", "--", sys.executable, "-c", ""]) == 1
    assert "could not be written; free some space there" in capsys.readouterr().err


def test_a_signal_before_the_command_starts_ends_run_as_a_shell_has_it(serve_nothing: Begin, tmp_path: Path) -> None:
    config = serve_nothing(lambda: signal.raise_signal(signal.SIGTERM))
    words = ["--", sys.executable, "-c", "open(__import__('sys').argv[1], 'w')", str(tmp_path / "ran")]
    assert main(["run", "--config", str(config), *words]) == 143
    assert not (tmp_path / "ran").exists()

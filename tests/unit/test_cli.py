"""The command line's own parts: what words mean, what people are shown, and which exit code says what."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import wait_for

import agent_infra
from agent_infra import main, parse_backend
from agent_infra_core.control.discovery import replica_table
from agent_infra_core.control.status import describe_replica
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.cluster import TAIL_BYTES, LogFolder, tail_logs
from agent_infra_core.protocol import ReplicaFailure, ReplicaRecord

MODULE = Path(agent_infra.__file__)
READY = ReplicaRecord("m-1", "m", "ready", "vllm", "gpu07", 7, "boot:1", port=5901, slots=4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (READY, "READY 127.0.0.1:5901"),
        (dataclasses.replace(READY, state="loading", progress="5/9"), "LOADING 5/9"),
        (dataclasses.replace(READY, restarts=2), "READY 127.0.0.1:5901 [2 restarts]"),
        (
            dataclasses.replace(READY, state="failed", failure=ReplicaFailure("out_of_memory", "CUDA oom", "less")),
            "FAILED out_of_memory: CUDA oom",
        ),
        (dataclasses.replace(READY, state="starting", message="restart 1 of 3"), "STARTING (restart 1 of 3)"),
        (
            dataclasses.replace(READY, state="loading", failure=ReplicaFailure("unknown", "ended by signal 9", "x")),
            "LOADING (before: ended by signal 9)",
        ),
    ],
)
def test_a_replicas_state_is_told_in_words(record: ReplicaRecord, words: str) -> None:
    assert describe_replica(record) == words


def test_a_backend_is_a_model_and_an_address() -> None:
    record = parse_backend("my.model=localhost:8000", 3)
    assert (record.replica, record.model, record.host, record.port) == ("my.model-3", "my.model", "127.0.0.1", 8000)


@pytest.mark.parametrize("text", ["m", "m=h", "m=:1", "m=127.0.0.1:0", "m=127.0.0.1:70000", "=127.0.0.1:1", "m=h:x"])
def test_a_backend_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RefusedError, match="MODEL=HOST:PORT is needed, such as my_model=127.0.0.1:8000"):
        parse_backend(text, 1)


def test_only_replicas_that_can_answer_are_in_the_table() -> None:
    records = [
        READY,
        dataclasses.replace(READY, replica="m-2", state="draining"),
        dataclasses.replace(READY, replica="m-3", state="loading", port=5903),
        dataclasses.replace(READY, replica="m-4", state="failed"),
        dataclasses.replace(READY, replica="m-5", port=None),
    ]
    table = replica_table(["m", "n"], records, "key", drained=frozenset({"m-1"}), expected=frozenset({"n"}))
    assert (table["models"], table["loading"]) == (["m", "n"], ["m", "n"])
    assert [(row["id"], row["state"], row["key"]) for row in table["backends"]] == [
        ("m-1", "draining", "key"),  # an operator drained it
        ("m-2", "draining", "key"),
    ]


def test_logs_show_the_last_lines_of_each(tmp_path: Path) -> None:
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    one.write_text("a\nb\nc\n")
    two.write_text("x\nunfinished")
    shown = list(tail_logs(LogFolder(tmp_path), ["one", "two", "gone"], 2))
    assert shown == [("one", b"b"), ("one", b"c"), ("two", b"x"), ("two", b"unfinished")]
    assert list(tail_logs(LogFolder(tmp_path), ["one"], 0)) == []


def test_a_line_without_end_is_not_read_again_for_ever(tmp_path: Path) -> None:
    log, shown = tmp_path / "one.log", list[bytes]()

    def follow() -> None:
        for _, line in LogFolder(tmp_path).follow(["one"], 10):
            shown.append(line)
            if line == b"ready":
                return

    log.write_bytes(b"begin\n")
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    wait_for(lambda: shown == [b"begin"])
    with log.open("ab") as file:
        file.write(b"\r10%" * (TAIL_BYTES // 4) + b"\nready\n")
    thread.join(PATIENCE_S)
    assert shown[-1:] == [b"ready"]


def test_a_log_line_shows_a_progress_bars_last_state_and_controls_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.log").write_bytes(b"\rLoading 10%\rLoading 100%\r\n\x1b[32mready\x1b[0m \x1b]0;boo\x07\n")
    for _, line in tail_logs(LogFolder(tmp_path), ["one"], 10):
        agent_infra._say_log_line("", line)
    assert capsys.readouterr().out == "Loading 100%\nready \\x1b]0;boo\\x07\n"


def test_following_a_log_says_each_line_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    log.write_text("older\nold\npar")
    followed = LogFolder(tmp_path).follow(["one"], 1)
    assert next(followed) == ("one", b"old")
    with log.open("a") as file:
        file.write("tial\nnew\n")
    assert [next(followed), next(followed)] == [("one", b"partial"), ("one", b"new")]


def test_no_verb_and_a_wrong_option_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["up", "--replicas", "0"], ["proxy", "--backend", "m=h:1", "--port", "99999"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "at least 1" in capsys.readouterr().err


VERBS = (
    *(
        "up",
        "launch",
        "init",
        "run",
        "start",
        "connect",
        "scale",
        "stop",
        "pull",
        "doctor",
        "status",
        "logs",
        "dashboard",
    ),
    *("export", "report", "replay", "bundle", "proxy", "completion"),
)


def test_an_unknown_verb_is_answered_with_the_nearest_or_with_those_for_people(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, hint in (("stauts", "did you mean status?"), ("fly", f"known here: {', '.join(sorted(VERBS))}")):
        with pytest.raises(SystemExit) as caught:
            main([word])
        assert caught.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: {word}: no such command; {hint}\n")


@pytest.mark.parametrize(("run_as", "name"), [("/usr/bin/agent-infra", "agent-infra"), ("x.py", "agent_infra.py")])
def test_the_program_calls_itself_as_it_was_called(
    run_as: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [run_as])
    for words, said in ((["--help"], f"usage: {name} "), (["-V"], "agent-infra "), (["logs", "-h"], f"usage: {name} ")):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().out.startswith(said)


def test_ctrl_c_during_the_imports_prints_no_traceback() -> None:
    interrupted = f"""
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "agent_infra_core.settings":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a job in the background ignores it
sys.argv = ["agent_infra.py", "status"]
runpy.run_path({str(MODULE)!r}, run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("sta", {"start", "status"}),
        ("", set(VERBS)),
        ("stop --n", {"--name", "--now"}),
        ("logs --", {"--help", "--config", "--follow", "--lines"}),
        ("fly --", set()),
    ],
)
def test_bash_completes_verbs_and_their_options(typed: str, completed: set[str]) -> None:
    words = ["agent-infra", *typed.split(" ")]
    script = agent_infra.completion_script("bash", "agent-infra")
    script += f"\nCOMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n_agent_infra\necho ${{COMPREPLY[@]}}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert (set(said.stdout.split()), said.stderr) == (completed, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_completion_script_is_read_by_its_shell(shell: str) -> None:
    script = agent_infra.completion_script(shell, "agent-infra")
    assert all(verb in script for verb in VERBS)
    if shutil.which(shell):
        subprocess.run([shell, "-c", script], timeout=PATIENCE_S, check=True)


def test_an_option_ahead_of_the_verb_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "some.yaml", "status"])
    assert caught.value.code == 2
    assert "--config: options come after the verb, such as `agent_infra.py status" in capsys.readouterr().err


@pytest.mark.parametrize("role", agent_infra.ROLES)
def test_each_role_has_a_command_line_of_its_own(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([role, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: agent_infra.py {role} ")


def test_a_refusal_is_one_line_and_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("models: [{name: m, model_path: p}]\nproxy: {stratgy: x}")
    assert main(["status", "--config", str(config)]) == 2
    assert capsys.readouterr().err == f"error: {config}: proxy.stratgy: unknown key; did you mean strategy?\n"


def test_an_unknown_model_or_log_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--model", "gpt"]) == 2
    assert "no model is called gpt; the configuration has smollm2" in capsys.readouterr().err
    assert main(["logs", "gpt-1"]) == 2
    assert "there are no logs yet; run `start` or `up` first" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the standard library alone, as one is whose environment was not activated."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    return folder / "bin" / "python"


def run_bare(python: Path, folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("words", "lacked"),
    [
        (("status",), "PyYAML, marshmallow, jinja2, rich"),
        (("status", "--config", "some.yaml"), "PyYAML, marshmallow, jinja2, rich"),
        (("stop", "--config", "some.yaml"), "PyYAML, marshmallow, jinja2, rich"),
        (("connect", "--port", "0"), "gevent, flask, msgspec, numpy, prometheus-client;"),
        (("up", "--port", "0"), "gevent, flask, msgspec, numpy, prometheus-client;"),
    ],
)
def test_a_python_without_the_packages_is_refused_in_one_line(
    bare_python: Path, tmp_path: Path, words: tuple[str, ...], lacked: str
) -> None:
    (tmp_path / "some.yaml").write_text("models: [{name: m, model_path: p}]")
    done = run_bare(bare_python, tmp_path, MODULE, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: not installed for {bare_python}: ")
    assert lacked in done.stderr
    assert done.stderr.endswith(f"(`. .venv/bin/activate`), or `{bare_python} -m pip install` them\n")


@pytest.mark.parametrize("name", ["page.py", "proxy.py", "slurm_poll.py", "startup.py"])
def test_a_benchmark_can_be_asked_for_help_from_anywhere(bare_python: Path, tmp_path: Path, name: str) -> None:
    done = run_bare(bare_python, tmp_path, MODULE.parent / "benchmarks" / name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} ")


def test_a_benchmark_says_which_package_it_needs(bare_python: Path, tmp_path: Path) -> None:
    done = run_bare(bare_python, tmp_path, MODULE.parent / "benchmarks" / "page.py")
    assert done.returncode == 2
    assert done.stderr.endswith(f"playwright is not installed for {bare_python}: pip install -e '.[test]'\n")


def test_dry_run_prints_the_engines_command_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--dry-run", "--replicas", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 × ")
    assert "llama-cpp --model-path smollm2-135m-instruct --name smollm2 --host 127.0.0.1 --port 5900" in said
    assert main(["status", "--json"]) == 3
    assert '"replicas": []' in capsys.readouterr().out


def test_a_terminal_that_cannot_show_every_character_is_no_obstacle() -> None:
    command = [sys.executable, str(MODULE), "start", "--dry-run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 \\xd7 ")


def test_a_full_disk_says_where_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/state/lock")

    monkeypatch.setattr("agent_infra.load_config", full)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "error: /state/lock: No space left on device; free some space there\n"

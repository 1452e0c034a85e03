"""The program from a clone, from a wheel and from its one file alike; and the part of it that goes to the nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import freeze
import pytest
from node_testbed import PYTHONS, STDLIB_ENGINE, Served
from patience import PATIENCE_S
from program import MODULE, Program, Running, program, wait_for
from testbed.ports import free_port
from weights import packaged_gguf

from agent_infra_core import __version__
from agent_infra_core.bundle import PROGRAM_FILES, build_node, write_program
from agent_infra_core.host import resource
from agent_infra_core.settings import ModelConfig

ROOT = MODULE.parent
FAKE_ENGINE = ROOT / "tests" / "fake_engine.py"


@dataclass(frozen=True)
class Form:
    """A way to have the program: the file that is run, and what its environment says besides."""

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def process_environment(self) -> dict[str, str]:
        """The environment, without a PYTHONPATH that would lead to the clone."""
        told = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**told, "PYTHONUNBUFFERED": "1", **self.environment}


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """agent_infra.pyz, alone in a folder."""
    return write_program(resource, tmp_path_factory.mktemp("one") / "agent_infra.pyz")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel; hatchling makes them, fetched through pip as pip itself would."""
    folder = tmp_path_factory.mktemp("dist")
    fetch = ["pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder / "tool")]
    fetched = subprocess.run([sys.executable, "-m", *fetch, "hatchling>=1.27"], stderr=subprocess.PIPE, text=True)
    if fetched.returncode:
        pytest.skip(f"pip does not give hatchling: {fetched.stderr[-300:]}")
    build(folder, ROOT, folder / "tool")
    return folder


def build(folder: Path, source: Path, tool: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tool)}
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *words]
    subprocess.run(command, env=environment, cwd=source, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=True)


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    """The one that is built of the clone."""
    [path] = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Form:
    """The command agent-infra as pip installs it."""
    folder = wheel.with_name("installed")
    install = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", *install, "--target", str(folder), str(wheel)]
    subprocess.run(command, timeout=PATIENCE_S, check=True)
    return Form(folder / "bin" / "agent-infra", {"PYTHONPATH": str(folder)})


@pytest.fixture(params=["clone", "wheel", "one file"])
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == "clone":
        return Form(MODULE)
    found = request.getfixturevalue("installed" if request.param == "wheel" else "one_file")
    return found if isinstance(found, Form) else Form(found)


@pytest.fixture
def app(form: Form, tmp_path: Path) -> Iterator[Program]:
    """The program in that form, with a scripted engine."""
    with program(tmp_path, module=form.path) as made:
        made.environment = {**form.process_environment(), "XDG_STATE_HOME": str(made.state)}
        made.configure(models=[scripted_model(made)])
        yield made


def scripted_model(app: Program) -> dict[str, Any]:
    command = [sys.executable, str(FAKE_ENGINE), "--port", "{port}"]
    ports = {"base_port": app.port + 1}
    return {"name": "smollm2", "model_path": "none", "engine": "command", "command": command, **ports}


def streamed(app: Program) -> list[dict[str, Any]]:
    """The events of a streamed turn, up to [DONE]."""
    body = {"model": "smollm2", "stream": True, "messages": [{"role": "user", "content": "Say hi"}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{app.port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        lines = [line.decode().strip().removeprefix("data: ") for line in answer if line.strip()]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def serve_page(app: Program) -> Running:
    """`dashboard`, once its page answers."""
    page = app.spawn("dashboard", "--port", str(free_port()))
    url = page.wait_line(r"^page +(http://\S+)")[1]
    page.wait_line("Uvicorn server started")
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        assert answer.status == 200
    return page


def test_it_starts_streams_a_turn_shows_its_page_and_stops(app: Program) -> None:
    up = app.spawn("up")
    up.wait_line("Ctrl-C stops everything")
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in streamed(app) if event["choices"])
    page = serve_page(app)
    settings = Path(f"/proc/{page.process.pid}/cwd/.streamlit/config.toml")  # Streamlit's: the page's colours
    assert settings.read_bytes() == (ROOT / ".streamlit" / "config.toml").read_bytes()
    stopped = app.run("stop")
    assert (stopped.returncode, "smollm2-1" in stopped.stdout) == (0, True), stopped.stderr
    assert up.process.wait(PATIENCE_S) == 0
    page.end()
    wait_for(lambda: not app.processes(), "no process left")


def test_a_job_template_of_the_user_s_extends_ours(form: Form) -> None:
    def run(folder: Path, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, str(form.path), *words], env=form.process_environment(), capture_output=True, text=True
        )
        return done.returncode, done.stdout.replace(str(folder), "FOLDER"), done.stderr

    script = freeze.job_script(*freeze.JOBS["own_template"], run=run)
    assert script == (freeze.FROZEN / "own_template.sbatch").read_text()


def test_it_writes_the_same_one_file(app: Program, one_file: Path) -> None:
    done = app.run("bundle", "--output", str(app.folder / "again.pyz"))
    assert done.returncode == 0, done.stderr
    assert (app.folder / "again.pyz").read_bytes() == one_file.read_bytes()


# --- The wheel and the sdist. ----------------------------------------------------------------------------------------


def test_the_wheel_has_the_whole_core_and_says_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
        [scripts] = [name for name in packed if name.endswith("entry_points.txt")]
        assert "agent-infra = agent_infra:main" in opened.read(scripts).decode()
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "agent_infra_core").rglob("*.py")}
    assert {name for name in packed if name.startswith("agent_infra_core/")} == {*core, "agent_infra_core/py.typed"}


def test_the_sdist_builds_the_same_wheel(distributions: Path, wheel: Path, tmp_path: Path) -> None:
    [sdist] = distributions.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", str(sdist), "-C", str(tmp_path)], check=True)
    [source] = tmp_path.iterdir()
    build(tmp_path, source, distributions / "tool", "--target", "wheel")
    with zipfile.ZipFile(tmp_path / wheel.name) as one, zipfile.ZipFile(wheel) as other:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


# --- The one file. ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(one_file: Path, tmp_path: Path) -> Iterator[Program]:
    """A copy of the one file in an empty folder, run there."""
    (tmp_path / "empty").mkdir()
    copy = Path(shutil.copy(one_file, tmp_path / "empty"))
    with program(tmp_path, module=copy) as made:
        made.environment = {**Form(copy).process_environment(), "XDG_STATE_HOME": str(made.state)}
        yield made


def run_after(setting: str, app: Program) -> subprocess.CompletedProcess[str]:
    """`--version`, under what a shell sets first."""
    command = ["sh", "-c", f'{setting}; exec "$@"', "sh", *app.command("--version")]
    return subprocess.run(command, env=app.environment, capture_output=True, text=True, timeout=PATIENCE_S)


def unpacked(app: Program) -> list[Path]:
    """The folders of the versions that were run."""
    return sorted((app.state / "agent-infra" / ".programs").iterdir())


def other_version(folder: Path) -> Path:
    """The one file of a program that calls itself 9.9.9."""

    def find(name: str) -> Path:
        copy = folder / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if resource(name).is_dir() else shutil.copyfile)(resource(name), copy)
        return copy

    assert "agent_infra_core" in PROGRAM_FILES
    text = find("agent_infra_core") / "__init__.py"
    text.write_text(text.read_text().replace(__version__, "9.9.9"))
    return write_program(find, folder / "agent_infra.pyz")


def test_alone_in_an_empty_folder_it_runs_the_embedded_model(copied: Program) -> None:
    packaged_gguf()
    copied.command = lambda *words: [sys.executable, str(copied.module), *words, "--port", str(copied.port)]  # type: ignore[method-assign]
    up = copied.spawn("up")
    up.wait_line("Ctrl-C stops everything")
    assert copied.chat("Hello")[0]["choices"]
    assert up.end() == 0
    assert list(copied.module.parent.iterdir()) == [copied.module]


def test_what_runs_goes_on_with_the_version_that_started_it(copied: Program, tmp_path: Path) -> None:
    copied.configure(models=[scripted_model(copied)])
    up = copied.spawn("up")
    up.wait_line("Ctrl-C stops everything")
    [first] = unpacked(copied)
    relay = copied.find("relay")
    other_version(tmp_path / "other").replace(copied.module)
    assert copied.run("--version").stdout == "agent-infra 9.9.9\n"
    os.kill(relay, 9)
    assert streamed(copied)
    successor = wait_for(lambda: {copied.find("relay")} - {relay}, "a relay").pop()
    assert f" {first}/agent_infra.py relay " in dict(copied.processes())[successor]
    assert len(unpacked(copied)) == 2
    stopped = copied.run("stop")  # of the other version
    assert (stopped.returncode, "smollm2-1" in stopped.stdout) == (0, True), stopped.stderr
    assert up.process.wait(PATIENCE_S) == 0


def test_several_first_starts_at_once_all_succeed(copied: Program) -> None:
    starts = [copied.spawn("--version") for _ in range(4)]
    for start in starts:
        start.wait_line(f"^agent-infra {__version__}$")
        assert start.process.wait(PATIENCE_S) == 0
    [folder] = unpacked(copied)
    assert [path for path in folder.rglob("*") if path.name.startswith(".") and path.is_file()] == []


def test_a_damaged_file_is_mended_at_the_next_start(copied: Program) -> None:
    copied.run("--version")
    [folder] = unpacked(copied)
    (folder / "agent_infra.py").write_text("raise SystemExit('damaged')")
    assert copied.run("--version").stdout == f"agent-infra {__version__}\n"


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_whatever_the_umask_its_folders_are_for_their_owner_and_it_runs_with_that_umask(
    copied: Program, umask: int
) -> None:
    copied.environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = run_after(f"umask {umask:03o}", copied)
    assert (done.returncode, done.stderr) == (0, "")
    [folder] = unpacked(copied)
    for made in (copied.state, copied.state / "agent-infra", folder.parent, folder):
        assert made.stat().st_mode & 0o777 == 0o700, made
    written_by_the_program = folder / "agent_infra_core" / "__pycache__"
    assert written_by_the_program.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_full_disk_is_told_in_one_line_with_what_to_do(copied: Program) -> None:
    done = run_after("ulimit -f 0", copied)  # no file can be written, whoever asks
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {copied.module} cannot be unpacked ({copied.state}/agent-infra/.programs: File too large); "
        "free some space, or set XDG_STATE_HOME elsewhere\n"
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_python_s_own_options_are_passed_on(copied: Program, python: str) -> None:
    command = [python, "-I", "-X", "importtime", "-W", "error", str(copied.module), "--version"]
    done = subprocess.run(command, env=copied.environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, f"agent-infra {__version__}\n")
    assert "agent_infra_core.client" in done.stderr  # which only the unpacked program imports


# --- agent_infra.py without its folder, and by another name. ---------------------------------------------------------


def test_the_module_alone_says_what_it_lacks_and_how_to_make_the_one_file(tmp_path: Path) -> None:
    lone = Path(shutil.copy(MODULE, tmp_path))
    done = subprocess.run([PYTHONS[0], "-I", str(lone), "up"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {lone} is missing its folder agent_infra_core/, or that is another version's (No module named "
        "'agent_infra_core'); copy both, or run `python agent_infra.py bundle` there and copy the one file "
        "that it writes, agent_infra.pyz\n"
    )


def test_a_core_of_another_version_is_named_as_such(tmp_path: Path) -> None:
    lone = Path(shutil.copy(MODULE, tmp_path))
    (tmp_path / "agent_infra_core").mkdir()
    (tmp_path / "agent_infra_core" / "__init__.py").write_text("__version__ = '9'\n")
    done = subprocess.run([PYTHONS[0], "-I", str(lone), "up"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: {lone} is missing its folder agent_infra_core/, or that is another version's ("
    )
    assert "Traceback" not in done.stderr


def test_the_module_alone_cannot_be_imported(tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import agent_infra"
    done = subprocess.run([PYTHONS[0], "-I", "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'agent_infra_core'\n")


@pytest.mark.parametrize("options", [[], ["-I"]], ids=["plain", "isolated"])
def test_the_program_runs_through_a_link(tmp_path: Path, options: list[str]) -> None:
    link = tmp_path / "agent-infra"
    link.symlink_to(MODULE)
    command = [sys.executable, *options, str(link), "--version"]
    environment = Form(link).process_environment()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"agent-infra {__version__}\n", "")


# --- The part for the nodes. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", PYTHONS)
def test_the_node_s_archive_serves_under_a_bare_python_from_a_folder_that_cannot_be_written(
    tmp_path: Path, python: str
) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    archive = folder / "node.pyz"
    archive.write_bytes(build_node())
    folder.chmod(0o555)
    port = free_port()
    model = ModelConfig(
        "chat", "none", engine="command", command=(python, str(STDLIB_ENGINE), "{port}"), base_port=port
    )
    served = Served(tmp_path / "run", model, python=(python, "-I", "-S"), program=archive)
    try:
        record = served.wait_for_state("ready")
        assert record.pid == served.process.pid
        assert served.request("/v1/chat/completions", {})["is_key_right"]
        assert served.load()["state"] == "ready"
        assert served.stop() == 0
    finally:
        served.close()
        folder.chmod(0o755)
    assert list(folder.iterdir()) == [archive]

"""The program as one file: what is in it, where it unpacks itself, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from node_testbed import PYTHONS
from patience import PATIENCE_S
from program import MODULE

from agent_infra_core import host
from agent_infra_core.bundle import NODE_FILES, PROGRAM_FILES, build_node, build_program, unpack, write_program
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.fleet.state import state_home
from agent_infra_core.host import resource
from agent_infra_core.settings import ModelConfig

ROOT = MODULE.parent


def names(archive: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.namelist()


def copy_of_the_program(folder: Path) -> Path:
    """The program's files in another folder and of another date, among others that are not the program's."""
    for name in PROGRAM_FILES:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for junk in ("agent_infra_core/__pycache__/x.pyc", "agent_infra_core/notes.txt", "configs/mine.yaml"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_text("not the program's")
    (folder / ".streamlit" / "secrets.toml").write_text("token = 'secret'")
    return folder


# --- What is in it. --------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes_wherever_they_lie_and_whatever_their_dates(tmp_path: Path) -> None:
    here = build_program(resource)
    copy = copy_of_the_program(tmp_path)
    assert build_program(resource) == here
    assert build_program(lambda name: copy / name) == here
    build = "import sys; from agent_infra_core.bundle import build_node; sys.stdout.buffer.write(build_node())"
    done = subprocess.run(
        [sys.executable, "-c", build], env={**os.environ, "PYTHONPATH": str(copy)}, cwd=copy, stdout=subprocess.PIPE
    )
    assert done.stdout == build_node() == build_node()


def test_the_program_s_files_are_in_it_and_nothing_else(tmp_path: Path) -> None:
    copy = copy_of_the_program(tmp_path)
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "agent_infra_core").rglob("*.py")}
    expected = {*PROGRAM_FILES, *core, "__main__.py"} - {"agent_infra_core"}
    assert names(build_program(lambda name: copy / name)) == sorted(expected)


@pytest.mark.parametrize("pattern", ["*.py", "configs/*.yaml", "slurm_templates/*.j2", ".streamlit/config.toml"])
def test_no_file_that_comes_with_the_program_is_forgotten(pattern: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
    assert found
    assert found <= set(PROGRAM_FILES)


def test_what_runs_in_jobs_is_a_part_of_it() -> None:
    found = names(build_node())
    assert found == sorted(found)
    rooms = {name.split("/")[1] for name in found if name != "__main__.py"}
    assert rooms == set(NODE_FILES)
    assert set(found) < set(names(build_program(resource)))


def test_bundle_writes_a_file_that_can_be_executed(tmp_path: Path) -> None:
    target = tmp_path / "program"
    target.write_text("an older one")
    assert write_program(resource, target) == target
    assert target.read_bytes() == build_program(resource)
    assert target.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert list(tmp_path.iterdir()) == [target]


def test_bundle_refuses_to_write_where_no_file_can_be(tmp_path: Path) -> None:
    for target, words in (
        (tmp_path / "no" / "folder", "cannot be written: No such file or directory; name another file with --output"),
        (tmp_path, "is no regular file"),
        (Path("/dev/null"), "is no regular file"),
    ):
        with pytest.raises(RefusedError, match=words):
            write_program(resource, target)
    assert list(tmp_path.iterdir()) == []


# --- Where it unpacks itself. ----------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small archive in place of the program."""
    path = tmp_path / "some.pyz"
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("agent_infra.py", "print('here')\n")
        written.writestr("agent_infra_core/host.py", "HERE = True\n")
    return path


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_lies_in_the_state_directory_under_its_hash_for_its_owner_alone(archive: Path, home: dict[str, str]) -> None:
    folder = unpack(archive, home)
    assert folder == state_home(home) / ".programs" / hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)
    assert (folder / "agent_infra.py").read_text() == "print('here')\n"
    assert (folder / "agent_infra_core" / "host.py").read_text() == "HERE = True\n"


def test_a_second_start_finds_it_and_leaves_it_as_it_is(archive: Path, home: dict[str, str]) -> None:
    folder = unpack(archive, home)
    (folder / "__pycache__").mkdir()
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    assert unpack(archive, home) == folder
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == before


def test_what_is_damaged_or_missing_is_mended_and_the_rest_stays(archive: Path, home: dict[str, str]) -> None:
    folder = unpack(archive, home)
    whole, damaged = folder / "agent_infra.py", folder / "agent_infra_core" / "host.py"
    kept = whole.stat().st_ino
    damaged.write_text("HERE = Fal")
    unpack(archive, home)
    assert damaged.read_text() == "HERE = True\n"
    shutil.rmtree(damaged.parent)
    unpack(archive, home)
    assert damaged.read_text() == "HERE = True\n"
    assert whole.stat().st_ino == kept  # a process may be running from it


def widen(folder: Path) -> None:
    folder.chmod(0o770)


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [widen, replace_by_link])
@pytest.mark.parametrize("level", ["the folder", "the one above"])
def test_a_folder_that_others_could_write_to_is_refused(
    archive: Path, home: dict[str, str], spoil: Any, level: str
) -> None:
    folder = unpack(archive, home)
    spoiled = folder if level == "the folder" else folder.parent
    spoil(spoiled)
    with pytest.raises(RefusedError, match=f"^{spoiled} is not a directory of yours alone; remove it, or set XDG_"):
        unpack(archive, home)


def test_a_folder_of_another_user_is_refused(
    archive: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack(archive, home)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(RefusedError, match="is not a directory of yours alone"):
        unpack(archive, home)


def test_where_the_state_directory_cannot_be_written_it_is_the_temporary_one(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = unpack(archive, {"XDG_STATE_HOME": str(archive)})
    assert folder.parent == tmp_path / f"agent-infra-programs-{os.getuid()}"
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)
    folder.parent.chmod(0o777)  # as somebody would who came first
    with pytest.raises(RefusedError, match=r"is not a directory of yours alone; .* or TMPDIR"):
        unpack(archive, {"XDG_STATE_HOME": str(archive)})


def test_where_nothing_can_be_written_it_says_what_to_do(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(archive))
    with pytest.raises(RefusedError) as refused:
        unpack(archive, {"XDG_STATE_HOME": str(archive)})
    assert str(refused.value) == (
        f"{archive} cannot be unpacked ({archive}/agent-infra/.programs: Not a directory; "
        f"{archive}/agent-infra-programs-{os.getuid()}: Not a directory); "
        "free some space, or set XDG_STATE_HOME elsewhere"
    )


def test_a_user_without_home_and_temporary_directory_is_told_so(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs with a number that /etc/passwd does not know."""

    def none(*_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)
    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(RefusedError, match="there is neither a home directory nor a temporary one"):
        unpack(archive, {})


def test_an_archive_that_was_damaged_is_refused(archive: Path, home: dict[str, str]) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"HERE = True", b"HERE = Fals"))
    with pytest.raises(RefusedError, match=r"Bad CRC-32 .*; copy it again"):
        unpack(archive, home)
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(RefusedError, match="not a zip file.*; copy it again"):
        unpack(archive, home)
    assert not Path(home["XDG_STATE_HOME"]).exists()


def test_a_disk_that_gets_full_leaves_no_part_of_a_file(
    archive: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", home["XDG_STATE_HOME"])
    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        with pytest.raises(RefusedError, match="No space left on device; .*; free some space"):
            unpack(archive, home)
    assert [path for path in Path(home["XDG_STATE_HOME"]).rglob("*") if path.is_file()] == []


# --- What runs from where. -------------------------------------------------------------------------------------------

TELL = """
import json, os, sys
{prepare}
from agent_infra_core.host import program_home, self_command
os.chdir("/")
sys.argv = ["/usr/bin/some-host"]
print(json.dumps([str(program_home()), self_command("relay")]))
"""


def told_by(prepare: str, cwd: Path, *, python: str = sys.executable, options: tuple[str, ...] = ()) -> Any:
    """Home and command, as a host program is told them that prepares itself like this and goes elsewhere then."""
    command = [python, *options, "-c", TELL.format(prepare=prepare)]
    return json.loads(subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=True).stdout)


@pytest.mark.parametrize("path", [str(ROOT), os.path.relpath(ROOT, "/tmp")], ids=["absolute", "relative"])
def test_a_host_program_starts_its_roles_by_the_absolute_path_of_the_program(path: str) -> None:
    told = told_by(f"sys.path.insert(0, {path!r}); import agent_infra", Path("/tmp"))
    assert told == [str(ROOT), [sys.executable, str(MODULE), "relay"]]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """node.pyz."""
    path = tmp_path / "node.pyz"
    path.write_bytes(build_node())
    return path


@pytest.mark.parametrize("python", PYTHONS)
def test_the_node_s_archive_starts_itself_by_its_absolute_path(node: Path, python: str) -> None:
    told = told_by("sys.path.insert(0, 'node.pyz')", node.parent, python=python, options=("-I", "-S"))
    assert told[0] == str(node)
    assert told[1][1:] == [str(node), "relay"]


@pytest.mark.parametrize("python", PYTHONS)
def test_vllm_finds_the_guard_in_the_node_s_archive(node: Path, python: str) -> None:
    """As `--middleware agent_infra_core.node.guard.EngineGuard` does, with the environment that it is given."""
    spec = serve_spec("m-1", ModelConfig("chat", "org/model", env={"PYTHONPATH": "/site"}), "/run", "/key")
    launch = """
import json, sys
sys.path.insert(0, sys.argv[1])
from agent_infra_core.node.replica import make_launch
from agent_infra_core.protocol import spec_from_json
launch = make_launch(spec_from_json(sys.stdin.read()), "secret-key", 5900)
print(json.dumps([launch.environment["PYTHONPATH"], launch.argv]))
"""
    command = [python, "-I", "-S", "-c", launch, str(node)]
    done = subprocess.run(
        command, input=json.dumps(dataclasses.asdict(spec)), stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S
    )
    path, argv = json.loads(done.stdout)
    assert path == f"{node}:/site"
    module, _, name = argv[argv.index("--middleware") + 1].rpartition(".")
    find = f"import {module} as module; print(module.{name}.__name__, module.__file__)"
    found = subprocess.run(
        [python, "-S", "-c", find], env={"PYTHONPATH": path}, cwd="/", stdout=subprocess.PIPE, text=True
    )
    assert found.stdout.split() == ["EngineGuard", f"{node}/agent_infra_core/node/guard.py"]


def test_a_traceback_names_the_file_in_the_node_s_archive(node: Path) -> None:
    fail = "import sys; sys.path.insert(0, sys.argv[1]); from agent_infra_core.protocol import *; spec_from_json('[')"
    done = subprocess.run([PYTHONS[0], "-I", "-S", "-c", fail, str(node)], stderr=subprocess.PIPE, text=True)
    told = re.search(rf'  File "{node}/agent_infra_core/protocol.py", line (\d+), in spec_from_json\n', done.stderr)
    assert told, done.stderr
    lines = Path(host.__file__).with_name("protocol.py").read_text().splitlines()
    assert "json.loads(text)" in lines[int(told[1]) - 1]

"""Builds agent_infra.pyz, the program as one file, which unpacks itself once; and node.pyz, which runs in jobs."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agent_infra_core.errors import RefusedError

PROGRAM_FILES = (
    "agent_infra.py",
    "streamlit_dashboard.py",
    "agent_infra_core",
    "slurm_templates",
    "configs",
    ".streamlit",
)
NODE_FILES = ("__init__.py", "errors.py", "settings.py", "host.py", "protocol.py", "node")  # of agent_infra_core

_PROGRAM_MAIN = "from agent_infra_core.bundle import run_unpacked\n\nrun_unpacked()\n"
_NODE_MAIN = "import sys\n\nfrom agent_infra_core.node.roles import main\n\nsys.exit(main())\n"
_SHEBANG = b"#!/usr/bin/env python3\n"
_DATE = (1980, 1, 1, 0, 0, 0)  # of every file: the same content gives the same bytes


def build_program(find: Callable[[str], Path]) -> bytes:
    """agent_infra.pyz; ``find`` tells where a file or folder of the program is, and raises RefusedError otherwise."""
    files: dict[str, bytes] = {"__main__.py": _PROGRAM_MAIN.encode()}
    for name in PROGRAM_FILES:
        files |= _read_tree(find(name), name)
    return _zip(files)


def build_node() -> bytes:
    """node.pyz: what runs inside a job, by the standard library alone."""
    files: dict[str, bytes] = {"__main__.py": _NODE_MAIN.encode()}
    for name in NODE_FILES:
        files |= _read_tree(Path(__file__).with_name(name), f"agent_infra_core/{name}")
    return _zip(files)


def _read_tree(path: Path, name: str) -> dict[str, bytes]:
    """The file at ``path``, or all below it, by their names in the archive."""
    if path.is_file():
        return {name: path.read_bytes()}
    files = (each for each in path.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
    return {f"{name}/{each.relative_to(path).as_posix()}": each.read_bytes() for each in files}


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO(_SHEBANG)
    buffer.seek(0, os.SEEK_END)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def run_unpacked() -> None:
    """The main program of agent_infra.pyz: unpack it, unless that was done, and become the agent_infra.py in there."""
    try:
        program = unpack(Path(sys.argv[0]), os.environ) / "agent_infra.py"
    except RefusedError as error:
        sys.exit(f"error: {error}")
    os.execv(sys.executable, [sys.executable, *_interpreter_options(), str(program), *sys.argv[1:]])  # noqa: S606


def _interpreter_options() -> list[str]:
    """The options that Python was started with and that its children do not get by themselves."""
    options = [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    options += [f"-W{each}" for each in sys.warnoptions]
    flags = {"I": sys.flags.isolated, "S": sys.flags.no_site, "B": sys.flags.dont_write_bytecode}
    return options + [f"-{letter}" for letter, is_set in flags.items() if is_set]


def unpack(archive: Path, environment: Mapping[str, str]) -> Path:
    """The folder with the content of ``archive``, made on first use and checked on every other; RefusedError.

    It is named by the archive's SHA-256 and lies in the state directory, or below the temporary directory where that
    cannot be written. Only its owner may enter it.
    """
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    problems = []
    for home in _homes(environment):
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(home)
            return _unpacked(content, home / digest)
        except OSError as error:
            problems.append(f"{home}: {error.strerror or error}")
    raise RefusedError(f"{archive} cannot be unpacked ({'; '.join(problems)}); free some space, or set XDG_STATE_HOME")


def _homes(environment: Mapping[str, str]) -> Iterator[Path]:
    """Where archives may be unpacked, in order of preference. No deployment's name begins with a dot."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "~"), ".local", "state")
    yield Path(base).expanduser().absolute() / "agent-infra" / ".programs"
    yield Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}" / "programs"


def _unpacked(content: bytes, folder: Path) -> Path:
    """``folder`` with what ``content`` holds, whole or not at all, however many processes want it at once."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if folder.is_dir():
        _check_owner(folder)
        if _is_intact(folder, files):
            return folder
        shutil.rmtree(folder)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))  # 0700
    try:
        for name, text in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(text)
        scratch.rename(folder)
    except OSError:
        if not (folder.is_dir() and _is_intact(folder, files)):  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_owner(folder: Path) -> None:
    """RefusedError unless ``folder`` is a directory of this user that no other can write to."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RefusedError(f"{folder} is not a directory of yours alone; remove it, or set XDG_STATE_HOME or TMPDIR")


def _is_intact(folder: Path, files: Mapping[str, bytes]) -> bool:
    try:
        return all((folder / name).read_bytes() == text for name, text in files.items())
    except OSError:
        return False


def write_program(find: Callable[[str], Path], target: Path) -> Path:
    """Write agent_infra.pyz to ``target``, whole; a running program that was unpacked from an older one is unharmed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(build_program(find))
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RefusedError(f"{target} cannot be written: {error.strerror}; name another file with --output") from error
    return target

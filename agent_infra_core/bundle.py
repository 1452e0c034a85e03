"""Builds agent_infra.pyz, the program as one self-unpacking file, and node.pyz, which runs in jobs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agent_infra_core.errors import RefusedError
from agent_infra_core.settings import base_directory

# A folder means its Python files. Other files are listed one by one, because users keep their own files beside them.
PROGRAM_FILES = (
    ".streamlit/config.toml",
    "agent_infra.py",
    "agent_infra_core",
    "configs/example.yaml",
    "configs/local.yaml",
    "configs/slurm.yaml",
    "slurm_templates/engine.sbatch.j2",
    "slurm_templates/job.sbatch.j2",
    "slurm_templates/proxy.sbatch.j2",
    "slurm_templates/vllm.sbatch.j2",
    "slurm_templates/vllm_multinode.sbatch.j2",
    "streamlit_dashboard.py",
)
NODE_FILES = ("__init__.py", "errors.py", "settings.py", "host.py", "protocol.py", "node")  # in agent_infra_core

_PROGRAM_MAIN = "from agent_infra_core.bundle import run_unpacked\n\nrun_unpacked()\n"
_NODE_MAIN = "import sys\n\nfrom agent_infra_core.node.roles import main\n\nsys.exit(main())\n"
_SHEBANG = b"#!/usr/bin/env python3\n"
_DATE = (1980, 1, 1, 0, 0, 0)  # for every file, so that the same content gives the same bytes


def build_program(find: Callable[[str], Path]) -> bytes:
    """Build agent_infra.pyz; ``find`` locates a file or folder of the program, or raises RefusedError."""
    files: dict[str, bytes] = {"__main__.py": _PROGRAM_MAIN.encode()}
    for name in PROGRAM_FILES:
        files |= _read_tree(find(name), name)
    return _zip(files)


def build_node() -> bytes:
    """Build node.pyz, which runs inside jobs and needs only the standard library."""
    files: dict[str, bytes] = {"__main__.py": _NODE_MAIN.encode()}
    for name in NODE_FILES:
        files |= _read_tree(Path(__file__).with_name(name), f"agent_infra_core/{name}")
    return _zip(files)


def _read_tree(path: Path, name: str) -> dict[str, bytes]:
    """Read the file at ``path``, or all Python files below it; keys are the names in the archive."""
    if path.is_file():
        return {name: path.read_bytes()}
    return {f"{name}/{each.relative_to(path).as_posix()}": each.read_bytes() for each in path.rglob("*.py")}


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO(_SHEBANG)
    buffer.seek(0, os.SEEK_END)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def write_program(find: Callable[[str], Path], target: Path) -> Path:
    """Write agent_infra.pyz to ``target`` atomically; programs that run from an older one use an unpacked copy."""
    content = build_program(find)
    if target.exists() and not target.is_file():  # a directory, or /dev/stdout, which root would replace
        raise RefusedError(f"{target} is no regular file; name another one with --output")
    try:
        _write_whole(target, content, 0o755)
    except OSError as error:
        raise RefusedError(f"{target} cannot be written: {error.strerror}; name another file with --output") from error
    return target


def run_unpacked() -> None:
    """Run agent_infra.pyz: unpack it on first use, then replace this process with the unpacked agent_infra.py."""
    umask = os.umask(0o077)  # for parent folders too
    try:
        folder = unpack(Path(os.path.abspath(__file__)).parents[1], os.environ)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    os.umask(umask)
    options = sys.orig_argv[1 : -len(sys.argv)]  # Python's own, such as -X dev
    os.execv(sys.executable, [sys.executable, *options, str(folder / "agent_infra.py"), *sys.argv[1:]])  # noqa: S606


def unpack(archive: Path, environment: Mapping[str, str]) -> Path:
    """Unpack ``archive`` on first use, check and repair the copy on later uses, and return its folder.

    The folder is named after the archive's SHA-256 and is in the state directory, or in the temporary directory if
    that isn't writable. Only its owner may enter it. Raises RefusedError.
    """
    try:
        content = archive.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            files = {name: opened.read(name) for name in opened.namelist()}
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise RefusedError(f"{archive} cannot be read ({error}); copy it again") from error
    problems = []
    for home in _homes(environment):
        folder = home / hashlib.sha256(content).hexdigest()
        try:
            for each in (home, folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_owner(each)
            for name, text in files.items():
                _mend(folder / name, text)
        except OSError as error:
            problems.append(f"{home}: {error.strerror}")
        else:
            return folder
    told = "; ".join(problems) or "there is neither a home directory nor a temporary one"
    raise RefusedError(f"{archive} cannot be unpacked ({told}); free some space, or set XDG_STATE_HOME elsewhere")


def _homes(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders to unpack archives in, by preference. Names of deployments never start with a dot."""
    base = base_directory(environment, "XDG_STATE_HOME", ".local/state")
    with contextlib.suppress(RuntimeError):  # neither HOME nor a passwd entry
        yield Path(base).expanduser().absolute() / "agent-infra" / ".programs"
    with contextlib.suppress(FileNotFoundError):  # no writable temporary directory
        yield Path(tempfile.gettempdir()) / f"agent-infra-programs-{os.getuid()}"


def _check_owner(folder: Path) -> None:
    """Raise RefusedError unless ``folder`` is a directory that this user owns and nobody else can write to."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RefusedError(f"{folder} is not a directory of yours alone; remove it, or set XDG_STATE_HOME or TMPDIR")


def _mend(path: Path, content: bytes) -> None:
    """Make sure that ``path`` has this content; other processes may do the same at the same time, or run from it."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, content, 0o600)


def _write_whole(path: Path, content: bytes, mode: int) -> None:
    """Replace a file atomically. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

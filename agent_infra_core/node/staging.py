"""Copies a model's weights to a node's own disk, once for all replicas on the node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_infra_core.errors import RefusedError
from agent_infra_core.node.hub import hub_cache, hub_folder, is_hub_id

CHUNK_BYTES = 16 << 20
SPARE_BYTES = 256 << 20  # left free on the disk
LOCK_POLL_S = 0.2
LOCK_WAIT_S = 3600.0  # for another replica that copies the same weights
REPORT_S = 1.0


class StagingError(RefusedError):
    """The weights can't be staged; ``kind`` is the class of failure."""

    def __init__(self, message: str, kind: str = "model_not_found") -> None:
        super().__init__(message)
        self.kind = kind


class StagingStopped(Exception):  # noqa: N818 (nothing went wrong)
    """``should_stop`` returned true before the weights were there."""


@dataclass(frozen=True)
class SourceFile:
    """A file to copy."""

    name: str  # relative to the model
    path: Path
    size: int
    modified_ns: int
    sha256: str | None  # None: not known


def stage_weights(
    model_path: str,
    stage: str,
    environment: Mapping[str, str],
    report: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> str:
    """Copy a model into ``stage`` on this node, unless it is there. Returns the path for the engine.

    ``stage`` may contain variables of ``environment``.  The copy is made under another name and renamed once it is
    whole; meanwhile other replicas wait.  ``report`` gets the bytes copied and their total, about once a second.
    Raises StagingError with the reason and the fix, and StagingStopped.
    """
    source = find_source(model_path, environment)
    files = readable_files(source)
    folder = private_folder(expand(stage, environment))
    manifest = json.dumps([(each.name, each.size, each.modified_ns) for each in files])
    name = f"{Path(model_path).name}-{hashlib.sha256(manifest.encode()).hexdigest()[:12]}"
    target = folder / name
    try:
        with _locked(folder / f".{name}.lock", should_stop):
            if not is_whole(target, files):
                _copy_all(files, target, report, should_stop)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = f"check that {source} can be read on this node, and stage written"
        if is_full:
            fix = f"free some space there, such as earlier copies in {folder}"
        message = f"stage: {error.filename or folder}: {error.strerror or error}; {fix}"
        raise StagingError(message, "quota" if is_full else "model_not_found") from error
    return str(target if source.is_dir() else target / files[0].name)


def expand(stage: str, environment: Mapping[str, str]) -> Path:
    """Replace the variables in ``stage``. Raises StagingError for one that isn't set here, or if no path comes out."""
    missing: list[str] = []

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environment:
            missing.append(name)
        return environment.get(name, "")

    path = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, stage)
    if missing or not path.startswith("/"):
        why = f"{missing[0]} is not set on this node" if missing else f"{path} is not an absolute path"
        raise StagingError(f"stage: {stage}: {why}; name a folder on the nodes' own disks")
    return Path(path)


def find_source(model_path: str, environment: Mapping[str, str]) -> Path:
    """The file or folder of a model; of a Hugging Face id, the one in the cache. Raises StagingError."""
    if os.path.exists(model_path):
        return Path(model_path)
    if is_hub_id(model_path):
        cached = hub_folder(model_path, environment)
        with contextlib.suppress(OSError):
            snapshot = cached / "snapshots" / (cached / "refs" / "main").read_text(encoding="utf-8").strip()
            if snapshot.is_dir():
                return snapshot
        raise StagingError(f"stage: {model_path} is not in {hub_cache(environment)}; `pull` downloads it there first")
    raise StagingError(f"stage: {model_path} does not exist on this node; correct model_path")


def readable_files(source: Path) -> list[SourceFile]:
    """The files of a model. Raises StagingError if there is none, or if they can't be read."""
    try:
        files = list(list_files(source))
    except OSError as error:
        what = f"{error.filename or source}: {error.strerror or error}"
        raise StagingError(f"stage: {what}; make it readable on this node, and start the replica again") from error
    if not files:
        raise StagingError(f"stage: {source} contains no file; correct model_path, or `pull` the model again")
    return files


def list_files(source: Path) -> Iterator[SourceFile]:
    """Yield the files of a model in order, symbolic links followed. The hub's cache names its blobs by SHA-256.

    Raises OSError for a folder that can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    walked = os.walk(source, onerror=fail) if source.is_dir() else ()
    found = [Path(folder, name) for folder, _, names in walked for name in names] or [source]
    for path in sorted(path for path in found if path.is_file()):
        real, status = path.resolve(), path.stat()
        sha256 = real.name if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", real.name) else None
        name = str(path.relative_to(source)) if path != source else path.name
        yield SourceFile(name, real, status.st_size, status.st_mtime_ns, sha256)


def private_folder(stage: Path) -> Path:
    """Create our own folder in ``stage``, which all users of the node may share. Returns it without symbolic links.

    Raises StagingError, also if another user could replace a folder on the way to it.
    """
    folder = stage / f"agent-infra-{os.getuid()}"
    try:
        for each in (*reversed(stage.parents), stage):
            each.mkdir(mode=0o755, exist_ok=True)
        stage = stage.resolve()
        folder = stage / folder.name
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        # Whoever can change / (in a container, its image) can change the engine, too.
        shared = [each for each in (*reversed(stage.parents), stage)[1:] if is_replaceable(each.stat())]
    except OSError as error:
        raise StagingError(f"stage: {folder}: {error.strerror}; name a folder that you can write to") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StagingError(f"stage: {folder} is not a directory of yours alone; name another folder")
    if shared:
        raise StagingError(
            f"stage: another user could replace the weights in {stage}, because {shared[0]} is not yours alone; name a "
            "folder that only you or root can change, as all folders above it; the sticky bit (chmod +t) will do"
        )
    return folder


def is_replaceable(folder: os.stat_result) -> bool:
    """Whether another user than root may replace what is in a folder."""
    is_foreign = folder.st_uid not in (0, os.getuid())
    return is_foreign or bool(folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX)


def is_whole(target: Path, files: list[SourceFile]) -> bool:
    """Whether ``target`` has every file in its size."""
    try:
        return all((target / each.name).stat().st_size == each.size for each in files)
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock of this node; the kernel releases it when its holder dies."""
    deadline = time.monotonic() + LOCK_WAIT_S
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if should_stop():
                raise StagingStopped
            if time.monotonic() > deadline:
                raise StagingError(f"stage: another replica has held {path} for {LOCK_WAIT_S / 60:g} min; end it")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _copy_all(
    files: list[SourceFile], target: Path, report: Callable[[int, int], None], should_stop: Callable[[], bool]
) -> None:
    """Copy the files to ``target``, which appears once all are there. The caller holds the lock."""
    partial, total = target.with_name(f".{target.name}.partial"), sum(each.size for each in files)
    for leftover in (partial, target):  # of a copy that was cut off
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < total + SPARE_BYTES:
        raise StagingError(
            f"stage: the weights need {total / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB free; "
            "free some space there, such as earlier copies, or leave stage out",
            "quota",
        )
    copied, reported_at = 0, 0.0
    try:
        for each in files:
            for size in _copy(each, partial / each.name):
                copied += size
                if should_stop():
                    raise StagingStopped
                if time.monotonic() - reported_at > REPORT_S:
                    reported_at = time.monotonic()
                    report(copied, total)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy(each: SourceFile, target: Path) -> Iterator[int]:
    """Copy a file, and check its size and, where it is known, its SHA-256. Yields the size of each chunk."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(each.path, "rb") as source, open(target, "wb") as copy:
        while chunk := source.read(CHUNK_BYTES):
            copy.write(chunk)
            size += len(chunk)
            if each.sha256 is not None:
                digest.update(chunk)
            yield len(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    if size != each.size or each.sha256 not in (None, digest.hexdigest()):
        what = f"has {size} bytes, not {each.size}" if size != each.size else "doesn't match its SHA-256"
        raise StagingError(f"stage: {each.path} {what}; it changed while it was copied, or is damaged: `pull` it again")

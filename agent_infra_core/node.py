"""Node: the `serve` role, inside the job, with the engine's Python and the standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hmac
import json
import math
import os
import re
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from agent_infra_core.configuration import ModelConfig
from agent_infra_core.engines import (
    ENGINES,
    HOPELESS_FAILURES,
    Engine,
    EngineLoad,
    Launch,
    ReplicaFailure,
    check_engine_args,
    classify_failure,
    read_engine_load,
)
from agent_infra_core.errors import AgentInfraError, RefusedError

RANK_POLL_S = 0.5  # between looks of a rank at what its head does
LOAD_POLL_S = 0.1  # between looks at an engine that loads
HEALTH_POLL_S = 5.0  # between looks at one that is ready
PROBE_TIMEOUT_S = 2.0
DRAIN_SETTLE_S = 0.5  # an engine counts as idle after this long, for turns still on their way when draining was told
IDLE_SETTLE_S = 3.0  # likewise when it drains by its own decision: the relay reads of it at its next look at the load
END_MARGIN_S = 3.0  # of stop_grace, kept for the engine's own end
MAX_RESTARTS = 3
FORGIVEN_AFTER_S = 600.0  # healthy, and earlier restarts no longer count
DIGEST_MAX_AGE_S = 0.5
LOG_TAIL_BYTES = 65536
METRICS_PATH = "/metrics"
CHALLENGE_PATH = "/agent-infra/challenge"


def answer_challenge(key: str, nonce: str) -> str:
    """What only a holder of ``key`` answers to ``nonce``: their HMAC-SHA256 in hexadecimal digits."""
    return hmac.new(key.encode(), nonce.encode(), "sha256").hexdigest()


def server_identity(replica: str, node: str, port: int) -> str:
    """Who answers a challenge: one server alone, so that no other can be made to answer in its place."""
    return f"{replica}@{node}:{port}"


def _challenge_reply(key: str, identity: str, query: str) -> tuple[int, bytes]:
    """Status and JSON body of ``GET /agent-infra/challenge?nonce=HEX``: the answer to ``HEX:identity``.

    With ``&port=N`` the answer (to ``HEX:identity:N``) also says that nobody but this user and root listens there.
    """
    match = re.fullmatch(r"nonce=([0-9a-fA-F]{16,128})(?:&port=(\d{1,5}))?", query)
    if match is None:
        return 400, _error_body("nonce must be 16 to 128 hexadecimal digits", "invalid_request_error", None)
    nonce = f"{match[1]}:{identity}"
    if match[2]:
        if not listener_owners(int(match[2])) <= {0, os.getuid()}:
            return 409, _error_body("another user listens there", "invalid_request_error", "foreign_server")
        nonce += f":{match[2]}"
    return 200, json.dumps({"answer": answer_challenge(key, nonce)}).encode()


def listener_owners(port: int) -> set[int]:
    """The users that listen on a TCP port of this machine."""
    owners = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    owners.add(int(fields[7]))
    return owners


def _error_body(message: str, kind: str, code: str | None) -> bytes:
    """An error as OpenAI's API shapes it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def _carries_key(authorization: str, key: str) -> bool:
    """Whether an Authorization header's value holds ``key``, in constant time; no key at all opens nothing."""
    scheme, _, token = authorization.partition(" ")
    matches = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
    return bool(key) and scheme.lower() == "bearer" and matches


_KEY_NEEDED = _error_body("the replica's key is needed", "authentication_error", "invalid_api_key")


class EngineGuard:
    """ASGI middleware inside vLLM: the key on every path but /health, and the keyed challenge.

    vLLM's own check guards /v1 alone; /invocations and more would run inference for anybody on the node.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._identity = os.environ.get("AGENT_INFRA_IDENTITY", "")

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health")
        if is_open or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, body = 401, _KEY_NEEDED
            if scope["path"] == CHALLENGE_PATH and scope["method"] == "GET" and self._key:
                status, body = _challenge_reply(self._key, self._identity, scope["query_string"].decode("latin-1"))
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_allowed(self, scope: Mapping[str, Any]) -> bool:
        if scope["type"] == "http" and scope["path"] == CHALLENGE_PATH:
            return False
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(sent) == 1 and _carries_key(sent[0].decode("latin-1"), self._key)


def process_stamp(pid: int) -> str | None:
    """What tells process ``pid`` from a later one with its number (boot id and start time); None when it is gone.

    A zombie is gone: it holds no port and no file, and whoever should reap it may be slow.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


REPLICA_STATES = ("pending", "starting", "loading", "ready", "draining", "stopped", "failed")


@dataclass(frozen=True)
class GpuSample:
    """One GPU as NVML sees it; None where the device does not tell (utilisation under MIG, for one)."""

    name: str
    utilization: float | None  # 0 to 100
    memory_used: int | None  # bytes
    memory_total: int | None  # bytes
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class ReplicaRecord:
    """What `serve` writes to replicas/<id>.json, atomically, whenever it changes."""

    replica: str
    model: str
    state: str  # one of REPLICA_STATES
    engine: str
    node: str  # host name
    pid: int  # of `serve`
    process: str  # stamp that tells this process from a later one with its number: boot id and start time
    host: str = "127.0.0.1"  # address the engine listens on
    port: int | None = None
    telemetry_port: int | None = None
    job_id: str | None = None
    progress: str | None = None  # "5/9" while weights load
    message: str | None = None
    failure: ReplicaFailure | None = None
    restarts: int = 0  # of the engine, by `serve`
    started_at: float = 0.0  # s since the epoch
    ready_at: float | None = None
    ends_at: float | None = None  # walltime
    slots: int = 0
    gpus: tuple[GpuSample, ...] = ()
    gpu_ids: tuple[str, ...] = ()  # handed out to it (CUDA_VISIBLE_DEVICES)
    is_idle: bool = False  # it ended by itself, after idle_shutdown_minutes without a turn
    # Of its job, as the scheduler said at the last look:
    time_left_s: float | None = None  # of the walltime
    queue_wait_s: float | None = None  # between submission and start, or until now
    pending_reason: str | None = None  # the scheduler's own word, such as QOSMaxJobsPerUserLimit
    partition: str | None = None  # that its job was submitted to
    starts_at: float | None = None  # s since the epoch; when Slurm expects a job that waits to start


STOP_GRACE_S = 25.0  # that an engine has for its turns after SIGTERM; below Slurm's KillWait of 30 s


@dataclass(frozen=True)
class ServeSpec:
    """What `serve` is told, as JSON in <run directory>/specs/<replica>.json (0600)."""

    replica: str
    model: ModelConfig
    run_directory: str
    key_file: str  # 0600: the key that every request to this replica must carry
    bind_host: str = "127.0.0.1"
    gpu_ids: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES; empty: left as it is
    job_id: str | None = None
    stop_grace: float = STOP_GRACE_S  # s that the engine has to finish its turns after SIGTERM; below Slurm's KillWait
    load_timeout: float = 3600.0  # s that the engine has to get ready
    hang_timeout: float = 120.0  # s without an answer to its health probe after which a ready engine is killed
    restart_backoff: float = 1.0  # s before the first restart; five times as long before each further one
    nodes: int = 1  # that the replica spans: on the others, `rank` follows this one
    is_job: bool = False  # in a job of Slurm, whose environment tells its number and the node's name
    is_probe: bool = False  # `serve` only says what it sees here (see probe_node()), and ends


def record_from_json(text: str) -> ReplicaRecord:
    """The record that `serve` wrote; keys of a newer version are left out. ValueError when it is none."""
    try:
        values = _known_fields(ReplicaRecord, json.loads(text))
        values["gpus"] = tuple(GpuSample(**_known_fields(GpuSample, gpu)) for gpu in values.get("gpus", ()))
        values["gpu_ids"] = tuple(values.get("gpu_ids", ()))
        if values.get("failure"):
            values["failure"] = ReplicaFailure(**_known_fields(ReplicaFailure, values["failure"]))
        return ReplicaRecord(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a replica record: {error}") from error


def spec_from_json(text: str) -> ServeSpec:
    """The ServeSpec that ``json.dumps(dataclasses.asdict(spec))`` wrote; ValueError when it is none."""
    try:
        values = _known_fields(ServeSpec, json.loads(text))
        model = _known_fields(ModelConfig, values["model"])
        for name in ("command", "engine_args"):
            model[name] = tuple(model[name]) if model.get(name) is not None else None
        values["model"] = ModelConfig(**model)
        values["gpu_ids"] = tuple(values.get("gpu_ids", ()))
        return ServeSpec(**values)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not a replica's specification: {error}") from error


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.name in values}


def http_get(
    host: str, port: int, path: str, key: str | None = None, *, method: str = "GET", timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[int, bytes]:
    """Status and body of a request without one, whatever http_proxy says; status 0 when nothing answers in time."""
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(64 << 20)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@dataclass(frozen=True)
class EngineClient:
    """Asks one running engine about itself; every question has a deadline."""

    engine: Engine
    host: str
    port: int
    key: str
    identity: str = ""

    def answers(self) -> bool:
        """Whether its health probe says that it serves."""
        return self.engine.is_healthy(self._get(self.engine.health_path)[0])

    def is_ours(self) -> bool:
        """Whether the server on the port knows the key, where its kind can show that it does."""
        if not self.engine.is_guarded:
            return True
        nonce = os.urandom(16).hex()
        status, body = self._get(f"{CHALLENGE_PATH}?nonce={nonce}")
        return status == 200 and answer_challenge(self.key, f"{nonce}:{self.identity}").encode() in body

    def load(self) -> EngineLoad | None:
        """Its own figures; None where it does not tell or does not answer."""
        if not self.engine.metrics:
            return None
        status, body = self._get(METRICS_PATH, self.key)
        return read_engine_load(self.engine, body.decode("utf-8", "replace")) if status == 200 else None

    def _get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104 (a comparison)
        return http_get(host, self.port, path, key)


class GpuSampler:
    """Samples the GPUs named by CUDA_VISIBLE_DEVICES' kind of ids; no driver or no pynvml means no GPUs.

    Owns the NVML library's initialisation. ``ids`` None: all GPUs of the machine.
    """

    def __init__(self, ids: Sequence[str] | None) -> None:
        self._ids = ids
        self._nvml: Any = None
        self._errors: tuple[type[BaseException], ...] = ()
        with contextlib.suppress(ImportError):
            import pynvml

            # With an old driver it raises NVMLLibraryMismatchError, which is no NVMLError; an old pynvml has none.
            self._errors = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))
            with contextlib.suppress(*self._errors):
                pynvml.nvmlInit()
                self._nvml = pynvml

    def sample(self) -> tuple[GpuSample, ...]:
        """The GPUs as they are now; one that cannot be asked is left out."""
        if self._nvml is None:
            return ()
        return tuple(self._read(handle) for handle in self._handles())

    def close(self) -> None:
        if self._nvml is not None:
            self._ask(self._nvml.nvmlShutdown)
            self._nvml = None

    def _handles(self) -> Iterator[Any]:
        ids = self._ids
        if ids is None:
            ids = [str(index) for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0)]
        for name in ids:
            if name.isdecimal():
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, int(name))
            else:
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, name)
            if handle is not None:
                yield from self._mig_devices(handle) or [handle]

    def _mig_devices(self, handle: Any) -> list[Any]:
        """The MIG devices of a GPU that is cut into some; the GPU itself tells nothing of use then."""
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, handle)
        if not mode or mode[0] != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        count = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        devices = [self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(count)]
        return [device for device in devices if device is not None]

    def _read(self, handle: Any) -> GpuSample:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return GpuSample(
            name=self._ask(nvml.nvmlDeviceGetName, handle) or "GPU",
            utilization=None if rates is None else float(rates.gpu),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What an NVML function says, None where this device, this driver or its version does not support it."""
        try:
            return function(*arguments)
        except self._errors:
            return None


def sampled_gpus(spec: ServeSpec, environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The ids of the GPUs that a replica may use; None: all of the machine."""
    if not ENGINES[spec.model.engine].uses_gpus:
        return ()
    if spec.gpu_ids:
        return spec.gpu_ids
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else tuple(word.strip() for word in named.split(",") if word.strip())


class PortReservation:
    """A port that no other `serve` of this user on this node takes, for as long as this object is not closed.

    The bind check alone leaves a gap until the engine listens; a lock file per port closes it between replicas.
    """

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock = lock

    def close(self) -> None:
        os.close(self._lock)


def reserve_port(first: int) -> PortReservation | None:
    """The first free port from ``first`` on, reserved; None when a thousand of them are taken.

    RefusedError when the directory of the reservations cannot be trusted.
    """

    directory = private_directory()
    for port in range(first, min(first + 1000, 65536)):
        lock = os.open(directory / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        if is_free(port):
            return PortReservation(port, lock)
        os.close(lock)
    return None


def private_directory() -> Path:
    """A 0700 directory of this user with a short path, for locks and sockets; RefusedError where it is another's."""
    import tempfile

    directory = Path(tempfile.gettempdir()) / f"agent-infra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RefusedError(f"{directory} is not a directory of yours alone (0700); remove it, or set TMPDIR")
    return directory


def is_free(port: int) -> bool:
    """Whether nothing listens on ``port`` at any address of this machine."""
    with socket.socket() as probe:
        # As servers do: connections of an engine that just ended (TIME_WAIT) do not keep its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Watcher:
    """A forked process that kills the engine's process group when `serve` is gone, even by kill -9.

    It reads a pipe whose only writer is `serve`: the number of a process group (0 = none), a line each; its end is
    the end of `serve`. To be made before any thread is.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write_end)
            _watch(read_end)
        os.close(read_end)

    def announce(self) -> None:
        """Name the calling process as the engine; runs in the engine's process before it becomes the engine."""
        self._say(os.getpid())

    def forget(self) -> None:
        """No engine runs any more: its number may soon be another's."""
        self._say(0)

    def _say(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watcher; the replica serves without it
            os.write(self._write_end, b"%d\n" % group)

    def close(self) -> None:
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _watch(read_end: int) -> NoReturn:
    """The watcher's whole life."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        group, rest = 0, b""
        while chunk := os.read(read_end, 4096):
            *lines, rest = (rest + chunk).split(b"\n")
            group = int(lines[-1]) if lines else group
        if group:
            os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


class StopSignals:
    """What `serve` was told by signals; owns the pipe by which any signal ends the main loop's wait."""

    def __init__(self) -> None:
        self.is_asked = False  # to drain and stop
        self._terminations = 0
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    @property
    def is_urgent(self) -> bool:
        """Told to end a second time: at once."""
        return self._terminations > 1

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or as soon as a signal arrives."""
        if select.select([self._read_end], [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_end, 4096)

    def _on_stop(self, number: int, _: object) -> None:
        self.is_asked = True
        self._terminations += number != signal.SIGUSR1


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


class EngineProcess:
    """One run of an engine: its process group and the part of the log that this run wrote."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, watcher: Watcher) -> None:
        """Start it; OSError when its program cannot be started."""
        self._log, self._watcher = log, watcher
        with open(_open_log(log), "ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Announced by the engine itself: `serve` may be killed before it could say the number.
                preexec_fn=watcher.announce,
            )

    def exit_code(self) -> int | None:
        """Negative: ended by that signal; None: it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the engine's first process to end; it ends the others in its own order."""
        self._process.terminate()

    def kill(self) -> None:
        """End the whole process group, also what the engine's end left behind; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in the kernel's hands may take longer
            self._process.wait(10)
        self._watcher.forget()

    def log_tail(self) -> str:
        """The end of what this run wrote."""
        with open(self._log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")


class Telemetry:
    """Serves ``GET /load`` and the keyed challenge on a port of its own, in threads; owns them and the socket."""

    def __init__(self, host: str, key: str, name: str, digest: Callable[[], Mapping[str, Any]]) -> None:
        """``name``: <replica>@<node>, for which the challenge is answered."""
        import http.server
        import socketserver

        self._key, self._name, self._digest = key, name, digest
        body = {
            "do_GET": lambda request: self._answer(request),
            "log_message": lambda *_: None,
            "timeout": 30,
            "protocol_version": "HTTP/1.1",
        }
        handler = type("LoadHandler", (http.server.BaseHTTPRequestHandler,), body)
        # Not an HTTPServer: that asks the resolver for the host's name first.
        self._server = socketserver.ThreadingTCPServer((host, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="telemetry", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _answer(self, request: Any) -> None:
        path, _, query = request.path.partition("?")
        if path == CHALLENGE_PATH:
            status, body = _challenge_reply(self._key, f"{self._name}:{self.port}", query)
        elif not _carries_key(request.headers.get("Authorization", ""), self._key):
            status, body = 401, _KEY_NEEDED
        elif path == "/load":
            status, body = 200, json.dumps(self._digest()).encode()
        else:
            status, body = 404, _error_body("here is GET /load alone", "invalid_request_error", "not_found")
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


class IdleWatch:
    """Whether an engine had no turn for ``minutes``, by its own counters; None: it may be idle for ever."""

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        self.limit_s = math.inf if minutes is None else minutes * 60
        self._clock = clock
        self._busy_at = clock()
        self._totals: tuple[int | None, ...] = ()

    def is_over(self, load: Callable[[], EngineLoad | None]) -> bool:
        """Take in what the engine says now, if need be; what it does not say is taken for a turn."""
        if self.limit_s == math.inf:
            return False
        now = load()
        totals = (now.prompt_tokens, now.generation_tokens) if now else ()
        if now is None or now.running != 0 or now.waiting != 0 or totals != self._totals:
            self._busy_at = self._clock()
        self._totals = totals
        return self._clock() - self._busy_at >= self.limit_s


class LoadSampler:
    """The figures of the engine and of its GPUs, at most half a second old while the engine answers."""

    def __init__(self, gpus: GpuSampler) -> None:
        self.client: EngineClient | None = None  # of the engine that runs; set by the main thread
        self._gpus = gpus
        self._lock = threading.Lock()  # one thread at a time asks the engine and NVML
        self._sampled: dict[str, Any] = {}
        self._sampled_at = -math.inf  # monotonic s

    def sample(self) -> Mapping[str, Any]:
        """The fields of EngineLoad, ``gpus`` and ``at``; the last ones when the engine takes too long now."""
        if self._lock.acquire(timeout=PROBE_TIMEOUT_S):
            try:
                if time.monotonic() - self._sampled_at > DIGEST_MAX_AGE_S:
                    client = self.client
                    load = (client.load() if client else None) or EngineLoad()
                    gpus = [dataclasses.asdict(gpu) for gpu in self._gpus.sample()]
                    self._sampled = {**dataclasses.asdict(load), "gpus": gpus, "at": time.time()}
                    self._sampled_at = time.monotonic()
            finally:
                self._lock.release()
        return self._sampled


def engine_environment(spec: ServeSpec) -> dict[str, str]:
    """What an engine's environment is, but for what its kind adds."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **spec.model.env}
    if spec.gpu_ids:
        # NVML counts in the order of the bus; CUDA by itself puts the fastest first.
        environment.update(CUDA_VISIBLE_DEVICES=",".join(spec.gpu_ids), CUDA_DEVICE_ORDER="PCI_BUS_ID")
    return environment


def make_launch(spec: ServeSpec, key: str, port: int, environment: Mapping[str, str]) -> Launch:
    """What a run of the engine is told; over several nodes with a port of this one at which they meet."""
    master = ("", 0)
    if spec.nodes > 1:
        with socket.create_server(("", 0)) as probe:
            master = (_told_host("0.0.0.0"), probe.getsockname()[1])  # noqa: S104 (where others find this node)
    return Launch(
        host=spec.bind_host,
        port=port,
        key=key,
        python=sys.executable,
        module=os.path.abspath(__file__),
        python_path=environment.get("PYTHONPATH", ""),
        stop_grace=spec.stop_grace,
        nodes=spec.nodes,
        master=master,
        identity=server_identity(spec.replica, _node_name(spec), port),
    )


def _node_name(spec: ServeSpec) -> str:
    """This node's name; in a job, Slurm's."""
    return (spec.is_job and os.environ.get("SLURMD_NODENAME")) or socket.gethostname()


def _told_host(bind_host: str) -> str:
    """The address under which others find what listens on ``bind_host``; the job's script asks Slurm for the node's."""
    is_wildcard = bind_host in ("", "0.0.0.0", "::")  # noqa: S104 (a comparison)
    return (os.environ.get("AGENT_INFRA_ADDRESS") or socket.gethostname()) if is_wildcard else bind_host


class Replica:
    """Keeps one engine running until told to stop, and its record true. The main thread owns all but ``digest``."""

    def __init__(self, spec: ServeSpec, key: str, watcher: Watcher, signals: StopSignals) -> None:
        self._spec, self._key, self._watcher, self._signals = spec, key, watcher, signals
        self._engine = ENGINES[spec.model.engine]
        self._directory = Path(spec.run_directory)
        self._log = self._directory / "logs" / f"{spec.replica}.log"
        self._gpus = GpuSampler(sampled_gpus(spec, {**os.environ, **spec.model.env}))
        self._load_sampler = LoadSampler(self._gpus)
        self._is_written = False  # whether the file says what the record says
        self._record = ReplicaRecord(
            replica=spec.replica,
            model=spec.model.name,
            state="starting",
            engine=spec.model.engine,
            node=_node_name(spec),
            pid=os.getpid(),
            process=process_stamp(os.getpid()) or "",
            host=_told_host(spec.bind_host),
            job_id=os.environ.get("SLURM_JOB_ID") if spec.is_job else spec.job_id,
            started_at=time.time(),
            slots=self._engine.slots(spec.model),
            gpus=self._gpus.sample(),
            gpu_ids=spec.gpu_ids,
        )

    def run(self) -> int:
        """The whole life of the replica; the exit code of `serve`."""
        telemetry = Telemetry(
            self._spec.bind_host, self._key, f"{self._record.replica}@{self._record.node}", self.digest
        )
        try:
            self._update(telemetry_port=telemetry.port)
            failure = self._run_engines()
        except RefusedError as error:
            failure = ReplicaFailure("unknown", str(error), "mend it, and start the replica again")
        finally:
            telemetry.close()
            self._gpus.close()
        if failure is None:
            message = f"no turn for {self._spec.model.idle_shutdown_minutes:g} min" if self._record.is_idle else None
            self._update(state="stopped", message=message, failure=None, port=None, telemetry_port=None)
            return 0
        self._note(f"failed ({failure.kind}): {failure.line}; {failure.hint}")
        self._update(state="failed", message=None, failure=failure, port=None, telemetry_port=None)
        return 1

    def digest(self) -> Mapping[str, Any]:
        """The body of ``GET /load``; called by any thread."""
        return {"state": self._record.state, "slots": self._record.slots, **self._load_sampler.sample()}

    def _run_engines(self) -> ReplicaFailure | None:
        """Run the engine, again after a failure as often as is sensible; None when told to stop."""
        restarts, base_port = 0, self._spec.model.base_port
        while True:
            reservation = reserve_port(base_port)
            if reservation is None:
                line = f"no port of the thousand from {base_port} on is free"
                return ReplicaFailure("port_in_use", line, "set base_port to where some are")
            with contextlib.closing(reservation):
                failure = self._run_engine(reservation.port)
            if failure is None:
                return None
            was_ready = self._record.state == "ready"
            if was_ready and time.time() - (self._record.ready_at or 0) > FORGIVEN_AFTER_S:
                restarts = 0
            if restarts == MAX_RESTARTS or (failure.kind in HOPELESS_FAILURES and not was_ready):
                return failure
            if failure.kind == "port_in_use":
                base_port = reservation.port + 1
            pause = self._spec.restart_backoff * 5**restarts
            restarts += 1
            self._announce_restart(failure, f"restart {restarts} of {MAX_RESTARTS} in {pause:g} s")
            if self._pause(pause):
                return None

    def _announce_restart(self, failure: ReplicaFailure, plan: str) -> None:
        message = f"{failure.line}; {plan}"
        self._note(message)
        restarts = self._record.restarts + 1
        self._update(state="starting", message=message, failure=failure, restarts=restarts, port=None, progress=None)

    def _run_engine(self, port: int) -> ReplicaFailure | None:
        """One run of the engine, from its start to its end; None when it was told to stop."""
        spec = self._spec
        environment = engine_environment(spec)
        launch = make_launch(spec, self._key, port, environment)
        self._lead(launch)
        environment.update(self._engine.environment(launch))
        argv = self._engine.argv(spec.model, launch)
        self._note("starting: " + shlex.join(argv))
        try:
            process = EngineProcess(argv, environment, self._log, self._watcher)
        except OSError as error:
            hint = "give the program's full path in command, or install it on this node"
            return ReplicaFailure("bad_argument", f"{argv[0]} cannot be started: {error.strerror}", hint)
        client = self._load_sampler.client = EngineClient(
            self._engine, spec.bind_host, port, self._key, launch.identity
        )
        try:
            self._update(state="loading", port=port)
            failure = self._load(process, client)
            if failure is None and not self._signals.is_asked:
                failure = self._stand_by(process, client)
            if failure is None:
                self._end(process, client)
            return failure
        finally:
            self._load_sampler.client = None
            self._lead(None)
            process.kill()

    def _lead(self, launch: Launch | None) -> None:
        """Tell the ranks on the replica's other nodes of a run of the engine; None: of its end, which ends theirs."""
        path = self._directory / "ranks" / f"{self._spec.replica}.json"
        if self._spec.nodes > 1 and launch is not None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, json.dumps({"master": launch.master, "port": launch.port, "at": time.time()}))
        elif self._spec.nodes > 1:
            path.unlink(missing_ok=True)

    def _load(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Wait until the engine is ready; None then, and when told to stop."""
        deadline = time.monotonic() + self._spec.load_timeout
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._read_progress(process)
            if client.answers() and client.is_ours():
                gpus = self._gpus.sample()
                self._update(state="ready", ready_at=time.time(), progress=None, message=None, failure=None, gpus=gpus)
                return None
            if time.monotonic() > deadline:
                return classify_failure(process.log_tail(), None)
            self._signals.wait(LOAD_POLL_S)
        return None

    def _read_progress(self, process: EngineProcess) -> None:
        if self._engine.progress and (steps := self._engine.progress.findall(process.log_tail())):
            self._update(progress="/".join(steps[-1]))

    def _stand_by(self, process: EngineProcess, client: EngineClient) -> ReplicaFailure | None:
        """Watch a ready engine until it fails; None when told to stop, or when it was idle for too long."""
        answered_at, idle = time.monotonic(), IdleWatch(self._spec.model.idle_shutdown_minutes, time.monotonic)
        while not self._signals.is_asked:
            exit_code = process.exit_code()
            if exit_code is not None:
                return classify_failure(process.log_tail(), exit_code)
            self._update()
            if idle.is_over(client.load):
                self._note(f"no turn for {idle.limit_s / 60:g} min: it ends, as idle_shutdown_minutes says")
                self._update(is_idle=True)
                return None
            if client.answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > self._spec.hang_timeout:
                line = f"alive, but no answer to GET {self._engine.health_path} for {self._spec.hang_timeout:g} s"
                return ReplicaFailure("timed_out", line, "it hangs, and was killed; its log may tell where")
            self._signals.wait(min(HEALTH_POLL_S, self._spec.hang_timeout / 4, idle.limit_s / 4))
        return None

    def _end(self, process: EngineProcess, client: EngineClient) -> None:
        """Let the engine finish its turns, then end it; when told to, within stop_grace, at once when told again."""
        deadline = time.monotonic() + self._spec.stop_grace
        was_ready = self._record.state == "ready"
        self._update(state="draining", message=None)
        margin_s = min(END_MARGIN_S, self._spec.stop_grace / 2)
        settle_s, idle_since = IDLE_SETTLE_S if self._record.is_idle else DRAIN_SETTLE_S, math.inf
        while was_ready and self._engine.metrics and self._may_wait(process) and time.monotonic() < deadline - margin_s:
            load = client.load()
            if load is None or load.running or load.waiting:
                idle_since = math.inf
                if load and self._record.is_idle and not self._signals.is_asked:
                    deadline = time.monotonic() + self._spec.stop_grace  # a turn that still came has all its time
            elif time.monotonic() - (idle_since := min(idle_since, time.monotonic())) > settle_s:
                break
            self._signals.wait(LOAD_POLL_S)
        process.terminate()
        while time.monotonic() < deadline and self._may_wait(process):
            self._signals.wait(LOAD_POLL_S)

    def _may_wait(self, process: EngineProcess) -> bool:
        return process.exit_code() is None and not self._signals.is_urgent

    def _pause(self, seconds: float) -> bool:
        """Wait; True when told to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._signals.is_asked and (left := deadline - time.monotonic()) > 0:
            self._signals.wait(left)
        return self._signals.is_asked

    def _update(self, **changes: Any) -> None:
        """Change the record and write it, if need be. On a full disk the engine serves on; the next call retries."""
        record = dataclasses.replace(self._record, **changes)
        path = self._directory / "replicas" / f"{record.replica}.json"
        if record != self._record or not self._is_written or not path.exists():
            self._record, self._is_written = record, False
            with contextlib.suppress(OSError):
                write_atomically(path, json.dumps(dataclasses.asdict(record)))
                self._is_written = True

    def _note(self, line: str) -> None:
        """A line of our own in the replica's log, if the disk takes it."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(_open_log(self._log), "a", encoding="utf-8") as file:
            file.write(f"{stamp} agent-infra: {line}\n")


def read_spec(run_directory: str, replica: str) -> tuple[ServeSpec, str]:
    """What a replica is told, and the key; RefusedError where either cannot be read."""
    path = Path(run_directory) / "specs" / f"{replica}.json"
    try:
        spec = spec_from_json(path.read_text(encoding="utf-8"))
        key = Path(spec.key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be served: {error}; start the replica again") from error
    if not key:
        raise RefusedError(f"{spec.key_file}: holds no key; delete it and start the deployment again")
    return spec, key


def probe_node(spec: ServeSpec) -> dict[str, Any]:
    """What a replica would find here: ``{node, python, package, gpus, model, hub}``.

    ``package`` is the version of the engine's package, ``model`` one of local, cached, remote and missing, ``hub``
    whether the Hugging Face hub can be reached.
    """
    import importlib.metadata
    import urllib.error
    import urllib.request

    environment, package = engine_environment(spec), ENGINES[spec.model.engine].package
    version, hub = None, True
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(package) if package else None
    try:
        endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
        urllib.request.urlopen(endpoint, timeout=5.0).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError as error:
        error.close()  # it answers
    except (OSError, ValueError):
        hub = False
    sampler = GpuSampler(sampled_gpus(spec, environment))
    names = [gpu.name for gpu in sampler.sample()] or [
        f"device {name}" for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
    ]
    sampler.close()
    path = spec.model.model_path
    if os.path.exists(path) or spec.model.engine == "command":
        model = "local"
    elif is_hub_id(path):
        model = "cached" if is_in_hub_cache(path, environment) else "remote"
    else:
        model = "missing"
    python = ".".join(str(part) for part in sys.version_info[:3])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return {"node": node, "python": python, "package": version, "gpus": names, "model": model, "hub": hub}


def serve(run_directory: str, replica: str) -> int:
    """Run one replica as specs/<replica>.json says, until SIGTERM; returns 0 when stopped, 1 when it failed.

    Writes replicas/<replica>.json and logs/<replica>.log. RefusedError when it cannot be started at all.
    """
    spec, key = read_spec(run_directory, replica)
    if spec.is_probe:
        write_atomically(Path(run_directory) / "replicas" / f".{replica}.probe", json.dumps(probe_node(spec)))
        return 0
    check_engine_args(spec.model)
    with contextlib.closing(Watcher()) as watcher:
        return Replica(spec, key, watcher, StopSignals()).run()


class Rank:
    """A headless engine on one of the other nodes of a replica: runs for as long as the head's run does."""

    def __init__(self, run_directory: str, replica: str, number: int) -> None:
        self._spec, self._key = read_spec(run_directory, replica)
        self._number = number
        folder = Path(run_directory)
        self._lead = folder / "ranks" / f"{replica}.json"
        self._log = folder / "logs" / f"{replica}.rank{number}.log"
        self._told = ""  # of the run that this rank is part of
        self._process: EngineProcess | None = None

    def run(self, watcher: Watcher, signals: StopSignals) -> int:
        """Follow the head until told to end twice, or once and the head has ended: its turns need this rank."""
        try:
            while not signals.is_urgent:
                self._follow(watcher)
                if signals.is_asked and not self._told:
                    break
                signals.wait(RANK_POLL_S)
        finally:
            self._end()
        return 0

    def _follow(self, watcher: Watcher) -> None:
        told = ""
        with contextlib.suppress(FileNotFoundError):
            told = self._lead.read_text(encoding="utf-8")
        if told != self._told:
            self._end()
            self._told = told
            if told:
                self._process = self._start(json.loads(told), watcher)

    def _start(self, lead: Mapping[str, Any], watcher: Watcher) -> EngineProcess:
        environment = engine_environment(self._spec)
        launch = dataclasses.replace(
            make_launch(self._spec, self._key, lead["port"], environment),
            node_rank=self._number,
            master=tuple(lead["master"]),
        )
        engine = ENGINES[self._spec.model.engine]
        environment.update(engine.environment(launch))
        return EngineProcess(engine.argv(self._spec.model, launch), environment, self._log, watcher)

    def _end(self) -> None:
        """A headless rank does not end by itself when its head does."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def run_rank(run_directory: str, replica: str) -> int:
    """The `rank` role, which srun starts on each node but the head's."""
    rank = Rank(run_directory, replica, int(os.environ.get("SLURM_PROCID", "0")) + 1)
    with contextlib.closing(Watcher()) as watcher:
        return rank.run(watcher, StopSignals())


# Formats that no engine here loads, left out where a repository has safetensors.
_SUPERFLUOUS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*")

# Class of huggingface_hub's error, or of one that it descends from → what it means. The first that fits decides.
HUB_FAILURES: Mapping[str, str] = {
    "GatedRepoError": "it is gated: ask for access on its page, then set HF_TOKEN to a token of that account",
    "RepositoryNotFoundError": "it does not exist or is private: correct model_path, or set HF_TOKEN",
    "HFValidationError": "it is no id of the Hugging Face hub, such as org/model; correct model_path",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it for `pull`",
    "HfHubHTTPError": "the hub refused; try later, or look at what it says",
}
HUB_UNREACHABLE = "the hub cannot be reached from here: check the network, https_proxy and HF_ENDPOINT"


def is_hub_id(model_path: str) -> bool:
    """Whether it has the form of a Hugging Face id, ``org/model``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path) is not None


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it fetches."""
    home = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    base = environment.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(environment.get("HF_HUB_CACHE") or os.path.join(base, "hub")).expanduser()


def is_in_hub_cache(repository: str, environment: Mapping[str, str]) -> bool:
    """Whether a model of the hub was fetched to where this environment looks for it."""
    return any(hub_cache(environment).glob(f"models--{repository.replace('/', '--')}/snapshots/*"))


def fetch_from_hub(repository: str) -> str:
    """Fetch a model into the cache that engines here read (HF_HOME); its directory. RefusedError, with the fix."""
    where = f"{repository} (on {socket.gethostname()})"
    try:
        import huggingface_hub
    except ImportError as error:
        raise RefusedError(
            f"{where}: huggingface_hub is not installed for {sys.executable}; it comes with vLLM, or pip install it"
        ) from error
    try:
        files = huggingface_hub.HfApi().model_info(repository).siblings or []
        has_safetensors = any(file.rfilename.endswith(".safetensors") for file in files)
        ignored = list(_SUPERFLUOUS) if has_safetensors else None
        return str(huggingface_hub.snapshot_download(repository, ignore_patterns=ignored))
    except Exception as error:
        raise RefusedError(f"{where}: {describe_hub_failure(error)}") from error


def describe_hub_failure(error: BaseException) -> str:
    """What an error of huggingface_hub, or of what it uses, means and what to do; then its own first line."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return f"the disk is full: free some space, or set HF_HOME to another disk ({words})"
    names = {kind.__name__ for kind in type(error).__mro__}
    meaning = next((meaning for name, meaning in HUB_FAILURES.items() if name in names), HUB_UNREACHABLE)
    return f"{meaning} ({words})"


def _wait_for_termination() -> None:
    """Return at SIGTERM or SIGINT. By a pipe: no lock that a signal's handler could find taken."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(read_end, 1)


def run_llama_cpp(
    model_path: str, name: str, host: str, port: int, slots: int, threads: int, context_tokens: int
) -> int:
    """The embedded engine: llama.cpp's own server in this process, until SIGTERM; returns the exit code.

    ``context_tokens`` are each slot's; ``threads`` 0 means half of the processors. The key comes by
    AGENT_INFRA_API_KEY. What goes wrong is printed, for `serve` to classify.
    """
    try:
        with open(model_path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise AgentInfraError(f"model file {model_path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise AgentInfraError(f"{model_path} is not a GGUF file")
    if not is_free(port):
        raise AgentInfraError(f"port {port}: address already in use")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model_path
    parameters.model_alias = {name}
    parameters.hostnames, parameters.port = [host], port
    parameters.api_keys = [os.environ["AGENT_INFRA_API_KEY"]]
    parameters.n_parallel, parameters.n_ctx = slots, context_tokens * slots  # the slots share n_ctx
    parameters.cpuparams.n_threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    parameters.cpuparams_batch.n_threads = parameters.cpuparams.n_threads
    parameters.endpoint_metrics = parameters.endpoint_slots = parameters.endpoint_props = True
    parameters.n_threads_http = slots + 64  # each waiting turn holds one, and the health probe needs one too
    parameters.cache_ram_mib = 256  # its default of 8192 is a laptop's whole memory
    parameters.sse_ping_interval = 1  # its end waits for the next ping of every live stream
    parameters.fit_params, parameters.ui, parameters.offline = False, False, True
    parameters.verbosity = 2
    server = xllamacpp.Server(parameters)  # returns once the model is loaded and the port listens
    _wait_for_termination()
    del server  # cuts the streams, then ends
    return 0

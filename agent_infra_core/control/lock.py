"""The lock that makes one process a deployment's controller, and how `stop` ends that process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_infra_core.control.link import DRAIN_S
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.state import DeploymentPaths, read_relay_record
from agent_infra_core.host import command_name, end_process, process_stamp

LIBRARY_HOLDER_VERB = "ConnectionManager"  # verb of a holder that isn't our process, so it must not be ended


class DeploymentLock:
    """The lock held by a deployment's controller: an flock, which the kernel releases when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def acquire(self, verb: str) -> None:
        """Take the lock. RefusedError, naming the holder, if another controller is running."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            holder = lock_holder(self._path) or {"verb": "another command", "pid": "?"}
            name, other = self._path.parent.name, "--port" if verb == "proxy" else "cluster.name"
            raise RefusedError(
                f"the deployment {name} is already run by {describe_holder(holder)}; "
                f"end that with `{command_name()} stop --name {name}`, or give this one another {other}"
            ) from None
        os.ftruncate(descriptor, 0)
        holder = {"pid": os.getpid(), "verb": verb, "node": os.uname().nodename, "process": process_stamp(os.getpid())}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._file = descriptor

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def lock_holder(path: Path) -> dict[str, Any] | None:
    """``{pid, verb, node, process}`` of the process that holds a deployment's lock; None if it is free.

    The home directory may be shared, so the process may run on another machine: see is_here(). Version 0.1.0 wrote
    neither ``node`` nor ``process``.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(ValueError):
            holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
            return holder
        return {"pid": 0, "verb": "another command"}
    finally:
        os.close(descriptor)
    return None


def is_here(holder: Mapping[str, Any], path: Path) -> bool:
    """Whether the process that holds the lock at ``path`` runs on this machine, and so may be signalled.

    A pid alone says nothing: on another machine, the same number is another process.
    """
    if "process" in holder:
        return bool(process_stamp(holder["pid"]) == holder["process"])
    with contextlib.suppress(OSError):  # 0.1.0: does that process have this file open?
        return any(os.path.samefile(entry, path) for entry in Path(f"/proc/{holder['pid']}/fd").iterdir())
    return False


def describe_holder(holder: Mapping[str, Any]) -> str:
    """The process that holds the lock, for a message: its verb, pid and machine."""
    return f"`{holder['verb']}` (pid {holder['pid']} on {holder.get('node', 'this or another machine')})"


def local_proxy(paths: DeploymentPaths) -> tuple[dict[str, Any] | None, str | None]:
    """``{pid, process, host, port}`` of the relay on this machine, or None; and what is wrong with the proxy."""
    relay, holder = read_relay_record(paths), lock_holder(paths.lock)
    if relay is None and holder and not is_here(holder, paths.lock):
        return None, f"the proxy runs elsewhere, by {describe_holder(holder)}; run `status` there"
    if relay is None:
        return None, "no proxy is running; `connect` starts one"
    return relay, None if holder else "the proxy is running without its controller; `connect` takes it over"


def end_holder(path: Path, now: bool) -> list[str]:
    """End the process that holds the lock at ``path``: ask it to shut down, and kill it if that fails."""
    holder = lock_holder(path)
    if holder is None:
        return []
    if not is_here(holder, path):
        raise AgentInfraError(
            f"the deployment is run by {describe_holder(holder)}, this is {os.uname().nodename}: run `stop` there. "
            f"If that machine is gone for good, delete {path}"
        )
    if holder["verb"] == LIBRARY_HOLDER_VERB:
        raise AgentInfraError(
            f"the deployment is run by a program that imported agent_infra (pid {holder['pid']}); "
            "let that program call stop(), or end it, then run stop again"
        )
    stamp = process_stamp(holder["pid"]) or ""
    with contextlib.suppress(ProcessLookupError):  # it may end at this moment
        os.kill(holder["pid"], signal.SIGTERM)
    deadline = time.monotonic() + (10.0 if now else 2 * DRAIN_S + 10.0)
    while process_stamp(holder["pid"]) == stamp and time.monotonic() < deadline:
        time.sleep(0.05)
        if now:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)
    end_process(holder["pid"], stamp, 0.0)
    return [f"`{holder['verb']}` (pid {holder['pid']})"]

"""Where a deployment keeps its state: paths, keys, and the records of its replicas."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import (
    absolute_path,
    boot_id,
    create_atomically,
    file_lock,
    peer_process,
    process_stamp,
    unix_address,
)
from agent_infra_core.protocol import CONFIG_FORMAT, ReplicaFailure, ReplicaRecord, decode_record
from agent_infra_core.settings import KEY_PATTERN, Config, base_directory, proxy_view

START_LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class DeploymentPaths:
    """Paths of a deployment's state: <state home>/agent-infra/<deployment>, 0700."""

    root: Path

    @property
    def lock(self) -> Path:
        """Locked with flock by the deployment's controller as long as it lives; contains its pid."""
        return self.root / "controller.lock"

    @property
    def relay_socket(self) -> Path:
        return self.root / "relay.sock"

    @property
    def relay_record(self) -> Path:
        """JSON {pid, process, host, port}, by which `status` and `stop` find the relay."""
        return self.root / "relay.json"

    @property
    def link_lock(self) -> Path:
        """The same as ``lock``, of the process on this machine that leads to a proxy in a job."""
        return self.root / "link.lock"

    @property
    def link_record(self) -> Path:
        """The same as ``relay_record``, of that process."""
        return self.root / "link.json"

    @property
    def drained(self) -> Path:
        """JSON {replica: [job, process]} of replicas that an operator drained."""
        return self.root / "drained.json"

    @property
    def history(self) -> Path:
        """The SQLite file of finished turns, unless proxy.history sets another."""
        return self.root / "history.db"

    @property
    def far_history(self) -> Path:
        """A copy of that of a proxy in a job behind cluster.ssh, as of its end."""
        return self.root / "far_history.db"

    @property
    def client_key(self) -> Path:
        return self.root / "api_key"

    @property
    def replica_key(self) -> Path:
        return self.root / "replica_key"

    @property
    def page_key(self) -> Path:
        """The key needed to open the page, because every user of the machine can reach loopback ports."""
        return self.root / "page_key"

    @property
    def config(self) -> Path:
        """The configuration the deployment was started with, so `stop` needs no other."""
        return self.root / "config.json"

    @property
    def wanted(self) -> Path:
        """JSON {model: number of replicas wanted}, as set by `start` or `scale`."""
        return self.root / "wanted.json"

    @property
    def handover(self) -> Path:
        """JSON {replica: Succession} of replicas being replaced before their walltime ends."""
        return self.root / "handover.json"

    @property
    def leaving(self) -> Path:
        """JSON {replica: its job, or its process without one} of replicas that scaling removes."""
        return self.root / "leaving.json"

    @property
    def run(self) -> Path:
        """The run directory: specs/, replicas/, logs/. With Slurm it is on the cluster's shared file system."""
        return self.root / "run"

    def spec(self, replica: str) -> Path:
        """The ServeSpec read by `serve`; written by the cluster, removed with the replica."""
        return self.run / "specs" / f"{replica}.json"

    def record(self, replica: str) -> Path:
        """The ReplicaRecord written by `serve`."""
        return self.run / "replicas" / f"{replica}.json"

    def log(self, name: str) -> Path:
        return self.run / "logs" / f"{name}.log"


def state_home(environment: Mapping[str, str]) -> Path:
    """The state directory of all deployments (XDG base directory specification)."""
    return absolute_path(base_directory(environment, "XDG_STATE_HOME", ".local/state")) / "agent-infra"


def deployment_names(environment: Mapping[str, str]) -> list[str]:
    """The names of this user's deployments that have state on this machine."""
    return sorted(path.parent.name for path in state_home(environment).glob("*/run"))


def deployment_paths(name: str, environment: Mapping[str, str]) -> DeploymentPaths:
    """The deployment's paths. Creates missing directories with mode 0700. RefusedError if they can't be written."""
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


def start_lock(paths: DeploymentPaths) -> AbstractContextManager[None]:
    """Hold the lock under which replicas are started: one process at a time, of all deployments of this user."""
    return file_lock(paths.root.parent / ".start.lock", START_LOCK_WAIT_S)


def read_or_make_key(path: Path) -> str:
    """The secret in ``path``, created on first use. Processes that race to create it all get the same one.

    Raises RefusedError if the file has no valid key.
    """
    if not path.exists():
        import secrets

        create_atomically(path, secrets.token_urlsafe(32) + "\n")
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(KEY_PATTERN, key):
        raise RefusedError(f"{path} contains no key (at least 8 printable characters, no spaces); delete it")
    return key


def default_history(config: Config, paths: DeploymentPaths) -> Path:
    """The file of finished turns on this machine, unless proxy.history sets another."""
    is_far = proxy_view(config.cluster) is not config.cluster
    return paths.far_history if is_far else paths.history


def config_text(config: Config) -> str:
    """A configuration as it is saved for commands that come later."""
    return json.dumps({"format": CONFIG_FORMAT, **dataclasses.asdict(config)})


def read_record(path: Path) -> ReplicaRecord | None:
    """The record in ``path``; None if the file doesn't exist."""
    try:
        return decode_record(path.stem, path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return decode_record(path.stem, f"{error.strerror}")


def is_alive(record: ReplicaRecord) -> bool:
    """Whether this `serve` is running on this machine; False for another process with the same pid."""
    return process_stamp(record.pid) == record.process


def is_elsewhere(record: ReplicaRecord) -> bool:
    """Whether the record is from another machine, since home directories may be shared.

    Its replica can't be judged or ended from this machine. The node's name alone isn't enough to tell: a laptop gets a
    new one from every network.
    """
    return record.node not in ("", os.uname().nodename) and not record.process.startswith(f"{boot_id()}:")


def is_gone(record: ReplicaRecord) -> bool:
    """Whether the record's `serve` has certainly ended."""
    return not is_alive(record) and not is_elsewhere(record)


def free_replica_id(model: str, taken: Iterable[str]) -> str:
    """``<model>-<n>`` with the lowest n from 1 that is not taken."""
    names = set(taken)
    number = 1
    while f"{model}-{number}" in names:
        number += 1
    return f"{model}-{number}"


def replica_order(record: ReplicaRecord) -> tuple[str, int, str]:
    model, _, number = record.replica.rpartition("-")
    return (model, int(number) if number.isdecimal() else 0, record.replica)


def failed_record(record: ReplicaRecord, line: str) -> ReplicaRecord:
    """The failed record of a replica whose `serve` is gone without a final report; ``line`` is the last of its log."""
    if record.process and record.process.partition(":")[0] != boot_id():  # "" if it was gone before its stamp was taken
        kind, message = "node_failure", f"{record.node} was restarted while it ran"
        hint = "start it again"
    else:
        kind, message = "unknown", f"its `serve` (pid {record.pid}) ended without a report: killed, or out of memory"
        hint = "start it again; its log and the kernel's (dmesg) may say more"
    # A line that `serve` logged in normal operation doesn't explain the failure; any other line may.
    decisive = line if line and " agent-infra: " not in line and not line.startswith("--- ") else message
    return dataclasses.replace(record, state="failed", message=message, failure=ReplicaFailure(kind, decisive, hint))


def read_relay_record(paths: DeploymentPaths) -> dict[str, Any] | None:
    """The controller's record of the deployment's relay; None unless that process is still running."""
    return read_process_record(paths.relay_record)


def read_process_record(path: Path) -> dict[str, Any] | None:
    """The record of a process in ``path``; None unless it is still running, on this machine."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if process_stamp(record["pid"]) == record["process"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unrecorded_relay(paths: DeploymentPaths) -> dict[str, Any] | None:
    """``{pid, process}`` of a living relay whose record couldn't be written, by its socket.

    Only for when no controller runs: the relay takes a connection for the next controller's.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        with unix_address(str(paths.relay_socket)) as address:
            probe.connect(address)
        pid = peer_process(probe)
        return {"pid": pid, "process": process_stamp(pid)}
    return None


def client_key(config: Config, paths: DeploymentPaths) -> str:
    """The key that clients must send: from the configuration, or else created once in the state directory."""
    return config.proxy.api_key or read_or_make_key(paths.client_key)

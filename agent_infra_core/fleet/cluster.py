"""The interface of a cluster, which local.py and slurm.py implement, and the logs of its replicas."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig


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
LOCK_WAIT_S = 30.0


def surplus_logs(logs: Iterable[Path], replicas: Iterable[str]) -> list[Path]:
    """The logs of former replicas but for the KEPT_LOGS newest; other logs (the relay's) are not counted."""
    here = set(replicas)
    former = [log for log in logs if (name := log.name.partition(".log")[0]) not in here and re.search(r"-\d+$", name)]
    return sorted(former, key=lambda log: log.stat().st_mtime, reverse=True)[KEPT_LOGS:]

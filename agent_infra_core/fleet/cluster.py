"""The interface of a cluster, which local.py and slurm.py implement, and the logs of its replicas."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ModelConfig

KEPT_LOGS = 20  # of former replicas
LOG_BYTES = 16 << 20  # a longer log is renamed to .log.old when its replica restarts


TAIL_BYTES = 1 << 20  # of a log that may be shown
FOLLOW_POLL_S = 0.2


def last_lines(lines: Sequence[bytes], count: int) -> Sequence[bytes]:
    return lines[-count:] if count else ()


class Logs(Protocol):
    """The logs of a deployment's replicas, including former ones."""

    def read(self, name: str, start: int, limit: int) -> tuple[bytes, int]:
        """Up to ``limit`` bytes of a log from ``start`` (negative: from its end), and the position after them."""

    def follow(self, names: Sequence[str], lines: int) -> Iterator[tuple[str, bytes]]:
        """The last ``lines`` lines of these logs, each with its name, and then new ones as they are written."""

    def names(self) -> list[str]:
        """The replicas that have a log."""

    def where(self, name: str) -> str:
        """The location of a log, for display."""


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

    def follow(self, names: Sequence[str], lines: int) -> Iterator[tuple[str, bytes]]:
        offsets: dict[str, int] = {}
        while True:
            for name in names:
                first = name not in offsets
                content, end = self.read(name, offsets.get(name, -TAIL_BYTES), TAIL_BYTES)
                *complete, rest = content.split(b"\n")
                if len(rest) == TAIL_BYTES:  # a progress bar: shown unfinished, or it would be read again for ever
                    complete, rest = [rest], b""
                offsets[name] = end - len(rest)  # an unfinished line is read again
                yield from ((name, line) for line in (last_lines(complete, lines) if first else complete))
            time.sleep(FOLLOW_POLL_S)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.log"))

    def where(self, name: str) -> str:
        return str(self._folder / f"{name}.log")


def tail_logs(logs: Logs, names: Iterable[str], lines: int) -> Iterator[tuple[str, bytes]]:
    """The last ``lines`` lines of each log, each with its name; the last may be unfinished."""
    for name in names:
        content = logs.read(name, -TAIL_BYTES, TAIL_BYTES)[0]
        yield from (
            (name, line) for line in last_lines(content.removesuffix(b"\n").split(b"\n") if content else (), lines)
        )


class Cluster(Protocol):
    """Where the replicas of one deployment run. They outlive this object, and another process may have started them.

    Only ``replicas`` is polled. It returns all replicas at once, so a scheduler gets one call per poll, however many
    replicas there are.
    """

    logs: Logs
    poll_s: float  # between polls of the replicas
    problem: str | None  # why the result of replicas() may be out of date

    @property
    def started(self) -> Collection[str]:
        """The replicas that this object has started."""

    def prepare(self, model: ModelConfig) -> ModelConfig:
        """Check a model and fetch its files before anything starts. Returns the model to start. RefusedError."""

    def start(self, model: ModelConfig) -> ReplicaRecord:
        """Start one replica of a prepared model, without waiting until it is ready. RefusedError, OSError."""

    def replicas(self) -> list[ReplicaRecord]:
        """Every replica of the deployment that wasn't cleaned up, in order of model and number."""

    def stop(self, replicas: Iterable[str], now: bool = False) -> None:
        """Ask replicas to drain and exit, or (``now``) end them at once. Replicas that are gone are cleaned up."""

    def wait_stopped(self, replicas: Iterable[str], deadline: float) -> list[str]:
        """Wait until replicas are gone, and clean them up. Returns those still there at ``deadline`` (monotonic s)."""

    def start_replicas(self, model: ModelConfig, count: int) -> list[ReplicaRecord]:
        """Start several replicas, together if that is cheaper."""

    def plan(self, model: ModelConfig, count: int) -> list[str]:
        """The command lines or scripts that start_replicas() would run or submit now."""

    def replica_key(self) -> str:
        """The key that every request to a replica must carry."""

    def pull(self, model: ModelConfig) -> str:
        """Fetch a model's weights to where its replicas read them. Returns their path. RefusedError with the fix."""


def surplus_logs(logs: Iterable[Path], replicas: Iterable[str]) -> list[Path]:
    """The logs of former replicas, except the KEPT_LOGS newest. Other logs (the relay's) aren't included."""
    here = set(replicas)
    former = [log for log in logs if (name := log.name.partition(".log")[0]) not in here and re.search(r"-\d+$", name)]
    return sorted(former, key=lambda log: log.stat().st_mtime, reverse=True)[KEPT_LOGS:]

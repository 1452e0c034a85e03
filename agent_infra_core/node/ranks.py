"""The `rank` role: the headless part of an engine on each additional node of a replica."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_infra_core.host import write_atomically
from agent_infra_core.node.failures import classify_failure
from agent_infra_core.node.process import EngineProcess, StopSignals, Watcher
from agent_infra_core.node.replica import (
    engine_environment,
    job_run,
    make_launch,
    node_name,
    read_spec,
    refusal_path,
    staging_failure,
)
from agent_infra_core.node.staging import StagingError, StagingStopped, stage_weights
from agent_infra_core.protocol import ReplicaFailure

RANK_POLL_S = 0.5  # interval at which a rank checks its head


class Rank:
    """A headless engine on an additional node of a replica; restarts and ends with the head's engine."""

    def __init__(self, run_directory: str, replica: str, number: int) -> None:
        self._spec, self._key = read_spec(run_directory, replica)
        self._number = number
        self._folder = Path(run_directory)
        self._lead = self._folder / "ranks" / f"{replica}.json"
        self._log = self._folder / "logs" / f"{replica}.rank{number}.log"
        self._run = ""  # the head's file for the current run; empty: no run
        self._weights: str | None = None  # the copy on this node, if it was staged
        self._process: EngineProcess | None = None

    def run(self, watcher: Watcher, signals: StopSignals) -> int:
        """Stage the weights while the head does, then follow it. Returns the exit code. Raises StagingError.

        After a signal, go on until the head's run ends, whose turns need this rank; a second one ends the rank at once.
        """
        try:
            self._stage(signals)
        except StagingStopped:
            return 0
        except StagingError as error:
            self._refuse(staging_failure(error))
            raise
        try:
            while not signals.is_urgent:
                self._follow(watcher)
                if signals.is_asked and not self._run:
                    break
                signals.wait(RANK_POLL_S)
        finally:
            self._end()
        return 0

    def _follow(self, watcher: Watcher) -> None:
        try:
            text = self._lead.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        except OSError:  # the shared file system fails for a moment; the engine needn't end for that
            return
        if text == self._run and self._process is not None and (code := self._process.exit_code()) is not None:
            self._refuse(classify_failure(self._process.log_tail(), code))
            self._end()
        if text != self._run:
            self._end()
            self._run = text
            if text:
                self._process = self._start(json.loads(text), watcher)

    def _stage(self, signals: StopSignals) -> None:
        """Copy the weights to this node if the model has ``stage``. Raises StagingError, and StagingStopped."""
        spec = self._spec
        if spec.stage is not None:
            self._weights = stage_weights(
                spec.model_path, spec.stage, engine_environment(spec), lambda *_: None, lambda: signals.is_asked
            )

    def _refuse(self, failure: ReplicaFailure) -> None:
        """Tell the head, which would wait for this rank: until load_timeout, or for as long as its turns may take."""
        failure = dataclasses.replace(failure, line=f"on {node_name(self._spec)}: {failure.line}")
        path = refusal_path(self._folder, self._spec.replica)
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            told = {"job": job_run(), "run": self._run or None, "failure": dataclasses.asdict(failure)}
            write_atomically(path, json.dumps(told))

    def _start(self, lead: Mapping[str, Any], watcher: Watcher) -> EngineProcess:
        launch = make_launch(
            self._spec, self._key, lead["port"], tuple(lead["master"]), self._number, weights=self._weights
        )
        return EngineProcess(launch.argv, launch.environment, self._log, watcher)

    def _end(self) -> None:
        """Kill the engine: a headless rank doesn't end by itself when its head does."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def run_rank(run_directory: str, replica: str) -> int:
    """Run the `rank` role, which srun starts on each node but the head's. Returns the exit code."""
    rank = Rank(run_directory, replica, int(os.environ.get("SLURM_PROCID", "0")) + 1)
    with contextlib.closing(Watcher()) as watcher, contextlib.closing(StopSignals()) as signals:
        return rank.run(watcher, signals)

"""The `rank` role: the headless part of an engine on each additional node of a replica."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_infra_core.node.process import EngineProcess, StopSignals, Watcher
from agent_infra_core.node.replica import engine_environment, make_launch, read_spec
from agent_infra_core.node.staging import StagingStopped, stage_weights

RANK_POLL_S = 0.5  # interval at which a rank checks its head


class Rank:
    """A headless engine on an additional node of a replica; restarts and ends with the head's engine."""

    def __init__(self, run_directory: str, replica: str, number: int) -> None:
        self._spec, self._key = read_spec(run_directory, replica)
        self._number = number
        folder = Path(run_directory)
        self._lead = folder / "ranks" / f"{replica}.json"
        self._log = folder / "logs" / f"{replica}.rank{number}.log"
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

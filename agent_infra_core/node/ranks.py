"""The `rank` role: the part of an engine on a further node. And `serve` for several replicas in one job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.host import self_command, write_atomically
from agent_infra_core.node.gpus import allocate_gpus, gpu_pool, list_gpus
from agent_infra_core.node.process import EngineProcess, StopSignals, Watcher
from agent_infra_core.node.replica import make_launch, read_spec

RANK_POLL_S = 0.5  # between looks of a rank at what its head does


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
        launch = make_launch(self._spec, self._key, lead["port"], tuple(lead["master"]), self._number)
        return EngineProcess(launch.argv, launch.environment, self._log, watcher)

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


def node_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that this job may use; where nvidia-smi does not tell, those that Slurm names."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    pool = gpu_pool(list_gpus(environment), visible)
    return pool or tuple(word.strip() for word in (visible or "").split(",") if word.strip())


def serve_together(run_directory: str, replicas: Sequence[str]) -> int:
    """Run several replicas in this job, a `serve` each, the node's GPUs shared out; returns when all have ended.

    Signals go to all of them; one whose specification is removed is told to drain.
    """
    folder, held = Path(run_directory), dict[str, str]()
    signals, children = StopSignals(), dict[str, subprocess.Popen[bytes]]()
    for replica in replicas:
        spec, _ = read_spec(run_directory, replica)
        gpus = allocate_gpus(spec.gpus, node_gpus(os.environ), held) if spec.gpus else ()
        held.update(dict.fromkeys(gpus, replica))
        spec = dataclasses.replace(spec, gpu_ids=gpus)
        write_atomically(folder / "specs" / f"{replica}.json", json.dumps(dataclasses.asdict(spec)))
        words = [*self_command("serve"), "--run-dir", run_directory, "--replica", replica]
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

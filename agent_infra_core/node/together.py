"""Runs several replicas in one job: one `serve` process each, with a share of the node's GPUs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent_infra_core.host import is_missing, self_command, write_atomically
from agent_infra_core.node.gpus import allocate_gpus, gpu_pool, list_gpus
from agent_infra_core.node.process import StopSignals
from agent_infra_core.node.replica import read_spec

TOGETHER_POLL_S = 1.0  # interval between checks of a job's replicas


def node_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the GPUs that this job may use, from nvidia-smi or else from Slurm (CUDA_VISIBLE_DEVICES)."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    pool = gpu_pool(list_gpus(environment), visible)
    return pool or tuple(word.strip() for word in (visible or "").split(",") if word.strip())


def serve_together(run_directory: str, replicas: Sequence[str]) -> int:
    """Run a `serve` for each replica, with a share of the node's GPUs, until all end. Returns the highest exit code.

    Passes signals on to all; a replica whose specification is removed gets SIGTERM, which drains it.
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
            is_wanted = not signals.is_asked and not is_missing(folder / "specs" / f"{replica}.json")
            if child.poll() is None and ((not is_wanted and replica not in told) or (signals.is_urgent and not urgent)):
                told.add(replica)
                child.send_signal(signal.SIGTERM)
        urgent = signals.is_urgent
        signals.wait(TOGETHER_POLL_S)
    signals.close()
    return max((child.returncode for child in children.values()), default=0)

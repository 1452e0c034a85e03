#!/usr/bin/env python3
"""What `connect` costs while nothing happens: idle replicas of a Slurm behind SSH, each behind its tunnel.

    python benchmarks/tunnel_idle.py                       # as root: 32 replicas, the default driver
    python benchmarks/tunnel_idle.py --before PATH         # beside another checkout, in turns
    python benchmarks/tunnel_idle.py --driver openssh

A Slurm of its own, an sshd on 127.0.0.1 as the login host, and replicas with the real `serve` each, in a few exclusive
jobs; their engine is a small server in llama.cpp's place (idle_engine/). CPU and memory are of `connect` and all its
processes (controller, relay, tunnels); neither sshd's nor the replicas'. Pages that processes share count for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_process import arguments_of, cpu_seconds, process_tree, program_at, resident_mb  # noqa: E402
from program import Program, Running, program, wait_for  # noqa: E402
from testbed.ports import free_port  # noqa: E402
from testbed.slurm import SlurmBed, missing_programs, slurm_bed  # noqa: E402
from testbed.sshd import SshServer  # noqa: E402
from weights import packaged_gguf  # noqa: E402

NODES = 4
SETTLE_S = 10.0  # after the last tunnel is up
PARTS = ("relay", "tunnel")  # roles of the processes; the rest is the controller


def part_of(pid: int) -> str:
    words = arguments_of(pid)
    return next((part for part in PARTS if part in words), "ssh" if words[:1] == ["ssh"] else "controller")


def configure(run: Program, bed: SlurmBed, server: SshServer, replicas: int, driver: str) -> None:
    slurm = {
        "work_dir": str(bed.folder / "work"),
        "partitions": [{"name": "low", "exclusive": True, "gpus_per_node": replicas // NODES}],
        "setup": [f"export AGENT_INFRA_PYTHON={sys.executable} PYTHONPATH={ROOT}/benchmarks/idle_engine"],
    }
    ssh = {name: value for name, value in vars(server.ssh()).items() if value is not None}
    cluster: dict[str, Any] = {"type": "slurm", "name": "idle", "ssh": ssh, "tunnel": "login", "slurm": slurm}
    model = {"name": "m", "model_path": "smollm2-135m-instruct", "engine": "llama_cpp", "replicas": replicas}
    models = [{**model, "base_port": free_port(), "max_model_len": 256, "engine_args": ["--threads", "1"]}]
    cluster["tunnel_driver"] = driver
    document = {"proxy": {"port": run.port}, "cluster": cluster, "models": models}
    run.config.write_text(json.dumps(document))


def is_settled(run: Program, replicas: int) -> bool:
    return bool(run.get("/health")["models"].get("m", {}).get("ready") == replicas)


def measure(run: Program, module: Path, replicas: int, seconds: float) -> dict[str, float]:
    """Connect, wait until all tunnels are up, then watch; figures of each part and in all."""
    run.module = module
    started = time.monotonic()
    connected: Running = run.spawn("connect")
    connected.wait_line("^proxy  http")
    wait_for(lambda: is_settled(run, replicas), "all replicas are reached", 300.0)
    figures: dict[str, float] = defaultdict(float)
    figures["s until all are reached"] = time.monotonic() - started
    time.sleep(SETTLE_S)
    tree = process_tree(connected.process.pid)
    before, began = {pid: cpu_seconds([pid]) for pid in tree}, time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    for pid in tree:
        cost, part = 100 * (cpu_seconds([pid]) - before[pid]) / took, part_of(pid)
        figures["% of a core, in all"] += cost
        figures[f"% of a core, {part}"] += cost
        figures["MB, in all"] += resident_mb([pid])
        figures[f"MB, {part}"] += resident_mb([pid])
    figures["processes"] = len(tree)
    assert is_settled(run, replicas)
    assert connected.end() in (0, 130), connected.lines
    return figures


def main() -> None:
    """Run as the command line says; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--driver", choices=("sshtunnel", "openssh"), default="sshtunnel")
    parser.add_argument("--before", type=program_at)
    options = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"needs {', '.join(missing)}: `apt-get install slurmctld slurmd slurm-client munge`, as root")
    contenders = {"this": ROOT / "agent_infra.py", **({"before": options.before} if options.before else {})}
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (
        slurm_bed(nodes=NODES, gpus=options.replicas // NODES, cpus=64) as bed,
        tempfile.TemporaryDirectory(prefix="bench-idle-") as folder,
        SshServer(Path(folder) / "sshd", options={"SetEnv": f"SLURM_CONF={bed.folder}/slurm.conf"}) as server,
        program(Path(folder)) as run,
    ):
        run.environment |= {"HOME": folder, "XDG_CACHE_HOME": str(packaged_gguf().parents[2])}
        configure(run, bed, server, options.replicas, options.driver)
        started = run.run("start", seconds=300.0)
        if started.returncode:
            parser.error(started.stdout + started.stderr)
        for number in range(options.rounds):
            for name, module in contenders.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                for metric, value in measure(run, module, options.replicas, options.seconds).items():
                    samples[metric][name].append(value)
        run.run("stop", "--now")
    print(f"| {options.replicas} idle replicas, {options.driver} | {' | '.join(contenders)} |")
    print("|---" * (1 + len(contenders)) + "|")
    for metric, by_name in samples.items():
        print(
            f"| {metric} | {' | '.join(f'{statistics.median(by_name.get(name, [0.0])):.1f}' for name in contenders)} |"
        )


if __name__ == "__main__":
    main()

"""What submitting 200 replicas takes, and what one look at them costs: one squeue answer, and a record of each.

python benchmarks/slurm_poll.py [REPLICAS]    # as root; brings up a Slurm of its own, see tests/testbed/slurm.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from testbed.slurm import missing_programs, slurm_bed, slurm_cluster  # noqa: E402

from agent_infra_core.fleet.state import deployment_paths  # noqa: E402
from agent_infra_core.host import write_atomically  # noqa: E402
from agent_infra_core.protocol import GpuSample  # noqa: E402
from agent_infra_core.settings import ClusterConfig, ModelConfig, PartitionConfig, SlurmConfig  # noqa: E402

ROUNDS = 15


def cpu_s() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("replicas", nargs="?", type=int, default=200)
    count = parser.parse_args().replicas
    if missing := missing_programs():
        parser.error(f"needs {', '.join(missing)}: `apt-get install slurmctld slurmd slurm-client munge`, as root")
    with slurm_bed(nodes=4, gpus=8, cpus=64) as bed, tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state
        slurm = SlurmConfig((PartitionConfig("low"),), work_dir=str(bed.folder / "work"), setup=("exec sleep 600",))
        paths = deployment_paths("d", os.environ)
        config = ClusterConfig(type="slurm", name="d", tunnel="none", slurm=slurm)
        cluster = slurm_cluster(config, paths, bed.environment)
        model = cluster.prepare(ModelConfig("m", "org/m"))
        began = time.monotonic()
        cluster.start_replicas(model, count)
        submitted_s = time.monotonic() - began
        time.sleep(5)  # Slurm starts what fits; a job's script removes what its replica said before
        gpus = tuple(GpuSample("NVIDIA H100 80GB HBM3", 50.0, 70 << 30, 80 << 30, 350.0, 60.0) for _ in range(4))
        for record in cluster.replicas():
            node = record.node or bed.nodes[0]
            ready = dataclasses.replace(record, state="ready", port=5900, node=node, process="b:1", gpus=gpus)
            path = Path(cluster.host.run_dir) / "replicas" / f"{record.replica}.json"
            write_atomically(path, json.dumps(dataclasses.asdict(ready)))
        costs, walls = [], []
        for _ in range(ROUNDS):
            cpu, wall = cpu_s(), time.monotonic()
            records = cluster.replicas()
            costs.append(cpu_s() - cpu)
            walls.append(time.monotonic() - wall)
        states = {state: sum(r.state == state for r in records) for state in sorted({r.state for r in records})}
        print(f"{len(records)} replicas {states}, submitted in {submitted_s:.1f} s, {ROUNDS} looks")
        print(f"CPU, this side and its commands: median {statistics.median(costs):.3f} s, worst {max(costs):.3f} s")
        print(f"wall: median {statistics.median(walls):.3f} s, worst {max(walls):.3f} s")


if __name__ == "__main__":
    main()

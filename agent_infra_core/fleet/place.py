"""What a Slurm job requests, and which partition it goes to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import ENGINES, llama_cpp_options
from agent_infra_core.fleet.parse import SlurmNode
from agent_infra_core.settings import ModelConfig, PartitionConfig, SlurmConfig


@dataclass(frozen=True)
class JobRequest:
    """One job to submit."""

    deployment: str
    model: ModelConfig
    replicas: tuple[str, ...]  # its replicas: <model>-<number>
    partition: PartitionConfig
    work_dir: str  # absolute, on the cluster
    run_dir: str
    program: str  # path of node.pyz on the cluster
    nodes: int = 1
    gpus: int = 0  # per node
    cpus: int | None = None  # per node; None: the partition's default
    memory_mb: int | None = None  # per node; None: the partition's default
    after: str | None = None  # a job that must end first


HANDOVER_RESERVE_S = 180.0  # for the old replica's turns to end before Slurm's signal, which may be a minute early
JOB_NAME_HEAD = "agent-infra:"
USR1_BEFORE_END_S = 90  # before walltime; Slurm may be a minute early. Longer than a drain takes


def job_name(request: JobRequest) -> str:
    """``agent-infra:<deployment>:<model>:<number>[+<number>…]``; none of the parts can contain a colon or a plus."""
    numbers = "+".join(replica.rpartition("-")[2] for replica in request.replicas)
    return f"{JOB_NAME_HEAD}{request.deployment}:{request.model.name}:{numbers}"


PROXY = "proxy"  # the name of its record and log; a replica's has a number


def proxy_job_name(deployment: str) -> str:
    """The name of the job that runs a deployment's proxy; no replica's job can have it."""
    return f"{JOB_NAME_HEAD}{deployment}:{PROXY}"


def job_replicas(name: str, deployment: str) -> tuple[str, list[str]] | None:
    """The model and replicas in a job's name; None for a job of another deployment."""
    parts = name.split(":")
    if len(parts) != 4 or parts[0] + ":" != JOB_NAME_HEAD or parts[1] != deployment:
        return None
    return parts[2], [f"{parts[2]}-{number}" for number in parts[3].split("+")]


@dataclass(frozen=True)
class ReplicaShape:
    """What one replica requests in a partition."""

    nodes: int
    gpus: int  # per node; 0: uses none
    cpus: int | None  # per node; None: the partition's default
    per_job: int  # replicas per job: 1, or in an exclusive partition as many as fit on a node
    memory_mb: int | None = None  # per node; None: the partition's default


def replica_shape(model: ModelConfig, partition: PartitionConfig, slurm: SlurmConfig) -> ReplicaShape:
    """The shape of a model's replica in a partition. RefusedError if it doesn't fit."""
    engine = ENGINES[model.engine]
    total = model.tensor_parallel_size * model.pipeline_parallel_size
    if not engine.uses_gpus:
        threads = llama_cpp_options(model).threads if model.engine == "llama_cpp" else 0
        return ReplicaShape(1, 0, threads or None, partition.gpus_per_node if partition.exclusive else 1)
    nodes = -(-total // partition.gpus_per_node)
    where = f"model {model.name}: its {total} GPUs do not fit partition {partition.name}"
    if nodes > 1 and not engine.spans_nodes:
        raise RefusedError(
            f"{where} (gpus_per_node: {partition.gpus_per_node}), and engine {model.engine} cannot span nodes; "
            "lower tensor_parallel_size"
        )
    if total % nodes:
        raise RefusedError(
            f"{where}: {nodes} nodes cannot share them evenly; choose tensor_parallel_size × pipeline_parallel_size "
            f"as a multiple of {nodes}, or at most {partition.gpus_per_node}"
        )
    gpus = total // nodes
    per_job = partition.gpus_per_node // gpus if partition.exclusive and nodes == 1 else 1
    cpus = slurm.cpus_per_gpu * gpus if slurm.cpus_per_gpu else None
    memory_mb = parse_memory_mb(slurm.memory_per_gpu) * gpus if slurm.memory_per_gpu else None
    return ReplicaShape(nodes, gpus, cpus, per_job, memory_mb)


def parse_memory_mb(text: str) -> int:
    """A size as sbatch takes it (``64G``, ``512``) in MB."""
    return int(text.rstrip("KMGT")) * {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}.get(text[-1], 1024) // 1024


def job_options(partition: PartitionConfig, slurm: SlurmConfig) -> Mapping[str, str | int | bool | None]:
    """The sbatch options that the configuration adds; null removes one of ours."""
    return {**slurm.sbatch, **partition.sbatch}


def asks_for_gpus(partition: PartitionConfig, slurm: SlurmConfig) -> bool:
    """Whether jobs of GPU engines ask Slurm for GPUs there; sites without GRES don't."""
    return slurm.gpu_flag != "none" and job_options(partition, slurm).get(slurm.gpu_flag, "") is not None


def idle_gpus(node: SlurmNode, partition: PartitionConfig, slurm: SlurmConfig) -> int:
    """GPUs of a node that a job in this partition could have at once. Without GRES, those of nodes without a job."""
    options = job_options(partition, slurm)
    if partition.name not in node.partitions or not node.takes_jobs_of(str(options.get("reservation") or "")):
        return 0
    if not asks_for_gpus(partition, slurm):
        return partition.gpus_per_node if node.is_idle else 0
    return node.free(partition.gres)


def place_replicas(
    count: int, model: ModelConfig, slurm: SlurmConfig, nodes: Sequence[SlurmNode]
) -> list[tuple[PartitionConfig, int]]:
    """Jobs for ``count`` replicas, each with its partition and number of replicas.

    Idle places are filled in order of partition priority; the remaining jobs wait in the preferred partition.
    RefusedError if the model fits no partition.
    """
    fitting, problem = [], None
    for partition in sorted(slurm.partitions, key=lambda each: -each.priority):
        try:
            fitting.append((partition, replica_shape(model, partition, slurm)))
        except RefusedError as error:
            problem = problem or error
    if not fitting:
        raise problem or RefusedError("cluster.slurm.partitions: at least one is needed")
    placed: list[tuple[PartitionConfig, int]] = []
    taken: dict[str, int] = {}  # node → replicas placed there by this call
    left = count
    for partition, shape in fitting:
        for _ in range(_count_idle_jobs(partition, shape, slurm, nodes, taken, -(-left // shape.per_job))):
            placed.append((partition, min(left, shape.per_job)))
            left -= placed[-1][1]
    preferred, shape = fitting[0]
    while left > 0:
        placed.append((preferred, min(left, shape.per_job)))
        left -= placed[-1][1]
    return placed


def _count_idle_jobs(
    partition: PartitionConfig,
    shape: ReplicaShape,
    slurm: SlurmConfig,
    nodes: Sequence[SlurmNode],
    taken: dict[str, int],
    wanted: int,
) -> int:
    """Number of jobs of this shape, up to ``wanted``, that would start at once. Adds their nodes to ``taken``."""
    rooms: list[str] = []  # a node appears once for each job, or part of a job, that fits on it
    reservation = str(job_options(partition, slurm).get("reservation") or "")
    for node in nodes:
        if partition.name not in node.partitions or not node.takes_jobs_of(reservation):
            continue
        gpus, used = idle_gpus(node, partition, slurm), taken.get(node.name, 0)
        if partition.exclusive:
            has_room = node.is_idle and gpus >= shape.gpus * shape.per_job
            rooms += [node.name] if has_room and not used else []
            continue
        fits = [node.free_cpus // (shape.cpus or 1)]
        fits += [gpus // shape.gpus] if shape.gpus else []
        fits += [node.free_memory_mb // shape.memory_mb] if shape.memory_mb else []
        rooms += [node.name] * max(0, min(fits) - used)
    if shape.nodes > 1:
        rooms = list(dict.fromkeys(rooms))
    jobs = min(wanted, len(rooms) // shape.nodes)
    for name in rooms[: jobs * shape.nodes]:
        taken[name] = taken.get(name, 0) + (1 << 20 if partition.exclusive else 1)
    return jobs


def bind_options(model: ModelConfig, tunnel: str) -> dict[str, Any]:
    """``bind_host`` and ``is_gated`` of a replica in a job.

    Nodes are shared, so an engine that doesn't require the key on every path listens only on loopback. Beyond that,
    `serve` stands before it.
    """
    if tunnel == "node":
        return {"bind_host": "127.0.0.1", "is_gated": False}
    return {"bind_host": "0.0.0.0", "is_gated": not ENGINES[model.engine].may_face_network}  # noqa: S104 (the key)

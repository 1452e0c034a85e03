"""What a site offers, for configurations that are written by the program: its GPUs, partitions and accounts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.parse import SlurmNode, count_gres, parse_nodes, parse_partitions, slurm_limit_s
from agent_infra_core.fleet.slurm_host import SlurmHost
from agent_infra_core.host import CommandRunner
from agent_infra_core.node.gpus import GpuSampler
from agent_infra_core.protocol import GpuSample
from agent_infra_core.settings import ClusterConfig

# GB of memory per GPU by what a GRES type or a device's name contains; the first match counts. A type that stands for
# several sizes counts as the smallest. From the vendors' data sheets, and the taxonomy of vLLM's recipes.
_GPU_MEMORY_GB = (
    *(("mi355x", 288), ("mi325x", 256), ("mi300x", 192), ("mi300a", 128), ("mi250", 128), ("mi210", 64)),
    *(("gb300", 288), ("b300", 268), ("gb200", 192), ("b200", 180), ("gh200", 96), ("h200", 141), ("h100", 80)),
    *(("a100", 40), ("l40", 48), ("a40", 48), ("a30", 24), ("a10", 24), ("l4", 24), ("v100", 16), ("t4", 16)),
    *(("rtx_pro_6000", 96), ("rtx6000ada", 48), ("a6000", 48), ("a5000", 24), ("5090", 32), ("4090", 24), ("3090", 24)),
)


def gpu_memory_gb(kind: str) -> int | None:
    """GB of memory of a GPU by its name, such as h100 or a100_80gb; None if the name doesn't tell."""
    name = kind.lower().replace("-", "_").replace(" ", "_")
    name = name.replace("gh200_480gb", "gh200")  # the CPU's memory
    if stated := re.findall(r"(\d+)_?gb?(?![a-z0-9])|(\d+)_?gb", name):
        return int(max(stated[-1]))  # the last size: in a MIG type such as a100_3g.20gb, 3g is its share of the GPU
    return next((size for part, size in _GPU_MEMORY_GB if part in name), None)


@dataclass(frozen=True)
class SitePartition:
    """A partition in which this user may run jobs."""

    name: str
    nodes: int
    gres: str  # name:type, or name, of the GPUs that most of its nodes have; empty: it has none
    other_gres: tuple[str, ...]  # further types
    gpus_per_node: int  # the most that one node has
    idle_gpus: int
    cpus_per_gpu: int | None  # that every node has; None without GPUs
    memory_per_gpu_mb: int | None
    time_limit: str | None  # None: no limit
    is_default: bool

    @property
    def memory_gb(self) -> int | None:
        """Memory of one GPU, as far as its type tells."""
        return gpu_memory_gb(self.gres.partition(":")[2])


@dataclass(frozen=True)
class Site:
    """What a site offers; without partitions, this machine."""

    partitions: tuple[SitePartition, ...] = ()
    accounts: tuple[str, ...] = ()  # of this user; the default first. Empty: Slurm asks for none
    qos: tuple[str, ...] = ()
    gpus: tuple[GpuSample, ...] = ()  # of this machine
    prologue: tuple[str, ...] = ()  # shell lines with which Slurm's commands are found

    @property
    def usual_model(self) -> str:
        """A small model of the catalogue that can run here."""
        return "qwen3-8b" if any(each.gres for each in self.partitions) else "smollm2"


_SURVEY_SCRIPT = """\
command -v scontrol > /dev/null || exit 127
scontrol --oneliner show partition || exit
echo @nodes@; scontrol --oneliner --details show node
echo @groups@; id -Gn
echo @accounting@; scontrol show config | sed -n 's/^AccountingStorageType *= *//p'
echo @accounts@; sacctmgr -nP show user "$(id -un)" format=defaultaccount 2> /dev/null
sacctmgr -nP show assoc user="$(id -un)" format=account,partition,qos 2> /dev/null
exit 0
"""


def survey_here() -> Site:
    """This machine, with the GPUs that NVML shows."""
    sampler = GpuSampler(None)
    try:
        return Site(gpus=sampler.sample())
    finally:
        sampler.close()


def survey_slurm(cluster: ClusterConfig, runner: CommandRunner) -> Site:
    """Ask Slurm what the site offers. RefusedError, SchedulerError, HostUnreachableError; see SlurmHost.

    At some sites only login shells have Slurm's commands on PATH. Any prologue makes it one.
    """
    for prologue in ((), (":",)):
        asked = replace(cluster, slurm=replace(cluster.slurm, prologue=prologue))
        host = SlurmHost(asked, runner, archive=bytes, own_key=str)
        done = host.slurm(_SURVEY_SCRIPT)
        if done.status != 127:
            break
    return replace(parse_survey(host.asked(done).output.decode("utf-8", "replace")), prologue=prologue)


def parse_survey(text: str) -> Site:
    """The site as _SURVEY_SCRIPT printed it. Pure. RefusedError if no partition takes jobs."""
    parts = re.split(r"(?m)^@(\w+)@\n", text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=False))
    rows, nodes = parse_partitions(parts[0]), parse_nodes(sections.get("nodes", ""))
    has_accounting = "none" not in sections.get("accounting", "")
    accounts, qos = _accounts(sections.get("accounts", "")) if has_accounting else ((), ())
    groups = sections.get("groups", "").split()
    partitions = tuple(
        _partition(row, [node for node in nodes if name in node.partitions])
        for name, row in rows.items()
        if row.get("State", "UP") == "UP"
        and _takes(row, "AllowGroups", groups)
        and _takes(row, "AllowAccounts", accounts, "DenyAccounts")
        and _takes(row, "AllowQos", qos, "DenyQos")
    )
    if not partitions:
        raise RefusedError(
            f"Slurm shows no partition that takes your jobs (it has {', '.join(rows) or 'none'}); ask the site's "
            "administrators, or copy configs/slurm.yaml and fill it in"
        )
    return Site(partitions, accounts, qos)


def _accounts(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The user's accounts, the default first, and their QoS, from sacctmgr."""
    lines = [line for line in text.splitlines() if line]
    rows = [line.split("|") for line in lines if line.count("|") == 2]
    default = [line for line in lines if "|" not in line][:1]
    accounts = dict.fromkeys([*default, *(row[0] for row in rows)])
    return tuple(accounts), tuple(sorted({name for row in rows for name in row[2].split(",") if name}))


def _takes(row: Mapping[str, str], allow: str, mine: Iterable[str], deny: str = "") -> bool:
    """Whether one of mine is in a partition's list ``allow`` and not in ``deny``; unknown ones count as taken.

    Slurm ignores ``deny`` where it shows ``allow``.
    """
    own, allowed = set(mine), row.get(allow, "ALL")
    if not own:
        return True
    if allowed not in ("ALL", "(null)", ""):
        return bool(own & set(allowed.split(",")))
    return not own <= set(row.get(deny, "").split(","))


def _partition(row: Mapping[str, str], nodes: Sequence[SlurmNode]) -> SitePartition:
    kinds = {name: sum(node.gres.get(name, 0) for node in nodes) for node in nodes for name in node.gres}
    gpus = sorted((name for name in kinds if name.partition(":")[0] == "gpu"), key=lambda name: -kinds[name])
    gres = gpus[0] if gpus else ""
    having = [node for node in nodes if count_gres(node.gres, gres)] if gres else []
    most = max((count_gres(node.gres, gres) for node in having), default=0)
    limit = row.get("MaxTime", "UNLIMITED")
    return SitePartition(
        name=row["PartitionName"],
        nodes=len(nodes),
        gres=gres,
        other_gres=tuple(gpus[1:]),
        gpus_per_node=most,
        idle_gpus=sum(node.free(gres) for node in having if node.takes_jobs_of("")),
        cpus_per_gpu=min((node.cpus // count_gres(node.gres, gres) for node in having), default=0) or None,
        memory_per_gpu_mb=min((node.memory_mb // count_gres(node.gres, gres) for node in having), default=0) or None,
        time_limit=None if slurm_limit_s(limit) == math.inf else limit,
        is_default=row.get("Default") == "YES",
    )

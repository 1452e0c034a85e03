"""Drafts the configuration of a model of the catalogue for a site: YAML with comments."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.catalogue import CatalogueModel, find_model
from agent_infra_core.fleet.site import Site, SitePartition, gpu_memory_gb, survey_here, survey_slurm
from agent_infra_core.host import CommandRunner
from agent_infra_core.settings import ClusterConfig, SshConfig

ROOM = 1.25  # GPU memory per replica, relative to the documented minimum: many agents' contexts need a KV cache
USUAL_GPU_GB = 80  # assumed where a GRES type doesn't tell
LONGEST_CONTEXT = 131072  # a KV cache for more is seldom there; the documented maximum stands in the comment
_AMBIGUOUS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", "~")


def parse_login(text: str | None) -> SshConfig | None:
    """Parse ``[USER@]HOST[:PORT]``, a login host. RefusedError when it is invalid."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:([^@\s]+)@)?([^@\s:]+)(?::(\d{1,5}))?", text)
    if match is None:
        raise RefusedError(f"--ssh {text}: [USER@]HOST[:PORT] is needed, such as me@login.example.org")
    return SshConfig(host=match[2], user=match[1], port=int(match[3]) if match[3] else None)


def draft_for(
    model: str | None, replicas: int, cluster: ClusterConfig, runner: Callable[[], CommandRunner] | None
) -> str:
    """The configuration of a model of the catalogue for the site where ``runner`` runs Slurm's commands.

    It is for this machine with ``runner`` None, or where there is no Slurm and ``cluster`` names no login host.
    ``model`` None: a small one for a cluster; its deployment is the default one, otherwise it is named after the model.
    RefusedError, SchedulerError, HostUnreachableError.
    """
    row = find_model(model) if model else None
    if runner is None and cluster.ssh is not None:
        raise RefusedError("--local and --ssh exclude each other; give one of them")
    is_local = runner is None or (cluster.ssh is None and shutil.which("scontrol") is None)
    if is_local and row is None:
        raise RefusedError(
            "Slurm's commands are not on this machine; name the cluster's login host: `init --ssh HOST`. On one "
            "machine without Slurm no configuration is needed: `launch` lists models, `up` serves a small one"
        )
    site = survey_here() if is_local or runner is None else survey_slurm(cluster, runner())
    if row is not None:
        return draft_config(row, site, row.name, replicas, cluster.ssh)
    return draft_config(find_model(site.usual_model), site, cluster.name, replicas, cluster.ssh)


def draft_config(row: CatalogueModel, site: Site, name: str, replicas: int = 1, ssh: SshConfig | None = None) -> str:
    """The configuration of a deployment ``name`` that serves this model there. Pure.

    RefusedError if the site has no GPUs that could hold it.
    """
    usable, gpus, why = _placement(row, site)
    lines = ["# docs/configuration.md explains every key, configs/example.yaml has them all.", 'version: "1.0"', ""]
    lines += ["cluster:", f"  name: {_scalar(name)}  # the deployment"]
    if site.partitions:
        lines += _slurm_lines(row, site, usable, ssh)
    return "\n".join([*lines, "", *_model_lines(row, replicas, gpus, why), ""])


def _placement(row: CatalogueModel, site: Site) -> tuple[Sequence[SitePartition], int, str]:
    """The partitions that suit the model, the preferred first; the GPUs per replica, 0 for none; and why so many."""
    if row.engine != "vllm":
        return sorted(site.partitions, key=lambda each: (not each.is_default, bool(each.gres)))[:1], 0, ""
    if not site.partitions:
        return (), *_local_gpus(row, site)
    having = [each for each in site.partitions if each.gres]
    if not having:
        raise RefusedError(f"{row.name} needs GPUs, and no partition has any; `launch smollm2` runs on CPUs")
    needed = {each.name: _gpus_needed(row, each.memory_gb or USUAL_GPU_GB) for each in having}

    def rank(each: SitePartition) -> tuple[bool, bool, bool, int]:
        wanted = needed[each.name]
        return wanted > each.gpus_per_node, wanted > each.idle_gpus, not each.is_default, wanted

    best = min(having, key=rank)
    count = needed[best.name]
    if count > best.gpus_per_node and count % best.gpus_per_node:  # over several nodes, evenly
        count = -(-count // best.gpus_per_node) * best.gpus_per_node
    size = f"{best.memory_gb} GB each" if best.memory_gb else f"if each has {USUAL_GPU_GB} GB; {best.gres} doesn't tell"
    suiting = [each for each in sorted(having, key=rank) if needed[each.name] <= count]
    return suiting, count, f"documented minimum: {row.memory_gb} GB in all; {size}"


def _local_gpus(row: CatalogueModel, site: Site) -> tuple[int, str]:
    sizes = [
        (gpu.memory_total or 0) // 10**9 or gpu_memory_gb(gpu.name) or USUAL_GPU_GB
        for gpu in site.gpus  # 10**9: vendors' gigabytes
    ]
    count = _gpus_needed(row, min(sizes)) if sizes else 1
    if count > len(sizes):
        found = f"{len(sizes)} with {min(sizes)} GB each" if sizes else "none"
        raise RefusedError(
            f"{row.name} needs {row.memory_gb} GB of GPU memory, and room for a KV cache; this machine shows {found}. "
            "Name a cluster's login host with --ssh HOST, or take a smaller model; `launch smollm2` needs no GPU"
        )
    return count, f"documented minimum: {row.memory_gb} GB in all; {min(sizes)} GB each"


def _gpus_needed(row: CatalogueModel, memory_gb: int) -> int:
    """GPUs of this size per replica: a power of two, since attention heads are divided among them."""
    count = 1
    while count * memory_gb < ROOM * row.memory_gb:
        count *= 2
    return count


def _slurm_lines(row: CatalogueModel, site: Site, usable: Sequence[SitePartition], ssh: SshConfig | None) -> list[str]:
    lines = ["  type: slurm"]
    if ssh is not None:
        options = {"host": ssh.host, "user": ssh.user, "port": ssh.port}
        pairs = [f"{key}: {_scalar(value)}" for key, value in options.items() if value]
        lines.append("  ssh: {" + ", ".join(pairs) + "}")
    lines.append("  slurm:")
    if site.prologue:
        listed = ", ".join(_scalar(line) for line in site.prologue)
        lines.append(f"    prologue: [{listed}]  # any line: only login shells have Slurm's commands on PATH here")
    if site.accounts:
        lines.append(f"    account: {_scalar(site.accounts[0])}  # yours: {', '.join(site.accounts)}")
    if site.qos:
        lines.append(f"    default_qos: null  # null: Slurm's default; yours: {', '.join(site.qos)}")
    if row.engine == "vllm":
        cpus = [each.cpus_per_gpu for each in usable if each.cpus_per_gpu]
        memory = [each.memory_per_gpu_mb for each in usable if each.memory_per_gpu_mb]
        lines += [f"    cpus_per_gpu: {min(cpus)}  # what the nodes have for each GPU"] if cpus else []
        lines += (
            [f"    memory_per_gpu: {int(min(memory) * 0.9)}M  # nine tenths of it"] if min(memory, default=0) else []
        )
    lines += ["    partitions:  # filled in order of priority, as far as they are idle; the rest waits in the first"]
    lines += [line for rank, each in enumerate(usable) for line in _partition_lines(each, len(usable) - rank, row)]
    left = [each.name for each in site.partitions if each not in usable]
    lines += [f"    # not used: {', '.join(left)}"] if left else []
    lines.append("    work_dir: ~/.agent-infra  # must be on a file system that login and compute nodes share")
    lines.append(
        "    setup: []  # what you type before the engine: [module load cuda, source ~/venvs/vllm/bin/activate]"
    )
    return lines


def _partition_lines(each: SitePartition, priority: int, row: CatalogueModel) -> Iterator[str]:
    has_gpus = row.engine == "vllm"
    idle = f", {each.idle_gpus} GPUs idle now" if has_gpus else ""
    yield f"      - name: {_scalar(each.name)}  # {each.nodes} nodes{idle}"
    yield f"        priority: {priority}"
    if has_gpus:
        others = f"  # also there: {', '.join(each.other_gres)}" if each.other_gres else ""
        yield f"        gres: {_scalar(each.gres)}{others}"
        yield f"        gpus_per_node: {each.gpus_per_node}"
    if each.time_limit is not None:
        yield f"        time_limit: {json.dumps(each.time_limit)}  # what the partition allows"


def _model_lines(row: CatalogueModel, replicas: int, gpus: int, why: str) -> Iterator[str]:
    yield "models:"
    for page in row.source.split():
        yield f"  # {page}"
    yield f'  - name: {_scalar(row.name)}  # what clients put in "model"'
    yield f"    model_path: {_scalar(row.repository)}"
    yield f"    replicas: {replicas}"
    if row.engine != "vllm":
        yield f"    engine: {row.engine}"
        return
    yield f"    tensor_parallel_size: {gpus}  # GPUs per replica; {why}"
    yield "    gpu_memory_utilization: 0.9"
    length = min(row.context_tokens, LONGEST_CONTEXT)
    yield f"    max_model_len: {length}  # the model takes up to {row.context_tokens}"
    if row.trusts_remote_code:
        yield "    trust_remote_code: true"
    words = row.engine_args()
    if words:
        yield f"    engine_args: [{', '.join(_scalar(word) for word in words)}]"


def _scalar(value: str | int) -> str:
    """A value in YAML."""
    if isinstance(value, int) or (re.fullmatch(r"[A-Za-z~/][\w./~-]*", value) and value.lower() not in _AMBIGUOUS):
        return str(value)
    return json.dumps(value)

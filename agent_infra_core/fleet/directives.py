"""sbatch's options for the jobs of a deployment. Pure."""

from __future__ import annotations

from agent_infra_core.fleet.place import USR1_BEFORE_END_S, JobRequest, job_name, job_options, proxy_job_name
from agent_infra_core.settings import SlurmConfig


def job_directives(request: JobRequest, slurm: SlurmConfig) -> list[tuple[str, str | int | bool]]:
    """Return sbatch's options: ours, overridden by cluster.slurm.sbatch, then by the partition's; null removes one."""
    partition = request.partition
    gpus = f"{partition.gres}:{request.gpus}".partition(":")[2]  # without the GRES' name: h100:4, or 4
    memory = request.memory_mb and f"{request.memory_mb}M"
    resources = {"account": slurm.account, "constraint": slurm.constraint, "mem": memory}
    options: dict[str, str | int | bool | None] = {
        "job-name": job_name(request),
        "partition": partition.name,
        "qos": partition.qos or slurm.default_qos,
        "time": partition.time_limit,
        "nodes": request.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": request.cpus,
        "gres": f"{partition.gres}:{request.gpus}" if request.gpus and slurm.gpu_flag == "gres" else None,
        "gpus-per-node": gpus if request.gpus and slurm.gpu_flag == "gpus-per-node" else None,
        "exclusive": partition.exclusive or None,
        "output": f"{request.run_dir}/logs/{request.replicas[0]}.log",
        "open-mode": "append",  # otherwise a requeue empties the log
        "chdir": request.run_dir,
        "signal": f"B:USR1@{USR1_BEFORE_END_S}",
        "requeue": True,
        "dependency": f"afterany:{request.after}" if request.after else None,
        "export": "HOME,USER,LOGNAME,SHELL,PATH,LANG",  # by default sbatch copies every variable, secrets included
        **{name: value for name, value in resources.items() if value},
        **job_options(partition, slurm),
    }
    return [(name, value) for name, value in options.items() if value is not None]


def proxy_directives(deployment: str, slurm: SlurmConfig, folder: str, log: str) -> list[tuple[str, str | int | bool]]:
    """Return sbatch's options for the proxy's job, which runs in ``folder`` and prints to ``log``."""
    job = slurm.proxy_job
    options: dict[str, str | int | bool | None] = {
        "job-name": proxy_job_name(deployment),
        "partition": job.partition,
        "qos": job.qos,
        "account": slurm.account,
        "time": job.time_limit,
        "nodes": 1,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus,
        "mem": job.memory,
        "output": log.replace("%", "%%"),
        "open-mode": "append",
        "chdir": folder,
        "signal": f"B:TERM@{USR1_BEFORE_END_S}",  # turns in flight end before the walltime
        "requeue": True,
        # By default sbatch copies every variable, secrets included. Python from a module may need the last one.
        "export": "HOME,USER,LOGNAME,SHELL,PATH,LANG,LD_LIBRARY_PATH",
        **job.sbatch,
    }
    return [(name, value) for name, value in options.items() if value is not None]

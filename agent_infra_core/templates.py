"""Job scripts: what a job is → the script that sbatch is given, by Jinja2."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from agent_infra_core import __version__
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.place import USR1_BEFORE_END_S, JobRequest, job_name
from agent_infra_core.host import resource
from agent_infra_core.settings import ContainerConfig, SlurmConfig, _shorten


class ShellText(str):
    """Text that goes into a job script as it stands: whoever makes it has quoted what needs to be."""

    __slots__ = ()


def shell_words(value: Any) -> str:
    """A value as the shell reads it back: quoted, a list word for word; TypeError for what is no word."""
    if isinstance(value, ShellText):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(shell_words(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{_shorten(value)} is no word for the shell")
    return shlex.quote(str(value))


def job_directives(request: JobRequest, slurm: SlurmConfig) -> list[tuple[str, str | int | bool]]:
    """The options of sbatch: ours, then the configuration's, then the partition's; null takes one away."""
    partition = request.partition
    options: dict[str, str | int | bool | None] = {
        "job-name": job_name(request),
        "partition": partition.name,
        "qos": partition.qos or slurm.default_qos,
        "time": partition.time_limit,
        "nodes": request.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": request.cpus,
        "gres": f"{partition.gres}:{request.gpus}" if request.gpus else None,
        "exclusive": partition.exclusive or None,
        "output": f"{request.run_dir}/logs/{request.replicas[0]}.log",
        "open-mode": "append",  # else a requeue empties the log
        "chdir": request.run_dir,
        "signal": f"B:USR1@{USR1_BEFORE_END_S}",
        "requeue": True,
        "dependency": f"afterany:{request.after}" if request.after else None,
        "export": "HOME,USER,LOGNAME,SHELL,PATH,LANG",  # everything would be copied else, secrets too
        **slurm.sbatch,
        **partition.sbatch,
    }
    return [(name, value) for name, value in options.items() if value is not None]


def job_launchers(request: JobRequest, container: ContainerConfig | None) -> tuple[ShellText, ShellText]:
    """The words before `serve`, and those before `rank` (which srun starts), as the shell reads them."""
    if container is None:
        bare = ShellText(f'"$python" {shlex.quote(request.program)}')
        return bare, bare
    folders = [request.work_dir]
    if request.model.model_path.startswith("/"):
        folders.append(os.path.dirname(request.model.model_path))
    if container.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if request.gpus else [])]
        words += [word for folder in folders for word in ("--bind", folder)]
        inside = ShellText(shlex.join([*words, container.image, "python3", request.program]))
        return inside, inside
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    words = [f"--container-image={container.image}", f"--container-mounts={mounts}", "python3", request.program]
    head = ["srun", "--nodes=1", "--ntasks=1", "--relative=0", "--cpu-bind=none", *words]
    return ShellText(shlex.join(head)), ShellText(shlex.join(words))


def job_template(request: JobRequest) -> str:
    """The template that fits a job, of those in slurm_templates/."""
    if request.model.engine != "vllm":
        return "engine.sbatch.j2"
    return "vllm_multinode.sbatch.j2" if request.nodes > 1 else "vllm.sbatch.j2"


def render_job(request: JobRequest, slurm: SlurmConfig) -> str:
    """The script of a job, by the packaged templates or the configuration's own; RefusedError."""
    import jinja2

    folder = resource("slurm_templates")

    own = Path(slurm.template).expanduser() if slurm.template else None
    loaders = [jinja2.FileSystemLoader(path) for path in ([own.parent] if own else []) + [folder]]
    environment = jinja2.Environment(  # noqa: S701  no HTML: every value is quoted for the shell by shell_words
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        finalize=shell_words,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shell"] = ShellText
    launcher, rank_launcher = job_launchers(request, slurm.container)
    values = {item.name: getattr(request, item.name) for item in dataclasses.fields(request)}
    values |= {"partition": request.partition.name, "directives": job_directives(request, slurm)}
    values |= {"setup": slurm.setup, "container": slurm.container, "version": __version__}
    name = own.name if own else job_template(request)
    try:
        script = environment.get_template(name).render(**values, launcher=launcher, rank_launcher=rank_launcher)
    except jinja2.TemplateNotFound as error:
        where = " or ".join(str(path) for loader in loaders for path in loader.searchpath)
        raise RefusedError(f"the job template {error.name} is not in {where}") from error
    except (jinja2.TemplateError, TypeError) as error:
        line = getattr(error, "lineno", None)
        raise RefusedError(f"the job template {name}{f', line {line}' if line else ''}: {error}") from error
    if not script.startswith("#!"):
        raise RefusedError(f"the job template {name}: its first line must be #!, such as #!/bin/bash -l")
    return script

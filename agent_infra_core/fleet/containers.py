"""Commands inside a container: one row per runtime. Pure; every command is text for bash, quoted here."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent_infra_core.settings import ContainerConfig, ModelConfig, PartitionConfig, SlurmConfig

SHARED_DEFAULTS = (("HF_HOME", "$HOME/.cache/huggingface"), ("TMPDIR", "/tmp"))  # noqa: S108 (the system's)
SHARED_FOLDERS = tuple(name for name, _ in SHARED_DEFAULTS)  # the job sets them; the user's own variables may not
# A variable, or all with a prefix, that podman passes on from the job. Not HOME and PATH, which are the container's.
PODMAN_VARIABLES = (
    *("AGENT_INFRA_*", "SLURM*", "CUDA*", "NVIDIA_*", "ROCR_*", "HIP_*", "NCCL_*", "UCX_*"),
    *("HF_*", "VLLM_*", "OMP_*", "TMPDIR", "LANG"),
)


def in_container(model: ModelConfig, container: ContainerConfig | None) -> ModelConfig:
    """Return a model with the container's env, which the model's own overrides."""
    return model if container is None else dataclasses.replace(model, env={**container.env, **model.env})


@dataclass(frozen=True)
class Inside:
    """What a container gets of the job around it."""

    container: ContainerConfig
    folders: tuple[str, ...]  # ``folder`` or ``folder:where[:options]``
    shared: tuple[str, ...]  # variables of the job that name further folders
    variables: tuple[str, ...]  # further variables of the job
    has_gpus: bool

    @property
    def pairs(self) -> list[str]:
        return [folder if ":" in folder else f"{folder}:{folder}" for folder in self.folders]


def inside_of(slurm: SlurmConfig, model: ModelConfig, work_dir: str, has_gpus: bool) -> Inside:
    """Return what the container of ``slurm``, which must have one, gets."""
    assert slurm.container is not None  # noqa: S101 (for the type checker)
    model, folders = in_container(model, slurm.container), [work_dir]
    if model.model_path.startswith("/"):
        folders.append(os.path.dirname(model.model_path))
    shared: tuple[str, ...] = SHARED_FOLDERS
    if model.env.get("HF_HOME", "").startswith("/"):  # podman refuses a folder that is named twice
        folders, shared = [*folders, model.env["HF_HOME"]], tuple(name for name in SHARED_FOLDERS if name != "HF_HOME")
    folder, variable = staging_mount(model.stage or "")
    folders += [folder] if folder else []
    variables = dict.fromkeys([*model.env, *([variable] if variable else [])])
    if variable and variable not in SHARED_FOLDERS:
        shared = (*shared, variable)
    every = tuple(dict.fromkeys([*folders, *slurm.container.mounts]))
    return Inside(slurm.container, every, shared, tuple(variables), has_gpus)


def staging_mount(stage: str) -> tuple[str, str]:
    """The folder to mount for ``stage``, or the variable that names it; both may be empty."""
    if match := re.match(r"\$(?:\{(\w+)\}|(\w+))", stage):
        return "", match[1] or match[2]
    fixed, dollar, _ = stage.partition("$")
    folder = os.path.dirname(fixed) if dollar else fixed  # a variable further on has no value before the job runs
    return ("" if folder == "/" else folder), ""


def _apptainer(inside: Inside) -> str:
    argv = ["apptainer", "exec", *(["--nv"] if inside.has_gpus else [])]
    argv += [word for folder in inside.folders for word in ("--bind", folder)]
    shared = [f'${{{name}:+--bind "${name}"}}' for name in inside.shared]
    return " ".join([shlex.join(argv), *shared, shlex.quote(inside.container.image)])


def _pyxis(inside: Inside) -> str:
    """Return options of srun."""
    mounts = shlex.quote(",".join(inside.pairs))
    mounts += "".join(f'${{{name}:+,"${name}:${name}"}}' for name in inside.shared)
    return f"{shlex.quote(f'--container-image={inside.container.image}')} --container-mounts={mounts}"


def _podman(inside: Inside) -> str:
    """The job's network and cgroup are the container's, too, so Slurm counts and ends what runs there."""
    container = inside.container
    gpus = "--gpu" if container.runtime == "podman-hpc" else "--device=nvidia.com/gpu=all"
    argv = [container.runtime, "run", "--rm", "--network=host", "--ipc=host", "--cgroups=disabled"]
    argv += ["--security-opt=label=disable", *([gpus] if inside.has_gpus else [])]
    argv += [word for name in (*PODMAN_VARIABLES, *inside.variables) for word in ("-e", name)]
    argv += [word for pair in inside.pairs for word in ("-v", pair)]
    shared = [f'${{{name}:+-v "${name}:${name}"}}' for name in inside.shared]
    return " ".join([shlex.join(argv), *shared, shlex.quote(container.image)])


@dataclass(frozen=True)
class Runtime:
    """How a runtime is called."""

    prefix: Callable[[Inside], str]  # the part of the command before the program
    is_srun: bool = False  # the prefix consists of options of srun


RUNTIMES: Mapping[str, Runtime] = {
    "apptainer": Runtime(_apptainer),
    "pyxis": Runtime(_pyxis, is_srun=True),
    "podman": Runtime(_podman),
    "podman-hpc": Runtime(_podman),
}


def container_launchers(inside: Inside, program: str) -> tuple[str, str]:
    """Return the command before `serve`, and the one before `rank` (which srun starts)."""
    runtime = RUNTIMES[inside.container.runtime]
    command = f"{runtime.prefix(inside)} {shlex.join(['python3', program])}"
    if not runtime.is_srun:
        return command, command
    return f"srun --nodes=1 --ntasks=1 --relative=0 --cpu-bind=none {command}", command


def fetch_command(slurm: SlurmConfig, model: ModelConfig, work_dir: str, program: str) -> str:
    """Return the command that downloads a model with the engine's Python: that of the container if there is one.

    The variables of ``model.env`` must be exported. No value is on the command line.
    """
    argv = shlex.join([program, "fetch", model.model_path])
    if slurm.container is None:
        return f'exec "${{AGENT_INFRA_PYTHON:-python3}}" {argv}'
    runtime, model = RUNTIMES[slurm.container.runtime], dataclasses.replace(model, stage=None)  # a folder of the nodes
    lines = [f'export {name}="${{{name}:-{default}}}"' for name, default in SHARED_DEFAULTS]
    command = f"{runtime.prefix(inside_of(slurm, model, work_dir, has_gpus=False))} python3 {argv}"
    # pyxis only runs in jobs.
    return "\n".join([*lines, 'mkdir -p "$HF_HOME"', f"exec {_srun(slurm) if runtime.is_srun else ''}{command}"])


def _srun(slurm: SlurmConfig) -> str:
    """Return srun with the options of the preferred partition, without GPUs."""
    partition: PartitionConfig = max(slurm.partitions, key=lambda each: each.priority)
    options = {"partition": partition.name, "qos": partition.qos or slurm.default_qos, "account": slurm.account}
    argv = ["srun", "--nodes=1", "--ntasks=1", *(f"--{name}={value}" for name, value in options.items() if value)]
    return shlex.join(argv) + " "

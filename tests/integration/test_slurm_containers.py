"""Engines in containers: podman for real (slow), apptainer and pyxis by stand-ins that record how they are called."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import wait_for
from testbed.ports import free_port
from testbed.releases import ENGINE, make_root, missing_parts
from testbed.slurm import SlurmBed, slurm_bed, slurm_cluster
from weights import packaged_gguf

from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import http_get
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, ContainerConfig, ModelConfig, PartitionConfig, SlurmConfig

# Each runs the command without a container. srun stands for one with pyxis: the options are its alone.
APPTAINER = """#!/bin/sh
printf '%s\\n' "$@" > {folder}/argv; env > {folder}/environment
while [ "$1" != image.sif ]; do shift; done
shift; exec "$@"
"""
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > {folder}/argv; env > {folder}/environment
kept=(); for word; do [[ $word == --container-* ]] || kept+=("$word"); done
exec {srun} "${{kept[@]}}"
"""


@contextmanager
def ready_replica(bed: SlurmBed, container: ContainerConfig, setup: tuple[str, ...]) -> Iterator[ReplicaRecord]:
    """One replica of the embedded engine; nothing of it is left afterwards."""
    partitions = (PartitionConfig("low"),)
    slurm = SlurmConfig(partitions, work_dir=str(bed.folder / "work"), setup=setup, container=container)
    config = ClusterConfig(type="slurm", name="boxed", tunnel="none", poll_interval=0.2, slurm=slurm)
    cluster = slurm_cluster(config, deployment_paths("boxed", os.environ), bed.environment)
    options = ("--threads", "1", "--max-num-seqs", "1")
    model = ModelConfig("s", str(packaged_gguf()), engine="llama_cpp", engine_args=options, base_port=free_port())

    def ready() -> list[ReplicaRecord]:
        records = cluster.replicas()
        assert not [record for record in records if record.state == "failed"], records
        return [record for record in records if record.state == "ready"]

    cluster.start_replicas(cluster.prepare(model), 1)
    try:
        yield wait_for(ready, "the replica is ready")[0]
    finally:
        names = [record.replica for record in cluster.replicas()]
        cluster.stop(names, now=False)
        assert cluster.wait_stopped(names, time.monotonic() + PATIENCE_S) == []


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_the_container_gets_the_weights_the_cache_scratch_and_what_the_user_wants(
    runtime: str, slurm: SlurmBed, tmp_path: Path
) -> None:
    folder = tmp_path / "it's"
    (folder / "bin").mkdir(parents=True)
    quoted = shlex.quote(str(folder))
    name, text = ("apptainer", APPTAINER) if runtime == "apptainer" else ("srun", SRUN)
    text = text.format(folder=quoted, srun=shutil.which("srun"))
    for program, content in ((name, text), ("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (folder / "bin" / program).write_text(content)
        (folder / "bin" / program).chmod(0o755)
    setup = (f"export PATH={quoted}/bin:$PATH HF_HOME={quoted}/hub TMPDIR={quoted}",)
    container = ContainerConfig(runtime, "image.sif", mounts=("/usr", "/etc:/their/etc:ro"), env={"SECRET": "hush"})
    with ready_replica(slurm, container, setup):
        argv = (folder / "argv").read_text().splitlines()
        environment = (folder / "environment").read_text()
    shared = [str(slurm.folder / "work"), str(packaged_gguf().parent), "/usr", "/etc:/their/etc:ro"]
    if runtime == "apptainer":
        mounted = [after for word, after in itertools.pairwise(argv) if word == "--bind"]
        assert mounted == [*shared, f"{folder}/hub", str(folder)]
    else:
        pairs = [each if ":" in each else f"{each}:{each}" for each in [*shared, f"{folder}/hub", str(folder)]]
        assert f"--container-mounts={','.join(pairs)}" in argv
        assert "--container-image=image.sif" in argv
    assert "hush" not in " ".join(argv)  # it reaches the engine by a file of mode 0600
    assert f"HF_HOME={folder}/hub" in environment
    assert (folder / "hub").is_dir()


@pytest.mark.slow
def test_podman_runs_the_engine_and_leaves_nothing(tmp_path: Path) -> None:
    """In an image made from a Debian chroot, with the embedded engine inside."""
    missing = [*missing_parts(), *(name for name in ("podman", "crun") if shutil.which(name) is None)]
    if missing:
        pytest.skip(f"a container needs {', '.join(missing)}")
    root = make_root("trixie")
    (tmp_path / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n'
    )
    # The limits and the cgroup tree are those of machines that may set no others.
    (tmp_path / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1000:1000", "nproc=1000:1000"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "crun"\n'
    )
    settings = {name: f"{tmp_path}/{file}.conf" for name, file in
                (("CONTAINERS_CONF", "containers"), ("CONTAINERS_STORAGE_CONF", "storage"))}  # fmt: skip

    def podman(*words: str, stdin: int | None = None) -> str:
        environment = {**os.environ, **settings}
        done = subprocess.run(["podman", *words], env=environment, stdin=stdin, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with subprocess.Popen(["tar", "-C", root, "--one-file-system", "-c", "."], stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        podman("import", "-", "engine-image", stdin=tar.stdout.fileno())
    # crun wants a single cgroup tree, slurmd the one that is there.
    wrapper = tmp_path / "bin" / "podman"
    wrapper.parent.mkdir()
    tree = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup"
    wrapper.write_text(
        f'#!/bin/sh\nexec unshare --mount sh -c \'{tree}; exec {shutil.which("podman")} "$@"\' sh "$@"\n'
    )
    wrapper.chmod(0o755)
    setup = (f"export PATH={wrapper.parent}:$PATH", *(f"export {name}={value}" for name, value in settings.items()))
    container = ContainerConfig("podman", "localhost/engine-image", env={"PYTHONPATH": ENGINE})
    try:
        with slurm_bed(1, gpus=0) as bed:
            with ready_replica(bed, container, setup) as record:
                assert http_get(record.host, record.port or 0, "/health", timeout_s=PATIENCE_S)[0] == 200
                assert "engine-image" in podman("ps", "--noheading")
            wait_for(lambda: podman("ps", "--all", "--noheading") == "", "the container is gone")
    finally:
        podman("rmi", "--force", "engine-image")

"""A real Slurm on this host, for tests: munged, slurmctld and several slurmd, all in one temporary directory.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Several beds run side by side: each has its own
ports, sockets, key and node names. The daemons are children of the test process and die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE_S
from testbed.ports import free_port

from agent_infra import make_cluster
from agent_infra_core.fleet.slurm import SlurmCluster
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.settings import ClusterConfig

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
LOW_AND_HIGH = (
    "PartitionName=low Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=00:10:00 "
    "PriorityJobFactor=1 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "PartitionName=high Nodes=ALL MaxTime=02:00:00 DefaultTime=00:10:00 "
    "PriorityJobFactor=10 PriorityTier=10 PreemptMode=OFF",
)
READY_STATES = ("idle", "mixed", "allocated")
CONTROLLER = """\
ClusterName=bed
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
{communication}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_continue
PriorityType=priority/multifactor
PriorityWeightPartition=10000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
KillWait=5
OverTimeLimit=0
MinJobAge=300
GresTypes=gpu
"""


def missing_programs() -> list[str]:
    """What keeps a bed from being started here; nothing when all is there."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return missing + ([] if os.getuid() == 0 else ["root"])


def require_slurm() -> None:
    """Skip the test where no bed can be started."""
    import pytest

    if missing := missing_programs():
        pytest.skip(f"a real Slurm needs {', '.join(missing)} (tests/run.sh installs what is missing)")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class SlurmBed:
    """One cluster; owns its directory, its daemons and whatever jobs run on it.

    A partition's line may name the nodes as {0}, {1}, ….  ``node_prefix`` are words before a node's slurmd (to run it
    in a network namespace), ``addresses`` where nodes are then reached, ``controller_prefix`` and
    ``controller_address`` the same of slurmctld.
    """

    def __init__(
        self,
        nodes: int = 2,
        gpus: int = 4,
        *,
        cpus: int = 8,
        gpu_type: str = "h100",
        partitions: Sequence[str] = LOW_AND_HIGH,
        settings: str = "",
        node_prefix: Callable[[str], Sequence[str]] = lambda _: (),
        addresses: Callable[[str], str] | None = None,
        controller_prefix: Sequence[str] = (),
        controller_address: str = "127.0.0.1",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-bed-"))
        self.nodes = [f"bed-{self.folder.name[-4:].replace('_', 'x').lower()}-n{index}" for index in range(nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._node_prefix, self._controller_prefix = node_prefix, controller_prefix
        ports = [free_port() for _ in range(nodes + 1)]
        host = socket.gethostname().partition(".")[0]
        # On loopback no daemon listens for other machines; across namespaces each is reached at its own address.
        communication = "" if addresses else "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
        lines = [
            CONTROLLER.format(
                host=host,
                address=controller_address,
                port=ports[0],
                folder=self.folder,
                communication=communication,
            ),
            settings,
        ]
        devices = ["AutoDetect=off"]
        for name, port in zip(self.nodes, ports[1:], strict=True):
            address = addresses(name) if addresses else "127.0.0.1"
            shape = f"CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000"
            kind = f":{gpu_type}" if gpu_type else ""
            gres = f" Gres=gpu{kind}:{gpus}" if gpus else ""
            lines.append(f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} {shape}{gres}")
            if gpus:
                files = f"{self.folder}/{name}-gpu[0-{gpus - 1}]"
                devices.append(f"NodeName={name} Name=gpu {f'Type={gpu_type} ' if gpu_type else ''}File={files}")
        for folder in ("state", "spool"):
            (self.folder / folder).mkdir()
        for name in self.nodes:
            (self.folder / "spool" / name).mkdir()
            for index in range(gpus):  # Slurm sets CUDA_VISIBLE_DEVICES for character devices only
                os.mknod(self.folder / f"{name}-gpu{index}", 0o020666, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text(
            "\n".join([*lines, *(each.format(*self.nodes) for each in partitions), ""])
        )
        (self.folder / "gres.conf").write_text("\n".join([*devices, ""]))

    def start(self) -> None:
        """Start everything; returns when all nodes take jobs."""
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        self.folder.chmod(0o755)
        words = [f"--{name}={self.folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "sock"))]
        words += [f"--{name}={self.folder}/munge.{end}" for name, end in (("pid-file", "pid"), ("seed-file", "seed"))]
        words += [f"--log-file={self.folder}/munged.log", "--num-threads=2", "--force", "--foreground"]
        self._spawn("munged", ["munged", *words])
        self._wait(lambda: (self.folder / "munge.sock").exists(), "munged")
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: self._ready_nodes() == set(self.nodes), "nodes")

    def _ready_nodes(self) -> set[str]:
        rows = [line.split() for line in self.run("sinfo", "-hNo", "%N %T").splitlines()]
        return {row[0] for row in rows if row[1] in READY_STATES}

    def start_controller(self) -> None:
        self._spawn("slurmctld", [*self._controller_prefix, "slurmctld", "-D"])
        self._wait(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def stop_controller(self) -> None:
        """In order, so that it keeps its jobs."""
        self._end("slurmctld", signal.SIGTERM)

    def start_node(self, node: str) -> None:
        self._spawn(node, [*self._node_prefix(node), "slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """End a slurmd without a word; its jobs run on."""
        self._end(node, signal.SIGKILL)

    def run(self, *argv: str, check: bool = True, stdin: str = "") -> str:
        """What a command of this Slurm prints."""
        done = subprocess.run(
            argv, env=self.environment, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, cwd=self.folder
        )
        assert done.returncode == 0 or not check, (argv, done.stdout, done.stderr)
        return done.stdout

    def drain(self, node: str, reason: str = "test") -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}")

    def undrain(self, node: str) -> None:
        """Let a drained node take jobs again; returns once it answers."""
        if "DRAIN" in self.run("scontrol", "--oneliner", "show", "node", node):
            self.run("scontrol", "update", f"NodeName={node}", "State=UNDRAIN")
        self._wait(lambda: self.run("sinfo", "-hN", "-n", node, "-o", "%T").split()[0] in READY_STATES, node)

    def submit(self, script: str, *options: str) -> str:
        """The id of a job of somebody else's."""
        words = ["sbatch", "--parsable", "-o", "/dev/null", *options]
        return self.run(*words, stdin=f"#!/bin/sh\n{script}\n").strip()

    def jobs(self) -> list[str]:
        """``id state name`` of every job in the queue."""
        return self.run("squeue", "-h", "-o", "%A %T %j").splitlines()

    def close(self) -> None:
        """End jobs and daemons, remove the directory."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 8.0
            while self.run("squeue", "-h", "-t", "R,CG", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.05)
        for name in list(self._daemons):
            self._end(name, signal.SIGTERM if name == "munged" else signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.leftovers()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def leftovers(self) -> list[int]:
        """Processes that this bed has started, jobs included, and that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                    if not is_dead and str(self.folder).encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def _spawn(self, name: str, argv: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _end(self, name: str, number: int) -> None:
        process = self._daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE_S)

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
                raise AssertionError(f"{what} not ready within {seconds:g} s: {logs}")
            time.sleep(0.05)


@contextmanager
def slurm_bed(nodes: int = 2, gpus: int = 4, **options: object) -> Iterator[SlurmBed]:
    """A running cluster, ended afterwards whatever happened."""
    bed = SlurmBed(nodes, gpus, **options)  # type: ignore[arg-type]
    try:
        bed.start()
        yield bed
    finally:
        bed.close()


def slurm_cluster(config: ClusterConfig, paths: DeploymentPaths, environment: Mapping[str, str]) -> SlurmCluster:
    """The cluster as `start` makes it."""
    cluster = make_cluster(config, paths, None, environment, print)
    assert isinstance(cluster, SlurmCluster)
    return cluster

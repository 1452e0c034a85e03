"""A cluster that is not here: a login node and compute nodes in network namespaces of their own, Slurm across them.

    this machine ──veth──▶ sshd of the login node ──bridge──▶ compute nodes: sshd, slurmd

From here only the login node can be reached. A node is a namespace of processes too: killing its first process is a
power cut. Everything is anonymous and dies with the test process. Needs root, iproute2, and what Slurm and sshd need.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from patience import PATIENCE_S
from testbed.slurm import LOW_AND_HIGH, SlurmBed, missing_programs
from testbed.sshd import SSHD, SshServer, descendants, public_key

from agent_infra_core.settings import SshConfig


def missing_parts() -> list[str]:
    """What keeps the cluster from being started here; nothing when all is there."""
    needed = ("ip", "unshare", "nsenter", "ssh", "setpriv")
    found = [name for name in needed if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return missing_programs() + found + ([] if SSHD else ["sshd"])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Machine:
    """A host in namespaces of its own: network, name, processes, mounts. Owns its first process."""

    def __init__(self, name: str, hosts: Path) -> None:
        """``hosts`` is its /etc/hosts."""
        self.name, self.hosts = name, hosts
        self.boot()

    def boot(self) -> None:
        # The shell is process 1 there: it takes in orphans, and nothing there outlives it.
        program = f"hostname {self.name} && mount --bind {self.hosts} /etc/hosts && ip link set lo up && echo up"
        program += " && while :; do sleep 3600 & wait $!; done"
        words = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            ["unshare", *words, "bash", "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n", self.name
        self.pid = descendants(self.process.pid)[0]

    def words(self, namespaces: str) -> tuple[str, ...]:
        """What stands before a command to run it there."""
        return ("nsenter", "-t", str(self.pid), *(f"-{letter}" for letter in namespaces), "--")

    def run(self, *argv: str, check: bool = True, namespaces: str = "n") -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self.words(namespaces), *argv], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0 or not check, (self.name, argv, done.stdout, done.stderr)
        return done

    def cut_power(self) -> None:
        """Every process of it is gone at once, and says nothing."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


class FarSlurm(SlurmBed):
    """A Slurm whose commands run on the login node."""

    login_words: Sequence[str] = ()

    def run(self, *argv: str, check: bool = True, stdin: str = "") -> str:
        return super().run(*self.login_words, *argv, check=check, stdin=stdin)


class FarCluster:
    """The whole of it; owns its namespaces, sshds, Slurm and files. A context manager.

    Partitions: low and high of all nodes, only0, only1, … of one each.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="far-cluster-"))
        self.folder.chmod(0o755)
        # Several of these may run at once: each draws networks of its own.
        self._net = f"10.{random.randrange(64, 200)}.{random.randrange(0, 250)}"
        self._outside = f"10.{random.randrange(200, 250)}.{random.randrange(0, 250)}"
        self._veth = f"far{os.getpid() % 100000}{random.randrange(100, 999)}"
        self._machines: dict[str, Machine] = {}
        self.sshds: dict[str, SshServer] = {}
        self.hosts = self.folder / "hosts"
        self._count = nodes
        self.slurm = FarSlurm(
            nodes,
            cpus=cpus,
            node_prefix=lambda name: self._machines[name].words("nump"),
            addresses=self._address,
            # Slurm compares the controller's host name with the one that runs the tests, so only the network is the
            # login node's.
            controller_prefix=_LATER,
            controller_address=f"{self._net}.1",
            partitions=(*LOW_AND_HIGH, *(f"PartitionName=only{index} Nodes={{{index}}}" for index in range(nodes))),
            settings="SlurmdTimeout=60\nMessageTimeout=5",
        )
        self.nodes = self.slurm.nodes

    def _address(self, node: str) -> str:
        return f"{self._net}.{10 + int(node.rpartition('n')[2])}"

    def start(self) -> None:
        lines = ["127.0.0.1 localhost", f"{self._net}.1 login"]
        self.hosts.write_text("\n".join([*lines, *(f"{self._address(node)} {node}" for node in self.nodes), ""]))
        for name in ("fabric", "login", *self.nodes):
            self._machines[name] = Machine(name, self.hosts)
        fabric, login = self._machines["fabric"], self._machines["login"]
        # A bug that dials a node straight from here must fail at once, not leave by the default route.
        _ip("route", "add", "unreachable", f"{self._net}.0/24")
        fabric.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        fabric.run("ip", "link", "set", "br0", "up")
        self._plug("login", f"{self._net}.1")
        for node in self.nodes:
            self._plug(node, self._address(node))
        _ip("link", "add", self._veth, "type", "veth", "peer", "name", "eth1", "netns", str(login.pid))
        _ip("addr", "add", f"{self._outside}.1/30", "dev", self._veth)
        _ip("link", "set", self._veth, "up")
        login.run("ip", "addr", "add", f"{self._outside}.2/30", "dev", "eth1")
        login.run("ip", "link", "set", "eth1", "up")
        self.login_address = f"{self._outside}.2"
        for name in ("login", *self.nodes):
            self._start_sshd(name)
        self.slurm.login_words = login.words("nm")
        self.slurm._controller_prefix = login.words("n")
        self.slurm.start()

    def _plug(self, name: str, address: str) -> None:
        """A cable from a machine to the bridge."""
        fabric, machine = self._machines["fabric"], self._machines[name]
        fabric.run(
            "ip", "link", "add", f"p{machine.pid}", "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)
        )
        self.reconnect(name)
        fabric.run("ip", "link", "set", f"p{machine.pid}", "up")
        machine.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")

    def _start_sshd(self, name: str) -> None:
        folder = self.folder / "ssh" / name
        server = SshServer(
            folder,
            address="0.0.0.0",
            port=22,
            prefix=self._machines[name].words("nump"),
            options={"SetEnv": f"SLURM_CONF={self.slurm.folder}/slurm.conf"},
        )
        self.sshds[name] = server
        # One key opens all, as where home directories are shared.
        server.authorized.write_text(public_key(self.sshds["login"].client_key) + "\n")
        server.start()

    def ssh(self, **changes: str) -> SshConfig:
        """The configuration that leads to the login node."""
        login = self.sshds["login"]
        known = self.folder / "known_hosts"
        known.write_text(f"{self.login_address} {public_key(login.host_keys[0])}\n")
        values = {
            "host": self.login_address,
            "identity_file": str(login.client_key),
            "known_hosts_file": str(known),
            "config_file": str(self.folder / "ssh_config"),
            **changes,
        }
        (self.folder / "ssh_config").touch()
        return SshConfig(**values)  # type: ignore[arg-type]

    def cut_power(self, node: str) -> None:
        self._machines[node].cut_power()

    def disconnect(self, name: str) -> None:
        """Silence: what is sent to or from it is lost, and nobody is told."""
        self._machines["fabric"].run("ip", "link", "set", f"p{self._machines[name].pid}", "nomaster")

    def reconnect(self, name: str) -> None:
        self._machines["fabric"].run("ip", "link", "set", f"p{self._machines[name].pid}", "master", "br0")

    def run_on(self, name: str, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on one of the machines."""
        return self._machines[name].run(*argv, check=check, namespaces="nump")

    def on(self, name: str) -> tuple[str, ...]:
        """What stands before a command to run it on one of the machines."""
        return self._machines[name].words("nump")

    def close(self) -> None:
        if "login" in self._machines:
            self.slurm.close()
        else:
            shutil.rmtree(self.slurm.folder, ignore_errors=True)
        for server in self.sshds.values():
            server.stop()
        for machine in self._machines.values():
            if machine.process.poll() is None:
                machine.cut_power()
        subprocess.run(["ip", "link", "del", self._veth], capture_output=True, timeout=PATIENCE_S)
        subprocess.run(
            ["ip", "route", "del", "unreachable", f"{self._net}.0/24"], capture_output=True, timeout=PATIENCE_S
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> FarCluster:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_LATER: tuple[str, ...] = ("false",)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, (words, done.stderr)

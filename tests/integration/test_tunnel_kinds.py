"""Tunnels to real `serve` processes behind real sshds: both drivers, every mode, and what breaks them."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from node_testbed import KEY, STDLIB_ENGINE, Served
from patience import PATIENCE_S
from program import is_listening, wait_for
from testbed.not_linux import not_linux
from testbed.ports import free_port
from testbed.sshd import SSHD, SshServer, descendants, make_key, public_key

import agent_infra
from agent_infra_core.fleet.engines import GUARDED_ENGINES
from agent_infra_core.host import HostUnreachableError, HttpConnection, http_get, process_stamp
from agent_infra_core.node.guard import server_identity
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import ClusterConfig, ModelConfig
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.openssh import OpenSshCommands
from agent_infra_core.ssh.tunnels import LOGINS_AT_ONCE, TunnelSet, verifies_identity

pytestmark = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="needs sshd and ssh")
DRIVERS = ["sshtunnel", "openssh"]


def engine_model() -> ModelConfig:
    command = (sys.executable, str(STDLIB_ENGINE), "{port}")
    return ModelConfig("chat", "none", engine="command", command=command, base_port=free_port())


class Cluster:
    """A login host, a compute node and one replica on it, all of this machine; and the tunnels to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.login, self.node = SshServer(folder / "login"), SshServer(folder / "node")
        # The node takes the key that opens the login host, as where home directories are shared.
        self.node.authorized.write_text(self.login.authorized.read_text())
        self.config = folder / "ssh_config"
        self.config.write_text(f"Host {os.uname().nodename}\n  HostName 127.0.0.1\n  Port {self.node.port}\n")
        self.served = Served(folder / "run", engine_model())
        self.hosts: list[LoginHost] = []
        self.sets: list[TunnelSet] = []

    def start(self) -> ReplicaRecord:
        self.login.start()
        self.node.start()
        return self.served.wait_for_state("ready")

    def tunnels(self, driver: str, mode: str, key: str = KEY, **changes: str) -> TunnelSet:
        ssh = self.login.ssh(config_file=str(self.config), **changes)
        cluster = ClusterConfig(ssh=ssh, tunnel=mode, tunnel_driver=driver)
        self.hosts.append(LoginHost(cluster, os.environ, str(self.folder)))
        self.hosts[-1].lead()
        self.sets.append(TunnelSet(cluster, self.hosts[-1], key, GUARDED_ENGINES))
        return self.sets[-1]

    def close(self) -> None:
        for tunnels in self.sets:
            tunnels.close()
        for host in self.hosts:
            host.close()
        self.login.stop()
        self.node.stop()
        self.served.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def follow_until_up(tunnels: TunnelSet, record: ReplicaRecord, reconnects: int = 0) -> ReplicaRecord:
    """The record with this side's ports, once the tunnel stands."""

    def seen() -> ReplicaRecord | None:
        tunnels.follow([record])
        state = tunnels.states()[record.replica]
        there = tunnels.follow([record])[0]
        return there if state.state == "up" and state.reconnects >= reconnects and there.port is not None else None

    try:
        there = wait_for(seen, "the tunnel is up")
        assert there is not None
        return there
    except AssertionError as error:
        raise AssertionError(tunnels.states()) from error


def answers(record: ReplicaRecord) -> bool:
    return record.port is not None and http_get(record.host, record.port, "/health", timeout_s=PATIENCE_S)[0] == 200


def proves(*words: Any) -> bool:
    """verifies_identity(), asked until somebody answers."""
    said: list[bool | None] = []

    def ask() -> bool:
        with contextlib.closing(HttpConnection(*words[:2])) as server:
            said.append(verifies_identity(server, *words[2:]))
        return said[-1] is not None

    wait_for(ask, "an answer")
    return bool(said[-1])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("mode", ["login", "node"])
def test_engine_and_telemetry_are_reached_through_the_tunnel(driver: str, mode: str, cluster: Cluster) -> None:
    record = cluster.start()
    tunnels = cluster.tunnels(driver, mode)
    first = tunnels.follow([record])[0]  # does not wait for it
    assert (first.port, first.state) == (None, "loading")
    there = follow_until_up(tunnels, record)
    assert there.host == "127.0.0.1"
    assert there.port not in (None, record.port)
    assert answers(there)
    assert there.telemetry_port is not None
    status, body = http_get(there.host, there.telemetry_port, "/load", KEY, timeout_s=PATIENCE_S)
    assert (status, json.loads(body)["state"]) == (200, "ready")
    state = tunnels.states()[record.replica]
    assert (state.driver, state.mode, state.reconnects) == (driver, mode, 0)
    assert any(line.startswith(f"tunnel {mode}: cluster.tunnel says so") for line in tunnels.describe())
    # The replica goes, and with it its ports here.
    assert tunnels.follow([]) == []
    assert tunnels.states() == {}
    wait_for(lambda: not is_listening(there.port or 0), "the tunnel's port is closed")


def test_auto_goes_to_the_node_where_the_engine_listens_on_loopback(cluster: Cluster) -> None:
    record = cluster.start()
    tunnels = cluster.tunnels("auto", "auto")
    assert answers(follow_until_up(tunnels, record))
    assert tunnels.describe() == [
        "tunnel node: the engine listens only on its node's loopback",
        "driver sshtunnel: ssh_config needs nothing else",
    ]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_tunnel_whose_connection_is_cut_is_replaced(driver: str, cluster: Cluster) -> None:
    record = cluster.start()
    tunnels = cluster.tunnels(driver, "login")
    there = follow_until_up(tunnels, record)
    cluster.login.cut_sessions()
    again = follow_until_up(tunnels, record, reconnects=1)
    assert again.port != there.port
    assert answers(again)


def tunnel_processes() -> list[int]:
    return [p for p in descendants(os.getpid()) if b"tunnel" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")]


@pytest.mark.parametrize("mode", ["login", "node"])
def test_replicas_share_a_login_and_one_that_goes_or_comes_leaves_the_others_alone(mode: str, cluster: Cluster) -> None:
    record = cluster.start()
    others = [Served(cluster.folder / name, engine_model(), replica=name) for name in ("dies", "comes")]
    try:
        dies, comes = (other.wait_for_state("ready") for other in others)
        tunnels = cluster.tunnels("sshtunnel", mode)
        there = {each.replica: each for each in wait_for(lambda: all_there(tunnels, [record, dies]), "both are up")}
        logins = [len(re.findall("Accepted publickey", each.log.read_text())) for each in (cluster.login, cluster.node)]
        assert logins == [2, int(mode == "node")]  # the commands' and the tunnels'
        assert len(tunnel_processes()) == 1
        port = there[record.replica].port
        assert port is not None
        with contextlib.closing(HttpConnection("127.0.0.1", port, PATIENCE_S)) as kept:
            kept.request("/health")
            opened = kept._connection.sock
            others[0].process.kill()
            wait_for(lambda: all_there(tunnels, [record, comes]), "the new one is up")
            assert kept.request("/health")[0] == 200
            assert kept._connection.sock is opened
        assert tunnels.follow([record, comes])[0].port == port
        assert tunnels.states()[record.replica].reconnects == 0
        assert len(tunnel_processes()) == 1
        cluster.login.cut_sessions()  # takes all along, and one login brings all back
        wait_for(lambda: all(s.reconnects and s.state == "up" for s in tunnels.states().values()), "both are replaced")
        assert len(re.findall("Accepted publickey", cluster.login.log.read_text())) == logins[0] + 1
    finally:
        for other in others:
            other.close()


def all_there(tunnels: TunnelSet, records: list[ReplicaRecord]) -> list[ReplicaRecord]:
    """The records with their local ports, once all have them."""
    there = tunnels.follow(records)
    return there if all(each.port is not None for each in there) else []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_node_that_was_installed_anew_is_reached_by_its_new_key(driver: str, cluster: Cluster) -> None:
    record = cluster.start()
    tunnels = cluster.tunnels(driver, "node")  # its key is what the login host sees: known_hosts has none
    follow_until_up(tunnels, record)
    cluster.node.stop()
    for key in cluster.node.host_keys:
        key.unlink()
        make_key(key)
    cluster.node.start()
    assert answers(follow_until_up(tunnels, record, reconnects=1))


def test_a_node_that_does_not_answer_holds_up_none_of_the_others(cluster: Cluster, tmp_path: Path) -> None:
    """By OpenSSH, whose connections to the nodes one object makes."""
    answered = tmp_path / "answered"
    scan = tmp_path / "bin" / "ssh-keyscan"
    scan.parent.mkdir()
    scan.write_text(
        f'#!/bin/sh\ncase "$*" in *silent-node*) until [ -e {answered} ]; do sleep 0.1; done; exit;; esac\n'
        f'exec {shutil.which("ssh-keyscan")} "$@"\n'
    )
    scan.chmod(0o700)
    cluster.login.options["SetEnv"] = f"PATH={scan.parent}:{os.environ['PATH']}"
    cluster.start()
    cluster.tunnels("openssh", "node")
    commands = cluster.hosts[-1].commands()
    assert isinstance(commands, OpenSshCommands)
    with ThreadPoolExecutor(2) as threads:
        silent = threads.submit(commands.node, "silent-node")
        try:
            assert threads.submit(commands.node, os.uname().nodename).result(PATIENCE_S)
            assert not silent.done()
        finally:
            answered.touch()
        with pytest.raises(HostUnreachableError, match="no SSH answers on node silent-node"):
            silent.result(PATIENCE_S)


def test_dead_nodes_keep_no_other_from_its_login(cluster: Cluster, tmp_path: Path) -> None:
    """Once they have failed twice they take turns of their own, however many they are and however long each takes."""
    scan = tmp_path / "bin" / "ssh-keyscan"
    scan.parent.mkdir()
    scan.write_text(
        "#!/bin/sh\nfor node; do :; done\n"
        f"case $node in silent-*) echo >> {tmp_path}/tried-$node\n"
        f"  [ $(wc -l < {tmp_path}/tried-$node) -lt 3 ] || touch {tmp_path}/again-$node\n"
        f"  while [ -e {tmp_path}/again-$node -a ! -e {tmp_path}/over ]; do sleep 0.2; done; exit;; esac\n"
        f'exec {shutil.which("ssh-keyscan")} "$@"\n'
    )
    scan.chmod(0o700)
    cluster.login.options["SetEnv"] = f"PATH={scan.parent}:{os.environ['PATH']}"
    record = cluster.start()
    dead = [dataclasses.replace(record, replica=f"chat-{n}", node=f"silent-{n}") for n in range(LOGINS_AT_ONCE + 2)]
    tunnels = cluster.tunnels("sshtunnel", "node")
    tunnels.follow(dead)
    try:
        wait_for(lambda: len(list(tmp_path.glob("again-*"))) == LOGINS_AT_ONCE, "all turns are taken")
        wait_for(lambda: tunnels.follow([*dead, record])[-1].port, "the other's tunnel stands")
        assert len(list(tmp_path.glob("again-*"))) == LOGINS_AT_ONCE
    finally:
        (tmp_path / "over").touch()


def test_a_silent_tunnel_is_suspected_then_replaced(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """With OpenSSH; test_slurm_ssh.py has the other driver, and silence of a whole node."""
    monkeypatch.setattr("agent_infra_core.ssh.tunnels.SUSPECT_AFTER_S", 1.0)
    monkeypatch.setattr("agent_infra_core.ssh.tunnels.REPLACED_AFTER_S", 3600.0)
    record = cluster.start()
    tunnels = cluster.tunnels("openssh", "node")
    there = follow_until_up(tunnels, record)
    cluster.node.cut_sessions(signal.SIGSTOP)  # nothing is closed, nothing answers
    wait_for(lambda: tunnels.states()[record.replica].state == "suspect", "it is suspected")
    suspected = tunnels.follow([record])[0]
    assert (suspected.port, suspected.state) == (there.port, "draining")  # it may come back; until then no new turns
    assert tunnels.awaited() == {record.model}
    monkeypatch.setattr("agent_infra_core.ssh.tunnels.REPLACED_AFTER_S", 5.0)
    again = follow_until_up(tunnels, record, reconnects=1)
    assert answers(again)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_engine_that_moved_is_followed(driver: str, cluster: Cluster) -> None:
    record = cluster.start()
    tunnels = cluster.tunnels(driver, "login")
    there = follow_until_up(tunnels, record)
    second = Served(cluster.folder / "second", engine_model())
    try:
        moved = second.wait_for_state("ready")
        assert tunnels.follow([moved])[0].port is None
        again = follow_until_up(tunnels, moved)
        assert again.port != there.port
        assert answers(again)
        wait_for(lambda: not is_listening(there.port or 0), "the old port is closed")
    finally:
        second.close()


class Stranger(http.server.BaseHTTPRequestHandler):
    """Somebody else's server on a port that should be ours; notes what it was asked."""

    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, str(self.headers)))
        body = json.dumps({"answer": "0" * 64, "status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("mode", ["login", "none"])
def test_a_foreign_server_on_our_port_gets_neither_key_nor_request(mode: str, cluster: Cluster) -> None:
    record = cluster.start()
    seen: list[tuple[str, str]] = []
    handler = type("Noting", (Stranger,), {"seen": seen})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        port = server.server_address[1]
        # A guarded engine (vLLM) is asked itself; of another one, `serve` says who listens on its port.
        for engine, telemetry_port in (("vllm", record.telemetry_port), ("command", port)):
            tunnels = cluster.tunnels("sshtunnel", mode)
            stolen = dataclasses.replace(record, engine=engine, port=port, telemetry_port=telemetry_port)
            assert "it gets neither key nor request" in refusal(tunnels, stolen)
            tunnels.close()
        assert seen
        assert all(path.startswith("/agent-infra/challenge?nonce=") for path, _ in seen)
        assert not any("authorization" in headers.lower() or KEY in headers for _, headers in seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE_S)


def refusal(tunnels: TunnelSet, record: ReplicaRecord) -> str:
    """What the record that is followed says, once its tunnel has failed."""

    def said() -> str:
        there = tunnels.follow([record])[0]
        assert there.port is None
        return there.message or ""

    return wait_for(lambda: said() if "down: " in said() else "", "it is refused")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to listen as another user")
def test_serve_vouches_for_no_port_that_another_user_listens_on(cluster: Cluster) -> None:
    record = cluster.start()
    assert record.port is not None
    assert record.telemetry_port is not None
    os.seteuid(65534)
    try:
        foreign = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    end = ("127.0.0.1", record.telemetry_port)
    name = server_identity(record.replica, record.node, record.telemetry_port)
    with foreign:
        assert proves(*end, KEY, name, record.port)
        assert not proves(*end, KEY, name, foreign.getsockname()[1])
    assert not proves(*end, "another key", name, record.port)
    # A foreign server that passes the challenge on to another replica of ours gets an answer that is of no use to it.
    for other in (("m-9", record.node, end[1]), (record.replica, "other", end[1]), (record.replica, record.node, 1)):
        assert not proves(*end, KEY, server_identity(*other))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to listen as another user")
def test_no_other_user_gets_the_port_of_a_tunnel_that_broke(cluster: Cluster) -> None:
    """It might get requests, and the key with them, until the relay has heard of it."""
    record = cluster.start()
    tunnels = cluster.tunnels("sshtunnel", "login")
    there = follow_until_up(tunnels, record)
    for pid in descendants(os.getpid()):
        if b"tunnel" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_listening(there.port or 0), "its port is closed")
    os.seteuid(65534)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            with socket.socket() as foreign, pytest.raises(OSError, match="in use"):
                foreign.setsockopt(socket.SOL_SOCKET, option, 1)
                foreign.bind(("127.0.0.1", there.port))
    finally:
        os.seteuid(0)
    again = follow_until_up(tunnels, record, reconnects=1)
    assert answers(again)
    assert again.port != there.port


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_login_host_that_forbids_forwarding_is_named(driver: str, cluster: Cluster, tmp_path: Path) -> None:
    cluster.login.options["AllowTcpForwarding"] = "no"
    record = cluster.start()
    tunnels = cluster.tunnels(driver, "login")
    assert "AllowTcpForwarding" in refusal(tunnels, record)


def forbid_forwarding(cluster: Cluster, permitted: str) -> ReplicaRecord:
    """The login host forbids it (AllowTcpForwarding or PermitOpen); the engine listens on all addresses."""
    cluster.login.options |= {"AllowTcpForwarding": "no"} if permitted == "nothing" else {"PermitOpen": permitted}
    cluster.login.options["MaxSessions"] = "3"
    return dataclasses.replace(cluster.start(), host="::ffff:127.0.0.1", address="127.0.0.1")


@pytest.mark.parametrize("driver", DRIVERS)
def test_where_the_login_host_forbids_ports_of_engines_auto_goes_through_the_nodes_sshd(
    driver: str, cluster: Cluster
) -> None:
    record = forbid_forwarding(cluster, f"127.0.0.1:{cluster.node.port}")
    tunnels = cluster.tunnels("auto" if driver == "sshtunnel" else driver, "auto")
    assert answers(follow_until_up(tunnels, record))
    assert tunnels.states()[record.replica].mode == "node"
    assert "tunnel node: the login host forbids forwarding to the engines' ports" in tunnels.describe()


@pytest.mark.skipif(shutil.which("tcsh") is None, reason="needs tcsh")
def test_where_the_login_host_forbids_all_forwarding_connections_are_commands(cluster: Cluster) -> None:
    """Whatever the login shell prints does no harm, and there may be more of them than a login allows sessions."""
    command = cluster.folder / "shell"
    command.write_text('#!/bin/sh\necho "Welcome @"\necho "no locale" >&2\nexec tcsh -c "$SSH_ORIGINAL_COMMAND"\n')
    command.chmod(0o755)
    cluster.login.options["ForceCommand"] = str(command)
    record = forbid_forwarding(cluster, "nothing")
    tunnels = cluster.tunnels("auto", "auto")
    there = follow_until_up(tunnels, record)
    assert tunnels.states()[record.replica].mode == "exec"
    assert "tunnel exec: the login host forbids forwarding; each connection is a command there" in tunnels.describe()
    with contextlib.ExitStack() as kept:
        ends = [HttpConnection("127.0.0.1", there.telemetry_port or 0, PATIENCE_S) for _ in range(6)]
        for end in ends:
            kept.enter_context(contextlib.closing(end))
            assert end.request("/load", KEY)[0] == 200
        assert [end.request("/load", KEY)[0] for end in ends] == [200] * 6


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_login_that_is_refused_is_the_tunnels_trouble_not_that_of_who_follows_it(
    driver: str, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "nobody").touch()
    record = cluster.start()
    tunnels = cluster.tunnels(driver, "login", known_hosts_file=str(tmp_path / "nobody"))
    assert "host key" in refusal(tunnels, record)
    assert tunnels.states()[record.replica].driver == driver


def test_turns_wait_for_a_lost_tunnel_for_a_while_and_then_are_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_infra_core.ssh.tunnels.RECONNECT_WAIT_S", 3600.0)
    record = cluster.start()
    tunnels = cluster.tunnels("sshtunnel", "login")
    follow_until_up(tunnels, record)
    cluster.login.stop()

    def state() -> tuple[str, int | None]:
        there = tunnels.follow([record])[0]
        return there.state, there.port

    wait_for(lambda: state() == ("loading", None), "it counts as loading")
    monkeypatch.setattr("agent_infra_core.ssh.tunnels.RECONNECT_WAIT_S", 0.0)
    wait_for(lambda: state() == ("ready", None), "it counts as away")
    wait_for(lambda: "refuses connections" in (tunnels.states()[record.replica].reason or ""), "the reason is told")
    cluster.login.start()
    assert answers(follow_until_up(tunnels, record, reconnects=1))


PARENT = """
import dataclasses, json, os, sys, time
from agent_infra_core.fleet.engines import GUARDED_ENGINES
from agent_infra_core.protocol import record_from_json
from agent_infra_core.settings import ClusterConfig, SshConfig
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.tunnels import TunnelSet
document = json.loads(sys.stdin.readline())
cluster = ClusterConfig(ssh=SshConfig(**document["ssh"]), tunnel="node", tunnel_driver=document["driver"])
host = LoginHost(cluster, os.environ, document["name"])
host.lead()
tunnels = TunnelSet(cluster, host, document["key"], GUARDED_ENGINES)
record = record_from_json(document["record"])
while tunnels.follow([record])[0].port is None:
    time.sleep(0.05)
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("is_linux", [True, False], ids=["linux", "elsewhere"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_outlives_a_parent_that_is_killed_and_no_secret_shows(
    driver: str, is_linux: bool, cluster: Cluster
) -> None:
    environment = dict(os.environ)
    prefix = () if is_linux else not_linux(cluster.folder, environment)
    record = cluster.start()
    ssh = cluster.login.ssh(config_file=str(cluster.config))
    document = {
        "ssh": dataclasses.asdict(ssh), "driver": driver, "name": str(cluster.folder), "key": KEY,
        "record": json.dumps(dataclasses.asdict(record)),
    }  # fmt: skip
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(agent_infra.__file__).parent,
        env=environment,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(document).encode() + b"\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == b"up\n"
        children = descendants(parent.pid)
        assert len(children) >= (1 if driver == "sshtunnel" else 4)
        for pid in children:
            seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert KEY.encode() not in seen
        stamps = {pid: stamp for pid in children if (stamp := process_stamp(pid))}
        parent.kill()
        wait_for(
            lambda: not any(process_stamp(pid) == stamp for pid, stamp in stamps.items()),
            "its tunnels are gone",
        )
    wait_for(lambda: not cluster.login.sessions() and not cluster.node.sessions(), "the SSH sessions are over")


def test_a_passphrase_reaches_the_tunnel_by_its_pipe_alone(cluster: Cluster, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase="open sesame")
    for server in (cluster.login, cluster.node):
        server.authorized.write_text(public_key(locked) + "\n")
    record = cluster.start()
    ssh = cluster.login.ssh(config_file=str(cluster.config), identity_file=str(locked))
    config = ClusterConfig(ssh=ssh, tunnel="node")
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "open sesame"

    host = LoginHost(config, os.environ, str(tmp_path), answer)
    cluster.hosts.append(host)
    cluster.sets.append(TunnelSet(config, host, KEY, GUARDED_ENGINES))
    assert answers(follow_until_up(cluster.sets[-1], record))
    assert len(asked) == 1
    children = [pid for pid in descendants(os.getpid()) if b"tunnel" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert children
    for pid in children:
        seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert b"open sesame" not in seen

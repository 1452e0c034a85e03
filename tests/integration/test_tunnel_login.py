"""Commands over SSH against a real sshd, with both drivers, and what is said when a login fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import Program, wait_for
from testbed.ports import free_port
from testbed.sshd import SSHD, SshServer, make_key, public_key

import agent_infra
from agent_infra_core.host import CommandRunner, HostUnreachableError, private_temp_directory
from agent_infra_core.settings import ClusterConfig, SshConfig
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.openssh import reason_for_openssh
from agent_infra_core.ssh.routes import InteractiveLoginError, LoginError

pytestmark = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="needs sshd and ssh")
DRIVERS = ["sshtunnel", "openssh"]
Connect = Callable[..., LoginHost]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    with SshServer(tmp_path / "sshd") as made:
        yield made


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Makes runners, which are closed at the end."""
    made: list[LoginHost] = []

    def open_host(ssh: SshConfig, driver: str = "auto", ask: Callable[[str], str] | None = None) -> LoginHost:
        cluster = ClusterConfig(ssh=ssh, tunnel_driver=driver)
        environment = {**os.environ, "HOME": str(tmp_path), "SSH_AUTH_SOCK": os.environ.get("SSH_AUTH_SOCK", "")}
        made.append(LoginHost(cluster, environment, str(tmp_path), ask))
        return made[-1]

    yield open_host
    for host in made:
        host.close()


def failure(runner: CommandRunner, kind: type[Exception] = LoginError) -> str:
    with pytest.raises(kind) as caught:
        runner.run(["true"], timeout_s=20)
    return str(caught.value)


@pytest.mark.parametrize("driver", DRIVERS)
def test_commands_run_there_with_their_input_output_and_exit_code(
    driver: str, server: SshServer, connect: Connect
) -> None:
    host = connect(server.ssh(), driver)
    done = host.run(["sh", "-c", 'cat; echo "$1" >&2; exit 3', "sh", "it's $HOME; `x`"], stdin=b"in\0put" * 100_000)
    assert (done.status, done.output) == (3, b"in\0put" * 100_000)
    assert done.errors == b"it's $HOME; `x`\n"
    assert host.run(["cat"]).output == b""  # without input, a command sees its end at once
    assert host.run(["true"], stdin=b"x" * 5_000_000).status == 0  # what a command does not read is its own affair
    assert host.run(["no-such-program-here"]).status == 127


TALKING_SHELL = """#!/bin/sh
printf '%s\\n' '*****' '  Front end no. 3' '  Disk: 41 GB of 50 GB used' '*****'
echo 'this shell is old' >&2
{shell} -c "$SSH_ORIGINAL_COMMAND"; status=$?
echo bye
exit $status
"""


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("shell", ["tcsh", "fish", "zsh", "bash"])
def test_any_login_shell_will_do_and_what_it_prints_does_no_harm(
    driver: str, shell: str, tmp_path: Path, connect: Connect
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    command = tmp_path / "shell"
    command.write_text(TALKING_SHELL.format(shell=shell))
    command.chmod(0o755)
    with SshServer(tmp_path / "sshd", options={"ForceCommand": str(command)}) as server:
        host = connect(server.ssh(), driver)
        script = """cat
echo "$1" >&2
exit 3"""
        done = host.run(["sh", "-c", script, "sh", "it's $HOME; `x` !! {a,b} \\"], stdin=b"in\0put\n" * 9)
        assert (done.status, done.output, done.errors) == (3, b"in\0put\n" * 9, b"it's $HOME; `x` !! {a,b} \\\n")


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_login_shell_that_runs_no_command_is_told_with_what_it_prints(
    driver: str, tmp_path: Path, connect: Connect
) -> None:
    command = tmp_path / "shell"
    command.write_text("#!/bin/sh\necho This account is currently not available.\nexit 1\n")
    command.chmod(0o755)
    with SshServer(tmp_path / "sshd", options={"ForceCommand": str(command)}) as server:
        told = failure(connect(server.ssh(), driver), HostUnreachableError)
    assert "ran no command (exit code 1); it printed: This account is currently not available." in told


@pytest.mark.parametrize("driver", DRIVERS)
def test_many_commands_at_once_share_one_login(driver: str, server: SshServer, connect: Connect) -> None:
    host = connect(server.ssh(), driver)
    host.run(["true"])
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(host.run(["echo", str(n)]).output)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(answers) == [b"%d\n" % n for n in range(8)]
    assert len(re.findall("Accepted publickey", server.log.read_text())) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_that_was_cut_is_made_anew(driver: str, server: SshServer, connect: Connect) -> None:
    host = connect(server.ssh(), driver)
    host.run(["true"])
    server.cut_sessions()
    wait_for(lambda: not server.sessions(), "no session is left")

    def works() -> bool:
        try:
            return host.run(["true"]).status == 0
        except HostUnreachableError:
            return False  # the one command that met the broken connection

    wait_for(works, "commands run again")


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_host_that_falls_silent_does_not_hold_a_command_for_ever(
    driver: str, server: SshServer, connect: Connect
) -> None:
    host = connect(server.ssh(), driver)
    host.run(["true"])
    server.cut_sessions(signal.SIGSTOP)
    try:
        with pytest.raises(HostUnreachableError, match="gave no answer within 1 s|opened no session"):
            host.run(["true"], timeout_s=1)
    finally:
        server.cut_sessions(signal.SIGCONT)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_unknown_host_key_is_refused_with_the_line_to_add(driver: str, server: SshServer, connect: Connect) -> None:
    server.known_hosts.write_text("")
    said = failure(connect(server.ssh(), driver))
    host_key = public_key(server.host_keys[0])
    assert f"echo '[127.0.0.1]:{server.port} {host_key}' >> {server.known_hosts}" in said
    shown = subprocess.run(["ssh-keygen", "-lf", server.host_keys[0]], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[1] in said
    # The line that it names is the one that helps.
    command = re.search(r"echo .*", said)
    assert command is not None
    subprocess.run(["sh", "-c", command[0]], check=True)
    assert connect(server.ssh(), driver).run(["true"]).status == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_changed_host_key_is_refused_and_says_how_to_forget_the_old_one(
    driver: str, server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    server.trust(make_key(tmp_path / "other"))
    said = failure(connect(server.ssh(), driver))
    assert "has changed" in said
    assert "ask the cluster's administrators" in said
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}' -f {server.known_hosts}" in said
    assert "Accepted" not in server.log.read_text()


@pytest.mark.parametrize("driver", DRIVERS)
def test_only_key_types_that_can_be_checked_are_asked_for(driver: str, tmp_path: Path, connect: Connect) -> None:
    with SshServer(tmp_path / "sshd", key_kinds=("ed25519", "ecdsa", "rsa")) as server:
        for key in server.host_keys[1:]:
            server.trust(key)
            subprocess.run(["ssh-keygen", "-q", "-H", "-f", server.known_hosts], check=True, capture_output=True)
            assert b"127.0.0.1" not in server.known_hosts.read_bytes()  # hashed
            assert connect(server.ssh(), driver).run(["true"]).status == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_host_that_is_not_there_is_told_from_a_login_that_fails(
    driver: str, server: SshServer, connect: Connect
) -> None:
    refused = failure(connect(server.ssh(port=free_port()), driver), HostUnreachableError)
    assert "refuses connections; check host and port" in refused
    unknown = failure(connect(server.ssh(host="no-such-host.invalid"), driver), HostUnreachableError)
    assert "no-such-host.invalid is not known here" in unknown


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_key_that_the_host_does_not_take_is_named(
    driver: str, server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    stranger = make_key(tmp_path / "stranger")
    said = failure(connect(server.ssh(identity_file=str(stranger)), driver))
    assert "permission denied" in said
    assert "authorized_keys" in said
    if driver == "sshtunnel":
        assert str(stranger) in said


def test_no_key_a_missing_key_and_no_private_key_are_told_apart(
    server: SshServer, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert "no SSH key for" in failure(connect(server.ssh(identity_file=None), "sshtunnel"))
    assert "key file /nowhere does not exist" in failure(connect(server.ssh(identity_file="/nowhere"), "sshtunnel"))
    (tmp_path / "text").write_text("no key")
    said = failure(connect(server.ssh(identity_file=str(tmp_path / "text")), "sshtunnel"))
    assert "cannot be used: is it a private key" in said


def test_a_passphrase_is_asked_for_once_and_a_wrong_one_is_told(
    server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    locked = make_key(tmp_path / "locked", passphrase="open sesame")
    server.authorized.write_text(public_key(locked) + "\n")
    ssh = server.ssh(identity_file=str(locked))
    assert "ssh-add" in failure(connect(ssh, "sshtunnel"))  # nobody can be asked
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "open sesame" if len(asked) > 1 else "guess"

    host = connect(ssh, "sshtunnel", answer)
    assert host.run(["true"]).status == 0
    server.cut_sessions()
    wait_for(lambda: not server.sessions(), "no session is left")
    assert host.run(["true"]).status == 0  # a new login, and no new question
    assert asked == [f"passphrase for {locked}: ", f"wrong; passphrase for {locked}: "]
    assert "wrong passphrase" in failure(connect(ssh, "sshtunnel", lambda _: "guess"))


def test_a_locked_key_before_an_open_one_asks_for_nothing(
    server: SshServer, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    make_key(tmp_path / "locked", passphrase="open sesame")
    config = tmp_path / "ssh_config"
    config.write_text(f"Host *\n  IdentityFile {tmp_path}/locked\n  IdentityFile {server.client_key}\n")
    ssh = server.ssh(identity_file=None, config_file=str(config))
    asked: list[str] = []
    assert connect(ssh, "sshtunnel").run(["true"]).status == 0
    assert connect(ssh, "sshtunnel", lambda question: asked.append(question) or "").run(["true"]).status == 0  # type: ignore[func-returns-value]
    assert asked == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_public_half_names_the_one_of_the_agents_keys_that_is_offered(
    driver: str, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [make_key(tmp_path / f"key{number}") for number in range(8)]
    (tmp_path / "only-in-agent.pub").write_text(public_key(keys[-1]) + "\n")
    socket_path = tmp_path / "agent"
    with (
        SshServer(tmp_path / "sshd", options={"MaxAuthTries": "3"}) as server,
        subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL) as agent,
    ):
        wait_for(socket_path.exists, "the agent")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_path))
        for key in keys:
            subprocess.run(["ssh-add", "-q", key], check=True, timeout=PATIENCE_S)
            key.unlink()
        server.authorized.write_text(public_key(keys[-1]) + "\n")
        config = tmp_path / "ssh_config"
        config.write_text(f"Host *\n  IdentitiesOnly yes\n  IdentityFile {tmp_path}/only-in-agent.pub\n")
        ssh = server.ssh(identity_file=None, config_file=str(config))
        assert connect(ssh, driver).run(["true"]).status == 0
        assert "Failed publickey" not in server.log.read_text()
        agent.kill()


def test_an_agent_of_ssh_config_and_a_security_key_are_left_to_openssh(
    server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(f'Host *\n  IdentityAgent "{tmp_path}/vault agent.sock"\n  IdentityFile {server.client_key}\n')
    host = connect(server.ssh(identity_file=None, config_file=str(config)))
    assert host.run(["true"]).status == 0
    assert (host.driver, host.reason) == ("openssh", f"{config} says identityagent for 127.0.0.1")
    (tmp_path / "token.pub").write_text("sk-ssh-ed25519@openssh.com AAAA comment\n")
    assert reason_for_openssh(server.ssh(identity_file=f"{tmp_path}/token")) == f"{tmp_path}/token is a security key"


def test_a_host_that_allows_one_session_serves_commands_one_after_the_other(tmp_path: Path, connect: Connect) -> None:
    with SshServer(tmp_path / "sshd", options={"MaxSessions": "1"}) as server:
        host = connect(server.ssh(), "sshtunnel")
        host.run(["true"])
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(host.run(["sleep", "0.3"]).status)) for _ in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert statuses == [0, 0, 0, 0]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_key_in_the_agent_opens_without_a_question(
    driver: str, server: SshServer, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = make_key(tmp_path / "locked", passphrase="open sesame")
    server.authorized.write_text(public_key(locked) + "\n")
    socket_path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL)
    try:
        wait_for(socket_path.exists, "the agent listens")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_path))
        (tmp_path / "ask").write_text("#!/bin/sh\necho open sesame\n")
        (tmp_path / "ask").chmod(0o700)
        asking = {**os.environ, "SSH_ASKPASS": str(tmp_path / "ask"), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(["ssh-add", "-q", locked], env=asking, check=True, capture_output=True)
        assert connect(server.ssh(identity_file=str(locked)), driver).run(["true"]).status == 0
    finally:
        agent.kill()
        agent.wait()


def test_an_alias_of_ssh_config_is_enough_and_a_proxy_command_is_used(
    server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host cluster\n  HostName 127.0.0.1\n  Port {server.port}\n  User {server.user}\n"
        f"  IdentityFile {server.client_key}\n  UserKnownHostsFile {server.known_hosts}\n"
        "Host proxied\n  HostName 127.0.0.1\n  HostKeyAlias gate\n"
        f"  IdentityFile {server.client_key}\n  UserKnownHostsFile {tmp_path}/gate_hosts\n"
        f"  ProxyCommand {shutil.which('python3')} {tmp_path}/pipe.py {server.port}\n"
        "Host jumping\n  HostName 127.0.0.1\n"
        f"  Port {server.port}\n  ProxyJump cluster\n"
        f"  IdentityFile {server.client_key}\n  UserKnownHostsFile {server.known_hosts}\n"
    )
    (tmp_path / "gate_hosts").write_text(f"gate {public_key(server.host_keys[0])}\n")
    (tmp_path / "pipe.py").write_text(
        "import os, select, socket, sys\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "while True:\n"
        "    for f in select.select([0, s], [], [])[0]:\n"
        "        data = os.read(0, 65536) if f == 0 else s.recv(65536)\n"
        "        if not data: sys.exit()\n"
        "        (s.sendall if f == 0 else lambda d: os.write(1, d))(data)\n"
    )
    for alias, driver in (("cluster", "sshtunnel"), ("proxied", "sshtunnel"), ("jumping", "openssh")):
        host = connect(SshConfig(host=alias, config_file=str(config)))
        assert host.run(["echo", alias]).output == f"{alias}\n".encode()
        assert host.driver == driver
    assert host.reason == f"{config} says proxyjump for jumping"
    with pytest.raises(LoginError, match="ProxyJump.*openssh"):
        connect(SshConfig(host="jumping", config_file=str(config)), "sshtunnel").run(["true"])
    config.write_text(config.read_text().replace(shutil.which("python3") or "", "no-such-program"))
    assert "'no-such-program" in failure(connect(SshConfig(host="proxied", config_file=str(config))))


@pytest.mark.parametrize("line", ["Include other_config", "Match all"])
def test_auto_takes_openssh_for_what_paramiko_would_overlook(
    line: str, server: SshServer, connect: Connect, tmp_path: Path
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(line + "\n")
    (tmp_path / "other_config").write_text("")
    host = connect(server.ssh(config_file=str(config)))
    assert host.run(["true"]).status == 0
    assert (host.driver, host.reason) == ("openssh", f"{config} says {line.split()[0]}")


def test_the_connection_of_the_controller_is_used_by_the_deployments_other_commands(
    server: SshServer, connect: Connect
) -> None:
    leader, other = connect(server.ssh(), "openssh"), connect(server.ssh(), "openssh")
    leader.lead()
    leader.run(["true"])
    assert other.run(["echo", "x"]).output == b"x\n"
    assert len(re.findall("Accepted publickey", server.log.read_text())) == 1
    leader.close()
    assert other.run(["echo", "y"]).output == b"y\n"  # now by a connection of its own


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_is_left_of_a_login_that_was_closed(driver: str, server: SshServer, connect: Connect) -> None:
    host = connect(server.ssh(), driver)
    host.run(["true"])
    host.close()
    wait_for(lambda: not server.sessions(), "no session is left")
    folder = private_temp_directory()
    assert not list(folder.glob(f"ssh-*-{os.getpid()}"))


def test_a_login_that_wants_more_than_a_key_names_the_driver_that_can(tmp_path: Path, connect: Connect) -> None:
    options = {"KbdInteractiveAuthentication": "yes", "AuthenticationMethods": "publickey,keyboard-interactive"}
    with SshServer(tmp_path / "sshd", options={**options, "UsePAM": "yes"}) as server:
        said = failure(connect(server.ssh(), "sshtunnel"), InteractiveLoginError)
        assert "keyboard-interactive" in said
        assert "tunnel_driver to openssh" in said
        host = connect(server.ssh())  # auto
        assert "permission denied" in failure(host)  # nobody is there to type the code
        assert host.reason == "the login asks for more than a key"


ONE_TIME = """
import getpass, os, sys
from agent_infra_core.settings import ClusterConfig, SshConfig
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.openssh import reason_for_openssh
host = LoginHost(ClusterConfig(ssh=SshConfig(*sys.argv[2:])), os.environ, sys.argv[1], getpass.getpass)
host.lead()
for word in ("first", "second"):
    sys.stdout.write(host.run(["echo", "answer", word]).output.decode())
print("driver", host.driver, flush=True)
host.close()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: an sshd that checks passwords needs a shadow file of its own")
def test_a_one_time_code_is_asked_for_once_at_the_terminal(tmp_path: Path) -> None:
    hashed = subprocess.run(["openssl", "passwd", "-6", "123456"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "shadow").write_text(f"root:{hashed.strip()}:19000:0:99999:7:::\n")
    (tmp_path / "pam").write_text("auth required pam_unix.so\naccount required pam_permit.so\n")
    mounts = f"mount --bind {tmp_path}/shadow /etc/shadow && mount --bind {tmp_path}/pam /etc/pam.d/sshd"
    prefix = ("unshare", "--mount", "sh", "-c", mounts + ' && exec "$@"', "sh")
    options = {"KbdInteractiveAuthentication": "yes", "UsePAM": "yes", "PermitRootLogin": "yes"}
    options["AuthenticationMethods"] = "publickey,keyboard-interactive"
    with SshServer(tmp_path / "sshd", prefix=prefix, options=options) as server:
        ssh = server.ssh()
        words = [ssh.host, ssh.user, ssh.port, ssh.identity_file, ssh.config_file, ssh.known_hosts_file]
        program = ONE_TIME.replace("sys.argv[2:]", repr(words))
        terminal, far_end = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=far_end,
            stdout=far_end,
            stderr=far_end,
            cwd=Path(agent_infra.__file__).parent,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(far_end)
        seen = b""
        try:
            with contextlib.suppress(OSError):  # the other end is closed: what it said tells why
                while not re.search(rb"driver \w+\s", seen):
                    seen += os.read(terminal, 4096)
                    if seen.endswith(b"assword: "):
                        os.write(terminal, b"123456\n")
            assert process.wait(PATIENCE_S) == 0, seen.decode()
        finally:
            process.kill()
            process.wait(PATIENCE_S)
            os.close(terminal)
    assert b"answer first" in seen
    assert b"answer second" in seen
    assert b"driver openssh" in seen
    assert seen.count(b"assword") == 1
    assert b"123456" not in seen  # it is not shown as it is typed


@pytest.mark.parametrize("is_right", [True, False])
def test_a_command_leaves_no_file_of_its_connection_behind(is_right: bool, server: SshServer, tmp_path: Path) -> None:
    run = Program(tmp_path)
    short = Path(tempfile.mkdtemp())
    run.environment = {**run.environment, "HOME": str(tmp_path), "TMPDIR": str(short)}
    ssh = {name: value for name, value in vars(server.ssh()).items() if value is not None}
    ssh = ssh if is_right else {**ssh, "identity_file": str(make_key(tmp_path / "other"))}
    slurm = {"work_dir": str(tmp_path / "work"), "partitions": [{"name": "all"}]}
    cluster = {"type": "slurm", "name": "far", "tunnel_driver": "openssh", "ssh": ssh, "slurm": slurm}
    models = [{"name": "m", "model_path": "none", "engine": "command", "command": ["true", "{port}"]}]
    run.config.write_text(json.dumps({"proxy": {"port": run.port}, "cluster": cluster, "models": models}))
    try:
        said = run.run("doctor")
        assert ("over SSH" in said.stdout, "permission denied" in said.stdout) == (is_right, not is_right), said
        assert [path.name for path in short.rglob("ssh-*")] == []
        wait_for(lambda: run.processes() == [], "no process is left")
    finally:
        shutil.rmtree(short)

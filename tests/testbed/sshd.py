"""A throw-away sshd on a free port of 127.0.0.1, with keys of its own; for whoever runs it, root or not."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from patience import PATIENCE_S
from testbed.ports import free_port

from agent_infra_core.settings import SshConfig

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A private key, with its public half beside it."""
    words = ["-b", "2048"] if kind == "rsa" else []
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, *words, "-N", passphrase, "-C", path.name, "-f", path],
        check=True,
        timeout=PATIENCE_S,
    )
    return path


def public_key(path: Path) -> str:
    """``type base64`` of a key."""
    return " ".join(path.with_name(path.name + ".pub").read_text().split()[:2])


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` has started, and those that they have."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    except OSError:  # it has just ended
        pass
    return found


class SshServer:
    """A real sshd; owns its process and those of its sessions. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        port: int | None = None,
        prefix: tuple[str, ...] = (),
        options: Mapping[str, str] | None = None,
        key_kinds: tuple[str, ...] = ("ed25519",),
    ) -> None:
        """``prefix`` are words before sshd's own (to run it elsewhere), ``options`` further lines of sshd_config.

        The client's key is ``client_key``.
        """
        self.address, self.prefix = address, prefix
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        self.folder, self.log = folder, folder / "sshd.log"
        self.user = getpass.getuser()
        self.client_key = folder / "client_key"
        if not self.client_key.exists():
            make_key(self.client_key)
        self.host_keys = [folder / f"host_{kind}" for kind in key_kinds]
        for kind, key in zip(key_kinds, self.host_keys, strict=True):
            if not key.exists():
                make_key(key, kind)
        self.authorized = folder / "authorized_keys"
        self.authorized.write_text(public_key(self.client_key) + "\n")
        self.port = port or free_port()
        self.known_hosts = folder / "known_hosts"
        self.trust(*self.host_keys)
        self.options = {
            "ListenAddress": f"{address}:{self.port}",
            "PidFile": "none",
            "AuthorizedKeysFile": str(self.authorized),
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "UseDNS": "no",
            "MaxStartups": "200",
            "MaxSessions": "500",
            "LogLevel": "VERBOSE",
            **(options or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def trust(self, *keys: Path) -> None:
        """Have known_hosts name these keys, and no others."""
        name = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        lines = [f"{name} {public_key(key)}\n" for key in keys]
        self.known_hosts.write_text("".join(lines))

    def ssh(self, **changes: str | int | None) -> SshConfig:
        """The configuration that leads here."""
        values = {
            "host": self.address,
            "port": self.port,
            "identity_file": str(self.client_key),
            "known_hosts_file": str(self.known_hosts),
            "config_file": os.devnull,
            **changes,
        }
        return SshConfig(**values)  # type: ignore[arg-type]

    def start(self) -> SshServer:
        assert SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = self.folder / "sshd_config"
        lines = [f"HostKey {key}" for key in self.host_keys]
        lines += [f"{name} {value}" for name, value in self.options.items()]
        config.write_text("\n".join(lines) + "\n")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.prefix, SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_S
        while "Server listening" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def sessions(self) -> list[int]:
        """The processes of the connections that are open."""
        if self.process is None:
            return []
        started = descendants(self.process.pid)
        is_sshd = Path(f"/proc/{self.process.pid}/comm").read_text().startswith("sshd")
        return started if is_sshd else started[1:]  # nsenter's child is the listening sshd

    def cut_sessions(self, number: int = signal.SIGKILL) -> None:
        """End every connection, or (SIGSTOP, SIGCONT) silence them and let them speak again."""
        for pid in self.sessions():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        if self.process is not None:
            sessions = descendants(self.process.pid)
            self.process.kill()
            self.process.wait(PATIENCE_S)
            self.process = None
            for pid in sessions:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def __enter__(self) -> SshServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

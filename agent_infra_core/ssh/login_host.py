"""The login host: runs commands there with the driver that the configuration asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.host import CommandResult, HostUnreachableError
from agent_infra_core.settings import ClusterConfig
from agent_infra_core.ssh.login import SshCommands
from agent_infra_core.ssh.openssh import OpenSshCommands, reason_for_openssh
from agent_infra_core.ssh.routes import InteractiveLoginError, LoginError, ssh_route


class LoginHost:
    """The cluster's login host: picks a driver and logs in once, for both commands and tunnels.

    A CommandRunner. Connects on the first command.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        environment: Mapping[str, str],
        control_name: str,
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``ask`` prompts the operator (None: nobody can be asked); ``control_name`` is unique to the deployment."""
        if cluster.ssh is None:
            raise AgentInfraError("cluster.ssh is not set; commands run here")
        self.ssh, self._wanted, self._environment = cluster.ssh, cluster.tunnel_driver, environment
        self._control_name, self._ask = control_name, ask
        self._lock = threading.Lock()
        self._commands: SshCommands | OpenSshCommands | None = None
        self._is_controller = False
        self.reason = ""  # why this driver was chosen; empty until then

    @property
    def driver(self) -> str:
        """``sshtunnel`` or ``openssh``; only a guess until the first command or tunnel has connected."""
        is_openssh = isinstance(self._commands, OpenSshCommands) or self._wanted == "openssh"
        return "openssh" if is_openssh else "sshtunnel"

    def lead(self) -> None:
        """Mark this process as the controller: it opens its own connection, which the deployment's others may share."""
        self._is_controller = True
        if isinstance(self._commands, OpenSshCommands):
            self._commands.login.is_shared = True

    def commands(self) -> SshCommands | OpenSshCommands:
        """Return the runner; chooses a driver on first use."""
        with self._lock:
            if self._commands is None:
                self._commands = self._choose()
            return self._commands

    def _choose(self) -> SshCommands | OpenSshCommands:
        if self._wanted == "openssh":
            return self._openssh("cluster.tunnel_driver says so")
        why = reason_for_openssh(self.ssh) if self._wanted == "auto" else None
        if why is not None:
            return self._openssh(why)
        commands = SshCommands(ssh_route(self.ssh, self.ssh.host), self._ask)
        try:
            commands.connect()
        except InteractiveLoginError:
            if self._wanted != "auto":
                raise
            return self._openssh("the login asks for more than a key")
        except HostUnreachableError as error:
            if isinstance(error, LoginError):
                raise
        self.reason = "cluster.tunnel_driver says so" if self._wanted != "auto" else "ssh_config needs nothing else"
        return commands

    def _openssh(self, reason: str) -> OpenSshCommands:
        self.reason = reason
        commands = OpenSshCommands(self.ssh, self._environment, self._control_name, self._ask is not None)
        commands.login.is_shared = self._is_controller
        return commands

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self.commands().run(argv, stdin=stdin, timeout_s=timeout_s)

    def stream(self, argv: Sequence[str]) -> Generator[bytes, None, None]:
        return self.commands().stream(argv)

    def close(self) -> None:
        with self._lock:
            if self._commands is not None:
                self._commands.close()
                self._commands = None

"""The login host: runs commands there by the driver that its configuration asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.host import CommandResult, HostUnreachableError
from agent_infra_core.settings import ClusterConfig
from agent_infra_core.ssh.login import SshCommands
from agent_infra_core.ssh.openssh import OpenSshCommands, why_openssh
from agent_infra_core.ssh.routes import InteractiveLoginError, LoginError, ssh_route


class LoginHost:
    """The host from which the cluster is used: picks the driver, logs in once, for commands and tunnels alike.

    A CommandRunner. Nothing is connected before the first command.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        environment: Mapping[str, str],
        control_name: str,
        ask: Callable[[str], str] | None = None,
    ) -> None:
        """``ask`` asks the operator (None: nobody is there); ``control_name`` tells the deployment from others."""
        if cluster.ssh is None:
            raise AgentInfraError("cluster.ssh is not set; commands run here")
        self.ssh, self._wanted, self._environment = cluster.ssh, cluster.tunnel_driver, environment
        self._control_name, self._ask = control_name, ask
        self._lock = threading.Lock()
        self._commands: SshCommands | OpenSshCommands | None = None
        self._is_controller = False
        self.reason = ""  # why this driver, once one was chosen

    @property
    def driver(self) -> str:
        """``sshtunnel`` or ``openssh``; what is likely, until the first command or tunnel has connected."""
        is_openssh = isinstance(self._commands, OpenSshCommands) or self._wanted == "openssh"
        return "openssh" if is_openssh else "sshtunnel"

    def lead(self) -> None:
        """This process is the controller: the deployment's others may use its connection, it uses none of theirs."""
        self._is_controller = True
        if isinstance(self._commands, OpenSshCommands):
            self._commands.login.is_shared = True

    def commands(self) -> SshCommands | OpenSshCommands:
        """The runner, chosen and connected at its first use."""
        with self._lock:
            if self._commands is None:
                self._commands = self._choose()
            return self._commands

    def _choose(self) -> SshCommands | OpenSshCommands:
        if self._wanted == "openssh":
            return self._openssh("cluster.tunnel_driver says so")
        why = why_openssh(self.ssh) if self._wanted == "auto" else None
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
        self.reason = "cluster.tunnel_driver says so" if self._wanted != "auto" else "ssh_config asks for nothing more"
        return commands

    def _openssh(self, reason: str) -> OpenSshCommands:
        self.reason = reason
        commands = OpenSshCommands(self.ssh, self._environment, self._control_name, self._ask is not None)
        commands.login.is_shared = self._is_controller
        return commands

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        return self.commands().run(argv, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._commands is not None:
                self._commands.close()
                self._commands = None

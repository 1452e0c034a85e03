"""How a host is reached: the configuration, ssh_config, and what can go wrong with a login."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import HostUnreachableError
from agent_infra_core.settings import SshConfig

SSH_PATIENCE_S = 15.0  # to reach a host, to log in, to open a channel
SSH_KEEPALIVE_S = 5  # three without an answer end an OpenSSH connection


class LoginError(HostUnreachableError, RefusedError):
    """SSH does not let us in, and will not until the operator did what the message says."""


class HostKeyError(LoginError):
    """A host shows a key that is not the known one, or none is known."""


class InteractiveLoginError(LoginError):
    """The login asks for what cannot be kept for the next one: a password or a one-time code."""


@dataclass(frozen=True)
class SshRoute:
    """How one host is reached, as the configuration and ssh_config say together."""

    alias: str  # as it was asked for
    host: str
    port: int
    user: str
    key_name: str  # by which known_hosts has it: host, [host]:port, or what HostKeyAlias says
    known_hosts: tuple[str, ...]  # files; those that are missing are left out when they are read
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False  # no other key of the agent is offered
    proxy_command: str | None = None
    host_keys: tuple[tuple[str, str], ...] = ()  # (type, base64) that count besides those of the files


@dataclass
class Keyring:
    """What one login has found out, so that the next need not ask; goes over a pipe, never by argv or environment."""

    passphrases: dict[str, str] = field(default_factory=dict)  # key file → what the operator typed
    accepted: str | None = None  # the key that opened last: a file, or an agent's key in base64


_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")


def read_ssh_config(ssh: SshConfig) -> tuple[str, str]:
    """Path and text of the ssh_config that counts; the text is empty where the default one is not there."""
    path = Path(ssh.config_file or "~/.ssh/config").expanduser()
    try:
        return str(path), path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if ssh.config_file is None and isinstance(error, FileNotFoundError):
            return str(path), ""
        raise LoginError(f"cluster.ssh.config_file: {path} cannot be read: {error.strerror}") from error


def ssh_options(text: str, alias: str) -> Mapping[str, Any]:
    """What an ssh_config says of a host: keys in lower case."""
    paramiko = load_paramiko()
    try:
        options: Mapping[str, Any] = paramiko.SSHConfig.from_text(text).lookup(alias)
        return options
    except (paramiko.SSHException, ValueError) as error:
        raise LoginError(f"ssh_config cannot be read for {alias}: {error}; tunnel_driver: openssh reads all") from error


def ssh_route(ssh: SshConfig, alias: str) -> SshRoute:
    """How ``alias``, the login host or a node behind it, is reached without OpenSSH; LoginError."""
    return make_route(ssh, alias, ssh_options(read_ssh_config(ssh)[1], alias))


def make_route(ssh: SshConfig, alias: str, options: Mapping[str, Any]) -> SshRoute:
    """The route that a configuration and the options of an ssh_config (one string or list each) say."""
    import getpass

    host = str(options.get("hostname", alias))
    port = int((ssh.port if alias == ssh.host else None) or options.get("port", 22))
    files = options.get("identityfile") or _DEFAULT_KEYS
    known = str(options.get("userknownhostsfile", " ".join(_KNOWN_HOSTS[:2]))).split()
    known += str(options.get("globalknownhostsfile", " ".join(_KNOWN_HOSTS[2:]))).split()
    proxy = options.get("proxycommand", "none")
    if options.get("proxyjump", "none") != "none":
        raise LoginError(f"ssh_config says ProxyJump for {alias}; set cluster.tunnel_driver to auto or openssh")
    return SshRoute(
        alias=alias,
        host=host,
        port=port,
        user=ssh.user or options.get("user") or getpass.getuser(),
        key_name=str(options.get("hostkeyalias") or (host if port == 22 else f"[{host}]:{port}")),
        known_hosts=(ssh.known_hosts_file,) if ssh.known_hosts_file else tuple(known),
        identity_files=(ssh.identity_file,) if ssh.identity_file else tuple(files),
        identities_only=bool(ssh.identity_file) or options.get("identitiesonly") == "yes",
        proxy_command=None if proxy == "none" else proxy,
    )


def load_paramiko() -> Any:
    """paramiko, without its import's warnings about old ciphers, and without its own lines on stderr."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paramiko
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return paramiko


def route_from_json(document: Mapping[str, Any]) -> SshRoute:
    """The SshRoute that ``dataclasses.asdict`` made, after JSON made lists of its tuples."""
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in document.items()}
    values["host_keys"] = tuple((kind, key) for kind, key in values["host_keys"])
    return SshRoute(**values)

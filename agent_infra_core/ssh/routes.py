"""How to reach a host, from the configuration and ssh_config, and the errors of a login."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import HostUnreachableError
from agent_infra_core.settings import SshConfig

SSH_PATIENCE_S = 15.0  # time to connect, to log in or to open a channel
SSH_KEEPALIVE_S = 5  # OpenSSH gives up after three without an answer


class LoginError(HostUnreachableError, RefusedError):
    """SSH refuses the login, and will until the operator does what the message says."""

    kind = "login"  # its name between a `tunnel` process and its parent


class HostKeyError(LoginError):
    """A host's key is unknown or has changed."""

    kind = "host_key"


class ForwardingForbiddenError(LoginError):
    """A host forbids forwarding; another way to the replica may work."""

    kind = "forbidden"


class InteractiveLoginError(LoginError):
    """The login needs a password or a one-time code, which cannot be reused for the next login."""

    kind = "interactive"


@dataclass(frozen=True)
class SshRoute:
    """How to reach one host, from the configuration and ssh_config."""

    alias: str  # the name that the configuration uses
    host: str
    port: int
    user: str
    key_name: str  # its name in known_hosts: host, [host]:port or HostKeyAlias
    known_hosts: tuple[str, ...]  # files; missing ones are skipped
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False  # offer no other keys from the agent
    proxy_command: str | None = None
    host_keys: tuple[tuple[str, str], ...] = ()  # (type, base64), trusted in addition to those in the files


@dataclass
class Keyring:
    """Secrets and keys from one login for the next, which then needs no prompt. Sent by pipe, never argv or env."""

    passphrases: dict[str, str] = field(default_factory=dict)  # key file → passphrase that the operator typed
    accepted: str | None = None  # the key accepted last: a file, or an agent's key in base64


_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")


def read_ssh_config(ssh: SshConfig) -> tuple[str, str]:
    """Return path and text of the ssh_config; the text is empty if the default file doesn't exist."""
    path = Path(os.path.expanduser(ssh.config_file or "~/.ssh/config"))
    try:
        return str(path), path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if ssh.config_file is None and isinstance(error, FileNotFoundError):
            return str(path), ""
        raise LoginError(f"cluster.ssh.config_file: {path} cannot be read: {error.strerror}") from error


def ssh_options(text: str, alias: str) -> Mapping[str, Any]:
    """Return an ssh_config's options for a host, with keys in lower case. Raises LoginError."""
    paramiko = load_paramiko()
    try:
        options: Mapping[str, Any] = paramiko.SSHConfig.from_text(text).lookup(alias)
        return options
    except (paramiko.SSHException, ValueError) as error:
        raise LoginError(f"ssh_config cannot be read for {alias}: {error}; use tunnel_driver: openssh") from error


def ssh_route(ssh: SshConfig, alias: str) -> SshRoute:
    """Return how to reach ``alias``, the login host or a node behind it, without OpenSSH. Raises LoginError."""
    return make_route(ssh, alias, ssh_options(read_ssh_config(ssh)[1], alias))


def make_route(ssh: SshConfig, alias: str, options: Mapping[str, Any]) -> SshRoute:
    """Build a route from the configuration and the options of an ssh_config (each a string or a list)."""
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


def node_route(route: SshRoute, node: str, address: str | None) -> SshRoute:
    """Use the address that Slurm knows, unless ssh_config has one: the name may mean nothing on the login host."""
    return replace(route, host=address) if address is not None and route.host == node else route


def load_paramiko() -> Any:
    """Import paramiko without its warnings about old ciphers and without its log lines on stderr."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paramiko
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return paramiko


def public_half(file: Path) -> list[str]:
    """Return the fields of a public key: the file itself, or the one beside a private key; empty if there is none."""
    try:
        path = file if file.suffix == ".pub" else file.with_name(file.name + ".pub")
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []

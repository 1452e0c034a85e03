"""Errors, with one root class. Messages say what happened, where, and what to do. Only main() prints them and exits."""

from __future__ import annotations

import sys
from collections.abc import Iterable


class AgentInfraError(Exception):
    """Base class of every error that this program raises on purpose; ``exit_code`` is that of the command line."""

    exit_code = 1


class RefusedError(AgentInfraError):
    """Refused before starting any engine: the configuration, the machine or the state doesn't allow it."""

    exit_code = 2


class ConfigError(RefusedError):
    """The configuration is invalid; the message names every invalid key, its value and the allowed values."""

    def __init__(self, message: str, deployment: str | None = None) -> None:
        """``deployment``: its cluster.name; None if an error may affect that."""
        super().__init__(message)
        self.deployment = deployment


# Packages for the relay and its controller, and for all roles on the operator's machine, by import name.
SERVING_PACKAGES = ("gevent", "flask", "msgspec", "numpy", "prometheus_client")
PROGRAM_PACKAGES = (*SERVING_PACKAGES, "yaml", "marshmallow", "jinja2", "rich", "requests", "paramiko", "sshtunnel")


class NotInstalledError(RefusedError):
    """This Python is missing packages; ``names`` are their import names."""

    def __init__(self, names: Iterable[str]) -> None:
        packages = ", ".join("PyYAML" if name == "yaml" else name.replace("_", "-") for name in names)
        super().__init__(
            f"not installed for {sys.executable}: {packages}; activate the environment that has them "
            f"(`. .venv/bin/activate`), or `{sys.executable} -m pip install` them"
        )


def require_packages(names: Iterable[str]) -> None:
    """Raise NotInstalledError if this Python is missing any of these packages. Doesn't import them."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalledError(missing)

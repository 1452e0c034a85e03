"""Errors: one root. The message says what happened, where, and what to do. Only main() prints errors and exits."""

from __future__ import annotations

import sys
from collections.abc import Iterable


class AgentInfraError(Exception):
    """Root of every error that this program raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class RefusedError(AgentInfraError):
    """Refused before any engine was started: the configuration, the machine or the state does not allow it."""

    exit_code = 2


class ConfigError(RefusedError):
    """The configuration is wrong; the message names every offending path, its value and what is allowed."""


# What the relay and its controller import, and what the other roles of the operator's machine import besides.
SERVING_PACKAGES = ("gevent", "flask", "msgspec", "numpy", "prometheus_client")
PROGRAM_PACKAGES = (*SERVING_PACKAGES, "yaml", "marshmallow", "jinja2", "rich", "requests", "paramiko", "sshtunnel")


class NotInstalledError(RefusedError):
    """This Python has not the packages that are needed; ``names`` are those that are imported."""

    def __init__(self, names: Iterable[str]) -> None:
        packages = ", ".join("PyYAML" if name == "yaml" else name.replace("_", "-") for name in names)
        super().__init__(
            f"not installed for {sys.executable}: {packages}; activate the environment that has them "
            f"(`. .venv/bin/activate`), or `{sys.executable} -m pip install` them"
        )


def require_packages(names: Iterable[str]) -> None:
    """NotInstalledError where this Python has not all of these packages; imports none of them."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalledError(missing)

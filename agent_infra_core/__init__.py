"""Agent Infra: the engines behind agent_infra.py."""

from __future__ import annotations

__version__ = "0.1.0"

"""The core of Agent Infra, behind agent_infra.py. CONTRIBUTING.md describes each package."""

from __future__ import annotations

__version__ = "0.1.0"

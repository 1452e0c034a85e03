# A type checker ignores the annotations of an installed single module (PEP 561): this re-exports what agent_infra.py
# takes from the core, which is typed, and says what agent_infra.py adds. A test compares it with the code.

import os
from typing import Any

from agent_infra_core import client as client
from agent_infra_core.client import ClientError as ClientError
from agent_infra_core.client import SessionContext as SessionContext
from agent_infra_core.client import attach as attach
from agent_infra_core.errors import AgentInfraError as AgentInfraError
from agent_infra_core.errors import ConfigError as ConfigError
from agent_infra_core.errors import RefusedError as RefusedError
from agent_infra_core.settings import AnalysisConfig as AnalysisConfig
from agent_infra_core.settings import ClusterConfig as ClusterConfig
from agent_infra_core.settings import Config as Config
from agent_infra_core.settings import ContainerConfig as ContainerConfig
from agent_infra_core.settings import HeadersConfig as HeadersConfig
from agent_infra_core.settings import ModelConfig as ModelConfig
from agent_infra_core.settings import PartitionConfig as PartitionConfig
from agent_infra_core.settings import ProxyConfig as ProxyConfig
from agent_infra_core.settings import SlurmConfig as SlurmConfig
from agent_infra_core.settings import SshConfig as SshConfig

__all__ = ["AgentInfraError", "Config", "ConnectionManager", "SessionContext", "attach", "load_config"]

def load_config(path: str | os.PathLike[str] | None = None) -> Config: ...

class ConnectionManager:
    config: Config
    def __init__(self, config: Config | str | os.PathLike[str] | None = None) -> None: ...
    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    async def start(self, model: str | None = None, replicas: int | None = None) -> None: ...
    async def connect(self) -> str: ...
    async def status(self) -> dict[str, Any]: ...
    async def stop(self, now: bool = False) -> list[str]: ...
    async def __aenter__(self) -> ConnectionManager: ...
    async def __aexit__(self, *_: object) -> None: ...

from agent_infra_core.client import SessionContext as SessionContext
from agent_infra_core.client import attach as attach

__all__ = ["SessionContext", "attach"]

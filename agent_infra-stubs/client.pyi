from agent_infra import SessionContext as SessionContext
from agent_infra import attach as attach

__all__ = ["SessionContext", "attach"]

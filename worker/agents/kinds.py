"""Which kind of agent works in which kind of place."""

from outwake.settings import Settings
from outwake.worker.agents.base import AgentAdapter, Box
from outwake.worker.agents.claude import Claude
from outwake.worker.agents.command import Program


def adapter_for(settings: Settings, box: Box) -> AgentAdapter:
    """The adapter of a turn: the Claude Code CLI where the sandbox is reached by MCP, any program inside."""
    return Program(settings) if box.mcp_config is None else Claude(settings)

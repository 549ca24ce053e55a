"""Which kind of agent works in which kind of place."""

from outwake.settings import Settings
from outwake.worker.agents.base import AgentAdapter
from outwake.worker.agents.claude import Claude
from outwake.worker.agents.command import Program


def adapter_for(settings: Settings) -> AgentAdapter:
    """The adapter of a session: the Claude Code CLI for an allocator's sandbox, any program for a directory
    of this host.
    """
    return Claude(settings) if settings.ip_allocator_url is not None else Program(settings)

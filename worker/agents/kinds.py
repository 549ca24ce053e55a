"""Which kind of agent works in which kind of place, and whether its program is there."""

import os
import shlex
import shutil

from outwake.settings import Settings
from outwake.worker.agents.base import AgentAdapter, Box
from outwake.worker.agents.claude import Claude
from outwake.worker.agents.command import Program


def adapter_for(settings: Settings, box: Box) -> AgentAdapter:
    """The adapter of a turn: the Claude Code CLI where the sandbox is reached by MCP, any program inside."""
    return Program(settings) if box.mcp_config is None else Claude(settings)


def program_problem(command: str) -> str | None:
    """Why an agent's command line cannot be run on this host, in a line; None if it can."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return f"cannot be split into words: {str(error).lower()}"
    if not words:
        return "is empty"
    relative = os.sep in words[0] and not os.path.isabs(words[0])  # to the work tree, which is not there yet
    if relative or shutil.which(words[0], path=os.environ.get("PATH", os.defpath)):
        return None
    return f"there is no program {words[0]!r} here"

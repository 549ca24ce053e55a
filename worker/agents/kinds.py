"""Which kind of agent works in which kind of place, and whether its program is there."""

import os
import shlex
import shutil
from collections.abc import Callable

from outwake.settings import Settings
from outwake.worker.agents.base import AgentAdapter
from outwake.worker.agents.claude import Claude
from outwake.worker.agents.command import Program
from outwake.worker.errors import TransientError
from outwake.worker.sandboxes.choice import lent_kind, reached_by_mcp

ADAPTERS: dict[str, Callable[[Settings], AgentAdapter]] = {Claude.name: Claude, Program.name: Program}


def adapter_for(settings: Settings, *, by_mcp: bool) -> AgentAdapter:
    """The adapter of a turn: OUTWAKE_AGENT's. If that is unset: the Claude Code CLI where the sandbox is
    reached by MCP, else any program.

    by_mcp: whether the sandbox is reached so. Raises TransientError if the agent of OUTWAKE_AGENT can't work
    in it: the next attempt gets a sandbox of the kind that this worker is configured for.
    """
    name = settings.agent or (Claude.name if by_mcp else Program.name)
    adapter = ADAPTERS[name](settings)
    if adapter.by_mcp and not by_mcp:
        raise TransientError(f"{name} needs a sandbox that is reached by MCP")
    if by_mcp and not adapter.by_mcp:
        raise TransientError(f"{name} runs in the sandbox, and this one is reached by MCP")
    return adapter


def agent_problem(settings: Settings) -> str | None:
    """Why no agent can be run for this host's sessions, in a line that names the setting; None if it can."""
    try:
        adapter_for(settings, by_mcp=reached_by_mcp(lent_kind(settings)))
    except TransientError as error:
        return f"OUTWAKE_AGENT: {error}"
    found = program_problem(settings.agent_command)
    return None if found is None else f"OUTWAKE_AGENT_COMMAND: {found}"


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

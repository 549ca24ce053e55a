"""Any program that prints JSON lines as the agent, in the sandbox (docs/agent.md).

The prompt is its last argument, and it works in the work tree. It keeps nothing from one turn to the next.
"""

import shlex

from outwake.settings import Settings
from outwake.worker.agents.base import AgentTurn, Box, Command


class Program:
    """The adapter `command`."""

    name = "command"
    by_mcp = False
    promises_result = False
    remembers: str | None = None

    def __init__(self, settings: Settings) -> None:
        self._program = settings.agent_command

    def command(self, turn: AgentTurn, box: Box) -> Command:
        return Command([*shlex.split(self._program), turn.prompt], box.tree)

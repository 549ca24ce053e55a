"""The Claude Code CLI as the agent of a turn in a sandbox (docs/agent.md).

The CLI runs on the worker and reaches the sandbox by MCP. Its own tools are disabled, because they would work
on the worker's disk. Each attempt has a HOME of its own, into which the transcript of the session's earlier
turns is restored. The CLI files transcripts by working directory, so it runs in `/`, the same on every host.

The prompt and the MCP configuration are passed in files: a prompt may be longer than an argument can be, and
every user of the host can read arguments.
"""

import json
import os
import re
import shlex
from uuid import uuid4

from outwake.settings import Settings
from outwake.worker.agents.base import AgentTurn, Box, Command, as_in_tools
from outwake.worker.errors import PermanentError

_PASSED = re.compile(
    r"(?:ANTHROPIC|CLAUDE_CODE|MCP)_.*|(?:HTTPS?|NO)_PROXY|NODE_EXTRA_CA_CERTS|SSL_CERT_(?:FILE|DIR)",
    re.IGNORECASE,
)
_BUILT_IN = "Bash,Edit,Write,Read,Glob,Grep,NotebookEdit"
_STDIN = 'exec "$@" < "$0"'

_SYSTEM = """\
You work in a remote sandbox. Its files and its shell are reached only through the MCP tools you are given. \
The repository's work tree is at {tree} there, with the branch {branch} checked out. \
Commit your work on that branch; do not switch to another and do not push."""

_ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    # Without this the CLI may query the model before a slow MCP server has listed the sandbox's tools.
    "MCP_CONNECTION_NONBLOCKING": "0",
    "MCP_CONNECT_TIMEOUT_MS": "60000",
}


class Claude:
    """The adapter `claude`."""

    name = "claude"
    by_mcp = True
    promises_result = True
    remembers: str | None = ".claude/projects"  # its transcripts

    def __init__(self, settings: Settings) -> None:
        self._program = settings.agent_command
        self._permission_mode = settings.agent_permission_mode

    def command(self, turn: AgentTurn, box: Box) -> Command:
        """Raises PermanentError if the box's MCP configuration is not valid."""
        servers = mcp_servers(box.mcp_config)
        memory = turn.memory
        argv = [
            *("/bin/sh", "-c", _STDIN, f"{box.place}/prompt"),
            *shlex.split(self._program),
            *(("--resume", memory.session) if memory else ("--session-id", str(uuid4()))),
            *("--mcp-config", f"{box.place}/mcp.json", "--strict-mcp-config"),
            *("--append-system-prompt", _SYSTEM.format(tree=box.tree, branch=turn.branch)),
            # All built-in tools are disabled. Those that touch the disk are also denied by name.
            *("--tools=", f"--disallowedTools={_BUILT_IN}"),
            f"--allowedTools={','.join(f'mcp__{name}' for name in servers)}",
            f"--permission-mode={self._permission_mode}",
        ]
        passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
        return Command(
            argv,
            "/",
            env={**_ENVIRONMENT, **passed},
            files={"prompt": turn.prompt, "mcp.json": box.mcp_config or ""},
            home=memory.content if memory else b"",
            servers=servers,
        )


def mcp_servers(config: str | None) -> list[str]:
    """The names of the MCP servers that a configuration lists, spelled as in names of tools."""
    try:
        names = [as_in_tools(name) for name in json.loads(config or "")["mcpServers"]]
    except (KeyError, TypeError, ValueError):
        raise PermanentError("the allocator's item has no mcp_json_string that configures servers") from None
    if not names:
        raise PermanentError("the allocator's item configures no MCP server")
    return names

"""The seam between a turn and a kind of agent.

An adapter knows two things: how its agent is started and resumed, and what its memory is. It starts nothing
and writes nothing itself: worker/agents/turn.py does that for every kind. worker/agents/place.py knows where
the agent runs, and how its files get there. outwake/session/lines.py knows what the lines mean that an agent
prints.

To add a kind:
1. Write a module with an adapter, and name the adapter in worker/agents/kinds.py. Name the kind in
   OUTWAKE_AGENT's type (outwake/settings.py).
2. If its lines are of a new form, write a reader for them: see outwake/session/lines.py.
3. If it edits files by tools of its own, name these in worker/agents/verdict.py.
4. Say in docs/agent.md how it is started, and which sandboxes it works in.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from outwake.session.events import Started

AgentLine = dict[str, Any]
"""A line that an agent printed, as worker/agents/stream.py stores it."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Memory:
    """The state from which a conversation is resumed. Only the kind of agent that left it can do so.

    agent: that kind. session: the agent's id of the conversation. content: what the adapter keeps.
    """

    agent: str
    session: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class AgentTurn:
    """What the agent is to do. memory: of the session's earlier turns; None: a new conversation."""

    prompt: str = field(repr=False)
    branch: str
    memory: Memory | None = None


@dataclass(frozen=True)
class Box:
    """What an adapter must know of where its agent works. The paths are as the agent sees them.

    tree: the repository's work tree. place: a directory for this attempt alone, with the files of `Command`.
    mcp_config: how an agent on the worker reaches the sandbox, as the JSON of an MCP configuration; None if
    the agent runs in the sandbox.
    """

    tree: str
    place: str
    mcp_config: str | None = None

    @property
    def home(self) -> str:
        """The agent's HOME, if its command has one."""
        return f"{self.place}/home"


@dataclass(frozen=True)
class Command:
    """How an agent is started: `argv` in `cwd`; `env` is added to `worker/process/guarded.py`'s allow-list.

    files: written before the start, by their names in the box's place. home: a tar.gz that the agent's own
    HOME begins with, b"" for an empty one; None: it has the HOME of the account that it runs as. servers: the
    MCP servers that the agent cannot work without.
    """

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    home: bytes | None = field(default=None, repr=False)
    servers: Sequence[str] = ()


class AgentAdapter(Protocol):
    """A kind of agent.

    name: of the kind, as OUTWAKE_AGENT names it; stored with what the agent remembers.
    by_mcp: whether it runs on the worker and reaches a sandbox by MCP; else it runs in the sandbox.
    remembers: the path below HOME of what its next turn needs; None: nothing.
    promises_result: whether every run that ends by itself ends with a `Result` event, so that a run without
        one has failed (worker/agents/verdict.py).
    """

    name: str
    by_mcp: bool
    promises_result: bool
    remembers: str | None

    def command(self, turn: AgentTurn, box: Box) -> Command:
        """How the agent is started for a turn. Raises PermanentError if it cannot use
        this kind of box.
        """


def unreached(started: Started, servers: Sequence[str]) -> list[str]:
    """Those of `servers` to which an agent is not connected, as it tells itself. It would continue without
    them, and the model would have no tools.
    """
    if started.servers is None:
        return []
    connected = [as_in_tools(name) for name, status in started.servers if status == "connected"]
    return [name for name in servers if name not in connected]


def as_in_tools(server: str) -> str:
    """The name of an MCP server as it is spelled in the names of its tools."""
    return _NOT_IN_NAMES.sub("_", server)

"""The seam between a turn and a kind of agent.

An adapter knows two things: how its agent is started and resumed, and what its memory is. It starts nothing
and writes nothing itself. worker/agents/turn.py does that for every kind. outwake/session/lines.py knows what
the lines mean that an agent prints.
"""

import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from outwake.session.events import Started
from outwake.worker.agents.archive import unpack
from outwake.worker.errors import PermanentError

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
    """What an adapter must know of where its agent works.

    tree: the repository's work tree, as the agent sees it. place: a directory on this host for this attempt
    alone, for the files of `Command`; None if there is none. mcp_config: how an agent that runs on the worker
    reaches the sandbox, as the JSON of an MCP configuration; None if the agent runs inside.
    """

    tree: str
    place: Path | None = None
    mcp_config: str | None = None

    @property
    def home(self) -> Path | None:
        """The agent's HOME; None: the worker's."""
        return None if self.place is None else self.place / "home"


@dataclass(frozen=True)
class Command:
    """How an agent is started: `argv` in `cwd`; `env` is added to `worker/process/guarded.py`'s allow-list.

    files: written before the start, by their names in the box's place. home: a tar.gz that is unpacked into
    the agent's HOME. servers: the MCP servers that the agent cannot work without.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    home: bytes | None = field(default=None, repr=False)
    servers: Sequence[str] = ()


class AgentAdapter(Protocol):
    """A kind of agent.

    name: of the kind, as OUTWAKE_AGENT names it; stored with what the agent remembers.
    by_mcp: whether it runs on the worker and reaches a sandbox by MCP; else it runs in the sandbox.
    promises_result: whether every run that ends by itself ends with a `Result` event, so that a run without
        one has failed (worker/agents/verdict.py).
    """

    name: str
    by_mcp: bool
    promises_result: bool

    def command(self, turn: AgentTurn, box: Box) -> Command:
        """How the agent is started for a turn. Raises PermanentError if it cannot use
        this kind of box.
        """

    def memory(self, home: Path) -> bytes | None:
        """What the next turn needs of HOME; None if there is nothing, or too much to store."""


def lay_out(command: Command, box: Box) -> None:
    """Write the files of a command, readable by nobody else. Blocks."""
    if box.place is None or box.home is None:
        return
    box.home.mkdir(mode=0o700)
    for name, content in command.files.items():
        descriptor = os.open(box.place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
    if command.home is not None:
        try:
            unpack(command.home, box.home)
        except tarfile.TarError as error:
            raise PermanentError(f"the agent's memory cannot be unpacked: {error}") from error


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

"""Where a turn's work tree is, and how a program is run there: the two seams of sandboxes.

A provider lends sandboxes of one kind. What a session holds of it is stored (`session.sandbox`), with its
`kind`, so that whichever worker gives it back asks the right provider (`worker/sandboxes/choice.py`).
`worker/sandboxes/lending.py` calls `acquire` and sees to it that nothing leaks.

To add a kind:
1. Write a module with a provider and its sandbox. Name the provider in choice.py, and the kind in
   OUTWAKE_SANDBOX's type (outwake/settings.py).
2. `run` and `write` serve everything: the clone, the work that is kept, the agent's files and its memory
   (worker/repo/workspace.py, worker/agents/place.py). So the sandbox needs git, tar, gzip, sha256sum, base64
   and the usual small tools.
3. Choose where the agent runs.
   - On the worker: `mcp_config` tells how it reaches the sandbox, `agent_command` returns the command as it
     is, and `reached_by_mcp` in choice.py names the kind.
   - In the sandbox: `mcp_config` is None, and `agent_command` wraps the command. It sets `cwd` and `env`
     inside, and gives the agent nothing else of the worker's environment. It passes on stdout, stderr and
     the exit status. tests/integration/test_agent_inside.py has an example.
4. The worker's guardian ends the process that it started and that process's children, with SIGKILL if it
   must. An agent inside has to end with that process. Where that is not so, as with a container's client, the
   sandbox ends what was left before anything else runs there.
5. An agent inside need not be a program of this host. Then worker/agents/kinds.py must not look for it at a
   worker's start.
6. Say in docs/sandbox.md what the kind keeps from an agent.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from outwake.worker.agents.base import Command
from outwake.worker.errors import TransientError

STEP_TIMEOUT = 600.0
_SAID_LINES = 4
_SAID = 1000  # characters that an error's text quotes
_OUTPUT = 16 * 1024  # characters of a failed step's output that are looked at

Item = dict[str, Any]
"""What a session holds: {"kind", "item", "borrow_token"}; "keep", in seconds, if the next turn may reuse it.

item: the provider's own, any JSON. borrow_token: of this borrowing; a secret. kind: a provider's; what was
stored without one is told apart by choice.py.
"""


class StepError(Exception):
    """A shell step ended with an exit code other than 0; `output` is the end of what it printed."""

    def __init__(self, step: str, code: int, output: str) -> None:
        self.output = output[-_OUTPUT:]
        said = last_lines(self.output)
        super().__init__(f"{step}: exit code {code}" + (f": {said}" if said else ""))
        self.step = step
        self.code = code


class StepTimeout(TransientError):
    """A shell step did not end in the time it had."""


class Sandbox(Protocol):
    """A sandbox to which we are connected."""

    async def run(self, step: str, script: str, *arguments: str, timeout: float = STEP_TIMEOUT) -> str:
        """Run a shell script with arguments `$1`, `$2` …; return its output without the last line break.

        The output includes what it prints as errors. step: its name in errors. script: our own text, run by
        `sh -eu`. It finds the place of our files in $OUTWAKE_HOME, or else uses `$HOME/outwake`.

        Raises StepError for an exit code other than 0, StepTimeout if the script did not end within `timeout`
        seconds, TransientError if the sandbox can't be reached, PermanentError if it refuses.
        """

    async def write(self, path: str, content: bytes) -> None:
        """Write a file. Raises TransientError or PermanentError if the sandbox does not confirm it."""

    def agent_command(self, command: Command) -> Command:
        """What this worker starts so that `command` runs where the agent works: other words, another `cwd`,
        another `env`.

        The paths of `command` are as the agent sees them. What is returned is as this worker sees it.
        """

    def mcp_config(self) -> str | None:
        """The MCP configuration by which an agent on this worker reaches the sandbox; None: it is inside."""


@dataclass(frozen=True)
class Request:
    """What a sandbox is asked for; the ids are told to the provider, for readers of its log."""

    intent: UUID
    session_id: UUID
    run: UUID
    attempt: int


class SandboxProvider(Protocol):
    """The source of one kind of sandboxes."""

    kind: str

    async def acquire(self, request: Request) -> Item:
        """A sandbox for this attempt.

        Raises HandBack if none is free, OutcomeUnknown if one may have been lent, SessionError if none was
        lent.
        """

    def connect(self, held: Item) -> AbstractAsyncContextManager[Sandbox]:
        """Connect to a sandbox that the session holds. Raises SessionError."""

    async def release(self, held: Item) -> None:
        """Give the sandbox back. A second time does no harm. Raises SessionError if that was not accepted."""


def last_lines(output: str, count: int = _SAID_LINES) -> str:
    """The last lines that are not empty, in one line."""
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    return "; ".join(lines[-count:])[-_SAID:]

"""Run git safely.

Arguments are passed as lists. Text from a user was checked (`outwake/session/names.py`) and still follows a
`--` or a `refs/` prefix. Git runs under the guardian: it ends with the worker and after its timeout, together
with all its children. It never asks for a password, runs no hook, and uses only the allowed transports. An
agent may have changed the repository's own configuration, which can name programs; such a program runs with
the agent's rights, in the same small environment.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.process.guarded import Guarded

OUTPUT = 16 * 1024 * 1024

# Messages of git and ssh in the C locale. Any other message may be a network failure, which is retried.
_PERMANENT = re.compile(
    r"repository '.*' not found|repository not found|does not appear to be a git repository"
    r"|could not be found|does not exist|not a git repository|access denied"
    r"|authentication failed|could not read (?:username|password)|permission denied"
    r"|returned error: 40[0134]|host key verification failed|dubious ownership"
    r"|transport '.*' not allowed|unable to update url base from redirection"
    r"|exists; cannot create|ssl certificate problem",
    re.IGNORECASE,
)


class GitError(Exception):
    """A git command ended with a status other than 0; `reason` is a short form of its message."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    def explain(self, doing: str) -> SessionError:
        """The error for the session: PermanentError if a retry can't help, else TransientError."""
        kind = PermanentError if _PERMANENT.search(self.reason) else TransientError
        return kind(f"{doing}: {self.reason}")


@dataclass(frozen=True)
class Git:
    """How git is run for one session.

    env: added to the allow-list of `worker/process/guarded.py`; it may set `GIT_SSH_COMMAND`.
    timeout: seconds that one command may take.
    """

    env: Mapping[str, str]
    timeout: float = 600.0

    async def __call__(self, *arguments: str, cwd: Path, transports: str = "") -> str:
        """Run git and return its output.

        transports: the allowed ones, such as `https:ssh` (GIT_ALLOW_PROTOCOL); none by default.

        Raises GitError, or TransientError after the timeout.
        """
        env = {
            "GIT_SSH_COMMAND": "ssh -o BatchMode=yes",
            **self.env,
            "GIT_ALLOW_PROTOCOL": transports or "none",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "",
            "SSH_ASKPASS": "",
            "GIT_CEILING_DIRECTORIES": str(cwd.parent),  # never use an outer repository
            "LC_ALL": "C",
        }
        options = (
            "core.hooksPath=/dev/null",
            "core.fsmonitor=false",
            "commit.gpgSign=false",
            "gc.auto=0",
        )
        argv = ["git", *(part for option in options for part in ("-c", option)), *arguments]
        async with Guarded.start(
            argv, cwd=cwd, env=env, deadline=math.inf, grace=1.0, timeout=self.timeout
        ) as process:
            output = bytearray()
            while chunk := await process.read():
                if len(output) < OUTPUT:
                    output += chunk
            ended = await process.wait()
        if ended.cause == "timeout":
            raise TransientError(f"git {arguments[0]} took over {self.timeout:g} seconds")
        if ended.cause != "exited":
            raise TransientError(f"git {arguments[0]} was ended from outside")
        if ended.code:
            raise GitError(ended.code, _reason(ended.stderr) or f"exit status {ended.code}")
        return output.decode(errors="replace").replace("\0", "\ufffd").rstrip("\n")


def _reason(stderr: str) -> str:
    """Git's message in a line or two: its errors, or else its last lines."""
    lines = [line.strip() for line in stderr.replace("\r", "\n").split("\n") if line.strip()]
    marked = ("fatal:", "error:", "ERROR:", "remote:", "ssh:", "!")
    chosen = [line for line in lines if line.startswith(marked) or _PERMANENT.search(line)]
    return "; ".join((chosen or lines)[-4:])[:1000]

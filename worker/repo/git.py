"""What git's errors mean. Git always runs in the C locale (worker/repo/steps.py), so its words are known."""

import re

from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.sandboxes.base import StepError, last_lines

# Messages of git and ssh in the C locale. Any other message may be a network failure, which is retried.
_PERMANENT = re.compile(
    r"repository '.{0,1000}' not found|repository not found|does not appear to be a git repository"
    r"|could not be found|does not exist|not a git repository|access denied"
    r"|authentication failed|could not read (?:username|password)|permission denied"
    r"|returned error: (?:3\d\d|40[0134])|host key verification failed|dubious ownership"
    r"|transport '.{0,100}' not allowed|unable to update url base from redirection"
    r"|exists; cannot create|ssl certificate problem",
    re.IGNORECASE,
)
# Not `remote:`, nor what follows `remote error:`: what a server says of itself is not the user's to read.
_MARKED = ("fatal:", "error:", "ERROR:", "ssh:", "!")
_REMOTE = re.compile(r"(remote error:).*")


def explain(error: StepError, doing: str) -> SessionError:
    """The error for the session: PermanentError if a retry can't help, else TransientError."""
    reason = reason_of(error.output) or f"exit status {error.code}"
    kind = PermanentError if _PERMANENT.search(reason) else TransientError
    return kind(f"{doing}: {reason}")


def reason_of(output: str) -> str:
    """Git's message in a line or two: its errors, or else its last lines. Nothing that a server said."""
    lines = [line.strip() for line in output.replace("\r", "\n").split("\n")]
    ours = [_REMOTE.sub(r"\1 …", line) for line in lines if line and not line.startswith("remote:")]
    marked = [line for line in ours if line.startswith(_MARKED) or _PERMANENT.search(line)]
    return last_lines("\n".join(marked or ours))

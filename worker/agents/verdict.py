"""How a turn ended: what its prompt says, by the agent's exit and its own result."""

from typing import Literal, NamedTuple

from outwake.session.events import Result
from outwake.telemetry.log import get_logger
from outwake.worker.errors import TransientError
from outwake.worker.process.guarded import Exit
from outwake.worker.secrets import Secrets

REASON = 2000
"""Characters of a reason."""

log = get_logger(__name__)


class Verdict(NamedTuple):
    status: Literal["succeeded", "failed"] = "succeeded"
    reason: str | None = None


def judge(ended: Exit, result: Result | None, timeout: float, secrets: Secrets) -> Verdict:
    """The verdict of a run. Raises TransientError if the agent was ended from outside."""
    log.info("agent_ended", code=ended.code, cause=ended.cause, left=ended.left)
    match ended.cause:
        case "timeout":
            return Verdict("failed", f"the agent took longer than {timeout:g} s")
        case "exited":
            pass
        case _:
            raise TransientError(f"the agent was ended from outside ({ended.cause})")
    if result is not None and result.error is not None:
        return Verdict("failed", f"the agent reported {result.error}"[:REASON])
    if ended.code != 0:
        stderr = secrets.text(ended.stderr.strip())[-REASON:]
        how = f"exit status {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
        return Verdict("failed", f"the agent ended with {how}" + (f": {stderr}" if stderr else ""))
    return Verdict()

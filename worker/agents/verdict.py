"""How a turn ended: what its prompt says, by the agent's exit and its own result.

The first row that applies decides:

| what happened | the prompt |
|---|---|
| the time limit passed | failed |
| the guardian was killed, and the agent with it | failed: it has run, so it is not run again |
| the agent was ended from outside: the lease, the worker, a signal | no verdict: the attempt is retried |
| its result is an error | failed, with the agent's words |
| it was denied every tool of a kind that it needed | failed: see `_denied` |
| its result is none, and it had not exited LINGER seconds later | succeeded |
| it exited with a status other than 0 | failed, with the end of stderr |
| it exited without the result that it had promised | failed, with the end of what it said |
| it exited | succeeded |
"""

from typing import Literal, NamedTuple

from outwake.session.events import Result
from outwake.telemetry.log import get_logger
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.errors import TransientError
from outwake.worker.process.guarded import Exit
from outwake.worker.secrets import Secrets

REASON = 2000
"""Characters of a reason."""

_EDITORS = frozenset({"Edit", "MultiEdit", "Write", "NotebookEdit"})
"""Tools that change files and do nothing else."""

log = get_logger(__name__)


class Verdict(NamedTuple):
    """What the prompt says. A turn that succeeded has a reason too if there is something to know."""

    status: Literal["succeeded", "failed"] = "succeeded"
    reason: str | None = None


def judge(ended: Exit, summary: AgentSummary, promised: bool, timeout: float, secrets: Secrets) -> Verdict:
    """The verdict of a run. promised: whether a run without a result has failed.

    Raises TransientError if the agent was ended from outside.
    """
    log.info("agent_ended", code=ended.code, cause=ended.cause, left=ended.left, stopped=ended.stopped)
    verdict = _judge(ended, summary, promised, timeout, secrets)
    if not summary.lingered or verdict.status == "failed":
        return verdict
    others = f", with {', '.join(ended.stopped)}" if ended.stopped else ""
    ours = f"the agent did not exit after its result and was ended{others}"
    return Verdict(verdict.status, ours if verdict.reason is None else f"{verdict.reason}; {ours}")


def _judge(ended: Exit, summary: AgentSummary, promised: bool, timeout: float, secrets: Secrets) -> Verdict:
    result = summary.result
    if ended.cause == "timeout":
        return Verdict("failed", f"the agent took longer than {timeout:g} s")
    if ended.cause == "lost":
        return Verdict("failed", "the agent's guardian was killed, and the agent with it")
    if ended.cause != "exited" and not (summary.lingered and ended.cause == "stop"):
        raise TransientError(f"the agent was ended from outside ({ended.cause})")
    if result is not None and result.error is not None:
        return Verdict("failed", f"the agent reported {result.error}"[:REASON])
    if result is not None and result.denied:
        return _denied(result, summary)
    if summary.lingered:
        return Verdict()
    if ended.code != 0:
        how = f"exit status {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
        return Verdict("failed", _with(f"the agent ended with {how}", ended, secrets))
    if result is None and (promised or summary.started):
        seen = f"; it last said {summary.last!r}" if summary.last else ""
        return Verdict("failed", _with(f"the agent ended without a result{seen}", ended, secrets))
    return Verdict()


def _denied(result: Result, summary: AgentSummary) -> Verdict:
    """A turn has failed if no call of any tool succeeded, or every edit of a file was denied."""
    names = set(result.denied)
    listed = ", ".join(sorted(names))[: REASON // 2]
    edits_denied = bool(names & _EDITORS) and not summary.used & _EDITORS
    if not summary.used or edits_denied:
        return Verdict("failed", f"the agent was not allowed to use {listed}")
    times = "once" if len(result.denied) == 1 else f"{len(result.denied)} times"
    return Verdict("succeeded", f"the agent was not allowed to use {listed} ({times})")


def _with(reason: str, ended: Exit, secrets: Secrets) -> str:
    stderr = secrets.last(ended.stderr.strip(), REASON)
    return reason + (f": {stderr}" if stderr else "")

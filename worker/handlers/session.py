"""Topic `session.run`: one turn of a session.

1. Borrow a sandbox and record it in the session, fenced by the attempt: from here on the end of the row,
   whoever brings it about, owes its return (trigger session_follow). One that an earlier attempt held is
   owed its return in the same transaction.
2. Clone the repository, check out the target branch, create the work branch.
3. Run the agent; store each event it prints while it comes, fenced. The agent dies with this worker, and
   at the latest when the lease it was last told of runs out.
4. Save the commits for the session's next turn.
5. In one fenced transaction: the prompt's verdict and the end of the row, with all that follows from it.

An agent that fails is a turn that was carried out: its prompt ends as failed, and nothing is retried. What
hinders the work itself (no such repository, no network) fails the row, for good or until it is retried.
"""

import asyncio
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from outbox.errors import Permanent, Retry
from outbox.handler import Handler, Job, Lease
from outbox.log import get_logger
from outbox.names import InvalidNameError, check_branch, clone_url
from outbox.settings import Settings, load
from worker.agent import Agent
from worker.errors import PermanentError, TransientError
from worker.git import Git
from worker.guarded import Exit
from worker.local import Allocator, LocalAllocator
from worker.messages import Messages, outlast
from worker.metrics import agent_used
from worker.workspace import Workspace, open_workspace

TOPIC = "session.run"

_GRACE = 5.0
"""Seconds an agent has between SIGTERM and SIGKILL."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Turn:
    """What is to be done. Without a prompt only the work branch is prepared."""

    session_id: UUID
    prompt_id: UUID | None
    repo: str
    target_branch: str
    branch: str
    prompt: str | None

    @property
    def run(self) -> UUID:
        """What names the turn's directories."""
        return self.prompt_id or self.session_id


async def run_turn(job: Job) -> None:
    """Carry out one turn. Raises Permanent or Retry when the work itself is hindered."""
    settings = load()
    turn = await _load(job)
    if turn is None:
        return  # archived, or deleted from psql: there is nothing left to work for
    root = Path(settings.workspace_root).absolute()
    await _borrow(job, turn, LocalAllocator(root))
    try:
        async with _workspace(job, turn, settings, root) as workspace:
            log.info("workspace_ready", branch=turn.branch, base=workspace.base)
            result: dict[str, Any] = {"branch": turn.branch, "agent": None}
            verdict: tuple[str, str | None] = ("succeeded", None)
            if turn.prompt is not None:
                verdict, result["agent"] = await _run_agent(job, turn, settings, workspace)
            result["head"] = await workspace.keep()
            result["commits"] = [asdict(commit) for commit in await workspace.commits()]
            await outlast(lambda: _conclude(job, turn, verdict, result))
            log.info("turn_ended", status=verdict[0], reason=verdict[1], head=result["head"])
    except PermanentError as error:
        raise Permanent(str(error)) from error
    except TransientError as error:
        raise Retry(str(error)) from error


async def _load(job: Job) -> Turn | None:
    async with job.connection() as conn:
        cursor = await conn.execute(
            """
            SELECT s.id, p.id, s.repo, s.target_branch, s.branch, p.text
            FROM session AS s
            LEFT JOIN prompt AS p ON p.session_id = s.id AND p.id = %s
            WHERE s.id = %s AND s.session_status = 'active'
            """,
            (job.payload.get("prompt_id"), job.payload["session_id"]),
        )
        row = await cursor.fetchone()
    return None if row is None else Turn(*row)


async def _borrow(job: Job, turn: Turn, allocator: Allocator) -> None:
    sandbox = await allocator.borrow(turn.session_id, turn.run, job.row.attempt)
    async with job.transaction() as conn:
        await conn.execute(
            """
            WITH held AS (
                SELECT id, sandbox FROM session WHERE id = %(session)s FOR NO KEY UPDATE
            ),
            owed AS (
                INSERT INTO outbox (topic, payload, traceparent, max_attempts)
                SELECT 'sandbox.return', jsonb_build_object('session_id', id, 'sandbox', sandbox),
                    %(trace)s, 32767
                FROM held WHERE sandbox IS NOT NULL
            )
            UPDATE session SET sandbox = %(sandbox)s FROM held WHERE session.id = held.id
            """,
            {"session": turn.session_id, "sandbox": Jsonb(sandbox), "trace": job.traceparent},
        )


@asynccontextmanager
async def _workspace(job: Job, turn: Turn, settings: Settings, root: Path) -> AsyncIterator[Workspace]:
    # The API has checked these; a row from psql has not been checked by anybody.
    try:
        url = clone_url(turn.repo, allow_file=settings.allow_file_repos)
        target, branch = check_branch(turn.target_branch), check_branch(turn.branch)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error
    async with open_workspace(
        root,
        session=turn.session_id,
        run=turn.run,
        attempt=job.row.attempt,
        url=url,
        target_branch=target,
        branch=branch,
        git=Git(env={}),
        allow_file=settings.allow_file_repos,
    ) as workspace:
        yield workspace


async def _run_agent(
    job: Job, turn: Turn, settings: Settings, workspace: Workspace
) -> tuple[tuple[str, str | None], dict[str, Any] | None]:
    """Run the agent to its end. Returns the verdict and its `result` event, if it printed one."""
    assert turn.prompt is not None
    assert turn.prompt_id is not None
    argv = [*shlex.split(settings.agent_command), turn.prompt]
    result: dict[str, Any] | None = None
    async with (
        Messages(job, turn.session_id, turn.prompt_id) as messages,
        Agent.start(
            argv,
            cwd=workspace.path,
            env={},
            deadline=_until(job.lease),
            grace=_GRACE,
            timeout=settings.agent_timeout,
        ) as agent,
    ):
        log.info("agent_started")
        keeping = asyncio.create_task(_keep_alive(agent, job.lease))
        try:
            async for batch in agent.lines():
                for event in batch:
                    result = event if event.get("type") == "result" else result
                await messages.put(batch)
            ended = await agent.wait()
        finally:
            keeping.cancel()
            if result is not None:
                agent_used(result)
    return _judge(ended, result, settings), result


async def _keep_alive(agent: Agent, lease: Lease) -> None:
    """Tell the agent's guardian of each extension of the lease."""
    while True:
        agent.extend(_until(lease))
        await lease.extended()


def _until(lease: Lease) -> float:
    return time.monotonic() + lease.remaining()


def _judge(ended: Exit, result: dict[str, Any] | None, settings: Settings) -> tuple[str, str | None]:
    """succeeded or failed, with the reason. Raises TransientError if the agent was not to blame."""
    log.info("agent_ended", code=ended.code, cause=ended.cause, left=ended.left)
    match ended.cause:
        case "timeout":
            return "failed", f"the agent took longer than {settings.agent_timeout:g} s"
        case "exited":
            pass
        case _:
            raise TransientError(f"the agent was ended from outside ({ended.cause})")
    stderr = ended.stderr.strip()[-2000:]
    if ended.code != 0:
        how = f"exit status {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
        return "failed", f"the agent ended with {how}" + (f": {stderr}" if stderr else "")
    if result is not None and result.get("is_error"):
        return "failed", f"the agent reported {result.get('subtype', 'an error')}"
    return "succeeded", None


async def _conclude(job: Job, turn: Turn, verdict: tuple[str, str | None], result: dict[str, Any]) -> None:
    async with job.transaction() as conn:
        await conn.execute(
            """
            UPDATE prompt
            SET status = %s, reason = %s, result = %s, finished_at = clock_timestamp()
            WHERE id = %s
            """,
            (*verdict, Jsonb(result), turn.prompt_id),
        )
        await job.complete(conn)


handler = Handler(TOPIC, run_turn)

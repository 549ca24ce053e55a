"""Topic `session.run`: one turn of a session.

1. Check what needs no sandbox: the names of repository and branches, its host, the credentials.
2. Borrow a sandbox (worker/sandboxes/lending.py), of the kind that is configured. From now on the row's end,
   whatever its cause, schedules the sandbox's return.
3. Clone the repository into it, check out the target branch, create the work branch (repo/workspace.py).
4. Run the agent and store each event when it is printed, fenced. The agent ends with this worker. It ends at
   the latest when the last lease that its guardian knows of expires.
5. Save the commits for the session's next turn, and push them if that is configured.
6. In one fenced transaction, store the prompt's outcome and the state for the next turn, write the row that
   opens a pull request if one is to be opened, and end the row.

If the agent fails, the turn was still carried out: its prompt ends as failed, and nothing is retried. If
something prevents the work itself (no such repository, no network), the row fails, permanently or with a
retry.
"""

import asyncio
import os
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.session.names import InvalidNameError, check_branch
from outwake.settings import Settings, load
from outwake.telemetry.log import get_logger
from outwake.worker.agents.base import AgentAdapter, AgentTurn, Box, Memory
from outwake.worker.agents.kinds import adapter_for, program_problem
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.agents.turn import run_agent
from outwake.worker.agents.verdict import REASON, Verdict
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.handlers.pull_request import propose
from outwake.worker.messages import answer_soon, retry_until_available
from outwake.worker.repo.credentials import load_credentials, secrets_in
from outwake.worker.repo.githost import host_of
from outwake.worker.repo.hosts import Remote, remote_of
from outwake.worker.repo.workspace import Saved, Workspace, open_workspace
from outwake.worker.sandboxes.base import Sandbox
from outwake.worker.sandboxes.choice import provider, provider_of
from outwake.worker.sandboxes.lending import borrow
from outwake.worker.sandboxes.places import agent_directory, own_directory
from outwake.worker.secrets import Secrets

TOPIC = "session.run"

_LOAD = in_schema("""
SELECT s.id, p.id, s.user_id, s.repo, s.target_branch, s.branch, p.text,
    m.agent_session, m.transcript, m.bundle
FROM :schema.session AS s
LEFT JOIN :schema.prompt AS p ON p.session_id = s.id AND p.id = %s
LEFT JOIN :schema.session_memory AS m ON m.session_id = s.id
WHERE s.id = %s AND s.session_status = 'active'
""")
_JUDGE = in_schema("""
UPDATE :schema.prompt
SET status = %s, reason = %s, result = %s, finished_at = clock_timestamp()
WHERE id = %s
""")
_REMEMBER = in_schema("""
INSERT INTO :schema.session_memory AS m (session_id, agent_session, transcript, bundle)
VALUES (%s, %s, %s, %s)
ON CONFLICT (session_id) DO UPDATE
SET agent_session = coalesce(excluded.agent_session, m.agent_session),
    transcript = coalesce(excluded.transcript, m.transcript),
    bundle = excluded.bundle, updated_at = clock_timestamp()
""")

log = get_logger(__name__)


@dataclass(frozen=True)
class Turn:
    """The work to do. Without a prompt only the work branch is prepared."""

    session_id: UUID
    prompt_id: UUID | None
    user_id: str
    repo: str
    target_branch: str
    branch: str
    prompt: str | None = field(repr=False)
    agent_session: str | None
    transcript: bytes | None = field(repr=False)
    bundle: bytes | None = field(repr=False)

    @property
    def run(self) -> UUID:
        """The id that names the turn's directories."""
        return self.prompt_id or self.session_id

    @property
    def memory(self) -> Memory | None:
        """The state from which the agent resumes, if an earlier turn left it."""
        if self.agent_session is None or self.transcript is None:
            return None
        return Memory(self.agent_session, self.transcript)


async def run_turn(job: Job) -> None:
    """Carry out one turn. Raises Permanent or Retry when something prevents the work itself."""
    settings = load()
    answer_soon(job)
    turn = await _load(job)
    if turn is None:
        return  # archived, or deleted from psql: there is nothing to do
    secrets = Secrets.of_environment() | settings.secrets
    try:
        credentials = load_credentials(settings.git_credentials, turn.user_id)
        secrets |= secrets_in(credentials)
        remote = await _remote(turn, settings, credentials)
        held, used = await borrow(job, turn.session_id, turn.run, provider(settings))
        place = agent_directory(
            Path(settings.workspace_root).absolute(), turn.session_id, turn.run, job.row.attempt
        )
        async with provider_of(held, settings).connect(held) as sandbox, own_directory(place):
            workspace = await open_workspace(
                sandbox,
                remote,
                target_branch=turn.target_branch,
                branch=turn.branch,
                bundle=turn.bundle,
                used=used,
            )
            await _work(job, turn, settings, sandbox, workspace, place, secrets)
    except PermanentError as error:
        raise Permanent(secrets.text(str(error))) from None
    except TransientError as error:
        raise Retry(secrets.text(str(error))) from None


async def _work(
    job: Job,
    turn: Turn,
    settings: Settings,
    sandbox: Sandbox,
    workspace: Workspace,
    place: Path,
    secrets: Secrets,
) -> None:
    log.info("workspace_ready", branch=turn.branch, base=workspace.base)
    verdict, summary = Verdict(), AgentSummary()
    box = Box(workspace.path, place, sandbox.mcp_config())
    adapter = adapter_for(settings, box)
    if turn.prompt is not None:
        assert turn.prompt_id is not None
        ids = (turn.session_id, turn.prompt_id)
        asked = AgentTurn(turn.prompt, turn.branch, turn.memory)
        verdict, summary = await run_agent(job, ids, adapter, asked, box, sandbox, settings, secrets)
    # Nothing that goes wrong from here on may run the agent again.
    kept = await workspace.save()
    memory, problem = await asyncio.to_thread(_remember, adapter, summary, box)
    verdict = _with_losses(verdict, [secrets.text(text) for text in (*kept.lost, *problem)])
    result = {"branch": turn.branch, **summary.as_json()}
    result["head"] = kept.head or workspace.base
    result["pushed"] = kept.pushed
    result["commits"] = [asdict(commit) for commit in kept.commits]
    result["notes"] = [secrets.text(text) for text in kept.notes]
    try:
        await retry_until_available(lambda: _conclude(job, turn, verdict, result, memory, kept))
    except (psycopg.DataError, ValueError) as error:
        log.exception("result_not_stored")
        verdict = _with_losses(verdict, [f"the result could not be stored: {type(error).__name__}"])
        bare = {"branch": turn.branch, "head": result["head"]}
        await retry_until_available(lambda: _conclude(job, turn, verdict, bare, memory, kept))
    log.info("turn_ended", status=verdict.status, reason=verdict.reason, head=result["head"])


def _remember(adapter: AgentAdapter, summary: AgentSummary, box: Box) -> tuple[Memory | None, list[str]]:
    """What the agent is to remember, and whether that could not be read."""
    if not summary.session or box.home is None:
        return None, []
    try:
        content = adapter.memory(box.home)
    except (OSError, ValueError, tarfile.TarError) as error:
        return None, [f"the agent's memory of the conversation could not be read: {type(error).__name__}"]
    return (None if content is None else Memory(summary.session, content)), []


def _with_losses(verdict: Verdict, lost: list[str]) -> Verdict:
    """The verdict, which also says what of the work could not be kept."""
    if not lost:
        return verdict
    said = [verdict.reason[: REASON // 2]] if verdict.reason else []
    return Verdict("failed", "; ".join([*said, *lost])[:REASON])


async def _load(job: Job) -> Turn | None:
    payload = job.payload if isinstance(job.payload, dict) else {}
    session_id, prompt_id = payload.get("session_id"), payload.get("prompt_id")
    try:
        async with job.connection() as conn:
            cursor = await conn.execute(
                _LOAD,
                (None if prompt_id is None else str(prompt_id), str(session_id)),
                prepare=False,  # a plan made while the tables were empty would scan them completely
            )
            row = await cursor.fetchone()
    except psycopg.DataError as error:  # a row from psql may hold any payload
        raise Permanent(f"the payload names no session: {error}") from None
    return None if row is None else Turn(*row)


async def _remote(turn: Turn, settings: Settings, credentials: bytes | None) -> Remote:
    """The repository. The API checks the names, but a row from psql is unchecked."""
    try:
        check_branch(turn.target_branch)
        check_branch(turn.branch)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error
    return await remote_of(turn.repo, settings, credentials)


async def _conclude(
    job: Job,
    turn: Turn,
    verdict: Verdict,
    result: dict[str, Any],
    memory: Memory | None,
    kept: Saved,
) -> None:
    settings = load()
    async with job.transaction() as conn:
        await conn.execute(
            _JUDGE,
            (*verdict, Jsonb(result), turn.prompt_id),
            prepare=False,  # as in `_load`
        )
        if memory or kept.bundle or turn.agent_session or turn.bundle:
            await conn.execute(
                _REMEMBER,
                (
                    turn.session_id,
                    memory and memory.session,
                    memory and memory.content,
                    kept.bundle,
                ),
            )
        if settings.pull_requests != "off" and _to_propose(job, turn, kept, settings):
            await propose(conn, turn.session_id, settings.pull_requests == "draft", job.traceparent)
        await job.complete(conn)


def _to_propose(job: Job, turn: Turn, kept: Saved, settings: Settings) -> bool:
    """Whether the turn pushed commits to a host that has pull requests. An attempt before this one may have
    pushed them and died.
    """
    return (
        kept.pushed
        and (bool(kept.commits) or job.row.attempt > 1)
        and host_of(turn.repo, settings).kind != "plain"
    )


def problem() -> str | None:
    """Why this host cannot work on sessions: there is no such agent, or no such file of credentials."""
    settings = load()
    if (found := program_problem(settings.agent_command)) is not None:
        return f"OUTWAKE_AGENT_COMMAND: {found}"
    path = settings.git_credentials
    if path is not None and not os.access(path, os.R_OK):
        return "OUTWAKE_GIT_CREDENTIALS: there is no such file or directory that can be read"
    return None


handler = Handler(TOPIC, run_turn, line="session", built_in=True, check=problem)

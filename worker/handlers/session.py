"""Topic `session.run`: one turn of a session.

1. Borrow a sandbox (worker/sandboxes/lending.py). With IP_ALLOCATOR_URL it is a real one, else a directory
   on this host. From now on the row's end, whatever its cause, schedules the sandbox's return.
2. Clone the repository into it, check out the target branch, create the work branch.
3. Run the agent and store each event when it is printed, fenced. The agent ends with this worker. It ends at
   the latest when the last lease that its guardian knows of expires.
4. Save the commits for the session's next turn.
5. In one fenced transaction, store the prompt's outcome and the state for the next turn, and end the row.

If the agent fails, the turn was still carried out: its prompt ends as failed, and nothing is retried. If
something prevents the work itself (no such repository, no network), the row fails, permanently or with a
retry.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg import DataError
from psycopg.types.json import Jsonb

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.session.names import InvalidNameError, check_branch, clone_url
from outwake.settings import Settings, load
from outwake.telemetry.log import get_logger
from outwake.worker.agents.base import AgentTurn, Box, Memory
from outwake.worker.agents.kinds import adapter_for
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.agents.turn import run_agent
from outwake.worker.agents.verdict import Verdict
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.messages import outlast
from outwake.worker.repo.credentials import load_credentials, secrets_in
from outwake.worker.repo.git import Git
from outwake.worker.repo.remote import Remote, RemoteWorkspace, open_remote
from outwake.worker.repo.workspace import Workspace, open_workspace, own_directory
from outwake.worker.sandboxes.aio import Sandbox as Client
from outwake.worker.sandboxes.allocator import allocator
from outwake.worker.sandboxes.directory import Sandbox
from outwake.worker.sandboxes.lending import borrow
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


@dataclass
class Stage:
    """The place of a turn's work, and what its agent must know of it."""

    workspace: Workspace | RemoteWorkspace
    box: Box


async def run_turn(job: Job) -> None:
    """Carry out one turn. Raises Permanent or Retry when something prevents the work itself."""
    settings = load()
    turn = await _load(job)
    if turn is None:
        return  # archived, or deleted from psql: there is nothing to do
    secrets = Secrets.of_environment() | settings.secrets
    try:
        credentials = load_credentials(settings.git_credentials, turn.user_id)
        secrets |= secrets_in(credentials)
        sandbox, used = await borrow(job, turn.session_id, turn.run, allocator(settings))
        if settings.ip_allocator_url is None:
            staged = _on_this_host(job, turn, settings)
        else:
            staged = _in_sandbox(job, turn, settings, sandbox, used, credentials)
        async with staged as stage:
            await _work(job, turn, settings, stage, secrets)
    except PermanentError as error:
        raise Permanent(secrets.text(str(error))) from None
    except TransientError as error:
        raise Retry(secrets.text(str(error))) from None


async def _work(job: Job, turn: Turn, settings: Settings, stage: Stage, secrets: Secrets) -> None:
    workspace = stage.workspace
    log.info("workspace_ready", branch=turn.branch, base=workspace.base)
    verdict, summary = Verdict(), AgentSummary()
    adapter = adapter_for(settings)
    if turn.prompt is not None:
        assert turn.prompt_id is not None
        ids = (turn.session_id, turn.prompt_id)
        asked = AgentTurn(turn.prompt, turn.branch, turn.memory)
        verdict, summary = await run_agent(job, ids, adapter, asked, stage.box, settings, secrets)
    result = {"branch": turn.branch, **summary.as_json()}
    result["head"] = await workspace.keep()
    result["commits"] = [asdict(commit) for commit in await workspace.commits()]
    bundle = None
    if isinstance(workspace, RemoteWorkspace):
        bundle = workspace.bundle
        if workspace.problem and verdict.status == "succeeded":
            verdict = Verdict("failed", secrets.text(workspace.problem))
    memory = None
    if summary.session and stage.box.home:
        content = await asyncio.to_thread(adapter.memory, stage.box.home)
        memory = None if content is None else Memory(summary.session, content)
    await outlast(lambda: _conclude(job, turn, verdict, result, memory, bundle))
    log.info("turn_ended", status=verdict.status, reason=verdict.reason, head=result["head"])


async def _load(job: Job) -> Turn | None:
    session_id, prompt_id = job.payload.get("session_id"), job.payload.get("prompt_id")
    try:
        async with job.connection() as conn:
            cursor = await conn.execute(
                _LOAD,
                (None if prompt_id is None else str(prompt_id), str(session_id)),
                prepare=False,  # a plan made while the tables were empty would scan them completely
            )
            row = await cursor.fetchone()
    except DataError as error:  # a row from psql may hold any payload
        raise Permanent(f"the payload names no session: {error}") from None
    return None if row is None else Turn(*row)


def _names(turn: Turn, settings: Settings) -> tuple[str, str, str]:
    """URL, target branch and work branch. The API checks them, but a row from psql is unchecked."""
    try:
        url = clone_url(turn.repo, allow_file=settings.allow_file_repos)
        return url, check_branch(turn.target_branch), check_branch(turn.branch)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error


@asynccontextmanager
async def _on_this_host(job: Job, turn: Turn, settings: Settings) -> AsyncIterator[Stage]:
    """The embedded form: the sandbox is a workspace directory, and the agent runs in it."""
    url, target, branch = _names(turn, settings)
    async with open_workspace(
        Path(settings.workspace_root).absolute(),
        session=turn.session_id,
        run=turn.run,
        attempt=job.row.attempt,
        url=url,
        target_branch=target,
        branch=branch,
        git=Git(env={}),
        allow_file=settings.allow_file_repos,
    ) as workspace:
        yield Stage(workspace, Box(tree=str(workspace.path)))


@asynccontextmanager
async def _in_sandbox(
    job: Job, turn: Turn, settings: Settings, sandbox: Sandbox, used: bool, credentials: bytes | None
) -> AsyncIterator[Stage]:
    """The production form: the work tree is in the sandbox, the agent runs here and reaches it by MCP."""
    url, target, branch = _names(turn, settings)
    remote = Remote(url, settings.git_push, settings.allow_file_repos, credentials)
    item = sandbox["item"]
    root = Path(settings.workspace_root).absolute()
    async with (
        Client.connect(item) as client,
        own_directory(root, turn.session_id, turn.run, job.row.attempt) as place,
    ):
        workspace = await open_remote(
            client, remote, target_branch=target, branch=branch, bundle=turn.bundle, used=used
        )
        yield Stage(workspace, Box(workspace.path, place, item.get("mcp_json_string")))


async def _conclude(
    job: Job,
    turn: Turn,
    verdict: Verdict,
    result: dict[str, Any],
    memory: Memory | None,
    bundle: bytes | None,
) -> None:
    async with job.transaction() as conn:
        await conn.execute(
            _JUDGE,
            (*verdict, Jsonb(result), turn.prompt_id),
            prepare=False,  # as in `_load`
        )
        if memory or bundle or turn.agent_session or turn.bundle:
            await conn.execute(
                _REMEMBER,
                (
                    turn.session_id,
                    memory and memory.session,
                    memory and memory.content,
                    bundle,
                ),
            )
        await job.complete(conn)


handler = Handler(TOPIC, run_turn, line="session", built_in=True)

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
import shlex
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg import DataError
from psycopg.types.json import Jsonb

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job, Lease
from outwake.schema import in_schema
from outwake.session.names import InvalidNameError, check_branch, clone_url
from outwake.settings import Settings, load
from outwake.telemetry.log import get_logger
from outwake.worker.agents.claude import (
    Command,
    Transcript,
    prepare,
    pull_request,
    take_transcript,
    unreached,
)
from outwake.worker.agents.run import Agent
from outwake.worker.agents.stream import Event
from outwake.worker.engine.metrics import agent_used
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.messages import Messages, outlast
from outwake.worker.process.guarded import Exit
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

_SYSTEM = """\
You work in a remote sandbox. Its files and its shell are reached only through the MCP tools you are given. \
The repository's work tree is at {path} there, with the branch {branch} checked out. \
Commit your work on that branch; do not switch to another and do not push."""

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

_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for an agent."""

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


@dataclass
class Stage:
    """The place of a turn's work, and the agent that does it.

    command: makes the command that starts the agent for a prompt. transcript: returns the transcript from
    which the next turn resumes.
    """

    workspace: Workspace | RemoteWorkspace
    command: Callable[[str], Command]
    transcript: Callable[[str], Transcript | None] = lambda _: None


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
    said = Said()
    verdict: tuple[str, str | None] = ("succeeded", None)
    if turn.prompt is not None:
        command = await asyncio.to_thread(stage.command, turn.prompt)
        ended = await _run_agent(job, turn, settings, command, secrets, said)
        verdict = _judge(ended, said.result, settings, secrets)
    result: dict[str, Any] = {"branch": turn.branch, "agent": said.result, "pull_request": said.pull_request}
    result["head"] = await workspace.keep()
    result["commits"] = [asdict(commit) for commit in await workspace.commits()]
    bundle = None
    if isinstance(workspace, RemoteWorkspace):
        bundle = workspace.bundle
        if workspace.problem and verdict[0] == "succeeded":
            verdict = ("failed", secrets.text(workspace.problem))
    transcript = await asyncio.to_thread(stage.transcript, said.session) if said.session else None
    await outlast(lambda: _conclude(job, turn, verdict, result, transcript, bundle))
    log.info("turn_ended", status=verdict[0], reason=verdict[1], head=result["head"])


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

        def command(prompt: str) -> Command:
            return Command([*shlex.split(settings.agent_command), prompt], workspace.path, {})

        yield Stage(workspace, command)


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
        resumed = None
        if turn.agent_session is not None and turn.transcript is not None:
            resumed = Transcript(turn.agent_session, turn.transcript)

        def command(prompt: str) -> Command:
            system = _SYSTEM.format(path=workspace.path, branch=branch)
            return prepare(settings, place, item, prompt, system, resumed)

        yield Stage(workspace, command, lambda session: take_transcript(place, session))


@dataclass
class Said:
    """The parts of an agent's output that are stored at the end of the turn."""

    session: str | None = None
    result: Event | None = None
    pull_request: str | None = None

    def hear(self, event: Event) -> None:
        if isinstance(session := event.get("session_id"), str):
            self.session = session
        if event.get("type") == "result":
            self.result = event
        self.pull_request = pull_request(event) or self.pull_request


async def _run_agent(
    job: Job, turn: Turn, settings: Settings, command: Command, secrets: Secrets, said: Said
) -> Exit:
    """Run the agent to its end."""
    assert turn.prompt_id is not None
    async with (
        Messages(job, turn.session_id, turn.prompt_id) as messages,
        Agent.start(
            command.argv,
            cwd=command.cwd,
            env=command.env,
            deadline=_until(job.lease),
            grace=_GRACE,
            timeout=settings.agent_timeout,
        ) as agent,
    ):
        log.info("agent_started")
        keeping = asyncio.create_task(_keep_alive(agent, job.lease))
        try:
            async for batch in agent.lines():
                hidden = [secrets.event(event) for event in batch]
                for event in hidden:
                    said.hear(event)
                    if missing := unreached(event, command.servers):
                        raise TransientError(f"the agent can't reach the sandbox's MCP server {missing[0]}")
                await messages.put(hidden)
            return await agent.wait()
        finally:
            keeping.cancel()
            if said.result is not None:
                agent_used(said.result)


async def _keep_alive(agent: Agent, lease: Lease) -> None:
    """Pass each extension of the lease to the agent's guardian."""
    while True:
        agent.extend(_until(lease))
        await lease.extended()


def _until(lease: Lease) -> float:
    return time.monotonic() + lease.remaining()


def _judge(ended: Exit, result: Event | None, settings: Settings, secrets: Secrets) -> tuple[str, str | None]:
    """succeeded or failed, with the reason. Raises TransientError if the agent was ended from outside."""
    log.info("agent_ended", code=ended.code, cause=ended.cause, left=ended.left)
    match ended.cause:
        case "timeout":
            return "failed", f"the agent took longer than {settings.agent_timeout:g} s"
        case "exited":
            pass
        case _:
            raise TransientError(f"the agent was ended from outside ({ended.cause})")
    if result is not None and result.get("is_error"):
        words = result.get("result") or result.get("subtype") or "an error"
        return "failed", f"the agent reported {words}"[:2000]
    stderr = secrets.text(ended.stderr.strip())[-2000:]
    if ended.code != 0:
        how = f"exit status {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
        return "failed", f"the agent ended with {how}" + (f": {stderr}" if stderr else "")
    return "succeeded", None


async def _conclude(
    job: Job,
    turn: Turn,
    verdict: tuple[str, str | None],
    result: dict[str, Any],
    transcript: Transcript | None,
    bundle: bytes | None,
) -> None:
    async with job.transaction() as conn:
        await conn.execute(
            _JUDGE,
            (*verdict, Jsonb(result), turn.prompt_id),
            prepare=False,  # as in `_load`
        )
        if transcript or bundle or turn.agent_session or turn.bundle:
            await conn.execute(
                _REMEMBER,
                (
                    turn.session_id,
                    transcript and transcript.session,
                    transcript and transcript.archive,
                    bundle,
                ),
            )
        await job.complete(conn)


handler = Handler(TOPIC, run_turn, line="session", built_in=True)

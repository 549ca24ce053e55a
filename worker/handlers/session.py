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

import os
import tarfile
from dataclasses import asdict
from pathlib import Path

import psycopg

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job
from outwake.session.names import InvalidNameError, check_branch
from outwake.settings import Settings, load
from outwake.telemetry.log import get_logger
from outwake.worker.agents.base import AgentAdapter, AgentTurn, Memory
from outwake.worker.agents.kinds import adapter_for, agent_problem
from outwake.worker.agents.place import AgentPlace, place_of
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.agents.turn import run_agent
from outwake.worker.agents.verdict import REASON, Verdict
from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.handlers.turn_rows import Turn, conclude, load_turn
from outwake.worker.messages import answer_soon, retry_until_available
from outwake.worker.repo.credentials import load_credentials, secrets_in
from outwake.worker.repo.hosts import Remote, remote_of
from outwake.worker.repo.workspace import Workspace, open_workspace
from outwake.worker.sandboxes.base import Sandbox, StepError
from outwake.worker.sandboxes.choice import provider, provider_of
from outwake.worker.sandboxes.lending import borrow
from outwake.worker.sandboxes.places import agent_directory, own_directory
from outwake.worker.secrets import Secrets

TOPIC = "session.run"

log = get_logger(__name__)


async def run_turn(job: Job) -> None:
    """Carry out one turn. Raises Permanent or Retry when something prevents the work itself."""
    settings = load()
    answer_soon(job)
    turn = await load_turn(job)
    if turn is None:
        return  # archived, or deleted from psql: there is nothing to do
    secrets = Secrets.of_environment() | settings.secrets
    try:
        credentials = load_credentials(settings.git_credentials, turn.user_id)
        secrets |= secrets_in(credentials)
        remote = await _remote(turn, settings, credentials)
        held, used = await borrow(job, turn.session_id, turn.run, provider(settings))
        directory = agent_directory(
            Path(settings.workspace_root).absolute(), turn.session_id, turn.run, job.row.attempt
        )
        async with provider_of(held, settings).connect(held) as sandbox, own_directory(directory):
            workspace = await open_workspace(
                sandbox,
                remote,
                target_branch=turn.target_branch,
                branch=turn.branch,
                bundle=turn.bundle,
                used=used,
            )
            await _work(job, turn, settings, sandbox, workspace, directory, secrets)
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
    directory: Path,
    secrets: Secrets,
) -> None:
    log.info("workspace_ready", branch=turn.branch, base=workspace.base)
    verdict, summary = Verdict(), AgentSummary()
    place = place_of(sandbox, workspace.path, directory)
    adapter = adapter_for(settings, by_mcp=place.box.mcp_config is not None)
    if turn.prompt is not None:
        assert turn.prompt_id is not None
        ids = (turn.session_id, turn.prompt_id)
        asked = AgentTurn(turn.prompt, turn.branch, _remembered(adapter, turn))
        verdict, summary = await run_agent(job, ids, adapter, asked, place, settings, secrets)
    # Nothing that goes wrong from here on may run the agent again.
    kept = await workspace.save()
    memory, problem = await _remember(adapter, summary, place)
    verdict = _with_losses(verdict, [secrets.text(text) for text in (*kept.lost, *problem)])
    result = {"branch": turn.branch, **summary.as_json()}
    result["head"] = kept.head or workspace.base
    result["pushed"] = kept.pushed
    result["commits"] = [asdict(commit) for commit in kept.commits]
    result["notes"] = [secrets.text(text) for text in kept.notes]
    try:
        await retry_until_available(lambda: conclude(job, turn, verdict, result, memory, kept))
    except (psycopg.DataError, ValueError) as error:
        log.exception("result_not_stored")
        verdict = _with_losses(verdict, [f"the result could not be stored: {type(error).__name__}"])
        bare = {"branch": turn.branch, "head": result["head"]}
        await retry_until_available(lambda: conclude(job, turn, verdict, bare, memory, kept))
    log.info("turn_ended", status=verdict.status, reason=verdict.reason, head=result["head"])


def _remembered(adapter: AgentAdapter, turn: Turn) -> Memory | None:
    """The memory of the session's earlier turns, if this kind of agent left it: another cannot read it."""
    if turn.memory is None or turn.memory.agent == adapter.name:
        return turn.memory
    log.info("memory_of_another_agent", left_by=turn.memory.agent, agent=adapter.name)
    return None


async def _remember(
    adapter: AgentAdapter, summary: AgentSummary, place: AgentPlace
) -> tuple[Memory | None, list[str]]:
    """What the agent is to remember, and whether that could not be read."""
    if not summary.session or adapter.remembers is None:
        return None, []
    try:
        content = await place.memory(adapter.remembers)
    except (OSError, ValueError, tarfile.TarError, SessionError, StepError) as error:
        return None, [f"the agent's memory of the conversation could not be read: {type(error).__name__}"]
    return (None if content is None else Memory(adapter.name, summary.session, content)), []


def _with_losses(verdict: Verdict, lost: list[str]) -> Verdict:
    """The verdict, which also says what of the work could not be kept."""
    if not lost:
        return verdict
    said = [verdict.reason[: REASON // 2]] if verdict.reason else []
    return Verdict("failed", "; ".join([*said, *lost])[:REASON])


async def _remote(turn: Turn, settings: Settings, credentials: bytes | None) -> Remote:
    """The repository. The API checks the names, but a row from psql is unchecked."""
    try:
        check_branch(turn.target_branch)
        check_branch(turn.branch)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error
    return await remote_of(turn.repo, settings, credentials)


def problem() -> str | None:
    """Why this host cannot work on sessions: there is no such agent, or no such file of credentials."""
    settings = load()
    if (found := agent_problem(settings)) is not None:
        return found
    path = settings.git_credentials
    if path is not None and not os.access(path, os.R_OK):
        return "OUTWAKE_GIT_CREDENTIALS: there is no such file or directory that can be read"
    return None


handler = Handler(TOPIC, run_turn, line="session", built_in=True, check=problem)

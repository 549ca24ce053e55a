"""What a turn of a session reads from the database when it begins, and writes when it ends."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from outwake.errors import Permanent
from outwake.handler import Connection, Job
from outwake.installed import has_column
from outwake.schema import in_schema
from outwake.settings import Settings, load
from outwake.worker.agents.base import Memory
from outwake.worker.agents.verdict import Verdict
from outwake.worker.handlers.pull_request import propose
from outwake.worker.repo.githost import host_of
from outwake.worker.repo.workspace import Saved

_LOAD = in_schema("""
SELECT s.id, p.id, s.user_id, s.repo, s.target_branch, s.branch, p.text,
    {agent}, m.agent_session, m.transcript, m.bundle
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

_OF_AGENT = in_schema("UPDATE :schema.session_memory SET agent = %s WHERE session_id = %s")


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
    agent: str
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
        return Memory(self.agent, self.agent_session, self.transcript)


async def load_turn(job: Job) -> Turn | None:
    """The turn that the row asks for; None if its session is archived or was deleted.

    Raises Permanent if the payload names no session.
    """
    payload = job.payload if isinstance(job.payload, dict) else {}
    session_id, prompt_id = payload.get("session_id"), payload.get("prompt_id")
    try:
        async with job.connection() as conn:
            agent = "coalesce(m.agent, 'claude')" if await _stores_agent(conn) else "'claude'"
            cursor = await conn.execute(
                _LOAD.format(agent=agent).encode(),
                (None if prompt_id is None else str(prompt_id), str(session_id)),
                prepare=False,  # a plan made while the tables were empty would scan them completely
            )
            row = await cursor.fetchone()
    except psycopg.DataError as error:  # a row from psql may hold any payload
        raise Permanent(f"the payload names no session: {error}") from None
    return None if row is None else Turn(*row)


async def conclude(
    job: Job,
    turn: Turn,
    verdict: Verdict,
    result: dict[str, Any],
    memory: Memory | None,
    kept: Saved,
) -> None:
    """Store how the turn ended and what the next one goes on from, and end the row: one fenced transaction.

    memory: None keeps the one before. Raises psycopg.DataError or ValueError if the result cannot be stored.
    """
    settings = load()
    async with job.transaction() as conn:
        await conn.execute(
            _JUDGE,
            (*verdict, Jsonb(result), turn.prompt_id),
            prepare=False,  # as in `load_turn`
        )
        stores_agent = memory is not None and await _stores_agent(conn)
        if memory is not None and memory.agent != "claude" and not stores_agent:
            memory = None
        if memory or kept.bundle or turn.agent_session or turn.bundle:
            await conn.execute(
                _REMEMBER,
                (turn.session_id, memory and memory.session, memory and memory.content, kept.bundle),
            )
        if memory is not None and stores_agent:
            await conn.execute(_OF_AGENT, (memory.agent, turn.session_id))
        if settings.pull_requests != "off" and _to_propose(job, turn, kept, settings):
            await propose(conn, turn.session_id, settings.pull_requests == "draft", job.traceparent)
        await job.complete(conn)


async def _stores_agent(conn: Connection) -> bool:
    """Whether the migration session/0005 is done. Before it only Claude's memory is stored."""
    return await has_column(conn, "session_memory", "agent")


def _to_propose(job: Job, turn: Turn, kept: Saved, settings: Settings) -> bool:
    """Whether the turn pushed commits to a host that has pull requests. An attempt before this one may have
    pushed them and died.
    """
    return (
        kept.pushed
        and (bool(kept.commits) or job.row.attempt > 1)
        and host_of(turn.repo, settings).kind != "plain"
    )

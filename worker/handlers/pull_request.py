"""Topic `pull_request.open`: opens the pull request of a session's work branch.

1. The transaction that ends a turn which pushed commits writes the row (`propose`), unless the session has a
   pull request. Its unique_key is the session's, so of several turns there is one unfinished row.
2. The handler asks the host (worker/repo/githost.py). If it dies after the host has opened the pull request,
   the next attempt finds it there and takes it.
3. What came of it is stored in session.pull_request: its address in the transaction that ends the row, or why
   an attempt failed. A row that is dead leaves the reason, and the next turn that pushes writes another row.

The row is tried again by itself: neither agent nor push are repeated.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from outwake._enqueue import enqueue
from outwake.errors import Permanent, Retry
from outwake.handler import Connection, Handler, Job
from outwake.schema import in_schema
from outwake.session.names import TITLE_LENGTH, clone_url
from outwake.settings import load
from outwake.telemetry.log import get_logger
from outwake.worker.errors import SessionError, TransientError
from outwake.worker.handlers.backoff import backoff
from outwake.worker.repo.credentials import load_credentials, secrets_in
from outwake.worker.repo.githost import Proposal, host_of
from outwake.worker.secrets import Secrets

TOPIC = "pull_request.open"

TRIES = 15  # 3 to 6 hours
FIRST_PAUSE, LAST_PAUSE = 5.0, 3600.0  # seconds
REASON = 500  # characters of a reason

# By to_jsonb, because the schema of the version before has no such column.
_HAS_ONE = in_schema(
    "SELECT to_jsonb(s) #>> '{pull_request,url}' IS NOT NULL FROM :schema.session AS s WHERE s.id = %s"
)
_LOAD = in_schema("""
SELECT s.id, s.user_id, s.repo, s.target_branch, s.branch, s.title, (
    SELECT left(p.text, 2000) FROM :schema.prompt AS p
    WHERE p.session_id = s.id ORDER BY p.created_at, p.id LIMIT 1)
FROM :schema.session AS s
WHERE s.id = %s AND s.session_status = 'active' AND s.pull_request ->> 'url' IS NULL
""")
_STORE = in_schema(
    "UPDATE :schema.session SET pull_request = %s, updated_at = clock_timestamp() WHERE id = %s"
)

log = get_logger(__name__)


@dataclass(frozen=True)
class Work:
    """A session's branch, which is pushed."""

    session_id: UUID
    user_id: str
    repo: str
    target_branch: str
    branch: str
    title: str
    prompt: str | None = field(repr=False)

    @property
    def name(self) -> str:
        """The pull request's title: the first line of the first prompt that has words, without controls."""
        lines = ("".join(filter(str.isprintable, line)).strip() for line in (self.prompt or "").split("\n"))
        name = next(filter(None, lines), self.title)
        return name if len(name) <= TITLE_LENGTH else f"{name[: TITLE_LENGTH - 1]}…"

    def body(self, public_url: str | None) -> str:
        """No word of the agent's: only where to read about it."""
        place = f"{public_url}/ui/sessions/{self.session_id}" if public_url else str(self.session_id)
        return f"Outwake session {place}\n"


async def propose(conn: Connection, session_id: UUID, draft: bool, traceparent: str | None) -> None:
    """Write the row that opens the session's pull request, unless it has one or such a row is unfinished."""
    cursor = await conn.execute(_HAS_ONE, (session_id,), prepare=False)
    row = await cursor.fetchone()
    if row is None or row[0]:
        return
    await enqueue(
        conn,
        TOPIC,
        {"session_id": str(session_id), "draft": draft},
        max_attempts=TRIES,
        unique_key=f"{TOPIC}:{session_id}",
        on_duplicate="keep",
        traceparent=traceparent,
    )


async def open_pull_request(job: Job) -> None:
    """Try once. Raises Permanent or Retry."""
    settings = load()
    work = await _load(job)
    if work is None:
        return  # archived or deleted meanwhile, or opened by an earlier row
    secrets = Secrets.of_environment() | settings.secrets
    try:
        credentials = load_credentials(settings.git_credentials, work.user_id)
        secrets |= secrets_in(credentials)
        opened = await host_of(work.repo, settings).open_pull_request(
            Proposal(
                url=clone_url(work.repo, allow_file=settings.allow_file_repos),
                head=work.branch,
                base=work.target_branch,
                title=secrets.text(work.name),
                body=work.body(settings.public_url),
                draft=job.payload.get("draft") is not False,
                credentials=credentials,
            )
        )
    except SessionError as error:
        reason = secrets.text(str(error))[:REASON]
        async with job.transaction() as conn:
            await _store(conn, job, work, error=reason)
        if not isinstance(error, TransientError):
            raise Permanent(reason) from None
        pause = backoff(FIRST_PAUSE, LAST_PAUSE, job.row.failures)
        raise Retry(reason, max(pause, timedelta(seconds=error.after))) from None
    async with job.transaction() as conn:
        if opened is not None:
            await _store(conn, job, work, url=opened.url, number=opened.number)
        await job.complete(conn)
    if opened is not None:
        log.info("pull_request_opened", url=opened.url, existed=opened.existed)


async def _load(job: Job) -> Work | None:
    payload = job.payload if isinstance(job.payload, dict) else {}
    try:
        async with job.connection() as conn:
            cursor = await conn.execute(_LOAD, (str(payload.get("session_id")),), prepare=False)
            row = await cursor.fetchone()
    except psycopg.DataError as error:  # a row from psql may hold any payload
        raise Permanent(f"the payload names no session: {error}") from None
    return None if row is None else Work(*row)


async def _store(
    conn: Connection,
    job: Job,
    work: Work,
    *,
    url: str | None = None,
    number: int | None = None,
    error: str | None = None,
) -> None:
    found = {"url": url, "number": number, "error": error, "outbox_id": job.row.id}
    await conn.execute(_STORE, (Jsonb(found), work.session_id), prepare=False)


handler = Handler(TOPIC, open_pull_request, timeout=timedelta(minutes=3), line="session", built_in=True)

"""Topic `outbox.prune`: deletes what is past its retention, and schedules its successor.

Every page is a transaction of its own, so that no lock is held for long; deleting is the same whoever
does it, so only the end is fenced: this row and its successor are one commit.
"""

from datetime import UTC, datetime, timedelta

from outbox.enqueue import enqueue
from outbox.handler import Handler, Job
from outbox.log import get_logger
from outbox.settings import load

TOPIC = "outbox.prune"

_PAGE = 1000
_EVERY = timedelta(hours=1)

log = get_logger(__name__)


async def prune(job: Job) -> None:
    """Delete page by page until nothing is left to delete."""
    settings, now = load(), datetime.now(UTC)
    finished_before = now - timedelta(seconds=settings.retention)
    quiet_before = now - timedelta(seconds=settings.message_retention)
    rows = sessions = 0
    from_id: int | None = 0
    while from_id is not None:
        async with job.connection() as conn:
            cursor = await conn.execute(
                "SELECT deleted, next_id FROM outbox_prune(%s, %s, %s)",
                (finished_before, from_id, _PAGE),
            )
            page = await cursor.fetchone()
        assert page is not None
        rows, from_id = rows + page[0], page[1]
    while True:
        async with job.connection() as conn:
            cursor = await conn.execute(
                "SELECT session_prune(%s, %s, %s)", (finished_before, quiet_before, _PAGE)
            )
            page = await cursor.fetchone()
        assert page is not None
        if page[0] == 0:
            break
        sessions += page[0]
    async with job.transaction() as conn:
        await job.complete(conn)
        await enqueue(
            conn,
            TOPIC,
            available_at=now + _EVERY,
            max_attempts=job.row.max_attempts,
            unique_key=TOPIC,
            on_duplicate="keep",
        )
    log.info("pruned", rows=rows, others=sessions)


handler = Handler(TOPIC, prune, timeout=timedelta(hours=1))

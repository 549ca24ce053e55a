"""Topic `outbox.prune`: deletes what is past its retention, and schedules its successor.

Deleting is the same whoever does it, so only the end is fenced: this row and its successor are one commit.
"""

from datetime import UTC, datetime, timedelta

from outbox.enqueue import enqueue
from outbox.handler import Handler, Job
from outbox.log import get_logger
from outbox.prune import prune
from outbox.settings import load

TOPIC = "outbox.prune"

_EVERY = timedelta(hours=1)

log = get_logger(__name__)


async def run(job: Job) -> None:
    """Delete page by page until nothing is left to delete."""
    pruned = await prune(job.connection, load())
    async with job.transaction() as conn:
        await job.complete(conn)
        await enqueue(
            conn,
            TOPIC,
            available_at=datetime.now(UTC) + _EVERY,
            max_attempts=job.row.max_attempts,
            unique_key=TOPIC,
            on_duplicate="keep",
        )
    log.info("pruned", rows=pruned.rows, others=pruned.others)


handler = Handler(TOPIC, run, timeout=timedelta(hours=1))

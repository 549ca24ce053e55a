"""Topic `outbox.prune`: deletes data past its retention, and schedules its successor.

Repeated deletion does no harm, so only the end is fenced: this row's end and its successor are one commit.
The host that runs the row also removes the directories of deleted sessions. In time every host runs it.
"""

import asyncio
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from outwake._enqueue import enqueue
from outwake.handler import Handler, Job
from outwake.installed import has_sessions
from outwake.prune import prune
from outwake.schema import in_schema
from outwake.settings import load
from outwake.telemetry.log import get_logger

TOPIC = "outbox.prune"

_LATER = "SELECT clock_timestamp() + interval '1 hour'"  # the database's clock, by which rows are due
_GONE = in_schema(
    "SELECT k.id FROM unnest(%s::uuid[]) AS k (id)"
    " WHERE NOT EXISTS (SELECT FROM :schema.session AS s WHERE s.id = k.id)"
)

log = get_logger(__name__)


async def run(job: Job) -> None:
    """Delete page by page until nothing is left to delete."""
    settings = load()
    pruned = await prune(job.connection, settings)
    directories = await _remove_directories(job, Path(settings.workspace_root))
    async with job.transaction() as conn:
        await job.complete(conn)
        cursor = await conn.execute(_LATER)
        later = await cursor.fetchone()
        assert later is not None
        await enqueue(
            conn,
            TOPIC,
            available_at=later[0],
            max_attempts=job.row.max_attempts,
            unique_key=TOPIC,
            on_duplicate="keep",
        )
    log.info("pruned", rows=pruned.rows, others=pruned.others, directories=directories)


async def _remove_directories(job: Job, root: Path) -> int:
    """Remove the directories below `root` that belong to deleted sessions; return their number."""
    kept: dict[UUID, Path] = {}
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(ValueError):  # not ours
            kept[UUID(path.name)] = path
    if not kept:
        return 0
    async with job.connection() as conn:
        if not await has_sessions(conn):
            return 0
        cursor = await conn.execute(_GONE, (list(kept),))
        gone = [kept[row[0]] async for row in cursor]
    for path in gone:
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    return len(gone)


handler = Handler(TOPIC, run, timeout=timedelta(hours=1), built_in=True)

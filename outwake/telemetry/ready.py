"""Whether work is done: a worker is present, and no row has been due for too long."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from psycopg.rows import class_row

from outwake.schema import in_schema

READY = in_schema("SELECT ready, stuck, workers, oldest_due, topic, reason FROM :schema.outbox_ready(%s)")


@dataclass(frozen=True)
class Readiness:
    """The answer of outbox_ready (sql/outbox/functions/ready.sql). `reason` is None if `ready`. `stuck`: a
    row has been due for too long."""

    ready: bool
    stuck: bool
    workers: int
    oldest_due: timedelta | None
    topic: str | None
    reason: str | None


async def outbox_ready(conn: psycopg.AsyncConnection[Any], longest_wait: timedelta) -> Readiness:
    """Ask the database. Raises psycopg.Error."""
    async with conn.cursor(row_factory=class_row(Readiness)) as cursor:
        await cursor.execute(READY, (longest_wait,))
        found = await cursor.fetchone()
    assert found is not None
    return found

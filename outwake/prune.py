"""Deletes data past its retention, page by page, for the topic `outbox.prune` and for `outwake prune`.

Each page is a transaction of its own, so that no lock is held for long. After each page the code sleeps for
as long as the page took, so that it uses at most half of the time.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg

from outwake.installed import has_sessions
from outwake.schema import in_schema
from outwake.settings import Settings

_PAGE = 1000

# The database's clock decides: the times of the rows are its own.
_BEGIN = in_schema(
    "SELECT coalesce(max(id), 0), clock_timestamp() - %s, clock_timestamp() - %s FROM :schema.outbox"
)
_PRUNE_ROWS = in_schema("SELECT deleted, next_id FROM :schema.outbox_prune(%s, %s, %s)")
_PRUNE_WORKERS = in_schema("SELECT :schema.worker_prune(%s, %s)")
_PRUNE_SESSIONS = in_schema("SELECT :schema.session_prune(%s, %s, %s)")

Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]


@dataclass
class Pruned:
    """The number of deleted rows of outbox, and of all other tables together."""

    rows: int = 0
    others: int = 0


async def prune(
    connect: Connect,
    settings: Settings,
    report: Callable[[Pruned, float | None], None] = lambda pruned, done: None,
) -> Pruned:
    """Delete until nothing is left to delete. After each page `report` is called with the totals so far and
    with the part of outbox that was scanned (0 to 1), or None while other tables are pruned.

    Raises psycopg.Error; earlier pages stay deleted.
    """
    pruned = Pruned()
    from_id: int | None = 0
    async with connect() as conn:
        last_id, finished_before, quiet_before = await _call(
            conn,
            _BEGIN,
            (timedelta(seconds=settings.retention), timedelta(seconds=settings.message_retention)),
        )
        others: list[tuple[str, tuple[Any, ...]]] = [(_PRUNE_WORKERS, (finished_before, _PAGE))]
        if await has_sessions(conn):
            others.append((_PRUNE_SESSIONS, (finished_before, quiet_before, _PAGE)))
    while from_id is not None:
        began = time.monotonic()
        async with connect() as conn:
            deleted, from_id = await _call(conn, _PRUNE_ROWS, (finished_before, from_id, _PAGE))
        pruned.rows += deleted
        report(pruned, min(1.0, from_id / last_id) if from_id is not None and last_id else 1.0)
        await asyncio.sleep(time.monotonic() - began)
    for query, values in others:
        deleted = 1
        while deleted:
            began = time.monotonic()
            async with connect() as conn:
                (deleted,) = await _call(conn, query, values)
            pruned.others += deleted
            report(pruned, None)
            await asyncio.sleep(time.monotonic() - began)
    return pruned


async def _call(
    conn: psycopg.AsyncConnection[Any], query: str, arguments: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    cursor = await conn.execute(query, arguments)
    row: tuple[Any, ...] | None = await cursor.fetchone()
    assert row is not None
    return row

"""The background scan of the queue's head: steps 4 to 7 of worker/engine/cursor.py."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

import psycopg
from psycopg.rows import args_row

from outwake.connect import abort, deadline
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger
from outwake.worker.engine.cursor import CARRIES, Cursors, Places, Seen
from outwake.worker.engine.timers import Timers

log = get_logger(__name__)

_LONGEST = 120.0  # seconds; on a silent network path a scan would never return

_SCAN = in_schema(
    "SELECT topic, priority, available_at, id, due_in FROM :schema.outbox_scout("
    "%s, %s, %s::smallint[], %s::timestamptz[], %s::bigint[], %s)"
)

Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]


class BackgroundScan:
    """Runs background scans, one at a time. `connect` lends a connection in autocommit. `back` is called when
    a scan has returned.
    """

    def __init__(self, cursors: Cursors, connect: Connect, back: Callable[[], None]) -> None:
        self._cursors = cursors
        self._connect = connect
        self._back = back
        self._task: asyncio.Task[None] | None = None
        self._conn: psycopg.AsyncConnection[Any] | None = None

    @property
    def under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self, topics: Iterable[str]) -> None:
        """Start a scan if one is due."""
        if not self.under_way and self._cursors.background_is_due(time.monotonic()):
            self._task = asyncio.create_task(self._go(list(topics)), name="background scan")

    def next_at(self, since: float, timers: Timers) -> float:
        """When the worker has to scan again, if the head is far and the last scan was asked for at `since`:
        when a background scan may begin, or when a row that one saw falls due.
        """
        cursors = self._cursors
        if cursors.missed:
            return -math.inf
        if not cursors.is_clear(since):
            return math.inf if self.under_way else cursors.background_at
        return math.inf if cursors.next_due is None else timers.here(cursors.next_due.timestamp())

    async def close(self) -> None:
        """End the scan under way. Not by a cancel: psycopg would ask the server to cancel too, and wait."""
        if self._task is not None:
            if self._conn is not None:
                abort(self._conn)
            else:
                self._task.cancel()
            await asyncio.wait([self._task])

    async def _go(self, topics: list[str]) -> None:
        began = time.monotonic()
        try:
            async with self._connect() as conn:
                self._conn = conn
                with deadline(conn, _LONGEST):
                    known = dict(self._cursors.places)
                    began = time.monotonic()
                    seen = await _scan(conn, topics, known)
        except Exception as error:  # the database is away: the loop logs that as a warning
            log.info("background_scan_failed", error=str(error).strip())
            self._cursors.background_failed(began, time.monotonic())
        else:
            ended = time.monotonic()
            self._cursors.background_saw(known, seen, began, ended)
            log.debug("background_scan", seconds=round(ended - began, 3), seen=len(seen))
        finally:
            self._conn = None
        self._back()


async def _scan(conn: psycopg.AsyncConnection[Any], topics: list[str], known: Places) -> list[Seen]:
    async with conn.cursor(row_factory=args_row(Seen)) as cursor:
        await cursor.execute(
            _SCAN,
            (
                topics,
                [topic for topic, _ in known],
                [priority for _, priority in known],
                [at for at, _ in known.values()],
                [row_id for _, row_id in known.values()],
                CARRIES,
            ),
            binary=True,
        )
        return await cursor.fetchall()

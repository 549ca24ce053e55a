"""Reports a row that has been due for too long, without a poller and without Prometheus.

It runs in the API, which accepts sessions even without a worker, and in each worker, which sees rows of
topics that nobody serves:

1. When work may have come (a session was created, rows were claimed), set one timer to the moment at which
   that work could be stuck, unless an earlier timer is set. This needs no query.
2. When the timer fires, one query reports what is stuck now (outbox_stuck_report in
   sql/outbox/functions/ready.sql). Each topic gives a log line `stuck`, and a POST to OUTWAKE_STUCK_WEBHOOK
   if that is set. Only one process reports a topic, and it repeats the report after REPEAT. When nothing of
   the topic is stuck any more, `unstuck` is reported. While somebody holds an old snapshot, the query may
   take seconds, because it reads past all rows claimed since. So the next query comes no sooner than SHARE
   times that time later, and nobody waits for it.
3. The same scan returns the next moment at which something could be stuck. If there is none, no timer is set.
   A process starts with such a scan. So a process with nothing to do scans once and never again.

A row that is inserted by psql, while no worker runs and no API takes requests, sets no timer. The next scan
finds it. SQL, metrics and readiness show it all the time.
"""

import asyncio
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any

import psycopg

from outwake.connect import abort, deadline
from outwake.schema import in_schema
from outwake.settings import Settings
from outwake.telemetry.log import get_logger

log = get_logger(__name__)

REPEAT = timedelta(minutes=15)
SHARE = 20
FIRST = 1.0
"""Seconds that a starting process waits for its first scan."""
_WEBHOOK_TIMEOUT = 10.0
_LONGEST = 120.0  # seconds for a scan, which would never end on a silent path

_REPORT = in_schema(
    "SELECT stuck, topic, id, waited, reason, detail FROM :schema.outbox_stuck_report(%s, %s)"
)
_DEADLINE = in_schema("SELECT :schema.outbox_stuck_deadline(%s)")

Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]


class StuckWatch:
    """The timer and its scan. `connect` returns a connection in autocommit, for a short time."""

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self._after = settings.stuck_after
        self._webhook = settings.stuck_webhook
        self._connect = connect
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = -math.inf
        self._looking: asyncio.Task[None] | None = None
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self._telling: set[asyncio.Task[None]] = set()

    def work_came(self) -> None:
        """Step 1."""
        self._arm(self._after)

    async def close(self) -> None:
        """Cancel the timer and end a running scan."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._telling:
            task.cancel()
        tasks = set(self._telling)
        if self._looking is not None:
            if self._conn is not None:
                abort(self._conn)  # a cancelled psycopg would ask the server to cancel too, and wait
            else:
                self._looking.cancel()
            tasks.add(self._looking)
        if tasks:
            await asyncio.wait(tasks)

    def _arm(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        seconds = max(seconds, self._not_before - loop.time())
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_again(), name="stuck")

    async def _look_again(self) -> None:
        try:
            async with self._connect() as conn:
                self._conn = conn
                with deadline(conn, _LONGEST):
                    await self.look(conn)
        except Exception as error:  # the database is away: others report that at a higher level
            log.info("stuck_look_failed", error=str(error).strip())
            self._arm(self._after)
        finally:
            self._conn = None

    async def first_look(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """The scan of a starting process, which moves to the background if it takes long."""
        try:
            async with asyncio.timeout(FIRST):
                await self.look(conn)
        except TimeoutError:
            self._fire()

    async def look(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """Steps 2 and 3. Raises psycopg.Error."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        after = timedelta(seconds=self._after)
        cursor = await conn.execute(_REPORT, (after, REPEAT))
        for report in await cursor.fetchall():
            task = asyncio.create_task(self._say(*report))  # a slow webhook delays nobody
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
        cursor = await conn.execute(_DEADLINE, (after,))
        row = await cursor.fetchone()
        deadline: timedelta | None = row[0] if row else None
        self._not_before = loop.time() + (loop.time() - began) * SHARE
        if deadline is not None:
            # What is stuck already has a deadline in the past: scan again, but not at once.
            seconds = deadline.total_seconds()
            self._arm(seconds if seconds > 0 else self._after)

    async def _say(
        self, stuck: bool, topic: str, row_id: int | None, waited: timedelta, reason: str | None,
        detail: str | None,
    ) -> None:  # fmt: skip
        seconds = round(waited.total_seconds(), 1)
        if stuck:
            text = f"row {row_id} of topic {topic} has been due for {seconds:.0f} s: {reason}, {detail}"
            log.error("stuck", topic=topic, outbox_id=row_id, waited=seconds, reason=reason, detail=detail)
        else:
            text = f"topic {topic} is no longer stuck"
            log.info("unstuck", topic=topic, waited=seconds)
        if self._webhook is None:
            return
        body = {
            "event": "stuck" if stuck else "unstuck",
            "topic": topic,
            "outbox_id": row_id,
            "waited_seconds": seconds,
            "reason": reason,
            "detail": detail,
            "text": text,  # what chat programs show
        }
        import httpx  # here: an idle worker saves its memory

        try:
            async with httpx.AsyncClient(timeout=_WEBHOOK_TIMEOUT) as client:
                answer = await client.post(self._webhook, json=body)
                answer.raise_for_status()
        except httpx.HTTPError as error:  # the URL may hold a token, so log only the kind of error
            log.error("stuck_webhook_failed", topic=topic, error=type(error).__name__)

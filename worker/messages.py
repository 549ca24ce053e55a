"""Stores an agent's output while it runs.

While the database is away, batches wait in memory, bounded in bytes. The agent runs on, and its output is
stored afterwards. When the bound is reached, `put` waits. Then the agent's pipe fills, and the agent waits.

A connection may be half open: what we send is lost, and no answer comes. So each statement must be answered
within ANSWER seconds. Then its connection is broken, and the statement is repeated on another one.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Self
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from outwake.connect import deadline, is_away
from outwake.errors import Cancelled, Fenced
from outwake.handler import Connection, Job
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger

log = get_logger(__name__)

ANSWER = 10.0
"""Seconds within which the database must answer."""

_BOUND = 16 * 2**20
_RETRY_FIRST, _RETRY_LAST = 0.1, 2.0

_APPEND = in_schema(
    "SELECT fenced, cancel, last_seq, watched FROM :schema.message_append(%s, %s, %s, %s, %s, %b, %s, true)"
)
_NOTIFY = in_schema("SELECT :schema.session_notify(%s)")


class Messages(AbstractAsyncContextManager["Messages"]):
    """Writes batches in order, in a task of its own. Leaving the block waits until all are stored.

    Raises Fenced or Cancelled, from `put` or on leaving, if the row was fenced or a cancel was requested.
    """

    def __init__(self, job: Job, session_id: UUID, prompt_id: UUID) -> None:
        self._job = job
        self._ids = (session_id, prompt_id)
        self._waiting: deque[tuple[list[str], int]] = deque()
        self._bytes = 0
        self._last_seq = 0  # makes a write repeatable if its answer was lost: see message_append
        self._changed = asyncio.Condition()
        self._closed = False

    async def __aenter__(self) -> Self:
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
            return
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        await self._writer

    async def put(self, batch: list[str]) -> None:
        """Take a batch of lines, each as JSON; wait while more than 16 MiB are not stored yet."""
        if not batch:
            return
        size = sum(map(len, batch))
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._bytes or self._bytes + size <= _BOUND or self._writer.done()
            )
            if self._writer.done():
                self._writer.result()
            self._waiting.append((batch, size))
            self._bytes += size
            self._changed.notify_all()

    async def _write(self) -> None:
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._waiting or self._closed)
                    if not self._waiting:
                        return
                    batch, size = self._waiting[0]
                await self._append(batch)
                async with self._changed:
                    self._waiting.popleft()
                    self._bytes -= size
                    self._changed.notify_all()
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _append(self, batch: list[str]) -> None:
        ids = (self._job.worker_id, *self._job.token, *self._ids)

        async def append() -> None:
            async with self._job.connection() as conn:
                cursor = await conn.execute(
                    _APPEND,
                    (*ids, [Jsonb(line, dumps=str) for line in batch], self._last_seq),
                )
                row = await cursor.fetchone()
                assert row is not None
                fenced, cancel, last_seq, watched = row
                if watched and not fenced:  # after the commit: sql/session/functions/events.sql
                    await conn.execute(_NOTIFY, (self._ids[0],))
            if fenced:
                raise Fenced(*self._job.token)
            if cancel:
                raise Cancelled("a cancel was requested")
            self._last_seq = last_seq

        await retry_until_available(append)


def answer_soon(job: Job) -> None:
    """Break the job's connection when a block of `job.connection` or `job.transaction` takes longer than
    ANSWER seconds. What waits on it then fails, as in an outage.
    """
    connection = job.connection

    @asynccontextmanager
    async def answering() -> AsyncIterator[Connection]:
        async with connection() as conn:
            with deadline(conn, ANSWER):
                yield conn

    job.connection = answering


async def retry_until_available(write: Callable[[], Awaitable[None]]) -> None:
    """Retry `write()` while the database is away. The end of the lease cancels us, so it limits the retries.
    A write whose answer was lost may be executed twice, so it must be fenced or harmless.
    """
    delay = _RETRY_FIRST
    while True:
        try:
            await write()
            return
        except psycopg.Error as error:
            if not is_away(error):
                raise
            log.warning("database_away", error=str(error).strip(), retry_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, _RETRY_LAST)

"""Follow a session: each message once and in order, and each change of its status, without polling.

To start is to park, for one session (worker/engine/parking.py explains why nothing is missed):
1. LISTEN, and take the presence of this connection. Commit a watch under that presence.
2. Record which transactions write to sessions and messages now. Read.
3. Check again, with a backoff up to a second, until those transactions have ended. Read once more.
4. Read whenever a notification names the session. A new connection starts at 1, from the last seq read.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from outwake.connect import connect, hear
from outwake.schema import SCHEMA, in_schema
from outwake.settings import Settings

_CHANNEL = f"{SCHEMA.name}_session"
_PRESENCE = SCHEMA.lock("watch")
_PAGE = 500
_LOOK_FIRST, _LOOK_LAST = 0.002, 1.0

_STATUS = in_schema(
    """
SELECT s.inbox_status, s.session_status, s.title, s.branch, (
    SELECT jsonb_agg(jsonb_build_object('id', p.id, 'status', p.status, 'reason', p.reason)
                     ORDER BY p.created_at, p.id)
    FROM :schema.prompt AS p WHERE p.session_id = s.id) AS prompts
FROM :schema.session AS s WHERE s.id = %s
"""
)
_MESSAGES = in_schema(
    """
SELECT seq, prompt_id, attempt, body, created_at FROM :schema.message
WHERE session_id = %s AND seq > %s ORDER BY seq LIMIT %s
"""
)
_WATCH = in_schema("SELECT :schema.session_watch(%s::uuid[], %s)")
_UNWATCH = in_schema("DELETE FROM :schema.watcher WHERE presence = %s")
_WRITERS = in_schema("SELECT :schema.session_writers()")

Record = dict[str, Any]


class NoSession(LookupError):
    """The session does not exist."""


async def follow(
    settings: Settings, session_id: UUID, after: int = 0
) -> AsyncGenerator[tuple[str, Record], None]:
    """Yield ("message", row of message) for each seq above `after`. Yield ("status", state) at the start and
    after each change, once all earlier messages were yielded. Runs until the connection breaks.

    Raises NoSession; psycopg.OperationalError when a connection breaks: continue from the last seq.
    """
    lease = timedelta(seconds=settings.lease)
    listener = await connect(settings.listen_url, "outwake tail listener", lease)
    async with (
        listener,
        await connect(settings.database_url, "outwake tail", lease, pooled=settings.pooled) as conn,
    ):
        await listener.execute(f"LISTEN {_CHANNEL}")
        presence = secrets.randbelow(2**31)
        await listener.execute("SELECT pg_advisory_lock(%s, %s)", (_PRESENCE, presence))
        await conn.execute(_WATCH, ([session_id], presence))
        news = asyncio.Event()
        tasks = [
            asyncio.create_task(_listen(listener, session_id, news)),
            asyncio.create_task(_settle(settings, news)),
        ]
        for task in tasks:
            task.add_done_callback(lambda _: news.set())
        shown: Record | None = None
        try:
            while True:
                news.clear()
                state = await _state(conn, session_id)  # first, so that the messages it refers to are read
                while rows := await _messages(conn, session_id, after):
                    for row in rows:
                        yield "message", row
                    after = rows[-1]["seq"]
                if state != shown:
                    yield "status", state
                    shown = state
                await news.wait()
                for task in tasks:
                    if task.done():
                        task.result()  # raises the error that ended the task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with suppress(psycopg.Error):
                await conn.execute(_UNWATCH, (presence,))


async def _listen(conn: psycopg.AsyncConnection[Any], session_id: UUID, news: asyncio.Event) -> None:
    def heard(_channel: str, payload: str) -> None:
        try:
            ours = UUID(payload) == session_id
        except ValueError:  # a newer version may send more, perhaps about this session
            ours = True
        if ours:
            news.set()

    await hear(conn, heard)


async def _settle(settings: Settings, news: asyncio.Event) -> None:
    """Steps 2 and 3, on a separate connection, so that reading continues meanwhile."""
    lease = timedelta(seconds=settings.lease)
    pause = _LOOK_FIRST
    waits_for: set[str] | None = None
    async with await connect(settings.database_url, "outwake tail", lease, pooled=settings.pooled) as conn:
        while waits_for is None or waits_for:
            cursor = await conn.execute(_WRITERS)
            row = await cursor.fetchone()
            assert row is not None
            writers = set(row[0])
            before, waits_for = waits_for, writers if waits_for is None else waits_for & writers
            if waits_for != before:
                news.set()
            if waits_for:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LOOK_LAST)
    news.set()


async def _state(conn: psycopg.AsyncConnection[Any], session_id: UUID) -> Record:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_STATUS, (session_id,), prepare=False)
        found: Record | None = await cursor.fetchone()
    if found is None:
        raise NoSession(str(session_id))
    return found


async def _messages(conn: psycopg.AsyncConnection[Any], session_id: UUID, after: int) -> list[Record]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_MESSAGES, (session_id, after, _PAGE), prepare=False)
        return await cursor.fetchall()

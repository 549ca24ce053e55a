"""Follow a session: each message once and in order, and each change of its status, without polling.

It is the handshake of outwake/_handshake.py, for one session. The flag is a watch under the presence of this
process's LISTEN connection. The scan reads from the last seq read. After a lost connection `follow` ends, and
another one starts at step 1.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from outwake._handshake import PAUSES, Handshake
from outwake._notify import ListenConnection
from outwake.connect import connect
from outwake.schema import SCHEMA, in_schema
from outwake.settings import Settings

CHANNEL = f"{SCHEMA.name}_session"
LOCK = SCHEMA.lock("watch")
"""The first integer of the advisory lock of a presence that watches sessions."""
WATCH = in_schema("SELECT :schema.session_watch(%s::uuid[], %s)")
UNWATCH = in_schema("DELETE FROM :schema.watcher WHERE presence = %s AND session_id = ANY (%s::uuid[])")
WRITERS = in_schema("SELECT :schema.session_writers()")

_PAGE = 500
_STATUS = in_schema(
    """
SELECT s.inbox_status, s.session_status, s.title, s.branch,
    :schema.session_json(s) -> 'pull_request' AS pull_request, (
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

Record = dict[str, Any]


class NoSession(LookupError):
    """The session does not exist."""


def named(payload: str) -> UUID | None:
    """The session that a notification names. None if it is not understood: a newer version may send more,
    about any session.
    """
    try:
        return UUID(payload)
    except ValueError:
        return None


async def follow(
    settings: Settings, session_id: UUID, after: int = 0
) -> AsyncGenerator[tuple[str, Record], None]:
    """Yield ("message", row of message) for each seq above `after`. Yield ("status", state) at the start and
    after each change, once all earlier messages were yielded. Runs until the connection breaks.

    Raises NoSession; psycopg.OperationalError when a connection breaks: continue from the last seq.
    """
    lease = timedelta(seconds=settings.lease)
    listener = await ListenConnection.open(
        settings.listen_url, "outwake tail listener", lease, (CHANNEL,), LOCK
    )
    async with (
        listener.conn,
        await connect(settings.database_url, "outwake tail", lease, pooled=settings.pooled) as conn,
    ):
        await conn.execute(WATCH, ([session_id], listener.presence))
        news = asyncio.Event()
        tasks = [
            asyncio.create_task(_listen(listener, session_id, news)),
            asyncio.create_task(_shake_hands(settings, news)),
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
                await conn.execute(UNWATCH, (listener.presence, [session_id]))


async def _listen(listener: ListenConnection, session_id: UUID, news: asyncio.Event) -> None:
    def heard(_channel: str, payload: str) -> None:
        if named(payload) in (session_id, None):
            news.set()

    await listener.hear(heard)


async def _shake_hands(settings: Settings, news: asyncio.Event) -> None:
    """Steps 2 to 4, on a connection of its own, so that reading continues meanwhile."""
    lease = timedelta(seconds=settings.lease)
    pause, longest = PAUSES
    handshake = Handshake()
    async with await connect(settings.database_url, "outwake tail", lease, pooled=settings.pooled) as conn:
        while True:
            cursor = await conn.execute(WRITERS)
            row = await cursor.fetchone()
            assert row is not None
            if handshake.saw(row[0]):
                news.set()
            if handshake.over:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)


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

"""The LISTEN connection: one for each process, on a few fixed channels.

1. Connect, with keepalive and user timeout on both ends, so that silence is noticed within a bound.
2. Take the presence, without blocking: a session-level advisory lock under a number that is new for this
   connection. An earlier connection that the server does not yet know to be dead still holds its own lock.
   The lock tells everybody that this process is alive, for as long as the connection is.
3. LISTEN. Nothing may be read from tables before that: what was committed before the LISTEN is found there,
   and what is committed later notifies.
4. Hear notifications until the connection breaks. Whoever needs another connection starts again at 1.

The connection is never in a transaction, because a listener in a transaction holds back the server's
notification queue.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import psycopg

from outwake.connect import ServerConnection, connect, deadline

Heard = Callable[[str, str], None]
"""Called with the channel and the payload of a notification."""

PRESENCES = 2**31
"""A presence is a number from 0 to below this one, because it is the second integer of an advisory lock."""

_STEP = 1000


class ListenConnection:
    """An open LISTEN connection, and the number of its presence."""

    def __init__(self, conn: ServerConnection, presence: int) -> None:
        self.conn = conn
        self.presence = presence

    @classmethod
    async def open(
        cls,
        url: str,
        name: str,
        silence: timedelta,
        channels: Iterable[str],
        lock: int,
        earlier: int | None = None,
    ) -> "ListenConnection":
        """Steps 1 to 3. `silence` is the bound of step 1, `lock` the first integer of the presence's lock.

        `earlier` is the presence of this process's connection before. The new one follows it, so that the
        database recognises a late call of an earlier connection (outbox_reconnect). Raises psycopg.Error.
        """
        conn = await connect(url, name, silence)
        try:
            with deadline(conn, silence.total_seconds()):
                presence = await _take_presence(conn, lock, earlier)
                for channel in channels:
                    await conn.execute(f"LISTEN {channel}")
        except BaseException:
            await conn.close()
            raise
        return cls(conn, presence)

    async def hear(self, heard: Heard, answered: Callable[[], None] = lambda: None) -> None:
        """Step 4: pass notifications on until the connection breaks.

        `answered` is called after each read. It must take the whole answer, if it has arrived, to a statement
        that was sent meanwhile through libpq directly. psycopg's own notifies() wakes ten times a second,
        which costs CPU time when idle. Raises psycopg.OperationalError when the connection is broken, and the
        exceptions of `heard`.
        """
        # Earlier notifications are in psycopg's backlog; later ones are read below.
        async for notification in self.conn.notifies(timeout=0):
            heard(notification.channel, notification.payload)
        loop, server = asyncio.get_running_loop(), self.conn.pgconn
        descriptor, broken = server.socket, loop.create_future()

        def read() -> None:
            try:
                for _ in range(2):  # uvloop may report a connection's last data and its end only once
                    server.consume_input()
                    # First: libpq does not reach what follows an answer before that answer has been taken.
                    answered()
                    while note := server.notifies():
                        heard(note.relname.decode(), note.extra.decode())
            except Exception as error:
                loop.remove_reader(descriptor)  # the socket stays readable
                if not broken.done():
                    broken.set_exception(error)

        # No task between the socket and the receiver, so that a sleeping worker starts sooner.
        loop.add_reader(descriptor, read)
        try:
            await broken
        finally:
            loop.remove_reader(descriptor)

    async def close(self) -> None:
        """Close the connection; its presence goes with it."""
        await self.conn.close()


async def _take_presence(conn: psycopg.AsyncConnection[Any], lock: int, earlier: int | None) -> int:
    while True:
        presence = secrets.randbelow(PRESENCES) if earlier is None else after(earlier)
        cursor = await conn.execute("SELECT pg_try_advisory_lock(%s, %s)", (lock, presence))
        row = await cursor.fetchone()
        if row is not None and row[0]:
            return presence


def after(presence: int) -> int:
    """A presence that follows `presence`. Numbers wrap, so that they never run out."""
    return (presence + 1 + secrets.randbelow(_STEP)) % PRESENCES

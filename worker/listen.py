"""The LISTEN connection: one a process, never in a transaction, never used for anything else.

1. Connect, with keepalive and user timeout on both ends, so that silence is noticed within a lease.
2. Take the presence lock, under a number new for this connection, without blocking: the lock of a
   connection that the server does not know to be dead yet must not stand in the way. A process's numbers
   rise, so that the database tells a call of an earlier connection that arrives late (outbox_reconnect).
3. LISTEN. Only then may anybody claim: a row committed before is found by the claim, one after notifies.
4. Read notifications until the connection breaks, then start again at 1. No other statement is sent on it.

Some proxies keep a socket open whose server has gone; keepalive cannot see that. `SENDOFF_LISTEN_PROBE`
makes the worker notify itself now and then, through the other connection, and reconnect if it hears nothing.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg

from outbox.connect import Heard, bounded, connect, hear

WAKE, CANCEL, PROBE = "sendoff_wake", "sendoff_cancel", "sendoff_probe"
_PRESENCE = 1397048886


class Listener:
    """An open LISTEN connection that passes (channel, payload) on as they come."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], presence: int, heard: Heard) -> None:
        self.presence = presence
        self.opened_at = time.monotonic()
        self._conn = conn
        self._heard = heard
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str, lease: timedelta, heard: Heard, earlier: int | None) -> "Listener":
        """Steps 1 to 3."""
        conn = await connect(url, "sendoff worker listen", lease)
        try:
            with bounded(conn, lease.total_seconds()):
                presence = await _take_presence(conn, earlier)
                for channel in (WAKE, CANCEL, PROBE):
                    await conn.execute(f"LISTEN {channel}")
        except BaseException:
            await conn.close()
            raise
        return cls(conn, presence, heard)

    def start(self, ended: Callable[[], None]) -> None:
        """Step 4, in a task; `ended` is called when the connection breaks."""
        self._reading = asyncio.create_task(hear(self._conn, self._heard), name="listen")
        self._reading.add_done_callback(lambda task: ended())

    def check(self) -> None:
        """Raise what broke the connection, if it is broken."""
        if self._reading is not None and self._reading.done() and not self._reading.cancelled():
            self._reading.result()

    async def close(self) -> None:
        """Close the connection; its presence lock goes with it."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()  # it was dealt with, or we close because of it
        await self._conn.close()


async def _take_presence(conn: psycopg.AsyncConnection[Any], earlier: int | None) -> int:
    while True:
        presence = secrets.randbelow(2**30) if earlier is None else earlier + 1 + secrets.randbelow(1000)
        cursor = await conn.execute("SELECT pg_try_advisory_lock(%s, %s)", (_PRESENCE, presence))
        row = await cursor.fetchone()
        if row is not None and row[0]:
            return presence

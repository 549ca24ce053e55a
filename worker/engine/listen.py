"""The LISTEN connection: one for each process. It never waits for anybody, so that it hears at once.

1. Connect, with keepalive and user timeout on both ends, so that silence is noticed within a lease.
2. Take the presence lock without blocking, under a number that is new for this connection: an earlier
   connection that the server does not yet know to be dead still holds its own lock. A process's numbers rise,
   so that the database recognises a late call of an earlier connection (outbox_reconnect).
3. LISTEN. Nothing may be claimed before that: a claim finds a row that was committed before the LISTEN, and a
   row that is committed later notifies.
4. Read notifications until the connection breaks, then start again at 1. One statement is sent on this
   connection: the claim of a single row (outbox_claim_row), which waits for no lock. The server's process of
   this connection is awake, because it has just sent the notification.

Some proxies keep a socket open although its server has gone, and keepalive cannot see that. If
`OUTWAKE_LISTEN_PROBE` is set, the worker notifies itself now and then, through the other connection, and
reconnects if it hears nothing.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from outwake.connect import Heard, answer, bounded, connect, hear
from outwake.schema import SCHEMA
from outwake.worker.engine.reply import Reply

T = TypeVar("T")

WAKE, CANCEL, PROBE = (f"{SCHEMA.name}_{what}" for what in ("wake", "cancel", "probe"))
_PRESENCE = SCHEMA.lock("presence")


class Listener:
    """An open LISTEN connection. It passes each notification on as (channel, payload)."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], presence: int, heard: Heard) -> None:
        self.presence = presence
        self.opened_at = time.monotonic()
        self._conn = conn
        self._heard = heard
        self._reading: asyncio.Task[None] | None = None
        self._reply: Reply[Any] | None = None

    @classmethod
    async def open(cls, url: str, lease: timedelta, heard: Heard, earlier: int | None) -> "Listener":
        """Steps 1 to 3."""
        conn = await connect(url, "outwake worker listen", lease)
        try:
            with bounded(conn, lease.total_seconds()):
                presence = await _take_presence(conn, earlier)
                for channel in (WAKE, CANCEL, PROBE):
                    await conn.execute(f"LISTEN {channel}")
        except BaseException:
            await conn.close()
            raise
        return cls(conn, presence, heard)

    async def prepare(self, name: bytes, query: bytes) -> None:
        """Prepare a statement for `ask`; call it before `start`."""
        self._conn.pgconn.send_prepare(name, query)
        await answer(self._conn)

    def start(self, ended: Callable[[], None]) -> None:
        """Step 4, in a task. `ended` is called when the connection breaks."""

        def has_ended(task: asyncio.Task[None]) -> None:
            if self._reply is not None:
                self._reply.give_up()
            ended()

        self._reading = asyncio.create_task(hear(self._conn, self._heard, self._answered), name="listen")
        self._reading.add_done_callback(has_ended)

    def ask(
        self, name: bytes, values: Sequence[bytes | None], arrived: Callable[[pq.abc.PGresult], T]
    ) -> Reply[T]:
        """Send a prepared statement; only one may be under way. Raises psycopg.Error if it cannot be sent."""
        self._conn.pgconn.send_query_prepared(name, values, result_format=pq.Format.BINARY)
        self._reply = reply = Reply(self._conn.pgconn, arrived)
        return reply

    def bounded(self, seconds: float) -> AbstractContextManager[None]:
        """Break the connection if the block takes longer."""
        return bounded(self._conn, seconds)

    def _answered(self) -> None:
        if self._reply is not None and self._reply.read():
            self._reply = None

    def check(self) -> None:
        """Raise the connection's error if it is broken."""
        if self._reading is not None and self._reading.done() and not self._reading.cancelled():
            self._reading.result()

    async def close(self) -> None:
        """Close the connection; its presence lock goes with it."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()  # it was handled, or we close because of it
        await self._conn.close()


async def _take_presence(conn: psycopg.AsyncConnection[Any], earlier: int | None) -> int:
    while True:
        presence = secrets.randbelow(2**30) if earlier is None else earlier + 1 + secrets.randbelow(1000)
        cursor = await conn.execute("SELECT pg_try_advisory_lock(%s, %s)", (_PRESENCE, presence))
        row = await cursor.fetchone()
        if row is not None and row[0]:
            return presence

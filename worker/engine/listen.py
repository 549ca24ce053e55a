"""A worker's LISTEN connection. It never waits for anybody, so that it hears at once.

outwake/_notify.py has its steps. One statement is sent on it: the claim of a single row (outbox_claim_row),
which waits for no lock. The server's process of this connection is awake, because it has just sent the
notification. worker/engine/probe.py tests whether it still hears.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from outwake._notify import Heard, ListenConnection
from outwake._statement import Statement, Statements, Values
from outwake.connect import deadline
from outwake.schema import SCHEMA
from outwake.worker.engine.reply import Reply

T = TypeVar("T")

WAKE, CANCEL, PROBE = (f"{SCHEMA.name}_{what}" for what in ("wake", "cancel", "probe"))
_LOCK = SCHEMA.lock("presence")


class Listener:
    """A worker's LISTEN connection. It passes each notification on as (channel, payload)."""

    def __init__(self, connection: ListenConnection, heard: Heard) -> None:
        self.presence = connection.presence
        self.opened_at = time.monotonic()
        self._connection = connection
        self._statements = Statements(connection.conn, prepares=True)
        self._heard = heard
        self._reading: asyncio.Task[None] | None = None
        self._reply: Reply[Any] | None = None

    @classmethod
    async def open(cls, url: str, lease: timedelta, heard: Heard, earlier: int | None) -> "Listener":
        """Connect and LISTEN. `earlier` is the presence of the connection before. Raises psycopg.Error."""
        name, channels = "outwake worker listen", (WAKE, CANCEL, PROBE)
        return cls(await ListenConnection.open(url, name, lease, channels, _LOCK, earlier), heard)

    async def prepare(self, statement: Statement) -> None:
        """Prepare a statement for `ask`; call it before `start`."""
        await self._statements.prepare(statement)

    def start(self, ended: Callable[[], None]) -> None:
        """Pass notifications on, in a task. `ended` is called when the connection breaks."""

        def has_ended(task: asyncio.Task[None]) -> None:
            if self._reply is not None:
                self._reply.give_up()
            ended()

        self._reading = asyncio.create_task(self._connection.hear(self._heard, self._answered), name="listen")
        self._reading.add_done_callback(has_ended)

    def ask(self, statement: Statement, values: Values, arrived: Callable[[pq.abc.PGresult], T]) -> Reply[T]:
        """Send a prepared statement; only one may be under way. Raises psycopg.Error if it cannot be sent."""
        self._statements.send(statement, values, pq.Format.BINARY)
        self._reply = reply = Reply(self._connection.conn.pgconn, arrived)
        return reply

    def deadline(self, seconds: float) -> AbstractContextManager[None]:
        """Break the connection if the block takes longer."""
        return deadline(self._connection.conn, seconds)

    def _answered(self) -> None:
        if self._reply is not None and self._reply.read():
            self._reply = None

    def check(self) -> None:
        """Raise psycopg.Error if the connection is broken, or if its server was replaced."""
        if self._connection.conn.outdated:
            raise psycopg.OperationalError("the server was replaced")
        if self._reading is not None and self._reading.done() and not self._reading.cancelled():
            self._reading.result()

    async def close(self) -> None:
        """Close the connection; its presence goes with it."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()  # it was handled, or we close because of it
        await self._connection.close()

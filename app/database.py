"""The API's connections to the database. They fail fast.

A request must not wait for the pool's timeout to learn that Postgres is down:
1. A pooled connection that its server has closed, or whose server was replaced, is replaced before use. This
   check costs a system call, no round trip (ServerConnection.usable).
2. An outage begins when no connection is left and none can be made. A refused connect shows that within
   milliseconds, a silent one after CONNECT_TIMEOUT. If some connections are left (the server may have reached
   its limit), requests wait for one of them.
3. During an outage new requests are refused at once, and waiting requests are woken and refused too. A probe
   connects with jittered backoff. Its first success ends the outage.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import psycopg
from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool

from outwake.app.api.problems import unavailable
from outwake.app.connection import Connection, Params, Query, Row
from outwake.connect import ServerConnection, abort_after, conninfo, deadline
from outwake.settings import Settings
from outwake.telemetry.log import get_logger

CONNECT_TIMEOUT = 2  # seconds; libpq's minimum
WAIT_TIMEOUT = 5.0  # seconds for a free connection while all are busy
STATEMENT_TIMEOUT = 10.0  # seconds, enforced by the server
LOCK_TIMEOUT = 5.0  # seconds, enforced by the server
ANSWER_TIMEOUT = 15.0  # seconds, enforced here in case the server is silent
SILENCE = timedelta(seconds=10)  # both ends give up a connection whose network is silent this long
PROBE_PAUSE = (0.05, 1.0)  # seconds, first and last

log = get_logger("outwake.app.database")


def _conninfo(settings: Settings) -> str:
    info = conninfo(settings.database_url, "outwake api", SILENCE, pooled=settings.pooled)
    info = make_conninfo(info, connect_timeout=CONNECT_TIMEOUT)
    if settings.pooled:  # a pooler refuses startup options
        return info
    # Postgres keeps plans. A plan made for an empty table would scan it all (sql/outbox/functions/claim.sql).
    options = (
        f"{conninfo_to_dict(info)['options']} -c enable_seqscan=off "
        f"-c statement_timeout={round(STATEMENT_TIMEOUT * 1000)} "
        f"-c lock_timeout={round(LOCK_TIMEOUT * 1000)}"
    )
    return make_conninfo(info, options=options)


class Database:
    """A pool of autocommit connections: each query is one transaction, one round trip."""

    def __init__(self, settings: Settings) -> None:
        self._conninfo = _conninfo(settings)
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._conninfo,
            connection_class=Connection,
            # A pooler may use another server connection each time, so nothing is prepared behind one.
            kwargs={"autocommit": True, "prepare_threshold": None if settings.pooled else 5},
            min_size=1,
            max_size=settings.pool_size,
            open=False,
            timeout=WAIT_TIMEOUT,
            reconnect_timeout=0,  # the pool does not retry, because the probe does
            reconnect_failed=self._not_replaced,
        )
        self._available = asyncio.Event()
        self._available.set()
        self._waiting: set[asyncio.Timeout] = set()
        self._probe: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        return self._available.is_set()

    async def wait_available(self) -> None:
        await self._available.wait()

    async def open(self) -> None:
        await self._pool.open(wait=False)

    async def close(self) -> None:
        if self._probe:
            self._probe.cancel()
            with suppress(asyncio.CancelledError):
                await self._probe
        await self._pool.close()

    async def row(self, query: Query, params: Params = None) -> Row | None:
        """The first row, if any. Raises as `rows` does."""
        rows = await self.rows(query, params)
        return rows[0] if rows else None

    async def rows(self, query: Query, params: Params = None) -> list[Row]:
        """All rows of one statement. After a deadlock it runs again, up to three times in all.

        Raises Problem (unavailable), or psycopg.Error, which app/api/problems.py turns into a Problem.
        """
        for attempt in range(3):
            conn = await self._take()
            # `connection` and `deadline` would do the same, but their generators cost time.
            timer = abort_after(conn, ANSWER_TIMEOUT)
            try:
                return await conn.rows(query, params)
            except pg.DeadlockDetected:
                if attempt == 2:
                    raise
            finally:
                timer.cancel()
                await self._give_back(conn)
        raise AssertionError

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """A live connection. Raises Problem (unavailable) at once during an outage."""
        conn = await self._take()
        try:
            with deadline(conn, ANSWER_TIMEOUT):
                yield conn
        finally:
            await self._give_back(conn)

    async def _take(self) -> Connection:
        while True:
            if not self.available:
                raise unavailable()
            try:
                async with asyncio.timeout(None) as waiting:
                    self._waiting.add(waiting)
                    try:
                        conn = await self._pool.getconn()
                    finally:
                        self._waiting.discard(waiting)
            except TimeoutError:
                raise unavailable() from None
            if conn.usable:
                return conn
            await conn.close()
            await self._pool.putconn(conn)
            self._suspect()

    async def _give_back(self, conn: Connection) -> None:
        if conn.closed:
            self._suspect()
        await self._pool.putconn(conn)

    def _not_replaced(self, pool: AsyncConnectionPool[Connection]) -> None:
        if pool.get_stats()["pool_size"] == 0:
            self._begin_outage()
        self._suspect()

    def _suspect(self) -> None:
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._find_out())

    async def _find_out(self) -> None:
        pause, last_pause = PROBE_PAUSE
        while True:
            try:
                conn = await ServerConnection.connect(self._conninfo)
            except psycopg.Error as error:
                if self._pool.get_stats()["pool_size"] == 0:
                    self._begin_outage()
                log.warning("database_not_reached", error=str(error))
            else:
                await conn.close()
                break
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
            pause = min(pause * 2, last_pause)
        if not self.available:
            self._available.set()
            log.info("database_back")

    def _begin_outage(self) -> None:
        if self.available:
            self._available.clear()
            log.warning("database_down")
        now = asyncio.get_running_loop().time()
        for waiting in self._waiting:
            if not waiting.expired():
                waiting.reschedule(now)

"""The API's pool of connections. To take one and give it back needs no task and no lock: by psycopg_pool that
took 35 of the 340 us that a session costs the process.

1. The one that was given back last is taken first: its server process has its caches warm, and those that
   are not needed stay behind, and are closed.
2. Who finds none waits in line. One after the other is opened meanwhile, up to the most there may be; whoever
   is first in line gets what comes first, a new one or one given back.
3. One that is closed, in a transaction, or old is not used again. Another is opened when somebody waits.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psycopg
from psycopg import pq

from app.connection import Connection

LIFETIME = 3600.0  # seconds: a server process grows with what it has planned
LOOK = 600.0  # seconds between looks for what was not needed


class Pool:
    """`open_one` makes a connection; `failed` is called when it raised psycopg.Error."""

    def __init__(
        self, open_one: Callable[[], Awaitable[Connection]], most: int, failed: Callable[[], None]
    ) -> None:
        self.size = 0
        """Connections there are, also those that were taken."""
        self._open_one = open_one
        self._most = most
        self._failed = failed
        self._free: list[Connection] = []
        self._least_free = 0  # since the last look
        self._line: deque[asyncio.Future[Connection]] = deque()
        self._opening: asyncio.Task[None] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def open(self) -> None:
        """Begin to open the first."""
        self._grow()
        self._look = asyncio.get_running_loop().call_later(LOOK, self._close_unneeded)

    async def close(self) -> None:
        """Close all; those that were taken when they are given back."""
        self._closed = True
        if self._look:
            self._look.cancel()
        if self._opening:
            self._opening.cancel()
            with suppress(asyncio.CancelledError):
                await self._opening
        while self._free:
            self._end(self._free.pop())

    async def take(self, seconds: float) -> Connection:
        """One that may have died while nobody used it. Raises TimeoutError after so many seconds, or when
        `refuse` is called.
        """
        if self._free:
            conn = self._free.pop()
            self._least_free = min(self._least_free, len(self._free))
            return conn
        self._grow()
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Connection] = loop.create_future()
        self._line.append(waiting)
        timer = loop.call_later(seconds, _refuse, waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if not waiting.cancelled() and waiting.exception() is None:
                self.give_back(waiting.result())  # it came just now
            raise
        finally:
            timer.cancel()

    def give_back(self, conn: Connection) -> None:
        """To whoever is first in line."""
        idle = conn.pgconn.transaction_status == pq.TransactionStatus.IDLE
        if not idle or self._closed or conn.until < asyncio.get_running_loop().time():
            self._end(conn)
            return
        while self._line:
            waiting = self._line.popleft()
            if not waiting.done():
                waiting.set_result(conn)
                return
        self._free.append(conn)

    def refuse(self) -> None:
        """Let nobody wait any longer."""
        while self._line:
            _refuse(self._line.popleft())

    def _grow(self) -> None:
        if self._opening is None and self.size < self._most and not self._closed:
            self._opening = asyncio.create_task(self._add())

    async def _add(self) -> None:
        try:
            conn = await self._open_one()
        except psycopg.Error:
            self._failed()
            return
        finally:
            self._opening = None
        self.size += 1
        conn.until = asyncio.get_running_loop().time() + LIFETIME
        self.give_back(conn)
        if self._line:
            self._grow()

    def _end(self, conn: Connection) -> None:
        conn.pgconn.finish()  # all that psycopg's close() does, which is a coroutine
        self.size -= 1
        if self._line:
            self._grow()

    def _close_unneeded(self) -> None:
        """All but one of those that were never taken since the last look."""
        for conn in self._free[: min(self._least_free, self.size - 1)]:
            self._free.remove(conn)
            self._end(conn)
        self._least_free = len(self._free)
        self._look = asyncio.get_running_loop().call_later(LOOK, self._close_unneeded)


def _refuse(waiting: asyncio.Future[Connection]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())

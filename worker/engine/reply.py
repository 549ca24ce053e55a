"""The answer to the claim of a single row. The socket's callback reads it, so that the handler starts without
waiting for a task (docs/profile.md).
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import psycopg
from psycopg import pq

T = TypeVar("T")


class Reply(Generic[T]):
    """The server's answer to one statement. `arrived` is called as soon as the answer is complete."""

    def __init__(self, server: pq.abc.PGconn, arrived: Callable[[pq.abc.PGresult], T]) -> None:
        self._server = server
        self._arrived = arrived
        self._result: pq.abc.PGresult
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        """The result of `arrived`, or the exception that it raised, or psycopg.Error."""

    def read(self) -> bool:
        """Called when libpq has read something. Returns whether the answer is complete."""
        try:
            while not self._server.is_busy():
                if (result := self._server.get_result()) is None:  # ready for the next statement
                    self.done.set_result(self._arrived(self._result))
                    return True
                self._result = result
        except Exception as error:
            self._fail(error)
            return True
        return False

    def give_up(self) -> None:
        """The connection has ended."""
        if not self.done.done():
            self._fail(psycopg.OperationalError("the connection ended before its answer"))

    def _fail(self, error: Exception) -> None:
        self.done.set_exception(error)
        self.done.exception()  # mark it as seen: perhaps nobody waits any more

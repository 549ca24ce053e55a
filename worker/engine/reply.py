"""The answer to a lone row's claim, read by the socket's callback: no task is between it and the handler's
first line. Measured: from commit to start 1.24 to 1.15 of the floor, with what follows a start put behind it.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import psycopg
from psycopg import pq

T = TypeVar("T")


class Reply(Generic[T]):
    """What the server answers to one statement that was sent: `arrived` is called as soon as it is there."""

    def __init__(self, server: pq.abc.PGconn, arrived: Callable[[pq.abc.PGresult], T]) -> None:
        self._server = server
        self._arrived = arrived
        self._result: pq.abc.PGresult
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        """What `arrived` returned. Raises what that raised, or psycopg.Error."""

    def read(self) -> bool:
        """Called when libpq has read something; whether it was all of the answer."""
        try:
            while not self._server.is_busy():
                if (result := self._server.get_result()) is None:  # it is ready for the next statement
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
        self.done.exception()  # nobody may be waiting any more

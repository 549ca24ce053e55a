"""The answer to a lone row's claim, read by the socket's callback: no task is between it and the handler's
first line. Measured: from commit to start 1.24 to 1.15 of the floor, with what follows a start put behind it.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from psycopg import pq

T = TypeVar("T")

_AGAIN = 0.1
"""Seconds until it is read though nothing said that it came, as often as psycopg looks: uvloop does not call
the reader of a connection that was reset."""


class Reply(Generic[T]):
    """What the server answers to one statement that was sent. Nothing else may be sent before it is closed.

    `arrived` is called as soon as it is there.
    """

    def __init__(self, server: pq.abc.PGconn, arrived: Callable[[pq.abc.PGresult], T]) -> None:
        self._server = server
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._descriptor = server.socket
        self._result: pq.abc.PGresult
        self.done: asyncio.Future[T] = self._loop.create_future()
        """What `arrived` returned. Raises what that raised, or psycopg.OperationalError."""
        self._loop.add_reader(self._descriptor, self._read)
        self._timer = self._loop.call_later(_AGAIN, self._read_again)

    def _read(self) -> None:
        if self.done.done():
            return
        server = self._server
        try:
            server.consume_input()
            while not server.is_busy():
                if (result := server.get_result()) is None:  # it is ready for the next statement
                    self.done.set_result(self._arrived(self._result))
                    return
                self._result = result
        except Exception as error:
            self.done.set_exception(error)

    def _read_again(self) -> None:
        self._read()
        self._timer = self._loop.call_later(_AGAIN, self._read_again)

    def close(self) -> None:
        """Once it is done, or to forget it. Not done by `_read`: what has arrived is to begin first."""
        self._loop.remove_reader(self._descriptor)
        self._timer.cancel()
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # the connection is given up for this, or for another reason

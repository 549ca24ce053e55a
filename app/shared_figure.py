"""A figure of the database that any client may ask for. One query reads it for all of them.

One query runs at a time. Its answer serves for LEAST seconds, and for longer if the query took long. So the
questions cost the database a share of one connection at most, whoever asks and how often.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from outwake.app.context import Context
from outwake.app.database import Database

Figure = TypeVar("Figure")

LEAST = 1.0  # seconds
SHARE = 0.1  # of the time
MOST = 15.0  # seconds; what scrapes is used to no less


class Shared(Generic[Figure]):
    """The figure of each database."""

    def __init__(self, read: Callable[[Context], Awaitable[Figure]]) -> None:
        self._read = read
        self._found: WeakKeyDictionary[Database, tuple[Figure, float]] = WeakKeyDictionary()
        self._reading: WeakKeyDictionary[Database, asyncio.Task[None]] = WeakKeyDictionary()

    async def get(self, here: Context) -> Figure:
        """Raises as the reading does."""
        found = self._found.get(here.database)
        if found is None or time.monotonic() > found[1]:
            reading = self._reading.get(here.database)
            if reading is None or reading.done():
                reading = self._reading[here.database] = asyncio.create_task(self._renew(here))
            await asyncio.shield(reading)
            found = self._found[here.database]
        return found[0]

    async def _renew(self, here: Context) -> None:
        begun = time.monotonic()
        figure = await self._read(here)
        ended = time.monotonic()
        serves = min(max(LEAST, (ended - begun) / SHARE), MOST)
        self._found[here.database] = figure, ended + serves

"""Watches each session that a client follows, so that its changes are notified.

It is the handshake of outwake/_handshake.py. The flag is a row of `watcher`, for a session and the presence
of this process's LISTEN connection. The scan marks the session's streams as stale, so that they are read: a
read that starts after a transaction's end sees its changes. A new LISTEN connection has a new presence, so
all sessions start again at step 1, and the scan of step 3 reads what the lost connection was notified of.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import psycopg

from outwake._handshake import PAUSES, Handshake
from outwake.app.api.problems import Problem
from outwake.app.database import Database
from outwake.session.watch import UNWATCH, WATCH, WRITERS
from outwake.telemetry.log import get_logger

FAILURE_PAUSE = 0.5  # seconds after a failure

log = get_logger("outwake.app.live.watches")


@dataclass
class Watch:
    """The watches that are registered under the presence of one LISTEN connection."""

    presence: int
    ids: set[UUID] = field(default_factory=set)
    handshakes: list[tuple[Handshake, set[UUID]]] = field(default_factory=list)
    """Those that are not over, each with the sessions that began to be watched together."""


class Watches:
    """The watches of the process. A task must execute `run`.

    `followed` says which sessions are followed. `stale` is called with sessions that must be read.
    """

    def __init__(
        self, database: Database, followed: Callable[[], set[UUID]], stale: Callable[[set[UUID]], None]
    ) -> None:
        self.current: Watch | None = None
        """None while there is no LISTEN connection."""
        self._database = database
        self._followed = followed
        self._stale = stale
        self._to_do = asyncio.Event()

    def up(self, presence: int) -> None:
        """There is a LISTEN connection."""
        self.current = Watch(presence)
        self._to_do.set()

    def down(self) -> None:
        """It was lost."""
        self.current = None

    def followed_changed(self) -> None:
        self._to_do.set()

    async def run(self) -> None:
        """Keep the watches until cancelled."""
        first, last = PAUSES
        pause = first
        while True:
            handshakes = self.current is not None and bool(self.current.handshakes)
            try:
                async with asyncio.timeout(pause if handshakes else None):
                    await self._to_do.wait()
                pause = first
            except TimeoutError:
                pause = min(pause * 2, last)
            self._to_do.clear()
            watch = self.current  # the connection may be lost, or another, while these wait
            if watch is None:
                continue
            try:
                await self._update(watch)
                await self._proceed(watch)
            except (psycopg.Error, Problem) as error:
                log.warning("watch_failed", error=str(error))
                await self._database.wait_available()
                await asyncio.sleep(FAILURE_PAUSE)
                self._to_do.set()

    async def _update(self, watch: Watch) -> None:
        """Steps 1 and 2 for sessions that are not watched yet. It also removes unneeded watches."""
        followed = self._followed()
        unneeded, needed = watch.ids - followed, followed - watch.ids
        if unneeded:
            await self._database.rows(UNWATCH, (watch.presence, list(unneeded)))
            watch.ids -= unneeded
        if needed:
            await self._database.rows(WATCH, (list(needed), watch.presence))
            handshake = Handshake()
            handshake.saw(await self._writers())
            watch.handshakes.append((handshake, needed))
            watch.ids |= needed
            self._stale(needed)

    async def _proceed(self, watch: Watch) -> None:
        """Steps 3 and 4."""
        watch.handshakes = [(handshake, ids) for handshake, ids in watch.handshakes if not handshake.over]
        if not watch.handshakes:
            return
        writers = await self._writers()
        for handshake, ids in watch.handshakes:
            if handshake.saw(writers):
                self._stale(ids)
        watch.handshakes = [(handshake, ids) for handshake, ids in watch.handshakes if not handshake.over]

    async def _writers(self) -> list[str]:
        row = await self._database.row(WRITERS)
        assert row is not None
        writers: list[str] = row[0]
        return writers

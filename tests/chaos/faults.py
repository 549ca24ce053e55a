"""What is done to the parts, at random by a seed. The history is told when each fault begins and ends."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import psycopg

from outwake.embedded.postgres import EmbeddedPostgres
from tests.chaos.history import History
from tests.chaos.places import Place
from tests.support.proxy import Proxy

STORM, LULL = 14.0, 12.0
"""Seconds."""

Fault = Callable[[], Awaitable[None]]


@dataclass
class Faults:
    """The injector. `lease` in seconds, `pace` in faults a second."""

    server: EmbeddedPostgres
    url: str
    """Straight to the server."""
    places: list[Place]
    api: Place
    producers: Proxy
    history: History
    random: random.Random
    lease: float
    pace: float = 1.0
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: Any = field(default_factory=lambda: count(1))
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    _restarting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _prepared: list[str] = field(default_factory=list)
    _open: dict[asyncio.Task[None] | None, int] = field(default_factory=dict)

    async def run(self, seconds: float) -> None:
        """Inject for that time, then wait for the last to be over, and heal everything.

        Storms and lulls take turns: in a lull all must come back to life, and nothing excuses lateness.
        """
        menu: list[tuple[float, Fault]] = [
            (10, self.kill), (8, self.freeze), (8, self.roll),
            (2, self.crash_server), (2, self.restart_server), (8, self.terminate),
            (8, self.cut), (6, self.slow), (8, self.half_open), (6, self.partition),
            (5, self.long_writer), (4, self.prepare), (3, self.lock_table),
        ]  # fmt: skip
        began = time.monotonic()
        while (gone := time.monotonic() - began) < seconds:
            await asyncio.sleep(min(seconds - gone, self.random.expovariate(self.pace)))
            lull = (time.monotonic() - began) % (STORM + LULL) > STORM
            if len(self._running) < 4 and not lull:
                fault = self.random.choices([f for _, f in menu], [w for w, _ in menu])[0]
                task = asyncio.create_task(self._guarded(fault))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        await asyncio.gather(*self._running)
        await self.heal()

    async def _guarded(self, fault: Fault) -> None:
        try:
            with suppress(psycopg.Error, OSError):  # another fault was in its way
                await fault()
        finally:
            if (number := self._open.pop(asyncio.current_task(), None)) is not None:
                self.history.tell("healed", n=number)

    async def heal(self) -> None:
        """Everything works again."""
        async with self._restarting:
            await asyncio.to_thread(self.server.start)
        for place in (*self.places, self.api):
            await place.proxy.heal()
            for pid in place.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        await self.producers.heal()
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as conn:
            await self._end_prepared(conn)

    def _begin(self, kind: str, target: str) -> None:
        """Tell that this task's fault begins; _guarded tells when it is over."""
        number = next(self._numbers)
        self._open[asyncio.current_task()] = number
        self.counts[kind] += 1
        self.history.tell("fault", n=number, kind=kind, target=target)

    def _pick(self) -> Place:
        return self.random.choice(self.places)

    def _leases(self, least: float, most: float) -> float:
        return self.random.uniform(least, most) * self.lease

    # Processes.

    async def kill(self) -> None:
        """SIGKILL of a worker, of a parent, or of a parent's child."""
        place = self.api if self.random.random() < 0.1 else self._pick()
        if pids := place.pids():
            which = self.random.choice(pids)
            kind = "kill" if len(pids) == 1 else "kill parent" if which == pids[0] else "kill child"
            self._begin(f"{kind} of API" if place is self.api else kind, place.name)
            place.kill(which)

    async def freeze(self) -> None:
        """SIGSTOP, and SIGCONT after less or more than a lease."""
        place = self._pick()
        if not (pids := place.pids()):
            return
        pid = self.random.choice(pids)
        self._begin("freeze", place.name)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._leases(0.2, 3))
            finally:
                os.kill(pid, signal.SIGCONT)

    async def roll(self) -> None:
        """A rolling restart, sometimes with a second SIGTERM."""
        place = self._pick()
        self._begin("drain", place.name)
        await place.replace(hasten=self.random.choice([None, None, 0.0, 0.5]))

    # The server.

    async def crash_server(self) -> None:
        """Immediate stop, as a power cut is, and a start."""
        await self._bounce("server crash", "immediate")

    async def restart_server(self) -> None:
        """A fast restart, as an operator does."""
        await self._bounce("server restart", "fast")

    async def _bounce(self, kind: str, mode: str) -> None:
        if self._restarting.locked():
            return
        async with self._restarting:
            self._begin(kind, "postgres")
            proxies = [place.proxy for place in self.places]
            if refused := self.random.random() < 0.5:  # seen from the workers: refused, or accepted and cut
                for proxy in proxies:
                    proxy.refuse()
            await asyncio.to_thread(self.server.stop, "immediate" if mode == "immediate" else "fast")
            await asyncio.sleep(self.random.choice([0.0, 0.3, self._leases(0.5, 2)]))
            await asyncio.to_thread(self.server.start)
            if refused:
                for proxy in proxies:
                    await proxy.open()

    async def terminate(self) -> None:
        """pg_terminate_backend of some, whoever they are."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as conn:
            cursor = await conn.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND pid <> pg_backend_pid() AND application_name NOT LIKE 'chaos runner%' ORDER BY pid"
            )
            pids = [row[0] for row in await cursor.fetchall()]
            chosen = self.random.sample(pids, min(len(pids), self.random.choice([1, 2, 5])))
            self._begin("terminate backends", "all")
            await conn.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", (chosen,))

    async def long_writer(self) -> None:
        """A foreign transaction that writes to outbox and takes its time: parking has to wait for it."""
        self._begin("long writer", "none")
        async with await psycopg.AsyncConnection.connect(self.url) as conn:
            await conn.execute("UPDATE outbox SET priority = priority WHERE id = 0")
            await asyncio.sleep(self._leases(0.2, 2))
            await (conn.rollback() if self.random.random() < 0.5 else conn.commit())

    async def prepare(self) -> None:
        """PREPARE TRANSACTION of an insert, until a later fault or the end. Refused if it notified."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as conn:
            await self._end_prepared(conn)
            name = f"chaos-{next(self._numbers)}"
            self._begin("prepared transaction", "none")
            await conn.execute("BEGIN")
            await conn.execute(
                "INSERT INTO outbox (topic, payload) VALUES ('plain', '{\"tag\": \"prepared\"}')"
            )
            try:
                await conn.execute(f"PREPARE TRANSACTION '{name}'")
                self._prepared.append(name)
            except psycopg.errors.FeatureNotSupported:
                self.counts["prepare refused"] += 1

    async def _end_prepared(self, conn: psycopg.AsyncConnection[Any]) -> None:
        while self._prepared:
            end = self.random.choice(["COMMIT", "ROLLBACK"])
            await conn.execute(f"{end} PREPARED '{self._prepared[-1]}'")
            self._prepared.pop()

    async def lock_table(self) -> None:
        """A migration's lock: nobody reads or writes outbox for a while."""
        self._begin("table lock", "all")
        async with await psycopg.AsyncConnection.connect(self.url) as conn:
            await conn.execute("SET lock_timeout = '1s'")
            await conn.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(self._leases(0.05, 1.5))

    # The network.

    def _proxy(self) -> tuple[str, Proxy]:
        chance = self.random.random()
        if chance < 0.15:
            return "producers", self.producers
        place = self.api if chance < 0.25 else self._pick()
        return place.name, place.proxy

    async def cut(self) -> None:
        """RST on one connection, or all."""
        name, proxy = self._proxy()
        self._begin("cut", name)
        for connection in self._some(proxy):
            connection.cut()

    async def slow(self) -> None:
        """Delay or throttle."""
        name, proxy = self._proxy()
        self._begin("slow", name)
        chosen = self._some(proxy)
        for connection in chosen:
            if self.random.random() < 0.5:
                connection.delay = self.random.choice([0.05, 0.9, 1.5 * self.lease])
            else:
                connection.rate = self.random.choice([500.0, 5000.0])
        await asyncio.sleep(self._leases(0.5, 2))
        cut = self.random.random() < 0.4  # what was sent arrives, its answer does not
        for connection in chosen:
            connection.delay = connection.rate = 0.0
            if cut:
                connection.cut()

    async def half_open(self) -> None:
        """Bytes vanish in one or both directions; the sockets stay open until a reset ends it."""
        name, proxy = self._proxy()
        self._begin("half-open", name)
        up, down = self.random.choice([(True, False), (False, True), (True, True)])
        chosen = self._some(proxy)
        for connection in chosen:
            connection.swallow_up, connection.swallow_down = up, down
        await asyncio.sleep(self._leases(0.5, 3))
        for connection in chosen:
            connection.cut()

    async def partition(self) -> None:
        """Nothing of one worker comes through, old or new."""
        place = self._pick()
        self._begin("partition", place.name)
        proxy = place.proxy
        for connection in proxy.connections:
            connection.swallow_up = connection.swallow_down = True
        if self.random.random() < 0.5:
            proxy.refuse()
        else:
            proxy.swallow_new = True
        await asyncio.sleep(self._leases(0.5, 3))
        await proxy.heal()

    def _some(self, proxy: Proxy) -> list[Any]:
        found = list(proxy.connections)
        return found if self.random.random() < 0.4 or not found else [self.random.choice(found)]

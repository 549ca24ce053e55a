"""A worker's life: connect, register or reconnect, run cycles (worker/engine/cycle.py), drain, leave."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import timedelta
from random import uniform
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool

from outwake._claim import reconnect, register
from outwake._migrate import Fit, check_schema
from outwake.connect import (
    ServerConnection,
    check,
    connect,
    conninfo,
    deadline,
    grant,
    is_outage,
    will_not_pass,
)
from outwake.errors import SchemaError, WorkerEnded
from outwake.handler import Connection, Handler
from outwake.installed import has_sessions
from outwake.schema import in_schema
from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.telemetry.stuck import StuckWatch
from outwake.worker.engine.attempt import Stop
from outwake.worker.engine.background import BackgroundScan
from outwake.worker.engine.backup import Backup
from outwake.worker.engine.claims import Claims
from outwake.worker.engine.cursor import Cursors
from outwake.worker.engine.cycle import Cycle
from outwake.worker.engine.inbox import Inbox
from outwake.worker.engine.lease import Lease
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.metrics import STATS, Snapshot
from outwake.worker.engine.observer import WorkerObserver
from outwake.worker.engine.parking import Parking, Stage
from outwake.worker.engine.parts import Link, Parts
from outwake.worker.engine.payload import read_payload
from outwake.worker.engine.probe import Probe
from outwake.worker.engine.running import Running
from outwake.worker.engine.timers import Timers
from outwake.worker.engine.wakes import Reason, Wakes

log = get_logger(__name__)

_RETRY_FIRST, _RETRY_LAST = 0.1, 5.0
"""The first pause before a reconnect, and the longest, in seconds."""

_ROLE = in_schema(":schema_worker")
_SEES_NOTHING = in_schema("""
SELECT row_security_active(c.oid) AND NOT coalesce(pg_has_role(to_regrole(':schema_worker'), 'USAGE'), false)
FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace(':schema') AND c.relname = 'outbox'
""")
_LEAVE = in_schema(
    "UPDATE :schema.worker"
    " SET ended_at = clock_timestamp(), end_reason = 'left', parked = false, lease_until = NULL"
    " WHERE id = %s AND ended_at IS NULL"
)


class Worker:
    """Claims rows of its handlers' topics, and runs up to `concurrency` of them at once."""

    def __init__(
        self,
        settings: Settings,
        handlers: Mapping[str, Handler],
        concurrency: int,
        observer: WorkerObserver | None = None,
    ) -> None:
        self.connected = False
        self.report: Callable[[str, str], None] = lambda word, value: None
        """Passes news on to a parent (worker/engine/processes.py)."""
        self.inbox: Inbox
        """Where the notifications of the present connection arrive."""
        self._settings = settings
        self._lease_time = timedelta(seconds=settings.lease)
        self._schema: Fit = "current"
        self._presence: int | None = None  # of the last connection
        self._own_pool = _pool(settings, concurrency, shared=False)
        self._shared_pool = _pool(settings, concurrency, shared=True)
        self.parts = self._make(dict(handlers), concurrency, observer or WorkerObserver())

    def _make(self, handlers: dict[str, Handler], concurrency: int, observer: WorkerObserver) -> Parts:
        settings, stats = self._settings, STATS
        stats.topics = sorted(handlers)
        parking, cursors = Parking(), Cursors()
        wakes = Wakes(parking, stats)
        lease = Lease(settings.lease, settings.outage_grace, self._lease_lost)

        def pool_for(handler: Handler) -> Callable[[], Any]:
            return self._own_pool.connection if handler.built_in else self._shared_pool.connection

        return Parts(
            settings=settings,
            handlers=handlers,
            topics=deque(sorted(handlers)),
            running=Running(handlers, concurrency, lease, pool_for, wakes.event.set, stats),
            lease=lease,
            parking=parking,
            wakes=wakes,
            timers=Timers(),
            probe=Probe(settings.listen_probe, settings.lease),
            backup=Backup(),
            cursors=cursors,
            background=BackgroundScan(
                cursors, self._own_pool.connection, lambda: wakes.wake(Reason.BACKGROUND)
            ),
            stuck=StuckWatch(settings, self._own_pool.connection),
            stats=stats,
            observer=observer,
        )

    @property
    def id(self) -> UUID | None:
        """The id of this life."""
        return self.parts.running.worker_id

    @property
    def draining(self) -> bool:
        """Whether it claims nothing more."""
        return self.parts.running.draining

    async def run(self) -> None:
        """Work until drained. Reconnect for as long as that takes.

        Raises SchemaError if the schema does not fit this code, or if the database role lacks a right.
        """
        concurrency = self.parts.running.concurrency
        # One thread for each blocking handler, because each claimed row must be able to start.
        threads = ThreadPoolExecutor(concurrency + 4, thread_name_prefix="handler")
        asyncio.get_running_loop().set_default_executor(threads)
        async with self._own_pool, self._shared_pool:
            try:
                await self._live()
            finally:
                self.parts.lease.close()
                await self.parts.stuck.close()
                await self.parts.background.close()

    async def _live(self) -> None:
        running = self.parts.running
        delay = _RETRY_FIRST
        longest = min(_RETRY_LAST, self._settings.lease / 3)  # in an outage each refusal is worth a lease
        while True:
            try:
                await self._while_connected()
                return
            except WorkerEnded as ended:
                self._start_anew(str(ended))
                delay = _RETRY_FIRST
            except (psycopg.Error, OSError) as error:
                if not running.attempts and (reason := will_not_pass(error, self._grant())):
                    raise SchemaError(reason) from error
                delay = _RETRY_FIRST if self.connected else min(delay * 2, longest)
                await self._disconnected(error, delay)
                nothing_left = running.stops_all or not running.outcomes
                if running.draining and nothing_left and not running.attempts:
                    log.warning("stopped_disconnected", unwritten=len(running.outcomes))
                    return

    async def _while_connected(self) -> None:
        settings, parts = self._settings, self.parts
        await parts.observer.step("connect")
        async with AsyncExitStack() as stack:
            listener = await Listener.open(settings.listen_url, self._lease_time, self._heard, self._presence)
            self._presence = listener.presence
            stack.push_async_callback(listener.close)
            control = await connect(
                settings.database_url, "outwake worker", self._lease_time, pooled=settings.pooled
            )
            stack.push_async_callback(control.close)
            set_json_loads(read_payload, control)
            with deadline(control, settings.lease):
                cycle = await self._introduce(control, listener)
                stack.push_async_callback(cycle.claimer.close)
                await parts.stuck.first_look(control)
            listener.start(parts.wakes.event.set)
            self._set_connected(True)
            parts.stats.count("outwake_worker_connects")
            parts.stats.woken("reconnect")
            await cycle.run()
            await parts.observer.step("leave")
            with deadline(control, settings.lease):
                await self._leave(control)

    async def _introduce(self, control: Connection, listener: Listener) -> Cycle:
        """Register, or reconnect, with the presence of this LISTEN connection; learn of cancels we missed."""
        await self._check_schema(control)
        parts, running = self.parts, self.parts.running
        parts.parking.wake()
        parts.wakes.reset()
        parts.timers.reset()
        parts.probe.reset()
        known = running.worker_id
        if known is None:
            running.worker_id = worker_id = await register(
                control, sorted(parts.topics), concurrency=running.concurrency, presence=listener.presence
            )
            log.info("registered", worker_id=str(worker_id), topics=sorted(parts.topics))
        else:
            worker_id = known
            back = await reconnect(control, worker_id, listener.presence, running.tokens())
            if back:
                log.warning("claim_lost", worker_id=str(worker_id), rows=sorted(back))
        pooled = self._settings.pooled
        claims = Claims(control, listener, worker_id, self._lease_time, pooled=pooled)
        link = Link(worker_id, control, listener, claims)
        cycle = Cycle(parts, link, lambda: self._check_schema(control))
        self.inbox = Inbox(
            listener.presence,
            parts.handlers,
            running,
            parts.parking,
            parts.wakes,
            parts.timers,
            parts.probe,
            parts.backup,
            cycle.fastpath.announced,
        )
        if known is not None:
            if running.attempts:
                await cycle.due.renew()
            log.info("reconnected", worker_id=str(worker_id), running=len(running.attempts))
        await claims.prepare()
        return cycle

    def _heard(self, channel: str, payload: str) -> None:
        self.inbox.heard(channel, payload)
        self.parts.observer.heard(channel, payload)

    async def _check_schema(self, control: Connection) -> None:
        """Drop the topics whose tables do not exist. Raises SchemaError if no topic is left, or if the schema
        does not fit.
        """
        await self._check_role(control)
        handlers, topics = self.parts.handlers, self.parts.topics
        needed = sorted({handler.line for handler in handlers.values()})
        if "session" in needed and len(needed) > 1 and not await has_sessions(control):
            for topic in [topic for topic, handler in handlers.items() if handler.line == "session"]:
                del handlers[topic]
                topics.remove(topic)
            self.parts.stats.topics = sorted(handlers)
            needed.remove("session")
            log.info("no_sessions", topics=sorted(handlers))
        schema = await check_schema(control, needed)
        if schema != self._schema:
            log.warning("schema_differs", schema=schema)
        self._schema = schema

    async def _check_role(self, control: Connection) -> None:
        """Check the role now, because no error may follow: a role that was granted the tables directly sees
        no row. Raises SchemaError.
        """
        cursor = await control.execute(_SEES_NOTHING)
        found = await cursor.fetchone()
        if found is not None and found[0]:
            raise SchemaError(f"its database role may not run a worker: {self._grant()}")

    def _grant(self) -> str:
        again = in_schema("SELECT :schema.grant_roles()")
        return f"{grant(_ROLE, self._settings.database_url)}; if it is a member, {again} as the owner"

    async def _disconnected(self, error: Exception, delay: float) -> None:
        # A terminated session does not prove that the server is down. The next refusal does.
        if is_outage(error) and not isinstance(error, psycopg.errors.AdminShutdown):
            self.parts.lease.outage()
        self._set_connected(False)
        pause = uniform(delay / 2, delay)  # noqa: S311 - jitter: not all workers at once
        log.warning("disconnected", error=str(error).strip(), retry_in=round(pause, 3))
        await asyncio.sleep(pause)

    def _start_anew(self, reason: str) -> None:
        running = self.parts.running
        log.warning("lease_ended", worker_id=str(self.id), reason=reason, running=len(running.attempts))
        running.end_life()
        self._set_connected(False)

    async def _leave(self, control: Connection) -> None:
        """End this life. Nothing runs, so there is nothing to rescue."""
        await control.execute(_LEAVE, (self.id,))
        log.info("stopped", worker_id=str(self.id))

    def _set_connected(self, connected: bool) -> None:
        self.connected = connected
        self.report("connected", "yes" if connected else "no")
        if connected:
            self.report("id", str(self.id))

    def _lease_lost(self) -> None:
        running = self.parts.running
        if running.attempts:
            self.parts.stats.count("outwake_worker_leases_lost")
            log.error("lease_lost", worker_id=str(self.id), running=len(running.attempts))
            running.stop(Stop.LOST)

    def drain(self) -> None:
        """Claim nothing more and let running rows finish. The second call hands them back at once."""
        running, grace = self.parts.running, self._settings.drain_grace
        if running.draining:
            running.stop(Stop.DRAIN)
        else:
            log.info("draining", running=len(running.attempts), grace=grace)
            asyncio.get_running_loop().call_later(grace, running.stop, Stop.DRAIN)
        running.draining = True
        self.parts.wakes.event.set()

    def readiness(self) -> dict[str, Any]:
        """The state that a health check shows. It comes from memory: a check must not wake the database."""
        return {
            "ready": self.connected,
            "worker_id": None if self.id is None else str(self.id),
            "stage": self.parts.parking.stage.value,
            "running": len(self.parts.running.attempts),
            "draining": self.draining,
            "schema": self._schema,
        }

    async def snapshot(self) -> Snapshot:
        """The counters and the gauges' values now, for metrics. It comes from memory, like `readiness`."""
        running = self.parts.running
        return self.parts.stats.snapshot(
            {
                "outwake_worker_listen_connected": self.connected,
                "outwake_worker_processes": 1,
                "outwake_worker_parked": self.parts.parking.stage is Stage.PARKED,
                "outwake_worker_running": len(running.attempts),
                "outwake_worker_slots": running.concurrency,
            }
        )


def _pool(settings: Settings, concurrency: int, *, shared: bool) -> AsyncConnectionPool[ServerConnection]:
    """Connections for jobs. `shared`: a user's code runs on them too."""
    return AsyncConnectionPool[ServerConnection](
        conninfo(
            settings.database_url,
            "outwake worker job",
            timedelta(seconds=settings.lease),
            pooled=settings.pooled,
            shared=shared,
        ),
        connection_class=ServerConnection,
        kwargs={
            "autocommit": True,
            "prepare_threshold": None if settings.pooled else 2,
            "shared": shared,
        },
        check=check,
        min_size=0,
        max_size=min(concurrency, 20) + 2,
        open=False,
    )

"""The worker's loop. One task does all of the worker's work on the database, so nothing here races.

The loop sleeps until something happens: a notification, a handler that ended, the next deadline, or a lost
connection. Then it runs one cycle (a "turn"):

1. If a notification named a single ("lone") row while the worker slept, the worker claims that row by its id
   before anything else, because a full scan (a "look") takes twice as long. If the notification names another
   worker, this one only arms a backup timer ("standby", worker/engine/backup.py).
2. If the lease is due, it is renewed. If a rescue is due, it is done.
3. What handlers left is finalized ("settled"): failures, hand-backs and cancels. Completed rows are ended
   together with the next claim, in one commit and one round trip.
4. Free slots are filled. The worker claims while rows keep coming, and parks when none comes
   (worker/engine/parking.py). Under load it sends the next claim before it reads the rows of the last.
5. Before the worker sleeps with free slots, it asks for the next deadline of any kind.
"""

import asyncio
import math
import re
import time
from collections import Counter, deque
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
from pydantic_core import from_json

from outwake._claim import Claimed, reconnect, register, renew
from outwake._migrate import Fit, check_schema
from outwake.connect import bounded, connect, conninfo, cut_after, grant, is_outage, will_not_pass
from outwake.errors import SchemaError, WorkerEnded
from outwake.handler import Connection, Handler, Job
from outwake.installed import has_sessions
from outwake.schema import in_schema
from outwake.settings import Settings
from outwake.telemetry.log import debugging, get_logger
from outwake.telemetry.stuck import StuckWatch
from outwake.worker.engine.background import Scout
from outwake.worker.engine.backup import Standby
from outwake.worker.engine.claims import Answer, Claims
from outwake.worker.engine.cursor import Front, Look
from outwake.worker.engine.finalize import settle
from outwake.worker.engine.lease import Lease
from outwake.worker.engine.listen import CANCEL, PROBE, WAKE, Listener
from outwake.worker.engine.metrics import STATS, Snapshot
from outwake.worker.engine.parking import AWAKE, PARKED, SETTLING, Parking
from outwake.worker.engine.reply import Reply
from outwake.worker.engine.running import Attempt, End, Outcome, Stop

log = get_logger(__name__)

_BUSY = 0.005
"""A worker that is woken again within this many seconds does not stay parked: see _stay_parked."""

_NAP_FIRST, _NAP_LAST, _AWAKE = 0.002, 0.008, 0.25
"""Idle backoff, in seconds. When a scan left slots free, an awake worker naps before the next, twice as long
each time. Rows that come meanwhile are claimed together, and producers need not notify. It parks when naps up
to _NAP_LAST brought no row and its slots were last full _AWAKE ago. Each park leaves dead versions of its
row, which every insert that checks the flags reads past while somebody holds an old snapshot."""

_SMALL = 50
"""Up to this many rows, a cycle is not halved: its fixed cost is more than halves save (docs/profile.md)."""

_RETRY_FIRST, _RETRY_LAST = 0.1, 5.0
_LOOK_FIRST, _LOOK_LAST = 0.002, 1.0

_ROLE = in_schema(":schema_worker")
_SEES_NOTHING = in_schema("""
SELECT row_security_active(c.oid) AND NOT coalesce(pg_has_role(to_regrole(':schema_worker'), 'USAGE'), false)
FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace(':schema') AND c.relname = 'outbox'
""")
_STAND_IN = in_schema("SELECT :schema.outbox_stand_in(%s, %s)")
_PASS_ON = in_schema("SELECT :schema.outbox_pass_on(%s)")
_PARK = in_schema("SELECT :schema.outbox_park(%s)")
_WRITERS = in_schema("SELECT :schema.outbox_writers()")
_NEXT_DEADLINE = in_schema(
    "SELECT extract(epoch FROM row_due)::float8, extract(epoch FROM lease_end)::float8,"
    " extract(epoch FROM server_time)::float8"
    " FROM :schema.outbox_next_deadline(%s, %s, %s, %s)"
)
_RESCUE = in_schema("SELECT :schema.outbox_rescue(%s, %s, %s)")
_TELL_DRAINING = in_schema(
    "UPDATE :schema.worker SET draining = true, parked = false WHERE id = %s AND ended_at IS NULL"
)
_LEAVE = in_schema(
    "UPDATE :schema.worker"
    " SET ended_at = clock_timestamp(), end_reason = 'left', parked = false, lease_until = NULL"
    " WHERE id = %s AND ended_at IS NULL"
)

_OF_OTHERS = re.compile(r"[a-z][a-z0-9_.-]*|#[0-9a-f-]{36}")
"""The target of a notification that is not for this worker: a topic, or a worker."""


class Worker:
    """Claims rows of its handlers' topics, and runs up to `concurrency` of them at once."""

    def __init__(self, settings: Settings, handlers: Mapping[str, Handler], concurrency: int) -> None:
        self.id: UUID | None = None
        self.connected = False
        self.draining = False
        self.tell: Callable[[str, str], None] = lambda word, value: None
        """Passes news on to a parent (worker/engine/processes.py)."""
        self._settings = settings
        self._handlers = handlers
        self._topics = deque(sorted(handlers))
        self._concurrency = concurrency
        self._lease_time = timedelta(seconds=settings.lease)
        self._lease = Lease(settings.lease, settings.outage_grace, self._lease_lost)
        self._running: dict[int, Attempt] = {}
        self._ended: list[Outcome] = []
        self._parking = Parking()
        self._front = Front()
        self._event = asyncio.Event()
        self._look = True
        self._renew_asked = False
        """Set when a cancel was not understood: the renewal learns from the table which row it is for."""
        self._puzzling: set[str] = set()
        """Channels on which a notification was not understood."""
        self._told: list[int] = []
        """Single rows that notifications named since the last cycle, and those that it claims as a backup."""
        self._standby = Standby()
        self._flag_taken_down = False
        """Set when a notification says that our parked flag was cleared, or that our life was ended."""
        self._all_called = False
        """Set when a notification is for all workers. A migration sends one: the schema may have changed."""
        self._asleep = False
        """Whether the loop's task waits for its event: no query is under way on its connection then."""
        self._asked: Reply[Claimed | None] | None = None
        """A single row's claim under way on the LISTEN connection. A cycle awaits its answer first."""
        self._arriving = 0
        """How many rows are claimed but not read yet."""
        self._reading: asyncio.Task[int] | None = None
        self._asked_at = -math.inf
        """When `_look` last caused a scan. A background scan does not set it: each would cause the next."""
        self._scouted = False
        self._told_draining = False
        self._stats = STATS
        self._stats.topics = sorted(handlers)
        self._full_stop = False
        self._schema: Fit = "current"
        self._control: Connection
        self._claims: Claims
        self._listener: Listener
        self._presence: int | None = None  # of the last connection
        # Deadlines on the monotonic clock. look_at: a row falls due, or a scan is to be repeated.
        self._look_at = math.inf
        self._rescue_at = math.inf
        self._announced = math.inf
        self._probe_at = math.inf
        self._probe_sent: str | None = None
        self._look_again = _LOOK_FIRST
        self._woken_at = -math.inf
        self._nap = 0.0
        self._filled_at = -math.inf
        self._clock_offset = 0.0
        self._own_pool, self._shared_pool = (
            AsyncConnectionPool[Connection](
                conninfo(
                    settings.database_url,
                    "outwake worker job",
                    self._lease_time,
                    pooled=settings.pooled,
                    shared=shared,
                ),
                kwargs={"autocommit": True, "prepare_threshold": None if settings.pooled else 2},
                min_size=0,
                max_size=min(concurrency, 20) + 2,
                open=False,
            )
            for shared in (False, True)
        )
        self._stuck = StuckWatch(settings, self._own_pool.connection)
        self._scout = Scout(self._front, self._own_pool.connection, self._scout_is_back)

    # The life of the worker.

    async def run(self) -> None:
        """Work until drained. Reconnect for as long as that takes.

        Raises SchemaError if the schema does not fit this code, or if the database role lacks a right.
        """
        delay = _RETRY_FIRST
        longest = min(_RETRY_LAST, self._settings.lease / 3)  # in an outage each refusal is worth a lease
        # One thread for each blocking handler, because each claimed row must be able to start.
        threads = ThreadPoolExecutor(self._concurrency + 4, thread_name_prefix="handler")
        asyncio.get_running_loop().set_default_executor(threads)
        async with self._own_pool, self._shared_pool:
            try:
                while True:
                    try:
                        await self._while_connected()
                        return
                    except WorkerEnded as ended:
                        self._start_anew(str(ended))
                        delay = _RETRY_FIRST
                    except (psycopg.Error, OSError) as error:
                        if not self._running and (reason := will_not_pass(error, self._grant())):
                            raise SchemaError(reason) from error
                        delay = _RETRY_FIRST if self.connected else min(delay * 2, longest)
                        await self._disconnected(error, delay)
                        nothing_left = self._full_stop or not self._ended
                        if self.draining and nothing_left and not self._running:
                            log.warning("stopped_disconnected", unsettled=len(self._ended))
                            return
            finally:
                self._lease.close()
                await self._stuck.close()
                await self._scout.close()

    async def _while_connected(self) -> None:
        settings = self._settings
        async with AsyncExitStack() as stack:
            self._listener = await Listener.open(
                settings.listen_url, self._lease_time, self._heard, self._presence
            )
            self._presence = self._listener.presence
            stack.push_async_callback(self._listener.close)
            self._control = await connect(
                settings.database_url, "outwake worker", self._lease_time, pooled=settings.pooled
            )
            stack.push_async_callback(self._control.close)
            set_json_loads(from_json, self._control)  # faster than json.loads
            with bounded(self._control, settings.lease):
                await self._introduce()
                await self._stuck.first_look(self._control)
            self._listener.start(self._event.set)
            self._set_connected(True)
            self._stats.count("outwake_worker_connects")
            self._stats.woken("reconnect")
            await self._turns()

    async def _introduce(self) -> None:
        """Register, or reconnect, with the presence of this LISTEN connection; learn of cancels we missed."""
        await self._check_schema()
        self._parking.wake()
        self._asked = None
        self._look, self._look_at, self._rescue_at = True, math.inf, math.inf
        self._probe_sent, self._probe_at = None, self._next_probe()
        if self.id is None:
            self.id = await register(
                self._control,
                sorted(self._topics),
                concurrency=self._concurrency,
                presence=self._listener.presence,
            )
            log.info("registered", worker_id=str(self.id), topics=sorted(self._topics))
        else:
            await self._have_read()
            mine = [a.job.token for a in self._running.values()] + [o.job.token for o in self._ended]
            back = await reconnect(self._control, self.id, self._listener.presence, mine)
            if back:
                log.warning("claim_lost", worker_id=str(self.id), rows=sorted(back))
            if self._running:
                await self._renew()
            log.info("reconnected", worker_id=str(self.id), running=len(self._running))
        self._claims = Claims(
            self._control, self._listener, self.id, self._lease_time, pooled=self._settings.pooled
        )
        await self._claims.prepare()

    async def _check_schema(self) -> None:
        """Drop the topics whose tables do not exist. Raises SchemaError if no topic is left, or if the schema
        does not fit.
        """
        await self._check_role()
        needed = sorted({handler.line for handler in self._handlers.values()})
        if "session" in needed and len(needed) > 1 and not await has_sessions(self._control):
            self._handlers = {t: h for t, h in self._handlers.items() if h.line != "session"}
            self._topics = deque(sorted(self._handlers))
            self._stats.topics = sorted(self._handlers)
            needed.remove("session")
            log.info("no_sessions", topics=sorted(self._handlers))
        schema = await check_schema(self._control, needed)
        if schema != self._schema:
            log.warning("schema_differs", schema=schema)
        self._schema = schema

    async def _check_role(self) -> None:
        """Check the role now, because no error may follow: a role that was granted the tables directly sees
        no row. Raises SchemaError.
        """
        cursor = await self._control.execute(_SEES_NOTHING)
        found = await cursor.fetchone()
        if found is not None and found[0]:
            raise SchemaError(f"its database role may not run a worker: {self._grant()}")

    def _grant(self) -> str:
        again = in_schema("SELECT :schema.grant_roles()")
        return f"{grant(_ROLE, self._settings.database_url)}; if it is a member, {again} as the owner"

    async def _disconnected(self, error: Exception, delay: float) -> None:
        # A terminated session does not prove that the server is down. The next refusal does.
        if is_outage(error) and not isinstance(error, psycopg.errors.AdminShutdown):
            self._lease.outage()
        self._set_connected(False)
        pause = uniform(delay / 2, delay)  # noqa: S311 - jitter: not all workers at once
        log.warning("disconnected", error=str(error).strip(), retry_in=round(pause, 3))
        await asyncio.sleep(pause)

    def _start_anew(self, reason: str) -> None:
        log.warning("lease_ended", worker_id=str(self.id), reason=reason, running=len(self._running))
        for attempt in self._running.values():
            attempt.stop(Stop.FENCED)
        self._ended.clear()
        self._set_connected(False)
        self.id = None

    def _set_connected(self, connected: bool) -> None:
        self.connected = connected
        self.tell("connected", "yes" if connected else "no")
        if connected:
            self.tell("id", str(self.id))

    def readiness(self) -> dict[str, Any]:
        """The state that a health check shows. It comes from memory: a check must not wake the database."""
        return {
            "ready": self.connected,
            "worker_id": None if self.id is None else str(self.id),
            "stage": self._parking.stage.value,
            "running": len(self._running),
            "draining": self.draining,
            "schema": self._schema,
        }

    async def snapshot(self) -> Snapshot:
        """The counters and the gauges' values now, for metrics. It comes from memory, like `readiness`."""
        return self._stats.snapshot(
            {
                "outwake_worker_listen_connected": self.connected,
                "outwake_worker_processes": 1,
                "outwake_worker_parked": self._parking.stage is PARKED,
                "outwake_worker_running": len(self._running),
                "outwake_worker_slots": self._concurrency,
            }
        )

    def drain(self) -> None:
        """Claim nothing more and let running rows finish. The second call hands them back at once."""
        if self.draining:
            self._stop_all(Stop.DRAIN)
        else:
            log.info("draining", running=len(self._running), grace=self._settings.drain_grace)
            asyncio.get_running_loop().call_later(self._settings.drain_grace, self._stop_all, Stop.DRAIN)
        self.draining = True
        self._event.set()

    def _stop_all(self, cause: Stop) -> None:
        for attempt in self._running.values():
            attempt.stop(cause)
        if cause is Stop.DRAIN:
            self._full_stop = True

    def _lease_lost(self) -> None:
        if self._running:
            self._stats.count("outwake_worker_leases_lost")
            log.error("lease_lost", worker_id=str(self.id), running=len(self._running))
            self._stop_all(Stop.LOST)

    # Notifications and other events.

    def _heard(self, channel: str, payload: str) -> None:
        try:
            self._understand(channel, payload)
        except (ValueError, OverflowError):
            self._not_understood(channel, payload)

    def _not_understood(self, channel: str, payload: str) -> None:
        """A newer version may send more, and anybody may NOTIFY anything. So it means: scan."""
        if channel not in self._puzzling:
            self._puzzling.add(channel)
            log.info("not_understood", channel=channel, payload=payload[:200])
        if channel == WAKE:
            self._look = True
            self._wake()
        elif channel == CANCEL:
            self._renew_asked = True
            self._event.set()

    def _understand(self, channel: str, payload: str) -> None:
        """Act on a notification. If it raises ValueError or OverflowError, nothing has been done."""
        if channel == WAKE:
            topic, _, due = payload.rpartition("@")
            if topic not in self._handlers and topic not in ("*", f"#{self.id}"):
                if not _OF_OTHERS.fullmatch(topic):
                    raise ValueError(payload)
                return
            due, _, lone = due.partition("#")
            if due != "0":  # due later: bring the timer forward, without a query
                self._bring_forward(int(due) / 1000)
            elif not lone:
                self._flag_taken_down |= topic.startswith("#")
                self._all_called |= topic == "*"
                self._look = True
                self._wake()
            else:
                self._heard_of(*_lone(lone))
        elif channel == CANCEL:
            if (attempt := self._running.get(int(payload))) is not None:
                attempt.stop(Stop.CANCEL)
        elif channel == PROBE and payload == self._probe_sent:
            self._probe_sent, self._probe_at = None, self._next_probe()

    def _wake(self) -> None:
        self._woken("notify")
        self._event.set()

    def _heard_of(self, row_id: int, named: int | None, asleep: int) -> None:
        """A single row was announced, for the worker of that presence among `asleep`, or for any (None)."""
        if named is None or named == self._listener.presence:
            if named is not None:
                self._standby.own.add(row_id)
            if not self._ask_for(row_id):
                self._told.append(row_id)
            self._wake()
        elif self._parking.stage is not AWAKE and self._standby.stand_by(
            row_id, named, asleep, time.monotonic()
        ):
            self._event.set()  # for the timer

    def _ask_for(self, row_id: int) -> bool:
        """Step 1, before the loop's task wakes, so that the server starts earlier. Whether it was sent."""
        now = time.monotonic()
        if not self._asleep or self._event.is_set() or self._look or self._told or not self._is_lone(now):
            return False
        try:
            self._ask(row_id, now)
        except psycopg.Error:  # the cycle meets the error too
            return False
        return True

    def _ask(self, row_id: int, now: float) -> None:
        self._asked = self._claims.row(row_id, self._row_came)
        self._woken_at = now

    def _row_came(self, row: Claimed | None, still_there: bool) -> Claimed | None:
        self._look |= still_there
        if row is not None:
            self._start([row], self._woken_at)
        return row

    def _is_lone(self, now: float) -> bool:
        """Whether to claim a row that is announced now by its id. Not if it takes the last free slot, because
        the worker is not parked then. Not if the worker was woken a moment ago: there is load.
        """
        return self._parking.stage is PARKED and now - self._woken_at > _BUSY and self._free() > 1

    def _bring_forward(self, due: float) -> None:
        """`due` is by the server's clock. A row or a lease may be due then, so both timers are set."""
        at = due - self._clock_offset
        self._announced = min(self._announced, at)
        if at < min(self._look_at, self._rescue_at):
            self._look_at = self._rescue_at = at
            self._event.set()

    def _scout_is_back(self) -> None:
        self._scouted = True
        self._event.set()

    def _woken(self, cause: str) -> None:
        if self._parking.stage is not AWAKE:
            self._stats.woken(cause)

    def _attempt_ended(self, attempt: Attempt, outcome: Outcome) -> None:
        if self._running.get(attempt.job.row.id) is attempt:
            del self._running[attempt.job.row.id]
        self._stats.ran(attempt.job.row.topic, time.monotonic() - attempt.started_at)
        if outcome.job.worker_id == self.id:
            self._ended.append(outcome)
        self._event.set()

    # The cycles.

    async def _turns(self) -> None:
        while True:
            self._listener.check()
            timer = cut_after(self._control, self._settings.lease)
            try:
                await self._turn()
            except psycopg.errors.DeadlockDetected as error:
                log.warning("deadlock", error=str(error).strip())
                self._look = True
                continue  # the statement was rolled back: the next cycle repeats it
            finally:
                timer.cancel()
            if self.draining and not self._running and not self._ended and not self._arriving:
                with bounded(self._control, self._settings.lease):
                    await self._leave()
                return
            await self._sleep()

    async def _turn(self) -> None:
        if self._flag_taken_down:
            self._flag_taken_down = False
            self._parking.wake()
        if self._all_called:
            self._all_called = False
            await self._check_schema()
        await self._take_told()
        now = time.monotonic()
        if self._running and (self._renew_asked or now >= self._lease.renew_at):
            await self._renew()
        if now >= self._rescue_at:
            await self._rescue()
        if now >= self._probe_at:
            await self._probe()
        if now >= self._look_at:
            self._woken("deadline")
            self._look = True
        if now >= self._standby.ask_at and self._free():
            await self._stand_in(now)
        if self.draining and not self._told_draining:
            await self._tell_draining()
        await self._settle()
        await self._fill()
        if self._standby.own:
            await self._pass_on()

    async def _sleep(self) -> None:
        if self._nap:
            await asyncio.sleep(self._nap)
            self._event.clear()
            return
        if self._look and self._free():  # rows keep coming; handlers run while the next claim is under way
            self._event.clear()
            return
        await self._have_read()  # the running rows decide how long it may sleep
        until = min(self._rescue_at, self._probe_at)
        if self._free():  # without a free slot, a due row could not start
            until = min(until, self._look_at, self._standby.ask_at)
        if self._running:
            until = min(until, self._lease.renew_at)
        if not self._event.is_set():
            timer = None
            if until < math.inf:
                wait = max(0.0, until - time.monotonic())
                timer = asyncio.get_running_loop().call_later(wait, self._event.set)
            self._asleep = True
            await self._event.wait()
            self._asleep = False
            if timer is not None:
                timer.cancel()
        self._event.clear()

    def _free(self) -> int:
        return 0 if self.draining else self._concurrency - len(self._running) - self._arriving

    async def _take_told(self) -> None:
        """Step 1. If several rows were announced, or _is_lone says no, the worker scans fully instead."""
        told, self._told = self._told, []
        if self._asked is not None:
            self._look |= bool(told)
        elif told and not self._look:
            now = time.monotonic()
            if len(told) == 1 and self._is_lone(now):
                self._ask(told[0], now)
            else:
                self._look = True
        if self._asked is not None:
            with self._listener.bounded(self._settings.lease):
                row = await self._asked.done  # its handler has begun by then
            self._asked = None
            self._count([] if row is None else [row])

    async def _stand_in(self, now: float) -> None:
        """Steps 3 and 4 of worker/engine/backup.py."""
        rows, named = self._standby.take_due(now)
        if rows:
            self._woken("standby")
            cursor = await self._control.execute(_STAND_IN, (rows, named))
            left = [row[0] for row in await cursor.fetchall()]
            if left:
                self._told += left
                self._event.set()
            elif not self._look:
                self._stats.looked(0)

    async def _pass_on(self) -> None:
        """Step 2 of worker/engine/backup.py, when it is known which rows fill the slots."""
        await self._have_read()
        own = self._standby.own
        if own and not self._free():
            rows = list(own)
            await self._control.execute(_PASS_ON, (rows,))
            own.difference_update(rows)
        elif self._parking.stage is not AWAKE and not (self._look or self._told or self._asked):
            own.clear()  # it has scanned: they run here, or another worker has them

    async def _fill(self) -> None:
        """Step 4: complete and claim, then park or ask for the next deadline."""
        parking = self._parking
        napped, self._nap = self._nap, 0.0
        wants = self._free() if self._look or self._scouted or parking.stage is AWAKE else 0
        if parking.stage is AWAKE:
            # Claim half of all slots, so that the server works on one half of the rows while the handlers of
            # the other half run. A small cycle is not divided.
            wants = min(wants, max(_SMALL, (self._concurrency + 1) // 2))
        completed = [o for o in self._ended if o.end is End.COMPLETE]
        if wants == 0:
            if completed:
                refused = await self._claims.complete([o.job.token for o in completed])
                self._drop(completed)
                self._completed(completed, refused)
            return
        asked, self._look = self._look, False  # from here on a notification sets it again
        self._scouted = False
        settling = parking.stage is SETTLING
        writers_ended = settling and parking.saw_writers(await self._writers())
        if asked:
            self._asked_at = time.monotonic()
        stay_parked = self._stay_parked()
        count = await self._claim(completed, wants, stay_parked)
        self._scout.send(self._topics)
        if count >= wants or (count and (parking.stage is AWAKE or not stay_parked)):
            # All slots are taken, or rows keep coming: producers need not notify.
            parking.wake()
            self._look = True
            if count < wants:
                self._nap = _NAP_FIRST
            else:
                self._filled_at = time.monotonic()
        elif parking.stage is AWAKE and (
            0 < napped < _NAP_LAST or time.monotonic() < self._filled_at + _AWAKE
        ):
            self._nap = min(max(napped * 2, _NAP_FIRST), _NAP_LAST)
        elif parking.stage is AWAKE:
            await self._control.execute(_PARK, (self.id,))
            parking.begin()
            self._look = True
        else:
            await asyncio.sleep(0)  # what was claimed starts first: it need not wait for the next query
            await self._schedule()
            if settling and writers_ended and self._front.is_clear(self._asked_at):
                parking.settled()
                log.debug("parked", worker_id=str(self.id))
            elif settling and not writers_ended:
                self._repeat_look()

    def _stay_parked(self) -> bool:
        """Whether a claim leaves the parked flag set. If so, the next row notifies, and no handshake is due.
        If the worker was woken again at once, there is load: without the flag, producers need not notify.
        """
        now = time.monotonic()
        lone = now - self._woken_at > _BUSY
        self._woken_at = now
        return lone or self._parking.stage is SETTLING

    async def _claim(self, completed: list[Outcome], wants: int, stay_parked: bool) -> int:
        """Complete these outcomes and claim. Returns how many rows came."""
        asked_at = time.monotonic()
        awake = self._parking.stage is AWAKE
        self._topics.rotate()  # within a priority, the topics take turns: none starves
        busy = awake and not any(o.job.row.ordering_key for o in completed)
        look = self._front.look(self._topics, wants, asked_at, busy=busy)
        try:
            answer = await self._claims.turn(
                [o.job.token for o in completed], self._topics, wants, look.levels, stay_parked=stay_parked
            )
        except (psycopg.Error, OSError):
            self._front.gave_up(look, asked_at, time.monotonic())
            raise
        await self._have_read()
        self._drop(completed)
        took = time.monotonic() - asked_at
        self._arriving = answer.count
        reading = self._read(answer, completed, look, asked_at, took)
        if awake and answer.count >= wants:
            # A task begins when this one waits. So the rows are read when the next claim has been sent, and
            # the server does not idle meanwhile.
            self._reading = asyncio.create_task(reading)
            return answer.count
        return await reading

    async def _read(
        self, answer: Answer, completed: list[Outcome], look: Look, asked_at: float, took: float
    ) -> int:
        """Read a claim's answer and start its rows. Returns how many rows came."""
        rows, refused = answer.read()
        self._arriving = 0
        self._front.looked(look, rows, asked_at, asked_at + took)
        if completed:
            self._completed(completed, refused)
        self._start(rows, asked_at)
        self._count(rows)
        return len(rows)

    async def _have_read(self) -> None:
        """Wait until all claimed rows are in `_running`."""
        if self._reading is not None:
            await self._reading
            self._reading = None

    def _start(self, rows: list[Claimed], asked_at: float) -> None:
        """Start the handlers of claimed rows. `_count` does what need not be done before that."""
        assert self.id is not None
        if rows:
            self._lease.claimed(asked_at)
            if self._standby.own:
                self._standby.own.difference_update(row.id for row in rows)
        for row in rows:
            handler = self._handlers[row.topic]
            pool = self._own_pool if handler.built_in else self._shared_pool
            job = Job(row, self.id, self._lease, pool.connection)
            attempt = Attempt(job, handler, asked_at, self._attempt_ended)
            self._running[row.id] = attempt
            attempt.start()
        if self._full_stop:  # the drain's time ran out while the claim was under way
            self._stop_all(Stop.DRAIN)

    def _count(self, rows: list[Claimed]) -> None:
        """A scan is over and brought these rows."""
        self._stats.looked(len(rows))
        if rows:
            self._stuck.work_came()
            self._stats.claimed((row.topic, row.waited.total_seconds()) for row in rows)
            self._look_again = _LOOK_FIRST
            if debugging():
                log.debug("claimed", rows=[row.id for row in rows], worker_id=str(self.id))

    def _drop(self, outcomes: list[Outcome]) -> None:
        """Forget outcomes that are committed. Only these: more handlers have ended since they were sent."""
        gone = set(map(id, outcomes))
        self._ended = [o for o in self._ended if id(o) not in gone]

    def _completed(self, outcomes: list[Outcome], refused: set[tuple[int, int]]) -> None:
        ended = Counter(o.job.row.topic for o in outcomes)
        lost = Counter(o.job.row.topic for o in outcomes if o.job.token in refused) if refused else Counter()
        for topic, count in (ended - lost).items():
            self._stats.count("outwake_worker_attempts", topic, "done", by=count)
        for topic, count in lost.items():
            self._stats.count("outwake_worker_attempts", topic, "fenced", by=count)
        for row_id, attempt in refused:
            log.warning("fenced", outbox_id=row_id, attempt=attempt)
        if debugging():
            log.debug("completed", rows=[o.job.row.id for o in outcomes], fenced=len(refused))

    async def _writers(self) -> list[str]:
        cursor = await self._control.execute(_WRITERS)
        row = await cursor.fetchone()
        assert row is not None
        writers: list[str] = row[0]
        return writers

    async def _schedule(self) -> None:
        """Step 5: set the deadlines. Also measure how far the server's clock is from ours."""
        connected = time.monotonic() - self._listener.opened_at
        far = self._front.far
        self._announced = math.inf  # this query may not see what is announced meanwhile
        cursor = await self._control.execute(
            _NEXT_DEADLINE,
            (
                self.id,
                [] if far else list(self._topics),
                self._lease_time,
                timedelta(seconds=connected),
            ),
        )
        found = await cursor.fetchone()
        assert found is not None
        row_due, lease_end, server_time = found
        now = time.monotonic()
        self._clock_offset = server_time - now
        self._look_at = math.inf if row_due is None else now + row_due
        self._rescue_at = math.inf if lease_end is None else now + max(lease_end, self._look_again)
        if row_due is not None and row_due <= 0:
            self._repeat_look()  # parking, step 5
        if far:
            self._look_at = self._far_look_at()
        self._look_at = min(self._look_at, self._announced)
        self._rescue_at = min(self._rescue_at, self._announced)

    def _far_look_at(self) -> float:
        """The deadline when the head is far: a background scan may begin, or a row that one saw is due."""
        front = self._front
        if front.missed:
            return -math.inf
        if not front.is_clear(self._asked_at):
            return math.inf if self._scout.under_way else front.scout_at
        return math.inf if front.next_due is None else front.next_due.timestamp() - self._clock_offset

    def _repeat_look(self) -> None:
        self._stats.count("outwake_worker_repeated_looks")
        now = time.monotonic()
        again = now + self._look_again
        self._look_at = again if self._look_at <= now else min(self._look_at, again)
        self._look_again = min(self._look_again * 2, _LOOK_LAST)

    async def _renew(self) -> None:
        assert self.id is not None
        await self._have_read()
        self._renew_asked = False
        asked_at = time.monotonic()
        tokens = [attempt.job.token for attempt in self._running.values()]
        rows = await renew(self._control, self.id, tokens, self._lease_time)
        self._lease.renewed(asked_at)
        for attempt in list(self._running.values()):
            cancel = rows.get(attempt.job.token)
            if cancel is None:
                attempt.stop(Stop.FENCED)
            elif cancel:
                attempt.stop(Stop.CANCEL)
        log.debug("renewed", worker_id=str(self.id), running=len(self._running))
        if self._parking.stage is AWAKE:
            await self._schedule_rescue()

    async def _schedule_rescue(self) -> None:
        """A worker that never sleeps learns of other workers' leases when it renews its own."""
        look_at = self._look_at
        await self._schedule()
        self._look_at = look_at

    async def _rescue(self) -> None:
        self._rescue_at = math.inf
        connected = timedelta(seconds=time.monotonic() - self._listener.opened_at)
        cursor = await self._control.execute(_RESCUE, (self.id, self._lease_time, connected))
        row = await cursor.fetchone()
        if row is not None and row[0]:
            self._stats.count("outwake_worker_rescued", by=row[0])
            log.warning("rescued", workers=row[0], worker_id=str(self.id))
        self._look = True

    async def _settle(self) -> None:
        """Step 3: finalize what was not simply completed. An outcome is dropped only when it is committed."""
        assert self.id is not None
        for outcome in [o for o in self._ended if o.end is not End.COMPLETE]:
            ended = await settle(self._control, self.id, outcome)
            self._ended.remove(outcome)
            self._stats.count("outwake_worker_attempts", outcome.job.row.topic, ended)

    async def _tell_draining(self) -> None:
        await self._control.execute(_TELL_DRAINING, (self.id,))
        self._told_draining = True

    def _next_probe(self) -> float:
        every = self._settings.listen_probe
        return time.monotonic() + every if every else math.inf

    async def _probe(self) -> None:
        if self._probe_sent is not None:
            raise psycopg.OperationalError("the LISTEN connection does not hear its own probe")
        self._probe_sent = f"{self._listener.presence}.{time.monotonic()}"
        self._probe_at = time.monotonic() + self._settings.lease
        await self._control.execute("SELECT pg_notify(%s, %s)", (PROBE, self._probe_sent))

    async def _leave(self) -> None:
        """End this life. Nothing runs, so there is nothing to rescue."""
        await self._control.execute(_LEAVE, (self.id,))
        log.info("stopped", worker_id=str(self.id))


def _lone(text: str) -> tuple[int, int | None, int]:
    """Parse ID or ID,PRESENCE,N (sql/outbox/functions/wake.sql): a row, the worker that is to claim it, and
    the number of parked workers. Raises ValueError.
    """
    match [int(number) for number in text.split(",")]:
        case [row_id] if 0 <= row_id < 2**63:
            return row_id, None, 1
        case [row_id, named, asleep] if 0 <= row_id < 2**63 and 0 <= named < 2**31 and 0 < asleep < 2**31:
            return row_id, named, asleep
    raise ValueError(text)

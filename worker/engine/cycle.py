"""What a worker does while it is connected. One task does all its work on the database, so nothing races.

The task sleeps until something happens: a notification, a handler that ended, a deadline, or a lost
connection. Then it runs one cycle:

1. Take the answer to the claim of a single row, if one is under way (worker/engine/fastpath.py).
2. Do what is due: renew the lease, rescue, probe, ask for rows as a backup (worker/engine/due.py).
3. Finalize what handlers left: failures, hand-backs and cancels. Completed rows are ended together with the
   next claim, in one commit and one round trip.
4. Scan for free slots, if there is a reason (worker/engine/wakes.py) or the worker is awake. Then decide:

   | stage            | the scan brought                 | then                                             |
   |------------------|----------------------------------|--------------------------------------------------|
   | any              | all rows that were asked for     | awake; scan again at once                        |
   | awake            | some rows                        | scan again after a pause                         |
   | parked           | some rows, and cleared the flag  | awake; scan again after a pause                  |
   | awake            | none, but the pauses go on       | scan again after a longer pause                  |
   | awake            | none, and the pauses are over    | set the flag, drain writers; scan again at once  |
   | draining writers | few or none; writers are left    | ask for the next deadline; scan again soon       |
   | draining writers | few or none; no writer is left   | ask for the next deadline; parked                |
   | parked           | few or none, and left the flag   | ask for the next deadline                        |

5. Sleep, or go on at once if there is a reason to scan and a slot is free.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import psycopg

from outwake._claim import Claimed
from outwake.connect import abort_after
from outwake.schema import in_schema
from outwake.telemetry.log import debugging, get_logger
from outwake.worker.engine.attempt import End
from outwake.worker.engine.claimer import Claimer
from outwake.worker.engine.due import PARK, DueWork
from outwake.worker.engine.fastpath import FastPath
from outwake.worker.engine.finalize import finalize
from outwake.worker.engine.idle import IdleBackoff
from outwake.worker.engine.parking import Stage
from outwake.worker.engine.parts import Link, Parts
from outwake.worker.engine.wakes import Reason

log = get_logger(__name__)

_WRITERS = in_schema("SELECT :schema.outbox_writers()")


class Cycle:
    """The cycles of one connection. `check_schema` is called when a migration may have come."""

    def __init__(self, parts: Parts, link: Link, check_schema: Callable[[], Awaitable[None]]) -> None:
        running, parking, wakes = parts.running, parts.parking, parts.wakes
        self.claimer = Claimer(
            link.claims, parts.topics, running, parts.cursors, parking, parts.stats, self._scanned
        )
        self.fastpath = FastPath(link.claims, link.listener, running, parking, wakes, parts.observer)
        self.due = DueWork(parts, link, self.claimer)
        self._idle = IdleBackoff()
        self._parts = parts
        self._link = link
        self._running = running
        self._parking = parking
        self._wakes = wakes
        self._check_schema = check_schema

    async def run(self) -> None:
        """Run cycles until the worker is drained and nothing is left to do. Raises psycopg.Error, OSError and
        WorkerEnded.
        """
        seconds = self._parts.settings.lease
        while True:
            self._link.listener.check()
            timer = abort_after(self._link.control, seconds)
            try:
                await self._once()
            except psycopg.errors.DeadlockDetected as error:
                log.warning("deadlock", error=str(error).strip())
                self._wakes.reasons.add(Reason.REPEAT)
                continue  # the statement was rolled back: the next cycle repeats it
            finally:
                timer.cancel()
            if self._running.draining and self._running.idle:
                return
            await self._sleep()

    async def _once(self) -> None:
        await self._heed()
        rows = await self.fastpath.take(self._parts.settings.lease)
        if rows is not None:
            self._scanned(rows)
        await self.due.work()
        await self._finalize()
        await self._fill()

    async def _heed(self) -> None:
        """Do what notifications asked for that may not come in the middle of a cycle."""
        reasons = self._wakes.reasons
        if Reason.UNPARKED in reasons:
            self._parking.wake()
            self._done_with(Reason.UNPARKED)
        if Reason.CALLED in reasons:
            self._done_with(Reason.CALLED)
            await self._check_schema()

    def _done_with(self, reason: Reason) -> None:
        """The scan is still to come."""
        self._wakes.reasons.discard(reason)
        self._wakes.reasons.add(Reason.NOTIFIED)

    async def _finalize(self) -> None:
        """Step 3. An outcome is dropped only when it is committed."""
        for outcome in [o for o in self._running.outcomes if o.end is not End.COMPLETE]:
            ended = await finalize(self._link.control, self._link.worker_id, outcome)
            self._running.written([outcome])
            self._parts.stats.count("outwake_worker_attempts", outcome.job.row.topic, ended)

    async def _fill(self) -> None:
        """Step 4."""
        parking, wakes, observer = self._parking, self._wakes, self._parts.observer
        self._idle.scans()
        slots = self.claimer.batch if wakes.reasons or parking.stage is Stage.AWAKE else 0
        if slots == 0:
            await self.claimer.complete()
            return
        asked = wakes.take()
        awake, draining_writers = parking.stage is Stage.AWAKE, parking.stage is Stage.DRAINING_WRITERS
        writers_left = draining_writers and parking.writers_left
        writers_ended = draining_writers and parking.saw_writers(await self._writers())
        if asked or (writers_left and writers_ended):  # no earlier scan has seen what they committed
            wakes.asked_at = time.monotonic()
        stay_parked = self._stay_parked()
        await observer.step("claim")
        count = await self.claimer.claim(slots, stay_parked=stay_parked)
        observer.scanned()
        self._parts.background.start(self._parts.topics)
        if count >= slots or (count and (awake or not stay_parked)):
            self._rows_keep_coming(full=count >= slots)
        elif not awake:
            await self._fall_asleep(draining_writers, writers_ended)
        elif not self._idle.found_nothing():
            await self._park()

    def _stay_parked(self) -> bool:
        """Whether the claim leaves the parked flag set. If so, the next row notifies, and no handshake is
        due. If the worker was woken again at once, there is load: without the flag, producers need not
        notify.
        """
        now = time.monotonic()
        quiet = self._wakes.is_quiet(now)
        self._wakes.scans(now)
        return quiet or self._parking.stage is Stage.DRAINING_WRITERS

    def _rows_keep_coming(self, *, full: bool) -> None:
        """Producers need not notify: the claim cleared the flag, and the worker scans again by itself."""
        self._parking.wake()
        self._wakes.reasons.add(Reason.MORE)
        if full:
            self._idle.filled()
        else:
            self._idle.came()

    async def _park(self) -> None:
        """Step 1 of worker/engine/parking.py."""
        await self._parts.observer.step("park")
        await self._link.control.execute(PARK, (self._link.worker_id,))
        self._parking.begin()
        self._wakes.reasons.add(Reason.PARKING)

    async def _fall_asleep(self, draining_writers: bool, writers_ended: bool) -> None:
        """Steps 3 to 5 of worker/engine/parking.py."""
        await asyncio.sleep(0)  # what was claimed starts first: it need not wait for the next query
        await self.due.schedule()
        if not draining_writers:
            return
        if not writers_ended:
            self.due.repeat_scan()
        elif self._parts.cursors.is_clear(self._wakes.asked_at):
            self._parking.drained()
            log.debug("parked", worker_id=str(self._link.worker_id))
            self._parts.observer.parked()

    async def _writers(self) -> list[str]:
        await self._parts.observer.step("writers")
        cursor = await self._link.control.execute(_WRITERS)
        row = await cursor.fetchone()
        assert row is not None
        writers: list[str] = row[0]
        return writers

    def _scanned(self, rows: list[Claimed]) -> None:
        """A scan is over, and the handlers of these rows have been started."""
        parts = self._parts
        parts.stats.scanned(len(rows))
        if not rows:
            return
        parts.stuck.work_came()
        parts.stats.claimed((row.topic, row.waited.total_seconds()) for row in rows)
        parts.timers.rows_came()
        if debugging():
            log.debug("claimed", rows=[row.id for row in rows], worker_id=str(self._link.worker_id))
        parts.observer.claimed(rows)

    async def _sleep(self) -> None:
        """Step 5."""
        if self._parking.stage is Stage.PARKED:
            await self._parts.observer.step("sleep")
        if self._idle.pause:
            await asyncio.sleep(self._idle.pause)
        elif not (self._wakes.reasons and self._running.free):
            await self.claimer.arrived()  # the running rows decide how long it may sleep
            until = self._until()
            self._parts.observer.sleeps(until)
            await self._wakes.sleep(until)
        self._wakes.event.clear()

    def _until(self) -> float:
        """The next deadline."""
        parts = self._parts
        until = min(parts.timers.rescue_at, parts.probe.at)
        if self._running.free:  # without a free slot, a due row could not start
            until = min(until, parts.timers.row_at, parts.backup.at)
        if self._running.attempts:
            until = min(until, parts.lease.renew_at)
        return until

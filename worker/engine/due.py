"""What a worker does because its time has come: renew, rescue, probe, ask as a backup, ask for deadlines."""

import time
from datetime import timedelta

from outwake._claim import renew
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger
from outwake.worker.engine.attempt import Stop
from outwake.worker.engine.claimer import Claimer
from outwake.worker.engine.parking import Stage
from outwake.worker.engine.parts import Link, Parts
from outwake.worker.engine.wakes import Reason

log = get_logger(__name__)

PARK = in_schema("SELECT :schema.outbox_park(%s)")
_STILL_WAIT = in_schema(
    "SELECT FROM :schema.outbox WHERE id = ANY (%s) AND state = 'ready' AND attempt = 0 LIMIT 1"
)
_NEXT_DEADLINE = in_schema(
    "SELECT extract(epoch FROM row_due)::float8, extract(epoch FROM lease_end)::float8,"
    " extract(epoch FROM server_time)::float8"
    " FROM :schema.outbox_next_deadline(%s, %s, %s, %s)"
)
_RESCUE = in_schema("SELECT :schema.outbox_rescue(%s, %s, %s)")
_TELL_DRAINING = in_schema(
    "UPDATE :schema.worker SET draining = true, parked = false WHERE id = %s AND ended_at IS NULL"
)


class DueWork:
    """The timed work of one connection."""

    def __init__(self, parts: Parts, link: Link, claimer: Claimer) -> None:
        self._parts = parts
        self._link = link
        self._claimer = claimer
        self._lease_time = timedelta(seconds=parts.settings.lease)
        self._told_draining = False

    async def work(self) -> None:
        """Step 2 of worker/engine/cycle.py."""
        parts, now = self._parts, time.monotonic()
        parts.timers.passes(now)
        if parts.running.attempts and (parts.wakes.renewal or now >= parts.lease.renew_at):
            await self.renew()
        if now >= parts.timers.rescue_at:
            await self._rescue()
        if now >= parts.probe.at:
            await parts.probe.send(self._link.control, self._link.listener.presence)
        if now >= parts.timers.row_at:
            parts.wakes.count("deadline")
            parts.wakes.reasons.add(Reason.DEADLINE)
        if now >= parts.backup.at and parts.running.free:
            await self._ask_as_backup(now)
        if parts.running.draining and not self._told_draining:
            await self._link.control.execute(_TELL_DRAINING, (self._link.worker_id,))
            self._told_draining = True

    async def renew(self) -> None:
        """Renew the lease, and stop the handlers of rows that are cancelled or no longer ours."""
        await self._claimer.arrived()
        parts, link = self._parts, self._link
        parts.wakes.renewal = False
        asked_at = time.monotonic()
        tokens = [attempt.job.token for attempt in parts.running.attempts.values()]
        rows = await renew(link.control, link.worker_id, tokens, self._lease_time)
        parts.lease.renewed(asked_at)
        for attempt in list(parts.running.attempts.values()):
            cancel = rows.get(attempt.job.token)
            if cancel is None:
                attempt.stop(Stop.FENCED)
            elif cancel:
                attempt.stop(Stop.CANCEL)
        log.debug("renewed", worker_id=str(link.worker_id), running=len(parts.running.attempts))
        parts.observer.renewed()
        if parts.parking.stage is Stage.AWAKE:
            # A worker that never sleeps learns of other workers' leases when it renews its own.
            row_at = parts.timers.row_at
            await self.schedule()
            parts.timers.row_at = row_at

    async def schedule(self) -> None:
        """Ask for the next deadlines."""
        await self._parts.observer.step("schedule")
        parts, link = self._parts, self._link
        timers, far = parts.timers, parts.cursors.far
        timers.asks(rows=not far)  # far: a background scan sees them, which may have begun long ago
        cursor = await link.control.execute(
            _NEXT_DEADLINE,
            (link.worker_id, [] if far else list(parts.topics), self._lease_time, self._connected),
        )
        found = await cursor.fetchone()
        assert found is not None
        row_due, lease_end, server_time = found
        timers.found(row_due, lease_end, server_time, parts.backup.jitter())
        if row_due is not None and row_due <= 0:  # it was skipped as locked: see worker/engine/parking.py
            self.repeat_scan()
        if far:
            timers.row_at = parts.background.next_at(parts.wakes.asked_at, timers)
        timers.keep_announced()

    def repeat_scan(self) -> None:
        """Scan again after a backoff."""
        self._parts.stats.count("outwake_worker_repeated_scans")
        self._parts.timers.repeat_scan()

    @property
    def _connected(self) -> timedelta:
        return timedelta(seconds=time.monotonic() - self._link.listener.opened_at)

    async def _rescue(self) -> None:
        parts, link = self._parts, self._link
        parts.timers.tries_rescue()
        cursor = await link.control.execute(_RESCUE, (link.worker_id, self._lease_time, self._connected))
        row = await cursor.fetchone()
        if row is not None and row[0]:
            parts.stats.count("outwake_worker_rescued", by=row[0])
            log.warning("rescued", workers=row[0], worker_id=str(link.worker_id))
            parts.wakes.reasons.add(Reason.RESCUED)
        elif parts.parking.stage is not Stage.AWAKE:
            await self.schedule()  # another worker was first, or the lease was extended

    async def _ask_as_backup(self, now: float) -> None:
        """Steps 2 and 3 of worker/engine/backup.py."""
        parts = self._parts
        rows = parts.backup.take_due(now)
        if not rows:
            return
        parts.wakes.count("backup")
        # A row that has been claimed once is not waited for: whatever made it ready again has notified. It is
        # planned each time, because a plan from when the table was empty would read all of it.
        cursor = await self._link.control.execute(_STILL_WAIT, (rows,), prepare=False)
        if await cursor.fetchone() is not None:
            if parts.parking.stage is not Stage.AWAKE:  # otherwise it does that when it parks
                await self._link.control.execute(PARK, (self._link.worker_id,))
            parts.wakes.reasons.add(Reason.BACKUP)
        elif not parts.wakes.reasons:
            parts.stats.scanned(0)

"""The worker's lease: for how long it may count on the rows that it runs.

The authority is `worker.lease_until`, by the database's clock. The copy here only makes the worker stop in
time when it cannot ask the database:

1. The lease is counted on a monotonic clock, from before the query that extended it. So it never ends here
   later than it ends in the database.
2. The lease is renewed after RENEWED of its length while something runs, so that two renewals may fail before
   what runs gets its NOTICE.
3. When the lease ends here, everything that runs is stopped, because another worker may be running it again.
4. An outage is an exception. While the server refuses connections or writes, and for one lease after it is
   back, nobody can rescue (outbox_rescue). So each refusal is worth one lease, counted from the refusal: a
   worker that is cut off later stops in time. Agents run on in an outage, but for `outage_grace` at most.
5. When a worker finds that its lease was ended in the database (WorkerEnded), it stops everything and comes
   back under a new id.
"""

import asyncio
import time
from collections.abc import Callable

RENEWED = 1 / 3
"""Part of a lease after which it is renewed."""
NOTICE = 1 / 6
"""Part of a lease that is left when an agent gets SIGTERM (worker/agents/turn.py), so that it is gone when
the lease ends. It is less than what two failed renewals leave: 1 - 2 * RENEWED."""
CLAIMED = 1 / 2
"""Part of a lease that is left after a claim, at least: outbox_lease_is_due
(sql/outbox/functions/lease.sql) has the same number."""


class Lease:
    """The local end of the lease. Times are of the monotonic `clock`, in seconds."""

    def __init__(
        self,
        seconds: float,
        outage_grace: float,
        on_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._grace = outage_grace
        self._on_lost = on_lost
        self._contact = self._clock()
        self._until = self._contact
        self._timer: asyncio.TimerHandle | None = None
        self._extended: asyncio.Event | None = None
        self.renew_at = self._until

    def renewed(self, asked_at: float) -> None:
        """A renewal that was sent at `asked_at` succeeded."""
        self._extend(asked_at, self.seconds)
        self.renew_at = asked_at + self.seconds * RENEWED

    def claimed(self, asked_at: float) -> None:
        """A claim that was sent at `asked_at` brought rows: at least CLAIMED of a lease is left."""
        left = self.seconds * CLAIMED
        if self._until < asked_at + left:
            self._extend(asked_at, left)
            self.renew_at = asked_at + left * RENEWED

    def _extend(self, asked_at: float, seconds: float) -> None:
        self._contact = max(self._contact, asked_at)
        self._until = max(self._until, asked_at + seconds)
        self._changed()

    def outage(self) -> None:
        """The server itself is down now, so nobody can rescue before one lease from now."""
        bound = self._contact + max(self._grace, self.seconds)
        self._until = max(self._until, min(self._clock() + self.seconds, bound))
        self._changed()

    def remaining(self) -> float:
        """Seconds left. If it is zero or less, the lease must be taken for lost."""
        return self._until - self._clock()

    async def extended(self) -> None:
        """Return when the end has moved."""
        if self._extended is None:
            self._extended = asyncio.Event()
        await self._extended.wait()

    def _changed(self) -> None:
        if self._extended is not None:
            self._extended.set()
            self._extended = None
        self._arm()

    def _arm(self) -> None:
        # There is one timer. A renewal does not move it: to look up the new end when it fires is cheaper.
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, self.remaining()), self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self.remaining() > 0:
            self._arm()
        else:
            self._on_lost()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

"""A single announced row is claimed over the LISTEN connection, so that its handler starts sooner.

A full scan takes twice as long, and to wake the worker's task first costs a tenth of a millisecond more
(docs/profile.md). Nothing else uses this path: without it, each announced row would cause a full scan.

1. A notification names a row while the worker sleeps. The callback of the socket sends the claim of that row
   at once (outbox_claim_row), on the connection that it came on, and wakes the worker's task.
2. The callback of the socket reads the answer and starts the handler (worker/engine/reply.py).
3. The worker's cycle begins with that answer: until it is there, no other claim is sent.
4. If the worker did not sleep when it heard of the row, its next cycle sends the claim.
5. A full scan is used instead if several rows were announced, if there is load, or if the row would take the
   last free slot: the worker is not parked then, and a full scan clears its flag. A full scan also follows if
   the row is still there, because it is locked or a rule applies to it.
"""

import time

import psycopg

from outwake._claim import Claimed
from outwake.worker.engine.claims import Claims
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.observer import WorkerObserver
from outwake.worker.engine.parking import Parking, Stage
from outwake.worker.engine.reply import Reply
from outwake.worker.engine.running import Running
from outwake.worker.engine.wakes import Reason, Wakes


class FastPath:
    """The claims of single rows on one LISTEN connection."""

    def __init__(
        self,
        claims: Claims,
        listener: Listener,
        running: Running,
        parking: Parking,
        wakes: Wakes,
        observer: WorkerObserver,
    ) -> None:
        self._claims = claims
        self._listener = listener
        self._running = running
        self._parking = parking
        self._wakes = wakes
        self._observer = observer
        self._reply: Reply[Claimed | None] | None = None
        self._asked_at = 0.0

    def announced(self, row_id: int) -> None:
        """Steps 1 and 4, in the callback of the socket."""
        wakes, now = self._wakes, time.monotonic()
        if wakes.sleeping and not wakes.reasons and not wakes.singles and self._may_ask(now):
            try:
                self._ask(row_id, now)
                return
            except psycopg.Error:  # the cycle meets the error too
                pass
        wakes.singles.append(row_id)

    async def take(self, longest: float) -> list[Claimed] | None:
        """Steps 3 to 5. Returns the row that came, or none; None if nothing was claimed by its id. The LISTEN
        connection is cut if the answer takes longer than `longest` seconds.
        """
        wakes = self._wakes
        singles, wakes.singles = wakes.singles, []
        if singles:
            now, alone = time.monotonic(), self._reply is None and len(singles) == 1
            if alone and not wakes.reasons and self._may_ask(now):
                self._ask(singles[0], now)
            else:
                wakes.reasons.add(Reason.SINGLES)
        if self._reply is None:
            return None
        with self._listener.deadline(longest):
            row = await self._reply.done  # its handler has begun by then
        self._reply = None
        return [] if row is None else [row]

    def _may_ask(self, now: float) -> bool:
        """Step 5."""
        return self._parking.stage is Stage.PARKED and self._wakes.is_quiet(now) and self._running.free > 1

    def _ask(self, row_id: int, now: float) -> None:
        self._reply = self._claims.row(row_id, self._row_came)
        self._asked_at = now
        self._wakes.scans(now)
        self._observer.asked(row_id)

    def _row_came(self, row: Claimed | None, still_there: bool) -> Claimed | None:
        """Step 2."""
        if still_there:
            self._wakes.reasons.add(Reason.SINGLE_LEFT)
        if row is not None:
            self._running.start([row], self._asked_at)
        return row

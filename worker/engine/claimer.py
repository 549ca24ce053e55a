"""Decides what to claim for free slots, and completes in the same commit what has ended.

worker/engine/claims.py sends the statements. outwake/_claim.py has the same for a loop of your own.

Under load a claim reads ahead: the server works on the next claim while this process makes objects of the
rows of the last and starts their handlers.

1. The answer to a claim arrives. Its rows count as `arriving` (worker/engine/running.py).
2. If the claim left slots free, its rows are read and started at once. If it brought all rows that it asked
   for, more will come: a task is made that reads them. It begins when the worker's own task waits, which is
   when the next claim has been sent.
3. The rows of a claim are read before those of the next, and before anything that has to know what runs: a
   renewal, a sleep, a reconnect (`arrived`).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable

import psycopg

from outwake._claim import Claimed
from outwake.telemetry.log import debugging, get_logger
from outwake.worker.engine.attempt import Outcome
from outwake.worker.engine.claims import ClaimAnswer, Claims
from outwake.worker.engine.cursor import Cursors, Scan
from outwake.worker.engine.metrics import Stats
from outwake.worker.engine.parking import Parking, Stage
from outwake.worker.engine.running import Running

log = get_logger(__name__)

_SMALL = 50
"""Up to this many rows, a batch is not halved: its fixed cost is more than halves save (docs/profile.md)."""


class Claimer:
    """The claims of one connection. `came` is called with the rows of each claim, once they are started."""

    def __init__(
        self,
        claims: Claims,
        topics: deque[str],
        running: Running,
        cursors: Cursors,
        parking: Parking,
        stats: Stats,
        came: Callable[[list[Claimed]], None],
    ) -> None:
        self._claims = claims
        self._topics = topics
        self._running = running
        self._cursors = cursors
        self._parking = parking
        self._stats = stats
        self._came = came
        self._reading: asyncio.Task[int] | None = None

    @property
    def batch(self) -> int:
        """How many rows to claim. While rows keep coming, it is half of all slots at most, so that the server
        works on one half of the rows while the handlers of the other half run.
        """
        free = self._running.free
        if self._parking.stage is not Stage.AWAKE:
            return free
        return min(free, max(_SMALL, (self._running.concurrency + 1) // 2))

    async def complete(self) -> None:
        """Complete what has ended, without a claim."""
        if completed := self._running.completed():
            refused = await self._claims.complete([outcome.job.token for outcome in completed])
            self._running.written(completed)
            self._report(completed, refused)

    async def claim(self, slots: int, *, stay_parked: bool) -> int:
        """Complete what has ended, and claim. Returns how many rows came."""
        completed = self._running.completed()
        asked_at = time.monotonic()
        awake = self._parking.stage is Stage.AWAKE
        self._topics.rotate()  # within a priority, the topics take turns: none starves
        busy = awake and not any(outcome.job.row.ordering_key for outcome in completed)
        scan = self._cursors.next_scan(self._topics, slots, asked_at, busy=busy)
        try:
            answer = await self._claims.complete_and_claim(
                [outcome.job.token for outcome in completed],
                self._topics,
                slots,
                scan.lanes,
                stay_parked=stay_parked,
            )
        except (psycopg.Error, OSError):
            self._cursors.gave_up(scan, asked_at, time.monotonic())
            raise
        await self.arrived()
        self._running.written(completed)
        took = time.monotonic() - asked_at
        self._running.arriving = answer.count
        reading = self._read(answer, completed, scan, asked_at, took)
        if awake and answer.count >= slots:
            self._reading = asyncio.create_task(reading)
            return answer.count
        return await reading

    async def arrived(self) -> None:
        """Wait until all claimed rows are started. Raises the exception of a row that cannot be read."""
        if self._reading is not None:
            await self._reading
            self._reading = None

    async def close(self) -> None:
        """Start what was claimed, because the connection is given up. A row that cannot be read is not
        started: it is handed back when the worker reconnects (outbox_reconnect).
        """
        if self._reading is not None:
            await asyncio.wait([self._reading])
            if error := self._reading.exception():
                log.warning("not_read", error=str(error).strip())
        self._running.arriving = 0

    async def _read(
        self, answer: ClaimAnswer, completed: list[Outcome], scan: Scan, asked_at: float, took: float
    ) -> int:
        """Read a claim's answer and start its rows. Returns how many rows came."""
        rows, refused = answer.read()
        self._running.arriving = 0
        self._cursors.scanned(scan, rows, asked_at, asked_at + took)
        if completed:
            self._report(completed, refused)
        self._running.start(rows, asked_at)
        self._came(rows)
        return len(rows)

    def _report(self, outcomes: list[Outcome], refused: set[tuple[int, int]]) -> None:
        """Count and log completions, of which the database refused some."""
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

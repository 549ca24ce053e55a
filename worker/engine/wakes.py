"""Why a worker runs another cycle. Its one task waits here; whatever wakes it notes the reason here."""

import asyncio
import math
import time
from enum import Enum

from outwake.worker.engine.metrics import Stats
from outwake.worker.engine.parking import Parking, Stage

BUSY = 0.005
"""A worker that scans again within this many seconds is under load."""


class Reason(Enum):
    """Why to scan."""

    CONNECTED = "the LISTEN connection is new: notifications may have been lost"
    NOTIFIED = "a notification says that rows can be claimed, or was not understood"
    CALLED = "a notification is for all workers, as a migration sends it: the schema may have changed"
    UNPARKED = "a notification says that our parked flag was cleared, or that our life was ended"
    SINGLES = "rows were announced by their ids, and cannot be claimed one by one now"
    SINGLE_LEFT = "a row that was claimed by its id is still there"
    DEADLINE = "a row falls due, or a scan is to be repeated"
    BACKUP = "a row still waits for which another worker was named"
    RESCUED = "a rescue has freed rows"
    MORE = "the last scan brought rows"
    PARKING = "the parked flag was set: a scan has to follow"
    REPEAT = "a deadlock rolled the last cycle back"
    BACKGROUND = "a background scan is back"


_HEEDED = {Reason.CALLED, Reason.UNPARKED}
"""More than a scan is due for these, at the start of a cycle (worker/engine/cycle.py)."""


class Wakes:
    """The reasons to scan, the single rows that were announced, and the event that the task awaits."""

    def __init__(self, parking: Parking, stats: Stats) -> None:
        self.event = asyncio.Event()
        self.reasons = {Reason.CONNECTED}
        """A scan takes them all. What is added from then on causes the next."""
        self.singles: list[int] = []
        """Single rows that this worker is to claim by their ids."""
        self.renewal = False
        """Set when a cancel was heard: a renewal learns from the table whether there is one, of which row."""
        self.asked_at = -math.inf
        """When the last scan began. A scan that a background scan caused does not count: each would cause
        another background scan."""
        self._asleep = False
        self._last = -math.inf
        self._parking = parking
        self._stats = stats

    def reset(self) -> None:
        """The LISTEN connection is new, so everything is scanned."""
        self.reasons = {Reason.CONNECTED}
        self.singles.clear()

    def wake(self, reason: Reason) -> None:
        """Scan in the next cycle, which begins now."""
        self.reasons.add(reason)
        self.event.set()

    def count(self, cause: str) -> None:
        """Count a wake-up of a sleeping worker by its cause (CAUSES in worker/engine/metrics.py)."""
        if self._parking.stage is not Stage.AWAKE:
            self._stats.woken(cause)

    def take(self) -> bool:
        """A scan begins, for all reasons that are known now. Whether there is any but a background scan. What
        has come since the cycle began, and asks for more than a scan, stays for the next.
        """
        taken, self.reasons = self.reasons, self.reasons & _HEEDED
        return bool(taken - {Reason.BACKGROUND})

    @property
    def sleeping(self) -> bool:
        """Whether the worker's task waits, and nothing has woken it. Then no query is under way on its
        connection.
        """
        return self._asleep and not self.event.is_set()

    async def sleep(self, until: float) -> None:
        """Wait for the event, until this time of the monotonic clock at most."""
        if self.event.is_set():
            return
        timer = None
        if until < math.inf:
            wait = max(0.0, until - time.monotonic())
            timer = asyncio.get_running_loop().call_later(wait, self.event.set)
        self._asleep = True
        await self.event.wait()
        self._asleep = False
        if timer is not None:
            timer.cancel()

    def is_quiet(self, now: float) -> bool:
        """Whether there is no load: the last scan was not a moment ago."""
        return now - self._last > BUSY

    def scans(self, now: float) -> None:
        """A scan, or the claim of a single row, begins."""
        self._last = now

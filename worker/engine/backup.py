"""Which of several sleeping workers claims a single new row.

All sleeping workers hear the notification (worker/engine/parking.py). If every one of them tried to claim the
row, all attempts but one would be wasted, and they would slow down the winner just as it starts the job. So:

1. The insert picks one of the workers that are parked for the topic (outbox_notify). The notification names
   this worker and says how many are parked. The named worker claims the row at once, as if it were alone.
2. For the others it sets a deadline, at which they ask whether the row still waits: PATIENCE, and a random
   time more so that they do not all ask at once. One query, by key, asks for all rows that have waited so
   long. So no row depends on one worker, which may have died, hang, be cut off or have no free slot.
3. If a row still waits, the worker that asked scans. First it clears the parked flag of every worker whose
   presence has gone (outbox_park), so that none of the dead is named again.
"""

import math
import random

PATIENCE, SPREAD, LONGEST = 0.1, 0.05, 5.0
"""Seconds until the others ask; the random seconds more for each sleeping worker; and the limit of these.
With 50 sleeping workers, the first one asks about 50 ms after PATIENCE."""


class Backup:
    """The single rows for which another worker was named."""

    def __init__(self) -> None:
        self.at = math.inf
        """When to ask whether rows still wait, on the monotonic clock."""
        self._heard: dict[int, float] = {}
        self._asleep = 1

    def heard(self, row_id: int, asleep: int, now: float) -> bool:
        """Another of `asleep` workers was named for the row. Whether the deadline has changed."""
        self._heard[row_id] = now
        self._asleep = asleep
        if self.at < math.inf:
            return False
        self._set(now)
        return True

    def take_due(self, now: float) -> list[int]:
        """Return and forget the rows that it is time to ask about."""
        due = [row for row, heard_at in self._heard.items() if heard_at <= now - PATIENCE]
        for row in due:
            del self._heard[row]
        self.at = math.inf
        if self._heard:
            self._set(next(iter(self._heard.values())))
        return due

    def jitter(self) -> float:
        """Seconds by which one of the sleeping workers is later than another."""
        return random.uniform(0, min(SPREAD * self._asleep, LONGEST))  # noqa: S311 - not all at once

    def _set(self, heard_at: float) -> None:
        self.at = heard_at + PATIENCE + self.jitter()

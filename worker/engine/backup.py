"""Which of several sleeping workers claims a single ("lone") new row.

All sleeping workers hear the notification (worker/engine/parking.py). If every one of them tried to claim the
row, all attempts but one would be wasted, and they would slow down the winner just as it starts the job. So:

1. The insert picks one of the workers that are parked for the topic (outbox_notify). The notification names
   this worker and says how many are parked. The named worker claims the row at once, as if it were alone.
2. If the named worker has no free slot left, it re-sends the notification without a name (outbox_pass_on).
   Then the others scan at once.
3. The others act as backups (they "stand by"). Each waits for PATIENCE and a random time more, so that they
   do not all ask at once. Then it asks whether the row is still ready (outbox_stand_in), in one query for all
   rows that have waited so long. So no row depends on one worker, which may have died, hang, or be cut off.
4. If the row is still ready, the worker that asked claims it and clears the named worker's parked flag:
   otherwise that worker would be named again and again. If that worker is alive, it is notified of that,
   wakes, and parks again.
"""

import math
import random

PATIENCE, SPREAD, LONGEST = 0.1, 0.05, 5.0
"""Seconds until the others ask; the random seconds more for each sleeping worker; and the limit of these.
With 50 sleeping workers, the first one asks about 50 ms after PATIENCE."""


class Standby:
    """The single rows that a worker heard of and has not claimed, whether it or another worker was named."""

    def __init__(self) -> None:
        self.ask_at = math.inf
        """When it has to ask whether rows are still ready, on the monotonic clock."""
        self.own: set[int] = set()
        """Rows for which this worker was named."""
        self._others: dict[int, tuple[int, float]] = {}
        self._asleep = 1

    def stand_by(self, row_id: int, named: int, asleep: int, now: float) -> bool:
        """Remember a row for which another worker was named (its presence). Whether ask_at has changed."""
        self._others[row_id] = named, now
        self._asleep = asleep
        if self.ask_at < math.inf:
            return False
        self._again(now)
        return True

    def take_due(self, now: float) -> tuple[list[int], list[int]]:
        """Return and forget the rows that it is time to ask about, and the worker named for each."""
        due = {row: named for row, (named, heard_at) in self._others.items() if heard_at <= now - PATIENCE}
        for row in due:
            del self._others[row]
        self.ask_at = math.inf
        if self._others:
            _, oldest = next(iter(self._others.values()))
            self._again(oldest)
        return list(due), list(due.values())

    def _again(self, heard_at: float) -> None:
        spread = min(SPREAD * self._asleep, LONGEST)
        self.ask_at = heard_at + PATIENCE + random.uniform(0, spread)  # noqa: S311 - jitter: not all at once

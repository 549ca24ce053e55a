"""Which of several sleepers takes a lone row.

All of them hear of it (worker/engine/parking.py). Were all to ask for it, each but one would ask in vain, and all at
the moment in which that one is to start it. So:

1. Who inserts draws one of the workers that are parked for the topic (outbox_notify), and the notification
   names it and says how many they are. That one claims the row at once, as if it were alone.
2. Has it no slot free any more, it says so to the others, naming nobody (outbox_pass_on): they look at once.
3. The others stand by. When the one that was named has had PATIENCE, and a random time more so that they do
   not come all at once, each asks whether the row still waits (outbox_stand_in); one question for all that
   it has heard of by then. So no row depends on one worker, which may have died, hang, or be cut off.
4. Does it still wait, who asked takes it, and takes the flag down of the one that was named: it would be
   named again and again. Should it live, it hears of that, is awake, and parks anew.
"""

import math
import random

PATIENCE, SPREAD, LONGEST = 0.1, 0.05, 5.0
"""Seconds until others ask; how much more at most, for each that sleeps; and in all. Of 50, one asks some
50 ms after PATIENCE, and each of them once in 1.5 s while rows come one by one."""


class Standby:
    """The lone rows that a worker heard of, that it was named for or another, and has not claimed."""

    def __init__(self) -> None:
        self.ask_at = math.inf
        """When it has to ask whether rows still wait, on the monotonic clock."""
        self.own: set[int] = set()
        """Rows that it was named for."""
        self._others: dict[int, tuple[int, float]] = {}
        self._asleep = 1

    def stand_by(self, row_id: int, named: int, asleep: int, now: float) -> bool:
        """Remember a row that another was named for, by presence, of so many. Whether ask_at has changed."""
        self._others[row_id] = named, now
        self._asleep = asleep
        if self.ask_at < math.inf:
            return False
        self._again(now)
        return True

    def take_due(self, now: float) -> tuple[list[int], list[int]]:
        """The rows that it is time to ask about, and who was named for each. They are forgotten."""
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
        self.ask_at = heard_at + PATIENCE + random.uniform(0, spread)  # noqa: S311 - not all at once

"""Where a claim begins to look, when somebody holds an old snapshot.

A claimed row leaves an entry in the claim's index. The server removes it when nobody can see the row as ready
any more: as a rule at once, but while a foreign transaction holds its snapshot (a dump, a forgotten psql)
not at all. Every look from the front of a topic then reads past all rows claimed since: on one core,
throughput fell from 6,400 to 400 rows/s within 90 s. So, under load:

1. Looks from the front are timed. While they are quick, every look is one.
2. After a slow one, looks begin where the last one ended, in the topics and priorities it found rows of.
3. What they miss is found from the front: rows of other priorities and topics, and those that lie before,
   committed late, handed back, or freed by the end of another of their key. That look comes again after
   twenty times what it took, so that it takes a twentieth of the time.
4. If looks that begin later take as long, the front is not to blame, and all is as in 1.

A worker on its way to sleep, or woken, always looks from the front (worker/park.py).
"""

import math
from collections.abc import Iterable
from datetime import datetime

from outbox.claim import Claimed

SLOW = 0.01  # seconds
_SHARE = 20

Levels = list[tuple[str, int, datetime]]
"""Topics and priorities, and from when on their rows are due."""


class Front:
    """The ends of the last looks, and when to look from the front again."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, int], datetime] = {}
        self._took = 0.0
        self._again = -math.inf

    def levels(self, now: float) -> Levels | None:
        """What to look for; None: everything, from the front."""
        if now >= self._again or not self._ends:
            return None
        return [(topic, priority, end) for (topic, priority), end in self._ends.items()]

    def gave_up(self, levels: Levels | None, began: float, now: float) -> None:
        """A look was cut off, after a lease at the latest. If it was from the front, others come first."""
        if levels is None and self._ends:
            self._again = now + (now - began) * _SHARE

    def looked(self, levels: Levels | None, rows: Iterable[Claimed], began: float, ended: float) -> None:
        """What a look found, and how long it took."""
        took = ended - began
        if levels is None:
            self._took = took
            self._ends.clear()
            self._again = ended + took * _SHARE if took > SLOW else -math.inf
        elif took > self._took * 0.8:
            self._again = -math.inf
        if self._again > ended:
            for row in rows:  # in the order of available_at within a level: the last is the end
                self._ends[row.topic, row.priority] = row.available_at

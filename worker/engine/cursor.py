"""Where a claim begins to look.

A claimed row leaves an entry in the claim's index, and a look from the front of a topic reads past those of
all rows claimed before. As a rule the server marks an entry as dead as soon as nobody can see the row as
ready any more, and passes a page of such in 2 us; but the page stays until a VACUUM, for a minute or more.
While a foreign transaction holds its snapshot (a dump, a forgotten psql), nothing is even marked: on one
core, throughput fell from 6,400 to 400 rows/s within 90 s, and 12 million entries take 3.5 s. So:

1. Looks from the front are timed. While rows keep coming they take a tenth of the time at most: others begin
   at the end of the last one, as in 2, but SOON earlier. At 7,500 rows/s on one core the server spent 27 us
   on a row after a VACUUM and 37 a minute later, now 33. When the worker had been stopped for 5 s it was 60
   until the next VACUUM, and 15 s until it had caught up; now 30, and 4 s. A worker that is about to sleep,
   or has ended a row whose ordering_key others wait for, looks from the front.
2. After two slow ones in a row, or one that took a second, the loop reads nothing from the front any more:
   the front is far. (The first of a connection is slow for another reason: it is planned.) Looks begin at
   the end of the last one, by topic and priority: at the last row claimed there, by available_at and id.
   Slow is only what takes MUCH longer than looks from the ends do: of 50 workers on two cores each look waits
   for its turn, and by SLOW alone each of them sent a scout a second, 7 % of the server's time.
3. Every now and then such a look begins a second earlier (NEAR). Most of what it would miss lies there: rows
   committed a moment after a later one, or locked by somebody when it passed.
4. The rest is found by a scout, which reads the front on a connection of its own (worker/engine/background.py), so that
   the loop goes on meanwhile. It locks nothing and reads each entry once (outbox_scout in
   sql/outbox/functions/scan.sql). It finds topics and priorities that have no end yet, and rows before the
   ends, wherever they lie: committed late, handed back, retried, freed by the end of another of their key.
   The next looks go to each of those rows alone. Nothing is cut into slices: how rows are spread over time
   does not matter.
5. It goes again after REST, or SHARE times what it took. So what looks do not see is found within SHARE + 2
   times the duration of a scout; at 12 million entries, half a minute. If it brought as many rows as it
   carries, it goes again as soon as they are taken.
6. A scout that was quick says that the front is: all is as in 1. It is trusted for a while (TRUST), so that a
   machine which is slow for other reasons does not send one after each look.
7. A worker may sleep only if no row is due (worker/engine/parking.py, steps 4 and 5). That too a scout says, when the
   front is far: one that began after the last reason to look, and saw none. It also says when the next row
   is due, which outbox_next_deadline would read the front for. Until it is back the worker waits, its flag
   up: who makes a row claimable notifies, and a look as in 2 and 3 is taken at once.
8. A look from the front that was cut off, as is one that lasts longer than a lease, counts as slow. Else a
   worker that starts behind 20 million entries would begin it again and again.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from outwake.claim import Claimed, Level
from outwake.telemetry.log import get_logger

log = get_logger(__name__)

SLOW, VERY_SLOW, QUICK = 0.02, 1.0, 0.003  # seconds
MUCH, LITTLE = 4, 1  # times what a look from the ends takes: more is slow, less is quick
NEAR, SOON = timedelta(seconds=1), timedelta(seconds=0.1)
NEAR_SHARE = 10
"""At 10,000 rows/s a second is 10,000 entries or 3 ms, as long as a look; it comes every 30 ms then. SOON is
five pages of entries that are marked."""
SHARE, REST = 5, 1.0  # times, seconds
TRUST = 2.0  # seconds
CARRIES = 5000
"""Rows of one topic and priority that a scout brings."""
_LEVELS = 100
"""Topics and priorities that a look goes to, each a descent of 5 us; a scout finds the others."""

Place = tuple[datetime, int]
"""available_at and id, the order of a level's rows."""
Ends = dict[tuple[str, int], Place]


class Look(NamedTuple):
    """What to look for; levels None: everything, from the front."""

    levels: list[Level] | None
    near: bool = False


class Seen(NamedTuple):
    """A claimable row that a scout saw, due in that many seconds."""

    topic: str
    priority: int
    available_at: datetime
    id: int
    due_in: float


class Front:
    """The ends of the last looks, and what the scout has seen."""

    def __init__(self) -> None:
        self.far = False
        self.scout_at = -math.inf
        self.next_due: datetime | None = None
        """As the last scout saw it."""
        self._front_at = -math.inf
        self.ends: Ends = {}
        self.missed: deque[Level] = deque()
        """Rows that the last scout saw and no look has gone to yet."""
        self._near_at = -math.inf
        self._trusted_until = -math.inf
        self._seen_all = self._clear = -math.inf
        self._slow = False
        self._usual = 0.0
        """Seconds that a look from the ends takes."""

    def look(self, topics: Iterable[str], slots: int, now: float, *, busy: bool = False) -> Look:
        """What to look for now: of one priority, the topics in this order. busy: rows keep coming, and none
        is known to have become claimable before the ends.
        """
        if not self.far:
            if not busy or now >= self._front_at or not self.ends:
                return Look(None)
            return Look(self._from_ends(topics, SOON))
        near = now >= self._near_at
        levels = [self.missed.popleft() for _ in range(min(slots, len(self.missed)))]
        return Look(levels + self._from_ends(topics, NEAR if near else timedelta(0)), near)

    def looked(self, look: Look, rows: Iterable[Claimed], began: float, ended: float) -> None:
        """What a look found, and how long it took."""
        if look.levels is None:
            self._seen_all = began
        self.gave_up(look, began, ended)
        # The last of each is the furthest, nearly always; any end that was reached will do.
        for level, place in {(r.topic, r.priority): (r.available_at, r.id) for r in rows}.items():
            self._reached(level, place)

    def gave_up(self, look: Look, began: float, ended: float) -> None:
        """A look that found nothing: it failed, cut off after a lease at the latest."""
        took = ended - began
        if look.levels is None:
            self._front_at = ended + took * NEAR_SHARE
            slow = took > max(SLOW, self._usual * MUCH) and ended > self._trusted_until
            again, self._slow = self._slow, slow
            self._usual = min(self._usual, took)
            if self._slow and (again or took > VERY_SLOW):
                log.debug("front_is_far", look_took=round(took, 3))
                self._go_far(ended)
        elif look.near:
            self._near_at = ended + took * NEAR_SHARE
        else:
            self._usual += (took - self._usual) / 8

    def scout_is_due(self, now: float) -> bool:
        """Not while rows that the last one brought wait for a slot: it would bring them again."""
        return self.far and now >= self.scout_at and not self.missed

    def scouted(self, known: Ends, seen: Sequence[Seen], began: float, ended: float) -> None:
        """What a scout saw that was told these ends."""
        took = ended - began
        if took <= max(QUICK, self._usual * LITTLE):
            log.debug("front_is_near")
            self.far = False
            self._trusted_until = ended + TRUST
            return
        self.scout_at = ended + max(REST, took * SHARE)
        if all(row.due_in > 0 for row in seen):
            self._clear = began
        self.next_due = min((row.available_at for row in seen), default=None)
        for row in seen:
            level, place = (row.topic, row.priority), (row.available_at, row.id)
            if level not in known:
                self._reached(level, place)
            elif place < known[level]:
                self.missed.append(Level(*level, *place, alone=True))
        if len(self.missed) >= CARRIES:
            self.scout_at = ended

    def scout_failed(self, began: float, now: float) -> None:
        self.scout_at = now + max(REST, (now - began) * SHARE)

    def is_clear(self, since: float) -> bool:
        """Whether all that was due at `since` has been looked at: by a look from the front or, if that is
        far, by a scout that saw nothing due. One does not do for the other: a look does not tell what is
        due next, and a scout that was quick leaves what it saw to the next look.
        """
        return (self._clear if self.far else self._seen_all) >= since

    def _go_far(self, now: float) -> None:
        self.far, self._slow, self.scout_at, self._clear = True, False, now, -math.inf
        self.next_due = None
        self.missed.clear()

    def _from_ends(self, topics: Iterable[str], earlier: timedelta) -> list[Level]:
        turn = {topic: place for place, topic in enumerate(topics)}
        return [
            Level(topic, priority, at - earlier, row_id, alone=False)
            for (topic, priority), (at, row_id) in sorted(self.ends.items(), key=lambda end: turn[end[0][0]])
        ]

    def _reached(self, level: tuple[str, int], place: Place) -> None:
        """The end moves on; the levels that rows were found of last are kept."""
        self.ends[level] = max(self.ends.pop(level, place), place)
        if len(self.ends) > _LEVELS:
            del self.ends[next(iter(self.ends))]

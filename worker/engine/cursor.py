"""Where in the queue a claim begins to scan.

A claimed row leaves an entry in the claim's index. A scan from the head of a topic reads past the entries of
all rows claimed before. As a rule the server marks an entry as dead as soon as nobody can see the row as
ready any more. It skips marked entries quickly, but they stay until a VACUUM, for a minute or more. While a
foreign transaction holds its snapshot (a dump, a forgotten psql), the server does not even mark them, and
throughput would fall to a fraction (docs/profile.md). So:

1. Head scans are timed. While rows keep coming, head scans take a tenth of the time at most. The other scans
   begin at the cursors, as in 2, but SOON earlier. A worker scans from the head when it is about to sleep, or
   when it has ended a row whose ordering_key others wait for.
2. After two slow head scans in a row, or after one longer than VERY_SLOW, the worker claims nothing from the
   head any more: the head is far. Once is not enough, because a connection's first scan is slow: it is
   planned. Scans then begin at the cursors. A cursor is the last row claimed of a topic and priority (a
   lane), by available_at and id. A head scan counts as slow only if it takes longer than SLOW and MUCH times
   as long as a cursor scan. With SLOW alone, many workers on few cores, whose scans wait for each other,
   start background scans all the time (docs/profile.md).
3. Every now and then, a cursor scan begins NEAR earlier. Most rows that it would miss lie there: they were
   committed a moment after a later row, or were locked when a scan passed them.
4. A background scan finds the rest. It reads the head on its own connection (worker/engine/background.py),
   so that the worker's cycles go on meanwhile. It locks nothing and reads each entry once (outbox_scout in
   sql/outbox/functions/scan.sql). It finds topics and priorities that have no cursor yet. It also finds rows
   before the cursors, wherever they lie: committed late, handed back, retried, or freed by the end of another
   row of their key. The next scans go to each of those rows alone. Nothing is cut into slices, so it does not
   matter how rows are spread over time.
5. The next background scan begins after REST, or after SHARE times the duration of the last, if that is
   longer. So a row that cursor scans do not see is found within SHARE + 2 times the duration of a background
   scan. If a background scan brought as many rows as it carries, the next begins as soon as they are taken.
6. If a background scan was quick, the head is near: everything is as in 1. For a while (TRUST), no head scan
   counts as slow. Otherwise a machine that is slow for other reasons would start a background scan after each
   of them.
7. A worker may sleep only if no row is due (worker/engine/parking.py, steps 4 and 5). When the head is far, a
   background scan has to confirm that: one that began after the last reason to scan, and saw no due row. It
   also tells when the next row falls due, because outbox_next_deadline would read the head for that. Until
   the background scan returns, the worker waits with its parked flag set: whatever makes a row claimable
   notifies, and a scan as in 2 and 3 follows at once.
8. A head scan that was aborted counts as slow. One that lasts longer than a lease is aborted. Otherwise a
   worker that starts behind 20 million entries would begin it again and again.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from outwake._claim import Claimed, Lane
from outwake.telemetry.log import get_logger

log = get_logger(__name__)

SLOW, VERY_SLOW, QUICK = 0.02, 1.0, 0.003  # seconds
MUCH, LITTLE = 4, 1  # times what a cursor scan takes: above MUCH is slow, up to LITTLE is quick
NEAR, SOON = timedelta(seconds=1), timedelta(seconds=0.1)
NEAR_SHARE = 10
"""A head scan, or one from NEAR before the cursors, comes again after this many times its own duration."""
SHARE, REST = 5, 1.0  # times, seconds
TRUST = 2.0  # seconds
CARRIES = 5000
"""The most rows of one topic and priority that a background scan brings."""
_LANES = 100
"""The most cursors that are kept: a scan descends the index for each. A background scan finds the others."""

Place = tuple[datetime, int]
"""available_at and id: the order of the rows of a topic and priority."""
Places = dict[tuple[str, int], Place]


class Scan(NamedTuple):
    """What to scan. If lanes is None: everything, from the head."""

    lanes: list[Lane] | None
    near: bool = False


class Seen(NamedTuple):
    """A claimable row that a background scan saw; it is due in due_in seconds."""

    topic: str
    priority: int
    available_at: datetime
    id: int
    due_in: float


class Cursors:
    """The scan cursors, and what the last background scan saw."""

    def __init__(self) -> None:
        self.far = False
        self.background_at = -math.inf
        self.next_due: datetime | None = None
        """The earliest row that the last background scan saw."""
        self._head_at = -math.inf
        self.places: Places = {}
        self.missed: deque[Lane] = deque()
        """Rows that the last background scan saw and no scan has gone to yet."""
        self._near_at = -math.inf
        self._trusted_until = -math.inf
        self._seen_all = self._clear = -math.inf
        self._slow = False
        self._usual = 0.0
        """Seconds that a cursor scan takes."""

    def next_scan(self, topics: Iterable[str], slots: int, now: float, *, busy: bool = False) -> Scan:
        """What to scan now. Within a priority, the topics are scanned in this order. busy: rows keep coming,
        and no row is known to have become claimable before the cursors.
        """
        if not self.far:
            if not busy or now >= self._head_at or not self.places:
                return Scan(None)
            return Scan(self._from_places(topics, SOON))
        near = now >= self._near_at
        lanes = [self.missed.popleft() for _ in range(min(slots, len(self.missed)))]
        return Scan(lanes + self._from_places(topics, NEAR if near else timedelta(0)), near)

    def scanned(self, scan: Scan, rows: Iterable[Claimed], began: float, ended: float) -> None:
        """Record what a scan found, and how long it took."""
        if scan.lanes is None:
            self._seen_all = began
        self.gave_up(scan, began, ended)
        # The last row of each lane is nearly always the furthest. Any row that was reached will do.
        for lane, place in {(r.topic, r.priority): (r.available_at, r.id) for r in rows}.items():
            self._reached(lane, place)

    def gave_up(self, scan: Scan, began: float, ended: float) -> None:
        """Record how long a scan took that failed; it was aborted after a lease at the latest."""
        took = ended - began
        if scan.lanes is None:
            self._head_at = ended + took * NEAR_SHARE
            slow = took > max(SLOW, self._usual * MUCH) and ended > self._trusted_until
            again, self._slow = self._slow, slow
            self._usual = min(self._usual, took)
            if self._slow and (again or took > VERY_SLOW):
                log.debug("head_is_far", took=round(took, 3))
                self._go_far(ended)
        elif scan.near:
            self._near_at = ended + took * NEAR_SHARE
        else:
            self._usual += (took - self._usual) / 8

    def background_is_due(self, now: float) -> bool:
        """Never while rows of the last background scan wait for a slot: the next would bring them again."""
        return self.far and now >= self.background_at and not self.missed

    def background_saw(self, known: Places, seen: Sequence[Seen], began: float, ended: float) -> None:
        """Record what a background scan saw; `known` are the cursors that it was given."""
        took = ended - began
        if took <= max(QUICK, self._usual * LITTLE):
            log.debug("head_is_near")
            self.far = False
            self._trusted_until = ended + TRUST
            return
        self.background_at = ended + max(REST, took * SHARE)
        if all(row.due_in > 0 for row in seen):
            self._clear = began
        self.next_due = min((row.available_at for row in seen), default=None)
        for row in seen:
            lane, place = (row.topic, row.priority), (row.available_at, row.id)
            if lane not in known:
                self._reached(lane, place)
            elif place < known[lane] and row.due_in <= 0:  # else a later scan brings it, when it is due
                self.missed.append(Lane(*lane, *place, alone=True))
        if len(self.missed) >= CARRIES:
            self.background_at = ended

    def background_failed(self, began: float, now: float) -> None:
        self.background_at = now + max(REST, (now - began) * SHARE)

    def is_clear(self, since: float) -> bool:
        """Whether everything due at `since` has been scanned: by a head scan or, if the head is far, by a
        background scan that saw no due row. One cannot replace the other: a head scan does not tell what is
        due next, and a quick background scan leaves the rows that it saw to the next scan.
        """
        return (self._clear if self.far else self._seen_all) >= since

    def _go_far(self, now: float) -> None:
        self.far, self._slow, self.background_at, self._clear = True, False, now, -math.inf
        self.next_due = None
        self.missed.clear()

    def _from_places(self, topics: Iterable[str], earlier: timedelta) -> list[Lane]:
        turn = {topic: place for place, topic in enumerate(topics)}
        return [
            Lane(topic, priority, at - earlier, row_id, alone=False)
            for (topic, priority), (at, row_id) in sorted(
                self.places.items(), key=lambda end: turn[end[0][0]]
            )
        ]

    def _reached(self, lane: tuple[str, int], place: Place) -> None:
        """Move the cursor on. The lanes in which rows were found last are kept."""
        self.places[lane] = max(self.places.pop(lane, place), place)
        if len(self.places) > _LANES:
            del self.places[next(iter(self.places))]

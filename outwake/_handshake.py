"""The parking handshake: how a reader falls asleep without missing a write, although writers notify only
while a reader sleeps.

A NOTIFY takes one lock of the whole cluster while it commits. So a writer notifies only if it finds a flag
that somebody has raised: `worker.parked` for rows of the outbox, a row of `watcher` for a session. It looks
for the flag after its own write. There is a race to close: a writer looks, finds no flag, and commits after
the reader's last scan.

1. Raise the flag and commit. From here on, each writer that looks finds the flag and notifies.
2. Read which transactions hold a writer's lock (RowExclusiveLock) on the table now. A writer that missed the
   flag looked before step 1, and it took that lock before it looked. So it is one of these transactions, or
   it has committed.
3. Scan. Read the transactions again, after a pause that doubles from milliseconds up to a second, and scan
   again each time that one of step 2 has ended. Locks are released only after the commit is visible. Writers
   that come later have found the flag, so the reader waits for none of them.
4. When all transactions of step 2 have ended, scan once more. The scan must begin after they were seen to
   have ended, so that it sees their writes.
5. Sleep until a notification comes. The flag stays raised as long as the reader lives on this LISTEN
   connection, and LISTEN came before step 1. If the connection is lost, so are notifications: start again at
   step 1.

Its users: a worker that parks (worker/engine/parking.py), the event streams of an API process
(app/live/watches.py) and the reader of one session (outwake/session/watch.py).
"""

from collections.abc import Iterable

PAUSES = (0.002, 1.0)
"""Seconds before the transactions are read again: the first pause, and the longest."""


class Handshake:
    """The transactions of step 2 that have not ended. Make one when step 1 has been committed."""

    def __init__(self) -> None:
        self._waits_for: frozenset[str] | None = None

    @property
    def over(self) -> bool:
        """Whether all of them have ended."""
        return self._waits_for is not None and not self._waits_for

    def saw(self, writers: Iterable[str]) -> bool:
        """Steps 2 and 3: these transactions write now. Returns whether a scan is due."""
        before, now = self._waits_for, frozenset(writers)
        self._waits_for = now if before is None else before & now
        return self._waits_for != before

"""Parking: how a worker falls asleep without missing a row.

A NOTIFY takes one lock of the whole cluster while it commits, so producers notify only when a worker sleeps.
After its own write, the insert's trigger looks for a worker whose parked flag (`worker.parked`) is set. There
is a race to close: a producer looks, sees no parked worker, and commits after the worker's last scan. To
park:

1. Set `worker.parked` and commit. From here on, each producer that looks sees the flag and notifies.
2. Set the sequence outbox_sleepers. Then read which transactions hold a writer's lock (RowExclusiveLock) on
   outbox now. A producer that missed the flag looked before step 1, and it took that lock before it looked.
   So it is one of these transactions, or it has committed. The same is true of a producer that did not look
   because outbox_sleepers was not set. It too read the sequence under that lock, and before it was set: while
   a parked flag is set, nobody clears the sequence.
3. Claim, and repeat that after milliseconds to a second, until all of those transactions have ended. Locks
   are released only after the commit is visible.
4. Claim once more, in a statement that begins after the transactions were seen to have ended: it sees their
   rows. (The claim of the cycle that finds none left is that statement: it begins after the locks were read.)
5. Sleep until a notification or the next deadline. But do not sleep while a due row is visible that was
   skipped only because it is locked: the lock's holder may roll back, which notifies nobody. Scan again, with
   a backoff up to a second.

A worker that is woken and keeps free slots stays parked. Its flag has been set all the time, so every
producer since step 1 has notified. When it fills its slots, the claim clears the flag in its own commit.

When a notification names one row by its id, a parked worker claims only that row (outbox_claim_row). If the
notification names another worker, this one acts as a backup (worker/engine/backup.py). No scan is needed:
whatever else has become claimable since step 4 has notified by itself. If another worker took the row, this
one stays asleep. If the row is still there (it is locked, or its topic is limited), this one runs a full
scan, as in step 5.

A lost LISTEN connection loses notifications. After it, everything starts again at step 1.
"""

from collections.abc import Iterable
from enum import Enum


class Stage(Enum):
    """How far a worker is on its way to sleep."""

    AWAKE = "awake"
    """Rows keep coming, or all slots are taken: producers need not notify."""
    SETTLING = "settling"
    """Steps 1 and 2 are done. Step 3 waits until the writers have ended."""
    PARKED = "parked"
    """Step 5."""


AWAKE, SETTLING, PARKED = Stage  # `Stage.AWAKE` is slow in Python 3.11


class Parking:
    """The stage of a worker, and the transactions that it still waits for."""

    def __init__(self) -> None:
        self.stage = AWAKE
        self._waits_for: frozenset[str] | None = None

    def begin(self) -> None:
        """Step 1 has been committed."""
        self.stage = SETTLING
        self._waits_for = None

    def saw_writers(self, writers: Iterable[str]) -> bool:
        """Steps 2 and 3: these transactions write now. Returns whether all that step 2 read have ended."""
        assert self.stage is SETTLING
        now = frozenset(writers)
        self._waits_for = now if self._waits_for is None else self._waits_for & now
        return not self._waits_for

    def settled(self) -> None:
        """Step 4 has been done and left slots free."""
        assert self.stage is SETTLING
        assert not self._waits_for
        self.stage = PARKED

    def wake(self) -> None:
        """The parked flag was cleared, or the LISTEN connection was lost."""
        self.stage = AWAKE

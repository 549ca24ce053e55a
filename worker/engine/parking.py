"""Parking: how a worker falls asleep without missing a row.

A NOTIFY takes one lock of the whole cluster while it commits, so producers notify only when somebody
sleeps: the trigger looks for a parked worker after its own write. The race to close: a producer looks,
sees nobody parked, and commits after the worker's last look. Hence, to park:

1. Set `worker.parked` and commit. From here on, whoever looks sees the flag, and notifies.
2. Raise outbox_sleepers, then note which transactions hold a writer's lock (RowExclusiveLock) on outbox
   now. Who missed the flag looked before step 1, and took that lock before it looked: so it is among
   these, or has committed. Who found outbox_sleepers down, and so did not look, read it under that lock
   too: before it was raised, for while the flag is up nobody takes it down again.
3. Claim, and come back, from milliseconds to a second later, until all of those have ended. Locks are
   released only after the commit is visible.
4. Claim once more, in a statement begun after they were seen to have ended: it sees their rows. (The
   claim of the round that finds none left is that statement: it begins after the look at the locks.)
5. Sleep until a notification or the next deadline; but not while a due row is visible that was only
   skipped as locked: its locker may roll back without a word. Look again, backing off to a second.

A worker that is woken and keeps free slots stays parked: its flag was never down, so every producer
since step 1 has notified. Filling its slots clears the flag, in the claim's own commit.

Told of one row by its id, a parked worker claims that row alone (outbox_claim_row), or stands by if another
was named (worker/engine/backup.py). Whatever else has become claimable since step 4 was notified of by itself. Was
the row taken by another, it sleeps on without a look; is it still there, locked or of a limited topic, the
worker looks for everything, as in step 5.

A lost LISTEN connection loses notifications: after it, all starts again at step 1.
"""

from collections.abc import Iterable
from enum import Enum


class Stage(Enum):
    """Where a worker is on its way to sleep."""

    AWAKE = "awake"
    """Rows keep coming, or all slots are taken: nobody needs to notify."""
    SETTLING = "settling"
    """Steps 1 and 2 are done, step 3 goes on."""
    PARKED = "parked"
    """Step 5."""


AWAKE, SETTLING, PARKED = Stage  # `Stage.AWAKE` takes Python 3.11 0.5 us, six times a turn


class Parking:
    """The stage a worker is in, and the transactions it still waits for."""

    def __init__(self) -> None:
        self.stage = AWAKE
        self._waits_for: frozenset[str] | None = None

    def begin(self) -> None:
        """Step 1 has been committed."""
        self.stage = SETTLING
        self._waits_for = None

    def saw_writers(self, writers: Iterable[str]) -> bool:
        """Steps 2 and 3: who writes now. Returns whether all that step 2 noted have ended."""
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
        """The flag is down, or the LISTEN connection lost."""
        self.stage = AWAKE

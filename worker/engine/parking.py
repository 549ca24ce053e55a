"""Parking: how a worker falls asleep without missing a row.

It is the handshake of outwake/_handshake.py. The flag is `worker.parked`, the scan is a claim. To its steps:

- Step 1 comes after an ordinary claim found no row, and `outbox_park` does it.
- Step 2, `outbox_writers`, first sets the sequence outbox_sleepers. Producers look for a flag only while it
  is set. A producer that did not look, because the sequence was not set, is a writer of step 2 as well, or
  has committed: it read the sequence under its writer's lock, and before the sequence was set. While a flag
  is raised, nobody clears the sequence.
- The claim of the cycle that finds no writer left is step 4: it begins after the writers were read.
- A worker does not sleep while a due row is visible that was skipped only because it is locked: the lock's
  holder may roll back, which notifies nobody. It scans again, with a backoff up to a second.

A worker that is woken and keeps free slots stays parked. Its flag has been raised all the time, so every
producer since step 1 has notified. When it fills its slots, the claim clears the flag in its own commit.

When a notification names one row by its id, a parked worker claims only that row (outbox_claim_row). If the
notification names another worker, this one acts as a backup (worker/engine/backup.py). No scan is needed:
whatever else has become claimable since step 4 has notified by itself. If another worker took the row, this
one stays asleep. If the row is still there (it is locked, or its topic is limited), this one runs a full
scan, as for a row that was skipped.
"""

from collections.abc import Iterable
from enum import Enum

from outwake._handshake import Handshake


class Stage(Enum):
    """How far a worker is on its way to sleep."""

    AWAKE = "awake"
    """Rows keep coming, or all slots are taken: producers need not notify."""
    DRAINING_WRITERS = "draining writers"
    """Steps 1 and 2 are done. Step 3 waits until the writers have ended."""
    PARKED = "parked"
    """Step 5."""


class Parking:
    """The stage of a worker, and its handshake."""

    def __init__(self) -> None:
        self.stage = Stage.AWAKE
        self._handshake = Handshake()

    def begin(self) -> None:
        """Step 1 has been committed."""
        self.stage = Stage.DRAINING_WRITERS
        self._handshake = Handshake()

    @property
    def writers_left(self) -> bool:
        """Whether transactions of step 2 had not ended when they were last read."""
        return not self._handshake.over

    def saw_writers(self, writers: Iterable[str]) -> bool:
        """Steps 2 and 3: these transactions write now. Returns whether all that step 2 read have ended."""
        assert self.stage is Stage.DRAINING_WRITERS
        self._handshake.saw(writers)
        return self._handshake.over

    def drained(self) -> None:
        """Step 4 has been done and left slots free."""
        assert self.stage is Stage.DRAINING_WRITERS
        assert self._handshake.over
        self.stage = Stage.PARKED

    def wake(self) -> None:
        """The parked flag was cleared, or the LISTEN connection was lost."""
        self.stage = Stage.AWAKE

"""The moments at which a worker has to do something although nothing happened.

All are on this host's monotonic clock. What the database says is by the server's clock, so each answer with
deadlines also measures how far the two clocks are apart.
"""

import math
import time

_AGAIN_FIRST, _AGAIN_LAST = 0.002, 1.0
"""Seconds until a scan is repeated, which double each time."""


class Timers:
    """The deadlines of rows and of other workers' leases."""

    def __init__(self) -> None:
        self.row_at = math.inf
        """A row falls due, or a scan is to be repeated."""
        self.rescue_at = math.inf
        """Another worker's lease ends."""
        self._announced_row = self._announced_lease = math.inf
        """The earliest deadlines that were announced and that no query for deadlines is sure to have seen."""
        self._offset = 0.0
        """The server's clock minus ours."""
        self._again = self._rescue_again = _AGAIN_FIRST
        self._no_rescue_before = -math.inf

    def reset(self) -> None:
        """The LISTEN connection is new. Everything is scanned, and the deadlines are asked for after that."""
        self.row_at = self.rescue_at = math.inf

    def asks(self, *, rows: bool) -> None:
        """The query for deadlines begins, of leases and perhaps of rows. It sees what was announced before,
        but perhaps not what is announced meanwhile.
        """
        self._announced_lease = math.inf
        if rows:
            self._announced_row = math.inf

    def found(
        self, row_due: float | None, lease_end: float | None, server_time: float, jitter: float
    ) -> None:
        """Set the deadlines, in seconds from now, that the query has found. `jitter` comes after a lease's
        end: of many workers that sleep, the first does the rescue.
        """
        now = time.monotonic()
        self._offset = server_time - now
        self.row_at = math.inf if row_due is None else now + row_due
        if lease_end is not None and lease_end <= 0:  # nobody has rescued, or a row is locked
            self.rescue_at = max(now, self._no_rescue_before)
            return
        self._rescue_again = _AGAIN_FIRST
        self.rescue_at = math.inf if lease_end is None else now + lease_end + jitter

    def tries_rescue(self) -> None:
        """A rescue begins. If a lease is over all the same afterwards, the next one comes after a backoff."""
        self.rescue_at = math.inf
        self._no_rescue_before = time.monotonic() + self._rescue_again
        self._rescue_again = min(self._rescue_again * 2, _AGAIN_LAST)

    def keep_announced(self) -> None:
        """What was announced and not asked for counts too."""
        self.row_at = min(self.row_at, self._announced_row)
        self.rescue_at = min(self.rescue_at, self._announced_lease)

    def passes(self, now: float) -> None:
        """A deadline that has passed is acted upon now."""
        if self._announced_row <= now:
            self._announced_row = math.inf
        if self._announced_lease <= now:
            self._announced_lease = math.inf

    def announced_row(self, due: float) -> bool:
        """A row falls due then, by the server's clock. Whether a deadline has changed."""
        at = self.here(due)
        self._announced_row = min(self._announced_row, at)
        changed = at < self.row_at
        self.row_at = min(self.row_at, at)
        return changed

    def announced_lease(self, due: float, jitter: float) -> bool:
        """A lease ends then, by the server's clock. Whether a deadline has changed."""
        at = self.here(due) + jitter
        self._announced_lease = min(self._announced_lease, at)
        changed = at < self.rescue_at
        self.rescue_at = min(self.rescue_at, at)
        return changed

    def repeat_scan(self) -> None:
        """Scan again after a backoff."""
        now = time.monotonic()
        again = now + self._again
        self.row_at = again if self.row_at <= now else min(self.row_at, again)
        self._again = min(self._again * 2, _AGAIN_LAST)

    def rows_came(self) -> None:
        """The backoff begins anew."""
        self._again = _AGAIN_FIRST

    def here(self, server_time: float) -> float:
        """A time of the server's clock, in seconds of its epoch, on our clock."""
        return server_time - self._offset

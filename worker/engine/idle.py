"""Idle backoff: an awake worker that left slots free pauses before it scans again, and parks only later.

Rows that come meanwhile are claimed together, and producers need not notify. Each time a worker parks, it
leaves dead versions of its row, which every insert that checks the flags reads past while somebody holds an
old snapshot.
"""

import math
import time

_FIRST, _LAST = 0.002, 0.008
"""The first pause, and the longest, in seconds. Each is twice as long as the one before."""
_AWAKE = 0.25
"""Seconds after its slots were last full, in which a worker pauses and does not park."""


class IdleBackoff:
    """The pause before an awake worker's next scan."""

    def __init__(self) -> None:
        self.pause = 0.0
        self._last = 0.0
        self._filled_at = -math.inf

    def scans(self) -> None:
        """The next scan begins."""
        self._last, self.pause = self.pause, 0.0

    def filled(self) -> None:
        """The scan filled the slots."""
        self._filled_at = time.monotonic()

    def came(self) -> None:
        """The scan brought rows and left slots free."""
        self.pause = _FIRST

    def found_nothing(self) -> bool:
        """Whether to pause once more. Otherwise the worker parks."""
        pauses = 0 < self._last < _LAST or time.monotonic() < self._filled_at + _AWAKE
        if pauses:
            self.pause = min(max(self._last * 2, _FIRST), _LAST)
        return pauses

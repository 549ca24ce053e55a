"""Limits of one user in an API process: requests a second and open streams.

The process counts both itself, so a request costs no query; n processes allow n times as much. The database
limits a user's sessions (session_admit). For operators only the process's own limit of streams applies.
"""

import time
from collections import Counter
from collections.abc import Callable

from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.settings import Settings

BURST = 10  # seconds of the rate
REMEMBERED = 10_000  # users
STREAM_RETRY = 5  # seconds


class Limits:
    """The counters of the process."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        # By user: the requests left, and the time of that count. A user without an entry has a full bucket.
        self._buckets: dict[str, tuple[float, float]] = {}
        self._streams: Counter[str] = Counter()

    def admit(self, identity: Identity) -> None:
        """Count a request. Raises Problem (too-many-requests)."""
        if identity.operator:
            return
        rate = self._settings.request_rate
        size = max(1.0, rate * BURST)
        now = self._clock()
        left, at = self._buckets.pop(identity.user_id, (size, now))
        left = min(size, left + (now - at) * rate)
        if left < 1:
            self._buckets[identity.user_id] = (left, now)
            wait = max(1, round((1 - left) / rate + 0.5))
            raise Problem(
                "too-many-requests", f"The limit is {rate:g} a second.", headers={"Retry-After": str(wait)}
            )
        self._buckets[identity.user_id] = (left - 1, now)
        if len(self._buckets) > REMEMBERED:  # the first user has been idle longest
            del self._buckets[next(iter(self._buckets))]

    def open_stream(self, identity: Identity) -> Callable[[], None]:
        """Count an event stream until the caller calls the result. Raises Problem (too-many-streams)."""
        limit = self._settings.max_streams
        if not identity.operator and self._streams[identity.user_id] >= limit:
            raise _too_many(f"You have {limit} event streams open.")
        if self._streams.total() >= self._settings.max_process_streams:
            raise _too_many("This process has no room for another event stream.")
        self._streams[identity.user_id] += 1
        return lambda: self._close(identity.user_id)

    def _close(self, user_id: str) -> None:
        self._streams[user_id] -= 1
        if not self._streams[user_id]:
            del self._streams[user_id]


def _too_many(detail: str) -> Problem:
    return Problem("too-many-streams", detail, headers={"Retry-After": str(STREAM_RETRY)})

"""Limits of one user in an API process: requests a second and at once, bodies, open streams.

The process counts these itself, so a request costs no query; n processes allow n times as much. The database
limits a user's sessions (session_admit). For operators only the process's own limits of streams and bodies
apply. app/connections.py limits those that have not shown a token.
"""

import time
from collections import Counter
from collections.abc import Callable

from starlette.requests import Request

from outwake.app.api.problems import Problem, unavailable
from outwake.app.auth.identity import Identity
from outwake.app.connections import has_shown_a_token
from outwake.settings import Settings

BURST = 10  # seconds of the rate
REMEMBERED = 10_000  # users
STREAM_RETRY = 5  # seconds
AT_ONCE = 32  # requests of a user that are read, answered or sent
BODIES = 67_108_864  # bytes of bodies that a process reads at once
BODIES_OF_USER = 16_777_216  # bytes


class Limits:
    """The counters of the process."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        # By user: the requests left, and the time of that count. A user without an entry has a full bucket.
        self._buckets: dict[str, tuple[float, float]] = {}
        self._streams: Counter[str] = Counter()
        self._at_once: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()

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

    def begin(self, identity: Identity) -> Callable[[], None]:
        """Count a request until the caller calls the result. Raises Problem (too-many-requests)."""
        user = identity.user_id
        if not identity.operator and self._at_once[user] >= AT_ONCE:
            raise Problem(
                "too-many-requests",
                f"You have {AT_ONCE} requests that are not answered yet.",
                headers={"Retry-After": "1"},
            )
        self._at_once[user] += 1
        return _once(lambda: _subtract(self._at_once, user, 1))

    def hold_body(self, user: str, size: int) -> None:
        """Count bytes of a body until `drop_body`. Raises Problem (too-many-requests, unavailable)."""
        self._bodies[user] += size
        if self._bodies[user] > BODIES_OF_USER:
            raise Problem("too-many-requests", "You send too much at once.", headers={"Retry-After": "1"})
        if self._bodies.total() > BODIES:
            raise unavailable("Too much is sent to this process at once; try again.")

    def drop_body(self, user: str, size: int) -> None:
        _subtract(self._bodies, user, size)

    def open_stream(self, identity: Identity) -> Callable[[], None]:
        """Count an event stream until the caller calls the result. Raises Problem (too-many-streams)."""
        limit = self._settings.max_streams
        if not identity.operator and self._streams[identity.user_id] >= limit:
            raise _too_many(f"You have {limit} event streams open.")
        if self._streams.total() >= self._settings.max_process_streams:
            raise _too_many("This process has no room for another event stream.")
        self._streams[identity.user_id] += 1
        return lambda: _subtract(self._streams, identity.user_id, 1)


def admit(request: Request, limits: Limits, identity: Identity) -> None:
    """Count this user's request. Access, which sees the end of its answer, calls `state.release`.

    Raises Problem (too-many-requests).
    """
    has_shown_a_token(request)
    limits.admit(identity)
    request.state.release = limits.begin(identity)
    request.state.user = identity.user_id


def _once(call: Callable[[], None]) -> Callable[[], None]:
    calls = [call]
    return lambda: calls.pop()() if calls else None


def _subtract(counter: Counter[str], user: str, amount: int) -> None:
    counter[user] -= amount
    if counter[user] <= 0:
        del counter[user]


def _too_many(detail: str) -> Problem:
    return Problem("too-many-streams", detail, headers={"Retry-After": str(STREAM_RETRY)})

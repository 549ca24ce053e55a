"""Whether the LISTEN connection still hears: the worker notifies itself, through its other connection.

Some proxies keep a socket open although its server has gone, and keepalive cannot see that. If
`OUTWAKE_LISTEN_PROBE` is set, the worker sends a probe now and then, and reconnects if it does not hear it.
"""

import math
import time

import psycopg

from outwake.handler import Connection
from outwake.worker.engine.listen import PROBE


class Probe:
    """The next probe, or the one that is under way."""

    def __init__(self, every: float, patience: float) -> None:
        self.at = math.inf
        """When to send it, or when to give the connection up, on the monotonic clock."""
        self._every = every
        self._patience = patience
        self._sent: str | None = None

    def reset(self) -> None:
        """The LISTEN connection works: the next probe comes after the usual time."""
        self._sent = None
        self.at = time.monotonic() + self._every if self._every else math.inf

    def heard(self, payload: str) -> None:
        """A probe was heard, perhaps another worker's."""
        if payload == self._sent:
            self.reset()

    async def send(self, conn: Connection, presence: int) -> None:
        """Send it. Raises psycopg.OperationalError if the last one was not heard."""
        if self._sent is not None:
            raise psycopg.OperationalError("the LISTEN connection does not hear its own probe")
        self._sent = f"{presence}.{time.monotonic()}"
        self.at = time.monotonic() + self._patience
        await conn.execute("SELECT pg_notify(%s, %s)", (PROBE, self._sent))

"""Whether a worker can run sessions. One reader asks the database at most once a second."""

import asyncio
import time

from outwake.app.database import Database
from outwake.schema import in_schema

MAX_AGE = 1.0  # seconds

_PRESENT = in_schema("""
SELECT EXISTS (SELECT FROM :schema.worker_present WHERE NOT draining AND 'session.run' = ANY (topics))
""")


class WorkerPresence:
    """The cached answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._answer = False
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def present(self) -> bool:
        """Whether such a worker is present. Raises as Database.rows does."""
        if time.monotonic() - self._read_at > MAX_AGE:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
            await asyncio.shield(self._reading)
        return self._answer

    async def _read(self) -> None:
        begun = time.monotonic()
        row = await self._database.row(_PRESENT)
        assert row is not None
        self._answer = row[0]
        self._read_at = begun

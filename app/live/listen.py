"""The LISTEN connection of an API process: one, whatever it streams.

Each connection has a new presence: an advisory lock held as long as it lives, by which the database
tells whose watches still count. Nothing else is ever sent on it, and it is never in a transaction,
which would hold back the server's queue.
"""

import asyncio
import random
from collections.abc import Callable
from uuid import UUID

import psycopg
from psycopg import AsyncConnection

from outwake.app.database import SILENCE
from outwake.connect import connect, hear
from outwake.schema import SCHEMA
from outwake.telemetry.log import get_logger

CHANNEL = f"{SCHEMA.name}_session"
LOCK = SCHEMA.lock("watch")
"""The first integer of a presence."""
PAUSE = (0.05, 2.0)  # seconds between attempts to connect, first and last

log = get_logger("outwake.app.live.listen")


class Listener:
    """Keeps the connection up. `up` is called with each new presence, `down` when it is lost, `changed` with
    each session that a notification names, `unclear` where one cannot be understood: a newer version may say
    more, and any session may be meant.
    """

    def __init__(
        self,
        url: str,
        *,
        up: Callable[[int], None],
        down: Callable[[], None],
        changed: Callable[[UUID], None],
        unclear: Callable[[], None],
    ) -> None:
        self._url = url
        self._up = up
        self._down = down
        self._changed = changed
        self._unclear = unclear
        self._puzzled = False

    async def run(self) -> None:
        """Listen until cancelled."""
        first, last = PAUSE
        pause = first
        while True:
            try:
                async with await connect(self._url, "outwake api listener", SILENCE) as conn:
                    presence = await _prepare(conn)
                    pause = first
                    log.info("listening", presence=presence)
                    self._up(presence)
                    await self._listen(conn)
            except psycopg.Error as error:
                log.warning("listen_connection_lost", error=str(error))
            finally:
                self._down()
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
            pause = min(pause * 2, last)

    async def _listen(self, conn: AsyncConnection) -> None:
        await hear(conn, self._heard)

    def _heard(self, channel: str, payload: str) -> None:
        try:
            session_id = UUID(payload)
        except ValueError:
            if not self._puzzled:  # anybody may NOTIFY anything: say it once
                self._puzzled = True
                log.info("not_understood", channel=channel, payload=payload[:200])
            self._unclear()
        else:
            self._changed(session_id)


async def _prepare(conn: AsyncConnection) -> int:
    await conn.execute(f"LISTEN {CHANNEL}")
    while True:
        presence = random.randrange(2**31)  # noqa: S311 - no secret
        cursor = await conn.execute("SELECT pg_try_advisory_lock(%s, %s)", (LOCK, presence))
        row = await cursor.fetchone()
        assert row is not None
        if row[0]:
            return presence

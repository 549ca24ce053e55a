"""The LISTEN connection of an API process. There is one for all streams.

Each connection has a new presence: an advisory lock that it holds for its whole life. The lock tells the
database which watches still count. Nothing else is sent on the connection. It is never in a transaction,
because that would hold back the server's notification queue.
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
"""The first key of a presence's advisory lock."""
PAUSE = (0.05, 2.0)  # seconds between attempts to connect, first and last

log = get_logger("outwake.app.live.listen")


class Listener:
    """Keeps the connection up.

    It calls `up` with each new presence, `down` when the connection is lost, `changed` with each session that
    a notification names, and `unclear` if it cannot read one. A newer version may have sent that,
    about any session.
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
            if not self._puzzled:  # log it once: anybody may NOTIFY anything
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

"""The LISTEN connection of an API process (outwake/_notify.py). There is one for all streams. Its presence
tells the database which watches still count.
"""

import asyncio
import random
from collections.abc import Callable
from uuid import UUID

import psycopg

from outwake._notify import ListenConnection
from outwake.app.database import SILENCE
from outwake.session.watch import CHANNEL, LOCK, named
from outwake.telemetry.log import get_logger

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
                connection = await ListenConnection.open(
                    self._url, "outwake api listener", SILENCE, (CHANNEL,), LOCK
                )
                try:
                    pause = first
                    log.info("listening", presence=connection.presence)
                    self._up(connection.presence)
                    await connection.hear(self._heard)
                finally:
                    self._down()
                    await connection.close()
            except psycopg.Error as error:
                log.warning("listen_connection_lost", error=str(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
            pause = min(pause * 2, last)

    def _heard(self, channel: str, payload: str) -> None:
        session_id = named(payload)
        if session_id is not None:
            self._changed(session_id)
            return
        if not self._puzzled:  # log it once: anybody may NOTIFY anything
            self._puzzled = True
            log.info("not_understood", channel=channel, payload=payload[:200])
        self._unclear()

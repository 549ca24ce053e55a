"""Plays a worker by calling the SQL functions a worker calls."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from outwake.schema import in_schema


class ManualWorker:
    """A worker moved by hand, one row at a time."""

    def __init__(self, conn: AsyncConnection[Any]) -> None:
        self.conn = conn
        self.id = uuid4()
        self.row: int | None = None
        self.attempt = 0
        self.payload: dict[str, str] = {}

    async def register(self) -> None:
        """Be present, under a lock on this connection."""
        await self.conn.execute(
            "INSERT INTO worker (id, host, pid, version, topics, concurrency, presence)"
            " VALUES (%s, 'test', 1, '0', '{session.run}', 1, 7)",
            (self.id,),
        )
        await self.conn.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, 7)"))

    async def claim(self) -> None:
        """Claim the next row of a session."""
        cursor = await self.conn.execute(
            "SELECT id, attempt, payload FROM outbox_claim(%s, '{session.run}', 1, '1 hour')", (self.id,)
        )
        found = await cursor.fetchone()
        assert found is not None, "nothing to claim"
        self.row, self.attempt, self.payload = found

    async def say(self, *texts: str, conn: AsyncConnection[Any] | None = None) -> int:
        """Store messages, and return the last one's seq."""
        return await self.store(*({"type": "assistant", "text": text} for text in texts), conn=conn)

    async def store(self, *bodies: dict[str, Any], conn: AsyncConnection[Any] | None = None) -> int:
        last_seq, _ = await self._append(conn or self.conn, bodies, later=False)
        return last_seq

    async def say_later(self, text: str) -> bool:
        """Store a message as the worker does, and return whether it is to notify then."""
        _, watched = await self._append(self.conn, [{"type": "assistant", "text": text}], later=True)
        return watched

    async def _append(
        self, conn: AsyncConnection[Any], bodies: Sequence[dict[str, Any]], *, later: bool
    ) -> tuple[int, bool]:
        """The last message's seq, and whether anybody may be streaming the session."""
        cursor = await conn.execute(
            "SELECT fenced, last_seq, watched"
            " FROM message_append(%s, %s, %s, %s, %s, %s, notify_later => %s)",
            (
                self.id,
                self.row,
                self.attempt,
                UUID(self.payload["session_id"]),
                UUID(self.payload["prompt_id"]),
                [Jsonb(body) for body in bodies],
                later,
            ),
        )
        found = await cursor.fetchone()
        assert found is not None
        assert not found[0], "fenced"
        return int(found[1]), bool(found[2])

    async def complete(self) -> None:
        await self.conn.execute("SELECT outbox_complete(%s, %s, %s)", (self.id, [self.row], [self.attempt]))

    async def fail(self, reason: str, *, permanent: bool = False) -> None:
        """Fail the attempt; it may be claimed again at once."""
        await self.conn.execute(
            "SELECT outbox_fail(%s, %s, %s, %s, '0', %s)",
            (self.id, self.row, self.attempt, reason, permanent),
        )

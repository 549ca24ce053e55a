"""Which lines of migrations (sql/) a database has: always the outbox, optionally the sessions."""

from typing import Any

import psycopg

from outwake.schema import in_schema

_HAS_SESSIONS = in_schema("SELECT to_regclass(':schema.session') IS NOT NULL")


async def has_sessions(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the session tables exist: `migrate --only outbox` makes none. Raises psycopg.Error."""
    cursor = await conn.execute(_HAS_SESSIONS, prepare=False)
    row = await cursor.fetchone()
    return row is not None and bool(row[0])

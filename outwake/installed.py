"""Which lines of migrations (sql/) a database has: that of the outbox always, that of sessions perhaps."""

from typing import Any

import psycopg

from outwake.schema import in_schema

_HAS_SESSIONS = in_schema("SELECT to_regclass(':schema.session') IS NOT NULL")


async def has_sessions(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the tables of sessions are there: `migrate --only outbox` makes none. Raises psycopg.Error."""
    cursor = await conn.execute(_HAS_SESSIONS, prepare=False)
    row = await cursor.fetchone()
    return row is not None and bool(row[0])

"""What a database has of the migrations (sql/): always the outbox, perhaps the sessions, and new columns."""

from typing import Any

import psycopg

from outwake.schema import in_schema

_HAS_SESSIONS = in_schema("SELECT to_regclass(':schema.session') IS NOT NULL")

_HAS_COLUMN = in_schema("""
SELECT EXISTS (
    SELECT FROM pg_attribute AS a
    WHERE a.attrelid = to_regclass(':schema.' || %s) AND a.attname = %s AND NOT a.attisdropped)
""")


async def has_sessions(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the session tables exist: `migrate --only outbox` makes none. Raises psycopg.Error."""
    cursor = await conn.execute(_HAS_SESSIONS, prepare=False)
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def has_column(conn: psycopg.AsyncConnection[Any], table: str, column: str) -> bool:
    """Whether one of our tables has a column that a migration adds. Code must run on the schema of the
    version before, too. Raises psycopg.Error.
    """
    cursor = await conn.execute(_HAS_COLUMN, (table, column), prepare=False)
    row = await cursor.fetchone()
    return row is not None and bool(row[0])

"""Applies the migrations of sql/.

1. Take an advisory lock, so that two replicas may start at once: the second waits, then finds nothing
   left to do.
2. Refuse a database whose schema is newer than this code: an old process must not run on it.
3. Apply each migration in a transaction of its own, the row that records it included, so that a
   failure leaves the schema between two migrations and never inside one.
"""

from collections.abc import AsyncIterator, Callable

import psycopg
from psycopg import sql as compose

from outwake.errors import SchemaError
from outwake.sql import Migration, migrations

_LOCK = 1397048889

_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE schema_migration IS 'The migrations of Outwake that were applied to this database.';
COMMENT ON COLUMN schema_migration.number IS 'Its number: the greatest is the version of the schema.';
COMMENT ON COLUMN schema_migration.name IS 'The name of its file.';
COMMENT ON COLUMN schema_migration.applied_at IS 'When it was applied.';
"""


async def migrate(url: str, tell: Callable[[str], None] = lambda name: None) -> list[str]:
    """Bring the database at `url` to this code's schema; call `tell` with each migration's name first.

    Returns the names applied, none if the schema was up to date. The connection must be direct or a
    pooler's session: the lock belongs to the session.

    Raises SchemaError if the database is newer than this code, psycopg.Error if it cannot be reached.
    """
    applied = []
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute("SELECT pg_advisory_lock(%s, 0)", (_LOCK,))
        await conn.execute("SET client_min_messages = warning")
        await conn.execute(_LEDGER)
        async for migration in _missing(conn):
            tell(migration.name)
            async with conn.transaction():
                await conn.execute(compose.SQL(migration.text))
                await conn.execute(
                    "INSERT INTO schema_migration (number, name) VALUES (%s, %s)",
                    (migration.number, migration.name),
                )
            applied.append(migration.name)
    return applied


async def _missing(conn: psycopg.AsyncConnection) -> AsyncIterator[Migration]:
    known = migrations()
    version = await schema_version(conn)
    if version > known[-1].number:
        raise SchemaError(
            f"the database has schema {version}, newer than this code's {known[-1].number}: upgrade outwake"
        )
    for migration in known:
        if migration.number > version:
            yield migration


async def schema_version(conn: psycopg.AsyncConnection) -> int:
    """The number of the last migration applied, 0 in an empty database."""
    cursor = await conn.execute("SELECT to_regclass('schema_migration') IS NOT NULL")
    row = await cursor.fetchone()
    assert row is not None
    if not row[0]:
        return 0
    cursor = await conn.execute("SELECT coalesce(max(number), 0) FROM schema_migration")
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def check_schema(conn: psycopg.AsyncConnection) -> None:
    """Raise SchemaError unless the database has this code's schema."""
    version, wanted = await schema_version(conn), migrations()[-1].number
    if version < wanted:
        raise SchemaError(
            f"the database has schema {version}, this code needs {wanted}: run `outwake migrate`"
        )
    if version > wanted:
        raise SchemaError(f"the database has schema {version}, this code knows {wanted}: upgrade outwake")

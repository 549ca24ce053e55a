"""Migrates a database to this code's schema.

1. Take an advisory lock, so that two replicas may start at once: the second waits, then finds nothing to do.
2. Refuse a database whose encoding is not UTF8: rows hold text in any language. Refuse a schema in which
   other roles may create objects: they could make our functions call theirs.
3. Refuse a ledger that differs. The table `migration` holds the hash of every applied file. If a numbered
   file was applied in another form, the tables are not those that this code expects.
4. Apply nothing if the database is newer, because older functions must not replace newer ones.
5. Apply each missing numbered file in a transaction of its own, and insert its ledger row first. After a
   failure or a kill the database is between two files, never inside one.
6. Apply the changed functions in one transaction, and grant the roles their rights.
7. Notify the workers in each commit; each worker then checks whether the schema still fits.

outwake/_ledger.py reads what was applied, and knows what fits this code.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import LiteralString

import psycopg

from outwake import sql
from outwake._ledger import (
    LEDGER,
    Connection,
    Fit,
    Known,
    Step,
    check_schema,
    is_newer,
    missing,
    read_ledger,
    record,
    refuse_breaking,
    refuse_changed,
    step,
    unknown,
)
from outwake.connect import connect
from outwake.errors import SchemaError
from outwake.schema import SCHEMA, Schema
from outwake.sql import LINES, File, Line

__all__ = [
    "Fit",
    "Step",
    "check_schema",
    "migrate",
    "pending",
    "plan",
    "print_sql",
    "uninstall_sql",
]

_SILENCE = timedelta(seconds=10)
"""Both ends give up a connection whose network is silent this long."""

_LOCK_TIMEOUT = 0.5
"""Seconds that a transaction waits for a table lock; everybody else waits behind it. The value is less than
the server's deadlock_timeout of 1 s: in a deadlock the migration gives up and retries."""
_LOCK_TRIES = 120
_LOCK_PAUSE = 1.0
"""The longest pause in seconds. The pause is random, because a busy worker retries as well."""

# Unqualified names in the files belong to our schema; a temporary schema must not come first.
_PATH: LiteralString = "SET LOCAL search_path = :schema, pg_temp;\n"

# Inside another tool's transaction, the SQL that follows ours needs the tool's own search_path again.
_KEEP_PATH: LiteralString = (
    "SELECT pg_catalog.set_config(':schema.path', pg_catalog.current_setting('search_path'), true);"
)
_RESTORE_PATH: LiteralString = (
    "SELECT pg_catalog.set_config('search_path', pg_catalog.current_setting(':schema.path'), true);"
)

# The same as outbox_wake, which does not exist before the first file. Each worker then checks the schema.
_CALL: LiteralString = "NOTIFY :schema_wake, '*@0';\n"


async def migrate(
    url: str,
    report: Callable[[str], None] = lambda name: None,
    *,
    only: Line | None = None,
    schema: Schema = SCHEMA,
    warn: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Migrate the database at `url` to this code's schema; call `report` with each file's name first.

    `only` leaves the other line out; `outbox` alone is enough for a worker with its own handlers. `warn` is
    called with texts about what an operator must do by hand. Returns the names of the applied files; the list
    is empty if the schema was up to date.

    The connection must be direct or a pooler's session, because the lock belongs to the session.

    Raises SchemaError if the schema is not ours alone, differs, or cannot be changed now;
    psycopg.Error if the database cannot be reached.
    """
    applied: list[str] = []
    async with await _connect(url) as conn:
        conn.add_notice_handler(lambda notice: warn(notice.message_primary or ""))
        await conn.execute("SET client_min_messages = warning")
        await conn.execute("SELECT pg_advisory_lock(%s, 0)", (schema.lock("migrate"),))
        await _refuse_foreign(conn, schema)
        known = await read_ledger(conn, schema)
        await _run(conn, _create(schema, exists=await _exists(conn, schema)))
        await _refuse_foreign(conn, schema)  # a new schema has the rights that ALTER DEFAULT PRIVILEGES says
        lines = _chosen(only)
        for batch in _applicable(known, lines):
            for file in batch:
                report(file.name)
            await _run(conn, _script(batch, schema))
            applied += [file.name for file in batch]
        if not applied and not is_newer(known, lines):
            # A role may have been created since; if one is missing still, the operator is told again.
            await _run(conn, schema.sql("SELECT :schema.grant_roles()"))
    return applied


async def plan(url: str, *, only: Line | None = None, schema: Schema = SCHEMA) -> list[Step]:
    """Every file and its state in the database at `url`, in the order of application."""
    async with await _connect(url) as conn:
        known = await read_ledger(conn, schema)
    lines = _chosen(only)
    steps = [step(file, known.get(file.name)) for line in lines for file in sql.files(line)]
    ours = {found.name for found in steps}
    steps += [unknown(row) for row in known.values() if row.line in lines and row.name not in ours]
    return sorted(steps, key=lambda found: found.kind)


async def pending(url: str, *, only: Line | None = None, schema: Schema = SCHEMA) -> list[str]:
    """The names of the files that `migrate` would apply to the database at `url`. Raises SchemaError."""
    batches = _applicable(await _known(url, schema), _chosen(only))
    return [file.name for batch in batches for file in batch]


async def print_sql(
    url: str | None, *, only: Line | None = None, schema: Schema = SCHEMA, transaction: bool = True
) -> str:
    """The SQL that the database at `url` lacks, including the ledger; without a url, all of it.

    The text is one transaction, from BEGIN to COMMIT. With `transaction=False` it has neither, for a tool
    that has a transaction of its own. Raises SchemaError as `migrate` does.
    """
    known = {} if url is None else await _known(url, schema)
    batches = _applicable(known, _chosen(only))
    if not batches:
        return ""
    begin, end = ("BEGIN;", "COMMIT;") if transaction else (_KEEP_PATH, _RESTORE_PATH)
    parts = [f"-- Outwake {version('outwake')}, schema {schema.name}", schema.sql(begin)]
    if not known:
        parts.append(schema.sql(_PATH) + _create(schema))
    parts += [_script(batch, schema) for batch in batches]
    return "\n".join([*parts, schema.sql(end)])


def uninstall_sql(schema: Schema = SCHEMA) -> str:
    """SQL that removes the schema with all its rows, and then the roles, which belong to the cluster."""
    roles = ("producer", "worker", "monitor", "reader", "operator")
    drops = [
        f"DROP SCHEMA IF EXISTS {schema.name} CASCADE;",
        "-- The roles may be in use in other databases of the cluster.",
        *(f"-- DROP ROLE IF EXISTS {schema.name}_{role};" for role in roles),
    ]
    return "\n".join(drops)


async def _connect(url: str) -> Connection:
    return await connect(url, "outwake migrate", _SILENCE)


def _chosen(only: Line | None) -> tuple[Line, ...]:
    return LINES if only is None else (only,)


# A schema's owner may create objects in it. So the owner must own the functions too, or be a superuser.
_FOREIGN: LiteralString = """
SELECT
    o.rolname,
    o.rolname = current_user OR o.rolsuper AND pg_has_role(o.oid, 'USAGE'),
    ARRAY(
        SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee)::text END
        FROM aclexplode(n.nspacl) AS a
        WHERE a.privilege_type = 'CREATE' AND a.grantee <> n.nspowner
    ),
    NOT EXISTS (SELECT FROM pg_class AS c WHERE c.relnamespace = n.oid AND c.relname = 'migration')
    AND EXISTS (
        SELECT FROM pg_class AS c WHERE c.relnamespace = n.oid
        UNION ALL
        SELECT FROM pg_proc AS p WHERE p.pronamespace = n.oid
        UNION ALL
        SELECT FROM pg_type AS t WHERE t.typnamespace = n.oid
    )
FROM pg_namespace AS n
JOIN pg_roles AS o ON o.oid = n.nspowner
WHERE n.nspname = %(name)s
"""


async def _refuse_foreign(conn: Connection, schema: Schema) -> None:
    """Step 2. Raises SchemaError."""
    name = schema.name
    encoding = conn.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise SchemaError(
            f"the database {conn.info.dbname} has the encoding {encoding}, Outwake needs UTF8:"
            " CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    cursor = await conn.execute(
        "SELECT FROM pg_get_keywords() AS k WHERE k.word = %s AND k.catcode IN ('R', 'T')", (name,)
    )
    if await cursor.fetchone() is not None:
        raise SchemaError(f"{name} is a word of SQL: name another schema by OUTWAKE_SCHEMA")
    cursor = await conn.execute(_FOREIGN, {"name": name})
    found = await cursor.fetchone()
    if found is None:
        return
    owner, is_ours, creators, has_others = found
    if not is_ours:
        raise SchemaError(f"the schema {name} belongs to {owner}: migrate as that role")
    if creators:
        who = ", ".join(sorted(creators))
        raise SchemaError(
            f"{who} may create objects in the schema {name}, and so make its functions call theirs:"
            f" REVOKE CREATE ON SCHEMA {name} FROM {who}"
        )
    if has_others:
        raise SchemaError(
            f"the schema {name} holds objects that are not Outwake's: name another schema by OUTWAKE_SCHEMA"
        )


async def _known(url: str, schema: Schema) -> Known:
    """The applied files, after step 2. Raises SchemaError."""
    async with await _connect(url) as conn:
        await _refuse_foreign(conn, schema)
        return await read_ledger(conn, schema)


def _applicable(known: Known, lines: Sequence[Line]) -> list[list[File]]:
    """The files to apply, after steps 3 and 4. Raises SchemaError."""
    refuse_changed(known, lines)
    if is_newer(known, lines):
        refuse_breaking(known, lines)
        return []
    return missing(known, lines)


async def _run(conn: Connection, script: str) -> None:
    """Run the script in one transaction. It waits only briefly for a table, because others wait behind it.

    Raises SchemaError if others keep a table locked.
    """
    for _ in range(_LOCK_TRIES):
        try:
            async with conn.transaction():
                await conn.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}s'")
                await conn.execute(script.encode())
            return
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            await asyncio.sleep(random.uniform(_LOCK_PAUSE / 4, _LOCK_PAUSE))  # noqa: S311 - jitter
    raise SchemaError(
        "open transactions keep the tables locked: end them (see the view outbox_writer), then migrate again"
    )


async def _exists(conn: Connection, schema: Schema) -> bool:
    cursor = await conn.execute("SELECT to_regnamespace(%s) IS NOT NULL", (schema.name,))
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


def _create(schema: Schema, *, exists: bool = False) -> str:
    """A schema that exists is not created again: that would need the right to, even so."""
    return schema.sql(LEDGER if exists else "CREATE SCHEMA IF NOT EXISTS :schema;" + LEDGER)


def _script(batch: list[File], schema: Schema) -> str:
    """The SQL of one transaction."""
    parts = [schema.sql(_PATH), schema.sql(_CALL)]
    for file in batch:
        parts.append(record(file, schema))
        parts.append(f"\n-- {file.name}\n{schema.sql(file.text)}")
    if batch[0].number is None:
        parts.append(schema.sql("SELECT :schema.grant_roles();\n"))
    return "".join(parts)

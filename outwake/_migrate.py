"""Migrates a database to this code's schema, and checks whether a database and this code fit.

1. Take an advisory lock, so that two replicas may start at once: the second waits, then finds nothing to do.
2. Refuse a schema that is not ours alone: others who may create objects in it could make our functions
   call theirs.
3. Refuse a ledger that differs. The table `migration` holds the hash of every applied file. If a numbered
   file was applied in another form, the tables are not those that this code expects.
4. Apply nothing if the database is newer, because older functions must not replace newer ones.
5. Apply each missing numbered file in a transaction of its own, and insert its ledger row first. After a
   failure or a kill the database is between two files, never inside one.
6. Apply the changed functions in one transaction, and grant the roles their rights.
7. Notify the workers in each commit; each worker then checks whether the schema still fits.

Code of one version works on the schema of the version before. It also works on the schema of the version
after, unless a file of that version says that older code must stop. So a rolling upgrade may migrate first or
last (docs/releases.md).
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, LiteralString

import psycopg
from psycopg.rows import args_row

from outwake.errors import SchemaError
from outwake.schema import SCHEMA, Schema
from outwake.sql import LINES, OLDEST, File, Line, files

Connection = psycopg.AsyncConnection[Any]
Fit = Literal["current", "older", "newer"]

_SETTINGS: tuple[LiteralString, ...] = (
    "search_path = pg_catalog",  # others may define functions in public that fit a query better
    "DateStyle = ISO",  # psycopg reads no other
    "statement_timeout = 0",  # the second of two replicas waits for the first
    "lock_timeout = 0",
    "idle_in_transaction_session_timeout = 0",
)

_LOCK_TIMEOUT = 0.5
"""Seconds that a transaction waits for a table lock; everybody else waits behind it. The value is less than
the server's deadlock_timeout of 1 s: in a deadlock the migration gives up and retries."""
_LOCK_TRIES = 120
_LOCK_PAUSE = 1.0
"""The longest pause in seconds. The pause is random, because a busy worker retries as well."""

_LEDGER: LiteralString = """
CREATE TABLE IF NOT EXISTS :schema.migration (
    name       text PRIMARY KEY,
    line       text NOT NULL,
    number     integer,
    sha256     text NOT NULL,
    breaking   boolean NOT NULL DEFAULT false,
    version    text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE :schema.migration IS 'The ledger: the files of Outwake''s sql/ that were applied.';
COMMENT ON COLUMN :schema.migration.name IS 'The file: line/NNNN_words, or line/words if it is repeatable.';
COMMENT ON COLUMN :schema.migration.line IS 'outbox or session.';
COMMENT ON COLUMN :schema.migration.number IS 'Of a numbered file; the greatest is the version of a line.';
COMMENT ON COLUMN :schema.migration.sha256 IS 'Of the file as it was applied last.';
COMMENT ON COLUMN :schema.migration.breaking IS 'Whether code of the version before must stop.';
COMMENT ON COLUMN :schema.migration.version IS 'The version of Outwake that applied it.';
COMMENT ON COLUMN :schema.migration.applied_at IS 'When it was applied last.';
"""

_RECORD: LiteralString = """
INSERT INTO :schema.migration (name, line, number, sha256, breaking, version)
VALUES ('{name}', '{line}', {number}, '{sha256}', {breaking}, '{version}')
ON CONFLICT (name) DO UPDATE
SET sha256 = excluded.sha256, version = excluded.version, applied_at = excluded.applied_at;
"""

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


@dataclass(frozen=True)
class Applied:
    """A row of the ledger."""

    name: str
    line: str
    number: int | None
    sha256: str
    breaking: bool
    version: str
    applied_at: datetime


@dataclass(frozen=True)
class Step:
    """A file, and its state in the database."""

    line: Line
    name: str
    kind: Literal["numbered", "repeatable"]
    state: Literal["applied", "missing", "changed", "newer"]
    """changed: applied in another form. newer: applied by a newer version, in a form unknown to this code."""
    breaking: bool
    applied_at: datetime | None


async def migrate(
    url: str,
    tell: Callable[[str], None] = lambda name: None,
    *,
    only: Line | None = None,
    schema: Schema = SCHEMA,
    warn: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Migrate the database at `url` to this code's schema; call `tell` with each file's name first.

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
        known = await _ledger(conn, schema)
        await _run(conn, _create(schema, exists=await _exists(conn, schema)))
        await _refuse_foreign(conn, schema)  # a new schema has the rights that ALTER DEFAULT PRIVILEGES says
        lines = _chosen(only)
        for batch in _applicable(known, lines):
            for file in batch:
                tell(file.name)
            await _run(conn, _script(batch, schema))
            applied += [file.name for file in batch]
        if not applied and not _is_newer(known, lines):
            # A role may have been created since; if one is missing still, the operator is told again.
            await _run(conn, schema.sql("SELECT :schema.grant_roles()"))
    return applied


async def plan(url: str, *, only: Line | None = None, schema: Schema = SCHEMA) -> list[Step]:
    """Every file and its state in the database at `url`, in the order of application."""
    async with await _connect(url) as conn:
        known = await _ledger(conn, schema)
    lines = _chosen(only)
    steps = [_step(file, known.get(file.name)) for line in lines for file in files(line)]
    ours = {step.name for step in steps}
    steps += [_unknown(row) for row in known.values() if row.line in lines and row.name not in ours]
    return sorted(steps, key=lambda step: step.kind)


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


async def check_schema(conn: Connection, lines: Sequence[Line] = ("outbox",)) -> Fit:
    """Whether these lines of the database are this code's, or older or newer ones that it works with.

    Raises SchemaError if it does not work with them.
    """
    known = await _ledger(conn, SCHEMA)
    _refuse_changed(known, lines)
    for line in lines:
        have = _number(known, line)
        if have == 0:
            raise SchemaError(f"schema {SCHEMA.name} has no {line} tables: run `outwake migrate`")
        if have < OLDEST[line]:
            raise SchemaError(
                f"schema {SCHEMA.name}: the {line} tables are at {have}, this code needs {OLDEST[line]}:"
                " run `outwake migrate`"
            )
    if _is_newer(known, lines):
        _refuse_breaking(known, lines)
        return "newer"
    return "older" if _batches(known, lines) else "current"


async def _connect(url: str) -> Connection:
    """Connect with settings that hold, whatever the role and the database have set."""
    conn = await psycopg.AsyncConnection.connect(url, autocommit=True, client_encoding="UTF8")
    for setting in _SETTINGS:
        await conn.execute(f"SET {setting}")
    return conn


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


async def _ledger(conn: Connection, schema: Schema) -> dict[str, Applied]:
    """The applied files, by name; empty in a database without our schema. Raises SchemaError."""
    cursor = await conn.execute(schema.sql("SELECT to_regclass(':schema.migration') IS NOT NULL"))
    row = await cursor.fetchone()
    if row is None or not row[0]:
        return {}
    async with conn.cursor(row_factory=args_row(Applied)) as reader:
        try:
            await reader.execute(
                schema.sql(
                    "SELECT name, line, number, sha256, breaking, version, applied_at FROM :schema.migration"
                    " ORDER BY line, number NULLS LAST, name"
                )
            )
        except psycopg.errors.UndefinedColumn:
            raise SchemaError(
                f"the table {schema.name}.migration is not Outwake's: name another schema by OUTWAKE_SCHEMA"
            ) from None
        return {applied.name: applied async for applied in reader}


def _number(known: dict[str, Applied], line: str) -> int:
    return max((row.number for row in known.values() if row.line == line and row.number), default=0)


def _newest(line: str) -> int:
    """The number of the last numbered file known to this code."""
    return max(
        (file.number for known in LINES if known == line for file in files(known) if file.number), default=0
    )


def _refuse_changed(known: dict[str, Applied], lines: Sequence[Line]) -> None:
    """Step 3. Raises SchemaError."""
    for line in lines:
        for file in files(line):
            row = known.get(file.name)
            if file.number is not None and row is not None and row.sha256 != file.sha256:
                raise SchemaError(
                    f"{file.name} was applied in another form, by version {row.version}: this database is"
                    " of a development version. Save its data, run `outwake uninstall`, migrate anew"
                )


def _is_newer(known: dict[str, Applied], lines: Sequence[Line]) -> bool:
    """Step 4: whether the database has files unknown to this code, or functions of a newer version."""
    ours = _release(version("outwake"))
    for row in known.values():
        if row.line in lines:
            if (row.number or 0) > _newest(row.line):
                return True
            if row.number is None and _release(row.version) > ours:
                return True
    return False


def _refuse_breaking(known: dict[str, Applied], lines: Sequence[Line]) -> None:
    for row in known.values():
        if row.line in lines and row.breaking and (row.number or 0) > _newest(row.line):
            raise SchemaError(
                f"the database has {row.name}, of version {row.version}, beside which this code,"
                f" {version('outwake')}, may not run: upgrade outwake"
            )


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version, so that 1.10.0 comes after 1.9.0; a suffix is ignored."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


async def _known(url: str, schema: Schema) -> dict[str, Applied]:
    """The applied files, after step 2. Raises SchemaError."""
    async with await _connect(url) as conn:
        await _refuse_foreign(conn, schema)
        return await _ledger(conn, schema)


def _applicable(known: dict[str, Applied], lines: Sequence[Line]) -> list[list[File]]:
    """The files to apply, after steps 3 and 4. Raises SchemaError."""
    _refuse_changed(known, lines)
    if _is_newer(known, lines):
        _refuse_breaking(known, lines)
        return []
    return _batches(known, lines)


def _unknown(row: Applied) -> Step:
    kind: Literal["numbered", "repeatable"] = "repeatable" if row.number is None else "numbered"
    line: Line = "session" if row.line == "session" else "outbox"
    return Step(line, row.name, kind, "newer", row.breaking, row.applied_at)


def _step(file: File, row: Applied | None) -> Step:
    state: Literal["applied", "missing", "changed", "newer"]
    if row is None:
        state = "missing"
    elif row.sha256 == file.sha256:
        state = "applied"
    else:
        newer = file.number is None and _release(row.version) > _release(version("outwake"))
        state = "newer" if newer else "changed"
    kind: Literal["numbered", "repeatable"] = "repeatable" if file.number is None else "numbered"
    return Step(file.line, file.name, kind, state, file.breaking, None if row is None else row.applied_at)


def _batches(known: dict[str, Applied], lines: Sequence[Line]) -> list[list[File]]:
    """Steps 5 and 6: each missing numbered file alone, then all changed functions together."""
    numbered = [
        [file] for line in lines for file in files(line) if file.number and file.number > _number(known, line)
    ]
    functions = [
        file
        for line in lines
        for file in files(line)
        if file.number is None and _step(file, known.get(file.name)).state != "applied"
    ]
    return [*numbered, functions] if functions else numbered


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
    return schema.sql(_LEDGER if exists else "CREATE SCHEMA IF NOT EXISTS :schema;" + _LEDGER)


def _script(batch: list[File], schema: Schema) -> str:
    """The SQL of one transaction."""
    parts = [schema.sql(_PATH), schema.sql(_CALL)]
    for file in batch:
        parts.append(_record(file, schema))
        parts.append(f"\n-- {file.name}\n{schema.sql(file.text)}")
    if batch[0].number is None:
        parts.append(schema.sql("SELECT :schema.grant_roles();\n"))
    return "".join(parts)


def _record(file: File, schema: Schema) -> str:
    return schema.sql(_RECORD).format(
        name=file.name,
        line=file.line,
        number="NULL" if file.number is None else file.number,
        sha256=file.sha256,
        breaking="true" if file.breaking else "false",
        version=version("outwake").replace("'", ""),
    )

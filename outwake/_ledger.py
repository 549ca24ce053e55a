"""The ledger of a database: the files of sql/ that were applied to it, and whether they fit this code.

Code of one version works on the schema of the version before. It also works on the schema of the version
after, unless a file of that version says that older code must stop. So a rolling upgrade may migrate first or
last (docs/releases.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, LiteralString

import psycopg
from psycopg.rows import args_row

from outwake import sql
from outwake.errors import SchemaError
from outwake.schema import SCHEMA, Schema
from outwake.sql import File, Line

Connection = psycopg.AsyncConnection[Any]
Fit = Literal["current", "older", "newer"]

LEDGER: LiteralString = """
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


Known = dict[str, Applied]
"""The ledger's rows by the names of their files."""


async def check_schema(conn: Connection, lines: Sequence[Line] = ("outbox",)) -> Fit:
    """Whether these lines of the database are this code's, or older or newer ones that it works with.

    Raises SchemaError if it does not work with them.
    """
    known = await read_ledger(conn, SCHEMA)
    refuse_changed(known, lines)
    for line in lines:
        have = number(known, line)
        if have == 0:
            raise SchemaError(f"schema {SCHEMA.name} has no {line} tables: run `outwake migrate`")
        if have < sql.OLDEST[line]:
            raise SchemaError(
                f"schema {SCHEMA.name}: the {line} tables are at {have}, this code needs {sql.OLDEST[line]}:"
                " run `outwake migrate`"
            )
    if is_newer(known, lines):
        refuse_breaking(known, lines)
        return "newer"
    return "older" if missing(known, lines) else "current"


async def read_ledger(conn: Connection, schema: Schema) -> Known:
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


def number(known: Known, line: Line) -> int:
    """The number of the line's last applied file; 0 if there is none."""
    return max((row.number for row in _of(known, line) if row.number), default=0)


def refuse_changed(known: Known, lines: Sequence[Line]) -> None:
    """Raise SchemaError if a numbered file was applied in another form."""
    for line in lines:
        for file in sql.files(line):
            row = known.get(file.name)
            if file.number is not None and row is not None and row.sha256 != file.sha256:
                raise SchemaError(
                    f"{file.name} was applied in another form, by version {row.version}: this database is"
                    " of a development version. Save its data, run `outwake uninstall`, migrate anew"
                )


def is_newer(known: Known, lines: Sequence[Line]) -> bool:
    """Whether the database has files unknown to this code, or functions of a newer version."""
    ours = release(version("outwake"))
    for line in lines:
        for row in _of(known, line):
            if (row.number or 0) > sql.newest(line):
                return True
            if row.number is None and release(row.version) > ours:
                return True
    return False


def refuse_breaking(known: Known, lines: Sequence[Line]) -> None:
    """Raise SchemaError if a newer file says that this code must stop."""
    for line in lines:
        for row in _of(known, line):
            if row.breaking and (row.number or 0) > sql.newest(line):
                raise SchemaError(
                    f"the database has {row.name}, of version {row.version}, beside which this code,"
                    f" {version('outwake')}, may not run: upgrade outwake"
                )


def _of(known: Known, line: Line) -> list[Applied]:
    return [row for row in known.values() if row.line == line]


def unknown(row: Applied) -> Step:
    kind: Literal["numbered", "repeatable"] = "repeatable" if row.number is None else "numbered"
    line: Line = "session" if row.line == "session" else "outbox"
    return Step(line, row.name, kind, "newer", row.breaking, row.applied_at)


def step(file: File, row: Applied | None) -> Step:
    state: Literal["applied", "missing", "changed", "newer"]
    if row is None:
        state = "missing"
    elif row.sha256 == file.sha256:
        state = "applied"
    else:
        newer = file.number is None and release(row.version) > release(version("outwake"))
        state = "newer" if newer else "changed"
    kind: Literal["numbered", "repeatable"] = "repeatable" if file.number is None else "numbered"
    return Step(file.line, file.name, kind, state, file.breaking, None if row is None else row.applied_at)


def missing(known: Known, lines: Sequence[Line]) -> list[list[File]]:
    """What to apply, one transaction a list: each missing numbered file alone, then all changed functions."""
    numbered = [
        [file]
        for line in lines
        for file in sql.files(line)
        if file.number and file.number > number(known, line)
    ]
    functions = [
        file
        for line in lines
        for file in sql.files(line)
        if file.number is None and step(file, known.get(file.name)).state != "applied"
    ]
    return [*numbered, functions] if functions else numbered


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, so that 1.10.0 comes after 1.9.0; a suffix is ignored."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def record(file: File, schema: Schema) -> str:
    """The SQL that inserts the file's row."""
    return schema.sql(_RECORD).format(
        name=file.name,
        line=file.line,
        number="NULL" if file.number is None else file.number,
        sha256=file.sha256,
        breaking="true" if file.breaking else "false",
        version=version("outwake").replace("'", ""),
    )

"""Statements that take and give texts, as psycopg's own cursor would."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from psycopg import errors as pg
from psycopg.conninfo import make_conninfo

from outwake._statement import Statement
from outwake.app.connection import Connection

BOTH = Statement("SELECT %(a)s::text, %(b)s::text || %(a)s::text")
NAMED = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'outwake%'"


@pytest.fixture(params=["UTF8", "LATIN1"])
async def conn(database: str, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    url = make_conninfo(database, client_encoding=request.param)
    async with await Connection.connect(url, autocommit=True) as opened:
        yield opened


async def test_parameters_by_name_and_in_any_encoding(conn: Connection) -> None:
    assert await conn.rows(BOTH, {"a": "ä", "b": "é", "more": 1}) == [("ä", "éä")]
    assert await conn.rows(BOTH, {"a": None, "b": "x"}) == [(None, None)]
    assert await conn.rows(Statement("SELECT WHERE %(a)s::boolean"), {"a": False}) == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("boolean", True),
        ("boolean", False),
        ("integer", -7),
        ("uuid", UUID("0193a1b2-0000-7000-8000-000000000001")),
        ("bytea", b"\0\xff'\\"),
        ("bytea", b""),
        ("text", "NULL"),
        ("text", ""),
    ],
)
async def test_values_arrive_as_what_they_are(conn: Connection, kind: Any, value: Any) -> None:
    await conn.rows(f"CREATE TEMPORARY TABLE t (v {kind})")
    assert await conn.rows(Statement("INSERT INTO t VALUES (%(v)s)"), {"v": value}) == []
    assert await conn.rows("SELECT v FROM t") == [(value,)]


@pytest.mark.parametrize(("threshold", "prepared"), [(5, 1), (None, 0)])
async def test_prepared_once_and_not_behind_a_pooler(
    database: str, threshold: int | None, prepared: int
) -> None:
    async with await Connection.connect(database, prepare_threshold=threshold) as conn:
        for _ in range(3):
            assert await conn.rows(BOTH, {"a": "x", "b": "y"}) == [("x", "yx")]
        assert await conn.rows(NAMED) == [(prepared,)]


def test_parameters_without_names_are_numbered() -> None:
    statement = Statement("SELECT %s, %s::bigint[], now()")
    assert statement.text == b"SELECT $1, $2::bigint[], now()"
    assert statement.names == []


async def test_errors_are_psycopgs_and_leave_the_connection_usable(conn: Connection) -> None:
    with pytest.raises(pg.InvalidTextRepresentation) as raised:
        await conn.rows(Statement("SELECT (%(a)s::text)::uuid"), {"a": "é"})
    assert "é" in str(raised.value)
    missing = Statement("SELECT v FROM missing")
    with pytest.raises(pg.UndefinedTable):
        await conn.rows(missing, {})
    await conn.rows("CREATE TEMPORARY TABLE missing AS SELECT 'now there' AS v")
    assert await conn.rows(missing, {}) == [("now there",)]

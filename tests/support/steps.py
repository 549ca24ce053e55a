"""Interleavings: named steps on several connections, and a rule of the protocol taken out for a test.

A statement that must wait for a lock is started with `starts`, which returns once the server shows it
waiting, so that the next step comes after it for certain. A race inside a function is opened
with a `gate`: whoever calls the function stops before it while the test holds the gate.

Connections are in autocommit mode; a step that begins a transaction says so with `BEGIN`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import pytest
from psycopg import AsyncConnection, sql
from psycopg.types.json import Jsonb

import outwake
from outwake import Claimed
from outwake.schema import in_schema
from tests.support.waits import awaiting

Connection = AsyncConnection[Any]
Rule = Literal["kept", "taken out"]

LEASE = timedelta(minutes=10)
"""A lease that does not end while a test runs."""

with_and_without = pytest.mark.parametrize("rule", ["kept", "taken out"])
"""The test runs with the rule, and without it: then it asserts that the harm is done."""


async def one(conn: Connection, query: str, *values: Any) -> Any:
    """The first column of the first row; None if there is no row."""
    row = await (await conn.execute(query, values or None)).fetchone()
    return None if row is None else row[0]


async def column(conn: Connection, query: str, *values: Any) -> list[Any]:
    """The first column of all rows."""
    return [row[0] for row in await (await conn.execute(query, values or None)).fetchall()]


async def add(conn: Connection, topic: str = "t", **columns: Any) -> int:
    """Insert an outbox row as a producer would, and return its id."""
    values = {
        "topic": topic,
        **{k: Jsonb(v) if isinstance(v, dict | list) else v for k, v in columns.items()},
    }
    query = sql.SQL("INSERT INTO outbox ({}) VALUES ({}) RETURNING id").format(
        sql.SQL(", ").join(map(sql.Identifier, values)), sql.SQL(", ").join(map(sql.Placeholder, values))
    )
    row = await (await conn.execute(query, values)).fetchone()
    assert row is not None
    return int(row[0])


async def get(conn: Connection, row_id: int, name: str = "state") -> Any:
    """A column of an outbox row."""
    query = sql.SQL("SELECT {} FROM outbox WHERE id = %s").format(sql.Identifier(name))
    row = await (await conn.execute(query, (row_id,))).fetchone()
    return None if row is None else row[0]


async def new_worker(conn: Connection, *topics: str) -> UUID:
    """A worker's row; whoever knows its id can act for it."""
    return await outwake.register(conn, topics or ("t",))


async def claim(
    conn: Connection,
    worker: UUID,
    slots: int = 1,
    *,
    topics: tuple[str, ...] = ("t",),
    lease: timedelta = LEASE,
) -> list[Claimed]:
    return await outwake.claim(conn, worker, topics, slots, lease=lease)


async def claim_ids(
    conn: Connection, worker: UUID, slots: int = 1, *, topics: tuple[str, ...] = ("t",)
) -> list[int]:
    return [row.id for row in await claim(conn, worker, slots, topics=topics)]


async def run_out(conn: Connection, worker: UUID) -> None:
    """Let a worker's lease lie in the past."""
    await conn.execute(
        "UPDATE worker SET lease_until = clock_timestamp() - interval '1 minute' WHERE id = %s", (worker,)
    )


async def starts(observer: Connection, conn: Connection, query: str, *values: Any) -> asyncio.Task[Any]:
    """Send a statement, and return when it waits for a lock. The task's result is its first column."""
    task = asyncio.create_task(one(conn, query, *values))
    await waits(observer, conn)
    return task


async def waits(observer: Connection, conn: Connection) -> None:
    """Return when the server shows that `conn` waits for a lock."""
    query = "SELECT true FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    await until(observer, query, conn.info.backend_pid, what="another statement to wait for a lock")


async def until(observer: Connection, query: str, *values: Any, what: str = "") -> None:
    """Return when the query's first column is true: for states of the server that nothing announces."""
    last: Any = "no answer yet"

    async def seen() -> str:
        return f"the last answer was {last!r}\n{await picture(observer)}"

    words = what or f"this to be true: {query} {list(values) if values else ''}".rstrip()
    async with awaiting(words, seen=seen):
        while not (last := await one(observer, query, *values)):  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.005)


async def picture(conn: Connection) -> str:
    """What a wait that failed wants to show: rows, workers and the server's sessions, the latest first."""
    lines = []
    for title, query in _PICTURE.items():
        found = await column(conn, query)
        lines += [f"{title}: {len(found)}", *(f"  {line}" for line in found[:_LINES])]
    return "\n".join(lines)


_LINES = 12  # of each table in a picture
_PICTURE = {
    "rows not done": """SELECT concat_ws(' ', id, topic, state, 'attempt', attempt, 'failures', failures,
        'due', available_at - clock_timestamp(), 'worker', worker_id) FROM outwake.outbox
        WHERE state <> 'done' ORDER BY id DESC""",
    "workers": """SELECT concat_ws(' ', id, 'parked', parked, 'lease', lease_until - clock_timestamp(),
        'ended', ended_at) FROM outwake.worker ORDER BY id DESC""",
    "sessions": """SELECT concat_ws(' ', pid, application_name, state, wait_event_type, wait_event,
        left(query, 90)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        ORDER BY state_change DESC""",
}


async def take_out(conn: Connection, function: str, text: str, instead: str = "") -> None:
    """Replace a part of a SQL function, in this test's database. The part must be there exactly once.

    It is written as in sql/, with the placeholders of outwake/schema.py.
    """
    text, instead = in_schema(text), in_schema(instead)
    definition: str = await one(conn, "SELECT pg_get_functiondef(%s::regproc)", function)
    assert definition.count(text) == 1, (
        f"{function} has changed; what stands for the rule in it?\n{definition}"
    )
    await conn.execute(definition.replace(text, instead).encode())


async def replace_body(conn: Connection, function: str, language: str, body: str) -> None:
    """Give a SQL function another body, in this test's database. It is written as in sql/."""
    query = "SELECT pg_get_functiondef(%s::regproc)"
    head, found, _ = (await one(conn, query, function)).partition("\nAS $")
    assert found
    lines = [line for line in head.split("\n") if not line.startswith(" LANGUAGE")]
    await conn.execute(f"{chr(10).join(lines)} LANGUAGE {language} AS $test${in_schema(body)}$test$".encode())


class Gate:
    """A closed gate before a function."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    async def reached_by(self, conn: Connection, query: str, *values: Any) -> asyncio.Task[Any]:
        """Start a statement, and return when it stands before the gate. The task gives its first column."""
        task = asyncio.create_task(one(conn, query, *values))
        await waits(self._conn, conn)
        return task


@asynccontextmanager
async def gate(conn: Connection, signature: str, arguments: str) -> AsyncIterator[Gate]:
    """Whoever calls a function stops before it until the block ends.

    `signature` as in `outbox_take_key(text, bigint)`; `arguments` as they are passed on: `$1, $2`.
    """
    name, _, types = signature.partition("(")
    result = await one(conn, "SELECT pg_get_function_result(%s::regprocedure)", signature)
    await conn.execute(f"ALTER FUNCTION {signature} RENAME TO {name}_behind_gate".encode())
    await conn.execute(
        f"CREATE FUNCTION {name}({types} RETURNS {result} LANGUAGE plpgsql VOLATILE AS $gate$ BEGIN"
        " PERFORM pg_advisory_lock_shared(1, 1); PERFORM pg_advisory_unlock_shared(1, 1);"
        f" RETURN {name}_behind_gate({arguments}); END $gate$".encode()
    )
    await conn.execute("SELECT pg_advisory_lock(1, 1)")
    try:
        yield Gate(conn)
    finally:
        await conn.execute("SELECT pg_advisory_unlock(1, 1)")

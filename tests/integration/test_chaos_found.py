"""What the chaos run has found, each as the shortest list of steps that showed it."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection

from outbox import claim, enqueue, hand_back, register
from tests.conftest import Connect

TOPIC = "t"


async def claimed(conn: AsyncConnection[Any], worker: UUID, slots: int = 1) -> list[tuple[int, int]]:
    """What the worker gets, as (id, attempt)."""
    rows = await claim(conn, worker, [TOPIC], slots, lease=timedelta(hours=1))
    return [(row.id, row.attempt) for row in rows]


async def value(conn: AsyncConnection[Any], query: str, *arguments: Any) -> Any:
    """The first column of the first row."""
    row = await (await conn.execute(query, arguments)).fetchone()
    return None if row is None else row[0]


async def test_key_whose_first_row_came_late_goes_on_after_a_hand_back(connect: Connect) -> None:
    """1. Row 1 of a key is inserted and not committed. 2. Row 2 starts. 3. Row 1 is committed; a claim finds it
    waiting for row 2. 4. Row 2 is handed back, and so waits for row 1. Nobody waits for nobody: row 1 runs.
    """
    psql, late = await connect(), await connect()
    worker = await register(psql, [TOPIC], concurrency=2)
    async with late.transaction():
        first = await enqueue(late, TOPIC, ordering_key="k")
        second = await enqueue(psql, TOPIC, ordering_key="k")
        assert await claimed(psql, worker) == [(second, 1)]
    assert await claimed(psql, worker) == []
    assert await value(psql, "SELECT blocked FROM outbox WHERE id = %s", first)
    await hand_back(psql, worker, [(second, 1)])
    assert await claimed(psql, worker, 2) == [(first, 1)]


async def test_blocked_row_that_changes_its_key_is_blocked_no_more(connect: Connect) -> None:
    """Nobody would clear its mark: the end of the row that it waited for looks at the old key."""
    psql = await connect()
    worker = await register(psql, [TOPIC], concurrency=2)
    await enqueue(psql, TOPIC, ordering_key="k")
    second = await enqueue(psql, TOPIC, ordering_key="k")
    await claimed(psql, worker, 2)
    assert await value(psql, "SELECT blocked FROM outbox WHERE id = %s", second)
    await psql.execute("UPDATE outbox SET ordering_key = 'other' WHERE id = %s", (second,))
    assert await claimed(psql, worker) == [(second, 1)]

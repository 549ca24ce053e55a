"""Rows with nonsense in them, as the owner of the table may insert: each harms itself alone.

A worker that cannot read or count a row would claim it again and again, and run nothing beside it.
"""

from typing import Any

import pytest

from tests.conftest import Connect
from tests.support.steps import add, column, get, new_worker, one, run_out
from tests.support.worker import watched

DEEP = "SELECT (repeat('[', {n}) || repeat(']', {n}))::jsonb"
MOST = 2**31 - 1
LEAST = -(2**31)

UNREADABLE = {
    "nested 300 deep": DEEP.format(n=300),
    "nested 5,000 deep": DEEP.format(n=5000),
    "an object nested 2,000 deep": "SELECT (repeat('{\"a\":', 2000) || '1' || repeat('}', 2000))::jsonb",
    "a number of 5,000 digits": "SELECT jsonb_build_object('n', 10::numeric ^ 5000)",
}
ODD_PAYLOADS = {
    "a list": "SELECT '[1, 2]'::jsonb",
    "null": "SELECT 'null'::jsonb",
    "a number": "SELECT '1'::jsonb",
    "a number of 400 digits": "SELECT jsonb_build_object('n', 10::numeric ^ 400)",
    "a megabyte of text": "SELECT jsonb_build_object('n', repeat('x', 1048576))",
}


@pytest.mark.parametrize("payload", UNREADABLE)
@pytest.mark.parametrize("awake", [True, False], ids=["when it is found", "when it is told of"])
async def test_a_payload_that_cannot_be_read_ends_its_row(
    payload: str, awake: bool, connect: Connect, database: str
) -> None:
    """As dead, with the reason; the rows beside it run, on the same worker."""
    psql = await connect()
    insert = f"INSERT INTO outbox (topic, payload) VALUES ('t', ({UNREADABLE[payload]})) RETURNING id"
    rows: list[Any] = []
    if awake:
        rows = [await one(psql, insert), await add(psql)]
    async with watched(database, started=not awake) as worker:
        if not awake:
            rows = [await one(psql, insert)]
            rows.append(await add(psql))
        await worker.has_run(rows[1])
        await worker.asleep()
        assert worker.ran == [rows[1]]
    assert await column(psql, "SELECT state FROM outbox ORDER BY id") == ["dead", "done"]
    assert await column(psql, "SELECT attempt FROM outbox ORDER BY id") == [1, 1]
    assert "the payload cannot be read" in await one(
        psql, "SELECT errors -> 0 ->> 'error' FROM outbox WHERE id = %s", rows[0]
    )


@pytest.mark.parametrize("payload", ODD_PAYLOADS)
async def test_any_other_json_is_a_payload(payload: str, connect: Connect, database: str) -> None:
    psql = await connect()
    async with watched(database) as worker:
        row = await one(
            psql, f"INSERT INTO outbox (topic, payload) VALUES ('t', ({ODD_PAYLOADS[payload]})) RETURNING id"
        )
        await worker.has_run(row)
        await worker.asleep()
    assert await get(psql, row) == "done"


ODD_COLUMNS: dict[str, dict[str, Any]] = {
    "attempt, the greatest": {"attempt": MOST},
    "attempt, the least": {"attempt": LEAST},
    "failures, the greatest": {"failures": MOST},
    "failures, the least": {"failures": LEAST},
    "errors, an object": {"errors": {}},
    "errors, of nonsense": {"errors": [1, None, "x", {"at": "nonsense", "attempt": "x", "worker_id": 7}]},
    "priority, the greatest": {"priority": 32767},
    "id, the greatest": {"id": 2**63 - 1},
    "id, negative": {"id": -5},
    "limited": {"limited": True},
    "traceparent": {"traceparent": "x" * 200},
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
async def test_odd_numbers_and_errors_harm_nobody(name: str, connect: Connect, database: str) -> None:
    """Rows that succeed and fail, beside an ordinary one; then all can be looked at."""
    psql = await connect()
    odd = await add(psql, **ODD_COLUMNS[name])
    beside = await add(psql)
    async with watched(database, started=False) as worker:
        await worker.has_run(odd)
        await worker.has_run(beside)
        await worker.asleep()
    assert await column(psql, "SELECT state FROM outbox") == ["done", "done"]
    for query in ("SELECT * FROM outbox_history(%s)", "SELECT outbox_last_error(%s)"):
        await psql.execute(query.encode(), (odd,))


@pytest.mark.parametrize("name", ODD_COLUMNS)
@pytest.mark.parametrize("end", ["fail", "rescue", "hand back"])
async def test_a_row_with_odd_columns_ends_as_others_do(end: str, name: str, connect: Connect) -> None:
    conn = await connect()
    odd = await add(conn, max_attempts=1, **ODD_COLUMNS[name])
    worker, other = await new_worker(conn), await new_worker(conn)
    attempt = await one(conn, "SELECT attempt FROM outbox_claim(%s, '{t}', 1, '1 min')", worker)
    if end == "fail":
        await conn.execute("SELECT outbox_fail(%s, %s, %s, 'broke')", (worker, odd, attempt))
    elif end == "rescue":
        await run_out(conn, worker)
        assert await one(conn, "SELECT outbox_rescue(%s, '0 s', '1 h')", other) == 1
    else:
        await conn.execute("SELECT outbox_hand_back(%s, ARRAY[%s], ARRAY[%s])", (worker, odd, attempt))
    least = ODD_COLUMNS[name].get("failures") == LEAST
    assert await get(conn, odd) == ("ready" if end == "hand back" or least else "dead")
    if end != "hand back":
        assert await one(conn, "SELECT errors -> -1 ->> 'error' FROM outbox") in (
            "broke",
            "its lease ran out",
        )
    assert await one(conn, "SELECT count(*) FROM outbox_history(%s)", odd) >= 2

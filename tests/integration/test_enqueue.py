"""The library's enqueue: what is given is in the row, the rest are the table's defaults."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import set_json_dumps

from outwake import enqueue, enqueue_many
from tests.conftest import Connect
from tests.support.steps import Connection, column

ROW = """
SELECT topic, payload, ordering_key, priority, max_attempts, unique_key, traceparent,
       CASE WHEN available_at > created_at + interval '1 minute' THEN available_at END
FROM outbox WHERE id = %s
"""
NAMES = ["topic", "payload", "ordering_key", "priority", "max_attempts", "unique_key", "traceparent"]
NAMES += ["available_at"]
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(NAMES),
    "topic": "t",
    "payload": {},
    "priority": 0,
    "max_attempts": 10,
}
GIVEN: dict[str, Any] = {
    "payload": {"text": "a\tb\\n\n'\"é☃\U0001f600", "n": [1, None, 1.5]},
    "ordering_key": "k",
    "priority": -3,
    "available_at": datetime(2100, 1, 2, 3, tzinfo=UTC),
    "max_attempts": 1,
    "unique_key": "u",
    "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
}


async def row(conn: Connection, row_id: int) -> dict[str, Any]:
    found = await (await conn.execute(ROW, (row_id,))).fetchone()
    assert found is not None
    return dict(zip(NAMES, found, strict=True))


async def test_any_topic_of_the_form(connect: Connect) -> None:
    conn = await connect()
    topics = ["a", "a-1_b.c", "a" * 100]
    ids = [await enqueue(conn, topic) for topic in topics]
    assert [(await row(conn, row_id))["topic"] for row_id in ids] == topics


@pytest.mark.parametrize("names", [[], *([name] for name in GIVEN), list(GIVEN)], ids=",".join)
async def test_each_argument_is_its_column(names: list[str], connect: Connect) -> None:
    conn = await connect()
    given = {name: GIVEN[name] for name in names}
    row_id = await enqueue(conn, "t", **given)
    assert await row(conn, row_id) == {**DEFAULTS, **given}


async def test_value_out_of_bounds(connect: Connect) -> None:
    conn = await connect()
    bad: list[dict[str, Any]] = [
        *({"topic": topic} for topic in ("T", "", "1", "a b", "a\n", "aé", "a" * 101)),
        {"max_attempts": 0},
        {"ordering_key": ""},
        {"unique_key": "x" * 201},
    ]
    for given in bad:
        with pytest.raises(psycopg.errors.CheckViolation):
            await enqueue(conn, **{"topic": "t", **given})


TOPICS = ["a", "session.run", "a-b_c.9", "a" * 100]
NO_TOPICS = ["", "9a", ".a", "A", "aB", "a b", "a\n", "aé", "a" * 101]


async def test_what_is_a_topic(connect: Connect) -> None:
    conn = await connect()
    for topic in TOPICS:
        await conn.execute("SELECT %s::topic_name", (topic,))
    for topic in NO_TOPICS:
        with pytest.raises(psycopg.errors.CheckViolation, match="outbox_topic_form"):
            await conn.execute("SELECT %s::topic_name", (topic,))


async def test_payload_of_types_that_psycopg_was_taught(connect: Connect) -> None:
    conn = await connect()
    payload = {"id": UUID(int=7)}
    with pytest.raises(TypeError):
        await enqueue(conn, "t", payload)
    set_json_dumps(lambda value: json.dumps(value, default=str), conn)
    row_id = await enqueue(conn, "t", payload)
    assert (await row(conn, row_id))["payload"] == {"id": str(UUID(int=7))}


async def test_connection_that_makes_something_else_of_a_row(connect: Connect, database: str) -> None:
    conn = await connect()
    async with await psycopg.AsyncConnection.connect(database, row_factory=dict_row) as own:
        row_id = await enqueue(own, "t", unique_key="u")
        assert await enqueue(own, "t", unique_key="u", on_duplicate="keep") == row_id
    assert await row(conn, row_id) == {**DEFAULTS, "unique_key": "u"}


async def test_many_in_order(connect: Connect) -> None:
    conn = await connect()
    payloads = [{"n": n, **GIVEN["payload"]} for n in range(500)]
    await enqueue_many(conn, "t", payloads)
    assert await column(conn, "SELECT payload FROM outbox WHERE topic = 't' ORDER BY id") == payloads

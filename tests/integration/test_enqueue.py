"""The library's enqueue: what is given is in the row, the rest are the table's defaults."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb, set_json_dumps

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
    """From a generator, in several statements: of a number of rows, and of a length."""
    conn = await connect()
    given = GIVEN["payload"]
    await enqueue_many(conn, "t", ({"n": n, **given} for n in range(2100)))
    assert await column(conn, "SELECT payload FROM outbox WHERE topic = 't' ORDER BY id") == [
        {"n": n, **given} for n in range(2100)
    ]
    long = [{"text": "x" * 600_000, "n": n} for n in range(4)]
    await enqueue_many(conn, "long", long)
    assert await column(conn, "SELECT payload FROM outbox WHERE topic = 'long' ORDER BY id") == long
    await enqueue_many(conn, "none", [])


async def test_many_are_as_one_in_its_transaction(connect: Connect) -> None:
    conn = await connect()
    async with conn.transaction(force_rollback=True):
        await enqueue_many(conn, "t", ({"n": n} for n in range(2100)))
        assert await column(conn, "SELECT count(*) FROM outbox") == [2100]
    assert await column(conn, "SELECT count(*) FROM outbox") == [0]


async def test_many_of_types_that_psycopg_was_taught(connect: Connect) -> None:
    conn = await connect()
    payloads = [{"id": UUID(int=n)} if n % 2 else {"id": n} for n in range(4)]
    with pytest.raises(TypeError):
        await enqueue_many(conn, "t", payloads)
    set_json_dumps(lambda value: json.dumps(value, default=str), conn)
    await enqueue_many(conn, "t", payloads)
    assert await column(conn, "SELECT payload ->> 'id' FROM outbox ORDER BY id") == [
        str(payload["id"]) for payload in payloads
    ]


CALL = "SELECT outwake.enqueue(topic => %(topic)s"
TYPES = {"payload": "::jsonb", "priority": "::integer", "max_attempts": "::integer"}


@pytest.mark.parametrize("names", [[], *([name] for name in GIVEN), list(GIVEN)], ids=",".join)
async def test_each_argument_of_the_function_is_its_column(names: list[str], connect: Connect) -> None:
    """The same for any driver. Null is the default, as drivers pass what was not given."""
    conn = await connect()
    given = {name: GIVEN[name] for name in names}
    arguments = "".join(f", {name} => %({name})s{TYPES.get(name, '')}" for name in names)
    values = {"topic": "t", **given, **({"payload": Jsonb(given["payload"])} if "payload" in given else {})}
    found = await (await conn.execute(f"{CALL}{arguments})".encode(), values)).fetchone()
    assert found is not None
    assert await row(conn, found[0]) == {**DEFAULTS, **given}
    nulls = ", ".join(f"{name} => NULL" for name in GIVEN)
    found = await (await conn.execute(f"{CALL}, {nulls})".encode(), {"topic": "t"})).fetchone()
    assert found is not None
    assert await row(conn, found[0]) == DEFAULTS


@pytest.mark.parametrize("at", ["0044-03-15 BC", "0001-06-01", "9999-06-01", "294276-01-01", "infinity"])
async def test_a_time_that_a_client_cannot_read_is_refused(at: str, connect: Connect) -> None:
    """A worker could not read the row that it claimed, nor the others of the same claim."""
    conn = await connect()
    with pytest.raises(psycopg.errors.CheckViolation, match="outbox_available_is_finite"):
        await conn.execute("INSERT INTO outbox (topic, available_at) VALUES ('t', %s::timestamptz)", (at,))

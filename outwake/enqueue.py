"""Enqueue: insert outbox rows on a connection the caller owns, so that they join its transaction.

The same from psql: `INSERT INTO outbox (topic, payload) VALUES ('email.send', '{"to": "…"}')`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Literal

import psycopg
from psycopg.rows import scalar_row
from psycopg.types.json import Jsonb

from outwake import trace
from outwake.errors import Duplicate

OnDuplicate = Literal["reject", "keep", "replace"]

# A row that runs cannot be replaced: its handler has read the old payload. The WHERE then leaves it
# alone, nothing is returned, and the caller is told.
_REPLACE = """
ON CONFLICT (unique_key) WHERE state IN ('ready', 'running') AND unique_key IS NOT NULL
DO UPDATE SET
    payload = excluded.payload,
    priority = excluded.priority,
    available_at = excluded.available_at,
    traceparent = excluded.traceparent
WHERE outbox.state = 'ready'
"""

_KEEP = """
ON CONFLICT (unique_key) WHERE state IN ('ready', 'running') AND unique_key IS NOT NULL
DO NOTHING
"""

_ON_CONFLICT = {"reject": _KEEP, "keep": _KEEP, "replace": _REPLACE}

_UNFINISHED = """
SELECT id FROM outbox WHERE unique_key = %s AND state IN ('ready', 'running')
"""


@cache
def _insert(columns: tuple[str, ...], on_duplicate: OnDuplicate | None) -> str:
    places = ", ".join("%s::jsonb" if name == "payload" else "%s" for name in columns)
    insert = f"INSERT INTO outbox ({', '.join(columns)}) VALUES ({places})"  # noqa: S608 - names of ours
    return f"{insert}{_ON_CONFLICT[on_duplicate] if on_duplicate else ' '}RETURNING id"


def _json(payload: Mapping[str, Any]) -> str | Jsonb:
    try:
        return json.dumps(payload)  # Jsonb takes 9 us more to be adapted
    except TypeError:
        return Jsonb(payload)  # what psycopg was taught by set_json_dumps


async def enqueue(
    conn: psycopg.AsyncConnection[Any],
    topic: str,
    payload: Mapping[str, Any] | None = None,
    *,
    ordering_key: str | None = None,
    priority: int = 0,
    available_at: datetime | None = None,
    max_attempts: int = 10,
    unique_key: str | None = None,
    on_duplicate: OnDuplicate = "reject",
    traceparent: str | None = None,
) -> int:
    """Insert one row and return its id. It becomes work when the caller's transaction commits.

    `ordering_key`: rows that share it run one at a time, by id. `priority`: higher runs first.
    `unique_key`: no two unfinished rows share it; a duplicate is refused (`reject`), answered with the
    id of the row that is there (`keep`), or updates that row if it has not started (`replace`).

    `traceparent`: the W3C trace context the row belongs to; by default that of the span we are in.

    Raises Duplicate (also for `replace`, when the row runs already), psycopg.errors.CheckViolation
    when a value is out of bounds.
    """
    # Only what is given, and an arbiter only for a unique_key. Measured, of topic and payload: 390,000 to
    # 349,000 instructions of the server.
    values: dict[str, Any] = {"topic": topic}
    if payload is not None:
        values["payload"] = _json(payload)
    if ordering_key is not None:
        values["ordering_key"] = ordering_key
    if priority != 0:
        values["priority"] = priority
    if available_at is not None:
        values["available_at"] = available_at
    if max_attempts != 10:
        values["max_attempts"] = max_attempts
    if unique_key is not None:
        values["unique_key"] = unique_key
    if (trace_context := traceparent or trace.current()) is not None:
        values["traceparent"] = trace_context
    statement = _insert(tuple(values), None if unique_key is None else on_duplicate)
    parameters = tuple(values.values())
    cursor = conn.cursor(row_factory=scalar_row)  # the caller's connection may make something else of a row
    while True:
        await cursor.execute(statement, parameters)
        if (row_id := await cursor.fetchone()) is not None:
            return int(row_id)
        assert unique_key is not None
        await cursor.execute(_UNFINISHED, (unique_key,), prepare=False)
        # None: the other row ended between the two statements, so that the key is free again.
        if (row_id := await cursor.fetchone()) is not None:
            if on_duplicate == "keep":
                return int(row_id)
            raise Duplicate(unique_key, int(row_id))


async def enqueue_many(
    conn: psycopg.AsyncConnection[Any], topic: str, payloads: Sequence[Mapping[str, Any]]
) -> None:
    """Insert many rows of one topic by COPY, in order, in the caller's transaction."""
    async with conn.cursor() as cursor, cursor.copy("COPY outbox (topic, payload) FROM STDIN") as copy:
        for payload in payloads:
            await copy.write_row((topic, Jsonb(payload)))

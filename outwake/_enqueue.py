"""Enqueue: insert outbox rows on a connection of the caller, so that they join its transaction.

The same from psql: `INSERT INTO outbox (topic, payload) VALUES ('email.send', '{"to": "…"}')`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any, Literal

import psycopg
from psycopg.adapt import PyFormat
from psycopg.rows import scalar_row
from psycopg.types.json import Jsonb

from outwake.errors import Duplicate
from outwake.schema import in_schema
from outwake.telemetry import trace

OnDuplicate = Literal["reject", "keep", "replace"]

# As text: an operator that others define for the domain state_name would be preferred to the server's own.
_KEEP = """
ON CONFLICT (unique_key) WHERE state::text IN ('ready', 'running') AND unique_key IS NOT NULL
DO NOTHING
"""

# A running row cannot be replaced, because its handler has read the old payload. The WHERE leaves it alone:
# the statement returns nothing, and the caller gets Duplicate.
# Parameters are used, not `excluded`: `excluded` reads the columns, and a producer may only write them.
_REPLACE = """
ON CONFLICT (unique_key) WHERE state::text IN ('ready', 'running') AND unique_key IS NOT NULL
DO UPDATE SET {assignments}
WHERE o.state::text = 'ready'
"""
_REPLACED = ("payload", "priority", "available_at", "traceparent")

# Finds the row even if the caller may not read it: the key may be another producer's.
_UNFINISHED = in_schema("SELECT :schema.unique_key_holder(%s)")

_MANY = in_schema(
    "INSERT INTO :schema.outbox (topic, payload)"
    " SELECT %s::text, p FROM jsonb_array_elements(%s::jsonb) WITH ORDINALITY AS u (p, n) ORDER BY n"
)
_MOST_ROWS, _MOST_CHARACTERS = 1000, 1_000_000
"""Limits of one statement of enqueue_many; a single payload may be longer."""


@cache
def _insert(columns: tuple[str, ...], on_duplicate: OnDuplicate | None) -> str:
    places = ", ".join(map(_place, columns))
    insert = f"INSERT INTO :schema.outbox AS o ({', '.join(columns)}) VALUES ({places})"  # noqa: S608 - names of ours
    conflict = " " if on_duplicate is None else _KEEP
    if on_duplicate == "replace":
        assignments = [f"{name} = {_place(name) if name in columns else 'DEFAULT'}" for name in _REPLACED]
        conflict = _REPLACE.format(assignments=", ".join(assignments))
    return in_schema(f"{insert}{conflict}RETURNING id")


def _place(name: str) -> str:
    return "%s::jsonb" if name == "payload" else "%s"


def _json(payload: Mapping[str, Any]) -> str | Jsonb:
    try:
        return json.dumps(payload)  # Jsonb is slower to adapt
    except TypeError:
        return Jsonb(payload)  # uses the function given to psycopg's set_json_dumps


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
    `unique_key`: no two unfinished rows share it. `on_duplicate` decides what a duplicate does: `reject`
    refuses it, `keep` returns the id of the existing row, `replace` updates that row if it has not started.

    `traceparent`: the W3C trace context of the row; by default that of the current span.

    Raises Duplicate (also for `replace`, if the row is already running), psycopg.errors.CheckViolation
    if a value is out of bounds.
    """
    # Only the given columns are named, and a conflict arbiter only with a unique_key: both cost the server.
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
    if on_duplicate not in ("reject", "keep", "replace"):
        raise ValueError(f"on_duplicate is reject, keep or replace, not {on_duplicate!r}")
    statement = _insert(tuple(values), None if unique_key is None else on_duplicate)
    parameters = tuple(values.values())
    if on_duplicate == "replace" and unique_key is not None:
        parameters += tuple(values[name] for name in _REPLACED if name in values)
    cursor = conn.cursor(row_factory=scalar_row)  # the caller's connection may have another row factory
    while True:
        await cursor.execute(statement, parameters)
        if (row_id := await cursor.fetchone()) is not None:
            return int(row_id)
        assert unique_key is not None
        await cursor.execute(_UNFINISHED, (unique_key,), prepare=False)
        # None: the other row ended between the two statements, so the key is free again.
        if (row_id := await cursor.fetchone()) is not None:
            if on_duplicate == "keep":
                return int(row_id)
            raise Duplicate(unique_key, int(row_id))


async def enqueue_many(
    conn: psycopg.AsyncConnection[Any], topic: str, payloads: Iterable[Mapping[str, Any]]
) -> None:
    """Insert many rows of one topic, with ids in their order, in the caller's transaction.

    Each statement inserts up to 1,000 rows, so `payloads` may be a generator of any length. In autocommit
    mode each statement is a transaction of its own.

    Raises the errors of `enqueue` except Duplicate.
    """
    # Not COPY, because row-level security refuses it whatever rights the role has. This is as fast: one JSON
    # array is one parameter, and the server splits it.
    async with conn.cursor() as cursor:
        for batch in _batches(payloads, conn):
            await cursor.execute(_MANY, (topic, batch))


def _batches(payloads: Iterable[Mapping[str, Any]], conn: psycopg.AsyncConnection[Any]) -> Iterator[str]:
    """The payloads as JSON arrays, one for each statement."""
    texts: list[str] = []
    length = 0
    for payload in payloads:
        text = _text(payload, conn)
        if texts and (len(texts) == _MOST_ROWS or length + len(text) > _MOST_CHARACTERS):
            yield f"[{','.join(texts)}]"
            texts, length = [], 0
        texts.append(text)
        length += len(text)
    if texts:
        yield f"[{','.join(texts)}]"


def _text(payload: Mapping[str, Any], conn: psycopg.AsyncConnection[Any]) -> str:
    json_or_wrapper = _json(payload)
    if isinstance(json_or_wrapper, str):
        return json_or_wrapper
    dumped = conn.adapters.get_dumper(Jsonb, PyFormat.TEXT)(Jsonb, conn).dump(json_or_wrapper)
    return bytes(dumped or b"null").decode()

"""Enqueue: insert outbox rows on a connection of the caller, so that they join its transaction.

The same from psql: `INSERT INTO outbox (topic, payload) VALUES ('email.send', '{"to": "…"}')`.

One text serves connections that are awaited and those that are not (outwake/_drivers.py).
"""

from collections.abc import Coroutine, Iterable, Iterator
from datetime import datetime
from functools import cache
from typing import Any, Literal, cast, overload

from outwake._connection_types import AnyConnection, AsyncConnection, Payload, SyncConnection
from outwake._drivers import Query, Steps, run
from outwake._payload import json_text
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
_UNFINISHED = in_schema("SELECT :schema.unique_key_holder(%s::text)")

_MANY = in_schema(
    "INSERT INTO :schema.outbox (topic, payload, traceparent)"
    " SELECT %s::text, p, %s::text"
    " FROM jsonb_array_elements(%s::text::jsonb) WITH ORDINALITY AS u (p, n) ORDER BY n"
)
_MOST_ROWS, _MOST_CHARACTERS = 1000, 1_000_000
"""Limits of one statement of enqueue_many; a single payload may be longer."""

_TYPES = {
    "payload": "jsonb",
    "priority": "integer",
    "available_at": "timestamptz",
    "max_attempts": "integer",
}
"""What a parameter is cast to, unless it is text."""


@overload
def enqueue(
    conn: AsyncConnection,
    topic: str,
    payload: Payload | None = None,
    *,
    ordering_key: str | None = None,
    priority: int = 0,
    available_at: datetime | None = None,
    max_attempts: int = 10,
    unique_key: str | None = None,
    on_duplicate: OnDuplicate = "reject",
    traceparent: str | None = None,
) -> Coroutine[Any, Any, int]: ...
@overload
def enqueue(
    conn: SyncConnection,
    topic: str,
    payload: Payload | None = None,
    *,
    ordering_key: str | None = None,
    priority: int = 0,
    available_at: datetime | None = None,
    max_attempts: int = 10,
    unique_key: str | None = None,
    on_duplicate: OnDuplicate = "reject",
    traceparent: str | None = None,
) -> int: ...
def enqueue(
    conn: AnyConnection,
    topic: str,
    payload: Payload | None = None,
    *,
    ordering_key: str | None = None,
    priority: int = 0,
    available_at: datetime | None = None,
    max_attempts: int = 10,
    unique_key: str | None = None,
    on_duplicate: OnDuplicate = "reject",
    traceparent: str | None = None,
) -> int | Coroutine[Any, Any, int]:
    """Insert one row and return its id. It becomes work when the caller's transaction commits.

    `conn`: a connection of psycopg, psycopg2, asyncpg or Django, or a connection or session of SQLAlchemy 2.
    Await the call if the connection is one whose methods are awaited: `await enqueue(conn, "email.send")`.
    `payload`: a mapping or any other JSON value, or a model of pydantic; without it `{}`.

    `ordering_key`: rows that share it run one at a time, by id. `priority`: higher runs first.
    `unique_key`: no two unfinished rows share it. `on_duplicate` decides what a duplicate does: `reject`
    refuses it, `keep` returns the id of the existing row, `replace` updates that row if it has not started.

    `traceparent`: the W3C trace context of the row; by default that of the current span of OpenTelemetry.

    Raises Duplicate (also for `replace`, if the row is already running); TypeError, before anything is sent,
    for another connection, for `await` with a synchronous one, and for a payload that is not JSON; the error
    of the connection's own package if a value is out of bounds, with psycopg errors.CheckViolation.
    """
    values = {
        "topic": topic,
        "payload": payload,
        "ordering_key": ordering_key,
        "priority": None if priority == 0 else str(priority),
        "available_at": available_at and available_at.isoformat(),
        "max_attempts": None if max_attempts == 10 else str(max_attempts),
        "unique_key": unique_key,
        "traceparent": traceparent or trace.active(),
    }
    return run(conn, _insert_one(conn, values, on_duplicate))


@overload
def enqueue_many(
    conn: AsyncConnection, topic: str, payloads: Iterable[Payload]
) -> Coroutine[Any, Any, None]: ...
@overload
def enqueue_many(conn: SyncConnection, topic: str, payloads: Iterable[Payload]) -> None: ...
def enqueue_many(
    conn: AnyConnection, topic: str, payloads: Iterable[Payload]
) -> Coroutine[Any, Any, None] | None:
    """Insert many rows of one topic, with ids in their order, in the caller's transaction.

    Each statement inserts up to 1,000 rows, so `payloads` may be a generator of any length. In autocommit
    mode each statement is a transaction of its own. Connections, payloads and traces are as in `enqueue`.

    Raises the errors of `enqueue` except Duplicate.
    """
    return run(conn, _insert_many(conn, topic, payloads, trace.active()))


def _insert_one(conn: Any, given: dict[str, Any], on_duplicate: OnDuplicate) -> Steps[int]:
    if on_duplicate not in ("reject", "keep", "replace"):
        raise ValueError(f"on_duplicate is reject, keep or replace, not {on_duplicate!r}")
    # Only the given columns are named, and a conflict arbiter only with a unique_key: both cost the server.
    values = {name: value for name, value in given.items() if value is not None}
    if "payload" in values:
        values["payload"] = json_text(values["payload"], conn)
    unique_key: str | None = values.get("unique_key")
    text = _insert(tuple(values), None if unique_key is None else on_duplicate)
    parameters = tuple(values.values())
    if on_duplicate == "replace" and unique_key is not None:
        parameters += tuple(values[name] for name in _REPLACED if name in values)
    insert = Query(text, parameters)
    while True:
        if (row_id := (yield insert)) is not None:
            return int(row_id)
        # None: the other row ended between the two statements, so the key is free again.
        if (row_id := (yield Query(_UNFINISHED, (unique_key,)))) is not None:
            if on_duplicate == "keep":
                return int(row_id)
            raise Duplicate(cast(str, unique_key), int(row_id))


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
    return f"%s::text::{_TYPES[name]}" if name in _TYPES else "%s::text"


def _insert_many(conn: Any, topic: str, payloads: Iterable[Payload], traceparent: str | None) -> Steps[None]:
    # Not COPY, because row-level security refuses it whatever rights the role has. This is as fast: one JSON
    # array is one parameter, and the server splits it.
    for batch in _batches(payloads, conn):
        yield Query(_MANY, (topic, traceparent, batch), returns=False)


def _batches(payloads: Iterable[Payload], conn: Any) -> Iterator[str]:
    """The payloads as JSON arrays, one for each statement."""
    texts: list[str] = []
    length = 0
    for payload in payloads:
        text = json_text(payload, conn)
        if texts and (len(texts) == _MOST_ROWS or length + len(text) > _MOST_CHARACTERS):
            yield f"[{','.join(texts)}]"
            texts, length = [], 0
        texts.append(text)
        length += len(text)
    if texts:
        yield f"[{','.join(texts)}]"

"""Claim, complete, fail: a worker's side of the outbox, as functions for a loop of your own.

The worker command sends the same statements (worker/engine/claims.py) when worker/engine/claimer.py decides.

Each function calls one SQL function of sql/outbox/functions/, which holds the statement and explains it.
The connection is the caller's. In autocommit each call is a transaction; inside a transaction it joins it.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow, args_row, tuple_row

from outwake.errors import Fenced, WorkerEnded
from outwake.schema import in_schema

ENDED = "OW001"
"""The SQLSTATE of a call by a worker whose lease was ended."""

LEASE = timedelta(seconds=6)


class Claimed(NamedTuple):
    """A claimed row. `id` and `attempt` together are the fencing token of everything done for it."""

    # A tuple, because it is much cheaper to make than a frozen dataclass.

    id: int
    topic: str
    ordering_key: str | None
    payload: Any
    attempt: int
    failures: int
    max_attempts: int
    traceparent: str | None
    timeout: timedelta | None
    waited: timedelta
    """How long the row had been due."""
    priority: int
    available_at: datetime


CLAIMED = ", ".join(Claimed._fields)
"""The columns that the claiming functions return, in the order of `Claimed`."""


class Lane(NamedTuple):
    """Where a scan begins within a topic and priority: at this place, in the order of available_at, id."""

    topic: str
    priority: int
    available_at: datetime
    id: int
    alone: bool
    """Scan for this one row only, and for nothing after it."""


_REGISTER = in_schema(
    "INSERT INTO :schema.worker (host, pid, version, topics, concurrency, presence)"
    " VALUES (%s, %s, %s, %s, %s, %s) RETURNING id"
)
_RECONNECT = in_schema("SELECT r FROM :schema.outbox_reconnect(%s, %s, %s::bigint[], %s::integer[]) AS r")
CLAIM = in_schema(
    f"SELECT {CLAIMED} FROM :schema.outbox_complete_and_claim("  # noqa: S608 - names of ours
    "%s, %s::bigint[], %s::integer[], %s, %s, %s, %s, %s,"
    " %s::smallint[], %s::timestamptz[], %s::bigint[], %s::boolean[])"
)
"""Ends rows and claims the next; see `complete_and_claim`."""
COMPLETE = in_schema("SELECT r FROM :schema.outbox_complete(%s, %s::bigint[], %s::integer[]) AS r")
"""Ends rows; see `complete`."""
_FAIL = in_schema("SELECT :schema.outbox_fail(%s, %s, %s, %s, %s, %s)")
_HAND_BACK = in_schema("SELECT r FROM :schema.outbox_hand_back(%s, %s::bigint[], %s::integer[], %s) AS r")
_FENCE = in_schema("SELECT :schema.outbox_fence(%s, %s, %s)")
_RENEW = in_schema(
    "SELECT id, attempt, cancel FROM :schema.outbox_renew(%s, %s, %s::bigint[], %s::integer[])"
)


async def register(
    conn: psycopg.AsyncConnection[Any],
    topics: Sequence[str],
    *,
    concurrency: int = 1,
    presence: int | None = None,
) -> UUID:
    """Register this process as a worker; return the id under which it claims."""
    cursor = await _execute(
        conn,
        _REGISTER,
        (socket.gethostname(), os.getpid(), version("outwake"), list(topics), concurrency, presence),
    )
    row = await cursor.fetchone()
    assert row is not None
    worker_id: UUID = row[0]
    return worker_id


async def claim(
    conn: psycopg.AsyncConnection[Any],
    worker_id: UUID,
    topics: Sequence[str],
    slots: int,
    *,
    lease: timedelta = LEASE,
    stay_parked: bool = False,
    connection: int | None = None,
) -> list[Claimed]:
    """Claim up to `slots` due rows, by priority, then age.

    The rows belong to the worker for `lease`. Each claim and each `renew` extends it; when it has expired,
    another worker may rescue the rows. `connection` is the worker's presence: with it, nothing is claimed
    once the worker has reconnected on another connection.

    Raises WorkerEnded if a rescue has ended the worker's lease.
    """
    rows, _ = await complete_and_claim(
        conn, worker_id, (), topics, slots, lease=lease, stay_parked=stay_parked, connection=connection
    )
    return rows


async def reconnect(
    conn: psycopg.AsyncConnection[Any], worker_id: UUID, presence: int, running: Iterable[tuple[int, int]]
) -> set[int]:
    """Record a worker's new connection. Hand back every row of the worker except `running`, given as
    (id, attempt): these were claimed in an answer that was lost. Returns their ids.

    Raises WorkerEnded if a rescue came first.
    """
    try:
        cursor = await _execute(conn, _RECONNECT, (worker_id, presence, *arrays(running)))
        return {row[0] async for row in cursor}
    except psycopg.Error as error:
        raise as_ended(error) from error


async def complete_and_claim(
    conn: psycopg.AsyncConnection[Any],
    worker_id: UUID,
    completed: Iterable[tuple[int, int]],
    topics: Sequence[str],
    slots: int,
    *,
    lease: timedelta = LEASE,
    stay_parked: bool = False,
    connection: int | None = None,
    lanes: Sequence[Lane] | None = None,
) -> tuple[list[Claimed], set[tuple[int, int]]]:
    """`complete` and `claim` in one commit and one round trip. Returns the claimed rows, and those of
    `completed` that were fenced. With `lanes`, the claim scans these only.

    Raises WorkerEnded if a rescue came first.
    """
    if lanes is None:
        where: Sequence[Sequence[Any] | None] = (list(topics), None, None, None, None)
    else:
        where = [list(column) for column in zip(*lanes, strict=True)] or [[]] * len(Lane._fields)
    try:
        async with conn.cursor(row_factory=args_row(Claimed)) as cursor:
            await cursor.execute(
                CLAIM,
                (
                    worker_id,
                    *arrays(completed),
                    where[0],
                    slots,
                    lease,
                    stay_parked,
                    connection,
                    *where[1:],
                ),
                binary=True,
            )
            rows = await cursor.fetchall()
    except psycopg.Error as error:
        raise as_ended(error) from error
    # A refused completion is returned as a row without a topic.
    refused = {(row.id, row.attempt) for row in rows if row.topic is None}
    return ([row for row in rows if row.topic is not None] if refused else rows), refused


async def complete(
    conn: psycopg.AsyncConnection[Any], worker_id: UUID, rows: Iterable[tuple[int, int]]
) -> set[int]:
    """End rows, given as (id, attempt), as done. Returns the ids that the worker still held."""
    cursor = await _execute(conn, COMPLETE, (worker_id, *arrays(rows)))
    return {row[0] async for row in cursor}


async def fail(
    conn: psycopg.AsyncConnection[Any],
    worker_id: UUID,
    row: tuple[int, int],
    error: str,
    *,
    delay: timedelta | None = None,
    permanent: bool = False,
) -> str:
    """End an attempt, given as (id, attempt), as failed; return the row's new state.

    `ready`: retried after `delay`, by default by exponential backoff with full jitter. `dead`: the row has
    failed `max_attempts` times, or `permanent` is set. `cancelled`: a cancel was requested meanwhile.

    Raises Fenced if the row no longer belongs to the worker.
    """
    cursor = await _execute(conn, _FAIL, (worker_id, *row, clean(error), delay, permanent))
    found = await cursor.fetchone()
    if found is None or found[0] is None:
        raise Fenced(*row)
    return str(found[0])


async def hand_back(
    conn: psycopg.AsyncConnection[Any],
    worker_id: UUID,
    rows: Iterable[tuple[int, int]],
    delay: timedelta = timedelta(0),
) -> set[int]:
    """Hand rows back, given as (id, attempt), without a failure. Returns the ids that the worker held."""
    cursor = await _execute(conn, _HAND_BACK, (worker_id, *arrays(rows), delay))
    return {row[0] async for row in cursor}


async def fence(conn: psycopg.AsyncConnection[Any], worker_id: UUID, row: tuple[int, int]) -> bool:
    """Lock a claimed row, given as (id, attempt), until the caller's transaction ends.

    The transaction's writes then happen wholly before any rescue, or not at all. Returns whether a cancel
    was requested. Raises Fenced if the row no longer belongs to the worker; roll back in that case.
    """
    cursor = await _execute(conn, _FENCE, (worker_id, *row))
    found = await cursor.fetchone()
    if found is None or found[0] is None:
        raise Fenced(*row)
    return bool(found[0])


async def renew(
    conn: psycopg.AsyncConnection[Any],
    worker_id: UUID,
    rows: Iterable[tuple[int, int]],
    lease: timedelta = LEASE,
) -> dict[tuple[int, int], bool]:
    """Extend the lease. Returns those of `rows`, given as (id, attempt), that the worker still runs, and for
    each whether a cancel was requested. A missing row was taken away.

    Raises WorkerEnded if a rescue came first.
    """
    try:
        cursor = await _execute(conn, _RENEW, (worker_id, lease, *arrays(rows)))
        return {(row[0], row[1]): row[2] async for row in cursor}
    except psycopg.Error as error:
        raise as_ended(error) from error


async def _execute(
    conn: psycopg.AsyncConnection[Any], query: LiteralString, values: Sequence[Any]
) -> psycopg.AsyncCursor[TupleRow]:
    """Run a query with rows as tuples, whatever row factory the caller's connection has."""
    return await conn.cursor(row_factory=tuple_row).execute(query, values)


def arrays(rows: Iterable[tuple[int, int]]) -> tuple[str, str]:
    """Rows, given as (id, attempt), sorted, as an array of ids and an array of attempts. Both are text,
    because psycopg adapts a list slowly.
    """
    tokens = sorted(rows)
    ids, attempts = (",".join(str(token[place]) for token in tokens) for place in (0, 1))
    return f"{{{ids}}}", f"{{{attempts}}}"


def as_ended(error: psycopg.Error) -> Exception:
    """The same error, or WorkerEnded if the error says that the lease was ended."""
    return WorkerEnded(str(error).partition("\n")[0]) if error.sqlstate == ENDED else error


def clean(text: str) -> str:
    """The text without what Postgres cannot store: NUL and lone surrogates are replaced."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")

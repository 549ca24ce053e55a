"""Runs a query on the connection of a caller, whichever package made it.

Nothing is imported: a connection is known by the names of its classes. What is none of these kinds is
refused before anything is sent, because a row that is written on the side would not be in the caller's
transaction.

A protocol of several queries is a generator. It yields each Query, and gets the answer back. So the same
text serves connections that are awaited and connections that are not.
"""

import dis
import sys
from collections.abc import Callable, Coroutine, Generator
from functools import cache
from types import FrameType
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Query(NamedTuple):
    """One statement. Its parameters are all text, cast by the statement, so that no driver converts them."""

    text: str
    """With `%s` for each parameter, and no other `%`."""
    values: tuple[str | None, ...]
    returns: bool = True
    """Whether it returns rows. Then the answer is the first column of the first row, None without a row."""


Steps = Generator[Query, Any, Result]
Ask = Callable[[Any, Query], Any]


class Driver(NamedTuple):
    """How a query is run on one kind of connection."""

    ask: Ask
    """(connection, query) to its answer, or to a coroutine of it."""
    awaited: bool


def run(conn: Any, steps: Steps[Result]) -> Result | Coroutine[Any, Any, Result]:
    """Run all steps: at once, or when the coroutine is awaited.

    Raises TypeError if it is no connection of ours to use, or if the caller awaits one that is not awaited.
    """
    kind: type = type(conn)
    driver = _driver(kind)
    if driver is None:
        raise TypeError(_wrong(conn))
    if driver.awaited:
        return _enqueuing(conn, steps, driver.ask)
    caller = sys._getframe(1).f_back  # of enqueue
    if caller is not None and _awaits(caller):
        raise TypeError(f"{_name(kind)} is a synchronous connection: call without await")
    return _run(conn, steps, driver.ask)


def _run(conn: Any, steps: Steps[Result], ask: Ask) -> Result:
    answer = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result
        answer = ask(conn, query)


async def _enqueuing(conn: Any, steps: Steps[Result], ask: Ask) -> Result:
    answer = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result
        answer = await ask(conn, query)


def _awaits(frame: FrameType) -> bool:
    """Whether the frame is at a call whose result it awaits.

    `await enqueue(conn)` on a synchronous connection would insert the row, and then fail. An event loop that
    runs proves nothing: synchronous code runs below it too, in a notebook or in a coroutine that blocks.
    """
    code = frame.f_code.co_code
    place = frame.f_lasti + 2
    while place < len(code) and code[place] == _CACHE:
        place += 2
    return place < len(code) and code[place] == _GET_AWAITABLE


_CACHE, _GET_AWAITABLE = dis.opmap["CACHE"], dis.opmap["GET_AWAITABLE"]


# psycopg. The classes' own cursors, because the connection may have another cursor or row factory.


@cache  # an import statement takes longer than all else here
def _cursors() -> tuple[type[Any], type[Any], Any]:
    from psycopg import AsyncCursor, Cursor
    from psycopg.rows import scalar_row

    return Cursor, AsyncCursor, scalar_row


def _psycopg(conn: Any, query: Query) -> Any:
    cursor_class, _, scalar_row = _cursors()
    cursor = cursor_class(conn, row_factory=scalar_row)
    cursor.execute(query.text, query.values)
    return cursor.fetchone() if query.returns else None


async def _psycopg_async(conn: Any, query: Query) -> Any:
    _, cursor_class, scalar_row = _cursors()
    cursor = cursor_class(conn, row_factory=scalar_row)
    await cursor.execute(query.text, query.values)
    return await cursor.fetchone() if query.returns else None


# psycopg2, asyncpg, Django


def _psycopg2(conn: Any, query: Query) -> Any:
    if conn.async_:
        raise TypeError("enqueue takes no asynchronous connection of psycopg2")
    with conn.cursor(cursor_factory=sys.modules["psycopg2.extensions"].cursor) as cursor:
        return _executed(cursor, query)


def _django(conn: Any, query: Query) -> Any:
    if conn.vendor != "postgresql":
        raise TypeError(f"enqueue needs Postgres: this connection of Django's is to {conn.vendor}")
    with conn.cursor() as cursor:
        return _executed(cursor, query)


def _executed(cursor: Any, query: Query) -> Any:
    cursor.execute(query.text, query.values)
    row = cursor.fetchone() if query.returns else None
    return None if row is None else row[0]


async def _asyncpg(conn: Any, query: Query) -> Any:
    return await conn.fetchval(_numbered(query.text), *query.values)


# SQLAlchemy


def _session(session: Any, query: Query) -> Any:
    return _connection(session.connection(), query)


async def _async_session(session: Any, query: Query) -> Any:
    return await _async_connection(await session.connection(), query)


def _connection(conn: Any, query: Query) -> Any:
    result = conn.exec_driver_sql(_in_dialect(conn.dialect, query.text), query.values)
    return result.scalar() if query.returns else None


async def _async_connection(conn: Any, query: Query) -> Any:
    result = await conn.exec_driver_sql(_in_dialect(conn.dialect, query.text), query.values)
    return result.scalar() if query.returns else None


def _in_dialect(dialect: Any, text: str) -> str:
    if dialect.name == "postgresql":
        if dialect.driver == "asyncpg":
            return _numbered(text)
        if dialect.driver in ("psycopg", "psycopg2"):
            return text
    raise TypeError(
        "enqueue needs Postgres by psycopg, psycopg2 or asyncpg:"
        f" this connection of SQLAlchemy's is {dialect.name}+{dialect.driver}"
    )


@cache
def _numbered(text: str) -> str:
    """With `$1`, `$2` and so on for the parameters."""
    first, *rest = text.split("%s")
    return first + "".join(f"${place}{part}" for place, part in enumerate(rest, 1))


_DRIVERS = {
    ("psycopg", "Connection"): Driver(_psycopg, awaited=False),
    ("psycopg", "AsyncConnection"): Driver(_psycopg_async, awaited=True),
    ("psycopg2", "connection"): Driver(_psycopg2, awaited=False),
    ("asyncpg", "Connection"): Driver(_asyncpg, awaited=True),
    ("asyncpg", "PoolConnectionProxy"): Driver(_asyncpg, awaited=True),
    ("django", "ConnectionProxy"): Driver(_django, awaited=False),  # django.db.connection
    ("django", "BaseDatabaseWrapper"): Driver(_django, awaited=False),  # django.db.connections["default"]
    ("sqlalchemy", "Connection"): Driver(_connection, awaited=False),
    ("sqlalchemy", "Session"): Driver(_session, awaited=False),
    ("sqlalchemy", "scoped_session"): Driver(_session, awaited=False),
    ("sqlalchemy", "AsyncConnection"): Driver(_async_connection, awaited=True),
    ("sqlalchemy", "AsyncSession"): Driver(_async_session, awaited=True),
    ("sqlalchemy", "async_scoped_session"): Driver(_async_session, awaited=True),
}
"""By package and name of a class, or of one that it inherits from."""


@cache
def _driver(kind: type) -> Driver | None:
    for base in kind.__mro__:
        if found := _DRIVERS.get((base.__module__.partition(".")[0], base.__name__)):
            return found
    return None


def _wrong(conn: Any) -> str:
    return (
        "enqueue takes the connection of your transaction: one of psycopg, psycopg2, asyncpg or Django, or a"
        f" connection or session of SQLAlchemy. {_name(type(conn))} is none of these"
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

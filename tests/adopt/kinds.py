"""An application that enqueues, on the kind of connection that its argument names. Run in any environment.

It reads requests and prints answers, one JSON line each. A request is one transaction:

    {"rows": [{"topic": "t", "unique_key": "u"}], "commit": true, "model": false, "span": false}

It inserts an order of its own, then enqueues each row. The answer has the id of each, or the duplicate's,
and the traceparent of the span that it was in. It imports nothing but outwake and what the kind needs.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
)
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from outwake import Duplicate, enqueue

ORDER = "INSERT INTO shop_order (article) VALUES ('lamp')"

Execute = Callable[[str], Any]


class RollBack(Exception):
    """The transaction is to leave nothing."""


# Each opens a transaction. It yields the connection, and what runs the application's own SQL on it.


@contextmanager
def psycopg_(url: str) -> Iterator[tuple[Any, Execute]]:
    import psycopg

    with psycopg.connect(url) as conn:
        yield conn, lambda text: conn.execute(text.encode())


@asynccontextmanager
async def psycopg_async(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    import psycopg

    async with await psycopg.AsyncConnection.connect(url) as conn:
        yield conn, lambda text: conn.execute(text.encode())


@contextmanager
def psycopg2_(url: str) -> Iterator[tuple[Any, Execute]]:
    import psycopg2
    from psycopg2.extras import RealDictCursor

    with closing(psycopg2.connect(url, cursor_factory=RealDictCursor)) as conn, conn:
        yield conn, lambda text: conn.cursor().execute(text)


@asynccontextmanager
async def asyncpg_(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    import asyncpg

    conn = await asyncpg.connect(url)
    try:
        # As applications do, which then give and get objects.
        await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        async with conn.transaction():
            yield conn, conn.execute
    finally:
        await conn.close()


@asynccontextmanager
async def asyncpg_pool(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    import asyncpg

    async with asyncpg.create_pool(url, min_size=1) as pool, pool.acquire() as conn, conn.transaction():
        yield conn, conn.execute


@contextmanager
def session(url: str) -> Iterator[tuple[Any, Execute]]:
    from sqlalchemy import NullPool, create_engine, text
    from sqlalchemy.orm import Session

    with Session(create_engine(url, poolclass=NullPool)) as made, made.begin():
        yield made, lambda words: made.execute(text(words))


@contextmanager
def connection(url: str) -> Iterator[tuple[Any, Execute]]:
    from sqlalchemy import NullPool, create_engine, text

    with create_engine(url, poolclass=NullPool).begin() as conn:
        yield conn, lambda words: conn.execute(text(words))


@asynccontextmanager
async def async_session(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    from sqlalchemy import NullPool, text
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    engine = create_async_engine(url, poolclass=NullPool)
    async with AsyncSession(engine) as made, made.begin():
        yield made, lambda words: made.execute(text(words))


@asynccontextmanager
async def async_connection(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    from sqlalchemy import NullPool, text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as conn:
        yield conn, lambda words: conn.execute(text(words))


@contextmanager
def django_(url: str) -> Iterator[tuple[Any, Execute]]:
    from django.conf import settings
    from django.db import connection, transaction

    if not settings.configured:
        parts = urlsplit(url)
        server = {"HOST": parts.hostname, "PORT": parts.port, "USER": parts.username}
        server |= {"PASSWORD": parts.password or "", "NAME": parts.path[1:]}
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **server}})
    with transaction.atomic():
        yield connection, lambda text: connection.cursor().execute(text)


Open = Callable[[str], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]

KINDS: dict[str, tuple[Open, str]] = {
    "psycopg `Connection`": (psycopg_, ""),
    "psycopg `AsyncConnection`": (psycopg_async, ""),
    "psycopg2": (psycopg2_, ""),
    "asyncpg": (asyncpg_, ""),
    "asyncpg, from a pool": (asyncpg_pool, ""),
    "SQLAlchemy `Session`, psycopg": (session, "psycopg"),
    "SQLAlchemy `Session`, psycopg2": (session, "psycopg2"),
    "SQLAlchemy `Connection`, psycopg": (connection, "psycopg"),
    "SQLAlchemy `Connection`, psycopg2": (connection, "psycopg2"),
    "SQLAlchemy `AsyncSession`, psycopg": (async_session, "psycopg"),
    "SQLAlchemy `AsyncSession`, asyncpg": (async_session, "asyncpg"),
    "SQLAlchemy `AsyncConnection`, psycopg": (async_connection, "psycopg"),
    "SQLAlchemy `AsyncConnection`, asyncpg": (async_connection, "asyncpg"),
    "Django `connection`": (django_, ""),
}
"""What opens a transaction, and the driver in SQLAlchemy's URL."""


def payload_of(row: dict[str, Any], model: bool) -> Any:
    if not model:
        return row.get("payload")
    from pydantic import BaseModel

    class Mail(BaseModel):
        to: str
        copies: list[int]

    return Mail(**row["payload"])


def arguments(row: dict[str, Any], model: bool) -> dict[str, Any]:
    given = {**row, "payload": payload_of(row, model)}
    if "available_at" in given:
        given["available_at"] = datetime.fromisoformat(given["available_at"])
    return given


def told(duplicate: Duplicate) -> dict[str, Any]:
    return {"duplicate_of": duplicate.row_id}


def serve(url: str, opening: Any, request: dict[str, Any]) -> list[Any]:
    """The same transaction, on a connection that is not awaited."""
    answers: list[Any] = []
    try:
        with opening(url) as (conn, execute):
            execute(ORDER)
            for row in request["rows"]:
                try:
                    answers.append(enqueue(conn, **arguments(row, request["model"])))
                except Duplicate as duplicate:
                    answers.append(told(duplicate))
            if not request["commit"]:
                raise RollBack
    except RollBack:
        pass
    return answers


async def serve_async(url: str, opening: Any, request: dict[str, Any]) -> list[Any]:
    answers: list[Any] = []
    try:
        async with opening(url) as (conn, execute):
            await execute(ORDER)
            for row in request["rows"]:
                try:
                    answers.append(await enqueue(conn, **arguments(row, request["model"])))
                except Duplicate as duplicate:
                    answers.append(told(duplicate))
            if not request["commit"]:
                raise RollBack
    except RollBack:
        pass
    return answers


@contextmanager
def span(wanted: bool) -> Iterator[str | None]:
    """A span of the application's own SDK; its traceparent."""
    if not wanted:
        yield None
        return
    from opentelemetry.sdk.trace import TracerProvider

    with TracerProvider().get_tracer("shop").start_as_current_span("order") as opened:
        place = opened.get_span_context()
        yield f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}"


def main(kind: str, url: str) -> None:
    """Serve requests until stdin ends."""
    opening, driver = KINDS[kind]
    if driver:
        url = url.replace("postgresql://", f"postgresql+{driver}://")
    for line in sys.stdin:
        request = json.loads(line)
        with span(request["span"]) as traceparent:
            if isinstance(opening(url), AbstractAsyncContextManager):
                answers = asyncio.run(serve_async(url, opening, request))
            else:
                answers = serve(url, opening, request)
        print(json.dumps({"answers": answers, "traceparent": traceparent}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], os.environ["SHOP_DATABASE_URL"])

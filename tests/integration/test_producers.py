"""Everybody who enqueues, with the real libraries: the table of docs/producers.md is made here."""

import asyncio
import functools
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import psycopg2
import psycopg_pool
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outwake import Duplicate, enqueue, enqueue_many
from tests.adopt import checks
from tests.adopt.kinds import KINDS
from tests.conftest import Connect
from tests.support.process import ROOT, Process
from tests.support.roles import Roles, roles_of
from tests.support.steps import Connection, column, get, one
from tests.support.worker import command, install

NODE_MODULES = ROOT / ".state/pg/package.json"
KINDS_PROGRAM = ROOT / "tests/adopt/kinds.py"
NODE_PROGRAM = ROOT / "tests/adopt/producer.mjs"


@pytest.fixture
def roles(database: str) -> Iterator[Roles]:
    with roles_of(database) as roles:
        yield roles


@pytest.fixture
async def worker(database: str, tmp_path: Path) -> AsyncIterator[Process]:
    """A worker that sleeps."""
    async with command(database, install(tmp_path / "handlers"), "--topics", checks.SERVED) as worker:
        await worker.event("parked")
        yield worker


@pytest.fixture
async def owner(connect: Connect) -> Connection:
    conn = await connect()
    await conn.execute("CREATE TABLE public.shop_order (id bigserial PRIMARY KEY, article text)")
    return conn


async def test_the_table_of_producers(roles: Roles, owner: Connection, worker: Process) -> None:
    """Each kind of connection, as a producer's role."""
    shop = roles.producer(checks.SERVED, checks.UNSERVED)
    await owner.execute(f"GRANT INSERT ON public.shop_order TO {shop.name}".encode())
    await owner.execute(f"GRANT USAGE ON SEQUENCE public.shop_order_id_seq TO {shop.name}".encode())
    programs: dict[str, list[str]] = {kind: [sys.executable, str(KINDS_PROGRAM), kind] for kind in KINDS}
    node = shutil.which("node")
    if node is not None and NODE_MODULES.exists():
        programs[checks.NODE] = [node, str(NODE_PROGRAM), str(NODE_MODULES)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SHOP_DATABASE_URL": shop.url}
    rows = {}
    for kind, program in programs.items():
        async with checks.producing(*program, env=env) as producer:
            rows[kind] = await checks.row_of(producer, owner, worker, traces=kind in KINDS)
    made = checks.table(rows)
    page = (ROOT / "docs/producers.md").read_text()
    if checks.NODE in programs:
        assert made in page, made
    else:
        assert all(line in page for line in made.splitlines()), made
        pytest.skip("the line of node-postgres was not made: `make pg` installs it, and needs node and npm")


# What is refused


async def nothing_enqueued(conn: Connection) -> None:
    assert await column(conn, "SELECT id FROM outbox") == []


async def test_await_with_a_synchronous_connection_is_refused_before_anything_is_sent(
    database: str, connect: Connect
) -> None:
    url = database.replace("postgresql://", "postgresql+psycopg://")
    with (
        psycopg.connect(database) as conn,
        psycopg2.connect(database) as other,
        Session(sqlalchemy.create_engine(url, poolclass=NullPool)) as session,
    ):
        synchronous: tuple[Any, ...] = (conn, other, session, session.connection())
        for kind in synchronous:
            with pytest.raises(TypeError, match="call without await"):
                await enqueue(kind, "t")
            with pytest.raises(TypeError, match="call without await"):
                await functools.partial(enqueue, kind)("t", {"a": [1]}, priority=2)
            with pytest.raises(TypeError, match="call without await"):
                await enqueue_many(kind, "t", [{}])
        conn.commit()
        other.commit()
        session.commit()
    await nothing_enqueued(await connect())


async def test_a_synchronous_connection_in_a_coroutine_or_a_thread_of_one(
    database: str, connect: Connect
) -> None:
    """An event loop runs in a notebook, too."""
    with psycopg.connect(database) as conn:
        ids = [
            enqueue(conn, "t"),
            await asyncio.to_thread(enqueue, conn, "t"),
            await asyncio.get_running_loop().run_in_executor(None, enqueue, conn, "t"),
        ]
    assert await column(await connect(), "SELECT id FROM outbox ORDER BY id") == ids


async def test_what_is_no_connection_is_refused(database: str, connect: Connect) -> None:
    engine = sqlalchemy.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    pool = psycopg_pool.AsyncConnectionPool(database, open=False)
    conn = await connect()
    wrong: list[Any] = [None, database, engine, async_engine, sessionmaker(engine), pool, conn.cursor()]
    wrong += [asyncpg.create_pool(database), SimpleNamespace(execute=conn.execute)]
    for kind in wrong:
        for call in (enqueue, enqueue_many):
            with pytest.raises(TypeError, match="the connection of your transaction"):
                call(kind, "t", [])
    await nothing_enqueued(conn)


def test_another_database_or_driver_is_refused() -> None:
    with sqlalchemy.create_engine("sqlite://", poolclass=NullPool).begin() as conn:
        conn.exec_driver_sql("CREATE TABLE outbox (topic text)")
        with pytest.raises(TypeError, match=r"sqlite\+pysqlite"):
            enqueue(conn, "t")
    with django_on_sqlite() as connection, pytest.raises(TypeError, match="to sqlite"):
        enqueue(connection, "t")


@contextmanager
def django_on_sqlite() -> Iterator[Any]:
    """A connection of Django's to another database. Its settings are the process's, so they are not used."""
    from django.db.backends.sqlite3.base import DatabaseWrapper

    connection = DatabaseWrapper({"NAME": ":memory:", "OPTIONS": {}, "TIME_ZONE": None, "CONN_MAX_AGE": 0})
    yield connection
    connection.close()


async def test_an_asynchronous_connection_of_psycopg2_is_refused(database: str, connect: Connect) -> None:
    conn = psycopg2.connect(database, async_=1)
    with pytest.raises(TypeError, match="asynchronous connection of psycopg2"):
        enqueue(conn, "t")
    conn.close()
    await nothing_enqueued(await connect())


@pytest.mark.parametrize(
    "payload", [object(), {"a": {1}}, float("nan"), {"a": float("inf")}], ids=["object", "set", "nan", "inf"]
)
async def test_a_payload_that_is_not_json_is_refused_before_anything_is_sent(
    payload: Any, connect: Connect
) -> None:
    conn = await connect()
    async with conn.transaction():
        with pytest.raises((TypeError, ValueError)):
            await enqueue(conn, "t", payload)
        await nothing_enqueued(conn)


# What works all the same


@pytest.mark.parametrize("payload", [{}, [], [1, {"a": None}], "text", "", 0, 1.5, True, False], ids=repr)
async def test_a_payload_is_any_json_value(payload: Any, connect: Connect) -> None:
    conn = await connect()
    row_id = await enqueue(conn, "t", payload)
    found = await get(conn, row_id, "payload")
    assert (found, type(found)) == (payload, type(payload))


async def test_a_mapping_need_not_be_a_dict(connect: Connect) -> None:
    from types import MappingProxyType

    conn = await connect()
    row_id = await enqueue(conn, "t", MappingProxyType({"a": MappingProxyType({"b": 1})}))
    assert await get(conn, row_id, "payload") == {"a": {"b": 1}}


async def test_a_model_is_written_as_it_is_read(connect: Connect) -> None:
    from datetime import UTC, datetime
    from uuid import UUID

    from pydantic import BaseModel, Field, RootModel

    class Mail(BaseModel):
        sent_to: UUID = Field(alias="to")
        at: datetime

    class Numbers(RootModel[list[int]]):
        pass

    conn = await connect()
    mail = Mail(to=UUID(int=7), at=datetime(2100, 1, 2, tzinfo=UTC))
    row_id = await enqueue(conn, "t", mail)
    assert Mail.model_validate(await get(conn, row_id, "payload")) == mail
    await enqueue_many(conn, "many", [mail, Numbers([1, 2]), {"a": 1}])
    found = await column(conn, "SELECT payload FROM outbox WHERE topic = 'many' ORDER BY id")
    assert found == [await get(conn, row_id, "payload"), [1, 2], {"a": 1}]


@pytest.mark.parametrize("factory", ["AsyncRawCursor", "AsyncClientCursor", "AsyncCursor"])
async def test_any_cursor_and_row_factory_of_psycopg(factory: str, database: str) -> None:
    conn = await psycopg.AsyncConnection.connect(
        database, cursor_factory=getattr(psycopg, factory), row_factory=dict_row
    )
    async with conn:
        row_id = await enqueue(conn, "t", {"a": "%s $1"}, unique_key="u")
        assert await enqueue(conn, "t", unique_key="u", on_duplicate="keep") == row_id
        await enqueue_many(conn, "t", [{}, {}])


def test_any_cursor_factory_of_a_synchronous_one(database: str) -> None:
    for cursor in (psycopg.RawCursor, psycopg.ClientCursor):
        with psycopg.connect(database, cursor_factory=cursor, row_factory=dict_row) as conn:
            row_id = enqueue(conn, "t", {"a": "%s $1"}, unique_key="u")
            with pytest.raises(Duplicate):
                enqueue(conn, "t", unique_key="u")
            assert enqueue(conn, "t", unique_key="u", on_duplicate="replace") == row_id
            enqueue_many(conn, "t", [{}, {}])
            conn.rollback()


async def test_scoped_sessions(database: str, connect: Connect) -> None:
    psycopg_url = database.replace("postgresql://", "postgresql+psycopg://")
    scoped = scoped_session(sessionmaker(sqlalchemy.create_engine(psycopg_url, poolclass=NullPool)))
    ids = [enqueue(scoped, "t")]
    scoped.commit()
    scoped.remove()
    engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async_scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    ids.append(await enqueue(async_scoped, "t"))
    await async_scoped.commit()
    await async_scoped.remove()
    await engine.dispose()
    assert await column(await connect(), "SELECT id FROM outbox ORDER BY id") == ids


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_synchronous_code_below_an_async_session(driver: str, database: str, connect: Connect) -> None:
    """`run_sync` hands a Session to it, on a connection that is awaited out of sight."""
    engine = create_async_engine(database.replace("postgresql://", f"postgresql+{driver}://"))

    def order(session: Session) -> int:
        enqueue_many(session, "many", ({"n": n} for n in range(3)))
        return enqueue(session, "t")

    async with AsyncSession(engine) as session:
        ids = [await session.run_sync(order), await session.run_sync(enqueue, "t")]
        await session.commit()
    await engine.dispose()
    assert await column(await connect(), "SELECT id FROM outbox WHERE topic = 't' ORDER BY id") == ids


async def test_many_on_every_kind(database: str, connect: Connect) -> None:
    conn = await connect()
    other = await asyncpg.connect(database)
    await enqueue_many(other, "asyncpg", [{"n": n} for n in range(1100)])
    await other.close()
    with psycopg2.connect(database) as third:
        enqueue_many(third, "psycopg2", [{"n": n} for n in range(1100)])
    third.close()
    for topic in ("asyncpg", "psycopg2"):
        numbers = "SELECT (payload ->> 'n')::int FROM outbox WHERE topic = %s ORDER BY id"
        assert await column(conn, numbers, topic) == list(range(1100))


async def test_errors_are_those_of_the_driver(database: str) -> None:
    with psycopg2.connect(database) as conn, pytest.raises(psycopg2.errors.CheckViolation):
        enqueue(conn, "no topic")
    conn.close()
    other = await asyncpg.connect(database)
    with pytest.raises(asyncpg.CheckViolationError):
        await enqueue(other, "no topic")
    await other.close()


async def test_the_applications_span_wins_over_ours_and_an_argument_over_both(connect: Connect) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    from outwake.telemetry import trace

    conn = await connect()
    ours, given = ("00-" + digit * 32 + "-" + digit * 16 + "-01" for digit in "12")
    with trace.span("handler", ours, "consumer"):
        with TracerProvider().get_tracer("shop").start_as_current_span("order") as span:
            place = span.get_span_context()
            theirs = f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}"
            ids = [await enqueue(conn, "t"), await enqueue(conn, "t", traceparent=given)]
            await enqueue_many(conn, "t", [{}])
        ids.append(await enqueue(conn, "t"))
    found = await column(conn, "SELECT traceparent FROM outbox ORDER BY id")
    assert found == [theirs, given, theirs, ours]
    assert await one(conn, "SELECT count(*) FROM outbox WHERE id = ANY (%s)", ids) == 3

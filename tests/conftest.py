"""A database for each test: migrated once into a template, cloned under a random name.

Tests may run side by side: NOTIFY channels and advisory locks are per database.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import AsyncConnection

from tests.support.database import new_database
from tests.support.manual_worker import ManualWorker
from tests.support.server import running_server, with_database

if TYPE_CHECKING:
    from tests.support.api import Api

Connect = Callable[..., Awaitable[AsyncConnection[Any]]]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a superuser's database on the run's server. Don't write to that database."""
    with running_server(tmp_path_factory.mktemp("postgres") / "data") as url:
        yield url


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a migrated database. Nobody may be connected to it while it is cloned."""
    from outwake._migrate import migrate

    with new_database(server) as name:
        asyncio.run(migrate(with_database(server, name)))
        with psycopg.connect(with_database(server, name)) as conn:
            # The row that prunes is every migrated database's first; tests count from one.
            conn.execute("TRUNCATE outbox RESTART IDENTITY")
        yield name


@pytest.fixture
def database(server: str, template: str) -> Iterator[str]:
    """The URL of a migrated database that only this test uses."""
    with new_database(server, template) as name:
        yield with_database(server, name)


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The URL of a database without any table of ours."""
    with new_database(server) as name:
        yield with_database(server, name)


@pytest.fixture
async def connect(database: str) -> AsyncIterator[Connect]:
    """Open connections that end with the test: `await connect()`, in autocommit mode.

    To the test's database unless another URL is given; more arguments go to psycopg.
    """
    opened: list[AsyncConnection[Any]] = []

    async def connect(url: str | None = None, **options: Any) -> AsyncConnection[Any]:
        options = {"autocommit": True, **options}
        connection = await AsyncConnection.connect(url or database, **options)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        await connection.close()


@pytest.fixture
async def api(database: str) -> "AsyncIterator[Api]":
    """A running API on the test's database."""
    from tests.support.api import serving  # here: a unit test does not load the API

    async with serving(database) as running:
        yield running


@pytest.fixture
async def manual(connect: Connect) -> ManualWorker:
    """A worker that is present and moved by hand."""
    worker = ManualWorker(await connect())
    await worker.register()
    return worker

"""Builds the wheel, then tries producers and examples, each where there is nothing but what it needs."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg

from tests.adopt import checks
from tests.adopt.examples import PG, RUN, SENT, Shop, copy_of, has_node, mail_of
from tests.adopt.kinds import KINDS
from tests.support.database import new_database, set_search_path
from tests.support.pages import EXAMPLE
from tests.support.process import ROOT, Process, running
from tests.support.roles import roles_of
from tests.support.server import running_server, with_database
from tests.support.steps import Connection
from tests.support.worker import install
from tests.wheel.build import build
from tests.wheel.environment import Environment, clean_environment, fill_house

PROGRAMS = ROOT / "tests/adopt"
LIBPQ = "psycopg[binary]"
SQLALCHEMY = "sqlalchemy[asyncio]"

OF_APPLICATIONS = ["opentelemetry-sdk", "pydantic"]
"""For its spans and payloads."""

DRIVERS = {"psycopg": LIBPQ, "psycopg2": "psycopg2-binary", "asyncpg": "asyncpg"}

EXAMPLES = {
    "fastapi_shop": ["alembic", "fastapi", SQLALCHEMY, "uvicorn"],
    "django_shop": ["django", LIBPQ],
    "asyncpg_shop": ["asyncpg"],
    "node_shop": [],
}
"""What each needs. The first also prints migrations, so it has outwake[cli]."""


def producers() -> dict[str, tuple[str, list[str]]]:
    """By name: the kind of connection, and what its environment needs."""
    found = {}
    for kind, (_, driver) in KINDS.items():
        if driver:
            found[kind] = (kind, [SQLALCHEMY, DRIVERS[driver]])
        elif kind.startswith("Django"):
            for name in ("psycopg", "psycopg2"):
                found[f"{kind}, {name}"] = (kind, ["django", DRIVERS[name]])
        else:
            found[kind] = (kind, [DRIVERS[kind.split()[0].rstrip(",")]])
    return found


class Adopt:
    """What all share: the wheel, a server, and an environment that has the worker."""

    def __init__(self, directory: Path, server: str) -> None:
        self.producers = self.examples = self.failed = 0
        self._directory = directory
        self._server = server
        self._wheel = build(directory).wheel
        self._environments: dict[tuple[str, ...], Environment] = {}
        self._worker = self._environment(f"{self._wheel}[worker]", str(EXAMPLE))
        self._handlers = install(directory / "handlers")

    async def run(self) -> None:
        """All of them; prints each that fails, and the table."""
        rows = {}
        with self._database() as url:
            self._outwake(url, "migrate", "--only", "outbox")
            async with self._owner(url, checks.TABLES) as conn, self._working(url, checks.SERVED) as worker:
                for name, (kind, requirements) in producers().items():
                    rows[name] = await self._producer(kind, requirements, url, conn, worker)
                if has_node():
                    rows[checks.NODE] = await self._producer(None, [], url, conn, worker)
        print(checks.table(rows))
        self.producers = len(rows)
        self.failed += sum(any(cell.startswith("no:") for cell in row.values()) for row in rows.values())
        for name in EXAMPLES:
            if name != "node_shop" or has_node():
                await self._example(name)

    async def _producer(
        self, kind: str | None, requirements: list[str], url: str, conn: Connection, worker: Process
    ) -> dict[str, str]:
        """Its row of the table. None stands for node-postgres."""
        with roles_of(url) as roles:
            shop = roles.producer(checks.SERVED, checks.UNSERVED)
            await conn.execute(f"GRANT INSERT ON shop_order TO {shop.name}".encode())
            await conn.execute(f"GRANT USAGE ON SEQUENCE shop_order_id_seq TO {shop.name}".encode())
            if kind is None:
                program = ["node", str(PROGRAMS / "producer.mjs"), str(PG / "package.json")]
            else:
                environment = self._environment(str(self._wheel), *requirements, *OF_APPLICATIONS)
                program = [str(environment.python), "-P", str(PROGRAMS / "kinds.py"), kind]
            env = _without_libpq(requirements) | {"SHOP_DATABASE_URL": shop.url}
            async with checks.producing(*program, env=clean_environment(env)) as producer:
                return await checks.row_of(producer, conn, worker, traces=kind is not None)

    async def _example(self, name: str) -> None:
        print(name, flush=True)
        self.examples += 1
        migrates = name == "fastapi_shop"
        environment = self._environment(f"{self._wheel}{'[cli]' if migrates else ''}", *EXAMPLES[name])
        with self._database() as url:
            if not migrates:
                self._outwake(url, "migrate", "--only", "outbox")
            async with self._owner(url) as conn:
                env = clean_environment(_without_libpq(EXAMPLES[name]) if not migrates else {})
                shop = Shop(copy_of(name, self._directory), environment.python, url, env)
                try:
                    row_id = await RUN[name](shop)
                    await conn.execute(SENT)
                    async with self._working(url, "email.send") as worker:
                        await mail_of(row_id, worker, conn)
                except AssertionError as error:
                    self.failed += 1
                    print(f"FAILED {name}: {error}", flush=True)

    def _environment(self, *requirements: str) -> Environment:
        if requirements not in self._environments:
            made = Environment(self._directory / f"environment-{len(self._environments)}")
            made.install(*requirements)
            self._environments[requirements] = made
        return self._environments[requirements]

    def _outwake(self, url: str, *arguments: str) -> None:
        done = self._worker.command("outwake", *arguments, env={"DATABASE_URL": url})
        if done.returncode != 0:
            sys.exit(f"tests.adopt: outwake {' '.join(arguments)}\n{done.stderr}")

    @contextmanager
    def _database(self) -> Iterator[str]:
        """The URL of an empty database, with the search_path that every database has."""
        with new_database(self._server) as name:
            url = with_database(self._server, name)
            set_search_path(url, "$user", "public")
            yield url

    @asynccontextmanager
    async def _owner(self, url: str, *statements: str) -> AsyncIterator[Connection]:
        """A superuser's connection, after these statements."""
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            for statement in statements:
                await conn.execute(statement.encode())
            yield conn

    @asynccontextmanager
    async def _working(self, url: str, topic: str) -> AsyncIterator[Process]:
        """A worker that sleeps, from an environment of its own."""
        env = {
            "DATABASE_URL": url,
            "PYTHONPATH": str(self._handlers),
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_DRAIN_GRACE": "0",
        }
        program = str(self._worker.python.with_name("worker"))
        async with running(program, "--topics", topic, env=env) as worker:
            await worker.event("parked")
            yield worker


def _without_libpq(requirements: list[str]) -> dict[str, str]:
    """Variables by which psycopg, that outwake brings, finds a libpq only where one was asked for."""
    return {} if LIBPQ in requirements else {"PSYCOPG_IMPL": "binary"}


def main() -> None:
    """Run all. Exit status 1 if anything failed."""
    fill_house()
    with (
        tempfile.TemporaryDirectory(prefix="outwake-adopt-") as name,
        running_server(Path(name) / "data") as server,
    ):
        adopt = Adopt(Path(name), server)
        asyncio.run(adopt.run())
    print(f"adopt: {adopt.producers} producers {adopt.examples} examples {adopt.failed} failed")
    sys.exit(adopt.failed > 0)


if __name__ == "__main__":
    main()

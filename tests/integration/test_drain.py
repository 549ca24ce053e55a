"""Drain: a worker that is told to go loses nothing and repeats nothing. Real processes, real signals."""

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.conftest import Connect
from tests.support.health import ask, check
from tests.support.process import Process
from tests.support.steps import Connection, add, column, get, one, until
from tests.support.worker import command, install


@pytest.fixture
def handlers(tmp_path: Path) -> Path:
    return install(tmp_path / "handlers")


async def runs(process: Process, conn: Connection, topic: str, **columns: object) -> int:
    """Insert a row and return once the process runs it."""
    await process.event("parked")
    row = await add(conn, topic, **columns)
    await process.event("started", outbox_id=row)
    return row


async def test_sigterm_lets_work_finish(connect: Connect, database: str, handlers: Path) -> None:
    """1. W runs a row. 2. SIGTERM. 3. A row comes: nobody claims it. 4. The first ends: W leaves."""
    psql = await connect()
    await psql.execute("SELECT pg_advisory_lock(2, 7)")
    async with command(database, handlers, OUTWAKE_DRAIN_GRACE="60") as worker:
        row = await runs(worker, psql, "wait", payload={"lock": 7})
        worker.send(signal.SIGTERM)
        await worker.event("draining", running=1)
        await until(psql, "SELECT draining AND NOT parked FROM worker")
        late = await add(psql, "noop")
        await psql.execute("SELECT pg_advisory_unlock(2, 7)")
        assert await worker.ended() == 0
        assert (await get(psql, row), await get(psql, late)) == ("done", "ready")
        assert await one(psql, "SELECT lease_until IS NULL AND ended_at IS NOT NULL FROM worker")


async def test_what_does_not_finish_is_handed_back(connect: Connect, database: str, handlers: Path) -> None:
    """After the grace period, without a failure spent, and others are told of it."""
    psql = await connect()
    async with command(database, handlers, OUTWAKE_DRAIN_GRACE="0.2") as worker:
        row = await runs(worker, psql, "hang", max_attempts=1)
        worker.send(signal.SIGTERM)
        await worker.event("ended", outbox_id=row, state="handed back")
        assert await worker.ended() == 0
    assert (await get(psql, row), await get(psql, row, "failures")) == ("ready", 0)


async def test_second_sigterm_hands_back_at_once(connect: Connect, database: str, handlers: Path) -> None:
    psql = await connect()
    async with command(database, handlers, OUTWAKE_DRAIN_GRACE="3600") as worker:
        row = await runs(worker, psql, "hang")
        worker.send(signal.SIGTERM)
        await worker.event("draining")
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
    assert (await get(psql, row), await get(psql, row, "failures")) == ("ready", 0)


async def test_sigterm_before_the_worker_is_up(connect: Connect, database: str, handlers: Path) -> None:
    """A worker that cannot connect yet leaves at once, too."""
    url = "postgresql://postgres@127.0.0.1:1/none"
    async with command(url, handlers) as worker:
        await worker.event("disconnected")
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_rolling_restart_loses_and_repeats_nothing(
    connect: Connect, database: str, handlers: Path
) -> None:
    """Rows of ten keys and of none keep coming while each of two workers is replaced: every row has its
    effect once, no failure is counted, and each key's effects are in order.
    """
    psql = await connect()
    await psql.execute(
        "CREATE TABLE effect (row_id bigint, attempt integer, place bigint GENERATED ALWAYS AS IDENTITY)"
    )

    async def produce() -> None:
        await psql.execute(
            "INSERT INTO outbox (topic, ordering_key)"
            " SELECT 'effect', CASE WHEN n % 2 = 0 THEN 'k' || n % 20 END FROM generate_series(1, 60) n"
        )

    async with AsyncExitStack() as stack:
        old = [
            await stack.enter_async_context(command(database, handlers, "--concurrency", "4")) for _ in "ab"
        ]
        for worker in old:
            await worker.event("parked")
        for worker in old:
            await produce()
            await worker.event("claimed")
            new = await stack.enter_async_context(command(database, handlers, "--concurrency", "4"))
            worker.send(signal.SIGTERM)
            await new.event("registered")
            await produce()
            assert await worker.ended() == 0
        await until(psql, "SELECT count(*) = 240 FROM outbox WHERE topic = 'effect' AND state = 'done'")
    done = await column(psql, "SELECT row_id FROM effect ORDER BY row_id")
    assert done == await column(psql, "SELECT id FROM outbox WHERE topic = 'effect' ORDER BY id")
    assert await one(psql, "SELECT sum(failures) FROM outbox") == 0
    in_order = (
        "SELECT bool_and(row_id > earlier) FROM (SELECT row_id, lag(row_id) OVER"
        " (PARTITION BY ordering_key ORDER BY place) AS earlier"
        " FROM effect JOIN outbox ON id = row_id WHERE ordering_key IS NOT NULL) AS e"
    )
    assert await one(psql, in_order) is True


async def test_health(connect: Connect, database: str, handlers: Path, server: str) -> None:
    """Answers from memory: alive, ready while connected, and `worker --check` says so by its status."""
    psql, admin = await connect(), await connect(server)
    name = database.rpartition("/")[2]
    async with command(database, handlers, OUTWAKE_HEALTH_PORT="0") as worker:
        port = (await worker.event("health_ready"))["port"]
        parked = await worker.event("parked")
        assert ask(port, "/healthz") == (200, {"alive": True})
        status, body = ask(port, "/readyz")
        assert status == 200
        assert body == {
            "ready": True, "worker_id": str(await one(psql, "SELECT id FROM worker")), "stage": "parked",
            "running": 0, "draining": False, "schema": "current",
        }  # fmt: skip
        assert ask(port, "/nothing")[0] == 404
        assert ask(port, "/healthz", "POST")[0] == 405
        assert ask(port, "/readyz", "HEAD") == (200, {})
        assert await check(port) == (0, [])
        await psql.close()
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        try:
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
            )
            await worker.event("disconnected", after=parked)
            assert ask(port, "/readyz")[0] == 503
            assert ask(port, "/healthz")[0] == 200
            status, said = await check(port)
            assert (status, len(said)) == (1, 1)
        finally:
            await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        again = await worker.event("reconnected")
        await worker.event("parked", after=again)
        assert ask(port, "/readyz")[0] == 200
    status, said = await check(port)
    assert (status, len(said)) == (1, 1)


async def test_check_without_a_port() -> None:
    status, said = await check(None)
    assert (status, len(said)) == (2, 1)


async def test_a_row_that_cannot_be_read_does_not_keep_a_worker_from_leaving(
    connect: Connect, database: str, handlers: Path
) -> None:
    """1. A claim takes a row of the year 44 BC. 2. W reconnects, and gives it back. 3. SIGTERM: W leaves."""
    psql = await connect()
    await psql.execute("ALTER DOMAIN finite_time DROP CONSTRAINT outbox_available_is_finite")
    async with command(database, handlers, OUTWAKE_DRAIN_GRACE="60") as worker:
        await worker.event("parked")
        await psql.execute("INSERT INTO outbox (topic, available_at) VALUES ('noop', '0044-03-15 BC')")
        await worker.event("claim_lost")
        worker.send(signal.SIGTERM)
        await worker.event("draining")
        assert await worker.ended() == 0


async def test_a_worker_without_a_database_and_without_work_leaves_at_once(handlers: Path) -> None:
    """It does not wait for the grace, which is longer than this test may take."""
    async with command("postgresql://127.0.0.1:1/x", handlers, OUTWAKE_DRAIN_GRACE="600") as worker:
        await worker.event("disconnected")
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0

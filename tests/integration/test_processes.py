"""`worker --processes N`: a child that dies is rescued at once and replaced; no child outlives its parent."""

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.conftest import Connect
from tests.support.health import ask, check
from tests.support.process import Event, Process
from tests.support.steps import Connection, add, get, one, until
from tests.support.worker import command, install

ALIVE = "SELECT count(*) = {} FROM worker_present"


@pytest.fixture
def handlers(tmp_path: Path) -> Path:
    return install(tmp_path / "handlers")


async def both_parked(parent: Process, conn: Connection) -> None:
    await until(conn, "SELECT count(*) = 2 FROM worker_present WHERE parked")


async def started(parent: Process, conn: Connection, row: int) -> int:
    """The process id of the child that runs the row."""
    await parent.event("started", outbox_id=row)
    return int(await one(conn, "SELECT pid FROM worker JOIN outbox o ON o.worker_id = worker.id"
                               " WHERE o.id = %s", row))  # fmt: skip


async def test_killed_child_is_rescued_long_before_its_lease_and_replaced(
    connect: Connect, database: str, handlers: Path
) -> None:
    """1. A child runs a row under a lease of 10 minutes. 2. It gets SIGKILL. 3. Its parent ends its life:
    the other child runs the row. 4. A third child comes up.
    """
    psql = await connect()
    async with command(database, handlers, "--processes", "2", lease=600) as parent:
        await both_parked(parent, psql)
        row = await add(psql, "hang")
        pid = await started(parent, psql, row)
        os.kill(pid, signal.SIGKILL)
        died = await parent.event("child_died", pid=pid, status=-signal.SIGKILL)
        await parent.event("started", after=died, outbox_id=row, attempt=2)
        await until(psql, "SELECT count(*) = 3 FROM worker")
        await until(psql, ALIVE.format(2))
        (error,) = await get(psql, row, "errors")
        assert "SIGKILL" in error["error"]
        assert await get(psql, row, "failures") == 1


async def test_row_that_kills_every_child_ends_dead(connect: Connect, database: str, handlers: Path) -> None:
    """Each death is a failure, each replacement waits longer, and the row does not kill for ever."""
    psql = await connect()
    async with command(database, handlers, "--processes", "2", lease=600) as parent:
        await both_parked(parent, psql)
        row = await add(psql, "poison", max_attempts=3)
        died: Event | None = None
        for _ in range(3):
            died = await parent.event("child_died", after=died)
            await psql.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (row,))
        await until(psql, "SELECT state = 'dead' FROM outbox WHERE id = %s", row)
        assert [e["attempt"] for e in await get(psql, row, "errors")] == [1, 2, 3]
        await until(psql, ALIVE.format(2))


async def test_children_drain_when_their_parent_is_killed(
    connect: Connect, database: str, handlers: Path
) -> None:
    """1. A child runs a row. 2. The parent gets SIGKILL. 3. Both children hand back and leave, in order."""
    psql = await connect()
    async with command(database, handlers, "--processes", "2", lease=600) as parent:
        await both_parked(parent, psql)
        row = await add(psql, "hang")
        await started(parent, psql, row)
        parent.kill()
        first = await parent.event("stopped")
        await parent.event("stopped", after=first)
        assert await parent.ended() == -signal.SIGKILL
    assert (await get(psql, row), await get(psql, row, "failures")) == ("ready", 0)
    assert await one(psql, "SELECT bool_and(ended_at IS NOT NULL) FROM worker")


async def test_signals_are_passed_on(connect: Connect, database: str, handlers: Path) -> None:
    """SIGTERM to the parent drains each child; the parent ends when the last has, status 0."""
    psql = await connect()
    await psql.execute("SELECT pg_advisory_lock(2, 8)")
    async with command(database, handlers, "--processes", "2", OUTWAKE_DRAIN_GRACE="60") as parent:
        await both_parked(parent, psql)
        row = await add(psql, "wait", payload={"lock": 8})
        await started(parent, psql, row)
        parent.send(signal.SIGTERM)
        stopped = await parent.event("stopped")
        assert parent.running
        await psql.execute("SELECT pg_advisory_unlock(2, 8)")
        await parent.event("stopped", after=stopped)
        assert await parent.ended() == 0
    assert await get(psql, row) == "done"


async def test_health_of_the_parent(connect: Connect, database: str, handlers: Path) -> None:
    """Ready when every child is."""
    psql = await connect()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with command(
        database, handlers, "--processes", "2", OUTWAKE_HEALTH_PORT=str(port), OUTWAKE_AGENT_COMMAND="true"
    ) as parent:
        await both_parked(parent, psql)
        pid = await one(psql, "SELECT min(pid) FROM worker")
        assert ask(port, "/readyz") == (200, {"ready": True, "processes": 2})
        assert await check(port) == (0, [])
        os.kill(pid, signal.SIGKILL)
        await parent.event("child_died", pid=pid)

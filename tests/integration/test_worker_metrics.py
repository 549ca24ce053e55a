"""A real worker's /metrics and /readyz, scraped over HTTP."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Connect
from tests.support.scraped import Samples, scrape
from tests.support.steps import Connection, add, claim, new_worker, one, run_out, until
from tests.support.waits import TIMEOUT, awaiting
from tests.support.worker import command, install

HANDLERS = """
import asyncio
from outwake import Handler, HandBack, Job, Permanent, Retry

async def noop(job):
    pass

async def bad(job):
    raise Permanent("no good")

async def again(job):
    if job.row.failures < 2:
        raise Retry("not yet", __import__("datetime").timedelta(0))

async def hang(job):
    await asyncio.get_running_loop().create_future()

async def settles(job):
    async with job.transaction() as conn:
        await job.complete(conn)

async def slow(job):
    async with job.connection() as conn:
        await conn.execute("SELECT pg_advisory_lock_shared(3, 3)")
        await conn.execute("SELECT pg_advisory_unlock_shared(3, 3)")

noop, bad, again, hang, settles, slow = [
    Handler(run.__name__, run) for run in (noop, bad, again, hang, settles, slow)]
"""
TOPICS = "noop,bad,again,hang,settles,slow"


@pytest.fixture
def handlers(tmp_path: Path) -> Path:
    return install(tmp_path / "handlers", HANDLERS, "metrics_handlers")


def total(found: Samples, name: str) -> float:
    return sum(value for key, value in found.items() if key[0] == name)


async def finished(conn: Connection) -> None:
    await until(conn, "SELECT NOT EXISTS (SELECT FROM outbox WHERE state IN ('ready', 'running'))")


async def test_attempts_by_outcome(database: str, handlers: Path, connect: Connect) -> None:
    conn = await connect()
    await conn.execute("DELETE FROM outbox")
    name = "outwake_worker_attempts_total"
    async with command(database, handlers, "--topics", TOPICS, OUTWAKE_HEALTH_PORT="0") as worker:
        await worker.event("parked")
        for topic in ["noop"] * 3 + ["bad", "again", "settles"]:
            await add(conn, topic)
        await finished(conn)
        # It counts once the commit is heard of, and then falls asleep.
        found: Samples = {}
        async with awaiting("eight attempts to be counted, and the worker to park", seen=lambda: found):
            while total(found := await scrape(worker), name) < 8 or not found[("outwake_workers", "parked")]:
                pass
    assert {key[1:]: value for key, value in found.items() if key[0] == name and value} == {
        ("noop", "done"): 3,
        ("bad", "dead"): 1,
        ("again", "retry"): 2,
        ("again", "done"): 1,
        ("settles", "done"): 1,
    }
    for times in ("wait", "run"):
        assert found[(f"outwake_worker_{times}_seconds_count", "noop")] == 3
        assert found[(f"outwake_worker_{times}_seconds_count", "again")] == 3
    assert found[("outwake_worker_wakeups_total", "reconnect")] == 1
    assert found[("outwake_worker_wakeups_total", "notify")] >= 1
    assert found[("outwake_worker_connects_total",)] == 1
    assert found[("outwake_worker_listen_connected",)] == 1
    assert found[("outwake_worker_slots",)] == 10
    assert found[("outwake_workers", "parked")] == 1
    assert found[("outwake_database_up",)] == 1
    assert found[("outwake_outbox_rows", "bad", "dead", "")] == 1
    assert 0 <= found[("outwake_notification_queue_ratio",)] < 1


async def test_what_runs_what_waits_and_a_connection_lost(
    database: str, handlers: Path, connect: Connect
) -> None:
    conn = await connect()
    async with command(
        database, handlers, "--topics", TOPICS, "--concurrency", "1", OUTWAKE_HEALTH_PORT="0"
    ) as worker:
        await worker.event("parked")
        first = await add(conn, "hang")
        await worker.event("claimed", rows=[first])
        second = await add(conn, "hang")
        await add(conn, "nobody")
        found = await scrape(worker)
        assert found[("outwake_worker_running",)] == 1
        assert found[("outwake_outbox_rows", "hang", "running", "")] == 1
        assert found[("outwake_outbox_rows", "hang", "ready", "due")] == 1
        assert found[("outwake_outbox_rows", "nobody", "ready", "due")] == 1
        assert found[("outwake_workers", "busy")] == 1
        listener = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        await one(conn, listener, "outwake worker listen")
        await worker.event("reconnected")
        found = await scrape(worker)
        assert found[("outwake_worker_connects_total",)] == 2
        await conn.execute("UPDATE outbox SET cancel_requested_at = now() WHERE id = %s", (first,))
        await worker.event("ended", outbox_id=first, state="cancelled")
        found = await scrape(worker)
        assert found[("outwake_worker_attempts_total", "hang", "cancelled")] == 1
        await worker.event("claimed", rows=[second])
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_a_rescue_and_a_fenced_completion(database: str, handlers: Path, connect: Connect) -> None:
    conn = await connect()
    lost = await new_worker(conn, "noop")
    [row_id] = [await add(conn, "noop")]
    await claim(conn, lost, topics=("noop",))
    await run_out(conn, lost)
    async with command(database, handlers, "--topics", TOPICS, lease=0.5, OUTWAKE_HEALTH_PORT="0") as worker:
        await worker.event("rescued")
        await worker.event("completed", rows=[row_id])
        found = await scrape(worker)
        assert found[("outwake_worker_rescued_total",)] == 1
        waiting = await connect()
        await waiting.execute("SELECT pg_advisory_lock(3, 3)")
        slow = await add(conn, "slow")
        await worker.event("claimed", rows=[slow])
        # As if it had been rescued, and claimed again, between two renewals.
        await conn.execute("BEGIN")
        await conn.execute("UPDATE outbox SET attempt = attempt + 1 WHERE id = %s", (slow,))
        await waiting.execute("SELECT pg_advisory_unlock(3, 3)")
        await until(conn, "SELECT true FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        await conn.execute("COMMIT")
        await worker.event("fenced", outbox_id=slow)
        found = await scrape(worker)
        assert found[("outwake_worker_attempts_total", "slow", "fenced")] == 1
        assert found[("outwake_worker_attempts_total", "slow", "done")] == 0


async def test_processes_behind_one_port(database: str, handlers: Path, connect: Connect) -> None:
    """The parent shows the sum, and a child that was killed still counts."""
    conn = await connect()
    await conn.execute("DELETE FROM outbox")
    async with command(
        database, handlers, "--topics", TOPICS, "--processes", "2", OUTWAKE_HEALTH_PORT="0"
    ) as parent:
        await parent.event("parked")
        await conn.execute("INSERT INTO outbox (topic) SELECT 'noop' FROM generate_series(1, 40)")
        await finished(conn)
        while (found := await scrape(parent)).get(("outwake_worker_processes",)) != 2:
            await parent.event("registered")
        done = ("outwake_worker_attempts_total", "noop", "done")
        assert found[done] == 40
        assert found[("outwake_worker_slots",)] == 20
        victim = await one(conn, "SELECT pid FROM worker WHERE ended_at IS NULL ORDER BY started_at LIMIT 1")
        os.kill(victim, signal.SIGKILL)
        died = await parent.event("child_died")
        await parent.event("registered", after=died)
        found = await scrape(parent)
        assert found[done] == 40


async def test_ready_with_the_others(database: str, handlers: Path, connect: Connect) -> None:
    conn = await connect()
    settings: dict[str, Any] = {"OUTWAKE_HEALTH_PORT": "0", "OUTWAKE_STUCK_AFTER": "0.001"}
    async with command(database, handlers, "--topics", TOPICS, **settings) as worker:
        await worker.event("parked")
        port = (await worker.event("health_ready"))["port"]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
            ready = await client.get("/readyz?workers=1")
            assert (ready.status_code, ready.json()["workers"]) == (200, 1)
            row_id = await add(conn, "nobody")
            await until(conn, "SELECT stuck FROM outbox_ready('1 millisecond')")
            stuck = await client.get("/readyz?workers=1")
            assert stuck.status_code == 503
            assert f"row {row_id} of topic nobody" in stuck.json()["reason"]
            assert (await client.get("/readyz")).status_code == 200  # it is well itself
            assert (await client.get("/healthz")).json() == {"alive": True}
            assert (await client.get("/nothing")).status_code == 404
            assert (await client.post("/metrics")).status_code == 405


async def test_scrape_without_database(server: str, database: str, handlers: Path, connect: Connect) -> None:
    """What the process knows is shown all the same."""
    settings: dict[str, Any] = {"OUTWAKE_HEALTH_PORT": "0"}
    async with command(database, handlers, "--topics", TOPICS, **settings) as worker:
        await worker.event("parked")
        conn = await connect(server)
        name = database.rpartition("/")[2]
        await conn.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
        try:
            found = await scrape(worker)
        finally:
            await conn.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
    assert found[("outwake_database_up",)] == 0
    assert found[("outwake_worker_listen_connected",)] == 1
    assert not [key for key in found if key[0] == "outwake_outbox_rows"]

"""An idle worker sends no query at all, and starts a row at once all the same.

`OUTWAKE_TEST_IDLE` sets for how many seconds a real process is watched: 3 by default, 60 for the record.
"""

import asyncio
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from outwake.worker.engine import idle
from tests.conftest import Connect
from tests.support.steps import Connection, Rule, add, get, one, until, with_and_without
from tests.support.worker import command, install, watched

IDLE = float(os.environ.get("OUTWAKE_TEST_IDLE", "3"))

IDLE_SESSIONS = """
SELECT count(*) = 2 FROM pg_stat_activity
WHERE datname = %s AND state = 'idle' AND application_name LIKE 'outwake%%'
"""

SESSIONS = """
SELECT pid, application_name, query_start, state_change, state
FROM pg_stat_activity
WHERE datname = %s AND application_name LIKE 'outwake%%'
ORDER BY pid
"""


async def test_idle_worker_sends_nothing(
    connect: Connect, database: str, server: str, tmp_path: Path
) -> None:
    """For IDLE seconds, with a lease that would have been renewed several times: not one statement, on the
    same two connections; then an INSERT at psql is started.
    """
    observer = await connect(server)  # from another database: it is not among the sessions it looks at
    name = database.rpartition("/")[2]

    async def sessions() -> list[Any]:
        return await (await observer.execute(SESSIONS, (name,))).fetchall()

    async with command(database, install(tmp_path / "handlers"), lease=1.0) as worker:
        await worker.event("parked")
        await until(observer, IDLE_SESSIONS, name)
        before = await sessions()
        await asyncio.sleep(IDLE)
        assert await sessions() == before
        assert sorted(row[1] for row in before) == ["outwake worker", "outwake worker listen"]
        row = await psql_insert(database, connect)
        await worker.event("completed", rows=[row])


async def psql_insert(url: str, connect: Connect) -> int:
    """By the real psql where there is one."""
    statement = "INSERT INTO outbox (topic) VALUES ('noop') RETURNING id"
    if (psql := shutil.which("psql")) is None:
        return await add(await connect(), "noop")
    arguments = [psql, url, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--command", statement]
    done = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, check=True)
    return int(done.stdout)


async def test_two_workers_fall_silent_again_after_one_job(connect: Connect, database: str) -> None:
    """1. Two workers sleep. 2. One row: one runs it, both wake for it, and the other learns of a lease. 3.
    Once that is past, neither has a timer.
    """
    psql = await connect()
    async with watched(database, lease=0.4) as a, watched(database, lease=0.4) as b:
        row = await add(psql)
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        assert a.ran + b.ran == [row]
        for worker in (a, b):
            await worker.asleep_for(math.inf)
        for worker in (a, b):
            assert await worker.sleeps_for_ever(psql)


CLEARS_THE_LEASE = """
CREATE FUNCTION clear() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    UPDATE worker SET lease_until = NULL WHERE id = OLD.worker_id; RETURN NULL;
END $$;
CREATE TRIGGER clear AFTER UPDATE ON outbox FOR EACH ROW WHEN (NEW.state = 'done') EXECUTE FUNCTION clear();
"""


@with_and_without
async def test_a_trickle_of_jobs_announces_one_lease(rule: Rule, connect: Connect, database: str) -> None:
    """1. Two workers sleep. 2. Rows come one by one, each when the one before is done and all sleep again.
    Taken out: a worker that goes idle clears its lease, so each row brings a new one that all must hear of.
    """
    psql, listener = await connect(), await connect()
    if rule == "taken out":
        await psql.execute(CLEARS_THE_LEASE)
    async with watched(database) as worker:
        # One of another topic, to which leases are announced.
        await psql.execute(PARKED.replace("{t,u}", "{u}"))
        await listener.execute("LISTEN outwake_wake")
        for _ in range(4):
            row = await add(psql, payload={})
            await until(psql, "SELECT state <> 'ready' AND state <> 'running' FROM outbox WHERE id = %s", row)
            await worker.asleep()
        assert len(worker.ran) == 4
        announced = [payload for payload in await heard(psql, listener) if payload.startswith("*@")]
        assert len(announced) == (1 if rule == "kept" else 4)


@with_and_without
async def test_an_awake_worker_that_finds_nothing_rests_before_it_parks(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Rows fill all slots of a worker. 2. They are done, and nothing is left. 3. More rows come, at once:
    it claims them, and nobody was notified. Taken out: it parks at once, so each of them notifies.
    """
    monkeypatch.setattr(idle, "_AWAKE", 600.0 if rule == "kept" else -600.0)
    psql, listener = await connect(), await connect()
    async with watched(database) as worker:
        await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 9)")
        await until(psql, DONE)
        if rule == "taken out":
            await worker.asleep()
        await listener.execute("LISTEN outwake_wake")
        for _ in range(5):
            await worker.has_run(await add(psql))
            await until(psql, DONE)
            if rule == "taken out":
                await worker.asleep()
        assert bool(await heard(psql, listener)) == (rule == "taken out")


DONE = "SELECT bool_and(state = 'done') FROM outbox WHERE topic = 't'"


async def test_rows_of_other_topics_wake_nobody(connect: Connect, database: str) -> None:
    """No notification is sent for a topic that no parked worker serves, nor is one of it scanned for."""
    psql = await connect()
    async with watched(database) as worker:
        scans = worker.scans
        row = await add(psql, "other")
        assert await worker.sleeps_for_ever(psql)
        assert (worker.scans, await get(psql, row)) == (scans, "ready")
        assert not [text for text in worker.seen.payloads if text.startswith("other")]


@pytest.mark.parametrize("rows", [0, 3])
async def test_nobody_is_notified_when_nobody_sleeps(rows: int, connect: Connect) -> None:
    """The economy: an insert notifies only if some worker is parked, and one of no rows never."""
    conn, listener = await connect(), await connect()
    await listener.execute("LISTEN outwake_wake")
    insert = "INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, %s)"
    await conn.execute(insert, (rows,))
    assert await heard(conn, listener) == []
    await conn.execute(PARKED)
    await conn.execute(insert, (rows,))
    assert await heard(conn, listener) == (["t@0"] if rows else [])


PARKED = """
INSERT INTO worker (host, pid, version, topics, concurrency, parked) VALUES ('h', 1, '0', '{t,u}', 1, true);
SELECT outbox_writers();
"""
MAY_SLEEP = "SELECT pg_sequence_last_value('outbox_sleepers') IS NOT NULL"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_old_snapshot_takes_nobody_for_awake(level: str, connect: Connect) -> None:
    conn, other = await connect(), await connect()
    await conn.execute("SELECT outbox_writers()")
    await other.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
    await other.execute("SELECT count(*) FROM worker")
    await conn.execute(PARKED)
    await other.execute("SELECT outbox_all_awake()")
    assert await one(conn, MAY_SLEEP)


async def test_nobody_looks_for_sleepers_once_one_saw_that_all_are_awake(connect: Connect) -> None:
    """And that one keeps nobody from parking until its transaction ends."""
    conn, other = await connect(), await connect()
    await conn.execute(PARKED)
    await add(conn)
    assert await one(conn, MAY_SLEEP)
    await conn.execute("UPDATE worker SET parked = false")
    async with other.transaction():
        await add(other)
        assert not await one(conn, MAY_SLEEP)
        await conn.execute("SELECT outbox_writers()")
        assert await one(conn, MAY_SLEEP)


@pytest.mark.parametrize(
    ("rows", "payloads"),
    [
        ("('t', NULL, 'ready', 'now')", ["t@0#1"]),
        ("('t', NULL, 'ready', 'now'), ('u', NULL, 'ready', 'now')", ["t@0#1", "u@0#2"]),
        ("('t', NULL, 'done', 'now'), ('t', NULL, 'ready', 'now')", ["t@0#2"]),
        ("('t', NULL, 'ready', 'now'), ('t', NULL, 'ready', 'now')", ["t@0"]),
        ("('t', 'k', 'ready', 'now')", ["t@0"]),
        ("('t', NULL, 'ready', '2100-01-01 00:00:00.001Z')", ["t@4102444800001"]),
        ("('t', NULL, 'ready', '2100-01-01Z'), ('t', NULL, 'ready', 'now')", ["t@0"]),
        ("('t', NULL, 'done', 'now')", []),
    ],
)
async def test_notification_names_the_single_row(rows: str, payloads: list[str], connect: Connect) -> None:
    """Its id only if a sleeper may take it by itself: alone of its topic, due, and of no key."""
    conn, listener = await connect(), await connect()
    await listener.execute("LISTEN outwake_wake")
    await conn.execute(PARKED)
    values = f"SELECT topic, key, state, due::timestamptz FROM (VALUES {rows}) AS r(topic, key, state, due)"
    await conn.execute(f"INSERT INTO outbox (topic, ordering_key, state, available_at) {values}".encode())
    assert sorted(await heard(conn, listener)) == payloads


async def test_a_transaction_names_one_row(connect: Connect) -> None:
    """Of the others it says the same, and NOTIFY says that once: a loop of inserts fills no queue."""
    conn, listener = await connect(), await connect()
    await listener.execute("LISTEN outwake_wake")
    await conn.execute(PARKED)
    async with conn.transaction():
        rows = [await add(conn) for _ in range(4)]
    assert sorted(await heard(conn, listener)) == ["t@0", f"t@0#{rows[0]}"]
    row = await add(conn)
    assert await heard(conn, listener) == [f"t@0#{row}"]


async def heard(conn: Connection, listener: Connection) -> list[str]:
    await conn.execute("SELECT pg_notify('outwake_wake', 'end')")
    found: list[str] = []
    async for notification in listener.notifies():
        if notification.payload == "end":
            break
        found.append(notification.payload)
    return found

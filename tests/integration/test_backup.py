"""One of several sleepers takes a single row, and the others are its backups: worker/engine/backup.py.

A and B sleep. Who is drawn is decided by the test (`names`).
"""

import math
from uuid import UUID

import pytest

import outwake
from outwake.worker.engine import backup, due
from outwake.worker.engine.backup import Backup
from tests.conftest import Connect
from tests.support.plans import explain
from tests.support.sleepers import is_missed, runs
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim_ids,
    column,
    new_worker,
    one,
    take_out,
    until,
    with_and_without,
)
from tests.support.waits import awaiting
from tests.support.worker import ObservedWorker, hang, watched

PARKED = "SELECT parked FROM worker WHERE id = %s"


@pytest.fixture
async def psql(connect: Connect) -> Connection:
    return await connect()


async def absent(conn: Connection, presence: int | None = 7) -> UUID:
    """A worker that is parked and never hears anything."""
    worker = await outwake.register(conn, ["t"], presence=presence)
    await conn.execute("UPDATE worker SET parked = true WHERE id = %s", (worker,))
    await conn.execute("SELECT nextval('outbox_sleepers')")
    return worker


async def names(conn: Connection, worker: ObservedWorker | int) -> None:
    """From now on this one is drawn, by its presence."""
    presence = worker if isinstance(worker, int) else worker.presence
    await take_out(conn, "outbox_notify", "asleep[1 + floor(random() * sleepers)::integer]", str(presence))


@with_and_without
async def test_only_the_one_that_is_named_asks(
    rule: Rule, psql: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A and B sleep. 2. A row is inserted, and A named. 3. B hears of it, and asks nothing."""
    monkeypatch.setattr(backup, "PATIENCE", 600.0)
    if rule == "taken out":
        await take_out(psql, "outbox_notify", "coalesce(named, '')", "''")
    async with (
        watched(database, concurrency=5) as a,
        watched(database, concurrency=5) as b,
    ):
        await names(psql, a)
        row = await add(psql)
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        for worker in (a, b):
            await worker.hears_nothing_more(psql)
        assert (a.seen.asks, b.seen.asks) == ([row], [] if rule == "kept" else [row])


@with_and_without
async def test_another_runs_the_row_of_one_that_died(
    rule: Rule, psql: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2. 1. A died in its sleep, its flag is set. 2. A row is inserted, and A named. 3. B runs it."""
    if rule == "taken out":
        monkeypatch.setattr(Backup, "heard", lambda *heard: False)
    await absent(psql)
    await names(psql, 7)
    async with watched(database) as b:
        await psql.execute("UPDATE worker SET parked = true")  # also A's, which B cleared
        row = await add(psql)
        await (runs(b, row) if rule == "kept" else is_missed(b, psql, row))


async def test_none_that_died_is_named_again(psql: Connection, database: str) -> None:
    """Step 3. 1. Ten died in their sleep, their flags are set; one is named. 2. B runs the row. 3. Only B's
    flag is set, so it is named for the next row.
    """
    dead = [await absent(psql, presence) for presence in range(7, 17)]
    await names(psql, 7)
    async with watched(database) as b:
        await psql.execute("UPDATE worker SET parked = true")
        await b.has_run(await add(psql))
        assert not await one(psql, "SELECT bool_or(parked) FROM worker WHERE id = ANY (%s)", dead)
        await b.asleep()
        assert await column(psql, "SELECT id FROM worker WHERE parked") == [b.id]
        await b.has_run(await add(psql))


async def test_one_without_a_slot_leaves_its_row_to_another(
    connect: Connect, psql: Connection, database: str
) -> None:
    """1. P inserts a row; A is parked, and named. 2. A fills its slots with another. 3. P commits. 4. B runs
    it.
    """
    producer = await connect()
    async with (
        watched(database, concurrency=1, run=hang, drain_grace=600.0) as a,
        watched(database, concurrency=2) as b,
    ):
        await names(psql, a)
        await producer.execute("BEGIN")
        row = await add(producer)
        await a.has_run(await add(psql))
        await until(psql, "SELECT NOT parked FROM worker WHERE id = %s", a.id)
        await producer.execute("COMMIT")
        await b.has_run(row)


async def test_without_a_presence_nobody_is_named(connect: Connect, psql: Connection) -> None:
    """Who registered by hand may have none: all scan, as when one sleeps."""
    listener = await connect()
    await listener.execute("LISTEN outwake_wake")
    for presence in (None, 8):
        await absent(psql, presence)
    await take_out(psql, "outbox_notify", "random()", "0")  # the first
    row = await add(psql)
    payloads = [note.payload async for note in listener.notifies(stop_after=1, timeout=60)]
    assert payloads == [f"t@0#{row}"]


async def test_of_a_topic_with_a_limit_nobody_is_named(connect: Connect) -> None:
    """Without room the one that is named leaves the row, and is there all the same."""
    psql, listener = await connect(), await connect()
    await listener.execute("LISTEN outwake_wake")
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 0)")
    for presence in (7, 8):
        await absent(psql, presence)
    row = await add(psql)
    payloads = [note.payload async for note in listener.notifies(stop_after=1, timeout=60)]
    assert payloads == [f"t@0#{row}"]


@pytest.mark.parametrize(
    "payload", ["t@0#1,2,3,4", "t@0#1,2", "t@0#x", f"t@0#1,2,{'9' * 400}", "t@0#1,2,-3", "end", "t,u@0", ""]
)
async def test_what_is_not_understood_means_scan(payload: str, connect: Connect, database: str) -> None:
    """A newer schema may say more, and anybody may NOTIFY anything: the worker scans, and goes on."""
    psql = await connect()
    async with watched(database) as worker:
        await psql.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_inserted")
        row = await add(psql)
        assert await worker.sleeps_for_ever(psql)
        await psql.execute("SELECT pg_notify('outwake_wake', %s)", (payload,))
        await worker.has_run(row)
        await psql.execute("ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_inserted")
        await worker.asleep()
        await worker.has_run(await add(psql))


async def test_each_that_is_parked_may_be_drawn(connect: Connect) -> None:
    psql, listener = await connect(), await connect()
    await listener.execute("LISTEN outwake_wake")
    for presence in (7, 8):
        await absent(psql, presence)
    named: set[str] = set()
    async with awaiting("both to be named", seen=lambda: named):
        while named != {"7", "8"}:
            row = await add(psql)
            async for note in listener.notifies(stop_after=1):
                payload, name, sleepers = note.payload.split(",")
                assert (payload, sleepers) == (f"t@0#{row}", "2")
                named.add(name)


async def test_a_row_that_was_claimed_is_not_waited_for(psql: Connection, database: str) -> None:
    """Whatever made it ready again has notified. B asks, finds nothing, and sleeps on without a scan."""
    async with watched(database) as b:
        await psql.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_inserted")
        row = await add(psql, attempt=1)
        scans = b.scans
        await psql.execute("SELECT pg_notify('outwake_wake', %s)", (f"t@0#{row},7,2",))
        await b.hears_nothing_more(psql)
        assert await b.asleep() < 1
        await b.asleep_for(math.inf)
        assert (b.ran, b.scans) == ([], scans)


async def test_rows_are_asked_for_by_their_keys(connect: Connect) -> None:
    psql = await connect()
    await psql.execute("VACUUM ANALYZE outbox")
    await psql.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 5000)")
    plans = await explain(psql, due._STILL_WAIT, [76, 77])
    assert "outbox_pkey" in plans.indexes()
    assert not plans.read_in_full()
    assert plans.buffers() < 100


async def test_what_the_last_release_calls_still_works(psql: Connection) -> None:
    """sql/outbox/functions/compat.sql: its workers may run beside these."""
    a, worker = await absent(psql), await new_worker(psql)
    row, again, gone = [await add(psql) for _ in range(3)]
    assert set(await claim_ids(psql, worker, 3)) == {row, again, gone}
    await psql.execute("SELECT outbox_hand_back(%s, %s, '{1}')", (worker, [again]))
    waits = await add(psql)
    stand_in = "SELECT outbox_stand_in(%s, %s)"
    taken = await psql.execute(stand_in, ([row, again, gone], [7, 7, 7]))
    assert await taken.fetchall() == []
    assert await one(psql, PARKED, a)
    assert await one(psql, stand_in, [row, waits], [7, 7]) == waits
    assert not await one(psql, PARKED, a)
    await psql.execute("SELECT outbox_pass_on(%s)", ([waits],))


def test_asks_about_what_has_had_its_time() -> None:
    """Once for all that it heard of by then; what came last waits for the next time."""
    stands, spread = Backup(), 50 * backup.SPREAD
    assert stands.at == math.inf
    assert stands.heard(1, 50, now=100.0)
    first = stands.at
    assert 100 + backup.PATIENCE <= first <= 100 + backup.PATIENCE + spread
    assert not stands.heard(2, 50, now=first - backup.PATIENCE)
    assert not stands.heard(3, 50, now=first)
    assert stands.take_due(first) == [1, 2]
    assert first + backup.PATIENCE <= stands.at <= first + backup.PATIENCE + spread
    assert stands.take_due(stands.at) == [3]
    assert stands.at == math.inf

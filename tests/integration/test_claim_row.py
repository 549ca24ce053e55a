"""A single row, claimed by the id that its notification names (outbox_claim_row)."""

import math
from typing import Any
from uuid import UUID

import pytest

import outwake
from outwake.worker.engine import wakes
from tests.conftest import Connect
from tests.support.plans import explain
from tests.support.steps import (
    LEASE,
    Connection,
    Rule,
    add,
    claim,
    claim_ids,
    get,
    new_worker,
    one,
    starts,
    take_out,
    until,
    with_and_without,
)
from tests.support.worker import hang, watched

DONE = "SELECT state = 'done' FROM outbox WHERE id = %s"
ROW = "SELECT id FROM outbox_claim_row(%s, %s, '10 min')"


async def claim_row(
    conn: Connection, worker: UUID, row: int, presence: int = 0
) -> tuple[outwake.Claimed | None, bool]:
    """The row, and else whether it is still there."""
    cursor = await conn.execute(
        "SELECT * FROM outbox_claim_row(%s, %s, %s, true, %s)", (worker, row, LEASE, presence)
    )
    found = [outwake.Claimed._make(came) for came in await cursor.fetchall()]
    if found and found[0].topic is not None:
        return found[0], False
    return None, bool(found)


@pytest.fixture(autouse=True)
def every_row_is_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that follows another at once, for which a worker takes its flag down."""
    monkeypatch.setattr(wakes, "BUSY", -1.0)


@with_and_without
async def test_sleeper_takes_the_row_without_a_scan(rule: Rule, connect: Connect, database: str) -> None:
    """1. W sleeps. 2. A row is inserted. 3. W runs and ends it, and has not claimed in general."""
    psql = await connect()
    if rule == "taken out":  # an id in the payload
        named = "0 || coalesce('#' || lone || coalesce(named, ''), '')"
        await take_out(psql, "outbox_notify", named, "0::text")
    async with watched(database, concurrency=5) as worker:
        scans = worker.scans
        for _ in range(3):
            row = await add(psql)
            await worker.has_run(row)
            await until(psql, DONE, row)
            await worker.asleep()
        assert (worker.scans == scans) == (rule == "kept")
        assert await one(psql, "SELECT parked FROM worker")


async def test_row_that_another_took(connect: Connect, database: str) -> None:
    """1. W sleeps. 2. In one transaction a row is inserted and claimed by another. 3. W hears of it, finds it
    taken, and sleeps on without a scan.
    """
    psql = await connect()
    other = await new_worker(psql, "t")
    async with watched(database, concurrency=5) as worker:
        scans = worker.scans
        await psql.execute("BEGIN")
        row = await add(psql)
        assert await one(psql, ROW, other, row) == row
        await psql.execute("COMMIT")
        await worker.hears_nothing_more(psql)
        await worker.asleep()
        assert worker.scans == scans
        assert worker.ran == []


@with_and_without
async def test_row_that_is_locked_is_scanned_for(rule: Rule, connect: Connect, database: str) -> None:
    """1. W sleeps. 2. P inserts a row, and L locks it before W hears of it. 3. W finds it locked. 4. L rolls
    back, without a word: W runs it.
    """
    psql, locker = await connect(), await connect()
    if rule == "taken out":
        await take_out(
            psql, "outbox_claim_row", "WHERE o.id = row_id AND o.state || '' = 'ready';", "WHERE false;"
        )
    async with watched(database, concurrency=5) as worker:
        asleep = worker.hold("sleep")
        # Anything that lets it come to its next sleep, and wait there.
        await psql.execute("SELECT outbox_wake()")
        await asleep.wait()
        row = await add(psql)
        await locker.execute("BEGIN")
        await locker.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", (row,))
        asleep.release()
        await worker.hears_nothing_more(psql)
        if rule == "kept":
            await locker.execute("ROLLBACK")
            await worker.has_run(row)
        else:
            await worker.asleep_for(math.inf)
            await locker.execute("ROLLBACK")
            assert await worker.sleeps_for_ever(psql)


async def test_news_that_come_meanwhile(connect: Connect, database: str) -> None:
    """1. W's own row is locked: it scans for A, and waits. 2. It hears of B, which has a key. 3. Both run."""
    psql, locker = await connect(), await connect()
    async with watched(database, concurrency=5) as worker:
        await locker.execute("BEGIN")
        await locker.execute("SELECT FROM worker FOR UPDATE")
        rows = [await add(psql)]
        await until(psql, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        rows.append(await add(psql, ordering_key="k"))
        await worker.hears_nothing_more(psql)
        await locker.execute("ROLLBACK")
        for row in rows:
            await worker.has_run(row)


@pytest.mark.parametrize(
    "why",
    ["an ordering_key", "a limit", "a timeout", "not due", "locked", "another's snapshot"],
)
async def test_left_to_the_claim_in_general(why: str, connect: Connect) -> None:
    """What a rule of the claim has anything to say about, it only says is there."""
    psql, other = await connect(), await connect()
    worker = await new_worker(psql)
    columns: dict[str, Any] = {}
    match why:
        case "an ordering_key":
            columns["ordering_key"] = "k"
        case "a limit":
            await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 5)")
        case "a timeout":
            await psql.execute("INSERT INTO topic (name, timeout) VALUES ('t', '1 min')")
    row = await add(psql, **columns)
    await other.execute("BEGIN")
    match why:
        case "not due":
            await psql.execute(
                "UPDATE outbox SET available_at = now() + interval '1 h' WHERE id = %s", (row,)
            )
        case "locked":
            await other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", (row,))
        case "another's snapshot":  # is no reason
            await other.execute("SELECT FROM outbox")
    found, still_there = await claim_row(psql, worker, row)
    if why == "another's snapshot":
        assert found is not None
        assert (found.id, found.topic, found.attempt, found.payload) == (row, "t", 1, {})
        return
    assert (found, still_there) == (None, True)
    assert await get(psql, row) == "ready"
    await other.execute("ROLLBACK")
    assert await claim_ids(psql, worker) == ([] if why == "not due" else [row])


async def test_row_that_is_not_ready_or_not_there(connect: Connect) -> None:
    psql = await connect()
    worker = await new_worker(psql)
    row = await add(psql)
    await psql.execute("SELECT outbox_cancel(%s)", (row,))
    assert await claim_row(psql, worker, row) == (None, False)
    assert await claim_row(psql, worker, row + 1) == (None, False)


@with_and_without
async def test_worker_that_has_ended_takes_nothing(rule: Rule, connect: Connect) -> None:
    """As with every claim: its rows have been freed, nobody would free this one."""
    psql = await connect()
    worker, row = await new_worker(psql), await add(psql)
    await psql.execute("SELECT outbox_end_worker(%s, 'test')", (worker,))
    if rule == "taken out":
        await take_out(psql, "outbox_claim_row", "AND w.ended_at IS NULL")
        assert await one(psql, ROW, worker, row) == row
        return
    assert await claim_row(psql, worker, row) == (None, True)
    assert await get(psql, row) == "ready"


async def test_connection_that_was_given_up_takes_nothing(connect: Connect) -> None:
    psql = await connect()
    worker = await outwake.register(psql, ["t"], presence=8)
    row = await add(psql)
    assert await claim_row(psql, worker, row, presence=7) == (None, True)
    assert await get(psql, row) == "ready"
    assert (await claim_row(psql, worker, row, presence=8))[0] is not None


@with_and_without
async def test_waits_for_no_lock_of_its_worker(rule: Rule, connect: Connect) -> None:
    """A rescue holds it, say; while it waited the worker would not hear what comes next."""
    psql, locker = await connect(), await connect()
    worker, row = await new_worker(psql), await add(psql)
    await locker.execute("BEGIN")
    await locker.execute("SELECT FROM worker WHERE id = %s FOR NO KEY UPDATE", (worker,))
    if rule == "taken out":
        await take_out(psql, "outbox_claim_row", "FOR NO KEY UPDATE SKIP LOCKED", "FOR NO KEY UPDATE")
        claiming = await starts(locker, psql, ROW, worker, row)
        await locker.execute("ROLLBACK")
        await claiming
    else:
        assert await claim_row(psql, worker, row) == (None, True)


async def test_lease_covers_the_row(connect: Connect) -> None:
    """1. A worker that keeps no lease takes a row by its id. 2. It has one, and the sleepers know."""
    psql, listener = await connect(), await connect()
    worker, sleeper = await new_worker(psql), await new_worker(psql)
    await psql.execute("UPDATE worker SET parked = true WHERE id = %s", (sleeper,))
    row = await add(psql)
    await listener.execute("LISTEN outwake_wake")
    await claim_row(psql, worker, row)
    assert await one(
        psql, "SELECT lease_until > clock_timestamp() + %s / 2 FROM worker WHERE id = %s", LEASE, worker
    )
    payloads = [note.payload async for note in listener.notifies(timeout=5, stop_after=1)]
    assert [payload.partition("@")[0] for payload in payloads] == ["*"]


@with_and_without
@pytest.mark.parametrize("by", ["id", "scan"])
async def test_a_claim_leaves_at_least_half_a_lease(rule: Rule, by: str, connect: Connect) -> None:
    """1. A worker's lease has almost run out. 2. It claims another row."""
    psql = await connect()
    worker = await new_worker(psql)
    if rule == "taken out":
        await take_out(psql, "outbox_lease_is_due", "lease * (0.5)", "lease * (0.0)")
    await psql.execute(
        "UPDATE worker SET lease_until = clock_timestamp() + %s * 0.4 WHERE id = %s", (LEASE, worker)
    )
    row = await add(psql)
    came = (await claim_row(psql, worker, row))[0] if by == "id" else (await claim(psql, worker, 2))[0]
    assert came is not None
    assert came.id == row
    left = "SELECT lease_until > clock_timestamp() + %s * 0.5 FROM worker WHERE id = %s"
    assert await one(psql, left, LEASE, worker) == (rule == "kept")


async def test_full_worker_is_not_parked(connect: Connect, database: str) -> None:
    """The last free slot is filled by the claim in general, which takes the flag down."""
    psql = await connect()
    async with watched(database, concurrency=1, run=hang) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await until(psql, "SELECT NOT parked FROM worker")


async def test_finds_the_row_by_its_key(connect: Connect) -> None:
    """Whatever the table was like when the plan was made: here it was empty."""
    psql = await connect()
    worker = await new_worker(psql)
    await psql.execute("VACUUM ANALYZE outbox, topic, worker")
    for _ in range(7):
        await claim_row(psql, worker, 0)
    await psql.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    await many(psql)
    await claim_row(psql, worker, 76)  # past the reading of catalogs
    plans = await explain(psql, ROW, worker, 77)
    assert plans.indexes() >= {"outbox_pkey", "worker_pkey"}
    assert not plans.read_in_full()
    assert plans.buffers() < 100


async def many(conn: Connection) -> None:
    await conn.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 5000)")

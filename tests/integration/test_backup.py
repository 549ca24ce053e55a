"""One of several sleepers takes a single row, and the others stand by: the steps of worker/engine/backup.py.

A and B sleep. Who is drawn is decided by the test (`names`).
"""

import math
from typing import Any
from uuid import UUID

import pytest

import outwake
from outwake.worker.engine import backup as standby
from outwake.worker.engine.backup import Standby
from tests.conftest import Connect
from tests.support.plans import explain
from tests.support.sleepers import is_missed, runs
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim_ids,
    get,
    new_worker,
    one,
    take_out,
    until,
    with_and_without,
)
from tests.support.waits import awaiting
from tests.support.worker import ObservedWorker, hang, watched

STAND_IN = "SELECT outbox_stand_in(%s, %s)"
PARKED = "SELECT parked FROM worker WHERE id = %s"


class Deaf:
    """While it stands, the worker hears nothing. Then it hears all of it at once."""

    def __init__(self, worker: ObservedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        inbox = worker.worker.inbox
        self._heard, self._later = inbox.heard, list[tuple[str, ...]]()
        self._stands = True
        monkeypatch.setattr(inbox, "heard", self._hear)

    def _hear(self, *news: str) -> None:
        if self._stands:
            self._later.append(news)
        else:
            self._heard(*news)

    def hears_again(self) -> None:
        self._stands = False
        for news in self._later:
            self._heard(*news)


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
    monkeypatch.setattr(standby, "PATIENCE", 600.0)
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
async def test_others_stand_in_for_one_that_died(
    rule: Rule, psql: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3. 1. A died in its sleep, its flag is up. 2. A row is inserted, and A named. 3. B runs it."""
    if rule == "taken out":
        monkeypatch.setattr(Standby, "stand_by", lambda *heard, **now: False)
    await absent(psql)
    await names(psql, 7)
    async with watched(database) as b:
        await psql.execute("UPDATE worker SET parked = true")  # also A's, which B took down
        row = await add(psql)
        await (runs(b, row) if rule == "kept" else is_missed(b, psql, row))


async def test_one_that_did_not_come_is_not_named_again(psql: Connection, database: str) -> None:
    """Step 4. 1. A died in its sleep, its flag is up. 2. B stands in for it. 3. A's flag is down."""
    a = await absent(psql)
    await names(psql, 7)
    async with watched(database) as b:
        await psql.execute("UPDATE worker SET parked = true")
        await b.has_run(await add(psql))
        assert not await one(psql, PARKED, a)


@with_and_without
async def test_one_that_comes_late_parks_anew(
    rule: Rule, psql: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4. 1. A is named and hangs. 2. B stands in, and takes A's flag down. 3. A goes on. 4. B leaves.
    5. A row is inserted: A runs it. Taken out: A sleeps on, its flag down.
    """
    async with watched(database) as a:
        await names(psql, a)
        async with watched(database) as b:
            deaf = Deaf(a, monkeypatch)
            row = await add(psql)
            await b.has_run(row)
            await until(psql, "SELECT NOT parked FROM worker WHERE id = %s", a.id)
            await b.asleep()
        deaf.hears_again()
        if rule == "taken out":
            monkeypatch.setattr(a.parts.parking, "wake", lambda: None)
        await a.asleep()
        row = await add(psql)
        await (runs(a, row) if rule == "kept" else is_missed(a, psql, row))


@with_and_without
@pytest.mark.parametrize("why", ["full", "draining"])
async def test_one_without_a_slot_passes_the_word_on(
    rule: Rule, why: str, connect: Connect, psql: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2. 1. P inserts a row; A is parked, and named. 2. A fills its slots with another, or is to drain.
    3. P commits. 4. B runs it at once.
    """
    monkeypatch.setattr(standby, "PATIENCE", 600.0)
    if rule == "taken out":
        await take_out(psql, "outbox_pass_on", "SELECT outbox_notify(o.topic, o.available_at)", "SELECT 1")
    producer = await connect()
    slots = 1 if why == "full" else 2
    async with (
        watched(database, concurrency=slots, run=hang, drain_grace=600.0) as a,
        watched(database, concurrency=2) as b,
    ):
        await names(psql, a)
        if why == "draining":
            await a.has_run(await add(psql))
            await a.asleep_for(1)
        await producer.execute("BEGIN")
        row = await add(producer)
        if why == "full":
            await a.has_run(await add(psql))
        else:
            a.drain()
        await until(psql, "SELECT NOT parked FROM worker WHERE id = %s", a.id)
        await producer.execute("COMMIT")
        if rule == "kept":
            await b.has_run(row)
            return
        for worker in (a, b):
            await worker.hears_nothing_more(psql)
        await until(
            psql,
            "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%outbox_pass_on%'"
            " AND state = 'active' AND pid <> pg_backend_pid())",
        )
        assert row not in b.ran
        assert await get(psql, row) == "ready"


async def test_one_that_took_its_row_passes_nothing_on(
    connect: Connect, psql: Connection, database: str
) -> None:
    """The row that it was named for fills it."""
    listener = await connect()
    await listener.execute("LISTEN outwake_wake")
    async with watched(database, concurrency=1, run=hang) as a, watched(database):
        await names(psql, a)
        row = await add(psql)
        await a.has_run(row)
        await until(psql, "SELECT NOT parked FROM worker WHERE id = %s", a.id)
        await a.hears_nothing_more(psql)
        await psql.execute("SELECT pg_notify('outwake_wake', 'end@0')")
        payloads = [note.payload async for note in listener.notifies(stop_after=1, timeout=60)]
        while payloads[-1] != "end@0":
            payloads += [note.payload async for note in listener.notifies(stop_after=1, timeout=60)]
    ours = [payload for payload in payloads if payload.startswith("t@")]
    assert [payload.partition(",")[0] for payload in ours] == [f"t@0#{row}"]


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


async def test_stands_in_for_rows_that_nobody_has_claimed(psql: Connection) -> None:
    """What was claimed once, and is ready again, has notified again."""
    a, worker = await absent(psql), await new_worker(psql)
    row, again, gone = [await add(psql) for _ in range(3)]
    assert set(await claim_ids(psql, worker, 3)) == {row, again, gone}
    await psql.execute("SELECT outbox_hand_back(%s, %s, '{1}')", (worker, [again]))
    waits = await add(psql)
    taken = await psql.execute(STAND_IN, ([row, again, gone], [7, 7, 7]))
    assert await taken.fetchall() == []
    assert await one(psql, PARKED, a)
    assert await one(psql, STAND_IN, [row, waits], [7, 7]) == waits
    assert not await one(psql, PARKED, a)


async def test_waits_for_no_worker(connect: Connect, psql: Connection) -> None:
    """Who holds the lock of its row claims: its flag is left alone."""
    a, other = await absent(psql), await connect()
    row = await add(psql)
    await other.execute("BEGIN")
    await other.execute("SELECT FROM worker WHERE id = %s FOR NO KEY UPDATE", (a,))
    assert await one(psql, STAND_IN, [row], [7]) == row
    assert await one(psql, PARKED, a)


@pytest.mark.parametrize("query", [STAND_IN, "SELECT outbox_pass_on(%s)"])
async def test_finds_rows_by_their_key(query: str, connect: Connect) -> None:
    """Whatever the table was like when the plan was made: here it was empty."""
    psql = await connect()
    values: list[Any] = [[0]] if "pass" in query else [[0], [7]]
    await psql.execute("VACUUM ANALYZE outbox, worker")
    for _ in range(7):
        await psql.execute(query, values)
    await psql.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 5000)")
    values[0] = [76]
    await psql.execute(query, values)  # past the reading of catalogs
    plans = await explain(psql, query, *values)
    assert "outbox_pkey" in plans.indexes()
    assert not plans.read_in_full()
    assert plans.buffers() < 100


def test_asks_about_what_has_had_its_time() -> None:
    """Once for all that it heard of by then; what came last waits for the next time."""
    stands = Standby()
    assert stands.ask_at == math.inf
    assert stands.stand_by(1, 7, 50, now=100.0)
    first = stands.ask_at
    assert 100 + standby.PATIENCE <= first <= 100 + standby.PATIENCE + 50 * standby.SPREAD
    assert not stands.stand_by(2, 8, 50, now=first - standby.PATIENCE)
    assert not stands.stand_by(3, 9, 50, now=first)
    assert stands.take_due(first) == ([1, 2], [7, 8])
    assert first + standby.PATIENCE <= stands.ask_at <= first + standby.PATIENCE + 50 * standby.SPREAD
    assert stands.take_due(stands.ask_at) == ([3], [9])
    assert stands.ask_at == math.inf

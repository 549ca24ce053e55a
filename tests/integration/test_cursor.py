"""A foreign transaction holds its snapshot, so the entries of claimed rows stay: worker/engine/cursor.py."""

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from psycopg import AsyncConnection

from outwake._claim import Lane, complete_and_claim, hand_back
from outwake.worker.engine import cursor as cursors
from outwake.worker.engine import timers
from outwake.worker.engine.background import BackgroundScan
from outwake.worker.engine.cursor import Scan
from outwake.worker.engine.parking import Parking
from tests.conftest import Connect
from tests.support.plans import FEW_BUFFERS, explain
from tests.support.sleepers import is_missed, runs
from tests.support.steps import (
    Connection,
    Rule,
    add,
    column,
    get,
    new_worker,
    one,
    take_out,
    until,
    waits,
    with_and_without,
)
from tests.support.waits import eventually
from tests.support.worker import ObservedWorker, watched

CLAIM = (
    "SELECT * FROM outbox_complete_and_claim(%s, '{}', '{}', '{t}', 10, '6 s', false, NULL, %s, %s, %s, %s)"
)
BACKGROUND = "SELECT * FROM outbox_scout(%s, %s, %s::smallint[], %s::timestamptz[], %s::bigint[], 100)"
OLD = "2020-01-01 00:00+00"


async def hold(connect: Connect) -> Connection:
    foreign = await connect()
    await foreign.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await foreign.execute("SELECT 1 FROM outbox LIMIT 1")
    return foreign


async def end_of(conn: Connection, row_id: int) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = await (
        await conn.execute("SELECT topic, priority, available_at, id FROM outbox WHERE id = %s", (row_id,))
    ).fetchone()
    assert row is not None
    return row


async def over(conn: Connection, columns: str = "", values: str = "") -> int:
    """20,000 rows that were claimed and completed; the last of them."""
    await conn.execute(
        f"INSERT INTO outbox (topic{columns}) SELECT 't'{values} FROM generate_series(1, 20000)".encode()
    )
    worker = await new_worker(conn)
    rows, _ = await complete_and_claim(conn, worker, [], ["t"], 20000)
    await complete_and_claim(conn, worker, [(row.id, row.attempt) for row in rows], ["t"], 10)
    await conn.execute("VACUUM outbox")
    return rows[-1].id


@pytest.mark.parametrize("times", ["as they came", "all the same"])
@with_and_without
async def test_a_scan_that_begins_later_reads_none_of_what_is_over(
    rule: Rule, times: str, connect: Connect
) -> None:
    """Nor does one for a single row. Taken out: the place where they begin."""
    psql = await connect()
    await hold(connect)
    same = times == "all the same"
    last = await over(psql, *((", available_at", f", '{OLD}'") if same else ()))
    _, priority, at, _ = await end_of(psql, last)
    worker = await new_worker(psql)
    for alone in (False, False, False, True):
        row = await add(psql, **({"available_at": OLD} if same else {}))
        _, _, place, _ = await end_of(psql, row)
        where = ([priority], [place], [row], [alone]) if alone else ([priority], [at], [last], [False])
        plans = await explain(psql, CLAIM, worker, *(where if rule == "kept" else [None] * 4))
        assert await get(psql, row) == "running"
    assert "outbox_claimable" in plans.indexes()
    assert (plans.buffers() < FEW_BUFFERS) == (rule == "kept"), plans.buffers()


@with_and_without
@pytest.mark.parametrize("alone", [True, False])
async def test_nothing_is_claimed_before_its_time(rule: Rule, alone: bool, connect: Connect) -> None:
    """Wherever a claim is told to begin, and also if it is told of that row alone.

    Taken out: the clock as a bound. Then what a background scan saw runs early.
    """
    psql = await connect()
    worker = await new_worker(psql)
    if rule == "taken out":
        clock = "CASE WHEN v.alone THEN least(v.since, moment) ELSE moment END"
        await take_out(psql, "outbox_complete_and_claim", clock, "'infinity'")
    due = await one(psql, "SELECT now() + interval '1 hour'")
    row = await add(psql, available_at=due)
    _, priority, at, _ = await end_of(psql, row)
    places: list[list[list[Any]]] = [[[priority], [at], [row], [alone]]]
    if not alone:
        places += [[[priority], [OLD], [0], [False]], [None, None, None, None]]  # type: ignore[list-item]
    for place in places:
        await psql.execute(CLAIM.encode(), (worker, *place))
    await psql.execute("SELECT * FROM outbox_claim_row(%s, %s, '1 min')", (worker, row))
    assert await get(psql, row) == ("ready" if rule == "kept" else "running")


async def test_a_background_scan_reads_each_entry_once(connect: Connect) -> None:
    """As many pages as one scan from the head of the topic's only priority."""
    psql = await connect()
    await hold(connect)
    ends = [[value] for value in await end_of(psql, await over(psql))]
    await add(psql, priority=3)
    await add(psql)
    scan = "SELECT id FROM outbox WHERE topic = 't' AND priority = 0 AND state = 'ready' AND NOT blocked"
    for _ in range(3):
        head_scan = await explain(psql, f"{scan} ORDER BY available_at, id LIMIT 1")
        background = await explain(psql, BACKGROUND, ["t"], *ends)
    assert not background.read_in_full()
    assert head_scan.buffers() > FEW_BUFFERS
    assert background.buffers() < head_scan.buffers() + FEW_BUFFERS


async def test_the_view_of_the_head_reads_each_entry_once(connect: Connect) -> None:
    """What alerts and readiness ask reads past what is over as well, but no more often than it must."""
    psql = await connect()
    await hold(connect)
    await over(psql)
    await add(psql)
    await add(psql, priority=-1)
    scan = "SELECT id FROM outbox WHERE topic = 't' AND priority = 0 AND state = 'ready' AND NOT blocked"
    for _ in range(3):
        head_scan = await explain(psql, f"{scan} ORDER BY available_at, id LIMIT 1")
        view = await explain(psql, "SELECT id FROM outbox_front")
    assert head_scan.buffers() > FEW_BUFFERS
    assert view.buffers() < head_scan.buffers() + FEW_BUFFERS


async def test_a_background_scan_sees_what_scans_from_these_cursors_do_not(connect: Connect) -> None:
    psql = await connect()
    missed = [await add(psql, available_at=OLD) for _ in range(3)]
    await add(psql, available_at=OLD, ordering_key="k", blocked=True)
    end = await end_of(psql, await add(psql))
    await psql.execute("UPDATE outbox SET state = 'done' WHERE id = %s", (end[3],))
    after = [await add(psql) for _ in range(2)]
    urgent = [await add(psql, priority=9) for _ in range(2)]
    delayed = await add(psql, "u", available_at="2100-01-01 00:00+00")
    for topic in ("full", "paused", "other"):
        await add(psql, topic)
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('paused', 0), ('t', 1)")

    cursor = await psql.execute(
        BACKGROUND.encode(), (["t", "u", "paused"], *([value, value] for value in ("none", 0, OLD, 1)))
    )
    found = [(row[3], row[4] <= 0) for row in await cursor.fetchall()]
    assert found == [(urgent[0], True), (missed[0], True), (delayed, False)]
    cursor = await psql.execute(BACKGROUND.encode(), (["t"], *([value] for value in end)))
    assert [row[3] for row in await cursor.fetchall()] == [urgent[0], *missed, after[0]]


async def test_lanes_are_all_that_is_scanned_for(connect: Connect) -> None:
    psql = await connect()
    worker = await new_worker(psql)
    early = await add(psql)
    first = await add(psql)
    urgent = await add(psql, priority=5)
    later = await add(psql)
    other = await add(psql, topic="u")
    start = await one(psql, "SELECT available_at FROM outbox WHERE id = %s", first)

    async def scan(lanes: list[Lane] | None) -> list[int]:
        rows, _ = await complete_and_claim(psql, worker, [], ["t", "u"], 10, lanes=lanes)
        return [row.id for row in rows]

    assert await scan([]) == []
    assert await scan([Lane("t", 0, start, first, alone=True)]) == [first]
    assert await scan([Lane("t", 0, start, first, alone=False)]) == [later]
    assert await scan(None) == [urgent, early, other]


async def test_under_load_scans_begin_where_the_last_ended_unless_a_key_was_freed(
    database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursors, "NEAR_SHARE", 1e9)
    psql = await connect()
    async with watched(database, "t", concurrency=10) as worker:
        await worker.asleep_for(math.inf)
        scans = keep_scans(worker, monkeypatch)
        rows = await column(
            psql, "INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 200) RETURNING id"
        )
        await worker.has_run(rows[-1])
        assert scans[0].lanes is None
        assert all(scan.lanes for scan in scans[1:])
        await worker.asleep_for(math.inf)
        assert scans[-1].lanes is None

        async with psql.transaction():
            keyed = [await add(psql, available_at=OLD, ordering_key="k") for _ in range(3)]
            rows = await column(
                psql, "INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 200) RETURNING id"
            )
        await worker.has_run(rows[-1])
        assert set(keyed) <= set(worker.ran)


def keep_scans(worker: ObservedWorker, monkeypatch: pytest.MonkeyPatch) -> list[Scan]:
    """What it scans for from now on."""
    scans: list[Scan] = []
    real = worker.parts.cursors.next_scan

    def scan(topics: Iterable[str], slots: int, now: float, *, busy: bool = False) -> Scan:
        scans.append(real(topics, slots, now, busy=busy))
        return scans[-1]

    monkeypatch.setattr(worker.parts.cursors, "next_scan", scan)
    return scans


@pytest.fixture
def always_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scan from the head counts as slow, no background scan as quick. Background scans do not rest."""
    monkeypatch.setattr(cursors, "SLOW", -1.0)
    monkeypatch.setattr(cursors, "QUICK", -1.0)
    monkeypatch.setattr(cursors, "MUCH", -1.0)
    monkeypatch.setattr(cursors, "LITTLE", -1.0)
    monkeypatch.setattr(cursors, "REST", 0.0)


@asynccontextmanager
async def far_worker(database: str, psql: Connection, *topics: str) -> AsyncIterator[ObservedWorker]:
    """Its cursors is far, it has claimed rows of topic t, and sleeps."""
    async with watched(database, *topics, concurrency=4) as worker:
        # Two, so that they are scanned for, and not claimed by their ids.
        for row in await column(
            psql, "INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 2) RETURNING id"
        ):
            await worker.has_run(row)
        await worker.asleep_for(math.inf)
        assert worker.parts.cursors.far
        assert worker.parts.cursors.places
        yield worker


@pytest.mark.usefixtures("always_far")
async def test_what_scans_do_not_see_is_found_while_the_load_goes_on(database: str, connect: Connect) -> None:
    psql, late = await connect(), await connect()
    await hold(connect)
    other_worker = await new_worker(psql)
    async with far_worker(database, psql, "t", "u") as worker:
        await late.execute("BEGIN")
        missed = [await add(late), await add(late, available_at=OLD)]
        back = await add(psql, "v", available_at=OLD)
        (row,), _ = await complete_and_claim(psql, other_worker, [], ["v"], 1)
        await psql.execute("UPDATE outbox SET topic = 't' WHERE id = %s", (back,))
        keyed = [await add(psql, ordering_key="k") for _ in range(10)]
        for number in range(40):
            await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 20)")
            if number == 10:
                await late.execute("COMMIT")
                await hand_back(psql, other_worker, [(back, row.attempt)])
                missed += [await add(psql, priority=9), await add(psql, "u"), await add(psql, priority=-9)]
        await until(psql, "SELECT NOT EXISTS (SELECT FROM outbox WHERE state <> 'done' AND topic <> %s)",
                    "outbox.prune")  # fmt: skip
        assert {*missed, back, *keyed} < set(worker.ran)
        assert worker.parts.cursors.far


@pytest.mark.usefixtures("always_far")
async def test_a_worker_sleeps_only_when_a_background_scan_saw_nothing_due(
    database: str, connect: Connect
) -> None:
    """A row that was written before its flag was up, and committed after its scan: no notification, and
    nothing but a background scan would see it."""
    psql, late = await connect(), await connect()
    async with watched(database, "t", concurrency=4, started=False) as worker:
        held = worker.hold("writers")
        await held.wait()
        await psql.execute("UPDATE worker SET parked = false")
        await late.execute("BEGIN")
        row = await add(late, available_at=OLD)
        await psql.execute("UPDATE worker SET parked = true")
        held.release()
        await worker.scanned(worker.scans + 3)
        assert worker.ran == []
        await late.execute("COMMIT")
        await worker.has_run(row)
        await worker.asleep_for(math.inf)
        assert worker.parts.cursors.far


@pytest.mark.usefixtures("always_far")
@with_and_without
async def test_a_background_scan_from_before_the_writers_ended_does_not_let_it_sleep(
    rule: Rule, database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. P has written, and W notes it. 2. A background scan sees none. 3. P commits. 4. W sees the end."""
    monkeypatch.setattr(timers, "_AGAIN_FIRST", 600.0)
    if rule == "taken out":
        monkeypatch.setattr(Parking, "writers_left", False)
    psql, late = await connect(), await connect()
    async with watched(database, "t", concurrency=4, started=False) as worker:
        noting = worker.hold("writers")
        await noting.wait()
        await psql.execute("UPDATE worker SET parked = false")
        await late.execute("BEGIN")
        row = await add(late, available_at=OLD)
        await psql.execute("UPDATE worker SET parked = true")
        noted = worker.hold("schedule")
        noting.release()
        await noted.wait()
        await eventually("a background scan", lambda: not worker.parts.background.under_way)
        again = worker.hold("writers")
        noted.release()
        await again.wait()
        await late.execute("COMMIT")
        again.release()
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@pytest.mark.usefixtures("always_far")
async def test_what_is_told_to_a_sleeper_is_found_wherever_it_lies(database: str, connect: Connect) -> None:
    psql = await connect()
    async with far_worker(database, psql, "t", "u") as worker:
        for columns in ({"available_at": OLD}, {"priority": 7}, {"topic": "u"}, {}):
            await worker.has_run(await add(psql, **columns))
        await worker.asleep_for(math.inf)


@pytest.mark.usefixtures("always_far")
async def test_a_sleeper_knows_when_the_next_row_is_due(database: str, connect: Connect) -> None:
    psql = await connect()
    async with far_worker(database, psql, "t") as worker:
        row = await one(
            psql,
            "INSERT INTO outbox (topic, available_at) VALUES ('t', clock_timestamp() + interval '1 h')"
            " RETURNING id",
        )
        await worker.has_run(await add(psql))
        await worker.hears_nothing_more(psql)
        await worker.asleep_for(3000)
        assert await worker.asleep() < 3601
        await psql.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (row,))
        await worker.has_run(row)


async def test_a_head_that_is_quick_again_is_used_again(
    monkeypatch: pytest.MonkeyPatch, database: str, connect: Connect
) -> None:
    psql = await connect()
    monkeypatch.setattr(cursors, "SLOW", -1.0)
    monkeypatch.setattr(cursors, "MUCH", -1.0)
    monkeypatch.setattr(cursors, "QUICK", 60.0)
    async with watched(database, "t", concurrency=4) as worker:
        await worker.has_run(await add(psql))
        await until(psql, "SELECT state = 'done' FROM outbox WHERE topic = 't'")
        assert not worker.parts.cursors.far


async def test_an_end_does_not_wait_for_a_background_scan_on_a_silent_path(
    database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the server is silent because of a lock. psycopg would ask it to cancel, and wait for an answer."""
    psql, locker, conn = await connect(), await connect(), await connect()
    asked: list[AsyncConnection[Any]] = []

    async def ask(self: AsyncConnection[Any], *, timeout: float = 0) -> None:
        asked.append(self)

    @asynccontextmanager
    async def one_connection() -> AsyncIterator[Connection]:
        yield conn

    monkeypatch.setattr(AsyncConnection, "cancel_safe", ask)
    await locker.execute("BEGIN")
    await locker.execute("LOCK TABLE outbox")
    near = cursors.Cursors()
    near.far = True
    background = BackgroundScan(near, one_connection, lambda: None)
    background.start(["t"])
    await waits(psql, conn)
    await background.close()
    assert asked == []
    assert not background.under_way

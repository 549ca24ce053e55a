"""Rescue: the rows of a worker whose lease ran out go back, wholly, and only then; by one timer each.

A is the worker that is lost, R rescues. A "dead" worker is one that claimed and is never heard of again.
"""

import math
import signal
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from outwake import WorkerEnded
from tests.conftest import Connect
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim,
    claim_ids,
    get,
    new_worker,
    one,
    replace_body,
    run_out,
    starts,
    take_out,
    until,
    with_and_without,
)
from tests.support.worker import command, install, watched

RESCUE = "SELECT outbox_rescue(%s, '1 ms', '1 hour')"

ONE_STATEMENT = """
WITH life AS (
    UPDATE worker SET ended_at = clock_timestamp(), parked = false, lease_until = NULL
    WHERE id = dead RETURNING id
), freed AS (
    UPDATE outbox AS o SET state = 'ready', failures = o.failures + 1 FROM life
    WHERE o.worker_id = life.id AND o.state = 'running'
)
SELECT true FROM life
"""


@with_and_without
async def test_claim_in_flight_while_the_rescue_reads(rule: Rule, connect: Connect) -> None:
    """† Lock and end first, then free in a new statement.

    1. A claims row 2, and has not committed. 2. R, its parent, knows it dead and ends its life: waits for
    A's row. 3. A's claim commits. 4. R frees what A runs. Taken out: in one statement, whose snapshot is
    older than the claim, so that row 2 is stranded with a worker that has ended.
    """
    a, r, psql = await connect(), await connect(), await connect()
    lost = await new_worker(psql)
    first, second = await add(psql), await add(psql)
    assert await claim_ids(a, lost) == [first]
    if rule == "taken out":
        await psql.execute("DROP TRIGGER worker_ended ON worker")
        await replace_body(psql, "outbox_end_worker", "sql", ONE_STATEMENT)
    await a.execute("BEGIN")
    assert await claim_ids(a, lost) == [second]
    ending = await starts(psql, r, "SELECT outbox_end_worker(%s, 'died')", lost)
    await a.execute("COMMIT")
    assert await ending
    states = [await get(psql, first), await get(psql, second)]
    assert await one(psql, "SELECT ended_at IS NOT NULL FROM worker WHERE id = %s", lost)
    assert states == (["ready", "ready"] if rule == "kept" else ["ready", "running"])


@with_and_without
async def test_claim_waits_for_the_rescue_that_is_first(rule: Rule, connect: Connect) -> None:
    """A claim locks its worker's row first, and requires that its life was not ended.

    1. R has ended A, and not committed. 2. A claims: waits. 3. R commits. 4. A's claim raises. Taken out:
    it claims, and strands the row.
    """
    a, r, psql = await connect(), await connect(), await connect()
    lost = await new_worker(psql)
    row = await add(psql)
    if rule == "taken out":
        await take_out(psql, "outbox_myself", " FOR NO KEY UPDATE;", ";")
    await r.execute("BEGIN")
    await r.execute("SELECT outbox_end_worker(%s, 'died')", (lost,))
    query = "SELECT id FROM outbox_claim(%s, '{t}', 1, '1 h')"
    claiming = await starts(psql, a, query, lost)
    await r.execute("COMMIT")
    if rule == "kept":
        with pytest.raises(psycopg.Error) as raised:
            await claiming
        assert raised.value.sqlstate == "OW001"
        assert await get(psql, row) == "ready"
    else:
        assert await claiming == row
        assert await get(psql, row) == "running"


async def test_ended_worker_may_do_nothing_more(connect: Connect) -> None:
    """Claim, renew and park raise; a rescued worker must come back under a new id."""
    conn = await connect()
    lost = await new_worker(conn)
    await conn.execute("SELECT outbox_end_worker(%s, 'died')", (lost,))
    for query in (
        "SELECT outbox_renew(%s, '1 h', '{}', '{}')",
        "SELECT outbox_park(%s)",
        "SELECT outbox_claim(%s, '{t}', 1, '1 h')",
        "SELECT outbox_complete_and_claim(%s, '{}', '{}', '{t}', 1, '1 h', false)",
    ):
        with pytest.raises(psycopg.Error) as raised:
            await conn.execute(query, (lost,))
        assert raised.value.sqlstate == "OW001"
    with pytest.raises(WorkerEnded):
        await claim(conn, lost)


@with_and_without
async def test_worker_row_that_is_locked_is_skipped(rule: Rule, connect: Connect) -> None:
    """A's claim or renewal is in flight: R does not wait for it.

    1. A's lease has run out. 2. A renews, and has not committed. 3. R rescues: at once nothing.
    """
    a, r, psql = await connect(), await connect(), await connect()
    lost, rescuer = await new_worker(psql), await new_worker(psql)
    row = await add(psql)
    await claim(a, lost)
    await run_out(psql, lost)
    if rule == "taken out":
        loop = "\n    LOOP\n        IF EXISTS"
        skip, wait = f"FOR NO KEY UPDATE SKIP LOCKED{loop}", f"FOR NO KEY UPDATE{loop}"
        await take_out(psql, "outbox_rescue", skip, wait)
    await a.execute("BEGIN")
    await a.execute("SELECT outbox_renew(%s, '1 h', '{}', '{}')", (lost,))
    if rule == "kept":
        assert await one(r, RESCUE, rescuer) == 0
        await a.execute("COMMIT")
    else:
        rescuing = await starts(psql, r, RESCUE, rescuer)
        await a.execute("COMMIT")
        assert await rescuing == 0
    assert await get(psql, row) == "running"


@pytest.mark.parametrize(
    ("lease", "connected", "rescued"),
    [("1 ms", "1 hour", 1), ("1 hour", "59 minutes", 0), ("1000 years", "2000 years", 0)],
    ids=["run out", "rescuer not connected for a lease", "server not up for a lease"],
)
async def test_outage_rescues_nobody(lease: str, connected: str, rescued: int, connect: Connect) -> None:
    """A lease has run out only if the server was up, and R connected, for one lease."""
    conn = await connect()
    lost, rescuer = await new_worker(conn), await new_worker(conn)
    await add(conn)
    await claim(conn, lost)
    await run_out(conn, lost)
    query = "SELECT outbox_rescue(%s, %s::interval, %s::interval)"
    assert await one(conn, query, rescuer, lease, connected) == rescued
    if rescued == 0:  # each condition is there for its own case
        text = "connected < lease OR clock_timestamp() - pg_postmaster_start_time() < lease"
        await take_out(conn, "outbox_rescue", text, "false")
        assert await one(conn, query, rescuer, lease, connected) == 1


@with_and_without
@pytest.mark.parametrize(
    "end",
    [
        "DELETE FROM worker WHERE id = %s",
        "UPDATE worker SET ended_at = clock_timestamp() WHERE id = %s",
        "SELECT outbox_end_worker(%s, 'died')",
    ],
)
async def test_end_of_a_worker_frees_its_rows(rule: Rule, end: str, connect: Connect, database: str) -> None:
    """1. A runs a row, R sleeps. 2. A's life is ended, in whatever way. 3. R runs the row at once."""
    psql = await connect()
    lost = await new_worker(psql)
    row = await add(psql)
    await claim(psql, lost)
    async with watched(database) as worker:
        if rule == "taken out":
            await psql.execute("DROP TRIGGER worker_ended ON worker")
            await psql.execute("DROP TRIGGER worker_deleted ON worker")
        await psql.execute(end.encode(), (lost,))
        if rule == "kept":
            await worker.has_run(row)
        else:
            await worker.hears_nothing_more(psql)
            assert await get(psql, row) == "running"


@with_and_without
async def test_row_that_was_locked_when_its_worker_ended(rule: Rule, connect: Connect, database: str) -> None:
    """1. A runs a row, under a lease of a day; R sleeps until then. 2. A is cut off inside a fenced
    transaction. 3. Its parent ends its life: the row is locked, and left. 4. The server gives the
    transaction up. 5. R, told that something is left, runs the row: long before the lease's end.
    """
    psql, handler = await connect(), await connect()
    lost = await new_worker(psql)
    row = await add(psql)
    await claim(psql, lost, lease=timedelta(days=1))
    if rule == "taken out":
        await take_out(psql, "outbox_free", "PERFORM outbox_notify('*', clock_timestamp());")
    async with watched(database, lease=0.3) as worker:
        await handler.execute("BEGIN")
        assert await one(handler, "SELECT outbox_fence(%s, %s, 1)", lost, row) is False
        assert await one(psql, "SELECT outbox_end_worker(%s, 'died')", lost)
        assert await get(psql, row) == "running"
        await handler.execute("ROLLBACK")
        if rule == "kept":
            await worker.has_run(row)
        else:
            await worker.hears_nothing_more(psql)
            assert await worker.asleep() > 80000
            assert await get(psql, row) == "running"


@with_and_without
async def test_delete_of_a_worker_waits_for_a_row_that_is_locked(rule: Rule, connect: Connect) -> None:
    """1. A's handler holds its row. 2. Somebody deletes A: waits. 3. The handler's transaction ends, and the
    row is freed. Taken out: nothing is left that would keep others looking for that row.
    """
    psql, handler, deleter = await connect(), await connect(), await connect()
    lost, rescuer = await new_worker(psql), await new_worker(psql)
    row = await add(psql)
    await claim(psql, lost)
    if rule == "taken out":
        text = "FROM outbox WHERE worker_id = OLD.id AND state = 'running' ORDER BY id + 0 FOR UPDATE;"
        await take_out(psql, "worker_ended", f"PERFORM {text}", "NULL;")
    await handler.execute("BEGIN")
    await handler.execute("SELECT outbox_fence(%s, %s, 1)", (lost, row))
    delete = "DELETE FROM worker WHERE id = %s RETURNING true"
    if rule == "kept":
        deleting = await starts(psql, deleter, delete, lost)
        await handler.execute("ROLLBACK")
        assert await deleting
        assert await get(psql, row) == "ready"
    else:
        assert await one(deleter, delete, lost)
        await handler.execute("ROLLBACK")
        assert await get(psql, row) == "running"
        deadline = "SELECT lease_end FROM outbox_next_deadline(%s, '{t}', '1 ms', '1 hour')"
        assert await one(psql, deadline, rescuer) is None


async def test_running_row_whose_worker_has_no_lease_is_freed_by_the_next_rescue(connect: Connect) -> None:
    """What a restore or a disabled trigger leaves behind."""
    conn = await connect()
    lost, rescuer = await new_worker(conn), await new_worker(conn)
    row = await add(conn)
    await claim(conn, lost)
    await conn.execute("ALTER TABLE worker DISABLE TRIGGER USER")
    await conn.execute("DELETE FROM worker WHERE id = %s", (lost,))
    assert await one(conn, RESCUE, rescuer) == 1
    assert await get(conn, row) == "ready"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_end_of_a_worker_needs_read_committed(level: str, connect: Connect) -> None:
    conn = await connect()
    lost = await new_worker(conn)
    await conn.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="READ COMMITTED"):
        await conn.execute("DELETE FROM worker WHERE id = %s", (lost,))


async def test_lease_of_an_idle_worker_is_taken_away_once(connect: Connect) -> None:
    """It is kept only while something runs: a rescue that finds it run out clears it, and ends nobody."""
    conn = await connect()
    idle, rescuer = await new_worker(conn), await new_worker(conn)
    row = await add(conn)
    await claim(conn, idle)
    await conn.execute("SELECT outbox_complete(%s, %s, '{1}')", (idle, [row]))
    await run_out(conn, idle)
    deadline = "SELECT lease_end < interval '0' FROM outbox_next_deadline(%s, '{t}', '1 ms', '1 hour')"
    assert await one(conn, deadline, rescuer) is True
    assert await one(conn, RESCUE, rescuer) == 0
    assert await one(conn, deadline, rescuer) is None
    assert await one(conn, "SELECT count(*) FROM worker WHERE ended_at IS NULL") == 2
    await add(conn)
    assert len(await claim(conn, idle)) == 1


async def test_failure_is_counted_told_and_ends_a_row_that_has_spent_them(connect: Connect) -> None:
    """A rescue is a failure: at once again the first time, with backoff then, dead at max_attempts."""
    conn = await connect()
    row = await add(conn, max_attempts=3)
    due = []
    for failures in (1, 2, 3):
        lost = await new_worker(conn)
        assert await claim_ids(conn, lost) == [row]
        assert await one(conn, "SELECT outbox_end_worker(%s, 'it died')", lost)
        assert await get(conn, row, "failures") == failures
        due.append(await one(conn, "SELECT available_at > started_at FROM outbox WHERE id = %s", row))
        if failures < 3:
            await conn.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (row,))
    assert due[:2] == [False, True]
    assert await get(conn, row) == "dead"
    errors = await get(conn, row, "errors")
    assert [(e["attempt"], e["error"]) for e in errors] == [(n, "it died") for n in (1, 2, 3)]


async def test_poison_row_backs_off_as_its_failures_grow(connect: Connect) -> None:
    """Full jitter: the mean wait doubles; 200 rows of a kind make that certain enough."""
    conn = await connect()
    means = []
    for failures in (1, 4, 8):
        lost = await new_worker(conn)
        await conn.execute("DELETE FROM outbox")
        await conn.execute(
            "INSERT INTO outbox (topic, state, worker_id, attempt, failures, max_attempts)"
            " SELECT 't', 'running', %s, 1, %s, 100 FROM generate_series(1, 200)",
            (lost, failures),
        )
        assert await one(conn, "SELECT outbox_end_worker(%s, 'poison')", lost)
        query = "SELECT avg(extract(epoch FROM available_at - clock_timestamp()))::float8 FROM outbox"
        means.append(await one(conn, query))
    assert 0.2 < means[0] < 0.8
    assert 4 * means[0] < means[1]
    assert 4 * means[1] < means[2]


async def test_marked_row_is_cancelled_by_its_rescue(connect: Connect) -> None:
    conn = await connect()
    lost = await new_worker(conn)
    row = await add(conn)
    await claim(conn, lost)
    assert await one(conn, "SELECT outbox_cancel(%s)", row) == "running"
    await conn.execute("SELECT outbox_end_worker(%s, 'died')", (lost,))
    assert await get(conn, row) == "cancelled"


async def test_rescuer_spares_itself_and_the_living(connect: Connect) -> None:
    conn = await connect()
    me, living, idle = [await new_worker(conn) for _ in range(3)]
    for worker in (me, living):
        await add(conn)
        await claim(conn, worker)
    await run_out(conn, me)
    await run_out(conn, idle)
    assert await one(conn, RESCUE, me) == 0
    assert await one(conn, "SELECT count(*) FROM worker WHERE ended_at IS NULL") == 3


@with_and_without
async def test_lease_born_while_others_sleep(rule: Rule, connect: Connect, database: str) -> None:
    """The death of the only busy worker, all others asleep since before its claim.

    1. R sleeps, without a timer. 2. A claims a row of a topic R does not serve. 3. R brings its timer
    forward, without a query. 4. A is never heard of again: R rescues on time.
    """
    psql = await connect()
    lost = await new_worker(psql, "other")
    if rule == "taken out":
        await take_out(
            psql,
            "outbox_extend_lease",
            "PERFORM outbox_notify_lease(me.id, clock_timestamp() + lease);",
        )
    async with watched(database, lease=0.5) as worker:
        row = await add(psql, "other")
        await worker.hears_nothing_more(psql)
        assert await worker.asleep() == math.inf
        scans = worker.scans
        await dies_running(psql, lost)
        await worker.hears_nothing_more(psql)
        if rule == "kept":
            if worker.scans == scans:  # else a busy machine let the timer go by
                assert await worker.asleep() <= 1.1
            await until(psql, "SELECT state = 'ready' FROM outbox WHERE id = %s", row)
            assert await worker.asleep() == math.inf
        else:
            assert worker.scans == scans
            assert await worker.sleeps_for_ever(psql)
            assert await get(psql, row) == "running"


async def dies_running(conn: Connection, worker: UUID) -> None:
    rows = await claim(conn, worker, topics=("other",), lease=timedelta(seconds=1))
    assert len(rows) == 1


@with_and_without
async def test_retry_is_due_with_its_worker_dead_and_others_asleep(
    rule: Rule, connect: Connect, database: str
) -> None:
    """1. R sleeps. 2. A fails its row, to be retried in half a second, and dies. 3. R runs it on time."""
    psql = await connect()
    other = await new_worker(psql)
    row = await add(psql)
    await claim(psql, other)
    async with watched(database, lease=600.0) as worker:
        timer = await worker.asleep()
        scans = worker.scans
        if rule == "taken out":
            await psql.execute("DROP TRIGGER outbox_settle ON outbox")
        await psql.execute("SELECT outbox_fail(%s, %s, 1, 'again', interval '500 ms')", (other, row))
        await psql.execute("DELETE FROM worker WHERE id = %s", (other,))
        if rule == "kept":
            await worker.has_run(row)
        else:
            await worker.hears_nothing_more(psql)
            await until(psql, "SELECT available_at < clock_timestamp() FROM outbox WHERE id = %s", row)
            # Its timer is still the one for A's lease, 9 minutes or more away.
            assert worker.scans == scans
            assert await worker.asleep() > timer - 60


@with_and_without
async def test_delayed_row_wakes_no_query(rule: Rule, connect: Connect, database: str) -> None:
    """1. R sleeps. 2. P inserts a row for tomorrow: R sets its timer, and asks nothing."""
    psql = await connect()
    if rule == "taken out":  # a payload without the time
        await take_out(psql, "outbox_notify", "WHEN due <= clock_timestamp() THEN 0", "WHEN true THEN 0")
    async with watched(database) as worker:
        scans = worker.scans
        await psql.execute(
            "INSERT INTO outbox (topic, available_at) VALUES ('t', clock_timestamp() + interval '1 day')"
        )
        if rule == "taken out":
            await worker.scanned(scans + 1)
            return
        await worker.hears_nothing_more(psql)
        assert 86000 < await worker.asleep() <= 86400
        assert worker.scans == scans


async def test_killed_worker_is_rescued_by_one_that_sleeps(
    connect: Connect, database: str, tmp_path: Path
) -> None:
    """1. Two workers sleep. 2. A row is inserted: one of them runs it. 3. That one gets SIGKILL. 4. The
    other rescues the row and runs it.
    """
    psql = await connect()
    handlers = install(tmp_path / "handlers")
    async with (
        command(database, handlers, lease=1.0) as first,
        command(database, handlers, lease=1.0) as second,
    ):
        for process in (first, second):
            await process.event("parked")
        row = await add(psql, "hang")
        await until(psql, "SELECT state = 'running' FROM outbox WHERE id = %s", row)
        pid = await one(psql, "SELECT w.pid FROM outbox o JOIN worker w ON w.id = o.worker_id")
        victim, other = (first, second) if first.pid == pid else (second, first)
        await victim.event("started", outbox_id=row)
        victim.kill()
        rescued = await other.event("rescued", workers=1)
        await other.event("started", after=rescued, outbox_id=row, attempt=2)
        assert await victim.ended() == -signal.SIGKILL
    assert await get(psql, row, "failures") == 1


async def test_stopped_worker_finds_its_lease_ended(connect: Connect, database: str, tmp_path: Path) -> None:
    """1. A runs a row and is stopped (SIGSTOP) past its lease. 2. R rescues and runs the row. 3. A goes on
    (SIGCONT): it stops what it ran, writes nothing, and comes back under a new id.
    """
    psql = await connect()
    handlers = install(tmp_path / "handlers")
    async with command(database, handlers, "--topics", "hang", lease=1.0) as a:
        await a.event("parked")
        row = await add(psql, "hang")
        await a.event("started", outbox_id=row)
        async with command(database, handlers, "--topics", "hang", lease=1.0) as r:
            await r.event("parked")
            a.send(signal.SIGSTOP)
            await r.event("started", outbox_id=row, attempt=2)
            a.send(signal.SIGCONT)
            first = await a.event("registered")
            again = await a.event("registered", after=first)
            assert again["worker_id"] != first["worker_id"]
            assert await get(psql, row, "attempt") == 2
            assert await get(psql, row) == "running"


@pytest.mark.parametrize(
    "ending",
    ["UPDATE worker SET ended_at = now(), parked = false", "DELETE FROM worker"],
    ids=["update", "delete"],
)
@with_and_without
async def test_a_worker_whose_life_is_ended_asleep_comes_back(
    rule: Rule, ending: str, database: str, connect: Connect
) -> None:
    """1. A sleeps, parked. 2. Its life is ended: its flag is down, nobody notifies it. 3. It is told,
    and comes back under a new id, so that the next row runs. Without a word it would sleep for ever.
    """
    psql = await connect()
    if rule == "taken out":
        await take_out(psql, "worker_ended", "PERFORM pg_notify", "PERFORM concat")
    async with watched(database) as worker:
        before = worker.id
        await psql.execute(ending.encode())
        if rule == "taken out":
            row = await add(psql)
            assert await worker.sleeps_for_ever(psql)
            assert await get(psql, row) == "ready"
            return
        row = await add(psql)
        await worker.has_run(row)
        assert worker.id != before

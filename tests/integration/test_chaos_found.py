"""What the chaos run has found, and what looking for why it had not, each as the shortest list of steps."""

import asyncio
import time
from urllib.parse import urlsplit, urlunsplit

import pytest
from psycopg import errors

from outwake import Cancelled, Job, register
from outwake._claim import reconnect
from outwake.schema import in_schema
from tests.conftest import Connect
from tests.support.proxy import Proxy
from tests.support.steps import add, claim_ids, column, get, new_worker, one, run_out, starts, until
from tests.support.worker import hang, watched


async def test_key_whose_first_row_came_late_goes_on_after_a_hand_back(connect: Connect) -> None:
    """1. Row 1 of a key is inserted and not committed. 2. Row 2 starts. 3. Row 1 is committed; a claim
    finds it waiting for row 2. 4. Row 2 is handed back, and so waits for row 1. Nobody waits for nobody:
    row 1 runs.
    """
    psql, late = await connect(), await connect()
    worker = await new_worker(psql)
    await late.execute("BEGIN")
    first = await add(late, ordering_key="k")
    second = await add(psql, ordering_key="k")
    assert await claim_ids(psql, worker) == [second]
    await late.execute("COMMIT")
    assert await claim_ids(psql, worker) == []
    assert await get(psql, first, "blocked")
    await psql.execute("SELECT outbox_hand_back(%s, ARRAY[%s::bigint], '{1}')", (worker, second))
    assert await claim_ids(psql, worker, 2) == [first]


async def test_claim_whose_answer_was_lost_is_given_back(connect: Connect, database: str) -> None:
    """The only worker. 1. It sleeps. 2. P locks the table, and inserts a row. 3. The worker claims, and
    waits; it gives the connection up. 4. P commits: the server goes on with that claim, whose worker knows
    nothing of it. 5. The worker is connected again: it runs the row.
    """
    producer, psql = await connect(), await connect()
    async with watched(database, lease=1.0) as worker:
        gone = worker.hold("connect")
        await producer.execute("BEGIN")
        await producer.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        row = await add(producer)
        await psql.execute("SELECT outbox_wake()")
        await gone.wait()
        await producer.execute("COMMIT")
        await until(psql, "SELECT state = 'running' FROM outbox WHERE id = %s", row)
        gone.release()
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        assert worker.ran == [row]


async def test_claim_of_a_connection_given_up_takes_no_row(connect: Connect) -> None:
    """1. A claim is on its way. 2. Its worker comes back, on another connection. 3. The claim arrives."""
    conn = await connect()
    worker = await new_worker(conn)
    await conn.execute("UPDATE worker SET presence = 2 WHERE id = %s", (worker,))
    row = await add(conn)
    with pytest.raises(errors.RaiseException, match="connection 1 of worker"):
        await conn.execute("SELECT outbox_claim(%s, '{t}', 1, '1 h', false, 1)", (worker,))
    assert await get(conn, row) == "ready"
    assert await one(conn, "SELECT id FROM outbox_claim(%s, '{t}', 1, '1 h', false, 2)", worker) == row


async def test_rescue_does_not_wait_for_a_row_that_is_locked(connect: Connect) -> None:
    """A worker is cut off in the middle of a fenced transaction, which the server keeps open. 1. Its other
    row is freed at once, 2. the locked one is announced as due, and freed when the transaction has ended.
    """
    psql, stuck, rescuer = await connect(), await connect(), await connect()
    dead, other = await new_worker(psql), await new_worker(psql)
    first, second = await add(psql), await add(psql)
    assert len(await claim_ids(psql, dead, 2)) == 2
    await run_out(psql, dead)
    await stuck.execute("BEGIN")
    await stuck.execute("SELECT outbox_fence(%s, %s, 1)", (dead, first))
    await rescuer.execute("SET lock_timeout = '5s'")
    rescue = "SELECT outbox_rescue(%s, '1 ms', '1 hour')"
    assert await one(rescuer, rescue, other) == 1
    assert (await get(psql, first), await get(psql, second)) == ("running", "ready")
    deadline = "SELECT lease_end <= '0' FROM outbox_next_deadline(%s, '{t}', '1 ms', '1 hour')"
    assert await one(psql, deadline, other)
    await one(rescuer, rescue, other)
    assert await get(psql, first) == "running"
    await stuck.execute("ROLLBACK")
    await one(rescuer, rescue, other)
    assert await get(psql, first) == "ready"
    assert await one(psql, deadline, other) is None
    assert await one(psql, "SELECT jsonb_array_length(errors) FROM outbox WHERE id = %s", first) == 1


async def test_row_locked_when_its_worker_left_is_freed_by_one_that_sleeps(
    connect: Connect, database: str
) -> None:
    """1. Another sleeps until the lease's end. 2. A parent ends its child's life, a row of which is locked.
    3. The lock goes. The sleeper runs the row when the lease would have ended.
    """
    psql, stuck = await connect(), await connect()
    await psql.execute("SET lock_timeout = '5s'")
    async with watched(database, lease=0.5) as worker:
        dead = await new_worker(psql, "t", "u")
        row = await add(psql, "u")
        await psql.execute("SELECT outbox_claim(%s, '{u}', 1, '0.5 s')", (dead,))
        await stuck.execute("BEGIN")
        await stuck.execute("SELECT outbox_fence(%s, %s, 1)", (dead, row))
        await psql.execute("SELECT outbox_end_worker(%s, 'its worker died')", (dead,))
        assert await get(psql, row) == "running"
        await stuck.execute("ROLLBACK")
        await until(psql, "SELECT state = 'ready' FROM outbox WHERE id = %s", row)
        assert not worker.draining


async def test_worker_without_free_slots_does_not_wake_for_a_row_that_is_due(
    connect: Connect, database: str
) -> None:
    """It can't start it: it would spin until a slot is free."""
    psql = await connect()
    async with watched(database, run=hang, concurrency=1) as worker:
        await worker.has_run(await add(psql))
        await worker.rests()
        await psql.execute("SELECT pg_notify('outwake_wake', 't@1')")  # due since 1970
        await worker.hears_nothing_more(psql)
        assert await worker.rests() > 60
        assert worker.parts.timers.row_at < time.monotonic()


async def test_flag_of_a_sleeper_that_has_just_come_back_stays_up(connect: Connect) -> None:
    """1. A was parked and has lost its connections. 2. B parks, and clears the flags of those that are
    gone: its statement has begun, and waits for the row of a third. 3. A comes back and parks. 4. B's
    statement goes on, and meets A's row as it is now. A's flag must stay up, else nobody would wake it.
    """
    a, b, third, psql = [await connect() for _ in range(4)]
    insert = (
        "INSERT INTO worker (host, pid, version, topics, concurrency, parked, presence)"
        " VALUES ('h', 1, '0', '{t}', 1, true, 1) RETURNING id"
    )
    gone, sleeper, parker = await one(psql, insert), await one(psql, insert), await new_worker(psql)
    await third.execute("BEGIN")
    await third.execute("SELECT FROM worker WHERE id = %s FOR UPDATE", (gone,))
    await b.execute("SET enable_hashjoin = off")  # so that it meets the rows in this order
    await b.execute("SET enable_mergejoin = off")
    parking = await starts(psql, b, "SELECT outbox_park(%s)", parker)
    await a.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, 7)"))
    await a.execute("UPDATE worker SET presence = 7, parked = false WHERE id = %s", (sleeper,))
    await a.execute("UPDATE worker SET parked = true WHERE id = %s", (sleeper,))
    await third.execute("COMMIT")
    await parking
    assert await one(psql, "SELECT parked FROM worker WHERE id = %s", sleeper)
    assert not await one(psql, "SELECT parked FROM worker WHERE id = %s", gone)


async def test_handler_that_ends_as_cancelled_unasked_leaves_no_row_running(
    connect: Connect, database: str
) -> None:
    """The mark may have been taken away again, or the handler be wrong: the row must not stay its worker's,
    which does not run it.
    """
    psql = await connect()
    once = iter([True])

    async def run(job: Job) -> None:
        if next(once, False):
            raise Cancelled("who asked?")

    async with watched(database, run=run) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        assert await get(psql, row, "attempt") == 2


async def test_reconnect_that_arrives_late_changes_nothing(connect: Connect) -> None:
    """1. A worker reconnects; the call is held up on the way. 2. It gives that connection up, comes back on
    another, runs a row and sleeps. 3. The first call arrives. Else the flag went down, so that nobody woke
    the worker any more, and the row that it runs was given back.
    """
    psql = await connect()
    worker = await register(psql, ["t"], presence=1)
    row = await add(psql)
    assert await reconnect(psql, worker, 3, []) == set()
    assert await claim_ids(psql, worker) == [row]
    await psql.execute("SELECT outbox_park(%s)", (worker,))
    with pytest.raises(errors.RaiseException, match="was given up"):
        await reconnect(psql, worker, 2, [])
    assert await one(psql, "SELECT parked FROM worker") is True
    assert await get(psql, row) == "running"


async def test_worker_leaves_although_its_path_has_gone_silent(database: str) -> None:
    """It has nothing left to do but to say so; that must not take until the kernel gives up."""
    address = urlsplit(database)
    assert address.hostname is not None
    assert address.port is not None
    proxy = Proxy("p", (address.hostname, address.port))
    await proxy.open()

    url = urlunsplit(address._replace(netloc=f"{address.username}@127.0.0.1:{proxy.port}"))
    try:
        async with watched(url, lease=1.0) as worker:
            leaving = worker.hold("leave")
            worker.drain()
            await leaving.wait()
            for connection in proxy.connections[:2]:
                connection.swallow_up = True
    finally:
        await proxy.close()


async def test_rows_that_a_person_ends_while_they_run_do_not_count_as_claimed(
    connect: Connect, database: str
) -> None:
    """1. All slots run rows. 2. A person sets these rows to cancelled. 3. Their handlers end. The next claim
    brings the refused completions beside its rows. If both count as claimed, slots are fewer than none.
    """
    psql, go_on = await connect(), asyncio.Event()

    async def run(job: Job) -> None:
        await go_on.wait()

    async with watched(database, run=run, concurrency=10) as worker:
        presence = worker.presence
        insert = "INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 10) RETURNING id"
        for row in await column(psql, insert):
            await worker.has_run(row)
        await psql.execute("UPDATE outbox SET state = 'cancelled' WHERE topic = 't'")
        rows = await column(psql, insert)
        go_on.set()
        await until(psql, "SELECT count(*) = 10 FROM outbox WHERE id = ANY (%s) AND state = 'done'", rows)
        assert worker.presence == presence

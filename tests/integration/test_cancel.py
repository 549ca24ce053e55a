"""Cancel: durable, then notified; a row that waits ends at once, one that runs when it has been stopped.

W runs the row, O is an operator.
"""

import asyncio
from datetime import timedelta

import pytest

from outwake import Cancelled, Job
from tests.conftest import Connect
from tests.support.roles import roles_of
from tests.support.sleepers import end_listener
from tests.support.steps import (
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
from tests.support.worker import hang, watched

CANCEL = "SELECT outbox_cancel(%s)"
ENDED = "SELECT state NOT IN ('ready', 'running') FROM outbox WHERE id = %s"


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT outbox_cancel({})",
        "UPDATE outbox SET cancel_requested_at = clock_timestamp() WHERE id = {}",
        "UPDATE outbox SET state = 'cancelled' WHERE id = {}",
    ],
)
async def test_row_that_waits_ends_at_once(statement: str, connect: Connect) -> None:
    conn = await connect()
    row = await add(conn)
    await conn.execute(statement.format(row).encode())
    assert await get(conn, row) == "cancelled"
    assert await get(conn, row, "finished_at") is not None
    assert await claim_ids(conn, await new_worker(conn)) == []


async def test_row_that_has_ended_stays_as_it_is(connect: Connect) -> None:
    conn = await connect()
    for state in ("done", "dead", "cancelled"):
        row = await add(conn, state=state)
        assert await one(conn, CANCEL, row) is None
        assert (await get(conn, row), await get(conn, row, "cancel_requested_at")) == (state, None)


@with_and_without
async def test_row_that_runs_is_stopped_when_the_worker_hears_of_it(
    rule: Rule, connect: Connect, database: str
) -> None:
    """1. W runs the row. 2. O cancels: W's handler is interrupted, and the row ends as cancelled."""
    psql = await connect()
    if rule == "taken out":
        await psql.execute("DROP TRIGGER outbox_cancel_requested ON outbox")
    async with watched(database, run=hang) as worker:
        row = await add(psql)
        await worker.has_run(row)
        assert await one(psql, CANCEL, row) == "running"
        if rule == "kept":
            await until(psql, ENDED, row)
            assert (await get(psql, row), await get(psql, row, "failures")) == ("cancelled", 0)
        else:
            await worker.hears_nothing_more(psql)
            assert await get(psql, row) == "running"


async def test_a_cancel_that_only_a_notification_tells_of_stops_nobody(
    connect: Connect, database: str
) -> None:
    """Any role may NOTIFY. 1. W runs a row. 2. X, who may connect and no more, notifies of a cancel. 3. W
    asks the table, and the handler runs on, in its first attempt.
    """
    psql = await connect()
    with roles_of(database) as roles:
        stranger = await connect(roles.login().url)
        async with watched(database, run=hang) as worker:
            row = await add(psql)
            await worker.has_run(row)
            for payload in (str(row), f"{row} ", "-1", "9" * 30, "x" * 7000, ""):
                await stranger.execute("SELECT pg_notify('outwake_cancel', %s)", (payload,))
                await worker.hears_nothing_more(psql)
            assert await one(psql, "SELECT (state::text, attempt)::text FROM outbox") == "(running,1)"
            assert worker.ran == [row]
            await psql.execute(CANCEL, (row,))
            await until(psql, ENDED, row)


@with_and_without
async def test_renewal_reads_the_mark(rule: Rule, connect: Connect, database: str) -> None:
    """1. W runs the row. 2. O cancels, and the notification is lost. 3. W renews its lease."""
    psql = await connect()
    await psql.execute("DROP TRIGGER outbox_cancel_requested ON outbox")
    if rule == "taken out":
        await take_out(psql, "outbox_renew", "o.cancel_requested_at IS NOT NULL", "false")
    async with watched(database, run=hang, lease=0.6) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await psql.execute(CANCEL, (row,))
        if rule == "kept":
            await until(psql, ENDED, row)
            assert await get(psql, row) == "cancelled"
        else:
            await worker.renewed(worker.renewals + 2)
            assert await get(psql, row) == "running"


async def test_reconnect_reads_the_mark(connect: Connect, database: str) -> None:
    """1. W runs the row, and loses its LISTEN connection. 2. O cancels. 3. W reconnects."""
    psql = await connect()
    async with watched(database, run=hang) as worker:
        row = await add(psql)
        await worker.has_run(row)
        held = worker.hold("connect")
        await end_listener(psql)
        await held.wait()
        await psql.execute(CANCEL, (row,))
        held.release()
        await until(psql, ENDED, row)
        assert await get(psql, row) == "cancelled"


async def test_between_two_steps_the_fence_reads_the_mark(connect: Connect, database: str) -> None:
    """1. W's handler has done its first step. 2. O cancels, and the notification is lost. 3. The handler
    begins its second: it is told, does nothing of it, and the row ends as cancelled.
    """
    psql = await connect()
    await psql.execute("DROP TRIGGER outbox_cancel_requested ON outbox")
    await psql.execute("CREATE TABLE effect (step integer)")
    goes_on = asyncio.Event()

    async def two_steps(job: Job) -> None:
        async with job.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (1)")
        await goes_on.wait()
        async with job.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (2)")

    async with watched(database, run=two_steps) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await until(psql, "SELECT count(*) = 1 FROM effect")
        await psql.execute(CANCEL, (row,))
        goes_on.set()
        await until(psql, ENDED, row)
        assert await get(psql, row) == "cancelled"
        assert await one(psql, "SELECT array_agg(step) FROM effect") == [1]


async def test_cancel_that_comes_as_the_row_is_claimed(connect: Connect) -> None:
    """1. W claims, and has not committed. 2. O cancels: waits. 3. W commits. 4. The mark is on a row that
    runs: nothing is lost.
    """
    a, o, psql = await connect(), await connect(), await connect()
    row = await add(psql)
    worker = await new_worker(psql)
    await a.execute("BEGIN")
    await claim(a, worker)
    cancelling = await starts(psql, o, CANCEL, row)
    await a.execute("COMMIT")
    assert await cancelling == "running"
    assert await one(psql, "SELECT outbox_fence(%s, %s, 1)", worker, row) is True


@pytest.mark.parametrize("first", ["completion", "cancel"])
async def test_first_commit_wins_and_the_answer_says_so(first: str, connect: Connect) -> None:
    """One has written and not committed, the other waits for it."""
    a, b, psql = await connect(), await connect(), await connect()
    row = await add(psql)
    worker = await new_worker(psql)
    await claim(psql, worker)
    complete = "SELECT outbox_complete(%s, ARRAY[%s::bigint], '{1}')"
    await a.execute("BEGIN")
    if first == "completion":
        await a.execute(complete, (worker, row))
        second = await starts(psql, b, CANCEL, row)
        await a.execute("COMMIT")
        assert await second is None
        assert await get(psql, row) == "done"
    else:
        await a.execute(CANCEL, (row,))
        second = await starts(psql, b, complete, worker, row)
        await a.execute("COMMIT")
        assert await second == row
        assert await get(psql, row) == "cancelled"


WAYS = {
    "outbox_complete": "SELECT outbox_complete(%(worker)s, ARRAY[%(row)s::bigint], '{1}')",
    "outbox_fail": "SELECT outbox_fail(%(worker)s, %(row)s, 1, 'failed')",
    "outbox_hand_back": "SELECT outbox_hand_back(%(worker)s, ARRAY[%(row)s::bigint], '{1}', '1 day')",
    "outbox_end_cancelled": "SELECT outbox_end_cancelled(%(worker)s, %(row)s, 1)",
    "outbox_free": "SELECT outbox_end_worker(%(worker)s, 'died')",
    "psql": "UPDATE outbox SET state = 'ready' WHERE id = %(row)s AND worker_id = %(worker)s",
}


@pytest.mark.parametrize("way", WAYS)
async def test_marked_row_ends_instead_of_going_back(way: str, connect: Connect) -> None:
    """Completion, retry, hand-back, rescue, and a hand at psql: a marked row ends as cancelled."""
    conn = await connect()
    row = await add(conn)
    worker = await new_worker(conn)
    await claim(conn, worker)
    await conn.execute(CANCEL, (row,))
    await run_out(conn, worker)
    await conn.execute(WAYS[way].encode(), {"worker": worker, "row": row})
    assert await get(conn, row) == "cancelled"


async def test_row_made_ready_with_its_mark_on_would_run_without_the_trigger(connect: Connect) -> None:
    """The rule behind them all is outbox_settle."""
    conn = await connect()
    row = await add(conn)
    worker = await new_worker(conn)
    await claim(conn, worker)
    await conn.execute(CANCEL, (row,))
    await conn.execute("DROP TRIGGER outbox_settle ON outbox")
    await conn.execute("UPDATE outbox SET state = 'ready' WHERE id = %s", (row,))
    assert await claim_ids(conn, worker) == [row]


@with_and_without
async def test_stop_without_a_mark_gives_the_row_back(rule: Rule, connect: Connect, database: str) -> None:
    """A handler raises Cancelled unasked: its row does not stay with a worker that no longer runs it."""
    psql = await connect()
    if rule == "taken out":
        await replace_body(
            psql,
            "outbox_end_cancelled",
            "sql",
            "UPDATE outbox SET state = 'cancelled' WHERE id = row_id AND attempt = row_attempt"
            " AND cancel_requested_at IS NOT NULL RETURNING true",
        )

    async def says_cancelled(job: Job) -> None:
        raise Cancelled("I think so")

    async with watched(database, run=says_cancelled, lease=0.6) as worker:
        row = await add(psql)
        await worker.has_run(row)
        if rule == "kept":
            query = "SELECT state <> 'running' OR attempt > 1 FROM outbox WHERE id = %s"
            await until(psql, query, row)
            assert await get(psql, row, "failures") == 0
        else:
            await worker.hears_nothing_more(psql)
            await until(psql, "SELECT lease_until < clock_timestamp() FROM worker")
            assert (await get(psql, row), worker.readiness()["running"]) == ("running", 0)


@pytest.mark.parametrize("payload", ["", "all", "1,2"])
async def test_cancel_that_is_not_understood_is_asked_for(
    payload: str, connect: Connect, database: str
) -> None:
    """A newer schema may say more. The worker asks the table, by a renewal, long before one is due."""
    psql = await connect()
    async with watched(database, run=hang) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await psql.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_cancel_requested")
        await psql.execute(CANCEL, (row,))
        await worker.hears_nothing_more(psql)
        assert (await get(psql, row), worker.renewals) == ("running", 0)
        await psql.execute("SELECT pg_notify('outwake_cancel', %s)", (payload,))
        await until(psql, "SELECT state = 'cancelled' FROM outbox WHERE id = %s", row)
        assert worker.renewals == 1


async def test_cancelled_row_can_be_retried(connect: Connect) -> None:
    """The mark goes with the retry, or the row would be cancelled again at once."""
    conn = await connect()
    row = await add(conn)
    await conn.execute(CANCEL, (row,))
    assert await one(conn, "SELECT outbox_retry(%s)", row) == "ready"
    assert await get(conn, row, "cancel_requested_at") is None
    assert await claim_ids(conn, await new_worker(conn)) == [row]


async def test_delayed_row_that_is_cancelled_leaves_no_deadline(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, available_at=await one(conn, "SELECT now() + %s", timedelta(days=1)))
    deadline = "SELECT row_due FROM outbox_next_deadline(%s, '{t}', '1 s', '1 h')"
    assert await one(conn, deadline, worker) is not None
    await conn.execute(CANCEL, (row,))
    assert await one(conn, deadline, worker) is None

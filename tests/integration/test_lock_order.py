"""Locks are taken in one order: the worker's row, then outbox rows by id (sql/outbox/functions/claim.sql).

Each test has two transactions that would wait for each other in another order. Then the server ends one of
them, after deadlock_timeout.
"""

import psycopg
import pytest

from tests.conftest import Connect
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim_ids,
    get,
    new_worker,
    replace_body,
    starts,
    take_out,
    with_and_without,
)

AS_GIVEN = """
DECLARE
    given bigint;
BEGIN
    FOREACH given IN ARRAY ids LOOP
        RETURN QUERY UPDATE outbox SET state = 'done', finished_at = clock_timestamp()
            WHERE id = given AND worker_id = finisher AND state = 'running' RETURNING outbox.id;
    END LOOP;
END
"""
"""outbox_complete, without the order."""

COMPLETE_AND_CLAIM = "SELECT count(*) FROM outbox_complete_and_claim(%s, %s, '{1}', '{t}', 1, '1 h', false)"


async def hasty(connect: Connect) -> Connection:
    """A connection on which a deadlock is found soon."""
    conn = await connect()
    await conn.execute("SET deadlock_timeout = '10 ms'")
    return conn


@with_and_without
async def test_a_completion_locks_its_worker_before_its_rows(rule: Rule, connect: Connect) -> None:
    """1. O has locked the worker's row. 2. The worker completes, and waits. 3. O deletes the worker: that
    waits for what the worker has locked of its rows.
    """
    psql, worker, operator = await connect(), await hasty(connect), await hasty(connect)
    me = await new_worker(psql)
    row = await add(psql)
    assert await claim_ids(psql, me) == [row]
    if rule == "taken out":
        lock = "me := outbox_myself(turner, connection, to_write => true);"
        await take_out(psql, "outbox_complete_and_claim", lock)
        complete = "ended := ARRAY(SELECT outbox_complete(turner, ids, attempts));"
        await take_out(psql, "outbox_complete_and_claim", complete, f"{complete} {lock}")
    await operator.execute("BEGIN")
    await operator.execute("SELECT FROM worker WHERE id = %s FOR NO KEY UPDATE", (me,))
    completing = await starts(psql, worker, COMPLETE_AND_CLAIM, me, [row])
    delete = "DELETE FROM worker WHERE id = %s"
    if rule == "kept":
        await operator.execute(delete, (me,))
        await operator.execute("COMMIT")
        with pytest.raises(psycopg.Error, match="has ended") as refused:
            await completing
        assert refused.value.sqlstate == "OW001"
        assert await get(psql, row) == "ready"
    else:
        with pytest.raises(psycopg.errors.DeadlockDetected):
            await operator.execute(delete, (me,))
            await completing


@with_and_without
async def test_a_completion_locks_its_rows_by_id(rule: Rule, connect: Connect) -> None:
    """1. A transaction has locked the first row. 2. A worker completes both, and waits. 3. The transaction
    locks the second.
    """
    psql, worker, other = await connect(), await hasty(connect), await hasty(connect)
    me = await new_worker(psql)
    rows = [await add(psql), await add(psql)]
    assert await claim_ids(psql, me, 2) == rows
    await other.execute("BEGIN")
    await other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", (rows[0],))
    if rule == "taken out":
        await replace_body(psql, "outbox_complete", "plpgsql", AS_GIVEN)
    complete = "SELECT count(*) FROM outbox_complete(%s, %s, '{1,1}')"
    completing = await starts(psql, worker, complete, me, rows[::-1])
    lock = "SELECT FROM outbox WHERE id = %s FOR UPDATE"
    if rule == "kept":
        await other.execute(lock, (rows[1],))
        await other.execute("COMMIT")
        assert await completing == 2
    else:
        with pytest.raises(psycopg.errors.DeadlockDetected):
            await other.execute(lock, (rows[1],))
            await completing

"""Order: rows of one ordering_key never run side by side, and run by id among those committed.

A and B are workers, P a producer.
"""

import pytest
from psycopg import errors

from tests.conftest import Connect
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim_ids,
    column,
    gate,
    get,
    new_worker,
    one,
    replace_body,
    run_out,
    take_out,
    with_and_without,
)
from tests.support.worker import watched

FREE = "BEGIN RETURN true; END"
"""A claim that asks nobody about the key."""


@pytest.mark.parametrize("without", ["nothing", "the key lock", "the key lock and the index"])
async def test_two_claims_at_once(without: str, connect: Connect) -> None:
    """† SKIP LOCKED alone lets two rows of a key run at once.

    1. A claims row 1, and has not committed. 2. B claims: row 1 is skipped as locked, row 2 is due.
    3. A commits. Without the key lock only the unique index holds, and B's claim fails; without that, too,
    both run.
    """
    a, b, psql = await connect(), await connect(), await connect()
    first, second = await add(psql, ordering_key="k"), await add(psql, ordering_key="k")
    worker_a, worker_b = await new_worker(a), await new_worker(b)
    if without != "nothing":
        await replace_body(psql, "outbox_take_key", "plpgsql", FREE)
    if without == "the key lock and the index":
        await psql.execute("DROP INDEX outbox_key_runs_once")
    await a.execute("BEGIN")
    assert await claim_ids(a, worker_a) == [first]
    if without == "the key lock":
        await b.execute("SET lock_timeout = '50ms'")
        with pytest.raises(errors.LockNotAvailable):  # it waits for A's entry in the index
            await claim_ids(b, worker_b)
        await a.execute("COMMIT")
        with pytest.raises(errors.UniqueViolation):
            await claim_ids(b, worker_b)
        return
    claimed = await claim_ids(b, worker_b)
    await a.execute("COMMIT")
    if without == "nothing":
        assert claimed == []
        assert await claim_ids(b, worker_b) == []
        assert (await get(psql, first), await get(psql, second)) == ("running", "ready")
    else:
        assert claimed == [second]
        assert (await get(psql, first), await get(psql, second)) == ("running", "running")


@with_and_without
async def test_key_is_judged_in_a_snapshot_taken_after_its_lock(rule: Rule, connect: Connect) -> None:
    """† The claim's own snapshot is older than the key's lock.

    1. A claims row 2, and has not committed; row 1, committed late, is not there yet. 2. P commits row 1.
    3. B's claim sees row 1 due and row 2 ready; it stops before it takes the key. 4. A commits: row 2 runs.
    5. B takes the key's lock and looks again. Taken out: it trusts what it saw.
    """
    a, b, psql = await connect(), await connect(), await connect()
    late = await connect()
    await late.execute("BEGIN")
    first = await add(late, ordering_key="k")
    second = await add(psql, ordering_key="k")
    worker_a, worker_b = await new_worker(a), await new_worker(b)
    if rule == "taken out":
        await replace_body(
            psql,
            "outbox_take_key",
            "plpgsql",
            "BEGIN RETURN pg_try_advisory_xact_lock(:lock_key, hashtext(key)); END",
        )
    await a.execute("BEGIN")
    assert await claim_ids(a, worker_a) == [second]
    await late.execute("COMMIT")
    async with gate(psql, "outbox_take_key(text, bigint)", "$1, $2") as held:
        query = "SELECT id FROM outbox_claim(%s, '{t}', 1, '1 h')"
        claiming = await held.reached_by(b, query, worker_b)
        await a.execute("COMMIT")
    if rule == "kept":
        assert await claiming is None
        assert (await get(psql, first, "blocked"), await get(psql, second)) == (True, "running")
    else:
        with pytest.raises(errors.UniqueViolation):
            await claiming


async def test_one_claim_takes_one_row_of_a_key(connect: Connect) -> None:
    """Five slots, three rows of a key and one of none: two rows start, by id."""
    psql = await connect()
    worker = await new_worker(psql)
    keyed = [await add(psql, ordering_key="k") for _ in range(3)]
    free = await add(psql)
    assert sorted(await claim_ids(psql, worker, 5)) == [keyed[0], free]
    assert await column(psql, "SELECT blocked FROM outbox WHERE topic = 't' ORDER BY id") == [
        False,
        True,
        True,
        False,
    ]


async def test_priority_does_not_reorder_within_a_key(connect: Connect) -> None:
    psql = await connect()
    worker = await new_worker(psql)
    first = await add(psql, ordering_key="k", priority=0)
    urgent = await add(psql, ordering_key="k", priority=9)
    assert await claim_ids(psql, worker, 5) in ([first], [])
    assert await claim_ids(psql, worker, 5) in ([first], [])
    assert (await get(psql, first), await get(psql, urgent)) == ("running", "ready")
    await psql.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [first]))
    assert await claim_ids(psql, worker, 5) == [urgent]


async def test_row_that_commits_late_runs_when_it_appears(connect: Connect) -> None:
    """1. P inserts row 1, open. 2. Row 2 of the key is claimed. 3. P commits. 4. Row 1 waits for row 2.
    5. Row 2 ends; row 3, which came in between, waits for row 1.
    """
    late, psql = await connect(), await connect()
    worker = await new_worker(psql)
    await late.execute("BEGIN")
    first = await add(late, ordering_key="k")
    second = await add(psql, ordering_key="k")
    assert await claim_ids(psql, worker, 5) == [second]
    await late.execute("COMMIT")
    third = await add(psql, ordering_key="k")
    assert await claim_ids(psql, worker, 5) == []
    await psql.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [second]))
    assert await claim_ids(psql, worker, 5) == [first]
    await psql.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [first]))
    assert await claim_ids(psql, worker, 5) == [third]


@with_and_without
@pytest.mark.parametrize(
    "end",
    [
        "SELECT outbox_complete(%s, %s, '{1}')",
        "SELECT outbox_fail(%s, (%s::bigint[])[1], 1, 'dead', permanent => true)",
        "UPDATE outbox SET state = 'cancelled' WHERE worker_id = %s AND id = ANY (%s)",
        "UPDATE outbox SET state = 'dead' WHERE worker_id = %s AND id = ANY (%s)",
        "DELETE FROM outbox WHERE worker_id = %s AND id = ANY (%s)",
        "UPDATE outbox SET ordering_key = 'l' WHERE worker_id = %s AND id = ANY (%s)",
    ],
)
async def test_end_of_a_row_frees_its_key(rule: Rule, end: str, connect: Connect, database: str) -> None:
    """1. Row 1 runs, row 2 of its key waits, W sleeps. 2. Row 1 ends, in whatever way. 3. W runs row 2."""
    psql = await connect()
    other = await new_worker(psql)
    first = await add(psql, ordering_key="k")
    assert await claim_ids(psql, other) == [first]
    second = await add(psql, ordering_key="k")
    if rule == "taken out":
        await psql.execute("DROP TRIGGER outbox_free_key ON outbox")
        await psql.execute("DROP TRIGGER outbox_free_key_by_delete ON outbox")
    async with watched(database) as worker:
        assert await get(psql, second, "blocked")
        await psql.execute(end.encode(), (other, [first]))
        if rule == "kept":
            await worker.has_run(second)
        else:
            await worker.hears_nothing_more(psql)
            assert await claim_ids(psql, other, 5) == []
            assert (await get(psql, second), worker.ran) == ("ready", [])


async def test_retrying_row_keeps_its_key(connect: Connect) -> None:
    """1. Row 1 fails and waits for its retry. 2. Row 2 of the key does not overtake it."""
    psql = await connect()
    worker = await new_worker(psql)
    first, second = await add(psql, ordering_key="k"), await add(psql, ordering_key="k")
    assert await claim_ids(psql, worker, 5) == [first]
    await psql.execute("SELECT outbox_fail(%s, %s, 1, 'again', interval '1 hour')", (worker, first))
    assert await claim_ids(psql, worker, 5) == []
    await psql.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (first,))
    assert await claim_ids(psql, worker, 5) == [first]
    await psql.execute("SELECT outbox_complete(%s, %s, '{2}')", (worker, [first]))
    assert await claim_ids(psql, worker, 5) == [second]


async def test_row_retried_by_hand_comes_first_again(connect: Connect) -> None:
    """1. Row 1 dies, row 2 runs. 2. Somebody retries row 1: it waits for row 2, then comes before row 3."""
    psql = await connect()
    worker = await new_worker(psql)
    rows = [await add(psql, ordering_key="k") for _ in range(3)]
    assert await claim_ids(psql, worker, 5) == [rows[0]]
    await psql.execute("SELECT outbox_fail(%s, %s, 1, 'no', permanent => true)", (worker, rows[0]))
    assert await claim_ids(psql, worker, 5) == [rows[1]]
    assert await one(psql, "SELECT outbox_retry(%s)", rows[0]) == "ready"
    assert await claim_ids(psql, worker, 5) == []
    await psql.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [rows[1]]))
    assert await claim_ids(psql, worker, 5) == [rows[0]]


async def test_rescued_row_keeps_its_key(connect: Connect) -> None:
    """1. A runs row 1 and is lost. 2. The rescued row 1 comes before row 2."""
    psql = await connect()
    lost, worker = await new_worker(psql), await new_worker(psql)
    first, second = await add(psql, ordering_key="k"), await add(psql, ordering_key="k")
    assert await claim_ids(psql, lost, 5) == [first]
    assert await claim_ids(psql, worker, 5) == []
    await run_out(psql, lost)
    assert await one(psql, "SELECT outbox_end_worker(%s, 'lost')", lost)
    assert await claim_ids(psql, worker, 5) == [first]
    assert await get(psql, second, "blocked")


@with_and_without
async def test_end_that_misses_the_mark(rule: Rule, connect: Connect) -> None:
    """A row is not left blocked by an end that came while a claim was marking it.

    1. Row 1 runs. 2. B's claim is about to mark row 2 as blocked, under the key's lock; it stays open.
    3. Row 1 ends; kept: its end waits for the key's lock. 4. B commits the mark. 5. Row 2 is free.
    """
    a, b, psql = await connect(), await connect(), await connect()
    worker_a, worker_b = await new_worker(a), await new_worker(b)
    first, second = await add(psql, ordering_key="k"), await add(psql, ordering_key="k")
    if rule == "taken out":
        await take_out(
            psql, "outbox_free_key", "PERFORM pg_advisory_xact_lock(:lock_key, hashtext(OLD.ordering_key));"
        )
    assert await claim_ids(a, worker_a) == [first]
    await b.execute("BEGIN")
    assert await claim_ids(b, worker_b) == []
    await a.execute("SET lock_timeout = '100ms'")
    end = "SELECT outbox_complete(%s, %s, '{1}')"
    if rule == "kept":
        with pytest.raises(errors.LockNotAvailable):
            await a.execute(end, (worker_a, [first]))
        await b.execute("COMMIT")
        await a.execute(end, (worker_a, [first]))
        assert await claim_ids(b, worker_b) == [second]
    else:
        await a.execute(end, (worker_a, [first]))
        await b.execute("COMMIT")
        assert await claim_ids(b, worker_b) == []
        assert await get(psql, second, "blocked")


@with_and_without
@pytest.mark.parametrize(
    "back",
    [
        "SELECT outbox_hand_back(%s, ARRAY[%s::bigint], '{1}')",
        "SELECT outbox_fail(%s, %s, 1, 'again', '0 s')",
        "UPDATE outbox SET state = 'ready' WHERE worker_id = %s AND id = %s",
    ],
)
async def test_row_that_goes_back_frees_the_late_one_that_it_blocked(
    rule: Rule, back: str, connect: Connect
) -> None:
    """1. Row 2 runs; row 1, committed late, was found blocked by it. 2. Row 2 is ready again. 3. Row 1 runs
    first. Taken out: row 1 waits for row 2 and row 2 for row 1, for ever.
    """
    late, psql = await connect(), await connect()
    worker = await new_worker(psql)
    if rule == "taken out":
        await take_out(psql, "outbox_free_key", "AND NOT (OLD.state = 'running' AND NEW.state = 'ready')")
    await late.execute("BEGIN")
    first = await add(late, ordering_key="k")
    second = await add(psql, ordering_key="k")
    assert await claim_ids(psql, worker, 5) == [second]
    await late.execute("COMMIT")
    assert await claim_ids(psql, worker, 5) == []
    await psql.execute(back.encode(), (worker, second))
    taken = await claim_ids(psql, worker, 5) + await claim_ids(psql, worker, 5)
    assert taken == ([first] if rule == "kept" else [])


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_end_of_a_keyed_row_needs_read_committed(level: str, connect: Connect) -> None:
    """An older snapshot may not show the row that waits: refused, with nothing changed."""
    psql = await connect()
    row = await add(psql, ordering_key="k")
    await psql.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="READ COMMITTED"):
        await psql.execute("DELETE FROM outbox WHERE topic = 't'")
    await psql.execute("ROLLBACK")
    assert await get(psql, row) == "ready"


async def test_backlog_of_one_key_does_not_stop_the_others(connect: Connect) -> None:
    """20,000 rows of a key come before one row of none: it is claimed at the second look at the latest,
    and the backlog goes on, row by row, without being read again.
    """
    psql = await connect()
    worker = await new_worker(psql)
    await psql.execute(
        "INSERT INTO outbox (topic, ordering_key) SELECT 't', 'k' FROM generate_series(1, 20000)"
    )
    free = await add(psql)
    taken = await claim_ids(psql, worker, 5) + await claim_ids(psql, worker, 5)
    assert taken == [taken[0], free]
    for attempt in range(3):
        await complete(psql, worker, taken[0])
        reads = await blocks_read(psql)
        (following,) = await claim_ids(psql, worker, 5)
        assert following == taken[0] + 1, attempt
        assert await blocks_read(psql) - reads < 1000
        taken = [following]


async def complete(conn: Connection, worker: object, row: int) -> None:
    assert await one(conn, "SELECT outbox_complete(%s, %s, '{1}')", worker, [row]) == row


async def blocks_read(conn: Connection) -> int:
    """Pages of outbox and its indexes that this session has looked at."""
    await conn.execute("SELECT pg_stat_force_next_flush()")
    return int(
        await one(
            conn,
            "SELECT heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit"
            " FROM pg_statio_user_tables WHERE relname = 'outbox'",
        )
    )

"""The cost of the hot statements does not grow with finished, delayed or blocked rows.

The plans are those that the functions really use: auto_explain reports every statement inside them, run
for real, with the buffers it touched. The planner is left alone, on analyzed tables.
"""

import pytest

from tests.conftest import Connect
from tests.support.plans import FEW_BUFFERS, explain
from tests.support.steps import Connection, add, claim, column, new_worker, one

MANY = 200_000

CLAIM = "SELECT id FROM outbox_claim(%s, '{t}', 1, '10 min')"
DEADLINE = "SELECT row_due FROM outbox_next_deadline(%s, '{t}', '6 s', '1 h')"
RESCUE = "SELECT outbox_rescue(%s, '1 ms', '1 h')"
PARKED_LOOK = "INSERT INTO outbox (topic) VALUES ('t')"

BACKLOGS = {
    "done": "INSERT INTO outbox (topic, state, finished_at, worker_id)"
            f" SELECT 't', 'done', now(), gen_random_uuid() FROM generate_series(1, {MANY})",
    "delayed": "INSERT INTO outbox (topic, available_at)"
               f" SELECT 't', now() + interval '1 day' FROM generate_series(1, {MANY})",
    "delayed, urgent": "INSERT INTO outbox (topic, priority, available_at)"
                       f" SELECT 't', 9, now() + interval '1 day' FROM generate_series(1, {MANY})",
    "blocked": "INSERT INTO outbox (topic, ordering_key, blocked)"
               f" SELECT 't', 'k' || n % 5, true FROM generate_series(1, {MANY // 4}) n",
    "other topics": f"INSERT INTO outbox (topic) SELECT 'x' || n % 50 FROM generate_series(1, {MANY // 4}) n",
}  # fmt: skip


@pytest.fixture(params=BACKLOGS)
async def loaded(request: pytest.FixtureRequest, connect: Connect) -> Connection:
    """A database with very many rows that no claim may touch, vacuumed as autovacuum would."""
    conn = await connect()
    if not await column(conn, "SELECT 1 FROM pg_available_extensions WHERE name = 'pg_stat_statements'"):
        pytest.skip("the server has no contrib modules")
    await conn.execute(BACKLOGS[request.param].encode())
    await conn.execute("VACUUM (ANALYZE) outbox")
    return conn


async def test_claim_and_the_rest_of_a_turn_read_a_few_pages(loaded: Connection) -> None:
    """One row is due among them all: found, completed, failed, renewed and missed for a few pages each."""
    worker, other = await new_worker(loaded), await new_worker(loaded)
    for _ in range(6):  # past the reading of catalogs, and past the plans made for given values
        await add(loaded)
        (first,) = await claim(loaded, worker)
        await loaded.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [first.id]))
        await loaded.execute(DEADLINE.encode(), (worker,))
        await loaded.execute("SELECT outbox_fail(%s, %s, 1, 'no')", (worker, first.id))
    rows = [await add(loaded) for _ in range(4)]

    claimed = await explain(loaded, CLAIM, worker)
    assert "outbox_claimable" in claimed.indexes()
    assert not claimed.read_in_full()
    assert claimed.buffers() < FEW_BUFFERS

    for query, values in (
        (DEADLINE, (worker,)),
        ("SELECT outbox_renew(%s, '6 s', ARRAY[%s::bigint], '{1}')", (worker, rows[0])),
        ("SELECT outbox_complete(%s, ARRAY[%s::bigint], '{1}')", (worker, rows[0])),
        (CLAIM, (worker,)),
        ("SELECT outbox_fence(%s, %s, 1)", (worker, rows[1])),
        ("SELECT outbox_fail(%s, %s, 1, 'no')", (worker, rows[1])),
        (PARKED_LOOK, ()),
        ("SELECT outbox_writers()", ()),
    ):
        plans = await explain(loaded, query, *values)
        assert not plans.read_in_full(), query
        assert plans.buffers() < FEW_BUFFERS, (query, plans.buffers())

    await claim(loaded, other)
    await loaded.execute("UPDATE worker SET lease_until = 'yesterday' WHERE id = %s", (other,))
    rescued = await explain(loaded, RESCUE, worker)
    assert "outbox_running" in rescued.indexes()
    assert not rescued.read_in_full()
    assert rescued.buffers() < FEW_BUFFERS
    assert await one(loaded, "SELECT state FROM outbox WHERE id = %s", rows[2]) == "ready"


async def test_key_is_taken_and_freed_by_its_index(connect: Connect) -> None:
    """With 20,000 rows waiting behind it, and as many of other keys finished."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, ordering_key, state, finished_at)"
        " SELECT 't', 'k' || n % 100, 'done', now() FROM generate_series(1, 20000) n"
    )
    await conn.execute(
        "INSERT INTO outbox (topic, ordering_key, blocked)"
        " SELECT 't', 'k', n > 1 FROM generate_series(1, 20000) n"
    )
    await conn.execute("VACUUM (ANALYZE) outbox")
    worker = await new_worker(conn)
    for turn in range(4):
        taken = await explain(conn, CLAIM, worker)
        row = await one(conn, "SELECT id FROM outbox WHERE state = 'running'")
        assert row is not None
        freed = await explain(conn, "SELECT outbox_complete(%s, ARRAY[%s::bigint], '{1}')", worker, row)
        for plans in (taken, freed):
            assert not plans.read_in_full()
            assert turn == 0 or plans.buffers() < FEW_BUFFERS  # the first reads catalogs
        assert "outbox_key" in freed.indexes()


async def test_these_tests_would_notice_a_missing_index(connect: Connect) -> None:
    """Without outbox_claimable, the same claim reads the whole table."""
    conn = await connect()
    await conn.execute("DROP INDEX outbox_claimable")
    await conn.execute(
        "INSERT INTO outbox (topic, state, finished_at)"
        " SELECT 't', 'done', now() FROM generate_series(1, 20000)"
    )
    await add(conn)
    await conn.execute("VACUUM (ANALYZE) outbox")
    plans = await explain(conn, CLAIM, await new_worker(conn))
    assert plans.read_in_full()
    assert plans.buffers() > FEW_BUFFERS

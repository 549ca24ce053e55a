"""A topic's limit holds over all workers, and whoever makes room under it wakes a sleeper."""

import pytest

from tests.conftest import Connect
from tests.support.steps import (
    Rule,
    add,
    claim,
    claim_ids,
    gate,
    new_worker,
    one,
    replace_body,
    with_and_without,
)
from tests.support.worker import watched

RUNNING = "SELECT count(*) FROM outbox WHERE topic = 't' AND state = 'running'"


@with_and_without
async def test_two_workers_do_not_count_the_same_free_place(rule: Rule, connect: Connect) -> None:
    """1. A claims under a limit of 1, and has not committed. 2. B claims: nobody runs yet, in its eyes."""
    a, b, psql = await connect(), await connect(), await connect()
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 1)")
    for _ in range(2):
        await add(psql)
    worker_a, worker_b = await new_worker(a), await new_worker(b)
    if rule == "taken out":
        await replace_body(psql, "outbox_topic_room", "plpgsql", WITHOUT_LOCK)
    await a.execute("BEGIN")
    assert len(await claim(a, worker_a)) == 1
    assert len(await claim(b, worker_b)) == (0 if rule == "kept" else 1)
    await a.execute("COMMIT")
    assert await one(psql, RUNNING) == (1 if rule == "kept" else 2)


WITHOUT_LOCK = """
BEGIN RETURN greatest(0, max_running - (
    SELECT count(*) FROM outbox o WHERE o.topic = name AND o.state = 'running' AND o.limited)); END
"""


@with_and_without
async def test_places_are_counted_in_a_snapshot_taken_after_the_lock(rule: Rule, connect: Connect) -> None:
    """1. A has claimed, not committed. 2. B's claim begins, and stops before it counts. 3. A commits.
    4. B counts: A's row runs. Taken out: it counts in its statement's snapshot.
    """
    a, b, psql = await connect(), await connect(), await connect()
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 1)")
    for _ in range(2):
        await add(psql)
    worker_a, worker_b = await new_worker(a), await new_worker(b)
    await a.execute("BEGIN")
    assert len(await claim(a, worker_a)) == 1
    async with gate(psql, "outbox_topic_room(text, integer)", "$1, $2") as held:
        if rule == "taken out":
            await psql.execute("ALTER FUNCTION outbox_topic_room_behind_gate STABLE")
            await psql.execute("ALTER FUNCTION outbox_topic_room STABLE")
        query = "SELECT id FROM outbox_claim(%s, '{t}', 1, '1 h')"
        claiming = await held.reached_by(b, query, worker_b)
        await a.execute("COMMIT")
    assert (await claiming is None) is (rule == "kept")
    assert await one(psql, RUNNING) == (1 if rule == "kept" else 2)


async def test_limit_holds_over_priorities(connect: Connect) -> None:
    """Due rows of several priorities are several ranges: together no more than there is room."""
    conn = await connect()
    await conn.execute("INSERT INTO topic (name, max_running) VALUES ('t', 3)")
    worker = await new_worker(conn)
    for priority in (0, 1, 2):
        for _ in range(2):
            await add(conn, priority=priority)
    other = await add(conn, "u")
    rows = await claim(conn, worker, 10, topics=("t", "u"))
    assert len([row for row in rows if row.topic == "t"]) == 3
    rows += await claim(conn, worker, 10, topics=("t", "u"))
    assert other in [row.id for row in rows]
    assert await one(conn, RUNNING) == 3


async def test_limit_of_zero_pauses_a_topic(connect: Connect, database: str) -> None:
    psql = await connect()
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 0)")
    await add(psql)
    async with watched(database) as worker:
        assert await worker.sleeps_for_ever(psql)
        assert worker.ran == []


@with_and_without
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE topic SET max_running = 1 WHERE name = 't'",
        "UPDATE topic SET max_running = NULL WHERE name = 't'",
        "DELETE FROM topic WHERE name = 't'",
        "UPDATE topic SET name = 'elsewhere' WHERE name = 't'",
        "INSERT INTO topic (name, max_running) VALUES ('t', 1)"
        " ON CONFLICT (name) DO UPDATE SET max_running = excluded.max_running",
    ],
)
async def test_change_of_a_limit_wakes(rule: Rule, change: str, connect: Connect, database: str) -> None:
    """1. A row waits, its topic is paused, W sleeps. 2. The limit is raised or removed."""
    psql = await connect()
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 0)")
    row = await add(psql)
    async with watched(database) as worker:
        if rule == "taken out":
            await psql.execute("DROP TRIGGER topic_changed ON topic")
        await psql.execute(change.encode())
        if rule == "kept":
            await worker.has_run(row)
        else:
            assert await worker.sleeps_for_ever(psql)


@with_and_without
@pytest.mark.parametrize(
    "end",
    [
        "SELECT outbox_complete(%s, ARRAY[%s::bigint], '{1}')",
        "SELECT outbox_fail(%s, %s, 1, 'later', '1 day')",
        "SELECT outbox_hand_back(%s, ARRAY[%s::bigint], '{1}', '1 day')",
        "DELETE FROM outbox WHERE worker_id = %s AND id = %s",
    ],
)
async def test_end_of_a_limited_row_wakes(rule: Rule, end: str, connect: Connect, database: str) -> None:
    """1. A runs the one row that may run, another waits, W sleeps. 2. A's row stops running. 3. W runs the
    other.
    """
    psql = await connect()
    await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 1)")
    other = await new_worker(psql)
    first = await add(psql)
    assert await claim_ids(psql, other) == [first]
    row = await add(psql)
    async with watched(database) as worker:
        if rule == "taken out":
            for trigger in ("outbox_made_room", "outbox_made_room_by_delete"):
                await psql.execute(f"DROP TRIGGER {trigger} ON outbox".encode())
        scans = worker.scans
        await psql.execute(end.encode(), (other, first))
        if rule == "kept":
            await worker.has_run(row)
        else:
            await worker.hears_nothing_more(psql)
            assert (worker.scans, worker.ran) == (scans, [])


async def test_handlers_are_told_the_topics_timeout(connect: Connect) -> None:
    conn = await connect()
    await conn.execute("INSERT INTO topic (name, timeout) VALUES ('t', '90 seconds')")
    await add(conn)
    (row,) = await claim(conn, await new_worker(conn))
    assert row.timeout is not None
    assert row.timeout.total_seconds() == 90

"""Claim: never more than asked for, by priority, then age, and only what may run."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import dict_row

import outwake
from outwake._claim import reconnect
from outwake.worker.engine.claims import Claims
from tests.conftest import Connect
from tests.support.steps import (
    LEASE,
    Rule,
    add,
    claim,
    claim_ids,
    column,
    gate,
    get,
    new_worker,
    one,
    run_out,
    take_out,
    until,
    with_and_without,
)
from tests.support.worker import hang, watched


@with_and_without
async def test_claim_locks_no_more_rows_than_it_claims(rule: Rule, connect: Connect) -> None:
    """1. A claims 5 of 100 rows, and has not committed. 2. B finds all the others: 95.

    Taken out: nothing in the statement that locks says how many, and A takes all.
    """
    a, b, psql = await connect(), await connect(), await connect()
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 100)")
    if rule == "taken out":
        await take_out(psql, "outbox_complete_and_claim", "            LIMIT v.room\n")
        await take_out(psql, "outbox_complete_and_claim", "        LIMIT slots\n")
    await a.execute("BEGIN")
    assert len(await claim(a, await new_worker(a), 5)) == (5 if rule == "kept" else 100)
    free = await column(b, "SELECT id FROM outbox WHERE topic = 't' FOR UPDATE SKIP LOCKED")
    assert len(free) == (95 if rule == "kept" else 0)


async def test_connection_that_makes_something_else_of_a_row(connect: Connect, database: str) -> None:
    """A caller's, on which rows are dicts."""
    psql = await connect()
    first, second = await add(psql), await add(psql)
    async with await psycopg.AsyncConnection.connect(database, row_factory=dict_row, autocommit=True) as own:
        worker = await outwake.register(own, ["t"], presence=1)
        tokens = [(row.id, row.attempt) for row in await outwake.claim(own, worker, ["t"], 2)]
        assert tokens == [(first, 1), (second, 1)]
        assert await outwake.renew(own, worker, tokens) == dict.fromkeys(tokens, False)
        async with own.transaction():
            assert not await outwake.fence(own, worker, tokens[0])
        assert await outwake.complete(own, worker, tokens[:1]) == {first}
        assert await outwake.fail(own, worker, tokens[1], "no", delay=timedelta(0)) == "ready"
        [again] = await outwake.claim(own, worker, ["t"], 2)
        assert await outwake.hand_back(own, worker, [(again.id, again.attempt)]) == {second}
        [again] = await outwake.claim(own, worker, ["t"], 2)
        assert await reconnect(own, worker, 2, []) == {second}


@with_and_without
async def test_row_updated_while_a_claim_scans_is_claimed_as_it_is(rule: Rule, connect: Connect) -> None:
    """1. A's claim has its snapshot, and no row yet. 2. A row is updated. 3. A locks it as it is now.

    Taken out: rows are found again by the version that was locked. The snapshot does not show it.
    """
    a, psql = await connect(), await connect()
    worker = await new_worker(a)
    row = await add(psql)
    await psql.execute("INSERT INTO topic VALUES ('t', 5)")  # so that the claim passes the gate
    if rule == "taken out":
        for text, instead in (
            ("SELECT o.id, o.ordering_key\n", "SELECT o.ctid AS version, o.id, o.ordering_key\n"),
            ("SELECT d.id, d.ordering_key,", "SELECT d.version, d.id, d.ordering_key,"),
            ("SELECT d.id, d.limited,", "SELECT d.version, d.id, d.limited,"),
            (
                "SELECT id, ordering_key, limited, timeout F",
                "SELECT version, id, ordering_key, limited, timeout F",
            ),
            (
                "SELECT id, ordering_key, limited, timeout\n",
                "SELECT version, id, ordering_key, limited, timeout\n",
            ),
            ("WHERE o.id >= a.id AND o.id <= a.id", "WHERE o.ctid = a.version"),
        ):
            await take_out(psql, "outbox_complete_and_claim", text, instead)
    async with gate(psql, "outbox_topic_room(text, integer)", "$1, $2") as closed:
        query = "SELECT payload FROM outbox_claim(%s, '{t}', 5, '1 min')"
        claimed = await closed.reached_by(a, query, worker)
        await psql.execute("UPDATE outbox SET payload = '[2]' WHERE id = %s", (row,))
    assert await claimed == ([2] if rule == "kept" else None)


@with_and_without
async def test_a_scan_in_vain_costs_no_commit(rule: Rule, connect: Connect) -> None:
    """One row wakes every worker asleep: those that find nothing take no lock, so that nothing is written.

    Taken out: the worker's row is locked all the same, which takes a transaction id and a commit on disk.
    """
    psql = await connect()
    worker = await new_worker(psql)
    if rule == "taken out":
        await take_out(psql, "outbox_complete_and_claim", "to_write => claimed > 0", "to_write => true")
    await psql.execute("BEGIN")
    assert await claim(psql, worker, 5) == []
    written = await one(psql, "SELECT pg_current_xact_id_if_assigned()")
    assert (written is None) == (rule == "kept")


async def test_claim_locks_no_more_rows_on_a_planner_led_astray(connect: Connect) -> None:
    """The selection is MATERIALIZED: statistics that make a nested loop look cheap change nothing.

    A table analyzed while empty, then filled; and every join but the nested loop forbidden.
    """
    a, b, psql = await connect(), await connect(), await connect()
    await psql.execute("ANALYZE outbox")
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 1000)")
    for setting in ("enable_hashjoin", "enable_mergejoin", "enable_bitmapscan", "enable_sort"):
        await a.execute(f"SET {setting} = off".encode())
    worker = await new_worker(a)
    await a.execute("BEGIN")
    assert len(await claim(a, worker, 7)) == 7
    assert len(await column(b, "SELECT id FROM outbox WHERE topic = 't' FOR UPDATE SKIP LOCKED")) == 993


async def test_hundreds_of_concurrent_claims_take_each_row_once(connect: Connect) -> None:
    """Eight workers, pipelined, drain 400 rows: each row is claimed exactly once, never more than asked."""
    psql = await connect()
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 400)")

    async def drain() -> list[int]:
        conn = await connect()
        worker, taken = await new_worker(conn), []
        while rows := await claim_ids(conn, worker, 7):
            assert len(rows) <= 7
            taken += rows
        return taken

    taken = [row for rows in await asyncio.gather(*(drain() for _ in range(8))) for row in rows]
    assert len(taken) == len(set(taken)) == 400


async def test_priority_then_age_then_id(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    young = await add(conn, available_at="2020-01-02")
    old = await add(conn, available_at="2020-01-01")
    low = await add(conn, available_at="2019-01-01", priority=-1)
    urgent = await add(conn, priority=5)
    twin = await add(conn, available_at="2020-01-02")
    assert [(await claim_ids(conn, worker))[0] for _ in range(5)] == [urgent, old, young, twin, low]


async def test_rows_not_due_are_left(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    await conn.execute(
        "INSERT INTO outbox (topic, available_at) VALUES ('t', clock_timestamp() + interval '1 day')"
    )
    due = await add(conn)
    assert await claim_ids(conn, worker, 5) == [due]
    later = "SELECT row_due BETWEEN '23 hours' AND '1 day' FROM outbox_next_deadline(%s, '{t}', '1 s', '1 h')"
    assert await one(conn, later, worker) is True


async def test_rows_of_other_topics_are_left(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    await add(conn, "other")
    assert await claim_ids(conn, worker, 5) == []
    query = "SELECT row_due FROM outbox_next_deadline(%s, '{t}', '1 s', '1 h')"
    assert await one(conn, query, worker) is None


async def test_turn_of_topics_decides_between_equal_priorities(connect: Connect) -> None:
    """A claim takes the topics in the order given; a higher priority of any topic comes first."""
    conn = await connect()
    worker = await new_worker(conn)
    a = [await add(conn, "a") for _ in range(3)]
    b = [await add(conn, "b") for _ in range(3)]
    urgent = await add(conn, "b", priority=1)
    assert await claim_ids(conn, worker, topics=("a", "b")) == [urgent]
    assert await claim_ids(conn, worker, topics=("b", "a")) == [b[0]]
    assert await claim_ids(conn, worker, topics=("a", "b")) == [a[0]]


async def test_busy_topic_does_not_starve_another(connect: Connect, database: str) -> None:
    """The worker rotates its topics: with one slot and a backlog of `a`, a row of `b` is among the first."""
    psql = await connect()
    async with watched(database, "a", "b", concurrency=1, started=False) as worker:
        held = worker.hold("claim")
        await held.wait()
        await psql.execute("INSERT INTO outbox (topic) SELECT 'a' FROM generate_series(1, 50)")
        row = await add(psql, "b")
        held.release()
        await worker.has_run(row)
        assert worker.ran.index(row) <= 3


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_claim_needs_read_committed(level: str, connect: Connect) -> None:
    """In an older snapshot the key's second look would see nothing new."""
    conn = await connect()
    worker = await new_worker(conn)
    await conn.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="READ COMMITTED"):
        await claim(conn, worker)


async def test_claim_raises_the_attempt_and_keeps_the_failures(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, traceparent="00-ab-cd-01", payload={"n": 1})
    (first,) = await claim(conn, worker)
    assert (first.id, first.attempt, first.failures, first.payload, first.traceparent) == (
        row, 1, 0, {"n": 1}, "00-ab-cd-01",
    )  # fmt: skip
    await outwake.hand_back(conn, worker, [(row, 1)])
    (second,) = await claim(conn, worker)
    assert (second.attempt, second.failures) == (2, 0)


async def test_claim_extends_the_lease_when_it_must(connect: Connect) -> None:
    """A lease of which more than half is left stays: a claim under load writes no worker row."""
    conn = await connect()
    worker = await new_worker(conn)

    async def lease() -> object:
        return await one(conn, "SELECT lease_until FROM worker WHERE id = %s", worker)

    assert await claim_ids(conn, worker) == []
    assert await lease() is None
    for _ in range(3):
        await add(conn)
    await claim(conn, worker)
    first = await lease()
    assert first is not None
    await claim(conn, worker)
    assert await lease() == first
    await run_out(conn, worker)
    await claim(conn, worker)
    assert await one(conn, "SELECT lease_until > clock_timestamp() FROM worker WHERE id = %s", worker)


async def test_claim_clears_the_flag_of_a_worker_whose_slots_are_full(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)

    async def parked_after(rows: int, slots: int, *, stay: bool) -> object:
        await conn.execute("SELECT outbox_park(%s)", (worker,))
        for _ in range(rows):
            await add(conn)
        claimed = await outwake.claim(conn, worker, ["t"], slots, lease=LEASE, stay_parked=stay)
        assert len(claimed) == rows
        return await one(conn, "SELECT parked FROM worker WHERE id = %s", worker)

    assert await parked_after(1, 2, stay=True) is True
    assert await parked_after(2, 2, stay=True) is False
    assert await parked_after(1, 2, stay=False) is False
    assert await parked_after(0, 2, stay=False) is True


async def test_completion_and_claim_are_one_commit(connect: Connect) -> None:
    """A turn that fails in its claim has completed nothing."""
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn)
    await claim(conn, worker)
    await conn.execute("UPDATE worker SET ended_at = clock_timestamp() WHERE id = %s", (worker,))
    await conn.execute("UPDATE outbox SET state = 'running' WHERE id = %s", (row,))
    with pytest.raises(outwake.WorkerEnded):
        await outwake.complete_and_claim(conn, worker, [(row, 1)], ["t"], 1, lease=LEASE)
    assert await get(conn, row) == "running"


async def test_completed_key_is_free_for_the_claim_of_the_same_turn(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    first, second = await add(conn, ordering_key="k"), await add(conn, ordering_key="k")
    assert await claim_ids(conn, worker, 5) == [first]
    rows, refused = await outwake.complete_and_claim(conn, worker, [(first, 1)], ["t"], 5, lease=LEASE)
    assert ([row.id for row in rows], refused) == ([second], set())


async def test_lease_is_renewed_when_the_first_claim_fills_all_slots(connect: Connect, database: str) -> None:
    """Its row is not read yet when the worker goes to sleep."""
    psql = await connect()
    row = await add(psql)
    async with watched(database, run=hang, concurrency=1, lease=1.0, started=False) as worker:
        await worker.has_run(row)
        await worker.renewed(2)
        assert await get(psql, row, "attempt") == 1


async def test_handler_that_ends_while_a_completion_is_on_its_way(
    connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A has ended, and its completion is sent. 2. B ends. 3. The answer comes: B is not forgotten."""
    psql = await connect()
    a, b = await add(psql), await add(psql)
    gates = {a: asyncio.Event(), b: asyncio.Event()}

    async def run(job: outwake.Job) -> None:
        await gates[job.row.id].wait()

    complete = Claims.complete

    async def overlaps(self: Claims, tokens: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
        refused = await complete(self, tokens)
        gates[b].set()
        while b in worker.parts.running.attempts:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        return refused

    monkeypatch.setattr(Claims, "complete", overlaps)
    async with watched(database, run=run, concurrency=3) as worker:
        await worker.has_run(a)
        await worker.has_run(b)
        gates[a].set()
        await until(psql, "SELECT count(*) = 2 FROM outbox WHERE topic = 't' AND state = 'done'")

"""The unique key: no two unfinished rows share it, and a duplicate does what its producer chose."""

import asyncio

import psycopg
import pytest
from psycopg.types.json import Jsonb

from outwake import Duplicate, enqueue
from outwake._enqueue import OnDuplicate
from tests.conftest import Connect
from tests.support.steps import Rule, claim_ids, column, get, new_worker, one, waits, with_and_without
from tests.support.worker import watched


async def test_reject(connect: Connect) -> None:
    conn = await connect()
    row = await enqueue(conn, "t", unique_key="u")
    with pytest.raises(Duplicate) as raised:
        await enqueue(conn, "t", unique_key="u")
    assert (raised.value.row_id, raised.value.unique_key) == (row, "u")


async def test_rejected_duplicate_leaves_the_producers_transaction_usable(connect: Connect) -> None:
    conn = await connect()
    await enqueue(conn, "t", unique_key="u")
    async with conn.transaction():
        with pytest.raises(Duplicate):
            await enqueue(conn, "t", unique_key="u")
        other = await enqueue(conn, "t", unique_key="v")
    assert await get(conn, other) == "ready"


async def test_keep(connect: Connect) -> None:
    conn = await connect()
    row = await enqueue(conn, "t", {"n": 1}, unique_key="u")
    assert await enqueue(conn, "t", {"n": 2}, unique_key="u", on_duplicate="keep") == row
    assert await get(conn, row, "payload") == {"n": 1}


async def test_replace(connect: Connect) -> None:
    conn = await connect()
    row = await enqueue(conn, "t", {"n": 1}, unique_key="u")
    again = await enqueue(conn, "t", {"n": 2}, unique_key="u", priority=3, on_duplicate="replace")
    assert again == row
    assert (await get(conn, row, "payload"), await get(conn, row, "priority")) == ({"n": 2}, 3)


async def test_replace_does_not_touch_a_row_that_runs(connect: Connect) -> None:
    conn = await connect()
    row = await enqueue(conn, "t", {"n": 1}, unique_key="u")
    await claim_ids(conn, await new_worker(conn))
    with pytest.raises(Duplicate):
        await enqueue(conn, "t", {"n": 2}, unique_key="u", on_duplicate="replace")
    assert await get(conn, row, "payload") == {"n": 1}


@pytest.mark.parametrize("state", ["done", "dead", "cancelled"])
async def test_finished_row_frees_the_key(state: str, connect: Connect) -> None:
    conn = await connect()
    first = await enqueue(conn, "t", unique_key="u")
    await conn.execute("UPDATE outbox SET state = %s WHERE id = %s", (state, first))
    assert await enqueue(conn, "t", unique_key="u") != first


async def test_retry_by_hand_does_not_break_the_key(connect: Connect) -> None:
    """A dead row whose key another has taken since stays dead."""
    conn = await connect()
    first = await enqueue(conn, "t", unique_key="u")
    await conn.execute("UPDATE outbox SET state = 'dead' WHERE id = %s", (first,))
    await enqueue(conn, "t", unique_key="u")
    assert await one(conn, "SELECT outbox_retry(%s)", first) is None
    assert await get(conn, first) == "dead"


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("choice", ["reject", "keep", "replace"])
async def test_duplicate_of_a_row_not_committed_yet(
    choice: OnDuplicate, commits: bool, connect: Connect
) -> None:
    """1. A inserts, and has not committed. 2. B enqueues the same key: waits. 3. A commits, or rolls back."""
    a, b, psql = await connect(), await connect(), await connect()
    await a.execute("BEGIN")
    first = await enqueue(a, "t", {"n": 1}, unique_key="u")
    second = asyncio.create_task(enqueue(b, "t", {"n": 2}, unique_key="u", on_duplicate=choice))
    await waits(psql, b)
    await a.execute("COMMIT" if commits else "ROLLBACK")
    if commits and choice == "reject":
        with pytest.raises(Duplicate):
            await second
    elif commits:
        assert await second == first
        assert await get(psql, first, "payload") == {"n": 2 if choice == "replace" else 1}
    else:
        assert await get(psql, await second, "payload") == {"n": 2}
    assert await one(psql, "SELECT count(*) FROM outbox WHERE unique_key = 'u'") == 1


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("choice", ["reject", "keep", "replace"])
async def test_the_function_waits_for_such_a_row_too(choice: str, commits: bool, connect: Connect) -> None:
    a, b, psql = await connect(), await connect(), await connect()
    call = "SELECT outwake.enqueue('t', %s, unique_key => 'u', on_duplicate => %s)"
    await a.execute("BEGIN")
    first = await one(a, call, Jsonb({"n": 1}), choice)
    second = asyncio.create_task(one(b, call, Jsonb({"n": 2}), choice))
    await waits(psql, b)
    await a.execute("COMMIT" if commits else "ROLLBACK")
    if commits and choice == "reject":
        with pytest.raises(psycopg.errors.UniqueViolation, match=f"row {first}"):
            await second
    elif commits:
        assert await second == first
        assert await get(psql, first, "payload") == {"n": 2 if choice == "replace" else 1}
    else:
        assert await get(psql, await second, "payload") == {"n": 2}
    assert await one(psql, "SELECT count(*) FROM outbox WHERE unique_key = 'u'") == 1


@with_and_without
async def test_concurrent_duplicates_leave_one_row(rule: Rule, connect: Connect) -> None:
    """Twenty producers at once, each told the same id. Taken out: the index is not unique."""
    psql = await connect()
    if rule == "taken out":
        await psql.execute("DROP INDEX outbox_unique_key")
        for _ in range(2):
            await psql.execute("INSERT INTO outbox (topic, unique_key) VALUES ('t', 'u')")
        assert await one(psql, "SELECT count(*) FROM outbox WHERE unique_key = 'u'") == 2
        return
    producers = [await connect() for _ in range(20)]
    ids = await asyncio.gather(
        *(enqueue(conn, "t", unique_key="u", on_duplicate="keep") for conn in producers)
    )
    assert await column(psql, "SELECT id FROM outbox WHERE unique_key = 'u'") == [ids[0]]
    assert set(ids) == {ids[0]}


@with_and_without
async def test_replacement_that_is_earlier_wakes(rule: Rule, connect: Connect, database: str) -> None:
    """1. A row is due tomorrow, W sleeps. 2. A duplicate replaces it, due now. 3. W runs it."""
    psql = await connect()
    tomorrow = await one(psql, "SELECT now() + interval '1 day'")
    row = await enqueue(psql, "t", unique_key="u", available_at=tomorrow)
    async with watched(database) as worker:
        if rule == "taken out":
            await psql.execute("DROP TRIGGER outbox_settle ON outbox")
        assert await enqueue(psql, "t", unique_key="u", on_duplicate="replace") == row
        if rule == "kept":
            await worker.has_run(row)
        else:
            await worker.hears_nothing_more(psql)
            assert await worker.asleep() > 80000


async def test_retry_of_many_skips_a_row_whose_key_is_taken(connect: Connect) -> None:
    """Of two dead rows with one key, and one whose key an unfinished row has. The answer says which."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, state, unique_key, finished_at)"
        " SELECT 't', 'dead', k, now() FROM unnest(ARRAY['u', 'u', 'v', NULL, NULL]) AS k"
    )
    await enqueue(conn, "t", unique_key="v")
    notices: list[str] = []
    conn.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    states = await column(conn, "SELECT outbox_retry(id) FROM outbox WHERE state = 'dead' ORDER BY id")
    assert states == ["ready", None, None, "ready", "ready"]
    assert notices == [
        "row 2 stays as it is: row 1 has its unique_key and is not finished",
        "row 3 stays as it is: row 6 has its unique_key and is not finished",
    ]

"""The fence: what an attempt writes after its row was taken away changes nothing.

W is the worker whose attempt is stale. "Taken away": rescued, handed back and claimed again, cancelled,
or retried by hand.
"""

import itertools
from typing import Any
from uuid import UUID

import pytest

import outwake
from outwake import Claimed, Fenced, Job
from outwake.worker.engine.lease import Lease
from tests.conftest import Connect
from tests.support.steps import (
    LEASE,
    Connection,
    Rule,
    add,
    claim,
    get,
    new_worker,
    one,
    run_out,
    starts,
    take_out,
    with_and_without,
)

LOSSES = {
    "rescued": "SELECT outbox_end_worker(%(worker)s, 'lost')",
    "handed back": "SELECT outbox_hand_back(%(worker)s, ARRAY[%(row)s::bigint], '{1}')",
    "cancelled": "UPDATE outbox SET state = 'cancelled' WHERE id = %(row)s",
    "dead": "UPDATE outbox SET state = 'dead' WHERE id = %(row)s",
    "retried": "UPDATE outbox SET state = 'dead' WHERE id = %(row)s;SELECT outbox_retry(%(row)s)",
}
SESSION = "00000000-0000-7000-8000-000000000001"
PROMPT = "00000000-0000-7000-8000-000000000002"
WRITES = {
    "complete": "SELECT outbox_complete(%(worker)s, ARRAY[%(row)s::bigint], '{1}')",
    "complete and claim":
        "SELECT topic FROM outbox_complete_and_claim(%(worker)s, ARRAY[%(row)s::bigint], '{1}', '{none}',"
        " 1, '1 h', false)",
    "fail": "SELECT outbox_fail(%(worker)s, %(row)s, 1, 'stale')",
    "hand back": "SELECT outbox_hand_back(%(worker)s, ARRAY[%(row)s::bigint], '{1}')",
    "end cancelled": "SELECT outbox_end_cancelled(%(worker)s, %(row)s, 1)",
    "fence": "SELECT outbox_fence(%(worker)s, %(row)s, 1)",
    "append":
        f"SELECT last_seq FROM message_append(%(worker)s, %(row)s, 1, '{SESSION}', '{PROMPT}', '{{1}}')",
}  # fmt: skip


async def snapshot(conn: Connection) -> list[Any]:
    """All that an attempt could change."""
    query = "SELECT to_jsonb(o) FROM outbox o UNION ALL SELECT to_jsonb(m) FROM message m"
    return await (await conn.execute(query)).fetchall()


async def claimed_once(conn: Connection) -> tuple[UUID, Claimed]:
    """A session's row that W has claimed."""
    await conn.execute(
        "INSERT INTO session (id, repo, target_branch, branch, title) VALUES (%s, 'r', 'm', 'b', 't')",
        (SESSION,),
    )
    await conn.execute(
        "INSERT INTO prompt (id, session_id, text) VALUES (%s, %s, 'do it')", (PROMPT, SESSION)
    )
    worker = await new_worker(conn)
    await add(conn)
    (row,) = await claim(conn, worker)
    return worker, row


@pytest.mark.parametrize("write", WRITES)
async def test_stale_write_changes_nothing(write: str, connect: Connect) -> None:
    """1. W claims. 2. The row is taken away, and perhaps claimed again. 3. W writes under its attempt."""
    conn = await connect()
    worker, row = await claimed_once(conn)
    names = {"worker": worker, "row": row.id}
    for loss, claimed_again in itertools.product(LOSSES, ["by nobody", "by another", "by the same"]):
        await conn.execute("BEGIN")
        for statement in LOSSES[loss].split(";"):
            await conn.execute(statement.encode(), names)
        if loss == "rescued":  # so that the same worker may try to claim, and does not fail for that
            await conn.execute("UPDATE worker SET ended_at = NULL WHERE id = %s", (worker,))
        if claimed_again != "by nobody" and await get(conn, row.id) == "ready":
            again = worker if claimed_again == "by the same" else await new_worker(conn)
            assert [r.attempt for r in await claim(conn, again)] == [2]
        before = await snapshot(conn)
        assert await value(conn, WRITES[write], names) is None
        assert await snapshot(conn) == before, (loss, claimed_again)
        await conn.execute("ROLLBACK")


async def value(conn: Connection, query: str, names: dict[str, Any]) -> Any:
    row = await (await conn.execute(query.encode(), names)).fetchone()
    return None if row is None else row[0]


@pytest.mark.parametrize(
    ("write", "function", "condition"),
    [
        ("complete", "outbox_complete", " AND o.attempt = t.attempts[width_bucket(o.id, t.ids)]"),
        ("fail", "outbox_fail", "AND o.attempt = row_attempt "),
        ("hand back", "outbox_hand_back", "AND o.attempt = f.attempt "),
        ("end cancelled", "outbox_end_cancelled", "AND o.attempt = row_attempt "),
        ("fence", "outbox_fence", "AND o.attempt = row_attempt "),
        ("append", "outbox_fence", "AND o.attempt = row_attempt "),
    ],
)
async def test_without_the_attempt_a_stale_write_takes(
    write: str, function: str, condition: str, connect: Connect
) -> None:
    """The same, W claiming again, with the attempt taken out of the fence: W's first attempt writes."""
    conn = await connect()
    worker, row = await claimed_once(conn)
    names = {"worker": worker, "row": row.id}
    await take_out(conn, function, condition)
    await conn.execute(LOSSES["handed back"].encode(), names)
    assert [r.attempt for r in await claim(conn, worker)] == [2]
    await conn.execute("SELECT outbox_cancel(%s)", (row.id,))
    assert await value(conn, WRITES[write], names) is not None


@pytest.mark.parametrize(
    ("write", "function"),
    [
        ("complete", "outbox_complete"),
        ("fail", "outbox_fail"),
        ("hand back", "outbox_hand_back"),
        ("fence", "outbox_fence"),
    ],
)
async def test_without_the_state_a_stale_write_takes(write: str, function: str, connect: Connect) -> None:
    """The same, the row ended and not claimed again: `state = 'running'` is part of the fence."""
    conn = await connect()
    worker, row = await claimed_once(conn)
    await take_out(conn, function, " AND o.state || '' = 'running'")
    await conn.execute("UPDATE outbox SET state = 'dead' WHERE id = %s", (row.id,))
    assert await value(conn, WRITES[write], {"worker": worker, "row": row.id}) is not None


async def test_library_tells_of_the_fence(connect: Connect) -> None:
    """What outwake.claim's functions say to a stale attempt."""
    conn = await connect()
    worker, row = await claimed_once(conn)
    token = (row.id, row.attempt)
    await outwake.hand_back(conn, worker, [token])
    assert await outwake.complete(conn, worker, [token]) == set()
    assert await outwake.hand_back(conn, worker, [token]) == set()
    with pytest.raises(Fenced):
        await outwake.fail(conn, worker, token, "stale")
    with pytest.raises(Fenced):
        await outwake.fence(conn, worker, token)
    rows, refused = await outwake.complete_and_claim(conn, worker, [token], ["t"], 1, lease=LEASE)
    assert ([r.attempt for r in rows], refused) == ([2], {token})
    assert await outwake.renew(conn, worker, [token, (row.id, 2)]) == {(row.id, 2): False}


def job_of(worker: UUID, row: Claimed, connect: Connect) -> Job:
    class Pool:
        def __init__(self) -> None:
            self.conn: Connection

        async def __aenter__(self) -> Connection:
            self.conn = await connect()
            return self.conn

        async def __aexit__(self, *error: object) -> None:
            await self.conn.close()

    return Job(row, worker, Lease(600, 600, lambda: None), Pool)


@with_and_without
async def test_fenced_transaction_that_is_first(rule: Rule, connect: Connect) -> None:
    """A check and then a write is not enough: the fence holds a lock on the row.

    1. W's handler begins its transaction, writes, has not committed. 2. W is rescued: the rescue leaves the
    row that is locked. 3. The handler completes and commits: all of it is before the rescue. Taken out: the
    row goes back in between, and the effect stays all the same.
    """
    psql, rescuer = await connect(), await connect()
    worker, row = await claimed_once(psql)
    await psql.execute("CREATE TABLE effect (attempt integer)")
    if rule == "taken out":
        await take_out(psql, "outbox_fence", "\n    FOR NO KEY UPDATE")
    job = job_of(worker, row, connect)
    async with job.transaction() as conn:
        await conn.execute("INSERT INTO effect VALUES (1)")
        assert await one(rescuer, "SELECT outbox_end_worker(%s, 'lost')", worker)
        if rule == "kept":
            await job.complete(conn)
    assert await effects(psql) == 1
    assert await get(psql, row.id) == ("done" if rule == "kept" else "ready")
    assert job.settled is (rule == "kept")


@with_and_without
async def test_rescue_that_is_first(rule: Rule, connect: Connect) -> None:
    """1. W is rescued, not committed. 2. Its handler begins a transaction: it waits, and is then fenced."""
    psql, rescuer, writer = await connect(), await connect(), await connect()
    worker, row = await claimed_once(psql)
    if rule == "taken out":
        await take_out(psql, "outbox_fence", "\n    FOR NO KEY UPDATE")
    await rescuer.execute("BEGIN")
    assert await one(rescuer, "SELECT outbox_end_worker(%s, 'lost')", worker)
    query, token = "SELECT outbox_fence(%s, %s, %s)", (worker, row.id, row.attempt)
    if rule == "kept":
        fencing = await starts(psql, writer, query, *token)
        await rescuer.execute("COMMIT")
        assert await fencing is None
    else:
        assert await one(writer, query, *token) is False
        await rescuer.execute("COMMIT")


async def effects(conn: Connection) -> int:
    return int(await one(conn, "SELECT count(*) FROM effect"))


async def test_handler_transaction_of_a_stale_attempt(connect: Connect) -> None:
    """Fenced before anything is written; Fenced at completion, and then all of it is rolled back."""
    psql = await connect()
    worker, row = await claimed_once(psql)
    await psql.execute("CREATE TABLE effect (attempt integer)")
    job = job_of(worker, row, connect)
    await run_out(psql, worker)
    await psql.execute("SELECT outbox_end_worker(%s, 'lost')", (worker,))
    with pytest.raises(Fenced):
        async with job.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (1)")
    own = await connect()
    with pytest.raises(Fenced):
        await writes_and_completes(own, job)
    assert (await effects(psql), job.settled) == (0, False)


async def writes_and_completes(conn: Connection, job: Job) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO effect VALUES (2)")
        await job.complete(conn)


async def test_settled_only_once_committed(connect: Connect) -> None:
    """A transaction that completes the row and then fails leaves it running, for the worker to settle."""
    psql = await connect()
    worker, row = await claimed_once(psql)
    job = job_of(worker, row, connect)
    with pytest.raises(ZeroDivisionError):
        await completes_and_fails(job)
    assert (await get(psql, row.id), job.settled) == ("running", False)


async def completes_and_fails(job: Job) -> None:
    async with job.transaction() as conn:
        await job.complete(conn)
        raise ZeroDivisionError


async def test_attempt_is_never_lowered(connect: Connect) -> None:
    """Not by a hand-back, a retry by hand, a rescue or a failure: it is the token."""
    conn = await connect()
    worker, row = await claimed_once(conn)
    seen = [row.attempt]
    for loss in LOSSES:
        for statement in LOSSES[loss].replace("'{1}'", f"'{{{seen[-1]}}}'").split(";"):
            await conn.execute(statement.encode(), {"worker": worker, "row": row.id})
        await conn.execute("SELECT outbox_retry(%s)", (row.id,))
        worker = await new_worker(conn)
        await conn.execute("UPDATE outbox SET available_at = clock_timestamp()")
        seen += [r.attempt for r in await claim(conn, worker)]
    assert seen == [1, 2, 3, 4, 5, 6]

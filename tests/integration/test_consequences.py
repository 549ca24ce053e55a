"""Whoever ends a session's row, its consequences follow in the same transaction: the prompt ends, the
session's status is set, and a sandbox that is held becomes one row of topic sandbox.return.
"""

from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

import outwake
from tests.conftest import Connect
from tests.support.steps import (
    LEASE,
    Connection,
    Rule,
    add,
    column,
    get,
    new_worker,
    one,
    starts,
    take_out,
    with_and_without,
)

ENDS = {
    "completion": ("SELECT outbox_complete(%(worker)s, ARRAY[%(row)s::bigint], '{1}')", "succeeded", None),
    "permanent failure": (
        "SELECT outbox_fail(%(worker)s, %(row)s, 1, 'no branch', NULL, true)", "failed", "no branch"),
    "failures spent": ("SELECT outbox_fail(%(worker)s, %(row)s, 1, 'flaky')", "failed", "flaky"),
    "rescue": ("SELECT outbox_end_worker(%(worker)s, 'it died')", "failed", "it died"),
    "deleted worker": ("DELETE FROM worker WHERE id = %(worker)s", "failed", "its worker was deleted"),
    "dead by hand": ("UPDATE outbox SET state = 'dead' WHERE id = %(row)s", "failed", "given up"),
    "done by hand": ("UPDATE outbox SET state = 'done' WHERE id = %(row)s", "succeeded", None),
    "cancelled by hand": (
        "UPDATE outbox SET state = 'cancelled' WHERE id = %(row)s", "cancelled", "cancelled"),
    "cancel, then hand-back": (
        "SELECT outbox_cancel(%(row)s);SELECT outbox_hand_back(%(worker)s, ARRAY[%(row)s::bigint], '{1}')",
        "cancelled", "cancelled"),
    "deleted row": ("DELETE FROM outbox WHERE id = %(row)s", "cancelled", "cancelled"),
}  # fmt: skip


async def add_session(conn: Connection, *, sandbox: bool = True) -> UUID:
    query = (
        "INSERT INTO session (repo, target_branch, branch, title, sandbox)"
        " VALUES ('r', 'main', gen_random_uuid()::text, 't', %s) RETURNING id"
    )
    held = '{"item": {"host": "h"}, "borrow_token": "secret"}' if sandbox else None
    session: UUID = await one(conn, query, held)
    return session


async def add_turn(conn: Connection, session: UUID) -> tuple[UUID, int]:
    """A prompt and its row. The row has one attempt."""
    prompt = await one(
        conn, "INSERT INTO prompt (session_id, text) VALUES (%s, 'do it') RETURNING id", session
    )
    row = await add(
        conn,
        "session.run",
        ordering_key=f"session:{session}",
        payload={"session_id": str(session), "prompt_id": str(prompt)},
        max_attempts=1,
    )
    return prompt, row


async def status(conn: Connection, session: UUID) -> str:
    return str(await one(conn, "SELECT inbox_status FROM session WHERE id = %s", session))


async def returns(conn: Connection) -> list[Any]:
    return await column(conn, "SELECT payload FROM outbox WHERE topic = 'sandbox.return'")


async def run(conn: Connection, worker: UUID) -> list[int]:
    return [row.id for row in await outwake.claim(conn, worker, ["session.run"], 5, lease=LEASE)]


@with_and_without
@pytest.mark.parametrize("end", ENDS)
async def test_consequences(rule: Rule, end: str, connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    session = await add_session(conn)
    prompt, row = await add_turn(conn, session)
    assert await run(conn, worker) == [row]
    assert await status(conn, session) == "pending"
    assert await one(conn, "SELECT status FROM prompt WHERE id = %s", prompt) == "running"
    if rule == "taken out":
        await conn.execute("DROP TRIGGER session_follow ON outbox")
        await conn.execute("DROP TRIGGER session_follow_delete ON outbox")
    statements, verdict, reason = ENDS[end]
    for statement in statements.split(";"):
        await conn.execute(statement.encode(), {"worker": worker, "row": row})
    if rule == "taken out":  # the fault of the old system: it looks busy for ever, and leaks
        assert (await status(conn, session), await returns(conn)) == ("pending", [])
        return
    assert await status(conn, session) == "completed"
    found = await (
        await conn.execute("SELECT status, reason, finished_at IS NOT NULL FROM prompt")
    ).fetchall()
    assert found == [(verdict, reason, True)]
    (payload,) = await returns(conn)
    assert payload["sandbox"]["borrow_token"] == "secret"
    assert await one(conn, "SELECT sandbox FROM session") is None
    query = "SELECT max_attempts, priority FROM outbox WHERE topic = 'sandbox.return'"
    assert await one(conn, query) == 32767


async def test_nothing_is_left_of_an_end_that_is_rolled_back(connect: Connect) -> None:
    conn = await connect()
    session = await add_session(conn)
    _, row = await add_turn(conn, session)
    await conn.execute("BEGIN")
    await conn.execute("UPDATE outbox SET state = 'dead' WHERE id = %s", (row,))
    await conn.execute("ROLLBACK")
    assert (await status(conn, session), await returns(conn)) == ("active", [])
    assert await one(conn, "SELECT status FROM prompt") == "queued"


async def test_retry_and_hand_back_keep_the_sandbox_and_the_prompt_open(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    session = await add_session(conn)
    _, row = await add_turn(conn, session)
    await run(conn, worker)
    await conn.execute("SELECT outbox_hand_back(%s, %s, '{1}')", (worker, [row]))
    assert (await status(conn, session), await returns(conn)) == ("active", [])
    assert await one(conn, "SELECT status FROM prompt") == "queued"


async def test_sandbox_is_kept_while_a_turn_waits(connect: Connect) -> None:
    """The first of two turns ends: the second will use the sandbox. After it, it is returned, once."""
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    session = await add_session(conn)
    rows = [(await add_turn(conn, session))[1] for _ in range(2)]
    for place, row in enumerate(rows):
        assert await run(conn, worker) == [row]
        await conn.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [row]))
        assert await status(conn, session) == ("active" if place == 0 else "completed")
        assert len(await returns(conn)) == place


async def test_session_without_a_sandbox_returns_none(connect: Connect) -> None:
    conn = await connect()
    session = await add_session(conn, sandbox=False)
    _, row = await add_turn(conn, session)
    await conn.execute("UPDATE outbox SET state = 'done' WHERE id = %s", (row,))
    assert (await status(conn, session), await returns(conn)) == ("completed", [])


@with_and_without
async def test_two_turns_that_end_at_once_return_the_sandbox_once(rule: Rule, connect: Connect) -> None:
    """1. A cancels the one turn, and has not committed. 2. B cancels the other: waits. 3. A commits. 4. B
    sees that nothing is left. Taken out: each sees the other's turn still waiting.
    """
    a, b, psql = await connect(), await connect(), await connect()
    session = await add_session(psql)
    (_, first), (_, second) = await add_turn(psql, session), await add_turn(psql, session)
    if rule == "taken out":
        await take_out(psql, "session_follow", " FOR NO KEY UPDATE")
        await psql.execute("DROP TRIGGER outbox_free_key ON outbox")  # it takes a lock of the session, too
        # The status is written only where it changes, so that the UPDATE does not wait either.
        await take_out(
            psql,
            "session_follow",
            "WHERE id = of_session;\n\n    IF next_status",
            "WHERE id = of_session AND inbox_status <> next_status;\n\n    IF next_status",
        )
    await a.execute("BEGIN")
    await a.execute("UPDATE outbox SET state = 'cancelled' WHERE id = %s", (first,))
    query = "UPDATE outbox SET state = 'cancelled' WHERE id = %s RETURNING id"
    if rule == "kept":
        cancelling = await starts(psql, b, query, second)
        await a.execute("COMMIT")
        await cancelling
        assert (await status(psql, session), len(await returns(psql))) == ("completed", 1)
    else:
        await one(b, query, second)
        await a.execute("COMMIT")
        assert (await status(psql, session), await returns(psql)) == ("active", [])


async def test_end_of_a_row_of_another_topic_has_no_such_consequence(connect: Connect) -> None:
    conn = await connect()
    session = await add_session(conn)
    row = await add(conn, "other", payload={"session_id": str(session)}, ordering_key=f"session:{session}")
    await conn.execute("UPDATE outbox SET state = 'dead' WHERE id = %s", (row,))
    assert (await status(conn, session), await returns(conn)) == ("active", [])


async def test_handlers_own_verdict_stands(connect: Connect) -> None:
    """A handler that has set the prompt to failed, with its reason, ends its row as done."""
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    session = await add_session(conn)
    prompt, row = await add_turn(conn, session)
    await run(conn, worker)
    await conn.execute("UPDATE prompt SET status = 'failed', reason = 'tests fail' WHERE id = %s", (prompt,))
    await conn.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [row]))
    found = await (await conn.execute("SELECT status, reason FROM prompt")).fetchall()
    assert found == [("failed", "tests fail")]


async def test_retry_by_hand_opens_the_prompt_again(connect: Connect) -> None:
    conn = await connect()
    session = await add_session(conn)
    _, row = await add_turn(conn, session)
    await conn.execute("UPDATE outbox SET state = 'dead' WHERE id = %s", (row,))
    assert await one(conn, "SELECT outbox_retry(%s)", row) == "ready"
    assert await status(conn, session) == "active"
    found = await (await conn.execute("SELECT status, reason, finished_at FROM prompt")).fetchall()
    assert found == [("queued", None, None)]
    assert await get(conn, row) == "ready"


async def test_the_seeds_query(connect: Connect) -> None:
    """The old system's query, unchanged, shows active, then pending, then completed."""
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    session = await add_session(conn)
    _, row = await add_turn(conn, session)
    seed = "SELECT id, inbox_status, session_status FROM session ORDER BY created_at DESC LIMIT 5"

    async def shown() -> list[Any]:
        return await (await conn.execute(seed)).fetchall()

    assert await shown() == [(session, "active", "active")]
    await run(conn, worker)
    assert await shown() == [(session, "pending", "active")]
    await conn.execute("SELECT outbox_complete(%s, %s, '{1}')", (worker, [row]))
    assert await shown() == [(session, "completed", "active")]


NONSENSE = [
    {},
    {"session_id": "x"},
    {"session_id": 5, "prompt_id": {}},
    {"session_id": "00000000-0000-0000-0000-00000000000"},
]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("payload", [*NONSENSE, {"prompt_id": "x"}], ids=str)
async def test_payload_that_names_nonsense_hinders_nobody(
    name: str, payload: dict[str, Any], connect: Connect
) -> None:
    """An error in what follows from a row would fail every claim that meets it."""
    conn = await connect()
    session = await add_session(conn)
    if "session_id" not in payload and payload:
        payload = {"session_id": str(session), **payload}
    row = await add(conn, topic="session.run", payload=payload, max_attempts=1)
    worker = await new_worker(conn)
    query = "SELECT id FROM outbox_claim(%s, '{session.run}', 1, '1 min')"
    assert await column(conn, query, worker) == [row]
    for statement in ENDS[name][0].split(";"):
        await conn.execute(statement.encode(), {"worker": worker, "row": row})
    assert await column(conn, "SELECT id FROM outbox WHERE state = 'running'") == []


SESSION = "0193a1b2-0000-7000-8000-00000000000f"
NO_SESSIONS = [
    "", "x", SESSION[:-1], f"{SESSION}0", f"{SESSION}\n", SESSION.replace("f", "g"),
    SESSION.replace("-", ""), SESSION.replace("-7", "7-"), SESSION.replace("0193", "01-3"), "-" * 36,
]  # fmt: skip


async def test_a_payload_names_a_session_by_its_uuid(connect: Connect) -> None:
    psql = await connect()
    query = "SELECT payload_uuid(%s, 'session_id')"
    for session in (SESSION, SESSION.upper()):
        assert await one(psql, query, Jsonb({"session_id": session})) == UUID(SESSION)
    no_sessions: list[Any] = [*NO_SESSIONS, None, 7, {}]
    for no_session in no_sessions:
        assert await one(psql, query, Jsonb({"session_id": no_session})) is None
    assert await one(psql, query, Jsonb({})) is None

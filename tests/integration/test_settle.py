"""A row is true to itself whoever wrote it: our functions write it so, what a hand wrote is put right."""

from typing import Any

import psycopg
import pytest

from tests.conftest import Connect
from tests.support.steps import Connection, add, claim, column, new_worker, one

OURS = {
    "claim": ("ready", "SELECT outbox_claim(%(worker)s, '{t}', 1, '1 min')"),
    "complete": ("running", "SELECT outbox_complete(%(worker)s, ARRAY[%(row)s::bigint], '{1}')"),
    "fail": ("running", "SELECT outbox_fail(%(worker)s, %(row)s, 1, 'no')"),
    "fail for good": ("running", "SELECT outbox_fail(%(worker)s, %(row)s, 1, 'no', NULL, true)"),
    "hand back": ("running", "SELECT outbox_hand_back(%(worker)s, ARRAY[%(row)s::bigint], '{1}')"),
    "end cancelled": ("running", "SELECT outbox_end_cancelled(%(worker)s, %(row)s, 1)"),
    "end the worker": ("running", "SELECT outbox_end_worker(%(worker)s, 'died')"),
    "cancel": ("ready", "SELECT outbox_cancel(%(row)s)"),
    "cancel a running one": ("running", "SELECT outbox_cancel(%(row)s)"),
    "cancel a blocked one": ("blocked", "SELECT outbox_cancel(%(row)s)"),
    "cancel a session's": ("session", "SELECT session_cancel('00000000-0000-0000-0000-000000000001')"),
    "retry": ("dead", "SELECT outbox_retry(%(row)s)"),
    "discard": ("dead", "SELECT outbox_discard(%(row)s)"),
}
NEW = {
    "ready": "INSERT INTO outbox (topic) VALUES ('t') RETURNING id",
    "running": "INSERT INTO outbox (topic, state, worker_id, attempt) VALUES ('t', 'running', %s, 1)"
    " RETURNING id",
    "blocked": "INSERT INTO outbox (topic, ordering_key, blocked) VALUES ('t', 'k', true) RETURNING id",
    "session": "INSERT INTO outbox (topic, ordering_key, payload) VALUES ('session.run',"
    " 'session:00000000-0000-0000-0000-000000000001', '{}') RETURNING id",
    "dead": "INSERT INTO outbox (topic, state, failures, finished_at) VALUES ('t', 'dead', 1, now())"
    " RETURNING id",
}
UNTRUE = """
SELECT id FROM outbox
WHERE (state IN ('ready', 'running')) = (finished_at IS NOT NULL)
   OR (state = 'ready' AND cancel_requested_at IS NOT NULL)
   OR (state <> 'ready' AND blocked)
"""


async def made(conn: Connection, state: str, worker: Any) -> int:
    values = (worker,) if "%s" in NEW[state] else ()
    return int(await one(conn, NEW[state], *values))


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", OURS)
async def test_our_functions_write_a_row_once(name: str, marked: bool, connect: Connect) -> None:
    """They leave nothing to be put right, which would be a second version of the row."""
    state, call = OURS[name]
    if marked and state != "running":
        pytest.skip("only a running row keeps its mark")
    conn = await connect()
    worker = await new_worker(conn)
    row = await made(conn, state, worker)
    if marked:
        await conn.execute("UPDATE outbox SET cancel_requested_at = now() WHERE id = %s", (row,))
    written = "SELECT n_tup_upd FROM pg_stat_xact_user_tables WHERE relname = 'outbox'"
    await conn.execute("BEGIN")
    earlier = await one(conn, written)
    await conn.execute(call.encode(), {"row": row, "worker": worker})
    assert await one(conn, written) - earlier == 1
    await conn.execute("COMMIT")
    assert await column(conn, UNTRUE) == []


HANDS = [
    ("ready", "cancel_requested_at = now()", "cancelled"),
    ("ready", "state = 'done'", "done"),
    ("ready", "finished_at = now()", "ready"),
    ("blocked", "state = 'done', finished_at = now()", "done"),
    ("blocked", "state = 'dead'", "dead"),
    ("blocked", "cancel_requested_at = now()", "cancelled"),
    ("running", "state = 'ready'", "ready"),
    ("running", "state = 'ready', cancel_requested_at = now()", "cancelled"),
    (
        "running",
        "state = 'ready', cancel_requested_at = now(), blocked = true, ordering_key = 'k'",
        "cancelled",
    ),
    ("running", "state = 'cancelled'", "cancelled"),
    ("running", "cancel_requested_at = now()", "running"),
    ("running", "finished_at = now()", "running"),
    ("dead", "state = 'ready'", "ready"),
    ("dead", "state = 'ready', blocked = true", "ready"),
    ("dead", "state = 'ready', cancel_requested_at = now()", "cancelled"),
    ("dead", "state = 'cancelled'", "cancelled"),
    ("dead", "finished_at = NULL", "dead"),
]


@pytest.mark.parametrize(("state", "change", "then"), HANDS)
async def test_row_written_by_hand_is_put_right(state: str, change: str, then: str, connect: Connect) -> None:
    conn = await connect()
    row = await made(conn, state, await new_worker(conn))
    await conn.execute(f"UPDATE outbox SET {change} WHERE id = %s".encode(), (row,))
    assert await one(conn, "SELECT state FROM outbox WHERE id = %s", row) == then
    assert await column(conn, UNTRUE) == []


async def test_time_of_an_end_stays(connect: Connect) -> None:
    conn = await connect()
    row = await made(conn, "dead", None)
    await conn.execute("UPDATE outbox SET finished_at = '2020-01-01' WHERE id = %s", (row,))
    await conn.execute("UPDATE outbox SET state = 'cancelled' WHERE id = %s", (row,))
    assert await one(conn, "SELECT finished_at = '2020-01-01' FROM outbox WHERE id = %s", row)


async def test_row_given_another_key_is_not_blocked_any_more(connect: Connect) -> None:
    conn = await connect()
    row = await made(conn, "blocked", None)
    await conn.execute("UPDATE outbox SET ordering_key = 'other' WHERE id = %s", (row,))
    assert await one(conn, "SELECT NOT blocked FROM outbox WHERE id = %s", row)
    assert [r.id for r in await claim(conn, await new_worker(conn))] == [row]


@pytest.fixture
async def session(connect: Connect) -> tuple[Connection, int, int]:
    """A session with a webhook and a sandbox, and two turns that wait."""
    conn = await connect()
    session = await one(
        conn,
        "INSERT INTO session (repo, target_branch, branch, title, callback_url, sandbox)"
        " VALUES ('o/r', 'main', 'b', 't', 'http://example.org', '{\"item\": 1}') RETURNING id",
    )
    ids = []
    for _ in range(2):
        prompt = await one(
            conn, "INSERT INTO prompt (session_id, text) VALUES (%s, 'x') RETURNING id", session
        )
        payload = {"session_id": str(session), "prompt_id": str(prompt)}
        ids.append(await add(conn, "session.run", ordering_key=f"session:{session}", payload=payload))
    return conn, ids[0], ids[1]


async def followed(conn: Connection) -> list[Any]:
    """Rows that followed, by topic and event, in order."""
    return await column(
        conn,
        "SELECT coalesce(payload #>> '{event,type}', topic) FROM outbox"
        " WHERE topic <> 'session.run' ORDER BY id",
    )


@pytest.mark.parametrize("from_state", ["ready", "running"])
async def test_what_follows_from_a_mark_happens_once(
    from_state: str, session: tuple[Connection, int, int]
) -> None:
    """Both turns are cancelled by one UPDATE, as a hand would."""
    conn, first, _ = session
    if from_state == "running":
        worker = await new_worker(conn, "session.run")
        assert [row.id for row in await claim(conn, worker, topics=("session.run",))] == [first]
    await conn.execute(
        "UPDATE outbox SET cancel_requested_at = now(), state = 'ready' WHERE topic = 'session.run'"
    )
    assert await column(conn, "SELECT state FROM outbox WHERE topic = 'session.run'") == ["cancelled"] * 2
    assert await column(conn, "SELECT status FROM prompt") == ["cancelled"] * 2
    assert await one(conn, "SELECT inbox_status FROM session") == "completed"
    assert sorted(await followed(conn)) == [
        "prompt.cancelled", "prompt.cancelled", "sandbox.return", "session.completed",
    ]  # fmt: skip


async def test_nothing_follows_from_a_readiness_that_does_not_last(
    session: tuple[Connection, int, int],
) -> None:
    """A cancelled row is made ready by hand, its mark forgotten: it stays as it is, nobody is told twice."""
    conn, first, second = session
    for row in (first, second):
        await conn.execute("SELECT outbox_cancel(%s)", (row,))
    told = await followed(conn)
    updated = await one(conn, "SELECT updated_at FROM session")
    await conn.execute("UPDATE outbox SET state = 'ready' WHERE id = %s", (second,))
    assert await one(conn, "SELECT state FROM outbox WHERE id = %s", second) == "cancelled"
    assert await column(conn, "SELECT status FROM prompt") == ["cancelled"] * 2
    assert await one(conn, "SELECT updated_at FROM session") == updated
    assert await followed(conn) == told


async def test_nobody_is_woken_for_a_row_that_does_not_stay_ready(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await made(conn, "dead", worker)
    await conn.execute("SELECT outbox_park(%s)", (worker,))
    await conn.execute("LISTEN outwake_wake")
    heard: list[str] = []
    conn.add_notify_handler(lambda note: heard.append(note.payload))
    await conn.execute("UPDATE outbox SET state = 'ready', cancel_requested_at = now() WHERE id = %s", (row,))
    assert heard == []
    await conn.execute("SELECT outbox_retry(%s)", (row,))
    assert heard == ["t@0"]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO outbox (topic, state) VALUES ('t', 'running')",
        "UPDATE outbox SET state = 'running' WHERE id = %(ready)s",
        "UPDATE outbox SET worker_id = NULL WHERE id = %(running)s",
    ],
)
async def test_running_row_without_a_worker_is_refused(statement: str, connect: Connect) -> None:
    """Nobody would ever rescue it."""
    conn = await connect()
    ids = {name: await made(conn, name, await new_worker(conn)) for name in ("ready", "running")}
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        await conn.execute(statement.encode(), ids)
    assert refused.value.diag.constraint_name == "outbox_running_has_worker"

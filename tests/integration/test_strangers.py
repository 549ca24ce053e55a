"""NOTIFY and advisory locks, which any role may use that may connect to the database, change nothing."""

import asyncio

from outwake import register
from outwake.schema import LOCKS, SCHEMA, in_schema
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.roles import roles_of
from tests.support.steps import one, starts, until


async def test_a_session_is_created_whatever_locks_a_stranger_holds(
    api: Api, connect: Connect, database: str
) -> None:
    """Those that Outwake takes, and those that it took: for a user's name, by the hash of it."""
    with roles_of(database) as roles:
        stranger = await connect(roles.login().url)
        me = await api.create(prompt="x")
        for purpose in (*LOCKS.values(), 7):
            lock = (SCHEMA.lock("key") & ~15) | purpose
            for text in (me["user_id"], f"session:{me['id']}", "session.run"):
                await stranger.execute("SELECT pg_advisory_lock(%s, hashtext(%s))", (lock, text))
            await stranger.execute("SELECT pg_advisory_lock(%s, 0)", (lock,))
        async with asyncio.timeout(60):
            for _ in range(2):
                created = await api.create(prompt="x")
                assert created["user_id"] == me["user_id"]
                more = await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "more"})
                assert more.status_code == 201, more.text


async def test_of_two_sessions_at_once_the_second_counts_the_first(connect: Connect) -> None:
    """Under a lock of ours."""
    a, b, observer = await connect(), await connect(), await connect()
    insert = (
        "INSERT INTO session (user_id, repo, target_branch, branch, title)"
        " VALUES ('u', 'o/r', 'main', gen_random_uuid()::text, 't')"
    )
    await a.execute("BEGIN")
    assert await one(a, "SELECT session_admit('u', 1)")
    await a.execute(insert)
    second = await starts(observer, b, "SELECT session_admit('u', 1)")
    await a.execute("COMMIT")
    assert await second is False


async def test_the_rows_that_count_are_locked_by_nobody_else(connect: Connect, database: str) -> None:
    with roles_of(database) as roles:
        for group in ("producer", "worker", "monitor", "reader", "operator"):
            conn = await connect(roles.login(f"outwake_{group}").url)
            assert not await one(
                conn,
                "SELECT has_any_column_privilege(current_user, 'outwake.session_admission'::regclass,"
                " 'SELECT, INSERT, UPDATE, REFERENCES')",
            ), group


async def test_nobody_is_taken_for_a_worker_by_a_lock_of_a_stranger(connect: Connect, database: str) -> None:
    """A presence is a worker's only if its connection's role may write the table of workers."""
    owner = await connect()
    await register(owner, ["t"], presence=7)
    lock, present = (
        in_schema("SELECT pg_advisory_lock(:lock_presence, 7)"),
        "SELECT count(*) FROM worker_present",
    )
    with roles_of(database) as roles:
        groups = [(), ("outwake_producer",), ("outwake_reader",), ("outwake_operator",), ("outwake_worker",)]
        for group in groups:
            async with await connect(roles.login(*group).url) as conn:
                await conn.execute(lock)
                assert await one(owner, present) == (group == ("outwake_worker",)), group
                assert await one(owner, "SELECT ready FROM outbox_ready()") == (group == ("outwake_worker",))
            await until(owner, "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'")
    await owner.execute(lock)
    assert await one(owner, present) == 1

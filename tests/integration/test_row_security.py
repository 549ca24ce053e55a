"""What people see who read the tables by SQL."""

import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from tests.conftest import Connect
from tests.support.api import Api
from tests.support.process import ROOT

ROLES = """
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY[
        'outwake_reader', 'outwake_operator', 'test_reader', 'test_bound', 'test_operator', 'test_other'
    ] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END LOOP;
END
$$;
GRANT outwake_reader TO test_reader, test_bound, test_operator;
GRANT outwake_operator TO test_operator;
GRANT SELECT ON session, prompt, message, outbox, idempotency, watcher
    TO outwake_reader, outwake_operator, test_other;
"""
TABLES = ("session", "prompt", "message", "outbox", "idempotency", "watcher")


@pytest.fixture
async def people(api: Api, connect: Connect) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """The owner's connection; alice and bob have a session each, with all that belongs to one."""
    conn = await connect()
    await conn.execute(ROLES)
    for user in ("alice", "bob"):
        created = await api.create(prompt="x")
        session, prompt = UUID(created["id"]), UUID(created["prompts"][0]["id"])
        await conn.execute("UPDATE session SET user_id = %s WHERE id = %s", (user, session))
        await conn.execute(
            "INSERT INTO message (session_id, seq, prompt_id, attempt, body) VALUES (%s, 1, %s, 1, '{}')",
            (session, prompt),
        )
        await conn.execute(
            "INSERT INTO idempotency (user_id, key, request_hash, session_id, answer)"
            " VALUES (%s, 'k', '', %s, '{}')",
            (user, session),
        )
        await conn.execute("INSERT INTO watcher VALUES (%s, 1)", (session,))
    await conn.execute(
        """INSERT INTO outbox (topic, payload) VALUES ('email.send', '{"session_id": "no"}')"""
    )
    await conn.execute("INSERT INTO sql_reader VALUES ('test_bound', 'bob')")
    yield conn
    await conn.execute("RESET ROLE")


async def counts(conn: psycopg.AsyncConnection[Any], role: str, user: str | None = None) -> list[int]:
    """The rows of each table that the role sees."""
    await conn.execute("RESET ROLE")
    await conn.execute("SELECT set_config('outwake.user_id', %s, false)", (user or "",))
    await conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    found = []
    for table in TABLES:
        cursor = await conn.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table)))
        row = await cursor.fetchone()
        assert row is not None
        found.append(row[0])
    return found


async def test_a_reader_sees_one_users_rows(people: psycopg.AsyncConnection[Any]) -> None:
    assert await counts(people, "test_reader") == [0] * 6
    assert await counts(people, "test_reader", "alice") == [1] * 6
    cursor = await people.execute(
        "SELECT DISTINCT user_id FROM session UNION SELECT user_id FROM idempotency"
    )
    assert await cursor.fetchall() == [("alice",)]
    assert await counts(people, "test_reader", "nobody") == [0] * 6


async def test_a_bound_reader_cannot_set_itself_free(people: psycopg.AsyncConnection[Any]) -> None:
    for user in (None, "alice", "bob"):
        assert await counts(people, "test_bound", user) == [1] * 6
        cursor = await people.execute("SELECT user_id FROM session")
        assert await cursor.fetchall() == [("bob",)]


@pytest.mark.parametrize("role", ["test_operator", "outwake_operator", "test_other"])
async def test_operators_and_those_who_are_no_readers_see_all(
    people: psycopg.AsyncConnection[Any], role: str
) -> None:
    assert await counts(people, role) == [2, 2, 2, 3, 2, 2]


async def test_the_pages_statements(people: psycopg.AsyncConnection[Any]) -> None:
    page = (ROOT / "docs" / "authentication.md").read_text()
    bind, read = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    await people.execute("CREATE ROLE test_page")
    try:
        await people.execute(bind.replace("alice", "test_page").encode())
        await people.execute("UPDATE sql_reader SET user_id = 'alice' WHERE role_name = 'test_page'")
        assert await counts(people, "test_page", "bob") == [1] * 6
        await people.execute("SET ROLE test_reader")
        setting, query = read.replace("6f1c-the-sub-of-alice", "alice").strip().splitlines()
        await people.execute(setting.encode())
        assert len(await (await people.execute(query.encode())).fetchall()) == 1
    finally:
        await people.execute("RESET ROLE")
        await people.execute("DROP ROLE test_page")


async def test_readers_see_no_tokens_and_bind_nobody(people: psycopg.AsyncConnection[Any]) -> None:
    await people.execute("SET ROLE test_bound")
    for table in ("api_token", "sql_reader"):
        with pytest.raises(pg.InsufficientPrivilege):
            await people.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))


async def test_every_table_that_tells_of_sessions_is_held(connect: Connect) -> None:
    """A new table that refers to session needs a policy, and a view its reader's rights."""
    conn = await connect()
    cursor = await conn.execute(
        """
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND NOT c.relrowsecurity
          AND EXISTS (
              SELECT FROM pg_constraint AS f
              WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.confrelid = 'session'::regclass)
        UNION
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
          AND NOT coalesce(c.reloptions::text LIKE '%security_invoker=true%', false)
        """
    )
    assert await cursor.fetchall() == []


async def test_who_may_only_insert_can_enqueue(people: psycopg.AsyncConnection[Any]) -> None:
    await people.execute("GRANT INSERT ON outbox TO test_other")
    await people.execute("SET ROLE test_other")
    await people.execute("INSERT INTO outbox (topic) VALUES ('email.send')")


async def test_the_sum_is_worked_out_once_a_statement(people: psycopg.AsyncConnection[Any]) -> None:
    """Not once a row: the policy's parts are InitPlans and hashed SubPlans."""
    await people.execute("SELECT set_config('outwake.user_id', 'alice', false)")
    await people.execute("SET ROLE test_reader")
    cursor = await people.execute("EXPLAIN SELECT * FROM message")
    plan = "\n".join(row[0] for row in await cursor.fetchall())
    assert "InitPlan" in plan
    assert "hashed" in plan


async def test_the_owner_is_not_asked(people: psycopg.AsyncConnection[Any]) -> None:
    """As API and workers are: their plans know nothing of policies."""
    await people.execute("CREATE ROLE test_owner_of_all NOLOGIN")
    try:
        for table in TABLES:
            await people.execute(
                sql.SQL("ALTER TABLE {} OWNER TO test_owner_of_all").format(sql.Identifier(table))
            )
        assert await counts(people, "test_owner_of_all") == [2, 2, 2, 3, 2, 2]
        cursor = await people.execute("EXPLAIN SELECT * FROM session")
        assert "InitPlan" not in "".join(row[0] for row in await cursor.fetchall())
    finally:
        await people.execute("RESET ROLE")
        await people.execute("REASSIGN OWNED BY test_owner_of_all TO CURRENT_USER")
        await people.execute("DROP OWNED BY test_owner_of_all")
        await people.execute("DROP ROLE test_owner_of_all")

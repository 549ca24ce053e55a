"""What people see who read the tables by SQL."""

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from tests.conftest import Connect
from tests.support.api import Api
from tests.support.process import ROOT
from tests.support.roles import Role, Roles, roles_of
from tests.support.steps import column, one

TABLES = ("session", "prompt", "message", "outbox", "idempotency", "watcher")


@dataclass
class People:
    """The owner's connection, and roles of the database; alice and bob have a session each, with all that
    belongs to one.
    """

    conn: psycopg.AsyncConnection[Any]
    reader: Role
    bound: Role
    """To bob."""
    operator: Role
    """A reader too."""
    other: Role
    """Was granted the tables, and is none of these."""


@pytest.fixture
def roles(database: str) -> Iterator[Roles]:
    with roles_of(database) as roles:
        yield roles


@pytest.fixture
async def people(api: Api, roles: Roles, connect: Connect) -> AsyncIterator[People]:
    conn = await connect()
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
    people = People(
        conn,
        roles.login("outwake_reader"),
        roles.login("outwake_reader"),
        roles.login("outwake_reader", "outwake_operator"),
        roles.login(),
    )
    await conn.execute("INSERT INTO sql_reader VALUES (%s, 'bob')", (people.bound.name,))
    for right in ("USAGE ON SCHEMA outwake", f"SELECT ON {', '.join(TABLES)}"):
        await conn.execute(f"GRANT {right} TO {people.other.name}".encode())
    yield people
    await conn.execute("RESET ROLE")


async def counts(conn: psycopg.AsyncConnection[Any], role: str, user: str | None = None) -> list[int]:
    """The rows of each table that a role sees."""
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


async def test_a_reader_sees_one_users_rows(people: People) -> None:
    conn, reader = people.conn, people.reader.name
    assert await counts(conn, reader) == [0] * 6
    assert await counts(conn, reader, "alice") == [1] * 6
    cursor = await conn.execute("SELECT DISTINCT user_id FROM session UNION SELECT user_id FROM idempotency")
    assert await cursor.fetchall() == [("alice",)]
    assert await counts(conn, reader, "nobody") == [0] * 6


async def test_a_bound_reader_cannot_set_itself_free(people: People, connect: Connect) -> None:
    for user in (None, "alice", "bob"):
        assert await counts(people.conn, people.bound.name, user) == [1] * 6
        cursor = await people.conn.execute("SELECT user_id FROM session")
        assert await cursor.fetchall() == [("bob",)]
    # Nor by what every member of a role may do.
    own = await connect(people.bound.url)
    assert await counts(own, "outwake_reader", "alice") == [1] * 6
    assert await column(own, "SELECT user_id FROM session") == ["bob"]


async def test_a_bound_reader_stays_bound_in_every_role_that_it_may_set(
    people: People, roles: Roles, connect: Connect
) -> None:
    """Also in that of another bound reader, whose member it is, and if it only inherits from a bound one."""
    alices = roles.login("outwake_reader")
    await people.conn.execute("INSERT INTO sql_reader VALUES (%s, 'alice')", (alices.name,))
    await people.conn.execute(f"GRANT {alices.name} TO {people.bound.name}".encode())
    heir, heir_of_two = roles.login(people.bound.name), roles.login(people.bound.name, people.reader.name)
    pool = roles.login("outwake_reader")
    for name in (alices.name, people.bound.name):
        await people.conn.execute(f"GRANT {name} TO {pool.name} WITH INHERIT FALSE".encode())
    own = await connect(people.bound.url)
    for role in (people.bound.name, alices.name, "outwake_reader"):
        assert await counts(own, role, "alice") == [1] * 6
        assert await column(own, "SELECT user_id FROM session") == ["bob"]
    for url in (heir.url, heir_of_two.url):
        conn = await connect(url)
        for role in ("none", people.bound.name, "outwake_reader"):
            if role == "none":
                await conn.execute("SET outwake.user_id = 'alice'")
            else:
                assert sum(await counts(conn, role, "alice")) in (0, 6)
            assert await column(conn, "SELECT user_id FROM session") in ([], ["bob"])
    conn = await connect(pool.url)
    assert await counts(conn, alices.name) == [1] * 6
    assert await column(conn, "SELECT user_id FROM session") == ["alice"]
    assert await counts(conn, people.bound.name) == [1] * 6
    assert await column(conn, "SELECT user_id FROM session") == ["bob"]


async def test_whose_user_another_role_is_bound_to_is_not_told(people: People, connect: Connect) -> None:
    own = await connect(people.reader.url)
    query = "SELECT outwake.sql_reader_user(%s)"
    assert await one(own, query, people.bound.name) is None
    assert await one(await connect(people.bound.url), query, people.bound.name) == "bob"


async def test_neither_session_authorization_nor_temporary_objects_free_a_reader(
    people: People, connect: Connect
) -> None:
    own = await connect(people.bound.url)
    with pytest.raises(pg.InsufficientPrivilege):
        await own.execute("SET SESSION AUTHORIZATION postgres")
    await own.execute("SET row_security = off")
    with pytest.raises(pg.InsufficientPrivilege, match="row-level security"):
        await own.execute("SELECT count(*) FROM session")
    await own.execute("SET row_security = on")
    await own.execute("SET search_path = pg_temp, outwake, public")
    await own.execute("CREATE TEMP TABLE sql_reader (role_name name, user_id text)")
    await own.execute("INSERT INTO sql_reader VALUES (current_user, 'alice')")
    await own.execute(
        "CREATE FUNCTION pg_temp.sees(text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS"
        " $$ BEGIN RAISE WARNING 'saw %', $1; RETURN true; END $$"
    )
    said: list[str] = []
    own.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    query = "SELECT user_id FROM outwake.session WHERE pg_temp.sees(user_id::text)"
    assert await column(own, query) == ["bob"]
    assert said == ["saw bob"]


async def test_operators_see_all(people: People) -> None:
    for role in (people.operator.name, "outwake_operator"):
        assert await counts(people.conn, role) == [2, 2, 2, 3, 2, 2]


async def test_who_was_granted_tables_and_is_in_no_role_sees_no_row(people: People) -> None:
    """Rights to tables are not enough: the policies name the roles."""
    assert await counts(people.conn, people.other.name) == [0] * 6
    await people.conn.execute("RESET ROLE")
    await people.conn.execute(f"GRANT INSERT ON outbox TO {people.other.name}".encode())
    await people.conn.execute(f"SET ROLE {people.other.name}".encode())
    with pytest.raises(pg.InsufficientPrivilege, match="row-level security"):
        await people.conn.execute("INSERT INTO outbox (topic) VALUES ('email.send')")


async def test_what_of_the_outbox_a_reader_is_told(people: People, connect: Connect) -> None:
    """Its rows in the views; whether all is well, of everybody's."""
    await people.conn.execute(
        "UPDATE outbox SET available_at = now() - interval '1 hour' WHERE topic = 'email.send'"
    )
    reader = await connect(people.bound.url)
    assert await column(reader, "SELECT topic FROM outbox_waiting") == ["session.run"]
    assert await column(reader, "SELECT rows FROM outbox_depth") == [1]
    found = await (await reader.execute("SELECT ready, stuck, topic FROM outbox_ready()")).fetchone()
    assert found == (False, True, "email.send")
    [mine] = await column(reader, "SELECT id FROM outbox")
    for row_id in await column(people.conn, "SELECT id FROM outbox"):
        history = await one(reader, "SELECT count(*) FROM outbox_history(%s)", row_id)
        assert (history > 0) == (row_id == mine)
    for call in ("outbox_retry(1)", "outbox_cancel(1)", "outbox_discard(1)", "outbox_wake()"):
        with pytest.raises(pg.InsufficientPrivilege):
            await reader.execute(f"SELECT {call}".encode())
    for change in (
        "UPDATE session SET title = 'x'",
        "DELETE FROM message",
        "INSERT INTO topic VALUES ('a', 1)",
    ):
        with pytest.raises(pg.InsufficientPrivilege):
            await reader.execute(change.encode())


async def test_the_pages_statements(people: People, roles: Roles) -> None:
    page = (ROOT / "docs" / "authentication.md").read_text()
    bind, read = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    ann = roles.login()
    await people.conn.execute("SET search_path = public")
    await people.conn.execute(bind.replace("alice", ann.name).encode())
    await people.conn.execute(
        "UPDATE outwake.sql_reader SET user_id = 'alice' WHERE role_name = %s", (ann.name,)
    )
    await people.conn.execute("SET search_path = outwake")
    assert await counts(people.conn, ann.name, "bob") == [1] * 6
    await people.conn.execute("RESET ROLE; SET search_path = public")
    await people.conn.execute(f"SET ROLE {people.reader.name}".encode())
    setting, query = read.replace("6f1c-the-sub-of-alice", "alice").strip().split("\n", 1)
    await people.conn.execute(setting.encode())
    assert len(await (await people.conn.execute(query.encode())).fetchall()) == 1


async def test_readers_see_no_tokens_and_bind_nobody(people: People, connect: Connect) -> None:
    conn = await connect(people.bound.url)
    for table in ("api_token", "sql_reader", "producer_topic", "session_memory"):
        with pytest.raises(pg.InsufficientPrivilege):
            await conn.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))


async def test_every_table_that_tells_of_sessions_is_held(connect: Connect) -> None:
    """A new table that refers to session needs a policy, and a view its reader's rights."""
    conn = await connect()
    cursor = await conn.execute(
        """
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind = 'r' AND NOT c.relrowsecurity
          AND EXISTS (
              SELECT FROM pg_constraint AS f
              WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.confrelid = 'session'::regclass)
        UNION
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind = 'v'
          AND NOT coalesce(c.reloptions::text LIKE '%security_invoker=true%', false)
        """
    )
    assert await cursor.fetchall() == []


async def test_the_user_is_looked_up_once_a_statement(people: People) -> None:
    """Not once a row: the policy's parts are InitPlans and hashed SubPlans."""
    conn = people.conn
    await conn.execute("SELECT set_config('outwake.user_id', 'alice', false)")
    await conn.execute(f"SET ROLE {people.reader.name}".encode())
    plan = "\n".join(await column(conn, "EXPLAIN SELECT * FROM message"))
    assert "InitPlan" in plan
    assert "hashed" in plan


async def test_the_owner_is_not_asked(people: People, roles: Roles) -> None:
    """As the API is: its plans know nothing of policies."""
    conn, owner = people.conn, roles.login()
    await conn.execute(f"GRANT USAGE ON SCHEMA outwake TO {owner.name}".encode())
    for table in TABLES:
        await conn.execute(f"ALTER TABLE {table} OWNER TO {owner.name}".encode())
    assert await counts(conn, owner.name) == [2, 2, 2, 3, 2, 2]
    assert "InitPlan" not in "".join(await column(conn, "EXPLAIN SELECT * FROM session"))


async def test_what_several_roles_allow_adds_up(people: People, roles: Roles, connect: Connect) -> None:
    """The rows of one and the columns of the other: docs/sql.md warns of it."""
    both = await connect(roles.login("outwake_reader", "outwake_monitor").url)
    assert await one(both, "SELECT count(payload) FROM outbox") == 3
    assert await one(both, "SELECT count(*) FROM session") == 0

"""Migrations: applied once whoever starts them, refused backwards, and every object explained."""

import asyncio
import importlib
import re
from contextlib import nullcontext

import psycopg
import pytest

from outwake import SchemaError, migrate
from outwake.migrate import check_schema
from outwake.sql import Migration, migrations
from tests.conftest import Connect
from tests.support.process import ROOT
from tests.support.schema import describe
from tests.support.steps import Connection, column, one

NAMES = [migration.name for migration in migrations()]


@pytest.mark.parametrize("starters", [2, 20])
async def test_concurrent_starters_apply_each_migration_once(
    starters: int, connect: Connect, empty_database: str
) -> None:
    """The others wait, find nothing left to do, and succeed."""
    applied = await asyncio.gather(*(migrate(empty_database) for _ in range(starters)))
    assert sorted(name for names in applied for name in names) == NAMES
    conn = await connect(empty_database)
    assert await column(conn, "SELECT name FROM schema_migration ORDER BY number") == NAMES
    await check_schema(conn)


async def test_second_run_changes_nothing(connect: Connect, database: str) -> None:
    conn = await connect()
    before = await describe(conn)
    assert await migrate(database) == []
    assert await describe(conn) == before


async def test_newer_schema_is_refused(connect: Connect, database: str) -> None:
    """By migrate, and by a worker or API that starts."""
    conn = await connect()
    await conn.execute("INSERT INTO schema_migration (number, name) VALUES (9999, '9999_future')")
    with pytest.raises(SchemaError, match="9999, newer"):
        await migrate(database)
    with pytest.raises(SchemaError, match="upgrade"):
        await check_schema(conn)


async def test_older_schema_is_refused_until_migrated(connect: Connect, empty_database: str) -> None:
    conn = await connect(empty_database)
    with pytest.raises(SchemaError, match="run `outwake migrate`"):
        await check_schema(conn)


async def test_migration_that_fails_leaves_nothing_of_itself(
    connect: Connect, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [Migration(1, "0001_broken", "CREATE TABLE half (); SELECT 1 / 0")]
    monkeypatch.setattr(importlib.import_module("outwake.migrate"), "migrations", lambda: broken)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await migrate(empty_database)
    conn = await connect(empty_database)
    assert await one(conn, "SELECT to_regclass('half')") is None
    assert await column(conn, "SELECT name FROM schema_migration") == []


async def test_functions_with_their_owners_rights_fix_their_search_path(connect: Connect) -> None:
    """Else a caller's own schema could slip them another table or operator."""
    conn = await connect()
    query = (
        "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE pronamespace = 'public'::regnamespace"
        " AND prosecdef AND NOT coalesce(proconfig, '{}') @> '{\"search_path=pg_catalog, public, pg_temp\"}'"
    )
    assert await column(conn, query) == ["outbox_inserted()"]  # see the next test


FOREIGN = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.trap() RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE ''trapped''; END';
CREATE VIEW evil.worker AS SELECT evil.trap()::boolean AS parked;
CREATE DOMAIN evil.text AS pg_catalog.text CHECK (evil.trap() IS NULL);
CREATE VIEW evil.outbox_sleepers AS SELECT 'no sequence';
CREATE DOMAIN evil.regclass AS pg_catalog.regclass CHECK (evil.trap() IS NULL);
CREATE FUNCTION evil.pg_sequence_last_value(pg_catalog.regclass) RETURNS bigint
    LANGUAGE sql RETURN evil.trap()::bigint;
CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.outbox_notify(text, timestamptz, bigint) RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.outbox_all_awake() RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE sql RETURN evil.trap()::boolean;
CREATE FUNCTION evil.same(bigint, integer) RETURNS boolean LANGUAGE sql RETURN evil.trap()::boolean;
CREATE OPERATOR evil.= (FUNCTION = evil.same, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR evil.<> (FUNCTION = evil.same, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR evil.= (FUNCTION = evil.same, LEFTARG = bigint, RIGHTARG = integer);
CREATE FUNCTION evil.next(text, text) RETURNS text LANGUAGE sql RETURN evil.trap();
CREATE FUNCTION evil.next(bigint) RETURNS bigint LANGUAGE sql RETURN evil.trap()::bigint;
CREATE FUNCTION evil.next(bigint, bigint) RETURNS bigint LANGUAGE sql RETURN evil.trap()::bigint;
CREATE FUNCTION evil.next(timestamptz, timestamptz) RETURNS timestamptz
    LANGUAGE sql RETURN evil.trap()::timestamptz;
CREATE AGGREGATE evil.count(*) (SFUNC = evil.next, STYPE = bigint);
CREATE AGGREGATE evil.min(timestamptz) (SFUNC = evil.next, STYPE = timestamptz);
CREATE AGGREGATE evil.min(bigint) (SFUNC = evil.next, STYPE = bigint);
CREATE AGGREGATE evil.max(text) (SFUNC = evil.next, STYPE = text);
"""


@pytest.mark.parametrize(
    "qualified",
    [
        "",
        "public.worker WHERE",
        "pg_catalog.pg_sequence_last_value",
        "public.outbox_sleepers",
        "::pg_catalog.regclass",
        "pg_catalog.current_setting('transaction_isolation')",
        "pg_catalog.current_setting('outwake.named', true)",
        "pg_catalog.set_config",
        "OPERATOR(pg_catalog.<>) 'read committed'",
        "OPERATOR(pg_catalog.<>) 'yes'",
        "public.outbox_notify",
        "public.outbox_all_awake",
        "::pg_catalog.text",
        "pg_catalog.min(i.available_at)",
        "pg_catalog.count(*)",
        "OPERATOR(pg_catalog.=) 1",
        "pg_catalog.max(i.ordering_key)",
        "pg_catalog.min(i.id)",
        "OPERATOR(pg_catalog.=) 'ready'",
    ],
)
async def test_who_inserts_slips_the_trigger_nothing(qualified: str, connect: Connect) -> None:
    """The one function that fixes no search_path names every schema, so that a caller's own is not looked
    into. Taken out: of one name, and the caller's is taken.
    """
    conn = await connect()
    await conn.execute(FOREIGN)
    if qualified:
        unqualified = re.sub(r"OPERATOR\(pg_catalog\.(.*?)\)|pg_catalog\.|public\.", r"\1", qualified)
        definition: str = await one(conn, "SELECT pg_get_functiondef('outbox_inserted'::regproc)")
        assert qualified in definition
        await conn.execute(definition.replace(qualified, unqualified).encode())
    await conn.execute("SET search_path = evil, pg_catalog, public, pg_temp")
    trapped = (psycopg.errors.RaiseException, psycopg.errors.WrongObjectType)
    with pytest.raises(trapped) if qualified else nullcontext():
        await conn.execute("SELECT pg_catalog.nextval('public.outbox_sleepers')")
        await conn.execute("INSERT INTO public.outbox (topic) VALUES ('t')")
        await conn.execute(
            "INSERT INTO public.worker (host, pid, version, topics, concurrency, parked)"
            " VALUES ('h', 1, '0', '{t}', 1, true)"
        )
        await conn.execute("SELECT pg_catalog.nextval('public.outbox_sleepers')")
        await conn.execute("INSERT INTO public.outbox (topic) VALUES ('t')")


UNEXPLAINED = """
SELECT c.oid::regclass::text FROM pg_class c
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
  AND obj_description(c.oid, 'pg_class') IS NULL
UNION ALL
SELECT p.oid::regprocedure::text FROM pg_proc p
WHERE p.pronamespace = 'public'::regnamespace AND p.prorettype <> 'trigger'::regtype
  AND obj_description(p.oid, 'pg_proc') IS NULL
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
UNION ALL
SELECT a.attrelid::regclass || '.' || a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
  AND col_description(a.attrelid, a.attnum) IS NULL
"""

PLAIN = {"id", "created_at", "updated_at", "started_at", "finished_at"}
"""Columns whose name says all."""


async def test_every_object_is_explained(connect: Connect) -> None:
    """The database is a public interface: COMMENT on tables, views, functions, and columns but plain ones."""
    conn = await connect()
    missing = await unexplained(conn)
    assert missing == []


async def unexplained(conn: Connection) -> list[str]:
    names = await column(conn, UNEXPLAINED)
    return sorted(name for name in names if name.rpartition(".")[2] not in PLAIN)


async def test_committed_schema_is_what_the_migrations_make(connect: Connect) -> None:
    """Reviewers see the net effect of a migration in tests/schema.txt. `make schema` writes it."""
    conn = await connect()
    assert await describe(conn) == (ROOT / "tests" / "schema.txt").read_text(), "run `make schema`"

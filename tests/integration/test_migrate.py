"""Migrations: applied once whoever starts them, refused where they do harm; every object is explained."""

import asyncio
import re
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

import outwake
from outwake import SchemaError, _ledger, migrate
from outwake import sql as our_sql
from outwake._migrate import check_schema, plan, print_sql
from outwake.connect import connect as connect_as_we_do
from outwake.schema import SCHEMA
from outwake.sql import LINES, File, Line, files, newest
from tests.conftest import Connect
from tests.support.api import serving
from tests.support.database import new_database
from tests.support.frozen import frozen
from tests.support.process import ROOT
from tests.support.schema import describe
from tests.support.server import with_database
from tests.support.steps import Connection, add, claim, column, new_worker, one, until

MODULE = sys.modules["outwake._migrate"]  # the package exports the function of that name
NAMES = [file.name for line in LINES for file in files(line)]
GOES_ON = "-- code of the version before: goes on\n"
MUST_STOP = "-- code of the version before: must stop\n"
LEDGER = "SELECT name FROM migration"

Release = Callable[..., None]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Release:
    """Make this process's code another release: with more numbered files, with text appended to others."""
    ours = {line: files(line) for line in LINES}

    def become(
        *more: File, appended: dict[str, str] | None = None, version: str = "1.0.0", oldest: int = 1
    ) -> None:
        def theirs(line: Line) -> tuple[File, ...]:
            known = (
                replace(file, text=file.text + (appended or {}).get(file.name, "")) for file in ours[line]
            )
            return tuple(
                sorted(
                    (*known, *(file for file in more if file.line == line)),
                    key=lambda file: file.number or 10_000,
                )
            )

        monkeypatch.setattr(our_sql, "files", theirs)
        for module in (MODULE, _ledger):
            monkeypatch.setattr(module, "version", lambda package: version)
        monkeypatch.setattr(our_sql, "OLDEST", dict.fromkeys(LINES, oldest))

    return become


NEWEST: dict[Line, int] = {line: newest(line) for line in LINES}


def numbered(text: str, ahead: int = 1, line: Line = "outbox") -> File:
    """The next file of a line, or one after that."""
    number = NEWEST[line] + ahead
    return File(line, number, f"{line}/{number:04}_next", text)


NEXT = numbered("").name


@pytest.mark.parametrize("starters", [2, 20])
async def test_concurrent_starters_apply_each_file_once(
    starters: int, connect: Connect, empty_database: str
) -> None:
    """The others wait, find nothing left to do, and succeed."""
    applied = await asyncio.gather(*(migrate(empty_database) for _ in range(starters)))
    assert sorted(name for names in applied for name in names) == sorted(NAMES)
    conn = await connect(empty_database)
    assert sorted(await column(conn, LEDGER)) == sorted(NAMES)
    assert await check_schema(conn, LINES) == "current"


async def test_second_run_changes_nothing(connect: Connect, database: str) -> None:
    conn = await connect()
    before = await describe(conn)
    assert await migrate(database) == []
    assert await describe(conn) == before


@pytest.mark.parametrize(
    "setting",
    [
        "DateStyle = 'SQL, DMY'",
        "IntervalStyle = 'sql_standard'",
        "TimeZone = 'Pacific/Apia'",
        "default_transaction_isolation = 'repeatable read'",
        "lock_timeout = '50ms'",
        "statement_timeout = '2s'",
    ],
)
async def test_settings_of_the_database_do_no_harm(
    setting: str, connect: Connect, empty_database: str, server: str
) -> None:
    """While another replica migrates for longer than the role may wait."""
    name = empty_database.rpartition("/")[2]
    admin = await connect(server)
    await admin.execute(f"ALTER DATABASE {name} SET {setting}".encode())
    holder = await connect(empty_database)
    await holder.execute("SELECT pg_advisory_lock(%s, 0)", (SCHEMA.lock("migrate"),))
    migrating = asyncio.create_task(migrate(empty_database))
    while await one(admin, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == 0:
        assert not migrating.done(), migrating.result()
        await asyncio.sleep(0.01)
    await holder.execute("SELECT pg_sleep(0.1), pg_advisory_unlock(%s, 0)", (SCHEMA.lock("migrate"),))
    assert sorted(await migrating) == sorted(NAMES)
    conn = await connect_as_we_do(empty_database, "test", timedelta(seconds=6))
    async with conn:
        assert await check_schema(conn, LINES) == "current"


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_in_another_encoding_is_refused_before_anything_is_made(
    server: str, encoding: str
) -> None:
    with new_database(server, "template0", f"ENCODING '{encoding}' LOCALE 'C'") as name:
        url = with_database(server, name)
        for refused in (migrate(url), print_sql(url)):
            with pytest.raises(SchemaError, match=f"encoding {encoding}.* UTF8") as raised:
                await refused
            assert "\n" not in str(raised.value)
        with psycopg.connect(url) as conn:
            assert conn.execute("SELECT to_regnamespace('outwake')").fetchone() == (None,)


async def test_a_file_that_fails_leaves_nothing_of_itself(
    connect: Connect, database: str, release: Release
) -> None:
    release(numbered("CREATE TABLE half (); SELECT 1 / 0"))
    with pytest.raises(psycopg.errors.DivisionByZero):
        await migrate(database)
    conn = await connect()
    assert await one(conn, "SELECT to_regclass('half')") is None
    assert sorted(await column(conn, LEDGER)) == sorted(NAMES)


KILLED = """
import asyncio, sys
from outwake import migrate
from outwake import sql
from outwake.sql import File, files
slow = File("outbox", 9, "outbox/0009_next", "CREATE TABLE half (); SELECT pg_sleep(600)")
sql.files = lambda line: (*files(line), slow) if line == "outbox" else files(line)
asyncio.run(migrate(sys.argv[1]))
"""


async def test_a_migrate_that_is_killed_leaves_the_database_between_two_files(
    connect: Connect, database: str, release: Release
) -> None:
    conn = await connect()
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, database, cwd=ROOT)
    sleeping = (
        "SELECT true FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    await until(conn, sleeping)
    killed.send_signal(signal.SIGKILL)
    await killed.wait()
    # The server may not have noticed; the next one waits for its lock no longer than that takes.
    await conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    assert sorted(await column(conn, LEDGER)) == sorted(NAMES)
    assert await one(conn, "SELECT to_regclass('half')") is None
    release(numbered(f"{GOES_ON}CREATE TABLE whole ();"))
    assert await migrate(database) == [NEXT]
    assert await one(conn, "SELECT to_regclass('whole')") is not None


async def test_a_table_that_others_keep_locked_is_waited_for_in_short_tries(
    connect: Connect, database: str, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long wait would stop everybody who comes behind it."""
    monkeypatch.setattr(MODULE, "_LOCK_TIMEOUT", 0.05)
    monkeypatch.setattr(MODULE, "_LOCK_PAUSE", 0.01)
    monkeypatch.setattr(MODULE, "_LOCK_TRIES", 3)
    conn, other = await connect(), await connect()
    await other.execute("BEGIN; INSERT INTO outbox (topic) VALUES ('t')")
    release(appended={"outbox/triggers": "-- changed"})
    with pytest.raises(SchemaError, match="open transactions keep the tables locked"):
        await migrate(database)
    await add(conn)  # nobody is held up
    monkeypatch.setattr(MODULE, "_LOCK_TRIES", 10_000)
    migrating = asyncio.create_task(migrate(database))
    await other.execute("COMMIT")
    assert await migrating == ["outbox/triggers"]


# Versions beside each other.


async def test_older_code_goes_on_beside_a_newer_schema_unless_it_must_stop(
    connect: Connect, database: str, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn = await connect()
    release(numbered(f"{GOES_ON}ALTER TABLE outbox ADD COLUMN more text;"), version="1.1.0")
    assert await check_schema(conn, LINES) == "older"
    assert await migrate(database) == [NEXT]
    assert await check_schema(conn, LINES) == "current"
    release()
    assert await check_schema(conn, LINES) == "newer"
    assert await migrate(database) == []
    release(numbered(f"{MUST_STOP}ALTER TABLE outbox DROP COLUMN more;", 2), version="2.0.0")
    assert await migrate(database) == [numbered("", 2).name]
    release()
    for check in (migrate(database), check_schema(conn, LINES), print_sql(database)):
        with pytest.raises(SchemaError, match=r"outbox/0\d+_next, of version 2\.0\.0.* upgrade outwake"):
            await check


async def test_newer_code_goes_on_beside_the_schema_of_the_version_before_and_no_older_one(
    connect: Connect, release: Release
) -> None:
    conn = await connect()
    release(numbered("-- more"), version="1.1.0", oldest=1)
    assert await check_schema(conn, LINES) == "older"
    release(numbered("-- more"), numbered("-- and more", 2), version="1.2.0", oldest=NEWEST["outbox"] + 1)
    said = f"are at {NEWEST['outbox']}, this code needs {NEWEST['outbox'] + 1}: run `outwake migrate`"
    with pytest.raises(SchemaError, match=said):
        await check_schema(conn, LINES)


async def test_functions_are_replaced_when_they_changed_and_never_by_older_ones(
    connect: Connect, database: str, release: Release
) -> None:
    conn = await connect()
    changed = "\nCOMMENT ON FUNCTION outbox_wake() IS 'of 1.1';\n"
    release(appended={"outbox/wake": changed}, version="1.1.0")
    assert await check_schema(conn) == "older"
    assert await migrate(database) == ["outbox/wake"]
    assert await check_schema(conn) == "current"
    comment = "SELECT obj_description('outbox_wake'::regproc)"
    assert await one(conn, comment) == "of 1.1"
    release()
    assert (await check_schema(conn), await migrate(database)) == ("newer", [])
    assert await one(conn, comment) == "of 1.1"
    # The same version with another text is a developer's.
    release(appended={"outbox/wake": changed + "-- more\n"}, version="1.1.0")
    assert await migrate(database) == ["outbox/wake"]


async def test_functions_change_together_or_not_at_all(
    connect: Connect, database: str, release: Release
) -> None:
    conn = await connect()
    changed = "\nCOMMENT ON FUNCTION outbox_wake() IS 'changed';\n"
    release(appended={"outbox/wake": changed, "session/access": "\nSELECT 1 / 0;\n"})
    with pytest.raises(psycopg.errors.DivisionByZero):
        await migrate(database)
    assert await one(conn, "SELECT obj_description('outbox_wake'::regproc)") != "changed"


async def test_a_frozen_file_in_another_form_is_refused(
    connect: Connect, database: str, release: Release
) -> None:
    conn = await connect()
    before = await describe(conn)
    release(appended={"outbox/0001_tables": "-- edited in place"})
    for check in (migrate(database), check_schema(conn), print_sql(database)):
        with pytest.raises(SchemaError, match=r"outbox/0001_tables was applied in another form.*uninstall"):
            await check
    assert await describe(conn) == before
    steps = {step.name: step.state for step in await plan(database)}
    assert steps["outbox/0001_tables"] == "changed"


async def test_the_frozen_files_are_as_they_were_frozen() -> None:
    """A change of a table is a new file. `make freeze` adds the line of a new one."""
    assert {file.name: file.sha256 for line in LINES for file in files(line) if file.number} == frozen()


async def test_every_file_is_applied_and_numbers_have_no_gap() -> None:
    for line in LINES:
        folder = ROOT / "sql" / line
        there = {f"{line}/{path.stem}" for path in folder.rglob("*.sql")}
        assert {file.name for file in files(line)} == there
        assert [file.number for file in files(line) if file.number] == list(
            range(1, len(list(folder.glob("*.sql"))) + 1)
        )
        assert all(GOES_ON in file.text or MUST_STOP in file.text for file in files(line) if file.number), (
            "each says whether older code may go on beside it"
        )


async def test_a_database_without_the_tables_says_what_to_do(connect: Connect, empty_database: str) -> None:
    conn = await connect(empty_database)
    with pytest.raises(SchemaError, match="has no outbox tables: run `outwake migrate`"):
        await check_schema(conn)
    assert await migrate(empty_database, only="outbox") == [n for n in NAMES if n.startswith("outbox/")]
    assert await check_schema(conn) == "current"
    with pytest.raises(SchemaError, match="has no session tables: run `outwake migrate`"):
        await check_schema(conn, LINES)


# Columns that a later version adds.


async def test_nothing_depends_on_the_number_of_a_tables_columns(connect: Connect, database: str) -> None:
    """Each table gets two more columns under a running API and a worker that has claimed."""
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn)
    await claim(conn, worker)
    async with serving(database) as api:
        await api.create(prompt="before")
        tables = await column(
            conn,
            "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r'",
            SCHEMA.name,
        )
        assert {"session", "prompt", "message", "outbox", "worker"} <= set(tables)
        for table in tables:
            await conn.execute(
                sql.SQL("ALTER TABLE {} ADD more_a text NOT NULL DEFAULT 'x', ADD more_b integer").format(
                    sql.Identifier(table)
                )
            )
        after = await api.create(prompt="after")
        asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "x"}
        for _ in range(2):
            again = await api.client.post("/sessions", json=asked, headers={"Idempotency-Key": "k"})
            assert again.status_code == 201, again.text
        more = await api.client.post(f"/sessions/{after['id']}/prompts", json={"prompt": "more"})
        assert more.status_code == 201, more.text
        for path in ("/", "/sessions", f"/sessions/{after['id']}", "/outbox/1", "/ui/outbox", "/ui/workers"):
            answer = await api.client.get(path, follow_redirects=True)
            assert answer.status_code == 200, (path, answer.text)
    assert await outwake.complete(conn, worker, [(row, 1)]) == {row}
    second = await add(conn)
    assert [claimed.id for claimed in await claim(conn, worker)] == [second]
    for view in await column(
        conn,
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'v'",
        SCHEMA.name,
    ):
        await conn.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(view)))
    assert await one(conn, "SELECT more_a FROM session ORDER BY created_at DESC LIMIT 1") == "x"


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
        "outwake.worker WHERE",
        "pg_catalog.pg_sequence_last_value",
        "outwake.outbox_sleepers",
        "::pg_catalog.regclass",
        "pg_catalog.current_setting('transaction_isolation')",
        "pg_catalog.current_setting('outwake.named', true)",
        "pg_catalog.set_config",
        "OPERATOR(pg_catalog.<>) 'read committed'",
        "OPERATOR(pg_catalog.<>) 'yes'",
        "outwake.outbox_notify",
        "outwake.outbox_all_awake",
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
        unqualified = re.sub(r"OPERATOR\(pg_catalog\.(.*?)\)|pg_catalog\.|outwake\.", r"\1", qualified)
        definition: str = await one(conn, "SELECT pg_get_functiondef('outbox_inserted'::regproc)")
        assert qualified in definition
        await conn.execute(definition.replace(qualified, unqualified).encode())
    await conn.execute("SET search_path = evil, pg_catalog, outwake, pg_temp")
    trapped = (psycopg.errors.RaiseException, psycopg.errors.WrongObjectType)
    with pytest.raises(trapped) if qualified else nullcontext():
        await conn.execute("SELECT pg_catalog.nextval('outwake.outbox_sleepers')")
        await conn.execute("INSERT INTO outwake.outbox (topic) VALUES ('t')")
        await conn.execute(
            "INSERT INTO outwake.worker (host, pid, version, topics, concurrency, parked)"
            " VALUES ('h', 1, '0', '{t}', 1, true)"
        )
        await conn.execute("SELECT pg_catalog.nextval('outwake.outbox_sleepers')")
        await conn.execute("INSERT INTO outwake.outbox (topic) VALUES ('t')")


UNEXPLAINED = """
SELECT c.oid::regclass::text FROM pg_class c
WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind IN ('r', 'v')
  AND obj_description(c.oid, 'pg_class') IS NULL
UNION ALL
SELECT p.oid::regprocedure::text FROM pg_proc p
WHERE p.pronamespace = 'outwake'::regnamespace AND p.prorettype <> 'trigger'::regtype
  AND obj_description(p.oid, 'pg_proc') IS NULL
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
UNION ALL
SELECT a.attrelid::regclass || '.' || a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
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


async def test_two_migrations_at_once_wait_whatever_the_database_says(
    connect: Connect, empty_database: str
) -> None:
    admin = await connect(empty_database)
    name = admin.info.dbname
    for setting in ("lock_timeout", "statement_timeout"):
        await admin.execute(f"ALTER DATABASE {name} SET {setting} = '1ms'".encode())
    both = await asyncio.gather(migrate(empty_database), migrate(empty_database))
    assert sorted(map(len, both)) == [0, len(NAMES)]

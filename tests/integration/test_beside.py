"""Outwake beside an application that exists: in its database, and in nothing of it."""

import asyncio
import json
import os
import re
import secrets
import shlex
import signal
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pytest
import sqlalchemy
from psycopg.types.json import Jsonb
from sqlalchemy.orm import Session

from outwake import SchemaError, claim, complete, fail, hand_back, migrate, register
from outwake._migrate import print_sql
from outwake.embedded.demo import make_repository
from outwake.embedded.postgres import EmbeddedPostgres
from outwake.sql import LINES, files, newest
from tests.conftest import Connect
from tests.support.beside import squatters, traps
from tests.support.database import set_search_path
from tests.support.pages import EXAMPLE, blocks, install_example
from tests.support.process import ROOT, Process, command_line, running
from tests.support.schema import describe
from tests.support.scraped import scrape
from tests.support.steps import LEASE, Connection, column, one, with_and_without
from tests.support.waits import awaiting
from tests.support.worker import command
from tests.support.worker import install as install_handlers
from tests.support.worker_env import WorkerEnv

JOBS = {"OUTWAKE_SCHEMA": "jobs"}
OUTBOX_TABLES = {"outbox", "worker", "topic", "outbox_alert", "producer_topic", "migration"}


@dataclass
class Role:
    """A role that logs in, and the database's URL for it."""

    name: str
    url: str


@dataclass
class Shop:
    """The application's database. `url` and `conn` are a superuser's."""

    url: str
    conn: Connection
    deployer: Role
    """Migrates, and runs the API."""
    app: Role
    worker: Role


@pytest.fixture
async def shop(empty_database: str, template: str, connect: Connect) -> AsyncIterator[Shop]:
    """A database with the search_path that every database has. The cluster has the roles of Outwake."""
    conn = await connect(empty_database)
    name = conn.info.dbname
    set_search_path(empty_database, "$user", "public")
    await conn.execute("SET search_path = public")
    roles = {}
    for what in ("deployer", "app", "worker"):
        role, password = f"{what}_{secrets.token_hex(4)}", secrets.token_hex(8)
        await conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'".encode())
        roles[what] = Role(role, with_user(empty_database, role, password))
    await conn.execute(f"GRANT CREATE ON DATABASE {name} TO {roles['deployer'].name}".encode())
    yield Shop(empty_database, conn, **roles)
    await conn.execute("RESET ROLE")
    for made in roles.values():
        await conn.execute(f"DROP OWNED BY {made.name} CASCADE; DROP ROLE {made.name}".encode())


def with_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}"))


async def outwake(url: str, *arguments: str, **env: str) -> Process:
    """Run the command to its end."""
    async with running("outwake", *arguments, env={"DATABASE_URL": url, **env}) as process:
        await process.ended()
    return process


async def succeeds(url: str, *arguments: str, **env: str) -> list[str]:
    """Run the command; what it printed."""
    process = await outwake(url, *arguments, **env)
    assert (await process.ended(), process.stderr) == (0, [])
    return process.stdout


# What is there, in `public` and elsewhere


async def dump(url: str, directory: Path, schema: str = "public") -> str:
    """A schema with its data, as pg_dump tells it."""
    program = EmbeddedPostgres(directory / "unused").psql.with_name("pg_dump")
    printed, complained = await ran(program, f"--schema={schema}", url)
    assert complained == ""
    # A token against injected commands, another each time.
    return re.sub(r"^\\(un)?restrict .*\n", "", printed, flags=re.MULTILINE)


async def ran(program: Path, *arguments: str, given: str = "") -> tuple[str, str]:
    """What a program printed, and what it complained of."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(program, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    printed, complained = await process.communicate(given.encode())
    return printed.decode(), complained.decode()


_CATALOGS = (
    *("am", "cast", "collation", "constraint", "conversion", "default_acl", "event_trigger", "extension"),
    *("foreign_data_wrapper", "foreign_server", "language", "namespace", "opclass", "operator", "opfamily"),
    *("policy", "proc", "publication", "rewrite", "statistic_ext", "trigger", "ts_config", "ts_dict", "type"),
    *("class", "attrdef"),
)
_OBJECTS = " UNION ALL ".join(
    f"SELECT 'pg_{name}'::regclass AS catalog, oid FROM pg_{name}" for name in _CATALOGS
)
_OUTSIDE = f"""
SELECT format('%s %s', i.type, i.identity)
FROM ({_OBJECTS}) AS o
CROSS JOIN LATERAL pg_identify_object(o.catalog, o.oid, 0) AS i
WHERE o.oid >= 16384 AND i.schema IS DISTINCT FROM 'pg_toast' AND i.schema IS DISTINCT FROM 'outwake'
  AND i.identity !~ '\\moutwake\\.' AND (i.type, i.identity) <> ('schema', 'outwake')
UNION ALL
SELECT format('setting %s %s', setrole::regrole, setconfig) FROM pg_db_role_setting
WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL
SELECT format('rights %s %s', nspname, nspacl) FROM pg_namespace WHERE nspname <> 'outwake'
UNION ALL
SELECT format('rights %s', datacl) FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT format('comment %s %s', i.identity, d.description)
FROM pg_description AS d CROSS JOIN LATERAL pg_identify_object(d.classoid, d.objoid, d.objsubid) AS i
WHERE d.objoid >= 16384 AND i.identity !~ '\\moutwake\\M'
ORDER BY 1
"""


async def outside(conn: Connection) -> list[str]:
    """Everything in the database that is not in our schema."""
    return await column(conn, _OUTSIDE)


# 1. Beside the same names


@pytest.mark.parametrize("search_path", ["", "evil, public"])
async def test_application_with_all_our_names_does_not_notice(
    search_path: str, shop: Shop, connect: Connect, tmp_path: Path
) -> None:
    """Migrated, used by INSERT and by HTTP, uninstalled. Also where traps come first in the search_path."""
    await build_application(shop, await connect())
    if search_path:
        await shop.conn.execute(
            f"ALTER DATABASE {shop.conn.info.dbname} SET search_path = {search_path}".encode()
        )
    before, around = await dump(shop.url, tmp_path), await outside(shop.conn)

    await succeeds(shop.deployer.url, "migrate")
    assert await outside(shop.conn) == around
    if search_path:
        await shop.conn.execute(f"CREATE SCHEMA evil AUTHORIZATION {shop.app.name}".encode())
        await shop.conn.execute("GRANT USAGE ON SCHEMA evil TO PUBLIC")
        await set_traps(shop, await connect(), "evil")
    await use(shop, tmp_path)
    if search_path:
        assert await one(shop.conn, "SELECT is_called FROM evil.trapped") is False
        await shop.conn.execute("DROP SCHEMA evil CASCADE")
    assert await outside(shop.conn) == around

    uninstall = await succeeds(shop.deployer.url, "uninstall")
    async with await connect(shop.deployer.url) as deployer:
        await deployer.execute("\n".join(uninstall).encode())
    assert await outside(shop.conn) == around
    await shop.conn.execute("TRUNCATE shop_order, sent")
    assert await dump(shop.url, tmp_path) == before


async def build_application(shop: Shop, migrated: Connection) -> None:
    """Its tables, and a relation, a type or a function of each of our names."""
    app, worker = shop.app.name, shop.worker.name
    await shop.conn.execute((await squatters(migrated, "public")).encode())
    await shop.conn.execute(
        f"""
        CREATE TABLE shop_order (id integer PRIMARY KEY, article text);
        CREATE TABLE sent (row_id bigint, article text);
        GRANT INSERT ON shop_order TO {app};
        GRANT INSERT ON sent TO {worker};
        GRANT SELECT, INSERT ON outbox, session TO {app};
        GRANT outwake_producer TO {app};
        GRANT outwake_worker TO {worker};
        CREATE FUNCTION of_the_shop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER outbox_inserted AFTER INSERT ON outbox EXECUTE FUNCTION of_the_shop();
        """.encode()
    )


async def set_traps(shop: Shop, migrated: Connection, schema: str) -> None:
    """By the application's role, which may create objects in this schema, and once could name our types."""
    trapping = await traps(migrated, schema, shop.app.name)
    types = await column(
        migrated,
        "SELECT string_agg('outwake.' || typname, ', ') FROM pg_type"
        " WHERE typnamespace = 'outwake'::regnamespace AND typcategory <> 'A'",
    )
    await shop.conn.execute(f"GRANT USAGE ON TYPE {types[0]} TO {shop.app.name}".encode())
    await shop.conn.execute(f"SET ROLE {shop.app.name}; {trapping}; RESET ROLE".encode())
    await shop.conn.execute(f"REVOKE USAGE ON TYPE {types[0]} FROM {shop.app.name}".encode())


async def use(shop: Shop, directory: Path) -> None:
    """A row next to a row of the application's, and a session, each from its start to its end."""
    await shop.conn.execute(
        f"INSERT INTO outwake.producer_topic VALUES ('{shop.app.name}', 'email.send')".encode()
    )
    install_example(EXAMPLE, directory)
    environment = {**WorkerEnv(shop.worker.url, directory).environment, "PYTHONPATH": f"{directory}:{ROOT}"}
    repository = make_repository(directory / "repository").as_uri()
    api_environment = {**environment, "DATABASE_URL": shop.deployer.url, "OUTWAKE_PORT": "0"}
    async with (
        running("worker", env=environment) as worker,
        running("outwake", "api", env=api_environment) as api,
    ):
        await worker.event("parked")
        row = await order(shop.app.url, "lamp")
        await worker.event("ended", outbox_id=row, state="settled by its handler")
        assert await column(shop.conn, "SELECT article FROM sent JOIN shop_order USING (article)") == ["lamp"]

        ready = await api.event("api_ready")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}", timeout=60) as client:
            assert (await client.get("/readyz?workers=1")).status_code == 200
            asked = {"repo": repository, "target_branch": "main", "prompt": "Write a note"}
            created = await client.post("/sessions", json=asked)
            assert created.status_code == 201, created.text
            path = f"/sessions/{created.json()['id']}"
            await worker.event("ended", topic="session.run")
            await client.get(f"{path}/events?until=completed")
            found = (await client.get(path)).json()
            assert (found["inbox_status"], found["prompts"][0]["status"]) == ("completed", "succeeded")
            await worker.event("sandbox_returned")
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/")).status_code == 200
        await succeeds(shop.deployer.url, "status")
        await succeeds(shop.deployer.url, "prune")
    for process in (worker, api):
        assert await process.ended() == 0
        wrong = [
            e for e in process.events if e["level"] not in ("debug", "info") and e["event"] != "dev_identity"
        ]
        assert wrong == []


async def order(url: str, article: str) -> int:
    """What the application does: its own row and ours in one transaction."""
    async with await psycopg.AsyncConnection.connect(url) as conn:
        await conn.execute("INSERT INTO public.shop_order (id, article) VALUES (1, %s)", (article,))
        await conn.execute("SELECT article FROM public.outbox")
        query = "INSERT INTO outwake.outbox (topic, payload) VALUES ('email.send', %s) RETURNING id"
        found = await (await conn.execute(query, (Jsonb({"article": article}),))).fetchone()
        assert found is not None
        return int(found[0])


# 2. Beside an attacker

# The schemas that an attacker's session looks into first, before the server's own.
ATTACKER_PATHS = ['"$user", public', "public, pg_catalog", "pg_temp, public, pg_catalog, outwake"]

TEMPORARY = """
CREATE TEMP VIEW worker AS SELECT public.trap('temporary worker') IS NULL AS parked;
CREATE TEMP VIEW topic AS SELECT public.trap('temporary topic') IS NULL AS name;
CREATE TEMP VIEW inserted AS SELECT public.trap('temporary inserted') IS NULL AS state;
CREATE TEMP VIEW outbox AS SELECT public.trap('temporary outbox') IS NULL AS id;
CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (public.trap('temporary text') IS NULL);
CREATE DOMAIN pg_temp.uuid AS pg_catalog.uuid CHECK (public.trap('temporary uuid') IS NULL);
CREATE DOMAIN pg_temp.regclass AS pg_catalog.regclass CHECK (public.trap('temporary regclass') IS NULL);
"""


@with_and_without
async def test_attacker_who_may_create_in_public_gets_no_rights(
    rule: str, shop: Shop, connect: Connect, tmp_path: Path
) -> None:
    """Of the owner, here a superuser, or of a worker. Taken out: one function looks into public."""
    attacker = shop.app.name
    await shop.conn.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    assert await migrate(shop.url)
    await shop.conn.execute(f"GRANT outwake_producer TO {attacker}".encode())
    topics = "unnest('{flaky,noop,poison}'::text[])"
    await shop.conn.execute(f"INSERT INTO outwake.producer_topic SELECT '{attacker}', {topics}".encode())
    await set_traps(shop, await connect(), "public")
    if rule == "taken out":
        await shop.conn.execute("ALTER FUNCTION outwake.outbox_settle() SET search_path = outwake, public")
    owner = await connect(shop.url, application_name="owner")
    assert await one(owner, "SHOW search_path") == '"$user", public'

    with (
        pytest.raises(psycopg.errors.RaiseException, match="trapped by outbox_")
        if rule == "taken out"
        else nullcontext()
    ):
        await attack(shop, connect, owner)
    trapped = await one(shop.conn, "SELECT is_called FROM public.trapped")
    assert trapped is (rule == "taken out")
    if rule == "kept":
        await work_for_attacker(shop, connect, tmp_path)
        assert await one(shop.conn, "SELECT is_called FROM public.trapped") is False


async def attack(shop: Shop, connect: Connect, owner: Connection) -> None:
    """Rows of the attacker's, and all that the owner's functions do with them, while a worker is parked."""
    worker = await register(owner, ["flaky", "noop"])
    lost = await register(owner, ["flaky"])
    await owner.execute("INSERT INTO outwake.topic VALUES ('noop', 3)")
    for number, path in enumerate(ATTACKER_PATHS):
        conn = await connect(shop.app.url)
        await conn.execute(f"{TEMPORARY}; SET search_path = {path}".encode())
        for parked in (False, True):
            if parked:
                await owner.execute("SELECT outwake.outbox_writers(), outwake.outbox_park(%s)", (worker,))
            row = await insert_all(conn, f"{number} {parked}")
            rows = await claim(owner, worker, ["flaky", "noop"], 20, lease=LEASE)
            assert row in [found.id for found in rows]
            tokens = [(found.id, found.attempt) for found in rows]
            await owner.execute("SELECT outwake.outbox_renew(%s, '1 minute', %s, %s)", (worker, [], []))
            await fail(owner, worker, tokens.pop(), "no", delay=timedelta(0))
            await fail(owner, worker, tokens.pop(), "no", permanent=True)
            await hand_back(owner, worker, [tokens.pop()])
            assert await one(owner, "SELECT outwake.outbox_cancel(%s)", tokens[0][0]) == "running"
            await complete(owner, worker, tokens)
    await owner.execute("UPDATE outwake.topic SET max_running = 4")
    # Not by state = 'dead': what is typed into psql does look into public (docs/adopt.md).
    dead = "SELECT outwake.outbox_retry(id) FROM outwake.outbox WHERE finished_at IS NOT NULL"
    assert "ready" in await column(owner, dead)
    assert await claim(owner, lost, ["flaky"], 1, lease=LEASE)
    await owner.execute("UPDATE outwake.worker SET lease_until = '2000-01-01' WHERE id = %s", (lost,))
    assert await one(owner, "SELECT outwake.outbox_rescue(%s, '0', '1 hour')", worker) == 1
    await owner.execute("DELETE FROM outwake.worker WHERE id = %s", (worker,))
    for statement in (
        "SELECT outwake.outbox_wake(), outwake.outbox_ready(), outwake.outbox_stuck_report('0', '0')",
        "SELECT outwake.worker_prune(now(), 10), outwake.session_prune(now(), now(), 10)",
        "SELECT (outwake.outbox_prune(now(), 0, 100)).deleted",
        "SELECT count(*) FROM outwake.outbox_waiting, outwake.outbox_depth, outwake.worker_status",
        "SELECT outwake.outbox_history(max(id)) FROM outwake.outbox",
    ):
        await owner.execute(statement.encode())
    await owner.execute("UPDATE outwake.migration SET sha256 = '' WHERE number IS NULL")
    assert len(await migrate(shop.url)) > 20


async def insert_all(conn: Connection, mark: str) -> int:
    """By each way, of which the last returns an id."""
    rows = (
        "INSERT INTO outwake.outbox (topic) VALUES ('flaky'), ('noop'), ('flaky')",
        f"INSERT INTO outwake.outbox (topic, ordering_key) VALUES ('flaky', '{mark}'), ('noop', '{mark}')",
        "INSERT INTO outwake.outbox (topic) VALUES (ROW('flaky')::public.sly)",
        f"SELECT outwake.enqueue('flaky', unique_key => '{mark}')",
        f"SELECT outwake.enqueue('flaky', unique_key => '{mark}', on_duplicate => 'replace')",
        f"SELECT outwake.enqueue('flaky', unique_key => '{mark}', on_duplicate => 'keep')",
        "BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO outwake.outbox (topic) VALUES ('noop'); COMMIT",
    )
    for statement in rows:
        await conn.execute(statement.encode())
    return int(await one(conn, "SELECT outwake.enqueue('flaky')"))


async def work_for_attacker(shop: Shop, connect: Connect, directory: Path) -> None:
    """Real workers, as the owner: one dies of a row, the other rescues it and retries. Then the commands."""
    handlers = install_handlers(directory)
    await shop.conn.execute("SET search_path = pg_catalog")
    await shop.conn.execute("UPDATE outwake.outbox SET state = 'cancelled' WHERE topic <> 'outbox.prune'")
    await shop.conn.execute("UPDATE outwake.outbox SET available_at = now() WHERE topic = 'outbox.prune'")
    attacker = await connect(shop.app.url)
    async with command(shop.url, handlers, lease=2) as first:
        await first.event("pruned")
        await first.event("parked")
        query = "INSERT INTO outwake.outbox (topic, max_attempts) VALUES ('poison', 1) RETURNING id"
        poison = await one(attacker, query)
        assert await first.ended() == -signal.SIGKILL
    async with command(shop.url, handlers, lease=2) as second:
        await second.event("rescued")
        flaky = await one(attacker, """SELECT outwake.enqueue('flaky', '{"times": 1}')""")
        await second.event("ended", outbox_id=flaky, state="ready")
        await second.event("completed", rows=[flaky])
    assert await one(shop.conn, "SELECT state FROM outwake.outbox WHERE id = %s", poison) == "dead"
    for words in (
        "status --json",
        "prune",
        f"retry {poison}",
        f"cancel {poison}",
        "token create --user ann --name test",
        "token list",
        "migrate --list",
    ):
        assert await (await outwake(shop.url, *words.split())).ended() in (0, 1)


# Neither is given a search_path, nor was bound to what it calls when it was made.
_UNBOUND = """
SELECT p.oid::regprocedure::text FROM pg_proc AS p
WHERE p.pronamespace = 'outwake'::regnamespace AND p.prosqlbody IS NULL
  AND NOT coalesce(p.proconfig, '{}') @> ARRAY['search_path=outwake, pg_temp']
"""
NAMES_EVERY_SCHEMA = ["outbox_inserted()"]


async def test_every_function_says_where_its_names_are_looked_up(connect: Connect) -> None:
    """Else it is in the list, and each name in its body is written with its schema."""
    conn = await connect()
    assert await column(conn, _UNBOUND) == NAMES_EVERY_SCHEMA
    owners = (
        "SELECT p.oid::regprocedure::text FROM pg_proc AS p WHERE p.prosecdef AND p.prosqlbody IS NOT NULL"
    )
    assert await column(conn, owners) == []
    for function in NAMES_EVERY_SCHEMA:
        body: str = await one(conn, "SELECT prosrc FROM pg_proc WHERE oid = %s::regprocedure", function)
        assert unqualified(body) == []


def unqualified(body: str) -> list[str]:
    """What a function's body names without a schema: functions, tables, types and operators."""
    body = re.sub(r"--.*", "", body)
    body = re.sub(r"'[^']*'", "''", body)
    body = re.sub(r"OPERATOR\(pg_catalog\.[^)]*\)", " ", body)
    words = [name for name in re.findall(r"(?<![\w.])(\w+)\(", body) if name != "coalesce"]
    words += [
        name
        for name in re.findall(r"\b(?:FROM|JOIN|UPDATE|INTO) (\w+)(?![\w.])", body)
        if name not in ("WHERE", "inserted")
    ]
    words += re.findall(r"::(?!pg_catalog\.)\w+", body)
    return words + re.findall(r"(?<![:<>=!])[-+*/<>=~!@#%^&|`?]+", body.replace("count(*)", ""))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("PERFORM outwake.f(pg_catalog.min(i.id)) FROM inserted AS i WHERE FOUND", []),
        ("IF a OPERATOR(pg_catalog.<>) 'x = y' THEN", []),
        ("PERFORM FROM outwake.worker WHERE parked; -- a = b", []),
        (
            "PERFORM outbox_notify(x::text) FROM worker WHERE a = 1",
            ["outbox_notify", "worker", "::text", "="],
        ),
        ("PERFORM outwake.f(max(x))", ["max"]),
    ],
)
def test_name_without_a_schema_is_found(body: str, names: list[str]) -> None:
    assert unqualified(body) == names


# 3. Beside another installation


async def test_two_installations_in_one_database_do_not_mix(
    shop: Shop, connect: Connect, tmp_path: Path
) -> None:
    await succeeds(shop.url, "migrate")
    await succeeds(shop.url, "migrate", **JOBS)
    handlers, ear = install_handlers(tmp_path), await connect(shop.url)
    await ear.execute("LISTEN outwake_wake; LISTEN jobs_wake")
    ours = command(shop.url, handlers, OUTWAKE_HEALTH_PORT="0")
    theirs = command(shop.url, handlers, OUTWAKE_HEALTH_PORT="0", OUTWAKE_SCHEMA="jobs")
    async with ours as worker:
        async with theirs as other:
            ids = {}
            for schema, process in (("outwake", worker), ("jobs", other)):
                await process.event("parked")
                ids[schema] = (await process.event("registered"))["worker_id"]
            assert ids["outwake"] != ids["jobs"]
            for schema, process in (("outwake", worker), ("jobs", other)):
                row = await one(
                    shop.conn, f"INSERT INTO {schema}.outbox (topic) VALUES ('noop') RETURNING id"
                )
                assert row == 2  # of each: by its number nobody could tell whose it is
                await process.event("completed", rows=[row])
            for process in (worker, other):
                assert (await scrape(process))["outwake_worker_wakeups_total", "notify"] == 1
                assert len([event for event in process.events if event["event"] == "claimed"]) == 1
            heard = [note.channel async for note in ear.notifies(timeout=0)]
            assert heard == ["outwake_wake", "jobs_wake"]

            for schema, env in (("outwake", {}), ("jobs", JOBS)):
                assert await column(shop.conn, f"SELECT id::text FROM {schema}.worker_present") == [
                    ids[schema]
                ]
                status = json.loads((await succeeds(shop.url, "status", "--json", **env))[0])
                assert [found["id"] for found in status["workers"]] == [ids[schema]]
            # By the number of a presence alone, who is there would be in both.
            await shop.conn.execute(
                "BEGIN; UPDATE jobs.worker SET presence = (SELECT presence FROM outwake.worker)"
            )
            assert await column(shop.conn, "SELECT id FROM jobs.worker_present") == []
            await shop.conn.execute("ROLLBACK")
        uninstall = await succeeds(shop.url, "uninstall", **JOBS)
        await shop.conn.execute("\n".join(uninstall).encode())
        assert await one(shop.conn, "SELECT to_regnamespace('jobs')") is None
        row = await one(shop.conn, "INSERT INTO outwake.outbox (topic) VALUES ('noop') RETURNING id")
        await worker.event("completed", rows=[row])
        await succeeds(shop.url, "status")
        gone = await outwake(shop.url, "status", **JOBS)
        assert gone.stderr == ["outwake: schema jobs has no outbox tables: run `outwake migrate`"]


# 4. The outbox alone


async def test_outbox_alone_is_enough_for_handlers_of_ones_own(
    shop: Shop, connect: Connect, tmp_path: Path
) -> None:
    """Without sessions, and with them when they come later, beside a worker that runs."""
    await succeeds(shop.url, "migrate", "--only", "outbox")
    set_search_path(shop.url)
    conn = await connect(shop.url)
    assert await one(conn, "SELECT count(*) FROM pg_tables WHERE schemaname = 'outwake'") == len(
        OUTBOX_TABLES
    )
    assert (
        set(await column(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'outwake'"))
        == OUTBOX_TABLES
    )
    await conn.execute("UPDATE outbox SET available_at = now()")
    handlers = install_handlers(tmp_path)
    async with command(shop.url, handlers, OUTWAKE_HEALTH_PORT="0") as worker:
        topics = (await worker.event("registered"))["topics"]
        assert topics == ["effect", "flaky", "hang", "noop", "outbox.prune", "poison", "wait"]
        assert (await worker.event("no_sessions"))["topics"] == topics
        await worker.event("ended", topic="outbox.prune", state="settled by its handler")
        row = await one(conn, "INSERT INTO outbox (topic) VALUES ('noop') RETURNING id")
        await worker.event("completed", rows=[row])
        await worker.event("parked")
        assert (await scrape(worker))["outwake_worker_attempts_total", "noop", "done"] == 1
        await succeeds(shop.url, "status")
        await succeeds(shop.url, "prune")
        environment = {**WorkerEnv(shop.url, tmp_path).environment, "OUTWAKE_PORT": "0"}
        async with running("outwake", "api", env=environment) as api:
            ready = await api.event("api_ready")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}", timeout=60) as client:
                await api.event("listening")
                answer = await client.get("/readyz")
                assert answer.status_code == 503
                assert (
                    "Schema outwake has no session tables: run `outwake migrate`." in answer.json()["detail"]
                )
                asked = {
                    "repo": make_repository(tmp_path / "r").as_uri(),
                    "target_branch": "main",
                    "prompt": "x",
                }
                answer = await client.post("/sessions", json=asked)
                assert (answer.status_code, answer.json()["type"]) == (503, "urn:outwake:problem:unavailable")
                answer = await client.get("/metrics")
                assert (answer.status_code, "outwake_outbox_rows" in answer.text) == (200, True)

                applied = await succeeds(shop.url, "migrate")
                assert {line.split()[1].partition("/")[0] for line in applied if "applying" in line} == {
                    "session"
                }
                async with awaiting(
                    "the API to ask the database again: an answer serves for a second or more"
                ):
                    while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                async with running("worker", env=environment) as other:
                    await other.event("parked")
                    created = await client.post("/sessions", json=asked)
                    assert created.status_code == 201
                    await other.event("turn_ended", status="succeeded")
                    await other.event("sandbox_returned")
        row = await one(conn, "INSERT INTO outbox (topic) VALUES ('noop') RETURNING id")
        await worker.event("completed", rows=[row])
    assert [event for event in worker.events if event["level"] not in ("debug", "info")] == []


async def test_migrated_line_by_line_it_is_the_same(shop: Shop, connect: Connect) -> None:
    await succeeds(shop.url, "migrate", "--only", "outbox")
    await succeeds(shop.url, "migrate")
    set_search_path(shop.url)
    assert await describe(await connect(shop.url)) == await describe(await connect())


# 5. Printed


@pytest.mark.parametrize("before", ["", "outbox"])
async def test_printed_sql_does_what_migrate_does(
    before: str, shop: Shop, connect: Connect, tmp_path: Path
) -> None:
    if before:
        await succeeds(shop.url, "migrate", "--only", before)
    printed = await succeeds(shop.url, "migrate", "--print")
    created = re.findall(r"^-- (outbox|session)/(\w+)$", "\n".join(printed), re.MULTILINE)
    missing = [file for line in LINES for file in files(line) if line != before]
    assert sorted("/".join(found) for found in created) == sorted(file.name for file in missing)
    assert printed == await succeeds(shop.url, "migrate", "--print")  # it changed nothing
    if not before:
        assert printed == await succeeds("", "migrate", "--print")

    assert await psql(shop.url, printed, tmp_path) == ""
    set_search_path(shop.url)
    assert await describe(await connect(shop.url)) == await describe(await connect())
    assert [line for line in await succeeds(shop.url, "migrate") if "applying" in line] == []
    assert await succeeds(shop.url, "migrate", "--print") == []
    async with command(shop.url, install_handlers(tmp_path)) as worker:
        await worker.event("parked")
    assert [event for event in worker.events if event["level"] not in ("debug", "info")] == []


async def test_printed_sql_that_fails_leaves_nothing(shop: Shop, tmp_path: Path) -> None:
    """Though psql goes on behind an error, and ends as if there was none."""
    printed = await succeeds(shop.url, "migrate", "--print")
    assert (printed[1], printed[-1]) == ("BEGIN;", "COMMIT;")
    assert "division by zero" in await psql(shop.url, [*printed[:-1], "SELECT 1 / 0;", printed[-1]], tmp_path)
    assert await one(shop.conn, "SELECT to_regnamespace('outwake')") is None


async def test_printed_for_a_transaction_of_others_it_leaves_their_search_path(shop: Shop) -> None:
    printed = await succeeds(shop.url, "migrate", "--print", "--no-transaction")
    assert not {"BEGIN;", "COMMIT;"} & set(printed)
    async with shop.conn.transaction():
        await shop.conn.execute("SET LOCAL search_path = 'of the shop', public")
        await shop.conn.execute("\n".join(printed).encode())
        assert await one(shop.conn, "SHOW search_path") == '"of the shop", public'
    assert [line for line in await succeeds(shop.url, "migrate") if "applying" in line] == []


async def psql(url: str, script: list[str], directory: Path) -> str:
    """Let psql run a script, as `psql -f -` does; what it complained of."""
    program = EmbeddedPostgres(directory / "unused").psql
    _, complained = await ran(program, "--no-psqlrc", "--quiet", "-f", "-", url, given="\n".join(script))
    return complained


# 6. Where it must not go

FOREIGN = "holds objects that are not Outwake's: name another schema by OUTWAKE_SCHEMA"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("CREATE TABLE outwake.ticket ()", FOREIGN),
        ("CREATE FUNCTION outwake.f() RETURNS integer RETURN 1", FOREIGN),
        ("CREATE TYPE outwake.topic_name AS ENUM ('a')", FOREIGN),
        ("CREATE TABLE outwake.migration (id integer)", "the table outwake.migration is not Outwake's"),
        ("GRANT CREATE ON SCHEMA outwake TO PUBLIC", "PUBLIC may create objects in the schema outwake"),
        ("GRANT ALL ON SCHEMA outwake TO app", "app may create objects in the schema outwake, and so make"),
        ("ALTER SCHEMA outwake OWNER TO app", "the schema outwake belongs to app: migrate as that role"),
    ],
)
@pytest.mark.parametrize("by", ["superuser", "deployer"])
async def test_schema_of_others_is_refused(made: str, said: str, by: str, shop: Shop, tmp_path: Path) -> None:
    """And left as it is."""
    url, owner = (shop.url, "CURRENT_USER") if by == "superuser" else (shop.deployer.url, shop.deployer.name)
    made, said = (re.sub(r"\bapp\b", shop.app.name, text) for text in (made, said))
    await shop.conn.execute(f"CREATE SCHEMA outwake AUTHORIZATION {owner}; {made}".encode())
    before = await dump(shop.url, tmp_path, "outwake")
    for refused in (migrate(url), print_sql(url)):
        with pytest.raises(SchemaError, match=f"^[^\n]*{re.escape(said)}[^\n]*$"):
            await refused
    assert await dump(shop.url, tmp_path, "outwake") == before


async def test_schema_in_which_others_may_create_by_default_is_refused(shop: Shop) -> None:
    await shop.conn.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO {shop.app.name}".encode())
    process = await outwake(shop.url, "migrate")
    assert await process.ended() == 2
    [said] = process.stderr
    assert said.startswith(f"outwake: {shop.app.name} may create objects in the schema outwake")
    await shop.conn.execute(said.rpartition(": ")[2].encode())  # what it says
    assert f"schema outwake: outbox {newest('outbox')}, session {newest('session')}" in await succeeds(
        shop.url, "migrate"
    )


@pytest.mark.parametrize("name", ["public", "pg_x", "Bad Name", "select", "information_schema"])
async def test_name_that_cannot_be_a_schemas_is_refused(name: str, shop: Shop) -> None:
    process = await outwake(shop.url, "migrate", OUTWAKE_SCHEMA=name)
    assert (await process.ended(), process.stdout) == (2, [])
    [said] = process.stderr
    assert said.startswith("outwake: ")
    assert "OUTWAKE_SCHEMA" in said


async def test_migrate_does_not_look_into_the_schemas_of_others(shop: Shop) -> None:
    """Whoever may create in public waits there for a superuser who migrates."""
    await shop.conn.execute(
        """
        CREATE FUNCTION trap(oid, integer) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE ''trapped''; END';
        CREATE OPERATOR = (FUNCTION = trap, LEFTARG = oid, RIGHTARG = integer);
        CREATE SCHEMA outwake; GRANT CREATE ON SCHEMA outwake TO PUBLIC;
        """
    )
    with pytest.raises(SchemaError, match="PUBLIC may create"):
        await migrate(shop.url)


# 7. What the page shows


async def test_the_page_leads_from_nothing_to_a_row_that_is_handled_and_back(
    shop: Shop, tmp_path: Path
) -> None:
    """Alembic's part: test_alembic.py."""
    page, deployer = Page(shop, tmp_path), f"export OUTWAKE_DATABASE_URL={shop.deployer.url}"
    await shop.conn.execute(
        "CREATE TABLE shop_order (article text); CREATE TABLE sent (row_id bigint, article text)"
    )
    await shop.conn.execute(f"GRANT INSERT ON shop_order TO {shop.app.name}".encode())
    before = await dump(shop.url, tmp_path)
    migrate_it, work, status, _, jobs, uninstall = page.blocks("console")
    producer, insert, mailer, revoke = page.blocks("sql")

    await page.run(migrate_it)
    await shop.conn.execute(f"{producer}; {mailer}".encode())
    install_example(EXAMPLE, tmp_path)
    url, command_line_of_worker = work.splitlines()
    assert command_line_of_worker == "worker"
    environment = {
        "OUTWAKE_DATABASE_URL": url.partition("=")[2],
        "OUTWAKE_LOG_LEVEL": "debug",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    async with running("worker", env=environment) as worker:
        await worker.event("parked")
        async with await psycopg.AsyncConnection.connect(shop.app.url, autocommit=True) as app:
            await app.execute(insert.encode())
        names: dict[str, Any] = {}
        exec(page.blocks("python")[0], names)  # noqa: S102
        engine = sqlalchemy.create_engine(shop.app.url.replace("postgresql://", "postgresql+psycopg://"))
        with Session(engine) as session, session.begin():
            row = names["order"](session, "lamp")
        engine.dispose()
        await worker.event("ended", outbox_id=row, state="settled by its handler")
        await page.run(f"{deployer}\n{status}")
    assert await column(shop.conn, "SELECT article FROM sent") == ["lamp", "lamp"]
    assert await column(shop.conn, "SELECT article FROM shop_order") == ["lamp", "lamp"]

    await page.run(f"{deployer}\n{jobs.splitlines()[0]}")
    assert await one(shop.conn, "SELECT count(*) FROM jobs.migration") > 0
    await shop.conn.execute(revoke.encode())
    await page.run(f"{deployer}\n{uninstall}")
    await shop.conn.execute("DROP SCHEMA jobs CASCADE; TRUNCATE shop_order, sent")
    await shop.conn.execute(f"REVOKE INSERT ON sent FROM {shop.worker.name}".encode())
    assert await dump(shop.url, tmp_path) == before


class Page:
    """docs/adopt.md, with this test's roles and database."""

    def __init__(self, shop: Shop, directory: Path) -> None:
        self._names = {
            "postgresql://deployer@localhost/shop": shop.deployer.url,
            "postgresql://mailer@localhost/shop": shop.worker.url,
            r"\bmailer\b": shop.worker.name,
            r"(TO |\(')shop\b": rf"\1{shop.app.name}",
        }
        self._programs = directory / "programs"
        self._programs.mkdir()
        psql = [str(EmbeddedPostgres(directory / "unused").psql)]
        for name, line in (("outwake", command_line("outwake")), ("psql", psql)):
            program = self._programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(line)} "$@"\n')
            program.chmod(0o755)

    def blocks(self, language: str) -> list[str]:
        """Commands without their prompt."""
        found = blocks("adopt.md", language)
        for name, real in self._names.items():
            found = [re.sub(name, real, block) for block in found]
        return [re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in found]

    async def run(self, commands: str) -> None:
        """Raises AssertionError if one fails."""
        environment = {
            **os.environ,
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        bash = await asyncio.create_subprocess_exec(
            *("bash", "-e", "-o", "pipefail", "-c", commands), env=environment, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await bash.communicate()
        assert bash.returncode == 0, printed.decode()

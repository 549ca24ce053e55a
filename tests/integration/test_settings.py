"""Whatever a role or a database sets, everything works: docs/database-settings.md has the list.

Each setting is set at a database and at a role that owns it, which logs in as migrate, worker, API and prune.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from outwake import enqueue, migrate
from outwake._options import OWN, SINCE_17
from outwake.connect import ServerConnection, connect, conninfo
from outwake.embedded.demo import make_repository
from tests.support.api import serving
from tests.support.database import new_database
from tests.support.process import ROOT, running
from tests.support.roles import Role, roles_of
from tests.support.server import with_database
from tests.support.steps import one
from tests.support.worker import install
from tests.support.worker_env import WorkerEnv

PLANNER = {name: "off" for name in OWN if name.startswith("enable_")}

SETTINGS: dict[str, dict[str, str]] = {
    "repeatable read": {"default_transaction_isolation": "repeatable read"},
    "serializable": {
        "default_transaction_isolation": "serializable",
        "default_transaction_deferrable": "on",
    },
    "read only": {"default_transaction_read_only": "on"},
    "statement_timeout": {"statement_timeout": "1"},
    "lock_timeout": {"lock_timeout": "1"},
    "idle timeouts": {"idle_in_transaction_session_timeout": "1", "idle_session_timeout": "20"},
    "transaction_timeout": {"transaction_timeout": "1"},
    "TimeZone": {"TimeZone": "Pacific/Kiritimati"},
    "DateStyle German": {"DateStyle": "German"},
    "DateStyle SQL": {"DateStyle": "SQL, DMY"},
    "IntervalStyle iso": {"IntervalStyle": "iso_8601"},
    "IntervalStyle sql": {"IntervalStyle": "sql_standard"},
    "IntervalStyle verbose": {"IntervalStyle": "postgres_verbose"},
    "client_encoding": {"client_encoding": "LATIN1"},
    "search_path": {"search_path": "pg_temp, elsewhere"},
    "bytea_output": {"bytea_output": "escape"},
    "extra_float_digits": {"extra_float_digits": "-15"},
    "jit": {"jit": "on", "jit_above_cost": "0", "jit_optimize_above_cost": "0", "jit_inline_above_cost": "0"},
    "planner": PLANNER,
    "plans": {
        "plan_cache_mode": "force_generic_plan",
        "from_collapse_limit": "1",
        "join_collapse_limit": "1",
    },
    "parallel": {
        "parallel_setup_cost": "0",
        "parallel_tuple_cost": "0",
        "min_parallel_table_scan_size": "0",
        "min_parallel_index_scan_size": "0",
    },
    "costs": {"seq_page_cost": "0", "random_page_cost": "100000", "work_mem": "64", "geqo_threshold": "2"},
    "row_security": {"row_security": "off"},
    "session_replication_role": {"session_replication_role": "replica"},
    "literals": {"standard_conforming_strings": "off", "backslash_quote": "off"},
    "nulls": {"array_nulls": "off", "transform_null_equals": "on"},
    "quoting": {"quote_all_identifiers": "on"},
    "exit_on_error": {"exit_on_error": "on"},
    "plpgsql": {"plpgsql.extra_errors": "all", "plpgsql.extra_warnings": "all"},
    "check_function_bodies": {"check_function_bodies": "off"},
    "messages": {"client_min_messages": "debug1"},
    "synchronous_commit": {"synchronous_commit": "off"},
    "xml": {"xmloption": "document", "xmlbinary": "hex"},
    "lc": {"lc_numeric": "C", "lc_time": "C", "lc_monetary": "C"},
}


def set_everywhere(url: str, role: Role, settings: dict[str, str]) -> None:
    """Set them at the database, and at the role."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("LOAD 'plpgsql'")
        if admin.info.server_version < 170000:
            settings = {name: value for name, value in settings.items() if name not in SINCE_17}
        for name, value in settings.items():
            text = sql.SQL(value) if "," in value else sql.Literal(value)
            for what in (
                sql.SQL("DATABASE {}").format(sql.Identifier(admin.info.dbname)),
                sql.SQL("ROLE {}").format(sql.Identifier(role.name)),
            ):
                setting = sql.SQL(".").join(map(sql.Identifier, name.split(".")))
                admin.execute(sql.SQL("ALTER {} SET {} = {}").format(what, setting, text))


@pytest.fixture
def owned(server: str) -> Iterator[tuple[str, Role]]:
    """An empty database, and the role that owns it and may do nothing else in the cluster."""
    with roles_of(server) as roles, new_database(server) as database:
        url = with_database(server, database)
        role = roles.login()
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(
                sql.SQL("ALTER DATABASE {} OWNER TO {}").format(
                    sql.Identifier(database), sql.Identifier(role.name)
                )
            )
        yield url, Role(role.name, with_database(role.url, database))


async def works(url: str, directory: Path) -> None:
    """Migrate, enqueue, claim and complete, run a session through the API, prune."""
    assert await migrate(url)
    assert await migrate(url) == []
    place = WorkerEnv(url, directory)
    handlers = install(directory / "handlers")
    repository = make_repository(directory / "repository").as_uri()
    environment = {**place.environment, "PYTHONPATH": f"{ROOT}:{handlers}"}
    async with running("worker", env=environment) as worker:
        await worker.event("parked")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as producer:
            # The producer is an application: its settings are its own.
            await producer.execute(
                "SET statement_timeout = 0; SET lock_timeout = 0; SET default_transaction_read_only = off"
            )
            if producer.info.server_version >= 170000:
                await producer.execute("SET transaction_timeout = 0")
            row_id = await enqueue(producer, "noop", {"text": "Ä\\\n'"}, ordering_key="k")
        await worker.event("completed", rows=[row_id])
        async with serving(url, OUTWAKE_ALLOW_FILE_REPOS="true") as api:
            created = await api.create(repo=repository, prompt="lines:3")
            async with api.follow(str(created["id"]), "?until=completed") as events:
                state = await events.status(inbox_status="completed")
            assert [prompt["status"] for prompt in state["prompts"]] == ["succeeded"]
            assert (await api.client.get("/readyz")).status_code == 200
            for path in ("/sessions", f"/sessions/{created['id']}/messages", "/outbox/1"):
                assert (await api.client.get(path)).status_code in (200, 403), path
    async with running("outwake", "prune", env={"DATABASE_URL": url, "OUTWAKE_RETENTION": "0"}) as prune:
        assert await prune.ended() == 0, prune.stderr
    async with running("outwake", "status", env={"DATABASE_URL": url}) as status:
        assert await status.ended() in (0, 1), status.stderr
        assert re.search("Outbox", "\n".join(status.stdout))


@pytest.mark.parametrize("name", SETTINGS)
async def test_works_whatever_the_database_and_the_role_set(
    owned: tuple[str, Role], name: str, tmp_path: Path
) -> None:
    url, role = owned
    set_everywhere(url, role, SETTINGS[name])
    await works(role.url, tmp_path)


COLLATIONS: dict[str, LiteralString] = {
    "C": "ENCODING 'UTF8' LOCALE 'C'",
    "Turkish": "ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR'",
    "built in": "ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'",
}


@pytest.mark.parametrize("collation", COLLATIONS)
async def test_works_in_a_database_of_any_collation(server: str, collation: str, tmp_path: Path) -> None:
    """And one branch of a repository has one session, however its name is written."""
    with ExitStack() as stack:
        try:
            database = stack.enter_context(new_database(server, "template0", COLLATIONS[collation]))
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.SyntaxError) as error:
            pytest.skip(str(error))  # a build without ICU, or before PostgreSQL 17
        url = with_database(server, database)
        await works(url, tmp_path)
        async with serving(url) as api:
            await api.create(repo="octo/infra", branch="fix")
            asked = {"repo": "octo/INFRA", "target_branch": "main", "branch": "fix"}
            assert (await api.client.post("/sessions", json=asked)).status_code == 409


@pytest.mark.parametrize(
    ("name", "value"), [("PGDATESTYLE", "German"), ("PGTZ", "Asia/Tokyo"), ("PGOPTIONS", "-c jit=on")]
)
async def test_variables_of_libpq_change_nothing(
    database: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    async with await connect(database, "test", timedelta(seconds=6)) as conn:
        for setting in ("DateStyle", "TimeZone", "jit"):
            assert str(await one(conn, f"SHOW {setting}")).startswith(OWN[setting])


async def test_a_handlers_connection_keeps_what_is_the_users(database: str) -> None:
    theirs = {"search_path": "shop", "TimeZone": "Asia/Tokyo", "statement_timeout": "7s"}
    with psycopg.connect(database, autocommit=True) as admin:
        for name, value in theirs.items():
            admin.execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                    sql.Identifier(admin.info.dbname), sql.Identifier(name), sql.Literal(value)
                )
            )
    info = conninfo(database, "test", timedelta(seconds=6), shared=True)
    async with await ServerConnection.connect(info, shared=True) as conn:
        assert {name: await one(conn, f"SHOW {name}") for name in theirs} == theirs

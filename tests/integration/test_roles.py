"""The roles that migrate creates: each may do what it is for, and nothing else.

Readers, who see one user's rows, are in test_row_security.py.
"""

import asyncio
import base64
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from outwake import Duplicate, enqueue, enqueue_many
from outwake._enqueue import OnDuplicate
from outwake._migrate import migrate
from outwake.cli import _UNCHANGED
from outwake.embedded.demo import make_repository
from outwake.schema import Schema
from tests.conftest import Connect
from tests.support.api import serving
from tests.support.http import Receiver, listening
from tests.support.process import running
from tests.support.roles import Role, Roles, roles_of
from tests.support.scenario import build
from tests.support.steps import Connection, add, column, get, new_worker, one, until
from tests.support.worker import command, install, watched
from tests.support.worker_env import WorkerEnv

TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
ROLES = ("producer", "worker", "monitor", "reader", "operator")
RESERVED = (
    "webhook.deliver", "sandbox.return", "session.run", "outbox.prune", "pull_request.open", "session.other",
)  # fmt: skip


@pytest.fixture
def roles(database: str) -> Iterator[Roles]:
    with roles_of(database) as roles:
        yield roles


@pytest.fixture
async def producer(roles: Roles, connect: Connect) -> Connection:
    """A producer's connection, who was granted the topics a and b."""
    return await connect(roles.producer("a", "b").url)


async def refused(conn: Connection, statement: str, *values: Any, match: str | None = None) -> None:
    with pytest.raises(pg.InsufficientPrivilege, match=match):
        await conn.execute(statement.encode(), values or None)


# Producers


async def test_producer_inserts(producer: Connection, connect: Connect) -> None:
    await producer.execute("INSERT INTO outwake.outbox (topic) VALUES ('a')")
    cursor = await producer.execute(
        "INSERT INTO outwake.outbox (topic, payload, ordering_key, priority, available_at, max_attempts,"
        " unique_key, traceparent) VALUES ('b', '{\"n\": 1}', 'k', 3, now(), 2, 'u', %s), ('a', '{}', 'k',"
        " 0, now(), 1, NULL, NULL) RETURNING id",
        (TRACE,),
    )
    ids = [row[0] for row in await cursor.fetchall()]
    await producer.execute(
        "INSERT INTO outwake.outbox (topic, payload)"
        " SELECT 'a', jsonb_build_object('n', n) FROM generate_series(1, 3) AS n"
    )
    owner = await connect()
    assert await column(owner, "SELECT topic FROM outbox ORDER BY id") == ["a", "b", "a", "a", "a", "a"]
    assert await column(owner, "SELECT id FROM outbox ORDER BY id LIMIT 2 OFFSET 1") == ids
    assert await get(owner, ids[0], "payload") == {"n": 1}


async def test_producer_calls_the_function(producer: Connection, connect: Connect) -> None:
    plain = await one(producer, "SELECT outwake.enqueue('a')")
    full = await one(
        producer,
        "SELECT outwake.enqueue('b', '{\"n\": 1}', ordering_key => 'k', priority => 3,"
        " available_at => '2100-01-02', max_attempts => 2, unique_key => 'u', traceparent => %s)",
        TRACE,
    )
    owner = await connect()
    query = "SELECT topic, payload, ordering_key, priority, max_attempts, unique_key, traceparent FROM outbox"
    rows = await (await owner.execute(f"{query} ORDER BY id".encode())).fetchall()
    assert rows == [("a", {}, None, 0, 10, None, None), ("b", {"n": 1}, "k", 3, 2, "u", TRACE)]
    assert [plain, full] == await column(owner, "SELECT id FROM outbox ORDER BY id")
    assert await one(owner, "SELECT available_at > now() FROM outbox WHERE id = %s", full)


async def test_on_duplicate_of_the_function(producer: Connection, connect: Connect) -> None:
    owner = await connect()
    call = (
        "SELECT outwake.enqueue('a', jsonb_build_object('n', %s::int), unique_key => 'u', on_duplicate => %s)"
    )
    for n, choice in enumerate(get_args(OnDuplicate)):
        await owner.execute("DELETE FROM outbox")
        first = await one(producer, call, n, choice)
        if choice == "reject":
            with pytest.raises(pg.UniqueViolation, match=f"the unique_key u: row {first}"):
                await one(producer, call, 7, choice)
        else:
            assert await one(producer, call, 7, choice) == first
        assert await get(owner, first, "payload") == {"n": 7 if choice == "replace" else n}
    await owner.execute("UPDATE outbox SET state = 'running', worker_id = %s", (await new_worker(owner),))
    with pytest.raises(pg.UniqueViolation):
        await one(producer, call, 9, "replace")
    assert await get(owner, first, "payload") == {"n": 7}
    with pytest.raises(pg.InvalidParameterValue, match="reject, keep or replace"):
        await one(producer, call, 9, "ignore")


async def test_on_duplicate_in_python(producer: Connection, connect: Connect) -> None:
    owner = await connect()
    given: dict[str, Any] = {
        "ordering_key": "k",
        "priority": 3,
        "available_at": datetime(2100, 1, 2, tzinfo=UTC),
        "max_attempts": 2,
        "traceparent": TRACE,
    }
    row = await enqueue(producer, "a", {"n": 1}, unique_key="u", **given)
    with pytest.raises(Duplicate) as raised:
        await enqueue(producer, "a", {"n": 2}, unique_key="u")
    assert raised.value.row_id == row
    assert await enqueue(producer, "a", {"n": 3}, unique_key="u", on_duplicate="keep") == row
    assert await get(owner, row, "payload") == {"n": 1}
    again = {**given, "priority": 4}
    assert await enqueue(producer, "a", {"n": 4}, unique_key="u", on_duplicate="replace", **again) == row
    assert (await get(owner, row, "payload"), await get(owner, row, "priority")) == ({"n": 4}, 4)
    # What is not given is the table's default again.
    assert await enqueue(producer, "a", unique_key="u", on_duplicate="replace") == row
    query = "SELECT payload, priority, available_at <= now(), traceparent FROM outbox"
    assert await (await owner.execute(query)).fetchone() == ({}, 0, True, None)


async def test_enqueue_many(producer: Connection, connect: Connect) -> None:
    """More than one statement holds, and an empty one."""
    await enqueue_many(producer, "a", ({"n": n} for n in range(2500)))
    await enqueue_many(producer, "a", [])
    numbers = await column(await connect(), "SELECT (payload ->> 'n')::int FROM outbox ORDER BY id")
    assert numbers == list(range(2500))


async def test_topic_that_was_not_granted(producer: Connection) -> None:
    """Whatever the door, the error names role and topic, and the statement that grants it."""
    said = f"the role {producer.info.user} may not enqueue the topic other"
    with pytest.raises(pg.InsufficientPrivilege, match=said) as raised:
        await enqueue(producer, "other")
    hint = f"VALUES ('{producer.info.user}', 'other')"
    assert (raised.value.diag.message_hint or "").endswith(hint)
    await refused(producer, "INSERT INTO outwake.outbox (topic) VALUES ('a'), ('other')", match=said)
    await refused(producer, "SELECT outwake.enqueue('other')", match=said)
    with pytest.raises(pg.InsufficientPrivilege, match=said):
        await enqueue_many(producer, "other", [{}])
    assert await one(producer, "SELECT count(*) FROM outwake.outbox") == 0


async def test_outwakes_own_topics_cannot_be_granted(producer: Connection, connect: Connect) -> None:
    owner = await connect()
    for topic in RESERVED:
        with pytest.raises(pg.CheckViolation, match="producer_topic_not"):
            await owner.execute("INSERT INTO producer_topic VALUES (%s, %s)", (producer.info.user, topic))
        await refused(producer, "SELECT outwake.enqueue(%s)", topic)
        await refused(producer, "INSERT INTO outwake.outbox (topic) VALUES (%s)", topic)


@pytest.mark.parametrize(
    ("column", "key"),
    [
        ("ordering_key", "session:01a20d6f-b9ed-7cd7-aa73-2da96ebd401b"),
        ("ordering_key", "webhook:01a20d6f-b9ed-7cd7-aa73-2da96ebd401b"),
        ("ordering_key", "pull_request:1"),
        ("unique_key", "outbox.prune"),
        ("unique_key", "session.other"),
    ],
)
async def test_a_producer_holds_up_no_session_and_no_housekeeping(
    producer: Connection, column: str, key: str
) -> None:
    """By a row of its own topic with their key."""
    statement = f"INSERT INTO outwake.outbox (topic, {column}) VALUES ('a', %s)"
    await refused(producer, statement, key, match="row-level security")
    await refused(producer, f"SELECT outwake.enqueue('a', {column} => %s)", key, match="row-level security")


async def test_a_producers_payload_is_bounded(producer: Connection) -> None:
    """To 1 MiB as text, which is how a claim reads it, whatever the table holds; also if it replaces one."""
    large, unique = "jsonb_build_object('n', repeat('x', 1048576))", "unique_key => 'u'"
    await producer.execute(f"SELECT outwake.enqueue('a', '{{}}', {unique})".encode())
    await producer.execute(f"CREATE TEMP TABLE kept_compressed AS SELECT {large} AS payload".encode())
    for statement in (
        "INSERT INTO outwake.outbox (topic, payload) SELECT 'a', payload FROM kept_compressed",
        "INSERT INTO outwake.outbox (topic, payload)"
        " SELECT 'a', jsonb_agg('1e131071'::numeric) FROM generate_series(1, 10)",
        f"INSERT INTO outwake.outbox (topic, payload) VALUES ('a', {large})",
        f"SELECT outwake.enqueue('a', {large})",
        f"SELECT outwake.enqueue('a', {large}, {unique}, on_duplicate => 'replace')",
    ):
        await refused(producer, statement, match="row-level security")
    await producer.execute(
        "SELECT outwake.enqueue('a', jsonb_build_object('n', repeat('x', 1000000)), unique_key => 'u',"
        " on_duplicate => 'replace')"
    )


async def test_a_producer_sets_its_columns_alone(producer: Connection, connect: Connect) -> None:
    """Those of `enqueue`. A new column of outbox is the workers' unless this list says otherwise."""
    owner = await connect()

    async def may(right: str) -> set[str]:
        query = """
            SELECT attname FROM pg_attribute WHERE attrelid = 'outbox'::regclass
            AND has_column_privilege('outwake_producer', attrelid, attnum, %s)
        """
        return set(await column(owner, query, right))

    assert await may("INSERT") == {
        *("topic", "payload", "ordering_key", "priority", "available_at", "max_attempts", "unique_key"),
        "traceparent",
    }
    assert await may("SELECT") == {"id", "topic", "unique_key", "state"}
    assert await may("UPDATE") == {"payload", "priority", "available_at", "traceparent"}
    for name in ("id", "state", "attempt", "worker_id", "failures", "limited", "blocked", "errors"):
        await refused(producer, f"INSERT INTO outwake.outbox (topic, {name}) VALUES ('a', DEFAULT)")
        await refused(producer, f"UPDATE outwake.outbox SET {name} = DEFAULT")
    await refused(producer, "COPY outwake.outbox (topic, created_at) FROM STDIN")


async def test_a_producer_sees_no_payload_and_its_topics_alone(
    producer: Connection, connect: Connect
) -> None:
    owner = await connect()
    ours, others = await add(owner, "a"), await add(owner, "other")
    assert await column(producer, "SELECT id FROM outwake.outbox WHERE id IN (%s, %s)", ours, others) == [
        ours
    ]
    for name in ("payload", "errors", "*"):
        await refused(producer, f"SELECT {name} FROM outwake.outbox")
    await refused(producer, "UPDATE outwake.outbox SET payload = payload")
    await refused(producer, "INSERT INTO outwake.outbox (topic) VALUES ('a') RETURNING payload")


async def test_a_producer_changes_what_it_may_replace_alone(producer: Connection, connect: Connect) -> None:
    owner = await connect()
    waits, plain = await add(owner, "a", unique_key="u"), await add(owner, "a")
    other, runs = await add(owner, "other", unique_key="o"), await add(owner, "a", unique_key="r")
    await owner.execute(
        "UPDATE outbox SET state = 'running', worker_id = gen_random_uuid() WHERE id = %s", (runs,)
    )
    await producer.execute("UPDATE outwake.outbox SET payload = '{\"n\": 1}'")
    changed = await column(owner, "SELECT id FROM outbox WHERE payload <> '{}'")
    assert (changed, plain != other) == ([waits], True)
    await refused(producer, "DELETE FROM outwake.outbox")
    await refused(producer, "TRUNCATE outwake.outbox")


async def test_the_unique_key_of_a_topic_that_it_does_not_see(producer: Connection, connect: Connect) -> None:
    """Keys are shared by all topics: it is told that there is such a row, and cannot replace it."""
    owner = await connect()
    other = await add(owner, "other", unique_key="u")
    call = "SELECT outwake.enqueue('a', '{\"n\": 1}', unique_key => 'u', on_duplicate => %s)"
    for choice in ("reject", "replace"):
        with pytest.raises(pg.UniqueViolation):
            await one(producer, call, choice)
    assert await one(producer, call, "keep") == other
    with pytest.raises(Duplicate):
        await enqueue(producer, "a", unique_key="u")
    assert await enqueue(producer, "a", unique_key="u", on_duplicate="keep") == other
    with pytest.raises(pg.InsufficientPrivilege):
        await enqueue(producer, "a", {"n": 1}, unique_key="u", on_duplicate="replace")
    await owner.execute("UPDATE outbox SET state = 'running', worker_id = gen_random_uuid()")
    with pytest.raises(Duplicate):
        await enqueue(producer, "a", {"n": 1}, unique_key="u", on_duplicate="replace")
    assert await get(owner, other, "payload") == {}


async def test_a_producer_may_nothing_else(producer: Connection, connect: Connect) -> None:
    owner = await connect()
    assert await rights(owner, "outwake_producer") == {"outbox": set()}  # columns: above
    assert await functions(owner, "outwake_producer") == {
        *("enqueue", "unique_key_holder", "producer_topics", "producer_refused", "producer_writes"),
    }
    await refused(producer, "SELECT * FROM outwake.worker")
    await refused(producer, "SELECT * FROM outwake.session")
    await refused(producer, "SELECT * FROM outwake.producer_topic")
    await refused(producer, "INSERT INTO outwake.producer_topic VALUES (current_user, 'other')")
    for call in ("outbox_wake()", "outbox_cancel(1)", "outbox_retry(1)", "grant_roles()"):
        await refused(producer, f"SELECT outwake.{call}")
    await refused(producer, "CREATE TABLE outwake.mine ()")


async def test_topics_are_inherited_as_roles_are(roles: Roles, connect: Connect) -> None:
    """A team's role was granted the topic. SET ROLE to the common role of all producers grants none."""
    team = roles.producer("a")
    member = await connect(roles.login(team.name).url)
    await enqueue(member, "a")
    await member.execute("SET ROLE outwake_producer")
    await refused(member, "SELECT outwake.enqueue('a')")
    owner = await connect()
    await owner.execute("DELETE FROM producer_topic WHERE role_name = %s", (team.name,))
    await member.execute("RESET ROLE")
    await refused(member, "SELECT outwake.enqueue('a')")


async def test_a_producers_insert_wakes(roles: Roles, database: str, connect: Connect) -> None:
    """Through each door, and as the first thing that happens."""
    role = roles.producer("t")
    async with watched(database) as worker:
        conn = await connect(role.url)
        await worker.has_run(await enqueue(conn, "t"))
        await worker.asleep()
        await worker.has_run(await one(conn, "SELECT outwake.enqueue('t')"))
        await worker.asleep()
        await worker.has_run(await one(conn, "INSERT INTO outwake.outbox (topic) VALUES ('t') RETURNING id"))
        await worker.asleep()
        await enqueue_many(conn, "t", [{}, {}])
        await worker.has_run(await one(conn, "SELECT max(id) FROM outwake.outbox"))


# Workers


@pytest.fixture
def worker_role(roles: Roles) -> Role:
    return roles.login("outwake_worker")


HANDLERS = """
from outwake import Handler, Permanent, Retry, enqueue

def sync(job):
    pass

async def flaky(job):
    if job.row.failures < 1:
        raise Retry("not yet")

async def dies(job):
    raise Permanent("useless")

async def chain(job):
    async with job.transaction() as conn:
        await enqueue(conn, "flaky", unique_key="next", on_duplicate="replace")
        await job.complete(conn)

async def poison(job):
    import os, signal
    if job.row.failures < 1:
        os.kill(os.getpid(), signal.SIGKILL)

sync, flaky, dies, chain, poison = [
    Handler(run.__name__, run) for run in (sync, flaky, dies, chain, poison)]
"""


async def test_a_worker_that_owns_nothing_runs_handlers(
    worker_role: Role, connect: Connect, tmp_path: Path
) -> None:
    """Of each kind and end, with a limit, an ordering key, a row that is due later, and housekeeping."""
    conn = await connect()
    await conn.execute("INSERT INTO topic VALUES ('sync', 1, '10 s')")
    await conn.execute(
        "INSERT INTO outbox (topic, unique_key, max_attempts) VALUES ('outbox.prune', 'outbox.prune', 32767)"
    )
    handlers = install(tmp_path / "handlers", HANDLERS)
    async with command(worker_role.url, handlers) as worker:
        await worker.event("pruned")
        await worker.event("parked")
        for _ in range(5):
            await add(conn, "sync", ordering_key="k")
        await conn.execute("INSERT INTO outbox (topic, available_at) VALUES ('sync', now() + interval '1 s')")
        dead = await add(conn, "dies")
        await add(conn, "chain")
        await until(
            conn,
            "SELECT count(*) = 8 FROM outbox WHERE state = 'done' AND topic IN ('sync', 'flaky', 'chain')",
        )
        await until(conn, "SELECT state = 'dead' FROM outbox WHERE id = %s", dead)
        assert await one(conn, "SELECT failures FROM outbox WHERE topic = 'flaky'") == 1
        cancelled = await add(conn, "sync", available_at=datetime(2100, 1, 1, tzinfo=UTC))
        await conn.execute("SELECT outbox_cancel(%s)", (cancelled,))
    assert await worker.ended() == 0
    assert [event for event in worker.events if event["event"] == "disconnected"] == []
    assert (
        await one(conn, "SELECT count(*) FROM outbox WHERE topic = 'outbox.prune' AND state = 'ready'") == 1
    )


async def test_a_worker_that_owns_nothing_rescues(
    worker_role: Role, connect: Connect, tmp_path: Path
) -> None:
    """One kills itself in its handler; the other, asleep, ends its life and runs the row."""
    conn = await connect()
    handlers = install(tmp_path / "handlers", HANDLERS)
    async with command(worker_role.url, handlers, lease=2.0) as first:
        await first.event("parked")
        async with command(worker_role.url, handlers, lease=2.0) as second:
            await second.event("parked")
            await add(conn, "poison")
            await until(conn, "SELECT state = 'done' FROM outbox")
    assert await one(conn, "SELECT attempt FROM outbox") == 2


async def test_a_worker_that_owns_nothing_runs_sessions(
    worker_role: Role, database: str, connect: Connect, tmp_path: Path
) -> None:
    """With messages, the return of the sandbox, and a webhook; and forgets them when they are old."""
    receiver = Receiver()
    webhooks = {
        "OUTWAKE_WEBHOOK_SECRET": "whsec_" + base64.b64encode(bytes(32)).decode(),
        "OUTWAKE_WEBHOOK_ALLOW": "127.0.0.1",
    }
    worker_env = WorkerEnv(worker_role.url, tmp_path)
    worker_env.environment = {**worker_env.environment, **webhooks}
    repository = make_repository(tmp_path / "repository").as_uri()
    conn = await connect()
    async with (
        listening(receiver) as url,
        serving(database, OUTWAKE_ALLOW_FILE_REPOS="true", **webhooks) as api,
        worker_env.worker() as worker,
    ):
        await worker.event("parked")
        created = await api.create(
            repo=repository, prompt="Write a note lines:25", callback_url=f"{url}/hook"
        )
        async with api.follow(created["id"], "?until=completed") as events:
            seen = [event for event in await events.rest() if event.event == "message"]
        assert len(seen) > 25
        await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "More"})
        await until(conn, "SELECT count(*) = 2 FROM prompt WHERE status = 'succeeded'")
        await until(conn, "SELECT bool_and(state = 'done') FROM outbox")
    assert set(await column(conn, "SELECT topic FROM outbox")) == {
        *("session.run", "sandbox.return", "webhook.deliver"),
    }
    assert len(receiver.received) == 4
    await api_forgets(conn)
    async with running("outwake", "prune", env={"DATABASE_URL": worker_role.url}) as pruning:
        assert await pruning.ended() == 0, pruning.stderr
    assert await one(conn, "SELECT count(*) FROM session") == 0


async def api_forgets(conn: Connection) -> None:
    """The session was archived long ago."""
    await conn.execute(
        "UPDATE session SET session_status = 'archived', inbox_status = 'archived', sandbox = NULL,"
        " created_at = now() - interval '1 year', updated_at = now() - interval '1 year',"
        " deleted_at = now() - interval '1 year'"
    )


async def test_a_worker_reads_no_tokens_and_creates_nothing(worker_role: Role, connect: Connect) -> None:
    owner, conn = await connect(), await connect(worker_role.url)
    all_rights = {"SELECT", "INSERT", "UPDATE", "DELETE"}
    held = await rights(owner, "outwake_worker")
    assert {name for name, found in held.items() if found == all_rights} == {
        *("outbox", "worker", "outbox_alert", "session", "prompt", "message", "session_memory"),
        "sandbox_borrow",
    }
    assert held.keys().isdisjoint({"api_token", "sql_reader", "producer_topic"})
    assert await functions(owner, "outwake_worker") >= {"outbox_rescue", "message_append", "enqueue"}
    for table in ("api_token", "sql_reader", "producer_topic"):
        await refused(conn, f"SELECT FROM outwake.{table}")
    for call in ("sql_reader_user('x')", "producer_topics('x')", "grant_roles()"):
        await refused(conn, f"SELECT outwake.{call}")
    await refused(conn, "CREATE TABLE outwake.mine ()")
    await refused(conn, "CREATE FUNCTION outwake.mine() RETURNS void LANGUAGE sql AS ''")
    await refused(conn, "ALTER TABLE outwake.outbox ADD COLUMN mine integer")
    await refused(conn, "ALTER TABLE outwake.outbox DISABLE ROW LEVEL SECURITY")
    await refused(conn, "INSERT INTO outwake.topic VALUES ('a', 1)")
    await refused(conn, "TRUNCATE outwake.outbox")


# A right that is missing


async def test_a_worker_without_rights_says_so_once(roles: Roles, database: str) -> None:
    """Without any, with SELECT alone, and with every right but membership, which would see no row."""
    bare, reads, has_all = roles.login(), roles.login("outwake_monitor"), roles.login()
    with psycopg.connect(database, autocommit=True) as owner:
        for statement in (
            "GRANT USAGE ON SCHEMA outwake TO {}",
            "GRANT ALL ON ALL TABLES IN SCHEMA outwake TO {}",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA outwake TO {}",
            "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA outwake TO {}",
        ):
            owner.execute(sql.SQL(statement).format(sql.Identifier(has_all.name)))
    for role, arguments in ((bare, []), (reads, []), (has_all, []), (bare, ["--processes", "2"])):
        async with running("worker", *arguments, env={"DATABASE_URL": role.url}) as worker:
            assert await worker.ended() == 2
        lines = [line for line in worker.stderr if not line.startswith("{")]
        assert set(lines) == {
            f"worker: its database role may not run a worker: GRANT outwake_worker TO {role.name}; if it is a"
            " member, SELECT outwake.grant_roles() as the owner"
        }
        assert len(lines) <= 1 + len(arguments)


async def test_a_worker_whose_right_was_taken_says_which(worker_role: Role, connect: Connect) -> None:
    """Its role is a member, but something was revoked from it."""
    owner = await connect()
    await owner.execute("REVOKE INSERT ON worker FROM outwake_worker")
    async with running("worker", env={"DATABASE_URL": worker_role.url}) as worker:
        assert await worker.ended() == 2
    said = f"worker: permission denied for table worker: GRANT outwake_worker TO {worker_role.name}"
    said += "; if it is a member, SELECT outwake.grant_roles() as the owner"
    assert worker.stderr[-1] == said


@pytest.mark.parametrize(
    ("arguments", "member_of", "object_", "mend"),
    [
        ("status", [], "schema outwake", "GRANT outwake_monitor TO {}"),
        ("status", ["outwake_producer"], "table migration", "GRANT outwake_monitor TO {}"),
        ("retry 1", ["outwake_reader"], "function outbox_retry", "GRANT outwake_operator TO {}"),
        ("wake", ["outwake_monitor"], "function outbox_wake", "GRANT outwake_operator TO {}"),
        ("prune", ["outwake_operator"], "function outbox_prune", "GRANT outwake_worker TO {}"),
        ("token list", ["outwake_worker"], "table api_token", "do it as the owner of the schema outwake"),
    ],
)
async def test_a_command_without_the_right(
    roles: Roles, arguments: str, member_of: list[str], object_: str, mend: str
) -> None:
    role = roles.login(*member_of)
    async with running("outwake", *arguments.split(), env={"DATABASE_URL": role.url}) as process:
        assert await process.ended() == 2
    said = f"outwake: permission denied for {object_}: {mend.format(role.name)}"
    assert (process.stdout, process.stderr) == ([], [said])


async def test_migrate_without_the_right(empty_database: str) -> None:
    with roles_of(empty_database) as roles, psycopg.connect(empty_database) as conn:
        role, name = roles.login(), conn.info.dbname
        async with running("outwake", "migrate", env={"DATABASE_URL": role.url}) as process:
            assert await process.ended() == 2
        assert (process.stdout, len(process.stderr)) == ([], 1)
        assert process.stderr[0].startswith(f"outwake: permission denied for database {name}: ")
        assert process.stderr[0].endswith(f"GRANT CREATE ON DATABASE {name} TO {role.name}")


# Monitors and operators

PICTURES = ("outbox_depth", "outbox_waiting", "outbox_front", "outbox_hourly", "worker_status")


async def test_a_monitor_sees_everything_but_what_is_in_it(roles: Roles, connect: Connect) -> None:
    """Every view shows it as many rows as the owner, and the same, without errors and sessions."""
    scenario = await build(connect)
    monitor = await connect(roles.login("outwake_monitor").url)
    for view in (*PICTURES, "worker_running"):
        count = f"SELECT count(*) FROM outwake.{view}"
        assert await one(monitor, count) == await one(scenario.conn, count) > 0
    reasons = "SELECT reason || ': ' || detail FROM outwake.outbox_waiting ORDER BY id"
    assert await column(monitor, reasons) == await column(scenario.conn, reasons)
    hidden = "SELECT count(last_error) + count(session_id) FROM outwake.outbox_waiting"
    assert (await one(monitor, hidden), await one(scenario.conn, hidden) > 0) == (0, True)
    assert await one(monitor, "SELECT reason FROM outwake.outbox_ready()") is not None
    assert await one(monitor, "SELECT count(*) FROM outwake.outbox_stuck('1 s')") > 0
    assert await one(monitor, "SELECT count(*) FROM outwake.outbox_throughput()") > 0
    await scenario.conn.execute("BEGIN; UPDATE outbox SET priority = 0")
    assert await one(monitor, "SELECT count(*) FROM outwake.outbox_writer") == 1
    await scenario.conn.execute("ROLLBACK")


async def test_a_monitor_reads_no_payload_error_or_session(roles: Roles, connect: Connect) -> None:
    owner = await connect()
    await owner.execute("""INSERT INTO outbox (topic, state, finished_at, errors) VALUES
        ('t', 'dead', now(), '[{"error": "secret"}]')""")
    monitor = await connect(roles.login("outwake_monitor").url)
    for name in ("payload", "errors", "unique_key", "traceparent", "*"):
        await refused(monitor, f"SELECT {name} FROM outwake.outbox")
    for table in ("session", "prompt", "message", "session_memory", "idempotency", "watcher", "api_token"):
        await refused(monitor, f"SELECT FROM outwake.{table}")
    assert await one(monitor, "SELECT count(*) FROM outwake.outbox_waiting WHERE last_error IS NULL") == 1
    for call in ("outbox_retry(1)", "outbox_cancel(1)", "outbox_wake()", "outbox_history(1)"):
        await refused(monitor, f"SELECT outwake.{call}")
    held = await rights(owner, "outwake_monitor")
    assert set().union(*held.values()) == {"SELECT"}


async def test_status_for_a_monitor(roles: Roles, connect: Connect) -> None:
    scenario = await build(connect)
    role = roles.login("outwake_monitor")
    async with running("outwake", "status", "--json", env={"DATABASE_URL": role.url}) as process:
        assert await process.ended() == 1  # not ready
    assert "fax.send has been due" in process.stdout[0]
    assert process.stderr == []
    assert scenario.rows["nobody"] is not None


async def test_an_operator_sees_all_and_acts(roles: Roles, connect: Connect) -> None:
    scenario = await build(connect)
    role = roles.login("outwake_operator")
    conn, rows = await connect(role.url), scenario.rows
    for table in ("outbox", "session", "prompt", "message", "worker", "topic"):
        count = f"SELECT count(*) FROM outwake.{table}"
        assert await one(conn, count) == await one(scenario.conn, count) > 0
    assert await one(conn, "SELECT last_error FROM outwake.outbox_waiting WHERE id = %s", rows["dead"])
    assert await one(conn, "SELECT outwake.outbox_retry(%s)", rows["dead"]) == "ready"
    assert await one(conn, "SELECT outwake.outbox_cancel(%s)", rows["dead"]) == "cancelled"
    assert await one(conn, "SELECT count(*) FROM outwake.outbox_history(%s)", rows["retry"]) > 1
    assert (
        await one(
            conn,
            "SELECT count(*) FROM outwake.session_history(%s)",
            await one(conn, "SELECT id FROM outwake.session"),
        )
        > 1
    )
    await conn.execute("UPDATE outwake.topic SET max_running = 5")
    await conn.execute("INSERT INTO outwake.topic VALUES ('a', 1)")
    await conn.execute("SELECT outwake.outbox_wake()")
    await refused(conn, "UPDATE outwake.outbox SET priority = 1")
    await refused(conn, "DELETE FROM outwake.session")
    await refused(conn, "INSERT INTO outwake.producer_topic VALUES ('x', 'y')")
    await refused(conn, "SELECT FROM outwake.api_token")
    async with running("outwake", "discard", str(rows["lost"]), env={"DATABASE_URL": role.url}) as process:
        assert await process.ended() == 1
        assert process.stdout == [f"{rows['lost']} {_UNCHANGED}"]


# Who grants


async def test_an_owner_who_may_not_create_roles(empty_database: str, connect: Connect) -> None:
    """It is told which are missing; once somebody has made them, one call grants all."""
    schema = Schema(f"t{secrets.token_hex(6)}")
    admin = await connect(empty_database)
    with roles_of(empty_database) as roles:
        owner = roles.login()
        grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
            sql.Identifier(admin.info.dbname), sql.Identifier(owner.name)
        )
        await admin.execute(grant)
        warnings: list[str] = []
        assert await migrate(owner.url, schema=schema, warn=warnings.append)
        assert warnings == [
            f"the role {schema.name}_{role} is missing and you may not create it: CREATE ROLE"
            f" {schema.name}_{role} NOLOGIN, then SELECT {schema.name}.grant_roles()"
            for role in ("producer", "worker", "monitor", "operator", "reader")
        ]
        assert await migrate(owner.url, schema=schema, warn=warnings.append) == []
        for role in ROLES:
            roles.create(f"{schema.name}_{role}")
        conn = await connect(owner.url)
        await conn.execute(schema.sql("SELECT :schema.grant_roles()").encode())
        first = await access(conn, schema.name)
        for role in ROLES:
            assert any(f"{schema.name}_{role}=" in line for line in first)
        await conn.execute(schema.sql("SELECT :schema.grant_roles()").encode())
        assert await access(conn, schema.name) == first
        monitor = roles.login(f"{schema.name}_monitor")
        count = f"SELECT count(*) FROM {schema.name}.outbox_waiting"
        assert await one(await connect(monitor.url), count) == 1


async def test_grants_and_migrations_are_repeatable(database: str, connect: Connect) -> None:
    """Also when several do it at once, each in a database of the cluster: roles are shared."""
    conn = await connect()
    before = await access(conn, "outwake")
    await conn.execute("SELECT grant_roles()")
    assert await migrate(database) == []
    assert await access(conn, "outwake") == before
    assert len([line for line in before if line.startswith("policy")]) > 20
    await conn.execute("DELETE FROM migration WHERE number IS NULL")
    warnings: list[str] = []
    assert await migrate(database, warn=warnings.append)
    assert (await access(conn, "outwake"), warnings) == (before, [])


async def test_roles_that_are_created_at_once(empty_database: str, database: str) -> None:
    schema = Schema(f"t{secrets.token_hex(6)}")
    try:
        await asyncio.gather(*(migrate(url, schema=schema) for url in (empty_database, database)))
    finally:
        for url in (empty_database, database):
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute(schema.sql("DROP SCHEMA IF EXISTS :schema CASCADE").encode())
        with psycopg.connect(database, autocommit=True) as conn:
            for role in ROLES:
                conn.execute(f"DROP ROLE {schema.name}_{role}".encode())


# Everybody

OPEN_TO_PUBLIC = """
SELECT 'function ' || p.oid::regprocedure FROM pg_proc AS p
CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
WHERE p.pronamespace = 'outwake'::regnamespace AND a.grantee = 0
UNION ALL
SELECT 'relation ' || c.oid::regclass FROM pg_class AS c
CROSS JOIN aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS a
WHERE c.relnamespace = 'outwake'::regnamespace AND a.grantee = 0
UNION ALL
SELECT 'column ' || c.attrelid::regclass || '.' || c.attname FROM pg_attribute AS c
CROSS JOIN aclexplode(c.attacl) AS a
WHERE a.grantee = 0 AND c.attrelid IN (
    SELECT oid FROM pg_class WHERE relnamespace = 'outwake'::regnamespace)
UNION ALL
SELECT 'type ' || t.oid::regtype FROM pg_type AS t
CROSS JOIN aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) AS a
WHERE t.typnamespace = 'outwake'::regnamespace AND a.grantee = 0
  AND t.typcategory <> 'A' -- an array has the rights of its elements
UNION ALL
SELECT 'schema' FROM pg_namespace AS n CROSS JOIN aclexplode(n.nspacl) AS a
WHERE n.nspname = 'outwake' AND a.grantee = 0
"""

LOOSE = """
SELECT oid::regprocedure::text FROM pg_proc
WHERE pronamespace = 'outwake'::regnamespace
  AND NOT coalesce('search_path=outwake, pg_temp' = ANY (proconfig), false)
  AND prosqlbody IS NULL
"""

WITH_THE_OWNERS_RIGHTS = {
    # They read what their caller may not, and tell one thing of it.
    "producer_topics", "unique_key_holder", "sql_reader_user", "outbox_ready",
    # They tell sleepers and streams, whom their caller does not see.
    "outbox_notify", "outbox_wake", "outbox_all_awake", "session_watched", "session_notify",
    # What an operator may do to a row.
    "outbox_cancel", "outbox_retry", "outbox_discard",
}  # fmt: skip


async def test_public_may_nothing(roles: Roles, connect: Connect) -> None:
    """And what is new is not left open: grant_roles, which migrate calls, closes it."""
    owner = await connect()
    assert await column(owner, OPEN_TO_PUBLIC) == []
    await owner.execute("CREATE FUNCTION outwake.fresh() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    await owner.execute("CREATE TABLE outwake.fresh_table (); GRANT SELECT ON outwake.fresh_table TO PUBLIC")
    await owner.execute("CREATE VIEW outwake.fresh_view AS SELECT 1; CREATE SEQUENCE outwake.fresh_sequence")
    await owner.execute("GRANT SELECT ON outwake.fresh_view, outwake.fresh_sequence TO PUBLIC")
    await owner.execute(
        "CREATE DOMAIN outwake.fresh_domain AS text; CREATE TYPE outwake.fresh_type AS (a text)"
    )
    assert set(await column(owner, OPEN_TO_PUBLIC)) == {
        "function fresh()", "relation fresh_table", "relation fresh_view", "relation fresh_sequence",
        "type fresh_table", "type fresh_view", "type fresh_domain", "type fresh_type",
    }  # fmt: skip
    await owner.execute("SELECT grant_roles()")
    assert await column(owner, OPEN_TO_PUBLIC) == []
    await owner.execute(
        "CREATE OR REPLACE FUNCTION outwake.fresh() RETURNS integer LANGUAGE sql AS 'SELECT 2'"
    )
    assert await column(owner, OPEN_TO_PUBLIC) == []

    nobody = roles.login().name
    assert await rights(owner, nobody) == {}
    assert await functions(owner, nobody) == set()
    assert not await one(owner, "SELECT has_schema_privilege(%s, 'outwake', 'USAGE, CREATE')", nobody)


async def test_default_privileges_open_nothing_to_public(empty_database: str, connect: Connect) -> None:
    """What an administrator lets PUBLIC do to new objects ends at our schema."""
    owner = await connect(empty_database)
    for what in ("ALL ON TABLES", "ALL ON SEQUENCES", "ALL ON FUNCTIONS", "ALL ON TYPES", "USAGE ON SCHEMAS"):
        await owner.execute(f"ALTER DEFAULT PRIVILEGES GRANT {what} TO PUBLIC".encode())
    await migrate(empty_database)
    assert await column(owner, OPEN_TO_PUBLIC) == []


async def test_every_function_has_a_search_path(connect: Connect) -> None:
    """It finds nothing of others: its own schema first, temporary objects last; or its body was parsed when
    it was made. outbox_inserted, which each insert calls, writes every name with its schema instead.
    """
    owner = await connect()
    assert await column(owner, LOOSE) == ["outbox_inserted()"]


async def test_the_owners_rights_are_those_of_triggers_and_of_a_few(connect: Connect) -> None:
    owner = await connect()
    query = """
        SELECT proname FROM pg_proc WHERE pronamespace = 'outwake'::regnamespace AND prosecdef
        AND prorettype <> 'trigger'::regtype
    """
    assert set(await column(owner, query)) == WITH_THE_OWNERS_RIGHTS


@pytest.mark.parametrize("group", [None, *(f"outwake_{name}" for name in ROLES)])
async def test_no_role_hangs_our_triggers_on_a_table_of_its_own(
    group: str | None, roles: Roles, connect: Connect
) -> None:
    """The function of a trigger runs with the owner's rights, and so would the casts of a role's own types
    in it, which it finds by the type.
    """
    owner = await connect()
    conn = await connect(roles.login(*([group] if group else [])).url)
    names = await column(
        owner,
        "SELECT proname FROM pg_proc WHERE pronamespace = 'outwake'::regnamespace"
        " AND prorettype = 'trigger'::regtype",
    )
    assert len(names) == 12
    await conn.execute("CREATE TEMP TABLE mine (id integer)")
    for name in names:
        statement = f"CREATE TRIGGER t AFTER UPDATE ON mine FOR EACH ROW EXECUTE FUNCTION outwake.{name}()"
        await refused(
            conn, statement, match=rf"permission denied for (function (outwake\.)?{name}|schema outwake)"
        )


@pytest.mark.parametrize("group", [f"outwake_{name}" for name in ROLES])
async def test_no_role_makes_casts_and_operators_for_our_types(
    group: str, roles: Roles, connect: Connect
) -> None:
    owner = await connect()
    conn = await connect(roles.login(group).url)
    types = await column(
        owner,
        "SELECT typname FROM pg_type WHERE typnamespace = 'outwake'::regnamespace AND typcategory <> 'A'",
    )
    assert {"topic_name", "outbox", "outbox_claimed"} <= set(types)
    for name in types:
        statement = (
            f"CREATE FUNCTION pg_temp.f(outwake.{name}) RETURNS boolean LANGUAGE plpgsql"
            " AS 'BEGIN RETURN true; END'"
        )
        await refused(conn, statement, match=f"permission denied for type {name}")


async def rights(owner: Connection, role: str) -> dict[str, set[str]]:
    """What a role may do to each table and view, as a whole; with no right at all a name is left out, and
    is there with an empty set if the role has rights to some columns.
    """
    cursor = await owner.execute(
        """
        SELECT c.relname, array_agg(p.name) FILTER (WHERE has_table_privilege(%(role)s, c.oid, p.name))
        FROM pg_class AS c
        CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS p (name)
        WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind IN ('r', 'v')
        GROUP BY c.oid, c.relname
        HAVING bool_or(has_table_privilege(%(role)s, c.oid, p.name))
            OR has_any_column_privilege(%(role)s, c.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
        """,
        {"role": role},
    )
    return {name: set(found or ()) for name, found in await cursor.fetchall()}


async def functions(owner: Connection, role: str) -> set[str]:
    """What a role may call."""
    query = """
        SELECT proname FROM pg_proc
        WHERE pronamespace = 'outwake'::regnamespace AND has_function_privilege(%s, oid, 'EXECUTE')
    """
    return set(await column(owner, query, role))


async def access(conn: Connection, schema: str) -> list[str]:
    """All grants and policies in a schema."""
    query = """
        SELECT format('relation %%s %%s', c.relname, c.relacl) FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relacl IS NOT NULL
        UNION ALL
        SELECT format('column %%s %%s', a.attname, a.attacl) FROM pg_attribute AS a
        JOIN pg_class AS c ON c.oid = a.attrelid
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND a.attacl IS NOT NULL
        UNION ALL
        SELECT format('function %%s %%s', p.oid::regprocedure, p.proacl) FROM pg_proc AS p
        WHERE p.pronamespace = to_regnamespace(%(schema)s)
        UNION ALL
        SELECT format('policy %%s %%s %%s %%s %%s', tablename, policyname, roles, qual, with_check)
        FROM pg_policies WHERE schemaname = %(schema)s::text
        ORDER BY 1
    """
    cursor = await conn.execute(query, {"schema": schema})
    return [row[0] for row in await cursor.fetchall()]

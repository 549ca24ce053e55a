"""The views of the outbox: each reason for which a row waits, what is cheap, and who may do what."""

import re
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

import outwake
from outwake.schema import in_schema
from outwake.telemetry.metrics import DEPTH
from tests.conftest import Connect
from tests.support.scenario import SESSION, Scenario, build
from tests.support.steps import Connection, add, claim, column, new_worker, one


async def reasons(conn: Connection) -> dict[int, str]:
    cursor = await conn.execute("SELECT id, reason FROM outbox_waiting")
    return dict(await cursor.fetchall())


async def present(connect: Connect, conn: Connection, *topics: str, concurrency: int = 1) -> Any:
    holder = await connect()
    number = await one(conn, "SELECT coalesce(max(presence), 0) + 1 FROM worker")
    await holder.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, %s)"), (number,))
    return await outwake.register(conn, topics, concurrency=concurrency, presence=number)


async def test_why_rows_wait(connect: Connect) -> None:
    scenario = await build(connect)
    found = await reasons(scenario.conn)
    expected = {
        "dead": "dead",
        "retry": "retry",
        "lost": "worker lost",
        "behind": "key",
        "limited": "topic limit",
        "paused": "topic paused",
        "nobody": "no worker",
        "scheduled": "scheduled",
    }
    assert {name: found.get(row) for name, row in scenario.rows.items()} == {
        **dict.fromkeys(scenario.rows),
        **expected,
    }
    waits_for = "SELECT waits_for FROM outbox_waiting WHERE id = %s"
    assert await one(scenario.conn, waits_for, scenario.rows["behind"]) == scenario.rows["first"]


async def test_row_that_a_forgotten_transaction_holds(connect: Connect) -> None:
    conn, holder = await connect(), await connect()
    await present(connect, conn, "t")
    row_id = await add(conn)
    await holder.execute("BEGIN")
    await holder.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", (row_id,))
    await holder.execute("SELECT pg_sleep(1.1)")  # only then does it count as forgotten
    assert await reasons(conn) == {row_id: "locked"}
    detail = await one(conn, "SELECT detail FROM outbox_waiting")
    assert f"pid {holder.info.backend_pid} " in detail
    writers = await column(conn, "SELECT pid FROM outbox_writer")
    assert writers == []  # it has locked a row and written none
    await holder.execute("UPDATE outbox SET priority = 1 WHERE id = %s", (row_id,))
    assert await column(conn, "SELECT pid FROM outbox_writer") == [holder.info.backend_pid]
    await holder.execute("ROLLBACK")
    assert await reasons(conn) == {row_id: "due"}


async def test_busy_draining_and_unnoticed(connect: Connect) -> None:
    conn = await connect()
    worker = await present(connect, conn, "t")
    running, waiting = await add(conn), await add(conn)
    assert [row.id for row in await claim(conn, worker)] == [running]
    assert await reasons(conn) == {waiting: "workers busy"}
    await conn.execute("UPDATE worker SET draining = true")
    assert await reasons(conn) == {waiting: "workers draining"}
    await conn.execute("UPDATE worker SET draining = false")
    await outwake.complete(conn, worker, [(running, 1)])
    await conn.execute("SELECT outbox_park(%s)", (worker,))
    assert await reasons(conn) == {waiting: "due"}
    await conn.execute(
        "UPDATE outbox SET available_at = now() - interval '10 seconds' WHERE id = %s", (waiting,)
    )
    assert await reasons(conn) == {waiting: "unnoticed"}


@pytest.mark.parametrize("how", ["DISABLE TRIGGER USER", "ENABLE REPLICA TRIGGER outbox_inserted"])
async def test_disabled_triggers_are_told(how: str, connect: Connect) -> None:
    """By readiness at once, and by the row that nobody was told of."""
    conn = await connect()
    worker = await present(connect, conn, "t")
    await conn.execute("SELECT outbox_park(%s)", (worker,))
    assert await one(conn, "SELECT ready FROM outbox_ready()")
    await conn.execute(f"ALTER TABLE outbox {how}".encode())
    row = await add(conn)
    await conn.execute("UPDATE outbox SET available_at = now() - interval '10 seconds'")
    assert await one(conn, "SELECT ready FROM outbox_ready()") is False
    said = "triggers of outbox are disabled, so new rows wake nobody: "
    assert (await one(conn, "SELECT reason FROM outbox_ready()")).startswith(said)
    assert await reasons(conn) == {row: "unnoticed"}
    assert "outbox_inserted" in await one(conn, "SELECT detail FROM outbox_waiting")
    await conn.execute("ALTER TABLE outbox ENABLE TRIGGER USER")
    await conn.execute("ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_inserted")
    assert await one(conn, "SELECT ready FROM outbox_ready()")


async def test_a_row_that_its_worker_has_yet_to_stop(connect: Connect) -> None:
    conn = await connect()
    worker = await present(connect, conn, "t")
    row_id = await add(conn)
    await claim(conn, worker)
    assert await reasons(conn) == {}  # it runs
    await conn.execute("SELECT outbox_cancel(%s)", (row_id,))
    assert await reasons(conn) == {row_id: "cancelling"}


async def test_states_of_workers(connect: Connect) -> None:
    scenario = await build(connect)
    conn = scenario.conn
    cursor = await conn.execute("SELECT id, state FROM worker_status")
    assert dict(await cursor.fetchall()) == {
        scenario.busy: "awake",
        scenario.parked: "parked",
        scenario.lost: "lost",
    }
    await conn.execute("SELECT outbox_rescue(%s, '0', '1 hour')", (scenario.busy,))
    query = "SELECT state, end_reason FROM worker_status WHERE id = %s"
    cursor = await conn.execute(query, (scenario.lost,))
    assert await cursor.fetchone() == ("ended", "its lease ran out")
    assert scenario.rows["lost"] not in await column(conn, "SELECT id FROM worker_running")


async def test_histories_are_in_order(connect: Connect) -> None:
    scenario = await build(connect)
    conn = scenario.conn
    for query, value in [
        ("SELECT at FROM outbox_history(%s)", scenario.rows["session"]),
        ("SELECT at FROM session_history(%s)", SESSION),
    ]:
        times = await column(conn, query, value)
        assert len(times) > 3
        assert times == sorted(times)


@pytest.mark.parametrize("finished", [0, 60_000])
async def test_depth_reads_no_finished_row(connect: Connect, finished: int) -> None:
    """The planner is left alone: it must find the partial indexes by itself, and few pages be read."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, state, finished_at, started_at)"
        " SELECT 't', 'done', now(), now() FROM generate_series(1, %s)",
        (finished,),
    )
    await conn.execute(
        "INSERT INTO outbox (topic, priority) SELECT 't' || (i % 3), i % 2 FROM generate_series(1, 300) AS i"
    )
    await conn.execute(
        "INSERT INTO outbox (topic, ordering_key, blocked)"
        " SELECT 'k', 'k', i > 1 FROM generate_series(1, 50) AS i"
    )
    await conn.execute("VACUUM ANALYZE outbox")
    queries: list[Any] = [DEPTH, "SELECT * FROM outbox_front", "SELECT * FROM outbox_ready()"]
    for query in queries:
        await conn.execute(query)  # catalog pages are read once
        plan = "\n".join(await column(conn, "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) " + query))
        if finished:
            assert "Seq Scan on outbox" not in plan
        pages = [int(number) for number in re.findall(r"shared hit=(\d+)", plan)]
        assert pages[0] < 200, plan


async def test_front_knows_every_topic_and_priority(connect: Connect) -> None:
    conn = await connect()
    for topic, priority in [("b", 0), ("a", 5), ("a", -3), ("c", 1), ("b", 0), ("a", 5)]:
        await add(conn, topic, priority=priority)
    cursor = await conn.execute("SELECT topic, priority, id FROM outbox_front ORDER BY id")
    assert await cursor.fetchall() == [("b", 0, 1), ("a", 5, 2), ("a", -3, 3), ("c", 1, 4)]


async def test_ready(connect: Connect) -> None:
    conn = await connect()

    async def ready(longest: str = "1 minute") -> tuple[Any, ...]:
        cursor = await conn.execute(
            "SELECT ready, stuck, workers, topic, reason FROM outbox_ready(%s)", (longest,)
        )
        found: tuple[Any, ...] | None = await cursor.fetchone()
        assert found is not None
        return found

    assert await ready() == (False, False, 0, None, "no worker is present")
    await present(connect, conn, "t")
    assert await ready() == (True, False, 1, None, None)
    row_id = await add(conn, "fax.send")
    assert await ready() == (True, False, 1, "fax.send", None)
    ready_, stuck, _, topic, reason = await ready("0")
    assert (ready_, stuck, topic) == (False, True, "fax.send")
    assert f"row {row_id} of topic fax.send" in reason
    assert reason.endswith(": no worker")
    await conn.execute("INSERT INTO topic VALUES ('fax.send', 0)")  # told to wait
    assert await ready("0") == (True, False, 1, None, None)


async def test_stuck_is_reported_once(connect: Connect) -> None:
    conn = await connect()
    row_id = await add(conn)
    report = "SELECT stuck, topic, id, reason FROM outbox_stuck_report('0', '1 hour')"
    assert await (await conn.execute(report)).fetchall() == [(True, "t", row_id, "no worker")]
    assert await (await conn.execute(report)).fetchall() == []
    again = "SELECT stuck, topic, id, reason FROM outbox_stuck_report('0', '0')"
    assert len(await (await conn.execute(again)).fetchall()) == 1
    await conn.execute("SELECT outbox_cancel(%s)", (row_id,))
    assert await (await conn.execute(report)).fetchall() == [(False, "t", None, None)]
    assert await (await conn.execute(report)).fetchall() == []
    assert await one(conn, "SELECT outbox_stuck_deadline('1 minute')") is None


async def test_deadline_of_what_could_be_stuck(connect: Connect) -> None:
    conn = await connect()
    assert await one(conn, "SELECT outbox_stuck_deadline('1 minute')") is None
    await add(conn, available_at=await one(conn, "SELECT clock_timestamp() + interval '1 hour'"))
    later = await one(conn, "SELECT outbox_stuck_deadline('1 minute')")
    assert timedelta(minutes=60) < later <= timedelta(minutes=61)
    worker = await new_worker(conn)
    await add(conn)
    await claim(conn, worker, lease=timedelta(minutes=5))
    sooner = await one(conn, "SELECT outbox_stuck_deadline('1 minute')")
    assert timedelta(minutes=5) < sooner <= timedelta(minutes=6)


async def as_role(connect: Connect, role: str) -> Connection:
    conn = await connect()
    await conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    return conn


@pytest.fixture
async def scenario(connect: Connect) -> Scenario:
    return await build(connect)


async def test_reader_reads_and_changes_nothing(connect: Connect, scenario: Scenario) -> None:
    conn = await as_role(connect, "outwake_reader")
    names = await column(
        conn,
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'v') AND relnamespace = 'outwake'::regnamespace",
    )
    hidden = {"api_token", "sql_reader", "producer_topic"}
    hidden |= {"session_memory", "sandbox_borrow", "sandbox_suspect", "session_admission"}
    assert hidden < set(names)
    for name in set(names) - hidden:
        await conn.execute(sql.SQL("SELECT * FROM {} LIMIT 1").format(sql.Identifier(name)))
    await conn.execute("SELECT * FROM outbox_ready()")
    await conn.execute("SELECT * FROM outbox_history(1)")
    await conn.execute("SELECT * FROM session_history(%s)", (SESSION,))
    await conn.execute("SELECT * FROM outbox_throughput('1 hour')")
    row_id = scenario.rows["dead"]
    for attempt in [
        *(f"SELECT * FROM {name}" for name in hidden),
        f"SELECT outbox_retry({row_id})",
        f"SELECT outbox_discard({row_id})",
        f"SELECT outbox_cancel({row_id})",
        "INSERT INTO outbox (topic) VALUES ('t')",
        "UPDATE outbox SET state = 'ready'",
        "DELETE FROM session",
        "UPDATE topic SET max_running = 1",
        "SELECT outbox_stuck_report('0', '0')",
        f"SELECT outbox_fail('{scenario.busy}', {row_id}, 1, 'x')",
    ]:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await conn.execute(attempt.encode())


async def test_operator_retries_discards_cancels_and_limits(connect: Connect, scenario: Scenario) -> None:
    conn = await as_role(connect, "outwake_operator")
    rows = scenario.rows
    assert await one(conn, "SELECT count(*) FROM sandbox_suspect") == 0
    assert await one(conn, "SELECT outbox_retry(%s)", rows["dead"]) == "ready"
    assert await one(conn, "SELECT outbox_cancel(%s)", rows["running"]) == "running"
    assert await one(conn, "SELECT outbox_cancel(%s)", rows["nobody"]) == "cancelled"
    assert await one(conn, "SELECT outbox_discard(%s)", rows["paused"]) is None
    assert await one(conn, "SELECT outbox_cancel(%s)", rows["first"]) == "running"
    await conn.execute("UPDATE topic SET max_running = 3 WHERE name = 'sms.send'")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        await conn.execute("UPDATE outbox SET state = 'ready'")


async def test_a_role_that_may_only_insert_enqueues(connect: Connect) -> None:
    admin = await connect()
    await admin.execute(
        "DO $$ BEGIN CREATE ROLE observe_shop; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    try:
        await admin.execute("GRANT outwake_producer TO observe_shop")
        await admin.execute("INSERT INTO producer_topic (role_name, topic) VALUES ('observe_shop', 't')")
        conn = await as_role(connect, "observe_shop")
        await conn.execute("INSERT INTO outbox (topic) VALUES ('t')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await conn.execute("SELECT outbox_retry(1)")
    finally:
        await admin.execute("DROP OWNED BY observe_shop")
        await admin.execute("DROP ROLE observe_shop")


async def test_grants_can_be_repeated(connect: Connect) -> None:
    conn = await connect()
    told: list[str] = []
    await conn.execute("SELECT grant_roles()")
    conn.add_notice_handler(lambda notice: told.append(notice.message_primary or ""))
    await conn.execute("SELECT grant_roles()")
    assert told == []

"""Falling asleep without missing a row: each interleaving that worker/engine/parking.py names, one by one.

P is a producer at psql, W the worker. In each test the rule is also taken out, and W then sleeps for
ever beside a row that waits: nothing that happened will wake it, and it has no timer.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import psycopg
import pytest

from outwake._handshake import Handshake
from outwake._notify import ListenConnection
from outwake.schema import in_schema
from outwake.worker.engine import listen
from outwake.worker.engine.claimer import Claimer
from outwake.worker.engine.cursor import Cursors
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.parking import Parking, Stage
from outwake.worker.engine.timers import Timers
from tests.conftest import Connect
from tests.support.sleepers import end_listener, is_missed, runs
from tests.support.steps import (
    Rule,
    add,
    one,
    starts,
    take_out,
    until,
    with_and_without,
)
from tests.support.worker import watched


def forgets_due_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take step 5 out: a worker sets no timer for rows."""
    keep_announced = Timers.keep_announced

    def forgets(self: Timers) -> None:
        keep_announced(self)
        self.row_at = math.inf

    monkeypatch.setattr(Timers, "keep_announced", forgets)


@with_and_without
async def test_insert_wakes_a_sleeper(rule: Rule, connect: Connect, database: str) -> None:
    """1. W sleeps. 2. P inserts."""
    psql = await connect()
    async with watched(database) as worker:
        assert await worker.asleep() == math.inf
        if rule == "taken out":
            await psql.execute("DROP TRIGGER outbox_inserted ON outbox")
        row = await add(psql)
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@pytest.mark.parametrize("commits", ["before the last scan", "after the last scan", "in its sleep"])
async def test_producer_that_saw_the_flag(commits: str, connect: Connect, database: str) -> None:
    """1. W sets its flag. 2. P inserts before or after W's last scan, and sees it. 3. P commits."""
    psql = await connect()
    async with watched(database, started=False) as worker:
        held = worker.hold("writers" if commits == "before the last scan" else "schedule")
        await held.wait()
        await psql.execute("BEGIN")
        row = await add(psql)
        if commits != "in its sleep":
            await psql.execute("COMMIT")
        held.release()
        if commits == "in its sleep":
            await worker.asleep()
            await psql.execute("COMMIT")
        await worker.has_run(row)


@with_and_without
async def test_producer_that_missed_the_flag_and_commits_late(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 3: wait for those who write.

    1. W finds nothing. 2. P inserts and looks: nobody is parked. 3. W sets its flag and scans again: the
    row is not there yet. 4. P commits, without a word.
    """
    if rule == "taken out":
        monkeypatch.setattr(Parking, "saw_writers", lambda self, writers: True)
        monkeypatch.setattr(Parking, "drained", lambda self: setattr(self, "stage", Stage.PARKED))
    psql = await connect()
    async with watched(database, started=False) as worker:
        await psql.execute("BEGIN")
        row = await add(psql)
        if rule == "kept":
            await worker.scanned(4)
            assert worker.readiness()["stage"] == "draining writers"
        else:
            await worker.asleep()
        await psql.execute("COMMIT")
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@with_and_without
async def test_writers_are_noted_after_the_flag(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 comes before step 2.

    1. W finds nothing (taken out: and notes who writes now: nobody). 2. P inserts and looks: nobody is
    parked. 3. W sets its flag (kept: and notes P). 4. P commits, without a word.
    """

    saw_writers = Parking.saw_writers
    psql = await connect()
    async with watched(database, started=False) as worker:
        before_flag = worker.hold("park")
        await before_flag.wait()
        if rule == "taken out":
            early = await one(psql, "SELECT outbox_writers()")
            monkeypatch.setattr(Parking, "saw_writers", lambda self, writers: saw_writers(self, early))
        await psql.execute("BEGIN")
        row = await add(psql)
        before_flag.release()
        await (worker.parks() if rule == "kept" else worker.asleep())
        await psql.execute("COMMIT")
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@with_and_without
async def test_last_scan_comes_after_the_writers_ended(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4: claim once more. (Step 5 would find this row too, so it is out in both.)

    1. P inserts; nobody is parked. 2. W sets its flag, notes P, scans. 3. P commits. 4. W sees that all
    it noted have ended. Taken out: it does not scan again.
    """
    ended = False
    saw_writers, claim = Parking.saw_writers, Claimer.claim

    def notes(self: Parking, writers: Iterable[str]) -> bool:
        nonlocal ended
        ended = saw_writers(self, writers)
        return ended

    async def claims_nothing_more(self: Claimer, slots: int, *, stay_parked: bool) -> int:
        return 0 if ended else await claim(self, slots, stay_parked=stay_parked)

    forgets_due_rows(monkeypatch)
    if rule == "taken out":
        monkeypatch.setattr(Parking, "saw_writers", notes)
        monkeypatch.setattr(Claimer, "claim", claims_nothing_more)
        monkeypatch.setattr(Cursors, "is_clear", lambda self, since: True)  # it takes itself to have scanned
    psql = await connect()
    async with watched(database, started=False) as worker:
        await psql.execute("BEGIN")
        row = await add(psql)
        await worker.scanned(3)
        again = worker.hold("writers")
        await again.wait()
        await psql.execute("COMMIT")
        again.release()
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@with_and_without
@pytest.mark.parametrize("prepares", ["before the flag", "after it was noted"])
async def test_prepared_transaction(rule: Rule, prepares: str, connect: Connect, database: str) -> None:
    """A prepared transaction has no process, and still holds its locks.

    1. P inserts, nobody is parked. 2. P prepares its transaction: before W's flag, or once W has noted it.
    3. W does not take it for ended. 4. P commits, without a word.
    """
    psql, producer = await connect(), await connect()
    if not int(await one(psql, "SHOW max_prepared_transactions")):
        pytest.skip("the server has max_prepared_transactions = 0")
    if rule == "taken out":
        await take_out(psql, "outbox_writers", "IS DISTINCT FROM pg_backend_pid()", "<> pg_backend_pid()")
    await producer.execute("BEGIN")
    row = await add(producer)
    name = f"p{row}_{database.rpartition('_')[2]}"
    if prepares == "before the flag":
        await producer.execute(f"PREPARE TRANSACTION '{name}'".encode())
    async with watched(database, started=False) as worker:
        try:
            if prepares == "after it was noted":
                await worker.scanned(3)
                await producer.execute(f"PREPARE TRANSACTION '{name}'".encode())
            await (worker.scanned(worker.scans + 4) if rule == "kept" else worker.asleep())
        finally:
            await psql.execute(f"COMMIT PREPARED '{name}'".encode())
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


async def test_prepare_is_refused_while_somebody_sleeps(connect: Connect, database: str) -> None:
    """A transaction that has notified cannot be prepared: the row must be inserted in a plain one."""
    psql = await connect()
    if not int(await one(psql, "SHOW max_prepared_transactions")):
        pytest.skip("the server has max_prepared_transactions = 0")
    async with watched(database):
        await psql.execute("BEGIN")
        await add(psql)
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            await psql.execute("PREPARE TRANSACTION 'refused'")


@pytest.mark.parametrize("way", ["triggers off", "wake"])
async def test_wake_finds_what_no_trigger_saw(way: str, connect: Connect, database: str) -> None:
    """1. W sleeps. 2. P inserts with all triggers of the table off. 3. P calls outbox_wake()."""
    psql = await connect()
    async with watched(database) as worker:
        await psql.execute("ALTER TABLE outbox DISABLE TRIGGER USER")
        row = await add(psql)
        if way == "wake":
            await psql.execute("SELECT outbox_wake()")
            await worker.has_run(row)
        else:
            await is_missed(worker, psql, row)


async def test_replica_role_does_not_silence_the_triggers(connect: Connect, database: str) -> None:
    """ENABLE ALWAYS: `session_replication_role = replica` (a restore, say) still notifies."""
    psql = await connect()
    async with watched(database) as worker:
        await psql.execute("SET session_replication_role = replica")
        await worker.has_run(await add(psql))
    query = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'A'"
    assert await (await psql.execute(query)).fetchall() == []


@with_and_without
async def test_who_need_not_look_must_again_once_somebody_parks(
    rule: Rule, connect: Connect, database: str
) -> None:
    """Step 2: outbox_sleepers is raised.

    1. P inserts; nobody is parked. 2. W parks and sleeps. 3. P inserts.
    """
    psql, producer = await connect(), await connect()
    await psql.execute("SELECT outbox_writers()")
    await add(producer, topic="other")
    if rule == "taken out":
        await take_out(psql, "outbox_writers", "nextval('outbox_sleepers')", "1")
    async with watched(database) as worker:
        row = await add(producer)
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@pytest.mark.parametrize("without", [None, "outbox_all_awake", "outbox_writers"])
async def test_look_from_before_a_parking_takes_nothing_down(
    without: str | None, connect: Connect, database: str
) -> None:
    """outbox_sleepers is raised and taken down under one lock.

    1. P inserts, looks, and sees nobody parked. 2. W sets its flag and goes to raise outbox_sleepers. 3. P
    takes it down and commits. 4. W sees no writer, and sleeps. 5. P inserts. Without the lock of either, W
    raised it between P's look and P's word.
    """
    psql, producer = await connect(), await connect()
    await psql.execute("SELECT nextval('outbox_sleepers')")
    lowered, raised = "PERFORM setval(", "PERFORM nextval('outbox_sleepers');"
    await take_out(psql, "outbox_all_awake", lowered, f"PERFORM pg_advisory_xact_lock(1); {lowered}")
    await take_out(psql, "outbox_writers", raised, f"{raised} PERFORM pg_advisory_xact_lock(2);")
    if without == "outbox_all_awake":
        await take_out(psql, without, "pg_try_advisory_xact_lock(:lock_sleepers, 0)", "true")
    elif without == "outbox_writers":
        await take_out(psql, without, "PERFORM pg_advisory_xact_lock(:lock_sleepers, 0);")
    await psql.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
    inserting = await starts(psql, producer, "INSERT INTO outbox (topic) VALUES ('other') RETURNING id")
    async with watched(database, started=False) as worker:
        await until(
            psql,
            "SELECT true FROM pg_stat_activity WHERE query LIKE '%outbox_writers%'"
            " AND wait_event_type = 'Lock' AND datname = current_database()",
        )
        await psql.execute("SELECT pg_advisory_unlock(1)")
        await inserting
        await psql.execute("SELECT pg_advisory_unlock(2)")
        await worker.asleep()
        row = await add(producer)
        await (runs(worker, row) if without is None else is_missed(worker, psql, row))


@with_and_without
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_producer_with_an_old_snapshot(rule: Rule, level: str, connect: Connect, database: str) -> None:
    """Its look may be stale, so it always notifies.

    1. P takes its snapshot: nobody is parked. 2. W parks and sleeps. 3. P inserts, looks in its old
    snapshot, commits.
    """
    psql, producer = await connect(), await connect()
    if rule == "taken out":
        text = "current_setting('transaction_isolation')"
        await take_out(psql, "outbox_inserted", f"pg_catalog.{text}", "'read committed'")
        await take_out(psql, "outbox_notify", text, "'read committed'")
    await add(producer, topic="other")
    await producer.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
    await producer.execute("SELECT count(*) FROM worker")
    async with watched(database) as worker:
        row = await add(producer)
        await producer.execute("COMMIT")
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


async def test_long_writer_costs_scans_that_back_off_and_end_with_it(connect: Connect, database: str) -> None:
    """1. U, unrelated, has written to outbox and stays open. 2. W parks; it scans again and again, ever
    more rarely, to a second at most. 3. A row inserted meanwhile runs at once. 4. U ends: W sleeps.
    """
    psql, unrelated = await connect(), await connect()
    await unrelated.execute("BEGIN")
    await unrelated.execute("UPDATE outbox SET priority = 1 WHERE false")
    async with watched(database, started=False) as worker:
        await worker.scanned(10)
        waits = [wait for wait in worker.seen.waits if 0 < wait < math.inf]
        # Of a timer of a few milliseconds a busy machine has used up any part before it is read.
        longer = [wait for wait in waits if wait > 0.02]
        assert longer
        assert all(later > earlier for earlier, later in itertools.pairwise(longer)), waits
        assert max(waits) <= 1.0
        assert worker.readiness()["stage"] == "draining writers"
        await worker.has_run(await add(psql))
        await unrelated.execute("COMMIT")
        assert await worker.asleep() == math.inf


@with_and_without
async def test_writers_that_come_later_keep_nobody_awake(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W waits for those that wrote when it set its flag, and for no other: they saw it.

    1. U writes. 2. W parks, notes U. 3. V writes; U commits. 4. W sleeps, though V is open.
    Taken out: W waits for whoever writes now.
    """
    if rule == "taken out":

        def waits_for_all(handshake: Handshake, writers: Iterable[str]) -> None:
            handshake._waits_for = frozenset(writers)

        monkeypatch.setattr(Handshake, "saw", waits_for_all)
    first, second = await connect(), await connect()
    await first.execute("BEGIN")
    await first.execute("UPDATE outbox SET priority = 1 WHERE false")
    async with watched(database, started=False) as worker:
        await worker.scanned(3)
        await second.execute("BEGIN")
        await second.execute("UPDATE outbox SET priority = 1 WHERE false")
        await first.execute("COMMIT")
        if rule == "kept":
            assert await worker.asleep() == math.inf
        else:
            await worker.scanned(worker.scans + 4)
            assert worker.readiness()["stage"] == "draining writers"
        await second.execute("COMMIT")


@with_and_without
async def test_row_that_was_only_skipped_as_locked(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5: no sleep while a due row is visible and locked.

    1. L locks a row that is due. 2. W skips it. 3. L rolls back, without a word.
    """
    if rule == "taken out":
        forgets_due_rows(monkeypatch)
    locker = await connect()
    row = await add(locker)
    await locker.execute("BEGIN")
    await locker.execute("SELECT FROM outbox FOR UPDATE")
    async with watched(database, started=False) as worker:
        await (worker.scanned(8) if rule == "kept" else worker.asleep())
        await locker.execute("ROLLBACK")
        await (runs(worker, row) if rule == "kept" else is_missed(worker, locker, row))
        if rule == "kept":
            assert max(wait for wait in worker.seen.waits if wait < math.inf) <= 1.0
            assert await worker.asleep() == math.inf


@with_and_without
async def test_lost_listen_connection_starts_at_step_1(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. W sleeps. 2. Its LISTEN connection is terminated. 3. P inserts: the notification reaches nobody.
    4. W reconnects. Taken out: it goes on where it was.
    """
    psql = await connect()
    async with watched(database) as worker:
        if rule == "taken out":
            monkeypatch.setattr(worker.parts.parking, "wake", lambda: None)
            monkeypatch.setattr(worker.parts.wakes, "reset", lambda: None)
        before = worker.hold("connect")
        await end_listener(psql)
        await before.wait()
        row = await add(psql)
        before.release()
        if rule == "taken out":
            await until(psql, "SELECT count(*) = 1 FROM worker_present")
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


@with_and_without
async def test_listen_comes_before_the_claim(
    rule: Rule, connect: Connect, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. W connects (kept: and listens), parks, has its last scan. 2. P inserts, sees the flag and
    notifies. 3. W sleeps. Taken out: it begins to listen only now.
    """
    start, silent = Listener.start, []

    async def open_silent(url: str, lease: Any, heard: Any, earlier: int | None) -> Listener:
        connection = await ListenConnection.open(
            url, "outwake worker listen", lease, (), listen._LOCK, earlier
        )
        listener = Listener(connection, heard)
        silent.append((connection.conn, listener))
        return listener

    if rule == "taken out":
        monkeypatch.setattr(Listener, "open", open_silent)
        monkeypatch.setattr(Listener, "start", lambda self, ended: None)
    psql = await connect()
    async with watched(database, started=False) as worker:
        last = worker.hold("sleep")
        await last.wait()
        await until(psql, "SELECT parked FROM worker")
        row = await add(psql)
        for conn, listener in silent:
            for channel in (listen.WAKE, listen.CANCEL):
                await conn.execute(f"LISTEN {channel}")
            start(listener, worker.parts.wakes.event.set)
        last.release()
        await (runs(worker, row) if rule == "kept" else is_missed(worker, psql, row))


async def test_listener_is_in_no_transaction(connect: Connect, database: str) -> None:
    """A listener in a transaction would hold back the server's notification queue."""
    psql = await connect()
    async with watched(database):
        query = (
            "SELECT state, backend_xmin IS NULL FROM pg_stat_activity"
            " WHERE application_name = 'outwake worker listen' AND datname = current_database()"
        )
        assert await (await psql.execute(query)).fetchall() == [("idle", True)]


async def test_flag_of_a_dead_sleeper_is_cleared_by_whoever_parks(connect: Connect, database: str) -> None:
    """1. A worker that sleeps dies: its flag stays up, its presence lock is gone. 2. W parks.

    Else every producer would notify for nobody, for ever.
    """
    psql = await connect()
    await psql.execute(
        "INSERT INTO worker (host, pid, version, topics, concurrency, presence, parked)"
        " VALUES ('gone', 1, '0', '{t}', 1, 4711, true)"
    )
    async with watched(database):
        assert await one(psql, "SELECT array_agg(host <> 'gone') FROM worker WHERE parked") == [True]


async def test_presence_counts_in_this_database_only(connect: Connect, database: str, server: str) -> None:
    """pg_locks shows the whole cluster: the same lock held in another database makes nobody present."""
    psql, elsewhere = await connect(), await connect(server)
    await psql.execute(
        "INSERT INTO worker (host, pid, version, topics, concurrency, presence)"
        " VALUES ('gone', 1, '0', '{t}', 1, 4712)"
    )
    lock = in_schema("SELECT pg_advisory_lock(:lock_presence, 4712)")
    await elsewhere.execute(lock)
    assert await one(psql, "SELECT count(*) FROM worker_present") == 0
    await psql.execute(lock)
    assert await one(psql, "SELECT count(*) FROM worker_present") == 1


async def test_role_that_may_only_insert_can_enqueue(connect: Connect, database: str) -> None:
    """The trigger's function is SECURITY DEFINER: the producer needs no right on worker."""
    psql = await connect()
    role = f"producer_{database.rpartition('_')[2]}"
    await psql.execute(f"CREATE ROLE {role} IN ROLE outwake_producer".encode())
    await psql.execute("INSERT INTO producer_topic (role_name, topic) VALUES (%s, 't')", (role,))
    try:
        async with watched(database) as worker:
            await psql.execute(f"SET ROLE {role}".encode())
            await psql.execute("INSERT INTO outbox (topic) VALUES ('t')")
            await psql.execute("RESET ROLE")
            await worker.has_run(await one(psql, "SELECT max(id) FROM outbox"))
    finally:
        await psql.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE outbox SET available_at = clock_timestamp() WHERE id = {}",
        "UPDATE outbox SET topic = 't' WHERE id = {}",
        "UPDATE outbox SET state = 'ready' WHERE id = {}",
        "SELECT outbox_retry({})",
        "UPDATE outbox SET ordering_key = NULL WHERE id = {}",
        "UPDATE outbox SET ordering_key = 'other' WHERE id = {}",
        "DELETE FROM outbox WHERE ordering_key = 'k' AND id <> {}",
        "UPDATE topic SET max_running = 1 WHERE name = 't' AND {} > 0",
        "DELETE FROM topic WHERE name = 't' AND {} > 0",
        "UPDATE topic SET name = 'u' WHERE name = 't' AND {} > 0",
    ],
)
async def test_whatever_makes_a_row_claimable_wakes(statement: str, connect: Connect, database: str) -> None:
    """1. A row is not claimable, for the reason that the statement removes. 2. W sleeps. 3. P removes it."""
    psql = await connect()
    columns: dict[str, Any] = {}
    if "available_at" in statement:
        columns["available_at"] = await one(psql, "SELECT now() + interval '1 day'")
    elif "topic = 't'" in statement:
        columns["topic"] = "unknown"
    elif "state" in statement or "retry" in statement:
        columns["state"] = "dead"
    elif "ordering_key" in statement:
        other = await one(psql, "SELECT gen_random_uuid()")
        await psql.execute(
            "INSERT INTO worker (id, host, pid, version, topics, concurrency, lease_until)"
            " VALUES (%s, 'h', 1, '0', '{t}', 1, now() + interval '1 day')",
            (other,),
        )
        await add(psql, state="running", worker_id=other, ordering_key="k")
        columns["ordering_key"] = "k"
    else:
        await psql.execute("INSERT INTO topic (name, max_running) VALUES ('t', 0)")
    row = await add(psql, **columns)
    async with watched(database) as worker:
        await worker.asleep()
        assert worker.ran == []
        await psql.execute(statement.format(row).encode())
        await worker.has_run(row)

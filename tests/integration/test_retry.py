"""Retry: backoff with full jitter, a handler's own delay, dead with every error kept, retry by hand."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from outwake import HandBack, Job, Permanent, Retry, enqueue
from outwake._claim import clean
from outwake.telemetry.log import get_logger
from tests.conftest import Connect
from tests.support.steps import (
    Connection,
    Rule,
    add,
    claim,
    claim_ids,
    column,
    get,
    new_worker,
    one,
    take_out,
    until,
    with_and_without,
)
from tests.support.worker import watched

FAIL = "SELECT outbox_fail(%s, %s, %s, %s, %s, %s)"


@with_and_without
async def test_backoff_is_exponential_with_full_jitter_and_capped(rule: Rule, connect: Connect) -> None:
    """0 to 1 s, 2 s, 4 s …, an hour at most, spread over the whole range. Taken out: no jitter."""
    conn = await connect()
    if rule == "taken out":
        await take_out(conn, "outbox_backoff", "random() * ")
    for failures, most in ((1, 1.0), (2, 2.0), (5, 16.0), (12, 2048.0), (13, 3600.0), (1000, 3600.0)):
        waits = await column(
            conn,
            "SELECT extract(epoch FROM outbox_backoff(%s + n * 0))::float8 FROM generate_series(1, 300) n",
            failures,
        )
        assert 0 <= min(waits) <= max(waits) <= most
        if rule == "kept":
            assert min(waits) < 0.1 * most
            assert max(waits) > 0.9 * most
        else:
            assert min(waits) == most


async def test_failure_waits_counts_and_is_kept(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn)
    await claim(conn, worker)
    assert await one(conn, FAIL, worker, row, 1, "boom", None, False) == "ready"
    waits = "SELECT available_at BETWEEN started_at AND clock_timestamp() + '1 s' FROM outbox WHERE id = %s"
    assert await one(conn, waits, row) is True
    assert (await get(conn, row, "failures"), await get(conn, row, "attempt")) == (1, 1)
    (error,) = await get(conn, row, "errors")
    assert error.keys() == {"attempt", "at", "error", "worker_id"}
    assert (error["attempt"], error["error"], error["worker_id"]) == (1, "boom", str(worker))


async def test_handlers_own_delay(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn)
    await claim(conn, worker)
    await one(conn, FAIL, worker, row, 1, "later", timedelta(hours=3), False)
    query = "SELECT available_at - clock_timestamp() BETWEEN '2:59' AND '3:00' FROM outbox WHERE id = %s"
    assert await one(conn, query, row) is True


@pytest.mark.parametrize("permanent", [True, False])
async def test_dead_when_retrying_is_useless_or_failures_are_spent(permanent: bool, connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, max_attempts=10 if permanent else 3)
    states = []
    while await claim_ids(conn, worker):
        attempt = await get(conn, row, "attempt")
        states.append(await one(conn, FAIL, worker, row, attempt, f"no {attempt}", timedelta(0), permanent))
    assert states == (["dead"] if permanent else ["ready", "ready", "dead"])
    assert [e["error"] for e in await get(conn, row, "errors")] == [f"no {n + 1}" for n in range(len(states))]
    assert await get(conn, row, "finished_at") is not None


async def test_history_of_errors_is_bounded(connect: Connect) -> None:
    """The last hundred, 4,000 characters each: a row that fails for ever does not grow for ever."""
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, max_attempts=1000)
    for attempt in range(1, 104):
        await claim(conn, worker)
        await one(conn, FAIL, worker, row, attempt, "x" * 5000, timedelta(0), False)
    errors = await get(conn, row, "errors")
    assert [e["attempt"] for e in errors] == list(range(4, 104))
    assert {len(e["error"]) for e in errors} == {4000}


@pytest.mark.parametrize("way", ["hand back", "hand back with a delay"])
async def test_hand_back_spends_nothing(way: str, connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, max_attempts=1)
    for attempt in (1, 2, 3):
        assert await claim_ids(conn, worker) == [row]
        delay = timedelta(microseconds=1) if "delay" in way else timedelta(0)
        query = "SELECT outbox_hand_back(%s, %s, %s, %s)"
        assert await one(conn, query, worker, [row], [attempt], delay) == row
    assert (await get(conn, row, "failures"), await get(conn, row, "errors")) == (0, [])


async def test_retry_by_hand_forgives_failures_and_keeps_errors_and_attempt(connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn)
    row = await add(conn, max_attempts=1)
    await claim(conn, worker)
    assert await one(conn, FAIL, worker, row, 1, "no", None, False) == "dead"
    assert await one(conn, "SELECT outbox_retry(%s)", row) == "ready"
    assert await one(conn, "SELECT outbox_retry(%s)", row) is None
    assert (await get(conn, row, "failures"), await get(conn, row, "finished_at")) == (0, None)
    assert len(await get(conn, row, "errors")) == 1
    assert [r.attempt for r in await claim(conn, worker)] == [2]


async def test_discard_ends_only_what_is_dead(connect: Connect) -> None:
    conn = await connect()
    dead, ready = await add(conn, state="dead"), await add(conn)
    assert await one(conn, "SELECT outbox_discard(%s)", dead) == "cancelled"
    assert await one(conn, "SELECT outbox_discard(%s)", ready) is None
    assert (await get(conn, dead), await get(conn, ready)) == ("cancelled", "ready")


async def retries(job: Job) -> None:
    raise Retry("later", timedelta(days=1))


async def gives_up(job: Job) -> None:
    raise Permanent("useless")


async def hands_back(job: Job) -> None:
    raise HandBack("no sandbox", timedelta(days=1))


async def fails(job: Job) -> None:
    raise ValueError("nul \0 and \ud800 surrogate")


async def times_out(job: Job) -> None:
    await asyncio.get_running_loop().create_future()


async def stops_itself(job: Job) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("run", "state", "failures", "error"),
    [
        (retries, "ready", 1, "later"),
        (gives_up, "dead", 1, "useless"),
        (hands_back, "ready", 0, None),
        (fails, "ready", 1, clean("ValueError: nul \0 and \ud800 surrogate")),
        (times_out, "ready", 1, "timed out"),
        (stops_itself, "ready", 1, "the handler was cancelled, by nobody here"),
    ],
)
async def test_what_becomes_of_a_handlers_word(
    run: Any, state: str, failures: int, error: str | None, connect: Connect, database: str
) -> None:
    """The worker ends the attempt as the handler said, and goes on."""
    psql = await connect()
    await psql.execute("INSERT INTO topic (name, timeout) VALUES ('t', '50 ms')")
    async with watched(database, run=run) as worker:
        row = await add(psql, available_at="2020-01-01")
        await worker.has_run(row)
        await until(psql, "SELECT state <> 'running' AND attempt > 0 FROM outbox WHERE id = %s", row)
        if run in (retries, gives_up, hands_back):
            assert await get(psql, row) == state
            assert await get(psql, row, "failures") == failures
        errors = [e["error"] for e in await get(psql, row, "errors")]
        assert errors[:1] == ([] if error is None else [error])


async def test_blocking_handler_runs_in_a_thread_and_the_lease_is_renewed(
    connect: Connect, database: str
) -> None:
    """A plain function that blocks does not stop renewal: a third of a lease later the loop still turns."""
    import threading

    released, began = threading.Event(), threading.Event()

    def blocks(job: Job) -> None:
        began.set()
        released.wait(20)

    psql = await connect()
    async with watched(database, run=blocks, lease=0.6) as worker:
        row = await add(psql)
        try:
            await worker.renewed(4)
            assert began.is_set()
            assert await get(psql, row) == "running"
        finally:
            released.set()
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)


async def test_effects_and_end_of_a_row_are_one_commit(connect: Connect, database: str) -> None:
    """A handler that completes its row in its own transaction leaves nothing for the worker to do."""
    psql = await connect()
    await psql.execute("CREATE TABLE effect (row_id bigint)")

    async def effect(job: Job) -> None:
        async with job.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (%s)", (job.row.id,))
            await enqueue(conn, "next")
            await job.complete(conn)

    async with watched(database, run=effect) as worker:
        row = await add(psql)
        await worker.has_run(row)
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        assert await effects(psql) == [row]
        assert await one(psql, "SELECT count(*) FROM outbox WHERE topic = 'next'") == 1


async def effects(conn: Connection) -> list[Any]:
    return await column(conn, "SELECT row_id FROM effect")


@pytest.mark.parametrize("payload", ["[1, 2]", "null", '"text"', "3", "true", '{"session_id": 5}'])
async def test_a_payload_may_be_any_json(connect: Connect, database: str, payload: str) -> None:
    conn = await connect()
    seen: list[Any] = []

    async def run(job: Job) -> None:
        seen.append(job.payload)
        get_logger("test").info("seen")
        raise Permanent("once is enough")

    async with watched(database, run=run) as worker:
        row = await add(conn, payload=payload)
        await worker.has_run(row)
        await until(conn, "SELECT state = 'dead' FROM outbox WHERE id = %s", row)
    assert seen == [json.loads(payload)]
    (error,) = await get(conn, row, "errors")
    assert error["error"] == "once is enough"

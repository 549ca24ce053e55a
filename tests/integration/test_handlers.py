"""What may be a handler, when its work is done, and what a payload may hold."""

import asyncio
import functools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outwake import ConfigurationError, Handler, Job
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.steps import add, get, one, until
from tests.support.worker import command, install, watched

pytestmark = pytest.mark.usefixtures("done")


@pytest.fixture
def done() -> list[int]:
    """The rows whose work was done to its end."""
    DONE.clear()
    return DONE


DONE: list[int] = []


async def work(job: Job) -> None:
    await asyncio.sleep(0)
    DONE.append(job.row.id)


def plain(job: Job) -> str:
    DONE.append(job.row.id)
    return "a value, which nobody uses"


class Service:
    async def __call__(self, job: Job) -> None:
        await work(job)

    async def method(self, job: Job) -> None:
        await work(job)

    @classmethod
    async def of_class(cls, job: Job) -> None:
        await work(job)


def logged(run: Callable[[Job], Awaitable[None]]) -> Callable[[Job], Awaitable[None]]:
    def wrapper(job: Job) -> Awaitable[None]:
        return run(job)

    return wrapper


@functools.wraps(work)
def wrapped(job: Job) -> Awaitable[None]:
    return work(job)


@functools.wraps(work)
def bridged(job: Job) -> None:
    """Says that it is `work`, and runs it by itself."""
    asyncio.run(work(job))


async def with_prefix(prefix: str, job: Job) -> None:
    await work(job)


class Later:
    """Awaitable, and no coroutine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __await__(self) -> Any:
        return work(self._job).__await__()


async def returns_a_coroutine(job: Job) -> object:
    """An `await` was forgotten."""
    return work(job)


def in_a_pool(job: Job) -> object:
    """Gives a future of the standard library."""
    return asyncio.run_coroutine_threadsafe(work(job), LOOP[0])


LOOP: list[asyncio.AbstractEventLoop] = []

KINDS: dict[str, Callable[[Job], object]] = {
    "async function": work,
    "plain function": plain,
    "lambda that gives a coroutine": lambda job: work(job),
    "object with async __call__": Service(),
    "bound method": Service().method,
    "method of a class": Service.of_class,
    "partial": functools.partial(with_prefix, "x"),
    "partial of an object": functools.partial(Service()),
    "behind a decorator": logged(work),
    "behind a decorator that wraps": wrapped,
    "sync bridge that wraps": bridged,
    "class that is awaitable": Later,
    "async function that gives a coroutine": returns_a_coroutine,
    "function that gives a concurrent future": in_a_pool,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_can_be_called_is_done_before_its_row_is(
    kind: str, connect: Connect, database: str
) -> None:
    psql = await connect()
    LOOP[:] = [asyncio.get_running_loop()]
    assert Handler("t", KINDS[kind]).blocking == (kind not in KNOWN_TO_BE_ASYNC)
    async with watched(database, run=KINDS[kind]):
        row = await add(psql)
        await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
        assert [row] == DONE


KNOWN_TO_BE_ASYNC = {
    *("async function", "object with async __call__", "bound method", "method of a class"),
    *("partial", "partial of an object", "async function that gives a coroutine"),
}
"""The others run in a thread."""


async def generator(job: Job) -> AsyncIterator[int]:
    yield 1


def plain_generator(job: Job) -> Iterator[int]:
    yield 1


class Generates:
    async def __call__(self, job: Job) -> AsyncIterator[int]:
        yield 1


@pytest.mark.parametrize(
    "run", [generator, plain_generator, Generates(), functools.partial(generator), Service, "text", None]
)
def test_what_would_do_nothing_is_refused_when_it_is_loaded(run: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"topic t .*(generator|class|cannot be called)"):
        Handler("t", run)


async def returns_a_function(job: Job) -> object:
    return work


IDLE: dict[str, Callable[[Job], object]] = {
    "async_generator": lambda job: generator(job),
    "function": lambda job: work,
    "function ": returns_a_function,
    "partial": lambda job: functools.partial(work, job),
    "coroutine": lambda job: [work(job)],
    "coroutine ": lambda job: (None, work(job)),
}
"""What they return, and handlers that return it."""


@pytest.mark.parametrize("what", IDLE)
async def test_what_nobody_runs_is_a_failure_for_good_when_a_handler_returns_it(
    what: str, connect: Connect, database: str
) -> None:
    psql = await connect()
    async with watched(database, run=IDLE[what]):
        row = await add(psql)
        await until(psql, "SELECT state = 'dead' FROM outbox WHERE id = %s", row)
        [error] = await get(psql, row, "errors")
        assert f"returned {what.strip()}, which nobody runs" in error["error"]
        assert DONE == []


HANDLERS = '''
import os
import psycopg
from outwake import Handler, Permanent
from outwake.telemetry.log import get_logger

def late(job):
    """Ends when the test gives up an advisory lock."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock_shared(2, 7)")
    if job.payload["fails"]:
        raise Permanent("no use")

async def whatever(job):
    get_logger("test").info("came", payload_is=repr(job.payload))

late, whatever = [
    Handler(run.__name__, run) for run in (late, whatever)]
'''


@pytest.mark.parametrize(("fails", "state", "errors"), [(False, "done", []), (True, "dead", ["no use"])])
async def test_a_thread_that_passes_its_time_limit_has_its_outcome_all_the_same(
    fails: bool, state: str, errors: list[str], connect: Connect, database: str, tmp_path: Path
) -> None:
    """The work was done once, so it is not done again, and it is said that it was late."""
    psql = await connect()
    await psql.execute("INSERT INTO topic (name, timeout) VALUES ('late', '50 ms')")
    await psql.execute("SELECT pg_advisory_lock(2, 7)")
    async with command(database, install(tmp_path / "h", HANDLERS), "--topics", "late") as worker:
        row = await add(psql, "late", payload={"fails": fails})
        await worker.event("time_limit_passed", outbox_id=row, limit=0.05)
        await psql.execute("SELECT pg_advisory_unlock(2, 7)")
        await worker.event("ended_late", outbox_id=row)
        await until(psql, "SELECT state = %s FROM outbox WHERE id = %s", state, row)
    assert [found["error"] for found in await get(psql, row, "errors")] == errors
    assert await get(psql, row, "attempt") == 1


@pytest.mark.parametrize("stop", ["drain", "cancel"])
async def test_a_thread_that_was_stopped_and_did_its_work_has_done_it(
    stop: str, connect: Connect, database: str
) -> None:
    """A drain hands nothing back that is done. A cancel that committed first wins all the same."""
    psql = await connect()
    released = threading.Event()

    def blocks(job: Job) -> None:
        assert released.wait(60)

    async with watched(database, run=blocks) as worker:
        row = await add(psql)
        await worker.has_run(row)
        if stop == "drain":
            worker.drain()
            worker.drain()
        else:
            await psql.execute("SELECT outbox_cancel(%s)", (row,))
            await worker.hears_nothing_more(psql)
        released.set()
        await until(psql, "SELECT state <> 'running' FROM outbox WHERE id = %s", row)
    assert await get(psql, row) == ("done" if stop == "drain" else "cancelled")
    assert await get(psql, row, "attempt") == 1


PAYLOADS = [
    "[1, 2]",
    "null",
    "7",
    "true",
    '"text"',
    "[]",
    "{}",
    '{"session_id": [1]}',
    '[{"session_id": "x"}]',
]


async def test_a_payload_may_be_any_json(connect: Connect, database: str, tmp_path: Path, api: Api) -> None:
    """Every log line of the handler works, and so do the pages and the row over HTTP."""
    psql = await connect()
    async with command(database, install(tmp_path / "h", HANDLERS), "--topics", "whatever") as worker:
        await worker.event("parked")
        for text in PAYLOADS:
            row = await one(
                psql,
                "INSERT INTO outbox (topic, payload) VALUES ('whatever', %s::jsonb) RETURNING id",
                text,
            )
            await worker.event("came", outbox_id=row, payload_is=repr(json.loads(text)))
            await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
            shown = await api.client.get(f"/outbox/{row}")
            assert (shown.status_code, shown.json()["payload"]) == (200, json.loads(text))
            assert (await api.client.get(f"/ui/outbox/{row}")).status_code == 200
        assert not [line for line in worker.stderr if "Traceback" in line or "Error" in line]


@pytest.mark.parametrize("topic", ["session.run", "sandbox.return", "webhook.deliver"])
async def test_a_payload_that_means_nothing_to_our_handlers_ends_its_row(
    topic: str, connect: Connect, database: str, tmp_path: Path
) -> None:
    psql = await connect()
    async with command(database, tmp_path, "--topics", topic) as worker:
        await worker.event("parked")
        for text in PAYLOADS:
            row = await one(
                psql, "INSERT INTO outbox (topic, payload) VALUES (%s, %s::jsonb) RETURNING id", topic, text
            )
            await worker.event("ended", outbox_id=row)
            await until(psql, "SELECT state IN ('done', 'dead') FROM outbox WHERE id = %s", row)

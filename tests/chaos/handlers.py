"""The handlers that the workers of a chaos run serve, in place of the installed ones.

Each tells the history when it starts and when it has done its work. What a row's attempts do is in its
payload, so that it follows from the seed.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from outwake import HandBack, Handler, Job, Permanent, Retry
from tests.chaos.history import History


@cache
def _history() -> History:
    return History(Path(os.environ["CHAOS_HISTORY"]))


def _start(job: Job) -> None:
    row = job.row
    _history().tell(
        "start",
        id=row.id,
        attempt=row.attempt,
        topic=row.topic,
        key=row.ordering_key,
        worker=str(job.worker_id),
        pid=os.getpid(),
        place=os.environ["CHAOS_PLACE"],
    )


def _finish(job: Job, how: str) -> None:
    _history().tell("finish", id=job.row.id, attempt=job.row.attempt, how=how)


@asynccontextmanager
async def _told(job: Job) -> AsyncIterator[None]:
    _start(job)
    how = "returned"
    try:
        yield
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        _finish(job, how)


async def _follow_plan(job: Job) -> None:
    """What this attempt does: the plan's word for it, the last for all after it."""
    plan: list[str] = job.payload.get("plan") or ["ok"]
    match plan[min(job.row.failures, len(plan) - 1)]:
        case "retry":
            raise Retry("told to", timedelta(milliseconds=job.payload.get("delay_ms", 100)))
        case "fail":
            raise ValueError("told to fail")
        case "permanent":
            raise Permanent("told to give up")
        case "hand_back" if job.row.attempt < 4:
            raise HandBack("not yet", timedelta(milliseconds=50))


async def work(job: Job) -> None:
    """Sleeps, then does as planned."""
    async with _told(job):
        await asyncio.sleep(job.payload.get("ms", 5) / 1000)
        await _follow_plan(job)


async def wait_for_release(job: Job) -> None:
    """Holds its slot until the runner has seen everybody at work."""
    async with _told(job):
        while not Path(job.payload["release"]).exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.05)


def block(job: Job) -> None:
    """The same in a thread, which nobody can interrupt."""
    _start(job)
    time.sleep(job.payload.get("ms", 5) / 1000)
    _finish(job, "returned")


_EFFECT = "INSERT INTO chaos_effect (row_id, attempt, kind) VALUES (%s, %s, %s)"


async def transact(job: Job) -> None:
    """Its effect and its end are one commit."""
    async with _told(job):
        await asyncio.sleep(job.payload.get("ms", 5) / 1000)
        await _follow_plan(job)
    async with job.transaction() as conn:
        await conn.execute(_EFFECT, (*job.token, "end"))
        await asyncio.sleep(job.payload.get("hold_ms", 0) / 1000)
        await job.complete(conn)


async def steps(job: Job) -> None:
    """Several fenced effects, each its own commit, before the row is completed by the loop."""
    async with _told(job):
        for _ in range(job.payload.get("steps", 3)):
            async with job.transaction() as conn:
                await asyncio.sleep(job.payload.get("hold_ms", 0) / 1000)
                await conn.execute(_EFFECT, (*job.token, "step"))
            await asyncio.sleep(job.payload.get("ms", 5) / 1000)
        await _follow_plan(job)


_BORROW = """
WITH borrowed AS (
    INSERT INTO chaos_borrowed (token, session_id, row_id, attempt) VALUES (%s, %s, %s, %s)
)
UPDATE session SET sandbox = %s WHERE id = %s AND sandbox IS NULL RETURNING true
"""


async def run_session(job: Job) -> None:
    """Borrows a sandbox unless the session holds one, then says what an agent would say."""
    session, prompt = job.payload["session_id"], job.payload.get("prompt_id")
    plan = await _session_plan(job, prompt)
    async with _told(job):
        await _borrow(job, session)
        if prompt is None:
            return
        for number in range(1, plan["messages"] + 1):
            await asyncio.sleep(plan.get("ms", 5) / 1000)
            await _say(job, session, prompt, [{"n": number, "attempt": job.row.attempt}])
            if number == plan.get("fail_at") and job.row.failures < plan.get("failures", 0):
                raise ValueError("the agent fell over")


async def _session_plan(job: Job, prompt: str | None) -> dict[str, Any]:
    """A prompt's text says how many messages, and so on."""
    plan: dict[str, Any] = {"messages": 0}
    async with job.connection() as conn:
        cursor = await conn.execute("SELECT text::jsonb FROM prompt WHERE id = %s", (prompt,))
        if (row := await cursor.fetchone()) is not None:
            plan = row[0]
    return plan


async def _borrow(job: Job, session: str) -> None:
    async with job.transaction() as conn:
        cursor = await conn.execute("SELECT sandbox FROM session WHERE id = %s FOR NO KEY UPDATE", (session,))
        row = await cursor.fetchone()
        if row is None or row[0] is not None:
            return
        token = str(uuid4())
        held = Jsonb({"item": {"name": token[:8]}, "borrow_token": token})
        await conn.execute(_BORROW, (token, session, *job.token, held, session))


async def _say(job: Job, session: str, prompt: str, bodies: list[dict[str, Any]]) -> None:
    async with job.connection() as conn:
        cursor = await conn.execute(
            "SELECT fenced FROM message_append(%s, %s, %s, %s, %s, %s::jsonb[])",
            (job.worker_id, *job.token, session, prompt, [Jsonb(body) for body in bodies]),
        )
        row = await cursor.fetchone()
        if row is not None and row[0]:
            raise RuntimeError("fenced")


async def return_sandbox(job: Job) -> None:
    """Notes the return."""
    async with _told(job):
        await asyncio.sleep(0.002)
    async with job.transaction() as conn:
        await conn.execute(
            "INSERT INTO chaos_returned (token, row_id, attempt) VALUES (%s, %s, %s)",
            (job.payload["sandbox"]["borrow_token"], *job.token),
        )
        await job.complete(conn)


plain = Handler("plain", work)
keyed = Handler("keyed", work)
long = Handler("long", work)
limited = Handler("limited", work)
lone = Handler("lone", work)
roll_call = Handler("roll.call", wait_for_release)
timed = Handler("timed", work, timeout=timedelta(seconds=0.2))
threaded = Handler("threaded", block)
transactional = Handler("transactional", transact)
stepwise = Handler("stepwise", steps)
session_run = Handler("session.run", run_session)
sandbox_return = Handler("sandbox.return", return_sandbox)

HANDLERS = {name: value for name, value in globals().items() if isinstance(value, Handler)}

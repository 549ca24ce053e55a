"""Borrow a sandbox for an attempt. A crash leaks no sandbox, except in the window named below.

1. Record the intent, in a fenced transaction. If the previous turn left a sandbox for this one, take that
   sandbox over instead and stop here. If an earlier attempt of this turn held a sandbox, its return is
   recorded first, because attempts never share a sandbox.
2. Ask the allocator, in a task that nobody cancels. Even if the handler is stopped, the task waits for the
   answer, because the answer can't be asked for again.
3. Record the answer in one transaction, fenced by the attempt: the session holds the sandbox and the intent
   is deleted. From now on the row's end, whatever its cause, schedules the return (trigger session_follow).
4. An answer comes too late if the attempt is fenced or cancelled, or if its session is deleted. It then
   becomes a row of topic sandbox.return in the transaction that deletes the intent.

One window remains: the allocator has committed, and this process dies before step 3 or 4 commits. The intent
stays in that case, and the view sandbox_suspect shows it.
"""

import asyncio
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from outwake.errors import Cancelled, Fenced, HandBack
from outwake.handler import Job
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger
from outwake.worker.errors import OutcomeUnknown, SessionError
from outwake.worker.messages import retry_until_available
from outwake.worker.sandboxes.base import Item, Request, SandboxProvider

log = get_logger(__name__)

_BEGIN = in_schema("SELECT :schema.sandbox_begin(%s, %s, %s, %s)")
_HOLD = in_schema("SELECT :schema.sandbox_hold(%s, %s, %s)")
# If this is repeated because its answer was lost, the missing intent shows that it was already executed.
_OWE = in_schema(
    "WITH ended AS (DELETE FROM :schema.sandbox_borrow WHERE id = %s RETURNING id)"
    " SELECT :schema.sandbox_owe(%s, %s) FROM ended"
)
_FORGET = in_schema("DELETE FROM :schema.sandbox_borrow WHERE id = %s")
_NOTE = in_schema("UPDATE :schema.sandbox_borrow SET error = %s WHERE id = %s")

_asking: set[asyncio.Task[Item]] = set()  # the event loop holds tasks only weakly


async def borrow(job: Job, session_id: UUID, run: UUID, provider: SandboxProvider) -> tuple[Item, bool]:
    """Return the sandbox that the session now holds, and whether an earlier turn has used it.

    run: the name of the turn. Raises HandBack if no sandbox is free, SessionError if the provider refuses,
    Fenced or Cancelled.
    """
    intent = uuid4()
    async with job.transaction() as conn:
        cursor = await conn.execute(_BEGIN, (intent, session_id, *job.token))
        row = await cursor.fetchone()
    assert row is not None
    if row[0] is not None:
        return row[0], True
    asking = asyncio.create_task(_ask(job, Request(intent, session_id, run, job.row.attempt), provider))
    _asking.add(asking)
    asking.add_done_callback(_asking.discard)
    return await _never_abandon(asking), False


async def _never_abandon(asking: asyncio.Task[Item]) -> Item:
    stopped: asyncio.CancelledError | None = None
    while not asking.done():
        try:
            await asyncio.wait([asking])
        except asyncio.CancelledError as error:
            stopped = error
    if stopped is not None:
        asking.exception()  # marks the exception as retrieved; `_ask` has handled it
        raise stopped
    return asking.result()


async def _ask(job: Job, request: Request, provider: SandboxProvider) -> Item:
    intent, session_id = request.intent, request.session_id
    try:
        held = await provider.acquire(request)
    except OutcomeUnknown as error:
        await _note(job, intent, str(error))
        log.error("borrow_unclear", borrow_id=str(intent), error=str(error))
        raise
    except (SessionError, HandBack):
        await _forget(job, intent)
        raise
    try:
        await retry_until_available(lambda: _hold(job, session_id, held, intent))
    except (Fenced, Cancelled, HandBack):
        await retry_until_available(lambda: _owe(job, session_id, held, intent))
        log.warning("borrowed_too_late", borrow_id=str(intent))
        raise
    log.info("borrowed", borrow_id=str(intent), kind=provider.kind)
    return held


async def _hold(job: Job, session_id: UUID, held: Item, intent: UUID) -> None:
    async with job.transaction() as conn:
        cursor = await conn.execute(_HOLD, (intent, session_id, Jsonb(held)))
        row = await cursor.fetchone()
        if row is None or not row[0]:
            raise HandBack("the session was deleted")


async def _owe(job: Job, session_id: UUID, held: Item, intent: UUID) -> None:
    async with job.connection() as conn:
        await conn.execute(_OWE, (intent, session_id, Jsonb(held)))


async def _forget(job: Job, intent: UUID) -> None:
    async def forget() -> None:
        async with job.connection() as conn:
            await conn.execute(_FORGET, (intent,))

    await retry_until_available(forget)


async def _note(job: Job, intent: UUID, error: str) -> None:
    async def note() -> None:
        async with job.connection() as conn:
            await conn.execute(_NOTE, (error, intent))

    await retry_until_available(note)

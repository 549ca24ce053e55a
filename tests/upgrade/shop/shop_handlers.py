"""The handlers that workers of every version serve. What an attempt does is in the row's payload."""

import asyncio
import os
from datetime import timedelta

from outwake import Handler, Job, Permanent, Retry

PLACE = os.environ.get("SHOP_PLACE", "nowhere")

_EFFECT = """
INSERT INTO public.effect (row_id, topic, ordering_key, attempt, place, running)
VALUES (%s, %s, %s, %s, %s, CASE %s WHEN 'shop.limited' THEN (
    SELECT count(*) FROM outwake.outbox AS o WHERE o.state = 'running' AND o.topic = 'shop.limited') END)
"""


async def take_effect(job: Job) -> None:
    """The effect and the end of the row are one commit."""
    await _follow_plan(job)
    row = job.row
    async with job.transaction() as conn:
        await conn.execute(_EFFECT, (row.id, row.topic, row.ordering_key, row.attempt, PLACE, row.topic))
        await job.complete(conn)


async def return_only(job: Job) -> None:
    """The worker ends the row, together with its next claim; a trigger writes the effect (tables.sql)."""
    await _follow_plan(job)


async def _follow_plan(job: Job) -> None:
    plan = job.payload.get("plan")
    if job.payload.get("hang") == PLACE:
        async with job.connection() as conn:
            await conn.execute("SELECT pg_notify('shop_hangs', %s)", (f"{PLACE} {job.row.id}",))
        await asyncio.sleep(3600)
    await asyncio.sleep(job.payload.get("ms", 2) / 1000)
    if plan == "dead":
        raise Permanent("told to give up")
    if job.row.failures == 0 and plan == "retry":
        raise Retry("told to", timedelta(milliseconds=50))
    if job.row.failures == 0 and plan == "fail":
        raise ValueError("told to fail")


plain = Handler("shop.plain", take_effect)
keyed = Handler("shop.keyed", take_effect)
limited = Handler("shop.limited", take_effect)
returned = Handler("shop.returned", return_only)

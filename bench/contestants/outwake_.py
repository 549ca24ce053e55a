"""Outwake: the worker command as it is, its handler found through an entry point (bench/contestants.py)."""

import asyncio
import sys

import common
import psycopg
from psycopg_pool import AsyncConnectionPool

from outwake import Handler, Job, enqueue
from outwake._migrate import migrate
from outwake.schema import in_schema

INSERT = in_schema("INSERT INTO :schema.outbox (topic) VALUES (%s) RETURNING id")
FILL = in_schema("INSERT INTO :schema.outbox (topic) SELECT 'bench.noop' FROM generate_series(1, %s)")


async def noop(job: Job) -> None:
    common.mark()


async def hold(job: Job) -> None:
    await asyncio.Event().wait()


handler = Handler("bench.noop", noop)
holder = Handler("bench.hold", hold)


async def setup() -> None:
    await migrate(common.URL)


async def fill(count: int) -> None:
    with psycopg.connect(common.URL, autocommit=True) as conn:
        conn.execute(FILL, (count,))


async def work(variant: str) -> None:
    sys.exit("run by `python -m outwake.worker`")


async def produce() -> None:
    settings = {"autocommit": True, "prepare_threshold": 1}
    if common.CLIENTS == 1:  # to give a connection back to a pool would be counted after the commit
        async with await psycopg.AsyncConnection.connect(common.URL, **settings) as one:
            await common.produce(lambda: enqueue(one, "bench.noop"))
        return
    async with AsyncConnectionPool(common.URL, kwargs=settings, min_size=common.CLIENTS, open=False) as pool:

        async def by_library() -> None:
            async with pool.connection() as conn:
                await enqueue(conn, "bench.noop")

        async def by_hand() -> None:
            async with pool.connection() as conn:
                cursor = await conn.execute(INSERT, ("bench.noop",))
                await cursor.fetchone()

        await common.produce(by_hand if "flood-plain" in sys.argv else by_library)


if __name__ == "__main__":
    common.main(setup, fill, work, produce)

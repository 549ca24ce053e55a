"""PgQueuer: one asyncpg connection and batches of 10 by default; a pool and batches of 500 at best."""

import asyncio

import asyncpg
import common
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries


async def setup() -> None:
    await Queries(AsyncpgDriver(await asyncpg.connect(common.URL))).install()


async def fill(count: int) -> None:
    queries = Queries(AsyncpgDriver(await asyncpg.connect(common.URL)))
    await queries.enqueue(["noop"] * count, [None] * count, [0] * count)


async def work(variant: str) -> None:
    if variant == "best":
        queuer = PgQueuer.from_asyncpg_pool(await asyncpg.create_pool(common.URL))
    else:
        queuer = PgQueuer.from_asyncpg_connection(await asyncpg.connect(common.URL))

    @queuer.entrypoint("noop")
    async def noop(job: object) -> None:
        common.mark()

    running = asyncio.create_task(queuer.run(batch_size=500 if variant == "best" else 10))
    await common.stopped()
    queuer.shutdown.set()
    await running


async def enqueue() -> None:
    pool = await asyncpg.create_pool(common.URL, min_size=common.CLIENTS, max_size=common.CLIENTS)
    queries = Queries(AsyncpgPoolDriver(pool))
    await common.produce(lambda: queries.enqueue("noop", None, 0))


if __name__ == "__main__":
    common.main(setup, fill, work, enqueue)

"""Oban for Python: a queue's limit of 10 by default, 200 at best; uvloop, as its command line."""

import asyncio

import common
import uvloop
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool

asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


@worker(queue="default")
class Noop:
    async def process(self, job: object) -> None:
        common.mark()


def pool() -> AsyncConnectionPool:
    return AsyncConnectionPool(common.URL, min_size=2, max_size=max(10, common.CLIENTS), open=False)


async def setup() -> None:
    async with pool() as connections:
        await install(connections)


async def fill(count: int) -> None:
    async with pool() as connections:
        oban = Oban(pool=connections)
        for start in range(0, count, 2000):
            await oban.enqueue_many(*[Noop.new({}) for _ in range(start, min(count, start + 2000))])


async def work(variant: str) -> None:
    limit = 200 if variant == "best" else 10
    async with pool() as connections, Oban(pool=connections, queues={"default": limit}):
        await common.stopped()


async def enqueue() -> None:
    async with pool() as connections:
        oban = Oban(pool=connections)
        await common.produce(lambda: oban.enqueue(Noop.new({})))


if __name__ == "__main__":
    common.main(setup, fill, work, enqueue)

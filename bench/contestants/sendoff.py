"""Sendoff: the worker command as it is, its handler found through an entry point (bench/contestants.py)."""

import sys

import common
import psycopg

from outbox import Handler, Job, enqueue
from outbox.migrate import migrate


async def noop(job: Job) -> None:
    common.mark()


handler = Handler("bench.noop", noop)


async def setup() -> None:
    await migrate(common.URL)


async def fill(count: int) -> None:
    with psycopg.connect(common.URL, autocommit=True) as conn:
        conn.execute("INSERT INTO outbox (topic) SELECT 'bench.noop' FROM generate_series(1, %s)", (count,))


async def work(variant: str) -> None:
    sys.exit("run by `python -m worker`")


async def produce() -> None:
    conn = await psycopg.AsyncConnection.connect(common.URL, autocommit=True)
    await common.produce(lambda: enqueue(conn, "bench.noop"))


if __name__ == "__main__":
    common.main(setup, fill, work, produce)

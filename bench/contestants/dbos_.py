"""DBOS: polls its queue every second by default; every 20 ms, 100 at once and 20 connections at best."""

import os

import common
from dbos import DBOS, DBOSClient

VARIANT = os.environ.get("BENCH_VARIANT", "default")
BEST = {"polling_interval_sec": 0.02, "worker_concurrency": 100} if VARIANT == "best" else {}


@DBOS.workflow(name="noop")
def noop() -> None:
    common.mark()


async def launch() -> None:
    DBOS(
        config={
            "name": "bench",
            "system_database_url": common.URL,
            "sys_db_pool_size": 20,
            "run_admin_server": False,
            "log_level": "WARNING",
        }
    )
    DBOS.launch()
    await DBOS.register_queue_async("bench", **BEST)


async def setup() -> None:
    await launch()
    DBOS.destroy()


def client() -> DBOSClient:
    return DBOSClient(system_database_url=common.URL)


async def fill(count: int) -> None:
    to = client()
    for _ in range(count):
        to.enqueue({"queue_name": "bench", "workflow_name": "noop"})


async def work(variant: str) -> None:
    await launch()
    await common.stopped()
    DBOS.destroy()


async def enqueue() -> None:
    to = client()
    await common.produce(lambda: to.enqueue_async({"queue_name": "bench", "workflow_name": "noop"}))


if __name__ == "__main__":
    common.main(setup, fill, work, enqueue)

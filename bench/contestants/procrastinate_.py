"""procrastinate: concurrency 1 by default; 5 is the best of 1 to 50."""

import common
import procrastinate

SIZE = max(7, common.CLIENTS)
app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=common.URL, min_size=4, max_size=SIZE)
)


@app.task(name="noop")
async def noop() -> None:
    common.mark()


async def setup() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def fill(count: int) -> None:
    async with app.open_async():
        await noop.batch_defer_async(*[{} for _ in range(count)])


async def work(variant: str) -> None:
    async with app.open_async():
        await app.run_worker_async(concurrency=5 if variant == "best" else 1)


async def enqueue() -> None:
    async with app.open_async():
        await common.produce(noop.defer_async)


if __name__ == "__main__":
    common.main(setup, fill, work, enqueue)

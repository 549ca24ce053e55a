"""An observer of an event loop: how long it is kept from its next turn."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

STEP = 0.005  # seconds


@dataclass
class Lag:
    """What was seen. `longest` is in seconds of the machine, which others use too; `turns` counts."""

    turns: int = 0
    longest: float = 0.0


@asynccontextmanager
async def watching_lag() -> AsyncIterator[Lag]:
    """Measure until the block ends."""
    lag = Lag()

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(STEP)
            lag.turns += 1
            lag.longest = max(lag.longest, time.monotonic() - before - STEP)

    task = asyncio.create_task(watch())
    try:
        yield lag
    finally:
        task.cancel()

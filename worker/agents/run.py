"""An agent: a guarded process that prints JSON lines.

The lines are collected into batches, so that each batch is one write to the database. The first line after a
silence is a batch by itself. After that, a batch ends when BATCH_SECONDS, BATCH_BYTES or BATCH_EVENTS is
reached.
"""

import time
from collections.abc import AsyncIterator

from outwake.worker.agents.stream import LINE_LIMIT, Event, Splitter
from outwake.worker.process.guarded import Guarded

BATCH_SECONDS = 0.2
BATCH_BYTES = 256 * 1024
BATCH_EVENTS = 500


class Agent(Guarded):
    """A running agent:

    async with Agent.start(argv, cwd=…, env=…, deadline=…) as agent:
        async for batch in agent.lines():
            ...
        result = await agent.wait()
    """

    async def lines(self, limit: int = LINE_LIMIT) -> AsyncIterator[list[Event]]:
        """The agent's output, in batches, to its end. May be called once.

        Nothing is read while the caller holds a batch, so a slow caller slows the agent down. A line
        longer than `limit` bytes becomes an event of type `truncated`.
        """
        splitter = Splitter(limit)
        batch: list[Event] = []
        size = 0
        due = 0.0  # when the batch may be yielded, on the monotonic clock
        while True:
            chunk = await self.read(max(due - time.monotonic(), 0) if batch else None)
            if chunk:
                size += len(chunk)
                for event in splitter.feed(chunk):
                    batch.append(event)
                    if len(batch) == BATCH_EVENTS:
                        yield batch
                        batch, size, due = [], 0, time.monotonic() + BATCH_SECONDS
            elif chunk == b"":
                break
            if batch and (size >= BATCH_BYTES or time.monotonic() >= due):
                yield batch
                batch, size, due = [], 0, time.monotonic() + BATCH_SECONDS
        batch.extend(splitter.finish())
        if batch:
            yield batch

"""An agent: a guarded process that prints JSON lines.

The lines come in batches, one write to the database each. The first line after a silence comes at
once; while more come, a batch is what 0.2 s bring, or 256 KiB, or 500 events.
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
        """What the agent prints, in batches, to the end of its output. May be called once.

        Nothing is read while the caller holds a batch: a slow caller slows the agent down. A line
        longer than `limit` bytes comes as an event of type `truncated`.
        """
        splitter = Splitter(limit)
        batch: list[Event] = []
        size = 0
        due = 0.0  # when the batch may be handed out, by the monotonic clock
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

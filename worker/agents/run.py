"""An agent: a guarded process that prints JSON lines.

The lines are collected into batches, so that each batch is one write to the database. The first line after a
silence is a batch by itself. After that, a batch ends when BATCH_SECONDS, BATCH_BYTES or BATCH_LINES is
reached.

A line may take longer to parse than a lease allows the event loop to stand still. So a batch of more than
INLINE_BYTES is digested in a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from outwake.worker.agents.base import AgentLine
from outwake.worker.agents.stream import LINE_LIMIT, RawLine, Splitter, stored
from outwake.worker.process.guarded import Guarded

T = TypeVar("T")

BATCH_SECONDS = 0.2
BATCH_BYTES = 256 * 1024
BATCH_LINES = 500
INLINE_BYTES = 8 * 1024  # well below a millisecond


class Agent(Guarded):
    """A running agent:

    async with Agent.start(argv, cwd=…, env=…, deadline=…) as agent:
        async for batch in agent.lines():
            ...
        result = await agent.wait()
    """

    async def lines(self, limit: int = LINE_LIMIT) -> AsyncIterator[list[AgentLine]]:
        """The agent's output as it is stored, in batches, to its end."""
        async for batch in self.batches(stored_lines, limit):
            yield batch

    async def batches(
        self, digest: Callable[[Sequence[RawLine]], T], limit: int = LINE_LIMIT
    ) -> AsyncIterator[T]:
        """What `digest` makes of each batch of output, to the output's end. May be called once.

        Nothing is read while the caller holds a batch, so a slow caller slows the agent down. Of a line
        longer than `limit` bytes only the beginning is kept.
        """
        splitter = Splitter(limit)
        batch: list[RawLine] = []
        size = 0
        due = 0.0  # when the batch may be yielded, on the monotonic clock
        while True:
            chunk = await self.read(max(due - time.monotonic(), 0) if batch else None)
            if chunk:
                for line in splitter.feed(chunk):
                    batch.append(line)
                    size += len(line.head)
                    if len(batch) == BATCH_LINES or size >= BATCH_BYTES:
                        yield await _digested(digest, batch)
                        batch, size, due = [], 0, time.monotonic() + BATCH_SECONDS
            elif chunk == b"":
                break
            if batch and time.monotonic() >= due:
                yield await _digested(digest, batch)
                batch, size, due = [], 0, time.monotonic() + BATCH_SECONDS
        batch.extend(splitter.finish())
        if batch:
            yield await _digested(digest, batch)


def stored_lines(batch: Sequence[RawLine]) -> list[AgentLine]:
    return [line for line in map(stored, batch) if line is not None]


async def _digested(digest: Callable[[Sequence[RawLine]], T], batch: Sequence[RawLine]) -> T:
    if sum(len(line.head) for line in batch) <= INLINE_BYTES:
        return digest(batch)
    return await asyncio.to_thread(digest, batch)

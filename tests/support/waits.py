"""Waits of tests. One that fails says what it waited for and what it last saw.

async with awaiting("the worker to leave", seen=lambda: worker.stage):
    await worker.task
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

TIMEOUT = 60.0  # seconds; only bounds a test that hangs

Seen = Callable[[], object | Awaitable[object]]
"""Says what there is to see, if the wait fails; it may be a coroutine function."""


class NotSeenError(AssertionError):
    """What the test waited for did not come."""


@asynccontextmanager
async def awaiting(what: str, *, seen: Seen | None = None, timeout: float = TIMEOUT) -> AsyncIterator[None]:
    """Raise NotSeenError when the block takes longer than `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise  # the block's own
        raise NotSeenError(
            f"waited {timeout:g} s for {what}" + ("" if seen is None else f"; {await _look(seen)}")
        ) from None


async def eventually(what: str, condition: Callable[[], bool], *, seen: Seen | None = None) -> None:
    """Return when the condition holds: for states of this process that nothing announces."""
    async with awaiting(what, seen=seen):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def _look(seen: Seen) -> str:
    """What there is to see. That it cannot be seen must not hide what was waited for."""
    try:
        async with asyncio.timeout(5):
            state: Any = seen()
            if isinstance(state, Awaitable):
                state = await state
    except Exception as error:
        return f"what there is to see could not be read: {error!r}"
    return f"last seen: {state if isinstance(state, str) else repr(state)}"

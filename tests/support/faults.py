"""What a stand-in is told to do wrong, and when.

Every request to a stand-in meets `steps` twice: as `NAME` before it has any effect, and as `NAME done`
before it is answered. A test arms a fault for one of these meetings:

    fault = steps.arm("borrow done", Fault())      # blocks there
    await fault.reached()
    worker.kill()
    fault.release()                                # goes on, or with drop=True without the effect
"""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.support.waits import awaiting


class Dropped(Exception):
    """The request is to be forgotten: no effect, no answer."""


class Fault:
    """Blocks a request until `release`; then `answer`, if there is one, replaces the true answer.

    answer: (status, body). It is given at once unless `block`.
    """

    def __init__(self, answer: tuple[int, Any] | None = None, *, block: bool | None = None) -> None:
        self.answer = answer
        self.block = block if block is not None else answer is None
        self.where = "a fault that is not armed"
        self.steps: Steps | None = None
        self._reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._released: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def reached(self) -> None:
        """Wait until a request has met it."""
        async with awaiting(f"a request to meet {self.where}", seen=self._seen):
            await asyncio.shield(self._reached)

    def _seen(self) -> str:
        return f"met {self.steps.met[-20:]}" if self.steps else ""

    def release(self, *, drop: bool = False) -> None:
        """Let the request go on; with `drop` it is forgotten instead."""
        if not self._released.done():
            self._released.set_result(drop)

    async def meet(self) -> None:
        if not self._reached.done():
            self._reached.set_result(None)
        if self.block and await asyncio.shield(self._released):
            raise Dropped


class Steps:
    """The requests that stand-ins have met, in order, and the faults that lie in wait."""

    def __init__(self) -> None:
        self.met: list[str] = []
        self._armed: list[tuple[str, int, Fault]] = []
        self._news = asyncio.Condition()

    def arm(self, name: str, fault: Fault, *, nth: int = 1) -> Fault:
        """Let the nth meeting of that name from now on meet the fault."""
        self._armed.append((name, self.met.count(name) + nth, fault))
        fault.where, fault.steps = f"{name}, the {nth}th time from when it was armed", self
        return fault

    async def meet(self, name: str) -> tuple[int, Any] | None:
        """The answer to give instead of the true one. Raises Dropped."""
        self.met.append(name)
        await self.tell()
        for armed in self._armed:
            if armed[:2] == (name, self.met.count(name)):
                await armed[2].meet()
                return armed[2].answer
        return None

    async def tell(self) -> None:
        """Something has changed: those who wait for a condition look again."""
        async with self._news:
            self._news.notify_all()

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; looked at after every step."""
        async with awaiting(what, seen=lambda: f"met {self.met[-20:]}"), self._news:
            await self._news.wait_for(condition)

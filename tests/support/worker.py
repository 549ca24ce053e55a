"""Workers for tests: the real loop in this process, to be stopped between two steps, and the real command.

`watched` runs worker.loop.Worker as it is, on this test's event loop. It only says what it does: which
rows its handlers ran, what it heard, when it falls asleep and for how long. A test can `hold` it before
a step of the parking protocol and let it go on.

`command` runs the `worker` command in a process of its own, with the handlers of `HANDLERS`.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from outwake import Handler, Job
from outwake.handler import Run
from outwake.settings import Settings
from outwake.worker.engine.listen import CANCEL
from outwake.worker.engine.parking import Stage
from outwake.worker.engine.running import Outcome
from outwake.worker.engine.worker import Worker
from tests.support.process import ROOT, Process, running
from tests.support.steps import TIMEOUT, Connection


class Held:
    """A worker that stopped before a step."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def wait(self) -> None:
        """Return when the worker has come there."""
        async with asyncio.timeout(TIMEOUT):
            await self.reached.wait()

    def release(self) -> None:
        self.released.set()


class Watched(Worker):
    """The worker's loop, telling what it does."""

    def __init__(self, settings: Settings, handlers: Mapping[str, Handler], concurrency: int) -> None:
        super().__init__(settings, handlers, concurrency)
        self.ran: list[int] = []
        self.looks = 0
        """How often it has claimed."""
        self.renewals = 0
        self.waits: list[float] = []
        """For how many seconds it meant to sleep, each time."""
        self._news = asyncio.Condition()
        self._in_sleep = False
        self._marks: set[str] = set()
        self._holds: dict[str, Held] = {}
        self.task: asyncio.Task[None]

    def start(self) -> None:
        """Run until drained."""
        self.task = asyncio.create_task(self.run())
        self.task.add_done_callback(lambda task: self._tell_soon())

    # What a test does.

    def hold(self, step: str) -> Held:
        """Stop before a step, when next it comes there: `connect`, `claim`, `writers`, `schedule`, or
        `sleep`, once it is parked.
        """
        self._holds[step] = Held()
        return self._holds[step]

    async def asleep(self) -> float:
        """Return when it is parked and sleeps; for how many seconds, if nothing comes."""
        await self._until(self._sleeps)
        return self._timer()

    async def asleep_for(self, seconds: float) -> None:
        """Return when it is parked and sleeps for that long at least, if nothing comes."""
        await self._until(lambda: self._sleeps() and self._timer() >= seconds)

    async def parks(self) -> None:
        """Return when its flag is up and it waits, whether still for writers or not."""
        await self._until(lambda: self._in_sleep and self._parking.stage is not Stage.AWAKE)

    async def has_run(self, row_id: int) -> None:
        """Return when a handler has been started for the row."""
        await self._until(lambda: row_id in self.ran)

    async def looked(self, times: int) -> None:
        """Return when it has claimed so often."""
        await self._until(lambda: self.looks >= times)

    async def renewed(self, times: int) -> None:
        """Return when it has renewed its lease so often."""
        await self._until(lambda: self.renewals >= times)

    async def hears_nothing_more(self, conn: Connection) -> None:
        """Return when it has heard every notification that was sent before: they come in order."""
        mark = str(-secrets.randbelow(2**40) - 1)
        await conn.execute("SELECT pg_notify(%s, %s)", (CANCEL, mark))
        await self._until(lambda: mark in self._marks)

    async def sleeps_for_ever(self, conn: Connection) -> bool:
        """Whether nothing that has happened so far will ever wake it."""
        await self.hears_nothing_more(conn)
        return self._sleeps() and self._timer() == math.inf

    # What it does.

    async def _while_connected(self) -> None:
        await self._step("connect")
        await super()._while_connected()

    async def _writers(self) -> list[str]:
        await self._step("writers")
        return await super()._writers()

    async def _claim(self, completed: list[Outcome], wants: int, stay_parked: bool) -> int:
        await self._step("claim")
        count = await super()._claim(completed, wants, stay_parked)
        self.looks += 1
        await self._tell()
        return count

    async def _schedule(self) -> None:
        await self._step("schedule")
        await super()._schedule()

    async def _renew(self) -> None:
        await super()._renew()
        self.renewals += 1
        await self._tell()

    async def _sleep(self) -> None:
        if self._parking.stage is Stage.PARKED:
            await self._step("sleep")
        self._in_sleep = True
        self.waits.append(self._timer())
        await self._tell()
        await super()._sleep()
        self._in_sleep = False

    def _heard(self, channel: str, payload: str) -> None:
        super()._heard(channel, payload)
        self._marks.add(payload)
        self._tell_soon()

    def note(self, job: Job) -> None:
        """A handler began."""
        self.ran.append(job.row.id)
        self._tell_soon()

    def release_all(self) -> None:
        for held in self._holds.values():
            held.release()

    async def _step(self, name: str) -> None:
        held = self._holds.get(name)
        if held is not None and not held.released.is_set():
            held.reached.set()
            await held.released.wait()

    def _sleeps(self) -> bool:
        return self._in_sleep and self._parking.stage is Stage.PARKED and not self._event.is_set()

    def _timer(self) -> float:
        until = min(self._look_at, self._rescue_at, self._probe_at, self._standby.ask_at)
        if self._running:
            until = min(until, self._lease.renew_at)
        return until - time.monotonic()

    def _tell_soon(self) -> None:
        self._later = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT), self._news:
            await self._news.wait_for(lambda: condition() or self.task.done())
        if self.task.done():
            self.task.result()
            assert condition(), "the worker has ended"


async def nothing(job: Job) -> None:
    """A handler with nothing to do."""


async def hang(job: Job) -> None:
    """A handler that ends only when it is stopped."""
    await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def watched(
    database: str,
    *topics: str,
    run: Run = nothing,
    concurrency: int = 2,
    kind: type[Watched] = Watched,
    started: bool = True,
    **settings: Any,
) -> AsyncIterator[Watched]:
    """A worker in this process, drained when the block ends. `settings` as in outbox.settings."""
    values: dict[str, Any] = {"database_url": database, "lease": 600.0, "drain_grace": 0.0, **settings}

    async def noting(job: Job) -> None:
        worker.note(job)
        result = run(job)
        assert result is not None
        await result

    handlers = {topic: Handler(topic, noting) for topic in topics or ("t",)}
    worker = kind(Settings(**values), handlers, concurrency)
    worker.start()
    try:
        if started:
            await worker.asleep()
        yield worker
    finally:
        worker.release_all()
        worker.drain()
        worker.drain()
        try:
            async with asyncio.timeout(TIMEOUT):
                await worker.task
        finally:
            worker.task.cancel()


HANDLERS = '''
import asyncio, time
from outwake import Handler, HandBack, Job, Permanent, Retry

async def noop(job):
    pass

async def hang(job):
    """Ends only when it is stopped."""
    await asyncio.get_running_loop().create_future()

async def wait(job):
    """Ends when the test gives up the advisory lock (2, payload.lock)."""
    async with job.connection() as conn:
        await conn.execute("SELECT pg_advisory_lock_shared(2, %s)", (job.payload["lock"],))
        await conn.execute("SELECT pg_advisory_unlock_shared(2, %s)", (job.payload["lock"],))

async def effect(job):
    """One fenced effect, in one commit with its end."""
    async with job.transaction() as conn:
        await conn.execute("INSERT INTO effect (row_id, attempt) VALUES (%s, %s)", job.token)
        await job.complete(conn)

async def poison(job):
    """Kills its worker."""
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

async def flaky(job):
    """Fails so often as payload.times says."""
    if job.row.failures < job.payload["times"]:
        raise Retry("not yet")

noop, hang, wait, effect, poison, flaky = [
    Handler(run.__name__, run) for run in (noop, hang, wait, effect, poison, flaky)]
'''


def install(directory: Path, source: str = HANDLERS, name: str = "test_handlers") -> Path:
    """Write a package of handlers, one entry point for each Handler it makes."""
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(source)
    topics = [word.strip() for word in source.rstrip().rsplit("\n", 2)[-2].split("=")[0].split(",")]
    info = directory / f"{name}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = [f"{topic} = {name}:{topic}" for topic in topics]
    (info / "entry_points.txt").write_text("[outwake.handlers]\n" + "\n".join(lines) + "\n")
    return directory


def command(
    database: str, handlers: Path, *arguments: str, lease: float = 6.0, **env: str
) -> AbstractAsyncContextManager[Process]:
    """The `worker` command, logging every event."""
    return running(
        "worker",
        *arguments,
        env={
            "DATABASE_URL": database,
            "PYTHONPATH": f"{ROOT}:{handlers}",
            "OUTWAKE_LEASE": str(lease),
            "OUTWAKE_DRAIN_GRACE": "0",
            "OUTWAKE_LOG_LEVEL": "debug",
            **env,
        },
    )

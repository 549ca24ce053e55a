"""Workers for tests: a worker in this process, which a test can hold before a step, and the real command.

`watched` runs outwake.worker.engine.worker.Worker as it is, on this test's event loop, with an observer
(outwake/worker/engine/observer.py). It tells which rows its handlers ran, what it heard, when it falls asleep
and for how long. A test can `hold` it before a step and let it go on.

`command` runs the `worker` command in a process of its own, with the handlers of `HANDLERS`.
"""

import asyncio
import inspect
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from outwake import Handler, Job
from outwake.handler import Run
from outwake.settings import Settings
from outwake.worker.engine.listen import CANCEL
from outwake.worker.engine.observer import Step, WorkerObserver
from outwake.worker.engine.parking import Stage
from outwake.worker.engine.parts import Parts
from outwake.worker.engine.worker import Worker
from tests.support.process import ROOT, Process, running
from tests.support.steps import Connection
from tests.support.waits import awaiting


class Held:
    """A worker that stopped before a step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def wait(self) -> None:
        """Return when the worker has come there."""
        async with awaiting(f"the worker to come to the step {self.step!r}"):
            await self.reached.wait()

    def release(self) -> None:
        """Let it go on."""
        self.released.set()


class Notes(WorkerObserver):
    """What a worker was seen to do. `news` is set with each of it."""

    def __init__(self) -> None:
        self.scans = 0
        self.renewals = 0
        self.asks: list[int] = []
        """The rows that it tried to claim by their ids."""
        self.waits: list[float] = []
        """For how many seconds it meant to sleep, each time."""
        self.payloads: list[str] = []
        """What it heard."""
        self.until = math.inf
        self.news = asyncio.Event()
        self.holds: dict[Step, Held] = {}

    async def step(self, step: Step) -> None:
        held = self.holds.get(step)
        if held is not None and not held.released.is_set():
            held.reached.set()
            await held.released.wait()

    def scanned(self) -> None:
        self.scans += 1
        self.news.set()

    def asked(self, row_id: int) -> None:
        self.asks.append(row_id)

    def renewed(self) -> None:
        self.renewals += 1
        self.news.set()

    def heard(self, channel: str, payload: str) -> None:
        self.payloads.append(payload)
        self.news.set()

    def sleeps(self, until: float) -> None:
        self.until = until
        self.waits.append(until - time.monotonic())
        self.news.set()


class ObservedWorker:
    """A worker in this process, and what it was seen to do."""

    def __init__(self, settings: Settings, topics: tuple[str, ...], run: Run, concurrency: int) -> None:
        handlers = {topic: Handler(topic, self._noting(run)) for topic in topics}
        self.seen = Notes()
        self.worker = Worker(settings, handlers, concurrency, self.seen)
        self.ran: list[int] = []
        """The rows whose handlers were started."""
        self.task: asyncio.Task[None]

    def start(self) -> None:
        """Run until drained."""
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(self.worker.run())
        self.task.add_done_callback(lambda task: self.seen.news.set())

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        return self.worker.parts

    @property
    def id(self) -> UUID | None:
        return self.worker.id

    @property
    def presence(self) -> int:
        """Of its LISTEN connection."""
        return self.worker.inbox.presence

    @property
    def draining(self) -> bool:
        return self.worker.draining

    def readiness(self) -> dict[str, Any]:
        return self.worker.readiness()

    def drain(self) -> None:
        self.worker.drain()

    @property
    def scans(self) -> int:
        """How often it has scanned."""
        return self.seen.scans

    @property
    def renewals(self) -> int:
        """How often it has renewed its lease."""
        return self.seen.renewals

    @property
    def stage(self) -> Stage:
        """How far it is on its way to sleep."""
        return self.parts.parking.stage

    def hold(self, step: Step) -> Held:
        """Stop before a step, when next it comes there."""
        self.seen.holds[step] = Held(step)
        return self.seen.holds[step]

    def release_all(self) -> None:
        """Let it go on, wherever it is held."""
        for held in self.seen.holds.values():
            held.release()

    async def asleep(self) -> float:
        """Return when it is parked and sleeps; for how many seconds, if nothing comes."""
        await self._until("is parked and sleeps", self._sleeps)
        return self._timer()

    async def asleep_for(self, seconds: float) -> None:
        """Return when it is parked and sleeps for that long at least, if nothing comes."""
        await self._until(
            f"is parked and sleeps for {seconds:g} s", lambda: self._sleeps() and self._timer() >= seconds
        )

    async def parks(self) -> None:
        """Return when its flag is set and it sleeps, whether it still waits for writers or not."""
        await self._until(
            "has set its flag and sleeps",
            lambda: self.parts.wakes.sleeping and self.stage is not Stage.AWAKE,
        )

    async def rests(self) -> float:
        """Return when it sleeps, parked or not; for how many seconds, if nothing comes."""
        await self._until("sleeps", lambda: self.parts.wakes.sleeping)
        return self._timer()

    async def has_run(self, row_id: int) -> None:
        """Return when a handler has been started for the row."""
        await self._until(f"runs row {row_id}", lambda: row_id in self.ran)

    async def scanned(self, times: int) -> None:
        """Return when it has scanned so often."""
        await self._until(f"has scanned {times} times", lambda: self.scans >= times)

    async def renewed(self, times: int) -> None:
        """Return when it has renewed its lease so often."""
        await self._until(f"has renewed its lease {times} times", lambda: self.renewals >= times)

    async def hears_nothing_more(self, conn: Connection) -> None:
        """Return when it has heard every notification that was sent before: they come in order."""
        mark = str(-secrets.randbelow(2**40) - 1)
        await conn.execute("SELECT pg_notify(%s, %s)", (CANCEL, mark))
        await self._until("has heard all that was sent", lambda: mark in self.seen.payloads)

    async def sleeps_for_ever(self, conn: Connection) -> bool:
        """Whether nothing that has happened so far will ever wake it."""
        await self.hears_nothing_more(conn)
        return self._sleeps() and self._timer() == math.inf

    def _sleeps(self) -> bool:
        return self.parts.wakes.sleeping and self.stage is Stage.PARKED

    def _timer(self) -> float:
        return self.seen.until - time.monotonic()

    def _noting(self, run: Run) -> Run:
        """The same handler, noting its rows first."""
        if not inspect.iscoroutinefunction(run):

            def blocks(job: Job) -> object:
                self._loop.call_soon_threadsafe(self._note, job)
                return run(job)

            return blocks

        async def runs(job: Job) -> object:
            self._note(job)
            return await run(job)

        return runs

    def _note(self, job: Job) -> None:
        self.ran.append(job.row.id)
        self.seen.news.set()

    async def _until(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait until it has happened. Fails if the worker ends before that."""
        async with awaiting(f"a worker that {what}", seen=self.seems):
            while not happened() and not self.task.done():
                self.seen.news.clear()
                await self.seen.news.wait()
        if self.task.done():
            self.task.result()
            assert happened(), f"the worker ended before it {what}: {self.seems()}"

    def seems(self) -> str:
        """What it does now, and has done."""
        return (
            f"it is {self.stage.value}, {'sleeps' if self.parts.wakes.sleeping else 'works'},"
            f" its next deadline is in {self._timer():.3f} s, it runs {sorted(self.parts.running.attempts)},"
            f" has started {self.ran[-20:]}, has scanned {self.scans} and renewed {self.renewals} times,"
            f" and last heard {self.seen.payloads[-10:]}"
        )


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
    started: bool = True,
    **settings: Any,
) -> AsyncIterator[ObservedWorker]:
    """A worker in this process, drained when the block ends. `settings` as in outwake.settings."""
    values: dict[str, Any] = {"database_url": database, "lease": 600.0, "drain_grace": 0.0, **settings}
    worker = ObservedWorker(Settings(**values), topics or ("t",), run, concurrency)
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
            async with awaiting("the worker to leave", seen=worker.seems):
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

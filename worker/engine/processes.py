"""`worker --processes N`: one parent runs N worker processes, and sees at once when one dies.

1. Each child holds one end of a socket pair. It sends its worker id on it, each time it has a new one, and
   whether it is connected. When the parent asks, the child sends its counters. A child drains when
   its parent's end closes: no orphan goes on alone.
2. A child that dies without a drain (out of memory, a crash, SIGKILL) is known to be dead, not only silent.
   So the parent ends the child's life in the database at once (outbox_end_worker), and its rows need not wait
   for the end of the lease. If the parent cannot reach the database, the lease ends it.
3. The parent replaces a dead child, with a backoff that grows while children die young. A child that ended
   with status 2 is not replaced: a setting, the schema or a right does not let it run, and it has said which.
   Then all children end.
4. The parent passes SIGTERM and SIGINT on, and ends when the last child has ended.
"""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from outwake.connect import connect, deadline
from outwake.schema import in_schema
from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.worker.engine.metrics import Snapshot, merge, without_gauges

log = get_logger(__name__)

_END_WORKER = in_schema("SELECT :schema.outbox_end_worker(%s, %s)")

_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 30.0
_ANSWER = 1.0
_LINE = 2**20
_REFUSED = 2
"""The exit status of a child that cannot run before an operator has changed something."""
_YOUNG = 60.0
"""A child that lived for longer than this many seconds is replaced with the first delay again."""


class Parent:
    """Runs `count` children, each started by `sys.executable -m outwake.worker` with `arguments`."""

    def __init__(self, settings: Settings, count: int, arguments: list[str]) -> None:
        self._settings = settings
        self._arguments = arguments
        self._count = count
        self._children: dict[int, Child] = {}
        self._ending = asyncio.Event()
        self._dead: Snapshot = {}
        self._status = 0

    async def run(self) -> int:
        """Run until every child has ended after `drain`, or one was refused. Returns the exit status."""
        await asyncio.gather(*(self._keep(place) for place in range(self._count)))
        return self._status

    def drain(self) -> None:
        """Pass a signal on: each call sends SIGTERM to each child."""
        self._ending.set()
        for child in self._children.values():
            child.terminate()

    def readiness(self) -> dict[str, Any]:
        """The parent is ready when every child is."""
        ready = [child.connected for child in self._children.values()]
        return {"ready": len(ready) == self._count and all(ready), "processes": len(ready)}

    async def snapshot(self) -> Snapshot:
        """The sum of all children's counters, including those of dead children."""
        alive = await asyncio.gather(*(child.snapshot() for child in self._children.values()))
        return merge([self._dead, *alive])

    async def _keep(self, place: int) -> None:
        delay = _BACKOFF_FIRST
        while not self._ending.is_set():
            born = time.monotonic()
            child = await Child.start(self._arguments)
            self._children[place] = child
            if self._ending.is_set():  # the signal came while the child was started
                child.terminate()
            status = await child.ended()
            del self._children[place]
            self._dead = merge([self._dead, without_gauges(child.counted)])
            if status == 0 and self._ending.is_set():
                return
            log.error("child_died", pid=child.pid, status=status, worker_id=str(child.worker_id))
            if child.worker_id is not None:
                await self._end_life(child.worker_id, status)
            if status == _REFUSED and not self._ending.is_set():
                self._status = status
                self.drain()
                return
            delay = _BACKOFF_FIRST if time.monotonic() - born > _YOUNG else delay
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._ending.wait()
            delay = min(delay * 2, _BACKOFF_LAST)

    async def _end_life(self, worker_id: UUID, status: int) -> None:
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        lease = timedelta(seconds=self._settings.lease)
        try:
            conn = await connect(
                self._settings.database_url, "outwake parent", lease, pooled=self._settings.pooled
            )
            async with conn:
                with deadline(conn, self._settings.lease):
                    await conn.execute(_END_WORKER, (worker_id, f"its worker died: {cause}"))
            log.warning("rescued", workers=1, worker_id=str(worker_id))
        except (psycopg.Error, OSError) as error:
            log.error("rescue_failed", error=str(error).strip(), worker_id=str(worker_id))


class Child:
    """One worker process and the parent's end of its socket pair."""

    def __init__(self, process: asyncio.subprocess.Process, news: asyncio.StreamReader) -> None:
        self.pid = process.pid
        self.worker_id: UUID | None = None
        self.connected = False
        self.counted: Snapshot = {}
        self._told: asyncio.Future[None] | None = None
        self._process = process
        self._news = news

    @classmethod
    async def start(cls, arguments: list[str]) -> "Child":
        """Start a worker process. It gets its end of the pair as a file descriptor."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "outwake.worker",
                *arguments,
                "--parent",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
            )
        news, writer = await asyncio.open_connection(sock=ours, limit=_LINE)
        child = cls(process, news)
        child._writer = writer  # kept open: its closing tells the child that we are gone
        return child

    _writer: asyncio.StreamWriter

    def terminate(self) -> None:
        """Send SIGTERM."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    async def snapshot(self) -> Snapshot:
        """The child's counters; the last known ones if it does not answer in time."""
        if self._told is None or self._told.done():
            self._told = asyncio.get_running_loop().create_future()
            self._writer.write(b"count\n")
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER):
                await asyncio.shield(self._told)
        return self.counted

    async def ended(self) -> int:
        """Read the child's news until it has ended. Returns its exit status, or minus the signal's number."""
        with suppress(OSError):
            async for line in self._news:
                word, _, value = line.decode().strip().partition(" ")
                if word == "id":
                    self.worker_id = UUID(value)
                elif word == "connected":
                    self.connected = value == "yes"
                elif word == "counted":
                    self.counted = json.loads(value)
                    if self._told is not None and not self._told.done():
                        self._told.set_result(None)
        status = await self._process.wait()
        self._writer.close()
        return status


class ParentLink:
    """A child's end of the pair: it tells the parent news, and notices when the parent is gone."""

    def __init__(self, writer: asyncio.StreamWriter, watch: asyncio.Task[None]) -> None:
        self._writer = writer
        self._watch = watch

    @classmethod
    async def open(
        cls, descriptor: int, parent_gone: Callable[[], None], snapshot: Callable[[], Awaitable[Snapshot]]
    ) -> "ParentLink":
        """Take over the file descriptor. `parent_gone` is called once."""
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))

        async def watch() -> None:
            with suppress(OSError):
                while await reader.readline():  # there is one question only
                    link.report("counted", json.dumps(await snapshot()))
            log.warning("parent_gone")
            parent_gone()

        link = cls(writer, asyncio.create_task(watch()))
        return link

    def report(self, word: str, value: str) -> None:
        """Send one line of news."""
        self._writer.write(f"{word} {value}\n".encode())

    def close(self) -> None:
        """Stop watching."""
        self._watch.cancel()
        self._writer.close()

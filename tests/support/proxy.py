"""A TCP proxy before Postgres that does to connections what networks do.

Each worker has a port of its own, so that a fault can hit one connection or all of one worker's.

    cut        both sides are reset
    delay      each piece waits, then goes on: the last also after its client has given up
    throttle   so many bytes a second
    swallow    bytes are read and dropped, in one or both directions, while both sockets stay open; so is
               an end of file. The stream is broken then: heal() resets the connection
    partition  new connections are refused (or accepted, and swallowed), the old ones are swallowed
"""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST


class Connection:
    """A client's connection and its own to the server."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.port = 0
        """Of its socket to the server: pg_stat_activity.client_port."""
        self.delay = 0.0
        self.rate = 0.0
        self.swallow_up = False
        self.swallow_down = False
        self._writers = [client]
        self._cut = asyncio.Event()

    @property
    def broken(self) -> bool:
        """Whether bytes of it may have been lost."""
        return self.swallow_up or self.swallow_down

    def cut(self) -> None:
        """Reset both sides."""
        self._cut.set()
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def run(self, client: asyncio.StreamReader, address: tuple[str, int]) -> None:
        """Pass bytes both ways until both sides have ended or it is cut."""
        up, upstream = await asyncio.open_connection(*address)
        self._writers.append(upstream)
        self.port = upstream.get_extra_info("sockname")[1]
        pumps = [
            asyncio.create_task(self._pump(client, upstream, upward=True)),
            asyncio.create_task(self._pump(up, self._writers[0], upward=False)),
        ]
        cut = asyncio.create_task(self._cut.wait())
        try:
            await cut  # a pump that ends cuts
        finally:
            for task in (*pumps, cut):
                task.cancel()
            await asyncio.gather(*pumps, cut, return_exceptions=True)
            self.cut()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        try:
            while piece := await reader.read(65536):
                if self._swallows(upward):
                    continue
                await self._hold(len(piece))
                if self._swallows(upward):  # it came while we waited
                    continue
                writer.write(piece)
                await writer.drain()
            if self._swallows(upward):
                await self._cut.wait()  # the other side is not told
            elif upward:
                # What the client sent last, before it gave up, is still carried out by the server.
                writer.write_eof()
                await self._cut.wait()
            else:
                writer.close()
                await writer.wait_closed()
        except OSError:
            pass
        self.cut()

    async def _hold(self, size: int) -> None:
        """Wait as delay and rate say, but not longer than they say so."""
        begun = time.monotonic()
        while True:
            until = begun + self.delay + (size / self.rate if self.rate else 0.0)
            if (left := until - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, 0.1))  # it may be healed meanwhile

    def _swallows(self, upward: bool) -> bool:
        return self.swallow_up if upward else self.swallow_down


class Proxy:
    """One port. `name` says whose."""

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.name = name
        self.port = 0
        self.connections: list[Connection] = []
        self.swallow_new = False
        self._address = address
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen; again on the same port after refuse()."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Refuse new connections, as a host does whose server is down."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def heal(self) -> None:
        """All is well again. A connection that lost bytes is reset: its stream can't go on."""
        self.swallow_new = False
        for connection in list(self.connections):
            connection.delay = connection.rate = 0.0
            if connection.broken:
                connection.cut()
        await self.open()

    async def close(self) -> None:
        """End all."""
        self.refuse()
        for connection in list(self.connections):
            connection.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        connection.swallow_up = connection.swallow_down = self.swallow_new
        self.connections.append(connection)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await connection.run(reader, self._address)
        except OSError:
            connection.cut()  # the server is down
        finally:
            self.connections.remove(connection)
            self._tasks.discard(task)


def on(url: str, host: str, port: int) -> str:
    """The same database, by another way."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}:{port}" if user else f"{host}:{port}"))


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 5432


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy("test", address(url))
    await proxy.open()
    try:
        yield proxy, on(url, "127.0.0.1", proxy.port)
    finally:
        await proxy.close()

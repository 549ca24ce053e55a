"""The proxy must do what the faults say; else a chaos run proves less than it claims."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.proxy import Proxy
from tests.support.waits import awaiting


class Echo:
    """Sends back what it gets."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = asyncio.Event()
        self.got = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(100):
                self.heard += piece
                self.got.set()
                writer.write(piece)
        except ConnectionError:
            pass
        writer.close()
        self.ended.set()


@asynccontextmanager
async def through() -> AsyncIterator[tuple[Echo, Proxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    echo = Echo()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy("p", server.sockets[0].getsockname()[:2])
    await proxy.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    async with awaiting("the end of the test", seen=lambda: f"the echo heard {echo.heard!r}"):
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        yield echo, proxy, reader, writer
    writer.transport.abort()
    await proxy.close()
    server.close()


async def test_cut_resets_both_sides() -> None:
    async with through() as (echo, proxy, reader, _):
        proxy.connections[0].cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await echo.ended.wait()


@pytest.mark.parametrize("side", ["up", "down"])
async def test_swallowed_bytes_never_come_and_nobody_is_told(side: str) -> None:
    async with through() as (echo, proxy, reader, writer):
        connection = proxy.connections[0]
        connection.swallow_up, connection.swallow_down = side == "up", side == "down"
        echo.got.clear()
        writer.write(b"lost")
        waiting = asyncio.ensure_future(reader.read(1))
        if side == "down":
            await echo.got.wait()
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        assert (b"lost" in echo.heard) == (side == "down")
        assert not echo.ended.is_set()
        await proxy.heal()  # what is broken is reset
        with pytest.raises(ConnectionResetError):
            await waiting
        await echo.ended.wait()


async def test_end_of_a_client_is_swallowed_too() -> None:
    """The server goes on believing in it: its session and its locks stay."""
    async with through() as (echo, proxy, _, writer):
        proxy.connections[0].swallow_up = proxy.connections[0].swallow_down = True
        writer.close()
        await asyncio.wait([asyncio.ensure_future(echo.ended.wait())], timeout=0.1)
        assert not echo.ended.is_set()
        await proxy.heal()
        await echo.ended.wait()


async def test_delay_keeps_the_order() -> None:
    async with through() as (_, proxy, reader, writer):
        proxy.connections[0].delay = 0.02
        for number in range(5):
            writer.write(bytes([number]))
            await writer.drain()
        assert await reader.readexactly(5) == bytes(range(5))


async def test_delayed_bytes_arrive_after_their_client_has_gone() -> None:
    """As a statement does whose client gave up: the server carries it out."""
    async with through() as (echo, proxy, _, writer):
        proxy.connections[0].delay = 0.2
        writer.write(b"late")
        writer.close()
        await echo.ended.wait()
        assert echo.heard.endswith(b"late")


async def test_delay_ends_with_its_fault() -> None:
    async with through() as (_, proxy, reader, writer):
        proxy.connections[0].rate = 0.001
        writer.write(b"x")
        waiting = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        await proxy.heal()
        assert await waiting == b"x"


async def test_refused_and_opened_again_on_its_port() -> None:
    async with through() as (_, proxy, _, _):
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.heal()
        assert proxy.port == port
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()


async def test_new_connections_can_be_swallowed() -> None:
    async with through() as (echo, proxy, _, _):
        proxy.swallow_new = True
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"anybody?")
        waiting = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        assert b"anybody?" not in echo.heard
        writer.transport.abort()
        await asyncio.wait([waiting])

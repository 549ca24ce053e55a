"""A small HTTP server on loopback that keeps what is posted to it: a webhook, an OTLP collector."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.waits import TIMEOUT, awaiting


@dataclass
class Post:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    port: int = 0
    posts: list[Post] = field(default_factory=list)
    status: int = 200
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until(self, what: str, condition: Callable[[list[Post]], bool]) -> None:
        """Return when what has come satisfies the condition."""
        async with awaiting(what, seen=lambda: self.posts, timeout=TIMEOUT * 4), self._news:
            await self._news.wait_for(lambda: condition(self.posts))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readline()).decode()
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        writer.write(
            f"HTTP/1.1 {self.status} Answer\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        await writer.drain()
        writer.close()
        async with self._news:
            self.posts.append(Post(request.split()[1], headers, body))
            self._news.notify_all()


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made._answer, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made

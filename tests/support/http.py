"""Any ASGI application on loopback, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from outwake.app.main import bind
from tests.support.waits import awaiting


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    """Serve until the block ends; gives the URL, without a slash at its end."""
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        task = asyncio.create_task(server._serve([listener]))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            async with awaiting("the server to stop", seen=lambda: list(map(str, asyncio.all_tasks()))):
                await task


@dataclass
class Received:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Keeps what is posted to it and answers as told: a status, or a response."""

    answers: list[Response] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        self.received.append(Received(request.url.path, dict(request.headers), body))
        answer = self.answers.pop(0) if self.answers else Response(status_code=204)
        await answer(scope, receive, send)

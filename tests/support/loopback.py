"""Serve a Starlette application on a free port of loopback, in the test's own event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tests.support.faults import Dropped, Steps

Answer = tuple[int, Any]


class Loopback:
    """A server for all stand-ins of a test; starting and stopping one takes uvicorn 0.2 s."""

    def __init__(self, url: str, app: Starlette) -> None:
        self._url = url
        self._app = app

    def add(self, name: str, routes: list[Route]) -> str:
        """Serve these under a path of their own; the URL of it."""
        self._app.routes.append(Mount(f"/{name}", routes=routes))
        return f"{self._url}/{name}"


@asynccontextmanager
async def loopback() -> AsyncIterator[Loopback]:
    """A server that runs until the block ends. What still hangs then is cut off."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = Starlette()
    config = uvicorn.Config(
        app,
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=1,
        date_header=False,  # a stand-in may say a date of its own
        # On a slow machine uvicorn's 5 s pass between two requests of the CLI. One that takes up a connection
        # as it is closed loses its request, and the CLI then waits for its MCP server for ever.
        timeout_keep_alive=3600,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listening]))
    host, port = listening.getsockname()[:2]
    try:
        yield Loopback(f"http://{host}:{port}", app)
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


def route(
    steps: Steps, name: str, path: str, method: str, effect: Callable[[Request], Awaitable[Answer]]
) -> Route:
    """A route whose requests meet `steps` before their effect and before their answer."""

    async def endpoint(request: Request) -> Response:
        try:
            status, body = await steps.meet(name) or await effect(request)
            status, body = await steps.meet(f"{name} done") or (status, body)
        except Dropped:
            return await forgotten(request)
        return JSONResponse(body, status)

    return Route(path, endpoint, methods=[method])


async def forgotten(request: Request) -> Response:
    """No answer: wait until the client is gone, or gives up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response(status_code=499)

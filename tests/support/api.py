"""A real API on loopback in the test's own event loop, and a client that holds it to its document.

Every answer to the client is checked against /openapi.json: a status, a media type or a field that is
not documented fails the test that met it.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse
from jsonschema import Draft202012Validator
from starlette.applications import Starlette

from outwake.app import shared_figure
from outwake.app.api.openapi import document
from outwake.app.context import Context
from outwake.app.main import Server, bind, create_app
from outwake.settings import Settings
from tests.support.waits import TIMEOUT, awaiting

shared_figure.LEAST, shared_figure.SHARE = 0.0, math.inf  # tests ask for figures right behind a change


@dataclass
class Api:
    """A running API and a client for it."""

    url: str
    app: Starlette
    client: httpx.AsyncClient
    server: Server

    @property
    def context(self) -> Context:
        found = self.app.state.context
        assert isinstance(found, Context)
        return found

    async def create(self, **fields: Any) -> dict[str, Any]:
        """A new session, as answered."""
        asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "Do it", **fields}
        response = await self.client.post("/sessions", json=asked)
        assert response.status_code == 201, response.text
        return dict(response.json())

    @asynccontextmanager
    async def follow(self, session_id: str, query: str = "", **headers: str) -> AsyncIterator["Events"]:
        """The session's events."""
        path = f"/sessions/{session_id}/events{query}"
        async with aconnect_sse(self.client, "GET", path, headers=headers, timeout=TIMEOUT) as source:
            assert source.response.status_code == 200
            yield Events(source.aiter_sse())


class Events:
    """Server-sent events, one after the other."""

    def __init__(self, source: AsyncIterator[ServerSentEvent]) -> None:
        self._source = source
        self._seen: list[str] = []

    async def next(self, *names: str) -> ServerSentEvent:
        """The next event with one of these names, of any name without; raises at the end."""
        async with awaiting(f"an event {' or '.join(names)}", seen=lambda: self._seen[-10:]):
            async for event in self._source:
                self._seen.append(f"{event.event} {event.data[:200]}")
                if not names or event.event in names:
                    return event
        raise AssertionError(f"the stream has ended without {names or 'another event'}: {self._seen[-10:]}")

    async def status(self, **wanted: str) -> dict[str, Any]:
        """The next state with these fields."""
        while True:
            state: dict[str, Any] = json.loads((await self.next("status")).data)
            if wanted.items() <= state.items():
                return state

    async def texts(self, count: int) -> list[str]:
        """What the next messages say."""
        return [json.loads((await self.next("message")).data)["body"]["text"] for _ in range(count)]

    async def rest(self) -> list[ServerSentEvent]:
        """All until the end."""
        found: list[ServerSentEvent] = []
        async with awaiting("the end of the stream", seen=lambda: found[-10:]):
            async for event in self._source:
                found.append(event)
        return found


@asynccontextmanager
async def serving(database: str, **changes: Any) -> AsyncIterator[Api]:
    """Serve until the block ends."""
    settings = Settings.model_validate({"DATABASE_URL": database, **changes})
    app = create_app(settings)
    server = Server(app, settings)
    listening = bind(settings.host, 0)
    host, port = listening.getsockname()[:2]
    async with AsyncExitStack() as stack:
        # _serve, without the signal handlers of serve: those belong to the test run.
        task = asyncio.create_task(server._serve([listening]))
        stack.push_async_callback(_stopped, server, task)
        while not server.started:
            await asyncio.sleep(0.001)
            assert not task.done(), "the API did not start"
        client = httpx.AsyncClient(
            base_url=f"http://{host}:{port}",
            timeout=TIMEOUT,
            event_hooks={"response": [check_documented]},
        )
        await stack.enter_async_context(client)
        yield Api(str(client.base_url), app, client, server)


async def _stopped(server: Server, task: asyncio.Task[None]) -> None:
    server.should_exit = True
    async with awaiting("the API to stop", seen=lambda: list(map(str, asyncio.all_tasks()))):
        await task


async def check_documented(response: httpx.Response) -> None:
    """Raise AssertionError unless the document allows this answer."""
    operation = _operation(response.request.method, response.request.url.path)
    if operation is None:
        assert response.status_code in (404, 405) or not response.is_error
        return
    status = str(response.status_code)
    assert status in operation["responses"], f"{status} is not documented for {response.request.url}"
    documented = operation["responses"][status]
    content = documented.get("content", {})
    if not content:
        return
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in content, f"{media_type} is not documented"
    for name in documented.get("headers", {}):
        assert name in response.headers or name == "Idempotent-Replayed", f"{name} is missing"
    if media_type.endswith("json"):
        await response.aread()
        schema = {**content[media_type]["schema"], "components": document()["components"]}
        Draft202012Validator(schema).validate(response.json())


def _operation(method: str, path: str) -> dict[str, Any] | None:
    for template, methods in document()["paths"].items():
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            found: dict[str, Any] | None = methods.get(method.lower())
            return found
    return None

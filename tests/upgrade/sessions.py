"""Sessions, posted to whichever API is up: every request is answered, every session is completed."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from tests.upgrade.ground import Ground, Part

_PAUSE = 1.5
"""Seconds between two sessions. A turn takes about a second of a core: git, and the agent."""


class Sessions:
    """A client of the API."""

    def __init__(self, ground: "Ground", repository: Path, rnd: random.Random) -> None:
        self.made: dict[str, int] = {}
        """Prompts of each session."""
        self._ground = ground
        self._repository = repository
        self._random = rnd
        self._busy = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Post sessions until `stop`."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Finish what is under way. Raises what went wrong."""
        self._stopping.set()
        if self._task is not None:
            await self._task
            self._task = None

    async def close(self) -> None:
        """Stop, whatever happened."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @asynccontextmanager
    async def between(self) -> AsyncIterator[None]:
        """No request of ours is under way in the block."""
        async with self._busy:
            self._check()
            yield

    def _check(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            async with self._busy:
                session = await self._create(self._any(), "sleep:0.2 lines:2 Go on")
                if self._random.random() < 0.3:
                    await self._post(self._any(), f"/sessions/{session}/prompts", {"prompt": "lines:1 More"})
                    self.made[session] += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0, 2 * _PAUSE)):
                    await self._stopping.wait()

    async def one_followed(self) -> None:
        """Create one at an API and follow it to its end at another, if there is another."""
        first = self._any()
        others = [part for part in self._ground.apis if part is not first] or [first]
        session = await self._create(first, "lines:1 Alone")
        path = f"{others[0].url}/sessions/{session}/events?until=completed"
        states, messages = [], 0
        async with asyncio.timeout(60), self._ground.client.stream("GET", path) as stream:
            async for kind, data in _events(stream):
                if kind == "status":
                    states.append(data["inbox_status"])
                messages += kind == "message"
        if states[-1:] != ["completed"] or messages == 0:
            self._ground.fail(f"{others[0].name} streamed {states} and {messages} messages of {session}")

    def _any(self) -> "Part":
        return self._random.choice(self._ground.apis)

    async def _create(self, part: "Part", prompt: str) -> str:
        body = {"repo": self._repository.as_uri(), "target_branch": "main", "prompt": prompt}
        session: str = (await self._post(part, "/sessions", body))["id"]
        self.made[session] = 1
        return session

    async def _post(self, part: "Part", path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._ground.client.post(
            part.url + path, json=body, headers={"Idempotency-Key": f"{self._random.random()}"}
        )
        if answer.status_code != 201:
            raise AssertionError(f"{part.name} answered {answer.status_code} to POST {path}: {answer.text}")
        return dict(answer.json())


async def _events(stream: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-Sent Events as (event, data)."""
    stream.raise_for_status()
    kind, data = "message", ""
    async for line in stream.aiter_lines():
        if line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()
        elif not line and data:
            yield kind, json.loads(data)
            kind, data = "message", ""

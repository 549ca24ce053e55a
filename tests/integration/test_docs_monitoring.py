"""docs/monitoring.md: the old failure, replayed, and each place where it shows."""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.process import ROOT, Process, running
from tests.support.steps import until
from tests.support.transcript import check
from tests.support.waits import TIMEOUT, awaiting

PAGE = ROOT / "docs" / "monitoring.md"


async def test_the_old_failure_shows_everywhere(database: str, tmp_path: Path, connect: Connect) -> None:
    set_search_path(database, "public")
    conn = await connect()
    await conn.execute("DELETE FROM outwake.outbox")
    env: dict[str, str | None] = {
        "DATABASE_URL": database,
        "OUTWAKE_PORT": "0",
        "OUTWAKE_STUCK_AFTER": "1",
        "OUTWAKE_ALLOW_FILE_REPOS": "1",
        "OUTWAKE_WORKSPACE_ROOT": str(tmp_path),
        "OUTWAKE_AGENT_COMMAND": sys.executable,
    }
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(running("outwake", "api", env=env))
        port = (await api.event("api_ready"))["port"]
        url = f"http://127.0.0.1:{port}"
        await api.event("listening")
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            asked = {"repo": "file:///no/such/repository", "target_branch": "main", "prompt": "Fix the build"}
            answer = await client.post(f"{url}/sessions", json=asked)
        assert answer.json()["worker_present"] is False
        await api.event("stuck")
        await check(PAGE, conn, _command(stack, api, url, env, conn=connect))


def _command(
    stack: AsyncExitStack, api: Process, url: str, env: dict[str, str | None], conn: Connect
) -> Callable[[str], Awaitable[str]]:
    async def run(line: str) -> str:
        match line.split():
            case ["curl", "-s", address, *rest]:
                async with httpx.AsyncClient(timeout=TIMEOUT) as client:
                    text = (await client.get(address.replace("localhost:8000", url))).text
                if rest:
                    pattern = rest[3].strip("'")
                    return "".join(f"{found}\n" for found in text.splitlines() if _wanted(pattern, found))
                return json.dumps(json.loads(text), indent=2) + "\n"
            case ["outwake", "status"]:
                async with running("outwake", "status", env=env) as process:
                    await process.ended()
                return "\n".join(found.rstrip() for found in process.stdout) + "\n"
            case ["outwake", "api", *_]:
                stuck = await api.event("stuck")
                return json.dumps(stuck) + "\n"
            case ["worker", "&"]:
                await stack.enter_async_context(running("worker", env=env))
                unfinished = "SELECT FROM outwake.outbox WHERE state IN ('ready', 'running')"
                await until(await conn(), f"SELECT NOT EXISTS ({unfinished})")
                await _present(url)
                return ""
        raise AssertionError(f"the page has a command nobody knows: {line}")

    return run


async def _present(url: str) -> None:
    """The API has noticed the worker: what it says of workers may be a second old (app/live/presence.py)."""
    answer: dict[str, Any] = {}
    async with (
        httpx.AsyncClient(timeout=TIMEOUT) as client,
        awaiting("the API to see the worker", seen=lambda: answer),
    ):
        while not answer.get("worker_present"):
            answer = (await client.get(f"{url}/readyz")).json()
            await asyncio.sleep(0.05)  # nothing tells us


def _wanted(pattern: str, line: str) -> bool:
    return not line.startswith("#") and re.search(pattern, line) is not None

"""A browser for the run, and for each test a page that tolerates no error and no other host."""

import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request

from outwake.embedded.demo import make_repository
from tests.browser.chromium import chromium, found
from tests.support.api import Api, serving
from tests.support.process import Process, running

TIMEOUT = 30_000  # ms until a condition that does not come fails its test

StartWorker = Callable[[], AbstractAsyncContextManager[Process]]


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    if found() is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on PATH: apt-get install chromium, or set CHROMIUM to its path")
    async with chromium() as launched:
        yield launched


@pytest.fixture
async def api(database: str) -> AsyncIterator[Api]:
    async with serving(database, OUTWAKE_ALLOW_FILE_REPOS="true") as served:
        yield served


@pytest.fixture
def tolerated() -> set[str]:
    """Parts of console messages that a test expects: Chromium calls every status from 400 on an error."""
    return set()


@pytest.fixture
async def context(browser: Browser, api: Api, tolerated: set[str]) -> AsyncIterator[BrowserContext]:
    """A profile of its own; what goes wrong in any of its pages fails the test."""
    wrong: list[str] = []
    host = urlsplit(api.url).netloc

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in tolerated):
            wrong.append(f"console: {message.text}")

    def check(request: Request) -> None:
        if urlsplit(request.url).netloc != host:
            wrong.append(f"another host: {request.url}")

    made = await browser.new_context(base_url=api.url, viewport={"width": 1180, "height": 780})
    made.set_default_timeout(TIMEOUT)
    made.on("console", note)
    made.on("weberror", lambda error: wrong.append(f"script: {error.error}"))
    made.on("request", check)
    yield made
    await made.close()
    assert not wrong


@pytest.fixture
async def page(context: BrowserContext) -> Page:
    return await context.new_page()


@pytest.fixture
def repository(tmp_path: Path) -> str:
    return make_repository(tmp_path / "repository").as_uri()


@pytest.fixture
def start_worker(database: str, tmp_path: Path) -> StartWorker:
    """Start a real worker with the scripted agent."""
    environment = {
        "DATABASE_URL": database,
        "OUTWAKE_LOG_LEVEL": "debug",
        "OUTWAKE_ALLOW_FILE_REPOS": "true",
        "OUTWAKE_WORKSPACE_ROOT": str(tmp_path / "workspaces"),
        "OUTWAKE_AGENT_COMMAND": shlex.join([sys.executable, "-P", "-m", "outwake.embedded.agent"]),
        "OUTWAKE_DRAIN_GRACE": "0",
    }
    return lambda: running("worker", env=environment)

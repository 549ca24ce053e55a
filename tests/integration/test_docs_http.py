"""The examples of docs/http-api.md and docs/events.md print what these pages say.

With OUTWAKE_WRITE_DOCS=1 the pages are rewritten instead: look at the diff.
"""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from tests.support.api import Api
from tests.support.examples import Page
from tests.support.manual_worker import ManualWorker
from tests.support.waits import awaiting, eventually

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("name", ["http-api.md", "events.md"])
async def test_examples(api: Api, manual: ManualWorker, name: str) -> None:
    page = Page(DOCS / name)
    await eventually("the API to listen", lambda: api.context.hub.listening)

    async def shell(command: str) -> str:
        process = await asyncio.create_subprocess_shell(
            command.replace("http://localhost:8000", api.url).replace("localhost:8000", api.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with awaiting(f"the end of {command}"):
            output, _ = await process.communicate()
        return output.decode()

    async def act(what: str) -> None:
        """`claim`, `say TEXT`, `complete`, `fail REASON` (for good), `retry REASON`."""
        verb, _, rest = what.partition(" ")
        match verb:
            case "claim":
                await manual.claim()
            case "say":
                await manual.say(rest)
            case "complete":
                await manual.complete()
            case "fail" | "retry":
                await manual.fail(rest, permanent=verb == "fail")
            case _:
                raise AssertionError(f"unknown: {what}")

    written = await page.run(shell, act)
    if os.environ.get("OUTWAKE_WRITE_DOCS") == "1":
        page.path.write_text(written, encoding="utf-8")
    else:
        assert written == page.text

"""What a session talks to in production, on loopback: an allocator with sandboxes, and a Git repository."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.allocator import Allocator, allocator
from tests.support.anthropic import Anthropic, anthropic
from tests.support.api import Api, serving
from tests.support.faults import Steps
from tests.support.loopback import loopback
from tests.support.process import ROOT
from tests.support.sandbox import Sandbox, sandbox

STUB = f"{sys.executable} -I {ROOT / 'tests/support/stub_claude.py'} -p --output-format stream-json --verbose"


class Production:
    """The stand-ins, all of whose requests meet `steps`."""

    def __init__(
        self,
        directory: Path,
        allocator: Allocator,
        sandboxes: list[Sandbox],
        anthropic: Anthropic,
        steps: Steps,
    ) -> None:
        self.directory = directory
        self.allocator = allocator
        self.sandboxes = sandboxes
        self.anthropic = anthropic
        self.steps = steps
        self.origin = directory / "origin.git"

    @property
    def repo(self) -> str:
        """The repository's URL."""
        return f"file://{self.origin}"

    def environment(self, database: str, *, host: str = "host", **more: str | None) -> dict[str, str | None]:
        """A worker's. Workers of one `host` share a directory."""
        settings = {
            "DATABASE_URL": database,
            "IP_ALLOCATOR_URL": self.allocator.url,
            "OUTWAKE_BORROW_WAIT": "0",
            "OUTWAKE_ALLOW_FILE_REPOS": "true",
            "OUTWAKE_WORKSPACE_ROOT": str(self.directory / host),
            "OUTWAKE_AGENT_COMMAND": STUB,
            "OUTWAKE_LOG_LEVEL": "debug",
        }
        return {**settings, **more}

    def git(self, *arguments: str) -> str:
        """What git says of the repository."""
        return git(self.origin, *arguments)

    def branches(self) -> dict[str, str]:
        """The repository's, with their commits."""
        lines = self.git("for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads").splitlines()
        return dict(line.split(" ", 1) for line in lines)


def git(directory: Path, *arguments: str) -> str:
    """Run git there and return what it prints."""
    who = ("-c", "user.name=Test", "-c", "user.email=test@outwake.invalid")
    done = subprocess.run(
        ["git", "-C", str(directory), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@asynccontextmanager
async def production(directory: Path, *, sandboxes: int = 1) -> AsyncIterator[Production]:
    """An allocator that lends so many sandboxes, a Messages API, and a repository with one commit on main."""
    steps = Steps()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(loopback())
        lender = allocator(server, steps)
        made = [
            stack.enter_context(sandbox(server, steps, directory / f"sandbox-{number}"))
            for number in range(sandboxes)
        ]
        for one in made:
            await lender.submit(one.item)
        await asyncio.to_thread(_make_origin, directory)
        yield Production(directory, lender, made, anthropic(server, steps), steps)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Production]:
    async with production(tmp_path) as made:
        yield made


@pytest.fixture
async def api(database: str) -> AsyncIterator[Api]:
    """An API that takes the repository of a test."""
    async with serving(database, OUTWAKE_ALLOW_FILE_REPOS=True) as made:
        yield made


def _make_origin(directory: Path) -> None:
    work = directory / "seed"
    work.mkdir()
    git(work, "init", "--quiet", "--initial-branch=main")
    (work / "README.md").write_text("Hello\n")
    git(work, "add", "README.md")
    git(work, "commit", "--quiet", "-m", "Begin")
    git(directory, "clone", "--quiet", "--bare", str(work), "origin.git")


async def rows(connection: Any, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """All rows of a query."""
    cursor = await connection.execute(query, parameters)
    return list(await cursor.fetchall())

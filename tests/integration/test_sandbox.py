"""Sessions in borrowed sandboxes: real workers, and stand-ins that really execute the steps."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.process import running
from tests.support.production import Production, production, rows

COMMIT = (
    "tool: cd {repo} && echo more >> README.md && git add . "
    "&& git -c user.name=A -c user.email=a@b commit -qm 'Say more'"
)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Production]:
    async with production(tmp_path) as made:
        yield made


@pytest.fixture
async def file_api(database: str) -> AsyncIterator[Api]:
    """An API that takes the repository of a test."""
    async with serving(database, SENDOFF_ALLOW_FILE_REPOS=True) as made:
        yield made


async def test_a_turn_in_a_sandbox(parts: Production, database: str, file_api: Api, connect: Connect) -> None:
    conn = await connect()
    async with running("worker", env=parts.environment(database)) as worker:
        created = await file_api.create(repo=parts.repo, prompt=f"{COMMIT}\nsay: https://h.org/a/b/pull/7")
        await worker.event("turn_ended", status="succeeded")
        await worker.event("sandbox_returned")
    assert not parts.allocator.borrowed
    shown = (await file_api.client.get(f"/sessions/{created['id']}")).json()
    (prompt,) = shown["prompts"]
    assert (shown["inbox_status"], prompt["status"]) == ("completed", "succeeded")
    result = prompt["result"]
    assert [commit["subject"] for commit in result["commits"]] == ["Say more"]
    assert result["pull_request"] == "https://h.org/a/b/pull/7"
    assert (result["agent"]["total_cost_usd"], result["agent"]["num_turns"]) == (0.25, 1)
    ((sandbox, bundle),) = await rows(
        conn, "SELECT s.sandbox, m.bundle FROM session AS s JOIN session_memory AS m ON m.session_id = s.id"
    )
    assert sandbox is None
    assert bundle is not None
    assert not await rows(conn, "SELECT * FROM sandbox_borrow")
    assert parts.branches().keys() == {"main"}  # pushing was not asked for
    assert not list(parts.sandboxes[0].home.iterdir())  # swept
    assert str(created["id"]) in {asked["session_id"] for asked in parts.allocator.asked}

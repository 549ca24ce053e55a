"""What a session holds goes back to the provider of its kind, whatever kind a worker lends itself."""

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Connect
from tests.support.api import Api
from tests.support.process import running
from tests.support.production import Production, api, parts, rows

__all__ = ["api", "parts"]  # fixtures


async def lend(parts: Production, *, kind: str | None) -> dict[str, Any]:
    """An allocator's sandbox as a session holds it; without a kind as earlier versions stored it."""
    item = parts.allocator.free.pop()
    parts.allocator.borrowed["token"] = item
    return {"item": item, "borrow_token": "token"} | ({"kind": kind} if kind else {})


async def owe(conn: Any, held: dict[str, Any]) -> None:
    await conn.execute(
        "INSERT INTO outbox (topic, payload) VALUES ('sandbox.return', %s)", (Jsonb({"sandbox": held}),)
    )


@pytest.mark.parametrize("kind", ["allocator", None])
async def test_a_worker_with_directories_returns_an_allocators_sandbox(
    parts: Production, database: str, connect: Connect, kind: str | None
) -> None:
    await owe(await connect(), await lend(parts, kind=kind))
    async with running("worker", env=parts.environment(database, OUTWAKE_SANDBOX="directory")) as worker:
        await worker.event("sandbox_returned")
    assert not parts.allocator.borrowed


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("allocator", "the sandbox is an allocator's, and IP_ALLOCATOR_URL is not set here"),
        (None, "the sandbox is an allocator's, and IP_ALLOCATOR_URL is not set here"),
        ("submarine", "this worker knows no sandboxes of kind 'submarine'"),
    ],
)
async def test_a_return_that_a_worker_cannot_serve_waits_for_another_and_says_why(
    parts: Production, database: str, connect: Connect, kind: str | None, reason: str
) -> None:
    conn = await connect()
    await owe(conn, await lend(parts, kind=kind))
    async with running("worker", env=parts.environment(database, IP_ALLOCATOR_URL=None)) as worker:
        await worker.event("ended", topic="sandbox.return", state="ready")
    ((error,),) = await rows(conn, "SELECT errors -> -1 ->> 'error' FROM outbox")
    assert error == reason
    assert parts.allocator.borrowed
    if kind == "submarine":
        return
    await conn.execute("UPDATE outbox SET available_at = now()")
    async with running("worker", env=parts.environment(database)) as worker:
        await worker.event("sandbox_returned")
    assert not parts.allocator.borrowed


async def test_a_worker_with_an_allocator_ends_a_session_that_held_a_directory(
    parts: Production, database: str, connect: Connect
) -> None:
    root = parts.directory / "host"
    left = root / "session" / "run-1"
    (left / "repo").mkdir(parents=True)
    await owe(await connect(), {"item": {"workspace": str(left)}, "borrow_token": "x"})
    async with running("worker", env=parts.environment(database)) as worker:
        await worker.event("sandbox_returned")
    assert not left.exists()
    assert len(parts.allocator.free) == 1


@pytest.mark.parametrize(
    "odd", ["", "session", "session/../../outside", "../outside", "session/run-1/repo", "link/x"]
)
async def test_a_return_removes_nothing_but_an_attempts_directory(
    parts: Production, database: str, connect: Connect, odd: str
) -> None:
    root = parts.directory / "host"
    outside = parts.directory / "outside"
    for path in (root / "session" / "run-1" / "repo", outside / "x", root / "other" / "run-1"):
        path.mkdir(parents=True)
    (root / "link").symlink_to(outside)
    before = sorted(path for path in parts.directory.rglob("*"))
    held = {"kind": "directory", "item": {"workspace": f"{root}/{odd}"}, "borrow_token": "x"}
    await owe(await connect(), held)
    async with running("worker", env=parts.environment(database)) as worker:
        await worker.event("sandbox_returned")
    assert sorted(path for path in parts.directory.rglob("*")) == before


async def test_a_second_host_with_directories_goes_on_from_the_first_ones_work(
    parts: Production, database: str, api: Api
) -> None:
    agent = "sh -c 'echo more >> file; git add file; git commit -qm Say; git log --format=%s; echo \"{}\"'"
    settings = {"IP_ALLOCATOR_URL": None, "OUTWAKE_AGENT_COMMAND": agent}
    async with running("worker", env=parts.environment(database, host="first", **settings)) as worker:
        created = await api.create(repo=parts.repo, prompt="one")
        await worker.event("turn_ended")
    async with running("worker", env=parts.environment(database, host="second", **settings)) as worker:
        answer = await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "two"})
        assert answer.status_code == 201
        await worker.event("turn_ended")
        await worker.event("sandbox_returned")
    messages = (await api.client.get(f"/sessions/{created['id']}/messages?limit=100")).json()["messages"]
    texts = [message["body"].get("text") for message in messages if "text" in message["body"]]
    assert texts == ["Say", "Begin", "Say", "Say", "Begin"]
    for host in ("first", "second"):
        assert not list((parts.directory / host).iterdir())  # nothing of the session stays on a disk

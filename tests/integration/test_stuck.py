"""The incident this system exists for: an API without a worker. Nobody polls, and yet it is told."""

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest

from outwake.settings import Settings
from outwake.telemetry import stuck
from outwake.telemetry.stuck import StuckWatch
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.process import Process, running
from tests.support.receiver import receiver
from tests.support.steps import add
from tests.support.waits import TIMEOUT
from tests.support.worker import command, install

SESSION = {"repo": "octo/tools", "target_branch": "main", "prompt": "Do it"}


async def post_session(api: Process) -> str:
    ready = await api.event("api_ready")
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        answer = await client.post(f"http://127.0.0.1:{ready['port']}/sessions", json=SESSION)
    assert answer.status_code == 201
    assert answer.json()["worker_present"] is False
    return str(answer.json()["id"])


async def test_api_without_a_worker(database: str, connect: Connect) -> None:
    async with receiver() as chat:
        env = {
            "DATABASE_URL": database,
            "OUTWAKE_PORT": "0",
            "OUTWAKE_STUCK_AFTER": "0.2",
            "OUTWAKE_STUCK_WEBHOOK": f"{chat.url}/hook/secret-part",
        }
        async with running("outwake", "api", env=env) as api:
            await post_session(api)
            told_of = await api.event("stuck", topic="session.run", reason="no worker")
            assert told_of["level"] == "error"
            assert told_of["waited"] >= 0.2
            await chat.until("the word that it is stuck", lambda posts: len(posts) == 1)
            told = json.loads(chat.posts[0].body)
            assert (told["event"], told["topic"], told["reason"]) == ("stuck", "session.run", "no worker")
            assert told["outbox_id"] == told_of["outbox_id"]
            # Once it is gone, that is said too.
            conn = await connect()
            await conn.execute("SELECT outbox_cancel(%s)", (told_of["outbox_id"],))
            await api.event("unstuck", topic="session.run")
            await chat.until("the word that it is gone", lambda posts: len(posts) == 2)
            assert "secret-part" not in "\n".join(api.stderr)


async def test_a_webhook_that_fails_is_told(database: str) -> None:
    async with receiver() as chat:
        chat.status = 500
        env = {
            "DATABASE_URL": database,
            "OUTWAKE_PORT": "0",
            "OUTWAKE_STUCK_AFTER": "0.2",
            "OUTWAKE_STUCK_WEBHOOK": f"{chat.url}/hook/secret-part",
        }
        async with running("outwake", "api", env=env) as api:
            await post_session(api)
            await api.event("stuck_webhook_failed", topic="session.run")
            assert "secret-part" not in "\n".join(api.stderr)


async def test_a_worker_tells_of_rows_that_nobody_serves(
    database: str, tmp_path: Path, connect: Connect
) -> None:
    conn = await connect()
    async with command(
        database, install(tmp_path / "handlers"), "--topics", "noop", OUTWAKE_STUCK_AFTER="0.3"
    ) as worker:
        parked = await worker.event("parked")
        row_id = await add(conn, "no.such.topic")
        await add(conn, "noop")  # what makes the worker look about
        await worker.event("stuck", after=parked, outbox_id=row_id, reason="no worker")


async def test_an_api_at_rest_asks_nothing(api: Api, connect: Connect) -> None:
    """One timer while something is under way, none when nothing is."""
    conn = await connect()
    await conn.execute("DELETE FROM outbox")
    watch = StuckWatch(Settings(DATABASE_URL="unused"), api.context.database.connection)  # type: ignore[call-arg]
    assert watch._timer is None
    watch.work_came()
    first = watch._timer
    assert first is not None
    watch.work_came()
    assert watch._timer is first  # not moved: no cost for each row
    first.cancel()
    watch._fire()
    assert watch._looking is not None
    await watch._looking
    assert watch._timer is None
    await add(conn, "t")
    watch._fire()
    assert watch._looking is not None
    await watch._looking
    assert watch._timer is not None
    await watch.close()


async def test_a_look_that_takes_long_comes_seldom_and_holds_no_start_up(
    monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    """As past all the rows claimed under an old snapshot. The connection that starts can be used at once."""
    monkeypatch.setattr(stuck, "FIRST", 0.01)
    conn, other = await connect(), await connect()
    await conn.execute(
        "ALTER FUNCTION outbox_stuck_deadline RENAME TO quick;"
        "CREATE FUNCTION outbox_stuck_deadline(stuck_after interval) RETURNS interval LANGUAGE sql"
        " VOLATILE AS 'SELECT stuck_after FROM pg_sleep(0.3)'"
    )
    watch = StuckWatch(Settings(DATABASE_URL="unused"), lambda: nullcontext(other))  # type: ignore[call-arg]
    watch._after = 0.0
    await watch.first_look(conn)
    await conn.execute("SELECT 1")
    assert watch._looking is not None
    await watch._looking
    assert watch._timer is not None
    now = asyncio.get_running_loop().time()
    assert watch._timer.when() > now + 0.3 * (stuck.SHARE - 1)
    watch.work_came()
    assert watch._timer.when() > now + 0.3 * (stuck.SHARE - 1)
    await watch.close()

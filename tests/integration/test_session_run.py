"""The main job through real processes: API, workers, git and the scripted agent."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from outwake.embedded.demo import SEED_QUERY, make_repository
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.process import Process
from tests.support.steps import column
from tests.support.worker_env import WorkerEnv, held


@pytest.fixture
async def api(database: str) -> AsyncIterator[Api]:
    async with serving(database, OUTWAKE_ALLOW_FILE_REPOS="true") as served:
        yield served


@pytest.fixture
def repository(tmp_path: Path) -> str:
    return make_repository(tmp_path / "repository").as_uri()


@pytest.fixture
def worker_env(database: str, tmp_path: Path) -> WorkerEnv:
    return WorkerEnv(database, tmp_path)


async def session(api: Api, session_id: str) -> dict[str, Any]:
    answer = await api.client.get(f"/sessions/{session_id}")
    found: dict[str, Any] = answer.json()
    return found


async def test_a_session_is_worked_on_and_its_result_read_back(
    api: Api, worker_env: WorkerEnv, repository: str, connect: Connect
) -> None:
    async with worker_env.worker() as worker:
        await worker.event("parked")
        created = await api.create(repo=repository, prompt="Write a note lines:25")
        assert created["worker_present"] is True
        async with api.follow(created["id"], "?until=completed") as events:
            seen = [event for event in await events.rest() if event.event == "message"]
        found = await session(api, created["id"])
        assert (found["inbox_status"], found["prompts"][0]["status"]) == ("completed", "succeeded")
        [commit] = found["prompts"][0]["result"]["commits"]
        assert found["prompts"][0]["result"]["head"] == commit["sha"]
        listed = (await api.client.get(f"/sessions/{created['id']}/messages?limit=200")).json()
        assert [int(event.id) for event in seen] == [m["seq"] for m in listed["messages"]]
        assert [m["seq"] for m in listed["messages"]] == list(range(1, len(seen) + 1))
        assert len(seen) > 25
        # The sandbox was owed its return, and got it.
        await worker.event("completed", after=await worker.event("turn_ended"))
    conn = await connect()
    rows = await (await conn.execute("SELECT topic, state FROM outbox ORDER BY id")).fetchall()
    assert rows == [("session.run", "done"), ("sandbox.return", "done")]


async def test_the_seeds_query_shows_active_pending_completed(
    api: Api, worker_env: WorkerEnv, repository: str, connect: Connect
) -> None:
    conn, fifo = await connect(), worker_env.fifo("go")

    async def status() -> str:
        row = await (await conn.execute(SEED_QUERY.encode())).fetchone()
        assert row is not None
        return f"{row[1]} {row[2]}"

    created = await api.create(repo=repository, prompt=f"wait-for:{fifo}")
    assert created["worker_present"] is False
    assert await status() == "active active"
    async with worker_env.worker() as worker:
        await worker.event("agent_started")
        assert await status() == "pending active"
        await asyncio.to_thread(fifo.write_bytes, b"")
        await worker.event("ended", topic="session.run")
        assert await status() == "completed active"


async def test_a_killed_workers_session_is_finished_by_another_and_nothing_is_twice(
    api: Api, worker_env: WorkerEnv, repository: str
) -> None:
    hold, go = worker_env.fifo("hold"), worker_env.fifo("go")
    async with worker_env.worker() as first, worker_env.worker() as second:
        await first.event("parked")
        await second.event("parked")
        created = await api.create(repo=repository, prompt=f"lines:40 hold:{hold} wait-for:{go}")
        async with api.follow(created["id"], "?until=completed") as events:
            letting_go = asyncio.create_task(held(hold))
            while "39 xxx" not in (await events.next("message")).data:
                pass
            runs, waits = (first, second) if any_event(first, "agent_started") else (second, first)
            runs.kill()
            # The agent dies with its worker, before anybody else runs the session again.
            await letting_go
            letting_go = asyncio.create_task(held(hold))
            await waits.event("rescued")
            await waits.event("agent_started", attempt=2)
            await asyncio.to_thread(go.write_bytes, b"")
            await letting_go
            rest = await events.rest()
        assert "superseded" in {event.event for event in rest}
        found = await session(api, created["id"])
        assert found["prompts"][0]["status"] == "succeeded"
        messages = (await api.client.get(f"/sessions/{created['id']}/messages?limit=500")).json()
        texts = [text_of(m) for m in messages["messages"]]
        numbered = [text for text in texts if re.match(r"\d+ x", text)]
        assert {m["attempt"] for m in messages["messages"]} == {2}
        assert len(numbered) == len(set(numbered)) == 40
        assert await runs.ended() == -signal.SIGKILL


async def test_cancel_ends_the_agents_whole_group(
    api: Api, worker_env: WorkerEnv, repository: str, connect: Connect
) -> None:
    hold = worker_env.fifo("hold")
    async with worker_env.worker() as worker:
        await worker.event("parked")
        letting_go = asyncio.create_task(held(hold))
        prompt = f"ignore-term spawn-child spawn-grandchild hold:{hold} lines:1 wait-forever"
        created = await api.create(repo=repository, prompt=prompt)
        async with api.follow(created["id"], "?until=completed") as events:
            while "0 xxx" not in (await events.next("message")).data:
                pass
            children = psutil.Process(worker.pid).children(recursive=True)
            answer = await api.client.post(f"/sessions/{created['id']}/cancel")
            assert (answer.status_code, answer.json()["cancelling"]) == (202, 1)
            await events.status(inbox_status="completed")
        await letting_go
        assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
        found = await session(api, created["id"])
        assert found["prompts"][0]["status"] == "cancelled"
        ended = await worker.event("ended", topic="session.run")
        await worker.event("completed", after=ended)
    conn = await connect()
    rows = await (await conn.execute("SELECT topic, state FROM outbox ORDER BY id")).fetchall()
    assert rows == [("session.run", "cancelled"), ("sandbox.return", "done")]


async def test_a_drain_hands_the_session_back_without_a_failure(
    api: Api, worker_env: WorkerEnv, repository: str, connect: Connect
) -> None:
    go = worker_env.fifo("go")
    created = await api.create(repo=repository, prompt=f"wait-for:{go}")
    async with worker_env.worker() as first:
        await first.event("agent_started")
        first.send(signal.SIGTERM)
        assert await first.ended() == 0
    conn = await connect()
    row = await (await conn.execute("SELECT state, attempt, failures FROM outbox")).fetchone()
    assert row == ("ready", 1, 0)
    assert (await session(api, created["id"]))["inbox_status"] == "active"
    async with worker_env.worker() as second:
        await second.event("agent_started", attempt=2)
        await asyncio.to_thread(go.write_bytes, b"")
        await second.event("ended", topic="session.run")
    assert (await session(api, created["id"]))["prompts"][0]["status"] == "succeeded"


async def test_a_follow_up_goes_on_where_the_last_turn_ended(
    api: Api, worker_env: WorkerEnv, repository: str
) -> None:
    async with worker_env.worker() as worker:
        created = await api.create(repo=repository, prompt="First")
        path = f"/sessions/{created['id']}/prompts"
        assert (await api.client.post(path, json={"prompt": "Second"})).status_code == 201
        first = await worker.event("turn_ended")
        await worker.event("turn_ended", after=first)
        await worker.event("ended", topic="session.run", after=first)
        found = await session(api, created["id"])
    first_result, second_result = (prompt["result"] for prompt in found["prompts"])
    assert first_result["head"] != second_result["head"]
    assert len(second_result["commits"]) == 1


@pytest.mark.parametrize(
    ("changes", "status", "state", "reason"),
    [
        ({"prompt": "fail:3 stderr:broken"}, "failed", "done", "exit status 3"),
        ({"prompt": "end-with-error"}, "failed", "done", "I was told to fail"),
        ({"target_branch": "nowhere"}, "failed", "dead", "no branch nowhere"),
        ({"repo": "file:///no/such/repository"}, "failed", "dead", "cannot clone"),
    ],
)
async def test_a_failed_turn_says_why(
    api: Api,
    worker_env: WorkerEnv,
    repository: str,
    connect: Connect,
    changes: dict[str, str],
    status: str,
    state: str,
    reason: str,
) -> None:
    created = await api.create(**{"repo": repository, "prompt": "Do it", **changes})
    async with worker_env.worker() as worker:
        await worker.event("ended", topic="session.run")
    found = await session(api, created["id"])
    assert found["inbox_status"] == "completed"
    assert found["prompts"][0]["status"] == status
    assert reason in found["prompts"][0]["reason"]
    conn = await connect()
    row = await (await conn.execute("SELECT state FROM outbox WHERE topic = 'session.run'")).fetchone()
    assert row == (state,)


async def test_a_session_without_a_prompt_prepares_its_branch(
    api: Api, worker_env: WorkerEnv, repository: str
) -> None:
    created = await api.create(repo=repository, prompt=None)
    async with worker_env.worker() as worker:
        await worker.event("workspace_ready", branch=created["branch"])
        await worker.event("ended", topic="session.run", state="settled by its handler")
    assert (await session(api, created["id"]))["inbox_status"] == "completed"


async def test_rows_from_psql_that_name_nonsense_die_with_a_reason(
    database: str, worker_env: WorkerEnv, connect: Connect
) -> None:
    """What the API refuses can still be typed into psql; it never reaches git as an option."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO session (repo, target_branch, branch, title)"
        " VALUES ('ext::sh -c touch% /pwned', '--upload-pack=x', 'b', 't')"
    )
    await conn.execute(
        "INSERT INTO outbox (topic, payload)"
        " SELECT 'session.run', jsonb_build_object('session_id', id) FROM session"
    )
    await conn.execute(
        "INSERT INTO outbox (topic, payload)"
        """ VALUES ('session.run', '{"session_id": "x"}'), ('session.run', '{}')"""
    )
    async with worker_env.worker() as worker:
        last = None
        for _ in range(3):
            last = await worker.event("ended", after=last, topic="session.run", state="dead")
    reasons = await column(conn, "SELECT errors -> 0 ->> 'error' FROM outbox ORDER BY id")
    assert reasons[1].startswith("the payload names no session"), reasons
    assert reasons[2].startswith("the payload names no session"), reasons


def any_event(process: Process, name: str) -> bool:
    return any(event["event"] == name for event in process.events)


def text_of(message: dict[str, Any]) -> str:
    content = message["body"].get("message", {}).get("content", [])
    return str(content[0].get("text", "")) if isinstance(content, list) and content else ""


RESULT = '{"type":"result","subtype":"success","result":"fine"'


@pytest.mark.parametrize(
    ("prompt", "status", "reason"),
    [
        (f"raw:{RESULT}}} spawn-child wait-forever", "succeeded", "did not exit after its result"),
        ("fail:0", "failed", "the agent ended without a result; it last said"),
        (f'raw:{RESULT},"permission_denials":[{{"tool_name":"Write"}}]}} fail:0', "failed", "not allowed"),
        (
            f'raw:{RESULT},"is_error":true,"result":"","errors":["no_such_id"]}} fail:1',
            "failed",
            "no_such_id",
        ),
        ('raw:{"type":"result","total_cost_usd":1' + "0" * 400 + "} fail:0", "succeeded", None),
        ("lines:2000 stderr:" + "token-" * 2000 + " fail:1", "failed", "exit status 1"),
        ("raw:" + "http://" * 15_000 + f" raw:{RESULT}}} fail:0", "succeeded", None),
    ],
    ids=["lingers", "no result", "denied", "errors", "cost", "stderr", "addresses"],
)
async def test_an_ending_is_understood_and_the_agent_runs_once(
    api: Api, worker_env: WorkerEnv, repository: str, prompt: str, status: str, reason: str | None
) -> None:
    async with worker_env.worker() as worker:
        created = await api.create(repo=repository, prompt=f"no-commit {prompt}")
        ended = await worker.event("turn_ended")
    assert ended["attempt"] == 1
    (found,) = (await session(api, created["id"]))["prompts"]
    assert found["status"] == status
    assert found["reason"] is None if reason is None else reason in found["reason"]

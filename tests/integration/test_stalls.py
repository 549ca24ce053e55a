"""The API's event loop goes on while it answers what is largest and worst for it.

An observer inside the process counts CPU, not time: tests/support/observed_loop.py.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from tests.conftest import Connect
from tests.support.process import Process, running

LONGEST = 250.0  # milliseconds of CPU; the goal is 100, which a slow machine may miss
SESSIONS = 10
TEXTS = ["[" * 20_000, "![" * 10_000, ">" * 10_000 + "\na" * 5_000, "**a_" * 5_000]


@pytest.fixture
async def process(database: str) -> AsyncIterator[Process]:
    env = {"DATABASE_URL": database, "OUTWAKE_PORT": "0", "OUTWAKE_LOG_LEVEL": "info"}
    async with running(sys.executable, "-m", "tests.support.observed_loop", "api", env=env) as api:
        await api.event("api_ready")
        yield api


@pytest.fixture
async def client(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    ready = await process.event("api_ready")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}", timeout=120) as client:
        yield client


def assert_no_stall(process: Process) -> None:
    worst = [event for event in process.events if event["event"] == "stalled"][-1]
    assert worst["ms"] <= LONGEST, worst


async def fill(conn: AsyncConnection[object]) -> str:
    """Sessions of large prompts and results, one of them with messages of a mebibyte; its id."""
    await conn.execute(
        "INSERT INTO session (user_id, repo, target_branch, branch, title)"
        " SELECT 'local', 'octo/tools', 'main', 'b' || n, 't' FROM generate_series(1, %s) AS n",
        (SESSIONS,),
    )
    result = {"cost": 1.5, "agent": {"type": "result", "result": "x" * 1_000_000, "total_cost_usd": 1.5}}
    await conn.execute(
        "INSERT INTO prompt (session_id, text, result, status)"
        " SELECT s.id, repeat('x', 100000), %s, 'succeeded' FROM session AS s, generate_series(1, 12)",
        (Jsonb(result),),
    )
    cursor = await conn.execute("SELECT id::text FROM session LIMIT 1")
    row = await cursor.fetchone()
    assert isinstance(row, tuple)
    bodies = [json.dumps({"type": "assistant", "text": text}) for text in [*TEXTS, *["x" * 1_000_000] * 60]]
    bodies += ["[" * 2000 + "1," * 200_000 + "1" + "]" * 2000, json.dumps({"1": list(range(100_000))})]
    await conn.execute(
        "INSERT INTO message (session_id, seq, prompt_id, attempt, body)"
        " SELECT s.id, b.n, (SELECT p.id FROM prompt AS p WHERE p.session_id = s.id LIMIT 1), 1,"
        " b.body::jsonb FROM session AS s, unnest(%s::text[]) WITH ORDINALITY AS b (body, n) WHERE s.id = %s",
        (bodies, row[0]),
    )
    await conn.execute("UPDATE session SET last_seq = %s WHERE id = %s", (len(bodies), row[0]))
    await conn.execute(
        "INSERT INTO outbox (topic, state, errors, payload, finished_at)"
        " SELECT 'x', 'dead', %s, %s, clock_timestamp() FROM generate_series(1, 60)",
        (Jsonb([{"attempt": 1, "error": "e" * 200_000}] * 5), Jsonb({"x": "y" * 1_000_000})),
    )
    return str(row[0])


async def ask(client: httpx.AsyncClient, path: str) -> None:
    for _ in range(2):
        answer = await client.get(path)
        assert answer.status_code == 200, (path, answer.text[:300])


async def follow(client: httpx.AsyncClient, session: str, after: int) -> None:
    """Until the first megabyte."""
    size = 0
    async with client.stream("GET", f"/sessions/{session}/events?after={after}") as answer:
        async for part in answer.aiter_bytes():
            size += len(part)
            if size > 1_000_000:
                return


async def test_the_largest_pages_lists_and_streams_do_not_stall_the_loop(
    process: Process, client: httpx.AsyncClient, connect: Connect
) -> None:
    session = await fill(await connect())
    await asyncio.gather(
        ask(client, f"/sessions/{session}"),
        ask(client, f"/sessions/{session}/messages?limit=1000&attempts=all"),
        ask(client, f"/sessions/{session}/prompts?limit=200"),
        ask(client, "/sessions?limit=200"),
        ask(client, "/outbox?limit=200"),
        ask(client, "/"),
        ask(client, f"/ui/sessions/{session}"),
        ask(client, f"/ui/sessions/{session}/messages/1"),
        ask(client, "/ui/dead"),
        ask(client, "/ui/outbox?state=dead"),
        *(follow(client, session, after) for after in range(50)),
    )
    assert_no_stall(process)


BODIES = {
    "a long prompt": json.dumps({"repo": "o/t", "target_branch": "main", "prompt": "x" * 190_000}),
    "escapes": '{"repo": "o/t", "target_branch": "main", "prompt": "' + "\\u0041" * 170_000 + '"}',
    "brackets": "[" * 1_000_000,
    "many numbers": "[" + "1," * 500_000 + "1]",
    "many keys": "{" + ",".join(f'"{n}":1' for n in range(90_000)) + "}",
    "digits": '{"repo": ' + "1" * 1_000_000 + "}",
    "blanks": " " * 1_000_000,
    "lines": json.dumps({"repo": "o/t", "target_branch": "main", "prompt": "\x7f\u202e \n" * 40_000}),
}


async def test_the_worst_bodies_and_heads_do_not_stall_the_loop(
    process: Process, client: httpx.AsyncClient
) -> None:
    headers = {"Content-Type": "application/json"}
    for body in BODIES.values():
        answers = [await client.post("/sessions", content=body, headers=headers) for _ in range(3)]
        assert {answer.status_code for answer in answers} <= {201, 400, 413, 422}, answers[0].text[:300]
    for name, value in (("Authorization", "Bearer " + "a." * 8000), ("Cookie", "a=b; " * 5000 + "c=d")):
        for _ in range(3):
            with suppress(httpx.RemoteProtocolError):  # refused at its head
                await client.get("/sessions", headers={name: value})
    for _ in range(3):
        await client.get("/sessions?" + "a=b&" * 1900)
        await client.get("/ui/sign-in?back=" + "%2F" * 2500)
    assert_no_stall(process)

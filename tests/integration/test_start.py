"""A worker knows at its start what it cannot do, says so once, and leaves that work to others."""

from pathlib import Path

import httpx
import pytest

from tests.conftest import Connect
from tests.support.process import running
from tests.support.steps import one
from tests.support.worker_env import WorkerEnv


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (
            "OUTWAKE_AGENT_COMMAND",
            'claude "-p',
            "OUTWAKE_AGENT_COMMAND: cannot be split into words: no closing",
        ),
        ("OUTWAKE_AGENT_COMMAND", " ", "OUTWAKE_AGENT_COMMAND: is empty"),
        ("OUTWAKE_AGENT_COMMAND", "no-such-agent -p", "OUTWAKE_AGENT_COMMAND: there is no program 'no-such"),
        ("OUTWAKE_AGENT", "claude", "OUTWAKE_AGENT: claude needs a sandbox that is reached by MCP"),
        ("OUTWAKE_GIT_CREDENTIALS", "/nowhere/credentials", "OUTWAKE_GIT_CREDENTIALS: there is no such file"),
    ],
)
async def test_a_worker_that_cannot_run_sessions_does_not_claim_them_and_says_why(
    database: str, tmp_path: Path, connect: Connect, variable: str, value: str, reason: str
) -> None:
    conn = await connect()
    env = {**WorkerEnv(database, tmp_path).environment, variable: value, "OUTWAKE_HEALTH_PORT": "0"}
    async with running("worker", env=env) as worker:
        said = await worker.event("topic_not_served")
        assert said["topic"] == "session.run"
        assert said["reason"].startswith(reason)
        port = (await worker.event("health_ready"))["port"]
        await worker.event("parked")
        async with httpx.AsyncClient() as client:
            answer = (await client.get(f"http://127.0.0.1:{port}/readyz")).json()
        assert answer["not_served"] == {"session.run": said["reason"]}
        topics = await one(conn, "SELECT topics FROM worker WHERE ended_at IS NULL")
        assert "sandbox.return" in topics
        assert "session.run" not in topics
    # Where it has nothing else to do, it does not start.
    async with running("worker", "--topics", "session.run", env=env) as worker:
        assert await worker.ended() == 2
        assert worker.stderr[-1].startswith(f"worker: {reason}")

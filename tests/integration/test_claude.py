"""The real Claude Code CLI in a session from POST to completed, against a stand-in of the Messages API."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connect
from tests.support.anthropic import one_call, text
from tests.support.api import Api
from tests.support.faults import Fault
from tests.support.process import ROOT, Process, running
from tests.support.production import Production, api, production, rows

__all__ = ["api"]  # fixtures

CLAUDE = ROOT / ".state/claude/node_modules/.bin/claude"
KEY = "sk-ant-planted-key"
LAST_WORDS = "Done: https://git.test/octo/tools/pull/7"

pytestmark = pytest.mark.skipif(
    not CLAUDE.exists(),
    reason="the Claude Code CLI is not installed: "
    + ("run `make claude`" if shutil.which("npm") else "npm is missing, which installs it"),
)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Production]:
    async with production(tmp_path) as made:
        repo = made.sandboxes[0].home / "outwake/repo"
        who = "-c user.name=A -c user.email=a@b"
        commit = (
            f"cd {repo} && echo more >> README.md && git {who} commit -qam 'Say more' && git log --format=%s"
        )
        made.anthropic.script = one_call(commit, LAST_WORDS)
        yield made


def environment(parts: Production, database: str, **more: str) -> dict[str, str | None]:
    return parts.environment(
        database,
        OUTWAKE_AGENT_COMMAND=f"{CLAUDE} -p --output-format stream-json --verbose",
        ANTHROPIC_BASE_URL=parts.anthropic.url,
        ANTHROPIC_API_KEY=KEY,
        **more,
    )


async def messages(api: Api, session: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await api.client.get(f"/sessions/{session['id']}/messages")
    return [message["body"] for message in answer.json()["messages"]]


async def ended(worker: Process, **fields: Any) -> None:
    turn = await worker.event("turn_ended", **fields)
    await worker.event("sandbox_returned", after=turn)


async def test_a_session_from_post_to_completed(parts: Production, database: str, api: Api) -> None:
    async with running("worker", env=environment(parts, database, OUTWAKE_GIT_PUSH="true")) as worker:
        created = await api.create(repo=parts.repo, branch="work", prompt="Say more, please")
        await ended(worker, status="succeeded")
    session = (await api.client.get(f"/sessions/{created['id']}")).json()
    (prompt,) = session["prompts"]
    assert (session["inbox_status"], prompt["status"]) == ("completed", "succeeded")
    result = prompt["result"]
    assert [commit["subject"] for commit in result["commits"]] == ["Say more"]
    assert parts.branches()["work"] == result["head"]
    assert result["pull_request"] == "https://git.test/octo/tools/pull/7"
    agent = result["agent"]
    assert (agent["subtype"], agent["is_error"], agent["num_turns"]) == ("success", False, 2)
    assert agent["total_cost_usd"] > 0
    assert agent["usage"]["output_tokens"] == 40

    bodies = await messages(api, created)
    assert bodies[0]["subtype"] == "init"
    assert bodies[0]["tools"] == ["mcp__sandbox__shell"]  # none that works on this disk
    assert bodies[-1] == agent
    parts_said = [part for body in bodies if body["type"] in ("assistant", "user") for part in _content(body)]
    assert [part["type"] for part in parts_said] == ["text", "tool_use", "tool_result", "text"]
    assert parts_said[2]["content"] == [{"type": "text", "text": "Say more\nBegin\n"}]
    assert parts_said[3]["text"] == LAST_WORDS

    assert parts.anthropic.keys == {KEY}
    first = parts.anthropic.requests[0]
    assert "Say more, please" in str(first["messages"])
    assert f"work tree is at {parts.sandboxes[0].home}/outwake/repo there" in str(first["system"])
    assert not parts.allocator.borrowed
    assert not list((parts.directory / "host").iterdir())


async def test_a_follow_up_resumes_on_another_host(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    async with running("worker", env=environment(parts, database)) as worker:
        created = await api.create(repo=parts.repo, prompt="The first thing")
        await ended(worker, status="succeeded")
    parts.anthropic.script = lambda _: [text("I remember.")]
    env = {**environment(parts, database), "OUTWAKE_WORKSPACE_ROOT": str(parts.directory / "elsewhere")}
    async with running("worker", env=env) as worker:
        answer = await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "The second"})
        assert answer.status_code == 201
        await ended(worker, status="succeeded")
    asked = str(parts.anthropic.requests[-1]["messages"])
    assert all(said in asked for said in ("The first thing", "Say more\\nBegin", LAST_WORDS, "The second"))
    sessions = {body["session_id"] for body in await messages(api, created)}
    assert len(sessions) == 1  # the same conversation goes on
    assert await rows(conn, "SELECT agent_session FROM session_memory") == [(sessions.pop(),)]


async def test_a_prompt_longer_than_an_argument_may_be(parts: Production, database: str, api: Api) -> None:
    parts.anthropic.script = lambda _: [text("Long.")]
    prompt = "-- long: " + "x" * 199_000
    async with running("worker", env=environment(parts, database)) as worker:
        await api.create(repo=parts.repo, prompt=prompt)
        await ended(worker, status="succeeded")
    assert prompt in str(parts.anthropic.requests[0]["messages"])


async def test_a_refusal_of_the_model_fails_the_prompt_with_its_words(
    parts: Production, database: str, api: Api
) -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no such model"}}
    parts.steps.arm("messages", Fault((400, error)))
    async with running("worker", env=environment(parts, database)) as worker:
        created = await api.create(repo=parts.repo, prompt="Hello")
        await ended(worker, status="failed")
    (prompt,) = (await api.client.get(f"/sessions/{created['id']}")).json()["prompts"]
    assert "no such model" in prompt["reason"]
    assert prompt["result"]["agent"]["is_error"] is True


@pytest.mark.parametrize("step", ["messages", "tool"])
async def test_a_killed_worker_takes_the_cli_along_and_another_begins_anew(
    parts: Production, database: str, api: Api, connect: Connect, step: str
) -> None:
    conn = await connect()
    env = environment(parts, database)
    fault = parts.steps.arm(step, Fault())
    async with running("worker", env=env) as victim:
        created = await api.create(repo=parts.repo, prompt="Hello")
        await fault.reached()
        async with running("worker", env=env) as worker:
            await worker.event("parked")
            victim.kill()
            await victim.ended()
            await conn.execute(
                "SELECT outbox_end_worker(id, 'killed') FROM worker WHERE pid = %s", (victim.pid,)
            )
            await ended(worker, status="succeeded")
            fault.release(drop=True)
    await parts.steps.until("every sandbox to be returned", lambda: not parts.allocator.borrowed)
    bodies = await messages(api, created)
    assert bodies[-1]["type"] == "result"
    assert len({body["session_id"] for body in bodies if "session_id" in body}) == 1
    if step == "tool":  # then it had said something: an id is used for one attempt only
        answer = await api.client.get(f"/sessions/{created['id']}/messages?attempts=all")
        everything = [message["body"] for message in answer.json()["messages"]]
        assert len({body["session_id"] for body in everything if "session_id" in body}) == 2


async def test_the_cli_is_not_let_loose_without_the_tools_of_its_sandbox(
    parts: Production, database: str, api: Api
) -> None:
    parts.sandboxes[0].mcp_broken = True
    async with running("worker", env=environment(parts, database)) as worker:
        await api.create(repo=parts.repo, prompt="Hello")
        failed = await worker.event("ended", topic="session.run", state="ready")
        assert failed["reason"] == "the agent can't reach the sandbox's MCP server sandbox"
        parts.sandboxes[0].mcp_broken = False
        await ended(worker, status="succeeded")


async def test_cancelling_ends_the_cli_and_returns_the_sandbox(
    parts: Production, database: str, api: Api
) -> None:
    fault = parts.steps.arm("messages", Fault())
    async with running("worker", env=environment(parts, database)) as worker:
        created = await api.create(repo=parts.repo, prompt="Hello")
        await fault.reached()
        assert (await api.client.post(f"/sessions/{created['id']}/cancel")).is_success
        await worker.event("ended", topic="session.run", state="cancelled")
        await worker.event("sandbox_returned")
        fault.release(drop=True)
    (prompt,) = (await api.client.get(f"/sessions/{created['id']}")).json()["prompts"]
    assert prompt["status"] == "cancelled"


async def test_the_key_is_in_no_argument_table_or_log(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    fault = parts.steps.arm("tool", Fault())
    async with running("worker", env=environment(parts, database)) as worker:
        await api.create(repo=parts.repo, prompt="A prompt that nobody else need read")
        await fault.reached()
        arguments = await asyncio.to_thread(_arguments_of_claude)
        fault.release()
        await ended(worker, status="succeeded")
    assert "--strict-mcp-config" in arguments
    assert KEY not in arguments
    assert "nobody else" not in arguments
    assert not [line for line in worker.stderr if KEY in line]
    tables = await rows(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'outwake'")
    assert ("message",) in tables
    for (table,) in tables:
        assert KEY not in str(await rows(conn, f"SELECT t::text FROM {table} AS t"))


def _arguments_of_claude() -> str:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(CLAUDE) in line:
            lines.append(line)
    return "\n".join(lines)


def _content(body: dict[str, Any]) -> list[dict[str, Any]]:
    return list(body["message"]["content"])

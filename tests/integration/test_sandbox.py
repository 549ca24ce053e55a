"""Sessions in borrowed sandboxes: real workers, and stand-ins that really execute the steps."""

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Connect
from tests.support.api import Api
from tests.support.faults import Fault
from tests.support.git_http import git_server
from tests.support.pages import blocks
from tests.support.process import Process, running
from tests.support.production import Production, api, git, parts, production, rows

__all__ = ["api", "parts"]  # fixtures

COMMIT = (
    "tool: cd {repo} && echo more >> README.md && git add . "
    "&& git -c user.name=A -c user.email=a@b commit -qm 'Say more'"
)


async def follow_up(api: Api, session: dict[str, Any], prompt: str) -> None:
    answer = await api.client.post(f"/sessions/{session['id']}/prompts", json={"prompt": prompt})
    assert answer.status_code == 201, answer.text


async def shown(api: Api, session: dict[str, Any]) -> dict[str, Any]:
    return dict((await api.client.get(f"/sessions/{session['id']}")).json())


async def said(api: Api, session: dict[str, Any]) -> list[str]:
    """What the agent said in all of a session's turns, and its lines that are no JSON."""
    answer = await api.client.get(f"/sessions/{session['id']}/messages")
    texts = []
    for message in answer.json()["messages"]:
        body = message["body"]
        if body["type"] == "assistant" and "message" in body:
            texts.append(body["message"]["content"][0]["text"])
        elif body["type"] == "text":
            texts.append(body["text"])
    return texts


async def ended(worker: Process, **fields: Any) -> None:
    """A turn has ended and its sandbox been returned."""
    turn = await worker.event("turn_ended", **fields)
    await worker.event("sandbox_returned", after=turn)


async def test_a_turn_in_a_sandbox(parts: Production, database: str, api: Api, connect: Connect) -> None:
    conn = await connect()
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt=f"{COMMIT}\nsay: https://h.org/a/b/pull/7")
        await ended(worker, status="succeeded")
    assert not parts.allocator.borrowed
    session = await shown(api, created)
    (prompt,) = session["prompts"]
    assert (session["inbox_status"], prompt["status"]) == ("completed", "succeeded")
    result = prompt["result"]
    assert [commit["subject"] for commit in result["commits"]] == ["Say more"]
    assert result["pull_request"] == "https://h.org/a/b/pull/7"
    assert (result["agent"]["total_cost_usd"], result["agent"]["num_turns"]) == (0.25, 1)
    assert result["agent"]["usage"] == {"input_tokens": 10, "output_tokens": 20}
    ((sandbox, bundle),) = await rows(
        conn, "SELECT s.sandbox, m.bundle FROM session AS s JOIN session_memory AS m ON m.session_id = s.id"
    )
    assert sandbox is None
    assert bundle is not None
    assert not await rows(conn, "SELECT * FROM sandbox_borrow")
    assert parts.branches().keys() == {"main"}  # pushing was not asked for
    assert not list(parts.sandboxes[0].home.iterdir())  # swept
    assert [asked["session_id"] for asked in parts.allocator.asked] == [created["id"]]


async def test_nothing_free_is_no_failure(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    item = parts.allocator.free.pop()
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt="say: hello")
        await worker.event("ended", topic="session.run", state="handed back", reason="no sandbox is free")
        ((state, failures, errors),) = await rows(
            conn, "SELECT state, failures, errors FROM outbox WHERE topic = 'session.run'"
        )
        assert (state, failures, errors) == ("ready", 0, [])
        assert (await shown(api, created))["inbox_status"] == "active"
        assert not await rows(conn, "SELECT * FROM sandbox_borrow")
        await parts.allocator.submit(item)
        await ended(worker, status="succeeded")
    ((attempt, failures),) = await rows(
        conn, "SELECT attempt, failures FROM outbox WHERE topic = 'session.run'"
    )
    assert attempt > 1
    assert failures == 0


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
async def test_an_answer_that_comes_too_late_is_returned(
    parts: Production, database: str, api: Api, connect: Connect, how: str
) -> None:
    conn = await connect()
    fault = parts.steps.arm("borrow done", Fault())
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt="say: hello")
        await fault.reached()
        if how == "cancelled":
            assert (await api.client.post(f"/sessions/{created['id']}/cancel")).is_success
        else:
            await conn.execute("DELETE FROM session WHERE id = %s", (created["id"],))
        fault.release()
        await worker.event("borrowed_too_late")
        await worker.event("sandbox_returned")
    assert not parts.allocator.borrowed
    assert not await rows(conn, "SELECT * FROM sandbox_borrow")


async def test_an_answer_to_a_fenced_attempt_is_returned(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    """The attempt is given to another worker, which waits for the only sandbox until it is returned."""
    conn = await connect()
    fault = parts.steps.arm("borrow done", Fault())
    env = parts.environment(database)
    async with running("worker", "--concurrency", "1", env=env) as first:
        created = await api.create(repo=parts.repo, prompt="say: hello")
        await fault.reached()
        async with running("worker", env=env) as second:
            await second.event("parked")
            await conn.execute(
                "SELECT outbox_end_worker(id, 'test') FROM worker WHERE pid = %s", (first.pid,)
            )
            await second.event("ended", topic="session.run", state="handed back")
            fault.release()
            await first.event("borrowed_too_late")
            # From here on either may do the work: the first comes back under a new id.
            async with api.follow(created["id"]) as events:
                await events.status(inbox_status="completed")
            await parts.steps.until("every sandbox to be returned", lambda: not parts.allocator.borrowed)
    assert [prompt["status"] for prompt in (await shown(api, created))["prompts"]] == ["succeeded"]
    assert not await rows(conn, "SELECT * FROM sandbox_borrow")


async def test_a_borrow_without_an_answer_is_shown_as_a_suspected_leak(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    parts.steps.arm("borrow done", Fault((504, "gateway timeout")))
    async with running("worker", env=parts.environment(database)) as worker:
        await api.create(repo=parts.repo, prompt="say: hello")
        await worker.event("borrow_unclear")
        await worker.event("ended", topic="session.run", state="ready")
    ((_, session, attempt, _, error),) = await rows(conn, blocks("sandbox.md", "sql")[0])
    assert "504" in error
    assert attempt == 1
    assert [str(session)] == [asked["session_id"] for asked in parts.allocator.asked][:1]
    assert len(parts.allocator.borrowed) == 1


async def test_a_session_that_is_deleted_owes_the_return(parts: Production, connect: Connect) -> None:
    conn = await connect()
    held = {"item": 1, "borrow_token": "x"}
    await conn.execute(
        "INSERT INTO session (repo, target_branch, branch, title, sandbox) VALUES ('a/b', 'm', 'w', 't', %s)",
        (Jsonb(held),),
    )
    await conn.execute("DELETE FROM session")
    ((payload,),) = await rows(conn, "SELECT payload FROM outbox WHERE topic = 'sandbox.return'")
    assert payload["sandbox"] == held


async def test_a_return_that_is_refused_is_tried_again(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    parts.steps.arm("return", Fault((500, {"err": "broken"})))
    async with running("worker", env=parts.environment(database)) as worker:
        await api.create(repo=parts.repo, prompt="say: hello")
        failed = await worker.event("ended", topic="sandbox.return", state="ready")
        ((_, _, _, error),) = await rows(conn, blocks("sandbox.md", "sql")[1])
        assert "500" in error
        await worker.event("sandbox_returned", after=failed)
    assert not parts.allocator.borrowed


async def test_a_follow_up_goes_on_from_commits_and_transcript_on_another_host(
    parts: Production, database: str, api: Api
) -> None:
    env = parts.environment(database, host="first")
    async with running("worker", env=env) as worker:
        created = await api.create(repo=parts.repo, prompt=COMMIT)
        await ended(worker, status="succeeded")
    assert not list((parts.directory / "first").iterdir())
    env = parts.environment(database, host="second")
    async with running("worker", env=env) as worker:
        await follow_up(api, created, "tool: cd {repo} && cat README.md && git log --format=%s")
        await ended(worker, status="succeeded")
    texts = await said(api, created)
    assert texts[-2:] == ["I remember 2 prompts.", "Hello\nmore\nSay more\nBegin\n"]
    first, second = (prompt["result"] for prompt in (await shown(api, created))["prompts"])
    assert first["head"] == second["head"]
    assert second["commits"] == []


@pytest.mark.parametrize(
    ("left_by", "remembered"),
    [("claude", 2), (None, 2), ("another", 1)],
    ids=["same", "no kind", "another"],
)
async def test_an_agent_resumes_only_what_its_own_kind_left(
    parts: Production, database: str, api: Api, connect: Connect, left_by: str | None, remembered: int
) -> None:
    """A row without a kind is of a version that had no other agent with a memory."""
    conn = await connect()
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt=COMMIT)
        await ended(worker, status="succeeded")
        assert await rows(conn, "SELECT agent FROM session_memory") == [("claude",)]
    await conn.execute("UPDATE session_memory SET agent = %s", (left_by,))
    async with running("worker", env=parts.environment(database)) as worker:
        await follow_up(api, created, "say: Here I am.")
        await ended(worker, status="succeeded")
    assert (await said(api, created))[-2:] == [f"I remember {remembered} prompts.", "Here I am."]
    assert await rows(conn, "SELECT agent FROM session_memory") == [("claude",)]


async def test_what_the_agent_left_uncommitted_is_committed(
    parts: Production, database: str, api: Api
) -> None:
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt="tool: cd {repo} && echo new > NEW")
        await ended(worker, status="succeeded")
    (prompt,) = (await shown(api, created))["prompts"]
    subjects = [commit["subject"] for commit in prompt["result"]["commits"]]
    assert subjects == ["Save what the agent left uncommitted"]


async def test_a_kept_sandbox_serves_the_follow_up(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    env = parts.environment(database, OUTWAKE_SANDBOX_KEEP="1000")
    async with running("worker", env=env) as worker:
        created = await api.create(repo=parts.repo, prompt="tool: cd {repo} && echo x > .git/left")
        first = await worker.event("turn_ended", status="succeeded")
        await follow_up(api, created, "tool: cd {repo} && cat .git/left")
        await worker.event("turn_ended", after=first, status="succeeded")
        assert (await said(api, created))[-1] == "x\n"
        assert len(parts.allocator.asked) == 1
        assert len(parts.allocator.borrowed) == 1
        # Each turn left a row that returns it in time. The first comes while the sandbox is promised for
        # longer; the last when nobody needs it any more.
        earlier, last = await rows(conn, "SELECT id FROM outbox WHERE topic = 'sandbox.return' ORDER BY id")
        await conn.execute("UPDATE outbox SET available_at = now() WHERE id = %s", earlier)
        await worker.event("sandbox_kept", outbox_id=earlier[0])
        await conn.execute(
            "UPDATE session SET sandbox = sandbox || jsonb_build_object('keep_until', now() - interval '1 s')"
        )
        await conn.execute("UPDATE outbox SET available_at = now() WHERE id = %s", last)
        await worker.event("sandbox_returned", outbox_id=last[0])
    assert not parts.allocator.borrowed
    assert await rows(conn, "SELECT sandbox FROM session") == [(None,)]


async def test_a_kept_sandbox_that_is_broken_is_returned_and_another_borrowed(
    tmp_path: Path, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    async with production(tmp_path, sandboxes=2) as parts:
        env = parts.environment(database, OUTWAKE_SANDBOX_KEEP="1000")
        async with running("worker", env=env) as worker:
            created = await api.create(repo=parts.repo, prompt=COMMIT)
            first = await worker.event("turn_ended", status="succeeded")
            parts.steps.arm("exec", Fault((500, {})))
            await follow_up(api, created, "tool: cd {repo} && git log --format=%s")
            await worker.event("turn_ended", after=first, status="succeeded")
            await worker.event("sandbox_returned")
        assert (await said(api, created))[-1] == "Say more\nBegin\n"
        ((token,),) = await rows(conn, "SELECT sandbox ->> 'borrow_token' FROM session")
        assert set(parts.allocator.borrowed) == {token}


async def test_the_work_branch_is_pushed(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    async with running("worker", env=parts.environment(database, OUTWAKE_GIT_PUSH="true")) as worker:
        created = await api.create(repo=parts.repo, branch="work", prompt=COMMIT)
        await ended(worker, status="succeeded")
        (prompt,) = (await shown(api, created))["prompts"]
        assert parts.branches()["work"] == prompt["result"]["head"]
        assert await rows(conn, "SELECT bundle FROM session_memory") == [(None,)]

        # Somebody else moves the branch while the agent works: theirs is not overwritten, ours is kept.
        fault = parts.steps.arm("tool", Fault())
        await follow_up(api, created, COMMIT)
        await fault.reached()
        parts.git("update-ref", "refs/heads/work", "refs/heads/main")
        fault.release()
        await worker.event("push_failed")
        await ended(worker, status="failed")
    prompt = (await shown(api, created))["prompts"][1]
    assert prompt["reason"] == "the work branch was not pushed: somebody else has moved it"
    assert parts.branches()["work"] == parts.branches()["main"]
    assert (await rows(conn, "SELECT bundle IS NOT NULL FROM session_memory")) == [(True,)]


@pytest.mark.parametrize("push", [True, False])
async def test_a_branch_is_saved_though_the_repository_has_its_commits_under_another_name(
    parts: Production, database: str, api: Api, push: bool
) -> None:
    feature = parts.git("commit-tree", "-p", "main", "-m", "Feature", "main^{tree}")
    parts.git("update-ref", "refs/heads/feature", feature)
    async with running("worker", env=parts.environment(database, OUTWAKE_GIT_PUSH=str(push))) as worker:
        created = await api.create(
            repo=parts.repo, branch="work", prompt="tool: cd {repo} && git merge -q --ff-only origin/feature"
        )
        await ended(worker, status="succeeded")
        assert parts.branches().get("work") == (feature if push else None)
        await follow_up(api, created, "tool: cd {repo} && git log --format=%s")
        await worker.event("sandbox_returned", after=await worker.event("sandbox_returned"))
    assert (await said(api, created))[-1] == "Feature\nBegin\n"


async def test_an_agent_that_fails_says_why(parts: Production, database: str, api: Api) -> None:
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt="fail")
        await ended(worker, status="failed")
    (prompt,) = (await shown(api, created))["prompts"]
    assert prompt["reason"] == "the agent reported I was told to fail"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_branch": "missing"}, "the repository has no branch missing"),
        ({"repo": "file:///nowhere/at/all.git"}, "cannot clone the repository: "),
    ],
)
async def test_what_cannot_be_cloned_fails_for_good_and_returns_the_sandbox(
    parts: Production, database: str, api: Api, fields: dict[str, str], reason: str
) -> None:
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(**{"repo": parts.repo, "prompt": "say: hello", **fields})
        await worker.event("ended", topic="session.run", state="dead")
        await worker.event("sandbox_returned")
    (prompt,) = (await shown(api, created))["prompts"]
    assert prompt["status"] == "failed"
    assert prompt["reason"].startswith(reason)


async def test_an_agent_that_breaks_the_repository_is_not_run_again(
    parts: Production, database: str, api: Api
) -> None:
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt="tool: rm -rf {repo}/.git")
        await ended(worker, status="failed")
        assert sum(event["event"] == "agent_started" for event in worker.events) == 1
    (prompt,) = (await shown(api, created))["prompts"]
    assert prompt["reason"].startswith("cannot save the work branch: fatal: not a git repository")


async def test_names_reach_the_shell_quoted(parts: Production, database: str, api: Api) -> None:
    """What names may hold, and a directory whose path a shell would take apart."""
    odd = parts.directory / "it's $HOME (here)"
    odd.mkdir()
    git(odd, "clone", "--quiet", "--bare", str(parts.origin), "origin.git")
    url = f"file://{odd}/origin.git".replace("'", "%27").replace("$", "%24").replace(" ", "%20")
    async with running("worker", env=parts.environment(database, OUTWAKE_GIT_PUSH="true")) as worker:
        await api.create(repo=url, branch="it@#=,()-work", prompt=COMMIT)
        await ended(worker, status="succeeded")
    assert "it@#=,()-work" in git(odd / "origin.git", "for-each-ref", "--format=%(refname)")


async def test_long_lines_and_lines_that_are_no_json(parts: Production, database: str, api: Api) -> None:
    size = int(os.environ.get("OUTWAKE_TEST_BIGLINE", 3 * 2**20))
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt=f"raw: no JSON\nbigline: {size}\nsay: after it")
        await ended(worker, status="succeeded")
    answer = await api.client.get(f"/sessions/{created['id']}/messages")
    bodies = [message["body"] for message in answer.json()["messages"]]
    assert [body["type"] for body in bodies] == [
        *("system", "assistant", "text", "truncated", "assistant", "result")
    ]
    assert bodies[2]["text"] == "no JSON"
    assert bodies[3]["bytes"] > size


async def test_the_api_of_the_agent_gets_no_more_of_our_environment_than_it_needs(
    parts: Production, database: str, api: Api
) -> None:
    env = parts.environment(database, ANTHROPIC_MODEL="some-model", UNRELATED="not for agents")
    async with running("worker", env=env) as worker:
        created = await api.create(repo=parts.repo, prompt="environment")
        await ended(worker, status="succeeded")
    environment, arguments = json.loads((await said(api, created))[-1])
    assert environment["ANTHROPIC_MODEL"] == "some-model"
    assert "UNRELATED" not in environment
    assert "DATABASE_URL" not in environment
    assert environment["HOME"].startswith(str(parts.directory))
    assert "environment" not in arguments  # the prompt comes by stdin
    assert not Path(environment["HOME"]).exists()


async def test_credentials_open_the_repository_and_are_removed_again(
    parts: Production, database: str, api: Api, tmp_path: Path
) -> None:
    """A repository over HTTPS that asks for a password, read and written; each user has a file."""
    directory = tmp_path / "credentials"
    directory.mkdir()
    async with git_server(parts.directory, "bot", "right-token") as (url, certificate):
        parts.sandboxes[0].environment["GIT_SSL_CAINFO"] = str(certificate)
        host = url.removeprefix("https://")
        env = parts.environment(
            database,
            OUTWAKE_GIT_CREDENTIALS=str(directory),
            OUTWAKE_GIT_PUSH="true",
            OUTWAKE_GIT_ALLOW="127.0.0.1",
        )
        async with running("worker", env=env) as worker:
            none = await api.create(repo=f"{url}/origin.git", prompt=COMMIT)
            refused = await worker.event("ended", topic="session.run", state="dead")
            (directory / "local").write_text(f"https://bot:wrong-token@{host}\n")
            wrong = await api.create(repo=f"{url}/origin.git", prompt=COMMIT)
            await worker.event("ended", after=refused, topic="session.run", state="dead")
            (directory / "local").write_text(f"https://bot:right-token@{host}\n")
            right = await api.create(repo=f"{url}/origin.git", branch="work", prompt=COMMIT)
            await ended(worker, status="succeeded")
    for session in (none, wrong):
        (prompt,) = (await shown(api, session))["prompts"]
        assert prompt["reason"].startswith("cannot clone the repository: ")
        assert "token" not in prompt["reason"]
    (prompt,) = (await shown(api, right))["prompts"]
    assert parts.branches()["work"] == prompt["result"]["head"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("moved/origin.git", "The requested URL returned error: 30"),
        ("refused/origin.git", "The requested URL returned error: 403"),
    ],
)
async def test_redirects_are_refused_and_a_hosts_words_not_read_back(
    parts: Production, database: str, api: Api, path: str, said: str
) -> None:
    async with git_server(parts.directory, "bot", "token") as (url, certificate):
        parts.sandboxes[0].environment["GIT_SSL_CAINFO"] = str(certificate)
        async with running(
            "worker", env=parts.environment(database, OUTWAKE_GIT_ALLOW="127.0.0.1")
        ) as worker:
            created = await api.create(repo=f"{url}/{path}", prompt="say: hello")
            await worker.event("ended", topic="session.run", state="dead")
    (prompt,) = (await shown(api, created))["prompts"]
    assert said in prompt["reason"]
    assert "SECRET" not in prompt["reason"]


async def test_a_repository_in_our_network_is_refused_before_a_sandbox_is_asked_for(
    parts: Production, database: str, api: Api
) -> None:
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo="https://127.0.0.2:15862/x.git", prompt="say: hello")
        await worker.event("ended", topic="session.run", state="dead")
    (prompt,) = (await shown(api, created))["prompts"]
    assert prompt["reason"] == "the repository's host is not public (OUTWAKE_GIT_ALLOW)"
    assert not parts.allocator.asked


SECRETS = {
    "git": "planted-git-token",
    "other": "planted-git-other",
    "key": "planted-api-key",
}


async def test_planted_secrets_are_nowhere(
    parts: Production, database: str, api: Api, connect: Connect, tmp_path: Path
) -> None:
    """The agent prints its environment, git fails and quotes what it was given, and yet nothing is seen."""
    conn = await connect()
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "local").write_text(f"https://bot:{SECRETS['git']}@git.test\n")
    (credentials / "else").write_text(f"https://bot:{SECRETS['other']}@git.test\n")
    env = parts.environment(
        database,
        OUTWAKE_GIT_CREDENTIALS=str(credentials),
        OUTWAKE_GIT_PUSH="true",
        ANTHROPIC_API_KEY=SECRETS["key"],
    )
    seen: list[str] = []
    fault = parts.steps.arm("exec", Fault(), nth=2)  # the clone: the credentials are there
    async with running("worker", env=env) as worker:
        created = await api.create(repo=parts.repo, prompt=f"{COMMIT}\nenvironment\nfail")
        await fault.reached()
        home = parts.sandboxes[0].home / "outwake"
        assert SECRETS["git"] in (home / "git-credentials").read_text()
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        fault.release()
        tool = parts.steps.arm("tool", Fault())
        await tool.reached()
        assert not (home / "git-credentials").exists()
        seen.append(await asyncio.to_thread(_all_arguments))
        tool.release()
        await ended(worker, status="failed")
        await follow_up(api, created, "say: again")
        # The second turn can't clone, and git's words quote the token.
        words = f"fatal: unable to access 'https://bot:{SECRETS['git']}@git.test/': {SECRETS['git']}"
        lie = {"success": True, "data": {"status": "completed", "exit_code": 128, "output": words}}
        parts.steps.arm("exec", Fault((200, lie)), nth=2)
        await worker.event("ended", topic="session.run", state="ready")
    assert any(path == "git-credentials" for path in parts.sandboxes[0].written)
    assert str(await said(api, created)).count("***") > 0  # the agent did print its key
    seen += worker.stderr + worker.stdout + parts.sandboxes[0].commands
    tables = await rows(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'outwake'")
    assert ("message",) in tables
    for (table,) in tables:
        seen += [str(row) for row in await rows(conn, f"SELECT t::text FROM {table} AS t")]
    seen += [str(json.dumps(params)) for params in parts.allocator.asked]
    assert sum(map(len, seen)) > 10_000
    for name, secret in SECRETS.items():
        assert not [line for line in seen if secret in line], name


def _all_arguments() -> str:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    assert any("stub_claude" in line for line in lines)
    return "\n".join(lines)


async def test_an_agent_runs_once_though_its_work_cannot_be_read_at_first(
    parts: Production, database: str, api: Api
) -> None:
    """The sandbox fails while the work is saved, twice. The step is tried again, not the agent."""
    steps = parts.steps
    async with running("worker", env=parts.environment(database)) as worker:
        tool = steps.arm("tool", Fault())
        created = await api.create(repo=parts.repo, prompt=COMMIT)
        await tool.reached()
        for number in (1, 2):
            steps.arm("exec", Fault((500, {})), nth=number)
        tool.release()
        await ended(worker, status="succeeded")
        started = [event for event in worker.events if event["event"] == "agent_started"]
    assert len(started) == 1
    (prompt,) = (await shown(api, created))["prompts"]
    assert [commit["subject"] for commit in prompt["result"]["commits"]] == ["Say more"]


async def test_an_agent_runs_once_though_its_sandbox_goes_away(
    parts: Production, database: str, api: Api, connect: Connect
) -> None:
    """What it did is lost, and the verdict says so. The conversation is kept, and so is the earlier work."""
    conn = await connect()
    async with running("worker", env=parts.environment(database)) as worker:
        created = await api.create(repo=parts.repo, prompt=COMMIT)
        await ended(worker, status="succeeded")
        before = await rows(conn, "SELECT bundle FROM session_memory")
        tool = parts.steps.arm("tool", Fault())
        await follow_up(api, created, COMMIT)
        await tool.reached()
        for number in range(1, 10):
            parts.steps.arm("exec", Fault((500, {})), nth=number)
        tool.release()
        await worker.event("turn_ended", status="failed")
        started = [event for event in worker.events if event["event"] == "agent_started"]
    assert len(started) == 2
    prompt = (await shown(api, created))["prompts"][1]
    assert "the sandbox answered shell/exec with status 500" in prompt["reason"]
    assert await rows(conn, "SELECT bundle FROM session_memory") == before
    ((status,),) = await rows(
        conn, "SELECT state FROM outbox WHERE topic = 'session.run' ORDER BY id DESC LIMIT 1"
    )
    assert status == "done"

"""From the end of a turn to a pull request: real workers, git over HTTPS, a stand-in of GitHub's API."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb
from starlette.responses import Response

from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.faults import Fault, Steps
from tests.support.git_http import git_server
from tests.support.github import GitHub, github
from tests.support.loopback import loopback
from tests.support.process import Event, Process, running
from tests.support.production import Production, git, production, rows

TOKEN = "planted-token-of-the-host"
COMMIT = (
    "Say more,\tplease\n"
    "tool: cd {repo} && date +%N >> README.md && git commit -qam 'Say more'\n"
    "say: see https://git.test/octo/tools/pull/99"
)


@dataclass
class Place:
    """A repository at a host with GitHub's API, and what a worker needs for both."""

    parts: Production
    host: GitHub
    repo: str
    settings: dict[str, str]
    credentials: Path

    def environment(self, database: str, **more: str) -> dict[str, str | None]:
        return self.parts.environment(database, **{**self.settings, **more})


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with (
        production(tmp_path) as parts,
        loopback() as server,
        git_server(tmp_path, "bot", TOKEN) as (url, certificate),
    ):
        git(tmp_path, "clone", "--quiet", "--bare", str(parts.origin), "octo/tools.git")
        parts.sandboxes[0].environment["GIT_SSL_CAINFO"] = str(certificate)
        credentials = tmp_path / "credentials"
        credentials.write_text(f"{url.replace('//', f'//bot:{TOKEN}@')}\n")
        with github(server, Steps(), TOKEN) as host:
            settings = {
                "OUTWAKE_PULL_REQUESTS": "draft",
                "OUTWAKE_GIT_HOSTS": f"{url.removeprefix('https://')}=github:{host.url}",
                "OUTWAKE_GIT_PUSH": "true",
                "OUTWAKE_GIT_ALLOW": "127.0.0.1",
                "OUTWAKE_GIT_CREDENTIALS": str(credentials),
                "OUTWAKE_LEASE": "2",
            }
            yield Place(parts, host, f"{url}/octo/tools.git", settings, credentials)


@pytest.fixture
async def api(database: str) -> AsyncIterator[Api]:
    async with serving(database) as made:
        yield made


async def shown(api: Api, session: dict[str, Any]) -> dict[str, Any]:
    return dict((await api.client.get(f"/sessions/{session['id']}")).json())


async def follow_up(api: Api, session: dict[str, Any], prompt: str) -> None:
    answer = await api.client.post(f"/sessions/{session['id']}/prompts", json={"prompt": prompt})
    assert answer.status_code == 201, answer.text


async def failed(worker: Process, state: str, after: Event | None = None) -> Event:
    """An attempt of the row has failed, and left it so."""
    return await worker.event("ended", after=after, topic="pull_request.open", state=state)


async def proposed(connect: Connect) -> list[tuple[Any, ...]]:
    conn = await connect()
    return await rows(conn, "SELECT id FROM outbox WHERE topic = 'pull_request.open' ORDER BY id")


async def test_a_turn_that_pushed_commits_opens_one_for_its_session(
    place: Place, database: str, api: Api, connect: Connect
) -> None:
    env = place.environment(database, OUTWAKE_PUBLIC_URL="https://outwake.test")
    async with running("worker", env=env) as worker:
        created = await api.create(repo=place.repo, branch="work", prompt=COMMIT)
        opened = await worker.event("pull_request_opened", existed=False)
        await follow_up(api, created, COMMIT)
        again = await worker.event("turn_ended", after=opened)
        await worker.event("sandbox_returned", after=again)
    session = await shown(api, created)
    expected = {"url": "https://github.test/octo/tools/pull/7", "number": 7, "error": None}
    assert session["pull_request"] == expected
    first, second = (prompt["result"] for prompt in session["prompts"])
    assert (first["pushed"], second["pushed"]) == (True, True)
    # What the agent said stays what the agent said.
    assert first["pull_request"] == "https://git.test/octo/tools/pull/99"
    assert place.host.opened == [
        {
            "title": "Say more,please",
            "head": "work",
            "base": "main",
            "body": f"Outwake session https://outwake.test/ui/sessions/{created['id']}\n",
            "draft": True,
        }
    ]
    assert len(await proposed(connect)) == 1
    page = (await api.client.get(f"/ui/sessions/{created['id']}")).text
    assert 'href="https://github.test/octo/tools/pull/7"' in page
    env = {"DATABASE_URL": database}
    async with running("outwake", "tail", created["id"], "--until-completed", env=env) as tail:
        assert await tail.ended() == 0
    assert "pull request: https://github.test/octo/tools/pull/7" in "\n".join(tail.stdout)
    conn = await connect()
    history = await rows(conn, "SELECT event FROM session_history(%s)", created["id"])
    assert ("pull_request.open done",) in history


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"OUTWAKE_PULL_REQUESTS": "off"}, COMMIT),
        ({"OUTWAKE_PULL_REQUESTS": ""}, COMMIT),
        ({"OUTWAKE_GIT_PUSH": "false"}, COMMIT),
        ({"OUTWAKE_GIT_HOSTS": ""}, COMMIT),
        ({}, "say: nothing to do"),
    ],
    ids=["off", "default", "no push", "plain host", "no commits"],
)
async def test_there_is_none_unless_all_that_it_needs_is_there(
    place: Place, database: str, api: Api, connect: Connect, changes: dict[str, str], prompt: str
) -> None:
    async with running("worker", env=place.environment(database, **changes)) as worker:
        created = await api.create(repo=place.repo, prompt=prompt)
        turn = await worker.event("turn_ended", status="succeeded")
        await worker.event("sandbox_returned", after=turn)
    assert await proposed(connect) == []
    assert (await shown(api, created))["pull_request"] is None
    assert place.host.steps.met == []


async def test_a_refusal_is_told_and_the_next_turn_tries_again(
    place: Place, database: str, api: Api, connect: Connect
) -> None:
    place.host.token = "another"
    env = place.environment(database, OUTWAKE_PULL_REQUESTS="ready")
    async with running("worker", env=env) as worker:
        created = await api.create(repo=place.repo, prompt=COMMIT)
        dead = await failed(worker, "dead")
        session = await shown(api, created)
        assert session["pull_request"]["url"] is None
        assert session["pull_request"]["error"].endswith("answered 401: the token is not valid")
        assert session["prompts"][0]["status"] == "succeeded"
        place.host.token = TOKEN
        await follow_up(api, created, COMMIT)
        await worker.event("pull_request_opened", after=dead)
    session = await shown(api, created)
    assert (session["pull_request"]["number"], session["pull_request"]["error"]) == (7, None)
    assert [body["draft"] for body in place.host.opened] == [False]
    assert len(await proposed(connect)) == 2
    conn = await connect()
    seen = worker.stderr + worker.stdout + place.parts.sandboxes[0].commands
    for (table,) in await rows(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'outwake'"):
        seen += [str(row) for row in await rows(conn, f"SELECT t::text FROM {table} AS t")]
    assert not [line for line in seen if TOKEN in line]


async def test_what_may_pass_is_tried_again_and_nothing_else_is(
    place: Place, database: str, api: Api, connect: Connect
) -> None:
    conn = await connect()
    limited = Response(status_code=429, headers={"Retry-After": "600"})
    place.host.answers["open"] += [limited, Response(status_code=500)]
    later = "UPDATE outbox SET available_at = clock_timestamp() WHERE topic = 'pull_request.open'"
    async with running("worker", env=place.environment(database)) as worker:
        created = await api.create(repo=place.repo, prompt=COMMIT)
        first = await failed(worker, "ready")
        ((kept_away,),) = await rows(
            conn,
            "SELECT available_at > clock_timestamp() + interval '9 minutes' FROM outbox"
            " WHERE topic = 'pull_request.open'",
        )
        assert kept_away
        assert "429" in (await shown(api, created))["pull_request"]["error"]
        await conn.execute(later)
        second = await failed(worker, "ready", after=first)
        await conn.execute(later)
        await worker.event("pull_request_opened", after=second)
        assert sum(event["event"] == "agent_started" for event in worker.events) == 1
    assert (await shown(api, created))["pull_request"]["number"] == 7


async def test_a_worker_that_dies_after_the_host_has_opened_it_leaves_one(
    place: Place, database: str, api: Api
) -> None:
    fault = place.host.steps.arm("open done", Fault())
    async with running("worker", env=place.environment(database)) as worker:
        created = await api.create(repo=place.repo, prompt=COMMIT)
        await fault.reached()
        worker.kill()
        await worker.ended()
        fault.release()
    assert (await shown(api, created))["pull_request"] is None
    async with running("worker", env=place.environment(database)) as worker:
        await worker.event("pull_request_opened", existed=True)
    assert (await shown(api, created))["pull_request"]["number"] == 7
    assert len(place.host.opened) == 1


async def test_commits_that_a_dead_attempt_pushed_get_one_too(
    place: Place, database: str, api: Api, connect: Connect
) -> None:
    """The worker dies between the push and the end of the turn; the next attempt finds nothing to commit."""
    conn = await connect()
    once = "cd {repo} && git log --format=%s | grep -q Say || (echo x >> README.md; git commit -qam Say)"
    env = place.environment(database)
    async with running("worker", env=env) as worker, conn.transaction(force_rollback=True):
        created = await api.create(repo=place.repo, branch="work", prompt=f"tool: {once}")
        await worker.event("agent_started")
        await conn.execute("SELECT FROM prompt FOR NO KEY UPDATE")  # so that the turn cannot end
        await worker.event("pushed")
        worker.kill()
        await worker.ended()
    async with running("worker", env=env) as worker:
        await worker.event("pull_request_opened")
    session = await shown(api, created)
    assert session["prompts"][0]["result"]["commits"] == []
    assert session["pull_request"]["number"] == 7


@pytest.mark.parametrize("payload", [{}, {"session_id": "x"}, [], {"session_id": None, "draft": 7}])
async def test_a_row_with_nonsense_ends(
    place: Place, database: str, connect: Connect, payload: object
) -> None:
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, payload) VALUES ('pull_request.open', %s)", (Jsonb(payload),)
    )
    async with running("worker", env=place.environment(database)) as worker:
        await failed(worker, "dead")

"""API tokens: made, used, listed and revoked, by the command and over HTTP."""

import shlex
import time
from datetime import datetime
from uuid import UUID

import httpx
import pytest

from outwake.app.auth import identity, oidc, tokens
from outwake.session import token
from tests.conftest import Connect
from tests.support.api import serving
from tests.support.issuer import bearer, issuing
from tests.support.process import ROOT, running
from tests.support.steps import Connection, one
from tests.support.waits import eventually

TOKENS_ONLY = {"OUTWAKE_REQUIRE_TOKEN": True}


async def outwake(database: str, *arguments: str, status: int = 0) -> tuple[list[str], list[str]]:
    """Run `outwake token …`; its output and its errors."""
    async with running("outwake", "token", *arguments, env={"DATABASE_URL": database}) as process:
        assert await process.ended() == status, process.stderr
    return process.stdout, process.stderr


async def test_a_token_from_its_making_to_its_end(
    database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_AGE", 0.0)
    [text], told = await outwake(database, "create", "--user", "robot", "--name", "nightly build")
    assert token.is_token(text)
    token_id = told[0].split()[1]
    async with serving(database, **TOKENS_ONLY) as api:
        assert (await api.client.get("/sessions")).status_code == 401
        asked = {"repo": "octo/tools", "target_branch": "main"}
        created = await api.client.post("/sessions", json=asked, headers=bearer(text))
        assert (created.status_code, created.json()["user_id"]) == (201, "robot")
        assert (await api.client.get("/outbox", headers=bearer(text))).status_code == 403

        listed, _ = await outwake(database, "list")
        assert len(listed) == 2
        assert listed[1].split()[:2] == [token_id, "valid"]
        assert "nightly build" in listed[1]
        assert text[8:] not in "".join(listed)

        assert (await outwake(database, "revoke", token_id))[0] == [f"{token_id} revoked"]
        assert (await api.client.get("/sessions", headers=bearer(text))).status_code == 401
        await outwake(database, "revoke", token_id, status=1)
        assert "revoked" in (await outwake(database, "list"))[0][1]


async def test_the_pages_commands(database: str) -> None:
    page = (ROOT / "docs" / "authentication.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("outwake token ")]
    assert [command[2] for command in commands] == ["create", "list", "revoke"]
    _, told = await outwake(database, *commands[0][2:])
    await outwake(database, *commands[1][2:])
    await outwake(database, "revoke", told[0].split()[1])


async def test_an_operators_token_sees_all(database: str) -> None:
    [text], _ = await outwake(
        database, "create", "--user", "ops", "--name", "ops", "--operator", "--days", "30"
    )
    async with serving(database, **TOKENS_ONLY) as api:
        assert (await api.client.get("/outbox", headers=bearer(text))).status_code == 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--user", "", "--name", "x"],
        ["create", "--user", "a\nb", "--name", "x"],
        ["create", "--user", "a", "--name", ""],
        ["create", "--user", "a", "--name", "x", "--days", "0"],
        ["create", "--user", "a", "--name", "x", "--days", "1e3"],
        ["create", "--name", "x"],
        ["revoke", "1"],
        [],
    ],
)
async def test_wrong_arguments_are_status_2(database: str, arguments: list[str]) -> None:
    _, told = await outwake(database, *arguments, status=2)
    assert len(told) == 1
    assert "--help" in told[0]


async def use(database: str, text: str, *, status: int = 200) -> None:
    """Ask a new API process, which remembers no token."""
    async with serving(database, **TOKENS_ONLY) as api:
        assert (await api.client.get("/sessions", headers=bearer(text))).status_code == status


async def noted(conn: Connection) -> datetime | None:
    found: datetime | None = await one(conn, "SELECT last_used_at FROM api_token")
    return found


async def test_use_is_noted(database: str, connect: Connect) -> None:
    conn = await connect()
    _, text = await token.create(conn, "robot", "x")
    assert await noted(conn) is None
    await use(database, text)
    assert await noted(conn) is not None


async def test_use_is_noted_once_a_minute(database: str, connect: Connect) -> None:
    conn = await connect()
    _, text = await token.create(conn, "robot", "x")
    await use(database, text)
    first = await noted(conn)
    await use(database, text)
    assert await noted(conn) == first
    await conn.execute("UPDATE api_token SET last_used_at = last_used_at - interval '61 seconds'")
    await use(database, text)
    again = await noted(conn)
    assert first is not None
    assert again is not None
    assert again > first


@pytest.mark.parametrize(("max_age", "status"), [(3600.0, 200), (0.0, 401)])
async def test_a_token_is_asked_for_once_each_max_age(
    database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch, max_age: float, status: int
) -> None:
    """So long a process does not see that it was revoked."""
    monkeypatch.setattr(tokens, "MAX_AGE", max_age)
    conn = await connect()
    _, text = await token.create(conn, "robot", "x")
    async with serving(database, **TOKENS_ONLY) as api:
        assert (await api.client.get("/sessions", headers=bearer(text))).status_code == 200
        await conn.execute("UPDATE api_token SET revoked_at = clock_timestamp()")
        assert (await api.client.get("/sessions", headers=bearer(text))).status_code == status


async def test_in_development_mode_an_api_token_is_still_judged(database: str, connect: Connect) -> None:
    token_id, text = await token.create(await connect(), "robot", "x")
    assert isinstance(token_id, UUID)
    async with serving(database) as api:
        assert (await api.client.get("/outbox")).status_code == 200
        assert (await api.client.get("/outbox", headers=bearer(text))).status_code == 403
        unknown = bearer(f"{token.PREFIX}{'x' * 43}")
        assert (await api.client.get("/outbox", headers=unknown)).status_code == 401


async def test_a_stream_ends_with_its_token(
    database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = await token.create(await connect(), "alice", "x")
    monkeypatch.setattr(identity, "API_TOKEN_STREAM", 0.2)
    async with issuing() as issuer, serving(database, OUTWAKE_OIDC_ISSUER=issuer.url) as api:
        begun = time.monotonic()
        lasts = (await api.context.authenticator.by_token(issuer.token())).until - begun
        assert lasts - oidc.LEEWAY + 2 >= 300
        assert lasts - oidc.LEEWAY <= 300 + time.monotonic() - begun

        asked = {"repo": "octo/tools", "target_branch": "main"}
        created = await api.client.post("/sessions", json=asked, headers=bearer(text))
        async with api.follow(created.json()["id"], **bearer(text)) as events:
            assert [event.event for event in await events.rest()] == ["status"]
        await eventually("no stream to be counted", lambda: not api.context.limits._streams)


async def test_streams_that_are_left_are_counted_no_more(database: str) -> None:
    async with issuing() as issuer, serving(database, OUTWAKE_OIDC_ISSUER=issuer.url) as api:
        asked = {"repo": "octo/tools", "target_branch": "main"}
        alice = bearer(issuer.token())
        created = await api.client.post("/sessions", json=asked, headers=alice)
        async with api.follow(created.json()["id"], **alice) as events:
            await events.next("status")
            assert api.context.limits._streams == {"alice": 1}
        await eventually("no stream to be counted", lambda: not api.context.limits._streams)
        nobodys = await api.client.get(f"/sessions/{UUID(int=7)}/events", headers=alice)
        assert nobodys.status_code == 404
        assert not api.context.limits._streams


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"OUTWAKE_HOST": "0.0.0.0"}, "OUTWAKE_HOST"),
        ({"OUTWAKE_OIDC_ISSUER": "issuer"}, "OUTWAKE_OIDC_ISSUER"),
        ({"OUTWAKE_WEBHOOK_ALLOW": "all"}, "OUTWAKE_WEBHOOK_ALLOW"),
        ({"OUTWAKE_WEBHOOK_SECRET": "planted"}, "OUTWAKE_WEBHOOK_SECRET"),
    ],
)
async def test_settings_that_cannot_be_end_the_start(
    database: str, environment: dict[str, str], told: str
) -> None:
    async with running("outwake", "api", env={"DATABASE_URL": database, **environment}) as process:
        assert await process.ended() == 2
    assert told in process.stderr[-1]
    assert "planted" not in "".join(process.stderr)


async def test_with_tokens_required_it_listens_for_strangers(database: str) -> None:
    environment = {
        "DATABASE_URL": database,
        "OUTWAKE_HOST": "0.0.0.0",
        "OUTWAKE_PORT": "0",
        "OUTWAKE_REQUIRE_TOKEN": "1",
        "OUTWAKE_DEV_IDENTITY": "1",
    }
    async with running("outwake", "api", env=environment) as process:
        ready = await process.event("api_ready")
        assert not [event for event in process.events if event["event"] == "dev_identity"]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}") as client:
            assert (await client.get("/sessions")).status_code == 401
            assert (await client.get("/healthz")).status_code == 200

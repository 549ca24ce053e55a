"""Tokens of a certified provider, oidc-provider from npm, run on loopback. `make oidc` installs it."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from outwake.app.auth import oidc
from tests.support.api import serving
from tests.support.issuer import bearer
from tests.support.process import ROOT

MODULE = ROOT / ".state/oidc/node_modules/oidc-provider/lib/index.js"
SCRIPT = ROOT / "tests/support/oidc/provider.mjs"
AUDIENCE = "urn:outwake"


class Provider:
    """The provider's process. Clients and what they are: alice, a user; olga, an operator."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = str(self._line()["url"])

    def token(self, client: str, resource: str | None = AUDIENCE) -> str:
        """An access token: a JWT for that audience, an opaque one without."""
        form = {"grant_type": "client_credentials"}
        if resource:
            form |= {"resource": resource, "scope": "sessions"}
        answer = httpx.post(f"{self.url}/token", data=form, auth=(client, "secret"))
        return str(answer.raise_for_status().json()["access_token"])

    def change_keys(self, how: str) -> None:
        """`rotate` or `withdraw`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{how}\n")
        self._process.stdin.flush()
        assert self._line()["keys"]

    def _line(self) -> dict[str, object]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the provider has ended"
            if line.startswith("{"):  # it warns of development settings, too
                found: dict[str, object] = json.loads(line)
                return found


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    node = shutil.which("node")
    if node is None or not MODULE.exists():
        pytest.skip("oidc-provider is not installed: `make oidc` does it, and needs node and npm")
    command = [node, str(SCRIPT), str(MODULE)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        yield Provider(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


async def test_tokens_of_the_provider_are_users_and_operators(provider: Provider, database: str) -> None:
    changes = {"OUTWAKE_OIDC_ISSUER": provider.url, "OUTWAKE_OIDC_AUDIENCE": AUDIENCE}
    async with serving(database, **changes) as api:
        alice, olga = (bearer(provider.token(name)) for name in ("alice", "olga"))
        asked = {"repo": "octo/tools", "target_branch": "main"}
        created = await api.client.post("/sessions", json=asked, headers=alice)
        assert (created.status_code, created.json()["user_id"]) == (201, "alice")
        assert (await api.client.get("/outbox", headers=alice)).status_code == 403
        assert (await api.client.get("/outbox", headers=olga)).status_code == 200
        seen = await api.client.get(created.headers["location"], headers=olga)
        assert seen.json()["id"] == created.json()["id"]

        for wrong in (provider.token("alice", "urn:other"), provider.token("alice", None)):
            refused = await api.client.get("/sessions", headers=bearer(wrong))
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith('Bearer realm="outwake", error=')


async def test_the_provider_changes_its_keys(
    provider: Provider, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "PAUSE", 0.0)
    changes = {"OUTWAKE_OIDC_ISSUER": provider.url, "OUTWAKE_OIDC_AUDIENCE": AUDIENCE}
    async with serving(database, **changes) as api:
        old = bearer(provider.token("alice"))
        assert (await api.client.get("/sessions", headers=old)).status_code == 200
        provider.change_keys("rotate")
        new = bearer(provider.token("alice"))
        assert (await api.client.get("/sessions", headers=new)).status_code == 200
        assert (await api.client.get("/sessions", headers=old)).status_code == 200

        provider.change_keys("withdraw")
        monkeypatch.setattr(oidc, "FRESH", 0.0)
        assert (await api.client.get("/sessions", headers=old)).status_code == 200  # renews meanwhile
        issuer = api.context.authenticator._issuer
        assert issuer is not None
        assert issuer._fetching is not None
        await issuer._fetching
        assert (await api.client.get("/sessions", headers=old)).status_code == 401
        assert (await api.client.get("/sessions", headers=new)).status_code == 200

"""The development mode: who is let in, and which page in a browser is not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from outwake.app import shared_figure
from outwake.app.api import health, metrics
from outwake.app.context import Context
from outwake.session import token
from tests.conftest import Connect
from tests.support.api import Api, serving


async def test_any_token_is_the_developer_and_the_answer_says_so(api: Api, connect: Connect) -> None:
    placeholder = {"Authorization": "Bearer YOUR_TOKEN"}
    created = await api.client.post(
        "/sessions", json={"repo": "octo/tools", "target_branch": "main"}, headers=placeholder
    )
    assert (created.status_code, created.headers["outwake-user"]) == (201, "local")
    assert created.json()["user_id"] == "local"
    assert "outwake-user" not in (await api.client.get("/sessions")).headers
    rebound = {**placeholder, "Host": "evil.example"}
    assert (await api.client.get("/sessions", headers=rebound)).status_code == 403
    # An API token still decides.
    _, text = await token.create(await connect(), "alice", "test")
    shown = await api.client.get("/sessions", headers={"Authorization": f"Bearer {text}"})
    assert shown.json()["sessions"] == []
    wrong = {"Authorization": f"Bearer {token.PREFIX}{'x' * 43}"}
    assert (await api.client.get("/sessions", headers=wrong)).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.test", 403),
        ("evil.test:8000", 403),
        ("localhost.evil.test", 403),
        ("", 403),
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.0.2.7:8000", 200),
        ("outwake.example", 200),
    ],
)
async def test_no_name_of_others_is_accepted_where_the_dev_identity_is_set(
    database: str, host: str, status: int
) -> None:
    """DNS rebinding: a page gave our address its own name."""
    changes = {"OUTWAKE_DEV_IDENTITY": True, "OUTWAKE_PUBLIC_URL": "https://outwake.example"}
    async with (
        serving(database, **changes) as api,
        httpx.AsyncClient(base_url=api.url, headers={"Host": host}) as client,
    ):
        assert (await client.get("/sessions")).status_code == status
        assert (await client.get("/")).status_code == status


async def test_an_origin_of_another_scheme_is_another_origin(api: Api) -> None:
    session = await api.create()
    path = f"/sessions/{session['id']}/cancel"
    for origin, status in (
        (api.url, 200),
        (api.url.replace("http://", "https://"), 403),
        (api.url.replace("http://", "ftp://"), 403),
    ):
        assert (await api.client.post(path, headers={"Origin": origin})).status_code == status, origin
        async with httpx.AsyncClient(base_url=api.url, headers={"Origin": origin}) as client:
            form = await client.post(f"/ui{path}")
            assert form.status_code == (303 if status == 200 else 403), origin


async def test_a_page_by_plain_http_cannot_act_on_the_https_site(database: str) -> None:
    public = "https://outwake.example"
    async with serving(database, OUTWAKE_DEV_IDENTITY=True, OUTWAKE_PUBLIC_URL=public) as api:
        session = await api.create()
        path = f"/ui/sessions/{session['id']}/cancel"
        async with httpx.AsyncClient(base_url=api.url, headers={"Host": "outwake.example"}) as client:
            assert (await client.post(path, headers={"Origin": public})).status_code == 303
            plain = {"Origin": "http://outwake.example"}
            assert (await client.post(path, headers=plain)).status_code == 403
            theme = await client.post("/ui/theme", data={"theme": "dark"}, headers={"Origin": public})
            assert "Secure" in theme.headers["set-cookie"]


@pytest.mark.parametrize("char", ["\u202e", "\u2066", "\u200f", "\u0007"])
async def test_a_title_cannot_turn_the_text_around(api: Api, char: str) -> None:
    asked = {"repo": "octo/tools", "target_branch": "main", "title": f"fine {char}txt.exe"}
    assert (await api.client.post("/sessions", json=asked)).status_code == 422
    created = await api.create(prompt=f"Do {char}it")
    assert created["title"] == "Do it"
    family = await api.create(title="Family 👩\u200d👩\u200d👧 ok")
    assert family["title"].startswith("Family")


async def test_figures_are_read_once_however_many_ask(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_figure, "LEAST", 60.0)
    monkeypatch.setattr(shared_figure, "MOST", 60.0)
    for figure, path in ((metrics._DATABASE, "/metrics"), (health._LOOK, "/readyz")):
        reads: list[str] = []
        read: Callable[[Context], Awaitable[Any]] = figure._read

        async def counted(here: Context, read: Any = read, reads: list[str] = reads) -> Any:
            reads.append("read")
            return await read(here)

        monkeypatch.setattr(figure, "_read", counted)
        answers = await asyncio.gather(*(api.client.get(path) for _ in range(40)))
        answers.append(await api.client.get(path))
        assert len({answer.status_code for answer in answers}) == 1
        assert len(reads) == 1, path

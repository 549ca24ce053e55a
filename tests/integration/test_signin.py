"""Signing in with a browser: what it takes, what is refused, and what the session may do."""

from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from outwake.session.token import create
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.browser_issuer import SignInIssuer, sign_in_issuer

SAME = {"Sec-Fetch-Site": "same-origin"}
START = "/ui/sign-in/issuer?back=/ui/new"


@pytest.fixture
async def issuer() -> AsyncIterator[SignInIssuer]:
    async with sign_in_issuer() as found:
        yield found


@pytest.fixture
async def api(database: str, issuer: SignInIssuer) -> AsyncIterator[Api]:
    async with serving(database, OUTWAKE_OIDC_ISSUER=issuer.url) as running:
        yield running


@pytest.fixture
async def browser(api: Api) -> AsyncIterator[httpx.AsyncClient]:
    """Keeps cookies, as a browser does; follows no redirect by itself."""
    async with httpx.AsyncClient(base_url=api.url, headers=SAME) as client:
        yield client


async def follow(browser: httpx.AsyncClient, path: str) -> httpx.Response:
    """Follow redirects to the page they end at."""
    answer = await browser.get(path)
    while answer.is_redirect:
        answer = await browser.get(answer.headers["location"])
    return answer


async def test_who_is_not_known_is_asked_to_sign_in_and_comes_back_to_the_page(
    browser: httpx.AsyncClient, issuer: SignInIssuer
) -> None:
    first = await browser.get("/?repo=octo%2Ftools")
    assert (first.status_code, first.headers["location"]) == (
        303,
        "/ui/sign-in?back=%2F%3Frepo%3Docto%252Ftools",
    )
    asked = await browser.get(first.headers["location"])
    assert f"Sign in at {urlsplit(issuer.url).netloc}" in asked.text
    assert "No worker" not in asked.text  # a stranger is told nothing
    page = await follow(browser, "/ui/sign-in/issuer?back=%2F%3Frepo%3Docto%252Ftools")
    assert str(page.url).endswith("/?repo=octo%2Ftools")
    assert page.status_code == 200
    assert "alice" in page.text


async def test_the_session_is_the_users_and_no_operators(
    api: Api, browser: httpx.AsyncClient, issuer: SignInIssuer, connect: Connect
) -> None:
    await follow(browser, START)
    form = {"repo": "a/b", "target_branch": "main", "prompt": "x"}
    created = await browser.post("/ui/sessions", data=form)
    path = created.headers["location"]
    assert (await browser.get(path)).status_code == 200
    conn = await connect()
    assert await (await conn.execute("SELECT user_id FROM session")).fetchone() == ("alice",)
    for page in ("/ui/outbox", "/ui/workers", "/ui/dead", "/ui/outbox/1"):
        assert (await browser.get(page)).status_code == 403
    assert (await browser.post("/ui/outbox/1/cancel", data={"back": "/"})).status_code == 403

    async with httpx.AsyncClient(base_url=api.url, headers=SAME) as other:
        issuer.user = "bob"
        await follow(other, START)
        assert (await other.get(path)).status_code == 404
        assert (await other.get(f"{path}/events")).status_code == 404
        assert (await other.post(f"{path}/cancel", data={"back": "/"})).status_code == 404
        assert "No session yet" in (await other.get("/")).text
    async with httpx.AsyncClient(base_url=api.url, headers=SAME) as other:
        issuer.user, issuer.operator = "olga", True
        await follow(other, START)
        assert (await other.get(path)).status_code == 200
        assert (await other.get("/ui/outbox")).status_code == 200


async def test_the_api_does_not_know_the_cookie(browser: httpx.AsyncClient) -> None:
    await follow(browser, START)
    assert (await browser.get("/")).status_code == 200
    assert (await browser.get("/sessions")).status_code == 401


async def test_the_cookie_is_closed_to_scripts_and_other_sites(browser: httpx.AsyncClient) -> None:
    left = await browser.get(START)
    assert "HttpOnly" in left.headers["set-cookie"]
    assert "Path=/ui/sign-in/callback" in left.headers["set-cookie"]
    back = await browser.get((await browser.get(left.headers["location"])).headers["location"])
    cookies = back.headers.get_list("set-cookie")
    assert any(one.startswith("outwake=outwake_") and "HttpOnly; Max-Age=28800" in one for one in cookies)
    assert all("samesite=lax" in one.lower() for one in cookies)
    assert back.headers["location"] == "/ui/new"


async def test_behind_tls_the_cookie_is_this_hosts_alone(database: str, issuer: SignInIssuer) -> None:
    public = "https://outwake.example"
    async with (
        serving(database, OUTWAKE_OIDC_ISSUER=issuer.url, OUTWAKE_PUBLIC_URL=public) as api,
        httpx.AsyncClient(base_url=api.url) as client,
    ):
        left = await client.get(START)
        assert "; Secure" in left.headers["set-cookie"]
        query = parse_qs(urlsplit(left.headers["location"]).query)
        assert query["redirect_uri"] == [f"{public}/ui/sign-in/callback"]
        pending = left.headers["set-cookie"].partition(";")[0]
        to = (await client.get(left.headers["location"])).headers["location"].removeprefix(public)
        back = await client.get(to, headers={"Cookie": pending})
        assert any(
            one.startswith("__Host-outwake=") and "Path=/" in one and "Secure" in one
            for one in back.headers.get_list("set-cookie")
        )


async def test_a_way_back_that_this_browser_did_not_begin_is_refused(
    api: Api, browser: httpx.AsyncClient
) -> None:
    async with httpx.AsyncClient(base_url=api.url) as attacker:
        left = await attacker.get(START)
        back = (await attacker.get(left.headers["location"])).headers["location"]
    refused = await browser.get(back)
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers
    # Nor with a sign-in of its own under way: the state is another.
    await browser.get(START)
    assert (await browser.get(back)).status_code == 401


async def test_a_code_is_worth_nothing_without_its_verifier(browser: httpx.AsyncClient) -> None:
    left = await browser.get(START)
    back = (await browser.get(left.headers["location"])).headers["location"]
    name, _, value = left.headers["set-cookie"].partition(";")[0].partition("=")
    state, _, target = value.split("~")
    stolen = {"Cookie": f"{name}={state}~another~{target}"}
    browser.cookies.clear()
    refused = await browser.get(back, headers=stolen)
    assert refused.status_code == 401
    assert "invalid_grant" in refused.text


@pytest.mark.parametrize("changes", [{"aud": "another"}, {"exp": 1}, {"iss": "https://evil.example"}])
async def test_a_token_that_the_api_would_refuse_begins_no_session(
    browser: httpx.AsyncClient, issuer: SignInIssuer, changes: dict[str, object], connect: Connect
) -> None:
    issuer.changes = changes
    refused = await follow(browser, START)
    assert refused.status_code == 401
    assert "outwake" not in browser.cookies
    conn = await connect()
    assert await (await conn.execute("SELECT count(*) FROM api_token")).fetchone() == (0,)


async def test_a_refusal_of_the_issuer_is_told_as_text(
    browser: httpx.AsyncClient, issuer: SignInIssuer
) -> None:
    issuer.denied = True
    refused = await follow(browser, START)
    assert refused.status_code == 401
    assert "&lt;b&gt;not you&lt;/b&gt;" in refused.text


async def test_a_confidential_client_shows_its_secret(database: str, issuer: SignInIssuer) -> None:
    issuer.secret = "pa%3Ass"
    for secret, status in (("pa:ss", 200), ("wrong", 401)):
        changes = {"OUTWAKE_OIDC_ISSUER": issuer.url, "OUTWAKE_OIDC_CLIENT_SECRET": secret}
        async with (
            serving(database, **changes) as api,
            httpx.AsyncClient(base_url=api.url, headers=SAME) as client,
        ):
            assert (await follow(client, START)).status_code == status


async def test_signing_out_ends_the_session_for_good(browser: httpx.AsyncClient, connect: Connect) -> None:
    await follow(browser, START)
    kept = browser.cookies["outwake"]
    page = await browser.get("/")
    assert "Sign out" in page.text
    left = await browser.post("/ui/sign-out", data={"back": "/"})
    assert left.headers["location"] == "/ui/sign-in"
    assert "outwake" not in browser.cookies
    conn = await connect()
    row = await (await conn.execute("SELECT name, revoked_at IS NOT NULL FROM api_token")).fetchone()
    assert row == ("browser", True)
    assert kept.startswith("outwake_")


async def test_an_api_token_signs_in_too(database: str, connect: Connect) -> None:
    conn = await connect()
    _, token = await create(conn, "carol", "laptop", operator=True)
    async with (
        serving(database, OUTWAKE_REQUIRE_TOKEN="1") as api,
        httpx.AsyncClient(base_url=api.url, headers=SAME) as client,
    ):
        refused = await client.post("/ui/sign-in", data={"token": "outwake_wrong"})
        assert refused.status_code == 401
        assert "no API token" in refused.text
        unknown = await client.post("/ui/sign-in", data={"token": "outwake_" + "x" * 43})
        assert unknown.status_code == 401
        accepted = await client.post("/ui/sign-in", data={"token": f" {token} ", "back": "/ui/outbox"})
        assert (accepted.status_code, accepted.headers["location"]) == (303, "/ui/outbox")
        assert "carol" in (await client.get("/ui/outbox")).text
        # Its owner's other programs go on using it.
        await client.post("/ui/sign-out", data={"back": "/"})
        assert (await client.get("/")).status_code == 303
    assert await (await conn.execute("SELECT revoked_at FROM api_token")).fetchone() == (None,)


async def test_a_script_is_told_that_the_session_ended(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/", headers={"Sec-Fetch-Mode": "cors"})
    assert answer.status_code == 401
    assert (await browser.post("/ui/sessions", data={"repo": "a/b"})).status_code == 401


async def test_the_development_mode_asks_nobody(database: str) -> None:
    async with serving(database) as api, httpx.AsyncClient(base_url=api.url) as client:
        assert (await client.get("/ui/sign-in?back=/ui/new")).headers["location"] == "/ui/new"
        assert (await client.get("/ui/sign-in?back=//evil.example")).headers["location"] == "/"

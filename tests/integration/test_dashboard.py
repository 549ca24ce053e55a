"""The dashboard's pages over HTTP: who may do what, what cannot be forged, and what a page must survive."""

import html
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from psycopg.types.json import Jsonb

from outwake.app.dashboard.page import POLICY
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.manual_worker import ManualWorker

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
async def pages(api: Api) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is no browser and that follows no redirect."""
    async with httpx.AsyncClient(base_url=api.url, headers=SAME) as client:
        yield client


async def test_each_page_has_the_policy_and_no_inline_script_or_style(
    api: Api, pages: httpx.AsyncClient, manual: ManualWorker
) -> None:
    session = await api.create()
    paths = ["/", "/ui/new", "/ui/outbox", "/ui/workers", "/ui/dead", f"/ui/sessions/{session['id']}"]
    for path in [*paths, "/ui/outbox/1", "/ui/nothing"]:
        answer = await pages.get(path)
        assert answer.status_code == (404 if path == "/ui/nothing" else 200), path
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"] == POLICY
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|https?://", answer.text), path
    assert "unsafe" not in POLICY


async def test_static_files_may_be_kept_for_ever_and_change_their_address(pages: httpx.AsyncClient) -> None:
    page = await pages.get("/")
    for path in re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page.text):
        answer = await pages.get(path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert (await pages.get("/ui/static/x/nothing.js")).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://elsewhere.example"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {},
    ],
)
async def test_a_form_of_another_site_changes_nothing(
    api: Api, headers: dict[str, str], connect: Connect
) -> None:
    session = await api.create()
    paths = ("/prompts", "/cancel", "/archive", "/rename")
    posts = {f"/ui/sessions/{session['id']}{path}": {"prompt": "x", "title": "x"} for path in paths}
    posts |= {"/ui/sessions": {"repo": "a/b", "target_branch": "main"}, "/ui/outbox/1/cancel": {"back": "/"}}
    posts |= {"/ui/theme": {"theme": "dark"}}
    async with httpx.AsyncClient(base_url=api.url) as client:
        for path, form in posts.items():
            answer = await client.post(path, data=form, headers=headers)
            assert answer.status_code == 403, path
            assert "set-cookie" not in answer.headers
    conn = await connect()
    counts = await conn.execute("SELECT (SELECT count(*) FROM prompt), (SELECT min(state) FROM outbox)")
    assert await counts.fetchone() == (1, "ready")


async def test_a_form_is_accepted_by_its_origin_where_no_fetch_metadata_is_sent(api: Api) -> None:
    async with httpx.AsyncClient(base_url=api.url) as client:
        form = {"repo": "a/b", "target_branch": "main", "prompt": "x", "key": "k"}
        answer = await client.post("/ui/sessions", data=form, headers={"Origin": api.url})
        assert answer.status_code == 303
        # Sent twice it is one session.
        again = await client.post("/ui/sessions", data=form, headers={"Origin": api.url})
        assert again.headers["location"] == answer.headers["location"]


async def test_a_form_that_is_no_form_is_refused(pages: httpx.AsyncClient) -> None:
    assert (await pages.post("/ui/sessions", json={"repo": "a/b"})).status_code == 415
    media_type = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await pages.post("/ui/sessions", content=b"a=%ff", headers=media_type)).status_code == 400
    fields = {"repo": "a/b", "target_branch": "main", "prompt": "nul \0"}
    refused = await pages.post("/ui/sessions", data=fields)
    assert refused.status_code == 422
    assert "must not contain the character NUL" in refused.text


async def test_a_form_that_is_too_large_is_refused(database: str) -> None:
    async with (
        serving(database, OUTWAKE_MAX_BODY="1024") as api,
        httpx.AsyncClient(base_url=api.url, headers=SAME) as client,
    ):
        form = {"repo": "a/b", "target_branch": "main", "prompt": "x" * 5000}
        assert (await client.post("/ui/sessions", data=form)).status_code == 413


@pytest.mark.parametrize(
    "back", ["//evil.example/", "https://evil.example/", "/\\evil.example", "x", "/a\nb"]
)
async def test_no_form_leads_elsewhere(pages: httpx.AsyncClient, back: str) -> None:
    answer = await pages.post("/ui/theme", data={"theme": "dark", "back": back})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


async def test_whatever_an_agent_prints_is_shown_as_text(
    api: Api, pages: httpx.AsyncClient, manual: ManualWorker
) -> None:
    session = await api.create(prompt=NASTY, title=NASTY)
    await manual.claim()
    tool = {"type": "tool_use", "id": NASTY, "name": NASTY, "input": {"command": NASTY}}
    result = {"type": "tool_result", "tool_use_id": NASTY, "content": [{"type": "text", "text": NASTY}]}
    markdown = (
        f"# {NASTY}\n\n[a](javascript:alert(3)) ![b](https://elsewhere.example/x.png)\n\n|a|\n|:-:|\n|b|\n"
    )
    await manual.store(
        {"type": "assistant", "message": {"content": [{"type": "text", "text": markdown}, tool]}},
        {"type": "user", "message": {"content": [result]}},
        {"type": NASTY, "subtype": NASTY},
        {"type": "system", "subtype": "init", "model": NASTY},
        {"type": "result", "is_error": True, "result": NASTY, "subtype": NASTY},
    )
    await manual.fail(NASTY, permanent=True)
    for path in (f"/ui/sessions/{session['id']}", "/", "/ui/dead", "/ui/outbox/1", "/ui/outbox?state=dead"):
        page = (await pages.get(path)).text
        assert "<script>" not in page
        assert "<img" not in page
        assert "javascript:alert" not in re.sub(r">[^<]*<", "><", page)
        assert not re.search(r"\sstyle=", page)
    assert html.escape("alert(1)</script>", quote=False) in page


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"type": "assistant"},
        {"type": "assistant", "message": None},
        {"type": "assistant", "message": {"content": [1, None, {"type": "text"}, {"type": "tool_use"}]}},
        {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "x"}]}},
        {"type": "result", "total_cost_usd": "much", "usage": [1], "duration_ms": None, "num_turns": True},
        {"type": ["a"], "x": {"y": [[]]}},
        {"type": "truncated", "bytes": 5, "head": "hea"},
        {"type": "text", "text": "x" * 50_000},
    ],
)
async def test_an_event_of_any_shape_is_shown(
    api: Api, pages: httpx.AsyncClient, manual: ManualWorker, body: dict[str, Any]
) -> None:
    session = await api.create()
    await manual.claim()
    await manual.store(body)
    answer = await pages.get(f"/ui/sessions/{session['id']}")
    assert answer.status_code == 200
    assert 'id="m-1"' in answer.text


async def test_what_psql_wrote_is_shown(
    api: Api, pages: httpx.AsyncClient, connect: Connect, manual: ManualWorker
) -> None:
    session = await api.create()
    conn = await connect()
    results: list[Any] = [[], "x", {"agent": 1, "commits": [1, {}]}, {"commits": {"a": 1}}]
    for result in results:
        await conn.execute("UPDATE prompt SET status = 'succeeded', result = %s", (Jsonb(result),))
        assert (await pages.get(f"/ui/sessions/{session['id']}")).status_code == 200
    strange: list[Any] = [[], {}, [1], [{"at": "never"}]]
    for errors in strange:
        await conn.execute(
            "INSERT INTO outbox (topic, state, errors, payload, finished_at)"
            " VALUES ('x', 'dead', %s, '[1]', clock_timestamp())",
            (Jsonb(errors),),
        )
    assert (await pages.get("/ui/dead")).text.count("<li class=") == 4
    for state in ("ready", "running", "dead", "done", "cancelled", "nonsense"):
        assert (await pages.get(f"/ui/outbox?state={state}&topic=x&range=week")).status_code == 200


async def test_costs_are_summed_however_they_are_stored(
    api: Api, pages: httpx.AsyncClient, connect: Connect
) -> None:
    """Version 1.0 stored the agent's line alone. An agent may also name any number."""
    session = await api.create()
    conn = await connect()
    await conn.execute("INSERT INTO prompt (session_id, text) SELECT session_id, 'x' FROM prompt")
    await conn.execute("INSERT INTO prompt (session_id, text) SELECT session_id, 'x' FROM prompt")
    results: list[Any] = [
        {"cost": 1.5, "agent": {"type": "result", "total_cost_usd": 1.5}},
        {"agent": {"type": "result", "total_cost_usd": 0.25}},
        {"agent": {"type": "result", "total_cost_usd": 10**400, "num_turns": 10**400}},
        {"cost": None, "agent": {"type": "result", "total_cost_usd": "much"}},
    ]
    for result in results:
        await conn.execute(
            "UPDATE prompt SET status = 'succeeded', result = %s"
            " WHERE id = (SELECT min(id::text)::uuid FROM prompt WHERE result IS NULL)",
            (Jsonb(result),),
        )
    assert "$1.75" in (await pages.get("/")).text
    page = await pages.get(f"/ui/sessions/{session['id']}")
    assert page.status_code == 200
    assert "$1.75 in all" in page.text


@pytest.mark.parametrize("depth", [300, 900, 5000])
async def test_a_row_with_a_deep_payload_is_shown(
    depth: int, api: Api, pages: httpx.AsyncClient, connect: Connect
) -> None:
    """Such a row ends as dead, so it must not keep the other dead rows from their reader."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, state, finished_at, payload)"
        " SELECT 't', 'dead', now(), (repeat('[', n) || repeat(']', n))::jsonb FROM unnest(ARRAY[1, %s]) n",
        (depth,),
    )
    for path in ("/ui/dead", "/ui/outbox", "/ui/outbox/1", "/ui/outbox/2"):
        assert (await pages.get(path)).status_code == 200, path


async def test_the_list_is_filtered_and_paged(api: Api, pages: httpx.AsyncClient) -> None:
    for number in range(35):
        await api.create(repo="octo/many", title=f"Number {number:02}")
    await api.create(repo="octo/other", title="Another")
    query = "/?repo=octo%2Fmany"
    seen: list[str] = []
    while query:
        page = (await pages.get(query)).text
        seen += re.findall(r"Number (\d\d)</a>", page)
        assert "Another" not in page
        older = re.search(r'href="([^"]+)" rel="next"', page)
        query = html.unescape(older[1]) if older else ""
    assert seen == [f"{number:02}" for number in reversed(range(35))]
    assert "Another" in (await pages.get("/?inbox_status=active")).text
    assert "No session matches" in (await pages.get("/?inbox_status=pending")).text
    assert (await pages.get("/?inbox_status=wrong")).status_code == 422
    assert (await pages.get("/?cursor=wrong")).status_code == 422


async def test_a_long_conversation_comes_in_windows(
    api: Api, pages: httpx.AsyncClient, manual: ManualWorker
) -> None:
    session = await api.create()
    await manual.claim()
    await manual.say(*(f"text {number}" for number in range(1, 1001)))
    path = f"/ui/sessions/{session['id']}"

    def shown(page: str) -> list[int]:
        return [int(seq) for seq in re.findall(r'id="m-(\d+)"', page)]

    newest = (await pages.get(path)).text
    assert shown(newest) == list(range(701, 1001))
    assert "data-events" in newest
    earlier = re.search(rf'href="({path}\?after=\d+)">Earlier', newest)
    assert earlier
    assert shown((await pages.get(earlier[1])).text) == list(range(401, 701))
    # What the script asks for: everything behind a seq, in pages.
    assert shown((await pages.get(f"{path}?live=1&after=900")).text) == list(range(901, 1001))
    first = (await pages.get(f"{path}?live=1&after=0")).text
    assert shown(first) == list(range(1, 501))
    assert "data-more" in first
    assert 'data-seq="500"' in first


async def test_an_outage_is_a_page_that_says_so(database: str) -> None:
    refused = re.sub(r"@[^/]*/|//[^/]*/", "//postgres@127.0.0.1:1/", database, count=1)
    async with serving(refused) as api, httpx.AsyncClient(base_url=api.url) as client:
        for path in ("/", "/ui/outbox", "/ui/workers", "/ui/new"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert "The database does not answer" in answer.text


async def test_only_known_hosts_and_sessions(api: Api, pages: httpx.AsyncClient) -> None:
    assert (await pages.get("/", headers={"Host": "evil.example"})).status_code == 403
    nobody = "00000000-0000-7000-8000-000000000000"
    for path in (
        f"/ui/sessions/{nobody}",
        "/ui/outbox/77",
        "/ui/outbox/x",
        f"/ui/sessions/events?id={nobody}",
    ):
        answer = await pages.get(path)
        assert answer.status_code == 404, path
        assert answer.headers["content-type"].startswith("text/html")
    assert (await pages.get("/ui/sessions/events?id=x")).status_code == 404
    assert (await pages.get("/ui/sessions/events")).status_code == 422


async def test_the_dashboard_is_no_part_of_the_apis_document(api: Api) -> None:
    paths = (await api.client.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/ui")]

"""Sessions over HTTP: created once, listed, cancelled, archived, and refused clearly."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from outwake.app.api import messages, sessions
from outwake.app.database import Database
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.manual_worker import ManualWorker


async def fetch(connect: Connect, query: str, *values: Any) -> list[Any]:
    cursor = await (await connect()).execute(query, values)
    return await cursor.fetchall()


async def test_create_writes_session_prompt_and_row(api: Api, connect: Connect) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = await api.client.post(
        "/sessions",
        json={"repo": "octo/tools", "target_branch": "main", "prompt": "\n  Fix  the Ünicode bug\nnow"},
        headers={"traceparent": trace},
    )
    assert response.status_code == 201
    created = response.json()
    assert response.headers["location"] == f"/sessions/{created['id']}"
    assert created["title"] == "Fix the Ünicode bug"
    assert created["branch"] == f"outwake/fix-the-unicode-bug-{created['id'][-8:]}"
    assert created["inbox_status"] == "active"
    assert created["worker_present"] is False
    assert [prompt["status"] for prompt in created["prompts"]] == ["queued"]
    rows = await fetch(connect, "SELECT topic, ordering_key, payload, state, traceparent FROM outbox")
    payload = {"session_id": created["id"], "prompt_id": created["prompts"][0]["id"]}
    assert rows == [("session.run", f"session:{created['id']}", payload, "ready", trace)]
    shown = (await api.client.get(f"/sessions/{created['id']}")).json()
    assert shown == created


async def test_create_without_prompt_takes_the_repository_as_title(api: Api) -> None:
    created = await api.create(prompt=None)
    assert created["title"] == "octo/tools"
    assert created["branch"].startswith("outwake/octo-tools-")
    assert created["prompts"] == []


async def test_create_says_whether_a_worker_is_present(api: Api, manual: ManualWorker) -> None:
    assert (await api.create())["worker_present"] is True


async def test_worker_of_other_topics_or_one_that_drains_is_not_present(
    api: Api, manual: ManualWorker
) -> None:
    for change in ("topics = '{email.send}'", "topics = '{session.run}', draining = true"):
        await manual.conn.execute(f"UPDATE worker SET {change}")
        api.context.presence._read_at = float("-inf")
        assert (await api.create())["worker_present"] is False


async def test_presence_is_read_once_for_many_requests(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    database = api.context.database
    asked: list[Any] = []

    async def rows(*query: Any) -> list[Any]:
        asked.append(query)
        return await Database.rows(database, *query)

    monkeypatch.setattr(database, "rows", rows)
    await asyncio.gather(*(api.context.presence.present() for _ in range(100)))
    assert len(asked) == 1


async def test_twenty_identical_requests_make_one_session(api: Api, connect: Connect) -> None:
    asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "Once"}
    responses = await asyncio.gather(
        *(api.client.post("/sessions", json=asked, headers={"Idempotency-Key": '"a b"'}) for _ in range(20))
    )
    assert {response.status_code for response in responses} == {201}
    assert len({response.text for response in responses}) == 1
    assert len({response.headers["location"] for response in responses}) == 1
    replayed = [response.headers.get("idempotent-replayed") for response in responses]
    assert sorted(map(str, replayed)) == ["None"] + ["true"] * 19
    counts = (
        "SELECT (SELECT count(*) FROM session), (SELECT count(*) FROM prompt), (SELECT count(*) FROM outbox)"
    )
    assert await fetch(connect, counts) == [(1, 1, 1)]


async def test_key_is_the_same_with_and_without_quotes_and_for_another_order_of_fields(
    api: Api,
) -> None:
    first = await api.client.post(
        "/sessions",
        content=b'{"repo": "a/b", "target_branch": "main"}',
        headers={"Idempotency-Key": "k", "Content-Type": "application/json"},
    )
    second = await api.client.post(
        "/sessions",
        content=b'{"target_branch":"main","prompt":null,"repo":"a/b"}',
        headers={"Idempotency-Key": '"k"', "Content-Type": "application/json; charset=utf-8"},
    )
    assert second.json() == first.json()
    assert second.headers["idempotent-replayed"] == "true"


async def test_key_of_another_request_is_refused(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    asked = {"repo": "a/b", "target_branch": "main"}
    created = await api.client.post("/sessions", json=asked, headers=headers)
    asked["title"] = "Another"
    other = await api.client.post("/sessions", json=asked, headers=headers)
    assert other.status_code == 422
    assert other.json()["type"] == "urn:outwake:problem:key-reused"
    prompts = f"/sessions/{created.json()['id']}/prompts"
    other = await api.client.post(prompts, json={"prompt": "More"}, headers=headers)
    assert other.json()["type"] == "urn:outwake:problem:key-reused"


async def test_a_refused_request_does_not_use_its_key_up(api: Api) -> None:
    await api.create(branch="work")
    headers = {"Idempotency-Key": "k"}
    asked = {"repo": "octo/tools", "target_branch": "main", "branch": "work"}
    refused = await api.client.post("/sessions", json=asked, headers=headers)
    assert refused.status_code == 409
    asked["branch"] = "other"
    assert (await api.client.post("/sessions", json=asked, headers=headers)).status_code == 201


async def test_branch_is_free_again_when_its_session_is_archived(api: Api) -> None:
    first = await api.create(branch="work")
    asked = {"repo": "octo/tools", "target_branch": "main", "branch": "work"}
    taken = await api.client.post("/sessions", json=asked)
    assert taken.json()["type"] == "urn:outwake:problem:branch-taken"
    await api.client.delete(f"/sessions/{first['id']}")
    await api.create(branch="work")


async def test_parent_must_exist(api: Api) -> None:
    parent = await api.create()
    child = await api.create(parent=parent["id"])
    assert child["parent"] == parent["id"]
    asked = {"repo": "a/b", "target_branch": "main", "parent": str(uuid4())}
    refused = await api.client.post("/sessions", json=asked)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "#/parent"


async def test_follow_up_is_a_second_turn(api: Api, connect: Connect, manual: ManualWorker) -> None:
    created = await api.create()
    await manual.claim()
    path = f"/sessions/{created['id']}/prompts"
    headers = {"Idempotency-Key": "k"}
    first = await api.client.post(path, json={"prompt": "More"}, headers=headers)
    assert first.status_code == 201
    assert first.json()["status"] == "queued"
    again = await api.client.post(path, json={"prompt": "More"}, headers=headers)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    shown = (await api.client.get(f"/sessions/{created['id']}")).json()
    assert [prompt["status"] for prompt in shown["prompts"]] == ["running", "queued"]
    assert shown["inbox_status"] == "pending"


async def test_one_key_for_prompts_of_many_sessions_at_once_is_used_once(api: Api) -> None:
    sessions = [await api.create(title=f"{number}") for number in range(8)]
    responses = await asyncio.gather(
        *(
            api.client.post(
                f"/sessions/{session['id']}/prompts",
                json={"prompt": "More"},
                headers={"Idempotency-Key": "k"},
            )
            for session in sessions
        )
    )
    assert sorted(response.status_code for response in responses) == [201] + [422] * 7


async def test_list_pages_are_complete_and_newest_first(api: Api) -> None:
    created = [(await api.create(title=f"{number}"))["id"] for number in range(7)]
    listed: list[str] = []
    query = {"limit": "3"}
    while True:
        page = (await api.client.get("/sessions", params=query)).json()
        listed += [session["id"] for session in page["sessions"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert listed == created[::-1]


async def test_list_filters(api: Api, manual: ManualWorker) -> None:
    running = await api.create(repo="a/running")
    await manual.claim()
    waiting = await api.create(repo="a/waiting")
    archived = await api.create(repo="a/archived")
    await api.client.delete(f"/sessions/{archived['id']}")

    async def listed(**query: str) -> list[str]:
        page = (await api.client.get("/sessions", params=query)).json()
        return [session["id"] for session in page["sessions"]]

    assert await listed() == [waiting["id"], running["id"]]
    assert await listed(inbox_status="pending") == [running["id"]]
    assert await listed(inbox_status="active") == [waiting["id"]]
    assert await listed(inbox_status="archived") == [archived["id"]]
    assert await listed(session_status="archived") == [archived["id"]]
    assert await listed(session_status="any") == [archived["id"], waiting["id"], running["id"]]
    assert await listed(repo="a/waiting", inbox_status="active") == [waiting["id"]]
    assert await listed(repo="a/none") == []


async def test_messages_are_paged_and_show_the_last_attempt(api: Api, manual: ManualWorker) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}/messages"
    await manual.claim()
    await manual.say("old 1", "old 2")
    await manual.fail("no luck")
    await manual.claim()
    await manual.say("one", "two", "three")

    async def pages(**query: str) -> list[list[Any]]:
        found, after = [], 0
        while after is not None:
            page = (await api.client.get(path, params={**query, "after": str(after)})).json()
            found.append(
                [message["body"].get("text", message["body"]["type"]) for message in page["messages"]]
            )
            after = page["next"]
        return found

    assert await pages() == [["one", "two", "three"]]
    assert await pages(limit="2") == [["one", "two"], ["three"]]
    assert await pages(limit="3") == [["one", "two", "three"]]
    assert await pages(attempts="all", limit="4") == [
        ["old 1", "old 2", "superseded", "one"],
        ["two", "three"],
    ]


async def test_messages_of_one_page_are_bounded_in_bytes(
    api: Api, manual: ManualWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await api.create()
    await manual.claim()
    await manual.say(*("x" * 1000 for _ in range(5)))
    monkeypatch.setattr("outwake.app.api.messages.PAGE_BYTES", 1500)
    path = f"/sessions/{created['id']}/messages"
    page = (await api.client.get(path)).json()
    assert [message["seq"] for message in page["messages"]] == [1, 2]
    assert page["next"] == 2
    monkeypatch.setattr("outwake.app.api.messages.PAGE_BYTES", 1)
    page = (await api.client.get(path, params={"after": 2})).json()
    assert [message["seq"] for message in page["messages"]] == [3]


async def test_cancel_ends_what_waits_and_marks_what_runs(api: Api, manual: ManualWorker) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    await manual.claim()
    await api.client.post(f"{path}/prompts", json={"prompt": "More"})
    response = await api.client.post(f"{path}/cancel")
    assert (response.status_code, response.json()) == (202, {"cancelled": 1, "cancelling": 1})
    await manual.conn.execute(
        "SELECT outbox_end_cancelled(%s, %s, %s)", (manual.id, manual.row, manual.attempt)
    )
    response = await api.client.post(f"{path}/cancel")
    assert (response.status_code, response.json()) == (200, {"cancelled": 0, "cancelling": 0})
    shown = (await api.client.get(path)).json()
    assert [prompt["status"] for prompt in shown["prompts"]] == ["cancelled", "cancelled"]


async def test_rename(api: Api) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    renamed = await api.client.patch(path, json={"title": "New"})
    assert renamed.json()["title"] == "New"
    merge = {"Content-Type": "application/merge-patch+json"}
    assert (await api.client.patch(path, content=b'{"title": "N"}', headers=merge)).status_code == 200
    refused = await api.client.patch(path, json={"branch": "other"})
    assert {error["pointer"] for error in refused.json()["errors"]} == {"#/title", "#/branch"}


async def test_archived_session_can_only_be_read(api: Api, connect: Connect) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    for _ in range(2):
        response = await api.client.delete(path)
        assert (response.status_code, response.content) == (204, b"")
    shown = (await api.client.get(path)).json()
    assert (shown["session_status"], shown["inbox_status"]) == ("archived", "archived")
    assert shown["prompts"][0]["status"] == "cancelled"
    for refused in (
        await api.client.post(f"{path}/prompts", json={"prompt": "More"}),
        await api.client.patch(path, json={"title": "New"}),
    ):
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:outwake:problem:archived")


async def test_prompt_that_commits_while_its_session_is_archived_is_cancelled(
    api: Api, connect: Connect
) -> None:
    created = await api.create()
    writer = await connect(autocommit=False)
    await writer.execute("SELECT prompt_create(%s, NULL, 'More', false)", (UUID(created["id"]),))
    archiving = asyncio.create_task(api.client.delete(f"/sessions/{created['id']}"))
    watcher = await connect()
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    while (await (await watcher.execute(waiting)).fetchone()) == (0,):
        pass
    await writer.commit()
    assert (await archiving).status_code == 204
    assert await fetch(connect, "SELECT DISTINCT state FROM outbox") == [("cancelled",)]
    assert await fetch(connect, "SELECT inbox_status FROM session") == [("archived",)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("PATCH", ""),
        ("POST", "/prompts"),
        ("POST", "/cancel"),
        ("GET", "/messages"),
        ("GET", "/events"),
    ],
)
async def test_unknown_session(api: Api, method: str, path: str) -> None:
    body = {"PATCH": {"title": "x"}, "POST": {"prompt": "x"}}.get(method)
    for session_id in (str(uuid4()), "nonsense"):
        response = await api.client.request(method, f"/sessions/{session_id}{path}", json=body)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


async def test_messages_of_one_page_are_bounded_by_their_real_size(api: Api, manual: ManualWorker) -> None:
    """A megabyte of one letter is stored in some kilobytes."""
    created = await api.create()
    await manual.claim()
    for _ in range(8):
        await manual.say("x" * 1_000_000)
    page = await api.client.get(f"/sessions/{created['id']}/messages", params={"limit": 1000})
    assert len(page.content) < messages.PAGE_BYTES + 1_100_000
    assert page.json()["next"] == len(page.json()["messages"])
    seqs: list[int] = []
    after: int | None = 0
    while after is not None:
        page = await api.client.get(f"/sessions/{created['id']}/messages", params={"after": after})
        seqs += [message["seq"] for message in page.json()["messages"]]
        after = page.json()["next"]
    assert seqs == list(range(1, 9))


async def test_a_session_shows_its_newest_prompts_and_lists_the_others(
    api: Api, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    for number in range(1, 8):
        await api.client.post(f"{path}/prompts", json={"prompt": f"Turn {number}"})
    monkeypatch.setattr(sessions, "PROMPTS", 3)
    shown = (await api.client.get(path)).json()
    assert [prompt["text"] for prompt in shown["prompts"]] == ["Turn 5", "Turn 6", "Turn 7"]
    listed: list[str] = []
    cursor = shown["prompts_next"]
    while cursor:
        page = await api.client.get(f"{path}/prompts", params={"cursor": cursor, "limit": 2})
        listed += [prompt["text"] for prompt in page.json()["prompts"]]
        cursor = page.json()["next"]
    assert listed == ["Turn 4", "Turn 3", "Turn 2", "Turn 1", "Do it"]


async def test_a_session_with_too_much_text_still_answers(api: Api, connect: Connect) -> None:
    created = await api.create()
    conn = await connect()
    await conn.execute(
        "INSERT INTO prompt (session_id, text) SELECT %s, repeat('x', 200000) FROM generate_series(1, 1500)",
        (created["id"],),
    )
    for path in (f"/sessions/{created['id']}", f"/ui/sessions/{created['id']}"):
        answer = await api.client.get(path) if "ui" not in path else await plain(api, path)
        assert answer.status_code == 200
        assert len(answer.content) < sessions.PAGE_BYTES + 1_000_000
    refused = await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "More"})
    assert (refused.status_code, refused.json()["title"]) == (
        409,
        "The session has as many prompts as it may",
    )


async def test_the_prompts_of_a_session_are_limited_in_bytes(api: Api, connect: Connect) -> None:
    created = await api.create()
    conn = await connect()
    await conn.execute(
        "INSERT INTO prompt (session_id, text) SELECT %s, repeat('€', 200000) FROM generate_series(1, 26)",
        (created["id"],),
    )
    path = f"/sessions/{created['id']}/prompts"
    assert (await api.client.post(path, json={"prompt": "€" * 200_000})).status_code == 201
    assert (await api.client.post(path, json={"prompt": "€" * 200_000})).status_code == 409
    assert (await api.client.post(path, json={"prompt": "More"})).status_code == 201


async def test_an_owner_sees_why_a_turn_is_tried_again(api: Api, manual: ManualWorker) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    assert created["prompts"][0]["retrying"] is None
    await manual.claim()
    await manual.conn.execute(
        "SELECT outbox_fail(%s, %s, %s, 'no such branch: main', '1 hour', false)",
        (manual.id, manual.row, manual.attempt),
    )
    [prompt] = (await api.client.get(path)).json()["prompts"]
    assert (prompt["status"], prompt["reason"]) == ("queued", None)
    assert prompt["retrying"]["error"] == "no such branch: main"
    assert (prompt["retrying"]["failures"], prompt["retrying"]["max_attempts"]) == (1, 10)
    assert prompt["retrying"]["next_try_at"] > prompt["created_at"]
    page = (await plain(api, f"/ui{path}")).text
    assert "no such branch: main" in page
    assert "failed 1 of 10 times" in page
    assert "next try" in page


async def plain(api: Api, path: str) -> httpx.Response:
    """A page, which is no part of the API's document."""
    async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        return await client.get(path)

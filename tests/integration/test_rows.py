"""The outbox over HTTP: dead rows are listed, retried, discarded and cancelled."""

from typing import Any

from outwake.session import token
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.manual_worker import ManualWorker


async def dead(api: Api, manual: ManualWorker, reason: str = "broken") -> int:
    await api.create()
    await manual.claim()
    await manual.fail(reason, permanent=True)
    assert manual.row is not None
    return manual.row


async def change(api: Api, row: int, name: str) -> tuple[int, dict[str, Any]]:
    response = await api.client.post(f"/outbox/{row}/{name}")
    return response.status_code, response.json()


async def test_dead_row_is_listed_with_its_error_and_retried(api: Api, manual: ManualWorker) -> None:
    row = await dead(api, manual)
    page = (await api.client.get("/outbox?state=dead")).json()
    assert [found["id"] for found in page["rows"]] == [row]
    assert page["rows"][0]["errors"][0]["error"] == "broken"
    status, retried = await change(api, row, "retry")
    assert (status, retried["state"], retried["failures"]) == (200, "ready", 0)
    await manual.claim()
    assert manual.row == row
    assert (await api.client.get("/outbox")).json()["rows"] == []


async def test_discarded_row_is_cancelled_for_good(api: Api, manual: ManualWorker) -> None:
    row = await dead(api, manual)
    assert (await change(api, row, "discard"))[1]["state"] == "cancelled"
    status, problem = await change(api, row, "discard")
    assert (status, problem["type"]) == (409, "urn:outwake:problem:wrong-state")
    assert problem["state"] == "cancelled"


async def test_cancel_of_a_waiting_and_of_a_running_row(api: Api, manual: ManualWorker) -> None:
    await api.create()
    status, cancelled = await change(api, 1, "cancel")
    assert (status, cancelled["state"]) == (200, "cancelled")
    await api.create()
    await manual.claim()
    assert manual.row is not None
    status, running = await change(api, manual.row, "cancel")
    assert (status, running["state"]) == (202, "running")
    assert running["cancel_requested_at"] is not None


async def test_pages_of_dead_rows(api: Api, manual: ManualWorker) -> None:
    made = [await dead(api, manual, str(number)) for number in range(5)]
    listed: list[int] = []
    query = {"limit": "2"}
    while True:
        page = (await api.client.get("/outbox", params=query)).json()
        listed += [row["id"] for row in page["rows"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert listed == made[::-1]


async def test_retry_while_another_row_has_its_unique_key(api: Api, connect: Connect) -> None:
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, unique_key, state, finished_at) VALUES ('a', 'k', 'dead', now())"
    )
    await conn.execute("INSERT INTO outbox (topic, unique_key) VALUES ('a', 'k')")
    status, problem = await change(api, 1, "retry")
    assert (status, problem["type"]) == (409, "urn:outwake:problem:wrong-state")


async def test_borrow_token_is_not_shown(api: Api, connect: Connect) -> None:
    payload = '{"session_id": "x", "sandbox": {"item": {"id": "s1"}, "borrow_token": "hush"}}'
    conn = await connect()
    await conn.execute("INSERT INTO outbox (topic, payload) VALUES ('sandbox.return', %s)", (payload,))
    shown = await api.client.get("/outbox/1")
    assert shown.json()["payload"] == {"session_id": "x", "sandbox": {"item": {"id": "s1"}}}


async def test_unknown_row(api: Api) -> None:
    for row in ("1", "0", str(2**63), "9" * 40):
        assert (await api.client.get(f"/outbox/{row}")).status_code == 404
        assert (await api.client.post(f"/outbox/{row}/retry")).status_code == 404


async def test_users_who_are_no_operators(api: Api, manual: ManualWorker, connect: Connect) -> None:
    """They see their own sessions, and no outbox."""
    row = await dead(api, manual)
    theirs = await api.create()
    _, text = await token.create(await connect(), "someone", "test")
    api.client.headers["Authorization"] = f"Bearer {text}"
    mine = await api.create(repo="a/mine")
    assert mine["user_id"] == "someone"
    listed = (await api.client.get("/sessions")).json()["sessions"]
    assert [session["id"] for session in listed] == [mine["id"]]
    path = f"/sessions/{theirs['id']}"
    for response in (
        await api.client.get(path),
        await api.client.get(f"{path}/messages"),
        await api.client.get(f"{path}/events"),
        await api.client.post(f"{path}/prompts", json={"prompt": "x"}),
        await api.client.post(f"{path}/cancel"),
        await api.client.patch(path, json={"title": "x"}),
        await api.client.delete(path),
    ):
        assert response.status_code == 404
    parent = {"repo": "a/b", "target_branch": "main", "parent": theirs["id"]}
    assert (await api.client.post("/sessions", json=parent)).status_code == 422
    for method, place in (("GET", "/outbox"), ("GET", f"/outbox/{row}"), ("POST", f"/outbox/{row}/retry")):
        assert (await api.client.request(method, place)).status_code == 403

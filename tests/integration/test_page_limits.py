"""What a page of the dashboard must survive: texts that are costly, numbers that are odd, much of both."""

import json
import random
import re
import time
from typing import Any

import httpx
import pytest
from psycopg.types.json import Jsonb

from outwake.app.dashboard import markdown
from outwake.app.dashboard.markdown import Budget, to_html
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.lag import watching_lag
from tests.support.manual_worker import ManualWorker

LENGTH = 20_000
COSTLY = {
    "brackets": "[",
    "images": "![",
    "links": "[a](",
    "quotes": ">" * 10_000 + "a\n",
    "emphasis": "**a_",
    "angles": "<a ",
    "entities": "&a",
    "autolinks": "<a@",
    "references": "[x]: <",
    "comments": "<!--",
}


async def page(api: Api, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        return await client.get(path)


@pytest.mark.parametrize("part", COSTLY.values(), ids=COSTLY)
def test_a_text_too_costly_to_render_is_shown_as_text(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the text is no more steps, once the budget is spent."""
    steps = 0

    def clock() -> float:  # counts steps instead of time
        nonlocal steps
        steps += 1
        return float(steps)

    monkeypatch.setattr(time, "thread_time", clock)
    monkeypatch.setattr(markdown, "TEXT_SECONDS", 2000.0)
    for text in (part * (LENGTH // len(part)), part * (2 * LENGTH // len(part))):
        steps = 0
        budget = Budget(5000.0)
        html = to_html(text, budget)
        assert steps <= 2100
        assert (html == "") == (budget.refused == 1)


async def test_a_page_of_costly_texts_is_shown_and_keeps_nobody(api: Api, manual: ManualWorker) -> None:
    session = await api.create()
    await manual.claim()
    texts = [part * (LENGTH // len(part)) for part in COSTLY.values()]
    await manual.say(*texts, *texts, "**fine**")
    async with watching_lag() as lag:
        answer = await page(api, f"/ui/sessions/{session['id']}")
        while_built = lag.turns
    assert answer.status_code == 200
    assert answer.text.count('<pre class="prose"') >= 10
    assert while_built > 20, "the loop went on while the page was built"


@pytest.mark.parametrize(
    "body",
    [
        '{"type": "result", "total_cost_usd": 1%s, "num_turns": 1%s, "duration_ms": 1%s}'
        % (("0" * 400,) * 3),
        '{"type": "result", "total_cost_usd": 1%s}' % ("0" * 5000),
        '{"type": "result", "usage": {"input_tokens": -1e400, "output_tokens": 1e300}}',
        '{"type": "x", "deep": %s}' % ("[" * 2000 + "]" * 2000),
    ],
    ids=["400 digits", "5000 digits", "floats", "deep"],
)
async def test_a_page_shows_any_number_and_any_depth(
    api: Api, connect: Connect, manual: ManualWorker, body: str
) -> None:
    session = await api.create()
    await manual.claim()
    await manual.say("before")
    conn = await connect()
    await conn.execute("UPDATE message SET body = %s::jsonb", (body,))
    if "deep" not in body:
        await conn.execute("UPDATE prompt SET result = jsonb_build_object('agent', %s::jsonb)", (body,))
    for path in ("/", f"/ui/sessions/{session['id']}", f"/ui/sessions/{session['id']}/messages/1"):
        assert (await page(api, path)).status_code == 200, path


async def test_a_row_with_odd_errors_has_a_page(api: Api, connect: Connect) -> None:
    conn = await connect()
    strange: list[Any] = [
        [{"at": "never", "attempt": 1, "error": "x"}],
        [{"at": "300000-01-01", "attempt": 10**12, "worker_id": "me", "error": 5}],
        [{"at": None}, 7, "x", {"attempt": "1.5"}],
        {"at": 1},
        "x",
    ]
    for errors in strange:
        cursor = await conn.execute(
            "INSERT INTO outbox (topic, state, errors, payload, finished_at)"
            " VALUES ('x', 'dead', %s, %s::jsonb, clock_timestamp()) RETURNING id",
            (Jsonb(errors), json.dumps({"n": int("1" + "0" * 1000)})),
        )
        row = await cursor.fetchone()
        assert row is not None
        for path in (f"/ui/outbox/{row[0]}", "/ui/dead", "/ui/outbox?state=dead"):
            assert (await page(api, path)).status_code == 200, (errors, path)


async def test_a_page_of_dead_rows_is_bounded_by_its_bytes(api: Api, connect: Connect) -> None:
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, state, payload, finished_at)"
        " SELECT 'x', 'dead', %s, clock_timestamp() FROM generate_series(1, 7)",
        (Jsonb("x" * 900_000),),
    )
    sizes: list[int] = []
    cursor = None
    while cursor is not None or not sizes:
        asked = {"limit": "50", **({"cursor": cursor} if cursor else {})}
        found = (await api.client.get("/outbox", params=asked)).json()
        sizes.append(len(found["rows"]))
        cursor = found["next"]
    assert sizes == [3, 3, 1]


async def test_a_list_of_sessions_reads_a_bounded_part_of_their_results(api: Api, connect: Connect) -> None:
    session = await api.create()
    conn = await connect()
    result = {"cost": 1.25, "agent": {"type": "result", "result": random.Random(1).randbytes(10_000).hex()}}
    await conn.execute(
        "INSERT INTO prompt (session_id, text, result, status)"
        " SELECT %s, 'x', %s, 'succeeded' FROM generate_series(1, 10)",
        (session["id"], Jsonb(result)),
    )
    shown = (await page(api, "/")).text
    cost = re.search(r"<span>\$(\d+\.\d+)\+</span>", shown)
    assert cost is not None, "the cost is told as that of the newest prompts"
    assert 0 < float(cost[1]) < 10 * 1.25


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ui/outbox?topic=%00", 422),
        ("/ui/outbox?topic=A%20b", 422),
        ("/?repo=%00", 422),
        ("/ui/outbox/" + "9" * 5000, 404),
        ("/ui/sessions/00000000-0000-7000-8000-000000000000/messages/" + "9" * 5000, 404),
        ("/ui/sessions/00000000-0000-7000-8000-000000000000?after=" + "9" * 5000, 404),
        ("/outbox/" + "9" * 400, 404),
        ("/outbox/" + "9" * 5000, 404),
        ("/sessions?limit=" + "9" * 5000, 422),
        ("/sessions?cursor=%00", 422),
    ],
)
async def test_odd_addresses_are_the_clients_fault(api: Api, path: str, status: int) -> None:
    assert (await page(api, path)).status_code == status

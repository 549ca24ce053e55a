"""The API's /metrics and its readiness."""

import httpx

from outwake.app.api.metrics import REGISTRY
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.scraped import Samples, samples
from tests.support.steps import add, until
from tests.support.waits import awaiting


async def scrape(api: Api) -> Samples:
    answer = await api.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


async def test_requests_by_route_and_status(api: Api) -> None:
    before = await scrape(api)
    created = await api.create()
    await api.client.get(f"/sessions/{created['id']}")
    await api.client.get("/sessions/0199a2c4-6f00-7000-8000-000000000001")
    after = await scrape(api)

    def more(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    name = "outwake_http_requests_total"
    assert more(name, "POST", "/sessions", "201") == 1
    assert more(name, "GET", "/sessions/{id:uuid}", "200") == 1
    assert more(name, "GET", "/sessions/{id:uuid}", "404") == 1
    assert more("outwake_http_request_seconds_count", "GET", "/sessions/{id:uuid}") == 2
    assert after[("outwake_outbox_rows", "session.run", "ready", "due")] == 1
    assert after[("outwake_database_up",)] == 1
    assert ("outwake_api_listen_connected",) in after


async def test_strangers_make_no_labels(api: Api) -> None:
    async def labels() -> set[tuple[str, ...]]:
        return {key for key in await scrape(api) if key[0] == "outwake_http_requests_total"}

    async with httpx.AsyncClient(base_url=api.url) as stranger:
        await stranger.get("/no/such/page")
        await stranger.request("FROB", "/sessions/0")
        await labels()  # a scrape is a request too
        before = await labels()
        for number in range(5):
            await stranger.get(f"/no/such/page/{number}")
            await stranger.request(f"FROB{number}", f"/sessions/{number}")
    assert await labels() == before


async def test_a_stream_is_timed_to_its_first_byte(api: Api) -> None:
    created = await api.create()
    async with api.follow(created["id"]) as events:
        await events.next("status")
        found = await scrape(api)
        assert found[("outwake_http_requests_in_progress",)] >= 2  # this scrape, and the stream
    route = ("GET", "/sessions/{id:uuid}/events")
    count = ("outwake_http_request_seconds_count", *route)
    async with awaiting("the stream to be counted", seen=lambda: found):
        while not (found := await scrape(api)).get(count):
            pass  # the server has yet to notice that we left
    assert found[("outwake_http_request_seconds_bucket", *route, "10.0")] == found[count]


async def test_ready_says_what_is_stuck(database: str, connect: Connect) -> None:
    conn = await connect()
    async with serving(database, OUTWAKE_STUCK_AFTER=0.001) as api:
        row_id = await add(conn, "fax.send")
        await until(conn, "SELECT stuck FROM outbox_ready('1 millisecond')")
        answer = await api.client.get("/readyz?workers=1")
        assert answer.status_code == 503
        assert f"row {row_id} of topic fax.send" in answer.json()["detail"]
        assert answer.json()["checks"]["nothing_stuck"] is False


def test_the_registry_is_ours() -> None:
    """Nothing of other libraries, which would change with them."""
    assert all(family.name.startswith("outwake_") for family in REGISTRY.collect())

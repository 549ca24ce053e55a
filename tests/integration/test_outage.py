"""Postgres down, full or read-only: 503 at once with Retry-After, and all is well when it is back.

"At once" is shown without a clock: the pool's timeout is an hour, so that an answer is no timeout.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from psycopg import errors as pg
from psycopg.conninfo import make_conninfo

from outwake._migrate import migrate
from outwake.app.database import Database
from outwake.embedded.postgres import EmbeddedPostgres
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.database import set_search_path
from tests.support.manual_worker import ManualWorker
from tests.support.waits import awaiting, eventually


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of this test's own, which it may stop."""
    server = EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off", "max_connections": 20})
    server.start()
    set_search_path(server.url)
    asyncio.run(migrate(server.url))
    yield server
    server.remove()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outwake.app.database.WAIT_TIMEOUT", 3600.0)


def assert_unavailable(response: Any) -> None:
    assert response.status_code == 503
    assert response.json()["type"] == "urn:outwake:problem:unavailable"
    assert int(response.headers["retry-after"]) > 0


@pytest.fixture
async def own_api(postgres: EmbeddedPostgres) -> AsyncIterator[Api]:
    async with serving(postgres.url, OUTWAKE_POOL_SIZE=4) as running:
        yield running


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_stop_and_start_under_a_live_api(own_api: Api, postgres: EmbeddedPostgres, mode: Any) -> None:
    api = own_api
    created = await api.create()
    # Fill the pool, so that all its connections go stale.
    await asyncio.gather(*(api.client.get("/sessions") for _ in range(20)))
    async with api.follow(created["id"]) as events:
        await events.status()
        await asyncio.to_thread(postgres.stop, mode)
        for _ in range(3):
            asked = {"repo": "a/b", "target_branch": "main"}
            responses = await asyncio.gather(
                api.client.get("/sessions"),
                api.client.post("/sessions", json=asked),
                api.client.get(f"/sessions/{created['id']}/messages"),
                api.client.get(f"/sessions/{created['id']}/events"),
                api.client.post("/outbox/1/retry"),
            )
            for response in responses:
                assert_unavailable(response)
        ready = await api.client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["database"]) == (503, False)
        assert (await api.client.get("/healthz")).status_code == 200

        await asyncio.to_thread(postgres.start)
        async with awaiting("the API to have its database again"):
            await api.context.database.wait_available()
        # The first requests already: no stale connection is handed to one.
        for response in await asyncio.gather(*(api.client.get("/sessions") for _ in range(10))):
            assert response.status_code == 200
        await eventually("the API to listen", lambda: api.context.hub.listening)
        # The stream lives on, and is fed again.
        await api.client.patch(f"/sessions/{created['id']}", json={"title": "Back"})
        await events.status(title="Back")
        assert (await api.client.get("/readyz")).status_code == 200


async def test_request_that_waits_for_a_connection_is_refused_when_the_outage_begins(
    postgres: EmbeddedPostgres,
) -> None:
    async with serving(postgres.url, OUTWAKE_POOL_SIZE=1) as api:
        database = api.context.database
        async with database.connection():
            waiting = [asyncio.create_task(api.client.get("/sessions")) for _ in range(5)]
            await eventually("five requests to wait for a connection", lambda: len(database._waiting) == 5)
            await asyncio.to_thread(postgres.stop)
        for task in waiting:
            assert_unavailable(await task)


async def test_start_before_postgres(postgres: EmbeddedPostgres) -> None:
    postgres.stop()
    async with serving(postgres.url) as api:
        assert_unavailable(await api.client.get("/sessions"))
        await asyncio.to_thread(postgres.start)
        async with awaiting("the API to have its database again"):
            await api.context.database.wait_available()
        assert (await api.client.get("/sessions")).status_code == 200


async def test_no_connection_left_is_no_outage_while_we_have_one(
    own_api: Api, postgres: EmbeddedPostgres, connect: Connect
) -> None:
    """The pool wants another connection and gets none: the request waits for one it has."""
    api = own_api
    database = api.context.database
    await eventually("the API to listen", lambda: api.context.hub.listening)
    await database.row("SELECT 1")
    with suppress(pg.OperationalError):
        while True:
            await connect(postgres.url)
    async with AsyncExitStack() as taken:
        await taken.enter_async_context(database.connection())
        while database._pool.get_stats()["pool_available"]:
            await taken.enter_async_context(database.connection())
        waiting = asyncio.create_task(api.client.get("/sessions"))
        await eventually("the database to be probed", lambda: database._probe is not None)
        assert database.available
        assert not waiting.done()
    assert (await waiting).status_code == 200


async def test_connections_that_were_cut_are_replaced_unseen(api: Api, connect: Connect) -> None:
    await asyncio.gather(*(api.client.get("/sessions") for _ in range(20)))
    operator = await connect()
    await operator.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'outwake api'"
    )
    for _ in range(20):
        assert (await api.client.get("/sessions")).status_code == 200


async def test_read_only_database(database: str) -> None:
    url = make_conninfo(database, options="-c default_transaction_read_only=on")
    async with serving(url) as api:
        response = await api.client.post("/sessions", json={"repo": "a/b", "target_branch": "main"})
        assert_unavailable(response)
        assert "read-only" in response.json()["detail"]
        assert (await api.client.get("/sessions")).status_code == 200


@pytest.mark.parametrize("sqlstate", ["53100", "57P01", "57P03", "53300", "57014", "55P03"])
async def test_errors_that_pass(api: Api, connect: Connect, sqlstate: str) -> None:
    operator = await connect()
    await operator.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END $$"
    )
    await operator.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    asked = {"repo": "a/b", "target_branch": "main"}
    assert_unavailable(await api.client.post("/sessions", json=asked))
    count = await operator.execute("SELECT count(*) FROM session")
    assert await count.fetchone() == (0,)


async def test_lock_that_is_not_released_ends_the_request(
    api: Api, connect: Connect, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setattr("outwake.app.database.LOCK_TIMEOUT", 0.05)
    async with serving(database) as impatient:
        created = await impatient.create()
        blocker = await connect(autocommit=False)
        await blocker.execute("LOCK TABLE session")
        response = await impatient.client.patch(f"/sessions/{created['id']}", json={"title": "x"})
        assert_unavailable(response)


async def test_server_that_goes_silent_ends_the_request(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement's own timeout is the server's, which does not answer any more."""
    monkeypatch.setattr("outwake.app.database.ANSWER_TIMEOUT", 0.05)
    with pytest.raises(pg.OperationalError):
        await api.context.database.row("SELECT pg_sleep(3600)")
    assert (await api.client.get("/healthz")).status_code == 200


async def test_schema_that_is_missing(empty_database: str) -> None:
    async with serving(empty_database) as api:
        response = await api.client.get("/sessions")
        assert_unavailable(response)
        assert "outwake migrate" in response.json()["detail"]
        assert (await api.client.get("/readyz")).json()["checks"]["schema_fits"] is False


async def test_victim_of_a_deadlock_is_repeated(
    api: Api, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = api.context.database
    operator = await connect()
    await operator.execute("CREATE SEQUENCE tries")
    await operator.execute(
        "CREATE FUNCTION unlucky() RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT AS $$ BEGIN"
        " IF nextval('tries') < 3 THEN RAISE EXCEPTION 'no' USING ERRCODE = '40P01'; END IF;"
        " RETURN 'done'; END $$"
    )
    assert await database.row("SELECT outwake.unlucky()") == ("done",)


async def test_ready_with_and_without_a_worker(api: Api, manual: ManualWorker) -> None:
    await eventually("the API to listen", lambda: api.context.hub.listening)
    ready = await api.client.get("/readyz?workers=1")
    assert (ready.status_code, ready.json()["worker_present"]) == (200, True)
    await manual.conn.close()
    api.context.presence._read_at = float("-inf")
    absent = await api.client.get("/readyz?workers=1")
    assert (absent.status_code, absent.json()["detail"]) == (503, "Not so: worker_present.")
    assert (await api.client.get("/readyz")).status_code == 200
    assert json.loads((await api.client.get("/healthz")).text) == {"status": "alive"}

"""What a worker and an API process that run do when somebody migrates to a version that they do not know."""

import pytest

from tests.conftest import Connect
from tests.support.api import Api
from tests.support.process import running

_MIGRATED = """
INSERT INTO migration (name, line, number, sha256, breaking, version)
VALUES ('outbox/9001_next', 'outbox', 9001, '', %s, '7.0.0')
"""
_CALL = "NOTIFY outwake_wake, '*@0'"  # as outwake/_migrate.py does


@pytest.mark.parametrize("breaking", [False, True])
async def test_a_worker_looks_at_the_schema_when_it_is_called(
    breaking: bool, database: str, connect: Connect
) -> None:
    conn = await connect()
    async with running("worker", env={"DATABASE_URL": database, "OUTWAKE_LOG_LEVEL": "debug"}) as worker:
        parked = await worker.event("parked")
        await conn.execute(_MIGRATED, (breaking,))
        await conn.execute(_CALL)
        if breaking:
            assert await worker.ended() == 2
            assert worker.stderr[-1].startswith("worker: the database has outbox/9001_next, of version 7.0.0")
        else:
            await worker.event("schema_differs", after=parked, schema="newer")


async def test_an_api_that_cannot_go_on_says_why(api: Api, connect: Connect) -> None:
    conn = await connect()
    await conn.execute(_MIGRATED, (False,))
    assert (await api.client.get("/readyz")).json()["database_schema"] == "newer"
    await conn.execute("UPDATE migration SET breaking = true WHERE number = 9001")
    answer = await api.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith(
        "Not so: schema_fits. The database has outbox/9001_next, of version"
    )
    assert answer.json()["checks"]["schema_fits"] is False

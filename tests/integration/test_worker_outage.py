"""Postgres goes away under a worker, or takes no writes: agents run on, and what they said is stored
afterwards, by the same attempt.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psycopg
import pytest

from outwake._claim import Claimed
from outwake._migrate import migrate
from outwake.embedded.demo import make_repository
from outwake.embedded.postgres import EmbeddedPostgres
from outwake.handler import Job
from outwake.worker.engine.lease import Lease
from outwake.worker.messages import Messages
from tests.support.database import set_search_path
from tests.support.waits import awaiting
from tests.support.worker_env import LEASE, WorkerEnv

LINES = 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server that a test may stop."""
    server = EmbeddedPostgres(tmp_path / "postgres")
    server.start()
    try:
        set_search_path(server.url)
        yield server
    finally:
        server.remove()


async def new_session(url: str, repository: str, prompt: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute(
            """
            WITH s AS (
                INSERT INTO session (repo, target_branch, branch, title)
                VALUES (%s, 'main', 'work', 'A test') RETURNING id
            ), p AS (
                INSERT INTO prompt (session_id, text) SELECT id, %s FROM s RETURNING id, session_id
            )
            INSERT INTO outbox (topic, ordering_key, payload)
            SELECT 'session.run', 'session:' || session_id,
                   jsonb_build_object('session_id', session_id, 'prompt_id', id)
            FROM p
            """,
            (repository, prompt),
        )


async def outcome(url: str) -> tuple[Any, ...]:
    """(state, attempt, prompt's status, messages, highest seq, numbered lines)"""
    async with await psycopg.AsyncConnection.connect(url) as conn:
        cursor = await conn.execute(
            """
            SELECT o.state, o.attempt, p.status, count(*), max(m.seq),
                   count(*) FILTER (WHERE m.body #>> '{message,content,0,text}' ~ '^[0-9]+ x')
            FROM outbox AS o, prompt AS p JOIN message AS m ON m.prompt_id = p.id
            WHERE o.topic = 'session.run'
            GROUP BY 1, 2, 3
            """
        )
        row = await cursor.fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_an_agent_outlives_an_outage_and_its_output_is_stored(
    server: EmbeddedPostgres, tmp_path: Path, mode: Literal["fast", "immediate"]
) -> None:
    await migrate(server.url)
    worker_env = WorkerEnv(server.url, tmp_path)
    repository = make_repository(tmp_path / "repository").as_uri()
    away, done = worker_env.fifo("away"), worker_env.fifo("done")
    async with worker_env.worker() as worker:
        await worker.event("parked")
        prompt = f"lines:{LINES // 2} wait-for:{away} lines:{LINES // 2} wait-for:{done}"
        await new_session(server.url, repository, prompt)
        await worker.event("agent_started")
        await asyncio.to_thread(server.stop, mode)
        lost = await worker.event("disconnected")
        await asyncio.to_thread(away.write_bytes, b"")
        await worker.event("database_away")
        # Longer than a lease: had anybody been able to rescue, the agent would have to be stopped.
        for _ in range(int(LEASE / 0.5)):
            lost = await worker.event("disconnected", after=lost)
        await asyncio.to_thread(server.start)
        await worker.event("reconnected", running=1)
        await asyncio.to_thread(done.write_bytes, b"")
        await worker.event("ended", topic="session.run", state="settled by its handler")
        state, attempt, status, count, highest, lines = await outcome(server.url)
        assert (state, attempt, status) == ("done", 1, "succeeded")
        assert count == highest
        assert lines == LINES


@pytest.mark.parametrize("sqlstate", ["53100", "25006"])
async def test_a_full_disk_and_read_only_are_outages(
    server: EmbeddedPostgres, tmp_path: Path, sqlstate: str
) -> None:
    """A trigger says what the server would say: it cannot be made to run out of disk here."""
    await migrate(server.url)
    worker_env = WorkerEnv(server.url, tmp_path)
    repository = make_repository(tmp_path / "repository").as_uri()
    go = worker_env.fifo("go")
    async with (
        worker_env.worker() as worker,
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as conn,
    ):
        await worker.event("parked")
        await new_session(server.url, repository, f"wait-for:{go} lines:{LINES}")
        await worker.event("agent_started")
        await conn.execute(
            f"""
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '{sqlstate}'; END $$;
            CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON message
                FOR EACH STATEMENT EXECUTE FUNCTION full_disk();
            CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON worker
                FOR EACH STATEMENT EXECUTE FUNCTION full_disk();
            """.encode()
        )
        await asyncio.to_thread(go.write_bytes, b"")
        await worker.event("database_away")
        await worker.event("disconnected")
        await conn.execute("DROP FUNCTION full_disk CASCADE")
        await worker.event("ended", topic="session.run", state="settled by its handler")
    state, attempt, status, count, highest, lines = await outcome(server.url)
    assert (state, attempt, status) == ("done", 1, "succeeded")
    assert (count, lines) == (highest, LINES)


ROW = Claimed(1, "session.run", None, {}, 1, 0, 10, None, None, timedelta(0), 0, datetime.now(UTC))


class Away:
    """A database that is away until it is not."""

    def __init__(self) -> None:
        self.asked, self.back = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> None:
        self.asked.set()
        await self.back.wait()
        raise RuntimeError("it is back")

    async def __aexit__(self, *_: object) -> None: ...


async def test_output_beyond_the_bound_makes_the_agent_wait() -> None:
    """At most 16 MiB wait in memory: `put` returns once there is room."""
    away = Away()
    job = Job(ROW, uuid4(), Lease(LEASE, 0, lambda: None), lambda: away)  # type: ignore[arg-type,return-value]
    batch = ["x" * (2**20 + 1)]
    with pytest.raises(RuntimeError, match="it is back"):
        async with Messages(job, uuid4(), uuid4()) as messages:
            for _ in range(15):
                await messages.put(batch)
            one_more = asyncio.create_task(messages.put(batch))
            async with awaiting("the database to be asked"):
                await away.asked.wait()
            done, _ = await asyncio.wait({one_more}, timeout=0.05)
            assert not done
            away.back.set()
            await one_more

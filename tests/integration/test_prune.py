"""Housekeeping is an outbox row that schedules its successor."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import LiteralString
from uuid import uuid4

import pytest

from outwake.prune import prune
from outwake.settings import Settings
from tests.conftest import Connect
from tests.support.process import running
from tests.support.steps import Connection, claim_ids, column, new_worker, one

PRUNE_ROW: LiteralString = (
    "INSERT INTO outbox (topic, unique_key, max_attempts) VALUES ('outbox.prune', 'outbox.prune', 32767)"
)


async def test_what_is_past_its_retention_goes_and_the_rest_stays(
    database: str, connect: Connect, tmp_path: Path
) -> None:
    conn = await connect()
    await conn.execute(
        """
        INSERT INTO outbox (topic, state, worker_id, created_at, finished_at)
        SELECT 't', s.state, gen_random_uuid(), s.at, CASE WHEN s.state <> 'ready' THEN s.at END
        FROM generate_series(1, 2500) AS n,
             (VALUES ('done', now() - interval '8 days'), ('cancelled', now() - interval '8 days'),
                     ('done', now()), ('dead', now() - interval '90 days'),
                     ('ready', now() - interval '90 days')) AS s (state, at)
        """
    )
    await conn.execute(
        """
        WITH s AS (
            INSERT INTO session (repo, target_branch, branch, title, inbox_status, session_status,
                                 created_at, updated_at, deleted_at)
            SELECT 'o/r', 'main', 'b' || n, 't', i, CASE i WHEN 'archived' THEN i ELSE 'active' END,
                   at, at, CASE i WHEN 'archived' THEN at END
            FROM (VALUES (1, 'archived', now() - interval '8 days'),
                         (2, 'completed', now() - interval '91 days'),
                         (3, 'completed', now() - interval '8 days')) AS v (n, i, at)
            RETURNING id
        ), p AS (
            INSERT INTO prompt (session_id, text) SELECT id, 'p' FROM s RETURNING id, session_id
        )
        INSERT INTO message (session_id, seq, prompt_id, attempt, body)
        SELECT p.session_id, n, p.id, 1, '{}' FROM p, generate_series(1, 1200) AS n
        """
    )
    kept = await (await conn.execute("SELECT id FROM session WHERE session_status = 'active'")).fetchall()
    places = [tmp_path / str(row[0]) for row in kept]
    gone, foreign = tmp_path / str(uuid4()), tmp_path / "notes"
    for place in (*places, gone, foreign):
        place.mkdir()
    await conn.execute(PRUNE_ROW)
    environment = {"DATABASE_URL": database, "OUTWAKE_WORKSPACE_ROOT": str(tmp_path)}
    async with running("worker", "--topics", "outbox.prune", env=environment) as worker:
        pruned = await worker.event("pruned")
        await worker.event("ended", topic="outbox.prune")
    assert pruned["rows"] == 5000
    rows = await (
        await conn.execute("SELECT state, count(*) FROM outbox WHERE topic = 't' GROUP BY 1 ORDER BY 1")
    ).fetchall()
    assert rows == [("dead", 2500), ("done", 2500), ("ready", 2500)]
    left = await (
        await conn.execute(
            "SELECT branch, count(m.seq) FROM session LEFT JOIN message AS m ON m.session_id = id"
            " GROUP BY 1 ORDER BY 1"
        )
    ).fetchall()
    assert left == [("b2", 0), ("b3", 1200)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (*places, foreign)
    )
    successors = await (
        await conn.execute(
            "SELECT state, available_at > now() + interval '59 minutes', max_attempts FROM outbox"
            " WHERE topic = 'outbox.prune' ORDER BY id"
        )
    ).fetchall()
    assert successors == [("done", False, 32767), ("ready", True, 32767)]


SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$;
CREATE TRIGGER slow AFTER DELETE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


async def test_rests_after_each_page_as_long_as_it_took(database: str, connect: Connect) -> None:
    """Else a long deletion takes a core from the claims beside it."""
    conn = await connect()
    await conn.execute(
        "INSERT INTO outbox (topic, state, worker_id, finished_at)"
        " SELECT 't', 'done', gen_random_uuid(), now() FROM generate_series(1, 2500)"
    )
    await conn.execute(SLOW)
    pages: list[tuple[float, float]] = []  # when each began and ended
    deleted: list[int] = []

    @asynccontextmanager
    async def again() -> AsyncIterator[Connection]:
        began = time.monotonic()
        yield conn
        pages.append((began, time.monotonic()))

    await prune(
        again, Settings(database_url=database, retention=0), lambda done, _: deleted.append(done.rows)
    )
    assert deleted[-1] == 2500
    slow = [(page, after) for page, after in pairwise(pages[1:]) if page[1] - page[0] >= 0.1]
    assert len(slow) >= 2
    for (began, ended), (next_began, _) in slow:
        assert next_began - ended >= 0.9 * (ended - began)


@pytest.mark.parametrize(
    "end",
    [
        "SELECT outbox_cancel(id) FROM outbox WHERE state = 'ready'",
        "UPDATE outbox SET state = 'cancelled' WHERE state = 'ready'",
        "UPDATE outbox SET cancel_requested_at = now() WHERE state = 'ready'",
    ],
)
async def test_pruning_comes_back_whoever_cancels_it(connect: Connect, end: LiteralString) -> None:
    conn = await connect()
    await conn.execute(PRUNE_ROW)
    for times in (1, 2):
        await conn.execute(end)
        cursor = await conn.execute(
            "SELECT count(*) FILTER (WHERE state = 'cancelled' AND finished_at IS NOT NULL),"
            " count(*) FILTER (WHERE state = 'ready' AND available_at > now() + interval '59 minutes'"
            " AND max_attempts = 32767) FROM outbox"
        )
        assert await cursor.fetchone() == (times, 1)


@pytest.mark.parametrize(
    "end",
    [
        "SELECT outbox_end_cancelled(%s, 1, 1)",
        "SELECT outbox_hand_back(%s, '{1}', '{1}', '0')",
        "SELECT outbox_fail(%s, 1, 1, 'no', NULL, true)",
    ],
)
async def test_pruning_comes_back_if_it_is_cancelled_while_it_runs(
    end: LiteralString, connect: Connect
) -> None:
    conn = await connect()
    await conn.execute(PRUNE_ROW)
    worker = await new_worker(conn, "outbox.prune")
    assert await claim_ids(conn, worker, topics=("outbox.prune",)) == [1]
    await conn.execute("SELECT outbox_cancel(1)")
    await one(conn, end, worker)
    assert await column(conn, "SELECT state FROM outbox ORDER BY id") == ["cancelled", "ready"]

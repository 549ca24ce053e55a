"""Hot queries use their indexes: real statements with real values, enough rows, the planner left alone."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from outwake.app.api import messages, rows, sessions
from outwake.app.live import hub
from outwake.session import watch

FILL = """
INSERT INTO session (id, user_id, repo, target_branch, branch, title, inbox_status, last_seq, created_at)
SELECT md5(n::text)::uuid, 'user' || n % 10, 'octo/tools' || n % 100, 'main', 'b' || n, 't',
       CASE WHEN n % 1000 = 0 THEN 'pending' ELSE 'completed' END, 20,
       timestamptz '2026-01-01' + n * interval '1 second'
FROM generate_series(1, 20000) AS n;
INSERT INTO prompt (id, session_id, text, status)
SELECT md5('p' || n)::uuid, md5(n::text)::uuid, 'x', 'succeeded' FROM generate_series(1, 20000) AS n;
INSERT INTO message (session_id, seq, prompt_id, attempt, body)
SELECT md5(n::text)::uuid, m, md5('p' || n)::uuid, 1, '{"type": "assistant"}'
FROM generate_series(1, 4000) AS n, generate_series(1, 20) AS m;
INSERT INTO outbox (topic, ordering_key, payload, state, finished_at)
SELECT 'session.run', 'session:' || md5(n::text)::uuid,
       jsonb_build_object('session_id', md5(n::text)::uuid, 'prompt_id', md5('p' || n)::uuid),
       CASE WHEN n % 500 = 0 THEN 'dead' WHEN n % 501 = 0 THEN 'ready' ELSE 'done' END,
       CASE WHEN n % 500 <> 0 AND n % 501 = 0 THEN NULL ELSE now() END
FROM generate_series(1, 20000) AS n;
INSERT INTO watcher (session_id, presence)
SELECT md5(n::text)::uuid, 7 FROM generate_series(1, 2000) AS n;
ANALYZE;
"""
SESSION = UUID("c4ca4238-a0b9-2382-0dcc-509a6f75849b")  # md5('1')


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[psycopg.Connection[Any]]:
    from tests.support.database import new_database
    from tests.support.server import with_database

    with (
        new_database(server, template) as name,
        psycopg.connect(with_database(server, name), autocommit=True) as conn,
    ):
        conn.execute("SET synchronous_commit = off")
        conn.execute(FILL)
        yield conn


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def explain(conn: psycopg.Connection[Any], query: Any, values: Any) -> tuple[set[str], int]:
    """The indexes a statement used, and the pages it read. No table may be read as a whole."""
    if isinstance(query, str):
        query = sql.SQL(query)
    statement = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {}").format(query)
    row = conn.execute(statement, values).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    tables = ("session", "prompt", "message", "outbox", "watcher")
    for node in nodes(plan):
        whole = node["Node Type"] == "Seq Scan" and node["Relation Name"] in tables
        assert not whole, f"reads all of {node['Relation Name']}"
    indexes = {node["Index Name"] for node in nodes(plan) if "Index Name" in node}
    return indexes, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def listed(**filters: Any) -> tuple[Any, dict[str, Any]]:
    values = dict.fromkeys(sessions._CONDITIONS) | {"key": SESSION, "rows": 51} | filters
    applying = [text for name, text in sessions._CONDITIONS.items() if values[name] is not None]
    return sessions._LIST.format(conditions=sql.SQL(" AND ").join(applying)), values


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({"session_status": "active"}, "session_newest"),
        ({"session_status": "active", "at": datetime(2026, 1, 1, 2, tzinfo=UTC)}, "session_newest"),
        ({"session_status": "active", "scope": "user3"}, "session_newest_of_user"),
        ({"session_status": "active", "inbox_status": "pending"}, "session_unfinished"),
        ({"session_status": "active", "repo": "octo/tools7"}, "session_newest_of_repo"),
    ],
)
def test_list_of_sessions(filled: psycopg.Connection[Any], filters: dict[str, Any], index: str) -> None:
    query, values = listed(**filters)
    indexes, pages = explain(filled, query, values)
    assert indexes == {index}
    assert pages < 120


def test_show(filled: psycopg.Connection[Any]) -> None:
    values = {
        "id": SESSION,
        "scope": None,
        "worker_present": True,
        "at": "infinity",
        "key": None,
        "ids": None,
        "rows": 100,
        "page_bytes": 10**6,
    }
    indexes, pages = explain(filled, sessions._SHOW, values)
    assert indexes == {"session_pkey", "prompt_of_session", "outbox_of_session"}
    assert pages < 20


@pytest.mark.parametrize("attempts", ["last", "all"])
def test_messages(filled: psycopg.Connection[Any], attempts: str) -> None:
    values = {
        "id": SESSION,
        "scope": None,
        "attempts": attempts,
        "after": 5,
        "limit": 10,
        "page_bytes": 10**6,
    }
    indexes, pages = explain(filled, messages._LIST, values)
    assert "message_pkey" in indexes
    assert pages < 60, "a few for each message"


def test_read_of_many_streams(filled: psycopg.Connection[Any]) -> None:
    """All in one statement; a few pages for each."""
    ids = [row[0] for row in filled.execute("SELECT id FROM session ORDER BY id LIMIT 20")]
    values = {"ids": ids, "cursors": [19] * 20, "batch": hub.BATCH, "batch_bytes": hub.BATCH_BYTES}
    indexes, pages = explain(filled, hub._READ, values)
    assert {"message_pkey", "prompt_of_session"} <= indexes
    assert pages < 20 * 20


def test_dead_rows(filled: psycopg.Connection[Any]) -> None:
    indexes, pages = explain(
        filled, rows._DEAD, {"at": "infinity", "key": 2**63 - 1, "rows": 11, "page_bytes": 10**6}
    )
    assert indexes == {"outbox_dead"}
    assert pages < 60


def test_watch_and_unwatch(filled: psycopg.Connection[Any]) -> None:
    """pg_locks is read once, not once a watch."""
    _, pages = explain(filled, "SELECT session_watch(%s, 8)", ([SESSION],))
    assert filled.execute("SELECT count(*) FROM watcher").fetchone() == (1,)
    indexes, _ = explain(filled, watch.UNWATCH, (8, [SESSION]))
    assert pages < 20000
    del indexes


def test_cancel_finds_the_rows_of_a_session(filled: psycopg.Connection[Any]) -> None:
    query = """
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key = 'session:' || %s::uuid AND o.state IN ('ready', 'running')
          AND o.topic = 'session.run'
        ORDER BY o.id FOR UPDATE
    """
    indexes, pages = explain(filled, query, (SESSION,))
    assert indexes == {"outbox_key"}
    assert pages < 20


@pytest.mark.parametrize("finished", [0, 2000])
def test_count_of_a_users_sessions_reads_those_alone(database: str, finished: int) -> None:
    """Whatever the statistics say: here that nobody has any that is not finished."""
    insert = """
        INSERT INTO session (user_id, repo, target_branch, branch, title, inbox_status)
        SELECT 'user' || n / 50, 'octo/tools', 'main', %s || n, 't', %s FROM generate_series(1, %s) AS n
    """
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(insert, ("old", "completed", finished))
        conn.execute("VACUUM ANALYZE session")
        pages = []
        for part in range(8):  # a plan is made by the first of them, and kept from the sixth on
            conn.execute(insert, (f"new{part}-", "active", 500))
            statement = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT session_admit('user1', 1000)"
            row = conn.execute(statement).fetchone()
            assert row is not None
            plan = row[0][0]["Plan"]
            pages.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
        assert max(pages[1:]) < 30, pages  # the first reads catalogs

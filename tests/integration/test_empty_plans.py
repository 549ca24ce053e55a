"""Plans made while the tables were empty still find their rows by an index.

A table that was vacuumed while it was empty looks free to read, and a connection keeps the plan until the
next ANALYZE: with each row that comes the same call reads more. So each call is planned on empty tables here,
as often as it takes for the plan to be kept; then the tables are filled, and what it reads is counted.
"""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from outwake.app.api import messages, rows, sessions
from outwake.app.auth import tokens
from outwake.app.database import _conninfo
from outwake.app.live import hub
from outwake.schema import in_schema
from outwake.session import watch
from outwake.settings import Settings
from tests.support.database import new_database
from tests.support.server import with_database

TABLES = (
    "session", "prompt", "message", "outbox", "watcher", "idempotency", "session_memory", "sandbox_borrow",
    "api_token",
)  # fmt: skip
MANY = 3000
FEW = 200
"""Rows that a call may read; each of the tables has MANY."""

W = "'00000000-0000-0000-0000-00000000000a'::uuid"
OTHER = "'00000000-0000-0000-0000-00000000000b'::uuid"
SESSION_ID = "10000000-0000-0000-0000-000000000001"
S = f"'{SESSION_ID}'::uuid"
P = "'20000000-0000-0000-0000-000000000001'::uuid"
ROW = "(SELECT max(id) FROM outbox)"
IDS = f"ARRAY[{ROW}], '{{1}}'"
ANSWERED = f"INSERT INTO idempotency VALUES ('u', 'key', '\\x', {S}, '{{}}')"

FILL = f"""
INSERT INTO session (id, repo, target_branch, branch, title, inbox_status)
SELECT md5('s' || n)::uuid, 'o/r' || n, 'main', 'b', 't', 'completed' FROM generate_series(1, {MANY}) AS n;
INSERT INTO prompt (id, session_id, text)
SELECT md5('p' || n)::uuid, md5('s' || n)::uuid, 'x' FROM generate_series(1, {MANY}) AS n;
INSERT INTO message (session_id, seq, prompt_id, attempt, body)
SELECT md5('s' || n)::uuid, 1, md5('p' || n)::uuid, 1, '{{}}' FROM generate_series(1, {MANY}) AS n;
INSERT INTO watcher SELECT md5('s' || n)::uuid, 1 FROM generate_series(1, {MANY}) AS n;
INSERT INTO idempotency
SELECT 'u', 'k' || n, '\\x', md5('s' || n)::uuid, '{{}}' FROM generate_series(1, {MANY}) AS n;
INSERT INTO session_memory (session_id) SELECT md5('s' || n)::uuid FROM generate_series(1, {MANY}) AS n;
INSERT INTO sandbox_borrow (id, session_id, outbox_id, attempt)
SELECT md5('s' || n)::uuid, md5('s' || n)::uuid, n, 1 FROM generate_series(1, {MANY}) AS n;
INSERT INTO api_token (user_id, name, hash)
SELECT 'u', 'n', sha256(n::text::bytea) FROM generate_series(1, {MANY}) AS n;
INSERT INTO outbox (topic, ordering_key, unique_key, state, finished_at, worker_id)
SELECT 'other', 'k' || n, 'u' || n, CASE n % 2 WHEN 0 THEN 'done' ELSE 'ready' END,
       CASE n % 2 WHEN 0 THEN now() END, gen_random_uuid()
FROM generate_series(1, {MANY}) AS n;
"""

WORKERS = f"""
INSERT INTO worker (id, host, pid, version, topics, concurrency)
VALUES ({W}, 'h', 1, 'v', '{{t,session.run}}', 9), ({OTHER}, 'h', 2, 'v', '{{t}}', 9)
"""
SESSION = f"""
INSERT INTO session (id, repo, target_branch, branch, title) VALUES ({S}, 'o/r', 'main', 'b', 't');
INSERT INTO prompt (id, session_id, text) VALUES ({P}, {S}, 'x')
"""
READY = "INSERT INTO outbox (topic, ordering_key) VALUES ('t', 'k')"
RUNNING = f"""
INSERT INTO outbox (topic, ordering_key, state, worker_id, attempt, started_at)
VALUES ('t', 'k', 'running', {W}, 1, now())
"""
TURN = f"""
{SESSION};
INSERT INTO outbox (topic, ordering_key, payload, state, worker_id, attempt)
VALUES (
    'session.run', 'session:' || {S}, jsonb_build_object('session_id', {S}, 'prompt_id', {P}),
    'running', {W}, 1)
"""
NEW_SESSION = """
SELECT session_create(
    gen_random_uuid(), 'u', 'o/r', 'main', gen_random_uuid()::text, 't', NULL, NULL, now(), 'x', true{})
"""
CLAIM = f"SELECT * FROM outbox_claim({W}, '{{t,session.run}}', 5, '1 min')"

CALLS = {
    # what is there before the call; the call
    "claim": (READY, CLAIM),
    "claim, keys that wait": (f"{RUNNING}; {READY}; {READY}", CLAIM),
    "claim, limited": (f"INSERT INTO topic VALUES ('t', 5); {READY}", CLAIM),
    "claim and complete": (
        f"{READY}; {RUNNING}",
        f"SELECT * FROM outbox_complete_and_claim({W}, {IDS}, '{{t}}', 5, '1 min', false)",
    ),
    "claim, a turn": (
        TURN.replace("'running'", "'ready'"),
        CLAIM,
    ),
    "complete": (f"{RUNNING}; {READY}", f"SELECT outbox_complete({W}, ARRAY[{ROW} - 1], '{{1}}')"),
    "complete, a turn": (TURN, f"SELECT outbox_complete({W}, {IDS})"),
    "fail": (RUNNING, f"SELECT outbox_fail({W}, {ROW}, 1, 'no')"),
    "fail for good": (TURN, f"SELECT outbox_fail({W}, {ROW}, 1, 'no', NULL, true)"),
    "fence": (RUNNING, f"SELECT outbox_fence({W}, {ROW}, 1)"),
    "hand back": (RUNNING, f"SELECT outbox_hand_back({W}, {IDS})"),
    "end cancelled": (RUNNING, f"SELECT outbox_end_cancelled({W}, {ROW}, 1)"),
    "renew": (RUNNING, f"SELECT * FROM outbox_renew({W}, '1 min', {IDS})"),
    "reconnect": (RUNNING, f"SELECT outbox_reconnect({W}, 7, '{{}}', '{{}}')"),
    "rescue": (
        f"{RUNNING}; UPDATE worker SET lease_until = '2020-01-01' WHERE id = {W}",
        f"SELECT outbox_rescue({OTHER}, '1 ms', '1 h')",
    ),
    "delete a worker": (RUNNING, f"DELETE FROM worker WHERE id = {W}"),
    "next deadline": (
        READY,
        f"SELECT * FROM outbox_next_deadline({W}, '{{t}}', '1 min', '1 h')",
    ),
    "cancel": (READY, f"SELECT outbox_cancel({ROW})"),
    "retry": (
        "INSERT INTO outbox (topic, state, finished_at) VALUES ('t', 'dead', now())",
        f"SELECT outbox_retry({ROW})",
    ),
    "discard": (
        "INSERT INTO outbox (topic, state, finished_at) VALUES ('t', 'dead', now())",
        f"SELECT outbox_discard({ROW})",
    ),
    "settle": (READY, f"UPDATE outbox SET cancel_requested_at = now() WHERE id = {ROW}"),
    "create a session": ("SELECT", NEW_SESSION.format("")),
    "create a session, with key and limit": (
        "SELECT",
        NEW_SESSION.format(", 'key', '\\x', NULL, 10"),
    ),
    "create a session, again": (
        f"{SESSION}; {ANSWERED}",
        NEW_SESSION.format(", 'key', '\\x', NULL, 10"),
    ),
    "create a prompt": (
        SESSION,
        f"SELECT prompt_create({S}, NULL, 'x', true, 'key', '\\x', NULL, 'u', 10)",
    ),
    "cancel a session": (TURN.replace("'running'", "'ready'"), f"SELECT session_cancel({S})"),
    "archive a session": (TURN, f"SELECT session_archive({S})"),
    "append": (
        TURN,
        f"SELECT message_append({W}, {ROW}, 1, {S}, {P}, ARRAY['{{}}', '{{}}']::jsonb[])",
    ),
    "watched": ("SELECT", f"SELECT session_notify({S})"),
    "webhook": (
        f"{TURN}; UPDATE session SET callback_url = 'http://x' WHERE id = {S}",
        f"SELECT outbox_complete({W}, {IDS})",
    ),
    "begin with a sandbox": (TURN, f"SELECT sandbox_begin(gen_random_uuid(), {S}, 1, 1)"),
    "hold a sandbox": (TURN, f"SELECT sandbox_hold(gen_random_uuid(), {S}, '{{}}')"),
    "let a sandbox go": (
        f'{TURN}; UPDATE session SET sandbox = \'{{"borrow_token": 1, "keep_until": "2020-01-01"}}\'',
        f"SELECT sandbox_let_go({S}, '{{\"borrow_token\": 1}}')",
    ),
    "prune outbox": ("SELECT", "SELECT outbox_prune(now(), 0, 20)"),
    "prune workers": (
        f"{RUNNING}; UPDATE worker SET ended_at = '2019-01-01' WHERE id = {W}",
        "SELECT worker_prune('2020-01-01', 20)",
    ),
    "prune sessions": (
        f"{SESSION}; {ANSWERED}; INSERT INTO message VALUES ({S}, 1, {P}, 1, '{{}}', now());"
        " UPDATE session SET session_status = 'archived', inbox_status = 'archived',"
        f" deleted_at = '2019-01-01', created_at = '2019-01-01', sandbox = '{{}}' WHERE id = {S}",
        "SELECT session_prune('2020-01-01', '2020-01-01', 20)",
    ),
    "ready": ("SELECT", "SELECT outbox_ready('1 h')"),
    "stuck": ("SELECT", "SELECT outbox_stuck_report('1 h', '1 h')"),
    "when stuck": ("SELECT", "SELECT outbox_stuck_deadline('1 h')"),
}

QUERIES: dict[str, tuple[Any, Any]] = {
    "show a session": (
        sessions._SHOW,
        {
            "id": SESSION_ID,
            "scope": None,
            "worker_present": True,
            "at": "infinity",
            "key": None,
            "ids": None,
            "rows": 9,
            "page_bytes": 9,
        },
    ),
    "rename a session": (sessions._RENAME, {"id": SESSION_ID, "scope": None, "title": "t"}),
    "list messages": (
        messages._LIST,
        {"id": SESSION_ID, "scope": None, "attempts": "last", "after": 0, "limit": 9, "page_bytes": 9},
    ),
    "read for streams": (
        hub._READ,
        {"ids": [SESSION_ID] * 2, "cursors": [0, 0], "batch": 9, "batch_bytes": 9},
    ),
    "unwatch": (watch.UNWATCH, (9, [SESSION_ID])),
    "find a token": (tokens._FIND, (b"x" * 32,)),
    "show a row": (rows._SHOW, (1,)),
}
"""Of the API, which keeps them prepared."""


def rows_read(conn: psycopg.Connection[Any], before: str, call: Any, values: Any = None) -> dict[str, int]:
    """How many rows of each table the call reads; it is undone."""
    count = (
        "SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables"
    )
    with conn.transaction(force_rollback=True):
        (path,) = conn.execute("SHOW search_path").fetchone() or ("",)  # the API's finds none of our tables
        conn.execute(in_schema("SET LOCAL search_path = :schema"))
        conn.execute(WORKERS)
        conn.execute(before.encode())
        conn.execute("SELECT set_config('search_path', %s, true)", (path,))
        earlier = dict(conn.execute(count).fetchall())
        conn.execute(call, values, prepare=True)
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
        return {name: read - earlier[name] for name, read in conn.execute(count) if name in TABLES}


@pytest.fixture(scope="module")
def planned(server: str, template: str) -> Iterator[tuple[psycopg.Connection[Any], psycopg.Connection[Any]]]:
    """Two connections with such plans, an ordinary one and one as the API's are."""
    with new_database(server, template) as name:
        url = with_database(server, name)
        with (
            psycopg.connect(url, autocommit=True) as admin,
            psycopg.connect(url, autocommit=True) as conn,
            psycopg.connect(_conninfo(Settings(database_url=url)), autocommit=True) as api,
        ):
            for table in TABLES:
                admin.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
                admin.execute(f"VACUUM {table}".encode())
            # First all that can be planned without a single row: what is undone leaves pages behind.
            for query, values in QUERIES.values():
                for _ in range(7):
                    rows_read(api, "SELECT", query, values)
            for nothing in (True, False):
                for before, call in CALLS.values():
                    for _ in range(7):
                        rows_read(conn, "SELECT" if nothing else before, call)
            admin.execute(FILL.encode())
            yield conn, api


@pytest.mark.parametrize("name", CALLS)
def test_call_reads_few_rows(planned: Any, name: str) -> None:
    read = rows_read(planned[0], *CALLS[name])
    assert {table: count for table, count in read.items() if count > FEW} == {}


@pytest.mark.parametrize("name", QUERIES)
def test_query_of_the_api_reads_few_rows(planned: Any, name: str) -> None:
    query, values = QUERIES[name]
    read = rows_read(planned[1], SESSION, query, values)
    assert {table: count for table, count in read.items() if count > FEW} == {}

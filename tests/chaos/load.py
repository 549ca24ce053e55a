"""Reads a database's own record of a chaos run into what the checker judges."""

from typing import Any

import psycopg
from psycopg.rows import dict_row

from tests.chaos.check import Effect, Event, Life, Message, Prompt, Record, Row, Session, Snapshot, Token

_EVENTS = """
SELECT seq, at, xid, snapshot, app, row_id, topic, key, old_state AS old, new_state AS new, attempt,
       failures, errors, error, worker_id::text, limited, started, due
FROM chaos_event ORDER BY seq
"""
_MESSAGES = """
SELECT session_id::text, seq, prompt_id::text, attempt, body, xmin::text::bigint AS xid FROM message
"""
_SESSIONS = "SELECT id::text, title, inbox_status, sandbox, last_seq FROM session"


def load(conn: psycopg.Connection[Any], record: Record) -> None:
    """Add what a database holds. One snapshot, so that its tables agree."""
    with conn.transaction(), conn.cursor(row_factory=dict_row) as cursor:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")

        def rows(query: str) -> list[dict[str, Any]]:
            return cursor.execute(query).fetchall()

        record.events += [Event(**{**r, "snapshot": Snapshot.parse(r["snapshot"])}) for r in rows(_EVENTS)]
        record.rows += [
            Row(**r) for r in rows("SELECT id, topic, state, blocked, errors, payload FROM outbox")
        ]
        record.lives += [
            Life(**r) for r in rows("SELECT at, worker_id::text, lease_until, reason FROM chaos_life")
        ]
        record.effects += [Effect(**r) for r in rows("SELECT xid, row_id, attempt, kind FROM chaos_effect")]
        record.borrowed += [
            Token(**r) for r in rows("SELECT xid, token, row_id, attempt FROM chaos_borrowed")
        ]
        record.returned += [
            Token(**r) for r in rows("SELECT xid, token, row_id, attempt FROM chaos_returned")
        ]
        record.messages += [Message(**r) for r in rows(_MESSAGES)]
        record.sessions += [Session(**r) for r in rows(_SESSIONS)]
        record.prompts += [
            Prompt(**r) for r in rows("SELECT id::text, status, text::jsonb AS plan FROM prompt")
        ]
        for r in rows("SELECT tag, rows FROM chaos_booked"):
            record.booked[r["tag"]] = r["rows"]
        for r in rows("SELECT name, max_running FROM topic WHERE max_running IS NOT NULL"):
            record.limits[r["name"]] = r["max_running"]
        for r in rows("SELECT id::text, pid FROM worker"):
            record.pids[r["id"]] = r["pid"]

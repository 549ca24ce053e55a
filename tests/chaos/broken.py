"""Breaks one rule of the protocol in the database under test, to see that the checker notices.

Each is a replacement in the text of a function, as it stands in sql/, which must be found in the database.
"""

from typing import Any

import psycopg

from outwake.schema import in_schema

BREAKS: dict[str, tuple[str, str, str]] = {
    # Anybody may write for any attempt.
    "fence": (
        "outbox_fence",
        "o.attempt = row_attempt AND o.worker_id = holder AND o.state || '' = 'running'",
        "true",
    ),
    # A check and then a write, without a lock between them.
    "lock": ("outbox_fence", "FOR NO KEY UPDATE", ""),
    # Workers are rescued from before their lease is over.
    "lease": (
        "outbox_rescue",
        "w.lease_until < clock_timestamp()",
        "w.lease_until < clock_timestamp() + interval '10 seconds'",
    ),
    # Parking without steps 2 and 3: nobody waits for writers that missed the flag.
    "park": ("outbox_writers", "l.locktype = 'relation'", "false AND l.locktype = 'relation'"),
    # The claim does not ask the clock.
    "early": (
        "outbox_complete_and_claim",
        "CASE WHEN v.alone THEN least(v.since, moment) ELSE moment END",
        "'infinity'",
    ),
    # A key's rows exclude each other, but run in any order.
    "order": ("outbox_take_key", ") < row_id OR EXISTS", ") < 0 OR EXISTS"),
    # The limit counts nothing.
    "room": ("outbox_topic_room", "o.state = 'running' AND o.limited", "false"),
    # The limit is counted without the topic's lock.
    "limit": ("outbox_topic_room", "NOT pg_try_advisory_xact_lock(:lock_topic, hashtext(name))", "false"),
    # The end of a row leaves those behind it blocked.
    "keep": (
        "outbox_free_key",
        "SET blocked = false\n    WHERE blocked",
        "SET blocked = true\n    WHERE blocked",
    ),
    # A session that is over keeps its sandbox, and asks for its return again and again.
    "return": ("session_follow", "WHEN next_status <> 'completed' THEN sandbox", "WHEN true THEN sandbox"),
}


def break_rule(conn: psycopg.Connection[Any], name: str) -> None:
    """Break it. Raises ValueError if the function has no such text any more."""
    function, text, replacement = BREAKS[name]
    text = in_schema(text)
    row = conn.execute("SELECT pg_get_functiondef(%s::regproc)", (function,)).fetchone()
    assert row is not None
    if row[0].count(text) != 1:
        raise ValueError(f"{function} does not have this text once: {text}")
    conn.execute(row[0].replace(text, replacement))

"""The outbox for operators: list dead rows; show, retry, discard or cancel a row.

The API's routes and the dashboard's pages both call these functions. Answers are the database's JSON, as
text.
"""

import json
from typing import Literal, NamedTuple

from psycopg import errors as pg

from outwake._commands import COMMANDS
from outwake.app.api import cursor
from outwake.app.api.answer import Page
from outwake.app.api.models import RowQuery
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity, check_operator
from outwake.app.context import Context
from outwake.schema import in_schema

Change = Literal["retry", "discard", "cancel"]

PAGE_BYTES = 2_000_000  # of the answer; the last row of a page may go beyond

# Row by row, as messages.py reads messages. `place` 0 is where the page begins.
_DEAD = in_schema("""
WITH RECURSIVE page (place, finished_at, id, text, bytes) AS (
    SELECT 0, %(at)s::timestamptz, %(key)s::bigint, NULL::text, 0::bigint
    UNION ALL
    SELECT p.place + 1, next.finished_at, next.id, next.text, p.bytes + octet_length(next.text)
    FROM page AS p
    CROSS JOIN LATERAL (
        SELECT o.finished_at, o.id, :schema.outbox_json(o)::text AS text
        FROM :schema.outbox AS o
        WHERE o.state = 'dead' AND (o.finished_at, o.id) < (p.finished_at, p.id)
        ORDER BY o.finished_at DESC, o.id DESC
        LIMIT 1
    ) AS next
    WHERE p.place < %(rows)s AND p.bytes < %(page_bytes)s
)
SELECT (SELECT coalesce(array_agg(p.text ORDER BY p.place) FILTER (WHERE p.place > 0), '{}') FROM page AS p),
       CASE WHEN last.more THEN last.finished_at END, last.id
FROM (
    SELECT p.finished_at, p.id, EXISTS (
        SELECT FROM :schema.outbox AS o
        WHERE o.state = 'dead' AND (o.finished_at, o.id) < (p.finished_at, p.id)) AS more
    FROM page AS p ORDER BY p.place DESC LIMIT 1
) AS last
""")
_SHOW = in_schema("SELECT :schema.outbox_json(o)::text FROM :schema.outbox AS o WHERE o.id = %s")
_KEY_TAKEN = "An unfinished row has the same unique_key by now."


class Changed(NamedTuple):
    """The row as it is now. `stopping`: a worker has yet to stop it."""

    answer: str
    stopping: bool


async def list_rows(here: Context, identity: Identity, asked: RowQuery) -> Page[str]:
    """Dead rows, last ended first. Raises Problem (forbidden, invalid, unavailable)."""
    check_operator(identity)
    at, key = cursor.decode(asked.cursor, cursor.row_id)
    values = {
        "at": at or "infinity",
        "key": key or cursor.LARGEST_ROW_ID,
        "rows": asked.limit,
        "page_bytes": PAGE_BYTES,
    }
    row = await here.database.row(_DEAD, values)
    assert row is not None
    items, last_at, last_key = row
    return Page(items, cursor.encode(last_at, last_key) if last_at else None)


async def show_row(here: Context, identity: Identity, row_id: int) -> str:
    """Raises Problem (forbidden, not-found, unavailable)."""
    check_operator(identity)
    return await _show(here, row_id)


async def change_row(here: Context, identity: Identity, row_id: int, change: Change) -> Changed:
    """Retry a dead or cancelled row, discard a dead one, or cancel one that waits or runs.

    Raises Problem (forbidden, not-found, wrong-state, unavailable).
    """
    check_operator(identity)
    try:
        row = await here.database.row(COMMANDS[change], (_check_id(row_id),))
    except pg.UniqueViolation:
        raise Problem("wrong-state", _KEY_TAKEN) from None
    assert row is not None
    shown = await _show(here, row_id)
    if row[0] is None:
        state = json.loads(shown)["state"]
        if change == "retry" and state in ("dead", "cancelled"):
            raise Problem("wrong-state", _KEY_TAKEN)
        raise Problem("wrong-state", f"A row that is {state} cannot take this: {change}.", state=state)
    here.stuck.work_came()
    return Changed(shown, row[0] == "running")


async def _show(here: Context, row_id: int) -> str:
    row = await here.database.row(_SHOW, (_check_id(row_id),))
    if row is None:
        raise _no_row()
    return str(row[0])


def _check_id(row_id: int) -> int:
    if not cursor.is_row_id(row_id):
        raise _no_row()
    return row_id


def _no_row() -> Problem:
    return Problem("not-found", "There is no such row.")

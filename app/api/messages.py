"""Pages of the agent's messages: what the API's route and the dashboard's pages both call."""

from uuid import UUID

from outwake.app.api.answer import Page
from outwake.app.api.models import MessageQuery
from outwake.app.api.sessions import no_session
from outwake.app.auth.identity import Identity
from outwake.app.context import Context
from outwake.schema import in_schema

PAGE_BYTES = 4_000_000  # compressed, as stored; the first message of a page may be larger

# It reads one row more than asked for, to know whether another page follows. A page also ends when it is
# too large.
_LIST = in_schema("""
WITH target AS (
    SELECT s.id FROM :schema.session AS s
    WHERE s.id = %(id)s AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
),
last_attempt AS MATERIALIZED (
    SELECT p.id AS prompt_id,
           (SELECT max(m.attempt) FROM :schema.message AS m WHERE m.prompt_id = p.id) AS attempt
    FROM :schema.prompt AS p
    WHERE p.session_id = %(id)s AND %(attempts)s = 'last'
),
found AS MATERIALIZED (
    SELECT f.seq, f.prompt_id, f.attempt, f.body, f.created_at, row_number() OVER reading AS place,
           sum(pg_column_size(f.body)) OVER reading - pg_column_size(f.body) AS bytes_before
    FROM (
        SELECT m.seq, m.prompt_id, m.attempt, m.body, m.created_at
        FROM :schema.message AS m
        WHERE m.session_id = %(id)s AND m.seq > %(after)s
          AND (%(attempts)s = 'all' OR (
              (m.prompt_id, m.attempt) IN (SELECT l.prompt_id, l.attempt FROM last_attempt AS l)
              AND m.body ->> 'type' IS DISTINCT FROM 'superseded'))
        ORDER BY m.seq
        LIMIT %(limit)s + 1
    ) AS f
    WINDOW reading AS (ORDER BY f.seq)
),
page AS MATERIALIZED (
    SELECT f.seq, f.prompt_id, f.attempt, f.body, f.created_at FROM found AS f
    WHERE f.place <= %(limit)s AND f.bytes_before < %(page_bytes)s
)
SELECT
    (SELECT coalesce(
        array_agg(:schema.message_json(p.seq, p.prompt_id, p.attempt, p.body, p.created_at)::text
                  ORDER BY p.seq),
        '{}') FROM page AS p),
    (SELECT max(p.seq) FROM page AS p),
    (SELECT count(*) FROM found) > (SELECT count(*) FROM page)
FROM target
""")


async def list_messages(
    here: Context, identity: Identity, session_id: UUID, asked: MessageQuery
) -> Page[int]:
    """In order. `next` is the last seq of the page. Raises Problem (not-found, unavailable)."""
    values = {
        **asked.model_dump(),
        "id": session_id,
        "scope": identity.scope,
        "page_bytes": PAGE_BYTES,
    }
    row = await here.database.row(_LIST, values)
    if row is None:
        raise no_session()
    messages, last, more = row
    return Page(messages, last if more else None)

"""Pages of the agent's messages: what the API's route and the dashboard's pages both call."""

from uuid import UUID

from outwake.app.api.answer import Page
from outwake.app.api.models import MessageQuery
from outwake.app.api.sessions import no_session
from outwake.app.auth.identity import Identity
from outwake.app.context import Context
from outwake.schema import in_schema

PAGE_BYTES = 2_000_000  # of the answer; the last message of a page may go beyond

# Message by message, so that no more are read than a page holds: a megabyte may be stored in a few kilobytes.
# `place` 0 is where the page begins.
_THESE = """
m.session_id = %(id)s AND (%(attempts)s = 'all' OR (
    (m.prompt_id, m.attempt) IN (SELECT l.prompt_id, l.attempt FROM last_attempt AS l)
    AND m.body ->> 'type' IS DISTINCT FROM 'superseded'))
"""
_LIST = in_schema(f"""
WITH RECURSIVE target AS (
    SELECT s.id FROM :schema.session AS s
    WHERE s.id = %(id)s AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
),
last_attempt AS MATERIALIZED (
    SELECT p.id AS prompt_id,
           (SELECT max(m.attempt) FROM :schema.message AS m WHERE m.prompt_id = p.id) AS attempt
    FROM :schema.prompt AS p
    WHERE p.session_id = %(id)s AND %(attempts)s = 'last'
),
page (place, seq, text, bytes) AS (
    SELECT 0, %(after)s::bigint, NULL::text, 0::bigint
    UNION ALL
    SELECT p.place + 1, next.seq, next.text, p.bytes + octet_length(next.text)
    FROM page AS p
    CROSS JOIN LATERAL (
        SELECT m.seq, :schema.message_json(m.seq, m.prompt_id, m.attempt, m.body, m.created_at)::text AS text
        FROM :schema.message AS m
        WHERE m.seq > p.seq AND {_THESE}
        ORDER BY m.seq
        LIMIT 1
    ) AS next
    WHERE p.place < %(limit)s AND p.bytes < %(page_bytes)s
)
SELECT
    (SELECT coalesce(array_agg(p.text ORDER BY p.place) FILTER (WHERE p.place > 0), '{{}}') FROM page AS p),
    (SELECT max(p.seq) FROM page AS p),
    EXISTS (SELECT FROM :schema.message AS m WHERE m.seq > (SELECT max(p.seq) FROM page AS p) AND {_THESE})
FROM target
""")  # noqa: S608 - constants of this module


async def list_messages(
    here: Context,
    identity: Identity,
    session_id: UUID,
    asked: MessageQuery,
    page_bytes: int | None = None,
) -> Page[int]:
    """In order. `next` is the last seq of the page. Raises Problem (not-found, unavailable)."""
    values = {
        **asked.model_dump(),
        "id": session_id,
        "scope": identity.scope,
        "page_bytes": page_bytes or PAGE_BYTES,
    }
    row = await here.database.row(_LIST, values)
    if row is None:
        raise no_session()
    messages, last, more = row
    return Page(messages, last if more else None)

"""Finds the owners of API tokens.

A found token is cached for MAX_AGE: a busy client costs one query each MAX_AGE, and a revoked token works for
up to that much longer. The query also updates `last_used_at` if it is over a minute old, so the row is
written at most once a minute, without a statement of its own.
"""

import time

from outwake.app.database import Database
from outwake.schema import in_schema
from outwake.session.token import hash_of

MAX_AGE = 5.0  # seconds
REMEMBERED = 10_000

_FIND = in_schema("""
WITH found AS MATERIALIZED (
    SELECT t.id, t.user_id, t.operator, t.last_used_at,
           t.expires_at - clock_timestamp() AS valid_for
    FROM :schema.api_token AS t
    WHERE t.hash = %s AND t.revoked_at IS NULL
      AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp())
),
noted AS (
    UPDATE :schema.api_token AS t
    SET last_used_at = clock_timestamp()
    FROM found AS f
    WHERE t.id = f.id
      AND (f.last_used_at IS NULL OR f.last_used_at < clock_timestamp() - interval '1 minute')
)
SELECT user_id, operator, extract(epoch FROM valid_for)::float8 FROM found
""")


class Tokens:
    """Finds the owner of a token. It has a cache."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[bytes, tuple[tuple[str, bool], float]] = {}

    async def owner(self, token: str) -> tuple[str, bool] | None:
        """(user, is operator); None if the token is unknown, expired or revoked. Raises as Database.rows."""
        key, now = hash_of(token), time.monotonic()
        if (known := self._found.get(key)) and now < known[1]:
            return known[0]
        self._found.pop(key, None)
        row = await self._database.row(_FIND, (key,))
        if row is None:
            return None
        owner = (row[0], row[1])
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        self._found[key] = (owner, now + min(MAX_AGE, row[2] if row[2] is not None else MAX_AGE))
        return owner

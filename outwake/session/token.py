"""API tokens, for machines: `outwake_` and 256 random bits in base64url, shown once.

The database stores their SHA-256. A slow, salted hash protects passwords that people can remember, because it
makes each guess expensive. Nobody can guess 256 random bits, so a slow hash would only slow down requests. A
plain hash also lets an index find the token; its timing reveals something about the hash, not the token.
"""

import hashlib
import re
import secrets
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from outwake.schema import in_schema

PREFIX = "outwake_"
_FORM = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")

_CREATE = in_schema(
    """
INSERT INTO :schema.api_token (user_id, name, operator, hash, expires_at)
VALUES (%s, %s, %s, %s, clock_timestamp() + %s::interval)
RETURNING id
"""
)
_REVOKE = in_schema(
    "UPDATE :schema.api_token SET revoked_at = clock_timestamp() WHERE id = %s AND revoked_at IS NULL"
)


def is_token(text: str) -> bool:
    """Whether the text has a token's form."""
    return bool(_FORM.fullmatch(text))


def hash_of(token: str) -> bytes:
    """The hash of a token, which the database stores."""
    return hashlib.sha256(token.encode("ascii")).digest()


def check_user(user_id: str) -> str:
    """Return `user_id` if it may own a session: 1 to 255 printable characters.

    Raises ValueError.
    """
    if not 0 < len(user_id) <= 255 or not user_id.isprintable():
        raise ValueError("a user's name must be 1 to 255 printable characters")
    return user_id


async def create(
    conn: psycopg.AsyncConnection[Any],
    user_id: str,
    name: str,
    *,
    operator: bool = False,
    valid_for: timedelta | None = None,
) -> tuple[UUID, str]:
    """Store a new token; return its id and the token itself, which cannot be retrieved later."""
    token = PREFIX + secrets.token_urlsafe(32)
    values = (check_user(user_id), name, operator, hash_of(token), valid_for)
    cursor = await conn.execute(_CREATE, values)
    row = await cursor.fetchone()
    assert row is not None
    return row[0], token


async def revoke(conn: psycopg.AsyncConnection[Any], token_id: UUID) -> bool:
    """Revoke a token; return False if no valid token has this id."""
    cursor = await conn.execute(_REVOKE, (token_id,))
    return cursor.rowcount == 1

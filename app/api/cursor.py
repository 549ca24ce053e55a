"""Cursors of keyset pagination. A cursor holds a time and an id; clients treat it as opaque."""

import base64
import json
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from outwake.app.api.problems import Problem

Key = TypeVar("Key", UUID, int)


def encode(at: datetime, key: UUID | int) -> str:
    position = json.dumps([at.isoformat(), str(key)], separators=(",", ":"))
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def decode(cursor: str | None, parse: Callable[[str], Key]) -> tuple[datetime | None, Key | None]:
    """The position; (None, None) for the first page. Raises Problem (invalid)."""
    if cursor is None:
        return None, None
    try:
        at, key = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None:
            raise ValueError
        return moment, parse(key)
    except (ValueError, TypeError, AttributeError, RecursionError):
        error = {"parameter": "cursor", "detail": "is not the `next` of a page"}
        raise Problem("invalid", "1 field cannot be accepted.", errors=[error]) from None


def uuid(text: str) -> UUID:
    return UUID(text)


def row_id(text: str) -> int:
    """An id of an outbox row. Raises ValueError if no row can have it."""
    number = int(text)
    if not 0 < number < 2**63:
        raise ValueError
    return number

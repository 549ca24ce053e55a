"""Keyset pagination. A cursor holds the time and id of a page's last row; clients treat it as opaque."""

import base64
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from outwake.app.api.answer import Page
from outwake.app.api.problems import Problem
from outwake.app.connection import Row

Key = TypeVar("Key", UUID, int)

LARGEST_ROW_ID = 2**63 - 1


def encode(at: datetime, key: UUID | int) -> str:
    position = json.dumps([at.isoformat(), str(key)], separators=(",", ":"))
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def page(rows: Sequence[Row], limit: int) -> Page[str]:
    """The first `limit` of these rows of (JSON, time, id). If there are more, another page follows."""
    shown = rows[:limit]
    following = encode(shown[-1][1], shown[-1][2]) if len(rows) > limit else None
    return Page([row[0] for row in shown], following)


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
    if not is_row_id(number):
        raise ValueError
    return number


def is_row_id(number: int) -> bool:
    return 0 < number <= LARGEST_ROW_ID

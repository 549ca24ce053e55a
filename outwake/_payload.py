"""What a producer gives, as the text that is sent."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def json_text(payload: Any, conn: Any) -> str:
    """A payload as JSON. What JSON lacks is converted as psycopg was told for `conn`, by set_json_dumps.

    Raises TypeError or ValueError for what cannot be converted.
    """
    if dump := getattr(payload, "model_dump_json", None):
        return str(dump(by_alias=True))  # what the model reads again
    try:
        return _encode(payload)
    except TypeError:
        if (taught := _taught(payload, conn)) is None:
            raise
        return taught


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an object of type {type(value).__name__} is not JSON")


_encode = json.JSONEncoder(default=_mapping, allow_nan=False).encode


def _taught(payload: Any, conn: Any) -> str | None:
    """By the function that psycopg has for this connection. None if it is not psycopg's."""
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(conn, psycopg.Connection | psycopg.AsyncConnection):
        return None
    from psycopg.adapt import PyFormat
    from psycopg.types.json import Jsonb

    dumped = conn.adapters.get_dumper(Jsonb, PyFormat.TEXT)(Jsonb, conn).dump(Jsonb(payload))
    return bytes(dumped or b"null").decode()

"""The command's connection to the database."""

from datetime import timedelta
from typing import Any

import psycopg

from outwake.connect import connect
from outwake.settings import Settings


async def open_connection(settings: Settings) -> psycopg.AsyncConnection[Any]:
    """A connection in autocommit. Only our own queries run on it. Raises psycopg.Error."""
    lease = timedelta(seconds=settings.lease)
    return await connect(settings.database_url, "outwake cli", lease, pooled=settings.pooled)

"""Prepared statements, sent through libpq directly.

At each call, psycopg's cursor finds out how to adapt each parameter, whether the statement is prepared and
how to read each column. For a statement of each request or cycle, that takes longer than everything else
(docs/profile.md). A Statement does this once. psycopg still sends, waits, reads and reports errors.
"""

import re
from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import pq

from outwake.connect import answer

_PARAMETER = re.compile(r"%(?:\((\w+)\))?s")

Values = Sequence[bytes | None]


class Statement:
    """One statement. Its parameters are written as for psycopg, so that psycopg can run the same text:
    `%s`, or `%(name)s`, with a type if Postgres cannot infer it. The text must have no other `%`.
    """

    def __init__(self, text: LiteralString) -> None:
        self.names = list(dict.fromkeys(name for name in _PARAMETER.findall(text) if name))
        """The names of its parameters, in the order of its values."""
        self.text = self._numbered(text).encode()
        """With $1, $2 and so on in place of the parameters."""

    def _numbered(self, text: str) -> str:
        if self.names:
            return _PARAMETER.sub(lambda found: f"${self.names.index(found[1]) + 1}", text)
        parts = text.split("%s")
        return parts[0] + "".join(f"${place}{part}" for place, part in enumerate(parts[1:], 1))


class Statements:
    """The statements of one connection. Only one may be under way, and no other query beside it.

    `prepares`: a pooler may send the next query to another server, so nothing is prepared behind one.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any], *, prepares: bool) -> None:
        self._conn = conn
        self._prepares = prepares
        self._names: dict[Statement, bytes] = {}

    async def prepare(self, statement: Statement) -> None:
        """Prepare it, unless it is prepared already. Raises psycopg.Error."""
        if self._prepares and statement not in self._names:
            name = b"outwake_%d" % len(self._names)
            self._conn.pgconn.send_prepare(name, statement.text)
            await answer(self._conn)
            self._names[statement] = name

    def send(self, statement: Statement, values: Values, result_format: pq.Format) -> None:
        """Send a statement that `prepare` was called with. Raises psycopg.Error if it cannot be sent."""
        server = self._conn.pgconn
        if self._prepares:
            server.send_query_prepared(self._names[statement], values, result_format=result_format)
        else:
            server.send_query_params(statement.text, values, result_format=result_format)

    async def run(
        self, statement: Statement, values: Values, result_format: pq.Format = pq.Format.TEXT
    ) -> pq.abc.PGresult:
        """The answer to a statement, which is prepared first. Raises psycopg.Error."""
        if self._prepares and statement not in self._names:
            await self.prepare(statement)
        self.send(statement, values, result_format)
        return await answer(self._conn)

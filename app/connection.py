"""A connection of the API's pool, and prepared statements for it."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, LiteralString

from psycopg import AsyncConnection, AsyncCursor, sql

from outwake.connect import answer

_PARAMETER = re.compile(r"%\((\w+)\)s")

Row = tuple[Any, ...]


class Statement:
    """A statement whose parameters and results are texts.

    Parameters are written as for psycopg, `%(name)s`, with a type if Postgres cannot infer it. The text must
    have no other `%`.

    psycopg's cursor decides at each call how to adapt parameters, whether to prepare, and how to read
    columns. A Statement skips that. psycopg still sends, waits and reports errors.
    """

    def __init__(self, text: LiteralString) -> None:
        self._names = list(dict.fromkeys(_PARAMETER.findall(text)))
        self.text = _PARAMETER.sub(lambda found: f"${self._names.index(found[1]) + 1}", text).encode()

    def values(self, params: Mapping[str, Any], encoding: str) -> list[bytes | None]:
        """The values to send: strings, numbers, booleans and UUIDs as texts, bytes in hexadecimal."""
        return [_sent(params[name], encoding) for name in self._names]


Query = LiteralString | sql.SQL | sql.Composed | Statement
Params = Sequence[Any] | Mapping[str, Any] | None


class Connection(AsyncConnection[Row]):
    async def rows(self, query: Query, params: Params = None) -> list[Row]:
        """All rows of one statement. A caller must wait for the rows before it sends the next query."""
        if isinstance(query, Statement):
            assert isinstance(params, Mapping)
            return await self._texts(query, params)
        cursor = await self._only_cursor.execute(query, params)
        # `description` would make an object for each column.
        return await cursor.fetchall() if cursor.pgresult and cursor.pgresult.nfields else []

    @cached_property
    def _only_cursor(self) -> AsyncCursor[Row]:
        """One cursor for all queries, because a new cursor makes its own adapters."""
        return self.cursor()

    async def _texts(self, statement: Statement, params: Mapping[str, Any]) -> list[Row]:
        values = statement.values(params, self._encoding)
        if self.prepare_threshold is None:  # a pooler may send the next query to another server
            self.pgconn.send_query_params(statement.text, values)
        else:
            if (name := self._named.get(statement)) is None:
                name = b"outwake_%d" % len(self._named)
                self.pgconn.send_prepare(name, statement.text)
                await answer(self)
                self._named[statement] = name
            self.pgconn.send_query_prepared(name, values)
        result = await answer(self)
        columns = range(result.nfields)
        return [
            tuple(_read(result.get_value(row, column), self._encoding) for column in columns)
            for row in range(result.ntuples)
        ]

    @cached_property
    def _named(self) -> dict[Statement, bytes]:
        """The names of the prepared statements."""
        return {}

    @cached_property
    def _encoding(self) -> str:
        return self.info.encoding


def _sent(value: Any, encoding: str) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    return str(value).encode(encoding)


def _read(value: bytes | None, encoding: str) -> str | None:
    return None if value is None else value.decode(encoding)

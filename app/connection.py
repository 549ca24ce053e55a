"""A connection of the API's pool, and what is asked on it."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, LiteralString

from psycopg import AsyncConnection, AsyncCursor, sql

from outwake.connect import answer

_PARAMETER = re.compile(r"%\((\w+)\)s")

Row = tuple[Any, ...]


class Statement:
    """One that takes and gives texts only. Its parameters are written as psycopg's, `%(name)s`, with a type
    where Postgres cannot tell it; no other `%` is in it.

    psycopg's cursor finds out at each call how to adapt each parameter, whether the statement is prepared,
    and how to read each column: 18 of the 62 us that the query of POST /sessions took. Sending, waiting and
    errors are psycopg's here too.
    """

    def __init__(self, text: LiteralString) -> None:
        self._names = list(dict.fromkeys(_PARAMETER.findall(text)))
        self.text = _PARAMETER.sub(lambda found: f"${self._names.index(found[1]) + 1}", text).encode()

    def values(self, params: Mapping[str, Any], encoding: str) -> list[bytes | None]:
        """What is sent: strings, numbers, truths and UUIDs as Postgres reads them, bytes in hexadecimal."""
        return [_sent(params[name], encoding) for name in self._names]


Query = LiteralString | sql.SQL | sql.Composed | Statement
Params = Sequence[Any] | Mapping[str, Any] | None


class Connection(AsyncConnection[Row]):
    async def rows(self, query: Query, params: Params = None) -> list[Row]:
        """All rows of one statement. One query after the other."""
        if isinstance(query, Statement):
            assert isinstance(params, Mapping)
            return await self._texts(query, params)
        cursor = await self._only_cursor.execute(query, params)
        # Not `description`, which makes an object for each column.
        return await cursor.fetchall() if cursor.pgresult and cursor.pgresult.nfields else []

    @cached_property
    def _only_cursor(self) -> AsyncCursor[Row]:
        """A new one each time, with adapters of its own, took 12 us of 90."""
        return self.cursor()

    async def _texts(self, statement: Statement, params: Mapping[str, Any]) -> list[Row]:
        values = statement.values(params, self._encoding)
        if self.prepare_threshold is None:  # a pooler: the next query may meet another server
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
        """What is prepared."""
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

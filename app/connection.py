"""A connection of the API's pool."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, LiteralString

from psycopg import AsyncCursor, sql

from outwake._statement import Statement, Statements
from outwake.connect import ServerConnection

Row = tuple[Any, ...]

Query = LiteralString | sql.SQL | sql.Composed | Statement
Params = Sequence[Any] | Mapping[str, Any] | None


class Connection(ServerConnection):
    async def rows(self, query: Query, params: Params = None) -> list[Row]:
        """All rows of one statement. A caller must wait for the rows before it sends the next query.

        The parameters and results of a Statement are texts. It takes strings, numbers, booleans, UUIDs and
        bytes, by name.
        """
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
        encoding = self._encoding
        values = [_sent(params[name], encoding) for name in statement.names]
        result = await self._statements.run(statement, values)
        columns = range(result.nfields)
        return [
            tuple(_read(result.get_value(row, column), encoding) for column in columns)
            for row in range(result.ntuples)
        ]

    @cached_property
    def _statements(self) -> Statements:
        return Statements(self, prepares=self.prepare_threshold is not None)

    @cached_property
    def _encoding(self) -> str:
        return self.info.encoding


def _sent(value: Any, encoding: str) -> bytes | None:
    """A parameter's text; bytes in hexadecimal."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    return str(value).encode(encoding)


def _read(value: bytes | None, encoding: str) -> str | None:
    return None if value is None else value.decode(encoding)

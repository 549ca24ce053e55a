"""The statements of a worker's cycles  ("turns"), prepared once for each connection.

At each call, psycopg's cursor finds out how to adapt each parameter, whether the statement is prepared and
how to read each column. Here that is done once, because it would take a tenth of the time from commit to
start. Sending, waiting and reading are psycopg's.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg import abc, pq
from psycopg.adapt import Transformer

from outwake._claim import CLAIMED, Claimed, Level, arrays, as_ended
from outwake.connect import answer, checked
from outwake.handler import Connection
from outwake.schema import in_schema
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.reply import Reply

_ROW = in_schema(
    f"SELECT {CLAIMED} FROM :schema.outbox_claim_row($1, $2, $3, true, $4)"  # noqa: S608 - names of ours
).encode()
_TURN = in_schema(
    f"SELECT {CLAIMED} FROM :schema.outbox_complete_and_claim("  # noqa: S608
    "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
).encode()
_COMPLETE = in_schema("SELECT r FROM :schema.outbox_complete($1, $2, $3) AS r").encode()

T = TypeVar("T")
Token = tuple[int, int]


class Answer:
    """A cycle's result that is not read yet. Making objects of the rows takes longer than sending the next
    claim, so a worker under load sends that first.
    """

    def __init__(self, result: pq.abc.PGresult, reader: abc.Transformer) -> None:
        self.count = result.ntuples
        """The number of claimed rows and refused completions together."""
        self._result = result
        self._reader = reader

    def read(self) -> tuple[list[Claimed], set[Token]]:
        """The claimed rows, and the fenced completions."""
        self._reader.set_pgresult(self._result)
        rows = self._reader.load_rows(0, self.count, Claimed._make)
        # A refused completion comes back as a row without a topic.
        refused = {(row.id, row.attempt) for row in rows if row.topic is None}
        return ([row for row in rows if row.topic is not None] if refused else rows), refused


class Claims:
    """A worker's claims and completions, on its connection, which is in autocommit. No other query may be
    under way there meanwhile. The claim of a single row goes over the LISTEN connection.

    All methods but `row` raise WorkerEnded if a rescue came first. `row` leaves that to the next cycle.
    """

    def __init__(
        self, conn: Connection, listener: Listener, worker_id: UUID, lease: timedelta, *, pooled: bool
    ) -> None:
        self._conn = conn
        self._listener = listener
        self._pooled = pooled
        self._reader: abc.Transformer = Transformer(conn)
        self._worker = str(worker_id).encode()
        self._presence = b"%d" % listener.presence
        self._lease = b"%f s" % lease.total_seconds()

    def row(self, row_id: int, arrived: Callable[[Claimed | None, bool], T]) -> Reply[T]:
        """Claim the row that a notification named. `arrived` gets the row, or None if it could not be had. It
        also gets whether the row is still ready: perhaps nobody takes it, so a full scan has to follow.
        """

        def read(result: pq.abc.PGresult) -> T:
            rows, still_there = Answer(checked(result, self._conn), self._reader).read()
            return arrived(rows[0] if rows else None, bool(still_there))

        values = [self._worker, b"%d" % row_id, self._lease, self._presence]
        return self._listener.ask(_name(_ROW), values, read)

    async def turn(
        self,
        completed: Iterable[Token],
        topics: Iterable[str],
        slots: int,
        levels: Sequence[Level] | None,
        *,
        stay_parked: bool,
    ) -> Answer:
        """Complete and claim in one statement, outbox_complete_and_claim."""
        if levels is None:
            where: list[bytes | None] = [_array(topics), None, None, None, None]
        else:
            where = [_array(column) for column in zip(*levels, strict=True)] or [b"{}"] * len(Level._fields)
        values = [
            self._worker,
            *(text.encode() for text in arrays(completed)),
            where[0],
            b"%d" % slots,
            self._lease,
            b"t" if stay_parked else b"f",
            self._presence,
            *where[1:],
        ]
        self._post(_TURN, values)
        return Answer(await self._answer(), self._reader)

    async def complete(self, tokens: Sequence[Token]) -> set[Token]:
        """Complete without a claim. Returns the fenced completions."""
        self._post(_COMPLETE, [self._worker, *(text.encode() for text in arrays(tokens))])
        result = await self._answer()
        self._reader.set_pgresult(result)
        ended = {row[0] for row in self._reader.load_rows(0, result.ntuples, tuple)}
        return {token for token in tokens if token[0] not in ended}

    async def prepare(self) -> None:
        """Call this first. Through a pooler nothing is prepared: the next call may get another connection."""
        await self._listener.prepare(_name(_ROW), _ROW)
        if not self._pooled:
            for query in (_TURN, _COMPLETE):
                self._conn.pgconn.send_prepare(_name(query), query)
                await self._answer()

    def _post(self, query: bytes, values: Sequence[bytes | None]) -> None:
        server = self._conn.pgconn
        if self._pooled:
            server.send_query_params(query, values, result_format=pq.Format.BINARY)
        else:
            server.send_query_prepared(_name(query), values, result_format=pq.Format.BINARY)

    async def _answer(self) -> pq.abc.PGresult:
        try:
            return await answer(self._conn)
        except psycopg.Error as error:
            raise as_ended(error) from error


def _name(query: bytes) -> bytes:
    """The function's name; the statement is prepared under it."""
    return query.partition(b"(")[0].rpartition(b".")[2]


def _array(values: Iterable[Any]) -> bytes:
    """An array as Postgres writes it, of names, numbers, times or booleans: none holds a quote."""
    return "{{{}}}".format(",".join(f'"{value}"' for value in values)).encode()

"""Sends the statements of a worker's cycles and reads their answers.

worker/engine/claimer.py decides what to claim and when. outwake/_claim.py has the texts of the statements.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg import abc, pq
from psycopg.adapt import Transformer

from outwake._claim import CLAIM, CLAIMED, COMPLETE, Claimed, Lane, arrays, as_ended
from outwake._statement import Statement, Statements, Values
from outwake.connect import checked
from outwake.handler import Connection
from outwake.schema import in_schema
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.reply import Reply

_ROW = Statement(
    in_schema(f"SELECT {CLAIMED} FROM :schema.outbox_claim_row(%s, %s, %s, true, %s)")  # noqa: S608 - ours
)
_CLAIM = Statement(CLAIM)
_COMPLETE = Statement(COMPLETE)

T = TypeVar("T")
Token = tuple[int, int]


class ClaimAnswer:
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
        self._statements = Statements(conn, prepares=not pooled)
        self._reader: abc.Transformer = Transformer(conn)
        self._worker = str(worker_id).encode()
        self._presence = b"%d" % listener.presence
        self._lease = b"%f s" % lease.total_seconds()

    def row(self, row_id: int, arrived: Callable[[Claimed | None, bool], T]) -> Reply[T]:
        """Claim the row that a notification named. `arrived` gets the row, or None if it could not be had. It
        also gets whether the row is still ready: perhaps nobody takes it, so a full scan has to follow.
        """

        def read(result: pq.abc.PGresult) -> T:
            rows, still_there = ClaimAnswer(checked(result, self._conn), self._reader).read()
            return arrived(rows[0] if rows else None, bool(still_there))

        values = [self._worker, b"%d" % row_id, self._lease, self._presence]
        return self._listener.ask(_ROW, values, read)

    async def complete_and_claim(
        self,
        completed: Iterable[Token],
        topics: Iterable[str],
        slots: int,
        lanes: Sequence[Lane] | None,
        *,
        stay_parked: bool,
    ) -> ClaimAnswer:
        """Complete and claim in one statement, outbox_complete_and_claim."""
        if lanes is None:
            where: list[bytes | None] = [_array(topics), None, None, None, None]
        else:
            where = [_array(column) for column in zip(*lanes, strict=True)] or [b"{}"] * len(Lane._fields)
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
        return ClaimAnswer(await self._run(_CLAIM, values), self._reader)

    async def complete(self, tokens: Sequence[Token]) -> set[Token]:
        """Complete without a claim. Returns the fenced completions."""
        values = [self._worker, *(text.encode() for text in arrays(tokens))]
        result = await self._run(_COMPLETE, values)
        self._reader.set_pgresult(result)
        ended = {row[0] for row in self._reader.load_rows(0, result.ntuples, tuple)}
        return {token for token in tokens if token[0] not in ended}

    async def prepare(self) -> None:
        """Call this first."""
        await self._listener.prepare(_ROW)
        for statement in (_CLAIM, _COMPLETE):
            await self._statements.prepare(statement)

    async def _run(self, statement: Statement, values: Values) -> pq.abc.PGresult:
        try:
            return await self._statements.run(statement, values, pq.Format.BINARY)
        except psycopg.Error as error:
            raise as_ended(error) from error


def _array(values: Iterable[Any]) -> bytes:
    """An array as Postgres writes it, of names, numbers, times or booleans: none holds a quote."""
    return "{{{}}}".format(",".join(f'"{value}"' for value in values)).encode()

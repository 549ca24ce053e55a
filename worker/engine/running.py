"""What a worker runs, how many slots are free, and which outcomes are not written yet.

A slot is taken from the claim of its row on. A claimed row first counts as `arriving`, until the claim's
answer is read and its handler starts. So it never counts as free, nor as ended.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

import psycopg

from outwake._claim import Claimed
from outwake.handler import Handler, Job
from outwake.worker.engine.attempt import Attempt, End, Outcome, Stop
from outwake.worker.engine.lease import Lease
from outwake.worker.engine.metrics import Stats

Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]


class Running:
    """The attempts of one worker. `connect` returns what lends a handler's jobs their connections. `ended` is
    called when an attempt has ended.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        lease: Lease,
        connect: Callable[[Handler], Connect],
        ended: Callable[[], None],
        stats: Stats,
    ) -> None:
        self.attempts: dict[int, Attempt] = {}
        self.outcomes: list[Outcome] = []
        """How attempts ended, until that is written."""
        self.arriving = 0
        """How many rows are claimed and not read yet."""
        self.worker_id: UUID | None = None
        """The id of this life. What an earlier life ran is no longer written."""
        self.draining = False
        self.stops_all = False
        """The drain's time is over: what is claimed now is handed back."""
        self._handlers = handlers
        self.concurrency = concurrency
        self._lease = lease
        self._connect = connect
        self._ended = ended
        self._stats = stats

    @property
    def free(self) -> int:
        """How many rows may be claimed now. Completions that a claim refused arrive with its rows, and count
        until they are read.
        """
        return 0 if self.draining else max(0, self.concurrency - len(self.attempts) - self.arriving)

    @property
    def idle(self) -> bool:
        """Whether nothing runs, arrives or is to be written."""
        return not self.attempts and not self.outcomes and not self.arriving

    def start(self, rows: Sequence[Claimed], asked_at: float) -> None:
        """Start the handlers of rows that were claimed by a query sent at `asked_at`."""
        assert self.worker_id is not None
        if rows:
            self._lease.claimed(asked_at)
        for row in rows:
            handler = self._handlers[row.topic]
            job = Job(row, self.worker_id, self._lease, self._connect(handler))
            attempt = Attempt(job, handler, asked_at, self._attempt_ended)
            self.attempts[row.id] = attempt
            attempt.start()
        if self.stops_all:
            self.stop(Stop.DRAIN)

    def stop(self, cause: Stop) -> None:
        """Stop all handlers."""
        for attempt in self.attempts.values():
            attempt.stop(cause)
        if cause is Stop.DRAIN:
            self.stops_all = True

    def end_life(self) -> None:
        """The worker's life was ended, and its rows are no longer ours."""
        for attempt in self.attempts.values():
            attempt.stop(Stop.FENCED)
        self.outcomes.clear()
        self.worker_id = None

    def tokens(self) -> list[tuple[int, int]]:
        """Id and attempt of each row that runs, and of each whose outcome is to be written."""
        return [a.job.token for a in self.attempts.values()] + [o.job.token for o in self.outcomes]

    def completed(self) -> list[Outcome]:
        """The outcomes that the next claim writes. The others are finalized one by one."""
        return [outcome for outcome in self.outcomes if outcome.end is End.COMPLETE]

    def written(self, outcomes: Iterable[Outcome]) -> None:
        """Forget outcomes that are committed. Only these: more handlers have ended since they were sent."""
        gone = set(map(id, outcomes))
        self.outcomes = [outcome for outcome in self.outcomes if id(outcome) not in gone]

    def _attempt_ended(self, attempt: Attempt, outcome: Outcome) -> None:
        row = attempt.job.row
        if self.attempts.get(row.id) is attempt:
            del self.attempts[row.id]
        self._stats.ran(row.topic, time.monotonic() - attempt.started_at)
        if outcome.job.worker_id == self.worker_id:
            self.outcomes.append(outcome)
        self._ended()

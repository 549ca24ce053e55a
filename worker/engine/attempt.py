"""One attempt at one row: it runs the row's handler and tells how that ended.

The reason why a handler was stopped decides what becomes of its row, so each stop names its cause.
"""

import asyncio
import concurrent.futures
import inspect
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from functools import partial

import psycopg

from outwake.connect import is_outage
from outwake.errors import Cancelled, Fenced, HandBack, Permanent, Retry
from outwake.handler import Connection, Handler, Job
from outwake.telemetry import trace
from outwake.telemetry.log import debugging, get_logger, log_context
from outwake.worker.engine.payload import UnreadablePayload

_PUT_OFF = timedelta(seconds=1)
_MOST_PUT_OFF = 20
"""Attempts of a row that end without a failure, before the loss of a connection counts as one."""

log = get_logger(__name__)


class Stop(Enum):
    """Why a handler was stopped."""

    CANCEL = "cancel"
    """Somebody cancelled the row."""
    DRAIN = "drain"
    """The worker shuts down: the row is handed back."""
    LOST = "lost"
    """The lease must be taken for lost: the row is handed back if it is still ours."""
    FENCED = "fenced"
    """The row was taken away: nothing is written."""


class End(Enum):
    """What is to be done with the row."""

    COMPLETE = "complete"
    FAIL = "fail"
    HAND_BACK = "hand_back"
    CANCELLED = "cancelled"
    NOTHING = "nothing"
    """The handler ended the row itself, or the row is no longer ours."""


@dataclass(slots=True)
class Outcome:
    """How an attempt ended."""

    job: Job
    end: End
    reason: str = ""
    delay: timedelta | None = None
    permanent: bool = False


_BY_STOP = {
    Stop.CANCEL: End.CANCELLED,
    Stop.DRAIN: End.HAND_BACK,
    Stop.LOST: End.HAND_BACK,
    Stop.FENCED: End.NOTHING,
}


class Attempt:
    """A handler that runs for a row, in its own task."""

    __slots__ = ("_ended", "_handler", "_outage", "_stop", "_task", "job", "started_at")

    def __init__(
        self, job: Job, handler: Handler, started_at: float, ended: Callable[["Attempt", Outcome], None]
    ) -> None:
        self.job = job
        self.started_at = started_at
        self._handler = handler
        self._ended = ended
        self._stop: Stop | None = None
        self._outage: psycopg.Error | None = None
        """The error by which the job's connection was lost, or could not be had."""
        job.connection = partial(self._connection, job.connection)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Start the handler if it does not run yet."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._done)
        return self._task

    def stop(self, cause: Stop) -> None:
        """Interrupt the handler. The first cause counts, but FENCED replaces any other."""
        if self._stop is None:
            self._stop = cause
            self.start().cancel()
        elif cause is Stop.FENCED:
            self._stop = cause

    async def _run(self) -> None:
        row = self.job.row
        log_context.set(self._log_fields)
        if row.traceparent is None and not trace.exporting():
            await self._call()
            return
        with trace.span(
            f"{row.topic} attempt",
            row.traceparent,
            "consumer",
            {
                "outwake.topic": row.topic,
                "outwake.outbox_id": row.id,
                "outwake.attempt": row.attempt,
                "outwake.waited_seconds": row.waited.total_seconds(),
            },
            not_errors=(HandBack, Cancelled, Fenced),
        ) as span:
            self.job.traceparent = span.traceparent
            await self._call()

    def _log_fields(self) -> dict[str, object]:
        row = self.job.row
        fields: dict[str, object] = {"outbox_id": row.id, "attempt": row.attempt, "topic": row.topic}
        if isinstance(row.payload, dict) and isinstance(session := row.payload.get("session_id"), str):
            fields["session_id"] = session
        return fields

    async def _call(self) -> None:
        if debugging():
            log.debug("started")
        handler, job = self._handler, self.job
        if isinstance(job.row.payload, UnreadablePayload):
            raise Permanent(job.row.payload.reason)
        timeout = job.row.timeout or handler.timeout
        seconds = None if timeout is None else timeout.total_seconds()
        if handler.blocking:
            result = await self._in_thread(seconds)
        else:
            result = handler.run(job)
        if seconds is None:  # asyncio.timeout(None) would cost time for nothing
            await _to_its_end(result)
        else:
            async with asyncio.timeout(seconds):
                await _to_its_end(result)

    async def _in_thread(self, seconds: float | None) -> object:
        """Run the handler in a thread, so that the loop goes on and renews the lease. A thread cannot be
        interrupted: until it returns it works on the row, whatever a stop or its time limit says. If it has
        done its work by then, that counts, and it is not done again.
        """
        began = time.monotonic()
        thread = asyncio.ensure_future(asyncio.to_thread(self._handler.run, self.job))
        stopped = late = False
        while not thread.done():
            try:
                await asyncio.wait([thread], timeout=None if late else seconds)
            except asyncio.CancelledError:
                stopped = True
            if seconds is not None and not late and time.monotonic() - began >= seconds:
                late = True
                log.warning("time_limit_passed", limit=seconds)
        if late:
            log.warning("ended_late", seconds=round(time.monotonic() - began, 1), limit=seconds)
        if stopped:
            unfinished = thread.exception() is not None or inspect.isawaitable(thread.result())
            if unfinished:
                if thread.exception() is None and inspect.iscoroutine(coroutine := thread.result()):
                    coroutine.close()
                raise asyncio.CancelledError
        return thread.result()

    @asynccontextmanager
    async def _connection(
        self, connection: Callable[[], AbstractAsyncContextManager[Connection]]
    ) -> AsyncIterator[Connection]:
        """The job's connection."""
        conn: Connection | None = None
        try:
            async with connection() as conn:
                yield conn
        except psycopg.Error as error:
            if conn is None or conn.closed or is_outage(error):
                self._outage = error
            raise

    def _lost_connection(self, error: BaseException) -> bool:
        """Whether the handler failed only because the database was away. It may not say so for ever: perhaps
        it is the row's own query that ends the server's process.
        """
        row = self.job.row
        return (
            self._outage is not None
            and self._outage in (error, error.__cause__, error.__context__)
            and row.attempt - row.failures <= _MOST_PUT_OFF
        )

    def _done(self, task: asyncio.Task[None]) -> None:
        self._ended(self, self._outcome(task))

    def _outcome(self, task: asyncio.Task[None]) -> Outcome:
        job = self.job
        if task.cancelled():
            cause = self._stop
            if cause is None:
                return Outcome(job, End.FAIL, "the handler was cancelled, by nobody here")
            return Outcome(job, End.NOTHING if job.settled else _BY_STOP[cause], f"stopped: {cause.value}")
        error = task.exception()
        if job.settled or self._stop is Stop.FENCED:
            return Outcome(job, End.NOTHING)
        match error:
            case None:
                return Outcome(job, End.COMPLETE)
            case Fenced():
                return Outcome(job, End.NOTHING, str(error))
            case Cancelled():
                return Outcome(job, End.CANCELLED, str(error))
            case HandBack():
                return Outcome(job, End.HAND_BACK, str(error), error.delay)
            case Retry():
                return Outcome(job, End.FAIL, str(error), error.delay)
            case Permanent():
                return Outcome(job, End.FAIL, str(error), permanent=True)
            case _ if self._lost_connection(error):
                reason = str(error).partition("\n")[0]
                return Outcome(job, End.HAND_BACK, f"the database was away: {reason}", _PUT_OFF)
            case TimeoutError() if not str(error):
                return Outcome(job, End.FAIL, "timed out")
            case _:
                log.warning("handler_failed", outbox_id=job.row.id, exc_info=error)
                return Outcome(job, End.FAIL, f"{type(error).__name__}: {error}")


async def _to_its_end(result: object) -> None:
    """Await what a handler returned, and what that gives in turn. Raises Permanent if it gives what nobody
    runs: a decorator without its parentheses or a forgotten `await` would else end the row without its work.
    """
    while True:
        if isinstance(result, concurrent.futures.Future):
            result = await asyncio.wrap_future(result)
        elif inspect.isawaitable(result):
            result = await result
        else:
            break
    if result is None:  # as nearly always: what follows would cost each row time
        return
    parts = result if isinstance(result, list | tuple | set) else [result]
    idle = [part for part in parts if _is_to_be_run(part)]
    for part in idle:
        if inspect.iscoroutine(part):
            part.close()
    if idle:
        raise Permanent(f"the handler returned {type(idle[0]).__name__}, which nobody runs")


def _is_to_be_run(value: object) -> bool:
    return (
        inspect.isgenerator(value)
        or inspect.isasyncgen(value)
        or inspect.isroutine(value)
        or inspect.isawaitable(value)
        or isinstance(value, partial)
    )

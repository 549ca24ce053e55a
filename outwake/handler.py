"""Handlers: code that serves a topic.

    from outwake import Handler, Job, Retry

    async def send(job: Job) -> None:
        async with job.transaction() as conn:       # fenced: all of it happens, or none
            await conn.execute("INSERT INTO sent …")
            await job.complete(conn)                # in the same commit as its effects

    handler = Handler("email.send", send)

and in pyproject.toml, so that `worker` finds it:

    [project.entry-points."outwake.handlers"]
    "email.send" = "my_package.email:handler"
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from importlib.metadata import entry_points
from typing import Any, Protocol
from uuid import UUID

import psycopg

from outwake._claim import Claimed, complete, fence
from outwake.errors import Cancelled, ConfigurationError, Fenced
from outwake.sql import Line

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Lease(Protocol):
    """How long the worker may count on its rows."""

    def remaining(self) -> float:
        """Seconds left; zero or less when the lease must be assumed lost."""

    async def extended(self) -> None:
        """Return when the lease has been extended."""


@dataclass(slots=True)
class Job:
    """One attempt at one row, as its handler sees it."""

    row: Claimed
    worker_id: UUID
    lease: Lease
    connection: Callable[[], AbstractAsyncContextManager[Connection]] = field(repr=False)
    settled: bool = False
    """Whether the handler has ended the row itself, by `complete`, and that is committed."""
    traceparent: str | None = None
    """This attempt's span in the row's trace, for calls and rows that the handler makes."""
    _completing: bool = field(default=False, repr=False)

    @property
    def payload(self) -> Any:
        """The row's payload: any JSON value. A producer at psql may insert one that is no object."""
        return self.row.payload

    @property
    def token(self) -> tuple[int, int]:
        """The fencing token: (id, attempt)."""
        return (self.row.id, self.row.attempt)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction that holds a lock on the row: a rescue comes wholly before it or wholly after it.

        Raises Fenced if the row no longer belongs to this attempt, Cancelled if a cancel was requested.
        """
        self._completing = False
        async with self.connection() as conn, conn.transaction():
            if await fence(conn, self.worker_id, self.token):
                raise Cancelled("a cancel was requested")
            yield conn
        self.settled = self._completing  # only now is it committed

    async def complete(self, conn: Connection) -> None:
        """End the row as done in the caller's transaction, so that its end and its effects are one commit."""
        if not await complete(conn, self.worker_id, [self.token]):
            raise Fenced(*self.token)
        self._completing = True


Run = Callable[[Job], Awaitable[object] | object]
"""What a handler runs: anything that can be called with a job. Its value is not used."""


@dataclass(frozen=True)
class Handler:
    """Serves one topic. The work is done when `run` has returned and, if it returned an awaitable, when that
    has been awaited. A plain function runs in a thread, and so does an async one behind a decorator, because
    it looks like one. An awaitable that it returns is awaited on the worker's event loop.

    `run` may raise Retry, Permanent or HandBack (outwake.errors). Any other exception is a failure, which is
    retried with backoff. `timeout` limits one attempt; the topic table can override it.
    """

    topic: str
    run: Run
    timeout: timedelta | None = None
    line: Line = "outbox"
    """The tables that it needs. If a database lacks them, a worker does not serve the topic."""
    built_in: bool = False
    """It runs only Outwake's own queries. Its connections do not use the role's search_path, because others
    may be able to create functions and operators there."""
    check: Callable[[], str | None] | None = None
    """Tells in one line why this process cannot do such work; None if it can. A worker asks when it starts,
    and does not serve the topic if there is a reason."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError if a call of `run` would do nothing."""
        called = _called(self.run)
        if not callable(self.run):
            raise ConfigurationError(f"the handler of topic {self.topic} cannot be called: {self.run!r}")
        if inspect.isclass(self.run) and not hasattr(self.run, "__await__"):
            raise ConfigurationError(
                f"the handler of topic {self.topic} is a class, whose objects nobody would run: {self.run!r}"
            )
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            raise ConfigurationError(
                f"the handler of topic {self.topic} is a generator, which nobody would run: {self.run!r}"
            )

    @cached_property
    def blocking(self) -> bool:
        """Whether `run` is called in a thread: it is not known to be async."""
        return not inspect.iscoroutinefunction(_called(self.run))


def _called(run: object) -> object:
    """The function that a call of `run` calls first: behind partials, and of an object its __call__."""
    while isinstance(run, partial):
        run = run.func
    return run if inspect.isroutine(run) or inspect.isclass(run) else getattr(run, "__call__", run)  # noqa: B004


def installed_handlers() -> dict[str, Handler]:
    """The handlers of the entry point group `outwake.handlers`, by topic.

    Raises ConfigurationError if an entry point does not load, is not a Handler, or serves another's topic.
    """
    found: dict[str, Handler] = {}
    for entry in entry_points(group="outwake.handlers"):
        try:
            handler = entry.load()
        except Exception as error:
            raise ConfigurationError(f"handler {entry.name} = {entry.value}: {error}") from error
        if not isinstance(handler, Handler):
            raise ConfigurationError(f"handler {entry.name} = {entry.value} is not an outwake.Handler")
        if handler.topic in found:
            raise ConfigurationError(f"two handlers serve the topic {handler.topic}")
        found[handler.topic] = handler
    return found

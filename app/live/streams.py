"""What a client that follows a session gets: its events, read in batches."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID

from outwake.app.api.problems import Problem


class Found(NamedTuple):
    """What a read found of one session after one cursor."""

    place: int
    user_id: str
    last_seq: int
    inbox_status: str
    state: str
    seqs: list[int]
    superseded: list[bool]
    texts: list[str]


class Stream:
    """One client that follows a session."""

    def __init__(
        self, taken: Callable[["Stream"], None], session_id: UUID, after: int, *, until_completed: bool
    ) -> None:
        """`taken` is called when the stream's buffer is empty again."""
        self.session_id = session_id
        self.cursor = after
        self.user_id: str | None = None
        self._taken = taken
        self._after = after
        self._until_completed = until_completed
        self._state: str | None = None
        self._batch = b""
        self._ended = False
        self._failure: Problem | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """No more events will come."""
        return self._ended and not self._batch

    @property
    def nothing_left(self) -> bool:
        """The stream ended without a message."""
        return self._ended and self.cursor == self._after

    @property
    def full(self) -> bool:
        return bool(self._batch)

    async def begin(self) -> None:
        """Wait for the first read. Raises Problem (not-found, unavailable)."""
        await self._news.wait()
        if self._failure:
            raise self._failure

    async def take(self, timeout: float) -> bytes:
        """The next events. Empty if none came within `timeout` seconds, or if none will come."""
        if not self._batch and not self._ended:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return b""
        batch, self._batch = self._batch, b""
        self._taken(self)
        return batch

    def receive(self, found: Found | None) -> bool:
        """Take what was read. Returns whether there is more to read now."""
        if found is None:
            self.fail(Problem("not-found", "There is no such session."))
            return False
        first = self._state is None
        self.user_id = found.user_id
        if found.seqs:
            self.cursor = found.seqs[-1]
        # No message after the cursor also means the end: messages up to last_seq may have been pruned.
        all_read = not found.seqs or self.cursor >= found.last_seq
        parts = [
            _event("superseded" if superseded else "message", text, seq)
            for seq, superseded, text in zip(found.seqs, found.superseded, found.texts, strict=True)
        ]
        if first:
            parts.insert(0, _event("status", found.state))
            self._state = found.state
        elif all_read and found.state != self._state:
            parts.append(_event("status", found.state))
            self._state = found.state
        self._batch = b"".join(parts)
        over = ("archived", "completed") if self._until_completed else ("archived",)
        if all_read and found.inbox_status in over:
            self._ended = True
        if self._batch or self._ended:
            self._news.set()
        return not all_read

    def fail(self, problem: Problem) -> None:
        """End the stream. A client without an answer yet gets the problem."""
        self._failure = problem
        self.end()

    def end(self) -> None:
        self._ended = True
        self._news.set()


def _event(name: str, data: str, seq: int | None = None) -> bytes:
    """One event. `data` has no line break, because Postgres made it."""
    head = f"id: {seq}\n" if seq is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n".encode()

"""What a client that follows a session gets: its events, read in batches."""

import asyncio
import hashlib
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
        self,
        taken: Callable[["Stream"], None],
        session_id: UUID,
        after: int,
        *,
        until_completed: bool,
        mark: str | None = None,
        reader: str = "",
    ) -> None:
        """`taken` is called when the stream's buffer is empty again. `mark` names the last state that the
        client has seen, `reader` is the user whose client it is.
        """
        self.session_id = session_id
        self.reader = reader
        self.cursor = after
        self.user_id: str | None = None
        self._taken = taken
        self._after = after
        self._until_completed = until_completed
        self._state: str | None = None
        self._mark = mark
        self._batch = b""
        self._handed_out = 0
        self._ended = False
        self._failure: Problem | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """No more events will come."""
        return self._ended and not self._batch

    @property
    def nothing_left(self) -> bool:
        """The client has each message, and the last state."""
        seen = self._state is not None and self._mark == mark_of(self._state)
        return self._ended and self.cursor == self._after and seen

    @property
    def held(self) -> int:
        """Bytes in memory: those that wait, and those that were handed out last and may not be sent yet."""
        return len(self._batch) + self._handed_out

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
        self._handed_out = 0  # its sender came back, so the client has taken nearly all
        if not self._batch and not self._ended:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return b""
        batch, self._batch = self._batch, b""
        self._handed_out = len(batch)
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
        over = ("archived", "completed") if self._until_completed else ("archived",)
        self._ended = self._ended or (all_read and found.inbox_status in over)
        if first:
            last = self._ended and not parts
            parts.insert(0, self._status(found.state, last=last))
        elif all_read and found.state != self._state:
            parts.append(self._status(found.state, last=self._ended))
        self._state = found.state if first or all_read else self._state
        self._batch = b"".join(parts)
        if self._batch or self._ended:
            self._news.set()
        return not all_read

    def _status(self, state: str, *, last: bool) -> bytes:
        """The last one has an id, so that a client that comes back need not be told again."""
        return _event("status", state, f"{self.cursor}-{mark_of(state)}" if last else None)

    def fail(self, problem: Problem) -> None:
        """End the stream. A client without an answer yet gets the problem."""
        self._failure = problem
        self.end()

    def end(self) -> None:
        self._ended = True
        self._news.set()


def mark_of(state: str) -> str:
    """A short name of a state."""
    return hashlib.sha256(state.encode()).hexdigest()[:8]


def _event(name: str, data: str, id_: int | str | None = None) -> bytes:
    """One event. `data` has no line break, because Postgres made it."""
    head = f"id: {id_}\n" if id_ is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n".encode()

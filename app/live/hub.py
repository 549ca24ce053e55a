"""Feeds the event streams of a process. One notification causes one read for all streams of the session.

A stream has a cursor (the seq of its last message) and a buffer of one batch. If its client is slow, later
messages stay in the database until the buffer is empty.

Reading. Notifications, new streams and emptied buffers only mark streams as stale. One reader reads all
stale streams together, at most once each PAUSE, with one statement for up to GROUPS of them. A mark that is
set during a read causes another read. State and messages come from one snapshot, so one row tells whether
the session is completed and everything was sent.

Watching. Changes of a session are notified only if it is watched. The hub starts to watch as a worker parks
(worker/engine/parking.py tells why no event is lost). For all newly followed sessions:
1. Call session_watch and commit. Transactions that change a session from now on see the watch and notify.
2. Call session_writers: the open transactions that may have checked for a watch before step 1. Mark the
   streams as stale, to read what is already committed.
3. Check these transactions again until all have ended, with a backoff of up to a second. Each time one has
   ended, mark the streams as stale: a read that starts after the end sees its changes. The last such read
   takes the place of a parking worker's last claim.
4. From here on only notifications count.
A new LISTEN connection has a new presence, and all steps start again for all sessions. Step 2 reads what the
lost connection was notified of.
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

import psycopg

from outwake.app.api.problems import Problem, of_database, unavailable
from outwake.app.database import Database
from outwake.app.live.listen import Listener
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger

PAUSE = 0.05  # least seconds between two reads
FAILURE_PAUSE = 0.5  # seconds after a read that failed
GROUPS = 500  # streams read by one statement
BATCH = 100  # messages
BATCH_BYTES = 65536  # as stored; the first message of a batch may be larger
LOOK_PAUSE = (0.002, 1.0)  # seconds between checks of the writers, first and last

_READ = in_schema("""
SELECT
    w.place, s.user_id, s.last_seq, s.inbox_status,
    jsonb_build_object(
        'id', s.id, 'title', s.title,
        'inbox_status', s.inbox_status, 'session_status', s.session_status,
        'prompts', (
            SELECT coalesce(
                jsonb_agg(jsonb_build_object('id', p.id, 'status', p.status, 'reason', p.reason)
                          ORDER BY p.created_at, p.id), '[]')
            FROM (
                SELECT q.id, q.status, q.reason, q.created_at FROM :schema.prompt AS q
                WHERE q.session_id = s.id
                ORDER BY q.created_at DESC, q.id DESC LIMIT 100
            ) AS p
        ))::text,
    batch.seqs, batch.superseded, batch.texts
FROM unnest(%(ids)s::uuid[], %(cursors)s::bigint[]) WITH ORDINALITY AS w (session_id, after, place)
JOIN :schema.session AS s ON s.id = w.session_id
CROSS JOIN LATERAL (
    SELECT
        coalesce(array_agg(b.seq ORDER BY b.seq), '{}') AS seqs,
        coalesce(array_agg((b.body ->> 'type') IS NOT DISTINCT FROM 'superseded' ORDER BY b.seq), '{}')
            AS superseded,
        coalesce(array_agg(
            :schema.message_json(b.seq, b.prompt_id, b.attempt, b.body, b.created_at)::text ORDER BY b.seq),
            '{}') AS texts
    FROM (
        SELECT m.seq, m.prompt_id, m.attempt, m.body, m.created_at,
               sum(pg_column_size(m.body)) OVER (ORDER BY m.seq) - pg_column_size(m.body) AS bytes_before
        FROM :schema.message AS m
        WHERE m.session_id = w.session_id AND m.seq > w.after
        ORDER BY m.seq
        LIMIT %(batch)s
    ) AS b
    WHERE b.bytes_before < %(batch_bytes)s
) AS batch
""")
_WATCH = in_schema("SELECT :schema.session_watch(%s::uuid[], %s)")
_UNWATCH = in_schema("DELETE FROM :schema.watcher WHERE presence = %s AND session_id = ANY (%s::uuid[])")
_WRITERS = in_schema("SELECT :schema.session_writers()")

log = get_logger("outwake.app.live.hub")


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

    def __init__(self, hub: "Hub", session_id: UUID, after: int, *, until_completed: bool) -> None:
        self.session_id = session_id
        self.cursor = after
        self.user_id: str | None = None
        self._hub = hub
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
        self._hub.taken(self)
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


@dataclass
class _Handshake:
    """Sessions that wait for the writers of step 2 to end."""

    writers: set[str]
    ids: set[UUID]


@dataclass
class _Watch:
    """The watches that are registered under the presence of one LISTEN connection."""

    presence: int
    ids: set[UUID] = field(default_factory=set)
    handshakes: list[_Handshake] = field(default_factory=list)


class Hub:
    """All streams of the process. A task must execute `run`."""

    def __init__(self, database: Database, listen_url: str) -> None:
        self._database = database
        self._listener = Listener(
            listen_url,
            up=self._listener_up,
            down=self._listener_down,
            changed=self._changed,
            unclear=self._anything_changed,
        )
        self._streams: defaultdict[UUID, set[Stream]] = defaultdict(set)
        self._stale: set[Stream] = set()
        self._to_read = asyncio.Event()
        self._watch: _Watch | None = None
        self._to_watch = asyncio.Event()
        self._closing = False

    @property
    def listening(self) -> bool:
        return self._watch is not None

    async def run(self) -> None:
        """Feed the streams until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listener.run())
            group.create_task(self._read_stale())
            group.create_task(self._keep_watches())

    def follow(self, session_id: UUID, after: int, *, until_completed: bool) -> Stream:
        """A new stream. End it with `leave`."""
        stream = Stream(self, session_id, after, until_completed=until_completed)
        if self._closing:
            stream.fail(Problem("unavailable", "This process is shutting down."))
        elif not self._database.available:
            stream.fail(unavailable())
        self._streams[session_id].add(stream)
        self._mark(stream)
        self._to_watch.set()
        return stream

    def leave(self, stream: Stream) -> None:
        self._stale.discard(stream)
        streams = self._streams[stream.session_id]
        streams.discard(stream)
        if not streams:
            del self._streams[stream.session_id]
            self._to_watch.set()

    def taken(self, stream: Stream) -> None:
        """The stream's buffer is empty again."""
        if stream in self._stale:
            self._to_read.set()

    def close(self) -> None:
        """End all streams. Their clients reconnect to another process."""
        self._closing = True
        for streams in self._streams.values():
            for stream in streams:
                stream.end()

    # Reading

    def _mark(self, stream: Stream) -> None:
        if stream in self._streams.get(stream.session_id, ()):
            self._stale.add(stream)
            self._to_read.set()

    def _changed(self, session_id: UUID) -> None:
        for stream in self._streams.get(session_id, ()):
            self._mark(stream)

    def _anything_changed(self) -> None:
        self._mark_all(set(self._streams))

    async def _read_stale(self) -> None:
        while True:
            await self._to_read.wait()
            self._to_read.clear()
            groups: defaultdict[tuple[UUID, int], list[Stream]] = defaultdict(list)
            for stream in self._stale:
                if not stream.full:
                    groups[stream.session_id, stream.cursor].append(stream)
            places = list(groups)
            for start in range(0, len(places), GROUPS):
                part = places[start : start + GROUPS]
                await self._read({place: groups[place] for place in part})
            await asyncio.sleep(PAUSE)

    async def _read(self, groups: dict[tuple[UUID, int], list[Stream]]) -> None:
        reading = {stream for streams in groups.values() for stream in streams}
        self._stale -= reading
        try:
            found = await self._query(list(groups))
        except (psycopg.Error, Problem) as error:
            self._put_off(reading, error)
            await self._database.wait_available()
            await asyncio.sleep(FAILURE_PAUSE)
            return
        for place, streams in enumerate(groups.values(), 1):
            for stream in streams:
                if stream.receive(found.get(place)) and not stream.ended:
                    self._mark(stream)

    async def _query(self, places: list[tuple[UUID, int]]) -> dict[int, Found]:
        values = {
            "ids": [session_id for session_id, _ in places],
            "cursors": [cursor for _, cursor in places],
            "batch": BATCH,
            "batch_bytes": BATCH_BYTES,
        }
        return {row[0]: Found(*row) for row in await self._database.rows(_READ, values)}

    def _put_off(self, streams: set[Stream], error: psycopg.Error | Problem) -> None:
        """Streams that have begun wait until the database is back. The others fail."""
        problem = error if isinstance(error, Problem) else of_database(error)
        log.warning("events_not_read", error=str(error), streams=len(streams))
        for stream in streams:
            if stream.user_id is None:
                stream.fail(problem)
            else:
                self._mark(stream)

    # Watching

    def _listener_up(self, presence: int) -> None:
        self._watch = _Watch(presence)
        self._to_watch.set()

    def _listener_down(self) -> None:
        self._watch = None

    async def _keep_watches(self) -> None:
        first, last = LOOK_PAUSE
        pause = first
        while True:
            watch = self._watch
            looking = watch is not None and bool(watch.handshakes)
            try:
                async with asyncio.timeout(pause if looking else None):
                    await self._to_watch.wait()
                pause = first
            except TimeoutError:
                pause = min(pause * 2, last)
            self._to_watch.clear()
            if self._watch is None:
                continue
            try:
                await self._update(self._watch)
                await self._look(self._watch)
            except (psycopg.Error, Problem) as error:
                log.warning("watch_failed", error=str(error))
                await self._database.wait_available()
                await asyncio.sleep(FAILURE_PAUSE)
                self._to_watch.set()

    async def _update(self, watch: _Watch) -> None:
        """Steps 1 and 2. It also removes unneeded watches."""
        followed = set(self._streams)
        unneeded, needed = watch.ids - followed, followed - watch.ids
        if unneeded:
            await self._database.rows(_UNWATCH, (watch.presence, list(unneeded)))
            watch.ids -= unneeded
        if needed:
            await self._database.rows(_WATCH, (list(needed), watch.presence))
            watch.handshakes.append(_Handshake(await self._writers(), needed))
            watch.ids |= needed
            self._mark_all(needed)

    async def _look(self, watch: _Watch | None) -> None:
        """Step 3."""
        if watch is None or not watch.handshakes:
            return
        if any(handshake.writers for handshake in watch.handshakes):
            writers = await self._writers()
            for handshake in watch.handshakes:
                if not handshake.writers <= writers:
                    handshake.writers &= writers
                    self._mark_all(handshake.ids)
        watch.handshakes = [handshake for handshake in watch.handshakes if handshake.writers]

    async def _writers(self) -> set[str]:
        row = await self._database.row(_WRITERS)
        assert row is not None
        return set(row[0])

    def _mark_all(self, ids: set[UUID]) -> None:
        for session_id in ids:
            self._changed(session_id)


def _event(name: str, data: str, seq: int | None = None) -> bytes:
    """One event. `data` has no line break, because Postgres made it."""
    head = f"id: {seq}\n" if seq is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n".encode()

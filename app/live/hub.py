"""Feeds the event streams of a process. One notification causes one read for all streams of the session.

A stream has a cursor (the seq of its last message) and a buffer of one batch. If its client is slow, later
messages stay in the database until the buffer is empty.

Notifications, new streams, emptied buffers and the handshakes of new watches (app/live/watches.py) only mark
streams as stale. One reader reads all stale streams together, at most once each PAUSE, with one statement for
up to GROUPS of them. A mark that is set during a read causes another read. State and messages come from one
snapshot, so one row tells whether the session is completed and everything was sent.
"""

import asyncio
from collections import Counter, defaultdict
from uuid import UUID

import psycopg

from outwake.app.api.problems import Problem, of_database, unavailable
from outwake.app.database import Database
from outwake.app.live.listen import Listener
from outwake.app.live.streams import Found, Stream
from outwake.app.live.watches import FAILURE_PAUSE, Watches
from outwake.schema import in_schema
from outwake.telemetry.log import get_logger

PAUSE = 0.05  # least seconds between two reads
GROUPS = 32  # streams read by one statement; each may have a message of a megabyte
STEP_BYTES = 1_000_000  # of batches that are made in one step of the event loop
BATCH = 100  # messages
BATCH_BYTES = 65536  # of the events; the last message of a batch may go beyond
HELD = 67_108_864  # bytes that the streams of a process hold for clients that do not read
HELD_FOR_READER = 8_388_608  # bytes, for all streams of one user
EXPECTED = 8192  # bytes of a batch, most of which are small

_READ = in_schema("""
SELECT
    w.place, s.user_id, s.last_seq, s.inbox_status,
    jsonb_build_object(
        'id', s.id, 'title', s.title,
        'inbox_status', s.inbox_status, 'session_status', s.session_status,
        'pull_request', :schema.session_json(s) -> 'pull_request',
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
    -- Message by message, as app/api/messages.py reads a page.
    WITH RECURSIVE part (place, seq, superseded, text, bytes) AS (
        SELECT 0, w.after, false, NULL::text, 0::bigint
        UNION ALL
        SELECT p.place + 1, next.seq, next.superseded, next.text, p.bytes + octet_length(next.text)
        FROM part AS p
        CROSS JOIN LATERAL (
            SELECT m.seq, (m.body ->> 'type') IS NOT DISTINCT FROM 'superseded' AS superseded,
                   :schema.message_json(m.seq, m.prompt_id, m.attempt, m.body, m.created_at)::text AS text
            FROM :schema.message AS m
            WHERE m.session_id = w.session_id AND m.seq > p.seq
            ORDER BY m.seq
            LIMIT 1
        ) AS next
        WHERE p.place < %(batch)s AND p.bytes < %(batch_bytes)s
    )
    SELECT
        coalesce(array_agg(b.seq ORDER BY b.place), '{}') AS seqs,
        coalesce(array_agg(b.superseded ORDER BY b.place), '{}') AS superseded,
        coalesce(array_agg(b.text ORDER BY b.place), '{}') AS texts
    FROM part AS b
    WHERE b.place > 0
) AS batch
""")

log = get_logger("outwake.app.live.hub")


class Hub:
    """All streams of the process. A task must execute `run`."""

    def __init__(self, database: Database, listen_url: str) -> None:
        self._database = database
        self._watches = Watches(database, lambda: set(self._streams), self._changed)
        self._listener = Listener(
            listen_url,
            up=self._watches.up,
            down=self._watches.down,
            changed=lambda session_id: self._changed({session_id}),
            unclear=lambda: self._changed(set(self._streams)),
        )
        self._streams: defaultdict[UUID, set[Stream]] = defaultdict(set)
        self._stale: set[Stream] = set()
        self._to_read = asyncio.Event()
        self._closing = False

    @property
    def listening(self) -> bool:
        return self._watches.current is not None

    async def run(self) -> None:
        """Feed the streams until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listener.run())
            group.create_task(self._read_stale())
            group.create_task(self._watches.run())

    def follow(
        self,
        session_id: UUID,
        after: int,
        *,
        until_completed: bool,
        mark: str | None = None,
        reader: str = "",
    ) -> Stream:
        """A new stream, which counts for `reader` if that is not empty. End it with `leave`."""
        stream = Stream(
            self._taken, session_id, after, until_completed=until_completed, mark=mark, reader=reader
        )
        if self._closing:
            stream.fail(Problem("unavailable", "This process is shutting down."))
        elif not self._database.available:
            stream.fail(unavailable())
        self._streams[session_id].add(stream)
        self._mark(stream)
        self._watches.followed_changed()
        return stream

    def leave(self, stream: Stream) -> None:
        self._stale.discard(stream)
        streams = self._streams[stream.session_id]
        streams.discard(stream)
        if not streams:
            del self._streams[stream.session_id]
            self._watches.followed_changed()
        self._taken(stream)

    def close(self) -> None:
        """End all streams. Their clients reconnect to another process."""
        self._closing = True
        for streams in self._streams.values():
            for stream in streams:
                stream.end()

    def _taken(self, stream: Stream) -> None:
        """The stream's buffer is empty again, so there is room for one that waits."""
        if self._stale:
            self._to_read.set()

    def _mark(self, stream: Stream) -> None:
        if stream in self._streams.get(stream.session_id, ()):
            self._stale.add(stream)
            self._to_read.set()

    def _changed(self, session_ids: set[UUID]) -> None:
        for session_id in session_ids:
            for stream in self._streams.get(session_id, ()):
                self._mark(stream)

    async def _read_stale(self) -> None:
        while True:
            await self._to_read.wait()
            self._to_read.clear()
            groups = self._ready()
            places = list(groups)
            for start in range(0, len(places), GROUPS):
                part = places[start : start + GROUPS]
                await self._read({place: groups[place] for place in part})
            if groups and self._stale:  # some may have waited for these
                self._to_read.set()
            await asyncio.sleep(PAUSE)

    def _ready(self) -> dict[tuple[UUID, int], list[Stream]]:
        """The streams to read for: those with an empty buffer, while reader and process hold little."""
        held: Counter[str] = Counter()
        for streams in self._streams.values():
            for stream in streams:
                held[stream.reader] += stream.held
        total = held.total()
        groups: defaultdict[tuple[UUID, int], list[Stream]] = defaultdict(list)
        for stream in self._stale:
            fits = not stream.reader or held[stream.reader] < HELD_FOR_READER
            if not stream.full and fits and total < HELD:
                groups[stream.session_id, stream.cursor].append(stream)
                held[stream.reader] += BATCH_BYTES
                total += EXPECTED
        return groups

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
        made = 0
        for place, streams in enumerate(groups.values(), 1):
            for stream in streams:
                if stream.receive(found.get(place)) and not stream.ended:
                    self._mark(stream)
                made += stream.held
                if made > STEP_BYTES:
                    made = 0
                    await asyncio.sleep(0)

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

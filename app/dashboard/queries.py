"""The pages' own queries, for data that the API does not answer.

The views of sql/outbox/functions/ tell what waits and why, which worker runs what, and what happened.
"""

from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from outwake.app.database import Database
from outwake.schema import in_schema
from outwake.session.events import LARGEST_COST

PAGE = 50
LONGEST_REASON = 2000  # characters of an error in a list
RESULT_BYTES = 65_536  # of a session's results, as they are stored, that a list reads
WINDOW = 100_000

# Rows that ended lately. Every row would pay for an index by time, but ids are nearly in the order of time.
# So such a row has one of the newest ids or, if rows wait, an id just below the first waiting row's.
_RECENT = f"""
recent AS MATERIALIZED (
    SELECT o.id, o.topic, o.state, o.attempt, o.failures, o.max_attempts, o.payload, o.errors,
           o.created_at, o.available_at, o.started_at, o.finished_at
    FROM (
        SELECT unnest(range_agg(int8range(e.id - {WINDOW}, e.id, '[]'))) AS ids
        FROM (
            SELECT max(id) AS id FROM :schema.outbox
            UNION ALL
            (SELECT f.id FROM :schema.outbox_front AS f WHERE f.available_at <= statement_timestamp()
             ORDER BY f.available_at LIMIT 8)
        ) AS e
        WHERE e.id IS NOT NULL
    ) AS span
    JOIN :schema.outbox AS o ON o.id >= lower(span.ids) AND o.id < upper(span.ids)
)
"""  # noqa: S608 - constants of this module

# The count stops at 100, because the badge shows "99+" then.
_OVERVIEW = in_schema("""
SELECT r.reason, r.stuck, r.workers,
       (SELECT count(*) FROM (SELECT FROM :schema.outbox WHERE state = 'dead' LIMIT 100) AS d)
FROM :schema.outbox_ready(%s) AS r
""")

# Results are read from the newest back, while those of a session take few bytes as they are stored. `more`
# tells that some were left out. Version 1.0 stored no cost of its own, only the agent's line.
_TURNS = in_schema("""
SELECT p.session_id, count(*), (array_agg(p.status ORDER BY p.created_at DESC, p.id DESC))[1],
       sum(told.cost::numeric) FILTER (WHERE told.cost::numeric BETWEEN 0 AND %s::numeric),
       bool_or(p.stored > %s)
FROM (
    SELECT q.session_id, q.id, q.created_at, q.status, q.result,
           sum(coalesce(pg_column_size(q.result), 0)) OVER (
               PARTITION BY q.session_id ORDER BY q.created_at DESC, q.id DESC) AS stored
    FROM :schema.prompt AS q
    WHERE q.session_id = ANY (%s)
) AS p
CROSS JOIN LATERAL (
    SELECT CASE WHEN jsonb_typeof(c) = 'number' THEN c END AS cost
    FROM (
        SELECT CASE WHEN p.stored <= %s
                    THEN coalesce(p.result -> 'cost', p.result #> '{agent,total_cost_usd}') END AS c
    ) AS found
) AS told
GROUP BY p.session_id
""")

# This reads the view for the wanted rows only. The whole view would be computed for every waiting row.
_REASONS = """
reason AS MATERIALIZED (
    SELECT q.id, q.reason, q.detail, q.waited
    FROM :schema.outbox_waiting AS q
    WHERE q.id = ANY (ARRAY(SELECT o.id FROM wanted AS o))
)
"""
_SESSION_ROWS = in_schema(f"""
WITH wanted AS MATERIALIZED (
    SELECT o.id, o.payload, o.state, o.failures, o.cancel_requested_at FROM :schema.outbox AS o
    WHERE o.topic = 'session.run' AND o.payload ->> 'session_id' = %s AND o.payload ->> 'prompt_id' = ANY (%s)
),
{_REASONS}
SELECT o.id, o.payload ->> 'prompt_id', o.state, o.failures, o.cancel_requested_at IS NOT NULL,
       q.reason, q.detail
FROM wanted AS o
LEFT JOIN reason AS q ON q.id = o.id
""")  # noqa: S608

_LAST_SEQ = in_schema("SELECT last_seq FROM :schema.session WHERE id = %s")

_DEPTH = in_schema("""
SELECT topic,
       coalesce(sum(rows) FILTER (WHERE wait = 'due'), 0)::bigint,
       coalesce(sum(rows) FILTER (WHERE wait = 'delayed'), 0)::bigint,
       coalesce(sum(rows) FILTER (WHERE wait = 'key'), 0)::bigint,
       coalesce(sum(rows) FILTER (WHERE state = 'running'), 0)::bigint,
       coalesce(sum(rows) FILTER (WHERE state = 'dead'), 0)::bigint,
       max(oldest) FILTER (WHERE wait = 'due')
FROM :schema.outbox_depth
GROUP BY topic
ORDER BY topic
""")

_WANTED = "o.id, o.topic, o.state, o.attempt, o.failures, o.max_attempts, o.payload, o.created_at"
_ROW = "o.id, o.topic, o.state, o.attempt, o.failures, o.max_attempts, o.payload ->> 'session_id', "
_WAITING = in_schema(f"""
WITH wanted AS MATERIALIZED (
    SELECT {_WANTED}, o.available_at FROM :schema.outbox AS o
    WHERE o.state = 'ready' AND (%(topic)s::text IS NULL OR o.topic = %(topic)s)
    ORDER BY o.available_at, o.id
    LIMIT {PAGE}
),
{_REASONS}
SELECT {_ROW} q.reason, q.detail, q.waited, o.created_at, NULL::timestamptz
FROM wanted AS o
LEFT JOIN reason AS q ON q.id = o.id
ORDER BY o.available_at, o.id
""")  # noqa: S608
_RUNNING = in_schema(f"""
WITH wanted AS MATERIALIZED (
    SELECT {_WANTED}, o.started_at, o.worker_id FROM :schema.outbox AS o
    WHERE o.state = 'running' AND (%(topic)s::text IS NULL OR o.topic = %(topic)s)
    ORDER BY o.started_at, o.id
    LIMIT {PAGE}
),
{_REASONS}
SELECT {_ROW} coalesce(q.reason, 'running'), coalesce(q.detail, 'on ' || w.host || ':' || w.pid),
       statement_timestamp() - o.started_at, o.created_at, NULL::timestamptz
FROM wanted AS o
LEFT JOIN :schema.worker AS w ON w.id = o.worker_id
LEFT JOIN reason AS q ON q.id = o.id
ORDER BY o.started_at, o.id
""")  # noqa: S608
_ENDED = in_schema(f"""
WITH {_RECENT}
SELECT {_ROW} o.state, left(o.errors -> -1 ->> 'error', {LONGEST_REASON}), o.finished_at - o.started_at,
       o.created_at, o.finished_at
FROM recent AS o
WHERE o.state = %(state)s AND (%(topic)s::text IS NULL OR o.topic = %(topic)s)
ORDER BY o.finished_at DESC, o.id DESC
LIMIT {PAGE}
""")  # noqa: S608

# The depth at the end of each bin is the number of unfinished rows now, minus the rows that came later, plus
# the rows that ended later. Waits are computed as in outbox_throughput, which has whole hours only.
_TIMELINE = in_schema(f"""
WITH {_RECENT},
bin AS (
    SELECT b AS at, b + %(step)s AS until
    FROM generate_series(
        date_bin(%(step)s, statement_timestamp(), 'epoch') - (%(bins)s - 1) * %(step)s::interval,
        date_bin(%(step)s, statement_timestamp(), 'epoch'), %(step)s) AS b
),
came AS (
    SELECT date_bin(%(step)s, created_at, 'epoch') AS at, count(*) AS rows FROM recent GROUP BY 1
),
ended AS (
    SELECT date_bin(%(step)s, finished_at, 'epoch') AS at, count(*) AS rows,
           count(*) FILTER (WHERE state = 'done') AS done,
           count(*) FILTER (WHERE state = 'dead') AS dead,
           count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
           extract(epoch FROM percentile_disc(0.5) WITHIN GROUP (ORDER BY started_at - available_at)
               FILTER (WHERE state = 'done'))::float AS wait_p50,
           extract(epoch FROM percentile_disc(0.95) WITHIN GROUP (ORDER BY started_at - available_at)
               FILTER (WHERE state = 'done'))::float AS wait_p95
    FROM recent
    WHERE finished_at IS NOT NULL
    GROUP BY 1
),
now AS (
    SELECT coalesce(sum(rows), 0)::bigint AS rows
    FROM :schema.outbox_depth WHERE state IN ('ready', 'running')
)
SELECT b.at,
       greatest(0, n.rows - coalesce(sum(coalesce(c.rows, 0) - coalesce(e.rows, 0)) OVER later, 0))::bigint,
       coalesce(e.done, 0), coalesce(e.dead, 0), coalesce(e.cancelled, 0),
       greatest(e.wait_p50, 0), greatest(e.wait_p95, 0)
FROM now AS n
CROSS JOIN bin AS b
LEFT JOIN came AS c ON c.at = b.at
LEFT JOIN ended AS e ON e.at = b.at
WINDOW later AS (ORDER BY b.at DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
ORDER BY b.at
""")  # noqa: S608

_HISTORY = in_schema("SELECT at, event, attempt, worker, detail FROM :schema.outbox_history(%s)")

_WORKERS = in_schema("""
SELECT id, host, pid, version, state, running, concurrency, topics, started_at, up, lease_left, present,
       ended_at, end_reason
FROM :schema.worker_status
ORDER BY ended_at IS NOT NULL, ended_at DESC, started_at, id
""")
_RUNNING_BY_WORKER = in_schema("""
SELECT r.id, r.topic, r.attempt, r.started_at, r.running_for, r.worker_id, r.cancelling, r.session_id, s.title
FROM :schema.worker_running AS r
LEFT JOIN :schema.session AS s ON s.id::text = r.session_id
ORDER BY r.started_at, r.id
LIMIT 500
""")


class Overview(NamedTuple):
    """The content of each page's header. `reason` says why work is not done, if it is not."""

    reason: str | None
    stuck: bool
    workers: int
    dead: int


class Turns(NamedTuple):
    session_id: UUID
    prompts: int
    last: str
    cost: float | None
    more: bool
    """Whether the cost is that of the newest prompts only."""


class TurnRow(NamedTuple):
    """The outbox row of a turn, and the reason if it waits."""

    id: int
    prompt_id: str | None
    state: str
    failures: int
    cancelling: bool
    reason: str | None
    detail: str | None


class Depth(NamedTuple):
    topic: str
    due: int
    delayed: int
    key: int
    running: int
    dead: int
    oldest: timedelta | None


class Row(NamedTuple):
    """`lasted` is the wait so far, the run time so far, or the whole run time, depending on the state."""

    id: int
    topic: str
    state: str
    attempt: int
    failures: int
    max_attempts: int
    session_id: str | None
    reason: str | None
    detail: str | None
    lasted: timedelta | None
    created_at: datetime
    finished_at: datetime | None


class Bin(NamedTuple):
    """One step of the charts. Waits are in seconds; None if no row was done."""

    at: datetime
    depth: int
    done: int
    dead: int
    cancelled: int
    wait_p50: float | None
    wait_p95: float | None


class Event(NamedTuple):
    at: datetime
    event: str
    attempt: int | None
    worker: str | None
    detail: str | None


class Running(NamedTuple):
    id: int
    topic: str
    attempt: int
    started_at: datetime
    running_for: timedelta
    worker_id: UUID
    cancelling: bool
    session_id: str | None
    title: str | None


class Worker(NamedTuple):
    id: UUID
    host: str
    pid: int
    version: str
    state: str
    running: int
    concurrency: int
    topics: list[str]
    started_at: datetime
    up: timedelta
    lease_left: timedelta | None
    present: bool
    ended_at: datetime | None
    end_reason: str | None


async def overview(database: Database, stuck_after: timedelta) -> Overview:
    row = await database.row(_OVERVIEW, (stuck_after,))
    assert row is not None
    return Overview(*row)


async def turns(database: Database, sessions: list[str]) -> dict[str, Turns]:
    """By session id."""
    ids = [UUID(session) for session in sessions]
    rows = await database.rows(_TURNS, (LARGEST_COST, RESULT_BYTES, ids, RESULT_BYTES))
    return {str(row[0]): Turns(*row) for row in rows}


async def turn_rows(database: Database, session: UUID, prompts: list[str]) -> dict[str | None, TurnRow]:
    """By prompt id. Pruned rows are missing."""
    found = (TurnRow(*row) for row in await database.rows(_SESSION_ROWS, (str(session), prompts)))
    return {row.prompt_id: row for row in found}


async def last_seq(database: Database, session: UUID) -> int:
    row = await database.row(_LAST_SEQ, (session,))
    return row[0] if row else 0


async def depth(database: Database) -> list[Depth]:
    return [Depth(*row) for row in await database.rows(_DEPTH)]


async def rows_of(database: Database, state: str, topic: str | None) -> list[Row]:
    """The first PAGE rows: the longest waiting, the longest running, or the last ended."""
    query = {"ready": _WAITING, "running": _RUNNING}.get(state, _ENDED)
    return [Row(*row) for row in await database.rows(query, {"state": state, "topic": topic})]


async def timeline(database: Database, step: timedelta, bins: int) -> list[Bin]:
    return [Bin(*row) for row in await database.rows(_TIMELINE, {"step": step, "bins": bins})]


async def history(database: Database, row_id: int) -> list[Event]:
    return [Event(*row) for row in await database.rows(_HISTORY, (row_id,))]


async def workers(database: Database) -> list[Worker]:
    return [Worker(*row) for row in await database.rows(_WORKERS)]


async def running(database: Database) -> list[Running]:
    return [Running(*row) for row in await database.rows(_RUNNING_BY_WORKER)]

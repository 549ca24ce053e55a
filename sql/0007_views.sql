-- What a person at psql looks at, and what metrics, readiness, `outwake status` and the dashboard read:
-- everybody sees the same, made by the same query.
--
--   outbox_depth     how many rows wait, run or are dead, by topic, and how old the oldest is
--   outbox_waiting   every row that waits or is dead, and why; what is stuck is what has waited long
--   worker_status    the workers: who is there, what they do, whose lease ran out
--   worker_running   who runs what since when
--   outbox_writer    transactions that write to outbox now, which a worker that falls asleep waits for
--   outbox_hourly    throughput, wait and run times by hour
--   outbox_history, session_history    what happened to one row, to one session
--   outbox_ready     one answer: is somebody there, and does nothing wait too long?
--
-- Ages are from statement_timestamp(), so that a long transaction at psql does not show the past.

-- "The history of one session" finds its rows, finished ones too.
CREATE INDEX outbox_of_session ON outbox ((payload ->> 'session_id'), id)
    WHERE topic IN ('session.run', 'sandbox.return', 'webhook.deliver');
CREATE INDEX session_holds_sandbox ON session (id) WHERE sandbox IS NOT NULL;


-- Where due rows begin: one row for each topic and priority that has claimable rows, found by a few
-- descents of outbox_claimable, however many rows wait.
-- Each is the first in the index's order, so that no entry is read twice: while somebody holds an old snapshot
-- there may be millions before it.
CREATE VIEW outbox_front AS
WITH RECURSIVE level AS (
    (
        SELECT o.topic, o.priority, o.id, o.available_at FROM outbox AS o
        WHERE o.state = 'ready' AND NOT o.blocked
        ORDER BY o.topic, o.priority DESC, o.available_at, o.id
        LIMIT 1
    )
    UNION ALL
    SELECT n.topic, n.priority, n.id, n.available_at
    FROM level AS v
    CROSS JOIN LATERAL (
        -- The next priority of this topic, else the next topic: the first that has a row.
        (
            SELECT o.topic, o.priority, o.id, o.available_at FROM outbox AS o
            WHERE o.state = 'ready' AND NOT o.blocked AND o.topic = v.topic AND o.priority < v.priority
            ORDER BY o.priority DESC, o.available_at, o.id
            LIMIT 1
        )
        UNION ALL
        (
            SELECT o.topic, o.priority, o.id, o.available_at FROM outbox AS o
            WHERE o.state = 'ready' AND NOT o.blocked AND o.topic > v.topic
            ORDER BY o.topic, o.priority DESC, o.available_at, o.id
            LIMIT 1
        )
        LIMIT 1
    ) AS n
)
SELECT v.topic, v.priority, v.id, v.available_at FROM level AS v;
COMMENT ON VIEW outbox_front IS
    'The claimable row that is or falls due first, for each topic and priority; cheap however many wait.';
COMMENT ON COLUMN outbox_front.topic IS 'Topic.';
COMMENT ON COLUMN outbox_front.priority IS 'Priority.';
COMMENT ON COLUMN outbox_front.id IS 'outbox.id of the first row.';
COMMENT ON COLUMN outbox_front.available_at IS 'Since when it is due, or when it will be.';


-- Each part reads one partial index; done and cancelled rows are in none of them.
CREATE VIEW outbox_depth AS
SELECT d.topic, d.state,
       CASE WHEN d.wait = 'due' AND t.max_running = 0 THEN 'paused' ELSE d.wait END AS wait,
       d.rows, greatest(statement_timestamp() - d.since, interval '0') AS oldest
FROM (
    SELECT o.topic, 'ready' AS state,
           CASE WHEN o.available_at <= statement_timestamp() THEN 'due' ELSE 'delayed' END AS wait,
           count(*) AS rows,
           min(o.available_at) AS since
    FROM outbox AS o
    WHERE o.state = 'ready' AND NOT o.blocked
    GROUP BY 1, 3
    UNION ALL
    SELECT o.topic, 'ready', 'key', count(*), min(o.available_at)
    FROM outbox AS o
    WHERE o.state = 'ready' AND o.blocked AND o.ordering_key IS NOT NULL
    GROUP BY 1
    UNION ALL
    SELECT o.topic, 'running', '', count(*), min(o.started_at)
    FROM outbox AS o
    WHERE o.state = 'running'
    GROUP BY 1
    UNION ALL
    SELECT o.topic, 'dead', '', count(*), min(o.finished_at)
    FROM outbox AS o
    WHERE o.state = 'dead'
    GROUP BY 1
) AS d
LEFT JOIN topic AS t ON t.name = d.topic;
COMMENT ON VIEW outbox_depth IS
    'How many rows wait, run or are dead, by topic, and for how long the oldest. Does not read finished rows.';
COMMENT ON COLUMN outbox_depth.topic IS 'Topic.';
COMMENT ON COLUMN outbox_depth.state IS 'ready, running or dead; done and cancelled rows are counted by outbox_hourly.';
COMMENT ON COLUMN outbox_depth.wait IS
    'What a ready row waits for: due (a worker), delayed (its available_at), key (an earlier row of its ordering_key), paused (its topic is).';
COMMENT ON COLUMN outbox_depth.rows IS 'How many.';
COMMENT ON COLUMN outbox_depth.oldest IS
    'How long the oldest has been due, has run or has been dead; 0 if all are delayed.';


CREATE VIEW worker_status AS
SELECT
    w.id, w.host, w.pid, w.version,
    CASE
        WHEN w.ended_at IS NOT NULL THEN 'ended'
        WHEN p.id IS NULL AND w.lease_until < statement_timestamp() AND r.rows > 0 THEN 'lost'
        WHEN p.id IS NULL THEN 'absent'
        WHEN w.lease_until < statement_timestamp() AND r.rows > 0 THEN 'late'
        WHEN w.draining THEN 'draining'
        WHEN r.rows >= w.concurrency THEN 'busy'
        WHEN w.parked THEN 'parked'
        ELSE 'awake'
    END AS state,
    r.rows AS running, w.concurrency, w.topics, w.started_at,
    statement_timestamp() - w.started_at AS up,
    w.lease_until - statement_timestamp() AS lease_left,
    p.id IS NOT NULL AS present,
    w.ended_at, w.end_reason
FROM worker AS w
LEFT JOIN worker_present AS p ON p.id = w.id
CROSS JOIN LATERAL (
    SELECT count(*) AS rows FROM outbox AS o WHERE o.worker_id = w.id AND o.state = 'running'
) AS r
WHERE w.ended_at IS NULL OR w.ended_at > statement_timestamp() - interval '1 hour';
COMMENT ON VIEW worker_status IS
    'The workers that are there, those that should be, and those that ended within the last hour.';
COMMENT ON COLUMN worker_status.id IS 'worker.id, as in outbox.worker_id.';
COMMENT ON COLUMN worker_status.host IS 'Its host name.';
COMMENT ON COLUMN worker_status.pid IS 'Its process id there.';
COMMENT ON COLUMN worker_status.version IS 'Its version of Outwake.';
COMMENT ON COLUMN worker_status.state IS
    'parked (sleeps, has free slots), awake (looks for rows), busy (no free slot), draining; late (there, but its lease ran out), absent (connection gone: it reconnects or is dead), lost (absent and its lease ran out: to be rescued), ended.';
COMMENT ON COLUMN worker_status.running IS 'Rows it runs now.';
COMMENT ON COLUMN worker_status.concurrency IS 'Rows it runs at most.';
COMMENT ON COLUMN worker_status.topics IS 'The topics it serves.';
COMMENT ON COLUMN worker_status.started_at IS 'When this life of it began.';
COMMENT ON COLUMN worker_status.up IS 'How long ago that was.';
COMMENT ON COLUMN worker_status.lease_left IS
    'For how long its rows are its own; negative: the lease ran out. Kept only while it runs something.';
COMMENT ON COLUMN worker_status.present IS 'Whether its LISTEN connection is open (view worker_present).';
COMMENT ON COLUMN worker_status.ended_at IS 'When it left or was ended.';
COMMENT ON COLUMN worker_status.end_reason IS 'Why, if it did not leave by itself.';


CREATE VIEW worker_running AS
SELECT
    o.id, o.topic, o.attempt, o.started_at, statement_timestamp() - o.started_at AS running_for,
    o.worker_id, w.host, w.pid, w.lease_until - statement_timestamp() AS lease_left,
    o.cancel_requested_at IS NOT NULL AS cancelling,
    o.ordering_key, o.payload ->> 'session_id' AS session_id
FROM outbox AS o
LEFT JOIN worker AS w ON w.id = o.worker_id
WHERE o.state = 'running';
COMMENT ON VIEW worker_running IS 'Who runs what since when: one row for each running row of outbox.';
COMMENT ON COLUMN worker_running.id IS 'outbox.id.';
COMMENT ON COLUMN worker_running.topic IS 'Topic.';
COMMENT ON COLUMN worker_running.attempt IS 'Which attempt.';
COMMENT ON COLUMN worker_running.started_at IS 'When it was claimed.';
COMMENT ON COLUMN worker_running.running_for IS 'How long ago that was.';
COMMENT ON COLUMN worker_running.worker_id IS 'Who runs it.';
COMMENT ON COLUMN worker_running.host IS 'On which host; null: no such worker.';
COMMENT ON COLUMN worker_running.pid IS 'In which process.';
COMMENT ON COLUMN worker_running.lease_left IS 'When negative, a rescue is due.';
COMMENT ON COLUMN worker_running.cancelling IS 'Whether a cancel was requested that its worker has yet to carry out.';
COMMENT ON COLUMN worker_running.ordering_key IS 'Its ordering_key.';
COMMENT ON COLUMN worker_running.session_id IS 'The session it works on, if any.';


-- Why each row waits. The first reason that holds is shown; whoever removes it may see the next.
CREATE VIEW outbox_waiting AS
WITH staff AS MATERIALIZED (SELECT * FROM worker_status),
crew AS MATERIALIZED (
    SELECT t.topic,
           count(*) AS workers,
           count(*) FILTER (WHERE s.state = 'draining') AS draining,
           sum(s.concurrency) AS slots,
           sum(s.running) AS running,
           bool_or(s.state = 'parked') AS parked
    FROM staff AS s
    CROSS JOIN LATERAL unnest(s.topics) AS t (topic)
    WHERE s.present AND s.ended_at IS NULL
    GROUP BY t.topic
),
limits AS MATERIALIZED (
    SELECT t.name, t.max_running,
           (SELECT count(*) FROM outbox AS o
            WHERE o.topic = t.name AND o.state = 'running' AND o.limited) AS running
    FROM topic AS t
    WHERE t.max_running IS NOT NULL
),
-- Transactions that have been open for a while and have changed something: one of them may hold a row's
-- lock. A claim under way does too, but not for long. (Of others' sessions, a role may not see since when.)
open_transaction AS MATERIALIZED (
    SELECT l.transactionid, l.pid
    FROM pg_locks AS l
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE coalesce(a.xact_start < statement_timestamp() - interval '1 second', true)
      AND l.locktype = 'transactionid' AND l.granted AND l.mode = 'ExclusiveLock'
      AND l.pid IS DISTINCT FROM pg_backend_pid()
),
row AS (
    SELECT o.*, o.xmax AS locker FROM outbox AS o WHERE o.state = 'ready' AND NOT o.blocked
    UNION ALL
    SELECT o.*, o.xmax FROM outbox AS o
    WHERE o.state = 'ready' AND o.blocked AND o.ordering_key IS NOT NULL
    UNION ALL
    SELECT o.*, o.xmax FROM outbox AS o WHERE o.state = 'running'
    UNION ALL
    SELECT o.*, o.xmax FROM outbox AS o WHERE o.state = 'dead'
)
SELECT
    r.id, r.topic, r.state, y.reason,
    greatest(statement_timestamp() - y.since, interval '0') AS waited,
    CASE y.reason
        WHEN 'dead' THEN format('failures: %s; outbox_retry(%s) or outbox_discard(%s)', r.failures, r.id, r.id)
        WHEN 'cancelling' THEN format('worker %s has yet to stop it', r.worker_id)
        WHEN 'worker lost' THEN format('worker %s is gone and no other has rescued its rows', r.worker_id)
        WHEN 'key' THEN format('row %s of key %s comes first, it is %s', k.id, r.ordering_key, k.state)
        WHEN 'retry' THEN format('failures: %s of %s, next try at %s', r.failures, r.max_attempts,
                                 to_char(r.available_at, 'YYYY-MM-DD HH24:MI:SSOF'))
        WHEN 'scheduled' THEN format('available_at is %s', to_char(r.available_at, 'YYYY-MM-DD HH24:MI:SSOF'))
        WHEN 'topic paused' THEN 'max_running is 0 in table topic'
        WHEN 'topic limit' THEN format('%s of %s rows of the topic run', l.running, l.max_running)
        WHEN 'no worker' THEN 'no worker that is present serves the topic: start one'
        WHEN 'workers draining' THEN format('all %s workers of the topic shut down', c.workers)
        WHEN 'locked' THEN format('transaction of pid %s holds its lock (pg_stat_activity)', x.pid)
        WHEN 'workers busy' THEN format('%s workers run %s rows in %s slots', c.workers, c.running, c.slots)
        WHEN 'unnoticed' THEN 'a worker sleeps and was not told: SELECT outbox_wake()'
        ELSE 'a worker is about to claim it'
    END AS detail,
    CASE WHEN y.reason = 'key' THEN k.id END AS waits_for,
    CASE WHEN r.state = 'ready' AND r.available_at > statement_timestamp() THEN r.available_at END AS due_at,
    r.failures, r.max_attempts,
    r.errors -> -1 ->> 'error' AS last_error,
    r.ordering_key, r.payload ->> 'session_id' AS session_id, r.created_at
FROM row AS r
LEFT JOIN crew AS c ON c.topic = r.topic
LEFT JOIN limits AS l ON l.name = r.topic
LEFT JOIN staff AS w ON w.id = r.worker_id AND r.state = 'running'
LEFT JOIN open_transaction AS x ON x.transactionid = r.locker AND r.state = 'ready'
LEFT JOIN LATERAL (
    SELECT o.id, o.state FROM outbox AS o
    WHERE r.state = 'ready' AND o.ordering_key = r.ordering_key AND o.state IN ('ready', 'running')
      AND o.id <> r.id AND (o.state = 'running' OR o.id < r.id)
    ORDER BY o.state DESC, o.id
    LIMIT 1
) AS k ON true
CROSS JOIN LATERAL (
    SELECT
        CASE r.state WHEN 'dead' THEN r.finished_at
                     -- since it was asked to stop, or its worker's lease ran out
                     WHEN 'running' THEN coalesce(
                         statement_timestamp() + CASE WHEN w.state = 'lost' THEN w.lease_left END,
                         r.cancel_requested_at, r.started_at)
                     ELSE r.available_at END AS since,
        CASE
            WHEN r.state = 'dead' THEN 'dead'
            WHEN r.state = 'running' AND w.id IS NULL OR w.state IN ('lost', 'ended') THEN 'worker lost'
            WHEN r.state = 'running' AND r.cancel_requested_at IS NOT NULL THEN 'cancelling'
            WHEN r.state = 'running' THEN NULL
            WHEN r.available_at > statement_timestamp() THEN
                CASE WHEN r.failures > 0 THEN 'retry' ELSE 'scheduled' END
            WHEN k.id IS NOT NULL THEN 'key'
            WHEN l.max_running = 0 THEN 'topic paused'
            WHEN l.running >= l.max_running THEN 'topic limit'
            WHEN c.workers IS NULL THEN 'no worker'
            WHEN c.workers = c.draining THEN 'workers draining'
            WHEN x.pid IS NOT NULL THEN 'locked'
            WHEN c.running >= c.slots THEN 'workers busy'
            WHEN c.parked AND r.available_at < statement_timestamp() - interval '5 seconds' THEN 'unnoticed'
            ELSE 'due'
        END AS reason
) AS y
WHERE y.reason IS NOT NULL;
COMMENT ON VIEW outbox_waiting IS
    'Every row that waits for something or is dead, and why. Stuck is what has waited long: WHERE waited > ''1 minute'' ORDER BY waited DESC.';
COMMENT ON COLUMN outbox_waiting.id IS 'outbox.id.';
COMMENT ON COLUMN outbox_waiting.topic IS 'Topic.';
COMMENT ON COLUMN outbox_waiting.state IS 'outbox.state.';
COMMENT ON COLUMN outbox_waiting.reason IS
    'dead; worker lost, cancelling (of a running row); scheduled, retry (not due yet); key; topic paused, topic limit; no worker, workers draining, locked, workers busy, unnoticed; due (nothing is wrong).';
COMMENT ON COLUMN outbox_waiting.waited IS 'Since it fell due, died, was asked to stop, or its worker''s lease ran out; 0 when it is not due yet.';
COMMENT ON COLUMN outbox_waiting.detail IS 'The reason in words, and what to do.';
COMMENT ON COLUMN outbox_waiting.waits_for IS 'The row of its ordering_key that comes first.';
COMMENT ON COLUMN outbox_waiting.due_at IS 'When it falls due, if it has not yet.';
COMMENT ON COLUMN outbox_waiting.failures IS 'Failures that count against max_attempts.';
COMMENT ON COLUMN outbox_waiting.max_attempts IS 'It is dead after so many.';
COMMENT ON COLUMN outbox_waiting.last_error IS 'The error of its last attempt that failed.';
COMMENT ON COLUMN outbox_waiting.ordering_key IS 'Its ordering_key.';
COMMENT ON COLUMN outbox_waiting.session_id IS 'The session it belongs to, if any.';
COMMENT ON COLUMN outbox_waiting.created_at IS 'When it was inserted.';


CREATE VIEW outbox_writer AS
SELECT
    a.pid, l.virtualtransaction, a.usename AS role, a.application_name AS application, a.state,
    a.xact_start AS since, statement_timestamp() - a.xact_start AS open_for, left(a.query, 200) AS query
FROM (
    SELECT DISTINCT pid, virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock'
      AND database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND relation = 'public.outbox'::regclass
      AND pid IS DISTINCT FROM pg_backend_pid()
) AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid;
COMMENT ON VIEW outbox_writer IS
    'Transactions that may have written to outbox and are still open. Until those that were open when it wanted to sleep have ended, a worker looks again each second at most, instead of sleeping.';
COMMENT ON COLUMN outbox_writer.pid IS 'Whose; null: a prepared transaction (pg_prepared_xacts).';
COMMENT ON COLUMN outbox_writer.virtualtransaction IS 'As in pg_locks.';
COMMENT ON COLUMN outbox_writer.role IS 'Its role.';
COMMENT ON COLUMN outbox_writer.application IS 'Its application_name.';
COMMENT ON COLUMN outbox_writer.state IS 'As in pg_stat_activity: beware of "idle in transaction".';
COMMENT ON COLUMN outbox_writer.since IS 'When the transaction began.';
COMMENT ON COLUMN outbox_writer.open_for IS 'How long ago that was.';
COMMENT ON COLUMN outbox_writer.query IS 'What it does, or did last. Seen by the same role, superusers and pg_read_all_stats.';


-- There is no index by time, which every finished row would pay for. Ids are nearly in the order of time,
-- so the newest rows by id are read, a bounded number of them.
CREATE FUNCTION outbox_throughput(span interval DEFAULT '24 hours', newest bigint DEFAULT 200000)
RETURNS TABLE (
    hour timestamptz, topic text, done bigint, dead bigint, cancelled bigint,
    wait_p50 interval, wait_p95 interval, wait_p99 interval,
    run_p50 interval, run_p95 interval, run_p99 interval
)
LANGUAGE sql STABLE
AS $$
    SELECT t.hour, t.topic, t.done, t.dead, t.cancelled,
           t.wait[1], t.wait[2], t.wait[3], t.run[1], t.run[2], t.run[3]
    FROM (
        SELECT
            date_trunc('hour', o.finished_at) AS hour,
            o.topic,
            count(*) FILTER (WHERE o.state = 'done') AS done,
            count(*) FILTER (WHERE o.state = 'dead') AS dead,
            count(*) FILTER (WHERE o.state = 'cancelled') AS cancelled,
            percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (
                ORDER BY o.started_at - o.available_at
            ) FILTER (WHERE o.state = 'done') AS wait,
            percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (
                ORDER BY o.finished_at - o.started_at
            ) FILTER (WHERE o.state = 'done') AS run
        FROM outbox AS o
        WHERE o.id > (SELECT max(id) FROM outbox) - newest
          AND o.finished_at > statement_timestamp() - span
        GROUP BY 1, 2
    ) AS t
    ORDER BY 1 DESC, 2
$$;
COMMENT ON FUNCTION outbox_throughput(interval, bigint) IS
    'What finished within span, by hour and topic, among the newest rows by id: how many, and the 50th, 95th and 99th percentile of how long done rows waited after they fell due, and ran, in their last attempt.';

CREATE VIEW outbox_hourly AS SELECT * FROM outbox_throughput();
COMMENT ON VIEW outbox_hourly IS
    'Throughput, wait and run times by hour and topic, for a day, among the newest 200,000 rows; outbox_throughput(span, newest) looks further.';
COMMENT ON COLUMN outbox_hourly.hour IS 'The hour in which the rows finished.';
COMMENT ON COLUMN outbox_hourly.topic IS 'Topic.';
COMMENT ON COLUMN outbox_hourly.done IS 'Rows done.';
COMMENT ON COLUMN outbox_hourly.dead IS 'Rows that died and are dead still.';
COMMENT ON COLUMN outbox_hourly.cancelled IS 'Rows cancelled or discarded.';
COMMENT ON COLUMN outbox_hourly.wait_p50 IS 'Half of the done rows started within this after they fell due.';
COMMENT ON COLUMN outbox_hourly.wait_p95 IS 'The same for 95 of 100.';
COMMENT ON COLUMN outbox_hourly.wait_p99 IS 'The same for 99 of 100.';
COMMENT ON COLUMN outbox_hourly.run_p50 IS 'Half of the last attempts of done rows took no longer.';
COMMENT ON COLUMN outbox_hourly.run_p95 IS 'The same for 95 of 100.';
COMMENT ON COLUMN outbox_hourly.run_p99 IS 'The same for 99 of 100.';


CREATE FUNCTION outbox_history(row_id bigint)
RETURNS TABLE (at timestamptz, event text, attempt integer, worker text, detail text)
LANGUAGE sql STABLE
AS $$
    SELECT h.at, h.event, h.attempt,
           coalesce(w.host || ':' || w.pid, h.worker_id::text) AS worker, h.detail
    FROM outbox AS o
    CROSS JOIN LATERAL (
        SELECT o.created_at, 1, 'created', NULL::integer, NULL::uuid,
               concat_ws(', ', o.topic, 'key ' || o.ordering_key, 'unique_key ' || o.unique_key)
        UNION ALL
        SELECT (e ->> 'at')::timestamptz, 3, 'failed', (e ->> 'attempt')::integer,
               (e ->> 'worker_id')::uuid, e ->> 'error'
        FROM jsonb_array_elements(o.errors) AS e
        UNION ALL
        SELECT o.started_at, 2, 'started', o.attempt, o.worker_id, NULL
        WHERE o.started_at IS NOT NULL
        UNION ALL
        SELECT o.cancel_requested_at, 4, 'cancel requested', NULL, NULL, NULL
        WHERE o.cancel_requested_at IS NOT NULL
        UNION ALL
        SELECT o.finished_at, 5, o.state, o.attempt, NULL,
               format('attempts: %s, failures: %s of %s', o.attempt, o.failures, o.max_attempts)
        WHERE o.finished_at IS NOT NULL
        UNION ALL
        SELECT statement_timestamp(), 6, 'now ' || q.state, NULL, NULL, q.reason || ': ' || q.detail
        FROM outbox_waiting AS q WHERE q.id = row_id AND o.finished_at IS NULL
        UNION ALL
        SELECT statement_timestamp(), 6, 'now running', o.attempt, o.worker_id,
               format('for %s', date_trunc('second', statement_timestamp() - o.started_at))
        WHERE o.state = 'running'
    ) AS h (at, place, event, attempt, worker_id, detail)
    LEFT JOIN worker AS w ON w.id = h.worker_id
    WHERE o.id = row_id
    ORDER BY h.at, h.place
$$;
COMMENT ON FUNCTION outbox_history(bigint) IS
    'What happened to a row, in order: every attempt that failed with its error, the last start, the end, or why it waits now.';


CREATE FUNCTION session_history(of_session uuid)
RETURNS TABLE (at timestamptz, event text, outbox_id bigint, attempt integer, worker text, detail text)
LANGUAGE sql STABLE
AS $$
    SELECT h.at, h.event, h.outbox_id, h.attempt, h.worker, h.detail
    FROM (
        SELECT s.created_at, 0, 'session created', NULL::bigint, NULL::integer, NULL::text,
               format('%s, branch %s: %s', s.repo, s.branch, s.title)
        FROM session AS s WHERE s.id = of_session
        UNION ALL
        SELECT s.deleted_at, 9, 'session archived', NULL, NULL, NULL, NULL
        FROM session AS s WHERE s.id = of_session AND s.deleted_at IS NOT NULL
        UNION ALL
        SELECT statement_timestamp(), 9, 'now', NULL, NULL, NULL,
               format('inbox_status %s, %s', s.inbox_status,
                      CASE WHEN s.sandbox IS NULL THEN 'no sandbox held' ELSE 'sandbox held' END)
        FROM session AS s WHERE s.id = of_session
        UNION ALL
        SELECT p.created_at, 1, 'prompt queued', NULL, NULL, NULL, left(p.text, 80)
        FROM prompt AS p WHERE p.session_id = of_session
        UNION ALL
        SELECT p.finished_at, 8, 'prompt ' || p.status, NULL, NULL, NULL, p.reason
        FROM prompt AS p WHERE p.session_id = of_session AND p.finished_at IS NOT NULL
        UNION ALL
        SELECT max(m.created_at), 5, 'messages', NULL, m.attempt, NULL,
               format('messages: %s, seq %s to %s', count(*), min(m.seq), max(m.seq))
        FROM message AS m WHERE m.session_id = of_session
        GROUP BY m.prompt_id, m.attempt
        UNION ALL
        SELECT r.at, 2 + r.place, o.topic || ' ' || r.event, o.id, r.attempt, r.worker, r.detail
        FROM outbox AS o
        CROSS JOIN LATERAL outbox_history(o.id)
            WITH ORDINALITY AS r (at, event, attempt, worker, detail, place)
        WHERE o.payload ->> 'session_id' = of_session::text
          AND o.topic IN ('session.run', 'sandbox.return', 'webhook.deliver')
    ) AS h (at, place, event, outbox_id, attempt, worker, detail)
    ORDER BY h.at, h.outbox_id NULLS FIRST, h.place
$$;
COMMENT ON FUNCTION session_history(uuid) IS
    'What happened to a session, in order: its prompts, its rows of outbox with every attempt, how many messages each attempt wrote, and what it waits for now.';


-- Readiness: somebody is there, and nothing waits too long. A paused topic waits because it was told to.
CREATE FUNCTION outbox_ready(
    longest_wait interval DEFAULT '1 minute',
    OUT ready boolean, OUT stuck boolean, OUT workers integer, OUT oldest_due interval,
    OUT topic text, OUT reason text
)
LANGUAGE sql STABLE
SET jit = off SET enable_seqscan = off
AS $$
    SELECT
        p.workers > 0 AND coalesce(p.since_limit <= f.since, true),
        coalesce(f.since < p.since_limit, false),
        p.workers,
        greatest(statement_timestamp() - f.since, interval '0'),
        f.topic,
        CASE
            WHEN p.workers = 0 AND coalesce(p.since_limit <= f.since, true) THEN 'no worker is present'
            WHEN f.since < p.since_limit THEN format(
                'row %s of topic %s has been due for %s: %s', f.id, f.topic,
                date_trunc('second', statement_timestamp() - f.since),
                (SELECT q.reason FROM outbox_waiting AS q WHERE q.id = f.id))
        END
    FROM (
        SELECT (SELECT count(*)::integer FROM worker_present AS w WHERE NOT w.draining) AS workers,
               statement_timestamp() - longest_wait AS since_limit
    ) AS p
    LEFT JOIN (
        SELECT o.topic, o.id, o.available_at AS since
        FROM outbox_front AS o
        LEFT JOIN topic AS t ON t.name = o.topic
        WHERE o.available_at <= statement_timestamp() AND t.max_running IS DISTINCT FROM 0
        ORDER BY o.available_at
        LIMIT 1
    ) AS f ON true
$$;
COMMENT ON FUNCTION outbox_ready(interval) IS
    'Whether a worker is present and no row has been due for longer than longest_wait; if not, why. Cheap however many rows wait.';


-- Rows that have waited too long raise an alert without anybody's Prometheus (outwake/stuck.py). Whichever
-- process looks first reports a topic, the others keep silent for repeat.
CREATE TABLE outbox_alert (
    topic    text PRIMARY KEY,
    since    timestamptz NOT NULL,
    reported timestamptz NOT NULL
);
COMMENT ON TABLE outbox_alert IS 'Topics whose oldest due row waits too long, and when that was reported last.';
COMMENT ON COLUMN outbox_alert.topic IS 'Topic.';
COMMENT ON COLUMN outbox_alert.since IS 'Since when its oldest row has been due.';
COMMENT ON COLUMN outbox_alert.reported IS 'When the last alert was given, by a log line and OUTWAKE_STUCK_WEBHOOK.';

CREATE FUNCTION outbox_stuck(stuck_after interval)
RETURNS TABLE (topic text, id bigint, since timestamptz, reason text, detail text)
LANGUAGE sql STABLE
SET jit = off SET enable_seqscan = off
AS $$
    SELECT DISTINCT ON (s.topic) s.topic, s.id, s.since, q.reason, q.detail
    FROM (
        SELECT f.topic, f.id, f.available_at AS since
        FROM outbox_front AS f
        LEFT JOIN topic AS t ON t.name = f.topic
        WHERE f.available_at < statement_timestamp() - stuck_after AND t.max_running IS DISTINCT FROM 0
        UNION ALL
        -- A dead worker's rows, which nobody is there to rescue.
        SELECT o.topic, o.id, w.lease_until
        FROM outbox AS o
        JOIN worker AS w ON w.id = o.worker_id
        WHERE o.state = 'running' AND w.lease_until < statement_timestamp() - stuck_after
    ) AS s
    LEFT JOIN outbox_waiting AS q ON q.id = s.id
    ORDER BY s.topic, s.since, s.id
$$;
COMMENT ON FUNCTION outbox_stuck(interval) IS
    'For each topic the row that has been due longest, if longer than stuck_after, and why. Rows that wait for their key or in a paused topic are not stuck.';

CREATE FUNCTION outbox_stuck_report(stuck_after interval, repeat interval)
RETURNS TABLE (stuck boolean, topic text, id bigint, waited interval, reason text, detail text)
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH found AS MATERIALIZED (SELECT * FROM outbox_stuck(stuck_after)),
    reported AS (
        INSERT INTO outbox_alert AS a (topic, since, reported)
        SELECT f.topic, f.since, clock_timestamp() FROM found AS f
        ON CONFLICT (topic) DO UPDATE SET since = excluded.since, reported = excluded.reported
        WHERE a.reported < clock_timestamp() - repeat
        RETURNING a.topic
    )
    SELECT true, f.topic, f.id, clock_timestamp() - f.since, f.reason, f.detail
    FROM found AS f JOIN reported AS r ON r.topic = f.topic;

    RETURN QUERY
    DELETE FROM outbox_alert AS a
    WHERE NOT EXISTS (SELECT FROM outbox_stuck(stuck_after) AS f WHERE f.topic = a.topic)
    RETURNING false, a.topic, NULL::bigint, clock_timestamp() - a.since, NULL::text, NULL::text;
END
$$;
COMMENT ON FUNCTION outbox_stuck_report(interval, interval) IS
    'What is to be reported now: topics that are stuck and were not reported within repeat, and those that no longer are (stuck is false). Each is returned to one caller only.';

CREATE FUNCTION outbox_stuck_deadline(stuck_after interval) RETURNS interval
LANGUAGE sql STABLE
SET jit = off SET enable_seqscan = off
AS $$
    SELECT min(d.since) + stuck_after - statement_timestamp()
    FROM (
        SELECT f.available_at AS since
        FROM outbox_front AS f
        LEFT JOIN topic AS t ON t.name = f.topic
        WHERE t.max_running IS DISTINCT FROM 0
        UNION ALL
        SELECT w.lease_until FROM worker AS w
        WHERE w.ended_at IS NULL AND w.lease_until IS NOT NULL
          AND EXISTS (SELECT FROM outbox AS o WHERE o.worker_id = w.id AND o.state = 'running')
        UNION ALL
        -- Reported ones: to say when they no longer are.
        SELECT a.since FROM outbox_alert AS a
    ) AS d
$$;
COMMENT ON FUNCTION outbox_stuck_deadline(interval) IS
    'When outbox_stuck_report has something to say at the earliest, as an interval from now; null: nothing is under way.';


-- Two roles: outwake_reader reads (what of it, row-level security says: 0009_access.sql); outwake_operator
-- sees all, and may retry, discard and cancel. What a person may do runs with the owner's rights, so that the
-- operator needs no right to write, and only those who were granted it may call it.
ALTER FUNCTION outbox_cancel(bigint) SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp;
ALTER FUNCTION outbox_retry(bigint) SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp;
ALTER FUNCTION outbox_discard(bigint) SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp;
REVOKE EXECUTE ON FUNCTION outbox_cancel(bigint), outbox_retry(bigint), outbox_discard(bigint) FROM PUBLIC;

-- Silent where the role, or what a later migration makes, is not there yet.
CREATE FUNCTION outwake_grant_to(grantee text, rights text, object text) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = grantee)
        AND (object LIKE 'FUNCTION %' OR to_regclass(object) IS NOT NULL)
    THEN
        EXECUTE format('GRANT %s ON %s TO %I', rights, object, grantee);
    END IF;
END
$$;
COMMENT ON FUNCTION outwake_grant_to(text, text, text) IS 'One grant of outwake_grant.';

CREATE FUNCTION outwake_grant() RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['outwake_reader', 'outwake_operator'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                -- Roles belong to the cluster: another database's migration may have been first.
                WHEN duplicate_object OR unique_violation THEN NULL;
                WHEN insufficient_privilege THEN
                    RAISE NOTICE 'role % is not there and may not be created: create it, then SELECT outwake_grant()',
                        wanted;
            END;
        END IF;
    END LOOP;
    FOREACH wanted IN ARRAY ARRAY[
        'session', 'prompt', 'message', 'outbox', 'worker', 'topic', 'watcher', 'idempotency',
        'outbox_alert', 'schema_migration', 'worker_present', 'outbox_front', 'outbox_depth',
        'outbox_waiting', 'outbox_writer', 'outbox_hourly', 'worker_status', 'worker_running'
    ] LOOP
        PERFORM outwake_grant_to('outwake_reader', 'SELECT', wanted);
        PERFORM outwake_grant_to('outwake_operator', 'SELECT', wanted);
    END LOOP;
    PERFORM outwake_grant_to('outwake_operator', 'SELECT', 'sandbox_suspect');
    -- Who has looked whether it leaked deletes the row.
    PERFORM outwake_grant_to('outwake_operator', 'SELECT, DELETE', 'sandbox_borrow');
    PERFORM outwake_grant_to('outwake_operator', 'INSERT, UPDATE, DELETE', 'topic');
    FOREACH wanted IN ARRAY ARRAY['outbox_cancel', 'outbox_retry', 'outbox_discard'] LOOP
        PERFORM outwake_grant_to('outwake_operator', 'EXECUTE', format('FUNCTION %s(bigint)', wanted));
    END LOOP;
END
$$;
COMMENT ON FUNCTION outwake_grant() IS
    'Creates the roles outwake_reader and outwake_operator if the caller may, and grants them what they may do. May be repeated.';

SELECT outwake_grant();

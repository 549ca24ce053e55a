-- The views that metrics, readiness, `outwake status`, the dashboard and a person at psql read. All of them see the same,
-- because one query makes it.
--
--   worker_present   the workers that are alive
--   outbox_depth     how many rows wait, run or are dead, by topic, and how old the oldest is
--   outbox_waiting   every row that waits or is dead, and why; a row that has waited long is stuck
--   worker_status    the workers: which are there, what each does, whose lease ran out
--   worker_running   which worker runs which row, and since when
--   outbox_writer    transactions that write to outbox now; a worker that falls asleep waits for them
--   outbox_hourly, outbox_history, outbox_ready    in the files history and ready
--
-- Ages are from statement_timestamp(), so that a long transaction at psql does not show the past.


CREATE OR REPLACE VIEW worker_present WITH (security_invoker = true) AS
SELECT
    w.id, w.parked, w.host, w.pid, w.version, w.topics, w.concurrency, w.started_at, w.presence, w.draining,
    w.lease_until, w.ended_at, w.end_reason
FROM worker AS w
WHERE w.ended_at IS NULL
  AND EXISTS (
      SELECT FROM pg_locks AS l
      WHERE l.locktype = 'advisory'
        -- pg_locks shows the whole cluster; presence counts in this database only.
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
        AND l.classid = :lock_presence AND l.objid = w.presence::bigint::oid AND l.objsubid = 2
        AND l.granted
        -- Any role may take an advisory lock; a worker's may write here.
        AND EXISTS (
            SELECT FROM pg_stat_activity AS a
            WHERE a.pid = l.pid AND (
                has_table_privilege(a.usesysid, ':schema.worker', 'UPDATE')
                OR pg_has_role(a.usesysid, to_regrole(':schema_worker')::oid, 'MEMBER')
            )
        )
  );
COMMENT ON VIEW worker_present IS 'The workers that are alive: their LISTEN connection holds their presence lock.';


-- The first claimable row of each lane (one topic and one priority). Each costs one descent of outbox_claimable, however
-- many rows wait. It is the first in the order of the index, so no entry is read twice. While somebody holds an old
-- snapshot, there may be millions of entries before it.
CREATE OR REPLACE VIEW outbox_front WITH (security_invoker = true) AS
WITH RECURSIVE lane AS (
    (
        SELECT o.topic, o.priority, o.id, o.available_at FROM outbox AS o
        WHERE o.state = 'ready' AND NOT o.blocked
        ORDER BY o.topic, o.priority DESC, o.available_at, o.id
        LIMIT 1
    )
    UNION ALL
    SELECT n.topic, n.priority, n.id, n.available_at
    FROM lane AS v
    CROSS JOIN LATERAL (
        -- The next lane that has a row: a lower priority of this topic, or else the next topic.
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
SELECT v.topic, v.priority, v.id, v.available_at FROM lane AS v;
COMMENT ON VIEW outbox_front IS
    'The claimable row that is or falls due first, for each topic and priority. Its cost does not grow with the rows that wait.';
COMMENT ON COLUMN outbox_front.topic IS 'Topic.';
COMMENT ON COLUMN outbox_front.priority IS 'Priority.';
COMMENT ON COLUMN outbox_front.id IS 'outbox.id of the first row.';
COMMENT ON COLUMN outbox_front.available_at IS 'Since when it is due, or when it will be.';


-- Each part reads one partial index. Done and cancelled rows are in none of them.
CREATE OR REPLACE VIEW outbox_depth WITH (security_invoker = true) AS
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


CREATE OR REPLACE VIEW worker_status WITH (security_invoker = true) AS
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
    CASE WHEN r.rows > 0 THEN w.lease_until - statement_timestamp() END AS lease_left,
    p.id IS NOT NULL AS present,
    w.ended_at, w.end_reason
FROM worker AS w
LEFT JOIN worker_present AS p ON p.id = w.id
CROSS JOIN LATERAL (
    SELECT count(*) AS rows FROM outbox AS o WHERE o.worker_id = w.id AND o.state = 'running'
) AS r
WHERE w.ended_at IS NULL OR w.ended_at > statement_timestamp() - interval '1 hour';
COMMENT ON VIEW worker_status IS
    'The workers that are present, those that should be, and those that ended within the last hour.';
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


-- For a role that may not read errors and payloads, such as :schema_monitor. A view that reads the column by this function
-- shows null to such a role. A view that named the column itself would refuse the role as a whole.
CREATE OR REPLACE FUNCTION outbox_last_error(row_id bigint) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF has_column_privilege(':schema.outbox', 'errors', 'SELECT') THEN
        RETURN (SELECT o.errors -> -1 ->> 'error' FROM outbox AS o WHERE o.id = row_id);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox_last_error(bigint) IS
    'The error of a row''s last attempt that failed; null to a role that may not read errors.';

CREATE OR REPLACE FUNCTION outbox_session_id(row_id bigint) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF has_column_privilege(':schema.outbox', 'payload', 'SELECT') THEN
        RETURN (SELECT o.payload ->> 'session_id' FROM outbox AS o WHERE o.id = row_id);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox_session_id(bigint) IS
    'The session that a row''s payload names; null to a role that may not read payloads.';


CREATE OR REPLACE VIEW worker_running WITH (security_invoker = true) AS
SELECT
    o.id, o.topic, o.attempt, o.started_at, statement_timestamp() - o.started_at AS running_for,
    o.worker_id, w.host, w.pid, w.lease_until - statement_timestamp() AS lease_left,
    o.cancel_requested_at IS NOT NULL AS cancelling,
    o.ordering_key, outbox_session_id(o.id) AS session_id
FROM outbox AS o
LEFT JOIN worker AS w ON w.id = o.worker_id
WHERE o.state = 'running';
COMMENT ON VIEW worker_running IS 'Which worker runs which row, and since when: one row for each running row of outbox.';
COMMENT ON COLUMN worker_running.id IS 'outbox.id.';
COMMENT ON COLUMN worker_running.topic IS 'Topic.';
COMMENT ON COLUMN worker_running.attempt IS 'Which attempt.';
COMMENT ON COLUMN worker_running.started_at IS 'When it was claimed.';
COMMENT ON COLUMN worker_running.running_for IS 'How long ago that was.';
COMMENT ON COLUMN worker_running.worker_id IS 'The worker that runs it.';
COMMENT ON COLUMN worker_running.host IS 'On which host; null: no such worker.';
COMMENT ON COLUMN worker_running.pid IS 'In which process.';
COMMENT ON COLUMN worker_running.lease_left IS 'When negative, a rescue is due.';
COMMENT ON COLUMN worker_running.cancelling IS 'Whether a cancel was requested that its worker has yet to carry out.';
COMMENT ON COLUMN worker_running.ordering_key IS 'Its ordering_key.';
COMMENT ON COLUMN worker_running.session_id IS 'The session it works on, if any.';


-- A row that is written while a trigger of outbox is off wakes nobody. triggers.sql leaves each trigger at 'A' (always).
-- One at 'O' fires too, except in a replication role.
CREATE OR REPLACE FUNCTION outbox_triggers_off() RETURNS text
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
AS $$
    SELECT string_agg(t.tgname, ', ' ORDER BY t.tgname) FROM pg_trigger AS t
    WHERE t.tgrelid = ':schema.outbox'::regclass AND NOT t.tgisinternal AND t.tgenabled IN ('D', 'R')
$$;
COMMENT ON FUNCTION outbox_triggers_off() IS 'The triggers of outbox that somebody has disabled; null if none is.';


-- Why each row waits. The first reason that holds is shown. When it is removed, the next may show.
CREATE OR REPLACE VIEW outbox_waiting WITH (security_invoker = true) AS
WITH staff AS MATERIALIZED (
    SELECT s.id, s.state, s.running, s.concurrency, s.topics, s.lease_left, s.present, s.ended_at
    FROM worker_status AS s
),
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
-- Transactions that have been open for a while and have changed something. One of them may hold a row's lock. A claim holds
-- one too, but not for long. A role may be unable to see since when transactions of other roles are open.
open_transaction AS MATERIALIZED (
    SELECT l.transactionid, l.pid
    FROM pg_locks AS l
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE coalesce(a.xact_start < statement_timestamp() - interval '1 second', true)
      AND l.locktype = 'transactionid' AND l.granted AND l.mode = 'ExclusiveLock'
      AND l.pid IS DISTINCT FROM pg_backend_pid()
),
row AS (
    SELECT
        o.id, o.topic, o.state, o.available_at, o.failures, o.max_attempts, o.ordering_key, o.worker_id,
        o.cancel_requested_at, o.created_at, o.started_at, o.finished_at, o.xmax AS locker
    FROM outbox AS o
    WHERE o.state = 'ready' AND NOT o.blocked
    UNION ALL
    SELECT
        o.id, o.topic, o.state, o.available_at, o.failures, o.max_attempts, o.ordering_key, o.worker_id,
        o.cancel_requested_at, o.created_at, o.started_at, o.finished_at, o.xmax AS locker
    FROM outbox AS o
    WHERE o.state = 'ready' AND o.blocked AND o.ordering_key IS NOT NULL
    UNION ALL
    SELECT
        o.id, o.topic, o.state, o.available_at, o.failures, o.max_attempts, o.ordering_key, o.worker_id,
        o.cancel_requested_at, o.created_at, o.started_at, o.finished_at, o.xmax AS locker
    FROM outbox AS o
    WHERE o.state = 'running'
    UNION ALL
    SELECT
        o.id, o.topic, o.state, o.available_at, o.failures, o.max_attempts, o.ordering_key, o.worker_id,
        o.cancel_requested_at, o.created_at, o.started_at, o.finished_at, o.xmax AS locker
    FROM outbox AS o
    WHERE o.state = 'dead'
)
SELECT
    r.id, r.topic, r.state, y.reason,
    greatest(statement_timestamp() - y.since, interval '0') AS waited,
    CASE y.reason
        WHEN 'dead' THEN format('failures: %s; :schema.outbox_retry(%s) or :schema.outbox_discard(%s)', r.failures, r.id, r.id)
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
        WHEN 'unnoticed' THEN coalesce(
            'triggers of outbox are disabled (' || (SELECT outbox_triggers_off()) || '): ALTER TABLE :schema.outbox'
            || ' ENABLE ALWAYS TRIGGER each of them; then SELECT :schema.outbox_wake()',
            'a worker sleeps and was not told: SELECT :schema.outbox_wake()')
        ELSE 'a worker is about to claim it'
    END AS detail,
    CASE WHEN y.reason = 'key' THEN k.id END AS waits_for,
    CASE WHEN r.state = 'ready' AND r.available_at > statement_timestamp() THEN r.available_at END AS due_at,
    r.failures, r.max_attempts,
    CASE WHEN r.failures > 0 OR r.state = 'dead' THEN outbox_last_error(r.id) END AS last_error,
    r.ordering_key, outbox_session_id(r.id) AS session_id, r.created_at
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
    'Every row that waits for something or is dead, and why. A row that has waited long is stuck: WHERE waited > ''1 minute'' ORDER BY waited DESC.';
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


CREATE OR REPLACE VIEW outbox_writer WITH (security_invoker = true) AS
SELECT
    a.pid, l.virtualtransaction, a.usename AS role, a.application_name AS application, a.state,
    a.xact_start AS since, statement_timestamp() - a.xact_start AS open_for, left(a.query, 200) AS query
FROM (
    SELECT DISTINCT pid, virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock'
      AND database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND relation = ':schema.outbox'::regclass
      AND pid IS DISTINCT FROM pg_backend_pid()
) AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid;
COMMENT ON VIEW outbox_writer IS
    'Open transactions that may have written to outbox. A worker that wants to sleep scans again, at most once a second, until those that are open at that moment have ended.';
COMMENT ON COLUMN outbox_writer.pid IS 'The process that it belongs to; null: a prepared transaction (pg_prepared_xacts).';
COMMENT ON COLUMN outbox_writer.virtualtransaction IS 'As in pg_locks.';
COMMENT ON COLUMN outbox_writer.role IS 'Its role.';
COMMENT ON COLUMN outbox_writer.application IS 'Its application_name.';
COMMENT ON COLUMN outbox_writer.state IS 'As in pg_stat_activity: beware of "idle in transaction".';
COMMENT ON COLUMN outbox_writer.since IS 'When the transaction began.';
COMMENT ON COLUMN outbox_writer.open_for IS 'How long ago that was.';
COMMENT ON COLUMN outbox_writer.query IS 'What it does, or did last. Only its own role, superusers and pg_read_all_stats see it.';

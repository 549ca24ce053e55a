-- Readiness in one answer, and the alerts about rows that wait too long.


-- Ready means that a worker is present and nothing waits too long. A paused topic does not count. It has the owner's
-- rights, so that its answer is the same for a role that row-level security shows only some rows.
CREATE OR REPLACE FUNCTION outbox_ready(
    longest_wait interval DEFAULT '1 minute',
    OUT ready boolean, OUT stuck boolean, OUT workers integer, OUT oldest_due interval,
    OUT topic text, OUT reason text
)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    SELECT
        p.workers > 0 AND p.triggers_off IS NULL AND coalesce(p.since_limit <= f.since, true),
        coalesce(f.since < p.since_limit, false),
        p.workers,
        greatest(statement_timestamp() - f.since, interval '0'),
        f.topic,
        CASE
            WHEN p.triggers_off IS NOT NULL THEN
                'triggers of outbox are disabled, so new rows wake nobody: ' || p.triggers_off
            WHEN p.workers = 0 AND coalesce(p.since_limit <= f.since, true) THEN 'no worker is present'
            WHEN f.since < p.since_limit THEN format(
                'row %s of topic %s has been due for %s: %s', f.id, f.topic,
                date_trunc('second', statement_timestamp() - f.since),
                (SELECT q.reason FROM outbox_waiting AS q WHERE q.id = f.id))
        END
    FROM (
        SELECT (SELECT count(*)::integer FROM worker_present AS w WHERE NOT w.draining) AS workers,
               statement_timestamp() - longest_wait AS since_limit,
               outbox_triggers_off() AS triggers_off
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
    'Whether a worker is present, no trigger of outbox is disabled and no row has been due for longer than longest_wait; if not, why. Its cost does not grow with the rows that wait.';


CREATE OR REPLACE FUNCTION outbox_stuck(stuck_after interval)
RETURNS TABLE (topic text, id bigint, since timestamptz, reason text, detail text)
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    SELECT DISTINCT ON (s.topic) s.topic, s.id, s.since, q.reason, q.detail
    FROM (
        SELECT f.topic, f.id, f.available_at AS since
        FROM outbox_front AS f
        LEFT JOIN topic AS t ON t.name = f.topic
        WHERE f.available_at < statement_timestamp() - stuck_after AND t.max_running IS DISTINCT FROM 0
        UNION ALL
        -- Rows of a dead worker that nobody rescues.
        SELECT o.topic, o.id, w.lease_until
        FROM outbox AS o
        JOIN worker AS w ON w.id = o.worker_id
        WHERE o.state = 'running' AND w.lease_until < statement_timestamp() - stuck_after
    ) AS s
    LEFT JOIN outbox_waiting AS q ON q.id = s.id
    ORDER BY s.topic, s.since, s.id
$$;
COMMENT ON FUNCTION outbox_stuck(interval) IS
    'For each topic the row that has been due longest, if that is longer than stuck_after, and why it waits. Rows that wait for their key or in a paused topic are not stuck.';


CREATE OR REPLACE FUNCTION outbox_stuck_report(stuck_after interval, repeat interval)
RETURNS TABLE (stuck boolean, topic text, id bigint, waited interval, reason text, detail text)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH found AS MATERIALIZED (
        SELECT s.topic, s.id, s.since, s.reason, s.detail FROM outbox_stuck(stuck_after) AS s
    ),
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
    'What is to be reported now: topics that are stuck and were not reported within repeat, and reported topics that are no longer stuck (stuck is false). Each is returned to one caller only.';


CREATE OR REPLACE FUNCTION outbox_stuck_deadline(stuck_after interval) RETURNS interval
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
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
        -- Reported topics, so that their end is reported too.
        SELECT a.since FROM outbox_alert AS a
    ) AS d
$$;
COMMENT ON FUNCTION outbox_stuck_deadline(interval) IS
    'The earliest moment at which outbox_stuck_report may have something to report, as an interval from now; null: there is none.';

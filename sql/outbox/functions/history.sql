-- What happened: throughput by hour, and the history of one row.


-- There is no index by time, because every finished row would pay for it. Ids are nearly in the order of time, so a bounded
-- number of the newest rows by id is read.
CREATE OR REPLACE FUNCTION outbox_throughput(span interval DEFAULT '24 hours', newest bigint DEFAULT 200000)
RETURNS TABLE (
    hour timestamptz, topic text, done bigint, dead bigint, cancelled bigint,
    wait_p50 interval, wait_p95 interval, wait_p99 interval,
    run_p50 interval, run_p95 interval, run_p99 interval
)
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
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
    'The rows that finished within span, by hour and topic, among the newest rows by id: how many, and the 50th, 95th and 99th percentile of how long the last attempt of a done row waited after the row fell due, and how long it ran.';


CREATE OR REPLACE VIEW outbox_hourly WITH (security_invoker = true) AS
SELECT
    t.hour, t.topic, t.done, t.dead, t.cancelled,
    t.wait_p50, t.wait_p95, t.wait_p99, t.run_p50, t.run_p95, t.run_p99
FROM outbox_throughput() AS t;
COMMENT ON VIEW outbox_hourly IS
    'Throughput, wait and run times by hour and topic, for a day, among the newest 200,000 rows; outbox_throughput(span, newest) looks further.';
COMMENT ON COLUMN outbox_hourly.hour IS 'The hour in which the rows finished.';
COMMENT ON COLUMN outbox_hourly.topic IS 'Topic.';
COMMENT ON COLUMN outbox_hourly.done IS 'Rows done.';
COMMENT ON COLUMN outbox_hourly.dead IS 'Rows that became dead and are dead still.';
COMMENT ON COLUMN outbox_hourly.cancelled IS 'Rows cancelled or discarded.';
COMMENT ON COLUMN outbox_hourly.wait_p50 IS 'Half of the done rows waited no longer than this after they fell due.';
COMMENT ON COLUMN outbox_hourly.wait_p95 IS 'The same for 95 of 100.';
COMMENT ON COLUMN outbox_hourly.wait_p99 IS 'The same for 99 of 100.';
COMMENT ON COLUMN outbox_hourly.run_p50 IS 'Half of the last attempts of done rows took no longer.';
COMMENT ON COLUMN outbox_hourly.run_p95 IS 'The same for 95 of 100.';
COMMENT ON COLUMN outbox_hourly.run_p99 IS 'The same for 99 of 100.';


-- Reads one element of outbox.errors. A row that was typed by hand may have other elements than outbox_error writes. What
-- cannot be read is null.
CREATE OR REPLACE FUNCTION outbox_error_read(
    element jsonb, OUT at timestamptz, OUT attempt integer, OUT worker_id uuid, OUT error text
)
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    error := coalesce(element ->> 'error', element::text);
    attempt := element ->> 'attempt';
    worker_id := element ->> 'worker_id';
    at := element ->> 'at';
    IF at NOT BETWEEN '1970-01-01' AND '9999-12-30' THEN -- programs cannot read other years
        at := NULL;
    END IF;
EXCEPTION
    WHEN data_exception THEN NULL;
END
$$;
COMMENT ON FUNCTION outbox_error_read(jsonb) IS 'The fields of one of a row''s errors; null where it has none.';


CREATE OR REPLACE FUNCTION outbox_history(row_id bigint)
RETURNS TABLE (at timestamptz, event text, attempt integer, worker text, detail text)
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
AS $$
    SELECT h.at, h.event, h.attempt,
           coalesce(w.host || ':' || w.pid, h.worker_id::text) AS worker, h.detail
    FROM outbox AS o
    CROSS JOIN LATERAL (
        SELECT o.created_at, 1, 'created', NULL::integer, NULL::uuid,
               concat_ws(', ', o.topic, 'key ' || o.ordering_key, 'unique_key ' || o.unique_key)
        UNION ALL
        SELECT e.at, 3, 'failed', e.attempt, e.worker_id, e.error
        FROM jsonb_array_elements(CASE jsonb_typeof(o.errors) WHEN 'array' THEN o.errors ELSE '[]' END) AS l
        CROSS JOIN LATERAL outbox_error_read(l) AS e
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

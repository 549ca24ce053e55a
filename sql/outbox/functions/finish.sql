-- How an attempt ends: complete, fail, hand back, cancelled. All of it is fenced: see the head of claim.sql.


-- Ends rows whose handler returned. Returns the ids of the rows that it ended. The others are fenced. A cancel that
-- committed first wins. One scan of the primary key serves all rows (docs/profile.md). width_bucket finds the position of
-- a row's id in the sorted ids.
CREATE OR REPLACE FUNCTION outbox_complete(finisher uuid, ids bigint[], attempts integer[]) RETURNS SETOF bigint
LANGUAGE sql VOLATILE ROWS 100
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'done' ELSE 'cancelled' END,
        finished_at = clock_timestamp()
    FROM (
        SELECT array_agg(f.id ORDER BY f.id, f.attempt) AS ids,
            array_agg(f.attempt ORDER BY f.id, f.attempt) AS attempts
        FROM unnest(ids, attempts) AS f (id, attempt)
    ) AS t
    WHERE o.id = ANY (t.ids) AND o.attempt = t.attempts[width_bucket(o.id, t.ids)]
      AND o.worker_id = finisher AND o.state || '' = 'running'
    RETURNING o.id
$$;
COMMENT ON FUNCTION outbox_complete(uuid, bigint[], integer[]) IS
    'Ends claimed rows as done, fenced by attempt; returns the ids it ended.';


-- Locks a running row for a fenced write. Returns null if the row is no longer the caller's, else whether a cancel was
-- requested.
CREATE OR REPLACE FUNCTION outbox_fence(holder uuid, row_id bigint, row_attempt integer) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    SELECT o.cancel_requested_at IS NOT NULL
    FROM outbox AS o
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = holder AND o.state || '' = 'running'
    FOR NO KEY UPDATE
$$;
COMMENT ON FUNCTION outbox_fence(uuid, bigint, integer) IS
    'Locks a claimed row until commit; null if the attempt is fenced, else whether it is to be cancelled.';


CREATE OR REPLACE FUNCTION outbox_backoff(failures integer) RETURNS interval
LANGUAGE sql VOLATILE
-- Exponential with full jitter: 0 to 1 s, 2 s, 4 s, … capped at an hour.
RETURN random() * least(interval '1 hour', interval '1 second' * 2 ^ (least(greatest(failures, 1), 21) - 1));
COMMENT ON FUNCTION outbox_backoff(integer) IS 'How long to wait after so many failures.';


CREATE OR REPLACE FUNCTION outbox_error(row_errors jsonb, row_attempt integer, error text, worker uuid) RETURNS jsonb
LANGUAGE sql STABLE
-- Keeps the last hundred errors, and 4,000 characters of each, because a row may fail for ever. A row that was typed by
-- hand may have a value that is not an array. That value is dropped.
RETURN CASE WHEN jsonb_typeof(row_errors) <> 'array' THEN '[]'
            WHEN jsonb_array_length(row_errors) < 100 THEN row_errors
            ELSE row_errors - 0 END
    || jsonb_build_object(
        'attempt', row_attempt, 'at', clock_timestamp(), 'error', left(error, 4000), 'worker_id', worker);
COMMENT ON FUNCTION outbox_error(jsonb, integer, text, uuid) IS
    'A row''s errors and a new one; the last hundred are kept.';


-- delay: null means by outbox_backoff. permanent: a retry is useless, so the row is dead at once.
CREATE OR REPLACE FUNCTION outbox_fail(
    failer      uuid,
    row_id      bigint,
    row_attempt integer,
    error       text,
    delay       interval DEFAULT NULL,
    permanent   boolean DEFAULT false
) RETURNS text
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE
            WHEN o.cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN permanent OR o.failures >= o.max_attempts - 1 THEN 'dead'
            ELSE 'ready'
        END,
        finished_at = CASE
            WHEN o.topic = 'outbox.prune' THEN NULL
            WHEN o.cancel_requested_at IS NOT NULL OR permanent OR o.failures >= o.max_attempts - 1
            THEN clock_timestamp()
        END,
        failures = least(o.failures, 2147483646) + 1,
        available_at = clock_timestamp() + coalesce(delay, outbox_backoff(least(o.failures, 2147483646) + 1)),
        errors = outbox_error(o.errors, o.attempt, error, failer)
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = failer AND o.state || '' = 'running'
    RETURNING o.state
$$;
COMMENT ON FUNCTION outbox_fail(uuid, bigint, integer, text, interval, boolean) IS
    'Ends an attempt that failed: the row is ready again after delay, or dead. Returns the new state, null if fenced.';


CREATE OR REPLACE FUNCTION outbox_hand_back(
    holder uuid, ids bigint[], attempts integer[], delay interval DEFAULT interval '0'
) RETURNS SETOF bigint
LANGUAGE sql VOLATILE ROWS 10
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'ready' ELSE 'cancelled' END,
        -- outbox_settle sets a missing finished_at, and enqueues the successor of a row that prunes.
        finished_at = CASE WHEN o.cancel_requested_at IS NOT NULL AND o.topic <> 'outbox.prune'
                           THEN clock_timestamp() END,
        available_at = CASE WHEN delay > interval '0' THEN clock_timestamp() + delay ELSE o.available_at END
    FROM unnest(ids, attempts) AS f (id, attempt)
    WHERE o.id >= f.id AND o.id <= f.id
      AND o.attempt = f.attempt AND o.worker_id = holder AND o.state || '' = 'running'
    RETURNING o.id
$$;
COMMENT ON FUNCTION outbox_hand_back(uuid, bigint[], integer[], interval) IS
    'Gives claimed rows back without a failure, because of a drain or because what the handler needs is not there yet.';


-- Ends an attempt whose handler was stopped because of a cancel. The row may have no mark: the handler said without reason
-- that it was cancelled, or a worker of an earlier version heard a notification late. Then the row is given back, and is
-- due a second later, so that such a handler does not run without a pause.
CREATE OR REPLACE FUNCTION outbox_end_cancelled(holder uuid, row_id bigint, row_attempt integer) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'ready' ELSE 'cancelled' END,
        finished_at = CASE WHEN o.cancel_requested_at IS NOT NULL AND o.topic <> 'outbox.prune'
                           THEN clock_timestamp() END,
        available_at = CASE WHEN o.cancel_requested_at IS NULL THEN clock_timestamp() + interval '1 second'
                            ELSE o.available_at END
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = holder AND o.state || '' = 'running'
    RETURNING o.state = 'cancelled'
$$;
COMMENT ON FUNCTION outbox_end_cancelled(uuid, bigint, integer) IS
    'Ends a claimed row as cancelled when its handler has stopped. False if no cancel was requested: the row is given back. Null if it is fenced.';

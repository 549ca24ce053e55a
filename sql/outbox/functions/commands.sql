-- What a person may do. Each returns the row's new state, or null if there was nothing to do. They run with the owner's
-- rights, so that :schema_operator needs no right to write to the table.


CREATE OR REPLACE FUNCTION outbox_cancel(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    -- A ready row ends at once; a running one when its worker has stopped it.
    UPDATE outbox
    SET cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
        state = CASE state WHEN 'ready' THEN 'cancelled' ELSE state END,
        finished_at = CASE state WHEN 'ready' THEN clock_timestamp() END,
        blocked = false
    WHERE id = row_id AND state IN ('ready', 'running')
    RETURNING state
$$;
COMMENT ON FUNCTION outbox_cancel(bigint) IS
    'Cancels a row: cancelled at once if it waits, running until its worker has stopped it; null if it had ended.';


CREATE OR REPLACE FUNCTION outbox_retry(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox
    SET state = 'ready', failures = 0, available_at = clock_timestamp(), cancel_requested_at = NULL,
        finished_at = NULL, blocked = false
    WHERE id = row_id AND state IN ('dead', 'cancelled')
    RETURNING state
$$;
COMMENT ON FUNCTION outbox_retry(bigint) IS
    'Makes a dead or cancelled row ready again with its failures forgiven; its errors stay.';


CREATE OR REPLACE FUNCTION outbox_discard(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox SET state = 'cancelled' WHERE id = row_id AND state || '' = 'dead' RETURNING state
$$;
COMMENT ON FUNCTION outbox_discard(bigint) IS 'Ends a dead row for good: it is kept as cancelled until it is pruned.';

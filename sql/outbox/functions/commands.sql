-- A person's commands for one row. Each returns the row's new state, or null if there was nothing to do. They run with the
-- owner's rights, so that :schema_operator needs no right to write to the table.


CREATE OR REPLACE FUNCTION outbox_cancel(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    -- A ready row ends at once. A running row ends when its worker has stopped it.
    UPDATE outbox
    SET cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
        state = CASE state WHEN 'ready' THEN 'cancelled' ELSE state END,
        -- outbox_settle sets a missing finished_at, and enqueues the successor of a row that prunes.
        finished_at = CASE WHEN state = 'ready' AND topic <> 'outbox.prune' THEN clock_timestamp() END,
        blocked = false
    WHERE id = row_id AND state IN ('ready', 'running')
    RETURNING state
$$;
COMMENT ON FUNCTION outbox_cancel(bigint) IS
    'Cancels a row: cancelled at once if it waits, running until its worker has stopped it; null if it had ended.';


-- The mark is durable, so it needs no handshake: a worker that misses the notification reads the mark when it renews.
CREATE OR REPLACE FUNCTION outbox_cancel_requested() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM pg_notify(':schema_cancel', NEW.id::text);
    RETURN NULL;
END
$$;


-- If another row has the unique_key by now, the row stays as it is, so that a statement over many rows goes on.
CREATE OR REPLACE FUNCTION outbox_retry(row_id bigint) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    holder    bigint := (SELECT unique_key_holder(o.unique_key) FROM outbox AS o WHERE o.id = row_id);
    new_state text;
BEGIN
    IF holder <> row_id THEN
        RAISE NOTICE 'row % stays as it is: row % has its unique_key and is not finished', row_id, holder;
        RETURN NULL;
    END IF;
    UPDATE outbox
    SET state = 'ready', failures = 0, available_at = clock_timestamp(), cancel_requested_at = NULL,
        finished_at = NULL, blocked = false
    WHERE id = row_id AND state IN ('dead', 'cancelled')
    RETURNING state INTO new_state;
    RETURN new_state;
END
$$;
COMMENT ON FUNCTION outbox_retry(bigint) IS
    'Makes a dead or cancelled row ready again with its failures forgiven; its errors stay. Null if it had not ended so, or if an unfinished row has its unique_key.';


CREATE OR REPLACE FUNCTION outbox_discard(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox SET state = 'cancelled' WHERE id = row_id AND state || '' = 'dead' RETURNING state
$$;
COMMENT ON FUNCTION outbox_discard(bigint) IS 'Ends a dead row for good: it is kept as cancelled until it is pruned.';

-- The end of a worker's life, and what becomes of its rows.


-- The end of a worker's life frees its rows. A rescue may end it, a parent that saw its child die, or a DELETE typed into
-- psql. The statement that ended it has locked the worker's row. A new statement frees the rows, and its snapshot shows
-- what a claim in flight had claimed.
CREATE OR REPLACE FUNCTION worker_ended() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'ending a worker needs READ COMMITTED'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF TG_OP = 'DELETE' THEN
        -- Wait for locked rows. A deleted worker has no row left that could keep a lease for them.
        PERFORM FROM outbox WHERE worker_id = OLD.id AND state = 'running' ORDER BY id + 0 FOR UPDATE;
    END IF;
    PERFORM outbox_free(OLD.id, CASE WHEN TG_OP = 'DELETE' THEN 'its worker was deleted'
                                     ELSE coalesce(NEW.end_reason, 'its worker was ended') END);
    -- A worker that did not leave by itself may be alive and asleep. Its flag is cleared, so nobody would notify it. When
    -- it is woken here, it learns that its life was ended, and comes back under a new id.
    IF OLD.ended_at IS NULL AND (TG_OP = 'DELETE' OR NEW.end_reason IS DISTINCT FROM 'left') THEN
        PERFORM pg_notify(':schema_wake', '#' || OLD.id || '@0');
    END IF;
    RETURN NULL;
END
$$;


-- Does not wait for a locked row. The server may keep a fenced transaction of the dead worker open, and a rescuer that
-- waited for it could not renew its own lease. If a row is left over, the ended worker keeps a lease, so that others try
-- again (outbox_next_deadline, outbox_rescue). Sleepers are notified, because they may know only its old lease.
CREATE OR REPLACE FUNCTION outbox_free(lost_worker uuid, reason text) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    freed     integer;
    left_over boolean;
BEGIN
    WITH lost AS MATERIALIZED (
        SELECT id FROM outbox WHERE worker_id = lost_worker AND state = 'running'
        ORDER BY id + 0 FOR UPDATE SKIP LOCKED
    )
    UPDATE outbox AS o
    SET state = CASE
            WHEN o.cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN o.failures >= o.max_attempts - 1 THEN 'dead'
            ELSE 'ready'
        END,
        finished_at = CASE
            WHEN o.topic = 'outbox.prune' THEN NULL
            WHEN o.cancel_requested_at IS NOT NULL OR o.failures >= o.max_attempts - 1 THEN clock_timestamp()
        END,
        failures = least(o.failures, 2147483646) + 1,
        -- After its first failure a row is due at once. A row that kills one worker after the other backs off.
        available_at = CASE
            WHEN o.failures = 0 THEN o.available_at
            ELSE clock_timestamp() + outbox_backoff(o.failures)
        END,
        errors = outbox_error(o.errors, o.attempt, reason, lost_worker)
    FROM lost
    WHERE o.id >= lost.id AND o.id <= lost.id;
    GET DIAGNOSTICS freed = ROW_COUNT;
    left_over := EXISTS (SELECT FROM outbox WHERE worker_id = lost_worker AND state = 'running');
    UPDATE worker SET lease_until = CASE WHEN left_over THEN clock_timestamp() END
    WHERE id = lost_worker AND ended_at IS NOT NULL AND (lease_until IS NOT NULL OR left_over);
    IF left_over THEN
        PERFORM outbox_notify('*', clock_timestamp());
    END IF;
    RETURN freed;
END
$$;
COMMENT ON FUNCTION outbox_free(uuid, text) IS
    'Gives back the rows that a dead worker ran, and counts a failure of each; returns how many. The end of the worker''s life calls it.';


CREATE OR REPLACE FUNCTION outbox_end_worker(dead uuid, reason text) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    UPDATE worker
    SET ended_at = clock_timestamp(), end_reason = reason, parked = false, lease_until = NULL
    WHERE id = dead AND ended_at IS NULL
    RETURNING true
$$;
COMMENT ON FUNCTION outbox_end_worker(uuid, text) IS
    'Ends the life of a worker that is known to be dead, which frees its rows; null if it had ended before.';


-- Ends the workers whose lease ran out while they ran something. A lease counts as run out only if the server has been
-- up, and the rescuer connected, for one lease: after an outage every worker has that long to renew. A locked worker row
-- is skipped, because its claim or renewal is in flight.
CREATE OR REPLACE FUNCTION outbox_rescue(rescuer uuid, lease interval, connected interval) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    lost    uuid;
    why     text;
    rescued integer := 0;
BEGIN
    IF connected < lease OR clock_timestamp() - pg_postmaster_start_time() < lease THEN
        RETURN 0;
    END IF;
    FOR lost IN
        SELECT w.id FROM worker AS w
        WHERE w.id <> rescuer AND w.ended_at IS NULL AND w.lease_until < clock_timestamp()
        ORDER BY w.id
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF EXISTS (SELECT FROM outbox WHERE worker_id = lost AND state = 'running') THEN
            PERFORM outbox_end_worker(lost, 'its lease ran out');
            rescued := rescued + 1;
        ELSE
            UPDATE worker SET lease_until = NULL WHERE id = lost; -- an idle worker keeps none
        END IF;
    END LOOP;
    -- Rows that were locked when their worker's life was ended.
    FOR lost, why IN
        SELECT w.id, w.end_reason FROM worker AS w
        WHERE w.ended_at IS NOT NULL AND w.lease_until IS NOT NULL
        ORDER BY w.id
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        PERFORM outbox_free(lost, coalesce(why, 'its worker was ended'));
    END LOOP;
    -- Rows whose worker has no lease. Only a restore or a disabled trigger leaves such rows.
    FOR lost IN
        SELECT DISTINCT o.worker_id FROM outbox AS o
        WHERE o.state = 'running' AND o.worker_id <> rescuer
          AND NOT EXISTS (SELECT FROM worker AS w WHERE w.id = o.worker_id AND w.lease_until IS NOT NULL)
        ORDER BY o.worker_id
    LOOP
        PERFORM outbox_free(lost, 'its worker had no lease');
        rescued := rescued + 1;
    END LOOP;
    RETURN rescued;
END
$$;
COMMENT ON FUNCTION outbox_rescue(uuid, interval, interval) IS
    'Frees the rows of workers whose lease ran out; returns how many workers.';

-- A worker's lease is worker.lease_until, one for all its rows. It is kept only while the worker runs something. The
-- worker's side is worker/engine/lease.py.


CREATE OR REPLACE FUNCTION outbox_notify_lease(holder uuid, until timestamptz) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    SELECT pg_notify(':schema_wake', '*@' || ceil(extract(epoch FROM until) * 1000)::bigint)
    WHERE EXISTS (SELECT FROM worker WHERE parked AND id <> holder)
$$;
COMMENT ON FUNCTION outbox_notify_lease(uuid, timestamptz) IS
    'Notifies the other parked workers, if there are any, when a lease will end. For the claim.';


-- Whether a worker that has claimed must extend its lease or clear its flag. After a claim at least half of the lease must
-- be left. The worker relies on that half: CLAIMED in worker/engine/lease.py. It is a SQL function, so that it becomes part
-- of the caller's condition. outbox_extend_lease is seldom due, and a call of it is slow (docs/profile.md).
CREATE OR REPLACE FUNCTION outbox_lease_is_due(me worker, moment timestamptz, lease interval, stay_parked boolean) RETURNS boolean
LANGUAGE sql STABLE
RETURN me.lease_until IS NULL OR me.lease_until < moment + lease * 0.5 OR (me.parked AND NOT stay_parked);
COMMENT ON FUNCTION outbox_lease_is_due(worker, timestamptz, interval, boolean) IS
    'Whether a worker that has claimed needs outbox_extend_lease. For the claim.';


CREATE OR REPLACE FUNCTION outbox_extend_lease(me worker, moment timestamptz, lease interval, stay_parked boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF me.lease_until IS NULL OR me.lease_until < moment THEN
        -- Sleeping workers must bring their timers forward to the new deadline. Only a lease that had run out is news to
        -- them. They find a lease that was extended when the end that they know has passed.
        PERFORM outbox_notify_lease(me.id, clock_timestamp() + lease);
    END IF;
    UPDATE worker
    SET lease_until = greatest(lease_until, clock_timestamp() + lease), parked = parked AND stay_parked
    WHERE id = me.id;
END
$$;
COMMENT ON FUNCTION outbox_extend_lease(worker, timestamptz, interval, boolean) IS
    'Extends the lease of a worker that has claimed, and clears its flag unless it stays parked. For the claim.';


-- Extends the lease. Returns the given rows that the worker still runs, and whether each is to be cancelled. A row that is
-- missing was taken away, and its handler must stop.
CREATE OR REPLACE FUNCTION outbox_renew(renewer uuid, lease interval, ids bigint[], attempts integer[])
RETURNS TABLE (id bigint, attempt integer, cancel boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE worker AS w
    SET lease_until = greatest(w.lease_until, clock_timestamp() + lease)
    WHERE w.id = renewer AND w.ended_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', renewer USING ERRCODE = 'OW001';
    END IF;
    RETURN QUERY
    SELECT o.id, o.attempt, o.cancel_requested_at IS NOT NULL
    FROM unnest(ids, attempts) AS f (id, attempt)
    JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
    WHERE o.attempt = f.attempt AND o.worker_id = renewer AND o.state || '' = 'running';
END
$$;
COMMENT ON FUNCTION outbox_renew(uuid, interval, bigint[], integer[]) IS
    'Extends the lease; returns the given rows that the worker still runs.';

-- A worker's lease is one column of its row, worker.lease_until, kept only while it runs something: worker/engine/lease.py.


CREATE OR REPLACE FUNCTION outbox_notify_lease(holder uuid, until timestamptz) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    SELECT pg_notify(':schema_wake', '*@' || ceil(extract(epoch FROM until) * 1000)::bigint)
    WHERE EXISTS (SELECT FROM worker WHERE parked AND id <> holder)
$$;
COMMENT ON FUNCTION outbox_notify_lease(uuid, timestamptz) IS
    'Tells the parked workers, if there are others, when a lease will end. For the claim.';


-- After a claim: the lease covers what was claimed, for half its length at least, and the flag is as is due. The worker
-- relies on the half: CLAIMED in worker/engine/lease.py. Asked apart, in SQL that becomes part of the caller's condition,
-- because a call of the other is slow and seldom due (docs/profile.md).
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
        -- A new deadline, while others may sleep: they bring their timers forward. Only a lease that had run out is
        -- news. Others find an extended lease when the end that they know passes.
        PERFORM outbox_notify_lease(me.id, clock_timestamp() + lease);
    END IF;
    UPDATE worker
    SET lease_until = greatest(lease_until, clock_timestamp() + lease), parked = parked AND stay_parked
    WHERE id = me.id;
END
$$;
COMMENT ON FUNCTION outbox_extend_lease(worker, timestamptz, interval, boolean) IS
    'Extends the lease of a worker that has claimed, and takes its flag down unless it stays parked. For the claim.';


-- A worker is back on another connection, which it names by its presence. A claim whose answer was lost may have taken
-- rows that the worker does not know of. So all rows are given back but those that the worker says it runs.
CREATE OR REPLACE FUNCTION outbox_reconnect(
    worker_back uuid, connection integer, ids bigint[], attempts integer[]
) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE ROWS 10
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    me worker;
BEGIN
    SELECT w.* INTO me FROM worker AS w WHERE w.id = worker_back AND w.ended_at IS NULL FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', worker_back USING ERRCODE = 'OW001';
    END IF;
    -- A worker's connections count upwards, and wrap at 2^31: half of the numbers are behind. A call on a connection that was given up may arrive while the worker sleeps
    -- on a later one. It must neither clear the flag nor give back what runs by now.
    IF (connection::bigint - me.presence + 2147483648) % 2147483648 >= 1073741824 THEN
        RAISE EXCEPTION 'connection % of worker % was given up', connection, worker_back;
    END IF;
    UPDATE worker SET presence = connection, parked = false WHERE id = worker_back;
    -- A statement of its own, whose snapshot shows the rows that a claim took while it held the worker's row.
    RETURN QUERY
    WITH lost AS MATERIALIZED (
        SELECT o.id, o.attempt FROM outbox AS o
        WHERE o.worker_id = worker_back AND o.state = 'running'
          AND NOT EXISTS (
              SELECT FROM unnest(ids, attempts) AS f (id, attempt)
              WHERE f.id >= o.id AND f.id <= o.id AND f.attempt = o.attempt)
        ORDER BY o.id + 0
    )
    SELECT outbox_hand_back(worker_back, array_agg(l.id), array_agg(l.attempt)) FROM lost AS l;
END
$$;
COMMENT ON FUNCTION outbox_reconnect(uuid, integer, bigint[], integer[]) IS
    'Makes a worker''s new connection known, and gives back what runs under its name and not in it; returns those ids.';


-- Extends the lease. Returns those of the given rows that the worker still runs, and whether each is to be cancelled. A
-- row that is missing was taken away, and its handler must stop.
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
    'Extends the lease; returns those of the rows that the worker still runs.';

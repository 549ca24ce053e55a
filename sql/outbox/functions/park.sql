-- The database's steps of parking (worker/engine/parking.py) and of backup workers (worker/engine/backup.py).


-- A named worker without a free slot calls it (worker/engine/backup.py).
CREATE OR REPLACE FUNCTION outbox_pass_on(ids bigint[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    SELECT outbox_notify(o.topic, o.available_at)
    FROM unnest(ids) AS f (id)
    JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
    WHERE o.state || '' = 'ready'
$$;
COMMENT ON FUNCTION outbox_pass_on(bigint[]) IS
    'Notifies the parked workers of rows for which the named worker has no free slot.';


-- A backup worker calls it (worker/engine/backup.py). A row that has been claimed once is left out, because the write that
-- made it ready again has notified. A worker whose row is locked keeps its flag: it is claiming, so it is awake.
CREATE OR REPLACE FUNCTION outbox_stand_in(ids bigint[], named integer[]) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE ROWS 10
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    row_id  bigint;
    absent  integer; -- the presence of the named worker
    sleeper uuid;
BEGIN
    FOR row_id, absent IN
        SELECT o.id, f.presence
        FROM unnest(ids, named) AS f (id, presence)
        JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
        WHERE o.state || '' = 'ready' AND o.attempt = 0
    LOOP
        UPDATE worker SET parked = false
        WHERE id IN (
            SELECT w.id FROM worker AS w WHERE w.parked AND w.presence = absent FOR NO KEY UPDATE SKIP LOCKED
        )
        RETURNING id INTO sleeper;
        IF FOUND THEN
            PERFORM pg_notify(':schema_wake', '#' || sleeper || '@0');
        END IF;
        RETURN NEXT row_id;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox_stand_in(bigint[], integer[]) IS
    'Which of these rows still wait, although a worker was named for each (by its presence). Clears the flags of those workers.';


-- Parking, step 1 (worker/engine/parking.py). Also clears the flags of sleepers that died, because every producer would
-- notify for nothing.
CREATE OR REPLACE FUNCTION outbox_park(parker uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    UPDATE worker SET parked = true WHERE id = parker AND ended_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', parker USING ERRCODE = 'OW001';
    END IF;
    -- A sleeper may reconnect while this statement waits for its row. Then the server evaluates the condition again, for
    -- the new version of the row. It does not evaluate the other side of a join again (worker_present, or EXISTS), and the
    -- flag of a sleeping worker would be cleared. It does evaluate a count again.
    UPDATE worker
    SET parked = false
    WHERE parked AND id <> parker
      AND 0 = (
          SELECT count(*) FROM pg_locks AS l
          WHERE l.locktype = 'advisory' AND l.granted
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.classid = :lock_presence AND l.objid = worker.presence::bigint::oid AND l.objsubid = 2
      );
END
$$;
COMMENT ON FUNCTION outbox_park(uuid) IS 'Parking, step 1: says that this worker sleeps, so that producers notify.';


-- Parking, step 2. Only granted locks count, because a transaction that still waits for the lock reads later which workers
-- are parked. The sequence is set first, so that inserts read that again. The lock is held to the end, so that
-- outbox_all_awake cannot act on what it read before.
CREATE OR REPLACE FUNCTION outbox_writers() RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(:lock_sleepers, 0);
    PERFORM nextval('outbox_sleepers');
    RETURN (
        SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
        FROM pg_locks AS l
        WHERE l.locktype = 'relation' AND l.granted
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.relation = ':schema.outbox'::regclass
          AND l.mode = 'RowExclusiveLock'
          AND l.pid IS DISTINCT FROM pg_backend_pid() -- null: a prepared transaction
    );
END
$$;
COMMENT ON FUNCTION outbox_writers() IS
    'Parking, step 2: the open transactions that may have written to outbox.';

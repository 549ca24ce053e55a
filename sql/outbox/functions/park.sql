-- The database's steps of parking (worker/engine/parking.py).


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

-- The steps of parking and of standing by that the database does: worker/engine/parking.py, worker/engine/backup.py.


-- Standing by, step 2 (worker/engine/backup.py).
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
    'Tells the parked workers of rows that the one named for them has no slot for.';


-- Standing by, steps 3 and 4. A row that has been claimed once is not waited for, because whatever made it ready again
-- has notified. A worker whose row is locked is claiming, so it is awake.
CREATE OR REPLACE FUNCTION outbox_stand_in(ids bigint[], named integer[]) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE ROWS 10
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    row_id  bigint;
    absent  integer; -- the presence of the one that was named
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
    'Which of these rows still wait, though workers were named for them by presence; takes the flags of those down.';


-- Parking, step 1 (worker/engine/parking.py). Also clears the flags of sleepers that died: they would make every producer notify
-- for nothing.
CREATE OR REPLACE FUNCTION outbox_park(parker uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    UPDATE worker SET parked = true WHERE id = parker AND ended_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', parker USING ERRCODE = 'OW001';
    END IF;
    -- A sleeper may reconnect while this waits for another row. Then the condition is evaluated again, for the new row.
    -- In a join (worker_present, or EXISTS) the other side would stay as it was, and the flag of a sleeping worker would
    -- be cleared. A count is evaluated anew.
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


-- Parking, step 2. Only granted locks count: a transaction that still waits for the lock has yet to look for parked
-- workers. First the sequence is set, so that inserts look again. The lock is held to the end, so that outbox_all_awake
-- cannot act on a look from before.
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
    'Parking, step 2: the transactions that may have written to outbox and not committed yet.';

-- What workers of the last release call and this one does not. Delete it after the next release.
--
-- Until 1.0 the worker that was named for a row (worker/engine/backup.py) told the others if it had no free slot, and
-- another that claimed the row cleared the flag of the named worker.


-- A named worker without a free slot called it.
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


-- A backup worker called it. A row that has been claimed once is left out, because the write that
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

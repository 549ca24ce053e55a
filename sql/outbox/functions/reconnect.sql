-- A worker comes back on another connection.


-- `connection` is the presence of the worker's new connection. A claim whose answer was lost may have taken rows that the
-- worker does not know of. So all rows are given back except those that the worker says it runs.
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
    -- A worker's connections are counted upwards, and the count wraps at 2^31: half of the numbers are behind. A call on a
    -- connection that was given up may arrive while the worker sleeps on a later one. Such a call must neither clear the
    -- flag nor give back what runs by now.
    IF (connection::bigint - me.presence + 2147483648) % 2147483648 >= 1073741824 THEN
        RAISE EXCEPTION 'connection % of worker % was given up', connection, worker_back;
    END IF;
    UPDATE worker SET presence = connection, parked = false WHERE id = worker_back;
    -- A statement of its own, so its snapshot shows the rows that a claim took while it had locked the worker's row.
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
    'Records a worker''s new connection, and gives back the rows that the worker does not run; returns their ids.';

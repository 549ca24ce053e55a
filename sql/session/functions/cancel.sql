-- A user ends work: cancels a session's turns, or archives the session.


-- Cancels what a session has waiting or running. Turns that wait end in this transaction. A turn that runs ends when its
-- worker has stopped it.
CREATE OR REPLACE FUNCTION session_cancel(of_session uuid, OUT cancelled integer, OUT cancelling integer)
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    WITH found AS MATERIALIZED (
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key = 'session:' || of_session AND o.state IN ('ready', 'running')
          AND o.topic = 'session.run'
        ORDER BY o.id
        FOR UPDATE
    ),
    marked AS (
        UPDATE outbox AS o
        SET cancel_requested_at = coalesce(o.cancel_requested_at, clock_timestamp()),
            state = CASE o.state WHEN 'ready' THEN 'cancelled' ELSE o.state END,
            finished_at = CASE o.state WHEN 'ready' THEN clock_timestamp() END,
            blocked = false
        FROM found AS f
        WHERE o.id >= f.id AND o.id <= f.id
        RETURNING o.state
    )
    SELECT count(*) FILTER (WHERE state = 'cancelled')::integer,
           count(*) FILTER (WHERE state = 'running')::integer
    FROM marked
$$;
COMMENT ON FUNCTION session_cancel(uuid) IS
    'Cancels a session''s turns; returns how many ended at once and how many a worker has yet to stop.';


-- Cancels twice, because a prompt may commit after the first cancel and before the session's row is locked. The outbox
-- row of such a prompt is locked after the session's row. This is the only place that breaks the lock order. It can end
-- in a deadlock, which rolls everything back. Then the caller repeats.
CREATE OR REPLACE FUNCTION session_archive(of_session uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    PERFORM session_cancel(of_session);
    UPDATE session
    SET session_status = 'archived', inbox_status = 'archived',
        deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    WHERE id = of_session AND session_status || '' = 'active'; -- not through the index of active branches
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM session_cancel(of_session);
    RETURN true;
END
$$;
COMMENT ON FUNCTION session_archive(uuid) IS 'Cancels a session''s turns and archives it.';

-- Housekeeping of sessions. The row of topic outbox.prune calls it too (outbox/functions/prune.sql).


CREATE OR REPLACE FUNCTION session_prune(
    archived_before timestamptz, quiet_before timestamptz, page_size integer
) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
-- Arrays and subqueries of one row take the place of joins, because a join may read a whole table: see
-- outbox/functions/claim.sql.
DECLARE
    deleted integer;
    total   integer;
BEGIN
    DELETE FROM idempotency
    WHERE ctid = ANY (ARRAY(
        SELECT i.ctid FROM idempotency AS i WHERE i.created_at < archived_before
        ORDER BY i.created_at LIMIT page_size));
    GET DIAGNOSTICS total = ROW_COUNT;

    -- First the messages of sessions that have been quiet. An archived session goes when it has no message left.
    DELETE FROM message
    WHERE ctid = ANY (ARRAY(
        SELECT m.ctid
        FROM session AS s
        CROSS JOIN LATERAL (
            SELECT m.ctid FROM message AS m WHERE m.session_id = s.id LIMIT page_size
        ) AS m
        WHERE s.created_at < greatest(archived_before, quiet_before)
          AND s.inbox_status IN ('completed', 'archived')
          AND (s.updated_at < quiet_before OR s.deleted_at < archived_before)
        LIMIT page_size));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    total := total + deleted;

    DELETE FROM session
    WHERE id = ANY (ARRAY(
        SELECT s.id FROM session AS s
        WHERE s.created_at < archived_before AND s.deleted_at < archived_before
          AND s.sandbox IS NULL
          AND (SELECT m.seq FROM message AS m WHERE m.session_id = s.id LIMIT 1) IS NULL
          AND (
              SELECT o.id FROM outbox AS o
              WHERE o.ordering_key = 'session:' || s.id AND o.state IN ('ready', 'running')
              LIMIT 1) IS NULL
        LIMIT page_size));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN total + deleted;
END
$$;
COMMENT ON FUNCTION session_prune(timestamptz, timestamptz, integer) IS
    'Deletes a page of each: old answers, messages of sessions quiet since then, archived sessions; 0 at the end.';

-- Housekeeping: a row of topic outbox.prune that deletes what is past its retention, in small batches, and
-- schedules its successor in the transaction that ends it (worker/handlers/prune.py). Dead rows are kept
-- until somebody retries or discards them.

-- One page of the outbox by id. Ids are nearly in the order of time, so that the end is where a page holds
-- nothing older than before: next_id is null there.
CREATE FUNCTION outbox_prune(
    before timestamptz, from_id bigint, page_size integer,
    OUT deleted integer, OUT next_id bigint
)
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    WITH page AS MATERIALIZED (
        SELECT id, state, created_at, finished_at FROM outbox
        WHERE id > from_id
        ORDER BY id
        LIMIT page_size
    ),
    gone AS (
        DELETE FROM outbox AS o
        USING page AS p
        WHERE o.id >= p.id AND o.id <= p.id AND o.state IN ('done', 'cancelled') AND p.finished_at < before
        RETURNING 1
    )
    SELECT (SELECT count(*)::integer FROM gone),
           (SELECT max(id) FROM page HAVING min(created_at) < before)
$$;
COMMENT ON FUNCTION outbox_prune(timestamptz, bigint, integer) IS
    'Deletes the rows of one page that were done or cancelled before that time; next_id is null at the end.';


CREATE FUNCTION session_prune(
    archived_before timestamptz, quiet_before timestamptz, page_size integer
) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
-- Arrays and subqueries of one row, not joins, which may read a table in full: see 0003_claim.sql.
DECLARE
    deleted integer;
    total   integer;
BEGIN
    DELETE FROM idempotency
    WHERE ctid = ANY (ARRAY(
        SELECT i.ctid FROM idempotency AS i WHERE i.created_at < archived_before
        ORDER BY i.created_at LIMIT page_size));
    GET DIAGNOSTICS total = ROW_COUNT;

    -- The messages of sessions that have been quiet, and then, once it has none, an archived session.
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
    total := total + deleted;

    DELETE FROM worker
    WHERE id IN (SELECT id FROM worker WHERE ended_at < archived_before LIMIT page_size);
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN total + deleted;
END
$$;
COMMENT ON FUNCTION session_prune(timestamptz, timestamptz, integer) IS
    'Deletes a page of each: old answers, messages of sessions quiet since then, archived sessions, ended workers; 0 at the end.';


INSERT INTO outbox (topic, unique_key, available_at, max_attempts)
VALUES ('outbox.prune', 'outbox.prune', clock_timestamp() + interval '1 hour', 32767);

-- Housekeeping. The handler of topic outbox.prune (worker/handlers/prune.py) deletes what is past its retention, in small
-- batches. The transaction that ends its row enqueues the successor of the row. Dead rows are kept until somebody retries
-- or discards them. If the row is cancelled, pruning goes on: outbox_settle calls outbox_prune_later.


CREATE OR REPLACE FUNCTION outbox_prune_later() RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    INSERT INTO outbox (topic, unique_key, available_at, max_attempts)
    VALUES ('outbox.prune', 'outbox.prune', clock_timestamp() + interval '1 hour', 32767)
    ON CONFLICT DO NOTHING
$$;
COMMENT ON FUNCTION outbox_prune_later() IS
    'Enqueues the row that prunes, due in an hour, unless there is one.';


-- One page of the outbox by id. Ids are nearly in the order of time. So a page without a row older than `before` is the
-- last one, and next_id is null.
CREATE OR REPLACE FUNCTION outbox_prune(
    before timestamptz, from_id bigint, page_size integer,
    OUT deleted integer, OUT next_id bigint
)
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
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


CREATE OR REPLACE FUNCTION worker_prune(before timestamptz, page_size integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    deleted integer;
BEGIN
    -- A worker that died while it was idle kept no lease, so no rescue has ended it.
    UPDATE worker AS w
    SET ended_at = clock_timestamp(), end_reason = 'gone', parked = false
    WHERE w.ended_at IS NULL AND w.lease_until IS NULL AND w.started_at < before
      AND NOT EXISTS (SELECT FROM worker_present AS p WHERE p.id = w.id);
    DELETE FROM worker
    WHERE id IN (SELECT w.id FROM worker AS w WHERE w.ended_at < before LIMIT page_size);
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;
COMMENT ON FUNCTION worker_prune(timestamptz, integer) IS
    'Ends workers that died while they were idle, and deletes a page of those that ended before that time; returns how many it deleted.';

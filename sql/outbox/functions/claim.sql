-- The claim.
--
-- Helpers of the claim in other files: outbox_complete (finish.sql); outbox_take_key, outbox_topic_room (order.sql);
-- outbox_lease_is_due, outbox_extend_lease (lease.sql). outwake/_claim.py has the statements that call the claim.
--
-- Lock order everywhere: the worker's row, then outbox rows by id, then session, then prompt. A claim that completes
-- nothing locks its rows before its worker's row. It never waits for its rows. It can meet a rescue of that worker in a
-- deadlock, if both have rows of the same ordering_key. Then one of the two is tried again.
--
-- Every write to a running row is fenced by (id, attempt, worker_id, state running). It changes nothing if the row was
-- rescued, cancelled or claimed again. Its row lock makes a rescue come wholly before or wholly after it.
--
-- How the statements keep their plans. A plan lives as long as a connection, or until the next ANALYZE. A plan that was
-- made while a table was empty would read all of it. So a statement can reach a row only through an index:
--   * enable_seqscan is off. jit is off too. Before PostgreSQL 18, a scan that is off but the only way looks so expensive
--     that the statement would be compiled each time.
--   * A statement that knows the id compares state as (state || ''). That keeps the planner from the partial indexes of
--     running rows, which hold a dead entry for each row that finished since the last vacuum.
--   * A join by id is written as a range (>= and <=). A range can be neither hashed nor merged, and the planner does not
--     turn it around. With an equality, a plan of an empty table reads all of outbox and looks for each row among the
--     given ids (test_empty_plans.py).
--   * Rows that were found by another index are ordered by id + 0, which no index gives.
--   * Where the first row of an ordering_key is asked for, the key is written as a range (>= and <=). With an equality
--     the planner may read the table by id until it meets the key; with a range only outbox_key has the order.
-- docs/profile.md has the figures.


-- The row of a worker that claims (`turner`). to_write locks the row. A rescue locks it too, before it ends the lease. If
-- the rescue is first, this raises an error, and nothing of the caller is written. If the rescue comes after the caller's
-- commit, it sees what the caller wrote.
CREATE OR REPLACE FUNCTION outbox_myself(turner uuid, connection integer, to_write boolean) RETURNS worker
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
DECLARE
    me worker;
BEGIN
    IF to_write THEN
        SELECT w.* INTO me FROM worker AS w WHERE w.id = turner FOR NO KEY UPDATE;
    ELSE
        SELECT w.* INTO me FROM worker AS w WHERE w.id = turner;
    END IF;
    IF me.id IS NULL OR me.ended_at IS NOT NULL THEN
        RAISE EXCEPTION 'worker % has ended', turner USING ERRCODE = 'OW001';
    END IF;
    -- A claim may be on its way, or wait for a lock, while its worker gives the connection up and comes back on another
    -- one. The worker would not learn of the rows that such a claim takes.
    IF connection <> me.presence THEN
        RAISE EXCEPTION 'connection % of worker % was given up', connection, turner;
    END IF;
    RETURN me;
END
$$;
COMMENT ON FUNCTION outbox_myself(uuid, integer, boolean) IS
    'The row of a worker that has not ended, locked if it is to write. For the claim.';


-- The priorities of a topic's claimable rows, the highest first. Each costs one descent of outbox_claimable. The function
-- has no SET, so that the planner makes it part of the query that calls it.
CREATE OR REPLACE FUNCTION outbox_priorities(topic_name text) RETURNS TABLE (priority smallint)
LANGUAGE sql STABLE ROWS 2
BEGIN ATOMIC
    WITH RECURSIVE step AS (
        SELECT (
            SELECT o.priority FROM :schema.outbox AS o
            WHERE o.topic = topic_name AND o.state = 'ready' AND NOT o.blocked
            ORDER BY o.priority DESC LIMIT 1
        ) AS priority
        UNION ALL
        SELECT (
            SELECT o.priority FROM :schema.outbox AS o
            WHERE o.topic = topic_name AND o.state = 'ready' AND NOT o.blocked AND o.priority < v.priority
            ORDER BY o.priority DESC LIMIT 1
        )
        FROM step AS v
        WHERE v.priority IS NOT NULL
    )
    SELECT v.priority FROM step AS v WHERE v.priority IS NOT NULL;
END;
COMMENT ON FUNCTION outbox_priorities(text) IS 'The priorities that the claimable rows of a topic have. For the claim.';


-- A worker's cycle: ends the completed rows of the worker (`turner`) and claims its next rows, in one commit and one round
-- trip. A row of the result without a topic is a completion that was fenced.
--
-- A head scan reads past the index entries of all rows that were claimed since the oldest snapshot that anybody holds,
-- because the server may not remove these entries. To begin at a cursor instead, a caller gives priorities, since and
-- since_ids, each as long as topics. Then the scan of a topic begins at (since, since_id), in the order of available_at
-- and id, and takes only rows of that priority. If alone is true, it takes only the row at that place.
-- worker/engine/cursor.py decides where each scan begins.
--
-- The plan is made once for each connection. It must not depend on how large the table was then. So each row is found
-- through an index, in the order of the index.
CREATE OR REPLACE FUNCTION outbox_complete_and_claim(
    turner uuid, ids bigint[], attempts integer[],
    topics text[], slots integer, lease interval, stay_parked boolean, connection integer DEFAULT NULL,
    priorities smallint[] DEFAULT NULL, since timestamptz[] DEFAULT NULL, since_ids bigint[] DEFAULT NULL,
    alone boolean[] DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE plpgsql VOLATILE ROWS 100
SET search_path = :schema, pg_temp
SET plan_cache_mode = force_generic_plan
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    me      worker;
    ended   bigint[];
    moment  timestamptz;
    claimed integer;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'a claim needs READ COMMITTED' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;

    IF ids <> '{}' THEN
        me := outbox_myself(turner, connection, to_write => true);
        ended := ARRAY(SELECT outbox_complete(turner, ids, attempts));
        IF cardinality(ended) < cardinality(ids) THEN
            RETURN QUERY
            SELECT f.id, NULL::text, NULL::text, NULL::jsonb, f.attempt, 0, 0, NULL::text, NULL::interval,
                NULL::interval, NULL::smallint, NULL::timestamptz
            FROM unnest(ids, attempts) AS f (id, attempt)
            WHERE f.id <> ALL (ended);
        END IF;
    END IF;

    moment := clock_timestamp();
    RETURN QUERY
    WITH
    -- The due rows of a lane (one topic and one priority) are one range of outbox_claimable. So neither delayed rows nor
    -- rows of other topics are read.
    lane AS (
        SELECT
            t.name,
            t.turn,
            p.priority,
            CASE WHEN l.max_running IS NULL THEN slots
                 ELSE outbox_topic_room(t.name, l.max_running) END AS room,
            l.max_running IS NOT NULL AS limited,
            l.timeout,
            t.since,
            t.since_id,
            t.alone
        FROM unnest(topics, priorities, since, since_ids, alone)
            WITH ORDINALITY AS t (name, priority, since, since_id, alone, turn)
        LEFT JOIN topic AS l ON l.name = t.name
        CROSS JOIN LATERAL (
            SELECT t.priority WHERE t.since IS NOT NULL
            UNION ALL
            SELECT q.priority FROM outbox_priorities(t.name) AS q WHERE t.since IS NULL
        ) AS p
    ),
    -- MATERIALIZED, and read row by row through the LIMIT, so that no more rows are locked than there are slots.
    due AS MATERIALIZED (
        SELECT d.id, d.ordering_key, v.name, v.room, v.limited, v.timeout
        FROM (
            SELECT * FROM lane WHERE room > 0 ORDER BY priority DESC, turn
        ) AS v
        CROSS JOIN LATERAL (
            SELECT o.id, o.ordering_key
            FROM outbox AS o
            WHERE o.topic = v.name AND o.priority = v.priority
              AND o.state = 'ready' AND NOT o.blocked
              AND (o.available_at, o.id) >= (coalesce(v.since, '-infinity'), coalesce(v.since_id, 0))
              AND (o.available_at, o.id)
                  <= (CASE WHEN v.alone THEN least(v.since, moment) ELSE moment END,
                      CASE WHEN v.alone THEN v.since_id ELSE 9223372036854775807 END)
            ORDER BY o.available_at, o.id
            LIMIT v.room
            FOR UPDATE SKIP LOCKED
        ) AS d
        LIMIT slots
    ),
    allowed AS MATERIALIZED (
        SELECT d.id, d.limited, d.timeout
        FROM (
            SELECT id, ordering_key, limited, timeout FROM due WHERE NOT limited
            UNION ALL
            -- Only rows of limited topics are numbered, across all priorities of a topic.
            SELECT id, ordering_key, limited, timeout
            FROM (SELECT *, row_number() OVER (PARTITION BY name) AS place FROM due WHERE limited) AS l
            WHERE place <= room
        ) AS d
        WHERE d.ordering_key IS NULL OR outbox_take_key(d.ordering_key, d.id)
    )
    UPDATE outbox AS o
    SET state = 'running',
        attempt = least(o.attempt, 2147483646) + 1, -- a row that was typed by hand may have any number
        worker_id = turner,
        started_at = moment,
        limited = a.limited
    FROM allowed AS a
    WHERE o.id >= a.id AND o.id <= a.id
    RETURNING o.id, o.topic::text, o.ordering_key::text, o.payload, o.attempt, o.failures, o.max_attempts::integer,
        o.traceparent::text, a.timeout, moment - o.available_at, o.priority, o.available_at::timestamptz;
    GET DIAGNOSTICS claimed = ROW_COUNT;

    -- A claim that finds nothing takes no lock, so it needs no transaction id and no commit on disk. A notification that
    -- names nobody wakes every sleeping worker, and only one of them finds the row.
    IF ids = '{}' THEN
        me := outbox_myself(turner, connection, to_write => claimed > 0);
    END IF;
    IF claimed > 0 AND outbox_lease_is_due(me, moment, lease, stay_parked AND claimed < slots) THEN
        PERFORM outbox_extend_lease(me, moment, lease, stay_parked AND claimed < slots);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_complete_and_claim(uuid, bigint[], integer[], text[], integer, interval, boolean, integer, smallint[], timestamptz[], bigint[], boolean[]) IS
    'Ends completed rows and claims up to slots due rows of these topics in one commit: by priority, then in the order of topics given, then by age. Extends the lease if that is due. A worker whose slots are full is no longer parked. A row without a topic is a completion that was fenced.';


-- Claims one row that a notification named. A sleeping worker calls it before anything else. It takes only a row to which
-- no other rule of the claim above applies, and leaves all other rows to that claim. It never waits for a lock, because
-- its connection must hear the next notification (worker/engine/listen.py).
-- 1. Lock the row, if it is due, has no ordering_key, and its topic has neither limit nor timeout.
-- 2. Lock the worker's row, as every claim does, unless the worker has ended or has given this connection up.
-- 3. If either lock is unavailable, return the row without a topic if it is still ready, because the holder of the lock
--    may roll back. If the row is not ready, another worker took it. If this worker has ended, its next claim says so.
-- 4. Take the row.
CREATE OR REPLACE FUNCTION outbox_claim_row(
    claimer uuid, row_id bigint, lease interval, stay_parked boolean DEFAULT true, connection integer DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE plpgsql VOLATILE ROWS 1
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off -- its plans are made when the tables may be empty
AS $$
DECLARE
    moment       timestamptz := clock_timestamp();
    lease_is_due boolean; -- null: nothing may be claimed
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'a claim needs READ COMMITTED' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM FROM outbox AS o
    WHERE o.id = row_id AND o.state || '' = 'ready' AND NOT o.blocked AND o.available_at <= moment
      AND o.ordering_key IS NULL AND NOT EXISTS (SELECT FROM topic AS t WHERE t.name = o.topic)
    FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        -- Reads one value. The whole row would be slower (docs/profile.md).
        SELECT outbox_lease_is_due(w, moment, lease, stay_parked) INTO lease_is_due FROM worker AS w
        WHERE w.id = claimer AND w.ended_at IS NULL AND (w.presence = connection) IS NOT FALSE
        FOR NO KEY UPDATE SKIP LOCKED;
    END IF;
    IF lease_is_due IS NULL THEN
        RETURN QUERY
        SELECT o.id, NULL::text, NULL::text, NULL::jsonb, o.attempt, 0, 0, NULL::text, NULL::interval,
            NULL::interval, NULL::smallint, NULL::timestamptz
        FROM outbox AS o WHERE o.id = row_id AND o.state || '' = 'ready';
        RETURN;
    END IF;
    RETURN QUERY
    UPDATE outbox AS o
    SET state = 'running', attempt = least(o.attempt, 2147483646) + 1, worker_id = claimer, started_at = moment, limited = false
    WHERE o.id = row_id
    RETURNING o.id, o.topic::text, o.ordering_key::text, o.payload, o.attempt, o.failures, o.max_attempts::integer,
        o.traceparent::text, NULL::interval, moment - o.available_at, o.priority, o.available_at::timestamptz;
    IF lease_is_due THEN
        PERFORM outbox_extend_lease(w, moment, lease, stay_parked) FROM worker AS w WHERE w.id = claimer;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_claim_row(uuid, bigint, interval, boolean, integer) IS
    'Claims one row that a notification named. Returns no row if another worker took it, and a row without a topic if it is left to outbox_claim.';


CREATE OR REPLACE FUNCTION outbox_claim(
    claimer     uuid,
    topics      text[],
    slots       integer,
    lease       interval,
    stay_parked boolean DEFAULT false,
    connection  integer DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE sql VOLATILE ROWS 100
SET search_path = :schema, pg_temp
AS $$
    SELECT * FROM outbox_complete_and_claim(claimer, '{}', '{}', topics, slots, lease, stay_parked, connection)
$$;
COMMENT ON FUNCTION outbox_claim(uuid, text[], integer, interval, boolean, integer) IS
    'Claims up to slots due rows of these topics for a worker, without completing any.';

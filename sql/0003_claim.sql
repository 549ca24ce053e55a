-- Claim, complete, fail, hand back, renew, rescue.
--
-- Lock order everywhere: the worker's row, then outbox rows by id, then session, then prompt. A claim
-- that completes nothing takes its rows, for which it never waits, before its worker's. It can meet a rescue
-- of that worker in a deadlock, over an ordering_key that both hold rows of: one of them is then tried again.
-- Every write to a running row is fenced by (id, attempt, worker_id, state running): it changes nothing
-- when the row was rescued, cancelled or claimed again meanwhile, and its row lock makes a rescue come
-- wholly before or wholly after it.
--
-- Statements that know the id compare state as (state || ''), which keeps the planner from the partial
-- indexes of running rows: it takes them for tiny, but each row finished since the last vacuum has left
-- a dead entry there. Measured: draining 20,000 rows took 3.0 s by outbox_running, 1.2 s by the key.
--
-- A plan is kept for as long as a connection lives, or until the next ANALYZE; one made while a table was
-- empty would read all of it. So there must be no way to a row but its index, whatever the planner believes:
-- enable_seqscan is off (4,000 instructions a call, of 70,000 of the cheapest); a join by id is written as a
-- range, which can be neither hashed nor merged, nor begin with outbox read in the order of id (1 % of a
-- batch's completion); and rows found by another index are ordered by id + 0, which no index gives. And jit is
-- off: before PostgreSQL 18 a scan that is off and yet the only way, as of worker, looks so dear that it would be
-- compiled each time. The library's connections have it off; those of a pooler and of psql may not.

CREATE TYPE outbox_claimed AS (
    id           bigint,
    topic        text,
    ordering_key text,
    payload      jsonb,
    attempt      integer,
    failures     integer,
    max_attempts integer,
    traceparent  text,
    timeout      interval,
    waited       interval,
    priority     smallint,
    available_at timestamptz
);


-- May this row of an ordering_key start? Called by the claim for a row it has locked.
-- 1. Try the key's lock; who holds it is deciding about this key, and the row stays due: look again.
-- 2. In a snapshot taken after that (hence two statements; the claim's own is older): a row of the key
--    that runs, or an unfinished one with a lower id, comes first. Then mark the row blocked, which
--    takes it out of the claim's index until the end of that row clears the mark (outbox_free_key).
CREATE FUNCTION outbox_take_key(key text, row_id bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(1397048887, hashtext(key)) THEN
        RETURN false;
    END IF;
    -- Each asks an index for one row. As EXISTS with "a lower id, or running", it read the whole queue
    -- behind the first row of a key. The key is given as a range, so that only outbox_key has the order
    -- asked for: with an equality the planner may read the table by id until it meets the key.
    IF (
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key >= key AND o.ordering_key <= key AND o.state IN ('ready', 'running')
        ORDER BY o.ordering_key, o.id
        LIMIT 1
    ) < row_id OR EXISTS (
        SELECT FROM outbox AS o
        WHERE o.ordering_key = key AND o.state = 'running' AND o.id <> row_id
    ) THEN
        -- All that wait behind it too, else a long queue of one key would be read row by row, claim by
        -- claim. Never waits: a row that another claim has locked is marked by whoever meets it next.
        UPDATE outbox SET blocked = true
        WHERE id IN (
            SELECT o.id FROM outbox AS o
            WHERE o.ordering_key >= key AND o.ordering_key <= key AND o.state IN ('ready', 'running')
              AND o.state = 'ready' AND NOT o.blocked AND o.id >= row_id
            ORDER BY o.ordering_key, o.id
            LIMIT 10000
            FOR UPDATE SKIP LOCKED
        );
        RETURN false;
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox_take_key(text, bigint) IS
    'Whether this row of an ordering_key may start now; takes the key''s lock until commit. For the claim.';


-- How many rows of a limited topic may start. Counted under the topic's lock and in a snapshot taken
-- after it, else two workers would count the same free place.
CREATE FUNCTION outbox_topic_room(name text, max_running integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(1397048888, hashtext(name)) THEN
        RETURN 0;
    END IF;
    RETURN greatest(0, max_running - (
        SELECT count(*) FROM outbox AS o WHERE o.topic = name AND o.state = 'running' AND o.limited
    ));
END
$$;
COMMENT ON FUNCTION outbox_topic_room(text, integer) IS
    'How many rows of a limited topic may start; takes the topic''s lock until commit. For the claim.';


CREATE FUNCTION outbox_notify_lease(holder uuid, until timestamptz) RETURNS void
LANGUAGE sql VOLATILE
AS $$
    SELECT pg_notify('outwake_wake', '*@' || ceil(extract(epoch FROM until) * 1000)::bigint)
    WHERE EXISTS (SELECT FROM worker WHERE parked AND id <> holder)
$$;
COMMENT ON FUNCTION outbox_notify_lease(uuid, timestamptz) IS
    'Tells the parked workers, if there are others, when a lease will end. For the claim.';


-- Ends rows whose handler returned. Returns the ids that were this worker's to end; the others are fenced.
-- A cancel that committed first wins.
-- One look through the key's index for all: a look for each row took 15 % more of 100, and 70 % more of one.
-- width_bucket finds a row's place in the sorted ids.
CREATE FUNCTION outbox_complete(finisher uuid, ids bigint[], attempts integer[]) RETURNS SETOF bigint
LANGUAGE sql VOLATILE ROWS 100
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'done' ELSE 'cancelled' END,
        finished_at = clock_timestamp()
    FROM (
        SELECT array_agg(f.id ORDER BY f.id, f.attempt) AS ids,
            array_agg(f.attempt ORDER BY f.id, f.attempt) AS attempts
        FROM unnest(ids, attempts) AS f (id, attempt)
    ) AS t
    WHERE o.id = ANY (t.ids) AND o.attempt = t.attempts[width_bucket(o.id, t.ids)]
      AND o.worker_id = finisher AND o.state || '' = 'running'
    RETURNING o.id
$$;
COMMENT ON FUNCTION outbox_complete(uuid, bigint[], integer[]) IS
    'Ends claimed rows as done, fenced by attempt; returns the ids it ended.';


-- The row of a worker that claims. to_write: locked, as a rescue locks it before it ends the lease: that comes
-- before what the caller writes, which is then undone by the error here, or after it is committed, and sees it.
CREATE FUNCTION outbox_myself(turner uuid, connection integer, to_write boolean) RETURNS worker
LANGUAGE plpgsql VOLATILE
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
    -- A claim may still be on its way, or wait for a lock, when its worker has given the connection up
    -- and come back on another: nobody would hear of what it takes.
    IF connection <> me.presence THEN
        RAISE EXCEPTION 'connection % of worker % was given up', connection, turner;
    END IF;
    RETURN me;
END
$$;
COMMENT ON FUNCTION outbox_myself(uuid, integer, boolean) IS
    'The row of a worker that has not ended, locked if it is to write. For the claim.';


-- After a claim: the lease covers what was claimed, for half its length at least, and the flag is as is due. Asked
-- apart, in SQL that becomes part of the caller's condition: a call of the other takes 18,000 instructions of the
-- 487,000 of a lone row's claim, and is seldom due.
CREATE FUNCTION outbox_lease_is_due(me worker, moment timestamptz, lease interval, stay_parked boolean) RETURNS boolean
LANGUAGE sql STABLE
AS $$
    SELECT me.lease_until IS NULL OR me.lease_until < moment + lease * 0.5 OR (me.parked AND NOT stay_parked)
$$;
COMMENT ON FUNCTION outbox_lease_is_due(worker, timestamptz, interval, boolean) IS
    'Whether a worker that has claimed needs outbox_extend_lease. For the claim.';

CREATE FUNCTION outbox_extend_lease(me worker, moment timestamptz, lease interval, stay_parked boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF me.lease_until IS NULL OR me.lease_until < moment THEN
        -- A deadline is born while others may sleep: they bring their timers forward. Only a lease that
        -- had run out is news; an extended one is found when the known end passes.
        PERFORM outbox_notify_lease(me.id, clock_timestamp() + lease);
    END IF;
    UPDATE worker
    SET lease_until = greatest(lease_until, clock_timestamp() + lease), parked = parked AND stay_parked
    WHERE id = me.id;
END
$$;
COMMENT ON FUNCTION outbox_extend_lease(worker, timestamptz, interval, boolean) IS
    'Extends the lease of a worker that has claimed, and takes its flag down unless it stays parked. For the claim.';


-- The worker's turn: ends what was completed and claims the next rows, in one commit and one round trip. Rows
-- of the result without a topic are completions that were fenced.
--
-- A look from the front of a topic reads past the entries of all rows that were claimed since the oldest
-- snapshot that anybody holds: the server may not remove them. With priorities, since and since_ids, of the same
-- length as topics, only rows of these priorities are looked for, from there on in the order of available_at
-- and id, or where alone is true the one row there: worker/front.py tells when.
--
-- The plan is made once a session, and must not depend on how large the table was then: each row is found
-- through an index, in the order the index has. Planning anew each time took 1.2 ms a call, 7 us a row in
-- batches of 250 (27 us, then 20).
CREATE FUNCTION outbox_complete_and_claim(
    turner uuid, ids bigint[], attempts integer[],
    topics text[], slots integer, lease interval, stay_parked boolean, connection integer DEFAULT NULL,
    priorities smallint[] DEFAULT NULL, since timestamptz[] DEFAULT NULL, since_ids bigint[] DEFAULT NULL,
    alone boolean[] DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE plpgsql VOLATILE ROWS 100
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
    WITH RECURSIVE
    -- The priorities present in each topic, one index descent each: with both fixed, the due rows are
    -- one range of outbox_claimable, and neither delayed rows nor other topics' are ever read.
    level AS (
        SELECT
            t.name,
            t.turn,
            CASE WHEN t.since IS NULL THEN (
                SELECT o.priority FROM outbox AS o
                WHERE o.topic = t.name AND o.state = 'ready' AND NOT o.blocked
                ORDER BY o.priority DESC LIMIT 1
            ) ELSE t.priority END AS priority,
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
        UNION ALL
        SELECT
            v.name,
            v.turn,
            (
                SELECT o.priority FROM outbox AS o
                WHERE o.topic = v.name AND o.state = 'ready' AND NOT o.blocked
                  AND o.priority < v.priority
                ORDER BY o.priority DESC LIMIT 1
            ),
            v.room, v.limited, v.timeout, v.since, v.since_id, v.alone
        FROM level AS v
        WHERE v.priority IS NOT NULL AND v.since IS NULL
    ),
    -- MATERIALIZED and pulled row by row through the LIMIT: no more than slots rows are locked.
    due AS MATERIALIZED (
        SELECT d.id, d.ordering_key, v.name, v.room, v.limited, v.timeout
        FROM (
            SELECT * FROM level WHERE priority IS NOT NULL AND room > 0 ORDER BY priority DESC, turn
        ) AS v
        CROSS JOIN LATERAL (
            SELECT o.id, o.ordering_key
            FROM outbox AS o
            WHERE o.topic = v.name AND o.priority = v.priority
              AND o.state = 'ready' AND NOT o.blocked
              AND (o.available_at, o.id) >= (coalesce(v.since, '-infinity'), coalesce(v.since_id, 0))
              AND (o.available_at, o.id)
                  <= (CASE WHEN v.alone THEN v.since ELSE moment END,
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
            -- Only these are numbered, over all their priorities: 3 % of a turn.
            SELECT id, ordering_key, limited, timeout
            FROM (SELECT *, row_number() OVER (PARTITION BY name) AS place FROM due WHERE limited) AS l
            WHERE place <= room
        ) AS d
        WHERE d.ordering_key IS NULL OR outbox_take_key(d.ordering_key, d.id)
    )
    UPDATE outbox AS o
    SET state = 'running',
        attempt = o.attempt + 1,
        worker_id = turner,
        started_at = moment,
        limited = a.limited
    FROM allowed AS a
    WHERE o.id >= a.id AND o.id <= a.id
    RETURNING o.id, o.topic::text, o.ordering_key::text, o.payload, o.attempt, o.failures, o.max_attempts::integer,
        o.traceparent::text, a.timeout, moment - o.available_at, o.priority, o.available_at::timestamptz;
    GET DIAGNOSTICS claimed = ROW_COUNT;

    -- Nothing to be done is found out without a lock, and so without a transaction id and a commit on disk: a
    -- notification that names nobody wakes every worker asleep, and one finds the row.
    IF ids = '{}' THEN
        me := outbox_myself(turner, connection, to_write => claimed > 0);
    END IF;
    IF claimed > 0 AND outbox_lease_is_due(me, moment, lease, stay_parked AND claimed < slots) THEN
        PERFORM outbox_extend_lease(me, moment, lease, stay_parked AND claimed < slots);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_complete_and_claim(uuid, bigint[], integer[], text[], integer, interval, boolean, integer, smallint[], timestamptz[], bigint[], boolean[]) IS
    'Ends completed rows and claims up to slots due rows of these topics in one commit: by priority, then in the order of topics given, then by age; extends the lease when it must. A worker whose slots are full is no longer parked. Rows without a topic are completions that were fenced.';


-- One row, of which a notification told: what a worker asleep does first. It takes only a row that no rule of the
-- claim above has anything to say about; any other is left to that. Of the server's time it takes 0.2 ms, a claim
-- of one row in general 0.35.
-- It waits for no lock, for its connection is to hear what comes next (worker/listen.py).
-- 1. Lock the row, if it is due, of no ordering_key, and of a topic without limit or timeout.
-- 2. Lock the worker's row, as every claim does, if it has not ended and not given this connection up.
-- 3. Could that not be had, say whether somebody has to look for the row: it may be locked by one who rolls back.
--    If it is not ready it was taken, and nobody has to. That the worker has ended, the look finds out.
-- 4. Take the row.
CREATE FUNCTION outbox_claim_row(
    claimer uuid, row_id bigint, lease interval, stay_parked boolean DEFAULT true, connection integer DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE plpgsql VOLATILE ROWS 1
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
        -- Not the whole row: 28,000 instructions of 458,000.
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
    SET state = 'running', attempt = o.attempt + 1, worker_id = claimer, started_at = moment, limited = false
    WHERE o.id = row_id
    RETURNING o.id, o.topic::text, o.ordering_key::text, o.payload, o.attempt, o.failures, o.max_attempts::integer,
        o.traceparent::text, NULL::interval, moment - o.available_at, o.priority, o.available_at::timestamptz;
    IF lease_is_due THEN
        PERFORM outbox_extend_lease(w, moment, lease, stay_parked) FROM worker AS w WHERE w.id = claimer;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_claim_row(uuid, bigint, interval, boolean, integer) IS
    'Claims one row that a notification told of. No row: it was taken; a row without a topic: it is to be looked for by outbox_claim.';


CREATE FUNCTION outbox_claim(
    claimer     uuid,
    topics      text[],
    slots       integer,
    lease       interval,
    stay_parked boolean DEFAULT false,
    connection  integer DEFAULT NULL
) RETURNS SETOF outbox_claimed
LANGUAGE sql VOLATILE ROWS 100
AS $$
    SELECT * FROM outbox_complete_and_claim(claimer, '{}', '{}', topics, slots, lease, stay_parked, connection)
$$;
COMMENT ON FUNCTION outbox_claim(uuid, text[], integer, interval, boolean, integer) IS
    'Claims up to slots due rows of these topics for a worker, without completing any.';


-- Locks a running row for a fenced write: null when it is no longer the caller's, else whether a cancel
-- was requested.
CREATE FUNCTION outbox_fence(holder uuid, row_id bigint, row_attempt integer) RETURNS boolean
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    SELECT o.cancel_requested_at IS NOT NULL
    FROM outbox AS o
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = holder AND o.state || '' = 'running'
    FOR NO KEY UPDATE
$$;
COMMENT ON FUNCTION outbox_fence(uuid, bigint, integer) IS
    'Locks a claimed row until commit; null if the attempt is fenced, else whether it is to be cancelled.';


CREATE FUNCTION outbox_backoff(failures integer) RETURNS interval
LANGUAGE sql VOLATILE
AS $$
    -- Exponential with full jitter: 0 to 1 s, 2 s, 4 s, … capped at an hour.
    SELECT random() * least(interval '1 hour', interval '1 second' * 2 ^ least(failures - 1, 20))
$$;
COMMENT ON FUNCTION outbox_backoff(integer) IS 'How long to wait after so many failures.';


CREATE FUNCTION outbox_error(row_errors jsonb, row_attempt integer, error text, worker uuid) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    -- The last hundred, each bounded: a row that fails for ever must not grow for ever.
    SELECT CASE WHEN jsonb_array_length(row_errors) < 100 THEN row_errors ELSE row_errors - 0 END
        || jsonb_build_object(
            'attempt', row_attempt, 'at', clock_timestamp(), 'error', left(error, 4000), 'worker_id', worker)
$$;
COMMENT ON FUNCTION outbox_error(jsonb, integer, text, uuid) IS
    'A row''s errors with one more; the last hundred are kept.';


-- delay null: by backoff. permanent: retrying is useless.
CREATE FUNCTION outbox_fail(
    failer      uuid,
    row_id      bigint,
    row_attempt integer,
    error       text,
    delay       interval DEFAULT NULL,
    permanent   boolean DEFAULT false
) RETURNS text
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE
            WHEN o.cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN permanent OR o.failures + 1 >= o.max_attempts THEN 'dead'
            ELSE 'ready'
        END,
        finished_at = CASE
            WHEN o.cancel_requested_at IS NOT NULL OR permanent OR o.failures + 1 >= o.max_attempts
            THEN clock_timestamp()
        END,
        failures = o.failures + 1,
        available_at = clock_timestamp() + coalesce(delay, outbox_backoff(o.failures + 1)),
        errors = outbox_error(o.errors, o.attempt, error, failer)
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = failer AND o.state || '' = 'running'
    RETURNING o.state
$$;
COMMENT ON FUNCTION outbox_fail(uuid, bigint, integer, text, interval, boolean) IS
    'Ends an attempt that failed: the row is ready again after delay, or dead. Returns the new state, null if fenced.';


CREATE FUNCTION outbox_hand_back(
    holder uuid, ids bigint[], attempts integer[], delay interval DEFAULT interval '0'
) RETURNS SETOF bigint
LANGUAGE sql VOLATILE ROWS 10
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'ready' ELSE 'cancelled' END,
        finished_at = CASE WHEN o.cancel_requested_at IS NOT NULL THEN clock_timestamp() END,
        available_at = CASE WHEN delay > interval '0' THEN clock_timestamp() + delay ELSE o.available_at END
    FROM unnest(ids, attempts) AS f (id, attempt)
    WHERE o.id >= f.id AND o.id <= f.id
      AND o.attempt = f.attempt AND o.worker_id = holder AND o.state || '' = 'running'
    RETURNING o.id
$$;
COMMENT ON FUNCTION outbox_hand_back(uuid, bigint[], integer[], interval) IS
    'Gives claimed rows back without a failure: a drain, or a wait for something that is not there yet.';


-- Ends an attempt whose handler was stopped because of a cancel. Without the mark, because a cancel of an
-- earlier attempt was heard late or the handler took itself for cancelled, the row goes back: not at once,
-- or such a handler would spin.
CREATE FUNCTION outbox_end_cancelled(holder uuid, row_id bigint, row_attempt integer) RETURNS boolean
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox AS o
    SET state = CASE WHEN o.cancel_requested_at IS NULL THEN 'ready' ELSE 'cancelled' END,
        finished_at = CASE WHEN o.cancel_requested_at IS NOT NULL THEN clock_timestamp() END,
        available_at = CASE WHEN o.cancel_requested_at IS NULL THEN clock_timestamp() + interval '1 second'
                            ELSE o.available_at END
    WHERE o.id = row_id AND o.attempt = row_attempt AND o.worker_id = holder AND o.state || '' = 'running'
    RETURNING o.state = 'cancelled'
$$;
COMMENT ON FUNCTION outbox_end_cancelled(uuid, bigint, integer) IS
    'Ends a claimed row as cancelled once its handler has stopped; false if that was not asked for and the row went back, null if it is fenced.';


-- A worker is back on another connection, which it calls by its presence. A claim whose answer was lost may
-- have taken rows that it does not know of: all but those that it says it runs are given back.
CREATE FUNCTION outbox_reconnect(
    worker_back uuid, connection integer, ids bigint[], attempts integer[]
) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE ROWS 10
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    me worker;
BEGIN
    SELECT w.* INTO me FROM worker AS w WHERE w.id = worker_back AND w.ended_at IS NULL FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', worker_back USING ERRCODE = 'OW001';
    END IF;
    -- A worker's connections count upwards. One that was given up may still deliver its call, when the
    -- worker sleeps on a later one: it must not take the flag down, nor give back what runs by now.
    IF connection < me.presence THEN
        RAISE EXCEPTION 'connection % of worker % was given up', connection, worker_back;
    END IF;
    UPDATE worker SET presence = connection, parked = false WHERE id = worker_back;
    -- A statement of its own: its snapshot shows what the claim that held the worker's row has taken.
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
    'Makes a worker''s new connection known, and gives back what runs under its name and not in it; returns those ids.';


-- Extends the lease and tells which of the rows the worker believes to run it still does, and which of
-- them are to be cancelled: a row that is missing was taken away, and its handler must stop.
CREATE FUNCTION outbox_renew(renewer uuid, lease interval, ids bigint[], attempts integer[])
RETURNS TABLE (id bigint, attempt integer, cancel boolean)
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE worker AS w
    SET lease_until = greatest(w.lease_until, clock_timestamp() + lease)
    WHERE w.id = renewer AND w.ended_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', renewer USING ERRCODE = 'OW001';
    END IF;
    RETURN QUERY
    SELECT o.id, o.attempt, o.cancel_requested_at IS NOT NULL
    FROM unnest(ids, attempts) AS f (id, attempt)
    JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
    WHERE o.attempt = f.attempt AND o.worker_id = renewer AND o.state || '' = 'running';
END
$$;
COMMENT ON FUNCTION outbox_renew(uuid, interval, bigint[], integer[]) IS
    'Extends the lease; returns those of the rows that the worker still runs.';


-- The end of a worker's life frees its rows, whoever ended it: a rescue, a parent that saw its child die,
-- or a DELETE typed into psql. The worker's row has been locked by the statement that ended it; the rows
-- are freed by a new one, whose snapshot shows what a claim in flight had claimed.
CREATE FUNCTION worker_ended() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'ending a worker needs READ COMMITTED'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF TG_OP = 'DELETE' THEN
        -- Nothing would be left of the worker to keep a lease for a row that is locked: wait for it.
        PERFORM FROM outbox WHERE worker_id = OLD.id AND state = 'running' ORDER BY id + 0 FOR UPDATE;
    END IF;
    PERFORM outbox_free(OLD.id, CASE WHEN TG_OP = 'DELETE' THEN 'its worker was deleted'
                                     ELSE coalesce(NEW.end_reason, 'its worker was ended') END);
    -- Unless it left, it may be alive and asleep, its flag down so that nobody will ever notify it: woken, it
    -- finds out and comes back under a new id.
    IF OLD.ended_at IS NULL AND (TG_OP = 'DELETE' OR NEW.end_reason IS DISTINCT FROM 'left') THEN
        PERFORM pg_notify('outwake_wake', '#' || OLD.id || '@0');
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER worker_ended
    AFTER UPDATE ON worker FOR EACH ROW
    WHEN (OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL)
    EXECUTE FUNCTION worker_ended();
ALTER TABLE worker ENABLE ALWAYS TRIGGER worker_ended;

CREATE TRIGGER worker_deleted
    AFTER DELETE ON worker FOR EACH ROW EXECUTE FUNCTION worker_ended();
ALTER TABLE worker ENABLE ALWAYS TRIGGER worker_deleted;


-- Does not wait for a row that is locked: the dead worker may have been cut off in the middle of a fenced
-- transaction which the server keeps open, and whoever waited for that could not renew its own lease. The
-- ended worker then keeps a lease, so that others go on looking (outbox_next_deadline, outbox_rescue), and
-- sleepers are told: it was not a rescuer that ended it, perhaps, and what they know of is its old lease.
CREATE FUNCTION outbox_free(lost_worker uuid, reason text) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    freed     integer;
    left_over boolean;
BEGIN
    WITH lost AS MATERIALIZED (
        SELECT id FROM outbox WHERE worker_id = lost_worker AND state = 'running'
        ORDER BY id + 0 FOR UPDATE SKIP LOCKED
    )
    UPDATE outbox AS o
    SET state = CASE
            WHEN o.cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN o.failures + 1 >= o.max_attempts THEN 'dead'
            ELSE 'ready'
        END,
        finished_at = CASE
            WHEN o.cancel_requested_at IS NOT NULL OR o.failures + 1 >= o.max_attempts THEN clock_timestamp()
        END,
        failures = o.failures + 1,
        -- At once the first time; a row that kills worker after worker backs off.
        available_at = CASE
            WHEN o.failures = 0 THEN o.available_at
            ELSE clock_timestamp() + outbox_backoff(o.failures)
        END,
        errors = outbox_error(o.errors, o.attempt, reason, lost_worker)
    FROM lost
    WHERE o.id >= lost.id AND o.id <= lost.id;
    GET DIAGNOSTICS freed = ROW_COUNT;
    left_over := EXISTS (SELECT FROM outbox WHERE worker_id = lost_worker AND state = 'running');
    UPDATE worker SET lease_until = CASE WHEN left_over THEN clock_timestamp() END
    WHERE id = lost_worker AND ended_at IS NOT NULL AND (lease_until IS NOT NULL OR left_over);
    IF left_over THEN
        PERFORM outbox_notify('*', clock_timestamp());
    END IF;
    RETURN freed;
END
$$;
COMMENT ON FUNCTION outbox_free(uuid, text) IS
    'Gives back what a dead worker ran, a failure counted; returns how many rows. The end of its life calls it.';


CREATE FUNCTION outbox_end_worker(dead uuid, reason text) RETURNS boolean
LANGUAGE sql VOLATILE
AS $$
    UPDATE worker
    SET ended_at = clock_timestamp(), end_reason = reason, parked = false, lease_until = NULL
    WHERE id = dead AND ended_at IS NULL
    RETURNING true
$$;
COMMENT ON FUNCTION outbox_end_worker(uuid, text) IS
    'Ends the life of a worker known to be dead, which frees its rows; null if it had ended.';


-- Ends the workers whose lease ran out while they ran something. A lease counts as run out only if the
-- server has been up, and the rescuer connected, for one lease: after an outage every worker has that
-- long to renew. A worker's row that is locked is skipped: its claim or renewal is in flight.
CREATE FUNCTION outbox_rescue(rescuer uuid, lease interval, connected interval) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    lost    uuid;
    why     text;
    rescued integer := 0;
BEGIN
    IF connected < lease OR clock_timestamp() - pg_postmaster_start_time() < lease THEN
        RETURN 0;
    END IF;
    FOR lost IN
        SELECT w.id FROM worker AS w
        WHERE w.id <> rescuer AND w.ended_at IS NULL AND w.lease_until < clock_timestamp()
        ORDER BY w.id
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF EXISTS (SELECT FROM outbox WHERE worker_id = lost AND state = 'running') THEN
            PERFORM outbox_end_worker(lost, 'its lease ran out');
            rescued := rescued + 1;
        ELSE
            UPDATE worker SET lease_until = NULL WHERE id = lost; -- idle: it keeps none
        END IF;
    END LOOP;
    -- What was locked when its worker's life was ended.
    FOR lost, why IN
        SELECT w.id, w.end_reason FROM worker AS w
        WHERE w.ended_at IS NOT NULL AND w.lease_until IS NOT NULL
        ORDER BY w.id
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        PERFORM outbox_free(lost, coalesce(why, 'its worker was ended'));
    END LOOP;
    -- Rows whose worker has no lease, which only a restore or a disabled trigger leaves behind.
    FOR lost IN
        SELECT DISTINCT o.worker_id FROM outbox AS o
        WHERE o.state = 'running' AND o.worker_id <> rescuer
          AND NOT EXISTS (SELECT FROM worker AS w WHERE w.id = o.worker_id AND w.lease_until IS NOT NULL)
        ORDER BY o.worker_id
    LOOP
        PERFORM outbox_free(lost, 'its worker had no lease');
        rescued := rescued + 1;
    END LOOP;
    RETURN rescued;
END
$$;
COMMENT ON FUNCTION outbox_rescue(uuid, interval, interval) IS
    'Frees the rows of workers whose lease ran out; returns how many workers.';


-- The next moment at which this worker must look without being told, as an interval from now: a row of
-- its topics falls due, or another worker's lease ends. Zero or less: a due row was only skipped as
-- locked, or a rescue is due. Null: nothing is scheduled, sleep until a notification.
CREATE FUNCTION outbox_next_deadline(
    looker uuid, topics text[], lease interval, connected interval,
    OUT row_due interval, OUT lease_end interval, OUT server_time timestamptz
)
LANGUAGE plpgsql VOLATILE
-- Planned once, as the claim is: planning anew took two thirds of the 0.65 ms that a call took.
SET plan_cache_mode = force_generic_plan
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    first_row   timestamptz;
    first_lease timestamptz;
BEGIN
    server_time := clock_timestamp();

    WITH RECURSIVE level AS (
        SELECT
            t.name,
            (
                SELECT o.priority FROM outbox AS o
                WHERE o.topic = t.name AND o.state = 'ready' AND NOT o.blocked
                ORDER BY o.priority DESC LIMIT 1
            ) AS priority
        FROM unnest(topics) AS t (name)
        LEFT JOIN topic AS l ON l.name = t.name
        -- Without room nothing is due: the end that makes room notifies.
        WHERE l.max_running IS NULL OR l.max_running > (
            SELECT count(*) FROM outbox AS o WHERE o.topic = t.name AND o.state = 'running' AND o.limited
        )
        UNION ALL
        SELECT
            v.name,
            (
                SELECT o.priority FROM outbox AS o
                WHERE o.topic = v.name AND o.state = 'ready' AND NOT o.blocked
                  AND o.priority < v.priority
                ORDER BY o.priority DESC LIMIT 1
            )
        FROM level AS v
        WHERE v.priority IS NOT NULL
    )
    SELECT min(d.available_at) INTO first_row
    FROM level AS v
    CROSS JOIN LATERAL (
        SELECT o.available_at FROM outbox AS o
        WHERE o.topic = v.name AND o.priority = v.priority AND o.state = 'ready' AND NOT o.blocked
        ORDER BY o.available_at, o.id
        LIMIT 1
    ) AS d;

    SELECT min(greatest(
        w.lease_until,
        pg_postmaster_start_time() + lease,
        server_time - connected + lease
    )) INTO first_lease
    FROM worker AS w
    WHERE w.id <> looker AND w.lease_until IS NOT NULL;

    row_due := first_row - server_time;
    lease_end := first_lease - server_time;
END
$$;
COMMENT ON FUNCTION outbox_next_deadline(uuid, text[], interval, interval) IS
    'When this worker must look again without being told: the next row due, the next lease end.';


-- What a look that begins at these ends does not see (worker/front.py): for each topic and priority the claimable
-- rows before its end, at_most of them, and the first row after it; without an end the first row alone. Each entry
-- of the index is read once, of which there may be millions: for a connection that nobody waits for. Every
-- statement has a snapshot of its own (VOLATILE), so none is held for as long as the whole takes.
CREATE FUNCTION outbox_scout(
    topics text[], known text[], priorities smallint[], ends timestamptz[], end_ids bigint[], at_most integer
) RETURNS TABLE (topic text, priority smallint, available_at timestamptz, id bigint, due_in double precision)
LANGUAGE plpgsql VOLATILE ROWS 10
SET plan_cache_mode = force_generic_plan
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    name     text;
    below    integer; -- the priority looked at, and all that are lower
    from_at  timestamptz;
    from_id  bigint;
    until_at timestamptz;
    until_id bigint;
BEGIN
    FOR name IN
        SELECT t.name
        FROM unnest(topics) AS t (name)
        LEFT JOIN topic AS l ON l.name = t.name
        -- Without room nothing is due: the end that makes room notifies.
        WHERE l.max_running IS NULL OR l.max_running > (
            SELECT count(*) FROM outbox AS o WHERE o.topic = t.name AND o.state = 'running' AND o.limited
        )
    LOOP
        below := 32768;
        LOOP
            SELECT o.priority, o.available_at, o.id INTO below, from_at, from_id
            FROM outbox AS o
            WHERE o.topic = name AND o.state = 'ready' AND NOT o.blocked AND o.priority < below
            ORDER BY o.priority DESC, o.available_at, o.id
            LIMIT 1;
            EXIT WHEN NOT FOUND;
            SELECT k.available_at, k.id INTO until_at, until_id
            FROM unnest(known, priorities, ends, end_ids) AS k (topic, priority, available_at, id)
            WHERE k.topic = name AND k.priority = below;
            IF NOT FOUND OR (from_at, from_id) >= (until_at, until_id) THEN
                until_at := from_at;
                until_id := from_id;
            END IF;
            RETURN QUERY
            (
                SELECT name, o.priority, o.available_at::timestamptz, o.id,
                    extract(epoch FROM o.available_at - clock_timestamp())::double precision
                FROM outbox AS o
                WHERE o.topic = name AND o.priority = below AND o.state = 'ready' AND NOT o.blocked
                  AND (o.available_at, o.id) >= (from_at, from_id)
                  AND (o.available_at, o.id) < (until_at, until_id)
                ORDER BY o.available_at, o.id
                LIMIT at_most
            )
            UNION ALL
            (
                SELECT name, o.priority, o.available_at::timestamptz, o.id,
                    extract(epoch FROM o.available_at - clock_timestamp())::double precision
                FROM outbox AS o
                WHERE o.topic = name AND o.priority = below AND o.state = 'ready' AND NOT o.blocked
                  AND (o.available_at, o.id) >= (until_at, until_id)
                ORDER BY o.available_at, o.id
                LIMIT 1
            );
        END LOOP;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox_scout(text[], text[], smallint[], timestamptz[], bigint[], integer) IS
    'What a worker whose looks do not begin at the front does not see: rows before these ends, and the first after each. For the worker.';


-- What a person may do. Each returns the row's new state, null if there was nothing to do.

CREATE FUNCTION outbox_cancel(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    -- A ready row ends at once; a running one when its worker has stopped it.
    UPDATE outbox
    SET cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
        state = CASE state WHEN 'ready' THEN 'cancelled' ELSE state END,
        finished_at = CASE state WHEN 'ready' THEN clock_timestamp() END,
        blocked = false
    WHERE id = row_id AND state IN ('ready', 'running')
    RETURNING state
$$;
COMMENT ON FUNCTION outbox_cancel(bigint) IS
    'Cancels a row: cancelled at once if it waits, running until its worker has stopped it; null if it had ended.';


CREATE FUNCTION outbox_retry(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox
    SET state = 'ready', failures = 0, available_at = clock_timestamp(), cancel_requested_at = NULL,
        finished_at = NULL, blocked = false
    WHERE id = row_id AND state IN ('dead', 'cancelled')
    RETURNING state
$$;
COMMENT ON FUNCTION outbox_retry(bigint) IS
    'Makes a dead or cancelled row ready again with its failures forgiven; its errors stay.';


CREATE FUNCTION outbox_discard(row_id bigint) RETURNS text
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    UPDATE outbox SET state = 'cancelled' WHERE id = row_id AND state || '' = 'dead' RETURNING state
$$;
COMMENT ON FUNCTION outbox_discard(bigint) IS 'Ends a dead row for good: it is kept as cancelled until it is pruned.';

-- What a worker asks when a scan found no row: until when it may sleep, and what its cursor scans do not see.


-- The next moments at which this worker (`looker`) must scan without being told, as intervals from now: a row of its
-- topics falls due, or another worker's lease ends. Zero or less: a due row was only skipped as locked, or a rescue is
-- due. Null: nothing is scheduled, so the worker sleeps until a notification.
CREATE OR REPLACE FUNCTION outbox_next_deadline(
    looker uuid, topics text[], lease interval, connected interval,
    OUT row_due interval, OUT lease_end interval, OUT server_time timestamptz
)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
-- Planned once, as the claim is (docs/profile.md).
SET plan_cache_mode = force_generic_plan
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    first_row   timestamptz;
    first_lease timestamptz;
BEGIN
    server_time := clock_timestamp();

    SELECT min(d.available_at) INTO first_row
    FROM unnest(topics) AS t (name)
    LEFT JOIN topic AS l ON l.name = t.name
    CROSS JOIN LATERAL outbox_priorities(t.name) AS p
    CROSS JOIN LATERAL (
        SELECT o.available_at FROM outbox AS o
        WHERE o.topic = t.name AND o.priority = p.priority AND o.state = 'ready' AND NOT o.blocked
        ORDER BY o.available_at, o.id
        LIMIT 1
    ) AS d
    -- If a limit leaves no room, nothing is due. The end that makes room notifies.
    WHERE l.max_running IS NULL OR l.max_running > (
        SELECT count(*) FROM outbox AS o WHERE o.topic = t.name AND o.state = 'running' AND o.limited
    );

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
    'When this worker must scan again without being told: the next row due, the next lease end.';


-- The background scan (worker/engine/background.py): what claims that begin at the cursors do not see. known and
-- priorities name the lanes, ends and end_ids the cursor of each. For each lane it returns the claimable rows before the
-- cursor, at most at_most of them, and the first row after it. For a lane without a cursor it returns the first row only.
-- It reads each entry of the index once. There may be millions of them, so it runs on a connection that nobody waits for.
-- It is VOLATILE: each statement has a snapshot of its own, so no snapshot is held for the whole time.
CREATE OR REPLACE FUNCTION outbox_scout(
    topics text[], known text[], priorities smallint[], ends timestamptz[], end_ids bigint[], at_most integer
) RETURNS TABLE (topic text, priority smallint, available_at timestamptz, id bigint, due_in double precision)
LANGUAGE plpgsql VOLATILE ROWS 10
SET search_path = :schema, pg_temp
SET plan_cache_mode = force_generic_plan
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    name     text;
    below    integer; -- the priority that is read; the next one is below it
    from_at  timestamptz;
    from_id  bigint;
    until_at timestamptz;
    until_id bigint;
BEGIN
    FOR name IN
        SELECT t.name
        FROM unnest(topics) AS t (name)
        LEFT JOIN topic AS l ON l.name = t.name
        -- If a limit leaves no room, nothing is due. The end that makes room notifies.
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
    'What a worker whose scans begin at cursors does not see: rows before these cursors, and the first row after each. For the worker.';

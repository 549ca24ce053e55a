-- How parked workers are woken. worker/engine/parking.py has the protocol: its steps, and why no wake-up is lost. This
-- file is the database's half of it.
--
-- Channel :schema_wake has these payloads:
--   "TOPIC@MS"                a row of TOPIC ("*": of any topic) may be claimed from MS on: milliseconds of the Unix epoch
--                             by this server's clock, 0 for now. A sleeper scans at once, or brings its timer forward.
--   "TOPIC@0#ID"              the same, for the single row ID: it has no ordering_key, its statement inserted no other row
--                             of TOPIC, and no statement before it in its transaction inserted any
--   "TOPIC@0#ID,PRESENCE,N"   the same, and names the worker that is to take the row, one of N (worker/engine/backup.py)
--   "#ID@0"                   for worker ID alone: its life was ended, or its flag was cleared
-- A payload that a worker does not understand means "scan", because a newer schema may say more.
-- Channel :schema_cancel carries the id of a running row that is to be stopped (commands.sql).
--
-- Advisory locks have two integers. The first derives from the schema's name (outwake/schema.py):
--   :lock_presence  a worker is alive; held by its LISTEN connection; the second integer is worker.presence
--   :lock_key       an ordering_key (order.sql)
--   :lock_topic     a topic's limit (order.sql)
--   :lock_migrate   a migration
--   :lock_watch     a process streams sessions (session/functions/events.sql)
--   :lock_sleepers  the sequence outbox_sleepers


-- VOLATILE, so that in READ COMMITTED each query has a snapshot of its own, taken after the caller's write.
-- `lone` is the row's id, if a sleeper may claim the row by its id. If several workers sleep, one of them is drawn at
-- random and named. So the work is spread, and a worker that hangs is not named each time. `presence` is null for a worker
-- that registered without one. For a topic with a limit no worker is named, because it may find no room, and the others
-- would think that it is absent.
CREATE OR REPLACE FUNCTION outbox_notify(row_topic text, due timestamptz, lone bigint DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
DECLARE
    asleep   integer[];
    sleepers integer;
    named    text;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        asleep := ARRAY(
            SELECT presence FROM worker WHERE parked AND (row_topic = '*' OR row_topic = ANY (topics))
        );
        sleepers := cardinality(asleep);
        IF sleepers = 0 THEN
            RETURN;
        ELSIF sleepers > 1 AND NOT EXISTS (SELECT FROM topic WHERE name = row_topic) THEN
            named := ',' || asleep[1 + floor(random() * sleepers)::integer] || ',' || sleepers;
        END IF;
    END IF;
    PERFORM pg_notify(':schema_wake', row_topic || '@' || CASE
        WHEN due <= clock_timestamp() THEN 0 || coalesce('#' || lone || coalesce(named, ''), '')
        ELSE ceil(extract(epoch FROM due) * 1000)::bigint::text
    END);
END
$$;
COMMENT ON FUNCTION outbox_notify(text, timestamptz, bigint) IS
    'Notifies the parked workers, if there are any, that a row of this topic may be claimed from then on.';


CREATE OR REPLACE FUNCTION outbox_wake() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
    SELECT pg_notify(':schema_wake', '*@0')
$$;
COMMENT ON FUNCTION outbox_wake() IS
    'Wakes every worker. For rows that no trigger saw: logical replication, a restore with triggers off, COMMIT PREPARED.';


-- Clears the sequence if no worker is parked, under the lock under which outbox_writers sets it. A worker that set the
-- sequence earlier has committed its flag earlier, so the query under the lock sees the flag. Another worker sets the
-- sequence afterwards. The subtransaction gives the lock back at once, because the caller's transaction may be long. It
-- does not undo the setval.
CREATE OR REPLACE FUNCTION outbox_all_awake() RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    -- An older snapshot would not show a worker that has parked since.
    IF current_setting('transaction_isolation') = 'read committed' AND pg_try_advisory_xact_lock(:lock_sleepers, 0) THEN
        PERFORM FROM worker WHERE parked;
        IF NOT FOUND THEN
            PERFORM setval('outbox_sleepers', 1, false);
        END IF;
    END IF;
    RAISE SQLSTATE 'OW000';
EXCEPTION
    WHEN SQLSTATE 'OW000' THEN NULL;
END
$$;
COMMENT ON FUNCTION outbox_all_awake() IS
    'If no worker is parked, records that, so that inserts need not look for parked workers. Only in READ COMMITTED.';


-- Every insert pays for this function (docs/profile.md). Every name and operator in it is written with its schema, because
-- a SET search_path would be done and undone in each call. The query for a parked worker is a plain scan, because EXISTS
-- needs a subplan.
CREATE OR REPLACE FUNCTION outbox_inserted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
AS $$
BEGIN
    -- Under load no worker sleeps. Then nothing is notified: the lock of NOTIFY would make all producers commit one by one.
    IF pg_catalog.pg_sequence_last_value(':schema.outbox_sleepers'::pg_catalog.regclass) IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM FROM :schema.worker WHERE parked;
    IF FOUND OR pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
        PERFORM :schema.outbox_notify(
            i.topic::pg_catalog.text,
            pg_catalog.min(i.available_at),
            CASE
                WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) 1 AND pg_catalog.max(i.ordering_key) IS NULL
                    AND coalesce(pg_catalog.current_setting(':schema.named', true), '') OPERATOR(pg_catalog.<>) 'yes'
                THEN pg_catalog.min(i.id)
            END
        )
        FROM inserted AS i
        WHERE i.state OPERATOR(pg_catalog.=) 'ready'
        GROUP BY i.topic;
        -- Later rows of this transaction are not named, so that their payloads are the same: NOTIFY sends equal ones once.
        PERFORM pg_catalog.set_config(':schema.named', 'yes', true);
    ELSE
        PERFORM :schema.outbox_all_awake();
    END IF;
    RETURN NULL;
END
$$;

-- Who sleeps, and how a sleeper is woken. worker/engine/parking.py tells the protocol (parking, step by step, and why no wake-up
-- is lost); here is the database's half of it.
--
-- Channel :schema_wake carries "TOPIC@MS": a row of TOPIC ("*": of any) may be claimed from MS on (milliseconds of the
-- Unix epoch by this server's clock; 0: now). A sleeper looks at once, or only brings its timer forward.
--   "TOPIC@0#ID"              the row ID, without an ordering_key, is the only one that the statement inserted of TOPIC,
--                             and the statement is the first of its transaction that inserts
--   "TOPIC@0#ID,PRESENCE,N"   the same, and names the worker that is to take the row, one of N (worker/engine/backup.py)
--   "#ID@0"                   for worker ID alone: its life was ended, or its flag was cleared
-- A payload that a worker does not understand means "look": a newer schema may say more.
-- Channel :schema_cancel carries the id of a running row that is to be stopped.
--
-- Advisory locks, two-integer form. The first integer derives from the schema's name (outwake/schema.py):
--   :lock_presence  session level, on the LISTEN connection; second integer: worker.presence
--   :lock_key  an ordering_key        :lock_topic  a topic's limit        :lock_migrate  whoever migrates
--   :lock_watch  who streams sessions (session/functions/events.sql)
--   :lock_sleepers  the sequence outbox_sleepers


-- VOLATILE, so that in READ COMMITTED each look has a snapshot of its own, taken after the caller's write.
-- `lone` is the row's id, if a sleeper may claim the row by its id. If several workers sleep, one of them is drawn at
-- random and named: the work is spread, and a worker that hangs is not named each time. `presence` is null for a worker
-- that registered without one. Nobody is named for a topic with a limit: the named worker may find no room, and the
-- others would think that it is absent.
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
    'Tells the parked workers, if there are any, that a row of this topic may be claimed from then on.';


CREATE OR REPLACE FUNCTION outbox_wake() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
    SELECT pg_notify(':schema_wake', '*@0')
$$;
COMMENT ON FUNCTION outbox_wake() IS
    'Wakes every worker. For rows no trigger saw: logical replication, a restore with triggers off, COMMIT PREPARED.';


-- Clears the sequence only under the lock under which outbox_writers sets it, and only if a look under that lock shows
-- no parked worker. A worker that set it before has committed its flag before; another sets it afterwards. The
-- subtransaction gives the lock back at once, as the caller's transaction may be long. It does not undo the setval.
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
    'If no worker is parked, says so to those who insert, so that they need not look. In READ COMMITTED alone.';


-- Every insert pays for this function (docs/profile.md). Every name in it, and every operator, is written with its
-- schema, because a SET search_path would be done and undone in each call. The look is a plain scan, because EXISTS
-- needs a subplan.
CREATE OR REPLACE FUNCTION outbox_inserted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
AS $$
BEGIN
    -- Under load nobody sleeps. Then there is no NOTIFY, whose lock would make all producers commit one by one.
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
        -- Later rows of this transaction are not named, so that their payloads are the same: NOTIFY sends such once.
        PERFORM pg_catalog.set_config(':schema.named', 'yes', true);
    ELSE
        PERFORM :schema.outbox_all_awake();
    END IF;
    RETURN NULL;
END
$$;


-- Keeps a row consistent, whoever wrote it:
--   * A ready row that is to be cancelled ends at once, whether the mark or the readiness came last.
--   * Ended rows have finished_at, others do not.
--   * Only ready rows are blocked, and only behind the key that they have. A row that is given another key is judged
--     anew by the next claim.
-- The functions here write consistent rows. A row that was written otherwise, by hand, is corrected when the statement
-- ends.
--
-- An UPDATE is a producer too, when it makes a row claimable or its time earlier: a retry, a hand-back, a rescue, a
-- freed key, or a person at psql.
--
-- One trigger does both, with one short condition, which claims and completions do not meet: the server parses the
-- condition of a trigger again in every statement that updates a row (docs/profile.md).
--
-- Its name sorts before session_follow's. What follows from a state goes by outbox_settled. So it happens once, with the
-- first of the two writes, and finds that the second was made.
CREATE OR REPLACE FUNCTION outbox_settled(state text, cancel_requested_at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN state = 'ready' AND cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE state END;
COMMENT ON FUNCTION outbox_settled(text, timestamptz) IS
    'The state that a row is in when the statement that wrote it so has ended.';


CREATE OR REPLACE FUNCTION outbox_settle() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    cancelled boolean := outbox_settled(NEW.state, NEW.cancel_requested_at) <> NEW.state;
    unfounded boolean := NEW.blocked
        AND (NEW.state <> 'ready' OR NEW.ordering_key IS DISTINCT FROM OLD.ordering_key);
BEGIN
    IF cancelled OR unfounded OR (NEW.state IN ('ready', 'running')) = (NEW.finished_at IS NOT NULL) THEN
        UPDATE outbox
        SET state = CASE WHEN cancelled THEN 'cancelled' ELSE state END,
            blocked = blocked AND NOT (cancelled OR unfounded),
            finished_at = CASE WHEN cancelled OR state NOT IN ('ready', 'running')
                               THEN coalesce(finished_at, clock_timestamp()) END
        WHERE id = NEW.id AND state = NEW.state;
    END IF;
    IF NEW.topic = 'outbox.prune' AND (cancelled OR NEW.state NOT IN ('ready', 'running')) THEN
        PERFORM outbox_prune_later();
    END IF;
    IF NEW.state = 'ready' AND NOT cancelled AND NOT NEW.blocked
        AND (OLD.state <> 'ready' OR OLD.blocked OR NEW.available_at < OLD.available_at OR NEW.topic <> OLD.topic)
    THEN
        -- Without the row's id, so that NOTIFY sends one payload for an UPDATE of many rows.
        PERFORM outbox_notify(NEW.topic, NEW.available_at);
    END IF;
    RETURN NULL;
END
$$;


-- A row that stops running makes room under its topic's limit.
CREATE OR REPLACE FUNCTION outbox_made_room() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF OLD.state = 'running' AND (TG_OP = 'DELETE' OR NEW.state <> 'running') THEN
        PERFORM outbox_notify(OLD.topic, clock_timestamp());
    END IF;
    RETURN NULL;
END
$$;


-- A limit that is raised or taken away makes room too.
CREATE OR REPLACE FUNCTION topic_changed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM outbox_notify(OLD.name, clock_timestamp());
    RETURN NULL;
END
$$;


-- The mark is durable, so it needs no handshake: a worker that misses the notification reads it at its next renewal.
CREATE OR REPLACE FUNCTION outbox_cancel_requested() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM pg_notify(':schema_cancel', NEW.id::text);
    RETURN NULL;
END
$$;

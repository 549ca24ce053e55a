-- Who is alive, who sleeps, and how a sleeper is woken. The protocol (parking, step by step, and why no
-- wake-up is lost) is told at the head of worker/park.py; here is the database's half of it.
--
-- Channel outwake_wake carries "TOPIC@MS": a row of TOPIC ("*": of any) may be claimed from MS on
-- (milliseconds of the Unix epoch by this server's clock; 0: now). A sleeper looks at once, or only
-- brings its timer forward. "TOPIC@0#ID": that is the row ID, without an ordering_key, the only one that
-- its statement inserted of TOPIC, which is the first of its transaction to insert any; "TOPIC@0#ID,PRESENCE,N"
-- names the worker that is to take it, one of N (worker/standby.py). "#ID@0" is for worker ID alone: its life was
-- ended, or its flag taken down. Channel outwake_cancel carries the id of a running row to be stopped.
--
-- Advisory locks, two-integer form, first integer:
--   1397048886  presence: session level, on the LISTEN connection, second integer worker.presence
--   1397048887  an ordering_key      1397048888  a topic's limit      1397048889  migration
--   1397048890  who watches sessions (sql/0005_events.sql)    1397048891  outbox_sleepers
--   1397048892  a user's sessions, counted

CREATE VIEW worker_present AS
SELECT w.*
FROM worker AS w
WHERE w.ended_at IS NULL
  AND EXISTS (
      SELECT FROM pg_locks AS l
      WHERE l.locktype = 'advisory'
        -- pg_locks shows the whole cluster; presence counts in this database only.
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
        AND l.classid = 1397048886 AND l.objid = w.presence::bigint::oid AND l.objsubid = 2
        AND l.granted
  );
COMMENT ON VIEW worker_present IS 'The workers that are alive: their LISTEN connection holds their presence lock.';


-- VOLATILE, so that in READ COMMITTED each look has a snapshot of its own, taken after the caller's write.
-- `lone`: the row's id, if it is one that a sleeper may take by itself. Of several one is drawn, at random: so the
-- work is spread, and one that hangs is not drawn each time. A presence may be null, of who registered without one.
-- Not of a topic with a limit: there may be no room, and those that stand by would take that for an absence.
CREATE FUNCTION outbox_notify(row_topic text, due timestamptz, lone bigint DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
    PERFORM pg_notify('outwake_wake', row_topic || '@' || CASE
        WHEN due <= clock_timestamp() THEN 0 || coalesce('#' || lone || coalesce(named, ''), '')
        ELSE ceil(extract(epoch FROM due) * 1000)::bigint::text
    END);
END
$$;
COMMENT ON FUNCTION outbox_notify(text, timestamptz, bigint) IS
    'Tells the parked workers, if there are any, that a row of this topic may be claimed from then on.';


CREATE FUNCTION outbox_wake() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
    SELECT pg_notify('outwake_wake', '*@0')
$$;
COMMENT ON FUNCTION outbox_wake() IS
    'Wakes every worker. For rows no trigger saw: logical replication, a restore with triggers off, COMMIT PREPARED.';


-- Raised, it has a last value: somebody may be parked. Down, nobody is, and who inserts need not look. It is read and
-- written as it is now, in every isolation level. Step 2 of parking raises it (outbox_writers); an insert that finds it
-- up and nobody parked takes it down, as outbox_all_awake says.
CREATE SEQUENCE outbox_sleepers;
COMMENT ON SEQUENCE outbox_sleepers IS 'Has a last value while some worker may be parked.';


-- Only under the lock under which it is raised, and only if a look taken under it shows nobody: a worker that raised
-- it before has committed its flag before; another raises it afterwards. Not for the rest of the transaction, which
-- may be long: the subtransaction gives the lock back, and takes nothing of a sequence back.
CREATE FUNCTION outbox_all_awake() RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    -- An older snapshot would not show who has parked since.
    IF current_setting('transaction_isolation') = 'read committed' AND pg_try_advisory_xact_lock(1397048891, 0) THEN
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


-- Each insert pays for this. So every name in it is written with its schema, operators too, in place of a SET
-- search_path, which is done and undone in every call; and the look is a plain scan, not EXISTS, which needs a
-- subplan. Measured, beside 195,000 instructions of the server for an insert without it: 14,000, of which
-- 10,000 for any trigger with a transition table; 26,000 when it looked each time.
CREATE FUNCTION outbox_inserted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
AS $$
BEGIN
    -- Nobody sleeps, the usual case under load: no NOTIFY, whose lock would make the commits of all producers go
    -- one by one.
    IF pg_catalog.pg_sequence_last_value('public.outbox_sleepers'::pg_catalog.regclass) IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM FROM public.worker WHERE parked;
    IF FOUND OR pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
        PERFORM public.outbox_notify(
            i.topic::pg_catalog.text,
            pg_catalog.min(i.available_at),
            CASE
                WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) 1 AND pg_catalog.max(i.ordering_key) IS NULL
                    AND coalesce(pg_catalog.current_setting('outwake.named', true), '') OPERATOR(pg_catalog.<>) 'yes'
                THEN pg_catalog.min(i.id)
            END
        )
        FROM inserted AS i
        WHERE i.state OPERATOR(pg_catalog.=) 'ready'
        GROUP BY i.topic;
        -- The next of this transaction are not named: NOTIFY sends once what is the same.
        PERFORM pg_catalog.set_config('outwake.named', 'yes', true);
    ELSE
        PERFORM public.outbox_all_awake();
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_inserted
    AFTER INSERT ON outbox REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_inserted();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_inserted;


-- Keeps a row true to itself whoever wrote it: a cancelled wait ends at once, whether the mark or the
-- readiness came last; ended rows have a time, others have none; only ready rows are blocked, and only
-- behind the key they have: one that is given another key is judged anew by the next claim. The functions
-- here write such rows; one written by hand that is not is written again when the statement ends.
--
-- And an UPDATE is a producer when it makes a row claimable or its time earlier: a retry, a hand-back, a
-- rescue, a freed key, or a person at psql.
--
-- One trigger for both, with one condition: the row is ready, or it does not have finished_at as its state
-- asks. The server reads a condition from its stored text and compiles it in every statement that updates
-- a row: 4,000 to 6,000 instructions for each part, of 816,000 that a claim of one row took. As two triggers,
-- one of them BEFORE UPDATE, they took 27,000 more. WHEN is short below too, and keeps claims and completions
-- free of any call.
--
-- Its name sorts before session_follow's. What follows from a state goes by outbox_settled: it happens once,
-- with the first of the two writes, and finds the second one made.
CREATE FUNCTION outbox_settled(state text, cancel_requested_at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT CASE WHEN state = 'ready' AND cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE state END
$$;
COMMENT ON FUNCTION outbox_settled(text, timestamptz) IS
    'The state that a row is in when the statement that wrote it so has ended.';

CREATE FUNCTION outbox_settle() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET jit = off SET enable_seqscan = off
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
    IF NEW.state = 'ready' AND NOT cancelled AND NOT NEW.blocked
        AND (OLD.state <> 'ready' OR OLD.blocked OR NEW.available_at < OLD.available_at OR NEW.topic <> OLD.topic)
    THEN
        -- Without its id: of an UPDATE of many rows, NOTIFY sends what is the same once.
        PERFORM outbox_notify(NEW.topic, NEW.available_at);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_settle
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (CASE WHEN NEW.finished_at IS NULL THEN NEW.state <> 'running' ELSE NEW.state >= 'ready' END)
    EXECUTE FUNCTION outbox_settle();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_settle;


-- A row that stops running makes room under its topic's limit.
CREATE FUNCTION outbox_made_room() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    IF OLD.state = 'running' AND (TG_OP = 'DELETE' OR NEW.state <> 'running') THEN
        PERFORM outbox_notify(OLD.topic, clock_timestamp());
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_made_room
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.limited)
    EXECUTE FUNCTION outbox_made_room();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_made_room;

CREATE TRIGGER outbox_made_room_by_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.limited)
    EXECUTE FUNCTION outbox_made_room();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_made_room_by_delete;


-- A limit that is raised or taken away makes room too.
CREATE FUNCTION topic_changed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    PERFORM outbox_notify(OLD.name, clock_timestamp());
    RETURN NULL;
END
$$;

CREATE TRIGGER topic_changed
    AFTER UPDATE OR DELETE ON topic FOR EACH ROW EXECUTE FUNCTION topic_changed();
ALTER TABLE topic ENABLE ALWAYS TRIGGER topic_changed;


-- The end of a row frees its ordering_key: the next row by id may run. So does a row that stops running
-- and stays unfinished (a retry, a hand-back): while it ran, a row with a lower id may have been committed
-- late and been blocked by it; were it left so, each of the two would wait for the other.
-- Both this and the claim (outbox_take_key) decide under the key's lock and in a snapshot taken after it,
-- so that a row is never marked blocked by a claim that missed the end, nor left blocked by an end that
-- missed the mark.
CREATE FUNCTION outbox_free_key() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.blocked AND NEW.state <> 'ready' THEN -- by hand: nothing else blocks such a row
        UPDATE outbox SET blocked = false WHERE id = NEW.id;
    END IF;
    IF OLD.state NOT IN ('ready', 'running')
        OR (TG_OP = 'UPDATE' AND NEW.state IN ('ready', 'running') AND NEW.ordering_key = OLD.ordering_key
            AND NOT (OLD.state = 'running' AND NEW.state = 'ready'))
    THEN
        RETURN NULL;
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'freeing an ordering_key needs READ COMMITTED'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'An older snapshot may not show the row that waits for this one.';
    END IF;
    PERFORM pg_advisory_xact_lock(1397048887, hashtext(OLD.ordering_key));
    UPDATE outbox
    SET blocked = false
    WHERE blocked
      AND id = (
          -- As a range, so that only outbox_key has this order: see outbox_take_key.
          SELECT o.id FROM outbox AS o
          WHERE o.ordering_key >= OLD.ordering_key AND o.ordering_key <= OLD.ordering_key
            AND o.state IN ('ready', 'running')
          ORDER BY o.ordering_key, o.id
          LIMIT 1
      );
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_free_key
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.ordering_key IS NOT NULL)
    EXECUTE FUNCTION outbox_free_key();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_free_key;

CREATE TRIGGER outbox_free_key_by_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.ordering_key IS NOT NULL)
    EXECUTE FUNCTION outbox_free_key();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_free_key_by_delete;


-- The mark is durable, so it needs no handshake: who misses this hears of it at its next renewal.
CREATE FUNCTION outbox_cancel_requested() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('outwake_cancel', NEW.id::text);
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_cancel_requested
    AFTER UPDATE OF cancel_requested_at ON outbox FOR EACH ROW
    WHEN (
        NEW.state = 'running'
        AND NEW.cancel_requested_at IS NOT NULL AND OLD.cancel_requested_at IS NULL
    )
    EXECUTE FUNCTION outbox_cancel_requested();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_cancel_requested;


-- Standing by, step 2 (worker/standby.py).
CREATE FUNCTION outbox_pass_on(ids bigint[]) RETURNS void
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    SELECT outbox_notify(o.topic, o.available_at)
    FROM unnest(ids) AS f (id)
    JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
    WHERE o.state || '' = 'ready'
$$;
COMMENT ON FUNCTION outbox_pass_on(bigint[]) IS
    'Tells the parked workers of rows that the one named for them has no slot for.';


-- Standing by, steps 3 and 4. A row that has been claimed once is not waited for: whatever made it ready again has
-- notified. Who holds the lock of its worker's row claims, and so is awake.
CREATE FUNCTION outbox_stand_in(ids bigint[], named integer[]) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE ROWS 10
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    row_id  bigint;
    absent  integer; -- the presence of the one that was named
    sleeper uuid;
BEGIN
    FOR row_id, absent IN
        SELECT o.id, f.presence
        FROM unnest(ids, named) AS f (id, presence)
        JOIN outbox AS o ON o.id >= f.id AND o.id <= f.id
        WHERE o.state || '' = 'ready' AND o.attempt = 0
    LOOP
        UPDATE worker SET parked = false
        WHERE id IN (
            SELECT w.id FROM worker AS w WHERE w.parked AND w.presence = absent FOR NO KEY UPDATE SKIP LOCKED
        )
        RETURNING id INTO sleeper;
        IF FOUND THEN
            PERFORM pg_notify('outwake_wake', '#' || sleeper || '@0');
        END IF;
        RETURN NEXT row_id;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox_stand_in(bigint[], integer[]) IS
    'Which of these rows still wait, though workers were named for them by presence; takes the flags of those down.';


-- Parking, step 1 (worker/park.py). Also clears the flags of sleepers that died, which would make every
-- producer notify for nothing.
CREATE FUNCTION outbox_park(parker uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    UPDATE worker SET parked = true WHERE id = parker AND ended_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker % has ended', parker USING ERRCODE = 'OW001';
    END IF;
    -- A sleeper may come back while this waits for another's row; the condition is then asked again, of the
    -- new row. Of a join (worker_present, or EXISTS) only that row would be new, the other side as it was, so
    -- that its flag would be taken down while it sleeps. A count is asked anew.
    UPDATE worker
    SET parked = false
    WHERE parked AND id <> parker
      AND 0 = (
          SELECT count(*) FROM pg_locks AS l
          WHERE l.locktype = 'advisory' AND l.granted
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.classid = 1397048886 AND l.objid = worker.presence::bigint::oid AND l.objsubid = 2
      );
END
$$;
COMMENT ON FUNCTION outbox_park(uuid) IS 'Parking, step 1: says that this worker sleeps, so that producers notify.';


-- Parking, step 2. Only granted locks: who still waits for the lock has its look before it. First of all, who
-- inserts has to look again: a lock held to the end keeps outbox_all_awake from a look that it took before.
CREATE FUNCTION outbox_writers() RETURNS text[]
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(1397048891, 0);
    PERFORM nextval('outbox_sleepers');
    RETURN (
        SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
        FROM pg_locks AS l
        WHERE l.locktype = 'relation' AND l.granted
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.relation = 'public.outbox'::regclass
          AND l.mode = 'RowExclusiveLock'
          AND l.pid IS DISTINCT FROM pg_backend_pid() -- null: a prepared transaction
    );
END
$$;
COMMENT ON FUNCTION outbox_writers() IS
    'Parking, step 2: the transactions that may have written to outbox and not committed yet.';

-- Order and limits. One row of an ordering_key runs at a time, by id. No more rows of a limited topic run than its limit.


-- The end of a row frees its ordering_key: the next row by id may run. A row that stops running and stays unfinished (a
-- retry, a hand-back) frees its key too. While it ran, a row with a lower id may have been committed late and been blocked
-- by it. If that row stayed blocked, each of the two would wait for the other.
-- This function and the claim (outbox_take_key) both decide under the key's lock, in a snapshot taken after it. So no claim
-- that missed the end marks a row blocked, and no end that missed the mark leaves a row blocked.
CREATE OR REPLACE FUNCTION outbox_free_key() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.blocked AND NEW.state <> 'ready' THEN -- only a person at psql blocks such a row
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
    PERFORM pg_advisory_xact_lock(:lock_key, hashtext(OLD.ordering_key));
    UPDATE outbox
    SET blocked = false
    WHERE blocked
      AND id = (
          SELECT o.id FROM outbox AS o
          WHERE o.ordering_key >= OLD.ordering_key AND o.ordering_key <= OLD.ordering_key
            AND o.state IN ('ready', 'running')
          ORDER BY o.ordering_key, o.id
          LIMIT 1
      );
    RETURN NULL;
END
$$;


-- Whether this row of an ordering_key may start. A claim calls it for a row that it has locked.
-- 1. Try the key's lock. If another transaction holds it, that transaction is deciding about this key. The row stays due,
--    and a later scan finds it.
-- 2. Look for a row that comes first: a row of the key that runs, or an unfinished row with a lower id. This needs a
--    snapshot taken after the lock, so it is a statement of its own: the claim's snapshot is older.
-- 3. If there is such a row, mark this row blocked. That takes it out of the claim's index, until the end of the other row
--    clears the mark (outbox_free_key).
CREATE OR REPLACE FUNCTION outbox_take_key(key text, row_id bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(:lock_key, hashtext(key)) THEN
        RETURN false;
    END IF;
    -- Each of the two queries reads one row of an index. One EXISTS with "a lower id, or running" would read the whole
    -- queue of a key.
    IF (
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key >= key AND o.ordering_key <= key AND o.state IN ('ready', 'running')
        ORDER BY o.ordering_key, o.id
        LIMIT 1
    ) < row_id OR EXISTS (
        SELECT FROM outbox AS o
        WHERE o.ordering_key = key AND o.state = 'running' AND o.id <> row_id
    ) THEN
        -- Marks all rows that wait behind it too. Otherwise claims would read a long queue of one key row by row. This
        -- never waits. A row that another claim has locked is marked by the claim that meets it next.
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


-- How many rows of a limited topic may start. They are counted under the topic's lock and in a snapshot taken after it.
-- Otherwise two workers would count the same free place.
CREATE OR REPLACE FUNCTION outbox_topic_room(name text, max_running integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(:lock_topic, hashtext(name)) THEN
        RETURN 0;
    END IF;
    RETURN greatest(0, max_running - (
        SELECT count(*) FROM outbox AS o WHERE o.topic = name AND o.state = 'running' AND o.limited
    ));
END
$$;
COMMENT ON FUNCTION outbox_topic_room(text, integer) IS
    'How many rows of a limited topic may start; takes the topic''s lock until commit. For the claim.';


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

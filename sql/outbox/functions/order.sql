-- Order and limits: of an ordering_key one row runs at a time, by id; of a limited topic no more than its limit.


-- The end of a row frees its ordering_key: the next row by id may run. So does a row that stops running
-- and stays unfinished (a retry, a hand-back): while it ran, a row with a lower id may have been committed
-- late and been blocked by it; were it left so, each of the two would wait for the other.
-- Both this and the claim (outbox_take_key) decide under the key's lock and in a snapshot taken after it,
-- so that a row is never marked blocked by a claim that missed the end, nor left blocked by an end that
-- missed the mark.
CREATE OR REPLACE FUNCTION outbox_free_key() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
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
-- 1. Try the key's lock. If another transaction holds it, that one is deciding about this key. The row stays due, and
--    is looked at again.
-- 2. In a snapshot taken after that (so there are two statements; the claim's own snapshot is older): a row of the key
--    that runs, or an unfinished row with a lower id, comes first. Then mark this row blocked. That takes it out of the
--    claim's index until the end of the other row clears the mark (outbox_free_key).
CREATE OR REPLACE FUNCTION outbox_take_key(key text, row_id bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(:lock_key, hashtext(key)) THEN
        RETURN false;
    END IF;
    -- Each asks an index for one row. One EXISTS with "a lower id, or running" would read the whole queue of a key.
    IF (
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key >= key AND o.ordering_key <= key AND o.state IN ('ready', 'running')
        ORDER BY o.ordering_key, o.id
        LIMIT 1
    ) < row_id OR EXISTS (
        SELECT FROM outbox AS o
        WHERE o.ordering_key = key AND o.state = 'running' AND o.id <> row_id
    ) THEN
        -- All rows that wait behind it too, else claims would read a long queue of one key row by row. This never
        -- waits: a row that another claim has locked is marked by the claim that meets it next.
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


-- How many rows of a limited topic may start. They are counted under the topic's lock and in a snapshot taken after it,
-- else two workers would count the same free place.
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

-- A session is notified only while somebody watches it. Channel :schema_session carries the session's id. A process that
-- begins to watch takes the steps of a worker that parks (outwake/_handshake.py tells why no event is lost):
-- 1. Commit a row in watcher.
-- 2. Note the transactions that write to message, prompt or session now.
-- 3. Read until they have ended.
-- 4. Read once more.
-- 5. Wait for notifications.
--
-- A commit that notifies holds a lock of the whole server while it waits for the disk. So such commits go one after the
-- other. Therefore a worker stores messages in one transaction and notifies in the next, which writes nothing and waits
-- for no disk. If the worker dies between the two, its row is rescued. The rescue changes the prompt's status, and that
-- notifies.


-- Stores what the agent printed, fenced: locks the outbox row, then numbers the messages from the session's last.
--   fenced        the attempt is not the caller's any more, and nothing was written
--   after_seq     lets the caller repeat a write whose answer was lost. It is the last_seq that the caller's last write
--                 returned, or 0 for the first write of its attempt. If the session is past it, this batch is stored
--                 already, because nobody else writes to a session while the caller's row runs. Null: append in any case.
--   notify_later  nothing is notified here. If watched is true, the caller calls session_notify after its commit, as
--                 worker/messages.py does.
-- The first write of a new attempt puts a superseded event before its own: what the earlier attempt said for this prompt
-- no longer counts.
CREATE OR REPLACE FUNCTION message_append(
    holder uuid, row_id bigint, row_attempt integer,
    of_session uuid, of_prompt uuid, bodies jsonb[], after_seq bigint DEFAULT NULL,
    notify_later boolean DEFAULT false,
    OUT fenced boolean, OUT cancel boolean, OUT last_seq bigint, OUT watched boolean
)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    latest integer;
BEGIN
    cancel := outbox_fence(holder, row_id, row_attempt);
    fenced := cancel IS NULL;
    IF fenced THEN
        RETURN;
    END IF;

    SELECT s.last_seq INTO last_seq FROM session AS s WHERE s.id = of_session FOR NO KEY UPDATE;
    SELECT m.attempt INTO latest FROM message AS m
    WHERE m.prompt_id = of_prompt ORDER BY m.attempt DESC LIMIT 1;
    IF (after_seq > 0 AND last_seq > after_seq) OR (after_seq = 0 AND latest = row_attempt) THEN
        watched := session_watched(of_session);
        RETURN;
    END IF;

    IF latest < row_attempt THEN
        bodies := array_prepend(
            jsonb_build_object('type', 'superseded', 'attempt', latest), bodies);
    END IF;

    UPDATE session AS s
    SET last_seq = s.last_seq + cardinality(bodies)
    WHERE s.id = of_session
    RETURNING s.last_seq INTO last_seq;
    IF notify_later THEN
        PERFORM set_config(':schema.notify_later', 'on', true);
    END IF;
    INSERT INTO message (session_id, seq, prompt_id, attempt, body)
    SELECT of_session, last_seq - cardinality(bodies) + b.place, of_prompt, row_attempt, b.body
    FROM unnest(bodies) WITH ORDINALITY AS b (body, place)
    ORDER BY b.place;
    IF notify_later THEN
        PERFORM set_config(':schema.notify_later', 'off', true);
    END IF;
    -- This comes last. A process that begins to watch after this query finds us among the writers.
    watched := session_watched(of_session);
END
$$;
COMMENT ON FUNCTION message_append(uuid, bigint, integer, uuid, uuid, jsonb[], bigint, boolean) IS
    'Stores an agent''s events in order, fenced by the attempt of the outbox row.';


-- VOLATILE, so that it has a snapshot of its own, taken after the caller's write. In REPEATABLE READ and SERIALIZABLE it
-- has none, so it returns true.
CREATE OR REPLACE FUNCTION session_watched(of_session uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    RETURN current_setting('transaction_isolation') <> 'read committed'
        OR EXISTS (SELECT FROM watcher WHERE session_id = of_session);
END
$$;
COMMENT ON FUNCTION session_watched(uuid) IS 'Whether anybody may be streaming this session.';


CREATE OR REPLACE FUNCTION session_notify(of_session uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF session_watched(of_session) THEN
        PERFORM pg_notify(':schema_session', of_session::text);
    END IF;
END
$$;
COMMENT ON FUNCTION session_notify(uuid) IS
    'Notifies the processes that stream this session, if there are any, that there is something new.';


CREATE OR REPLACE FUNCTION message_inserted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF current_setting(':schema.notify_later', true) = 'on' THEN -- set by message_append
        RETURN NULL;
    END IF;
    PERFORM session_notify(i.session_id) FROM (SELECT DISTINCT session_id FROM inserted) AS i;
    RETURN NULL;
END
$$;


CREATE OR REPLACE FUNCTION session_changed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM session_notify(CASE TG_TABLE_NAME WHEN 'session' THEN (to_jsonb(NEW) ->> 'id')::uuid
                                              ELSE (to_jsonb(NEW) ->> 'session_id')::uuid END);
    RETURN NULL;
END
$$;


-- Step 1 of watching. Also deletes the watches of processes that died.
CREATE OR REPLACE FUNCTION session_watch(watched uuid[], by_presence integer) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    INSERT INTO watcher (session_id, presence)
    SELECT w.id, by_presence FROM unnest(watched) AS w (id)
    ON CONFLICT DO NOTHING;
    DELETE FROM watcher
    WHERE presence <> by_presence
      AND NOT EXISTS (
          SELECT FROM pg_locks AS l
          WHERE l.locktype = 'advisory'
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND l.classid = :lock_watch AND l.objid = watcher.presence::bigint::oid AND l.objsubid = 2
      );
END
$$;
COMMENT ON FUNCTION session_watch(uuid[], integer) IS 'Marks sessions as watched, so that what happens to them is notified.';


CREATE OR REPLACE FUNCTION session_writers() RETURNS text[]
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
    FROM pg_locks AS l
    WHERE l.locktype = 'relation' AND l.granted
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND l.relation IN (':schema.message'::regclass, ':schema.prompt'::regclass, ':schema.session'::regclass)
      AND l.mode = 'RowExclusiveLock'
      AND l.pid IS DISTINCT FROM pg_backend_pid()
$$;
COMMENT ON FUNCTION session_writers() IS
    'The transactions that may have changed sessions or messages and not committed yet.';

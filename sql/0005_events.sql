-- Live events obey the outbox's economy: a session is notified only while somebody watches it. To begin
-- to watch is to park (worker/park.py tells why no event is lost): 1. a row here, committed; 2. note the
-- transactions that write to message, prompt or session now; 3. read until they have ended; 4. read once
-- more; 5. wait for notifications. Channel outwake_session carries the session's id.
--
-- A commit that notifies holds a lock of the whole server while it waits for the disk: all of them together
-- are no more than one commit after the other, 200 to 1,000 a second. So a worker notifies in a transaction
-- of its own after that of its messages, which writes nothing and waits for no disk. A worker that dies
-- in between is rescued; that changes the prompt's status, which notifies.

CREATE UNLOGGED TABLE watcher (
    session_id uuid NOT NULL,
    presence   integer NOT NULL,
    PRIMARY KEY (session_id, presence)
);
COMMENT ON TABLE watcher IS
    'Sessions that an API process streams. Unlogged: a crash of the server ends every stream, and they come back.';
COMMENT ON COLUMN watcher.session_id IS 'The session that is streamed.';
COMMENT ON COLUMN watcher.presence IS 'The advisory lock (1397048890, presence) that the process holds.';


-- VOLATILE, for a snapshot of its own, taken after the caller's write; where it has none, for sure.
CREATE FUNCTION session_watched(of_session uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    RETURN current_setting('transaction_isolation') <> 'read committed'
        OR EXISTS (SELECT FROM watcher WHERE session_id = of_session);
END
$$;
COMMENT ON FUNCTION session_watched(uuid) IS 'Whether anybody may be streaming this session.';

CREATE FUNCTION session_notify(of_session uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    IF session_watched(of_session) THEN
        PERFORM pg_notify('outwake_session', of_session::text);
    END IF;
END
$$;
COMMENT ON FUNCTION session_notify(uuid) IS
    'Tells whoever streams this session, if anybody does, that there is something new.';

CREATE FUNCTION message_inserted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    IF current_setting('outwake.notify_later', true) = 'on' THEN -- set by message_append
        RETURN NULL;
    END IF;
    PERFORM session_notify(i.session_id) FROM (SELECT DISTINCT session_id FROM inserted) AS i;
    RETURN NULL;
END
$$;

CREATE TRIGGER message_inserted
    AFTER INSERT ON message REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION message_inserted();
ALTER TABLE message ENABLE ALWAYS TRIGGER message_inserted;

CREATE FUNCTION session_changed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    PERFORM session_notify(CASE TG_TABLE_NAME WHEN 'session' THEN (to_jsonb(NEW) ->> 'id')::uuid
                                              ELSE (to_jsonb(NEW) ->> 'session_id')::uuid END);
    RETURN NULL;
END
$$;

CREATE TRIGGER session_changed
    AFTER UPDATE ON session FOR EACH ROW
    WHEN ((NEW.inbox_status, NEW.session_status, NEW.title)
          IS DISTINCT FROM (OLD.inbox_status, OLD.session_status, OLD.title))
    EXECUTE FUNCTION session_changed();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_changed;

CREATE TRIGGER prompt_added
    AFTER INSERT ON prompt FOR EACH ROW EXECUTE FUNCTION session_changed();
ALTER TABLE prompt ENABLE ALWAYS TRIGGER prompt_added;

CREATE TRIGGER prompt_changed
    AFTER UPDATE ON prompt FOR EACH ROW
    WHEN (NEW.status <> OLD.status)
    EXECUTE FUNCTION session_changed();
ALTER TABLE prompt ENABLE ALWAYS TRIGGER prompt_changed;


-- Begins to watch: step 1. Also forgets the watches of processes that died.
CREATE FUNCTION session_watch(watched uuid[], by_presence integer) RETURNS void
LANGUAGE plpgsql VOLATILE
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
            AND l.classid = 1397048890 AND l.objid = watcher.presence::bigint::oid AND l.objsubid = 2
      );
END
$$;
COMMENT ON FUNCTION session_watch(uuid[], integer) IS 'Marks sessions as watched, so that what happens to them is notified.';

CREATE FUNCTION session_writers() RETURNS text[]
LANGUAGE sql VOLATILE
AS $$
    SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
    FROM pg_locks AS l
    WHERE l.locktype = 'relation' AND l.granted
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND l.relation IN ('public.message'::regclass, 'public.prompt'::regclass, 'public.session'::regclass)
      AND l.mode = 'RowExclusiveLock'
      AND l.pid IS DISTINCT FROM pg_backend_pid()
$$;
COMMENT ON FUNCTION session_writers() IS
    'The transactions that may have changed sessions or messages and not committed yet.';

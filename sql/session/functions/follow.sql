-- The consequences of a new state of a row of topic session.run. They are the same if a handler, a rescue or a person at
-- psql has set it.


-- A row that was typed into psql may name nonsense. Then this returns null, and the row's handler reports it. The insert
-- does not check it, because every insert of any topic would pay for the check (docs/profile.md).
CREATE OR REPLACE FUNCTION payload_uuid(payload jsonb, name text) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN payload ->> name LIKE '________-____-____-____-____________' AND payload ->> name !~ '[^0-9A-Fa-f-]'
        AND length(replace(payload ->> name, '-', '')) = 32
    THEN (payload ->> name)::uuid
    END;
COMMENT ON FUNCTION payload_uuid(jsonb, text) IS 'The UUID that a payload has under this name, if it is one.';


-- The consequences, in the transaction that set the state, when the outbox row is locked:
-- 1. The prompt follows the row.
-- 2. The session follows its rows.
-- 3. If nothing is left to run and the session still holds a sandbox, a row of topic sandbox.return is enqueued.
-- 4. If the row ended, the next row of the same user moves up (fair.sql).
-- 5. If the row ended, webhooks are enqueued (webhook.sql). This has no trigger of its own, because every statement that
--    updates a row would pay for its condition.
CREATE OR REPLACE FUNCTION session_follow() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    of_session uuid := payload_uuid(OLD.payload, 'session_id');
    of_prompt  uuid := payload_uuid(OLD.payload, 'prompt_id');
    was_state  text := outbox_settled(OLD.state, OLD.cancel_requested_at);
    now_state  text := CASE WHEN TG_OP = 'DELETE' THEN 'cancelled'
                               ELSE outbox_settled(NEW.state, NEW.cancel_requested_at) END;
    held       jsonb;
    owner      text;
    next_status text;
    keep_until timestamptz;
BEGIN
    IF TG_OP = 'UPDATE' AND now_state = was_state THEN
        RETURN NULL;
    END IF;
    -- The lock comes first, and each statement after it has a new snapshot. So a transaction that changes another row of
    -- this session comes wholly before or wholly after this one.
    SELECT sandbox, user_id INTO held, owner FROM session WHERE id = of_session FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;

    IF of_prompt IS NOT NULL THEN
        UPDATE prompt
        SET status = CASE now_state
                WHEN 'ready' THEN 'queued'
                WHEN 'running' THEN 'running'
                WHEN 'done' THEN 'succeeded'
                WHEN 'cancelled' THEN 'cancelled'
                ELSE 'failed'
            END,
            reason = CASE now_state
                WHEN 'dead' THEN coalesce(NEW.errors -> -1 ->> 'error', 'given up')
                WHEN 'cancelled' THEN 'cancelled'
            END,
            started_at = CASE WHEN now_state = 'running' THEN coalesce(started_at, clock_timestamp())
                              ELSE started_at END,
            finished_at = CASE WHEN now_state IN ('ready', 'running') THEN NULL
                               ELSE clock_timestamp() END
        WHERE id = of_prompt
          -- An ended prompt changes again only when a person retries its row; a handler's own verdict
          -- (succeeded or failed, with its reason) stands when its row ends as done.
          AND (status IN ('queued', 'running') OR now_state = 'ready');
    END IF;

    SELECT CASE max(CASE o.state WHEN 'running' THEN 2 ELSE 1 END) WHEN 2 THEN 'pending' WHEN 1 THEN 'active'
                ELSE 'completed' END
    INTO next_status
    FROM outbox AS o
    WHERE o.ordering_key = 'session:' || of_session AND o.state IN ('ready', 'running');

    -- A turn that was carried out may leave its sandbox to the next one for a while.
    IF now_state = 'done' THEN
        keep_until := clock_timestamp() + (held ->> 'keep')::float8 * interval '1 second';
    END IF;
    UPDATE session
    SET inbox_status = CASE WHEN session_status = 'archived' THEN 'archived' ELSE next_status END,
        sandbox = CASE
            WHEN keep_until IS NOT NULL THEN sandbox || jsonb_build_object('keep_until', keep_until)
            WHEN next_status <> 'completed' THEN sandbox
        END,
        updated_at = clock_timestamp()
    WHERE id = of_session;

    IF next_status = 'completed' AND held IS NOT NULL THEN
        INSERT INTO outbox (topic, ordering_key, payload, available_at, traceparent, max_attempts)
        VALUES (
            'sandbox.return', NULL,
            jsonb_build_object('session_id', of_session, 'sandbox', held),
            coalesce(keep_until, clock_timestamp()),
            OLD.traceparent,
            32767); -- never gives up
    END IF;
    IF was_state IN ('ready', 'running') AND now_state NOT IN ('ready', 'running') THEN
        PERFORM session_tell_end(of_session, of_prompt, OLD.traceparent);
        PERFORM session_moves_up(owner, OLD.priority);
    END IF;
    RETURN NULL;
END
$$;

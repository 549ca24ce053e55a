-- Who may do and see what: API tokens, what a person sees who reads the tables by SQL, and webhooks.

CREATE TABLE api_token (
    id           uuid PRIMARY KEY DEFAULT uuid_v7(),
    user_id      text NOT NULL,
    name         text NOT NULL,
    operator     boolean NOT NULL DEFAULT false,
    hash         bytea NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz,
    CONSTRAINT api_token_hash UNIQUE (hash),
    CONSTRAINT api_token_hash_length CHECK (length(hash) = 32),
    CONSTRAINT api_token_user_length CHECK (length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT api_token_name_length CHECK (length(name) BETWEEN 1 AND 200)
);
COMMENT ON TABLE api_token IS 'API tokens, for machines. Made and revoked by `outwake token`.';
COMMENT ON COLUMN api_token.user_id IS 'Whom it stands for.';
COMMENT ON COLUMN api_token.name IS 'What it is for, for a person to read.';
COMMENT ON COLUMN api_token.operator IS 'Whether it sees everybody''s sessions, and the outbox.';
COMMENT ON COLUMN api_token.hash IS 'SHA-256 of the token; 256 random bits need no slow hash (outwake/token.py).';
COMMENT ON COLUMN api_token.expires_at IS 'Refused from then on; null: never.';
COMMENT ON COLUMN api_token.revoked_at IS 'Refused since then.';
COMMENT ON COLUMN api_token.last_used_at IS 'When it was last used, to a minute; null: never.';


-- Row-level security. It holds members of outwake_reader who are not members of outwake_operator; whoever
-- else was granted a table sees all of it, and the tables' owner, as API and workers are, is not asked.
--
-- A reader sees what belongs to one user: the one that sql_reader binds the role to, and only for a role
-- that is not bound the one named by the setting outwake.user_id. Anybody may SET that: it is a filter for
-- a trusted program that reads for many, not a wall. Where people type SQL, bind their roles.
CREATE TABLE sql_reader (
    role_name name PRIMARY KEY,
    user_id   text NOT NULL,
    CONSTRAINT sql_reader_user_length CHECK (length(user_id) BETWEEN 1 AND 255)
);
COMMENT ON TABLE sql_reader IS 'Binds a database role that is a member of outwake_reader to a user.';
COMMENT ON COLUMN sql_reader.role_name IS 'The role.';
COMMENT ON COLUMN sql_reader.user_id IS 'Whose sessions it sees, whatever it sets.';

-- The role is an argument: inside a SECURITY DEFINER function current_user is the definer.
CREATE FUNCTION sql_reader_user(reader name) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
    SELECT coalesce(
        (SELECT r.user_id FROM sql_reader AS r WHERE r.role_name = reader),
        nullif(current_setting('outwake.user_id', true), ''))
$$;
COMMENT ON FUNCTION sql_reader_user(name) IS 'Whose sessions this database role sees.';

CREATE FUNCTION sql_sees_all() RETURNS boolean
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(bool_or(r.rolname = 'outwake_operator'), false)
        OR NOT coalesce(bool_or(r.rolname = 'outwake_reader'), false)
    FROM pg_catalog.pg_roles AS r
    WHERE r.rolname IN ('outwake_reader', 'outwake_operator')
      AND pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER')
$$;
COMMENT ON FUNCTION sql_sees_all() IS 'Whether this database role is not held to one user.';

-- Each SELECT in parentheses is worked out once a statement, not once a row.
ALTER TABLE session ENABLE ROW LEVEL SECURITY;
CREATE POLICY session_of_user ON session
    USING ((SELECT sql_sees_all()) OR user_id = (SELECT sql_reader_user(current_user)));

ALTER TABLE prompt ENABLE ROW LEVEL SECURITY;
CREATE POLICY prompt_of_user ON prompt
    USING ((SELECT sql_sees_all()) OR session_id IN (SELECT s.id FROM session AS s));

ALTER TABLE message ENABLE ROW LEVEL SECURITY;
CREATE POLICY message_of_user ON message
    USING ((SELECT sql_sees_all()) OR session_id IN (SELECT s.id FROM session AS s));

ALTER TABLE idempotency ENABLE ROW LEVEL SECURITY;
CREATE POLICY idempotency_of_user ON idempotency
    USING ((SELECT sql_sees_all()) OR user_id = (SELECT sql_reader_user(current_user)));

ALTER TABLE watcher ENABLE ROW LEVEL SECURITY;
CREATE POLICY watcher_of_user ON watcher
    USING ((SELECT sql_sees_all()) OR session_id IN (SELECT s.id FROM session AS s));

ALTER TABLE session_memory ENABLE ROW LEVEL SECURITY;
CREATE POLICY session_memory_of_user ON session_memory
    USING ((SELECT sql_sees_all()) OR session_id IN (SELECT s.id FROM session AS s));

ALTER TABLE sandbox_borrow ENABLE ROW LEVEL SECURITY;
CREATE POLICY sandbox_borrow_of_user ON sandbox_borrow
    USING ((SELECT sql_sees_all()) OR session_id IN (SELECT s.id FROM session AS s));

-- Rows of other topics belong to nobody. As text: a payload may hold anything. Anybody who was granted an
-- INSERT may enqueue.
ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;
CREATE POLICY outbox_of_user ON outbox
    USING ((SELECT sql_sees_all()) OR payload ->> 'session_id' IN (SELECT s.id::text FROM session AS s))
    WITH CHECK (true);

-- Nobody but their owner reads these.
ALTER TABLE api_token ENABLE ROW LEVEL SECURITY;
ALTER TABLE sql_reader ENABLE ROW LEVEL SECURITY;

-- A view is read with its owner's rights, past all of this, unless it says otherwise.
DO $$
DECLARE
    found regclass;
BEGIN
    FOR found IN
        SELECT c.oid::regclass FROM pg_class AS c
        WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace
          AND c.relname ~ '^(outbox|session|worker|sandbox|message|prompt)_'
    LOOP
        EXECUTE format('ALTER VIEW %s SET (security_invoker = true)', found);
    END LOOP;
END
$$;


-- Webhooks. A turn that ends, and a session that has nothing left to do or is archived, are events for the
-- session's callback_url: rows of topic webhook.deliver, written in the transaction that ended them,
-- whoever did. One session's are delivered in order. What is sent is written here, so that it tells how
-- things were then; the id is the webhook-id, the same however often it is tried.
CREATE FUNCTION webhook_enqueue(s session, event_type text, of_prompt prompt, trace text) RETURNS void
LANGUAGE sql VOLATILE
AS $$
    INSERT INTO outbox (topic, ordering_key, payload, traceparent, max_attempts)
    VALUES (
        'webhook.deliver', 'webhook:' || s.id,
        jsonb_build_object(
            'session_id', s.id, 'url', s.callback_url, 'id', 'msg_' || gen_random_uuid(),
            'event', jsonb_build_object(
                'type', event_type,
                'timestamp', clock_timestamp(),
                'data', jsonb_build_object(
                    'session_id', s.id, 'title', s.title, 'repo', s.repo, 'branch', s.branch,
                    'inbox_status', s.inbox_status, 'session_status', s.session_status)
                    || CASE WHEN of_prompt.id IS NULL THEN '{}' ELSE jsonb_build_object(
                        'prompt', jsonb_build_object(
                            'id', of_prompt.id, 'status', of_prompt.status, 'reason', of_prompt.reason))
                    END)),
        trace, 20)
$$;
COMMENT ON FUNCTION webhook_enqueue(session, text, prompt, text) IS
    'Writes the row that delivers an event to the session''s callback_url.';

-- Called by session_follow: prompt and session have followed the row by now.
CREATE FUNCTION session_tell_end(of_session uuid, of_prompt uuid, trace text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    s session;
    p prompt;
BEGIN
    SELECT * INTO s FROM session WHERE id = of_session AND callback_url IS NOT NULL;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT * INTO p FROM prompt WHERE id = of_prompt;
    IF p.status IN ('succeeded', 'failed', 'cancelled') THEN
        PERFORM webhook_enqueue(s, 'prompt.' || p.status, p, trace);
    END IF;
    IF s.inbox_status = 'completed' THEN
        PERFORM webhook_enqueue(s, 'session.completed', NULL, trace);
    END IF;
END
$$;
COMMENT ON FUNCTION session_tell_end(uuid, uuid, text) IS
    'Enqueues the webhooks for the end of a turn, if its session has a callback_url.';

CREATE FUNCTION session_webhook_archived() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    PERFORM webhook_enqueue(NEW, 'session.archived', NULL, NULL);
    RETURN NULL;
END
$$;

CREATE TRIGGER session_webhook_archived
    AFTER UPDATE ON session FOR EACH ROW
    WHEN (NEW.callback_url IS NOT NULL
          AND OLD.session_status = 'active' AND NEW.session_status = 'archived')
    EXECUTE FUNCTION session_webhook_archived();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_webhook_archived;


-- Of what has been made since then.
SELECT outwake_grant();

-- What the API writes, and sessions, prompts, messages and rows as it shows them.
--
-- A session's rows share the ordering_key 'session:ID', so its turns run one at a time, in order.


CREATE OR REPLACE FUNCTION session_json(s session) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'id', s.id, 'user_id', s.user_id, 'repo', s.repo, 'target_branch', s.target_branch,
    'branch', s.branch, 'title', s.title, 'parent', s.parent, 'callback_url', s.callback_url,
    'inbox_status', s.inbox_status, 'session_status', s.session_status,
    'created_at', s.created_at, 'updated_at', s.updated_at);
COMMENT ON FUNCTION session_json(session) IS 'A session as the HTTP API shows it.';


CREATE OR REPLACE FUNCTION prompt_json(p prompt) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'id', p.id, 'session_id', p.session_id, 'text', p.text, 'status', p.status,
    'reason', p.reason, 'result', p.result, 'created_at', p.created_at,
    'started_at', p.started_at, 'finished_at', p.finished_at, 'retrying', NULL);
COMMENT ON FUNCTION prompt_json(prompt) IS 'A prompt as the HTTP API shows it.';


CREATE OR REPLACE FUNCTION message_json(
    seq bigint, prompt_id uuid, attempt integer, body jsonb, created_at timestamptz
) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'seq', seq, 'prompt_id', prompt_id, 'attempt', attempt, 'body', body, 'created_at', created_at);
COMMENT ON FUNCTION message_json(bigint, uuid, integer, jsonb, timestamptz) IS
    'A message as the HTTP API and its event stream show it.';


CREATE OR REPLACE FUNCTION outbox_json(o outbox) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'id', o.id, 'topic', o.topic, 'ordering_key', o.ordering_key,
    'payload', CASE jsonb_typeof(o.payload -> 'sandbox')
        WHEN 'object' THEN o.payload #- '{sandbox,borrow_token}' -- a secret
        ELSE o.payload END,
    'state', o.state, 'priority', o.priority, 'attempt', o.attempt, 'failures', o.failures,
    'max_attempts', o.max_attempts, 'worker_id', o.worker_id, 'unique_key', o.unique_key,
    'errors', o.errors, 'available_at', o.available_at,
    'cancel_requested_at', o.cancel_requested_at, 'created_at', o.created_at,
    'started_at', o.started_at, 'finished_at', o.finished_at);
COMMENT ON FUNCTION outbox_json(outbox) IS 'A row of the outbox as the HTTP API shows it to operators.';


-- Counts under a lock of the user's, in a statement of its own, so that of two sessions at the same time the second sees
-- the first. The lock is a row of ours, which a few users share, because any role may take an advisory lock.
CREATE OR REPLACE FUNCTION session_unfinished(of_user text) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    PERFORM FROM session_admission AS a WHERE a.slot = (hashtext(of_user) & 1023) FOR NO KEY UPDATE;
    RETURN (
        SELECT count(*) FROM session AS s
        WHERE s.user_id = of_user AND (s.inbox_status IN ('active', 'pending')) IS TRUE);
END
$$;
COMMENT ON FUNCTION session_unfinished(text) IS
    'How many unfinished sessions a user has; nobody else counts them until the commit.';


-- Without a limit there is no lock.
CREATE OR REPLACE FUNCTION session_admit(of_user text, most_sessions integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    RETURN most_sessions IS NULL OR session_unfinished(of_user) < most_sessions;
END
$$;
COMMENT ON FUNCTION session_admit(text, integer) IS 'Whether the user may have another unfinished session.';


-- Session, prompt and outbox row in one statement of the client's: one round trip and one commit. With an
-- Idempotency-Key, its row comes first: a second request under the same key waits until the first has committed, and
-- then gets the first answer. outcome: created, replayed, mismatch (another body), limited (the user has
-- most_sessions unfinished ones).
CREATE OR REPLACE FUNCTION session_create(
    of_id            uuid,
    of_user          text,
    of_repo          text,
    of_target_branch text,
    of_branch        text,
    of_title         text,
    of_parent        uuid,
    of_callback_url  text,
    moment           timestamptz,
    prompt_text      text,
    worker_present   boolean,
    idempotency_key  text DEFAULT NULL,
    request_hash     bytea DEFAULT NULL,
    trace            text DEFAULT NULL,
    most_sessions    integer DEFAULT NULL,
    OUT outcome text, OUT answer jsonb
)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    new_session session; -- as it will be stored, for the answer, which an idempotency row holds before that
    new_prompt  prompt;
    earlier     idempotency;
    others      integer; -- unfinished sessions of the user; null: not counted
BEGIN
    new_session.id := of_id;
    new_session.user_id := of_user;
    new_session.repo := of_repo;
    new_session.target_branch := of_target_branch;
    new_session.branch := of_branch;
    new_session.title := of_title;
    new_session.parent := of_parent;
    new_session.callback_url := of_callback_url;
    new_session.inbox_status := 'active';
    new_session.session_status := 'active';
    new_session.created_at := moment;
    new_session.updated_at := moment;
    IF prompt_text IS NOT NULL THEN
        new_prompt.id := uuid_v7();
        new_prompt.session_id := of_id;
        new_prompt.text := prompt_text;
        new_prompt.status := 'queued';
        new_prompt.created_at := moment;
    END IF;
    answer := session_json(new_session) || jsonb_build_object(
        'prompts', CASE WHEN prompt_text IS NULL THEN '[]' ELSE jsonb_build_array(prompt_json(new_prompt)) END,
        'prompts_next', NULL, 'worker_present', worker_present);

    IF most_sessions IS NOT NULL THEN
        others := session_unfinished(of_user);
    END IF;
    -- In two steps, because PL/pgSQL evaluates the first without a query.
    IF others >= most_sessions THEN
        IF NOT EXISTS (
            SELECT FROM idempotency AS i WHERE i.user_id = of_user AND i.key = idempotency_key)
        THEN
            outcome := 'limited';
            RETURN;
        END IF;
    END IF;
    IF idempotency_key IS NOT NULL THEN
        -- In one statement, so that both are there when the foreign key is checked at its end.
        WITH first AS (
            INSERT INTO idempotency (user_id, key, request_hash, session_id, answer)
            VALUES (of_user, idempotency_key, request_hash, of_id, answer)
            ON CONFLICT DO NOTHING
            RETURNING 1
        )
        INSERT INTO session (
            id, user_id, repo, target_branch, branch, title, parent, callback_url, created_at, updated_at)
        SELECT of_id, of_user, of_repo, of_target_branch, of_branch, of_title, of_parent, of_callback_url,
            moment, moment
        FROM first;
        IF NOT FOUND THEN
            SELECT i.* INTO earlier FROM idempotency AS i
            WHERE i.user_id = of_user AND i.key = idempotency_key;
            outcome := CASE WHEN earlier.request_hash = request_hash THEN 'replayed' ELSE 'mismatch' END;
            answer := earlier.answer;
            RETURN;
        END IF;
    END IF;

    WITH s AS (
        INSERT INTO session (
            id, user_id, repo, target_branch, branch, title, parent, callback_url, created_at, updated_at)
        SELECT of_id, of_user, of_repo, of_target_branch, of_branch, of_title, of_parent, of_callback_url,
            moment, moment
        WHERE idempotency_key IS NULL
    ),
    p AS (
        INSERT INTO prompt (id, session_id, text, created_at)
        SELECT new_prompt.id, of_id, prompt_text, moment
        WHERE prompt_text IS NOT NULL
    )
    INSERT INTO outbox (topic, ordering_key, priority, payload, traceparent)
    VALUES (
        'session.run', 'session:' || of_id, -coalesce(least(others, 9), session_rank(of_user, of_id)),
        jsonb_strip_nulls(jsonb_build_object('session_id', of_id, 'prompt_id', new_prompt.id)),
        trace);
    outcome := 'created';
END
$$;
COMMENT ON FUNCTION session_create IS
    'Writes a session, its prompt and its outbox row; answers as POST /sessions does.';


-- A session's prompts are read as a whole by no query, but shown by pages that a person turns.
CREATE OR REPLACE FUNCTION session_has_room(of_session uuid, prompt_text text) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    -- octet_length reads no text that is stored apart.
    RETURN (
        SELECT count(*) < 1000 AND coalesce(sum(octet_length(p.text)), 0) + octet_length(prompt_text) <= 16777216
        FROM prompt AS p WHERE p.session_id = of_session);
END
$$;
COMMENT ON FUNCTION session_has_room(uuid, text) IS
    'Whether the session may have this prompt too: 1,000 prompts and 16 MiB of their texts at most.';


-- A follow-up turn. Locks the session, so that meanwhile nobody archives it or sets its status. The answer is kept under
-- the key of by_user, who asks and need not be the owner. outcome: created, replayed, mismatch, missing, archived,
-- limited; limited with an answer if the session itself is full, which code of before takes for the user's limit.
CREATE OR REPLACE FUNCTION prompt_create(
    of_session      uuid,
    of_user         text,
    prompt_text     text,
    worker_present  boolean,
    idempotency_key text DEFAULT NULL,
    request_hash    bytea DEFAULT NULL,
    trace           text DEFAULT NULL,
    by_user         text DEFAULT NULL,
    most_sessions   integer DEFAULT NULL,
    OUT outcome text, OUT answer jsonb
)
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    target     session;
    new_prompt prompt;
    earlier    idempotency;
BEGIN
    SELECT s.* INTO target FROM session AS s
    WHERE s.id = of_session AND (of_user IS NULL OR s.user_id = of_user)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'missing';
        RETURN;
    END IF;
    IF idempotency_key IS NOT NULL THEN
        SELECT i.* INTO earlier FROM idempotency AS i
        WHERE i.user_id = coalesce(by_user, target.user_id) AND i.key = idempotency_key;
        IF FOUND THEN
            outcome := CASE WHEN earlier.request_hash = request_hash THEN 'replayed' ELSE 'mismatch' END;
            answer := earlier.answer;
            RETURN;
        END IF;
    END IF;
    IF target.session_status = 'archived' THEN
        outcome := 'archived';
        RETURN;
    END IF;
    IF target.inbox_status = 'completed' AND NOT session_admit(target.user_id, most_sessions) THEN
        outcome := 'limited';
        RETURN;
    END IF;
    IF NOT session_has_room(of_session, prompt_text) THEN
        outcome := 'limited';
        answer := '{"full": true}';
        RETURN;
    END IF;

    INSERT INTO prompt (session_id, text) VALUES (of_session, prompt_text)
    RETURNING * INTO new_prompt;
    INSERT INTO outbox (topic, ordering_key, priority, payload, traceparent)
    VALUES (
        'session.run', 'session:' || of_session, -session_rank(target.user_id, of_session),
        jsonb_build_object('session_id', of_session, 'prompt_id', new_prompt.id),
        trace);
    UPDATE session
    SET inbox_status = CASE inbox_status WHEN 'pending' THEN 'pending' ELSE 'active' END,
        updated_at = clock_timestamp()
    WHERE id = of_session;

    answer := prompt_json(new_prompt) || jsonb_build_object('worker_present', worker_present);
    IF idempotency_key IS NOT NULL THEN
        INSERT INTO idempotency (user_id, key, request_hash, session_id, answer)
        VALUES (coalesce(by_user, target.user_id), idempotency_key, request_hash, of_session, answer);
    END IF;
    outcome := 'created';
END
$$;
COMMENT ON FUNCTION prompt_create(uuid, text, text, boolean, text, bytea, text, text, integer) IS
    'Adds a user turn to a session, with its outbox row; answers as POST /sessions/{id}/prompts does.';

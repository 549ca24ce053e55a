-- What the API writes: a session, or another turn of one.
--
-- A session's rows share the ordering_key 'session:ID', so its turns run one at a time, in order.


-- The client sends one statement for session, prompt and outbox row: one round trip and one commit. The row of an
-- Idempotency-Key is inserted first. So a second request with the same key waits until the first has committed, and then
-- gets the first answer. outcome is one of:
--   created
--   replayed   the key was used before: answer is the first one
--   mismatch   the key was used before, for another body
--   limited    the user has most_sessions unfinished sessions
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
    new_session session; -- as it will be stored: the answer is made from it, and stored before it
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
    -- Two conditions, because PL/pgSQL evaluates the first without a query.
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
        'session.run', 'session:' || of_id,
        -CASE WHEN others IS NULL THEN session_rank(of_user, of_id) ELSE least(others, 9) END,
        jsonb_strip_nulls(jsonb_build_object('session_id', of_id, 'prompt_id', new_prompt.id)),
        trace);
    outcome := 'created';
END
$$;
COMMENT ON FUNCTION session_create(uuid, text, text, text, text, text, uuid, text, timestamptz, text, boolean, text, bytea, text, integer) IS
    'Writes a session, its prompt and its outbox row; answers as POST /sessions does.';


-- Another turn of a session. Locks the session, so that nobody archives it or sets its status meanwhile. The request is by
-- by_user, which need not be the owner. The answer is stored under the key of by_user. outcome is one of those of
-- session_create, or:
--   missing    of_user has no such session
--   archived   it takes no more turns
--   limited    without an answer: the user has most_sessions unfinished sessions;
--              with the answer {"full": true}: session_has_room refuses. Code of the version before ignores the answer,
--              and says that the user's limit is reached.
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

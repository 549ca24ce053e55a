-- Sessions on top of the outbox: what the API writes, and what follows when a row of topic session.run
-- changes state, whoever changed it: a handler, a rescue, or an UPDATE typed into psql.
--
-- A session's rows share the ordering_key 'session:ID', so its turns run one at a time, in order.

-- What lists of the API read, besides session_newest: the few that are not finished, and those of one
-- repository. The first costs a session two entries in its life, which end with the next vacuum.
CREATE INDEX session_unfinished ON session (inbox_status, created_at DESC, id DESC)
    WHERE inbox_status IN ('active', 'pending');
CREATE INDEX session_newest_of_repo ON session (repo, created_at DESC, id DESC);

CREATE FUNCTION session_json(s session) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT jsonb_build_object(
        'id', s.id, 'user_id', s.user_id, 'repo', s.repo, 'target_branch', s.target_branch,
        'branch', s.branch, 'title', s.title, 'parent', s.parent, 'callback_url', s.callback_url,
        'inbox_status', s.inbox_status, 'session_status', s.session_status,
        'created_at', s.created_at, 'updated_at', s.updated_at)
$$;
COMMENT ON FUNCTION session_json(session) IS 'A session as the HTTP API shows it.';

CREATE FUNCTION prompt_json(p prompt) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT jsonb_build_object(
        'id', p.id, 'session_id', p.session_id, 'text', p.text, 'status', p.status,
        'reason', p.reason, 'result', p.result, 'created_at', p.created_at,
        'started_at', p.started_at, 'finished_at', p.finished_at)
$$;
COMMENT ON FUNCTION prompt_json(prompt) IS 'A prompt as the HTTP API shows it.';


CREATE FUNCTION message_json(
    seq bigint, prompt_id uuid, attempt integer, body jsonb, created_at timestamptz
) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT jsonb_build_object(
        'seq', seq, 'prompt_id', prompt_id, 'attempt', attempt, 'body', body, 'created_at', created_at)
$$;
COMMENT ON FUNCTION message_json(bigint, uuid, integer, jsonb, timestamptz) IS
    'A message as the HTTP API and its event stream show it.';

CREATE FUNCTION outbox_json(o outbox) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT jsonb_build_object(
        'id', o.id, 'topic', o.topic, 'ordering_key', o.ordering_key,
        'payload', CASE jsonb_typeof(o.payload -> 'sandbox')
            WHEN 'object' THEN o.payload #- '{sandbox,borrow_token}' -- a secret
            ELSE o.payload END,
        'state', o.state, 'priority', o.priority, 'attempt', o.attempt, 'failures', o.failures,
        'max_attempts', o.max_attempts, 'worker_id', o.worker_id, 'unique_key', o.unique_key,
        'errors', o.errors, 'available_at', o.available_at,
        'cancel_requested_at', o.cancel_requested_at, 'created_at', o.created_at,
        'started_at', o.started_at, 'finished_at', o.finished_at)
$$;
COMMENT ON FUNCTION outbox_json(outbox) IS 'A row of the outbox as the HTTP API shows it to operators.';


-- Counts under a lock of the user's, in a statement of its own: of two that are admitted at once the second
-- sees the first. No limit, no lock. Without seqscan: a plan made while the table is empty would stay.
CREATE FUNCTION session_admit(of_user text, most_sessions integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    locked text;
BEGIN
    IF most_sessions IS NULL THEN
        RETURN true;
    END IF;
    locked := pg_advisory_xact_lock(1397048892, hashtext(of_user)); -- PERFORM is a query: 15 us more of 350
    RETURN (
        SELECT count(*) < most_sessions FROM session AS s
        WHERE s.user_id = of_user AND (s.inbox_status IN ('active', 'pending')) IS TRUE);
END
$$;
COMMENT ON FUNCTION session_admit(text, integer) IS 'Whether the user may have another unfinished session.';


-- Session, prompt and outbox row in one statement of the client's, so one round trip and one commit.
-- With an Idempotency-Key its row comes first: a second request under the same key waits for the first
-- to commit, then gets the first answer. outcome: created, replayed, mismatch (another body), limited
-- (the user has most_sessions unfinished ones).
CREATE FUNCTION session_create(
    new_session      session,
    prompt_text      text,
    worker_present   boolean,
    idempotency_key  text DEFAULT NULL,
    request_hash     bytea DEFAULT NULL,
    trace            text DEFAULT NULL,
    most_sessions    integer DEFAULT NULL,
    OUT outcome text, OUT answer jsonb
)
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    new_prompt prompt;
    earlier    idempotency;
BEGIN
    IF prompt_text IS NOT NULL THEN
        new_prompt.id := uuid_v7();
        new_prompt.session_id := new_session.id;
        new_prompt.text := prompt_text;
        new_prompt.status := 'queued';
        new_prompt.created_at := new_session.created_at;
    END IF;
    answer := session_json(new_session) || jsonb_build_object(
        'prompts', CASE WHEN prompt_text IS NULL THEN '[]' ELSE jsonb_build_array(prompt_json(new_prompt)) END,
        'worker_present', worker_present);

    -- In two steps: PL/pgSQL evaluates the first without a query: 28 us less of the
    -- 355 that a session cost the server.
    IF NOT session_admit(new_session.user_id, most_sessions) THEN
        IF NOT EXISTS (
            SELECT FROM idempotency AS i WHERE i.user_id = new_session.user_id AND i.key = idempotency_key)
        THEN
            outcome := 'limited';
            RETURN;
        END IF;
    END IF;
    IF idempotency_key IS NOT NULL THEN
        -- In one statement, at whose end both are there for the foreign key.
        WITH first AS (
            INSERT INTO idempotency (user_id, key, request_hash, session_id, answer)
            VALUES (new_session.user_id, idempotency_key, request_hash, new_session.id, answer)
            ON CONFLICT DO NOTHING
            RETURNING 1
        )
        INSERT INTO session SELECT new_session.* FROM first;
        IF NOT FOUND THEN
            SELECT i.* INTO earlier FROM idempotency AS i
            WHERE i.user_id = new_session.user_id AND i.key = idempotency_key;
            outcome := CASE WHEN earlier.request_hash = request_hash THEN 'replayed' ELSE 'mismatch' END;
            answer := earlier.answer;
            RETURN;
        END IF;
    END IF;

    -- As three statements 15 us more of 350.
    WITH s AS (
        INSERT INTO session SELECT new_session.* WHERE idempotency_key IS NULL
    ),
    p AS (
        INSERT INTO prompt SELECT new_prompt.* WHERE prompt_text IS NOT NULL
    )
    INSERT INTO outbox (topic, ordering_key, payload, traceparent)
    VALUES (
        'session.run', 'session:' || new_session.id,
        jsonb_strip_nulls(jsonb_build_object('session_id', new_session.id, 'prompt_id', new_prompt.id)),
        trace);
    outcome := 'created';
END
$$;
COMMENT ON FUNCTION session_create(session, text, boolean, text, bytea, text, integer) IS
    'Writes a session, its prompt and its outbox row; answers as POST /sessions does.';


-- A follow-up turn. Locks the session, so that it cannot be archived, nor its status set, meanwhile.
-- The answer is kept under the key of by_user, who asks and need not be the owner. outcome: created,
-- replayed, mismatch, missing, archived, limited.
CREATE FUNCTION prompt_create(
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

    INSERT INTO prompt (session_id, text) VALUES (of_session, prompt_text)
    RETURNING * INTO new_prompt;
    INSERT INTO outbox (topic, ordering_key, payload, traceparent)
    VALUES (
        'session.run', 'session:' || of_session,
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


-- Cancels what a session has waiting or running. Turns that wait end in this transaction, one that runs
-- when its worker has stopped it.
CREATE FUNCTION session_cancel(of_session uuid, OUT cancelled integer, OUT cancelling integer)
LANGUAGE sql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
    WITH found AS MATERIALIZED (
        SELECT o.id FROM outbox AS o
        WHERE o.ordering_key = 'session:' || of_session AND o.state IN ('ready', 'running')
          AND o.topic = 'session.run'
        ORDER BY o.id
        FOR UPDATE
    ),
    marked AS (
        UPDATE outbox AS o
        SET cancel_requested_at = coalesce(o.cancel_requested_at, clock_timestamp()),
            state = CASE o.state WHEN 'ready' THEN 'cancelled' ELSE o.state END,
            finished_at = CASE o.state WHEN 'ready' THEN clock_timestamp() END,
            blocked = false
        FROM found AS f
        WHERE o.id >= f.id AND o.id <= f.id
        RETURNING o.state
    )
    SELECT count(*) FILTER (WHERE state = 'cancelled')::integer,
           count(*) FILTER (WHERE state = 'running')::integer
    FROM marked
$$;
COMMENT ON FUNCTION session_cancel(uuid) IS
    'Cancels a session''s turns; returns how many ended at once and how many a worker has yet to stop.';


-- Cancels twice: a prompt may commit after the first look and before the session's row is locked. Only
-- for that one is an outbox row locked after the session's, the one place against the lock order; the
-- deadlock this can end in rolls everything back, and the caller repeats.
CREATE FUNCTION session_archive(of_session uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    PERFORM session_cancel(of_session);
    UPDATE session
    SET session_status = 'archived', inbox_status = 'archived',
        deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    WHERE id = of_session AND session_status || '' = 'active'; -- not through the index of active branches
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM session_cancel(of_session);
    RETURN true;
END
$$;
COMMENT ON FUNCTION session_archive(uuid) IS 'Cancels a session''s turns and archives it.';


-- What a row typed into psql names may be nonsense: then it names nothing, and its handler says so. A check when
-- it is inserted, as a trigger with a WHEN, took 19,000 of the 320,000 instructions of every insert, of any topic. As
-- one expression that counts, {8}(-{4}){3}-{12}, this took 76,000 instructions.
CREATE FUNCTION payload_uuid(payload jsonb, name text) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT CASE
        WHEN payload ->> name LIKE '________-____-____-____-____________' AND payload ->> name !~ '[^0-9A-Fa-f-]'
            AND length(replace(payload ->> name, '-', '')) = 32
        THEN (payload ->> name)::uuid
    END
$$;
COMMENT ON FUNCTION payload_uuid(jsonb, text) IS 'The UUID that a payload has under this name, if it is one.';


-- The consequences of a state. Runs inside the transaction that set it, after the outbox row is locked:
-- the prompt follows the row, the session follows its rows, and once nothing is left to run a sandbox
-- that is still held becomes a row of topic sandbox.return. Last, an end is told (sql/0009_access.sql): as a
-- trigger of its own, whose condition is read from its stored text by every statement that updates a row, that
-- took 19,000 instructions of the 504,000 of a lone row's claim.
CREATE FUNCTION session_follow() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    of_session uuid := payload_uuid(OLD.payload, 'session_id');
    of_prompt  uuid := payload_uuid(OLD.payload, 'prompt_id');
    was_state  text := outbox_settled(OLD.state, OLD.cancel_requested_at);
    now_state  text := CASE WHEN TG_OP = 'DELETE' THEN 'cancelled'
                               ELSE outbox_settled(NEW.state, NEW.cancel_requested_at) END;
    held       jsonb;
    next_status text;
    keep_until timestamptz;
BEGIN
    IF TG_OP = 'UPDATE' AND now_state = was_state THEN
        RETURN NULL;
    END IF;
    -- The lock first, then new statements: who changes another row of this session comes before or after.
    SELECT sandbox INTO held FROM session WHERE id = of_session FOR NO KEY UPDATE;
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
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER session_follow
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.topic = 'session.run')
    EXECUTE FUNCTION session_follow();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER session_follow;

CREATE TRIGGER session_follow_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.topic = 'session.run' AND OLD.state IN ('ready', 'running'))
    EXECUTE FUNCTION session_follow();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER session_follow_delete;


-- Stores what the agent printed, fenced: locks the outbox row, then numbers the messages from the
-- session's last. fenced: nothing was written, the attempt is not the caller's any more.
-- The first write of a new attempt puts a superseded event before it: what the earlier attempt said
-- for this prompt no longer counts.
-- after_seq makes a write whose answer was lost repeatable: the last_seq that the caller's last write
-- returned, 0 for the first of its attempt. If the session is past it, this batch is stored already,
-- because nobody else writes to a session while the caller's row runs. Null: append in any case.
-- notify_later: nothing is notified here; if watched, the caller calls session_notify once this has
-- committed, as worker/messages.py does: sql/0005_events.sql says why.
CREATE FUNCTION message_append(
    holder uuid, row_id bigint, row_attempt integer,
    of_session uuid, of_prompt uuid, bodies jsonb[], after_seq bigint DEFAULT NULL,
    notify_later boolean DEFAULT false,
    OUT fenced boolean, OUT cancel boolean, OUT last_seq bigint, OUT watched boolean
)
LANGUAGE plpgsql VOLATILE
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
        PERFORM set_config('outwake.notify_later', 'on', true);
    END IF;
    INSERT INTO message (session_id, seq, prompt_id, attempt, body)
    SELECT of_session, last_seq - cardinality(bodies) + b.place, of_prompt, row_attempt, b.body
    FROM unnest(bodies) WITH ORDINALITY AS b (body, place)
    ORDER BY b.place;
    IF notify_later THEN
        PERFORM set_config('outwake.notify_later', 'off', true);
    END IF;
    -- Last: who begins to watch after this look finds us among the writers (sql/0005_events.sql).
    watched := session_watched(of_session);
END
$$;
COMMENT ON FUNCTION message_append(uuid, bigint, integer, uuid, uuid, jsonb[], bigint, boolean) IS
    'Stores an agent''s events in order, fenced by the attempt of the outbox row.';

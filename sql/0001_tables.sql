-- The tables. The database is a public interface: people insert into outbox from psql and read every
-- table here, so states are text, each column has a comment, and nonsense is refused by a named CHECK.
--
--   session  a coding agent's session            outbox  work that will happen
--   prompt   one user turn of a session          worker  a process that does it
--   message  one JSON event the agent printed    topic   limits of a topic, set by the operator
--   watcher  who follows a session live          idempotency  answers already given

CREATE FUNCTION uuid_v7() RETURNS uuid
LANGUAGE sql VOLATILE PARALLEL SAFE
AS $$
    -- 48 bits of Unix milliseconds over a random version 4, then the version bits 0111 (RFC 9562, 5.7).
    SELECT encode(
        set_bit(set_bit(
            overlay(
                uuid_send(gen_random_uuid())
                PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6
            ), 52, 1), 53, 1),
        'hex')::uuid
$$;
COMMENT ON FUNCTION uuid_v7() IS 'A UUID version 7; PostgreSQL has one of its own only since 18.';


CREATE FUNCTION repo_key(repo text) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE STRICT
AS $$
DECLARE
    host_path text := 'github.com/' || repo;
BEGIN
    -- host/path, without user, scheme and .git. Hosts, and GitHub's paths, are the same in any case.
    -- Every write to session works this out for its index: regular expressions only for what needs them.
    -- In SQL, which was parsed each time, and with five of them it took 60 us.
    IF strpos(repo, ':') > 0 OR strpos(repo, '@') > 0 THEN
        host_path := CASE
            WHEN repo ~ '^[A-Za-z]+://' THEN regexp_replace(repo, '^[A-Za-z]+://([^/@]*@)?', '')
            WHEN repo ~ '^[^/@]+@' THEN regexp_replace(repo, '^[^@]*@(\[[^]]*\]|[^:]*):/?', '\1/')
            ELSE host_path
        END;
    END IF;
    host_path := rtrim(host_path, '/');
    IF right(host_path, 4) = '.git' THEN
        host_path := left(host_path, -4);
    END IF;
    IF lower(host_path) LIKE 'github.com/%' THEN
        RETURN lower(host_path);
    END IF;
    RETURN lower(substring(host_path FROM '^[^/]*')) || substring(host_path FROM '/.*$');
END
$$;
COMMENT ON FUNCTION repo_key(text) IS
    'The repository that a name means: octo/tools, git@github.com:octo/tools.git and https://github.com/octo/tools are one.';


-- Domains, so that a value is checked when it is written. A CHECK of the table is read from its stored text
-- and compiled by every statement that updates a row, a claim and a completion as well.
-- Measured: topic alone 5 of 27 us a row in batches; all of outbox's 0.1 ms of a claim of one row; session's
-- and prompt's 40 of 320 us that a session cost the server. No {0,99} in an expression: what counts is worked
-- out anew each time, a sixth of an insert's 313,000 instructions.
CREATE DOMAIN inbox_state AS text
    CONSTRAINT session_inbox_status_known CHECK (VALUE IN ('active', 'pending', 'completed', 'archived'));
CREATE DOMAIN session_state AS text
    CONSTRAINT session_status_known CHECK (VALUE IN ('active', 'archived'));
CREATE DOMAIN repo_name AS text
    CONSTRAINT session_repo_length CHECK (length(VALUE) BETWEEN 1 AND 500);
CREATE DOMAIN branch_name AS text
    CONSTRAINT session_branch_length CHECK (length(VALUE) BETWEEN 1 AND 250);
CREATE DOMAIN title_text AS text
    CONSTRAINT session_title_length CHECK (length(VALUE) BETWEEN 1 AND 200);
CREATE DOMAIN user_name AS text
    CONSTRAINT session_user_length CHECK (length(VALUE) BETWEEN 1 AND 255);
CREATE DOMAIN callback_text AS text
    CONSTRAINT session_callback_length CHECK (length(VALUE) BETWEEN 1 AND 1000);
CREATE DOMAIN prompt_state AS text
    CONSTRAINT prompt_status_known CHECK (VALUE IN ('queued', 'running', 'succeeded', 'failed', 'cancelled'));
CREATE DOMAIN prompt_content AS text
    CONSTRAINT prompt_text_length CHECK (length(VALUE) BETWEEN 1 AND 200000);
-- The length apart: counted by the expression itself, as {0,99}, it took 53,000 instructions of an insert's 265,000, and
-- twice that for a long name, as it is a state of the automaton for each character.
CREATE DOMAIN topic_name AS text
    CONSTRAINT outbox_topic_form CHECK (length(VALUE) <= 100 AND VALUE ~ '^[a-z][a-z0-9_.-]*$');
CREATE DOMAIN state_name AS text
    CONSTRAINT outbox_state_known CHECK (VALUE IN ('ready', 'running', 'done', 'dead', 'cancelled'));
CREATE DOMAIN key_text AS text
    CONSTRAINT outbox_key_length CHECK (length(VALUE) BETWEEN 1 AND 200);
CREATE DOMAIN traceparent_text AS text
    CONSTRAINT outbox_traceparent_length CHECK (length(VALUE) <= 200);
CREATE DOMAIN attempt_limit AS integer
    CONSTRAINT outbox_max_attempts_range CHECK (VALUE BETWEEN 1 AND 32767);
CREATE DOMAIN running_worker AS uuid
    CONSTRAINT outbox_running_has_worker CHECK (VALUE IS NOT NULL);
CREATE DOMAIN finite_time AS timestamptz
    CONSTRAINT outbox_available_is_finite CHECK (isfinite(VALUE));

CREATE TABLE session (
    id             uuid PRIMARY KEY DEFAULT uuid_v7(),
    user_id        user_name NOT NULL DEFAULT 'local',
    repo           repo_name NOT NULL,
    target_branch  branch_name NOT NULL,
    branch         branch_name NOT NULL,
    title          title_text NOT NULL,
    parent         uuid REFERENCES session (id) ON DELETE SET NULL,
    inbox_status   inbox_state NOT NULL DEFAULT 'active',
    session_status session_state NOT NULL DEFAULT 'active',
    sandbox        jsonb,
    last_seq       bigint NOT NULL DEFAULT 0,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at     timestamptz,
    callback_url   callback_text,
    CONSTRAINT session_archived_has_time
        CHECK ((session_status = 'archived') = (deleted_at IS NOT NULL))
);
CREATE INDEX session_newest ON session (created_at DESC, id DESC);
CREATE INDEX session_newest_of_user ON session (user_id, created_at DESC, id DESC);
-- IS TRUE, so that only session_admit, which says the same, reads this index, and that no other: to the planner
-- session_unfinished would do as well while nobody has unfinished sessions, and it holds everybody's.
CREATE INDEX session_unfinished_of_user ON session (user_id) WHERE (inbox_status IN ('active', 'pending')) IS TRUE;
CREATE UNIQUE INDEX session_branch_of_repo ON session (repo_key(repo), branch)
    WHERE session_status = 'active';
CREATE INDEX session_parent ON session (parent) WHERE parent IS NOT NULL;

COMMENT ON TABLE session IS 'A coding agent''s session on one branch of one repository.';
COMMENT ON COLUMN session.user_id IS 'Whose it is, as the authenticating proxy or the token says.';
COMMENT ON COLUMN session.repo IS 'What is cloned: owner/name, or a URL.';
COMMENT ON COLUMN session.target_branch IS 'Where the work branch starts, and what it is meant for.';
COMMENT ON COLUMN session.title IS 'For people to find it by.';
COMMENT ON COLUMN session.parent IS 'The session it was started from, if any.';
COMMENT ON COLUMN session.deleted_at IS 'When it was archived.';
COMMENT ON COLUMN session.inbox_status IS
    'active (work waits) -> pending (a worker has it) -> completed; a new prompt makes it active again; archived.';
COMMENT ON COLUMN session.session_status IS 'active -> archived, by DELETE /sessions/{id}.';
COMMENT ON COLUMN session.branch IS 'The work branch: made from target_branch, the agent commits to it.';
COMMENT ON COLUMN session.sandbox IS 'The sandbox held: {"item", "borrow_token"}, and while it is kept for the next turn "keep_until"; null when none is.';
COMMENT ON COLUMN session.callback_url IS 'Where its webhooks go; each time something of it ends (sql/0009_access.sql).';
COMMENT ON COLUMN session.last_seq IS 'The highest message.seq given; raised under the lock of the outbox row.';


CREATE TABLE prompt (
    id          uuid PRIMARY KEY DEFAULT uuid_v7(),
    session_id  uuid NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    text        prompt_content NOT NULL,
    status      prompt_state NOT NULL DEFAULT 'queued',
    reason      text,
    result      jsonb,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at  timestamptz,
    finished_at timestamptz
);
CREATE INDEX prompt_of_session ON prompt (session_id, created_at, id);

COMMENT ON TABLE prompt IS 'One user turn of a session.';
COMMENT ON COLUMN prompt.session_id IS 'The session it is a turn of.';
COMMENT ON COLUMN prompt.text IS 'What the user wrote.';
COMMENT ON COLUMN prompt.status IS
    'queued -> running -> succeeded | failed | cancelled; a retry takes it back to queued.';
COMMENT ON COLUMN prompt.reason IS 'Why it failed or was cancelled, for a person to read.';
COMMENT ON COLUMN prompt.result IS 'What the turn left: commits, branch, and the agent''s result event (cost, usage, turns).';


CREATE TABLE message (
    session_id uuid NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    seq        bigint NOT NULL,
    prompt_id  uuid NOT NULL REFERENCES prompt (id) ON DELETE CASCADE,
    attempt    integer NOT NULL,
    body       jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (session_id, seq),
    CONSTRAINT message_seq_positive CHECK (seq > 0)
);
CREATE INDEX message_of_prompt ON message (prompt_id, attempt, seq);

COMMENT ON TABLE message IS 'What the agent printed, in order: one JSON event a row.';
COMMENT ON COLUMN message.session_id IS 'The session it was printed in.';
COMMENT ON COLUMN message.prompt_id IS 'The turn it was printed in.';
COMMENT ON COLUMN message.body IS 'The event as the agent printed it.';
COMMENT ON COLUMN message.seq IS 'Counts per session from 1 without a gap; it is the Last-Event-ID of the event stream.';
COMMENT ON COLUMN message.attempt IS 'The attempt of the outbox row that wrote it; lists show the last attempt of a prompt.';


CREATE TABLE outbox (
    id                  bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    topic               topic_name NOT NULL,
    ordering_key        key_text,
    payload             jsonb NOT NULL DEFAULT '{}',
    state               state_name NOT NULL DEFAULT 'ready',
    priority            smallint NOT NULL DEFAULT 0,
    available_at        finite_time NOT NULL DEFAULT clock_timestamp(),
    attempt             integer NOT NULL DEFAULT 0,
    failures            integer NOT NULL DEFAULT 0,
    max_attempts        attempt_limit NOT NULL DEFAULT 10,
    blocked             boolean NOT NULL DEFAULT false,
    limited             boolean NOT NULL DEFAULT false,
    worker_id           uuid,
    unique_key          key_text,
    traceparent         traceparent_text,
    errors              jsonb NOT NULL DEFAULT '[]',
    cancel_requested_at timestamptz,
    created_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at          timestamptz,
    finished_at         timestamptz
);

-- The one index the claim reads: finished, running and blocked rows are not in it, so that its cost
-- does not grow with them; rows of one topic and priority that are due come before those that are not.
CREATE INDEX outbox_claimable ON outbox (topic, priority DESC, available_at, id)
    WHERE state = 'ready' AND NOT blocked;
-- Rescue, renewal and "who runs what" find a worker's rows. The second column refuses a running row without
-- one, which nobody would ever rescue: as a CHECK of the table that took 25,500 instructions of each statement that
-- inserts or updates a row (of 286,000 of an update by key); the server keeps an index's expressions parsed.
CREATE INDEX outbox_running ON outbox (worker_id, ((worker_id::running_worker) IS NULL)) WHERE state = 'running';
-- A topic's limit counts its running rows.
CREATE INDEX outbox_running_limited ON outbox (topic) WHERE state = 'running' AND limited;
-- Order: the unfinished rows of a key by id, and never two running.
CREATE INDEX outbox_key ON outbox (ordering_key, id)
    WHERE state IN ('ready', 'running') AND ordering_key IS NOT NULL;
CREATE UNIQUE INDEX outbox_key_runs_once ON outbox (ordering_key)
    WHERE state = 'running' AND ordering_key IS NOT NULL;
CREATE UNIQUE INDEX outbox_unique_key ON outbox (unique_key)
    WHERE state IN ('ready', 'running') AND unique_key IS NOT NULL;
CREATE INDEX outbox_dead ON outbox (finished_at, id) WHERE state = 'dead';

COMMENT ON TABLE outbox IS
    'Work that will happen. A producer sets topic and payload, and may set ordering_key, priority, available_at, max_attempts, unique_key, traceparent; the rest is the workers''.';
COMMENT ON COLUMN outbox.topic IS 'What kind of work it is: a worker claims the topics it has a handler for.';
COMMENT ON COLUMN outbox.payload IS 'What the handler is given.';
COMMENT ON COLUMN outbox.max_attempts IS 'With so many failures it is dead.';
COMMENT ON COLUMN outbox.traceparent IS 'The W3C trace that caused it, for the handler to go on with.';
COMMENT ON COLUMN outbox.state IS
    'ready -> running (claim) -> done | ready (retry, hand-back, rescue) | dead (failures spent) | cancelled; dead or cancelled -> ready (outbox_retry).';
COMMENT ON COLUMN outbox.ordering_key IS 'Rows that share it run one at a time, by id.';
COMMENT ON COLUMN outbox.priority IS 'Higher runs first; it does not reorder the rows of one ordering_key.';
COMMENT ON COLUMN outbox.available_at IS 'Not before this time.';
COMMENT ON COLUMN outbox.attempt IS 'Raised by every claim, never lowered: the fencing token.';
COMMENT ON COLUMN outbox.failures IS 'What counts against max_attempts; a hand-back, a wait or a cancel adds none.';
COMMENT ON COLUMN outbox.blocked IS 'Found waiting for an earlier row of its ordering_key; the end of that row clears it.';
COMMENT ON COLUMN outbox.limited IS 'Its topic had a limit when it was claimed, so that its end lets another start.';
COMMENT ON COLUMN outbox.worker_id IS 'Who runs it, or ran it last.';
COMMENT ON COLUMN outbox.unique_key IS 'No two unfinished rows share it.';
COMMENT ON COLUMN outbox.errors IS 'One object an attempt that failed: {"attempt", "at", "error", "worker_id"}.';
COMMENT ON COLUMN outbox.cancel_requested_at IS 'Set it to cancel: a ready row ends at once, a running one when its worker has stopped it.';


CREATE TABLE worker (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    parked      boolean NOT NULL DEFAULT false,
    host        text NOT NULL,
    pid         integer NOT NULL,
    version     text NOT NULL,
    topics      text[] NOT NULL,
    concurrency integer NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    presence    integer,
    draining    boolean NOT NULL DEFAULT false,
    lease_until timestamptz,
    ended_at    timestamptz,
    end_reason  text,
    CONSTRAINT worker_concurrency_range CHECK (concurrency BETWEEN 1 AND 10000),
    CONSTRAINT worker_ended_is_not_parked CHECK (ended_at IS NULL OR NOT parked)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
-- No index but the key: every update stays on its page (HOT), and a look reads a page or two. It asks for
-- parked, which comes early, where reading a row stops: measured, 760 to 490 instructions a worker.

COMMENT ON TABLE worker IS 'One row a worker process and life; a worker whose lease ended comes back under a new id.';
COMMENT ON COLUMN worker.host IS 'The host it runs on.';
COMMENT ON COLUMN worker.pid IS 'Its process id there.';
COMMENT ON COLUMN worker.version IS 'The version of its code.';
COMMENT ON COLUMN worker.topics IS 'What it has handlers for.';
COMMENT ON COLUMN worker.concurrency IS 'How many rows it runs at once.';
COMMENT ON COLUMN worker.draining IS 'It claims nothing more, and leaves when what it runs has ended.';
COMMENT ON COLUMN worker.presence IS 'The advisory lock its LISTEN connection holds: whoever holds it is alive (view worker_present).';
COMMENT ON COLUMN worker.parked IS 'It has free slots and sleeps: producers must notify.';
COMMENT ON COLUMN worker.lease_until IS 'Its running rows are its own until then; kept only while it runs something.';
COMMENT ON COLUMN worker.ended_at IS 'It left, or a rescue ended its lease; it may never claim again, and its rows are freed.';
COMMENT ON COLUMN worker.end_reason IS 'Why it ended: left, after a drain, or what ended it.';


CREATE TABLE topic (
    name        text PRIMARY KEY,
    max_running integer,
    timeout     interval,
    CONSTRAINT topic_max_running_range CHECK (max_running >= 0),
    CONSTRAINT topic_timeout_positive CHECK (timeout > interval '0')
);
COMMENT ON TABLE topic IS 'Limits of a topic, over all workers; a topic without a row here has none but its handler''s.';
COMMENT ON COLUMN topic.name IS 'As in outbox.topic.';
COMMENT ON COLUMN topic.max_running IS 'How many rows may run at once; 0 pauses the topic.';
COMMENT ON COLUMN topic.timeout IS 'How long one attempt may run; overrides the handler''s.';


CREATE TABLE idempotency (
    user_id      text NOT NULL,
    key          text NOT NULL,
    request_hash bytea NOT NULL,
    session_id   uuid NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    answer       jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, key),
    CONSTRAINT idempotency_key_length CHECK (length(key) BETWEEN 1 AND 255)
);
CREATE INDEX idempotency_age ON idempotency (created_at);
COMMENT ON TABLE idempotency IS 'The first answer given under an Idempotency-Key, per user.';
COMMENT ON COLUMN idempotency.user_id IS 'Whose key it is.';
COMMENT ON COLUMN idempotency.key IS 'The header''s value, without quotes.';
COMMENT ON COLUMN idempotency.request_hash IS 'Of the request''s body: the key of another body is refused.';
COMMENT ON COLUMN idempotency.session_id IS 'The session that the request made or spoke to.';
COMMENT ON COLUMN idempotency.answer IS 'The body that was answered, to be answered again.';

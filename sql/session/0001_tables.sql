-- The tables of coding agents' sessions, on top of the outbox, frozen: a change is a new numbered file.
--
--   session  a coding agent's session            session_memory  what its next turn goes on from
--   prompt   one user turn of a session          sandbox_borrow  sandboxes that were asked for
--   message  one JSON event the agent printed    idempotency     answers that were given
--   watcher  who follows a session live          api_token, sql_reader   who may do and see what
--
-- code of the version before: goes on


CREATE FUNCTION uuid_v7() RETURNS uuid
LANGUAGE sql VOLATILE PARALLEL SAFE
-- 48 bits of Unix milliseconds over a random version 4, then the version bits 0111 (RFC 9562, 5.7).
RETURN encode(
    set_bit(set_bit(
        overlay(
            uuid_send(gen_random_uuid())
            PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
            FROM 1 FOR 6
        ), 52, 1), 53, 1),
    'hex')::uuid;


CREATE FUNCTION repo_key(repo text) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = :schema, pg_temp
AS $$
DECLARE
    host_path text := 'github.com/' || repo;
BEGIN
    -- host/path, without user, scheme and .git. Case does not count in hosts and in GitHub's paths. Every write to
    -- session evaluates this for its index, so regular expressions are kept for what needs them.
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


-- Domains, for the reason that outbox/0001_tables.sql gives.
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
-- IS TRUE, so that session_admit, which has the same condition, reads this index and no other: session_unfinished
-- holds everybody's sessions.
CREATE INDEX session_unfinished_of_user ON session (user_id) WHERE (inbox_status IN ('active', 'pending')) IS TRUE;
CREATE UNIQUE INDEX session_branch_of_repo ON session (repo_key(repo), branch)
    WHERE session_status = 'active';
CREATE INDEX session_parent ON session (parent) WHERE parent IS NOT NULL;
-- Lists of the API: the few sessions that are not finished, and those of one repository.
CREATE INDEX session_unfinished ON session (inbox_status, created_at DESC, id DESC)
    WHERE inbox_status IN ('active', 'pending');
CREATE INDEX session_newest_of_repo ON session (repo, created_at DESC, id DESC);
CREATE INDEX session_holds_sandbox ON session (id) WHERE sandbox IS NOT NULL;
ALTER TABLE session ENABLE ROW LEVEL SECURITY;


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
ALTER TABLE prompt ENABLE ROW LEVEL SECURITY;


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
ALTER TABLE message ENABLE ROW LEVEL SECURITY;


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
ALTER TABLE idempotency ENABLE ROW LEVEL SECURITY;


CREATE UNLOGGED TABLE watcher (
    session_id uuid NOT NULL,
    presence   integer NOT NULL,
    PRIMARY KEY (session_id, presence)
);
ALTER TABLE watcher ENABLE ROW LEVEL SECURITY;


-- A worker records here that it is about to ask for a sandbox. The transaction that records the answer deletes the row,
-- so a row that stays is a sandbox that may have leaked.
CREATE TABLE sandbox_borrow (
    id         uuid PRIMARY KEY,
    session_id uuid NOT NULL,
    outbox_id  bigint NOT NULL,
    attempt    integer NOT NULL,
    error      text,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE sandbox_borrow ENABLE ROW LEVEL SECURITY;


-- Not columns of session: they are large, and only a turn reads them.
CREATE TABLE session_memory (
    session_id    uuid PRIMARY KEY REFERENCES session (id) ON DELETE CASCADE,
    agent_session text,
    transcript    bytea,
    bundle        bytea,
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE session_memory ENABLE ROW LEVEL SECURITY;


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
ALTER TABLE api_token ENABLE ROW LEVEL SECURITY;


CREATE TABLE sql_reader (
    role_name name PRIMARY KEY,
    user_id   text NOT NULL,
    CONSTRAINT sql_reader_user_length CHECK (length(user_id) BETWEEN 1 AND 255)
);
ALTER TABLE sql_reader ENABLE ROW LEVEL SECURITY;


-- The rows of one session, finished ones too.
CREATE INDEX outbox_of_session ON outbox ((payload ->> 'session_id'), id)
    WHERE topic IN ('session.run', 'sandbox.return', 'webhook.deliver');

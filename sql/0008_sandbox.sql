-- Sandboxes and what a session's next turn needs. worker/borrow.py tells the protocol.

-- An intent: asked of the allocator, and its answer not recorded yet. The transaction that records the
-- answer deletes it, so what stays is what nobody knows the answer to.
CREATE TABLE sandbox_borrow (
    id         uuid PRIMARY KEY,
    session_id uuid NOT NULL,
    outbox_id  bigint NOT NULL,
    attempt    integer NOT NULL,
    error      text,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE sandbox_borrow IS
    'Sandboxes asked for whose answer is not recorded. Delete a row once you have looked whether it leaked.';
COMMENT ON COLUMN sandbox_borrow.id IS 'The allocator was given it as borrow_id in params.';
COMMENT ON COLUMN sandbox_borrow.session_id IS 'The session it was asked for; it may be gone.';
COMMENT ON COLUMN sandbox_borrow.outbox_id IS 'The session.run row whose attempt asked.';
COMMENT ON COLUMN sandbox_borrow.attempt IS 'Which attempt of that row.';
COMMENT ON COLUMN sandbox_borrow.asked_at IS 'Just before the allocator was asked.';
COMMENT ON COLUMN sandbox_borrow.error IS 'What came instead of an answer, if the worker lived to see it.';

CREATE VIEW sandbox_suspect AS
SELECT b.*
FROM sandbox_borrow AS b
WHERE NOT EXISTS (
    SELECT FROM outbox AS o
    WHERE o.id = b.outbox_id AND o.attempt = b.attempt AND o.state = 'running'
);
COMMENT ON VIEW sandbox_suspect IS
    'Suspected leaks: the attempt is over and nobody knows whether the allocator gave it a sandbox.';


-- Not columns of session: they are large, and only a turn reads them.
CREATE TABLE session_memory (
    session_id    uuid PRIMARY KEY REFERENCES session (id) ON DELETE CASCADE,
    agent_session text,
    transcript    bytea,
    bundle        bytea,
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE session_memory IS 'What a session''s next turn goes on from, on whatever host it runs.';
COMMENT ON COLUMN session_memory.session_id IS 'Whose.';
COMMENT ON COLUMN session_memory.agent_session IS 'The id under which the agent resumes its transcript.';
COMMENT ON COLUMN session_memory.transcript IS 'A tar.gz of the agent''s transcripts, relative to its HOME.';
COMMENT ON COLUMN session_memory.bundle IS
    'A git bundle of the commits that only we have; null when there are none, or the branch was pushed.';


CREATE FUNCTION sandbox_owe(of_session uuid, owed jsonb) RETURNS void
LANGUAGE sql VOLATILE
AS $$
    INSERT INTO outbox (topic, payload, max_attempts)
    VALUES ('sandbox.return', jsonb_build_object('session_id', of_session, 'sandbox', owed), 32767)
$$;
COMMENT ON FUNCTION sandbox_owe(uuid, jsonb) IS
    'Enqueues the return of a sandbox; it never gives up.';


-- Whoever deletes a session that holds a sandbox owes its return all the same.
CREATE FUNCTION session_deleted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    PERFORM sandbox_owe(OLD.id, OLD.sandbox);
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION session_deleted() IS 'Enqueues the return of the sandbox that a deleted session held.';

CREATE TRIGGER session_deleted
    AFTER DELETE ON session FOR EACH ROW
    WHEN (OLD.sandbox IS NOT NULL)
    EXECUTE FUNCTION session_deleted();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_deleted;


-- Begins an attempt: takes over the sandbox that the turn before left for it, and returns it. One that
-- an attempt of this turn held is owed its return first, else a session could wait for what it holds.
-- Null: none is held now, and the intent is recorded. The caller holds the lock on its outbox row.
CREATE FUNCTION sandbox_begin(
    intent uuid, of_session uuid, of_outbox bigint, of_attempt integer
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    held jsonb;
BEGIN
    SELECT sandbox INTO held FROM session WHERE id = of_session FOR NO KEY UPDATE;
    IF held ? 'keep_until' THEN
        UPDATE session SET sandbox = held - 'keep_until' WHERE id = of_session;
        RETURN held - 'keep_until';
    END IF;
    IF held IS NOT NULL THEN
        PERFORM sandbox_owe(of_session, held);
        UPDATE session SET sandbox = NULL WHERE id = of_session;
    END IF;
    INSERT INTO sandbox_borrow (id, session_id, outbox_id, attempt)
    VALUES (intent, of_session, of_outbox, of_attempt);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION sandbox_begin(uuid, uuid, bigint, integer) IS
    'The sandbox kept for this turn, or null and the intent to borrow one.';


-- Ends the intent: the session holds the sandbox. False: the session is gone, nothing was recorded.
CREATE FUNCTION sandbox_hold(intent uuid, of_session uuid, borrowed jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    UPDATE session SET sandbox = borrowed WHERE id = of_session;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM sandbox_borrow WHERE id = intent;
    RETURN true;
END
$$;
COMMENT ON FUNCTION sandbox_hold(uuid, uuid, jsonb) IS 'Records a borrowed sandbox in its session.';


-- Whether a sandbox is to be returned now. Not one that its session has taken up again, or was promised
-- for longer: that has, or will have, a row of its own. Returning it ends the promise, in the caller's
-- transaction, so that no turn takes over what is being returned.
CREATE FUNCTION sandbox_let_go(of_session uuid, returned jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    held jsonb;
BEGIN
    SELECT sandbox INTO held FROM session WHERE id = of_session FOR NO KEY UPDATE;
    IF held IS NULL OR held -> 'borrow_token' <> returned -> 'borrow_token' THEN
        RETURN true;
    END IF;
    IF NOT held ? 'keep_until' OR (held ->> 'keep_until')::timestamptz > clock_timestamp()
        OR EXISTS (
            SELECT FROM outbox AS o
            WHERE o.ordering_key = 'session:' || of_session AND o.state IN ('ready', 'running'))
    THEN
        RETURN false;
    END IF;
    UPDATE session SET sandbox = NULL WHERE id = of_session;
    RETURN true;
END
$$;
COMMENT ON FUNCTION sandbox_let_go(uuid, jsonb) IS
    'Whether a sandbox is to be returned now; if so its session does not hold it any more.';

-- Sandboxes that a session holds, was promised, or may have leaked. worker/sandboxes/lending.py has the protocol.


CREATE OR REPLACE VIEW sandbox_suspect WITH (security_invoker = true) AS
SELECT b.id, b.session_id, b.outbox_id, b.attempt, b.error, b.asked_at
FROM sandbox_borrow AS b
WHERE NOT EXISTS (
    SELECT FROM outbox AS o
    WHERE o.id = b.outbox_id AND o.attempt = b.attempt AND o.state = 'running'
);
COMMENT ON VIEW sandbox_suspect IS
    'Suspected leaks: the attempt is over and nobody knows whether the allocator gave it a sandbox.';


CREATE OR REPLACE FUNCTION sandbox_owe(of_session uuid, owed jsonb) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
AS $$
    INSERT INTO outbox (topic, payload, max_attempts)
    VALUES ('sandbox.return', jsonb_build_object('session_id', of_session, 'sandbox', owed), 32767)
$$;
COMMENT ON FUNCTION sandbox_owe(uuid, jsonb) IS
    'Enqueues the return of a sandbox; it never gives up.';


-- If a deleted session holds a sandbox, the return of the sandbox is enqueued all the same.
CREATE OR REPLACE FUNCTION session_deleted() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM sandbox_owe(OLD.id, OLD.sandbox);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION session_deleted() IS 'Enqueues the return of the sandbox that a deleted session held.';


-- Begins an attempt. Returns the sandbox that the turn before left for it, if there is one. Otherwise records the intent
-- to borrow one and returns null. If an earlier attempt of this turn held a sandbox, the return of that sandbox is enqueued
-- first, because a session could otherwise wait for what it holds itself. The caller holds the lock on its outbox row.
CREATE OR REPLACE FUNCTION sandbox_begin(
    intent uuid, of_session uuid, of_outbox bigint, of_attempt integer
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
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


-- Ends the intent: the session holds the sandbox. Returns false, and records nothing, if the session is gone.
CREATE OR REPLACE FUNCTION sandbox_hold(intent uuid, of_session uuid, borrowed jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
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


-- Whether a sandbox is to be returned now. If its session has taken it over again, or was promised it for longer, the
-- answer is no, and another row will return it. If the answer is yes, the promise ends in the caller's transaction, so
-- that no turn takes over a sandbox that is being returned.
CREATE OR REPLACE FUNCTION sandbox_let_go(of_session uuid, returned jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
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
    'Whether a sandbox is to be returned now. If so, its session does not hold it any more.';

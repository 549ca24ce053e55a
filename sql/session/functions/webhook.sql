-- Webhooks to a session's callback_url.


-- There are three events for a session's callback_url: a turn ends, the session has nothing left to do, the session is
-- archived. Each becomes a row of topic webhook.deliver in the transaction that caused it. A session's events are
-- delivered in order. The body is written here, so it says how things were then. The id is the webhook-id, which is the
-- same in each attempt to deliver.
CREATE OR REPLACE FUNCTION webhook_enqueue(s session, event_type text, of_prompt prompt, trace text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = :schema, pg_temp
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


-- session_follow calls it when prompt and session have followed the row.
CREATE OR REPLACE FUNCTION session_tell_end(of_session uuid, of_prompt uuid, trace text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
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


CREATE OR REPLACE FUNCTION session_webhook_archived() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM webhook_enqueue(NEW, 'session.archived', NULL, NULL);
    RETURN NULL;
END
$$;

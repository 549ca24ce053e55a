-- A row of the outbox as the HTTP API shows it.


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

-- The function by which any driver and language enqueues. An INSERT of the same columns does the same, without
-- on_duplicate.


-- It has the owner's rights, because unique keys are shared by all topics, and a producer sees only rows of its own topics.
CREATE OR REPLACE FUNCTION unique_key_holder(unique_key text) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
    SELECT o.id FROM outbox AS o
    WHERE o.unique_key = unique_key_holder.unique_key AND o.state IN ('ready', 'running')
$$;
COMMENT ON FUNCTION unique_key_holder(text) IS 'The id of the unfinished row that has this unique_key; null if none has.';


-- It has the caller's rights: a role enqueues what the policies of access.sql let it insert.
CREATE OR REPLACE FUNCTION enqueue(
    topic        text,
    payload      jsonb DEFAULT '{}',
    ordering_key text DEFAULT NULL,
    priority     integer DEFAULT 0,
    available_at timestamptz DEFAULT NULL,
    max_attempts integer DEFAULT 10,
    unique_key   text DEFAULT NULL,
    on_duplicate text DEFAULT 'reject',
    traceparent  text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    row_id bigint;
BEGIN
    IF on_duplicate IS NULL OR on_duplicate NOT IN ('reject', 'keep', 'replace') THEN
        RAISE EXCEPTION 'on_duplicate is reject, keep or replace, not %', coalesce(quote_literal(on_duplicate), 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF enqueue.unique_key IS NULL THEN
        INSERT INTO outbox (topic, payload, ordering_key, priority, available_at, max_attempts, traceparent)
        VALUES (
            enqueue.topic, coalesce(enqueue.payload, '{}'), enqueue.ordering_key, coalesce(enqueue.priority, 0),
            coalesce(enqueue.available_at, clock_timestamp()), coalesce(enqueue.max_attempts, 10), enqueue.traceparent)
        RETURNING id INTO row_id;
        RETURN row_id;
    END IF;
    LOOP
        INSERT INTO outbox AS o (
            topic, payload, ordering_key, priority, available_at, max_attempts, unique_key, traceparent)
        VALUES (
            enqueue.topic, coalesce(enqueue.payload, '{}'), enqueue.ordering_key, coalesce(enqueue.priority, 0),
            coalesce(enqueue.available_at, clock_timestamp()), coalesce(enqueue.max_attempts, 10), enqueue.unique_key,
            enqueue.traceparent)
        ON CONFLICT (unique_key) WHERE state IN ('ready', 'running') AND unique_key IS NOT NULL
        DO NOTHING
        RETURNING id INTO row_id;
        IF FOUND THEN
            RETURN row_id;
        END IF;
        -- A row that runs cannot be replaced: its handler has read the old payload.
        IF on_duplicate = 'replace' THEN
            UPDATE outbox AS o
            SET payload = coalesce(enqueue.payload, '{}'), priority = coalesce(enqueue.priority, 0),
                available_at = coalesce(enqueue.available_at, clock_timestamp()), traceparent = enqueue.traceparent
            WHERE o.unique_key = enqueue.unique_key AND o.state = 'ready'
            RETURNING o.id INTO row_id;
            IF FOUND THEN
                RETURN row_id;
            END IF;
        END IF;
        row_id := unique_key_holder(enqueue.unique_key);
        -- Null: the row ended between the statements, so the key is free again.
        IF row_id IS NOT NULL THEN
            IF on_duplicate = 'keep' THEN
                RETURN row_id;
            END IF;
            RAISE EXCEPTION 'an unfinished row has the unique_key %: row %', enqueue.unique_key, row_id
                USING ERRCODE = 'unique_violation', CONSTRAINT = 'outbox_unique_key';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION enqueue(text, jsonb, text, integer, timestamptz, integer, text, text, text) IS
    'Enqueues one row in the caller''s transaction and returns its id. on_duplicate, for a unique_key that an unfinished row has: reject (an error), keep (the id of that row), replace (updates it; an error if it runs already, or is of a topic that the caller may not enqueue).';

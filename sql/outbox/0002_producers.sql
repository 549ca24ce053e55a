-- A producer may name no topic and no key that Outwake's own rows have, also none of versions to come, and writes
-- payloads of a bounded size. The policies of a database that has them are altered here, and not dropped, so that no
-- insert is refused meanwhile; functions/access.sql makes those of a new one.
--
-- Each statement takes its table's lock for an instant; none reads the table.
--
-- code of the version before: goes on


-- Not of rows that are there: a topic that was granted before stays granted.
ALTER TABLE producer_topic ADD CONSTRAINT producer_topic_not_reserved
    CHECK (topic !~ '^(outbox|session|sandbox|webhook|pull_request)[.]') NOT VALID;


CREATE FUNCTION producer_writes(ordering_key text, unique_key text, payload_bytes integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (ordering_key !~ '^(outbox|session|sandbox|webhook|pull_request)[.:]') IS NOT FALSE
    AND (unique_key !~ '^(outbox|session|sandbox|webhook|pull_request)[.:]') IS NOT FALSE
    AND payload_bytes <= 1048576;


DO $do$
BEGIN
    IF EXISTS (
        SELECT FROM pg_policy WHERE polrelid = ':schema.outbox'::regclass AND polname = 'producer_inserts')
    THEN
        GRANT EXECUTE ON FUNCTION producer_writes TO :schema_producer;
        ALTER POLICY producer_inserts ON outbox WITH CHECK (
            CASE WHEN topic::text = ANY ((SELECT :schema.producer_topics(current_user))::text[]) THEN true
                ELSE :schema.producer_refused(current_user, topic::text) END
            AND :schema.producer_writes(ordering_key::text, unique_key::text, octet_length(payload::text)));
        ALTER POLICY producer_replaces ON outbox WITH CHECK (
            unique_key IS NOT NULL AND state = 'ready'
            AND topic::text = ANY ((SELECT :schema.producer_topics(current_user))::text[])
            AND :schema.producer_writes(ordering_key::text, unique_key::text, octet_length(payload::text)));
    END IF;
END
$do$;

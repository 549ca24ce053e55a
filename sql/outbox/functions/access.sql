-- Which role may do and see what. The roles belong to the cluster and are named after the schema. A database role becomes
-- a member: GRANT :schema_producer TO shop.
--
--   :schema_producer   enqueues the topics that producer_topic names for it; sees id, topic, state, unique_key of their rows
--   :schema_worker     runs a worker; owns nothing; cannot read API tokens
--   :schema_monitor    sees depth, age and reasons of every row, but no payload and no error
--   :schema_operator   sees everything, and may retry, discard, cancel and set limits
--
-- The session line adds :schema_reader. Row-level security does not apply to the owner of the tables, which migrates. A
-- role that was granted a table, and is in none of these roles, sees no row of it. The rights of several roles add up.


-- It has the owner's rights, because a producer cannot read the table. A role that inherits from a named role may do the
-- same. It is in PL/pgSQL, which keeps the plan, because each policy of a producer's INSERT calls it.
CREATE OR REPLACE FUNCTION producer_topics(producer name) RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT p.topic::text FROM producer_topic AS p
        WHERE pg_has_role(producer, to_regrole(quote_ident(p.role_name)), 'USAGE'));
END
$$;
COMMENT ON FUNCTION producer_topics(name) IS 'What this database role may enqueue, if it is a producer.';


-- The policy calls it in place of false, because the server's own error names neither role nor topic.
CREATE OR REPLACE FUNCTION producer_refused(producer name, topic text) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'the role % may not enqueue the topic %', producer, topic
        USING ERRCODE = 'insufficient_privilege',
            HINT = format('INSERT INTO :schema.producer_topic (role_name, topic) VALUES (%L, %L)', producer, topic);
END
$$;
COMMENT ON FUNCTION producer_refused(name, text) IS 'Raises the error of a producer without a right to the topic.';


-- Grants and policies can be repeated, because a role may be created later. A policy is made once. A numbered migration
-- drops or changes one.
CREATE OR REPLACE FUNCTION outbox_role(role_name text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF to_regrole(role_name) IS NOT NULL THEN
        RETURN true;
    END IF;
    EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
    RETURN true;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN -- another database's migration was first
        RETURN true;
    WHEN insufficient_privilege THEN
        RAISE WARNING 'the role % is missing and you may not create it: CREATE ROLE % NOLOGIN, then SELECT :schema.grant_roles()',
            role_name, role_name;
        RETURN false;
END
$$;
COMMENT ON FUNCTION outbox_role(text) IS 'Creates a role unless it is there; false, with a warning, if that is not allowed.';

CREATE OR REPLACE FUNCTION outbox_policy(
    policy_name text, table_name text, role_name text, command text, visible text, written text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_policy WHERE polrelid = format(':schema.%I', table_name)::regclass AND polname = policy_name)
    THEN
        EXECUTE format(
            'CREATE POLICY %I ON :schema.%I FOR %s TO %I', policy_name, table_name, command, role_name)
            || coalesce(' USING (' || visible || ')', '') || coalesce(' WITH CHECK (' || written || ')', '');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_policy(text, text, text, text, text, text) IS 'Creates a policy for a role unless it is there.';


CREATE OR REPLACE FUNCTION outbox_grant_roles() RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
DECLARE
    -- The subquery is evaluated once a statement, not once a row.
    may_enqueue CONSTANT text := 'topic::text = ANY ((SELECT :schema.producer_topics(current_user))::text[])';
    -- A producer may not use the keys of sessions and of housekeeping, because its row would hold them up.
    as_producer CONSTANT text :=
        ' AND :schema.producer_writes(ordering_key::text, unique_key::text, octet_length(payload::text))';
    name text;
BEGIN
    REVOKE ALL ON SCHEMA :schema FROM PUBLIC;
    REVOKE ALL ON ALL TABLES IN SCHEMA :schema FROM PUBLIC;
    REVOKE ALL ON ALL SEQUENCES IN SCHEMA :schema FROM PUBLIC;
    REVOKE ALL ON ALL ROUTINES IN SCHEMA :schema FROM PUBLIC;
    -- A role with a right to a type can make casts and operators for it, and a query of ours might use them.
    FOR name IN
        SELECT oid::regtype::text FROM pg_type WHERE typnamespace = ':schema'::regnamespace AND typcategory <> 'A'
    LOOP
        EXECUTE format('REVOKE ALL ON TYPE %s FROM PUBLIC', name);
    END LOOP;

    IF outbox_role(':schema_producer') THEN
        GRANT USAGE ON SCHEMA :schema TO :schema_producer;
        GRANT EXECUTE ON FUNCTION enqueue, unique_key_holder, producer_topics, producer_refused, producer_writes
            TO :schema_producer;
        GRANT INSERT (topic, payload, ordering_key, priority, available_at, max_attempts, unique_key, traceparent)
            ON outbox TO :schema_producer;
        -- RETURNING id and ON CONFLICT read these.
        GRANT SELECT (id, topic, unique_key, state) ON outbox TO :schema_producer;
        -- on_duplicate => 'replace'
        GRANT UPDATE (payload, priority, available_at, traceparent) ON outbox TO :schema_producer;
        PERFORM outbox_policy('producer_inserts', 'outbox', ':schema_producer', 'INSERT', NULL,
            'CASE WHEN ' || may_enqueue || ' THEN true ELSE :schema.producer_refused(current_user, topic::text) END'
            || as_producer);
        PERFORM outbox_policy('producer_sees', 'outbox', ':schema_producer', 'SELECT', may_enqueue);
        PERFORM outbox_policy('producer_replaces', 'outbox', ':schema_producer', 'UPDATE',
            'unique_key IS NOT NULL AND state = ''ready'' AND ' || may_enqueue,
            'unique_key IS NOT NULL AND state = ''ready'' AND ' || may_enqueue || as_producer);
    END IF;

    IF outbox_role(':schema_worker') THEN
        GRANT USAGE ON SCHEMA :schema TO :schema_worker;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA :schema TO :schema_worker;
        REVOKE EXECUTE ON FUNCTION producer_topics, producer_refused, producer_writes, outbox_role, outbox_policy,
            outbox_grant_roles, grant_roles FROM :schema_worker;
        -- A role that may call a trigger function can use it in a trigger on its own table. The function would then run
        -- that role's casts with the owner's rights. An existing trigger needs no such right.
        FOR name IN
            SELECT oid::regprocedure::text FROM pg_proc
            WHERE pronamespace = ':schema'::regnamespace AND prorettype = 'trigger'::regtype
        LOOP
            EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM :schema_worker', name);
        END LOOP;
        GRANT SELECT, INSERT, UPDATE, DELETE ON outbox, worker, outbox_alert TO :schema_worker;
        GRANT SELECT ON topic, migration, worker_present, outbox_front, outbox_depth, worker_status, worker_running,
            outbox_waiting, outbox_writer, outbox_hourly TO :schema_worker;
        GRANT SELECT, USAGE, UPDATE ON SEQUENCE outbox_sleepers TO :schema_worker;
        PERFORM outbox_policy('worker_works', 'outbox', ':schema_worker', 'ALL', 'true', 'true');
    END IF;

    IF outbox_role(':schema_monitor') THEN
        GRANT USAGE ON SCHEMA :schema TO :schema_monitor;
        GRANT SELECT (
            id, topic, ordering_key, state, priority, available_at, attempt, failures, max_attempts, blocked, limited,
            worker_id, cancel_requested_at, created_at, started_at, finished_at, xmax -- outbox_waiting shows the transaction that locks a row
        ) ON outbox TO :schema_monitor;
        GRANT SELECT ON worker, topic, outbox_alert, migration, worker_present, outbox_front, outbox_depth,
            worker_status, worker_running, outbox_waiting, outbox_writer, outbox_hourly TO :schema_monitor;
        GRANT EXECUTE ON FUNCTION outbox_ready, outbox_throughput, outbox_stuck, outbox_triggers_off, outbox_last_error,
            outbox_session_id TO :schema_monitor;
        PERFORM outbox_policy('monitor_sees', 'outbox', ':schema_monitor', 'SELECT', 'true');
    END IF;

    IF outbox_role(':schema_operator') THEN
        GRANT USAGE ON SCHEMA :schema TO :schema_operator;
        GRANT SELECT ON outbox, worker, topic, outbox_alert, producer_topic, migration, worker_present, outbox_front,
            outbox_depth, worker_status, worker_running, outbox_waiting, outbox_writer, outbox_hourly
            TO :schema_operator;
        GRANT INSERT, UPDATE, DELETE ON topic TO :schema_operator;
        GRANT EXECUTE ON FUNCTION outbox_ready, outbox_throughput, outbox_stuck, outbox_triggers_off, outbox_history,
            outbox_error_read, outbox_last_error, outbox_session_id, outbox_cancel, outbox_retry, outbox_discard,
            outbox_wake TO :schema_operator;
        PERFORM outbox_policy('operator_sees', 'outbox', ':schema_operator', 'SELECT', 'true');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox_grant_roles() IS 'What grant_roles does for the outbox.';


CREATE OR REPLACE FUNCTION grant_roles() RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    PERFORM outbox_grant_roles();
    IF to_regprocedure('session_grant_roles()') IS NOT NULL THEN
        PERFORM session_grant_roles();
    END IF;
END
$$;
COMMENT ON FUNCTION grant_roles() IS
    'Creates the roles that are missing, if the caller may, and grants each what it may do. migrate calls it; may be repeated.';

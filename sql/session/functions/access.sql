-- Which role sees which sessions. A member of :schema_reader sees what belongs to one user. The table sql_reader binds a
-- role to its user. For a role that is not bound, the setting :schema.user_id names the user. Anybody may SET it, so it
-- is a filter for a trusted program that reads for many users, not a wall. Where people type SQL, bind their roles.
--
-- Only the owner reads api_token and sql_reader.


-- The role is an argument, because current_user is the definer inside a SECURITY DEFINER function. The first case that
-- holds decides:
-- 1. The role that logged in is bound. It stays bound, whatever role it sets.
-- 2. The role that it has set is bound.
-- 3. One of the two inherits from bound roles. It is bound as they are. It sees nothing if they are bound to several
--    users.
-- 4. Otherwise the setting decides.
-- A role cannot ask for the user of a role that it is not a member of.
CREATE OR REPLACE FUNCTION sql_reader_user(reader name) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = :schema, pg_temp
AS $$
DECLARE
    bound text[];
BEGIN
    IF NOT pg_has_role(session_user, reader, 'MEMBER') THEN
        RETURN NULL;
    END IF;
    FOR place IN 1..2 LOOP
        bound := ARRAY(
            SELECT r.user_id FROM sql_reader AS r
            WHERE r.role_name = CASE place WHEN 1 THEN session_user ELSE reader END);
        IF bound <> '{}' THEN
            RETURN bound[1];
        END IF;
    END LOOP;
    bound := ARRAY(
        SELECT DISTINCT r.user_id FROM sql_reader AS r
        CROSS JOIN pg_roles AS o
        WHERE o.rolname IN (session_user, reader)
          AND NOT o.rolsuper -- a superuser inherits from every role
          AND pg_has_role(o.oid, to_regrole(quote_ident(r.role_name)), 'USAGE'));
    IF bound <> '{}' THEN
        RETURN CASE WHEN cardinality(bound) = 1 THEN bound[1] END;
    END IF;
    RETURN nullif(current_setting(':schema.user_id', true), '');
END
$$;
COMMENT ON FUNCTION sql_reader_user(name) IS 'Whose sessions this database role sees.';


CREATE OR REPLACE FUNCTION session_grant_roles() RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
DECLARE
    held text;
BEGIN
    IF outbox_role(':schema_reader') THEN
        GRANT USAGE ON SCHEMA :schema TO :schema_reader;
        GRANT SELECT ON session, prompt, message, watcher, idempotency, outbox, worker, topic, outbox_alert, migration,
            worker_present, outbox_front, outbox_depth, worker_status, worker_running, outbox_waiting, outbox_writer,
            outbox_hourly TO :schema_reader;
        GRANT EXECUTE ON FUNCTION sql_reader_user, outbox_ready, outbox_throughput, outbox_history, outbox_error_read,
            outbox_triggers_off, session_history, outbox_last_error, outbox_session_id TO :schema_reader;
        -- Each SELECT in parentheses is evaluated once a statement, not once a row.
        PERFORM outbox_policy('reader_sees', 'session', ':schema_reader', 'SELECT',
            'user_id = (SELECT :schema.sql_reader_user(current_user))');
        PERFORM outbox_policy('reader_sees', 'idempotency', ':schema_reader', 'SELECT',
            'user_id = (SELECT :schema.sql_reader_user(current_user))');
        FOREACH held IN ARRAY ARRAY['prompt', 'message', 'watcher', 'session_memory', 'sandbox_borrow'] LOOP
            PERFORM outbox_policy('reader_sees', held, ':schema_reader', 'SELECT',
                'session_id IN (SELECT s.id FROM :schema.session AS s)');
        END LOOP;
        -- Rows of other topics belong to nobody. The ids are compared as text, because a payload may hold anything.
        PERFORM outbox_policy('reader_sees', 'outbox', ':schema_reader', 'SELECT',
            'payload ->> ''session_id'' IN (SELECT s.id::text FROM :schema.session AS s)');
    END IF;

    -- outbox_grant_roles has warned of each missing role. It has also granted a worker all functions.
    IF to_regrole(':schema_worker') IS NOT NULL THEN
        REVOKE EXECUTE ON FUNCTION sql_reader_user, session_grant_roles FROM :schema_worker;
        GRANT SELECT, INSERT, UPDATE, DELETE ON session, prompt, message, session_memory, sandbox_borrow
            TO :schema_worker;
        GRANT SELECT, DELETE ON idempotency TO :schema_worker;
        GRANT SELECT ON watcher, sandbox_suspect TO :schema_worker;
        FOREACH held IN ARRAY ARRAY[
            'session', 'prompt', 'message', 'session_memory', 'sandbox_borrow', 'idempotency', 'watcher'
        ] LOOP
            PERFORM outbox_policy('worker_works', held, ':schema_worker', 'ALL', 'true', 'true');
        END LOOP;
    END IF;

    IF to_regrole(':schema_operator') IS NOT NULL THEN
        GRANT SELECT ON session, prompt, message, watcher, idempotency, sandbox_suspect TO :schema_operator;
        -- A person who has checked whether a sandbox leaked deletes its row.
        GRANT SELECT, DELETE ON sandbox_borrow TO :schema_operator;
        GRANT EXECUTE ON FUNCTION session_history TO :schema_operator;
        FOREACH held IN ARRAY ARRAY['session', 'prompt', 'message', 'watcher', 'idempotency'] LOOP
            PERFORM outbox_policy('operator_sees', held, ':schema_operator', 'SELECT', 'true');
        END LOOP;
        PERFORM outbox_policy('operator_sees', 'sandbox_borrow', ':schema_operator', 'ALL', 'true');
    END IF;
END
$$;
COMMENT ON FUNCTION session_grant_roles() IS 'What grant_roles does for sessions.';

-- What happened to one session.


CREATE OR REPLACE FUNCTION session_history(of_session uuid)
RETURNS TABLE (at timestamptz, event text, outbox_id bigint, attempt integer, worker text, detail text)
LANGUAGE sql STABLE
SET search_path = :schema, pg_temp
AS $$
    SELECT h.at, h.event, h.outbox_id, h.attempt, h.worker, h.detail
    FROM (
        SELECT s.created_at, 0, 'session created', NULL::bigint, NULL::integer, NULL::text,
               format('%s, branch %s: %s', s.repo, s.branch, s.title)
        FROM session AS s WHERE s.id = of_session
        UNION ALL
        SELECT s.deleted_at, 9, 'session archived', NULL, NULL, NULL, NULL
        FROM session AS s WHERE s.id = of_session AND s.deleted_at IS NOT NULL
        UNION ALL
        SELECT statement_timestamp(), 9, 'now', NULL, NULL, NULL,
               format('inbox_status %s, %s', s.inbox_status,
                      CASE WHEN s.sandbox IS NULL THEN 'no sandbox held' ELSE 'sandbox held' END)
        FROM session AS s WHERE s.id = of_session
        UNION ALL
        SELECT p.created_at, 1, 'prompt queued', NULL, NULL, NULL, left(p.text, 80)
        FROM prompt AS p WHERE p.session_id = of_session
        UNION ALL
        SELECT p.finished_at, 8, 'prompt ' || p.status, NULL, NULL, NULL, p.reason
        FROM prompt AS p WHERE p.session_id = of_session AND p.finished_at IS NOT NULL
        UNION ALL
        SELECT max(m.created_at), 5, 'messages', NULL, m.attempt, NULL,
               format('messages: %s, seq %s to %s', count(*), min(m.seq), max(m.seq))
        FROM message AS m WHERE m.session_id = of_session
        GROUP BY m.prompt_id, m.attempt
        UNION ALL
        SELECT r.at, 2 + r.place, o.topic || ' ' || r.event, o.id, r.attempt, r.worker, r.detail
        FROM outbox AS o
        CROSS JOIN LATERAL outbox_history(o.id)
            WITH ORDINALITY AS r (at, event, attempt, worker, detail, place)
        WHERE o.payload ->> 'session_id' = of_session::text
          AND o.topic IN ('session.run', 'sandbox.return', 'webhook.deliver')
        UNION ALL
        -- Apart, because the index of a session's rows has the three topics above.
        SELECT r.at, 2 + r.place, o.topic || ' ' || r.event, o.id, r.attempt, r.worker, r.detail
        FROM session AS s
        JOIN outbox AS o ON o.id = (s.pull_request ->> 'outbox_id')::bigint
        CROSS JOIN LATERAL outbox_history(o.id)
            WITH ORDINALITY AS r (at, event, attempt, worker, detail, place)
        WHERE s.id = of_session
    ) AS h (at, place, event, outbox_id, attempt, worker, detail)
    ORDER BY h.at, h.outbox_id NULLS FIRST, h.place
$$;
COMMENT ON FUNCTION session_history(uuid) IS
    'What happened to a session, in order: its prompts, its rows of outbox with every attempt, how many messages each attempt wrote, and what it waits for now.';

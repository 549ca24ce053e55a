-- Users take turns, so that one user's hundred sessions do not make another wait for all of them.
--
-- 1. A session's row gets a rank: how many other unfinished sessions its user has. The negative rank is the row's
--    priority. So the first session of each user comes before the second of any user. The last rank is 9, because a claim
--    descends the index once for each priority.
-- 2. When a row ends, the oldest waiting row of the same user moves up to its rank. Its available_at becomes now, so it
--    goes behind the rows that have that rank already.
-- A rank decides only which row comes first. While no other user waits, one user has all slots. The claim knows nothing
-- of ranks, and rows of other topics cost nothing.


CREATE OR REPLACE FUNCTION session_rank(of_user text, of_session uuid) RETURNS integer
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    RETURN (
        SELECT count(*) FROM (
            SELECT FROM session AS s
            WHERE s.user_id = of_user AND (s.inbox_status IN ('active', 'pending')) IS TRUE AND s.id <> of_session
            LIMIT 9
        ) AS unfinished);
END
$$;
COMMENT ON FUNCTION session_rank(text, uuid) IS
    'How many unfinished sessions a user has besides this one, at most 9.';


-- Skips a locked row, because somebody claims or changes it, and a row whose time has not come.
CREATE OR REPLACE FUNCTION session_moves_up(of_user text, ended_priority integer) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    UPDATE outbox
    SET priority = ended_priority, available_at = clock_timestamp()
    WHERE id = (
        WITH mine AS MATERIALIZED (
            SELECT 'session:' || s.id AS key FROM session AS s
            WHERE s.user_id = of_user AND (s.inbox_status IN ('active', 'pending')) IS TRUE
        )
        SELECT o.id
        FROM mine AS m
        JOIN outbox AS o ON o.ordering_key >= m.key AND o.ordering_key <= m.key
        WHERE o.state IN ('ready', 'running') AND o.state || '' = 'ready' AND NOT o.blocked
          AND o.topic || '' = 'session.run'
          AND o.priority < ended_priority AND o.available_at <= clock_timestamp()
        ORDER BY o.id + 0
        LIMIT 1
        FOR UPDATE OF o SKIP LOCKED
    );
END
$$;
COMMENT ON FUNCTION session_moves_up(text, integer) IS
    'Gives the oldest waiting row of a user the priority of one that has ended.';

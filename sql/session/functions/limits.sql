-- How many unfinished sessions a user may have, and how many prompts a session.


-- Counts under a lock, in a statement of its own. So if two sessions of a user are made at the same time, the second count
-- sees the first session. The lock is a row of session_admission, which a few users share. An advisory lock would not do,
-- because any role may take one.
CREATE OR REPLACE FUNCTION session_unfinished(of_user text) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    PERFORM FROM session_admission AS a WHERE a.slot = (hashtext(of_user) & 1023) FOR NO KEY UPDATE;
    RETURN (
        SELECT count(*) FROM session AS s
        WHERE s.user_id = of_user AND (s.inbox_status IN ('active', 'pending')) IS TRUE);
END
$$;
COMMENT ON FUNCTION session_unfinished(text) IS
    'How many unfinished sessions a user has. Other transactions that count them wait for the commit.';


-- Without a limit there is no lock.
CREATE OR REPLACE FUNCTION session_admit(of_user text, most_sessions integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = :schema, pg_temp
AS $$
BEGIN
    RETURN most_sessions IS NULL OR session_unfinished(of_user) < most_sessions;
END
$$;
COMMENT ON FUNCTION session_admit(text, integer) IS 'Whether the user may have another unfinished session.';


-- The limits keep pages of a session bounded. No query reads all prompts of a session.
CREATE OR REPLACE FUNCTION session_has_room(of_session uuid, prompt_text text) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    -- octet_length reads no text that is stored apart.
    RETURN (
        SELECT count(*) < 1000 AND coalesce(sum(octet_length(p.text)), 0) + octet_length(prompt_text) <= 16777216
        FROM prompt AS p WHERE p.session_id = of_session);
END
$$;
COMMENT ON FUNCTION session_has_room(uuid, text) IS
    'Whether the session may have this prompt too: 1,000 prompts and 16 MiB of their texts at most.';

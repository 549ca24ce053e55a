-- Compare repositories without case in the same way in every database.
--
-- code of the version before: goes on
--
-- lower() follows the collation of the database. In a Turkish one, INFRA is not infra, so two sessions could be active
-- on one branch. In the collation "C" only ASCII letters have a case, which is what hosts compare. The index holds what
-- the function returned before, so it is built anew: that locks the table for as long as it takes to read the active
-- sessions. It fails where two of them have one branch by now: archive one, then migrate again.

CREATE OR REPLACE FUNCTION repo_key(repo text) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = :schema, pg_temp
AS $$
DECLARE
    host_path text := 'github.com/' || repo;
BEGIN
    -- host/path, without user, scheme and .git. Case does not count in hosts and in GitHub's paths. Every write to
    -- session evaluates this for its index, so regular expressions are kept for what needs them.
    IF strpos(repo, ':') > 0 OR strpos(repo, '@') > 0 THEN
        host_path := CASE
            WHEN repo ~ '^[A-Za-z]+://' THEN regexp_replace(repo, '^[A-Za-z]+://([^/@]*@)?', '')
            WHEN repo ~ '^[^/@]+@' THEN regexp_replace(repo, '^[^@]*@(\[[^]]*\]|[^:]*):/?', '\1/')
            ELSE host_path
        END;
    END IF;
    host_path := rtrim(host_path, '/');
    IF right(host_path, 4) = '.git' THEN
        host_path := left(host_path, -4);
    END IF;
    IF lower(host_path COLLATE "C") LIKE 'github.com/%' THEN
        RETURN lower(host_path COLLATE "C");
    END IF;
    RETURN lower(substring(host_path FROM '^[^/]*') COLLATE "C") || substring(host_path FROM '/.*$');
END
$$;


DROP INDEX session_branch_of_repo;
CREATE UNIQUE INDEX session_branch_of_repo ON session (repo_key(repo), branch)
    WHERE session_status = 'active';

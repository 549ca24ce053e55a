-- Keeps a row consistent at the end of each statement that updated it:
--   * A ready row that is to be cancelled ends at once, whether the mark or the readiness came last.
--   * A row that has ended has finished_at, and no other row has.
--   * Only ready rows are blocked, and only by the key that they have. If a row gets another key, the next claim decides
--     again.
-- Our own functions write consistent rows. A row that was written otherwise, by hand, is corrected here.
--
-- An UPDATE is also a producer if it makes a row claimable or its time earlier: a retry, a hand-back, a rescue, a freed
-- key, or a person at psql. So it must notify.
--
-- One trigger does both. Its condition is short, and claims and completions do not meet it. The server parses the condition
-- of a trigger again in every statement that updates a row (docs/profile.md).


-- The trigger's name sorts before session_follow's. If it corrects a row, there are two writes, and session_follow sees
-- both. session_follow goes by the state that this function returns. So it acts once, at the first write, and the second
-- write has been made by then.
CREATE OR REPLACE FUNCTION outbox_settled(state text, cancel_requested_at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN state = 'ready' AND cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE state END;
COMMENT ON FUNCTION outbox_settled(text, timestamptz) IS
    'The state of a row when the statement that wrote these values has ended.';


CREATE OR REPLACE FUNCTION outbox_settle() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = :schema, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    cancelled boolean := outbox_settled(NEW.state, NEW.cancel_requested_at) <> NEW.state;
    unfounded boolean := NEW.blocked
        AND (NEW.state <> 'ready' OR NEW.ordering_key IS DISTINCT FROM OLD.ordering_key);
BEGIN
    IF cancelled OR unfounded OR (NEW.state IN ('ready', 'running')) = (NEW.finished_at IS NOT NULL) THEN
        UPDATE outbox
        SET state = CASE WHEN cancelled THEN 'cancelled' ELSE state END,
            blocked = blocked AND NOT (cancelled OR unfounded),
            finished_at = CASE WHEN cancelled OR state NOT IN ('ready', 'running')
                               THEN coalesce(finished_at, clock_timestamp()) END
        WHERE id = NEW.id AND state = NEW.state;
    END IF;
    IF NEW.topic = 'outbox.prune' AND (cancelled OR NEW.state NOT IN ('ready', 'running')) THEN
        PERFORM outbox_prune_later();
    END IF;
    IF NEW.state = 'ready' AND NOT cancelled AND NOT NEW.blocked
        AND (OLD.state <> 'ready' OR OLD.blocked OR NEW.available_at < OLD.available_at OR NEW.topic <> OLD.topic)
    THEN
        -- Does not name the row, so that NOTIFY sends one payload for an UPDATE of many rows.
        PERFORM outbox_notify(NEW.topic, NEW.available_at);
    END IF;
    RETURN NULL;
END
$$;

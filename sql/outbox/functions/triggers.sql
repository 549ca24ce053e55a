-- When the functions of the other files are called. Triggers have a file of their own, because CREATE TRIGGER waits for
-- every transaction that has written to the table, and a change of a function does not. ALWAYS: a trigger also fires in a
-- replication role, which turns ordinary triggers off.


CREATE OR REPLACE TRIGGER outbox_inserted
    AFTER INSERT ON outbox REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_inserted();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_inserted;


CREATE OR REPLACE TRIGGER outbox_settle
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (CASE WHEN NEW.finished_at IS NULL THEN NEW.state <> 'running' ELSE NEW.state IN ('ready', 'running') END)
    EXECUTE FUNCTION outbox_settle();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_settle;


CREATE OR REPLACE TRIGGER outbox_made_room
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.limited)
    EXECUTE FUNCTION outbox_made_room();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_made_room;


CREATE OR REPLACE TRIGGER outbox_made_room_by_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.limited)
    EXECUTE FUNCTION outbox_made_room();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_made_room_by_delete;


CREATE OR REPLACE TRIGGER topic_changed
    AFTER UPDATE OR DELETE ON topic FOR EACH ROW EXECUTE FUNCTION topic_changed();
ALTER TABLE topic ENABLE ALWAYS TRIGGER topic_changed;


CREATE OR REPLACE TRIGGER outbox_free_key
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.ordering_key IS NOT NULL)
    EXECUTE FUNCTION outbox_free_key();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_free_key;


CREATE OR REPLACE TRIGGER outbox_free_key_by_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.ordering_key IS NOT NULL)
    EXECUTE FUNCTION outbox_free_key();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_free_key_by_delete;


CREATE OR REPLACE TRIGGER outbox_cancel_requested
    AFTER UPDATE OF cancel_requested_at ON outbox FOR EACH ROW
    WHEN (
        NEW.state = 'running'
        AND NEW.cancel_requested_at IS NOT NULL AND OLD.cancel_requested_at IS NULL
    )
    EXECUTE FUNCTION outbox_cancel_requested();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER outbox_cancel_requested;


CREATE OR REPLACE TRIGGER worker_ended
    AFTER UPDATE ON worker FOR EACH ROW
    WHEN (OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL)
    EXECUTE FUNCTION worker_ended();
ALTER TABLE worker ENABLE ALWAYS TRIGGER worker_ended;


CREATE OR REPLACE TRIGGER worker_deleted
    AFTER DELETE ON worker FOR EACH ROW EXECUTE FUNCTION worker_ended();
ALTER TABLE worker ENABLE ALWAYS TRIGGER worker_deleted;

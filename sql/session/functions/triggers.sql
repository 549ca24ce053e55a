-- When the functions of the other files are called. Triggers have a file of their own, because CREATE TRIGGER waits for
-- every transaction that has written to the table, and a change of a function does not. ALWAYS: a trigger also fires in a
-- replication role, which turns ordinary triggers off.


CREATE OR REPLACE TRIGGER session_follow
    AFTER UPDATE ON outbox FOR EACH ROW
    WHEN (OLD.topic = 'session.run')
    EXECUTE FUNCTION session_follow();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER session_follow;


CREATE OR REPLACE TRIGGER session_follow_delete
    AFTER DELETE ON outbox FOR EACH ROW
    WHEN (OLD.topic = 'session.run' AND OLD.state IN ('ready', 'running'))
    EXECUTE FUNCTION session_follow();
ALTER TABLE outbox ENABLE ALWAYS TRIGGER session_follow_delete;


CREATE OR REPLACE TRIGGER message_inserted
    AFTER INSERT ON message REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION message_inserted();
ALTER TABLE message ENABLE ALWAYS TRIGGER message_inserted;


CREATE OR REPLACE TRIGGER session_changed
    AFTER UPDATE ON session FOR EACH ROW
    WHEN ((NEW.inbox_status, NEW.session_status, NEW.title, NEW.pull_request)
          IS DISTINCT FROM (OLD.inbox_status, OLD.session_status, OLD.title, OLD.pull_request))
    EXECUTE FUNCTION session_changed();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_changed;


CREATE OR REPLACE TRIGGER prompt_added
    AFTER INSERT ON prompt FOR EACH ROW EXECUTE FUNCTION session_changed();
ALTER TABLE prompt ENABLE ALWAYS TRIGGER prompt_added;


CREATE OR REPLACE TRIGGER prompt_changed
    AFTER UPDATE ON prompt FOR EACH ROW
    WHEN (NEW.status <> OLD.status)
    EXECUTE FUNCTION session_changed();
ALTER TABLE prompt ENABLE ALWAYS TRIGGER prompt_changed;


CREATE OR REPLACE TRIGGER session_deleted
    AFTER DELETE ON session FOR EACH ROW
    WHEN (OLD.sandbox IS NOT NULL)
    EXECUTE FUNCTION session_deleted();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_deleted;


CREATE OR REPLACE TRIGGER session_webhook_archived
    AFTER UPDATE ON session FOR EACH ROW
    WHEN (NEW.callback_url IS NOT NULL
          AND OLD.session_status = 'active' AND NEW.session_status = 'archived')
    EXECUTE FUNCTION session_webhook_archived();
ALTER TABLE session ENABLE ALWAYS TRIGGER session_webhook_archived;

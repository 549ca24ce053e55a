-- What the chaos run adds to the database under test: where handlers leave effects, and a record of every
-- change of state with the transaction that made it and the snapshot it saw. The checker judges by those:
-- "B happened after A was committed" is "A's transaction is visible in B's snapshot", and no clock is asked.

CREATE SEQUENCE chaos_seq;

CREATE TABLE chaos_event (
    seq       bigint NOT NULL DEFAULT nextval('chaos_seq'),
    at        double precision NOT NULL DEFAULT extract(epoch FROM clock_timestamp()),
    xid       bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    snapshot  text NOT NULL DEFAULT pg_current_snapshot()::text,
    app       text NOT NULL DEFAULT current_setting('application_name'),
    row_id    bigint NOT NULL,
    topic     text NOT NULL,
    key       text,
    old_state text,
    new_state text,
    attempt   integer NOT NULL,
    failures  integer NOT NULL,
    errors    integer NOT NULL,
    error     text,
    worker_id uuid,
    limited   boolean NOT NULL,
    started   double precision,
    due       double precision
);

CREATE TABLE chaos_life (
    seq         bigint NOT NULL DEFAULT nextval('chaos_seq'),
    at          double precision NOT NULL DEFAULT extract(epoch FROM clock_timestamp()),
    worker_id   uuid NOT NULL,
    lease_until double precision,
    reason      text
);

CREATE TABLE chaos_booked (tag text NOT NULL, rows integer NOT NULL);

CREATE TABLE chaos_effect (
    xid     bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    row_id  bigint NOT NULL,
    attempt integer NOT NULL,
    kind    text NOT NULL
);

CREATE TABLE chaos_borrowed (
    xid        bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    token      text NOT NULL,
    session_id uuid NOT NULL,
    row_id     bigint NOT NULL,
    attempt    integer NOT NULL
);

CREATE TABLE chaos_returned (
    xid     bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    token   text NOT NULL,
    row_id  bigint NOT NULL,
    attempt integer NOT NULL
);

-- VOLATILE, so that its statement has a snapshot taken after the change, and after what outbox_free_key
-- waited for: triggers fire in the order of their names. With this connection's search_path: a worker's finds nothing.
CREATE FUNCTION chaos_record() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    r outbox := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO chaos_event
        (row_id, topic, key, old_state, new_state, attempt, failures, errors, error, worker_id, limited, started,
         due)
    VALUES (
        r.id, r.topic, r.ordering_key,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.state END, CASE WHEN TG_OP <> 'DELETE' THEN NEW.state END,
        r.attempt, r.failures, jsonb_array_length(r.errors), r.errors -> -1 ->> 'error',
        CASE WHEN TG_OP <> 'INSERT' AND OLD.state = 'running' THEN OLD.worker_id ELSE r.worker_id END,
        r.limited, extract(epoch FROM r.started_at), extract(epoch FROM r.available_at));
    RETURN NULL;
END
$$;
CREATE TRIGGER zz_chaos_insert AFTER INSERT OR DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION chaos_record();
CREATE TRIGGER zz_chaos_update AFTER UPDATE ON outbox FOR EACH ROW
    WHEN ((OLD.state, OLD.attempt, OLD.failures, OLD.errors)
          IS DISTINCT FROM (NEW.state, NEW.attempt, NEW.failures, NEW.errors))
    EXECUTE FUNCTION chaos_record();

CREATE FUNCTION chaos_record_life() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    INSERT INTO chaos_life (worker_id, lease_until, reason)
    VALUES (OLD.id, extract(epoch FROM OLD.lease_until), NEW.end_reason);
    RETURN NULL;
END
$$;
CREATE TRIGGER zz_chaos_life AFTER UPDATE ON worker FOR EACH ROW
    WHEN (OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL)
    EXECUTE FUNCTION chaos_record_life();

INSERT INTO topic (name, max_running) VALUES ('limited', 2);

-- What the tables and columns of the outbox line mean; a test refuses a table or a column without a comment.


COMMENT ON TABLE outbox IS
    'Work that will happen. A producer sets topic and payload, and may set ordering_key, priority, available_at, max_attempts, unique_key, traceparent; the rest is the workers''.';
COMMENT ON COLUMN outbox.topic IS 'The kind of work. A worker claims the topics that it has a handler for.';
COMMENT ON COLUMN outbox.payload IS 'What the handler is given.';
COMMENT ON COLUMN outbox.max_attempts IS 'After so many failures it is dead.';
COMMENT ON COLUMN outbox.traceparent IS 'The W3C trace that caused it. The handler continues it.';
COMMENT ON COLUMN outbox.state IS
    'ready -> running (claim) -> done | ready (retry, hand-back, rescue) | dead (failures spent) | cancelled; dead or cancelled -> ready (outbox_retry).';
COMMENT ON COLUMN outbox.ordering_key IS 'Rows that share it run one at a time, by id.';
COMMENT ON COLUMN outbox.priority IS 'Higher runs first; it does not reorder the rows of one ordering_key.';
COMMENT ON COLUMN outbox.available_at IS 'Not before this time.';
COMMENT ON COLUMN outbox.attempt IS 'Raised by every claim, never lowered: the fencing token.';
COMMENT ON COLUMN outbox.failures IS 'Counted against max_attempts; a hand-back, a wait or a cancel adds none.';
COMMENT ON COLUMN outbox.blocked IS 'Found waiting for an earlier row of its ordering_key; the end of that row clears it.';
COMMENT ON COLUMN outbox.limited IS 'Its topic had a limit when it was claimed, so its end lets another row start.';
COMMENT ON COLUMN outbox.worker_id IS 'The worker that runs it, or ran it last.';
COMMENT ON COLUMN outbox.unique_key IS 'No two unfinished rows share it.';
COMMENT ON COLUMN outbox.errors IS 'One object an attempt that failed: {"attempt", "at", "error", "worker_id"}.';
COMMENT ON COLUMN outbox.cancel_requested_at IS 'Set it to cancel: a ready row ends at once, a running one when its worker has stopped it.';
COMMENT ON TABLE worker IS 'One row for each life of a worker process. A worker whose lease ended comes back under a new id.';
COMMENT ON COLUMN worker.host IS 'The host it runs on.';
COMMENT ON COLUMN worker.pid IS 'Its process id there.';
COMMENT ON COLUMN worker.version IS 'The version of its code.';
COMMENT ON COLUMN worker.topics IS 'What it has handlers for.';
COMMENT ON COLUMN worker.concurrency IS 'How many rows it runs at once.';
COMMENT ON COLUMN worker.draining IS 'It claims nothing more, and leaves when what it runs has ended.';
COMMENT ON COLUMN worker.presence IS 'The number of the advisory lock that its LISTEN connection holds while it is alive (view worker_present).';
COMMENT ON COLUMN worker.parked IS 'It has free slots and sleeps: producers must notify.';
COMMENT ON COLUMN worker.lease_until IS 'Its running rows are its own until then. Kept only while it runs something.';
COMMENT ON COLUMN worker.ended_at IS 'When it left, or a rescue ended it. It may never claim again, and its rows are freed.';
COMMENT ON COLUMN worker.end_reason IS 'Why it ended: left (after a drain), or what ended it.';
COMMENT ON TABLE topic IS 'Limits of a topic, over all workers. A topic without a row here has only those of its handler.';
COMMENT ON COLUMN topic.name IS 'As in outbox.topic.';
COMMENT ON COLUMN topic.max_running IS 'How many rows may run at once; 0 pauses the topic.';
COMMENT ON COLUMN topic.timeout IS 'How long one attempt may run. It overrides the handler''s own timeout.';
COMMENT ON SEQUENCE outbox_sleepers IS 'It has a last value while a worker may be parked.';
COMMENT ON TABLE outbox_alert IS 'Topics whose oldest due row has waited too long, and when that was last reported.';
COMMENT ON COLUMN outbox_alert.topic IS 'Topic.';
COMMENT ON COLUMN outbox_alert.since IS 'Since when its oldest row has been due.';
COMMENT ON COLUMN outbox_alert.reported IS 'When the last alert was given, by a log line and OUTWAKE_STUCK_WEBHOOK.';
COMMENT ON TABLE producer_topic IS 'What a member of :schema_producer may enqueue: INSERT INTO :schema.producer_topic VALUES (''shop'', ''email.send'').';
COMMENT ON COLUMN producer_topic.role_name IS 'A database role, or one that it is a member of.';
COMMENT ON COLUMN producer_topic.topic IS 'A topic that it may enqueue.';
COMMENT ON FUNCTION producer_writes(text, text, integer) IS
    'Whether a producer may write these keys and a payload of this size.';

-- What the tables and columns of the session line mean; a test refuses a table or a column without a comment.


COMMENT ON FUNCTION uuid_v7() IS 'A UUID version 7; PostgreSQL has one of its own only since 18.';
COMMENT ON FUNCTION repo_key(text) IS
    'The repository that a name means: octo/tools, git@github.com:octo/tools.git and https://github.com/octo/tools are one.';
COMMENT ON TABLE session IS 'A coding agent''s session on one branch of one repository.';
COMMENT ON COLUMN session.user_id IS 'Whose it is, as the authenticating proxy or the token says.';
COMMENT ON COLUMN session.repo IS 'What is cloned: owner/name, or a URL.';
COMMENT ON COLUMN session.target_branch IS 'Where the work branch starts, and what it is meant for.';
COMMENT ON COLUMN session.title IS 'For people to find it by.';
COMMENT ON COLUMN session.parent IS 'The session it was started from, if any.';
COMMENT ON COLUMN session.deleted_at IS 'When it was archived.';
COMMENT ON COLUMN session.inbox_status IS
    'active (work waits) -> pending (a worker has it) -> completed; a new prompt makes it active again; archived.';
COMMENT ON COLUMN session.session_status IS 'active -> archived, by DELETE /sessions/{id}.';
COMMENT ON COLUMN session.branch IS 'The work branch: made from target_branch, the agent commits to it.';
COMMENT ON COLUMN session.sandbox IS 'The sandbox that it holds: {"kind", "item", "borrow_token"}, with "keep_until" while it is kept for the next turn; null if it holds none.';
COMMENT ON COLUMN session.callback_url IS 'The URL that its webhooks go to.';
COMMENT ON COLUMN session.pull_request IS
    'What came of pull_request.open: {"url", "number", "error", "outbox_id"}, with the error of the last attempt; null before it.';
COMMENT ON COLUMN session.last_seq IS 'The highest message.seq given; raised under the lock of the outbox row.';
COMMENT ON TABLE prompt IS 'One user turn of a session.';
COMMENT ON COLUMN prompt.session_id IS 'The session it is a turn of.';
COMMENT ON COLUMN prompt.text IS 'What the user wrote.';
COMMENT ON COLUMN prompt.status IS
    'queued -> running -> succeeded | failed | cancelled; a retry takes it back to queued.';
COMMENT ON COLUMN prompt.reason IS 'Why it failed or was cancelled, for a person to read.';
COMMENT ON COLUMN prompt.result IS 'What the turn left: commits, branch, and the agent''s result event (cost, usage, turns).';
COMMENT ON TABLE message IS 'What the agent printed, in order: one JSON event a row.';
COMMENT ON COLUMN message.session_id IS 'The session it was printed in.';
COMMENT ON COLUMN message.prompt_id IS 'The turn it was printed in.';
COMMENT ON COLUMN message.body IS 'The event as the agent printed it.';
COMMENT ON COLUMN message.seq IS 'Counts per session from 1 without a gap; it is the Last-Event-ID of the event stream.';
COMMENT ON COLUMN message.attempt IS 'The attempt of the outbox row that wrote it; lists show the last attempt of a prompt.';
COMMENT ON TABLE idempotency IS 'The first answer given under an Idempotency-Key, per user.';
COMMENT ON COLUMN idempotency.user_id IS 'Whose key it is.';
COMMENT ON COLUMN idempotency.key IS 'The header''s value, without quotes.';
COMMENT ON COLUMN idempotency.request_hash IS 'The hash of the request''s body. The same key with another body is refused.';
COMMENT ON COLUMN idempotency.session_id IS 'The session that the request made or spoke to.';
COMMENT ON COLUMN idempotency.answer IS 'The body of the first answer. A repeated request gets it again.';
COMMENT ON TABLE watcher IS
    'Sessions that an API process streams. Unlogged: a crash of the server ends every stream, and they come back.';
COMMENT ON COLUMN watcher.session_id IS 'The session that is streamed.';
COMMENT ON COLUMN watcher.presence IS 'The advisory lock (:lock_watch, presence) that the process holds.';
COMMENT ON TABLE sandbox_borrow IS
    'Sandboxes asked for whose answer is not recorded. Delete a row once you have looked whether it leaked.';
COMMENT ON COLUMN sandbox_borrow.id IS 'The allocator gets it as borrow_id in params.';
COMMENT ON COLUMN sandbox_borrow.session_id IS 'The session it was asked for; it may be gone.';
COMMENT ON COLUMN sandbox_borrow.outbox_id IS 'The session.run row whose attempt asked.';
COMMENT ON COLUMN sandbox_borrow.attempt IS 'Which attempt of that row.';
COMMENT ON COLUMN sandbox_borrow.asked_at IS 'When the allocator was about to be asked.';
COMMENT ON COLUMN sandbox_borrow.error IS 'The error that came in place of an answer, if the worker lived to see one.';
COMMENT ON TABLE session_memory IS 'What the next turn of a session starts from, on any host.';
COMMENT ON COLUMN session_memory.session_id IS 'The session.';
COMMENT ON COLUMN session_memory.agent_session IS 'The id under which the agent resumes its transcript.';
COMMENT ON COLUMN session_memory.agent IS 'The kind of agent that left the memory, and alone resumes it; null: claude.';
COMMENT ON COLUMN session_memory.transcript IS 'A tar.gz of the agent''s transcripts, relative to its HOME.';
COMMENT ON COLUMN session_memory.bundle IS
    'A git bundle of the commits that only we have; null when there are none, or the branch was pushed.';
COMMENT ON TABLE api_token IS 'API tokens, for machines. Made and revoked by `outwake token`.';
COMMENT ON COLUMN api_token.user_id IS 'The user that it stands for.';
COMMENT ON COLUMN api_token.name IS 'What it is for, for a person to read.';
COMMENT ON COLUMN api_token.operator IS 'Whether it sees everybody''s sessions, and the outbox.';
COMMENT ON COLUMN api_token.hash IS 'SHA-256 of the token; 256 random bits need no slow hash (outwake/session/token.py).';
COMMENT ON COLUMN api_token.expires_at IS 'It is refused from then on; null: it never expires.';
COMMENT ON COLUMN api_token.revoked_at IS 'It is refused since then.';
COMMENT ON COLUMN api_token.last_used_at IS 'When it was last used, to a minute; null: never.';
COMMENT ON TABLE sql_reader IS 'Binds a database role that is a member of :schema_reader to a user.';
COMMENT ON COLUMN sql_reader.role_name IS 'The role.';
COMMENT ON COLUMN sql_reader.user_id IS 'Whose sessions it sees, whatever it sets.';
COMMENT ON TABLE session_admission IS 'Rows that are locked while a user''s sessions are counted; the slot is a hash of the user.';
COMMENT ON COLUMN session_admission.slot IS 'Of hashtext(user_id), the last ten bits.';

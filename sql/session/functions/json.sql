-- Sessions, prompts and messages as the HTTP API shows them.


CREATE OR REPLACE FUNCTION session_json(s session) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'id', s.id, 'user_id', s.user_id, 'repo', s.repo, 'target_branch', s.target_branch,
    'branch', s.branch, 'title', s.title, 'parent', s.parent, 'callback_url', s.callback_url,
    'inbox_status', s.inbox_status, 'session_status', s.session_status,
    'pull_request', s.pull_request - 'outbox_id',
    'created_at', s.created_at, 'updated_at', s.updated_at);
COMMENT ON FUNCTION session_json(session) IS 'A session as the HTTP API shows it.';


CREATE OR REPLACE FUNCTION prompt_json(p prompt) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'id', p.id, 'session_id', p.session_id, 'text', p.text, 'status', p.status,
    'reason', p.reason, 'result', p.result, 'created_at', p.created_at,
    'started_at', p.started_at, 'finished_at', p.finished_at, 'retrying', NULL);
COMMENT ON FUNCTION prompt_json(prompt) IS 'A prompt as the HTTP API shows it.';


CREATE OR REPLACE FUNCTION message_json(
    seq bigint, prompt_id uuid, attempt integer, body jsonb, created_at timestamptz
) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'seq', seq, 'prompt_id', prompt_id, 'attempt', attempt, 'body', body, 'created_at', created_at);
COMMENT ON FUNCTION message_json(bigint, uuid, integer, jsonb, timestamptz) IS
    'A message as the HTTP API and its event stream show it.';

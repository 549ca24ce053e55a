-- Whose memory a session has: the kind of agent that left it (worker/agents/kinds.py).
--
-- code of the version before: goes on
--
-- Null is claude: the version before knows no other agent with a memory, and writes no kind.

ALTER TABLE session_memory ADD COLUMN agent text;

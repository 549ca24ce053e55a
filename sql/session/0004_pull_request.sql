-- The pull request of a session's work branch, which Outwake opened.
--
-- code of the version before: goes on
--
-- A column without a default: its table is locked for an instant and not read.
ALTER TABLE session ADD COLUMN pull_request jsonb;

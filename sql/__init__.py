"""The schema as plain SQL migrations."""

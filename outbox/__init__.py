"""The outbox library."""

"""The built-in topics."""

"""The embedded parts: Postgres, a scripted agent, the demo."""

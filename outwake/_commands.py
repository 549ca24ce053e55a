"""A person's commands about one row, by name: the functions of sql/outbox/functions/commands.sql."""

from outwake.schema import in_schema

COMMANDS = {
    "cancel": in_schema("SELECT :schema.outbox_cancel(%s)"),
    "retry": in_schema("SELECT :schema.outbox_retry(%s)"),
    "discard": in_schema("SELECT :schema.outbox_discard(%s)"),
}
"""Each returns the row's new state, or null if the row's state does not allow it."""

"""The database schema that holds everything of Outwake's, and the names that derive from it.

Nothing outside of the schema is created, altered or commented on. OUTWAKE_SCHEMA names it, by default
`outwake`, and a process has one. Notification channels, advisory locks, settings and roles belong to a
database or a cluster, so their names derive from the schema's. So two installations in one database do not
hear each other.

SQL texts, here and in sql/, hold placeholders, which `Schema.sql` fills in:

    :schema           the name, also as the first part of another: ':schema_wake', ':schema.user_id'
    :lock_presence    the first integer of an advisory lock; the second says whose lock it is
"""

import os
import re
import zlib
from dataclasses import dataclass
from typing import LiteralString

from outwake.errors import ConfigurationError

_PLACEHOLDER = re.compile(r"(?<!:):(?:schema|lock_([a-z]+))")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}")

LOCKS = {
    "presence": 1,  # a worker's LISTEN connection; second integer: worker.presence
    "key": 2,  # an ordering_key
    "topic": 3,  # a topic's limit
    "migrate": 4,  # a migration
    "watch": 5,  # a process that streams sessions
    "sleepers": 6,  # the sequence outbox_sleepers
}
"""The purpose of a lock; the number is the last digit of the advisory lock's first integer."""


@dataclass(frozen=True)
class Schema:
    """A schema, by its name. Raises ConfigurationError if the name needs quotes or is not allowed for us."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    def sql(self, text: LiteralString) -> LiteralString:
        """The text with its placeholders filled in."""
        return _PLACEHOLDER.sub(self._filled, text)

    def lock(self, what: str) -> int:
        """The first integer of the advisory lock for `what`, one of LOCKS."""
        return (zlib.crc32(self.name.encode()) & 0x7FFFFFF0) | LOCKS[what]

    def _filled(self, found: re.Match[str]) -> str:
        return self.name if found[1] is None else str(self.lock(found[1]))


def check_name(name: str) -> str:
    """Return `name` if our schema may have this name. Raises ConfigurationError."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            "OUTWAKE_SCHEMA: must be lower-case letters, digits and underscores, at most 40, no digit first"
        )
    if name in ("public", "information_schema") or name.startswith("pg_"):
        raise ConfigurationError(f"OUTWAKE_SCHEMA: {name} belongs to others: name a schema of Outwake's own")
    return name


def _configured() -> Schema:
    """The schema of OUTWAKE_SCHEMA. `load` and `migrate` refuse an invalid name in one line. Here, where an
    error would be a traceback at import, it becomes a name that no database has.
    """
    try:
        return Schema(os.environ.get("OUTWAKE_SCHEMA") or "outwake")
    except ConfigurationError:
        return Schema("outwake_schema_is_not_a_name")


SCHEMA = _configured()
"""The schema of this process."""


def in_schema(text: LiteralString) -> LiteralString:
    """A query's text for this process's schema: `in_schema("SELECT id FROM :schema.outbox")`."""
    return SCHEMA.sql(text)

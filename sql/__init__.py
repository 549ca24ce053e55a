"""The schema as plain SQL, in two lines: `outbox`, and `session`, which stands on it and may be left out.

Each line has two kinds of files:

- `NNNN_words.sql`: tables, types and indexes. Applied once, in the order of their numbers, and frozen from
  then on: sql/frozen.txt has their hashes. The words "code of the version before: goes on" or "must stop" in
  a file say whether older code may go on beside it.
- `functions/*.sql`: functions, views, triggers, comments and rights. They can be repeated, and are applied
  again, in one transaction, when one of them has changed.

The texts hold the placeholders of outwake/schema.py.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal, LiteralString

Line = Literal["outbox", "session"]

LINES: tuple[Line, ...] = ("outbox", "session")

OLDEST: dict[Line, int] = {"outbox": 1, "session": 1}
"""The schema of the version before: this code goes on beside it until somebody migrates."""

# In the order in which they are applied: a view and a RETURN need what they name.
_FUNCTIONS: dict[Line, tuple[str, ...]] = {
    "outbox": (
        "wake",
        "settle",
        "order",
        "lease",
        "reconnect",
        "claim",
        "finish",
        "rescue",
        "scan",
        "park",
        "compat",
        "views",
        "history",
        "ready",
        "commands",
        "enqueue",
        "json",
        "prune",
        "triggers",
        "comments",
        "access",
    ),
    "session": (
        "json",
        "limits",
        "fair",
        "create",
        "cancel",
        "follow",
        "events",
        "sandbox",
        "webhook",
        "history",
        "prune",
        "triggers",
        "comments",
        "access",
    ),
}

_NUMBERED = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_BREAKING = re.compile(r"^-- code of the version before: (goes on|must stop)$", re.MULTILINE)


@dataclass(frozen=True)
class File:
    """One file of a line. `number` is None for a file that can be repeated."""

    line: Line
    number: int | None
    name: str
    """Without the ending: `outbox/0001_tables`, `outbox/claim`."""
    text: LiteralString

    @cached_property
    def sha256(self) -> str:
        """Of the text as it stands in the file, before its placeholders are filled in."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def breaking(self) -> bool:
        """Whether code of the version before must stop before this is applied."""
        said = _BREAKING.search(self.text)
        return said is not None and said[1] == "must stop"


@cache
def files(line: Line) -> tuple[File, ...]:
    """The files of a line: first the numbered ones, from 1 without a gap, then those that can be repeated."""
    folder = resources.files(__name__).joinpath(line)
    numbered = []
    for entry in folder.iterdir():
        if found := _NUMBERED.fullmatch(entry.name):
            numbered.append(File(line, int(found[1]), f"{line}/{entry.name[:-4]}", _text(entry)))
    numbered.sort(key=lambda file: file.name)
    functions = [
        File(line, None, f"{line}/{name}", _text(folder.joinpath("functions", f"{name}.sql")))
        for name in _FUNCTIONS[line]
    ]
    return (*numbered, *functions)


def newest(line: Line) -> int:
    """The number of the last numbered file of a line."""
    return max(file.number for file in files(line) if file.number is not None)


def _text(file: Traversable) -> LiteralString:
    return file.read_text(encoding="utf-8")

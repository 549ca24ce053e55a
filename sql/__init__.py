"""The schema as plain SQL migrations, `NNNN_words.sql`, applied in the order of their numbers."""

import re
from dataclasses import dataclass
from importlib import resources

_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


@dataclass(frozen=True)
class Migration:
    """One file: its number, its name without the ending, and its text."""

    number: int
    name: str
    text: str


def migrations() -> list[Migration]:
    """All migrations, in order. Numbers start at 1 and leave no gap (a unit test holds that)."""
    found = []
    for file in resources.files(__name__).iterdir():
        if match := _NAME.fullmatch(file.name):
            text = file.read_text(encoding="utf-8")
            found.append(Migration(int(match[1]), file.name.removesuffix(".sql"), text))
    return sorted(found, key=lambda m: m.number)

"""Tables for people, JSON for programs.

Text from the database may come from anybody, including an agent. So control characters, which a terminal
would obey, are made visible before they are printed.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_KEPT = "\n\t"
_PLAIN_WIDTH = 200  # columns, if there is no terminal

Record = dict[str, Any]


def console() -> Console:
    """Standard output; without colours, and wide, if it is not a terminal."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def clean(text: str) -> str:
    """The text with every control character except newline and tab shown in escaped form."""
    return "".join(
        char if char in _KEPT or (char >= " " and not "\x7f" <= char <= "\x9f") else f"\\x{ord(char):02x}"
        for char in text
    )


def as_json(value: Any) -> str:
    """One line of JSON: times in ISO 8601, intervals in seconds."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, timedelta):
        return round(value.total_seconds(), 3)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Record],
    *,
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
    one_line: bool = False,
) -> Table:
    """A table; a missing value stays empty. A value that is too long is folded or, with `one_line`, cut.
    Values of the columns `right` and `whole` are not cut.
    """
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    for name in columns:
        made.add_column(
            name.replace("_", " "),
            justify="right" if name in right else "left",
            overflow="fold",
            # rich takes the width that is missing from the other columns.
            no_wrap=one_line and (name in right or name in whole),
        )
    for cell in (cell for row in cells if one_line for cell in row):
        cell.no_wrap, cell.overflow = True, "ellipsis"
    for row in cells:
        made.add_row(*row)
    return made


def _cell(value: Any) -> Text:
    if value is None:
        return Text("")
    if isinstance(value, timedelta):
        return Text(duration(value))
    if isinstance(value, datetime):
        return Text(value.astimezone().strftime("%Y-%m-%d %H:%M:%S"))
    if isinstance(value, list):
        return Text(clean(", ".join(map(str, value))))
    text = clean(str(value)).replace("\n", " ")
    return Text(text, style=_STYLES.get(text, ""))


_STYLES = {
    "dead": "red",
    "no worker": "red",
    "worker lost": "red",
    "lost": "red",
    "late": "red",
    "unnoticed": "red",
    "locked": "yellow",
    "workers busy": "yellow",
    "absent": "yellow",
    "draining": "yellow",
}


def duration(value: timedelta) -> str:
    """A short text for a duration: 3.2 s, 4 min 10 s, 5 h 2 min, 3 d 4 h."""
    seconds = value.total_seconds()
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 10:
        return f"{sign}{seconds:.1f} s"
    whole = int(seconds)
    for (unit, size), (smaller, part) in pairwise(_UNITS):
        if whole >= size:
            return f"{sign}{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{sign}{whole} s"


_UNITS = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]

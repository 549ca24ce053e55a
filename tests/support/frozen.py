"""Adds the numbered files of sql/ that are new to sql/frozen.txt: `make freeze`. It never changes a line."""

import sys

from outwake.sql import LINES, files
from tests.support.process import ROOT

FROZEN = ROOT / "sql" / "frozen.txt"


def frozen() -> dict[str, str]:
    """The hash of each frozen file, by its name."""
    lines = (line.split("  ") for line in FROZEN.read_text().splitlines())
    return {name: sha256 for sha256, name in lines}


def main() -> None:
    """Exit status 1 if a file that is frozen has changed."""
    known = frozen()
    there = [file for line in LINES for file in files(line) if file.number]
    changed = [file.name for file in there if known.get(file.name, file.sha256) != file.sha256]
    if changed:
        sys.exit(f"frozen, and changed: {', '.join(changed)}. Undo that, and write a new numbered file")
    FROZEN.write_text("".join(f"{file.sha256}  {file.name}\n" for file in there))


if __name__ == "__main__":
    main()

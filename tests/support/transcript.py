"""Pages whose outputs are made: a test runs every example of a page and compares what it says.

    ```psql
    => SELECT 1 AS one;
     one
    -----
       1
    (1 row)
    ```

and ```console blocks with `$ outwake …`, `$ worker …` or `$ curl -s URL`. With OUTWAKE_WRITE_DOCS=1 in the
environment the test writes the outputs into the page instead. Times, intervals, ids and ports differ from
run to run: they are compared by their kind only.
"""

import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection

from outwake.cli.output import clean

WRITE = os.environ.get("OUTWAKE_WRITE_DOCS") == "1"

_PSQL = re.compile(r"(?<=```psql\n)=> (?P<asked>.*?;)\n(?P<said>.*?)(?=```)", re.DOTALL)
_CONSOLE = re.compile(r"(?<=```console\n)\$ (?P<asked>[^\n]*)\n(?P<said>.*?)(?=```)", re.DOTALL)

_VOLATILE = [
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?([+-]\d\d(:\d\d)?|Z)?"), "TIME"),
    (re.compile(r"-?(\d+ days? )?\d\d:\d\d:\d\d(\.\d+)?"), "INTERVAL"),
    (re.compile(r"\b\d+ (d|h|min) \d+ (h|min|s)\b|\b\d+(\.\d+)? s\b"), "INTERVAL"),
    (re.compile(r"\bpid \d+"), "pid N"),
    (re.compile(r"\d+\.\d+"), "NUMBER"),
    (re.compile(r"e-\d+"), ""),
]


async def check(
    page: Path,
    conn: AsyncConnection[Any],
    command: Callable[[str], Awaitable[str]] | None = None,
) -> None:
    """Run the examples of `page` in order. Raises AssertionError where the page says something else."""
    text = page.read_text()
    parts = sorted(
        [*_PSQL.finditer(text), *(_CONSOLE.finditer(text) if command else [])], key=lambda m: m.start()
    )
    assert parts, "no example was found"
    written, end = "", 0
    for part in parts:
        if part.re is _PSQL:
            said = await psql(conn, part["asked"].replace("\n   ", "\n"))
        else:
            assert command is not None
            said = await command(part["asked"])
        if not WRITE:
            is_now, was = still(said), still(part["said"])
            assert is_now == was, f"{part['asked']}\n--- it says\n{is_now}\n--- the page has\n{was}"
        written += text[end : part.start("said")] + said
        end = part.end("said")
    if WRITE:
        page.write_text(written + text[end:])


def still(text: str) -> str:
    """The text without what differs from run to run, widths of columns included."""
    for pattern, kind in _VOLATILE:
        text = pattern.sub(kind, text)
    text = re.sub(r"[-─]{3,}(\+-+)*", "---", text)
    return "\n".join(re.sub(r" +", " ", line).strip() for line in text.strip().splitlines())


async def psql(conn: AsyncConnection[Any], statement: str) -> str:
    """What psql would print, aligned as it does."""
    cursor = await conn.execute(statement.rstrip(";").encode())
    if cursor.description is None:
        return f"{cursor.statusmessage}\n"
    names = [column.name for column in cursor.description]
    numeric = [column.type_code in (20, 21, 23, 700, 701, 1700) for column in cursor.description]
    result = cursor.pgresult  # the server's own words: psycopg would make Python values of them
    assert result is not None
    rows = [[_shown(result.get_value(i, k)) for k in range(result.nfields)] for i in range(result.ntuples)]
    widths = [max(len(name), *(len(row[i]) for row in rows), 0) for i, name in enumerate(names)]
    lines = ["|".join(f" {name:^{width}} " for name, width in zip(names, widths, strict=True)).rstrip()]
    lines.append("+".join("-" * (width + 2) for width in widths))
    for row in rows:
        cells = [
            f" {cell:>{width}} " if right else f" {cell:<{width}} "
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("|".join(cells).rstrip())
    lines.append(f"({len(rows)} row{'' if len(rows) == 1 else 's'})")
    return "\n".join(lines) + "\n"


def _shown(value: bytes | None) -> str:
    return "" if value is None else clean(value.decode()).replace("\n", " ")

"""`outwake migrate` and `outwake uninstall`."""

import argparse
import asyncio
import os
import sys
from dataclasses import asdict
from typing import Any

from outwake._migrate import Step, migrate, pending, plan, print_sql, uninstall_sql
from outwake.cli.output import as_json, console, table
from outwake.cli.progress import progress
from outwake.errors import ConfigurationError
from outwake.schema import SCHEMA, check_name
from outwake.settings import has_database, load
from outwake.sql import LINES, Line, files
from outwake.telemetry import log


def run(arguments: argparse.Namespace) -> int:
    """Run `outwake migrate` and return its exit status."""
    if arguments.json and not arguments.list:
        raise ConfigurationError("migrate: --json goes with --list")
    if arguments.no_transaction and not arguments.print:
        raise ConfigurationError("migrate: --no-transaction goes with --print")
    if arguments.print and not has_database():
        _check_schema()
        _print(asyncio.run(print_sql(None, only=arguments.only, transaction=not arguments.no_transaction)))
        return 0
    settings = load()
    log.configure(level=settings.log_level)
    url = settings.listen_url  # the lock belongs to a session, which a pooler may not keep
    if arguments.print:
        _print(asyncio.run(print_sql(url, only=arguments.only, transaction=not arguments.no_transaction)))
    elif arguments.list:
        _list(url, arguments.only, json=arguments.json)
    elif arguments.dry_run:
        _dry_run(url, arguments.only)
    else:
        _migrate(url, arguments.only)
    return 0


def uninstall() -> int:
    """Run `outwake uninstall`, which needs no database, and return its exit status."""
    _check_schema()
    _print(uninstall_sql())
    return 0


def _print(sql: str) -> None:
    """Print the SQL; print nothing, not even a line, if nothing is missing."""
    if sql:
        print(sql.removesuffix("\n"))


def _check_schema() -> None:
    """Check OUTWAKE_SCHEMA alone. `load` would also check the other settings, which are not needed here."""
    check_name(os.environ.get("OUTWAKE_SCHEMA") or SCHEMA.name)


def _list(url: str, only: Line | None, *, json: bool) -> None:
    steps = [asdict(step) for step in asyncio.run(plan(url, only=only))]
    if json:
        for step in steps:
            print(as_json(step))
        return
    rows = [{**step, "older code": _older_code(step)} for step in steps]
    columns = ["name", "kind", "state", "older code", "applied_at"]
    console().print(table(f"Schema {SCHEMA.name}", columns, rows))


def _older_code(step: dict[str, Any]) -> str:
    """What the previous version's code must do beside a step; functions never stop it."""
    if step["kind"] != "numbered":
        return ""
    return "must stop" if step["breaking"] else "goes on"


def _dry_run(url: str, only: Line | None) -> None:
    names = asyncio.run(pending(url, only=only))
    for name in names:
        print(f"would apply {name}")
    if not names:
        print(f"schema {SCHEMA.name}: nothing to apply")


def _migrate(url: str, only: Line | None) -> None:
    lines = [line for line in LINES if only in (None, line)]
    everything = [file for line in lines for file in files(line)]
    # The order of application: the functions come last.
    names = [file.name for file in sorted(everything, key=lambda file: file.number is None)]
    with progress() as report:

        def applying(name: str) -> None:
            print(f"applying {name}", flush=True)
            report(f"applying {name}", names.index(name) / len(names))

        asyncio.run(migrate(url, applying, only=only, warn=_warn))
    steps = asyncio.run(plan(url, only=only))
    numbers = ", ".join(f"{line} {_number(steps, line)}" for line in lines)
    newer = ", newer than this code" if any(step.state == "newer" for step in steps) else ""
    print(f"schema {SCHEMA.name}: {numbers}{newer}")


def _number(steps: list[Step], line: Line) -> int:
    """The number of numbered files of the line that the database has."""
    return sum(step.line == line and step.kind == "numbered" and step.state != "missing" for step in steps)


def _warn(text: str) -> None:
    print(f"outwake: {text}", file=sys.stderr)

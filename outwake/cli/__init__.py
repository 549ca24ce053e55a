"""The `outwake` command: set up the database, serve the API, look, and an operator's hand on the outbox."""

import argparse
import asyncio
import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from uuid import UUID

import psycopg

from outwake import log
from outwake.cli import token as token_cli
from outwake.cli.progress import progress
from outwake.cli.status import status, top
from outwake.cli.tail import tail
from outwake.errors import ConfigurationError, SchemaError
from outwake.migrate import migrate
from outwake.prune import prune
from outwake.settings import Settings, load
from outwake.sql import migrations

_OPERATIONS = {
    "cancel": "cancel a row that waits or runs",
    "retry": "make a dead or cancelled row ready again",
    "discard": "end a dead row for good",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit status 0 on success, 1 if there was nothing to do, no database, or (status)
    it is not ready, 2 on a usage error.
    """
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(_run(arguments))
    except (ConfigurationError, SchemaError) as error:
        print(f"outwake: {error}", file=sys.stderr)
        sys.exit(2)
    except (psycopg.Error, OSError) as error:
        print(f"outwake: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="outwake", description="Outwake, an outbox on Postgres.")
    commands = parser.add_subparsers(dest="command", required=True)
    found = commands.add_parser("migrate", help="bring the database to this version's schema")
    found.add_argument("--print", action="store_true", help="print the SQL instead")
    commands.add_parser("api", help="serve the HTTP API")
    found = commands.add_parser("status", help="show outbox and workers, and what is stuck")
    _add_json(found, "one JSON object")
    found = commands.add_parser("top", help="the same, live")
    found.add_argument("--every", type=_seconds, default=2.0, metavar="S", help="seconds between looks (2)")
    _add_json(found, "one JSON object a look")
    found = commands.add_parser("tail", help="follow a session's messages")
    found.add_argument("session", type=UUID, help="its id")
    found.add_argument("--after", type=int, default=0, metavar="SEQ", help="only messages after this one")
    found.add_argument("--until-completed", action="store_true", help="end when nothing is left to run")
    _add_json(found, "one JSON object a message or status")
    for name, text in _OPERATIONS.items():
        commands.add_parser(name, help=text).add_argument("row", type=int, nargs="+", help="outbox ids")
    token_cli.add_parser(commands)
    commands.add_parser("wake", help="wake every worker, for rows that no trigger saw")
    commands.add_parser("prune", help="delete what is past its retention now")
    return parser


def _add_json(parser: argparse.ArgumentParser, form: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {form} instead of tables")


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError("must be between 0.1 and 3600")
    return number


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "migrate":
        return _migrate(arguments.print)
    settings = load()
    match arguments.command:
        case "api":
            # By name: this library does not depend on the application.
            importlib.import_module("outwake.app.main").run(settings)
        case "status":
            return asyncio.run(status(settings, json=arguments.json))
        case "top":
            return asyncio.run(top(settings, every=arguments.every, json=arguments.json))
        case "tail":
            return asyncio.run(
                tail(
                    settings,
                    arguments.session,
                    after=arguments.after,
                    json=arguments.json,
                    until_completed=arguments.until_completed,
                )
            )
        case "token":
            return asyncio.run(token_cli.run(settings, arguments))
        case "wake":
            asyncio.run(_call(settings, "SELECT outbox_wake()", [()]))
        case "prune":
            return asyncio.run(_prune(settings))
        case operation:
            return _operate(settings, operation, arguments.row)
    return 0


def _migrate(only_print: bool) -> int:
    if only_print:
        for migration in migrations():
            print(f"-- {migration.name}\n{migration.text}")
        return 0
    settings = load()
    log.configure(level=settings.log_level)
    names = [migration.name for migration in migrations()]
    with progress() as tell:

        def applying(name: str) -> None:
            print(f"applying {name}", flush=True)
            tell(f"applying {name}", names.index(name) / len(names))

        # Its lock belongs to a session, which a pooler in transaction mode does not give.
        asyncio.run(migrate(settings.listen_url, applying))
    print(f"schema {migrations()[-1].number} is in place")
    return 0


async def _prune(settings: Settings) -> int:
    async with await psycopg.AsyncConnection.connect(settings.database_url, autocommit=True) as conn:
        with progress() as tell:
            pruned = await prune(
                lambda: nullcontext(conn),
                settings,
                lambda so_far, done: tell(f"{so_far.rows} rows, {so_far.others} others", done),
            )
    print(f"deleted {pruned.rows} rows of outbox and {pruned.others} of other tables")
    return 0


def _operate(settings: Settings, operation: str, rows: list[int]) -> int:
    states = asyncio.run(_call(settings, f"SELECT outbox_{operation}(%s)", [(row,) for row in rows]))
    for row, state in zip(rows, states, strict=True):
        print(f"{row} {state or 'unchanged: no such row, or not in a state for that'}")
    return 0 if all(states) else 1


async def _call(settings: Settings, query: str, calls: Sequence[tuple[int, ...]]) -> list[str | None]:
    conn = await psycopg.AsyncConnection.connect(settings.database_url, autocommit=True)
    results: list[str | None] = []
    async with conn:
        for arguments in calls:
            cursor = await conn.execute(query, arguments)
            row = await cursor.fetchone()
            results.append(row[0] if row else None)
    return results

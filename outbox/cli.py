"""The `sendoff` command: set up the database, serve the API, and an operator's hand on the outbox."""

import argparse
import asyncio
import importlib
import sys
from collections.abc import Sequence

import psycopg

from outbox import log, token_cli
from outbox.errors import ConfigurationError, SchemaError
from outbox.migrate import migrate
from outbox.settings import Settings, load
from sql import migrations

_OPERATIONS = {
    "cancel": "cancel a row that waits or runs",
    "retry": "make a dead or cancelled row ready again",
    "discard": "end a dead row for good",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit status 0 on success, 1 if there was nothing to do or no database, 2 on a
    usage error.
    """
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(_run(arguments))
    except (ConfigurationError, SchemaError) as error:
        print(f"sendoff: {error}", file=sys.stderr)
        sys.exit(2)
    except (psycopg.Error, OSError) as error:
        print(f"sendoff: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sendoff", description="Sendoff, an outbox on Postgres.")
    commands = parser.add_subparsers(dest="command", required=True)
    found = commands.add_parser("migrate", help="bring the database to this version's schema")
    found.add_argument("--print", action="store_true", help="print the SQL instead")
    commands.add_parser("api", help="serve the HTTP API")
    for name, text in _OPERATIONS.items():
        commands.add_parser(name, help=text).add_argument("row", type=int, nargs="+", help="outbox ids")
    token_cli.add_parser(commands)
    commands.add_parser("wake", help="wake every worker, for rows that no trigger saw")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "migrate":
        return _migrate(arguments.print)
    settings = load()
    if arguments.command == "api":
        # By name: this library does not depend on the application.
        importlib.import_module("app.main").run(settings)
        return 0
    if arguments.command == "token":
        return asyncio.run(token_cli.run(settings, arguments))
    if arguments.command == "wake":
        asyncio.run(_call(settings, "SELECT outbox_wake()", [()]))
        return 0
    return _operate(settings, arguments.command, arguments.row)


def _migrate(only_print: bool) -> int:
    if only_print:
        for migration in migrations():
            print(f"-- {migration.name}\n{migration.text}")
        return 0
    settings = load()
    log.configure(level=settings.log_level)
    # Its lock belongs to a session, which a pooler in transaction mode does not give.
    asyncio.run(migrate(settings.listen_url, lambda name: print(f"applying {name}")))
    print(f"schema {migrations()[-1].number} is in place")
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

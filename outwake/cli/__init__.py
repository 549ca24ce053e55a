"""The `outwake` command: set up the database, serve the API, inspect and change the outbox."""

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, LiteralString
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict

from outwake._commands import COMMANDS
from outwake.errors import ConfigurationError, SchemaError
from outwake.schema import SCHEMA, in_schema

if TYPE_CHECKING:
    from outwake.settings import Settings

_OPERATIONS = {
    "cancel": "cancel a row that waits or runs",
    "retry": "make a dead or cancelled row ready again",
    "discard": "end a dead row for good",
}
_WAKE = in_schema(
    "SELECT w.n FROM (SELECT :schema.outbox_wake()) AS done, LATERAL (SELECT count(*)::int AS n"
    " FROM :schema.worker_present) AS w"
)
_ROLES = {"status": "monitor", "top": "monitor", "prune": "worker", "wake": "operator"}
_ROLES.update(dict.fromkeys(_OPERATIONS, "operator"))
"""The role that a command needs; the others need the owner of the schema."""
_UNCHANGED = "unchanged: no such row, or not in a state for that, or its unique_key is taken"
_EXTRAS = ("api", "worker")
"""The commands with an extra of the same name; the others need `cli`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. The exit status is 0 on success. It is 1 if there was nothing to do, if the database
    cannot be reached, or (status) if it is not ready. It is 2 on a usage error, a wrong setting, a missing
    package or a missing right.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
        sys.exit(status)
    except (ConfigurationError, SchemaError) as error:
        print(f"outwake: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = (error.name or "outwake").partition(".")[0]
        if missing == "outwake":  # our own fault
            raise
        command = words[0] if words and not words[0].startswith("-") else "outwake"
        extra = command if command in _EXTRAS else "cli"
        print(
            f"outwake: the command {command} needs {missing}: pip install 'outwake[{extra}]'", file=sys.stderr
        )
        sys.exit(2)
    except BrokenPipeError:  # the reader of standard output has gone: `outwake migrate --print | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except psycopg.errors.InsufficientPrivilege as error:
        print(f"outwake: {_first_line(error)}: {_mend(words[0])}", file=sys.stderr)
        sys.exit(2)
    except (psycopg.Error, OSError) as error:
        print(f"outwake: {_first_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _mend(command: str) -> str:
    """The statement or advice that gives the right that a command lacks."""
    from outwake.connect import grant
    from outwake.settings import load

    url = load().database_url
    if command in _ROLES:
        return grant(f"{SCHEMA.name}_{_ROLES[command]}", url)
    owner = f"do it as the owner of the schema {SCHEMA.name}"
    if command == "migrate":
        database = conninfo_to_dict(url).get("dbname") or "the database"
        return f"{owner}, or, if there is none, {grant(f'CREATE ON DATABASE {database}', url)}"
    return owner


def _first_line(error: Exception) -> str:
    """The error's first line, without passwords: a server's message may quote what was sent to it."""
    from outwake.telemetry.log import redact_text

    lines = redact_text(str(error).strip()).splitlines()
    return lines[0] if lines else type(error).__name__


def _parser() -> argparse.ArgumentParser:
    from outwake.cli import token
    from outwake.cli.parser import Parser

    parser = Parser(prog="outwake", description="Outwake, an outbox on Postgres.")
    parser.add_argument("--version", action="version", version=f"outwake {metadata.version('outwake')}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_migrate(commands.add_parser("migrate", help="bring the database to this version's schema"))
    commands.add_parser("uninstall", help="print the SQL that removes everything of Outwake's")
    commands.add_parser("api", help="serve the HTTP API")
    commands.add_parser("worker", help="run handlers: the same as the command worker", add_help=False)
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
    token.add_parser(commands)
    commands.add_parser("wake", help="wake every worker, for rows that no trigger saw")
    commands.add_parser("prune", help="delete what is past its retention now")
    return parser


def _add_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=["outbox"], help="leave out the tables that sessions need")
    instead = parser.add_mutually_exclusive_group()
    add = instead.add_argument
    add("--list", action="store_true", help="show every step and its state instead")
    add("--dry-run", action="store_true", help="name what would be applied instead")
    add(
        "--print",
        action="store_true",
        help="print the SQL of what is missing instead; of all of it if no database is named",
    )
    parser.add_argument(
        "--no-transaction",
        action="store_true",
        help="with --print: leave BEGIN and COMMIT out, for a tool that has a transaction of its own",
    )
    _add_json(parser, "one JSON object a step")


def _add_json(parser: argparse.ArgumentParser, form: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {form} instead of tables")


def _seconds(text: str) -> float:
    number = float(text)  # a ValueError is a usage error too
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError("must be between 0.1 and 3600")
    return number


def _run(words: list[str]) -> int:
    """Each command imports only what it needs, so that no command needs another's packages."""
    if words[:1] == ["worker"]:  # all other words are the worker's, including --help
        # Imported by name, like the API below, because this library depends on neither.
        importlib.import_module("outwake.worker.cli").main(words[1:])
    arguments = _parser().parse_args(words)
    from outwake.settings import load

    match arguments.command:
        case "migrate":
            from outwake.cli import migrate

            return migrate.run(arguments)
        case "uninstall":
            from outwake.cli import migrate

            return migrate.uninstall()
        case "api":
            importlib.import_module("outwake.app.main").run(load())
        case "status":
            from outwake.cli.status import status

            return asyncio.run(status(load(), json=arguments.json))
        case "top":
            from outwake.cli.status import top

            return asyncio.run(top(load(), every=arguments.every, json=arguments.json))
        case "tail":
            return _tail(load(), arguments)
        case "token":
            from outwake.cli import token

            return asyncio.run(token.run(load(), arguments))
        case "wake":
            [present] = asyncio.run(_call(load(), _WAKE, [()]))
            print(f"woke every worker; present now: {present}")
        case "prune":
            return asyncio.run(_prune(load()))
        case operation:
            return _operate(load(), operation, arguments.row)
    return 0


def _tail(settings: "Settings", arguments: argparse.Namespace) -> int:
    from outwake.cli.tail import tail

    following = tail(
        settings,
        arguments.session,
        after=arguments.after,
        json=arguments.json,
        until_completed=arguments.until_completed,
    )
    return asyncio.run(following)


async def _prune(settings: "Settings") -> int:
    from outwake.cli.connection import open_connection
    from outwake.cli.progress import progress
    from outwake.prune import prune

    async with await open_connection(settings) as conn:
        with progress() as report:
            pruned = await prune(
                lambda: nullcontext(conn),
                settings,
                lambda so_far, done: report(f"{so_far.rows} rows, {so_far.others} others", done),
            )
    print(f"deleted {pruned.rows} rows of outbox and {pruned.others} of other tables")
    return 0


def _operate(settings: "Settings", operation: str, rows: list[int]) -> int:
    query = COMMANDS[operation]
    states = asyncio.run(_call(settings, query, [(row,) for row in rows]))
    for row, state in zip(rows, states, strict=True):
        print(f"{row} {state or _UNCHANGED}")
    return 0 if all(states) else 1


async def _call(
    settings: "Settings", query: LiteralString, calls: Sequence[tuple[int, ...]]
) -> list[str | None]:
    from outwake.cli.connection import open_connection

    results: list[str | None] = []
    async with await open_connection(settings) as conn:
        for arguments in calls:
            cursor = await conn.execute(query, arguments)
            row = await cursor.fetchone()
            results.append(row[0] if row else None)
    return results

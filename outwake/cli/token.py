"""`outwake token create | list | revoke`."""

import argparse
import sys
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from outwake.cli.connection import open_connection
from outwake.schema import in_schema
from outwake.session import token
from outwake.settings import Settings

_LIST = in_schema(
    """
SELECT
    id, user_id, name, operator, created_at, last_used_at, expires_at,
    CASE WHEN revoked_at IS NOT NULL THEN 'revoked'
         WHEN expires_at <= clock_timestamp() THEN 'expired'
         ELSE 'valid' END
FROM :schema.api_token
ORDER BY created_at, id
"""
)
_TITLES = ("ID", "STATE", "USER", "OPERATOR", "NAME", "CREATED", "LAST USED", "EXPIRES")


def add_parser(commands: Any) -> None:
    """Add `token` to the commands of `outwake`."""
    parser = commands.add_parser("token", help="make, list and revoke API tokens")
    actions = parser.add_subparsers(dest="action", required=True)
    found = actions.add_parser("create", help="make a token and print it, this once")
    found.add_argument("--user", type=_user, required=True, help="the user it stands for")
    found.add_argument("--name", type=_name, required=True, help="what it is for")
    found.add_argument("--operator", action="store_true", help="it sees everybody's sessions, and the outbox")
    found.add_argument("--days", type=_days, metavar="N", help="days until it expires; never without this")
    actions.add_parser("list", help="list tokens, without what they are")
    found = actions.add_parser("revoke", help="refuse tokens from now on")
    found.add_argument("token", type=UUID, nargs="+", help="ids of tokens, as listed")


async def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    async with await open_connection(settings) as conn:
        match arguments.action:
            case "create":
                return await _create(conn, arguments)
            case "list":
                return await _list(conn)
            case _:
                return await _revoke(conn, arguments.token)


async def _create(conn: psycopg.AsyncConnection[Any], arguments: argparse.Namespace) -> int:
    token_id, text = await token.create(
        conn,
        arguments.user,
        arguments.name,
        operator=arguments.operator,
        valid_for=arguments.days,
    )
    print(f"token {token_id} of {arguments.user}; it is not shown again:", file=sys.stderr)
    print(text)
    return 0


async def _list(conn: psycopg.AsyncConnection[Any]) -> int:
    cursor = await conn.execute(_LIST)
    lines = [_TITLES]
    async for key, user, name, operator, created, used, expires, state in cursor:
        shown = (_time(at) for at in (created, used, expires))
        lines.append((str(key), state, user, "yes" if operator else "no", name, *shown))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


async def _revoke(conn: psycopg.AsyncConnection[Any], tokens: list[UUID]) -> int:
    status = 0
    for token_id in tokens:
        if await token.revoke(conn, token_id):
            print(f"{token_id} revoked")
        else:
            print(f"{token_id} unchanged: no such token, or revoked before")
            status = 1
    return status


def _time(at: datetime | None) -> str:
    return at.isoformat(" ", "minutes") if at else "never"


def _user(text: str) -> str:
    try:
        return token.check_user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _name(text: str) -> str:
    if not 0 < len(text) <= 200 or not text.isprintable():
        raise argparse.ArgumentTypeError("must be 1 to 200 printable characters")
    return text


def _days(text: str) -> timedelta:
    if not text.isdecimal() or not 0 < int(text) <= 36500:
        raise argparse.ArgumentTypeError("must be a number of days, 1 to 36500")
    return timedelta(days=int(text))

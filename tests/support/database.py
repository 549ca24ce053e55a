"""Databases of a test's own, on a server that runs."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg import sql

from outwake.schema import SCHEMA
from tests.support.server import with_database


@contextmanager
def new_database(server: str, template: str = "template1", options: LiteralString = "") -> Iterator[str]:
    """The name of a new database on the server, a clone of `template`; it is dropped in the end. `options` of
    CREATE DATABASE: an encoding, a collation.
    """
    name = f"test_{secrets.token_hex(8)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} {}").format(
                sql.Identifier(name), sql.Identifier(template), sql.SQL(options)
            )
        )
    try:
        set_search_path(with_database(server, name))
        yield name
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def set_search_path(url: str, *schemas: str) -> None:
    """Set the search_path of the database at `url`, for connections from now on.

    The default lets a test's SQL leave the name of our schema out. `public` is what an application's
    database has. Our own connections set theirs.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            sql.SQL("ALTER DATABASE {} SET search_path = {}").format(
                sql.Identifier(conn.info.dbname),
                sql.SQL(", ").join(map(sql.Identifier, schemas or (SCHEMA.name, "public"))),
            )
        )

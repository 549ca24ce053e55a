"""Database roles of a test's own, which log in.

Roles belong to the cluster, and tests run side by side in one: each role has a name that nobody else has,
and is dropped in the end.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql


@dataclass(frozen=True)
class Role:
    """A role, and the URL by which it logs in to the test's database."""

    name: str
    url: str


class Roles:
    """Creates roles. `conn` is a superuser's, to the test's database."""

    def __init__(self, url: str, conn: psycopg.Connection) -> None:
        self._url = url
        self._conn = conn
        self._names: list[str] = []

    def login(self, *member_of: str) -> Role:
        """A new role that inherits from these."""
        password = secrets.token_hex(8)
        name = f"test_{secrets.token_hex(6)}"
        self.create(name, f"LOGIN PASSWORD '{password}'")
        for group in member_of:
            self._conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(name)))
        parts = urlsplit(self._url)
        place = parts.netloc.rpartition("@")[2]
        return Role(name, urlunsplit(parts._replace(netloc=f"{name}:{password}@{place}")))

    def producer(self, *topics: str) -> Role:
        """A new producer that was granted these topics."""
        role = self.login("outwake_producer")
        for topic in topics:
            self._conn.execute("INSERT INTO outwake.producer_topic VALUES (%s, %s)", (role.name, topic))
        return role

    def create(self, name: str, options: str = "NOLOGIN") -> None:
        """A role whose name the test chooses."""
        self._conn.execute(sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(name), sql.SQL(options)))
        self.will_drop(name)

    def will_drop(self, name: str) -> None:
        """A role that the test creates by itself."""
        self._names.append(name)

    def drop(self) -> None:
        """All of them, with what they own and were granted in this database."""
        names = sql.SQL(", ").join(map(sql.Identifier, self._names))
        if self._names:
            self._conn.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(names))
            self._conn.execute(sql.SQL("DROP ROLE {}").format(names))


@contextmanager
def roles_of(database: str) -> Iterator[Roles]:
    """For as long as the block runs."""
    with psycopg.connect(database, autocommit=True) as conn:
        roles = Roles(database, conn)
        try:
            yield roles
        finally:
            roles.drop()

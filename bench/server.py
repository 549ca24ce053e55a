"""The one server that all contestants use, and what is read from it and from /proc."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from embedded.postgres import EmbeddedPostgres

STATE = Path(os.environ.get("BENCH_STATE", ".state/bench")).absolute()
"""Where servers, peers and results are kept; two benchmarks at once need two."""
SETTINGS: dict[str, str | int] = {"shared_buffers": "512MB", "max_connections": 300, "max_wal_size": "4GB"}
"""All else is PostgreSQL's default: fsync and synchronous_commit are on."""


class Server:
    """The server, and a database for each contestant and round."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self.pgbench = postgres.psql.with_name("pgbench")

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Server"]:
        STATE.mkdir(parents=True, exist_ok=True)
        with EmbeddedPostgres(STATE / "server", settings=SETTINGS) as postgres:
            yield cls(postgres)

    def url(self, database: str) -> str:
        return self._postgres.url_of(database)

    def fresh(self, database: str) -> str:
        """An empty database; its URL."""
        self.drop(database)
        with self.connect("postgres") as conn:
            conn.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        with self.connect("postgres") as conn:
            conn.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def connect(self, database: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url(database), autocommit=True)

    def version(self) -> str:
        with self.connect("postgres") as conn:
            return str(conn.execute("SHOW server_version").fetchone()[0])  # type: ignore[index]


def settle(conn: psycopg.Connection[Any]) -> None:
    """The same start for everybody: statistics are there, no checkpoint is due."""
    conn.execute("VACUUM ANALYZE")
    conn.execute("CHECKPOINT")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

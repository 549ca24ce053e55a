"""The one server that all contestants use, and what is read from it and from /proc."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg

from outwake.embedded.postgres import EmbeddedPostgres


def state_directory(named: str) -> Path:
    """Where BENCH_STATE says, by default (also when it is empty) .state/bench below the current directory.

    Ends the program if git would see what is written there: a server's data do not belong into a commit.
    """
    directory = Path(named or ".state/bench").resolve()
    there = next(parent for parent in (directory, *directory.parents) if parent.is_dir())
    # 0: ignored, 1: not ignored, 128: in no working tree.
    asked = subprocess.run(
        ["git", "-C", there, "check-ignore", "--quiet", f"{directory}/"], capture_output=True, check=False
    )
    if asked.returncode == 1:
        print(f"BENCH_STATE: git does not ignore {directory}: name another directory", file=sys.stderr)
        raise SystemExit(2)
    return directory


STATE = state_directory(os.environ.get("BENCH_STATE", ""))
"""Where servers, peers and results are kept; two benchmarks at once need two."""
SETTINGS: dict[str, str | int] = {"shared_buffers": "512MB", "max_connections": 300, "max_wal_size": "4GB"}
"""All else is PostgreSQL's default: fsync and synchronous_commit are on."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """The server, and a database for each contestant and round."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self.pgbench = postgres.psql.with_name("pgbench")

    @classmethod
    @contextmanager
    def running(cls, more: Mapping[str, str] = MappingProxyType({})) -> Iterator["Server"]:
        """Until the block ends, with more settings."""
        STATE.mkdir(parents=True, exist_ok=True)
        with EmbeddedPostgres(STATE / "server", settings={**SETTINGS, **more}) as postgres:
            yield cls(postgres)

    @property
    def pid(self) -> int:
        """The postmaster's."""
        assert self._postgres.pid is not None
        return self._postgres.pid

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
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def children_cpu_seconds(pid: int) -> float:
    """The same of a process and its children, those that have ended included."""
    total = sum(map(int, _stat(pid)[11:15]))
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = _stat(int(entry.name))
            if int(fields[1]) == pid:
                total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def machine_cpu_seconds(cores: Collection[int] | None = None) -> float:
    """How long the machine's cores, or these, have been busy, all together; what the host took from them
    counts as well.
    """
    rows = dict(line.split(maxsplit=1) for line in Path("/proc/stat").read_text().splitlines())
    total = 0
    for name in ["cpu"] if cores is None else [f"cpu{core}" for core in cores]:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, rows[name].split())
        total += user + nice + system + irq + softirq + steal
    return total / _TICKS


def _stat(pid: int) -> list[str]:
    """From the process's state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

"""What one operation costs each machine, in CPU time and WAL: the figures of docs/scaling.md.

CPU time says little about how long a person waits, but it adds up, and a busy neighbour hardly changes it: so
many operations a second need so many cores of the server, of the workers and of the API.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from bench import workloads
from bench.contestant import by_name, run, wait_until, working
from bench.http import post_sessions
from bench.server import Server, cpu_seconds, settle

ROWS = 20_000


class Cost:
    """CPU time of the server's and of another process, and WAL, of the operations in a block."""

    def __init__(self) -> None:
        self.server_us = self.process_us = self.wal_bytes = 0.0

    def per(self, count: float) -> dict[str, float]:
        return {
            "server_us": self.server_us / count,
            "process_us": self.process_us / count,
            "wal_bytes": self.wal_bytes / count,
        }


@contextmanager
def measured(server: Server, pid: int | None = None) -> Iterator[Cost]:
    """Filled in when the block ends. The server is all of its processes, also those that have ended."""
    cost = Cost()
    with server.connect("bench") as conn:

        def wal() -> float:
            row = conn.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
            assert row is not None
            return float(row[0])

        before = server.cpu_seconds(), 0.0 if pid is None else cpu_seconds(pid), wal()
        yield cost
        cost.wal_bytes = wal() - before[2]
        cost.server_us = (server.cpu_seconds() - before[0]) * 1e6
        cost.process_us = 0.0 if pid is None else (cpu_seconds(pid) - before[1]) * 1e6


def costs(server: Server, seconds: int) -> dict[str, dict[str, float]]:
    """By operation: microseconds of CPU time and bytes of WAL, each time of one row or one request."""
    return {
        "enqueue, pgbench, 8 connections": _enqueue(server, seconds),
        "claim and complete, one worker": _drain(server),
        "POST /sessions": _post(server, seconds),
    }


def _enqueue(server: Server, seconds: int) -> dict[str, float]:
    url = server.fresh("bench")
    run(workloads.SENDOFF, url, "setup")
    with server.connect("bench") as conn:
        settle(conn)
        with measured(server) as cost:
            workloads.pgbench(server, url, workloads.INSERT, 8, seconds)
        row = conn.execute("SELECT count(*) FROM outbox WHERE topic = 'bench.noop'").fetchone()
    assert row is not None
    return cost.per(row[0])


def _drain(server: Server) -> dict[str, float]:
    contestant = by_name("sendoff c500")
    url = server.fresh("bench")
    run(contestant, url, "setup")
    with server.connect("bench") as conn, working(contestant, url) as worker:
        wait_until(lambda: conn.execute("SELECT 1 FROM worker WHERE parked").fetchone())
        conn.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_inserted")
        run(contestant, url, "fill", str(ROWS))
        settle(conn)
        with measured(server, worker.pid) as cost:
            conn.execute("SELECT outbox_wake()")
            wait_until(lambda: conn.execute(contestant.remaining).fetchone() is None, every=0.05)
    return cost.per(ROWS)


def _post(server: Server, seconds: int) -> dict[str, float]:
    found = post_sessions(server, "bearer", seconds)
    return {"server_us": found["post_sessions_server_us"], "process_us": found["post_sessions_cpu_us"]}

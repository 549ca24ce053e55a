"""The workloads. Each measures one contestant once, on a new database; bench/__main__.py interleaves them."""

import random
import re
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from urllib.request import urlopen

from psycopg import Connection

from bench.contestant import Contestant, Process, producing, run, wait_until, working
from bench.server import STATE, Server, cpu_seconds, resident_mb, settle
from embedded.postgres import free_port

Figures = dict[str, float]


def start_latency(server: Server, contestant: Contestant, count: int) -> Figures:
    """Milliseconds from the return of the producer's commit to the start of the handler; one idle worker."""
    url = server.fresh("bench")
    run(contestant, url, "setup")
    with working(contestant, url, tell=True) as worker, producing(contestant, url) as producer:
        taken = []
        for number in range(count + 20):
            time.sleep(random.uniform(0.01, 0.03))
            producer.say()
            committed, started = producer.heard(), worker.heard()
            if number >= 20:
                taken.append((started - committed) / 1e6)
    taken.sort()
    return {"start_p50_ms": median(taken), "start_p99_ms": taken[int(len(taken) * 0.99)]}


def drain(server: Server, contestant: Contestant, count: int, workers: int) -> Figures:
    """Jobs a second, from the start of the first handler to when nothing is left."""
    url = server.fresh("bench")
    run(contestant, url, "setup")
    run(contestant, url, "fill", str(count))
    with server.connect("bench") as conn:
        settle(conn)
        first: list[Process] = []
        contexts = [working(contestant, url) for _ in range(workers)]
        try:
            first = [context.__enter__() for context in contexts]
            wait_until(lambda: conn.execute(contestant.remaining).fetchone() is None, timeout=180)
            ended = time.monotonic_ns()
            started = min(_first(process) for process in first)
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
    return {f"drain{workers}_per_s": count / ((ended - started) / 1e9)}


def _first(process: Process) -> int:
    try:
        return process.heard(0.5)
    except TimeoutError:  # the other one took all
        return 2**63


INSERT = "INSERT INTO outbox (topic) VALUES ('bench.noop');"
ALWAYS = """
CREATE FUNCTION always_notify() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify(''sendoff_wake'', ''x@0''); RETURN NULL; END';
CREATE TRIGGER always_notify AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION always_notify();
"""

AWAKE = "INSERT INTO worker (host, pid, version, topics, concurrency) VALUES ('h', 1, '0', '{bench.noop}', 1)"


def enqueue(server: Server, contestant: Contestant, clients: int, seconds: int, mode: str) -> Figures:
    """Inserts a second by pgbench.

    `plain`: without the trigger, nobody awake. `busy`: with it, a worker awake, its slots taken. `working`:
    a worker takes and runs the rows meanwhile. `always`: a trigger that always notifies.
    """
    statement = contestant.insert or INSERT
    rate = _inserted(server, contestant, mode, lambda url: pgbench(server, url, statement, clients, seconds))
    return {f"enqueue{clients}_per_s": rate}


def enqueue_by_library(
    server: Server, contestant: Contestant, clients: int, seconds: int, mode: str
) -> Figures:
    """Inserts a second by the system's own library, from one process with so many connections.

    `plain`: one INSERT of a topic without the trigger, by psycopg alone. `busy`, `working`: as in `enqueue`.
    """
    flood = ("flood-plain" if mode == "plain" else "flood", str(clients), str(seconds))
    rate = _inserted(server, contestant, mode, lambda url: float(run(contestant, url, *flood)))
    return {f"library{clients}_per_s": rate}


def _inserted(server: Server, contestant: Contestant, mode: str, rate: Callable[[str], float]) -> float:
    """`rate` of a new database, given its URL, in one of the modes of `enqueue`."""
    url = server.fresh("bench")
    run(contestant, url, "setup")
    with server.connect("bench") as conn:
        if mode in ("plain", "always"):
            conn.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_inserted")
        if mode == "always":
            conn.execute(ALWAYS)
        if mode == "busy":
            conn.execute(AWAKE)
        settle(conn)
        if mode != "working":
            return rate(url)
        with working(contestant, url):
            time.sleep(1.5)
            found = rate(url)
            wait_until(lambda: conn.execute(contestant.remaining).fetchone() is None, timeout=180)
    return found


def pgbench(server: Server, url: str, statement: str, clients: int, seconds: int) -> float:
    """Transactions a second."""
    script = STATE / "statement.sql"
    script.write_text(statement + "\n")
    done = subprocess.run(
        [
            server.pgbench,
            "-n",
            "-M",
            "prepared",
            "-c",
            str(clients),
            "-j",
            "2",
            "-T",
            str(seconds),
            "-f",
            script,
            url,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def claim_cost(server: Server, sizes: dict[str, tuple[int, int]], claims: int) -> dict[str, float]:
    """Milliseconds of one claim of 10 rows, median, by the name of a size: finished and ready rows beside it.

    One claim of each size after the other, so that a moment's noise meets all of them.
    """
    conns = {
        name: _prepared(server, f"bench_claim_{n}", *size) for n, (name, size) in enumerate(sizes.items())
    }
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(claims):
        for name, (conn, worker) in conns.items():
            start = time.perf_counter()
            conn.execute(
                "SELECT count(*) FROM outbox_claim(%s, '{bench.noop}', 10, '1 minute', false)", worker
            )
            taken[name].append((time.perf_counter() - start) * 1e3)
    for number, (conn, _) in enumerate(conns.values()):
        conn.close()
        server.drop(f"bench_claim_{number}")
    return {name: median(times[10:]) for name, times in taken.items()}


def _prepared(
    server: Server, database: str, finished: int, ready: int
) -> tuple[Connection[Any], tuple[Any, ...]]:
    """A connection to a database with these rows, and the worker that claims there."""
    run(SENDOFF, server.fresh(database), "setup")
    conn = server.connect(database)
    conn.execute("SET synchronous_commit = off")
    conn.execute("ALTER TABLE outbox DISABLE TRIGGER USER")
    conn.execute(
        "INSERT INTO outbox (topic, state, attempt, worker_id, finished_at)"
        " SELECT 'bench.noop', 'done', 1, gen_random_uuid(), clock_timestamp() FROM generate_series(1, %s)",
        (finished,),
    )
    conn.execute("INSERT INTO outbox (topic) SELECT 'bench.noop' FROM generate_series(1, %s)", (ready,))
    conn.execute("ALTER TABLE outbox ENABLE TRIGGER USER")
    conn.execute("RESET synchronous_commit")
    settle(conn)
    worker = conn.execute(
        "INSERT INTO worker (host, pid, version, topics, concurrency)"
        " VALUES ('bench', 1, '1', '{bench.noop}', 10) RETURNING id"
    ).fetchone()
    assert worker is not None
    return conn, worker


def idle(server: Server, seconds: float) -> Figures:
    """Queries, CPU time and memory of a parked worker over so many seconds."""
    url = server.fresh("bench")
    run(SENDOFF, url, "setup")
    with server.connect("bench") as conn, working(SENDOFF, url) as worker:
        wait_until(lambda: conn.execute("SELECT 1 FROM worker WHERE parked").fetchone())
        time.sleep(2)
        before, at = cpu_seconds(worker.pid), _queries(conn)
        time.sleep(seconds)
        changed = sum(1 for pid, when in _queries(conn).items() if at.get(pid) != when)
        return {
            "queries": changed,
            "cpu_s": round(cpu_seconds(worker.pid) - before, 3),
            "rss_mb": round(resident_mb(worker.pid), 1),
            "seconds": seconds,
        }


def _queries(conn: object) -> dict[int, object]:
    """When each of the worker's connections last began a query."""
    rows = conn.execute(  # type: ignore[attr-defined]
        "SELECT pid, query_start FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'sendoff%'"
    )
    return dict(rows.fetchall())


def held_snapshot(server: Server, contestant: Contestant, seconds: float) -> Figures:
    """Jobs a second under a steady load, before, while and after a foreign transaction holds its snapshot.

    The queue is kept filled, so that the worker is always at its peak. Each phase lasts a third of the time.
    """
    url = server.fresh("bench")
    run(contestant, url, "setup")
    count = (
        "SELECT count(*) FROM outbox WHERE state = 'done'"
        if contestant.script == "sendoff.py"
        else ("SELECT count(*) FROM job WHERE state = 'done'")
    )
    fill = (
        "INSERT INTO outbox (topic) SELECT 'bench.noop' FROM generate_series(1, 20000)"
        if contestant.script == "sendoff.py"
        else "INSERT INTO job (topic) SELECT 'noop' FROM generate_series(1, 20000)"
    )
    with server.connect("bench") as conn, server.connect("bench") as foreign:
        conn.execute(fill)
        settle(conn)

        def rates(phase: float) -> list[float]:
            """Of each batch of 20,000 rows during the phase."""
            found, end = [], time.monotonic() + phase
            while time.monotonic() < end:
                conn.execute(fill)
                start = time.monotonic()
                wait_until(lambda: conn.execute(contestant.remaining).fetchone() is None, timeout=180)
                found.append(20000 / (time.monotonic() - start))
            return found

        with working(contestant, url):
            rates(1)
            before = rates(seconds / 3)
            foreign.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            foreign.execute("SELECT 1 FROM pg_class LIMIT 1")
            held = rates(seconds / 3)
            foreign.execute("COMMIT")
            conn.execute("VACUUM")
            after = rates(seconds / 3)
            rows = conn.execute(count).fetchone()
    assert rows is not None
    end = max(1, len(held) // 3)
    return {
        "before_per_s": median(before),
        "held_first_per_s": median(held[:end]),
        "held_last_per_s": median(held[-end:]),
        "after_per_s": median(after),
        "rows": float(rows[0]),
    }


def many_workers(server: Server, workers: int, count: int) -> Figures:
    """Jobs a second with so many worker processes of 10 slots each, and then, with all of them asleep, their
    wake-ups in vain for each of 200 rows that come one by one.
    """
    url = server.fresh("bench")
    run(SENDOFF, url, "setup")
    asleep = "SELECT 1 FROM worker WHERE ended_at IS NULL HAVING bool_and(parked) AND count(*) = %s"
    port = free_port()
    with server.connect("bench") as conn:
        settle(conn)
        options = ("--processes", str(workers))
        with working(SENDOFF, url, options=options, settings={"SENDOFF_HEALTH_PORT": str(port)}):
            wait_until(lambda: conn.execute(asleep, (workers,)).fetchone())
            run(SENDOFF, url, "fill", str(count))
            wait_until(lambda: conn.execute(SENDOFF.remaining).fetchone() is None, timeout=180)
            span = conn.execute(
                "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM outbox"
            ).fetchone()
            wait_until(lambda: conn.execute(asleep, (workers,)).fetchone())
            time.sleep(1)
            before = _in_vain(port)
            for _ in range(200):
                conn.execute("INSERT INTO outbox (topic) VALUES ('bench.noop')")
                time.sleep(0.02)
            wait_until(lambda: conn.execute(SENDOFF.remaining).fetchone() is None)
            time.sleep(1)
            vain = _in_vain(port) - before
    assert span is not None
    return {f"workers{workers}_per_s": count / span[0], f"workers{workers}_in_vain_per_row": vain / 200}


def _in_vain(port: int) -> float:
    """Wake-ups that found no row so far, of all the processes under one parent."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("sendoff_worker_wakeups_in_vain_total")
    )


SENDOFF = Contestant(
    "sendoff c10",
    "sendoff.py",
    "default",
    "SELECT 1 FROM outbox WHERE topic = 'bench.noop' AND state IN ('ready', 'running') LIMIT 1",
    concurrency=10,
)

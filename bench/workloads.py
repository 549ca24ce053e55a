"""The workloads. Each measures one contestant once, on a new database; bench/__main__.py interleaves them."""

import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any
from urllib.request import urlopen

from psycopg import Connection

from bench.contestant import Contestant, Process, by_name, producing, run, wait_until, working
from bench.server import STATE, Server, cpu_seconds, resident_mb, settle
from outwake.embedded.postgres import free_port
from outwake.schema import in_schema

OUTWAKE = by_name("outwake c10")
Figures = dict[str, float]
Rates = dict[str, list[float]]


def start_latency(server: Server, contestant: Contestant, count: int) -> dict[str, list[float]]:
    """Milliseconds from the return of the producer's commit to the start of the handler; one idle worker."""
    url = server.fresh("bench")
    run(contestant, url, "setup")
    with server.connect("bench") as conn:
        settle(conn)
    with working(contestant, url, tell=True) as worker, producing(contestant, url) as producer:
        taken = []
        for number in range(count + 20):
            time.sleep(random.uniform(0.01, 0.03))
            producer.say()
            committed, started = producer.heard(), worker.heard()
            if number >= 20:
                taken.append((started - committed) / 1e6)
    return {"start_ms": taken}


def drain(server: Server, contestant: Contestant, count: int, workers: int, again: int) -> Rates:
    """Jobs a second, from the start of the first handler to when nothing is left: of workers that have just
    been started beside a full queue and, `warm`, of the same ones when the queue is filled again.
    """
    url = server.fresh("bench")
    run(contestant, url, "setup")
    run(contestant, url, "fill", str(count))
    rates: Rates = {}
    with server.connect("bench") as conn, ExitStack() as stack:
        settle(conn)
        processes = [stack.enter_context(working(contestant, url)) for _ in range(workers)]
        rates[f"drain{workers}_per_s"] = [_drained(conn, contestant, processes, count, 0)]
        for _ in range(again):
            settle(conn)
            began = time.monotonic_ns()
            run(contestant, url, "fill", str(count))
            rate = _drained(conn, contestant, processes, count, began)
            rates.setdefault(f"drain{workers}_warm_per_s", []).append(rate)
    return rates


def _drained(
    conn: Connection[Any], contestant: Contestant, processes: list[Process], count: int, began: int
) -> float:
    nothing_left(conn, contestant)
    ended = time.monotonic_ns()
    return count / ((ended - min(_first(process, began) for process in processes)) / 1e9)


def nothing_left(conn: Connection[Any], contestant: Contestant) -> None:
    """Wait until it is so. By index: a scan of the kept rows, up to 4 ms of a core every 5 ms, would burden
    those who keep them.
    """
    conn.execute("SET enable_seqscan = off")
    wait_until(lambda: conn.execute(contestant.remaining).fetchone() is None, timeout=180)


def _first(process: Process, began: int) -> int:
    """When its first handler since then started."""
    try:
        while (at := process.heard(0.5)) < began:
            pass
        return at
    except TimeoutError:  # the other one took all
        return 2**63


INSERT = in_schema("INSERT INTO :schema.outbox (topic) VALUES ('bench.noop');")
FILL = in_schema("INSERT INTO :schema.outbox (topic) SELECT 'bench.noop' FROM generate_series(1, %s)")
ASLEEP = in_schema(
    "SELECT 1 FROM :schema.worker WHERE ended_at IS NULL HAVING bool_and(parked) AND count(*) = %s"
)
"""Returns a row once so many workers sleep, and no other is there."""
ALWAYS = in_schema("""
CREATE FUNCTION always_notify() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify('':schema_wake'', ''x@0''); RETURN NULL; END';
CREATE TRIGGER always_notify AFTER INSERT ON :schema.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION always_notify();
ALTER TABLE :schema.outbox DISABLE TRIGGER always_notify;
""")
# How a trigger is switched on; `ENABLE ALWAYS` is how the migration leaves Outwake's own.
ON = in_schema("ALTER TABLE :schema.outbox ENABLE ALWAYS TRIGGER {}")
OFF = in_schema("ALTER TABLE :schema.outbox DISABLE TRIGGER {}")
BURST = 2
"""Seconds. In shorter bursts the new connections' plans would weigh."""


def inserts(server: Server, kind: str, clients: int, seconds: int) -> dict[str, float]:
    """Inserts a second with and without triggers, by way. `kind`: `enqueue`, by pgbench, or `library`.

    A worker is awake, its one slot taken, and sees none of the rows. All ways take turns in short bursts on
    the same table, so that a moment's noise and the table's growth meet all of them.
    """
    url = server.fresh("bench")
    run(OUTWAKE, url, "setup")
    burst = max(1, min(BURST, seconds // 2))
    flood = (str(clients), str(burst))

    def by_pgbench() -> float:
        return pgbench(server, url, INSERT, clients, burst)

    def by_library() -> float:
        return float(run(OUTWAKE, url, "flood", *flood))

    ways: dict[str, tuple[str | None, Callable[[], float]]] = {
        "no trigger": (None, by_pgbench if kind == "enqueue" else by_library),
        "outwake, busy": ("outbox_inserted", by_pgbench if kind == "enqueue" else by_library),
    }
    if kind == "enqueue":
        ways["always notifying"] = ("always_notify", by_pgbench)
    else:
        ways["by hand, no trigger"] = (None, lambda: float(run(OUTWAKE, url, "flood-plain", *flood)))
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with server.connect("bench") as conn, _awake(conn, url):
        conn.execute(ALWAYS)
        settle(conn)
        for _ in range(seconds // burst):
            for way in random.sample(list(ways), len(ways)):
                trigger, measured = ways[way]
                for name in ("outbox_inserted", "always_notify"):
                    conn.execute((ON if name == trigger else OFF).format(name))
                rates[way].append(measured())
    return {way: median(found) for way, found in rates.items()}


@contextmanager
def _awake(conn: Connection[Any], url: str) -> Iterator[None]:
    """A worker that is awake all the time: its one handler never ends."""
    conn.execute(in_schema("INSERT INTO :schema.outbox (topic) VALUES ('bench.hold')"))
    settings = {"OUTWAKE_DRAIN_GRACE": "0"}
    with working(replace(OUTWAKE, concurrency=1), url, topics="bench.hold", settings=settings):
        held = in_schema(
            "SELECT 1 FROM :schema.worker AS w JOIN :schema.outbox AS o ON o.worker_id = w.id"
            " WHERE NOT w.parked"
        )
        wait_until(lambda: conn.execute(held).fetchone())
        yield


def enqueue_working(server: Server, contestant: Contestant, clients: int, seconds: int) -> Figures:
    """Inserts a second by pgbench, a worker taking and running the rows meanwhile."""
    statement = contestant.insert or INSERT
    rate = _working(server, contestant, lambda url: pgbench(server, url, statement, clients, seconds))
    return {f"enqueue{clients}_per_s": rate}


def library_working(server: Server, contestant: Contestant, clients: int, seconds: int) -> Figures:
    """The same by the system's own library, from one process with so many connections."""
    flood = ("flood", str(clients), str(seconds))
    rate = _working(server, contestant, lambda url: float(run(contestant, url, *flood)))
    return {f"library{clients}_per_s": rate}


def _working(server: Server, contestant: Contestant, rate: Callable[[str], float]) -> float:
    url = server.fresh("bench")
    run(contestant, url, "setup")
    with server.connect("bench") as conn:
        settle(conn)
        with working(contestant, url):
            time.sleep(1.5)
            found = rate(url)
            nothing_left(conn, contestant)
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


def claim_cost(server: Server, sizes: dict[str, tuple[int, int]]) -> dict[str, list[list[float]]]:
    """Milliseconds of claims of 10 rows, by the name of a size: finished and ready rows beside it.

    Five times 30 claims, one of each size after the other, so that a moment's noise meets all of them.
    """
    conns = {
        name: _prepared(server, f"bench_claim_{n}", *size) for n, (name, size) in enumerate(sizes.items())
    }
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    claim = in_schema("SELECT count(*) FROM :schema.outbox_claim(%s, '{bench.noop}', 10, '1 minute', false)")
    for _ in range(10 + 5 * 30):
        for name, (conn, worker) in conns.items():
            start = time.perf_counter()
            conn.execute(claim, worker)
            taken[name].append((time.perf_counter() - start) * 1e3)
    for number, (conn, _) in enumerate(conns.values()):
        conn.close()
        server.drop(f"bench_claim_{number}")
    return {name: [times[n : n + 30] for n in range(10, len(times), 30)] for name, times in taken.items()}


def _prepared(
    server: Server, database: str, finished: int, ready: int
) -> tuple[Connection[Any], tuple[Any, ...]]:
    """A connection to a database with these rows, and the worker that claims there."""
    run(OUTWAKE, server.fresh(database), "setup")
    conn = server.connect(database)
    conn.execute("SET synchronous_commit = off")
    conn.execute(OFF.format("USER"))
    conn.execute(
        in_schema(
            "INSERT INTO :schema.outbox (topic, state, attempt, worker_id, finished_at)"
            " SELECT 'bench.noop', 'done', 1, gen_random_uuid(), clock_timestamp()"
            " FROM generate_series(1, %s)"
        ),
        (finished,),
    )
    conn.execute(FILL, (ready,))
    conn.execute(in_schema("ALTER TABLE :schema.outbox ENABLE TRIGGER USER"))
    conn.execute("RESET synchronous_commit")
    settle(conn)
    worker = conn.execute(
        in_schema(
            "INSERT INTO :schema.worker (host, pid, version, topics, concurrency)"
            " VALUES ('bench', 1, '1', '{bench.noop}', 10) RETURNING id"
        )
    ).fetchone()
    assert worker is not None
    return conn, worker


def idle(server: Server, seconds: float) -> Figures:
    """Queries, CPU time and memory of a parked worker over so many seconds."""
    url = server.fresh("bench")
    run(OUTWAKE, url, "setup")
    with server.connect("bench") as conn, working(OUTWAKE, url) as worker:
        wait_until(lambda: conn.execute(ASLEEP, (1,)).fetchone())
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
        " WHERE datname = current_database() AND application_name LIKE 'outwake%'"
    )
    return dict(rows.fetchall())


def held_snapshot(server: Server, contestant: Contestant, seconds: float) -> Figures:
    """Jobs a second under a steady load, before, while and after a foreign transaction holds its snapshot.

    The queue is kept filled, so that the worker is always at its peak. Each phase lasts a third of the time.
    """
    url = server.fresh("bench")
    run(contestant, url, "setup")
    table, topic = (":schema.outbox", "bench.noop") if contestant.script == "outwake_.py" else ("job", "noop")
    count = in_schema(f"SELECT count(*) FROM {table} WHERE state = 'done'")
    fill = in_schema(f"INSERT INTO {table} (topic) SELECT '{topic}' FROM generate_series(1, 20000)")
    with server.connect("bench") as conn, server.connect("bench") as foreign:
        conn.execute(fill)
        settle(conn)

        def rates(phase: float) -> list[float]:
            """Of each batch of 20,000 rows during the phase."""
            found, end = [], time.monotonic() + phase
            while time.monotonic() < end:
                conn.execute(fill)
                start = time.monotonic()
                nothing_left(conn, contestant)
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
    run(OUTWAKE, url, "setup")
    port = free_port()
    with server.connect("bench") as conn:
        settle(conn)
        options = ("--processes", str(workers))
        with working(OUTWAKE, url, options=options, settings={"OUTWAKE_HEALTH_PORT": str(port)}):
            wait_until(lambda: conn.execute(ASLEEP, (workers,)).fetchone())
            run(OUTWAKE, url, "fill", str(count))
            nothing_left(conn, OUTWAKE)
            span = conn.execute(
                in_schema(
                    "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8"
                    " FROM :schema.outbox"
                )
            ).fetchone()
            wait_until(lambda: conn.execute(ASLEEP, (workers,)).fetchone())
            time.sleep(1)
            before = _in_vain(port)
            for _ in range(200):
                conn.execute(INSERT)
                time.sleep(0.02)
            nothing_left(conn, OUTWAKE)
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
        if line.startswith("outwake_worker_wakeups_in_vain_total")
    )

"""The soak: `python -m bench.soak`, a steady load for an hour. And `python -m bench.soak --held 30`: the same
load, and a foreign transaction that holds its snapshot for so many minutes of it.

1. The peak: the median of five drains of 20,000 rows. The sustained peak: the rows a second that producer,
   worker and server together get through when there is always a backlog, with all that the load runs beside:
   rows are kept for as long, pruned every minute, vacuumed by autovacuum, read as in 3. It is measured for a
   minute, once rows have been pruned for one. The load is a share of it, in a new database.
2. A producer in a process of its own inserts a batch every 20 ms, whether the worker keeps up or not. What it
   is late with it makes up for: available_at says when a row was due, and latency is from then to its claim
   (started_at), so nothing is hidden. Only a backlog of BACKLOG rows makes it skip batches (`skipped`), so
   that a collapse ends when its cause does.
3. Every second the rows up to the first that is not finished are read by id, before they can be pruned: each
   must be done, at its first attempt. So no row is lost or runs twice unseen, and no slow row is left out of
   the latencies (of every tenth row); those of a burst are, and what waited when it began.
   With a snapshot held that would be work of its own, past three versions of each row: every tenth is read.
   At the end all ids given are accounted for in either case: pruned, which only a finished row is, or there.
4. Every five minutes the producer pauses for a burst of 20,000 rows: their rate is the peak in the state that
   the tables are in. With a snapshot: three times a minute in the BEFORE minutes before and the AFTER minutes
   after it, once a minute while it is held. Beside the rate stands the CPU time that the worker and its
   session used for each row, which says more where neighbours use the machine.
5. Rows are kept for five minutes (--retention): the worker's own outbox.prune is made due every minute. With
   a snapshot, every five: each run reads past the entries of all rows deleted before, and by default comes
   once an hour.
6. Of each minute: which share of the cores' time the soak and its server used (`used`), and which others did
   (`others`). Where that is much, latency says little.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench.contestant import Process, by_name, run, working
from bench.server import (
    STATE,
    Server,
    children_cpu_seconds,
    cpu_seconds,
    machine_cpu_seconds,
    resident_mb,
    settle,
)
from bench.soak_report import report
from outwake.schema import in_schema

BURST = 20_000
BURST_SECONDS = 10.0
"""A burst that is not drained by then counts with what was."""
BACKLOG = 50_000
TICK = 0.02
BEFORE, AFTER = 3, 5
"""Minutes, with a burst every 20 seconds."""
LOG = STATE / "workers.log"
RETENTION = 300
PRUNE_EVERY = 60
CORES = os.sched_getaffinity(0)
OVERLOAD = 100_000
"""More rows a second than any machine gets through."""

FILL = in_schema("INSERT INTO :schema.outbox (topic) SELECT 'bench.noop' FROM generate_series(1, %s)")
FILL_DUE = in_schema(
    "INSERT INTO :schema.outbox (topic, available_at)"
    " SELECT 'bench.noop', to_timestamp(%s) FROM generate_series(1, %s)"
)

# The rows since the frontier, the lowest id that was not seen finished: all, or every tenth.
ALL = in_schema(":schema.outbox AS o WHERE o.id >= %(frontier)s AND o.topic = 'bench.noop'")
TENTH = in_schema("""
generate_series((%(frontier)s + 9) / 10 * 10, (SELECT max(id) FROM :schema.outbox), 10) AS s (id)
JOIN :schema.outbox AS o ON o.id = s.id WHERE o.topic = 'bench.noop'""")
UNFINISHED = """
SELECT count(*) FILTER (WHERE state IN ('ready', 'running')),
       coalesce(min(o.id) FILTER (WHERE state IN ('ready', 'running')), max(o.id) + 1)
FROM """
# Up to the next frontier, so each row once, and after its end. Latencies are of every tenth row.
FINISHED = """
SELECT count(*),
       count(*) FILTER (WHERE state <> 'done' OR attempt > 1),
       array_agg(extract(epoch FROM started_at - available_at)::float8 * 1000)
           FILTER (WHERE o.id > %(timed_from)s AND o.id %% 10 = 0 AND started_at IS NOT NULL)
FROM """
SIZES = in_schema("""
SELECT pg_table_size(':schema.outbox') / 1e6, s.n_dead_tup, s.autovacuum_count,
       (SELECT json_object_agg(indexrelname, round(pg_relation_size(indexrelid) / 1e6, 1))
        FROM pg_stat_user_indexes WHERE schemaname = ':schema' AND relname = 'outbox')
FROM pg_stat_user_tables AS s WHERE s.schemaname = ':schema' AND s.relname = 'outbox'
""")
STATE_OF = in_schema("SELECT state FROM :schema.outbox WHERE id = %s")
STATE_OF_LOAD = in_schema("SELECT state FROM :schema.outbox WHERE id = %s AND topic = 'bench.noop'")
RATE = in_schema("""
SELECT count(*), extract(epoch FROM max(finished_at) - %(began)s)::float8 FROM :schema.outbox
WHERE id > %(from)s AND finished_at >= %(began)s
""")
PRUNE_NOW = in_schema("""
UPDATE :schema.outbox SET available_at = clock_timestamp()
WHERE unique_key = 'outbox.prune' AND state = 'ready'
""")
KEPT = in_schema("SELECT count(*), max(id) FROM :schema.outbox")


def _produce(
    url: str,
    rate: "Synchronized[float]",
    pauses: "Synchronized[int]",
    made: "Synchronized[int]",
    skipped: "Synchronized[int]",
) -> None:
    """Insert `rate` rows a second in batches until it is negative, available since they were due, however
    late that is. 0 pauses; `pauses` counts for how many ticks so far.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        due, last_id, wall = time.monotonic(), 0, time.time() - time.monotonic()
        while (now_rate := rate.value) >= 0:
            due = due + TICK if now_rate else time.monotonic() + TICK
            time.sleep(max(0.0, due - time.monotonic()))
            count = round(now_rate * TICK)
            if count == 0:
                pauses.value += 1
                continue
            if _is_behind(conn, last_id):
                skipped.value += count
                continue
            last_id = conn.execute(
                f"WITH made AS ({FILL_DUE} RETURNING id) SELECT max(id) FROM made", (due + wall, count)
            ).fetchone()[0]  # type: ignore[index]
            made.value += count


def _is_behind(conn: psycopg.Connection[Any], last_id: int) -> bool:
    """Whether BACKLOG rows wait, as does the one that so many came after."""
    # The state is no condition: the planner would read a partial index, dead entries and all. And prune's
    # successor, which waits for an hour, is no row of the load.
    far = conn.execute(STATE_OF_LOAD, (last_id - BACKLOG,)).fetchone()
    return far is not None and far[0] in ("ready", "running")


class Soak:
    """One run: its connections, its producer, and what has been seen so far."""

    def __init__(self, server: Server, url: str, worker: Process, rows: str) -> None:
        self.minutes: list[dict[str, Any]] = []
        self.bursts: list[dict[str, Any]] = []
        self.done = self.odd = 0
        self.burst_rows = BURST  # there from the start
        self._server = server
        self._worker = worker
        self._rows = rows
        self._conn = server.connect("bench")
        self._conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        # By id, whatever the statistics say of a table that changes so fast.
        self._conn.execute("SET enable_seqscan = off")
        self._conn.execute("SET enable_bitmapscan = off")
        self._conn.execute("SET max_parallel_workers_per_gather = 0")
        self._foreign = server.connect("bench")
        self.held = False
        self._frontier, self._timed_from = 0, 0
        self._left = 0
        self._latencies: list[float] = []
        spawn = get_context("spawn")
        self._rate, self._pauses = spawn.Value("d", 0.0), spawn.Value("q", 0)
        self._made, self._skipped = spawn.Value("q", 0), spawn.Value("q", 0)
        self._producer = spawn.Process(
            target=_produce, args=(url, self._rate, self._pauses, self._made, self._skipped)
        )
        self._producer.start()
        self.started = time.monotonic()
        self._used = self._cpu()

    @property
    def produced(self) -> int:
        return int(self._made.value) + self.burst_rows

    def load(self, rate: float) -> None:
        self._rate.value = rate
        if rate == 0:  # what is under way is to be counted
            seen = self._pauses.value
            while self._pauses.value < seen + 2:
                time.sleep(TICK)

    def close(self) -> None:
        self._rate.value = -1
        self._producer.join(30)

    def hold(self) -> None:
        self._foreign.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        self._foreign.execute("SELECT 1 FROM pg_class LIMIT 1")
        self.held = True

    def release(self) -> None:
        self._foreign.execute("COMMIT")
        self.held = False

    def burst(self, phase: str) -> float:
        """Insert the rows at once; the rate at which they, and what waited before them, are finished."""
        paused = self._rate.value
        self.load(0)
        used = self._worker_cpu()
        row = self._conn.execute(
            f"WITH made AS ({FILL} RETURNING id) SELECT max(id), clock_timestamp() FROM made", (BURST,)
        ).fetchone()
        assert row is not None
        last, began = row
        self.burst_rows += BURST
        end = time.monotonic() + BURST_SECONDS
        while time.monotonic() < end and self._state(last) in ("ready", "running"):
            time.sleep(0.005)
        drained = self._state(last) == "done"
        used = self._worker_cpu() - used
        row = self._conn.execute(RATE, {"began": began, "from": last - BACKLOG - 3 * BURST}).fetchone()
        assert row is not None
        rate = row[0] / row[1] if row[0] else 0.0
        self.bursts.append(
            {
                "at_s": time.monotonic() - self.started,
                "phase": phase,
                "per_s": rate,
                "drained": drained,
                "cpu_us": used / max(row[0], 1) * 1e6,
            }
        )
        self._timed_from = last
        self._rate.value = paused
        return rate

    def _worker_cpu(self) -> float:
        """Of the worker and of the session that it claims with."""
        sessions = self._conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = 'bench' AND application_name = 'outwake worker'"
        ).fetchall()
        return sum(map(cpu_seconds, (self._worker.pid, *(pid for (pid,) in sessions))))

    def _state(self, row_id: int) -> str | None:
        found = self._conn.execute(STATE_OF, (row_id,)).fetchone()
        return None if found is None else str(found[0])

    def watch(self, until: float) -> None:
        """Read what is finished every second until then."""
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            self.observe()

    def _cpu(self) -> tuple[float, float, float]:
        """The time now; for how long our cores have been busy so far, and for how long of that with us."""
        assert self._producer.pid is not None
        ours = sum(map(cpu_seconds, (os.getpid(), self._producer.pid, self._worker.pid)))
        busy = machine_cpu_seconds(CORES)
        return time.monotonic(), busy, ours + children_cpu_seconds(self._server.pid)

    def observe(self) -> int:
        """Read all rows up to the first that is not finished; how many are not."""
        with self._conn.transaction():  # one snapshot for both
            self._left, upto = self._conn.execute(
                UNFINISHED + self._rows, {"frontier": self._frontier}
            ).fetchone()  # type: ignore[misc]
            if upto is not None:
                rows, odd, latencies = self._conn.execute(
                    f"{FINISHED}{self._rows} AND o.id < %(upto)s",
                    {"frontier": self._frontier, "timed_from": self._timed_from, "upto": upto},
                ).fetchone()  # type: ignore[misc]
                self._frontier = upto
                self.done += rows * (10 if self._rows == TENTH else 1)
                self.odd += odd
                self._latencies += latencies or ()
        return self._left

    def minute(self) -> dict[str, Any]:
        """The record of the time since the last."""
        sizes = self._conn.execute(SIZES).fetchone()
        assert sizes is not None
        table, dead, vacuums, indexes = sizes
        latencies, self._latencies = sorted(self._latencies), []
        before, self._used = self._used, self._cpu()
        passed, busy, ours = (now - then for now, then in zip(self._used, before, strict=True))

        def part(share: float) -> float | None:
            return round(latencies[int(share * len(latencies))], 2) if latencies else None

        record = {
            "at_s": round(time.monotonic() - self.started, 1),
            "produced": self.produced,
            "skipped": self._skipped.value,
            "done": self.done,
            "odd": self.odd,
            "backlog": self._left,
            "p50_ms": part(0.5),
            "p99_ms": part(0.99),
            "max_ms": round(latencies[-1], 2) if latencies else None,
            "table_mb": round(float(table), 1),
            "index_mb": round(sum(indexes.values()), 1),
            "indexes": indexes,
            "dead_tuples": dead,
            "autovacuums": vacuums,
            "worker_mb": round(resident_mb(self._worker.pid), 1),
            "used": round(ours / passed / len(CORES), 3),
            "others": round((busy - ours) / passed / len(CORES), 3),
            "held": self.held,
        }
        self.minutes.append(record)
        return record

    def make_prune_due(self) -> None:
        self._conn.execute(PRUNE_NOW)

    def pruned(self) -> dict[str, Any]:
        """The other way to count: what the worker says it deleted, and what is left, of all topics."""
        kept = self._conn.execute(KEPT).fetchone()
        assert kept is not None
        log = (json.loads(line) for line in LOG.read_text().splitlines() if line.startswith("{"))
        lines = [line for line in log if line.get("level") != "info" or line["event"] == "pruned"]
        pruned = sum(line["rows"] for line in lines if line["event"] == "pruned")
        warnings = Counter(line["event"] for line in lines if line["event"] != "pruned")
        return {"pruned": pruned, "kept": kept[0], "last_id": kept[1], "worker_warnings": dict(warnings)}

    def settled(self, timeout: float) -> None:
        """Until nothing is left to do."""
        end = time.monotonic() + timeout
        while self.observe() and time.monotonic() < end:
            time.sleep(1)


@contextmanager
def _soaking(server: Server, rows: str, retention: int) -> Iterator[Soak]:
    """In a new database."""
    LOG.unlink(missing_ok=True)
    contestant = by_name("outwake c100")
    url = server.fresh("bench")
    run(contestant, url, "setup")
    run(contestant, url, "fill", str(BURST))
    with server.connect("bench") as conn:
        settle(conn)
    settings = {"OUTWAKE_RETENTION": str(retention), "OUTWAKE_LOG_LEVEL": "info"}
    with working(contestant, url, topics="bench.noop,outbox.prune", settings=settings) as worker:
        soak = Soak(server, url, worker, rows)
        try:
            yield soak
        finally:
            soak.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="of the steady load")
    parser.add_argument("--held", type=int, default=0, help="minutes for which a snapshot is held instead")
    parser.add_argument("--share", type=float, default=0.6, help="of the sustained peak")
    parser.add_argument("--retention", type=int, default=RETENTION, help="seconds for which rows are kept")
    parser.add_argument("--json", type=Path, help="by default soak.json or held.json in BENCH_STATE")
    arguments = parser.parse_args()
    if arguments.held:
        arguments.minutes = BEFORE + arguments.held + AFTER
    arguments.json = arguments.json or STATE / ("held.json" if arguments.held else "soak.json")
    result: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k not in ("json", "retention")}
    result |= {"at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "retention_s": arguments.retention}
    rows = TENTH if arguments.held else ALL
    with Server.running() as server:
        result |= {"server": server.version(), "cores": len(CORES)}
        with _soaking(server, rows, arguments.retention) as soak:
            soak.settled(120)
            soak.burst("warm")
            result["peak_per_s"] = round(median(soak.burst("peak") for _ in range(5)))
            result["sustained_per_s"] = round(_sustained(soak, arguments.retention))
        result["rate_per_s"] = round(arguments.share * result["sustained_per_s"])
        print(json.dumps(result), flush=True)
        with _soaking(server, rows, arguments.retention) as soak:
            soak.settled(120)
            soak.minute()
            _load(soak, arguments, result)
    arguments.json.write_text(json.dumps(result, indent=1))
    report(result)


def _load(soak: Soak, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    soak.minutes.clear()
    soak.started = time.monotonic()
    soak.load(result["rate_per_s"])
    for minute in range(arguments.minutes):
        _minute(soak, minute, arguments)
        result |= {"minutes_seen": soak.minutes, "bursts": soak.bursts, "produced": soak.produced}
        arguments.json.write_text(json.dumps(result, indent=1))
        print(json.dumps({k: v for k, v in soak.minutes[-1].items() if k != "indexes"}), flush=True)
    soak.load(0)
    soak.settled(300)
    result |= {"produced": soak.produced, "done": soak.done, "odd": soak.odd, "left": soak.observe()}
    result |= soak.pruned()


def _sustained(soak: Soak, retention: int) -> float:
    """Rows a second with always a backlog, once rows are pruned and vacuumed as fast as they come."""
    soak.load(OVERLOAD)
    for _ in range(-(-retention // PRUNE_EVERY) + 1):
        soak.make_prune_due()
        soak.watch(time.monotonic() + PRUNE_EVERY)
    soak.make_prune_due()
    before, began = soak.done, time.monotonic()
    soak.watch(began + PRUNE_EVERY)
    return (soak.done - before) / (time.monotonic() - began)


def _minute(soak: Soak, minute: int, arguments: argparse.Namespace) -> None:
    end = soak.started + 60 * (minute + 1)
    if not arguments.held or minute % 5 == 0:
        soak.make_prune_due()
    if not arguments.held:
        if minute % 5 == 0:
            soak.burst("steady")
    else:
        if minute == BEFORE:
            soak.hold()
        if minute == BEFORE + arguments.held:
            soak.release()
        phase = "held" if soak.held else "before" if minute < BEFORE else "after"
        for third in range(1 if soak.held else 3):
            soak.watch(end - 60 + third * 20)
            soak.burst(phase)
    soak.watch(end)
    soak.minute()


if __name__ == "__main__":
    main()

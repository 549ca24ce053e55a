"""`make chaos SECONDS=60 SEED=1`: see docs/chaos.md.

1. A server of our own, with fsync, and a proxy for each worker and one for the producers.
2. Producers and faults for the given time; all that is random follows from the seed, but not the timing
   of the parts, so a seed gives the same faults, not the same interleaving.
3. Faults end, everything is healed. Every row has to end, every worker to park and fall silent; then a
   roll call finds out whether each one wakes.
4. The checker judges (check.py). The last line has the counts; exit status 1 if there is a violation.
"""

import argparse
import asyncio
import logging
import random
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

from outwake._migrate import migrate
from outwake.embedded.postgres import EmbeddedPostgres, free_port
from tests.chaos import history
from tests.chaos.broken import BREAKS, break_rule
from tests.chaos.check import Record, check, excused, rescue_times
from tests.chaos.faults import Faults
from tests.chaos.handlers import HANDLERS
from tests.chaos.history import History
from tests.chaos.load import load
from tests.chaos.places import Place, install_handlers, mark
from tests.chaos.producers import Producers
from tests.support.database import set_search_path
from tests.support.process import command_line
from tests.support.proxy import Proxy

LEASE = 2.0
STUCK = 60.0
"""Seconds without any change after which what has not ended will not end."""
PATIENCE = 90.0
"""Seconds for anything that takes well under one."""

SETTINGS: dict[str, str | int] = {
    "max_prepared_transactions": 8,
    "max_connections": 200,
    "deadlock_timeout": "200ms",
    "shared_buffers": "64MB",
}
_TOPICS = ",".join(sorted(h.topic for h in HANDLERS.values() if h.topic != "lone"))
PLACES: dict[str, tuple[list[str], dict[str, str]]] = {
    "one": (["--concurrency", "4", "--topics", _TOPICS], {}),
    "pair": (["--concurrency", "3", "--processes", "2", "--topics", _TOPICS], {"OUTWAKE_LISTEN_PROBE": "1"}),
    "many": (["--concurrency", "8", "--topics", _TOPICS], {"OUTWAKE_LISTEN_PROBE": "3"}),
    "lone": (["--concurrency", "1", "--topics", "lone,roll.call"], {}),
}
DATABASES = {"chaos": (4, 4 + 2 * 3 + 8), "lone": (1, 1)}
"""Worker processes and slots of each. One worker is alone in a database of its own: there no other's lease
makes it look, so a wake-up that is lost stays lost, and nobody but its successor can rescue it."""


class Chaos:
    """One run in a directory of its own."""

    def __init__(self, directory: Path, seed: int, broken: str | None, pace: float) -> None:
        self.directory = directory
        self.observed: list[str] = []
        """Violations that only the runner sees."""
        self._file = directory / "history.jsonl"
        self._history = History(self._file)
        self._broken = broken
        self._server = EmbeddedPostgres(directory / "postgres", settings=SETTINGS)
        self._seed = seed
        self._pace = pace
        self._places: list[Place] = []
        self._mark = mark()

    async def run(self, seconds: float) -> tuple[Record, Faults, Producers]:
        """All of it, but the report."""
        await asyncio.to_thread(self._server.start)
        for name in DATABASES:
            await self._make_database(name)
        proxy = Proxy("producers", ("127.0.0.1", self._server.port))
        await proxy.open()
        try:
            await self._start_places()
            producers = Producers(
                url=self._through(proxy, "chaos"),
                direct=self._server.url_of("chaos"),
                lone_url=self._through(proxy, "lone"),
                lone_direct=self._server.url_of("lone"),
                api=f"http://127.0.0.1:{self._port}",
                psql=self._server.psql,
                history=self._history,
                random=random.Random(self._seed),
            )
            faults = Faults(
                server=self._server,
                url=self._server.url_of("chaos"),
                places=self._places,
                api=self._api,
                producers=proxy,
                history=self._history,
                random=random.Random(self._seed + 1),
                lease=LEASE,
                pace=self._pace,
            )
            await self._until("all parked at the start", self._all_parked)
            await self._storm(seconds, producers, faults)
            if not self._broken:
                await self._settle()
            record = await asyncio.to_thread(self._load, final=not self._broken)
            return record, faults, producers
        finally:
            for place in (*self._places, self._api):
                await place.close()
                await place.proxy.close()
            await proxy.close()
            self._end_leaked()
            await asyncio.to_thread(self._server.stop, "immediate")

    def remove(self) -> None:
        """Nothing stays."""
        self._server.remove()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _make_database(self, name: str) -> None:
        with psycopg.connect(self._server.url, autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")
        set_search_path(self._server.url_of(name))
        await migrate(self._server.url_of(name))
        with self._connect(name) as conn:
            conn.execute(Path(__file__).with_name("tables.sql").read_bytes())
            if name == "lone":  # ids tell the databases apart
                conn.execute("ALTER SEQUENCE outbox_id_seq RESTART 1000000000")
            if self._broken:
                break_rule(conn, self._broken)

    def _connect(self, database: str) -> psycopg.Connection[Any]:
        url = self._server.url_of(database)
        return psycopg.connect(url, autocommit=True, application_name="chaos runner")

    def _through(self, proxy: Proxy, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}"

    def _load(self, *, final: bool) -> Record:
        lines = list(history.read(self._file))  # first: the databases then hold all that it tells of
        record = Record(lines=lines, now=time.time(), final=final)
        for name in DATABASES:
            with self._connect(name) as conn:
                load(conn, record)
        return record

    async def _start_places(self) -> None:
        installed = self.directory / "handlers"
        install_handlers(installed)
        for name, (arguments, environment) in PLACES.items():
            place = await self._make_place(
                name,
                [*command_line("worker"), *arguments],
                {**environment, "PYTHONPATH": f"{installed}:{self._mark['PYTHONPATH']}"},
            )
            self._places.append(place)
        self._port = free_port()
        self._api = await self._make_place(
            "api",
            [*command_line("outwake"), "api"],
            {"OUTWAKE_PORT": str(self._port), "OUTWAKE_HOST": "127.0.0.1"},
        )
        for place in (*self._places, self._api):
            await place.start()

    async def _make_place(self, name: str, command: list[str], environment: dict[str, str]) -> Place:
        proxy = Proxy(name, ("127.0.0.1", self._server.port))
        await proxy.open()
        common = {
            **self._mark,
            "DATABASE_URL": self._through(proxy, _database(place=name)),
            "CHAOS_HISTORY": str(self._file),
            "OUTWAKE_LEASE": str(LEASE),
            "OUTWAKE_DRAIN_GRACE": "2",
            "OUTWAKE_OUTAGE_GRACE": "6",
            "OUTWAKE_LOG_LEVEL": "debug",
        }
        log = self.directory / f"{name}.log"
        return Place(name, command, proxy, {**common, **environment}, self._history, log)

    async def _storm(self, seconds: float, producers: Producers, faults: Faults) -> None:
        """Producers and faults side by side; when something is broken, until that is caught."""
        producing = asyncio.create_task(producers.run())
        looking = asyncio.create_task(self._look_for_wrong_blocks())
        storm = asyncio.create_task(faults.run(seconds))
        tasks: set[asyncio.Task[Any]] = {storm, producing}
        if self._broken:
            tasks.add(asyncio.create_task(self._until_caught()))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._broken and not storm.done():
            storm.cancel()
            with suppress(asyncio.CancelledError):
                await storm
            await faults.heal()
        await storm if not storm.cancelled() else None
        producers.stop.set()
        await producing
        looking.cancel()

    async def _until_caught(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(1)
            with suppress(psycopg.Error):
                found = check(await asyncio.to_thread(self._load, final=False))
                if found or self.observed:
                    print(f"caught after {time.monotonic() - began:.1f} s: {(found + self.observed)[0]}")
                    return

    async def _look_for_wrong_blocks(self) -> None:
        """In any snapshot, a blocked row has a row before it that is not finished."""
        while True:
            await asyncio.sleep(0.5)
            with suppress(psycopg.Error):
                for row_id in await asyncio.to_thread(self._wrong_blocks):
                    self.observed.append(f"blocks: row {row_id} is blocked by nothing")

    def _wrong_blocks(self) -> list[int]:
        with self._connect("chaos") as conn:
            conn.execute("SET statement_timeout = '5s'")
            found = conn.execute(
                "SELECT id FROM outbox AS b WHERE blocked AND NOT EXISTS ("
                " SELECT FROM outbox AS o WHERE o.ordering_key = b.ordering_key AND o.id <> b.id"
                " AND (o.state = 'running' OR (o.state = 'ready' AND o.id < b.id)))"
            ).fetchall()
        return [row[0] for row in found]

    async def _until(self, what: str, condition: Any, patience: float = PATIENCE) -> bool:
        """Wait until the condition, asked now and then, is met; else note a violation."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            with suppress(psycopg.Error):
                if await asyncio.to_thread(condition):
                    return True
            await asyncio.sleep(0.1)
        self.observed.append(f"settle: not {what} within {patience:.0f} s")
        return False

    async def _settle(self) -> None:
        """Step 3."""
        await self._until_all_ended()
        for place in self._places:
            if not await place.old_ended(PATIENCE):
                self.observed.append(f"settle: a drained worker of {place.name} does not end")
        if await self._until("all parked", self._all_parked):
            await self._until_silent()
            await self._roll_call()
        else:
            for place in self._places:
                print(f"{place.name}: processes {place.pids()}, its log ends with\n{place.last_words()}")
        for place in (*self._places, self._api):
            status = await place.end(PATIENCE)
            bad = [s for s in (*place.statuses, status) if s is None or s > 0]
            if bad:
                self.observed.append(f"settle: workers of {place.name} ended with {bad}")

    async def _until_all_ended(self) -> None:
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < STUCK:
            left, latest = await asyncio.to_thread(self._progress)
            if left == 0:
                return
            if latest != seen:
                seen, since = latest, time.monotonic()
            await asyncio.sleep(0.2)
        # all_ended (check.py) names the rows

    def _progress(self) -> tuple[int, int]:
        """How many rows have not ended, and how much has happened."""
        left = happened = 0
        for name in DATABASES:
            with self._connect(name) as conn:
                row = conn.execute(
                    "SELECT (SELECT count(*) FROM outbox WHERE state IN ('ready', 'running')"
                    " AND topic <> 'outbox.prune'), (SELECT coalesce(max(seq), 0) FROM chaos_event)"
                ).fetchone()
            assert row is not None
            left, happened = left + row[0], happened + row[1]
        return left, happened

    def _all_parked(self) -> bool:
        parked: list[int] = []
        for name in DATABASES:
            with self._connect(name) as conn:
                found = conn.execute("SELECT pid FROM worker_present WHERE parked AND NOT draining")
                parked += [row[0] for row in found]
        leaves: list[int] = []
        for place in self._places:
            pids = place.pids()
            leaves += pids[1:] if len(pids) > 1 else pids
        return len(leaves) == sum(n for n, _ in DATABASES.values()) and sorted(leaves) == sorted(parked)

    async def _until_silent(self) -> None:
        """A parked worker without a probe sends no query for three leases."""
        until = time.monotonic() + PATIENCE
        before = await asyncio.to_thread(self._last_queries)
        while time.monotonic() < until:
            await asyncio.sleep(3 * LEASE)
            now = await asyncio.to_thread(self._last_queries)
            if now == before:
                return
            before = now
        self.observed.append(f"silence: idle workers go on asking: {before}")

    def _last_queries(self) -> list[tuple[Any, ...]]:
        ports = [c.port for p in self._places if p.name in ("one", "lone") for c in p.proxy.connections]
        with self._connect("chaos") as conn:  # pg_stat_activity shows all databases
            return conn.execute(
                "SELECT client_port, application_name, query_start::text, query FROM pg_stat_activity"
                " WHERE client_port = ANY (%s) ORDER BY 1", (ports,),
            ).fetchall()  # fmt: skip

    async def _roll_call(self) -> None:
        """As many rows as there are slots: each worker must wake."""
        release = self.directory / "release"
        for name, (_, slots) in DATABASES.items():
            with self._connect(name) as conn:
                conn.execute(
                    "INSERT INTO outbox (topic, payload)"
                    " SELECT 'roll.call', jsonb_build_object('release', %s::text)"
                    " FROM generate_series(1, %s)",
                    (str(release), slots),
                )
        await self._until("all awake", self._all_slots_taken)
        release.touch()
        await self._until_all_ended()

    def _all_slots_taken(self) -> bool:
        for name, (processes, slots) in DATABASES.items():
            with self._connect(name) as conn:
                row = conn.execute(
                    "SELECT count(DISTINCT worker_id), count(*) FROM outbox"
                    " WHERE topic = 'roll.call' AND state = 'running'"
                ).fetchone()
            if row != (processes, slots):
                return False
        return True

    def _end_leaked(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("CHAOS_RUN") == self._mark["CHAOS_RUN"]:
                    process.kill()


def _database(place: str) -> str:
    return "lone" if place == "lone" else "chaos"


def report(record: Record, chaos: Chaos, faults: Faults, producers: Producers) -> int:
    """Print what happened; return how many violations there are."""
    violations = check(record) + chaos.observed
    print("\n".join(_figures(record, faults, producers)))
    for text in violations[:30]:
        print(f"VIOLATION {text}")
    total = sum(count for kind, count in faults.counts.items() if kind != "prepare refused")
    print(f"chaos: rows {len(record.chains)} faults {total} violations {len(violations)}")
    return len(violations)


def _figures(record: Record, faults: Faults, producers: Producers) -> Iterator[str]:
    for name, counts in (
        ("faults", faults.counts),
        ("meddling", Counter(producers.meddled)),
        ("transactions", Counter(line["outcome"] for line in record.of("enqueue"))),
        ("ends", Counter(row.state for row in record.rows)),
        ("topics", Counter(row.topic for row in record.rows)),
    ):
        print(f"{name}:", ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())))
    yield (
        f"attempts: {len(record.runs)}, overlaps after a rescue: {excused(record)}, "
        f"sandboxes: {len(record.borrowed)}, messages: {len(record.messages)}"
    )
    for who, times in rescue_times(record).items():
        if times:
            yield (
                f"rescue by {who}: {len(times)} rows, p50 {statistics.median(times):.2f} s, "
                f"max {max(times):.2f} s after the kill (lease {LEASE:.0f} s)"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed")
    parser.add_argument("--pace", type=float, default=1.5, help="faults a second in a storm (1.5)")
    parser.add_argument("--break", dest="broken", choices=sorted(BREAKS), help="break this rule first")
    parser.add_argument("--keep", action="store_true", help="keep the directory with logs and records")
    arguments = parser.parse_args()
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it warns of each connection that we cut
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(10**6)
    broken = f", {arguments.broken} broken" if arguments.broken else ""
    print(f"chaos: seed {seed}, {arguments.seconds:.0f} s, lease {LEASE:.0f} s{broken}", flush=True)
    chaos = Chaos(Path(tempfile.mkdtemp(prefix="outwake-chaos-")), seed, arguments.broken, arguments.pace)
    count = 1
    try:
        count = report(*_reordered(chaos, asyncio.run(chaos.run(arguments.seconds))))
    finally:
        if arguments.keep:
            print(f"kept: {chaos.directory}", file=sys.stderr)
        else:
            chaos.remove()
    return 1 if count else 0


def _reordered(
    chaos: Chaos, found: tuple[Record, Faults, Producers]
) -> tuple[Record, Chaos, Faults, Producers]:
    return found[0], chaos, found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())

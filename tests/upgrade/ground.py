"""One database, the processes of both versions on it, and what drives them.

Nothing here knows an order of steps (orders.py). What is awaited is an event: a line of a process's log, or
a notification of an effect. Where neither is to be had, the database or a health check is asked again and
again. Each bound is generous, and its message says what was awaited.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import httpx
import psycopg

from outwake.embedded.postgres import EmbeddedPostgres
from tests.support.process import Process, running
from tests.upgrade.code import Code
from tests.upgrade.sessions import Sessions
from tests.upgrade.shop.shop_producer import GATE

LEASE = 4.0
"""Seconds. A rescue comes that late, and a busy machine must not take that long for a renewal."""
PATIENCE = 60.0
"""Seconds for what takes well under one."""
_SHARE = 10
"""Rows that each worker has to have handled in a stretch of load."""

Kind = Literal["worker", "api", "producer"]


class Failed(Exception):
    """The run cannot go on."""


@dataclass
class Part:
    """A process of one version. `url` is where it answers: an API, or a worker's health checks."""

    kind: Kind
    name: str
    code: Code
    process: Process
    url: str = ""


@dataclass
class Row:
    """What a roll call inserts: columns of outbox, and how it is called."""

    what: str
    topic: str = "shop.plain"
    payload: dict[str, Any] = field(default_factory=dict)
    ordering_key: str | None = None
    delay: float = 0.0
    count: int = 1


_ROLL = [
    Row("a row of its own"),
    Row("three rows at once", count=3),
    Row("a row with an ordering key", "shop.keyed", ordering_key="roll"),
    Row("a row of a topic with a limit", "shop.limited"),
    Row("a row that the worker's next claim ends", "shop.returned"),
    Row("a row that is due later", delay=0.3),
    Row("a row that fails once", payload={"plan": "retry"}),
    Row("another row of its own"),
]

_INSERT = """
WITH made AS (
    INSERT INTO outwake.outbox (topic, payload, ordering_key, available_at)
    SELECT %s, %s, %s, clock_timestamp() + %s * interval '1 second' FROM generate_series(1, %s)
    RETURNING id
)
INSERT INTO public.booked SELECT id FROM made RETURNING row_id
"""
_UNFINISHED = """
SELECT array_agg(format('row %s %s %s, failures %s', id, topic, state, failures)) FROM outwake.outbox
WHERE state IN ('ready', 'running') AND topic <> 'outbox.prune'
"""


class Ground:
    """Enter it to get a database and what watches it; leave it to end everything."""

    def __init__(
        self, title: str, server: EmbeddedPostgres, directory: Path, repository: Path, rnd: random.Random
    ) -> None:
        self.title = title
        self.parts: list[Part] = []
        """Those that run now."""
        self.ended: list[Part] = []
        self.restarts = 0
        """Processes that replaced others, or were killed."""
        self.rescued = 0
        self.failures: list[str] = []
        self.sessions = Sessions(self, repository, rnd)
        self.client = httpx.AsyncClient(timeout=PATIENCE, trust_env=False)
        self._server = server
        self._directory = directory
        self._random = rnd
        self._numbers: Counter[str] = Counter()
        self._handled: Counter[str] = Counter()
        self._effects: set[int] = set()
        self._hanging: dict[str, set[int]] = {}
        self._news = asyncio.Condition()
        self._stack = AsyncExitStack()
        self._began = time.monotonic()

    # Its life.

    async def __aenter__(self) -> Self:
        self._directory.mkdir()
        await self._stack.enter_async_context(self.client)
        database = f"upgrade_{self._random.randrange(10**9)}"
        async with await psycopg.AsyncConnection.connect(self._server.url, autocommit=True) as admin:
            await admin.execute(f"CREATE DATABASE {database}")
        self.database = self._server.url_of(database)
        self.conn = await self._connect()
        self._gate = await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sessions.close()
        await self._stack.aclose()

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        conn = await psycopg.AsyncConnection.connect(self.database, autocommit=True)
        await self._stack.enter_async_context(conn)
        return conn

    async def prepare(self) -> None:
        """The application's tables, on the schema of the first version."""
        await self.conn.execute(Path(__file__).with_name("tables.sql").read_bytes())
        listening = await self._connect()
        await listening.execute("LISTEN shop_effect; LISTEN shop_hangs")
        task = asyncio.create_task(self._listen(listening))
        self._stack.callback(task.cancel)

    async def _listen(self, conn: psycopg.AsyncConnection[Any]) -> None:
        async for note in conn.notifies():
            first, _, second = note.payload.partition(" ")
            async with self._news:
                if note.channel == "shop_effect":
                    self._effects.add(int(first))
                    self._handled[second] += 1
                else:
                    self._hanging.setdefault(first, set()).add(int(second))
                self._news.notify_all()

    def say(self, text: str) -> None:
        """Print a step, with the time."""
        print(f"{time.monotonic() - self._began:6.1f} s  {self.title}: {text}", flush=True)

    # Processes.

    async def start(self, kind: Literal["worker", "api"], code: Code) -> Part:
        """Start one and wait until it serves."""
        name = self._name(kind, code)
        command = ["worker", "--concurrency", "8"] if kind == "worker" else ["outwake", "api"]
        part = await self._run(kind, name, code, code.command(command[0]), *command[1:])
        if kind == "worker":
            ready = await part.process.event("health_ready")
            await part.process.event("registered")
        else:
            ready = await part.process.event("api_ready")
            await part.process.event("listening")
        part.url = f"http://127.0.0.1:{ready['port']}"
        self.parts.append(part)
        return part

    async def produce(self, code: Code, how: Literal["library", "sql"]) -> None:
        """Start an application that enqueues until `stop_load`."""
        name = self._name(how, code)
        seed = str(self._random.randrange(10**6))
        part = await self._run("producer", name, code, sys.executable, "-m", "shop_producer", how, name, seed)
        await part.process.event("producing")
        self.parts.append(part)

    def _name(self, what: str, code: Code) -> str:
        self._numbers[what] += 1
        return f"{what}-{self._numbers[what]}-{code.name}"

    async def _run(self, kind: Kind, name: str, code: Code, command: str, *arguments: str) -> Part:
        process = await self._stack.enter_async_context(
            running(command, *arguments, env={**self.environment(code), "SHOP_PLACE": name})
        )
        return Part(kind, name, code, process)

    def environment(self, code: Code) -> dict[str, str | None]:
        """Variables of a process of that version on this database."""
        ours = [name for name in os.environ if name.startswith("OUTWAKE_") or name.endswith("DATABASE_URL")]
        return {
            **dict.fromkeys(ours),
            **code.environment,
            "DATABASE_URL": self.database,
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_LEASE": str(LEASE),
            "OUTWAKE_DRAIN_GRACE": "1",
            "OUTWAKE_HEALTH_PORT": "0",
            "OUTWAKE_PORT": "0",
            "OUTWAKE_ALLOW_FILE_REPOS": "true",
            "OUTWAKE_WORKSPACE_ROOT": str(self._directory / "workspaces"),
            "OUTWAKE_AGENT_COMMAND": f"{sys.executable} -P {code.agent}",
        }

    async def leave(self, *parts: Part) -> None:
        """SIGTERM: each drains and ends with status 0. An API gets no more requests before."""
        for part in parts:
            self.parts.remove(part)
            self.ended.append(part)
        async with self.sessions.between():  # a request that is under way is answered
            for part in parts:
                part.process.send(signal.SIGTERM)
        for part in parts:
            status = await part.process.ended(timeout=PATIENCE)
            if status != 0:
                self.fail(f"{part.name} ended with status {status} after SIGTERM")

    async def replace(self, kind: Literal["worker", "api"], code: Code) -> Part:
        """Start one more, counted as a restart."""
        self.restarts += 1
        return await self.start(kind, code)

    async def kill(self, victim: Part) -> None:
        """SIGKILL a worker while it runs rows: the others rescue them and end them."""
        rows: set[int] = set()

        def hangs() -> bool:
            return bool(self._hanging.get(victim.name))

        def decided() -> bool:
            return hangs() or rows <= self._effects

        while not hangs():
            rows |= await self._insert(Row("", payload={"hang": victim.name}, count=8))
            what = f"{victim.name} runs one of the rows {sorted(rows)}, or others have ended all"
            await self._until(decided, what)
        self.parts.remove(victim)
        self.ended.append(victim)
        self.restarts += 1
        victim.process.kill()
        await victim.process.ended()
        held = self._hanging[victim.name]
        await self.took_effect(rows, f"after {victim.name} was killed, which ran {sorted(held)}")
        self.rescued += len(held)
        self.say(f"{victim.name} was killed; others ended the {len(held)} rows that hung there")

    async def migrate(self, code: Code) -> None:
        """Run `outwake migrate` of that version."""
        began = time.monotonic()
        async with running(code.command("outwake"), "migrate", env=self.environment(code)) as process:
            status = await process.ended(timeout=PATIENCE)
            if status != 0:
                output = "\n".join([*process.stdout, *process.stderr])
                raise Failed(f"outwake migrate of {code} ended with status {status}:\n{output}")
            applied = [line for line in process.stdout if line.startswith("applying ")]
        self.say(f"{code} migrated, {len(applied)} files, in {time.monotonic() - began:.1f} s")

    @property
    def workers(self) -> list[Part]:
        return [part for part in self.parts if part.kind == "worker"]

    @property
    def apis(self) -> list[Part]:
        return [part for part in self.parts if part.kind == "api"]

    async def end(self) -> None:
        """End everything in order."""
        await self.leave(*self.workers, *self.apis)

    # Load.

    async def start_load(self, old: Code, new: Code) -> None:
        """Producers of both versions and one without a library, and sessions."""
        await asyncio.gather(
            self.produce(old, "library"), self.produce(new, "library"), self.produce(new, "sql")
        )
        self.sessions.start()

    async def stop_load(self) -> None:
        """Stop it, and wait until every row has ended."""
        await self.sessions.stop()
        await self.leave(*[part for part in self.parts if part.kind == "producer"])
        await self._all_ended()

    async def work(self, seconds: float) -> None:
        """Let the load go on for that long, and until every worker that is there has handled its share."""
        before = Counter(self._handled)
        names = [part.name for part in self.workers]
        await asyncio.sleep(seconds)
        await self._until(
            lambda: all(self._handled[name] - before[name] >= _SHARE for name in names),
            f"each of {', '.join(names)} handles {_SHARE} rows more",
        )

    # The roll call.

    async def roll_call(self) -> None:
        """With the load held back and every worker asleep, each row that comes must wake one."""
        async with self._silence():
            names = ", ".join(part.name for part in self.workers)
            rows = [*_ROLL, *[Row(f"row {n} of its own") for n in range(3) if len(self.workers) > 1]]
            for row in rows:
                await self._all_parked()
                made = await self._insert(row)
                await self.took_effect(made, f"{row.what}, inserted when {names} slept")
            await self._all_parked()
            await self.sessions.one_followed()
        self.say(f"{names} slept, and each of {len(rows)} inserts and a session woke one")

    @asynccontextmanager
    async def _silence(self) -> AsyncIterator[None]:
        """All that was enqueued has ended, and nobody enqueues."""
        async with self.sessions.between():
            await self._gate.execute("SELECT pg_advisory_lock(%s)", (GATE,))
            try:
                await self._all_ended()
                yield
            finally:
                await self._gate.execute("SELECT pg_advisory_unlock(%s)", (GATE,))

    async def _all_parked(self) -> None:
        async def awake() -> str | None:
            stages = await self._stages()
            return None if all(stage.endswith(": parked, 0 rows") for stage in stages) else ", ".join(stages)

        await self._poll(awake, "all workers sleep")

    async def _stages(self) -> list[str]:
        health = [(part.name, await self.ask(part, "/readyz")) for part in self.workers]
        return [f"{name}: {found['stage']}, {found['running']} rows" for name, found in health]

    async def _all_ended(self) -> None:
        async def left() -> str | None:
            rows = await self.one(_UNFINISHED)
            if rows is None:
                return None
            return f"{len(rows)} have not: {'; '.join(rows[:5])}; {await self._stages()}"

        await self._poll(left, "every row has ended")

    async def _insert(self, row: Row) -> set[int]:
        values = (row.topic, json.dumps(row.payload), row.ordering_key, row.delay, row.count)
        cursor = await self.conn.execute(_INSERT, values)
        return {found[0] for found in await cursor.fetchall()}

    async def took_effect(self, rows: Iterable[int], what: str) -> None:
        """Wait until each of these rows has."""
        wanted = set(rows)
        await self._until(
            lambda: wanted <= self._effects,
            lambda: f"rows {sorted(wanted - self._effects)} take effect: {what}",
        )

    # What is awaited, asked, and found.

    async def _until(self, condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
        try:
            async with asyncio.timeout(PATIENCE), self._news:
                await self._news.wait_for(condition)
        except TimeoutError:
            raise Failed(f"not in {PATIENCE:.0f} s: {what if isinstance(what, str) else what()}") from None

    async def _poll(self, missing: Callable[[], Awaitable[str | None]], what: str) -> None:
        until = time.monotonic() + PATIENCE
        while (found := await missing()) is not None:
            if time.monotonic() > until:
                raise Failed(f"not in {PATIENCE:.0f} s: {what}; {found}")
            await asyncio.sleep(0.02)

    async def ask(self, part: Part, path: str, status: int = 200) -> dict[str, Any]:
        """What a process answers."""
        answer = await self.client.get(part.url + path)
        if answer.status_code != status:
            raise Failed(f"{part.name} answered {answer.status_code} to {path}: {answer.text}")
        return dict(answer.json())

    async def readiness(self, part: Part, fit: str) -> None:
        """Wait until it says that it is ready, and that the schema is current, older or newer."""
        name = "schema" if part.kind == "worker" else "database_schema"

        async def differs() -> str | None:
            answer = await self.client.get(f"{part.url}/readyz")
            is_so = answer.status_code == 200 and answer.json()[name] == fit
            return None if is_so else f"it answers {answer.status_code} {answer.text}"

        await self._poll(differs, f"{part.name} says that the schema is {fit}")

    async def one(self, query: str, *values: Any) -> Any:
        """The first value of the first row."""
        cursor = await self.conn.execute(query.encode(), values or None)
        row = await cursor.fetchone()
        return None if row is None else row[0]

    def fail(self, text: str) -> None:
        """Note what must not be."""
        self.failures.append(f"{self.title}: {text}")

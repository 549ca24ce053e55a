"""All of Outwake on one machine, for the demo and for development: an embedded Postgres, the API and a worker
in separate processes, with the scripted agent.
"""

import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from outwake._migrate import migrate
from outwake.connect import connect
from outwake.embedded.postgres import EmbeddedPostgres
from outwake.schema import SCHEMA

DATABASE = "outwake"
_READY_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_SILENCE = timedelta(seconds=10)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Stack:
    """The addresses of the parts."""

    api_url: str
    database_url: str
    psql: Path


@asynccontextmanager
async def running(
    state: Path, report: Report, *, api_port: int = 0, postgres_port: int = 0
) -> AsyncIterator[Stack]:
    """Start everything below the directory `state`, `report` each step, and stop it all at the end."""
    state.mkdir(parents=True, exist_ok=True)
    server = EmbeddedPostgres(state.absolute() / "postgres", port=postgres_port)
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(server.start)
        stack.push_async_callback(asyncio.to_thread, server.stop)
        database_url = server.url_of(DATABASE)
        await _create_database(server.url)
        applied = await migrate(database_url)
        report(
            f"Postgres runs on port {psycopg.conninfo.conninfo_to_dict(database_url)['port']}, "
            f"{len(applied)} migrations applied"
        )
        environment = _environment(state, database_url, api_port)
        worker = await stack.enter_async_context(
            _process("worker", "outwake.worker.cli", [], environment, state)
        )
        api = await stack.enter_async_context(_process("api", "outwake.cli", ["api"], environment, state))
        await worker.event("registered")
        report(f"the worker listens (process {worker.pid})")
        ready = await api.event("api_ready")
        report(f"the API serves http://127.0.0.1:{ready['port']} (process {api.pid})")
        yield Stack(f"http://127.0.0.1:{ready['port']}", database_url, server.psql)


async def _create_database(url: str) -> None:
    """Create the database. Its search_path lets people at psql omit the schema's name."""
    async with await connect(url, "outwake demo", _SILENCE) as conn:
        cursor = await conn.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
        if await cursor.fetchone() is None:
            await conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        await conn.execute(
            sql.SQL("ALTER DATABASE {} SET search_path = {}, public").format(
                sql.Identifier(DATABASE), sql.Identifier(SCHEMA.name)
            )
        )


def _environment(state: Path, database_url: str, api_port: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTWAKE_")}
    for name in ("DATABASE_URL_FILE", "LISTEN_DATABASE_URL", "LISTEN_DATABASE_URL_FILE"):
        kept.pop(name, None)
    return {
        **kept,
        "DATABASE_URL": database_url,
        "OUTWAKE_SCHEMA": SCHEMA.name,
        "OUTWAKE_PORT": str(api_port),
        "OUTWAKE_ALLOW_FILE_REPOS": "true",
        "OUTWAKE_WORKSPACE_ROOT": str(state.absolute() / "workspaces"),
        "OUTWAKE_AGENT_COMMAND": shlex.join([sys.executable, "-P", "-m", "outwake.embedded.agent"]),
    }


class Part:
    """One process of the stack. Its log goes to a file; its events can be awaited."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.pid = process.pid
        self._name = name
        self._process = process
        self._log = log
        self._seen: dict[str, dict[str, Any]] = {}
        self._last = ""
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def event(self, name: str) -> dict[str, Any]:
        """The first log event of that name. Raises RuntimeError if the process ends without it."""
        async with asyncio.timeout(_READY_TIMEOUT), self._news:
            await self._news.wait_for(lambda: name in self._seen or self._reader.done())
        if name not in self._seen:
            raise RuntimeError(
                f"the {self._name} did not start; its log, {self._log}, ends with: {self._last}"
            )
        return self._seen[name]

    async def _read(self) -> None:
        assert self._process.stderr is not None
        with self._log.open("wb") as log:
            async for line in self._process.stderr:
                log.write(line)
                self._last = line.decode(errors="replace").strip()
                log.flush()
                await self._note(line)
        async with self._news:
            self._news.notify_all()

    async def _note(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
        except ValueError:
            return
        async with self._news:
            self._seen.setdefault(str(fields.get("event")), fields)
            self._news.notify_all()

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the process does not end in time."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._reader


@asynccontextmanager
async def _process(
    name: str, module: str, arguments: list[str], environment: Mapping[str, str], state: Path
) -> AsyncIterator[Part]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"from {module} import main; main()", *arguments),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches only us; we stop the process in order
        limit=2**20,
    )
    part = Part(name, process, state / f"{name}.log")
    try:
        yield part
    finally:
        await part.stop()

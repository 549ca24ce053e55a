"""`outwake status` and `outwake top`: outbox and workers, once or live, for people or as JSON."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from outwake._migrate import check_schema
from outwake.cli.connection import open_connection
from outwake.cli.output import Record, as_json, clean, console, table
from outwake.errors import SchemaError
from outwake.schema import in_schema
from outwake.settings import Settings
from outwake.telemetry.ready import READY

_SHOWN = 15

_QUERIES = {
    "outbox": in_schema("""
        SELECT topic, state, wait, rows, oldest FROM :schema.outbox_depth ORDER BY topic, state, wait
    """),
    "workers": in_schema("""
        SELECT id, host, pid, state, running, concurrency, lease_left, up, topics FROM :schema.worker_status
        WHERE ended_at IS NULL ORDER BY started_at
    """),
    "running": in_schema("""
        SELECT id, topic, attempt, running_for, host, pid, cancelling, session_id
        FROM :schema.worker_running
        ORDER BY started_at LIMIT %(shown)s
    """),
    # A row that is scheduled for later, or about to be claimed, waits for nothing.
    "waiting": in_schema("""
        SELECT id, topic, reason, waited, due_at, failures, detail, last_error, session_id
        FROM :schema.outbox_waiting
        WHERE reason NOT IN ('due', 'scheduled') ORDER BY waited DESC, id LIMIT %(shown)s
    """),
    "writers": in_schema("""
        SELECT pid, role, application, state, open_for, query FROM :schema.outbox_writer
        WHERE open_for > interval '1 second' ORDER BY open_for DESC LIMIT %(shown)s
    """),
}


async def status(settings: Settings, *, json: bool) -> int:
    """Show everything once. Returns 0 if outbox_ready says ready, else 1."""
    async with _connection(settings) as conn:
        found = await _look(conn, settings)
    if json:
        print(as_json(found))
    else:
        console().print(_page(found))
    return 0 if found["ready"]["ready"] else 1


async def top(settings: Settings, *, every: float, json: bool) -> int:
    """Show everything until interrupted: on a terminal in place, as JSON one object a line."""
    if not json and not sys.stdout.isatty():
        return await status(settings, json=False)
    async with _connection(settings) as conn:
        if json:
            while True:
                print(as_json(await _look(conn, settings)), flush=True)
                await asyncio.sleep(every)
        with Live(console=console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(_page(await _look(conn, settings), hint="Ctrl-C ends"), refresh=True)
                await asyncio.sleep(every)


@asynccontextmanager
async def _connection(settings: Settings) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await open_connection(settings) as conn:
        await check_schema(conn)
        yield conn


async def _look(conn: psycopg.AsyncConnection[Any], settings: Settings) -> Record:
    values = {"shown": _SHOWN}
    found: Record = {"at": datetime.now(UTC)}
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(READY, (timedelta(seconds=settings.stuck_after),))
        found["ready"] = await cursor.fetchone()
        for name, query in _QUERIES.items():
            await cursor.execute(query, values)
            found[name] = await cursor.fetchall()
    if found["ready"] is None:
        raise SchemaError("outbox_ready has no answer")
    return found


def _page(found: Record, hint: str = "") -> RenderableType:
    ready = found["ready"]
    word, style = ("ready", "bold green") if ready["ready"] else ("NOT READY", "bold red")
    head = Text.assemble((word, style), f"  {clean(ready['reason'] or '')}", (f"   {hint}", "dim"))
    parts: list[RenderableType] = [
        head,
        table(
            "Outbox", ["topic", "state", "wait", "rows", "oldest"], found["outbox"], right=["rows", "oldest"]
        ),
        table(
            "Workers",
            ["host", "pid", "state", "running", "concurrency", "up", "lease_left", "topics"],
            found["workers"],
            right=["pid", "running", "concurrency", "up", "lease_left"],
        ),
    ]
    if found["running"]:
        columns = ["id", "topic", "attempt", "running_for", "host", "pid", "session_id"]
        parts.append(
            table("Running", columns, found["running"], right=["id", "attempt", "running_for", "pid"])
        )
    if found["waiting"]:
        columns = ["id", "topic", "reason", "waited", "detail", "last_error"]
        parts.append(
            table(f"Waiting or dead, the longest {_SHOWN}", columns, found["waiting"], right=["id", "waited"])
        )
    if found["writers"]:
        columns = ["pid", "role", "application", "state", "open_for", "query"]
        parts.append(
            table(
                "Open transactions that write to outbox", columns, found["writers"], right=["pid", "open_for"]
            )
        )
    return Group(*parts)

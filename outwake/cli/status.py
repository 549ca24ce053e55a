"""`outwake status` and `outwake top`: outbox and workers, once or live, for people or as JSON."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from outwake._migrate import check_schema
from outwake.cli.connection import open_connection
from outwake.cli.keys import pressed
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
    """Show everything until interrupted: on a terminal in place, until `q` too; as JSON one object a line."""
    if not json and not sys.stdout.isatty():
        return await status(settings, json=False)
    async with _connection(settings) as conn:
        if json:
            while True:
                print(as_json(await _look(conn, settings)), flush=True)
                await asyncio.sleep(every)
        shown = console()
        with pressed(b"qQ") as ended, Live(console=shown, screen=True, auto_refresh=False) as live:
            while not ended.is_set():
                page = _screen(await _look(conn, settings), shown.height)
                live.update(page, refresh=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(every):
                        await ended.wait()
        return 0


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


def _head(found: Record, hint: str = "") -> Text:
    ready = found["ready"]
    word, style = ("ready", "bold green") if ready["ready"] else ("NOT READY", "bold red")
    return Text.assemble(
        (word, style), (f"   {hint}" if hint else "", "dim"), f"  {clean(ready['reason'] or '')}"
    )


def _screen(found: Record, height: int) -> RenderableType:
    """What fits a screen of that height: first what is stuck, a line for each row. The rest is cut off."""
    head = _head(found, hint="q ends")
    head.no_wrap, head.overflow = True, "ellipsis"
    stuck = {**found, "waiting": found["waiting"][: max(3, height - 14)]}
    names = ["waiting", *(name for name in _TABLES if name != "waiting")]
    return Group(head, *_tables(stuck, names, one_line=True))


def _page(found: Record) -> RenderableType:
    return Group(_head(found), *_tables(found, list(_TABLES), one_line=False))


def _tables(found: Record, names: Sequence[str], *, one_line: bool) -> Iterator[RenderableType]:
    for name in names:
        title, columns, right, whole = _TABLES[name]
        if found[name] or name in ("outbox", "workers"):
            yield table(title, columns, found[name], right=right, whole=whole, one_line=one_line)


_TABLES: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "outbox": ("Outbox", ["topic", "state", "wait", "rows", "oldest"], ["rows", "oldest"], ["state", "wait"]),
    "workers": (
        "Workers",
        ["host", "pid", "state", "running", "concurrency", "up", "lease_left", "topics"],
        ["pid", "running", "concurrency", "up", "lease_left"],
        ["state"],
    ),
    "running": (
        "Running",
        ["id", "topic", "attempt", "running_for", "host", "pid", "session_id"],
        ["id", "attempt", "running_for", "pid"],
        [],
    ),
    "waiting": (
        f"Waiting or dead, the longest {_SHOWN}",
        ["id", "topic", "reason", "waited", "detail", "last_error"],
        ["id", "waited"],
        ["reason"],
    ),
    "writers": (
        "Open transactions that write to outbox",
        ["pid", "role", "application", "state", "open_for", "query"],
        ["pid", "open_for"],
        [],
    ),
}
"""Title, columns, those to the right, and those that are not cut on a small screen."""

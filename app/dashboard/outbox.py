"""Pages for operators: the outbox by state with charts, one row, dead rows, and workers."""

import re
import time
from collections import defaultdict
from datetime import timedelta
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api import rows
from outwake.app.api.body import check_query
from outwake.app.api.models import RowQuery
from outwake.app.api.problems import Problem
from outwake.app.api.rows import Change
from outwake.app.auth.identity import Identity, check_operator
from outwake.app.context import context
from outwake.app.dashboard import queries
from outwake.app.dashboard.build import off_loop, parse_row
from outwake.app.dashboard.charts import charts
from outwake.app.dashboard.page import back, go, read_form, render
from outwake.app.dashboard.queries import Bin, Running
from outwake.app.database import Database

_TOPIC = re.compile(r"[a-z][a-z0-9_.-]{0,99}")
STATES = ("ready", "running", "dead", "done", "cancelled")
RANGES = {
    "hour": (timedelta(minutes=1), 60, "1 hour"),
    "day": (timedelta(minutes=20), 72, "24 hours"),
    "week": (timedelta(hours=2), 84, "7 days"),
}
CHANGES: dict[str, Change] = {"retry": "retry", "discard": "discard", "cancel": "cancel"}


class Timelines:
    """The charts' data, read for all users together, at most once each MAX_AGE seconds."""

    MAX_AGE = 10.0

    def __init__(self) -> None:
        self._read: WeakKeyDictionary[Database, dict[str, tuple[float, list[Bin]]]] = WeakKeyDictionary()

    async def get(self, database: Database, name: str) -> list[Bin]:
        read = self._read.setdefault(database, {})
        read_at, bins = read.get(name, (float("-inf"), []))
        if time.monotonic() - read_at > self.MAX_AGE:
            step, number, _ = RANGES[name]
            bins = await queries.timeline(database, step, number)
            read[name] = time.monotonic(), bins
        return bins


_TIMELINES = Timelines()


async def show_outbox(request: Request, identity: Identity) -> Response:
    check_operator(identity)
    here = context(request)
    state = request.query_params.get("state", "ready")
    state = state if state in STATES else "ready"
    topic = request.query_params.get("topic") or None
    if topic is not None and not _TOPIC.fullmatch(topic):
        raise Problem("invalid", "That is no topic.")
    name = request.query_params.get("range", "hour")
    name = name if name in RANGES else "hour"
    depth = await queries.depth(here.database)
    return await render(
        request,
        identity,
        "outbox.html",
        states=STATES,
        state=state,
        topic=topic,
        range=name,
        ranges=RANGES,
        depth=depth,
        counts={
            "ready": sum(one.due + one.delayed + one.key for one in depth),
            "running": sum(one.running for one in depth),
            "dead": sum(one.dead for one in depth),
        },
        rows=await queries.rows_of(here.database, state, topic),
        limit=queries.PAGE,
        charts=charts(await _TIMELINES.get(here.database, name), RANGES[name][0]),
    )


async def show_dead(request: Request, identity: Identity) -> Response:
    cursor = request.query_params.get("cursor")
    asked = check_query(RowQuery, {"limit": 30, "cursor": cursor or None})
    found = await rows.list_rows(context(request), identity, asked)

    def read() -> list[dict[str, Any]]:
        return [{**row, "told": _errors(row["errors"])} for row in map(parse_row, found.items)]

    shown = await off_loop(identity.user_id, read)
    return await render(request, identity, "dead.html", rows=shown, next=found.next, cursor=cursor)


def _errors(errors: Any) -> list[dict[str, str]]:
    """The errors of a row as texts, newest first. It accepts any content, because psql can write any."""
    told = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    return [
        {name: str(error.get(name, "")) for name in ("attempt", "at", "error")} for error in reversed(told)
    ]


async def show_row(request: Request, identity: Identity) -> Response:
    here = context(request)
    text = await rows.show_row(here, identity, request.path_params["id"])
    row = await off_loop(identity.user_id, lambda: parse_row(text))
    history = await queries.history(here.database, row["id"])
    return await render(request, identity, "row.html", row=row, history=history)


async def change_row(request: Request, identity: Identity) -> Response:
    """Retry, discard or cancel a row. Then show the form's page again."""
    form = await read_form(request)
    id_, change = request.path_params["id"], CHANGES.get(request.path_params["change"])
    if change is None:
        raise Problem("not-found", "There is no such page.")
    await rows.change_row(context(request), identity, id_, change)
    return go(back(form, f"/ui/outbox/{id_}"))


async def show_workers(request: Request, identity: Identity) -> Response:
    check_operator(identity)
    database = context(request).database
    workers = await queries.workers(database)
    running: defaultdict[UUID, list[Running]] = defaultdict(list)
    for row in await queries.running(database):
        running[row.worker_id].append(row)
    return await render(
        request,
        identity,
        "workers.html",
        workers=[worker for worker in workers if worker.ended_at is None],
        ended=[worker for worker in workers if worker.ended_at is not None],
        running=running,
    )

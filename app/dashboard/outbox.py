"""Pages for operators: the outbox by state with charts, one row, dead rows, and workers."""

import time
from collections import defaultdict
from datetime import timedelta
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api import rows
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.context import context
from outwake.app.dashboard import queries
from outwake.app.dashboard.charts import charts
from outwake.app.dashboard.page import ask, back, go, read_form, render
from outwake.app.dashboard.queries import Bin, Running
from outwake.app.database import Database

STATES = ("ready", "running", "dead", "done", "cancelled")
RANGES = {
    "hour": (timedelta(minutes=1), 60, "1 hour"),
    "day": (timedelta(minutes=20), 72, "24 hours"),
    "week": (timedelta(hours=2), 84, "7 days"),
}
CHANGES = {"retry": rows.retry_row, "discard": rows.discard_row, "cancel": rows.cancel_row}


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
    _check_operator(identity)
    here = context(request)
    state = request.query_params.get("state", "ready")
    state = state if state in STATES else "ready"
    topic = request.query_params.get("topic") or None
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
    found = await ask(
        rows.list_rows, request, identity, query={"limit": 30} | ({"cursor": cursor} if cursor else {})
    )
    shown = [{**row, "told": _errors(row["errors"])} for row in found["rows"]]
    return await render(request, identity, "dead.html", rows=shown, next=found["next"], cursor=cursor)


def _errors(errors: Any) -> list[dict[str, str]]:
    """The errors of a row as texts, newest first. It accepts any content, because psql can write any."""
    told = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    return [
        {name: str(error.get(name, "")) for name in ("attempt", "at", "error")} for error in reversed(told)
    ]


async def show_row(request: Request, identity: Identity) -> Response:
    id_ = request.path_params["id"]
    row = await ask(rows.show_row, request, identity, id=id_)
    history = await queries.history(context(request).database, row["id"])
    return await render(request, identity, "row.html", row=row, history=history)


async def change_row(request: Request, identity: Identity) -> Response:
    """Retry, discard or cancel a row. Then show the form's page again."""
    form = await read_form(request)
    id_, change = request.path_params["id"], request.path_params["change"]
    if change not in CHANGES:
        raise Problem("not-found", "There is no such page.")
    await ask(CHANGES[change], request, identity, id=id_)
    return go(back(form, f"/ui/outbox/{id_}"))


async def show_workers(request: Request, identity: Identity) -> Response:
    _check_operator(identity)
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


def _check_operator(identity: Identity) -> None:
    if not identity.operator:
        raise Problem("forbidden", "Only operators may see the outbox.")

"""Liveness and readiness."""

from datetime import timedelta
from typing import Any

import psycopg
from starlette.requests import Request
from starlette.responses import Response

from outwake._migrate import check_schema
from outwake.app.api.answer import json_response
from outwake.app.api.body import read_query
from outwake.app.api.models import Health, Ready, ReadyQuery
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.context import Context, context
from outwake.app.shared_figure import Shared
from outwake.errors import SchemaError
from outwake.sql import LINES
from outwake.telemetry.ready import outbox_ready

_OURS = ("database", "schema_fits", "listener")
_WORKERS = ("worker_present", "nothing_stuck")


async def alive(request: Request, identity: Identity) -> Response:
    """The process answers. This ignores the database, because a restart of the API would not repair it."""
    return json_response(Health(status="alive").model_dump_json())


async def ready(request: Request, identity: Identity) -> Response:
    """Whether the API can serve requests and streams. `workers=1` also asks whether workers run sessions."""
    asked = read_query(request, ReadyQuery)
    found, misfit = await _LOOK.get(context(request))
    answer = found.model_dump()
    needed = _OURS if asked.workers == "0" else _OURS + _WORKERS
    missing = [name for name in needed if not answer[name]]
    if missing:
        detail = f"Not so: {', '.join(missing)}."
        if misfit:
            detail += f" {misfit[0].upper()}{misfit[1:]}."
        if asked.workers == "1" and found.stuck:
            detail += f" Stuck: {found.stuck}."
        raise Problem("not-ready", detail, checks=answer)
    return json_response(found.model_dump_json())


async def _look(here: Context) -> tuple[Ready, str]:
    """The state of each check, and the reason if the schema does not fit."""
    listener = here.hub.listening
    nothing: dict[str, Any] = {
        "schema_fits": False,
        "database_schema": None,
        "listener": listener,
        "worker_present": False,
        "nothing_stuck": False,
    }
    try:
        async with here.database.connection() as conn:
            fit = await check_schema(conn, LINES)
            outbox = await outbox_ready(conn, timedelta(seconds=here.settings.stuck_after))
        worker_present = await here.presence.present()
    except (psycopg.Error, Problem):
        return Ready(database=False, **nothing), ""
    except SchemaError as error:
        return Ready(database=True, **nothing), str(error)
    found = Ready(
        database=True,
        schema_fits=True,
        database_schema=fit,
        listener=listener,
        worker_present=worker_present,
        nothing_stuck=not outbox.stuck,
        stuck=outbox.reason if outbox.stuck else None,
    )
    return found, ""


_LOOK = Shared(_look)

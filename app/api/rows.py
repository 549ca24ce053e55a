"""The outbox for operators: list dead rows; show, retry, discard or cancel a row."""

import json

from psycopg import errors as pg
from starlette.requests import Request
from starlette.responses import Response

from outwake._commands import COMMANDS
from outwake.app.api import cursor
from outwake.app.api.answer import json_response
from outwake.app.api.body import read_query
from outwake.app.api.models import RowQuery
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.context import context
from outwake.schema import in_schema

_DEAD = in_schema("""
SELECT :schema.outbox_json(o)::text, o.finished_at, o.id
FROM :schema.outbox AS o
WHERE o.state = 'dead'
  AND (%(at)s::timestamptz IS NULL OR (o.finished_at, o.id) < (%(at)s, %(key)s::bigint))
ORDER BY o.finished_at DESC, o.id DESC
LIMIT %(rows)s
""")
_SHOW = in_schema("SELECT :schema.outbox_json(o)::text FROM :schema.outbox AS o WHERE o.id = %s")


async def list_rows(request: Request, identity: Identity) -> Response:
    _check_operator(identity)
    asked = read_query(request, RowQuery)
    at, key = cursor.decode(asked.cursor, cursor.row_id)
    values = {"at": at, "key": key, "rows": asked.limit + 1}
    rows = await context(request).database.rows(_DEAD, values)
    page, more = rows[: asked.limit], len(rows) > asked.limit
    following = cursor.encode(page[-1][1], page[-1][2]) if more else None
    return json_response(
        f'{{"rows": [{", ".join(row[0] for row in page)}], "next": {json.dumps(following)}}}'
    )


async def show_row(request: Request, identity: Identity) -> Response:
    _check_operator(identity)
    return json_response(await _show(request))


async def retry_row(request: Request, identity: Identity) -> Response:
    """A dead or cancelled row becomes ready."""
    return await _change(request, identity, "retry")


async def discard_row(request: Request, identity: Identity) -> Response:
    """A dead row becomes cancelled."""
    return await _change(request, identity, "discard")


async def cancel_row(request: Request, identity: Identity) -> Response:
    """A ready row becomes cancelled at once, a running row when its worker has stopped it."""
    return await _change(request, identity, "cancel")


async def _change(request: Request, identity: Identity, change: str) -> Response:
    _check_operator(identity)
    try:
        row = await context(request).database.row(COMMANDS[change], (_id(request),))
    except pg.UniqueViolation:
        raise Problem("wrong-state", "An unfinished row has the same unique_key by now.") from None
    assert row is not None
    shown = await _show(request)
    if row[0] is None:
        state = json.loads(shown)["state"]
        raise Problem("wrong-state", f"A row that is {state} cannot take this: {change}.", state=state)
    context(request).stuck.work_came()
    return json_response(shown, 202 if row[0] == "running" else 200)


async def _show(request: Request) -> str:
    row = await context(request).database.row(_SHOW, (_id(request),))
    if row is None:
        raise _no_row()
    return str(row[0])


def _id(request: Request) -> int:
    try:
        return cursor.row_id(str(request.path_params["id"]))
    except ValueError:
        raise _no_row() from None


def _no_row() -> Problem:
    return Problem("not-found", "There is no such row.")


def _check_operator(identity: Identity) -> None:
    if not identity.operator:
        raise Problem("forbidden", "Only operators may see the outbox.")

"""The API's routes of sessions, messages and rows: HTTP around the functions that do the work."""

import json

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api import messages, rows, sessions
from outwake.app.api.answer import Page, Place, json_response
from outwake.app.api.body import idempotency_key, read_body, read_query, traceparent
from outwake.app.api.models import (
    MessageQuery,
    PromptCreate,
    PromptQuery,
    RowQuery,
    SessionCreate,
    SessionPatch,
    SessionQuery,
)
from outwake.app.api.rows import Change
from outwake.app.auth.identity import Identity
from outwake.app.context import context

JSON = ("application/json",)
PATCH = ("application/merge-patch+json", "application/json")


async def create_session(request: Request, identity: Identity) -> Response:
    asked = await read_body(request, SessionCreate, JSON)
    key, trace = idempotency_key(request), traceparent(request)
    created = await sessions.create_session(context(request), identity, asked, key=key, trace=trace)
    request.state.session = created.session_id
    headers = {"Location": f"/sessions/{created.session_id}", **_replay_mark(replayed=created.replayed)}
    return json_response(created.answer, 201, headers)


async def create_prompt(request: Request, identity: Identity) -> Response:
    asked = await read_body(request, PromptCreate, JSON)
    key, trace, id_ = idempotency_key(request), traceparent(request), request.path_params["id"]
    created = await sessions.create_prompt(context(request), identity, id_, asked, key=key, trace=trace)
    return json_response(created.answer, 201, _replay_mark(replayed=created.replayed))


def _replay_mark(*, replayed: bool) -> dict[str, str]:
    return {"Idempotent-Replayed": "true"} if replayed else {}


async def list_sessions(request: Request, identity: Identity) -> Response:
    asked = read_query(request, SessionQuery)
    return _page("sessions", await sessions.list_sessions(context(request), identity, asked))


async def show_session(request: Request, identity: Identity) -> Response:
    return json_response(await sessions.show_session(context(request), identity, request.path_params["id"]))


async def list_prompts(request: Request, identity: Identity) -> Response:
    asked, id_ = read_query(request, PromptQuery), request.path_params["id"]
    return _page("prompts", await sessions.list_prompts(context(request), identity, id_, asked))


async def rename_session(request: Request, identity: Identity) -> Response:
    asked, id_ = await read_body(request, SessionPatch, PATCH), request.path_params["id"]
    return json_response(await sessions.rename_session(context(request), identity, id_, asked))


async def archive_session(request: Request, identity: Identity) -> Response:
    await sessions.archive_session(context(request), identity, request.path_params["id"])
    return Response(status_code=204)


async def cancel_session(request: Request, identity: Identity) -> Response:
    ended = await sessions.cancel_session(context(request), identity, request.path_params["id"])
    return json_response(json.dumps(ended._asdict()), 202 if ended.cancelling else 200)


async def list_messages(request: Request, identity: Identity) -> Response:
    asked, id_ = read_query(request, MessageQuery), request.path_params["id"]
    return _page("messages", await messages.list_messages(context(request), identity, id_, asked))


async def list_rows(request: Request, identity: Identity) -> Response:
    asked = read_query(request, RowQuery)
    return _page("rows", await rows.list_rows(context(request), identity, asked))


async def show_row(request: Request, identity: Identity) -> Response:
    return json_response(await rows.show_row(context(request), identity, request.path_params["id"]))


async def retry_row(request: Request, identity: Identity) -> Response:
    return await _change(request, identity, "retry")


async def discard_row(request: Request, identity: Identity) -> Response:
    return await _change(request, identity, "discard")


async def cancel_row(request: Request, identity: Identity) -> Response:
    return await _change(request, identity, "cancel")


async def _change(request: Request, identity: Identity, change: Change) -> Response:
    changed = await rows.change_row(context(request), identity, request.path_params["id"], change)
    return json_response(changed.answer, 202 if changed.stopping else 200)


def _page(name: str, page: Page[Place]) -> Response:
    return json_response(f'{{"{name}": [{", ".join(page.items)}], "next": {json.dumps(page.next)}}}')

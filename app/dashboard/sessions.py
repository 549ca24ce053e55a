"""The pages of sessions: the list, the form for a new session, and a live conversation."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api import messages, sessions
from outwake.app.api.answer import json_response
from outwake.app.api.body import check_body, check_key, check_query, traceparent
from outwake.app.api.models import (
    MAX_SEQ,
    MessageQuery,
    PromptCreate,
    PromptQuery,
    SessionCreate,
    SessionPatch,
    SessionQuery,
)
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.context import Context, context
from outwake.app.dashboard import queries
from outwake.app.dashboard.build import off_loop, parse, parse_message
from outwake.app.dashboard.conversation import AttemptOutput, attempts_of, outcome_of
from outwake.app.dashboard.formatting import pretty
from outwake.app.dashboard.markdown import Budget
from outwake.app.dashboard.page import go, read_form, render
from outwake.app.live.events import HEARTBEAT, Following
from outwake.app.live.streams import Stream

LIST = 30  # sessions on a page
WINDOW = 300  # messages on a page
BATCH = 500  # messages the script requests at a time
PAGE_BYTES = 1_000_000  # of a page's messages
FOLLOWED = 100  # most sessions of one stream
FILTERS = ("inbox_status", "session_status", "repo")
FIELDS = ("repo", "target_branch", "prompt", "title", "branch", "parent")


async def list_sessions(request: Request, identity: Identity) -> Response:
    chosen = {name: request.query_params[name] for name in FILTERS if request.query_params.get(name)}
    here, cursor = context(request), request.query_params.get("cursor")
    asked = check_query(SessionQuery, {**chosen, "limit": LIST, "cursor": cursor or None})
    found = await sessions.list_sessions(here, identity, asked)
    shown = [json.loads(item) for item in found.items]
    turns = await queries.turns(here.database, [s["id"] for s in shown])
    moving = [s["id"] for s in shown if s["inbox_status"] in ("active", "pending")]
    return await render(
        request,
        identity,
        "sessions.html",
        sessions=shown,
        turns=turns,
        chosen=chosen,
        cursor=cursor,
        older="/?" + urlencode({**chosen, "cursor": found.next}) if found.next else None,
        events="/ui/sessions/events?" + urlencode({"id": moving}, doseq=True) if moving else None,
    )


async def follow_sessions(request: Request, identity: Identity) -> Response:
    """The Server-Sent Events `status` of several sessions, without messages. The list uses them."""
    here = context(request)
    try:
        ids = {UUID(text) for text in request.query_params.getlist("id")}
    except ValueError:
        raise Problem("not-found", "There is no such session.") from None
    if not 0 < len(ids) <= FOLLOWED:
        raise Problem("invalid", f"Name 1 to {FOLLOWED} sessions.")
    close = here.limits.open_stream(identity)
    # A stream that starts after the highest possible seq never reads a message.
    streams = {
        here.hub.follow(id_, MAX_SEQ, until_completed=True, reader=identity.scope or "") for id_ in ids
    }

    def leave() -> None:
        for stream in streams:
            here.hub.leave(stream)
        close()

    try:
        for stream in streams:
            await stream.begin()
            if not identity.sees(stream.user_id):
                raise sessions.no_session()
    except BaseException:
        leave()
        raise
    return Following(_changes(streams, identity.until), leave)


async def _changes(streams: set[Stream], until: float) -> AsyncIterator[bytes]:
    waiting: dict[asyncio.Task[bytes], Stream] = {}
    try:
        while (following := {s for s in streams if not s.ended}) and time.monotonic() < until:
            for stream in following - set(waiting.values()):
                waiting[asyncio.create_task(stream.take(HEARTBEAT))] = stream
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                del waiting[task]
            yield b"".join(task.result() for task in ready) or b": heartbeat\n\n"
    finally:
        for task in waiting:
            task.cancel()


async def new_session(request: Request, identity: Identity) -> Response:
    given = {name: request.query_params.get(name, "") for name in FIELDS}
    given["target_branch"] = given["target_branch"] or "main"
    return await _form(request, identity, given)


async def create_session(request: Request, identity: Identity) -> Response:
    form = await read_form(request)
    given = {name: form.get(name, "") for name in FIELDS}
    # Blank fields are left out. The key ensures that a form sent twice creates one session.
    body = {name: value for name, value in given.items() if value.strip()}
    here, trace = context(request), traceparent(request)
    try:
        asked = check_body(SessionCreate, body, here.settings)
        created = await sessions.create_session(here, identity, asked, key=_key(form), trace=trace)
    except Problem as problem:
        if problem.kind not in ("invalid", "branch-taken", "key-reused"):
            raise
        return await _form(request, identity, given, problem)
    request.state.session = created.session_id
    return go(f"/ui/sessions/{created.session_id}")


def _key(form: Mapping[str, str]) -> str | None:
    return check_key(form["key"]) if form.get("key") else None


async def _form(
    request: Request, identity: Identity, given: dict[str, str], problem: Problem | None = None
) -> Response:
    errors: dict[str, str] = {}
    if problem:
        for error in problem.document.get("errors", ()):
            errors.setdefault(error.get("pointer", "").removeprefix("#/"), error["detail"])
        if problem.kind == "branch-taken":
            errors["branch"] = str(problem)
        errors = errors or {"": str(problem)}
    status = problem.status if problem else 200
    key = secrets.token_urlsafe(16)
    return await render(request, identity, "new.html", status, given=given, errors=errors, key=key)


async def show_session(request: Request, identity: Identity) -> Response:
    """The page. With `after` and `live=1`: only messages after that seq, and what may have changed."""
    here, id_ = context(request), request.path_params["id"]
    text = await sessions.show_session(here, identity, id_)
    session = await off_loop(identity.user_id, lambda: parse(text))
    live = request.query_params.get("live") == "1"
    after = _after(request, max(await queries.last_seq(here.database, id_) - WINDOW, 0))
    asked = MessageQuery(after=after, limit=BATCH if live else WINDOW, attempts="all")
    found = await messages.list_messages(here, identity, id_, asked, PAGE_BYTES)
    shown, said = await off_loop(identity.user_id, lambda: _read(found.items))
    prompts = await _prompts(here, identity, session, said)
    turns = await off_loop(identity.user_id, lambda: [_turn(prompt, said) for prompt in prompts])
    costs = [turn["facts"]["cost"] for turn in turns if "cost" in turn["facts"]]
    if live:  # other turns have not changed
        turns = [t for t in turns[:-2] if t["attempts"] or t["status"] in ("queued", "running")] + turns[-2:]
    return await render(
        request,
        identity,
        "session.html",
        session=session,
        turns=turns,
        rows=await queries.turn_rows(here.database, id_, [prompt["id"] for prompt in prompts]),
        cost=sum(costs) if costs else None,
        after=after,
        earlier=max(after - WINDOW, 0) if after and not live else None,
        seen=shown[-1]["seq"] if shown else after,
        more=found.next,
    )


def _read(items: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, list[AttemptOutput]]]:
    """The messages, and the attempts of each prompt as they are shown."""
    shown = [parse_message(item) for item in items]
    return shown, attempts_of(shown, Budget())


def _turn(prompt: dict[str, Any], said: Mapping[str, list[AttemptOutput]]) -> dict[str, Any]:
    return {**prompt, **outcome_of(prompt["result"]), "attempts": said.get(prompt["id"], [])}


async def _prompts(
    here: Context, identity: Identity, session: dict[str, Any], said: Collection[str]
) -> list[dict[str, Any]]:
    """The session's newest prompts, and earlier ones whose messages are shown. All by time."""
    newest: list[dict[str, Any]] = session["prompts"]
    missing = [UUID(id_) for id_ in set(said) - {prompt["id"] for prompt in newest}]
    if not missing:
        return newest
    asked = PromptQuery(limit=len(missing))
    page = await sessions.list_prompts(here, identity, UUID(session["id"]), asked, missing)
    earlier = await off_loop(identity.user_id, lambda: [parse(item) for item in reversed(page.items)])
    return [*earlier, *newest]


async def show_message(request: Request, identity: Identity) -> Response:
    """One message as JSON. The page links to it if a message is too long to show."""
    seq, id_ = request.path_params["seq"], request.path_params["id"]
    asked = check_query(MessageQuery, {"after": max(seq - 1, 0), "limit": 1, "attempts": "all"})
    found = await messages.list_messages(context(request), identity, id_, asked)
    if not found.items:
        raise Problem("not-found", "There is no such message.")
    message = await off_loop(identity.user_id, lambda: parse_message(found.items[0]))
    if message["seq"] != seq:
        raise Problem("not-found", "There is no such message.")
    return json_response(await off_loop(identity.user_id, lambda: pretty(message)))


def _after(request: Request, otherwise: int) -> int:
    text = request.query_params.get("after", "")
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 19 else otherwise


async def prompt(request: Request, identity: Identity) -> Response:
    form, here, id_ = await read_form(request), context(request), request.path_params["id"]
    if form.get("prompt", "").strip():
        asked = check_body(PromptCreate, {"prompt": form["prompt"]}, here.settings)
        key, trace = _key(form), traceparent(request)
        await sessions.create_prompt(here, identity, id_, asked, key=key, trace=trace)
    return go(_path(request))


async def cancel(request: Request, identity: Identity) -> Response:
    await sessions.cancel_session(context(request), identity, request.path_params["id"])
    return go(_path(request))


async def archive(request: Request, identity: Identity) -> Response:
    await sessions.archive_session(context(request), identity, request.path_params["id"])
    return go(_path(request))


async def rename(request: Request, identity: Identity) -> Response:
    form, here = await read_form(request), context(request)
    asked = check_body(SessionPatch, {"title": form.get("title", "")}, here.settings)
    await sessions.rename_session(here, identity, request.path_params["id"], asked)
    return go(_path(request))


def _path(request: Request) -> str:
    return f"/ui/sessions/{request.path_params['id']}"

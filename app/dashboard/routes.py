"""The pages' routes. `/` lists the sessions. All others are below /ui/, apart from the API's paths."""

import mimetypes
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outwake.app.api.body import check_accept
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.dashboard import outbox, sessions, signin
from outwake.app.dashboard.cookie import is_secure
from outwake.app.dashboard.page import PACKED, THEME_COOKIE, THEMES, YEAR, back, go, page, read_form
from outwake.app.live import events

FILES = ("app.css", "app.js", "icon.svg")


def routes() -> list[Route]:
    session, row = "/ui/sessions/{id:uuid}", "/ui/outbox/{id:int}"
    return [
        page("/", sessions.list_sessions),
        page("/ui/new", sessions.new_session),
        page("/ui/sessions", sessions.create_session, "POST"),
        page("/ui/sessions/events", sessions.follow_sessions),
        page(session, sessions.show_session),
        page(f"{session}/events", events.follow_session),
        page(f"{session}/messages/{{seq:int}}", sessions.show_message),
        page(f"{session}/prompts", sessions.prompt, "POST"),
        page(f"{session}/cancel", sessions.cancel, "POST"),
        page(f"{session}/archive", sessions.archive, "POST"),
        page(f"{session}/rename", sessions.rename, "POST"),
        page("/ui/outbox", outbox.show_outbox),
        page(row, outbox.show_row),
        page(f"{row}/{{change}}", outbox.change_row, "POST"),
        page("/ui/dead", outbox.show_dead),
        page("/ui/workers", outbox.show_workers),
        page("/ui/theme", choose_theme, "POST", known=False),
        page("/ui/sign-in", signin.ask, known=False),
        page("/ui/sign-in", signin.by_token, "POST", known=False),
        page("/ui/sign-in/issuer", signin.go_to_issuer, known=False),
        page(signin.CALLBACK, signin.come_back, known=False),
        page("/ui/sign-out", signin.sign_out, "POST", known=False),
        Route("/ui/static/{version}/{name}", static, middleware=PACKED),
        page("/ui/{path:path}", missing),
    ]


async def choose_theme(request: Request, identity: Identity) -> Response:
    form = await read_form(request)
    response = go(back(form, "/"))
    if (theme := form.get("theme")) in THEMES:
        secure = is_secure(request)
        response.set_cookie(
            THEME_COOKIE, str(theme), max_age=YEAR, samesite="strict", httponly=True, secure=secure
        )
    return response


async def missing(request: Request, identity: Identity) -> Response:
    raise Problem("not-found", "There is no such page.")


async def static(request: Request) -> Response:
    """A static file. Its address changes with its content, so a browser may cache it for ever."""
    request.state.route = "/ui/static/{version}/{name}"
    name = request.path_params["name"]
    if name not in FILES:
        raise Problem("not-found", "There is no such file.")
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    check_accept(request, media_type)
    content = resources.files("outwake.app.dashboard").joinpath("static", name).read_bytes()
    headers = {"Cache-Control": f"public, max-age={YEAR}, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(content, headers=headers, media_type=media_type)

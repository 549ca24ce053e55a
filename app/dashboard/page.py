"""What all pages share: templates, headers, authentication, and readable errors.

Forged requests: a form of another site must not act for its visitor. A browser names the source of a request
in Sec-Fetch-Site and Origin, which no page can set. A POST is refused if it has neither, or if one of them
names another site. Programs can use the JSON API instead.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import cache, partial
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlencode

import psycopg
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from outwake.app.api.answer import Answer
from outwake.app.api.body import read_bytes
from outwake.app.api.problems import Problem, of_database
from outwake.app.auth.identity import Identity, is_same_origin
from outwake.app.context import context
from outwake.app.dashboard import formatting, queries
from outwake.app.dashboard.build import off_loop, packed
from outwake.app.dashboard.cookie import identify, signed_in
from outwake.app.dashboard.queries import Overview
from outwake.telemetry.log import get_logger

Handler = Callable[[Request, Identity], Awaitable[Response]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
    "Vary": "Cookie",
}
PACKED = [Middleware(GZipMiddleware, minimum_size=1000)]  # GZipMiddleware never compresses event streams
THEMES = ("auto", "light", "dark")
THEME_COOKIE = "outwake_theme"
NOBODY = Identity("", operator=False)
YEAR = 365 * 86400
STRANGERS_FORM = 16_384  # bytes, of somebody who has not signed in
FORM = "application/x-www-form-urlencoded"

log = get_logger("outwake.app.dashboard")


@cache
def _static(name: str) -> str:
    """The address of a static file. It changes with the file's content."""
    content = resources.files("outwake.app.dashboard").joinpath("static", name).read_bytes()
    return f"/ui/static/{hashlib.sha256(content).hexdigest()[:12]}/{name}"


def _time(at: Any, text: str | None = None) -> Markup:
    try:
        moment = formatting.moment(at)
    except (ValueError, TypeError, AttributeError, OverflowError):  # psql can write any
        return Markup("<span>{}</span>").format(str(at)[:40])
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(), f"{moment:%Y-%m-%d %H:%M:%S} UTC", text or formatting.ago(at)
    )


_TEMPLATES = Environment(
    loader=PackageLoader("outwake.app.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals.update(static=_static, time=_time, themes=THEMES)
_TEMPLATES.filters.update(
    pretty=formatting.pretty,
    duration=formatting.duration,
    ago=formatting.ago,
    money=formatting.money,
    count=formatting.count,
    moment=formatting.moment,
)


async def render(
    request: Request, identity: Identity, template: str, status: int = 200, **values: Any
) -> Response:
    """A page with the outbox's state in its header. NOBODY does not see that state."""
    here = context(request)
    overview, present = Overview(None, False, 1, 0), True
    if identity is not NOBODY:
        present = await here.presence.present()
    if identity.operator:
        overview = await queries.overview(here.database, timedelta(seconds=here.settings.stuck_after))
    make = partial(
        _text,
        request,
        template,
        identity=identity if identity is not NOBODY else None,
        overview=overview,
        worker_present=present,
        **values,
    )
    accepted = request.headers.get("accept-encoding", "")
    body, headers = await off_loop(identity.user_id, lambda: packed(make(), accepted))
    return Answer(body, status, headers, "text/html; charset=utf-8")


def _text(request: Request, template: str, **values: Any) -> str:
    theme = request.cookies.get(THEME_COOKIE, "auto")
    return _TEMPLATES.get_template(template).render(
        path=request.url.path,
        here=_here(request),
        signed_in=signed_in(request),
        theme=theme if theme in THEMES else "auto",
        **values,
    )


def page(path: str, handler: Handler, *methods: str, known: bool = True) -> Route:
    """A route whose errors are pages too. With `known=False` it does not need a signed-in user."""

    async def handle(request: Request) -> Response:
        request.state.route = path
        identity = None
        try:
            if request.method == "POST":
                _check_same_site(request)
            identity = await identify(request) if known else None
            response = await handler(request, identity or NOBODY)
        except Problem as problem:
            response = _error(request, identity, problem)
            if problem.kind == "unauthorized" and _navigates(request):
                response = go("/ui/sign-in?" + urlencode({"back": _here(request)}))
        except psycopg.Error as error:
            log.warning("page_failed", route=path, sqlstate=error.sqlstate, error=str(error))
            response = _error(request, identity, of_database(error))
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return Route(path, handle, methods=methods or ("GET",), middleware=PACKED)


def _error(request: Request, identity: Identity | None, problem: Problem) -> Response:
    """The error's page, made without a query."""
    again = request.method == "GET"
    values = {
        "again": again,
        "overview": Overview(None, False, 1, 0),
        "worker_present": True,
        "identity": identity,
    }
    response = HTMLResponse(_text(request, "error.html", problem=problem, **values), problem.status)
    response.headers.update(problem.headers)
    return response


def _navigates(request: Request) -> bool:
    """Whether the browser shows the answer. A script could not use a redirect to the issuer."""
    return request.method == "GET" and request.headers.get("sec-fetch-mode", "navigate") == "navigate"


def _here(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _check_same_site(request: Request) -> None:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    same = site in (None, "same-origin") and (site, origin) != (None, None)
    if not (same and is_same_origin(request, context(request).settings)):
        raise Problem("forbidden", "This form was not sent by a page of this server.")


async def read_form(request: Request) -> dict[str, str]:
    """The form's fields, with line feeds as line ends.

    Raises Problem (unsupported-media-type, malformed, body-too-large).
    """
    if request.headers.get("content-type", "").partition(";")[0] != FORM:
        raise Problem("unsupported-media-type", f"Send the form as {FORM}.")
    known = hasattr(request.state, "user")
    limit = 3 * context(request).settings.max_body if known else STRANGERS_FORM  # %-escapes triple it
    content = await read_bytes(request, limit)
    try:
        pairs = parse_qsl(content.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50)
    except ValueError:
        raise Problem("malformed", "The form cannot be read.") from None
    return {name: value.replace("\r\n", "\n") for name, value in pairs}


def go(path: str) -> Response:
    """The redirect after a POST, to the page that shows its effect."""
    return RedirectResponse(path, 303)


def back(form: Mapping[str, str], otherwise: str) -> str:
    """The page that had the form. It must be a page of this server."""
    path = form.get("back", "")
    fine = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if fine else otherwise

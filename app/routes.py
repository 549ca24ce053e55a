"""The API as one table. The server's routes and the OpenAPI document are made from it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outwake.app.api import handlers, health, metrics, models
from outwake.app.api.body import check_accept
from outwake.app.api.problems import KINDS
from outwake.app.auth.identity import Identity
from outwake.app.auth.limits import admit
from outwake.app.context import context
from outwake.app.live import events

Handler = Callable[[Request, Identity], Awaitable[Response]]
Access = Literal["user", "operator", "anybody"]
JSON = "application/json"
EVENTS = "text/event-stream"
NOBODY = Identity("nobody", operator=False)


@dataclass(frozen=True)
class Endpoint:
    """One method of one path. `answers` has a description and the body's model for each status."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, tuple[str, type[BaseModel] | None]]
    problems: tuple[str, ...] = ()
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    body_types: tuple[str, ...] = ()
    gives: str = JSON
    access: Access = "user"
    request_headers: tuple[str, ...] = ()
    answer_headers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The kinds of problem this endpoint can answer with."""
        always = ["not-acceptable", "internal"]
        if self.access != "anybody":
            always += ["unauthorized", "forbidden", "too-many-requests", "unavailable"]
        if self.query or self.request_headers or self.body:
            always.append("invalid")
        if self.body:
            always += ["malformed", "body-too-large", "unsupported-media-type"]
        if "{" in self.path:
            always.append("not-found")
        return sorted({*always, *self.problems}, key=lambda kind: (KINDS[kind][0], kind))


SESSION = "/sessions/{id:uuid}"
ROW = "/outbox/{id:int}"

ENDPOINTS = [
    Endpoint(
        "POST",
        "/sessions",
        handlers.create_session,
        "Create a session and the work it causes, in one transaction",
        {201: ("Created, or created before under this key.", models.SessionDetail)},
        ("branch-taken", "key-reused", "too-many-sessions"),
        body=models.SessionCreate,
        body_types=handlers.JSON,
        request_headers=("Idempotency-Key", "traceparent"),
        answer_headers={201: ("Location", "Idempotent-Replayed")},
    ),
    Endpoint(
        "GET",
        "/sessions",
        handlers.list_sessions,
        "List sessions, newest first",
        {200: ("A page.", models.SessionPage)},
        query=models.SessionQuery,
    ),
    Endpoint(
        "GET",
        SESSION,
        handlers.show_session,
        "Show a session with its newest prompts",
        {200: ("The session.", models.SessionDetail)},
    ),
    Endpoint(
        "PATCH",
        SESSION,
        handlers.rename_session,
        "Rename a session",
        {200: ("The session as it is now.", models.Session)},
        ("archived",),
        body=models.SessionPatch,
        body_types=handlers.PATCH,
    ),
    Endpoint(
        "DELETE",
        SESSION,
        handlers.archive_session,
        "Cancel a session's turns and archive it",
        {204: ("Archived, now or before.", None)},
    ),
    Endpoint(
        "GET",
        f"{SESSION}/prompts",
        handlers.list_prompts,
        "List a session's prompts, newest first",
        {200: ("A page.", models.PromptPage)},
        query=models.PromptQuery,
    ),
    Endpoint(
        "POST",
        f"{SESSION}/prompts",
        handlers.create_prompt,
        "Add a turn to a session",
        {201: ("Created, or created before under this key.", models.PromptCreated)},
        ("archived", "session-full", "key-reused", "too-many-sessions"),
        body=models.PromptCreate,
        body_types=handlers.JSON,
        request_headers=("Idempotency-Key", "traceparent"),
        answer_headers={201: ("Idempotent-Replayed",)},
    ),
    Endpoint(
        "POST",
        f"{SESSION}/cancel",
        handlers.cancel_session,
        "Cancel a session's turns",
        {
            200: ("All had ended or ended at once.", models.Cancelled),
            202: ("A worker has yet to stop one.", models.Cancelled),
        },
    ),
    Endpoint(
        "GET",
        f"{SESSION}/messages",
        handlers.list_messages,
        "List what the agent said, in order",
        {200: ("A page.", models.MessagePage)},
        query=models.MessageQuery,
    ),
    Endpoint(
        "GET",
        f"{SESSION}/events",
        events.follow_session,
        "Follow a session live",
        {
            200: (
                "Server-Sent Events: `message` and `superseded` (data: Message), `status` (SessionState).",
                None,
            ),
            204: ("Nothing will come any more; told to clients that come back.", None),
        },
        ("too-many-streams",),
        query=models.EventQuery,
        gives=EVENTS,
        request_headers=("Last-Event-ID",),
    ),
    Endpoint(
        "GET",
        "/outbox",
        handlers.list_rows,
        "List dead rows, last ended first",
        {200: ("A page.", models.RowPage)},
        query=models.RowQuery,
        access="operator",
    ),
    Endpoint(
        "GET",
        ROW,
        handlers.show_row,
        "Show a row of the outbox",
        {200: ("The row.", models.Row)},
        access="operator",
    ),
    Endpoint(
        "POST",
        f"{ROW}/retry",
        handlers.retry_row,
        "Make a dead or cancelled row ready again, its failures forgiven",
        {200: ("The row as it is now.", models.Row)},
        ("wrong-state",),
        access="operator",
    ),
    Endpoint(
        "POST",
        f"{ROW}/discard",
        handlers.discard_row,
        "End a dead row for good",
        {200: ("The row as it is now.", models.Row)},
        ("wrong-state",),
        access="operator",
    ),
    Endpoint(
        "POST",
        f"{ROW}/cancel",
        handlers.cancel_row,
        "Cancel a row that waits or runs",
        {
            200: ("The row as it is now.", models.Row),
            202: ("A worker has yet to stop it.", models.Row),
        },
        ("wrong-state",),
        access="operator",
    ),
    Endpoint(
        "GET",
        "/healthz",
        health.alive,
        "Is the process alive?",
        {200: ("Yes.", models.Health)},
        ("not-ready",),
        access="anybody",
    ),
    Endpoint(
        "GET",
        "/readyz",
        health.ready,
        "Can it serve requests?",
        {200: ("Yes.", models.Ready)},
        ("not-ready",),
        query=models.ReadyQuery,
        access="anybody",
    ),
    Endpoint(
        "GET",
        "/metrics",
        metrics.metrics,
        "Metrics for Prometheus",
        {200: ("In its text format.", None)},
        gives="text/plain",
        access="anybody",
    ),
]


class _Integer(Convertor[int]):
    """Starlette's own takes any number of digits, and Python then refuses to read them."""

    regex = "[0-9]{1,19}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("int", _Integer())


def routes() -> list[Route]:
    """The table as routes. The methods of one path share a route, so that a 405 names all of them."""
    paths: dict[str, dict[str, Endpoint]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    return [_route(path, methods) for path, methods in paths.items()]


def _route(path: str, methods: Mapping[str, Endpoint]) -> Route:
    async def handle(request: Request) -> Response:
        request.state.route = path
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        check_accept(request, endpoint.gives)
        identity = NOBODY
        if endpoint.access != "anybody":
            here = context(request)
            identity = await here.authenticator.identify(request)
            admit(request, here.limits, identity)
        response = await endpoint.handler(request, identity)
        if user := getattr(request.state, "made_of_token", None):
            response.headers["Outwake-User"] = user
        return response

    return Route(path, handle, methods=list(methods))
